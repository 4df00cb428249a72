//! The report as one HTML page without external files: tables, and plots as SVG.

use std::fmt::Write;

use crate::audit::is_clean;
use crate::bench::Phase;
use crate::compare::Comparison;
use crate::measure::{Latency, Point};
use crate::plot::{Axis, Line, escape, svg};
use crate::report::RunResult;

const STYLE: &str = "body{font:15px/1.4 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}figure{margin:1em 0}figcaption{margin-bottom:.3em}
svg{max-width:48em;width:100%;background:#fafafa}svg text{font-size:11px;fill:#555}.grid{stroke:#ddd}
.good{color:#3a7d34}.bad{color:#b00020;font-weight:bold}";

/// The page of a single run.
#[must_use]
pub fn of_run(result: &RunResult) -> String {
    page(&format!("{} on {}", result.scenario, result.system), &body(result))
}

/// The page of a comparison: the medians, the curves of all rounds, and the last round of each system.
#[must_use]
pub fn of_comparison(comparison: &Comparison) -> String {
    let [one, other] = comparison.systems.each_ref().map(|name| escape(name));
    let mut text = format!(
        "<p>Medians of {} rounds, run in turn. The brackets show the smallest and the largest value.</p>",
        comparison.rounds[0].len()
    );
    let _ = write!(text, "<table><tr><th></th><th></th><th>{one}</th><th>{other}</th><th>ratio</th></tr>");
    for row in &comparison.rows {
        let [one, other] = row.spreads.map(|spread| spread.map_or("-".to_owned(), |spread| spread.to_text()));
        let ratio = row.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let (phase, figure) = (escape(&row.phase), escape(&row.figure));
        let _ =
            writeln!(text, "<tr><td>{phase}</td><td>{figure}</td><td>{one}</td><td>{other}</td><td>{ratio}</td></tr>");
    }
    text += "</table>";
    let mut names: Vec<&str> = comparison.rows.iter().map(|row| row.phase.as_str()).collect();
    names.dedup();
    for (index, name) in names.into_iter().enumerate() {
        let rounds = comparison.rounds.iter().flatten();
        let lines = rounds.enumerate().filter_map(|(round, result)| {
            let main = result.measured.phases.get(index)?.counted.main()?;
            let round = round % comparison.rounds[0].len() + 1;
            Some(Line { name: format!("{} {round}", result.system), points: main.latency.curve.clone() })
        });
        text += &curves(&format!("{name}: latency by percentile, each round"), lines.collect());
    }
    for result in comparison.rounds.iter().filter_map(|rounds| rounds.last()) {
        let _ = write!(text, "<h1>{}, last round</h1>{}", escape(&result.system), body(result));
    }
    page(&format!("{}: {} and {}", comparison.scenario, comparison.systems[0], comparison.systems[1]), &text)
}

fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><h1>{title}</h1>\n{body}</body></html>\n"
    )
}

fn body(result: &RunResult) -> String {
    let machine = serde_json::to_string(&result.machine).unwrap_or_default();
    let mut text = format!("<p>{}, on {}</p>", result.begun_at.format("%Y-%m-%d %H:%M UTC"), escape(&machine));
    text += "<ul>";
    for promise in &result.measured.promises {
        text += &verdict(promise.kept, &format!("{}: {}", promise.says, promise.found));
    }
    match &result.audit {
        None => text += "<li>no audit: no audit command was given</li>",
        Some(verdicts) => {
            for each in verdicts {
                let found = format!("audit, promise {}, {}: {} violations", each.promise, each.says, each.violations);
                text += &verdict(is_clean(std::slice::from_ref(each)), &found);
            }
        }
    }
    for (name, figure) in &result.measured.figures {
        let _ = write!(text, "<li>{}: {}</li>", escape(name), escape(figure));
    }
    text += "</ul>\n";
    for phase in &result.measured.phases {
        text += &of_phase(phase);
    }
    text
}

fn verdict(kept: bool, text: &str) -> String {
    let (class, word) = if kept { ("good", "kept") } else { ("bad", "BROKEN") };
    format!("<li><span class=\"{class}\">{word}</span> {}</li>", escape(text))
}

fn of_phase(phase: &Phase) -> String {
    let counted = &phase.counted;
    let mut text = format!(
        "<h2>{}</h2><p>{}; {:.0}/s over {:.1} s; {} operations, {} refused, {} failed, {} not sent.</p>",
        escape(&phase.name),
        escape(&phase.load),
        phase.per_second,
        phase.seconds,
        counted.operations,
        counted.refused,
        counted.failed,
        phase.not_sent
    );
    for note in &phase.notes {
        let _ = write!(text, "<p><b>{}</b></p>", escape(note));
    }
    text += "<table><tr><th>ms</th><th>count</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th></tr>";
    for step in &counted.steps {
        text += &row(&step.name, &step.latency);
        for (outcome, latency) in &step.by_outcome {
            text += &row(&format!("{}: {outcome}", step.name), latency);
        }
    }
    text += "</table>";
    text += &costs(phase);
    let line = |step: &crate::measure::StepResult| Line { name: step.name.clone(), points: step.latency.curve.clone() };
    text += &curves("Latency by percentile", counted.steps.iter().map(line).collect());
    text + &over_time(&counted.series)
}

fn row(name: &str, latency: &Latency) -> String {
    let Latency { count, mean_ms, p50_ms, p90_ms, p99_ms, p999_ms, max_ms, .. } = latency;
    let mut row = format!("<tr><td>{}</td><td>{count}</td>", escape(name));
    for millis in [mean_ms, p50_ms, p90_ms, p99_ms, p999_ms, max_ms] {
        let _ = write!(row, "<td>{millis:.2}</td>");
    }
    row + "</tr>\n"
}

fn costs(phase: &Phase) -> String {
    let mut text = String::new();
    if let (Some(cpu), Some(each)) = (&phase.cpu, phase.cpu_ms_per_operation) {
        text += "<table><tr><th>CPU</th><th>seconds</th><th>ms per operation</th></tr>";
        let total = [("the system", cpu.system)];
        let beside = [
            ("not included: the generator", cpu.generator),
            ("not included: other processes on this machine", cpu.others),
        ];
        let parts = cpu.parts.iter().map(|(label, seconds)| (label.as_str(), *seconds));
        for (label, seconds) in parts.chain(total).chain(beside) {
            let share = if cpu.system > 0.0 { each * seconds / cpu.system } else { 0.0 };
            let _ = writeln!(text, "<tr><td>{}</td><td>{seconds:.2}</td><td>{share:.3}</td></tr>", escape(label));
        }
        text += "</table>";
    }
    for wal in &phase.wal {
        let _ = writeln!(
            text,
            "<p>{}: {} flushes of the log ({:.2} per operation), {} records, {} bytes.</p>",
            wal.server, wal.flushes, wal.flushes_per_operation, wal.records, wal.bytes
        );
    }
    text
}

/// A milliseconds axis for all of these lines.
fn milliseconds(lines: &[Line]) -> Axis {
    let values =
        || lines.iter().flat_map(|line| line.points.iter().map(|(_, millis)| *millis)).filter(|millis| *millis > 0.0);
    Axis::milliseconds(values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max))
}

fn curves(title: &str, lines: Vec<Line>) -> String {
    let lines: Vec<Line> = lines.into_iter().filter(|line| !line.points.is_empty()).collect();
    if lines.is_empty() { String::new() } else { svg(title, &Axis::percentiles(), &milliseconds(&lines), &lines) }
}

fn over_time(series: &[Point]) -> String {
    let Some(last) = series.last() else { return String::new() };
    let time = Axis::linear(last.at_seconds);
    let line = |name: &str, read: fn(&Point) -> f64| Line {
        name: name.to_owned(),
        points: series.iter().map(|point| (point.at_seconds, read(point))).collect(),
    };
    let rates = [
        line("succeeded", |point| point.good_per_second),
        line("refused", |point| point.refused as f64),
        line("failed", |point| point.failed as f64),
    ];
    let most = rates.iter().flat_map(|line| &line.points).map(|(_, rate)| *rate).fold(1.0, f64::max);
    let latencies =
        [line("p50", |point| point.p50_ms), line("p99", |point| point.p99_ms), line("max", |point| point.max_ms)];
    svg("Per second, over the run", &time, &Axis::linear(most), &rates)
        + &svg("Latency, over the run", &time, &milliseconds(&latencies), &latencies)
}
