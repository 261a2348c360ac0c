//! The daemon's processes are killed at any system call of a stop that keeps everything and of the start that goes
//! on from it, or told to end anywhere in an upgrade: whoever is left keeps everything. Nobody is fenced for it.
//!
//! Of all places a sample is tried, as in `killed_anywhere`.

use std::path::PathBuf;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::killed_anywhere::{at_each, at_nth, step};
use super::{DISK, Scene, look};
use crate::support::client::{acquire, release};
use crate::support::company::{Act, Company, Counts, Role};
use crate::support::daemon::{kill_all, program, reactor_of};
use crate::support::owner::runs;
use crate::support::upgrade::upgrade;
use crate::support::{DEADLINE, require_root, wait_until};

impl Scene {
    /// The daemon's processes that can still do something.
    fn processes(&self) -> Vec<i32> {
        let own = namespace(self.manager.host.namespace.holder());
        let numbers = std::fs::read_dir("/proc").expect("list processes");
        let numbers = numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let is_daemon = |pid: &i32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.trim() == "virtlockd") && namespace(*pid) == own
        };
        numbers.filter(|pid| is_daemon(pid) && runs(*pid)).collect()
    }

    /// The process that is the daemon now.
    pub(super) fn main(&self) -> i32 {
        let text = std::fs::read_to_string(self.manager.host.path("/run/virtlockd.pid"));
        let number = text.ok().and_then(|text| text.trim().parse().ok());
        number.unwrap_or(self.daemon.pid())
    }

    /// Stops the daemon while it is looked at: who asks how it ended would be told of each stop of its processes.
    #[track_caller]
    fn stop_watched(&mut self) {
        self.daemon.signal(Signal::SIGTERM);
        self.await_end();
        assert!(self.is_kept(), "{}", self.daemon.stderr());
    }

    /// The daemon was told to end, and does. Whoever took the place of one that was killed may not have heard it: it
    /// is told, too, as systemd tells every process.
    #[track_caller]
    pub(super) fn await_end(&mut self) {
        let first = self.daemon.pid();
        wait_until(DEADLINE, "the end of all the daemon's processes", || {
            let left = self.processes();
            let main = self.main();
            if main != first && left.contains(&main) {
                let _ = kill(Pid::from_raw(main), Signal::SIGTERM);
            }
            left.is_empty()
        });
    }

    /// Whether everything is in the bag.
    pub(super) fn is_kept(&self) -> bool {
        self.manager.settle();
        self.manager.all().iter().any(|bag| !look(bag).is_empty())
    }

    /// What is written down from here on is what a start behind the death of all believes.
    #[track_caller]
    fn believes_its_ledger(&mut self) {
        self.serves();
        let other = self.manager.host.disk("other");
        self.guest.call(&release("", DISK)).expect_ok();
        self.guest.call(&acquire("", &other, 0)).expect_ok();
        kill_all(self.main());
        self.daemon.kill();
        self.start();
        assert!(!self.is_held(DISK), "{}", self.daemon.stderr());
        assert!(self.is_held(&other), "{}", self.daemon.stderr());
        assert!(self.guest.is_alive());
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // The daemon that was started may have another process in its place.
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn namespace(pid: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()
}

/// How many calls each role makes in a part of a scene.
fn count(begin: impl Fn() -> Option<Scene>, part: impl Fn(&mut Scene)) -> Option<Counts> {
    let mut scene = begin()?;
    let company = Company::of(scene.daemon.pid(), |_| Act::GoOn);
    part(&mut scene);
    Some(company.leave().counts)
}

/// A daemon that has replaced itself: its ledger tells of more than its own life.
fn upgraded() -> Option<Scene> {
    let scene = Scene::new()?;
    upgrade(&scene.daemon);
    scene.manager_has_one_bag();
    scene.daemon.wait_until_asleep();
    Some(scene)
}

fn killed_in_a_stop(role: Role, otherwise: usize) {
    let Some(counts) = count(upgraded, Scene::stop_watched) else {
        return;
    };
    let what = format!("{role:?} killed in a stop that keeps");
    at_each(&what, counts[&role], step(otherwise), |nth| {
        let Some(mut scene) = upgraded() else {
            return;
        };
        let rival = scene.rival();
        let company = Company::of(scene.daemon.pid(), at_nth(role, nth));
        scene.daemon.signal(Signal::SIGTERM);
        scene.await_end();
        let seen = company.leave();
        assert!(scene.is_kept() && scene.is_held(DISK), "{:?}", seen.last);
        scene.start();
        rival.never_succeeded();
        scene.serves();
    });
}

#[test]
fn a_reactor_that_is_killed_anywhere_in_a_stop_is_followed_by_one_that_keeps_everything() {
    killed_in_a_stop(Role::Reactor, 2);
}

#[test]
fn a_guardian_that_is_killed_in_a_stop_is_not_missed() {
    killed_in_a_stop(Role::Guardian, 1);
}

/// A start from a bag, during which whoever makes the nth call in this role is killed. How many calls there were.
fn disturbed_start(role: Role, nth: usize) -> usize {
    let Some(mut scene) = Scene::new() else {
        return 0;
    };
    let rival = scene.rival();
    scene.stop();
    let serving = scene.manager.heard("READY=1");
    scene.daemon = scene.manager.spawn(&[]);
    let company = Company::of(scene.daemon.pid(), at_nth(role, nth));
    // One that is killed before it has promised anything to anybody is the end of this start.
    let is_over = || !runs(scene.daemon.pid()) && scene.processes().is_empty();
    wait_until(DEADLINE, "the daemon to serve, or to be over", || {
        scene.manager.heard("READY=1") > serving || is_over()
    });
    let is_over = is_over();
    let seen = company.leave();
    if is_over {
        let _ = scene.daemon.ended();
        assert!(scene.is_kept() && scene.is_held(DISK), "{:?}", seen.last);
        scene.start();
    }
    rival.never_succeeded();
    scene.believes_its_ledger();
    seen.counts.get(&role).copied().unwrap_or(0)
}

fn killed_in_a_start(role: Role, otherwise: usize) {
    if !require_root() {
        return;
    }
    let places = disturbed_start(role, usize::MAX);
    let what = format!("{role:?} killed in a start that goes on");
    at_each(&what, places, step(otherwise), |nth| {
        disturbed_start(role, nth);
    });
}

#[test]
fn a_reactor_that_is_killed_anywhere_in_a_start_is_followed_by_one_that_goes_on_or_the_next_start_is()
 {
    killed_in_a_start(Role::Reactor, 14);
}

#[test]
fn a_guardian_that_is_killed_anywhere_in_a_start_leaves_everything_to_its_reactor_or_the_next_start()
 {
    killed_in_a_start(Role::Guardian, 1);
}

/// The daemon is told to replace itself, and at somebody's nth call to end.
fn ended_in_an_upgrade(role: Role, otherwise: usize) {
    let Some(counts) = count(Scene::new, |scene| upgrade(&scene.daemon)) else {
        return;
    };
    let places = counts.get(&role).copied().unwrap_or(0);
    let what = format!("an end at a call of the {role:?} in an upgrade");
    at_each(&what, places, step(otherwise), |nth| {
        let Some(mut scene) = Scene::new() else {
            return;
        };
        let rival = scene.rival();
        let company = Company::of(scene.daemon.pid(), move |at| {
            match at.role == role && at.nth == nth {
                true => Act::TellAndLeave(Signal::SIGTERM),
                false => Act::GoOn,
            }
        });
        scene.daemon.signal(Signal::SIGUSR1);
        scene.await_end_or_tell();
        company.leave();
        assert!(scene.is_kept(), "{}", scene.daemon.stderr());
        assert!(scene.is_held(DISK));
        scene.start();
        rival.never_succeeded();
        scene.serves();
    });
}

impl Scene {
    /// As [`Scene::await_end`], where the place at which the daemon is to be told may not come.
    #[track_caller]
    fn await_end_or_tell(&mut self) {
        let begun = Instant::now();
        wait_until(
            DEADLINE,
            "the daemon to be told to end, or to be over",
            || self.processes().is_empty() || begun.elapsed().as_secs() >= 2,
        );
        if !self.processes().is_empty() {
            let _ = kill(Pid::from_raw(self.main()), Signal::SIGTERM);
        }
        self.await_end();
    }
}

#[test]
fn an_end_that_is_asked_for_anywhere_in_an_upgrade_keeps_everything() {
    ended_in_an_upgrade(Role::Reactor, 20);
    ended_in_an_upgrade(Role::Guardian, 2);
    ended_in_an_upgrade(Role::Understudy, 3);
}

#[test]
fn a_stop_behind_a_successor_that_did_not_serve_keeps_everything() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    for _ in 0..2 {
        let (before, host) = (scene.main(), &scene.manager.host);
        host.install_script(
            "if [ \"$1\" = --version ]; then echo 'x (virtlockd-rs) 0.0.1'; \
             echo 'ledger readable: 1 connections, 1 locks; its understudy is dismissed'; exit 0; fi; exit 1",
        );
        let _ = kill(Pid::from_raw(before), Signal::SIGUSR1);
        wait_until(DEADLINE, "the understudy to be the daemon", || {
            let now = scene.main();
            now != before && reactor_of(now) != now
        });
        host.install(&program());
    }
    scene.manager_has_one_bag();
    let _ = kill(Pid::from_raw(scene.main()), Signal::SIGTERM);
    scene.await_end();
    assert!(scene.is_kept() && scene.is_held(DISK));
    let _ = scene.daemon.ended();
    scene.start();
    rival.never_succeeded();
    scene.serves();
}
