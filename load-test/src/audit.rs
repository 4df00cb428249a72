//! The audit at the end of a run: were the promises kept?

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::system::Program;

/// What the audit's report says of one promise; it says more.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// Its number.
    pub promise: usize,
    /// In a few words.
    pub says: String,
    /// What was looked at.
    pub checked: i64,
    /// How often it was broken.
    pub violations: usize,
}

#[derive(Deserialize)]
struct Report {
    verdicts: Vec<Verdict>,
}

/// Runs the audit.
///
/// # Errors
/// It could not be run, or gave no report.
pub async fn run(program: &Program) -> anyhow::Result<Vec<Verdict>> {
    let mut command = Command::new(&program.file);
    command.args(&program.arguments);
    if let Some(environment) = &program.environment {
        command.env_clear().envs(environment.iter().cloned());
    }
    let output = command.output().await.context("the audit can't be started; is the command of --audit right?")?;
    // 2 says that a promise is broken; the report says which.
    if !matches!(output.status.code(), Some(0 | 2)) {
        bail!("the audit ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    parse(&output.stdout)
}

fn parse(output: &[u8]) -> anyhow::Result<Vec<Verdict>> {
    let text = String::from_utf8_lossy(output);
    // Log lines may stand before it: the report begins at the first line that is a bare bracket.
    let start = if text.starts_with("{\n") { Some(0) } else { text.find("\n{\n") };
    let start = start.context("the audit printed no report; its command needs --json")?;
    let report: Report = serde_json::from_str(&text[start..]).context("the audit's report has an unknown form")?;
    Ok(report.verdicts)
}

/// Whether every promise was kept.
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
    fn one_violation_is_enough() {
        let verdicts = parse(REPORT.as_bytes()).unwrap();
        assert!(is_clean(&verdicts[..1]) && !is_clean(&verdicts));
    }

    #[test]
    fn log_lines_before_the_report_do_no_harm() {
        assert_eq!(parse(format!("{{\"level\":\"info\"}}\n{REPORT}").as_bytes()).unwrap().len(), 2);
        assert!(parse(b"1  no seat twice  ok").is_err());
    }
}
