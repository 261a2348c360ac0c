//! What the small benches share: a timer, a counter of allocations, a table.
//!
//! They measure pure functions of a few nanoseconds, so a loop with a clock around it is enough.

pub mod allocations;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How a small bench was asked to run.
pub struct Request {
    quick: bool,
    keep: bool,
}

/// Nothing if this is no bench run: `cargo test` starts benches too, without the word `--bench`.
pub fn request() -> Option<Request> {
    let mut arguments = pico_args::Arguments::from_env();
    if !arguments.contains("--bench") {
        println!("this measures: start it with `cargo bench`");
        return None;
    }
    let request = Request {
        quick: arguments.contains("--quick"),
        keep: arguments.contains("--keep"),
    };
    let rest = arguments.finish();
    assert!(
        rest.is_empty(),
        "unknown arguments {rest:?}; there are --quick and --keep"
    );
    Some(request)
}

/// Repetitions of a measurement, of which the median counts.
const REPETITIONS: usize = 5;

impl Request {
    /// How long one repetition takes.
    pub fn time(&self) -> Duration {
        Duration::from_millis(if self.quick { 20 } else { 300 })
    }

    /// Prints the report, and keeps it if that was asked for.
    pub fn report(&self, name: &str, table: &str) {
        println!("{table}");
        if self.keep {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
            let path = directory.join(format!("{name}.md"));
            let written = fs::create_dir_all(&directory).and_then(|()| fs::write(&path, table));
            written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
        }
    }
}

/// What a stretch of work took.
pub struct Spent {
    time: Duration,
    allocations: u64,
}

/// Does the work and says what it took.
pub fn spent(work: impl FnOnce()) -> Spent {
    let allocations = allocations::count();
    let start = Instant::now();
    work();
    let time = start.elapsed();
    Spent {
        time,
        allocations: allocations::count() - allocations,
    }
}

/// Nanoseconds and allocations of one operation.
pub struct Cost {
    pub ns: f64,
    pub allocations: f64,
}

/// Median cost of an operation. `turn` does `operations` of them and returns what they took; what
/// else it does, to prepare and to clean up, is not counted.
pub fn cost(time: Duration, operations: u64, mut turn: impl FnMut() -> Spent) -> Cost {
    let mut repetitions = Vec::with_capacity(REPETITIONS);
    let mut allocations = 0;
    let mut all = 0_u64;
    // The first repetition warms up.
    for repetition in 0..=REPETITIONS {
        let start = Instant::now();
        let mut busy = Duration::ZERO;
        let mut done = 0_u64;
        while start.elapsed() < time {
            let spent = turn();
            busy += spent.time;
            done += operations;
            allocations += spent.allocations;
        }
        all += done;
        if repetition > 0 {
            repetitions.push(busy.as_nanos() as f64 / done as f64);
        }
    }
    repetitions.sort_unstable_by(f64::total_cmp);
    Cost {
        ns: repetitions[REPETITIONS / 2],
        allocations: allocations as f64 / all as f64,
    }
}

/// A Markdown table that grows by rows.
pub struct Table(String);

impl Table {
    pub fn new(columns: &[&str]) -> Self {
        let mut table = Self(String::new());
        table.row(columns);
        table.row(&vec!["---"; columns.len()]);
        table
    }

    pub fn row(&mut self, cells: &[&str]) {
        let _ = writeln!(self.0, "| {} |", cells.join(" | "));
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}
