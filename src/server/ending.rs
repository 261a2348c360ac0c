//! The end of the daemon: no new clients, every connection closed, every owner that holds something
//! over its own connection fenced; and when nobody is left to fence, everything else freed.

use std::os::fd::AsRawFd;

use mio::unix::SourceFd;

use super::daemon::{Daemon, State};
use super::deadlines::Deadline;
use crate::host::clock::Moment;
use crate::host::{listen, notify};
use crate::locks::table::Pid;

/// How long the daemon waits at its end for owners to die, milliseconds.
const STOP_MS: u64 = 30_000;

impl Daemon {
    /// Begins the end: no new clients, every connection closed, every owner that holds something
    /// over its own connection fenced.
    pub fn stop(&mut self) {
        if self.state != State::Serving {
            return;
        }
        self.state = State::Stopping;
        self.abandon_upgrade();
        notify::stopping();
        self.deadlines.unset(Deadline::Idle);
        self.deadlines
            .set(Deadline::Stop, Moment::now().plus_ms(STOP_MS));
        for listener in std::mem::take(&mut self.listeners) {
            let _ = self
                .registry
                .deregister(&mut SourceFd(&listener.socket.as_raw_fd()));
            listen::Listener {
                socket: listener.socket,
                path: listener.path,
            }
            .remove();
        }
        let places: Vec<usize> = self.connections.iter().map(|(place, _)| place).collect();
        for place in places {
            self.end_connection(place);
        }
    }

    /// The last step of the end, when there is nobody left to fence: locks of owners that had no
    /// connection of their own go too, and with them the files that were made for them.
    pub fn finish(&mut self) {
        if self.state == State::Stopping
            && self.connections.is_empty()
            && self.fences.is_empty()
            && self.dead.is_empty()
            && self.estates.is_empty()
        {
            debug_assert!(self.own_connections.is_empty());
            self.end_all_owners();
            self.state = State::Ended;
        }
    }

    /// Frees what is left. What was made for an owner that may live on stays: it is all that tells
    /// another daemon's owners of it.
    fn end_all_owners(&mut self) {
        let pids: Vec<Pid> = self.keeper.table().processes().collect();
        for pid in pids {
            if self.unreachable.contains(&pid) {
                tracing::error!(
                    target: "locking.lock_daemon",
                    "{} could not be fenced and loses its locks, perhaps while it lives",
                    self.owner_text(pid)
                );
            } else if self.fences.of(pid).is_none() {
                if self.watches.is_alive(pid) {
                    tracing::warn!(
                        target: "locking.lock_daemon",
                        "{} has no connection of its own and is not ended with the daemon: it loses \
                         its locks while it lives, and nothing keeps others from its disks",
                        self.owner_text(pid)
                    );
                }
                self.keeper.end_owner(pid);
            }
        }
        while self.free_some() {}
    }

    /// The end must not take longer: who is still being fenced is named.
    pub fn give_up_fencing(&mut self) {
        for (_, fence) in self.fences.iter() {
            tracing::error!(
                target: "locking.lock_daemon",
                "{} could not be fenced within {} s and loses its locks while it lives",
                self.owner_text(fence.pid), STOP_MS / 1000
            );
        }
        self.end_all_owners();
        self.state = State::Ended;
    }
}
