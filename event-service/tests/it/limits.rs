//! Limits on connections, request heads, bodies and call rates, in one replica and across replicas. Also the headers
//! that tell browsers what they may do.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use service_kit::admit::limits::{Limits, Rate, Rates};
use service_kit::http::client_address::{Proxies, ProxyHeader};
use service_kit::process::settings::Secret;
use service_kit::testing::wires::ChaosProxy;
use service_kit::testing::{server, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::support::{IN_FLIGHT_MAX, TestApp};

/// Longer than every limit that these tests set.
const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);

fn hasty() -> Limits {
    Limits { header_time_max: SHORT, body_time_max: SHORT, idle_time_max: SHORT * 3, ..Limits::default() }
}

async fn connect(app: &TestApp) -> TcpStream {
    TcpStream::connect(app.base.trim_start_matches("http://")).await.unwrap()
}

/// What the service sends until it closes the connection, and how long that took.
async fn until_closed(connection: &mut TcpStream) -> (String, Duration) {
    let (mut said, begun) = (Vec::new(), Instant::now());
    let ended = tokio::time::timeout(LONG, connection.read_to_end(&mut said)).await;
    assert!(ended.is_ok(), "the connection stays open: {}", String::from_utf8_lossy(&said));
    (String::from_utf8_lossy(&said).into_owned(), begun.elapsed())
}

fn code_of(answer: &str) -> Value {
    let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
    serde_json::from_str::<Value>(body).unwrap_or_default()["code"].clone()
}

#[tokio::test]
async fn a_client_that_sends_half_a_head_is_disconnected() {
    let app = TestApp::spawn_limited(hasty()).await;
    let mut connection = connect(&app).await;
    connection.write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-slow:").await.unwrap();
    let (said, took) = until_closed(&mut connection).await;
    assert!(said.is_empty() && took >= SHORT && took < SHORT * 2, "{took:?}: {said}");
}

/// A byte now and then does not keep the connection open.
#[tokio::test]
async fn a_client_that_sends_a_head_byte_by_byte_is_disconnected() {
    let app = TestApp::spawn_limited(hasty()).await;
    let (mut reading, mut writing) = connect(&app).await.into_split();
    let trickle = async {
        while writing.write_all(b"G").await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    };
    let begun = Instant::now();
    let mut said = Vec::new();
    tokio::select! {
        _ = reading.read_to_end(&mut said) => {}
        () = trickle => {}
        () = tokio::time::sleep(LONG) => panic!("the connection stays open"),
    }
    assert!(begun.elapsed() < SHORT * 3, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_in_use_stays_open() {
    let app = TestApp::spawn_limited(hasty()).await;
    let mut connection = connect(&app).await;
    for _ in 0..3 {
        connection.write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 4096];
        let length = connection.read(&mut answer).await.unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 200") && answer[..length].ends_with(b"\r\n\r\n"));
        // Longer than the head limit, shorter than the idle limit.
        tokio::time::sleep(SHORT * 2).await;
    }
    let (_, took) = until_closed(&mut connection).await;
    assert!(took < SHORT * 3, "{took:?}");
}

#[tokio::test]
async fn a_body_that_does_not_arrive_in_time_is_rejected() {
    let app = TestApp::spawn_limited(hasty()).await;
    let head = "POST /api/v1/organizers HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    for rest in ["content-length: 100\r\n\r\n{\"name\":", "transfer-encoding: chunked\r\n\r\n4\r\n{\"na\r\n"] {
        let mut connection = connect(&app).await;
        connection.write_all(format!("{head}{rest}").as_bytes()).await.unwrap();
        let (said, took) = until_closed(&mut connection).await;
        assert!(said.starts_with("HTTP/1.1 408 "), "{said}");
        assert_eq!(code_of(&said), "request_timeout");
        assert!(took >= SHORT && took < SHORT * 3, "{took:?}");
    }
}

/// More clients than the limit on requests in flight stall in the middle of their bodies. Other requests are still
/// served.
#[tokio::test]
async fn stalled_bodies_do_not_count_as_requests_in_flight() {
    let app = TestApp::spawn().await;
    let path = format!("/api/v1/organizers/{}", app.organizer().await);
    let begun_request =
        format!("PATCH {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 16\r\n\r\n{{");
    let mut hanging = Vec::new();
    for _ in 0..=IN_FLIGHT_MAX {
        let mut connection = connect(&app).await;
        connection.write_all(begun_request.as_bytes()).await.unwrap();
        hanging.push(connection);
    }
    app.get(&path, 200).await;
    let edited = app.call(Method::PATCH, &path, Some(&json!({ "name": "New" }))).await;
    assert_eq!(edited.status(), 200);

    // Large bodies are limited while they arrive, so the service accepts only a few at a time.
    let large = begun_request.replace("content-length: 16", "content-length: 200000");
    for _ in 0..70 {
        let mut connection = connect(&app).await;
        connection.write_all(large.as_bytes()).await.unwrap();
        hanging.push(connection);
    }
    wait_until("there are too many large bodies", LONG, async || {
        let body = json!({ "name": "x", "description": "x".repeat(40_000) });
        app.call(Method::PATCH, &path, Some(&body)).await.status() == 503
    })
    .await;
    app.get(&path, 200).await;
    drop(hanging);
}

#[tokio::test]
async fn a_head_that_is_too_large_is_rejected() {
    let app = TestApp::spawn().await;
    let send = async |headers: &str| {
        let mut connection = connect(&app).await;
        let request = format!("GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        until_closed(&mut connection).await.0
    };
    assert!(send(&format!("x-large: {}\r\n", "x".repeat(10_000))).await.starts_with("HTTP/1.1 200 "));
    let refused = send(&format!("x-large: {}\r\n", "x".repeat(20_000))).await;
    assert!(refused.starts_with("HTTP/1.1 431 "), "{refused}");
    assert_eq!(code_of(&refused), "headers_too_large");
    assert!(send(&"x-many: x\r\n".repeat(200)).await.starts_with("HTTP/1.1 431 "));
}

#[tokio::test]
async fn connections_beyond_the_limit_are_rejected() {
    let app = TestApp::spawn_limited(Limits { connections_max: 3, ..Limits::default() }).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut connection = connect(&app).await;
        connection.write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        connection.read_exact(&mut [0; 12]).await.unwrap();
        open.push(connection);
    }
    let (said, _) = until_closed(&mut connect(&app).await).await;
    assert!(said.starts_with("HTTP/1.1 503 "), "{said}");
    drop(open);
}

#[tokio::test]
async fn browsers_are_told_what_they_may_do_with_an_answer() {
    let limits = Limits {
        cors_allowed_origins: vec!["https://shop.example".parse().unwrap()],
        is_https_only: true,
        ..Limits::default()
    };
    let app = TestApp::spawn_limited(limits).await;
    let get = async |path: &str, origin: Option<&str>| {
        let mut request = app.http.get(format!("{}{path}", app.base));
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        request.send().await.unwrap()
    };
    let field = |response: &Response, name: &str| -> String {
        response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
    };
    for path in ["/api/v1/events", "/nowhere", "/docs/", "/health/live"] {
        let answer = get(path, None).await;
        assert_eq!(field(&answer, "x-content-type-options"), "nosniff", "{path}");
        assert_eq!(field(&answer, "referrer-policy"), "no-referrer");
        assert!(field(&answer, "content-security-policy").contains("frame-ancestors 'none'"));
        assert!(field(&answer, "strict-transport-security").starts_with("max-age="));
        assert_eq!(field(&answer, "cache-control"), "", "{path}");
    }
    let personal = app.http.get(format!("{}/api/v1/events", app.base)).header("x-user-id", Uuid::now_v7().to_string());
    assert_eq!(field(&personal.send().await.unwrap(), "cache-control"), "no-store");

    // The Swagger UI page has no inline script, which its policy would forbid.
    let page = get("/docs/", None).await;
    assert!(field(&page, "content-security-policy").contains("script-src 'self';"));
    let page = page.text().await.unwrap();
    assert!(page.contains("<script src=") && !page.contains("<script>"), "{page}");

    let theirs = get("/api/v1/events", Some("https://shop.example")).await;
    assert_eq!(field(&theirs, "access-control-allow-origin"), "https://shop.example");
    assert!(field(&theirs, "access-control-expose-headers").contains("retry-after"));
    assert_eq!(field(&get("/api/v1/events", Some("https://evil.example")).await, "access-control-allow-origin"), "");
}

#[tokio::test]
async fn without_settings_no_other_origin_may_call_and_plain_http_is_allowed() {
    let app = TestApp::spawn().await;
    let answer = app.http.get(format!("{}/api/v1/events", app.base)).header("origin", "https://shop.example").send();
    let answer = answer.await.unwrap();
    for absent in ["access-control-allow-origin", "strict-transport-security"] {
        assert!(!answer.headers().contains_key(absent), "{absent}");
    }
}

/// Low rate limits that replicas share through Redis. Requests come through one trusted proxy, which is this machine.
fn strict(redis_url: String) -> Limits {
    let rate = Rate { per_second: 0.1, burst: 40 };
    Limits {
        rates: Some(Rates { read: rate, hold: rate, confirm: rate, admin: rate, address_factor: 2 }),
        redis_url: Some(Secret::from(redis_url.as_str())),
        proxies: Proxies::new(vec!["127.0.0.0/8".parse().unwrap()], ProxyHeader::XForwardedFor),
        ..Limits::default()
    }
}

/// A client behind the proxy, with an address that no other test uses.
struct Client {
    user: Option<Uuid>,
    address: String,
}

impl Client {
    fn new(user: Option<Uuid>) -> Self {
        let noise = Uuid::now_v7().simple().to_string();
        Self { user, address: format!("2001:{}:{}:{}::1", &noise[20..24], &noise[24..28], &noise[28..]) }
    }

    async fn call(&self, app: &TestApp, forwarded: &str) -> Response {
        let mut request = app.http.get(format!("{}/api/v1/events", app.base)).header("x-forwarded-for", forwarded);
        if let Some(user) = self.user {
            request = request.header("x-user-id", user.to_string());
        }
        request.send().await.unwrap()
    }

    /// How many of `calls` calls pass before the first is rate limited.
    async fn passed(&self, app: &TestApp, calls: usize) -> usize {
        for passed in 0..calls {
            if self.call(app, &self.address).await.status() == 429 {
                return passed;
            }
        }
        calls
    }
}

#[tokio::test]
async fn a_rate_limited_caller_is_told_when_to_retry() {
    let app = TestApp::spawn_limited(strict(server("TEST_REDIS_URL"))).await;
    let client = Client::new(Some(Uuid::now_v7()));
    assert_eq!(client.passed(&app, 100).await, 40);
    let asked_at = Instant::now();
    let refused = client.call(&app, &client.address).await;
    assert!(asked_at.elapsed() >= Duration::from_millis(200), "a rejected caller was answered without a delay");
    let headers = refused.headers().clone();
    assert_eq!(headers["ratelimit-policy"], "\"read\";q=40;w=400");
    let wait: u64 = headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((5..=10).contains(&wait), "{wait}");
    assert_eq!(headers["ratelimit"], format!("\"read\";r=0;t={wait}"));
    let problem: Value = refused.json().await.unwrap();
    assert_eq!((&problem["code"], &problem["retry_after_seconds"]), (&json!("rate_limited"), &json!(wait)));
    app.get("/health/live", 200).await;
    app.get("/api/internal/health", 200).await;
}

/// Each replica lets a burst pass before it reads what the other has counted. From then on they count together.
#[tokio::test]
async fn a_limit_holds_across_two_replicas() {
    let limits = strict(server("TEST_REDIS_URL"));
    let (one, other) = tokio::join!(TestApp::spawn_limited(limits.clone()), TestApp::spawn_limited(limits));
    let client = Client::new(Some(Uuid::now_v7()));
    assert_eq!(client.passed(&one, 100).await, 40);
    // Leaves the first replica time to report to Redis, and the second time to read it between two calls.
    let mut passed = 0;
    while client.call(&other, &client.address).await.status() != 429 {
        passed += 1;
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert!((10..25).contains(&passed), "{passed} calls passed at the second replica; alone it would let 40 pass");
}

#[tokio::test]
async fn invented_users_and_hops_do_not_evade_the_limit_of_an_address() {
    let app = TestApp::spawn_limited(strict(server("TEST_REDIS_URL"))).await;
    let address = Client::new(None).address;
    let calls = join_all((0..200).map(async |n| {
        let client = Client { user: Some(Uuid::now_v7()), address: address.clone() };
        // The proxy adds the last hop. The client sent everything before it.
        client.call(&app, &format!("198.51.100.{n}, {address}")).await.status()
    }));
    let passed = calls.await.into_iter().filter(|status| *status != 429).count();
    assert_eq!(passed, 80, "an address may make twice the calls of a user");
    assert_eq!(Client::new(None).passed(&app, 10).await, 10, "another address has its own limit");
}

#[tokio::test]
async fn without_redis_each_replica_counts_alone_and_no_caller_waits() {
    let (to_redis, redis_url) = ChaosProxy::in_front_of(&server("TEST_REDIS_URL")).await;
    let app = TestApp::spawn_limited(strict(redis_url)).await;
    for break_it in [ChaosProxy::freeze, ChaosProxy::cut] {
        break_it(&to_redis);
        let client = Client::new(Some(Uuid::now_v7()));
        let begun = Instant::now();
        assert_eq!(client.passed(&app, 100).await, 40);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?} for 41 calls", begun.elapsed());
    }
}
