//! The passing half of a client: what may be read from its socket, and the bytes that are on their way
//! in and out. It owns memory only while a frame is incomplete or a reply is unsent, and between turns the
//! bytes themselves lie in the client's slot on the desk, where there is one, and nowhere else. What a
//! client is and may do outlives it: see [`crate::custody::clients`].

use std::os::fd::RawFd;

use crate::host::errno::Errno;

use super::conversation::{Conversation, Pending};
use crate::custody::clients::Traffic;
use crate::custody::own_connections::Seen;
use crate::desk::layout::Way;
use crate::desk::{slot, turn};
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

/// The most of earlier replies that is fetched from the desk to be sent, bytes: a socket seldom takes more.
const MOST_AT_ONCE: usize = 256 * 1024;

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
    /// The first of them waits for what others do: there is nothing to be done before.
    pub waits: bool,
    /// The socket may have something to read: no read has come back short since it was said to.
    pub readable: bool,
    /// The other side has shut its end: read on until there is nothing.
    pub hung_up: bool,
    /// Nobody has the other end any more.
    pub gone: bool,
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
    /// Whether its slot on the desk says what it has on its way.
    is_on_desk: bool,
    on_the_way: Option<Box<OnTheWay>>,
}

/// Bytes that came in and wait, and bytes that wait to go out. Few connections have any, and there
/// are thousands.
#[derive(Debug, Default)]
struct OnTheWay {
    conversation: Conversation,
    /// Of the replies, how many bytes lie on the desk.
    on_desk: usize,
    /// What follows them.
    output: Vec<u8>,
}

impl OnTheWay {
    fn unsent(&self) -> usize {
        self.on_desk.saturating_add(self.output.len())
    }
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

    /// The bytes that are on their way, to be passed on, of the client with this number.
    pub fn traffic(&self, number: RawFd, desk: &Shared) -> Traffic {
        let Some(on_the_way) = &self.on_the_way else {
            return Traffic {
                closing: self.closing,
                ..Traffic::default()
            };
        };
        let from_desk = |way, size| match usize::try_from(number) {
            Ok(number) if size > 0 => slot::front(desk, number, way, size),
            _ => Vec::new(),
        };
        let conversation = &on_the_way.conversation;
        let (descriptors_at_end, arrived) = conversation.descriptors();
        let here = conversation.pending().map(|it| it.bytes);
        let mut pending = from_desk(Way::Pending, conversation.elsewhere());
        pending.extend(here.unwrap_or_default());
        let mut unsent = from_desk(Way::Unsent, on_the_way.on_desk);
        unsent.extend_from_slice(&on_the_way.output);
        Traffic {
            pending,
            descriptors_at_end,
            arrived,
            unsent,
            closing: self.closing,
        }
    }

    /// Whether nothing is on its way.
    pub fn is_quiet(&self) -> bool {
        !self.closing && self.conversation().is_none() && self.unsent() == 0
    }

    /// Whether its slot on the desk says what it has on its way, or had at the beginning of a step.
    pub fn is_on_desk(&self) -> bool {
        self.is_on_desk
    }

    /// Its slot on the desk says all that it has on its way: here it is not kept any longer.
    pub fn lies_on_desk(&mut self) {
        self.is_on_desk = !self.is_quiet();
        if let Some(on_the_way) = &mut self.on_the_way {
            on_the_way.conversation.lies_elsewhere();
            (on_the_way.on_desk, on_the_way.output) = (on_the_way.unsent(), Vec::new());
        }
        self.forget_if_empty();
    }

    fn forget_if_empty(&mut self) {
        if self.conversation().is_none() && self.unsent() == 0 {
            self.on_the_way = None;
        }
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
        } else if self.unsent() == 0 {
            self.on_the_way = None;
        }
    }

    /// How many bytes could not be sent yet.
    pub fn unsent(&self) -> usize {
        self.on_the_way.as_deref().map_or(0, OnTheWay::unsent)
    }

    /// Sends what is left of earlier replies, once. What it achieved, and how many bytes went out.
    pub fn send_rest(&mut self, post: Post<'_>) -> (Sent, usize) {
        let Some(on_the_way) = &mut self.on_the_way else {
            return (Sent::All, 0);
        };
        let output = std::mem::take(&mut on_the_way.output);
        if on_the_way.on_desk == 0 {
            return self.send(post, &output);
        }
        let number = usize::try_from(post.socket).unwrap_or(usize::MAX);
        let mut front = slot::front(post.memory, number, Way::Unsent, MOST_AT_ONCE);
        if front.len() == on_the_way.on_desk {
            front.extend_from_slice(output.get(..MOST_AT_ONCE).unwrap_or(&output));
        }
        let (sent, count) = match front.is_empty() {
            true => (Sent::Failed, 0),
            false => send_once(post, &front),
        };
        if sent == Sent::Failed {
            (on_the_way.on_desk, on_the_way.output) = (0, Vec::new());
            return (sent, count);
        }
        let here = count.saturating_sub(on_the_way.on_desk);
        on_the_way.on_desk = on_the_way.on_desk.saturating_sub(count);
        self.hold(output.get(here..).unwrap_or_default());
        match sent {
            Sent::All if self.unsent() > 0 => (Sent::Part, count),
            sent => (sent, count),
        }
    }

    /// Sends what is left of earlier replies, then `bytes`, once; keeps what the socket does not take. What
    /// it achieved, and how many bytes went out.
    pub fn send(&mut self, post: Post<'_>, bytes: &[u8]) -> (Sent, usize) {
        if self.unsent() > 0 {
            self.hold(bytes);
            return self.send_rest(post);
        }
        if bytes.is_empty() {
            return (Sent::All, 0);
        }
        let (sent, count) = send_once(post, bytes);
        if sent != Sent::Failed {
            self.hold(bytes.get(count..).unwrap_or_default());
        }
        (sent, count)
    }

    /// Whether its replies wait for those that follow: frames of it are waiting, and there is not
    /// much to send yet.
    pub fn holds_replies(&self) -> bool {
        !self.closing && self.paused && self.unsent() < ENOUGH_OUTPUT
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
            .saturating_add(self.unsent())
    }
}

/// Sends bytes, of which there are some, once. What that achieved, and how many went out.
fn send_once(post: Post<'_>, bytes: &[u8]) -> (Sent, usize) {
    loop {
        return match turn::send(post.memory, post.socket, bytes) {
            Ok(count) if count >= bytes.len() => (Sent::All, count),
            Ok(count) => (Sent::Part, count),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => (Sent::Blocked, 0),
            Err(Errno::ENOMEM | Errno::ENOBUFS) => (Sent::NoMemory, 0),
            Err(_) => (Sent::Failed, 0),
        };
    }
}
