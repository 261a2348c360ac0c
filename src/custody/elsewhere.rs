//! The door's part for files that are worked on by other processes, because whoever touches them may hang. A
//! lock that such a process lets go of is had by this one until it is back: its name stays busy, the ledger has
//! it, and whoever goes on should this process die begins with it once more.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::descriptor::{Descriptor, Number};
use super::event::Event;
use super::locking::name_of;
use super::state::Left;
use super::unwanted::Unwanted;
use super::{Custody, Given};
use crate::host::descriptors;
use crate::host::file::{FileIdentity, Lockable};
use crate::locks::job::End;
use crate::locks::lease::{Lease, LockKind};
use crate::locks::place::Place;
use crate::locks::table::{Mode, NotReleased, Owner, Resource};

impl Custody {
    /// Another process lets go of the lock on the file with this descriptor.
    pub fn goes_elsewhere(&mut self, number: RawFd) {
        self.elsewhere.insert(number);
    }

    /// Goes on elsewhere with the end of a resource that a process wrote down which died then, and perhaps did.
    pub fn end_again_elsewhere(&mut self, resource: Resource<Lease<Number>>) {
        let number = resource.lease.descriptor;
        if self.state.descriptors().any(|known| known == number) {
            return;
        }
        let Some(file) = descriptors::adopt_file(number.0, resource.identity) else {
            // It is closed already.
            return;
        };
        let end = End::of(&resource);
        self.unwanted.push(Unwanted {
            lockspace: resource.lockspace().to_vec(),
            name: resource.name().to_vec(),
            identity: end.identity,
            removes: end.removes,
            file,
        });
    }

    /// Whatever another process is about to do with its lock, the file is closed here.
    pub(super) fn is_here(&mut self, resource: &Resource<Lease>) {
        if !self.elsewhere.is_empty() {
            let number = resource.lease.descriptor.as_raw_fd();
            self.elsewhere.remove(&number);
        }
    }

    /// Whether another process is about to let go of it.
    pub fn is_elsewhere(&self, number: RawFd) -> bool {
        self.elsewhere.contains(&number)
    }

    /// Whether dead owners left files that nobody sees to yet.
    pub fn has_left(&self) -> bool {
        self.next_left().is_some()
    }

    /// The next of them.
    pub fn next_left(&self) -> Option<&Resource<Lease>> {
        let mut left = self.state.estates().iter();
        let all = left
            .by_ref()
            .flat_map(|estate| estate.resources.iter().rev());
        all.into_iter()
            .find(|it| !self.elsewhere.contains(&it.lease.descriptor.as_raw_fd()))
    }

    /// The lock on the file with this descriptor was let go of elsewhere, and nobody goes on with that: a dead owner
    /// left it, or who gave it back is gone. The file, to be closed.
    pub fn is_over(&mut self, number: RawFd) -> Option<OwnedFd> {
        if !self.is_elsewhere(number) {
            return None;
        }
        self.was_let_go(number).or_else(|| self.gives_back(number))
    }

    /// The same, where a dead owner left it.
    pub fn was_let_go(&mut self, number: RawFd) -> Option<OwnedFd> {
        self.elsewhere.remove(&number);
        if !self.is_left(number) {
            return None;
        }
        match self.record(Event::Freed(Number(number)), Given::default()) {
            Left::Resource(resource) => Some(descriptor_of(resource)),
            _ => None,
        }
    }

    /// Whether a dead owner left it.
    pub fn is_left(&self, number: RawFd) -> bool {
        let mut left = self.state.estates().iter();
        left.any(|estate| estate.resources.iter().any(|it| is_it(it, number)))
    }

    /// Whoever gave back what is open under this number is gone, and another process is about to let go of its lock:
    /// nobody holds it any more. The file, to be closed when that is done. (If its owner is dead, the estate has it.)
    pub fn gives_back(&mut self, number: RawFd) -> Option<OwnedFd> {
        self.elsewhere.remove(&number);
        let table = self.state.table();
        let (id, held) = table.iter().find(|(_, it)| is_it(it, number))?;
        let owner = table.owner(held.any_holder()?)?.clone();
        let (lockspace, name) = (held.lockspace().to_vec(), held.name().to_vec());
        let place = Place {
            lockspace: &lockspace,
            name: &name,
        };
        let event = Event::ReleasedBy(owner.pid, owner.uuid, name_of(place));
        let given = Given {
            held: Some(id),
            ..Given::default()
        };
        match self.record(event, given) {
            Left::Resource(resource) => Some(descriptor_of(resource)),
            _ => None,
        }
    }

    /// Another process is about to let go of the lock on this resource, or has done so.
    pub fn is_being_let_go(&mut self, place: Place<'_>) -> bool {
        if self.elsewhere.is_empty() {
            return false;
        }
        let found = self.state.table.find(place.lockspace, place.name);
        let held = found.and_then(|id| self.state.table().get(id));
        held.is_some_and(|it| self.is_elsewhere(it.lease.descriptor.as_raw_fd()))
    }

    /// What an owner gives back whose lock was let go of elsewhere; the file, to be closed, unless somebody else
    /// holds it yet.
    ///
    /// # Errors
    /// Why there is nothing to give back.
    pub fn release_let_go(
        &mut self,
        place: Place<'_>,
        owner: &Owner,
    ) -> Result<Option<OwnedFd>, NotReleased> {
        let table = &mut self.state.table;
        let id = table.may_release(place.lockspace, place.name, owner.key())?;
        if let Some(held) = self.state.table().get(id) {
            let number = held.lease.descriptor.as_raw_fd();
            self.elsewhere.remove(&number);
        }
        let event = Event::ReleasedBy(owner.pid, owner.uuid, name_of(place));
        let given = Given {
            held: Some(id),
            ..Given::default()
        };
        Ok(match self.record(event, given) {
            Left::Resource(resource) => Some(descriptor_of(resource)),
            _ => None,
        })
    }

    /// The lock that an owner would let go of by giving this back: nobody else holds it, and it may be let go of
    /// elsewhere.
    pub fn last_of(&mut self, place: Place<'_>, owner: &Owner) -> Option<&Resource<Lease>> {
        let table = &mut self.state.table;
        let id = table
            .may_release(place.lockspace, place.name, owner.key())
            .ok()?;
        let resource = self.state.table().get(id)?;
        let count: u32 = resource
            .holders()
            .fold(0, |sum, (_, times)| sum.saturating_add(times));
        let is_open_file = matches!(resource.lease.kind, LockKind::OpenFile);
        // A POSIX lock is this process's; and where another name has one no descriptor may be closed.
        let is_alone = self.state.process_lock_on(resource.identity).is_none();
        (count == 1 && is_open_file && is_alone).then_some(resource)
    }

    /// Locks that were had elsewhere and are not wanted.
    pub fn take_unwanted(&mut self) -> Vec<Unwanted> {
        std::mem::take(&mut self.unwanted)
    }

    /// A lock that was had elsewhere is not wanted.
    pub(super) fn leave_unwanted(
        &mut self,
        lease: Lease,
        place: Place<'_>,
        identity: FileIdentity,
        mode: Mode,
    ) {
        self.unwanted.push(Unwanted {
            lockspace: place.lockspace.to_vec(),
            name: place.name.to_vec(),
            identity,
            removes: lease.created.then_some(mode),
            file: lease.descriptor.into_descriptor(),
        });
    }
}

/// Whether a file is open under this number.
fn is_it(resource: &Resource<Lease>, number: RawFd) -> bool {
    resource.lease.descriptor.number() == Number(number)
}

/// Its lock is let go of elsewhere.
fn descriptor_of(resource: Resource<Lease>) -> OwnedFd {
    Lockable::into_descriptor(resource.into_lease().descriptor)
}
