//! New connections: who may connect, whether there is room, and what becomes of those for whom
//! there is none. Nobody is left without an answer.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::connection::{Connection, NoRoom, Phase, Service};
use super::daemon::Daemon;
use super::deadlines::Deadline;
use super::dispatch;
use super::token::Source;
use crate::host::clock::Moment;
use crate::host::process::Process;
use crate::host::stream::Peer;
use crate::host::{
    errno::{self, Errno},
    process, stream,
};
use crate::log::Printable;
use crate::wire::error::Error;

/// How many refused clients may be waiting for their refusal at a time.
const REFUSED_LIMIT: usize = 64;
/// How long a refused client has to make the call that its refusal answers, milliseconds.
const REFUSED_MS: u64 = 10_000;

/// After connections that could not be accepted, how long until it is tried again, milliseconds.
const ACCEPT_RETRY_MS: u64 = 1000;

/// A socket that clients connect to.
#[derive(Debug)]
pub struct Listener {
    /// The listening socket.
    pub socket: OwnedFd,
    /// Its file, if the daemon made it and removes it at the end.
    pub path: Option<PathBuf>,
    /// Which program its clients want.
    pub service: Service,
    /// There may be a connection waiting.
    pub readable: bool,
    /// It is in the reactor's list already.
    pub queued: bool,
}

/// Descriptors that are kept open for nothing, to be closed when there is no other one left and
/// one is needed to refuse a client or to fence an owner.
#[derive(Debug, Default)]
pub struct Reserve {
    kept: Vec<OwnedFd>,
}

impl Reserve {
    const SIZE: usize = 16;
    /// How many of them are for fencing alone: clients that are refused and say nothing keep theirs
    /// for a while, and an owner that leaves then must not live on for it.
    const FOR_FENCING: usize = 8;

    /// Opens what is missing, as far as that is possible.
    pub fn refill(&mut self) {
        while self.kept.len() < Self::SIZE {
            match crate::host::file::open_directory(b"/") {
                Ok(descriptor) => self.kept.push(descriptor),
                Err(_) => return,
            }
        }
    }

    /// Closes one, if there is one.
    pub fn give_up_one(&mut self) -> bool {
        self.kept.pop().is_some()
    }

    /// Whether another client can be told that there is no room, if this one keeps its descriptor.
    fn can_refuse(&self) -> bool {
        self.kept.len() > Self::FOR_FENCING
    }

    /// Closes one, if there are more than fencing may need.
    pub fn give_up_one_to_spare(&mut self) -> bool {
        self.can_refuse() && self.give_up_one()
    }
}

/// The refused clients, in the order they came.
pub type RefusedQueue = VecDeque<(usize, u64)>;

impl Daemon {
    /// Takes in a waiting connection. Whether there may be more.
    pub fn accept(&mut self, number: usize) -> bool {
        let Some(listener) = self.listeners.get_mut(number) else {
            return false;
        };
        let service = listener.service;
        match stream::accept(listener.socket.as_fd()) {
            Ok(socket) => {
                let room = self.clients(service).has_room();
                let phase = if room {
                    Phase::Served
                } else {
                    Phase::Refused(NoRoom::Limit)
                };
                self.connected(socket, service, phase);
            }
            Err(Errno::EAGAIN) => {
                listener.readable = false;
                return false;
            }
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                if !self.accept_to_refuse(number, service) {
                    // Tried again when a connection has ended, too.
                    self.accept_later();
                    return false;
                }
            }
            // The client is gone before it was let in, or was interrupted: the next one.
            Err(Errno::EINTR | Errno::ECONNABORTED) => (),
            Err(errno) => {
                tracing::error!(
                    target: "rpc.netsocket",
                    "Clients of the {} server cannot be accepted: {}",
                    service.name(), crate::host::errno::text(errno)
                );
                self.accept_later();
                return false;
            }
        }
        true
    }

    /// What keeps connections from being accepted may pass without any event that says so.
    fn accept_later(&mut self) {
        if self.deadlines.get(Deadline::Accept).is_none() {
            let again = Moment::now().plus_ms(ACCEPT_RETRY_MS);
            self.deadlines.set(Deadline::Accept, again);
        }
    }

    /// No descriptor is left: one of the reserve is spent on telling the client so.
    fn accept_to_refuse(&mut self, number: usize, service: Service) -> bool {
        if !self.reserve.give_up_one_to_spare() {
            return false;
        }
        let Some(listener) = self.listeners.get_mut(number) else {
            return false;
        };
        match stream::accept(listener.socket.as_fd()) {
            Ok(socket) => {
                self.connected(socket, service, Phase::Refused(NoRoom::Descriptors));
                true
            }
            Err(_) => {
                self.reserve.refill();
                false
            }
        }
    }

    /// A new connection: checked, numbered, and watched.
    fn connected(&mut self, socket: OwnedFd, service: Service, phase: Phase) {
        let id = self.clients_mut(service).take_id();
        let peer = match stream::peer(&socket) {
            Ok(peer) => peer,
            Err(errno) => {
                tracing::error!(
                    target: "rpc.netsocket",
                    "A client of the {} server is turned away: who it is cannot be read: {}",
                    service.name(), crate::host::errno::text(errno)
                );
                return;
            }
        };
        if !self.may_connect(peer) {
            tracing::error!(
                target: "rpc.netserver", domain = 7, code = 29,
                "operation forbidden: Disallowing client {} with uid {}", peer.pid, peer.uid
            );
            return;
        }
        let mut connection = Connection::new(socket, service, id, peer, phase);
        connection.connected_at = seconds_now();
        // Who connects has something to say, and has mostly said it by now: its first turn, behind
        // those that are known to be quick, costs no poll.
        connection.readable = true;
        // Process 0 cannot be seen from here and stands for nobody.
        if !self.names_processes && peer.pid > 0 {
            match self.start_time(peer.pid) {
                // Alive, it could not be fenced, ever. What a dead one sent still counts.
                Err(reason)
                    if phase != Phase::Refused(NoRoom::Descriptors)
                        && !(reason == Errno::ESRCH && self.is_gone(peer.pid)) =>
                {
                    tracing::error!(
                        target: "rpc.netsocket",
                        "Client {} of the {} server is turned away: its process cannot be looked \
                         at: {}",
                        peer.pid, service.name(), errno::text(reason)
                    );
                    return;
                }
                found => connection.start_time = found.ok(),
            }
        }
        let place = self.connections.insert(connection);
        if let Err(error) = self.watch(place) {
            tracing::error!(
                target: "rpc.netserver",
                "Client {} of the {} server is turned away: it cannot be watched: {error}",
                peer.pid, service.name()
            );
            self.connections.try_remove(place);
            return;
        }
        self.note_connected(place);
        self.enqueue(place);
        match phase {
            Phase::Refused(reason) => self.refuse(place, id, reason),
            _ => {
                self.clients_mut(service).by_id.insert(id, place);
            }
        }
    }

    /// When the process of a client started. ESRCH also where `/proc` does not show it.
    fn start_time(&mut self, pid: i32) -> Result<u64, Errno> {
        self.with_reserve(|| process::start_time(pid))
    }

    /// Whether there is certainly no process of this number.
    fn is_gone(&mut self, pid: i32) -> bool {
        self.with_reserve(|| Process::open_any(pid)).err() == Some(Errno::ESRCH)
    }

    /// Looks at a process, should it take one of the last descriptors.
    fn with_reserve<T>(&mut self, look: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            match look() {
                Err(Errno::EMFILE | Errno::ENFILE) if self.reserve.give_up_one() => (),
                found => {
                    self.reserve.refill();
                    return found;
                }
            }
        }
    }

    fn may_connect(&self, peer: Peer) -> bool {
        peer.uid == self.user
    }

    fn refuse(&mut self, place: usize, id: u64, reason: NoRoom) {
        let Some(connection) = self.connections.get(place) else {
            return;
        };
        let error = dispatch::no_room(reason, self.clients(connection.service).limit);
        tracing::error!(
            target: "rpc.netserver", domain = error.domain.number(), code = error.code.number(),
            "{} (client of the {} server, pid {})",
            Printable(&error.message()), connection.service.name(),
            connection.peer.pid
        );
        self.wait_for_first_call(place, id);
    }

    /// A refused client has a while to make the call that its refusal answers.
    pub fn wait_for_first_call(&mut self, place: usize, id: u64) {
        let deadline = Moment::now().plus_ms(REFUSED_MS);
        self.deadlines.set(Deadline::Refused(place), deadline);
        self.refused.push_back((place, id));
        while self.refused.len() > REFUSED_LIMIT {
            if let Some((place, id)) = self.refused.pop_front()
                && self.is_refused(place, id)
            {
                self.end_connection(place);
            }
        }
    }

    fn is_refused(&self, place: usize, id: u64) -> bool {
        self.connections.get(place).is_some_and(|connection| {
            connection.id == id && matches!(connection.phase, Phase::Refused(_))
        })
    }

    /// A refused client makes its first call: it is served after all if there is room by now, or if it
    /// speaks for an owner that is known. What libvirtd does on behalf of a guest that runs already
    /// must not fail because no new one can be started.
    pub fn admit(&mut self, place: usize, reason: NoRoom, is_known: bool) -> Result<(), Error> {
        self.deadlines.unset(Deadline::Refused(place));
        let Some(connection) = self.connections.get(place) else {
            return Ok(());
        };
        let (service, id, peer) = (connection.service, connection.id, connection.peer.pid);
        self.refused.retain(|entry| *entry != (place, id));
        let has_room = reason == NoRoom::Limit && self.clients(service).has_room();
        let is_served_beyond = !has_room
            && is_known
            && self.clients(service).has_room_for_known()
            && (reason == NoRoom::Limit || self.reserve.can_refuse());
        if is_served_beyond {
            tracing::info!(
                target: "rpc.netserver",
                "The client of the {} server with pid {} is served although there is no room: it \
                 speaks for an owner that is known", service.name(), peer
            );
        }
        if has_room || is_served_beyond {
            self.clients_mut(service).by_id.insert(id, place);
            if let Some(connection) = self.connections.get_mut(place) {
                connection.phase = Phase::Served;
            }
            // Written down as its first call, which says that it was let in.
            self.note_call(place);
            return Ok(());
        }
        Err(dispatch::no_room(reason, self.clients(service).limit))
    }

    /// There may be room now: clients that were refused for want of it are served after all, the one
    /// that has waited longest first.
    pub fn admit_waiting(&mut self, service: Service) {
        let mut number = 0;
        while let Some(&(place, id)) = self.refused.get(number)
            && self.clients(service).has_room()
        {
            let waits = self.connections.get_mut(place).filter(|connection| {
                connection.service == service
                    && connection.id == id
                    && connection.phase == Phase::Refused(NoRoom::Limit)
            });
            let Some(connection) = waits else {
                number = number.saturating_add(1);
                continue;
            };
            connection.phase = Phase::Served;
            tracing::info!(
                target: "rpc.netserver",
                "There is room for the client of the {} server with pid {} now",
                service.name(), connection.peer.pid
            );
            self.forget_refused(place, id);
            self.clients_mut(service).by_id.insert(id, place);
            // Written down as its first call, which says that it was let in.
            self.note_call(place);
        }
    }

    /// A connection that was refused has ended.
    pub fn forget_refused(&mut self, place: usize, id: u64) {
        self.deadlines.unset(Deadline::Refused(place));
        self.refused.retain(|entry| *entry != (place, id));
    }

    /// Has the reactor told what happens on a connection.
    pub fn watch(&mut self, place: usize) -> std::io::Result<()> {
        let Some(connection) = self.connections.get(place) else {
            return Ok(());
        };
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&connection.socket);
        Source::Connection(place).watch(&self.registry, descriptor)
    }
}

fn seconds_now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
