//! New connections: who may connect, and whether there is room. Whoever is turned away here is closed at
//! once; whoever there is no room for waits to be told so.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::host::errno::Errno;

use crate::custody::Custody;
use crate::custody::clients::{Arrival, ClientId};
use crate::custody::servers::Service;
use crate::host::clock::Moment;
use crate::host::process::Process;
use crate::host::stream::Peer;
use crate::host::{errno, process, stream};
use crate::server::deadlines::{Deadline, Deadlines};
use crate::server::reserve::Reserve;
use crate::server::waiting_room::NoRoom;
use crate::server::watch::{Source, Watch};

/// After connections that could not be accepted, how long until it is tried again, milliseconds.
const RETRY_MS: u64 = 1000;

/// The listening sockets as they pass: which of them may have a connection waiting.
#[derive(Debug)]
pub struct Gate {
    /// By their places among the listeners.
    doors: Vec<Door>,
    /// Who may connect: the daemon's own effective user id.
    user: u32,
    /// Whether the kernel names the process of a peer itself (SO_PEERPIDFD).
    names_processes: bool,
}

#[derive(Debug)]
struct Door {
    service: Service,
    /// There may be a connection waiting.
    readable: bool,
    /// It is in line to be accepted from.
    queued: bool,
}

/// What became of a connection that was waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is a client; if there is no room for it, why.
    Client(ClientId, Option<NoRoom>),
    /// It is none, and there may be another one.
    TurnedAway,
    /// There is none, or none can be accepted now.
    Nothing,
}

impl Gate {
    /// Nothing to accept from yet. Takes descriptors for a moment.
    pub fn new() -> Gate {
        Gate {
            doors: Vec::new(),
            user: nix::unistd::geteuid().as_raw(),
            names_processes: stream::peer_process_is_known(),
        }
    }

    /// Whether the kernel names the process of a peer itself.
    pub fn names_processes(&self) -> bool {
        self.names_processes
    }

    /// One more socket, at which connections may be waiting already.
    pub fn open(&mut self, service: Service) {
        self.doors.push(Door {
            service,
            readable: true,
            queued: true,
        });
    }

    /// Nobody is let in any more.
    pub fn close(&mut self) {
        self.doors.clear();
    }

    /// The kernel says that a connection is waiting.
    pub fn knock(&mut self, place: usize) {
        if let Some(door) = self.doors.get_mut(place) {
            (door.readable, door.queued) = (true, true);
        }
    }

    /// What kept connections from being accepted may have passed.
    pub fn try_again(&mut self) {
        for door in &mut self.doors {
            door.queued = door.readable;
        }
    }

    /// Whether a connection may be waiting in line.
    pub fn has_queue(&self) -> bool {
        self.doors.iter().any(|door| door.queued)
    }

    /// How many sockets there are.
    pub fn len(&self) -> usize {
        self.doors.len()
    }

    /// Whether nobody is let in.
    pub fn is_empty(&self) -> bool {
        self.doors.is_empty()
    }

    /// Takes in a connection that waits in line at this socket.
    pub fn accept(&mut self, place: usize, entrance: &mut Entrance<'_>) -> Accepted {
        let Some(door) = self.doors.get_mut(place).filter(|door| door.queued) else {
            return Accepted::Nothing;
        };
        let service = door.service;
        // Whoever cannot be written down waits in front of the door.
        if entrance.custody.make_room().is_err() {
            door.queued = false;
            entrance.accept_later();
            return Accepted::Nothing;
        }
        let Some(socket) = entrance.custody.listener(place) else {
            return Accepted::Nothing;
        };
        let accepted = match stream::accept(socket) {
            Err(Errno::EAGAIN) => {
                door.readable = false;
                Accepted::Nothing
            }
            Ok(client) => {
                let has_room = entrance.custody.state().has_room(service);
                self.connected(
                    client,
                    service,
                    (!has_room).then_some(NoRoom::Limit),
                    entrance,
                )
            }
            // One of the reserve is spent on telling the client that no descriptor is left.
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS)
                if entrance.reserve.give_up_one_to_spare() =>
            {
                match stream::accept(socket) {
                    Ok(client) => {
                        self.connected(client, service, Some(NoRoom::Descriptors), entrance)
                    }
                    Err(_) => {
                        entrance.reserve.refill();
                        entrance.accept_later();
                        Accepted::Nothing
                    }
                }
            }
            // Tried again when a connection has ended, too.
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                entrance.accept_later();
                Accepted::Nothing
            }
            // The client is gone before it was let in, or was interrupted: the next one.
            Err(Errno::EINTR | Errno::ECONNABORTED) => Accepted::TurnedAway,
            Err(errno) => {
                tracing::error!(
                    target: "rpc.netsocket",
                    "Clients of the {} server cannot be accepted: {}",
                    service.name(), errno::text(errno)
                );
                entrance.accept_later();
                Accepted::Nothing
            }
        };
        if let Some(door) = self.doors.get_mut(place) {
            door.queued = accepted != Accepted::Nothing;
        }
        accepted
    }

    /// Takes in a connection that was accepted by a reactor that died.
    pub fn take_in(
        &self,
        socket: OwnedFd,
        service: Service,
        entrance: &mut Entrance<'_>,
    ) -> Accepted {
        let has_room = entrance.custody.state().has_room(service);
        self.connected(
            socket,
            service,
            (!has_room).then_some(NoRoom::Limit),
            entrance,
        )
    }

    /// A new connection: checked, numbered, watched, and written down.
    fn connected(
        &self,
        socket: OwnedFd,
        service: Service,
        no_room: Option<NoRoom>,
        entrance: &mut Entrance<'_>,
    ) -> Accepted {
        let id = entrance.custody.take_id(service);
        let peer = match stream::peer(&socket) {
            Ok(peer) => peer,
            Err(errno) => {
                tracing::error!(
                    target: "rpc.netsocket",
                    "A client of the {} server is turned away: who it is cannot be read: {}",
                    service.name(), errno::text(errno)
                );
                return Accepted::TurnedAway;
            }
        };
        if peer.uid != self.user {
            tracing::error!(
                target: "rpc.netserver", domain = 7, code = 29,
                "operation forbidden: Disallowing client {} with uid {}", peer.pid, peer.uid
            );
            return Accepted::TurnedAway;
        }
        let start_time = match self.start_time(peer, no_room, entrance) {
            Ok(start_time) => start_time,
            Err(reason) => {
                tracing::error!(
                    target: "rpc.netsocket",
                    "Client {} of the {} server is turned away: its process cannot be looked at: {}",
                    peer.pid, service.name(), errno::text(reason)
                );
                return Accepted::TurnedAway;
            }
        };
        let client = ClientId(socket.as_raw_fd());
        if let Err(error) = entrance.watch.add(Source::Connection(client), client.0) {
            tracing::error!(
                target: "rpc.netserver",
                "Client {} of the {} server is turned away: it cannot be watched: {error}",
                peer.pid, service.name()
            );
            return Accepted::TurnedAway;
        }
        let arrival = Arrival {
            server: service,
            id,
            peer: Some(peer),
            start_time: start_time.and_then(std::num::NonZeroU64::new),
            connected_at: seconds_now(),
            refused: no_room.is_some(),
        };
        entrance.custody.connected(socket, arrival);
        Accepted::Client(client, no_room)
    }

    /// When the process of a client started, on a kernel that does not name it better.
    fn start_time(
        &self,
        peer: Peer,
        no_room: Option<NoRoom>,
        entrance: &mut Entrance<'_>,
    ) -> Result<Option<u64>, Errno> {
        // Process 0 cannot be seen from here and stands for nobody.
        if self.names_processes || peer.pid <= 0 {
            return Ok(None);
        }
        match entrance.look(|| process::start_time(peer.pid)) {
            Ok(start_time) => Ok(Some(start_time)),
            Err(_) if no_room == Some(NoRoom::Descriptors) => Ok(None),
            // What a dead one sent still counts.
            Err(Errno::ESRCH) if entrance.is_gone(peer.pid) => Ok(None),
            // Alive, it could not be fenced, ever.
            Err(reason) => Err(reason),
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Gate::new()
    }
}

/// What letting somebody in takes, borrowed from the reactor.
#[derive(Debug)]
pub struct Entrance<'a> {
    /// All that lasts.
    pub custody: &'a mut Custody,
    /// Descriptors for the time when there are no others.
    pub reserve: &'a mut Reserve,
    /// What happens when.
    pub deadlines: &'a mut Deadlines,
    /// Where readiness is asked for.
    pub watch: &'a Watch,
}

impl Entrance<'_> {
    /// What keeps connections from being accepted may pass without any event that says so.
    fn accept_later(&mut self) {
        if self.deadlines.get(Deadline::Accept).is_none() {
            let again = Moment::now().plus_ms(RETRY_MS);
            self.deadlines.set(Deadline::Accept, again);
        }
    }

    /// Whether there is certainly no process of this number.
    fn is_gone(&mut self, pid: i32) -> bool {
        self.look(|| Process::open_any(pid)).err() == Some(Errno::ESRCH)
    }

    /// Looks at a process, should it take one of the last descriptors.
    fn look<T>(&mut self, look: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        let found = self.reserve.spend(look);
        self.reserve.refill();
        found
    }
}

fn seconds_now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
