//! A running Event Service and the requests that tests send to it.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use event_service::app;
use event_service::settings::Settings;
use event_service::state::MIGRATIONS;
use futures::future::{Either, select};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use service_kit::admit::limits::Limits;
use service_kit::amqp::Broker;
use service_kit::auth::AuthSettings;
use service_kit::http::tls::Trust;
use service_kit::observe::traces::TraceSettings;
use service_kit::process::common::{Common, LogFormat};
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::Secret;
use service_kit::testing::{database, server, unique, wait_until};
use sqlx::{PgPool, PgTransaction};
use tokio::net::TcpListener;

use crate::booking_consumer::SOON;

/// The service's limit on requests in flight.
pub(crate) const IN_FLIGHT_MAX: usize = 300;

/// A service started for one test, with a pool on its database.
pub(crate) struct TestApp {
    pub(crate) base: String,
    pub(crate) db: PgPool,
    pub(crate) broker: Broker,
    pub(crate) queue: String,
    pub(crate) http: Client,
    lifecycle: Lifecycle,
    /// Sessions created so far. Each takes place on its own day, so that none overlap.
    sessions: AtomicU32,
}

pub(crate) fn own_exchange() -> Broker {
    let url = Secret::from(server("TEST_RABBITMQ_URL").as_str());
    Broker { url, exchange: unique("exchange"), trust: Trust::default() }
}

impl TestApp {
    pub(crate) async fn spawn() -> Self {
        Self::spawn_limited(Limits::default()).await
    }

    pub(crate) async fn spawn_with(database_url: Secret, broker: Broker) -> Self {
        Self::spawn_within(Limits::default(), database_url, broker, AuthSettings::default(), None).await
    }

    pub(crate) async fn spawn_limited(limits: Limits) -> Self {
        let database_url = database("event", &MIGRATIONS).await;
        Self::spawn_within(limits, database_url, own_exchange(), AuthSettings::default(), None).await
    }

    /// A service that authenticates its callers.
    pub(crate) async fn spawn_as(auth: AuthSettings, internal_listen: Option<SocketAddr>) -> Self {
        let database_url = database("event", &MIGRATIONS).await;
        Self::spawn_within(Limits::default(), database_url, own_exchange(), auth, internal_listen).await
    }

    async fn spawn_within(
        limits: Limits,
        database_url: Secret,
        broker: Broker,
        auth: AuthSettings,
        internal_listen: Option<SocketAddr>,
    ) -> Self {
        let queue = unique("queue");
        let settings = Settings {
            common: Common {
                listen: ([127, 0, 0, 1], 0).into(),
                log_level: "warn".into(),
                log_format: LogFormat::Pretty,
                requests_in_flight_max: IN_FLIGHT_MAX,
                request_time_max: Duration::from_secs(30),
                limits,
                auth,
                traces: TraceSettings::default(),
                certificate: None,
                trust: Trust::default(),
            },
            internal_listen,
            database_url: database_url.clone(),
            database_connections_max: 10,
            seat_stream_watchers_max: 150,
            broker: broker.clone(),
            queue: queue.clone(),
        };
        let listener = TcpListener::bind(settings.common.listen).await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let lifecycle = Lifecycle::new();
        app::run(settings, listener, &lifecycle).await.unwrap();
        let db = PgPool::connect(database_url.reveal()).await.unwrap();
        Self {
            base,
            db,
            broker,
            queue,
            http: Client::builder().build().unwrap(),
            lifecycle,
            sessions: AtomicU32::new(0),
        }
    }

    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Response {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value, expected: u16) -> Value {
        answer(self.call(Method::POST, path, Some(body)).await, expected).await
    }

    pub(crate) async fn get(&self, path: &str, expected: u16) -> Value {
        answer(self.call(Method::GET, path, None).await, expected).await
    }

    pub(crate) async fn organizer(&self) -> String {
        id(&self.post("/api/v1/organizers", &json!({ "name": "City Stage" }), 201).await, "organizer_id")
    }

    pub(crate) async fn event(&self) -> String {
        let event = json!({ "organizer_id": self.organizer().await, "title": "Concert", "event_type": "concert" });
        id(&self.post("/api/v1/events", &event, 201).await, "event_id")
    }

    pub(crate) async fn location(&self) -> String {
        let location = json!({ "name": "Mill", "address": "1 Mill Lane", "city": "Berlin", "country": "Germany", "timezone": "Europe/Berlin" });
        id(&self.post("/api/v1/locations", &location, 201).await, "location_id")
    }

    pub(crate) async fn hall(&self, capacity: u32) -> String {
        let path = format!("/api/v1/locations/{}/halls", self.location().await);
        id(&self.post(&path, &json!({ "name": "Great Hall", "capacity": capacity }), 201).await, "hall_id")
    }

    /// The body of a session on a day that no other session of this service has.
    pub(crate) fn session_body(&self, event: &str, hall: &str) -> Value {
        let day = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        let time = |hour: u32| format!("2031-{:02}-{:02}T{hour:02}:00:00Z", day / 28 + 1, day % 28 + 1);
        json!({ "event_id": event, "hall_id": hall, "start_time": time(19), "end_time": time(21), "base_price": 100.00 })
    }

    /// Creates a session with `seats` seats in one row. Returns its id and the ids of its session seats in order.
    pub(crate) async fn session(&self, seats: u32) -> (String, Vec<String>) {
        let hall = self.hall(seats).await;
        self.post(&format!("/api/v1/halls/{hall}/seats/bulk"), &json!({ "rows": 1, "seats_per_row": seats }), 201)
            .await;
        let session =
            id(&self.post("/api/v1/sessions", &self.session_body(&self.event().await, &hall), 201).await, "session_id");
        let seats = self.get(&format!("/api/v1/sessions/{session}/seats"), 200).await;
        let seats = seats.as_array().unwrap().iter().map(|seat| id(seat, "session_seat_id")).collect();
        (session, seats)
    }

    /// Whether a statement waits for a lock of another transaction.
    pub(crate) async fn waits_for_a_lock(&self) -> bool {
        let sql = "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')";
        sqlx::query_scalar(sql).fetch_one(&self.db).await.unwrap()
    }

    /// Runs `second` while `first` is open. Commits `first` as soon as `second` waits for a lock or is finished.
    pub(crate) async fn beside<T>(&self, first: PgTransaction<'_>, second: impl Future<Output = T>) -> T {
        let second = pin!(second);
        let waits =
            pin!(wait_until("the second transaction waits for a lock", SOON, async || self.waits_for_a_lock().await));
        let under_way = select(second, waits).await;
        first.commit().await.unwrap();
        match under_way {
            Either::Left((done, _)) => done,
            Either::Right((_, second)) => second.await,
        }
    }

    /// Each seat's status, in the order of the seats.
    pub(crate) async fn statuses(&self, session: &str) -> Vec<String> {
        let seats = self.get(&format!("/api/v1/sessions/{session}/seats"), 200).await;
        seats.as_array().unwrap().iter().map(|seat| id(seat, "status")).collect()
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.lifecycle.stop();
    }
}

pub(crate) fn id(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}")).to_owned()
}

async fn answer(response: Response, expected: u16) -> Value {
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    assert_eq!(status, expected, "{text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}
