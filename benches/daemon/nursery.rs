//! Owners: small real processes, each with the connection that a guest keeps (the peer pid is the
//! owner's pid), and the nursery, their parent, which kills them and reaps them, or does not.
//!
//! The locks are taken by the bench over another connection, as libvirtd does it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::client::{Client, acquire, register, restrict};
use crate::helper::{Helper, ROLE, end_with_parent, own_program};
use crate::measure::{Outcome, now_ns};
use crate::subject::Server;

/// What the parent does with the dead.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Funeral {
    /// Reaps each at once.
    Reaped,
    /// Leaves them as zombies until the run is over.
    Zombies,
}

/// How an owner takes SIGTERM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Temper {
    /// Dies of it.
    Mild,
    /// Ignores it, closes its connection at SIGUSR1 and lives on.
    Stubborn,
}

/// Locks of one owner: two disks, as in the boot scenario.
pub const DISKS_PER_OWNER: u32 = 2;
const START_LIMIT: Duration = Duration::from_secs(300);
const DEATH_LIMIT: Duration = Duration::from_secs(60);

/// The running owners, by pid, in the order of their indexes.
pub struct Nursery {
    helper: Helper,
    pub owners: Vec<i32>,
}

impl Nursery {
    /// Starts the owners and takes their locks: owner i gets the disks 2i and 2i + 1.
    pub fn start(server: &Server, count: u32, funeral: Funeral, temper: Temper) -> Outcome<Self> {
        server.make_disks(0..count * DISKS_PER_OWNER)?;
        let funeral = if funeral == Funeral::Reaped {
            "reaped"
        } else {
            "zombies"
        };
        let temper = if temper == Temper::Mild {
            "mild"
        } else {
            "stubborn"
        };
        let socket = server.socket().display().to_string();
        let arguments = [socket, count.to_string(), funeral.into(), temper.into()];
        let mut helper = Helper::start("nursery", &arguments)?;
        let mut owners = vec![0; count as usize];
        for _ in 0..count {
            let born = helper.hear_numbers("born", START_LIMIT)?;
            let &[index, pid] = born.as_slice() else {
                return Err("a birth of nobody".into());
            };
            owners[index as usize] = pid as i32;
        }
        let nursery = Self { helper, owners };
        nursery.take_locks(server)?;
        Ok(nursery)
    }

    fn take_locks(&self, server: &Server) -> Outcome<()> {
        for (index, &pid) in (0_u32..).zip(&self.owners) {
            let mut libvirtd = Client::connect(&server.socket())?;
            libvirtd.call(&mut register(index, pid as u32))?;
            for disk in 0..DISKS_PER_OWNER {
                let disk = server.disk(index * DISKS_PER_OWNER + disk);
                libvirtd.call(&mut acquire(&disk))?;
            }
        }
        Ok(())
    }

    /// Kills all owners; returns when the killing began and when the last one was dead.
    pub fn kill_all(&mut self) -> Outcome<(u64, u64)> {
        self.helper.say("kill")?;
        let times = self.helper.hear_numbers("dead", DEATH_LIMIT)?;
        let &[first, last] = times.as_slice() else {
            return Err("a death without a time".into());
        };
        Ok((first, last))
    }

    /// From now on the nursery waits for somebody else to kill the owners.
    pub fn expect_death(&mut self) -> Outcome<()> {
        self.helper.say("wait")
    }

    /// Waits until all owners are dead, as expected; returns when the last one was.
    pub fn hear_of_death(&mut self) -> Outcome<u64> {
        let times = self.helper.hear_numbers("dead", DEATH_LIMIT)?;
        times
            .last()
            .copied()
            .ok_or_else(|| "a death without a time".into())
    }

    /// The stubborn owner closes its connection; returns the time.
    pub fn close_connection(&mut self) -> Outcome<u64> {
        let owner = self.owners.first().ok_or("no owner")?;
        kill(Pid::from_raw(*owner), Signal::SIGUSR1).map_err(|e| format!("SIGUSR1: {e}"))?;
        let times = self.helper.hear_numbers("closed", DEATH_LIMIT)?;
        times
            .first()
            .copied()
            .ok_or_else(|| "an end without a time".into())
    }
}

/// The nursery's side.
pub fn keep(socket: &str, count: u32, funeral: &str, temper: &str) -> Outcome<()> {
    let program = own_program()?;
    let mut owners = Vec::new();
    for index in 0..count {
        let child = Command::new(&program)
            .args([&format!("{ROLE}owner"), socket, &index.to_string(), temper])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| format!("starting owner {index}: {e}"))?;
        owners.push(Pid::from_raw(child.id() as i32));
    }
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|e| format!("waiting for a command: {e}"))?;
    let murder = line.trim() == "kill";
    let first = now_ns();
    let last = if funeral == "reaped" {
        let reaper = std::thread::spawn(reap_all);
        if murder {
            kill_each(&owners)?;
        }
        reaper.join().map_err(|_| "the reaper panicked")??
    } else {
        if murder {
            kill_each(&owners)?;
        }
        watch_each(&owners)?
    };
    println!("dead {first} {last}");
    line.clear();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|e| format!("waiting for the end: {e}"))?;
    Ok(())
}

fn kill_each(owners: &[Pid]) -> Outcome<()> {
    for &owner in owners {
        kill(owner, Signal::SIGKILL).map_err(|e| format!("killing owner {owner}: {e}"))?;
    }
    Ok(())
}

fn reap_all() -> Outcome<u64> {
    let mut last = now_ns();
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => last = now_ns(),
            Ok(status) => return Err(format!("an owner did not die of SIGKILL: {status:?}")),
            Err(Errno::ECHILD) => return Ok(last),
            Err(error) => return Err(format!("reaping: {error}")),
        }
    }
}

fn watch_each(owners: &[Pid]) -> Outcome<u64> {
    for &owner in owners {
        waitid(Id::Pid(owner), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            .map_err(|e| format!("watching owner {owner}: {e}"))?;
    }
    Ok(now_ns())
}

/// The owner's side. Its output is the nursery's, so the bench hears it directly.
pub fn live(socket: &Path, index: u32, temper: &str) -> Outcome<()> {
    end_with_parent()?;
    let stubborn = temper == "stubborn";
    let mut close = SigSet::empty();
    close.add(Signal::SIGUSR1);
    let mut blocked = close;
    if stubborn {
        blocked.add(Signal::SIGTERM);
    }
    blocked
        .thread_block()
        .map_err(|e| format!("blocking signals: {e}"))?;
    let pid = std::process::id();
    let mut client = Client::connect(socket)?;
    client.call(&mut register(index, pid))?;
    client.call(&mut restrict())?;
    println!("born {index} {pid}");
    close
        .wait()
        .map_err(|e| format!("waiting for SIGUSR1: {e}"))?;
    let closed = now_ns();
    drop(client);
    println!("closed {closed}");
    loop {
        close
            .wait()
            .map_err(|e| format!("waiting for the end: {e}"))?;
    }
}
