//! Beside libvirt's daemon, which says nothing of what it holds.

use crate::run::{Ran, ctl};
use crate::support;
use crate::support::client::{SHARED, acquire};
use crate::support::daemon::{Daemon, c_daemon};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::skip;

struct Scene {
    namespace: Namespace,
    daemon: Daemon,
    _guest: Owner,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !support::require_root() {
            return None;
        }
        let Some(program) = c_daemon() else {
            skip("needs libvirt's own daemon");
            return None;
        };
        let namespace = Namespace::new();
        let daemon = Daemon::start_program(&program, &namespace, &[], &[]);
        daemon.admin_client();
        for disk in ["disk", "shared", "free"] {
            std::fs::write(namespace.path(format!("/run/{disk}")), b"").expect("make a disk");
        }
        let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
        guest.call(&acquire("", "/run/disk", 0)).expect_ok();
        guest.call(&acquire("", "/run/shared", SHARED)).expect_ok();
        Some(Scene {
            namespace,
            daemon,
            _guest: guest,
        })
    }

    fn ctl(&self, words: &[&str]) -> Ran {
        ctl(&self.namespace, words)
    }
}

#[test]
fn status_says_whose_daemon_it_is_and_lists_what_the_kernel_knows() {
    let Some(scene) = Scene::new() else { return };
    let said = scene.ctl(&["status"]).expect(0);
    let pid = scene.daemon.pid();
    let first =
        format!("Another virtlockd (pid {pid}), which does not say what it holds: it is libvirt's");
    assert!(said.starts_with(&first), "{said}");
    let lines: Vec<Vec<&str>> = said
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    for row in [["/run/disk", "exclusive"], ["/run/shared", "shared"]] {
        assert!(lines.contains(&row.to_vec()), "{said}");
    }
    assert!(!said.contains("virtlockd.pid"), "{said}");
    let json = scene.ctl(&["--json", "status"]).json(0);
    assert_eq!(json["daemon"]["kind"], "libvirt");
    assert_eq!(json["locks"].as_array().expect("locks").len(), 2);
    let one = scene.ctl(&["status", "guest"]);
    assert!(one.stderr.contains("for whom it holds what"), "{one:?}");
    one.expect(2);
}

#[test]
fn who_says_what_the_kernel_knows_and_that_the_daemon_does_not_say_for_whom() {
    let Some(scene) = Scene::new() else { return };
    let pid = scene.daemon.pid();
    for disk in ["/run/disk", "/run/shared"] {
        let said = scene.ctl(&["who", disk]).expect(0);
        let expected =
            format!("{disk}: held by virtlockd, pid {pid}, which does not say for whom\n");
        assert_eq!(said, expected);
    }
    scene.ctl(&["who", "/run/free"]).expect(1);
    let json = scene.ctl(&["who", "--json", "/run/disk"]).json(0);
    assert_eq!(json["files"][0]["held_by"], "another-virtlockd");
}

#[test]
fn metrics_and_events_say_what_there_is_to_say() {
    let Some(scene) = Scene::new() else { return };
    let text = scene.ctl(&["metrics"]).expect(0);
    assert!(text.contains("implementation=\"libvirt\""), "{text}");
    assert!(text.contains("\nvirtlockd_locks 2\n"), "{text}");
    scene.ctl(&["--json", "metrics"]).json(0);
    let events = scene.ctl(&["events"]);
    assert!(
        events
            .stderr
            .contains("it is libvirt's, or an earlier version"),
        "{events:?}"
    );
    events.expect(2);
}
