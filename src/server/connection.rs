//! One client: its socket, who is at the other end, what it may do, and the bytes that are on
//! their way in and out. It owns memory only while a frame is incomplete or a reply is unsent.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::conversation::Conversation;
use super::lock_service::Session;
use crate::host::stream::{self, Peer};

pub use crate::restart::state::Service;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is served.
    Served,
    /// There is no room for it: its first call is answered with this reason, then it ends.
    Refused(NoRoom),
    /// It ends as soon as its output is sent.
    Closing,
    /// It is over; what it held is being cleared away.
    Over,
}

/// Why a client is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// There are as many clients as the limit allows.
    Limit,
    /// The daemon has no descriptors left.
    Descriptors,
}

/// What sending achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Everything is out.
    All,
    /// The socket takes no more for now.
    Blocked,
    /// Nobody will ever read it.
    Failed,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub socket: OwnedFd,
    /// Which program it is for.
    pub service: Service,
    /// Its number in its server, from 1.
    pub id: u64,
    /// Who called connect().
    pub peer: Peer,
    /// When that process started, on kernels that cannot name it better (SO_PEERPIDFD).
    pub start_time: Option<u64>,
    /// When it connected, seconds since the epoch.
    pub connected_at: i64,
    /// Where it stands.
    pub phase: Phase,
    /// What it may do (lock socket).
    pub session: Session,
    /// Whether it has made a call: only then does the admin socket tell who it is.
    pub has_called: bool,
    /// Bytes that came in and wait.
    pub conversation: Conversation,
    /// Frames may be waiting in the conversation that nothing but time keeps from being served.
    pub paused: bool,
    /// The socket may have something to read: no read has come back short since it was said to.
    pub readable: bool,
    /// The other side has shut its end: read on until there is nothing.
    pub hung_up: bool,
    /// It is in the reactor's list already.
    pub queued: bool,
    /// Whether the reactor is told when the socket takes bytes again.
    pub waits_to_send: bool,
    output: Vec<u8>,
}

impl Connection {
    /// A new connection, served or not.
    pub fn new(socket: OwnedFd, service: Service, id: u64, peer: Peer, phase: Phase) -> Connection {
        Connection {
            socket,
            service,
            id,
            peer,
            start_time: None,
            connected_at: 0,
            phase,
            session: Session::default(),
            has_called: false,
            conversation: Conversation::default(),
            paused: false,
            readable: false,
            hung_up: false,
            queued: false,
            waits_to_send: false,
            output: Vec::new(),
        }
    }

    /// Bytes that could not be sent yet.
    pub fn unsent(&self) -> &[u8] {
        &self.output
    }

    /// Sends what is left of earlier replies.
    pub fn send_rest(&mut self) -> Sent {
        if self.output.is_empty() {
            return Sent::All;
        }
        let output = std::mem::take(&mut self.output);
        self.send(&output)
    }

    /// Sends `bytes`, behind which nothing is waiting yet; keeps what the socket does not take.
    pub fn send(&mut self, bytes: &[u8]) -> Sent {
        let mut rest = bytes;
        while !rest.is_empty() {
            match stream::send(self.socket.as_fd(), rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => (),
                Err(Errno::EAGAIN) => {
                    self.output = rest.to_vec();
                    return Sent::Blocked;
                }
                Err(_) => return Sent::Failed,
            }
        }
        Sent::All
    }

    /// Puts bytes in front that an earlier image of the process could not send.
    pub fn resume_output(&mut self, bytes: Vec<u8>) {
        self.output = bytes;
    }
}
