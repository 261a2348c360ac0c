//! What the ledger is made of: every change of lasting state has an event. The encoding is the
//! ledger's business; the order of the variants and of their fields is part of the format.

use serde::{Deserialize, Serialize, Serializer};

use super::clients::{Arrival, Traffic};
use super::descriptor::Number;
use super::fences::{Fence, Watched};
use super::servers::{Listening, Server, Service};
use super::settings::{LogSettings, Settings};
use crate::host::file::FileIdentity;
use crate::host::process::Life;
use crate::locks::lease::LockKind;
use crate::locks::table::{Mode, Owner, Pid};

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

/// How a resource's file is locked, inside an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KindRecord {
    /// By an open-file-description lock.
    OpenFile,
    /// By a POSIX lock of this process.
    Process,
    /// Nobody has asked the kernel yet.
    Unknown,
}

impl<D> From<&LockKind<D>> for KindRecord {
    fn from(kind: &LockKind<D>) -> Self {
        match kind {
            LockKind::OpenFile => KindRecord::OpenFile,
            LockKind::Process { .. } => KindRecord::Process,
            LockKind::Unknown => KindRecord::Unknown,
        }
    }
}

impl<D> From<KindRecord> for LockKind<D> {
    fn from(kind: KindRecord) -> Self {
        match kind {
            KindRecord::OpenFile => LockKind::OpenFile,
            KindRecord::Process => LockKind::Process { parked: Vec::new() },
            KindRecord::Unknown => LockKind::Unknown,
        }
    }
}

/// A lockspace and a name in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceName<'a> {
    /// The lockspace's directory; empty for the default one.
    #[serde(serialize_with = "as_bytes")]
    pub lockspace: &'a [u8],
    /// The name in it.
    #[serde(serialize_with = "as_bytes")]
    pub name: &'a [u8],
}

/// A change of lasting state. The order of the variants is part of the format: new ones go to the
/// end, none is ever removed. What is rare and large is boxed, so that the others are short to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event<'a> {
    /// A client connected.
    Connected(Number, Arrival),
    /// A client made its first call, or was let in after all.
    Called(Number),
    /// A client said who the owner is.
    Registered(Number, #[serde(borrow)] OwnerRecord<'a>),
    /// A client gave up its right to call.
    Restricted(Number),
    /// A client is gone.
    Gone(Number),
    /// A lockspace was made or opened, with this directory.
    Lockspace(#[serde(serialize_with = "as_bytes")] &'a [u8]),
    /// A file was locked.
    Granted {
        /// For whom.
        #[serde(borrow)]
        owner: OwnerRecord<'a>,
        /// As what.
        #[serde(borrow)]
        resource: ResourceName<'a>,
        /// The file's descriptor.
        descriptor: Number,
        /// The file.
        identity: FileIdentity,
        /// Alone or with others.
        mode: Mode,
        /// Whether it is removed at the end.
        autocreate: bool,
        /// Whether the daemon made it.
        created: bool,
        /// How it is locked.
        kind: KindRecord,
        /// When, milliseconds since the epoch; 0 if nobody knows. (Up to format 4 it was not said.)
        since: u64,
    },
    /// One more holding of a shared resource.
    Joined(
        #[serde(borrow)] OwnerRecord<'a>,
        #[serde(borrow)] ResourceName<'a>,
    ),
    /// One holding of whichever owner with this process ended (formats 1 and 2).
    Released(Pid, #[serde(borrow)] ResourceName<'a>),
    /// All holdings of a process ended, and its files are closed (formats 1 and 2).
    OwnerEnded(Pid),
    /// A descriptor of a resource's file must stay open.
    Parked(#[serde(borrow)] ResourceName<'a>, Number),
    /// An owner is being fenced, or the fencing took its next step.
    Fencing(Fence<Number>),
    /// An owner need not be fenced any more.
    Fenced(Pid),
    /// A server's numbers.
    Server(Service, Server),
    /// A listening socket.
    Listening(Listening<Number>),
    /// Bytes of a client that were on their way.
    Traffic(Number, Box<Traffic>),
    /// The process's own things.
    Process(Box<Settings>),
    /// The log settings.
    Logging(Box<LogSettings>),
    /// The idle timeout, seconds.
    IdleTimeout(u32),
    /// The poll of an image that called its connections by places (format 2): nobody goes on with it.
    OldPoll(Number, Vec<(i32, u32)>),
    /// One holding of a domain of this process ended: its own, or one of which only the process is
    /// known. (Up to format 2 it was [`Released`](Event::Released), which does not say of which domain.)
    ReleasedBy(Pid, [u8; 16], #[serde(borrow)] ResourceName<'a>),
    /// An owner has no connection of its own: it is watched, or cannot be.
    Watched(Watched<Number>),
    /// An owner is not watched any more.
    Unwatched(Pid),
    /// A process is dead: nobody holds any more what it held. Its files are locked until [`Freed`].
    ///
    /// [`Freed`]: Event::Freed
    Died(Pid),
    /// The kernel has let go of a file that a dead owner left.
    Freed(Number),
    /// A client's connection is over, and what follows from that is still to be done.
    Leaving(Number),
    /// An owner is to be fenced and its process cannot be reached.
    Unreachable(Pid),
    /// An owner that could not be reached holds nothing any more, or can be.
    Reachable(Pid),
    /// The poll, which calls every connection by its descriptor.
    Poll(Number),
    /// Nobody is let in any more: the daemon ends.
    Deaf,
    /// Where the numbers of processes mean what they do.
    Here(Here),
    /// The process that made a client's connection, and stands for its owner, to be known again.
    ClientIs(Number, Life),
    /// The same of an owner that is watched or being fenced.
    OwnerIs(Pid, Life),
    /// When a client that stands for its owner registered, milliseconds since the epoch.
    RegisteredAt(Number, u64),
    /// A client is to be told when something of these kinds happens.
    Subscribed(Number, u32),
}

/// Where the numbers of processes mean what they do: what is not known is not compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Here {
    /// The boot of the host.
    pub boot: Option<[u8; 16]>,
    /// The pid namespace.
    pub namespace: Option<u64>,
}
