//! Memory that outlives the process that wrote it: a shared mapping, made before a process is cloned, which
//! every clone has at the same address. What a process has stored there in program order is there for the
//! next one, however it died: a store is done or not done, never half.
//!
//! It is sparse: a page takes memory from the first time that it is written until it is given back.
//!
//! Where the host refuses a shared mapping, the same bytes lie in the process's own memory: everything works
//! but outliving it.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::CStr;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::resource::{Resource, getrlimit};

use super::errno::Errno;
use super::refusal::Refusal;

/// Pages are at least this large, bytes.
pub const PAGE: usize = 4096;
/// A word, bytes.
const WORD: usize = size_of::<u64>();

/// A shared mapping, zero where nothing was written.
#[derive(Debug)]
pub struct Shared {
    start: NonNull<u8>,
    size: usize,
    /// Who the memory is from, if it is this process's own.
    own: Option<Layout>,
    /// How many more changes are made, as if the process died behind them.
    #[cfg(test)]
    lives: std::cell::Cell<Option<usize>>,
}

/// A word of it, lent to somebody who is to know nothing else of it.
#[derive(Clone, Copy, Debug)]
pub struct Word<'a> {
    memory: &'a Shared,
    at: usize,
}

impl Word<'_> {
    /// Writes it.
    pub fn store(&self, value: u64) {
        self.memory.store(self.at, value);
    }
}

impl Shared {
    /// A new mapping of `size` bytes. The host counts only what is written, where it lets a memory file be
    /// made; no descriptor of it stays open.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn new(size: NonZeroUsize) -> Result<Shared, Refusal> {
        let start = in_a_file(size).or_else(|_| anonymous(size))?;
        Ok(Shared {
            start: start.cast(),
            size: size.get(),
            own: None,
            #[cfg(test)]
            lives: None.into(),
        })
    }

    /// The same in this process's own memory, which ends with it.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn private(size: NonZeroUsize) -> Result<Shared, Errno> {
        let layout = Layout::from_size_align(size.get(), PAGE).map_err(|_| Errno::ENOMEM)?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Errno::ENOMEM)?;
        Ok(Shared {
            start,
            size: size.get(),
            own: Some(layout),
            #[cfg(test)]
            lives: None.into(),
        })
    }

    /// From now on only so many changes are made: what whoever comes next would find, had the process died
    /// then. All of them again with `None`.
    #[cfg(test)]
    pub fn dies_after(&self, changes: Option<usize>) {
        self.lives.set(changes);
    }

    /// Whether nothing is changed any more.
    #[cfg(test)]
    pub fn is_dead(&self) -> bool {
        self.lives.get() == Some(0)
    }

    #[cfg(test)]
    fn lives(&self) -> bool {
        let is_dead = self.is_dead();
        self.lives
            .set(self.lives.get().map(|left| left.saturating_sub(1)));
        !is_dead
    }

    /// Whether the next change is made: only a test has a process die at a place of its choice.
    #[cfg(not(test))]
    fn lives(&self) -> bool {
        true
    }

    /// A word, to be lent.
    pub fn lend(&self, at: usize) -> Word<'_> {
        Word { memory: self, at }
    }

    /// How large it is, bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The word at a place, which is a multiple of its size. Zero outside the mapping.
    pub fn load(&self, at: usize) -> u64 {
        self.word(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Writes a word: whoever looks sees it whole or not at all, and what was written before it, too.
    pub fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at)
            && self.lives()
        {
            word.store(value, Ordering::Release);
        }
    }

    /// Sets bits of a word; what it was before.
    pub fn set_bits(&self, at: usize, bits: u64) -> u64 {
        self.word(at)
            .filter(|_| self.lives())
            .map_or(0, |word| word.fetch_or(bits, Ordering::AcqRel))
    }

    /// Clears bits of a word; what it was before.
    pub fn clear_bits(&self, at: usize, bits: u64) -> u64 {
        self.word(at)
            .filter(|_| self.lives())
            .map_or(0, |word| word.fetch_and(!bits, Ordering::AcqRel))
    }

    fn word(&self, at: usize) -> Option<&AtomicU64> {
        let is_inside = at.is_multiple_of(WORD) && at.checked_add(WORD)? <= self.size;
        // SAFETY: the word lies inside the mapping, which begins at a page and lives as long as `self`, so
        // it is aligned and valid; words are only ever touched as atomics, or by the kernel in a call that
        // `address` was given to.
        is_inside.then(|| unsafe { AtomicU64::from_ptr(self.start.add(at).as_ptr().cast()) })
    }

    /// Copies bytes to a place. Nothing is written, and false is returned, where there is no room.
    pub fn write(&self, at: usize, bytes: &[u8]) -> bool {
        if !self.has(at, bytes.len()) {
            return false;
        }
        if !self.lives() {
            return true;
        }
        // SAFETY: the place is inside the mapping, as was just seen. Nobody in this process borrows from
        // the mapping over this call: `read` copies, and `slice` is the caller's promise. Other processes
        // look only when this one is dead.
        unsafe {
            let place = self.start.add(at).as_ptr();
            std::ptr::copy(bytes.as_ptr(), place, bytes.len());
        }
        // What is stored behind this must not be seen before it.
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        true
    }

    /// Copies bytes from one place to another. Nothing is written, and false is returned, where either is
    /// not inside.
    pub fn copy(&self, from: usize, to: usize, length: usize) -> bool {
        if !self.has(from, length) || !self.has(to, length) {
            return false;
        }
        if !self.lives() {
            return true;
        }
        // SAFETY: both places are inside the mapping, of which nobody in this process borrows: see `write`.
        unsafe {
            let (from, to) = (self.start.add(from), self.start.add(to));
            std::ptr::copy(from.as_ptr(), to.as_ptr(), length);
        }
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        true
    }

    /// A copy of bytes at a place; what there is of them.
    pub fn read(&self, range: Range<usize>) -> Vec<u8> {
        let end = range.end.min(self.size);
        let length = end.saturating_sub(range.start);
        let mut bytes = vec![0; length];
        if length > 0 {
            // SAFETY: the range is inside the mapping, and `bytes` is as long.
            unsafe {
                let place = self.start.add(range.start).as_ptr();
                std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), length);
            }
        }
        bytes
    }

    /// The text at a place, up to its zero byte, which is among `size` bytes; empty if there is none. Nobody
    /// may be writing there as long as it is used.
    pub fn text(&self, at: usize, size: usize) -> &CStr {
        let Some(place) = self.address(at, size) else {
            return c"";
        };
        // SAFETY: inside the mapping, and by the contract of this function nobody writes there.
        let bytes = unsafe { std::slice::from_raw_parts(place.as_ptr(), size) };
        CStr::from_bytes_until_nul(bytes).unwrap_or_default()
    }

    /// Copies bytes from a place; zeros where there are none.
    pub fn read_into(&self, at: usize, bytes: &mut [u8]) {
        if !self.has(at, bytes.len()) {
            return bytes.fill(0);
        }
        // SAFETY: the range is inside the mapping, and nobody of this process writes there over this call.
        unsafe {
            let place = self.start.add(at).as_ptr();
            std::ptr::copy(place, bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Where a range lies, for a system call that reads or writes there. `None` if it is not inside.
    pub fn address(&self, at: usize, length: usize) -> Option<NonNull<u8>> {
        self.has(at, length)
            // SAFETY: inside the mapping.
            .then(|| unsafe { self.start.add(at) })
    }

    fn has(&self, at: usize, length: usize) -> bool {
        at.checked_add(length).is_some_and(|end| end <= self.size)
    }

    /// Gives back the memory of whole pages in this range; they read as zeros. What cannot be given back
    /// stays as it is.
    pub fn give_back(&self, range: Range<usize>) {
        let start = range.start.next_multiple_of(PAGE);
        let end = range.end.min(self.size);
        let length = end.saturating_sub(end % PAGE).saturating_sub(start);
        let Some(place) = self.address(start, length) else {
            return;
        };
        if length > 0 && self.own.is_none() && self.lives() {
            // SAFETY: whole pages of this mapping, of which nothing is borrowed.
            let _ = unsafe { madvise(place.cast(), length, MmapAdvise::MADV_REMOVE) };
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        match self.own {
            // SAFETY: it is from the allocator, with this layout, and nothing of it can be borrowed any more.
            Some(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            // SAFETY: this is our mapping, and nothing of it can be borrowed any more.
            None => _ = unsafe { munmap(self.start.cast(), self.size) },
        }
    }
}

fn in_a_file(size: NonZeroUsize) -> Result<NonNull<libc::c_void>, Refusal> {
    let file = memfd_create(c"virtlockd-desk", MFdFlags::MFD_CLOEXEC)
        .map_err(Refusal::of("a memory file cannot be made (memfd_create)"))?;
    let too_large = Refusal {
        what: "a memory file cannot be so large (ftruncate)",
        reason: Errno::EFBIG,
    };
    let length = i64::try_from(size.get()).map_err(|_| too_large)?;
    // To go beyond the limit of files would be a signal.
    let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(0, |(limit, _)| limit);
    if u64::try_from(size.get()).is_ok_and(|size| size > limit) {
        return Err(too_large);
    }
    nix::unistd::ftruncate(&file, length)
        .map_err(Refusal::of("a memory file cannot be so large (ftruncate)"))?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses the address, so nothing that is mapped already is replaced.
    unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) }
        .map_err(Refusal::of("a memory file cannot be mapped (mmap, shared)"))
}

fn anonymous(size: NonZeroUsize) -> Result<NonNull<libc::c_void>, Refusal> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: the kernel chooses the address, so nothing that is mapped already is replaced.
    unsafe { mmap_anonymous(None, size, protection, flags) }
        .map_err(Refusal::of("memory cannot be shared (mmap, shared)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(size: usize) -> Shared {
        Shared::new(NonZeroUsize::new(size).unwrap()).unwrap()
    }

    #[test]
    fn words_and_bytes_are_read_as_they_were_written_and_given_back_as_zeros() {
        let memory = shared(4 * PAGE);
        memory.store(8, 7);
        assert_eq!(
            (memory.load(8), memory.set_bits(8, 8), memory.load(8)),
            (7, 7, 15)
        );
        assert_eq!((memory.clear_bits(8, 1), memory.load(8)), (15, 14));
        assert!(memory.write(PAGE, b"bytes"));
        assert_eq!(memory.read(PAGE..PAGE + 5), b"bytes");
        memory.give_back(PAGE..2 * PAGE);
        assert_eq!(memory.read(PAGE..PAGE + 5), [0; 5]);
    }

    #[test]
    fn memory_of_this_process_alone_takes_the_same() {
        let memory = Shared::private(NonZeroUsize::new(2 * PAGE).unwrap()).unwrap();
        memory.lend(8).store(7);
        assert!(memory.write(PAGE, b"bytes"));
        let mut read = [0; 5];
        memory.read_into(PAGE, &mut read);
        assert_eq!((memory.load(8), &read), (7, b"bytes"));
        memory.read_into(2 * PAGE - 1, &mut read);
        assert_eq!(read, [0; 5]);
    }

    #[test]
    fn nothing_is_read_or_written_outside() {
        let memory = shared(PAGE);
        assert!(!memory.write(PAGE - 1, b"ab"));
        assert!(memory.address(PAGE, 1).is_none());
        memory.store(PAGE, 1);
        memory.store(4, 1);
        assert_eq!((memory.load(PAGE), memory.load(4)), (0, 0));
        assert_eq!(memory.read(PAGE - 1..PAGE + 9), [0]);
    }
}
