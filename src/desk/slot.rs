//! What a client has on its way behind its turn: bytes that were read and not worked on, and replies that
//! were not sent. They lie here alone. A slot is found by the number of the client's descriptor and says whose
//! it is: what an earlier client with the same number left there means nothing.
//!
//! A slot has two heads, and one word says which of them counts. New bytes are written behind those that
//! count, or where none do; then the other head; then the word. Whatever interrupts that, one of the two
//! states is whole. A client that sends a long frame byte by byte costs a byte and a head each time.

use std::collections::BTreeSet;
use std::ops::Range;

use super::layout::{self, LARGE_COUNT, MOST_SLOTS, Room, Way};
use crate::host::shared::Shared;

/// Which head counts: its number plus one, changed with each new state.
const COUNT_AT: usize = 0;
const HEADS_AT: usize = WORD;
/// A head: whose and which step's, flags, and where the bytes of both directions are.
const HEAD: usize = 7 * WORD;
const WORD: usize = size_of::<u64>();
const _: () = assert!(HEADS_AT + 2 * HEAD <= layout::FEW_PENDING);
/// Whoever has waited less than this many bytes behind what is done with stays where it is.
const LITTLE: usize = 4096;

/// What is done with of a long message is given back in pieces of this size.
const PIECE: usize = 32 * 1024;

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

/// What becomes of the bytes of one direction: some of the front are done with, others follow, and of the end
/// some may be dropped.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// How many of those that are there are done with.
    pub done: usize,
    /// What follows behind them.
    pub more: &'a [u8],
    /// How many of those that are left are kept.
    pub kept: usize,
}

/// The places for long messages: who has which. And whose memory may be given back.
#[derive(Debug, Default)]
pub struct Places {
    taken: Vec<Option<(usize, Way)>>,
    /// Slots whose memory may be given back.
    left: BTreeSet<usize>,
    /// Slots that had messages longer than they have room for themselves.
    long: BTreeSet<usize>,
}

impl Places {
    /// As the slots say that were written. Whoever died while it wrote one, the last, has perhaps not said so.
    pub fn find(memory: &Shared, last: Option<usize>) -> Places {
        let mut places = Places::default();
        places.left.extend(last);
        places.long.extend(last);
        for number in numbers(memory) {
            if let Some(slot) = load(memory, number) {
                places.take(number, &slot);
            }
            places.left.insert(number);
            places.long.insert(number);
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

    /// A slot is not used any more, if it was. What a long message takes is given back at once: as many
    /// clients may come and go as there is time for.
    pub fn leave(&mut self, memory: &Shared, number: usize) {
        if self.long.contains(&number) {
            self.free(memory, number);
        } else if load(memory, number).is_some() {
            self.left.insert(number);
        }
    }

    /// Whether there is something to be given back.
    pub fn has_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Gives back the memory of the slots that are not used any more; `is_used` says whose they could be.
    pub fn give_back(&mut self, memory: &Shared, mut is_used: impl FnMut(usize, u64) -> bool) {
        for number in std::mem::take(&mut self.left) {
            let slot = load(memory, number).filter(|slot| !slot.is_quiet());
            let Some(slot) = slot.filter(|slot| is_used(number, slot.who)) else {
                self.free(memory, number);
                continue;
            };
            // It will be looked at once more when it is quiet.
            for (way, held) in [(Way::Pending, slot.pending), (Way::Unsent, slot.unsent)] {
                if held.room != Room::More {
                    memory.give_back(Room::More.range(number, way));
                }
            }
            if slot.pending.room == Room::Few && slot.unsent.room == Room::Few {
                self.long.remove(&number);
            }
        }
    }

    /// Gives back the memory of a slot, or that of its page, when this was the last one there that was used.
    fn free(&mut self, memory: &Shared, number: usize) {
        self.left.remove(&number);
        if self.long.remove(&number) {
            self.let_go(memory, number, &Slot::default());
            for way in [Way::Pending, Way::Unsent] {
                memory.give_back(Room::More.range(number, way));
            }
        }
        // Behind that, so that whoever comes next, should this process die here, gives it back.
        let (word, bit) = layout::used(number);
        memory.clear_bits(word, bit);
        let (page, bits) = layout::page(number);
        if memory.load(word) & bits == 0 {
            memory.give_back(page);
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
        let done = change.done.min(old.len());
        // Of what follows, too, some may be done with.
        let more = change.more.get(change.done.saturating_sub(done)..);
        let more = more.unwrap_or_default();
        let of_old = old.len().saturating_sub(done).min(change.kept);
        let of_more = change.kept.saturating_sub(of_old).min(more.len());
        let more = more.get(..of_more).unwrap_or_default();
        let kept = of_old.saturating_add(of_more);
        if kept == 0 {
            return Some(Held::default());
        }
        let room = old.room.range(number, way);
        let start = old.start.saturating_add(done);
        let end = start.saturating_add(of_old);
        let grown = end.saturating_add(of_more);
        let is_behind = more.is_empty() || (end == old.end && grown <= room.len());
        let is_far = start > LITTLE && start >= kept.saturating_mul(2);
        if of_old > 0 && is_behind && !is_far {
            let is_written = memory.write(room.start.saturating_add(end), more);
            return is_written.then_some(Held {
                room: old.room,
                start,
                end: grown,
            });
        }
        let from = room.start.saturating_add(start);
        let (room, start) = self.find_room(number, way, old, kept)?;
        let place = room.range(number, way).start.saturating_add(start);
        let is_written =
            memory.copy(from, place, of_old) && memory.write(place.saturating_add(of_old), more);
        is_written.then_some(Held {
            room,
            start,
            end: start.saturating_add(kept),
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
        let is_long = |held: &Held| held.room != Room::Few;
        let of_both = [Some(old.pending), Some(old.unsent), pending, unsent];
        let is_long = of_both.iter().flatten().any(is_long);
        if is_long {
            self.long.insert(number);
        }
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
        if is_long {
            self.take(number, &new);
            self.let_go(memory, number, &new);
            for (way, old, new) in [
                (Way::Pending, old.pending, new.pending),
                (Way::Unsent, old.unsent, new.unsent),
            ] {
                let room = old.room.range(number, way);
                let at = |piece: usize| {
                    let offset = piece.saturating_mul(PIECE);
                    room.start.saturating_add(offset)
                };
                let pieces = old.start / PIECE..new.start / PIECE;
                if new.room == old.room && old.room != Room::Few && !pieces.is_empty() {
                    memory.give_back(at(pieces.start)..at(pieces.end));
                } else if new.room != old.room && old.room == Room::More && old.end >= PIECE {
                    // What is less waits until it is worth a system call.
                    memory.give_back(room);
                }
            }
        }
        let has_left = |old: Held, new: Held| old.room == Room::More && new.room != Room::More;
        if has_left(old.pending, pending) || has_left(old.unsent, unsent) || new.is_quiet() {
            self.left.insert(number);
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
    let slot = layout::slot(number).start;
    let count = memory.load(slot.saturating_add(COUNT_AT));
    if count == 0 {
        return None;
    }
    let head = head_at(slot, count);
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
    let start = layout::slot(number).start;
    let count_at = start.saturating_add(COUNT_AT);
    // Of one that is used for the first time since its page was: a number that is not 0, and no matter which.
    let count = memory.load(count_at).wrapping_add(1).max(1);
    let head = head_at(start, count);
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

fn head_at(slot: usize, count: u64) -> usize {
    let which = if count.is_multiple_of(2) { 0 } else { HEAD };
    slot.saturating_add(HEADS_AT).saturating_add(which)
}

/// The bytes of one direction, at most so many of the front.
pub fn bytes(memory: &Shared, number: usize, way: Way, held: Held, most: usize) -> Vec<u8> {
    let range = held.room.range(number, way);
    let end = held.end.min(held.start.saturating_add(most));
    let end = range.start.saturating_add(end).min(range.end);
    let place: Range<usize> = range.start.saturating_add(held.start).min(end)..end;
    memory.read(place)
}

/// The same of what a slot says, whoever's it is; nothing if it says nothing.
pub fn front(memory: &Shared, number: usize, way: Way, most: usize) -> Vec<u8> {
    let slot = load(memory, number).unwrap_or_default();
    let held = match way {
        Way::Pending => slot.pending,
        Way::Unsent => slot.unsent,
    };
    bytes(memory, number, way, held, most)
}
