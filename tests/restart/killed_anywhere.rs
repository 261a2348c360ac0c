//! The reactor is killed, wherever it is: at each of its system calls, one after the other, in a story that
//! has every kind of call, an owner's death, a fence and an upgrade; at each call of its recovery; and at
//! random instants under load. Each call gets its one right answer, and no lock is ever free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support;
use crate::support::client::{
    AUTOCREATE, Reply, SHARED, acquire, create_resource, delete_resource, look_up_server,
    new_lockspace, release, restrict,
};
use crate::support::daemon::Daemon;
use crate::support::owner::{OnTerm, Owner};
use crate::support::tracer::{Seen, Tracer};
use crate::support::upgrade::{Host, Rival, helper_client};
use crate::support::{DEADLINE, require_root, require_strace, wait_until};

/// More system calls than the story takes.
const MOST: usize = 2000;

/// What an earlier call may have to say for a disk that a story works on.
struct Story {
    host: Host,
    daemon: Daemon,
    /// Holds `held` and, with others, `shared`, all the time.
    guest: Owner,
    rival: Rival,
}

impl Story {
    fn begin() -> Story {
        let host = Host::new();
        let daemon = host.start(&[], &[]);
        let (held, shared) = (host.disk("held"), host.disk("shared"));
        host.disk("taken");
        std::fs::create_dir(host.path("/run/leases")).expect("make a lockspace");
        let mut guest = host.guest(&daemon, "guest", &held);
        guest.call(&acquire("", &shared, SHARED)).expect_ok();
        let rival = Rival::of(vec![host.path(&held), host.path(&shared)]);
        Story {
            host,
            daemon,
            guest,
            rival,
        }
    }

    fn go_on(&mut self) {
        let (host, daemon) = (&self.host, &self.daemon);
        let pid = self.guest.pid();
        let (taken, shared) = ("/run/taken", "/run/shared");
        let mut helper = helper_client(daemon, "guest", pid);
        helper.call(&acquire("", taken, 0)).expect_ok();
        host.assert_held(taken);
        assert!(!helper.call(&acquire("", taken, 0)).is_ok());
        helper.call(&release("", taken)).expect_ok();
        host.assert_free(taken);
        assert!(!helper.call(&release("", taken)).is_ok());
        // A lockspace and a lock file in it.
        helper.call(&new_lockspace("/run/leases")).expect_ok();
        helper
            .call(&create_resource("/run/leases", "made"))
            .expect_ok();
        helper
            .call(&delete_resource("/run/leases", "made"))
            .expect_ok();
        helper
            .call(&acquire("/run/leases", "lease", AUTOCREATE))
            .expect_ok();
        host.assert_held("/run/leases/lease");
        helper.call(&release("/run/leases", "lease")).expect_ok();
        assert!(!host.path("/run/leases/lease").exists());
        helper
            .call(&acquire("", "/run/new", AUTOCREATE))
            .expect_ok();
        helper.call(&release("", "/run/new")).expect_ok();
        assert!(!host.path("/run/new").exists());
        // A call in two pieces, and many at once.
        let call = acquire("", taken, 0).frame(7777);
        helper.send(&call[..11]);
        look_up_server(&mut daemon.admin_client(), 5);
        helper.send(&call[11..]);
        Reply::parse(&helper.receive()).expect_ok();
        let many: Vec<_> = (0..6)
            .flat_map(|_| [release("", taken), acquire("", taken, 0)])
            .collect();
        helper.pipeline(&many).iter().for_each(Reply::expect_ok);
        helper.call(&release("", taken)).expect_ok();
        helper.ping();
        helper.call(&restrict()).expect_ok();
        assert!(!helper.call(&acquire("", taken, 0)).is_ok());
        // An owner dies, and another one leaves and is fenced.
        let mut dies = Owner::register(daemon.lock_socket(), "dies", OnTerm::Die);
        dies.call(&acquire("", taken, 0)).expect_ok();
        dies.call(&acquire("", shared, SHARED)).expect_ok();
        dies.kill();
        host.wait_free(taken);
        let mut leaves = Owner::register(daemon.lock_socket(), "leaves", OnTerm::Die);
        leaves.call(&acquire("", taken, 0)).expect_ok();
        leaves.close_connection();
        leaves.wait_end();
        host.wait_free(taken);
        // Everything is as it was.
        let mut other = helper_client(daemon, "other", pid);
        assert!(!other.call(&acquire("", "/run/held", 0)).is_ok());
        other.call(&acquire("", taken, 0)).expect_ok();
        other.call(&release("", taken)).expect_ok();
    }

    fn end(mut self) {
        self.rival.never_succeeded();
        assert!(self.guest.is_alive());
    }
}

/// Kills the reactor as it enters its nth system call from now on. False when it did not come to that.
fn kill_at(story: &mut Story, nth: usize) -> bool {
    let reactor = story.daemon.reactor();
    let mut strace = std::process::Command::new("strace")
        .args(["-q", "-o", "/dev/null", "-e"])
        .arg(format!("inject=all:signal=KILL:when={nth}"))
        .args(["-p", &reactor.to_string()])
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("start strace");
    let status = format!("/proc/{reactor}/status");
    wait_until(DEADLINE, "strace to be attached", || {
        std::fs::read_to_string(&status).is_ok_and(|it| !it.contains("TracerPid:\t0\n"))
    });
    story.go_on();
    let _ = strace.kill();
    let _ = strace.wait();
    story.daemon.reactor() != reactor
}

#[test]
fn a_reactor_that_is_killed_at_any_of_its_system_calls_answers_each_call_once_and_frees_no_lock() {
    if !require_root() || !require_strace() {
        return;
    }
    let step = every_nth();
    for nth in (1..MOST).step_by(step) {
        let mut story = Story::begin();
        let was_killed =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| kill_at(&mut story, nth)));
        let Ok(was_killed) = was_killed else {
            panic!("killed at call {nth}:\n{}", story.daemon.stderr());
        };
        story.end();
        if !was_killed {
            assert!(nth > 100, "the story took only {nth} calls");
            eprintln!("the story takes {nth} calls");
            return;
        }
    }
    panic!("the story takes more than {MOST} calls");
}

/// On a slow day only some; whoever wants them all says `VIRTLOCKD_EVERY_CALL=1`.
fn every_nth() -> usize {
    std::env::var("VIRTLOCKD_EVERY_CALL")
        .ok()
        .and_then(|step| step.parse().ok())
        .unwrap_or(1)
}

#[test]
fn one_that_is_killed_again_at_any_system_call_of_its_recovery_is_recovered_all_the_same() {
    if !require_root() {
        return;
    }
    let story = Story::begin();
    let host = &story.host;
    let pid = story.guest.pid();
    let mut helper = helper_client(&story.daemon, "guest", pid);
    let mut half = helper_client(&story.daemon, "half", pid);
    let disk = host.disk("more");
    for nth in 1..MOST {
        let call = acquire("", &disk, 0).frame(4711);
        half.send(&call[..17]);
        let guardian = Tracer::seize(story.daemon.pid(), true).expect("the guardian");
        let _ = kill(Pid::from_raw(story.daemon.reactor()), Signal::SIGKILL);
        let mut is_first = true;
        let mut was_killed = false;
        loop {
            match guardian.run() {
                Seen::Child(pid) => {
                    let child = Tracer::child(pid).expect("the new reactor");
                    if !std::mem::take(&mut is_first) {
                        child.release();
                        break;
                    }
                    let mut calls = 0;
                    while calls < nth && child.to_next_call() == Seen::Stopped {
                        match child.call() {
                            Some((EPOLL_WAIT, _)) => break,
                            Some((_, result)) if result == -i64::from(libc::ENOSYS) => calls += 1,
                            _ => (),
                        }
                    }
                    was_killed = calls == nth;
                    if !was_killed {
                        child.release();
                        break;
                    }
                    child.kill();
                }
                Seen::Stopped => (),
                Seen::Gone => panic!("the guardian is gone"),
            }
        }
        guardian.release();
        half.send(&call[17..]);
        Reply::parse(&half.receive()).expect_ok();
        half.call(&release("", &disk)).expect_ok();
        helper.call(&acquire("", "/run/taken", 0)).expect_ok();
        helper.call(&release("", "/run/taken")).expect_ok();
        if !was_killed {
            eprintln!("the recovery takes {nth} calls");
            assert!(nth > 20);
            return story.end();
        }
    }
    panic!("the recovery takes more than {MOST} calls");
}

const EPOLL_WAIT: u64 = libc::SYS_epoll_wait as u64;
const RECVMMSG: u64 = libc::SYS_recvmmsg as u64;

/// How many instructions of a turn are looked at.
const INSTRUCTIONS: usize = 60_000;

#[test]
fn one_that_is_killed_at_any_instruction_of_a_turn_answers_each_call_once() {
    if !require_root() {
        return;
    }
    let rounds: usize = std::env::var("VIRTLOCKD_INSTRUCTIONS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(40);
    let mut random =
        support::random::Random::new(support::random::Random::seed_from("VIRTLOCKD_SEED"));
    let story = Story::begin();
    let pid = story.guest.pid();
    let stop = Arc::new(AtomicBool::new(false));
    let calls = Arc::new(AtomicU64::new(0));
    let disk = story.host.disk("busy");
    let client = std::thread::spawn({
        let mut client = helper_client(&story.daemon, "guest", pid);
        let (stop, calls) = (stop.clone(), calls.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                client.call(&acquire("", &disk, 0)).expect_ok();
                client.call(&release("", &disk)).expect_ok();
                calls.fetch_add(2, Ordering::Relaxed);
            }
        }
    });
    let mut inside = 0usize;
    let mut longest = 1000;
    for _ in 0..rounds {
        let before = calls.load(Ordering::Relaxed);
        let reactor = Tracer::seize(story.daemon.reactor(), false).expect("the reactor");
        loop {
            assert_eq!(reactor.to_next_call(), Seen::Stopped);
            if matches!(reactor.call(), Some((RECVMMSG, 1..))) {
                break;
            }
        }
        let steps = random.below(longest);
        let mut is_inside = true;
        for step in 0..steps {
            if reactor.next_call() == Some(EPOLL_WAIT) {
                is_inside = false;
                break;
            }
            longest = longest.max(step + step / 8).min(INSTRUCTIONS);
            assert_eq!(reactor.step(), Seen::Stopped);
        }
        inside += usize::from(is_inside);
        reactor.kill();
        wait_until(DEADLINE, "calls to be answered again", || {
            calls.load(Ordering::Relaxed) > before + 2
        });
    }
    stop.store(true, Ordering::Relaxed);
    client.join().expect("every answer was right");
    eprintln!("{rounds} kills, {inside} of them inside a turn");
    assert!(inside > rounds / 3);
    story.end();
}
