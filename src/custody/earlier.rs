//! The state for an earlier version of this program: what its ledger said before format 5.
//!
//! The way back to a program that does not know today's format goes over a second memory file, which is
//! written when such a program stands in the place of this one and is asked what it reads; the daemon's
//! own ledger stays as it is. Those programs know less, and what they do not know is left out: up to format 4
//! since when what is, who is to be told what happens, and what was counted; up to format 3 how a process is
//! known again; up to format 2 nothing is watched, a process is one owner whatever domains it stands for, and
//! there is no word for what a dead owner left. It is for the caller to wait until nothing is lost with it.

use std::num::NonZeroUsize;

use super::encoding;
use super::event::Event;
use super::ledger::{self, CHECKSUM_AT, EXTENTS_AT, MAGIC, VERSION, VERSION_AT};
use crate::host::errno::Errno;
use crate::host::memory::Memory;

/// Where the bytes of events stood.
const LENGTH_AT: usize = 16;

/// The first format with two extents, and with words for the watched and what the dead left.
const FIRST_LIKE_OURS: u32 = 3;

/// The first format that says how a process is known again.
const FIRST_WITH_LIVES: u32 = 4;

/// Whether programs that read formats up to this one know of owners that are watched, of those that cannot
/// be reached, and of what dead ones left.
pub fn knows_the_watched(version: u32) -> bool {
    version >= FIRST_LIKE_OURS
}

/// Whether there is a way back to programs that read formats up to this one.
pub fn is_earlier(version: u32) -> bool {
    (1..VERSION).contains(&version)
}

/// Writes these events for programs that read this format, and closes them for a handover.
///
/// # Errors
/// What the kernel says when it has no memory for that.
pub fn write<'a>(version: u32, events: impl Iterator<Item = Event<'a>>) -> Result<Memory, Errno> {
    let is_like_ours = version >= FIRST_LIKE_OURS;
    let header = ledger::header_of(version);
    let mut content = vec![0; header];
    for event in events.filter(|event| was_known(version, event)) {
        encoding::encode_untimed_behind(&event, &mut content)?;
    }
    let events = content.get(header..).unwrap_or_default();
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
    if is_like_ours {
        // The first of the two extents counts.
        memory.store(EXTENTS_AT, header as u64);
        memory.store(EXTENTS_AT.saturating_add(size_of::<u64>()), length);
    } else {
        memory.store(LENGTH_AT, length);
    }
    memory.store(CHECKSUM_AT, checksum);
    Ok(memory)
}

/// Whether a format has this event. The poll is not written: without one, each connection is looked at anew.
fn was_known(version: u32, event: &Event<'_>) -> bool {
    match event {
        Event::RegisteredAt(..) | Event::Subscribed(..) | Event::Poll(_) => false,
        Event::Here(_) | Event::ClientIs(..) | Event::OwnerIs(..) => version >= FIRST_WITH_LIVES,
        Event::OldPoll(..)
        | Event::ReleasedBy(..)
        | Event::Watched(_)
        | Event::Unwatched(_)
        | Event::Died(_)
        | Event::Freed(_)
        | Event::Leaving(_)
        | Event::Unreachable(_)
        | Event::Reachable(_)
        | Event::Deaf => version >= FIRST_LIKE_OURS,
        _ => true,
    }
}
