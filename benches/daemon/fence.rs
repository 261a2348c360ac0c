//! Fencing: an owner closes its connection, lives on and ignores SIGTERM. When is it dead, when is
//! its lock free, and what does a bystander notice? Server and bystander have a CPU for themselves
//! and go before everything else there: one wait in thousands is asked about, and on a shared machine
//! most of those would be the machine's.

use std::time::{Duration, Instant};

use crate::bystander::Bystander;
use crate::measure::{Outcome, milliseconds};
use crate::nursery::{DISKS_PER_OWNER, Funeral, Nursery, Temper};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "fence";
pub const CASE: &str = "owner ignores SIGTERM";
pub const WORST: &str = "bystander's worst wait";
pub const FREE_WHILE_ALIVE: &str = "locks free while the owner lived";

const FREE_LIMIT: Duration = Duration::from_secs(30);
const AFTERMATH: Duration = Duration::from_millis(200);
/// The bystander looks on for this long before anything happens: what it sees then is the machine's
/// doing.
const CALM: Duration = Duration::from_millis(1600);

pub fn run(_: &Options, programs: &Programs, of: Subject, results: &mut Results) -> Outcome<()> {
    let mut server = Server::start(programs, of, Placement::Apart)?;
    let mut nursery = Nursery::start(&server, 1, Funeral::Reaped, Temper::Stubborn)?;
    let owner = *nursery.owners.first().ok_or("no owner")?;
    let mut bystander = Bystander::start_beside(&server, true)?;
    std::thread::sleep(CALM);
    let calm = bystander.take()?;
    nursery.expect_death()?;
    let closed = nursery.close_connection()?;
    let deadline = Instant::now() + FREE_LIMIT;
    let mut free = 0;
    let mut free_while_alive = 0;
    for disk in 0..DISKS_PER_OWNER {
        free = probe::wait_until_free(&server.outside(&server.disk(disk)), deadline)?;
        // Looked at after the lock was seen free: an owner that lives now lived then.
        free_while_alive += u32::from(probe::is_alive(owner));
    }
    let dead = nursery.hear_of_death()?;
    std::thread::sleep(AFTERMATH);
    let waits = bystander.take()?;
    server.check_alive()?;
    let mut row = results.recorder(NAME, CASE, of);
    row(
        "owner dead after its close",
        "ms",
        milliseconds(dead as f64 - closed as f64),
    );
    row(
        "locks free after its close",
        "ms",
        milliseconds(free as f64 - closed as f64),
    );
    row(FREE_WHILE_ALIVE, "of 2", f64::from(free_while_alive));
    row(WORST, "ms", milliseconds(waits.worst as f64));
    row(
        "bystander's worst wait before",
        "ms",
        milliseconds(calm.worst as f64),
    );
    row("bystander's calls", "calls", waits.calls as f64);
    Ok(())
}
