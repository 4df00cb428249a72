//! Settings from the environment: typed, with all faults reported at once, secrets never shown.
//!
//! Every setting `NAME` can also come from the file that `NAME_FILE` names, which wins: that is how secrets are
//! mounted.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

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

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(pairs: &'static [(&'static str, &'static str)]) -> SettingsReader {
        SettingsReader::new(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()))
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
