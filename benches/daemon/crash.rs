//! The death of the process that serves, with thousands of guests, and then of everything at once: how long
//! is the longest silence that a busy client sees, is an answer lost or given twice, and how long does a start
//! take until every lock is held again?

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::boot::{DISKS_PER_MACHINE, boot, check_all_locked};
use crate::machines::Machines;
use crate::measure::{Outcome, milliseconds};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};
use crate::watch::{INDEX, Watch};

pub const NAME: &str = "crash";
pub const SILENCE: &str = "longest silence";
pub const LOST: &str = "replies lost";
pub const DOUBLED: &str = "replies doubled";
pub const COLD: &str = "cold start";

/// Deaths in one run, each of which may lose a reply.
const ROUNDS: u32 = 5;

pub fn case(machines: u32) -> String {
    format!("{machines} VMs")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    for &machines in &options.sizes.crash {
        let mut processes = Machines::ready(machines + 1)?;
        let mut server = Server::start(programs, subject, Placement::Split)?;
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        if probe::youngest_child(server.pid)?.is_none() {
            let title = subject.title();
            results.note(format!(
                "crash: the {title} serves from a single process, whose death frees every lock"
            ));
            return Ok(());
        }
        boot(&server, &mut processes, machines)?;
        let owner = processes.start_one(&server, INDEX)?;
        let mut watch = Watch::begin(&server, owner)?;
        for _ in 0..ROUNDS {
            let serving = || probe::youngest_child(server.pid);
            let reactor = serving()?.ok_or("no process serves")?;
            let end = move || kill(Pid::from_raw(reactor), Signal::SIGKILL);
            if !watch.round(&server, end, || Ok(format!("{:?}", serving()?)))? {
                return Err("the process that served could not be killed".into());
            }
        }
        server.check_alive()?;
        check_all_locked(&server, machines)?;
        let mut row = results.recorder(NAME, case(machines), subject);
        row(SILENCE, "ms", milliseconds(watch.silence_ns as f64));
        row(LOST, "of 5", f64::from(watch.lost));
        row(DOUBLED, "of 5", f64::from(watch.doubled));
        drop(watch);
        let took = server.start_again(programs, subject, Placement::Split)?;
        check_all_locked(&server, machines)?;
        row(COLD, "ms", took.as_secs_f64() * 1e3);
    }
    Ok(())
}
