//! Where what lies on the desk. All of it is sparse: addresses cost nothing, and a page takes memory from
//! the first time that it is written until it is given back.
//!
//! ```text
//! 0        control words
//! 64 KiB   the turn in progress: its words, two letters, what was received
//! 128 KiB  a bit for each slot: whether it may have been written
//! 1 MiB    the replies of the turn in progress
//! 64 MiB   places for messages that are longer than a slot has room for
//! ...      the slots: a head each, and a little room for each direction
//! ...      more room for each slot
//! ```
//!
//! The slots are small and lie close together, because a client that sends half a frame takes one, and there
//! are thousands: whole pages would be many times what was sent. So a page is given back when none of its
//! slots is used.

use std::num::NonZeroUsize;
use std::ops::Range;

use crate::host::shared::PAGE;
use crate::host::stream::LETTER;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// The control words.
pub const CONTROL: Range<usize> = 0..64 * KIB;
/// The words of the turn in progress.
pub const TURN: usize = CONTROL.end;
/// What is received is told by this letter.
pub const RECEIVED: usize = TURN + LETTER;
/// What is sent is told by this letter.
pub const SENT: usize = RECEIVED + LETTER;
/// The most that one read takes. It is more than a turn's worth of calls: what is left of them has to
/// be kept, and that takes time, too.
pub const READ_SIZE: usize = 8 * KIB;
/// What was received.
pub const INPUT: Range<usize> = TURN + PAGE..TURN + PAGE + READ_SIZE;
/// A bit for each slot.
pub const USED: usize = 128 * KIB;
/// The replies of the turn in progress: at most what is sent before more are made, those of a turn, and
/// one as long as the protocol allows.
pub const OUTPUT: Range<usize> = MIB..64 * MIB;
/// Places for long messages.
const LARGE: usize = OUTPUT.end;
/// Of what one client sent and was not sent yet the protocol allows 32 MiB and the server a little more.
/// There is room for it twice, so that it can be moved.
pub const LARGE_SIZE: usize = 68 * MIB;
/// How many such places there are: more than all admin clients together may have messages that need one.
pub const LARGE_COUNT: usize = 384;
/// The slots.
const SLOTS: usize = LARGE + LARGE_COUNT * LARGE_SIZE;
/// The most descriptors that have a slot. No kernel gives a process more, unless it is told to.
pub const MOST_SLOTS: usize = 1 << 20;
/// What a slot takes without more room.
const SLOT: usize = KIB;
/// How many of them lie on a page: their bits are in one word.
const SLOTS_ON_PAGE: usize = PAGE / SLOT;
const _: () = assert!(PAGE.is_multiple_of(SLOT) && 64usize.is_multiple_of(SLOTS_ON_PAGE));
/// More room for each slot.
const MORE: usize = SLOTS + MOST_SLOTS * SLOT;
/// How much more: three and five parts of eight, for what came and what goes.
const MORE_SIZE: usize = MIB;
/// Of the more room, where that for what goes begins.
const MORE_UNSENT: usize = 384 * KIB;
/// In a slot, where the room for what came begins, behind the head, and that for what goes.
pub const FEW_PENDING: usize = 128;
const FEW_UNSENT: usize = 640;

/// A desk without slots: it ends with its process.
pub const WITHOUT_SLOTS: NonZeroUsize = match NonZeroUsize::new(USED) {
    Some(size) => size,
    None => NonZeroUsize::MIN,
};

/// How large a desk is for a process with at most so many descriptors.
pub fn size(descriptors: u64) -> NonZeroUsize {
    let slots = usize::try_from(descriptors).unwrap_or(MOST_SLOTS);
    let more = slots.min(MOST_SLOTS).saturating_mul(MORE_SIZE);
    NonZeroUsize::new(MORE.saturating_add(more)).unwrap_or(WITHOUT_SLOTS)
}

/// Whether a desk of this size has a slot for this descriptor.
pub fn has_slot(size: usize, number: usize) -> bool {
    number < MOST_SLOTS && more(number).end <= size
}

/// A slot.
pub fn slot(number: usize) -> Range<usize> {
    let start = SLOTS.saturating_add(number.saturating_mul(SLOT));
    start..start.saturating_add(SLOT)
}

/// The page that a slot lies on, and of the word with its bit those of all slots there.
pub fn page(number: usize) -> (Range<usize>, u64) {
    let first = number.saturating_sub(number % SLOTS_ON_PAGE);
    let start = slot(first).start;
    let all = (1 << SLOTS_ON_PAGE) - 1;
    (start..start.saturating_add(PAGE), all << (first % 64))
}

/// The word with the bit of a slot, and the bit.
pub fn used(number: usize) -> (usize, u64) {
    let word = (number / 64).saturating_mul(size_of::<u64>());
    (USED.saturating_add(word), 1 << (number % 64))
}

/// More room of a slot, for both directions.
fn more(number: usize) -> Range<usize> {
    let start = MORE.saturating_add(number.saturating_mul(MORE_SIZE));
    start..start.saturating_add(MORE_SIZE)
}

/// In which direction bytes are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client.
    Pending,
    /// To the client.
    Unsent,
}

/// Where a slot's bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Room {
    /// In the slot itself.
    #[default]
    Few,
    /// In its more room.
    More,
    /// In a place for long messages.
    Large(usize),
}

impl Room {
    /// As a word.
    pub fn word(self) -> u64 {
        match self {
            Room::Few => 0,
            Room::More => 1,
            Room::Large(place) => (place as u64).saturating_add(2),
        }
    }

    /// From a word.
    pub fn of(word: u64) -> Room {
        match word {
            0 => Room::Few,
            1 => Room::More,
            word => Room::Large(usize::try_from(word.saturating_sub(2)).unwrap_or(usize::MAX)),
        }
    }

    /// Where it is, for a slot and a direction.
    pub fn range(self, number: usize, way: Way) -> Range<usize> {
        let slot = slot(number);
        let more = more(number);
        match (self, way) {
            (Room::Few, Way::Pending) => {
                slot.start.saturating_add(FEW_PENDING)..slot.start.saturating_add(FEW_UNSENT)
            }
            (Room::Few, Way::Unsent) => slot.start.saturating_add(FEW_UNSENT)..slot.end,
            (Room::More, Way::Pending) => more.start..more.start.saturating_add(MORE_UNSENT),
            (Room::More, Way::Unsent) => more.start.saturating_add(MORE_UNSENT)..more.end,
            (Room::Large(place), _) if place < LARGE_COUNT => {
                let start = LARGE.saturating_add(place.saturating_mul(LARGE_SIZE));
                start..start.saturating_add(LARGE_SIZE)
            }
            (Room::Large(_), _) => 0..0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_lies_where_something_else_does() {
        let rooms = |number| {
            [Way::Pending, Way::Unsent]
                .into_iter()
                .flat_map(move |way| [Room::Few, Room::More].map(|room| room.range(number, way)))
        };
        let heads = [3, 4].map(|number| slot(number).start..slot(number).start + FEW_PENDING);
        let last = MOST_SLOTS - 1;
        let bits = USED..used(last).0 + 8;
        let large = [0, 1, LARGE_COUNT - 1].map(|place| Room::Large(place).range(7, Way::Pending));
        let letters = [TURN..RECEIVED, RECEIVED..SENT, SENT..SENT + LETTER];
        let mut all: Vec<Range<usize>> = [CONTROL, INPUT, bits, OUTPUT].into();
        all.extend(letters);
        all.extend(heads);
        all.extend(large);
        for number in [3, 4, last] {
            all.extend(rooms(number));
        }
        all.sort_by_key(|range| range.start);
        for pair in all.windows(2) {
            assert!(
                !pair[0].is_empty() && pair[0].end <= pair[1].start,
                "{pair:?}"
            );
        }
        let size = size(5).get();
        assert!(has_slot(size, 4) && !has_slot(size, 5));
        assert!(!has_slot(WITHOUT_SLOTS.get(), 0));
        assert!(WITHOUT_SLOTS.get() >= INPUT.end);
        for room in [Room::Few, Room::More, Room::Large(7)] {
            assert_eq!(Room::of(room.word()), room);
        }
    }

    #[test]
    fn a_page_has_the_bits_of_the_slots_that_lie_on_it() {
        for number in [0, 1, 3, 4, 62, 63, 64, 130, MOST_SLOTS - 1] {
            let (page, bits) = page(number);
            let (word, bit) = used(number);
            assert!(page.start.is_multiple_of(PAGE) && bits & bit != 0);
            for other in number.saturating_sub(130)..number + 130 {
                let lies_there = page.contains(&slot(other).start);
                let (its_word, its_bit) = used(other);
                assert_eq!(
                    its_word == word && bits & its_bit != 0,
                    lies_there,
                    "{number} {other}"
                );
            }
        }
    }
}
