//! Signals as readable events: they are blocked before anything else happens and read from a
//! signalfd, so none can arrive at a moment that does not suit (the reference daemon dies of a
//! SIGUSR1 that comes between its exec and its handlers).

use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that the daemon acts on.
const HANDLED: [Signal; 5] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
];

fn blocked() -> SigSet {
    // These two are blocked as well, never read: a write to a closed socket says EPIPE all the same,
    // one beyond the limit of file sizes says EFBIG, and unlike ignoring them, blocking is undone in
    // children by one call.
    HANDLED
        .into_iter()
        .chain([Signal::SIGPIPE, Signal::SIGXFSZ])
        .collect()
}

/// Blocks the daemon's signals. The first thing that main does.
pub fn block() -> Result<(), Errno> {
    blocked().thread_block()
}

/// Lets the daemon's signals through again: for a program that expects to get them, not to read
/// them. Whoever unblocks them must be about to exec.
pub fn unblock() -> Result<(), Errno> {
    blocked().thread_unblock()
}

/// Where blocked signals are read.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
}

impl Signals {
    /// Opens the signalfd. [`block`] must have been called before.
    pub fn open() -> Result<Signals, Errno> {
        let mask: SigSet = HANDLED.into_iter().collect();
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Signals {
            descriptor: SignalFd::with_flags(&mask, flags)?,
        })
    }

    /// The next pending signal, if any.
    pub fn next(&self) -> Option<Signal> {
        let information = self.descriptor.read_signal().ok()??;
        Signal::try_from(i32::try_from(information.ssi_signo).ok()?).ok()
    }

    /// For the reactor.
    pub fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}
