//! The C library's text of an error number: replies and log lines must read as the reference
//! daemon's do.

use nix::errno::Errno;

/// What strerror(3) says, in the C locale.
pub fn text(errno: Errno) -> String {
    let number = errno as i32;
    let text = std::io::Error::from_raw_os_error(number).to_string();
    // The standard library appends the number to what strerror_r(3) gave it.
    match text.strip_suffix(&format!(" (os error {number})")) {
        Some(plain) => plain.to_owned(),
        None => text,
    }
}

/// The error number inside an I/O error; EIO for one that did not come from the kernel.
pub fn of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Whether a call that failed for this reason may succeed a moment later.
pub fn may_pass(reason: Errno) -> bool {
    matches!(
        reason,
        Errno::ENOMEM | Errno::ENOBUFS | Errno::EMFILE | Errno::ENFILE | Errno::EINTR
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_that_of_the_c_library() {
        assert_eq!(text(Errno::EAGAIN), "Resource temporarily unavailable");
        assert_eq!(text(Errno::ELOOP), "Too many levels of symbolic links");
    }
}
