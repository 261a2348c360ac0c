//! A lock that is taken again: by a daemon that has no descriptor of what an earlier one held, because that
//! was killed with all its processes. The file must be the very one that was locked; another one that has its
//! name by now is not touched.

use super::lease::{self, Lease, LockKind, Stranger};
use super::place::{Place, Unreachable};
use super::table::Mode;
use crate::host::errno::Errno;
use crate::host::file::{self, FileIdentity, LockType, Lockable};

/// A lock to be taken again. Plain data, as all work on files.
#[derive(Clone, Copy, Debug)]
pub struct Again<'a> {
    /// Where the file was.
    pub place: Place<'a>,
    /// Which file it was.
    pub identity: FileIdentity,
    /// Alone or with others.
    pub mode: Mode,
    /// Whether it is a lock file, which whoever has it last removes.
    pub autocreate: bool,
}

/// Why a lock could not be taken again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotAgain {
    /// Somebody else has a lock on the file.
    Taken(Stranger),
    /// Its name leads nowhere, or out of its lockspace.
    Gone,
    /// Its name leads to another file.
    Replaced,
    /// It cannot be opened.
    Open(Errno),
    /// It cannot be locked.
    Lock(Errno),
}

impl From<Unreachable> for NotAgain {
    fn from(reason: Unreachable) -> NotAgain {
        match reason {
            Unreachable::Leaves => NotAgain::Gone,
            Unreachable::System(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => NotAgain::Gone,
            Unreachable::System(errno) => NotAgain::Open(errno),
        }
    }
}

impl Again<'_> {
    /// Opens and locks the file.
    ///
    /// # Errors
    /// Why it is not locked.
    pub fn run(self) -> Result<Lease, NotAgain> {
        let opened = match self.place.reach(file::open_existing) {
            // A shared disk on a medium that cannot be written.
            Err(Unreachable::System(Errno::EROFS | Errno::EACCES | Errno::EPERM))
                if self.mode == Mode::Shared =>
            {
                self.place.reach(file::open_to_read)
            }
            opened => opened,
        };
        let mut descriptor = Lockable::from(opened?);
        // One that could not be asked then cannot be compared.
        if self.identity.is_known() {
            match file::identity(&descriptor) {
                Ok(found) if found == self.identity => (),
                Ok(_) => return Err(NotAgain::Replaced),
                Err(errno) => return Err(NotAgain::Open(errno)),
            }
        }
        let lock_type = match self.mode {
            Mode::Exclusive => LockType::Write,
            Mode::Shared => LockType::Read,
        };
        match descriptor.lock(lock_type) {
            Ok(()) => (),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let stranger = Stranger::of(&descriptor, lock_type, self.place);
                return Err(NotAgain::Taken(stranger));
            }
            Err(errno) => return Err(NotAgain::Lock(errno)),
        }
        // Who has had it meanwhile may have removed it, behind our look at its name.
        if self.autocreate && self.identity.is_known() {
            let is_own = file::has_names_for_itself(&descriptor, self.identity);
            match lease::leads_to(self.place, self.identity, is_own) {
                Ok(true) => (),
                Ok(false) => return Err(NotAgain::Replaced),
                Err(errno) => return Err(NotAgain::Open(errno)),
            }
        }
        Ok(Lease {
            descriptor,
            kind: LockKind::OpenFile,
            created: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    #[cfg_attr(miri, ignore = "it locks a real file")]
    fn the_same_file_is_locked_again_and_another_one_of_its_name_is_not_touched() {
        let path = std::env::temp_dir().join(format!("virtlockd-again-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        let identity = {
            let place = Place {
                lockspace: b"",
                name: path.as_os_str().as_bytes(),
            };
            let found = place.reach(file::look_up).unwrap();
            found.identity
        };
        let again = Again {
            place: Place {
                lockspace: b"",
                name: path.as_os_str().as_bytes(),
            },
            identity,
            mode: Mode::Exclusive,
            autocreate: true,
        };
        let lease = again.run().unwrap();
        let taken = again.run().unwrap_err();
        assert_eq!(taken, NotAgain::Taken(Stranger::ThisHost));
        let shared = Again {
            mode: Mode::Shared,
            ..again
        };
        assert!(matches!(shared.run(), Err(NotAgain::Taken(_))));
        drop(lease);
        // While the old one is open, so that its number is not given again.
        let old = std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(again.run().unwrap_err(), NotAgain::Gone);
        std::fs::write(&path, "").unwrap();
        assert_eq!(again.run().unwrap_err(), NotAgain::Replaced);
        std::fs::remove_file(&path).unwrap();
        drop(old);
    }
}
