//! Who may have what, on two hosts.

use crate::machine::PATIENCE;
use crate::pair::{Guest, Host, Kind, LOCKSPACE, Lease, Pair, Turns};
use crate::support::wait_until;
use crate::{story, story_of_ours};
use std::time::Duration;

#[test]
fn what_one_host_has_alone_the_other_is_refused_and_what_is_shared_both_have() {
    story(|hosts| {
        let guests = guests(hosts, Kind::Ours, Kind::Ours);
        excludes(hosts, &guests, &hosts.disk("disk"));
        excludes(hosts, &guests, &hosts.lease("lease"));
    });
}

#[test]
fn a_refusal_names_the_guest_on_the_other_host_where_the_lease_file_says_it() {
    story_of_ours(|hosts| {
        let [one, _, other, _] = guests(hosts, Kind::Ours, Kind::Ours);
        let lease = hosts.lease("lease");
        one.take(&lease).granted();
        // The note is written behind the reply, and a host believes for a while what it read before.
        let mut last = String::new();
        wait_until(PATIENCE, "the note", || {
            let message = other.take(&lease).held().to_owned();
            if message != last {
                eprintln!("    {message}");
                last.clone_from(&message);
            }
            message.contains("host 'a', domain 'one'")
        });
    });
}

#[test]
fn ours_on_one_host_and_libvirts_on_the_other_exclude_each_other() {
    story(|hosts| {
        if !has_libvirts(hosts) {
            return;
        }
        for (on_a, on_b) in [(Kind::Ours, Kind::Libvirts), (Kind::Libvirts, Kind::Ours)] {
            let guests = guests(hosts, on_a, on_b);
            excludes(hosts, &guests, &hosts.disk("disk"));
            for way in both_ways(hosts, &guests) {
                // Each under a name that nothing had before: where libvirt's daemon finds one whose file was removed
                // it believes what its host remembers, locks that file, and removes another one's for it.
                is_had_alone(way, &hosts.lease("alone"));
                is_had_by_both(way, &hosts.lease("both"));
            }
            hosts.forget();
        }
    });
}

#[test]
fn a_thousand_times_a_disk_is_never_had_by_both() {
    story(|hosts| in_turn(hosts, Kind::Ours, &hosts.disk("disk"), 500));
}

#[test]
fn a_thousand_times_a_lease_that_comes_and_goes_is_never_had_by_both() {
    story(|hosts| in_turn(hosts, Kind::Ours, &hosts.lease("lease"), 500));
}

#[test]
fn ours_and_libvirts_never_both_have_a_disk() {
    story(|hosts| {
        if has_libvirts(hosts) {
            in_turn(hosts, Kind::Libvirts, &hosts.disk("disk"), 100);
        }
    });
}

/// The file of a lease is removed when nobody has it any more, and made anew. Whoever has opened it before, and locks
/// it after, has a lock that means nothing, and must find that out; where it looks, the host may believe what it saw
/// before. (As long as who removed it has it open, it only has another name.)
#[test]
fn a_lease_that_is_given_up_between_opening_and_locking_is_never_had_by_both() {
    story(|hosts| {
        let [one, _, other, _] = guests(hosts, Kind::Ours, Kind::Ours);
        hosts.a.slow_down("fcntl", MOMENT);
        hosts.b.slow_down("close", MOMENT);
        let lease = hosts.lease("lease");
        // As long as the one has it the other one tries and would make a new file.
        end_turns([
            one.begin_turns(10, 3 * MOMENT, &lease),
            other.begin_turns(15, Duration::ZERO, &lease),
        ]);
    });
}

/// Long enough for what the other host does meanwhile.
const MOMENT: Duration = Duration::from_millis(100);

pub fn has_libvirts(hosts: &Pair) -> bool {
    let has = hosts.has_libvirts_daemon();
    if !has {
        crate::support::skip("needs libvirt's own virtlockd");
    }
    has
}

/// Two guests on each host.
pub fn guests(hosts: &Pair, on_a: Kind, on_b: Kind) -> [Guest; 4] {
    let mut all = Vec::new();
    for (host, kind, names) in [
        (&hosts.a, on_a, ["one", "two"]),
        (&hosts.b, on_b, ["other", "another"]),
    ] {
        host.start_daemon(kind);
        for name in names {
            let guest = host.guest(name);
            // As libvirtd does when it starts.
            let _ = guest.call(&format!("lockspace {LOCKSPACE}"));
            all.push(guest);
        }
    }
    all.try_into().ok().expect("four guests")
}

/// From here to there and from there to here: a host, its guests, the other host, its guests.
type Way<'a> = (&'a Host, [&'a Guest; 2], &'a Host, [&'a Guest; 2]);

fn both_ways<'a>(hosts: &'a Pair, [one, two, other, another]: &'a [Guest; 4]) -> [Way<'a>; 2] {
    let (a, b) = (&hosts.a, &hosts.b);
    let (on_a, on_b) = ([one, two], [other, another]);
    [(a, on_a, b, on_b), (b, on_b, a, on_a)]
}

/// What the first guest here takes for itself nobody else has, here or there.
fn is_had_alone((here, [mine, more], there, [theirs, _]): Way<'_>, lease: &Lease) {
    eprintln!("    {} alone, {}", here.name(), lease.path);
    mine.take(lease).granted();
    theirs.take(lease).held();
    theirs.share(lease).held();
    more.take(lease).held();
    assert!(there.probe(lease).starts_with("exclusive"));
}

/// What both hosts share nobody has for himself.
fn is_had_by_both((here, [mine, more], _, [theirs, also]): Way<'_>, lease: &Lease) {
    eprintln!("    {} and the other one, {}", here.name(), lease.path);
    mine.share(lease).granted();
    theirs.share(lease).granted();
    also.take(lease).held();
    more.take(lease).held();
}

fn excludes(hosts: &Pair, guests: &[Guest; 4], lease: &Lease) {
    for way in both_ways(hosts, guests) {
        let (here, [mine, more], _, [theirs, also]) = way;
        is_had_alone(way, lease);
        mine.give(lease).granted();

        theirs.take(lease).granted();
        mine.take(lease).held();
        mine.share(lease).held();
        theirs.give(lease).granted();

        is_had_by_both(way, lease);
        mine.give(lease).granted();
        also.take(lease).held();
        more.take(lease).held();
        theirs.give(lease).granted();
        more.take(lease).granted();
        theirs.share(lease).held();
        more.give(lease).granted();

        // An owner that dies.
        let dies = here.guest("dies");
        dies.take(lease).granted();
        theirs.take(lease).held();
        dies.kill();
        dies.end();
        theirs.takes_when_free(lease);
        mine.take(lease).held();
        theirs.give(lease).granted();
    }
}

/// Both hosts take the lock as often and as fast as they can.
fn in_turn(hosts: &Pair, on_b: Kind, lease: &Lease, count: u32) {
    let [one, _, other, _] = guests(hosts, Kind::Ours, on_b);
    end_turns([&one, &other].map(|guest| guest.begin_turns(count, Duration::ZERO, lease)));
}

fn end_turns(both: [Turns; 2]) {
    for turns in both {
        let end = turns.end();
        eprintln!(
            "    had {}, refused {}, in {:.1} s",
            end.had, end.held, end.seconds
        );
        assert_eq!(end.wrong, Vec::<String>::new());
        // On a machine that is too slow they stop before.
        assert!(end.had > 0);
    }
}
