//! A buyer's connections: plain HTTP/1.1, kept alive, with one request at a time.
//!
//! The generator shares the machine with what it measures, so it has no pool, no redirects and no decoding. Request
//! bodies are made before the run. An answer's body is kept only if the next step needs it.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An answer that takes longer counts as missing, because a buyer would not wait for it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// A service's address: `http://host:port`.
#[derive(Debug, Clone)]
pub struct Address(Arc<Resolved>);

#[derive(Debug)]
struct Resolved {
    socket: SocketAddr,
    host: HeaderValue,
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let uri: Uri = text.parse().with_context(|| format!("{text} is not a URL like http://localhost:8000"))?;
        let authority = match (uri.scheme_str(), uri.authority(), uri.path()) {
            (Some("http"), Some(authority), "/") => authority,
            (Some("https"), ..) => {
                bail!("{text}: the load test has no TLS; give the address behind the proxy that ends it")
            }
            _ => bail!("{text} is not a URL like http://localhost:8000"),
        };
        let (host, port) = (authority.host(), authority.port_u16().unwrap_or(80));
        let found = (host.trim_matches(['[', ']']), port).to_socket_addrs();
        let socket = found.with_context(|| format!("the host of {text} is not known"))?.next();
        let socket = socket.with_context(|| format!("the host of {text} has no address"))?;
        Ok(Self(Arc::new(Resolved { socket, host: HeaderValue::from_str(authority.as_str())? })))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.0.host.to_str().unwrap_or_default())
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// With an answer that has this status.
    Status(u16),
    /// The connection broke, or could not be opened.
    NoAnswer,
    /// No answer came within half a minute.
    TimedOut,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{status}"),
            Self::NoAnswer => f.write_str("no answer"),
            Self::TimedOut => f.write_str("timed out"),
        }
    }
}

/// An answer, or a record that none came.
pub struct Answer {
    /// How the request ended.
    pub outcome: Outcome,
    /// The answer's headers.
    pub headers: HeaderMap,
    /// The answer's body, if it was kept.
    pub body: Vec<u8>,
    /// The body's length in bytes, as transferred.
    pub bytes: u64,
}

impl Answer {
    fn none(outcome: Outcome) -> Self {
        Self { outcome, headers: HeaderMap::new(), body: Vec::new(), bytes: 0 }
    }

    /// Whether the answer has this status.
    #[must_use]
    pub fn is(&self, status: u16) -> bool {
        self.outcome == Outcome::Status(status)
    }
}

/// What happens to an answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// It is returned.
    Keep,
    /// It is read to the end, and only its bytes are counted.
    Count,
}

/// A request that can be sent any number of times.
#[derive(Debug, Clone)]
pub struct Call {
    method: Method,
    path: String,
    headers: HeaderMap,
    content: Bytes,
}

impl Call {
    /// Makes a `GET` request.
    pub fn get(path: impl Into<String>) -> Self {
        Self { method: Method::GET, path: path.into(), headers: HeaderMap::new(), content: Bytes::new() }
    }

    /// Makes a `POST` request with a JSON body, or without a body if `content` is empty.
    pub fn post(path: impl Into<String>, content: impl Into<Bytes>) -> Self {
        let mut call = Self { method: Method::POST, content: content.into(), ..Self::get(path) };
        if !call.content.is_empty() {
            call.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        call
    }

    /// Adds this header.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }
}

/// A connection, which opens at the first request and again after it has broken.
pub struct Connection {
    address: Address,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Connection {
    /// Makes a connection to this service, without opening it.
    #[must_use]
    pub fn to(address: &Address) -> Self {
        Self { address: address.clone(), sender: None }
    }

    /// Opens the connection, so that the first request does not wait for it.
    ///
    /// # Errors
    /// If no service answers there.
    pub async fn open(&mut self) -> anyhow::Result<()> {
        if self.sender.as_ref().is_some_and(|sender| !sender.is_closed()) {
            return Ok(());
        }
        let stream = TcpStream::connect(self.address.0.socket).await;
        let stream = stream.with_context(|| format!("{} does not answer; is the system up?", self.address))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(connection);
        self.sender = Some(sender);
        Ok(())
    }

    /// Sends a request and reads its answer to the end.
    pub async fn send(&mut self, call: Call, body: Body) -> Answer {
        match timeout(ANSWER_TIME_MAX, self.exchange(call, body)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => {
                self.sender = None;
                Answer::none(Outcome::NoAnswer)
            }
            Err(_) => {
                self.sender = None;
                Answer::none(Outcome::TimedOut)
            }
        }
    }

    async fn exchange(&mut self, call: Call, body: Body) -> anyhow::Result<Answer> {
        self.open().await?;
        let sender = self.sender.as_mut().context("the connection has just been made")?;
        sender.ready().await?;
        let mut request = Request::new(Full::new(call.content));
        *request.method_mut() = call.method;
        *request.uri_mut() = call.path.parse()?;
        *request.headers_mut() = call.headers;
        request.headers_mut().insert(header::HOST, self.address.0.host.clone());
        read(sender.send_request(request).await?, body).await
    }
}

async fn read(response: Response<Incoming>, body: Body) -> anyhow::Result<Answer> {
    let (head, mut incoming) = response.into_parts();
    let mut answer = Answer { headers: head.headers, ..Answer::none(Outcome::Status(head.status.as_u16())) };
    while let Some(frame) = incoming.frame().await {
        let frame = frame?;
        let Some(part) = frame.data_ref() else { continue };
        answer.bytes += part.len() as u64;
        if body == Body::Keep {
            answer.body.extend_from_slice(part);
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port_and_nothing_more() {
        assert_eq!("http://127.0.0.1:8000".parse::<Address>().unwrap().to_string(), "http://127.0.0.1:8000");
        for wrong in ["https://127.0.0.1:8000", "127.0.0.1:8000", "http://127.0.0.1:8000/api", "ftp://127.0.0.1"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
