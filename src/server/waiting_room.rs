//! Clients that there is no room for. Nobody is left without an answer: their first call is answered
//! with the reason, and whoever has not made it yet is served after all as soon as there is room.

use std::collections::VecDeque;

use super::deadlines::{Deadline, Deadlines};
use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::servers::Service;
use crate::host::clock::Moment;
use crate::locks::table::Pid;
use crate::wire::error::{self, Error};

/// How many refused clients may be waiting for their refusal at a time.
const MOST: usize = 64;
/// How long a refused client has to make the call that its refusal answers, milliseconds.
const PATIENCE_MS: u64 = 10_000;

/// Why a client is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// There are as many clients as the limit allows.
    Limit,
    /// The daemon has no descriptors left.
    Descriptors,
}

/// The refused clients, in the order they came.
#[derive(Debug)]
pub struct WaitingRoom {
    /// Whether the kernel names the process of a peer itself.
    names_processes: bool,
    queue: VecDeque<(ClientId, NoRoom)>,
}

impl WaitingRoom {
    /// Without anybody in it. Where the kernel does not name the process of a peer itself, one that could
    /// not be looked at when it came can never be fenced.
    pub fn new(names_processes: bool) -> WaitingRoom {
        WaitingRoom {
            names_processes,
            queue: VecDeque::new(),
        }
    }

    /// A refused client has a while to make the call that its refusal answers. If there are too many,
    /// the one that has waited longest is to be ended.
    #[must_use]
    pub fn enter(
        &mut self,
        id: ClientId,
        reason: NoRoom,
        deadlines: &mut Deadlines,
    ) -> Option<ClientId> {
        let deadline = Moment::now().plus_ms(PATIENCE_MS);
        deadlines.set(Deadline::Refused(id), deadline);
        self.queue.push_back((id, reason));
        if self.queue.len() <= MOST {
            return None;
        }
        self.queue.pop_front().map(|(longest, _)| longest)
    }

    /// A refused client makes its first call: it is served after all if there is room by now, or if it
    /// speaks for an owner that is known, whose process is this. What libvirtd does on behalf of a guest that runs already
    /// must not fail because no new one can be started. `can_refuse` says whether the next one could
    /// still be refused for want of descriptors. One that stands for its owner and could not be fenced
    /// when it ends is not served.
    ///
    /// # Errors
    /// The answer to the call.
    pub fn admit(
        &mut self,
        id: ClientId,
        (known, can_refuse): (Option<Pid>, bool),
        custody: &mut Custody,
        deadlines: &mut Deadlines,
    ) -> Result<(), Error> {
        let reason = self.forget(id, deadlines).unwrap_or(NoRoom::Limit);
        let state = custody.state();
        let Some(client) = state.client(id) else {
            return Ok(());
        };
        let service = client.arrival.server;
        let has_room = reason == NoRoom::Limit && state.has_room(service);
        let can_be_fenced = self.names_processes || client.arrival.start_time.is_some();
        let is_served_beyond = !has_room
            && known.is_some_and(|pid| pid != client.peer().pid || can_be_fenced)
            && state.has_room_for_known(service)
            && (reason == NoRoom::Limit || can_refuse);
        if is_served_beyond {
            tracing::info!(
                target: "rpc.netserver",
                "The client of the {} server with pid {} is served although there is no room: it \
                 speaks for an owner that is known", service.name(), client.peer().pid
            );
        }
        if has_room || is_served_beyond {
            custody.called(id);
            return Ok(());
        }
        Err(no_room(reason, state.server(service).limit))
    }

    /// There may be room now: clients that were refused for want of it are served after all, the one
    /// that has waited longest first.
    pub fn let_in(&mut self, service: Service, custody: &mut Custody, deadlines: &mut Deadlines) {
        let mut number = 0;
        while let Some(&(id, reason)) = self.queue.get(number)
            && custody.state().has_room(service)
        {
            let waits = custody.state().client(id).filter(|client| {
                client.arrival.server == service && client.is_refused() && reason == NoRoom::Limit
            });
            let Some(client) = waits else {
                number = number.saturating_add(1);
                continue;
            };
            tracing::info!(
                target: "rpc.netserver",
                "There is room for the client of the {} server with pid {} now",
                service.name(), client.peer().pid
            );
            self.forget(id, deadlines);
            custody.called(id);
        }
    }

    /// A client does not wait any more; why it did.
    pub fn forget(&mut self, id: ClientId, deadlines: &mut Deadlines) -> Option<NoRoom> {
        deadlines.unset(Deadline::Refused(id));
        let place = self.queue.iter().position(|(waiting, _)| *waiting == id)?;
        self.queue.remove(place).map(|(_, reason)| reason)
    }
}

/// The error for a client that there is no room for.
pub fn no_room(reason: NoRoom, limit: u32) -> Error {
    match reason {
        NoRoom::Limit => error::rpc(format!(
            "Too many clients: the limit of {limit} is reached; raise max_clients or try again later"
        )),
        NoRoom::Descriptors => error::rpc(
            "Too many open files: the lock daemon has no descriptors left for another client; \
             raise its limit of open files or try again later",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::custody::clients::Arrival;
    use crate::custody::ledger::Ledger;
    use crate::host::stream::Peer;

    #[test]
    fn a_known_owner_that_could_not_be_fenced_is_not_served_beyond_the_limit() {
        const PEER: Pid = 4242;
        let is_served = |names_processes, start_time, known| {
            let mut custody = Custody::new(Ledger::new().unwrap());
            let mut deadlines = Deadlines::default();
            let mut room = WaitingRoom::new(names_processes);
            let (socket, _other_end) = UnixStream::pair().unwrap();
            let id = ClientId(socket.as_raw_fd());
            let peer = Peer {
                pid: PEER,
                uid: 0,
                gid: 0,
            };
            let arrival = Arrival {
                server: Service::Lock,
                id: 1,
                peer: Some(peer),
                start_time: NonZeroU64::new(start_time),
                connected_at: 0,
                refused: true,
            };
            custody.connected(OwnedFd::from(socket), arrival);
            let longest = room.enter(id, NoRoom::Descriptors, &mut deadlines);
            assert_eq!(longest, None);
            let admitted = room.admit(id, (known, true), &mut custody, &mut deadlines);
            admitted.is_ok()
        };
        assert!(is_served(true, 0, Some(PEER)));
        assert!(is_served(false, 7, Some(PEER)));
        assert!(!is_served(false, 0, Some(PEER)));
        // It speaks for somebody else, who is not fenced when it ends.
        assert!(is_served(false, 0, Some(PEER + 1)));
        assert!(!is_served(true, 7, None));
    }
}
