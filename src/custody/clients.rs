//! A client as far as it lasts: who it is, since when, what it may do. What passes (readiness, half a
//! frame, a reply that the socket does not take) is the server's.

use std::num::NonZeroU64;
use std::os::fd::RawFd;

use serde::{Deserialize, Deserializer, Serialize};

use super::descriptor::Descriptor;
use super::servers::Service;
use crate::host::process::Life;
use crate::host::stream::Peer;
use crate::locks::table::Owner;
use crate::log::Printable;

/// A client's one name, in the ledger, in the poll and everywhere in the program: the number of its
/// socket. The kernel gives a number again only when the client is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub RawFd);

/// What is known of a client when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Whose client.
    pub server: Service,
    /// Its number there, from 1.
    pub id: u64,
    /// Who called connect(); `None` if only the kernel knows yet.
    pub peer: Option<Peer>,
    /// When that process started, clock ticks since boot, on kernels that cannot name it better
    /// (SO_PEERPIDFD).
    #[serde(deserialize_with = "or_none")]
    pub start_time: Option<NonZeroU64>,
    /// When it connected, seconds since the epoch.
    pub connected_at: i64,
    /// Whether there was no room for it.
    pub refused: bool,
}

/// A zero, which an earlier program may have written, says nothing.
fn or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NonZeroU64>, D::Error> {
    Ok(Option::<u64>::deserialize(deserializer)?.and_then(NonZeroU64::new))
}

/// Where a client stands, as far as it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is served.
    Served,
    /// There is no room for it: its first call is answered with the reason, then it ends.
    Refused,
    /// It is over; what it held is being cleared away.
    Over,
}

/// A client.
#[derive(Debug)]
pub struct Client<D> {
    /// Its socket.
    pub socket: D,
    /// As it came.
    pub arrival: Arrival,
    /// Where it stands.
    pub standing: Standing,
    /// Whether it has made a call, or was let in after it had been refused.
    pub has_called: bool,
    /// Whether it asked to be allowed nothing more (lock socket); its end is still the owner's end.
    pub restricted: bool,
    /// The owner for which its calls are made, once it has registered.
    pub owner: Option<Box<Owner>>,
    /// When it did, milliseconds since the epoch, if it stands for the owner; 0 if nobody knows.
    pub registered_at: u64,
    /// Of what it is told when it happens, a bit for each kind (admin socket).
    pub wanted: u32,
    /// The process that made the connection, to be known again; found out when it stands for its owner.
    pub life: Option<Life>,
}

impl<D: Descriptor> Client<D> {
    /// A client that has just connected.
    pub fn new(socket: D, arrival: Arrival) -> Client<D> {
        let standing = if arrival.refused {
            Standing::Refused
        } else {
            Standing::Served
        };
        Client {
            socket,
            arrival,
            standing,
            has_called: false,
            restricted: false,
            owner: None,
            registered_at: 0,
            wanted: 0,
            life: None,
        }
    }

    /// Its name.
    pub fn id(&self) -> ClientId {
        ClientId(self.socket.number().0)
    }

    /// Who called connect(). A process that cannot be seen from here has the number 0.
    pub fn peer(&self) -> Peer {
        self.arrival.peer.unwrap_or(Peer {
            pid: 0,
            uid: 0,
            gid: 0,
        })
    }

    /// The owner whose own connection this is: the process that it speaks for made it itself. A peer
    /// that cannot be seen from here (pid 0) stands for nobody.
    pub fn own_owner(&self) -> Option<&Owner> {
        let owner = self.owner.as_deref()?;
        self.stands_for(owner).then_some(owner)
    }

    /// Whether the process of this owner made the connection itself.
    pub fn stands_for(&self, owner: &Owner) -> bool {
        owner.pid > 0 && owner.pid == self.peer().pid
    }

    /// Who it is, as an operator reads it.
    pub fn text(&self) -> String {
        match &self.owner {
            None => format!("a client that has not registered, pid {}", self.peer().pid),
            Some(owner) => format!("domain '{}', pid {}", Printable(&owner.name), owner.pid),
        }
    }

    /// Whether it is only waiting to be told that there is no room.
    pub fn is_refused(&self) -> bool {
        self.standing == Standing::Refused
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.standing == Standing::Over
    }
}

/// Bytes that were read and not worked on, and replies that could not be sent: what an image of the
/// process passes on to the next one.
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
