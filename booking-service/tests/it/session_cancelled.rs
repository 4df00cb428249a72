//! A cancelled session: its reservations end, and every payment is refunded.

use booking_service::workflows::reconcile::{Sweep, end_cancelled_sessions, settle_payments, settle_refunds};
use futures::stream::{self, StreamExt};
use serde_json::json;
use uuid::Uuid;

use crate::support::{Sale, System, answer, text_of};

async fn cancel_session(system: &System, sale: &Sale) {
    let path = format!("{}/api/v1/sessions/{}/cancel", system.event_base, sale.session);
    answer(system.http.post(path).send().await.unwrap(), 200).await;
}

async fn status(system: &System, id: &str, user: Uuid) -> String {
    text_of(&system.get(&format!("/api/v1/reservations/{id}"), user, 200).await, "status")
}

#[tokio::test]
async fn active_reservations_end_and_paid_ones_are_refunded() {
    let system = System::start().await;
    let (sale, other) = (system.sale(6).await, system.sale(1).await);
    let (active, first) = system.reserved(&sale, &[0, 1]).await;
    let (paid, second) = system.reserved(&sale, &[2, 3]).await;
    let tickets = system.confirm(&paid, second, None, 200).await["tickets"].clone();
    let (half, third) = system.reserved(&sale, &[4, 5]).await;
    let half_tickets = system.confirm(&half, third, None, 200).await["tickets"].clone();
    system.refund(&text_of(&half_tickets[0], "id"), third, 200).await;
    let (elsewhere, fourth) = system.reserved(&other, &[0]).await;

    cancel_session(&system, &sale).await;
    let mut sweep = Sweep::default();
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 3);
    assert_eq!(settle_refunds(&system.app).await.unwrap(), 3, "two tickets of one reservation, one of the other");
    assert_eq!(status(&system, &active, first).await, "cancelled");
    assert_eq!(status(&system, &paid, second).await, "refunded");
    assert_eq!(status(&system, &half, third).await, "refunded");
    assert_eq!(status(&system, &elsewhere, fourth).await, "active");
    let ticket = system.get(&format!("/api/v1/tickets/{}", text_of(&tickets[0], "id")), second, 200).await;
    assert_eq!(ticket["status"], "refunded");
    assert_eq!(system.confirm(&active, first, None, 409).await["code"], "reservation_cancelled");
    assert_eq!(system.reserve(&sale, first, &[0], 409).await["code"], "session_cancelled");
    system.seats_become(&sale, &["blocked"; 6]).await;

    // Nothing is left to do, for this worker and for one that has just started.
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 0);
    assert_eq!(end_cancelled_sessions(&system.app, &mut Sweep::default()).await.unwrap(), 0);
    assert_eq!(settle_refunds(&system.app).await.unwrap(), 0);
    system.finish().await;
}

/// A charge is in progress when the session is cancelled. The worker waits for its outcome, and then refunds it.
#[tokio::test]
async fn a_payment_in_progress_is_refunded_once_its_outcome_is_known() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, Some(json!({ "payment_id": "pay_timeout_charged" })), 503).await;
    cancel_session(&system, &sale).await;
    let mut sweep = Sweep::default();
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 0);
    sqlx::query("update reservations set confirming_until = now() - interval '1 second'")
        .execute(&system.app.db)
        .await
        .unwrap();
    assert_eq!(settle_payments(&system.app).await.unwrap(), 1);
    assert_eq!(status(&system, &id, user).await, "confirmed");
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 1);
    assert_eq!(settle_refunds(&system.app).await.unwrap(), 1);
    assert_eq!(status(&system, &id, user).await, "refunded");
    system.finish().await;
}

/// The session is cancelled between a booking's check and its hold. The reservation may be written after the worker has
/// handled the session. A later round of the same worker ends it.
#[tokio::test]
async fn a_reservation_written_after_the_cancellation_is_ended_by_a_later_round() {
    let system = System::start().await;
    let (sale, other) = (system.sale(2).await, system.sale(1).await);
    let (early, first) = system.reserved(&sale, &[0]).await;
    cancel_session(&system, &sale).await;
    cancel_session(&system, &other).await; // The worker's cursor moves past the first.
    let mut sweep = Sweep::default();
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 1);
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 0, "nothing is left to end");
    let set = async |sql: &'static str| sqlx::query(sql).execute(&system.event_db).await.unwrap();
    set("create table was as select session_id, cancelled_at from sessions").await;
    set("update sessions set status = 'scheduled', cancelled_at = null").await;
    set("update session_seats set status = 'available' where reservation_id is null").await;
    let (late, second) = system.reserved(&sale, &[1]).await;
    set("update sessions set status = 'cancelled', cancelled_at = was.cancelled_at from was where was.session_id = sessions.session_id").await;
    assert_eq!(end_cancelled_sessions(&system.app, &mut sweep).await.unwrap(), 1);
    for (id, user) in [(early, first), (late, second)] {
        assert_eq!(status(&system, &id, user).await, "cancelled");
    }
    system.finish().await;
}

/// Two workers end more than one batch of tickets and of holds. Each reservation ends once, and each sum is refunded
/// once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_end_many_reservations_once_each() {
    let system = System::start().await;
    let sale = system.sale(240).await;
    let bookings = stream::iter(0..240).map(|seat| {
        let (system, sale) = (&system, &sale);
        async move {
            let (id, user) = system.reserved(sale, &[seat]).await;
            if seat % 2 == 0 {
                system.confirm(&id, user, None, 200).await;
            }
        }
    });
    bookings.buffer_unordered(8).collect::<Vec<()>>().await;
    cancel_session(&system, &sale).await;
    let (mut one, mut two) = (Sweep::default(), Sweep::default());
    let (first, second) =
        tokio::join!(end_cancelled_sessions(&system.app, &mut one), end_cancelled_sessions(&system.app, &mut two));
    let ended = first.unwrap() + second.unwrap();
    let rest = end_cancelled_sessions(&system.app, &mut one).await.unwrap();
    assert_eq!(ended + rest, 240);
    settle_refunds(&system.app).await.unwrap();
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 120);
    system.seats_become(&sale, &["blocked"; 240]).await;
    system.finish().await;
}
