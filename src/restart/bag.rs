//! The bag: everything that a daemon holds, in one socket, while no daemon runs. Whoever has the socket open
//! keeps all of it: the locks stay locked, the connections connected. Nobody serves them meanwhile.
//!
//! The daemon's descriptors are in messages on their way through pairs of sockets, each with the number that
//! the ledger calls it by. The ledger and these sockets are in one message on its way into the bag. So the
//! bag is filled in one step, which fails if nobody has it, and emptied in one step: until then whoever looks
//! finds everything, how often and by whom it was looked at before.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use foldhash::{HashMap, HashMapExt};

use crate::host::errno::{self, Errno};
use crate::host::passing::{self, MOST};

/// The version of the format that this program makes and reads. The message of the bag says, in words of
/// four bytes, little-endian: [`MAGIC`] in two of them, the version, how many descriptors there are in all,
/// how many inner sockets. Its descriptors are the ledger and these sockets. Their messages say the number of
/// each of their descriptors.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"VLKBAG\0\0";
const WORD: usize = size_of::<u32>();
const HEAD: usize = MAGIC.len() + 3 * WORD;
/// The longest message, bytes.
const LONGEST: usize = MOST * WORD;

/// A bag that is empty, and its mouth, through which it is filled once.
#[derive(Debug)]
pub struct Bag {
    /// The bag itself: to be given to whoever is to keep it.
    pub whole: OwnedFd,
    /// Its mouth.
    pub mouth: OwnedFd,
}

impl Bag {
    /// An empty one.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn new() -> Result<Bag, Errno> {
        let (mouth, whole) = passing::pair()?;
        Ok(Bag { whole, mouth })
    }
}

/// Fills a bag with a ledger, and the descriptors that it speaks of.
///
/// # Errors
/// What the host refuses, EPIPE if nobody has the bag: then it is empty.
pub fn fill(mouth: RawFd, ledger: RawFd, descriptors: &[RawFd]) -> Result<(), Errno> {
    let mut inner = Vec::new();
    let mut open: Option<OwnedFd> = None;
    for some in descriptors.chunks(MOST) {
        let said: Vec<u8> = some
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        if let Some(into) = &open {
            match passing::send(into.as_raw_fd(), &said, some) {
                Err(Errno::EAGAIN) => (),
                sent => {
                    sent?;
                    continue;
                }
            }
        }
        let (into, out_of) = passing::pair()?;
        passing::send(into.as_raw_fd(), &said, some)?;
        open = Some(into);
        inner.push(out_of);
    }
    let word = |count: usize| u32::try_from(count).map_err(|_| Errno::EINVAL);
    let head = [VERSION, word(descriptors.len())?, word(inner.len())?];
    let words = head.iter().flat_map(|word| word.to_le_bytes());
    let said: Vec<u8> = MAGIC.iter().copied().chain(words).collect();
    let inner = inner.iter().map(AsRawFd::as_raw_fd);
    let all: Vec<RawFd> = std::iter::once(ledger).chain(inner).collect();
    passing::send(mouth, &said, &all)
}

/// What is in a bag.
#[derive(Debug)]
pub struct Contents {
    /// The ledger.
    pub ledger: OwnedFd,
    /// What it speaks of, by the numbers by which it does.
    pub descriptors: HashMap<RawFd, OwnedFd>,
}

/// Why a bag cannot be used. It is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It was packed by a later program.
    Version(u32),
    /// There is not enough room in this process for what is in it.
    NoRoom,
    /// It is no bag, or not what was packed.
    Damaged(String),
    /// The kernel does not let us look.
    System(Errno),
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unusable::Version(version) => write!(
                formatter,
                "its format {version} is newer than {VERSION}, the last that this program knows"
            ),
            Unusable::NoRoom => write!(
                formatter,
                "this process may not have as many descriptors open (LimitNOFILE in its unit)"
            ),
            Unusable::Damaged(how) => write!(formatter, "it is damaged: {how}"),
            Unusable::System(reason) => {
                write!(
                    formatter,
                    "it cannot be looked at: {}",
                    errno::text(*reason)
                )
            }
        }
    }
}

impl From<Errno> for Unusable {
    fn from(reason: Errno) -> Unusable {
        Unusable::System(reason)
    }
}

fn damaged(how: impl Into<String>) -> Unusable {
    Unusable::Damaged(how.into())
}

/// Whether anything is in a bag.
pub fn is_full(bag: &OwnedFd) -> bool {
    passing::has_message(bag)
}

/// Looks into a bag: copies of all that is in it, or `None` if it is empty. It stays as it is.
///
/// Whoever filled it and went on because nobody had taken note of that filled it once more: the last time counts.
///
/// # Errors
/// Why it cannot be used.
pub fn look(bag: &OwnedFd) -> Result<Option<Contents>, Unusable> {
    let mut said = [0; LONGEST];
    let mut last = None;
    passing::begin_to_look(bag)?;
    while let Some(message) = passing::look(bag, &mut said)? {
        last = Some(message);
    }
    let Some(message) = last else {
        return Ok(None);
    };
    let head = said.get(..message.length).unwrap_or_default();
    let (count, inner_count) = read_head(head)?;
    if message.is_cut {
        return Err(Unusable::NoRoom);
    }
    let mut found = message.descriptors.into_iter();
    let ledger = found.next().ok_or_else(|| damaged("it has no ledger"))?;
    if found.len() != inner_count {
        return Err(damaged("a part of it is missing"));
    }
    let mut descriptors = HashMap::new();
    for inner in found {
        unpack(&inner, &mut descriptors)?;
    }
    if descriptors.len() != count {
        let there = descriptors.len();
        return Err(damaged(format!("of {count} descriptors there are {there}")));
    }
    Ok(Some(Contents {
        ledger,
        descriptors,
    }))
}

/// How many descriptors there are in all, and in how many inner sockets.
fn read_head(head: &[u8]) -> Result<(usize, usize), Unusable> {
    let words = head.strip_prefix(MAGIC);
    let words = words.ok_or_else(|| damaged("it is no bag of this program"))?;
    let (words, _) = words.as_chunks::<WORD>();
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    match words.next() {
        Some(VERSION) => (),
        Some(later) if later > VERSION => return Err(Unusable::Version(later)),
        _ => return Err(damaged("it has no format")),
    }
    let mut next = || words.next().and_then(|word| usize::try_from(word).ok());
    match (next(), next()) {
        (Some(count), Some(inner)) if head.len() == HEAD => Ok((count, inner)),
        _ => Err(damaged("it does not say what is in it")),
    }
}

fn unpack(inner: &OwnedFd, found: &mut HashMap<RawFd, OwnedFd>) -> Result<(), Unusable> {
    let mut said = [0; LONGEST];
    passing::begin_to_look(inner)?;
    while let Some(message) = passing::look(inner, &mut said)? {
        if message.is_cut {
            return Err(Unusable::NoRoom);
        }
        let numbers = said.get(..message.length).unwrap_or_default();
        let (numbers, _) = numbers.as_chunks::<WORD>();
        if numbers.len() != message.descriptors.len() {
            return Err(damaged("it does not say what a descriptor is"));
        }
        for (number, descriptor) in numbers.iter().zip(message.descriptors) {
            let number = RawFd::from_le_bytes(*number);
            if found.insert(number, descriptor).is_some() {
                return Err(damaged(format!("there are two descriptors {number}")));
            }
        }
    }
    Ok(())
}

/// Empties a bag, whoever has it open. What counts goes last.
///
/// # Errors
/// Those of recvmsg(2): then it may be as it was.
pub fn empty(bag: impl AsFd) -> Result<(), Errno> {
    while passing::discard_first(&bag)? {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn open() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn inode(descriptor: &OwnedFd) -> u64 {
        nix::sys::stat::fstat(descriptor).unwrap().st_ino
    }

    #[test]
    fn what_was_packed_is_found_by_its_numbers_until_the_bag_is_emptied() {
        let ledger =
            nix::sys::memfd::memfd_create(c"ledger", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .unwrap();
        // More than fit in a message.
        let sockets: Vec<OwnedFd> = (0..300)
            .map(|_| UnixStream::pair().unwrap().0.into())
            .collect();
        let numbers: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        let bag = Bag::new().unwrap();
        fill(bag.mouth.as_raw_fd(), ledger.as_raw_fd(), &numbers).unwrap();
        // Once more: what was there before does not count.
        let some = &numbers[..7];
        fill(bag.mouth.as_raw_fd(), ledger.as_raw_fd(), some).unwrap();
        fill(bag.mouth.as_raw_fd(), ledger.as_raw_fd(), &numbers).unwrap();
        let before: Vec<u64> = sockets.iter().map(inode).collect();
        let identity = inode(&ledger);
        drop((sockets, ledger));
        for _ in 0..2 {
            let Contents {
                ledger,
                descriptors,
            } = look(&bag.whole).unwrap().unwrap();
            assert_eq!(inode(&ledger), identity);
            assert_eq!(descriptors.len(), numbers.len());
            let now = numbers.iter().map(|number| inode(&descriptors[number]));
            assert!(now.eq(before.iter().copied()));
        }
        assert!(is_full(&bag.whole));
        empty(&bag.whole).unwrap();
        assert!(!is_full(&bag.whole));
        assert!(look(&bag.whole).unwrap().is_none());
    }

    #[test]
    fn a_bag_that_nobody_has_cannot_be_filled() {
        let bag = Bag::new().unwrap();
        drop(bag.whole);
        let ledger = open();
        let filled = fill(
            bag.mouth.as_raw_fd(),
            ledger.as_raw_fd(),
            &[ledger.as_raw_fd()],
        );
        assert_eq!(filled, Err(Errno::EPIPE));
    }

    #[test]
    fn more_than_fits_through_one_pair_of_sockets_is_packed_into_several() {
        // One descriptor, again and again: nobody may have so many open here.
        let one = open();
        let numbers = vec![one.as_raw_fd(); 80_000];
        let bag = Bag::new().unwrap();
        match fill(bag.mouth.as_raw_fd(), one.as_raw_fd(), &numbers) {
            Ok(()) => (),
            Err(Errno::ETOOMANYREFS) => return,
            Err(reason) => panic!("{reason:?}"),
        }
        passing::begin_to_look(&bag.whole).unwrap();
        let message = passing::look(&bag.whole, &mut [0; LONGEST]).unwrap();
        assert!(message.unwrap().descriptors.len() > 2);
        let damaged = look(&bag.whole).unwrap_err();
        let twice = format!("there are two descriptors {}", one.as_raw_fd());
        assert_eq!(damaged, Unusable::Damaged(twice));
    }

    #[test]
    fn a_bag_of_a_later_format_or_of_somebody_else_is_refused_and_stays_as_it_is() {
        let ledger = open();
        let with = |said: &[u8]| {
            let (end, whole) = passing::pair().unwrap();
            passing::send(end.as_raw_fd(), said, &[ledger.as_raw_fd()]).unwrap();
            (whole, end)
        };
        let head = |version: u32, count: u32, inner: u32| {
            let words = [version, count, inner];
            [&MAGIC[..], &words.map(u32::to_le_bytes).concat()].concat()
        };
        for (said, expected) in [
            (head(2, 0, 0), Unusable::Version(2)),
            ([head(9, 0, 0), vec![0; 40]].concat(), Unusable::Version(9)),
            (head(0, 0, 0), damaged("it has no format")),
            (head(1, 0, 1), damaged("a part of it is missing")),
            (head(1, 3, 0), damaged("of 3 descriptors there are 0")),
            (b"hello".to_vec(), damaged("it is no bag of this program")),
            (MAGIC.to_vec(), damaged("it has no format")),
        ] {
            let (whole, _end) = with(&said);
            for _ in 0..2 {
                assert_eq!(look(&whole).unwrap_err(), expected);
            }
        }
    }
}
