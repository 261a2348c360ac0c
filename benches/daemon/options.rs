//! What the person asked for: which scenarios, subjects and sizes.

use std::path::PathBuf;

use crate::measure::Outcome;
use crate::subject::{SUBJECTS, Subject};

pub const HELP: &str = "\
cargo bench --bench daemon -- [options]     (as root: it needs mount namespaces)
  --quick             small sizes and one run: does it work, what is the shape
  --runs N            runs of each scenario, interleaved between subjects (default 3; quick 1)
  --only A,B          of rtt,pipeline,fan,boot,storm,fence,reexec,crash,stop,listing,share,
                      idle,hostile
  --subjects A,B      of c,ours,before,floor
  --idle A,B          idle connections of rtt
  --busy A,B          clients of fan
  --machines A,B      machines of boot, reexec, crash, stop and listing, and those that share starts
  --waiting N         guests of share that wait while it hangs
  --hostile WORDS     of hostile, only the cases with these words in their name
  --c-most-idle N     no more idle connections than this for the C daemon, which takes minutes
  --daemon PATH       our daemon (default: the one just built)
  --before PATH       another build of it, to be compared: what has a change cost?
  --c-daemon PATH     libvirt's daemon (default /usr/sbin/virtlockd)
  --keep              write to benches/results/ instead of target/bench-results/
";

/// The sizes of one scenario each.
pub struct Sizes {
    pub idle: Vec<u32>,
    pub busy: Vec<u32>,
    pub boot: Vec<u32>,
    pub storm_reaped: Vec<u32>,
    pub storm_zombies: Vec<u32>,
    pub reexec: Vec<u32>,
    pub crash: Vec<u32>,
    pub listed: Vec<u32>,
    pub share_boot: Vec<u32>,
    pub share_waiting: u32,
    pub silent: u32,
    pub silent_seconds: u64,
}

impl Sizes {
    fn full() -> Self {
        Self {
            idle: vec![0, 100, 1000, 5000, 10_000, 19_900],
            busy: vec![64, 1000, 5000],
            boot: vec![1000, 6000],
            storm_reaped: vec![500, 2000],
            storm_zombies: vec![500, 2000],
            reexec: vec![100, 1000, 6000],
            crash: vec![100, 1000, 6000],
            listed: vec![6000],
            share_boot: vec![1000],
            share_waiting: 200,
            silent: 10_000,
            silent_seconds: 10,
        }
    }

    fn quick() -> Self {
        Self {
            idle: vec![0, 100, 1000],
            busy: vec![64, 500],
            boot: vec![300],
            storm_reaped: vec![100],
            storm_zombies: vec![100],
            reexec: vec![100],
            crash: vec![100],
            listed: vec![100],
            share_boot: vec![100],
            share_waiting: 20,
            silent: 1000,
            silent_seconds: 3,
        }
    }
}

pub struct Options {
    pub quick: bool,
    pub runs: u32,
    only: Option<Vec<String>>,
    pub subjects: Vec<Subject>,
    pub sizes: Sizes,
    hostile: Option<String>,
    pub c_most_idle: u32,
    pub ours: PathBuf,
    pub before: Option<PathBuf>,
    pub c: PathBuf,
    pub keep: bool,
}

/// What is to be done with these arguments.
pub enum Request {
    Help,
    /// `cargo test` runs benches too, without this word; measuring is not its business.
    NotABench,
    Run(Box<Options>),
}

fn list(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

fn numbers(text: &str) -> Outcome<Vec<u32>> {
    let mut found = Vec::new();
    for word in list(text) {
        found.push(
            word.parse()
                .map_err(|e| format!("'{word}' is not a number: {e}"))?,
        );
    }
    found.sort_unstable();
    Ok(found)
}

fn subjects(text: &str) -> Outcome<Vec<Subject>> {
    let find = |word: String| {
        let known = SUBJECTS.into_iter().find(|subject| subject.word() == word);
        known.ok_or_else(|| format!("no subject is called '{word}'"))
    };
    list(text).into_iter().map(find).collect()
}

pub fn parse(scenarios: &[&str]) -> Outcome<Request> {
    let mut arguments = pico_args::Arguments::from_env();
    if arguments.contains(["-h", "--help"]) {
        return Ok(Request::Help);
    }
    // cargo bench adds this word.
    if !arguments.contains("--bench") {
        return Ok(Request::NotABench);
    }
    let quick = arguments.contains("--quick");
    let keep = arguments.contains("--keep");
    let mut text = |name: &'static str| {
        arguments
            .opt_value_from_str::<_, String>(name)
            .map_err(|e| e.to_string())
    };
    let runs = match text("--runs")? {
        Some(runs) => runs.parse().map_err(|e| format!("--runs {runs}: {e}"))?,
        None if quick => 1,
        None => 3,
    };
    let only = text("--only")?.map(|words| list(&words));
    for word in only.iter().flatten() {
        if !scenarios.contains(&word.as_str()) {
            return Err(format!(
                "no scenario is called '{word}'; there are {scenarios:?}"
            ));
        }
    }
    let mut wanted = match text("--subjects")? {
        Some(words) => subjects(&words)?,
        None => SUBJECTS.to_vec(),
    };
    let before = text("--before")?.map(PathBuf::from);
    if before.is_none() {
        wanted.retain(|&subject| subject != Subject::Before);
    }
    let mut sizes = if quick { Sizes::quick() } else { Sizes::full() };
    if let Some(words) = text("--idle")? {
        sizes.idle = numbers(&words)?;
    }
    if let Some(words) = text("--busy")? {
        sizes.busy = numbers(&words)?;
    }
    if let Some(words) = text("--machines")? {
        sizes.boot = numbers(&words)?;
        sizes.reexec = sizes.boot.clone();
        sizes.crash = sizes.boot.clone();
        sizes.listed = sizes.boot.clone();
        sizes.share_boot = sizes.boot.clone();
    }
    if let Some(waiting) = text("--waiting")? {
        sizes.share_waiting = waiting
            .parse()
            .map_err(|e| format!("--waiting {waiting}: {e}"))?;
    }
    let hostile = text("--hostile")?;
    let c_most_idle = match text("--c-most-idle")? {
        Some(most) => most
            .parse()
            .map_err(|e| format!("--c-most-idle {most}: {e}"))?,
        None => u32::MAX,
    };
    let ours = text("--daemon")?
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_virtlockd").into())
        .into();
    let c = text("--c-daemon")?
        .unwrap_or_else(|| "/usr/sbin/virtlockd".into())
        .into();
    let rest = arguments.finish();
    if !rest.is_empty() {
        return Err(format!("unknown arguments: {rest:?}"));
    }
    let options = Options {
        quick,
        runs,
        only,
        subjects: wanted,
        sizes,
        hostile,
        c_most_idle,
        ours,
        before,
        c,
        keep,
    };
    Ok(Request::Run(Box::new(options)))
}

impl Options {
    pub fn wants(&self, scenario: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| only.iter().any(|word| word == scenario))
    }

    pub fn wants_hostility(&self, case: &str) -> bool {
        self.hostile
            .as_ref()
            .is_none_or(|words| case.contains(words.as_str()))
    }
}
