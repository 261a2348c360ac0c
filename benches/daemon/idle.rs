//! Doing nothing: what do thousands of idle guests cost in wake-ups, CPU and memory?

use std::time::Duration;

use crate::machines::Machines;
use crate::measure::Outcome;
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "idle";
pub const WAKEUPS: &str = "wake-ups";
pub const RESIDENT: &str = "resident without guests";
pub const PER_GUEST: &str = "memory per guest";

/// After the last guest has come.
const SETTLE: Duration = Duration::from_millis(500);

pub fn case(guests: u32) -> String {
    format!("{guests} guests")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    let guests = options.sizes.silent;
    let mut machines = Machines::ready(guests)?;
    let mut server = Server::start(programs, subject, Placement::Anywhere)?;
    std::thread::sleep(SETTLE);
    let before_kib = probe::resident_kib(server.pid)?;
    machines.start_all(&server, 0..guests)?;
    std::thread::sleep(SETTLE);
    let after_kib = probe::resident_kib(server.pid)?;
    let wakeups = probe::wakeups(server.pid)?;
    let cpu = probe::cpu_ns(server.pid)?;
    std::thread::sleep(Duration::from_secs(options.sizes.silent_seconds));
    let wakeups = probe::wakeups(server.pid)? - wakeups;
    let cpu = probe::cpu_ns(server.pid)? - cpu;
    server.check_alive()?;
    let mut row = results.recorder(NAME, case(guests), subject);
    row(WAKEUPS, "in the time", wakeups as f64);
    row("CPU", "us in the time", cpu as f64 / 1e3);
    row(RESIDENT, "MiB", before_kib as f64 / 1024.0);
    row(
        PER_GUEST,
        "KiB",
        after_kib.saturating_sub(before_kib) as f64 / f64::from(guests),
    );
    Ok(())
}
