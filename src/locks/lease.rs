//! One kernel lock on one file: open, compare, lock, verify; and at the end unlink, unlock, close.
//!
//! New locks are open-file-description locks on byte 0, length 1. They conflict with the POSIX
//! record locks of other daemons and hosts, but belong to the open file: closing another descriptor
//! of the file does not drop them, and a second open of it conflicts also within this process.
//! Locks taken over from the C daemon may be POSIX locks and stay so, because there is no way to
//! change the kind of an exclusive lock without a moment in which nobody has it. A POSIX lock is
//! lost when *any* descriptor of its file is closed; see [`Care`].

use std::os::fd::OwnedFd;

use super::place::{Place, Unreachable};
use super::table::Mode;
use crate::host::errno::{self, Errno};
use crate::host::file::{self, Conflict, FileIdentity, LockType, Start};
use crate::host::process;

/// What kind of lock a lease is.
#[derive(Debug)]
pub enum LockKind {
    /// An open-file-description lock.
    OpenFile,
    /// A POSIX record lock of this process.
    Process {
        /// Other descriptors of the same file, kept open because closing one would drop the lock.
        parked: Vec<OwnedFd>,
    },
}

/// A lock that the kernel holds for us.
#[derive(Debug)]
pub struct Lease {
    /// The locked file.
    pub descriptor: OwnedFd,
    /// How it is locked.
    pub kind: LockKind,
    /// Whether the daemon made the file for this lease.
    pub created: bool,
}

/// How to open files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// Opening and closing a file that is held harms nothing.
    None,
    /// Some held files have POSIX locks: find out which file it is before opening it.
    LookFirst,
}

/// Why a file could not be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Another process or host has a lock on it.
    Busy,
    /// It is a file that the table knows to be held.
    Held(FileIdentity),
    /// Its name leaves the lockspace.
    Leaves,
    /// It could not be opened.
    Open(Errno),
    /// It was opened and could not be locked.
    Lock(Errno),
}

impl From<Unreachable> for Refused {
    fn from(reason: Unreachable) -> Refused {
        match reason {
            Unreachable::Leaves => Refused::Leaves,
            Unreachable::System(errno) => Refused::Open(errno),
        }
    }
}

/// A file to be opened and locked: decided on, not done yet.
#[derive(Clone, Copy, Debug)]
pub struct Acquisition<'a> {
    /// Which file.
    pub place: Place<'a>,
    /// Alone or with others.
    pub mode: Mode,
    /// Whether to make it if it is missing.
    pub autocreate: bool,
    /// How to open it.
    pub care: Care,
}

/// How often a file may be replaced under our hands before we call it busy.
const ROUNDS: u32 = 32;

impl Acquisition<'_> {
    /// Opens and locks the file. `held` says of a file whether it is held under some name.
    pub fn run(
        &self,
        held: impl Fn(FileIdentity) -> bool,
    ) -> Result<(Lease, FileIdentity), Refused> {
        let lock_type = match self.mode {
            Mode::Exclusive => LockType::Write,
            Mode::Shared => LockType::Read,
        };
        let mut made = None;
        for round in 1..=ROUNDS {
            let (descriptor, created) = self.open(&held)?;
            let identity = match file::identity(&descriptor) {
                Ok(identity) => identity,
                Err(errno) if created => {
                    self.unmake(&descriptor);
                    return Err(Refused::Open(errno));
                }
                Err(errno) => return Err(Refused::Open(errno)),
            };
            if created {
                made = Some(identity);
            }
            if held(identity) {
                return Err(Refused::Held(identity));
            }
            // In this round or in one before, after which it could not be seen at its name.
            let created = made == Some(identity);
            if let Err(errno) = file::lock_open_file(&descriptor, lock_type) {
                if created {
                    self.unmake(&descriptor);
                }
                return Err(match errno {
                    Errno::EAGAIN | Errno::EACCES => Refused::Busy,
                    errno => Refused::Lock(errno),
                });
            }
            let lease = Lease {
                descriptor,
                kind: LockKind::OpenFile,
                created,
            };
            // The last owner of a made file removes it: between our open and our lock it may have
            // gone, and then we hold a lock on a file that nobody else will ever find.
            if !self.autocreate {
                return Ok((lease, identity));
            }
            match leads_to(self.place, identity) {
                Ok(true) => return Ok((lease, identity)),
                Err(errno) if round == ROUNDS => {
                    if created {
                        self.unmake(&lease.descriptor);
                    }
                    return Err(Refused::Open(errno));
                }
                Ok(false) | Err(_) => (),
            }
        }
        Err(Refused::Busy)
    }

    /// Removes a file that was made for a lock which could not be had. Under a lock, because
    /// somebody else may have taken it meanwhile.
    fn unmake(&self, descriptor: &OwnedFd) {
        if let Ok(identity) = file::identity(descriptor)
            && file::lock_open_file(descriptor, LockType::Write).is_ok()
        {
            remove(self.place, identity);
        }
    }

    fn open(&self, held: impl Fn(FileIdentity) -> bool) -> Result<(OwnedFd, bool), Refused> {
        if self.care == Care::LookFirst {
            return self.look_and_open(held);
        }
        if !self.autocreate {
            return Ok((self.place.reach(file::open_existing)?, false));
        }
        // A disk is there, most often; a lock file is not. It matters who made a file: in the default
        // lockspace only that is ever removed, and one that was made for nothing goes at once.
        if self.place.is_default() {
            match self.place.reach(file::open_existing) {
                Err(Unreachable::System(Errno::ENOENT)) => (),
                result => return Ok((result?, false)),
            }
        }
        match self.place.reach(file::create) {
            Ok(descriptor) => Ok((descriptor, true)),
            // Made by somebody else, or a symbolic link that leads to nothing.
            Err(Unreachable::System(Errno::EEXIST)) => {
                Ok((self.place.reach(file::open_or_create)?, false))
            }
            Err(reason) => Err(reason.into()),
        }
    }

    /// Opens a file only if it is known not to be held.
    fn look_and_open(
        &self,
        held: impl Fn(FileIdentity) -> bool,
    ) -> Result<(OwnedFd, bool), Refused> {
        for _ in 0..ROUNDS {
            match self.place.reach(file::handle) {
                Ok(handle) => {
                    let identity = file::identity(&handle).map_err(Refused::Open)?;
                    if held(identity) {
                        return Err(Refused::Held(identity));
                    }
                    return file::open_handle(&handle)
                        .map(|descriptor| (descriptor, false))
                        .map_err(Refused::Open);
                }
                Err(Unreachable::System(Errno::ENOENT)) if self.autocreate => (),
                Err(reason) => return Err(reason.into()),
            }
            // Missing: nobody can hold it, and what is made here is new.
            match self.place.reach(file::create) {
                // Made by somebody else just now: looked at like any other.
                Err(Unreachable::System(Errno::EEXIST)) => (),
                made => return Ok((made?, true)),
            }
        }
        // A symbolic link that leads to nothing.
        Err(Refused::Open(Errno::EEXIST))
    }
}

/// Whether a name leads to this very file. An error if that cannot be found out at the moment.
fn leads_to(place: Place<'_>, identity: FileIdentity) -> Result<bool, Errno> {
    match place.reach(file::look_up) {
        Ok(found) => Ok(found.identity == identity),
        Err(Unreachable::System(errno)) if errno::may_pass(errno) => Err(errno),
        Err(_) => Ok(false),
    }
}

/// What kind of lock an earlier image of this process, perhaps another program, left on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// An open-file-description lock.
    OpenFile,
    /// A POSIX record lock of this process.
    Process,
    /// None: somebody else has it by now.
    Lost,
}

/// Finds out what kind of lock is on an inherited file, and makes a shared POSIX lock one of our
/// own kind: both kinds can be held at once, so there is no moment without a lock. `is_alone` says
/// that no other held resource is the same file, whose POSIX lock would go too.
pub fn adopt(descriptor: &OwnedFd, mode: Mode, is_alone: bool) -> Result<Found, Errno> {
    let own_pid = process::started().cast_signed();
    let wanted = match mode {
        Mode::Exclusive => LockType::Write,
        Mode::Shared => LockType::Read,
    };
    let in_the_way = file::conflict(descriptor, LockType::Write)?;
    if in_the_way == Conflict::Process(own_pid) && !(mode == Mode::Shared && is_alone) {
        return Ok(Found::Process);
    }
    match file::lock_open_file(descriptor, wanted) {
        // Either it was locked so already, or it is now.
        Ok(()) => {
            if mode == Mode::Shared && is_alone {
                file::lock_process(descriptor, LockType::Unlock)?;
            }
            Ok(Found::OpenFile)
        }
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(Found::Lost),
        Err(errno) => Err(errno),
    }
}

/// What becomes of the file when its lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtEnd {
    /// It stays: a disk, or a file that was there before.
    Keep,
    /// It goes, if this was the last owner anywhere.
    Remove(Mode),
}

impl Lease {
    /// Removes the file if that is asked for, then unlocks and closes it: FUSE file systems do not
    /// reliably unlock on close alone.
    pub fn end(self, place: Place<'_>, identity: FileIdentity, at_end: AtEnd) {
        if let AtEnd::Remove(mode) = at_end
            && self.is_last(mode)
        {
            remove(place, identity);
        }
        // Nothing can be done about a failure here, and closing unlocks all the same.
        let _ = match self.kind {
            LockKind::OpenFile => file::lock_open_file(&self.descriptor, LockType::Unlock),
            LockKind::Process { .. } => file::lock_process(&self.descriptor, LockType::Unlock),
        };
    }

    /// Gives the lock up and its descriptors away: the file has a POSIX lock under another name, and
    /// none of them must be closed while that is held.
    pub fn park(self) -> Vec<OwnedFd> {
        match self.kind {
            LockKind::OpenFile => {
                // As in `end`: it stands in nobody's way for longer than it must.
                let _ = file::lock_open_file(&self.descriptor, LockType::Unlock);
                vec![self.descriptor]
            }
            LockKind::Process { mut parked } => {
                parked.push(self.descriptor);
                parked
            }
        }
    }

    /// Whether nobody on another host or in another daemon shares the lock: then it can be made
    /// exclusive.
    fn is_last(&self, mode: Mode) -> bool {
        let upgraded = match (mode, &self.kind) {
            (Mode::Exclusive, _) => return true,
            (Mode::Shared, LockKind::OpenFile) => {
                file::lock_open_file(&self.descriptor, LockType::Write)
            }
            (Mode::Shared, LockKind::Process { .. }) => {
                file::lock_process(&self.descriptor, LockType::Write)
            }
        };
        upgraded.is_ok()
    }
}

/// Removes a lock file, if its name still leads to the file that was locked.
fn remove(place: Place<'_>, identity: FileIdentity) {
    let result = place.reach(|start: Start<'_>, path: &[u8]| {
        if file::look_up(start, path)?.identity == identity {
            file::unlink(start, path)?;
        }
        Ok(())
    });
    match result {
        Ok(()) | Err(Unreachable::System(Errno::ENOENT)) => (),
        Err(reason) => tracing::warn!(
            target: "locking.lockspace",
            "The lock file {} of a released lock could not be removed: {reason:?}",
            String::from_utf8_lossy(&place.path())
        ),
    }
}
