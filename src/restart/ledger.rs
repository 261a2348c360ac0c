//! The ledger: every change of lasting state, as one small event in a memory file.
//!
//! An event is appended before the reply that depends on it goes out, so at any moment the file
//! says all that a new image of the process must know; replaying it gives the [`State`]. When it
//! has grown to a multiple of the live state it is written anew. This module is the only one that
//! knows the encoding (bincode through serde); the fixtures under `tests/ledgers/` must load for
//! ever.
//!
//! Layout, integers little-endian:
//!
//! ```text
//! 0   8 bytes  "VLKLEDGR"
//! 8   u32      format version
//! 12  u32      0 while events are appended, 1 when it was closed for a handover
//! 16  u64      bytes of events
//! 24  u64      checksum of the events, when closed
//! 32  ..       events
//! ```

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;

use foldhash::HashMap;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use slab::Slab;

use super::state::{
    ClientState, FenceState, ListenerState, LockKindState, LogState, ProcessState, ResourceState,
    ServerState, Service, State, Traffic,
};
use crate::host::file::FileIdentity;
use crate::host::memory::{self, Memory};
use crate::host::stream::Peer;
use crate::locks::table::{Mode, Owner, Pid};

/// The version of the format that this program writes. It reads this one and all before.
pub const VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"VLKLEDGR";
const HEADER: usize = 32;
/// The file grows by this much at a time, bytes.
const STEP: usize = 64 * 1024;
/// It is written anew when it has grown to this multiple of its size when it was last.
const GROWTH: usize = 4;

/// An owner inside an event: borrowed, so that nothing is copied on the way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord<'a> {
    /// The process.
    pub pid: Pid,
    /// The domain's id.
    pub id: u32,
    /// The domain's name.
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
    fn to_owner(self) -> Owner {
        Owner {
            pid: self.pid,
            id: self.id,
            name: self.name.into(),
            uuid: self.uuid,
        }
    }
}

/// A change of lasting state. The order of the variants is part of the format: new ones go to the
/// end, none is ever removed.
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
        directory: &'a [u8],
    },
    /// A file was locked.
    Granted {
        /// For whom.
        #[serde(borrow)]
        owner: OwnerRecord<'a>,
        /// The lockspace's directory.
        lockspace: &'a [u8],
        /// The name in it.
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
        lockspace: &'a [u8],
        /// The name in it.
        name: &'a [u8],
    },
    /// One holding ended.
    Released {
        /// Whose.
        pid: Pid,
        /// The lockspace's directory.
        lockspace: &'a [u8],
        /// The name in it.
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
        lockspace: &'a [u8],
        /// The name in it.
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
        traffic: Traffic,
    },
    /// The process's own things.
    Process(ProcessState),
    /// The log settings.
    Logging(LogState),
    /// The idle timeout, seconds.
    IdleTimeout(u32),
}

/// Why a ledger cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// It is no ledger.
    NotALedger,
    /// It was written by a later program.
    Version(u32),
    /// It is shorter than it says, or its content is not what was written.
    Damaged(String),
    /// The kernel did not give it to us.
    System(Errno),
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unreadable::NotALedger => write!(formatter, "it is not a ledger of this program"),
            Unreadable::Version(version) => write!(
                formatter,
                "its format {version} is newer than {VERSION}, the last that this program knows"
            ),
            Unreadable::Damaged(how) => write!(formatter, "it is damaged: {how}"),
            Unreadable::System(errno) => {
                write!(
                    formatter,
                    "it cannot be read: {}",
                    crate::host::errno::text(*errno)
                )
            }
        }
    }
}

/// The limit of one event when it is read, bytes: bincode takes a length's word for it and asks for
/// as much memory. The longest event holds what a client sent and what it has not read, of which
/// the server keeps less than half as much.
const LONGEST_EVENT: usize = 128 * 1024 * 1024;

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LONGEST_EVENT>()
}

/// The ledger of a running daemon.
#[derive(Debug)]
pub struct Ledger {
    memory: Memory,
    used: usize,
    /// Bytes of events when it was last written anew.
    compact: usize,
    /// An event that could not be refused is missing: nothing is true until it is written anew.
    is_stale: bool,
}

impl Ledger {
    /// A ledger without events.
    pub fn new() -> Result<Ledger, Errno> {
        let size = NonZeroUsize::new(STEP).unwrap_or(NonZeroUsize::MIN);
        let mut ledger = Ledger {
            memory: Memory::new(size)?,
            used: HEADER,
            compact: 0,
            is_stale: false,
        };
        ledger.write_header(0, 0);
        Ok(ledger)
    }

    /// A ledger that says this state and nothing else.
    pub fn of(state: &State) -> Result<Ledger, Errno> {
        let mut ledger = Ledger::new()?;
        for event in events(state) {
            ledger.append(&event)?;
        }
        ledger.compact = ledger.used;
        Ok(ledger)
    }

    /// Goes on writing the ledger that an earlier image of the process closed, after it was read.
    pub fn resume(descriptor: OwnedFd) -> Result<Ledger, Errno> {
        let memory = Memory::adopt(descriptor)?;
        let length = memory
            .bytes()
            .get(16..)
            .and_then(|rest| rest.first_chunk::<8>());
        let length = length.map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let used = usize::try_from(length).unwrap_or(0).saturating_add(HEADER);
        let mut ledger = Ledger {
            memory,
            used,
            compact: used,
            is_stale: false,
        };
        ledger.write_header(0, 0);
        Ok(ledger)
    }

    /// Appends an event. If that fails nothing was appended, and what the event says must not
    /// happen.
    pub fn append(&mut self, event: &Event<'_>) -> Result<(), Errno> {
        if self.is_stale {
            return Err(Errno::ENOMEM);
        }
        loop {
            let rest = self
                .memory
                .bytes_mut()
                .get_mut(self.used..)
                .unwrap_or_default();
            match bincode::serde::encode_into_slice(event, rest, configuration()) {
                Ok(written) => {
                    self.used = self.used.saturating_add(written);
                    self.write_length();
                    return Ok(());
                }
                Err(bincode::error::EncodeError::UnexpectedEnd) => self.grow()?,
                Err(_) => return Err(Errno::EINVAL),
            }
        }
    }

    /// Appends an event that says what has happened already. If that fails, the ledger is to be
    /// written anew before anything more is granted.
    pub fn note(&mut self, event: &Event<'_>) {
        if self.append(event).is_err() {
            self.is_stale = true;
        }
    }

    /// It lacks something that could not be written.
    pub fn lose(&mut self) {
        self.is_stale = true;
    }

    /// Whether it should be written anew.
    pub fn wants_compaction(&self) -> bool {
        self.is_stale || self.used > self.compact.saturating_mul(GROWTH).max(STEP)
    }

    /// Whether an event is missing.
    pub fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// Puts off the next compaction after one that failed: until the ledger has grown as much again.
    pub fn put_off_compaction(&mut self) {
        self.compact = self.used;
    }

    fn grow(&mut self) -> Result<(), Errno> {
        let size = self.memory.bytes().len();
        // Large ledgers grow in larger steps, so that writing one anew does not crawl.
        let step = (size / 4).next_multiple_of(STEP).max(STEP);
        let size = size
            .checked_add(step)
            .and_then(NonZeroUsize::new)
            .ok_or(Errno::EFBIG)?;
        self.memory.grow(size)
    }

    fn write_header(&mut self, closed: u32, checksum: u64) {
        let length = u64::try_from(self.used.saturating_sub(HEADER)).unwrap_or(u64::MAX);
        let header = [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &closed.to_le_bytes(),
            &length.to_le_bytes(),
            &checksum.to_le_bytes(),
        ]
        .concat();
        if let Some(place) = self.memory.bytes_mut().get_mut(..HEADER) {
            place.copy_from_slice(&header);
        }
    }

    fn write_length(&mut self) {
        let length = u64::try_from(self.used.saturating_sub(HEADER)).unwrap_or(u64::MAX);
        if let Some(place) = self.memory.bytes_mut().get_mut(16..24) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    /// Closes it for a handover: from now on a change of any byte is noticed.
    pub fn close(&mut self) {
        let events = self
            .memory
            .bytes()
            .get(HEADER..self.used)
            .unwrap_or_default();
        let checksum = checksum(events);
        self.write_header(1, checksum);
    }

    /// The memory file.
    pub fn descriptor(&self) -> &OwnedFd {
        self.memory.descriptor()
    }

    /// The header and events, as they would be read.
    pub fn content(&self) -> &[u8] {
        self.memory.bytes().get(..self.used).unwrap_or_default()
    }
}

/// FNV-1a over words of eight bytes: notices what is cut off or mixed up, and is quick.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |word: u64| sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().for_each(|word| mix(u64::from_le_bytes(*word)));
    rest.iter().for_each(|byte| mix(u64::from(*byte)));
    sum
}

/// Reads the ledger in a memory file.
pub fn load(descriptor: &OwnedFd) -> Result<State, Unreadable> {
    replay(&memory::read(descriptor).map_err(Unreadable::System)?)
}

/// Reads a ledger from its bytes.
pub fn replay(content: &[u8]) -> Result<State, Unreadable> {
    let (header, rest) = content
        .split_at_checked(HEADER)
        .ok_or(Unreadable::NotALedger)?;
    let word = |at: usize| -> u64 {
        let bytes = header.get(at..).and_then(|rest| rest.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    if !header.starts_with(MAGIC) {
        return Err(Unreadable::NotALedger);
    }
    let version = (word(8) & 0xffff_ffff) as u32;
    if version == 0 || version > VERSION {
        return Err(Unreadable::Version(version));
    }
    let length = usize::try_from(word(16)).unwrap_or(usize::MAX);
    let mut events = rest
        .get(..length)
        .ok_or_else(|| Unreadable::Damaged("it is cut short".into()))?;
    let is_closed = word(8) >> 32 != 0;
    if is_closed && checksum(events) != word(24) {
        return Err(Unreadable::Damaged("its checksum does not fit".into()));
    }
    let mut replay = Replay::default();
    while !events.is_empty() {
        let (event, used) = bincode::serde::borrow_decode_from_slice(events, configuration())
            .map_err(|error| Unreadable::Damaged(format!("an event does not decode: {error}")))?;
        replay.apply(event).map_err(Unreadable::Damaged)?;
        events = events.get(used.max(1)..).unwrap_or_default();
    }
    Ok(replay.finish())
}

/// A state under replay, with the look-ups that a long ledger needs.
#[derive(Default)]
struct Replay {
    state: State,
    clients: HashMap<i32, ClientState>,
    resources: Slab<ResourceState>,
    /// Places of the resources by lockspace, zero byte, name.
    by_name: HashMap<Box<[u8]>, usize>,
    /// Places of the resources that a process holds.
    held: HashMap<Pid, Vec<usize>>,
    fences: HashMap<Pid, FenceState>,
    /// What each process last said of itself. The table keeps nothing else.
    owners: HashMap<Pid, Owner>,
}

impl Replay {
    fn apply(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Connected {
                descriptor,
                server,
                id,
                peer,
                start_time,
                connected_at,
                refused,
            } => {
                let next = id.checked_add(1).ok_or("a client's number is too great")?;
                let numbers = self.state.server_mut(server);
                numbers.next_id = numbers.next_id.max(next);
                let client = ClientState {
                    descriptor,
                    server,
                    id,
                    peer,
                    start_time,
                    connected_at,
                    has_called: false,
                    refused,
                    owner: None,
                    restricted: false,
                    traffic: Traffic::default(),
                };
                if self.clients.insert(descriptor, client).is_some() {
                    return Err(format!("two clients have the descriptor {descriptor}"));
                }
            }
            Event::Called { descriptor } => {
                let client = self.client(descriptor)?;
                client.has_called = true;
                client.refused = false;
            }
            Event::Registered { descriptor, owner } => {
                self.client(descriptor)?.owner = Some(owner.to_owner());
            }
            Event::Restricted { descriptor } => self.client(descriptor)?.restricted = true,
            Event::Traffic {
                descriptor,
                traffic,
            } => self.client(descriptor)?.traffic = traffic,
            Event::Gone { descriptor } => {
                self.client(descriptor)?;
                self.clients.remove(&descriptor);
            }
            Event::Lockspace { directory } => self.state.lockspaces.push(directory.to_vec()),
            Event::Granted {
                owner,
                lockspace,
                name,
                descriptor,
                identity,
                mode,
                autocreate,
                created,
                kind,
            } => {
                let owner = self.latest(owner);
                let pid = owner.pid;
                let place = self.resources.insert(ResourceState {
                    lockspace: lockspace.to_vec(),
                    name: name.to_vec(),
                    descriptor,
                    identity: Some(identity),
                    mode,
                    autocreate,
                    created,
                    kind,
                    parked: Vec::new(),
                    holders: vec![(owner, 1)],
                });
                self.held.entry(pid).or_default().push(place);
                if self.by_name.insert(key(lockspace, name), place).is_some() {
                    return Err("a resource is granted twice".into());
                }
            }
            Event::Joined {
                owner,
                lockspace,
                name,
            } => {
                let owner = self.latest(owner);
                let place = self.place(lockspace, name)?;
                let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
                let holder = resource
                    .holders
                    .iter_mut()
                    .find(|(known, _)| known.pid == owner.pid);
                match holder {
                    Some((_, times)) => *times = times.saturating_add(1),
                    None => {
                        self.held.entry(owner.pid).or_default().push(place);
                        resource.holders.push((owner, 1));
                    }
                }
            }
            Event::Parked {
                lockspace,
                name,
                descriptor,
            } => {
                let place = self.place(lockspace, name)?;
                let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
                resource.parked.push(descriptor);
            }
            Event::Released {
                pid,
                lockspace,
                name,
            } => {
                let place = self.place(lockspace, name)?;
                if self.release(pid, place, 1)? == Left::Nothing
                    && let Some(held) = self.held.get_mut(&pid)
                {
                    held.retain(|known| *known != place);
                }
            }
            Event::OwnerEnded { pid } => {
                for place in self.held.remove(&pid).unwrap_or_default() {
                    self.release(pid, place, u32::MAX)?;
                }
            }
            Event::Fencing(fence) => {
                self.fences.insert(fence.pid, fence);
            }
            Event::Fenced { pid } => {
                self.fences.remove(&pid);
            }
            Event::Server { name, state } => *self.state.server_mut(name) = state,
            Event::Listening(listener) => self.state.listeners.push(listener),
            Event::Process(process) => self.state.process = process,
            Event::Logging(logging) => self.state.process.logging = logging,
            Event::IdleTimeout(seconds) => self.state.process.idle_timeout_s = seconds,
        }
        Ok(())
    }

    fn client(&mut self, descriptor: i32) -> Result<&mut ClientState, String> {
        self.clients
            .get_mut(&descriptor)
            .ok_or_else(|| format!("it speaks of a client {descriptor} that never connected"))
    }

    fn place(&self, lockspace: &[u8], name: &[u8]) -> Result<usize, String> {
        self.by_name
            .get(&*key(lockspace, name))
            .copied()
            .ok_or_else(|| "it speaks of a resource that nobody holds".to_owned())
    }

    /// Takes holdings away from a process, which may leave the resource without any.
    fn release(&mut self, pid: Pid, place: usize, count: u32) -> Result<Left, String> {
        let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
        let position = resource
            .holders
            .iter()
            .position(|(owner, _)| owner.pid == pid)
            .ok_or("it releases what an owner does not hold")?;
        if let Some((_, times)) = resource.holders.get_mut(position) {
            *times = times.saturating_sub(count);
            if *times > 0 {
                return Ok(Left::Something);
            }
        }
        resource.holders.swap_remove(position);
        if resource.holders.is_empty() {
            let ended = self.resources.remove(place);
            self.by_name.remove(&*key(&ended.lockspace, &ended.name));
        }
        Ok(Left::Nothing)
    }

    /// The owner of an event, whose word about itself holds for everything that it has.
    fn latest(&mut self, owner: OwnerRecord<'_>) -> Owner {
        let owner = owner.to_owner();
        self.owners.insert(owner.pid, owner.clone());
        owner
    }

    fn finish(self) -> State {
        let mut state = self.state;
        state.clients = self.clients.into_values().collect();
        state
            .clients
            .sort_by_key(|client| (client.server, client.id));
        state.resources = self
            .resources
            .into_iter()
            .map(|(_, resource)| resource)
            .collect();
        for (owner, _) in state
            .resources
            .iter_mut()
            .flat_map(|held| &mut held.holders)
        {
            if let Some(latest) = self.owners.get(&owner.pid) {
                owner.clone_from(latest);
            }
        }
        state.fences = self.fences.into_values().collect();
        state
    }
}

/// What a process has left of a resource.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Something,
    Nothing,
}

fn key(lockspace: &[u8], name: &[u8]) -> Box<[u8]> {
    [lockspace, b"\0", name].concat().into()
}

/// The fewest events that say a state.
fn events(state: &State) -> impl Iterator<Item = Event<'_>> {
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
    std::iter::once(Event::Process(state.process.clone()))
        .chain(listeners)
        .chain(state.clients.iter().flat_map(client_events))
        .chain(lockspaces)
        .chain(state.resources.iter().flat_map(resource_events))
        .chain(fences)
        // Behind the clients, whose numbers would otherwise raise the next one.
        .chain(servers)
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
        traffic: client.traffic.clone(),
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
