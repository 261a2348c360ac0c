//! What the admin socket promises beyond single replies: what it sets takes effect at once, what it
//! ends ends as it should, and neither many clients nor long messages nor a log that nobody takes
//! can stop the daemon.

use crate::support;
use crate::support::client::{
    ADMIN_PROGRAM, CALL, Client, Received, Reply, acquire, frame, put_string, put_u32, register,
    release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::{DEADLINE, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Procedures of the admin program.
const LOOKUP_SERVER: i32 = 5;
const SET_THREADPOOL: i32 = 7;
const LIST_CLIENTS: i32 = 8;
const CLIENT_CLOSE: i32 = 11;
const GET_CLIENT_LIMITS: i32 = 12;
const SET_CLIENT_LIMITS: i32 = 13;
const SET_LOG_OUTPUTS: i32 = 16;
const SET_LOG_FILTERS: i32 = 17;
const SET_TIMEOUT: i32 = 19;
const SHUTDOWN: i32 = 20;

/// A type of a parameter: an unsigned word.
const UINT: u32 = 2;

#[test]
fn a_raised_limit_lets_a_waiting_client_in_at_once() {
    let Some(scene) = Scene::with_one_client_allowed() else {
        return;
    };
    let mut first = scene.client_in();
    let mut second = scene.client_in();
    let mut admin = scene.daemon.admin_client();
    assert_eq!(
        lock_clients(&mut admin),
        1,
        "there is no room for a second one"
    );
    set_limits(&mut admin, 5, 5).expect_ok();
    assert_eq!(lock_clients(&mut admin), 2, "it is in before it calls");
    second.call(&register(4242)).expect_ok();
    first.call(&register(4243)).expect_ok();
}

#[test]
fn a_waiting_client_is_let_in_when_another_one_leaves() {
    let Some(scene) = Scene::with_one_client_allowed() else {
        return;
    };
    let first = scene.client_in();
    let mut second = scene.client_in();
    let mut admin = scene.daemon.admin_client();
    let before = client_ids(&mut admin);
    drop(first);
    wait_until(DEADLINE, "the second client to be in the list", || {
        let now = client_ids(&mut admin);
        now.len() == 1 && now != before
    });
    second.call(&register(4242)).expect_ok();
}

#[test]
fn a_lowered_limit_closes_nobody() {
    let Some(scene) = Scene::new("max_clients = 10\n") else {
        return;
    };
    let mut clients: Vec<Client> = (0..5).map(|_| scene.client_in()).collect();
    let mut admin = scene.daemon.admin_client();
    set_limits(&mut admin, 2, 2).expect_ok();
    for client in &mut clients {
        client.call(&register(4242)).expect_ok();
    }
    let refusal = scene.daemon.client().call(&register(4242));
    assert!(
        refusal.error().message.contains("limit of 2"),
        "{refusal:?}"
    );
}

#[test]
fn disconnecting_an_owner_fences_it_and_the_log_names_its_domain() {
    let Some(scene) = Scene::new("") else {
        return;
    };
    let disk = scene.disk();
    let mut owner = Owner::register(scene.daemon.lock_socket(), "vm-one", OnTerm::Die);
    owner.call(&acquire("", "/run/disk", 0)).expect_ok();
    let mut admin = scene.daemon.admin_client();
    let ids = client_ids(&mut admin);
    close_client(&mut admin, "virtlockd", ids[0]).expect_ok();
    assert_eq!(owner.wait_signal(), Some(libc::SIGTERM));
    wait_until(DEADLINE, "the lock to be free", || {
        support::lock_probe(&disk).is_none()
    });
    let log = scene.daemon.stderr();
    let line = log
        .lines()
        .find(|line| line.contains("is disconnected because the admin client"));
    let line = line.unwrap_or_else(|| panic!("no line about the disconnection in:\n{log}"));
    assert!(line.contains("'vm-one'"), "{line}");
}

#[test]
fn shutting_down_over_the_admin_socket_fences_owners_as_sigterm_does() {
    let Some(mut scene) = Scene::new("") else {
        return;
    };
    scene.disk();
    let mut owner = Owner::register(scene.daemon.lock_socket(), "vm-one", OnTerm::Die);
    owner.call(&acquire("", "/run/disk", 0)).expect_ok();
    let mut admin = scene.daemon.admin_client();
    admin.send(&call_frame(SHUTDOWN, &words(&[0])));
    admin.expect_closed();
    assert_eq!(owner.wait_signal(), Some(libc::SIGTERM));
    assert_eq!(scene.daemon.wait_end().code(), Some(0));
}

#[test]
fn a_timeout_that_was_taken_back_ends_nothing() {
    let Some(mut scene) = Scene::new("") else {
        return;
    };
    let mut admin = scene.daemon.admin_client();
    call(&mut admin, SET_TIMEOUT, &words(&[1, 0])).expect_ok();
    call(&mut admin, SET_TIMEOUT, &words(&[0, 0])).expect_ok();
    drop(admin);
    // That something does not happen can only be seen by waiting longer than it would take.
    std::thread::sleep(Duration::from_millis(1500));
    assert!(scene.daemon.ended().is_none());
    scene.client_in();
}

#[test]
fn odd_calls_are_answered_as_by_libvirts_daemon() {
    let (Some(ours), Some(c_daemon)) = (Scene::new(SAME_LIMITS), daemon::c_daemon()) else {
        support::skip("needs root, and libvirt's virtlockd to compare with");
        return;
    };
    let theirs = Scene::of(&c_daemon, SAME_LIMITS).expect("root, as before");
    let mut wrong = Vec::new();
    for (what, procedure, payload) in odd_calls() {
        let answer = |scene: &Scene| {
            let mut admin = scene.daemon.admin_client();
            admin.send(&call_frame(procedure, &payload));
            admin.receive_within(DEADLINE)
        };
        let (theirs, ours) = (answer(&theirs), answer(&ours));
        if theirs != ours {
            let shown = |received: &Received| format!("{received:?}")[..200].to_owned();
            wrong.push(format!("{what}:\n {}\n {}", shown(&theirs), shown(&ours)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Calls with several mistakes, or at a limit: which of them counts is part of the protocol.
fn odd_calls() -> Vec<(&'static str, i32, Vec<u8>)> {
    let uint = |field: &str, value: u32| parameter(field, UINT, &words(&[value]));
    let set = |parameters: &[Vec<u8>], flags: u32| set_payload("virtlockd", parameters, flags);
    let max = || uint("nclients_max", 7);
    let long = "z".repeat(80);
    let named = |bytes: usize| {
        let mut out = string(&"x".repeat(bytes));
        put_u32(&mut out, 0);
        out
    };
    let client_close = |server: &str, id: u64, flags: u32| {
        let mut out = client_named(server, id);
        out.extend(words(&[0, 0, 0, flags]));
        out
    };
    vec![
        (
            "two unknown fields",
            SET_CLIENT_LIMITS,
            set(&[uint("zz", 1), uint("aa", 1)], 0),
        ),
        (
            "twice, and a later unknown",
            SET_CLIENT_LIMITS,
            set(&[max(), max(), uint("zz", 1)], 0),
        ),
        (
            "twice, and an earlier unknown",
            SET_CLIENT_LIMITS,
            set(&[max(), max(), uint("aa", 1)], 0),
        ),
        (
            "twice, with another type",
            SET_CLIENT_LIMITS,
            set(&[max(), parameter("nclients_max", 1, &words(&[7]))], 0),
        ),
        (
            "an unknown between two known, one of a wrong type",
            SET_CLIENT_LIMITS,
            set(
                &[
                    uint("nclients_mb", 1),
                    parameter("nclients_unauth_max", 7, &string("x")),
                ],
                0,
            ),
        ),
        (
            "unknown flags and field",
            SET_CLIENT_LIMITS,
            set(&[uint("zz", 1)], 1),
        ),
        (
            "a long name and unknown flags",
            SET_CLIENT_LIMITS,
            set(&[uint(&long, 1)], 1),
        ),
        (
            "a long name behind an unknown one",
            SET_CLIENT_LIMITS,
            set(&[uint("a", 1), uint(&long, 1)], 0),
        ),
        (
            "a name of the greatest length",
            SET_CLIENT_LIMITS,
            set(&[uint(&long[1..], 1)], 0),
        ),
        (
            "a long name and an unknown server",
            SET_CLIENT_LIMITS,
            set_payload("nosuch", &[uint(&long, 1)], 1),
        ),
        (
            "too many workers of both kinds",
            SET_THREADPOOL,
            set(&[uint("maxWorkers", 1), uint("minWorkers", 2)], 0),
        ),
        (
            "unknown client and flags",
            CLIENT_CLOSE,
            client_close("virtlockd", 99, 1),
        ),
        (
            "unknown server and flags",
            CLIENT_CLOSE,
            client_close("nosuch", 1, 1),
        ),
        (
            "the longest name that leaves room for an error",
            LOOKUP_SERVER,
            named(4_194_304 - 64),
        ),
        (
            "a name that leaves no room for an error",
            LOOKUP_SERVER,
            named(4_194_304),
        ),
        ("a name above the limit", LOOKUP_SERVER, named(4_194_305)),
        ("any timeout", SET_TIMEOUT, words(&[u32::MAX, 0])),
        ("no timeout", SET_TIMEOUT, words(&[0, 0])),
    ]
}

#[test]
fn more_clients_than_a_reply_can_list_are_an_error_and_stall_nobody() {
    const LISTABLE: usize = 16384;
    const CLIENTS: usize = LISTABLE + 300;
    if !can_open(CLIENTS + 200) {
        support::skip("needs 17,000 open files a process");
        return;
    }
    let Some(scene) = Scene::new("max_clients = 18000\n") else {
        return;
    };
    let mut bystander = scene.client_in();
    let connect = || UnixStream::connect(scene.daemon.lock_socket()).expect("connect");
    let mut others: Vec<UnixStream> = (1..CLIENTS).map(|_| connect()).collect();
    let mut admin = scene.daemon.admin_client();
    wait_until(DEADLINE, "all clients to be in", || {
        lock_clients(&mut admin) as usize == CLIENTS
    });
    let expected = format!("internal error: Too many clients '{CLIENTS}' for limit '{LISTABLE}'");
    for wants_list in [0, 1] {
        let reply = call(
            &mut admin,
            LIST_CLIENTS,
            &list_payload("virtlockd", wants_list),
        );
        assert_eq!(reply.expect_error(1, 62), expected);
        bystander.ping();
    }
    others.truncate(LISTABLE - 1);
    wait_until(DEADLINE, "the rest to be gone", || {
        lock_clients(&mut admin) as usize == LISTABLE
    });
    let ids = client_ids(&mut admin);
    assert_eq!(ids.len(), LISTABLE);
    assert!(ids.is_sorted(), "in the order of connecting");
    bystander.ping();
}

#[test]
fn unfinished_messages_of_all_admin_clients_together_are_bounded() {
    const MIB: usize = 1024 * 1024;
    let Some(scene) = Scene::new("") else {
        return;
    };
    let unfinished = |megabytes: usize| {
        let mut bytes = vec![0; megabytes * MIB];
        bytes[..4].copy_from_slice(&(32 * MIB as u32).to_be_bytes());
        bytes
    };
    let mut patient = scene.daemon.admin_client();
    patient.send(&unfinished(31));
    let mut second = scene.daemon.admin_client();
    second.send(&unfinished(31));
    let mut third = scene.daemon.admin_client();
    assert!(
        third.try_send(&unfinished(31)).is_err(),
        "it is cut off on the way"
    );
    let size = scene.daemon.memory_kib("VmRSS");
    support::assert_memory(size < 256 * 1024, || format!("it takes {size} KiB"));
    let mut bystander = scene.client_in();
    bystander.ping();
    let log = scene.daemon.stderr();
    assert!(log.contains("more than 64 MiB"), "{log}");
    // Those that stayed below the bound are served, and what they gave back can be used again. Its
    // rest makes the first one's message whole: one for no program, whose length is all there is.
    drop(second);
    patient.send(&vec![0; MIB]);
    let reply = Reply::parse(&patient.receive());
    assert!(
        reply.error().message.starts_with("Cannot find program 0"),
        "{reply:?}"
    );
    let mut fourth = scene.daemon.admin_client();
    fourth.send(&unfinished(31));
    fourth.send(&vec![0; MIB]);
    Reply::parse(&fourth.receive()).error();
}

#[test]
fn replies_that_admin_clients_do_not_read_are_bounded() {
    let Some(scene) = Scene::new("") else {
        return;
    };
    // The name comes back twice in the error.
    let mut payload = string(&"x".repeat(4_194_304 - 64));
    put_u32(&mut payload, 0);
    let mut lazy: Vec<Client> = (0..10).map(|_| scene.daemon.admin_client()).collect();
    for client in &mut lazy {
        // A daemon that has had enough closes in the middle of it.
        let _ = client.try_send(&call_frame(LOOKUP_SERVER, &payload));
    }
    wait_until(DEADLINE, "the bound to be enforced", || {
        scene.daemon.stderr().contains("more than 64 MiB")
    });
    scene.client_in();
    drop(lazy);
    let mut admin = scene.daemon.admin_client();
    // Those who left count until the daemon has seen it; and a process that another test is just starting has
    // copies of their sockets until its exec.
    wait_until(DEADLINE, "those who left to be cleared away", || {
        clients_of(&mut admin, "admin") == 1
    });
    call(&mut admin, LOOKUP_SERVER, &payload).expect_error(95, 7);
}

#[test]
fn a_log_on_a_full_disk_never_stops_the_daemon() {
    let Some(scene) = Scene::new("") else {
        return;
    };
    let mut admin = scene.daemon.admin_client();
    set_log(&mut admin, SET_LOG_OUTPUTS, "1:file:/dev/full").expect_ok();
    set_log(&mut admin, SET_LOG_FILTERS, "1:locking 1:rpc 1:admin").expect_ok();
    refused_calls(&scene, 500);
    set_log(&mut admin, SET_LOG_OUTPUTS, "").expect_ok();
    refused_calls(&scene, 1);
}

#[test]
fn a_journal_that_nobody_reads_never_stops_the_daemon() {
    let Some(scene) = Scene::new("") else {
        return;
    };
    let directory = scene.namespace.path("/run/systemd/journal");
    std::fs::create_dir_all(&directory).expect("make the journal's directory");
    let _unread = UnixDatagram::bind(directory.join("socket")).expect("bind the journal's socket");
    let mut admin = scene.daemon.admin_client();
    set_log(&mut admin, SET_LOG_OUTPUTS, "1:journald").expect_ok();
    set_log(&mut admin, SET_LOG_FILTERS, "1:locking 1:rpc 1:admin").expect_ok();
    // Far more lines than the socket's queue takes.
    refused_calls(&scene, 2000);
    set_log(&mut admin, SET_LOG_OUTPUTS, "").expect_ok();
}

#[test]
fn no_line_is_lost_when_log_outputs_are_exchanged() {
    let Some(scene) = Scene::new("") else {
        return;
    };
    let mut admin = scene.daemon.admin_client();
    for round in 0..20 {
        let output = format!("3:file:/run/log.{}", round % 2);
        set_log(&mut admin, SET_LOG_OUTPUTS, &output).expect_ok();
        refused_calls(&scene, 10);
    }
    set_log(&mut admin, SET_LOG_OUTPUTS, "").expect_ok();
    let lines = |name: &str| {
        let text = std::fs::read_to_string(scene.namespace.path(name)).expect("read a log file");
        text.matches("lock owner details have not been registered")
            .count()
    };
    assert_eq!((lines("/run/log.0"), lines("/run/log.1")), (100, 100));
}

/// The limits of libvirt's daemon.
const SAME_LIMITS: &str = "max_clients = 1024\nadmin_max_clients = 5000\n";

/// A daemon in a namespace of its own.
struct Scene {
    daemon: Daemon,
    namespace: Namespace,
}

impl Scene {
    /// The daemon under test; `None`, with a skip, without root.
    fn new(config: &str) -> Option<Scene> {
        Scene::of(&daemon::program(), config)
    }

    fn of(program: &Path, config: &str) -> Option<Scene> {
        if !support::require_root() {
            return None;
        }
        let namespace = Namespace::new();
        let mut daemon = Daemon::start_configured(program, &namespace, config);
        let admin_socket = daemon.admin_socket().to_owned();
        daemon.wait_for_socket(&admin_socket);
        Some(Scene { daemon, namespace })
    }

    /// Its limit is reached with one client; the connection that waited for its start is gone.
    fn with_one_client_allowed() -> Option<Scene> {
        let scene = Scene::new("max_clients = 1\n")?;
        let mut admin = scene.daemon.admin_client();
        wait_until(DEADLINE, "the probe of the start to be gone", || {
            lock_clients(&mut admin) == 0
        });
        Some(scene)
    }

    /// A client of the lock server that the daemon has seen. It has made no call: a PING is none.
    fn client_in(&self) -> Client {
        let mut client = self.daemon.client();
        client.ping();
        client
    }

    /// Makes the file `/run/disk`; its path from outside.
    fn disk(&self) -> std::path::PathBuf {
        let path = self.namespace.path("/run/disk");
        std::fs::write(&path, "data").expect("write a disk");
        path
    }
}

/// Calls that are refused, each of which the log has a line about.
fn refused_calls(scene: &Scene, count: usize) {
    let end = Instant::now() + DEADLINE;
    let mut client = scene.daemon.client();
    for _ in 0..count {
        client.call(&release("", "/run/disk")).expect_error(55, 7);
        assert!(Instant::now() < end, "the log holds the daemon up");
    }
}

fn call_frame(procedure: i32, payload: &[u8]) -> Vec<u8> {
    frame(ADMIN_PROGRAM, 1, procedure, CALL, 1, 0, payload)
}

#[track_caller]
fn call(admin: &mut Client, procedure: i32, payload: &[u8]) -> Reply {
    admin.send(&call_frame(procedure, payload));
    Reply::parse(&admin.receive())
}

#[track_caller]
fn result(admin: &mut Client, procedure: i32, payload: &[u8]) -> Vec<u8> {
    match call(admin, procedure, payload) {
        Reply::Ok { payload } => payload,
        Reply::Error(error) => panic!("procedure {procedure} was refused: {error:?}"),
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_be_bytes())
        .collect()
}

fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, text.as_bytes());
    out
}

fn parameter(field: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [string(field), words(&[kind]), value.to_vec()].concat()
}

fn set_payload(server: &str, parameters: &[Vec<u8>], flags: u32) -> Vec<u8> {
    let count = words(&[parameters.len() as u32]);
    [string(server), count, parameters.concat(), words(&[flags])].concat()
}

fn list_payload(server: &str, wants_list: u32) -> Vec<u8> {
    [string(server), words(&[wants_list, 0])].concat()
}

fn client_named(server: &str, id: u64) -> Vec<u8> {
    [string(server), id.to_be_bytes().to_vec()].concat()
}

fn set_limits(admin: &mut Client, limit: u32, unauthenticated: u32) -> Reply {
    let parameters = [
        parameter("nclients_max", UINT, &words(&[limit])),
        parameter("nclients_unauth_max", UINT, &words(&[unauthenticated])),
    ];
    call(
        admin,
        SET_CLIENT_LIMITS,
        &set_payload("virtlockd", &parameters, 0),
    )
}

/// How many clients the lock server says that it has.
fn lock_clients(admin: &mut Client) -> u32 {
    clients_of(admin, "virtlockd")
}

/// The same of either server.
fn clients_of(admin: &mut Client, server: &str) -> u32 {
    let payload = [string(server), words(&[0])].concat();
    let limits = result(admin, GET_CLIENT_LIMITS, &payload);
    let name = &string("nclients")[..];
    let at = limits
        .windows(name.len())
        .position(|window| window == name)
        .expect("a count of clients");
    word(&limits[at + name.len() + 4..])
}

/// The numbers of the lock server's clients, in the order of the list.
fn client_ids(admin: &mut Client) -> Vec<u64> {
    let list = result(admin, LIST_CLIENTS, &list_payload("virtlockd", 1));
    let name = string("virtlockd").len();
    let size = name + 8 + 8 + 4;
    let (count, clients) = (word(&list) as usize, &list[4..list.len() - 4]);
    assert_eq!(clients.len(), count * size);
    let id =
        |client: &[u8]| u64::from_be_bytes(client[name..name + 8].try_into().expect("8 bytes"));
    clients.chunks(size).map(id).collect()
}

fn close_client(admin: &mut Client, server: &str, id: u64) -> Reply {
    let payload = [client_named(server, id), words(&[0, 0, 0, 0])].concat();
    call(admin, CLIENT_CLOSE, &payload)
}

fn set_log(admin: &mut Client, procedure: i32, text: &str) -> Reply {
    let payload = [words(&[1]), string(text), words(&[0])].concat();
    call(admin, procedure, &payload)
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("4 bytes"))
}

/// Whether this process may have so many files open; it takes all that it may have.
fn can_open(files: usize) -> bool {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("ask for the limit of open files");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("raise the limit of open files");
    most >= files as u64
}
