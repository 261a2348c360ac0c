//! Operations on a share that fail, once or for ever: what passes by itself is tried again, what does not is
//! named with the path, and nothing is left behind.

use crate::scene::{Asks, PATIENCE, STEPS, Scene, Step, VARIANTS, for_each};
use crate::support::client::{DOMAIN_LOCKSPACE, SYSTEM_ERROR};
use crate::support::fuse::{Operation, Trouble};
use crate::support::wait_until;
use nix::errno::Errno;

const ERRORS: [Errno; 5] = [
    Errno::ESTALE,
    Errno::ENOLCK,
    Errno::EIO,
    Errno::EREMOTEIO,
    Errno::EOPNOTSUPP,
];

/// As the C library says it.
fn text_of(errno: Errno) -> String {
    let text = std::io::Error::from_raw_os_error(errno as i32).to_string();
    let end = text.find(" (os error").expect("the number of the error");
    text[..end].to_owned()
}

#[test]
fn an_operation_that_fails_is_named_or_tried_again_and_leaves_nothing() {
    // Nobody hears that a release has failed.
    let mut steps = STEPS.to_vec();
    steps.retain(|step| step.operation != Operation::Release);
    for_each(&steps, |step| {
        let Some(mut scene) = Scene::new(VARIANTS[0]) else {
            return;
        };
        for errno in ERRORS {
            for times in [1, usize::MAX] {
                fails(&mut scene, step, errno, times);
            }
        }
    });
}

#[track_caller]
fn fails(scene: &mut Scene, step: &Step, errno: Errno, times: usize) {
    let when = format!("{step:?} {errno:?} {times} times");
    if !step.is_lease && scene.share.files().is_empty() {
        scene.share.put("x");
    }
    let (take, give) = (step.take(&scene.share), step.give(&scene.share));
    if step.asks == Asks::Give {
        scene.guest.call(&take).expect_ok();
        // The note is written by then, if there is one.
        scene.share.wait_quiet();
    }
    let trouble = Trouble::Fails(errno);
    scene
        .share
        .trouble_with("x", step.operation, trouble, times);
    let log = scene.daemon.stderr().len();
    let reply = match step.asks {
        Asks::Take => scene.guest.call(&take),
        Asks::Give => scene.guest.call(&give),
    };
    scene.share.mend_all();
    let log = || scene.daemon.stderr()[log..].to_owned();
    if reply.is_ok() {
        if step.asks == Asks::Take {
            scene.share.wait_locks(&["x write"], &when);
            scene.guest.call(&give).expect_ok();
        }
    } else {
        assert!(
            times > 1 || errno != Errno::ESTALE,
            "{when}: not tried again: {reply:?}"
        );
        assert_eq!(step.asks, Asks::Take, "{when}: {reply:?}");
        let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
        let reason = text_of(errno);
        assert!(
            text.contains("/run/share/x") && text.contains(&reason),
            "{when}: {text}"
        );
    }
    scene.share.wait_closed(&when);
    // What a server refuses to do for good cannot be done: it is told.
    let is_told = || log().contains("/run/share/x");
    let may_stay = |operations: &[Operation]| {
        let is_for_good = times > 1 || errno != Errno::ESTALE;
        is_for_good && operations.contains(&step.operation) && is_told()
    };
    wait_until(PATIENCE, &format!("{when}: the lock to go"), || {
        scene.share.locks().is_empty() || (times > 1 && may_stay(&[Operation::Unlock]))
    });
    scene.share.lose_locks();
    // A file that was made and could not be locked may be another's by now: it stays, and is told, too.
    wait_until(PATIENCE, &format!("{when}: the file to go"), || {
        scene.share.files() == step.files_at_rest()
            || may_stay(&[Operation::Lock, Operation::Unlink])
    });
    if step.is_lease && !scene.share.files().is_empty() {
        scene.share.remove("x");
    }
}
