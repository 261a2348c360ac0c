//! A guest moves to the other host, in libvirt's order of calls: its process there has a connection first, then
//! the source gives up its disks, then the destination takes them. In the gap anybody may have one.

use crate::pair::{Guest, Host, Kind, Lease, Outcome, Pair};
use crate::story;

/// A guest that runs on one host, its process on the other, which waits for it, and a third party on each.
struct Scene {
    disks: [Lease; 2],
    source: Guest,
    destination: Guest,
    here: Guest,
    there: Guest,
}

impl Scene {
    fn new(hosts: &Pair) -> Scene {
        for host in [&hosts.a, &hosts.b] {
            host.start_daemon(Kind::Ours);
        }
        let process = |host: &Host| {
            let guest = host.guest("moves");
            // It is not to lock anything itself.
            guest.call("restrict").granted();
            guest
        };
        let scene = Scene {
            disks: [hosts.disk("root"), hosts.lease("data")],
            source: process(&hosts.a),
            destination: process(&hosts.b),
            here: hosts.a.guest("here"),
            there: hosts.b.guest("there"),
        };
        all_granted(&scene.source.short(&scene.takes()));
        scene
    }

    fn takes(&self) -> Vec<String> {
        self.disks.iter().map(Lease::take).collect()
    }

    fn gives(&self) -> Vec<String> {
        self.disks.iter().map(Lease::give).collect()
    }

    #[track_caller]
    fn third_parties_are_refused(&self) {
        for disk in &self.disks {
            self.here.take(disk).held();
            self.there.take(disk).held();
        }
    }
}

#[track_caller]
fn all_granted(outcomes: &[Outcome]) {
    for outcome in outcomes {
        outcome.granted();
    }
}

#[test]
fn a_guest_that_moves_has_its_disks_on_the_other_host_and_a_third_party_has_none() {
    story(|hosts| {
        let scene = Scene::new(hosts);
        scene.third_parties_are_refused();
        // Too early: the source still runs.
        scene.destination.short(&scene.takes())[0].held();
        all_granted(&scene.source.short(&scene.gives()));
        all_granted(&scene.destination.short(&scene.takes()));
        scene.third_parties_are_refused();
        // libvirt asks twice; the second time there is nothing to give up.
        let again = scene.source.short(&scene.gives());
        assert!(matches!(&again[0], Outcome::Wrong(why) if why.contains("is not locked")));
        scene.source.kill();
        scene.source.end();
        scene.third_parties_are_refused();
        assert!(scene.destination.lives());
        scene.destination.kill();
        scene.here.takes_when_free(&scene.disks[0]);
        scene.there.takes_when_free(&scene.disks[1]);
    });
}

#[test]
fn a_third_party_that_gets_a_disk_in_the_gap_keeps_it_and_neither_end_of_the_move_has_it() {
    for there in [false, true] {
        story(|hosts| {
            let scene = Scene::new(hosts);
            let third = if there { &scene.there } else { &scene.here };
            let wanted = &scene.disks[1];
            third.take(wanted).held();
            all_granted(&scene.source.short(&scene.gives()));
            third.take(wanted).granted();
            let outcomes = scene.destination.short(&scene.takes());
            outcomes[0].granted();
            outcomes[1].held();
            // The destination is given up, and with it what it had. The source cannot go on either.
            scene.destination.kill();
            scene.destination.end();
            scene.source.short(&[wanted.take()])[0].held();
            third.give(wanted).granted();
            all_granted(&scene.source.short(&[wanted.take()]));
            third.take(wanted).held();
        });
    }
}

#[test]
fn a_third_party_that_tries_all_the_time_has_a_disk_only_when_neither_end_of_the_move_has_it() {
    story(|hosts| {
        let scene = Scene::new(hosts);
        let mut had = 0;
        for round in 0..5 {
            let (from, to) = match round % 2 {
                0 => (&scene.source, &scene.destination),
                _ => (&scene.destination, &scene.source),
            };
            let disk = &scene.disks[round % 2];
            let rival = hosts.b.rival(disk);
            all_granted(&from.short(&scene.gives()));
            // It may be the third party's for a moment.
            loop {
                let outcomes = to.short(&[disk.take()]);
                if outcomes[0].is_granted() {
                    break;
                }
                outcomes[0].held();
            }
            had += rival.gives_up().1;
            let other = &scene.disks[(round + 1) % 2];
            all_granted(&to.short(&[other.take()]));
            scene.third_parties_are_refused();
        }
        eprintln!("    the third party had it {had} times in the gap");
    });
}
