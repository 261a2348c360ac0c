//! A command that has locks, as a guest has them.

use crate::commands::Scene;
use crate::run::{Ran, Running, ctl, of, program};
use crate::support;
use crate::support::client::{acquire, release};
use crate::support::daemon::{Daemon, c_daemon};
use crate::support::namespace::Namespace;
use crate::support::owner::runs;
use crate::support::{DEADLINE, lock_probe, skip, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;

fn free(namespace: &Namespace) -> PathBuf {
    namespace.path("/run/free")
}

/// A command that says which process it is and then does nothing for long.
fn sleeper(scene: &Scene) -> (Running, i32) {
    let script = "echo $$ > /run/pid.new; mv /run/pid.new /run/pid; exec sleep 600";
    let words = ["exec", "/run/free", "--", "sh", "-c", script];
    let running = Running::start(&scene.namespace, &words);
    let file = scene.namespace.path("/run/pid");
    let pid = wait_for(DEADLINE, "the command to run", || {
        std::fs::read_to_string(&file).ok()?.trim().parse().ok()
    });
    assert!(lock_probe(&free(&scene.namespace)).is_some_and(|lock| lock.exclusive));
    (running, pid)
}

#[test]
fn a_command_has_the_lock_while_it_runs_and_its_end_is_passed_on() {
    let Some(scene) = Scene::new() else { return };
    let said = scene
        .ctl(&["exec", "/run/free", "--", program(), "who", "/run/free"])
        .expect(0);
    assert!(
        said.contains("held exclusive") && said.contains("by domain 'virtlockctl exec "),
        "{said}"
    );
    assert_eq!(lock_probe(&free(&scene.namespace)), None);
    for (script, code) in [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)] {
        scene
            .ctl(&["exec", "/run/free", "--", "sh", "-c", script])
            .expect(code);
    }
    scene
        .ctl(&["exec", "/run/free", "--", "/run/no-such-program"])
        .expect(127);
    // Nothing of the connection is open in it: it has what it has without a lock.
    let ls = ["ls", "/proc/self/fd"];
    let said = scene.ctl(&[&["exec", "/run/free", "--"], &ls[..]].concat());
    let mut without = scene.namespace.command(ls[0]);
    assert_eq!(said.expect(0), of(without.arg(ls[1])).expect(0));
    assert_eq!(lock_probe(&free(&scene.namespace)), None);
}

#[test]
fn a_command_is_not_run_while_another_has_the_disk_and_it_is_said_who() {
    let Some(scene) = Scene::new() else { return };
    let touch = [
        "exec",
        "/run/free",
        "/run/disk",
        "--",
        "touch",
        "/run/touched",
    ];
    let held = scene.ctl(&touch);
    let by = format!("pid {})", scene.first.pid());
    assert!(
        held.stderr
            .contains("'/run/disk' is locked: by domain 'first'"),
        "{held:?}"
    );
    assert!(held.stderr.contains(&by), "{held:?}");
    held.expect(75);
    assert!(!scene.namespace.path("/run/touched").exists());
    assert_eq!(lock_probe(&free(&scene.namespace)), None, "all or none");
    // Shared with those who share.
    scene.ctl(&["exec", "/run/shared", "--", "true"]).expect(75);
    scene
        .ctl(&["exec", "--shared", "/run/shared", "--", "true"])
        .expect(0);
}

#[test]
fn a_command_that_waits_runs_when_the_disk_is_free() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let words = [
        "exec",
        "--wait",
        "60",
        "/run/disk",
        "--",
        "touch",
        "/run/touched",
    ];
    let mut waiting = Running::start(&scene.namespace, &words);
    let mut status = support::status::Status::of(&scene.daemon);
    wait_until(DEADLINE, "it to be refused", || {
        status.counters()["locks_refused"] > 0
    });
    let before = status.counters()["locks_refused"];
    assert!(!scene.namespace.path("/run/touched").exists());
    scene.first.call(&release("", "/run/disk")).expect_ok();
    // It would ask by itself long after this.
    let ended = wait_for(DEADLINE, "it to be told that the disk is free", || {
        waiting.0.try_wait().expect("look at it")
    });
    assert_eq!(ended.code(), Some(0));
    assert!(scene.namespace.path("/run/touched").exists());
    // It has not asked again and again.
    assert_eq!(status.counters()["locks_refused"], before);
    let late = ["exec", "--wait", "1", "/run/shared", "--", "true"];
    scene.ctl(&late).expect(75);
}

#[test]
fn a_lease_is_locked_in_the_disk_s_place() {
    let Some(scene) = Scene::new() else { return };
    let words = [
        "exec",
        "--lease",
        "/run/leases",
        "/run/free",
        "--",
        program(),
        "--json",
        "status",
    ];
    let status = scene.ctl(&words).json(0);
    let paths = status["resources"].as_array().expect("rows").iter();
    let mut paths = paths.map(|row| row["path"].as_str().expect("a path"));
    let path = paths.find(|path| path.starts_with("/run/leases/"));
    let path = path.expect("the lease");
    assert_eq!(path.len(), "/run/leases/".len() + 64, "{path}");
    assert!(
        !scene.namespace.path(path).exists(),
        "it goes with the lock"
    );
}

#[test]
fn a_signal_reaches_the_command_and_the_death_of_its_owner_kills_it() {
    let Some(scene) = Scene::new() else { return };
    let (mut running, pid) = sleeper(&scene);
    let own = Pid::from_raw(running.0.id().cast_signed());
    kill(own, Signal::SIGTERM).expect("signal it");
    assert_eq!(running.0.wait().expect("its end").code(), Some(143));
    assert!(!runs(pid));
    std::fs::remove_file(scene.namespace.path("/run/pid")).expect("forget it");

    let (mut running, pid) = sleeper(&scene);
    running.0.kill().expect("kill it");
    running.0.wait().expect("its end");
    wait_until(DEADLINE, "the command to be killed", || !runs(pid));
    wait_until(DEADLINE, "the lock to be free", || {
        lock_probe(&free(&scene.namespace)).is_none()
    });
}

#[test]
fn a_command_ends_if_the_connection_does() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (mut running, pid) = sleeper(&scene);
    scene.daemon.kill();
    let ended = running.0.wait().expect("its end");
    assert_eq!(ended.code(), Some(76));
    assert!(!runs(pid));
}

#[test]
fn an_upgrade_and_a_crash_are_nothing_to_a_command() {
    let Some(scene) = Scene::new() else { return };
    let (mut running, pid) = sleeper(&scene);
    support::upgrade::upgrade(&scene.daemon);
    wait_until(DEADLINE, "the successor to serve", || {
        support::status::Status::of(&scene.daemon).counters()["upgrades"] == 1
    });
    let reactor = scene.daemon.reactor();
    kill(Pid::from_raw(reactor), Signal::SIGKILL).expect("kill the process that serves");
    wait_until(DEADLINE, "another process that serves", || {
        ![reactor, scene.daemon.pid()].contains(&scene.daemon.reactor())
    });
    let said: Ran = scene.ctl(&["who", "/run/free"]);
    assert!(said.stdout.contains("virtlockctl exec"), "{said:?}");
    assert!(runs(pid));
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("end the command");
    assert_eq!(running.0.wait().expect("its end").code(), Some(143));
    assert_eq!(lock_probe(&free(&scene.namespace)), None);
}

#[test]
fn a_command_has_its_lock_of_libvirts_daemon_as_well() {
    if !support::require_root() {
        return;
    }
    let Some(libvirts) = c_daemon() else {
        skip("needs libvirt's own daemon");
        return;
    };
    let namespace = Namespace::new();
    let daemon = Daemon::start_program(&libvirts, &namespace, &[], &[]);
    std::fs::write(free(&namespace), b"").expect("make a disk");
    ctl(
        &namespace,
        &["exec", "/run/free", "--", "sh", "-c", "exit 3"],
    )
    .expect(3);
    assert_eq!(lock_probe(&free(&namespace)), None);
    let mut owner =
        support::owner::Owner::register(daemon.lock_socket(), "guest", support::owner::OnTerm::Die);
    owner.call(&acquire("", "/run/free", 0)).expect_ok();
    let held = ctl(&namespace, &["exec", "/run/free", "--", "true"]);
    assert!(held.stderr.contains("'/run/free' is locked"), "{held:?}");
    held.expect(75);
    // It is asked again now and then: this daemon says nothing.
    let waiting = Running::start(
        &namespace,
        &["exec", "--wait", "60", "/run/free", "--", "true"],
    );
    owner.call(&release("", "/run/free")).expect_ok();
    let mut waiting = waiting;
    assert_eq!(waiting.0.wait().expect("its end").code(), Some(0));
}

/// A number that a script writes, whole.
fn number(scene: &Scene, path: &str) -> i32 {
    let file = scene.namespace.path(path);
    wait_for(DEADLINE, "a process to say its number", || {
        let text = std::fs::read_to_string(&file).ok()?;
        text.strip_suffix('\n')?.parse().ok()
    })
}

fn signal(running: &Running, signal: Signal) {
    kill(Pid::from_raw(running.0.id().cast_signed()), signal).expect("signal it");
}

#[test]
fn what_a_command_started_does_not_outlive_the_locks() {
    let Some(scene) = Scene::new() else { return };
    // One that leaves its session as well as its parents, and does not want to end.
    let script = "trap '' TERM; setsid sh -c 'sleep 600 & echo $! > /run/pid' & wait; sleep 600";
    for is_outer in [true, false] {
        let words = ["exec", "/run/free", "--", "sh", "-c", script];
        let mut running = Running::start(&scene.namespace, &words);
        let pid = number(&scene, "/run/pid");
        let outer = running.0.id().cast_signed();
        let victim = if is_outer { outer } else { lock_owner(outer) };
        assert!(runs(pid) && lock_probe(&free(&scene.namespace)).is_some());
        kill(Pid::from_raw(victim), Signal::SIGKILL).expect("kill it");
        if is_outer {
            wait_until(DEADLINE, "its lock to be free", || {
                lock_probe(&free(&scene.namespace)).is_none()
            });
            assert!(!runs(pid), "what the command started writes without a lock");
        } else {
            assert_eq!(running.0.wait().expect("its end").code(), Some(76));
            assert!(!runs(pid), "what the command started writes without a lock");
        }
        std::fs::remove_file(scene.namespace.path("/run/pid")).expect("forget it");
        wait_until(DEADLINE, "its lock to be free", || {
            lock_probe(&free(&scene.namespace)).is_none()
        });
    }
}

/// The only child of the process that was started.
fn lock_owner(outer: i32) -> i32 {
    let children = std::fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"));
    let children = children.expect("its children");
    children.trim().parse().expect("one child")
}

#[test]
fn locks_are_kept_until_what_a_command_left_behind_has_ended() {
    let Some(scene) = Scene::new() else { return };
    let script = "setsid sleep 600 & echo $! > /run/pid; exit 3";
    let words = ["exec", "/run/free", "--", "sh", "-c", script];
    let mut running = Running::start(&scene.namespace, &words);
    let pid = number(&scene, "/run/pid");
    let said = running.0.stderr.take().expect("its errors");
    let mut said = std::io::BufReader::new(said);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).expect("a line");
    assert!(line.contains("the locks are kept"), "{line}");
    assert!(runs(pid) && lock_probe(&free(&scene.namespace)).is_some());
    signal(&running, Signal::SIGTERM);
    assert_eq!(running.0.wait().expect("its end").code(), Some(3));
    assert!(!runs(pid));
    assert_eq!(lock_probe(&free(&scene.namespace)), None);
    line.clear();
    std::io::BufRead::read_line(&mut said, &mut line).expect("its end");
    assert_eq!(line, "", "nothing more is said");
}

#[test]
fn all_that_a_command_started_ends_if_the_connection_does() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let script = "trap '' TERM; setsid sh -c 'sleep 600 & echo $! > /run/pid' & wait; sleep 600";
    let words = ["exec", "/run/free", "--", "sh", "-c", script];
    let mut running = Running::start(&scene.namespace, &words);
    let pid = number(&scene, "/run/pid");
    scene.daemon.kill();
    assert_eq!(running.0.wait().expect("its end").code(), Some(76));
    assert!(!runs(pid));
}

#[test]
fn whoever_waits_for_a_lock_ends_when_told_to() {
    let Some(scene) = Scene::new() else { return };
    let mut status = support::status::Status::of(&scene.daemon);
    let files = ["/run/free", "/run/disk"];
    for (which, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let before = status.counters()["locks_refused"];
        let words = [&["exec", "--wait", "600"], &files[..], &["--", "true"]].concat();
        let mut waiting = Running::start(&scene.namespace, &words);
        wait_until(DEADLINE, "it to be refused", || {
            status.counters()["locks_refused"] > before
        });
        signal(&waiting, which);
        let ended = wait_for(DEADLINE, "it to end", || {
            waiting.0.try_wait().expect("look at it")
        });
        assert_eq!(ended.code(), Some(code));
        assert_eq!(lock_probe(&free(&scene.namespace)), None);
    }
}

#[test]
fn a_file_that_is_named_twice_is_locked_once() {
    let Some(scene) = Scene::new() else { return };
    let link = scene.namespace.path("/run/link");
    std::os::unix::fs::symlink("/run/free", link).expect("make a link");
    let other = scene.namespace.path("/run/other");
    std::fs::hard_link(free(&scene.namespace), other).expect("make a name");
    for second in ["/run/free", "/run/./free", "/run/link", "/run/other"] {
        for shared in [&[][..], &["--shared"]] {
            let words = [&["exec"], shared, &["/run/free", second, "--", "true"]].concat();
            scene.ctl(&words).expect(0);
        }
    }
    let words = ["exec", "--lease", "/run/leases", "/run/free", "/run/free"];
    let words = [&words[..], &["--", "true"]].concat();
    scene.ctl(&words).expect(0);
}
