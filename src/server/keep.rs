//! The stop that keeps: everything that the daemon holds is put into the bag that the service manager has for
//! it, and the next start goes on from there. Nobody is fenced for it, but owners whose locks cannot outlive
//! this process.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, RawFd};

use super::upgrade::{Going, cannot_write};
use crate::custody::clients::ClientId;
use crate::custody::descriptor::{Number, Open};
use crate::custody::state::State;
use crate::host::errno::{self, Errno};
use crate::host::patience::while_it_may_pass;
use crate::host::refusal::Refusal;
use crate::locks::lease::LockKind;
use crate::locks::table::Pid;
use crate::restart::bag;
use crate::restart::handover;

/// After how many reactors that died while they packed the next one does not try it.
pub const TRIES: u64 = 2;

/// Owners with POSIX locks, as libvirt's daemon takes them: the kernel frees these with the process that has
/// them, whoever has the files open.
pub fn unkeepable(state: &State<Open>) -> BTreeSet<Pid> {
    let held = state.table().iter().map(|(_, resource)| resource);
    held.filter(|resource| matches!(resource.lease.kind, LockKind::Process { .. }))
        .flat_map(|resource| resource.holders().map(|(owner, _)| owner.pid))
        .collect()
}

/// The connections that these processes made for themselves.
pub fn connections_of(state: &State<Open>, pids: &BTreeSet<Pid>) -> Vec<ClientId> {
    let clients = state.clients();
    let theirs = clients.filter(|(_, client)| {
        let owner = client.own_owner();
        owner.is_some_and(|owner| pids.contains(&owner.pid))
    });
    theirs.map(|(id, _)| id).collect()
}

impl Going<'_> {
    /// Closes the ledger and puts it into the bag, with all that it speaks of.
    ///
    /// # Errors
    /// Why nothing is in the bag. The ledger is to be opened again.
    pub fn pack(&mut self, mouth: RawFd) -> Result<(), String> {
        let no_room = Refusal::of("the state cannot be written");
        let closed = while_it_may_pass(|| self.close_ledger(None).map_err(&no_room));
        closed.map_err(|refusal| cannot_write(refusal.reason))?;
        let ledger = self.custody.ledger().map(AsRawFd::as_raw_fd);
        let ledger = ledger.map_err(handover::nothing_to_pass_on)?;
        let state = self.custody.state();
        // The next daemon has a pid file of its own.
        let pid_file = state.settings().pid_file.as_ref();
        let pid_file = pid_file.map(|(number, _)| Number(*number));
        let all = state.descriptors();
        let all = all.filter(|number| Some(*number) != pid_file);
        let all: Vec<RawFd> = all.map(|number| number.0).collect();
        let refused = Refusal::of("it cannot be given all that is held (sendmsg)");
        let filled = || bag::fill(mouth, ledger, &all).map_err(&refused);
        while_it_may_pass(filled).map_err(|refusal| match refusal.reason {
            Errno::EPIPE => {
                "it does not keep anything for this unit (FileDescriptorStoreMax=)".into()
            }
            Errno::ETOOMANYREFS => format!(
                "{} descriptors would be on their way, more than are allowed (LimitNOFILE=)",
                all.len()
            ),
            reason => format!("{}: {}", refusal.what, errno::text(reason)),
        })
    }
}
