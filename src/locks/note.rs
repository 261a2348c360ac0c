//! Who has a lease, written into its file: decided here as a value, done by a process that has no lock and may
//! hang. A file that could be a disk is never written: the lease is one of a lockspace's directory, taken with
//! AUTOCREATE, and its file is regular, as good as empty, and says nothing but what such a note says.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::stat::fstat;
use nix::sys::uio::{pread, pwrite};

use super::holder;
use super::lease::Lease;
use super::table::{Mode, ResourceId, Table};
use crate::host::clock;
use crate::host::errno::Errno;
use crate::host::file::{self, Conflict, FileIdentity, LockType, Start};
use crate::host::note::{MARK, Note, SIZE, may_be_in};

/// A note to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writing {
    /// The number of the locked descriptor, in the process that has the lock.
    descriptor: RawFd,
    /// Which file it is.
    identity: FileIdentity,
    note: [u8; SIZE],
}

/// The length of what is in front of the note in a message.
const FRONT: usize = 20;

impl Writing {
    /// The note on a resource; `None` if its file must not be written: it might be a disk.
    pub fn of(table: &Table<Lease>, id: ResourceId) -> Option<Writing> {
        let resource = table.get(id)?;
        if resource.lockspace().is_empty() || !resource.autocreate || !resource.identity.is_known()
        {
            return None;
        }
        let key = resource.any_holder()?;
        let owner = table.owner(key)?;
        let note = Note {
            host: Note::own_host(),
            domain: Note::domain_text(&owner.name),
            uuid: key.uuid.as_ref().map(holder::uuid_text).unwrap_or_default(),
            pid: key.pid,
            mode: match resource.mode {
                Mode::Exclusive => "exclusive",
                Mode::Shared => "shared",
            }
            .to_owned(),
            since: clock::rfc3339(resource.since).unwrap_or_default(),
        };
        Some(Writing {
            descriptor: resource.lease.descriptor.as_raw_fd(),
            identity: resource.identity,
            note: note.to_bytes(),
        })
    }

    /// As a message to the process that writes it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let FileIdentity { device, inode } = self.identity;
        let front = [
            &self.descriptor.to_ne_bytes()[..],
            &device.to_ne_bytes(),
            &inode.to_ne_bytes(),
        ];
        [&front.concat(), &self.note[..]].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Writing> {
        let (front, note) = bytes.split_first_chunk::<FRONT>()?;
        let (descriptor, rest) = front.split_first_chunk()?;
        let (device, rest) = rest.split_first_chunk()?;
        Some(Writing {
            descriptor: i32::from_ne_bytes(*descriptor),
            identity: FileIdentity {
                device: u64::from_ne_bytes(*device),
                inode: u64::from_ne_bytes(*rest.first_chunk()?),
            },
            note: *note.first_chunk()?,
        })
    }

    /// Writes the note into what the process `of` has open under its number, if that is still the lease.
    fn run(&self, of: i32) -> Result<(), Errno> {
        let path = format!("/proc/{of}/fd/{}", self.descriptor);
        // Not opened before it is known what it is: to open a disk or a device may do something.
        let handle = file::handle(Start::Anywhere, path.as_bytes())?;
        if !self.may_be_written(&handle)? {
            return Ok(());
        }
        let file = file::open_handle(&handle)?;
        // Given back meanwhile, it may be another host's by now.
        if file::conflict(&file, LockType::Write)? == Conflict::None {
            return Ok(());
        }
        let mut before = [0; SIZE];
        let length = pread(&file, &mut before, 0)?;
        let before = before.get(..length).unwrap_or_default();
        if !before.is_empty() && !before.starts_with(MARK) {
            return Ok(());
        }
        pwrite(&file, &self.note, 0)?;
        Ok(())
    }

    /// Whether it is the file that was locked, has a name yet, and is one that notes are written to.
    fn may_be_written(&self, handle: &OwnedFd) -> Result<bool, Errno> {
        let stat = fstat(handle)?;
        let is_it = FileIdentity::from(stat) == self.identity;
        Ok(is_it && stat.st_nlink > 0 && may_be_in(&stat))
    }
}

/// Does what a message says, for the process that made this one. What cannot be done is left: the lock is had
/// all the same.
pub fn write_for_parent(message: &[u8]) {
    if let Some(writing) = Writing::from_bytes(message) {
        let _ = writing.run(crate::host::clone::parent());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

    struct Scene {
        path: PathBuf,
        locked: file::Lockable,
        writing: Writing,
    }

    impl Scene {
        fn of(name: &str, content: &[u8]) -> Scene {
            let name = format!("virtlockd-note-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, content).unwrap();
            let open = file::open_existing(Start::Anywhere, path.as_os_str().as_bytes()).unwrap();
            let mut locked = file::Lockable::from(open);
            locked.lock(LockType::Write).unwrap();
            let writing = Writing {
                descriptor: locked.as_raw_fd(),
                identity: file::identity(&locked).unwrap(),
                note: Note::default().to_bytes(),
            };
            Scene {
                path,
                locked,
                writing,
            }
        }

        fn after(&self, writing: &Writing) -> Vec<u8> {
            let _ = writing.run(crate::host::process::own_number());
            std::fs::read(&self.path).unwrap()
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it locks a real file")]
    fn only_what_is_empty_or_a_note_is_written() {
        for (name, before) in [
            ("empty", &b""[..]),
            ("note", &[MARK, b"host: b\n"].concat()),
        ] {
            let scene = Scene::of(name, before);
            assert_eq!(scene.after(&scene.writing), scene.writing.note);
        }
        let long = [MARK, &[0; SIZE]].concat();
        for (name, before) in [
            ("disk", &b"QFI\xfb"[..]),
            ("zeros", &[0; SIZE]),
            ("one", b"\n"),
            ("long", &long),
            ("large", &[0; 4096]),
        ] {
            let scene = Scene::of(name, before);
            assert_eq!(scene.after(&scene.writing), before);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it locks a real file")]
    fn a_file_that_is_given_back_or_another_one_is_not_written() {
        let mut scene = Scene::of("given-back", b"");
        let writing = Writing {
            identity: FileIdentity {
                inode: scene.writing.identity.inode + 1,
                ..scene.writing.identity
            },
            ..scene.writing.clone()
        };
        assert_eq!(scene.after(&writing), b"");
        scene.locked.lock(LockType::Unlock).unwrap();
        assert_eq!(scene.after(&scene.writing), b"");
    }

    #[test]
    #[cfg_attr(miri, ignore = "it locks a real file")]
    fn a_message_is_read_as_it_was_written_and_half_a_one_not_at_all() {
        let scene = Scene::of("message", b"");
        let bytes = scene.writing.to_bytes();
        assert_eq!(Writing::from_bytes(&bytes), Some(scene.writing.clone()));
        for length in 0..bytes.len() {
            assert_eq!(Writing::from_bytes(&bytes[..length]), None);
        }
    }
}
