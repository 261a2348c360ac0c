//! Work on the file of a resource, as plain values: whoever runs one needs neither the table nor the
//! ledger. To open and lock a file is an [`Acquisition`](super::lease::Acquisition); here is the rest: the
//! end of a lock, and making and removing a lock file without one.

use super::lease::{Lease, LockKind};
use super::place::{Place, Unreachable};
use super::table::{Mode, Resource};
use crate::host::errno::Errno;
use crate::host::file::{self, FileIdentity, Lockable};

/// The end of a lock.
#[derive(Clone, Copy, Debug)]
pub struct End<P> {
    /// Where the file is.
    pub place: P,
    /// Which file it is.
    pub identity: FileIdentity,
    /// The file goes, too, if this was the last owner anywhere; the mode in which it was held.
    pub removes: Option<Mode>,
}

impl End<()> {
    /// The end of a resource. In a lockspace's directory a file that was wanted with AUTOCREATE is a
    /// lock file and nothing else: it goes. In the default lockspace it may be a disk: only what the
    /// daemon made goes.
    #[inline]
    pub fn of<D>(resource: &Resource<Lease<D>>) -> End<()> {
        let is_ours = !resource.lockspace().is_empty() || resource.lease.created;
        End {
            place: (),
            identity: resource.identity,
            removes: (resource.autocreate && is_ours).then_some(resource.mode),
        }
    }

    /// The kernel lets go of a resource; its file stays open.
    #[inline]
    pub fn let_go(self, resource: &mut Resource<Lease>) {
        let (lease, lockspace, name) = resource.lease_mut();
        let place = Place { lockspace, name };
        lease.let_go(place, self.identity, self.removes);
    }
}

impl End<Place<'_>> {
    /// Removes the file if that is asked for, then unlocks and closes it.
    pub fn run(self, mut lease: Lease<Lockable>) {
        lease.let_go(self.place, self.identity, self.removes);
    }

    /// The same of an open file with a lock of its own.
    pub fn run_on(self, descriptor: Lockable) {
        self.run(Lease {
            descriptor,
            kind: LockKind::OpenFile,
            created: false,
        });
    }
}

/// Making the file of a resource, if it is missing. A file that is there is not even opened: it might be
/// somebody's disk, or a FIFO that would make us wait.
#[derive(Clone, Copy, Debug)]
pub struct Create<'a> {
    /// Where it is.
    pub place: Place<'a>,
}

impl Create<'_> {
    /// Makes the file.
    ///
    /// # Errors
    /// Why it is not there. EISDIR if something else is.
    pub fn run(self) -> Result<(), Unreachable> {
        match self.place.reach(file::create) {
            Ok(_) => return Ok(()),
            Err(Unreachable::System(Errno::EEXIST)) => (),
            Err(reason) => return Err(reason),
        }
        match self.place.reach(file::look_up) {
            Ok(found) if found.is_directory => Err(Unreachable::System(Errno::EISDIR)),
            Ok(_) => Ok(()),
            // A symbolic link that leads to nothing: what it leads to is made.
            Err(Unreachable::System(Errno::ENOENT)) => {
                self.place.reach(file::open_or_create).map(drop)
            }
            Err(reason) => Err(reason),
        }
    }
}

/// Removing the file of a resource that nobody holds.
#[derive(Clone, Copy, Debug)]
pub struct Delete<'a> {
    /// Where it is.
    pub place: Place<'a>,
}

/// What a name leads to that is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Found {
    /// A file. It may be held under another name.
    File(FileIdentity),
    /// No file, or a link that leads out or nowhere: the name alone goes.
    NameAlone,
}

impl Delete<'_> {
    /// What the name leads to: to be asked before it is removed.
    ///
    /// # Errors
    /// Why that cannot be found out.
    pub fn find(self) -> Result<Found, Unreachable> {
        match self.place.reach(file::look_up) {
            Ok(found) => Ok(Found::File(found.identity)),
            Err(Unreachable::Leaves | Unreachable::System(Errno::ENOENT | Errno::ELOOP)) => {
                Ok(Found::NameAlone)
            }
            Err(reason) => Err(reason),
        }
    }

    /// Removes the name. One that is not there is fine.
    ///
    /// # Errors
    /// Why it is still there.
    pub fn run(self) -> Result<(), Unreachable> {
        match self.place.reach(file::unlink) {
            Ok(()) | Err(Unreachable::System(Errno::ENOENT)) => Ok(()),
            Err(reason) => Err(reason),
        }
    }
}
