//! The turn of one connection: what it sent is read, worked on and answered, until everything is done
//! or its time is over. Turns are short, and shorter while somebody else is served beside them, so that
//! nobody who makes one call waits long for those who make thousands.

use std::os::fd::RawFd;

use crate::host::errno::Errno;

use super::connection::{Appetite, Connection, Post, Sent};
use super::conversation::{Conversation, Taken};
use super::{poison, recovery};
use crate::custody::clients::ClientId;
use crate::custody::servers::Service;
use crate::desk::Desk;
use crate::desk::layout::{READ_SIZE, Way};
use crate::desk::slot::{self, Places};
use crate::desk::turn::{self as step, Rest, Whose};
use crate::host::clock::Moment;
use crate::host::stream::Received;
use crate::server::deadlines::{Deadline, RETRY_MS};
use crate::server::flow::Flow;
use crate::server::hall::Hall;
use crate::server::services::{dispatch, status};
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

/// Where bytes are worked on, and where replies are made. All turns share them. What a turn receives, does
/// and sends is noted on the desk at the same time, for whoever comes next should this process die.
#[derive(Debug)]
pub struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
    step: Step,
    /// Who has room for long messages there.
    places: Places,
    /// Replies took more of the desk than they do most often.
    is_stretched: bool,
}

/// How far the step of a turn has come: something received, worked on, and sent once.
#[derive(Clone, Copy, Debug, Default)]
struct Step {
    /// How many bytes were received.
    received: usize,
    /// How many bytes are worked on, of those that waited and were received.
    done: usize,
    /// How many bytes were sent, of those that were unsent and made.
    sent: usize,
    /// There was no slot for what the connection has on its way: all of it is in its own memory.
    is_apart: bool,
}

impl Buffers {
    /// Buffers of a reactor at this desk.
    pub fn new(desk: &Desk) -> Buffers {
        Buffers {
            input: vec![0; READ_SIZE],
            output: Vec::new(),
            step: Step::default(),
            places: Places::find(
                desk.memory(),
                step::whose_turn(desk.memory()).map(|whose| whose.number),
            ),
            is_stretched: false,
        }
    }

    fn begin(&mut self, desk: &Desk, whose: Whose, connection: &Connection) {
        step::begin(desk.memory(), whose);
        self.step = Step {
            is_apart: !connection.is_quiet() && !connection.is_on_desk(),
            ..Step::default()
        };
        self.output.clear();
        if self.output.capacity() > READ_SIZE {
            // One long reply is no reason to keep so much memory for ever.
            self.output.shrink_to(READ_SIZE);
        }
    }

    /// Ends a step: what the client has on its way by now is left in its slot, and there alone. False if
    /// there is no room for it. Most often there is nothing, nor was there, and no slot is looked at.
    pub fn end(&mut self, desk: &Desk, whose: Whose, connection: &mut Connection) -> bool {
        let memory = desk.memory();
        self.is_stretched |= self.output.len() > READ_SIZE;
        if !step::outlives(memory) || (connection.is_quiet() && !connection.is_on_desk()) {
            return true;
        }
        let is_kept = if self.step.is_apart {
            let number = RawFd::try_from(whose.number).unwrap_or(-1);
            let rest = recovery::rest(&connection.traffic(number, memory));
            step::settle(memory, &mut self.places, whose, &rest)
        } else {
            let Step {
                received,
                done,
                sent,
                ..
            } = self.step;
            let conversation = connection.conversation();
            let (descriptors_at_end, arrived) = conversation
                .map(Conversation::descriptors)
                .unwrap_or_default();
            let end = step::End {
                received: self.input.get(..received).unwrap_or_default(),
                done,
                replies: &self.output,
                sent,
                pending: conversation.map_or(0, Conversation::waiting),
                unsent: connection.unsent(),
                descriptors_at_end,
                arrived,
                closing: connection.closing,
            };
            step::end(memory, &mut self.places, whose, &end)
        };
        if is_kept {
            connection.lies_on_desk();
        }
        is_kept
    }

    /// Leaves in a client's slot what a dead reactor, or an earlier image of the process, left of it; whether
    /// it is there now.
    pub fn settle(&mut self, desk: &Desk, whose: Whose, rest: &Rest) -> bool {
        let is_kept = step::settle(desk.memory(), &mut self.places, whose, rest);
        if !is_kept {
            tracing::error!(
                target: "rpc.netserverclient",
                "What a client (descriptor {}) has on its way could not be kept: should the daemon die \
                 now, it may be lost", whose.number
            );
        }
        is_kept && step::outlives(desk.memory())
    }

    /// Whether there is memory that [`Buffers::give_back`] would give back.
    pub fn has_left(&self) -> bool {
        self.is_stretched || self.places.has_left()
    }

    /// A client is gone.
    pub fn leave(&mut self, desk: &Desk, id: ClientId) {
        if let Ok(number) = usize::try_from(id.0) {
            let memory = desk.memory();
            if step::whose_turn(memory).is_some_and(|whose| whose.number == number) {
                // It may be told by the slot.
                step::none(memory);
            }
            self.places.leave(memory, number);
        }
    }

    /// Gives back the memory of the slots that nobody uses any more, between turns. `is_used` says whether
    /// a client is there.
    pub fn give_back(&mut self, desk: &Desk, is_used: impl FnMut(usize, u64) -> bool) {
        let memory = desk.memory();
        // The last step may be told by a slot that is about to be forgotten.
        step::none(memory);
        self.places.give_back(memory, is_used);
        if std::mem::take(&mut self.is_stretched) {
            step::give_back(memory);
        }
    }
}

/// What tells a client from every other that has or had its descriptor's number.
pub fn whose(id: ClientId, service: Service, number: u64) -> Whose {
    let service = match service {
        Service::Lock => 1,
        Service::Admin => 2,
    };
    Whose {
        number: usize::try_from(id.0).unwrap_or(usize::MAX),
        who: number << 2 | service,
    }
}

enum Read {
    Some { descriptors: bool },
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
    /// Where it is noted how far it is.
    pub desk: &'a Desk,
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
        let is_admin = client.arrival.server == Service::Admin;
        let longest = match client.arrival.server {
            Service::Lock => lock::LONGEST_FRAME,
            Service::Admin => frame::LONGEST,
        };
        let whose = whose(id, client.arrival.server, client.arrival.id);
        let socket = id.0;
        let mut turned = Turned::Short;
        let mut is_over = false;
        loop {
            if !connection.holds_replies() && connection.unsent() > 0 {
                self.buffers.begin(self.desk, whose, connection);
                let sent = self.send(socket, connection, false);
                if !self.end_step(whose, connection) {
                    return self.no_room(id);
                }
                match sent {
                    Sent::All => (),
                    Sent::Part => continue,
                    Sent::Blocked => return self.wait_to_send(id, connection, true, turned),
                    Sent::NoMemory => return self.serve_later(id, turned),
                    Sent::Failed if connection.reads_to_the_end() => (),
                    Sent::Failed => return Turned::Over,
                }
            }
            if connection.closing {
                return Turned::Over;
            }
            if connection.unsent() == 0 && self.has_news(connection) {
                if is_over {
                    return Turned::Unfinished;
                }
                self.buffers.begin(self.desk, whose, connection);
                let is_kept = self.tell(id, connection);
                is_over = Moment::now() >= end;
                let sent = self.send(socket, connection, true);
                if !self.end_step(whose, connection) || !is_kept {
                    return self.no_room(id);
                }
                match sent {
                    Sent::All | Sent::Part => continue,
                    Sent::Blocked => return self.wait_to_send(id, connection, true, turned),
                    Sent::NoMemory => return self.serve_later(id, turned),
                    Sent::Failed if connection.reads_to_the_end() => continue,
                    Sent::Failed => return Turned::Over,
                }
            }
            if connection.waits {
                if connection.gone {
                    // Nobody reads the answer that it waits for, which may take for ever.
                    return Turned::Over;
                }
                return self.wait_to_send(id, connection, false, turned);
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
            self.buffers.begin(self.desk, whose, connection);
            let descriptors = if connection.paused {
                false
            } else {
                match self.receive(socket, connection) {
                    Read::Some { descriptors } => descriptors,
                    Read::Nothing => continue,
                    Read::NoMemory => return self.serve_later(id, turned),
                    Read::End => return Turned::Over,
                }
            };
            let taken = self.take_in((id, whose), connection, longest, descriptors, end);
            if is_admin {
                self.note_subscription(id, connection);
            }
            // Before the reply goes out: whoever gets it may have this processor next.
            let now = Moment::now();
            is_over = now >= end;
            if now >= start.plus_us(LONG_TURN_US) {
                turned = Turned::Long;
            }
            connection.closing |= taken == Taken::Close;
            if !self.hall.orders.is_empty() {
                // The step ends when they have been carried out: see [`Buffers::end`].
                self.hold_replies(connection);
                return Turned::Ordered;
            }
            if is_over && self.buffers.output.len() >= LONG_REPLIES && taken != Taken::Close {
                self.hold_replies(connection);
                if !self.end_step(whose, connection) {
                    return self.no_room(id);
                }
                return Turned::Unfinished;
            }
            let sent = if taken == Taken::Paused && connection.holds_replies() {
                connection.hold(&self.buffers.output);
                Sent::All
            } else {
                self.send(socket, connection, true)
            };
            if !self.end_step(whose, connection) {
                return self.no_room(id);
            }
            match sent {
                Sent::Failed if connection.reads_to_the_end() => (),
                Sent::Failed => return Turned::Over,
                Sent::All if connection.closing => return Turned::Over,
                Sent::All | Sent::Part => (),
                Sent::Blocked => {
                    self.hall.deadlines.give_memory_back_later();
                    return self.wait_to_send(id, connection, true, turned);
                }
                Sent::NoMemory => return self.serve_later(id, turned),
            }
        }
    }

    fn end_step(&mut self, whose: Whose, connection: &mut Connection) -> bool {
        let is_kept = self.buffers.end(self.desk, whose, connection);
        if self.buffers.has_left() {
            self.hall.deadlines.give_memory_back_later();
        }
        is_kept
    }

    /// Sends, once in a step, what is unsent, and the replies that were made in it.
    fn send(&mut self, socket: RawFd, connection: &mut Connection, with_replies: bool) -> Sent {
        let post = Post {
            socket,
            memory: self.desk.memory(),
        };
        let (sent, count) = if with_replies {
            connection.send(post, &self.buffers.output)
        } else {
            connection.send_rest(post)
        };
        self.buffers.step.sent = count;
        sent
    }

    /// Works on the frames of what was read.
    fn take_in(
        &mut self,
        (id, whose): (ClientId, Whose),
        connection: &mut Connection,
        longest: usize,
        descriptors: bool,
        end: Moment,
    ) -> Taken {
        let mut conversation = connection.take_conversation();
        let waited = conversation.waiting();
        let Buffers {
            input,
            output,
            step,
            ..
        } = &mut *self.buffers;
        let memory = self.desk.memory();
        if conversation.wants_what_lies_elsewhere(step.received) {
            let size = conversation.elsewhere();
            let kept = slot::front(memory, whose.number, Way::Pending, size);
            if kept.len() != size {
                tracing::error!(
                    target: "rpc.netserverclient",
                    "A client (descriptor {}) is closed: what it sent is not where it was kept", id.0
                );
                return Taken::Close;
            }
            conversation.bring_back(kept);
        }
        let deaths = if waited > 0 {
            step::deaths(memory, whose)
        } else {
            0
        };
        let hall = &mut self.hall;
        hall.own_seen = connection.own_seen;
        let mut count = 0usize;
        // Most often there is only one frame, and nothing else to be put off; of many, every second
        // one is worth a look at the clock, or every one.
        let slowness = if end < self.pace.company_until { 1 } else { 2 };
        let taken = conversation.take_in(
            input.get(..step.received).unwrap_or_default(),
            descriptors,
            longest,
            |header, payload, done| {
                let known = output.len();
                step::frame_begins(memory, step.done, hall.custody.mark());
                let flow = if step.done == 0 && poison::is_deadly(deaths) {
                    poison::refuse(hall, id, header, payload, output)
                } else {
                    dispatch::dispatch(hall, id, header, payload, output)
                };
                // What was ordered is about the state behind this call, not behind those that follow; it is
                // done before the call is.
                if !hall.orders.is_empty() {
                    if !matches!(flow, Flow::Again | Flow::Wait) {
                        step.done = done;
                    }
                    return if flow == Flow::Continue { Flow::Pause } else { flow };
                }
                if matches!(flow, Flow::Again | Flow::Wait) {
                    return flow;
                }
                step.done = done;
                let is_last = flow == Flow::Close;
                if !step::frame_is_done(memory, done, output, known, is_last) {
                    tracing::error!(
                        target: "rpc.netserverclient",
                        "A client is closed because there is no room for the reply to it ({} bytes)",
                        output.len()
                    );
                    return Flow::Close;
                }
                count = count.wrapping_add(1);
                let may_pause = count.is_multiple_of(slowness) && flow == Flow::Continue;
                if may_pause && Moment::now() >= end {
                    Flow::Pause
                } else {
                    flow
                }
            },
        );
        connection.own_seen = self.hall.own_seen;
        let waits = matches!(taken, Taken::Paused | Taken::Again | Taken::Waits);
        connection.paused = waits && !conversation.is_empty();
        connection.waits = taken == Taken::Waits;
        connection.keep_conversation(conversation);
        if waited > READ_SIZE {
            // A long frame needed memory. Most connections never send one.
            self.hall.deadlines.give_memory_back_later();
        }
        taken
    }

    /// A call may have asked to be told of what happens from now on, or not any more.
    fn note_subscription(&self, id: ClientId, connection: &mut Connection) {
        let custody = &*self.hall.custody;
        let wanted = custody.state().client(id).map_or(0, |it| it.wanted);
        if wanted == 0 {
            connection.told = None;
        } else {
            connection.told.get_or_insert(custody.news().next());
        }
    }

    /// Whether something happened of which a subscriber has not been told.
    fn has_news(&self, connection: &Connection) -> bool {
        let told = connection.told;
        told.is_some_and(|told| told < self.hall.custody.news().next())
    }

    /// Makes messages of what happened, for a subscriber who has taken those before. False if they cannot be
    /// kept for whoever comes next should this process die.
    fn tell(&mut self, id: ClientId, connection: &mut Connection) -> bool {
        let custody = &mut *self.hall.custody;
        let wanted = custody.state().client(id).map_or(0, |it| it.wanted);
        let from = connection.told.unwrap_or_default();
        let output = &mut self.buffers.output;
        let (missed, next) = status::tell(custody.news(), from, wanted, output);
        if missed > 0 {
            custody.missed(missed);
        }
        connection.told = Some(next);
        step::frame_is_done(self.desk.memory(), 0, output, 0, false)
    }

    /// Keeps the replies that were made for the connection's next turn.
    fn hold_replies(&mut self, connection: &mut Connection) {
        connection.hold(&self.buffers.output);
        self.hall.deadlines.give_memory_back_later();
    }

    /// What is on its way would be lost with this process.
    fn no_room(&mut self, id: ClientId) -> Turned {
        tracing::error!(
            target: "rpc.netserverclient",
            "A client (descriptor {}) is closed: there is no room to keep what it has on its way", id.0
        );
        Turned::Over
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

    /// Reads once. A short read means that the socket is empty: the next bytes, and the end of the
    /// stream, come with an event of their own. Unless the end was announced already, or descriptors
    /// cut the read short.
    fn receive(&mut self, socket: RawFd, connection: &mut Connection) -> Read {
        let input = &mut self.buffers.input;
        match step::receive(self.desk.memory(), socket, input) {
            Ok(received) if received.bytes == 0 => Read::End,
            Ok(Received { bytes, descriptors }) => {
                let is_short = bytes < input.len() && !descriptors;
                connection.readable = connection.hung_up || !is_short;
                self.buffers.step.received = bytes;
                Read::Some { descriptors }
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
}
