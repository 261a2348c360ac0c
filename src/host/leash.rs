//! A process group that does not outlive this process, not even when this one is killed: the kernel
//! itself sends SIGKILL to the group as soon as the last copy of our end of a pipe is closed, which
//! the end of a process does.
//!
//! The other end is open in the group and asks for that signal (O_ASYNC, F_SETSIG and F_SETOWN,
//! fcntl(2)). prctl(PR_SET_PDEATHSIG) would reach the first process of the group alone, not what that
//! has started, and could be asked for only between a fork and the exec: posix_spawn(3), which does
//! not copy a daemon's page tables, has no room for it.
//!
//! What leaves the group, or is in one of which no process has the pipe open any more, goes free. So
//! does the group of a process that is killed between the start and [`Collar::tie`], the very next
//! thing.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;

use super::errno::Errno;

/// <fcntl.h>; the libc crate does not have it.
const F_SETSIG: libc::c_int = 10;

/// As long as this is there, the group lives.
#[derive(Debug)]
pub struct Leash {
    /// Nothing is ever written.
    _ours: OwnedFd,
}

/// The end that a group is to have, before there is one.
#[derive(Debug)]
pub struct Collar {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Collar {
    /// Of nobody yet. The program that is started next is to be given it.
    pub fn new() -> Result<Collar, Errno> {
        let (theirs, ours) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        set(&theirs, F_SETSIG, libc::SIGKILL)?;
        set(&theirs, libc::F_SETFL, libc::O_ASYNC)?;
        Ok(Collar { ours, theirs })
    }

    /// The number of the end that the group is to have open.
    pub fn theirs(&self) -> std::os::fd::RawFd {
        self.theirs.as_raw_fd()
    }

    /// Ties the process group with this number, which has been started since.
    pub fn tie(self, group: i32) -> Result<Leash, Errno> {
        set(&self.theirs, libc::F_SETOWN, group.saturating_neg())?;
        Ok(Leash { _ours: self.ours })
    }
}

fn set(descriptor: &OwnedFd, command: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
    // SAFETY: these commands take an integer and touch no memory of ours.
    Errno::result(unsafe { libc::fcntl(descriptor.as_raw_fd(), command, value) }).map(drop)
}
