//! The report: a table for people, JSON for programs. The pictures are in `picture.rs`.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::goals::Goal;
use crate::options::Options;
use crate::results::{Measured, Results};
use crate::subject::{SUBJECTS, Subject, version};

/// Where and when the numbers were taken; no names, only the class of the machine.
pub struct Place {
    date: String,
    cpu: String,
    cpus: usize,
    memory_gib: u64,
    kernel: String,
    load: String,
}

fn first_line(path: &str, prefix: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix(prefix))
        .map(|rest| rest.trim().to_owned())
}

/// The version of a kernel release, without what its builder added.
fn before_dash(release: &str) -> String {
    release.split('-').next().unwrap_or(release).to_owned()
}

impl Place {
    pub fn here() -> Self {
        let unknown = || "unknown".to_owned();
        let date = Command::new("date")
            .args(["-u", "+%Y-%m-%d %H:%M UTC"])
            .output();
        let date = date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        let cpu = first_line("/proc/cpuinfo", "model name");
        let release = first_line("/proc/sys/kernel/osrelease", "");
        let memory = first_line("/proc/meminfo", "MemTotal:");
        let memory = memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            date: date.unwrap_or_else(|_| unknown()),
            cpu: cpu.map_or_else(unknown, |text| {
                text.trim_start_matches([':', ' ']).to_owned()
            }),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: memory.unwrap_or(0).div_ceil(1024 * 1024),
            kernel: release.map_or_else(unknown, |text| before_dash(&text)),
            load: first_line("/proc/loadavg", "").unwrap_or_else(unknown),
        }
    }

    /// One line for tables and pictures.
    pub fn line(&self) -> String {
        let Self {
            date,
            cpu,
            cpus,
            memory_gib,
            kernel,
            ..
        } = self;
        format!("{date}, {cpus} x {cpu}, {memory_gib} GiB, Linux {kernel}")
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        size if size.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn cell(measured: &Measured, subject: Subject) -> String {
    let mark = if measured.is_extrapolated(subject) {
        "~"
    } else {
        ""
    };
    measured.median(subject).map_or_else(
        || "-".to_owned(),
        |value| format!("{mark}{}", number(value)),
    )
}

fn ratio(measured: &Measured, upper: Subject, lower: Subject) -> String {
    match (measured.median(upper), measured.median(lower)) {
        (Some(upper), Some(lower)) if lower != 0.0 => number(upper / lower),
        _ => "-".to_owned(),
    }
}

/// All rows and goals as Markdown.
pub fn table(results: &Results, goals: &[Goal], place: &Place, options: &Options) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        let _ = writeln!(text, "{words}");
    };
    line(format!(
        "{} (load {}); medians of {} runs",
        place.line(),
        place.load,
        options.runs
    ));
    line(String::new());
    // The column of another build is there if it was measured.
    let has_before = options.subjects.contains(&Subject::Before);
    let shown = SUBJECTS
        .into_iter()
        .filter(|&of| of != Subject::Before || has_before);
    let mut heads: Vec<&str> = shown.clone().map(Subject::title).collect();
    heads.extend(["C / ours", "ours / floor"]);
    heads.extend(has_before.then_some("ours / before"));
    let heads = heads.join(" | ");
    line(format!("| scenario | case | what | unit | {heads} |"));
    let dashes = heads.split(" | ").map(|_| "--:|").collect::<String>();
    line(format!("|---|---|---|---|{dashes}"));
    for measured in &results.rows {
        let row = &measured.row;
        let mut numbers: Vec<String> = shown.clone().map(|of| cell(measured, of)).collect();
        numbers.push(ratio(measured, Subject::C, Subject::Ours));
        numbers.push(ratio(measured, Subject::Ours, Subject::Floor));
        numbers.extend(has_before.then(|| ratio(measured, Subject::Ours, Subject::Before)));
        let numbers = numbers.join(" | ");
        line(format!(
            "| {} | {} | {} | {} | {numbers} |",
            row.scenario, row.case, row.metric, row.unit
        ));
    }
    line(String::new());
    line("| goal | limit | C daemon | virtlockd-rs | |".into());
    line("|---|---|--:|--:|---|".into());
    for goal in goals {
        let met = match goal.is_met() {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "not measured",
        };
        let value = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
        let (c, ours) = (value(goal.c), value(goal.ours));
        line(format!(
            "| {} | {} | {c} | {ours} | {met} |",
            goal.what,
            goal.limit_text()
        ));
    }
    for note in &results.notes {
        line(format!("\nNote: {note}."));
    }
    for failure in &results.failures {
        line(format!("\nFAILED: {failure}"));
    }
    text
}

/// The same for programs.
pub fn as_json(results: &Results, goals: &[Goal], place: &Place, options: &Options) -> Value {
    let rows: Vec<Value> = results.rows.iter().map(row_json).collect();
    let goals: Vec<Value> = goals
        .iter()
        .map(|goal| {
            json!({
                "goal": goal.what, "limit": goal.limit_text(),
                "c": goal.c, "ours": goal.ours, "met": goal.is_met(),
            })
        })
        .collect();
    json!({
        "date": place.date,
        "machine": {
            "cpu": place.cpu, "cpus": place.cpus, "memory_gib": place.memory_gib,
            "kernel": place.kernel, "load_at_start": place.load,
        },
        "versions": {
            "c": version(&options.c), "ours": version(&options.ours),
            "before": options.before.as_deref().and_then(version),
        },
        "runs": options.runs,
        "quick": options.quick,
        "rows": rows,
        "goals": goals,
        "notes": results.notes,
        "failures": results.failures,
    })
}

fn row_json(measured: &Measured) -> Value {
    let row = &measured.row;
    let mut object = json!({
        "scenario": row.scenario, "case": row.case, "metric": row.metric, "unit": row.unit,
    });
    for subject in SUBJECTS {
        if let Some(median) = measured.median(subject) {
            object[subject.word()] = json!({
                "median": median,
                "runs": measured.values(subject),
                "extrapolated": measured.is_extrapolated(subject),
            });
        }
    }
    object
}
