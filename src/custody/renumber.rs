//! A saved state whose descriptors have other numbers by now: the process that wrote it down is over, and
//! what it had open has been given to this one.

use std::os::fd::RawFd;

use super::clients::{Client, ClientId};
use super::descriptor::{Number, Saved};
use super::fences::{Fence, Watched};
use super::roll::Roll;
use super::served::Served;
use super::servers::{Both, Listening, Service};
use super::state::{Estate, State};
use crate::locks::lease::{Lease, LockKind};

impl State<Saved> {
    /// The same state with the numbers that `now` gives for those in it. What belonged to the process alone, its
    /// pid file and its poll, is over.
    ///
    /// # Errors
    /// A sentence about a descriptor that has no number now.
    pub fn renumbered(
        mut self,
        now: impl Fn(RawFd) -> Option<RawFd>,
    ) -> Result<State<Saved>, String> {
        self.settings.pid_file = None;
        self.forget_poll();
        let missing = {
            let mut numbers = self.descriptors();
            numbers.find(|number| now(number.0).is_none())
        };
        if let Some(missing) = missing {
            return Err(format!(
                "descriptor {}, which should be {}, is not there",
                missing.0,
                self.meaning(missing)
            ));
        }
        // All of them have one.
        let now = |number: Number| now(number.0).map_or(number, Number);
        let mut clients = Roll::default();
        clients.reserve(self.clients.len());
        let numbers: Vec<RawFd> = self.clients.numbers().collect();
        for client in numbers.into_iter().filter_map(|it| self.clients.remove(it)) {
            let socket = now(client.socket);
            let client = Client { socket, ..client };
            clients
                .insert(socket.0, client)
                .map_err(|_| format!("two clients have the descriptor {}", socket.0))?;
        }
        let served = |service| {
            let before = self.served.of(service).iter();
            Served::in_order(before.map(|id| ClientId(now(Number(id.0)).0)))
        };
        let mut both = Both::default();
        for service in Service::ALL {
            *both.of_mut(service) = served(service);
        }
        let lease = |lease: Lease<Number>| Lease {
            descriptor: now(lease.descriptor),
            kind: match lease.kind {
                LockKind::Process { parked } => LockKind::Process {
                    parked: parked.into_iter().map(now).collect(),
                },
                kind => kind,
            },
            created: lease.created,
        };
        let estates = self.estates.into_iter().map(|estate| {
            let resources = estate.resources.into_iter();
            let resources = resources
                .map(|resource| resource.try_map(|known, it| Ok((known.identity, lease(it)))));
            Ok::<_, String>(Estate {
                pid: estate.pid,
                resources: resources.collect::<Result<_, String>>()?,
            })
        });
        let fences = self.fences.into_iter().map(|(pid, fence)| {
            let process = now(fence.process);
            (pid, Fence { process, ..fence })
        });
        let watched = self.watched.into_iter().map(|(pid, watched)| {
            let process = watched.process.map(now);
            (pid, Watched { pid, process })
        });
        let listeners = self.listeners.into_iter().map(|listening| Listening {
            socket: now(listening.socket),
            ..listening
        });
        let traffic = self.traffic.into_iter();
        let subscribers = self.subscribers.into_iter();
        let mut state = State {
            listeners: listeners.collect(),
            clients,
            served: both,
            traffic: traffic
                .map(|(id, traffic)| (ClientId(now(Number(id.0)).0), traffic))
                .collect(),
            subscribers: subscribers
                .map(|id| ClientId(now(Number(id.0)).0))
                .collect(),
            table: self
                .table
                .try_map(|known, it| Ok::<_, String>((known.identity, lease(it))))?,
            estates: estates.collect::<Result<_, String>>()?,
            fences: fences.collect(),
            watched: watched.collect(),
            ..self
        };
        state.count_own_connections();
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::super::clients::{Arrival, Traffic};
    use super::super::event::{Event, KindRecord, OwnerRecord, ResourceName};
    use super::super::fences::Stage;
    use super::*;
    use crate::host::clock::Moment;
    use crate::host::file::FileIdentity;
    use crate::locks::table::Mode;

    fn state(socket: i32, other: i32, file: i32, process: i32) -> State<Saved> {
        let owner = |pid| OwnerRecord {
            pid,
            id: 1,
            name: b"guest",
            uuid: [7; 16],
        };
        let granted = |pid, name, descriptor| Event::Granted {
            owner: owner(pid),
            resource: ResourceName {
                lockspace: b"",
                name,
            },
            descriptor: Number(descriptor),
            identity: FileIdentity {
                device: 1,
                inode: u64::from(pid.unsigned_abs()),
            },
            mode: Mode::Exclusive,
            autocreate: false,
            created: false,
            kind: KindRecord::OpenFile,
            since: 9,
        };
        let arrival = |id| Arrival {
            server: Service::Lock,
            id,
            peer: None,
            start_time: None,
            connected_at: 0,
            refused: false,
        };
        let traffic = Traffic {
            pending: vec![1],
            ..Traffic::default()
        };
        State::of_events([
            Event::Listening(Listening {
                server: Service::Lock,
                socket: Number(socket + 100),
                path: None,
            }),
            // The later one may have the lower number.
            Event::Connected(Number(socket), arrival(1)),
            Event::Connected(Number(other), arrival(2)),
            Event::Registered(Number(other), owner(20)),
            Event::RegisteredAt(Number(other), 8),
            Event::Subscribed(Number(other), 6),
            Event::Traffic(Number(other), Box::new(traffic)),
            granted(20, b"/a", file),
            granted(30, b"/b", file + 1),
            Event::Died(30),
            Event::Fencing(Fence {
                pid: 20,
                process: Number(process),
                stage: Stage::Asked,
                next_step: Moment(5),
            }),
            Event::Watched(Watched {
                pid: 40,
                process: Some(Number(process + 1)),
            }),
        ])
        .unwrap()
    }

    #[test]
    fn a_state_with_other_numbers_says_the_same_of_other_numbers() {
        let before = state(10, 20, 30, 40);
        let now = |number| match number {
            10 | 110 => Some(number + 7),
            20 => Some(3),
            30 | 31 => Some(number + 400),
            // Numbers that something else had before.
            40 => Some(10),
            41 => Some(20),
            _ => None,
        };
        let expected = {
            // Not a number of the sample that follows from another one.
            let mut numbers = vec![17, 117, 3, 430, 431, 10, 20];
            numbers.sort_unstable();
            numbers
        };
        let renumbered = before.renumbered(now).unwrap();
        let mut numbers: Vec<i32> = renumbered.descriptors().map(|it| it.0).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, expected);
        let said = |state: &State<Saved>| {
            let events = state.entries();
            let mut said: Vec<String> = events.map(|event| format!("{event:?}")).collect();
            said.sort_unstable();
            said
        };
        // The same, as it would have been written with these numbers.
        let replayed = State::of_events(renumbered.entries()).unwrap();
        assert_eq!(said(&replayed), said(&renumbered));
        assert_eq!(said(&renumbered).len(), said(&state(10, 20, 30, 40)).len());
        let ids: Vec<u64> = renumbered
            .served(Service::Lock)
            .map(|client| client.arrival.id)
            .collect();
        assert_eq!(ids, [1, 2]);
        let second = renumbered.client(ClientId(3)).unwrap();
        assert_eq!((second.socket, second.arrival.id), (Number(3), 2));
        assert_eq!(renumbered.traffic()[&ClientId(3)].pending, [1]);
        assert_eq!((second.registered_at, second.wanted), (8, 6));
        let subscribers = renumbered.subscribers().iter().copied();
        assert_eq!(subscribers.collect::<Vec<_>>(), [ClientId(3)]);
        assert_eq!(renumbered.fences()[&20].process, Number(10));
        assert_eq!(renumbered.watched()[&40].process, Some(Number(20)));
    }

    #[test]
    fn a_client_whose_socket_alone_has_another_number_is_told_what_it_was_told_before() {
        let mut state = state(10, 2, 30, 40);
        state.renumber_socket(Number(2), Number(99));
        let subscribers: Vec<ClientId> = state.subscribers().iter().copied().collect();
        assert_eq!(subscribers, [ClientId(99)]);
        let moved = state.client(ClientId(99)).unwrap();
        assert_eq!((moved.socket, moved.wanted), (Number(99), 6));
    }

    #[test]
    fn one_without_a_number_is_named() {
        let reason = state(10, 20, 30, 40)
            .renumbered(|number| (number != 30).then_some(number))
            .unwrap_err();
        let file = "descriptor 30, which should be the file of resource '/a', is not there";
        assert_eq!(reason, file);
    }
}
