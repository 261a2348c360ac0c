//! Who waits for a piece of the daemon's time. Connections on which something happened have a turn
//! first; what needs longer waits in lines behind them and is worked off in short pieces, from each
//! line in turn: a line that is long, or made longer all the time, holds up no other.

use std::collections::VecDeque;

use super::clients::connection::{Appetite, Connection};
use crate::custody::clients::ClientId;
use crate::locks::table::Pid;

/// The lines in which work waits that does not have to be done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Connections whose turn was too short.
    Unfinished,
    /// Connections that wait to be accepted.
    Newcomers,
    /// Connections that are to be cleared away.
    Endings,
    /// Dead owners whose locks are to be freed.
    Dead,
}

/// In which order they have a piece done, those that are empty passed over. A connection needs several
/// pieces until it is finished and cleared away, and one to be accepted: were newcomers let in as fast,
/// a flood of them would take up all descriptors.
pub const ROTATION: [Line; 8] = [
    Line::Unfinished,
    Line::Endings,
    Line::Unfinished,
    Line::Dead,
    Line::Unfinished,
    Line::Endings,
    Line::Unfinished,
    Line::Newcomers,
];

/// How many are let in while all that is unfinished has a piece done once. A newcomer may need many
/// pieces: those that come and send half a frame would otherwise be let in faster than they are read,
/// and fill the daemon's memory.
const NEWCOMERS_A_PASS: usize = 16;

/// The lines.
#[derive(Debug)]
pub struct Lines {
    /// Connections on which something has happened.
    ready: VecDeque<ClientId>,
    /// Connections that may need much: they come after those that are ready.
    unfinished: VecDeque<ClientId>,
    /// Connections that are over and not cleared away yet.
    pub endings: VecDeque<ClientId>,
    /// Processes that died and whose locks the table still has.
    pub dead: VecDeque<Pid>,
    /// How far the rotation is.
    rotation: std::iter::Cycle<std::array::IntoIter<Line, 8>>,
    /// Pieces of what is unfinished since somebody was let in.
    pieces: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Lines {
            ready: VecDeque::new(),
            unfinished: VecDeque::new(),
            endings: VecDeque::new(),
            dead: VecDeque::new(),
            rotation: ROTATION.into_iter().cycle(),
            pieces: 0,
        }
    }
}

impl Lines {
    /// Puts a connection in a list of those with something to do.
    pub fn enqueue(&mut self, id: ClientId, connection: &mut Connection) {
        if !connection.queued {
            connection.queued = true;
            match connection.appetite {
                Appetite::Small | Appetite::Doubtful => self.ready.push_back(id),
                Appetite::Large | Appetite::Unknown => self.unfinished.push_back(id),
            }
        }
    }

    /// The next connection that is ready.
    pub fn next_ready(&mut self) -> Option<ClientId> {
        self.ready.pop_front()
    }

    /// The next connection that needs much, for a piece of its work.
    pub fn next_unfinished(&mut self) -> Option<ClientId> {
        let next = self.unfinished.pop_front()?;
        self.pieces = self.pieces.saturating_add(1);
        Some(next)
    }

    /// Whether anybody is ready.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether anything waits in a line.
    pub fn has_pieces(&self) -> bool {
        !self.unfinished.is_empty() || !self.endings.is_empty() || !self.dead.is_empty()
    }

    /// The line whose turn it is.
    pub fn next_line(&mut self) -> Option<Line> {
        self.rotation.next()
    }

    /// Whether it is time to let newcomers in: not while a flood of others is worked on too slowly.
    pub fn may_let_in(&mut self) -> bool {
        if self.pieces.saturating_mul(NEWCOMERS_A_PASS) < self.unfinished.len() {
            return false;
        }
        self.pieces = 0;
        true
    }
}
