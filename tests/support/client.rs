//! A blocking client of the wire protocol, written from the protocol's description alone and not
//! with the crate's own encoder: a mistake there must not be repeated here.
//!
//! A message is a length word (it counts itself), six words of header, a payload; integers are
//! big-endian and every item fills whole words of four bytes.

use super::DEADLINE;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const LOCK_PROGRAM: u32 = 0x0EA7_BEEF;
pub const ADMIN_PROGRAM: u32 = 0x0690_0690;
pub const KEEPALIVE_PROGRAM: u32 = 0x6b65_6570;

/// Message types.
pub const CALL: i32 = 0;
pub const REPLY: i32 = 1;
pub const MESSAGE: i32 = 2;
pub const CALL_WITH_FDS: i32 = 4;

/// Flags of ACQUIRE_RESOURCE.
pub const SHARED: u32 = 1;
pub const AUTOCREATE: u32 = 2;

/// Error codes.
pub const INTERNAL_ERROR: i32 = 1;
pub const INVALID_ARG: i32 = 8;
pub const OPERATION_DENIED: i32 = 29;
pub const SYSTEM_ERROR: i32 = 38;
pub const RPC_ERROR: i32 = 39;
pub const OPERATION_INVALID: i32 = 55;
pub const RESOURCE_BUSY: i32 = 87;

/// Error domains.
pub const DOMAIN_NONE: i32 = 0;
pub const DOMAIN_RPC: i32 = 7;
pub const DOMAIN_LOCKSPACE: i32 = 51;

/// The uuid that [`register`] uses.
pub const UUID: [u8; 16] = *b"\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f";

/// The call to the keepalive program that every daemon answers with [`PONG`].
pub const PING: [u8; 28] = keepalive(1);
/// The answer to [`PING`].
pub const PONG: [u8; 28] = keepalive(2);

const fn keepalive(procedure: u8) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[3] = 28;
    (bytes[4], bytes[5], bytes[6], bytes[7]) = (b'k', b'e', b'e', b'p');
    bytes[11] = 1;
    bytes[15] = procedure;
    bytes[19] = MESSAGE as u8;
    bytes
}

/// A call of the lock program. Strings are bytes: the protocol does not ask for UTF-8.
#[derive(Clone, PartialEq, Eq)]
pub enum Call {
    Register {
        uuid: [u8; 16],
        name: Vec<u8>,
        id: u32,
        pid: u32,
        flags: u32,
    },
    Restrict {
        flags: u32,
    },
    New {
        path: Vec<u8>,
        flags: u32,
    },
    CreateResource {
        path: Vec<u8>,
        name: Vec<u8>,
        flags: u32,
    },
    DeleteResource {
        path: Vec<u8>,
        name: Vec<u8>,
        flags: u32,
    },
    Acquire {
        path: Vec<u8>,
        name: Vec<u8>,
        flags: u32,
    },
    Release {
        path: Vec<u8>,
        name: Vec<u8>,
        flags: u32,
    },
    CreateLockspace {
        path: Vec<u8>,
    },
}

/// REGISTER of the domain "guest" (uuid [`UUID`], id 7) with this pid.
pub fn register(pid: i32) -> Call {
    register_as("guest", pid)
}

/// REGISTER of a domain of this name.
pub fn register_as(name: &str, pid: i32) -> Call {
    Call::Register {
        uuid: UUID,
        name: name.into(),
        id: 7,
        pid: pid as u32,
        flags: 0,
    }
}

pub fn restrict() -> Call {
    Call::Restrict { flags: 0 }
}

pub fn new_lockspace(path: &str) -> Call {
    Call::New {
        path: path.into(),
        flags: 0,
    }
}

pub fn create_lockspace(path: &str) -> Call {
    Call::CreateLockspace { path: path.into() }
}

pub fn create_resource(path: &str, name: &str) -> Call {
    Call::CreateResource {
        path: path.into(),
        name: name.into(),
        flags: 0,
    }
}

pub fn delete_resource(path: &str, name: &str) -> Call {
    Call::DeleteResource {
        path: path.into(),
        name: name.into(),
        flags: 0,
    }
}

pub fn acquire(path: &str, name: &str, flags: u32) -> Call {
    Call::Acquire {
        path: path.into(),
        name: name.into(),
        flags,
    }
}

pub fn release(path: &str, name: &str) -> Call {
    Call::Release {
        path: path.into(),
        name: name.into(),
        flags: 0,
    }
}

/// For the text of a failure: the strings as text, long ones cut.
impl std::fmt::Debug for Call {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Call::Register {
                name,
                id,
                pid,
                flags,
                ..
            } => {
                let name = shortened(name);
                write!(
                    out,
                    "REGISTER(name {name}, id {id}, pid {pid}, flags {flags:#x})"
                )
            }
            Call::Restrict { flags } => write!(out, "RESTRICT(flags {flags:#x})"),
            Call::New { path, flags } => write!(out, "NEW({}, flags {flags:#x})", shortened(path)),
            Call::CreateLockspace { path } => write!(out, "CREATE_LOCKSPACE({})", shortened(path)),
            Call::CreateResource { path, name, flags }
            | Call::DeleteResource { path, name, flags }
            | Call::Acquire { path, name, flags }
            | Call::Release { path, name, flags } => {
                let procedures = ["CREATE_RESOURCE", "DELETE_RESOURCE", "ACQUIRE", "RELEASE"];
                let procedure = procedures[self.procedure() as usize - 4];
                let (path, name) = (shortened(path), shortened(name));
                write!(
                    out,
                    "{procedure}(lockspace {path}, name {name}, flags {flags:#x})"
                )
            }
        }
    }
}

fn shortened(bytes: &[u8]) -> String {
    const MOST: usize = 120;
    match bytes.get(..MOST) {
        Some(start) => format!("\"{}\"... of {} bytes", start.escape_ascii(), bytes.len()),
        None => format!("\"{}\"", bytes.escape_ascii()),
    }
}

impl Call {
    pub fn procedure(&self) -> i32 {
        match self {
            Call::Register { .. } => 1,
            Call::Restrict { .. } => 2,
            Call::New { .. } => 3,
            Call::CreateResource { .. } => 4,
            Call::DeleteResource { .. } => 5,
            Call::Acquire { .. } => 6,
            Call::Release { .. } => 7,
            Call::CreateLockspace { .. } => 8,
        }
    }

    /// The arguments as they stand on the wire.
    pub fn payload(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Call::Register {
                uuid,
                name,
                id,
                pid,
                flags,
            } => {
                out.extend_from_slice(uuid);
                put_string(&mut out, name);
                put_u32(&mut out, *id);
                put_u32(&mut out, *pid);
                put_u32(&mut out, *flags);
            }
            Call::Restrict { flags } => put_u32(&mut out, *flags),
            Call::New { path, flags } => {
                put_string(&mut out, path);
                put_u32(&mut out, *flags);
            }
            Call::CreateResource { path, name, flags }
            | Call::DeleteResource { path, name, flags }
            | Call::Acquire { path, name, flags }
            | Call::Release { path, name, flags } => {
                put_string(&mut out, path);
                put_string(&mut out, name);
                put_u32(&mut out, *flags);
            }
            Call::CreateLockspace { path } => put_string(&mut out, path),
        }
        out
    }

    /// The whole message.
    pub fn frame(&self, serial: u32) -> Vec<u8> {
        frame(
            LOCK_PROGRAM,
            1,
            self.procedure(),
            CALL,
            serial,
            0,
            &self.payload(),
        )
    }
}

/// Any message, with a correct length word.
pub fn frame(
    program: u32,
    version: u32,
    procedure: i32,
    kind: i32,
    serial: u32,
    status: i32,
    payload: &[u8],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(28 + payload.len());
    put_u32(
        &mut out,
        u32::try_from(28 + payload.len()).expect("a message fits in 4 GiB"),
    );
    put_u32(&mut out, program);
    put_u32(&mut out, version);
    put_u32(&mut out, procedure as u32);
    put_u32(&mut out, kind as u32);
    put_u32(&mut out, serial);
    put_u32(&mut out, status as u32);
    out.extend_from_slice(payload);
    out
}

pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// A counted string, padded with zeros to a multiple of four bytes.
pub fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(
        out,
        u32::try_from(bytes.len()).expect("a string fits in 4 GiB"),
    );
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A reply, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done. The lock program never returns anything, so `payload` is empty there.
    Ok {
        payload: Vec<u8>,
    },
    Error(ErrorObject),
}

/// What a refused call gets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ErrorObject {
    pub code: i32,
    pub domain: i32,
    pub message: String,
    pub level: i32,
    pub str1: Option<String>,
    pub str2: Option<String>,
    pub int1: i32,
    pub int2: i32,
}

/// For the text of a failure: one line, a long message cut.
impl std::fmt::Debug for ErrorObject {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |text: &Option<String>| {
            text.as_ref()
                .map_or("none".into(), |text| shortened(text.as_bytes()))
        };
        let message = shortened(self.message.as_bytes());
        let (str1, str2) = (text(&self.str1), text(&self.str2));
        let ErrorObject {
            code,
            domain,
            level,
            int1,
            int2,
            ..
        } = self;
        write!(
            out,
            "code {code}, domain {domain}, level {level}, {message}, "
        )?;
        write!(out, "str1 {str1}, str2 {str2}, int1 {int1}, int2 {int2}")
    }
}

impl Reply {
    /// Takes a whole reply message apart. Panics on anything that is not one.
    pub fn parse(bytes: &[u8]) -> Reply {
        let mut reader = Reader { bytes, at: 0 };
        assert_eq!(
            reader.u32() as usize,
            bytes.len(),
            "the length word of {bytes:02x?}"
        );
        let (_program, _version, _procedure) = (reader.u32(), reader.u32(), reader.u32());
        assert_eq!(reader.i32(), REPLY, "the type of the reply {bytes:02x?}");
        let _serial = reader.u32();
        match reader.i32() {
            0 => Reply::Ok {
                payload: bytes[28..].to_vec(),
            },
            1 => {
                let error = ErrorObject {
                    code: reader.i32(),
                    domain: reader.i32(),
                    message: reader.optional_string().expect("an error has a message"),
                    level: reader.i32(),
                    ..ErrorObject::default()
                };
                assert_eq!(reader.u32(), 0, "an error names no domain object");
                let (str1, str2) = (reader.optional_string(), reader.optional_string());
                assert_eq!(reader.u32(), 0, "an error has no third string");
                let (int1, int2) = (reader.i32(), reader.i32());
                assert_eq!(reader.u32(), 0, "an error names no network object");
                assert_eq!(reader.at, bytes.len(), "bytes after the error object");
                Reply::Error(ErrorObject {
                    str1,
                    str2,
                    int1,
                    int2,
                    ..error
                })
            }
            status => panic!("a reply has status {status}"),
        }
    }

    /// The bytes of a reply of libvirt's daemon, as ours gives it: where it is libvirt's sentence that
    /// something is locked, `by` stands behind it, in the message and in the detail.
    pub fn with_holder(bytes: &[u8], by: &str) -> Vec<u8> {
        const IS_LOCKED: &[u8] = b"' is locked";
        let mut reader = Reader { bytes, at: 24 };
        if reader.i32() != 1 {
            return bytes.to_vec();
        }
        reader.at += 8;
        let message = reader.optional_bytes().expect("an error has a message");
        reader.at += 8;
        let (_format, detail) = (reader.optional_bytes(), reader.optional_bytes());
        let Some(detail) = detail.filter(|at| bytes[at.clone()].ends_with(IS_LOCKED)) else {
            return bytes.to_vec();
        };
        let mut longer = bytes.to_vec();
        // The later one first: the place of the other one stays.
        for at in [detail, message] {
            let text = [&bytes[at.clone()], by.as_bytes()].concat();
            let padded = at.end.next_multiple_of(4);
            let mut string = (text.len() as u32).to_be_bytes().to_vec();
            string.extend_from_slice(&text);
            string.resize(string.len().next_multiple_of(4), 0);
            longer.splice(at.start - 4..padded, string);
        }
        let length = longer.len() as u32;
        longer[..4].copy_from_slice(&length.to_be_bytes());
        longer
    }

    pub fn is_ok(&self) -> bool {
        matches!(self, Reply::Ok { .. })
    }

    /// The error, or a panic.
    pub fn error(&self) -> &ErrorObject {
        match self {
            Reply::Error(error) => error,
            Reply::Ok { .. } => panic!("the call was granted, an error was due"),
        }
    }

    /// Panics unless the call succeeded.
    #[track_caller]
    pub fn expect_ok(&self) {
        assert!(self.is_ok(), "the call was refused: {self:?}");
    }

    /// Panics unless it is an error of this code and domain; gives its text.
    #[track_caller]
    pub fn expect_error(&self, code: i32, domain: i32) -> &str {
        let error = self.error();
        assert_eq!(
            (error.code, error.domain),
            (code, domain),
            "another error: {error:?}"
        );
        &error.message
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn u32(&mut self) -> u32 {
        let word = self.bytes[self.at..self.at + 4]
            .try_into()
            .expect("four bytes");
        self.at += 4;
        u32::from_be_bytes(word)
    }

    fn i32(&mut self) -> i32 {
        self.u32() as i32
    }

    fn optional_string(&mut self) -> Option<String> {
        if self.u32() == 0 {
            return None;
        }
        let length = self.u32() as usize;
        let text = String::from_utf8_lossy(&self.bytes[self.at..self.at + length]).into_owned();
        self.at += length.next_multiple_of(4);
        Some(text)
    }

    /// Where the bytes of an optional string are.
    fn optional_bytes(&mut self) -> Option<std::ops::Range<usize>> {
        if self.u32() == 0 {
            return None;
        }
        let length = self.u32() as usize;
        let start = self.at;
        self.at += length.next_multiple_of(4);
        Some(start..start + length)
    }
}

/// What a read brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Frame(Vec<u8>),
    /// The daemon closed the connection. `partial`: bytes before, which are no whole message.
    Closed {
        partial: Vec<u8>,
    },
    /// Nothing (more) came in the time allowed.
    Silence {
        partial: Vec<u8>,
    },
}

/// One connection to a daemon. Every wait ends at a deadline.
pub struct Client {
    stream: UnixStream,
    next_serial: u32,
    unread: Vec<u8>,
}

impl Client {
    pub fn connect(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket)
            .unwrap_or_else(|error| panic!("connect to {}: {error}", socket.display()));
        Client::over(stream)
    }

    /// Speaks over a connection that is there already.
    pub fn over(stream: UnixStream) -> Client {
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("set a read deadline");
        stream
            .set_write_timeout(Some(DEADLINE))
            .expect("set a write deadline");
        Client {
            stream,
            next_serial: 0,
            unread: Vec::new(),
        }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Writes bytes as they are.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// [`Client::try_send`] that must succeed.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("write to the daemon");
    }

    /// Sends each descriptor in its own message of one zero byte, as CALL_WITH_FDS wants it.
    pub fn send_descriptors(&mut self, descriptors: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        for descriptor in descriptors {
            self.send_with_descriptors(b"\0", std::slice::from_ref(descriptor))?;
        }
        Ok(())
    }

    /// Sends bytes with any number of descriptors in one message (the kernel takes up to 253).
    pub fn send_with_descriptors(
        &mut self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> std::io::Result<()> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[std::io::IoSlice::new(bytes)],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        assert_eq!(sent, bytes.len(), "a message with descriptors was cut");
        Ok(())
    }

    /// The next whole message, the end of the connection, or silence for `limit`.
    pub fn receive_within(&mut self, limit: Duration) -> Received {
        let mut buffer = [0; 65536];
        self.stream
            .set_read_timeout(Some(limit))
            .expect("set a read deadline");
        loop {
            if let Some(frame) = self.take_frame() {
                return Received::Frame(frame);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Received::Closed {
                        partial: std::mem::take(&mut self.unread),
                    };
                }
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        return Received::Silence {
                            partial: self.unread.clone(),
                        };
                    }
                    ErrorKind::ConnectionReset => {
                        return Received::Closed {
                            partial: std::mem::take(&mut self.unread),
                        };
                    }
                    ErrorKind::Interrupted => {}
                    _ => panic!("read from the daemon: {error}"),
                },
            }
        }
    }

    fn take_frame(&mut self) -> Option<Vec<u8>> {
        let word = self.unread.first_chunk::<4>()?;
        let length = u32::from_be_bytes(*word) as usize;
        assert!(length >= 28, "the daemon sent a length word of {length}");
        if self.unread.len() < length {
            return None;
        }
        let rest = self.unread.split_off(length);
        Some(std::mem::replace(&mut self.unread, rest))
    }

    /// The next whole message; anything else is a failure.
    #[track_caller]
    pub fn receive(&mut self) -> Vec<u8> {
        match self.receive_within(DEADLINE) {
            Received::Frame(frame) => frame,
            other => panic!("a reply was due: {other:?}"),
        }
    }

    /// Waits for the daemon to close the connection; panics if a message comes instead.
    #[track_caller]
    pub fn expect_closed(&mut self) {
        match self.receive_within(DEADLINE) {
            Received::Closed { partial } if partial.is_empty() => {}
            other => panic!("the end of the connection was due: {other:?}"),
        }
    }

    /// Sends a call without waiting for its reply; gives the serial.
    #[track_caller]
    pub fn post(&mut self, call: &Call) -> u32 {
        let serial = self.next_serial;
        self.next_serial += 1;
        self.send(&call.frame(serial));
        serial
    }

    /// Sends a call and takes its reply as bytes.
    #[track_caller]
    pub fn call_raw(&mut self, call: &Call) -> Vec<u8> {
        self.post(call);
        self.receive()
    }

    /// Sends a call and takes its reply, which has to carry the call's own header.
    #[track_caller]
    pub fn call(&mut self, call: &Call) -> Reply {
        let serial = self.post(call);
        let reply = self.receive();
        let sent = call.frame(serial);
        assert_eq!(
            reply[4..16],
            sent[4..16],
            "program, version, procedure of the reply"
        );
        assert_eq!(reply[20..24], sent[20..24], "serial of the reply");
        Reply::parse(&reply)
    }

    /// Several calls in one write; the replies, in order.
    #[track_caller]
    pub fn pipeline(&mut self, calls: &[Call]) -> Vec<Reply> {
        let mut bytes = Vec::new();
        for call in calls {
            bytes.extend_from_slice(&call.frame(self.next_serial));
            self.next_serial += 1;
        }
        self.send(&bytes);
        calls
            .iter()
            .map(|_| Reply::parse(&self.receive()))
            .collect()
    }

    /// A PING and its PONG: the daemon is alive and has handled everything sent before.
    #[track_caller]
    pub fn ping(&mut self) {
        self.send(&PING);
        assert_eq!(self.receive(), PONG, "the answer to a PING");
    }
}

/// A look-up of the lock server over the admin protocol.
#[track_caller]
pub fn look_up_server(admin: &mut Client, serial: u32) {
    let mut payload = Vec::new();
    put_string(&mut payload, b"virtlockd");
    put_u32(&mut payload, 0);
    admin.send(&frame(ADMIN_PROGRAM, 1, 5, CALL, serial, 0, &payload));
    let reply = admin.receive();
    assert_eq!(reply[20..24], serial.to_be_bytes());
    Reply::parse(&reply).expect_ok();
}
