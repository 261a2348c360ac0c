//! The control words: what guardian and reactor have to say to each other. Each is one word, written by one
//! of the two, and means the same to the next reactor, and to the next guardian.

use std::ffi::CStr;
use std::os::fd::RawFd;
use std::sync::atomic::{Ordering, fence};

use nix::sys::signal::Signal;

use super::Desk;
use crate::host::clock::Moment;
use crate::host::clone;
use crate::host::errno::Errno;
use crate::host::signals::POKE;

/// Where the words are, in bytes from the beginning.
const ASKED: usize = 0;
const TOLD: usize = 8;
const PHASE: usize = 16;
const LEDGER: usize = 24;
const AWAY_SINCE: usize = 32;
const TURNS: usize = 40;
const IS_ASLEEP: usize = 48;
const GUARDIAN: usize = 56;
const ORDER: usize = 64;
const ORDER_LEDGER: usize = 72;
const FAILED: usize = 80;
const FAILURE: usize = 88;
const DEATH: usize = 96;
const DEATHS: usize = 104;
const PID_FILE: usize = 112;
const HERALD: usize = 120;
const UNDERSTUDY: usize = 128;
const MOVED: [usize; 3] = [136, 144, 152];
const POLL: usize = 160;
const DOES_WITHOUT: usize = 168;
const ENDING: usize = 176;
const UNDER_WAY: usize = 184;
const BEGUN_AGAIN: usize = 192;
const STANDS_IN_SINCE: usize = 200;
const LEAVES: usize = 208;
const NO_STDERR: usize = 216;
const MOUTH: usize = 224;
const TAKEN: usize = 232;
const PACKS: usize = 240;
/// One bit for each number of a descriptor that was open before anything was opened here.
const STRANGERS: usize = 512;
/// How many there are bits for.
const STRANGERS_COUNT: usize = 16 * 1024;
const PATH: usize = 4096;
/// The longest path of a program that can be ordered, with the zero byte behind it.
const PATH_SIZE: usize = 8192;

const DOCUMENT: usize = PATH + PATH_SIZE;

/// What the guardian is to tell the service manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The daemon serves.
    Ready = 1,
    /// It begins to end.
    Stopping = 2,
}

/// How far the reactor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is promised to anybody yet.
    Starting,
    /// It serves: from here on a reactor that dies is followed by another one.
    Serving,
}

/// Which program the guardian is to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// This program, perhaps another version.
    Ours,
    /// A version of this program that does not know of understudies.
    Earlier,
    /// libvirt's, which goes on from its document.
    Libvirt,
    /// libvirt's, because this one cannot take over from it.
    WayBack,
}

impl Order {
    fn of(word: u64) -> Option<Order> {
        let all = [Order::Ours, Order::Earlier, Order::Libvirt, Order::WayBack];
        all.into_iter().find(|order| order.word() == word)
    }

    fn word(self) -> u64 {
        match self {
            Order::Ours => 1,
            Order::Earlier => 2,
            Order::Libvirt => 3,
            Order::WayBack => 4,
        }
    }
}

/// Why there is no successor in the place of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It could not be executed.
    Exec(Errno),
    /// It was executed and ended.
    Ended,
    /// It was executed and did not serve in time.
    Late,
    /// There could be nobody to go on should it end (fork).
    NoUnderstudy(Errno),
}

impl Failure {
    fn word(self) -> u64 {
        let of = |kind: u64, reason: Errno| kind | u64::from(reason.number().unsigned_abs()) << 8;
        match self {
            Failure::Exec(reason) => of(1, reason),
            Failure::Ended => 2,
            Failure::Late => 3,
            Failure::NoUnderstudy(reason) => of(4, reason),
        }
    }

    fn of(word: u64) -> Option<Failure> {
        let reason = || Errno::from_raw(i32::try_from(word >> 8).unwrap_or(0));
        match word & 0xff {
            1 => Some(Failure::Exec(reason())),
            2 => Some(Failure::Ended),
            3 => Some(Failure::Late),
            4 => Some(Failure::NoUnderstudy(reason())),
            _ => None,
        }
    }
}

/// How a process of the daemon died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// The reactor was killed by this signal.
    Signal(i32),
    /// The reactor ended with this status, which means nothing.
    Status(i32),
    /// The guardian killed the reactor, which did not come back from what it was doing.
    Away,
    /// The guardian died, however it did.
    Guardian,
    /// The ledger could not be read.
    Unreadable,
}

impl Death {
    fn word(self) -> u64 {
        let number = |number: i32| u64::from(number.unsigned_abs()) << 8;
        match self {
            Death::Signal(signal) => 1 | number(signal),
            Death::Status(status) => 2 | number(status),
            Death::Away => 3,
            Death::Guardian => 4,
            Death::Unreadable => 5,
        }
    }

    fn of(word: u64) -> Option<Death> {
        let number = i32::try_from(word >> 8).unwrap_or(0);
        match word & 0xff {
            1 => Some(Death::Signal(number)),
            2 => Some(Death::Status(number)),
            3 => Some(Death::Away),
            4 => Some(Death::Guardian),
            5 => Some(Death::Unreadable),
            _ => None,
        }
    }
}

fn bit(signal: Signal) -> u64 {
    1u64.checked_shl(signal as u32).unwrap_or(0)
}

/// The word of a descriptor's number, and the bit in it.
fn stranger(number: RawFd) -> Option<(usize, u64)> {
    let number = usize::try_from(number).ok()?;
    let word = (number / 64).checked_mul(8)?.checked_add(STRANGERS)?;
    let bit = 1u64.checked_shl(u32::try_from(number % 64).ok()?)?;
    (number < STRANGERS_COUNT).then_some((word, bit))
}

/// The signals that ask the daemon to end.
pub const ENDS: [Signal; 3] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

impl Desk {
    fn number(&self, at: usize) -> Option<RawFd> {
        let number = self.memory.load(at).checked_sub(1)?;
        RawFd::try_from(number).ok()
    }

    fn set_number(&self, at: usize, number: Option<RawFd>) {
        let number = number.and_then(|number| u64::try_from(number).ok());
        let word = number.map_or(0, |number| number.saturating_add(1));
        self.memory.store(at, word);
    }

    /// A signal came.
    pub fn ask(&self, signal: Signal) {
        self.memory.set_bits(ASKED, bit(signal));
    }

    /// Whether this was asked for and is not done yet.
    pub fn is_asked(&self, signal: Signal) -> bool {
        self.memory.load(ASKED) & bit(signal) != 0
    }

    /// As [`Desk::is_asked`]; from now on it is done, or being done.
    pub fn take_asked(&self, signal: Signal) -> bool {
        self.is_asked(signal) && self.memory.clear_bits(ASKED, bit(signal)) & bit(signal) != 0
    }

    /// As [`Desk::take_asked`], but should this reactor die before it is done, the next one knows of it.
    pub fn begin_asked(&self, signal: Signal) -> bool {
        if !self.is_asked(signal) {
            return false;
        }
        self.begin(signal);
        self.take_asked(signal)
    }

    /// What this signal asks for is being done.
    pub fn begin(&self, signal: Signal) {
        self.memory.set_bits(UNDER_WAY, bit(signal));
    }

    /// What this signal asked for is done, or will not be.
    pub fn end(&self, signal: Signal) {
        self.memory.clear_bits(BEGUN_AGAIN, bit(signal));
        self.memory.clear_bits(UNDER_WAY, bit(signal));
    }

    /// What a reactor that died was doing because of this signal is asked for again. False if it was before:
    /// then it is not tried once more.
    #[must_use]
    pub fn ask_again(&self, signal: Signal) -> bool {
        let is = |word| self.memory.load(word) & bit(signal) != 0;
        if !is(UNDER_WAY) {
            return true;
        }
        if is(BEGUN_AGAIN) {
            self.end(signal);
            return false;
        }
        self.memory.set_bits(BEGUN_AGAIN, bit(signal));
        self.ask(signal);
        true
    }

    /// Which signal asked the daemon to end, if one did. It stays so: who goes on ends, too.
    pub fn asked_to_end(&self) -> Option<Signal> {
        ENDS.into_iter().find(|signal| self.is_asked(*signal))
    }

    /// The service manager is to be told this.
    pub fn tell(&self, message: Message) {
        self.memory.set_bits(TOLD, message as u64);
    }

    /// Whether the service manager is to be told this; from now on it is.
    pub fn take_told(&self, message: Message) -> bool {
        let bits = message as u64;
        self.memory.load(TOLD) & bits != 0 && self.memory.clear_bits(TOLD, bits) & bits != 0
    }

    /// How far the reactor is.
    pub fn phase(&self) -> Phase {
        match self.memory.load(PHASE) {
            0 => Phase::Starting,
            _ => Phase::Serving,
        }
    }

    /// The reactor serves, or is to be followed by another one as if it did.
    pub fn serves(&self) {
        self.memory.store(PHASE, 1);
    }

    /// The ledger's descriptor.
    pub fn ledger(&self) -> Option<RawFd> {
        self.number(LEDGER)
    }

    /// The descriptor of the poll in which the reactor watches what it serves.
    pub fn poll(&self) -> Option<RawFd> {
        self.number(POLL)
    }

    /// It watches in this one from now on.
    pub fn set_poll(&self, number: RawFd) {
        self.set_number(POLL, Some(number));
    }

    /// The ledger has this descriptor, or none that can be gone on from.
    pub fn set_ledger(&self, number: Option<RawFd>) {
        self.set_number(LEDGER, number);
    }

    /// The reactor waits for something to do.
    pub fn is_back(&self) {
        self.memory.store(AWAY_SINCE, 0);
    }

    /// The reactor has something to do. Whether the guardian must be told to keep an eye on it.
    #[must_use]
    pub fn is_away(&self, since: Moment) -> bool {
        self.memory.store(AWAY_SINCE, since.0.max(1));
        let turns = self.memory.load(TURNS);
        self.memory.store(TURNS, turns.wrapping_add(1));
        // One of the two sees what the other has just written.
        fence(Ordering::SeqCst);
        self.memory.load(IS_ASLEEP) != 0 && self.memory.clear_bits(IS_ASLEEP, u64::MAX) != 0
    }

    /// Since when the reactor has something to do.
    pub fn away_since(&self) -> Option<Moment> {
        match self.memory.load(AWAY_SINCE) {
            0 => None,
            since => Some(Moment(since)),
        }
    }

    /// How often the reactor had something to do.
    pub fn turns(&self) -> u64 {
        self.memory.load(TURNS)
    }

    /// The guardian looks at the reactor only when it is told to.
    pub fn guardian_sleeps(&self, does: bool) {
        self.memory.store(IS_ASLEEP, u64::from(does));
        // What it looks at next must not be from before.
        fence(Ordering::SeqCst);
    }

    /// Whether it does, and was not told to wake up.
    pub fn does_guardian_sleep(&self) -> bool {
        self.memory.load(IS_ASLEEP) != 0
    }

    /// The guardian's process.
    pub fn guardian(&self) -> u32 {
        u32::try_from(self.memory.load(GUARDIAN)).unwrap_or(0)
    }

    /// Whether there is a guardian still: the process that made this one.
    pub fn has_guardian(&self) -> bool {
        clone::parent().unsigned_abs() == self.guardian()
    }

    /// The guardian has something to look at.
    pub fn wake_guardian(&self) {
        if self.has_guardian() {
            clone::signal(self.guardian().cast_signed(), POKE);
        }
    }

    /// This is the guardian.
    pub fn set_guardian(&self, pid: u32) {
        self.memory.store(GUARDIAN, u64::from(pid));
    }

    /// The guardian has taken the place of the process that was started, at this moment.
    pub fn stands_in(&self, since: Moment) {
        self.memory.store(STANDS_IN_SINCE, since.0.max(1));
    }

    /// Since when it has, if it has.
    pub fn stands_in_since(&self) -> Option<Moment> {
        match self.memory.load(STANDS_IN_SINCE) {
            0 => None,
            since => Some(Moment(since)),
        }
    }

    /// The daemon is to leave as if it was killed: without an end in order.
    pub fn leaves(&self) {
        self.memory.store(LEAVES, 1);
    }

    /// Whether it is to.
    pub fn is_to_leave(&self) -> bool {
        self.memory.load(LEAVES) != 0
    }

    /// Descriptor 2 is not standard error: nothing may be written to it.
    pub fn has_no_stderr(&self) {
        self.memory.store(NO_STDERR, 1);
    }

    /// Whether it is not.
    pub fn lacks_stderr(&self) -> bool {
        self.memory.load(NO_STDERR) != 0
    }

    /// The pid file.
    pub fn pid_file(&self) -> Option<RawFd> {
        self.number(PID_FILE)
    }

    /// This is the pid file.
    pub fn set_pid_file(&self, number: Option<RawFd>) {
        self.set_number(PID_FILE, number);
    }

    /// The socket for word to the service manager.
    pub fn herald(&self) -> Option<RawFd> {
        self.number(HERALD)
    }

    /// This is the socket for word to the service manager.
    pub fn set_herald(&self, number: Option<RawFd>) {
        self.set_number(HERALD, number);
    }

    /// The process that goes on should a successor not serve.
    pub fn understudy(&self) -> Option<i32> {
        self.number(UNDERSTUDY)
    }

    /// This is the process that goes on should a successor not serve.
    pub fn set_understudy(&self, pid: Option<i32>) {
        self.set_number(UNDERSTUDY, pid);
    }

    /// Nobody looks for an understudy from here on, or somebody does again.
    pub fn does_without_understudy(&self, does: bool) {
        self.memory.store(DOES_WITHOUT, u64::from(does));
    }

    /// Whether a program is to be executed although nobody could go on should it not serve.
    pub fn is_without_understudy(&self) -> bool {
        self.memory.load(DOES_WITHOUT) != 0
    }

    /// A program is to be executed, with this ledger. False if its path is too long.
    #[must_use]
    pub fn order(&self, order: Order, path: &CStr, ledger: Option<RawFd>) -> bool {
        let path = path.to_bytes_with_nul();
        if path.len() > PATH_SIZE || !self.memory.write(PATH, path) {
            return false;
        }
        self.set_number(ORDER_LEDGER, ledger);
        self.memory.store(ORDER, order.word());
        true
    }

    /// Into what everything can be put that is to be kept while no daemon runs.
    pub fn mouth(&self) -> Option<RawFd> {
        self.number(MOUTH)
    }

    /// This is it.
    pub fn set_mouth(&self, number: Option<RawFd>) {
        self.set_number(MOUTH, number);
    }

    /// From what this daemon goes on, where that was kept: it is to be emptied before anybody is served.
    pub fn taken(&self) -> Option<RawFd> {
        self.number(TAKEN)
    }

    /// This is it; or it is empty.
    pub fn set_taken(&self, number: Option<RawFd>) {
        self.set_number(TAKEN, number);
    }

    /// A reactor begins to pack everything for the next start. How many did before, and died of it.
    pub fn begins_to_pack(&self) -> u64 {
        let before = self.memory.load(PACKS);
        self.memory.store(PACKS, before.saturating_add(1));
        before
    }

    /// What libvirt's daemon goes on from, and removes then. False if its path is too long.
    #[must_use]
    pub fn set_document(&self, path: &CStr) -> bool {
        let path = path.to_bytes_with_nul();
        path.len() <= PATH_SIZE && self.memory.write(DOCUMENT, path)
    }

    /// Where that is.
    pub fn document(&self) -> &CStr {
        self.memory.text(DOCUMENT, PATH_SIZE)
    }

    /// Which program is to be executed.
    pub fn ordered(&self) -> Option<Order> {
        Order::of(self.memory.load(ORDER))
    }

    /// With which ledger.
    pub fn ordered_ledger(&self) -> Option<RawFd> {
        self.number(ORDER_LEDGER)
    }

    /// Where the program is.
    pub fn ordered_path(&self) -> &CStr {
        self.memory.text(PATH, PATH_SIZE)
    }

    /// What was ordered could not be done. It is told so, and not tried again before it is asked for.
    pub fn order_failed(&self, failure: Failure) {
        self.end(Signal::SIGUSR1);
        let order = self.memory.load(ORDER);
        self.memory.store(FAILURE, failure.word());
        self.memory.store(FAILED, order);
        self.memory.store(ORDER, 0);
    }

    /// What could not be done, and why, as long as not all has been done that follows from it.
    pub fn failed_order(&self) -> Option<(Order, Failure)> {
        let order = Order::of(self.memory.load(FAILED))?;
        let failure = Failure::of(self.memory.load(FAILURE))?;
        Some((order, failure))
    }

    /// All has been done that follows from it.
    pub fn forget_failed_order(&self) {
        self.memory.store(FAILED, 0);
    }

    /// A process of the daemon died; how many did one after the other, with this one.
    pub fn died(&self, death: Death, in_a_row: u64) {
        self.memory.store(DEATHS, in_a_row);
        self.memory.store(DEATH, death.word());
    }

    /// How the process before died, and how many did one after the other. It is said once.
    pub fn take_death(&self) -> Option<(Death, u64)> {
        let death = Death::of(self.memory.load(DEATH))?;
        self.memory.store(DEATH, 0);
        Some((death, self.memory.load(DEATHS)))
    }

    /// The connection with this number is about to be forgotten, and then closed; or it is.
    pub fn set_ending(&self, number: Option<RawFd>) {
        self.set_number(ENDING, number);
    }

    /// Which connection that is.
    pub fn ending(&self) -> Option<RawFd> {
        self.number(ENDING)
    }

    /// A descriptor that was open before anything was opened here: it stays as it is.
    pub fn set_stranger(&self, number: RawFd) {
        if let Some((at, bit)) = stranger(number) {
            self.memory.set_bits(at, bit);
        }
    }

    /// Whether it was.
    pub fn is_stranger(&self, number: RawFd) -> bool {
        stranger(number).is_some_and(|(at, bit)| self.memory.load(at) & bit != 0)
    }

    /// What has one of the numbers 0 to 2 in libvirt's document has another one now.
    pub fn set_moved(&self, number: RawFd, now: Option<RawFd>) {
        if let Some(at) = usize::try_from(number).ok().and_then(|it| MOVED.get(it)) {
            self.set_number(*at, now);
        }
    }

    /// Which number that is.
    pub fn moved(&self, number: RawFd) -> Option<RawFd> {
        self.number(*MOVED.get(usize::try_from(number).ok()?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desk::layout::CONTROL;
    use std::num::NonZeroUsize;
    use std::ops::Range;

    fn desk() -> Desk {
        Desk::new(NonZeroUsize::new(64 * 1024).unwrap()).unwrap()
    }

    #[test]
    fn each_control_word_has_its_place_to_itself_and_all_of_them_are_in_their_room() {
        const WORD: usize = size_of::<u64>();
        let words = [
            ASKED,
            TOLD,
            PHASE,
            LEDGER,
            AWAY_SINCE,
            TURNS,
            IS_ASLEEP,
            GUARDIAN,
            ORDER,
            ORDER_LEDGER,
            FAILED,
            FAILURE,
            DEATH,
            DEATHS,
            PID_FILE,
            HERALD,
            UNDERSTUDY,
            POLL,
            DOES_WITHOUT,
            ENDING,
            UNDER_WAY,
            BEGUN_AGAIN,
            STANDS_IN_SINCE,
            LEAVES,
            NO_STDERR,
            MOUTH,
            TAKEN,
            PACKS,
        ];
        let (last, _) = stranger(RawFd::try_from(STRANGERS_COUNT - 1).unwrap()).unwrap();
        assert_eq!(stranger(RawFd::try_from(STRANGERS_COUNT).unwrap()), None);
        let longer = [
            STRANGERS..last + WORD,
            PATH..PATH + PATH_SIZE,
            DOCUMENT..DOCUMENT + PATH_SIZE,
        ];
        let mut all: Vec<Range<usize>> = words.map(|at| at..at + WORD).into();
        all.extend(MOVED.map(|at| at..at + WORD));
        all.extend(longer.clone());
        all.sort_by_key(|range| range.start);
        for pair in all.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:?}");
        }
        for range in all {
            assert!(range.start.is_multiple_of(WORD), "{range:?}");
            assert!(
                CONTROL.contains(&range.start) && range.end <= CONTROL.end,
                "{range:?}"
            );
        }
        // None is missing above: beside the places there are two sizes, and MOVED is one of them.
        let source = include_str!("control.rs");
        let places = source.lines().filter(|line| line.starts_with("const "));
        assert_eq!(places.count(), words.len() + longer.len() + 1 + 2);
    }

    #[test]
    fn what_was_asked_for_is_taken_once_but_for_the_end() {
        let desk = desk();
        desk.ask(Signal::SIGUSR1);
        desk.ask(Signal::SIGTERM);
        assert!(desk.take_asked(Signal::SIGUSR1));
        assert!(!desk.take_asked(Signal::SIGUSR1));
        assert_eq!(desk.asked_to_end(), Some(Signal::SIGTERM));
        assert_eq!(desk.asked_to_end(), Some(Signal::SIGTERM));
        desk.tell(Message::Ready);
        assert!(!desk.take_told(Message::Stopping));
        assert!(desk.take_told(Message::Ready) && !desk.take_told(Message::Ready));
    }

    #[test]
    fn what_a_reactor_died_of_is_asked_for_once_more() {
        let desk = desk();
        let usr1 = Signal::SIGUSR1;
        assert!(desk.ask_again(usr1) && !desk.is_asked(usr1));
        desk.ask(usr1);
        assert!(desk.begin_asked(usr1) && !desk.is_asked(usr1));
        assert!(desk.ask_again(usr1) && desk.begin_asked(usr1));
        assert!(!desk.ask_again(usr1) && !desk.is_asked(usr1));
        // From the start.
        desk.ask(usr1);
        assert!(desk.begin_asked(usr1) && desk.ask_again(usr1) && desk.begin_asked(usr1));
        desk.end(usr1);
        assert!(desk.ask_again(usr1) && !desk.is_asked(usr1));
    }

    #[test]
    fn an_order_and_what_became_of_it_are_read_as_they_were_written() {
        let desk = desk();
        assert_eq!((desk.ordered(), desk.ledger()), (None, None));
        assert!(desk.order(Order::Libvirt, c"/usr/sbin/virtlockd", Some(0)));
        assert_eq!(desk.ordered(), Some(Order::Libvirt));
        assert_eq!(desk.ordered_ledger(), Some(0));
        assert_eq!(desk.ordered_path(), c"/usr/sbin/virtlockd");
        desk.order_failed(Failure::Exec(Errno::ENOENT));
        assert_eq!(desk.ordered(), None);
        let failed = Some((Order::Libvirt, Failure::Exec(Errno::ENOENT)));
        assert_eq!((desk.failed_order(), desk.failed_order()), (failed, failed));
        desk.forget_failed_order();
        assert_eq!(desk.failed_order(), None);
        let usr1 = Signal::SIGUSR1;
        desk.ask(usr1);
        assert!(desk.begin_asked(usr1) && desk.order(Order::Ours, c"/x", None));
        desk.order_failed(Failure::NoUnderstudy(Errno::ENOMEM));
        assert!(desk.ask_again(usr1) && !desk.is_asked(usr1));
        desk.died(Death::Signal(9), 3);
        assert_eq!(desk.take_death(), Some((Death::Signal(9), 3)));
        assert_eq!(desk.take_death(), None);
        let long = std::ffi::CString::new(vec![b'a'; PATH_SIZE]).unwrap();
        assert!(!desk.order(Order::Ours, &long, None));
    }
}
