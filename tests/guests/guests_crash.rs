//! The daemon's processes are killed, the one that serves and the one that was started, while real guests
//! start, run and stop. libvirtd and the guests notice nothing.

use crate::alone;
use crate::guests_upgrade::{
    Competitor, StopOnDrop, call_until, check_afterwards, churn_until, start_guests,
};
use crate::support::daemon::{Daemon, kill_all, program, reactor_of};
use crate::support::libvirt::{self, Libvirt};
use crate::support::random::Random;
use crate::support::{DEADLINE, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const KILLS: usize = 50;
/// One kill out of so many is the guardian's.
const GUARDIANS: usize = 5;
/// A guest takes longer to start; a kill falls anywhere in that.
const WITHIN_A_START_US: usize = 400_000;

/// The daemon's processes, whose numbers change.
struct Processes {
    guardian: i32,
}

impl Processes {
    fn of(daemon: &Daemon) -> Processes {
        Processes {
            guardian: daemon.pid(),
        }
    }

    /// The process that serves, once there is one.
    fn reactor(&self) -> i32 {
        wait_for(DEADLINE, "a process that serves", || {
            let now = reactor_of(self.guardian);
            (now != self.guardian).then_some(now)
        })
    }

    fn kill_reactor(&self) {
        let before = self.reactor();
        kill(Pid::from_raw(before), Signal::SIGKILL).expect("kill the process that serves");
        wait_until(DEADLINE, "another process that serves", || {
            self.reactor() != before
        });
    }

    /// The process that serves takes its place.
    fn kill_guardian(&mut self) {
        let next = self.reactor();
        let pid_file = format!("/proc/{next}/root/run/virtlockd.pid");
        kill(Pid::from_raw(self.guardian), Signal::SIGKILL).expect("kill the guardian");
        wait_until(DEADLINE, "the pid file to name the next guardian", || {
            let text = std::fs::read_to_string(&pid_file);
            text.is_ok_and(|text| text.trim() == next.to_string())
        });
        self.guardian = next;
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        kill_all(self.guardian);
    }
}

#[test]
fn fifty_deaths_of_the_daemons_processes_lose_no_start_no_lock_and_no_call() {
    if !libvirt::can_run() {
        return;
    }
    let _alone = alone();
    let mut libvirt = Libvirt::start(&program(), "");
    let lockd = libvirt.take_lockd();
    let (names, disks) = start_guests(&libvirt, 2);
    let mut processes = Processes::of(&lockd);
    let mut random = Random::new(Random::seed_from("VIRTLOCKD_DEATHS_SEED"));
    let files = |what: &str| -> Vec<PathBuf> {
        (0..2)
            .map(|number| libvirt.disk(&format!("{what}{number}")))
            .collect()
    };
    let (churned, called) = (files("churned"), files("called"));
    let socket: &Path = lockd.lock_socket();
    let (starts, competitor) = (AtomicUsize::new(0), Competitor::new(&disks));
    let stop = &competitor.stop;
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(stop);
        let competing = scope.spawn(|| competitor.run());
        let callers: Vec<_> = called
            .iter()
            .map(|disk| scope.spawn(|| call_until(stop, socket, disk)))
            .collect();
        let (libvirt, starts) = (&libvirt, &starts);
        let churning: Vec<_> = churned
            .iter()
            .enumerate()
            .map(|(number, disk)| {
                let name = format!("churn{number}");
                scope.spawn(move || churn_until(stop, libvirt, &name, disk, starts))
            })
            .collect();
        for number in 1..=KILLS {
            let within = random.below(WITHIN_A_START_US);
            std::thread::sleep(Duration::from_micros(within as u64));
            match number % GUARDIANS {
                0 => processes.kill_guardian(),
                _ => processes.kill_reactor(),
            }
            let failed = churning.iter().any(|it| it.is_finished());
            assert!(!failed, "a guest did not start or stop at kill {number}");
        }
        let before = starts.load(Ordering::Relaxed);
        wait_until(DEADLINE, "guests to start behind the last kill", || {
            starts.load(Ordering::Relaxed) > before + 1 || competing.is_finished()
        });
        stop.store(true, Ordering::Relaxed);
        let got = competing.join().expect("the competitor's thread");
        assert_eq!(got, None, "somebody else got a running guest's lock");
        let calls: usize = callers
            .into_iter()
            .map(|caller| caller.join().expect("a caller's thread"))
            .sum();
        eprintln!(
            "{KILLS} kills: {calls} calls, {} guests, {} tries to get a lock",
            starts.load(Ordering::Relaxed),
            competitor.tries.load(Ordering::Relaxed)
        );
        assert!(calls > KILLS && starts.load(Ordering::Relaxed) > KILLS / 10);
    });
    check_afterwards(&libvirt, &names, &disks);
}
