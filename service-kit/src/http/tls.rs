//! TLS: the certificate that a service presents, and the authorities that it trusts.
//!
//! The whole tree has one crypto provider, aws-lc-rs. A service loads its certificate again when its files change; an
//! open connection keeps the certificate that it began with.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio_util::sync::CancellationToken;
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

use crate::process::settings::{Secret, SettingsReader};

/// The setting with the certificate and its intermediate certificates, in PEM.
const CERTIFICATE: &str = "TLS_CERTIFICATE";
/// The setting with the certificate's private key, in PEM.
const PRIVATE_KEY: &str = "TLS_PRIVATE_KEY";
/// How often the files are read. Certificates are renewed days before they expire.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Makes aws-lc-rs the crypto provider of this process. `main` calls it first. A second call, as tests make, changes
/// nothing.
pub fn install_crypto_provider() {
    if aws_lc_rs::default_provider().install_default().is_err() {
        tracing::debug!("a crypto provider is installed already");
    }
}

// --- the authorities that we trust --------------------------------------------------------

/// The certificate authorities that are trusted on every link: those of Mozilla's list, which browsers trust, and those
/// in the file of `TLS_CA_FILE`. Mozilla's list is compiled in, so that an image needs no list of its own.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    own: Arc<[CertificateDer<'static>]>,
    file: Option<Arc<Path>>,
}

impl Trust {
    /// Reads `TLS_CA_FILE`, and adds a fault if it can't be used.
    pub fn read(reader: &mut SettingsReader) -> Self {
        if reader.text_of("TLS_CA").is_some() {
            // The PostgreSQL client accepts only a file, which its URL names.
            reader.fault("TLS_CA must be a file: set TLS_CA_FILE to its path");
        }
        let Some(path) = reader.file_of("TLS_CA") else { return Self::default() };
        Self::from_file(Path::new(&path)).unwrap_or_else(|error| {
            reader.fault(format!("TLS_CA_FILE={path} can't be used: {error:#}"));
            Self::default()
        })
    }

    /// Trusts Mozilla's list and the certificates in this file, in PEM.
    ///
    /// # Errors
    /// The file can't be read, has no certificate, or has one that no authority could have.
    pub fn from_file(path: &Path) -> anyhow::Result<Self> {
        let own = certificates(&std::fs::read_to_string(path)?)?;
        let mut store = RootCertStore::empty();
        for (index, certificate) in own.iter().enumerate() {
            store.add(certificate.clone()).with_context(|| format!("certificate {} in it is broken", index + 1))?;
        }
        Ok(Self { own: own.into(), file: Some(path.into()) })
    }

    /// The certificates of `TLS_CA_FILE` in PEM, for libraries that add them to Mozilla's list. `None` if there are
    /// none.
    #[must_use]
    pub fn own_pem(&self) -> Option<String> {
        (!self.own.is_empty()).then(|| self.own.iter().map(to_pem).collect())
    }

    fn all_pem(&self) -> String {
        self.all().map(to_pem).collect()
    }

    /// An HTTP client that trusts these authorities and no others.
    pub fn http_client(&self) -> reqwest::ClientBuilder {
        // No certificate fails here: each was parsed before.
        let roots = self.all().filter_map(|certificate| reqwest::Certificate::from_der(certificate).ok());
        reqwest::Client::builder().tls_certs_only(roots)
    }

    /// A Redis client that trusts these authorities. It does not connect yet.
    ///
    /// # Errors
    /// The URL is not a Redis URL.
    pub fn redis_client(&self, url: &Secret) -> anyhow::Result<redis::Client> {
        let client =
            redis::Client::open(url.reveal()).context("REDIS_URL is not a Redis URL like redis://host:6379")?;
        let address = client.get_connection_info().clone();
        if !matches!(address.addr(), redis::ConnectionAddr::TcpTls { .. }) {
            return Ok(client);
        }
        let roots = redis::TlsCertificates { client_tls: None, root_cert: Some(self.all_pem().into_bytes()) };
        redis::Client::build_with_tls(address, roots).context("REDIS_URL can't be used with TLS")
    }

    /// The PostgreSQL URL with `TLS_CA_FILE` as its `sslrootcert`, unless the URL names one. It has no effect below
    /// `sslmode=verify-ca`.
    #[must_use]
    pub fn database_url(&self, url: Secret) -> Secret {
        let text = url.reveal();
        let query = text.split_once('?').map_or("", |(_, query)| query);
        let named = ["sslrootcert", "ssl-root-cert", "ssl-ca"];
        let names_one = form_urlencoded::parse(query.as_bytes()).any(|(name, _)| named.contains(&name.as_ref()));
        let Some(file) = self.file.as_ref().filter(|_| !names_one) else { return url };
        let pair =
            form_urlencoded::Serializer::new(String::new()).append_pair(named[0], &file.to_string_lossy()).finish();
        Secret::from(format!("{text}{}{pair}", if text.contains('?') { '&' } else { '?' }).as_str())
    }

    fn all(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        TLS_SERVER_ROOT_CERTS.iter().chain(self.own.iter())
    }
}

fn certificates(pem: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let found = found.context("it is not valid PEM, which begins with -----BEGIN CERTIFICATE-----")?;
    ensure!(!found.is_empty(), "it has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----");
    Ok(found)
}

fn to_pem(certificate: &CertificateDer<'_>) -> String {
    let text = BASE64_STANDARD.encode(certificate);
    let lines = text.as_bytes().chunks(64).map(|line| format!("{}\n", String::from_utf8_lossy(line)));
    format!("-----BEGIN CERTIFICATE-----\n{}-----END CERTIFICATE-----\n", lines.collect::<String>())
}

// --- the certificate that we present ------------------------------------------------------

/// The certificate that a server presents, and its private key. Both may change while the server runs.
#[derive(Clone)]
pub struct ServerCertificate(Arc<Shown>);

struct Shown {
    source: [Source; 2],
    provider: Arc<CryptoProvider>,
    key: RwLock<Arc<CertifiedKey>>,
}

/// The texts of certificate and key, or why they can't be read.
type Content = Result<[String; 2], String>;

/// Where the text of a setting comes from: the setting itself, or a file that it names.
enum Source {
    Text(Secret),
    File(PathBuf),
}

impl Source {
    fn of(reader: &SettingsReader, name: &str) -> Option<Self> {
        reader.file_of(name).map(|path| Self::File(path.into())).or_else(|| {
            let text = reader.text_of(name)?;
            Some(Self::Text(Secret::from(text.as_str())))
        })
    }

    fn read(&self, name: &str) -> anyhow::Result<String> {
        match self {
            Self::Text(text) => Ok(text.reveal().to_owned()),
            Self::File(path) => std::fs::read_to_string(path)
                .with_context(|| format!("{name}_FILE names {}, which can't be read", path.display())),
        }
    }
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate").finish_non_exhaustive()
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.key.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl ServerCertificate {
    /// Reads `TLS_CERTIFICATE` and `TLS_PRIVATE_KEY`. `None` when neither is set, or when they can't be used; the
    /// reader then has a fault.
    pub fn read(reader: &mut SettingsReader) -> Option<Self> {
        let source = match (Source::of(reader, CERTIFICATE), Source::of(reader, PRIVATE_KEY)) {
            (None, None) => return None,
            (Some(certificate), Some(key)) => [certificate, key],
            (certificate, _) => {
                let missing = if certificate.is_none() { CERTIFICATE } else { PRIVATE_KEY };
                reader.fault(format!("{missing} is missing; set both {CERTIFICATE} and {PRIVATE_KEY}"));
                return None;
            }
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        match texts(&source).and_then(|texts| load(&texts, &provider)) {
            Ok(key) => Some(Self(Arc::new(Shown { source, provider, key: RwLock::new(Arc::new(key)) }))),
            Err(error) => {
                reader.fault(format!("{error:#}"));
                None
            }
        }
    }

    /// The TLS configuration of a server with this certificate. It offers HTTP/1.1 only.
    pub(crate) fn config(&self) -> anyhow::Result<ServerConfig> {
        let versions = ServerConfig::builder_with_provider(Arc::clone(&self.0.provider));
        let builder = versions.with_safe_default_protocol_versions()?.with_no_client_auth();
        let mut config = builder.with_cert_resolver(Arc::clone(&self.0) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Reloads the certificate when its files change, until `stopping`. It compares contents, so the way of replacement
    /// does not matter: overwriting, renaming, or a link to another folder, as in Kubernetes.
    pub(crate) async fn follow(self, stopping: CancellationToken) -> anyhow::Result<()> {
        // The texts that were loaded at the start are not kept, so the first check loads them again.
        let mut seen = None;
        while stopping.run_until_cancelled(tokio::time::sleep(RELOAD_INTERVAL)).await.is_some() {
            self.refresh(&mut seen).await?;
        }
        Ok(())
    }

    /// Reads the files, and loads them unless they equal `seen` or can't be used.
    async fn refresh(&self, seen: &mut Option<Content>) -> anyhow::Result<()> {
        let now = self.content().await?;
        if seen.as_ref() == Some(&now) {
            return Ok(());
        }
        match now.clone().map_err(anyhow::Error::msg).and_then(|texts| load(&texts, &self.0.provider)) {
            Ok(key) => {
                let mut shown = self.0.key.write().unwrap_or_else(PoisonError::into_inner);
                if shown.cert != key.cert {
                    tracing::info!("The certificate has changed; new connections get the new one");
                }
                *shown = Arc::new(key);
            }
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "The new certificate can't be used; the previous one stays in use until its files are right"
            ),
        }
        *seen = Some(now);
        Ok(())
    }

    /// Reads the files on a blocking thread.
    async fn content(&self) -> anyhow::Result<Content> {
        let shown = Arc::clone(&self.0);
        let read = move || texts(&shown.source).map_err(|error| format!("{error:#}"));
        Ok(tokio::task::spawn_blocking(read).await?)
    }
}

/// Whether this process serves TLS, judged by its settings alone.
pub(crate) fn is_served(reader: &SettingsReader) -> bool {
    Source::of(reader, CERTIFICATE).is_some()
}

fn texts([certificate, key]: &[Source; 2]) -> anyhow::Result<[String; 2]> {
    Ok([certificate.read(CERTIFICATE)?, key.read(PRIVATE_KEY)?])
}

fn load([certificate, key]: &[String; 2], provider: &CryptoProvider) -> anyhow::Result<CertifiedKey> {
    let chain = certificates(certificate).with_context(|| format!("{CERTIFICATE} can't be used"))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
    let key = key.with_context(|| format!("{PRIVATE_KEY} has no private key in PEM"))?;
    CertifiedKey::from_der(chain, key, provider)
        .with_context(|| format!("{CERTIFICATE} and {PRIVATE_KEY} can't be used together"))
}

#[cfg(test)]
mod tests {
    use sqlx::postgres::PgConnectOptions;

    use super::*;

    fn faults(pairs: &'static [(&'static str, &'static str)]) -> String {
        let mut reader =
            SettingsReader::new(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()));
        drop((Trust::read(&mut reader), ServerCertificate::read(&mut reader)));
        reader.finish(()).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_is_wrong_with_certificates_is_said_by_the_name_of_the_setting() {
        let found = faults(&[("TLS_CA_FILE", "/dev/null"), ("TLS_CERTIFICATE", "only this one")]);
        assert!(found.contains("TLS_CA_FILE=/dev/null can't be used: it has no certificate"), "{found}");
        assert!(found.contains("TLS_PRIVATE_KEY is missing"), "{found}");
        assert!(faults(&[("TLS_CA", "text")]).contains("TLS_CA_FILE"));
        let found = faults(&[("TLS_CERTIFICATE_FILE", "/nonexistent/a"), ("TLS_PRIVATE_KEY", "b")]);
        assert!(found.contains("TLS_CERTIFICATE_FILE names /nonexistent/a"), "{found}");
    }

    #[test]
    fn a_database_url_gets_the_own_authorities_unless_it_names_its_own() {
        let path = Path::new("/etc/our authorities.pem");
        let trust = Trust { own: vec![TLS_SERVER_ROOT_CERTS[0].clone()].into(), file: Some(path.into()) };
        assert_eq!(*certificates(&trust.own_pem().unwrap()).unwrap(), *trust.own);
        for (url, grows) in [
            ("postgres://h/d", true),
            ("postgres://h/d?sslmode=verify-full", true),
            ("postgres://h/d?sslrootcert=/ca.pem", false),
        ] {
            let made = trust.database_url(Secret::from(url));
            assert_eq!(made.reveal().ends_with("=%2Fetc%2Four+authorities.pem"), grows, "{}", made.reveal());
            assert!(made.reveal().parse::<PgConnectOptions>().is_ok());
        }
        assert_eq!(Trust::default().database_url(Secret::from("postgres://h/d")).reveal(), "postgres://h/d");
    }
    #[cfg(feature = "testing")]
    #[tokio::test]
    async fn files_that_are_no_pair_leave_the_certificate_before() {
        use crate::testing::tls::{Pair, TestCa};
        let folder = std::env::temp_dir().join(crate::testing::unique("certificate"));
        std::fs::create_dir(&folder).unwrap();
        let write = |certificate: &str, key: &str| {
            std::fs::write(folder.join("crt"), certificate).unwrap();
            std::fs::write(folder.join("key"), key).unwrap();
        };
        let path = |file: &str| folder.join(file).to_str().unwrap().to_owned();
        let (certificate_file, key_file) = (path("crt"), path("key"));
        let (first, second): (Pair, Pair) = (TestCa::new().local(), TestCa::new().local());
        write(&first.certificate, &first.key);
        let mut reader = SettingsReader::new(move |name| match name {
            "TLS_CERTIFICATE_FILE" => Some(certificate_file.clone()),
            "TLS_PRIVATE_KEY_FILE" => Some(key_file.clone()),
            _ => None,
        });
        let certificate = ServerCertificate::read(&mut reader).unwrap();
        let shown = || certificate.0.key.read().unwrap().cert[0].clone();
        let (before, mut seen) = (shown(), None);
        for (text, key) in [("no certificate", "no key"), (&second.certificate, &first.key), ("", "")] {
            write(text, key);
            certificate.refresh(&mut seen).await.unwrap();
            assert_eq!(shown(), before, "{text}");
        }
        std::fs::remove_file(folder.join("key")).unwrap();
        certificate.refresh(&mut seen).await.unwrap();
        assert_eq!(shown(), before);
        write(&second.certificate, &second.key);
        certificate.refresh(&mut seen).await.unwrap();
        assert_ne!(shown(), before);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
