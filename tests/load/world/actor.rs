//! The owners, as the reference sees them.

use std::time::Instant;

use super::model::Session;
use crate::support::owner::{OnTerm, Owner};

/// An owner's process, as the reference sees it.
pub struct Actor {
    pub owner: Owner,
    pub on_term: OnTerm,
    /// `None`: closed, or lent.
    pub sessions: Vec<Option<Session>>,
    pub leaving: Option<Leaving>,
}

/// It was sent SIGTERM, which it ignores.
#[derive(Clone, Copy)]
pub struct Leaving {
    pub since: Instant,
    pub at_step: usize,
}

impl Actor {
    pub fn pid(&self) -> i32 {
        self.owner.pid()
    }

    /// Whether the end of this session is the owner's end.
    pub fn stands_for_it(&self, session: Option<Session>) -> bool {
        session.is_some_and(|session| session.pid == Some(self.pid()))
    }
}

/// A connection that another process has open as well, as the children of an emulator do. It ends
/// when both have closed it.
pub struct Loan {
    /// The process that made the connection, and its number there.
    pub lender: i32,
    pub connection: usize,
    pub lender_has_it: bool,
    pub borrower: i32,
    pub session: Session,
}
