//! Word to the service manager: sd_notify(3) datagrams to the socket that NOTIFY_SOCKET names.
//!
//! A manager that does not listen must not stop the daemon, so nothing here waits and nothing fails.

use std::ffi::OsStr;
use std::fmt::Arguments;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use super::errno::{self, Errno};
use super::patience::patiently;
use super::{environment, process};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, sendto, socket,
};
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
    match monotonic_us() {
        Some(microseconds) => tell(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}")),
        None => tell("RELOADING=1"),
    }
}

/// The manager wants to know when a reload began, to tell an old READY=1 from a new one.
fn monotonic_us() -> Option<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?;
    let microseconds = now.tv_nsec().checked_div(1000)?;
    now.tv_sec()
        .checked_mul(1_000_000)?
        .checked_add(microseconds)
}

/// Word to the service manager from a process that opens and allocates nothing any more.
#[derive(Debug)]
pub struct Herald {
    socket: OwnedFd,
    address: UnixAddr,
}

/// The longest message of a [`Herald`], bytes.
const LONGEST: usize = 256;

impl Herald {
    /// If there is a service manager.
    pub fn open() -> Option<Herald> {
        let name = std::env::var_os("NOTIFY_SOCKET")?;
        let address = address(&name).ok()?;
        let socket = sender().ok()?;
        Some(Herald { socket, address })
    }

    /// Its descriptor.
    pub fn number(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Says this.
    pub fn say(&self, message: Arguments<'_>) {
        let _ = self.try_say(message);
    }

    fn try_say(&self, message: Arguments<'_>) -> Result<(), Errno> {
        let mut text = [0; LONGEST];
        let mut rest = &mut text[..];
        // One that is too long is cut.
        let _ = rest.write_fmt(message);
        let left = rest.len();
        let length = LONGEST.saturating_sub(left);
        say(
            &self.socket,
            &self.address,
            text.get(..length).unwrap_or_default(),
        )
    }

    /// Has the manager store a descriptor under this name, and keep it whatever becomes of what it stands
    /// for. Nobody says whether it does.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn store(&self, name: &str, descriptor: impl AsFd) -> Result<(), Errno> {
        let message = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        let descriptors = [descriptor.as_fd().as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let parts = [IoSlice::new(message.as_bytes())];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let (socket, address) = (self.socket.as_raw_fd(), Some(&self.address));
        // It may be busy with others at the moment.
        patiently(|| {
            sendmsg(socket, &parts, &rights, flags, address).map_err(Errno::from)?;
            Ok(())
        })
    }

    /// Has the manager forget what it stores under this name.
    pub fn forget(&self, name: &str) {
        // It may be busy with others at the moment. What is not heard stays there.
        let _ = patiently(|| self.try_say(format_args!("FDSTOREREMOVE=1\nFDNAME={name}")));
    }

    /// As [`reloading`].
    pub fn reloading(&self) {
        match monotonic_us() {
            Some(microseconds) => {
                self.say(format_args!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
            }
            None => self.say(format_args!("RELOADING=1")),
        }
    }
}

/// The variable by which a unit says what a stop is to be. Nobody but the unit knows whether the manager's
/// store outlives one (FileDescriptorStorePreserve=).
const ON_STOP: &str = "VIRTLOCKD_ON_STOP";
/// The value of it that lets a stop keep everything there.
const KEEP: &str = "keep";

/// Which process the service manager started, if it says so (systemd.exec(5)).
const STARTED: &str = "SYSTEMD_EXEC_PID";

/// Whether the service manager started this very process: only that one is given what is in the store.
pub fn is_started_by_manager() -> bool {
    let started = std::env::var(STARTED);
    started.map_or(true, |pid| pid.parse() == Ok(process::started()))
}

/// This program, and whatever it executes, makes no use of the store from now on.
pub fn leave_store_alone() {
    environment::take(ON_STOP);
}

/// Whether the service manager has a store for descriptors, and the unit says that it outlives a stop.
pub fn has_lasting_store() -> bool {
    let room = std::env::var("FDSTORE").ok();
    let room: Option<u32> = room.and_then(|room| room.parse().ok());
    room.is_some_and(|room| room > 0) && std::env::var_os(ON_STOP).is_some_and(|it| it == KEEP)
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

fn send(name: &OsStr, message: &str) -> Result<(), Errno> {
    say(&sender()?, &address(name)?, message.as_bytes())
}

/// `name` is a path, or `@` and a name of the abstract namespace.
fn address(name: &OsStr) -> Result<UnixAddr, Errno> {
    Ok(match name.as_bytes().split_first() {
        Some((b'@', name)) => UnixAddr::new_abstract(name)?,
        Some((b'/', _)) => UnixAddr::new(name)?,
        _ => return Err(Errno::EINVAL),
    })
}

fn sender() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(
        AddressFamily::Unix,
        SockType::Datagram,
        flags,
        None,
    )?)
}

fn say(sender: &OwnedFd, address: &UnixAddr, message: &[u8]) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendto(sender.as_raw_fd(), message, address, flags)?;
    Ok(())
}
