//! Standard input, output and error, where they are none. libvirt's daemon may have been started with
//! one of these closed; then the next thing that it opened has the number, and may be a client's socket
//! or the disk of a guest. It is legal there, so it must be here: but nothing may ever be written to it,
//! no log line and no last word of a panic.

use std::os::fd::RawFd;

use super::guardian::Guarded;
use crate::custody::descriptor::{Number, Saved};
use crate::custody::state::State;
use crate::desk::Desk;
use crate::host::descriptors;
use crate::log;

/// The last of the three.
const LAST: RawFd = 2;

/// What was moved, by its number and the one that it has now.
pub type Moved = Vec<(RawFd, RawFd)>;

/// Before anything is written: keeps the log away from what the state says is not standard error. Whoever
/// comes next does so, too, even if it cannot read the state.
pub fn keep_clear_of(state: &State<Saved>, desk: Guarded) {
    if !state.descriptors().any(|number| number == Number(LAST)) {
        return;
    }
    if let Ok(desk) = desk {
        desk.has_no_stderr();
    }
    log::stderr_is_not_ours();
}

/// The same, for somebody who has not read the state yet.
pub fn keep_clear(desk: Guarded) {
    if desk.is_ok_and(Desk::lacks_stderr) {
        log::stderr_is_not_ours();
    }
}

/// Gives what has one of the three numbers another one, before anything is written. A file keeps its
/// number: the process's POSIX locks on it end when any descriptor of it is closed.
///
/// A reactor that died may have done it before.
pub fn clear(state: &mut State<Saved>, desk: Guarded) -> Moved {
    let mut moved = Vec::new();
    for number in 0..=LAST {
        if !state.has_socket(Number(number)) {
            continue;
        }
        let before = desk.ok().and_then(|desk| desk.moved(number));
        let Some(now) = before.or_else(|| descriptors::move_away(number).ok()) else {
            continue;
        };
        if let Ok(desk) = desk {
            desk.set_moved(number, Some(now));
        }
        state.renumber_socket(Number(number), Number(now));
        moved.push((number, now));
    }
    keep_clear_of(state, desk);
    moved
}
