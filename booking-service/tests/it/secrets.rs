//! No secret appears in a log or an answer, whatever fails and whatever the log level.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use reqwest::Client;
use service_kit::testing::{database, server, wait_until};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::process::{Child, Command};

use crate::processes::{event_binary, free_port};

/// Every secret contains this text, and nothing else does.
const MARK: &str = "hunter2";

/// A process that logs everything into a file.
struct LoggedProcess {
    child: Child,
    log: std::path::PathBuf,
    port: u16,
}

impl LoggedProcess {
    async fn start(program: &str, subcommand: &str, settings: &[(&str, String)]) -> Self {
        let binary = match program {
            "event-service" => event_binary(),
            _ => Path::new(env!("CARGO_BIN_EXE_booking-service")).to_owned(),
        };
        let port = free_port().await;
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("secrets-{program}-{subcommand}-{port}.log"));
        let file = File::create(&log).unwrap();
        let mut command = Command::new(binary);
        command
            .arg(subcommand)
            .env("HOST", "127.0.0.1")
            .env("PORT", port.to_string())
            // Includes the libraries that log nothing by default.
            .env("LOG_LEVEL", "trace,sqlx=trace,lapin=trace,sqlx::postgres::notice=trace")
            .env("RUST_BACKTRACE", "1")
            .envs(settings.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .kill_on_drop(true);
        Self { child: command.spawn().unwrap(), log, port }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }

    async fn says(&self, words: &str) {
        wait_until(&format!("the log says {words:?}"), Duration::from_secs(20), async || self.said().contains(words))
            .await;
    }

    async fn end(mut self) {
        let _ = self.child.kill().await;
        let said = self.said();
        let leaks: Vec<&str> = said.lines().filter(|line| line.contains(MARK)).take(5).collect();
        assert!(leaks.is_empty(), "secrets in {}:\n{}", self.log.display(), leaks.join("\n"));
        fs::remove_file(&self.log).unwrap();
    }
}

fn secret(name: &str) -> String {
    format!("{MARK}-{name}")
}

/// Settings with a secret in each. No server listens at any of the addresses.
fn nowhere(database_url: String) -> Vec<(&'static str, String)> {
    vec![
        ("DATABASE_URL", database_url),
        ("REDIS_URL", format!("redis://:{}@127.0.0.1:1", secret("redis"))),
        ("RABBITMQ_URL", format!("amqp://guest:{}@127.0.0.1:1/%2f", secret("rabbitmq"))),
        ("EVENT_SERVICE_URL", format!("http://user:{}@127.0.0.1:1", secret("event-service"))),
        ("PAYMENT_WEBHOOK_SECRET", secret("webhook")),
        ("PAYMENT_WEBHOOK_SECRET_PREVIOUS", secret("webhook-previous")),
        ("INTERNAL_API_KEY", secret("internal-key")),
        ("JWT_SECRET", secret("jwt")),
    ]
}

#[tokio::test]
async fn no_secret_is_logged_when_servers_are_unreachable() {
    let settings = nowhere(format!("postgres://user:{}@127.0.0.1:1/db", secret("database")));
    for (program, subcommand) in
        [("event-service", "serve"), ("booking-service", "serve"), ("booking-service", "worker")]
    {
        let process = LoggedProcess::start(program, subcommand, &settings).await;
        process.says("The database does not answer yet").await;
        process.end().await;
    }
    let audit = LoggedProcess::start("booking-service", "audit", &settings).await;
    audit.says("error: ").await;
    audit.end().await;
}

#[tokio::test]
async fn no_secret_is_logged_when_settings_are_invalid() {
    let wrong = [
        ("DATABASE_URL", format!("postgres://user:{}@127.0.0.1:port/db", secret("database"))),
        ("DATABASE_URL", format!("user:{}@127.0.0.1", secret("database"))),
        ("REDIS_URL", format!("redis://:{}@[nowhere", secret("redis"))),
        ("RABBITMQ_URL", format!("amqp://guest:{}@127.0.0.1:port/%2f", secret("rabbitmq"))),
        ("EVENT_SERVICE_URL", format!("http://user:{}@127.0.0.1:port", secret("event-service"))),
    ];
    let database_url = database("booking", &booking_service::schema::MIGRATIONS).await;
    for (name, value) in wrong {
        let mut settings = nowhere(database_url.reveal().to_owned());
        settings.retain(|(other, _)| *other != name);
        settings.push((name, value));
        for program in ["booking-service", "event-service"] {
            let process = LoggedProcess::start(program, "serve", &settings).await;
            // The process ends, or continues without that server.
            wait_until("it has said something", Duration::from_secs(20), async || process.said().len() > 100).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            process.end().await;
        }
    }
}

/// Only the database is up. Some of the requests carry secrets themselves.
#[tokio::test]
async fn a_service_that_works_neither_logs_nor_answers_a_secret() {
    let admin = PgPool::connect(&server("TEST_POSTGRES_URL")).await.unwrap();
    let make = format!("create role secret_keeper superuser login password '{}'", secret("database"));
    // An earlier run may have made it.
    let _ = sqlx::query(AssertSqlSafe(make)).execute(&admin).await;
    let as_keeper = |url: &str| {
        let rest = url.split_once('@').unwrap().1;
        format!("postgres://secret_keeper:{}@{rest}", secret("database"))
    };
    let booking_db = as_keeper(database("booking", &booking_service::schema::MIGRATIONS).await.reveal());
    let event_db = as_keeper(database("event", &event_service::state::MIGRATIONS).await.reveal());
    let booking = LoggedProcess::start("booking-service", "serve", &nowhere(booking_db.clone())).await;
    let worker = LoggedProcess::start("booking-service", "worker", &nowhere(booking_db)).await;
    let event = LoggedProcess::start("event-service", "serve", &nowhere(event_db)).await;
    let http = Client::builder().build().unwrap();
    for process in [&booking, &worker, &event] {
        let ready = format!("http://127.0.0.1:{}/health/ready", process.port);
        wait_until("it is ready", Duration::from_secs(20), async || {
            http.get(&ready).send().await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }
    let user = "019ac1c0-0000-7000-8000-000000000001";
    let order = serde_json::json!({ "session_id": user, "seats": [
        { "session_seat_id": user, "price_tier_id": user, "row_number": "1", "seat_number": "1" }] });
    for port in [booking.port, event.port] {
        for (method, path) in [
            ("GET", "health"),
            ("POST", "api/v1/reservations"),
            ("GET", "api/v1/reservations"),
            ("POST", "api/v1/payments/webhook"),
            ("GET", "api/internal/health"),
            ("POST", "api/v1/organizers"),
            ("POST", "api/v1/admin/events/replay"),
            ("GET", "nowhere"),
        ] {
            let request = http
                .request(method.parse().unwrap(), format!("http://127.0.0.1:{port}/{path}"))
                .header("x-user-id", user)
                .header("authorization", format!("Bearer {}", secret("token")))
                .header("x-internal-api-key", secret("internal-key"))
                .header("payment-signature", format!("t=1,v1={}", secret("signature")))
                .header("cookie", secret("cookie"))
                .json(&order);
            let answer = request.send().await.unwrap();
            let (headers, body) = (format!("{:?}", answer.headers()), answer.text().await.unwrap());
            assert!(!headers.contains(MARK) && !body.contains(MARK), "{method} {path}: {headers} {body}");
        }
    }
    for process in [booking, worker, event] {
        process.end().await;
    }
}
