//! What a session's beginning and end mean for its holds, payments and refunds, and what a buyer holds.

use reqwest::Method;
use serde_json::{Value, json};
use service_kit::testing::login::Login;
use uuid::Uuid;

use crate::support::{Sale, System, answer, text_of};

/// Moves the session, so that it begins and ends so many minutes from now. Sessions of the past can't be created.
async fn move_to(system: &System, sale: &Sale, begins_in: i32, ends_in: i32) {
    let moved = "update sessions set start_time = now() + make_interval(mins => $2), end_time = now() + make_interval(mins => $3) where session_id::text = $1";
    let moved = sqlx::query(moved).bind(&sale.session).bind(begins_in).bind(ends_in);
    assert_eq!(moved.execute(&system.event_db).await.unwrap().rows_affected(), 1);
}

#[tokio::test]
async fn no_hold_outlives_its_session() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    move_to(&system, &sale, 2, 5).await;
    let held = system.reserve(&sale, Uuid::now_v7(), &[0], 201).await;
    assert_eq!(held["expiry_time"], held["end_time"]);
    assert!((290..=300).contains(&held["time_remaining_seconds"].as_i64().unwrap()), "{held}");
    system.finish().await;
}

#[tokio::test]
async fn nothing_is_paid_after_the_end() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    // The end comes while the provider captures the charge.
    let (late, user) = system.reserved(&sale, &[0]).await;
    let ended = "update reservations set end_time = now() where id::text = $1";
    sqlx::query(ended).bind(&late).execute(&system.app.db).await.unwrap();
    let refused = system.confirm(&late, user, None, 409).await;
    assert_eq!(refused["code"], "session_over", "{refused}");
    assert_eq!(system.get(&format!("/api/v1/reservations/{late}"), user, 200).await["status"], "expired");
    assert_eq!(system.count("select count(*) from refunds join payments on payments.id = refunds.payment_id where payments.status = 'voided' and refunds.amount = payments.amount").await, 1);
    assert_eq!(system.count("select count(*) from tickets").await, 0);
    // The end came before the payment.
    let (late, user) = system.reserved(&sale, &[1]).await;
    let ended = "update reservations set end_time = now(), booking_time = booking_time - interval '1 hour', expiry_time = now() where id::text = $1";
    sqlx::query(ended).bind(&late).execute(&system.app.db).await.unwrap();
    let refused = system.confirm(&late, user, None, 409).await;
    assert_eq!(refused["code"], "session_over", "{refused}");
    assert!(refused["detail"].as_str().unwrap().contains("Nothing was charged"), "{refused}");
    assert_eq!(system.count("select count(*) from payments").await, 1);
    system.finish().await;
}

#[tokio::test]
async fn a_ticket_can_be_given_back_until_its_session_begins() {
    let system = System::start_behind(Login::new()).await;
    let sale = system.sale(3).await;
    let (id, user) = system.reserved(&sale, &[0, 1, 2]).await;
    let paid = system.confirm(&id, user, None, 200).await;
    let ticket = |n: usize| text_of(&paid["tickets"][n], "id");
    system.refund(&ticket(0), user, 200).await;
    for (begins_in, ends_in) in [(-60, 60), (-120, -60)] {
        move_to(&system, &sale, begins_in, ends_in).await;
        assert_eq!(system.refund(&ticket(1), user, 409).await["code"], "refund_closed");
    }
    assert_eq!(system.refund(&ticket(0), user, 200).await["status"], "refunded", "a repeat gets the same answer");
    let by_admin = async |body: Option<Value>, expected: u16| {
        let request = system.http.post(format!("{}/api/v1/tickets/{}/refund", system.booking_base, ticket(1)));
        let request = body.iter().fold(request, |request, body| request.json(body));
        answer(system.by(Uuid::now_v7(), &["admin"], request).send().await.unwrap(), expected).await
    };
    assert_eq!(by_admin(None, 422).await["errors"][0]["pointer"], "/reason");
    assert_eq!(by_admin(Some(json!({ "reason": "The lights failed" })), 200).await["status"], "refunded");
    // A show that is moved to a later day can be given back again.
    move_to(&system, &sale, 60, 120).await;
    system.refund(&ticket(2), user, 200).await;
    system.finish().await;
}

#[tokio::test]
async fn tickets_say_their_section_and_a_wrong_one_is_refused() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    sqlx::query("update seats set section = 'Balcony' where seat_number = '1'")
        .execute(&system.event_db)
        .await
        .unwrap();
    let user = Uuid::now_v7();
    let mut order = sale.order(&[0]);
    let reserve = async |order: &Value, expected: u16| {
        answer(system.call(Method::POST, "/api/v1/reservations", user, Some(order)).await, expected).await
    };
    order["seats"][0]["section"] = json!("Stalls");
    let refused = reserve(&order, 422).await;
    let fault = json!({ "pointer": "/seats/0/section", "detail": "this seat has section \"Balcony\"" });
    assert_eq!(refused["errors"], json!([fault]));
    order["seats"][0]["section"] = json!("Balcony");
    let held = reserve(&order, 201).await;
    assert_eq!(held["items"][0]["section"], "Balcony");
    let id = text_of(&held, "id");
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["items"], held["items"]);
    let paid = system.confirm(&id, user, None, 200).await;
    assert_eq!(paid["tickets"][0]["section"], "Balcony");
    let ticket = text_of(&paid["tickets"][0], "id");
    assert_eq!(system.get(&format!("/api/v1/tickets/{ticket}"), user, 200).await["section"], "Balcony");
    let mut order = sale.order(&[1]);
    order["seats"][0]["section"] = json!("Balcony");
    assert_eq!(reserve(&order, 422).await["errors"][0]["detail"], "this seat has no section");
    order["seats"][0]["section"] = Value::Null;
    assert_eq!(reserve(&order, 201).await["items"][0]["section"], Value::Null);
    system.finish().await;
}
