//! Whatever goes wrong, the answer is a problem document that names the fault.

use std::time::{Duration, Instant};

use reqwest::Response;
use serde_json::{Value, json};
use service_kit::lifecycle::Lifecycle;
use service_kit::testing::{server, wait_until};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{IN_FLIGHT_MAX, TestApp};

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
    wait_until("the consumer is up", Duration::from_secs(10), async || {
        app.get("/health", 200).await["status"] == "healthy"
    })
    .await;
    let report = app.get("/health", 200).await;
    assert_eq!(report["checks"], json!({ "database": "up", "rabbitmq": "up" }));
    app.get("/health/ready", 200).await;
}

/// What only we can mend says nothing of how we work, and what passes by says when to come again.
#[tokio::test]
async fn a_broken_or_absent_database_is_told_from_each_other_and_tells_nothing() {
    let app = TestApp::spawn().await;
    let organizers = format!("{}/api/v1/organizers", app.base);
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&app.db).await.unwrap();
    let admin = PgPool::connect(&server("TEST_POSTGRES_URL")).await.unwrap();
    let run = async |sql: String| sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&admin).await.unwrap();
    run(format!("alter database {name} allow_connections false")).await;
    run(format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")).await;
    let absent = app.http.get(&organizers).send().await.unwrap();
    assert!(absent.headers().contains_key("retry-after"));
    problem(absent, 503, "database_unavailable").await;
    assert_eq!(app.get("/health/ready", 503).await["status"], "unhealthy");
    run(format!("alter database {name} allow_connections true")).await;
    wait_until("the database is used again", Duration::from_secs(10), async || {
        app.http.get(&organizers).send().await.unwrap().status() == 200
    })
    .await;

    sqlx::query("alter table organizers rename to gone").execute(&app.db).await.unwrap();
    let broken = problem(app.http.get(&organizers).send().await.unwrap(), 500, "internal_error").await;
    for secret in ["organizers\"", "select", "relation", "postgres"] {
        assert!(!broken.to_string().contains(secret), "{broken} tells of {secret}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_is_a_bad_request() {
    let app = TestApp::spawn().await;
    let mut connection = TcpStream::connect(app.base.trim_start_matches("http://")).await.unwrap();
    let request = "POST /api/v1/organizers HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{\"na\r\nnonsense\r\n";
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let body: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body["code"], "bad_request");
}

/// A lock keeps the call waiting longer than its caller does. Other callers can't have work cut off.
#[tokio::test]
async fn work_for_another_service_ends_when_that_has_stopped_waiting() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let mut locked = service_kit::database::begin(&app.db).await.unwrap();
    sqlx::query("select from session_seats for update").execute(&mut *locked).await.unwrap();
    let call = |path: String, body: Value| app.http.post(path).header("x-timeout-ms", "200").json(&body).send();
    let hold = json!({ "reservation_id": uuid::Uuid::now_v7(), "session_seat_ids": seats, "reserved_until": "2031-01-01T00:00:00Z" });
    let begun = Instant::now();
    let reserve = format!("{}/api/internal/sessions/{session}/seats/reserve", app.base);
    problem(call(reserve, hold).await.unwrap(), 503, "deadline_exceeded").await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let cancel = call(format!("{}/api/v1/sessions/{session}/cancel", app.base), json!({})).await.unwrap();
    problem(cancel, 503, "database_unavailable").await; // The lock's own time limit.
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(locked);
    assert_eq!(app.statuses(&session).await, ["available"]);
}

/// Readers of a table that is locked fill their lane, and wait. The others are turned away at once; health checks and other services
/// are not.
#[tokio::test]
async fn requests_beyond_the_limit_are_turned_away_at_once() {
    let app = TestApp::spawn().await;
    let mut locked = service_kit::database::begin(&app.db).await.unwrap();
    sqlx::query("lock table organizers in access exclusive mode").execute(&mut *locked).await.unwrap();
    let path = format!("{}/api/v1/organizers", app.base);
    let crowd = Lifecycle::new();
    let calls: Vec<_> = (0..IN_FLIGHT_MAX).map(|_| crowd.spawn_work(app.http.get(&path).send())).collect();
    // A quarter of the places is the readers'.
    let turned_away = IN_FLIGHT_MAX - IN_FLIGHT_MAX / 4;
    wait_until("those without a place have their answer", Duration::from_secs(10), async || {
        calls.iter().filter(|call| call.is_finished()).count() >= turned_away
    })
    .await;
    let begun = Instant::now();
    app.get("/health/live", 200).await;
    app.get("/api/internal/health", 200).await;
    app.get(&format!("/api/v1/sessions/{}/seat-map", uuid::Uuid::now_v7()), 404).await;
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    drop(locked);
    let mut overloaded = 0;
    for call in calls {
        let answer = call.await.unwrap().unwrap();
        if answer.status() == 503 && answer.headers()["retry-after"] == "1" {
            let body: Value = answer.json().await.unwrap();
            overloaded += usize::from(body["code"] == "overloaded");
        }
    }
    assert!((turned_away - 20..=turned_away).contains(&overloaded), "{overloaded} were turned away");
    app.get("/api/v1/organizers", 200).await;
}
