//! A daemon with a guest that must not notice anything, for hostile clients to be let loose on; and
//! what is measured of the daemon before, during and after.

use super::client::{Client, acquire, register_as, release};
use super::daemon::{Daemon, writers_of_notes};
use super::namespace::Namespace;
use super::{DEADLINE, assert_memory, is_sanitized, lock_probe, wait_until};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// The disk that the bystander holds all the time.
pub const HELD: &str = "/run/disk";
/// A disk that nobody holds: hostile clients may.
pub const OTHER: &str = "/run/other";
/// The disk that the guest locks and unlocks while a daemon is attacked.
const BUSY: &str = "/run/busy";
/// The number of no process, and the next one is none's either: a process that has a number which is registered here, and
/// ends, takes the locks along.
pub const NOBODY: i32 = 1_000_004_242;
/// How much more memory than before may stay with the daemon after an attack, KiB: lists that have
/// grown once, and what the allocator keeps for the next time.
const SLACK_KIB: u64 = 1024;

/// A daemon, and a client that holds a lock.
pub struct Scene {
    pub namespace: Namespace,
    pub daemon: Daemon,
    pub bystander: Client,
    /// The daemon's descriptors before anything happens.
    descriptors: usize,
}

/// What the guest of [`Scene::withstands`] asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Locks, again and again.
    Locks,
    /// Answers alone: a daemon that has no descriptor left has no lock to give.
    Answers,
}

impl Scene {
    /// The daemon under test, in a namespace where nothing outside of `/run` can be changed.
    pub fn new() -> Scene {
        let namespace = Namespace::sealed();
        let daemon = Daemon::start(&namespace, &[], &[]);
        Scene::of(namespace, daemon)
    }

    pub fn of(namespace: Namespace, daemon: Daemon) -> Scene {
        for name in [HELD, OTHER, BUSY] {
            std::fs::write(namespace.path(name), "data").expect("write a disk");
        }
        let mut bystander = daemon.client();
        bystander
            .call(&register_as("bystander", NOBODY))
            .expect_ok();
        bystander.call(&acquire("", HELD, 0)).expect_ok();
        // The connection that waited for the start may still be open.
        daemon.wait_until_asleep();
        let descriptors = open_descriptors(&daemon);
        Scene {
            namespace,
            daemon,
            bystander,
            descriptors,
        }
    }

    /// The bystander is answered and still holds its lock.
    #[track_caller]
    pub fn check_bystander(&mut self) {
        self.bystander.ping();
        let disk = self.namespace.path(HELD);
        let lock = lock_probe(&disk).expect("the bystander's lock is there");
        assert!(lock.exclusive);
        let busy = self.bystander.call(&acquire("", HELD, 0));
        let text = busy.expect_error(87, 51);
        let libvirts = "resource busy: Lockspace resource '/run/disk' is locked";
        assert!(text.starts_with(libvirts), "{text}");
    }

    /// When every other client is gone, nothing of them is left.
    #[track_caller]
    pub fn check_nothing_left(&mut self) {
        self.check_bystander();
        let (daemon, start) = (&self.daemon, self.descriptors);
        wait_until(
            DEADLINE,
            "the daemon's descriptors to be those of the start",
            || open_descriptors(daemon) <= start,
        );
    }

    /// Lets `attack` loose on the daemon; it takes its own clients away before it returns.
    ///
    /// Meanwhile every call of a guest is granted, and the daemon takes at most `most_kib` KiB more
    /// than before. Afterwards its memory, its descriptors and its locks are those of before.
    #[track_caller]
    pub fn withstands(&mut self, guest: Guest, most_kib: u64, attack: impl FnOnce(&Daemon)) {
        // What a daemon needs once, when it is first used, is no leak.
        BusyGuest::start(&self.daemon, guest).end();
        self.check_nothing_left();
        let before = Footprint::of(self);
        self.forget_peak();

        let busy = BusyGuest::start(&self.daemon, guest);
        attack(&self.daemon);
        let calls = busy.end();
        assert!(calls > 0, "the guest made no call during the attack");
        assert!(self.daemon.ended().is_none(), "the daemon has ended");

        let peak = self.daemon.memory_kib("VmHWM");
        eprintln!(
            "{calls} calls of the guest; memory {} KiB, {} more meanwhile",
            before.resident_kib,
            peak.saturating_sub(before.resident_kib)
        );
        assert_memory(peak <= before.resident_kib + most_kib, || {
            format!(
                "{} KiB before, {peak} KiB during the attack",
                before.resident_kib
            )
        });
        self.check_nothing_left();
        // Memory is given back a while after the last connection has ended.
        let daemon = &self.daemon;
        wait_until(
            DEADLINE,
            &format!(
                "memory to come back to {} KiB and no more than {SLACK_KIB} KiB above (it was {peak} \
                 KiB, and {} KiB when the attack was over)",
                before.resident_kib,
                daemon.memory_kib("VmRSS")
            ),
            || is_sanitized() || daemon.memory_kib("VmRSS") <= before.resident_kib + SLACK_KIB,
        );
        let after = Footprint::of(self);
        assert_eq!(after.locks, before.locks, "the locks that the kernel knows");
        assert_eq!(after.descriptors, before.descriptors, "open descriptors");
    }

    /// From now on `VmHWM` is the peak since now (proc_pid_clear_refs(5)).
    fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.daemon.reactor()), "5")
            .expect("reset the daemon's peak of memory");
    }
}

/// What the daemon has.
struct Footprint {
    resident_kib: u64,
    descriptors: usize,
    locks: Vec<String>,
}

impl Footprint {
    fn of(scene: &Scene) -> Footprint {
        // The last one that left may still be on its way out.
        scene.daemon.wait_until_asleep();
        Footprint {
            resident_kib: scene.daemon.memory_kib("VmRSS"),
            descriptors: scene.daemon.descriptors(),
            locks: locks_of(&scene.daemon),
        }
    }
}

/// Every lock that the kernel knows of the daemon's open files. (`/proc/locks` has those of the whole
/// host, and skips some while others come and go.) That of the ledger, which is on all of it, is not one.
pub fn locks_of(daemon: &Daemon) -> Vec<String> {
    let directory = format!("/proc/{}/fdinfo", daemon.pid());
    let entries = std::fs::read_dir(&directory).expect("list the daemon's descriptors");
    let mut locks = Vec::new();
    for entry in entries {
        let path = entry.expect("a descriptor").path();
        // A descriptor that is closed by now has no lock.
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.strip_prefix("lock:"));
        let lines = lines.filter(|line| !line.trim_end().ends_with("EOF"));
        locks.extend(lines.map(|line| line.trim().to_owned()));
    }
    locks.sort();
    locks
}

/// How many descriptors a daemon has, but for plain files: a spoiled call may rightly be granted a
/// lock, and closing a stranger's connection does not release it.
pub fn open_descriptors(daemon: &Daemon) -> usize {
    let directory = format!("/proc/{}/fd", daemon.pid());
    let entries = std::fs::read_dir(&directory).expect("list the daemon's descriptors");
    let paths = entries.map(|entry| entry.expect("a descriptor").path());
    let others = paths
        .filter(|path| !path.metadata().is_ok_and(|status| status.is_file()))
        .count();
    others - writers_of_notes(daemon.pid())
}

/// A guest that makes calls all the time, in a thread of its own. Every call has to be granted.
struct BusyGuest {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl BusyGuest {
    /// It has made its first calls when this returns.
    fn start(daemon: &Daemon, guest: Guest) -> BusyGuest {
        let stop = Arc::<AtomicBool>::default();
        let rounds = Arc::<AtomicUsize>::default();
        let mut client = daemon.client();
        client.call(&register_as("guest", NOBODY + 1)).expect_ok();
        let thread = std::thread::spawn({
            let (stop, rounds) = (stop.clone(), rounds.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if guest == Guest::Locks {
                        client.call(&acquire("", BUSY, 0)).expect_ok();
                        client.call(&release("", BUSY)).expect_ok();
                    }
                    client.ping();
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let busy = BusyGuest {
            stop,
            rounds,
            thread,
        };
        busy.wait_for_another_round();
        busy
    }

    fn wait_for_another_round(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_until(DEADLINE, "the busy guest's calls to be answered", || {
            self.thread.is_finished() || self.rounds.load(Ordering::Relaxed) > before
        });
    }

    /// Ends it; how many rounds of calls it has made.
    fn end(self) -> usize {
        self.wait_for_another_round();
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .expect("every call of the guest is granted");
        self.rounds.load(Ordering::Relaxed)
    }
}
