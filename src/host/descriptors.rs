//! Descriptors across the start of another program: which ones it gets, and how it takes them over.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::errno::Errno;
use super::file::{self, FileIdentity};
use super::mount_table::Mounts;
use super::whereabouts::{self, Whereabouts};

/// How many descriptors are looked at with one call. poll(2) refuses more than the limit of open files: below
/// this one each is asked for by itself.
const LOOKED_AT: usize = 1024;

/// Whether the descriptor with this number stays open when this process, or a child of it, executes
/// a program. EBADF if it is not open.
pub fn keep_on_exec(number: RawFd, is_kept: bool) -> Result<(), Errno> {
    let flags = if is_kept { 0 } else { libc::FD_CLOEXEC };
    // SAFETY: F_SETFD takes two integers and touches no memory of ours.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, flags) }).map(drop)
}

/// Descriptor 2, whatever it means at the moment.
pub fn stderr() -> BorrowedFd<'static> {
    // SAFETY: descriptor 2 is open for the whole life of the process: the Rust runtime opens
    // /dev/null there if it is closed at the start, and going to the background only puts another
    // file in its place.
    unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }
}

/// Takes over one descriptor that the previous image of this process left open under `number`.
/// EBADF if it is not open. Each number is to be adopted once.
pub fn adopt(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_GETFD takes an integer and touches no memory of ours.
    Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: it is open, and the caller adopts each number once; no other part of this young
    // process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes over a descriptor that a dead process left open, if it is open and of this file: its number may
/// have been given to something else since. Each number is to be adopted once.
pub fn adopt_file(number: RawFd, file: FileIdentity) -> Option<OwnedFd> {
    // SAFETY: borrowed for this call. It may not be open, which is what statx(2) is asked.
    let borrowed = (number >= 0).then(|| unsafe { BorrowedFd::borrow_raw(number) })?;
    (file::known_identity(borrowed) == Ok(file)).then(|| {
        // SAFETY: it is open, and the caller adopts each number once; nobody else knows of it.
        unsafe { OwnedFd::from_raw_fd(number) }
    })
}

/// Above any number that a descriptor has on a common host: eight times what `fs.nr_open` is there.
const NUMBERS: usize = 8 << 20;

/// Some numbers of descriptors.
#[derive(Debug, Default)]
pub struct Marked {
    is_marked: Vec<bool>,
}

impl Marked {
    /// These; those that no descriptor has are left out.
    pub fn of(numbers: &[RawFd]) -> Marked {
        let places = || {
            let places = numbers.iter().filter_map(|it| usize::try_from(*it).ok());
            places.filter(|place| *place < NUMBERS)
        };
        let mut is_marked = vec![false; places().max().map_or(0, |last| last.saturating_add(1))];
        for place in places() {
            if let Some(is_marked) = is_marked.get_mut(place) {
                *is_marked = true;
            }
        }
        Marked { is_marked }
    }

    /// Whether this is one of them.
    pub fn has(&self, number: RawFd) -> bool {
        let place = usize::try_from(number).ok();
        let is_marked = place.and_then(|place| self.is_marked.get(place));
        is_marked.is_some_and(|is_marked| *is_marked)
    }

    /// It is none of them from now on; whether it was.
    fn forget(&mut self, number: RawFd) -> bool {
        let place = usize::try_from(number).ok();
        let is_marked = place.and_then(|place| self.is_marked.get_mut(place));
        is_marked.is_some_and(std::mem::take)
    }
}

/// The descriptors that the previous image of this process left open, each to be taken once.
///
/// They stay open in the next exec, too, unless [`keep_on_exec`] says otherwise: to say so for each
/// at once would keep thousands of clients waiting.
#[derive(Debug)]
pub struct Inherited {
    /// Those that have not been taken.
    is_left: Marked,
}

impl Inherited {
    /// The descriptors with these numbers, of all that are `open`; the first number that is not, if there is
    /// one.
    pub fn of(numbers: &[RawFd], open: &[RawFd]) -> Result<Inherited, RawFd> {
        let are_open = Marked::of(open);
        let is_closed = |number: &&RawFd| !are_open.has(**number) && !is_open(**number);
        if let Some(number) = numbers.iter().find(is_closed) {
            return Err(*number);
        }
        let is_left = Marked::of(numbers);
        Ok(Inherited { is_left })
    }

    /// Takes over the descriptor with this number. EBADF if it is not one of these, or not any more.
    pub fn take(&mut self, number: RawFd) -> Result<OwnedFd, Errno> {
        if !self.is_left.forget(number) {
            return Err(Errno::EBADF);
        }
        // SAFETY: it was open when this began, belongs to nobody else in this young process, and is
        // given away once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

/// Which file a descriptor is of.
pub fn identity(number: RawFd) -> Option<FileIdentity> {
    if number < 0 {
        return None;
    }
    // SAFETY: it is not -1, and statx(2) says so if it is not open.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    super::file::known_identity(descriptor).ok()
}

/// Whether a regular file is open under this number.
pub fn is_regular(number: RawFd) -> bool {
    if number < 0 {
        return false;
    }
    // SAFETY: it is not -1, and statx(2) says so if it is not open.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    file::known_kind(descriptor) == Ok(libc::S_IFREG)
}

/// Where the file is that is open under this number.
pub fn whereabouts(mounts: &mut Mounts, number: RawFd) -> Whereabouts {
    if number < 0 {
        return Whereabouts::Share(None);
    }
    // SAFETY: it is not -1; what is not open is nowhere that is known.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    whereabouts::of_descriptor(mounts, descriptor)
}

/// Whether a number is an open descriptor of a poll (epoll(7)).
pub fn is_poll(number: RawFd) -> bool {
    let what = std::fs::read_link(format!("/proc/self/fd/{number}"));
    what.is_ok_and(|what| what.as_os_str() == "anon_inode:[eventpoll]")
}

/// Whether a descriptor may be of a disk or of a lock file: it is not of a directory, of a socket, or of what
/// has no file.
pub fn may_be_of_lock(descriptor: &OwnedFd) -> bool {
    let kind = file::known_kind(descriptor).unwrap_or(libc::S_IFREG);
    ![0, libc::S_IFDIR, libc::S_IFSOCK].contains(&kind)
}

/// All descriptors that are open. They are asked for by their numbers: a list of thousands in /proc takes
/// longer, and a descriptor. One that only stands for a path (O_PATH) is not found if it is far above all
/// others: nothing that is opened gets such a number, and there is room for many more than are open.
pub fn open_numbers() -> Vec<RawFd> {
    let end = end_of_table();
    let open = polled(end);
    let last = open.last().map_or(0, |last| last.saturating_add(ABOVE));
    with_paths(open, end.min(last))
}

/// How far above all others one is looked for that only stands for a path.
const ABOVE: RawFd = 16;

/// The open descriptors below this number that can be polled.
fn polled(end: RawFd) -> Vec<RawFd> {
    let mut open = Vec::new();
    let mut looked_at: Vec<libc::pollfd> = Vec::with_capacity(LOOKED_AT);
    let mut next = 0;
    while next < end {
        let some = next..end.min(next.saturating_add(LOOKED_AT as RawFd));
        next = some.end;
        looked_at.clear();
        looked_at.extend(some.map(|fd| libc::pollfd {
            fd,
            events: 0,
            revents: 0,
        }));
        let count = looked_at.len() as libc::nfds_t;
        // SAFETY: the list lives over the call and is as long as is said. None of its numbers need be
        // open, which is what poll(2) is asked.
        let result = unsafe { libc::poll(looked_at.as_mut_ptr(), count, 0) };
        let has_answer = result >= 0;
        let is_open = |it: &&libc::pollfd| match has_answer {
            true => it.revents & libc::POLLNVAL == 0,
            false => is_open(it.fd),
        };
        open.extend(looked_at.iter().filter(is_open).map(|it| it.fd));
    }
    open
}

/// Those, and all others below this number that are open and cannot be polled: they only stand for a path.
fn with_paths(polled: Vec<RawFd>, end: RawFd) -> Vec<RawFd> {
    let is_polled = Marked::of(&polled);
    let paths = (0..end).filter(|number| !is_polled.has(*number) && is_open(*number));
    let paths: Vec<RawFd> = paths.collect();
    if paths.is_empty() {
        return polled;
    }
    let mut open = polled;
    open.extend(paths);
    open.sort_unstable();
    open
}

/// Makes room for descriptors with numbers below this, or below the limit of open files. A table that
/// several processes share has whoever outgrows it wait for all processors (RCU, some 10 ms), each time that it
/// becomes twice as large. Where the room cannot be had now, it comes like that.
pub fn make_room(end: RawFd) {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let limit = limit.map_or(0, |(soft, _)| RawFd::try_from(soft).unwrap_or(RawFd::MAX));
    let last = end.min(limit).saturating_sub(1);
    let copy = nix::fcntl::fcntl(stderr(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(last));
    drop(copy.map(adopt));
}

/// Above all numbers of open descriptors (FDSize in `/proc/self/status`, which the kernel only makes
/// larger); the limit of open files where that cannot be read.
fn end_of_table() -> RawFd {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("FDSize:")?.trim().parse().ok());
    size.unwrap_or_else(|| {
        let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
        limit
            .ok()
            .and_then(|(_, hard)| RawFd::try_from(hard).ok())
            .unwrap_or(LOOKED_FOR)
            .min(LOOKED_FOR)
    })
}

/// Where nobody says how large the table is, no descriptor is looked for from here on: in containers the limit
/// is often a thousand times as high, and to ask for each number takes minutes.
const LOOKED_FOR: RawFd = 1 << 20;

fn is_open(number: RawFd) -> bool {
    // SAFETY: F_GETFD takes an integer and touches no memory of ours.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Makes `number`, which stays the property of whoever has it, mean what `descriptor` means, and
/// closes what it meant before (dup3(2)). Close-on-exec.
pub fn put_in_place(descriptor: &OwnedFd, number: RawFd) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    // SAFETY: dup3(2) takes integers; the owner of `number` goes on owning an open descriptor.
    let result = unsafe { libc::dup3(descriptor.as_raw_fd(), number, libc::O_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Another descriptor of what this number means.
pub fn copy(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_DUPFD_CLOEXEC takes two integers and touches no memory of ours.
    let copy = Errno::result(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Gives an open descriptor below 3 another number, close-on-exec, and leaves one of nothing in its place.
pub fn move_away(number: RawFd) -> Result<RawFd, Errno> {
    use std::os::fd::AsRawFd;
    let nothing = file::open_nothing()?;
    // SAFETY: F_DUPFD_CLOEXEC takes two integers and touches no memory of ours.
    let now = Errno::result(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: dup3(2) takes integers; what the number meant before is open under the new one.
    let put = Errno::result(unsafe { libc::dup3(nothing.as_raw_fd(), number, 0) });
    if let Err(reason) = put {
        // SAFETY: the descriptor was made here and is known to nobody.
        drop(unsafe { OwnedFd::from_raw_fd(now) });
        return Err(reason);
    }
    Ok(now)
}

/// Undoes [`move_away`], for a program that is to be executed.
pub fn put_back(now: RawFd, number: RawFd) -> Result<(), Errno> {
    // SAFETY: dup2(2) takes integers; what the number means meanwhile is needed by nobody.
    Errno::result(unsafe { libc::dup2(now, number) }).map(drop)
}

/// Puts something into the places of standard input, output and error that are empty: what is opened
/// there next would be taken for one of them by a program that is started.
pub fn fill_standard_places() {
    use std::os::fd::{AsRawFd, IntoRawFd};
    while let Ok(nothing) = file::open_nothing()
        && nothing.as_raw_fd() <= libc::STDERR_FILENO
    {
        let _ = nothing.into_raw_fd();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    fn open() -> RawFd {
        std::fs::File::open("/dev/null").unwrap().into_raw_fd()
    }

    #[test]
    fn each_descriptor_is_taken_over_once() {
        let numbers = [open(), open()];
        let mut inherited = Inherited::of(&numbers, &open_numbers()).unwrap();
        let first = inherited.take(numbers[0]).unwrap();
        assert_eq!(first.as_raw_fd(), numbers[0]);
        assert_eq!(inherited.take(numbers[0]).err(), Some(Errno::EBADF));
        assert!(inherited.take(numbers[1]).is_ok());
    }

    #[test]
    fn all_that_is_open_is_found() {
        let (number, another) = (open(), open());
        // SAFETY: a number that nobody uses gets the meaning of one that is ours.
        let far = unsafe { libc::fcntl(number, libc::F_DUPFD, 3000) };
        adopt(another).unwrap();
        let path = super::super::file::open_directory(b"/").unwrap();
        let found = open_numbers();
        let all = [number, far, path.as_raw_fd()];
        assert!(all.iter().all(|number| found.contains(number)));
        assert!(found.is_sorted());
        make_room(16 * 1024);
        let found = open_numbers();
        assert!(all.iter().all(|number| found.contains(number)));
        assert!(end_of_table() >= 16 * 1024 && found.is_sorted());
    }

    #[test]
    fn one_that_is_not_open_is_named() {
        let number = open();
        // Far above what this process uses.
        let closed = 19_999;
        let of = |numbers: &[RawFd]| Inherited::of(numbers, &open_numbers());
        assert_eq!(of(&[number, closed]).err(), Some(closed));
        assert_eq!(of(&[number, -1]).err(), Some(-1));
        adopt(number).unwrap();
        assert_eq!(adopt(closed).err(), Some(Errno::EBADF));
    }
}
