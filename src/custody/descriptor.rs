//! What stands for a descriptor in the state: the open descriptor itself in a daemon that serves, its
//! number alone in a state that was read and not taken over yet.

use std::fmt::Debug;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::host::file::Lockable;

/// A descriptor, open and ours, or only its number.
pub trait Descriptor: Debug {
    /// The number.
    fn number(&self) -> Number;
}

/// The number of a descriptor that may or may not be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Number(pub RawFd);

impl Descriptor for Number {
    fn number(&self) -> Number {
        *self
    }
}

impl Descriptor for OwnedFd {
    fn number(&self) -> Number {
        Number(self.as_raw_fd())
    }
}

impl Descriptor for Lockable {
    fn number(&self) -> Number {
        Number(self.as_raw_fd())
    }
}

/// In which form a state has its descriptors.
pub trait Form: Debug {
    /// Files that are locked.
    type File: Descriptor;
    /// Sockets and processes.
    type Other: Descriptor;
}

/// Open, and ours: whoever drops the state closes them.
#[derive(Debug)]
pub enum Open {}

impl Form for Open {
    type File = Lockable;
    type Other = OwnedFd;
}

/// Numbers.
#[derive(Debug)]
pub enum Saved {}

impl Form for Saved {
    type File = Number;
    type Other = Number;
}
