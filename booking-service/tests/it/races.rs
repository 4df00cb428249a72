//! Races: many requests want the same thing at the same moment.

use std::sync::Arc;

use booking_service::workflows::end::expire_due;
use futures::future::join_all;
use reqwest::Method;
use tokio::sync::Barrier;
use uuid::Uuid;

use crate::support::{Sale, System, answer};

/// Each buyer books the seats that `wants` returns for it, all at the same moment. Returns the statuses of the answers.
async fn reserve_at_once(system: &System, sale: &Sale, buyers: usize, wants: impl Fn(usize) -> Vec<usize>) -> Vec<u16> {
    let start = Arc::new(Barrier::new(buyers));
    let buyers = (0..buyers).map(|buyer| {
        let (start, seats) = (Arc::clone(&start), wants(buyer));
        async move {
            start.wait().await;
            let response = system.try_reserve(sale, Uuid::now_v7(), &seats).await;
            let status = response.status().as_u16();
            if status != 201 {
                assert_eq!(answer(response, 409).await["code"], "seat_unavailable");
            }
            status
        }
    });
    join_all(buyers).await
}

fn winners(statuses: &[u16]) -> usize {
    statuses.iter().filter(|status| **status == 201).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_buyers_want_one_seat_and_one_gets_it() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    assert_eq!(winners(&reserve_at_once(&system, &sale, 300, |_| vec![0]).await), 1);
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_still_only_one_buyer_gets_the_seat() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    system.to_redis.cut();
    assert_eq!(winners(&reserve_at_once(&system, &sale, 100, |_| vec![0]).await), 1);
    system.finish().await;
}

/// Buyers ask for overlapping pairs in opposite orders, with and without seat locks. Each gets both seats or none, and
/// no deadlock reaches a client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlapping_pairs_in_opposite_orders_are_reserved_whole_or_not_at_all() {
    let system = System::start().await;
    for without_locks in [false, true] {
        if without_locks {
            system.to_redis.cut();
        }
        let sale = system.sale(4).await;
        let pairs = [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2], [3, 0], [0, 3]];
        let statuses = reserve_at_once(&system, &sale, 64, |buyer| pairs[buyer % pairs.len()].to_vec()).await;
        let won = winners(&statuses);
        assert!((1..=2).contains(&won), "{won} pairs of four seats");
        let held = system.statuses(&sale.session).await.iter().filter(|status| *status == "reserved").count();
        assert_eq!(held, won * 2, "a seat is held without a reservation");
    }
    system.finish().await;
}

/// Payment and expiry happen at the same moment. The result is a ticket and a sold seat, or neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirm_and_expiry_have_one_winner() {
    let system = System::start().await;
    let sale = system.sale(60).await;
    let mut paid = 0;
    for seat in 0..60 {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        // The hold ends within the next few milliseconds, while both requests run.
        let nearly = "update reservations set expiry_time = clock_timestamp() + $2 * interval '1 millisecond', booking_time = now() - interval '1 hour' where id = $1";
        sqlx::query(nearly)
            .bind(id.parse::<Uuid>().unwrap())
            .bind(seat as i32 % 8)
            .execute(&system.app.db)
            .await
            .unwrap();
        let path = format!("/api/v1/reservations/{id}/confirm");
        let expiry = async {
            for _ in 0..6 {
                expire_due(&system.app, 10).await.unwrap();
            }
        };
        let (confirmed, ()) = tokio::join!(system.call(Method::POST, &path, user, None), expiry);
        match confirmed.status().as_u16() {
            200 => {
                let found = system.get(&format!("/api/v1/reservations/{id}"), user, 200).await;
                assert_eq!(found["status"], "confirmed", "paid and expired");
                paid += 1;
            }
            410 => assert_eq!(answer(confirmed, 410).await["code"], "reservation_expired"),
            other => panic!("{other}"),
        }
    }
    while expire_due(&system.app, 100).await.unwrap() > 0 {}
    let ends = "select count(*) from outbox where event_type in ('reservation.confirmed', 'reservation.expired')";
    assert_eq!(system.count(ends).await, 60, "each reservation ends exactly once");
    assert!(paid > 0 && paid < 60, "{paid} of 60 were paid: there was no race, so the test has tested nothing");
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirm_and_cancel_have_one_winner() {
    let system = System::start().await;
    let sale = system.sale(30).await;
    for seat in 0..30 {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        let confirm = format!("/api/v1/reservations/{id}/confirm");
        let cancel = format!("/api/v1/reservations/{id}");
        let (confirmed, cancelled) = tokio::join!(
            system.call(Method::POST, &confirm, user, None),
            system.call(Method::DELETE, &cancel, user, None)
        );
        let outcome = (confirmed.status().as_u16(), cancelled.status().as_u16());
        assert!(matches!(outcome, (200, 409) | (409, 200)), "{outcome:?}");
    }
    system.finish().await;
}
