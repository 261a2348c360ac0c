//! Clients that mean harm, or are broken badly enough to do it. Whatever they do: a guest's every call
//! is granted meanwhile, the bystander keeps its lock, and afterwards the daemon's memory, its
//! descriptors and the kernel's list of locks are those of before ([`Scene::withstands`]).
//!
//! How long the guest waits meanwhile is measured by the benches (`hostile`).

use crate::support;
use crate::support::client::{
    CALL_WITH_FDS, Call, Client, LOCK_PROGRAM, PING, PONG, Received, Reply, acquire,
    create_lockspace, frame, register,
};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::scene::{Guest, HELD, OTHER, Scene, open_descriptors};
use crate::support::{DEADLINE, wait_for, wait_until};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

/// The largest frame of the lock program, in bytes. So much may be kept of a message that is not
/// whole yet.
const LARGEST_FRAME: u32 = 132 * 1024;
/// So much may be kept for a client that does not read: 8 KiB of what it sent, twice 64 KiB of
/// replies, and one more reply.
const UNREAD_KIB: u64 = 192;
/// The daemon's buffers and lists, KiB: what a handful of well-behaved clients may cost as well.
const SOME_KIB: u64 = 1024;

/// A daemon to be attacked; `None` (and a skip) without root.
fn scene() -> Option<Scene> {
    support::require_root().then(Scene::new)
}

fn clients(daemon: &Daemon, count: usize) -> Vec<Client> {
    (0..count).map(|_| daemon.client()).collect()
}

/// The daemon has had the chance to read what others sent before: it serves connections in turn.
fn let_it_read(daemon: &Daemon) {
    let mut client = daemon.client();
    for _ in 0..10 {
        client.ping();
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

#[test]
fn silence_of_a_thousand_clients_hurts_nobody() {
    let Some(mut scene) = scene() else { return };
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        let mut silent = clients(daemon, 1000);
        // The last one was let in, and so all before it.
        silent[999].ping();
        let_it_read(daemon);
    });
}

#[test]
fn half_frames_of_a_hundred_clients_cost_as_much_as_was_sent() {
    let Some(mut scene) = scene() else { return };
    const CLIENTS: usize = 100;
    // A buffer that has become too small is doubled.
    let most_kib = 2 * CLIENTS as u64 * u64::from(LARGEST_FRAME / 1024) + SOME_KIB;
    scene.withstands(Guest::Locks, most_kib, |daemon| {
        for _ in 0..5 {
            let mut clients = clients(daemon, CLIENTS);
            for client in &mut clients {
                client.send(&half_of_the_largest_frame());
            }
            let_it_read(daemon);
        }
    });
}

#[test]
fn clients_that_come_with_half_a_frame_and_go_are_cleared_away_as_fast_as_they_are_let_in() {
    if !support::require_root() {
        return;
    }
    const AT_ONCE: usize = 50;
    const CLIENTS: usize = 3000;
    // Were more of them let in than can be read, the guest could have no lock for want of descriptors.
    let mut scene = scene_of_descriptors(400);
    let most_kib = 4 * AT_ONCE as u64 * u64::from(LARGEST_FRAME / 1024) + SOME_KIB;
    scene.withstands(Guest::Locks, most_kib, |daemon| {
        let half = half_of_the_largest_frame();
        let mut crowd = std::collections::VecDeque::new();
        for _ in 0..CLIENTS {
            let client = daemon.client();
            let mut stream = client.stream();
            stream.set_nonblocking(true).expect("not to wait for room");
            // Whatever of it there is room for.
            let _ = stream.write(&half);
            crowd.push_back(client);
            crowd.drain(..crowd.len().saturating_sub(AT_ONCE));
        }
    });
}

fn half_of_the_largest_frame() -> Vec<u8> {
    let mut bytes = acquire("", OTHER, 0).frame(0);
    bytes.resize(100_000, b'x');
    bytes[..4].copy_from_slice(&LARGEST_FRAME.to_be_bytes());
    bytes
}

#[test]
fn one_byte_at_a_time_is_a_message_in_the_end() {
    let Some(mut scene) = scene() else { return };
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        let mut clients = clients(daemon, 20);
        let bytes = register(5555).frame(0);
        for byte in &bytes {
            for client in &mut clients {
                client.send(&[*byte]);
            }
        }
        for client in &mut clients {
            Reply::parse(&client.receive()).expect_ok();
        }
    });
}

#[test]
fn a_giant_length_word_allocates_nothing_by_itself() {
    let Some(mut scene) = scene() else { return };
    // 200 whole buffers would be 26 MiB.
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        let mut start_of_a_call = acquire("", OTHER, 0).frame(0)[..28].to_vec();
        start_of_a_call[..4].copy_from_slice(&LARGEST_FRAME.to_be_bytes());
        let mut clients = clients(daemon, 200);
        for client in &mut clients {
            client.send(&start_of_a_call);
        }
        let_it_read(daemon);
        // They were not forgotten: the rest of a message still makes a whole one.
        let mut rest = acquire("", OTHER, 0).frame(0)[28..].to_vec();
        rest.resize(LARGEST_FRAME as usize - 28, 0);
        clients[0].send(&rest);
        Reply::parse(&clients[0].receive()).expect_error(55, 7);
        // A longer one than there can be ends its connection.
        for word in [LARGEST_FRAME + 1, 1 << 31, u32::MAX] {
            let mut client = daemon.client();
            start_of_a_call[..4].copy_from_slice(&word.to_be_bytes());
            send_or_closed(&mut client, &start_of_a_call);
            client.expect_closed();
        }
    });
}

#[test]
fn clients_that_ping_and_never_read_are_read_no_further() {
    never_reading(&PING.repeat(1000));
}

#[test]
fn clients_that_call_and_never_read_are_read_no_further() {
    let mut calls = register(5555).frame(0);
    for serial in 0..500 {
        calls.extend_from_slice(&acquire("", HELD, 0).frame(serial));
    }
    never_reading(&calls);
}

#[test]
fn clients_that_never_read_long_replies_are_read_no_further() {
    let name = vec![b'n'; 60_000];
    let call = Call::Acquire {
        path: Vec::new(),
        name,
        flags: 0,
    };
    let bytes = [register(5555).frame(0), call.frame(1)].concat();
    never_reading(&bytes);
}

fn never_reading(bytes: &[u8]) {
    const CLIENTS: usize = 16;
    let Some(mut scene) = scene() else { return };
    let most_kib = CLIENTS as u64 * UNREAD_KIB + SOME_KIB;
    scene.withstands(Guest::Locks, most_kib, |daemon| {
        let mut clients = clients(daemon, CLIENTS);
        flood(&mut clients, bytes);
        // One of them reads after all: its requests are answered again.
        let late = &mut clients[0];
        late.stream().set_nonblocking(false).expect("wait again");
        for _ in 0..3 {
            assert!(late.receive().len() >= 28);
        }
    });
}

/// Each client writes `bytes` again and again without reading, until its socket takes no more.
fn flood(clients: &mut [Client], bytes: &[u8]) {
    const MOST: usize = 64 << 20;
    let mut taken = vec![0; clients.len()];
    for client in clients.iter() {
        client
            .stream()
            .set_nonblocking(true)
            .expect("stop waiting for room");
    }
    // "Takes no more": nothing of anybody for a second, although others are served meanwhile.
    let mut quiet_rounds = 0;
    while quiet_rounds < 100 {
        let before: usize = taken.iter().sum();
        for (client, taken) in clients.iter().zip(&mut taken) {
            match client.stream().write(&bytes[*taken % bytes.len()..]) {
                Ok(count) => *taken += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("flood the daemon: {error}"),
            }
            assert!(*taken < MOST, "the daemon goes on reading: {taken} bytes");
        }
        if taken.iter().sum::<usize>() > before {
            quiet_rounds = 0;
        } else {
            quiet_rounds += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_flood_of_pings_is_answered_ping_by_ping() {
    const PINGS: usize = 50_000;
    let Some(mut scene) = scene() else { return };
    scene.withstands(Guest::Locks, 4 * UNREAD_KIB + SOME_KIB, |daemon| {
        let floods = (0..4).map(|_| {
            let mut client = daemon.client();
            let copy = client.stream().try_clone().expect("copy the connection");
            let writer = std::thread::spawn(move || {
                let mut stream = &copy;
                stream.write_all(&PING.repeat(PINGS)).expect("send PINGs");
            });
            std::thread::spawn(move || {
                for _ in 0..PINGS {
                    assert_eq!(client.receive(), PONG);
                }
                writer.join().expect("the writer of PINGs");
            })
        });
        let floods: Vec<_> = floods.collect();
        for flood in floods {
            flood.join().expect("the reader of PONGs");
        }
    });
}

#[test]
fn names_of_sixty_thousand_bytes_cost_no_more_than_they_are_long() {
    const CLIENTS: usize = 50;
    let Some(mut scene) = scene() else { return };
    // Each client's name is kept twice: with the connection, and in the ledger; and the ledger is
    // written anew when it has grown to four times what it has to say.
    let most_kib = CLIENTS as u64 * 64 * 6 + SOME_KIB;
    scene.withstands(Guest::Locks, most_kib, |daemon| {
        let mut clients = clients(daemon, CLIENTS);
        let long = vec![b'n'; 60_000];
        for _ in 0..4 {
            for client in &mut clients {
                client.call(&register_named(&long)).expect_ok();
                let call = Call::Acquire {
                    path: long.clone(),
                    name: long.clone(),
                    flags: 0,
                };
                client.call(&call).expect_error(1, 7);
                let call = Call::Acquire {
                    path: Vec::new(),
                    name: long.clone(),
                    flags: 0,
                };
                let refused = client.call(&call);
                assert_eq!(refused.error().code, 38, "{refused:?}");
            }
        }
    });
}

fn register_named(name: &[u8]) -> Call {
    Call::Register {
        uuid: [7; 16],
        name: name.into(),
        id: 7,
        pid: 5555,
        flags: 0,
    }
}

#[test]
fn a_client_that_registers_ten_thousand_times_costs_nothing_more() {
    let Some(mut scene) = scene() else { return };
    // Kept names would be 58 MiB for the thousand long ones.
    scene.withstands(Guest::Locks, 8 * 64 + SOME_KIB, |daemon| {
        let mut client = daemon.client();
        for name in ["one", "another"].repeat(50) {
            let calls = vec![register_named(name.as_bytes()); 100];
            for reply in client.pipeline(&calls) {
                reply.expect_ok();
            }
        }
        let long = vec![b'n'; 60_000];
        for _ in 0..1000 {
            client.call(&register_named(&long)).expect_ok();
        }
    });
}

#[test]
fn a_hundred_thousand_clients_that_connect_and_vanish_leave_nothing() {
    let Some(mut scene) = scene() else { return };
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        for _ in 0..100_000 {
            drop(std::os::unix::net::UnixStream::connect(daemon.lock_socket()).expect("connect"));
        }
    });
}

#[test]
fn clients_that_vanish_in_the_middle_of_a_call_leave_nothing() {
    let Some(mut scene) = scene() else { return };
    let long = Call::Acquire {
        path: vec![b'p'; 65_000],
        name: vec![b'n'; 65_000],
        flags: 0,
    };
    // Those of one round may still be worked on when the next are there: what they sent is carried out.
    let most_kib = 2 * 40 * (u64::from(LARGEST_FRAME / 1024) + UNREAD_KIB) + SOME_KIB;
    scene.withstands(Guest::Locks, most_kib, |daemon| {
        for _ in 0..20 {
            let mut clients = clients(daemon, 40);
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
            let_it_read(daemon);
        }
    });
}

/// A call that announces `count` descriptors.
fn call_with_descriptors(count: u32) -> Vec<u8> {
    let mut payload = count.to_be_bytes().to_vec();
    payload.extend_from_slice(&register(5555).payload());
    frame(LOCK_PROGRAM, 1, 1, CALL_WITH_FDS, 0, 0, &payload)
}

/// Reads until the daemon closes the connection; panics on anything but whole messages before.
fn drain(client: &mut Client) {
    let _ = client.stream().shutdown(std::net::Shutdown::Write);
    loop {
        match client.receive_within(DEADLINE) {
            Received::Frame(_) => {}
            Received::Closed { partial } => return assert_eq!(partial, b"", "half a reply"),
            Received::Silence { .. } => panic!("neither an answer nor the end of the connection"),
        }
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    with_descriptors(|daemon, null, nothing_stays_open| {
        for count in [1, 32, 253] {
            let mut client = daemon.client();
            client
                .send_with_descriptors(&register(5555).frame(0), &vec![null; count])
                .expect("send a call with descriptors");
            // Either answer is right: what counts is that one comes and that nothing stays open.
            match client.receive_within(DEADLINE) {
                Received::Frame(reply) => Reply::parse(&reply).expect_ok(),
                Received::Closed { .. } => {}
                Received::Silence { .. } => panic!("no answer to a call with {count} descriptors"),
            }
            nothing_stays_open(client);
        }
    });
}

#[test]
fn more_descriptors_than_announced_are_closed() {
    with_descriptors(|daemon, null, nothing_stays_open| {
        for sent in [253, 7] {
            let mut client = daemon.client();
            client.send(&call_with_descriptors(2));
            // The first message brings many descriptors where exactly one is due.
            let _ = client.send_with_descriptors(b"\0", &vec![null; sent]);
            let _ = client.send_with_descriptors(b"\0", &[null]);
            drain(&mut client);
            nothing_stays_open(client);
        }
    });
}

#[test]
fn announced_descriptors_that_never_come_are_waited_for_without_harm() {
    with_descriptors(|daemon, null, nothing_stays_open| {
        let mut client = daemon.client();
        client.send(&call_with_descriptors(32));
        client
            .send_descriptors(&[null; 31])
            .expect("send descriptors");
        let_it_read(daemon);
        nothing_stays_open(client);
    });
}

#[test]
fn more_announced_descriptors_than_a_call_may_have_end_the_connection() {
    with_descriptors(|daemon, null, nothing_stays_open| {
        for count in [33, 1 << 31, u32::MAX] {
            let mut client = daemon.client();
            send_or_closed(&mut client, &call_with_descriptors(count));
            let _ = client.send_with_descriptors(b"\0", &[null]);
            drain(&mut client);
            nothing_stays_open(client);
        }
    });
}

#[test]
fn descriptors_in_the_middle_of_a_message_are_closed() {
    with_descriptors(|daemon, null, nothing_stays_open| {
        let call = call_with_descriptors(1);
        for cut in [1, 4, 20, 28, 31] {
            let mut client = daemon.client();
            client
                .send_with_descriptors(&call[..cut], &[null; 253])
                .expect("send the start of a call with descriptors");
            send_or_closed(&mut client, &call[cut..]);
            drain(&mut client);
            nothing_stays_open(client);
        }
    });
}

#[test]
fn connections_and_listening_sockets_that_are_passed_are_closed() {
    with_descriptors(|daemon, _, nothing_stays_open| {
        // One of them is the other end of the daemon's own connection.
        let listener = std::os::unix::net::UnixListener::bind_addr(
            &<std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
                format!("virtlockd-test-{}", std::process::id()),
            )
            .expect("an abstract address"),
        )
        .expect("listen on an abstract address");
        let mut client = daemon.client();
        let own = client.stream().try_clone().expect("copy the connection");
        client.send(&call_with_descriptors(2));
        client
            .send_descriptors(&[own.as_fd(), listener.as_fd()])
            .expect("pass sockets");
        Reply::parse(&client.receive()).expect_ok();
        drop(own);
        nothing_stays_open(client);
    });
}

/// Lets a hostile client use a descriptor of `/dev/null`. When it calls the third argument with a
/// connection, the daemon must have closed whatever came over it, although the connection is there.
fn with_descriptors(attack: impl FnOnce(&Daemon, BorrowedFd<'_>, &dyn Fn(Client))) {
    let Some(mut scene) = scene() else { return };
    let null = std::fs::File::open("/dev/null").expect("open /dev/null");
    let count = |daemon: &Daemon| {
        let directory = format!("/proc/{}/fd", daemon.pid());
        let entries = std::fs::read_dir(directory).expect("list the daemon's descriptors");
        let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        let is_of_interest = |target: &std::path::PathBuf| {
            target == Path::new("/dev/null") || target.to_string_lossy().starts_with("socket:")
        };
        targets.filter(is_of_interest).count()
    };
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        let before = count(daemon);
        attack(daemon, null.as_fd(), &|client| {
            let what = "nothing but the connection to be open";
            wait_until(DEADLINE, what, || count(daemon) <= before + 1);
            drop(client);
            wait_until(DEADLINE, "not even that to be open", || {
                count(daemon) <= before
            });
        });
    });
}

#[test]
fn refused_clients_that_never_call_use_few_descriptors() {
    if !support::require_root() {
        return;
    }
    const CLIENTS: usize = 300;
    const KEPT_AT_MOST: usize = 100;
    /// How long a refused client may take to make its call.
    const REFUSED_FOR: Duration = Duration::from_secs(10);
    // The bystander, the guest, and one more.
    let mut scene = limited_scene("max_clients = 3\n");
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        let mut third = served_client(daemon);
        let before = open_descriptors(daemon);
        let begun = std::time::Instant::now();
        let mut silent = clients(daemon, CLIENTS);
        // Refused ones that are too many are closed, the oldest first; not when their time is over.
        silent[0].expect_closed();
        let waited = begun.elapsed();
        assert!(waited < REFUSED_FOR, "closed after {waited:?} only");
        wait_until(DEADLINE, "refused clients to be bounded", || {
            open_descriptors(daemon) < before + KEPT_AT_MOST
        });
        third.ping();
        // The youngest is still told why.
        let refused = silent[CLIENTS - 1].call(&register(5555));
        refused.expect_error(39, 7);
        silent[CLIENTS - 1].expect_closed();
    });
}

#[test]
fn each_client_beyond_the_limit_is_told_so_and_the_next_is_served_when_one_leaves() {
    if !support::require_root() {
        return;
    }
    let mut scene = limited_scene("max_clients = 3\n");
    scene.withstands(Guest::Locks, SOME_KIB, |daemon| {
        let mut third = served_client(daemon);
        for _ in 0..500 {
            let mut client = daemon.client();
            let refused = client.call(&register(4244));
            let text = refused.expect_error(39, 7);
            assert!(text.contains("max_clients"), "{text}");
            client.expect_closed();
        }
        third.ping();
        drop(third);
        served_client(daemon);
    });
}

fn limited_scene(config: &str) -> Scene {
    let namespace = Namespace::sealed();
    let daemon = Daemon::start_configured(&daemon::program(), &namespace, config);
    Scene::of(namespace, daemon)
}

/// A scene whose daemon may have 64 descriptors, some of which it needs for itself.
fn scene_of_few_descriptors() -> Scene {
    scene_of_descriptors(64)
}

fn scene_of_descriptors(count: u32) -> Scene {
    let namespace = Namespace::sealed();
    let program = daemon::program();
    let program = program.to_str().expect("a path in UTF-8");
    let limited = [&*format!("--nofile={count}:{count}"), program];
    let daemon = Daemon::start_program(Path::new("prlimit"), &namespace, &limited, &[]);
    Scene::of(namespace, daemon)
}

#[test]
fn a_client_for_whom_no_descriptor_is_left_is_told_so_and_the_others_are_served() {
    if !support::require_root() {
        return;
    }
    let mut scene = scene_of_few_descriptors();
    scene.withstands(Guest::Answers, SOME_KIB, |daemon| {
        let mut served = Vec::new();
        let mut refused = wait_for(DEADLINE, "a client to be refused", || {
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
        let count = served.len();
        assert!(count > 8, "only {count} clients were served");
        // Whatever an acquire gets now, it is an answer.
        if served[0].call(&acquire("", OTHER, 0)).is_ok() {
            let release = support::client::release("", OTHER);
            served[0].call(&release).expect_ok();
        }
        // More than there is a reserve for: those wait, and nobody waits for them.
        let silent = clients(daemon, 40);
        for client in &mut served {
            client.ping();
        }
        drop(silent);
        served.truncate(count / 2);
        served.push(served_client(daemon));
        for client in &mut served {
            client.ping();
        }
    });
}

#[test]
fn an_owner_that_leaves_is_fenced_although_refused_clients_took_every_descriptor() {
    if !support::require_root() {
        return;
    }
    let mut scene = scene_of_few_descriptors();
    let disk = scene.namespace.path(OTHER);
    scene.withstands(Guest::Answers, SOME_KIB, |daemon| {
        let mut owner = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
        owner.call(&acquire("", OTHER, 0)).expect_ok();
        // Each refused client that has not called yet keeps a descriptor.
        let silent = clients(daemon, 100);
        let_all_come(daemon);
        owner.close_connection();
        assert_eq!(owner.wait_signal(), Some(libc::SIGTERM));
        wait_until(DEADLINE, "its lock to be free", || {
            support::lock_probe(&disk).is_none()
        });
        drop(silent);
    });
}

/// Waits until the daemon has accepted as many clients as it can.
fn let_all_come(daemon: &Daemon) {
    let mut before = 0;
    wait_until(DEADLINE, "the daemon to have taken in whom it can", || {
        let now = open_descriptors(daemon);
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut before, now) == now
    });
}

/// A client whose REGISTER is granted, after those that are leaving have left.
fn served_client(daemon: &Daemon) -> Client {
    wait_for(DEADLINE, "a new client to be served", || {
        let mut client = daemon.client();
        client.call(&register(4243)).is_ok().then_some(client)
    })
}

/// A lockspace is kept for ever, and its directory can be written in many ways.
#[test]
fn lockspaces_are_no_way_to_the_daemons_memory() {
    let Some(mut scene) = scene() else { return };
    let lockspace = |number: usize| create_lockspace(&format!("/run/{}space", "./".repeat(number)));
    let mut client = scene.daemon.client();
    let made = (0..1500).filter(|number| {
        let reply = client.call(&lockspace(*number));
        matches!(reply, Reply::Ok { .. })
    });
    assert_eq!(made.count(), 1024);
    client.call(&lockspace(1)).expect_ok();
    drop(client);
    scene.check_nothing_left();
}
