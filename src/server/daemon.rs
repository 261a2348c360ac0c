//! Everything that the reactor turns over, and how a connection ends. What else happens is told in
//! [`super::accept`], [`super::turn`], [`super::fence`], [`super::ending`], [`super::lasting`],
//! [`super::resume`] and [`super::upgrade`]. Each step is short; what can be long is cut into pieces
//! that wait in `ending` and `dead` for their turn.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsRawFd;

use mio::unix::SourceFd;
use slab::Slab;

use super::accept::{Listener, RefusedQueue, Reserve};
use super::clients::Clients;
use super::connection::{Appetite, Connection, Phase, Service};
use super::deadlines::{Deadline, Deadlines};
use super::fence::{Fences, Freeing};
use super::own_connections::OwnConnections;
use super::turn::READ_SIZE;
use super::upgrade::Upgrade;
use super::watch::Watches;
use crate::host::clock::Moment;
use crate::host::heap;
use crate::host::names::Names;
use crate::host::{errno, stream};
use crate::locks::keeper::Keeper;
use crate::locks::table::Pid;
use crate::restart::event::Event;
use crate::restart::ledger::Ledger;
use crate::restart::state::ProcessState;

/// After a connection, a long message or a state that was written down, how long until the memory that
/// it took is given back, milliseconds.
const MEMORY_MS: u64 = 1000;
/// What a connection or a lock usually takes of the ledger at most, bytes.
const LEDGER_ENTRY: usize = 512;
/// A ledger up to this size is no waste, bytes.
const SMALL_LEDGER: usize = 256 * 1024;
/// How long until a connection is seen to again for which a system call failed and may soon not
/// fail, milliseconds.
pub(super) const RETRY_MS: u64 = 100;

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
    /// Which domains processes stand for over connections of their own.
    pub own_connections: OwnConnections,
    /// Owners without a connection of their own.
    pub watches: Watches,
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
    /// Owners that died and whose locks the table still has.
    pub dead: VecDeque<Pid>,
    /// Dead owners whose locks are being freed.
    pub estates: VecDeque<Freeing>,
    /// Until when turns are short.
    pub(super) company_until: Moment,
    lock_clients: Clients,
    admin_clients: Clients,
    /// What all admin clients together take of [`ADMIN_BYTES`](super::turn).
    pub(super) admin_bytes: u32,
    /// What a connection or a lock took of the ledger when it was last found too long, bytes.
    ledger_entry: usize,
    pub(super) input: Vec<u8>,
    pub(super) output: Vec<u8>,
}

impl Daemon {
    /// A daemon with nothing to do yet.
    pub fn new(registry: mio::Registry, ledger: Ledger) -> Daemon {
        heap::settle();
        // Before the reserve takes what descriptors there are.
        let names_processes = stream::peer_process_is_known();
        let mut reserve = Reserve::default();
        reserve.refill();
        Daemon {
            state: State::Serving,
            connections: Slab::new(),
            listeners: Vec::new(),
            keeper: Keeper::new(),
            ledger,
            fences: Fences::default(),
            own_connections: OwnConnections::default(),
            watches: Watches::default(),
            unreachable: BTreeSet::new(),
            deadlines: Deadlines::default(),
            refused: RefusedQueue::new(),
            reserve,
            user: nix::unistd::geteuid().as_raw(),
            names_processes,
            idle_timeout_s: 0,
            names: Names::default(),
            process: ProcessState::default(),
            upgrade: Upgrade::default(),
            registry,
            ready: VecDeque::new(),
            unfinished: VecDeque::new(),
            ending: VecDeque::new(),
            dead: VecDeque::new(),
            estates: VecDeque::new(),
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

    /// A connection is over. It is cleared away when the reactor comes to it.
    pub fn end_connection(&mut self, place: usize) {
        if let Some(connection) = self.connections.get_mut(place)
            && connection.phase != Phase::Over
        {
            connection.phase = Phase::Over;
            if let Some(owner) = connection.own_owner() {
                self.own_connections.remove(owner);
            }
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
            && !self.keeper.table().holds(owner.pid)
        {
            self.unreachable.remove(&owner.pid);
        }
        if let Some((pid, process)) = left {
            self.owner_left(pid, process);
        } else if let Some(owner) = connection.session.owner() {
            self.end_idle_watch(owner.pid);
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
            Deadline::Watch => self.watch_wanted(),
            Deadline::Unheard(pid) => self.look_for_unheard(pid),
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
        self.connections.is_empty() && self.keeper.table().is_empty() && self.estates.is_empty()
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
