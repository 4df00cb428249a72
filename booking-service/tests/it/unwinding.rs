//! Each step of a booking and of a payment fails in three ways: before its effect, after it, and by silence after it.
//! Each step and each undo is also repeated. The client gets an honest answer, and nothing stays held, locked or
//! charged without a reservation.
//!
//! The faults are on the connections, so what fails is what would fail in production: a connection, an answer, a
//! time-out.

use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::any;
use booking_service::app;
use booking_service::settings::Settings;
use booking_service::state::App;
use booking_service::workflows::reconcile::{self, ABANDONED_AFTER, Sweep};
use futures::future::join_all;
use futures::stream::{self, StreamExt};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::Value;
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::Secret;
use service_kit::testing::server;
use service_kit::testing::wires::{Fault, FaultProxy};
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::support::{Sale, System, answer, text_of};

/// A connection from the Booking Service to a server that it needs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Link {
    Database,
    EventService,
    Redis,
}
use Link::{Database, EventService, Redis};

const EVERY_WAY: [Fault; 3] = [Fault::Before, Fault::After, Fault::Silence];

/// What a booking with an Idempotency-Key sends, in this order.
const BOOKING: [(Link, &str); 7] = [
    (Database, "insert into idempotency_keys"),
    (Database, "from price_tiers"),
    (Redis, "booking:lock"),
    (EventService, "seats/reserve"),
    (Database, "made as ("),
    (Database, "update idempotency_keys k set status"),
    (Database, "COMMIT"),
];

/// What a payment sends, in this order.
const PAYMENT: [(Link, &str); 7] = [
    (Database, "insert into payments"),
    (Database, "insert into mock_provider_charges"),
    (Database, "select p.id from payments"),
    (Database, "insert into tickets"),
    (Database, "insert into outbox"),
    (Database, "COMMIT"),
    (Redis, "booking:lock"),
];

/// A second Booking Service on the same databases, with a fault on one of its connections.
struct Broken {
    base: String,
    app: App,
    wire: FaultProxy,
    lifecycle: Lifecycle,
}

async fn serve(settings: &Settings) -> (String, App, Lifecycle) {
    let lifecycle = Lifecycle::new();
    let app = app::for_command(settings, "test").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    app::serve(&app, settings, listener, &lifecycle);
    (base, app, lifecycle)
}

async fn broken(system: &System, link: Link, word: &'static str, strike: Fault, hits_max: usize) -> Broken {
    let mut settings = system.settings.clone();
    settings.event_service_url = system.event_base.clone();
    settings.redis_url = Secret::from(server("TEST_REDIS_URL").as_str());
    // How long a client waits for a silent database. It is longer than the time-out of any step.
    settings.common.request_time_max = Duration::from_secs(12);
    let wire = match link {
        Database => {
            let (wire, url) = FaultProxy::to_statements(settings.database_url.reveal(), word, strike, hits_max).await;
            settings.database_url = Secret::from(url.as_str());
            wire
        }
        EventService => {
            let target = system.event_base.trim_start_matches("http://");
            let wire = FaultProxy::to(target, word, strike, hits_max).await;
            settings.event_service_url = format!("http://{}", wire.address());
            wire
        }
        Redis => {
            let url = settings.redis_url.reveal().to_owned();
            let target = url.split("://").nth(1).unwrap().split('/').next().unwrap();
            let wire = FaultProxy::to(target, word, strike, hits_max).await;
            settings.redis_url = Secret::from(url.replace(target, &wire.address().to_string()).as_str());
            wire
        }
    };
    let (base, app, lifecycle) = serve(&settings).await;
    Broken { base, app, wire, lifecycle }
}

fn booking(system: &System, base: &str, sale: &Sale, user: Uuid, seats: &[usize]) -> RequestBuilder {
    let request = system.http.post(format!("{base}/api/v1/reservations"));
    request.header("x-user-id", user.to_string()).header("idempotency-key", "only").json(&sale.order(seats))
}

/// Runs the attempts, eight at a time. All of them at once would test the machine's speed rather than the faults.
async fn some_at_a_time<T>(attempts: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    stream::iter(attempts).buffer_unordered(8).collect().await
}

/// Each step fails in each way, once, and as often as it is tried. Each attempt has its own seats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_step_of_a_booking_fails_nothing_stays_held() {
    let system = System::start().await;
    let mut faults = Vec::new();
    for (link, word) in BOOKING {
        for strike in EVERY_WAY {
            let times: &[usize] = if link == EventService { &[1, 9] } else { &[1] };
            faults.extend(times.iter().map(|hits_max| (link, word, strike, *hits_max)));
        }
    }
    // Attempts that wait for a silent database come first, so they wait at the same time.
    faults.sort_by_key(|(link, _, strike, _)| (*link != Database, *strike != Fault::Silence));
    let sale = system.sale(2 * faults.len() as u32).await;
    let attempts = faults.into_iter().enumerate().map(async |(index, fault)| {
        let (link, word, strike, hits_max) = fault;
        let (seats, user) = ([2 * index, 2 * index + 1], Uuid::now_v7());
        let broken = broken(&system, link, word, strike, hits_max).await;
        let response = booking(&system, &broken.base, &sale, user, &seats).send().await.unwrap();
        let (status, retry) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
        let problem = response.text().await.unwrap();
        assert!(broken.wire.hits() > 0, "{fault:?}: the step was not reached, so nothing was tested");
        match link {
            Redis => assert_eq!(status, 201, "{fault:?}: {problem}"),
            EventService if hits_max == 1 => assert_eq!(status, 201, "{fault:?}, once, costs no booking: {problem}"),
            EventService => assert_eq!((status, retry), (503, true), "{fault:?}: {problem}"),
            // The service may find out that the last step has succeeded although its answer was lost. Then the booking
            // succeeds.
            Database => assert!(status == 201 || (status == 503 && retry), "{fault:?}: {status} {problem}"),
        }
        broken.lifecycle.stop();
        (fault, seats, user, status)
    });
    let attempts = some_at_a_time(attempts).await;

    // Reconciliation settles what a lost database left, as after a crash. Then the seats of every refused booking are
    // free again.
    tokio::time::sleep(ABANDONED_AFTER).await;
    sqlx::query("update idempotency_keys set locked_until = now() where status is null")
        .execute(&system.app.db)
        .await
        .unwrap();
    reconcile::reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
    let statuses = system.statuses(&sale.session).await;
    for (fault, seats, user, status) in attempts {
        let own = format!("/api/v1/reservations?status=active&limit={}", seats.len());
        let held = system.get(&own, user, 200).await["items"].as_array().unwrap().len();
        assert!(status != 201 || held == 1, "{fault:?}: told 201, and there is no reservation");
        let expected = if held == 1 { "reserved" } else { "available" };
        assert!(seats.iter().all(|seat| statuses[*seat] == expected), "{fault:?} left a hold, or lost one");
        if held == 0 {
            assert_eq!(system.lock_owner(&sale, seats[0]).await, None, "{fault:?} left a lock");
        }
        let again = booking(&system, &system.booking_base, &sale, user, &seats).send().await.unwrap();
        let again = answer(again, 201).await;
        assert_eq!(system.get("/api/v1/reservations?status=active", user, 200).await["items"][0]["id"], again["id"]);
    }
    assert_eq!(system.count("select count(*) from mock_provider_charges").await, 0);
    system.finish().await;
}

/// An order contradicts the seats' labels, and the release of the hold that revealed it fails.
#[tokio::test]
async fn reconciliation_frees_a_refused_order_whose_release_failed() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let broken = broken(&system, EventService, "seats/release", Fault::Before, 9).await;
    let mut order = sale.order(&[0]);
    order["seats"][0]["row_number"] = "9".into();
    let request = system.http.post(format!("{}/api/v1/reservations", broken.base)).json(&order);
    let response = request.header("x-user-id", Uuid::now_v7().to_string()).send().await.unwrap();
    answer(response, 422).await;
    assert!(broken.wire.hits() > 0, "nothing was tested");
    broken.lifecycle.stop();
    assert_eq!(system.statuses(&sale.session).await, ["reserved"]);
    // Makes the hold old enough to count as abandoned. Its age follows from its end.
    sqlx::query("update session_seats set reserved_until = reserved_until - make_interval(secs => $1)")
        .bind(ABANDONED_AFTER.as_secs_f64())
        .execute(&system.event_db)
        .await
        .unwrap();
    assert_eq!(reconcile::reconcile_once(&system.app, &mut Sweep::default()).await.unwrap().released, 1);
    assert_eq!(system.statuses(&sale.session).await, ["available"]);
    assert_eq!(system.lock_owner(&sale, 0).await, None);
    system.finish().await;
}

/// The hold is made, its answer is lost, and its release fails. The buyer is told to try again, and must not be refused
/// because of their own hold.
#[tokio::test]
async fn a_booking_repeated_after_an_outage_is_not_refused_for_its_own_old_hold() {
    let system = System::start().await;
    let (sale, user) = (system.sale(1).await, Uuid::now_v7());
    let target = system.event_base.trim_start_matches("http://");
    let no_release = FaultProxy::to(target, "seats/release", Fault::Before, 9).await;
    let no_answer = FaultProxy::to(&no_release.address().to_string(), "seats/reserve", Fault::After, 9).await;
    let mut settings = system.settings.clone();
    settings.event_service_url = format!("http://{}", no_answer.address());
    let (base, _, lifecycle) = serve(&settings).await;
    answer(booking(&system, &base, &sale, user, &[0]).send().await.unwrap(), 503).await;
    // The next try cannot free the hold either.
    answer(booking(&system, &base, &sale, user, &[0]).send().await.unwrap(), 503).await;
    lifecycle.stop();
    assert_eq!(system.statuses(&sale.session).await, ["reserved"]);
    answer(booking(&system, &system.booking_base, &sale, user, &[0]).send().await.unwrap(), 201).await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_step_of_a_payment_fails_it_is_charged_once_or_not_at_all() {
    let system = System::start().await;
    let mut faults: Vec<_> =
        PAYMENT.iter().flat_map(|(link, word)| EVERY_WAY.map(|strike| (*link, *word, strike))).collect();
    faults.sort_by_key(|(.., strike)| *strike != Fault::Silence);
    let sale = system.sale(faults.len() as u32).await;
    let attempts = faults.into_iter().enumerate().map(async |(seat, fault)| {
        let (link, word, strike) = fault;
        let (id, user) = system.reserved(&sale, &[seat]).await;
        let broken = broken(&system, link, word, strike, 1).await;
        let path = format!("{}/api/v1/reservations/{id}/confirm", broken.base);
        let response = system.http.post(path).header("x-user-id", user.to_string()).send().await.unwrap();
        let (status, retry) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
        assert!(broken.wire.hits() > 0, "{fault:?}: the step was not reached, so nothing was tested");
        assert!(status == 200 || (status == 503 && retry && link == Database), "{fault:?}: {status}");
        broken.lifecycle.stop();
        (fault, id, user)
    });
    let attempts = some_at_a_time(attempts).await;
    sqlx::query("update reservations set confirming_until = now() - interval '1 second' where status = 'confirming'")
        .execute(&system.app.db)
        .await
        .unwrap();
    reconcile::settle_payments(&system.app).await.unwrap();
    let captured = system.count("select count(*) from mock_provider_charges where state = 'captured'").await;
    let paid = system.count("select count(*) from reservations where status = 'confirmed'").await;
    assert_eq!(captured, paid, "money was captured for a reservation that is not confirmed");
    assert_eq!(system.count("select count(*) from reservations where status = 'confirming'").await, 0);
    for (fault, id, user) in attempts {
        let tickets = system.confirm(&id, user, None, 200).await["tickets"].as_array().unwrap().len();
        assert_eq!(tickets, 1, "{fault:?}");
    }
    let captured = system.count("select count(*) from mock_provider_charges where state = 'captured'").await;
    assert_eq!(captured, sale.seats.len() as i64);
    system.finish().await;
}

/// Sends every request to the Event Service twice, and returns the second answer.
async fn twice(State(target): State<(Client, String)>, request: Request) -> Response {
    let ((http, target), (parts, body)) = (target, request.into_parts());
    let body = to_bytes(body, usize::MAX).await.unwrap();
    let send = || http.request(parts.method.clone(), format!("{target}{}", parts.uri)).headers(parts.headers.clone());
    send().body(body.clone()).send().await.unwrap();
    let second = send().body(body.clone()).send().await.unwrap();
    let mut response = Response::builder().status(second.status());
    *response.headers_mut().unwrap() = second.headers().clone();
    response.body(Body::from(second.bytes().await.unwrap())).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_step_and_every_undo_may_be_repeated() {
    let system = System::start().await;
    let sale = system.sale(4).await;
    let front = Lifecycle::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut settings = system.settings.clone();
    settings.event_service_url = format!("http://{}", listener.local_addr().unwrap());
    let target = (Client::builder().build().unwrap(), system.event_base.clone());
    let routes = Router::new().route("/{*path}", any(twice)).with_state(target);
    let (common, metrics) = (&system.settings.common, &system.app.metrics.common);
    service_kit::http::server::serve(&front, listener, routes, common, metrics, app::request_class);
    let (base, app, lifecycle) = serve(&settings).await;

    // Each call to the Event Service is sent twice: the hold with its check and prices, and the release of a cancelled
    // hold.
    let user = Uuid::now_v7();
    let made = answer(booking(&system, &base, &sale, user, &[0, 1]).send().await.unwrap(), 201).await;
    assert_eq!(system.statuses(&sale.session).await, ["reserved", "reserved", "available", "available"]);
    let own = |method: Method, path: String| {
        system.http.request(method, format!("{base}{path}")).header("x-user-id", user.to_string())
    };
    let path = format!("/api/v1/reservations/{}", text_of(&made, "id"));
    answer(own(Method::DELETE, path.clone()).send().await.unwrap(), 200).await;
    assert_eq!(answer(own(Method::DELETE, path).send().await.unwrap(), 409).await["code"], "reservation_cancelled");
    assert_eq!(system.statuses(&sale.session).await, ["available"; 4]);

    // A lock is acquired and released twice by the same owner, and never by another.
    let (session, seats) = (sale.session.parse().unwrap(), [sale.seats[2].parse().unwrap()]);
    let (first, second) = (Uuid::now_v7().into(), Uuid::now_v7().into());
    use booking_service::seat_locks::{LockOutcome, holds_of};
    for _ in 0..2 {
        assert_eq!(
            app.locks.acquire(session, &seats, first, system.settings.rules.hold_time).await,
            LockOutcome::Acquired
        );
        assert_eq!(
            app.locks.acquire(session, &seats, second, system.settings.rules.hold_time).await,
            LockOutcome::Busy(holds_of(first, &seats))
        );
        app.locks.release(session, &holds_of(second, &seats)).await;
    }
    for _ in 0..2 {
        app.locks.release(session, &holds_of(first, &seats)).await;
    }
    assert_eq!(
        app.locks.acquire(session, &seats, second, system.settings.rules.hold_time).await,
        LockOutcome::Acquired
    );
    app.locks.release(session, &holds_of(second, &seats)).await;

    // Payment and refund run twice each, and so does every task of the worker.
    let (id, payer) = system.reserved(&sale, &[2]).await;
    let paid = system.confirm(&id, payer, None, 200).await;
    assert_eq!(system.confirm(&id, payer, None, 200).await, paid);
    let (given_back, buyer) = system.reserved(&sale, &[3]).await;
    let ticket = text_of(&system.confirm(&given_back, buyer, None, 200).await["tickets"][0], "id");
    let refunded = system.refund(&ticket, buyer, 200).await;
    assert_eq!(system.refund(&ticket, buyer, 200).await, refunded);
    for _ in 0..2 {
        reconcile::reconcile_once(&app, &mut Sweep::default()).await.unwrap();
        reconcile::settle_payments(&app).await.unwrap();
        reconcile::follow_up_payments(&app).await.unwrap();
        reconcile::settle_refunds(&app).await.unwrap();
    }
    system.seats_become(&sale, &["available", "available", "sold", "available"]).await;
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 1);
    lifecycle.stop();
    front.stop();
    system.finish().await;
}

/// The client disconnects during a step. The booking runs to its end, and no connection returns to the pool inside an
/// open transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_disconnects_at_any_step_leaves_nothing_half_done() {
    let system = System::start().await;
    let steps: Vec<_> = BOOKING.into_iter().chain([(Database, "BEGIN")]).collect();
    let sale = system.sale(2 * steps.len() as u32).await;
    let attempts = steps.into_iter().enumerate().map(async |(index, (link, word))| {
        let seats = [2 * index, 2 * index + 1];
        let broken = broken(&system, link, word, Fault::Pause, 1).await;
        let user = Uuid::now_v7();
        let request = booking(&system, &broken.base, &sale, user, &seats).send();
        tokio::select! {
            answered = request => panic!("{word}: {answered:?}"),
            () = broken.wire.is_hit() => {}
        }
        // The request has been dropped, and its connection with it.
        broken.wire.resume();
        let made = format!("/api/v1/reservations?status=active&limit={}", seats.len());
        service_kit::testing::wait_until("the booking is made all the same", crate::support::SOON, async || {
            system.get(&made, user, 200).await["items"].as_array().unwrap().len() == 1
        })
        .await;
        // Others see what its connections commit from now on, so none of them is inside an open transaction.
        for _ in 0..6 {
            let id = Uuid::now_v7();
            let sql = "insert into price_tiers (id, name, base_multiplier) values ($1, 'after', 1)";
            sqlx::query(sql).bind(id).execute(&broken.app.db).await.unwrap();
            let seen: bool = sqlx::query_scalar("select exists (select from price_tiers where id = $1)")
                .bind(id)
                .fetch_one(&system.app.db)
                .await
                .unwrap();
            assert!(seen, "{word}: other connections do not see a committed row");
        }
        let open: Value = system.get(&made, user, 200).await;
        assert_eq!(open["items"][0]["items"].as_array().unwrap().len(), 2, "{word}");
        broken.lifecycle.stop();
    });
    join_all(attempts).await;
    assert!(system.statuses(&sale.session).await.iter().all(|status| status == "reserved"));
    system.finish().await;
}
