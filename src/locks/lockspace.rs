//! The directory of a lockspace.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::host::errno::{self, Errno};
use crate::host::paths;

/// Why there is no lockspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum NotMade {
    /// Something else has the directory's name.
    NotADirectory,
    /// There are as many as there may be.
    TooMany,
    /// It could not be made.
    System(Errno),
}

/// Whether there is a directory with this path.
pub fn is_directory(path: &[u8]) -> bool {
    paths::is_directory(Path::new(OsStr::from_bytes(path)))
}

/// Makes sure that there is a directory: one that exists is used as it is, a missing one is made
/// with its parents, mode 0700. Whether it was.
pub fn make_directory(path: &[u8]) -> Result<bool, NotMade> {
    let path = Path::new(OsStr::from_bytes(path));
    if paths::is_directory(path) {
        return Ok(false);
    }
    if nix::sys::stat::stat(path).is_ok() {
        return Err(NotMade::NotADirectory);
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| NotMade::System(errno::of(&error)))?;
    Ok(true)
}
