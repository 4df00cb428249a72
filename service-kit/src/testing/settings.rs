//! Whether the reference of the settings is complete.

use crate::process::settings::Asked;
use crate::process::settings_reference::Section;

/// Settings that are read in another way than by the service's reader: by the runtime, or as a file.
const READ_ELSEWHERE: [&str; 4] = ["TOKIO_WORKER_THREADS", "TLS_CERTIFICATE", "TLS_PRIVATE_KEY", "TLS_CA_FILE"];

/// The settings that are read but not described, and those that are described but not read.
#[must_use]
pub fn differences(sections: &[Section<'_>], asked: &[Asked]) -> Vec<String> {
    let described: Vec<&str> = sections.iter().flat_map(|section| section.settings).map(|row| row.name).collect();
    let read = |name: &str| asked.iter().any(|asked| asked.name == name) || READ_ELSEWHERE.contains(&name);
    let undescribed = asked.iter().filter(|asked| !described.contains(&asked.name.as_str()));
    let unread = described.iter().filter(|name| !read(name));
    undescribed
        .map(|asked| format!("{} is read, but not described", asked.name))
        .chain(unread.map(|name| format!("{name} is described, but not read")))
        .collect()
}
