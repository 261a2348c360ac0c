//! What a client has on its way behind its turn: bytes that were read and not worked on, and replies that
//! were not sent. A slot is found by the number of the client's descriptor and says whose it is: what an
//! earlier client with the same number left there means nothing.
//!
//! A slot has two heads, and one word says which of them counts. New bytes are written behind those that
//! count, or where none do; then the other head; then the word. Whatever interrupts that, one of the two
//! states is whole. A client that sends a long frame byte by byte costs a byte and a head each time.

use std::ops::Range;

use super::layout::{self, LARGE_COUNT, MOST_SLOTS, Room, Way};
use crate::host::shared::Shared;

/// Which head counts: its number plus one, changed with each new state.
const COUNT_AT: usize = 0;
const HEADS_AT: usize = 64;
const HEAD: usize = 64;
const WORD: usize = size_of::<u64>();
/// Whoever has waited less than this many bytes behind what is done with stays where it is.
const LITTLE: usize = 4096;

/// Bytes in a room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    room: Room,
    start: usize,
    end: usize,
}

impl Held {
    /// How many.
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a slot's head says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Whose it is.
    pub who: u64,
    /// The step of a turn that left it so.
    pub step: u64,
    /// What was read and not worked on.
    pub pending: Held,
    /// Descriptors came with the last byte of it.
    pub descriptors_at_end: bool,
    /// How many of the descriptors of the call at its front have arrived.
    pub arrived: u32,
    /// How many reactors died of the frame at its front.
    pub deaths: u8,
    /// Replies that were not sent.
    pub unsent: Held,
    /// Whether the connection ends when they are sent.
    pub closing: bool,
}

/// What becomes of the bytes of one direction: some of the front are done with, and others follow.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// How many of those that are there are done with.
    pub done: usize,
    /// What follows behind them.
    pub more: &'a [u8],
    /// All that there is then.
    pub whole: &'a [u8],
}

/// The places for long messages: who has which.
#[derive(Debug, Default)]
pub struct Places {
    taken: Vec<Option<(usize, Way)>>,
    /// Slots whose memory may be given back.
    left: Vec<usize>,
}

impl Places {
    /// As the slots say that were written.
    pub fn find(memory: &Shared) -> Places {
        let mut places = Places::default();
        for number in numbers(memory) {
            if let Some(slot) = load(memory, number) {
                places.take(number, &slot);
            }
            places.left.push(number);
        }
        places
    }

    fn take(&mut self, number: usize, slot: &Slot) {
        for (way, held) in [(Way::Pending, slot.pending), (Way::Unsent, slot.unsent)] {
            if let Room::Large(place) = held.room
                && place < LARGE_COUNT
            {
                if self.taken.len() <= place {
                    self.taken.resize(place.saturating_add(1), None);
                }
                if let Some(taken) = self.taken.get_mut(place) {
                    *taken = Some((number, way));
                }
            }
        }
    }

    fn free_place(&self) -> Option<usize> {
        let free = self.taken.iter().position(Option::is_none);
        free.or_else(|| (self.taken.len() < LARGE_COUNT).then_some(self.taken.len()))
    }

    /// Gives back what a slot does not have any more.
    fn let_go(&mut self, memory: &Shared, number: usize, slot: &Slot) {
        let is_kept = |place, way| {
            let held = if way == Way::Pending {
                slot.pending
            } else {
                slot.unsent
            };
            held.room == Room::Large(place)
        };
        for (place, taken) in self.taken.iter_mut().enumerate() {
            if let Some((owner, way)) = *taken
                && owner == number
                && !is_kept(place, way)
            {
                memory.give_back(Room::Large(place).range(number, way));
                *taken = None;
            }
        }
    }

    /// A slot is not used any more, if it was.
    pub fn leave(&mut self, memory: &Shared, number: usize) {
        if load(memory, number).is_some() {
            self.left.push(number);
        }
    }

    /// Gives back the memory of the slots that are not used any more; `is_used` says whose they could be.
    pub fn give_back(&mut self, memory: &Shared, mut is_used: impl FnMut(usize, u64) -> bool) {
        let mut left = std::mem::take(&mut self.left);
        left.sort_unstable();
        left.dedup();
        for number in left {
            let Some(slot) = load(memory, number) else {
                continue;
            };
            let is_empty = slot.pending.is_empty() && slot.unsent.is_empty() && !slot.closing;
            if !is_empty && is_used(number, slot.who) {
                for (way, held) in [(Way::Pending, slot.pending), (Way::Unsent, slot.unsent)] {
                    if held.room != Room::More {
                        memory.give_back(Room::More.range(number, way));
                    }
                }
                // It will be looked at once more when it is empty.
                continue;
            }
            self.let_go(memory, number, &Slot::default());
            let (word, bit) = layout::used(number);
            memory.clear_bits(word, bit);
            memory.give_back(layout::page(number));
            for way in [Way::Pending, Way::Unsent] {
                memory.give_back(Room::More.range(number, way));
            }
        }
    }

    /// Where so many bytes can be written that nothing counts which is there.
    fn find_room(
        &self,
        number: usize,
        way: Way,
        old: Held,
        needed: usize,
    ) -> Option<(Room, usize)> {
        let large = self.free_place().map(Room::Large);
        let rooms = [Some(Room::Few), Some(Room::More), Some(old.room), large];
        rooms.into_iter().flatten().find_map(|room| {
            let size = room.range(number, way).len();
            let start = match (room == old.room, old.is_empty()) {
                (true, false) if needed <= old.start => 0,
                (true, false) => old.end,
                _ => 0,
            };
            (start.saturating_add(needed) <= size).then_some((room, start))
        })
    }

    /// Makes a change of the bytes of one direction, without touching those that count.
    fn change(
        &self,
        memory: &Shared,
        (number, way): (usize, Way),
        old: Held,
        change: Change<'_>,
    ) -> Option<Held> {
        let kept = change.whole.len().saturating_sub(change.more.len());
        let start = old.start.saturating_add(change.done);
        let end = start.saturating_add(kept);
        let size = old.room.range(number, way).len();
        let grown = end.saturating_add(change.more.len());
        let is_behind = change.more.is_empty() || (end == old.end && grown <= size);
        let is_far = start > LITTLE && start >= change.whole.len().saturating_mul(2);
        if change.whole.is_empty() {
            return Some(Held::default());
        }
        if kept > 0 && is_behind && !is_far {
            let place = old.room.range(number, way).start.saturating_add(end);
            return memory.write(place, change.more).then_some(Held {
                room: old.room,
                start,
                end: grown,
            });
        }
        let needed = change.whole.len();
        let (room, start) = self.find_room(number, way, old, needed)?;
        let place = room.range(number, way).start.saturating_add(start);
        memory.write(place, change.whole).then_some(Held {
            room,
            start,
            end: start.saturating_add(needed),
        })
    }

    /// Leaves a slot in a new state: `head` says all but where the bytes are. False if there is no
    /// room for them, and then it is as it was.
    pub fn store(
        &mut self,
        memory: &Shared,
        number: usize,
        head: Slot,
        (pending, unsent): (Change<'_>, Change<'_>),
    ) -> bool {
        let (word, bit) = layout::used(number);
        let was_used = memory.load(word) & bit != 0;
        let before = load(memory, number);
        let is_known = before.is_some_and(|slot| slot.who == head.who);
        let old = before.unwrap_or_default();
        // What another client left counts for nothing, and may be written over.
        let of_ours = |held: Held| if is_known { held } else { Held::default() };
        let pending = self.change(
            memory,
            (number, Way::Pending),
            of_ours(old.pending),
            pending,
        );
        // Each may need a place of its own.
        if let Some(held) = pending {
            let both = Slot {
                pending: held,
                unsent: old.unsent,
                ..head
            };
            self.take(number, &both);
        }
        let unsent = self.change(memory, (number, Way::Unsent), of_ours(old.unsent), unsent);
        let (Some(pending), Some(unsent)) = (pending, unsent) else {
            self.let_go(memory, number, &old);
            return false;
        };
        let new = Slot {
            pending,
            unsent,
            ..head
        };
        write_head(memory, number, &new);
        if !was_used {
            memory.set_bits(word, bit);
        }
        let is_large = [old.pending, old.unsent, pending, unsent]
            .iter()
            .any(|held| matches!(held.room, Room::Large(_)));
        if is_large {
            self.take(number, &new);
            self.let_go(memory, number, &new);
        }
        let has_left = |old: Held, new: Held| old.room == Room::More && new.room != Room::More;
        if has_left(old.pending, pending) || has_left(old.unsent, unsent) || new.is_quiet() {
            self.left.push(number);
        }
        true
    }
}

impl Slot {
    /// Whether nothing is on its way.
    pub fn is_quiet(&self) -> bool {
        self.pending.is_empty() && self.unsent.is_empty() && !self.closing
    }
}

/// The slots that may have been written.
pub fn numbers(memory: &Shared) -> impl Iterator<Item = usize> {
    (0..MOST_SLOTS.div_ceil(64))
        .map(|word| word.saturating_mul(64))
        .take_while(|first| layout::has_slot(memory.size(), *first))
        .flat_map(|first| {
            let bits = memory.load(layout::used(first).0);
            (0..64usize)
                .filter_map(move |at| (bits >> at & 1 != 0).then_some(first.saturating_add(at)))
        })
}

/// What a slot says. `None` if it was never written, or given back.
pub fn load(memory: &Shared, number: usize) -> Option<Slot> {
    if !layout::has_slot(memory.size(), number) {
        return None;
    }
    let (word, bit) = layout::used(number);
    if memory.load(word) & bit == 0 {
        return None;
    }
    let page = layout::page(number).start;
    let count = memory.load(page.saturating_add(COUNT_AT));
    if count == 0 {
        return None;
    }
    let head = head_at(page, count);
    let word = |at: usize| memory.load(head.saturating_add(at.saturating_mul(WORD)));
    let held = |at: usize| {
        let ends = word(at.saturating_add(1));
        Held {
            room: Room::of(word(at)),
            start: (ends & 0xffff_ffff) as usize,
            end: (ends >> 32) as usize,
        }
    };
    let flags = word(2);
    Some(Slot {
        who: word(0),
        step: word(1),
        descriptors_at_end: flags & 1 != 0,
        closing: flags & 2 != 0,
        deaths: (flags >> 8 & 0xff) as u8,
        arrived: (flags >> 32) as u32,
        pending: held(3),
        unsent: held(5),
    })
}

fn write_head(memory: &Shared, number: usize, slot: &Slot) {
    let page = layout::page(number).start;
    let count_at = page.saturating_add(COUNT_AT);
    let count = memory.load(count_at).wrapping_add(1).max(1);
    let head = head_at(page, count);
    let flags = u64::from(slot.descriptors_at_end)
        | u64::from(slot.closing) << 1
        | u64::from(slot.deaths) << 8
        | u64::from(slot.arrived) << 32;
    let ends = |held: Held| held.start as u64 | (held.end as u64) << 32;
    let words = [
        slot.who,
        slot.step,
        flags,
        slot.pending.room.word(),
        ends(slot.pending),
        slot.unsent.room.word(),
        ends(slot.unsent),
    ];
    for (at, word) in words.into_iter().enumerate() {
        memory.store(head.saturating_add(at.saturating_mul(WORD)), word);
    }
    memory.store(count_at, count);
}

fn head_at(page: usize, count: u64) -> usize {
    let which = if count.is_multiple_of(2) { 0 } else { HEAD };
    page.saturating_add(HEADS_AT).saturating_add(which)
}

/// The bytes of one direction.
pub fn bytes(memory: &Shared, number: usize, way: Way, held: Held) -> Vec<u8> {
    let range = held.room.range(number, way);
    let end = range.start.saturating_add(held.end).min(range.end);
    let place: Range<usize> = range.start.saturating_add(held.start).min(end)..end;
    memory.read(place)
}
