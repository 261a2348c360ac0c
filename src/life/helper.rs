//! The life of a helper, which this program is where it works on files of shares for a daemon: nothing of the
//! rest.

use crate::host::errno::Errno;
use crate::host::helper;
use crate::locks::errand;

/// Whether this process is to be one.
pub fn is_wanted() -> bool {
    std::env::var_os(helper::VARIABLE).is_some()
}

/// Works until the daemon needs it no more.
///
/// # Errors
/// What the host refuses it.
pub fn serve() -> Result<(), Errno> {
    helper::serve(errand::run)
}
