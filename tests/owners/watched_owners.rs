//! Owners that hold something and have no connection of their own, as guests whose own connection went
//! with an earlier daemon: whose death frees their locks, and whose frees nothing. And what libvirtd
//! does on behalf of a guest that runs already, when there is no room for a new one.

use crate::support;
use crate::support::client::{
    Call, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, SHARED, acquire, register_as, release,
};
use crate::support::daemon::{Daemon, WATCHED, c_daemon, program};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{Host, PROGRAM, helper_client, upgrade};
use crate::support::{
    DEADLINE, lock_probe, require_root, require_strace, skip, wait_for, wait_until,
};
use nix::sys::signal::Signal;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A number that no process can have (PID_MAX_LIMIT is 4194304).
const NOBODY: i32 = 4_200_000;
/// What the log says of an owner whose death frees nothing.
const UNSEEN: &str = "its death frees nothing";

/// A process that does nothing, as a guest is to somebody who only knows its number.
struct Guest(Child);

impl Guest {
    fn start() -> Guest {
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        Guest(child.expect("start a process"))
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("a pid is an i32")
    }

    /// It stays a zombie.
    fn kill(&mut self) {
        self.0.kill().expect("kill the process");
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().expect("look at the process").is_none()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon whose program can be exchanged.
struct Scene {
    host: Host,
    daemon: Daemon,
}

impl Scene {
    /// `None`, with a skip, where there can be no daemon of its own.
    fn new() -> Option<Scene> {
        Scene::of(&program())
    }

    fn of(program: &Path) -> Option<Scene> {
        if !is_ours() {
            return None;
        }
        let host = Host::with(program);
        let daemon = host.start(&[], &[]);
        Some(Scene { host, daemon })
    }

    fn configured(config: &str) -> Option<Scene> {
        if !is_ours() {
            return None;
        }
        let host = Host::new();
        let daemon = host.start_configured(config);
        Some(Scene { host, daemon })
    }

    /// Takes a lock for a domain over a connection that libvirtd would make, and close.
    fn lend(&self, name: &str, pid: i32, disk: &str) {
        let mut client = helper_client(&self.daemon, name, pid);
        client.call(&acquire("", disk, 0)).expect_ok();
    }

    fn give_back(&self, name: &str, pid: i32, disk: &str) {
        let mut client = helper_client(&self.daemon, name, pid);
        client.call(&release("", disk)).expect_ok();
        drop(client);
        self.daemon.wait_until_asleep();
    }

    /// How many lines of the daemon's log contain all of these.
    fn logged(&self, words: &[&str]) -> usize {
        let log = self.daemon.stderr();
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        log.lines().filter(has_all).count()
    }

    /// How many pidfds the daemon has open.
    fn pidfds(&self) -> usize {
        self.daemon.wait_until_asleep();
        let directory = format!("/proc/{}/fd", self.daemon.pid());
        let links = std::fs::read_dir(directory).expect("list the daemon's descriptors");
        links
            .filter_map(|link| std::fs::read_link(link.ok()?.path()).ok())
            .filter(|target| {
                let target = target.to_string_lossy();
                target.contains("[pidfd]") || target.starts_with("pidfd:")
            })
            .count()
    }
}

/// True where the rules of this file hold: libvirt's daemon watches nobody.
fn is_ours() -> bool {
    let theirs = c_daemon().is_some_and(|path| path == program());
    if theirs {
        skip("libvirt's own daemon watches no owner");
    }
    !theirs && require_root()
}

#[test]
fn the_locks_of_an_owner_without_a_connection_of_its_own_are_free_when_it_is_dead() {
    let Some(scene) = Scene::new() else { return };
    let [one, two, other] = ["one", "two", "other"].map(|name| scene.host.disk(name));
    let (mut guest, bystander) = (Guest::start(), Guest::start());
    scene.lend("guest", guest.pid(), &one);
    scene.lend("guest", guest.pid(), &two);
    scene.lend("other", bystander.pid(), &other);
    assert_eq!(scene.pidfds(), 2, "each owner is watched once");
    // Not by the end of the connection over which they were taken, and of nobody else.
    scene.host.assert_held(&one);
    guest.kill();
    for disk in [&one, &two] {
        scene.host.wait_free(disk);
    }
    scene.host.assert_held(&other);
    assert_eq!(scene.pidfds(), 1);
    assert_eq!(
        scene.logged(&["Domain 'guest'", "is dead: 2 of its locks are free"]),
        1
    );
    assert_eq!(scene.logged(&[UNSEEN]), 0);
}

#[test]
fn an_owner_is_watched_only_while_it_holds_something_and_has_no_connection_of_its_own() {
    let Some(scene) = Scene::new() else { return };
    let [one, two, own] = ["one", "two", "own"].map(|name| scene.host.disk(name));
    let mut guest = Guest::start();
    // Who takes and releases again and again over one connection is not watched as often.
    let mut client = helper_client(&scene.daemon, "guest", guest.pid());
    client.call(&acquire("", &one, 0)).expect_ok();
    client.call(&release("", &one)).expect_ok();
    client.call(&acquire("", &one, 0)).expect_ok();
    scene.lend("guest", guest.pid(), &two);
    drop(client);
    scene.give_back("guest", guest.pid(), &one);
    assert_eq!(scene.pidfds(), 1);
    scene.give_back("guest", guest.pid(), &two);
    assert_eq!(scene.pidfds(), 0, "it holds nothing any more");

    let mut owner = Owner::register(scene.daemon.lock_socket(), "owner", OnTerm::Die);
    scene.lend("owner", owner.pid(), &own);
    assert_eq!(scene.pidfds(), 0, "it has a connection of its own");
    owner.call(&register_as("owner", owner.pid())).expect_ok();
    assert_eq!(scene.pidfds(), 0, "it still has");
    owner.call(&register_as("another", NOBODY)).expect_ok();
    assert_eq!(scene.pidfds(), 1, "it speaks for another one now");
    owner.kill();
    scene.host.wait_free(&own);

    client = helper_client(&scene.daemon, "guest", guest.pid());
    client.call(&acquire("", &one, 0)).expect_ok();
    client.call(&release("", &one)).expect_ok();
    guest.kill();
    wait_until(DEADLINE, "the end of the watch", || scene.pidfds() == 0);
    let nothing = scene.logged(&["is dead: 0 of"]);
    assert_eq!(nothing, 0, "that one that held nothing is dead is no news");
}

#[test]
fn an_owner_that_had_a_connection_of_its_own_with_the_lock_before_is_watched_when_it_is_over() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let mut owner = Owner::register(scene.daemon.lock_socket(), "owner", OnTerm::Die);
    let mut client = helper_client(&scene.daemon, "owner", owner.pid());
    client.call(&acquire("", &disk, 0)).expect_ok();
    client.call(&release("", &disk)).expect_ok();
    assert_eq!(scene.pidfds(), 0, "it has a connection of its own");
    // It holds nothing, so that it is not fenced for that.
    owner.close_connection();
    scene.daemon.wait_until_asleep();
    client.call(&acquire("", &disk, 0)).expect_ok();
    assert_eq!(scene.pidfds(), 1, "it has none any more");
    owner.kill();
    scene.host.wait_free(&disk);
}

#[test]
fn an_owner_that_is_watched_is_watched_on_by_the_next_programs() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let (mut guest, before) = (Guest::start(), scene.host.disk("before"));
    let mut ends_meanwhile = Guest::start();
    scene.lend("guest", guest.pid(), &disk);
    scene.lend("ends", ends_meanwhile.pid(), &before);
    for _ in 0..2 {
        upgrade(&scene.daemon);
        assert_eq!(scene.pidfds(), 2);
        scene.host.assert_held(&disk);
    }
    // Its death falls between the programs.
    scene.daemon.signal(Signal::SIGSTOP);
    scene.daemon.signal(Signal::SIGUSR1);
    ends_meanwhile.kill();
    scene.daemon.signal(Signal::SIGCONT);
    scene.host.wait_free(&before);
    guest.kill();
    scene.host.wait_free(&disk);
}

#[test]
fn an_owner_that_libvirts_daemon_did_not_watch_is_watched_from_the_take_over_on() {
    let Some(theirs) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let Some(scene) = Scene::of(&theirs) else {
        return;
    };
    let [disk, dead_disk, own_disk] = ["disk", "dead", "own"].map(|name| scene.host.disk(name));
    let (mut guest, mut dead) = (Guest::start(), Guest::start());
    let owner = scene.host.guest(&scene.daemon, "owner", &own_disk);
    scene.lend("guest", guest.pid(), &disk);
    scene.lend("dead", dead.pid(), &dead_disk);
    let dead_pid = dead.pid();
    dead.kill();
    dead.0.wait().expect("reap it: its number means nobody now");

    scene.host.install(&program());
    upgrade(&scene.daemon);
    wait_until(DEADLINE, "the owner to be watched", || scene.pidfds() == 1);
    // The document says of it no more than its number.
    let words = [&format!("Process {dead_pid}"), UNSEEN];
    assert_eq!(scene.logged(&words), 1);
    let known = scene.logged(&["holds locks and its process"]);
    assert_eq!(known, 1, "the others are watched, or have a connection");
    guest.kill();
    scene.host.wait_free(&disk);
    scene.host.assert_held(&dead_disk);
    scene.host.assert_held(&own_disk);
    drop(owner);
    scene.host.wait_free(&own_disk);
}

#[test]
fn an_owner_whose_death_frees_nothing_is_named_once_until_it_holds_nothing() {
    let Some(scene) = Scene::new() else { return };
    let [one, two] = ["one", "two"].map(|name| scene.host.disk(name));
    let mut times = 0;
    for pid in [NOBODY, 0, -7, 1, scene.daemon.pid()] {
        for _ in 0..2 {
            scene.lend("unseen", pid, &one);
            scene.lend("unseen", pid, &two);
            times += 1;
            let said = |words: &[&str]| scene.logged(words);
            assert_eq!(said(&["Domain 'unseen'", UNSEEN]), times, "{pid}");
            assert_eq!(scene.pidfds(), 0);
            if pid == NOBODY {
                upgrade(&scene.daemon);
                assert_eq!(
                    said(&[UNSEEN]),
                    times,
                    "an upgrade is no reason to say it again"
                );
            }
            for disk in [&one, &two] {
                scene.host.assert_held(disk);
                scene.give_back("unseen", pid, disk);
            }
        }
    }
}

/// A client in a pid namespace of its own, which lives as long as this.
struct Inner(Child);

impl Inner {
    /// It sends this, reads as many replies, and says so.
    fn start(scene: &Scene, calls: &[Call]) -> Inner {
        let script = "
import socket, struct, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
for call in sys.argv[2:]:
    peer.sendall(bytes.fromhex(call))
    length = struct.unpack('>I', peer.recv(4, socket.MSG_WAITALL))[0]
    peer.recv(length - 4, socket.MSG_WAITALL)
print('done', flush=True)
sys.stdin.read()";
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child", "python3", "-c", script])
            .arg(scene.daemon.lock_socket())
            .args(
                calls
                    .iter()
                    .map(|call| support::owner::to_hex(&call.frame(0))),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("start unshare");
        let mut line = String::new();
        let out = child.stdout.as_mut().expect("stdout is a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line)
            .expect("hear of the client");
        assert_eq!(line, "done\n");
        Inner(child)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_number_of_another_pid_namespace_is_not_taken_for_a_process_here() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let mut namesake = Guest::start();
    let calls = [register_as("inner", namesake.pid()), acquire("", &disk, 0)];
    let inner = Inner::start(&scene, &calls);
    assert_eq!(
        scene.logged(&["Domain 'inner'", "another pid namespace", UNSEEN]),
        1
    );
    assert_eq!(scene.pidfds(), 0);
    drop(inner);
    upgrade(&scene.daemon);
    assert_eq!(scene.pidfds(), 0, "nor after an upgrade");
    namesake.kill();
    namesake.0.wait().expect("reap it");
    scene.daemon.client().ping();
    scene.daemon.wait_until_asleep();
    scene.host.assert_held(&disk);
    assert_eq!(scene.logged(&[UNSEEN]), 1);
}

#[test]
fn an_owner_of_another_pid_namespace_keeps_its_lock_when_its_namesake_here_dies() {
    let Some(scene) = Scene::new() else { return };
    let [here, there] = ["here", "there"].map(|name| scene.host.disk(name));
    let mut namesake = Guest::start();
    scene.lend("here", namesake.pid(), &here);
    assert_eq!(scene.pidfds(), 1);
    let inner_calls = [
        with_uuid(register_as("inner", namesake.pid()), 9),
        acquire("", &there, 0),
    ];
    let _inner = Inner::start(&scene, &inner_calls);
    assert_eq!(scene.logged(&["another pid namespace", UNSEEN]), 1);
    assert_eq!(scene.pidfds(), 0);
    upgrade(&scene.daemon);
    namesake.kill();
    namesake.0.wait().expect("reap it");
    scene.daemon.client().ping();
    scene.daemon.wait_until_asleep();
    scene.host.assert_held(&there);
}

#[test]
fn a_number_of_another_pid_namespace_is_not_watched_behind_libvirts_daemon_either() {
    let Some(theirs) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let Some(scene) = Scene::of(&theirs) else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut namesake = Guest::start();
    let calls = [register_as("inner", namesake.pid()), acquire("", &disk, 0)];
    let _inner = Inner::start(&scene, &calls);
    scene.host.install(&program());
    upgrade(&scene.daemon);
    scene.daemon.client().ping();
    assert_eq!(scene.pidfds(), 0);
    assert_eq!(scene.logged(&["Domain 'inner'", UNSEEN]), 1);
    namesake.kill();
    scene.daemon.wait_until_asleep();
    scene.host.assert_held(&disk);
}

/// Starts a process that gets this number; `None`, with a skip, where numbers cannot be chosen.
fn guest_with_pid(pid: i32) -> Option<Guest> {
    let before = (pid - 1).to_string();
    wait_for(DEADLINE, "a process to get that pid", || {
        if let Err(error) = std::fs::write("/proc/sys/kernel/ns_last_pid", &before) {
            skip(&format!("cannot choose the pid of a process: {error}"));
            return Some(None);
        }
        let guest = Guest::start();
        (guest.pid() == pid).then_some(Some(guest))
    })
}

#[test]
fn a_later_owner_of_the_number_keeps_its_lock_when_the_locks_of_the_dead_one_go() {
    let Some(scene) = Scene::new() else { return };
    let [old, new] = ["old", "new"].map(|name| scene.host.disk(name));
    let mut first = Guest::start();
    let pid = first.pid();
    scene.lend("first", pid, &old);
    // The daemon hears of the one's death and of the other's call in the same moment.
    let mut client = scene.daemon.client();
    client.ping();
    scene.daemon.signal(Signal::SIGSTOP);
    first.kill();
    first.0.wait().expect("reap it");
    let second = guest_with_pid(pid);
    let calls = [
        register_as("second", pid).frame(1),
        acquire("", &new, 0).frame(2),
    ]
    .concat();
    client.send(&calls);
    scene.daemon.signal(Signal::SIGCONT);
    let Some(mut second) = second else { return };
    scene.host.wait_free(&old);
    wait_until(DEADLINE, "the lock of the second", || {
        support::lock_probe(&scene.host.path(&new)).is_some()
    });
    scene.daemon.wait_until_asleep();
    scene.host.assert_held(&new);
    assert!(second.runs(), "it has nothing to do with it");
    assert_eq!(scene.pidfds(), 1);
    second.kill();
    scene.host.wait_free(&new);
}

#[test]
fn without_a_descriptor_for_it_an_owner_is_watched_later() {
    if !is_ours() || !require_strace() {
        return;
    }
    let host = Host::new();
    let injection = "inject=pidfd_open:error=EMFILE:when=1..20";
    let words = [
        "-D",
        "-f",
        "-o",
        "/run/strace",
        "-e",
        "trace=pidfd_open",
        "-e",
        injection,
        PROGRAM,
    ];
    let env = [WATCHED, ("LIBVIRT_LOG_OUTPUTS", "2:stderr")];
    let daemon = Daemon::start_program(Path::new("strace"), &host.namespace, &words, &env);
    let scene = Scene { host, daemon };
    let disk = scene.host.disk("disk");
    let mut guest = Guest::start();
    scene.lend("guest", guest.pid(), &disk);
    scene.host.assert_held(&disk);
    wait_until(DEADLINE, "the owner to be watched", || scene.pidfds() == 1);
    guest.kill();
    scene.host.wait_free(&disk);
    assert_eq!(scene.logged(&[UNSEEN]), 0);
}

#[test]
fn an_owner_that_is_watched_and_has_a_connection_of_its_own_is_fenced_as_any_other() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let mut owner = Owner::connect(scene.daemon.lock_socket(), OnTerm::Ignore);
    scene.lend("owner", owner.pid(), &disk);
    owner.call(&register_as("owner", owner.pid())).expect_ok();
    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.host.wait_free(&disk);
    assert_eq!(scene.pidfds(), 0);
    wait_until(DEADLINE, "the log to say so", || {
        scene.logged(&["is dead: 1 of"]) == 1
    });
    assert_eq!(scene.logged(&["is dead: "]), 1, "once");
}

#[test]
fn an_owner_is_watched_also_if_its_client_names_another_one_in_the_same_breath() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let share = acquire("", &disk, SHARED);
    let mut holder = Owner::register(scene.daemon.lock_socket(), "holder", OnTerm::Die);
    holder.call(&share).expect_ok();
    let (mut guest, next) = (Guest::start(), Guest::start());
    let mut client = scene.daemon.client();
    // Who is known to be quick has more than one call worked on in a turn, if they are quick, too.
    client.ping();
    client.ping();
    let calls = [
        register_as("guest", guest.pid()),
        share,
        register_as("next", next.pid()),
    ];
    for reply in client.pipeline(&calls) {
        reply.expect_ok();
    }
    assert_eq!(scene.pidfds(), 1);
    holder.call(&release("", &disk)).expect_ok();
    assert!(lock_probe(&scene.host.path(&disk)).is_some(), "it is free");
    guest.kill();
    scene.host.wait_free(&disk);
}

#[test]
fn libvirts_daemon_is_told_of_the_locks_and_the_log_that_nobody_is_watched_any_more() {
    let Some(theirs) = c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let mut guest = Guest::start();
    scene.lend("guest", guest.pid(), &disk);
    upgrade(&scene.daemon);
    scene.host.install(&theirs);
    upgrade(&scene.daemon);
    // (A program with AddressSanitizer executes itself once more, which looks like an upgrade.)
    wait_until(DEADLINE, "the log to say so", || {
        scene.logged(&["watches no owner", "one of the 1"]) == 1
    });
    scene.host.assert_held(&disk);
    scene.daemon.client().ping();
    wait_until(DEADLINE, "nobody to be watched", || scene.pidfds() == 0);
    scene.host.install(&program());
    upgrade(&scene.daemon);
    guest.kill();
    scene.host.wait_free(&disk);
}

#[test]
fn a_daemon_that_ends_names_the_owners_that_it_leaves_without_locks() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut guest = Guest::start();
    scene.lend("guest", guest.pid(), &disk);
    scene.daemon.stop();
    assert!(guest.runs(), "as with libvirt's daemon");
    scene.host.assert_free(&disk);
    assert_eq!(
        scene.logged(&["Domain 'guest'", "loses its locks while it lives"]),
        1
    );
}

/// A client, and whether it was let in as this domain.
fn let_in(scene: &Scene, register: &Call) -> Option<Client> {
    let mut client = scene.daemon.client();
    let reply = client.call(register);
    if reply.is_ok() {
        return Some(client);
    }
    assert_eq!(
        (reply.error().code, reply.error().domain),
        (39, 7),
        "{reply:?}"
    );
    None
}

fn with_uuid(register: Call, first: u8) -> Call {
    match register {
        Call::Register {
            mut uuid,
            name,
            id,
            pid,
            flags,
        } => {
            uuid[0] = first;
            Call::Register {
                uuid,
                name,
                id,
                pid,
                flags,
            }
        }
        other => other,
    }
}

#[test]
fn at_the_limit_whoever_speaks_for_a_known_owner_is_served_and_nobody_else() {
    let Some(scene) = Scene::configured("max_clients = 2\n") else {
        return;
    };
    let [disk, lent] = ["disk", "lent"].map(|name| scene.host.disk(name));
    let mut suspended = scene.host.guest(&scene.daemon, "suspended", &disk);
    let by_itself = register_as("suspended", suspended.pid());
    let guest = Guest::start();
    let holder = register_as("holder", guest.pid());
    scene.lend("holder", guest.pid(), &lent);
    let idle = Owner::register(scene.daemon.lock_socket(), "idle", OnTerm::Die);

    // Neither another guest, nor another domain of the same process, nor a call of another kind.
    let fresh = Guest::start();
    assert!(let_in(&scene, &register_as("new", fresh.pid())).is_none());
    assert!(let_in(&scene, &with_uuid(holder.clone(), 9)).is_none());
    assert!(let_in(&scene, &with_uuid(by_itself.clone(), 9)).is_none());
    assert!(let_in(&scene, &acquire("", &lent, 0)).is_none());

    // One that holds something, and one that only has its connection: also all in one piece.
    let mut client = let_in(&scene, &holder).expect("its owner holds something");
    client.call(&release("", &lent)).expect_ok();
    assert!(
        let_in(&scene, &holder).is_none(),
        "nobody knows it any more"
    );
    client.call(&acquire("", &lent, 0)).expect_ok();
    let_in(&scene, &register_as("idle", idle.pid())).expect("its owner has a connection");
    for call in [release("", &disk), acquire("", &disk, 0)] {
        let replies = scene.daemon.client().pipeline(&[by_itself.clone(), call]);
        replies.iter().for_each(support::client::Reply::expect_ok);
    }
    // What it holds is not granted once more: a guest with one image as two disks is refused.
    let mut client = let_in(&scene, &by_itself).expect("its owner is known");
    client
        .call(&acquire("", &disk, 0))
        .expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    drop(client);

    // One that has not said anything before an upgrade is let in behind it.
    let mut silent = scene.daemon.client();
    scene.daemon.wait_until_asleep();
    upgrade(&scene.daemon);
    silent.call(&by_itself).expect_ok();
    assert!(let_in(&scene, &register_as("new", fresh.pid())).is_none());
    suspended.close_connection();
}

#[test]
fn without_descriptors_left_whoever_speaks_for_a_known_owner_is_served() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("disk");
    let owner = scene.host.guest(&scene.daemon, "owner", &disk);
    scene.daemon.wait_until_asleep();
    let limit = scene.daemon.descriptors() + 4;
    scene.daemon.limit(&format!("--nofile={limit}:"));
    let mut served = Vec::new();
    while let Some(client) = let_in(&scene, &register_as("new", NOBODY)) {
        served.push(client);
    }
    let calls = [register_as("owner", owner.pid()), release("", &disk)];
    let replies = scene.daemon.client().pipeline(&calls);
    replies.iter().for_each(support::client::Reply::expect_ok);
    scene.host.assert_free(&disk);
}

#[test]
fn not_many_more_than_the_limit_are_served_on_behalf_of_known_owners() {
    let Some(scene) = Scene::configured("max_clients = 3\n") else {
        return;
    };
    let owner = Owner::register(scene.daemon.lock_socket(), "owner", OnTerm::Die);
    let register = register_as("owner", owner.pid());
    let clients: Vec<Client> = std::iter::from_fn(|| let_in(&scene, &register))
        .take(200)
        .collect();
    assert_eq!(clients.len(), 2 + 64);
}
