//! What dead owners leave behind: their locks are freed a few at a time, so that nobody waits for
//! thousands.

use super::Owners;
use crate::locks::table::Pid;

/// How many locks of a dead owner are freed before somebody else has a turn.
const LEASES_A_PIECE: usize = 8;

impl Owners<'_> {
    /// Frees the locks of an owner that is dead: a few at once, many in pieces.
    pub fn free(&mut self, pid: Pid) {
        let owner = self.text(pid);
        self.custody.is_within_reach(pid);
        let is_first = self.custody.state().estates().is_empty();
        let count = self.custody.owner_died(pid);
        self.end_watch(pid);
        if count == 0 {
            is_free(&owner, count);
            return;
        }
        self.freeing.dead.push_back((owner, count));
        if is_first {
            self.free_some();
        }
    }

    /// Frees some of the locks of an owner that is dead. False if there are none to be freed.
    pub fn free_some(&mut self) -> bool {
        let before = self.custody.state().estates().len();
        if before == 0 {
            return false;
        }
        let first = self.custody.state().estates().front();
        let left = first.map_or(0, |estate| estate.resources.len());
        self.custody.free_some(left.min(LEASES_A_PIECE));
        if self.custody.state().estates().len() < before {
            // What an earlier image of this process left to be freed has no name here.
            if let Some((owner, count)) = self.freeing.dead.pop_front() {
                is_free(&owner, count);
            }
        }
        true
    }
}

fn is_free(owner: &str, count: usize) {
    tracing::info!(
        target: "locking.lock_daemon",
        "{owner} is dead: {count} of its locks are free"
    );
}
