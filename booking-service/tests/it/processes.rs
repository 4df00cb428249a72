//! Runs the services as separate processes, which tests can kill.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use booking_service::settings::Settings;
use reqwest::Client;
use service_kit::testing::wait_until;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

/// A process that serves HTTP. It is killed when this value is dropped.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) base: String,
}

/// A free port, for a process that will listen on it. It lies below the range that the kernel gives to outgoing
/// connections. One of those could take such a port before the process starts, or between two of its runs.
pub(crate) async fn free_port() -> u16 {
    loop {
        let port = rand::random_range(10_000..20_000);
        if TcpListener::bind(("127.0.0.1", port)).await.is_ok() {
            return port;
        }
    }
}

/// The command of a service that listens on `port` and logs only warnings.
fn command(binary: &Path, subcommand: &str, port: u16) -> Command {
    let mut command = Command::new(binary);
    command
        .arg(subcommand)
        .env("HOST", "127.0.0.1")
        .env("PORT", port.to_string())
        .env("LOG_LEVEL", "warn")
        .env("REQUESTS_IN_FLIGHT_MAX", "2000")
        // Hundreds of buyers come from one address.
        .env("RATE_LIMIT_ENABLED", "false")
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command
}

/// `booking-service serve` or `worker`, with these settings.
pub(crate) fn booking(settings: &Settings, subcommand: &str, port: u16) -> Command {
    let mut command = command(Path::new(env!("CARGO_BIN_EXE_booking-service")), subcommand, port);
    command
        .env("DATABASE_URL", settings.database_url.reveal())
        .env("REDIS_URL", settings.redis_url.reveal())
        .env("RABBITMQ_URL", settings.broker.url.reveal())
        .env("RABBITMQ_EXCHANGE", &settings.broker.exchange)
        .env("RABBITMQ_QUEUE", &settings.queue)
        .env("EVENT_SERVICE_URL", &settings.event_service_url)
        .env("RESERVATION_TIMEOUT_MINUTES", (settings.rules.hold_time.as_secs_f64() / 60.0).to_string())
        .env("EXPIRY_BATCH_SIZE", settings.expiry_batch_size.to_string())
        .env("PAYMENT_WEBHOOK_SECRET", settings.webhook_secrets[0].reveal());
    command
}

/// The path of the Event Service's program. It is in the folder of the Booking Service's, as all tests are built
/// together.
pub(crate) fn event_binary() -> PathBuf {
    let binary = Path::new(env!("CARGO_BIN_EXE_booking-service")).with_file_name("event-service");
    assert!(binary.exists(), "{} is missing: run the tests with --workspace", binary.display());
    binary
}

/// `event-service serve` on this database, with the broker, exchange and queue of `settings`.
pub(crate) fn event(settings: &Settings, database_url: &str, port: u16) -> Command {
    let mut command = command(&event_binary(), "serve", port);
    command
        .env("DATABASE_URL", database_url)
        .env("REDIS_URL", settings.redis_url.reveal())
        .env("RABBITMQ_URL", settings.broker.url.reveal())
        .env("RABBITMQ_EXCHANGE", &settings.broker.exchange)
        .env("RABBITMQ_QUEUE", &settings.queue);
    command
}

/// Starts the command and waits until the service is ready.
pub(crate) async fn start(mut command: Command) -> Process {
    let port = command.as_std().get_envs().find_map(|(name, value)| (name == "PORT").then_some(value?)).unwrap();
    let base = format!("http://127.0.0.1:{}", port.to_str().unwrap());
    let child = command.spawn().unwrap();
    let http = Client::builder().build().unwrap();
    wait_until("the process is ready", Duration::from_secs(20), async || {
        http.get(format!("{base}/health/ready")).send().await.is_ok_and(|response| response.status() == 200)
    })
    .await;
    Process { child, base }
}

/// Sends a signal such as `STOP` to the process.
pub(crate) async fn signal(child: &Child, name: &str) {
    let Some(id) = child.id() else { return };
    let sent = Command::new("kill").args([format!("-{name}"), id.to_string()]).stderr(Stdio::null()).status().await;
    assert!(sent.is_ok(), "kill can't be run");
}
