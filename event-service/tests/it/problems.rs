//! Every error is answered with a problem document that names its code.

use std::time::{Duration, Instant};

use insta::{assert_json_snapshot, with_settings};
use reqwest::Response;
use serde_json::{Value, json};
use service_kit::process::lifecycle::Lifecycle;
use service_kit::testing::{server, wait_until};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{IN_FLIGHT_MAX, TestApp};

/// Compares the document with the snapshot `problem_` and `name`. The request's id is replaced, as it differs in each
/// run.
fn assert_problem_snapshot(name: &str, mut problem: Value) {
    problem["instance"] = json!("urn:uuid:[request id]");
    with_settings!({ sort_maps => true, omit_expression => true, prepend_module_to_snapshot => false }, {
        assert_json_snapshot!(format!("problem_{name}"), problem);
    });
}

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
async fn every_kind_of_bad_request_is_answered_with_a_problem_document() {
    let app = TestApp::spawn().await;
    let organizers = format!("{}/api/v1/organizers", app.base);
    let json_body =
        |body: &'static str| app.http.post(&organizers).header("content-type", "application/json").body(body);
    let large = json!({ "name": "x".repeat(300_000) });
    let cases = [
        ("malformed_json", 400, json_body("{\"name\":")),
        ("malformed_json", 400, json_body("")),
        ("unsupported_media_type", 415, app.http.post(&organizers).body("name=x")),
        ("validation_failed", 422, json_body("[]")),
        ("body_too_large", 413, app.http.post(&organizers).json(&large)),
        ("validation_failed", 422, app.http.get(format!("{organizers}/not-a-uuid"))),
        ("not_found", 404, app.http.get(format!("{}/nowhere", app.base))),
        ("method_not_allowed", 405, app.http.delete(&organizers)),
    ];
    for (number, (code, status, request)) in cases.into_iter().enumerate() {
        let problem = problem(request.send().await.unwrap(), status, code).await;
        assert_problem_snapshot(&format!("bad_request_{number}_{code}"), problem);
    }
}

#[tokio::test]
async fn all_errors_of_a_body_are_named_at_once() {
    let app = TestApp::spawn().await;
    let body = json!({ "event_id": "x", "base_price": -1, "currency": "usd", "start_time": "tomorrow" });
    let response = app.http.post(format!("{}/api/v1/sessions", app.base)).json(&body).send().await.unwrap();
    let problem = problem(response, 422, "validation_failed").await;
    let mut pointers: Vec<_> =
        problem["errors"].as_array().unwrap().iter().map(|error| error["pointer"].as_str().unwrap()).collect();
    pointers.sort_unstable();
    pointers.dedup();
    assert_eq!(pointers, ["/base_price", "/currency", "/end_time", "/event_id", "/hall_id", "/start_time"]);
    assert_problem_snapshot("all_errors_of_a_body", problem);
}

#[tokio::test]
async fn a_request_id_of_the_client_is_returned() {
    let app = TestApp::spawn().await;
    let response =
        app.http.get(format!("{}/health/live", app.base)).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
}

#[tokio::test]
async fn the_health_report_names_every_dependency() {
    let app = TestApp::spawn().await;
    wait_until("the consumer is connected", Duration::from_secs(10), async || {
        app.get("/health", 200).await["status"] == "healthy"
    })
    .await;
    let report = app.get("/health", 200).await;
    assert_eq!(report["checks"], json!({ "database": "up", "rabbitmq": "up" }));
    app.get("/health/ready", 200).await;
}

/// An unreachable database is answered with a retry time. A broken one is a bug, and its answer reveals no internals.
#[tokio::test]
async fn an_unreachable_database_and_a_broken_one_have_different_codes() {
    let app = TestApp::spawn().await;
    let organizers = format!("{}/api/v1/organizers", app.base);
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&app.db).await.unwrap();
    let admin = PgPool::connect(&server("TEST_POSTGRES_URL")).await.unwrap();
    let run = async |sql: String| sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&admin).await.unwrap();
    run(format!("alter database {name} allow_connections false")).await;
    run(format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")).await;
    let absent = app.http.get(&organizers).send().await.unwrap();
    assert!(absent.headers().contains_key("retry-after"));
    assert_problem_snapshot("database_unavailable", problem(absent, 503, "database_unavailable").await);
    assert_eq!(app.get("/health/ready", 503).await["status"], "unhealthy");
    run(format!("alter database {name} allow_connections true")).await;
    wait_until("the service is connected to the database again", Duration::from_secs(10), async || {
        app.http.get(&organizers).send().await.unwrap().status() == 200
    })
    .await;

    sqlx::query("alter table organizers rename to gone").execute(&app.db).await.unwrap();
    let broken = problem(app.http.get(&organizers).send().await.unwrap(), 500, "internal_error").await;
    for secret in ["organizers\"", "select", "relation", "postgres"] {
        assert!(!broken.to_string().contains(secret), "{broken} reveals {secret}");
    }
    assert_problem_snapshot("internal_error", broken);
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
    assert_problem_snapshot("bad_request", body);
}

/// A lock holds the call up for longer than its caller waits. A public call can't set a deadline, so the limit on waits
/// for locks ends it.
#[tokio::test]
async fn work_for_another_service_ends_at_the_deadline_of_its_caller() {
    let app = TestApp::spawn().await;
    let (session, seats) = app.session(1).await;
    let mut locked = service_kit::postgres::database::begin(&app.db).await.unwrap();
    sqlx::query("select from session_seats for update").execute(&mut *locked).await.unwrap();
    let call = |path: String, body: Value| app.http.post(path).header("x-timeout-ms", "200").json(&body).send();
    let hold = json!({ "reservation_id": uuid::Uuid::now_v7(), "session_seat_ids": seats, "reserved_until": "2031-01-01T00:00:00Z" });
    let begun = Instant::now();
    let reserve = format!("{}/api/internal/sessions/{session}/seats/reserve", app.base);
    let late = problem(call(reserve, hold).await.unwrap(), 503, "deadline_exceeded").await;
    assert_problem_snapshot("deadline_exceeded", late);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let cancel = call(format!("{}/api/v1/sessions/{session}/cancel", app.base), json!({})).await.unwrap();
    problem(cancel, 503, "database_unavailable").await; // After the limit on waits for locks.
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(locked);
    assert_eq!(app.statuses(&session).await, ["available"]);
}

/// Reads of a locked table fill their request class and wait. Further reads are rejected at once; health checks, seat
/// maps and calls of other services are not.
#[tokio::test]
async fn requests_beyond_the_limit_are_rejected_at_once() {
    let app = TestApp::spawn().await;
    let mut locked = service_kit::postgres::database::begin(&app.db).await.unwrap();
    sqlx::query("lock table organizers in access exclusive mode").execute(&mut *locked).await.unwrap();
    let path = format!("{}/api/v1/organizers", app.base);
    let crowd = Lifecycle::new();
    let calls: Vec<_> = (0..IN_FLIGHT_MAX).map(|_| crowd.spawn_work(app.http.get(&path).send())).collect();
    // Reads may have a quarter of the requests in flight.
    let rejected = IN_FLIGHT_MAX - IN_FLIGHT_MAX / 4;
    wait_until("the rejected requests are answered", Duration::from_secs(10), async || {
        calls.iter().filter(|call| call.is_finished()).count() >= rejected
    })
    .await;
    let begun = Instant::now();
    app.get("/health/live", 200).await;
    app.get("/api/internal/health", 200).await;
    app.get(&format!("/api/v1/sessions/{}/seat-map", uuid::Uuid::now_v7()), 404).await;
    // A call that waited for the locked table would take as long as a statement may.
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    drop(locked);
    let (mut overloaded, mut last) = (0, None);
    for call in calls {
        let answer = call.await.unwrap().unwrap();
        if answer.status() == 503 && answer.headers()["retry-after"] == "1" {
            let body: Value = answer.json().await.unwrap();
            overloaded += usize::from(body["code"] == "overloaded");
            last = Some(body);
        }
    }
    assert!((rejected - 20..=rejected).contains(&overloaded), "{overloaded} were rejected");
    assert_problem_snapshot("overloaded", last.unwrap());
    app.get("/api/v1/organizers", 200).await;
}
