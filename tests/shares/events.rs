//! What may happen while a call hangs in a share: its caller leaves, its owner dies, the daemon is replaced, killed
//! or stopped. Each leaves neither a lock, a file or an open file behind, nor anybody without an answer.

use crate::scene::{Asks, PATIENCE, Scene, Step, for_each_step};
use crate::support::upgrade::upgrade;
use crate::support::{DEADLINE, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What happens, while the call hangs; `after` the share is well again.
#[track_caller]
fn story(
    first: usize,
    happens: impl Fn(&mut Scene) + Sync,
    after: impl Fn(&mut Scene, &Step) + Sync,
) {
    for_each_step(first, |step, habits| {
        let Some(mut scene) = Scene::new(habits) else {
            return;
        };
        scene.hang_in(step);
        happens(&mut scene);
        assert!(scene.share.hanging(step.operation) > 0, "it hangs still");
        scene.share.mend_all();
        after(&mut scene, step);
        scene.nothing_is_left(step, "the share is well again");
        scene.is_had_by_another(step);
    });
}

#[test]
fn a_caller_that_leaves_while_its_call_hangs_leaves_nothing_behind() {
    let leaves = |scene: &mut Scene| {
        scene.guest.close_connection();
        scene.others_are_served();
    };
    story(0, leaves, |_, _| ());
}

#[test]
fn an_owner_that_dies_while_its_call_hangs_leaves_nothing_behind() {
    let dies = |scene: &mut Scene| {
        scene.guest.kill();
        scene.guest.wait_end();
        scene.others_are_served();
    };
    story(1, dies, |_, _| ());
}

#[test]
fn an_upgrade_while_a_call_hangs_takes_the_call_along() {
    let is_replaced = |scene: &mut Scene| {
        upgrade(&scene.daemon);
        scene.others_are_served();
    };
    story(2, is_replaced, |scene, step| scene.guest_is_answered(step));
}

#[test]
fn the_process_that_serves_is_killed_while_a_call_hangs_and_the_call_is_answered() {
    let crashes = |scene: &mut Scene| {
        let before = scene.daemon.reactor();
        kill(Pid::from_raw(before), Signal::SIGKILL).expect("kill the reactor");
        wait_for(DEADLINE, "another process that serves", || {
            let now = scene.daemon.reactor();
            (now != before && now != scene.daemon.pid()).then_some(now)
        });
        scene.others_are_served();
    };
    story(0, crashes, |scene, step| scene.guest_is_answered(step));
}

#[test]
fn a_stop_while_a_call_hangs_does_not_wait_for_the_share() {
    let ends = |scene: &mut Scene| {
        scene.daemon.signal(Signal::SIGTERM);
        // Owners are fenced before, which takes as long as they take to die.
        wait_until(2 * PATIENCE, "the end of the daemon", || {
            scene.daemon.ended().is_some()
        });
        assert_eq!(scene.daemon.ended().and_then(|it| it.code()), Some(0));
    };
    let after = |scene: &mut Scene, step: &Step| {
        scene.share.wait_quiet();
        scene.nothing_is_left(step, "the daemon was stopped");
        // Who had a lock was fenced. Who had none has got an answer, or the end of its connection.
        let answer = scene.guest.try_receive();
        let is_granted = answer.as_ref().is_ok_and(|reply| reply.is_ok());
        assert!(step.asks == Asks::Give || !is_granted, "{answer:?}");
        scene.daemon = scene.host.start(&[], &[]);
        scene.bystander = scene.daemon.client();
        let register = crate::support::client::register_as("next", 4242);
        scene.bystander.call(&register).expect_ok();
    };
    story(1, ends, after);
}

/// A stop says what it leaves.
#[test]
fn a_stop_names_what_hangs() {
    let Some(mut scene) = Scene::new(crate::scene::VARIANTS[0]) else {
        return;
    };
    scene.hang_in(&crate::scene::STEPS[1]);
    scene.daemon.signal(Signal::SIGTERM);
    wait_until(2 * PATIENCE, "the end of the daemon", || {
        scene.daemon.ended().is_some()
    });
    let log = scene.daemon.stderr();
    let is_named = log.lines().any(|line| line.contains("/run/share/x"));
    assert!(is_named, "{log}");
}
