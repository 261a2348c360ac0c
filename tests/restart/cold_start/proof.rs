//! Nobody is sent a signal by a start after the death of all who is not proved to be the process that the ledger
//! means, and no lock is let go because that could not be proved. The ledgers are those of a daemon that was
//! killed, with what it knew of processes changed.

use super::*;
use crate::support::daemon::Main;
use virtlockd::custody::clients::Arrival;
use virtlockd::custody::descriptor::Number;
use virtlockd::custody::event::{Event, Here};
use virtlockd::custody::fences::{Fence, Watched};
use virtlockd::custody::ledger::{self, Ledger};
use virtlockd::host::clock::Moment;
use virtlockd::host::process::{self, Life};

/// A descriptor that the ledger does not speak of.
const FREE: Number = Number(900);

impl Scene {
    /// Changes what the ledger says.
    fn rewrite(&self, change: impl FnOnce(&mut Vec<Event<'_>>)) {
        let content = std::fs::read(self.ledger()).expect("read the ledger");
        let state = ledger::replay(&content).expect("it is whole");
        let mut events: Vec<Event<'_>> = state.entries().collect();
        change(&mut events);
        let mut changed = Ledger::new().expect("memory for a ledger");
        changed.rewrite(events.iter().cloned()).expect("write it");
        std::fs::write(self.ledger(), changed.content()).expect("put it in place");
    }

    /// Waits until it is written down that an owner is being fenced, and nothing more is to be.
    fn wait_for_fence(&self, pid: i32) {
        wait_until(DEADLINE, "the fence to begin", || {
            let content = std::fs::read(self.ledger()).expect("read the ledger");
            let mut said = ledger::replay(&content).into_iter();
            said.any(|state| {
                let mut clients = state.clients();
                state.fences().contains_key(&pid)
                    && state.lives().contains_key(&pid)
                    && !clients.any(|(_, client)| client.is_over())
            })
        });
    }

    /// Starts the daemon again with words in front of its program that make it another place.
    fn start_in(&mut self, words: &[&str]) {
        let (first, rest) = words.split_first().expect("a program");
        self.daemon = Daemon::start_program(
            std::path::Path::new(first),
            &self.host.namespace,
            &[rest, &[support::upgrade::PROGRAM]].concat(),
            &[],
        );
        self.daemon.wait_until_asleep();
    }

    #[track_caller]
    fn assert_not_logged(&self, words: &str) {
        let log = self.daemon.stderr();
        assert!(!log.contains(words), "'{words}' is in the log:\n{log}");
    }
}

/// When a process started, clock ticks since boot.
fn start(pid: i32) -> u64 {
    process::start_time(pid).expect("it is there")
}

/// How the process that made the owner's connection was known.
fn life_of_client<'a>(events: &'a mut [Event<'_>]) -> &'a mut Life {
    let life = events.iter_mut().find_map(|event| match event {
        Event::ClientIs(_, life) => Some(life),
        _ => None,
    });
    life.expect("it is written down")
}

fn another(life: Life) -> Life {
    match life {
        Life::Inode(inode) => Life::Inode(inode + 1),
        Life::Start(start) => Life::Start(start + 1),
        Life::Fresh(start) => Life::Fresh(start + 1),
    }
}

fn change_here(events: &mut [Event<'_>], change: impl FnOnce(&mut Here)) {
    let here = events.iter_mut().find_map(|event| match event {
        Event::Here(here) => Some(here),
        _ => None,
    });
    change(here.expect("it is written down"));
}

/// The owner's connection once more, as an earlier process of its number would have left it open.
fn add_connection(events: &mut Vec<Event<'_>>, life: Life) {
    let arrival = events.iter().find_map(|event| match event {
        Event::ClientIs(number, _) => events.iter().find_map(|event| match event {
            Event::Connected(it, arrival) if it == number => Some(*arrival),
            _ => None,
        }),
        _ => None,
    });
    let registered = events.iter().find_map(|event| match event {
        Event::Registered(_, owner) => Some(Event::Registered(FREE, *owner)),
        _ => None,
    });
    let arrival = Arrival {
        id: 99,
        ..arrival.expect("a client")
    };
    events.push(Event::Connected(FREE, arrival));
    events.push(registered.expect("an owner"));
    events.push(Event::ClientIs(FREE, life));
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It is sent SIGTERM.
    Fenced,
    /// It lives, and has its lock.
    Kept,
    /// It is another process: it lives, and has nothing.
    Freed,
}

type Change = fn(&mut Vec<Event<'_>>, i32);

/// What may be known of an owner, and what becomes of it when it is to be fenced.
fn changes() -> Vec<(&'static str, Change, Outcome)> {
    use Outcome::{Fenced, Freed, Kept};
    fn remove(events: &mut Vec<Event<'_>>, which: fn(&Event<'_>) -> bool) {
        events.retain(|event| !which(event));
    }
    vec![
        ("as it was", |_, _| (), Fenced),
        (
            "its start",
            |events, pid| *life_of_client(events) = Life::Start(start(pid)),
            Fenced,
        ),
        (
            "another start",
            |events, pid| *life_of_client(events) = Life::Start(start(pid) + 1),
            Freed,
        ),
        (
            "a start that another one may have had, too",
            |events, pid| *life_of_client(events) = Life::Fresh(start(pid)),
            Kept,
        ),
        (
            "another such start",
            |events, pid| *life_of_client(events) = Life::Fresh(start(pid) - 1),
            Freed,
        ),
        (
            "another inode",
            |events, _| {
                let life = life_of_client(events);
                *life = another(*life);
            },
            Freed,
        ),
        (
            "nothing, as it could not be had when it registered",
            |events, _| remove(events, |it| matches!(it, Event::ClientIs(..))),
            Kept,
        ),
        (
            "all, but of no boot that is known",
            |events, _| change_here(events, |here| here.boot = None),
            Kept,
        ),
        (
            "all, but in no pid namespace that is known",
            |events, _| change_here(events, |here| here.namespace = None),
            Kept,
        ),
        (
            "all, but in another pid namespace",
            |events, _| change_here(events, |here| here.namespace = Some(1)),
            Kept,
        ),
        (
            "another one, in another pid namespace",
            |events, _| {
                change_here(events, |here| here.namespace = Some(1));
                let life = life_of_client(events);
                *life = another(*life);
            },
            Kept,
        ),
        (
            "all, but nobody has said where",
            |events, _| remove(events, |it| matches!(it, Event::Here(_))),
            Kept,
        ),
        (
            "that an earlier one of its number had the domain, too",
            |events, _| add_connection(events, Life::Inode(1)),
            Kept,
        ),
        (
            "that its number means another one to somebody",
            |events, pid| {
                let watched = Watched { pid, process: None };
                events.push(Event::Watched(watched));
            },
            Kept,
        ),
        (
            "that it stands for another domain than the one that has the lock",
            |events, _| {
                for event in events.iter_mut() {
                    if let Event::Registered(_, owner) = event {
                        owner.uuid[0] ^= 1;
                    }
                }
            },
            Kept,
        ),
    ]
}

#[track_caller]
fn assert_outcome(scene: &Scene, owner: &mut Owner, disk: &str, known: &str, outcome: Outcome) {
    if outcome == Outcome::Fenced {
        assert_eq!(owner.wait_signal(), Some(Signal::SIGTERM as i32), "{known}");
        scene.host.wait_free(disk);
        return;
    }
    scene.assert_not_logged("is sent SIGTERM");
    assert!(owner.is_alive(), "{known}");
    let is_kept = outcome == Outcome::Kept;
    assert_eq!(scene.lock(disk), is_kept.then_some(true), "{known}");
}

#[test]
fn who_is_robbed_is_fenced_if_it_is_proved_to_be_the_one_and_else_keeps_what_it_has() {
    // A start waits for two seconds before it believes that somebody was robbed.
    std::thread::scope(|scope| {
        for some in changes().chunks(4) {
            let some = some.to_vec();
            scope.spawn(move || some.into_iter().for_each(rob));
        }
    });
}

fn rob((known, change, outcome): (&str, Change, Outcome)) {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [robbed, kept] = ["robbed", "kept"].map(|name| scene.host.disk(name));
    let mut victim = scene.owner("victim", &[("", &robbed, 0), ("", &kept, 0)]);
    let pid = victim.pid();
    scene.kill();
    let _thief = support::foreign_lock(&scene.host.path(&robbed), true);
    scene.rewrite(|events| change(events, pid));
    scene.start();
    assert_outcome(&scene, &mut victim, &kept, known, outcome);
    if outcome == Outcome::Kept {
        scene.assert_logged("stop one of them by hand");
    }
}

#[test]
fn who_left_is_fenced_if_it_is_proved_to_be_the_one_and_else_keeps_what_it_has() {
    let leaves: Change = |events, _| {
        let over: Vec<Event<'_>> = events
            .iter()
            .filter_map(|event| match event {
                Event::Registered(number, _) => Some(Event::Leaving(*number)),
                _ => None,
            })
            .collect();
        events.extend(over);
    };
    let mut changes = changes();
    // The process of the number now is another one than the one that left.
    changes.push((
        "that another one of its number left",
        |events, _| {
            add_connection(events, Life::Inode(1));
            events.push(Event::Leaving(FREE));
        },
        Outcome::Kept,
    ));
    let last = changes.len() - 1;
    for (place, (known, change, outcome)) in changes.into_iter().enumerate() {
        // What is known of somebody else does not matter, nor who has the lock.
        let outcome = match known {
            "that an earlier one of its number had the domain, too" => Outcome::Fenced,
            "that it stands for another domain than the one that has the lock" => continue,
            _ => outcome,
        };
        let Some(mut scene) = Scene::new() else {
            return;
        };
        let disk = scene.host.disk("disk");
        let mut owner = scene.owner("leaver", &[("", &disk, 0)]);
        let pid = owner.pid();
        scene.kill();
        scene.rewrite(|events| {
            if place != last {
                leaves(events, pid);
            }
            change(events, pid);
        });
        scene.start();
        assert_outcome(&scene, &mut owner, &disk, known, outcome);
    }
}

#[test]
fn a_fence_goes_on_against_the_one_that_it_was_begun_for_and_nobody_else() {
    use Outcome::{Fenced, Freed, Kept};
    fn life<'a>(events: &'a mut [Event<'_>]) -> &'a mut Life {
        let life = events.iter_mut().find_map(|event| match event {
            Event::OwnerIs(_, life) => Some(life),
            _ => None,
        });
        life.expect("it is written down")
    }
    let cases: [(&str, Change, Outcome); 7] = [
        ("as it was", |_, _| (), Fenced),
        (
            "another one",
            |events, _| *life(events) = another(*life(events)),
            Freed,
        ),
        (
            "a start that another one may have had, too",
            |events, pid| *life(events) = Life::Fresh(start(pid)),
            Kept,
        ),
        (
            "nothing",
            |events, _| events.retain(|it| !matches!(it, Event::OwnerIs(..))),
            Kept,
        ),
        (
            "all, but of no boot that is known",
            |events, _| change_here(events, |here| here.boot = None),
            Kept,
        ),
        (
            "all, but in no pid namespace that is known",
            |events, _| change_here(events, |here| here.namespace = None),
            Kept,
        ),
        (
            "another one, and that there is one of its number with a connection",
            |events, pid| {
                let own = *life(events);
                *life(events) = another(own);
                let owner = events.iter().find_map(|event| match event {
                    Event::Granted { owner, .. } => Some(*owner),
                    _ => None,
                });
                let owner = owner.expect("it holds a lock");
                let peer = virtlockd::host::stream::Peer {
                    pid,
                    uid: 0,
                    gid: 0,
                };
                let arrival = Arrival {
                    server: virtlockd::custody::servers::Service::Lock,
                    id: 99,
                    peer: Some(peer),
                    start_time: None,
                    connected_at: 0,
                    refused: false,
                };
                events.push(Event::Connected(FREE, arrival));
                events.push(Event::Registered(FREE, owner));
                events.push(Event::ClientIs(FREE, own));
            },
            Kept,
        ),
    ];
    for (known, change, outcome) in cases {
        let Some(mut scene) = Scene::new() else {
            return;
        };
        let disk = scene.host.disk("disk");
        let mut owner = Owner::register(scene.daemon.lock_socket(), "undead", OnTerm::Ignore);
        owner.call(&acquire("", &disk, 0)).expect_ok();
        owner.close_connection();
        scene.wait_for_fence(owner.pid());
        scene.kill();
        let pid = owner.pid();
        scene.rewrite(|events| {
            // Its time is over.
            for event in events.iter_mut() {
                if let Event::Fencing(fence) = event {
                    *fence = Fence {
                        next_step: Moment(0),
                        ..*fence
                    };
                }
            }
            change(events, pid);
        });
        scene.start();
        if outcome == Fenced {
            assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32), "{known}");
            continue;
        }
        scene.assert_not_logged("is sent SIGKILL");
        assert!(owner.is_alive(), "{known}");
        let is_kept = outcome == Kept;
        assert_eq!(scene.lock(&disk), is_kept.then_some(true), "{known}");
        assert_eq!(scene.logged("none is sent a signal"), is_kept, "{known}");
    }
}

#[test]
fn what_is_no_guest_s_process_is_sent_nothing_and_its_lock_is_kept() {
    // Of the kernel, of nobody, and of a group.
    for pid in [2, 0, -2] {
        if pid == 2 && process::name(2).as_deref() != Some(b"kthreadd") {
            continue;
        }
        let Some(mut scene) = Scene::new() else {
            return;
        };
        let [robbed, kept] = ["robbed", "kept"].map(|name| scene.host.disk(name));
        let mut helper = scene.daemon.client();
        helper.call(&register_as("odd", pid)).expect_ok();
        helper.call(&acquire("", &robbed, 0)).expect_ok();
        helper.call(&acquire("", &kept, 0)).expect_ok();
        scene.kill();
        let _thief = support::foreign_lock(&scene.host.path(&robbed), true);
        scene.rewrite(|events| {
            // As if it had been watched.
            for event in events.iter_mut() {
                if let Event::Watched(watched) = event {
                    watched.process = watched.process.or(Some(FREE));
                }
            }
            if pid != 2 {
                events.push(Event::OwnerIs(pid, Life::Inode(1)));
                events.push(Event::OwnerIs(pid, Life::Start(1)));
            }
        });
        scene.start();
        scene.assert_not_logged("is sent SIGTERM");
        scene.assert_logged("stop one of them by hand");
        assert_eq!(scene.lock(&kept), Some(true), "{pid}");
    }
}

#[test]
fn in_another_pid_namespace_no_process_is_taken_for_an_owner_and_every_lock_is_kept() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [robbed, kept] = ["robbed", "kept"].map(|name| scene.host.disk(name));
    let mut owner = scene.owner("outside", &[("", &robbed, 0), ("", &kept, 0)]);
    let mut undead = Owner::register(scene.daemon.lock_socket(), "undead", OnTerm::Ignore);
    let fenced = scene.host.disk("fenced");
    undead.call(&acquire("", &fenced, 0)).expect_ok();
    undead.close_connection();
    scene.wait_for_fence(undead.pid());
    scene.kill();
    let _thief = support::foreign_lock(&scene.host.path(&robbed), true);
    // There the numbers of both are others'.
    const SCRIPT: &str = "import ctypes, os, struct, sys
for number in sys.argv[1:3]:
    wanted = ctypes.c_int(int(number))
    words = [0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(wanted), 1, 0]
    arguments = ctypes.create_string_buffer(struct.pack('11Q', *words))
    pid = ctypes.CDLL(None).syscall(435, arguments, 88)
    if pid == 0:
        os.execvp('sleep', ['sleep', '1000'])
    assert pid == int(number)
os.execv(sys.argv[3], sys.argv[3:])";
    let numbers = [owner.pid(), undead.pid()].map(|pid| pid.to_string());
    let unshare = ["unshare", "-p", "-f", "--kill-child", "--mount-proc"];
    let script = ["/usr/bin/python3", "-c", SCRIPT, &numbers[0], &numbers[1]];
    scene.start_in(&[&unshare[..], &script].concat());
    // Past the time of the fence, had it gone on.
    std::thread::sleep(std::time::Duration::from_millis(2000));
    assert!(owner.is_alive() && undead.is_alive());
    for disk in [&kept, &fenced] {
        assert_eq!(scene.lock(disk), Some(true), "{disk}");
    }
    let inside = Main::of(scene.daemon.reactor()).expect("the main process there");
    let others = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", inside.pid));
    let others = others.expect("the children of the main process");
    // Those of the two numbers, and the process that serves.
    assert_eq!(others.split_whitespace().count(), 3, "{others}");
    scene.assert_not_logged("is sent SIG");
    scene.assert_logged("cannot be fenced");
    scene.assert_logged("none is sent a signal");
    drop(owner);
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(scene.lock(&kept), Some(true), "nobody saw its death");
}

#[test]
fn in_another_time_namespace_a_start_is_the_same_start_and_a_fence_has_its_time() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !std::path::Path::new("/proc/self/ns/time").exists() {
        return skip("this kernel has no time namespaces");
    }
    let [robbed, kept, fenced] = ["robbed", "kept", "fenced"].map(|name| scene.host.disk(name));
    let mut victim = scene.owner("victim", &[("", &robbed, 0)]);
    let mut owner = scene.owner("owner", &[("", &kept, 0)]);
    let mut undead = Owner::register(scene.daemon.lock_socket(), "undead", OnTerm::Ignore);
    undead.call(&acquire("", &fenced, 0)).expect_ok();
    undead.close_connection();
    scene.wait_for_fence(undead.pid());
    scene.kill();
    let _thief = support::foreign_lock(&scene.host.path(&robbed), true);
    let by_peer = [victim.pid(), owner.pid()];
    scene.rewrite(|events| {
        let of_client = |events: &[Event<'_>], number: Number| {
            events.iter().find_map(|event| match event {
                Event::Connected(it, arrival) if *it == number => arrival.peer.map(|it| it.pid),
                _ => None,
            })
        };
        for place in 0..events.len() {
            if let Event::ClientIs(number, _) = events[place] {
                let pid = of_client(events, number).expect("a peer");
                assert!(by_peer.contains(&pid));
                events[place] = Event::ClientIs(number, Life::Start(start(pid)));
            }
        }
    });
    // The monotonic clock is behind there, as if the host had just been started.
    let uptime = std::fs::read_to_string("/proc/uptime").expect("how long the host is up");
    let whole = uptime.split('.').next().and_then(|it| it.parse().ok());
    let seconds: i64 = whole.expect("seconds");
    let behind = format!("--monotonic=-{}", seconds - 10);
    scene.start_in(&["unshare", "-T", "--boottime=1000000", &behind]);
    assert_eq!(victim.wait_signal(), Some(Signal::SIGTERM as i32));
    assert_eq!(scene.lock(&kept), Some(true));
    assert!(owner.is_alive());
    assert_eq!(undead.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.host.wait_free(&fenced);
}
