//! The state for an earlier version of this program: what its ledger said before format 3.
//!
//! The way back to a program that does not know today's format goes over a second memory file, which is
//! written when such a program stands in the place of this one and is asked what it reads; the daemon's
//! own ledger stays as it is. Those programs know less: nothing is watched there, a process is one owner
//! whatever domains it stands for, and there is no word for what a dead owner left. So what they do not
//! know is left out, and it is for the caller to wait until nothing is lost with it.

use std::num::NonZeroUsize;

use super::event::Event;
use super::ledger::{self, CHECKSUM_AT, MAGIC, OLD_HEADER, VERSION, VERSION_AT};
use crate::host::errno::Errno;
use crate::host::memory::Memory;

/// Where the bytes of events stood.
const LENGTH_AT: usize = 16;

/// Whether there is a way back to programs that read formats up to this one.
pub fn is_earlier(version: u32) -> bool {
    (1..VERSION).contains(&version)
}

/// Writes these events for programs that read this format, and closes them for a handover.
///
/// # Errors
/// What the kernel says when it has no memory for that.
pub fn write<'a>(version: u32, events: impl Iterator<Item = Event<'a>>) -> Result<Memory, Errno> {
    let mut content = vec![0; OLD_HEADER];
    for event in events.filter(was_known) {
        ledger::encode_behind(&event, &mut content)?;
    }
    let events = content.get(OLD_HEADER..).unwrap_or_default();
    let (length, checksum) = (events.len() as u64, ledger::checksum(events));
    let size = NonZeroUsize::new(content.len()).ok_or(Errno::EINVAL)?;
    let mut memory = Memory::new(size)?;
    if let Some(place) = memory.bytes_mut().get_mut(..content.len()) {
        place.copy_from_slice(&content);
    }
    if let Some(place) = memory.bytes_mut().get_mut(..MAGIC.len()) {
        place.copy_from_slice(MAGIC);
    }
    memory.store(VERSION_AT, u64::from(version) | 1 << 32);
    memory.store(LENGTH_AT, length);
    memory.store(CHECKSUM_AT, checksum);
    Ok(memory)
}

/// Whether formats 1 and 2 have this event. The poll of format 2 is not written: without one, each
/// connection is looked at anew.
fn was_known(event: &Event<'_>) -> bool {
    !matches!(
        event,
        Event::OldPoll(..)
            | Event::ReleasedBy(..)
            | Event::Watched(_)
            | Event::Unwatched(_)
            | Event::Died(_)
            | Event::Freed(_)
            | Event::Leaving(_)
            | Event::Unreachable(_)
            | Event::Reachable(_)
            | Event::Poll(_)
            | Event::Deaf
    )
}
