//! The settings that every process has: where it listens, how it logs, its limits, who may call it, and its
//! certificates.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use crate::admit::limits::Limits;
use crate::auth::AuthSettings;
use crate::http::tls::{ServerCertificate, Trust};
use crate::observe::traces::TraceSettings;
use crate::process::settings::SettingsReader;

/// The settings of every process, read once at start.
#[derive(Debug, Clone)]
pub struct Common {
    /// `HOST`, `PORT`: the address on which the HTTP server listens.
    pub listen: SocketAddr,
    /// `LOG_LEVEL`: a level, or filter directives of `tracing_subscriber::EnvFilter`.
    pub log_level: String,
    /// `LOG_FORMAT`: `json` or `pretty`.
    pub log_format: LogFormat,
    /// `REQUESTS_IN_FLIGHT_MAX`: any more requests get `503` at once, because a longer queue helps no buyer. At 500
    /// bookings a second and core, the last of a thousand already waits two seconds.
    pub requests_in_flight_max: usize,
    /// `REQUEST_TIMEOUT_SECONDS`: the longest time that a client waits for its answer, also when a database stops
    /// answering. A change of state that has begun still runs to its end.
    pub request_time_max: Duration,
    /// How much a client may send, how often, and in what time.
    pub limits: Limits,
    /// `AUTH_*`, `JWT_*`, `INTERNAL_API_KEY`: how callers prove their identity.
    pub auth: AuthSettings,
    /// `OTEL_*`: the collector that traces are sent to.
    pub traces: TraceSettings,
    /// `TLS_CERTIFICATE`, `TLS_PRIVATE_KEY`: the certificate of the HTTP server. Without one it speaks plaintext.
    pub certificate: Option<ServerCertificate>,
    /// `TLS_CA_FILE`: certificate authorities that every link trusts beside the public ones.
    pub trust: Trust,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line, for machines.
    Json,
    /// Lines with colours and indentation, for people.
    Pretty,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Pretty => "pretty",
        })
    }
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "json" => Ok(Self::Json),
            "pretty" => Ok(Self::Pretty),
            _ => Err("the formats are json and pretty"),
        }
    }
}

impl Common {
    /// Reads these settings; `port` is the default of `PORT`.
    pub fn read(reader: &mut SettingsReader, port: u16) -> Self {
        let host = reader.or("HOST", IpAddr::from([0, 0, 0, 0]));
        let port = reader.or("PORT", port);
        let trust = Trust::read(reader);
        Self {
            listen: SocketAddr::new(host, port),
            log_level: reader.or("LOG_LEVEL", "info".to_owned()).to_lowercase(),
            log_format: reader.or("LOG_FORMAT", LogFormat::Json),
            requests_in_flight_max: reader.within("REQUESTS_IN_FLIGHT_MAX", 1000, 1, 100_000),
            // Longer than a statement's timeout, so that a slow database and a silent one give different errors.
            request_time_max: reader.duration("REQUEST_TIMEOUT_SECONDS", Duration::from_secs(1), 30.0, 1.0, 60.0),
            limits: Limits::read(reader),
            auth: AuthSettings::read(reader, &trust),
            traces: TraceSettings::read(reader),
            certificate: ServerCertificate::read(reader),
            trust,
        }
    }

    /// In production, adds a fault for each of `links` (setting and URL) that leaves the machine without verified TLS,
    /// and one if this process itself would speak plaintext to other machines.
    pub fn require_tls(&self, reader: &mut SettingsReader, links: &[(&str, &str)]) {
        reader.require_tls(self.listen, self.certificate.is_some(), links);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_are_reported_at_once() {
        let pairs = [("PORT", "eighty"), ("LOG_FORMAT", "xml"), ("RATE", "2"), ("ENVIRONMENT", "production")];
        let lookup = move |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let mut reader = SettingsReader::new(lookup);
        Common::read(&mut reader, 8000);
        reader.within("RATE", 0.5, 0.0, 1.0);
        let error = reader.finish(()).unwrap_err().to_string();
        for part in ["PORT=eighty", "LOG_FORMAT=xml", "RATE=2", "ENVIRONMENT=production"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}
