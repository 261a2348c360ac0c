//! Everything that the reactor turns over, and the turn of one connection. What else happens to it
//! is told in [`super::accept`], [`super::fence`], [`super::ending`], [`super::lasting`],
//! [`super::resume`] and [`super::upgrade`]. Each step is short; what can be long is cut into pieces that wait in `ending`
//! and `dead` for their turn.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsRawFd;

use mio::Interest;
use mio::unix::SourceFd;
use nix::errno::Errno;
use slab::Slab;

use super::accept::{Listener, RefusedQueue, Reserve};
use super::clients::Clients;
use super::connection::{Appetite, Connection, Phase, Sent, Service};
use super::conversation::{Conversation, Flow, Taken};
use super::deadlines::{Deadline, Deadlines};
use super::dispatch;
use super::fence::Fences;
use super::token::Source;
use super::upgrade::Upgrade;
use crate::host::clock::Moment;
use crate::host::heap;
use crate::host::names::Names;
use crate::host::{errno, stream};
use crate::locks::keeper::Keeper;
use crate::locks::table::Pid;
use crate::restart::event::Event;
use crate::restart::ledger::Ledger;
use crate::restart::state::ProcessState;
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
const ADMIN_BYTES: usize = 64 * 1024 * 1024;

/// So many bytes of replies at the end of a turn are sent in the next one: that takes long, too.
const LONG_REPLIES: usize = 8 * 1024;

/// After a connection, a long message or a state that was written down, how long until the memory that
/// it took is given back, milliseconds.
const MEMORY_MS: u64 = 1000;
/// What a connection or a lock usually takes of the ledger at most, bytes.
const LEDGER_ENTRY: usize = 512;
/// A ledger up to this size is no waste, bytes.
const SMALL_LEDGER: usize = 256 * 1024;
/// How long until a connection is seen to again for which a system call failed and may soon not
/// fail, milliseconds.
const RETRY_MS: u64 = 100;

/// What the daemon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It serves.
    Serving,
    /// It ends when the owners it fences are dead, or at a deadline.
    Stopping,
    /// It has ended.
    Ended,
}

/// The daemon.
#[derive(Debug)]
pub struct Daemon {
    /// What it is doing.
    pub state: State,
    /// All connections.
    pub connections: Slab<Connection>,
    /// The sockets that clients connect to.
    pub listeners: Vec<Listener>,
    /// Who holds what.
    pub keeper: Keeper,
    /// Every change of lasting state, written down before it is answered.
    pub ledger: Ledger,
    /// Owners that are to die.
    pub fences: Fences,
    /// Owners that ought to be fenced and cannot be reached.
    pub unreachable: BTreeSet<Pid>,
    /// What happens when.
    pub deadlines: Deadlines,
    /// Clients that there is no room for.
    pub refused: RefusedQueue,
    /// Descriptors for the time when there are no others.
    pub reserve: Reserve,
    /// Who may connect, beside the daemon's own: the effective user id.
    pub user: u32,
    /// Whether the kernel names the process of a peer itself (SO_PEERPIDFD).
    pub names_processes: bool,
    /// After how long without clients and locks the daemon ends, seconds; 0 for never.
    pub idle_timeout_s: u32,
    /// The names of users and groups that the admin socket was asked for.
    pub names: Names,
    /// The process's own things, for the state that is passed on.
    pub process: ProcessState,
    /// The replacement of the program, where it stands.
    pub upgrade: Upgrade,
    /// Where readiness is asked for.
    pub registry: mio::Registry,
    /// Connections on which something has happened.
    pub ready: VecDeque<usize>,
    /// Connections that may need much: they come after those that are ready.
    pub unfinished: VecDeque<usize>,
    /// Connections that are over and not cleared away yet.
    pub ending: VecDeque<usize>,
    /// Owners that died and whose locks are not free yet.
    pub dead: VecDeque<Pid>,
    /// Until when turns are short.
    company_until: Moment,
    lock_clients: Clients,
    admin_clients: Clients,
    /// What all admin clients together take of [`ADMIN_BYTES`].
    admin_bytes: usize,
    /// What a connection or a lock took of the ledger when it was last found too long, bytes.
    ledger_entry: usize,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Daemon {
    /// A daemon with nothing to do yet.
    pub fn new(registry: mio::Registry, ledger: Ledger) -> Daemon {
        heap::settle();
        let mut reserve = Reserve::default();
        reserve.refill();
        Daemon {
            state: State::Serving,
            connections: Slab::new(),
            listeners: Vec::new(),
            keeper: Keeper::new(),
            ledger,
            fences: Fences::default(),
            unreachable: BTreeSet::new(),
            deadlines: Deadlines::default(),
            refused: RefusedQueue::new(),
            reserve,
            user: nix::unistd::geteuid().as_raw(),
            names_processes: stream::peer_process_is_known(),
            idle_timeout_s: 0,
            names: Names::default(),
            process: ProcessState::default(),
            upgrade: Upgrade::default(),
            registry,
            ready: VecDeque::new(),
            unfinished: VecDeque::new(),
            ending: VecDeque::new(),
            dead: VecDeque::new(),
            company_until: Moment(0),
            lock_clients: Clients::new(1),
            admin_clients: Clients::new(1),
            admin_bytes: 0,
            ledger_entry: 0,
            input: vec![0; READ_SIZE],
            output: Vec::new(),
        }
    }

    /// The clients of one of the two servers.
    pub fn clients(&self, service: Service) -> &Clients {
        match service {
            Service::Lock => &self.lock_clients,
            Service::Admin => &self.admin_clients,
        }
    }

    /// The clients of one of the two servers, to change them.
    pub fn clients_mut(&mut self, service: Service) -> &mut Clients {
        match service {
            Service::Lock => &mut self.lock_clients,
            Service::Admin => &mut self.admin_clients,
        }
    }

    /// Puts a connection in a list of those with something to do.
    pub fn enqueue(&mut self, place: usize) {
        if let Some(connection) = self.connections.get_mut(place)
            && !connection.queued
        {
            connection.queued = true;
            match connection.appetite {
                Appetite::Small | Appetite::Doubtful => self.ready.push_back(place),
                Appetite::Large | Appetite::Unknown => self.unfinished.push_back(place),
            }
        }
    }

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
        bytes: std::ops::Range<usize>,
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

    /// A connection is over. It is cleared away when the reactor comes to it.
    pub fn end_connection(&mut self, place: usize) {
        if let Some(connection) = self.connections.get_mut(place)
            && connection.phase != Phase::Over
        {
            connection.phase = Phase::Over;
            self.ending.push_back(place);
        }
    }

    /// Clears away a connection that is over. An owner that leaves with its last word unspoken is
    /// fenced, or its locks are freed if it is dead already.
    ///
    /// An owner that cannot be reached for want of memory or descriptors must not live on for that:
    /// its connection stays, and it is tried again.
    pub fn clear_away(&mut self, place: usize) {
        let left = self.owner_left_with(place);
        if let Some((pid, Err(reason))) = &left
            && errno::may_pass(*reason)
        {
            let again = Moment::now().plus_ms(RETRY_MS);
            self.deadlines.set(Deadline::ClearAway(place), again);
            return self.note_unreachable(*pid, *reason);
        }
        let Some(connection) = self.connections.try_remove(place) else {
            return;
        };
        self.deadlines.unset(Deadline::Serve(place));
        self.deadlines.unset(Deadline::ClearAway(place));
        // Before the descriptor is closed: a copy of it elsewhere would keep the registration.
        let descriptor = connection.socket.as_raw_fd();
        let _ = self.registry.deregister(&mut SourceFd(&descriptor));
        self.clients_mut(connection.service)
            .by_id
            .remove(&connection.id);
        self.forget_refused(place, connection.id);
        self.admin_bytes = self.admin_bytes.saturating_sub(connection.counted);
        if left.is_none()
            && let Some(owner) = connection.session.owner()
            && self.keeper.table().held_by(owner.pid) == 0
        {
            self.unreachable.remove(&owner.pid);
        }
        if let Some((pid, process)) = left {
            self.owner_left(pid, process);
        }
        let service = connection.service;
        // Behind what becomes of its owner, and before anybody else can have its number.
        self.ledger.note(&Event::Gone { descriptor });
        drop(connection);
        self.reserve.refill();
        self.give_memory_back_later();
        self.admit_waiting(service);
        // One that could not accept for want of descriptors tries again.
        self.enqueue_listeners();
    }

    /// Once for all that ends in the meantime: it is no work to be done often.
    pub fn give_memory_back_later(&mut self) {
        if self.deadlines.get(Deadline::Memory).is_none() {
            let at = Moment::now().plus_ms(MEMORY_MS);
            self.deadlines.set(Deadline::Memory, at);
        }
    }

    /// Gives back what is not needed any more: what the allocator has of it, and a ledger that is much
    /// too long for what it has to say by now. It is not written anew again and again where few have
    /// much to say.
    fn give_memory_back(&mut self) {
        let entries = self
            .connections
            .len()
            .saturating_add(self.keeper.table().len());
        let enough = entries
            .saturating_mul(self.ledger_entry.saturating_mul(2).max(LEDGER_ENTRY))
            .max(SMALL_LEDGER);
        if self.ledger.size() > enough && self.renew_ledger().is_ok() {
            self.ledger_entry = self.ledger.size().checked_div(entries).unwrap_or(0);
        }
        heap::give_back();
    }

    /// Does what has come due.
    pub fn pass_deadline(&mut self, deadline: Deadline) {
        match deadline {
            Deadline::Kill(pid) => self.kill(pid),
            Deadline::StillAlive(pid) => self.still_alive(pid),
            Deadline::Refused(place) => self.end_connection(place),
            Deadline::Serve(place) => self.enqueue(place),
            Deadline::ClearAway(place) => self.ending.push_back(place),
            Deadline::Accept => self.enqueue_listeners(),
            Deadline::Idle => {
                // Somebody may have come in the same moment.
                for number in 0..self.listeners.len() {
                    self.accept(number);
                }
                if !self.is_idle() {
                    return;
                }
                tracing::info!(
                    target: "rpc.netdaemon",
                    "No client and no lock for {} s: the daemon ends", self.idle_timeout_s
                );
                self.stop();
            }
            Deadline::Stop => self.give_up_fencing(),
            Deadline::Memory => self.give_memory_back(),
            Deadline::Ledger => (),
            Deadline::Successor => self.successor_is_late(),
            Deadline::Abandoned => {
                self.reap_abandoned();
                self.reap_inherited();
            }
            Deadline::Quiet => self.never_quiet(),
        }
    }

    /// Whether nobody needs the daemon: no client of either server, no lock.
    pub fn is_idle(&self) -> bool {
        self.connections.is_empty() && self.keeper.table().is_empty()
    }

    /// Starts or stops the clock of the idle timeout.
    pub fn watch_idleness(&mut self) {
        if self.idle_timeout_s == 0 || self.state != State::Serving || !self.is_idle() {
            self.deadlines.unset(Deadline::Idle);
        } else if self.deadlines.get(Deadline::Idle).is_none() {
            let timeout = u64::from(self.idle_timeout_s).saturating_mul(1000);
            self.deadlines
                .set(Deadline::Idle, Moment::now().plus_ms(timeout));
        }
    }

    /// Puts the listening sockets that may have a connection waiting in the list of things to do.
    fn enqueue_listeners(&mut self) {
        for listener in &mut self.listeners {
            listener.queued = listener.readable;
        }
    }
}

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

/// Reads once. A short read means that the socket is empty: the next bytes, and the end of the
/// stream, come with an event of their own. Unless the end was announced already, or descriptors
/// cut the read short.
fn receive(connection: &mut Connection, buffer: &mut [u8]) -> Read {
    use std::os::fd::AsFd;
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
