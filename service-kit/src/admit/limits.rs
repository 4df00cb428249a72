//! The limits that operators set for clients, connections and request times: the settings of `rate_limit.rs`,
//! `connections.rs`, `client_address.rs` and `security_headers.rs`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use axum::http::HeaderValue;

use crate::http::client_address::Proxies;
use crate::process::settings::{Secret, SettingsReader};

/// The largest body of an ordinary call. A route that accepts larger ones sets its own limit.
pub const BODY_BYTES_MAX: usize = 256 * 1024;

/// All limits of a process.
#[derive(Debug, Clone)]
pub struct Limits {
    /// `CONNECTIONS_MAX`: connections of one process, each an open file. Any more get a bare `503`.
    pub connections_max: usize,
    /// `REQUEST_HEADER_TIMEOUT_SECONDS`: the time from the first byte of a request's head to its last.
    pub header_time_max: Duration,
    /// `REQUEST_BODY_TIMEOUT_SECONDS`: the time for a body of ordinary size. A larger one has the time of the request.
    pub body_time_max: Duration,
    /// `KEEP_ALIVE_SECONDS`: how long a connection may be idle. It must exceed what proxies allow on their side (60 s),
    /// or a proxy would use a connection that is just being closed.
    pub idle_time_max: Duration,
    /// `RATE_LIMIT_ENABLED`, and the limit of each kind of call; `None`: no rate limits.
    pub rates: Option<Rates>,
    /// `REDIS_URL`: where replicas report to each other what callers used. `None`: each replica counts for itself.
    pub redis_url: Option<Secret>,
    /// `TRUSTED_PROXIES`, `TRUSTED_PROXY_HEADER`: how to find a client's address behind proxies.
    pub proxies: Proxies,
    /// `CORS_ALLOWED_ORIGINS`: the origins whose pages may call from a browser.
    pub cors_allowed_origins: Vec<HeaderValue>,
    /// Whether answers instruct browsers to use HTTPS only. It is on in production.
    pub is_https_only: bool,
}

/// How often a caller may call, by kind of call.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// `RATE_LIMIT_READ`: seat maps, lists, and all other calls that change nothing.
    pub read: Rate,
    /// `RATE_LIMIT_HOLD`: new reservations.
    pub hold: Rate,
    /// `RATE_LIMIT_CONFIRM`: calls about what the caller has: paying, cancelling, tickets.
    pub confirm: Rate,
    /// `RATE_LIMIT_ADMIN`: changes of the catalogue.
    pub admin: Rate,
    /// `RATE_LIMIT_ADDRESS_FACTOR`: all callers of one address together may call this many times as often as one user.
    /// A house full of buyers may share an address.
    pub address_factor: u32,
}

/// A rate limit: calls per second in the long run, and calls at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Calls per second; 0: no limit.
    pub per_second: f64,
    /// Calls at once, after a pause.
    pub burst: u32,
}

impl FromStr for Rate {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str =
            "a rate is calls per second and calls at once, such as 20,100 (up to 100000 and 1000000); 0 is no limit";
        if text.trim() == "0" {
            return Ok(Self { per_second: 0.0, burst: 1 });
        }
        let (per_second, burst) = text.split_once(',').ok_or(FORM)?;
        let rate = Self {
            per_second: per_second.trim().parse().map_err(|_| FORM)?,
            burst: burst.trim().parse().map_err(|_| FORM)?,
        };
        let is_usable = (0.001..=100_000.0).contains(&rate.per_second) && (1..=1_000_000).contains(&rate.burst);
        if is_usable { Ok(rate) } else { Err(FORM) }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.per_second, self.burst)
    }
}

impl Default for Limits {
    /// No rate limits and no proxies, for tests. The times are those of the default settings.
    fn default() -> Self {
        Self {
            connections_max: 8192,
            header_time_max: Duration::from_secs(10),
            body_time_max: Duration::from_secs(10),
            idle_time_max: Duration::from_secs(75),
            rates: None,
            redis_url: None,
            proxies: Proxies::default(),
            cors_allowed_origins: Vec::new(),
            is_https_only: false,
        }
    }
}

impl Limits {
    /// Reads the limits from the environment.
    pub(crate) fn read(reader: &mut SettingsReader) -> Self {
        let second = Duration::from_secs(1);
        let rates = Rates {
            // Enough for a seat map every second, and the calls around it.
            read: reader.or("RATE_LIMIT_READ", Rate { per_second: 20.0, burst: 100 }),
            // No buyer chooses seats faster, and no sale is over before the second try.
            hold: reader.or("RATE_LIMIT_HOLD", Rate { per_second: 2.0, burst: 20 }),
            confirm: reader.or("RATE_LIMIT_CONFIRM", Rate { per_second: 10.0, burst: 100 }),
            admin: reader.or("RATE_LIMIT_ADMIN", Rate { per_second: 20.0, burst: 200 }),
            address_factor: reader.within("RATE_LIMIT_ADDRESS_FACTOR", 20, 1, 10_000),
        };
        Self {
            connections_max: reader.within("CONNECTIONS_MAX", 8192, 1, 1_000_000),
            header_time_max: reader.duration("REQUEST_HEADER_TIMEOUT_SECONDS", second, 10.0, 0.1, 60.0),
            body_time_max: reader.duration("REQUEST_BODY_TIMEOUT_SECONDS", second, 10.0, 0.1, 60.0),
            idle_time_max: reader.duration("KEEP_ALIVE_SECONDS", second, 75.0, 1.0, 3600.0),
            rates: reader.or("RATE_LIMIT_ENABLED", true).then_some(rates),
            redis_url: Some(reader.secret("REDIS_URL", "redis://localhost:6379")),
            proxies: Proxies::read(reader),
            cors_allowed_origins: origins(reader),
            is_https_only: reader.is_production(),
        }
    }
}

/// Reads the origins. A browser sends an origin as `https://host[:port]` and nothing else, so one with a path would
/// never match.
fn origins(reader: &mut SettingsReader) -> Vec<HeaderValue> {
    let text = reader.or("CORS_ALLOWED_ORIGINS", String::new());
    let mut origins = Vec::new();
    for origin in text.split(',').map(str::trim).filter(|origin| !origin.is_empty()) {
        let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
        match (host, HeaderValue::from_str(origin)) {
            (Some(host), Ok(value)) if !host.is_empty() && !host.contains(['/', '*', '@', ' ']) => origins.push(value),
            _ => reader.fault(format!(
                "CORS_ALLOWED_ORIGINS names {origin}; an origin is like https://shop.example.com, without path or *"
            )),
        }
    }
    origins
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &'static [(&'static str, &'static str)]) -> Result<Limits, String> {
        let mut reader =
            SettingsReader::new(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()));
        let limits = Limits::read(&mut reader);
        reader.finish(limits).map_err(|error| error.to_string())
    }

    #[test]
    fn a_rate_is_read_as_it_is_written_and_a_wrong_one_is_a_fault() {
        assert_eq!("2.5, 7".parse(), Ok(Rate { per_second: 2.5, burst: 7 }));
        assert_eq!(Rate { per_second: 2.5, burst: 7 }.to_string(), "2.5,7");
        for wrong in ["", "5", "5/s", "5,0", "-1,5", "NaN,5", "1,2,3"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
        let faults = read(&[
            ("RATE_LIMIT_HOLD", "many"),
            ("CORS_ALLOWED_ORIGINS", "https://a.example, *, https://b.example/x"),
            ("TRUSTED_PROXIES", "10.0.0.0/8, nobody"),
            ("TRUSTED_PROXY_HEADER", "x-real-ip"),
        ])
        .unwrap_err();
        for part in ["RATE_LIMIT_HOLD=many", "names *;", "https://b.example/x", "names nobody", "x-real-ip"] {
            assert!(faults.contains(part), "{part} is missing in {faults}");
        }
    }

    #[test]
    fn limits_are_on_unless_they_are_switched_off() {
        assert!(read(&[]).unwrap().rates.is_some());
        assert!(read(&[("RATE_LIMIT_ENABLED", "false")]).unwrap().rates.is_none());
    }
}
