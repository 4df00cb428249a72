//! `Idempotency-Key`: a repeated request has its effect once and gets the same answer.

use booking_service::idempotency::forget_old;
use futures::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use service_kit::postgres::database::begin;
use uuid::Uuid;

use crate::support::{Sale, System, answer, text_of};

async fn post(system: &System, path: &str, user: Uuid, key: &str, body: &Value) -> Response {
    let request = system.http.request(Method::POST, format!("{}{path}", system.booking_base));
    request.header("x-user-id", user.to_string()).header("idempotency-key", key).json(body).send().await.unwrap()
}

async fn reserve(system: &System, sale: &Sale, user: Uuid, key: &str, seats: &[usize]) -> Response {
    post(system, "/api/v1/reservations", user, key, &sale.order(seats)).await
}

fn is_replayed(response: &Response) -> bool {
    response.headers().get("idempotency-replayed").is_some_and(|value| value == "true")
}

#[tokio::test]
async fn a_repeated_reservation_is_the_same_one() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let user = Uuid::now_v7();
    let first = reserve(&system, &sale, user, "key-1", &[0]).await;
    assert!(!is_replayed(&first));
    let location = first.headers()["location"].clone();
    let made = answer(first, 201).await;
    // The standard quotes keys, and many clients do not. Both forms mean the same key.
    let again = reserve(&system, &sale, user, "\"key-1\"", &[0]).await;
    assert!(is_replayed(&again));
    assert_eq!(again.headers()["location"], location);
    assert_eq!(answer(again, 201).await, made);
    assert_eq!(answer(reserve(&system, &sale, user, "key-1", &[1]).await, 422).await["code"], "idempotency_key_reused");
    let other = reserve(&system, &sale, Uuid::now_v7(), "key-1", &[1]).await;
    assert!(!is_replayed(&other), "two users share a key");
    answer(other, 201).await;
    assert_eq!(system.count("select count(*) from reservations").await, 2);
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_identical_requests_at_once_make_one_reservation() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let user = Uuid::now_v7();
    let answers = join_all((0..1000).map(|_| reserve(&system, &sale, user, "twin", &[0]))).await;
    let mut ids = Vec::new();
    for response in answers {
        match response.status().as_u16() {
            201 => ids.push(text_of(&answer(response, 201).await, "id")),
            // A slow machine turns some of a thousand away.
            503 => {}
            _ => assert_eq!(answer(response, 409).await["code"], "idempotency_key_in_flight"),
        }
    }
    ids.dedup();
    assert_eq!((ids.len(), system.count("select count(*) from reservations").await), (1, 1));
    system.finish().await;
}

#[tokio::test]
async fn a_refusal_is_stored_under_its_key_and_an_outage_is_not() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let user = Uuid::now_v7();
    let (blocking, owner) = system.reserved(&sale, &[0]).await;
    assert_eq!(answer(reserve(&system, &sale, user, "late", &[0]).await, 409).await["code"], "seat_unavailable");
    system.cancel(&blocking, owner, 200).await;
    let again = reserve(&system, &sale, user, "late", &[0]).await;
    assert!(is_replayed(&again));
    assert_eq!(answer(again, 409).await["code"], "seat_unavailable");

    system.to_event_service.cut();
    answer(reserve(&system, &sale, user, "outage", &[1]).await, 503).await;
    system.to_event_service.heal();
    answer(reserve(&system, &sale, user, "outage", &[1]).await, 201).await;
    for bad in ["", &"k".repeat(256)] {
        assert_eq!(
            answer(reserve(&system, &sale, user, bad, &[0]).await, 422).await["errors"][0]["parameter"],
            "Idempotency-Key"
        );
    }
    system.finish().await;
}

/// The attempt died between the hold and the reservation. The next request under the key takes over once the key's lock
/// has run out.
#[tokio::test]
async fn the_next_request_takes_over_a_dead_attempt() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let user = Uuid::now_v7();
    answer(reserve(&system, &sale, user, "dead", &[0]).await, 201).await;
    // As the crash would have left it: the hold stands, the key is claimed, the reservation was never written.
    for sql in [
        "delete from reservation_items",
        "delete from reservations",
        "update idempotency_keys set status = null, answer = null",
    ] {
        sqlx::query(sql).execute(&system.app.db).await.unwrap();
    }
    assert_eq!(
        answer(reserve(&system, &sale, user, "dead", &[0]).await, 409).await["code"],
        "idempotency_key_in_flight"
    );
    sqlx::query("update idempotency_keys set locked_until = now()").execute(&system.app.db).await.unwrap();
    answer(reserve(&system, &sale, user, "dead", &[0]).await, 201).await;
    system.finish().await;
}

#[tokio::test]
async fn a_repeated_payment_gets_the_same_answer_even_when_it_was_declined() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let path = format!("/api/v1/reservations/{id}/confirm");
    let declined = json!({ "payment_id": "pay_decline" });
    answer(post(&system, &path, user, "try-1", &declined).await, 402).await;
    let again = post(&system, &path, user, "try-1", &declined).await;
    assert!(is_replayed(&again));
    answer(again, 402).await;
    assert_eq!(system.count("select count(*) from payments").await, 1, "a repeated payment made a second payment");
    assert_eq!(
        answer(post(&system, &path, user, "try-1", &json!({})).await, 422).await["code"],
        "idempotency_key_reused"
    );
    let paid = answer(post(&system, &path, user, "try-2", &json!({})).await, 200).await;
    let again = post(&system, &path, user, "try-2", &json!({})).await;
    assert!(is_replayed(&again));
    assert_eq!(answer(again, 200).await, paid);
    system.finish().await;
}

#[tokio::test]
async fn keys_are_forgotten_after_a_day() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for (key, seat) in [("old", 0), ("new", 1)] {
        answer(reserve(&system, &sale, Uuid::now_v7(), key, &[seat]).await, 201).await;
    }
    sqlx::query("update idempotency_keys set created_at = now() - interval '25 hours' where key = 'old'")
        .execute(&system.app.db)
        .await
        .unwrap();
    assert_eq!(forget_old(&system.app.db).await.unwrap(), 1);
    assert_eq!(forget_old(&system.app.db).await.unwrap(), 0);
    system.finish().await;
}

/// A buyer that comes too early is told when the sale starts, and may then repeat the request under the same key.
#[tokio::test]
async fn a_key_used_before_the_sale_buys_when_the_sale_opens() {
    let system = System::start().await;
    let (sale, user) = (system.sale(1).await, Uuid::now_v7());
    let opens = async |when: &'static str| sqlx::query(when).execute(&system.event_db).await.unwrap();
    opens("update sessions set sales_start = now() + interval '1 hour'").await;
    assert_eq!(answer(reserve(&system, &sale, user, "early", &[0]).await, 409).await["code"], "sales_not_started");
    opens("update sessions set sales_start = now() - interval '1 hour'").await;
    answer(reserve(&system, &sale, user, "early", &[0]).await, 201).await;
    system.finish().await;
}

/// Another tab's payment is declined at the moment when this request asks for the reservation. This request has not
/// tried to pay. It must not be told that it was declined, neither now nor when its key is repeated.
#[tokio::test]
async fn a_request_that_meets_a_declined_payment_is_not_declined_itself() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let paying = "update reservations set status = 'confirming', confirming_until = now() + interval '1 minute'";
    sqlx::query(paying).execute(&system.app.db).await.unwrap();
    let mut declined = begin(&system.app.db).await.unwrap();
    let given_back = "update reservations set status = 'active', confirming_until = null";
    sqlx::query(given_back).execute(&mut *declined).await.unwrap();
    let path = format!("/api/v1/reservations/{id}/confirm");
    let confirm = async || post(&system, &path, user, "mine", &json!({ "payment_id": "pay_good" })).await;
    let commit = async {
        system.wait_for_blocked_statement().await;
        declined.commit().await.unwrap();
    };
    let (met, ()) = tokio::join!(confirm(), commit);
    assert_eq!(answer(met, 409).await["code"], "confirmation_in_progress");
    assert_eq!(answer(confirm().await, 200).await["status"], "confirmed");
    system.finish().await;
}
