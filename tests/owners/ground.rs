//! What is said of the mounts and directories that locks are on: once, when they are used first.

use crate::support::client::{AUTOCREATE, Client, acquire, create_lockspace, register_as};
use crate::support::daemon::Daemon;
use crate::support::fuse::{Habits, Share};
use crate::support::namespace::Namespace;
use crate::support::require_root;

/// The daemon, and a client with an owner.
struct Scene {
    daemon: Daemon,
    client: Client,
    namespace: Namespace,
}

const SPACE: &str = "/run/space";

impl Scene {
    fn in_namespace(namespace: Namespace) -> Scene {
        let daemon = Daemon::start(&namespace, &[], &[]);
        let mut client = daemon.client();
        client.call(&register_as("guest", 4242)).expect_ok();
        Scene {
            daemon,
            client,
            namespace,
        }
    }

    fn lock(&mut self, lockspace: &str, name: &str, flags: u32) {
        self.client
            .call(&acquire(lockspace, name, flags))
            .expect_ok();
    }

    /// The lines of the log in which these words are, one after the other on each.
    fn told(&self, words: &[&str]) -> usize {
        let log = self.daemon.stderr();
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        log.lines().filter(has_all).count()
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let ran = self.namespace.command(program).args(arguments).status();
        assert!(
            ran.expect("run a program").success(),
            "{program} {arguments:?}"
        );
    }
}

#[test]
fn a_share_whose_server_is_not_asked_for_locks_is_named_once_and_no_other() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let Some(lockless) = Share::mount_lockless(&namespace, "lockless") else {
        return;
    };
    let Some(good) = Share::mount(&namespace, "good", Habits::tenacious()) else {
        return;
    };
    let Some(lockspace) = Share::mount_lockless(&namespace, "leases") else {
        return;
    };
    let mut scene = Scene::in_namespace(namespace);
    std::fs::write(scene.namespace.path("/run/disk"), "").expect("a disk");
    scene.lock("", "/run/disk", 0);
    for name in ["x", "y"] {
        lockless.put(name);
        good.put(name);
        scene.lock("", &good.path(name), 0);
        scene.lock("", &lockless.path(name), 0);
        scene
            .client
            .call(&create_lockspace(lockspace.directory()))
            .expect_ok();
        scene.lock(lockspace.directory(), name, AUTOCREATE);
    }
    let told = "locks there keep no other host away";
    assert_eq!(
        scene.told(&[told, "/run/lockless (fuse, "]),
        1,
        "{}",
        scene.daemon.stderr()
    );
    assert_eq!(
        scene.told(&[told, "/run/leases (fuse, ", "Start its server with locks"]),
        1
    );
    assert_eq!(scene.told(&[told]), 2, "{}", scene.daemon.stderr());
}

#[test]
fn a_lockspace_whose_directory_was_missing_is_named_and_one_that_is_there_is_not() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::in_namespace(Namespace::new());
    std::fs::create_dir(scene.namespace.path("/run/there")).expect("a directory");
    for directory in ["/run/there", SPACE, "/run/there", SPACE] {
        scene.client.call(&create_lockspace(directory)).expect_ok();
    }
    let told = "was missing and has been made, on /run (tmpfs, tmpfs)";
    assert_eq!(scene.told(&[told, SPACE]), 1, "{}", scene.daemon.stderr());
    assert_eq!(scene.told(&["was missing"]), 1);
}

#[test]
fn a_lockspace_whose_directory_is_another_one_while_leases_are_held_is_named() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::in_namespace(Namespace::new());
    std::fs::create_dir(scene.namespace.path(SPACE)).expect("a directory");
    scene.client.call(&create_lockspace(SPACE)).expect_ok();
    let told = ["The directory of the lockspace /run/space is another one"];
    // Nobody has anything in it.
    scene.run("mount", &["-t", "tmpfs", "tmpfs", SPACE]);
    scene.lock(SPACE, "first", AUTOCREATE);
    scene.lock(SPACE, "second", AUTOCREATE);
    assert_eq!(scene.told(&told), 0, "{}", scene.daemon.stderr());
    // Its file system is not mounted any more.
    scene.run("umount", &["-l", SPACE]);
    scene.lock(SPACE, "third", AUTOCREATE);
    let lost = [
        told[0],
        "on /run (tmpfs, tmpfs)",
        "held in the one before: 2.",
    ];
    assert_eq!(scene.told(&lost), 1, "{}", scene.daemon.stderr());
    scene.lock(SPACE, "fourth", AUTOCREATE);
    assert_eq!(scene.told(&told), 1, "it is told once");
    // Another directory of the same file system is mounted there.
    std::fs::create_dir(scene.namespace.path("/run/other")).expect("a directory");
    scene.run("mount", &["--bind", "/run/other", SPACE]);
    scene.lock(SPACE, "fifth", AUTOCREATE);
    assert_eq!(scene.told(&told), 2, "{}", scene.daemon.stderr());
    // Somebody replaced it, which is seen when libvirt speaks of the lockspace next.
    scene.run("umount", &["-l", SPACE]);
    scene.lock(SPACE, "sixth", AUTOCREATE);
    assert_eq!(scene.told(&told), 3, "{}", scene.daemon.stderr());
    scene.run("mv", &[SPACE, "/run/moved"]);
    std::fs::create_dir(scene.namespace.path(SPACE)).expect("a directory");
    scene.client.call(&create_lockspace(SPACE)).expect_ok();
    assert_eq!(scene.told(&told), 4, "{}", scene.daemon.stderr());
}
