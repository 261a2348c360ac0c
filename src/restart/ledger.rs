//! The ledger: every change of lasting state, as one small event in a memory file.
//!
//! An event is appended before the reply that depends on it goes out, so at any moment the file
//! says all that a new image of the process must know; replaying it gives the [`State`]. When it
//! has grown to a multiple of the live state it is written anew. This module is the only one that
//! knows the encoding (bincode through serde); the fixtures under `tests/ledgers/` must load for
//! ever.
//!
//! Layout, integers little-endian:
//!
//! ```text
//! 0   8 bytes  "VLKLEDGR"
//! 8   u32      format version
//! 12  u32      0 while events are appended, 1 when it was closed for a handover
//! 16  u64      bytes of events
//! 24  u64      checksum of the events, when closed
//! 32  ..       events
//! ```

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;

use bincode::error::EncodeError;

use super::event::{Event, events};
use super::replay::Replay;
use super::state::State;
use crate::host::errno::Errno;
use crate::host::memory::{self, Memory};
use crate::host::refusal::Refusal;

/// The version of the format that this program writes. It reads this one and all before. The second
/// one has the poll in it; the third one tells the domains of a process apart, and has owners that are
/// watched.
pub const VERSION: u32 = 3;

const MAGIC: &[u8; 8] = b"VLKLEDGR";
const HEADER: usize = 32;
/// [`STEP`], as a size.
const FIRST_SIZE: NonZeroUsize = match NonZeroUsize::new(STEP) {
    Some(size) => size,
    None => NonZeroUsize::MIN,
};
/// The file grows by this much at a time, bytes.
const STEP: usize = 64 * 1024;
/// It is written anew when it has grown to this multiple of its size when it was last.
const GROWTH: usize = 4;
/// What a few clients take of it, bytes.
const A_FEW: usize = 4096;
/// A file up to this size is kept when it is written anew, bytes: to make one, and to have its pages
/// mapped, takes longer than to write it. A larger one is better given back.
const KEPT_FILE: usize = 1024 * 1024;

/// Why a ledger cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// It is no ledger.
    NotALedger,
    /// It was written by a later program.
    Version(u32),
    /// It is shorter than it says, or its content is not what was written.
    Damaged(String),
    /// The kernel did not give it to us.
    System(Errno),
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unreadable::NotALedger => write!(formatter, "it is not a ledger of this program"),
            Unreadable::Version(version) => write!(
                formatter,
                "its format {version} is newer than {VERSION}, the last that this program knows"
            ),
            Unreadable::Damaged(how) => write!(formatter, "it is damaged: {how}"),
            Unreadable::System(errno) => {
                write!(
                    formatter,
                    "it cannot be read: {}",
                    crate::host::errno::text(*errno)
                )
            }
        }
    }
}

/// The limit of one event when it is read, bytes: bincode takes a length's word for it and asks for
/// as much memory. The longest event holds what a client sent and what it has not read, of which
/// the server keeps less than half as much.
const LONGEST_EVENT: usize = 128 * 1024 * 1024;

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LONGEST_EVENT>()
}

/// Writes an event to the front of `place`, and says how many bytes that took. In one piece: every
/// granted lock pays for it.
fn encode(event: &Event<'_>, place: &mut [u8]) -> Result<usize, EncodeError> {
    bincode::serde::encode_into_slice(event, place, configuration())
}

/// The ledger of a running daemon.
#[derive(Debug)]
pub struct Ledger {
    memory: Memory,
    used: usize,
    /// Bytes of events when it was last written anew.
    compact: usize,
    /// An event that could not be refused is missing: nothing is true until it is written anew.
    is_stale: bool,
}

impl Ledger {
    /// A ledger without events. Where the host refuses a memory file it is in this process's own
    /// memory, and cannot be passed on: see [`Ledger::descriptor`].
    pub fn new() -> Result<Ledger, Errno> {
        Memory::new(FIRST_SIZE).map(Ledger::in_memory)
    }

    /// A ledger without events in this process's own memory.
    pub fn private(refusal: Refusal) -> Result<Ledger, Errno> {
        Memory::private(FIRST_SIZE, refusal).map(Ledger::in_memory)
    }

    fn in_memory(memory: Memory) -> Ledger {
        let mut ledger = Ledger {
            memory,
            used: HEADER,
            compact: 0,
            is_stale: false,
        };
        ledger.write_header(0, 0);
        ledger
    }

    /// Whether a ledger that can be passed on may be made here, and may grow.
    pub fn try_out() -> Result<(), Refusal> {
        let mut ledger = Ledger::new().map_err(Refusal::of("there is no memory for a ledger"))?;
        let grown = ledger.grow();
        grown.map_err(Refusal::of("there is no memory for a ledger that grows"))?;
        ledger.descriptor().map(drop)
    }

    /// A ledger that says this state and nothing else.
    pub fn of(state: &State) -> Result<Ledger, Errno> {
        let mut ledger = Ledger::new()?;
        for event in events(state) {
            ledger.append(&event)?;
        }
        ledger.compact = ledger.used;
        Ok(ledger)
    }

    /// Writes it anew, to say this state and nothing else, in the same file if that is small and has
    /// room: nobody else may be reading it. If that fails it stays as it is.
    pub fn rewrite(&mut self, state: &State) -> Result<(), Errno> {
        let size = self.memory.bytes().len();
        if size > KEPT_FILE {
            self.replace(Ledger::of(state)?);
            return Ok(());
        }
        // Not in the file itself before it is known to fit: half a state is none. A state that has
        // become much larger may as well have a new file.
        let likely = self.compact.saturating_mul(2).saturating_add(A_FEW);
        let mut fresh = vec![0; size.saturating_sub(HEADER).min(likely)];
        let mut length = 0usize;
        for event in events(state) {
            let rest = fresh.get_mut(length..).unwrap_or_default();
            match encode(&event, rest) {
                Ok(written) => length = length.saturating_add(written),
                Err(_) => {
                    self.replace(Ledger::of(state)?);
                    return Ok(());
                }
            }
        }
        let file = self.memory.bytes_mut().get_mut(HEADER..);
        let (Some(file), Some(fresh)) = (file, fresh.get(..length)) else {
            return Err(Errno::EINVAL);
        };
        if let Some(place) = file.get_mut(..length) {
            place.copy_from_slice(fresh);
        }
        self.used = HEADER.saturating_add(length);
        self.compact = self.used;
        self.is_stale = false;
        self.write_header(0, 0);
        Ok(())
    }

    /// Reads the ledger that an earlier image of the process closed, and goes on writing it. One of an
    /// earlier format is to be written anew first.
    pub fn take_over(descriptor: OwnedFd) -> Result<(State, Ledger), Unreadable> {
        let memory = Memory::adopt(descriptor).map_err(Unreadable::System)?;
        let state = replay(memory.bytes())?;
        let length = memory
            .bytes()
            .get(16..)
            .and_then(|rest| rest.first_chunk::<8>());
        let length = length.map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let used = usize::try_from(length).unwrap_or(0).saturating_add(HEADER);
        // What an earlier format says can mean something else beside events of this one.
        let is_stale = version_of(memory.bytes()) < VERSION;
        let mut ledger = Ledger {
            memory,
            used,
            compact: used,
            is_stale,
        };
        ledger.write_header(0, 0);
        Ok((state, ledger))
    }

    /// Appends an event. If that fails nothing was appended, and what the event says must not
    /// happen.
    pub fn append(&mut self, event: &Event<'_>) -> Result<(), Errno> {
        if self.is_stale {
            return Err(Errno::ENOMEM);
        }
        loop {
            let rest = self
                .memory
                .bytes_mut()
                .get_mut(self.used..)
                .unwrap_or_default();
            match encode(event, rest) {
                Ok(written) => {
                    self.used = self.used.saturating_add(written);
                    self.write_length();
                    return Ok(());
                }
                Err(EncodeError::UnexpectedEnd) => self.grow()?,
                Err(_) => return Err(Errno::EINVAL),
            }
        }
    }

    /// Appends an event that says what has happened already. If that fails, the ledger is to be
    /// written anew before anything more is granted.
    pub fn note(&mut self, event: &Event<'_>) {
        if self.append(event).is_err() {
            self.is_stale = true;
        }
    }

    /// It lacks something that could not be written.
    pub fn lose(&mut self) {
        self.is_stale = true;
    }

    /// Whether it should be written anew.
    pub fn wants_compaction(&self) -> bool {
        self.is_stale || self.used > self.compact.saturating_mul(GROWTH).max(STEP)
    }

    /// Whether an event is missing.
    pub fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// Puts off the next compaction after one that failed: until the ledger has grown as much again.
    pub fn put_off_compaction(&mut self) {
        self.compact = self.used;
    }

    fn grow(&mut self) -> Result<(), Errno> {
        let size = self.memory.bytes().len();
        // Large ledgers grow in larger steps, so that writing one anew does not crawl.
        let step = (size / 4).next_multiple_of(STEP).max(STEP);
        let size = size
            .checked_add(step)
            .and_then(NonZeroUsize::new)
            .ok_or(Errno::EFBIG)?;
        let could = self.descriptor().is_ok();
        self.memory.grow(size)?;
        self.tell_if_lost(could);
        Ok(())
    }

    /// Goes on with another ledger that says all that counts.
    pub fn replace(&mut self, ledger: Ledger) {
        let could = self.descriptor().is_ok();
        *self = ledger;
        self.tell_if_lost(could);
    }

    /// Says that it cannot be passed on any more, once.
    fn tell_if_lost(&self, could_be_passed_on: bool) {
        if could_be_passed_on && let Err(refusal) = self.descriptor() {
            tracing::error!(
                "{refusal}. The daemon goes on without a ledger that could be passed on: SIGUSR1 is \
                 refused, unless it is for libvirt's own daemon, as long as the host refuses this"
            );
        }
    }

    fn write_header(&mut self, closed: u32, checksum: u64) {
        let length = u64::try_from(self.used.saturating_sub(HEADER)).unwrap_or(u64::MAX);
        let header = [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &closed.to_le_bytes(),
            &length.to_le_bytes(),
            &checksum.to_le_bytes(),
        ]
        .concat();
        if let Some(place) = self.memory.bytes_mut().get_mut(..HEADER) {
            place.copy_from_slice(&header);
        }
    }

    fn write_length(&mut self) {
        let length = u64::try_from(self.used.saturating_sub(HEADER)).unwrap_or(u64::MAX);
        if let Some(place) = self.memory.bytes_mut().get_mut(16..24) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    /// Closes it for a handover: from now on a change of any byte is noticed.
    pub fn close(&mut self) {
        let events = self
            .memory
            .bytes()
            .get(HEADER..self.used)
            .unwrap_or_default();
        let checksum = checksum(events);
        self.write_header(1, checksum);
    }

    /// The memory file; what the host refused, if there is none: then it cannot be passed on.
    pub fn descriptor(&self) -> Result<&OwnedFd, Refusal> {
        self.memory.descriptor()
    }

    /// How much memory it takes, bytes.
    pub fn size(&self) -> usize {
        self.memory.bytes().len()
    }

    /// The header and events, as they would be read.
    pub fn content(&self) -> &[u8] {
        self.memory.bytes().get(..self.used).unwrap_or_default()
    }
}

/// FNV-1a over words of eight bytes: notices what is cut off or mixed up, and is quick.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |word: u64| sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().for_each(|word| mix(u64::from_le_bytes(*word)));
    rest.iter().for_each(|byte| mix(u64::from(*byte)));
    sum
}

/// Reads the ledger in a memory file.
pub fn load(descriptor: &OwnedFd) -> Result<State, Unreadable> {
    replay(&memory::read(descriptor).map_err(Unreadable::System)?)
}

/// The format of a ledger; 0, which none has, if it is too short to say.
fn version_of(content: &[u8]) -> u32 {
    let bytes = content.get(8..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Reads a ledger from its bytes.
pub fn replay(content: &[u8]) -> Result<State, Unreadable> {
    let (header, rest) = content
        .split_at_checked(HEADER)
        .ok_or(Unreadable::NotALedger)?;
    let word = |at: usize| -> u64 {
        let bytes = header.get(at..).and_then(|rest| rest.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    if !header.starts_with(MAGIC) {
        return Err(Unreadable::NotALedger);
    }
    let version = version_of(content);
    if version == 0 || version > VERSION {
        return Err(Unreadable::Version(version));
    }
    let length = usize::try_from(word(16)).unwrap_or(usize::MAX);
    let mut events = rest
        .get(..length)
        .ok_or_else(|| Unreadable::Damaged("it is cut short".into()))?;
    let is_closed = word(8) >> 32 != 0;
    if is_closed && checksum(events) != word(24) {
        return Err(Unreadable::Damaged("its checksum does not fit".into()));
    }
    let mut replay = Replay::of_ledger(version, events.len());
    while !events.is_empty() {
        let (event, used) = bincode::serde::borrow_decode_from_slice(events, configuration())
            .map_err(|error| Unreadable::Damaged(format!("an event does not decode: {error}")))?;
        replay.apply(event).map_err(Unreadable::Damaged)?;
        events = events.get(used.max(1)..).unwrap_or_default();
    }
    Ok(replay.finish())
}
