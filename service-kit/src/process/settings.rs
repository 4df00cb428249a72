//! Settings from the environment: typed, with all faults reported at once, secrets never shown.
//!
//! Every setting `NAME` can also come from the file that `NAME_FILE` names, which wins: that is how secrets are mounted.

use std::fmt::{self, Display};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use crate::admit::limits::Limits;
use crate::auth::AuthSettings;
use crate::http::tls::{ServerCertificate, Trust};
use crate::observe::traces::TraceSettings;

/// Passwords that the scripts give to servers for local trials, and that everybody knows.
const LOCAL_PASSWORDS: [&str; 3] = ["postgres", "booking_password", "guest"];

/// Where a setting's text comes from, by its name.
type Lookup = Box<dyn Fn(&str) -> Option<String>>;

/// Reads settings and gathers what is wrong with them.
pub struct SettingsReader {
    lookup: Lookup,
    faults: Vec<String>,
}

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("the settings have faults:{}", .0.iter().map(|fault| format!("\n  - {fault}")).collect::<String>())]
pub struct SettingsError(Vec<String>);

/// A secret: shown as `***` wherever it might be printed.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The secret itself, for the one place that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl SettingsReader {
    /// Reads the process's environment.
    #[must_use]
    pub fn from_env() -> Self {
        #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
        Self::new(|name| std::env::var(name).ok())
    }

    /// Reads from `lookup`; for tests.
    pub fn new(lookup: impl Fn(&str) -> Option<String> + 'static) -> Self {
        Self { lookup: Box::new(lookup), faults: Vec::new() }
    }

    /// A setting that may be absent. An empty one counts as absent, as compose files set it so.
    pub fn optional(&mut self, name: &str) -> Option<String> {
        if let Some(path) = self.file_of(name) {
            return match std::fs::read_to_string(&path) {
                Ok(text) => Some(text.trim_end_matches(['\r', '\n']).to_owned()).filter(|text| !text.is_empty()),
                Err(error) => {
                    self.faults.push(format!("{name}_FILE names {path}, which can't be read: {error}"));
                    None
                }
            };
        }
        self.text_of(name)
    }

    /// The file that a setting comes from.
    pub(crate) fn file_of(&self, name: &str) -> Option<String> {
        (self.lookup)(&format!("{name}_FILE")).filter(|path| !path.is_empty())
    }

    /// A setting's text, where it does not come from a file.
    pub(crate) fn text_of(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|text| !text.is_empty())
    }

    /// A setting with a default.
    pub fn or<T: FromStr<Err: Display>>(&mut self, name: &str, default: T) -> T {
        let Some(text) = self.optional(name) else {
            return default;
        };
        match text.trim().parse() {
            Ok(value) => value,
            Err(error) => {
                self.faults.push(format!("{name}={text} can't be used: {error}"));
                default
            }
        }
    }

    /// A number that must lie in a range, ends included.
    pub fn within<T: FromStr<Err: Display> + PartialOrd + Display + Copy>(
        &mut self,
        name: &str,
        default: T,
        min: T,
        max: T,
    ) -> T {
        let value = self.or(name, default);
        // A NaN compares with nothing, so the range is asked for and not its opposite.
        if value >= min && value <= max {
            return value;
        }
        self.faults.push(format!("{name}={value} must lie between {min} and {max}"));
        default
    }

    /// A duration, given in `unit`s as a decimal number between `min` and `max`.
    pub fn duration(&mut self, name: &str, unit: Duration, default: f64, min: f64, max: f64) -> Duration {
        unit.mul_f64(self.within(name, default, min, max))
    }

    /// A secret with a default that serves local trials only.
    pub fn secret(&mut self, name: &str, local_default: &str) -> Secret {
        Secret(self.optional(name).unwrap_or_else(|| local_default.to_owned()))
    }

    /// The address of a server, with its password, and a default that serves local trials only: in production a password that everybody
    /// knows is a fault.
    pub fn address(&mut self, name: &str, local_default: &str) -> Secret {
        let address = self.secret(name, local_default);
        if let Some(password) = known_password(address.reveal()) {
            self.refuse_in_production(format!(
                "{name} has the password {password}, which everybody knows; give the server another, and put it there"
            ));
        }
        address
    }

    /// Whether this is where real customers are: `ENVIRONMENT=production`.
    pub fn is_production(&mut self) -> bool {
        let environment = self.or("ENVIRONMENT", "development".to_owned());
        ["production", "prod"].iter().any(|name| environment.trim().eq_ignore_ascii_case(name))
    }

    /// Adds a fault if this is production: what serves local trials must not meet the public. Each reason is said, not the first alone.
    pub fn refuse_in_production(&mut self, fault: impl Into<String>) {
        if self.is_production() {
            self.fault(format!("{} (refused because ENVIRONMENT=production)", fault.into()));
        }
    }

    /// Adds a fault that only a look at several settings shows.
    pub fn fault(&mut self, fault: impl Into<String>) {
        self.faults.push(fault.into());
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// All faults found, in the order of reading.
    pub fn finish<T>(self, settings: T) -> Result<T, SettingsError> {
        if self.faults.is_empty() { Ok(settings) } else { Err(SettingsError(self.faults)) }
    }
}

/// What every process of ours is told: where to listen, how to log, where it runs.
#[derive(Debug, Clone)]
pub struct Common {
    /// `HOST`, `PORT`: where the HTTP server listens.
    pub listen: SocketAddr,
    /// `LOG_LEVEL`: a level, or filter directives of `tracing_subscriber::EnvFilter`.
    pub log_level: String,
    /// `LOG_FORMAT`: `json` or `pretty`.
    pub log_format: LogFormat,
    /// `REQUESTS_IN_FLIGHT_MAX`: more than these are answered `503` at once. A queue that grows serves nobody: at some 500 bookings
    /// a second and core, the last of a thousand waits two seconds already.
    pub requests_in_flight_max: usize,
    /// `REQUEST_TIMEOUT_SECONDS`: the longest a client waits for its answer, also when a database has vanished without a word. What
    /// changes state goes on to its end all the same.
    pub request_time_max: Duration,
    /// What anyone may ask of the process, and how long they may take over it.
    pub limits: Limits,
    /// Who may call, and how they are known.
    pub auth: AuthSettings,
    /// `OTEL_*`: where traces go.
    pub traces: TraceSettings,
    /// `TLS_CERTIFICATE`, `TLS_PRIVATE_KEY`: what the HTTP server shows; plaintext without.
    pub certificate: Option<ServerCertificate>,
    /// `TLS_CA_FILE`: the authorities that are believed beside the usual ones, on every link.
    pub trust: Trust,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line, for machines.
    Json,
    /// For people.
    Pretty,
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
    /// Reads them; `port` is this process's usual one.
    pub fn read(reader: &mut SettingsReader, port: u16) -> Self {
        let host = reader.or("HOST", IpAddr::from([0, 0, 0, 0]));
        let port = reader.or("PORT", port);
        let trust = Trust::read(reader);
        Self {
            listen: SocketAddr::new(host, port),
            log_level: reader.or("LOG_LEVEL", "info".to_owned()).to_lowercase(),
            log_format: reader.or("LOG_FORMAT", LogFormat::Json),
            requests_in_flight_max: reader.within("REQUESTS_IN_FLIGHT_MAX", 1000, 1, 100_000),
            // Longer than the statement time limit, so that a slow database is told from a silent one.
            request_time_max: reader.duration("REQUEST_TIMEOUT_SECONDS", Duration::from_secs(1), 30.0, 1.0, 60.0),
            limits: Limits::read(reader),
            auth: AuthSettings::read(reader, &trust),
            traces: TraceSettings::read(reader),
            certificate: ServerCertificate::read(reader),
            trust,
        }
    }
}

/// The password of this URL, if everybody knows it. A broker's URL without any means guest, the library's own default.
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

    fn reader(pairs: &'static [(&'static str, &'static str)]) -> SettingsReader {
        SettingsReader::new(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()))
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let mut reader =
            reader(&[("PORT", "eighty"), ("LOG_FORMAT", "xml"), ("RATE", "2"), ("ENVIRONMENT", "production")]);
        Common::read(&mut reader, 8000);
        reader.within("RATE", 0.5, 0.0, 1.0);
        let error = reader.finish(()).unwrap_err().to_string();
        for part in ["PORT=eighty", "LOG_FORMAT=xml", "RATE=2", "ENVIRONMENT=production"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }

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
            (&[("JWT_JWKS_FILE", "/dev/null")], "no JWK set"),
            (&[("JWT_JWKS_URL", "ftp://a")], "JWT_JWKS_URL"),
            (&[("JWT_ISSUER", "")], "JWT_ISSUER"),
            (&[("JWT_AUDIENCE", " ")], "JWT_AUDIENCE"),
            (&[("JWT_LEEWAY_SECONDS", "3600")], "JWT_LEEWAY_SECONDS"),
            (&[("AUTH_MODE", "none")], "AUTH_MODE=none"),
            (&[("INTERNAL_API_KEY_PREVIOUS", "x")], "without INTERNAL_API_KEY"),
            (&[("JWT_JWKS_URL", "http://a"), ("ENVIRONMENT", "production")], "JWT_JWKS_URL is http"),
        ] {
            let said = jwt(more);
            assert!(said.contains(part), "{more:?}: {said}");
        }
    }

    #[test]
    fn an_empty_file_is_an_absent_setting_as_an_empty_text_is() {
        let file = std::env::temp_dir().join(format!("setting-{}", std::process::id()));
        std::fs::write(&file, "\n").unwrap();
        let path = file.display().to_string();
        let mut reader = SettingsReader::new(move |name| (name == "KEY_FILE").then(|| path.clone()));
        assert_eq!(reader.optional("KEY"), None);
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn a_not_a_number_is_out_of_every_range() {
        let mut reader = reader(&[("RATE", "NaN")]);
        assert!((reader.within("RATE", 0.5_f64, 0.0, 1.0) - 0.5).abs() < f64::EPSILON);
        assert!(reader.finish(()).is_err());
    }

    #[test]
    fn a_secret_is_never_printed() {
        let mut reader = reader(&[("KEY", "hunter2")]);
        let secret = reader.secret("KEY", "");
        assert_eq!((secret.reveal(), format!("{secret:?}")), ("hunter2", "***".into()));
    }

    #[test]
    fn a_file_that_can_not_be_read_is_a_fault() {
        let mut reader = reader(&[("KEY_FILE", "/nonexistent/key")]);
        assert_eq!(reader.optional("KEY"), None);
        assert!(reader.finish(()).unwrap_err().to_string().contains("/nonexistent/key"));
    }
}
