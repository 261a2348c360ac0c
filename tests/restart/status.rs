//! What the status program says is true over upgrades, deaths of the daemon's processes, and starts after
//! all of them were killed: since when what is held, what was counted, and to whom it is told.

use crate::support;
use crate::support::client::{acquire, register_as, release};
use crate::support::daemon::{Daemon, program};
use crate::support::manager::Manager;
use crate::support::owner::Owner;
use crate::support::status::{self, Status};
use crate::support::upgrade::{Host, upgrade};
use crate::support::{DEADLINE, skip, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct Scene {
    host: Host,
    daemon: Daemon,
    guest: Owner,
    disk: String,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !support::require_root() {
            return None;
        }
        if program().starts_with("/usr") {
            skip("libvirt's daemon has no status program");
            return None;
        }
        let host = Host::new();
        let daemon = host.start(&[], &[]);
        let disk = host.disk("disk");
        let guest = host.guest(&daemon, "guest", &disk);
        Some(Scene {
            host,
            daemon,
            guest,
            disk,
        })
    }

    fn kill_reactor(&self) {
        let before = self.daemon.reactor();
        kill(Pid::from_raw(before), Signal::SIGKILL).expect("kill the process that serves");
        wait_for(DEADLINE, "another process that serves", || {
            let now = self.daemon.reactor();
            (now != before && now != self.daemon.pid()).then_some(())
        });
    }
}

#[test]
fn times_and_counts_are_what_they_were_whoever_goes_on() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let refused = acquire("", &scene.disk, 0);
    scene.guest.call(&refused).expect_error(87, 51);
    let mut status = Status::of(&scene.daemon);
    let (held, owners) = (status.resources(), status.owners());
    let counts = status.counters();
    assert!(held[0].since > 0 && owners[0].since > 0);
    assert_eq!((counts["locks_granted"], counts["locks_refused"]), (1, 1));
    let mut cursor = Some((status.daemon().serves_since, 0u64));
    let mut check = |scene: &Scene, what: [u64; 2]| {
        // A daemon that was replaced has another list.
        let place = cursor.unwrap();
        let bytes = [place.0.to_be_bytes(), place.1.to_be_bytes()].concat();
        let mut status = Status::of(&scene.daemon);
        let stale = status.call(status::RESOURCES, &bytes, 0);
        assert!(stale.expect_error(55, 62).contains("begin anew"));
        cursor = Some((status.daemon().serves_since, 0));
        assert_eq!(status.resources(), held);
        assert_eq!(status.owners(), owners);
        let now = status.counters();
        assert_eq!([now["upgrades"], now["recoveries"]], what);
        for name in ["locks_granted", "locks_refused", "owners_registered"] {
            assert_eq!(now[name], counts[name], "{name}");
        }
    };
    upgrade(&scene.daemon);
    check(&scene, [1, 0]);
    scene.kill_reactor();
    check(&scene, [1, 1]);
    upgrade(&scene.daemon);
    check(&scene, [2, 1]);

    // All at once. The guest has no connection any more; its lock has not become younger.
    wait_until(DEADLINE, "the ledger to be there", || {
        scene.host.path("/run/libvirt/virtlockd-ledger").exists()
    });
    scene.daemon.kill();
    scene.daemon = scene.host.start(&[], &[]);
    let mut status = Status::of(&scene.daemon);
    let again = status.resources();
    assert_eq!((again.len(), again[0].since), (1, held[0].since));
    assert_eq!(again[0].holders[0].0.standing, status::WATCHED);
    let now = status.counters();
    assert_eq!([now["upgrades"], now["recoveries"]], [2, 2]);
    assert_eq!((now["locks_granted"], now["locks_refused"]), (1, 1));
}

#[test]
fn whoever_subscribed_is_told_that_another_process_or_program_goes_on_and_of_what_happens_then() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("other");
    let mut status = Status::of(&scene.daemon);
    status.subscribe(status::ALL);
    let mut client = scene.daemon.client();
    client.call(&register_as("other", 4242)).expect_ok();
    let mut step = |expected: u32, text: &str, status: &mut Status| {
        let told = status.next();
        assert_eq!(told.kind, expected, "{told:?}");
        assert!(told.text.contains(text), "{told:?}");
        client.call(&acquire("", &disk, 0)).expect_ok();
        client.call(&release("", &disk)).expect_ok();
        for kind in [status::GRANTED, status::RELEASED] {
            let told = status.next();
            assert_eq!((told.kind, told.name.as_str()), (kind, disk.as_str()));
        }
    };
    upgrade(&scene.daemon);
    step(status::UPGRADED, "", &mut status);
    scene.kill_reactor();
    step(status::RECOVERED, "was killed by SIGKILL", &mut status);
    upgrade(&scene.daemon);
    step(status::UPGRADED, "", &mut status);
    status.expect_silence();
}

#[test]
fn a_stop_that_keeps_everything_keeps_times_counts_and_who_is_told() {
    if !support::require_root() {
        return;
    }
    if program().starts_with("/usr") {
        return skip("libvirt's daemon keeps nothing over a stop");
    }
    let manager = Manager::new();
    let mut daemon = manager.start();
    let disk = manager.host.disk("disk");
    let mut guest = manager.host.guest(&daemon, "guest", &disk);
    // The descriptors have other numbers afterwards: some are free by then that were not.
    let passing: Vec<_> = (0..20).map(|_| daemon.client()).collect();
    let mut told = Status::of(&daemon);
    told.subscribe(status::ALL);
    drop(passing);
    let mut status = Status::of(&daemon);
    let (held, owners) = (status.resources(), status.owners());
    let counts = status.counters();
    assert!(held[0].since > 0 && owners[0].since > 0);
    for upgrades in 1..3u64 {
        let ended = daemon.stop();
        assert_eq!(ended.code(), Some(81), "{}", daemon.stderr());
        manager.settle();
        daemon = manager.start();
        assert_eq!(told.next().kind, status::UPGRADED);
        guest.call(&release("", &disk)).expect_ok();
        guest.call(&acquire("", &disk, 0)).expect_ok();
        for kind in [status::RELEASED, status::GRANTED] {
            assert_eq!(told.next().kind, kind);
        }
        let mut status = Status::of(&daemon);
        assert_eq!(status.owners(), owners);
        let now = status.counters();
        assert_eq!(now["upgrades"], upgrades);
        assert_eq!(now["locks_granted"], counts["locks_granted"] + upgrades);
        assert_eq!(now["owners_registered"], counts["owners_registered"]);
    }
}
