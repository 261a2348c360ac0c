//! Owners and their processes: who must die ([`fence`]), whose death is waited for because it has no
//! connection of its own ([`watched`]), and what the dead leave behind ([`estates`]).

pub mod estates;
pub mod fence;
pub mod watched;

use std::collections::{BTreeMap, VecDeque};

use nix::sys::signal::Signal;

use super::deadlines::Deadlines;
use super::lines::Lines;
use super::reserve::Reserve;
use super::shares::Shares;
use super::watch::Watch;
use crate::custody::Custody;
use crate::locks::holder;
use crate::locks::table::Pid;

/// Owners that could not be watched yet, for want of descriptors or memory: those of which it is
/// still to be found out whether their number means the same here with the process that knows.
pub type Wanted = BTreeMap<Pid, Option<Pid>>;

/// The dead owners whose locks are being freed, as an operator reads them: in the order of what they
/// left.
#[derive(Debug, Default)]
pub struct Freeing {
    /// How many estates there were when it was last looked which of them are gone.
    estates: usize,
    dead: VecDeque<(Pid, String, usize)>,
}

/// What has to do with owners, borrowed side by side from the reactor.
#[derive(Debug)]
pub struct Owners<'a> {
    /// All that lasts.
    pub custody: &'a mut Custody,
    /// What happens when.
    pub deadlines: &'a mut Deadlines,
    /// Where readiness is asked for.
    pub watch: &'a Watch,
    /// Descriptors for the time when there are no others.
    pub reserve: &'a mut Reserve,
    /// Who waits.
    pub lines: &'a mut Lines,
    /// Owners that could not be watched yet.
    pub wanted: &'a mut Wanted,
    /// Files on shares.
    pub shares: &'a mut Shares,
    /// Whose locks are being freed.
    pub freeing: &'a mut Freeing,
    /// Whether the kernel names the process of a peer itself.
    pub names_processes: bool,
    /// Whether the daemon ends.
    pub is_ending: bool,
}

impl Owners<'_> {
    /// An owner as an operator reads it.
    pub fn text(&self, pid: Pid) -> String {
        holder::process_text(self.custody.state().table(), pid)
    }

    /// Whether somebody is being fenced whose process is dead.
    fn is_fenced_and_dead(&self, pid: Pid) -> Option<bool> {
        let fence = self.custody.state().fences().get(&pid)?;
        Some(crate::host::process::is_dead(&fence.process))
    }
}

/// What an owner that is fenced is asked with, and then made to.
const ASKED_WITH: Signal = Signal::SIGTERM;
const KILLED_WITH: Signal = Signal::SIGKILL;
