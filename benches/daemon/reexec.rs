//! The re-exec at SIGUSR1 with thousands of guests: how long is the longest silence that a busy
//! client sees, and is a reply lost?

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

pub const NAME: &str = "reexec";
pub const SILENCE: &str = "longest silence";
pub const LOST: &str = "replies lost";

/// Re-execs in one run, each of which may lose a reply.
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
    for &machines in &options.sizes.reexec {
        let mut processes = Machines::ready(machines + 1)?;
        let mut server = Server::start(programs, subject, Placement::Split)?;
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        boot(&server, &mut processes, machines)?;
        let owner = processes.start_one(&server, INDEX)?;
        let mut watch = Watch::begin(&server, owner)?;
        for _ in 0..ROUNDS {
            let pid = Pid::from_raw(server.pid);
            let upgrade = move || kill(pid, Signal::SIGUSR1);
            if !watch.round(&server, upgrade, || probe::stack_place(server.pid))? {
                let title = subject.title();
                results.note(format!("reexec: the {title} does not re-exec at SIGUSR1"));
                return Ok(());
            }
        }
        server.check_alive()?;
        check_all_locked(&server, machines)?;
        let mut row = results.recorder(NAME, case(machines), subject);
        row(SILENCE, "ms", milliseconds(watch.silence_ns as f64));
        row(LOST, "of 5", f64::from(watch.lost));
    }
    Ok(())
}
