//! A host is shut down by real systemd, with libvirt's own units and stand-ins for their programs: whoever stops
//! a machine is answered, and the lock daemon is the last.

use crate::support::client::{Client, acquire, register_as, release};
use crate::support::daemon::{LOCK_SOCKET, program};
use crate::support::owner::{Owner, rival};
use crate::support::systemd::{SERVICE, SOCKETS, Systemd, Units};
use crate::support::{DEADLINE, lock_probe, wait_until};
use nix::sys::signal::Signal;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Instant;

const DISK: &str = "/run/disks/disk";
const OTHER: &str = "/run/disks/other";

/// A host with libvirt, and a guest that no unit of systemd has.
struct Host {
    systemd: Systemd,
    guest: Owner,
    rival: Option<JoinHandle<Option<(Instant, bool)>>>,
}

impl Host {
    fn start(units: Units) -> Option<Host> {
        let systemd = Systemd::start(units, &program())?;
        systemd.add_libvirt();
        systemd.ctl(&[
            "start",
            SERVICE,
            "libvirt-guests.service",
            "remote-fs.target",
        ]);
        std::fs::create_dir_all(systemd.path("/run/disks")).expect("make a folder for disks");
        for disk in [DISK, OTHER] {
            std::fs::write(systemd.path(disk), "data").expect("make a disk");
        }
        let mut guest = systemd.owner("guest");
        guest.call(&acquire("", DISK, 0)).expect_ok();
        let (path, pid) = (systemd.path(DISK), guest.outside());
        let rival = std::thread::spawn(move || rival(&path, pid, &AtomicBool::new(false)));
        Some(Host {
            systemd,
            guest,
            rival: Some(rival),
        })
    }

    /// The daemon serves and was not told to end, and who is known to it is answered as well as who comes.
    #[track_caller]
    fn serves(&mut self) {
        let state = self.systemd.property("ActiveState");
        assert_eq!(state, "active", "{}", self.systemd.last_words());
        // What has it stopped stands behind the others, and its disks are there.
        let others = ["virtlockd-shutdown.service", "remote-fs.target"];
        self.systemd.ctl(&["is-active", others[0]]);
        self.systemd.ctl(&["is-active", others[1]]);
        self.guest.call(&acquire("", OTHER, 0)).expect_ok();
        self.guest.call(&release("", OTHER)).expect_ok();
        let mut new = Client::connect(&self.systemd.path(LOCK_SOCKET));
        new.call(&register_as("new", 1)).expect_ok();
        new.call(&acquire("", DISK, 0)).expect_error(87, 51);
    }

    /// As `systemctl poweroff` begins.
    fn shut_down(&self) {
        self.systemd.ctl(&[
            "start",
            "--no-block",
            "--job-mode=replace-irreversibly",
            "shutdown.target",
        ]);
    }

    #[track_caller]
    fn stops(&self) {
        wait_until(DEADLINE, "the daemon to stop", || {
            self.systemd.property("ActiveState") == "inactive"
        });
        assert_eq!(self.systemd.main_pid(), 0);
        assert_eq!(self.systemd.property("NRestarts"), "0");
    }
}

#[test]
fn at_a_shutdown_the_daemon_answers_until_guests_machines_and_libvirts_daemons_are_stopped() {
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        // Without libvirt's daemon only our drop-in orders the scope of a machine.
        for has_daemon in [true, false] {
            let Some(mut host) = Host::start(units) else {
                return;
            };
            if has_daemon {
                host.systemd.ctl(&["start", "libvirtd.service"]);
            }
            host.systemd.start_machine();
            host.shut_down();
            let stopped: &[&str] = match has_daemon {
                true => &["guests", "machine", "daemon"],
                false => &["guests", "machine"],
            };
            for who in stopped {
                host.systemd.await_question(who);
                host.serves();
                host.systemd.answer(who);
            }
            host.stops();
            // Nobody has stopped this one, and there is no next start for which its locks could be kept.
            assert_eq!(host.guest.wait_signal(), Some(Signal::SIGTERM as i32));
            let got = host.rival.take().expect("there is a rival").join();
            let (_, could_run) = got.expect("a rival does not panic").expect("it is free");
            assert!(!could_run, "a rival had the lock of a guest while it lived");
            assert_eq!(host.systemd.stored(), 0);
        }
    }
}

#[test]
fn what_was_kept_before_a_shutdown_stays_until_guests_machines_and_libvirts_daemons_are_stopped() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.systemd.ctl(&["start", "libvirtd.service"]);
    host.systemd.start_machine();
    host.systemd.ctl(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
    host.shut_down();
    for who in ["guests", "machine", "daemon"] {
        host.systemd.await_question(who);
        assert!(lock_probe(&host.systemd.path(DISK)).is_some());
        host.systemd.answer(who);
    }
    // Then systemd unloads the unit. No daemon runs that could fence who lives.
    wait_until(DEADLINE, "systemd to drop what it has", || {
        lock_probe(&host.systemd.path(DISK)).is_none()
    });
    assert!(host.guest.is_alive());
}

#[test]
fn what_stands_before_and_behind_the_daemon_makes_no_circle_among_the_real_units() {
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        let Some(systemd) = Systemd::start(units, &program()) else {
            return;
        };
        let said = systemd.verify();
        assert!(!said.contains("cycle"), "{said}");
        assert!(!said.contains("virtlockd"), "{said}");
    }
}
