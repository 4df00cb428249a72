//! The HTTP server: listens, answers, and on a stop finishes what it has begun.

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

/// How long a stop waits for requests that clients have begun to send: shorter than the whole drain.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);

/// Takes the address.
///
/// # Errors
/// It is taken or not ours.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("can't listen on {address}; is the port taken? HOST and PORT move it"))
}

/// What a client hears for whom there is no place.
const FULL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// How long no connection is taken after the system had none to give: it is out of open files.
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
            tracing::warn!("Some clients never finished their requests; their connections are closed");
        }
        Ok(())
    });
}

/// Takes connections, each of which has a task of its own among the `open` ones.
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
                tracing::error!(%error, "No connection can be taken; raise the limit of open files, or lower CONNECTIONS_MAX");
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
                continue;
            }
        };
        if open.len() >= limits.connections_max {
            // Not logged one by one: of these there may be thousands a second.
            if !was_full {
                tracing::warn!(connections = open.len(), "As many connections are open as CONNECTIONS_MAX allows");
            }
            was_full = true;
            let _ = stream.try_write(FULL);
            continue;
        }
        was_full = false;
        if let Err(error) = connections::prepare(&stream) {
            tracing::debug!(%error, "A connection keeps the options of the system");
        }
        let (router, limits, stopping, tls) = (router.clone(), Arc::clone(limits), stopping.clone(), tls.cloned());
        open.spawn(async move {
            let Some(tls) = tls else {
                return connections::serve(stream, peer.ip(), router, &limits, &stopping, STOP_TIMEOUT).await;
            };
            // In the connection's own task, so that a slow one holds up nobody.
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

/// Whether the client was gone before it was taken.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Asks the process of this machine that has these settings whether it is ready; for container health checks. `port` is
/// its usual one.
///
/// # Errors
/// It is not, or does not answer within two seconds.
pub async fn healthcheck(mut reader: SettingsReader, port: u16) -> anyhow::Result<()> {
    let port = reader.or("PORT", port);
    let scheme = if tls::is_served(&reader) { "https" } else { "http" };
    reader.finish(())?;
    let url = format!("{scheme}://127.0.0.1:{port}/health/ready");
    // The certificate is for the name that clients use, and may be renewed at this moment: a question that says nothing
    // secret and does not leave the machine must not fail of that. Orchestrators ask in the same way.
    let client =
        reqwest::Client::builder().tls_danger_accept_invalid_certs(true).timeout(Duration::from_secs(2)).build()?;
    client.get(url).send().await?.error_for_status()?;
    Ok(())
}
