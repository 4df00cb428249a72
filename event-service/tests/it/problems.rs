//! Whatever goes wrong, the answer is a problem document that names the fault.

use reqwest::Response;
use serde_json::{Value, json};

use crate::support::TestApp;

async fn problem(response: Response, status: u16, code: &str) -> Value {
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(response.status().as_u16(), status);
    let problem: Value = response.json().await.unwrap();
    assert_eq!(
        (problem["code"].as_str(), problem["status"].as_u64()),
        (Some(code), Some(u64::from(status))),
        "{problem}"
    );
    assert_eq!(problem["instance"], format!("urn:uuid:{request_id}"));
    for member in ["type", "title", "detail"] {
        assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "{member} is missing in {problem}");
    }
    problem
}

#[tokio::test]
async fn every_kind_of_bad_request_is_a_problem_document() {
    let app = TestApp::spawn().await;
    let organizers = format!("{}/api/v1/organizers", app.base);
    let json_body =
        |body: &'static str| app.http.post(&organizers).header("content-type", "application/json").body(body);

    problem(json_body("{\"name\":").send().await.unwrap(), 400, "malformed_json").await;
    problem(json_body("").send().await.unwrap(), 400, "malformed_json").await;
    problem(app.http.post(&organizers).body("name=x").send().await.unwrap(), 415, "unsupported_media_type").await;
    problem(json_body("[]").send().await.unwrap(), 422, "validation_failed").await;
    let large = app.http.post(&organizers).json(&json!({ "name": "x".repeat(300_000) })).send().await.unwrap();
    problem(large, 413, "body_too_large").await;
    problem(app.http.get(format!("{organizers}/not-a-uuid")).send().await.unwrap(), 422, "validation_failed").await;
    problem(app.http.get(format!("{}/nowhere", app.base)).send().await.unwrap(), 404, "not_found").await;
    problem(app.http.delete(&organizers).send().await.unwrap(), 405, "method_not_allowed").await;
}

#[tokio::test]
async fn all_faults_of_a_body_are_named_at_once() {
    let app = TestApp::spawn().await;
    let body = json!({ "event_id": "x", "base_price": -1, "currency": "usd", "start_time": "tomorrow" });
    let response = app.http.post(format!("{}/api/v1/sessions", app.base)).json(&body).send().await.unwrap();
    let problem = problem(response, 422, "validation_failed").await;
    let mut pointers: Vec<_> =
        problem["errors"].as_array().unwrap().iter().map(|error| error["pointer"].as_str().unwrap()).collect();
    pointers.sort_unstable();
    pointers.dedup();
    assert_eq!(pointers, ["/base_price", "/currency", "/end_time", "/event_id", "/hall_id", "/start_time"]);
}

#[tokio::test]
async fn a_request_id_is_taken_over_and_returned() {
    let app = TestApp::spawn().await;
    let response =
        app.http.get(format!("{}/health/live", app.base)).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
}

#[tokio::test]
async fn health_tells_of_every_part() {
    let app = TestApp::spawn().await;
    service_kit::testing::wait_until("the consumer is up", std::time::Duration::from_secs(10), async || {
        app.get("/health", 200).await["status"] == "healthy"
    })
    .await;
    let report = app.get("/health", 200).await;
    assert_eq!(report["checks"], json!({ "database": "up", "rabbitmq": "up" }));
    app.get("/health/ready", 200).await;
}
