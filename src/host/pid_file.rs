//! The pid file: the number of the running daemon, and a lock that keeps a second one away.
//!
//! The lock is a POSIX record lock on the first byte, because that is what the C daemon takes: each
//! must see the other's. Such a lock belongs to the process and outlives an exec, as long as the
//! descriptor is passed on and no other descriptor of the file is closed.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{FileStat, fstat, stat};

use super::errno::{self, Errno};
use super::file::FileIdentity;
use super::process;

/// A pid file that this process holds.
#[derive(Debug)]
pub struct PidFile {
    file: File,
    path: PathBuf,
}

/// Why the pid file could not be taken.
#[derive(Debug, PartialEq, Eq)]
pub struct PidFileError {
    attempt: &'static str,
    path: PathBuf,
    error: Errno,
}

impl fmt::Display for PidFileError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            attempt,
            path,
            error,
        } = self;
        write!(
            out,
            "Failed to {attempt} '{}': {}",
            path.display(),
            errno::text(*error)
        )
    }
}

impl std::error::Error for PidFileError {}

impl PidFile {
    /// Opens the file, locks it and writes the number of this process into it. Never waits: a file
    /// that another daemon has locked is an error at once.
    pub fn acquire(path: &Path) -> Result<Self, PidFileError> {
        let failed = |attempt, error| PidFileError {
            attempt,
            path: path.to_path_buf(),
            error,
        };
        let file = loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(path)
                .map_err(|error| failed("open pid file", errno::of(&error)))?;
            lock(file.as_fd()).map_err(|error| failed("acquire pid file", error))?;
            // The daemon before may have removed the file between the two calls: then this lock is
            // on a file that nobody else will find.
            let held =
                fstat(&file).map_err(|error| failed("check status of pid file", error.into()))?;
            if is_at(path, &held) {
                break file;
            }
        };
        file.set_len(0)
            .map_err(|error| failed("truncate pid file", errno::of(&error)))?;
        (&file)
            .write_all(process::started().to_string().as_bytes())
            .map_err(|error| failed("write to pid file", errno::of(&error)))?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Whether another process holds the file at this path. To be asked before [`PidFile::acquire`]:
    /// it gives up a lock that this process has.
    pub fn is_held(path: &Path) -> bool {
        let mut found = first_byte();
        File::open(path).is_ok_and(|file| {
            fcntl(&file, FcntlArg::F_GETLK(&mut found)).is_ok()
                && i32::from(found.l_type) != libc::F_UNLCK
        })
    }

    /// The pid file that the program before the exec held: the same process has its lock still.
    pub fn inherited(descriptor: OwnedFd, path: PathBuf) -> Self {
        Self {
            file: File::from(descriptor),
            path,
        }
    }

    /// The file, which a successor that ended may have removed: then it is made again.
    pub fn put_back(self) -> Self {
        if fstat(&self.file).is_ok_and(|held| is_at(&self.path, &held)) {
            return self;
        }
        match Self::acquire(&self.path) {
            Ok(file) => {
                // It is written down as the daemon's until the new one is.
                std::mem::forget(self.file);
                file
            }
            Err(error) => {
                tracing::error!("The pid file is gone and cannot be made again: {error}");
                self
            }
        }
    }

    /// Which file it is, and its descriptor.
    pub fn identity(&self) -> Option<(FileIdentity, i32)> {
        let stat = fstat(&self.file).ok()?;
        Some((stat.into(), self.file.as_raw_fd()))
    }

    /// Where the file is, as it was named when it was taken.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file: the end of a daemon that ends in order. A file that somebody else put in its
    /// place stays.
    pub fn remove(&self) {
        if let Ok(held) = fstat(&self.file)
            && is_at(&self.path, &held)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(
                "Failed to remove pid file '{}': {error}",
                self.path.display()
            );
        }
    }
}

impl AsFd for PidFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Takes the lock of a pid file again, by its descriptor: another descriptor of the file was closed,
/// and with that the lock was gone.
pub fn lock_again(descriptor: i32) -> Result<(), Errno> {
    // SAFETY: nothing is done with the descriptor but this call, which fails if it is closed or another
    // file's that cannot be locked.
    lock(unsafe { BorrowedFd::borrow_raw(descriptor) })
}

/// Writes another number into a pid file, by its descriptor.
pub fn write_number(descriptor: i32, number: u32) -> Result<(), Errno> {
    // SAFETY: as above.
    let file = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let mut text = [0u8; 16];
    let mut rest = &mut text[..];
    let written = write!(rest, "{number}");
    let left = rest.len();
    written.map_err(|error| errno::of(&error))?;
    let length = text.len().saturating_sub(left);
    // Never empty in between: whoever reads it finds one number or the other, or their ends mixed up.
    nix::sys::uio::pwrite(file, text.get(..length).unwrap_or_default(), 0)?;
    let length = i64::try_from(length).map_err(|_| Errno::EINVAL)?;
    Ok(nix::unistd::ftruncate(file, length)?)
}

fn is_at(path: &Path, held: &FileStat) -> bool {
    stat(path).is_ok_and(|there| (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino))
}

fn lock(file: BorrowedFd<'_>) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_SETLK(&first_byte()))?;
    Ok(())
}

fn first_byte() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_replaced_ours_is_not_removed() {
        let path = std::env::temp_dir().join(format!("virtlockd-pid-test-{}", std::process::id()));
        let ours = PidFile::acquire(&path).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            std::process::id().to_string()
        );
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "other").unwrap();
        ours.remove();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "other");
        std::fs::remove_file(&path).unwrap();
    }
}
