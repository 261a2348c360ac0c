//! The copy of the guardian that goes on should a successor not serve. It is made just before the exec, holds
//! everything that is open, and waits. A successor of ours ends it when it serves; of any other it sees for
//! itself whether it does. One that dies, or does not serve in time, is over when the understudy takes its
//! place.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::desk::Desk;
use crate::desk::control::{Failure, Order};
use crate::host::clock::Moment;
use crate::host::clone::{self, Which};
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Process};
use crate::host::{descriptors, memory};

/// How long a successor may take until it serves, milliseconds.
const SERVES_MS: u64 = 30_000;
/// How long the understudy may take until it is there, milliseconds.
const STANDS_MS: u64 = 5_000;
/// How often it is looked whether somebody is there. All clients wait for the understudy; and libvirt's daemon
/// only closes what it lets go of, which stays locked as long as a copy of it is open.
const BRIEFLY: Duration = Duration::from_micros(100);
/// For how long it is looked so often, and how often then, milliseconds.
const BRIEFLY_MS: u64 = 2_000;
const LOOK: Duration = Duration::from_millis(5);
/// Where in a ledger it says whether it is closed for a handover: whoever goes on from it opens it again.
const IS_CLOSED_AT: i64 = 12;

/// Which of the two processes this is.
pub enum Stands {
    /// The guardian: there is an understudy.
    There,
    /// The understudy, whose time has come.
    Here(Failure),
}

/// Makes the understudy for the exec of what was ordered. No other process may share descriptors with this
/// one.
///
/// # Errors
/// Why there is none.
pub fn stand_by(desk: &Desk, order: Order) -> Result<Stands, Errno> {
    let successor = Process::open_any(process::own_number())?;
    desk.set_understudy(None);
    desk.no_reason_against_understudy();
    match clone::with_own_descriptors()? {
        Which::Original(child) => {
            let until = Moment::now().plus_ms(STANDS_MS);
            if order == Order::Libvirt {
                // libvirt's daemon waits for no child: this one has made the understudy, and ends.
                clone::wait_for_end(child);
            }
            while desk.understudy().is_none() {
                let is_over = order != Order::Libvirt && !clone::is_child(child);
                if let Some(reason) = desk.why_no_understudy() {
                    if order != Order::Libvirt {
                        clone::wait_for_end(child);
                    }
                    return Err(reason);
                }
                // It may have become it in the moment before.
                if (is_over && desk.understudy().is_none()) || Moment::now() >= until {
                    return Err(Errno::ETIMEDOUT);
                }
                clone::pause(BRIEFLY);
            }
            Ok(Stands::There)
        }
        Which::Copy => {
            if order == Order::Libvirt {
                match clone::with_own_descriptors() {
                    Ok(Which::Copy) => (),
                    Ok(Which::Original(_)) => clone::leave(0),
                    Err(reason) => refuse(desk, reason),
                }
            }
            let ledgers = keep_ledger(desk).unwrap_or_else(|reason| refuse(desk, reason));
            desk.set_understudy(Some(process::own_number()));
            let failure = wait(desk, order, &successor, ledgers.given.as_ref());
            desk.set_understudy(None);
            if let Some(copy) = ledgers.copy {
                // As long as the other one is open anywhere it is somebody's, and so is its name.
                drop(ledgers.given);
                drop(desk.ledger().map(descriptors::adopt));
                desk.set_ledger(Some(copy.into_raw_fd()));
            }
            Ok(Stands::Here(failure))
        }
    }
}

/// The end of a process that cannot become the understudy.
fn refuse(desk: &Desk, reason: Errno) -> ! {
    desk.no_understudy(reason);
    clone::leave(0);
}

/// Whether what stands in the way of an understudy may be gone a moment later. What the host refuses for
/// ever is no reason never to replace the program: libvirt's daemon does it without.
pub fn may_be_had_later(reason: Errno) -> bool {
    errno::may_pass(reason) || matches!(reason, Errno::EAGAIN | Errno::ETIMEDOUT)
}

/// Ends an understudy that is not needed.
pub fn dismiss(pid: i32) {
    // It would take this one for one that does not serve.
    if !clone::signal(pid, Signal::SIGKILL)
        && let Ok(understudy) = Process::open_any(pid)
    {
        let _ = understudy.signal(Signal::SIGKILL);
    }
    clone::wait_for_end(pid);
}

/// The ledger that the successor is given, if one is, and what this process goes on from, if that is another
/// one: the successor writes into what it is given.
struct Ledgers {
    given: Option<OwnedFd>,
    copy: Option<OwnedFd>,
}

fn keep_ledger(desk: &Desk) -> Result<Ledgers, Errno> {
    let given = desk.ordered_ledger().map(descriptors::copy).transpose()?;
    let is_own = given.is_some() && desk.ordered_ledger() == desk.ledger();
    let own = given.as_ref().filter(|_| is_own);
    let copy = own.map(memory::copy).transpose()?;
    Ok(Ledgers { given, copy })
}

/// Waits until the successor serves, and ends with that; or until it is over.
fn wait(desk: &Desk, order: Order, successor: &Process, given: Option<&OwnedFd>) -> Failure {
    let start = Moment::now();
    loop {
        if successor.is_dead() {
            return Failure::Ended;
        }
        let serves = match order {
            // It says so itself, by ending this process.
            Order::Ours | Order::WayBack => false,
            Order::Earlier => given.is_some_and(is_open_again),
            Order::Libvirt => {
                nix::unistd::access(desk.document(), nix::unistd::AccessFlags::F_OK).is_err()
            }
        };
        if serves && !successor.is_dead() {
            remove_file(desk);
            clone::leave(0);
        }
        let waited = Moment::now().ms_since(start);
        if waited >= SERVES_MS {
            let _ = successor.signal(Signal::SIGKILL);
            while !successor.is_dead() {
                clone::pause(LOOK);
            }
            return Failure::Late;
        }
        clone::pause(if waited < BRIEFLY_MS { BRIEFLY } else { LOOK });
    }
}

/// The successor does not write the ledger that is in the run directory: the next start must not believe it.
fn remove_file(desk: &Desk) {
    if let Some(Ok(ledger)) = desk.ledger().map(descriptors::copy) {
        // Nobody is there to be told of a refusal, and the successor serves.
        let _ = memory::remove_own_name(&ledger);
    }
}

fn is_open_again(ledger: &OwnedFd) -> bool {
    let mut is_closed = [0; 4];
    let read = nix::sys::uio::pread(ledger, &mut is_closed, IS_CLOSED_AT);
    read == Ok(is_closed.len()) && u32::from_le_bytes(is_closed) == 0
}
