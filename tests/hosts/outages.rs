//! A host that is gone, a server that starts anew, a cable that is out for a while.

use crate::exclusion::guests;
use crate::pair::{Begun, Kind, LEASE};
use crate::story;
use std::time::{Duration, Instant};

#[test]
fn the_locks_of_a_host_that_is_switched_off_are_free_after_the_lease_and_not_before() {
    story(|hosts| {
        let [one, two, other, another] = guests(hosts, Kind::Ours, Kind::Ours);
        let (disk, lease) = (hosts.disk("disk"), hosts.lease("lease"));
        another.take(&disk).granted();
        // The server has heard of it after this moment.
        let heard = Instant::now();
        other.take(&lease).granted();
        hosts.b.machine().switch_off();
        one.takes_when_free(&lease);
        let after = heard.elapsed();
        eprintln!("    the lease was free after {:.1} s", after.as_secs_f32());
        assert!(after >= LEASE, "free after {after:?} only");
        two.take(&disk).granted();
        // The other host comes back, knows of nothing and is refused.
        hosts.switch_on();
        hosts.b.start_daemon(Kind::Ours);
        let late = hosts.b.guest("late");
        late.take(&lease).held();
        late.take(&disk).held();
        one.give(&lease).granted();
        late.take(&lease).granted();
    });
}

#[test]
fn a_server_that_starts_anew_gives_nobody_what_another_had_before_and_calls_wait() {
    story(|hosts| {
        let [one, two, other, another] = guests(hosts, Kind::Ours, Kind::Ours);
        let mine = [hosts.disk("mine"), hosts.lease("my-lease")];
        let theirs = [hosts.disk("theirs"), hosts.lease("their-lease")];
        let (free, also_free) = (hosts.disk("free"), hosts.disk("also-free"));
        for (guest, leases) in [(&one, &mine), (&other, &theirs)] {
            for lease in leases {
                guest.take(lease).granted();
            }
        }
        // As long as one of those who had locks has not said which, nobody gets any.
        hosts.b.machine().set_cable(false);
        hosts.restart_server();
        let begun = Instant::now();
        let asked = two.begin(&free.take());
        assert_eq!(asked.within(LEASE / 5), None, "a call in the grace period");
        hosts.b.machine().set_cable(true);
        // Who has nothing to say would notice only later that the server is another one.
        let also = another.begin(&also_free.take());
        asked.outcome().granted();
        also.outcome().granted();
        eprintln!(
            "    a call waited for {:.1} s",
            begun.elapsed().as_secs_f32()
        );
        for lease in &theirs {
            two.take(lease).held();
            another.take(lease).held();
        }
        for lease in &mine {
            two.take(lease).held();
            another.take(lease).held();
        }
        for (guest, leases, heir) in [(&one, &mine, &another), (&other, &theirs, &two)] {
            for lease in leases {
                guest.give(lease).granted();
                heir.take(lease).granted();
            }
        }
    });
}

#[test]
fn a_cable_that_is_out_for_less_than_the_lease_costs_nobody_a_lock() {
    story(|hosts| {
        let [one, two, other, another] = guests(hosts, Kind::Ours, Kind::Ours);
        let all = [hosts.disk("disk"), hosts.lease("lease")];
        for lease in &all {
            other.take(lease).granted();
        }
        let free = hosts.disk("free");
        let cut = Instant::now();
        hosts.b.machine().set_cable(false);
        // What the server has to ask the other host about waits, too: it may have given that the right to
        // believe that nobody else writes the file.
        let theirs = [one.begin(&all[0].take()), two.begin(&all[1].take())];
        let asked = another.begin(&free.take());
        let granted = |begun: &Begun| {
            let outcome = begun.within(Duration::from_millis(50));
            outcome.is_some_and(|it| it.is_granted())
        };
        while cut.elapsed() < LEASE / 5 {
            assert!(!granted(&theirs[0]) && !granted(&theirs[1]) && !granted(&asked));
        }
        hosts.b.machine().set_cable(true);
        asked.outcome().granted();
        for (lease, outcome) in all.iter().zip(theirs) {
            outcome.outcome().held();
            one.take(lease).held();
            other.give(lease).granted();
            two.take(lease).granted();
        }
        let kernel = hosts.b.sh("dmesg | grep ' lost ' || true");
        assert_eq!(kernel, "");
    });
}
