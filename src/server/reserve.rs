//! Descriptors for the time when there are no others.

use std::os::fd::OwnedFd;

use crate::host::errno::Errno;

/// Descriptors that are kept open for nothing, to be closed when there is no other one left and
/// one is needed to refuse a client or to fence an owner.
#[derive(Debug, Default)]
pub struct Reserve {
    kept: Vec<OwnedFd>,
}

impl Reserve {
    const SIZE: usize = 16;
    /// How many of them are for fencing alone: clients that are refused and say nothing keep theirs
    /// for a while, and an owner that leaves then must not live on for it.
    const FOR_FENCING: usize = 8;

    /// Opens what is missing, as far as that is possible.
    pub fn refill(&mut self) {
        while self.kept.len() < Self::SIZE {
            match crate::host::file::open_directory(b"/") {
                Ok(descriptor) => self.kept.push(descriptor),
                Err(_) => return,
            }
        }
    }

    /// Closes one, if there is one.
    pub fn give_up_one(&mut self) -> bool {
        self.kept.pop().is_some()
    }

    /// Closes one, if there are more than fencing may need.
    pub fn give_up_one_to_spare(&mut self) -> bool {
        self.kept.len() > Self::FOR_FENCING && self.give_up_one()
    }

    /// Whether a client could be refused for want of descriptors.
    pub fn can_refuse(&self) -> bool {
        self.kept.len() > Self::FOR_FENCING
    }

    /// Does what takes a descriptor, should it be one of the last. What was spent is not back yet: see
    /// [`Reserve::refill`].
    ///
    /// # Errors
    /// Those of `attempt`.
    pub fn spend<T>(&mut self, mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            match attempt() {
                Err(Errno::EMFILE | Errno::ENFILE) if self.give_up_one() => (),
                result => return result,
            }
        }
    }
}
