//! The door's part for locks: what the table decides becomes work on files, and what the files say
//! becomes an event. Nothing above this room opens, locks or removes a file of a resource.

use super::descriptor::{Descriptor, Number};
use super::event::{Event, ResourceName};
use super::state::Left;
use super::{Custody, Given, OwnFile};
use crate::host::clock;
use crate::host::descriptors;
use crate::host::errno::{self, Errno};
use crate::host::file::{FileIdentity, Lockable};
use crate::host::pid_file;
use crate::locks::job::{Create, Delete, End, Found};
use crate::locks::lease::{Acquisition, Lease, LockKind, NotLocked, Refused, Stranger};
use crate::locks::lockspace::{self, NotMade};
use crate::locks::place::{Place, Unreachable};
use crate::locks::table::{Decision, Mode, NotReleased, Owner, Pid, Resource, ResourceId};

/// How many lockspaces there may be: libvirt makes three. They are kept for ever, and each takes the
/// memory of its path.
const MOST_LOCKSPACES: usize = 1024;

/// What an acquire did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// A file was locked.
    Granted,
    /// One more holding of a shared resource.
    Joined,
}

/// Where the work on a file is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// In this process: it cannot hang.
    Here,
    /// In another one.
    Elsewhere,
}

/// What is to be done for an acquire.
#[derive(Debug)]
pub enum Decided<'a> {
    /// Nothing more: the owner has the resource.
    Done,
    /// This, on the file; then [`Custody::conclude`].
    Work(Acquisition<'a>),
}

/// Why a call on a resource was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The lock could not be written down. What is not would be lost in an upgrade.
    Unrecorded(Errno),
}

impl From<Unreachable> for Refusal {
    fn from(reason: Unreachable) -> Refusal {
        match reason {
            Unreachable::Leaves => Refusal::Leaves,
            Unreachable::System(errno) => Refusal::File(errno),
        }
    }
}

impl Custody {
    /// Makes a lockspace and, if it is missing, its directory. Whether that was missing.
    ///
    /// # Errors
    /// Why there is none.
    pub fn make_lockspace(&mut self, directory: &[u8]) -> Result<bool, NotMade> {
        self.may_make_lockspace()?;
        let is_new = lockspace::make_directory(directory)?;
        self.has_directory(directory);
        Ok(is_new)
    }

    /// Whether there may be one more lockspace.
    ///
    /// # Errors
    /// Why not.
    pub fn may_make_lockspace(&self) -> Result<(), NotMade> {
        if self.state.lockspaces().count() >= MOST_LOCKSPACES {
            return Err(NotMade::TooMany);
        }
        Ok(())
    }

    /// This directory is a lockspace from now on.
    pub fn has_directory(&mut self, directory: &[u8]) {
        self.record(Event::Lockspace(directory), Given::default());
    }

    /// An acquire in an unknown lockspace opens it: libvirt makes its lockspaces only once, when
    /// libvirtd starts, and a daemon that started later must serve it all the same. Whether it is opened
    /// just now.
    pub fn open_lockspace(&mut self, directory: &[u8]) -> bool {
        let may_be = self.wants_lockspace(directory) && lockspace::is_directory(directory);
        if may_be {
            self.has_directory(directory);
        }
        may_be
    }

    /// Whether a directory would become a lockspace by its first use.
    pub fn wants_lockspace(&self, directory: &[u8]) -> bool {
        !self.state.has_lockspace(directory) && self.may_make_lockspace().is_ok()
    }

    /// May an owner have a resource?
    ///
    /// # Errors
    /// Why it may not.
    pub fn decide<'a>(
        &'a mut self,
        owner: &Owner,
        place: Place<'a>,
        mode: Mode,
        autocreate: bool,
    ) -> Result<Decided<'a>, Refusal> {
        if !self.state.has_lockspace(place.lockspace) {
            return Err(Refusal::NoLockspace);
        }
        match self.state.table.decide(place.lockspace, place.name, mode) {
            Decision::Busy(id) => Err(Refusal::Held(id)),
            Decision::Join(_) => {
                let mut given = Given::of_owner(owner);
                self.commit(Event::Joined(owner.into(), name_of(place)), &mut given)
                    .map_err(Refusal::Unrecorded)?;
                Ok(Decided::Done)
            }
            Decision::Open => Ok(Decided::Work(Acquisition {
                place,
                mode,
                autocreate,
                avoid: self.state.avoid(),
            })),
        }
    }

    /// An acquisition was run: its owner has the resource, or it is undone.
    ///
    /// # Errors
    /// Why the owner does not have it.
    pub fn conclude(
        &mut self,
        owner: &Owner,
        (place, mode, autocreate): (Place<'_>, Mode, bool),
        done: Result<(Lease<Lockable>, FileIdentity), NotLocked>,
        at: At,
    ) -> Result<(), Refusal> {
        let (lease, identity) = match done {
            Ok(locked) => locked,
            Err(refused) => {
                self.keep_own_file(&refused);
                return Err(self.refusal(refused));
            }
        };
        // Another name of a held file, which was locked because both are shared, or because they are two
        // nodes of one block device.
        if let Some(refusal) = self.held_as(identity) {
            self.undo(lease, (place, identity, mode), at);
            return Err(refusal);
        }
        let event = Event::Granted {
            owner: owner.into(),
            resource: name_of(place),
            descriptor: lease.descriptor.number(),
            identity,
            mode,
            autocreate,
            created: lease.created,
            kind: (&lease.kind).into(),
            since: clock::wall_ms(),
        };
        let mut given = Given::of_owner(owner);
        let created = lease.created;
        given.file = Some(lease.descriptor);
        let errno = match (self.commit(event, &mut given), &given.file) {
            (Ok(_), None) => return Ok(()),
            // The state did not take it.
            (Ok(_), Some(_)) => Errno::EINVAL,
            (Err(errno), _) => errno,
        };
        if let Some(descriptor) = given.file {
            let lease = Lease {
                descriptor,
                kind: LockKind::OpenFile,
                created,
            };
            self.undo(lease, (place, identity, mode), at);
        }
        Err(Refusal::Unrecorded(errno))
    }

    /// Goes on with the end of a resource that a process wrote down which died then, and perhaps did.
    pub fn end_again(&mut self, resource: Resource<Lease<Number>>) {
        let number = resource.lease.descriptor;
        if self.state.descriptors().any(|known| known == number) {
            // Its file must stay open for another name of it, and that is written down, too.
            return;
        }
        let adopt = |number: Number, file| {
            let descriptor = descriptors::adopt_file(number.0, file)?;
            Some(Lockable::inherited(descriptor))
        };
        let adopted = resource.try_map(|unmapped, lease| {
            let file = unmapped.identity;
            let descriptor = adopt(lease.descriptor, file).ok_or(())?;
            let kind = match lease.kind {
                LockKind::OpenFile | LockKind::Unknown => LockKind::OpenFile,
                LockKind::Process { parked } => {
                    let parked = parked.into_iter();
                    let parked = parked.filter_map(|number| adopt(number, file)).collect();
                    LockKind::Process { parked }
                }
            };
            let lease = Lease::resumed(descriptor, kind, lease.created);
            Ok::<_, ()>((file, lease))
        });
        // Otherwise it is closed already.
        if let Ok(resource) = adopted {
            self.end(resource);
        }
    }

    /// A lock that was had is given back, and with it the file if it was made for it.
    fn undo(
        &mut self,
        lease: Lease,
        (place, identity, mode): (Place<'_>, FileIdentity, Mode),
        at: At,
    ) {
        if at == At::Elsewhere {
            return self.leave_unwanted(lease, place, identity, mode);
        }
        let removes = lease.created.then_some(mode);
        End {
            place,
            identity,
            removes,
        }
        .run(lease);
    }

    /// Takes a resource for an owner, and does the work on the file at once.
    ///
    /// # Errors
    /// Why the owner does not have it.
    pub fn acquire(
        &mut self,
        owner: &Owner,
        place: Place<'_>,
        mode: Mode,
        autocreate: bool,
    ) -> Result<Acquired, Refusal> {
        let done = match self.decide(owner, place, mode, autocreate)? {
            Decided::Done => return Ok(Acquired::Joined),
            Decided::Work(acquisition) => acquisition.run(None),
        };
        self.conclude(owner, (place, mode, autocreate), done, At::Here)?;
        Ok(Acquired::Granted)
    }

    /// Whoever wanted the daemon's own file made us open and close it, and with that its lock was gone.
    fn keep_own_file(&mut self, refused: &NotLocked) {
        let Some(OwnFile {
            identity,
            descriptor,
        }) = self.own_file
        else {
            return;
        };
        if refused.identity != Some(identity) || refused.reason == Refused::Avoided {
            return;
        }
        self.state.avoid.push(identity);
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
        let is_own = || self.own_file.is_some_and(|own| own.identity == identity);
        match self.state.table().find_file(identity) {
            Some(id) => Some(Refusal::HeldAs(id)),
            None => is_own().then_some(Refusal::Own),
        }
    }

    /// Gives back one holding of an owner. When this returns, the kernel has let go of what nobody
    /// holds any more.
    ///
    /// # Errors
    /// Why there is nothing to give back.
    pub fn release(&mut self, place: Place<'_>, owner: &Owner) -> Result<(), NotReleased> {
        let table = &mut self.state.table;
        let id = table.may_release(place.lockspace, place.name, owner.key())?;
        let event = Event::ReleasedBy(owner.pid, owner.uuid, name_of(place));
        let given = Given {
            held: Some(id),
            ..Given::default()
        };
        if let Left::Resource(resource) = self.record(event, given) {
            // The number may be another file's from here on.
            self.is_here(&resource);
            self.end(resource);
        }
        Ok(())
    }

    /// The kernel lets go of a resource that nobody holds any more.
    #[inline]
    fn end(&mut self, mut resource: Resource<Lease>) {
        if let Some(other) = self.other_name(resource.identity) {
            return self.park(resource, &other);
        }
        let end = End::of(&resource);
        end.let_go(&mut resource);
    }

    /// The name under which this file is held with a POSIX lock, if it is.
    fn other_name(&self, identity: FileIdentity) -> Option<(Vec<u8>, Vec<u8>)> {
        let held = self
            .state
            .table()
            .get(self.state.process_lock_on(identity)?)?;
        Some((held.lockspace().to_vec(), held.name().to_vec()))
    }

    /// The same file is held under another name with a POSIX lock, which would go with the resource's,
    /// and with any descriptor of the file that is closed: its descriptors are kept with the other name.
    fn park(&mut self, resource: Resource<Lease>, (lockspace, name): &(Vec<u8>, Vec<u8>)) {
        for descriptor in resource.into_lease().park() {
            let name = ResourceName { lockspace, name };
            let event = Event::Parked(name, descriptor.number());
            let given = Given {
                file: Some(descriptor),
                ..Given::default()
            };
            self.record(event, given);
        }
    }

    /// A process is dead: nobody holds any more what it held, for whichever domains. How many files are
    /// to be freed, which [`Custody::free_some`] does.
    pub fn owner_died(&mut self, pid: Pid) -> usize {
        if !self.state.table().holds(pid) {
            return 0;
        }
        let before = self.state.left_count();
        self.record(Event::Died(pid), Given::default());
        self.state.left_count().saturating_sub(before)
    }

    /// Frees so many of the files that dead owners left and nobody sees to, at most.
    pub fn free_some(&mut self, most: usize) {
        for _ in 0..most {
            let Some(resource) = self.next_left() else {
                return;
            };
            // The kernel first: as long as it has the lock, the ledger has it. Where another name of the
            // file has a POSIX lock, nothing is closed.
            let number = resource.lease.descriptor.number();
            let identity = resource.identity;
            if self.state.process_lock_on(identity).is_none()
                && let Some(resource) = self.state.left_mut(number)
            {
                let end = End::of(resource);
                end.let_go(resource);
            }
            if let Left::Resource(resource) = self.record(Event::Freed(number), Given::default())
                && let Some(other) = self.other_name(identity)
            {
                self.park(resource, &other);
            }
        }
    }

    /// Makes the file of a resource, if it is missing.
    ///
    /// # Errors
    /// Why it is not there.
    pub fn create(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        self.known_and_free(place)?;
        Ok(Create { place }.run()?)
    }

    /// Removes the file of a resource, in a directory lockspace and while nobody holds it under
    /// any name. One that is not there is fine.
    ///
    /// # Errors
    /// Why it is still there.
    pub fn delete(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        self.may_delete(place)?;
        let delete = Delete { place };
        self.may_go(delete.find()?)?;
        Ok(delete.run()?)
    }

    /// Whether the file of a resource may be removed, as far as its name says.
    ///
    /// # Errors
    /// Why not.
    pub fn may_delete(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        self.known_and_free(place)?;
        if place.is_default() {
            return Err(Refusal::DefaultLockspace);
        }
        Ok(())
    }

    /// Whether what the name leads to may go: nobody holds it under another one.
    ///
    /// # Errors
    /// Who does.
    pub fn may_go(&self, found: Found) -> Result<(), Refusal> {
        match found {
            Found::File(identity) => self.held_as(identity).map_or(Ok(()), Err),
            Found::NameAlone => Ok(()),
        }
    }

    /// Whether a resource is one that is known and that nobody holds.
    ///
    /// # Errors
    /// Why not.
    pub fn known_and_free(&mut self, place: Place<'_>) -> Result<(), Refusal> {
        if !self.state.has_lockspace(place.lockspace) {
            return Err(Refusal::NoLockspace);
        }
        match self.state.table.find(place.lockspace, place.name) {
            Some(id) => Err(Refusal::Held(id)),
            None => Ok(()),
        }
    }
}

pub(super) fn name_of(place: Place<'_>) -> ResourceName<'_> {
    ResourceName {
        lockspace: place.lockspace,
        name: place.name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::custody::event::KindRecord;
    use crate::custody::ledger::Ledger;
    use crate::custody::since::Happened;
    use crate::host::file::{self, Conflict, LockType, Start};

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
        // The other name's last holding is given back, or its owner dies; it has a lock of either kind.
        for (dies, is_posix) in [(false, false), (false, true), (true, false), (true, true)] {
            let second_owner = if dies { 8 } else { 7 };
            let path =
                std::env::temp_dir().join(format!("virtlockd-locking-{}", std::process::id()));
            std::fs::write(&path, "").unwrap();
            let open = || {
                use std::os::unix::ffi::OsStrExt;
                file::open_existing(Start::Anywhere, path.as_os_str().as_bytes()).unwrap()
            };
            let (mut first, mut second) = (Lockable::from(open()), Lockable::from(open()));
            let outside = open();
            let identity = file::identity(&first).unwrap();
            first.lock_process(LockType::Read).unwrap();
            let second_kind = if is_posix {
                second.lock_process(LockType::Read).unwrap();
                LockKind::Process { parked: Vec::new() }
            } else {
                second.lock(LockType::Read).unwrap();
                LockKind::OpenFile
            };
            let mut custody = Custody::new(Ledger::new().unwrap());
            let process = LockKind::<Lockable>::Process { parked: Vec::new() };
            for (pid, name, descriptor, kind) in [
                (7, &b"first"[..], first, process),
                (second_owner, b"second", second, second_kind),
            ] {
                let owner = owner(pid);
                let event = Event::Granted {
                    owner: (&owner).into(),
                    resource: ResourceName {
                        lockspace: b"",
                        name,
                    },
                    descriptor: descriptor.number(),
                    identity,
                    mode: Mode::Shared,
                    autocreate: false,
                    created: false,
                    kind: (&kind).into(),
                    since: 0,
                };
                let mut given = Given::of_owner(&owner);
                given.file = Some(descriptor);
                custody.record(event, given);
            }
            if dies {
                let left = custody.owner_died(second_owner);
                assert_eq!(left, 1);
                custody.free_some(left);
            } else {
                let second = Place {
                    lockspace: b"",
                    name: b"second",
                };
                custody.release(second, &owner(second_owner)).unwrap();
            }
            let own_pid = i32::try_from(std::process::id()).unwrap();
            let seen = file::conflict(&outside, LockType::Write).unwrap();
            std::fs::remove_file(&path).unwrap();
            assert_eq!(seen, Conflict::Process(own_pid));
            let (_, kept) = custody.state().table().iter().next().unwrap();
            assert_eq!(kept.lease.kind.parked().len(), 1);
            assert!(custody.is_written_down(), "what is parked has its event");
        }
    }

    #[test]
    fn a_file_whose_release_was_written_down_and_not_done_is_let_go_once_and_no_other_of_its_number()
     {
        use std::os::unix::ffi::OsStrExt;
        let path = std::env::temp_dir().join(format!("virtlockd-again-{}", std::process::id()));
        let place = Place {
            lockspace: b"",
            name: path.as_os_str().as_bytes(),
        };
        let owner = owner(7);
        let mut custody = Custody::new(Ledger::new().unwrap());
        let granted = custody.acquire(&owner, place, Mode::Exclusive, true);
        assert_eq!(granted, Ok(Acquired::Granted));
        let mark = Some(custody.mark());
        let event = Event::ReleasedBy(owner.pid, owner.uuid, name_of(place));
        custody.ledger.append(&event).unwrap();
        let ledger = || custody.ledger().unwrap().try_clone().unwrap();
        let left = |file| {
            let (_, _, since) = Ledger::take_over_since(file, mark).unwrap();
            assert_eq!(since.descriptors().count(), 1);
            let first = since.happened.into_iter().next();
            match first {
                Some(Happened::Released(_, Some(resource))) => resource,
                other => panic!("{other:?}"),
            }
        };
        let (first, second) = (left(ledger()), left(ledger()));
        let number = first.lease.descriptor;
        // Whoever died closes nothing.
        std::mem::forget(custody);
        let mut next = Custody::new(Ledger::new().unwrap());
        next.end_again(*first);
        assert!(!path.exists(), "the daemon made it");
        let taken = std::fs::File::open("/dev/null").unwrap();
        next.end_again(*second);
        let is_number = std::os::fd::AsRawFd::as_raw_fd(&taken) == number.0;
        assert!(
            taken.metadata().is_ok(),
            "its number means another file ({is_number})"
        );
    }

    #[test]
    fn all_descriptors_of_a_file_that_is_to_be_let_go_yet_are_spared_by_others() {
        let mut ledger = Ledger::new().unwrap();
        let owner = owner(7);
        let resource = ResourceName {
            lockspace: b"",
            name: b"/disk",
        };
        let granted = Event::Granted {
            owner: (&owner).into(),
            resource,
            descriptor: Number(20),
            identity: FileIdentity {
                device: 1,
                inode: 2,
            },
            mode: Mode::Exclusive,
            autocreate: false,
            created: false,
            kind: KindRecord::Process,
            since: 0,
        };
        ledger.append(&granted).unwrap();
        ledger.append(&Event::Parked(resource, Number(21))).unwrap();
        let mark = Some(ledger.mark());
        let released = Event::ReleasedBy(owner.pid, owner.uuid, resource);
        ledger.append(&released).unwrap();
        let file = ledger.descriptor().unwrap().try_clone().unwrap();
        let (_, _, since) = Ledger::take_over_since(file, mark).unwrap();
        let spared: Vec<i32> = since.descriptors().collect();
        assert_eq!(spared, [20, 21]);
    }

    #[test]
    fn what_a_dead_owner_left_is_not_opened_and_closed_before_it_is_let_go() {
        use std::os::unix::ffi::OsStrExt;
        let path = std::env::temp_dir().join(format!("virtlockd-left-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        let name = path.as_os_str().as_bytes();
        let open = || file::open_existing(Start::Anywhere, name).unwrap();
        let mut held = Lockable::from(open());
        held.lock_process(LockType::Write).unwrap();
        // Nothing of this process may close it from here on.
        let outside = open();
        let identity = file::identity(&held).unwrap();
        let mut custody = Custody::new(Ledger::new().unwrap());
        let dead = owner(7);
        let event = Event::Granted {
            owner: (&dead).into(),
            resource: ResourceName {
                lockspace: b"",
                name: b"as libvirt's daemon knew it",
            },
            descriptor: held.number(),
            identity,
            mode: Mode::Exclusive,
            autocreate: false,
            created: false,
            kind: KindRecord::Process,
            since: 0,
        };
        let mut given = Given::of_owner(&dead);
        given.file = Some(held);
        custody.record(event, given);
        assert_eq!(custody.owner_died(7), 1);
        let place = Place {
            lockspace: b"",
            name,
        };
        let ask = |custody: &mut Custody| custody.acquire(&owner(8), place, Mode::Exclusive, false);
        assert!(matches!(ask(&mut custody), Err(Refusal::Unsteady)));
        let own_pid = i32::try_from(std::process::id()).unwrap();
        let seen = file::conflict(&outside, LockType::Write).unwrap();
        assert_eq!(seen, Conflict::Process(own_pid));
        custody.free_some(1);
        let after = ask(&mut custody);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(after, Ok(Acquired::Granted)));
    }
}
