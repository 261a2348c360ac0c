//! What is to happen when, in one ordered set that the daemon's only timer follows.

use std::collections::BTreeSet;

use foldhash::HashMap;

use crate::custody::clients::ClientId;
use crate::host::clock::Moment;
use crate::locks::table::Pid;

/// How long until a connection is seen to again for which a system call failed and may soon not
/// fail, milliseconds.
pub const RETRY_MS: u64 = 100;
/// After a connection, a long message or a state that was written down, how long until the memory that
/// it took is given back, milliseconds.
const MEMORY_MS: u64 = 1000;

/// Something that happens at a moment, unless it is called off before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Deadline {
    /// An owner had its time to end by itself.
    Kill(Pid),
    /// An owner should long be dead.
    StillAlive(Pid),
    /// A client that was refused has still not made the call that the refusal would answer.
    Refused(ClientId),
    /// The kernel had no memory for what a connection receives or is sent: time to try again.
    Serve(ClientId),
    /// The process that an ended connection stood for could not be reached: time to try again.
    ClearAway(ClientId),
    /// Connections could not be accepted: time to try again.
    Accept,
    /// Owners could not be watched for want of descriptors or memory: time to try again.
    Watch,
    /// The poll does not tell when the process of an owner ends: time to look for its death.
    Unheard(Pid),
    /// Nothing was served for as long as the daemon was told to wait for work.
    Idle,
    /// The end of the daemon must not take longer.
    Stop,
    /// Time to give back the memory that connections and long messages took.
    Memory,
    /// Time to look what takes long on shares.
    Shares,
    /// The ledger could not be written anew: time to try again.
    Ledger,
    /// The check of the successor must not take longer.
    Successor,
    /// A successor that was killed should be over.
    Abandoned,
    /// The moment without messages on their way, which libvirt's daemon needs to take over, must
    /// have come by now.
    Quiet,
}

/// The deadlines; at most one of each.
#[derive(Debug, Default)]
pub struct Deadlines {
    in_order: BTreeSet<(Moment, Deadline)>,
    moments: HashMap<Deadline, Moment>,
}

impl Deadlines {
    /// Sets a deadline, in the place of an earlier setting of the same.
    pub fn set(&mut self, deadline: Deadline, at: Moment) {
        self.unset(deadline);
        self.moments.insert(deadline, at);
        self.in_order.insert((at, deadline));
    }

    /// Calls a deadline off.
    pub fn unset(&mut self, deadline: Deadline) {
        if let Some(at) = self.moments.remove(&deadline) {
            self.in_order.remove(&(at, deadline));
        }
    }

    /// Memory is to be given back: once for all that ends in the meantime, because it is no work to be
    /// done often.
    pub fn give_memory_back_later(&mut self) {
        if self.get(Deadline::Memory).is_none() {
            self.set(Deadline::Memory, Moment::now().plus_ms(MEMORY_MS));
        }
    }

    /// When a deadline is, if it is set.
    pub fn get(&self, deadline: Deadline) -> Option<Moment> {
        self.moments.get(&deadline).copied()
    }

    /// The earliest deadline's moment.
    pub fn first(&self) -> Option<Moment> {
        self.in_order.first().map(|(at, _)| *at)
    }

    /// Takes out a deadline that has passed.
    pub fn take_due(&mut self, now: Moment) -> Option<Deadline> {
        let (at, deadline) = *self.in_order.first()?;
        if at > now {
            return None;
        }
        self.unset(deadline);
        Some(deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_due_in_order_and_can_be_moved_and_called_off() {
        let mut deadlines = Deadlines::default();
        deadlines.set(Deadline::Kill(7), Moment(50));
        deadlines.set(Deadline::Idle, Moment(10));
        deadlines.set(Deadline::Kill(7), Moment(20));
        deadlines.set(Deadline::Stop, Moment(5));
        deadlines.unset(Deadline::Stop);
        assert_eq!(deadlines.first(), Some(Moment(10)));
        assert_eq!(deadlines.take_due(Moment(9)), None);
        assert_eq!(deadlines.take_due(Moment(60)), Some(Deadline::Idle));
        assert_eq!(deadlines.take_due(Moment(60)), Some(Deadline::Kill(7)));
        assert_eq!(deadlines.take_due(Moment(60)), None);
        assert_eq!(deadlines.first(), None);
    }
}
