//! Server-Sent Events: a client that follows a session has its seat map, in whatever order changes become visible.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use event_service::session_seats;
use futures::future::join_all;
use futures::stream::{self, StreamExt};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use service_kit::testing::wait_until;
use uuid::Uuid;

use crate::booking_consumer::SOON;
use crate::session_seats::hold_request;
use crate::support::{TestApp, id};

type Map = HashMap<String, String>;

/// A client that follows a session: its stream, and its map after the events received so far.
struct Follower {
    response: Response,
    unread: String,
    last_id: Option<String>,
    versions: HashMap<String, i64>,
    map: Map,
}

async fn open(app: &TestApp, session: &str, last_id: Option<&str>) -> Response {
    let mut request = app.http.get(format!("{}/api/v1/sessions/{session}/seat-map/stream", app.base));
    if let Some(id) = last_id {
        request = request.header("last-event-id", id);
    }
    request.send().await.unwrap()
}

async fn map_of(app: &TestApp, session: &str) -> Map {
    let map = app.get(&format!("/api/v1/sessions/{session}/seat-map"), 200).await;
    map["seats"].as_array().unwrap().iter().map(|seat| (id(seat, "session_seat_id"), id(seat, "status"))).collect()
}

impl Follower {
    async fn open(app: &TestApp, session: &str) -> Self {
        let response = open(app, session, None).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut follower =
            Self { response, unread: String::new(), last_id: None, versions: HashMap::new(), map: HashMap::new() };
        assert_eq!(follower.next().await.unwrap().0, "snapshot");
        follower
    }

    /// Opens the stream again from the last event id, as a browser does after a broken connection.
    async fn resume(&mut self, app: &TestApp, session: &str) {
        self.response = open(app, session, self.last_id.as_deref()).await;
        self.unread.clear();
    }

    /// The next event's name and data; `None` at the end of the stream.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            while let Some((block, rest)) = self.unread.split_once("\n\n").map(|(a, b)| (a.to_owned(), b.to_owned())) {
                self.unread = rest;
                let field = |name: &str| {
                    block.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")).map(str::to_owned))
                };
                let data = field("data").map(|data| serde_json::from_str(&data).unwrap());
                self.last_id = field("id").or(self.last_id.take());
                if let (Some(name), Some(data)) = (field("event"), data) {
                    return Some((name, data));
                }
            }
            let chunk = self.response.chunk().await.ok()??;
            self.unread.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Applies the next change to the map, unless the map has a higher version of that seat.
    async fn step(&mut self) -> (String, String) {
        let (name, change) = self.next().await.unwrap_or_else(|| panic!("the stream ended"));
        assert_eq!(name, "change", "{change}");
        let (seat, status) = (id(&change, "session_seat_id"), id(&change, "status"));
        let version = change["version"].as_i64().unwrap();
        let known = self.versions.entry(seat.clone()).or_default();
        if version >= *known {
            *known = version;
            self.map.insert(seat.clone(), status.clone());
        }
        (seat, status)
    }

    async fn until(&mut self, expected: &Map) {
        let done = async {
            while self.map != *expected {
                self.step().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), done)
            .await
            .unwrap_or_else(|_| panic!("the follower's map does not reach that of the database"));
    }
}

async fn change(app: &TestApp, session: &str, what: &str, owner: Uuid, seats: &[&String]) {
    let body = json!({ "reservation_id": owner, "session_seat_ids": seats, "reserved_until": "2031-01-01T00:00:00Z" });
    app.post(&format!("/api/internal/sessions/{session}/seats/{what}"), &body, 200).await;
}

/// Two thousand reservations are made; a third is sold and a third released. Ninety-nine clients follow all the time,
/// and one is disconnected for five seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_followers_of_ten_thousand_seats_end_with_the_map_of_the_database() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(10_000).await;
    let mut followers = join_all((0..100).map(|_| Follower::open(&app, &session))).await;
    // Loaded after all snapshots, so it fits every follower.
    let loaded = map_of(&app, &session).await;
    followers.iter_mut().for_each(|follower| follower.map.clone_from(&loaded));
    let mut unlucky = followers.pop().unwrap();

    let buyers = async {
        let bookings = stream::iter((0..2000_usize).map(|n| {
            let (app, session, seats) = (&app, &session, &seats);
            async move {
                let owner = Uuid::now_v7();
                let wanted = [&seats[n * 3], &seats[n * 3 + 1]];
                change(app, session, "reserve", owner, &wanted).await;
                match n % 3 {
                    0 => change(app, session, "confirm", owner, &wanted).await,
                    1 => change(app, session, "release", owner, &wanted).await,
                    _ => {}
                }
            }
        }));
        bookings.buffer_unordered(8).collect::<Vec<()>>().await;
        map_of(&app, &session).await
    };
    let cut_off = async {
        for _ in 0..20 {
            unlucky.step().await;
        }
        let begun = Instant::now();
        drop(std::mem::replace(&mut unlucky.response, app.call(Method::GET, "/health/live", None).await));
        tokio::time::sleep(Duration::from_secs(5)).await;
        unlucky.resume(&app, &session).await;
        begun.elapsed()
    };
    let (final_map, away, followers) = tokio::join!(buyers, cut_off, async {
        // The followers read while the buyers write.
        let reading = followers.into_iter().map(|mut follower| async {
            let quiet = Duration::from_secs(3);
            while tokio::time::timeout(quiet, follower.step()).await.is_ok() {}
            follower
        });
        join_all(reading).await
    });
    assert_ne!(final_map, loaded);
    assert!(away >= Duration::from_secs(5));
    for mut follower in followers {
        follower.until(&final_map).await;
    }
    unlucky.until(&final_map).await;
    assert_eq!(map_of(&app, &session).await, final_map);
}

/// The first change by number commits last. A reader that asks for "newer than the last number" would never see it.
#[tokio::test]
async fn a_change_that_becomes_visible_late_is_not_lost() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(2).await;
    let mut follower = Follower::open(&app, &session).await;
    let mut late = service_kit::postgres::database::begin(&app.db).await.unwrap();
    let wanted = [seats[0].parse().unwrap()];
    let until = "2031-01-01T00:00:00Z".parse().unwrap();
    let request = hold_request(session.parse().unwrap(), Uuid::now_v7().into(), &wanted, until);
    session_seats::reserve(&mut late, &[request]).await.unwrap();
    change(&app, &session, "reserve", Uuid::now_v7(), &[&seats[1]]).await;
    while follower.step().await != (seats[1].clone(), "reserved".to_owned()) {}
    // One follower resumes after that change, and one stays connected.
    let mut resumed = Follower::open(&app, &session).await;
    resumed.last_id.clone_from(&follower.last_id);
    resumed.resume(&app, &session).await;

    late.commit().await.unwrap();
    for follower in [&mut follower, &mut resumed] {
        let found = async { while follower.step().await != (seats[0].clone(), "reserved".to_owned()) {} };
        tokio::time::timeout(Duration::from_secs(10), found).await.expect("the late change arrives");
    }
}

#[tokio::test]
async fn a_follower_misses_nothing_when_the_database_connections_break() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let mut follower = Follower::open(&app, &session).await;
    for _ in 0..3 {
        // Every connection of the service breaks, including the one that polls for changes.
        sqlx::query("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
            .execute(&app.db)
            .await
            .unwrap();
        let hold = json!({ "reservation_id": Uuid::nil(), "session_seat_ids": [seats[0]], "reserved_until": "2031-01-01T00:00:00Z" });
        let release = json!({ "reservation_id": Uuid::nil(), "session_seat_ids": [seats[0]] });
        // Reserve and release use different pools.
        for (verb, body) in [("reserve", hold), ("release", release)] {
            let path = format!("/api/internal/sessions/{session}/seats/{verb}");
            wait_until("the service has connections again", Duration::from_secs(10), async || {
                app.call(Method::POST, &path, Some(&body)).await.status() == 200
            })
            .await;
        }
    }
    let expected = map_of(&app, &session).await;
    follower.until(&expected).await;
}

#[tokio::test]
async fn an_event_id_of_another_database_starts_with_a_new_snapshot() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(1).await;
    for id in ["999999999998:999999999999:@1", "20:10:@1", "10:20:", "-1", "x"] {
        let mut follower = Follower::open(&app, &session).await;
        follower.last_id = Some(id.to_owned());
        follower.resume(&app, &session).await;
        assert_eq!(follower.next().await.unwrap().0, "snapshot", "{id}");
    }
    let stranger = open(&app, &Uuid::now_v7().to_string(), None).await;
    assert_eq!(stranger.json::<Value>().await.unwrap()["code"], "session_not_found");
}

/// An edit may replace the session's seats, and `change` events could not remove the old ones.
#[tokio::test]
async fn an_edit_sends_a_new_snapshot_and_a_deletion_ends_the_stream() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(2).await;
    let path = format!("/api/v1/sessions/{session}");
    let mut follower = Follower::open(&app, &session).await;
    for edit in [json!({ "currency": "EUR" }), json!({ "base_price": 5 })] {
        let seen = follower.last_id.clone();
        assert_eq!(app.call(Method::PATCH, &path, Some(&edit)).await.status(), 200);
        let next = tokio::time::timeout(SOON, follower.next()).await.expect("an event arrives");
        assert_eq!(next.unwrap().0, "snapshot", "{edit}");
        follower.last_id = seen;
        follower.resume(&app, &session).await;
        assert_eq!(follower.next().await.unwrap().0, "snapshot", "{edit}: resumed");
    }
    assert_eq!(app.call(Method::DELETE, &path, None).await.status(), 204);
    assert_eq!(tokio::time::timeout(SOON, follower.next()).await.expect("the stream ends"), None);
}

#[tokio::test]
async fn streams_beyond_the_limit_are_rejected_with_a_retry_time() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(1).await;
    let mut followers = join_all((0..150).map(|_| Follower::open(&app, &session))).await;
    let refused = open(&app, &session, None).await;
    assert_eq!(refused.headers()["retry-after"], "10");
    assert_eq!(refused.json::<Value>().await.unwrap()["code"], "too_many_watchers");
    followers.pop();
    wait_until("another stream can be opened", Duration::from_secs(20), async || {
        open(&app, &session, None).await.status() == 200
    })
    .await;
}

#[tokio::test]
async fn a_stop_ends_the_streams() {
    let app = TestApp::spawn().await;
    let (session, _) = app.session(1).await;
    let mut follower = Follower::open(&app, &session).await;
    drop(app);
    let end = tokio::time::timeout(Duration::from_secs(5), follower.next()).await.expect("the stream ends");
    assert_eq!(end, None);
}
