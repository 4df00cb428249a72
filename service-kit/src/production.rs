//! The checks of settings in production, and the one place that decides whether this is production.
//!
//! `ENVIRONMENT=production` turns settings for local trials into startup faults: well-known passwords, links without
//! verified TLS, and everything that callers pass to [`SettingsReader::refuse_in_production`].

use std::net::{IpAddr, SocketAddr};

use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::process::settings::{Secret, SettingsReader};

/// Passwords that the scripts set on servers for local trials. They are public, so everybody knows them.
const LOCAL_PASSWORDS: [&str; 3] = ["postgres", "booking_password", "guest"];

impl SettingsReader {
    /// Reads the address of a server, with its password. `local_default` serves local trials only: in production, a
    /// well-known password is a fault.
    pub fn address(&mut self, name: &str, local_default: &str) -> Secret {
        let address = self.secret(name, local_default);
        if let Some(password) = known_password(address.reveal()) {
            self.refuse_in_production(format!(
                "{name} has the password {password}, which everybody knows; set another one on the server and in {name}"
            ));
        }
        address
    }

    /// Whether the process serves real customers: `ENVIRONMENT` is `production` or `prod`, in upper or lower case.
    pub fn is_production(&mut self) -> bool {
        let environment = self.or("ENVIRONMENT", "development".to_owned());
        ["production", "prod"].iter().any(|name| environment.trim().eq_ignore_ascii_case(name))
    }

    /// Adds this fault if this is production. Start-up reports all faults together, not only the first.
    pub fn refuse_in_production(&mut self, fault: impl Into<String>) {
        if self.is_production() {
            self.fault(format!("{} (refused because ENVIRONMENT=production)", fault.into()));
        }
    }

    /// In production, adds a fault for each of `links` (setting and URL) that leaves the machine without verified TLS.
    /// It adds another if other machines would reach the server in plaintext: `listen` is not loopback, and neither a
    /// certificate nor a proxy provides TLS.
    pub fn require_tls(&mut self, listen: SocketAddr, has_certificate: bool, links: &[(&str, &str)]) {
        let by_proxy = self.or("TLS_TERMINATED_BY_PROXY", false);
        if !self.is_production() {
            return;
        }
        if !has_certificate && !by_proxy && !listen.ip().is_loopback() {
            self.fault(
                "ENVIRONMENT=production needs TLS_CERTIFICATE and TLS_PRIVATE_KEY, or TLS_TERMINATED_BY_PROXY=true where only a proxy \
                 that speaks TLS reaches this process",
            );
        }
        for (setting, url) in links {
            if let Some(remedy) = remedy_of_plaintext(url) {
                self.fault(format!(
                    "{setting} leads to another machine without verified TLS, which ENVIRONMENT=production forbids; {remedy}"
                ));
            }
        }
    }
}

/// How to make an unsafe link safe; `None` if it is safe. A link to this machine is safe. The code that uses an invalid
/// URL reports it.
fn remedy_of_plaintext(url: &str) -> Option<&'static str> {
    let parsed = reqwest::Url::parse(url).ok()?;
    let scheme = parsed.scheme();
    if scheme.starts_with("postgres") {
        let options: PgConnectOptions = url.parse().ok()?;
        let local = options.get_socket().is_some() || is_local(options.get_host());
        let verified = matches!(options.get_ssl_mode(), PgSslMode::VerifyFull);
        return (!local && !verified).then_some("add sslmode=verify-full to it");
    }
    if parsed.host_str().is_none_or(is_local) {
        return None;
    }
    match scheme {
        "redis" => Some("use rediss://"),
        "amqp" => Some("use amqps://"),
        "http" => Some("use https://"),
        _ => None,
    }
}

fn is_local(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The password of this URL, if it is one of [`LOCAL_PASSWORDS`]. An AMQP URL without a password means `guest`, the
/// library's own default.
fn known_password(url: &str) -> Option<String> {
    let url = reqwest::Url::parse(url).ok()?;
    let in_query = || url.query_pairs().find(|(name, _)| name == "password").map(|(_, value)| value.into_owned());
    let password = url.password().map(str::to_owned).or_else(in_query);
    let password = match password {
        None if url.scheme().starts_with("amqp") => "guest".to_owned(),
        given => given?,
    };
    LOCAL_PASSWORDS.contains(&password.as_str()).then_some(password)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_that_everybody_knows_are_refused_in_production_alone() {
        let known = [
            "postgres://postgres:postgres@db/event_service",
            "postgres://db/event_service?user=postgres&password=postgres",
            "postgres://booking_user:booking_password@db/booking_db",
            "amqp://guest:guest@broker/%2f",
            "amqps://broker",
        ];
        let own = [
            "postgres://postgres:8Zk2@db/event_service",
            "postgres://db/event_service",
            "amqp://guest:8Zk2@broker/%2f",
        ];
        for (environment, url, faults) in known
            .map(|url| ("production", url, true))
            .into_iter()
            .chain(own.map(|url| ("Production", url, false)))
            .chain(known.map(|url| ("staging", url, false)))
        {
            let mut reader = SettingsReader::new(move |name| match name {
                "ENVIRONMENT" => Some(environment.to_owned()),
                "ADDRESS" => Some(url.to_owned()),
                _ => None,
            });
            reader.address("ADDRESS", "");
            let said = reader.finish(()).err().map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(said.contains("ADDRESS"), faults, "{url} in {environment}: {said}");
            assert!(!said.contains(url), "the address is shown with its password: {said}");
        }
    }

    fn faults(pairs: &'static [(&'static str, &'static str)], links: &[(&str, &str)]) -> String {
        let mut reader =
            SettingsReader::new(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()));
        let host = reader.or("HOST", IpAddr::from([0, 0, 0, 0]));
        reader.require_tls(SocketAddr::new(host, 8000), false, links);
        reader.finish(()).err().map(|error| error.to_string()).unwrap_or_default()
    }

    const PLAIN: [(&str, &str); 4] = [
        ("DATABASE_URL", "postgres://u:secret@db.example.com/x?sslmode=require"),
        ("REDIS_URL", "redis://redis.example.com:6379"),
        ("RABBITMQ_URL", "amqp://u:secret@10.0.0.1:5672/%2f"),
        ("EVENT_SERVICE_URL", "http://event.example.com"),
    ];

    #[test]
    fn production_names_every_link_that_is_not_verified_and_no_secret() {
        let found = faults(&[("ENVIRONMENT", "production")], &PLAIN);
        let remedies = ["TLS_CERTIFICATE", "sslmode=verify-full", "rediss://", "amqps://", "https://"];
        for part in remedies.into_iter().chain(PLAIN.map(|(setting, _)| setting)) {
            assert!(found.contains(part), "{part} is missing in: {found}");
        }
        assert!(!found.contains("secret"), "{found}");
        assert_eq!(faults(&[], &PLAIN), "", "development asks for none of it");
    }

    #[test]
    fn production_takes_verified_links_and_those_within_the_machine() {
        let good = [
            ("DATABASE_URL", "postgres://u:p@db.example.com/x?sslmode=verify-full"),
            ("DATABASE_URL", "postgres://u:p@127.0.0.1:5433/x"),
            ("DATABASE_URL", "postgres://u:p@%2Fvar%2Frun%2Fpostgresql/x"),
            ("REDIS_URL", "rediss://redis.example.com"),
            ("REDIS_URL", "redis://localhost:6379"),
            ("RABBITMQ_URL", "amqps://u:p@broker.example.com"),
            ("RABBITMQ_URL", "amqp://u:p@[::1]:5672/%2f"),
            ("EVENT_SERVICE_URL", "https://event.example.com"),
        ];
        let found = faults(&[("ENVIRONMENT", "production"), ("TLS_TERMINATED_BY_PROXY", "true")], &good);
        assert!(!found.contains("TLS"), "{found}");
        let found = faults(&[("ENVIRONMENT", "production"), ("HOST", "127.0.0.1")], &good);
        assert!(!found.contains("TLS"), "{found}");
    }
}
