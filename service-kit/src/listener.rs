//! Connections as they come in: plain ones at once, TLS ones after their handshake.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

use crate::tls::ServerCertificate;

/// A handshake takes two round trips. Who needs longer is not there any more, or means no good.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Handshakes at a time, each of which is an open file. The others wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 512;

/// What a request comes over.
pub(crate) type Io = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// The TCP stream underneath.
pub(crate) fn tcp_of(io: &Io) -> &TcpStream {
    match io {
        Either::Left(stream) => stream,
        Either::Right(stream) => stream.get_ref().0,
    }
}

/// A listener that speaks TLS when it has a certificate.
pub(crate) struct Listener {
    tcp: TcpListener,
    tls: Option<Handshakes>,
}

/// Handshakes have tasks of their own, so that a slow one holds up nobody and several cores share the work. They end with the listener.
struct Handshakes {
    acceptor: TlsAcceptor,
    under_way: JoinSet<Option<(TlsStream<TcpStream>, SocketAddr)>>,
}

impl Listener {
    /// Plain without a certificate.
    pub(crate) fn new(tcp: TcpListener, certificate: Option<&ServerCertificate>) -> anyhow::Result<Self> {
        let tls = match certificate {
            None => None,
            Some(certificate) => {
                let config = certificate.config().context("TLS can't be served")?;
                Some(Handshakes { acceptor: TlsAcceptor::from(Arc::new(config)), under_way: JoinSet::new() })
            }
        };
        Ok(Self { tcp, tls })
    }
}

impl Handshakes {
    fn begin(&mut self, stream: TcpStream, address: SocketAddr) {
        let handshake = tokio::time::timeout(HANDSHAKE_TIME_MAX, self.acceptor.accept(stream));
        self.under_way.spawn(async move {
            match handshake.await.map_err(io::Error::from).flatten() {
                Ok(stream) => Some((stream, address)),
                Err(error) => {
                    tracing::debug!(%address, %error, "A TLS handshake failed");
                    None
                }
            }
        });
    }
}

impl axum::serve::Listener for Listener {
    type Io = Io;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Io, SocketAddr) {
        let Some(tls) = &mut self.tls else {
            // The listener of axum, which lives on when there are no files left to open.
            let (stream, address) = axum::serve::Listener::accept(&mut self.tcp).await;
            return (Either::Left(stream), address);
        };
        loop {
            tokio::select! {
                (stream, address) = axum::serve::Listener::accept(&mut self.tcp), if tls.under_way.len() < HANDSHAKES_MAX => {
                    tls.begin(stream, address);
                }
                Some(ended) = tls.under_way.join_next() => {
                    if let Ok(Some((stream, address))) = ended {
                        return (Either::Right(Box::new(stream)), address);
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}
