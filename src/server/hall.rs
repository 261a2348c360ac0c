//! What a call may use, borrowed side by side from the reactor for one turn; and what it may ask of the
//! reactor.

use super::deadlines::Deadlines;
use super::ground::Ground;
use super::reserve::Reserve;
use super::shares::Shares;
use super::waiting_room::WaitingRoom;
use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::own_connections::Seen;
use crate::custody::servers::Service;
use crate::host::names::Names;
use crate::host::shared::Word;
use crate::locks::table::{Pid, ResourceId};
use crate::wire::error::Error;

/// What a call may use.
#[derive(Debug)]
pub struct Hall<'a> {
    /// All that lasts.
    pub custody: &'a mut Custody,
    /// Clients that there is no room for.
    pub waiting: &'a mut WaitingRoom,
    /// What happens when.
    pub deadlines: &'a mut Deadlines,
    /// Descriptors for the time when there are no others.
    pub reserve: &'a Reserve,
    /// The names of users and groups.
    pub names: &'a mut Names,
    /// What locks stand on, as far as it was said.
    pub ground: &'a mut Ground,
    /// What is to be done before the answers go out.
    pub orders: &'a mut Vec<Order>,
    /// Leases that were granted, whose files are to say so some time.
    pub leases: &'a mut Vec<ResourceId>,
    /// Files on shares.
    pub shares: &'a mut Shares,
    /// Where it is noted that a file is being made.
    pub making: Word<'a>,
    /// When this connection's owner was last seen to have a connection of its own.
    pub own_seen: Seen,
}

impl Hall<'_> {
    /// A client that was refused for want of room makes its first call: may it be served after all?
    /// `known` is the process that it speaks for, if that is an owner that is known.
    ///
    /// # Errors
    /// The answer to the call.
    pub fn admit(&mut self, id: ClientId, known: Option<Pid>) -> Result<(), Error> {
        let about = (known, self.reserve.can_refuse());
        self.waiting.admit(id, about, self.custody, self.deadlines)
    }
}

/// What a call asks of the reactor, which does it before the answer goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The daemon ends.
    Stop,
    /// This connection ends.
    End(ClientId),
    /// There may be room now for clients of this server that wait.
    LetIn(Service),
    /// The number of this process may have belonged to another one that is dead: its locks go first.
    Settle(Pid),
    /// A lock was granted over a connection that may not be the owner's own.
    Watch(ClientId),
    /// This client spoke for another owner before.
    Spoke(ClientId, (Pid, [u8; 16])),
}
