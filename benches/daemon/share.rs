//! Disks on a share: what does a bystander with a local disk notice while a share hangs and its guests
//! wait, and how long do machines take to start whose disks are on a share with a round trip?
//!
//! The share's server is a helper on the CPU of the bench (`mounts.rs`); each call to it hangs, or takes its
//! time, whoever makes it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::boot::boot_with;
use crate::bystander::{Bystander, Waits};
use crate::client::{Client, acquire, connect_many, register};
use crate::machines::Machines;
use crate::measure::{Outcome, microseconds, milliseconds, now_ns};
use crate::mounts::Mounted;
use crate::options::Options;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "share";
pub const RATIO: &str = "pair, p99: hung / before";
pub const WORST: &str = "bystander's worst wait";
pub const TIME: &str = "all running";

/// What each call to the share takes while machines start on it.
const ROUND_TRIP: Duration = Duration::from_millis(2);
/// The bystander alone, and beside the share that hangs.
const CALM: Duration = Duration::from_secs(3);
const HUNG: Duration = Duration::from_secs(5);
const BEGINNING: Duration = Duration::from_millis(200);
/// A server that has not answered the bystander so long after that does not answer. Both together are
/// shorter than the 10 s after which a guardian of ours kills a process that serves.
const SILENCE: Duration = Duration::from_secs(3);
/// The server has asked the share by then.
const ASKED_LIMIT: Duration = Duration::from_secs(10);

pub fn hung_case(guests: u32) -> String {
    format!("hangs, {guests} wait")
}

pub fn boot_case(machines: u32) -> String {
    let trip = ROUND_TRIP.as_millis();
    format!("boot, {machines} VMs, {trip} ms a call")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    let hung = hang(programs, subject, options.sizes.share_waiting, results);
    let mut failures: Vec<String> = hung.err().into_iter().collect();
    for &machines in &options.sizes.share_boot {
        let case = boot_case(machines);
        let booted = start_all(programs, subject, machines, results);
        failures.extend(booted.err().map(|error| format!("{case}: {error}")));
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

/// A share of the server. Nothing where there is none, which is noted.
fn mount(server: &Server, guests: u32, results: &mut Results) -> Outcome<Option<Mounted>> {
    let share = Mounted::start(server, guests)?;
    if share.is_none() {
        results.note("share: FUSE cannot be used here: it was not measured".into());
    }
    Ok(share)
}

/// The share hangs, and so many guests of it wait in an acquire.
fn hang(programs: &Programs, subject: Subject, guests: u32, results: &mut Results) -> Outcome<()> {
    let mut processes = Machines::ready(guests)?;
    let mut server = Server::start(programs, subject, Placement::Apart)?;
    let Some(mut share) = mount(&server, guests, results)? else {
        return Ok(());
    };
    let owners = processes.start_all(&server, 0..guests)?;
    let greeting = |guest: u32| {
        let owner = owners.get(guest as usize).copied();
        vec![register(guest, owner.unwrap_or_default())]
    };
    let mut clients = connect_many(&server.socket(), 0..guests, greeting)?;
    let mut bystander = Bystander::start_beside(&server, true)?;
    std::thread::sleep(BEGINNING);
    bystander.take()?;
    std::thread::sleep(CALM);
    let calm = bystander.take()?;
    share.hang()?;
    let asked = share.calls()?;
    let mut serials = Vec::with_capacity(clients.len());
    for (guest, client) in (0..).zip(&mut clients) {
        serials.push(client.send(&mut acquire(&Mounted::disk(guest)))?);
    }
    let deadline = Instant::now() + ASKED_LIMIT;
    while share.calls()? == asked {
        if Instant::now() > deadline {
            return Err("guests acquire on the share, and it is asked for nothing".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let waits = match stand_by(&mut bystander) {
        Ok(waits) => waits,
        // Being there for others is asked of ours alone.
        Err(_) if subject != Subject::Ours => {
            let title = subject.title();
            results.note(format!(
                "share: while a share hangs, the {title} does not answer a bystander"
            ));
            return Ok(());
        }
        Err(error) => {
            let case = hung_case(guests);
            return Err(format!("{case}: it does not answer a bystander: {error}"));
        }
    };
    let answered = clients.iter().filter(|client| has_news(client)).count();
    if answered > 0 {
        return Err(format!(
            "{answered} of {guests} guests were answered while their share hung"
        ));
    }
    let well_ns = now_ns();
    share.mend()?;
    for (client, serial) in clients.iter_mut().zip(serials) {
        client.receive(serial)?;
    }
    let served_ns = now_ns() - well_ns;
    server.check_alive()?;
    share.check_all_locked(guests)?;
    let mut row = results.recorder(NAME, hung_case(guests), subject);
    let time = |nanoseconds: u64| microseconds(nanoseconds as f64);
    row("pair before, p50", "us", time(calm.pair_p50));
    row("pair before, p99", "us", time(calm.pair_p99));
    row("pair, p50", "us", time(waits.pair_p50));
    row("pair, p99", "us", time(waits.pair_p99));
    row(RATIO, "", waits.pair_p99 as f64 / calm.pair_p99 as f64);
    let time = |nanoseconds: u64| milliseconds(nanoseconds as f64);
    row("bystander's worst wait before", "ms", time(calm.worst));
    row(WORST, "ms", time(waits.worst));
    row("all served, once it answers", "ms", time(served_ns));
    Ok(())
}

/// What the bystander sees while the share hangs. The worst wait is of all that time, so its beginning counts.
fn stand_by(bystander: &mut Bystander) -> Outcome<Waits> {
    std::thread::sleep(HUNG);
    bystander.take_within(SILENCE)
}

/// Whether something was sent to a client, if only that the connection is over.
fn has_news(client: &Client) -> bool {
    let mut interest = [PollFd::new(client.stream.as_fd(), PollFlags::POLLIN)];
    poll(&mut interest, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Machines start as in `boot.rs`, with one disk each, which is on the share.
fn start_all(
    programs: &Programs,
    subject: Subject,
    machines: u32,
    results: &mut Results,
) -> Outcome<()> {
    let mut processes = Machines::ready(machines)?;
    let mut server = Server::start(programs, subject, Placement::Split)?;
    let Some(mut share) = mount(&server, machines, results)? else {
        return Ok(());
    };
    share.slow_down(ROUND_TRIP)?;
    let disk_of = |machine, number| (number == 0).then(|| Mounted::disk(machine));
    let start = Instant::now();
    boot_with(&server, &mut processes, machines, disk_of)?;
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    let calls = share.calls()?;
    server.check_alive()?;
    share.check_all_locked(machines)?;
    let mut row = results.recorder(NAME, boot_case(machines), subject);
    row(TIME, "ms", milliseconds);
    row(
        "calls to the share per VM",
        "",
        calls as f64 / f64::from(machines),
    );
    Ok(())
}
