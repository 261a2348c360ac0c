//! What the ledger is made of: every change of lasting state has an event. The encoding is the
//! ledger's business; the order of the variants and of their fields is part of the format.

use serde::{Deserialize, Serialize, Serializer};

use super::state::{
    ClientState, FenceState, ListenerState, LockKindState, LogState, PollState, ProcessState,
    ResourceState, ServerState, Service, State, Traffic, WatchState,
};
use crate::host::file::FileIdentity;
use crate::host::stream::Peer;
use crate::locks::table::{Mode, Owner, OwnerKey, Pid};

/// Writes bytes at once: serde would take a slice for a list of numbers, and write one by one what may
/// be a client's 60,000 bytes. What is written is the same.
fn as_bytes<S: Serializer>(bytes: &&[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// An owner inside an event: borrowed, so that nothing is copied on the way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord<'a> {
    /// The process.
    pub pid: Pid,
    /// The domain's id.
    pub id: u32,
    /// The domain's name.
    #[serde(serialize_with = "as_bytes")]
    pub name: &'a [u8],
    /// The domain's uuid.
    pub uuid: [u8; 16],
}

impl<'a> From<&'a Owner> for OwnerRecord<'a> {
    fn from(owner: &'a Owner) -> Self {
        OwnerRecord {
            pid: owner.pid,
            id: owner.id,
            name: &owner.name,
            uuid: owner.uuid,
        }
    }
}

impl OwnerRecord<'_> {
    /// What tells the owner from every other.
    pub fn key(self) -> OwnerKey {
        OwnerKey {
            pid: self.pid,
            uuid: (self.id != 0).then_some(self.uuid),
        }
    }

    /// A copy of its own.
    pub fn to_owner(self) -> Owner {
        Owner {
            pid: self.pid,
            id: self.id,
            name: self.name.into(),
            uuid: self.uuid,
        }
    }
}

/// A change of lasting state. The order of the variants is part of the format: new ones go to the
/// end, none is ever removed. What is rare and large is boxed, so that the others are short to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event<'a> {
    /// A client connected.
    Connected {
        /// Its descriptor.
        descriptor: i32,
        /// Whose client.
        server: Service,
        /// Its number.
        id: u64,
        /// Who called connect().
        peer: Option<Peer>,
        /// When that process started.
        start_time: Option<u64>,
        /// Seconds since the epoch.
        connected_at: i64,
        /// Whether there was no room for it.
        refused: bool,
    },
    /// A client made its first call, or was let in after all.
    Called {
        /// Its descriptor.
        descriptor: i32,
    },
    /// A client said who the owner is.
    Registered {
        /// Its descriptor.
        descriptor: i32,
        /// The owner.
        #[serde(borrow)]
        owner: OwnerRecord<'a>,
    },
    /// A client gave up its right to call.
    Restricted {
        /// Its descriptor.
        descriptor: i32,
    },
    /// A client is gone.
    Gone {
        /// Its descriptor.
        descriptor: i32,
    },
    /// A lockspace was made or opened.
    Lockspace {
        /// Its directory.
        #[serde(serialize_with = "as_bytes")]
        directory: &'a [u8],
    },
    /// A file was locked.
    Granted {
        /// For whom.
        #[serde(borrow)]
        owner: OwnerRecord<'a>,
        /// The lockspace's directory.
        #[serde(serialize_with = "as_bytes")]
        lockspace: &'a [u8],
        /// The name in it.
        #[serde(serialize_with = "as_bytes")]
        name: &'a [u8],
        /// The file's descriptor.
        descriptor: i32,
        /// The file.
        identity: FileIdentity,
        /// Alone or with others.
        mode: Mode,
        /// Whether it is removed at the end.
        autocreate: bool,
        /// Whether the daemon made it.
        created: bool,
        /// How it is locked.
        kind: LockKindState,
    },
    /// One more holding of a shared resource.
    Joined {
        /// Whose.
        #[serde(borrow)]
        owner: OwnerRecord<'a>,
        /// The lockspace's directory.
        #[serde(serialize_with = "as_bytes")]
        lockspace: &'a [u8],
        /// The name in it.
        #[serde(serialize_with = "as_bytes")]
        name: &'a [u8],
    },
    /// One holding ended, of some domain of the process. Not written any more.
    Released {
        /// The process.
        pid: Pid,
        /// The lockspace's directory.
        #[serde(serialize_with = "as_bytes")]
        lockspace: &'a [u8],
        /// The name in it.
        #[serde(serialize_with = "as_bytes")]
        name: &'a [u8],
    },
    /// All holdings of an owner ended.
    OwnerEnded {
        /// The owner's process.
        pid: Pid,
    },
    /// A descriptor of a resource's file must stay open.
    Parked {
        /// The lockspace's directory.
        #[serde(serialize_with = "as_bytes")]
        lockspace: &'a [u8],
        /// The name in it.
        #[serde(serialize_with = "as_bytes")]
        name: &'a [u8],
        /// The descriptor.
        descriptor: i32,
    },
    /// An owner is being fenced, or the fencing took its next step.
    Fencing(FenceState),
    /// An owner need not be fenced any more.
    Fenced {
        /// The owner's process.
        pid: Pid,
    },
    /// A server's numbers.
    Server {
        /// Which.
        name: Service,
        /// Its numbers.
        state: ServerState,
    },
    /// A listening socket.
    Listening(ListenerState),
    /// Bytes of a client that were on their way.
    Traffic {
        /// The client's descriptor.
        descriptor: i32,
        /// The bytes.
        traffic: Box<Traffic>,
    },
    /// The process's own things.
    Process(Box<ProcessState>),
    /// The log settings.
    Logging(Box<LogState>),
    /// The idle timeout, seconds.
    IdleTimeout(u32),
    /// The poll, as it is handed over.
    Poll(PollState),
    /// One holding ended. Up to format 2 it was `Released`, which does not say of which domain.
    ReleasedBy {
        /// Whose: the process.
        pid: Pid,
        /// And the domain. It may have been a holding of which only the process is known.
        uuid: [u8; 16],
        /// The lockspace's directory.
        #[serde(serialize_with = "as_bytes")]
        lockspace: &'a [u8],
        /// The name in it.
        #[serde(serialize_with = "as_bytes")]
        name: &'a [u8],
    },
    /// An owner has no connection of its own: it is watched, or cannot be.
    Watched(WatchState),
    /// An owner is not watched any more.
    Unwatched {
        /// The owner's process.
        pid: Pid,
    },
}

/// The fewest events that say a state.
pub fn events(state: &State) -> impl Iterator<Item = Event<'_>> {
    let servers = [
        (Service::Lock, state.lock_server),
        (Service::Admin, state.admin_server),
    ]
    .map(|(name, state)| Event::Server { name, state });
    let listeners = state.listeners.iter().cloned().map(Event::Listening);
    let lockspaces = state
        .lockspaces
        .iter()
        .map(|directory| Event::Lockspace { directory });
    let fences = state.fences.iter().cloned().map(Event::Fencing);
    std::iter::once(Event::Process(Box::new(state.process.clone())))
        .chain(listeners)
        .chain(state.clients.iter().flat_map(client_events))
        .chain(lockspaces)
        .chain(state.resources.iter().flat_map(resource_events))
        .chain(fences)
        .chain(state.watches.iter().cloned().map(Event::Watched))
        // Behind the clients, whose numbers would otherwise raise the next one.
        .chain(servers)
        .chain(state.poll.iter().cloned().map(Event::Poll))
}

fn client_events(client: &ClientState) -> impl Iterator<Item = Event<'_>> {
    let descriptor = client.descriptor;
    let connected = Event::Connected {
        descriptor,
        server: client.server,
        id: client.id,
        peer: client.peer,
        start_time: client.start_time,
        connected_at: client.connected_at,
        refused: client.refused,
    };
    let called = client.has_called.then_some(Event::Called { descriptor });
    let registered = client.owner.as_ref().map(|owner| Event::Registered {
        descriptor,
        owner: owner.into(),
    });
    let restricted = client
        .restricted
        .then_some(Event::Restricted { descriptor });
    let traffic = (!client.traffic.is_empty()).then(|| Event::Traffic {
        descriptor,
        traffic: Box::new(client.traffic.clone()),
    });
    std::iter::once(connected)
        .chain(called)
        .chain(registered)
        .chain(restricted)
        .chain(traffic)
}

fn resource_events(resource: &ResourceState) -> impl Iterator<Item = Event<'_>> {
    let (lockspace, name) = (&resource.lockspace[..], &resource.name[..]);
    let mut holders = resource.holders.iter();
    let first = holders.next();
    let granted = first.map(|(owner, _)| Event::Granted {
        owner: owner.into(),
        lockspace,
        name,
        descriptor: resource.descriptor,
        identity: resource.identity.unwrap_or(FileIdentity {
            device: 0,
            inode: 0,
        }),
        mode: resource.mode,
        autocreate: resource.autocreate,
        created: resource.created,
        kind: resource.kind,
    });
    let again = first.into_iter().flat_map(move |(owner, times)| {
        (1..*times).map(move |_| Event::Joined {
            owner: owner.into(),
            lockspace,
            name,
        })
    });
    let joined = holders.flat_map(move |(owner, times)| {
        (0..*times).map(move |_| Event::Joined {
            owner: owner.into(),
            lockspace,
            name,
        })
    });
    let parked = resource.parked.iter().map(move |descriptor| Event::Parked {
        lockspace,
        name,
        descriptor: *descriptor,
    });
    granted.into_iter().chain(again).chain(joined).chain(parked)
}
