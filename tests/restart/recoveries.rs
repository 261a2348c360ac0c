//! Processes that serve and are killed while they go on for another one: in every state in which a daemon may
//! be then, at whichever system call. The next one has lost nothing of what the dead one knew.

use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::client::{AUTOCREATE, Reply, acquire, release};
use crate::support::daemon::{self, Daemon, c_daemon, kill_all, reactor_of};
use crate::support::owner::Owner;
use crate::support::tracer::{Seen, Tracer};
use crate::support::upgrade::{Host, REFUSAL, Rival, helper_client, image, upgrade};
use crate::support::{DEADLINE, lock_probe, require_root, skip, wait_for, wait_until};

const EPOLL_WAIT: u64 = libc::SYS_epoll_wait as u64;
/// More system calls than a process makes until it serves.
const MOST: usize = 3000;
/// How many are killed one after the other: behind each the next one is waited for longer.
const IN_A_ROW: usize = 3;

/// Every so many calls one is killed; at each with `VIRTLOCKD_EVERY_CALL=1`.
fn step_of(usual: usize) -> usize {
    let step = std::env::var("VIRTLOCKD_EVERY_CALL").ok();
    step.and_then(|step| step.parse().ok()).unwrap_or(usual)
}

/// Places at which [`IN_A_ROW`] processes are to be killed one after the other, group by group.
fn places(step: usize) -> impl Iterator<Item = [usize; IN_A_ROW]> {
    let first = (1..MOST).step_by(step * IN_A_ROW);
    first.map(move |first| std::array::from_fn(|more| first + more * step))
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal a process of the daemon");
}

/// The next process that a traced one makes and that is wanted; the others are let go.
fn next_child(parent: &Tracer, is_wanted: impl Fn(i32) -> bool) -> Tracer {
    loop {
        match parent.run() {
            Seen::Child(pid) => {
                let child = Tracer::child(pid).expect("the new process");
                if is_wanted(pid) {
                    return child;
                }
                child.release();
            }
            Seen::Stopped => (),
            Seen::Gone => panic!("process {} is gone", parent.pid()),
        }
    }
}

/// Kills a process as it enters its nth system call. False if it served before, and was let go.
fn kill_at(process: Tracer, nth: usize) -> bool {
    let mut calls = 0;
    while calls < nth {
        assert_eq!(process.to_next_call(), Seen::Stopped, "at call {calls}");
        match process.call() {
            Some((EPOLL_WAIT, _)) => {
                process.release();
                return false;
            }
            Some((_, result)) if result == -i64::from(libc::ENOSYS) => calls += 1,
            _ => (),
        }
    }
    process.kill();
    true
}

/// Kills each of the wanted processes that `parent` makes at its place, and lets one live. Whether each came
/// to its place.
fn kill_each(parent: &Tracer, places: &[usize], is_wanted: impl Fn(i32) -> bool) -> bool {
    for place in places {
        if !kill_at(next_child(parent, &is_wanted), *place) {
            return false;
        }
    }
    next_child(parent, is_wanted).release();
    true
}

/// A daemon whose guest has a disk.
struct Scene {
    host: Host,
    daemon: Daemon,
    guest: Owner,
    disk: String,
    /// The daemon's number, which changes.
    pid: i32,
}

impl Scene {
    fn of(program: &Path) -> Scene {
        let host = Host::with(program);
        let daemon = host.start(&[], &[]);
        let disk = host.disk("disk");
        let guest = host.guest(&daemon, "guest", &disk);
        let pid = daemon.pid();
        Scene {
            host,
            daemon,
            guest,
            disk,
            pid,
        }
    }

    /// The guest's connection is answered, nobody else has its disk, and the pid file is locked.
    #[track_caller]
    fn serves(&mut self) {
        let spare = self.host.disk("spare");
        self.guest.call(&acquire("", &spare, 0)).expect_ok();
        self.host.assert_held(&spare);
        self.guest.call(&release("", &spare)).expect_ok();
        self.host.assert_held(&self.disk);
        let pid_file = lock_probe(&self.host.path("/run/virtlockd.pid"));
        assert!(pid_file.is_some(), "the pid file is locked by nobody");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.daemon.stderr();
            let from = log.len().saturating_sub(3000);
            eprintln!("{}", String::from_utf8_lossy(&log.as_bytes()[from..]));
        }
        kill_all(self.pid);
    }
}

/// A version of before ledgers of today's format, as far as this daemon can tell, and one that knows of no
/// understudy. It is this program, which reads the earlier formats, too.
fn earlier_version(format: u32) -> String {
    let program = daemon::program();
    format!(
        r#"if [ -n "$VIRTLOCKD_CHECK_LEDGER" ]; then
    format=$(od -An -tu4 -j8 -N4)
    if [ $format -gt {format} ]; then
        echo 'virtlockd (virtlockd-rs) 0.0.1'
        echo "the ledger: its format $((format)) is newer than {format}, the last that this program knows" >&2
        exit 3
    fi
else
    kill -9 $VIRTLOCKD_UNDERSTUDY
    until [ "$state" = Z ]; do
        read -r _ _ state _ < /proc/$VIRTLOCKD_UNDERSTUDY/stat
    done
fi
exec bash -c 'exec -a "$0" {} "$@"' "$0" "$@""#,
        program.display()
    )
}

#[test]
fn the_ledger_of_an_earlier_version_is_read_until_there_is_another_one() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::of(&daemon::program());
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    let mut formats = [4, 3, 2].into_iter().cycle();
    for places in places(step_of(11)) {
        let format = formats.next().unwrap_or(4);
        scene.host.install_script(&earlier_version(format));
        scene.daemon.wait_until_asleep();
        let before = image(scene.pid);
        let guardian = Tracer::seize(scene.pid, true).expect("the daemon");
        send(scene.pid, Signal::SIGUSR1);
        let is_of_successor = |pid: i32| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe"));
            image(pid) != before && program.is_ok_and(|it| it == daemon::program())
        };
        let all_came = kill_each(&guardian, &places, is_of_successor);
        guardian.release();
        scene.serves();
        if !all_came {
            eprintln!("the first process needs at most {} calls", places[2]);
            assert!(places[0] > 100);
            return rival.never_succeeded();
        }
    }
    panic!("it needs more than {MOST} calls");
}

#[test]
fn posix_locks_are_taken_again_however_many_processes_die_behind_a_dead_successor() {
    if !require_root() {
        return;
    }
    let Some(c_daemon) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let mut scene = Scene::of(&c_daemon);
    scene.host.install(&daemon::program());
    upgrade(&scene.daemon);
    scene.serves();
    let text = "if [ \"$1\" = --version ]; then echo 'x (virtlockd-rs) 0.0.1'; \
                echo 'ledger readable: 1 connections, 1 locks; its understudy is dismissed'; exit 0; fi; exit 1";
    scene.host.install_script(text);
    for places in places(step_of(11)) {
        wait_until(DEADLINE, "everything to be done", || {
            let path = format!("/proc/{0}/task/{0}/children", scene.pid);
            let children = std::fs::read_to_string(path).expect("the daemon's children");
            children.split_whitespace().count() == 1
        });
        // It is the process that serves that makes the understudy.
        let reactor = Tracer::seize(reactor_of(scene.pid), true).expect("the process that serves");
        send(scene.pid, Signal::SIGUSR1);
        let understudy = next_child(&reactor, |_| true);
        scene.pid = understudy.pid();
        reactor.release();
        let refusals = scene.daemon.stderr().matches(REFUSAL).count();
        let all_came = kill_each(&understudy, &places, |_| true);
        understudy.release();
        scene.serves();
        scene.host.assert_keeps_ledger(scene.pid);
        wait_until(DEADLINE, "the failure to be told", || {
            scene.daemon.stderr().matches(REFUSAL).count() > refusals
        });
        if !all_came {
            eprintln!("the first process needs at most {} calls", places[2]);
            assert!(places[0] > 100);
            return;
        }
    }
    panic!("it needs more than {MOST} calls");
}

#[test]
fn libvirts_state_is_taken_over_however_many_processes_die_at_it() {
    if !require_root() {
        return;
    }
    let Some(c_daemon) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    for places in places(step_of(31)) {
        let mut scene = Scene::of(&c_daemon);
        let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
        scene.host.install(&daemon::program());
        let guardian = Tracer::seize(scene.pid, true).expect("the daemon");
        send(scene.pid, Signal::SIGUSR1);
        let all_came = kill_each(&guardian, &places, |_| true);
        guardian.release();
        scene.serves();
        scene.host.assert_keeps_ledger(scene.pid);
        // It is its own, and not a dead one's that says what was.
        let log = scene.daemon.stderr();
        assert!(!log.contains("another daemon has its ledger"), "{log}");
        rival.never_succeeded();
        if !all_came {
            eprintln!("the first process needs at most {} calls", places[2]);
            assert!(places[0] > 60);
            return;
        }
    }
    panic!("it needs more than {MOST} calls");
}

#[test]
fn the_pid_file_is_locked_again_by_whoever_goes_on() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::of(&daemon::program());
    let pid_file = scene.host.path("/run/virtlockd.pid");
    // Somebody made the daemon open and close its own file, and it was killed before it had seen to it.
    let opened = "/run/virtlockd.pid";
    let mut helper = helper_client(&scene.daemon, "guest", scene.guest.pid());
    let guardian = Tracer::seize(scene.pid, true).expect("the daemon");
    let reactor = Tracer::seize(scene.daemon.reactor(), false).expect("the process that serves");
    helper.post(&acquire("", opened, 0));
    while lock_probe(&pid_file).is_some() {
        assert_eq!(reactor.to_next_call(), Seen::Stopped);
    }
    reactor.kill();
    next_child(&guardian, |_| true).release();
    guardian.release();
    assert!(!Reply::parse(&helper.receive()).is_ok());
    scene.serves();
}

#[test]
fn a_file_that_was_made_for_a_call_is_removed_however_late_its_recovery_dies() {
    if !require_root() {
        return;
    }
    let made = "/run/made";
    for places in places(step_of(9)) {
        // A new one: where many have died the next one is waited for longer and longer.
        let scene = Scene::of(&daemon::program());
        let mut helper = helper_client(&scene.daemon, "guest", scene.guest.pid());
        let guardian = Tracer::seize(scene.pid, true).expect("the daemon");
        let reactor =
            Tracer::seize(scene.daemon.reactor(), false).expect("the process that serves");
        helper.post(&acquire("", made, AUTOCREATE));
        while !scene.host.path(made).exists() {
            assert_eq!(reactor.to_next_call(), Seen::Stopped);
        }
        reactor.kill();
        let all_came = kill_each(&guardian, &places, |_| true);
        guardian.release();
        Reply::parse(&helper.receive()).expect_ok();
        scene.host.assert_held(made);
        helper.call(&release("", made)).expect_ok();
        let is_left = scene.host.path(made).exists();
        assert!(!is_left, "it was made for that, before calls {places:?}");
        if !all_came {
            eprintln!("a recovery needs at most {} calls", places[2]);
            assert!(places[0] > 20);
            return;
        }
    }
    panic!("it needs more than {MOST} calls");
}

#[test]
fn an_understudy_that_is_dead_is_not_relied_on() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::of(&daemon::program());
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    // The process that serves dies at its first call, or when it has nearly come to serve.
    for place in [1, 60] {
        scene.daemon.wait_until_asleep();
        let before = image(scene.pid);
        let serving = Tracer::seize(reactor_of(scene.pid), true).expect("the process that serves");
        send(scene.pid, Signal::SIGUSR1);
        let understudy = next_child(&serving, |_| true);
        let guardian = Tracer::seize(scene.pid, true).expect("the daemon");
        serving.release();
        let reactor = next_child_behind(&guardian, understudy, &before);
        assert!(kill_at(reactor, place));
        guardian.release();
        scene.serves();
        assert_eq!(scene.daemon.ended(), None);
        // Nor is there anybody who ends with the daemon's main process.
        let first = scene.pid;
        send(scene.daemon.reactor(), Signal::SIGKILL);
        scene.serves();
        assert_eq!(scene.pid, first);
    }
    rival.never_succeeded();
}

/// Kills the understudy when the successor has made a process that serves: that one.
fn next_child_behind(guardian: &Tracer, understudy: Tracer, before: &[u8]) -> Tracer {
    let pid = understudy.pid();
    understudy.release();
    let reactor = next_child(guardian, |child| image(child) != before);
    send(pid, Signal::SIGKILL);
    wait_for(DEADLINE, "the understudy to be over", || {
        let state = crate::support::owner::process_state(pid);
        state.is_none_or(|state| state == 'Z').then_some(())
    });
    reactor
}

#[test]
fn a_daemon_that_has_no_descriptor_left_is_gone_on_for() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::of(&daemon::program());
    scene.daemon.limit("--nofile=100:100");
    let mut taken = Vec::new();
    loop {
        let disk = scene.host.disk(&format!("disk-{}", taken.len()));
        if !scene.guest.call(&acquire("", &disk, 0)).is_ok() {
            break;
        }
        taken.push(disk);
    }
    assert!(taken.len() > 10, "{} disks", taken.len());
    let rival = Rival::of(taken.iter().map(|disk| scene.host.path(disk)).collect());
    for _ in 0..2 {
        let before = scene.daemon.reactor();
        send(before, Signal::SIGKILL);
        wait_until(DEADLINE, "another process that serves", || {
            ![before, scene.pid].contains(&scene.daemon.reactor())
        });
        assert!(!scene.guest.call(&acquire("", &scene.disk, 0)).is_ok());
    }
    rival.never_succeeded();
    for disk in taken {
        scene.guest.call(&release("", &disk)).expect_ok();
        scene.host.assert_free(&disk);
    }
    scene.serves();
}
