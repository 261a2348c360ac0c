//! The environment: variables that are meant for this process alone are taken out of it, so that no
//! program it starts finds them.

use std::ffi::OsString;

/// Takes a variable out of the environment. Only before or without threads, which this program has
/// none of.
pub fn take(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name);
    if value.is_some() {
        // SAFETY: this program has no threads, so nobody reads the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
    value
}
