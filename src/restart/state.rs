//! Everything that a new image of the process needs to go on where the old one stopped, as plain
//! data: no sockets, no locks, only their descriptors' numbers.

use foldhash::{HashMap, HashSet};
use serde::{Deserialize, Serialize};

use crate::host::clock::Moment;
use crate::host::file::FileIdentity;
use crate::host::stream::Peer;
use crate::locks::table::{Mode, Owner, Pid};
use crate::log::Printable;

/// Which of the two servers: each has its sockets, its clients and its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Service {
    /// The lock server, for libvirt's drivers.
    Lock,
    /// The admin server, for virt-admin.
    Admin,
}

impl Service {
    /// Both.
    pub const ALL: [Service; 2] = [Service::Lock, Service::Admin];

    /// The server's name, as the admin socket and the C daemon's state document give it.
    pub fn name(self) -> &'static str {
        match self {
            Service::Lock => "virtlockd",
            Service::Admin => "admin",
        }
    }
}

/// The state of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The lock server.
    pub lock_server: ServerState,
    /// The admin server.
    pub admin_server: ServerState,
    /// The sockets that clients connect to.
    pub listeners: Vec<ListenerState>,
    /// The connections, in the order of connecting.
    pub clients: Vec<ClientState>,
    /// The directories of the lockspaces.
    pub lockspaces: Vec<Vec<u8>>,
    /// What is held.
    pub resources: Vec<ResourceState>,
    /// Who is being fenced.
    pub fences: Vec<FenceState>,
    /// Who holds something without a connection of its own.
    pub watches: Vec<WatchState>,
    /// The process that was started.
    pub process: ProcessState,
    /// The poll that watches the connections already, if it is handed over.
    pub poll: Option<PollState>,
}

/// A server's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerState {
    /// How many clients there may be.
    pub limit: u32,
    /// How many may be waiting for authentication.
    pub unauthenticated_limit: u32,
    /// The limit that the configuration gave when it was last read; `None` if it gave none. As
    /// long as it gives the same, a limit that was set over the admin socket stays.
    pub configured: Option<u32>,
    /// The next client's number.
    pub next_id: u64,
    /// Thread pool numbers, for the admin socket to show: minimum, maximum, priority workers.
    pub workers: [u32; 3],
}

impl Default for ServerState {
    fn default() -> Self {
        ServerState {
            limit: 0,
            unauthenticated_limit: 0,
            configured: None,
            next_id: 1,
            workers: [0; 3],
        }
    }
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerState {
    /// Which server's.
    pub server: Service,
    /// Its descriptor.
    pub descriptor: i32,
    /// Its file, if the daemon removes it at the end.
    pub path: Option<Vec<u8>>,
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientState {
    /// Its descriptor.
    pub descriptor: i32,
    /// Which server's client.
    pub server: Service,
    /// Its number there.
    pub id: u64,
    /// Who called connect(); `None` if only the kernel knows.
    pub peer: Option<Peer>,
    /// When that process started.
    pub start_time: Option<u64>,
    /// Seconds since the epoch.
    pub connected_at: i64,
    /// Whether it has made a call.
    pub has_called: bool,
    /// Whether it is only waiting to be told that there is no room.
    pub refused: bool,
    /// The registered owner.
    pub owner: Option<Owner>,
    /// Whether it may make no further call.
    pub restricted: bool,
    /// Bytes on their way.
    pub traffic: Traffic,
}

/// Bytes that were read and not worked on, and replies that could not be sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Read and not worked on.
    pub pending: Vec<u8>,
    /// Descriptors came with the last byte of `pending`.
    pub descriptors_at_end: bool,
    /// How many descriptors of the call at the front of `pending` have arrived.
    pub arrived: u32,
    /// Replies not sent yet.
    pub unsent: Vec<u8>,
    /// Whether the connection ends when they are sent.
    pub closing: bool,
}

impl Traffic {
    /// Whether nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.unsent.is_empty() && !self.closing
    }
}

/// How a resource's file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKindState {
    /// By an open-file-description lock.
    OpenFile,
    /// By a POSIX lock of this process.
    Process,
    /// The document does not say: the kernel must be asked.
    Unknown,
}

/// A held resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceState {
    /// The lockspace's directory; empty for the default one.
    pub lockspace: Vec<u8>,
    /// The name in it.
    pub name: Vec<u8>,
    /// The locked file's descriptor.
    pub descriptor: i32,
    /// The file; `None` if it must be asked.
    pub identity: Option<FileIdentity>,
    /// As the first owner took it.
    pub mode: Mode,
    /// Whether the first owner wanted the file made.
    pub autocreate: bool,
    /// Whether the daemon made the file.
    pub created: bool,
    /// How it is locked.
    pub kind: LockKindState,
    /// Further descriptors of the file that must stay open.
    pub parked: Vec<i32>,
    /// Who holds it, and how often.
    pub holders: Vec<(Owner, u32)>,
}

/// An owner that is being fenced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceState {
    /// Its number.
    pub pid: Pid,
    /// The pidfd.
    pub descriptor: i32,
    /// Whether it was sent SIGKILL.
    pub killed: bool,
    /// When something more is to be done about it.
    pub next_step: Moment,
}

/// An owner without a connection of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchState {
    /// Its number.
    pub pid: Pid,
    /// The pidfd through which it is watched; `None` if its process cannot be seen.
    pub descriptor: Option<i32>,
}

/// The poll of an earlier image of this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PollState {
    /// Its descriptor.
    pub descriptor: i32,
    /// The connections that it watches: each one's descriptor, and its place, which is what the poll
    /// calls it by.
    pub places: Vec<(i32, u32)>,
}

/// Places in the poll's tokens stay below this, far above what there can be descriptors for.
const PLACES: u32 = 1 << 24;

impl PollState {
    /// Whether it watches all of these clients, each by a place of its own.
    pub fn knows(&self, clients: &[ClientState]) -> bool {
        let places: HashMap<i32, u32> = self.places.iter().copied().collect();
        let mut taken = HashSet::default();
        clients.iter().all(|client| {
            let place = places.get(&client.descriptor);
            place.is_some_and(|place| *place < PLACES && taken.insert(*place))
        })
    }
}

/// What belongs to the process rather than to what it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessState {
    /// The pid file, open and locked, and its path.
    pub pid_file: Option<(i32, Vec<u8>)>,
    /// The configuration file, if there is one.
    pub config_file: Option<Vec<u8>>,
    /// The program to start when the daemon is replaced.
    pub program: Vec<u8>,
    /// Seconds without clients and locks after which the daemon ends; 0 for never.
    pub idle_timeout_s: u32,
    /// Log level, filters and outputs, as text.
    pub logging: LogState,
}

/// Log settings as they are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    /// 1 debug to 4 error.
    pub level: u32,
    /// As libvirt writes them.
    pub filters: String,
    /// As libvirt writes them, with the paths as
    /// [`outputs_setting`](crate::log::outputs_setting) does.
    pub outputs: String,
    /// What is used when there are no outputs, written in the same way.
    pub default_output: String,
}

impl State {
    /// The numbers of all descriptors that belong to the state.
    pub fn descriptors(&self) -> Vec<i32> {
        let resources = self
            .resources
            .iter()
            .flat_map(|resource| resource.parked.iter().copied().chain([resource.descriptor]));
        self.listeners
            .iter()
            .map(|listener| listener.descriptor)
            .chain(self.clients.iter().map(|client| client.descriptor))
            .chain(resources)
            .chain(self.fences.iter().map(|fence| fence.descriptor))
            .chain(self.watches.iter().filter_map(|watch| watch.descriptor))
            .chain(
                self.process
                    .pid_file
                    .iter()
                    .map(|(descriptor, _)| *descriptor),
            )
            .chain(self.poll.iter().map(|poll| poll.descriptor))
            .collect()
    }

    /// What a descriptor is of, for a message.
    pub fn meaning(&self, number: i32) -> String {
        if let Some(client) = self.clients.iter().find(|it| it.descriptor == number) {
            return format!(
                "client {} of the {} server",
                client.id,
                client.server.name()
            );
        }
        let is_its = |resource: &&ResourceState| {
            resource.descriptor == number || resource.parked.contains(&number)
        };
        if let Some(resource) = self.resources.iter().find(is_its) {
            return format!("the file of resource '{}'", Printable(&resource.name));
        }
        let is_listener = self.listeners.iter().any(|it| it.descriptor == number);
        if is_listener {
            "a listening socket".into()
        } else {
            "one of the daemon's own".into()
        }
    }

    /// Whether a descriptor is of a socket, listening or a client's.
    pub fn has_socket(&self, number: i32) -> bool {
        let mut listeners = self.listeners.iter().map(|listener| listener.descriptor);
        let mut clients = self.clients.iter().map(|client| client.descriptor);
        listeners.any(|it| it == number) || clients.any(|it| it == number)
    }

    /// A socket has another number now.
    pub fn renumber_socket(&mut self, before: i32, now: i32) {
        let listeners = self
            .listeners
            .iter_mut()
            .map(|listener| &mut listener.descriptor);
        let clients = self.clients.iter_mut().map(|client| &mut client.descriptor);
        for number in listeners.chain(clients) {
            if *number == before {
                *number = now;
            }
        }
    }

    /// Whether every descriptor is one and belongs to one thing only: a state that says otherwise is
    /// damaged, and acting on it would close the wrong files.
    pub fn check_descriptors(&self) -> Result<(), String> {
        let mut numbers = self.descriptors();
        numbers.sort_unstable();
        if let Some(number) = numbers.iter().find(|number| **number < 0) {
            return Err(format!("the state is damaged: it uses descriptor {number}"));
        }
        let twice = numbers
            .iter()
            .zip(numbers.iter().skip(1))
            .find(|(one, next)| one == next);
        match twice {
            Some((number, _)) => Err(format!(
                "the state is damaged: it uses descriptor {number} twice"
            )),
            None => Ok(()),
        }
    }

    /// One server's numbers.
    pub fn server(&self, name: Service) -> &ServerState {
        match name {
            Service::Lock => &self.lock_server,
            Service::Admin => &self.admin_server,
        }
    }

    /// One server's numbers, to change them.
    pub fn server_mut(&mut self, name: Service) -> &mut ServerState {
        match name {
            Service::Lock => &mut self.lock_server,
            Service::Admin => &mut self.admin_server,
        }
    }
}

/// A uuid as libvirt writes it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (position, byte) in uuid.iter().enumerate() {
        if matches!(position, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_in_five_groups() {
        let uuid: [u8; 16] = std::array::from_fn(|position| 0x10 + position as u8);
        assert_eq!(uuid_text(&uuid), "10111213-1415-1617-1819-1a1b1c1d1e1f");
    }
}
