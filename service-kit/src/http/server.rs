//! The HTTP server: it listens, answers, and on a stop finishes the requests in progress.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admit::bulkheads::Classify;
use crate::admit::limits::Limits;
use crate::admit::rate_limit::Limiter;
use crate::http::{connections, layers, tls};
use crate::observe::metrics::Metrics;
use crate::process::common::Common;
use crate::process::lifecycle::Lifecycle;
use crate::process::settings::SettingsReader;

/// How long a stop waits for requests that clients have begun to send. It is shorter than the whole drain.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);

/// Binds the listening socket.
///
/// # Errors
/// The address is in use, or does not belong to this machine.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("can't listen on {address}; is the port in use? HOST and PORT set the address"))
}

/// The answer to a client beyond `CONNECTIONS_MAX`.
const FULL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// How long the server accepts no connection after the system had none to give. The process is then out of open files.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Longest time for a TLS handshake. It takes two round trips, so a slower client is gone or hostile.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves `router` until the process stops, within the limits of its settings, and measures its requests.
pub fn serve(
    lifecycle: &Lifecycle,
    listener: TcpListener,
    router: Router,
    settings: &Common,
    metrics: &Metrics,
    classify: Classify,
) {
    let limits = Arc::new(settings.limits.clone());
    let limiter = limits.rates.map(|rates| Arc::new(Limiter::new(rates)));
    if let (Some(limiter), Some(redis_url)) = (&limiter, &limits.redis_url) {
        let (limiter, redis_url, trust) = (Arc::clone(limiter), redis_url.clone(), settings.trust.clone());
        let stopping = lifecycle.token().clone();
        lifecycle.spawn("rate limits", async move { limiter.share(&redis_url, &trust, stopping).await });
    }
    let router = metrics.measure(layers::wrap(router, lifecycle, settings, classify, limiter)).with_state(());
    let certificate = settings.certificate.clone();
    if let Some(certificate) = certificate.clone() {
        lifecycle.spawn("certificate", certificate.follow(lifecycle.token().clone()));
    }
    let stopping = lifecycle.token().clone();
    lifecycle.spawn("http server", async move {
        let open = TaskTracker::new();
        let tls = certificate.map(|certificate| certificate.config()).transpose().context("TLS can't be served")?;
        let tls = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        stopping.run_until_cancelled(accept(&listener, tls.as_ref(), &router, &limits, &stopping, &open)).await;
        drop(listener);
        open.close();
        if tokio::time::timeout(STOP_TIMEOUT, open.wait()).await.is_err() {
            tracing::warn!("Some clients did not finish their requests in time; their connections are closed");
        }
        Ok(())
    });
}

/// Accepts connections. Each has a task of its own, which `open` tracks.
async fn accept(
    listener: &TcpListener,
    tls: Option<&TlsAcceptor>,
    router: &Router,
    limits: &Arc<Limits>,
    stopping: &CancellationToken,
    open: &TaskTracker,
) {
    let mut was_full = false;
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(taken) => taken,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                tracing::error!(%error, "No connection can be accepted; raise the limit of open files, or lower CONNECTIONS_MAX");
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
                continue;
            }
        };
        if open.len() >= limits.connections_max {
            // Not logged one by one: there may be thousands of these a second.
            if !was_full {
                tracing::warn!(connections = open.len(), "CONNECTIONS_MAX is reached; new connections are turned away");
            }
            was_full = true;
            let _ = stream.try_write(FULL);
            continue;
        }
        was_full = false;
        if let Err(error) = connections::prepare(&stream) {
            tracing::debug!(%error, "The options of a connection can't be set; it keeps the system's");
        }
        let (router, limits, stopping, tls) = (router.clone(), Arc::clone(limits), stopping.clone(), tls.cloned());
        open.spawn(async move {
            let Some(tls) = tls else {
                return connections::serve(stream, peer.ip(), router, &limits, &stopping, STOP_TIMEOUT).await;
            };
            // The handshake runs in the connection's own task, so that a slow client delays no other.
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream));
            match stopping.run_until_cancelled(handshake).await {
                Some(Ok(Ok(stream))) => {
                    connections::serve(stream, peer.ip(), router, &limits, &stopping, STOP_TIMEOUT).await;
                }
                Some(failed) => {
                    let error = failed.map_err(io::Error::from).flatten().err();
                    tracing::debug!(%peer, error = error.map(tracing::field::display), "A TLS handshake failed");
                }
                None => {}
            }
        });
    }
}

/// Whether the client closed the connection before the server accepted it.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Probes whether the process on this machine with these settings is ready; for container health checks. `port` is the
/// default port.
///
/// # Errors
/// The process is not ready, or does not answer within two seconds.
pub async fn healthcheck(mut reader: SettingsReader, port: u16) -> anyhow::Result<()> {
    let port = reader.or("PORT", port);
    let scheme = if tls::is_served(&reader) { "https" } else { "http" };
    reader.finish(())?;
    let url = format!("{scheme}://127.0.0.1:{port}/health/ready");
    // Does not verify the certificate. It is for the name that clients use, and the probe must work during a renewal.
    // The connection is local and carries no secret. Orchestrators probe in the same way.
    let client =
        reqwest::Client::builder().tls_danger_accept_invalid_certs(true).timeout(Duration::from_secs(2)).build()?;
    client.get(url).send().await?.error_for_status()?;
    Ok(())
}
