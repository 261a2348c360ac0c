//! Signals as readable events: they are blocked before anything else happens and read from a
//! signalfd, so none can arrive at a moment that does not suit (the reference daemon dies of a
//! SIGUSR1 that comes between its exec and its handlers). Where the host refuses signalfds they stay
//! blocked all the same, and the kernel is asked now and then which are pending: it loses none.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::errno::Errno;
use super::refusal::Refusal;

/// The signals that the daemon acts on.
const HANDLED: [Signal; 5] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
];

/// By which guardian and reactor wake each other.
pub const POKE: Signal = Signal::SIGUSR2;

fn blocked() -> SigSet {
    // The guardian waits for these two as well.
    let told = [POKE, Signal::SIGCHLD];
    // And these two are blocked, never read: a write to a closed socket says EPIPE all the same,
    // one beyond the limit of file sizes says EFBIG, and unlike ignoring them, blocking is undone in
    // children by one call.
    HANDLED
        .into_iter()
        .chain(told)
        .chain([Signal::SIGPIPE, Signal::SIGXFSZ])
        .collect()
}

/// Blocks the daemon's signals. The first thing that main does.
pub fn block() -> Result<(), Errno> {
    Ok(blocked().thread_block()?)
}

/// Signals of which a program that takes over must not die before it is ready for them.
const HARMLESS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGXFSZ, POKE];

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

/// Makes a signal that was read pending again.
pub fn keep(signal: Signal) {
    // It is blocked, so nothing happens yet; and it cannot fail for this process. (Not raise(3): musl's remembers
    // which thread this is, and a copy of a process is another one.)
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), signal);
}

/// How often the kernel is asked for pending signals where it does not tell of them.
const ASKED_EVERY: Duration = Duration::from_millis(100);

/// Where blocked signals are read.
#[derive(Debug)]
pub enum Signals {
    /// The kernel tells the poll.
    Descriptor(SignalFd),
    /// The kernel has to be asked, because of this.
    Asked(Refusal),
}

impl Signals {
    /// Opens the signalfd. [`block`] must have been called before. A process that has a guardian is told by
    /// it alone; but what else is sent to it must not stay pending until it is the guardian itself.
    pub fn open(has_guardian: bool) -> Result<Signals, Refusal> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let poke = has_guardian.then_some(POKE);
        let wanted: SigSet = HANDLED.into_iter().chain(poke).collect();
        SignalFd::with_flags(&wanted, flags)
            .map(Signals::Descriptor)
            .map_err(Refusal::of(
                "signals cannot be read from a descriptor (signalfd4)",
            ))
    }

    /// What the host refused, if it did.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Signals::Descriptor(_) => None,
            Signals::Asked(refusal) => Some(*refusal),
        }
    }

    /// How long the poll may wait at most; `None` where the descriptor will wake it.
    pub fn longest_wait(&self) -> Option<Duration> {
        self.refusal().map(|_| ASKED_EVERY)
    }

    /// The next pending signal, if any.
    pub fn next(&self) -> Option<Signal> {
        let Signals::Descriptor(descriptor) = self else {
            return next_pending();
        };
        let information = loop {
            match descriptor.read_signal().map_err(Errno::from) {
                // Nobody would come back for it: the reactor is told of a signal once.
                Err(Errno::EINTR) => (),
                result => break result.ok()??,
            }
        };
        Signal::try_from(i32::try_from(information.ssi_signo).ok()?).ok()
    }

    /// For the reactor; `None` where there is no descriptor.
    pub fn as_raw_fd(&self) -> Option<RawFd> {
        match self {
            Signals::Descriptor(descriptor) => Some(descriptor.as_raw_fd()),
            Signals::Asked(_) => None,
        }
    }
}

/// Takes one of the blocked signals that are pending, if there is one.
fn next_pending() -> Option<Signal> {
    let pending = pending().ok()?;
    let one: SigSet = HANDLED
        .into_iter()
        .find(|signal| pending.contains(*signal))
        .into_iter()
        .collect();
    // It is blocked and pending, and nobody else takes it: this does not wait.
    (one != SigSet::empty()).then(|| one.wait().ok()).flatten()
}

/// The next signal that the guardian waits for, or none within this time: for ever, if it is none.
pub fn wait(longest: Option<Duration>) -> Option<Signal> {
    wait_for(
        &[POKE, Signal::SIGCHLD].into_iter().chain(HANDLED).collect(),
        longest,
    )
}

/// Whether this process was poked, or is within this time.
pub fn is_poked_within(longest: Duration) -> bool {
    wait_for(&POKE.into(), Some(longest)).is_some()
}

fn wait_for(wanted: &SigSet, longest: Option<Duration>) -> Option<Signal> {
    let limit = longest.map(|longest| libc::timespec {
        tv_sec: longest.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: longest.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the set and the time, if there is one, live over the call; nobody wants to know more of the
    // signal.
    let result = unsafe { libc::sigtimedwait(wanted.as_ref(), std::ptr::null_mut(), limit) };
    Signal::try_from(Errno::result(result).ok()?).ok()
}

/// Children that end are waited for, whatever the program that started this one thought of it.
pub fn hear_of_children() {
    // SAFETY: the default action runs no code of this program.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
}
