//! A client of the lock program. Its messages are those of the tests (`protocol`): a bench that
//! borrowed the library's encoder would not notice if both sides were wrong in the same way.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::measure::Outcome;
use crate::protocol::{
    Call, ErrorObject, HEADER_BYTES, LOCK_PROGRAM, REPLY, STATUS_OK, at, length_word, set_word,
    word,
};

/// Bytes of a reply without a result.
pub const REPLY_BYTES: usize = HEADER_BYTES;
/// The greatest error reply the client reads.
const ERROR_BYTES: usize = 64 * 1024;
/// How long a blocking client waits for one reply. The C daemon stops for 3 s for each owner that it
/// fences, so this is longer than any stop that a scenario provokes.
const REPLY_TIMEOUT_MS: u16 = 60_000;
/// Connections opened before the first reply is awaited. Less than the C daemon's backlog of 30.
const CONNECT_BATCH: usize = 24;

/// A pid that no process can have (the kernel's limit is 4,194,304): the owner of a machine that
/// exists on paper only. Its connections end without anybody being killed. For those who never hold a
/// lock, and for attackers: see `machines.rs`.
pub fn paper_pid(index: u32) -> u32 {
    0x4000_0000 + index
}

/// REGISTER as libvirt sends it for the `index`-th guest.
pub fn register(index: u32, pid: u32) -> Vec<u8> {
    register_as(&format!("guest-{index}"), index, pid)
}

/// REGISTER with any name.
pub fn register_as(name: &str, index: u32, pid: u32) -> Vec<u8> {
    let mut uuid = [0; 16];
    set_word(&mut uuid, 12, index);
    let call = Call::Register {
        uuid,
        name,
        id: index + 1,
        pid,
        flags: 0,
    };
    call.frame(0)
}

/// RESTRICT, the last call on the connection that a guest keeps.
pub fn restrict() -> Vec<u8> {
    Call::<&str>::Restrict { flags: 0 }.frame(0)
}

/// ACQUIRE_RESOURCE, exclusive, in the default lockspace.
pub fn acquire(disk: &str) -> Vec<u8> {
    let call = Call::Acquire {
        path: "",
        name: disk,
        flags: 0,
    };
    call.frame(0)
}

/// RELEASE_RESOURCE in the default lockspace.
pub fn release(disk: &str) -> Vec<u8> {
    let call = Call::Release {
        path: "",
        name: disk,
        flags: 0,
    };
    call.frame(0)
}

/// Writes the serial into an encoded frame.
pub fn stamp(frame: &mut [u8], serial: u32) {
    set_word(frame, at::SERIAL, serial);
}

/// Whether these 28 bytes are the good reply to the call with this serial.
pub fn is_ok(reply: &[u8], serial: u32) -> bool {
    length_word(reply) == Some(REPLY_BYTES)
        && word(reply, at::PROGRAM) == LOCK_PROGRAM
        && word(reply, at::TYPE) as i32 == REPLY
        && word(reply, at::SERIAL) == serial
        && word(reply, at::STATUS) as i32 == STATUS_OK
}

/// Says what is wrong with a reply; `rest` reads what follows the header.
fn complaint(header: &[u8], serial: u32, rest: &mut impl Read) -> String {
    let length = word(header, at::LENGTH) as usize;
    let status = word(header, at::STATUS) as i32;
    if status == STATUS_OK || length <= REPLY_BYTES || length > ERROR_BYTES {
        return format!("reply to call {serial} is not the expected one: {header:02x?}");
    }
    let mut body = vec![0; length - REPLY_BYTES];
    if let Err(error) = rest.read_exact(&mut body) {
        return format!("error reply to call {serial} ends early: {error}");
    }
    match ErrorObject::parse(&body) {
        Ok(error) => format!("call {serial} was refused: {}", error.message),
        Err(fault) => format!("call {serial} was refused, and {fault}"),
    }
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

    /// The same where the reply is known to have come.
    pub fn receive_at_once(&mut self, serial: u32) -> Outcome<()> {
        let mut reply = [0; REPLY_BYTES];
        let count = self.stream.read(&mut reply);
        match count.map_err(|e| format!("reading a reply: {e}"))? {
            REPLY_BYTES if is_ok(&reply, serial) => Ok(()),
            REPLY_BYTES => Err(complaint(&reply, serial, &mut self.stream)),
            count => Err(format!("{count} bytes instead of a reply: {reply:02x?}")),
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

    /// Waits until the server is gone, however long that takes.
    pub fn wait_for_end(&mut self) -> Outcome<()> {
        let mut interest = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        poll(&mut interest, PollTimeout::NONE).map_err(|e| format!("waiting for the end: {e}"))?;
        // An end with bytes unread, which a server that was killed leaves, is an error and an end.
        match self.stream.read(&mut [0; REPLY_BYTES]) {
            Ok(1..) => Err("the server says something that nobody asked for".into()),
            Ok(0) | Err(_) => Ok(()),
        }
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
