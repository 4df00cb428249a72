//! The settings that decide how callers are identified.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

use super::internal::InternalKeys;
use super::jwk_set;
use crate::http::tls::Trust;
use crate::process::settings::{Secret, SettingsReader};

/// The shortest secret: as long as the digest that it keys (RFC 7518, section 3.2).
const SECRET_BYTES_MIN: usize = 32;

/// How callers are identified.
#[derive(Debug, Clone, Default)]
pub struct AuthSettings {
    /// `AUTH_MODE`: how users are identified.
    pub mode: AuthMode,
    /// `INTERNAL_API_KEY`, `INTERNAL_API_KEY_PREVIOUS`: how other services are identified.
    pub internal_keys: InternalKeys,
}

/// How users are identified.
#[derive(Debug, Clone, Default)]
pub enum AuthMode {
    /// By `X-User-ID`, which anyone may write.
    #[default]
    Header,
    /// By the `sub` of a signed token.
    Jwt(JwtSettings),
}

/// Which tokens are accepted.
#[derive(Debug, Clone)]
pub struct JwtSettings {
    /// `JWT_SECRET`, `JWT_JWKS_FILE` or `JWT_JWKS_URL`: the keys that verify tokens.
    pub keys: KeySource,
    /// `JWT_ISSUER`: the `iss` that a token must have.
    pub issuer: String,
    /// `JWT_AUDIENCE`: the `aud` that a token must have.
    pub audience: String,
    /// `JWT_LEEWAY_SECONDS`: how far the issuer's clock may differ from ours.
    pub leeway: Duration,
    /// The authorities to trust when the keys come from a URL.
    pub trust: Trust,
}

/// The source of the keys that verify tokens. The kind of key decides which algorithms are accepted.
#[derive(Debug, Clone)]
pub enum KeySource {
    /// A secret shared with the issuer: HS256.
    Secret(Secret),
    /// A file with the issuer's public keys (RFC 7517): RS256, ES256, EdDSA.
    File(PathBuf),
    /// A URL of such a file, by HTTP or HTTPS.
    Url(Url),
}

impl AuthSettings {
    /// Reads these settings, and adds a fault for each that can't be used.
    pub fn read(reader: &mut SettingsReader, trust: &Trust) -> Self {
        let mode = match reader.or("AUTH_MODE", "header".to_owned()).as_str() {
            "header" => {
                reader.refuse_in_production(
                    "AUTH_MODE=header accepts any X-User-ID and must not run with ENVIRONMENT=production; set AUTH_MODE=jwt",
                );
                AuthMode::Header
            }
            "jwt" => JwtSettings::read(reader, trust).map(AuthMode::Jwt).unwrap_or_default(),
            other => {
                reader.fault(format!("AUTH_MODE={other} is unknown; the modes are header and jwt"));
                AuthMode::Header
            }
        };
        Self { mode, internal_keys: InternalKeys::read(reader) }
    }

    /// Whether any `X-User-ID` is accepted.
    #[must_use]
    pub fn is_by_header(&self) -> bool {
        matches!(self.mode, AuthMode::Header)
    }

    /// The settings of the internal listener, which verifies no tokens.
    #[must_use]
    pub fn internal_only(&self) -> Self {
        Self { mode: AuthMode::Header, internal_keys: self.internal_keys.clone() }
    }

    /// Logs a warning for each setting that lets anyone act as a user or as a service.
    pub fn warn(&self) {
        if self.is_by_header() {
            tracing::warn!("AUTH_MODE=header: anyone may act as anyone by the X-User-ID header; for local trials only");
        }
        if !self.internal_keys.are_set() {
            tracing::warn!(
                "INTERNAL_API_KEY is not set: anyone may change seats by /api/internal; for local trials only"
            );
        }
    }
}

impl JwtSettings {
    /// Reads these settings, and adds a fault for each that is missing or can't be used. `None` when one has no value
    /// to use.
    pub fn read(reader: &mut SettingsReader, trust: &Trust) -> Option<Self> {
        let mut needed = |name: &str| {
            let value = reader.optional(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
            if value.is_none() {
                reader.fault(format!("{name} is not set; with AUTH_MODE=jwt a token must name it"));
            }
            value
        };
        let (issuer, audience) = (needed("JWT_ISSUER"), needed("JWT_AUDIENCE"));
        let second = Duration::from_secs(1);
        let leeway = reader.duration("JWT_LEEWAY_SECONDS", second, 10.0, 0.0, 300.0);
        Some(Self {
            keys: KeySource::read(reader)?,
            issuer: issuer?,
            audience: audience?,
            leeway,
            trust: trust.clone(),
        })
    }
}

impl KeySource {
    fn read(reader: &mut SettingsReader) -> Option<Self> {
        let names = ["JWT_SECRET", "JWT_JWKS_FILE", "JWT_JWKS_URL"];
        match names.map(|name| reader.optional(name)) {
            [Some(secret), None, None] => {
                let length = secret.len();
                if length < SECRET_BYTES_MIN {
                    reader.fault(format!(
                        "JWT_SECRET has {length} bytes; HS256 needs {SECRET_BYTES_MIN} at least, from `openssl rand -base64 48`"
                    ));
                }
                Some(Self::Secret(Secret::from(secret.as_str())))
            }
            [None, Some(path), None] => {
                let path = PathBuf::from(path);
                if let Err(error) = jwk_set::check_file(&path) {
                    reader.fault(format!("JWT_JWKS_FILE={} can't be used: {error:#}", path.display()));
                }
                Some(Self::File(path))
            }
            [None, None, Some(text)] => match Url::parse(text.trim()) {
                Ok(url) if matches!(url.scheme(), "http" | "https") => {
                    if url.scheme() == "http" {
                        reader.refuse_in_production(
                            "JWT_JWKS_URL uses plain HTTP, so anyone on the network could replace the keys; use https",
                        );
                    }
                    Some(Self::Url(url))
                }
                _ => {
                    reader.fault(format!("JWT_JWKS_URL={text} is not an http or https URL"));
                    None
                }
            },
            given => {
                let set: Vec<&str> =
                    names.into_iter().zip(&given).filter(|(_, v)| v.is_some()).map(|(n, _)| n).collect();
                let set = if set.is_empty() { "none".to_owned() } else { set.join(" and ") };
                reader.fault(format!(
                    "AUTH_MODE=jwt needs exactly one of JWT_SECRET, JWT_JWKS_FILE and JWT_JWKS_URL; set: {set}"
                ));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_tokens_are_complete_or_refused() {
        let jwt = |more: &'static [(&'static str, &'static str)]| {
            let mut reader = SettingsReader::new(move |name| {
                let all = [("AUTH_MODE", "jwt"), ("JWT_ISSUER", "me"), ("JWT_AUDIENCE", "you")];
                all.iter().chain(more).rev().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            });
            AuthSettings::read(&mut reader, &Trust::default());
            reader.finish(()).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(jwt(&[("JWT_SECRET", "a secret of thirty-two bytes or more")]), "");
        assert_eq!(jwt(&[("JWT_JWKS_URL", "https://login.example.com/jwks.json")]), "");
        for (more, part) in [
            (&[][..], "set: none"),
            (&[("JWT_SECRET", "short")], "JWT_SECRET has 5 bytes"),
            (&[("JWT_SECRET", "x"), ("JWT_JWKS_URL", "https://a")], "JWT_SECRET and JWT_JWKS_URL"),
            (&[("JWT_JWKS_FILE", "/nonexistent")], "/nonexistent"),
            (&[("JWT_JWKS_FILE", "/dev/null")], "not a JWK set"),
            (&[("JWT_JWKS_URL", "ftp://a")], "JWT_JWKS_URL"),
            (&[("JWT_ISSUER", "")], "JWT_ISSUER"),
            (&[("JWT_AUDIENCE", " ")], "JWT_AUDIENCE"),
            (&[("JWT_LEEWAY_SECONDS", "3600")], "JWT_LEEWAY_SECONDS"),
            (&[("AUTH_MODE", "none")], "AUTH_MODE=none"),
            (&[("INTERNAL_API_KEY_PREVIOUS", "x")], "without INTERNAL_API_KEY"),
            (&[("JWT_JWKS_URL", "http://a"), ("ENVIRONMENT", "production")], "JWT_JWKS_URL uses plain HTTP"),
        ] {
            let said = jwt(more);
            assert!(said.contains(part), "{more:?}: {said}");
        }
    }
}
