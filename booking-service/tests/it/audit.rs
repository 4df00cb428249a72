//! The audit finds a planted fault of each kind, and reports nothing in a healthy system.

use std::time::Duration;

use booking_service::audit::{AuditWindow, audit};
use serde_json::{Value, json};
use service_kit::testing::wait_until;
use sqlx::PgPool;
use tokio::process::Command;
use uuid::Uuid;

use crate::support::{SOON, System, text_of};

/// A settled system with one reservation in each state: active, confirmed, refunded and cancelled.
async fn settled_system() -> System {
    let system = System::start().await;
    let sale = system.sale(4).await;
    let user = Uuid::now_v7();
    let request = system.http.post(format!("{}/api/v1/reservations", system.booking_base));
    let request = request.header("x-user-id", user.to_string()).header("idempotency-key", "kept");
    assert_eq!(request.json(&sale.order(&[0])).send().await.unwrap().status(), 201);
    let (confirmed, owner) = system.reserved(&sale, &[1]).await;
    system.confirm(&confirmed, owner, None, 200).await;
    let (refunded, owner) = system.reserved(&sale, &[2]).await;
    let paid = system.confirm(&refunded, owner, None, 200).await;
    system.refund(&text_of(&paid["tickets"][0], "id"), owner, 200).await;
    let (cancelled, owner) = system.reserved(&sale, &[3]).await;
    system.cancel(&cancelled, owner, 200).await;
    system.seats_become(&sale, &["reserved", "sold", "available", "available"]).await;
    wait_until("the refund is settled", SOON, async || {
        system.count("select count(*) from refunds where status = 'pending'").await == 0
    })
    .await;
    system
}

enum Where {
    Event,
    Booking,
}
use Where::{Booking, Event};

/// Plants each fault in its own system, and expects the audit to name it.
async fn each_is_found(faults: &[(Where, &'static str, usize, &str)]) {
    for (place, sql, promise, fault) in faults {
        let system = settled_system().await;
        let clean = system.audit().await;
        assert!(clean.is_clean(), "\n{clean}");
        let db: &PgPool = match place {
            Event => &system.event_db,
            Booking => &system.app.db,
        };
        sqlx::raw_sql(*sql).execute(db).await.unwrap();
        let report = system.audit().await;
        let found = report.verdicts[promise - 1].first.iter().any(|finding| finding.fault == *fault);
        assert!(found, "promise {promise}, {fault}: not found\n{report}");
    }
}

#[tokio::test]
async fn faults_of_seats_and_tickets_are_found() {
    each_is_found(&[
        (
            Booking,
            "update reservation_items set session_seat_id = (select session_seat_id from tickets where status = 'active')
             where reservation_id = (select id from reservations where status = 'active')",
            1,
            "two reservations have this seat",
        ),
        (Booking, "update reservations set seats_count = 2", 2, "the reservation does not have one item per seat"),
        (
            Event,
            "update session_seats set status = 'available', reservation_id = null, reserved_until = null where status = 'reserved'",
            2,
            "the reservation does not have its seat",
        ),
        (Booking, "delete from tickets where status = 'active'", 3, "the paid reservation does not have one ticket per seat"),
        (
            Booking,
            "update tickets set status = 'active' where status = 'refunded'",
            3,
            "the ticket admits although its reservation is not paid",
        ),
        (
            Booking,
            "update reservations set status = 'confirmed' where status = 'refunded'",
            3,
            "the reservation is confirmed although all its tickets are refunded",
        ),
        (
            Event,
            "update session_seats set status = 'available', reservation_id = null where status = 'sold'",
            3,
            "the ticket's seat has no owner",
        ),
        (
            Event,
            "update session_seats set reservation_id = gen_random_uuid() where status = 'sold'",
            3,
            "the ticket's seat has another owner",
        ),
        (
            Event,
            "update session_seats set status = 'reserved', reserved_until = now() where status = 'sold'",
            3,
            "the ticket's seat is held and not sold",
        ),
    ])
    .await;
}

#[tokio::test]
async fn leaked_seats_are_found() {
    each_is_found(&[
        (
            Event,
            "update session_seats set reservation_id = gen_random_uuid() where status = 'reserved'",
            4,
            "the seat is held for a reservation that does not exist",
        ),
        (
            Booking,
            "update reservations set status = 'cancelled' where status = 'active'",
            4,
            "the seat is held for a reservation that has ended",
        ),
        (
            Event,
            "update session_seats set status = 'sold', reserved_until = null where status = 'reserved'",
            4,
            "the seat is sold without a ticket",
        ),
        (
            Booking,
            "update reservations set booking_time = now() - interval '1 hour', expiry_time = now() - interval '61 seconds' where status = 'active'",
            4,
            "the reservation is overdue and has not ended",
        ),
    ])
    .await;
}

#[tokio::test]
async fn faults_of_money_are_found() {
    each_is_found(&[
        (
            Booking,
            "update payments set amount = 99 where reservation_id in (select id from reservations where status = 'confirmed')",
            5,
            "the captured amount is not the price",
        ),
        (
            Booking,
            "update reservations set status = 'expired' where status = 'confirmed'",
            5,
            "money was captured for a reservation that is not paid",
        ),
        (Booking, "update payments set status = 'pending'", 5, "the charge's outcome is unknown and no payment is in progress"),
        (Booking, "update payments set status = 'declined'", 5, "the provider has another outcome for this charge"),
        (
            Booking,
            "insert into mock_provider_charges (idempotency_key, amount, state) values (gen_random_uuid(), 5, 'captured')",
            5,
            "the provider captured a charge that has no payment",
        ),
        (Booking, "delete from refunds", 5, "ticket and refund do not agree"),
        (Booking, "delete from mock_provider_refunds", 5, "the refund is settled but the provider has not made it"),
        (
            Booking,
            "update payments set status = 'processing' where status = 'captured'; update reservations set updated_at = now() - interval '61 seconds'",
            5,
            "the reservation has ended but its charge is still processing",
        ),
        (
            Booking,
            "insert into payment_notices (event_id, payment_id, event_type, received_at)
             select 'evt', id, 'payment.captured', now() - interval '61 seconds' from payments limit 1",
            5,
            "the provider's notice has not been handled",
        ),
        (
            Booking,
            "update refunds set status = 'pending', created_at = now() - interval '61 seconds'",
            5,
            "the refund has been pending for too long",
        ),
        (
            Booking,
            "update reservations set status = 'confirming', confirming_until = now() - interval '61 seconds' where status = 'active'",
            5,
            "the payment takes too long",
        ),
    ])
    .await;
}

#[tokio::test]
async fn lost_events_stuck_events_and_wrong_stored_answers_are_found() {
    each_is_found(&[
        (
            Booking,
            "delete from outbox where id = (select id from outbox limit 1)",
            6,
            "the reservation does not have one event per change",
        ),
        (
            Booking,
            // The rule keeps the relay from publishing the event during the audit.
            "update outbox set published_at = null, created_at = now() - interval '61 seconds';
             create rule stuck as on update to outbox do instead nothing",
            6,
            "the event has not been published",
        ),
        (
            Booking,
            "update idempotency_keys set answer = jsonb_set(answer::jsonb, '{id}', to_jsonb(gen_random_uuid()::text))::text",
            8,
            "the stored answer names a reservation that does not exist",
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_dead_lettered_message_is_found() {
    let system = settled_system().await;
    let publisher = &system.app.publisher;
    let nonsense = service_kit::amqp::Outgoing {
        message_id: Uuid::now_v7(),
        routing_key: "reservation.expired".into(),
        body: b"nonsense".to_vec(),
        timestamp: 0,
        traceparent: None,
    };
    publisher.publish(&[nonsense]).await.unwrap();
    wait_until("the message is dead-lettered", SOON, async || !system.audit().await.verdicts[6].first.is_empty()).await;
}

/// A state that only one of the two passes finds is temporary.
#[tokio::test]
async fn a_temporary_state_is_not_a_violation() {
    let system = settled_system().await;
    let break_it = "update session_seats set reserved_until = now(), status = 'reserved' where status = 'sold'";
    sqlx::query(break_it).execute(&system.event_db).await.unwrap();
    let window = AuditWindow { settle: Duration::from_secs(2), late: Duration::from_secs(60) };
    let mend = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mend = "update session_seats set reserved_until = null, status = 'sold'
                    where reservation_id in (select reservation_id from session_seats where reserved_until < now())";
        sqlx::query(mend).execute(&system.event_db).await.unwrap();
    };
    let report = audit(&system.app, &system.settings.broker, &system.settings.queue, window);
    let (report, ()) = tokio::join!(report, mend);
    let report = report.unwrap();
    assert!(report.is_clean(), "\n{report}");
    assert_eq!(report.verdicts[2].in_passing, 1, "\n{report}");
}

#[tokio::test]
async fn the_command_prints_a_line_for_each_promise_and_exits_with_the_verdict() {
    let system = settled_system().await;
    let run = async |arguments: &[&str]| {
        let settings = &system.settings;
        Command::new(env!("CARGO_BIN_EXE_booking-service"))
            .args(["audit", "--settle-seconds", "1"])
            .args(arguments)
            .env("DATABASE_URL", settings.database_url.reveal())
            .env("RABBITMQ_URL", settings.broker.url.reveal())
            .env("RABBITMQ_QUEUE", &settings.queue)
            .env("EVENT_SERVICE_URL", &system.event_base)
            .output()
            .await
            .unwrap()
    };
    let clean = run(&[]).await;
    let text = String::from_utf8(clean.stdout).unwrap();
    assert!(clean.status.success(), "{text}");
    assert_eq!((text.lines().count(), text.matches(" ok ").count()), (8, 8), "{text}");
    sqlx::query("delete from tickets where status = 'active'").execute(&system.app.db).await.unwrap();
    let violated = run(&["--json"]).await;
    assert_eq!(violated.status.code(), Some(2));
    let report: Value = serde_json::from_slice(&violated.stdout).unwrap();
    assert_eq!((&report["verdicts"][2]["violations"], &report["verdicts"][0]["violations"]), (&json!(2), &json!(0)));
}
