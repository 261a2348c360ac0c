//! Several domains of one process, as Xen's, which are all libvirtd's own: one does not give back what
//! another holds, and the process does not die with one of them. Nothing is free while it lives.

use crate::support;
use crate::support::client::{Call, INTERNAL_ERROR, SHARED, acquire, release};
use crate::support::daemon::{self, Daemon};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{Host, Rival, upgrade};
use crate::support::{DEADLINE, lock_probe, require_root, skip, wait_until};
use std::path::Path;

const LEFT_ALONE: &str = "stands for other domains";

/// REGISTER of the domain with this number of a process.
fn register(number: u8, pid: i32) -> Call {
    Call::Register {
        uuid: [number; 16],
        name: format!("domain-{number}").into(),
        id: u32::from(number),
        pid: pid as u32,
        flags: 0,
    }
}

/// A process with three connections, a domain each. The domains 1 and 2 hold a disk of their number,
/// both hold the shared one, and the third one nothing.
struct Scene {
    host: Host,
    daemon: Daemon,
    process: Owner,
    disks: [String; 2],
    shared: String,
}

impl Scene {
    /// With a daemon of this program; `None`, with a skip, where there can be none.
    fn of(program: &Path) -> Option<Scene> {
        if !require_root() {
            return None;
        }
        let host = Host::with(program);
        let daemon = host.start(&[], &[]);
        let mut process = Owner::connect(daemon.lock_socket(), OnTerm::Die);
        let pid = process.pid();
        let disks = ["disk-1", "disk-2"].map(|name| host.disk(name));
        let shared = host.disk("shared");
        for number in 1..=3 {
            if number > 1 {
                process.connect_again();
            }
            process.call(&register(number, pid)).expect_ok();
        }
        let mut scene = Scene {
            host,
            daemon,
            process,
            disks,
            shared,
        };
        for number in 1..=2 {
            let (disk, shared) = (scene.disk(number), scene.shared.clone());
            scene.calls(number, &acquire("", &disk, 0)).expect_ok();
            scene
                .calls(number, &acquire("", &shared, SHARED))
                .expect_ok();
        }
        Some(scene)
    }

    fn new() -> Option<Scene> {
        if daemon::c_daemon().is_some_and(|theirs| theirs == daemon::program()) {
            skip("libvirt's own daemon does not tell the domains of a process apart");
            return None;
        }
        Scene::of(&daemon::program())
    }

    fn disk(&self, number: u8) -> String {
        self.disks[usize::from(number) - 1].clone()
    }

    /// A call over the connection of a domain.
    #[track_caller]
    fn calls(&mut self, number: u8, call: &Call) -> support::client::Reply {
        self.process.use_connection(usize::from(number) - 1);
        self.process.call(call)
    }

    fn close(&mut self, number: u8) {
        self.process.use_connection(usize::from(number) - 1);
        self.process.close_connection();
    }

    /// What the other domain holds is not given back.
    #[track_caller]
    fn assert_told_apart(&mut self) {
        for (number, other) in [(1, 2), (2, 1)] {
            let disk = self.disk(other);
            let refused = self.calls(number, &release("", &disk));
            let pid = self.process.pid();
            let text = format!("internal error: owner {pid} does not hold the resource lock");
            assert_eq!(refused.error().code, INTERNAL_ERROR);
            assert_eq!(refused.error().message, text);
            self.host.assert_held(&disk);
        }
    }

    fn logged(&self, words: &[&str]) -> usize {
        let log = self.daemon.stderr();
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        log.lines().filter(has_all).count()
    }
}

#[test]
fn one_domain_of_a_process_does_not_give_back_what_another_one_holds() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.assert_told_apart();
    upgrade(&scene.daemon);
    scene.assert_told_apart();
    // Of what both have, each gives back its own, and only that.
    let shared = scene.shared.clone();
    let third = scene.calls(3, &release("", &shared));
    assert_eq!(third.error().code, INTERNAL_ERROR);
    scene.calls(2, &release("", &shared)).expect_ok();
    let again = scene.calls(2, &release("", &shared));
    assert_eq!(again.error().code, INTERNAL_ERROR);
    assert!(lock_probe(&scene.host.path(&shared)).is_some());
    upgrade(&scene.daemon);
    scene.calls(1, &release("", &shared)).expect_ok();
    scene.host.assert_free(&shared);
}

#[test]
fn a_process_outlives_the_connection_of_one_of_its_domains_and_is_fenced_with_the_last() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disks = [1, 2].map(|number| scene.host.path(scene.disk(number)));
    let rival = Rival::of(disks.to_vec());
    scene.close(2);
    wait_until(DEADLINE, "a warning with the domain's name", || {
        let uuid = "uuid 02020202-0202-0202-0202-020202020202";
        scene.logged(&["Domain 'domain-2'", uuid, LEFT_ALONE]) == 1
    });
    upgrade(&scene.daemon);
    // One that holds nothing leaves without a word.
    scene.close(3);
    let shared = scene.shared.clone();
    scene.calls(1, &release("", &shared)).expect_ok();
    assert!(scene.process.is_alive());
    assert!(disks.iter().all(|disk| lock_probe(disk).is_some()));
    assert_eq!(scene.logged(&[LEFT_ALONE]), 1);
    // The domain comes back for what it left.
    scene.process.connect_again();
    let pid = scene.process.pid();
    scene.process.call(&register(2, pid)).expect_ok();
    scene.process.call(&release("", &shared)).expect_ok();
    scene.host.assert_free(&shared);
    scene.process.close_connection();
    wait_until(DEADLINE, "a second warning", || {
        scene.logged(&[LEFT_ALONE]) == 2
    });
    assert!(scene.process.is_alive());
    rival.never_succeeded();

    scene.close(1);
    assert_eq!(scene.process.wait_signal(), Some(libc::SIGTERM));
    wait_until(DEADLINE, "the locks to be free", || {
        disks.iter().all(|disk| lock_probe(disk).is_none())
    });
    let fenced = format!("Process {pid} of domain 'domain-1'");
    assert_eq!(
        scene.logged(&[&fenced, "domain 'domain-2'", "it is sent SIGTERM"]),
        1
    );
}

#[test]
fn a_process_outlives_a_domain_that_has_given_all_back_and_its_death_still_frees_the_others() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (pid, shared, lent) = (
        scene.process.pid(),
        scene.shared.clone(),
        scene.host.disk("lent"),
    );
    // One whose connection is somebody else's, and one that left and may come back.
    let mut helper = scene.daemon.client();
    helper.call(&register(4, pid)).expect_ok();
    helper.call(&acquire("", &lent, 0)).expect_ok();
    drop(helper);
    scene.close(2);
    wait_until(DEADLINE, "a warning", || scene.logged(&[LEFT_ALONE]) == 1);
    let (own, kept) = (scene.disk(1), scene.disk(2));
    scene.calls(1, &release("", &own)).expect_ok();
    scene.calls(1, &release("", &shared)).expect_ok();
    scene.close(3);
    scene.close(1);
    scene.daemon.client().ping();
    scene.daemon.wait_until_asleep();
    assert_eq!(scene.logged(&["it is sent SIGTERM"]), 0);
    upgrade(&scene.daemon);
    assert!(scene.process.is_alive());
    for disk in [&lent, &kept] {
        scene.host.assert_held(disk);
    }
    // Its death is the end of all of them.
    scene.process.kill();
    scene.process.wait_end();
    for disk in [&lent, &kept, &shared] {
        scene.host.wait_free(disk);
    }
}

#[test]
fn a_process_that_dies_with_all_its_domains_is_not_left_alone() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.process.kill();
    scene.process.wait_end();
    for disk in scene.disks.iter().chain([&scene.shared]) {
        scene.host.wait_free(disk);
    }
    assert_eq!(scene.logged(&[LEFT_ALONE]), 0);
}

#[test]
fn the_daemons_end_fences_a_process_with_several_domains_at_once() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    assert!(scene.daemon.stop().success());
    assert_eq!(scene.process.wait_signal(), Some(libc::SIGTERM));
    assert_eq!(scene.logged(&[LEFT_ALONE]), 0);
    assert_eq!(scene.logged(&["it is sent SIGTERM"]), 1);
}

#[test]
fn what_libvirts_daemon_granted_any_domain_of_the_process_gives_back_and_it_goes_with_the_process()
{
    let Some(theirs) = daemon::c_daemon() else {
        skip("needs libvirt's virtlockd");
        return;
    };
    let Some(mut scene) = Scene::of(&theirs) else {
        return;
    };
    let (one, two, shared) = (scene.disk(1), scene.disk(2), scene.shared.clone());
    let rival = Rival::of([&two, &shared].map(|disk| scene.host.path(disk)).into());
    scene.host.install(&daemon::program());
    upgrade(&scene.daemon);
    // What is taken here is known whose it is, beside what is not.
    let own = scene.host.disk("own");
    scene.calls(3, &acquire("", &own, 0)).expect_ok();
    let refused = scene.calls(2, &release("", &own));
    assert_eq!(refused.error().code, INTERNAL_ERROR);
    let refused = scene.calls(3, &acquire("", &one, 0));
    let by = format!("by a domain of process {}, exclusive", scene.process.pid());
    assert!(refused.error().message.ends_with(&by), "{refused:?}");
    scene.calls(2, &release("", &one)).expect_ok();
    scene.host.assert_free(&one);
    // And back, where owners are processes again.
    scene.host.install(&theirs);
    upgrade(&scene.daemon);
    scene.calls(2, &release("", &own)).expect_ok();
    scene.host.wait_free(&own);
    scene.host.install(&daemon::program());
    upgrade(&scene.daemon);
    scene.close(2);
    wait_until(DEADLINE, "a warning about the process", || {
        scene.logged(&["A domain of process", LEFT_ALONE]) == 1
    });
    assert!(scene.process.is_alive());
    scene.host.assert_held(&two);
    rival.never_succeeded();
    scene.process.kill();
    scene.process.wait_end();
    scene.host.wait_free(&two);
    scene.host.wait_free(&shared);
}
