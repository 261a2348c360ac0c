//! What dead owners leave behind: their locks are freed a few at a time, so that nobody waits for
//! thousands; and what they left on shares when those answer.

use super::Owners;
use crate::locks::table::Pid;

/// How many locks of a dead owner are freed before somebody else has a turn.
const LEASES_A_PIECE: usize = 8;

impl Owners<'_> {
    /// Frees the locks of an owner that is dead: a few at once, many in pieces.
    pub fn free(&mut self, pid: Pid) {
        let owner = self.text(pid);
        self.custody.is_within_reach(pid);
        let is_first = !self.custody.has_left();
        let count = self.custody.owner_died(pid);
        self.end_watch(pid);
        if count == 0 {
            is_free(&owner, count);
            return;
        }
        self.freeing.dead.push_back((pid, owner, count));
        if is_first {
            self.free_some();
        }
    }

    /// Frees some of the locks of an owner that is dead. False if there are none to be freed here.
    pub fn free_some(&mut self) -> bool {
        let mut freed = false;
        for _ in 0..LEASES_A_PIECE {
            let Some(resource) = self.custody.next_left() else {
                break;
            };
            freed = true;
            if self.shares.of_lock(resource).is_none() || !self.shares.let_go_of_left(self.custody)
            {
                self.custody.free_some(1);
            }
        }
        self.tell_who_is_freed();
        freed
    }

    /// Says of which dead owners nothing is locked any more.
    pub fn tell_who_is_freed(&mut self) {
        let estates = self.custody.state().estates();
        // None went, and of those that are there everything has been said.
        if self.freeing.dead.len() <= estates.len() && estates.len() == self.freeing.estates {
            return;
        }
        self.freeing.estates = estates.len();
        self.freeing.dead.retain(|(pid, owner, count)| {
            let is_there = estates.iter().any(|estate| estate.pid == *pid);
            if !is_there {
                is_free(owner, *count);
            }
            is_there
        });
    }
}

fn is_free(owner: &str, count: usize) {
    tracing::info!(
        target: "locking.lock_daemon",
        "{owner} is dead: {count} of its locks are free"
    );
}
