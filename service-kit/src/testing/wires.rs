//! TCP proxies that break what passes through them: [`ChaosProxy`] when the test sets a [`Mode`], [`FaultProxy`] when a
//! request has a certain word in it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

const CHUNK_BYTES: usize = 32 * 1024;

/// How a [`ChaosProxy`] treats its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything passes, new connections too.
    Pass,
    /// Connections break, new ones at once: the server is down.
    Cut,
    /// Connections stay open and nothing passes: the server is frozen, or its host has vanished.
    Freeze,
    /// Requests pass and answers are lost: only the way back is broken.
    HalfOpen,
    /// Everything passes, each chunk this much later.
    Delay(Duration),
    /// Connections break after so many bytes, in the middle of a message.
    ResetAfter(usize),
}

/// A TCP proxy in front of a server, or of several that take turns.
#[derive(Debug, Clone)]
pub struct ChaosProxy {
    address: SocketAddr,
    mode: Arc<watch::Sender<Mode>>,
}

impl ChaosProxy {
    /// A proxy to `target` (`host:port`) that passes everything.
    pub async fn to(target: &str) -> Self {
        Self::to_any(vec![target.to_owned()]).await
    }

    /// A proxy that gives each new connection to the next of `targets` that accepts one.
    pub async fn to_any(targets: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("address");
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let seen = mode.subscribe();
        tokio::spawn(async move {
            let mut turn = 0;
            while let Ok((client, _)) = listener.accept().await {
                let mut order = targets.clone();
                order.rotate_left(turn % targets.len());
                turn += 1;
                tokio::spawn(carry(client, order, seen.clone()));
            }
        });
        Self { address, mode }
    }

    /// A proxy to the server of a URL, and the URL with the proxy's address in its place.
    pub async fn in_front_of(url: &str) -> (Self, String) {
        let target = authority(url);
        let proxy = Self::to(target).await;
        let through = url.replacen(target, &proxy.address.to_string(), 1);
        (proxy, through)
    }

    /// The proxy's address as an HTTP URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sets how the proxy treats its connections, open and new ones.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// [`Mode::Pass`].
    pub fn heal(&self) {
        self.set(Mode::Pass);
    }

    /// [`Mode::Cut`].
    pub fn cut(&self) {
        self.set(Mode::Cut);
    }

    /// [`Mode::Freeze`].
    pub fn freeze(&self) {
        self.set(Mode::Freeze);
    }
}

/// Host and port of a URL.
#[must_use]
pub fn authority(url: &str) -> &str {
    let authority = url.split("://").nth(1).and_then(|rest| rest.split('/').next()).expect("a URL");
    authority.rsplit('@').next().expect("host and port")
}

/// Carries one connection. A frozen one ends when the mode changes, and the data on its way is lost, as after a long
/// real outage.
async fn carry(mut client: TcpStream, targets: Vec<String>, mut mode: watch::Receiver<Mode>) {
    let now = *mode.borrow_and_update();
    match now {
        Mode::Cut => return,
        Mode::Freeze => return drop(mode.changed().await),
        _ => {}
    }
    let mut server = None;
    for target in targets {
        if let Ok(stream) = TcpStream::connect(&target).await {
            server = Some(stream);
            break;
        }
    }
    let Some(mut server) = server else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut up, mut down) = (vec![0_u8; CHUNK_BYTES], vec![0_u8; CHUNK_BYTES]);
    let mut passed = 0;
    loop {
        tokio::select! {
            changed = mode.changed() => {
                let now = *mode.borrow_and_update();
                match now {
                    _ if changed.is_err() => return,
                    Mode::Cut => return,
                    // Both sides stay open while nothing passes.
                    Mode::Freeze => return drop((mode.changed().await, client, server)),
                    _ => {}
                }
            }
            read = client.read(&mut up) => {
                let Ok(count @ 1..) = read else { return };
                let now = *mode.borrow();
                if pass(now, &up[..count], &mut server, &mut passed, true).await.is_err() { return }
            }
            read = server.read(&mut down) => {
                let Ok(count @ 1..) = read else { return };
                let now = *mode.borrow();
                if pass(now, &down[..count], &mut client, &mut passed, false).await.is_err() { return }
            }
        }
    }
}

async fn pass(mode: Mode, bytes: &[u8], to: &mut TcpStream, passed: &mut usize, up: bool) -> std::io::Result<()> {
    match mode {
        Mode::HalfOpen if !up => return Ok(()),
        Mode::Delay(time) => tokio::time::sleep(time).await,
        Mode::ResetAfter(limit) => {
            let room = limit.saturating_sub(*passed).min(bytes.len());
            *passed += room;
            to.write_all(&bytes[..room]).await?;
            if room < bytes.len() {
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            return Ok(());
        }
        _ => {}
    }
    to.write_all(bytes).await
}

/// The way in which a [`FaultProxy`] breaks a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The request never arrives, and the connection breaks.
    Before,
    /// The request has its effect, its answer is lost, and the connection breaks.
    After,
    /// The request has its effect, and its answer never comes.
    Silence,
    /// The request waits for [`FaultProxy::resume`], and then has its effect and its answer.
    Pause,
}

/// A TCP proxy that breaks requests with a certain word in them: a path, a part of a statement, a key.
#[derive(Debug, Clone)]
pub struct FaultProxy {
    address: SocketAddr,
    hits: Arc<AtomicUsize>,
    hit: Arc<Notify>,
    resumed: Arc<Notify>,
}

#[derive(Debug, Clone, Copy)]
struct Rule {
    word: &'static str,
    strike: Fault,
    hits_max: usize,
    /// The word is in a statement that is prepared first. The fault hits the next exchange, which executes it.
    prepared: bool,
}

impl FaultProxy {
    /// A proxy to `target` (`host:port`) that breaks the first `hits_max` requests with `word` in them.
    pub async fn to(target: &str, word: &'static str, strike: Fault, hits_max: usize) -> Self {
        Self::with(target, Rule { word, strike, hits_max, prepared: false }).await
    }

    /// A proxy to the PostgreSQL server of a URL, and the URL through it. `word` is in the text of the statement to
    /// break. `COMMIT` is not prepared, so the fault hits it as it is sent.
    pub async fn to_statements(url: &str, word: &'static str, strike: Fault, hits_max: usize) -> (Self, String) {
        let target = authority(url);
        let wire = Self::with(target, Rule { word, strike, hits_max, prepared: word != "COMMIT" }).await;
        let through = url.replacen(target, &wire.address.to_string(), 1);
        (wire, through)
    }

    async fn with(target: &str, rule: Rule) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("address");
        let wire = Self { address, hits: Arc::default(), hit: Arc::default(), resumed: Arc::default() };
        let (own, target) = (wire.clone(), target.to_owned());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if let Ok(server) = TcpStream::connect(&target).await {
                    let wire = own.clone();
                    tokio::spawn(async move { wire.carry(client, server, rule).await });
                }
            }
        });
        wire
    }

    /// The proxy's address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The number of requests that it has broken.
    #[must_use]
    pub fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }

    /// Waits until it breaks the first request.
    pub async fn is_hit(&self) {
        self.hit.notified().await;
    }

    /// Lets the request continue that [`Fault::Pause`] stopped.
    pub fn resume(&self) {
        self.resumed.notify_one();
    }

    async fn carry(&self, mut client: TcpStream, mut server: TcpStream, rule: Rule) {
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (mut up, mut down) = (vec![0_u8; CHUNK_BYTES], vec![0_u8; CHUNK_BYTES]);
        // Whether the statement with the word has been prepared, and whether the next answer is the one to lose.
        let (mut prepared, mut striking) = (false, false);
        loop {
            tokio::select! {
                read = client.read(&mut up) => {
                    let Ok(count @ 1..) = read else { return };
                    let bytes = &up[..count];
                    let found = bytes.windows(rule.word.len()).any(|window| window == rule.word.as_bytes());
                    if rule.prepared && found {
                        prepared = true;
                    } else if (prepared || found) && !striking && self.strikes(rule.hits_max) {
                        prepared = false;
                        match rule.strike {
                            Fault::Before => return,
                            Fault::Pause => self.resumed.notified().await,
                            Fault::After | Fault::Silence => striking = true,
                        }
                    }
                    if server.write_all(bytes).await.is_err() { return }
                }
                read = server.read(&mut down) => {
                    let Ok(count @ 1..) = read else { return };
                    match rule.strike {
                        Fault::After if striking => return,
                        Fault::Silence if striking => {}
                        _ => if client.write_all(&down[..count]).await.is_err() { return },
                    }
                }
            }
        }
    }

    fn strikes(&self, hits_max: usize) -> bool {
        let struck =
            self.hits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |hits| (hits < hits_max).then_some(hits + 1));
        if struck.is_ok() {
            self.hit.notify_one();
        }
        struck.is_ok()
    }
}
