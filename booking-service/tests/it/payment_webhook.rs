//! The provider's notices: accepted only with a valid signature, harmless in any number and order, and handled even if
//! late.

use std::time::Duration;

use booking_service::workflows::end::expire_due;
use booking_service::workflows::payment_webhook::{SIGNATURE, sign};
use booking_service::workflows::reconcile;
use futures::future::join_all;
use reqwest::Response;
use serde_json::{Value, json};
use service_kit::process::settings::Secret;
use service_kit::testing::wait_until;
use uuid::Uuid;

use crate::support::{SOON, Sale, System, WEBHOOK_SECRET, answer, text_of};

fn notice(event_id: &str, event_type: &str, payment: &str) -> Value {
    json!({ "event_id": event_id, "event_type": event_type, "payment_id": payment, "amount": 100.00, "currency": "USD" })
}

async fn now(system: &System) -> i64 {
    system.count("select extract(epoch from now())::int8").await
}

pub(crate) async fn send(system: &System, notice: &Value) -> Response {
    send_signed(system, notice, WEBHOOK_SECRET, now(system).await).await
}

async fn send_signed(system: &System, notice: &Value, secret: &str, time: i64) -> Response {
    let body = notice.to_string();
    let signature = sign(&Secret::from(secret), time, body.as_bytes());
    let request = system.http.post(format!("{}/api/v1/payments/webhook", system.booking_base));
    let request = request.header(SIGNATURE, signature).header("content-type", "application/json");
    request.body(body).send().await.unwrap()
}

async fn tell(system: &System, event_type: &str, payment: &str) -> Value {
    answer(send(system, &notice(&Uuid::now_v7().to_string(), event_type, payment)).await, 200).await
}

/// Makes a reservation whose payment the provider is processing. Returns its id, its user and the charge.
async fn processing(system: &System, sale: &Sale, seat: usize) -> (String, Uuid, String) {
    let (id, user) = system.reserved(sale, &[seat]).await;
    let accepted = system.confirm(&id, user, Some(json!({ "payment_id": "pay_async" })), 202).await;
    assert_eq!(
        (&accepted["payment_status"], &accepted["status"], &accepted["tickets"]),
        (&json!("processing"), &json!("active"), &json!([]))
    );
    (id, user, text_of(&accepted, "payment_id"))
}

/// Expires the reservation as if its time had passed, and frees its seats.
async fn let_expire(system: &System) {
    system.let_reservations_run_out().await;
    assert_eq!(expire_due(&system.app, 100).await.unwrap(), 1);
}

async fn charges(system: &System, state: &'static str) -> i64 {
    sqlx::query_scalar("select count(*) from mock_provider_charges where state = $1")
        .bind(state)
        .fetch_one(&system.app.db)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_payment_yields_tickets_when_its_notice_comes() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user, payment) = processing(&system, &sale, 0).await;
    let again = system.confirm(&id, user, Some(json!({ "payment_id": "pay_other" })), 202).await;
    assert_eq!(text_of(&again, "payment_id"), payment, "asking again does not charge again");
    let captured = notice("evt_1", "payment.captured", &payment);
    let answers = join_all((0..20).map(|_| send(&system, &captured))).await;
    assert!(answers.iter().all(|answer| answer.status() == 200));
    assert_eq!(
        answer(send(&system, &captured).await, 200).await,
        json!({ "handled": true, "duplicate": true }),
        "the notice was handled before"
    );
    let paid = system.confirm(&id, user, None, 200).await;
    assert_eq!((text_of(&paid, "payment_id"), paid["tickets"].as_array().unwrap().len()), (payment, 1));
    assert_eq!(system.count("select count(*) from tickets").await, 1);
    assert_eq!(system.count("select count(*) from mock_provider_charges").await, 1);
    system.seats_become(&sale, &["sold"]).await;
    system.finish().await;
}

/// A client repeats its key to learn the state of its payment. A later decline is answered as an immediate one is, and
/// nothing is charged again.
#[tokio::test]
async fn a_key_whose_payment_is_declined_later_reports_the_decline() {
    let system = System::start().await;
    let (id, user) = system.reserved(&system.sale(1).await, &[0]).await;
    let confirm = async |key: &str, payment_id: &str, expected: u16| {
        let request = system.http.post(format!("{}/api/v1/reservations/{id}/confirm", system.booking_base));
        let request = request.header("x-user-id", user.to_string()).header("idempotency-key", key);
        answer(request.json(&json!({ "payment_id": payment_id })).send().await.unwrap(), expected).await
    };
    let payment = text_of(&confirm("slow", "pay_async", 202).await, "payment_id");
    for (key, payment_id) in [("slow", "pay_async"), ("other", "pay_good")] {
        assert_eq!(text_of(&confirm(key, payment_id, 202).await, "payment_id"), payment);
    }
    // Another payment is in progress. This answer is temporary, and the key keeps its own payment.
    let set = async |sql: &'static str| sqlx::query(sql).execute(&system.app.db).await.unwrap();
    set("update reservations set status = 'confirming', confirming_until = now() + interval '1 minute'").await;
    assert_eq!(confirm("slow", "pay_async", 409).await["code"], "confirmation_in_progress");
    set("update reservations set status = 'active', confirming_until = null").await;
    tell(&system, "payment.declined", &payment).await;
    for _ in 0..2 {
        assert_eq!(confirm("slow", "pay_async", 402).await["code"], "payment_declined");
    }
    assert_eq!(system.count("select count(*) from payments").await, 1);
    // The other key's payment has not been tried yet.
    assert_eq!(confirm("other", "pay_good", 200).await["status"], "confirmed");
    system.finish().await;
}

#[tokio::test]
async fn money_that_comes_after_the_sessions_end_goes_back() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for (seat, is_expired) in [(0, false), (1, true)] {
        let (id, user, payment) = processing(&system, &sale, seat).await;
        let ended = "update reservations set end_time = now() where id::text = $1";
        sqlx::query(ended).bind(&id).execute(&system.app.db).await.unwrap();
        if is_expired {
            let_expire(&system).await;
        }
        tell(&system, "payment.captured", &payment).await;
        let state: String = sqlx::query_scalar("select status from payments where id::text = $1")
            .bind(&payment)
            .fetch_one(&system.app.db)
            .await
            .unwrap();
        assert_eq!(state, "voided", "expired: {is_expired}");
        assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "expired");
    }
    assert_eq!(system.count("select count(*) from refunds where status = 'settled'").await, 2);
    assert_eq!(system.count("select count(*) from tickets").await, 0);
    system.finish().await;
}

#[tokio::test]
async fn a_notice_without_a_valid_signature_changes_nothing() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user, payment) = processing(&system, &sale, 0).await;
    let captured = notice("evt_1", "payment.captured", &payment);
    let time = now(&system).await;
    for (secret, time) in [("guessed", time), (WEBHOOK_SECRET, time - 301), (WEBHOOK_SECRET, time + 310)] {
        let refused = answer(send_signed(&system, &captured, secret, time).await, 401).await;
        assert_eq!(refused["code"], "unauthenticated", "{secret} {time}");
    }
    let path = format!("{}/api/v1/payments/webhook", system.booking_base);
    assert_eq!(system.http.post(&path).json(&captured).send().await.unwrap().status(), 401);
    // The signature is valid, but for another body.
    let signature = sign(&Secret::from(WEBHOOK_SECRET), time, captured.to_string().as_bytes());
    let forged = notice("evt_2", "payment.captured", &payment);
    let forged = system.http.post(&path).header(SIGNATURE, signature).json(&forged);
    assert_eq!(forged.send().await.unwrap().status(), 401);

    let mut cheaper = captured.clone();
    cheaper["amount"] = json!(1.00);
    cheaper["currency"] = json!("EUR");
    let refused = answer(send(&system, &cheaper).await, 422).await;
    assert_eq!(
        (&refused["errors"][0]["pointer"], &refused["errors"][1]["pointer"]),
        (&json!("/amount"), &json!("/currency"))
    );
    let unknown = notice("evt_3", "payment.captured", &Uuid::now_v7().to_string());
    assert_eq!(answer(send(&system, &unknown).await, 404).await["code"], "payment_not_found");
    assert_eq!(answer(send(&system, &json!({})).await, 422).await["code"], "validation_failed");

    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "active");
    assert_eq!(system.count("select count(*) from payment_notices").await, 0);
    // The previous secret is still accepted.
    answer(send_signed(&system, &captured, "of last month", time).await, 200).await;
    system.confirm(&id, user, None, 200).await;
    system.finish().await;
}

/// The notice arrives before the provider's own answer, so the customer need not wait for the lease to run out.
#[tokio::test]
async fn a_notice_may_come_before_the_answer() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for (seat, means, event_type) in
        [(0, "pay_timeout_charged", "payment.captured"), (1, "pay_decline", "payment.declined")]
    {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        system.confirm(&id, user, Some(json!({ "payment_id": means })), if seat == 0 { 503 } else { 402 }).await;
        let key: Uuid = sqlx::query_scalar("select id from payments where reservation_id = $1")
            .bind(id.parse::<Uuid>().unwrap())
            .fetch_one(&system.app.db)
            .await
            .unwrap();
        assert_eq!(tell(&system, event_type, &key.to_string()).await["handled"], true);
        let status = system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"].clone();
        assert_eq!(status, if seat == 0 { "confirmed" } else { "active" });
    }
    system.finish().await;
}

#[tokio::test]
async fn notices_in_the_wrong_order_do_not_change_a_decided_payment() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (id, user, payment) = processing(&system, &sale, 0).await;
    tell(&system, "payment.captured", &payment).await;
    tell(&system, "payment.declined", &payment).await;
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "confirmed");

    let (id, user, payment) = processing(&system, &sale, 1).await;
    tell(&system, "payment.declined", &payment).await;
    tell(&system, "payment.captured", &payment).await;
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "active");
    let paid = system.confirm(&id, user, None, 200).await;
    assert_ne!(text_of(&paid, "payment_id"), payment, "a declined payment may be followed by another");
    assert_eq!((charges(&system, "captured").await, charges(&system, "declined").await), (2, 1));
    system.finish().await;
}

#[tokio::test]
async fn a_payment_after_the_expiry_buys_the_seats_if_they_are_still_free() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user, payment) = processing(&system, &sale, 0).await;
    // The message of the expiry is delayed. It must not free the seats that are booked again.
    system.to_broker.freeze();
    let_expire(&system).await;
    assert_eq!(tell(&system, "payment.captured", &payment).await, json!({ "handled": true, "duplicate": false }));
    tell(&system, "payment.captured", &payment).await;
    system.to_broker.heal();
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "expired");
    let confirmed = system.get("/api/v1/reservations?status=confirmed", user, 200).await;
    let again = &confirmed["items"][0];
    assert_eq!((confirmed["items"].as_array().unwrap().len(), again["total_amount"].as_f64()), (1, Some(100.0)));
    assert_eq!(text_of(&system.confirm(&text_of(again, "id"), user, None, 200).await, "payment_id"), payment);
    assert_eq!(system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await.as_array().unwrap().len(), 1);
    system.seats_become(&sale, &["sold"]).await;
    assert_eq!(system.count("select count(*) from refunds").await, 0);
    system.finish().await;
}

#[tokio::test]
async fn a_payment_for_seats_that_are_gone_is_refunded_once() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (_, user, payment) = processing(&system, &sale, 0).await;
    let_expire(&system).await;
    system.seats_become(&sale, &["available", "available"]).await;
    let (other, other_user) = system.reserved(&sale, &[0]).await;
    let captured = notice("evt_1", "payment.captured", &payment);
    for answered in join_all((0..10).map(|_| send(&system, &captured))).await {
        assert_eq!(answered.status(), 200);
    }
    assert_eq!(system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await, json!([]));
    assert_eq!(system.count("select count(*) from mock_provider_refunds where amount = 100").await, 1);

    // A customer that has cancelled the reservation wants the money and not the seat.
    let (id, user, payment) = processing(&system, &sale, 1).await;
    system.cancel(&id, user, 200).await;
    tell(&system, "payment.captured", &payment).await;
    system.seats_become(&sale, &["reserved", "available"]).await;
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 2);
    system.confirm(&other, other_user, None, 200).await;
    system.finish().await;
}

#[tokio::test]
async fn without_a_notice_the_worker_asks_the_provider() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    let (captured, user, _) = processing(&system, &sale, 0).await;
    sqlx::query("update mock_provider_charges set state = 'captured'").execute(&system.app.db).await.unwrap();
    assert_eq!(
        reconcile::follow_up_payments(&system.app).await.unwrap(),
        0,
        "the provider has time to send its notice"
    );
    sqlx::query("update payments set updated_at = now() - interval '1 minute'").execute(&system.app.db).await.unwrap();
    assert_eq!(reconcile::follow_up_payments(&system.app).await.unwrap(), 1);
    assert_eq!(system.get(&format!("/api/v1/reservations/{captured}"), user, 200).await["status"], "confirmed");

    // A charge that is still processing when the reservation expires is voided.
    processing(&system, &sale, 1).await;
    let_expire(&system).await;
    assert_eq!(reconcile::follow_up_payments(&system.app).await.unwrap(), 1);
    assert_eq!(charges(&system, "voided").await, 1);
    assert_eq!(system.count("select count(*) from payments where status = 'declined'").await, 1);
    assert_eq!(reconcile::follow_up_payments(&system.app).await.unwrap(), 0);
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_payment_waits_for_the_event_service() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (_, user, payment) = processing(&system, &sale, 0).await;
    let_expire(&system).await;
    system.to_event_service.cut();
    assert_eq!(tell(&system, "payment.captured", &payment).await["handled"], false);
    system.to_event_service.heal();
    // Another process takes over the notice when the first one's claim has run out.
    sqlx::query("update payments set rebooking_since = now() - interval '1 minute'")
        .execute(&system.app.db)
        .await
        .unwrap();
    wait_until("the notice is handled", SOON, async || {
        let _ = reconcile::follow_up_payments(&system.app).await;
        system.count("select count(*) from payment_notices where handled_at is null").await == 0
    })
    .await;
    assert_eq!(system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await.as_array().unwrap().len(), 1);
    system.finish().await;
}

/// Whichever comes first, the payment ends in exactly one ticket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notice_and_the_expiry_at_once_end_in_one_ticket() {
    let system = System::start().await;
    let sale = system.sale(40).await;
    let mut late = 0;
    for seat in 0..40 {
        let (id, user, payment) = processing(&system, &sale, seat).await;
        system.let_reservations_run_out().await;
        let expiring = async {
            // Both orders must occur.
            tokio::time::sleep(Duration::from_millis(5 * (seat as u64 % 8))).await;
            expire_due(&system.app, 100).await
        };
        let (expired, told) = tokio::join!(expiring, tell(&system, "payment.captured", &payment));
        assert_eq!((told["handled"].as_bool(), expired.is_ok()), (Some(true), true));
        late += i64::from(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"] == "expired");
        let tickets = system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await;
        assert_eq!(tickets.as_array().unwrap().len(), 1);
    }
    assert!(
        (1..40).contains(&late),
        "the expiry was first in {late} of 40: there was no race, so the test has tested nothing"
    );
    assert_eq!(charges(&system, "captured").await, 40);
    system.finish().await;
}
