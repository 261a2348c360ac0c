//! The passing half of a client: what may be read from its socket, and the bytes that are on their way
//! in and out. It owns memory only while a frame is incomplete or a reply is unsent. What a client is
//! and may do outlives it: see [`crate::custody::clients`].

use std::os::fd::RawFd;

use crate::host::errno::Errno;

use super::conversation::{Conversation, Pending};
use crate::custody::clients::Traffic;
use crate::custody::own_connections::Seen;
use crate::desk::turn;
use crate::host::shared::Shared;
use crate::server::flow::ENOUGH_OUTPUT;

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
    /// Some of it is out, and the socket may take more.
    Part,
    /// The socket takes no more for now.
    Blocked,
    /// The kernel has no memory for it now.
    NoMemory,
    /// Nobody will ever read it.
    Failed,
}

/// Through what a connection sends: its socket, and the desk that is to know how much went out.
#[derive(Clone, Copy, Debug)]
pub struct Post<'a> {
    /// The socket.
    pub socket: RawFd,
    /// The desk's memory.
    pub memory: &'a Shared,
}

/// A connection.
#[derive(Debug, Default)]
pub struct Connection {
    /// It ends as soon as its output is sent.
    pub closing: bool,
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
    /// When its owner was last seen to have a connection of its own: a lock taken over another's need not
    /// ask again until one of those is over.
    pub own_seen: Seen,
    /// Of what happens it was told up to this number, if it is told at all.
    pub told: Option<u64>,
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
    /// A connection that was just accepted. Who connects has something to say, and has mostly said it by
    /// now: its first turn, behind those that are known to be quick, costs no poll.
    pub fn new() -> Connection {
        Connection {
            readable: true,
            ..Connection::default()
        }
    }

    /// A connection that was passed on with these bytes on their way.
    pub fn resume(traffic: Traffic) -> Connection {
        let Traffic {
            pending,
            descriptors_at_end,
            arrived,
            unsent,
            closing,
        } = traffic;
        let mut connection = Connection {
            closing,
            paused: !pending.is_empty(),
            ..Connection::default()
        };
        connection.keep_conversation(Conversation::resume(Pending {
            bytes: pending,
            descriptors_at_end,
            arrived,
        }));
        connection.hold(&unsent);
        connection
    }

    /// The bytes that are on their way, to be passed on.
    pub fn traffic(&self) -> Traffic {
        let Pending {
            bytes,
            descriptors_at_end,
            arrived,
        } = self
            .conversation()
            .and_then(Conversation::pending)
            .unwrap_or_default();
        Traffic {
            pending: bytes,
            descriptors_at_end,
            arrived,
            unsent: self.unsent().to_vec(),
            closing: self.closing,
        }
    }

    /// Whether anything is on its way.
    pub fn is_quiet(&self) -> bool {
        !self.closing && self.conversation().is_none() && self.unsent().is_empty()
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

    /// Sends what is left of earlier replies, once. What it achieved, and how many bytes went out.
    pub fn send_rest(&mut self, post: Post<'_>) -> (Sent, usize) {
        match &mut self.on_the_way {
            Some(on_the_way) if !on_the_way.output.is_empty() => {
                let output = std::mem::take(&mut on_the_way.output);
                self.send(post, &output)
            }
            _ => (Sent::All, 0),
        }
    }

    /// Sends what is left of earlier replies, then `bytes`, once; keeps what the socket does not take. What
    /// it achieved, and how many bytes went out.
    pub fn send(&mut self, post: Post<'_>, bytes: &[u8]) -> (Sent, usize) {
        if !self.unsent().is_empty() {
            self.hold(bytes);
            return self.send_rest(post);
        }
        if bytes.is_empty() {
            return (Sent::All, 0);
        }
        loop {
            let failed = match turn::send(post.memory, post.socket, bytes) {
                Ok(count) if count >= bytes.len() => return (Sent::All, count),
                Ok(count) => {
                    self.hold(bytes.get(count..).unwrap_or_default());
                    return (Sent::Part, count);
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Sent::Blocked,
                Err(Errno::ENOMEM | Errno::ENOBUFS) => Sent::NoMemory,
                Err(_) => return (Sent::Failed, 0),
            };
            self.hold(bytes);
            return (failed, 0);
        }
    }

    /// Whether its replies wait for those that follow: frames of it are waiting, and there is not
    /// much to send yet.
    pub fn holds_replies(&self) -> bool {
        !self.closing && self.paused && self.unsent().len() < ENOUGH_OUTPUT
    }

    /// Nobody reads its replies any more. What it sent before is done all the same, if it is served:
    /// it is read to its end.
    pub fn reads_to_the_end(&mut self) -> bool {
        (self.readable, self.hung_up) = (true, true);
        !self.closing
    }

    /// Keeps replies, or what is left of them, behind those that are kept already.
    pub fn hold(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            let on_the_way = self.on_the_way.get_or_insert_default();
            on_the_way.output.extend_from_slice(bytes);
        }
    }

    /// What it takes of the memory for messages that are not whole and replies that are not sent,
    /// bytes.
    pub fn held(&self) -> usize {
        self.conversation()
            .map_or(0, Conversation::waiting)
            .saturating_add(self.unsent().len())
    }
}
