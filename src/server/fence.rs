//! The killing of owners that left while they hold locks.
//!
//! An owner whose connection ends may go on writing to its disks, so its locks stay until it is
//! dead: it is asked to end (SIGTERM), and made to (SIGKILL) 1.6 seconds later. The signals go to
//! the very process that connected, through a pidfd, never to a number that another process may
//! have by now. Nothing here waits: the pidfd becomes readable, or the deadline passes.

use std::collections::HashMap;

use slab::Slab;

use crate::host::process::Process;
use crate::locks::table::Pid;

/// How long an owner has between SIGTERM and SIGKILL, milliseconds (as in the C daemon).
pub const GRACE_MS: u64 = 1600;
/// How long after SIGKILL an owner that lives on is worth a line in the log, milliseconds.
pub const OVERDUE_MS: u64 = 30_000;

/// What an owner was sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Stage {
    /// SIGTERM.
    Asked,
    /// SIGKILL.
    Killed,
}

/// An owner that is to die.
#[derive(Debug)]
pub struct Fence {
    /// Its number, under which its locks are held.
    pub pid: Pid,
    /// The process.
    pub process: Process,
    /// What it was sent last.
    pub stage: Stage,
}

/// The owners that are to die, each once.
#[derive(Debug, Default)]
pub struct Fences {
    fences: Slab<Fence>,
    by_pid: HashMap<Pid, usize>,
}

impl Fences {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fences.is_empty()
    }

    /// The fence of a process.
    pub fn of(&self, pid: Pid) -> Option<&Fence> {
        self.fences.get(*self.by_pid.get(&pid)?)
    }

    /// The fence of a process, to change it.
    pub fn of_mut(&mut self, pid: Pid) -> Option<&mut Fence> {
        self.fences.get_mut(*self.by_pid.get(&pid)?)
    }

    /// The fence at a place.
    pub fn get(&self, place: usize) -> Option<&Fence> {
        self.fences.get(place)
    }

    /// Enters a fence and says at which place.
    pub fn insert(&mut self, fence: Fence) -> usize {
        let pid = fence.pid;
        let place = self.fences.insert(fence);
        self.by_pid.insert(pid, place);
        place
    }

    /// Takes a fence out.
    pub fn remove(&mut self, pid: Pid) -> Option<Fence> {
        self.fences.try_remove(self.by_pid.remove(&pid)?)
    }

    /// All of them, with their places.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Fence)> {
        self.fences.iter()
    }
}
