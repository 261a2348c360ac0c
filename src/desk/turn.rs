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
use super::slot::{self, Change, Places, Slot};
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
    memory.store(BEGUN_AT, (done as u64).saturating_add(1));
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
    /// All that waits now.
    pub pending: &'a [u8],
    /// All that is unsent now.
    pub unsent: &'a [u8],
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
    let is_quiet = end.pending.is_empty() && end.unsent.is_empty() && !end.closing;
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
    let pending = change(known.pending.len(), end.received, end.done, end.pending);
    let unsent = change(known.unsent.len(), end.replies, end.sent, end.unsent);
    places.store(memory, number, head, (pending, unsent))
}

/// What becomes of bytes of which `before` were there and `more` came, if so many of them are done with
/// and `whole` is what there is now.
fn change<'a>(before: usize, more: &'a [u8], done: usize, whole: &'a [u8]) -> Change<'a> {
    let kept = before.saturating_sub(done).min(whole.len());
    let more = more.get(done.saturating_sub(before)..).unwrap_or_default();
    let new = whole.len().saturating_sub(kept);
    Change {
        done: done.min(before),
        more: more.get(..new).unwrap_or_default(),
        whole,
    }
}

/// Leaves a client's slot with this, whatever was in it, and nothing to be added by the last step. False if
/// there is no room for it.
pub fn settle(memory: &Shared, places: &mut Places, whose: Whose, rest: &Rest) -> bool {
    let is_quiet = rest.pending.is_empty() && rest.unsent.is_empty() && !rest.closing;
    let is_known = slot::load(memory, whose.number).is_some_and(|slot| slot.who == whose.who);
    let is_turn = whose_turn(memory) == Some(whose);
    if !outlives(memory) || (is_quiet && !is_known) {
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
    let whole = |bytes| Change {
        done: 0,
        more: bytes,
        whole: bytes,
    };
    let is_stored = places.store(
        memory,
        whose.number,
        head,
        (whole(&rest.pending), whole(&rest.unsent)),
    );
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
    let bytes = |way, held| slot::bytes(memory, whose.number, way, held);
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
