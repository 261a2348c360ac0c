//! Error numbers of the kernel. Each is kept as the kernel gave it, also one that has no name: some
//! file systems let numbers out that are meant for the kernel alone (512, 524, 528 from NFS and
//! FUSE), and whoever reads the error must be able to look it up.
//!
//! nix has one value for all numbers without a name, and that value is 0. Therefore its errors become
//! ours where the call was made, by `?` or `map_err(Errno::from)`, before anything else is asked
//! of the kernel: until then the C library still has the number.

use std::fmt;

use nix::errno::{Errno as Named, ErrnoSentinel};

/// Why a system call failed. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(from = "i32", into = "i32")]
pub struct Errno(i32);

impl From<i32> for Errno {
    fn from(number: i32) -> Errno {
        Errno::from_raw(number)
    }
}

impl From<Errno> for i32 {
    fn from(errno: Errno) -> i32 {
        errno.0
    }
}

/// The numbers that something depends on.
macro_rules! names {
    ($($name:ident)*) => {
        #[allow(missing_docs, reason = "errno(3) has their meanings")]
        impl Errno {
            $(pub const $name: Errno = Errno(libc::$name);)*
        }
    };
}

names! {
    EACCES EAGAIN EBADF ECONNABORTED ECONNREFUSED ECONNRESET EDQUOT EEXIST EFBIG EINTR EINVAL EIO EISDIR ELOOP
    EMFILE EMSGSIZE ENAMETOOLONG ENFILE ENOBUFS ENOENT ENOMEM ENOSPC ENOSYS ENOTDIR ENXIO EOPNOTSUPP EPERM
    EPIPE EPROTOTYPE EROFS ESRCH ESTALE ETIMEDOUT ETOOMANYREFS EXDEV
}

impl Errno {
    /// This number. EIO for 0, which is no error: something failed, and nobody knows why.
    pub fn from_raw(number: i32) -> Errno {
        match number {
            0 => Errno::EIO,
            number => Errno(number),
        }
    }

    /// The number.
    pub fn number(self) -> i32 {
        self.0
    }

    /// What a system call returned, or why it failed. To be asked right after the call.
    pub fn result<S: ErrnoSentinel + PartialEq>(returned: S) -> Result<S, Errno> {
        Named::result(returned).map_err(Errno::from)
    }
}

/// Right after the call that failed: see the head of this file.
impl From<Named> for Errno {
    fn from(named: Named) -> Errno {
        Errno::from_raw(match named {
            Named::UnknownErrno => Named::last_raw(),
            named => named as i32,
        })
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> std::io::Error {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

/// The name, or the number of one that has none.
impl fmt::Debug for Errno {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Named::from_raw(self.0) {
            Named::UnknownErrno => self.0.fmt(out),
            named => named.fmt(out),
        }
    }
}

/// What strerror(3) says, in the C locale: replies and log lines must read as the reference daemon's
/// do.
pub fn text(errno: Errno) -> String {
    let number = errno.number();
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
        Errno::ENOMEM
            | Errno::ENOBUFS
            | Errno::ENOSPC
            | Errno::EMFILE
            | Errno::ENFILE
            | Errno::EINTR
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

    // epoll_ctl(2): a user may have so many watches at a time.
    #[test]
    fn a_lack_may_pass_and_a_refusal_does_not() {
        assert!(may_pass(Errno::ENOSPC) && may_pass(Errno::EMFILE));
        assert!(!may_pass(Errno::EPERM) && !may_pass(Errno::ENOSYS));
    }

    #[test]
    #[cfg_attr(miri, ignore = "miri's own strerror says more")]
    fn a_number_without_a_name_is_told_and_never_called_success() {
        for number in [512, 524, 528, 4000] {
            Named::set_raw(number);
            let errno = Errno::result(-1).unwrap_err();
            assert_eq!(errno.number(), number);
            assert_eq!(text(errno), format!("Unknown error {number}"));
            let error = std::io::Error::from_raw_os_error(number);
            assert_eq!(of(&error), errno);
        }
        assert_eq!(Errno::from_raw(0), Errno::EIO);
    }
}
