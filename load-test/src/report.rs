//! The result of a run: as text for the terminal, as JSON, and as HTML (`html.rs`).

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::audit::{Verdict, is_clean};
use crate::bench::Phase;
use crate::measure::Latency;
use crate::measured::Measured;

/// One scenario run on one system.
#[derive(Debug, Clone, Serialize)]
pub struct RunResult {
    /// The scenario's name.
    pub scenario: String,
    /// The system's name.
    pub system: String,
    /// When the run began.
    pub begun_at: DateTime<Utc>,
    /// The machine of the generator. A system on the same machine shares it.
    pub machine: Machine,
    /// What the scenario measured.
    #[serde(flatten)]
    pub measured: Measured,
    /// The audit's verdicts. `null` if there was no audit.
    pub audit: Option<Vec<Verdict>>,
}

/// The generator's machine: cores, processor and kernel.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    cores: usize,
    processor: String,
    kernel: String,
}

impl Machine {
    /// Describes the machine that this program runs on.
    #[must_use]
    pub fn this() -> Self {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            processor: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        }
    }
}

/// The current time, for a report.
#[must_use]
pub fn now() -> DateTime<Utc> {
    SystemTime::now().into()
}

impl RunResult {
    /// Whether the scenario's promises were kept, and the audit's too if there was one.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.measured.promises.iter().all(|promise| promise.kept) && self.audit.as_deref().is_none_or(is_clean)
    }

    /// The whole result for the terminal.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("\n{} on {}\n", self.scenario, self.system);
        for phase in &self.measured.phases {
            text += &phase_text(phase);
        }
        for (name, figure) in &self.measured.figures {
            let _ = writeln!(text, "  {name}: {figure}");
        }
        for promise in &self.measured.promises {
            let word = if promise.kept { "ok      " } else { "BROKEN  " };
            let _ = writeln!(text, "  {word} {}: {}", promise.says, promise.found);
        }
        text + &self.audit_text()
    }

    fn audit_text(&self) -> String {
        let Some(verdicts) = &self.audit else {
            return "  no audit: no audit command was given (--audit, or --state-dir)\n".to_owned();
        };
        let mut text = format!("  audit: {}\n", if is_clean(verdicts) { "clean" } else { "NOT CLEAN" });
        for verdict in verdicts.iter().filter(|verdict| verdict.violations > 0) {
            let _ = writeln!(
                text,
                "  BROKEN   promise {}, {}: {} violations",
                verdict.promise, verdict.says, verdict.violations
            );
        }
        text
    }
}

fn phase_text(phase: &Phase) -> String {
    let counted = &phase.counted;
    let mut text = format!(
        "  {}: {:.0}/s over {:.1} s ({}); {} operations, {} not sent\n",
        phase.name, phase.per_second, phase.seconds, phase.load, counted.operations, phase.not_sent
    );
    let _ = writeln!(
        text,
        "    {:<22} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} ms",
        "", "count", "p50", "p90", "p99", "p99.9", "max"
    );
    for step in &counted.steps {
        text += &latency_line(&step.name, &step.latency);
        // With a single outcome, the line above says the same.
        for (outcome, latency) in step.by_outcome.iter().filter(|_| step.by_outcome.len() > 1) {
            text += &latency_line(&format!("  {outcome}"), latency);
        }
    }
    if let (Some(cpu), Some(each)) = (&phase.cpu, phase.cpu_ms_per_operation) {
        let parts: Vec<String> = cpu.parts.iter().map(|(label, seconds)| format!("{label} {seconds:.2}")).collect();
        let _ = writeln!(text, "    CPU {each:.3} ms per operation; seconds: {}", parts.join(", "));
        let _ = writeln!(
            text,
            "    not included: the generator {:.2} s, other processes on this machine {:.2} s",
            cpu.generator, cpu.others
        );
    }
    for wal in &phase.wal {
        let _ = writeln!(
            text,
            "    {}: {} flushes ({:.2} per operation), {} records, {} bytes of log",
            wal.server, wal.flushes, wal.flushes_per_operation, wal.records, wal.bytes
        );
    }
    for note in &phase.notes {
        let _ = writeln!(text, "    note: {note}");
    }
    text
}

fn latency_line(name: &str, latency: &Latency) -> String {
    let Latency { count, p50_ms, p90_ms, p99_ms, p999_ms, max_ms, .. } = latency;
    format!("    {name:<22} {count:>9} {p50_ms:>9.2} {p90_ms:>9.2} {p99_ms:>9.2} {p999_ms:>9.2} {max_ms:>9.2}\n")
}

/// Writes `<folder>/<name>.json` and `.html`, and returns their paths.
///
/// # Errors
/// If the folder cannot be written.
pub fn save(folder: &Path, name: &str, json: &impl Serialize, html: &str) -> anyhow::Result<[PathBuf; 2]> {
    let save = || -> anyhow::Result<[PathBuf; 2]> {
        fs::create_dir_all(folder)?;
        let paths = ["json", "html"].map(|ending| folder.join(format!("{name}.{ending}")));
        fs::write(&paths[0], serde_json::to_vec_pretty(json)?)?;
        fs::write(&paths[1], html)?;
        Ok(paths)
    };
    save().with_context(|| {
        format!("the report can't be written to {}; name another folder by --output", folder.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measured::Promise;

    fn result(kept: bool, violations: Option<usize>) -> RunResult {
        RunResult {
            scenario: "hot".to_owned(),
            system: "a".to_owned(),
            begun_at: now(),
            machine: Machine::this(),
            measured: Measured { promises: vec![Promise::new("one winner", kept, "10")], ..Measured::default() },
            audit: violations.map(|violations| {
                vec![Verdict { promise: 1, says: "no seat twice".to_owned(), checked: 1, violations }]
            }),
        }
    }

    #[test]
    fn a_broken_promise_and_an_unclean_audit_are_both_failures() {
        assert!(result(true, Some(0)).is_good() && result(true, None).is_good());
        assert!(!result(false, Some(0)).is_good() && !result(true, Some(1)).is_good());
    }

    #[test]
    fn the_text_says_what_is_broken_and_that_no_audit_ran() {
        let text = result(false, None).to_text();
        assert!(text.contains("BROKEN") && text.contains("no audit"), "{text}");
        assert!(result(true, Some(3)).to_text().contains("promise 1, no seat twice: 3 violations"));
    }
}
