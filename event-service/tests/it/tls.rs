//! A TLS server: which clients trust it, how its certificate is replaced, and that slow clients block nobody.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use event_service::app;
use futures::FutureExt;
use reqwest::Client;
use service_kit::http::server;
use service_kit::http::tls::{ServerCertificate, Trust};
use service_kit::observe::metrics::Metrics;
use service_kit::process::common::Common;
use service_kit::process::lifecycle::Lifecycle;
use service_kit::process::settings::SettingsReader;
use service_kit::testing::tls::{Pair, TestCa};
use service_kit::testing::{unique, wait_until};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;

const SOON: Duration = Duration::from_secs(20);

/// A server with one route that answers at once and one that answers after `word` is notified.
struct Server {
    port: u16,
    lifecycle: Lifecycle,
    begun: Arc<Notify>,
    word: Arc<Notify>,
}

impl Server {
    async fn start(certificate: ServerCertificate) -> Self {
        let mut reader = SettingsReader::new(|name| (name == "HOST").then(|| "127.0.0.1".into()));
        let common = Common { certificate: Some(certificate), ..Common::read(&mut reader, 0) };
        let lifecycle = Lifecycle::new();
        let (begun, word) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let waits = (Arc::clone(&begun), Arc::clone(&word));
        let router = Router::new().route("/health/ready", get(|| async { "yes" })).route(
            "/slow",
            get(move || async move {
                waits.0.notify_one();
                waits.1.notified().await;
                "at last"
            }),
        );
        let listener = server::listen(common.listen).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let metrics = Metrics::new("event-service", "test").unwrap();
        server::serve(&lifecycle, listener, router, &common, &metrics, app::request_class);
        Self { port, lifecycle, begun, word }
    }

    async fn ask(&self, client: &Client, path: &str) -> Result<String, String> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let response = client.get(url).send().await.map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        Ok(response.text().await.unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.lifecycle.stop();
    }
}

fn believer(trust: &Trust) -> Client {
    trust.http_client().build().unwrap()
}

#[tokio::test]
async fn a_client_accepts_only_a_server_with_a_valid_certificate() {
    let ca = TestCa::new();
    let wrong = [
        (TestCa::new().local(), "UnknownIssuer"),
        (ca.issue(&["elsewhere.example.com"], 2100), "not valid for name"),
        (ca.issue(&["localhost", "127.0.0.1"], 2021), "expired"),
    ];
    for (pair, cause) in wrong {
        let server = Server::start(pair.for_server()).await;
        let error = server.ask(&believer(&ca.trust()), "/health/ready").await.unwrap_err();
        assert!(error.contains(cause), "{cause} is not in: {error}");
    }
    let server = Server::start(ca.local().for_server()).await;
    assert_eq!(server.ask(&believer(&ca.trust()), "/health/ready").await.unwrap(), "yes");
    let error = server.ask(&believer(&Trust::default()), "/health/ready").await.unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
    let plain = believer(&ca.trust()).get(format!("http://127.0.0.1:{}/health/ready", server.port)).send().await;
    assert!(plain.is_err(), "plaintext was answered: {plain:?}");
}

/// A folder with a certificate and its key. Like a mounted Kubernetes secret, both are replaced at once by a symbolic
/// link.
struct Files(PathBuf);

impl Files {
    fn new(pair: &Pair) -> Self {
        let files = Self(std::env::temp_dir().join(unique("certificates")));
        std::fs::create_dir(&files.0).unwrap();
        files.replace(&pair.certificate, &pair.key);
        files
    }

    fn replace(&self, certificate: &str, key: &str) {
        let folder = unique("of");
        std::fs::create_dir(self.0.join(&folder)).unwrap();
        std::fs::write(self.0.join(&folder).join("tls.crt"), certificate).unwrap();
        std::fs::write(self.0.join(&folder).join("tls.key"), key).unwrap();
        std::os::unix::fs::symlink(&folder, self.0.join("new")).unwrap();
        std::fs::rename(self.0.join("new"), self.0.join("current")).unwrap();
    }

    fn certificate(&self) -> ServerCertificate {
        let current = self.0.join("current");
        let path = |file: &str| Path::to_str(&current.join(file)).unwrap().to_owned();
        let (certificate, key) = (path("tls.crt"), path("tls.key"));
        let mut reader = SettingsReader::new(move |name| match name {
            "TLS_CERTIFICATE_FILE" => Some(certificate.clone()),
            "TLS_PRIVATE_KEY_FILE" => Some(key.clone()),
            _ => None,
        });
        let certificate = ServerCertificate::read(&mut reader);
        reader.finish(certificate).unwrap().unwrap()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn a_new_certificate_is_used_without_a_restart_and_connections_stay_open() {
    let (old_ca, new_ca) = (TestCa::new(), TestCa::new());
    let files = Files::new(&old_ca.local());
    let server = Server::start(files.certificate()).await;
    let (old, new) = (believer(&old_ca.trust()), believer(&new_ca.trust()));
    server.ask(&old, "/health/ready").await.unwrap();
    assert!(server.ask(&new, "/health/ready").await.is_err());
    let pair = new_ca.local();
    files.replace(&pair.certificate, &pair.key);
    wait_until("the new certificate is used", SOON, async || server.ask(&new, "/health/ready").await.is_ok()).await;
    assert!(
        server.ask(&believer(&old_ca.trust()), "/health/ready").await.is_err(),
        "the old certificate is still used"
    );
    // Uses the open connection: this client would not trust a new one, as the line above shows.
    server.ask(&old, "/health/ready").await.unwrap();
}

#[tokio::test]
async fn a_client_that_stalls_in_the_handshake_blocks_nobody_and_is_disconnected() {
    let ca = TestCa::new();
    let server = Server::start(ca.local().for_server()).await;
    let begun = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(("127.0.0.1", server.port)).await.unwrap());
    }
    assert_eq!(server.ask(&believer(&ca.trust()), "/health/ready").await.unwrap(), "yes");
    assert!(begun.elapsed() < Duration::from_secs(4), "another client waited {:?}", begun.elapsed());
    for stream in &mut silent {
        let end =
            tokio::time::timeout(SOON, stream.read(&mut [0])).await.expect("the server closes the silent connection");
        assert!(matches!(end, Ok(0) | Err(_)));
    }
}

#[tokio::test]
async fn a_stop_waits_for_the_answer_in_progress() {
    let ca = TestCa::new();
    let server = Server::start(ca.local().for_server()).await;
    let client = believer(&ca.trust());
    let asking = server.ask(&client, "/slow");
    let stopping = async {
        server.begun.notified().await;
        server.lifecycle.stop();
        wait_until("new connections are refused", SOON, async || {
            TcpStream::connect(("127.0.0.1", server.port)).await.is_err()
        })
        .await;
        // Polled once, not awaited: the process must not have ended yet.
        let ended = server.lifecycle.finished().now_or_never();
        assert!(ended.is_none(), "the process ended before its answer was sent");
        server.word.notify_one();
        server.lifecycle.finished().await
    };
    let (answer, ended) = tokio::join!(asking, stopping);
    assert_eq!(answer.unwrap(), "at last");
    assert_eq!(ended, std::process::ExitCode::SUCCESS);
}

#[tokio::test]
async fn the_health_check_works_with_a_tls_service() {
    // Issued for the name that clients use, not for the address that the health check connects to.
    let pair = TestCa::new().issue(&["tickets.example.com"], 2100);
    let server = Server::start(pair.for_server()).await;
    let port = server.port.to_string();
    let settings = move |tls: bool| {
        let (port, certificate) = (port.clone(), pair.certificate.clone());
        SettingsReader::new(move |name| match name {
            "PORT" => Some(port.clone()),
            "TLS_CERTIFICATE" if tls => Some(certificate.clone()),
            _ => None,
        })
    };
    server::healthcheck(settings(true), 1).await.unwrap();
    assert!(server::healthcheck(settings(false), 1).await.is_err());
}
