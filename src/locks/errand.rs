//! Work on the file of a resource as a message to a process that does it where it may hang, and the answer. The
//! two processes are copies of one program, so the form of the messages is nobody else's business and has no
//! version.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::job::{Create, Delete, End, Found};
use super::lease::{Acquisition, NotLocked, Refused, Stranger};
use super::lockspace::{self, NotMade};
use super::place::{Place, Unreachable};
use super::table::Mode;
use crate::host::clone;
use crate::host::errno::Errno;
use crate::host::file::{FileIdentity, Lockable};
use crate::host::helper::{self, Done};
use crate::host::process;
use crate::log::{self, Said};

/// How often a file that somebody on this host has locked is tried again, where that may be a process whose
/// daemon is no more and which is about to let go of it: for a second.
const TRIES: usize = 50;
/// How long between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Errand<'a> {
    /// A file is to be opened and locked.
    Acquire {
        /// Which file.
        #[serde(borrow)]
        place: Place<'a>,
        /// Alone or with others.
        mode: Mode,
        /// Whether to make it if it is missing.
        autocreate: bool,
        /// Files that must not be opened.
        avoid: Vec<FileIdentity>,
        /// A process of an earlier image may be about to let go of it.
        is_patient: bool,
    },
    /// The file that goes with it is to be unlocked, and removed if this was the last lock anywhere (with the mode
    /// in which it was held).
    End {
        /// Where it is.
        #[serde(borrow)]
        place: Place<'a>,
        /// Which one it is.
        identity: FileIdentity,
        /// The mode, if it is to go.
        removes: Option<Mode>,
    },
    /// A file is to be made, if it is missing.
    Create(#[serde(borrow)] Place<'a>),
    /// What does a name lead to?
    Find(#[serde(borrow)] Place<'a>),
    /// A name is to be removed.
    Delete(#[serde(borrow)] Place<'a>),
    /// Is there a directory?
    IsDirectory(&'a [u8]),
    /// A directory is to be made, if it is missing.
    MakeDirectory(&'a [u8]),
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The file that goes with it is open and locked: which one it is, and whether it was made for that.
    Locked(FileIdentity, bool),
    /// It could not be locked.
    NotLocked(NotLocked),
    /// It is unlocked.
    Ended,
    /// It is there now.
    Created(Result<(), Unreachable>),
    /// What was found.
    Found(Result<Found, Unreachable>),
    /// It is gone.
    Deleted(Result<(), Unreachable>),
    /// Whether there is a directory.
    IsDirectory(bool),
    /// There is one now; whether it was missing.
    MadeDirectory(Result<bool, NotMade>),
    /// It could not be begun.
    Failed(Errno),
}

/// The kinds of errands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are those of errands")]
pub enum Kind {
    Acquire,
    End,
    Create,
    Find,
    Delete,
    IsDirectory,
    MakeDirectory,
}

impl<'a> Errand<'a> {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Errand::Acquire { .. } => Kind::Acquire,
            Errand::End { .. } => Kind::End,
            Errand::Create(_) => Kind::Create,
            Errand::Find(_) => Kind::Find,
            Errand::Delete(_) => Kind::Delete,
            Errand::IsDirectory(_) => Kind::IsDirectory,
            Errand::MakeDirectory(_) => Kind::MakeDirectory,
        }
    }

    /// As a message.
    ///
    /// # Errors
    /// EINVAL for one that cannot be said.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Errno> {
        to_bytes(self)
    }

    /// From a message.
    ///
    /// # Errors
    /// EINVAL if it is none.
    pub fn of_bytes(message: &'a [u8]) -> Result<Errand<'a>, Errno> {
        from_bytes(message)
    }

    /// Does it. With a lock goes its file.
    fn run(&self, file: Option<OwnedFd>) -> (Outcome, Option<Lockable>) {
        let outcome = match *self {
            Errand::Acquire {
                place,
                mode,
                autocreate,
                ref avoid,
                is_patient,
            } => {
                let acquisition = Acquisition {
                    place,
                    mode,
                    autocreate,
                    avoid,
                };
                return match acquire(&acquisition, is_patient) {
                    Ok((file, identity, created)) => {
                        (Outcome::Locked(identity, created), Some(file))
                    }
                    Err(refused) => (Outcome::NotLocked(refused), None),
                };
            }
            Errand::End {
                place,
                identity,
                removes,
            } => match file {
                Some(file) => {
                    End {
                        place,
                        identity,
                        removes,
                    }
                    .run_on(Lockable::locked_elsewhere(file));
                    Outcome::Ended
                }
                None => Outcome::Failed(Errno::EBADF),
            },
            Errand::Create(place) => Outcome::Created(Create { place }.run()),
            Errand::Find(place) => Outcome::Found(Delete { place }.find()),
            Errand::Delete(place) => Outcome::Deleted(Delete { place }.run()),
            Errand::IsDirectory(path) => Outcome::IsDirectory(lockspace::is_directory(path)),
            Errand::MakeDirectory(path) => Outcome::MadeDirectory(lockspace::make_directory(path)),
        };
        (outcome, None)
    }
}

fn acquire(
    acquisition: &Acquisition<'_>,
    is_patient: bool,
) -> Result<(Lockable, FileIdentity, bool), NotLocked> {
    let tries = if is_patient { TRIES } else { 0 };
    let mut result = acquisition.run(None);
    // Somebody on this host has a lease on the file, and has been asked to give it back. The kernel takes it from
    // who does not (/proc/sys/fs/lease-break-time).
    while matches!(&result, Err(refused) if refused.reason == Refused::Open(Errno::EAGAIN)) {
        clone::pause(PAUSE);
        result = acquisition.run(None);
    }
    for _ in 0..tries {
        // Some servers do not say who it is, or say a number of another host's.
        let may_be_a_helper = match &result {
            Err(NotLocked {
                reason: Refused::Taken(stranger),
                ..
            }) => match stranger {
                Stranger::ThisHost | Stranger::Elsewhere(None) => true,
                Stranger::Process(pid) => process::name(*pid).is_none_or(|it| it == helper::NAME),
                Stranger::Elsewhere(Some(_)) => false,
            },
            _ => false,
        };
        if !may_be_a_helper {
            break;
        }
        clone::pause(PAUSE);
        result = acquisition.run(None);
    }
    let (lease, identity) = result?;
    Ok((lease.descriptor, identity, lease.created))
}

/// An answer, and what was said meanwhile that belongs into the log.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    outcome: Outcome,
    said: Vec<Said>,
}

/// Reads an answer.
///
/// # Errors
/// EINVAL if it is none.
pub fn outcome_of(answer: &[u8]) -> Result<(Outcome, Vec<Said>), Errno> {
    let Answer { outcome, said } = from_bytes(answer)?;
    Ok((outcome, said))
}

/// Does what a message says, in a process that may hang.
pub fn run(message: &[u8], file: Option<OwnedFd>) -> Done {
    let ((outcome, locked), said) = log::aside(|| match Errand::of_bytes(message) {
        Ok(errand) => errand.run(file),
        Err(reason) => (Outcome::Failed(reason), None),
    });
    let answer = Answer { outcome, said };
    Done {
        bytes: to_bytes(&answer).unwrap_or_default(),
        file: locked.map(Lockable::into_descriptor),
        undo: Some(undo),
    }
}

/// Nobody got the answer to this message: what was locked for it is let go.
fn undo(message: &[u8], answer: &[u8], file: OwnedFd) {
    let _ = log::aside(|| {
        let Ok(Errand::Acquire { place, mode, .. }) = Errand::of_bytes(message) else {
            return;
        };
        if let Ok((Outcome::Locked(identity, created), _)) = outcome_of(answer) {
            End {
                place,
                identity,
                removes: created.then_some(mode),
            }
            .run_on(Lockable::locked_elsewhere(file));
        }
    });
}

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard()
}

fn to_bytes(what: &impl Serialize) -> Result<Vec<u8>, Errno> {
    bincode::serde::encode_to_vec(what, configuration()).map_err(|_| Errno::EINVAL)
}

fn from_bytes<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Errno> {
    let read = bincode::serde::borrow_decode_from_slice(bytes, configuration());
    read.map(|(what, _)| what).map_err(|_| Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::file::{self, Conflict, LockType, Start};
    use std::os::unix::ffi::OsStrExt;

    #[test]
    #[cfg_attr(miri, ignore = "it locks a real file")]
    fn a_lock_by_message_is_had_and_let_go_or_undone() {
        let path = std::env::temp_dir().join(format!("virtlockd-errand-{}", std::process::id()));
        let place = Place {
            lockspace: b"",
            name: path.as_os_str().as_bytes(),
        };
        let acquire = Errand::Acquire {
            place,
            mode: Mode::Exclusive,
            autocreate: true,
            avoid: vec![FileIdentity {
                device: 1,
                inode: 1,
            }],
            is_patient: false,
        };
        let message = acquire.to_bytes().unwrap();
        assert_eq!(from_bytes::<Errand<'_>>(&message), Ok(acquire));
        for is_read in [true, false] {
            let done = run(&message, None);
            let outside = file::open_existing(Start::Anywhere, place.name).unwrap();
            let seen = || file::conflict(&outside, LockType::Read);
            assert_eq!(seen(), Ok(Conflict::OpenFile));
            let (outcome, said) = outcome_of(&done.bytes).unwrap();
            let Outcome::Locked(identity, true) = outcome else {
                panic!("{outcome:?}");
            };
            assert_eq!(said, []);
            let file = done.file.unwrap();
            if is_read {
                let end = Errand::End {
                    place,
                    identity,
                    removes: Some(Mode::Exclusive),
                };
                let end = run(&end.to_bytes().unwrap(), Some(file.try_clone().unwrap()));
                assert_eq!(outcome_of(&end.bytes).unwrap().0, Outcome::Ended);
            } else {
                done.undo.unwrap()(&message, &done.bytes, file.try_clone().unwrap());
            }
            assert_eq!(seen(), Ok(Conflict::None), "a copy is open yet");
            assert!(!path.exists());
            drop(file);
        }
    }
}
