//! How many system calls a request costs: a number that does not depend on the machine, and the
//! first thing to go wrong when somebody makes a request touch more than what it concerns.

use crate::support;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use crate::support::client::{AUTOCREATE, acquire, create_lockspace, register, release};
use crate::support::daemon::Daemon;
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, TempDir, wait_until};

const PAIRS: usize = 20;
const IDLE: usize = 200;

/// The names of the system calls that `work` makes the daemon do, in their order.
fn traced(daemon: &Daemon, work: impl FnOnce()) -> Vec<String> {
    let directory = TempDir::new();
    let output = directory.path().join("trace");
    let mut strace = Command::new("strace")
        .args(["-p", &daemon.reactor().to_string(), "-o"])
        .arg(&output)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace");
    let mut first = String::new();
    let mut said = BufReader::new(strace.stderr.take().expect("strace's messages"));
    said.read_line(&mut first).expect("strace's first message");
    assert!(first.contains("attached"), "strace says: {first}");
    // strace says so before the daemon is stopped where it can see it: in its wait.
    wait_until(DEADLINE, "strace to see the daemon wait", || {
        std::fs::read_to_string(&output).is_ok_and(|text| text.contains("epoll_wait"))
    });
    work();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(strace.id()).expect("a pid")),
        nix::sys::signal::Signal::SIGINT,
    )
    .expect("to stop strace");
    strace.wait().expect("strace's end");
    let trace = std::fs::read_to_string(&output).expect("the trace");
    trace
        .lines()
        // The standard library looks at a descriptor before it closes it, in a debug build.
        .filter(|line| !line.contains("F_GETFD"))
        .filter_map(|line| line.split_once('(').map(|(name, _)| name.to_owned()))
        .filter(|name| {
            name.chars()
                .all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
        })
        .collect()
}

#[test]
fn an_acquire_costs_six_system_calls_and_a_release_five_however_many_are_connected() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::new();
    let disk = namespace.path("/run/disk");
    std::fs::write(&disk, "data").expect("a disk");
    let daemon = Daemon::start(&namespace, &[], &[]);
    let mut idle: Vec<_> = (0..IDLE).map(|_| daemon.client()).collect();
    for (number, client) in idle.iter_mut().enumerate() {
        let pid = 100_000 + i32::try_from(number).expect("a small number");
        client.call(&register(pid)).expect_ok();
    }
    let mut busy = daemon.client();
    busy.call(&register(4242)).expect_ok();
    let (take, give) = (acquire("", "/run/disk", 0), release("", "/run/disk"));
    busy.call(&take).expect_ok();
    busy.call(&give).expect_ok();

    let calls: Vec<String> = traced(&daemon, || {
        for _ in 0..PAIRS {
            busy.call(&take).expect_ok();
            busy.call(&give).expect_ok();
        }
    });

    let acquire = [
        "recvmmsg",
        "openat",
        "newfstatat",
        "fcntl",
        "sendmmsg",
        "epoll_wait",
    ];
    let release = ["recvmmsg", "fcntl", "close", "sendmmsg", "epoll_wait"];
    let pair = [&acquire[..], &release[..]].concat();
    let expected: Vec<&str> = std::iter::once("epoll_wait")
        .chain(pair.repeat(PAIRS))
        .collect();
    // The daemon's last wait may or may not have been seen when strace went.
    let (last, expected) = expected.split_last().expect("a wait");
    let seen = calls.strip_suffix(&[(*last).to_owned()]).unwrap_or(&calls);
    assert_eq!(seen, expected);
}

/// What a lease's name leads to is asked of a server; no server keeps this host's own file systems.
#[test]
fn a_lease_on_a_file_system_of_this_host_is_not_asked_for_as_one_of_a_server_is() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::new();
    // In memory, and wherever the machine has its temporary files.
    let directory = TempDir::new();
    let metadata = std::fs::metadata(directory.path()).expect("ask for a directory");
    let is_on_device = nix::sys::stat::major(metadata.dev()) != 0;
    let on_disk = directory.path().to_str().expect("a path of letters");
    let daemon = Daemon::start(&namespace, &[], &[]);
    let mut client = daemon.client();
    client.call(&register(4242)).expect_ok();
    for (lockspace, costs_nothing) in [("/run/leases", false), (on_disk, true)] {
        if costs_nothing && !is_on_device {
            continue;
        }
        client.call(&create_lockspace(lockspace)).expect_ok();
        let take = acquire(lockspace, "lease", AUTOCREATE);
        let give = release(lockspace, "lease");
        client.call(&take).expect_ok();
        client.call(&give).expect_ok();
        let calls = traced(&daemon, || {
            client.call(&take).expect_ok();
            client.call(&give).expect_ok();
        });
        let count = |name: &str| calls.iter().filter(|call| *call == name).count();
        assert_eq!(count("linkat"), 0, "{calls:?}");
        assert_eq!(count("unlinkat"), 1, "{calls:?}");
        if costs_nothing {
            assert_eq!(count("fstatfs"), 0, "{calls:?}");
        }
    }
}
