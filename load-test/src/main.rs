//! The load test's command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use load_test::bench::Bench;
use load_test::compare::Comparison;
use load_test::processes::Snapshot;
use load_test::report::{Machine, RunResult, now, save};
use load_test::scenarios::Scenario;
use load_test::system::{System, SystemArguments};
use load_test::{audit, html};

/// Drives a running system with buyers, and reports rates, latencies, CPU time per operation, and whether the promises
/// held.
/// Exits with 2 when a promise was broken.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    system: SystemArguments,
    /// Folder for the reports, as JSON and as HTML
    #[arg(long, global = true, value_name = "FOLDER", default_value = "target/load-test")]
    output: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    One(Scenario),
    /// Run the same scenario on two systems in turn: A B A B A B
    Compare(Box<Pair>),
}

#[derive(Args)]
struct Pair {
    /// The first system: its options in one argument, such as '--name ours --state-dir .local'
    #[arg(long, allow_hyphen_values = true, value_parser = system_line)]
    a: SystemArguments,
    /// The second system, given in the same way
    #[arg(long, allow_hyphen_values = true, value_parser = system_line)]
    b: SystemArguments,
    /// How many rounds each system gets
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: u8,
    #[command(subcommand)]
    scenario: Scenario,
}

/// The options of one system, without a program name or a scenario.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct SystemLine {
    #[command(flatten)]
    system: SystemArguments,
}

fn system_line(text: &str) -> Result<SystemArguments, clap::Error> {
    SystemLine::try_parse_from(text.split_whitespace()).map(|line| line.system)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let local = tokio::task::LocalSet::new();
    match local.run_until(run(&arguments)).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: a promise was broken; see above");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the command. Returns whether all promises were kept.
async fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let stamp = now().format("%Y%m%d-%H%M%S");
    let (good, [json, html]) = match &arguments.command {
        Command::One(scenario) => {
            let result = run_once(&arguments.system.find()?, scenario).await?;
            let name = format!("{stamp}-{}", scenario.name());
            (result.is_good(), save(&arguments.output, &name, &result, &html::of_run(&result))?)
        }
        Command::Compare(pair) => {
            let Pair { a, b, rounds, scenario } = &**pair;
            let systems = [a.find()?, b.find()?];
            let mut results = [Vec::new(), Vec::new()];
            for round in 1..=*rounds {
                for (system, results) in systems.iter().zip(&mut results) {
                    println!("\nround {round} of {rounds}");
                    results.push(run_once(system, scenario).await.with_context(|| system.name.clone())?);
                }
            }
            let comparison = Comparison::of(results);
            println!("{}", comparison.to_text());
            let name = format!("{stamp}-compare-{}", scenario.name());
            (comparison.is_good(), save(&arguments.output, &name, &comparison, &html::of_comparison(&comparison))?)
        }
    };
    println!("\nreport: {} and {}", html.display(), json.display());
    Ok(good)
}

async fn run_once(system: &System, scenario: &Scenario) -> anyhow::Result<RunResult> {
    let begun_at = now();
    // Checks the process ids before the set-up, which takes long.
    Snapshot::take(&system.parts)?;
    let measured = scenario.run(&Bench::on(system)).await?;
    let audit = match &system.audit {
        Some(program) => Some(audit::run(program).await?),
        None => None,
    };
    let result = RunResult {
        scenario: scenario.name().to_owned(),
        system: system.name.clone(),
        begun_at,
        machine: Machine::this(),
        measured,
        audit,
    };
    println!("{}", result.to_text());
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Splits a line into words as a shell would: single quotes hold words together, and a number sign ends the line.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(" # ").next().unwrap();
        let quoted = line.split('\'').enumerate();
        quoted
            .flat_map(|(index, part)| match index % 2 {
                0 => part.split_whitespace().map(str::to_owned).collect(),
                _ => vec![part.to_owned()],
            })
            .collect()
    }

    #[test]
    fn the_command_lines_of_the_performance_guide_are_understood() {
        let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
        let guide = fs::read_to_string(guide).unwrap().replace("\\\n", " ");
        let lines: Vec<&str> = guide.lines().filter(|line| line.starts_with("target/release/load-test ")).collect();
        assert!(lines.len() >= 4, "only {} were found", lines.len());
        for line in lines {
            if let Err(error) = Arguments::try_parse_from(words(line)) {
                panic!("{line}\n{error}");
            }
        }
    }

    #[test]
    fn options_of_a_system_may_stand_before_and_after_the_scenario() {
        let arguments = [
            "load-test",
            "--event-url",
            "http://127.0.0.1:1",
            "hot",
            "--booking-url",
            "http://127.0.0.1:2,http://127.0.0.1:3",
        ];
        let system = Arguments::try_parse_from(arguments).unwrap().system.find().unwrap();
        assert_eq!((system.event.to_string().as_str(), system.bookings.len()), ("http://127.0.0.1:1", 2));
        assert!(Arguments::try_parse_from(["load-test", "hot"]).unwrap().system.find().is_err());
    }
}
