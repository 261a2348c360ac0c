//! What becomes of a host's daemon, as the other host sees it: whatever a guest has stays its own, as long as it
//! lives and the daemon has not ended without a successor.

use crate::exclusion::{guests, has_libvirts};
use crate::pair::{Guest, Kind, Lease, Pair};
use crate::story_of_ours;

/// A guest of host `a` that has a disk and a lease for itself and shares another disk, and a guest of host `b`.
struct Scene {
    alone: [Lease; 2],
    shared: Lease,
    one: Guest,
    other: Guest,
}

impl Scene {
    fn new(hosts: &Pair, on_a: Kind) -> Scene {
        let [one, _, other, _] = guests(hosts, on_a, Kind::Ours);
        let scene = Scene {
            alone: [hosts.disk("disk"), hosts.lease("lease")],
            shared: hosts.disk("shared"),
            one,
            other,
        };
        for lease in &scene.alone {
            scene.one.take(lease).granted();
        }
        scene.one.share(&scene.shared).granted();
        scene
    }

    /// The other host's guest is refused what the one has, and may share what it shares.
    #[track_caller]
    fn is_held(&self) {
        for lease in &self.alone {
            self.other.take(lease).held();
            self.other.share(lease).held();
        }
        self.other.take(&self.shared).held();
        self.other.share(&self.shared).granted();
        self.other.give(&self.shared).granted();
    }

    /// Somebody on the other host tries to have each of them while this is done, and never does.
    fn with_rivals(&self, hosts: &Pair, done: impl FnOnce()) {
        let all = self.alone.iter().chain([&self.shared]);
        let rivals: Vec<_> = all.map(|lease| hosts.b.rival(lease)).collect();
        done();
        for rival in rivals {
            rival.never_had_it();
        }
        self.is_held();
    }

    /// The guest gives everything up over the connection that it always had, and others have it.
    #[track_caller]
    fn goes_to_others(&self) {
        for lease in &self.alone {
            self.one.give(lease).granted();
            self.other.take(lease).granted();
            self.one.take(lease).held();
        }
        self.one.give(&self.shared).granted();
        self.other.take(&self.shared).granted();
    }
}

#[test]
fn a_daemon_that_is_killed_and_one_that_replaces_itself_let_no_other_host_have_a_lock() {
    story_of_ours(|hosts| {
        let scene = Scene::new(hosts, Kind::Ours);
        scene.with_rivals(hosts, || {
            hosts.a.crash_daemon();
            hosts.a.upgrade();
            hosts.a.crash_daemon();
            hosts.a.upgrade();
        });
        scene.goes_to_others();
    });
}

#[test]
fn what_is_kept_over_a_stop_no_other_host_can_have_while_there_is_no_daemon() {
    story_of_ours(|hosts| {
        let scene = Scene::new(hosts, Kind::Kept);
        for _ in 0..2 {
            scene.with_rivals(hosts, || {
                assert_eq!(hosts.a.stop_daemon(), 81, "{}", hosts.a.daemon_log());
                scene.is_held();
                hosts.a.start_daemon(Kind::Kept);
            });
        }
        scene.goes_to_others();
    });
}

#[test]
fn a_daemon_that_ends_ends_its_guests_and_then_another_host_has_their_locks() {
    story_of_ours(|hosts| {
        let scene = Scene::new(hosts, Kind::Ours);
        assert_eq!(hosts.a.stop_daemon(), 0, "{}", hosts.a.daemon_log());
        assert_eq!(scene.one.end(), "signal 15");
        for lease in scene.alone.iter().chain([&scene.shared]) {
            scene.other.take(lease).granted();
        }
        // It starts with nothing, and is refused like anybody else.
        hosts.a.start_daemon(Kind::Ours);
        let late = hosts.a.guest("late");
        for lease in scene.alone.iter().chain([&scene.shared]) {
            late.take(lease).held();
        }
    });
}

#[test]
fn a_daemon_killed_whole_has_its_locks_again_when_it_starts() {
    story_of_ours(|hosts| {
        let scene = Scene::new(hosts, Kind::Ours);
        hosts.a.kill_daemon();
        hosts.a.start_daemon(Kind::Ours);
        assert!(scene.one.lives());
        scene.is_held();
        scene.one.kill();
        for lease in scene.alone.iter().chain([&scene.shared]) {
            scene.other.takes_when_free(lease);
        }
    });
}

#[test]
fn what_another_host_took_from_a_daemon_killed_whole_costs_the_guest_that_had_it_and_nobody_else() {
    story_of_ours(|hosts| {
        let scene = Scene::new(hosts, Kind::Ours);
        let bystander = hosts.a.guest("bystander");
        let elsewhere = hosts.disk("elsewhere");
        bystander.take(&elsewhere).granted();
        hosts.a.kill_daemon();
        for lease in &scene.alone {
            scene.other.take(lease).granted();
        }
        hosts.a.start_daemon(Kind::Ours);
        assert_eq!(scene.one.end(), "signal 15", "{}", hosts.a.daemon_log());
        let late = hosts.a.guest("late");
        for lease in &scene.alone {
            late.take(lease).held();
        }
        // What it had beside that goes with it.
        scene.other.takes_when_free(&scene.shared);
        assert!(bystander.lives());
        scene.other.take(&elsewhere).held();
    });
}

#[test]
fn ours_takes_over_from_libvirts_and_no_other_host_can_have_a_lock_meanwhile() {
    story_of_ours(|hosts| {
        if !has_libvirts(hosts) {
            return;
        }
        let scene = Scene::new(hosts, Kind::Libvirts);
        scene.with_rivals(hosts, || hosts.a.take_over());
        scene.with_rivals(hosts, || hosts.a.upgrade());
        scene.goes_to_others();
    });
}
