//! The turn of one connection: what it sent is read, worked on and answered, until everything is done
//! or its time is over. Turns are short, and shorter while somebody else is served beside them, so that
//! nobody who makes one call waits long for those who make thousands.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use mio::Interest;
use mio::unix::SourceFd;

use super::connection::{Appetite, Connection, Phase, Sent, Service};
use super::conversation::{Conversation, Flow, Taken};
use super::daemon::{Daemon, RETRY_MS};
use super::deadlines::Deadline;
use super::dispatch;
use super::token::Source;
use crate::host::clock::Moment;
use crate::host::errno::Errno;
use crate::host::stream;
use crate::wire::{frame, lock};

/// For how long one connection is read from and its frames are worked on before others have their
/// turn, microseconds: the time of a dozen locks.
const TURN_US: u64 = 32;
/// The same while there is company: one lock takes about as long. Who makes a call while somebody else
/// floods the daemon waits hardly longer than if nobody did, and that is worth the time of more polls.
const SHORT_TURN_US: u64 = 4;
/// For how long somebody who was served beside others' work is company, milliseconds.
const COMPANY_MS: u64 = 1000;
/// What a turn must not take although it has ended in time, microseconds: a frame that costs so much
/// is as good as many. Far above a lock's cost, because the processor may have been somebody else's.
const LONG_TURN_US: u64 = 2 * TURN_US;
/// The most that one read takes. It is more than a turn's worth of calls: what is left of them has to
/// be kept, and that takes time, too.
pub const READ_SIZE: usize = 8 * 1024;
/// How much may be kept of messages that are not whole yet and of replies that are not sent yet, over
/// all admin clients, bytes. The protocol allows each message 32 MiB.
const ADMIN_BYTES: u32 = 64 * 1024 * 1024;
/// So many bytes of replies at the end of a turn are sent in the next one: that takes long, too.
const LONG_REPLIES: usize = 8 * 1024;

/// How a connection's turn went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Everything was done, and soon.
    Short,
    /// Everything was done, but it took long.
    Long,
    /// Something is left to do.
    Unfinished,
}

enum Read {
    Some { bytes: usize, descriptors: bool },
    Nothing,
    NoMemory,
    End,
}

impl Daemon {
    /// Somebody was served whose call might have had to wait for the work of others: from now on, and
    /// for a while, turns are short.
    pub fn note_company(&mut self) {
        self.company_until = Moment::now().plus_ms(COMPANY_MS);
    }

    /// When a turn that starts now ends.
    pub fn turn_end(&self, now: Moment) -> Moment {
        let length = if now < self.company_until {
            SHORT_TURN_US
        } else {
            TURN_US
        };
        now.plus_us(length)
    }

    /// One connection's turn. It is shorter if an `end` is given that comes earlier.
    pub fn serve(&mut self, place: usize, end: Option<Moment>) {
        let start = Moment::now();
        let turn = self.serve_turn(place, start, end.unwrap_or_else(|| self.turn_end(start)));
        self.count_admin_bytes(place);
        let Some(connection) = self.connections.get_mut(place) else {
            return;
        };
        connection.appetite = match (turn, connection.appetite) {
            (Turn::Short, Appetite::Large) => Appetite::Unknown,
            (Turn::Short, _) => Appetite::Small,
            (Turn::Long, Appetite::Small) => Appetite::Doubtful,
            (Turn::Long | Turn::Unfinished, _) => Appetite::Large,
        };
        if turn == Turn::Unfinished {
            self.enqueue(place);
        }
    }

    /// Keeps count of the memory that admin clients take, and closes the one that takes too much.
    fn count_admin_bytes(&mut self, place: usize) {
        let Some(connection) = self.connections.get_mut(place) else {
            return;
        };
        if connection.service != Service::Admin {
            return;
        }
        let held = connection
            .conversation()
            .map_or(0, Conversation::waiting)
            .saturating_add(connection.unsent().len());
        let held = u32::try_from(held).unwrap_or(u32::MAX);
        let others = self.admin_bytes.saturating_sub(connection.counted);
        connection.counted = held;
        self.admin_bytes = others.saturating_add(held);
        if self.admin_bytes > ADMIN_BYTES && held > 0 && connection.phase != Phase::Over {
            tracing::error!(
                target: "rpc.netserverclient",
                "The admin client with pid {} is closed: unfinished messages and unread replies \
                 of all admin clients together would take more than {} MiB",
                connection.peer.pid, ADMIN_BYTES >> 20
            );
            self.end_connection(place);
        }
    }

    /// What a connection sent is read, worked on and answered, until `end`.
    fn serve_turn(&mut self, place: usize, start: Moment, end: Moment) -> Turn {
        let Some(connection) = self.connections.get_mut(place) else {
            return Turn::Short;
        };
        connection.queued = false;
        let mut turn = Turn::Short;
        let mut is_over = false;
        loop {
            let Some(connection) = self.connections.get_mut(place) else {
                return turn;
            };
            if connection.phase == Phase::Over {
                return turn;
            }
            if !connection.holds_replies() {
                match connection.send_rest() {
                    Sent::All => (),
                    Sent::Blocked => {
                        self.wait_to_send(place, true);
                        return turn;
                    }
                    Sent::NoMemory => {
                        self.serve_later(place);
                        return turn;
                    }
                    Sent::Failed if connection.reads_to_the_end() => (),
                    Sent::Failed => {
                        self.end_connection(place);
                        return turn;
                    }
                }
            }
            if connection.phase == Phase::Closing {
                self.end_connection(place);
                return turn;
            }
            if !connection.paused && !connection.readable {
                // Half a frame is no call: who sends such waits behind those with whole ones.
                if connection.conversation().is_some() {
                    turn = Turn::Long;
                }
                self.wait_to_send(place, false);
                return turn;
            }
            if is_over {
                return Turn::Unfinished;
            }
            let (bytes, descriptors) = if connection.paused {
                (0, false)
            } else {
                match receive(connection, &mut self.input) {
                    Read::Some { bytes, descriptors } => (bytes, descriptors),
                    Read::Nothing => continue,
                    Read::NoMemory => {
                        self.serve_later(place);
                        return turn;
                    }
                    Read::End => {
                        self.end_connection(place);
                        return turn;
                    }
                }
            };
            let taken = self.take_in(place, 0..bytes, descriptors, end);
            // Before the reply goes out: whoever gets it may have this processor next.
            let now = Moment::now();
            is_over = now >= end;
            if now >= start.plus_us(LONG_TURN_US) {
                turn = Turn::Long;
            }
            if is_over && self.output.len() >= LONG_REPLIES && self.hold_replies(place, taken) {
                return Turn::Unfinished;
            }
            if !self.answer(place, taken) {
                return turn;
            }
        }
    }

    /// Works on the frames of what was read.
    fn take_in(
        &mut self,
        place: usize,
        bytes: Range<usize>,
        descriptors: bool,
        end: Moment,
    ) -> Taken {
        let Some(connection) = self.connections.get_mut(place) else {
            return Taken::Close;
        };
        let longest = match connection.service {
            Service::Lock => lock::LONGEST_FRAME,
            Service::Admin => frame::LONGEST,
        };
        let mut conversation = connection.take_conversation();
        let waited = conversation.waiting();
        let input = std::mem::take(&mut self.input);
        let mut output = std::mem::take(&mut self.output);
        let mut count = 0usize;
        // Most often there is only one frame, and nothing else to be put off; of many, every second
        // one is worth a look at the clock, or every one.
        let step = if end < self.company_until { 1 } else { 2 };
        let taken = conversation.take_in(
            input.get(bytes).unwrap_or_default(),
            descriptors,
            longest,
            |header, payload| {
                let flow = dispatch::dispatch(self, place, header, payload, &mut output);
                count = count.wrapping_add(1);
                let may_pause = count.is_multiple_of(step) && flow == Flow::Continue;
                if may_pause && Moment::now() >= end {
                    Flow::Pause
                } else {
                    flow
                }
            },
        );
        self.input = input;
        self.output = output;
        if let Some(connection) = self.connections.get_mut(place) {
            connection.paused = taken == Taken::Paused && !conversation.is_empty();
            connection.keep_conversation(conversation);
        }
        if waited > READ_SIZE {
            // A long frame needed memory. Most connections never send one.
            self.give_memory_back_later();
        }
        taken
    }

    /// Keeps the replies that were made for the connection's next turn, if it has one.
    fn hold_replies(&mut self, place: usize, taken: Taken) -> bool {
        let Some(connection) = self.connections.get_mut(place) else {
            return false;
        };
        if taken == Taken::Close || !connection.is_served() {
            return false;
        }
        connection.hold(&self.output);
        self.output.clear();
        self.output.shrink_to(READ_SIZE);
        self.give_memory_back_later();
        true
    }

    /// Sends the replies that were made, or keeps them for those that follow. Whether the turn goes
    /// on.
    fn answer(&mut self, place: usize, taken: Taken) -> bool {
        let Some(connection) = self.connections.get_mut(place) else {
            return false;
        };
        let sent = if taken == Taken::Paused && connection.holds_replies() {
            connection.hold(&self.output);
            Sent::All
        } else {
            connection.send(&self.output)
        };
        self.output.clear();
        // One long reply is no reason to keep so much memory for ever.
        self.output.shrink_to(READ_SIZE);
        if taken == Taken::Close && connection.phase != Phase::Over {
            connection.phase = Phase::Closing;
        }
        match (sent, connection.phase) {
            (Sent::Failed, _) if connection.reads_to_the_end() => true,
            (Sent::Failed, _) | (Sent::All, Phase::Closing) => {
                self.end_connection(place);
                false
            }
            (Sent::Blocked, _) => {
                self.wait_to_send(place, true);
                self.give_memory_back_later();
                false
            }
            (Sent::NoMemory, _) => {
                self.serve_later(place);
                false
            }
            (_, Phase::Over) => false,
            (Sent::All, _) => true,
        }
    }

    /// To end a connection for want of memory would be to kill the machine that it stands for.
    fn serve_later(&mut self, place: usize) {
        let again = Moment::now().plus_ms(RETRY_MS);
        self.deadlines.set(Deadline::Serve(place), again);
    }

    /// Asks to be told, or no longer to be told, when the socket takes bytes again.
    fn wait_to_send(&mut self, place: usize, waits: bool) {
        let Some(connection) = self.connections.get_mut(place) else {
            return;
        };
        if connection.waits_to_send == waits {
            return;
        }
        connection.waits_to_send = waits;
        let mut interest = Interest::READABLE;
        if waits {
            interest |= Interest::WRITABLE;
        }
        let token = Source::Connection(place).token();
        let descriptor = connection.socket.as_raw_fd();
        if let Err(error) = self
            .registry
            .reregister(&mut SourceFd(&descriptor), token, interest)
        {
            tracing::error!(
                target: "rpc.netserverclient",
                "A client is closed because it cannot be watched: {error}"
            );
            self.end_connection(place);
        }
    }
}

/// Reads once. A short read means that the socket is empty: the next bytes, and the end of the
/// stream, come with an event of their own. Unless the end was announced already, or descriptors
/// cut the read short.
fn receive(connection: &mut Connection, buffer: &mut [u8]) -> Read {
    match stream::receive(connection.socket.as_fd(), buffer) {
        Ok(received) if received.bytes == 0 => Read::End,
        Ok(stream::Received { bytes, descriptors }) => {
            let is_short = bytes < buffer.len() && !descriptors;
            connection.readable = connection.hung_up || !is_short;
            Read::Some { bytes, descriptors }
        }
        // Nobody reads the replies, and there is no end to be read.
        Err(Errno::EAGAIN) if connection.hung_up => Read::End,
        Err(Errno::EAGAIN) => {
            connection.readable = false;
            Read::Nothing
        }
        Err(Errno::EINTR) => Read::Nothing,
        Err(Errno::ENOMEM | Errno::ENOBUFS) => Read::NoMemory,
        Err(_) => Read::End,
    }
}
