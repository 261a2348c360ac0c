//! Processes that are copies of this one: with the same table of descriptors, or with one of their own;
//! and how they are waited for and ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::errno::Errno;
use super::process;

/// Which of the two processes this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The copy.
    Copy,
    /// The one that was copied, and the copy's number.
    Original(i32),
}

/// A copy of this process that shares its table of descriptors: what either opens or closes, both do.
///
/// # Errors
/// What the host refuses.
pub fn sharing_descriptors() -> Result<Which, Errno> {
    clone(libc::CLONE_FILES)
}

/// A copy of this process with a table of its own, in which everything is open that is open here.
///
/// # Errors
/// What the host refuses.
pub fn with_own_descriptors() -> Result<Which, Errno> {
    clone(0)
}

/// As [`with_own_descriptors`], but the copy is a child of the process that made this one.
///
/// # Errors
/// What the host refuses.
pub fn beside_with_own_descriptors() -> Result<Which, Errno> {
    clone(libc::CLONE_PARENT)
}

/// The kernel's call and not the C library's fork(3), which cannot share descriptors.
fn clone(flags: libc::c_int) -> Result<Which, Errno> {
    let flags = libc::c_ulong::try_from(flags | libc::SIGCHLD).map_err(|_| Errno::EINVAL)?;
    let none: libc::c_ulong = 0;
    // SAFETY: without a stack and without CLONE_VM this is fork(2): the copy goes on here, on a copy of the
    // stack. The process has a single thread, so the copy finds every lock of the C library free.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    match i32::try_from(Errno::result(result)?).map_err(|_| Errno::EINVAL)? {
        0 => Ok(Which::Copy),
        pid => Ok(Which::Original(pid)),
    }
}

/// This process gets the signal when the one that made it ends.
///
/// # Errors
/// What the host refuses.
pub fn follow_parent(signal: Option<Signal>) -> Result<(), Errno> {
    Ok(nix::sys::prctl::set_pdeathsig(signal)?)
}

/// The process that made this one, or that it was given to when that one ended.
pub fn parent() -> i32 {
    nix::unistd::getppid().as_raw()
}

/// Sends a signal to a process by its number: a child that has not been waited for, or the parent. False if
/// the host refuses it.
pub fn signal(pid: i32, signal: Signal) -> bool {
    // Whoever is not woken waits for ever: what fails once is tried again. It may have ended: then nobody
    // needs it.
    for _ in 0..SIGNAL_TRIES {
        match nix::sys::signal::kill(Pid::from_raw(pid), signal).map_err(Errno::from) {
            Ok(()) | Err(Errno::ESRCH) => return true,
            Err(_) => (),
        }
    }
    false
}

const SIGNAL_TRIES: usize = 3;

/// Whether processes can be woken by signals.
///
/// # Errors
/// What the host refuses.
pub fn try_out_signals() -> Result<(), Errno> {
    Ok(nix::sys::signal::kill(
        Pid::from_raw(process::own_number()),
        None,
    )?)
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

/// A child that has ended, and how; it is forgotten with that. `None` if there is none.
pub fn next_ended() -> Option<(i32, Ended)> {
    ended(-1, libc::WNOHANG)
}

/// What there is to hear of the children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// This one has ended, and how; it is forgotten with that.
    Ended(i32, Ended),
    /// All that there are run.
    AllRun,
    /// There are none.
    Nobody,
}

/// What there is to hear of the children now.
pub fn hear() -> Heard {
    wait(-1, libc::WNOHANG)
}

/// Whether this is a child that has not ended.
pub fn is_child(pid: i32) -> bool {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a number of ours, which the call fills in.
        let result = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        match Errno::result(result) {
            Err(Errno::EINTR) => (),
            result => return result == Ok(0),
        }
    }
}

/// How a child ended, as waitpid(2) says it; it is forgotten with that. `None` if it has not.
pub fn raw_end(pid: i32) -> Option<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a number of ours, which the call fills in.
        let result = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        match Errno::result(result) {
            Err(Errno::EINTR) => (),
            result => return (result == Ok(pid)).then_some(status),
        }
    }
}

/// Waits for the end of a child that has been killed.
pub fn wait_for_end(pid: i32) {
    ended(pid, 0);
}

fn ended(which: i32, flags: i32) -> Option<(i32, Ended)> {
    match wait(which, flags) {
        Heard::Ended(pid, ended) => Some((pid, ended)),
        Heard::AllRun | Heard::Nobody => None,
    }
}

fn wait(which: i32, flags: i32) -> Heard {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a number of ours, which the call fills in.
        let result = unsafe { libc::waitpid(which, &raw mut status, flags) };
        match Errno::result(result) {
            Ok(0) => return Heard::AllRun,
            Ok(pid) if libc::WIFEXITED(status) => {
                return Heard::Ended(pid, Ended::Status(libc::WEXITSTATUS(status)));
            }
            Ok(pid) if libc::WIFSIGNALED(status) => {
                return Heard::Ended(pid, Ended::Signal(libc::WTERMSIG(status)));
            }
            Ok(_) | Err(Errno::EINTR) => (),
            Err(_) => return Heard::Nobody,
        }
    }
}

/// Ends this process, and runs nothing for that: what it owns belongs to others as well.
pub fn leave(status: u8) -> ! {
    // SAFETY: _exit(2) only ends the process.
    unsafe { libc::_exit(i32::from(status)) }
}

/// Waits for so long.
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

/// A panic ends this process at once.
static ENDS_AT_ONCE: AtomicBool = AtomicBool::new(false);

/// From here on a panic ends the process at once, behind its message: to unwind would close what the
/// process owns, in a table of descriptors that it shares.
pub fn end_at_once_on_panic() {
    if ENDS_AT_ONCE.swap(true, Ordering::Relaxed) {
        return;
    }
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        say(info);
        leave(PANICKED);
    }));
}

/// From here on a panic has no message, because there is nowhere to write it.
pub fn say_nothing_on_panic() {
    std::panic::set_hook(Box::new(|_| {
        if ENDS_AT_ONCE.load(Ordering::Relaxed) {
            leave(PANICKED);
        }
    }));
}

/// As a program ends that panics.
const PANICKED: u8 = 101;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_copy_that_shares_descriptors_closes_for_both_and_one_with_its_own_does_not() {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = theirs.as_raw_fd();
        for (is_shared, is_open) in [(false, true), (true, false)] {
            let copy = match is_shared {
                true => sharing_descriptors(),
                false => with_own_descriptors(),
            };
            match copy.unwrap() {
                Which::Copy => {
                    // SAFETY: only ends what this copy has of it.
                    unsafe { libc::close(number) };
                    leave(7);
                }
                Which::Original(pid) => {
                    let ended = ended(pid, 0).unwrap();
                    assert_eq!(ended, (pid, Ended::Status(7)));
                }
            }
            ours.set_nonblocking(true).unwrap();
            let is_at_end = matches!(ours.read(&mut [0]), Ok(0));
            assert_eq!(is_at_end, !is_open);
        }
        std::mem::forget(theirs);
    }
}
