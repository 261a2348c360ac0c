//! The ledger: every change of lasting state, as one small event in a memory file.
//!
//! An event is appended before the reply that depends on it goes out, so at any moment the file
//! says all that whoever goes on must know; replaying it gives the [`State`]. When it has grown to a
//! multiple of the live state it is written anew: beside the events that count, in the same file, whose
//! descriptor stays the same for its life; then one word says that the new ones count. Whatever
//! interrupts that, one of the two is whole. How an event is written is told in [`super::encoding`]; the
//! fixtures under `tests/restart/ledgers/` must load for ever.
//!
//! The file has a name in the run directory where it can ([`Ledger::move_to_name`]), so that a start which
//! finds it and nobody's lock on it can take every lock again that it tells of. Such a file must never say
//! what is not so: it is removed when its daemon ends in order, or goes on without it.
//!
//! Layout, integers little-endian:
//!
//! ```text
//! 0   8 bytes  "VLKLEDGR"
//! 8   u32      format version
//! 12  u32      0 while events are appended, 1 when it was closed for a handover
//! 16  u64      which extent counts, 0 or 1
//! 24  u64      when closed: checksum of the events; otherwise 1 if events are missing that happened last
//! 32  u64 u64  extent 0: where its events begin, and how many bytes they are
//! 48  u64 u64  extent 1
//! 64  32 u64   counts, see [`Counter`]
//! 320 ..       events
//! ```
//!
//! Format 3 has fewer events, and no counts: its events begin at 64. Before that there was one extent: the bytes of events stood at 16, and they began at 32.

use std::ffi::OsString;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::host::errno::{self, Errno};

use super::counters::Counter;
use super::descriptor::Saved;
use super::encoding::{self, Unwritten, encode};
use super::event::Event;
use super::since::Since;
use super::state::{Numbers, State};
use crate::host::file::FileIdentity;
use crate::host::memory::{self, Adopted, LeftBehind, Memory};
use crate::host::refusal::Refusal;

/// The version of the format that this program writes. It reads this one and all before. The second
/// one had the poll in it; the third has two extents, and tells owners of one process apart; the fourth
/// says how a process is known again; the fifth says since when, who is to be told what happens, and counts.
pub const VERSION: u32 = 5;
/// The first one with two extents.
const FIRST_WITH_EXTENTS: u32 = 3;

pub(super) const MAGIC: &[u8; 8] = b"VLKLEDGR";
pub(super) const HEADER: usize = COUNTS_AT + COUNTS * WORD;
/// The header of formats 3 and 4.
const HEADER_WITHOUT_COUNTS: usize = COUNTS_AT;
/// The header before format 3.
const OLD_HEADER: usize = 32;
pub(super) const VERSION_AT: usize = 8;
const WHICH_AT: usize = 16;
pub(super) const CHECKSUM_AT: usize = 24;
/// What is there instead while events are missing.
const STALE: u64 = 1;
pub(super) const EXTENTS_AT: usize = 32;
const COUNTS_AT: usize = 64;
/// Room for so many counts.
const COUNTS: usize = 32;
/// The file grows by this much at a time, bytes.
const STEP: usize = 64 * 1024;
/// Up to so much memory that does not count is kept, bytes. A few busy clients make a small ledger long
/// again and again, and to give its pages back and get them anew each time takes longer than the rest.
const KEPT: usize = 3 * STEP;
/// Of the room that is there so much is kept for what cannot be refused, bytes: that a lock is given back, that
/// somebody has died or is being killed, that a client is gone.
const RESERVE: usize = 16 * 1024;
/// What [`Ledger::make_room`] sees to, bytes: an owner with a name of libvirt's usual length many times over.
const ROOM: usize = 4 * 1024;
/// It is written anew when it has grown to this multiple of its size when it was last. Everybody waits for it to be
/// read when a reactor has died.
const GROWTH: usize = 2;
/// [`STEP`], as a size.
const FIRST_SIZE: NonZeroUsize = match NonZeroUsize::new(STEP) {
    Some(size) => size,
    None => NonZeroUsize::MIN,
};
/// The first format that tells the domains of a process apart.
const FIRST_WITH_DOMAINS: u32 = 3;
/// The first format that has counts.
const FIRST_WITH_COUNTS: u32 = 5;
const WORD: usize = size_of::<u64>();

/// How long the header of a format is, bytes.
pub(super) fn header_of(version: u32) -> usize {
    match version {
        1 | 2 => OLD_HEADER,
        3 | 4 => HEADER_WITHOUT_COUNTS,
        _ => HEADER,
    }
}

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

/// How often what happened, in the order of [`Counter::ALL`].
pub type Counts = [u64; Counter::ALL.len()];

/// What a ledger says, the ledger, and what happened behind a mark.
pub type Theirs = (State<Saved>, Read, Since);

/// A ledger that was read.
#[derive(Debug)]
pub enum Read {
    /// It is gone on with.
    Ours(Ledger),
    /// It is of an earlier format, or cannot be mapped. Until another one says the same it is all that there
    /// is, and stays open as long as this.
    Old(Adopted),
}

/// What becomes of a ledger that has the name and that nobody writes any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldFile {
    /// All that it says is done, or is not so: another one takes its place.
    IsReplaced,
    /// This is what the daemon goes on from, of an earlier format. Another one takes its place, although whoever
    /// stands by, should this program not serve, has it open.
    IsPredecessors(FileIdentity),
    /// Nobody has read it: another start may have to.
    IsKept,
}

/// The ledger of a running daemon.
#[derive(Debug)]
pub struct Ledger {
    memory: Memory,
    /// Which extent counts.
    which: usize,
    /// Where its events are.
    live: Range<usize>,
    /// Bytes of events when it was last written anew.
    compact: usize,
    /// The memory in front of them was given back: it is to be asked for before it is written to.
    has_hole: bool,
    /// An event that could not be refused is missing: nothing is true until it is written anew.
    is_stale: bool,
    /// What it is called, or is to be called as soon as that can be.
    name: Option<PathBuf>,
    /// What is to become of what is called so then.
    old: OldFile,
    /// Whether it is called so.
    is_named: bool,
}

/// What a ledger is called in the run directory.
pub fn file_in(run_directory: &Path) -> PathBuf {
    run_directory.join("virtlockd-ledger")
}

/// Whether this open file is the ledger that has the name in the run directory.
pub fn is_in(run_directory: &Path, descriptor: impl AsFd) -> bool {
    memory::is_at(&file_in(run_directory), descriptor)
}

/// Which file this ledger is, if it has the name in the run directory.
pub fn named_in(run_directory: &Path, ledger: &Adopted) -> Option<FileIdentity> {
    let named = memory::at(&file_in(run_directory))?;
    (ledger.identity() == Some(named)).then_some(named)
}

/// The ledger that has the name loses it, if it is this file.
pub fn remove_if(run_directory: &Path, file: FileIdentity) {
    let name = file_in(run_directory);
    if memory::at(&name) == Some(file) {
        let _ = std::fs::remove_file(name);
    }
}

/// A name beside this one.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

/// A ledger in the run directory that nobody writes any more.
#[derive(Debug)]
pub struct Orphan {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub state: Result<State<Saved>, Unreadable>,
    /// What it has counted.
    pub counts: Counts,
    /// Whether what happened last is not in it: then more may be held by it than was.
    pub is_stale: bool,
    /// As long as this is open nobody else takes it for an orphan.
    _held: OwnedFd,
}

impl Orphan {
    /// Removes it.
    pub fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Looks for a ledger in the run directory that nobody writes any more. None if there is none, or it is
/// another daemon's.
///
/// # Errors
/// Why the file cannot be looked at.
pub fn find_orphan(run_directory: &Path) -> Result<Option<Orphan>, Errno> {
    let path = file_in(run_directory);
    // Whoever made a new one and was killed did not finish it.
    let _ = std::fs::remove_file(beside(&path, NEW));
    match memory::left_behind(&path)? {
        LeftBehind::Nothing => Ok(None),
        LeftBehind::InUse => Err(Errno::EAGAIN),
        LeftBehind::Free(held) => {
            let content = Memory::adopt_copy(&held).map_err(Unreadable::System);
            let found = content.and_then(|content| Ok((find(content.bytes())?, content)));
            let is_stale = found.as_ref().is_ok_and(|(found, _)| found.is_stale);
            let counts = found
                .as_ref()
                .map(|(found, content)| counts(content.bytes(), found));
            let counts = counts.unwrap_or_default();
            let state = found.and_then(|(found, content)| read(content.bytes(), &found));
            Ok(Some(Orphan {
                path,
                state,
                counts,
                is_stale,
                _held: held,
            }))
        }
    }
}

/// Behind the name of a ledger that does not say everything yet.
const NEW: &str = ".new";

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

    /// Whether a ledger that can be passed on may be made here, and may grow: without a name, or in the run
    /// directory.
    pub fn try_out(run_directory: &Path) -> Result<(), Refusal> {
        let mut ledger = Ledger::new().map_err(Refusal::of("there is no memory for a ledger"))?;
        let trial = beside(&file_in(run_directory), ".trial");
        if ledger.descriptor().is_err()
            && let Ok(memory) = Memory::named(&trial, FIRST_SIZE)
        {
            let _ = std::fs::remove_file(trial);
            ledger = Ledger::in_memory(memory);
        }
        let grown = ledger.grow(true);
        grown.map_err(Refusal::of("there is no memory for a ledger that grows"))?;
        ledger.descriptor().map(drop)
    }

    fn in_memory(memory: Memory) -> Ledger {
        let mut ledger = Ledger {
            memory,
            which: 0,
            live: HEADER..HEADER,
            compact: 0,
            has_hole: false,
            is_stale: false,
            name: None,
            old: OldFile::IsKept,
            is_named: false,
        };
        let head = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
        if let Some(place) = ledger.memory.bytes_mut().get_mut(..head.len()) {
            place.copy_from_slice(&head);
        }
        ledger.write_extent(0, HEADER..HEADER);
        ledger
    }

    /// Reads the ledger that an earlier image of the process closed, and goes on writing it, unless it is of
    /// an earlier format. One that cannot be read stays open.
    pub fn take_over(descriptor: OwnedFd) -> Result<(State<Saved>, Option<Ledger>), Unreadable> {
        let (state, read, _) = Ledger::take_over_since(descriptor, None)?;
        let ledger = match read {
            Read::Ours(ledger) => Some(ledger),
            Read::Old(_) => None,
        };
        Ok((state, ledger))
    }

    /// The same, of a process that may have died at any moment, and what happened behind a mark. Whatever
    /// becomes of this process, the next one finds it open.
    pub fn take_over_since(descriptor: OwnedFd, mark: Option<u64>) -> Result<Theirs, Unreadable> {
        let adopted = ManuallyDrop::new(Memory::adopt(descriptor).map_err(Unreadable::System)?);
        let found = find(adopted.bytes())?;
        let (state, since) = read_since(adopted.bytes(), &found, mark)?;
        let memory = match ManuallyDrop::into_inner(adopted) {
            Adopted::Mapped(memory) if found.version == VERSION => memory,
            old => return Ok((state, Read::Old(old), since)),
        };
        // One that was closed was written anew before. How long the other would be nobody knows: it is written
        // anew as soon as somebody has time.
        let compact = match found.is_closed {
            true => found.events.len(),
            false => 0,
        };
        let mut ledger = Ledger {
            memory,
            which: found.which,
            compact,
            live: found.events,
            // Whoever wrote it may have given it back.
            has_hole: true,
            is_stale: found.is_stale,
            name: None,
            old: OldFile::IsKept,
            is_named: false,
        };
        ledger.reopen();
        // To map the file at once has brought back what was given back.
        let _ = ledger.memory.empty(HEADER..ledger.live.start);
        Ok((state, Read::Ours(ledger), since))
    }

    /// It is to be called so from now on. True if it is already.
    pub fn call(&mut self, name: PathBuf, old: OldFile) -> bool {
        let descriptor = self.memory.descriptor();
        self.is_named = descriptor.is_ok_and(|descriptor| memory::is_at(&name, descriptor));
        (self.name, self.old) = (Some(name), old);
        self.is_named
    }

    /// Whether it is to have a name and has none.
    pub fn wants_name(&self) -> bool {
        self.name.is_some() && !self.is_named
    }

    /// Writes these events into a new file, which is given the name when it says all of them, and goes on
    /// with it. Up to that step the file that had the name is whole, from it on the new one. The number of
    /// the descriptor stays.
    ///
    /// # Errors
    /// Why that cannot be: then this ledger stays as it is, and so does the name.
    pub fn move_to_name<'a>(
        &mut self,
        events: impl Iterator<Item = Event<'a>> + Clone,
    ) -> Result<(), Refusal> {
        let Some(name) = self.name.clone() else {
            return Ok(());
        };
        // What could not be looked at may be all that is left of somebody's locks.
        let there = memory::left_behind(&name).map_err(Refusal::of(
            "what has the ledger's name in the run directory cannot be looked at",
        ))?;
        let what = match (&there, self.old) {
            (LeftBehind::InUse, OldFile::IsPredecessors(it)) if memory::at(&name) == Some(it) => "",
            (LeftBehind::InUse, _) => "another daemon has its ledger in the run directory",
            (LeftBehind::Free(_), OldFile::IsKept) => {
                "the ledger of another daemon, which was killed, is in the run directory"
            }
            (LeftBehind::Free(_), OldFile::IsReplaced | OldFile::IsPredecessors(_))
            | (LeftBehind::Nothing, _) => "",
        };
        if !what.is_empty() {
            let reason = Errno::EEXIST;
            return Err(Refusal { what, reason });
        }
        let new = beside(&name, NEW);
        let mut another = Memory::named(&new, FIRST_SIZE).map(Ledger::in_memory)?;
        another.go_on_counting(self.memory.bytes());
        let written = another
            .rewrite(events)
            .map_err(Refusal::of("the ledger cannot be written (fallocate)"))
            .and_then(|()| another.descriptor().map(drop))
            .and_then(|()| {
                std::fs::rename(&new, &name).map_err(Refusal::of(
                    "the ledger in the run directory cannot be put in place (rename)",
                ))
            });
        if let Err(refusal) = written {
            let _ = std::fs::remove_file(&new);
            return Err(refusal);
        }
        let Ledger {
            memory,
            which,
            live,
            compact,
            ..
        } = another;
        if let Err(reason) = self.memory.replace(memory) {
            let _ = std::fs::remove_file(&name);
            return Err(Refusal {
                what: "the ledger cannot be put in the old one's place (dup3)",
                reason,
            });
        }
        (self.which, self.live, self.compact) = (which, live, compact);
        (self.is_stale, self.is_named) = (false, true);
        self.old = OldFile::IsKept;
        Ok(())
    }

    /// Writes these events into memory that can be passed on, and goes on with it. False if there is none.
    pub fn move_to_memory<'a>(&mut self, events: impl Iterator<Item = Event<'a>> + Clone) -> bool {
        let Ok(mut another) = Ledger::new() else {
            return false;
        };
        if another.descriptor().is_err()
            || another.rewrite(events).is_err()
            || another.descriptor().is_err()
        {
            return false;
        }
        another.go_on_counting(self.memory.bytes());
        (another.name, another.old) = (self.name.take(), self.old);
        *self = another;
        true
    }

    /// It has no name any more, until it is moved to it again: somebody goes on who does not write it.
    pub fn lose_name(&mut self) {
        if !std::mem::take(&mut self.is_named) {
            return;
        }
        let (Some(name), Ok(descriptor)) = (&self.name, self.memory.descriptor()) else {
            return;
        };
        if let Err(reason) = memory::remove_name(name, descriptor) {
            tracing::error!(
                target: "locking.lock_daemon",
                "The ledger '{}' is not true any more and cannot be removed: {}. Remove it before a \
                 daemon is started again",
                name.display(),
                errno::text(reason)
            );
        }
    }

    /// Appends an event that can be refused. If that fails nothing was appended, and what the event says must
    /// not happen.
    #[inline]
    pub fn append(&mut self, event: &Event<'_>) -> Result<(), Errno> {
        self.append_leaving(RESERVE, event)
    }

    /// The same for one that cannot: all the room that is there is for it.
    #[inline]
    pub fn append_what_must_be(&mut self, event: &Event<'_>) -> Result<(), Errno> {
        self.append_leaving(0, event)
    }

    #[inline]
    fn append_leaving(&mut self, rest: usize, event: &Event<'_>) -> Result<(), Errno> {
        if self.is_stale {
            return Err(Errno::ENOMEM);
        }
        let written = self.write(self.live.end, rest, event, true)?;
        self.live.end = self.live.end.saturating_add(written);
        // The event first, then the word that makes it count.
        self.write_length(self.which, self.live.len());
        Ok(())
    }

    /// Sees to it that what can be refused need not be, if it is not too long.
    #[inline]
    pub fn make_room(&mut self) -> Result<(), Errno> {
        let end = self.live.end.saturating_add(RESERVE).saturating_add(ROOM);
        match end <= self.memory.bytes().len() {
            true => Ok(()),
            false => self.grow(true),
        }
    }

    /// Writes an event at a place behind which nothing counts, and leaves so much room behind it; how many
    /// bytes it took.
    #[inline]
    fn write(
        &mut self,
        at: usize,
        rest: usize,
        event: &Event<'_>,
        may_lose_name: bool,
    ) -> Result<usize, Errno> {
        loop {
            let end = self.memory.bytes().len().saturating_sub(rest);
            let place = self.memory.bytes_mut().get_mut(at..end).unwrap_or_default();
            match encode(event, place) {
                Ok(written) => return Ok(written),
                Err(Unwritten::NoRoom) => self.grow(may_lose_name)?,
                Err(_) => return Err(Errno::EINVAL),
            }
        }
    }

    /// Writes it anew, to say these events and nothing else. If that fails it stays as it is.
    ///
    /// Nobody else may be reading it: what counted before is given back.
    pub fn rewrite<'a>(
        &mut self,
        events: impl Iterator<Item = Event<'a>> + Clone,
    ) -> Result<(), Errno> {
        let fresh = match self.write_before(events.clone())? {
            Some(fresh) => fresh,
            None => self.write_behind(events)?,
        };
        let other = usize::from(self.which == 0);
        self.write_extent(other, fresh.clone());
        // From this word on the new events count.
        self.memory.store(WHICH_AT, other as u64);
        self.which = other;
        self.compact = fresh.len();
        self.live = fresh;
        if std::mem::take(&mut self.is_stale) {
            self.memory.store(CHECKSUM_AT, 0);
        }
        self.give_back();
        Ok(())
    }

    /// In front of what counts, if they fit there.
    fn write_before<'a>(
        &mut self,
        mut events: impl Iterator<Item = Event<'a>>,
    ) -> Result<Option<Range<usize>>, Errno> {
        let room = HEADER..self.live.start;
        if room.len() < self.compact.max(1) {
            return Ok(None);
        }
        // A page that cannot be had is a signal, not an error.
        if self.has_hole {
            self.memory.fill(room.clone())?;
            self.has_hole = false;
        }
        // Not a loop: a chain of thirteen parts would look at each of them for every event.
        let written = events.try_fold(room.start, |end, event| {
            let place = self.memory.bytes_mut().get_mut(end..room.end);
            let written = encode(&event, place.unwrap_or_default())?;
            Ok(end.saturating_add(written))
        });
        let end = match written {
            Ok(end) => end,
            Err(Unwritten::NoRoom) => return Ok(None),
            Err(Unwritten::Unfit) => return Err(Errno::EINVAL),
        };
        Ok(Some(room.start..end))
    }

    fn write_behind<'a>(
        &mut self,
        mut events: impl Iterator<Item = Event<'a>>,
    ) -> Result<Range<usize>, Errno> {
        let start = self.live.end.next_multiple_of(WORD);
        // The name is only worth giving up for what must be written down. What is only to be shorter can wait for
        // room.
        let may_lose_name = self.is_stale;
        let end = events.try_fold(start, |end, event| {
            let written = self.write(end, 0, &event, may_lose_name)?;
            Ok::<_, Errno>(end.saturating_add(written))
        })?;
        Ok(start..end)
    }

    /// Gives back the memory that does not count any more. What cannot be given back is kept.
    fn give_back(&mut self) {
        let in_front = HEADER..self.live.start;
        if in_front.len() > KEPT {
            let _ = self.memory.empty(in_front);
            self.has_hole = true;
        }
        let enough = self.live.end.next_multiple_of(STEP);
        if let Some(size) = NonZeroUsize::new(enough)
            && size.get().saturating_add(KEPT) < self.memory.bytes().len()
        {
            let _ = self.memory.shrink(size);
        }
    }

    /// It lacks something that could not be written: it is to be written anew before anything more is
    /// granted.
    pub fn lose(&mut self) {
        self.is_stale = true;
        self.memory.store(CHECKSUM_AT, STALE);
    }

    /// Whether it should be written anew.
    pub fn wants_compaction(&self) -> bool {
        self.is_stale || self.live.len() > self.compact.saturating_mul(GROWTH).max(STEP)
    }

    /// Whether an event is missing.
    pub fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// Puts off the next compaction after one that failed: until the ledger has grown as much again.
    pub fn put_off_compaction(&mut self) {
        self.compact = self.live.len();
    }

    /// Makes room. Where the run directory has none, it goes on without its name if it may.
    fn grow(&mut self, may_lose_name: bool) -> Result<(), Errno> {
        let size = self.memory.bytes().len();
        // Large ledgers grow in larger steps, so that writing one anew does not crawl.
        let step = (size / 4).next_multiple_of(STEP).max(STEP);
        let size = size
            .checked_add(step)
            .and_then(NonZeroUsize::new)
            .ok_or(Errno::EFBIG)?;
        let could = self.descriptor().is_ok();
        match self.memory.grow(size) {
            Err(reason) if self.is_named && may_lose_name => {
                self.grow_without_name(size, reason)?
            }
            grown => grown?,
        }
        if could && let Err(refusal) = self.descriptor() {
            // Nobody writes the file any more.
            self.remove_old_name();
            tracing::error!(
                "{refusal}. The daemon goes on without a ledger that could be passed on: SIGUSR1 is \
                 refused, unless it is for libvirt's own daemon, as long as the host refuses this"
            );
        }
        Ok(())
    }

    /// What fills the run directory must not keep locks from being granted: it goes on in memory that has
    /// no name.
    fn grow_without_name(&mut self, size: NonZeroUsize, reason: Errno) -> Result<(), Errno> {
        let mut memory = Memory::new(size)?;
        memory.descriptor().map_err(|refusal| refusal.reason)?;
        let written = self.memory.bytes();
        if let Some(place) = memory.bytes_mut().get_mut(..written.len()) {
            place.copy_from_slice(written);
        }
        self.memory.replace(memory)?;
        self.remove_old_name();
        tracing::error!(
            "The ledger in the run directory cannot grow: {}. The daemon goes on with one that has no \
             name: should all its processes be killed at once, the locks are lost. Make room there",
            errno::text(reason)
        );
        Ok(())
    }

    /// What has the name is not this ledger any more.
    fn remove_old_name(&mut self) {
        if std::mem::take(&mut self.is_named)
            && let Some(name) = &self.name
        {
            let _ = std::fs::remove_file(name);
        }
    }

    fn write_extent(&mut self, which: usize, events: Range<usize>) {
        self.memory.store(extent_at(which), events.start as u64);
        self.write_length(which, events.len());
    }

    fn write_length(&mut self, which: usize, length: usize) {
        self.memory
            .store(extent_at(which).saturating_add(WORD), length as u64);
    }

    /// One more of what is counted.
    #[inline]
    pub fn count(&mut self, counter: Counter) {
        self.count_many(counter, 1);
    }

    /// So many more of what is counted.
    pub fn count_many(&mut self, counter: Counter, more: u64) {
        let so_far = self.counted(counter);
        self.memory
            .store(count_at(counter), so_far.saturating_add(more));
    }

    /// How much was counted.
    pub fn counted(&self, counter: Counter) -> u64 {
        counted(self.memory.bytes(), counter)
    }

    /// What another ledger of this format has counted goes on here.
    fn go_on_counting(&mut self, from: &[u8]) {
        for counter in Counter::ALL {
            self.memory.store(count_at(counter), counted(from, counter));
        }
    }

    /// Closes it for a handover: from now on a change of any byte is noticed.
    pub fn close(&mut self) {
        let sum = checksum(self.events());
        self.memory.store(CHECKSUM_AT, sum);
        self.write_version(1);
    }

    /// Goes on with one that was closed.
    pub fn reopen(&mut self) {
        self.write_version(0);
        let word = if self.is_stale { STALE } else { 0 };
        self.memory.store(CHECKSUM_AT, word);
    }

    fn write_version(&mut self, is_closed: u32) {
        let word = u64::from(VERSION) | u64::from(is_closed) << 32;
        self.memory.store(VERSION_AT, word);
    }

    fn events(&self) -> &[u8] {
        let bytes = self.memory.bytes();
        bytes.get(self.live.clone()).unwrap_or_default()
    }

    /// The memory file; what the host refused, if there is none: then it cannot be passed on.
    pub fn descriptor(&self) -> Result<&OwnedFd, Refusal> {
        self.memory.descriptor()
    }

    /// How much memory it takes, bytes.
    pub fn size(&self) -> usize {
        self.memory.bytes().len().saturating_sub(self.live.start)
    }

    /// Where it ends now, and in which extent.
    pub fn mark(&self) -> u64 {
        (self.live.end as u64) << 1 | self.which as u64
    }

    /// What it says so far.
    pub fn replay(&self) -> Result<State<Saved>, Unreadable> {
        replay(self.memory.bytes())
    }

    /// The file as it would be read.
    pub fn content(&self) -> &[u8] {
        self.memory.bytes().get(..self.live.end).unwrap_or_default()
    }
}

fn extent_at(which: usize) -> usize {
    EXTENTS_AT.saturating_add(which.saturating_mul(2 * WORD))
}

fn count_at(counter: Counter) -> usize {
    COUNTS_AT.saturating_add((counter as usize).saturating_mul(WORD))
}

fn counted(content: &[u8], counter: Counter) -> u64 {
    let bytes = content.get(count_at(counter)..);
    let bytes = bytes.and_then(|rest| rest.first_chunk::<8>());
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// FNV-1a over words of eight bytes: notices what is cut off or mixed up, and is quick.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |word: u64| sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().for_each(|word| mix(u64::from_le_bytes(*word)));
    rest.iter().for_each(|byte| mix(u64::from(*byte)));
    sum
}

/// What a ledger's header says.
struct Found {
    version: u32,
    is_closed: bool,
    is_stale: bool,
    which: usize,
    events: Range<usize>,
}

fn find(content: &[u8]) -> Result<Found, Unreadable> {
    let word = |at: usize| {
        let bytes = content.get(at..).and_then(|rest| rest.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    if !content.starts_with(MAGIC) || content.len() < OLD_HEADER {
        return Err(Unreadable::NotALedger);
    }
    let version = (word(VERSION_AT) & 0xffff_ffff) as u32;
    let is_closed = word(VERSION_AT) >> 32 != 0;
    let (which, start, length) = match version {
        1 | 2 => (0, OLD_HEADER as u64, word(16)),
        FIRST_WITH_EXTENTS..=VERSION => {
            let which = match word(WHICH_AT) {
                0 => 0,
                1 => 1,
                _ => return Err(Unreadable::Damaged("it says nothing that counts".into())),
            };
            let at = extent_at(which);
            (which, word(at), word(at.saturating_add(WORD)))
        }
        other => return Err(Unreadable::Version(other)),
    };
    let place = |word: u64| usize::try_from(word).unwrap_or(usize::MAX);
    let events = place(start)..place(start).saturating_add(place(length));
    let Some(bytes) = content.get(events.clone()) else {
        return Err(Unreadable::Damaged("it is cut short".into()));
    };
    if version >= FIRST_WITH_EXTENTS && events.start < header_of(version) {
        return Err(Unreadable::Damaged("its events are in its header".into()));
    }
    if is_closed && checksum(bytes) != word(CHECKSUM_AT) {
        return Err(Unreadable::Damaged("its checksum does not fit".into()));
    }
    Ok(Found {
        version,
        is_closed,
        is_stale: !is_closed && version >= FIRST_WITH_EXTENTS && word(CHECKSUM_AT) == STALE,
        which,
        events,
    })
}

/// What a ledger has counted, if its format counts and it is not damaged.
pub fn counts_of(content: &[u8]) -> Counts {
    let found = find(content);
    found.map_or_else(|_| Counts::default(), |found| counts(content, &found))
}

/// The same of the ledger in a memory file.
pub fn load_counts(descriptor: &OwnedFd) -> Counts {
    counts_of(&memory::read(descriptor).unwrap_or_default())
}

fn counts(content: &[u8], found: &Found) -> Counts {
    if found.version < FIRST_WITH_COUNTS {
        return Counts::default();
    }
    Counter::ALL.map(|counter| counted(content, counter))
}

/// Reads the ledger in a memory file.
pub fn load(descriptor: &OwnedFd) -> Result<State<Saved>, Unreadable> {
    replay(&memory::read(descriptor).map_err(Unreadable::System)?)
}

/// Whether somebody closed the ledger in a memory file, and nobody has gone on from it since.
pub fn is_closed(descriptor: &OwnedFd) -> bool {
    let content = memory::read(descriptor).unwrap_or_default();
    find(&content).is_ok_and(|found| found.is_closed)
}

/// Reads a ledger from its bytes.
pub fn replay(content: &[u8]) -> Result<State<Saved>, Unreadable> {
    read(content, &find(content)?)
}

fn read(content: &[u8], found: &Found) -> Result<State<Saved>, Unreadable> {
    read_since(content, found, None).map(|(state, _)| state)
}

fn read_since(
    content: &[u8],
    found: &Found,
    mark: Option<u64>,
) -> Result<(State<Saved>, Since), Unreadable> {
    // A mark of the other extent says nothing: what counted then was written anew.
    let mark = mark.filter(|mark| (mark & 1) as usize == found.which);
    let mark = mark.map_or(usize::MAX, |mark| (mark >> 1) as usize);
    let mut since = Since::default();
    let mut events = content.get(found.events.clone()).unwrap_or_default();
    let mut state = State::default();
    let mut numbers = Numbers::default();
    state.reserve(events.len());
    while !events.is_empty() {
        let (event, used) = encoding::decode(found.version, events)
            .map_err(|error| Unreadable::Damaged(format!("an event does not decode: {error}")))?;
        let is_behind = found.events.end.saturating_sub(events.len()) >= mark;
        let is_release = matches!(event, Event::ReleasedBy(..));
        if is_behind {
            since.note(&event, &state);
        }
        let left = state
            .apply(event, &mut numbers)
            .map_err(Unreadable::Damaged)?;
        if is_behind && is_release {
            since.note_left(left);
        }
        events = events.get(used.max(1)..).unwrap_or_default();
    }
    if found.version < FIRST_WITH_DOMAINS {
        state.forget_mixed_domains();
    }
    if !found.is_closed {
        // Whoever went on from it since has taken its poll, or closed it.
        state.poll = None;
        state.old_poll = None;
    }
    Ok((state, since))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_cannot_be_mapped_stays_open_until_another_one_says_the_same() {
        use std::os::fd::AsRawFd;
        let mut ledger = Ledger::new().unwrap();
        ledger.append(&Event::IdleTimeout(7)).unwrap();
        let number = ledger.descriptor().unwrap().as_raw_fd();
        // For reading alone: that is no mapping to write through.
        let file = std::fs::File::open(format!("/proc/self/fd/{number}")).unwrap();
        let file = OwnedFd::from(file);
        let number = file.as_raw_fd();
        let (state, read, _) = Ledger::take_over_since(file, None).unwrap();
        assert_eq!(state.settings().idle_timeout_s, 7);
        let is_open = || crate::host::descriptors::open_numbers().contains(&number);
        assert!(matches!(&read, Read::Old(_)) && is_open());
    }
}
