//! Settings from the environment. They are typed, all faults are reported at once, and secrets are never printed.
//!
//! Every setting `NAME` can also come from the file that `NAME_FILE` names, which wins: secrets are mounted in that way.
//! The reader notes each setting with its default and its range, from which `settings_reference.rs` writes the reference.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

/// Returns a setting's text by its name.
type Lookup = Box<dyn Fn(&str) -> Option<String>>;

/// Reads settings, and gathers what is wrong with them.
pub struct SettingsReader {
    lookup: Lookup,
    faults: Vec<String>,
    asked: Vec<Asked>,
}

/// A setting that was read, as the reference shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its name, such as `PORT`.
    pub name: String,
    /// The value that counts when it is not set; none when there is no default.
    pub default: Option<String>,
    /// The smallest and the largest number that it takes.
    pub range: Option<(String, String)>,
}

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("the settings have faults:{}", .0.iter().map(|fault| format!("\n  - {fault}")).collect::<String>())]
pub struct SettingsError(Vec<String>);

/// A secret, such as a password or a URL with one. It is printed as `[REDACTED]`, and wiped from memory when it is
/// dropped.
#[derive(Clone, Debug)]
pub struct Secret(SecretString);

impl Secret {
    /// The text itself, for the one place that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        self.0.expose_secret()
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl SettingsReader {
    /// Reads the process's environment.
    #[must_use]
    pub fn from_env() -> Self {
        #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
        Self::new(|name| std::env::var(name).ok())
    }

    /// Reads from `lookup`; for tests and for the reference.
    pub fn new(lookup: impl Fn(&str) -> Option<String> + 'static) -> Self {
        Self { lookup: Box::new(lookup), faults: Vec::new(), asked: Vec::new() }
    }

    /// The settings that were read so far, each once, in the order of reading.
    #[must_use]
    pub fn asked(&self) -> &[Asked] {
        &self.asked
    }

    fn note(&mut self, name: &str) -> &mut Asked {
        let index = self.asked.iter().position(|asked| asked.name == name).unwrap_or_else(|| {
            self.asked.push(Asked { name: name.to_owned(), default: None, range: None });
            self.asked.len() - 1
        });
        &mut self.asked[index]
    }

    /// A setting that may be absent. An empty one counts as absent, because compose files set it so.
    pub fn optional(&mut self, name: &str) -> Option<String> {
        self.note(name);
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

    /// The file that a setting comes from, for a caller that reads it again when it changes.
    pub(crate) fn file_of(&self, name: &str) -> Option<String> {
        (self.lookup)(&format!("{name}_FILE")).filter(|path| !path.is_empty())
    }

    /// A setting's text, if it does not come from a file.
    pub(crate) fn text_of(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|text| !text.is_empty())
    }

    /// A setting with a default.
    pub fn or<T: FromStr<Err: Display> + Display>(&mut self, name: &str, default: T) -> T {
        self.note(name).default = Some(default.to_string());
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

    /// A number that must lie between `min` and `max`, both included.
    pub fn within<T: FromStr<Err: Display> + PartialOrd + Display + Copy>(
        &mut self,
        name: &str,
        default: T,
        min: T,
        max: T,
    ) -> T {
        let value = self.or(name, default);
        self.note(name).range = Some((min.to_string(), max.to_string()));
        // Every comparison with NaN is false, so this tests for the range and not for its opposite.
        if value >= min && value <= max {
            return value;
        }
        self.faults.push(format!("{name}={value} must lie between {min} and {max}"));
        default
    }

    /// A duration, as a decimal number of `unit`s between `min` and `max`.
    pub fn duration(&mut self, name: &str, unit: Duration, default: f64, min: f64, max: f64) -> Duration {
        unit.mul_f64(self.within(name, default, min, max))
    }

    /// A secret, with a default that serves local trials only.
    pub fn secret(&mut self, name: &str, local_default: &str) -> Secret {
        self.note(name).default = Some(local_default.to_owned());
        Secret(self.optional(name).unwrap_or_else(|| local_default.to_owned()).into())
    }

    /// Adds a fault that only several settings together show.
    pub fn fault(&mut self, fault: impl Into<String>) {
        self.faults.push(fault.into());
    }

    /// Ends the reading, and returns `settings` if there was no fault.
    ///
    /// # Errors
    /// All faults, in the order of reading.
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
        assert_eq!(secret.reveal(), "hunter2");
        let printed = format!("{secret:?}");
        assert!(printed.contains("REDACTED") && !printed.contains("hunter2"), "{printed}");
    }

    #[test]
    fn a_setting_is_noted_once_with_its_default_and_its_range() {
        let mut reader = reader(&[("RATE", "0.1")]);
        reader.within("RATE", 0.5, 0.0, 1.0);
        reader.or("RATE", 0.5);
        reader.optional("KEY");
        let [rate, key] = reader.asked() else { panic!("{:?}", reader.asked()) };
        assert_eq!((rate.default.as_deref(), rate.range.clone()), (Some("0.5"), Some(("0".into(), "1".into()))));
        assert_eq!((key.name.as_str(), &key.default), ("KEY", &None));
    }

    #[test]
    fn a_file_that_can_not_be_read_is_a_fault() {
        let mut reader = reader(&[("KEY_FILE", "/nonexistent/key")]);
        assert_eq!(reader.optional("KEY"), None);
        assert!(reader.finish(()).unwrap_err().to_string().contains("/nonexistent/key"));
    }
}
