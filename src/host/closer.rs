//! Closing files where that may hang. To close a file of a share asks its server, and no other process can do it
//! for this one unless it has the same table of descriptors: such a copy of this process closes some files and
//! ends.

use std::os::fd::{IntoRawFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;

use super::clone::{self, Which};
use super::descriptors;
use super::errno::Errno;
use super::mount_table::{self, Mounts};
use super::process::{self, Process};
use super::scribe::give_up_shared_memory;
use super::whereabouts::Whereabouts;

/// The process's name, at most 15 characters.
const NAME: &std::ffi::CStr = c"virtlockd-close";

/// A process that closes files.
#[derive(Debug)]
pub struct Closer(i32);

impl Closer {
    /// Starts one that closes these. Where the host refuses that they stay open, and are given back.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn start(files: Vec<OwnedFd>) -> Result<Closer, (Errno, Vec<OwnedFd>)> {
        let parent = process::own_number();
        match clone::sharing_descriptors() {
            Ok(Which::Original(pid)) => {
                // They are its own from here on: a number that is closed there may be another file's at once.
                files.into_iter().for_each(|file| {
                    let _ = file.into_raw_fd();
                });
                Ok(Closer(pid))
            }
            Ok(Which::Copy) => {
                let _ = nix::sys::prctl::set_name(NAME);
                clone::end_at_once_on_panic();
                // Whoever goes on for a process that died sees to what is open then: what is closed here behind that
                // might be another file of the same number.
                let follows = clone::follow_parent(Some(Signal::SIGKILL));
                if follows.is_err() || clone::parent() != parent {
                    clone::leave(1);
                }
                // What is mapped here is somebody's as long as this lives.
                let _ = give_up_shared_memory();
                files.into_iter().for_each(drop);
                clone::leave(0)
            }
            Err(reason) => Err((reason, files)),
        }
    }

    /// It is to close nothing more. What hangs in the kernel ends with that.
    pub fn kill(&self) {
        clone::signal(self.0, Signal::SIGKILL);
    }

    /// Whether it is at it yet. If not, it is forgotten.
    pub fn is_there(&self) -> bool {
        clone::is_child(self.0)
    }
}

/// What the kernel calls the file that is open under this number, without asking a server.
pub fn name_of(number: RawFd) -> Vec<u8> {
    use std::os::unix::ffi::OsStringExt;
    let link = format!("/proc/{}/fd/{number}", process::own_number());
    std::fs::read_link(link).map_or_else(|_| Vec::new(), |path| path.into_os_string().into_vec())
}

/// The name of a process that stays behind, at most 15 characters.
const LEFT: &std::ffi::CStr = c"virtlockd-left";

/// A process that is about to end closes what it has open, and hangs if one of these files is on a share that does
/// not answer. So another one has them as well, which closes them last and behind the end of `daemon`, and
/// everything else before.
///
/// # Errors
/// What the host refuses.
pub fn stay_behind(files: &[RawFd], daemon: i32) -> Result<(), Errno> {
    let process = Process::open_any(daemon)?;
    match clone::sharing_descriptors()? {
        Which::Original(_) => Ok(()),
        Which::Copy => {
            let _ = nix::sys::prctl::set_name(LEFT);
            clone::end_at_once_on_panic();
            // What is mapped here is somebody's as long as this lives.
            let _ = give_up_shared_memory();
            process.wait_for_end();
            let others = descriptors::open_numbers();
            let others = others.into_iter().filter(|it| !files.contains(it));
            for number in others.chain(files.iter().copied()) {
                drop(descriptors::adopt(number));
            }
            clone::leave(0)
        }
    }
}

/// The numbers of the open files that are on shares.
pub fn on_shares() -> Vec<RawFd> {
    if !mount_table::shares_were_seen() {
        return Vec::new();
    }
    let mut mounts = Mounts::open();
    let mut open = descriptors::open_numbers();
    open.retain(|number| {
        let mut is_local = || descriptors::whereabouts(&mut mounts, *number) == Whereabouts::Local;
        descriptors::is_regular(*number) && !is_local()
    });
    open
}

/// Ends this process, which has a table of descriptors of its own, and does not wait for shares to have their files
/// closed.
pub fn leave_quickly(status: u8) -> ! {
    let files = on_shares();
    if !files.is_empty() {
        // Otherwise it waits for them, as every process does at its end.
        let _ = stay_behind(&files, process::own_number());
    }
    clone::leave(status)
}
