//! Where the file of a resource is.
//!
//! In the default lockspace a resource's name is the path of its file. In a directory lockspace the
//! file is below the directory, and the kernel itself sees to it that it is: a name that climbs out
//! over `..`, or a symbolic link that leads out, is refused.

use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};

use crate::host::errno::Errno;
use crate::host::file::{self, Start};

/// The longest path that the kernel takes, with the zero byte at its end.
const PATH_MAX: usize = libc::PATH_MAX as usize;

/// How often a name is followed again that led to a file which is no more: on a network file system
/// what the kernel remembers of a name may be stale.
const STALE_ROUNDS: u32 = 4;

/// A resource's file, named as in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place<'a> {
    /// The lockspace's directory; empty for the default lockspace.
    pub lockspace: &'a [u8],
    /// The resource's name.
    pub name: &'a [u8],
}

/// Why a file could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unreachable {
    /// The name leaves the lockspace's directory.
    Leaves,
    /// A system call failed.
    System(Errno),
}

impl From<Errno> for Unreachable {
    fn from(errno: Errno) -> Self {
        Unreachable::System(errno)
    }
}

impl<'a> Place<'a> {
    /// Whether this is a file of the default lockspace: somebody's disk.
    pub fn is_default(&self) -> bool {
        self.lockspace.is_empty()
    }

    /// The path as messages give it.
    pub fn path(&self) -> Vec<u8> {
        if self.is_default() {
            self.name.to_vec()
        } else {
            [self.lockspace, b"/", self.name].concat()
        }
    }

    /// Hands `work` the place to start from and the path to follow. Where the path is below a
    /// directory, EXDEV from `work` means that it left it. After ESTALE all is done once more.
    #[inline]
    pub fn reach<T>(
        &self,
        work: impl Fn(Start<'_>, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Unreachable> {
        for _ in 0..STALE_ROUNDS {
            match self.reach_once(&work) {
                Err(Unreachable::System(Errno::ESTALE)) => (),
                result => return result,
            }
        }
        self.reach_once(&work)
    }

    #[inline]
    fn reach_once<T>(
        &self,
        work: impl Fn(Start<'_>, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Unreachable> {
        if self.is_default() {
            return Ok(work(Start::Anywhere, self.name)?);
        }
        if climbs_out(self.name) {
            return Err(Unreachable::Leaves);
        }
        // As one path, which is how the reference daemon opens it, it would be too long.
        if self.path().len() >= PATH_MAX {
            return Err(Unreachable::System(Errno::ENAMETOOLONG));
        }
        let directory = file::open_directory(self.lockspace)?;
        match work(Start::Beneath(directory.as_fd()), beneath(self.name)) {
            Err(Errno::EXDEV) => Err(Unreachable::Leaves),
            result => Ok(result?),
        }
    }
}

/// The name as a path relative to the directory: `<directory>/<name>` with slashes in front of the
/// name, or no name, is still below the directory.
fn beneath(name: &[u8]) -> &[u8] {
    let start = name
        .iter()
        .position(|byte| *byte != b'/')
        .unwrap_or(name.len());
    match name.get(start..) {
        None | Some(b"") => b".",
        Some(rest) => rest,
    }
}

/// Whether the name goes above the directory, looked at as text alone.
fn climbs_out(name: &[u8]) -> bool {
    let mut depth = 0usize;
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => (),
            b".." => match depth.checked_sub(1) {
                Some(above) => depth = above,
                None => return true,
            },
            _ => depth = depth.saturating_add(1),
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_climbs_out_is_seen() {
        for name in ["..", "../x", "a/../../x", "/../x", "./../a"] {
            assert!(climbs_out(name.as_bytes()), "{name}");
        }
        for name in ["", "a", "a/..", "a/../b", "/etc/passwd", "...", "..a"] {
            assert!(!climbs_out(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn leading_slashes_and_an_empty_name_stay_below_the_directory() {
        assert_eq!(beneath(b"//etc"), b"etc");
        assert_eq!(beneath(b""), b".");
        assert_eq!(beneath(b"a//b"), b"a//b");
    }
}
