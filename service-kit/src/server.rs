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
use crate::metrics::Metrics;
use crate::settings::Common;

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
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "A connection keeps Nagle's algorithm");
        }
    });
    let stopping = lifecycle.token().clone();
    lifecycle.spawn("http server", async move {
        let late = stopping.clone();
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

/// Asks the process that listens on `port` of this machine whether it is ready; for container health checks.
///
/// # Errors
/// It is not, or does not answer within two seconds.
pub async fn healthcheck(port: u16) -> anyhow::Result<()> {
    let url = format!("http://127.0.0.1:{port}/health/ready");
    let client = reqwest::Client::builder().timeout(Duration::from_secs(2)).build()?;
    client.get(url).send().await?.error_for_status()?;
    Ok(())
}
