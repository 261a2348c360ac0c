//! Word to the service manager: sd_notify(3) datagrams to the socket that NOTIFY_SOCKET names.
//!
//! A manager that does not listen must not stop the daemon, so nothing here waits and nothing fails.

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use super::errno::{self, Errno};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, sendto, socket};
use nix::time::{ClockId, clock_gettime};

/// The daemon serves.
pub fn ready() {
    tell("READY=1");
}

/// The daemon begins to end.
pub fn stopping() {
    tell("STOPPING=1");
}

/// The daemon begins to hand over to its successor, which will say [`ready`] again.
pub fn reloading() {
    // The manager wants to know when the reload began, to tell an old READY=1 from a new one.
    let microseconds = clock_gettime(ClockId::CLOCK_MONOTONIC).map(|now| {
        now.tv_sec()
            .saturating_mul(1_000_000)
            .saturating_add(now.tv_nsec().checked_div(1000).unwrap_or(0))
    });
    match microseconds {
        Ok(microseconds) => tell(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}")),
        Err(_) => tell("RELOADING=1"),
    }
}

fn tell(message: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(reason) = send(&name, message) {
        let reason = errno::text(reason);
        tracing::debug!("the service manager at {name:?} was not told '{message}': {reason}");
    }
}

/// `name` is a path, or `@` and a name of the abstract namespace.
fn send(name: &OsStr, message: &str) -> Result<(), Errno> {
    let address = match name.as_bytes().split_first() {
        Some((b'@', name)) => UnixAddr::new_abstract(name)?,
        Some((b'/', _)) => UnixAddr::new(name)?,
        _ => return Err(Errno::EINVAL),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let sender = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendto(sender.as_raw_fd(), message.as_bytes(), &address, flags)?;
    Ok(())
}
