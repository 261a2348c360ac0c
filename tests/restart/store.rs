//! A stop that keeps everything in the service manager's store, and the start that goes on from it, with a
//! manager that can be made to do what systemd seldom does. See `systemd` for the real one.

#![allow(unsafe_code)]

mod killed;
mod obstacles;

use crate::support;
use crate::support::client::{
    AUTOCREATE, Reply, SHARED, acquire, create_resource, new_lockspace, register_as, release,
    restrict,
};
use crate::support::daemon::{Daemon, c_daemon, program};
use crate::support::manager::Manager;
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{Rival, helper_client};
use crate::support::{DEADLINE, lock_probe, require_root, require_strace, skip, wait_until};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// A daemon with a guest that has a disk.
struct Scene {
    manager: Manager,
    daemon: Daemon,
    guest: Owner,
}

const DISK: &str = "/run/disk";

impl Scene {
    fn new() -> Option<Scene> {
        if !require_root() {
            return None;
        }
        if program().starts_with("/usr") {
            skip("libvirt's daemon keeps nothing over a stop");
            return None;
        }
        let manager = Manager::new();
        let daemon = manager.start();
        let disk = manager.host.disk("disk");
        let guest = manager.host.guest(&daemon, "guest", &disk);
        Some(Scene {
            manager,
            daemon,
            guest,
        })
    }

    fn rival(&self) -> Rival {
        Rival::of(vec![self.manager.host.path(DISK)])
    }

    /// Stops the daemon, which keeps everything.
    #[track_caller]
    fn stop(&mut self) {
        let status = self.daemon.stop();
        assert_eq!(status.code(), Some(81), "{}", self.daemon.stderr());
        self.manager.settle();
        assert_eq!(self.manager.stored(), 1);
        assert!(self.is_held(DISK), "{}", self.daemon.stderr());
    }

    fn start(&mut self) {
        self.daemon = self.manager.start();
    }

    fn is_held(&self, disk: &str) -> bool {
        lock_probe(&self.manager.host.path(disk)).is_some()
    }

    /// The guest is answered over its old connection, and can give its disk up and have it again.
    #[track_caller]
    fn serves(&mut self) {
        self.guest.call(&release("", DISK)).expect_ok();
        assert!(!self.is_held(DISK));
        self.guest.call(&acquire("", DISK, 0)).expect_ok();
        assert!(self.is_held(DISK));
        self.manager_has_one_bag();
    }

    fn manager_has_one_bag(&self) {
        wait_until(DEADLINE, "one bag to be stored, for the next time", || {
            self.manager.stored() == 1
        });
    }

    /// A start that ends without having done anything; what it says.
    #[track_caller]
    fn refused_start(&self, by: &[&str]) -> String {
        let mut daemon = self.manager.spawn(by);
        let status = daemon.wait_end();
        assert_eq!(status.code(), Some(3), "{}", daemon.stderr());
        assert!(self.is_held(DISK));
        daemon.stderr()
    }
}

/// What is in a message of a bag, by its place. The bag stays as it is.
fn look(bag: &OwnedFd) -> Vec<(Vec<u8>, Vec<OwnedFd>)> {
    let first: libc::c_int = 0;
    let pointer = (&raw const first).cast();
    // SAFETY: the kernel reads a number of ours, of this size.
    let result = unsafe {
        libc::setsockopt(
            bag.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            pointer,
            4,
        )
    };
    assert_eq!(result, 0);
    let mut found = Vec::new();
    loop {
        let mut bytes = [0; 4096];
        let mut room = nix::cmsg_space!([RawFd; 253]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let Ok(message) = recvmsg::<()>(bag.as_raw_fd(), &mut parts, Some(&mut room), flags) else {
            return found;
        };
        if message.bytes == 0 {
            return found;
        }
        let mut descriptors = Vec::new();
        for part in message.cmsgs().expect("what came with the bytes") {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just opened them for this process alone.
                let open = |number: RawFd| unsafe { OwnedFd::from_raw_fd(number) };
                descriptors.extend(numbers.into_iter().map(open));
            }
        }
        let length = message.bytes;
        found.push((bytes[..length].to_vec(), descriptors));
    }
}

/// A bag with these messages.
fn bag_of(messages: &[(Vec<u8>, Vec<OwnedFd>)]) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (into, bag) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .expect("a pair of sockets");
    for (bytes, descriptors) in messages {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(
            into.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .expect("fill a bag");
    }
    bag
}

#[test]
fn a_stop_and_a_start_are_not_noticed_but_for_a_pause() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    for _ in 0..3 {
        scene.stop();
        scene.start();
        scene.guest.call(&acquire("", DISK, 0)).expect_error(87, 51);
        scene.manager_has_one_bag();
    }
    rival.never_succeeded();
    scene.serves();
    assert_eq!(scene.manager.heard("STOPPING=1"), 3);
    // What the daemons before had has gone with them.
    scene.daemon.wait_until_asleep();
    let descriptors = scene.daemon.descriptors();
    scene.stop();
    scene.start();
    scene.daemon.wait_until_asleep();
    assert_eq!(scene.daemon.descriptors(), descriptors);
}

#[test]
fn all_that_lasts_outlives_a_stop() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let host = &scene.manager.host;
    let (shared, lent) = (host.disk("shared"), host.disk("lent"));
    std::fs::create_dir(host.path("/run/leases")).expect("make a lockspace");
    let pid = scene.guest.pid();
    // A connection for somebody else, with locks of every kind.
    let mut helper = helper_client(&scene.daemon, "guest", pid);
    helper.call(&new_lockspace("/run/leases")).expect_ok();
    helper
        .call(&create_resource("/run/leases", "made"))
        .expect_ok();
    let lease = acquire("/run/leases", "lease", AUTOCREATE);
    helper.call(&lease).expect_ok();
    helper.call(&acquire("", &shared, SHARED)).expect_ok();
    let mut other = Owner::register(scene.daemon.lock_socket(), "other", OnTerm::Die);
    other.call(&acquire("", &shared, SHARED)).expect_ok();
    // An owner without a connection of its own, which is watched.
    let mut silent = Owner::connect(scene.daemon.lock_socket(), OnTerm::Die);
    let mut lender = scene.daemon.client();
    lender
        .call(&register_as("silent", silent.pid()))
        .expect_ok();
    lender.call(&acquire("", &lent, 0)).expect_ok();
    // A right that was given up, half a call, and a reply that nobody has read.
    let mut restricted = helper_client(&scene.daemon, "guest", pid);
    restricted.call(&restrict()).expect_ok();
    let half = acquire("/run/leases", "made", 0).frame(77);
    helper.send(&half[..19]);
    scene.stop();
    scene.start();
    helper.send(&half[19..]);
    Reply::parse(&helper.receive()).expect_ok();
    helper.call(&release("/run/leases", "made")).expect_ok();
    helper.call(&lease).expect_error(87, 51);
    helper.call(&release("/run/leases", "lease")).expect_ok();
    let host = &scene.manager.host;
    assert!(
        !host.path("/run/leases/lease").exists(),
        "AUTOCREATE is known"
    );
    assert!(!restricted.call(&acquire("", DISK, 0)).is_ok());
    // Of those who share it the last one frees it.
    helper.call(&release("", &shared)).expect_ok();
    assert!(scene.is_held(&shared));
    other.kill();
    other.wait_end();
    host.wait_free(&shared);
    assert!(scene.is_held(&lent));
    silent.kill();
    silent.wait_end();
    host.wait_free(&lent);
    scene.serves();
}

#[test]
fn owners_that_died_or_left_meanwhile_are_freed_and_fenced_behind_the_start() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let host = &scene.manager.host;
    let (dead, left) = (host.disk("dead"), host.disk("left"));
    let mut dies = Owner::register(scene.daemon.lock_socket(), "dies", OnTerm::Die);
    dies.call(&acquire("", &dead, 0)).expect_ok();
    let mut leaves = Owner::register(scene.daemon.lock_socket(), "leaves", OnTerm::Die);
    leaves.call(&acquire("", &left, 0)).expect_ok();
    scene.stop();
    dies.kill();
    dies.wait_end();
    leaves.close_connection();
    assert!(leaves.is_alive() && scene.is_held(&dead) && scene.is_held(&left));
    scene.start();
    scene.manager.host.wait_free(&dead);
    assert_eq!(leaves.wait_signal(), Some(Signal::SIGTERM as i32));
    scene.manager.host.wait_free(&left);
    scene.serves();
}

#[test]
fn a_fence_goes_on_over_a_stop() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let left = scene.manager.host.disk("left");
    let mut stubborn = Owner::register(scene.daemon.lock_socket(), "stubborn", OnTerm::Ignore);
    stubborn.call(&acquire("", &left, 0)).expect_ok();
    stubborn.close_connection();
    wait_until(DEADLINE, "the owner to be sent SIGTERM", || {
        scene.daemon.stderr().contains("it is sent SIGTERM now")
    });
    scene.stop();
    assert!(stubborn.is_alive() && scene.is_held(&left));
    scene.start();
    assert_eq!(stubborn.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.manager.host.wait_free(&left);
    scene.serves();
}

#[test]
fn a_daemon_that_nobody_needs_leaves_nothing_in_the_store() {
    if !require_root() {
        return;
    }
    let manager = Manager::new();
    let mut daemon = manager.start();
    daemon.client().ping();
    daemon.wait_until_asleep();
    assert_eq!(daemon.stop().code(), Some(0));
    wait_until(DEADLINE, "the store to be empty", || manager.stored() == 0);
    assert!(!daemon.lock_socket().exists());
}

#[test]
fn where_the_manager_stores_nothing_it_is_said_and_a_stop_fences() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    // It has dropped what it had.
    scene.manager.drop_all();
    wait_until(DEADLINE, "the daemon to say so", || {
        scene.daemon.stderr().contains("a stop would fence")
    });
    let daemon = &mut scene.daemon;
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(scene.guest.wait_signal(), Some(Signal::SIGTERM as i32));
    let log = scene.daemon.stderr();
    assert!(
        log.contains("cannot keep the locks until the next start"),
        "{log}"
    );
    assert!(!scene.is_held(DISK));
    // It never stores anything.
    let manager = Manager::new();
    manager.refuse();
    let mut daemon = manager.start();
    let mut guest = manager
        .host
        .guest(&daemon, "guest", &manager.host.disk("disk"));
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(guest.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(daemon.stderr().contains("a stop would fence"));
}

#[test]
fn a_unit_that_does_not_say_that_the_store_outlives_a_stop_gets_none() {
    if !require_root() {
        return;
    }
    for word in ["fence", "", "Keep"] {
        let manager = Manager::new();
        let mut daemon = manager.spawn_with(&[], word);
        let socket = daemon.lock_socket().to_owned();
        daemon.wait_for_socket(&socket);
        let mut guest = manager
            .host
            .guest(&daemon, "guest", &manager.host.disk("disk"));
        assert_eq!(manager.stored(), 0);
        assert_eq!(daemon.stop().code(), Some(0));
        assert_eq!(guest.wait_signal(), Some(Signal::SIGTERM as i32));
        assert_eq!(manager.heard("FDSTORE"), 0);
    }
}

#[test]
fn int_and_quit_fence_whatever_the_store() {
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        let Some(mut scene) = Scene::new() else {
            return;
        };
        scene.daemon.signal(signal);
        assert_eq!(scene.guest.wait_signal(), Some(Signal::SIGTERM as i32));
        assert_eq!(scene.daemon.wait_end().code(), Some(0));
        wait_until(DEADLINE, "the store to be empty", || {
            scene.manager.stored() == 0
        });
        assert!(!scene.is_held(DISK));
    }
}

#[test]
fn a_bag_or_a_ledger_of_a_later_format_is_refused_and_not_lost() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.stop();
    let rival = scene.rival();
    // A bag of a later format around the same content.
    let bag = scene.manager.bag();
    let mut messages = look(&bag);
    messages[0].0[8] = 2;
    let ours = scene.manager.exchange(bag_of(&messages));
    let log = scene.refused_start(&[]);
    assert!(log.contains("its format 2 is newer than 1"), "{log}");
    assert_eq!(look(&scene.manager.bag()).len(), 1, "it is as it was");
    drop(scene.manager.exchange(ours));
    // A ledger of a later format in ours.
    let ledger = messages.swap_remove(0).1.swap_remove(0);
    let version = |version: u8| {
        let written = nix::sys::uio::pwrite(&ledger, &[version], 8);
        assert_eq!(written, Ok(1));
    };
    let mut now = [0];
    nix::sys::uio::pread(&ledger, &mut now, 8).expect("read the format");
    version(99);
    let log = scene.refused_start(&[]);
    assert!(log.contains("its format 99 is newer than"), "{log}");
    version(now[0]);
    drop(ledger);
    scene.start();
    rival.never_succeeded();
    scene.serves();
}

#[test]
fn a_start_that_may_not_have_as_many_descriptors_is_refused_and_loses_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disks: Vec<String> = (0..100)
        .map(|it| scene.manager.host.disk(&format!("more{it}")))
        .collect();
    for disk in &disks {
        scene.guest.call(&acquire("", disk, 0)).expect_ok();
    }
    let rival = scene.rival();
    scene.stop();
    let log = scene.refused_start(&["prlimit", "--nofile=64:64"]);
    assert!(log.contains("LimitNOFILE"), "{log}");
    scene.start();
    rival.never_succeeded();
    scene.serves();
    for disk in &disks {
        scene.guest.call(&release("", disk)).expect_ok();
    }
}

#[test]
fn what_does_not_fit_its_ledger_is_told_and_every_lock_is_taken_again_by_its_name() {
    type Change = fn(&mut Vec<(Vec<u8>, Vec<OwnedFd>)>);
    let changes: [(&str, Change); 3] = [
        ("is not in it", |inner| {
            // One descriptor less, and its number.
            let length = inner[0].0.len();
            inner[0].0.truncate(length - 4);
            inner[0].1.pop();
        }),
        ("is another one", |inner| {
            // A descriptor of another file in the place of each.
            for descriptor in &mut inner[0].1 {
                let name = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
                if name.is_ok_and(|name| name.ends_with("disk")) {
                    *descriptor = std::fs::File::open("/dev/null").expect("open").into();
                }
            }
        }),
        ("descriptors instead of", |inner| {
            inner[0].0.extend(9999u32.to_le_bytes());
            inner[0]
                .1
                .push(std::fs::File::open("/dev/null").expect("open").into());
        }),
    ];
    for (expected, change) in changes {
        let Some(mut scene) = Scene::new() else {
            return;
        };
        scene.stop();
        let mut whole = look(&scene.manager.bag());
        let inner = whole[0].1.pop().expect("an inner socket");
        let mut messages = look(&inner);
        drop(inner);
        change(&mut messages);
        // The count is of what is in it.
        let count = u32::try_from(messages[0].1.len()).expect("a small number");
        whole[0].0[12..16].copy_from_slice(&count.to_le_bytes());
        whole[0].1.push(bag_of(&messages));
        drop(messages);
        drop(scene.manager.exchange(bag_of(&whole)));
        drop(whole);
        scene.start();
        let log = scene.daemon.stderr();
        assert!(log.contains(expected), "{log}");
        assert!(log.contains("were taken again"), "{log}");
        assert!(scene.is_held(DISK) && scene.guest.is_alive());
        // Its connection is gone, and it can make another one.
        scene.guest.connect_again();
        scene.guest.register_as("guest");
        scene.serves();
    }
}

#[test]
fn a_daemon_that_is_killed_behind_the_start_leaves_an_empty_bag_that_nobody_goes_on_from() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.stop();
    scene.start();
    // What is given up now must not come back.
    scene.guest.call(&release("", DISK)).expect_ok();
    let other = scene.manager.host.disk("other");
    scene.guest.call(&acquire("", &other, 0)).expect_ok();
    scene.daemon.kill();
    scene.start();
    assert!(scene.daemon.stderr().contains("were taken again"));
    assert!(!scene.is_held(DISK) && scene.is_held(&other));
    scene.manager_has_one_bag();
}

#[test]
fn a_bag_whose_ledger_somebody_has_gone_on_from_is_not_gone_on_from() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.stop();
    // As a process would leave it that filled the bag and then went on.
    let mut whole = look(&scene.manager.bag());
    let ledger = whole.remove(0).1.remove(0);
    let written = nix::sys::uio::pwrite(&ledger, &[0; 4], 12);
    assert_eq!(written, Ok(4));
    drop((ledger, whole));
    scene.start();
    let log = scene.daemon.stderr();
    assert!(log.contains("gone on from it since"), "{log}");
    assert!(log.contains("were taken again"), "{log}");
    assert!(scene.is_held(DISK) && scene.guest.is_alive());
}

#[test]
fn a_start_that_is_killed_at_any_moment_leaves_every_lock_where_the_next_one_finds_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    for round in 0..5 {
        scene.stop();
        for delay_us in (round * 30..60_000).step_by(150) {
            let mut daemon = scene.manager.spawn(&[]);
            let kill_at = Instant::now() + Duration::from_micros(delay_us);
            while Instant::now() < kill_at {
                std::hint::spin_loop();
            }
            daemon.kill();
            if look(&scene.manager.first()).is_empty() {
                // It had taken everything and was about to serve, or served: its ledger says what it had.
                let log = daemon.stderr();
                assert!(log.contains("Took over"), "{log}");
                break;
            }
            assert!(scene.is_held(DISK), "{}", daemon.stderr());
        }
        scene.start();
        assert!(scene.is_held(DISK) && scene.guest.is_alive());
    }
}

#[test]
fn locks_of_libvirts_daemon_end_with_the_process_so_their_owners_are_fenced_and_no_others() {
    let Some(c_daemon) = c_daemon() else {
        return skip("needs libvirt's daemon (tests/run installs it)");
    };
    if !require_root() {
        return;
    }
    let manager = Manager::new();
    manager.host.install(&c_daemon);
    let mut daemon = manager.spawn(&[]);
    let socket = daemon.lock_socket().to_owned();
    daemon.wait_for_socket(&socket);
    let (old, new) = (manager.host.disk("old"), manager.host.disk("disk"));
    let mut before = manager.host.guest(&daemon, "before", &old);
    manager.host.install(&program());
    support::upgrade::upgrade(&daemon);
    let guest = manager.host.guest(&daemon, "guest", &new);
    let mut scene = Scene {
        manager,
        daemon,
        guest,
    };
    let rival = scene.rival();
    scene.stop();
    assert_eq!(before.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(!scene.is_held(&old));
    assert!(
        scene
            .daemon
            .stderr()
            .contains("which end with this process")
    );
    scene.start();
    rival.never_succeeded();
    scene.serves();
}

#[test]
fn a_reactor_that_is_killed_at_any_of_its_system_calls_while_it_packs_is_followed_by_one_that_packs()
 {
    if !require_root() || !require_strace() {
        return;
    }
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    for nth in 1..500 {
        let reactor = scene.daemon.reactor();
        let mut strace = std::process::Command::new("strace")
            .args(["-q", "-o", "/dev/null", "-e"])
            .arg(format!("inject=all:signal=KILL:when={nth}"))
            .args(["-p", &reactor.to_string()])
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("start strace");
        let status = format!("/proc/{reactor}/status");
        wait_until(DEADLINE, "strace to be attached", || {
            // It may have been killed already, at the first call that strace saw.
            let status = std::fs::read_to_string(&status).ok();
            status.is_none_or(|it| !it.contains("TracerPid:\t0\n"))
        });
        scene.stop();
        let was_killed = scene.daemon.stderr().contains("was killed by SIGKILL");
        let _ = strace.kill();
        let _ = strace.wait();
        scene.start();
        scene.guest.call(&acquire("", DISK, 0)).expect_error(87, 51);
        if !was_killed {
            assert!(nth > 10, "a stop took only {nth} calls");
            eprintln!("a stop takes {nth} calls");
            rival.never_succeeded();
            return scene.serves();
        }
    }
    panic!("a stop takes more than 500 calls");
}

#[test]
fn where_every_reactor_dies_while_it_packs_a_stop_fences_in_the_end() {
    if !require_root() || !require_strace() {
        return;
    }
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let mut strace = std::process::Command::new("strace")
        .args(["-q", "-f", "-o", "/dev/null"])
        .args(["-e", "inject=sendmsg:signal=KILL:when=1+"])
        .args(["-p", &scene.daemon.pid().to_string()])
        .args(["-p", &scene.daemon.reactor().to_string()])
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("start strace");
    let is_traced = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|it| !it.contains("TracerPid:\t0\n"))
    };
    wait_until(DEADLINE, "strace to be attached", || {
        is_traced(scene.daemon.pid()) && is_traced(scene.daemon.reactor())
    });
    let status = scene.daemon.stop();
    let _ = strace.kill();
    let _ = strace.wait();
    let log = scene.daemon.stderr();
    assert_eq!(status.code(), Some(0), "{log}");
    assert_eq!(log.matches("was killed by SIGKILL").count(), 2, "{log}");
    assert_eq!(scene.guest.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(!scene.is_held(DISK));
}
