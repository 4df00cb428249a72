//! Reconciliation: holds without reservations, lost messages and pending refunds.

use booking_service::workflows::reconcile::{self, Sweep, reconcile_once};
use serde_json::json;
use uuid::Uuid;

use crate::support::{System, text_of};

/// Makes the hold of a booking that crashed before it wrote its reservation. `age` is how long ago the booking began.
pub(crate) async fn orphan(system: &System, session: &str, seat: &str, age: &'static str) -> Uuid {
    let until: chrono::DateTime<chrono::Utc> =
        sqlx::query_scalar("select now() + interval '10 minutes' - $1::text::interval")
            .bind(age)
            .fetch_one(&system.app.db)
            .await
            .unwrap();
    let owner = Uuid::now_v7();
    let hold = json!({ "reservation_id": owner, "session_seat_ids": [seat], "reserved_until": until });
    let path = format!("{}/api/internal/sessions/{session}/seats/reserve", system.event_base);
    assert_eq!(system.http.post(path).json(&hold).send().await.unwrap().status(), 200);
    owner
}

#[tokio::test]
async fn a_hold_without_a_reservation_is_freed_once_its_booking_cannot_finish() {
    let system = System::start().await;
    let sale = system.sale(4).await;
    orphan(&system, &sale.session, &sale.seats[0], "30 seconds").await;
    orphan(&system, &sale.session, &sale.seats[1], "1 second").await;
    orphan(&system, &sale.session, &sale.seats[2], "2 hours").await;
    system.reserved(&sale, &[3]).await;
    let mut sweep = Sweep::default();
    assert_eq!(reconcile_once(&system.app, &mut sweep).await.unwrap().released, 2);
    assert_eq!(system.statuses(&sale.session).await, ["available", "reserved", "available", "reserved"]);
    // The young hold's booking may still write its reservation. A later round frees the hold, and only that one.
    sqlx::query(
        "update session_seats set reserved_until = reserved_until - interval '20 seconds' where session_seat_id = $1",
    )
    .bind(sale.seats[1].parse::<Uuid>().unwrap())
    .execute(&system.event_db)
    .await
    .unwrap();
    assert_eq!(reconcile_once(&system.app, &mut sweep).await.unwrap().released, 1);
    assert_eq!(reconcile_once(&system.app, &mut sweep).await.unwrap().released, 0);
    system.finish().await;
}

/// The booking's row is inserted but not committed when reconciliation runs. Reconciliation waits for the commit and
/// leaves the seat alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_booking_that_is_just_committing_keeps_its_seats() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let owner = orphan(&system, &sale.session, &sale.seats[0], "30 seconds").await;
    let mut booking = service_kit::postgres::database::begin(&system.app.db).await.unwrap();
    sqlx::query(
        "with made as (
             insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
             values ($1, gen_random_uuid(), $2, 'active', now(), now() + interval '10 minutes', 1, 100, 'USD') returning id
         )
         insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
         select gen_random_uuid(), id, $3, $4, '1', '1', 100, 0, 100 from made",
    )
    .bind(owner)
    .bind(sale.session.parse::<Uuid>().unwrap())
    .bind(sale.seats[0].parse::<Uuid>().unwrap())
    .bind(sale.tier.parse::<Uuid>().unwrap())
    .execute(&mut *booking)
    .await
    .unwrap();
    let waiting = async {
        system.wait_for_blocked_statement().await;
        booking.commit().await.unwrap();
    };
    let mut sweep = Sweep::default();
    let (healed, ()) = tokio::join!(reconcile_once(&system.app, &mut sweep), waiting);
    assert_eq!((healed.unwrap().released, system.statuses(&sale.session).await[0].as_str()), (0, "reserved"));
    system.finish().await;
}

#[tokio::test]
async fn reconciliation_applies_what_a_lost_message_announced() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    system.to_broker.cut();
    let (paid, user) = system.reserved(&sale, &[0, 1]).await;
    let tickets = system.confirm(&paid, user, None, 200).await;
    system.refund(&text_of(&tickets["tickets"][1], "id"), user, 200).await;
    // As if the broker had lost the messages after it confirmed them.
    sqlx::query("update outbox set published_at = now()").execute(&system.app.db).await.unwrap();
    sqlx::query("update session_seats set reserved_until = now() - interval '1 second' where status = 'reserved'")
        .execute(&system.event_db)
        .await
        .unwrap();
    let healed = reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
    assert_eq!((healed.confirmed, healed.released), (1, 1));
    assert_eq!(system.statuses(&sale.session).await, ["sold", "available", "available"]);
    let report = system.audit().await;
    assert!(report.is_clean(), "\n{report}");
}

#[tokio::test]
async fn a_hold_that_has_just_ended_is_left_to_the_expiry_for_ten_seconds() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for (seat, ended) in [(0, "9 seconds"), (1, "11 seconds")] {
        orphan(&system, &sale.session, &sale.seats[seat], "1 second").await;
        sqlx::query("update session_seats set reserved_until = now() - $2::text::interval where session_seat_id = $1")
            .bind(sale.seats[seat].parse::<Uuid>().unwrap())
            .bind(ended)
            .execute(&system.event_db)
            .await
            .unwrap();
    }
    let healed = reconcile_once(&system.app, &mut Sweep::beside_expiry()).await.unwrap();
    assert_eq!(
        (healed.released, system.statuses(&sale.session).await),
        (1, vec!["reserved".into(), "available".into()])
    );
    let healed = reconcile_once(&system.app, &mut Sweep::default()).await.unwrap();
    assert_eq!(healed.released, 1);
    system.finish().await;
}

#[tokio::test]
async fn a_refund_that_did_not_reach_the_provider_is_settled_later_and_once() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let paid = system.confirm(&id, user, None, 200).await;
    system.refund(&text_of(&paid["tickets"][0], "id"), user, 200).await;
    sqlx::query("delete from mock_provider_refunds").execute(&system.app.db).await.unwrap();
    sqlx::query("update refunds set status = 'pending'").execute(&system.app.db).await.unwrap();
    assert_eq!(reconcile::settle_refunds(&system.app).await.unwrap(), 1);
    assert_eq!(reconcile::settle_refunds(&system.app).await.unwrap(), 0);
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 1);
    system.finish().await;
}
