//! What clients send is what they meant: misspelt members and parameters are refused and named.

use booking_service::app;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::testing::{assert_bodies_are_strict, assert_unknown_parameters_are_refused};
use uuid::Uuid;

use crate::support::{System, answer, text_of};

/// The form of a notice is the payment provider's.
const FOREIGN: &[&str] = &["/api/v1/payments/webhook"];

#[tokio::test]
async fn every_body_refuses_members_that_it_does_not_know() {
    assert_bodies_are_strict(&app::skeleton().unwrap().1, FOREIGN);
}

#[tokio::test]
async fn every_operation_refuses_parameters_that_it_does_not_know() {
    let system = System::start().await;
    let call = async |method: &str, path: String| {
        let response = system.call(method.parse().unwrap(), &path, Uuid::now_v7(), None).await;
        (response.status().as_u16(), response.json().await.unwrap_or_default())
    };
    assert_unknown_parameters_are_refused(&app::skeleton().unwrap().1, call).await;
    system.finish().await;
}

#[tokio::test]
async fn a_misspelt_member_is_named_and_nothing_is_held() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let user = Uuid::now_v7();
    let mut order = sale.order(&[0]);
    order["seats"][0]["row_nubmer"] = json!("1");
    let refused = answer(system.call(Method::POST, "/api/v1/reservations", user, Some(&order)).await, 422).await;
    let fault =
        json!({ "pointer": "/seats/0/row_nubmer", "detail": "there is no such member; did you mean `row_number`?" });
    assert_eq!(refused["errors"], json!([fault]));
    assert_eq!(system.statuses(&sale.session).await, ["available"]);
    let (id, user) = system.reserved(&sale, &[0]).await;
    let refused = system.confirm(&id, user, Some(json!({ "paymentid": "pay_demo" })), 422).await;
    assert_eq!(refused["errors"][0]["detail"], "there is no such member; did you mean `payment_id`?");
    assert_eq!(system.get(&format!("/api/v1/reservations/{id}"), user, 200).await["status"], "active");
    system.finish().await;
}

#[tokio::test]
async fn a_price_tier_that_was_read_can_be_sent_back() {
    let system = System::start().await;
    let path = format!("/api/v1/price-tiers/{}", system.tier(json!(1.5)).await);
    let read = system.get(&path, Uuid::now_v7(), 200).await;
    let edited = answer(system.call(Method::PATCH, &path, Uuid::now_v7(), Some(&read)).await, 200).await;
    let without_time = |mut tier: Value| {
        tier.as_object_mut().unwrap().remove("updated_at");
        tier
    };
    assert_eq!(text_of(&edited, "id"), text_of(&read, "id"));
    assert_eq!(without_time(edited), without_time(read));
    let refused = system.call(Method::PATCH, &path, Uuid::now_v7(), Some(&json!({ "discription": "x" }))).await;
    assert_eq!(answer(refused, 422).await["errors"][0]["pointer"], "/discription");
    system.finish().await;
}
