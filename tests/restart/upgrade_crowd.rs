//! Upgrades of a daemon with as much in it as a process may have open: nothing is lost.
//!
//! A program of its own, because it takes all the descriptors that a process may have.
//!
//! How long clients wait meanwhile is printed here and measured in the benches.

#[path = "../support/mod.rs"]
mod support;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;
use support::client::{Call, Client, Reply, acquire, register_as, release};
use support::daemon::Daemon;
use support::upgrade::{Host, Rival, long_name, upgrade};
use support::{lock_probe, require_root};

/// Descriptors that this process and the daemon need: 6,000 connections here, three for each
/// machine there.
const DESCRIPTORS: u64 = 20_000;
const MACHINES: usize = 6000;
/// Numbers of processes that do not exist: beyond the greatest that the kernel gives.
const FIRST_PID: i32 = 5_000_000;

/// A client that makes calls all the time, and the longest that it waited for a reply, in
/// microseconds.
struct Busy {
    stop: Arc<AtomicBool>,
    longest: Arc<AtomicU64>,
    thread: JoinHandle<Client>,
}

impl Busy {
    fn start(mut client: Client, disk: String) -> Busy {
        let (stop, longest) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let thread = std::thread::spawn({
            let (stop, longest) = (stop.clone(), longest.clone());
            move || {
                let mut serial = 100u32;
                while !stop.load(Ordering::Relaxed) {
                    // Each call fails if the one before it was lost or carried out twice.
                    for call in [acquire("", &disk, 0), release("", &disk)] {
                        let begun = Instant::now();
                        client.send(&call.frame(serial));
                        let reply = client.receive();
                        let took = begun.elapsed().as_micros() as u64;
                        longest.fetch_max(took, Ordering::Relaxed);
                        assert_eq!(reply[20..24], serial.to_be_bytes());
                        Reply::parse(&reply).expect_ok();
                        serial += 1;
                    }
                }
                client
            }
        });
        Busy {
            stop,
            longest,
            thread,
        }
    }

    fn end(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the busy client");
        let longest = self.longest.load(Ordering::Relaxed);
        eprintln!("{what}: the longest that a busy client waited is {longest} us");
    }
}

/// Whether this process may have that many files open. Says so aloud if not.
fn room_for_a_crowd() -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("ask for the limit of open files");
    let enough = hard >= DESCRIPTORS;
    if !enough {
        support::skip(&format!(
            "needs {DESCRIPTORS} open files, {hard} are allowed"
        ));
    } else if soft < DESCRIPTORS {
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, hard).expect("allow more open files");
    }
    enough
}

fn busy_client(host: &Host, daemon: &Daemon) -> Busy {
    let disk = host.disk("busy");
    let mut client = daemon.client();
    client.call(&register_as("busy", FIRST_PID - 1)).expect_ok();
    Busy::start(client, disk)
}

#[test]
fn six_thousand_machines_with_two_disks_each_keep_everything() {
    if !require_root() || !room_for_a_crowd() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disks = |number: usize| [format!("/run/{number}-a"), format!("/run/{number}-b")];
    let mut machines: Vec<Client> = (0..MACHINES)
        .map(|number| {
            let mut machine = daemon.client();
            let pid = FIRST_PID + number as i32;
            let mut calls = vec![register_as(&format!("machine-{number}"), pid)];
            for disk in disks(number) {
                std::fs::write(host.path(&disk), b"").expect("make a disk");
                calls.push(acquire("", &disk, 0));
            }
            for reply in machine.pipeline(&calls) {
                reply.expect_ok();
            }
            machine
        })
        .collect();
    assert!(daemon.descriptors() > 3 * MACHINES);
    let busy = busy_client(&host, &daemon);
    let some = (0..MACHINES).step_by(500).flat_map(disks);
    let rival = Rival::of(some.map(|disk| host.path(disk)).collect());
    upgrade(&daemon);
    busy.end("6,000 machines");
    for (number, machine) in machines.iter_mut().enumerate() {
        for disk in disks(number) {
            let seen = lock_probe(&host.path(&disk));
            assert!(seen.is_some_and(|lock| lock.exclusive), "{disk}: {seen:?}");
        }
        machine.ping();
    }
    rival.never_succeeded();
    for (number, machine) in machines.iter_mut().enumerate() {
        for reply in machine.pipeline(&disks(number).map(|disk| release("", &disk))) {
            reply.expect_ok();
        }
    }
    assert_eq!(lock_probe(&host.path("/run/0-a")), None);
}

#[test]
fn fifteen_hundred_names_of_four_thousand_bytes_keep_their_locks() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let mut client = daemon.client();
    client.call(&register_as("long", FIRST_PID)).expect_ok();
    let files: Vec<String> = (0..1500).map(|number| format!("d-{number}")).collect();
    let call = |file: &String, make: fn(&str, &str) -> Call| make("", &long_name(file, 4000));
    for file in &files {
        host.disk(file);
        client
            .call(&call(file, |path, name| acquire(path, name, 0)))
            .expect_ok();
    }
    let busy = busy_client(&host, &daemon);
    upgrade(&daemon);
    busy.end("1,500 long names");
    for file in &files {
        host.assert_held(&format!("/run/{file}"));
        client.call(&call(file, release)).expect_ok();
    }
}
