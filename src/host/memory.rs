//! A memory file that is written through a mapping: appending to it costs no system call, and what was
//! written outlives the process image that wrote it.
//!
//! It may have a name in a file system that is memory itself (tmpfs(5)): then what was written also outlives
//! every process that had it open. Such a file is locked as a whole for as long as anybody has it open
//! through the same open file, also over exec: so whoever finds one that is not locked knows that nobody
//! writes it any more. Without a name (memfd_create(2)) it goes with the last process that has it open.
//!
//! Where the host refuses such a file, the same bytes lie in the process's own memory: everything works
//! but passing them on.

use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MRemapFlags, MapFlags, ProtFlags, mmap, mremap, munmap};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, lstat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::descriptors;
use super::errno::{self, Errno};
use super::file::FileIdentity;
use super::patience::{patiently, while_it_may_pass};
use super::refusal::Refusal;

/// The bytes, wherever they are.
#[derive(Debug)]
pub struct Memory(Place);

#[derive(Debug)]
enum Place {
    /// In a memory file.
    File(File),
    /// In this process alone, because the host refused a memory file.
    Private(Vec<u8>, Refusal),
}

/// A memory file and its mapping.
#[derive(Debug)]
struct File {
    descriptor: OwnedFd,
    start: NonNull<libc::c_void>,
    size: NonZeroUsize,
}

/// A memory file that was passed on. It is open as long as this is there.
#[derive(Debug)]
pub enum Adopted {
    /// It can be written.
    Mapped(Memory),
    /// It can only be read: what it says, and the file.
    OnlyRead(Vec<u8>, OwnedFd),
}

impl Adopted {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Adopted::Mapped(memory) => memory.bytes(),
            Adopted::OnlyRead(bytes, _) => bytes,
        }
    }

    /// Which file it is.
    pub fn identity(&self) -> Option<FileIdentity> {
        let stat = match self {
            Adopted::Mapped(memory) => fstat(memory.descriptor().ok()?),
            Adopted::OnlyRead(_, file) => fstat(file),
        };
        stat.ok().map(FileIdentity::from)
    }
}

/// Whether there is not enough of something, which is no refusal: it may be had later.
fn is_lack(reason: Errno) -> bool {
    let is_full = matches!(reason, Errno::EDQUOT | Errno::EFBIG | Errno::EAGAIN);
    is_full || errno::may_pass(reason)
}

impl Memory {
    /// New memory of `size` bytes: a memory file, close-on-exec, or this process's own where such a
    /// file is refused. Its pages are there already: writing them cannot fail later. ENOSPC, ENOMEM or
    /// EFBIG if they are not to be had.
    pub fn new(size: NonZeroUsize) -> Result<Memory, Errno> {
        match File::new(size) {
            Ok(file) => Ok(Memory(Place::File(file))),
            Err(refusal) if is_lack(refusal.reason) => Err(refusal.reason),
            Err(refusal) => Memory::private(size, refusal),
        }
    }

    /// New memory of `size` bytes in a file of this name, which nobody else may read and which is locked
    /// from the start. What had the name before loses it.
    ///
    /// # Errors
    /// What the host refuses, or what there is not enough of; there is no such name then.
    pub fn named(path: &Path, size: NonZeroUsize) -> Result<Memory, Refusal> {
        let made = File::named(path, size).map(|file| Memory(Place::File(file)));
        made.inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })
    }

    /// Goes on with other memory. The number of the descriptor stays, if there was one.
    ///
    /// # Errors
    /// Why the number cannot mean the other file; then nothing has changed.
    pub fn replace(&mut self, another: Memory) -> Result<(), Errno> {
        match (&mut self.0, another.0) {
            (Place::File(file), Place::File(other)) => file.replace(other),
            (place, other) => {
                *place = other;
                Ok(())
            }
        }
    }

    /// New memory of this process alone.
    pub fn private(size: NonZeroUsize, refusal: Refusal) -> Result<Memory, Errno> {
        let mut bytes = Vec::new();
        lengthen(&mut bytes, size)?;
        Ok(Memory(Place::Private(bytes, refusal)))
    }

    /// A memory file that was passed on, whole. It is what all locks of the host depend on: should
    /// there be no memory for it, that is waited for for a while; one that must not be mapped is read.
    ///
    /// One that cannot be had stays open: it may be had later.
    pub fn adopt(descriptor: OwnedFd) -> Result<Adopted, Errno> {
        let descriptor = ManuallyDrop::new(descriptor);
        let length = patiently(|| fstat(&*descriptor))?.st_size;
        let length = usize::try_from(length).map_err(|_| Errno::EFBIG)?;
        let size = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
        // It is read at once: to map its pages one by one would take longer.
        match while_it_may_pass(|| map(&descriptor, size, MapFlags::MAP_POPULATE)) {
            Ok(start) => Ok(Adopted::Mapped(Memory(Place::File(File {
                descriptor: ManuallyDrop::into_inner(descriptor),
                start,
                size,
            })))),
            Err(_) => {
                let bytes = read(&descriptor)?;
                Ok(Adopted::OnlyRead(
                    bytes,
                    ManuallyDrop::into_inner(descriptor),
                ))
            }
        }
    }

    /// The same with a copy of the descriptor, of which nothing stays open if it fails; what fails once is not
    /// tried again.
    ///
    /// # Errors
    /// Why it can neither be mapped nor read.
    pub fn adopt_copy(descriptor: &OwnedFd) -> Result<Adopted, Errno> {
        let descriptor = descriptor.try_clone().map_err(|error| errno::of(&error))?;
        let length = usize::try_from(fstat(&descriptor)?.st_size).map_err(|_| Errno::EFBIG)?;
        let Some(size) = NonZeroUsize::new(length) else {
            return Ok(Adopted::OnlyRead(Vec::new(), descriptor));
        };
        Ok(match map(&descriptor, size, MapFlags::MAP_POPULATE) {
            Ok(start) => Adopted::Mapped(Memory(Place::File(File {
                descriptor,
                start,
                size,
            }))),
            Err(_) => Adopted::OnlyRead(read(&descriptor)?, descriptor),
        })
    }

    /// Makes it larger.
    pub fn grow(&mut self, size: NonZeroUsize) -> Result<(), Errno> {
        let refusal = match &mut self.0 {
            Place::Private(bytes, _) => return lengthen(bytes, size),
            Place::File(file) => match file.grow(size) {
                Ok(()) => return Ok(()),
                Err(refusal) if is_lack(refusal.reason) => return Err(refusal.reason),
                Err(refusal) => refusal,
            },
        };
        let mut bytes = Vec::new();
        lengthen(&mut bytes, size)?;
        if let Some(place) = bytes.get_mut(..self.bytes().len()) {
            place.copy_from_slice(self.bytes());
        }
        self.0 = Place::Private(bytes, refusal);
        Ok(())
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Place::File(file) => file.bytes(),
            Place::Private(bytes, _) => bytes,
        }
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Place::File(file) => file.bytes_mut(),
            Place::Private(bytes, _) => bytes,
        }
    }

    /// Writes one word, at a place that is a multiple of its size: whoever looks, sees it whole or not at
    /// all, and what was written before, too.
    pub fn store(&mut self, at: usize, word: u64) {
        let bytes = word.to_le_bytes();
        match &mut self.0 {
            Place::File(file) => file.store(at, u64::from_ne_bytes(bytes)),
            Place::Private(content, _) => {
                let place = at..at.saturating_add(bytes.len());
                if let Some(place) = content.get_mut(place) {
                    place.copy_from_slice(&bytes);
                }
            }
        }
    }

    /// Makes sure of the pages of this range, which [`Memory::empty`] may have given back: to write one
    /// that cannot be had would be a signal.
    pub fn fill(&mut self, range: Range<usize>) -> Result<(), Errno> {
        match &self.0 {
            Place::File(file) if !range.is_empty() => {
                change_pages(&file.descriptor, FallocateFlags::empty(), range)
            }
            _ => Ok(()),
        }
    }

    /// Gives back the memory of whole pages in this range; they read as zeros.
    pub fn empty(&mut self, range: Range<usize>) -> Result<(), Errno> {
        let end = range.end.saturating_sub(range.end % PAGE);
        let whole = range.start.next_multiple_of(PAGE)..end;
        match &self.0 {
            Place::File(file) if whole.start < whole.end => {
                let hole =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                change_pages(&file.descriptor, hole, whole)
            }
            _ => Ok(()),
        }
    }

    /// Makes it smaller.
    pub fn shrink(&mut self, size: NonZeroUsize) -> Result<(), Errno> {
        match &mut self.0 {
            Place::File(file) => file.shrink(size),
            Place::Private(bytes, _) => {
                bytes.truncate(size.get());
                bytes.shrink_to_fit();
                Ok(())
            }
        }
    }

    /// The memory file; why there is none.
    pub fn descriptor(&self) -> Result<&OwnedFd, Refusal> {
        match &self.0 {
            Place::File(file) => Ok(&file.descriptor),
            Place::Private(_, refusal) => Err(*refusal),
        }
    }
}

fn lengthen(bytes: &mut Vec<u8>, size: NonZeroUsize) -> Result<(), Errno> {
    let more = size.get().saturating_sub(bytes.len());
    bytes.try_reserve_exact(more).map_err(|_| Errno::ENOMEM)?;
    bytes.resize(size.get(), 0);
    Ok(())
}

impl File {
    fn new(size: NonZeroUsize) -> Result<File, Refusal> {
        let descriptor = memfd_create(c"virtlockd-ledger", MFdFlags::MFD_CLOEXEC)
            .map_err(Refusal::of("a memory file cannot be made (memfd_create)"))?;
        File::of(descriptor, size)
    }

    fn named(path: &Path, size: NonZeroUsize) -> Result<File, Refusal> {
        // One that a killed process did not finish.
        let _ = std::fs::remove_file(path);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let descriptor = open(path, flags | OFlag::O_NOFOLLOW, mode)
            .map_err(Refusal::of("a file in the run directory cannot be made"))?;
        // Elsewhere a mapping waits for a disk or a server, and a page that cannot be had is a signal.
        let file_system = fstatfs(&descriptor).map_err(Refusal::of(
            "the file system of the run directory cannot be looked at (fstatfs)",
        ))?;
        if file_system.filesystem_type() != TMPFS_MAGIC {
            return Err(Refusal {
                what: "the run directory is not in memory (tmpfs)",
                reason: Errno::EOPNOTSUPP,
            });
        }
        if !lock(&descriptor).map_err(Refusal::of(
            "a file in the run directory cannot be locked (fcntl)",
        ))? {
            return Err(Refusal {
                what: "a new file in the run directory is somebody's already",
                reason: Errno::EEXIST,
            });
        }
        File::of(descriptor, size)
    }

    fn of(descriptor: OwnedFd, size: NonZeroUsize) -> Result<File, Refusal> {
        allocate(&descriptor, size)?;
        let start = map(&descriptor, size, MapFlags::empty())?;
        Ok(File {
            descriptor,
            start,
            size,
        })
    }

    fn replace(&mut self, mut another: File) -> Result<(), Errno> {
        descriptors::put_in_place(&another.descriptor, self.descriptor.as_raw_fd())?;
        // The mappings outlive what they were made of; the other's goes with the old one's.
        std::mem::swap(&mut self.start, &mut another.start);
        std::mem::swap(&mut self.size, &mut another.size);
        Ok(())
    }

    fn grow(&mut self, size: NonZeroUsize) -> Result<(), Refusal> {
        allocate(&self.descriptor, size)?;
        let flags = MRemapFlags::MREMAP_MAYMOVE;
        // SAFETY: `start` and `size` describe our mapping, no reference into it lives (we hold
        // `&mut self`), and the old address is not used again.
        let moved = unsafe { mremap(self.start, self.size.get(), size.get(), flags, None) };
        let start = match moved {
            Ok(start) => start,
            // The file as a whole once more, and what was mapped of it before is let go.
            Err(_) => {
                let start = map(&self.descriptor, size, MapFlags::empty())?;
                self.unmap();
                start
            }
        };
        self.start = start;
        self.size = size;
        Ok(())
    }

    /// First the mapping, then the file: what is mapped is always there.
    fn shrink(&mut self, size: NonZeroUsize) -> Result<(), Errno> {
        if size >= self.size {
            return Ok(());
        }
        // SAFETY: `start` and `size` describe our mapping and no reference into it lives; a mapping that
        // shrinks stays where it is.
        let moved = unsafe {
            let flags = MRemapFlags::empty();
            mremap(self.start, self.size.get(), size.get(), flags, None)
        };
        self.start = moved?;
        self.size = size;
        let length = i64::try_from(size.get()).map_err(|_| Errno::EFBIG)?;
        Ok(nix::unistd::ftruncate(&self.descriptor, length)?)
    }

    fn store(&mut self, at: usize, word: u64) {
        if !at.is_multiple_of(size_of::<u64>())
            || at.saturating_add(size_of::<u64>()) > self.size.get()
        {
            return;
        }
        // SAFETY: the word lies in our mapping, which begins at a page, so it is aligned; nobody else in
        // this process refers to it (we hold `&mut self`), and other processes only read it.
        let place = unsafe {
            let start: *mut u8 = self.start.as_ptr().cast();
            AtomicU64::from_ptr(start.add(at).cast())
        };
        place.store(word, Ordering::Release);
    }

    fn unmap(&mut self) {
        // SAFETY: this is our mapping, no reference into it lives (we hold `&mut self`), and whoever
        // calls this does not use it again.
        let _ = unsafe { munmap(self.start, self.size.get()) };
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `size` bytes long, readable, and lives as long as `self`. Other
        // processes that were given the descriptor only read it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.size.get()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only reference in this process.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.size.get()) }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.unmap();
    }
}

/// The smallest pages that there are anywhere (16 and 64 KiB are multiples): a page that is not given
/// back costs no more than itself.
const PAGE: usize = 4096;

fn change_pages(
    descriptor: &OwnedFd,
    how: FallocateFlags,
    range: Range<usize>,
) -> Result<(), Errno> {
    let number = |number: usize| i64::try_from(number).map_err(|_| Errno::EFBIG);
    let (offset, length) = (number(range.start)?, number(range.len())?);
    Ok(fallocate(descriptor, how, offset, length)?)
}

fn map(
    descriptor: &OwnedFd,
    size: NonZeroUsize,
    how: MapFlags,
) -> Result<NonNull<libc::c_void>, Refusal> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | how;
    // SAFETY: the kernel chooses the address, so nothing that is mapped already is replaced.
    unsafe { mmap(None, size, protection, flags, descriptor, 0) }
        .map_err(Refusal::of("a memory file cannot be mapped (mmap, shared)"))
}

fn allocate(descriptor: &OwnedFd, size: NonZeroUsize) -> Result<(), Refusal> {
    i64::try_from(size.get())
        .map_err(|_| Errno::EFBIG)
        .and_then(|length| Ok(fallocate(descriptor, FallocateFlags::empty(), 0, length)?))
        .map_err(Refusal::of(
            "a memory file cannot be given its pages (fallocate)",
        ))
}

/// Takes the lock of a file, or lets go of it.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Nobody has the file any more who writes it, although it may be open, or mapped, here and elsewhere.
pub fn nobody_writes(descriptor: &OwnedFd) {
    // It only lets go.
    let _ = fcntl(descriptor, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)));
}

/// Locks a file as a whole, for as long as its open file is anybody's. False if somebody else has it locked.
fn lock(descriptor: &OwnedFd) -> Result<bool, Errno> {
    let whole = whole(libc::F_WRLCK);
    match fcntl(descriptor, FcntlArg::F_OFD_SETLK(&whole)).map_err(Errno::from) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// A file that somebody left at a name.
#[derive(Debug)]
pub enum LeftBehind {
    /// There is none.
    Nothing,
    /// Somebody writes it still.
    InUse,
    /// Nobody does; nobody else can begin to as long as this is open.
    Free(OwnedFd),
}

/// Looks for a file that was made with [`Memory::named`] by somebody who may be gone.
///
/// # Errors
/// Why it cannot be looked at.
pub fn left_behind(path: &Path) -> Result<LeftBehind, Errno> {
    // Without a descriptor, should there be none left: then nothing is in the way.
    if lstat(path) == Err(nix::errno::Errno::ENOENT) {
        return Ok(LeftBehind::Nothing);
    }
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let descriptor = match open(path, flags, Mode::empty()).map_err(Errno::from) {
        Ok(descriptor) => descriptor,
        Err(Errno::ENOENT) => return Ok(LeftBehind::Nothing),
        Err(errno) => return Err(errno),
    };
    if SFlag::from_bits_truncate(fstat(&descriptor)?.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Errno::EINVAL);
    }
    Ok(if lock(&descriptor)? {
        LeftBehind::Free(descriptor)
    } else {
        LeftBehind::InUse
    })
}

/// Which file has a name.
pub fn at(path: &Path) -> Option<FileIdentity> {
    lstat(path).ok().map(FileIdentity::from)
}

/// Whether a name leads to this open file.
pub fn is_at(path: &Path, file: impl AsFd) -> bool {
    let key = |stat: FileStat| (stat.st_dev, stat.st_ino);
    match (lstat(path), fstat(file)) {
        (Ok(there), Ok(held)) => key(there) == key(held),
        _ => false,
    }
}

/// Removes a name, if it leads to this open file.
///
/// # Errors
/// Why it is still there.
pub fn remove_name(path: &Path, file: impl AsFd) -> Result<(), Errno> {
    match is_at(path, file) {
        true => std::fs::remove_file(path).map_err(|error| errno::of(&error)),
        false => Ok(()),
    }
}

/// The same with the name under which the file was opened, or what it is called since.
///
/// # Errors
/// Why it is still there.
pub fn remove_own_name(file: &OwnedFd) -> Result<(), Errno> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = std::fs::read_link(link).map_err(|error| errno::of(&error))?;
    remove_name(&path, file)
}

/// A memory file with the content of another one.
pub fn copy(descriptor: &OwnedFd) -> Result<OwnedFd, Errno> {
    let content = read(descriptor)?;
    let size = NonZeroUsize::new(content.len()).ok_or(Errno::EINVAL)?;
    let mut memory = Memory::new(size)?;
    memory.bytes_mut().copy_from_slice(&content);
    match memory.0 {
        Place::File(file) => Ok(file.descriptor.try_clone().map_err(|it| errno::of(&it))?),
        Place::Private(_, refusal) => Err(refusal.reason),
    }
}

/// The content of a memory file that was passed on, whatever its file offset.
pub fn read(descriptor: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let length = usize::try_from(fstat(descriptor)?.st_size).map_err(|_| Errno::EFBIG)?;
    let mut content = vec![0; length];
    let mut filled = 0usize;
    while let Some(rest) = content.get_mut(filled..)
        && !rest.is_empty()
    {
        let offset = i64::try_from(filled).map_err(|_| Errno::EFBIG)?;
        match nix::sys::uio::pread(descriptor, rest, offset).map_err(Errno::from) {
            Ok(0) => break,
            Ok(count) => filled = filled.saturating_add(count),
            Err(Errno::EINTR) => (),
            Err(errno) => return Err(errno),
        }
    }
    content.truncate(filled);
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_through_the_mapping_is_in_the_file_and_stays_when_it_grows() {
        let page = NonZeroUsize::new(4096).unwrap();
        let mut memory = Memory::new(page).unwrap();
        memory.bytes_mut()[..5].copy_from_slice(b"state");
        memory.grow(NonZeroUsize::new(1 << 20).unwrap()).unwrap();
        memory.bytes_mut()[(1 << 20) - 1] = 7;
        let content = read(memory.descriptor().unwrap()).unwrap();
        assert_eq!((&content[..5], content[(1 << 20) - 1]), (&b"state"[..], 7));
        assert_eq!(memory.bytes(), content);
    }

    #[test]
    fn memory_that_takes_the_place_of_other_memory_has_its_number() {
        let page = NonZeroUsize::new(4096).unwrap();
        let mut memory = Memory::new(page).unwrap();
        let number = memory.descriptor().unwrap().as_raw_fd();
        let mut another = Memory::new(NonZeroUsize::new(8192).unwrap()).unwrap();
        another.bytes_mut()[..5].copy_from_slice(b"state");
        memory.replace(another).unwrap();
        assert_eq!(memory.descriptor().unwrap().as_raw_fd(), number);
        memory.bytes_mut()[8191] = 7;
        assert_eq!(read(memory.descriptor().unwrap()).unwrap(), memory.bytes());
        assert_eq!(
            (&memory.bytes()[..5], memory.bytes()[8191]),
            (&b"state"[..], 7)
        );
    }

    #[test]
    fn memory_of_this_process_alone_takes_the_same_and_says_why_it_cannot_be_passed_on() {
        let refusal = Refusal {
            what: "a memory file cannot be made (memfd_create)",
            reason: Errno::EACCES,
        };
        let size = |bytes| NonZeroUsize::new(bytes).unwrap();
        let mut memory = Memory::private(size(4096), refusal).unwrap();
        memory.bytes_mut()[..5].copy_from_slice(b"state");
        memory.grow(size(1 << 20)).unwrap();
        memory.bytes_mut()[(1 << 20) - 1] = 7;
        assert_eq!(
            (&memory.bytes()[..5], memory.bytes().len()),
            (&b"state"[..], 1 << 20)
        );
        assert_eq!(memory.descriptor().err(), Some(refusal));
    }
}
