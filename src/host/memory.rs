//! A memory file (memfd_create(2)) that is written through a mapping: appending to it costs no
//! system call, and what was written outlives the process image that wrote it.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MRemapFlags, MapFlags, ProtFlags, mmap, mremap, munmap};
use nix::sys::stat::fstat;

use super::errno::Errno;
use super::patience::patiently;

/// The file and its mapping.
#[derive(Debug)]
pub struct Memory {
    descriptor: OwnedFd,
    start: NonNull<libc::c_void>,
    size: NonZeroUsize,
}

impl Memory {
    /// A new memory file of `size` bytes, close-on-exec. Its pages are there already: writing them
    /// cannot fail later. ENOSPC, ENOMEM or EFBIG if they are not to be had.
    pub fn new(size: NonZeroUsize) -> Result<Memory, Errno> {
        let descriptor = memfd_create(c"virtlockd-ledger", MFdFlags::MFD_CLOEXEC)?;
        allocate(&descriptor, size)?;
        let start = map(&descriptor, size, MapFlags::empty())?;
        Ok(Memory {
            descriptor,
            start,
            size,
        })
    }

    /// A memory file that was passed on, whole. It is what all locks of the host depend on: should
    /// there be no memory for it, that is waited for for a while.
    pub fn adopt(descriptor: OwnedFd) -> Result<Memory, Errno> {
        let length = patiently(|| fstat(&descriptor))?.st_size;
        let length = usize::try_from(length).map_err(|_| Errno::EFBIG)?;
        let size = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
        // It is read at once: to map its pages one by one would take longer.
        let start = patiently(|| map(&descriptor, size, MapFlags::MAP_POPULATE))?;
        Ok(Memory {
            descriptor,
            start,
            size,
        })
    }

    /// Makes the file larger.
    pub fn grow(&mut self, size: NonZeroUsize) -> Result<(), Errno> {
        allocate(&self.descriptor, size)?;
        let flags = MRemapFlags::MREMAP_MAYMOVE;
        // SAFETY: `start` and `size` describe our mapping, no reference into it lives (we hold
        // `&mut self`), and the old address is not used again.
        self.start = unsafe { mremap(self.start, self.size.get(), size.get(), flags, None) }?;
        self.size = size;
        Ok(())
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `size` bytes long, readable, and lives as long as `self`. Other
        // processes that were given the descriptor only read it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.size.get()) }
    }

    /// The file's bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only reference in this process.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.size.get()) }
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this is our mapping, and nothing can refer to it any more.
        let _ = unsafe { munmap(self.start, self.size.get()) };
    }
}

fn map(
    descriptor: &OwnedFd,
    size: NonZeroUsize,
    how: MapFlags,
) -> Result<NonNull<libc::c_void>, Errno> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | how;
    // SAFETY: the kernel chooses the address, so nothing that is mapped already is replaced.
    Ok(unsafe { mmap(None, size, protection, flags, descriptor, 0) }?)
}

fn allocate(descriptor: &OwnedFd, size: NonZeroUsize) -> Result<(), Errno> {
    let length = i64::try_from(size.get()).map_err(|_| Errno::EFBIG)?;
    Ok(fallocate(descriptor, FallocateFlags::empty(), 0, length)?)
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
        let content = read(memory.descriptor()).unwrap();
        assert_eq!((&content[..5], content[(1 << 20) - 1]), (&b"state"[..], 7));
        assert_eq!(memory.bytes(), content);
    }
}
