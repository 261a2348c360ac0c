//! A process that does what may take for ever, so that this one does not: writing into files of shares that do
//! not answer. It is told by messages, does one after the other, and is never waited for.
//!
//! It is a copy of this process that has nothing of what this one has: no descriptor of a client, of a disk
//! or of the ledger is open in it, and nothing stays mapped that others share. Wherever it hangs, it keeps
//! nobody from going on, and no lock. It ends with the process that made it.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::signal::Signal;

use super::apart::{self, Apart};
use super::clone;
use super::errno::Errno;
use super::{passing, process};

/// The longest message.
pub const LONGEST: usize = 1024;

/// The process's name, at most 15 characters.
const NAME: &std::ffi::CStr = c"virtlockd-notes";

/// As long as this is there, the process is.
#[derive(Debug)]
pub struct Scribe {
    socket: OwnedFd,
    pid: i32,
}

impl Scribe {
    /// Starts the process, which does `work` for each message.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn start(work: fn(&[u8])) -> Result<Scribe, Errno> {
        let parent = process::own_number();
        match apart::copy()? {
            Apart::Original(pid, socket) => Ok(Scribe { socket, pid }),
            Apart::Copy => {
                let _ = live(parent, work);
                clone::leave(0)
            }
        }
    }

    /// Tells it to do something, some time. EAGAIN if it hangs and has enough to do, EPIPE if it is over.
    ///
    /// # Errors
    /// Those.
    pub fn tell(&self, message: &[u8]) -> Result<(), Errno> {
        passing::send(self.socket.as_raw_fd(), message, &[])
    }

    /// It is told nothing any more, and ends.
    pub fn dismiss(self) -> Dismissed {
        Dismissed(self.pid)
    }
}

/// One that is over, or soon.
#[derive(Debug)]
pub struct Dismissed(i32);

impl Dismissed {
    /// Whether it is not over yet. If it is, it is forgotten.
    pub fn is_there(&self) -> bool {
        clone::is_child(self.0)
    }
}

/// The copy's life.
fn live(parent: i32, work: fn(&[u8])) -> Result<(), Errno> {
    // A name of its own in a list of processes. Where it cannot be had it does without.
    let _ = nix::sys::prctl::set_name(NAME);
    clone::end_at_once_on_panic();
    clone::follow_parent(Some(Signal::SIGKILL))?;
    if clone::parent() != parent {
        return Ok(());
    }
    give_up_shared_memory()?;
    let socket = libc::STDIN_FILENO;
    let mut message = [0; LONGEST];
    loop {
        // SAFETY: the buffer is as long as stated.
        let result = unsafe { libc::recv(socket, message.as_mut_ptr().cast(), LONGEST, 0) };
        match Errno::result(result) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                let length = usize::try_from(length).unwrap_or(0);
                work(message.get(..length).unwrap_or_default());
            }
            Err(Errno::EINTR) => (),
            Err(reason) => return Err(reason),
        }
    }
}

/// What is mapped keeps its file open, and the lock on it: the ledger would be somebody's for whoever starts
/// next.
pub(super) fn give_up_shared_memory() -> Result<(), Errno> {
    let maps =
        std::fs::read_to_string("/proc/self/maps").map_err(|error| super::errno::of(&error))?;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        if !rights.ends_with('s') {
            continue;
        }
        let number = |text: &str| usize::from_str_radix(text, 16).map_err(|_| Errno::EINVAL);
        let (start, end) = range.split_once('-').ok_or(Errno::EINVAL)?;
        let (start, end) = (number(start)?, number(end)?);
        // SAFETY: only the desk and the ledger are shared memory, and this copy, which goes on in `live` alone,
        // uses neither any more.
        let result = unsafe { libc::munmap(start as *mut libc::c_void, end.saturating_sub(start)) };
        Errno::result(result)?;
    }
    Ok(())
}
