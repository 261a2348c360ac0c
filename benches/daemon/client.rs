//! A client of the lock program, with an encoding of its own: a bench that borrowed the library's
//! encoder would not notice if both sides were wrong in the same way.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};

use crate::measure::Outcome;

const LOCK_PROGRAM: u32 = 0x0EA7_BEEF;
const REGISTER: u32 = 1;
const RESTRICT: u32 = 2;
const ACQUIRE: u32 = 6;
const RELEASE: u32 = 7;
const TYPE_REPLY: u32 = 1;
const STATUS_OK: u32 = 0;

/// Bytes of a reply without a result, and of every header.
pub const REPLY_BYTES: usize = 28;
/// The greatest error reply the client reads.
const ERROR_BYTES: usize = 64 * 1024;
/// How long a blocking client waits for one reply. The C daemon stops for 3 s for each owner that it
/// fences, so this is longer than any stop that a scenario provokes.
const REPLY_TIMEOUT_MS: u16 = 60_000;
/// Connections opened before the first reply is awaited. Less than the C daemon's backlog of 30.
const CONNECT_BATCH: usize = 24;

/// A pid that no process can have (the kernel's limit is 4,194,304): the owner of a machine that
/// exists on paper only. Its connections end without anybody being killed.
pub fn paper_pid(index: u32) -> u32 {
    0x4000_0000 + index
}

fn frame(procedure: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(REPLY_BYTES + payload.len()).expect("a bench frame is small");
    let mut bytes = Vec::with_capacity(REPLY_BYTES + payload.len());
    for word in [length, LOCK_PROGRAM, 1, procedure, 0, 0, 0] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

fn put_string(payload: &mut Vec<u8>, text: &str) {
    let length = u32::try_from(text.len()).expect("a bench string is small");
    payload.extend_from_slice(&length.to_be_bytes());
    payload.extend_from_slice(text.as_bytes());
    payload.resize(payload.len().next_multiple_of(4), 0);
}

/// REGISTER as libvirt sends it for the `index`-th guest.
pub fn register(index: u32, pid: u32) -> Vec<u8> {
    register_as(&format!("guest-{index}"), index, pid)
}

/// REGISTER with any name.
pub fn register_as(name: &str, index: u32, pid: u32) -> Vec<u8> {
    let mut payload = vec![0; 12];
    payload.extend_from_slice(&index.to_be_bytes());
    put_string(&mut payload, name);
    for word in [index + 1, pid, 0] {
        payload.extend_from_slice(&word.to_be_bytes());
    }
    frame(REGISTER, &payload)
}

/// RESTRICT, the last call on the connection that a guest keeps.
pub fn restrict() -> Vec<u8> {
    frame(RESTRICT, &[0; 4])
}

fn resource(procedure: u32, disk: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    put_string(&mut payload, "");
    put_string(&mut payload, disk);
    payload.extend_from_slice(&0_u32.to_be_bytes());
    frame(procedure, &payload)
}

/// ACQUIRE_RESOURCE, exclusive, in the default lockspace.
pub fn acquire(disk: &str) -> Vec<u8> {
    resource(ACQUIRE, disk)
}

/// RELEASE_RESOURCE in the default lockspace.
pub fn release(disk: &str) -> Vec<u8> {
    resource(RELEASE, disk)
}

/// Writes the serial into an encoded frame.
pub fn stamp(frame: &mut [u8], serial: u32) {
    frame[20..24].copy_from_slice(&serial.to_be_bytes());
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes
        .get(offset..offset + 4)
        .expect("the caller read a whole header");
    u32::from_be_bytes(word.try_into().expect("four bytes"))
}

/// Whether these 28 bytes are the good reply to the call with this serial.
pub fn is_ok(reply: &[u8], serial: u32) -> bool {
    word(reply, 0) as usize == REPLY_BYTES
        && word(reply, 4) == LOCK_PROGRAM
        && word(reply, 16) == TYPE_REPLY
        && word(reply, 20) == serial
        && word(reply, 24) == STATUS_OK
}

/// Says what is wrong with a reply; `rest` reads what follows the header.
fn complaint(header: &[u8], serial: u32, rest: &mut impl Read) -> String {
    let length = word(header, 0) as usize;
    if word(header, 24) == STATUS_OK || length <= REPLY_BYTES || length > ERROR_BYTES {
        return format!("reply to call {serial} is not the expected one: {header:02x?}");
    }
    let mut body = vec![0; length - REPLY_BYTES];
    if let Err(error) = rest.read_exact(&mut body) {
        return format!("error reply to call {serial} ends early: {error}");
    }
    // code, domain, presence of the message, its length, its bytes
    let text = body.get(12..16).map(|_| word(&body, 12) as usize);
    let text = text
        .and_then(|length| body.get(16..16 + length))
        .unwrap_or_default();
    format!(
        "call {serial} was refused: {}",
        String::from_utf8_lossy(text)
    )
}

/// Opens a connection. Waits while the backlog is full.
pub fn connect(socket: &Path) -> Outcome<UnixStream> {
    let stream = UnixStream::connect(socket)
        .map_err(|error| format!("connecting to {}: {error}", socket.display()))?;
    let limit = Duration::from_millis(REPLY_TIMEOUT_MS.into());
    let timeouts = stream
        .set_read_timeout(Some(limit))
        .and_then(|()| stream.set_write_timeout(Some(limit)));
    timeouts.map_err(|error| format!("setting the timeouts of a connection: {error}"))?;
    Ok(stream)
}

/// One call at a time over a blocking connection.
pub struct Client {
    pub stream: UnixStream,
    serial: u32,
}

impl Client {
    pub fn connect(socket: &Path) -> Outcome<Self> {
        Ok(Self {
            stream: connect(socket)?,
            serial: 0,
        })
    }

    /// Sends the frame under the next serial, which it returns.
    pub fn send(&mut self, frame: &mut [u8]) -> Outcome<u32> {
        let serial = self.serial;
        self.serial = serial.wrapping_add(1);
        stamp(frame, serial);
        self.stream
            .write_all(frame)
            .map_err(|error| format!("sending call {serial}: {error}"))?;
        Ok(serial)
    }

    /// Reads the reply to that call; anything but success is an error.
    pub fn receive(&mut self, serial: u32) -> Outcome<()> {
        let mut reply = [0; REPLY_BYTES];
        self.read_fully(&mut reply)?;
        if is_ok(&reply, serial) {
            Ok(())
        } else {
            Err(complaint(&reply, serial, &mut self.stream))
        }
    }

    /// Fills the buffer, however many pieces the bytes come in.
    ///
    /// Waits in poll(), as libvirt's client does. A process that blocks in read() instead is woken
    /// twice for each call, because the kernel wakes it too when the server has read its bytes.
    pub fn read_fully(&mut self, bytes: &mut [u8]) -> Outcome<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let mut interest = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut interest, REPLY_TIMEOUT_MS)
                .map_err(|e| format!("waiting for a reply: {e}"))?;
            if ready == 0 {
                return Err(format!("no reply for {REPLY_TIMEOUT_MS} ms"));
            }
            let count = self.stream.read(&mut bytes[filled..]);
            match count.map_err(|e| format!("reading a reply: {e}"))? {
                0 => return Err("the server closed the connection instead of a reply".into()),
                count => filled += count,
            }
        }
        Ok(())
    }

    pub fn call(&mut self, frame: &mut [u8]) -> Outcome<()> {
        let serial = self.send(frame)?;
        self.receive(serial)
    }
}

/// Opens `count` connections and sends on each the frames that `greeting` makes for its index. All
/// replies have come, and were good, when this returns.
pub fn connect_many(
    socket: &Path,
    indexes: std::ops::Range<u32>,
    greeting: impl Fn(u32) -> Vec<Vec<u8>>,
) -> Outcome<Vec<Client>> {
    let mut clients: Vec<Client> = Vec::with_capacity(indexes.len());
    let indexes: Vec<u32> = indexes.collect();
    for batch in indexes.chunks(CONNECT_BATCH) {
        let mut expected = Vec::new();
        for &index in batch {
            let mut client = Client::connect(socket)?;
            let mut serials = Vec::new();
            for mut frame in greeting(index) {
                serials.push(client.send(&mut frame)?);
            }
            expected.push(serials);
            clients.push(client);
        }
        let newest = clients.len() - batch.len();
        for (client, serials) in clients[newest..].iter_mut().zip(expected) {
            for serial in serials {
                client.receive(serial)?;
            }
        }
    }
    Ok(clients)
}

/// Makes an empty disk.
pub fn make_disk(path: &Path) -> Outcome<()> {
    fs::write(path, b"").map_err(|error| format!("making {}: {error}", path.display()))
}
