//! A certificate authority for tests, and a proxy that speaks TLS in front of a server that does not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::{unique, wires};
use crate::http::tls::{ServerCertificate, Trust, install_crypto_provider};
use crate::process::settings::SettingsReader;

/// The first bytes of a PostgreSQL client that wants TLS.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 22;

/// A certificate authority that nobody trusts by default.
pub struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

/// A certificate and its private key, in PEM.
#[derive(Clone)]
pub struct Pair {
    /// The certificate in PEM form.
    pub certificate: String,
    /// The certificate's private key in PEM form.
    pub key: String,
}

impl TestCa {
    /// Creates an authority, valid until 2100, and writes its certificate to a temporary file.
    #[must_use]
    pub fn new() -> Self {
        install_crypto_provider();
        let mut params = params(&[], 2100);
        params.distinguished_name.push(DnType::CommonName, unique("authority"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let file = std::env::temp_dir().join(unique("authority"));
        std::fs::write(&file, params.self_signed(&key).expect("a certificate").pem()).expect("a file");
        Self { issuer: Issuer::new(params, key), file }
    }

    /// The file with the authority's certificate, in PEM.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Trust in this authority, besides the public ones.
    #[must_use]
    pub fn trust(&self) -> Trust {
        Trust::from_file(&self.file).expect("a certificate of an authority")
    }

    /// A certificate for `localhost` and `127.0.0.1`, valid until 2100.
    #[must_use]
    pub fn local(&self) -> Pair {
        self.issue(&["localhost", "127.0.0.1"], 2100)
    }

    /// A certificate for these names or addresses, which expires at the beginning of the year `ends`.
    #[must_use]
    pub fn issue(&self, names: &[&str], ends: i32) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let certificate = params(names, ends).signed_by(&key, &self.issuer).expect("a certificate");
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

impl Drop for TestCa {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Default for TestCa {
    fn default() -> Self {
        Self::new()
    }
}

fn params(names: &[&str], ends: i32) -> CertificateParams {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names).expect("names");
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(ends, 1, 1));
    params
}

impl Pair {
    /// The pair in the form that a server uses.
    #[must_use]
    pub fn for_server(&self) -> ServerCertificate {
        let pair = self.clone();
        let mut reader = SettingsReader::new(move |name| match name {
            "TLS_CERTIFICATE" => Some(pair.certificate.clone()),
            "TLS_PRIVATE_KEY" => Some(pair.key.clone()),
            _ => None,
        });
        let certificate = ServerCertificate::read(&mut reader);
        reader.finish(certificate).expect("a certificate").expect("a certificate")
    }
}

/// A proxy that speaks TLS to clients, with PostgreSQL's protocol too, and plaintext to the server.
#[derive(Debug, Clone)]
pub struct TlsProxy {
    heard: Arc<AtomicUsize>,
    in_clear: Arc<AtomicUsize>,
}

impl TlsProxy {
    /// Starts a proxy in front of the server of a URL. Returns it with the URL that leads through it, by verified TLS.
    pub async fn in_front_of(url: &str, pair: &Pair) -> (Self, String) {
        let target = wires::authority(url).to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("address");
        let acceptor = TlsAcceptor::from(Arc::new(pair.for_server().config().expect("a configuration")));
        let proxy = Self { heard: Arc::default(), in_clear: Arc::default() };
        let (this, server) = (proxy.clone(), target.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (this, acceptor, server) = (this.clone(), acceptor.clone(), server.clone());
                tokio::spawn(async move { this.carry(client, &acceptor, &server).await });
            }
        });
        let url = url.replacen(&target, &address.to_string(), 1);
        let (scheme, rest) = url.split_once("://").expect("a URL");
        let url = match scheme {
            "postgres" => {
                let url = url.replace("sslmode=prefer", "sslmode=verify-full");
                let separator = if url.contains('?') { '&' } else { '?' };
                if url.contains("sslmode=") { url } else { format!("{url}{separator}sslmode=verify-full") }
            }
            plain => format!("{plain}s://{rest}"),
        };
        (proxy, url)
    }

    /// Bytes that clients have sent under TLS.
    #[must_use]
    pub fn heard(&self) -> usize {
        self.heard.load(Ordering::SeqCst)
    }

    /// Connections that did not begin with TLS.
    #[must_use]
    pub fn in_clear(&self) -> usize {
        self.in_clear.load(Ordering::SeqCst)
    }

    async fn carry(&self, mut client: TcpStream, acceptor: &TlsAcceptor, server: &str) {
        let mut first = [0];
        if !matches!(client.peek(&mut first).await, Ok(1)) {
            return;
        }
        if first[0] != HANDSHAKE {
            let mut request = [0; SSL_REQUEST.len()];
            if client.read_exact(&mut request).await.is_err() || request != SSL_REQUEST {
                self.in_clear.fetch_add(1, Ordering::SeqCst);
                return;
            }
            if client.write_all(b"S").await.is_err() {
                return;
            }
        }
        let Ok(client) = acceptor.accept(client).await else { return };
        let Ok(server) = TcpStream::connect(server).await else { return };
        let _ = (client.get_ref().0.set_nodelay(true), server.set_nodelay(true));
        let (mut from_client, mut to_client) = tokio::io::split(client);
        let (mut from_server, mut to_server) = server.into_split();
        let up = async {
            let mut bytes = vec![0; 32 * 1024];
            while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
                self.heard.fetch_add(count, Ordering::SeqCst);
                if to_server.write_all(&bytes[..count]).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = up => {}
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        }
    }
}
