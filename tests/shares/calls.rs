//! Calls under way in a share that hangs: those of one connection are answered in order, and who wants what
//! another one is about to have, or to give back, waits for what becomes of that.

use crate::scene::{Asks, STEPS, Scene, Step, VARIANTS};
use crate::support::client::{
    Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, Reply, SHARED, acquire, register_as, release,
};
use crate::support::fuse::{Operation, Trouble};
use crate::support::protocol::{at, word};
use crate::support::scene::NOBODY;
use crate::support::upgrade::upgrade;
use crate::support::{DEADLINE, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A disk is locked.
const LOCKS: Step = STEPS[3];
/// A disk is unlocked.
const UNLOCKS: Step = STEPS[7];

impl Scene {
    fn another(&self, number: i32) -> Client {
        let mut client = self.daemon.client();
        let name = format!("another{number}");
        client
            .call(&register_as(&name, NOBODY + number))
            .expect_ok();
        client
    }
}

#[track_caller]
fn reply(client: &mut Client) -> Reply {
    Reply::parse(&client.receive())
}

#[test]
fn the_steps_are_what_they_are_called() {
    assert_eq!((LOCKS.operation, LOCKS.asks), (Operation::Lock, Asks::Take));
    assert_eq!(
        (UNLOCKS.operation, UNLOCKS.asks),
        (Operation::Unlock, Asks::Give)
    );
}

#[test]
fn calls_of_one_connection_are_answered_in_order() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let second = scene.host.disk("second");
    scene.share.put("x");
    let mut client = scene.another(1);
    scene.share.hang(Operation::Lock);
    let calls = [
        LOCKS.take(&scene.share),
        acquire("", &second, 0),
        LOCKS.give(&scene.share),
        release("", &second),
        acquire("", "/run/missing", 0),
    ];
    let serials = calls.each_ref().map(|call| client.post(call));
    scene.share.wait_hanging(Operation::Lock);
    scene.others_are_served();
    assert!(client.has_nothing_to_read(), "an answer out of order");
    scene.share.mend_all();
    for (number, serial) in serials.into_iter().enumerate() {
        let frame = client.receive();
        assert_eq!(word(&frame, at::SERIAL), serial, "in order");
        let is_granted = Reply::parse(&frame).is_ok();
        assert_eq!(is_granted, number != 4, "{:?}", calls[number]);
    }
    scene.nothing_is_left(&LOCKS, "given back");
    scene.host.assert_free(&second);
}

#[test]
fn who_wants_what_another_one_is_about_to_have_waits_and_is_told_who_has_it() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let mut second = scene.another(1);
    scene.hang_in(&LOCKS);
    second.post(&LOCKS.take(&scene.share));
    scene.others_are_served();
    assert!(second.has_nothing_to_read(), "nobody knows that yet");
    scene.share.mend_all();
    scene.guest.receive().expect_ok();
    let said = reply(&mut second);
    let text = said.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    assert!(text.contains("'guest'"), "{text}");
    scene.guest.call(&LOCKS.give(&scene.share)).expect_ok();
    scene.nothing_is_left(&LOCKS, "given back");
}

#[test]
fn of_two_who_want_a_file_under_two_names_one_has_it() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let mut second = scene.another(1);
    scene.hang_in(&LOCKS);
    let other_name = scene.share.path("./x");
    second.post(&acquire("", &other_name, 0));
    scene.others_are_served();
    scene.share.mend_all();
    // That it is one file is known when it is open: either may be the first.
    let replies = [scene.guest.receive(), reply(&mut second)];
    let granted = replies.iter().filter(|reply| reply.is_ok()).count();
    assert_eq!(granted, 1, "{replies:?}");
    scene.share.wait_locks(&["x write"], "one has it");
    if replies[0].is_ok() {
        replies[1].expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        scene.guest.call(&LOCKS.give(&scene.share)).expect_ok();
    } else {
        replies[0].expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        second.call(&release("", &other_name)).expect_ok();
    }
    scene.nothing_is_left(&LOCKS, "given back");
}

#[test]
fn who_shares_with_another_one_that_is_about_to_have_it_has_it_with_that() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    scene.share.put("x");
    let path = scene.share.path("x");
    let mut clients = [1, 2, 3].map(|number| scene.another(number));
    scene.share.hang(Operation::Lock);
    for client in &mut clients {
        client.post(&acquire("", &path, SHARED));
    }
    scene.share.wait_hanging(Operation::Lock);
    scene.others_are_served();
    scene.share.mend_all();
    for client in &mut clients {
        reply(client).expect_ok();
    }
    scene.share.wait_locks(&["x read"], "granted");
    for client in &mut clients {
        client.call(&release("", &path)).expect_ok();
    }
    scene.nothing_is_left(&LOCKS, "given back");
}

#[test]
fn who_wants_what_another_one_fails_to_have_has_it() {
    // The first one is refused by the server for good, or is gone when it would have it.
    for is_refused in [true, false] {
        let Some(mut scene) = Scene::new(VARIANTS[0]) else {
            return;
        };
        let mut second = scene.another(1);
        scene.hang_in(&LOCKS);
        second.post(&LOCKS.take(&scene.share));
        scene.others_are_served();
        assert!(second.has_nothing_to_read(), "nobody knows that yet");
        if is_refused {
            // The lock is tried once for each of the two.
            let fails = Trouble::Fails(nix::errno::Errno::EOPNOTSUPP);
            scene.share.trouble_with("x", Operation::Lock, fails, 1);
            assert!(!scene.guest.receive().is_ok());
        } else {
            scene.guest.kill();
            scene.guest.wait_end();
            // By then the daemon knows that, too.
            scene.others_are_served();
            scene.share.mend_all();
        }
        reply(&mut second).expect_ok();
        scene.share.wait_locks(&["x write"], "the second one's");
        second.call(&LOCKS.give(&scene.share)).expect_ok();
        scene.nothing_is_left(&LOCKS, "given back");
    }
}

#[test]
fn who_wants_what_another_one_is_about_to_give_back_has_it_then() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let mut second = scene.another(1);
    scene.hang_in(&UNLOCKS);
    second.post(&UNLOCKS.take(&scene.share));
    scene.others_are_served();
    assert!(second.has_nothing_to_read(), "it is not given back yet");
    scene.share.mend_all();
    scene.guest.receive().expect_ok();
    reply(&mut second).expect_ok();
    scene.share.wait_locks(&["x write"], "the second one's");
    second.call(&UNLOCKS.give(&scene.share)).expect_ok();
    scene.nothing_is_left(&UNLOCKS, "given back");
}

#[test]
fn what_a_dead_owner_had_on_a_share_that_hangs_is_busy_until_the_share_answers() {
    for step in [UNLOCKS, STEPS[10]] {
        let Some(mut scene) = Scene::new(VARIANTS[0]) else {
            return;
        };
        if !step.is_lease {
            scene.share.put("x");
        }
        scene.guest.call(&step.take(&scene.share)).expect_ok();
        scene.share.wait_quiet();
        scene.share.hang(step.operation);
        scene.guest.kill();
        scene.guest.wait_end();
        scene.share.wait_hanging(step.operation);
        scene.others_are_served();
        // It may wait for a while in hope of a better answer.
        let said = scene.bystander.call(&step.take(&scene.share));
        let text = said.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        assert!(
            text.contains(scene.share.directory()) && text.contains("answer"),
            "{text}"
        );
        assert_eq!(scene.share.locks(), ["x write"]);
        scene.share.mend_all();
        scene.nothing_is_left(&step, "its owner is dead");
        scene.is_had_by_another(&step);
    }
}

/// Whoever goes on for a process that had begun to let go of a lock does not know how far that has come.
#[test]
fn who_shares_what_is_given_back_over_an_upgrade_or_a_death_has_a_lock_all_the_same() {
    for is_killed in [false, true] {
        let Some(mut scene) = Scene::new(VARIANTS[0]) else {
            return;
        };
        scene.share.put("x");
        let path = scene.share.path("x");
        // The one who joins is asked first what it wants, behind that.
        let [mut joins, mut gives] = [1, 2].map(|number| scene.another(number));
        gives.call(&acquire("", &path, SHARED)).expect_ok();
        scene.share.wait_locks(&["x read"], "granted");
        scene.share.hang(Operation::Unlock);
        gives.post(&release("", &path));
        scene.share.wait_hanging(Operation::Unlock);
        joins.post(&acquire("", &path, SHARED));
        scene.others_are_served();
        if is_killed {
            let before = scene.daemon.reactor();
            kill(Pid::from_raw(before), Signal::SIGKILL).expect("kill the reactor");
            wait_until(DEADLINE, "another process that serves", || {
                let now = scene.daemon.reactor();
                now != before && now != scene.daemon.pid()
            });
        } else {
            upgrade(&scene.daemon);
        }
        scene.others_are_served();
        scene.share.mend_all();
        reply(&mut gives).expect_ok();
        reply(&mut joins).expect_ok();
        scene.share.wait_quiet();
        scene.share.wait_locks(&["x read"], "who joined has one");
        joins.call(&release("", &path)).expect_ok();
        scene.nothing_is_left(&UNLOCKS, "given back");
    }
}

/// Operators unmount what does not answer, and files stay open there.
#[test]
fn a_lock_on_a_share_that_is_mounted_nowhere_any_more_is_let_go_of_elsewhere() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let path = scene.share.path("x");
    scene.share.put("x");
    scene.guest.call(&acquire("", &path, 0)).expect_ok();
    scene.share.wait_locks(&["x write"], "granted");
    for directory in ["/run/share", "/run/other"] {
        let unmounted = scene
            .host
            .namespace
            .command("umount")
            .args(["-l", directory])
            .status();
        assert!(unmounted.expect("run umount").success());
    }
    scene.share.hang(Operation::Unlock);
    scene.guest.post(&release("", &path));
    scene.share.wait_hanging(Operation::Unlock);
    let mut bystander = scene.another(1);
    let disk = scene.host.disk("local");
    bystander.call(&acquire("", &disk, 0)).expect_ok();
    bystander.call(&release("", &disk)).expect_ok();
    scene.share.mend_all();
    scene.guest.receive().expect_ok();
    scene.share.wait_locks(&[], "given back");
    scene.share.wait_closed("given back");
}

/// What a guest that another process speaks for holds is freed when that is dead, also if it was being given back.
#[test]
fn who_dies_while_its_lock_is_given_back_for_it_leaves_nothing() {
    let Some(mut scene) = Scene::new(VARIANTS[0]) else {
        return;
    };
    let path = scene.share.path("x");
    scene.share.put("x");
    let mut guest = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .expect("start a guest");
    let pid = i32::try_from(guest.id()).expect("a pid");
    let mut manager = scene.daemon.client();
    manager.call(&register_as("lent", pid)).expect_ok();
    manager.call(&acquire("", &path, 0)).expect_ok();
    scene.share.wait_locks(&["x write"], "granted");
    scene.share.hang(Operation::Unlock);
    manager.post(&release("", &path));
    scene.share.wait_hanging(Operation::Unlock);
    guest.kill().expect("kill the guest");
    guest.wait().expect("wait for the guest");
    // By then the daemon knows that it is dead.
    scene.others_are_served();
    scene.others_are_served();
    scene.share.mend_all();
    // Whichever was first.
    let _ = reply(&mut manager);
    scene.nothing_is_left(&UNLOCKS, "its owner is dead");
    let said = || scene.daemon.stderr();
    wait_until(DEADLINE, "the end of what it left to be told", || {
        said().contains(&format!("pid {pid}) is dead: 1 of its locks"))
    });
    let mut next = scene.another(1);
    next.call(&acquire("", &path, 0)).expect_ok();
    next.call(&release("", &path)).expect_ok();
    scene.nothing_is_left(&UNLOCKS, "given back");
}
