//! Hostile clients: what does a bystander notice of them? Each kind of hostility gets a server of
//! its own, a bystander on the server's CPU, and an attacker on the other one.

use std::time::{Duration, Instant};

use crate::attacker::{Attacker, Hostility, hostilities};
use crate::bystander::Bystander;
use crate::measure::{Outcome, microseconds};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "hostile";
pub const RATIO: &str = "pair, p99: disturbed / before";

/// The bystander alone.
const CALM: Duration = Duration::from_millis(1500);
/// The attacker alone with the bystander, after so long as its beginning takes.
const ATTACK: Duration = Duration::from_millis(2500);
const BEGINNING: Duration = Duration::from_millis(200);

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    let mut failures = Vec::new();
    for hostility in hostilities() {
        if !options.wants_hostility(hostility.case()) {
            continue;
        }
        match measure(programs, subject, hostility) {
            Ok(seen) => seen.record(results, subject, hostility),
            // Surviving is asked of ours alone.
            Err(error) if subject == Subject::C => {
                let case = hostility.case();
                results.note(format!(
                    "hostile: the C daemon was not measured with '{case}': {error}"
                ));
            }
            Err(error) => failures.push(format!("{}: {error}", hostility.case())),
        }
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

struct Seen {
    calm_p50: u64,
    calm_p99: u64,
    p50: u64,
    p99: u64,
    worst: u64,
    acts: u64,
    cpu_ns: u64,
    seconds: f64,
}

fn measure(programs: &Programs, subject: Subject, hostility: Hostility) -> Outcome<Seen> {
    let mut server = match hostility.limits() {
        Some(limits) => Server::start_limited(programs, subject, Placement::Apart, limits)?,
        None => Server::start(programs, subject, Placement::Apart)?,
    };
    let mut bystander = Bystander::start_beside(&server, hostility.leaves_descriptors())?;
    std::thread::sleep(BEGINNING);
    bystander.take()?;
    std::thread::sleep(CALM);
    let calm = bystander.take()?;
    let mut attacker = Attacker::start(&server, hostility)?;
    std::thread::sleep(BEGINNING);
    attacker.take()?;
    bystander.take()?;
    let (start, cpu) = (Instant::now(), probe::cpu_ns(server.pid)?);
    std::thread::sleep(ATTACK);
    let acts = attacker.take()?;
    let waits = bystander.take()?;
    let cpu_ns = probe::cpu_ns(server.pid)? - cpu;
    let seconds = start.elapsed().as_secs_f64();
    drop(attacker);
    server.check_alive()?;
    Ok(Seen {
        calm_p50: calm.pair_p50,
        calm_p99: calm.pair_p99,
        p50: waits.pair_p50,
        p99: waits.pair_p99,
        worst: waits.worst,
        acts,
        cpu_ns,
        seconds,
    })
}

impl Seen {
    fn record(&self, results: &mut Results, subject: Subject, hostility: Hostility) {
        let mut row = results.recorder(NAME, hostility.case(), subject);
        let time = |nanoseconds: u64| microseconds(nanoseconds as f64);
        row("pair before, p50", "us", time(self.calm_p50));
        row("pair before, p99", "us", time(self.calm_p99));
        row("pair, p50", "us", time(self.p50));
        row("pair, p99", "us", time(self.p99));
        row(RATIO, "", self.p99 as f64 / self.calm_p99 as f64);
        row("worst wait", "us", time(self.worst));
        row(
            "attacker's acts",
            "a second",
            self.acts as f64 / self.seconds,
        );
        row("CPU", "%", self.cpu_ns as f64 / 1e7 / self.seconds);
    }
}
