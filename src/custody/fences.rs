//! Owners and their processes, as far as it lasts: who is to die, and whose death is waited for.

use serde::{Deserialize, Serialize};

use super::descriptor::{Descriptor, Number};
use crate::host::clock::Moment;
use crate::locks::table::Pid;

/// What an owner that is being fenced was sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// SIGTERM.
    Asked,
    /// SIGKILL.
    Killed,
}

impl Stage {
    /// How long until something more is to be done about an owner that was sent this, milliseconds: between
    /// SIGTERM and SIGKILL as in the C daemon; one that lives on after that is worth a line in the log.
    pub const fn lasts_ms(self) -> u64 {
        match self {
            Stage::Asked => 1600,
            Stage::Killed => 30_000,
        }
    }
}

/// An owner that is to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence<D> {
    /// Its number, under which its locks are held.
    pub pid: Pid,
    /// The pidfd.
    pub process: D,
    /// What it was sent last.
    pub stage: Stage,
    /// When something more is to be done about it.
    pub next_step: Moment,
}

impl<D: Descriptor> Fence<D> {
    /// As the ledger has it.
    pub fn by_number(&self) -> Fence<Number> {
        Fence {
            pid: self.pid,
            process: self.process.number(),
            stage: self.stage,
            next_step: self.next_step,
        }
    }
}

/// An owner that holds something and has no connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched<D> {
    /// Its number.
    pub pid: Pid,
    /// The pidfd through which its death is waited for; `None` if its process cannot be seen from here.
    pub process: Option<D>,
}

impl<D: Descriptor> Watched<D> {
    /// As the ledger has it.
    pub fn by_number(&self) -> Watched<Number> {
        Watched {
            pid: self.pid,
            process: self.process.as_ref().map(Descriptor::number),
        }
    }
}
