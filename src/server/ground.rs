//! What locks stand on, as far as an operator has to know of it: a mount on which they keep nobody on another host
//! away, or keep others from writing; a lockspace's directory that was missing, or that is another one than it was.
//! Each is said once, when it is met with first. Nothing here asks a share.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;

use crate::custody::descriptor::Open;
use crate::custody::state::State;
use crate::host::fdinfo;
use crate::host::file::FileIdentity;
use crate::host::mount_table::Mounts;
use crate::host::mounts::{Flaw, Locks, Mount, MountId};
use crate::host::whereabouts::{self, Whereabouts};
use crate::locks::place::Place;
use crate::log::Printable;

/// What was said, and seen.
#[derive(Debug, Default)]
pub struct Ground {
    /// Mounts of which nothing is left to be said: their numbers and devices.
    done_with: BTreeSet<(MountId, u64)>,
    /// The directories of lockspaces.
    directories: BTreeMap<Box<[u8]>, Directory>,
}

/// The directory of a lockspace, as it was seen last.
#[derive(Clone, Copy, Debug)]
struct Directory {
    identity: FileIdentity,
    /// What was mounted then.
    mounts: u64,
    is_on_share: bool,
    /// The device of the files in it, which an overlay has others for.
    device_of_files: u64,
}

/// What is wrong, and how it is said.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Word {
    Unseen(Flaw),
    Hindering(Flaw),
}

impl Ground {
    /// A file was locked.
    pub fn is_locked(
        &mut self,
        mounts: &mut Mounts,
        state: &State<Open>,
        (place, identity): (Place<'_>, FileIdentity),
        file: &(impl AsRawFd + std::os::fd::AsFd),
    ) {
        if let Whereabouts::Share(Some(id)) = whereabouts::of_descriptor(mounts, file)
            && let Some(mount) = mounts.get(id)
        {
            self.is_used(mounts, mount, place.is_default(), Some(file));
        }
        if !place.is_default() && self.is_to_be_looked_at(place.lockspace, mounts, identity) {
            self.look_at(mounts, state, place, Some(identity));
        }
    }

    /// A lockspace was made or opened, perhaps once more. `is_new` says that its directory had to be made.
    pub fn is_opened(
        &mut self,
        mounts: &mut Mounts,
        state: &State<Open>,
        lockspace: &[u8],
        is_new: bool,
    ) {
        // Before anything is said of where it is.
        let found = whereabouts::of_path(mounts, lockspace);
        if is_new {
            tracing::warn!(
                target: "locking.lockspace",
                "The directory of the lockspace {} was missing and has been made, on {}. If a file system is to be \
                 mounted there, it is not: other hosts do not see the leases, and guests are to be started only \
                 when it is",
                Printable(lockspace),
                text_of(mounts, lockspace, found)
            );
        }
        if let Whereabouts::Share(Some(id)) = found
            && let Some(mount) = mounts.get(id)
        {
            self.is_used::<std::fs::File>(mounts, mount, false, None);
        }
        let name = b"";
        self.look_at(mounts, state, Place { lockspace, name }, None);
    }

    /// A lock is wanted on a file of this mount; of a disk, or in a lockspace, and this one, if it is there
    /// already.
    fn is_used<F: AsRawFd>(
        &mut self,
        mounts: &Mounts,
        mount: &Mount,
        is_disk: bool,
        lock: Option<&F>,
    ) {
        let key = (mount.id, mount.device);
        if self.done_with.contains(&key) {
            return;
        }
        match word_on(mount, is_disk, || lock.and_then(fdinfo::keeps_lock)) {
            Known::Nothing => (),
            Known::NotYet => return,
            Known::Bad(Word::Unseen(flaw)) => tracing::warn!(
                target: "locking.lockspace",
                "{} {}: locks there keep no other host away, which is told this once. {}",
                Printable(mount.text().as_bytes()), flaw.why, flaw.advice
            ),
            Known::Bad(Word::Hindering(flaw)) => tracing::warn!(
                target: "locking.lockspace",
                "{} {}, which is told this once. {}",
                Printable(mount.text().as_bytes()), flaw.why, flaw.advice
            ),
        }
        let is_there = |(id, device): &(MountId, u64)| {
            mounts.get(*id).is_some_and(|mount| mount.device == *device)
        };
        self.done_with.retain(is_there);
        self.done_with.insert(key);
    }

    fn is_to_be_looked_at(&self, lockspace: &[u8], mounts: &Mounts, file: FileIdentity) -> bool {
        self.directories.get(lockspace).is_none_or(|seen| {
            seen.is_on_share
                || seen.mounts != mounts.version()
                || seen.device_of_files != file.device
        })
    }

    /// Sees whether a lockspace's directory is the one that it was. `file` is one in it that was just locked.
    fn look_at(
        &mut self,
        mounts: &mut Mounts,
        state: &State<Open>,
        place: Place<'_>,
        file: Option<FileIdentity>,
    ) {
        let lockspace = place.lockspace;
        let found = whereabouts::of_path(mounts, lockspace);
        // A share is asked by whoever works there.
        let Some(identity) = whereabouts::known_directory(mounts, lockspace) else {
            return;
        };
        let now = Directory {
            identity,
            mounts: mounts.version(),
            is_on_share: found != Whereabouts::Local,
            device_of_files: file.map_or(identity.device, |file| file.device),
        };
        let before = self.directories.insert(lockspace.into(), now);
        if before.is_none_or(|before| before.identity == identity) {
            return;
        }
        let leases = state.table().iter().filter(|(_, resource)| {
            resource.lockspace() == lockspace && !(file.is_some() && resource.name() == place.name)
        });
        let count = leases.count();
        if count > 0 {
            tracing::warn!(
                target: "locking.lockspace",
                "The directory of the lockspace {} is another one than before, on {}: its file system was mounted or \
                 unmounted, or somebody replaced it. Leases held in the one before: {count}. They keep nobody away \
                 who locks in this one. Put the one before back in its place, or end the guests that hold them",
                Printable(lockspace),
                text_of(mounts, lockspace, found)
            );
        }
    }
}

/// What is known of the locks on a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    /// Nothing yet: another use of it may tell.
    NotYet,
    /// There is nothing to be said.
    Nothing,
    /// This is.
    Bad(Word),
}

fn word_on(mount: &Mount, is_disk: bool, keeps_lock: impl FnOnce() -> Option<bool>) -> Known {
    match mount.locks() {
        Locks::Own | Locks::Seen => Known::Nothing,
        Locks::Unseen(flaw) => Known::Bad(Word::Unseen(flaw)),
        // Nobody but the daemon writes to a lease.
        Locks::Hindering(_) if !is_disk => Known::NotYet,
        Locks::Hindering(flaw) => Known::Bad(Word::Hindering(flaw)),
        Locks::Untold => match keeps_lock() {
            None => Known::NotYet,
            Some(false) => Known::Nothing,
            Some(true) => Known::Bad(Word::Unseen(mount.unseen_after_all())),
        },
    }
}

/// The mount that a path is on, for operators.
fn text_of(mounts: &Mounts, path: &[u8], found: Whereabouts) -> String {
    let mount = match found {
        Whereabouts::Share(Some(id)) => mounts.get(id),
        Whereabouts::Share(None) => None,
        Whereabouts::Local => mounts.of(path),
    };
    mount.map_or_else(|| "a mount that is not known".into(), Mount::text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mounts;

    #[test]
    fn what_is_said_of_a_mount_depends_on_what_is_locked_there() {
        let nothing = (false, false);
        let (of_both, of_disks) = ((true, true), (false, true));
        for (mount, keeps_lock, said) in [
            ("xfs /dev/sda rw", None, nothing),
            ("nfs4 host:/ rw,local_lock=none", Some(true), nothing),
            ("nfs host:/ rw,nolock", None, of_both),
            ("cifs //host/x rw,nobrl", None, of_both),
            ("cifs //host/x rw", None, of_disks),
            ("ocfs2 /dev/sda rw", None, of_both),
            ("9p x rw", None, of_both),
            ("virtiofs x rw", Some(true), of_both),
            ("virtiofs x rw", Some(false), nothing),
            ("fuse.x x rw", None, nothing),
        ] {
            let line = format!("7 1 0:50 / /srv rw - {mount}");
            let mount = mounts::parse(line.as_bytes()).pop().unwrap();
            let is_said =
                |is_disk| matches!(word_on(&mount, is_disk, || keeps_lock), Known::Bad(_));
            assert_eq!((is_said(false), is_said(true)), said, "{line}");
        }
    }
}
