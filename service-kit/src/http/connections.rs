//! Serves one client connection, and closes it when the client exceeds its time.
//!
//! Connections are limited, and a client that sends a byte now and then, or reads none, would keep one for ever. So
//! each phase has a time limit: receiving a head, being idle, taking an answer. `layers.rs` limits the time of bodies.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::admit::limits::Limits;
use crate::http::client_address::Peer;

/// The longest head that is read. It is beyond the limit in `layers.rs`, so that `layers.rs` can refuse a head in our
/// form. A longer head gets a bare `431`.
const HEAD_BYTES_READ_MAX: usize = 64 * 1024;
/// How long a client may leave sent bytes unread. The kernel closes the connection then.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Sets the socket options of a new connection.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Small answers must not wait for the client's delayed acknowledgement.
    stream.set_nodelay(true)?;
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(UNREAD_TIMEOUT))
}

/// Serves a connection, plain or TLS, until the client closes it or exceeds its time. Once `stopping` is cancelled, it
/// finishes the request in progress, within `stop_time_max`.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    peer: IpAddr,
    router: Router,
    limits: &Limits,
    stopping: &CancellationToken,
    stop_time_max: Duration,
) {
    let phase = Arc::new(Phase::new());
    let io = TokioIo::new(Watched { stream, phase: Arc::clone(&phase) });
    let of_requests = Arc::clone(&phase);
    let service = service_fn(move |request: Request<Incoming>| {
        of_requests.set(AT_WORK);
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        let (answer, phase) = (router.clone().oneshot(request), Arc::clone(&of_requests));
        async move {
            let answer = answer.await;
            phase.set(IDLE);
            answer
        }
    });
    let connection = http1::Builder::new().max_buf_size(HEAD_BYTES_READ_MAX).serve_connection(io, service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = phase.overdue(limits) => {
            tracing::debug!("A client did not send its next request in time; its connection is closed");
            return;
        }
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(stop_time_max, connection.as_mut()).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "A connection broke");
    }
}

/// What a connection waits for, and since when.
struct Phase {
    began: Instant,
    /// The kind in the lowest two bits, and above them the milliseconds after `began`. The reader, the service and the
    /// timer of a connection share it.
    state: AtomicU64,
}

/// No byte of the next request has arrived.
const IDLE: u64 = 0;
/// A part of its head has arrived.
const IN_HEAD: u64 = 1;
/// The service is processing it.
const AT_WORK: u64 = 2;

impl Phase {
    fn new() -> Self {
        Self { began: Instant::now(), state: AtomicU64::new(IDLE) }
    }

    fn set(&self, kind: u64) {
        self.state.store(self.now() << 2 | kind, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn bytes_came(&self) {
        if self.state.load(Ordering::Relaxed) & 3 == IDLE {
            self.set(IN_HEAD);
        }
    }

    /// Returns once the client has exceeded the time of the phase.
    async fn overdue(&self, limits: &Limits) {
        // Checked often enough that a client exceeds its time by a quarter of the header time at most.
        let glance = limits.header_time_max / 4;
        loop {
            let state = self.state.load(Ordering::Relaxed);
            let time_max = match state & 3 {
                IDLE => Some(limits.idle_time_max),
                IN_HEAD => Some(limits.header_time_max),
                _ => None,
            };
            let spent = Duration::from_millis(self.now().saturating_sub(state >> 2));
            match time_max.map(|time_max| time_max.saturating_sub(spent)) {
                Some(Duration::ZERO) => return,
                Some(left) => tokio::time::sleep(left.min(glance)).await,
                None => tokio::time::sleep(glance).await,
            }
        }
    }
}

/// A stream that notes in `phase` when bytes arrive.
struct Watched<S> {
    stream: S,
    phase: Arc<Phase>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.phase.bytes_came();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
