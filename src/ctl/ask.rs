//! One connection to a daemon's admin socket: a call and its reply, and the messages in between. What can go
//! wrong with it is a sentence for whoever asked.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::text::safe;
use crate::host::stream;
use crate::wire::error;
use crate::wire::frame::{self, Kind, Split};
use crate::wire::lock;
use crate::wire::status::{self, Call};

/// For so long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// A daemon that is replaced may refuse for a moment.
const CONNECT_PATIENCE: Duration = Duration::from_millis(500);

/// Why there is no answer.
#[derive(Debug)]
pub enum Trouble {
    /// Nobody listens there.
    Nobody(PathBuf, std::io::Error),
    /// Whoever listens knows no status program: libvirt's daemon, or an earlier one of ours.
    Another,
    /// The connection ended.
    Gone,
    /// No answer in time.
    Silent,
    /// The daemon was replaced while it listed something.
    Replaced,
    /// It refused.
    Refused(Vec<u8>),
    /// It answered something that cannot be read.
    Garbled,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Nobody(path, error) => {
                let path = safe(path.as_os_str().as_encoded_bytes());
                write!(out, "no daemon can be asked at '{path}': {error}")?;
                match error.kind() {
                    ErrorKind::PermissionDenied => {
                        write!(
                            out,
                            ". Only root, or the user whose daemon it is, may ask it"
                        )
                    }
                    ErrorKind::NotFound => write!(
                        out,
                        ". Is virtlockd running, and its admin socket (virtlockd-admin.socket)?"
                    ),
                    _ => Ok(()),
                }
            }
            Trouble::Another => write!(
                out,
                "the daemon there does not say what it holds: it is libvirt's, or an earlier version"
            ),
            Trouble::Gone => write!(out, "the daemon has closed the connection"),
            Trouble::Silent => write!(
                out,
                "the daemon has not answered for {} s",
                PATIENCE.as_secs()
            ),
            Trouble::Replaced => write!(out, "the daemon is replaced again and again"),
            Trouble::Refused(text) => write!(out, "the daemon refuses: {}", safe(text)),
            Trouble::Garbled => write!(
                out,
                "the daemon's answer cannot be read: it may be of a later version"
            ),
        }
    }
}

impl From<crate::wire::xdr::DecodeError> for Trouble {
    fn from(_: crate::wire::xdr::DecodeError) -> Trouble {
        Trouble::Garbled
    }
}

/// A connection.
#[derive(Debug)]
pub struct Link {
    stream: UnixStream,
    /// Who listens there, as the kernel says.
    pub peer: Option<i32>,
    received: Vec<u8>,
    messages: VecDeque<Vec<u8>>,
    serial: u32,
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// [`Trouble::Nobody`].
    pub fn open(path: &Path) -> Result<Link, Trouble> {
        let end = Instant::now().checked_add(CONNECT_PATIENCE);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => {
                    let is_over = end.is_none_or(|end| Instant::now() >= end);
                    if is_over || error.kind() != ErrorKind::WouldBlock {
                        return Err(Trouble::Nobody(path.to_owned(), error));
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        };
        let copy = stream.try_clone().map(OwnedFd::from);
        let peer = copy.ok().and_then(|copy| stream::peer(&copy).ok());
        Ok(Link {
            peer: peer.map(|peer| peer.pid).filter(|pid| *pid > 0),
            stream,
            received: Vec::new(),
            messages: VecDeque::new(),
            serial: 0,
        })
    }

    /// The payload of the reply to a call.
    ///
    /// # Errors
    /// Why there is none.
    pub fn call(&mut self, call: &Call<'_>) -> Result<Vec<u8>, Trouble> {
        self.serial = self.serial.wrapping_add(1);
        let mut bytes = Vec::new();
        call.encode(&mut bytes, self.serial);
        self.exchange(&bytes)
    }

    /// A call of the lock program.
    ///
    /// # Errors
    /// Why it was not done.
    pub fn call_lock(&mut self, call: &lock::Call<'_>) -> Result<(), Trouble> {
        self.serial = self.serial.wrapping_add(1);
        let mut bytes = Vec::new();
        call.encode(&mut bytes, self.serial);
        self.exchange(&bytes).map(drop)
    }

    fn exchange(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Trouble> {
        self.stream.write_all(bytes).map_err(|_| Trouble::Gone)?;
        let end = Instant::now().checked_add(PATIENCE);
        loop {
            let rest = end.map_or(PATIENCE, |end| {
                end.saturating_duration_since(Instant::now())
            });
            let Some((header, payload)) = self.frame(rest)? else {
                return Err(Trouble::Silent);
            };
            match header.kind {
                Kind::Message if header.program == status::PROGRAM => {
                    self.messages.push_back(payload);
                }
                Kind::Reply if header.serial == self.serial => {
                    return if header.status == frame::STATUS_OK {
                        Ok(payload)
                    } else {
                        Err(refusal(&payload))
                    };
                }
                _ => (),
            }
        }
    }

    /// The payload of the next message about what happened; `None` if there is none for so long.
    ///
    /// # Errors
    /// The end of the connection.
    pub fn message(&mut self, patience: Duration) -> Result<Option<Vec<u8>>, Trouble> {
        if let Some(message) = self.messages.pop_front() {
            return Ok(Some(message));
        }
        loop {
            match self.frame(patience)? {
                None => return Ok(None),
                Some((header, payload))
                    if header.program == status::PROGRAM
                        && header.procedure == status::HAPPENED =>
                {
                    return Ok(Some(payload));
                }
                Some(_) => (),
            }
        }
    }

    fn frame(&mut self, patience: Duration) -> Result<Option<(frame::Header, Vec<u8>)>, Trouble> {
        let end = Instant::now().checked_add(patience);
        let mut buffer = [0; 64 * 1024];
        loop {
            match frame::split(&self.received, frame::LONGEST) {
                Split::Frame(found) => {
                    let (header, payload) = (found.header, found.payload.to_vec());
                    let length = found.length;
                    self.received.drain(..length.min(self.received.len()));
                    return Ok(Some((header, payload)));
                }
                Split::Invalid => return Err(Trouble::Garbled),
                Split::Incomplete { .. } => (),
            }
            let rest = end.map_or(patience, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if rest.is_zero() {
                return Ok(None);
            }
            // A time of zero would mean for ever.
            let _ = self.stream.set_read_timeout(Some(rest));
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(Trouble::Gone),
                Ok(count) => {
                    let more = buffer.get(..count).unwrap_or_default();
                    self.received.extend_from_slice(more);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Ok(None),
                    ErrorKind::Interrupted => (),
                    _ => return Err(Trouble::Gone),
                },
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn refusal(payload: &[u8]) -> Trouble {
    let Ok(error) = error::decode(payload) else {
        return Trouble::Garbled;
    };
    let text = error.message.unwrap_or_default();
    if text.starts_with(b"Cannot find program ") {
        Trouble::Another
    } else if text.ends_with(b"begin anew") {
        Trouble::Replaced
    } else {
        Trouble::Refused(text.to_vec())
    }
}
