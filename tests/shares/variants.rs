//! What stays locked on each kind of server, beside libvirt's daemon: after a release, a death, a refusal, an
//! upgrade, a stop and a kill. In one case it is worse.

use crate::scene::{STEPS, Step, VARIANTS, for_each};
use crate::support::client::{DOMAIN_LOCKSPACE, RESOURCE_BUSY, create_lockspace, register_as};
use crate::support::daemon;
use crate::support::fuse::{Habits, Share};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{Host, upgrade};
use crate::support::{DEADLINE, require_root, skip, wait_until};
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Release,
    Death,
    Refusal,
    Upgrade,
    Stop,
    Kill,
}

const EVENTS: [Event; 6] = [
    Event::Release,
    Event::Death,
    Event::Refusal,
    Event::Upgrade,
    Event::Stop,
    Event::Kill,
];

/// The locks of nobody that are on the share when everything is over, and the files; `None` where there is no FUSE.
fn what_stays(
    program: &Path,
    habits: Habits,
    step: &Step,
    event: Event,
) -> Option<(usize, Vec<String>)> {
    let host = Host::with(program);
    let share = Share::mount(&host.namespace, "share", habits)?;
    let mut daemon = host.start(&[], &[]);
    let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
    guest.call(&create_lockspace(share.directory())).expect_ok();
    if !step.is_lease || event == Event::Refusal {
        share.put("x");
    }
    let (take, give) = (step.take(&share), step.give(&share));
    let mut others = 0;
    if event == Event::Refusal {
        share.stranger_locks("x", true);
        others = 1;
        let reply = guest.call(&take);
        reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    } else {
        guest.call(&take).expect_ok();
        share.wait_locks(&["x write"], "granted");
    }
    match event {
        Event::Refusal => (),
        Event::Release => guest.call(&give).expect_ok(),
        Event::Death => {
            guest.kill();
            guest.wait_end();
        }
        Event::Upgrade => {
            upgrade(&daemon);
            guest.call(&give).expect_ok();
        }
        Event::Stop => {
            daemon.stop();
        }
        Event::Kill => daemon.kill(),
    }
    if matches!(event, Event::Release | Event::Death | Event::Upgrade) {
        // Whatever it has to do about a death, it has done when another one has the name, or never.
        let mut next = daemon.client();
        next.call(&register_as("next", 4242)).expect_ok();
        if event == Event::Death {
            wait_until(DEADLINE, "the dead owner's file to be closed", || {
                share.open_files().is_empty()
            });
        }
        daemon.wait_until_asleep();
    }
    share.wait_quiet();
    Some((share.locks().len() - others, share.files()))
}

#[test]
fn no_more_stays_locked_than_with_libvirts_daemon_but_after_a_kill_where_a_flush_unlocks() {
    if !require_root() {
        return;
    }
    let Some(theirs) = daemon::c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let mut cells = Vec::new();
    for habits in VARIANTS {
        for step in [STEPS[3], STEPS[6]] {
            cells.extend(EVENTS.map(|event| (habits, step, event)));
        }
    }
    for_each(&cells, |(habits, step, event)| {
        let ours = what_stays(&daemon::program(), *habits, step, *event);
        let theirs = what_stays(&theirs, *habits, step, *event);
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            return;
        };
        // The one case that is worse: with the last close of a killed process's file a POSIX lock of the process goes
        // at FLUSH, and that of an open file does not.
        let is_worse = *event == Event::Kill && habits.drops_on_flush;
        assert_eq!(
            ours.0 > theirs.0,
            is_worse,
            "locked: {ours:?}, libvirt's {theirs:?}"
        );
        let (our_files, their_files) = (ours.1.len(), theirs.1.len());
        assert!(our_files <= their_files, "{ours:?}, libvirt's {theirs:?}");
        // Only what is killed whole cannot let go.
        assert!(*event == Event::Kill || ours.0 == 0, "locked: {ours:?}");
    });
}
