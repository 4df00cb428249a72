//! Payment: a reservation is charged once or not at all, whatever the provider answers.

use booking_service::workflows::reconcile;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::testing::wait_until;
use uuid::Uuid;

use crate::support::{SOON, System, text_of};

#[tokio::test]
async fn a_payment_makes_tickets_and_a_message_sells_the_seats() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    let (id, user) = system.reserved(&sale, &[0, 1]).await;
    let paid = system.confirm(&id, user, Some(json!({ "payment_id": "pay_demo" })), 200).await;
    assert_eq!(
        (&paid["status"], &paid["payment_status"], paid["tickets"].as_array().unwrap().len()),
        (&json!("confirmed"), &json!("completed"), 2)
    );
    system.seats_become(&sale, &["sold", "sold", "available"]).await;

    let tickets = system.get(&format!("/api/v1/tickets/user/{user}"), user, 200).await;
    assert_eq!(tickets.as_array().unwrap().len(), 2);
    assert!(text_of(&tickets[0], "qr_code").starts_with("data:image/png;base64,iVBOR"));
    let ticket = text_of(&paid["tickets"][0], "id");
    let image = system.call(reqwest::Method::GET, &format!("/api/v1/tickets/{ticket}/qr"), user, None).await;
    assert_eq!(image.headers()["content-type"], "image/png");
    assert_eq!(&image.bytes().await.unwrap()[..8], b"\x89PNG\r\n\x1a\n");
    let image = system.call(reqwest::Method::GET, &format!("/api/v1/tickets/{ticket}/qr?format=svg"), user, None).await;
    assert!(image.text().await.unwrap().contains("<svg"));
    let stranger = Uuid::now_v7();
    system.get(&format!("/api/v1/tickets/{ticket}"), stranger, 404).await;
    system.get(&format!("/api/v1/tickets/user/{user}"), stranger, 404).await;
    assert_eq!(system.lock_owner(&sale, 0).await, None, "a sold seat needs no lock");
    system.finish().await;
}

#[tokio::test]
async fn a_repeated_confirmation_gets_the_same_answer_and_charges_once() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let first = system.confirm(&id, user, None, 200).await;
    assert_eq!(system.confirm(&id, user, None, 200).await, first);
    assert_eq!(system.confirm(&id, user, Some(json!({ "payment_id": "pay_decline" })), 200).await, first);
    assert_eq!(system.count("select count(*) from mock_provider_charges").await, 1);
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_confirmations_at_once_charge_once() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (id, user) = system.reserved(&sale, &[0, 1]).await;
    let path = format!("/api/v1/reservations/{id}/confirm");
    let answers = join_all((0..30).map(|_| system.call(reqwest::Method::POST, &path, user, None))).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status().as_u16()).collect();
    assert!(statuses.iter().all(|status| [200, 409].contains(status)) && statuses.contains(&200), "{statuses:?}");
    assert_eq!(system.count("select count(*) from mock_provider_charges").await, 1);
    assert_eq!(system.count("select count(*) from tickets").await, 2);
    system.finish().await;
}

#[tokio::test]
async fn a_declined_payment_keeps_the_hold_and_may_be_tried_again() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let declined = system.confirm(&id, user, Some(json!({ "payment_id": "pay_decline_1" })), 402).await;
    assert_eq!(declined["code"], "payment_declined");
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "active");
    system.confirm(&id, user, None, 200).await;
    system.finish().await;
}

/// The provider charged, but its answer was lost. The worker asks the provider, and the customer gets the ticket.
#[tokio::test]
async fn a_charge_whose_answer_was_lost_ends_in_a_ticket() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let unknown = system.confirm(&id, user, Some(json!({ "payment_id": "pay_timeout_charged" })), 503).await;
    assert_eq!((&unknown["code"], unknown["retry_after_seconds"].is_u64()), (&json!("payment_unavailable"), true));
    assert_eq!(system.confirm(&id, user, None, 409).await["code"], "confirmation_in_progress");
    assert_eq!(system.cancel(&id, user, 409).await["code"], "confirmation_in_progress");
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "active");
    assert_eq!(reconcile::settle_payments(&system.app).await.unwrap(), 0, "a running lease was settled");
    end_lease(&system).await;
    assert_eq!(reconcile::settle_payments(&system.app).await.unwrap(), 1);
    assert_eq!(system.confirm(&id, user, None, 200).await["tickets"].as_array().unwrap().len(), 1);
    assert_eq!(system.count("select count(*) from mock_provider_charges").await, 1);
    system.finish().await;
}

/// The provider never received the charge. The reservation is active again, and the lost request cannot charge later.
#[tokio::test]
async fn a_charge_that_never_arrived_leaves_the_reservation_active() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, Some(json!({ "payment_id": "pay_timeout_lost" })), 503).await;
    end_lease(&system).await;
    assert_eq!(reconcile::settle_payments(&system.app).await.unwrap(), 1);
    assert_eq!(system.count("select count(*) from mock_provider_charges where state = 'voided'").await, 1);
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "active");
    system.confirm(&id, user, None, 200).await;
    system.finish().await;
}

/// A payment's lease prevents the expiry, even when the hold's time ends meanwhile.
#[tokio::test]
async fn a_reservation_does_not_expire_during_its_payment() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, Some(json!({ "payment_id": "pay_timeout_charged" })), 503).await;
    system.let_reservations_run_out().await;
    assert_eq!(booking_service::workflows::end::expire_due(&system.app, 100).await.unwrap(), 0);
    // A buyer that wants its seats does not end it either, although the hold is past its time.
    let past = "update session_seats set reserved_until = reserved_until - interval '1 hour' where status = 'reserved'";
    sqlx::query(past).execute(&system.event_db).await.unwrap();
    let settled = reconcile::reconcile_once(&system.app, &mut reconcile::Sweep::default()).await.unwrap();
    assert_eq!((settled.released, settled.confirmed), (0, 0));
    system.reserve(&sale, Uuid::now_v7(), &[0], 409).await;
    end_lease(&system).await;
    reconcile::settle_payments(&system.app).await.unwrap();
    assert_eq!(system.confirm(&id, user, None, 200).await["status"], "confirmed");
    system.finish().await;
}

async fn end_lease(system: &System) {
    sqlx::query("update reservations set confirming_until = now() - interval '1 second' where status = 'confirming'")
        .execute(&system.app.db)
        .await
        .unwrap();
}

/// Other checks prevent this state. If it occurs all the same, the buyer is refunded, and no request hangs.
#[tokio::test]
async fn a_payment_for_a_seat_with_another_ticket_is_refunded() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (other, other_user) = system.reserved(&sale, &[1]).await;
    system.confirm(&other, other_user, None, 200).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    sqlx::query("update tickets set session_seat_id = $1")
        .bind(sale.seats[0].parse::<Uuid>().unwrap())
        .execute(&system.app.db)
        .await
        .unwrap();
    assert_eq!(system.confirm(&id, user, None, 409).await["code"], "seat_unavailable");
    assert_eq!(system.count("select count(*) from mock_provider_refunds r join mock_provider_charges c on r.idempotency_key = c.idempotency_key and r.amount = c.amount").await, 1);
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "expired");
    assert_eq!(system.count("select count(*) from refunds where status = 'settled'").await, 1);
}

/// Concurrent payments share a batch. A payment that fails must not fail the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payments_in_one_batch_each_get_their_own_outcome() {
    let system = System::start().await;
    let sale = system.sale(43).await;
    let (lost, user) = system.reserved(&sale, &[42]).await;
    let lost = system.confirm(&lost, user, None, 200).await["tickets"][0]["id"].clone();
    let mut orders = Vec::new();
    for seat in 0..42 {
        let (id, user) = system.reserved(&sale, &[seat]).await;
        // Of seven orders, four are paid. One is cancelled, one is declined, and one is confirmed by a stranger.
        orders.push(match seat % 7 {
            4 => {
                system.cancel(&id, user, 200).await;
                (id, user, None, 409)
            }
            5 => (id, user, Some(json!({ "payment_id": "pay_decline" })), 402),
            6 => (id, Uuid::now_v7(), None, 404),
            _ => (id, user, None, 200),
        });
    }
    // The first order's seat already has another ticket.
    sqlx::query("update tickets set session_seat_id = $1 where id = $2")
        .bind(sale.seats[0].parse::<Uuid>().unwrap())
        .bind(lost.as_str().unwrap().parse::<Uuid>().unwrap())
        .execute(&system.app.db)
        .await
        .unwrap();
    orders[0].3 = 409;
    join_all(orders.iter().map(|(id, user, body, expected)| system.confirm(id, *user, body.clone(), *expected))).await;
    assert_eq!(system.count("select count(*) from mock_provider_charges where state = 'captured'").await, 25);
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 1);
    let paid = "select count(*) from reservations r where status = 'confirmed'
                and (select count(*) from tickets where reservation_id = r.id) = 1 and (select count(*) from payments where reservation_id = r.id) = 1";
    assert_eq!(system.count(paid).await, 24);
    // A payment that fails splits its batch, so only payments that all succeed show that batches form.
    wait_until("payments share a transaction", SOON, async || {
        let (sale, mut orders) = (system.sale(8).await, Vec::new());
        for seat in 0..8 {
            orders.push(system.reserved(&sale, &[seat]).await);
        }
        join_all(orders.iter().map(|(id, user)| system.confirm(id, *user, None, 200))).await;
        system.count("select count(*) - count(distinct xmin::text) from tickets").await > 0
    })
    .await;
}

#[tokio::test]
async fn events_carry_money_with_two_decimals() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    let payload: String =
        sqlx::query_scalar("select payload::text from outbox").fetch_one(&system.app.db).await.unwrap();
    assert!(payload.contains("\"amount\": 100.00"), "{payload}");
    system.finish().await;
}

#[tokio::test]
async fn more_than_a_thousand_tickets_are_all_found() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    system.confirm(&id, user, None, 200).await;
    let many = "insert into tickets (id, reservation_id, reservation_item_id, user_id, session_id, session_seat_id, row_number, seat_number, price)
        select gen_random_uuid(), reservation_id, gen_random_uuid(), user_id, gen_random_uuid(), gen_random_uuid(), '1', n::text, 100
        from tickets, generate_series(1, 1019) as n";
    sqlx::query(many).execute(&system.app.db).await.unwrap();
    let response = system.call(Method::GET, &format!("/api/v1/tickets/user/{user}"), user, None).await;
    let link = response.headers()["link"].to_str().unwrap().to_owned();
    let mut found: Vec<Value> = response.json().await.unwrap();
    assert_eq!(found.len(), 1000);
    let mut next = Some(link.strip_prefix('<').unwrap().strip_suffix(">; rel=\"next\"").unwrap().to_owned());
    while let Some(path) = next {
        let page = system.get(&path, user, 200).await;
        found.extend(page["items"].as_array().unwrap().iter().cloned());
        next = page["next_cursor"].as_str().map(|cursor| format!("/api/v1/tickets?cursor={cursor}"));
    }
    let ids: Vec<String> = found.iter().map(|ticket| text_of(ticket, "id")).collect();
    assert_eq!(ids.len(), 1020);
    assert!(ids.is_sorted_by(|newer, older| newer > older), "each once, newest first");
    let few = system.call(Method::GET, &format!("/api/v1/tickets/user/{}", Uuid::now_v7()), user, None).await;
    assert!(few.headers().get("link").is_none());
}

#[tokio::test]
async fn a_refunded_ticket_has_no_code() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let paid = system.confirm(&id, user, None, 200).await;
    let ticket = text_of(&paid["tickets"][0], "id");
    let path = format!("/api/v1/tickets/{ticket}");
    assert!(system.get(&path, user, 200).await["qr_code"].is_string());
    system.refund(&ticket, user, 200).await;
    assert!(system.get(&path, user, 200).await.get("qr_code").is_none());
    assert_eq!(system.get(&format!("{path}/qr"), user, 410).await["code"], "ticket_refunded");
    system.finish().await;
}
