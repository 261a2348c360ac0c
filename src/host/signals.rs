//! Signals as readable events: they are blocked before anything else happens and read from a
//! signalfd, so none can arrive at a moment that does not suit (the reference daemon dies of a
//! SIGUSR1 that comes between its exec and its handlers).

use std::os::fd::{AsRawFd, RawFd};

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::errno::Errno;

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
    Ok(blocked().thread_block()?)
}

/// Signals of which a program that takes over must not die before it is ready for them.
const HARMLESS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGXFSZ];

/// Lets the daemon's signals through again: for a program that expects to get them, not to read
/// them. Whoever unblocks them must be about to exec, and calls [`block_again`] if that fails.
///
/// One that is pending would end this process here, or the next program before it has a handler:
/// those that ask for nothing but what is being done are ignored until that program says
/// otherwise. EINTR if one is pending that asks the daemon to end: it must be read first.
pub fn unblock() -> Result<(), Errno> {
    handle(SigHandler::SigIgn)?;
    let pending = pending()?;
    let end = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
    if end.into_iter().any(|signal| pending.contains(signal)) {
        return Err(Errno::EINTR);
    }
    Ok(blocked().thread_unblock()?)
}

/// As it was before [`unblock`].
pub fn block_again() -> Result<(), Errno> {
    block()?;
    handle(SigHandler::SigDfl)
}

fn handle(handler: SigHandler) -> Result<(), Errno> {
    HARMLESS.into_iter().try_for_each(|which| {
        // SAFETY: ignoring a signal and the default action run no code of this program.
        unsafe { signal(which, handler) }?;
        Ok(())
    })
}

fn pending() -> Result<SigSet, Errno> {
    let mut pending = std::mem::MaybeUninit::uninit();
    // SAFETY: the pointer is to room for a signal set, which the call fills in if it succeeds.
    let result = unsafe { libc::sigpending(pending.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: it succeeded, so this is a valid signal set.
    Ok(unsafe { SigSet::from_sigset_t_unchecked(pending.assume_init()) })
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
        let information = loop {
            match self.descriptor.read_signal().map_err(Errno::from) {
                // Nobody would come back for it: the reactor is told of a signal once.
                Err(Errno::EINTR) => (),
                result => break result.ok()??,
            }
        };
        Signal::try_from(i32::try_from(information.ssi_signo).ok()?).ok()
    }

    /// For the reactor.
    pub fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}
