//! Outages: what users see while a server is down or hangs, and how the system recovers.

use std::time::{Duration, Instant};

use booking_service::seat_locks::LockOutcome;
use futures::future::join_all;
use serde_json::json;
use service_kit::process::settings::Secret;
use service_kit::testing::wait_until;
use service_kit::testing::wires::{ChaosProxy, Mode};
use uuid::Uuid;

use crate::processes::{self, free_port};
use crate::support::{SOON, System};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_broker_the_client_gets_its_ticket_and_the_seat_is_sold_later() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for (fault, seat) in [("cut", 0), ("frozen", 1)] {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        if fault == "cut" {
            system.to_broker.cut()
        } else {
            system.to_broker.freeze()
        }
        let begun = Instant::now();
        assert_eq!(system.confirm(&id, user, None, 200).await["tickets"].as_array().unwrap().len(), 1);
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "{fault}: the client waited {:?} for the broker",
            begun.elapsed()
        );
        assert_eq!(system.statuses(&sale.session).await[seat], "reserved");
        assert_eq!(system.reserve(&sale, Uuid::now_v7(), &[seat], 409).await["code"], "seat_unavailable");
        system.to_broker.heal();
        wait_until("the seat is sold", Duration::from_secs(40), async || {
            system.statuses(&sale.session).await[seat] == "sold"
        })
        .await;
        system.consumer_is_up().await;
    }
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_booking_works_and_is_soon_as_fast_as_before() {
    let system = System::start().await;
    let sale = system.sale(12).await;
    for (fault, seats) in [("cut", 0..5), ("frozen", 5..10)] {
        system.reserved(&sale, &[seats.start]).await;
        if fault == "cut" {
            system.to_redis.cut()
        } else {
            system.to_redis.freeze()
        }
        let mut slow = 0;
        for seat in seats.start + 1..seats.end {
            let begun = Instant::now();
            let (id, user) = system.reserved(&sale, &[seat]).await;
            slow += u32::from(begun.elapsed() > Duration::from_millis(140));
            system.confirm(&id, user, None, 200).await;
        }
        assert!(slow <= 1, "{fault}: {slow} bookings waited for Redis");
        system.to_redis.heal();
        wait_until("Redis is used again", SOON, async || system.app.locks.ping().await.is_ok()).await;
    }
    // The service checks Redis every half second, and then locks seats again.
    wait_until("seats are locked again", SOON, async || {
        let (id, user) = system.reserved(&sale, &[11]).await;
        let locked = system.lock_owner(&sale, 11).await == Some(id.clone());
        system.cancel(&id, user, 200).await;
        locked
    })
    .await;
    system.finish().await;
}

/// Redis was down when the reservation ended, so its lock stayed. That must not cost a sale.
#[tokio::test]
async fn the_next_buyer_removes_a_stale_lock() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.to_redis.cut();
    system.cancel(&id, user, 200).await;
    system.to_redis.heal();
    assert_eq!(system.lock_owner(&sale, 0).await, Some(id), "the lock is stale, as this test needs it");
    wait_until("Redis is used again", SOON, async || system.app.locks.ping().await.is_ok()).await;
    system.reserved(&sale, &[0]).await;
    system.finish().await;
}

/// A process that dies between its lock and its hold leaves a lock that no reservation will ever release.
#[tokio::test]
async fn the_lock_of_a_dead_booking_is_removed_and_that_of_a_running_one_is_not() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let now = u64::try_from(system.count("select extract(epoch from now())::int8").await).unwrap();
    for (seat, age) in [(0, 60), (1, 0)] {
        let owner = Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, now - age, 0));
        let (session, seat) = (sale.session.parse().unwrap(), sale.seats[seat].parse().unwrap());
        let locked = system.app.locks.acquire(session, &[seat], owner.into(), system.settings.rules.hold_time).await;
        assert_eq!(locked, LockOutcome::Acquired);
    }
    // A buyer that wants both seats is told of the locked one. The other one is available.
    let refused = system.reserve(&sale, Uuid::now_v7(), &[0, 1], 409).await;
    assert_eq!(refused["seats"], json!([{ "session_seat_id": sale.seats[1], "status": "reserved" }]));
    system.reserved(&sale, &[0]).await;
    assert_eq!(system.reserve(&sale, Uuid::now_v7(), &[1], 409).await["code"], "seat_unavailable");
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_event_service_nothing_is_held_and_the_rest_still_works() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let (other, other_user) = system.reserved(&sale, &[1]).await;
    for fault in ["cut", "frozen"] {
        if fault == "cut" {
            system.to_event_service.cut()
        } else {
            system.to_event_service.freeze()
        }
        let begun = Instant::now();
        let problem = system.reserve(&sale, Uuid::now_v7(), &[2], 503).await;
        assert_eq!(
            (&problem["code"], problem["retry_after_seconds"].is_u64()),
            (&json!("event_service_unavailable"), true)
        );
        assert!(begun.elapsed() < Duration::from_secs(5), "{fault}: the client waited {:?}", begun.elapsed());
    }
    system.confirm(&id, user, None, 200).await;
    assert_eq!(system.cancel(&other, other_user, 200).await["status"], "cancelled");
    let health = system.get("/health", user, 200).await;
    assert_eq!((&health["status"], &health["checks"]["event_service"]), (&json!("degraded"), &json!("down")));
    system.to_event_service.heal();
    system.seats_become(&sale, &["sold", "available", "available"]).await;
    // The failed calls were enough to open the circuit.
    circuit_closes(&system).await;
    system.reserved(&sale, &[2]).await;
    system.finish().await;
}

async fn circuit_closes(system: &System) -> Duration {
    wait_until("the circuit closes by itself", Duration::from_secs(10), async || {
        let health = system.get("/health", Uuid::now_v7(), 200).await;
        health["checks"]["event_service_circuit"] == "up"
    })
    .await
}

/// The first buyers wait for an answer that does not come. Then everyone is refused at once, and bookings work again
/// within seconds of the recovery.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_event_service_hangs_the_circuit_opens_and_closes_by_itself() {
    let system = System::start().await;
    let sale = system.sale(102).await;
    system.to_event_service.freeze();
    let begun = Instant::now();
    // Each buyer wants a different seat: the seat locks would refuse all but one buyer of the same seat.
    let bookings = (2..102).map(async |seat| system.reserve(&sale, Uuid::now_v7(), &[seat], 503).await);
    join_all(bookings).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "the buyers waited {:?}", begun.elapsed());
    let health = system.get("/health", Uuid::now_v7(), 200).await;
    assert_eq!(health["checks"]["event_service_circuit"], "down");
    assert_eq!(system.metric(&system.booking_base, "booking_event_service_circuit_open").await, Some(1.0));
    let failed = r#"booking_reservations_total{outcome="failed",reason="event_service_unavailable"}"#;
    assert_eq!(system.metric(&system.booking_base, failed).await, Some(100.0));
    let mut slowest = Duration::ZERO;
    let mut refused_at_once = 0;
    // Within these two seconds, some requests are let through to probe the Event Service, and wait for it.
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let begun = Instant::now();
        assert_eq!(system.reserve(&sale, Uuid::now_v7(), &[0], 503).await["code"], "event_service_unavailable");
        if begun.elapsed() < Duration::from_millis(500) {
            refused_at_once += 1;
            slowest = slowest.max(begun.elapsed());
        }
    }
    assert!(refused_at_once > 20, "only {refused_at_once} were refused at once");
    system.to_event_service.heal();
    // Nobody books meanwhile. A client that checks the health before it books must see the circuit close.
    let recovered = circuit_closes(&system).await;
    assert_eq!(system.metric(&system.booking_base, "booking_event_service_circuit_open").await, Some(0.0));
    system.reserved(&sale, &[1]).await;
    println!(
        "refused at once: {refused_at_once}, the slowest after {slowest:?}; the circuit closed after {recovered:?}"
    );
    system.finish().await;
}

/// The database receives a starting process's requests, and its answers are lost. The process must not wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_silent_when_a_process_starts_is_asked_again() {
    let system = System::start().await;
    let (wire, url) = ChaosProxy::in_front_of(system.settings.database_url.reveal()).await;
    let mut settings = system.settings.clone();
    settings.database_url = Secret::from(url.as_str());
    wire.set(Mode::HalfOpen);
    let command = processes::booking(&settings, "serve", free_port().await);
    let heal = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        wire.heal();
    };
    let (process, ()) = tokio::join!(processes::start(command), heal);
    drop(process);
    system.finish().await;
}
