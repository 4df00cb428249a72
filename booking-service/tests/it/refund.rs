//! Refunds of tickets.

use reqwest::Method;
use serde_json::json;
use uuid::Uuid;

use crate::support::{System, text_of};

#[tokio::test]
async fn a_refund_pays_once_and_frees_the_seat() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let (id, user) = system.reserved(&sale, &[0, 1]).await;
    let paid = system.confirm(&id, user, None, 200).await;
    system.seats_become(&sale, &["sold", "sold"]).await;
    let ticket = text_of(&paid["tickets"][0], "id");
    assert_eq!(system.refund(&ticket, Uuid::now_v7(), 404).await["code"], "ticket_not_found");
    let first = system.refund(&ticket, user, 200).await;
    assert_eq!(first["status"], "refunded");
    assert_eq!(system.refund(&ticket, user, 200).await, first);
    system.seats_become(&sale, &["available", "sold"]).await;
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "confirmed");
    assert_eq!(system.count("select count(*) from mock_provider_refunds").await, 1);

    let (again, buyer) = system.reserved(&sale, &[0]).await;
    system.confirm(&again, buyer, None, 200).await;
    system.seats_become(&sale, &["sold", "sold"]).await;
    system.finish().await;
}

/// Two refunds run at once. The second must notice that it refunds the last ticket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_whose_tickets_are_all_refunded_is_refunded() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    for _ in 0..10 {
        let (id, user) = system.reserved(&sale, &[0, 1]).await;
        let paid = system.confirm(&id, user, None, 200).await;
        let path = |n: usize| format!("/api/v1/tickets/{}/refund", text_of(&paid["tickets"][n], "id"));
        let (first, second) = (path(0), path(1));
        let (first, second) =
            tokio::join!(system.call(Method::POST, &first, user, None), system.call(Method::POST, &second, user, None));
        assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 200));
        let shown = system.get(&format!("/api/v1/reservations/{id}"), user, 200).await;
        assert_eq!(shown["status"], "refunded");
        assert_eq!(system.confirm(&id, user, None, 409).await["code"], "reservation_refunded");
        system.seats_become(&sale, &["available", "available"]).await;
    }
    system.finish().await;
}

#[tokio::test]
async fn a_used_ticket_is_not_refunded() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let (id, user) = system.reserved(&sale, &[0]).await;
    let paid = system.confirm(&id, user, None, 200).await;
    sqlx::query("update tickets set status = 'used'").execute(&system.app.db).await.unwrap();
    let ticket = text_of(&paid["tickets"][0], "id");
    assert_eq!(system.refund(&ticket, user, 409).await["code"], "ticket_used");
    assert_eq!(system.get(&format!("/api/v1/tickets/{ticket}"), user, 200).await["is_used"], json!(true));
    system.finish().await;
}
