//! What the host refused, as a piece of a sentence: what could not be done, by which call, and why. A
//! security policy may refuse a call for ever; whoever reads of it must learn which one.

use std::fmt;

use super::errno::{self, Errno};

/// Something that could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it was, with the system call in parentheses.
    pub what: &'static str,
    /// What the kernel said.
    pub reason: Errno,
}

impl Refusal {
    /// For `map_err` behind the call that `what` names.
    pub fn of<E: Into<Refused>>(what: &'static str) -> impl Fn(E) -> Refusal {
        move |error| Refusal {
            what,
            reason: error.into().0,
        }
    }
}

/// The error number in whichever kind of error a call gives.
#[derive(Clone, Copy, Debug)]
pub struct Refused(Errno);

impl From<Errno> for Refused {
    fn from(reason: Errno) -> Refused {
        Refused(reason)
    }
}

impl From<nix::errno::Errno> for Refused {
    fn from(named: nix::errno::Errno) -> Refused {
        Refused(named.into())
    }
}

impl From<std::io::Error> for Refused {
    fn from(error: std::io::Error) -> Refused {
        Refused(errno::of(&error))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.what, errno::text(self.reason))
    }
}

impl std::error::Error for Refusal {}
