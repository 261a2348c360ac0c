//! The end of the daemon: no new clients, every connection closed, every owner that holds something
//! over its own connection fenced; and when nobody is left to fence, everything else freed.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::owners::Owners;
use crate::custody::Custody;
use crate::host::listen;
use crate::host::paths::Paths;
use crate::locks::table::Pid;
use crate::server::watch::Watch;

/// How long the daemon waits at its end for owners to die, milliseconds.
pub const STOP_MS: u64 = 30_000;

/// How long it waits there for what is under way on shares, milliseconds.
pub const SHARES_MS: u64 = 1_000;

/// Nobody is let in any more: the sockets are closed, and the daemon's own removed.
pub fn close_listeners(custody: &mut Custody, watch: &Watch) {
    let listeners = custody.stops_listening();
    if listeners.is_empty() {
        // A reactor that died had begun with this, and may not have come to it.
        let paths = Paths::of_this_process();
        for path in [paths.lock_socket, paths.admin_socket] {
            listen::remove_socket(&path);
        }
    }
    for listening in listeners {
        watch.remove(listening.socket.as_raw_fd());
        listen::Listener {
            socket: listening.socket,
            path: listening.path.map(OsString::from_vec).map(PathBuf::from),
        }
        .remove();
    }
}

impl Owners<'_> {
    /// Whether there is nobody left to fence or to free.
    pub fn is_over(&self) -> bool {
        let state = self.custody.state();
        state.client_count() == 0
            && state.fences().is_empty()
            && self.lines.dead.is_empty()
            && !self.custody.has_left()
    }

    /// The last step of the end: locks of owners that had no connection of their own go too, and with
    /// them the files that were made for them. What was made for an owner that may live on stays: it is
    /// all that tells another daemon's owners of it.
    pub fn end_all(&mut self) {
        let pids: Vec<Pid> = self.custody.state().table().processes().collect();
        for pid in pids {
            let state = self.custody.state();
            if state.is_unreachable(pid) {
                tracing::error!(
                    target: "locking.lock_daemon",
                    "{} could not be fenced and loses its locks, perhaps while it lives",
                    self.text(pid)
                );
            } else if !state.fences().contains_key(&pid) {
                if self.is_watched_and_dead(pid) == Some(false) {
                    tracing::warn!(
                        target: "locking.lock_daemon",
                        "{} has no connection of its own and is not ended with the daemon: it loses \
                         its locks while it lives, and nothing keeps others from its disks",
                        self.text(pid)
                    );
                }
                self.custody.owner_died(pid);
            }
        }
        while self.free_some() {}
        // Nobody has anything any more: the next start must not look for it.
        self.custody.leaves_file();
    }

    /// The end must not take longer: who is still being fenced is named.
    pub fn give_up(&mut self) {
        let pids: Vec<Pid> = self.custody.state().fences().keys().copied().collect();
        for pid in pids {
            tracing::error!(
                target: "locking.lock_daemon",
                "{} could not be fenced within {} s and loses its locks while it lives",
                self.text(pid), STOP_MS / 1000
            );
        }
        self.end_all();
    }
}
