//! One measurement: warm up, read every counter, run the load, read the counters again.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use serde::Serialize;

use crate::arrivals::{Arrivals, ClientPool, Operation, drive};
use crate::databases::{Logs, WalUse};
use crate::measure::{Counted, Point, Recorder, Step};
use crate::processes::{CpuSeconds, Snapshot, open_files_max};
use crate::system::System;

/// If the generator uses more of its one thread than this, it may be what limits the rate.
const GENERATOR_BUSY_MAX: f64 = 0.8;

/// A client has one connection to each service.
const CONNECTIONS_PER_CLIENT: usize = 2;
/// Open files apart from the connections: databases, `/proc`, the runtime's own.
const OTHER_FILES: usize = 64;

/// How much load to send, and for how long.
#[derive(Debug, Clone, Args)]
pub struct LoadArguments {
    /// Closed loop: this many clients, each of which sends its next request when it has an answer
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub clients: u32,
    /// Open loop: this many arrivals per second, by the clock, whether or not earlier ones have been served; latency
    /// counts from the moment when an arrival was due
    #[arg(long, value_parser = positive)]
    pub rate: Option<f64>,
    /// Open loop: arrivals beyond this many in flight are not sent, and are counted as not sent
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub in_flight_max: u32,
    /// How many seconds to measure
    #[arg(long, default_value = "10", value_parser = positive)]
    pub seconds: f64,
    /// The same load before that, uncounted, so that connections, plans and caches are as in the long run
    #[arg(long, default_value = "2", value_parser = not_negative)]
    pub warm_up_seconds: f64,
    /// Don't count flushes of the databases' logs, which takes twenty quiet seconds per phase
    #[arg(long)]
    pub no_flushes: bool,
}

fn positive(text: &str) -> Result<f64, String> {
    not_negative(text)?.partial_cmp(&0.0).filter(|order| order.is_gt()).ok_or("must be more than 0")?;
    not_negative(text)
}

fn not_negative(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if number.is_finite() && number >= 0.0 { Ok(number) } else { Err("must be a number from 0".to_owned()) }
}

impl LoadArguments {
    /// How the buyers of this load arrive.
    #[must_use]
    pub fn arrivals(&self) -> Arrivals {
        match self.rate {
            Some(rate) => Arrivals::Open { rate, in_flight_max: self.in_flight_max as usize },
            None => Arrivals::Closed { clients: self.clients as usize },
        }
    }

    /// The most operations that the load can need. In a closed loop the clients set the pace, and the guess `closed` is
    /// used.
    #[must_use]
    pub fn operations_max(&self, closed: usize) -> usize {
        self.rate.map_or(closed, |rate| (rate * (self.seconds + self.warm_up_seconds)).ceil() as usize)
    }

    /// The load in a few words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self.rate {
            Some(rate) => format!("open loop, {rate} arrivals/s, at most {} in flight", self.in_flight_max),
            None => format!("closed loop, {} clients", self.clients),
        }
    }
}

/// One phase of load, and all that was counted in it.
#[derive(Debug, Clone, Serialize)]
pub struct Phase {
    /// The phase's name.
    pub name: String,
    /// How buyers arrived, in a few words.
    pub load: String,
    /// Seconds from the first arrival to the last answer.
    pub seconds: f64,
    /// Operations per second.
    pub per_second: f64,
    /// Arrivals that were not sent because too many were in flight.
    pub not_sent: u64,
    /// Operations, latencies and outcomes.
    #[serde(flatten)]
    pub counted: Counted,
    /// CPU time. `null` if no processes are known.
    pub cpu: Option<CpuSeconds>,
    /// The system's CPU time per operation.
    pub cpu_ms_per_operation: Option<f64>,
    /// What the databases wrote, for each whose URL is known.
    pub wal: Vec<WalUse>,
    /// Remarks that limit what the numbers say.
    pub notes: Vec<String>,
}

/// Measures the phases of a scenario on one system.
pub struct Bench<'a> {
    /// The system under load.
    pub system: &'a System,
    pool: ClientPool,
    /// Set this to end the current phase before its time.
    pub stop: Rc<Cell<bool>>,
}

impl<'a> Bench<'a> {
    /// Makes a bench for this system.
    #[must_use]
    pub fn on(system: &'a System) -> Self {
        Self { system, pool: ClientPool::new(&system.event, &system.bookings), stop: Rc::default() }
    }

    /// Runs `operation` under this `load`. `main` is the step with which the operation ends.
    ///
    /// # Errors
    /// If a service or a database does not answer, or a process has ended.
    pub async fn measure<O: Operation + 'static>(
        &self,
        name: &str,
        load: &LoadArguments,
        main: Step,
        operation: &Rc<O>,
    ) -> anyhow::Result<Phase> {
        let arrivals = load.arrivals();
        self.stop.set(false);
        // In an open loop, the other clients connect when they are needed, as buyers in a rush do.
        let (clients, clients_max) = match arrivals {
            Arrivals::Closed { clients } => (clients, clients),
            Arrivals::Open { in_flight_max, .. } => (in_flight_max.min(64), in_flight_max),
        };
        ensure_open_files(clients_max * CONNECTIONS_PER_CLIENT + OTHER_FILES)?;
        self.pool.connect(clients).await?;
        println!("\n{}: {name} ({})", self.system.name, load.describe());
        let warm_up = Duration::from_secs_f64(load.warm_up_seconds);
        let uncounted = Rc::new(Recorder::of(main));
        if !warm_up.is_zero() {
            drive(&self.pool, arrivals, warm_up, operation, &uncounted, &self.stop, |_, _| {}).await;
        }
        let mut logs = if load.no_flushes { Logs::none() } else { Logs::open(self.system).await? };
        // The first reading includes what the set-up and the warm-up wrote, the second also what the load wrote.
        let wal_before = logs.read_settled().await?;
        // Some servers close connections that were quiet in the meantime.
        self.pool.connect(clients).await?;
        let recorder = Rc::new(Recorder::of(main));
        let before = Snapshot::take(&self.system.parts)?;
        let time = Duration::from_secs_f64(load.seconds);
        let driven = drive(&self.pool, arrivals, time, operation, &recorder, &self.stop, progress).await;
        let cpu = before.until(&Snapshot::take(&self.system.parts)?)?;
        let counted = recorder.finish(driven.seconds);
        ensure!(!counted.steps.is_empty(), "nothing was left to do after the warm-up; give more seats or less time");
        let wal_after = logs.read_settled().await?;
        let mut notes = Vec::new();
        if driven.used_up {
            notes.push(format!("nothing was left to do after {:.1} s", driven.seconds));
        }
        let busy = cpu.generator / driven.seconds;
        if busy > GENERATOR_BUSY_MAX {
            notes
                .push(format!("the generator used {:.0} % of its thread: the rate may be its own limit", busy * 100.0));
        }
        let known = (!self.system.parts.is_empty()).then_some(cpu);
        Ok(Phase {
            name: name.to_owned(),
            load: load.describe(),
            seconds: driven.seconds,
            per_second: counted.operations as f64 / driven.seconds,
            not_sent: driven.not_sent,
            wal: logs.used(&wal_before, &wal_after, counted.operations),
            cpu_ms_per_operation: known.as_ref().map(|cpu| cpu.system * 1000.0 / counted.operations as f64),
            counted,
            cpu: known,
            notes,
        })
    }
}

fn ensure_open_files(files: usize) -> anyhow::Result<()> {
    let max = open_files_max();
    ensure!(
        files <= max,
        "this many clients need {files} open files, and {max} are allowed: run `ulimit -n {files}` first"
    );
    Ok(())
}

fn progress(point: &Point, in_flight: usize) {
    let Point { at_seconds, good_per_second, refused, failed, p50_ms, p99_ms, max_ms } = point;
    println!(
        "{at_seconds:>6.1} s {good_per_second:>8.0}/s   p50 {p50_ms:>8.2}  p99 {p99_ms:>8.2}  max {max_ms:>8.2} ms   \
         refused {refused}  failed {failed}  in flight {in_flight}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_rates_must_be_valid_numbers() {
        assert_eq!(positive("0.5"), Ok(0.5));
        assert_eq!(not_negative("0"), Ok(0.0));
        for wrong in ["0", "-1", "NaN", "inf", "ten"] {
            assert!(positive(wrong).is_err(), "{wrong}");
        }
        assert!(not_negative("-0.1").is_err());
    }
}
