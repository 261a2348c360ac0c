//! One client: its socket, who is at the other end, what it may do, and the bytes that are on
//! their way in and out. It owns memory only while a frame is incomplete or a reply is unsent.

use std::os::fd::{AsFd, OwnedFd};

use super::conversation::Conversation;
use super::dispatch::ENOUGH_OUTPUT;
use super::lock_service::Session;
use crate::host::errno::Errno;
use crate::host::stream::{self, Peer};

use crate::locks::table::Owner;

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

/// What serving a connection takes, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Appetite {
    /// What it sent last was done in one turn, and soon.
    Small,
    /// What it sent last took long, or was half a frame, for the first time. Perhaps something else had
    /// the processor meanwhile.
    Doubtful,
    /// What it sent last takes more than a turn, or long, or was half a frame once more.
    Large,
    /// It is new, or what it sent before its last turn took more than one: first it has to show that
    /// it keeps nobody waiting.
    #[default]
    Unknown,
}

/// What sending achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Everything is out.
    All,
    /// The socket takes no more for now.
    Blocked,
    /// The kernel has no memory for it now.
    NoMemory,
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
    /// Whether it has made a call, or was let in after it had been refused.
    pub has_called: bool,
    /// Frames may be waiting in the conversation that nothing but time keeps from being served.
    pub paused: bool,
    /// The socket may have something to read: no read has come back short since it was said to.
    pub readable: bool,
    /// The other side has shut its end: read on until there is nothing.
    pub hung_up: bool,
    /// It is in one of the reactor's lists already.
    pub queued: bool,
    /// In which one it will be.
    pub appetite: Appetite,
    /// Whether the reactor is told when the socket takes bytes again.
    pub waits_to_send: bool,
    /// Whether its peer was seen to mean the same process by a number as this daemon does.
    pub shares_numbers: bool,
    /// What it was last seen to take of the memory for all admin clients, bytes.
    pub counted: u32,
    on_the_way: Option<Box<OnTheWay>>,
}

/// Bytes that came in and wait, and bytes that wait to go out. Few connections have any, and there
/// are thousands.
#[derive(Debug, Default)]
struct OnTheWay {
    conversation: Conversation,
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
            paused: false,
            readable: false,
            hung_up: false,
            queued: false,
            appetite: Appetite::default(),
            waits_to_send: false,
            shares_numbers: false,
            counted: 0,
            on_the_way: None,
        }
    }

    /// The owner whose own connection this is. A peer that cannot be seen from here (pid 0) stands for
    /// nobody.
    pub fn own_owner(&self) -> Option<&Owner> {
        let owner = self.session.owner()?;
        self.stands_for(owner).then_some(owner)
    }

    /// Whether the process of this owner made the connection itself.
    pub fn stands_for(&self, owner: &Owner) -> bool {
        owner.pid > 0 && owner.pid == self.peer.pid
    }

    /// What came in and waits, if anything does.
    pub fn conversation(&self) -> Option<&Conversation> {
        let conversation = &self.on_the_way.as_ref()?.conversation;
        (!conversation.is_empty()).then_some(conversation)
    }

    /// Takes the conversation out, to go on with it.
    pub fn take_conversation(&mut self) -> Conversation {
        match &mut self.on_the_way {
            Some(on_the_way) => std::mem::take(&mut on_the_way.conversation),
            None => Conversation::default(),
        }
    }

    /// Puts the conversation back.
    pub fn keep_conversation(&mut self, conversation: Conversation) {
        if !conversation.is_empty() {
            self.on_the_way.get_or_insert_default().conversation = conversation;
        } else if self.unsent().is_empty() {
            self.on_the_way = None;
        }
    }

    /// Bytes that could not be sent yet.
    pub fn unsent(&self) -> &[u8] {
        match &self.on_the_way {
            Some(on_the_way) => &on_the_way.output,
            None => &[],
        }
    }

    /// Sends what is left of earlier replies.
    pub fn send_rest(&mut self) -> Sent {
        match &mut self.on_the_way {
            Some(on_the_way) if !on_the_way.output.is_empty() => {
                let output = std::mem::take(&mut on_the_way.output);
                self.send(&output)
            }
            _ => Sent::All,
        }
    }

    /// Sends what is left of earlier replies, then `bytes`; keeps what the socket does not take.
    pub fn send(&mut self, bytes: &[u8]) -> Sent {
        if !self.unsent().is_empty() {
            self.hold(bytes);
            return self.send_rest();
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match stream::send(self.socket.as_fd(), rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => (),
                Err(Errno::EAGAIN) => {
                    self.hold(rest);
                    return Sent::Blocked;
                }
                Err(Errno::ENOMEM | Errno::ENOBUFS) => {
                    self.hold(rest);
                    return Sent::NoMemory;
                }
                Err(_) => return Sent::Failed,
            }
        }
        Sent::All
    }

    /// Whether its replies wait for those that follow: frames of it are waiting, and there is not
    /// much to send yet.
    pub fn holds_replies(&self) -> bool {
        self.is_served() && self.paused && self.unsent().len() < ENOUGH_OUTPUT
    }

    /// Nobody reads its replies any more. What it sent before is done all the same, if it is served:
    /// it is read to its end.
    pub fn reads_to_the_end(&mut self) -> bool {
        (self.readable, self.hung_up) = (true, true);
        self.is_served()
    }

    /// Whether its calls are answered, if only with a refusal, and it goes on.
    pub fn is_served(&self) -> bool {
        matches!(self.phase, Phase::Served | Phase::Refused(_))
    }

    /// Keeps replies, or what is left of them, behind those that are kept already.
    pub fn hold(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            let on_the_way = self.on_the_way.get_or_insert_default();
            on_the_way.output.extend_from_slice(bytes);
        }
    }
}
