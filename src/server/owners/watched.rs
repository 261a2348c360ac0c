//! Owners that hold something and have no connection of their own.
//!
//! libvirtd makes short connections on behalf of its guests: to resume one, to give it another disk.
//! As a rule the guest has a connection of its own besides, whose end says that it is over. A guest
//! that had its own with an earlier daemon, which was killed or stopped, has none: the only sign of
//! its death is the death of its process. So such an owner is watched through a pidfd, which means one
//! process for ever, and its locks are freed when that is dead.
//!
//! A number is only watched if it means the same to whoever registered it as it does here. An owner
//! that cannot be watched is named in the log once, because its death frees nothing.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;

use foldhash::HashMap;

use super::Owners;
use crate::custody::clients::ClientId;
use crate::custody::own_connections::Own;
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Process};
use crate::locks::table::Pid;
use crate::server::deadlines::Deadline;
use crate::server::watch::Source;

/// How long until it is tried again to watch an owner for which there was no descriptor or no memory,
/// milliseconds.
const WATCH_RETRY_MS: u64 = 1000;

/// Why a number says nothing here.
const OTHER_NAMESPACE: &str = "the client that took them is in another pid namespace";

/// Why an owner's process is not watched.
enum Unseen {
    /// It may be possible a moment later.
    ForNow,
    /// It never will be, for this reason.
    Ever(String),
}

impl Owners<'_> {
    /// An owner was granted a lock over this connection. If that is not its own, and it has none, it is
    /// watched from now on. Whether the client is now known to mean the same process by a number as
    /// this daemon; `is_trusted` says that it was before.
    pub fn watch_owner(&mut self, id: ClientId, is_trusted: bool) -> bool {
        let state = self.custody.state();
        if let Some(client) = state.client(id)
            && client.own_owner().is_none()
            && let Some(owner) = client.owner.as_deref()
            && !state.has_own_connection(owner.pid, &owner.uuid)
        {
            let (pid, asked_by) = (owner.pid, client.peer().pid);
            self.watch_holder(pid, asked_by);
            return is_trusted || self.means_the_watched(pid, asked_by);
        }
        is_trusted
    }

    /// Whether a client that names an owner by a number that is watched was seen to mean that process.
    /// Should it be another one to him, the death of the one must not free what the other holds: then
    /// nobody's does.
    fn means_the_watched(&mut self, pid: Pid, asked_by: Pid) -> bool {
        let watched = self.custody.state().watched().get(&pid);
        if watched.is_none_or(|watched| watched.process.is_none()) {
            return false;
        }
        match self.with_spare(|| process::shares_numbers(asked_by)) {
            Ok(true) => true,
            Ok(false) => {
                self.end_watch(pid);
                self.is_unseen(pid, OTHER_NAMESPACE);
                false
            }
            // It is gone, or cannot be looked at now: what is known stays.
            Err(_) => false,
        }
    }

    /// A client said whom its connection speaks for. The one that it spoke for before may have no
    /// connection of its own now.
    pub fn owner_changed(&mut self, id: ClientId, (pid, uuid): (Pid, [u8; 16])) {
        let state = self.custody.state();
        let Some(client) = state.client(id) else {
            return;
        };
        let peer = client.peer().pid;
        if pid > 0 && pid == peer && !state.has_own_connection(pid, &uuid) {
            self.watch_holder(pid, peer);
        }
        self.end_idle_watch(pid);
    }

    /// Watches an owner without a connection of its own, if it holds anything. `asked_by` is the
    /// process that names it by its number.
    fn watch_holder(&mut self, pid: Pid, asked_by: Pid) {
        let state = self.custody.state();
        if state.table().holds(pid)
            && !state.watched().contains_key(&pid)
            && !state.fences().contains_key(&pid)
        {
            self.begin_to_watch(pid, Some(asked_by));
        }
    }

    /// Watches a process that is known to be the one of this number, if it holds anything for a domain
    /// without a connection of its own.
    pub fn watch_process(&mut self, pid: Pid) {
        let state = self.custody.state();
        if state.has_lent(pid)
            && !state.watched().contains_key(&pid)
            && !state.fences().contains_key(&pid)
        {
            self.begin_to_watch(pid, None);
        }
    }

    fn begin_to_watch(&mut self, pid: Pid, asked_by: Option<Pid>) {
        let mut asked_by = asked_by;
        if let Some(peer) = asked_by {
            match self.means_the_same_to(peer) {
                Ok(()) => asked_by = None,
                Err(Unseen::ForNow) => return self.watch_later(pid, asked_by),
                Err(Unseen::Ever(reason)) => return self.is_unseen(pid, &reason),
            }
        }
        match self.process_of_owner(pid) {
            Ok(process) => {
                self.wanted.remove(&pid);
                self.custody.watches(pid, Some(process.into_pidfd()));
                self.follow_watched(pid);
            }
            Err(Unseen::ForNow) => self.watch_later(pid, asked_by),
            Err(Unseen::Ever(reason)) => self.is_unseen(pid, &reason),
        }
    }

    /// Whether a peer and this daemon mean the same process by a number.
    fn means_the_same_to(&mut self, peer: Pid) -> Result<(), Unseen> {
        match self.with_spare(|| process::shares_numbers(peer)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Unseen::Ever(OTHER_NAMESPACE.into())),
            Err(reason) if errno::may_pass(reason) => Err(Unseen::ForNow),
            Err(reason) => Err(Unseen::Ever(format!(
                "in which pid namespace the client that took them is cannot be told: {}",
                errno::text(reason)
            ))),
        }
    }

    /// The process with an owner's number.
    fn process_of_owner(&mut self, pid: Pid) -> Result<Process, Unseen> {
        if pid <= 0 {
            return Err(Unseen::Ever("this is no process's number".into()));
        }
        // The one ends with everything else, and the other cannot be outlived.
        if pid == 1 || pid == process::started().cast_signed() {
            return Err(Unseen::Ever("this is no guest's process".into()));
        }
        match self.with_spare(|| Process::open_any(pid)) {
            Ok(process) => Ok(process),
            Err(Errno::ESRCH) => Err(Unseen::Ever("there is no process of this number".into())),
            Err(reason) if errno::may_pass(reason) => Err(Unseen::ForNow),
            Err(reason) => Err(Unseen::Ever(format!(
                "it cannot be watched: {}",
                errno::text(reason)
            ))),
        }
    }

    /// An owner's death will not be noticed: the log says so, once.
    fn is_unseen(&mut self, pid: Pid, reason: &str) {
        self.wanted.remove(&pid);
        tracing::warn!(
            target: "locking.lock_daemon",
            "{} holds locks and its process cannot be seen from here ({reason}): its death frees \
             nothing. Should it have ended, its locks stay until they are released in its name or \
             the daemon ends",
            self.text(pid)
        );
        self.custody.watches(pid, None);
    }

    fn watch_later(&mut self, pid: Pid, asked_by: Option<Pid>) {
        self.wanted.insert(pid, asked_by);
        if self.deadlines.get(Deadline::Watch).is_none() {
            let again = Moment::now().plus_ms(WATCH_RETRY_MS);
            self.deadlines.set(Deadline::Watch, again);
        }
    }

    /// Tries again to watch those that could not be watched. One that still cannot ends it for now:
    /// the others lack the same.
    pub fn watch_wanted(&mut self) {
        while let Some((pid, asked_by)) = self.wanted.pop_first() {
            let state = self.custody.state();
            if !state.has_lent(pid) || state.fences().contains_key(&pid) {
                continue;
            }
            self.begin_to_watch(pid, asked_by);
            if self.wanted.contains_key(&pid) {
                return;
            }
        }
    }

    /// Waits for the death of a watched process.
    pub fn follow_watched(&mut self, pid: Pid) {
        let watched = self.custody.state().watched().get(&pid);
        let process = watched.and_then(|watched| watched.process.as_ref());
        if let Some(process) = process
            && let Err(error) = self.watch.add(Source::Watched(pid), process.as_raw_fd())
        {
            tracing::error!(
                target: "locking.lock_daemon",
                "The death of {} cannot be waited for: {error}. It is looked for now and then",
                self.text(pid)
            );
            let again = Moment::now().plus_ms(WATCH_RETRY_MS);
            self.deadlines.set(Deadline::Unheard(pid), again);
        }
    }

    /// Whether the process of an owner that is watched is dead; `None` if none is.
    pub fn is_watched_and_dead(&self, pid: Pid) -> Option<bool> {
        let watched = self.custody.state().watched().get(&pid)?;
        watched.process.as_ref().map(process::is_dead)
    }

    /// A watched process gave a sign.
    pub fn look_at_watched(&mut self, pid: Pid) {
        if self.is_watched_and_dead(pid) == Some(true) {
            self.lines.dead.push_back(pid);
        }
    }

    /// The poll does not tell of the death of this one.
    pub fn look_for_unheard(&mut self, pid: Pid) {
        match self.is_watched_and_dead(pid) {
            Some(true) => self.lines.dead.push_back(pid),
            Some(false) => {
                let again = Moment::now().plus_ms(WATCH_RETRY_MS);
                self.deadlines.set(Deadline::Unheard(pid), again);
            }
            None => (),
        }
    }

    /// A process that was fenced or watched is dead: its locks go.
    pub fn bury(&mut self, pid: Pid) {
        self.fenced(pid);
        if self.is_watched_and_dead(pid) == Some(true) {
            // A later process of the same number, which is being fenced, has the rest freed.
            let state = self.custody.state();
            if !state.fences().contains_key(&pid) && state.table().holds(pid) {
                self.free_unless_succeeded(pid, None);
            }
            // Behind that: should this process die, the next one knows of the death by this alone.
            self.end_watch(pid);
        }
    }

    /// A connection that spoke for an owner does so no more. If the owner holds nothing it need not be
    /// watched. Not as soon as it holds nothing: whoever takes and releases a lock again and again
    /// would have it watched as often.
    pub fn end_idle_watch(&mut self, pid: Pid) {
        let state = self.custody.state();
        let any = !state.watched().is_empty() || !self.wanted.is_empty();
        if any && !state.table().holds(pid) {
            self.end_watch(pid);
        }
    }

    /// An owner need not be watched any more.
    pub fn end_watch(&mut self, pid: Pid) {
        self.wanted.remove(&pid);
        let Some(watched) = self.custody.unwatches(pid) else {
            return;
        };
        if let Some(process) = watched.process {
            self.watch.remove(process.as_raw_fd());
            self.deadlines.unset(Deadline::Unheard(pid));
        }
        self.reserve.refill();
    }

    /// Behind a start on an earlier image's state: owners that have no connection of their own, and
    /// that nobody watched there, are watched from now on.
    pub fn watch_the_unwatched(&mut self) {
        // A process that stands for several domains is watched once.
        let state = self.custody.state();
        let unwatched: BTreeSet<Pid> = state
            .table()
            .owners()
            .filter(|owner| {
                let pid = owner.pid;
                let has_own = match owner.key().uuid {
                    Some(uuid) => state.has_own_connection(pid, &uuid),
                    None => !matches!(state.own_connections().of(pid), Own::Nothing),
                };
                !has_own
                    && !state.watched().contains_key(&pid)
                    && !state.fences().contains_key(&pid)
            })
            .map(|owner| owner.pid)
            .collect();
        if unwatched.is_empty() {
            return;
        }
        // Whoever still has a connection for one of them says whether the number means the same here.
        let peers: HashMap<Pid, Pid> = state
            .clients()
            .filter_map(|(_, client)| Some((client.owner.as_deref()?.pid, client.peer().pid)))
            .collect();
        for pid in unwatched {
            self.begin_to_watch(pid, peers.get(&pid).copied());
        }
    }

    /// Looks at a process with one of the spare descriptors, if there are no others: with those that
    /// are not kept for fencing.
    fn with_spare<T>(&mut self, look: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            match look() {
                Err(Errno::EMFILE | Errno::ENFILE) if self.reserve.give_up_one_to_spare() => (),
                found => {
                    self.reserve.refill();
                    return found;
                }
            }
        }
    }
}
