//! What is counted under load: latencies and outcomes by step, and their course second by second.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::http::Outcome;

/// The longest latency that is recorded exactly, in microseconds. It is more than any request may take.
const LATENCY_MICROS_MAX: u64 = 120_000_000;
/// The percentiles of the curve. They are closer together at the upper end, where the curve bends.
const CURVE: [f64; 22] = [
    0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 92.5, 95.0, 97.5, 99.0, 99.5, 99.75, 99.9,
    99.95, 99.99, 99.999,
];

/// An action of a buyer that is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The step's name in the report.
    pub name: &'static str,
    /// The statuses that mean success.
    pub good: &'static [u16],
    /// The statuses of a correct refusal, for example of a taken seat.
    pub refused: &'static [u16],
}

fn histogram() -> Histogram<u64> {
    // The library accepts these constants: from 1, to at least twice that, with three digits.
    Histogram::new_with_bounds(1, LATENCY_MICROS_MAX, 3).unwrap_or_else(|error| unreachable!("{error}"))
}

struct StepCount {
    step: Step,
    by_outcome: BTreeMap<Outcome, Histogram<u64>>,
}

/// Collects the counts of a run. It is for one thread, as the generator has only one.
pub struct Recorder {
    begun: Instant,
    /// The step that ends an operation. Progress lines and the series show this step.
    main: Step,
    counts: RefCell<Vec<StepCount>>,
    second: RefCell<Second>,
    series: RefCell<Vec<Point>>,
}

struct Second {
    good: Histogram<u64>,
    refused: u64,
    failed: u64,
}

/// The main step in one second of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// When the second ended, in seconds from the beginning.
    pub at_seconds: f64,
    /// Successes per second.
    pub good_per_second: f64,
    /// The number of refusals.
    pub refused: u64,
    /// The number of wrong and missing answers.
    pub failed: u64,
    /// The median latency of the successes, in milliseconds.
    pub p50_ms: f64,
    /// The 99th percentile of the same.
    pub p99_ms: f64,
    /// The maximum of the same.
    pub max_ms: f64,
}

impl Recorder {
    /// Makes a recorder and starts its clock.
    #[must_use]
    pub fn of(main: Step) -> Self {
        Self {
            begun: Instant::now(),
            main,
            counts: RefCell::default(),
            second: RefCell::new(Second { good: histogram(), refused: 0, failed: 0 }),
            series: RefCell::default(),
        }
    }

    /// Counts one step that took from `since` until now.
    pub fn count(&self, step: Step, outcome: Outcome, since: Instant) {
        let micros = (since.elapsed().as_micros() as u64).clamp(1, LATENCY_MICROS_MAX);
        if step == self.main {
            let mut second = self.second.borrow_mut();
            match outcome {
                Outcome::Status(status) if step.good.contains(&status) => second.good.saturating_record(micros),
                Outcome::Status(status) if step.refused.contains(&status) => second.refused += 1,
                _ => second.failed += 1,
            }
        }
        let mut counts = self.counts.borrow_mut();
        let index = counts.iter().position(|count| count.step == step).unwrap_or_else(|| {
            counts.push(StepCount { step, by_outcome: BTreeMap::new() });
            counts.len() - 1
        });
        counts[index].by_outcome.entry(outcome).or_insert_with(histogram).saturating_record(micros);
    }

    /// Ends the current second of the series, which had this `length`.
    pub fn tick(&self, length: Duration) -> Point {
        let mut second = self.second.borrow_mut();
        let millis = |percentile| second.good.value_at_percentile(percentile) as f64 / 1000.0;
        let point = Point {
            at_seconds: self.begun.elapsed().as_secs_f64(),
            good_per_second: second.good.len() as f64 / length.as_secs_f64(),
            refused: second.refused,
            failed: second.failed,
            p50_ms: millis(50.0),
            p99_ms: millis(99.0),
            max_ms: millis(100.0),
        };
        second.good.reset();
        (second.refused, second.failed) = (0, 0);
        self.series.borrow_mut().push(point.clone());
        point
    }

    /// The result, for a run of this many seconds.
    #[must_use]
    pub fn finish(&self, seconds: f64) -> Counted {
        let counts = self.counts.borrow();
        let steps: Vec<StepResult> = counts.iter().map(|count| count.result(seconds)).collect();
        let main = steps.iter().find(|step| step.name == self.main.name);
        Counted {
            main: self.main.name.to_owned(),
            operations: main.map_or(0, |main| main.good),
            refused: main.map_or(0, |main| main.refused),
            failed: main.map_or(0, |main| main.failed),
            steps,
            series: self.series.borrow().clone(),
        }
    }
}

/// Everything that a recorder has counted.
#[derive(Debug, Clone, Serialize)]
pub struct Counted {
    /// The name of the main step.
    pub main: String,
    /// How many main steps succeeded. Rates and costs are per operation.
    pub operations: u64,
    /// How many main steps were correctly refused.
    pub refused: u64,
    /// How many main steps had a wrong answer or none. A failed step on the way ends the main step with its outcome.
    pub failed: u64,
    /// The counts of each step.
    pub steps: Vec<StepResult>,
    /// The main step, second by second.
    pub series: Vec<Point>,
}

impl Counted {
    /// The main step. `None` if it never ran.
    #[must_use]
    pub fn main(&self) -> Option<&StepResult> {
        self.steps.iter().find(|step| step.name == self.main)
    }

    /// How many main steps had this outcome.
    #[must_use]
    pub fn ended(&self, outcome: Outcome) -> u64 {
        let latency = self.main().and_then(|main| main.by_outcome.get(&outcome.to_string()));
        latency.map_or(0, |latency| latency.count)
    }
}

/// The counts of one step.
#[derive(Debug, Clone, Serialize)]
pub struct StepResult {
    /// The step's name.
    pub name: String,
    /// How often it succeeded.
    pub good: u64,
    /// How often it was correctly refused.
    pub refused: u64,
    /// How often the answer was wrong or missing.
    pub failed: u64,
    /// Successes per second.
    pub per_second: f64,
    /// The latencies of the successes.
    pub latency: Latency,
    /// The latencies of each outcome.
    pub by_outcome: BTreeMap<String, Latency>,
}

impl StepCount {
    fn result(&self, seconds: f64) -> StepResult {
        let mut good = histogram();
        let (mut refused, mut failed) = (0, 0);
        for (outcome, latencies) in &self.by_outcome {
            match outcome {
                Outcome::Status(status) if self.step.good.contains(status) => {
                    good.add(latencies).unwrap_or_else(|error| unreachable!("same bounds: {error}"));
                }
                Outcome::Status(status) if self.step.refused.contains(status) => refused += latencies.len(),
                _ => failed += latencies.len(),
            }
        }
        StepResult {
            name: self.step.name.to_owned(),
            good: good.len(),
            refused,
            failed,
            per_second: good.len() as f64 / seconds,
            latency: Latency::of(&good),
            by_outcome: self.by_outcome.iter().map(|(outcome, all)| (outcome.to_string(), Latency::of(all))).collect(),
        }
    }
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Latency {
    /// How many were measured.
    pub count: u64,
    /// The arithmetic mean.
    pub mean_ms: f64,
    /// The 50th percentile.
    pub p50_ms: f64,
    /// The 90th percentile.
    pub p90_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The 99.9th percentile.
    pub p999_ms: f64,
    /// The longest latency.
    pub max_ms: f64,
    /// Percentiles with their latencies, for the plot.
    pub curve: Vec<(f64, f64)>,
}

impl Latency {
    fn of(latencies: &Histogram<u64>) -> Self {
        let millis = |percentile| latencies.value_at_percentile(percentile) as f64 / 1000.0;
        // Ten requests have no 99.9th percentile. The curve ends where less than one request would be above it.
        let known = |percentile: &&f64| (100.0 - **percentile) / 100.0 * latencies.len() as f64 >= 1.0;
        Self {
            count: latencies.len(),
            mean_ms: latencies.mean() / 1000.0,
            p50_ms: millis(50.0),
            p90_ms: millis(90.0),
            p99_ms: millis(99.0),
            p999_ms: millis(99.9),
            max_ms: millis(100.0),
            curve: CURVE.iter().take_while(known).map(|percentile| (*percentile, millis(*percentile))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step { name: "reserve", good: &[201], refused: &[409] };

    fn ago(millis: u64) -> Instant {
        Instant::now().checked_sub(Duration::from_millis(millis)).unwrap()
    }

    #[test]
    fn latencies_are_of_successes_and_each_outcome_has_its_own() {
        let recorder = Recorder::of(STEP);
        recorder.count(Step { name: "on the way", ..STEP }, Outcome::Status(409), ago(1));
        for _ in 0..98 {
            recorder.count(STEP, Outcome::Status(201), ago(10));
        }
        recorder.count(STEP, Outcome::Status(409), ago(500));
        recorder.count(STEP, Outcome::Status(503), ago(600));
        recorder.count(STEP, Outcome::NoAnswer, ago(700));
        let counted = recorder.finish(2.0);
        assert_eq!((counted.operations, counted.refused, counted.failed), (98, 1, 2));
        assert_eq!((counted.ended(Outcome::Status(409)), counted.ended(Outcome::Status(500))), (1, 0));
        let step = counted.main().unwrap();
        assert!((step.per_second - 49.0).abs() < 1e-9);
        assert!((10.0..400.0).contains(&step.latency.max_ms), "{:?}", step.latency);
        assert!((500.0..900.0).contains(&step.by_outcome["409"].p50_ms));
        assert_eq!(step.by_outcome["no answer"].count, 1);
    }

    #[test]
    fn a_second_counts_only_its_own_requests() {
        let recorder = Recorder::of(STEP);
        recorder.count(STEP, Outcome::Status(201), ago(8000));
        recorder.count(STEP, Outcome::TimedOut, ago(90));
        let first = recorder.tick(Duration::from_millis(500));
        assert_eq!((first.good_per_second as u64, first.failed), (2, 1));
        recorder.count(STEP, Outcome::Status(201), ago(20));
        let second = recorder.tick(Duration::from_secs(1));
        assert!((20.0..8000.0).contains(&second.max_ms), "{second:?}");
        assert_eq!(recorder.finish(2.0).series.len(), 2);
    }

    #[test]
    fn the_curve_ends_where_too_few_requests_were_measured() {
        let mut few = histogram();
        few.record_n(1000, 100).unwrap();
        assert_eq!(Latency::of(&few).curve.last().unwrap().0, 99.0);
        assert!(Latency::of(&histogram()).curve.is_empty());
    }
}
