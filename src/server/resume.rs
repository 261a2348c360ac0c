//! Going on where an earlier image of the process stopped: its state becomes this daemon, and the
//! descriptors that it left open become its sockets, locks and fenced processes.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use foldhash::HashMap;

use super::accept::Listener;
use super::connection::{Connection, NoRoom, Phase, Service};
use super::conversation::{Conversation, Pending};
use super::daemon::Daemon;
use super::fence::{Fence, Stage};
use super::lock_service::Session;
use crate::host::descriptors::Inherited;
use crate::host::file::{FileIdentity, Lockable};
use crate::host::patience::patiently;
use crate::host::process::Process;
use crate::host::{
    errno::{self, Errno},
    file, process, stream,
};
use crate::locks::lease::{self, Found, Lease, LockKind};
use crate::locks::table::Granted;
use crate::log::Printable;
use crate::restart::event::Event;
use crate::restart::state::{
    ClientState, ListenerState, LockKindState, PollState, ResourceState, State, Traffic,
};

impl Daemon {
    /// Goes on where the state says that an earlier image of this process stopped. Everything that
    /// can fail is done before anything is changed that the earlier program, started once more on
    /// the same state, could not find as it was.
    pub fn resume(&mut self, state: State, inherited: &mut Inherited) -> Result<(), String> {
        for service in Service::ALL {
            let numbers = *state.server(service);
            let clients = self.clients_mut(service);
            clients.limit = numbers.limit;
            clients.unauthenticated_limit = numbers.unauthenticated_limit;
            clients.configured = numbers.configured;
            clients.next_id = numbers.next_id;
            clients.workers = numbers.workers;
        }
        self.idle_timeout_s = state.process.idle_timeout_s;
        self.process = state.process;
        for directory in &state.lockspaces {
            self.keeper.add_lockspace(directory);
        }
        self.inherit_abandoned();
        self.resume_resources(state.resources, inherited)?;
        self.resume_clients(state.clients, state.poll, inherited)?;
        for fence in state.fences {
            let pidfd = adopt(fence.descriptor, "a fenced process", inherited)?;
            let stage = if fence.killed {
                Stage::Killed
            } else {
                Stage::Asked
            };
            self.follow(
                Fence {
                    pid: fence.pid,
                    process: Process::from_pidfd(pidfd),
                    stage,
                },
                fence.next_step,
            );
        }
        for watch in state.watches {
            let pidfd = watch
                .descriptor
                .map(|number| adopt(number, "a watched process", inherited))
                .transpose()?;
            self.resume_watch(watch.pid, pidfd);
        }
        self.watch_the_unwatched();
        Ok(())
    }

    fn resume_resources(
        &mut self,
        resources: Vec<ResourceState>,
        inherited: &mut Inherited,
    ) -> Result<(), String> {
        self.keeper.reserve(resources.len());
        let mut adopted = Vec::with_capacity(resources.len());
        for resource in resources {
            let what = || format!("the file of resource '{}'", Printable(&resource.name));
            let descriptor = inherited
                .take(resource.descriptor)
                .map_err(|reason| not_open(resource.descriptor, &what(), reason))?;
            let identity = match resource.identity {
                Some(identity) => identity,
                None => file::identity(&descriptor).unwrap_or_else(|reason| {
                    // One stale file of a network must not cost the locks of all others.
                    tracing::error!(
                        target: "locking.lock_daemon",
                        "{} stays locked, but other names of it are not recognized: {}",
                        what(),
                        errno::text(reason)
                    );
                    FileIdentity::unknown(&descriptor)
                }),
            };
            adopted.push((resource, descriptor, identity));
        }
        // Only locks of another program's making have to be looked at.
        let mut names = HashMap::default();
        // One that cannot be asked which file it is may be any of the others.
        let all_known = adopted.iter().all(|(_, _, identity)| identity.is_known());
        for (resource, _, identity) in &adopted {
            if resource.kind == LockKindState::Unknown {
                let count = names.entry(*identity).or_insert(0u32);
                *count = count.saturating_add(1);
            }
        }
        for (resource, descriptor, identity) in adopted {
            let is_alone = all_known && names.get(&identity).is_none_or(|count| *count == 1);
            let mut descriptor = Lockable::inherited(descriptor);
            let kind = resume_kind(&resource, &mut descriptor, is_alone, inherited)?;
            let lease = Lease::resumed(descriptor, kind, resource.created);
            let granted = Granted {
                lockspace: &resource.lockspace,
                name: &resource.name,
                identity,
                mode: resource.mode,
                autocreate: resource.autocreate,
                lease,
            };
            self.keeper.adopt(granted, &resource.holders);
        }
        Ok(())
    }

    fn resume_clients(
        &mut self,
        clients: Vec<ClientState>,
        poll: Option<PollState>,
        inherited: &mut Inherited,
    ) -> Result<(), String> {
        // Where a poll watches them already, they keep the places that it knows them by.
        let is_watched = poll.is_some();
        let places: HashMap<i32, u32> = poll
            .map(|poll| poll.places.into_iter().collect())
            .unwrap_or_default();
        let mut placed = Vec::with_capacity(clients.len());
        let mut unfinished = Vec::new();
        for (position, client) in clients.into_iter().enumerate() {
            let place = places
                .get(&client.descriptor)
                .and_then(|place| usize::try_from(*place).ok())
                .unwrap_or(position);
            if !client.traffic.is_empty() {
                unfinished.push(place);
            }
            placed.push((place, self.resume_client(client, inherited)?));
        }
        self.connections = placed.into_iter().collect();
        let all: Vec<usize> = self.connections.iter().map(|(place, _)| place).collect();
        for place in all {
            if !is_watched {
                patiently(|| self.watch(place))
                    .map_err(|error| format!("a client cannot be watched: {error}"))?;
            }
            let Some(connection) = self.connections.get(place) else {
                continue;
            };
            if let Some(owner) = connection.own_owner() {
                self.own_connections.add(owner);
            }
            let (service, id) = (connection.service, connection.id);
            if matches!(connection.phase, Phase::Refused(_)) {
                self.wait_for_first_call(place, id);
            } else {
                self.clients_mut(service).by_id.insert(id, place);
            }
        }
        unfinished.into_iter().for_each(|place| self.enqueue(place));
        Ok(())
    }

    fn resume_client(
        &mut self,
        client: ClientState,
        inherited: &mut Inherited,
    ) -> Result<Connection, String> {
        let what = || {
            format!(
                "client {} of the {} server",
                client.id,
                client.server.name()
            )
        };
        let socket = inherited
            .take(client.descriptor)
            .map_err(|reason| not_open(client.descriptor, &what(), reason))?;
        let peer = match client.peer {
            Some(peer) => peer,
            None => stream::peer(&socket).unwrap_or_else(|reason| {
                tracing::error!(
                    target: "rpc.netdaemon",
                    "Who {} is cannot be asked (getsockopt): {}. It is served, and cannot be killed \
                     should it leave with locks",
                    what(),
                    errno::text(reason)
                );
                stream::UNKNOWN_PEER
            }),
        };
        if !client.traffic.is_empty() {
            let traffic = Box::default();
            self.ledger.note(&Event::Traffic {
                descriptor: client.descriptor,
                traffic,
            });
        }
        let Traffic {
            pending,
            descriptors_at_end,
            arrived,
            unsent,
            closing,
        } = client.traffic;
        let phase = match (closing, client.refused) {
            (true, _) => Phase::Closing,
            (false, true) => Phase::Refused(NoRoom::Limit),
            (false, false) => Phase::Served,
        };
        let mut connection = Connection::new(socket, client.server, client.id, peer, phase);
        connection.start_time = client.start_time;
        if !self.names_processes && connection.start_time.is_none() {
            connection.start_time = process::start_time(peer.pid).ok();
        }
        connection.connected_at = client.connected_at;
        connection.has_called = client.has_called;
        connection.session = match client.owner {
            None => Session::Unregistered,
            Some(owner) if client.restricted => Session::Restricted(Box::new(owner)),
            Some(owner) => Session::Registered(Box::new(owner)),
        };
        connection.paused = !pending.is_empty();
        connection.keep_conversation(Conversation::resume(Pending {
            bytes: pending,
            descriptors_at_end,
            arrived,
        }));
        connection.hold(&unsent);
        Ok(connection)
    }
}

/// The listening sockets of a state, to be watched by the reactor.
pub fn resume_listeners(
    listeners: &[ListenerState],
    inherited: &mut Inherited,
) -> Result<Vec<Listener>, String> {
    let resume = |listener: &ListenerState| {
        let socket = adopt(listener.descriptor, "a listening socket", inherited)?;
        let path = listener
            .path
            .clone()
            .map(|path| PathBuf::from(std::ffi::OsString::from_vec(path)));
        Ok(Listener {
            socket,
            path,
            service: listener.server,
            readable: true,
            queued: true,
        })
    };
    listeners.iter().map(resume).collect()
}

fn resume_kind(
    resource: &ResourceState,
    descriptor: &mut Lockable,
    is_alone: bool,
    inherited: &mut Inherited,
) -> Result<LockKind, String> {
    let found = match resource.kind {
        LockKindState::OpenFile => Found::OpenFile,
        LockKindState::Process => Found::Process,
        LockKindState::Unknown => {
            lease::adopt(descriptor, resource.mode, is_alone).unwrap_or_else(|reason| {
                // What the C daemon takes, and what needs most care: nothing is lost if it is wrong.
                tracing::error!(
                    target: "locking.lock_daemon",
                    "The lock on '{}' cannot be looked at, and is kept as it is: {}",
                    Printable(&resource.name), errno::text(reason)
                );
                Found::Process
            })
        }
    };
    match found {
        Found::OpenFile => Ok(LockKind::OpenFile),
        Found::Process => {
            let parked: Result<_, String> = resource
                .parked
                .iter()
                .map(|number| adopt(*number, "a file", inherited).map(Lockable::from))
                .collect();
            Ok(LockKind::Process { parked: parked? })
        }
        Found::Lost => {
            tracing::error!(
                target: "locking.lock_daemon",
                "The lock on '{}' was lost by the program that ran before: another process has it \
                 now. Its owner and the other process may both write the file: stop one of them",
                Printable(&resource.name)
            );
            Ok(LockKind::OpenFile)
        }
    }
}

fn adopt(number: i32, what: &str, inherited: &mut Inherited) -> Result<OwnedFd, String> {
    inherited
        .take(number)
        .map_err(|reason| not_open(number, what, reason))
}

fn not_open(number: i32, what: &str, reason: Errno) -> String {
    format!(
        "descriptor {number}, which should be {what}, is not open: {}",
        errno::text(reason)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::table::Mode;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_file_whose_lock_cannot_be_looked_at_is_kept_with_the_care_of_a_posix_lock() {
        // The kernel answers no question about locks on such a descriptor.
        let mut descriptor = Lockable::inherited(file::open_directory(b"/").unwrap());
        let resource = ResourceState {
            lockspace: Vec::new(),
            name: b"/stale".to_vec(),
            descriptor: descriptor.as_raw_fd(),
            identity: None,
            mode: Mode::Exclusive,
            autocreate: false,
            created: false,
            kind: LockKindState::Unknown,
            parked: Vec::new(),
            holders: Vec::new(),
        };
        let mut none = Inherited::of(&[]).unwrap();
        let kind = resume_kind(&resource, &mut descriptor, true, &mut none).unwrap();
        assert!(matches!(kind, LockKind::Process { .. }));
    }
}
