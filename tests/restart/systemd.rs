//! Real systemd stops, kills, restarts and starts the daemon: guests live through all of it, and nobody else
//! ever has one of their locks.

use crate::support::client::{Client, Reply, acquire, register_as, release};
use crate::support::daemon::{LOCK_SOCKET, c_daemon, program, reactor_of};
use crate::support::owner::{Owner, rival, runs};
use crate::support::systemd::{SERVICE, SOCKETS, Systemd, Units};
use crate::support::{DEADLINE, install_program, lock_probe, skip, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How many guests there are, and how many disks each has.
const GUESTS: usize = 2;
const DISKS: usize = 2;
/// Where the daemon's program is.
const PROGRAM: &str = "/usr/sbin/virtlockd";
/// Its configuration.
const CONFIG: &str = "/etc/libvirt/virtlockd.conf";

/// How long systemd waits before it starts a service again (`RestartSec=`, its default).
const RESTART_PAUSE: Duration = Duration::from_millis(100);

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
        let mut host = Host::without_rivals(units)?;
        host.let_rivals_try();
        Some(host)
    }

    /// The guests have their locks, and nobody else wants them.
    fn without_rivals(units: Units) -> Option<Host> {
        let systemd = Systemd::start(units, &program())?;
        systemd.ctl(&["start", SERVICE]);
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
                std::fs::write(host.path(guest, number), "data").expect("make a disk");
                let granted = owner.call(&acquire("", &disk(guest, number), 0));
                granted.expect_ok();
            }
            host.guests.push(owner);
        }
        Some(host)
    }

    fn let_rivals_try(&mut self) {
        for (guest, owner) in self.guests.iter().enumerate() {
            for number in 0..DISKS {
                let path = self.path(guest, number);
                let (over, pid) = (self.over.clone(), owner.outside());
                let tries = std::thread::spawn(move || rival(&path, pid, &over));
                self.rivals.push(Rival { guest, tries });
            }
        }
    }

    fn path(&self, guest: usize, number: usize) -> PathBuf {
        self.systemd.path(disk(guest, number))
    }

    /// Systemd does not know of it before it reads its units anew.
    fn changes_unit(&self, change: &str) {
        let folder = self.systemd.path("/etc/systemd/system/virtlockd.service.d");
        std::fs::create_dir_all(&folder).expect("make a folder for a drop-in");
        std::fs::write(folder.join("zz-change.conf"), change).expect("write a drop-in");
    }

    fn ctl(&self, arguments: &[&str]) {
        self.systemd.ctl(arguments);
    }

    /// The daemon runs.
    fn is_active(&self) -> bool {
        self.systemd.property("ActiveState") == "active"
    }

    /// All locks are there, and no process of the daemon.
    #[track_caller]
    fn everything_is_kept(&self) {
        assert_eq!(self.systemd.main_pid(), 0);
        assert_eq!(self.systemd.property("SubState"), "dead-resources-pinned");
        assert_eq!(self.systemd.stored(), 1, "{}", self.systemd.last_words());
        for (guest, number) in self.disks() {
            let lock = lock_probe(&self.path(guest, number));
            assert!(lock.is_some_and(|lock| lock.exclusive));
        }
    }

    /// Starts fail, more often than systemd tries it with the limit that it has by itself, and nothing is lost.
    #[track_caller]
    fn is_tried_again_and_again(&self) {
        wait_until(DEADLINE, "systemd to have tried it often", || {
            let count = self.systemd.property("NRestarts").parse();
            count.is_ok_and(|count: u32| count > 6)
        });
        for (guest, number) in self.disks() {
            let lock = lock_probe(&self.path(guest, number));
            assert!(lock.is_some_and(|lock| lock.exclusive));
        }
    }

    fn disks(&self) -> Vec<(usize, usize)> {
        let numbers = |guest| (0..DISKS).map(move |number| (guest, number));
        (0..GUESTS).flat_map(numbers).collect()
    }

    /// Every guest lives, is answered over its old connection, has its locks, and gets what it asks for.
    #[track_caller]
    fn all_is_well(&mut self) {
        for (number, guest) in self.guests.iter_mut().enumerate() {
            assert!(guest.is_alive(), "guest {number} is dead");
            let more = format!("/run/disks/more-{number}");
            std::fs::write(self.systemd.path(&more), "data").expect("make a disk");
            guest.call(&acquire("", &more, 0)).expect_ok();
            guest.call(&release("", &more)).expect_ok();
            let busy = guest.call(&acquire("", &disk(number, 0), 0));
            busy.expect_error(87, 51);
        }
        // Somebody new is served, and told who has it.
        let mut new = Client::connect(&self.systemd.path(LOCK_SOCKET));
        new.call(&register_as("new", 1)).expect_ok();
        let reply = new.call(&acquire("", &disk(0, 0), 0));
        let busy = reply.expect_error(87, 51);
        assert!(busy.contains("guest-0"), "{busy}");
        assert_eq!(self.systemd.stored(), 1, "an empty bag, for the next time");
    }

    /// No rival had a lock while its guest could run.
    #[track_caller]
    fn nobody_else_had_a_lock(mut self) {
        self.over.store(true, Ordering::Relaxed);
        for rival in self.rivals.drain(..) {
            let got = rival.tries.join().expect("a rival does not panic");
            assert!(
                got.is_none_or(|(_, could_run)| !could_run),
                "a rival had a lock of guest {} while it lived",
                rival.guest,
            );
        }
    }

    /// Every guest is fenced: dead, and its locks free.
    fn all_are_fenced(&mut self) {
        for guest in &mut self.guests {
            let ended = guest.wait_signal();
            assert_eq!(ended, Some(Signal::SIGTERM as i32));
        }
        for rival in self.rivals.drain(..) {
            wait_until(DEADLINE, "the lock to be free", || {
                rival.tries.is_finished()
            });
            let got = rival.tries.join().expect("a rival does not panic");
            let (_, could_run) = got.expect("the locks are free");
            assert!(
                !could_run,
                "a rival had a lock of guest {} while it lived",
                rival.guest
            );
        }
    }
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal a process of the daemon");
}

#[test]
fn a_restart_is_not_noticed_but_for_a_pause() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    for _ in 0..3 {
        let before = host.systemd.main_pid();
        host.ctl(&["restart", SERVICE]);
        assert_ne!(host.systemd.main_pid(), before);
        host.all_is_well();
    }
    host.nobody_else_had_a_lock();
}

#[test]
fn between_a_stop_and_a_start_locks_stay_calls_wait_and_the_dead_are_freed_behind_it() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    let mut leaver = host.systemd.owner("leaver");
    std::fs::write(host.systemd.path("/run/disks/left"), "data").expect("make a disk");
    leaver.call(&acquire("", "/run/disks/left", 0)).expect_ok();
    host.ctl(&["stop", SERVICE]);
    host.everything_is_kept();
    assert!(!host.systemd.path("/run/virtlockd.pid").exists());
    // One dies meanwhile, one asks for something.
    leaver.kill();
    leaver.wait_end();
    std::fs::write(host.systemd.path("/run/disks/wanted"), "data").expect("make a disk");
    let wanted = acquire("", "/run/disks/wanted", 0);
    host.guests[0].begin(&wanted);
    std::thread::sleep(Duration::from_secs(10));
    host.everything_is_kept();
    assert!(lock_probe(&host.systemd.path("/run/disks/left")).is_some());
    host.ctl(&["start", SERVICE]);
    host.guests[0].reply().expect_ok();
    assert!(lock_probe(&host.systemd.path("/run/disks/wanted")).is_some());
    wait_until(DEADLINE, "the dead one's lock to be free", || {
        lock_probe(&host.systemd.path("/run/disks/left")).is_none()
    });
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_stop_of_the_sockets_too_keeps_everything_and_a_start_of_the_service_is_enough() {
    for is_enabled in [false, true] {
        let Some(mut host) = Host::start(Units::Ours) else {
            return;
        };
        if is_enabled {
            host.ctl(&["enable", SERVICE]);
        }
        host.ctl(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
        host.everything_is_kept();
        assert!(!host.systemd.path(LOCK_SOCKET).exists());
        host.ctl(&["daemon-reload"]);
        host.everything_is_kept();
        host.ctl(&["start", SERVICE]);
        host.all_is_well();
        // And from its own sockets, and with the sockets alone stopped.
        host.ctl(&["restart", SERVICE]);
        host.all_is_well();
        host.nobody_else_had_a_lock();
    }
}

#[test]
fn a_stop_of_the_sockets_alone_keeps_everything_too() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.ctl(&["stop", SOCKETS[0]]);
    wait_until(DEADLINE, "the service to be stopped", || !host.is_active());
    host.everything_is_kept();
    host.ctl(&["start", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_client_that_comes_while_nobody_serves_is_served_behind_the_start() {
    // Through the sockets that systemd listens at all the time, and through sockets that it has closed since.
    for stops_sockets in [false, true] {
        let Some(mut host) = Host::start(Units::Ours) else {
            return;
        };
        host.ctl(&["stop", SERVICE]);
        let mut new = Client::connect(&host.systemd.path(LOCK_SOCKET));
        new.post(&register_as("new", 1));
        if stops_sockets {
            host.ctl(&["stop", SOCKETS[0], SOCKETS[1]]);
        }
        host.everything_is_kept();
        host.ctl(&["start", SERVICE]);
        Reply::parse(&new.receive()).expect_ok();
        host.all_is_well();
        host.nobody_else_had_a_lock();
    }
}

#[test]
fn a_main_process_that_is_killed_is_followed_by_the_other_one_and_the_unit_stays() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    // Again and again: systemd may hear of the death first, or of who is there now.
    for _ in 0..10 {
        let before = host.systemd.main_pid();
        send(before, Signal::SIGKILL);
        wait_until(DEADLINE, "systemd to know of another main process", || {
            let now = host.systemd.main_pid();
            now != 0 && now != before
        });
        assert!(host.is_active());
        assert_eq!(host.systemd.property("NRestarts"), "0");
        host.all_is_well();
    }
    // Everything can be asked of the new one, and systemd counts no failure.
    host.ctl(&["stop", SERVICE]);
    host.everything_is_kept();
    host.ctl(&["start", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_process_that_serves_and_is_killed_does_not_end_the_unit() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    let main = host.systemd.main_pid();
    let before = reactor_of(main);
    send(before, Signal::SIGKILL);
    wait_until(DEADLINE, "another process that serves", || {
        ![before, main].contains(&reactor_of(main))
    });
    host.all_is_well();
    assert_eq!(host.systemd.main_pid(), main);
    host.ctl(&["restart", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_unit_that_is_killed_whole_is_started_again_and_takes_every_lock_again() {
    // For a moment nobody has them: whoever tries all the time may get one, see cold_start.
    let Some(mut host) = Host::without_rivals(Units::Ours) else {
        return;
    };
    host.ctl(&["kill", "-s", "KILL", SERVICE]);
    wait_until(DEADLINE, "the unit to be started again", || {
        host.systemd.property("NRestarts") == "1" && host.is_active()
    });
    host.let_rivals_try();
    for guest in &mut host.guests {
        assert!(guest.is_alive());
        guest.connect_again();
        guest.register_as("again");
    }
    for (guest, number) in host.disks() {
        assert!(lock_probe(&host.path(guest, number)).is_some_and(|lock| lock.exclusive));
    }
    // The bag of the daemon that was killed is empty, and does not stay.
    wait_until(DEADLINE, "one bag to be stored", || {
        host.systemd.stored() == 1
    });
    host.ctl(&["restart", SERVICE]);
    for (guest, number) in host.disks() {
        let owner = &mut host.guests[guest];
        owner
            .call(&acquire("", &disk(guest, number), 0))
            .expect_error(87, 51);
    }
    host.nobody_else_had_a_lock();
}

#[test]
fn a_reload_is_an_upgrade_and_the_next_stop_keeps_everything() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    let before = host.systemd.main_pid();
    let new = host.systemd.path("/usr/sbin/new");
    install_program(program(), &new);
    std::fs::rename(new, host.systemd.path(PROGRAM)).expect("put the new program in place");
    host.ctl(&["reload", SERVICE]);
    wait_until(DEADLINE, "the successor to serve", || {
        host.systemd.log().matches("Took over").count() == 1 && host.is_active()
    });
    assert_eq!(host.systemd.main_pid(), before);
    host.all_is_well();
    host.ctl(&["restart", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn usr1_to_every_process_of_the_unit_is_an_upgrade_and_nothing_else() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    for count in 1..=3 {
        host.ctl(&["kill", "-s", "USR1", SERVICE]);
        wait_until(DEADLINE, "the successor to serve", || {
            host.systemd.log().matches("Took over").count() >= count && host.is_active()
        });
        host.all_is_well();
    }
    assert_eq!(host.systemd.property("NRestarts"), "0");
    host.ctl(&["restart", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn hup_to_every_process_of_the_unit_ends_nothing() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.ctl(&["kill", "-s", "HUP", SERVICE]);
    wait_until(DEADLINE, "the configuration to be read again", || {
        host.systemd
            .log()
            .contains("the configuration was read again")
    });
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_process_that_is_killed_for_want_of_memory_does_not_end_the_unit() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    let main = host.systemd.main_pid();
    let reactor = reactor_of(main);
    if let Err(reason) = host.systemd.starve(reactor) {
        return skip(&reason);
    }
    // Half messages, of which the rest never comes.
    let half = [&100_000u32.to_be_bytes()[..], &[0; 90_000]].concat();
    let socket = host.systemd.path(LOCK_SOCKET);
    let _clients: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut client = UnixStream::connect(&socket).expect("connect to the daemon");
            let _ = client.write_all(&half);
            client
        })
        .collect();
    wait_until(DEADLINE, "the process that serves to be killed", || {
        !runs(reactor)
    });
    host.systemd.feed();
    wait_until(DEADLINE, "another process that serves", || {
        ![reactor, main].contains(&reactor_of(main))
    });
    host.all_is_well();
    assert_eq!(host.systemd.main_pid(), main);
    assert!(host.is_active());
    host.nobody_else_had_a_lock();
}

#[test]
fn a_start_that_fails_loses_nothing_and_the_one_that_works_goes_on() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    std::fs::create_dir_all(host.systemd.path("/etc/libvirt")).expect("make a folder");
    std::fs::write(host.systemd.path(CONFIG), "max_clients = \"many\"\n").expect("write");
    // It fails as often as systemd tries it, which never gives up.
    let restarted = host.systemd.systemctl(&["restart", SERVICE]);
    assert!(!restarted.status.success());
    host.is_tried_again_and_again();
    std::fs::remove_file(host.systemd.path(CONFIG)).expect("remove the configuration");
    wait_until(DEADLINE, "a start that works", || host.is_active());
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_start_that_fails_late_loses_nothing_either() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.ctl(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
    // Behind all that is taken from the bag: there can be no socket at a path that is a directory.
    let socket = host.systemd.path(LOCK_SOCKET);
    std::fs::create_dir(&socket).expect("put a directory in the socket's place");
    let started = host.systemd.systemctl(&["start", SERVICE]);
    assert!(!started.status.success());
    host.is_tried_again_and_again();
    std::fs::remove_dir(&socket).expect("remove the directory");
    wait_until(DEADLINE, "a start that works", || host.is_active());
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn systemd_itself_may_be_executed_anew_and_read_its_units_anew() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    for what in ["daemon-reload", "daemon-reexec"] {
        host.ctl(&[what]);
        host.all_is_well();
        host.ctl(&["stop", SERVICE]);
        host.ctl(&[what]);
        host.everything_is_kept();
        host.ctl(&["start", SERVICE]);
        host.all_is_well();
    }
    host.nobody_else_had_a_lock();
}

#[test]
fn a_service_that_is_disabled_while_it_is_stopped_keeps_everything() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.ctl(&["enable", SERVICE, SOCKETS[0], SOCKETS[1]]);
    host.ctl(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
    host.ctl(&["disable", SERVICE, SOCKETS[0], SOCKETS[1]]);
    host.everything_is_kept();
    host.ctl(&["start", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn without_a_store_that_outlives_it_a_stop_fences() {
    // libvirt's own unit; ours, told to fence; ours, whose store was taken away while it ran.
    let fences = "[Service]\nEnvironment=VIRTLOCKD_ON_STOP=fence\n";
    for (units, change) in [
        (Units::Libvirts, None),
        (Units::Ours, Some(fences)),
        (Units::Ours, Some("[Service]\nFileDescriptorStoreMax=0\n")),
    ] {
        let Some(mut host) = Host::start(units) else {
            return;
        };
        if let Some(change) = change {
            host.changes_unit(change);
            host.ctl(&["daemon-reload"]);
            if change == fences {
                // What the unit says counts from the next start on.
                host.ctl(&["restart", SERVICE]);
                assert!(host.guests.iter_mut().all(Owner::is_alive));
            }
        }
        host.ctl(&["stop", SERVICE]);
        host.all_are_fenced();
        assert_eq!(host.systemd.stored(), 0);
        assert_eq!(host.systemd.property("ActiveState"), "inactive");
    }
}

#[test]
fn a_unit_that_is_masked_while_it_runs_has_no_store_and_its_stop_fences() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.ctl(&["mask", SERVICE]);
    wait_until(
        DEADLINE,
        "the daemon to say that a stop would fence",
        || host.systemd.log().contains("a stop would fence"),
    );
    host.ctl(&["stop", SERVICE]);
    host.all_are_fenced();
}

#[test]
fn what_systemd_drops_while_nobody_runs_is_taken_again_from_the_ledger() {
    // A unit that is masked, or has no store any more, loses it when systemd reads it anew: nobody runs who
    // could do anything. For a moment nobody has the locks.
    let Some(mut host) = Host::without_rivals(Units::Ours) else {
        return;
    };
    host.ctl(&["stop", SERVICE]);
    host.everything_is_kept();
    host.ctl(&["mask", SERVICE]);
    assert_eq!(host.systemd.stored(), 0);
    assert!(lock_probe(&host.path(0, 0)).is_none());
    host.ctl(&["unmask", SERVICE]);
    host.ctl(&["start", SERVICE]);
    for (guest, number) in host.disks() {
        let lock = lock_probe(&host.path(guest, number));
        assert!(lock.is_some_and(|lock| lock.exclusive));
    }
    host.let_rivals_try();
    assert!(host.guests.iter_mut().all(Owner::is_alive));
    host.ctl(&["restart", SERVICE]);
    host.nobody_else_had_a_lock();
}

#[test]
fn int_to_the_main_process_stops_and_fences_and_is_not_undone_by_a_restart() {
    for is_another in [false, true] {
        let Some(mut host) = Host::start(Units::Ours) else {
            return;
        };
        if is_another {
            let before = host.systemd.main_pid();
            send(before, Signal::SIGKILL);
            wait_until(DEADLINE, "systemd to know of another main process", || {
                ![0, before].contains(&host.systemd.main_pid())
            });
            host.all_is_well();
        }
        host.ctl(&["kill", "--kill-whom=main", "-s", "INT", SERVICE]);
        host.all_are_fenced();
        wait_until(DEADLINE, "the service to be over", || {
            host.systemd.property("ActiveState") == "inactive"
        });
        assert_eq!(host.systemd.stored(), 0);
        assert_eq!(host.systemd.property("NRestarts"), "0");
    }
}

#[test]
fn an_end_that_somebody_else_than_systemd_asks_for_is_followed_by_a_start_that_goes_on() {
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        let Some(mut host) = Host::start(units) else {
            return;
        };
        for count in ["1", "2"] {
            let before = host.systemd.main_pid();
            send(before, Signal::SIGTERM);
            wait_until(DEADLINE, "the unit to be started again", || {
                host.systemd.property("NRestarts") == count && host.is_active()
            });
            assert_ne!(host.systemd.main_pid(), before);
            host.all_is_well();
        }
        // Whoever asks systemd wants no other one, and it is no failure.
        host.ctl(&["stop", SERVICE]);
        assert_eq!(host.systemd.property("ActiveState"), "inactive");
        assert_eq!(host.systemd.property("Result"), "success");
        std::thread::sleep(2 * RESTART_PAUSE);
        host.everything_is_kept();
        host.ctl(&["start", SERVICE]);
        host.all_is_well();
        host.nobody_else_had_a_lock();
    }
}

#[test]
fn who_ends_as_if_it_was_killed_for_a_manager_that_lost_it_is_started_again() {
    // Behind the death of the main process a SIGTERM may come from a systemd that has not heard of the other
    // one, and nobody is fenced for it. Nothing can be kept here: the ledger has the locks.
    let Some(mut host) = Host::without_rivals(Units::Ours) else {
        return;
    };
    let before = host.systemd.main_pid();
    send(before, Signal::SIGKILL);
    wait_until(DEADLINE, "systemd to know of another main process", || {
        ![0, before].contains(&host.systemd.main_pid())
    });
    host.all_is_well();
    host.changes_unit("[Service]\nFileDescriptorStoreMax=0\n");
    host.ctl(&["daemon-reload"]);
    send(host.systemd.main_pid(), Signal::SIGTERM);
    wait_until(DEADLINE, "the unit to be started again", || {
        host.systemd.property("NRestarts") == "1" && host.is_active()
    });
    for (guest, number) in host.disks() {
        let lock = lock_probe(&host.path(guest, number));
        assert!(lock.is_some_and(|lock| lock.exclusive));
    }
    assert!(host.guests.iter_mut().all(Owner::is_alive));
}

#[test]
fn an_end_that_has_fenced_is_not_followed_by_a_start() {
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        let Some(mut host) = Host::start(units) else {
            return;
        };
        let change = "[Service]\nFileDescriptorStoreMax=0\n";
        host.changes_unit(change);
        host.ctl(&["daemon-reload"]);
        send(host.systemd.main_pid(), Signal::SIGTERM);
        host.all_are_fenced();
        wait_until(DEADLINE, "the service to be over", || {
            host.systemd.property("ActiveState") == "inactive"
        });
        std::thread::sleep(2 * RESTART_PAUSE);
        assert_eq!(host.systemd.property("ActiveState"), "inactive");
        assert_eq!(host.systemd.property("NRestarts"), "0");
    }
}

#[test]
fn a_host_that_goes_to_another_target_keeps_the_daemon_as_it_keeps_the_guests() {
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        let Some(mut host) = Host::start(units) else {
            return;
        };
        let target = "[Unit]\nRequires=basic.target\nAllowIsolate=yes\n";
        std::fs::write(host.systemd.path("/units/bare.target"), target).expect("write a unit");
        host.ctl(&["daemon-reload"]);
        let before = host.systemd.main_pid();
        host.ctl(&["isolate", "bare.target"]);
        assert_eq!(host.systemd.main_pid(), before);
        host.all_is_well();
        // The sockets as well, where that is not refused.
        let _ = host
            .systemd
            .systemctl(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
        host.ctl(&["isolate", "bare.target"]);
        host.everything_is_kept();
        host.ctl(&["start", SERVICE]);
        let before = host.systemd.main_pid();
        host.ctl(&["isolate", "bare.target"]);
        assert_eq!(host.systemd.main_pid(), before);
        host.all_is_well();
        host.nobody_else_had_a_lock();
    }
}

#[test]
fn a_unit_that_is_killed_again_and_again_is_started_as_often() {
    let Some(mut host) = Host::without_rivals(Units::Ours) else {
        return;
    };
    for count in 1..=7 {
        host.ctl(&["kill", "-s", "KILL", SERVICE]);
        wait_until(DEADLINE, "the unit to be started again", || {
            host.systemd.property("NRestarts") == count.to_string() && host.is_active()
        });
    }
    for (guest, number) in host.disks() {
        let lock = lock_probe(&host.path(guest, number));
        assert!(lock.is_some_and(|lock| lock.exclusive));
    }
    assert!(host.guests.iter_mut().all(Owner::is_alive));
}

#[test]
fn a_restart_of_a_socket_unit_is_a_restart_of_the_service_which_listens_itself() {
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    let before = host.systemd.main_pid();
    // systemd does not start a socket whose service has something in its store.
    let restarted = host.systemd.systemctl(&["restart", SOCKETS[0]]);
    assert!(!restarted.status.success());
    wait_until(DEADLINE, "the service to be started again", || {
        ![0, before].contains(&host.systemd.main_pid()) && host.is_active()
    });
    host.all_is_well();
    host.ctl(&["restart", SERVICE]);
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_store_that_a_change_of_the_unit_makes_end_with_the_stop_is_taken_again_from_the_ledger() {
    // The daemon is not told of that change: it is the one stop that lets all locks go while the guests run.
    let Some(mut host) = Host::without_rivals(Units::Ours) else {
        return;
    };
    host.changes_unit("[Service]\nFileDescriptorStorePreserve=no\n");
    host.ctl(&["daemon-reload"]);
    assert_eq!(host.systemd.stored(), 1);
    host.ctl(&["stop", SERVICE]);
    assert_eq!(host.systemd.stored(), 0);
    assert!(lock_probe(&host.path(0, 0)).is_none());
    host.ctl(&["start", SERVICE]);
    for (guest, number) in host.disks() {
        let lock = lock_probe(&host.path(guest, number));
        assert!(lock.is_some_and(|lock| lock.exclusive));
    }
    assert!(host.guests.iter_mut().all(Owner::is_alive));
}

#[test]
fn with_our_drop_ins_libvirts_own_unit_keeps_everything_and_its_sockets_cannot_be_stopped_alone() {
    let Some(mut host) = Host::start(Units::LibvirtsWithOurs) else {
        return;
    };
    host.ctl(&["restart", SERVICE]);
    host.all_is_well();
    let stopped = host
        .systemd
        .systemctl(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
    assert!(!stopped.status.success());
    host.everything_is_kept();
    host.ctl(&["start", SERVICE]);
    host.all_is_well();
    send(host.systemd.main_pid(), Signal::SIGKILL);
    wait_for(DEADLINE, "another main process", || {
        (host.systemd.main_pid() != 0).then_some(())
    });
    host.all_is_well();
    host.nobody_else_had_a_lock();
}

#[test]
fn a_program_that_does_not_know_of_the_store_does_not_start_and_loses_nothing() {
    let Some(c_daemon) = c_daemon() else {
        return skip("needs libvirt's daemon (tests/run installs it)");
    };
    let Some(mut host) = Host::start(Units::Ours) else {
        return;
    };
    host.ctl(&["stop", SERVICE]);
    let put_in_place = |program: &Path| {
        let new = host.systemd.path("/usr/sbin/new");
        install_program(program, &new);
        std::fs::rename(new, host.systemd.path(PROGRAM)).expect("put a program in place");
    };
    put_in_place(&c_daemon);
    assert!(!host.systemd.systemctl(&["start", SERVICE]).status.success());
    host.is_tried_again_and_again();
    put_in_place(&program());
    wait_until(DEADLINE, "a start that works", || host.is_active());
    host.all_is_well();
    host.nobody_else_had_a_lock();
}
