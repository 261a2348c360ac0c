//! The process that serves dies while it is busy with nobody's call: with an accept, a deadline, an owner's end.
//! It is followed ever more slowly, and no client is blamed for it.

use crate::support::client::{Client, acquire, register_as, release};
use crate::support::daemon::{Daemon, Main};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::Host;
use crate::support::{DEADLINE, require_root, require_strace, wait_for, wait_until};
use nix::sys::signal::Signal;
use std::process::{Child, Command, Stdio};

/// Greater than any process id can be.
const NO_PROCESS: i32 = i32::MAX;

/// strace, attached to the process that serves, which dies of a system call.
struct Deadly(Child);

impl Deadly {
    fn of(process: i32, call: &str) -> Deadly {
        let strace = Command::new("strace")
            .args(["-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:signal=KILL")])
            .args(["-p", &process.to_string()])
            .stderr(Stdio::null())
            .spawn()
            .expect("start strace");
        let status = format!("/proc/{process}/status");
        wait_until(DEADLINE, "strace to be attached", || {
            let status = std::fs::read_to_string(&status).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        });
        Deadly(strace)
    }
}

impl Drop for Deadly {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Scene {
    host: Host,
    daemon: Daemon,
    guest: Owner,
    disk: String,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !require_root() || !require_strace() {
            return None;
        }
        let host = Host::new();
        let daemon = host.start(&[], &[]);
        let disk = host.disk("disk");
        let guest = host.guest(&daemon, "guest", &disk);
        daemon.wait_until_asleep();
        Some(Scene {
            host,
            daemon,
            guest,
            disk,
        })
    }

    /// The process that serves, which is another one than before.
    fn next(&self, before: i32) -> i32 {
        wait_for(DEADLINE, "another process that serves", || {
            let now = self.daemon.reactor();
            (![before, self.daemon.pid()].contains(&now)).then_some(now)
        })
    }

    /// Lets as many processes die of a call as `causes` says, each time when it was made to make it.
    fn die_of(&self, call: &str, times: usize, mut cause: impl FnMut()) {
        let mut reactor = self.next(0);
        for _ in 0..times {
            let deadly = Deadly::of(reactor, call);
            cause();
            reactor = self.next(reactor);
            drop(deadly);
        }
    }

    /// How many died in a row by the log, and nobody was blamed.
    #[track_caller]
    fn assert_nobody_is_blamed(&mut self, half: &mut Client, rest: &[u8]) {
        // What was on its way is worked on.
        half.send(rest);
        let reply = crate::support::client::Reply::parse(&half.receive());
        reply.expect_error(87, 51);
        self.guest.call(&release("", &self.disk)).expect_ok();
        self.guest.call(&acquire("", &self.disk, 0)).expect_ok();
        self.host.assert_held(&self.disk);
        let log = self.daemon.stderr();
        assert!(!log.contains("died 2 times of a message"), "{log}");
        assert_eq!(self.daemon.ended(), None);
    }

    /// A client that has sent half of a call that is refused, and the other half.
    fn half_a_call(&self) -> (Client, Vec<u8>) {
        let mut half = self.daemon.client();
        half.call(&register_as("half", NO_PROCESS)).expect_ok();
        let frame = acquire("", &self.disk, 0).frame(7);
        half.send(&frame[..20]);
        self.daemon.wait_until_asleep();
        (half, frame[20..].to_vec())
    }
}

#[test]
fn nobody_is_blamed_for_deaths_in_an_accept_and_whoever_came_is_served() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (mut half, rest) = scene.half_a_call();
    let mut came = Vec::new();
    scene.die_of("accept4", 4, || came.push(scene.daemon.client()));
    for client in &mut came {
        client.call(&register_as("came", NO_PROCESS)).expect_ok();
        client
            .call(&acquire("", &scene.disk, 0))
            .expect_error(87, 51);
    }
    scene.assert_nobody_is_blamed(&mut half, &rest);
}

#[test]
fn nobody_is_blamed_for_deaths_in_an_owner_s_end_and_the_owner_is_fenced() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (mut half, rest) = scene.half_a_call();
    let stubborn = scene.host.disk("stubborn");
    let mut owner = Owner::register(scene.daemon.lock_socket(), "stubborn", OnTerm::Ignore);
    owner.call(&acquire("", &stubborn, 0)).expect_ok();
    scene.daemon.wait_until_asleep();
    // One finds that the owner has left, another one that its time is over: both die of that.
    let mut is_first = true;
    scene.die_of("pidfd_send_signal", 2, || {
        if std::mem::take(&mut is_first) {
            owner.close_connection();
        }
    });
    scene.assert_nobody_is_blamed(&mut half, &rest);
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.host.wait_free(&stubborn);
}

#[test]
fn nobody_is_blamed_for_deaths_when_nothing_happens_and_each_is_waited_for_longer() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (mut half, rest) = scene.half_a_call();
    let mut reactor = scene.next(0);
    for _ in 0..5 {
        Main::of(reactor)
            .expect("it serves")
            .signal(Signal::SIGKILL);
        reactor = scene.next(reactor);
    }
    scene.assert_nobody_is_blamed(&mut half, &rest);
    let log = scene.daemon.stderr();
    let counts = log.split(" in a row)").filter_map(|it| it.rsplit_once('('));
    let counts: Vec<u32> = counts.filter_map(|(_, count)| count.parse().ok()).collect();
    // Who is killed at once does not get to say it.
    assert!(counts.last().is_some_and(|count| *count >= 2), "{log}");
}
