//! The limit of open files. Every running machine keeps one connection open, so the daemon takes
//! what its host allows it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::errno::Errno;

/// Raises the soft limit of open files to the hard limit and returns it. The soft limit of most
/// hosts is 1024 for the sake of programs that use select(2), which this one does not.
pub fn raise_open_files() -> Result<u64, Errno> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}
