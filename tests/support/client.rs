//! A blocking client over one connection: it sends calls, takes replies apart and panics, aloud, when
//! what comes is not what was due. The messages themselves are those of [`super::protocol`].

use super::DEADLINE;
use super::protocol;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub use super::protocol::*;

/// A call of the lock program.
pub type Call = protocol::Call<Vec<u8>>;

/// The uuid that [`register`] uses.
pub const UUID: [u8; 16] = *b"\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f";

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
                let procedure = procedures[(self.procedure() - CREATE_RESOURCE) as usize];
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

/// A reply, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done. The lock program never returns anything, so `payload` is empty there.
    Ok {
        payload: Vec<u8>,
    },
    Error(ErrorObject),
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
        assert_eq!(
            length_word(bytes),
            Some(bytes.len()),
            "the length word of {bytes:02x?}"
        );
        let kind = word(bytes, at::TYPE) as i32;
        assert_eq!(kind, REPLY, "the type of the reply {bytes:02x?}");
        let payload = &bytes[HEADER_BYTES..];
        match word(bytes, at::STATUS) as i32 {
            STATUS_OK => Reply::Ok {
                payload: payload.to_vec(),
            },
            STATUS_ERROR => match ErrorObject::parse(payload) {
                Ok(error) => Reply::Error(error),
                Err(fault) => panic!("{fault}: {payload:02x?}"),
            },
            status => panic!("a reply has status {status}"),
        }
    }

    /// The bytes of a reply of libvirt's daemon, as ours gives it: where it is libvirt's sentence that
    /// something is locked, `by` stands behind it, in the message and in the detail.
    pub fn with_holder(bytes: &[u8], by: &str) -> Vec<u8> {
        const IS_LOCKED: &[u8] = b"' is locked";
        if word(bytes, at::STATUS) as i32 != STATUS_ERROR {
            return bytes.to_vec();
        }
        let mut reader = Reader::new(bytes);
        let mut string_after = |words: usize| {
            reader.at += 4 * words;
            reader.optional_bytes().expect("a whole error object")
        };
        // Code and domain stand before the message, level and domain object behind it.
        let message = string_after(HEADER_BYTES / 4 + 2).expect("an error has a message");
        let (_format, detail) = (string_after(2), string_after(0));
        let Some(detail) = detail.filter(|at| bytes[at.clone()].ends_with(IS_LOCKED)) else {
            return bytes.to_vec();
        };
        let mut longer = bytes.to_vec();
        // The later one first: the place of the other one stays.
        for at in [detail, message] {
            let text = [&bytes[at.clone()], by.as_bytes()].concat();
            let padded = at.end.next_multiple_of(4);
            let mut string = Vec::new();
            put_string(&mut string, &text);
            longer.splice(at.start - 4..padded, string);
        }
        let length = longer.len() as u32;
        set_word(&mut longer, at::LENGTH, length);
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
        let length = length_word(&self.unread)?;
        assert!(
            length >= HEADER_BYTES,
            "the daemon sent a length word of {length}"
        );
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

    /// As [`Client::call`], where the daemon may have closed the connection: then why there is no reply.
    #[track_caller]
    pub fn try_call(&mut self, call: &Call) -> Result<Reply, String> {
        let serial = self.next_serial;
        self.next_serial += 1;
        let sent = self.try_send(&call.frame(serial));
        sent.map_err(|error| error.to_string())?;
        self.try_receive(serial)
    }

    /// The reply to the call of this serial, or why there is none.
    #[track_caller]
    pub fn try_receive(&mut self, serial: u32) -> Result<Reply, String> {
        match self.receive_within(DEADLINE) {
            Received::Frame(reply) => {
                assert_eq!(word(&reply, at::SERIAL), serial, "serial of the reply");
                Ok(Reply::parse(&reply))
            }
            other => Err(format!("{other:?}")),
        }
    }

    /// Whether no answer has come that nobody took, nor the end.
    pub fn has_nothing_to_read(&mut self) -> bool {
        let received = self.receive_within(Duration::from_micros(1));
        matches!(&received, Received::Silence { partial } if partial.is_empty())
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
    admin.send(&frame(
        ADMIN_PROGRAM,
        1,
        LOOKUP_SERVER,
        CALL,
        serial,
        0,
        &payload,
    ));
    let reply = admin.receive();
    assert_eq!(reply[20..24], serial.to_be_bytes());
    Reply::parse(&reply).expect_ok();
}
