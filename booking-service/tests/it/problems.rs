//! Every error is answered with a problem document that names its code.

use insta::{assert_json_snapshot, with_settings};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{System, answer};

/// Compares the document with the snapshot `problem_` and `name`. The request's id is replaced, as it differs in each
/// run.
fn assert_problem_snapshot(name: &str, mut problem: Value) {
    problem["instance"] = json!("urn:uuid:[request id]");
    with_settings!({ sort_maps => true, omit_expression => true, prepend_module_to_snapshot => false }, {
        assert_json_snapshot!(format!("problem_{name}"), problem);
    });
}

#[tokio::test]
async fn every_kind_of_bad_request_is_answered_with_a_problem_document() {
    let system = System::start().await;
    let path = format!("{}/api/v1/reservations", system.booking_base);
    let post = || system.http.post(&path).header("x-user-id", Uuid::now_v7().to_string());
    let json_body = |body: String| post().header("content-type", "application/json").body(body).send();
    let cases = [
        (json_body("{".into()).await, 400, "malformed_json"),
        (post().body("seats").send().await, 415, "unsupported_media_type"),
        (json_body(format!("{{\"x\":\"{}\"}}", "y".repeat(300_000))).await, 413, "body_too_large"),
        (json_body("{\"seats\":7}".into()).await, 422, "validation_failed"),
        (json_body("{}".into()).await, 422, "validation_failed"),
        (system.http.put(&path).send().await, 405, "method_not_allowed"),
        (system.http.get(format!("{path}/x/y/z")).send().await, 404, "not_found"),
        (
            system.http.get(format!("{path}/x")).header("x-user-id", Uuid::now_v7().to_string()).send().await,
            422,
            "validation_failed",
        ),
        (system.http.get(&path).header("x-user-id", "me").send().await, 401, "unauthenticated"),
    ];
    for (number, (response, status, code)) in cases.into_iter().enumerate() {
        let response = response.unwrap();
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        let problem = answer(response, status).await;
        assert_eq!(problem["code"], code);
        assert_problem_snapshot(&format!("bad_request_{number}_{code}"), problem);
    }
    system.finish().await;
}

#[tokio::test]
async fn a_price_tier_accepts_both_names_of_its_factor_on_both_paths() {
    let system = System::start().await;
    for (path, name) in [("/api/v1/admin/price-tiers", "base_multiplier"), ("/api/v1/price-tiers", "multiplier")] {
        let body = json!({ "name": "VIP", name: 2.5, "description": "Front rows" });
        let response = system.call(reqwest::Method::POST, path, Uuid::now_v7(), Some(&body)).await;
        let location = response.headers()["location"].to_str().unwrap().to_owned();
        let made: Value = answer(response, 201).await;
        assert_eq!(made["base_multiplier"], 2.5);
        assert_eq!(system.get(&location, Uuid::now_v7(), 200).await, made);
    }
    assert_eq!(system.get("/api/v1/price-tiers", Uuid::now_v7(), 200).await["items"].as_array().unwrap().len(), 2);
    for bad in [
        json!({ "name": "X" }),
        json!({ "name": "X", "multiplier": 0 }),
        json!({ "name": "", "multiplier": 1 }),
        json!({ "name": "X", "multiplier": "a" }),
    ] {
        let response =
            system.call(reqwest::Method::POST, "/api/v1/admin/price-tiers", Uuid::now_v7(), Some(&bad)).await;
        assert!(!answer(response, 422).await["errors"].as_array().unwrap().is_empty(), "{bad}");
    }
    system.finish().await;
}

#[tokio::test]
async fn the_health_report_names_every_dependency() {
    let system = System::start().await;
    let report = system.get("/health", Uuid::now_v7(), 200).await;
    assert_eq!(
        report["checks"],
        json!({ "database": "up", "event_service": "up", "event_service_circuit": "up", "rabbitmq": "up", "redis": "up" })
    );
    system.finish().await;
}
