//! The audit at the end of a run: whether the promises were kept.

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::system::Program;

/// The audit's verdict on one promise. The audit's report has more members, which are not used here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// The promise's number in the audit.
    pub promise: usize,
    /// The promise in a few words.
    pub says: String,
    /// How many things the audit checked.
    pub checked: i64,
    /// How many of them break the promise.
    pub violations: usize,
}

#[derive(Deserialize)]
struct Report {
    verdicts: Vec<Verdict>,
}

/// Runs the audit's program and reads its report.
///
/// # Errors
/// If the program cannot be run, or prints no report.
pub async fn run(program: &Program) -> anyhow::Result<Vec<Verdict>> {
    let mut command = Command::new(&program.file);
    command.args(&program.arguments);
    if let Some(environment) = &program.environment {
        command.env_clear().envs(environment.iter().cloned());
    }
    let output = command.output().await.context("the audit can't be started; is the command of --audit right?")?;
    // Status 2 means that a promise is broken. The report says which.
    if !matches!(output.status.code(), Some(0 | 2)) {
        bail!("the audit ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    parse(&output.stdout)
}

fn parse(output: &[u8]) -> anyhow::Result<Vec<Verdict>> {
    let text = String::from_utf8_lossy(output);
    // Log lines may come before the report. It begins at the first line that is only a bracket.
    let start = if text.starts_with("{\n") { Some(0) } else { text.find("\n{\n") };
    let start = start.context("the audit printed no report; its command needs --json")?;
    let report: Report = serde_json::from_str(&text[start..]).context("the audit's report has an unknown form")?;
    Ok(report.verdicts)
}

/// Whether no promise was broken.
#[must_use]
pub fn is_clean(verdicts: &[Verdict]) -> bool {
    verdicts.iter().all(|verdict| verdict.violations == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{
  "verdicts": [
    { "promise": 1, "says": "no seat twice", "checked": 7, "violations": 0, "in_passing": 0, "first": [] },
    { "promise": 2, "says": "all or nothing", "checked": 7, "violations": 3, "in_passing": 0, "first": [] }
  ]
}"#;

    #[test]
    fn one_violation_makes_the_audit_unclean() {
        let verdicts = parse(REPORT.as_bytes()).unwrap();
        assert!(is_clean(&verdicts[..1]) && !is_clean(&verdicts));
    }

    #[test]
    fn log_lines_before_the_report_are_skipped() {
        assert_eq!(parse(format!("{{\"level\":\"info\"}}\n{REPORT}").as_bytes()).unwrap().len(), 2);
        assert!(parse(b"1  no seat twice  ok").is_err());
    }
}
