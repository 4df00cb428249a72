//! Each step of a booking broken in turn: the client gets an honest answer and nothing stays held.
//!
//! The Event Service stands behind a small server that fails the n-th call: before its effect, or after it, by a lost answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use booking_service::app;
use booking_service::event_client::EventClient;
use reqwest::Client;
use service_kit::amqp::Publisher;
use service_kit::lifecycle::Lifecycle;
use service_kit::settings::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::support::{System, answer};

/// Which call of a booking fails, and when.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Before(&'static str),
    After(&'static str),
}

#[derive(Clone)]
struct FaultyFront {
    target: String,
    http: Client,
    fault: Fault,
    hit: Arc<AtomicUsize>,
}

async fn forward(State(front): State<FaultyFront>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body: Bytes = to_bytes(body, usize::MAX).await.unwrap();
    let (Fault::Before(step) | Fault::After(step)) = front.fault;
    let struck = parts.uri.path().ends_with(step);
    if struck {
        front.hit.fetch_add(1, Ordering::Relaxed);
        if front.fault == Fault::Before(step) {
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        }
    }
    let mut call = rebuild(&front, &parts.method, &parts.uri.to_string(), body);
    if let Some(kind) = parts.headers.get("content-type") {
        call = call.header("content-type", kind);
    }
    let response = call.send().await.unwrap();
    if struck {
        return StatusCode::BAD_GATEWAY.into_response();
    }
    let status = response.status();
    (status, [("content-type", "application/json")], response.bytes().await.unwrap()).into_response()
}

fn rebuild(front: &FaultyFront, method: &reqwest::Method, path: &str, body: Bytes) -> reqwest::RequestBuilder {
    front.http.request(method.clone(), format!("{}{path}", front.target)).body(body)
}

/// A second Booking Service on the same database, behind whose back the Event Service fails as told.
async fn faulty_booking(system: &System, fault: Fault) -> (String, Arc<AtomicUsize>, Lifecycle) {
    let lifecycle = Lifecycle::new();
    let hit = Arc::new(AtomicUsize::new(0));
    let front = FaultyFront {
        target: system.event_base.clone(),
        http: Client::builder().build().unwrap(),
        fault,
        hit: Arc::clone(&hit),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    service_kit::server::serve(
        &lifecycle,
        listener,
        Router::new().route("/{*path}", any(forward)).with_state(front),
        100,
    );

    let shared = Arc::new(app::Shared {
        db: system.app.db.clone(),
        event_service: EventClient::new(&base).unwrap(),
        locks: booking_service::seat_locks::SeatLocks::new(&system.settings.redis_url).unwrap(),
        payments: system.app.payments.clone(),
        publisher: Publisher::new(system.settings.broker.clone(), "test"),
        outbox_nudge: Notify::new(),
        rules: system.settings.rules,
        webhook_secrets: Vec::new(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let booking = format!("http://{}", listener.local_addr().unwrap());
    app::serve(&shared, &system.settings, listener, &lifecycle);
    (booking, hit, lifecycle)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_step_fails_nothing_stays_held() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for step in ["check-availability", "pricing", "reserve"] {
        for fault in [Fault::Before(step), Fault::After(step)] {
            let (booking, hit, lifecycle) = faulty_booking(&system, fault).await;
            let request = system
                .http
                .post(format!("{booking}/api/v1/reservations"))
                .header("x-user-id", Uuid::now_v7().to_string());
            let response = request.json(&sale.order(&[0, 1])).send().await.unwrap();
            assert!(response.headers().contains_key("retry-after"), "{fault:?}");
            assert_eq!(answer(response, 503).await["code"], "event_service_unavailable", "{fault:?}");
            assert_eq!(hit.load(Ordering::Relaxed), 3, "{fault:?}: one try and two more");
            assert_eq!(system.statuses(&sale.session).await, ["available", "available"], "{fault:?} left a hold");
            assert_eq!(system.lock_owner(&sale, 0).await, None, "{fault:?} left a lock");
            lifecycle.stop();
        }
    }
    assert_eq!(system.count("select count(*) from reservations").await, 0);
    system.reserved(&sale, &[0, 1]).await;
    system.finish().await;
}

/// The last step: the row can't be written, as when the booking took too long.
#[tokio::test]
async fn a_reservation_that_can_not_be_written_gives_its_seats_back() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    for sql in [
        "create function refuse() returns trigger language plpgsql as 'begin return null; end'",
        "create trigger refuse before insert on reservations for each row execute function refuse()",
    ] {
        sqlx::query(sql).execute(&system.app.db).await.unwrap();
    }
    assert_eq!(system.reserve(&sale, Uuid::now_v7(), &[0], 503).await["code"], "deadline_exceeded");
    assert_eq!(system.statuses(&sale.session).await, ["available"]);
    assert_eq!(system.lock_owner(&sale, 0).await, None);
    sqlx::query("drop trigger refuse on reservations").execute(&system.app.db).await.unwrap();
    system.reserved(&sale, &[0]).await;
    system.finish().await;
}

/// A proxy to PostgreSQL that loses one answer: that of the statement which writes a reservation, after it has taken effect.
async fn losing_proxy(target: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let lost = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&lost);
    #[expect(clippy::disallowed_methods, reason = "it lives as long as the test")]
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(&target).await.unwrap();
            tokio::spawn(carry_until_lost(client, server, Arc::clone(&counter)));
        }
    });
    (address, lost)
}

async fn carry_until_lost(mut client: TcpStream, mut server: TcpStream, lost: Arc<AtomicUsize>) {
    let (mut up, mut down) = ([0_u8; 16_384], [0_u8; 16_384]);
    // A statement is prepared in one exchange, which shows its text, and executed in the next.
    let (mut prepared, mut executing) = (false, false);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(count @ 1..) = read else { return };
                executing = prepared;
                let text = String::from_utf8_lossy(&up[..count]);
                prepared |= text.contains("with made as") && lost.load(Ordering::Relaxed) == 0;
                if server.write_all(&up[..count]).await.is_err() { return }
            }
            read = server.read(&mut down) => {
                let Ok(count @ 1..) = read else { return };
                if executing {
                    lost.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                if client.write_all(&down[..count]).await.is_err() { return }
            }
        }
    }
}

/// The reservation is written and the answer of its statement is lost. The seats must not go back while the row stands: else the
/// next buyer gets them, both pay, and one of the two is turned away at the door.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_of_the_last_step_never_parts_seats_from_their_reservation() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let url = system.settings.database_url.reveal().to_owned();
    let target = url.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let (through, lost) = losing_proxy(target.clone()).await;
    let lifecycle = Lifecycle::new();
    let shared = Arc::new(app::Shared {
        db: service_kit::database::lazy_pool(&Secret::from(url.replace(&target, &through).as_str()), "test", 5)
            .unwrap(),
        event_service: system.app.event_service.clone(),
        locks: booking_service::seat_locks::SeatLocks::new(&system.settings.redis_url).unwrap(),
        payments: system.app.payments.clone(),
        publisher: Publisher::new(system.settings.broker.clone(), "test"),
        outbox_nudge: Notify::new(),
        rules: system.settings.rules,
        webhook_secrets: Vec::new(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let booking = format!("http://{}", listener.local_addr().unwrap());
    app::serve(&shared, &system.settings, listener, &lifecycle);

    let request =
        system.http.post(format!("{booking}/api/v1/reservations")).header("x-user-id", Uuid::now_v7().to_string());
    let made = answer(request.json(&sale.order(&[0])).send().await.unwrap(), 201).await;
    assert_eq!(lost.load(Ordering::Relaxed), 1, "no answer was lost, so the test has tested nothing");
    assert_eq!((made["status"].as_str(), made["items"].as_array().unwrap().len()), (Some("active"), 1));
    assert_eq!(system.reserve(&sale, Uuid::now_v7(), &[0], 409).await["code"], "seat_unavailable");
    lifecycle.stop();
    system.finish().await;
}
