//! How holds end: by the worker, by a buyer that wants the seat, and by a confirmation that comes too late.

use std::sync::Arc;
use std::time::{Duration, Instant};

use booking_service::seat_locks::{LockOutcome, holds_of};
use booking_service::worker::{self, Schedule};
use booking_service::workflows::end::expire_due;
use futures::future::join_all;
use service_kit::testing::{scale, wait_until};
use uuid::Uuid;

use crate::crash;
use crate::support::{SOON, System};

/// Moves all reservations and holds into the past, as if the hold time had passed.
async fn let_time_pass(system: &System) {
    system.let_reservations_run_out().await;
    let past = "update session_seats set reserved_until = reserved_until - interval '1 hour' where status = 'reserved'";
    sqlx::query(past).execute(&system.event_db).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_puts_an_unpaid_seat_back_on_sale_within_two_seconds() {
    let hold_time = Duration::from_secs(3);
    let system = System::start_with(hold_time).await;
    let schedule = Schedule {
        expiry: system.settings.expiry_interval,
        expiry_batch_size: system.settings.expiry_batch_size,
        reconcile: Duration::from_secs(60),
    };
    worker::start(&system.app, schedule, &system.lifecycle).await.unwrap();
    let sale = system.sale(1).await;
    let begun = Instant::now();
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.seats_become(&sale, &["available"]).await;
    let after_expiry = begun.elapsed().saturating_sub(hold_time);
    assert!(after_expiry < Duration::from_secs(2), "it took {after_expiry:?}");
    assert_eq!(system.confirm(&id, user, None, 410).await["code"], "reservation_expired");
    assert_eq!(system.cancel(&id, user, 410).await["code"], "reservation_expired");
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "expired");
    system.reserved(&sale, &[0]).await;
    wait_until("the second hold ends too", SOON, async || {
        system.count("select count(*) from reservations where status = 'expired'").await == 2
    })
    .await;
    system.finish().await;
}

#[tokio::test]
async fn reservations_that_expire_together_release_only_their_own_locks() {
    let system = System::start().await;
    let sales = [system.sale(3).await, system.sale(1).await];
    system.reserved(&sales[0], &[0]).await;
    system.reserved(&sales[0], &[1, 2]).await;
    system.reserved(&sales[1], &[0]).await;
    // Another buyer found this seat free and has locked it meanwhile.
    let (session, seat) = (sales[0].session.parse().unwrap(), sales[0].seats[2].parse().unwrap());
    let buyer = Uuid::now_v7().into();
    system
        .app
        .locks
        .release(session, &holds_of(system.lock_owner(&sales[0], 2).await.unwrap().parse().unwrap(), &[seat]))
        .await;
    assert_eq!(
        system.app.locks.acquire(session, &[seat], buyer, system.settings.rules.hold_time).await,
        LockOutcome::Acquired
    );
    let_time_pass(&system).await;
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 3);
    for (sale, seat) in [(0, 0), (0, 1), (1, 0)] {
        assert_eq!(system.lock_owner(&sales[sale], seat).await, None, "seat {seat} of sale {sale}");
    }
    assert_eq!(system.lock_owner(&sales[0], 2).await, Some(buyer.to_string()));
    system.finish().await;
}

#[tokio::test]
async fn without_a_broker_expired_seats_still_return_to_sale() {
    let system = System::start().await;
    let sales = [system.sale(3).await, system.sale(1).await];
    system.reserved(&sales[0], &[0, 1]).await;
    let (id, user) = system.reserved(&sales[0], &[2]).await;
    system.confirm(&id, user, None, 200).await;
    system.seats_become(&sales[0], &["reserved", "reserved", "sold"]).await;
    system.reserved(&sales[1], &[0]).await;
    system.to_broker.cut();
    let_time_pass(&system).await;
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 2);
    assert_eq!(system.statuses(&sales[0].session).await, ["available", "available", "sold"]);
    assert_eq!(system.statuses(&sales[1].session).await, ["available"]);
    // A buyer that reserves one meanwhile keeps it when the messages arrive.
    let (_, _) = system.reserved(&sales[0], &[1]).await;
    system.to_broker.heal();
    system.settle().await;
    assert_eq!(system.statuses(&sales[0].session).await, ["available", "reserved", "sold"]);
    system.finish().await;
}

#[tokio::test]
async fn without_the_event_service_expired_seats_are_freed_later_by_their_events() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    system.reserved(&sale, &[0, 1]).await;
    system.to_event_service.cut();
    let_time_pass(&system).await;
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 1);
    system.to_event_service.heal();
    system.seats_become(&sale, &["available", "available"]).await;
    system.finish().await;
}

#[tokio::test]
async fn without_a_worker_the_next_buyer_gets_an_expired_seat() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (old, old_user) = system.reserved(&sale, &[0, 1]).await;
    let_time_pass(&system).await;
    assert_eq!(system.statuses(&sale.session).await, ["reserved", "reserved"], "time alone freed a seat");
    let (_, _) = system.reserved(&sale, &[0]).await;
    assert_eq!(system.confirm(&old, old_user, None, 410).await["code"], "reservation_expired");
    system.seats_become(&sale, &["reserved", "available"]).await;
    system.finish().await;
}

#[tokio::test]
async fn a_late_confirmation_is_refused_even_before_the_worker_has_run() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let_time_pass(&system).await;
    assert_eq!(system.confirm(&id, user, None, 410).await["code"], "reservation_expired");
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "expired");
    assert_eq!(system.count("select count(*) from mock_provider_charges").await, 0);
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 1);
    system.seats_become(&sale, &["available"]).await;
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_workers_share_the_due_reservations_and_end_each_once() {
    let system = System::start().await;
    let sale = system.sale(40).await;
    for seat in 0..40 {
        system.reserved(&sale, &[seat]).await;
    }
    let_time_pass(&system).await;
    let workers = (0..4).map(|_| {
        let app = Arc::clone(&system.app);
        async move {
            let mut ended = 0;
            loop {
                match expire_due(&app, 3).await.unwrap() {
                    0 => return ended,
                    batch => {
                        assert!(batch <= 3, "a batch of {batch}");
                        ended += batch;
                    }
                }
            }
        }
    });
    // A worker may find nothing while the others have the last rows locked. Together they end all of them.
    let ended: usize = join_all(workers).await.into_iter().sum();
    assert_eq!(ended, 40);
    assert_eq!(system.count("select count(*) from outbox where event_type = 'reservation.expired'").await, 40);
    let buyer = Uuid::now_v7();
    system.seats_become(&sale, &["available"; 40]).await;
    system.reserve(&sale, buyer, &[7], 201).await;
    system.finish().await;
}

/// Thousands of holds expire in the same second. Two workers end them, and one is killed half-way. Set
/// `EXPIRY_SEATS=100000` for a full-size run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_hall_that_expires_at_once_returns_to_sale_although_a_worker_dies() {
    let seats = scale("EXPIRY_SEATS", 2000);
    let system = System::start().await;
    let sale = system.sale(seats as u32).await;
    let ids: Vec<Uuid> = (0..seats).map(|_| Uuid::now_v7()).collect();
    let held: Vec<Uuid> = sale.seats.iter().map(|seat| seat.parse().unwrap()).collect();
    // One reservation per seat, as bookings would have left them. All of them expire three seconds from now.
    let due: chrono::DateTime<chrono::Utc> =
        sqlx::query_scalar("select now() + interval '3 seconds'").fetch_one(&system.app.db).await.unwrap();
    sqlx::query(
        "with made as (
             insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
             select id, gen_random_uuid(), $2, 'active', $4 - interval '10 minutes', $4, 1, 100, 'USD' from unnest($1::uuid[]) as new (id)
         )
         insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
         select gen_random_uuid(), id, seat, gen_random_uuid(), '1', '1', 100, 0, 100 from unnest($1::uuid[], $3::uuid[]) as new (id, seat)",
    )
    .bind(&ids)
    .bind(sale.session.parse::<Uuid>().unwrap())
    .bind(&held)
    .bind(due)
    .execute(&system.app.db)
    .await
    .unwrap();
    sqlx::query(
        "update session_seats s set status = 'reserved', reservation_id = id, reserved_until = $3
         from unnest($1::uuid[], $2::uuid[]) as new (id, seat) where session_seat_id = seat",
    )
    .bind(&ids)
    .bind(&held)
    .bind(due)
    .execute(&system.event_db)
    .await
    .unwrap();
    let mut first = crash::spawn(&system, "worker").await;
    let _second = crash::spawn(&system, "worker").await;
    let left = async || -> i64 {
        let sql = "select count(*) from session_seats where status <> 'available'";
        sqlx::query_scalar(sql).fetch_one(&system.event_db).await.unwrap()
    };
    let time_max = Duration::from_secs(60 + seats as u64 / 100);
    wait_until("half of them have ended", time_max, async || {
        system.count("select count(*) from reservations where status = 'expired'").await >= seats as i64 / 2
    })
    .await;
    first.child.kill().await.unwrap();
    wait_until("all seats are on sale again", time_max, async || left().await == 0).await;
    let late: f64 = sqlx::query_scalar("select extract(epoch from now() - $1)::float8")
        .bind(due)
        .fetch_one(&system.app.db)
        .await
        .unwrap();
    println!("{seats} seats were back on sale {late:.1} s after their time");
    system.finish().await;
}
