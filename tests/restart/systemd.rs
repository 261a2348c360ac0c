//! Real systemd stops, kills, restarts and starts the daemon: guests live through all of it, and nobody else
//! ever has one of their locks.

use crate::support::client::{acquire, release};
use crate::support::daemon::program;
use crate::support::owner::{Owner, rival, runs};
use crate::support::systemd::{SERVICE, SOCKETS, Systemd, Units};
use crate::support::{DEADLINE, lock_probe, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// How many guests there are, and how many disks each has.
const GUESTS: usize = 3;
const DISKS: usize = 2;

/// A host with guests, and rivals that try to get each of their disks all the time.
struct Host {
    systemd: Systemd,
    guests: Vec<Owner>,
    rivals: Vec<Rival>,
    over: Arc<AtomicBool>,
}

struct Rival {
    guest: usize,
    tries: JoinHandle<Option<(Instant, bool)>>,
}

fn disk(guest: usize, number: usize) -> String {
    format!("/run/disks/{guest}-{number}")
}

impl Host {
    fn start(units: Units) -> Option<Host> {
        let systemd = Systemd::start(units, &program())?;
        systemd.ctl(&["start", SERVICE]);
        Some(Host::with_guests(systemd))
    }

    fn with_guests(systemd: Systemd) -> Host {
        std::fs::create_dir_all(systemd.path("/run/disks")).expect("make a folder for disks");
        let mut host = Host {
            systemd,
            guests: Vec::new(),
            rivals: Vec::new(),
            over: Arc::default(),
        };
        for guest in 0..GUESTS {
            let mut owner = host.systemd.owner(&format!("guest-{guest}"));
            for number in 0..DISKS {
                let path = host.path(guest, number);
                std::fs::write(&path, "data").expect("make a disk");
                owner
                    .call(&acquire("", &disk(guest, number), 0))
                    .expect_ok();
                let (over, pid) = (host.over.clone(), owner.outside());
                host.rivals.push(Rival {
                    guest,
                    tries: std::thread::spawn(move || rival(&path, pid, &over)),
                });
            }
            host.guests.push(owner);
        }
        host
    }

    fn path(&self, guest: usize, number: usize) -> PathBuf {
        self.systemd.path(disk(guest, number))
    }

    /// Every guest lives, has its locks, is answered over its old connection, and gets what it asks for.
    #[track_caller]
    fn check(&mut self) {
        for (number, guest) in self.guests.iter_mut().enumerate() {
            assert!(guest.is_alive(), "guest {number} is dead");
            let name = format!("/run/disks/more-{number}");
            std::fs::write(self.systemd.path(&name), "data").expect("make a disk");
            guest.call(&acquire("", &name, 0)).expect_ok();
            guest.call(&release("", &name)).expect_ok();
            let held = disk(number, 0);
            let busy = guest.call(&acquire("", &held, 0));
            busy.expect_error(87, 51);
        }
    }

    /// No rival had a lock while its guest could run, but for those in `dead`.
    #[track_caller]
    fn nobody_else_had_a_lock(mut self) {
        self.over.store(true, Ordering::Relaxed);
        for rival in self.rivals.drain(..) {
            let got = rival.tries.join().expect("a rival does not panic");
            let guest = &mut self.guests[rival.guest];
            assert!(
                got.is_none_or(|(_, could_run)| !could_run),
                "a rival had a lock of guest {} while it lived{}",
                rival.guest,
                self.systemd.last_words()
            );
            assert!(got.is_none() || !runs(guest.outside()));
        }
    }
}

#[test]
fn a_restart_is_not_noticed_but_for_a_pause() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    let before = host.systemd.main_pid();
    host.systemd.ctl(&["restart", SERVICE]);
    assert_ne!(host.systemd.main_pid(), before);
    host.check();
    assert_eq!(host.systemd.stored(), 1, "an empty bag, for the next time");
    host.nobody_else_had_a_lock();
}
