//! The system under load: its addresses, its processes and its audit. Any deployment can be described part by part. A
//! system that `start.sh` has started natively is found by its state folder.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;

use crate::http::Address;
use crate::processes::Part;

/// Which system to drive. These options take precedence over the state folder.
#[derive(Debug, Clone, Args)]
pub struct SystemArguments {
    /// The system's name in reports
    #[arg(long, global = true, default_value = "system")]
    name: String,
    /// The state folder of a system started by ./start.sh --native (usually .local): addresses, processes, databases
    /// and audit are taken from the running system
    #[arg(long, global = true, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
    /// The Event Service's address, such as http://localhost:8000
    #[arg(long, global = true, value_name = "URL")]
    event_url: Option<Address>,
    /// The Booking Service's address, or those of its replicas, separated by commas: clients are spread over them in
    /// turn
    #[arg(long, global = true, value_name = "URL", value_delimiter = ',')]
    booking_url: Vec<Address>,
    /// A process whose CPU time counts, with all its descendants: label=pid, several separated by commas
    #[arg(long, global = true, value_name = "LABEL=PID", value_delimiter = ',')]
    process: Vec<Part>,
    /// The Event Service's database: to count flushes of its log, and for the scenario expiry
    #[arg(long, global = true, value_name = "URL")]
    event_db: Option<String>,
    /// The Booking Service's database: to count flushes of its log, and for the scenarios expiry and growth
    #[arg(long, global = true, value_name = "URL")]
    booking_db: Option<String>,
    /// A shell command that audits the system and prints JSON, such as
    /// `docker exec booking-service booking-service audit --json`
    #[arg(long, global = true, value_name = "COMMAND")]
    audit: Option<String>,
}

/// The system under load, with everything that is known of it.
pub struct System {
    /// The system's name in reports.
    pub name: String,
    /// The Event Service's address.
    pub event: Address,
    /// The addresses of the Booking Service's replicas, at least one.
    pub bookings: Vec<Address>,
    /// The system's processes that are known.
    pub parts: Vec<Part>,
    /// The URL of the Event Service's database.
    pub event_db: Option<String>,
    /// The URL of the Booking Service's database.
    pub booking_db: Option<String>,
    /// The program that audits the system.
    pub audit: Option<Program>,
}

/// A program with its arguments and environment.
#[derive(Debug, Clone)]
pub struct Program {
    /// The path of the program.
    pub file: PathBuf,
    /// The program's arguments.
    pub arguments: Vec<OsString>,
    /// The program's whole environment. `None`: this program's own.
    pub environment: Option<Vec<(OsString, OsString)>>,
}

impl SystemArguments {
    /// Takes what is not given from the state folder.
    ///
    /// # Errors
    /// If an address is not known, or nothing runs there.
    pub fn find(&self) -> anyhow::Result<System> {
        let mut found = self.state_dir.as_deref().map(Native::in_folder).transpose()?;
        let given = self.audit.as_ref().map(|command| Program {
            file: "sh".into(),
            arguments: vec!["-c".into(), command.into()],
            environment: None,
        });
        let native = found.as_mut();
        let event = self.event_url.clone().or_else(|| native.as_ref().map(|native| native.event.clone()));
        let mut bookings = self.booking_url.clone();
        if bookings.is_empty() {
            bookings.extend(native.as_ref().map(|native| native.booking.clone()));
        }
        ensure!(!bookings.is_empty(), "where is the Booking Service? Give --booking-url, or --state-dir");
        Ok(System {
            name: self.name.clone(),
            event: event.context("where is the Event Service? Give --event-url, or --state-dir")?,
            bookings,
            parts: match &native {
                Some(native) if self.process.is_empty() => native.parts.clone(),
                _ => self.process.clone(),
            },
            event_db: self.event_db.clone().or_else(|| native.as_ref()?.event_db.clone()),
            booking_db: self.booking_db.clone().or_else(|| native.as_ref()?.booking_db.clone()),
            audit: given.or_else(|| native.as_ref().map(|native| native.audit.clone())),
        })
    }
}

/// What `start.sh --native` has started: its pid files, and each process's environment.
struct Native {
    parts: Vec<Part>,
    event: Address,
    booking: Address,
    event_db: Option<String>,
    booking_db: Option<String>,
    audit: Program,
}

impl Native {
    fn in_folder(folder: &Path) -> anyhow::Result<Self> {
        let parts = running_parts(&folder.join("run"))?;
        let pid = |label: &str| {
            let part = parts.iter().find(|part| part.label == label);
            part.map(|part| part.pid)
                .with_context(|| format!("{label} does not run in {}; ./start.sh", folder.display()))
        };
        let (event_pid, booking_pid) = (pid("event-service")?, pid("booking-service")?);
        let (event, booking) = (Environment::of(event_pid)?, Environment::of(booking_pid)?);
        let address = |environment: &Environment| -> anyhow::Result<Address> {
            format!("http://127.0.0.1:{}", environment.get("PORT").context("the service has no PORT")?).parse()
        };
        Ok(Self {
            event: address(&event)?,
            booking: address(&booking)?,
            event_db: event.get("DATABASE_URL"),
            booking_db: booking.get("DATABASE_URL"),
            // The program that is running, with the settings that it runs with.
            audit: Program {
                file: format!("/proc/{booking_pid}/exe").into(),
                arguments: vec!["audit".into(), "--json".into()],
                environment: Some(booking.0),
            },
            parts,
        })
    }
}

/// The processes of all pid files. Each file holds the pid, the start time and the boot id.
fn running_parts(folder: &Path) -> anyhow::Result<Vec<Part>> {
    let entries = fs::read_dir(folder);
    let entries =
        entries.with_context(|| format!("{} has no pid files; was ./start.sh --native run?", folder.display()))?;
    let mut parts = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let (Some("pid"), Some(label)) = (path.extension().and_then(|end| end.to_str()), path.file_stem()) else {
            continue;
        };
        let text = fs::read_to_string(&path)?;
        let pid = text.split_whitespace().next().and_then(|pid| pid.parse().ok());
        let pid = pid.with_context(|| format!("{} holds no process id", path.display()))?;
        parts.push(Part { label: label.to_string_lossy().into_owned(), pid });
    }
    parts.sort_by(|one, other| one.label.cmp(&other.label));
    Ok(parts)
}

/// The environment with which a process was started.
struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/environ");
        let bytes = fs::read(&path);
        let bytes = bytes.with_context(|| format!("{path} can't be read; be the user who ran ./start.sh, or root"))?;
        Ok(Self::parse(&bytes))
    }

    fn parse(bytes: &[u8]) -> Self {
        let pairs = bytes.split(|byte| *byte == 0).filter_map(|entry| {
            let equals = entry.iter().position(|byte| *byte == b'=')?;
            Some((OsString::from_vec(entry[..equals].to_vec()), OsString::from_vec(entry[equals + 1..].to_vec())))
        });
        Self(pairs.collect())
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(key, _)| key == name)?.1.to_str().map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_read_up_to_the_first_equals_sign() {
        let environment = Environment::parse(b"PORT=8001\0DATABASE_URL=postgres://h/d?a=b\0EMPTY=\0odd\0");
        assert_eq!(environment.get("PORT").as_deref(), Some("8001"));
        assert_eq!(environment.get("DATABASE_URL").as_deref(), Some("postgres://h/d?a=b"));
        assert_eq!(environment.get("EMPTY").as_deref(), Some(""));
        assert_eq!(environment.0.len(), 3);
    }

    #[test]
    fn pid_files_are_parts_by_their_names() {
        let folder = std::env::temp_dir().join(format!("load-test-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("event-db.pid"), "42 1234 boot").unwrap();
        fs::write(folder.join("event-db.spec"), "x").unwrap();
        let parts = running_parts(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(parts.unwrap(), [Part { label: "event-db".to_owned(), pid: 42 }]);
    }
}
