//! Something to see: a daemon, two guests that want one disk, an upgrade, and a death. Started by
//! `tests/demo`, which gives it a /run of its own; the guests are processes of this very program.
#![allow(missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtlockd::wire::error;
use virtlockd::wire::frame::{HEADER, LONGEST, STATUS_OK, Split, split};
use virtlockd::wire::lock::{Call, Target};

const SOCKET: &str = "/run/libvirt/virtlockd-sock";
const DISK: &str = "/run/disk.img";

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some("guest") => guest(&words[2]),
        Some(program) => show(program),
        None => eprintln!("usage: tests/demo"),
    }
}

/// A guest: registers, wants the disk, says what it was told, and lives until it is killed.
fn guest(name: &str) {
    let mut stream = UnixStream::connect(SOCKET).expect("the daemon listens");
    let pid = i32::try_from(std::process::id()).expect("a pid");
    let uuid = &[pid as u8; 16];
    let register = Call::Register {
        uuid,
        name: name.as_bytes(),
        id: 1,
        pid,
        flags: 0,
    };
    ask(&mut stream, &register).expect("registration");
    let target = Target {
        lockspace: b"",
        name: DISK.as_bytes(),
    };
    match ask(&mut stream, &Call::AcquireResource { target, flags: 0 }) {
        Ok(()) => println!("has the disk"),
        Err(text) => println!("is refused: {text}"),
    }
    let _ = std::io::stdin().read(&mut [0]);
}

fn ask(stream: &mut UnixStream, call: &Call<'_>) -> Result<(), String> {
    let mut bytes = Vec::new();
    call.encode(&mut bytes, 1);
    stream.write_all(&bytes).expect("the daemon reads");
    let mut reply = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).expect("the daemon answers");
        assert!(count > 0, "the daemon closed the connection");
        reply.extend_from_slice(&piece[..count]);
        if let Split::Frame(frame) = split(&reply, LONGEST) {
            if frame.header.status == STATUS_OK {
                return Ok(());
            }
            let error = error::decode(&reply[HEADER..]).expect("an error object");
            return Err(String::from_utf8_lossy(error.message.unwrap_or_default()).into_owned());
        }
    }
}

struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
}

fn start_guest(name: &str) -> Running {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["guest", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a guest");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let mut running = Running { child, output };
    let mut line = String::new();
    running.output.read_line(&mut line).expect("its word");
    println!(
        "   guest '{name}', pid {}: {}",
        running.child.id(),
        line.trim()
    );
    running
}

fn show(program: &str) {
    std::fs::write(DISK, "the guests' data").expect("a disk");
    println!("1. The daemon starts: {program}");
    let mut daemon = Command::new(program).spawn().expect("the daemon");
    wait_until("it listens", || UnixStream::connect(SOCKET).is_ok());
    println!("   pid {}, socket {SOCKET}", daemon.id());

    println!("2. Two guests want {DISK}:");
    let mut first = start_guest("one");
    let mut second = start_guest("two");
    println!("   the kernel says: {}", kernel_lock());

    println!("3. The daemon replaces itself (SIGUSR1), keeping locks and clients:");
    signal(Signal::SIGUSR1, daemon.id());
    let environment = format!("/proc/{}/environ", daemon.id());
    wait_until("its successor runs", || {
        std::fs::read(&environment)
            .is_ok_and(|text| text.windows(18).any(|part| part == b"VIRTLOCKD_HANDOVER"))
    });
    println!(
        "   pid {} still, and the kernel says: {}",
        daemon.id(),
        kernel_lock()
    );

    println!("4. Guest 'one' is killed; its lock goes with it:");
    first.child.kill().expect("a kill");
    first.child.wait().expect("its end");
    wait_until("its lock is free", || kernel_lock() == "no lock");
    let mut third = start_guest("three");

    println!(
        "5. The daemon ends; who still holds a lock is fenced, so that nobody writes unguarded:"
    );
    signal(Signal::SIGTERM, daemon.id());
    daemon.wait().expect("its end");
    for guest in [&mut second, &mut third] {
        let _ = guest.child.kill();
        let _ = guest.child.wait();
    }
    let content = std::fs::read_to_string(DISK).expect("the disk");
    println!("   done; the disk still says '{content}'");
}

fn kernel_lock() -> String {
    use std::os::unix::fs::MetadataExt;
    let inode = Path::new(DISK).metadata().expect("the disk").ino();
    let locks = std::fs::read_to_string("/proc/locks").expect("/proc/locks");
    locks
        .lines()
        .find(|line| line.contains("OFDLCK") && line.contains(&format!(":{inode} 0 0")))
        .map_or("no lock".to_owned(), |line| {
            line.split_once(' ').map_or("", |(_, text)| text).to_owned()
        })
}

fn signal(signal: Signal, pid: u32) {
    let pid = i32::try_from(pid).expect("a pid");
    kill(Pid::from_raw(pid), signal).expect("the process is there");
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "after 10 s still waiting: {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
