//! What stands in the way of a stop that keeps and of the start behind it: a start that is not given what is
//! stored, a run directory without room, an owner that cannot be ended, sockets that are dead or would wait. It
//! costs nobody else anything.

use super::{DISK, Scene, look};
use crate::support::client::{acquire, register_as, release};
use crate::support::daemon::{c_daemon, program};
use crate::support::manager::Manager;
use crate::support::upgrade::upgrade;
use crate::support::{DEADLINE, require_root, skip, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

#[test]
fn a_start_that_is_not_given_what_is_stored_leaves_it_alone() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    // In the background it has another number than the one that it is meant for, and so it has behind a shell
    // that does not make room for it.
    for by in [
        &["sh", "-c", "exec \"$0\" --daemon"][..],
        &["sh", "-c", "\"$0\"; exit $?"],
    ] {
        scene.stop();
        let mut daemon = scene.manager.spawn(by);
        let status = daemon.wait_end();
        assert_ne!(status.code(), Some(0), "{by:?}: {}", daemon.stderr());
        scene.manager.settle();
        assert_eq!(scene.manager.stored(), 1, "{by:?}: {}", daemon.stderr());
        assert!(
            !look(&scene.manager.bag()).is_empty(),
            "{by:?}: it is empty"
        );
        scene.start();
        scene.guest.call(&acquire("", DISK, 0)).expect_error(87, 51);
    }
    rival.never_succeeded();
    scene.serves();
    // Nor does it use a store of which it would not be given anything the next time.
    scene.guest.call(&release("", DISK)).expect_ok();
    scene.daemon.stop();
    scene.manager.settle();
    scene.manager.drop_all();
    let mut daemon = scene.manager.spawn(&["sh", "-c", "\"$0\"; exit $?"]);
    // The socket of the one before is there yet.
    wait_until(DEADLINE, "what a stop will do to be told", || {
        let said = daemon.stderr();
        said.contains("have the unit start virtlockd without")
    });
    let socket = daemon.lock_socket().to_owned();
    daemon.wait_for_socket(&socket);
    scene.manager.settle();
    assert_eq!(scene.manager.stored(), 0);
}

#[test]
fn a_run_directory_without_room_stands_in_the_way_of_no_stop() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let long = "x".repeat(120);
    for number in 0..1200 {
        let disk = scene.manager.host.disk(&format!("{long}{number}"));
        scene.guest.call(&acquire("", &disk, 0)).expect_ok();
    }
    let rival = scene.rival();
    let fill = "dd if=/dev/zero of=/run/fill bs=4k 2>/dev/null; ! echo more >/run/more";
    let holder = scene.manager.host.namespace.holder().to_string();
    let shrink = format!(
        "mount -o remount,size=$(($(df -k --output=used /run | tail -1) + 8))k /run; {fill}"
    );
    let status = std::process::Command::new("nsenter")
        .args(["-t", &holder, "-m", "sh", "-c", &shrink])
        .status()
        .expect("fill the run directory");
    assert!(status.success(), "there is room in /run still");
    scene.stop();
    let widen = std::process::Command::new("nsenter")
        .args([
            "-t",
            &holder,
            "-m",
            "mount",
            "-o",
            "remount,size=64M",
            "/run",
        ])
        .status()
        .expect("make room in the run directory");
    assert!(widen.success());
    scene.start();
    rival.never_succeeded();
    scene.serves();
}

/// A daemon that came from libvirt's, with a POSIX lock of `before`, and a guest of its own.
fn come_from_libvirts(
    before: impl FnOnce(&Manager, &crate::support::daemon::Daemon),
) -> Option<Scene> {
    let Some(c_daemon) = c_daemon() else {
        skip("needs libvirt's daemon (tests/run installs it)");
        return None;
    };
    if !require_root() {
        return None;
    }
    let manager = Manager::new();
    manager.host.install(&c_daemon);
    let mut daemon = manager.spawn(&[]);
    let socket = daemon.lock_socket().to_owned();
    daemon.wait_for_socket(&socket);
    before(&manager, &daemon);
    manager.host.install(&program());
    upgrade(&daemon);
    let disk = manager.host.disk("disk");
    let guest = manager.host.guest(&daemon, "guest", &disk);
    Some(Scene {
        manager,
        daemon,
        guest,
    })
}

#[test]
fn an_owner_of_libvirts_lock_that_is_not_ended_costs_nobody_else_anything_and_has_it_again() {
    let mut silent = None;
    // It has no connection of its own, so that no stop ends it.
    let scene = come_from_libvirts(|manager, daemon| {
        let old = manager.host.disk("old");
        let owner = std::process::Command::new("sleep").arg("1000").spawn();
        let owner = owner.expect("start a process");
        let pid = i32::try_from(owner.id()).expect("a pid");
        let mut lender = daemon.client();
        lender.call(&register_as("silent", pid)).expect_ok();
        lender.call(&acquire("", &old, 0)).expect_ok();
        silent = Some((owner, lender));
    });
    let (Some(mut scene), Some((mut silent, lender))) = (scene, silent) else {
        return;
    };
    drop(lender);
    let rival = scene.rival();
    scene.stop();
    let said = scene.daemon.stderr();
    assert!(
        said.contains("until the next start takes them again"),
        "{said}"
    );
    let silent_lives = silent.try_wait().expect("ask for a child").is_none();
    assert!(silent_lives && scene.guest.is_alive());
    scene.start();
    rival.never_succeeded();
    assert!(scene.is_held("/run/old"));
    scene.serves();
    // Its death frees it as ever.
    silent.kill().expect("kill a child");
    silent.wait().expect("wait for a child");
    wait_until(DEADLINE, "the lock of the dead to be free", || {
        !scene.is_held("/run/old")
    });
}

#[test]
fn a_stop_soon_behind_the_death_of_the_main_process_keeps_what_can_be_kept() {
    let mut before = None;
    let scene = come_from_libvirts(|manager, daemon| {
        let old = manager.host.disk("old");
        before = Some(manager.host.guest(daemon, "before", &old));
    });
    let (Some(mut scene), Some(mut before)) = (scene, before) else {
        return;
    };
    let rival = scene.rival();
    let first = scene.main();
    let _ = kill(Pid::from_raw(first), Signal::SIGKILL);
    wait_until(DEADLINE, "another main process", || scene.main() != first);
    wait_until(DEADLINE, "it to serve", || {
        let mut client = scene.daemon.client();
        client
            .call(&register_as("asks", std::process::id() as i32))
            .is_ok()
    });
    let _ = kill(Pid::from_raw(scene.main()), Signal::SIGTERM);
    scene.await_end();
    assert_eq!(before.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(scene.is_kept() && scene.is_held(DISK));
    let _ = scene.daemon.ended();
    scene.start();
    rival.never_succeeded();
    scene.serves();
}

#[test]
fn a_dead_socket_in_the_place_of_the_daemons_own_is_replaced() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.stop();
    let path = scene.daemon.lock_socket().to_owned();
    // Somebody came to the daemon's own before.
    let mut waiting = scene.daemon.client();
    std::fs::remove_file(&path).expect("remove the daemon's socket");
    drop(UnixListener::bind(&path).expect("make a socket"));
    assert!(UnixStream::connect(&path).is_err());
    scene.start();
    waiting
        .call(&register_as("waits", std::process::id() as i32))
        .expect_ok();
    scene
        .daemon
        .client()
        .call(&register_as("new", std::process::id() as i32))
        .expect_ok();
    scene.serves();
}

#[test]
fn a_daemon_that_listens_in_the_place_of_the_own_socket_is_not_cut_off() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.stop();
    let path = scene.daemon.lock_socket().to_owned();
    std::fs::remove_file(&path).expect("remove the daemon's socket");
    let other = UnixListener::bind(&path).expect("listen there");
    let mut daemon = scene.manager.spawn(&[]);
    assert_ne!(daemon.wait_end().code(), Some(0));
    let said = daemon.stderr();
    assert!(said.contains("another program listens there"), "{said}");
    UnixStream::connect(&path).expect("the other one is still there");
    assert!(scene.is_held(DISK));
    drop(other);
    scene.start();
    scene.serves();
}

#[test]
fn an_old_socket_that_would_wait_does_not_keep_the_start_waiting() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.stop();
    let mut whole = look(&scene.manager.bag());
    let inner = whole[0].1.pop().expect("what the bag has in it");
    let listens = |it: &std::os::fd::OwnedFd| {
        nix::sys::socket::getsockopt(it, nix::sys::socket::sockopt::AcceptConn) == Ok(true)
    };
    let sockets = look(&inner);
    let sockets = sockets.iter().flat_map(|(_, descriptors)| descriptors);
    let mut count = 0;
    for socket in sockets.filter(|it| listens(it)) {
        // SAFETY: takes numbers.
        let result = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, 0) };
        assert_eq!(result, 0);
        count += 1;
    }
    assert_eq!(count, 2);
    // So they are old: nobody comes to them any more.
    std::fs::remove_file(scene.daemon.lock_socket()).expect("remove the daemon's socket");
    let pid = scene.daemon.pid();
    scene.start();
    assert_ne!(scene.daemon.pid(), pid);
    let said = scene.daemon.stderr();
    assert!(!said.contains("does not come back"), "{said}");
    scene.serves();
}
