//! A lock that was had and turned out not to be wanted, as a plain value: whoever lets go of it may hang, and needs
//! neither the table nor the ledger.

use std::os::fd::OwnedFd;

use crate::host::file::FileIdentity;
use crate::locks::table::Mode;

/// A lock that was had and is not wanted: to be let go of.
#[derive(Debug)]
pub struct Unwanted {
    /// The lockspace's directory.
    pub lockspace: Vec<u8>,
    /// The name in it.
    pub name: Vec<u8>,
    /// Which file it is.
    pub identity: FileIdentity,
    /// The file goes, too, because it was made for this lock: the mode in which it was had.
    pub removes: Option<Mode>,
    /// The file, locked.
    pub file: OwnedFd,
}
