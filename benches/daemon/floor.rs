//! The floor: a bare epoll server that makes the same file calls as the task needs, answers every
//! call with success and checks nothing. A lock daemon cannot be cheaper than this on the same
//! kernel; how far above it a daemon lies is what its own work costs.
//!
//! One read, all whole frames of it, one write: what an honest minimal server does.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, listen};
use nix::sys::stat::Mode;

use crate::client::REPLY_BYTES;
use crate::measure::Outcome;
use crate::probe;
use crate::protocol::{ACQUIRE, HEADER_BYTES, RELEASE, REPLY, at, length_word, set_word, word};

const SCRATCH_BYTES: usize = 64 * 1024;
const LISTENER: u64 = u64::MAX;

struct Connection {
    stream: UnixStream,
    /// The start of a frame whose end has not come yet.
    partial: Vec<u8>,
}

/// Serves for ever; ends with an error only.
pub fn serve(socket: &Path) -> Outcome<()> {
    let listener = UnixListener::bind(socket).map_err(|e| format!("binding the floor: {e}"))?;
    // std listens with 128; a boot of thousands of machines needs more room.
    listen(&listener, Backlog::MAXALLOWABLE).map_err(|e| format!("listening: {e}"))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| format!("epoll: {e}"))?;
    watch(&epoll, &listener, LISTENER)?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut held: HashMap<Vec<u8>, OwnedFd> = HashMap::new();
    let mut scratch = vec![0; SCRATCH_BYTES];
    let mut out = Vec::with_capacity(SCRATCH_BYTES);
    let mut events = [EpollEvent::empty(); 256];
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.map_err(|e| format!("epoll_wait: {e}"))?,
        };
        for event in &events[..ready] {
            if event.data() == LISTENER {
                accept(&listener, &epoll, &mut connections)?;
                continue;
            }
            let slot = event.data() as usize;
            let Some(connection) = connections[slot].as_mut() else {
                continue;
            };
            out.clear();
            if turn(connection, &mut scratch, &mut out, &mut held)? {
                connections[slot] = None;
            }
        }
    }
}

fn watch(epoll: &Epoll, what: &impl AsFd, token: u64) -> Outcome<()> {
    epoll
        .add(what, EpollEvent::new(EpollFlags::EPOLLIN, token))
        .map_err(|e| format!("epoll_ctl: {e}"))
}

fn accept(
    listener: &UnixListener,
    epoll: &Epoll,
    connections: &mut Vec<Option<Connection>>,
) -> Outcome<()> {
    let (stream, _) = listener.accept().map_err(|e| format!("accepting: {e}"))?;
    stream
        .set_nonblocking(true)
        .map_err(|e| format!("making a connection non-blocking: {e}"))?;
    let slot = stream.as_raw_fd() as usize;
    watch(epoll, &stream, slot as u64)?;
    if connections.len() <= slot {
        connections.resize_with(slot + 1, || None);
    }
    connections[slot] = Some(Connection {
        stream,
        partial: Vec::new(),
    });
    Ok(())
}

/// Serves what one connection has sent; says whether the connection has ended.
fn turn(
    connection: &mut Connection,
    scratch: &mut [u8],
    out: &mut Vec<u8>,
    held: &mut HashMap<Vec<u8>, OwnedFd>,
) -> Outcome<bool> {
    let count = match connection.stream.read(scratch) {
        Ok(0) => return Ok(true),
        Ok(count) => count,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
        Err(_) => return Ok(true),
    };
    if connection.partial.is_empty() {
        let used = answer_all(&scratch[..count], out, held)?;
        connection.partial.extend_from_slice(&scratch[used..count]);
    } else {
        connection.partial.extend_from_slice(&scratch[..count]);
        let used = answer_all(&connection.partial, out, held)?;
        connection.partial.drain(..used);
    }
    // The clients of the bench always read: a socket that takes no more is a fault of the bench.
    connection
        .stream
        .write_all(out)
        .map_err(|e| format!("answering: {e}"))?;
    Ok(false)
}

/// Answers every whole frame and returns how many bytes they were.
fn answer_all(
    bytes: &[u8],
    out: &mut Vec<u8>,
    held: &mut HashMap<Vec<u8>, OwnedFd>,
) -> Outcome<usize> {
    let mut used = 0;
    while let Some(length) = length_word(&bytes[used..]) {
        let Some(frame) = bytes.get(used..used + length) else {
            break;
        };
        do_the_task(frame, held)?;
        let start = out.len();
        out.extend_from_slice(&frame[..REPLY_BYTES]);
        let reply = &mut out[start..];
        set_word(reply, at::LENGTH, REPLY_BYTES as u32);
        set_word(reply, at::TYPE, REPLY as u32);
        used += length;
    }
    Ok(used)
}

/// Acquire: open and lock. Release: unlock and close. Everything else: nothing.
fn do_the_task(frame: &[u8], held: &mut HashMap<Vec<u8>, OwnedFd>) -> Outcome<()> {
    let procedure = word(frame, at::PROCEDURE) as i32;
    if procedure != ACQUIRE && procedure != RELEASE {
        return Ok(());
    }
    // An empty lockspace path (4 bytes), then the length of the name and the name.
    let length = word(frame, HEADER_BYTES + 4) as usize;
    let name = &frame[HEADER_BYTES + 8..HEADER_BYTES + 8 + length];
    if procedure == ACQUIRE {
        let file = open(name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| format!("opening {}: {e}", String::from_utf8_lossy(name)))?;
        fcntl(
            &file,
            FcntlArg::F_OFD_SETLK(&probe::byte_zero(nix::libc::F_WRLCK)),
        )
        .map_err(|e| format!("locking {}: {e}", String::from_utf8_lossy(name)))?;
        held.insert(name.to_vec(), file);
    } else {
        let file = held.remove(name).ok_or("a release of what is not held")?;
        fcntl(
            &file,
            FcntlArg::F_OFD_SETLK(&probe::byte_zero(nix::libc::F_UNLCK)),
        )
        .map_err(|e| format!("unlocking {}: {e}", String::from_utf8_lossy(name)))?;
    }
    Ok(())
}
