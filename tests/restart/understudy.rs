//! A successor that was executed and does not serve: a copy of the daemon that was made before the exec goes
//! on, with everything, in a process of another number.

use crate::support::client::{acquire, register_as, release};
use crate::support::daemon::{self, Daemon, Main, c_daemon, reactor_of};
use crate::support::owner::Owner;
use crate::support::upgrade::{
    Disturbed, Host, REFUSAL, Rival, image, refused_upgrade, upgrade, wait_for_successor,
};
use crate::support::{DEADLINE, require_root, require_strace, skip, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const SAYS_OURS: &str = "echo 'x (virtlockd-rs) 0.0.1'; \
                         echo 'ledger readable: 1 connections, 1 locks; its understudy is dismissed'";
const SAYS_EARLIER: &str = "echo 'x (virtlockd-rs) 0.0.1'; echo 'ledger readable'";
const SAYS_THEIRS: &str = "echo 'x (libvirt) 11.3.0'";

/// Longer than a successor may take to serve.
const LONG: Duration = Duration::from_secs(60);

/// A daemon whose guest has a disk. Its number changes.
struct Scene {
    host: Host,
    daemon: Daemon,
    pid: i32,
    main: Main,
    guest: Owner,
    disk: String,
}

impl Scene {
    fn new() -> Option<Scene> {
        require_root().then(|| Scene::of(&daemon::program()))
    }

    fn of(program: &Path) -> Scene {
        let host = Host::with(program);
        let daemon = host.start(&[], &[]);
        let disk = host.disk("disk");
        let guest = host.guest(&daemon, "guest", &disk);
        let pid = daemon.pid();
        let main = Main::of(pid).expect("the daemon runs");
        Scene {
            host,
            daemon,
            pid,
            main,
            guest,
            disk,
        }
    }

    /// Puts a script in the daemon's place that answers for the trial run with `says` and else does `does`.
    fn installs(&self, says: &str, does: &str) {
        let text = format!("if [ \"$1\" = --version ]; then {says}; exit 0; fi; {does}");
        self.host.install_script(&text);
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal).expect("signal the daemon");
    }

    /// Asks for the upgrade and waits until the daemon has another number and said why.
    #[track_caller]
    fn falls_back(&mut self, limit: Duration, why: &str) {
        let (before, refusals) = (self.pid, self.refusals().len());
        self.send(Signal::SIGUSR1);
        self.pid = wait_for(limit, "another process to be the daemon", || {
            let text = std::fs::read_to_string(self.host.path("/run/virtlockd.pid")).ok()?;
            let pid: i32 = text.trim().parse().ok()?;
            (pid != before && reactor_of(pid) != pid).then_some(pid)
        });
        self.main = Main::of(self.pid).expect("it runs");
        wait_until(DEADLINE, "the failure to be told", || {
            self.refusals().len() > refusals
        });
        let last = self.refusals().pop().unwrap_or_default();
        assert!(last.contains(why), "{last}");
        // A cold start believes what has the name.
        self.host.assert_keeps_ledger(self.pid);
        assert!(!self.host.path("/run/virtlockd-restart-exec.json").exists());
        // Should all be killed now, the next start finds what this one writes.
        let log = self.daemon.stderr();
        assert!(!log.contains("a ledger that has no name"), "{log}");
    }

    fn refusals(&self) -> Vec<String> {
        let log = self.daemon.stderr();
        let lines = log.lines().filter(|line| line.contains(REFUSAL));
        lines.map(str::to_owned).collect()
    }

    /// The guest's connection is answered, and another client's, too.
    #[track_caller]
    fn serves(&mut self) {
        self.host.assert_held(&self.disk);
        let spare = self.host.disk("spare");
        self.guest.call(&acquire("", &spare, 0)).expect_ok();
        self.host.assert_held(&spare);
        self.guest.call(&release("", &spare)).expect_ok();
        let mut new = self.daemon.client();
        new.call(&register_as("new", 4242)).expect_ok();
        assert!(!new.call(&acquire("", &self.disk, 0)).is_ok());
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.main.kill_all();
    }
}

/// What libvirt's daemon goes on from.
const DOCUMENT: &str = "/run/virtlockd-restart-exec.json";

#[test]
fn a_successor_that_dies_in_its_first_line_costs_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    for says in [SAYS_OURS, SAYS_EARLIER, SAYS_THEIRS] {
        for does in [
            "exit 3",
            "kill -9 $$",
            "exec /lib64/ld-linux-x86-64.so.2 /dev/null",
        ] {
            scene.installs(says, does);
            scene.falls_back(DEADLINE, "ended before it served");
            scene.serves();
        }
    }
    rival.never_succeeded();
    // What is the daemon now does all that the first one did.
    scene.host.install(&daemon::program());
    let before = image(scene.pid);
    scene.send(Signal::SIGUSR1);
    wait_for_successor(scene.pid, &before);
    scene.serves();
    let reactor = reactor_of(scene.pid);
    kill(Pid::from_raw(reactor), Signal::SIGKILL).expect("kill the process that serves");
    scene.serves();
}

#[test]
fn a_successor_that_hangs_is_killed_and_costs_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    scene.installs(SAYS_OURS, "exec sleep 1000");
    let first = scene.pid;
    scene.falls_back(LONG, "did not serve in time");
    scene.serves();
    rival.never_succeeded();
    assert_ne!(scene.pid, first);
}

#[test]
fn a_successor_that_cannot_use_the_ledger_after_all_costs_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    let program = daemon::program();
    // It gets a number that is no ledger's, and is the daemon's own program.
    let does = format!("export VIRTLOCKD_HANDOVER=1:$$; exec {}", program.display());
    scene.installs(SAYS_OURS, &does);
    scene.falls_back(DEADLINE, "ended before it served");
    scene.serves();
    rival.never_succeeded();
}

#[test]
fn what_an_understudy_goes_on_from_is_what_a_start_finds_when_all_are_dead() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let given_back = scene.host.disk("back");
    scene.guest.call(&acquire("", &given_back, 0)).expect_ok();
    scene.installs(SAYS_OURS, "exit 3");
    scene.falls_back(DEADLINE, "ended before it served");
    scene.guest.call(&release("", &given_back)).expect_ok();
    crate::support::daemon::kill_all(scene.pid);
    scene.host.install(&daemon::program());
    wait_until(DEADLINE, "the death of all", || {
        UnixStream::connect(scene.daemon.lock_socket()).is_err()
    });
    scene.daemon = scene.host.start(&[], &[]);
    scene.pid = scene.daemon.pid();
    scene.host.assert_held(&scene.disk);
    scene.host.assert_free(&given_back);
}

#[test]
fn an_understudy_is_gone_when_its_successor_serves() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    for _ in 0..3 {
        upgrade(&scene.daemon);
        scene.serves();
        let children = format!("/proc/{0}/task/{0}/children", scene.pid);
        wait_until(DEADLINE, "one child, the process that serves", || {
            let children = std::fs::read_to_string(&children).expect("the daemon's children");
            children.split_whitespace().count() == 1
        });
    }
}

#[test]
fn locks_that_libvirts_daemon_took_outlive_a_successor_that_dies() {
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
    for says in [SAYS_THEIRS, SAYS_OURS] {
        scene.installs(says, "exit 1");
        scene.falls_back(DEADLINE, "ended before it served");
        scene.serves();
    }
    // And back to libvirt's daemon, which serves: the understudy sees it and is gone.
    scene.daemon.wait_until_asleep();
    let before = image(scene.pid);
    scene.host.install(&c_daemon);
    scene.send(Signal::SIGUSR1);
    wait_for_successor(scene.pid, &before);
    scene.host.assert_held(&scene.disk);
    assert!(!scene.guest.call(&acquire("", &scene.disk, 0)).is_ok());
    std::thread::sleep(Duration::from_millis(100));
    scene.host.assert_held(&scene.disk);
}

#[test]
fn an_upgrade_waits_for_somebody_who_could_go_on_unless_the_host_refuses_that_for_ever() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    let told = |scene: &Scene| {
        let log = scene.daemon.stderr();
        log.matches("the host refuses a copy of this daemon")
            .count()
    };
    for error in ["EAGAIN", "ENOMEM"] {
        let disturbed = Disturbed::with(&scene.daemon, "clone", &format!("error={error}:when=1"));
        let reason = refused_upgrade(&scene.daemon);
        assert!(reason.contains("nobody could go on"), "{reason}");
        drop(disturbed);
        scene.serves();
    }
    assert_eq!(told(&scene), 0);
    for (count, error) in (1..).zip(["EPERM", "ENOSYS"]) {
        let disturbed = Disturbed::with(&scene.daemon, "clone", &format!("error={error}:when=1"));
        upgrade(&scene.daemon);
        drop(disturbed);
        assert_eq!(told(&scene), count);
        scene.serves();
    }
    rival.never_succeeded();
    // Where it can be had again, it is.
    upgrade(&scene.daemon);
    scene.serves();
    assert_eq!((told(&scene), scene.refusals().len()), (2, 2));
    // What was refused is not tried again without being asked for, but for those that go without an understudy.
    let log = scene.daemon.stderr();
    let tries = log.matches("hands over to its successor").count();
    assert_eq!(tries, 2 + 2 * 2 + 1, "{log}");
}

#[test]
fn libvirts_daemon_that_reads_its_document_and_cannot_use_it_costs_nothing() {
    if !require_root() {
        return;
    }
    let Some(c_daemon) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    let does = format!(
        "text=$(sed 's/\"magic\"/\"magik\"/' {DOCUMENT}); echo \"$text\" >{DOCUMENT}; exec {}",
        c_daemon.display()
    );
    scene.installs(SAYS_THEIRS, &does);
    scene.falls_back(DEADLINE, "ended before it served");
    scene.serves();
    // One that removes the document and goes on for a while.
    let does = "rm /run/virtlockd-restart-exec.json; i=0; \
                while [ $i -lt 2000 ]; do i=$((i + 1)); done; exit 3";
    scene.installs(SAYS_THEIRS, does);
    scene.falls_back(DEADLINE, "ended before it served");
    scene.serves();
    rival.never_succeeded();
}

#[test]
fn a_pid_file_that_a_successor_removed_is_there_again() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.installs(SAYS_OURS, "rm /run/virtlockd.pid; exit 3");
    scene.falls_back(DEADLINE, "ended before it served");
    scene.serves();
    let reactor = reactor_of(scene.pid);
    kill(Pid::from_raw(reactor), Signal::SIGKILL).expect("kill the process that serves");
    scene.serves();
    scene.send(Signal::SIGTERM);
    wait_until(DEADLINE, "the pid file to be removed", || {
        !scene.host.path("/run/virtlockd.pid").exists()
    });
}
