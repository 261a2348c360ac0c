//! One kernel lock on one file: open, compare, lock, verify; and at the end unlink, unlock, close.
//!
//! New locks are open-file-description locks on byte 0, length 1. They conflict with the POSIX
//! record locks of other daemons and hosts, but belong to the open file: closing another descriptor
//! of the file does not drop them, and a second open of it conflicts also within this process.
//! Locks taken over from the C daemon may be POSIX locks and stay so, because there is no way to
//! change the kind of an exclusive lock without a moment in which nobody has it. A POSIX lock is
//! lost when *any* descriptor of its file is closed; see [`Acquisition::avoid`].
//!
//! A file that is or may be locked is a [`Lockable`]: whatever becomes of it, it is unlocked before it
//! is closed. Where a server keeps the lock of an open file until it is told to let go, two things cannot be
//! helped. A killed daemon's locks stay there: the kernel closes files and unlocks none. And libvirt's daemon,
//! which only closes, does not release what it was handed: an exclusive lock can be made one of its own kind
//! only over a moment in which it is none or shared, and then another host may have the file.

use std::mem::ManuallyDrop;
use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use super::place::{Place, Unreachable};
use super::table::Mode;
use crate::host::descriptors;
use crate::host::errno::{self, Errno};
use crate::host::file::{self, Conflict, FileIdentity, FileInformation, LockType, Lockable, Start};
use crate::host::note::Note;
use crate::host::process;
use crate::host::shared::Word;

/// What kind of lock a lease is. What stands for the descriptors is `D`.
#[derive(Debug)]
pub enum LockKind<D = Lockable> {
    /// An open-file-description lock.
    OpenFile,
    /// A POSIX record lock of this process.
    Process {
        /// Other descriptors of the same file, kept open because closing one would drop the lock.
        parked: Vec<D>,
    },
    /// One that libvirt's daemon took: the kernel has not been asked yet. No lease of a daemon that
    /// serves is of this kind.
    Unknown,
}

impl<D> LockKind<D> {
    /// The parked descriptors.
    pub fn parked(&self) -> &[D] {
        match self {
            LockKind::Process { parked } => parked,
            LockKind::OpenFile | LockKind::Unknown => &[],
        }
    }
}

/// A lock that the kernel holds for us.
#[derive(Debug)]
pub struct Lease<D = Lockable> {
    /// The locked file.
    pub descriptor: D,
    /// How it is locked.
    pub kind: LockKind<D>,
    /// Whether the daemon made the file for this lease.
    pub created: bool,
}

/// Who has the lock that stands in the way of ours, as far as the kernel says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stranger {
    /// A process of this host.
    Process(i32),
    /// Somebody on this host: the kernel does not say who has an open-file-description lock.
    ThisHost,
    /// The kernel says nothing of this host. What the lease file says, if it is one.
    Elsewhere(Option<Box<Note>>),
}

impl Stranger {
    /// Who kept us from locking the file at this place. They may be gone by now.
    pub(in crate::locks) fn of(file: &Lockable, wanted: LockType, place: Place<'_>) -> Stranger {
        match file::holder(file, wanted) {
            Ok(Conflict::Process(pid)) => Stranger::Process(pid),
            Ok(Conflict::OpenFile) => Stranger::ThisHost,
            Ok(Conflict::Elsewhere) if !place.is_default() => {
                Stranger::Elsewhere(Note::in_file_of_another_host(file).map(Box::new))
            }
            Ok(Conflict::None | Conflict::Elsewhere) | Err(_) => Stranger::Elsewhere(None),
        }
    }
}

/// Why a file could not be locked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refused {
    /// Another process or host has a lock on it.
    Taken(Stranger),
    /// Each time another file had its name before it was locked.
    Unsteady,
    /// It is one of the files that were to be avoided: it has not been opened.
    Avoided,
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

/// A refused file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotLocked {
    /// Why.
    pub reason: Refused,
    /// Which file it is, if that is known: it may be held under another name.
    pub identity: Option<FileIdentity>,
}

impl From<Refused> for NotLocked {
    fn from(reason: Refused) -> NotLocked {
        NotLocked {
            reason,
            identity: None,
        }
    }
}

/// A file to be opened and locked: decided on, not done yet. Plain data: whoever runs it needs no table.
#[derive(Clone, Copy, Debug)]
pub struct Acquisition<'a> {
    /// Which file.
    pub place: Place<'a>,
    /// Alone or with others.
    pub mode: Mode,
    /// Whether to make it if it is missing.
    pub autocreate: bool,
    /// Files that must not be opened, because closing one of them would drop a POSIX lock. While there are
    /// any, it is found out which file it is before it is opened. There are none, most often.
    pub avoid: &'a [FileIdentity],
}

/// How often a file may be replaced under our hands before we call it busy.
const ROUNDS: u32 = 32;

/// How often a file is opened anew, by its name, when a call on the open one fails in a way that the
/// name may mend: a network file system calls a file stale that was replaced elsewhere.
const STALE_ROUNDS: u32 = 4;

/// Why one round did not end with a lock.
enum Missed {
    /// It is over.
    Refused(NotLocked),
    /// The name leads to another file by now.
    Replaced,
    /// The next round may do better. If there is none, this is why.
    Stale(Refused),
}

impl From<NotLocked> for Missed {
    fn from(refused: NotLocked) -> Missed {
        Missed::Refused(refused)
    }
}

/// Notes whether the file that is open, or about to be, is one that was made for this lock.
fn note(making: Option<Word<'_>>, is_made: bool) {
    if let Some(word) = making {
        word.store(u64::from(is_made));
    }
}

/// Whether opening a file anew, by its name, may mend what failed with the open one. (Where that cannot
/// be done, it is tried once more with the same.)
fn is_mended_by_name(errno: Errno) -> bool {
    matches!(errno, Errno::ESTALE | Errno::EINTR)
}

impl Acquisition<'_> {
    /// Opens and locks the file. Whether it is held under another name is for the keeper to see, who
    /// undoes it then. That it makes the file is noted in `making` before, for whoever finds it should
    /// this process die.
    pub fn run(&self, making: Option<Word<'_>>) -> Result<(Lease, FileIdentity), NotLocked> {
        let mut made = None;
        let mut stale = 0;
        for _ in 0..ROUNDS {
            // What this round opens may be another file than the one that was made.
            note(making, false);
            match self.round(&mut made, making, stale == STALE_ROUNDS) {
                Ok(locked) => return Ok(locked),
                Err(Missed::Replaced) => (),
                Err(Missed::Stale(_)) if stale < STALE_ROUNDS => stale = stale.saturating_add(1),
                Err(Missed::Stale(reason)) => return Err(reason.into()),
                Err(Missed::Refused(refused)) => return Err(refused),
            }
        }
        Err(Refused::Unsteady.into())
    }

    /// Opens and locks the file that the name leads to now. `made` is the file that this call made, in
    /// this round or in one before, after which it could not be seen at its name. In the last round
    /// what cannot be known is done without, or undone.
    fn round(
        &self,
        made: &mut Option<FileIdentity>,
        making: Option<Word<'_>>,
        is_last: bool,
    ) -> Result<(Lease, FileIdentity), Missed> {
        let (descriptor, is_new) = self.open(making).inspect_err(|refused| {
            if let (Some(_), Refused::Open(errno)) = (*made, &refused.reason) {
                self.left_behind(*errno);
            }
        })?;
        let mut descriptor = Lockable::from(descriptor);
        let identity = match file::identity(&descriptor) {
            // Only its maker knows that a new file may be removed: that must not be forgotten.
            Err(_) if is_new => file::identity(&descriptor),
            result => result,
        };
        let (identity, unknown) = match identity {
            Ok(identity) => (identity, None),
            Err(errno) if is_mended_by_name(errno) && !is_last => {
                return Err(Missed::Stale(Refused::Open(errno)));
            }
            Err(errno) if self.needs_identity(&descriptor) => {
                if is_new {
                    self.left_behind(errno);
                }
                return Err(NotLocked::from(Refused::Open(errno)).into());
            }
            Err(errno) => (FileIdentity::unknown(&descriptor), Some(errno)),
        };
        if is_new {
            *made = Some(identity);
        }
        let created = *made == Some(identity);
        note(making, created);
        let lock_type = match self.mode {
            Mode::Exclusive => LockType::Write,
            Mode::Shared => LockType::Read,
        };
        match descriptor.lock(lock_type) {
            Ok(()) => (),
            Err(errno) if is_mended_by_name(errno) && !is_last => {
                return Err(Missed::Stale(Refused::Lock(errno)));
            }
            Err(errno) => {
                let reason = match errno {
                    Errno::EAGAIN | Errno::EACCES => {
                        Refused::Taken(Stranger::of(&descriptor, lock_type, self.place))
                    }
                    errno => Refused::Lock(errno),
                };
                if created {
                    self.unmake(&mut descriptor, identity);
                }
                return Err(Missed::Refused(NotLocked {
                    reason,
                    identity: Some(identity),
                }));
            }
        }
        if let Some(reason) = unknown {
            tracing::warn!(
                target: "locking.lockspace",
                "{} is locked, but which file it is could not be found out: {}. Another name of it is \
                 known only by the lock",
                String::from_utf8_lossy(&self.place.path()),
                errno::text(reason)
            );
        }
        // The last owner of a made file removes it: between our open and our lock it may have
        // gone, and then we hold a lock on a file that nobody else will ever find.
        if self.autocreate {
            let is_own = file::has_names_for_itself(&descriptor, identity);
            match leads_to(self.place, identity, is_own) {
                Ok(true) => (),
                Ok(false) => return Err(Missed::Replaced),
                Err(errno) => {
                    if created && is_last {
                        self.unmake(&mut descriptor, identity);
                    }
                    return Err(Missed::Stale(Refused::Open(errno)));
                }
            }
        }
        let lease = Lease {
            descriptor,
            kind: LockKind::OpenFile,
            created,
        };
        Ok((lease, identity))
    }

    /// Whether a file must not be locked without knowing which one it is. The lock on an open file
    /// excludes every other one of the same file, whatever its name; but not that of another node of
    /// the same block device, nor may a file be made, removed, or closed while it may have a POSIX lock.
    fn needs_identity(&self, descriptor: &Lockable) -> bool {
        self.autocreate || !self.avoid.is_empty() || file::is_block_device(descriptor)
    }

    /// Removes a file that was made for a lock which could not be had. Under a lock, because
    /// somebody else may have taken it meanwhile.
    fn unmake(&self, descriptor: &mut Lockable, identity: FileIdentity) {
        match descriptor.lock(LockType::Write) {
            Ok(()) => {
                let is_own = file::has_names_for_itself(&*descriptor, identity);
                remove(self.place, identity, is_own);
            }
            // It is theirs now.
            Err(Errno::EAGAIN | Errno::EACCES) => (),
            Err(errno) => self.left_behind(errno),
        }
    }

    /// A file that was made for nothing stays: without a lock on it and without knowing that it is the
    /// one at its name, it may be somebody else's by now.
    fn left_behind(&self, reason: Errno) {
        tracing::warn!(
            target: "locking.lockspace",
            "The lock file {} was made for a lock that could not be had, and stays, because nobody can \
             tell whether it is in use: {}. Remove it when no guest uses it",
            String::from_utf8_lossy(&self.place.path()),
            errno::text(reason)
        );
    }

    /// The opened file, and whether it was made.
    fn open(&self, making: Option<Word<'_>>) -> Result<(OwnedFd, bool), NotLocked> {
        if !self.avoid.is_empty() {
            return self.look_and_open(making);
        }
        self.open_at_once(making)
            .map_err(|reason| Refused::from(reason).into())
    }

    /// Makes the file.
    fn make(&self, making: Option<Word<'_>>) -> Result<OwnedFd, Unreachable> {
        note(making, true);
        let made = self.place.reach(file::create);
        made.inspect_err(|_| note(making, false))
    }

    fn open_at_once(&self, making: Option<Word<'_>>) -> Result<(OwnedFd, bool), Unreachable> {
        if !self.autocreate {
            return Ok((self.open_at_place(file::open_existing)?, false));
        }
        // A disk is there, most often; a lock file is not. It matters who made a file: in the default
        // lockspace only that is ever removed, and one that was made for nothing goes at once.
        if self.place.is_default() {
            match self.open_at_place(file::open_existing) {
                Err(Unreachable::System(Errno::ENOENT)) => (),
                result => return Ok((result?, false)),
            }
        }
        match self.make(making) {
            Ok(descriptor) => Ok((descriptor, true)),
            // Made by somebody else, or a symbolic link that leads to nothing.
            Err(Unreachable::System(Errno::EEXIST)) => {
                Ok((self.open_at_place(file::open_or_create)?, false))
            }
            Err(reason) => Err(reason),
        }
    }

    /// Opens the file at the place, for writing if that can be.
    #[inline]
    fn open_at_place(
        &self,
        open: impl Fn(Start<'_>, &[u8]) -> Result<OwnedFd, Errno>,
    ) -> Result<OwnedFd, Unreachable> {
        match self.place.reach(open) {
            Err(Unreachable::System(errno)) if self.can_do_with_reading(errno) => self
                .place
                .reach(file::open_to_read)
                .map_err(|_| Unreachable::System(errno)),
            result => result,
        }
    }

    /// Whether reading may be allowed where writing is not, and is enough: a shared disk on a medium
    /// that cannot be written.
    fn can_do_with_reading(&self, refused: Errno) -> bool {
        self.mode == Mode::Shared && matches!(refused, Errno::EROFS | Errno::EACCES | Errno::EPERM)
    }

    /// Opens a file only if it is known not to be one to be avoided.
    fn look_and_open(&self, making: Option<Word<'_>>) -> Result<(OwnedFd, bool), NotLocked> {
        for _ in 0..ROUNDS {
            let look = |start: Start<'_>, path: &[u8]| {
                let handle = file::handle(start, path)?;
                let identity = file::identity(&handle)?;
                Ok((handle, identity))
            };
            match self.place.reach(look) {
                Ok((handle, identity)) => {
                    if self.avoid.contains(&identity) {
                        return Err(NotLocked {
                            reason: Refused::Avoided,
                            identity: Some(identity),
                        });
                    }
                    let opened = match file::open_handle(&handle) {
                        Err(errno) if self.can_do_with_reading(errno) => {
                            file::read_only(&handle).map_err(|_| errno)
                        }
                        result => result,
                    };
                    return opened
                        .map(|descriptor| (descriptor, false))
                        .map_err(|errno| Refused::Open(errno).into());
                }
                Err(Unreachable::System(Errno::ENOENT)) if self.autocreate => (),
                Err(reason) => return Err(Refused::from(reason).into()),
            }
            // Missing: nobody can hold it, and what is made here is new.
            match self.make(making) {
                // Made by somebody else just now: looked at like any other.
                Err(Unreachable::System(Errno::EEXIST)) => (),
                made => return Ok((made.map_err(Refused::from)?, true)),
            }
        }
        // A symbolic link that leads to nothing.
        Err(Refused::Open(Errno::EEXIST).into())
    }
}

/// Whether a name leads to this very file. An error if that cannot be found out at the moment. `is_own` says that its
/// file system is this host's own ([`file::has_names_for_itself`]).
///
/// Asked under a lock it stays so: whoever removes a lock file has it locked alone, and looks first as well. What
/// this host's kernel saw of the name before it had the lock says nothing where other hosts have the directory.
pub(in crate::locks) fn leads_to(
    place: Place<'_>,
    identity: FileIdentity,
    is_own: bool,
) -> Result<bool, Errno> {
    match place.reach(|start, path| look_up(start, path, is_own)) {
        Ok(found) => Ok(found.identity == identity),
        Err(Unreachable::Leaves) => Ok(false),
        Err(Unreachable::System(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP)) => Ok(false),
        Err(Unreachable::System(errno)) => Err(errno),
    }
}

/// What a path leads to. Unless the file system is this host's own, what it remembers of names is not enough.
fn look_up(start: Start<'_>, path: &[u8], is_own: bool) -> Result<FileInformation, Errno> {
    if !is_own {
        file::ask_anew(start, path)?;
    }
    file::look_up(start, path)
}

/// What kind of lock an earlier image of this process, perhaps another program, left on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// An open-file-description lock.
    OpenFile,
    /// A POSIX record lock of this process, and perhaps one of the other kind.
    Process,
    /// None: somebody else has it by now.
    Lost,
}

/// Finds out what kind of lock is on an inherited file, and makes a shared POSIX lock one of our
/// own kind: both kinds can be held at once, so there is no moment without a lock. `is_alone` says
/// that no other held resource is the same file, whose POSIX lock would go too.
///
/// Where a server keeps the locks, the kernel does not say whose lock stands in the way. Then one that
/// stands in the way of the open file and not of this process is this process's own.
pub fn adopt(file: &mut Lockable, mode: Mode, is_alone: bool) -> Result<Found, Errno> {
    let found = look_at_lock(file, mode, is_alone)?;
    if found != Found::Process {
        file.leave_process_lock();
    }
    Ok(found)
}

/// Takes a POSIX lock again that an earlier image of this process had, and with it lost, on the file that is
/// open under this number.
///
/// # Errors
/// Why it is not had.
pub fn lock_again(number: RawFd, mode: Mode) -> Result<(), Errno> {
    // It stays open, and belongs to whoever adopts it for good.
    let mut file = ManuallyDrop::new(Lockable::inherited(descriptors::adopt(number)?));
    file.lock_process(match mode {
        Mode::Exclusive => LockType::Write,
        Mode::Shared => LockType::Read,
    })
}

fn look_at_lock(file: &mut Lockable, mode: Mode, is_alone: bool) -> Result<Found, Errno> {
    let own_pid = process::started().cast_signed();
    let wanted = match mode {
        Mode::Exclusive => LockType::Write,
        Mode::Shared => LockType::Read,
    };
    let in_the_way = file::conflict(&*file, LockType::Write)?;
    if in_the_way == Conflict::Process(own_pid) && !(mode == Mode::Shared && is_alone) {
        return Ok(Found::Process);
    }
    match file.lock(wanted) {
        // It was locked so already, or it is now. Shared, it may have both kinds.
        Ok(()) if mode == Mode::Exclusive || in_the_way == Conflict::None => Ok(Found::OpenFile),
        Ok(()) if is_alone => {
            file.lock_process(LockType::Unlock)?;
            Ok(Found::OpenFile)
        }
        Ok(()) => Ok(Found::Process),
        // To lock it once more changes nothing where the write lock that is in the way is ours.
        Err(Errno::EAGAIN | Errno::EACCES) => match file.lock_process(LockType::Write) {
            Ok(()) => Ok(Found::Process),
            // EBADF: it is open for reading, so there never was such a lock.
            Err(Errno::EAGAIN | Errno::EACCES | Errno::EBADF) => Ok(Found::Lost),
            Err(errno) => Err(errno),
        },
        Err(errno) => Err(errno),
    }
}

impl Lease {
    /// A lease of an earlier image of this process, whose lock is of this kind.
    pub fn resumed(mut descriptor: Lockable, kind: LockKind, created: bool) -> Lease {
        if matches!(kind, LockKind::OpenFile) {
            descriptor.leave_process_lock();
        }
        Lease {
            descriptor,
            kind,
            created,
        }
    }

    /// Removes the file if that is asked for (with the mode in which it was held) and nobody else
    /// shares it, then unlocks it.
    #[inline]
    pub fn let_go(&mut self, place: Place<'_>, identity: FileIdentity, removes: Option<Mode>) {
        if let Some(mode) = removes {
            let is_own = file::has_names_for_itself(&self.descriptor, identity);
            if self.is_last(mode, place, is_own) {
                remove(place, identity, is_own);
            }
        }
        if let Err(errno) = self.descriptor.unlock() {
            tracing::warn!(
                target: "locking.lockspace",
                "The lock on {} could not be given back before its file was closed: {}. If it stays \
                 locked, its server has to be told",
                String::from_utf8_lossy(&place.path()),
                errno::text(errno)
            );
        }
    }

    /// Gives the lock up and its descriptors away: the file has a POSIX lock under another name, and
    /// none of them must be closed while that is held.
    pub fn park(mut self) -> Vec<Lockable> {
        self.descriptor.leave_process_lock();
        // As in `end`: it stands in nobody's way for longer than it must.
        let _ = self.descriptor.unlock();
        let mut parked = match self.kind {
            LockKind::OpenFile | LockKind::Unknown => Vec::new(),
            LockKind::Process { parked } => parked,
        };
        parked.push(self.descriptor);
        parked
    }

    /// Whether nobody on another host or in another daemon shares the lock: then it can be made exclusive. An
    /// exclusive one is, on this host's own file systems; a server may have given it away, unnoticed: it is asked
    /// for once more.
    fn is_last(&mut self, mode: Mode, place: Place<'_>, is_own: bool) -> bool {
        if mode == Mode::Exclusive && is_own {
            return true;
        }
        let upgraded = match self.upgrade() {
            Err(errno) if is_mended_by_name(errno) => self.upgrade(),
            result => result,
        };
        if let (Mode::Exclusive, Err(errno)) = (mode, upgraded) {
            tracing::warn!(
                target: "locking.lockspace",
                "The lock file {} of a released lock stays, because its server does not say any more that \
                 nobody else has the lock: {}. Another host may have had it meanwhile",
                String::from_utf8_lossy(&place.path()),
                errno::text(errno)
            );
        }
        upgraded.is_ok()
    }

    /// Makes a shared lock exclusive.
    fn upgrade(&mut self) -> Result<(), Errno> {
        match &self.kind {
            LockKind::OpenFile | LockKind::Unknown => self.descriptor.lock(LockType::Write),
            LockKind::Process { .. } => {
                // A lock of the other kind, if it has both, would stand in its way.
                let _ = self.descriptor.lock(LockType::Unlock);
                self.descriptor.lock_process(LockType::Write)
            }
        }
    }
}

/// Closes a file that a process left open which died before it wrote down that it locked it. If it was making
/// the file at this place for that, and this is it, it goes, unless somebody else has taken it meanwhile.
pub fn take_back(file: OwnedFd, made_at: Option<Place<'_>>) {
    let mut file = Lockable::inherited(file);
    // If there is a POSIX lock it is another name's.
    file.leave_process_lock();
    let Some(place) = made_at else {
        return;
    };
    let Ok(identity) = file::identity(&file) else {
        return;
    };
    let is_own = file::has_names_for_itself(&file, identity);
    if leads_to(place, identity, is_own) == Ok(true) && file.lock(LockType::Write).is_ok() {
        remove(place, identity, is_own);
    }
}

/// Removes a lock file, if its name still leads to the file that was locked.
fn remove(place: Place<'_>, identity: FileIdentity, is_own: bool) {
    let result = place.reach(|start: Start<'_>, path: &[u8]| {
        if look_up(start, path, is_own)?.identity == identity {
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
