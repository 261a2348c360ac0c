//! A file read whole without waiting, whatever its path leads to: a FIFO without a writer, a device
//! or a file without end must not keep a daemon from its clients.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::stat::{FileStat, SFlag, fstat, stat};

use super::errno::{self, Errno};

/// Why a file was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// It cannot be opened.
    Open(Errno),
    /// It cannot be read.
    Read(Errno),
    /// It is no regular file, but this.
    Other(&'static str),
    /// It has more bytes than this.
    TooLong(u64),
}

impl fmt::Display for Unread {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unread::Open(errno) | Unread::Read(errno) => out.write_str(&errno::text(*errno)),
            Unread::Other(kind) => write!(out, "It is {kind}, and only a regular file is read"),
            Unread::TooLong(most) => write!(out, "It is longer than {most} bytes"),
        }
    }
}

/// The content of a regular file of at most `most` bytes. A symbolic link to one is followed. Asks with
/// stat(2): a security policy may refuse statx(2).
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>, Unread> {
    // Looked at before it is opened: to open a device may do something to it. And after, because
    // the path may lead elsewhere by then.
    let found = stat(path).map_err(|named| Unread::Open(named.into()))?;
    check(&found)?;
    if u64::try_from(found.st_size).is_ok_and(|size| size > most) {
        return Err(Unread::TooLong(most));
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| Unread::Open(errno::of(&error)))?;
    check(&fstat(&file).map_err(|named| Unread::Open(named.into()))?)?;
    let mut content = Vec::new();
    // Nor does its size say all: it may grow meanwhile, and the kernel's own files have none.
    match file.take(most.saturating_add(1)).read_to_end(&mut content) {
        Ok(count) if count as u64 > most => Err(Unread::TooLong(most)),
        Ok(_) => Ok(content),
        Err(error) => Err(Unread::Read(errno::of(&error))),
    }
}

fn check(found: &FileStat) -> Result<(), Unread> {
    match SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => Ok(()),
        // As read(2) says it.
        SFlag::S_IFDIR => Err(Unread::Read(Errno::EISDIR)),
        SFlag::S_IFIFO => Err(Unread::Other("a FIFO")),
        SFlag::S_IFSOCK => Err(Unread::Other("a socket")),
        _ => Err(Unread::Other("a device")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_of_bounded_length_is_read() {
        assert_eq!(
            read(Path::new("/dev/zero"), 10),
            Err(Unread::Other("a device"))
        );
        assert_eq!(read(Path::new("/"), 10), Err(Unread::Read(Errno::EISDIR)));
        assert_eq!(
            read(Path::new("/nowhere/file"), 10),
            Err(Unread::Open(Errno::ENOENT))
        );
        // The kernel's own files say that they have no bytes.
        let maps = Path::new("/proc/self/maps");
        assert_eq!(std::fs::metadata(maps).unwrap().len(), 0);
        assert_eq!(read(maps, 16), Err(Unread::TooLong(16)));
        assert!(!read(Path::new("/proc/self/comm"), 16).unwrap().is_empty());
    }
}
