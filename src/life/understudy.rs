//! The copy of the reactor that goes on should a successor not serve. It is made when the reactor has laid down
//! everything, before that ends and before the exec, holds everything that is open, and waits. So at any moment
//! there is somebody to go on, whoever is killed. A successor of ours ends it when it serves; of any other it
//! sees for itself whether it does. One that dies, or does not serve in time, is over when the understudy takes
//! its place.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{AccessFlags, access};

use crate::desk::Desk;
use crate::desk::control::{Failure, Order};
use crate::host::clock::Moment;
use crate::host::clone::{self, Which};
use crate::host::closer;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Process};
use crate::host::signals::{self, POKE};
use crate::host::{descriptors, memory};

/// How long a successor may take until it serves.
const SERVES: Duration = Duration::from_secs(30);
/// How often it is looked whether somebody is there. libvirt's daemon only closes what it lets go of, which
/// stays locked as long as a copy of it is open.
const BRIEFLY: Duration = Duration::from_micros(100);
/// For how long it is looked so often, and how often then.
const BRIEFLY_FOR: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(5);
/// So much of the time between two looks counts: a process that was frozen was not waited for.
const LONGEST_LOOK: Duration = Duration::from_millis(100);
/// A successor that lives so long after the last thing that can be seen of its start serves, where it cannot
/// be seen that it waits for clients, and where it can.
const UNSEEN: Duration = Duration::from_millis(50);
const SEEN: Duration = Duration::from_secs(1);
/// How long an understudy that was told to end may take for that, milliseconds.
const ENDS_MS: u64 = 1_000;

/// Which process this is.
pub enum Stands {
    /// The reactor: there is an understudy.
    There,
    /// The one that goes on: the understudy, whose time has come, or the reactor, which has no guardian.
    Here(Failure),
}

/// Makes the understudy for the exec of what was ordered.
///
/// # Errors
/// Why there is none.
pub fn stand_by(desk: &Desk, order: Order) -> Result<Stands, Errno> {
    let guardian = Process::open_any(desk.guardian().cast_signed());
    // Its parent's number is nobody else's as long as it is the parent's.
    if !desk.has_guardian() {
        return Ok(Stands::Here(Failure::Exec(Errno::ESRCH)));
    }
    let successor = guardian?;
    let ledgers = Ledgers::of(desk)?;
    let copy = match order {
        // libvirt's daemon waits for no child: this one is nobody's when the reactor ends.
        Order::Libvirt => clone::with_own_descriptors(),
        _ => clone::beside_with_own_descriptors(),
    };
    match copy? {
        Which::Original(understudy) => {
            desk.set_understudy(Some(understudy));
            Ok(Stands::There)
        }
        Which::Copy => {
            let failure = wait(desk, order, &successor, &ledgers);
            desk.set_understudy(None);
            if let Some(copy) = ledgers.copy {
                // As long as the other one is locked it is somebody's, and so is its name. To close it is not
                // enough: it is mapped here.
                if let Some(given) = ledgers.given {
                    memory::nobody_writes(&given);
                }
                drop(desk.ledger().map(descriptors::adopt));
                desk.set_ledger(Some(copy.into_raw_fd()));
            }
            Ok(Stands::Here(failure))
        }
    }
}

/// Whether what stands in the way of an understudy may be gone a moment later. What the host refuses for
/// ever is no reason never to replace the program: libvirt's daemon does it without.
pub fn may_be_had_later(reason: Errno) -> bool {
    errno::may_pass(reason) || matches!(reason, Errno::EAGAIN | Errno::ETIMEDOUT)
}

/// Ends an understudy that is not needed. It is told to, and not killed: in the same moment it may be about to
/// kill who tells it. One that is not a child of this process sees for itself that it is not needed.
pub fn dismiss(pid: i32) {
    if !clone::is_child(pid) {
        return;
    }
    tell(pid, POKE);
    let until = Moment::now().plus_ms(ENDS_MS);
    while clone::is_child(pid) {
        if Moment::now() >= until {
            tell(pid, Signal::SIGKILL);
            return clone::wait_for_end(pid);
        }
        clone::pause(BRIEFLY);
    }
}

/// Signals it in one way or the other: it would take this process for one that does not serve.
fn tell(pid: i32, signal: Signal) {
    if !clone::signal(pid, signal)
        && let Ok(understudy) = Process::open_any(pid)
    {
        let _ = understudy.signal(signal);
    }
}

/// The ledger that the successor is given, if one is, as it is before; and what the understudy goes on from, if
/// that is another one: the successor writes into what it is given.
struct Ledgers {
    given: Option<OwnedFd>,
    /// The one given is the daemon's own.
    is_own: bool,
    before: Option<Header>,
    copy: Option<OwnedFd>,
}

impl Ledgers {
    fn of(desk: &Desk) -> Result<Ledgers, Errno> {
        let given = desk.ordered_ledger().map(descriptors::copy).transpose()?;
        let is_own = given.is_some() && desk.ordered_ledger() == desk.ledger();
        let own = given.as_ref().filter(|_| is_own);
        let copy = own.map(memory::copy).transpose()?;
        let before = given.as_ref().and_then(Header::of);
        Ok(Ledgers {
            given,
            is_own,
            before,
            copy,
        })
    }

    fn header(&self) -> Option<Header> {
        Header::of(self.given.as_ref()?)
    }
}

/// The beginning of a ledger of any format.
struct Header([u8; 64]);

impl Header {
    fn of(ledger: &OwnedFd) -> Option<Header> {
        let mut bytes = [0; 64];
        let read = nix::sys::uio::pread(ledger, &mut bytes, 0);
        (read == Ok(bytes.len())).then_some(Header(bytes))
    }

    /// Whether it is not closed for a handover any more: whoever goes on from it opens it again.
    fn is_open(&self) -> bool {
        self.0.get(12..16) == Some(&[0; 4])
    }

    /// Which events count, and how many bytes they are, beside their checksum.
    fn events(&self) -> [Option<&[u8]>; 2] {
        [self.0.get(16..24), self.0.get(32..)]
    }
}

/// Waits until the successor serves, and ends with that; or until it is over.
fn wait(desk: &Desk, order: Order, successor: &Process, ledgers: &Ledgers) -> Failure {
    let own = process::own_number();
    desk.set_understudy(Some(own));
    let mut last = Moment::now();
    let mut waited = Duration::ZERO;
    let mut is_late = false;
    let mut signs = Signs {
        document: document(desk),
        ..Signs::default()
    };
    loop {
        let is_dead = successor.is_dead();
        // What it had to say it has said by then.
        let pause = match waited {
            _ if is_dead => Duration::ZERO,
            waited if waited < BRIEFLY_FOR => BRIEFLY,
            _ => LOOK,
        };
        let is_dismissed = signals::is_poked_within(pause);
        // A successor says by that that it serves, also one that was given a ledger of an earlier format.
        if is_dismissed && !ledgers.is_own && desk.ordered() == Some(order) {
            remove_file(desk);
        }
        // Somebody else may be in its place, or nobody needs it.
        if is_dismissed || desk.understudy() != Some(own) {
            closer::leave_quickly(0);
        }
        if is_dead {
            return if is_late {
                Failure::Late
            } else {
                Failure::Ended
            };
        }
        let now = Moment::now();
        let since = between_looks(last, now);
        last = now;
        waited = waited.saturating_add(since);
        let serves = match order {
            // It says so itself.
            Order::Ours | Order::WayBack => false,
            Order::Earlier => signs.of_earlier(ledgers, since),
            Order::Libvirt => signs.of_libvirts(desk, since),
        };
        if serves && !successor.is_dead() {
            // Unless it could not be executed, and this daemon goes on.
            if desk.ordered() == Some(order) {
                remove_file(desk);
            }
            closer::leave_quickly(0);
        }
        if waited >= SERVES && !is_late {
            is_late = true;
            let _ = successor.signal(Signal::SIGKILL);
        }
    }
}

/// The successor does not write the ledger that is in the run directory: the next start must not believe it.
fn remove_file(desk: &Desk) {
    if let Some(Ok(ledger)) = desk.ledger().map(descriptors::copy) {
        // Nobody is there to be told of a refusal, and the successor serves.
        let _ = memory::remove_own_name(&ledger);
    }
}

/// How long it was waited between two looks.
fn between_looks(last: Moment, now: Moment) -> Duration {
    Duration::from_nanos(now.0.saturating_sub(last.0)).min(LONGEST_LOOK)
}

/// Signs that a successor serves.
#[derive(Default)]
struct Signs {
    /// For how long there has been one.
    seen: Duration,
    /// The document that libvirt's daemon is to go on from.
    document: Option<u64>,
}

/// Which file is the document.
fn document(desk: &Desk) -> Option<u64> {
    nix::sys::stat::stat(desk.document())
        .ok()
        .map(|it| it.st_ino)
}

impl Signs {
    /// It has opened its ledger, and written to it, which it does when it has everything.
    fn of_earlier(&mut self, ledgers: &Ledgers, since: Duration) -> bool {
        let Some(now) = ledgers.header().filter(Header::is_open) else {
            return false;
        };
        self.seen = self.seen.saturating_add(since);
        let before = ledgers.before.as_ref();
        before.is_some_and(|before| before.events() != now.events()) || self.seen >= SEEN
    }

    /// libvirt's daemon removes its document when it has read it, then looks whether it can use it, and only
    /// then comes to its loop. It lets go of nothing before. If there is another document, it has served, and
    /// wrote that one for whoever follows it.
    fn of_libvirts(&mut self, desk: &Desk, since: Duration) -> bool {
        if access(desk.document(), AccessFlags::F_OK) != Err(nix::errno::Errno::ENOENT) {
            let found = document(desk);
            return self.document.is_some() && found.is_some() && found != self.document;
        }
        self.seen = self.seen.saturating_add(since);
        match process::waits_for_events(desk.guardian()) {
            Ok(true) => true,
            Ok(false) => self.seen >= SEEN,
            Err(_) => self.seen >= UNSEEN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_successor_is_not_late_because_the_machine_stood_still() {
        let start = Moment::now();
        let hour = between_looks(start, start.plus_ms(3_600_000));
        assert!(hour < SERVES / 100);
        assert_eq!(between_looks(start, start.plus_ms(7)).as_millis(), 7);
    }

    #[test]
    fn an_earlier_version_serves_when_it_has_written_and_not_when_it_has_read() {
        let path = std::env::temp_dir().join(format!("understudy-test-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        let ledger = File::options().read(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
        write(0, &[7; 64]);
        let given = OwnedFd::from(ledger);
        let before = Header::of(&given);
        let ledgers = Ledgers {
            given: Some(given),
            is_own: false,
            before,
            copy: None,
        };
        let look = Duration::from_millis(1);
        let mut signs = Signs::default();
        assert!(!signs.of_earlier(&ledgers, look));
        // It opens it again, and the checksum goes.
        write(12, &[0; 4]);
        write(24, &[0; 8]);
        assert!(!signs.of_earlier(&ledgers, look));
        write(40, &[9; 8]);
        assert!(signs.of_earlier(&ledgers, look));
        // The format before has the length elsewhere, and one that writes nothing is believed later.
        write(40, &[7; 8]);
        assert!(!signs.of_earlier(&ledgers, look));
        write(16, &[9; 8]);
        assert!(signs.of_earlier(&ledgers, look));
        write(16, &[7; 8]);
        assert!(signs.of_earlier(&ledgers, SEEN));
    }
}
