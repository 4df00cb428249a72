//! The HTTP server: listens, answers, and on a stop finishes what it has begun.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use crate::layers;
use crate::lifecycle::Lifecycle;
use crate::listener::{Io, Listener, tcp_of};
use crate::metrics::Metrics;
use crate::settings::{Common, SettingsReader};
use crate::tls;

/// How long a stop waits for requests that clients have begun to send: shorter than the whole drain.
const STOP_TIME_MAX: Duration = Duration::from_secs(12);

/// Takes the address.
///
/// # Errors
/// It is taken or not ours.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("can't listen on {address}; is the port taken? HOST and PORT move it"))
}

/// Serves `router` until the process stops, within the limits of its settings, and measures its requests.
pub fn serve(lifecycle: &Lifecycle, listener: TcpListener, router: Router, limits: &Common, metrics: &Metrics) {
    let router = metrics.measure(layers::wrap(router, lifecycle, limits));
    // Small answers must not wait for the client's delayed acknowledgement.
    let nodelay = |io: &mut Io| {
        if let Err(error) = tcp_of(io).set_nodelay(true) {
            tracing::debug!(%error, "A connection keeps Nagle's algorithm");
        }
    };
    let certificate = limits.certificate.clone();
    if let Some(certificate) = certificate.clone() {
        lifecycle.spawn("certificate", certificate.follow(lifecycle.token().clone()));
    }
    let stopping = lifecycle.token().clone();
    lifecycle.spawn("http server", async move {
        let late = stopping.clone();
        let listener = Listener::new(listener, certificate.as_ref())?.tap_io(nodelay);
        let serving = axum::serve(listener, router).with_graceful_shutdown(stopping.cancelled_owned());
        tokio::select! {
            served = serving.into_future() => served.context("the HTTP server failed"),
            // A client that has sent half a request would keep the process for ever.
            () = async { late.cancelled().await; tokio::time::sleep(STOP_TIME_MAX).await } => {
                tracing::warn!("Some clients never finished their requests; their connections are closed");
                Ok(())
            }
        }
    });
}

/// Asks the process of this machine that has these settings whether it is ready; for container health checks. `port` is its usual one.
///
/// # Errors
/// It is not, or does not answer within two seconds.
pub async fn healthcheck(mut reader: SettingsReader, port: u16) -> anyhow::Result<()> {
    let port = reader.or("PORT", port);
    let scheme = if tls::is_served(&reader) { "https" } else { "http" };
    reader.finish(())?;
    let url = format!("{scheme}://127.0.0.1:{port}/health/ready");
    // The certificate is for the name that clients use, and may be renewed at this moment: a question that says nothing secret and does
    // not leave the machine must not fail of that. Orchestrators ask in the same way.
    let client =
        reqwest::Client::builder().tls_danger_accept_invalid_certs(true).timeout(Duration::from_secs(2)).build()?;
    client.get(url).send().await?.error_for_status()?;
    Ok(())
}
