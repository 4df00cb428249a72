//! Starts both services, sends the requests that tests make, and checks the promises at the end.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use booking_service::app;
use booking_service::audit::{AuditWindow, Report, audit};
use booking_service::outbox::{self, Wanted};
use booking_service::settings::{Rules, Settings};
use booking_service::state::App;
use event_service::settings::Settings as EventSettings;
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};
use service_kit::admit::limits::Limits;
use service_kit::amqp::Broker;
use service_kit::auth::AuthSettings;
use service_kit::observe::traces::TraceSettings;
use service_kit::process::common::{Common, LogFormat};
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::Secret;
use service_kit::testing::login::Login;
use service_kit::testing::tls::{TestCa, TlsProxy};
use service_kit::testing::wires::ChaosProxy;
use service_kit::testing::{database, server, unique, wait_until};
use sqlx::PgPool;
use tokio::net::TcpListener;
use uuid::Uuid;

/// How long to wait for something that should happen at once. It leaves room for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// The secret with which the payment provider signs its notices.
pub(crate) const WEBHOOK_SECRET: &str = "shared with the provider";

/// Both services, and the proxies between them and their servers. Each proxy can cut its connection.
pub(crate) struct System {
    pub(crate) app: App,
    pub(crate) settings: Settings,
    pub(crate) event_base: String,
    pub(crate) booking_base: String,
    pub(crate) event_db: PgPool,
    pub(crate) event_database_url: Secret,
    pub(crate) to_event_service: ChaosProxy,
    pub(crate) to_redis: ChaosProxy,
    pub(crate) to_broker: ChaosProxy,
    pub(crate) http: Client,
    pub(crate) lifecycle: Lifecycle,
    /// The login that issues tokens to users and staff. Without one, the services trust the `x-user-id` header.
    pub(crate) login: Option<Login>,
    /// The TLS proxies in front of the servers. Empty, unless the system was started with TLS.
    pub(crate) tls_proxies: Vec<(&'static str, TlsProxy)>,
    sessions: AtomicU32,
}

/// A session on sale: its id, its seats in order, and a tier of factor 1.
#[derive(Clone)]
pub(crate) struct Sale {
    pub(crate) session: String,
    pub(crate) seats: Vec<String>,
    pub(crate) tier: String,
}

const USUAL_RULES: Rules =
    Rules { hold_time: Duration::from_secs(600), seats_max: 10, open_reservations_max: 0, seats_per_session_max: 0 };

fn common(ca: Option<&TestCa>, auth: &AuthSettings) -> Common {
    Common {
        listen: ([127, 0, 0, 1], 0).into(),
        log_level: "warn".into(),
        log_format: LogFormat::Pretty,
        requests_in_flight_max: 2000,
        request_time_max: Duration::from_secs(30),
        limits: Limits::default(),
        auth: auth.clone(),
        traces: TraceSettings::default(),
        certificate: ca.map(|ca| ca.local().for_server()),
        trust: ca.map(TestCa::trust).unwrap_or_default(),
    }
}

fn event_settings(common: Common, database_url: Secret, broker: &Broker, queue: &str) -> EventSettings {
    EventSettings {
        common,
        internal_listen: None,
        database_url,
        database_connections_max: 20,
        seat_stream_watchers_max: 150,
        broker: broker.clone(),
        queue: queue.to_owned(),
    }
}

/// Builds the URLs of the servers. With a certificate authority, each URL leads through a TLS proxy.
struct Links<'a> {
    ca: Option<&'a TestCa>,
    tls_proxies: Vec<(&'static str, TlsProxy)>,
}

impl Links<'_> {
    async fn way_to(&mut self, server: &'static str, url: &str) -> Secret {
        let Some(ca) = self.ca else { return Secret::from(url) };
        let (proxy, url) = TlsProxy::in_front_of(url, &ca.local()).await;
        self.tls_proxies.push((server, proxy));
        Secret::from(url.as_str())
    }
}

impl System {
    /// Starts both services with holds of ten minutes.
    pub(crate) async fn start() -> Self {
        Self::start_with(Duration::from_secs(600)).await
    }

    /// Starts both services with this hold time and without a worker. Tests run the worker's tasks themselves.
    pub(crate) async fn start_with(hold_time: Duration) -> Self {
        Self::start_as(None, AuthSettings::default(), None, |_, rules| rules.hold_time = hold_time).await
    }

    /// Starts both services behind a login. Users and staff then send its tokens.
    pub(crate) async fn start_behind(login: Login) -> Self {
        Self::start_as(None, login.settings(), Some(login), |_, _| ()).await
    }

    /// Starts both services with TLS on every link. Every client trusts only `ca`, which issued all certificates.
    pub(crate) async fn start_with_tls(ca: &TestCa) -> Self {
        Self::start_as(Some(ca), AuthSettings::default(), None, |_, _| ()).await
    }

    /// Starts both services with limits and rules that `change` sets. The usual ones do not restrict anybody.
    pub(crate) async fn start_limited(change: impl FnOnce(&mut Limits, &mut Rules)) -> Self {
        Self::start_as(None, AuthSettings::default(), None, change).await
    }

    /// Starts both services. With a `ca`, every link has TLS.
    pub(crate) async fn start_as(
        ca: Option<&TestCa>,
        auth: AuthSettings,
        login: Option<Login>,
        change: impl FnOnce(&mut Limits, &mut Rules),
    ) -> Self {
        let (mut limits, mut rules) = (Limits::default(), USUAL_RULES);
        change(&mut limits, &mut rules);
        let common = || Common { limits: limits.clone(), ..common(ca, &auth) };
        let (event_url, booking_url) = tokio::join!(
            database("event", &event_service::state::MIGRATIONS),
            database("booking", &booking_service::schema::MIGRATIONS)
        );
        let (to_broker, broker_url) = ChaosProxy::in_front_of(&server("TEST_RABBITMQ_URL")).await;
        let (to_redis, redis_url) = ChaosProxy::in_front_of(&server("TEST_REDIS_URL")).await;
        let (exchange, queue) = (unique("exchange"), unique("queue"));
        let lifecycle = Lifecycle::new();
        let (scheme, trust) = (if ca.is_some() { "https" } else { "http" }, common().trust);
        let mut links = Links { ca, tls_proxies: Vec::new() };
        let event_database_url = trust.database_url(links.way_to("event database", event_url.reveal()).await);
        let booking_database_url = trust.database_url(links.way_to("booking database", booking_url.reveal()).await);
        let redis_url = links.way_to("redis", &redis_url).await;
        let broker = Broker { url: links.way_to("broker", &broker_url).await, exchange, trust: trust.clone() };

        let event_settings = event_settings(common(), event_database_url, &broker, &queue);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let event_address = listener.local_addr().unwrap().to_string();
        event_service::app::run(event_settings, listener, &lifecycle).await.unwrap();
        let to_event_service = ChaosProxy::to(&event_address).await;

        let settings = Settings {
            common: common(),
            database_url: booking_database_url,
            database_connections_max: 20,
            redis_url,
            event_service_url: to_event_service.url().replacen("http", scheme, 1),
            broker,
            queue,
            rules,
            expiry_interval: Duration::from_secs(1),
            reconcile_interval: Duration::from_secs(1),
            expiry_batch_size: 100,
            audit_interval: None,
            mock_payment_success_rate: 1.0,
            webhook_secrets: vec![Secret::from(WEBHOOK_SECRET), Secret::from("of last month")],
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let booking_base = format!("{scheme}://{}", listener.local_addr().unwrap());
        let app = app::start(&settings, "booking-service", &lifecycle).await.unwrap();
        app::serve(&app, &settings, listener, &lifecycle);
        let system = Self {
            app,
            event_base: format!("{scheme}://{event_address}"),
            booking_base,
            event_db: PgPool::connect(event_url.reveal()).await.unwrap(),
            event_database_url: event_url,
            settings,
            to_event_service,
            to_redis,
            to_broker,
            http: trust.http_client().build().unwrap(),
            lifecycle,
            login,
            tls_proxies: links.tls_proxies,
            sessions: AtomicU32::new(0),
        };
        system.consumer_is_up().await;
        system
    }

    /// Waits until the Event Service's consumer is connected to RabbitMQ.
    pub(crate) async fn consumer_is_up(&self) {
        wait_until("the consumer is up", Duration::from_secs(30), async || {
            let health = self.http.get(format!("{}/health", self.event_base)).send().await.unwrap();
            health.json::<Value>().await.unwrap()["checks"]["rabbitmq"] == "up"
        })
        .await;
    }

    /// Adds this user's identity to the request: a token, or the `x-user-id` header.
    pub(crate) fn by(&self, user: Uuid, roles: &[&str], request: RequestBuilder) -> RequestBuilder {
        match &self.login {
            Some(login) => request.bearer_auth(login.token(user, roles)),
            None => request.header("x-user-id", user.to_string()),
        }
    }

    async fn create(&self, path: &str, body: &Value, id: &str) -> String {
        let base = if path.contains("price-tiers") { &self.booking_base } else { &self.event_base };
        let request = self.http.post(format!("{base}{path}")).json(body);
        let response = self.by(Uuid::now_v7(), &["organizer"], request).send().await.unwrap();
        text_of(&answer(response, 201).await, id)
    }

    /// Puts a session on sale with `seats` seats in one row, at 100.00 each.
    pub(crate) async fn sale(&self, seats: u32) -> Sale {
        let organizer = self.create("/api/v1/organizers", &json!({ "name": "City Stage" }), "organizer_id").await;
        let event = json!({ "organizer_id": organizer, "title": "Concert", "event_type": "concert" });
        let event = self.create("/api/v1/events", &event, "event_id").await;
        let location = json!({ "name": "Mill", "address": "1", "city": "B", "country": "D", "timezone": "UTC" });
        let location = self.create("/api/v1/locations", &location, "location_id").await;
        let hall = json!({ "name": "Hall", "capacity": seats });
        let hall = self.create(&format!("/api/v1/locations/{location}/halls"), &hall, "hall_id").await;
        let grid = json!({ "rows": 1, "seats_per_row": seats });
        let request = self.http.post(format!("{}/api/v1/halls/{hall}/seats/bulk", self.event_base)).json(&grid);
        answer(self.by(Uuid::now_v7(), &["organizer"], request).send().await.unwrap(), 201).await;
        // Each session has its own hall, so two sessions may be on the same day.
        let day = self.sessions.fetch_add(1, Ordering::Relaxed) % 28 + 1;
        let session = json!({ "event_id": event, "hall_id": hall, "base_price": 100.00,
            "start_time": format!("2031-01-{day:02}T19:00:00Z"), "end_time": format!("2031-01-{day:02}T21:00:00Z") });
        let session = self.create("/api/v1/sessions", &session, "session_id").await;
        let shown = self.seats(&session).await;
        let seats = shown.iter().map(|seat| text_of(seat, "session_seat_id")).collect();
        Sale { session, seats, tier: self.tier(json!(1.0)).await }
    }

    pub(crate) async fn tier(&self, multiplier: Value) -> String {
        self.create("/api/v1/admin/price-tiers", &json!({ "name": "Tier", "base_multiplier": multiplier }), "id").await
    }

    pub(crate) async fn seats(&self, session: &str) -> Vec<Value> {
        let response =
            self.http.get(format!("{}/api/v1/sessions/{session}/seats", self.event_base)).send().await.unwrap();
        answer(response, 200).await.as_array().unwrap().clone()
    }

    /// Each seat's status, in the order of the seats.
    pub(crate) async fn statuses(&self, session: &str) -> Vec<String> {
        self.seats(session).await.iter().map(|seat| text_of(seat, "status")).collect()
    }

    /// Waits until the seats have these statuses, in their order. Returns how long that took.
    pub(crate) async fn seats_become(&self, sale: &Sale, expected: &[&str]) -> Duration {
        wait_until(&format!("the seats are {expected:?}"), SOON, async || {
            self.statuses(&sale.session).await == expected
        })
        .await
    }

    pub(crate) async fn call(&self, method: Method, path: &str, user: Uuid, body: Option<&Value>) -> Response {
        let mut request =
            self.by(user, &["customer"], self.http.request(method, format!("{}{path}", self.booking_base)));
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str, user: Uuid, expected: u16) -> Value {
        answer(self.call(Method::GET, path, user, None).await, expected).await
    }

    /// Sends a reservation of the seats with these indexes.
    pub(crate) async fn try_reserve(&self, sale: &Sale, user: Uuid, seats: &[usize]) -> Response {
        self.call(Method::POST, "/api/v1/reservations", user, Some(&sale.order(seats))).await
    }

    pub(crate) async fn reserve(&self, sale: &Sale, user: Uuid, seats: &[usize], expected: u16) -> Value {
        answer(self.try_reserve(sale, user, seats).await, expected).await
    }

    pub(crate) async fn confirm(&self, id: &str, user: Uuid, body: Option<Value>, expected: u16) -> Value {
        answer(
            self.call(Method::POST, &format!("/api/v1/reservations/{id}/confirm"), user, body.as_ref()).await,
            expected,
        )
        .await
    }

    pub(crate) async fn cancel(&self, id: &str, user: Uuid, expected: u16) -> Value {
        answer(self.call(Method::DELETE, &format!("/api/v1/reservations/{id}"), user, None).await, expected).await
    }

    pub(crate) async fn refund(&self, ticket: &str, user: Uuid, expected: u16) -> Value {
        answer(self.call(Method::POST, &format!("/api/v1/tickets/{ticket}/refund"), user, None).await, expected).await
    }

    /// Reserves these seats for a new user. Returns the reservation's id and the user.
    pub(crate) async fn reserved(&self, sale: &Sale, seats: &[usize]) -> (String, Uuid) {
        let user = Uuid::now_v7();
        (text_of(&self.reserve(sale, user, seats, 201).await, "id"), user)
    }

    /// Moves the expiry of open reservations one hour back, as if that hour had passed. Their holds stay as they are.
    pub(crate) async fn let_reservations_run_out(&self) {
        let past = "update reservations set booking_time = booking_time - interval '1 hour', expiry_time = expiry_time - interval '1 hour'
                    where status in ('active', 'confirming')";
        sqlx::query(past).execute(&self.app.db).await.unwrap();
    }

    /// Runs a query that returns one number on the Booking Service's database.
    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.app.db).await.unwrap()
    }

    /// Waits until a statement in the Booking Service's database waits for another transaction's lock.
    #[track_caller]
    pub(crate) fn wait_for_blocked_statement(&self) -> impl Future<Output = Duration> {
        let waiting =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        wait_until("a statement waits for the transaction", SOON, async || self.count(waiting).await > 0)
    }

    /// Reads one series from a service's `/metrics`. `None` if the service does not report it.
    pub(crate) async fn metric(&self, base: &str, series: &str) -> Option<f64> {
        let text = self.http.get(format!("{base}/metrics")).send().await.unwrap().text().await.unwrap();
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    /// The owner of a seat's lock. It reads Redis directly, not through the proxy.
    pub(crate) async fn lock_owner(&self, sale: &Sale, seat: usize) -> Option<String> {
        let client = redis::Client::open(server("TEST_REDIS_URL")).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let key = format!("booking:lock:{{{}}}:{}", sale.session, sale.seats[seat]);
        redis::cmd("GET").arg(key).query_async(&mut connection).await.unwrap()
    }

    /// Settles the system as [`Self::settle`] does, then stops it.
    pub(crate) async fn finish(self) {
        self.settle().await;
        self.lifecycle.stop();
    }

    /// Waits until every event is published and applied, then audits both databases.
    pub(crate) async fn settle(&self) {
        wait_until("the outbox is empty", Duration::from_secs(30), async || {
            for wanted in [Wanted::Urgent, Wanted::Expired] {
                let _ = outbox::relay_batch(&self.app.batch_db, &self.app.publisher, wanted).await;
            }
            self.count("select count(*) from outbox where published_at is null").await == 0
        })
        .await;
        let events = self.count("select count(*) from outbox").await;
        wait_until("every event is applied", Duration::from_secs(30), async || {
            let applied: i64 =
                sqlx::query_scalar("select count(*) from inbox").fetch_one(&self.event_db).await.unwrap();
            applied == events
        })
        .await;
        let report = self.audit().await;
        assert!(report.is_clean(), "\n{report}");
    }

    /// Audits both databases, as `booking-service audit` does. The system is at rest, so one pass is enough.
    pub(crate) async fn audit(&self) -> Report {
        let window = AuditWindow { settle: Duration::ZERO, late: Duration::from_secs(60) };
        // It avoids the connections that a test has cut.
        let app = app::for_command(
            &Settings { event_service_url: self.event_base.clone(), ..self.settings.clone() },
            "audit",
        );
        let broker = Broker { url: Secret::from(server("TEST_RABBITMQ_URL").as_str()), ..self.settings.broker.clone() };
        audit(&app.unwrap(), &broker, &self.settings.queue, window).await.unwrap()
    }
}

impl Sale {
    pub(crate) fn order(&self, seats: &[usize]) -> Value {
        let seats: Vec<Value> = seats
            .iter()
            .map(|seat| json!({ "session_seat_id": self.seats[*seat], "price_tier_id": self.tier, "row_number": "1", "seat_number": seat + 1 }))
            .collect();
        json!({ "session_id": self.session, "seats": seats })
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.lifecycle.stop();
    }
}

pub(crate) fn text_of(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}")).to_owned()
}

pub(crate) async fn answer(response: Response, expected: u16) -> Value {
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    assert_eq!(status, expected, "{text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}
