//! The daemon's lasting state: written down as it changes, given as a whole, and taken over from
//! an earlier image of the process.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use foldhash::HashMap;
use nix::errno::Errno;

use super::accept::Listener;
use super::connection::{Connection, NoRoom, Phase, Service};
use super::conversation::{Conversation, Pending};
use super::daemon::Daemon;
use super::deadlines::Deadline;
use super::fence::{Fence, Stage};
use super::lock_service::Session;
use crate::host::clock::Moment;
use crate::host::descriptors::Inherited;
use crate::host::file::FileIdentity;
use crate::host::log::{self, Printable};
use crate::host::patience::patiently;
use crate::host::process::Process;
use crate::host::{errno, file, process, stream};
use crate::locks::lease::{self, Found, Lease, LockKind};
use crate::locks::table::{Granted, Pid};
use crate::restart::event::Event;
use crate::restart::ledger::Ledger;
use crate::restart::state::{
    ClientState, FenceState, ListenerState, LockKindState, LogState, PollState, ProcessState,
    ResourceState, ServerState, State, Traffic,
};

/// After a ledger that could not be written anew, how long until it is tried again, milliseconds.
const LEDGER_RETRY_MS: u64 = 1000;

impl Daemon {
    /// Writes down a new client.
    pub fn note_connected(&mut self, place: usize) {
        let Some(connection) = self.connections.get(place) else {
            return;
        };
        let event = Event::Connected {
            descriptor: connection.socket.as_raw_fd(),
            server: connection.service,
            id: connection.id,
            peer: Some(connection.peer),
            start_time: connection.start_time,
            connected_at: connection.connected_at,
            refused: matches!(connection.phase, Phase::Refused(_)),
        };
        self.ledger.note(&event);
    }

    /// Writes down a client's first call.
    pub fn note_call(&mut self, place: usize) {
        if let Some(connection) = self.connections.get_mut(place)
            && !connection.has_called
        {
            connection.has_called = true;
            self.ledger.note(&Event::Called {
                descriptor: connection.socket.as_raw_fd(),
            });
        }
    }

    /// Writes down where the fencing of an owner stands.
    pub fn note_fence(&mut self, pid: Pid) {
        if let Some(fence) = self.fences.of(pid) {
            let state = self.fence_state(fence);
            self.ledger.note(&Event::Fencing(state));
        }
    }

    /// Writes down a server's limits and other numbers.
    pub fn note_server(&mut self, service: Service) {
        let state = self.server_state(service);
        self.ledger.note(&Event::Server {
            name: service,
            state,
        });
    }

    /// Writes down the log settings.
    pub fn note_logging(&mut self) {
        self.ledger.note(&Event::Logging(Box::new(log_state())));
    }

    /// Writes down the idle timeout.
    pub fn note_idle_timeout(&mut self) {
        self.ledger.note(&Event::IdleTimeout(self.idle_timeout_s));
    }

    /// Writes the ledger anew, to have it short for a successor. If that fails it stays as it is.
    pub fn renew_ledger(&mut self) -> Result<(), Errno> {
        self.ledger = Ledger::of(&self.settled_state())?;
        Ok(())
    }

    /// Writes the ledger anew, because it does not say what is. If that fails no lock is granted
    /// until it can be written.
    pub fn replace_ledger(&mut self) {
        if self.renew_ledger().is_err() {
            self.ledger.lose();
        }
    }

    /// The state without the bytes that are on their way: those are written down only when a
    /// successor takes over. Written down earlier, they would be sent or worked on once more there
    /// if they had gone out meanwhile.
    fn settled_state(&self) -> State {
        let mut state = self.state();
        for client in &mut state.clients {
            client.traffic = Traffic::default();
        }
        state
    }

    /// Makes the ledger whole for a successor: what is not written down as it happens.
    pub fn complete_ledger(&mut self) -> Result<(), Errno> {
        if self.ledger.is_stale() || self.keeper.take_has_parked() {
            self.ledger = Ledger::of(&self.state())?;
        } else {
            for service in Service::ALL {
                let state = self.server_state(service);
                self.ledger.append(&Event::Server {
                    name: service,
                    state,
                })?;
            }
            self.ledger
                .append(&Event::Process(Box::new(self.process_state())))?;
            for (_, connection) in &self.connections {
                let traffic = traffic(connection);
                if !traffic.is_empty() {
                    let descriptor = connection.socket.as_raw_fd();
                    self.ledger.append(&Event::Traffic {
                        descriptor,
                        traffic: Box::new(traffic),
                    })?;
                }
            }
        }
        debug_assert!(self.ledger_is_true());
        let poll = self.poll_state()?;
        self.ledger.append(&Event::Poll(poll))
    }

    /// The poll, for a successor to go on with. What it has said of a connection and was not worked
    /// on it is made to say once more; the successor asks by itself when a reply can be sent.
    fn poll_state(&mut self) -> Result<PollState, Errno> {
        let has_more_to_say = |connection: &Connection| {
            connection.readable
                || connection.hung_up
                || connection.queued
                || connection.waits_to_send
                || !traffic(connection).is_empty()
        };
        let unfinished: Vec<usize> = self
            .connections
            .iter()
            .filter(|(_, connection)| has_more_to_say(connection))
            .map(|(place, _)| place)
            .collect();
        for place in unfinished {
            self.watch(place).map_err(|error| errno::of(&error))?;
            // Should there be no successor after all, this daemon asks anew, too.
            if let Some(connection) = self.connections.get_mut(place) {
                connection.waits_to_send = false;
            }
            self.enqueue(place);
        }
        let places = self.connections.iter().map(|(place, connection)| {
            let descriptor = connection.socket.as_raw_fd();
            (descriptor, u32::try_from(place).unwrap_or(u32::MAX))
        });
        Ok(PollState {
            descriptor: self.registry.as_raw_fd(),
            places: places.collect(),
        })
    }

    /// Whether the ledger says what is.
    fn ledger_is_true(&self) -> bool {
        let said = crate::restart::ledger::replay(self.ledger.content());
        let (Ok(mut said), mut is) = (said, self.state()) else {
            return false;
        };
        for state in [&mut said, &mut is] {
            state.clients.sort_by_key(|client| client.descriptor);
            for client in &mut state.clients {
                // One that ends need not be refused any more.
                client.refused &= !client.traffic.closing;
            }
            state.lockspaces.sort();
            state.resources.sort_by_key(|resource| resource.descriptor);
            for resource in &mut state.resources {
                resource.holders.sort_by_key(|(owner, _)| owner.pid);
                // Whoever registered last is what is shown of an owner.
                for (owner, _) in &mut resource.holders {
                    owner.name = Vec::new().into();
                    (owner.id, owner.uuid) = (0, [0; 16]);
                }
            }
            state.fences.sort_by_key(|fence| fence.pid);
            for fence in &mut state.fences {
                fence.next_step = Moment(0);
            }
        }
        said == is
    }

    /// The numbers of all descriptors that a successor needs.
    pub fn kept_descriptors(&self) -> Vec<i32> {
        let mut kept: Vec<i32> = self
            .listeners
            .iter()
            .map(|listener| listener.socket.as_raw_fd())
            .collect();
        kept.extend(
            self.connections
                .iter()
                .map(|(_, client)| client.socket.as_raw_fd()),
        );
        for (_, resource) in self.keeper.table().iter() {
            kept.push(resource.lease.descriptor.as_raw_fd());
            if let LockKind::Process { parked } = &resource.lease.kind {
                kept.extend(parked.iter().map(AsRawFd::as_raw_fd));
            }
        }
        kept.extend(
            self.fences
                .iter()
                .map(|(_, fence)| fence.process.pidfd().as_raw_fd()),
        );
        kept.extend(
            self.process
                .pid_file
                .iter()
                .map(|(descriptor, _)| *descriptor),
        );
        kept.push(self.ledger.descriptor().as_raw_fd());
        kept.push(self.registry.as_raw_fd());
        kept
    }

    /// Writes the ledger anew if it has grown too long or lacks something.
    pub fn tend_ledger(&mut self) {
        if self.keeper.take_has_parked() {
            self.ledger.lose();
        }
        if !self.ledger.wants_compaction() || self.deadlines.get(Deadline::Ledger).is_some() {
            return;
        }
        match Ledger::of(&self.settled_state()) {
            Ok(ledger) => self.ledger = ledger,
            Err(reason) => {
                if self.ledger.is_stale() {
                    tracing::error!(
                        target: "locking.lock_daemon",
                        "The state that an upgrade needs cannot be written down: {}. No new lock \
                         is granted until it can: free some memory",
                        errno::text(reason)
                    );
                } else {
                    self.ledger.put_off_compaction();
                }
                self.deadlines
                    .set(Deadline::Ledger, Moment::now().plus_ms(LEDGER_RETRY_MS));
            }
        }
    }

    /// The whole state.
    pub fn state(&self) -> State {
        State {
            lock_server: self.server_state(Service::Lock),
            admin_server: self.server_state(Service::Admin),
            listeners: self.listeners.iter().map(listener_state).collect(),
            clients: self
                .connections
                .iter()
                .map(|(_, client)| client_state(client))
                .collect(),
            lockspaces: self.keeper.lockspaces().map(<[u8]>::to_vec).collect(),
            resources: self.resource_states(),
            fences: self
                .fences
                .iter()
                .map(|(_, fence)| self.fence_state(fence))
                .collect(),
            process: self.process_state(),
            poll: None,
        }
    }

    fn process_state(&self) -> ProcessState {
        ProcessState {
            idle_timeout_s: self.idle_timeout_s,
            logging: log_state(),
            ..self.process.clone()
        }
    }

    fn server_state(&self, service: Service) -> ServerState {
        let clients = self.clients(service);
        ServerState {
            limit: clients.limit,
            unauthenticated_limit: clients.unauthenticated_limit,
            configured: clients.configured,
            next_id: clients.next_id,
            workers: clients.workers,
        }
    }

    fn fence_state(&self, fence: &Fence) -> FenceState {
        let deadline = match fence.stage {
            Stage::Asked => Deadline::Kill(fence.pid),
            Stage::Killed => Deadline::StillAlive(fence.pid),
        };
        FenceState {
            pid: fence.pid,
            descriptor: fence.process.pidfd().as_raw_fd(),
            killed: fence.stage == Stage::Killed,
            next_step: self.deadlines.get(deadline).unwrap_or_else(Moment::now),
        }
    }

    fn resource_states(&self) -> Vec<ResourceState> {
        let table = self.keeper.table();
        let state = |resource: &crate::locks::table::Resource<Lease>| {
            let (kind, parked) = match &resource.lease.kind {
                LockKind::OpenFile => (LockKindState::OpenFile, Vec::new()),
                LockKind::Process { parked } => (
                    LockKindState::Process,
                    parked.iter().map(AsRawFd::as_raw_fd).collect(),
                ),
            };
            let holders = resource
                .holders()
                .filter_map(|(pid, times)| Some((table.owner(pid)?.clone(), times)))
                .collect();
            ResourceState {
                lockspace: resource.lockspace().to_vec(),
                name: resource.name().to_vec(),
                descriptor: resource.lease.descriptor.as_raw_fd(),
                identity: Some(resource.identity),
                mode: resource.mode,
                autocreate: resource.autocreate,
                created: resource.lease.created,
                kind,
                parked,
                holders,
            }
        };
        table.iter().map(|(_, resource)| state(resource)).collect()
    }

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
                    no_identity(&descriptor)
                }),
            };
            adopted.push((resource, descriptor, identity));
        }
        // Only locks of another program's making have to be looked at.
        let mut names = HashMap::default();
        for (resource, _, identity) in &adopted {
            if resource.kind == LockKindState::Unknown {
                let count = names.entry(*identity).or_insert(0u32);
                *count = count.saturating_add(1);
            }
        }
        for (resource, descriptor, identity) in adopted {
            let is_alone = names.get(&identity).is_none_or(|count| *count == 1);
            let kind = resume_kind(&resource, &descriptor, is_alone, inherited)?;
            let lease = Lease {
                descriptor,
                kind,
                created: resource.created,
            };
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
            None => stream::peer(&socket).map_err(|reason| {
                format!("who {} is, is unknown: {}", what(), errno::text(reason))
            })?,
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

/// Stands for a file that cannot be asked which one it is: no other has it.
fn no_identity(descriptor: &OwnedFd) -> FileIdentity {
    FileIdentity {
        device: u64::MAX,
        inode: u64::try_from(descriptor.as_raw_fd()).unwrap_or(u64::MAX),
    }
}

fn resume_kind(
    resource: &ResourceState,
    descriptor: &OwnedFd,
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
                .map(|number| adopt(*number, "a file", inherited))
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

fn listener_state(listener: &Listener) -> ListenerState {
    ListenerState {
        server: listener.service,
        descriptor: listener.socket.as_raw_fd(),
        path: listener
            .path
            .as_ref()
            .map(|path| OsStr::as_bytes(path.as_os_str()).to_vec()),
    }
}

fn client_state(connection: &Connection) -> ClientState {
    ClientState {
        descriptor: connection.socket.as_raw_fd(),
        server: connection.service,
        id: connection.id,
        peer: Some(connection.peer),
        start_time: connection.start_time,
        connected_at: connection.connected_at,
        has_called: connection.has_called,
        refused: matches!(connection.phase, Phase::Refused(_)),
        owner: connection.session.owner().cloned(),
        restricted: matches!(connection.session, Session::Restricted(_)),
        traffic: traffic(connection),
    }
}

/// The bytes of a connection that are on their way.
fn traffic(connection: &Connection) -> Traffic {
    if connection.phase == Phase::Over {
        // Nothing is read from it or sent to it any more.
        return Traffic {
            closing: true,
            ..Traffic::default()
        };
    }
    let (pending, descriptors_at_end, arrived) =
        match connection.conversation().and_then(Conversation::pending) {
            Some(Pending {
                bytes,
                descriptors_at_end,
                arrived,
            }) => (bytes, descriptors_at_end, arrived),
            None => (Vec::new(), false, 0),
        };
    Traffic {
        pending,
        descriptors_at_end,
        arrived,
        unsent: connection.unsent().to_vec(),
        closing: connection.phase == Phase::Closing,
    }
}

fn log_state() -> LogState {
    let settings = log::settings();
    LogState {
        level: settings.level.number(),
        filters: log::filters_setting(&settings.filters),
        outputs: log::format_outputs(&settings.outputs),
        default_output: settings.default_output.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::table::Mode;

    #[test]
    fn a_file_whose_lock_cannot_be_looked_at_is_kept_with_the_care_of_a_posix_lock() {
        // The kernel answers no question about locks on such a descriptor.
        let descriptor = file::open_directory(b"/").unwrap();
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
        let kind = resume_kind(&resource, &descriptor, true, &mut none).unwrap();
        assert!(matches!(kind, LockKind::Process { .. }));
    }
}
