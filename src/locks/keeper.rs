//! The keeper of the locks: what the table decides is done to the files, and what the files say is
//! entered in the table. Nothing above this module opens, locks or removes a file.

use std::collections::BTreeSet;

use super::lease::{Acquisition, AtEnd, Lease, LockKind, NotLocked, Refused, Stranger};
use super::lockspace::{self, NotMade};
use super::place::{Place, Unreachable};
use super::table::{
    Decision, Granted, Mode, NotReleased, Owner, OwnerKey, Pid, Resource, ResourceId, Table,
};
use crate::host::errno::{self, Errno};
use crate::host::file::{self, FileIdentity, Lockable};
use crate::host::pid_file;

/// How many lockspaces there may be: libvirt makes three. They are kept for ever, and each takes the
/// memory of its path.
const MOST_LOCKSPACES: usize = 1024;

/// All lockspaces and all held resources.
#[derive(Debug, Default)]
pub struct Keeper {
    table: Table<Lease>,
    lockspaces: BTreeSet<Box<[u8]>>,
    /// The files that must not be opened and closed: those with POSIX locks, each as often as it is
    /// held, and the daemon's own from when somebody wanted it. While there are any, files are looked at
    /// before they are opened.
    avoid: Vec<FileIdentity>,
    /// The daemon's pid file, which is nobody's resource, and its descriptor. It has a POSIX lock.
    pub own_file: Option<(FileIdentity, i32)>,
    /// Descriptors were parked, of which the ledger does not know yet.
    has_parked: bool,
}

/// The leases that a dead owner left: the table does not have them any more, the kernel does.
#[derive(Debug)]
pub struct Estate(Vec<Resource<Lease>>);

impl Estate {
    /// How many are left.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether all have been ended.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What an acquire did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// A file was locked.
    Granted(ResourceId),
    /// One more holding of a shared resource.
    Joined(ResourceId),
}

/// Why a call on a resource was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such lockspace.
    NoLockspace,
    /// The resource is held.
    Held(ResourceId),
    /// The file is held as this other resource.
    HeldAs(ResourceId),
    /// The file is the daemon's own pid file.
    Own,
    /// Somebody else than this daemon has a lock on the file.
    Taken(Stranger),
    /// Again and again another file had the name before it was locked.
    Unsteady,
    /// The name leaves the lockspace's directory.
    Leaves,
    /// Files of the default lockspace are disks: they are not deleted.
    DefaultLockspace,
    /// The file could not be opened, made or removed.
    File(Errno),
    /// The file could not be locked.
    Lock(Errno),
}

impl From<Unreachable> for Refusal {
    fn from(reason: Unreachable) -> Refusal {
        match reason {
            Unreachable::Leaves => Refusal::Leaves,
            Unreachable::System(errno) => Refusal::File(errno),
        }
    }
}

impl Keeper {
    /// A keeper of nothing but the default lockspace.
    pub fn new() -> Keeper {
        Keeper::default()
    }

    /// What is held, to look at.
    pub fn table(&self) -> &Table<Lease> {
        &self.table
    }

    /// The directories of the lockspaces, the default one not among them.
    pub fn lockspaces(&self) -> impl Iterator<Item = &[u8]> {
        self.lockspaces.iter().map(|directory| &**directory)
    }

    /// Whether there is such a lockspace. The default one, with the empty path, always is.
    pub fn has_lockspace(&self, directory: &[u8]) -> bool {
        directory.is_empty() || self.lockspaces.contains(directory)
    }

    /// Makes a lockspace and, if it is missing, its directory.
    pub fn make_lockspace(&mut self, directory: &[u8]) -> Result<(), NotMade> {
        if self.lockspaces.len() >= MOST_LOCKSPACES {
            return Err(NotMade::TooMany);
        }
        lockspace::make_directory(directory)?;
        self.add_lockspace(directory);
        Ok(())
    }

    /// Enters a lockspace whose directory is known to be there.
    pub fn add_lockspace(&mut self, directory: &[u8]) {
        self.lockspaces.insert(directory.into());
    }

    /// Whether an acquire in an unknown lockspace may open it: libvirt makes its lockspaces only
    /// once, when libvirtd starts, and a daemon that started later must serve it all the same.
    pub fn can_open_lockspace(&self, directory: &[u8]) -> bool {
        self.lockspaces.len() < MOST_LOCKSPACES && lockspace::is_directory(directory)
    }

    /// Takes a resource for `owner`.
    pub fn acquire(
        &mut self,
        owner: &Owner,
        place: Place<'_>,
        mode: Mode,
        autocreate: bool,
    ) -> Result<Acquired, Refusal> {
        if !self.has_lockspace(place.lockspace) {
            return Err(Refusal::NoLockspace);
        }
        match self.table.decide(place.lockspace, place.name, mode) {
            Decision::Busy(id) => return Err(Refusal::Held(id)),
            Decision::Join(id) => {
                self.table.join(id, owner);
                return Ok(Acquired::Joined(id));
            }
            Decision::Open => (),
        }
        let acquisition = Acquisition {
            place,
            mode,
            autocreate,
            avoid: &self.avoid,
        };
        let (lease, identity) = match acquisition.run() {
            Ok(locked) => locked,
            Err(refused) => {
                self.keep_own_file(refused);
                return Err(self.refusal(refused));
            }
        };
        // Another name of a held file, which was locked because both are shared, or because they are two
        // nodes of one block device.
        if let Some(refusal) = self.held_as(identity) {
            let at_end = if lease.created {
                AtEnd::Remove(mode)
            } else {
                AtEnd::Keep
            };
            lease.end(place, identity, at_end);
            return Err(refusal);
        }
        let Place { lockspace, name } = place;
        let granted = Granted {
            lockspace,
            name,
            identity,
            mode,
            autocreate,
            lease,
        };
        Ok(Acquired::Granted(self.table.grant(owner, granted)))
    }

    /// Whoever wanted the daemon's own file made us open and close it, and with that its lock was gone.
    fn keep_own_file(&mut self, refused: NotLocked) {
        let Some((own, descriptor)) = self.own_file else {
            return;
        };
        if refused.identity != Some(own) || refused.reason == Refused::Avoided {
            return;
        }
        self.avoid.push(own);
        if let Err(errno) = pid_file::lock_again(descriptor) {
            tracing::error!(
                target: "locking.lock_daemon",
                "The lock of the pid file was lost to another process: {}. Stop that one: a second \
                 daemon must not run",
                errno::text(errno)
            );
        }
    }

    fn refusal(&self, refused: NotLocked) -> Refusal {
        let held_as = refused.identity.and_then(|identity| self.held_as(identity));
        match refused.reason {
            Refused::Taken(stranger) => held_as.unwrap_or(Refusal::Taken(stranger)),
            Refused::Avoided => held_as.unwrap_or(Refusal::Unsteady),
            Refused::Unsteady => Refusal::Unsteady,
            Refused::Leaves => Refusal::Leaves,
            Refused::Open(errno) => Refusal::File(errno),
            Refused::Lock(errno) => Refusal::Lock(errno),
        }
    }

    /// The refusal of a file that is held under another name here, or is the daemon's own.
    fn held_as(&self, identity: FileIdentity) -> Option<Refusal> {
        let is_own = || self.own_file.is_some_and(|(own, _)| own == identity);
        match self.table.find_file(identity) {
            Some(id) => Some(Refusal::HeldAs(id)),
            None => is_own().then_some(Refusal::Own),
        }
    }

    /// Gives back one holding of `owner`. When this returns, the kernel has let go of what nobody
    /// holds any more.
    pub fn release(&mut self, place: Place<'_>, owner: OwnerKey) -> Result<(), NotReleased> {
        if let Some(resource) = self.table.release(place.lockspace, place.name, owner)? {
            self.end(resource);
        }
        Ok(())
    }

    /// Gives back everything that `pid` holds. How many resources became free.
    pub fn end_owner(&mut self, pid: Pid) -> usize {
        let mut estate = self.take_owner(pid);
        let count = estate.len();
        self.end_some(&mut estate, usize::MAX);
        count
    }

    /// Takes everything that `pid` holds out of the table. The kernel has the locks that nobody
    /// shares until [`Keeper::end_some`] has ended what this returns.
    #[must_use]
    pub fn take_owner(&mut self, pid: Pid) -> Estate {
        Estate(self.table.end_owner(pid))
    }

    /// Ends so many leases of a dead owner, at most.
    pub fn end_some(&mut self, estate: &mut Estate, most: usize) {
        let rest = estate.0.len().saturating_sub(most);
        for resource in estate.0.split_off(rest) {
            self.end(resource);
        }
    }

    /// Makes room for so many resources, to adopt them quickly.
    pub fn reserve(&mut self, count: usize) {
        self.table.reserve(count);
    }

    /// Enters a resource that an earlier image of this process locked.
    pub fn adopt(&mut self, adopted: Granted<'_, Lease>, holders: &[(Owner, u32)]) {
        let Some((first, rest)) = holders.split_first() else {
            return;
        };
        if matches!(adopted.lease.kind, LockKind::Process { .. }) {
            self.avoid.push(adopted.identity);
        }
        let id = self.table.grant(&first.0, adopted);
        for (owner, times) in
            std::iter::once(&(first.0.clone(), first.1.saturating_sub(1))).chain(rest)
        {
            for _ in 0..*times {
                self.table.join(id, owner);
            }
        }
    }

    fn end(&mut self, resource: Resource<Lease>) {
        if matches!(resource.lease.kind, LockKind::Process { .. }) {
            let mut avoid = self.avoid.iter();
            if let Some(place) = avoid.position(|file| *file == resource.identity) {
                self.avoid.swap_remove(place);
            }
        }
        // The same file is held under another name with a POSIX lock, which would go with ours, and
        // with any descriptor of the file that we close.
        if let Some(theirs) = self.process_lock_on(resource.identity) {
            theirs.extend(resource.lease.park());
            self.has_parked = true;
            return;
        }
        let (at_end, identity) = (at_end(&resource), resource.identity);
        let (lease, name) = resource.into_lease();
        let place = Place {
            lockspace: name.lockspace(),
            name: name.name(),
        };
        lease.end(place, identity, at_end);
    }

    /// The parked descriptors of a held resource that is this file and has a POSIX lock.
    fn process_lock_on(&mut self, identity: FileIdentity) -> Option<&mut Vec<Lockable>> {
        if self.avoid.is_empty() {
            return None;
        }
        let is_process = |id: &ResourceId| {
            let held = self.table.get(*id);
            held.is_some_and(|held| matches!(held.lease.kind, LockKind::Process { .. }))
        };
        // What could not be asked which file it is may be any of these.
        let id = if identity.is_known() {
            self.table.same_file(identity).find(is_process)
        } else {
            let mut all = self.table.iter().map(|(id, _)| id);
            all.find(is_process)
        };
        let id = id?;
        match &mut self.table.get_mut(id)?.lease.kind {
            LockKind::Process { parked } => Some(parked),
            LockKind::OpenFile => None,
        }
    }

    /// Whether descriptors were parked since this was asked last.
    pub fn take_has_parked(&mut self) -> bool {
        std::mem::take(&mut self.has_parked)
    }

    /// Makes the file of a resource, if it is missing. A file that is there is not even opened: it
    /// might be somebody's disk, or a FIFO that would make us wait.
    pub fn create(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        self.known_and_free(place)?;
        match place.reach(file::create) {
            Ok(_) => return Ok(()),
            Err(Unreachable::System(Errno::EEXIST)) => (),
            Err(reason) => return Err(reason.into()),
        }
        match place.reach(file::look_up) {
            Ok(found) if found.is_directory => Err(Refusal::File(Errno::EISDIR)),
            Ok(_) => Ok(()),
            // A symbolic link that leads to nothing: what it leads to is made.
            Err(Unreachable::System(Errno::ENOENT)) => place
                .reach(file::open_or_create)
                .map(drop)
                .map_err(Refusal::from),
            Err(reason) => Err(reason.into()),
        }
    }

    /// Removes the file of a resource, in a directory lockspace and while nobody holds it under
    /// any name. One that is not there is fine.
    pub fn delete(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        self.known_and_free(place)?;
        if place.is_default() {
            return Err(Refusal::DefaultLockspace);
        }
        match place.reach(file::look_up) {
            Ok(found) => {
                if let Some(refusal) = self.held_as(found.identity) {
                    return Err(refusal);
                }
            }
            // A name of no file, or a link that leads out or nowhere: the name alone goes.
            Err(Unreachable::Leaves | Unreachable::System(Errno::ENOENT | Errno::ELOOP)) => (),
            Err(reason) => return Err(reason.into()),
        }
        match place.reach(file::unlink) {
            Ok(()) | Err(Unreachable::System(Errno::ENOENT)) => Ok(()),
            Err(reason) => Err(reason.into()),
        }
    }

    fn known_and_free(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        if !self.has_lockspace(place.lockspace) {
            return Err(Refusal::NoLockspace);
        }
        match self.table.find(place.lockspace, place.name) {
            Some(id) => Err(Refusal::Held(id)),
            None => Ok(()),
        }
    }
}

/// In a lockspace's directory a file that was wanted with AUTOCREATE is a lock file and nothing
/// else: it goes. In the default lockspace it may be a disk: only what the daemon made goes.
fn at_end(resource: &Resource<Lease>) -> AtEnd {
    let ours = !resource.lockspace().is_empty() || resource.lease.created;
    if resource.autocreate && ours {
        AtEnd::Remove(resource.mode)
    } else {
        AtEnd::Keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::file::{Conflict, LockType, Start};

    fn owner(pid: Pid) -> Owner {
        Owner {
            pid,
            id: 1,
            name: (*b"guest").into(),
            uuid: [0; 16],
        }
    }

    // What two exchanges with the C daemon can leave behind: it shares a file that we hold, under
    // another name, with a lock of its own kind.
    #[test]
    fn no_descriptor_of_a_file_is_closed_while_another_name_holds_it_with_a_posix_lock() {
        let path = std::env::temp_dir().join(format!("virtlockd-keeper-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        let open = || {
            use std::os::unix::ffi::OsStrExt;
            file::open_existing(Start::Anywhere, path.as_os_str().as_bytes()).unwrap()
        };
        let (mut first, mut second) = (Lockable::from(open()), Lockable::from(open()));
        let outside = open();
        let identity = file::identity(&first).unwrap();
        first.lock_process(LockType::Read).unwrap();
        second.lock(LockType::Read).unwrap();
        let mut keeper = Keeper::new();
        let process = LockKind::Process { parked: Vec::new() };
        for (name, descriptor, kind) in [
            (&b"first"[..], first, process),
            (b"second", second, LockKind::OpenFile),
        ] {
            let lease = Lease {
                descriptor,
                kind,
                created: false,
            };
            let granted = Granted {
                lockspace: b"",
                name,
                identity,
                mode: Mode::Shared,
                autocreate: false,
                lease,
            };
            keeper.adopt(granted, &[(owner(7), 1)]);
        }
        let second = Place {
            lockspace: b"",
            name: b"second",
        };
        keeper.release(second, owner(7).key()).unwrap();
        let own_pid = i32::try_from(std::process::id()).unwrap();
        let seen = file::conflict(&outside, LockType::Write).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(seen, Conflict::Process(own_pid));
        assert!(keeper.take_has_parked());
    }
}
