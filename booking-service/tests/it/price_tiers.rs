//! Price tiers by their HTTP interface.

use reqwest::Method;
use serde_json::json;
use uuid::Uuid;

use crate::support::{System, answer};

#[tokio::test]
async fn a_price_tier_can_be_changed_always_and_deleted_until_it_is_used() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let user = Uuid::now_v7();
    let path = format!("/api/v1/price-tiers/{}", sale.tier);
    let change = async |body: serde_json::Value, expected: u16| {
        answer(system.call(Method::PATCH, &path, user, Some(&body)).await, expected).await
    };
    assert_eq!(change(json!({ "multiplier": 1.5, "description": "Better" }), 200).await["base_multiplier"], 1.5);
    assert_eq!(change(json!({ "base_multiplier": 2, "multiplier": 3 }), 200).await["base_multiplier"], 2.0);
    let bad = change(json!({ "name": " ", "base_multiplier": 0 }), 422).await;
    assert_eq!(bad["errors"].as_array().unwrap().len(), 2, "{bad}");
    assert_eq!(change(json!({ "base_multiplier": null }), 422).await["errors"][0]["pointer"], "/base_multiplier");
    assert_eq!(system.reserve(&sale, user, &[0], 201).await["total_amount"], 200.0);
    let stale =
        system.http.delete(format!("{}{path}", system.booking_base)).header("if-match", "\"1\"").send().await.unwrap();
    assert_eq!(answer(stale, 412).await["code"], "precondition_failed");
    assert_eq!(answer(system.call(Method::DELETE, &path, user, None).await, 409).await["code"], "resource_in_use");
    let unused = format!("/api/v1/admin/price-tiers/{}", system.tier(json!(3)).await);
    answer(system.call(Method::DELETE, &unused, user, None).await, 204).await;
    assert_eq!(
        answer(system.call(Method::DELETE, &unused, user, None).await, 404).await["code"],
        "price_tier_not_found"
    );
    system.finish().await;
}
