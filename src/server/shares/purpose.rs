//! What is worked on elsewhere: whom it waits for, what it is for, and what a call that waited for it goes on with.

use std::os::fd::{OwnedFd, RawFd};

use crate::custody::clients::ClientId;
use crate::host::errno::Errno;
use crate::host::mounts::MountId;
use crate::locks::errand::Outcome;

/// Whom work on a file may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShareId {
    /// The server of this mount.
    Mount(MountId),
    /// Of a file of which it is not known where it is.
    Unknown,
    /// A process of this host that has a lease on it (F_SETLEASE, fcntl(2)).
    Lessee,
}

/// What an errand is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A client's call waits for it.
    Call(ClientId),
    /// A dead owner left what is open under this number.
    Left(RawFd),
    /// Nobody wants what is open under this number.
    Unwanted(RawFd),
    /// Nobody waits for it any more: what it locks is let go of again. Its serial number.
    Nobody(u64),
}

/// What a call that waits on an errand goes on with.
#[derive(Debug)]
pub struct Finding {
    /// The errand, as a message.
    pub(super) asked: Vec<u8>,
    /// What became of the errand.
    pub outcome: Outcome,
    /// The file that was locked.
    pub file: Option<OwnedFd>,
}

impl Finding {
    pub(super) fn failed(reason: Errno) -> Finding {
        Finding {
            asked: Vec::new(),
            outcome: Outcome::Failed(reason),
            file: None,
        }
    }
}
