//! What a reactor that died left open, and nobody knows of: it had opened something and not written it down,
//! or had written down that it was to be closed. A connection that was accepted is served; a file is unlocked
//! and closed; what others gave to the process before it was a daemon stays as it is.

use std::os::fd::{OwnedFd, RawFd};

use crate::custody::descriptor::{Number, Saved};
use crate::custody::servers::Service;
use crate::custody::state::State;
use crate::desk::Desk;
use crate::host::descriptors::{self, Marked};
use crate::host::stream;

/// The last of standard input, output and error.
const LAST_STANDARD: RawFd = 2;

/// What was found.
#[derive(Debug, Default)]
pub struct Swept {
    /// Connections that nobody has served.
    pub accepted: Vec<(OwnedFd, Service)>,
    /// Others, which are to be closed when it is known what was done with them.
    pub left: Vec<OwnedFd>,
    /// Those that cannot be closed: a POSIX lock on the same file would go with them.
    pub kept: Vec<RawFd>,
}

/// Looks for what is in nobody's hands among all that is `open`. Nothing may have been opened since the reactor
/// died. `known` are those that are seen to otherwise: of which the ledger says that they are to be closed, and
/// the poll.
pub fn sweep(
    state: &State<Saved>,
    ledger: RawFd,
    (open, known): (&[RawFd], &[RawFd]),
    desk: &Desk,
) -> Swept {
    let mut swept = Swept::default();
    let mut avoid = state.avoid().to_vec();
    avoid.extend(desk.pid_file().and_then(descriptors::identity));
    for number in unknown(state, ledger, open, desk) {
        if known.contains(&number) {
            continue;
        }
        let mut listeners = state.listeners().iter();
        let door = listeners
            .find(|it| stream::is_connection_to(it.socket.0, number))
            .filter(|_| desk.ending() != Some(number));
        let is_avoided = || descriptors::identity(number).is_some_and(|it| avoid.contains(&it));
        if door.is_none() && !avoid.is_empty() && is_avoided() {
            swept.kept.push(number);
            continue;
        }
        let Ok(descriptor) = descriptors::adopt(number) else {
            continue;
        };
        match door {
            Some(door) => swept.accepted.push((descriptor, door.server)),
            None if descriptors::may_be_of_lock(&descriptor) => swept.left.push(descriptor),
            // At once: there may be no others for what this reactor needs.
            None => drop(descriptor),
        }
    }
    swept
}

/// What was open before anything was opened here, unless the state speaks of it: it is never touched.
pub fn respect(open: &[RawFd], state: &State<Saved>, desk: &Desk) {
    let known: Vec<RawFd> = state.descriptors().map(|Number(number)| number).collect();
    let known = Marked::of(&known);
    open.iter()
        .filter(|number| !known.has(**number))
        .for_each(|number| desk.set_stranger(*number));
}

/// What is open and was opened by nobody here: it is never touched.
pub fn respect_strangers(state: &State<Saved>, ledger: RawFd, open: &[RawFd], desk: &Desk) {
    for number in unknown(state, ledger, open, desk) {
        desk.set_stranger(number);
    }
}

/// Those of the open descriptors of which neither the state nor anything else of the daemon speaks.
fn unknown(state: &State<Saved>, ledger: RawFd, open: &[RawFd], desk: &Desk) -> Vec<RawFd> {
    let mut known: Vec<RawFd> = state.descriptors().map(|Number(number)| number).collect();
    known.push(ledger);
    known.extend(desk.herald());
    known.extend(desk.pid_file());
    known.extend(desk.mouth());
    known.extend(desk.taken());
    let known = Marked::of(&known);
    let is_unknown = |number: &RawFd| {
        *number > LAST_STANDARD && !known.has(*number) && !desk.is_stranger(*number)
    };
    open.iter().copied().filter(is_unknown).collect()
}
