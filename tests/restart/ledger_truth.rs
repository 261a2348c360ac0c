//! At every moment the ledger of a running daemon says what the daemon knows: it is read from
//! outside and replayed after each change.

use crate::support;
use crate::support::client::{Client, acquire, register_as, release, restrict};
use crate::support::daemon::Daemon;
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::{DEADLINE, wait_until};
use std::path::PathBuf;
use virtlockd::custody::descriptor::Saved;
use virtlockd::custody::fences::Stage;
use virtlockd::custody::ledger;
use virtlockd::custody::state::State;

fn ledger_file(daemon: &Daemon) -> PathBuf {
    let directory = format!("/proc/{}/fd", daemon.pid());
    std::fs::read_dir(&directory)
        .expect("list the daemon's descriptors")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| {
            std::fs::read_link(path)
                .is_ok_and(|target| target.to_string_lossy().contains("virtlockd-ledger"))
        })
        .expect("the daemon has a ledger")
}

fn state(daemon: &Daemon) -> State<Saved> {
    daemon.wait_until_asleep();
    let content = std::fs::read(ledger_file(daemon)).expect("read the ledger");
    ledger::replay(&content).expect("replay the ledger")
}

/// The clients that the ledger knows: name of the owner, if registered, and whether restricted.
fn clients(daemon: &Daemon) -> Vec<(Option<String>, bool)> {
    let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    state(daemon)
        .clients()
        .map(|(_, client)| {
            let owner = client.owner.as_ref().map(|owner| name(&owner.name));
            (owner, client.restricted)
        })
        .collect()
}

/// The resources that the ledger knows, each with the pids of its holders.
fn resources(daemon: &Daemon) -> Vec<(String, Vec<i32>)> {
    let mut resources: Vec<_> = state(daemon)
        .table()
        .iter()
        .map(|(_, resource)| {
            let name = String::from_utf8_lossy(resource.name()).into_owned();
            let mut holders: Vec<i32> = resource.holders().map(|(one, _)| one.pid).collect();
            holders.sort_unstable();
            (name, holders)
        })
        .collect();
    resources.sort();
    resources
}

fn quiet_daemon(namespace: &Namespace) -> Daemon {
    for name in ["/run/one", "/run/two"] {
        std::fs::write(namespace.path(name), "data").expect("write a disk");
    }
    let daemon = Daemon::start(namespace, &[], &[]);
    // The connection that waited for the start may still be open.
    wait_until(DEADLINE, "no client to be left", || {
        clients(&daemon).is_empty()
    });
    daemon
}

#[test]
fn a_ledger_knows_the_sockets_and_the_process_from_the_start() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    let daemon = quiet_daemon(&namespace);
    let state = state(&daemon);
    assert_eq!(state.listeners().len(), 2);
    assert!(!state.settings().program.is_empty());
    assert!(state.settings().pid_file.is_some());
    assert!(!state.settings().logging.default_output.is_empty());
}

#[test]
fn clients_that_come_and_go_come_and_go_in_the_ledger() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    let daemon = quiet_daemon(&namespace);
    let mut first = daemon.client();
    first.call(&register_as("first", 4242)).expect_ok();
    let owner = |name: &str| Some(name.to_owned());
    assert_eq!(clients(&daemon), [(owner("first"), false)]);
    // Each of these has the descriptor of the one before.
    for _ in 0..3 {
        let mut second = daemon.client();
        second.call(&register_as("second", 4243)).expect_ok();
        second.call(&restrict()).expect_ok();
        let both = [(owner("first"), false), (owner("second"), true)];
        assert_eq!(clients(&daemon), both);
        drop(second);
        wait_until(DEADLINE, "the second client to be gone", || {
            clients(&daemon) == [(owner("first"), false)]
        });
    }
    drop::<Client>(first);
    wait_until(DEADLINE, "the first client to be gone", || {
        clients(&daemon).is_empty()
    });
}

#[test]
fn locks_and_the_fencing_of_their_owners_are_in_the_ledger() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    let daemon = quiet_daemon(&namespace);
    let mut owner = Owner::register(daemon.lock_socket(), "hung", OnTerm::Ignore);
    let mut other = daemon.client();
    other.call(&register_as("other", 4242)).expect_ok();
    let pid = owner.pid();
    owner.call(&acquire("", "/run/one", 1)).expect_ok();
    other.call(&acquire("", "/run/one", 1)).expect_ok();
    owner.call(&acquire("", "/run/two", 0)).expect_ok();
    let mut both = vec![pid, 4242];
    both.sort_unstable();
    let one = ("/run/one".to_owned(), both);
    let two = ("/run/two".to_owned(), vec![pid]);
    assert_eq!(resources(&daemon), [one, two.clone()]);
    other.call(&release("", "/run/one")).expect_ok();
    let one = ("/run/one".to_owned(), vec![pid]);
    assert_eq!(resources(&daemon), [one, two]);

    owner.close_connection();
    let fences: Vec<_> = state(&daemon).fences().values().copied().collect();
    assert_eq!(fences.len(), 1);
    assert_eq!((fences[0].pid, fences[0].stage), (pid, Stage::Asked));
    assert_eq!(resources(&daemon).len(), 2);
    assert_eq!(owner.wait_signal(), Some(libc::SIGKILL));
    wait_until(DEADLINE, "the owner's locks to be free", || {
        state(&daemon).fences().is_empty() && resources(&daemon).is_empty()
    });
}

#[test]
fn the_ledger_knows_who_is_watched_and_who_cannot_be() {
    let namespace = Namespace::new();
    for disk in ["/run/one", "/run/two"] {
        std::fs::write(namespace.path(disk), "data").expect("write a disk");
    }
    let daemon = Daemon::start(&namespace, &[], &[]);
    let mut guest = Owner::connect(daemon.lock_socket(), OnTerm::Die);
    // Greater than any process id can be.
    let nobody = i32::MAX;
    for (disk, pid) in [("/run/one", guest.pid()), ("/run/two", nobody)] {
        let mut client = daemon.client();
        client.call(&register_as("guest", pid)).expect_ok();
        client.call(&acquire("", disk, 0)).expect_ok();
    }
    let watched = || {
        let state = state(&daemon);
        let watched = state.watched().values();
        let mut pids: Vec<_> = watched
            .map(|watched| (watched.pid, watched.process.is_some()))
            .collect();
        pids.sort_unstable();
        pids
    };
    assert_eq!(watched(), [(guest.pid(), true), (nobody, false)]);
    guest.kill();
    guest.wait_end();
    wait_until(DEADLINE, "the end of the watch", || {
        watched() == [(nobody, false)]
    });
    let mut client = daemon.client();
    client.call(&register_as("guest", nobody)).expect_ok();
    client.call(&release("", "/run/two")).expect_ok();
    drop(client);
    wait_until(DEADLINE, "the end of the other", || watched().is_empty());
}
