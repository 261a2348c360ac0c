//! What has happened since the ledger was made, counted. The counts lie in the ledger's header: to count is a
//! store into memory that outlives the process, and whoever goes on with the ledger goes on with them.

use super::event::Event;
use super::fences::Stage;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    /// Clients let in or turned away.
    Connected = 0,
    /// Owners that registered over a connection of their own.
    Registered,
    /// Files locked, and holdings of shared ones added.
    Granted,
    /// Holdings given back by their owners.
    Released,
    /// Acquires that were refused.
    Refused,
    /// Owners sent SIGTERM because they left their locks.
    Fenced,
    /// Owners sent SIGKILL for it.
    Killed,
    /// Processes that died and held something.
    Died,
    /// Programs that took over from the one before.
    Upgraded,
    /// Times that another process went on for one that died.
    Recovered,
    /// Locks that somebody else had when the daemon took them again.
    Lost,
    /// Events that subscribers did not get because they read too slowly.
    Missed,
}

impl Counter {
    /// All of them. Their places in the ledger are theirs for ever: new ones go to the end.
    pub const ALL: [Counter; 12] = [
        Counter::Connected,
        Counter::Registered,
        Counter::Granted,
        Counter::Released,
        Counter::Refused,
        Counter::Fenced,
        Counter::Killed,
        Counter::Died,
        Counter::Upgraded,
        Counter::Recovered,
        Counter::Lost,
        Counter::Missed,
    ];

    /// What it is called by those who ask.
    pub fn name(self) -> &'static str {
        match self {
            Counter::Connected => "connections",
            Counter::Registered => "owners_registered",
            Counter::Granted => "locks_granted",
            Counter::Released => "locks_released",
            Counter::Refused => "locks_refused",
            Counter::Fenced => "owners_fenced",
            Counter::Killed => "owners_killed",
            Counter::Died => "owners_died",
            Counter::Upgraded => "upgrades",
            Counter::Recovered => "recoveries",
            Counter::Lost => "locks_lost",
            Counter::Missed => "events_missed",
        }
    }

    /// What an event that is about to be applied counts as. `stage` is that of the fence that it is about, if
    /// there is one already.
    #[inline(always)]
    pub(super) fn of(event: &Event<'_>, stage: impl FnOnce() -> Option<Stage>) -> Option<Counter> {
        match event {
            Event::Granted { .. } | Event::Joined(..) => Some(Counter::Granted),
            Event::ReleasedBy(..) => Some(Counter::Released),
            Event::Connected(..) => Some(Counter::Connected),
            Event::RegisteredAt(..) => Some(Counter::Registered),
            Event::Died(_) => Some(Counter::Died),
            Event::Fencing(fence) => match (fence.stage, stage()) {
                (Stage::Asked, None) => Some(Counter::Fenced),
                (Stage::Killed, None | Some(Stage::Asked)) => Some(Counter::Killed),
                _ => None,
            },
            _ => None,
        }
    }
}
