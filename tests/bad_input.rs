//! Bytes from outside can't hurt: whatever a client sends, it gets an answer or its connection
//! closes, nobody else waits, nothing is lost and nothing stays behind.
//!
//! `VIRTLOCKD_BAD_INPUT_SEED` repeats a run whose seed was printed.

mod support;

use serde_json::Value;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;
use support::client::{
    CALL_WITH_FDS, Call, Client, LOCK_PROGRAM, PING, Received, Reply, acquire, frame, register,
};
use support::daemon::{self, Daemon};
use support::namespace::Namespace;
use support::owner::{OnTerm, Owner, from_hex};
use support::random::Random;
use support::{DEADLINE, wait_until};

/// The largest frame of the lock program that a client may announce, in bytes.
const LARGEST_FRAME: u32 = 132 * 1024;

/// A daemon, and a client that holds a lock and must not notice anything.
struct Scene {
    namespace: Namespace,
    daemon: Daemon,
    bystander: Client,
    descriptors: usize,
}

impl Scene {
    fn new() -> Scene {
        let namespace = Namespace::sealed();
        for name in ["/run/disk", "/run/other"] {
            std::fs::write(namespace.path(name), "data").expect("write a disk");
        }
        let daemon = Daemon::start(&namespace, &[], &[]);
        let mut bystander = daemon.client();
        bystander.call(&register(4242)).expect_ok();
        bystander.call(&acquire("", "/run/disk", 0)).expect_ok();
        // The connection that waited for the start may still be open.
        wait_until(DEADLINE, "the connection of the start to be gone", || {
            let before = open_descriptors(&daemon);
            bystander.ping();
            before == open_descriptors(&daemon)
        });
        let descriptors = open_descriptors(&daemon);
        Scene {
            namespace,
            daemon,
            bystander,
            descriptors,
        }
    }

    /// The bystander is answered and still holds its lock.
    fn check_bystander(&mut self) {
        self.bystander.ping();
        let disk = self.namespace.path("/run/disk");
        let lock = support::lock_probe(&disk).expect("the bystander's lock is there");
        assert!(lock.exclusive);
        let busy = self.bystander.call(&acquire("", "/run/disk", 0));
        let text = busy.expect_error(87, 51);
        assert_eq!(
            text,
            "resource busy: Lockspace resource '/run/disk' is locked"
        );
    }

    /// When every other client is gone, nothing of them is left.
    fn check_nothing_left(&mut self) {
        self.check_bystander();
        let (daemon, start) = (&self.daemon, self.descriptors);
        wait_until(
            DEADLINE,
            "the daemon's descriptors to be those of the start",
            || open_descriptors(daemon) <= start,
        );
    }
}

/// How many descriptors a daemon has, but for plain files: a spoiled call may rightly be granted a
/// lock, and closing a stranger's connection does not release it.
fn open_descriptors(daemon: &Daemon) -> usize {
    let directory = format!("/proc/{}/fd", daemon.pid());
    let entries = std::fs::read_dir(&directory).expect("list the daemon's descriptors");
    let paths = entries.map(|entry| entry.expect("a descriptor").path());
    paths
        .filter(|path| !path.metadata().is_ok_and(|status| status.is_file()))
        .count()
}

/// Every request of the captured vectors, as material to spoil.
fn captured_requests() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let mut requests = Vec::new();
    for group in ["framing", "keepalive", "lock_success", "lock_errors"] {
        let text = std::fs::read_to_string(directory.join(format!("{group}.jsonl")));
        for line in text.expect("read the vectors").lines() {
            let vector: Value = serde_json::from_str(line).expect("a vector is a JSON object");
            requests.push(from_hex(vector["request_hex"].as_str().expect("hex text")));
        }
    }
    requests
}

/// Reads until the daemon closes the connection; panics on anything but whole messages before.
fn drain(client: &mut Client) {
    loop {
        match client.receive_within(DEADLINE) {
            Received::Frame(_) => {}
            Received::Closed { partial } => return assert_eq!(partial, b"", "half a reply"),
            Received::Silence { .. } => panic!("neither an answer nor the end of the connection"),
        }
    }
}

/// Writes what the daemon takes; a connection that it closes meanwhile is one of the right answers.
fn send_or_closed(client: &mut Client, bytes: &[u8]) {
    if let Err(error) = client.try_send(bytes) {
        let closed = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        assert!(
            closed.contains(&error.kind()),
            "write to the daemon: {error}"
        );
    }
}

/// Sends `bytes` on a connection of its own, ends our half, and waits for the daemon's end.
fn throw(scene: &mut Scene, bytes: &[u8]) {
    let mut client = scene.daemon.client();
    send_or_closed(&mut client, bytes);
    let _ = client.stream().shutdown(std::net::Shutdown::Write);
    scene.bystander.ping();
    drain(&mut client);
}

#[test]
fn random_bytes_hurt_nobody() {
    if !support::require_root() {
        return;
    }
    let seed = Random::seed_from("VIRTLOCKD_BAD_INPUT_SEED");
    println!("VIRTLOCKD_BAD_INPUT_SEED={seed}");
    let mut random = Random::new(seed);
    let mut scene = Scene::new();
    for _ in 0..300 {
        let count = random.below(400);
        let mut bytes = random.bytes(count);
        // Half of them get a length word that fits, or else nothing behind it is ever looked at.
        if random.percent(50) && bytes.len() >= 4 {
            let length = bytes.len() as u32;
            bytes[..4].copy_from_slice(&length.to_be_bytes());
        }
        if random.percent(50) && bytes.len() >= 12 {
            bytes[4..8].copy_from_slice(&LOCK_PROGRAM.to_be_bytes());
            bytes[8..12].copy_from_slice(&1u32.to_be_bytes());
        }
        throw(&mut scene, &bytes);
    }
    scene.check_nothing_left();
}

#[test]
fn spoiled_messages_hurt_nobody() {
    if !support::require_root() {
        return;
    }
    let seed = Random::seed_from("VIRTLOCKD_BAD_INPUT_SEED");
    println!("VIRTLOCKD_BAD_INPUT_SEED={seed}");
    let mut random = Random::new(seed);
    let mut scene = Scene::new();
    let requests = captured_requests();
    for _ in 0..600 {
        let mut bytes = register(5555).frame(0);
        for _ in 0..=random.below(3) {
            let mut request = random.pick(&requests).clone();
            for _ in 0..=random.below(4) {
                let at = random.below(request.len());
                match random.below(5) {
                    0 => request[at] = random.next() as u8,
                    1 => request[at] ^= 1 << random.below(8),
                    2 => request.truncate(at.max(1)),
                    3 => request.insert(at, random.next() as u8),
                    // A length or a count somewhere in the middle becomes an unlikely one.
                    _ => {
                        let word = *random.pick(&[0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX]);
                        let at = at & !3;
                        if let Some(place) = request.get_mut(at..at + 4) {
                            place.copy_from_slice(&word.to_be_bytes());
                        }
                    }
                }
            }
            bytes.extend_from_slice(&request);
        }
        throw(&mut scene, &bytes);
        if random.percent(5) {
            scene.check_bystander();
        }
    }
    scene.check_nothing_left();
}

#[test]
fn a_message_that_is_cut_anywhere_ends_with_its_connection() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let whole = register(5555).frame(0);
    for cut in 1..whole.len() {
        throw(&mut scene, &whole[..cut]);
        // And without any end of our half: closed at once, with bytes unread or not.
        let mut client = scene.daemon.client();
        send_or_closed(&mut client, &whole[..cut]);
    }
    scene.check_nothing_left();
}

#[test]
fn an_impossible_length_word_closes_the_connection() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    for word in [
        0,
        1,
        3,
        4,
        5,
        27,
        LARGEST_FRAME + 1,
        33_554_437,
        1 << 31,
        u32::MAX,
    ] {
        let mut client = scene.daemon.client();
        // As many bytes as a short message needs; a longer one has to end at its length word.
        let mut bytes = word.to_be_bytes().to_vec();
        bytes.resize(28, 0);
        send_or_closed(&mut client, &bytes);
        match client.receive_within(DEADLINE) {
            Received::Closed { partial } if partial.is_empty() => {}
            other => panic!("length word {word}: {other:?}"),
        }
        scene.check_bystander();
    }
    scene.check_nothing_left();
}

#[test]
fn the_largest_call_of_the_lock_program_is_answered() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let mut client = scene.daemon.client();
    client.call(&register(5555)).expect_ok();
    let long = vec![b'x'; 65536];
    let call = Call::Acquire {
        path: long.clone(),
        name: long,
        flags: 0,
    };
    client.call(&call).expect_error(1, 7);
    // Bytes behind the arguments are ignored: exactly as long as a frame may be.
    let mut bytes = call.frame(7);
    bytes.resize(LARGEST_FRAME as usize, 0);
    bytes[..4].copy_from_slice(&LARGEST_FRAME.to_be_bytes());
    client.send(&bytes);
    Reply::parse(&client.receive()).expect_error(1, 7);
    drop(client);
    scene.check_nothing_left();
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let null = std::fs::File::open("/dev/null").unwrap();
    for count in [1, 32, 253] {
        let mut client = scene.daemon.client();
        let descriptors = vec![null.as_fd(); count];
        client
            .send_with_descriptors(&register(5555).frame(0), &descriptors)
            .unwrap();
        // Either answer is right: what counts is that one comes and that nothing stays open.
        match client.receive_within(DEADLINE) {
            Received::Frame(reply) => Reply::parse(&reply).expect_ok(),
            Received::Closed { .. } => {}
            Received::Silence { .. } => panic!("no answer to a call with {count} descriptors"),
        }
        // Kept open meanwhile: the descriptors must not live as long as the connection.
        let (daemon, most) = (&scene.daemon, scene.descriptors + 1);
        wait_until(DEADLINE, "unasked descriptors to be closed", || {
            open_descriptors(daemon) <= most
        });
        scene.check_bystander();
    }
    scene.check_nothing_left();
}

#[test]
fn more_descriptors_than_announced_are_closed() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut payload = 2u32.to_be_bytes().to_vec();
    payload.extend_from_slice(&register(5555).payload());
    let call = frame(LOCK_PROGRAM, 1, 1, CALL_WITH_FDS, 0, 0, &payload);
    for sent in [253, 7] {
        let mut client = scene.daemon.client();
        client.send(&call);
        // The first message brings many descriptors where exactly one is due.
        let descriptors = vec![null.as_fd(); sent];
        let _ = client.send_with_descriptors(b"\0", &descriptors);
        let _ = client.send_with_descriptors(b"\0", &descriptors[..1]);
        let _ = client.stream().shutdown(std::net::Shutdown::Write);
        drain(&mut client);
        scene.check_bystander();
    }
    scene.check_nothing_left();
}

#[test]
fn announced_descriptors_that_never_come_are_waited_for_without_harm() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut payload = 32u32.to_be_bytes().to_vec();
    payload.extend_from_slice(&register(5555).payload());
    let mut client = scene.daemon.client();
    client.send(&frame(LOCK_PROGRAM, 1, 1, CALL_WITH_FDS, 0, 0, &payload));
    client.send_descriptors(&[null.as_fd(); 31]).unwrap();
    scene.check_bystander();
    scene.daemon.wait_until_asleep();
    drop(client);
    scene.check_nothing_left();
}

#[test]
fn registered_pids_of_others_end_nobody() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    // Pid 1, a process group, everybody, the daemon itself: none of them is the client's own pid,
    // so the end of its connection ends nobody and releases nothing.
    let own = scene.daemon.pid() as u32;
    let other = scene.namespace.path("/run/other");
    for pid in [
        0,
        1,
        u32::MAX,
        0x8000_0000,
        own,
        own.wrapping_neg(),
        scene.namespace.holder_pid(),
    ] {
        let mut client = scene.daemon.client();
        client.call(&register(pid as i32)).expect_ok();
        client.call(&acquire("", "/run/other", 0)).expect_ok();
        drop(client);
        scene.check_bystander();
        assert!(
            support::lock_probe(&other).is_some(),
            "pid {pid}: still held by its owner"
        );
        let mut client = scene.daemon.client();
        client.call(&register(pid as i32)).expect_ok();
        client
            .call(&support::client::release("", "/run/other"))
            .expect_ok();
    }
    assert!(Path::new(&format!("/proc/{}", scene.namespace.holder_pid())).exists());
    assert!(scene.daemon.ended().is_none());
}

/// Writes `bytes` again and again without reading, until the socket takes no more; gives the
/// number of bytes taken.
fn flood(client: &mut Client, bytes: &[u8], most: usize) -> usize {
    let mut stream = client.stream();
    stream.set_nonblocking(true).expect("stop waiting for room");
    let (mut taken, mut quiet_rounds, mut at) = (0, 0, 0);
    // "Takes no more": nothing for a second, although the bystanders are served meanwhile.
    while quiet_rounds < 100 && taken < most {
        match stream.write(&bytes[at..]) {
            Ok(count) => {
                (taken, quiet_rounds) = (taken + count, 0);
                at = (at + count) % bytes.len();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                quiet_rounds += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("flood the daemon: {error}"),
        }
    }
    taken
}

#[test]
fn a_client_that_pings_and_never_reads_is_read_no_further() {
    if !support::require_root() {
        return;
    }
    flood_is_bounded(&PING.repeat(1000));
}

#[test]
fn a_client_that_calls_and_never_reads_is_read_no_further() {
    if !support::require_root() {
        return;
    }
    let mut calls = register(5555).frame(0);
    for serial in 0..500 {
        calls.extend_from_slice(&acquire("", "/run/disk", 0).frame(serial));
    }
    flood_is_bounded(&calls);
}

fn flood_is_bounded(bytes: &[u8]) {
    const MOST: usize = 64 << 20;
    const ALLOWED_GROWTH_KIB: u64 = 16 * 1024;
    let mut scene = Scene::new();
    let before = scene.daemon.memory_kib("VmRSS");
    let mut clients: Vec<Client> = (0..4).map(|_| scene.daemon.client()).collect();
    for client in &mut clients {
        let taken = flood(client, bytes, MOST);
        assert!(taken < MOST, "the daemon goes on reading: {taken} bytes");
        scene.check_bystander();
    }
    scene.daemon.wait_until_asleep();
    let grown = scene.daemon.memory_kib("VmRSS").saturating_sub(before);
    support::assert_memory(grown < ALLOWED_GROWTH_KIB, || {
        format!("4 clients that never read cost {grown} KiB")
    });
    // One of them reads after all: its requests are answered again.
    let late = &mut clients[0];
    late.stream().set_nonblocking(false).expect("wait again");
    for _ in 0..2000 {
        assert!(late.receive().len() >= 28);
    }
    drop(clients);
    scene.check_nothing_left();
}

#[test]
fn a_length_word_allocates_nothing_by_itself() {
    if !support::require_root() {
        return;
    }
    const CLIENTS: usize = 200;
    let mut scene = Scene::new();
    let before = ["VmRSS", "VmSize"].map(|field| scene.daemon.memory_kib(field));
    let mut start_of_a_call = acquire("", "/run/other", 0).frame(0)[..28].to_vec();
    start_of_a_call[..4].copy_from_slice(&LARGEST_FRAME.to_be_bytes());
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| scene.daemon.client()).collect();
    for client in &mut clients {
        client.send(&start_of_a_call);
    }
    // The daemon serves connections in turn: each of these answers comes after it has had the
    // chance to read what the others sent.
    for _ in 0..10 {
        scene.bystander.ping();
    }
    let after = ["VmRSS", "VmSize"].map(|field| scene.daemon.memory_kib(field));
    // 200 whole buffers would be 26 MiB.
    for (name, (before, after)) in ["VmRSS", "VmSize"]
        .iter()
        .zip(before.into_iter().zip(after))
    {
        let grown = after.saturating_sub(before);
        support::assert_memory(grown < 6 * 1024, || {
            format!("{name} grew by {grown} KiB for {CLIENTS} length words")
        });
    }
    // They were not forgotten: the rest of a message still makes a whole one.
    let mut rest = acquire("", "/run/other", 0).frame(0)[28..].to_vec();
    rest.resize(LARGEST_FRAME as usize - 28, 0);
    clients[0].send(&rest);
    Reply::parse(&clients[0].receive()).expect_error(55, 7);
    drop(clients);
    scene.check_nothing_left();
}

#[test]
fn a_client_that_registers_again_and_again_costs_nothing_more() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let mut client = scene.daemon.client();
    let call = Call::Register {
        uuid: [7; 16],
        name: vec![b'n'; 60_000],
        id: 7,
        pid: 5555,
        flags: 0,
    };
    client.call(&call).expect_ok();
    let before = scene.daemon.memory_kib("VmRSS");
    for _ in 0..1000 {
        client.call(&call).expect_ok();
    }
    // Kept names would be 58 MiB.
    let grown = scene.daemon.memory_kib("VmRSS").saturating_sub(before);
    support::assert_memory(grown < 4 * 1024, || {
        format!("1000 registrations cost {grown} KiB")
    });
    drop(client);
    scene.check_nothing_left();
}

#[test]
fn connections_that_are_gone_leave_no_memory_behind() {
    if !support::require_root() {
        return;
    }
    const ROUNDS: usize = 12;
    let mut scene = Scene::new();
    let long = Call::Acquire {
        path: vec![b'p'; 65_000],
        name: vec![b'n'; 65_000],
        flags: 0,
    };
    let mut sizes = Vec::new();
    for _ in 0..ROUNDS {
        let mut clients: Vec<Client> = (0..40).map(|_| scene.daemon.client()).collect();
        for (number, client) in clients.iter_mut().enumerate() {
            client.call(&register(5555)).expect_ok();
            // Half of them stop in the middle of a message; the others never read their replies,
            // each of which repeats the name that was asked for.
            if number % 2 == 0 {
                client.send(&long.frame(1)[..100_000]);
            } else {
                client.send(&long.frame(1));
            }
        }
        scene.bystander.ping();
        drop(clients);
        scene.check_nothing_left();
        sizes.push(scene.daemon.memory_kib("VmRSS"));
    }
    // The allocator needs some rounds to find its size.
    let grown = sizes[ROUNDS - 1].saturating_sub(sizes[ROUNDS / 2]);
    support::assert_memory(grown < 1024, || {
        format!("half of the rounds cost {grown} KiB: {sizes:?}")
    });
}

#[test]
fn refused_clients_that_never_call_use_few_descriptors() {
    if !support::require_root() {
        return;
    }
    const CLIENTS: usize = 300;
    const KEPT_AT_MOST: usize = 100;
    let namespace = Namespace::sealed();
    let daemon = Daemon::start_configured(&daemon::program(), &namespace, "max_clients = 1\n");
    let mut first = served_client(&daemon);
    let before = daemon.descriptors();
    let mut silent: Vec<Client> = (0..CLIENTS).map(|_| daemon.client()).collect();
    // Refused ones that are too many are closed, the oldest first.
    silent[0].expect_closed();
    wait_until(DEADLINE, "refused clients to be bounded", || {
        daemon.descriptors() < before + KEPT_AT_MOST
    });
    first.ping();
    daemon.wait_until_asleep();
    // The youngest is still told why.
    let refused = silent[CLIENTS - 1].call(&register(5555));
    refused.expect_error(39, 7);
    silent[CLIENTS - 1].expect_closed();
}

#[test]
fn a_client_beyond_max_clients_is_told_so_and_the_next_is_served_when_one_leaves() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    let config = "max_clients = 2\n";
    let daemon = Daemon::start_configured(&daemon::program(), &namespace, config);
    // The connection that waited for the start may still count for a moment.
    let mut one = daemon.client();
    one.call(&register(4242)).expect_ok();
    let mut two = served_client(&daemon);
    let mut three = daemon.client();
    let refused = three.call(&register(4244));
    let text = refused.expect_error(39, 7);
    assert!(text.contains("max_clients"), "{text}");
    three.expect_closed();
    one.ping();
    two.ping();
    drop(two);
    served_client(&daemon);
}

#[test]
fn a_client_for_whom_no_descriptor_is_left_is_told_so_and_the_others_are_served() {
    if !support::require_root() {
        return;
    }
    const DESCRIPTORS: &str = "--nofile=64:64";
    let namespace = Namespace::sealed();
    std::fs::write(namespace.path("/run/disk"), "data").expect("write a disk");
    let program = daemon::program();
    let program = program.to_str().expect("a path in UTF-8");
    let limited = Path::new("prlimit");
    let daemon = Daemon::start_program(limited, &namespace, &[DESCRIPTORS, program], &[]);
    let mut served = Vec::new();
    let mut refused = support::wait_for(DEADLINE, "a client to be refused", || {
        let mut client = daemon.client();
        match client.call(&register(4242)) {
            Reply::Ok { .. } => {
                served.push(client);
                None
            }
            Reply::Error(error) => {
                assert_eq!((error.code, error.domain), (39, 7), "{error:?}");
                assert!(error.message.contains("open files"), "{error:?}");
                Some(client)
            }
        }
    });
    refused.expect_closed();
    assert!(
        served.len() > 8,
        "only {} clients were served",
        served.len()
    );
    daemon.wait_until_asleep();
    // Whatever an acquire gets now, it is an answer.
    let _ = served[0].call(&acquire("", "/run/disk", 0));
    for client in &mut served {
        client.ping();
    }
    // More than there is a reserve for: those wait, and nobody waits for them.
    let silent: Vec<Client> = (0..40).map(|_| daemon.client()).collect();
    daemon.wait_until_asleep();
    for client in &mut served {
        client.ping();
    }
    drop(silent);
    served.truncate(served.len() / 2);
    served.push(served_client(&daemon));
    for client in &mut served {
        client.ping();
    }
}

#[test]
fn an_owner_that_leaves_is_fenced_although_refused_clients_took_every_descriptor() {
    if !support::require_root() {
        return;
    }
    let namespace = Namespace::sealed();
    let disk = namespace.path("/run/disk");
    std::fs::write(&disk, "data").expect("write a disk");
    let program = daemon::program();
    let program = program.to_str().expect("a path in UTF-8");
    let limited = ["--nofile=64:64", program];
    let daemon = Daemon::start_program(Path::new("prlimit"), &namespace, &limited, &[]);
    let mut owner = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
    owner.call(&acquire("", "/run/disk", 0)).expect_ok();
    // Each refused client that has not called yet keeps a descriptor.
    let silent: Vec<Client> = (0..100).map(|_| daemon.client()).collect();
    daemon.wait_until_asleep();
    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(libc::SIGTERM));
    wait_until(DEADLINE, "its lock to be free", || {
        support::lock_probe(&disk).is_none()
    });
    drop(silent);
}

/// A client whose REGISTER is granted, after those that are leaving have left.
fn served_client(daemon: &Daemon) -> Client {
    support::wait_for(DEADLINE, "a new client to be served", || {
        let mut client = daemon.client();
        client.call(&register(4243)).is_ok().then_some(client)
    })
}
