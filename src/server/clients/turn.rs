//! The turn of one connection: what it sent is read, worked on and answered, until everything is done
//! or its time is over. Turns are short, and shorter while somebody else is served beside them, so that
//! nobody who makes one call waits long for those who make thousands.

use std::ops::Range;
use std::os::fd::RawFd;

use crate::host::errno::Errno;

use super::connection::{Appetite, Connection, Sent};
use super::conversation::Taken;
use crate::custody::clients::ClientId;
use crate::custody::servers::Service;
use crate::host::clock::Moment;
use crate::host::stream;
use crate::server::deadlines::{Deadline, RETRY_MS};
use crate::server::flow::Flow;
use crate::server::hall::Hall;
use crate::server::services::dispatch;
use crate::server::watch::{Source, Watch};
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
const READ_SIZE: usize = 8 * 1024;
/// So many bytes of replies at the end of a turn are sent in the next one: that takes long, too.
const LONG_REPLIES: usize = 8 * 1024;

/// How long turns are.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Until when they are short.
    company_until: Moment,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            company_until: Moment(0),
        }
    }
}

impl Pace {
    /// Somebody was served whose call might have had to wait for the work of others: from now on, and
    /// for a while, turns are short.
    pub fn has_company(&mut self) {
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
}

/// How a connection's turn went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// Everything was done, and soon.
    Short,
    /// Everything was done, but it took long.
    Long,
    /// Something is left to do.
    Unfinished,
    /// Its calls asked for something that is to be done before they are answered; then it goes on.
    Ordered,
    /// The connection is over.
    Over,
}

impl Turned {
    /// What the connection is known to take from now on.
    pub fn appetite(self, before: Appetite) -> Appetite {
        match (self, before) {
            (Turned::Short, Appetite::Large) => Appetite::Unknown,
            (Turned::Short | Turned::Over, _) => Appetite::Small,
            (Turned::Long, Appetite::Small) => Appetite::Doubtful,
            (Turned::Long | Turned::Unfinished | Turned::Ordered, _) => Appetite::Large,
        }
    }
}

/// Where bytes are received, and where replies are made. All turns share them.
#[derive(Debug)]
pub struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Default for Buffers {
    fn default() -> Self {
        Buffers {
            input: vec![0; READ_SIZE],
            output: Vec::new(),
        }
    }
}

enum Read {
    Some { bytes: usize, descriptors: bool },
    Nothing,
    NoMemory,
    End,
}

/// What a turn works with.
#[derive(Debug)]
pub struct Turn<'a> {
    /// What its calls may use.
    pub hall: Hall<'a>,
    /// Where readiness is asked for.
    pub watch: &'a Watch,
    /// The buffers.
    pub buffers: &'a mut Buffers,
    /// How long it may be.
    pub pace: Pace,
}

impl Turn<'_> {
    /// What a connection sent is read, worked on and answered, until `end`.
    pub fn run(
        &mut self,
        id: ClientId,
        connection: &mut Connection,
        start: Moment,
        end: Moment,
    ) -> Turned {
        let Some(client) = self.hall.custody.state().client(id) else {
            return Turned::Over;
        };
        if client.is_over() {
            return Turned::Short;
        }
        let longest = match client.arrival.server {
            Service::Lock => lock::LONGEST_FRAME,
            Service::Admin => frame::LONGEST,
        };
        let socket = id.0;
        let mut turned = Turned::Short;
        let mut is_over = false;
        loop {
            if !connection.holds_replies() {
                match connection.send_rest(socket) {
                    Sent::All => (),
                    Sent::Blocked => return self.wait_to_send(id, connection, true, turned),
                    Sent::NoMemory => return self.serve_later(id, turned),
                    Sent::Failed if connection.reads_to_the_end() => (),
                    Sent::Failed => return Turned::Over,
                }
            }
            if connection.closing {
                return Turned::Over;
            }
            if !connection.paused && !connection.readable {
                // Half a frame is no call: who sends such waits behind those with whole ones.
                if connection.conversation().is_some() {
                    turned = Turned::Long;
                }
                return self.wait_to_send(id, connection, false, turned);
            }
            if is_over {
                return Turned::Unfinished;
            }
            let (bytes, descriptors) = if connection.paused {
                (0, false)
            } else {
                match receive(socket, connection, &mut self.buffers.input) {
                    Read::Some { bytes, descriptors } => (bytes, descriptors),
                    Read::Nothing => continue,
                    Read::NoMemory => return self.serve_later(id, turned),
                    Read::End => return Turned::Over,
                }
            };
            let taken = self.take_in(id, connection, longest, 0..bytes, descriptors, end);
            // Before the reply goes out: whoever gets it may have this processor next.
            let now = Moment::now();
            is_over = now >= end;
            if now >= start.plus_us(LONG_TURN_US) {
                turned = Turned::Long;
            }
            if !self.hall.orders.is_empty() {
                connection.closing |= taken == Taken::Close;
                self.hold_replies(connection);
                return Turned::Ordered;
            }
            if is_over && self.buffers.output.len() >= LONG_REPLIES && taken != Taken::Close {
                self.hold_replies(connection);
                return Turned::Unfinished;
            }
            if let Some(turned) = self.answer(id, connection, taken, turned) {
                return turned;
            }
        }
    }

    /// Works on the frames of what was read.
    fn take_in(
        &mut self,
        id: ClientId,
        connection: &mut Connection,
        longest: usize,
        bytes: Range<usize>,
        descriptors: bool,
        end: Moment,
    ) -> Taken {
        let mut conversation = connection.take_conversation();
        let waited = conversation.waiting();
        let Buffers { input, output } = &mut *self.buffers;
        let hall = &mut self.hall;
        hall.own_seen = connection.own_seen;
        let mut count = 0usize;
        // Most often there is only one frame, and nothing else to be put off; of many, every second
        // one is worth a look at the clock, or every one.
        let step = if end < self.pace.company_until { 1 } else { 2 };
        let taken = conversation.take_in(
            input.get(bytes).unwrap_or_default(),
            descriptors,
            longest,
            |header, payload| {
                let flow = dispatch::dispatch(hall, id, header, payload, output);
                // What was ordered is about the state behind this call, not behind those that follow.
                if !hall.orders.is_empty() && flow == Flow::Continue {
                    return Flow::Pause;
                }
                count = count.wrapping_add(1);
                let may_pause = count.is_multiple_of(step) && flow == Flow::Continue;
                if may_pause && Moment::now() >= end {
                    Flow::Pause
                } else {
                    flow
                }
            },
        );
        connection.own_seen = self.hall.own_seen;
        let waits = matches!(taken, Taken::Paused | Taken::Again);
        connection.paused = waits && !conversation.is_empty();
        connection.keep_conversation(conversation);
        if waited > READ_SIZE {
            // A long frame needed memory. Most connections never send one.
            self.hall.deadlines.give_memory_back_later();
        }
        taken
    }

    /// Keeps the replies that were made for the connection's next turn.
    fn hold_replies(&mut self, connection: &mut Connection) {
        connection.hold(&self.buffers.output);
        self.buffers.output.clear();
        self.buffers.output.shrink_to(READ_SIZE);
        self.hall.deadlines.give_memory_back_later();
    }

    /// Sends the replies that were made, or keeps them for those that follow. How the turn ended, if it
    /// does.
    fn answer(
        &mut self,
        id: ClientId,
        connection: &mut Connection,
        taken: Taken,
        turned: Turned,
    ) -> Option<Turned> {
        let output = &mut self.buffers.output;
        let sent = if taken == Taken::Paused && connection.holds_replies() {
            connection.hold(output);
            Sent::All
        } else {
            connection.send(id.0, output)
        };
        output.clear();
        // One long reply is no reason to keep so much memory for ever.
        output.shrink_to(READ_SIZE);
        connection.closing |= taken == Taken::Close;
        match sent {
            Sent::Failed if connection.reads_to_the_end() => None,
            Sent::Failed => Some(Turned::Over),
            Sent::All if connection.closing => Some(Turned::Over),
            Sent::All => None,
            Sent::Blocked => {
                self.hall.deadlines.give_memory_back_later();
                Some(self.wait_to_send(id, connection, true, turned))
            }
            Sent::NoMemory => Some(self.serve_later(id, turned)),
        }
    }

    /// To end a connection for want of memory would be to kill the machine that it stands for.
    fn serve_later(&mut self, id: ClientId, turned: Turned) -> Turned {
        let again = Moment::now().plus_ms(RETRY_MS);
        self.hall.deadlines.set(Deadline::Serve(id), again);
        turned
    }

    /// Asks to be told, or no longer to be told, when the socket takes bytes again.
    fn wait_to_send(
        &mut self,
        id: ClientId,
        connection: &mut Connection,
        waits: bool,
        turned: Turned,
    ) -> Turned {
        if connection.waits_to_send == waits {
            return turned;
        }
        connection.waits_to_send = waits;
        match self.watch.change(Source::Connection(id), id.0, waits) {
            Ok(()) => turned,
            Err(error) => {
                tracing::error!(
                    target: "rpc.netserverclient",
                    "A client is closed because it cannot be watched: {error}"
                );
                Turned::Over
            }
        }
    }
}

/// Reads once. A short read means that the socket is empty: the next bytes, and the end of the
/// stream, come with an event of their own. Unless the end was announced already, or descriptors
/// cut the read short.
fn receive(socket: RawFd, connection: &mut Connection, buffer: &mut [u8]) -> Read {
    match stream::receive(socket, buffer) {
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
