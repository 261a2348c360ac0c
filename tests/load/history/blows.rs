//! What befalls the daemon in the midst of a history: it is replaced, the process that serves is killed, the
//! one that was started, or both at once.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Run;
use crate::support::client::{Client, Reply, acquire, register_as};
use crate::support::daemon::{Daemon, kill_all, reactor_of};
use crate::support::owner::runs;
use crate::support::random::Random;
use crate::support::upgrade::{image, upgrade, wait_for_successor};
use crate::support::{DEADLINE, wait_for, wait_until};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// SIGUSR1.
    Upgrade,
    /// The process that serves is killed: its clients are to notice nothing.
    Reactor,
    /// The process that was started is killed: the same.
    Guardian,
    /// Both are, and the daemon is started again: connections are lost, and no lock is.
    Both,
}

/// A daemon that blows fall on. Its number changes.
pub struct Victim {
    daemon: Daemon,
    pid: i32,
    fallen: Vec<Blow>,
}

impl Victim {
    pub fn new(daemon: Daemon) -> Victim {
        let victim = Victim {
            pid: daemon.pid(),
            daemon,
            fallen: Vec::new(),
        };
        victim.serves();
        victim
    }

    /// Deals a blow, once the daemon serves, and waits until somebody is in its place.
    pub fn suffer(&mut self, blow: Blow, run: &Run<'_>) {
        self.serves();
        match blow {
            Blow::Upgrade if self.pid == self.daemon.pid() => upgrade(&self.daemon),
            Blow::Upgrade => {
                let before = image(self.pid);
                signal(self.pid, Signal::SIGUSR1);
                wait_for_successor(self.pid, &before);
            }
            Blow::Reactor => self.kill_reactor(),
            Blow::Guardian => self.kill_guardian(run),
            Blow::Both => self.kill_both(run),
        }
        self.fallen.push(blow);
    }

    /// One that was not dealt yet, or any.
    pub fn next_of(&self, blows: &[Blow], random: &mut Random) -> Blow {
        let missing = blows.iter().find(|blow| self.count(**blow) == 0);
        *missing.unwrap_or(random.pick(blows))
    }

    pub fn count(&self, blow: Blow) -> usize {
        self.fallen.iter().filter(|fallen| **fallen == blow).count()
    }

    /// The process that serves, once there is one.
    fn reactor(&self) -> i32 {
        wait_for(DEADLINE, "a process that serves", || {
            let reactor = reactor_of(self.pid);
            (reactor != self.pid).then_some(reactor)
        })
    }

    fn kill_reactor(&self) {
        let before = self.reactor();
        signal(before, Signal::SIGKILL);
        wait_until(DEADLINE, "another process that serves", || {
            ![before, self.pid].contains(&reactor_of(self.pid))
        });
    }

    fn kill_guardian(&mut self, run: &Run<'_>) {
        let before = self.pid;
        self.reactor();
        signal(before, Signal::SIGKILL);
        self.pid = wait_for(DEADLINE, "another main process", || {
            let text = std::fs::read_to_string(run.host.path("/run/virtlockd.pid")).ok()?;
            let pid: i32 = text.trim().parse().ok()?;
            (pid != before && reactor_of(pid) != pid).then_some(pid)
        });
    }

    /// While nobody is there who could hold a lock, nobody outside takes one, and nobody connects.
    fn kill_both(&mut self, run: &Run<'_>) {
        let _outside = run.gate.write().expect("the gate");
        run.cold_starts.fetch_add(1, Ordering::Relaxed);
        let both = [self.pid, self.reactor()];
        kill_all(self.pid);
        wait_until(DEADLINE, "both processes to be dead", || {
            !both.into_iter().any(runs)
        });
        self.daemon = run.host.start(&[], &[]);
        self.pid = self.daemon.pid();
        self.serves();
    }

    /// One that is killed before may be over: at a start nobody would lose anything; and a successor has an
    /// understudy until then, for which the process that serves ends with the one that was started.
    fn serves(&self) {
        Client::connect(self.daemon.lock_socket()).ping();
    }

    /// What the daemon says to somebody who wants a disk that is locked, and its processes.
    pub fn who_has(&self, disk: &str) -> (Reply, i32, i32) {
        let mut client = Client::connect(self.daemon.lock_socket());
        client.call(&register_as("nobody", 4242)).expect_ok();
        let reply = client.call(&acquire("", disk, 0));
        (reply, self.pid, reactor_of(self.pid))
    }

    /// It is there still.
    pub fn check(&mut self) {
        self.serves();
        if self.pid == self.daemon.pid() {
            assert_eq!(self.daemon.ended(), None);
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        if self.pid != self.daemon.pid() {
            kill_all(self.pid);
        }
    }
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal a process of the daemon");
}

/// How long nothing befalls the daemon after a blow.
pub const BETWEEN: Duration = Duration::from_millis(60);
