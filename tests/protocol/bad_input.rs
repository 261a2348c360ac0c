//! Bytes from outside can't hurt: whatever a client sends, it gets an answer or its connection
//! closes, nobody else waits, nothing is lost and nothing stays behind. What can be done with
//! harmless bytes is tried in `hostile`.
//!
//! `VIRTLOCKD_BAD_INPUT_SEED` repeats a run whose seed was printed.

use crate::support;
use crate::support::DEADLINE;
use crate::support::client::{Call, Client, LOCK_PROGRAM, Received, Reply, acquire, register};
use crate::support::owner::from_hex;
use crate::support::random::Random;
use crate::support::scene::Scene;
use serde_json::Value;
use std::io::ErrorKind;
use std::path::Path;

/// The largest frame of the lock program that a client may announce, in bytes.
const LARGEST_FRAME: u32 = 132 * 1024;

/// Every request of the captured vectors, as material to spoil.
fn captured_requests() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/protocol/vectors");
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

/// Libvirt's daemon carries out the first of them and loses the rest.
#[test]
fn what_a_client_sent_before_it_closed_is_all_carried_out() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let disks: Vec<String> = (0..300)
        .map(|number| format!("/run/disk-{number}"))
        .collect();
    for disk in &disks {
        std::fs::write(scene.namespace.path(disk), "data").expect("write a disk");
    }
    for _ in 0..5 {
        for is_acquire in [true, false] {
            let mut bytes = register(support::scene::NOBODY + 1).frame(0);
            for disk in &disks {
                let call = match is_acquire {
                    true => acquire("", disk, 0),
                    false => support::client::release("", disk),
                };
                bytes.extend_from_slice(&call.frame(1));
            }
            let mut client = scene.daemon.client();
            client.send(&bytes);
            drop(client);
            support::wait_until(DEADLINE, "every call to be carried out", || {
                let is_done = |disk: &String| {
                    support::lock_probe(&scene.namespace.path(disk)).is_some() == is_acquire
                };
                disks.iter().all(is_done)
            });
        }
    }
    scene.check_nothing_left();
}
