//! Runs the same scenario on two systems in turn: A B A B A B. A disturbance of the machine then affects both. A median
//! of several rounds does not depend on one lucky run.

use std::fmt::Write;

use serde::Serialize;

use crate::bench::Phase;
use crate::report::RunResult;

/// All rounds of both systems, and their medians side by side.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The scenario's name.
    pub scenario: String,
    /// The names of the two systems.
    pub systems: [String; 2],
    /// One row for each figure of each phase.
    pub rows: Vec<Row>,
    /// The rounds of each system.
    pub rounds: [Vec<RunResult>; 2],
}

/// One figure of both systems.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The phase's name.
    pub phase: String,
    /// The figure's name, with its unit.
    pub figure: String,
    /// The medians and extremes of each system. `null` where a system has no such figure.
    pub spreads: [Option<Spread>; 2],
    /// The first system's median divided by the second's.
    pub ratio: Option<f64>,
}

/// The values of one figure over all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The median. For an even number of rounds, the mean of the middle two.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { values[middle - 1].midpoint(values[middle]) };
        Some(Self { median, min, max })
    }
}

type Figure = (&'static str, fn(&Phase) -> Option<f64>);

/// The figures of a phase's main step, and its costs.
const FIGURES: [Figure; 9] = [
    ("operations/s", |phase| Some(phase.per_second)),
    ("p50 ms", |phase| main(phase).map(|main| main.p50_ms)),
    ("p90 ms", |phase| main(phase).map(|main| main.p90_ms)),
    ("p99 ms", |phase| main(phase).map(|main| main.p99_ms)),
    ("p99.9 ms", |phase| main(phase).map(|main| main.p999_ms)),
    ("max ms", |phase| main(phase).map(|main| main.max_ms)),
    ("CPU ms/operation", |phase| phase.cpu_ms_per_operation),
    ("flushes/operation", |phase| {
        let each = phase.wal.iter().map(|wal| wal.flushes_per_operation);
        (!phase.wal.is_empty()).then(|| each.sum())
    }),
    ("failed or not sent", |phase| Some((phase.counted.failed + phase.not_sent) as f64)),
];

fn main(phase: &Phase) -> Option<&crate::measure::Latency> {
    phase.counted.main().map(|step| &step.latency)
}

impl Comparison {
    /// Compares these rounds. Neither list may be empty.
    #[must_use]
    pub fn of(rounds: [Vec<RunResult>; 2]) -> Self {
        let first = |index: usize| rounds[index].first();
        let name = |index: usize| first(index).map(|result| result.system.clone()).unwrap_or_default();
        // A phase that only one system has is still listed. For example, the other system may send no ETag.
        let phases = (0..2).filter_map(first).max_by_key(|result| result.measured.phases.len());
        let phases: Vec<String> =
            phases.into_iter().flat_map(|result| &result.measured.phases).map(|phase| phase.name.clone()).collect();
        let mut rows = Vec::new();
        for (index, phase) in phases.iter().enumerate() {
            for (figure, read) in FIGURES {
                let spread = |system: usize| {
                    let found = rounds[system].iter().filter_map(|result| result.measured.phases.get(index));
                    Spread::of(found.filter_map(read).collect())
                };
                let spreads = [spread(0), spread(1)];
                let ratio = spreads[0].zip(spreads[1]).map(|(one, other)| one.median / other.median);
                let ratio = ratio.filter(|ratio| ratio.is_finite());
                rows.push(Row { phase: phase.clone(), figure: figure.to_owned(), spreads, ratio });
            }
        }
        Self {
            scenario: first(0).map(|result| result.scenario.clone()).unwrap_or_default(),
            systems: [name(0), name(1)],
            rows,
            rounds,
        }
    }

    /// Whether every round of both systems kept its promises.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.rounds.iter().flatten().all(RunResult::is_good)
    }

    /// The comparison as a table for the terminal.
    #[must_use]
    pub fn to_text(&self) -> String {
        let [one, other] = &self.systems;
        let mut text =
            format!("\n{}: medians of {} rounds (smallest to largest)\n", self.scenario, self.rounds[0].len());
        let mut phase = "";
        for row in &self.rows {
            if row.phase != phase {
                phase = &row.phase;
                let _ = writeln!(text, "  {:<20} {one:>32} {other:>32} {:>8}", row.phase, "ratio");
            }
            let [one, other] = row.spreads.map(|spread| spread.map_or("-".to_owned(), |spread| spread.to_text()));
            let ratio = row.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            let _ = writeln!(text, "    {:<18} {one:>32} {other:>32} {ratio:>8}", row.figure);
        }
        text
    }
}

impl Spread {
    /// The median with the extremes in brackets.
    #[must_use]
    pub fn to_text(&self) -> String {
        let Self { median, min, max } = self;
        format!("{median:.2} ({min:.2} to {max:.2})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_one_bad_round() {
        assert_eq!(Spread::of(vec![9.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 9.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
