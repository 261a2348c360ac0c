//! A terminal, as far as its size goes.

use std::os::fd::{AsFd, AsRawFd};

/// How many characters a line of it has; `None` if it is no terminal.
pub fn width(terminal: impl AsFd) -> Option<usize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let number = terminal.as_fd().as_raw_fd();
    // SAFETY: the kernel stores a winsize at the address, which is that of a living one.
    let result = unsafe { libc::ioctl(number, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0).then_some(usize::from(size.ws_col))
}
