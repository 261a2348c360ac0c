//! The daemon's lasting state: written down as it changes, and given as a whole. How a later image of
//! the process goes on from it is told in [`super::resume`].

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use super::accept::Listener;
use super::connection::{Connection, Phase, Service};
use super::conversation::{Conversation, Pending};
use super::daemon::Daemon;
use super::deadlines::Deadline;
use super::fence::{Fence, Stage};
use super::lock_service::Session;
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::locks::lease::{Lease, LockKind};
use crate::locks::table::Pid;
use crate::log;
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
        let ledger = Ledger::of(&self.settled_state())?;
        self.ledger.replace(ledger);
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
        self.state_of(|connection| client_state(connection, Traffic::default()))
    }

    /// Makes the ledger whole for a successor: what is not written down as it happens.
    pub fn complete_ledger(&mut self) -> Result<(), Errno> {
        if self.ledger.is_stale() || self.keeper.take_has_parked() {
            let ledger = Ledger::of(&self.state())?;
            self.ledger.replace(ledger);
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
                resource.holders.sort_by_key(|(owner, _)| owner.key());
                // Whoever registered last is what is shown of an owner.
                for (owner, _) in &mut resource.holders {
                    owner.name = Vec::new().into();
                    owner.id = u32::from(owner.id != 0);
                }
            }
            state.watches.sort_by_key(|watch| watch.pid);
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
        kept.extend(self.watches.states().filter_map(|watch| watch.descriptor));
        kept.extend(
            self.process
                .pid_file
                .iter()
                .map(|(descriptor, _)| *descriptor),
        );
        kept.extend(self.ledger.descriptor().map(AsRawFd::as_raw_fd));
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
        let state = self.settled_state();
        let written = if self.upgrade.is_under_way() {
            // A successor may be reading the file.
            Ledger::of(&state).map(|ledger| self.ledger.replace(ledger))
        } else {
            self.ledger.rewrite(&state)
        };
        match written {
            // The state took memory, too.
            Ok(()) => self.give_memory_back_later(),
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
        self.state_of(|connection| client_state(connection, traffic(connection)))
    }

    fn state_of(&self, client: impl Fn(&Connection) -> ClientState) -> State {
        State {
            lock_server: self.server_state(Service::Lock),
            admin_server: self.server_state(Service::Admin),
            listeners: self.listeners.iter().map(listener_state).collect(),
            clients: self
                .connections
                .iter()
                .map(|(_, connection)| client(connection))
                .collect(),
            lockspaces: self.keeper.lockspaces().map(<[u8]>::to_vec).collect(),
            resources: self.resource_states(),
            fences: self
                .fences
                .iter()
                .map(|(_, fence)| self.fence_state(fence))
                .collect(),
            watches: self.watches.states().collect(),
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
                .filter_map(|(owner, times)| Some((table.owner(owner)?.clone(), times)))
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

fn client_state(connection: &Connection, traffic: Traffic) -> ClientState {
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
        traffic,
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
        outputs: log::outputs_setting(&settings.outputs),
        default_output: log::outputs_setting(&[settings.default_output]),
    }
}
