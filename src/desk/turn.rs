//! The turn in progress, and what a client has on its way when its reactor dies in the middle of it.
//!
//! A turn goes in steps: something is received, frames are worked on one by one, replies are sent. What is
//! true of a client is always what its slot says (nothing, most often) and what the step that is going on
//! adds to it:
//!
//! ```text
//! waiting = (slot's ++ received)[done ..]
//! unsent  = (slot's ++ replies)[sent ..]
//! ```
//!
//! The kernel itself writes down how much was received and sent; how much is done, and how many bytes of
//! replies there are, is one word, stored behind each frame. At the end of a step the slot is left in its new
//! state, which names the step: from that one store on, the step adds nothing any more. A client that has
//! nothing on its way has no slot, and a step that leaves it so touches none.
//!
//! [`rest`] puts this together, as often as it is asked, and changes nothing.

use super::layout::{INPUT, OUTPUT, READ_SIZE, RECEIVED, SENT, TURN, Way};
use super::slot::{self, Change, Held, Places, Slot};
use crate::host::errno::Errno;
use crate::host::shared::{Shared, Word};
use crate::host::stream::{self, Received};

/// The step that is going on, or the last one that was; 0 if there was none.
const STEP_AT: usize = TURN;
/// The number of the step that the words behind it are about; 0 while they are written.
const ACTIVE_AT: usize = TURN + 8;
const NUMBER_AT: usize = TURN + 16;
const WHO_AT: usize = TURN + 24;
/// How many bytes are done, how many bytes of replies there are, and whether the connection ends.
const DONE_AT: usize = TURN + 32;
/// Where the frame begins that is being worked on, plus one.
const BEGUN_AT: usize = TURN + 40;
/// Where the ledger was then.
const LEDGER_AT: usize = TURN + 48;
/// Whether a file is being made for it.
const MAKING_AT: usize = TURN + 56;
/// How often it was tried to find out what became of it.
const TRIES_AT: usize = TURN + 64;

const CLOSING: u64 = 1 << 63;
const LOW: u64 = 0xffff_ffff;

/// Whose turn it is: the number of its descriptor, and what tells it from every other client that has or had
/// this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whose {
    /// The descriptor's number.
    pub number: usize,
    /// Not zero.
    pub who: u64,
}

/// What a client has on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// Read and not worked on.
    pub pending: Vec<u8>,
    /// Descriptors came with the last byte of `pending`.
    pub descriptors_at_end: bool,
    /// How many descriptors of the call at the front of `pending` have arrived.
    pub arrived: u32,
    /// How many reactors died of the frame at the front of `pending`.
    pub deaths: u8,
    /// Replies not sent yet.
    pub unsent: Vec<u8>,
    /// Whether the connection ends when they are sent.
    pub closing: bool,
}

/// The frame at the front was being worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// Where the ledger was before.
    pub ledger: u64,
    /// Whether a file was being made, and nobody wrote down since that it was locked.
    pub making: bool,
}

/// Whether somebody finds what is left on this desk.
pub fn outlives(memory: &Shared) -> bool {
    memory.size() > OUTPUT.end
}

/// Begins a step: whatever the last one added to its client's slot is in it.
pub fn begin(memory: &Shared, whose: Whose) {
    let step = memory.load(STEP_AT).saturating_add(1);
    memory.store(ACTIVE_AT, 0);
    memory.store(NUMBER_AT, whose.number as u64);
    memory.store(WHO_AT, whose.who);
    memory.store(DONE_AT, 0);
    memory.store(BEGUN_AT, 0);
    stream::blank(memory, RECEIVED);
    stream::blank(memory, SENT);
    memory.store(STEP_AT, step);
    memory.store(ACTIVE_AT, step);
}

/// No step goes on, and no client is left with what the last one added.
pub fn none(memory: &Shared) {
    memory.store(ACTIVE_AT, 0);
}

/// Receives what there is from a socket; it is copied to `input`.
///
/// # Errors
/// Those of recvmmsg(2).
pub fn receive(memory: &Shared, socket: i32, input: &mut [u8]) -> Result<Received, Errno> {
    let received = stream::receive(socket, memory, RECEIVED, INPUT)?;
    if let Some(input) = input.get_mut(..received.bytes) {
        memory.read_into(INPUT.start, input);
    }
    Ok(received)
}

/// Sends what a socket takes, once in a step.
///
/// # Errors
/// Those of sendmmsg(2).
pub fn send(memory: &Shared, socket: i32, bytes: &[u8]) -> Result<usize, Errno> {
    stream::send(socket, memory, SENT, bytes)
}

/// The frame behind so many bytes is begun, with the ledger at this place.
pub fn frame_begins(memory: &Shared, done: usize, ledger: u64) {
    memory.store(LEDGER_AT, ledger);
    memory.store(MAKING_AT, 0);
    memory.store(TRIES_AT, 0);
    memory.store(BEGUN_AT, (done as u64).saturating_add(1));
}

/// It is about to be found out what became of the frame that was being worked on; how often it was before.
pub fn is_tried(memory: &Shared) -> u64 {
    let tries = memory.load(TRIES_AT);
    memory.store(TRIES_AT, tries.saturating_add(1));
    tries
}

/// A frame is done, and what it asked for: so many bytes were worked on, and the replies are `output`, of
/// which those behind `known` are new. False if there is no room for them.
pub fn frame_is_done(
    memory: &Shared,
    done: usize,
    output: &[u8],
    known: usize,
    closing: bool,
) -> bool {
    if !outlives(memory) {
        return true;
    }
    let more = output.get(known..).unwrap_or_default();
    if output.len() > OUTPUT.len() || !memory.write(OUTPUT.start.saturating_add(known), more) {
        return false;
    }
    let closing = if closing { CLOSING } else { 0 };
    let word = (done as u64 & LOW) | (output.len() as u64) << 32 | closing;
    memory.store(DONE_AT, word);
    true
}

/// Where whoever makes a file for the frame that is being worked on notes it.
pub fn making(memory: &Shared) -> Word<'_> {
    memory.lend(MAKING_AT)
}

/// Gives back the memory that long replies took.
pub fn give_back(memory: &Shared) {
    memory.give_back(OUTPUT);
}

/// The step that goes on or went on last.
pub fn step(memory: &Shared) -> u64 {
    memory.load(STEP_AT)
}

/// How a client's step ended: what it worked on, made and sent, and what there is now.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Bytes that were received.
    pub received: &'a [u8],
    /// How many bytes were worked on, of those that waited and were received.
    pub done: usize,
    /// Replies that were made.
    pub replies: &'a [u8],
    /// How many bytes were sent, of those that were unsent and made.
    pub sent: usize,
    /// How many bytes wait now.
    pub pending: usize,
    /// How many bytes are unsent now.
    pub unsent: usize,
    /// Descriptors came with the last byte that waits.
    pub descriptors_at_end: bool,
    /// How many of the descriptors of the call at the front have arrived.
    pub arrived: u32,
    /// Whether the connection ends when everything is sent.
    pub closing: bool,
}

/// Leaves a client's slot as a step leaves the client. False if there is no room for what it has on its
/// way.
pub fn end(memory: &Shared, places: &mut Places, whose: Whose, end: &End<'_>) -> bool {
    let Whose { number, who } = whose;
    let known = slot::load(memory, number).filter(|slot| slot.who == who);
    let is_quiet = end.pending == 0 && end.unsent == 0 && !end.closing;
    if !outlives(memory) || (is_quiet && known.is_none()) {
        return true;
    }
    let known = known.unwrap_or_default();
    let head = Slot {
        who,
        step: step(memory),
        descriptors_at_end: end.descriptors_at_end,
        arrived: end.arrived,
        deaths: if end.done == 0 { known.deaths } else { 0 },
        closing: end.closing,
        ..Slot::default()
    };
    let pending = Change {
        done: end.done,
        more: end.received,
        kept: end.pending,
    };
    let unsent = Change {
        done: end.sent,
        more: end.replies,
        kept: end.unsent,
    };
    places.store(memory, number, head, (pending, unsent))
}

/// Leaves a client's slot with this, whatever was in it, and nothing to be added by the last step. False if
/// there is no room for it.
pub fn settle(memory: &Shared, places: &mut Places, whose: Whose, rest: &Rest) -> bool {
    let is_quiet = rest.pending.is_empty() && rest.unsent.is_empty() && !rest.closing;
    let known = slot::load(memory, whose.number).filter(|slot| slot.who == whose.who);
    let is_turn = whose_turn(memory) == Some(whose);
    if !outlives(memory) || (is_quiet && known.is_none()) {
        if is_turn {
            none(memory);
        }
        return true;
    }
    let head = Slot {
        who: whose.who,
        step: step(memory),
        descriptors_at_end: rest.descriptors_at_end,
        arrived: rest.arrived,
        deaths: rest.deaths,
        closing: rest.closing,
        ..Slot::default()
    };
    let known = known.unwrap_or_default();
    let all_of = |bytes, instead_of: Held| Change {
        done: instead_of.len(),
        more: bytes,
        kept: bytes.len(),
    };
    let changes = (
        all_of(&rest.pending, known.pending),
        all_of(&rest.unsent, known.unsent),
    );
    let is_stored = places.store(memory, whose.number, head, changes);
    if is_stored && is_turn {
        none(memory);
    }
    is_stored
}

/// How many reactors died of the frame that waits at the front.
pub fn deaths(memory: &Shared, whose: Whose) -> u8 {
    let slot = slot::load(memory, whose.number).filter(|slot| slot.who == whose.who);
    slot.map_or(0, |slot| slot.deaths)
}

/// Whose turn it was when the reactor died, if what its last step added may be missing in its slot.
pub fn whose_turn(memory: &Shared) -> Option<Whose> {
    (memory.load(ACTIVE_AT) != 0).then(|| Whose {
        number: usize::try_from(memory.load(NUMBER_AT)).unwrap_or(usize::MAX),
        who: memory.load(WHO_AT),
    })
}

/// Where the ledger was when the call was begun that was being worked on, if there is one.
pub fn ledger_before(memory: &Shared) -> Option<u64> {
    let (_, interrupted) = rest(memory, whose_turn(memory)?)?;
    Some(interrupted?.ledger)
}

/// What a client has on its way; whether the frame at its front was being worked on. `None` if nothing
/// is known of it: then it has nothing.
pub fn rest(memory: &Shared, whose: Whose) -> Option<(Rest, Option<Interrupted>)> {
    let slot = slot::load(memory, whose.number).filter(|slot| slot.who == whose.who);
    let step = memory.load(ACTIVE_AT);
    let is_told = slot.is_some_and(|slot| slot.step == step);
    let adds = whose_turn(memory) == Some(whose) && !is_told;
    if slot.is_none() && !adds {
        return None;
    }
    let slot = slot.unwrap_or_default();
    let bytes = |way, held| slot::bytes(memory, whose.number, way, held, usize::MAX);
    let mut rest = Rest {
        pending: bytes(Way::Pending, slot.pending),
        descriptors_at_end: slot.descriptors_at_end,
        arrived: slot.arrived,
        deaths: slot.deaths,
        unsent: bytes(Way::Unsent, slot.unsent),
        closing: slot.closing,
    };
    if !adds {
        return Some((rest, None));
    }
    let received = stream::moved(memory, RECEIVED);
    if let Some(received) = received.filter(|received| received.bytes > 0) {
        let length = received.bytes.min(READ_SIZE);
        let end = INPUT.start.saturating_add(length);
        rest.pending.extend(memory.read(INPUT.start..end));
        rest.descriptors_at_end = received.descriptors;
    }
    let word = memory.load(DONE_AT);
    let (done, replies) = ((word & LOW) as usize, ((word & !CLOSING) >> 32) as usize);
    if done > 0 {
        rest.pending.drain(..done.min(rest.pending.len()));
        (rest.arrived, rest.deaths) = (0, 0);
    }
    let end = OUTPUT.start.saturating_add(replies);
    rest.unsent.extend(memory.read(OUTPUT.start..end));
    let sent = stream::moved(memory, SENT).map_or(0, |sent| sent.bytes);
    rest.unsent.drain(..sent.min(rest.unsent.len()));
    if word & CLOSING != 0 {
        rest.closing = true;
    }
    if rest.closing {
        rest.pending.clear();
    }
    let is_begun = memory.load(BEGUN_AT) == (done as u64).saturating_add(1);
    let interrupted = is_begun.then(|| Interrupted {
        ledger: memory.load(LEDGER_AT),
        making: memory.load(MAKING_AT) != 0,
    });
    Some((rest, interrupted))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::desk::Desk;
    use crate::desk::layout::{self, Room};

    const WHOSE: Whose = Whose { number: 3, who: 5 };

    fn desk() -> Desk {
        Desk::new(layout::size(16)).unwrap()
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    fn put(mut socket: &UnixStream, bytes: &[u8]) {
        std::io::Write::write_all(&mut socket, bytes).unwrap();
    }

    fn pending(bytes: &[u8]) -> Rest {
        Rest {
            pending: bytes.to_vec(),
            ..Rest::default()
        }
    }

    fn unsent(bytes: &[u8]) -> Rest {
        Rest {
            unsent: bytes.to_vec(),
            ..Rest::default()
        }
    }

    /// What is left, asked twice: to ask changes nothing.
    fn left(memory: &Shared) -> (Rest, Option<Interrupted>) {
        let left = rest(memory, WHOSE).unwrap_or_default();
        assert_eq!(rest(memory, WHOSE).unwrap_or_default(), left);
        let other = Whose { who: 6, ..WHOSE };
        assert_eq!(
            rest(memory, other),
            None,
            "nothing of it is another client's"
        );
        left
    }

    fn end_of(end: End<'_>, memory: &Shared, places: &mut Places) {
        assert!(super::end(memory, places, WHOSE, &end));
    }

    const QUIET: End<'static> = End {
        received: b"",
        done: 0,
        replies: b"",
        sent: 0,
        pending: 0,
        unsent: 0,
        descriptors_at_end: false,
        arrived: 0,
        closing: false,
    };

    #[test]
    fn at_each_step_of_a_turn_what_is_left_is_what_is_not_done() {
        let desk = desk();
        let memory = desk.memory();
        let (ours, theirs) = pair();
        let socket = ours.as_raw_fd();
        put(&theirs, b"first second half");
        begin(memory, WHOSE);
        assert_eq!(left(memory), (Rest::default(), None));
        let mut input = [0; READ_SIZE];
        assert_eq!(receive(memory, socket, &mut input).unwrap().bytes, 17);
        assert_eq!(&input[..17], b"first second half");
        assert_eq!(left(memory), (pending(b"first second half"), None));
        frame_begins(memory, 0, 77);
        let mut interrupted = Interrupted {
            ledger: 77,
            making: false,
        };
        let all = pending(b"first second half");
        assert_eq!(left(memory), (all.clone(), Some(interrupted)));
        making(memory).store(1);
        interrupted.making = true;
        assert_eq!(left(memory), (all, Some(interrupted)));
        assert_eq!(ledger_before(memory), Some(77));
        assert!(frame_is_done(memory, 6, b"one.", 0, false));
        let expected = Rest {
            pending: b"second half".to_vec(),
            ..unsent(b"one.")
        };
        assert_eq!(left(memory), (expected.clone(), None));
        frame_begins(memory, 6, 78);
        let interrupted = Interrupted {
            ledger: 78,
            making: false,
        };
        assert_eq!(left(memory), (expected, Some(interrupted)));
        assert!(frame_is_done(memory, 13, b"one.two.", 4, false));
        let expected = Rest {
            pending: b"half".to_vec(),
            ..unsent(b"one.two.")
        };
        assert_eq!(left(memory), (expected, None));
        assert_eq!(send(memory, socket, b"one.two."), Ok(8));
        assert_eq!(left(memory), (pending(b"half"), None));
        let mut places = Places::default();
        let end = End {
            received: &input[..17],
            done: 13,
            replies: b"one.two.",
            sent: 8,
            pending: 4,
            ..QUIET
        };
        end_of(end, memory, &mut places);
        assert_eq!(left(memory), (pending(b"half"), None));
        // The slot has it: the step adds nothing any more, and neither does the next one yet.
        begin(memory, WHOSE);
        assert_eq!(left(memory), (pending(b"half"), None));
        put(&theirs, b" a frame");
        assert_eq!(receive(memory, socket, &mut input).unwrap().bytes, 8);
        assert_eq!(left(memory), (pending(b"half a frame"), None));
        frame_begins(memory, 0, 79);
        assert!(frame_is_done(memory, 12, b"three", 0, true));
        let expected = Rest {
            closing: true,
            ..unsent(b"three")
        };
        assert_eq!(left(memory), (expected, None));
    }

    #[test]
    fn a_client_without_anything_on_its_way_has_no_slot() {
        let desk = desk();
        let memory = desk.memory();
        let (ours, theirs) = pair();
        put(&theirs, b"call");
        let mut places = Places::default();
        for _ in 0..2 {
            begin(memory, WHOSE);
            let _ = receive(memory, ours.as_raw_fd(), &mut [0; READ_SIZE]);
            end_of(QUIET, memory, &mut places);
            assert_eq!(slot::numbers(memory).count(), 0);
        }
        begin(memory, WHOSE);
        let end = End {
            received: b"ca",
            pending: 2,
            ..QUIET
        };
        end_of(end, memory, &mut places);
        assert_eq!(slot::numbers(memory).collect::<Vec<_>>(), [3]);
        begin(memory, WHOSE);
        end_of(End { done: 2, ..QUIET }, memory, &mut places);
        assert_eq!(left(memory), (Rest::default(), None));
        none(memory);
        places.give_back(memory, |_, who| who == WHOSE.who);
        assert_eq!(slot::numbers(memory).count(), 0);
        assert_eq!(rest(memory, WHOSE), None);
    }

    #[test]
    fn a_frame_that_comes_byte_by_byte_is_not_copied_with_each() {
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let mut waiting = Vec::new();
        for byte in 0..20_000u32 {
            begin(memory, WHOSE);
            let byte = [byte as u8];
            waiting.extend(byte);
            let end = End {
                received: &byte,
                pending: waiting.len(),
                ..QUIET
            };
            end_of(end, memory, &mut places);
            let held = slot::load(memory, 3).unwrap().pending;
            assert_eq!(held.len(), waiting.len());
            // Had it been moved it would begin behind what counted before.
            assert!(format!("{held:?}").contains("start: 0,"), "{held:?}");
        }
        assert_eq!(left(memory), (pending(&waiting), None));
    }

    /// Numbers by chance, below a limit each.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (self.0 >> 33) as usize % limit
        }
    }

    /// As if a reactor had received, worked on and sent so much.
    fn is_worked_on(memory: &Shared, end: &End<'_>) {
        let (ours, theirs) = pair();
        let socket = ours.as_raw_fd();
        if !end.received.is_empty() {
            put(&theirs, end.received);
            let received = receive(memory, socket, &mut [0; READ_SIZE]);
            assert_eq!(received.map(|it| it.bytes), Ok(end.received.len()));
        }
        assert!(frame_is_done(memory, end.done, end.replies, 0, false));
        if end.sent > 0 {
            // Whatever is sent: only the number counts.
            assert_eq!(send(memory, socket, &vec![0; end.sent]), Ok(end.sent));
        }
    }

    /// Turns of a few clients on one page, whose bytes on their way are long and short, cut off at each store
    /// that ends a step, settles a client or gives memory back: whoever comes next finds all that was there.
    #[test]
    fn wherever_a_reactor_dies_the_next_one_finds_what_clients_have_on_their_way() {
        const CLIENTS: usize = 5;
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let mut chance = Chance(1);
        let mut clients = [(); CLIENTS].map(|()| Rest::default());
        let mut generation = 5;
        let of = |generation: u64, number: usize| Whose {
            number,
            who: generation + number as u64,
        };
        let mut deaths = [0usize; 4];
        for round in 0..6000usize {
            let is_left = |clients: &[Rest]| {
                for (number, expected) in clients.iter().enumerate() {
                    let left = rest(memory, of(generation, number)).unwrap_or_default().0;
                    assert!(left == *expected, "{round}: client {number}");
                }
            };
            let number = chance.below(CLIENTS);
            let dies_after = (chance.below(3) == 0).then(|| chance.below(20));
            let action = chance.below(10);
            match action {
                0 => {
                    none(memory);
                    memory.dies_after(dies_after);
                    places.give_back(memory, |number, who| of(generation, number).who == who);
                }
                1 => {
                    memory.dies_after(dies_after);
                    let rest = clients[number].clone();
                    assert!(settle(memory, &mut places, of(generation, number), &rest));
                }
                _ => {
                    let client = &mut clients[number];
                    let size = [10, 100, 300, 600, 3000, 8000][chance.below(6)];
                    let long = if chance.below(8) == 0 { 100_000 } else { size };
                    let byte = round as u8;
                    let received = vec![byte; chance.below(size)];
                    let replies = vec![!byte; chance.below(long)];
                    let mut some_of = |bytes: &mut Vec<u8>| {
                        let count = if chance.below(3) == 0 {
                            bytes.len()
                        } else {
                            chance.below(bytes.len() + 1)
                        };
                        bytes.drain(..count).count()
                    };
                    client.pending.extend(&received);
                    let done = some_of(&mut client.pending);
                    client.unsent.extend(&replies);
                    // A socket takes only so much.
                    let sent = if client.unsent.len() < 100_000 {
                        some_of(&mut client.unsent)
                    } else {
                        0
                    };
                    let mut end = End {
                        received: &received,
                        done,
                        replies: &replies,
                        sent,
                        pending: client.pending.len(),
                        unsent: client.unsent.len(),
                        ..QUIET
                    };
                    begin(memory, of(generation, number));
                    is_worked_on(memory, &end);
                    is_left(&clients);
                    // The byte of a descriptor may be left out, that of a call that waits.
                    let may_lack = dies_after.is_none() && end.pending > 1;
                    if may_lack && chance.below(4) == 0 {
                        clients[number].pending.pop();
                        end.pending = clients[number].pending.len();
                    }
                    memory.dies_after(dies_after);
                    assert!(super::end(
                        memory,
                        &mut places,
                        of(generation, number),
                        &end
                    ));
                }
            }
            let died = memory.is_dead();
            memory.dies_after(None);
            is_left(&clients);
            if died {
                deaths[action.min(2)] += 1;
                // The next reactor: it looks first, and settles whose turn it was.
                let last = whose_turn(memory);
                places = Places::find(memory, last.map(|it| it.number));
                if let Some(last) = last {
                    let (rest, _) = rest(memory, last).unwrap_or_default();
                    assert!(settle(memory, &mut places, last, &rest));
                }
                is_left(&clients);
            }
            if chance.below(40) == 0 {
                // They all go, and others come that have the same numbers.
                none(memory);
                memory.dies_after((chance.below(2) == 0).then(|| chance.below(20)));
                (0..CLIENTS).for_each(|number| places.leave(memory, number));
                deaths[3] += usize::from(memory.is_dead());
                memory.dies_after(None);
                places = Places::find(memory, None);
                generation += 100;
                clients.fill(Rest::default());
            }
        }
        assert!(deaths.iter().all(|count| *count > 20), "{deaths:?}");
        // They are all gone.
        none(memory);
        (0..CLIENTS).for_each(|number| places.leave(memory, number));
        places.give_back(memory, |_, _| false);
        assert_eq!(slot::numbers(memory).count(), 0);
    }

    #[test]
    fn a_page_is_given_back_with_the_last_slot_on_it() {
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let written = |number| {
            let bytes = memory.read(layout::slot(number));
            bytes.iter().any(|byte| *byte != 0)
        };
        let of = |number| Whose { number, who: 9 };
        for number in [4, 6, 8] {
            assert!(settle(memory, &mut places, of(number), &pending(b"half")));
        }
        let mut give_back = |used: &[usize]| {
            for number in 0..12 {
                places.leave(memory, number);
            }
            places.give_back(memory, |number, _| used.contains(&number));
        };
        give_back(&[4, 6, 8]);
        assert!(written(4) && written(6) && written(8));
        give_back(&[6, 8]);
        assert!(written(6), "it lies beside one that is not used");
        assert_eq!(rest(memory, of(4)), None);
        assert_eq!(rest(memory, of(6)), Some((pending(b"half"), None)));
        give_back(&[8]);
        assert!(!written(4) && !written(6) && written(8));
    }

    #[test]
    fn a_long_message_takes_no_memory_when_it_is_done() {
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let long = vec![1; 100_000];
        assert!(settle(memory, &mut places, WHOSE, &pending(&long)));
        let room = Room::More.range(WHOSE.number, Way::Pending);
        let written = |range: Range<usize>| memory.read(range).contains(&1);
        // Most of it is, and then all.
        for (done, is_left) in [(70_000, true), (30_000, false)] {
            begin(memory, WHOSE);
            let left = if is_left { 30_000 } else { 0 };
            let end = End {
                done,
                pending: left,
                ..QUIET
            };
            end_of(end, memory, &mut places);
            assert!(!written(room.start..room.start + 64 * 1024));
            assert_eq!(written(room.clone()), is_left);
            assert_eq!(self::left(memory), (pending(&long[..left]), None));
        }
    }

    #[test]
    fn a_long_message_takes_no_memory_when_its_client_is_gone() {
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let long = vec![1; 100_000];
        assert!(settle(memory, &mut places, WHOSE, &pending(&long)));
        let room = Room::More.range(WHOSE.number, Way::Pending);
        let written = || memory.read(room.clone()).contains(&1);
        assert!(written());
        none(memory);
        places.leave(memory, WHOSE.number);
        assert!(!written());
        // Of one that had been written and nothing said so when the process died, too.
        begin(memory, WHOSE);
        memory.dies_after(Some(2));
        assert!(settle(memory, &mut places, WHOSE, &pending(&long)));
        memory.dies_after(None);
        assert!(written() && slot::numbers(memory).count() == 0);
        let last = whose_turn(memory).map(|whose| whose.number);
        places = Places::find(memory, last);
        places.give_back(memory, |_, _| true);
        assert!(!written());
    }

    #[test]
    fn who_died_of_the_frame_at_the_front_is_counted_until_it_is_done() {
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let once = Rest {
            deaths: 1,
            ..pending(b"bad good")
        };
        begin(memory, WHOSE);
        assert!(settle(memory, &mut places, WHOSE, &once));
        assert_eq!(
            (left(memory), deaths(memory, WHOSE)),
            ((once.clone(), None), 1)
        );
        begin(memory, WHOSE);
        frame_begins(memory, 0, 7);
        assert_eq!(left(memory).0.deaths, 1);
        let end = End {
            pending: 8,
            ..QUIET
        };
        end_of(end, memory, &mut places);
        assert_eq!(deaths(memory, WHOSE), 1, "it waits yet");
        begin(memory, WHOSE);
        frame_begins(memory, 0, 7);
        assert!(frame_is_done(memory, 4, b"", 0, false));
        assert_eq!(left(memory).0, pending(b"good"));
        let end = End {
            done: 4,
            pending: 4,
            ..QUIET
        };
        end_of(end, memory, &mut places);
        assert_eq!(
            (left(memory).0, deaths(memory, WHOSE)),
            (pending(b"good"), 0)
        );
    }

    #[test]
    fn a_settlement_that_was_interrupted_is_made_again_from_the_same() {
        let desk = desk();
        let memory = desk.memory();
        let (ours, theirs) = pair();
        put(&theirs, b"call");
        begin(memory, WHOSE);
        let _ = receive(memory, ours.as_raw_fd(), &mut [0; READ_SIZE]);
        frame_begins(memory, 0, 7);
        let before = left(memory);
        // Another client's slot is settled first, and then this process dies.
        let other = Whose { number: 4, who: 9 };
        assert!(settle(
            memory,
            &mut Places::find(memory, None),
            other,
            &pending(b"other")
        ));
        assert_eq!(left(memory), before);
        assert_eq!(rest(memory, other), Some((pending(b"other"), None)));
        let mut places = Places::find(memory, None);
        assert!(settle(memory, &mut places, WHOSE, &before.0));
        assert_eq!(left(memory), (before.0, None));
    }

    #[test]
    fn a_slot_is_its_clients_alone_and_what_an_earlier_one_left_is_written_over() {
        let desk = desk();
        let memory = desk.memory();
        let mut places = Places::default();
        let earlier = Whose { who: 4, ..WHOSE };
        let long = vec![1; 300_000];
        assert!(settle(memory, &mut places, earlier, &pending(&long)));
        assert_eq!(rest(memory, WHOSE), None);
        begin(memory, WHOSE);
        let end = End {
            received: b"new",
            pending: 3,
            ..QUIET
        };
        end_of(end, memory, &mut places);
        assert_eq!(left(memory), (pending(b"new"), None));
        assert_eq!(rest(memory, earlier), None);
        none(memory);
        places.leave(memory, 3);
        places.give_back(memory, |_, _| false);
        assert_eq!(slot::numbers(memory).count(), 0);
    }

    #[test]
    fn at_a_desk_that_ends_with_its_process_turns_go_on_and_nothing_is_left() {
        let desk = Desk::private().unwrap();
        let memory = desk.memory();
        let (ours, theirs) = pair();
        put(&theirs, b"half");
        begin(memory, WHOSE);
        let mut input = [0; READ_SIZE];
        assert_eq!(
            receive(memory, ours.as_raw_fd(), &mut input).unwrap().bytes,
            4
        );
        assert!(frame_is_done(memory, 4, &[0; 1000], 0, false));
        assert_eq!(send(memory, ours.as_raw_fd(), b"reply"), Ok(5));
        let end = End {
            received: b"half",
            pending: 4,
            ..QUIET
        };
        end_of(end, memory, &mut Places::default());
        assert_eq!(slot::numbers(memory).count(), 0);
    }
}
