//! The CPU seconds of every process involved, read from `/proc`.
//!
//! A part of the system is named by one process id, and includes all descendants of that process. When a process ends,
//! the kernel adds its time to the parent that waits for it. So a PostgreSQL server is its postmaster with every
//! backend, even those that start and end during the load.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::str::FromStr;

use anyhow::{Context, bail};
use serde::Serialize;

/// `/proc` is read until two readings in a row show the same processes. Otherwise a process that ends between the
/// readings of its own numbers and of its parent's would be missed or counted twice. This is the limit.
const READINGS_MAX: usize = 10;

/// A part of the system, with its label and its first process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The part's label in the report.
    pub label: String,
    /// The process that started the others.
    pub pid: u32,
}

impl FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (label, pid) = text.split_once('=').context("a process is given as label=pid")?;
        let pid = pid.parse().with_context(|| format!("{pid} is not a process id"))?;
        Ok(Self { label: label.to_owned(), pid })
    }
}

/// One process, as `/proc/<pid>/stat` shows it. Times are in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    parent: u32,
    /// User and system time of the process, and of the children that it has waited for.
    ticks: u64,
    /// The start time since the machine's boot. With the id it identifies a process.
    started: u64,
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The command name is in brackets, and may contain blanks and brackets itself.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        ticks: number(11)? + number(12)? + number(13)? + number(14)?,
        started: number(19)?,
    })
}

type Table = HashMap<u32, Stat>;

fn read_table() -> anyhow::Result<Table> {
    let mut table = Table::new();
    for entry in fs::read_dir("/proc").context("CPU time can only be counted where there is a /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // The process may have ended since the folder was read.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        table.insert(pid, parse_stat(&text).with_context(|| format!("/proc/{pid}/stat has an unknown form"))?);
    }
    Ok(table)
}

fn same_processes(one: &Table, other: &Table) -> bool {
    one.len() == other.len()
        && one.iter().all(|(pid, stat)| other.get(pid).is_some_and(|same| same.started == stat.started))
}

fn settled_table() -> anyhow::Result<Table> {
    let mut table = read_table()?;
    for _ in 0..READINGS_MAX {
        let next = read_table()?;
        if same_processes(&table, &next) {
            return Ok(next);
        }
        table = next;
    }
    // On this machine processes start and end all the time. The error is what one of them used, which is little.
    Ok(table)
}

/// The ticks of a process and of all its descendants.
fn ticks_of_tree(table: &Table, root: u32) -> u64 {
    let mut ticks = 0;
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        ticks += table.get(&pid).map_or(0, |stat| stat.ticks);
        open.extend(table.iter().filter(|(_, stat)| stat.parent == pid).map(|(child, _)| *child));
    }
    ticks
}

/// Ticks per second, which the kernel tells each process in its auxiliary vector. Current machines all have 100.
fn ticks_per_second() -> u64 {
    const AT_CLKTCK: u64 = 17;
    let vector = fs::read("/proc/self/auxv").unwrap_or_default();
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
    let entry = vector.chunks_exact(16).find(|entry| word(&entry[..8]) == AT_CLKTCK);
    entry.map_or(100, |entry| word(&entry[8..]))
}

/// How many files this process may have open, including connections.
#[must_use]
pub fn open_files_max() -> usize {
    parse_open_files(&fs::read_to_string("/proc/self/limits").unwrap_or_default())
}

/// The first number of the line is the limit in force. If it is no number, there is no limit.
fn parse_open_files(limits: &str) -> usize {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(usize::MAX)
}

/// The ticks in which any processor of the machine worked, from the first line of `/proc/stat`.
fn busy_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map(|field| field.parse::<u64>());
    let mut next = || fields.next()?.ok();
    // user nice system idle iowait irq softirq steal
    let (user, nice, system, _idle, _iowait, irq, softirq) =
        (next()?, next()?, next()?, next()?, next()?, next()?, next()?);
    Some(user + nice + system + irq + softirq)
}

/// The CPU time used up to one moment.
pub struct Snapshot {
    parts: Vec<(Part, u64, u64)>,
    generator: u64,
    machine: u64,
}

impl Snapshot {
    /// Reads the CPU time that has been used by now.
    ///
    /// # Errors
    /// If one of the processes does not exist, or there is no `/proc`.
    pub fn take(parts: &[Part]) -> anyhow::Result<Self> {
        let table = settled_table()?;
        let taken = parts.iter().map(|part| {
            let Some(root) = table.get(&part.pid) else {
                bail!("there is no process {} ({}); was it restarted?", part.pid, part.label)
            };
            Ok((part.clone(), root.started, ticks_of_tree(&table, part.pid)))
        });
        Ok(Self {
            parts: taken.collect::<anyhow::Result<_>>()?,
            generator: ticks_of_tree(&table, std::process::id()),
            machine: busy_ticks(&fs::read_to_string("/proc/stat")?).context("/proc/stat has an unknown form")?,
        })
    }

    /// The CPU time used between `self` and `later`.
    ///
    /// # Errors
    /// If a process was replaced meanwhile, so that its time is lost.
    pub fn until(&self, later: &Self) -> anyhow::Result<CpuSeconds> {
        let seconds = |ticks: u64| ticks as f64 / ticks_per_second() as f64;
        let mut parts = BTreeMap::new();
        for ((part, started, before), (_, started_later, after)) in self.parts.iter().zip(&later.parts) {
            if started != started_later {
                bail!("process {} ({}) was restarted during the run", part.pid, part.label);
            }
            *parts.entry(part.label.clone()).or_default() += seconds(after.saturating_sub(*before));
        }
        let generator = seconds(later.generator.saturating_sub(self.generator));
        let machine = seconds(later.machine.saturating_sub(self.machine));
        let system = parts.values().sum();
        Ok(CpuSeconds { parts, system, generator, others: (machine - system - generator).max(0.0) })
    }
}

/// The CPU seconds of one phase, user and system time together.
#[derive(Debug, Clone, Serialize)]
pub struct CpuSeconds {
    /// Seconds by part of the system.
    pub parts: BTreeMap<String, f64>,
    /// The sum of all parts.
    pub system: f64,
    /// Seconds of this program itself.
    pub generator: f64,
    /// Seconds of all other processes on the machine. A high value means that the figures are disturbed, or that a part
    /// was not named.
    pub others: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let text = "812 (a) b (c)) S 7 812 812 0 -1 4194560 99 0 0 0 11 22 33 44 20 0 4 0 5150 1 2";
        assert_eq!(parse_stat(text), Some(Stat { parent: 7, ticks: 110, started: 5150 }));
        assert_eq!(parse_stat("812 (a) S 7"), None);
    }

    #[test]
    fn a_tree_counts_all_descendants_of_its_root_and_nothing_else() {
        let stat = |parent, ticks| Stat { parent, ticks, started: 1 };
        let table =
            Table::from([(1, stat(0, 1000)), (5, stat(1, 1)), (6, stat(5, 10)), (7, stat(6, 100)), (8, stat(1, 1000))]);
        assert_eq!(ticks_of_tree(&table, 5), 111);
        assert_eq!(ticks_of_tree(&table, 99), 0);
    }

    #[test]
    fn a_child_that_ended_counts_with_its_parent() {
        let begun = Snapshot::take(&[Part { label: "me".to_owned(), pid: std::process::id() }]).unwrap();
        let work = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        assert!(std::process::Command::new("sh").args(["-c", work]).status().unwrap().success());
        let ended = Snapshot::take(&[Part { label: "me".to_owned(), pid: std::process::id() }]).unwrap();
        let used = begun.until(&ended).unwrap();
        assert!(used.parts["me"] >= 0.02, "the loop of 200,000 steps counted as {used:?}");
        assert!((used.parts["me"] - used.generator).abs() < 1e-9);
    }

    #[test]
    fn waiting_is_not_work() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 1000 8 16 1000 0 0\ncpu0 1 1"), Some(31));
        assert_eq!(busy_ticks("intr 5"), None);
    }

    #[test]
    fn the_first_limit_is_the_one_in_force() {
        let limits =
            "Max processes             95      95      processes\nMax open files            1024    524288    files\n";
        assert_eq!(parse_open_files(limits), 1024);
        assert_eq!(parse_open_files("Max open files   unlimited   unlimited   files"), usize::MAX);
    }

    #[test]
    fn a_process_is_given_with_its_label() {
        assert_eq!("event-db=42".parse::<Part>().unwrap(), Part { label: "event-db".to_owned(), pid: 42 });
        assert!("42".parse::<Part>().is_err());
        assert!("event-db=".parse::<Part>().is_err());
    }
}
