//! Each weakness of libvirt's daemon at an exec-restart, by its number in the list of known
//! weaknesses (1 to 9 and 35): there it loses all locks, here nothing is lost.

use crate::support;
use crate::support::client::{
    CALL_WITH_FDS, Call, Client, LOCK_PROGRAM, PING, PONG, Received, Reply, acquire, frame,
    new_lockspace, put_u32, register_as, release,
};
use crate::support::daemon;
use crate::support::upgrade::{
    Background, Host, Orphan, Rival, helper_client, image, long_name, refusals, refused_upgrade,
    upgrade, wait_for_successor,
};
use crate::support::{DEADLINE, require_root, wait_until};
use nix::sys::signal::Signal;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

#[test]
fn weakness_1_a_connection_that_has_not_registered_loses_nothing() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    let mut silent = daemon.client();
    let mut pinged = daemon.client();
    pinged.ping();
    upgrade(&daemon);
    host.assert_held(&disk);
    pinged.ping();
    silent.call(&register_as("late", guest.pid())).expect_ok();
    guest.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn weakness_2_a_client_whose_connecting_process_has_ended_loses_nothing() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut orphan = Orphan::connect(daemon.lock_socket());
    let registered = orphan.send(&register_as("guest", guest.pid()).frame(0));
    Reply::parse(&registered).expect_ok();
    upgrade(&daemon);
    host.assert_held(&disk);
    assert_eq!(orphan.send(&PING), PONG);
    let other = host.disk("other");
    Reply::parse(&orphan.send(&acquire("", &other, 0).frame(1))).expect_ok();
    host.assert_held(&other);
}

#[test]
fn weakness_3_a_lockspace_on_a_plain_file_neither_crashes_nor_stays() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let file = host.disk("file");
    let mut client = helper_client(&daemon, "other", guest.pid());
    assert!(!client.call(&new_lockspace(&file)).is_ok());
    upgrade(&daemon);
    host.assert_held(&disk);
    assert!(!client.call(&new_lockspace(&file)).is_ok());
    std::fs::remove_file(host.path(&file)).expect("remove the file");
    client.call(&new_lockspace(&file)).expect_ok();
    upgrade(&daemon);
    drop(guest);
    host.wait_free(&disk);
}

#[test]
fn weakness_4_sigusr1_may_come_any_number_of_times() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    let rival = Rival::of(vec![host.path(&disk)]);
    let before = image(daemon.pid());
    for _ in 0..3 {
        daemon.signal(Signal::SIGUSR1);
        std::thread::sleep(Duration::from_millis(5));
    }
    wait_for_successor(daemon.pid(), &before);
    // A burst that meets every stage: the check, the exec, the start of the successor.
    let before = image(daemon.pid());
    for _ in 0..300 {
        daemon.signal(Signal::SIGUSR1);
        std::thread::sleep(Duration::from_millis(1));
    }
    wait_for_successor(daemon.pid(), &before);
    daemon.client().ping();
    assert_eq!(daemon.ended(), None);
    rival.never_succeeded();
    guest.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn weakness_5_a_state_above_10_mib_is_handed_over() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let first = host.disk("first");
    let mut guest = host.guest(&daemon, "guest", &first);
    let mut client = helper_client(&daemon, "guest", guest.pid());
    let files: Vec<String> = (0..1500).map(|number| format!("disk-{number}")).collect();
    let names: Vec<String> = files.iter().map(|file| long_name(file, 4000)).collect();
    for (file, name) in files.iter().zip(&names) {
        host.disk(file);
        client.call(&acquire("", name, 0)).expect_ok();
    }
    assert!(names.iter().map(String::len).sum::<usize>() * 2 > 10 * 1024 * 1024);
    upgrade(&daemon);
    for file in &files {
        host.assert_held(&format!("/run/{file}"));
    }
    for name in &names {
        client.call(&release("", name)).expect_ok();
    }
    for file in &files {
        host.assert_free(&format!("/run/{file}"));
    }
    guest.call(&release("", &first)).expect_ok();
}

#[test]
fn weakness_6_names_that_are_not_utf8_are_handed_over() {
    use std::os::unix::ffi::OsStrExt;
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut client = daemon.client();
    let register = Call::Register {
        uuid: [7; 16],
        name: b"caf\xe9 \x01\"\\".to_vec(),
        id: 3,
        pid: guest.pid() as u32,
        flags: 0,
    };
    client.call(&register).expect_ok();
    let name = b"/run/disk-\xff\xfe".to_vec();
    let outside = host.path(Path::new(std::ffi::OsStr::from_bytes(&name)));
    std::fs::write(&outside, b"").expect("make the disk");
    let take = Call::Acquire {
        path: Vec::new(),
        name: name.clone(),
        flags: 0,
    };
    client.call(&take).expect_ok();
    upgrade(&daemon);
    host.assert_held(&disk);
    assert!(support::lock_probe(&outside).is_some());
    assert!(!client.call(&take).is_ok(), "it is held");
    let give = Call::Release {
        path: Vec::new(),
        name,
        flags: 0,
    };
    client.call(&give).expect_ok();
    assert_eq!(support::lock_probe(&outside), None);
}

#[test]
fn weakness_7_a_removed_program_is_missed_and_a_new_one_is_found() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    host.uninstall();
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("No such file"), "{reason}");
    host.assert_held(&disk);
    host.install_copy(&daemon::program());
    upgrade(&daemon);
    host.assert_held(&disk);
    host.install_copy(&daemon::program());
    upgrade(&daemon);
    guest.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn weakness_7_a_relative_path_is_found_again_in_the_background() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut command = host.namespace.command("sh");
    command.args(["-c", "cd /run/programs && exec ./virtlockd -d"]);
    let daemon = Background::start(&host, &mut command);
    let socket = host.path(daemon::LOCK_SOCKET);
    let mut client = Client::connect(&socket);
    let disk = host.disk("disk");
    let mut guest = support::owner::Owner::register(&socket, "guest", support::owner::OnTerm::Die);
    guest.call(&acquire("", &disk, 0)).expect_ok();
    for _ in 0..2 {
        daemon.upgrade();
        client.ping();
        host.assert_held(&disk);
    }
    guest.call(&release("", &disk)).expect_ok();
}

#[test]
fn weakness_8_a_successor_that_cannot_go_on_is_found_out_before_the_exec() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    host.install_script("echo '/usr/sbin/virtlockd (virtlockd-rs) 99.0.0'; exit 0");
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("does not read the ledger"), "{reason}");
    host.assert_held(&disk);
    host.install(&daemon::program());
    upgrade(&daemon);
    assert!(refusals(&daemon).len() == 1);
    guest.call(&release("", &disk)).expect_ok();
}

/// ACQUIRE as a call that brings `count` descriptors.
fn acquire_with_descriptors(serial: u32, name: &str, count: u32) -> Vec<u8> {
    let call = acquire("", name, 0);
    let mut payload = Vec::new();
    put_u32(&mut payload, count);
    payload.extend_from_slice(&call.payload());
    frame(
        LOCK_PROGRAM,
        1,
        call.procedure(),
        CALL_WITH_FDS,
        serial,
        0,
        &payload,
    )
}

/// A piece of a stream: bytes, or one byte with a descriptor.
#[derive(Clone)]
enum Piece {
    Bytes(u8),
    Descriptor,
}

fn send_pieces(client: &mut Client, pieces: &[Piece]) {
    let mut plain = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Bytes(byte) => plain.push(*byte),
            Piece::Descriptor => {
                client.send(&std::mem::take(&mut plain));
                let file = std::fs::File::open("/dev/null").expect("open /dev/null");
                client
                    .send_descriptors(&[file.as_fd()])
                    .expect("send a descriptor");
            }
        }
    }
    client.send(&plain);
}

fn serial_of(reply: &[u8]) -> u32 {
    u32::from_be_bytes(reply[20..24].try_into().expect("a whole header"))
}

/// REGISTER, ACQUIRE of the first disk with two descriptors behind it, ACQUIRE of the second.
fn stream_of(pid: i32, first: &str, second: &str) -> Vec<Piece> {
    let bytes = |bytes: Vec<u8>| bytes.into_iter().map(Piece::Bytes);
    let mut pieces: Vec<Piece> = bytes(register_as("guest", pid).frame(0)).collect();
    pieces.extend(bytes(acquire_with_descriptors(1, first, 2)));
    pieces.extend([Piece::Descriptor, Piece::Descriptor]);
    pieces.extend(bytes(acquire("", second, 0).frame(2)));
    pieces
}

#[test]
fn weakness_9_a_stream_cut_anywhere_goes_on_behind_the_upgrade() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let length = stream_of(guest.pid(), "/run/a0000", "/run/b0000").len();
    let mut streams: Vec<(Client, Vec<Piece>, usize)> = (0..=length)
        .map(|cut| {
            let (first, second) = (
                host.disk(&format!("a{cut:04}")),
                host.disk(&format!("b{cut:04}")),
            );
            let pieces = stream_of(guest.pid(), &first, &second);
            assert_eq!(pieces.len(), length);
            let mut client = daemon.client();
            send_pieces(&mut client, &pieces[..cut]);
            (client, pieces, cut)
        })
        .collect();
    // Everything that was sent has been read: what is half is in the daemon, not in the sockets.
    daemon.wait_until_asleep();
    upgrade(&daemon);
    for (client, pieces, cut) in &mut streams {
        send_pieces(client, &pieces[*cut..]);
        for serial in 0..3 {
            let reply = client.receive();
            assert_eq!(serial_of(&reply), serial, "cut at {cut}");
            assert!(Reply::parse(&reply).is_ok(), "cut at {cut}, call {serial}");
        }
        client.ping();
        host.assert_held(&format!("/run/a{cut:04}"));
        host.assert_held(&format!("/run/b{cut:04}"));
    }
}

#[test]
fn weakness_9_replies_that_a_client_has_not_read_are_all_delivered_once() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut client = daemon.client();
    // More than the sockets' buffers hold in either direction, so that replies wait in the daemon
    // and calls behind them.
    client
        .stream()
        .set_nonblocking(true)
        .expect("a socket that does not block");
    let mut unsent = Vec::new();
    let mut serial = 0;
    wait_until(DEADLINE, "the daemon to take no more", || {
        loop {
            if unsent.is_empty() {
                unsent = register_as("guest", guest.pid()).frame(serial);
                serial += 1;
            }
            use std::io::Write;
            match client.stream().write(&unsent) {
                Ok(count) => drop(unsent.drain(..count)),
                Err(_) => break,
            }
        }
        std::thread::sleep(Duration::from_millis(50));
        client.stream().write(&[]).is_ok() && !takes_more(client.stream())
    });
    client
        .stream()
        .set_nonblocking(false)
        .expect("a socket that blocks");
    upgrade(&daemon);
    upgrade(&daemon);
    // The rest of the last call goes out as soon as the daemon reads again.
    let mut sender = client.stream().try_clone().expect("a second handle");
    let rest = unsent.clone();
    let writer = std::thread::spawn(move || sender.write_all(&rest).expect("send the rest"));
    for expected in 0..serial {
        let reply = client.receive();
        assert_eq!(serial_of(&reply), expected);
        Reply::parse(&reply).expect_ok();
    }
    writer.join().expect("the writer");
    client.ping();
    host.assert_held(&disk);
}

fn takes_more(stream: &std::os::unix::net::UnixStream) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut watched = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    poll(&mut watched, PollTimeout::ZERO).expect("poll the socket") > 0
}

/// How many clients the lock server has, as libvirt's own admin program says.
fn lock_clients(host: &Host) -> String {
    let output = host
        .namespace
        .command("virt-admin")
        .args(["-c", "virtlockd:///system", "srv-clients-info", "virtlockd"])
        .output()
        .expect("run virt-admin");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix("nclients "))
        .map(|rest| rest.trim_start_matches([' ', ':']).trim().to_owned())
        .unwrap_or_else(|| panic!("no count of clients: {output:?}"))
}

#[test]
fn weakness_35_max_clients_is_not_exceeded_after_an_upgrade() {
    if !require_root() {
        return;
    }
    if !Path::new("/usr/bin/virt-admin").exists() {
        return support::skip("needs virt-admin");
    }
    let host = Host::new();
    let daemon = host.start_configured("max_clients = 2\n");
    // The probe of the start has gone when there is room for two.
    wait_until(DEADLINE, "the probe to be gone", || {
        lock_clients(&host) == "0"
    });
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut second = helper_client(&daemon, "guest", guest.pid());
    let mut waiting: Vec<Client> = (0..3).map(|_| daemon.client()).collect();
    upgrade(&daemon);
    assert_eq!(lock_clients(&host), "2");
    for client in &mut waiting[..2] {
        // For somebody new: who speaks for the guest would be served.
        client.post(&register_as("third", i32::MAX));
        match client.receive_within(DEADLINE) {
            Received::Frame(reply) => assert!(!Reply::parse(&reply).is_ok(), "it was served"),
            Received::Closed { .. } => (),
            Received::Silence { .. } => panic!("a client without an answer"),
        }
    }
    assert_eq!(lock_clients(&host), "2");
    second.ping();
    // The last one waits, and is served when there is room.
    drop(second);
    wait_until(DEADLINE, "the client that waits to be let in", || {
        daemon.stderr().contains("There is room for the client")
    });
    waiting[2]
        .call(&register_as("third", guest.pid()))
        .expect_ok();
    host.assert_held(&disk);
}
