//! What a ledger says that happened behind a mark: whoever goes on for a process that died in the middle of
//! a call finds out with it what of the call was done.

use std::os::fd::RawFd;

use super::clients::ClientId;
use super::descriptor::{Descriptor, Number, Saved};
use super::event::{Event, OwnerRecord, ResourceName};
use super::state::{Left, State};
use crate::locks::lease::Lease;
use crate::locks::table::{Owner, Pid, Resource};

/// One of the events that may be what a call did.
#[derive(Debug)]
pub enum Happened {
    /// An owner was granted a resource, or one more holding of it.
    Acquired(Held),
    /// An owner's holding ended; what nobody holds any more since then, if the ledger does not say what
    /// became of it.
    Released(Held, Option<Box<Resource<Lease<Number>>>>),
    /// A client said for which owner it calls; for which it did before.
    Registered(Number, Option<Owner>),
    /// A client gave up its right to call.
    Restricted(Number),
    /// A lockspace was made or opened.
    Lockspace(Vec<u8>),
    /// A client's connection was ended.
    Leaving(Number),
    /// The daemon began to end.
    Deaf,
}

/// Who holds what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The process.
    pub pid: Pid,
    /// The domain.
    pub uuid: [u8; 16],
    /// The lockspace.
    pub lockspace: Vec<u8>,
    /// The name.
    pub name: Vec<u8>,
}

impl Held {
    fn of(pid: Pid, uuid: [u8; 16], resource: ResourceName<'_>) -> Held {
        Held {
            pid,
            uuid,
            lockspace: resource.lockspace.to_vec(),
            name: resource.name.to_vec(),
        }
    }
}

/// What happened behind a mark.
#[derive(Debug, Default)]
pub struct Since {
    /// In its order.
    pub happened: Vec<Happened>,
}

impl Since {
    /// Notes an event that is about to be applied to this state, if it is one of these.
    pub(super) fn note(&mut self, event: &Event<'_>, state: &State<Saved>) {
        let happened = match *event {
            Event::Granted {
                owner: OwnerRecord { pid, uuid, .. },
                resource,
                ..
            }
            | Event::Joined(OwnerRecord { pid, uuid, .. }, resource) => {
                Happened::Acquired(Held::of(pid, uuid, resource))
            }
            Event::ReleasedBy(pid, uuid, resource) => {
                Happened::Released(Held::of(pid, uuid, resource), None)
            }
            Event::Registered(number, _) => {
                let client = state.client(ClientId(number.0));
                Happened::Registered(number, client.and_then(|it| it.owner.as_deref().cloned()))
            }
            Event::Restricted(number) => Happened::Restricted(number),
            Event::Lockspace(directory) => Happened::Lockspace(directory.to_vec()),
            Event::Leaving(number) => Happened::Leaving(number),
            Event::Deaf => Happened::Deaf,
            _ => return,
        };
        self.happened.push(happened);
    }

    /// Notes what the event left over that was noted last.
    pub(super) fn note_left(&mut self, left: Left<Saved>) {
        if let Left::Resource(resource) = left
            && let Some(Happened::Released(_, known)) = self.happened.last_mut()
        {
            *known = Some(Box::new(resource));
        }
    }

    /// The descriptors of files that are to be let go yet: nobody else may close them.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let leases = self.happened.iter().filter_map(|happened| match happened {
            Happened::Released(_, Some(resource)) => Some(&resource.lease),
            _ => None,
        });
        leases.flat_map(|lease| {
            let parked = lease.kind.parked().iter();
            std::iter::once(&lease.descriptor)
                .chain(parked)
                .map(|descriptor| descriptor.number().0)
        })
    }
}
