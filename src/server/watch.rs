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

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};

use foldhash::HashMap;
use mio::unix::SourceFd;
use slab::Slab;

use super::daemon::Daemon;
use super::deadlines::Deadline;
use super::token::Source;
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Process};
use crate::locks::table::{Owner, Pid};
use crate::restart::event::Event;
use crate::restart::state::WatchState;

/// How long until it is tried again to watch an owner for which there was no descriptor or no memory,
/// milliseconds.
const WATCH_RETRY_MS: u64 = 1000;

/// Why a number says nothing here.
const OTHER_NAMESPACE: &str = "the client that took them is in another pid namespace";

/// An owner without a connection of its own.
#[derive(Debug)]
pub struct Watched {
    /// Its number, under which its locks are held.
    pub pid: Pid,
    /// The process; `None` if it cannot be seen from here, which the log has said.
    pub process: Option<Process>,
}

/// Who is watched because it has no connection of its own.
#[derive(Debug, Default)]
pub struct Watches {
    watched: Slab<Watched>,
    by_pid: HashMap<Pid, usize>,
    /// Owners that could not be watched yet, for want of descriptors or memory: those of which it is
    /// still to be found out whether their number means the same here with the process that knows.
    wanted: BTreeMap<Pid, Option<Pid>>,
}

impl Watches {
    fn of(&self, pid: Pid) -> Option<&Watched> {
        self.watched.get(*self.by_pid.get(&pid)?)
    }

    /// Whether the process that has this number is watched, and lives.
    pub fn is_alive(&self, pid: Pid) -> bool {
        self.of(pid)
            .and_then(|watched| watched.process.as_ref())
            .is_some_and(|process| !process.is_dead())
    }

    /// Whether the process that had this number was watched, and is dead.
    fn is_dead(&self, pid: Pid) -> bool {
        self.of(pid)
            .and_then(|watched| watched.process.as_ref())
            .is_some_and(Process::is_dead)
    }

    /// How many owners are watched or were to be.
    pub fn len(&self) -> usize {
        self.watched.len().saturating_add(self.wanted.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them, as they are written down.
    pub fn states(&self) -> impl Iterator<Item = WatchState> {
        self.watched.iter().map(|(_, watched)| state_of(watched))
    }
}

fn state_of(watched: &Watched) -> WatchState {
    WatchState {
        pid: watched.pid,
        descriptor: watched
            .process
            .as_ref()
            .map(|process| process.pidfd().as_raw_fd()),
    }
}

/// Why an owner's process is not watched.
enum Unseen {
    /// It may be possible a moment later.
    ForNow,
    /// It never will be, for this reason.
    Ever(String),
}

impl Daemon {
    /// An owner was granted a lock over this connection. If that is not its own, and it has none, it is
    /// watched from now on.
    pub fn watch_owner(&mut self, place: usize) {
        if let Some(connection) = self.connections.get(place)
            && connection.own_owner().is_none()
            && let Some(owner) = connection.session.owner()
            && !self.own_connections.has(owner.pid, &owner.uuid)
        {
            let (pid, asked_by) = (owner.pid, connection.peer.pid);
            let is_trusted = connection.shares_numbers;
            self.watch_holder(pid, asked_by);
            if !is_trusted {
                self.look_at_numbers(place, pid, asked_by);
            }
        }
    }

    /// A client said whom its connection speaks for. The one that it spoke for before may have no
    /// connection of its own now.
    pub fn owner_changed(&mut self, place: usize, before: Option<&Owner>) {
        let Some(connection) = self.connections.get(place) else {
            return;
        };
        let peer = connection.peer.pid;
        let Some(before) = before else {
            return;
        };
        if connection.stands_for(before) && !self.own_connections.has(before.pid, &before.uuid) {
            self.watch_holder(before.pid, peer);
        }
        self.end_idle_watch(before.pid);
    }

    /// Watches an owner without a connection of its own, if it holds anything. `asked_by` is the
    /// process that names it by its number.
    fn watch_holder(&mut self, pid: Pid, asked_by: Pid) {
        if self.keeper.table().holds(pid)
            && self.watches.of(pid).is_none()
            && self.fences.of(pid).is_none()
        {
            self.begin_to_watch(pid, Some(asked_by));
        }
    }

    /// Somebody names an owner by a number that is watched. Should that be another process to him, the
    /// death of the one must not free what the other holds: then nobody's does. Each connection is looked
    /// at once.
    fn look_at_numbers(&mut self, place: usize, pid: Pid, asked_by: Pid) {
        if self.watches.of(pid).is_none_or(|it| it.process.is_none()) {
            return;
        }
        match self.with_spare(|| process::shares_numbers(asked_by)) {
            Ok(true) => {
                if let Some(connection) = self.connections.get_mut(place) {
                    connection.shares_numbers = true;
                }
            }
            Ok(false) => {
                self.end_watch(pid);
                self.is_unseen(pid, OTHER_NAMESPACE);
            }
            // It is gone, or cannot be looked at now: what is known stays.
            Err(_) => (),
        }
    }

    /// Watches a process that is known to be the one of this number, if it holds anything for a domain
    /// without a connection of its own.
    pub fn watch_process(&mut self, pid: Pid) {
        if self.has_lent(pid) && self.watches.of(pid).is_none() && self.fences.of(pid).is_none() {
            self.begin_to_watch(pid, None);
        }
    }

    /// Whether a process holds anything for a domain without a connection of its own.
    fn has_lent(&self, pid: Pid) -> bool {
        let has_none = |owner: &Owner| !self.own_connections.has(pid, &owner.uuid);
        self.keeper.table().owners_of(pid).any(has_none)
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
                self.watches.wanted.remove(&pid);
                self.enter_watch(pid, Some(process));
                self.note_watch(pid);
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
        if pid == 1 || pid == process::own_number() {
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
        self.watches.wanted.remove(&pid);
        tracing::warn!(
            target: "locking.lock_daemon",
            "{} holds locks and its process cannot be seen from here ({reason}): its death frees \
             nothing. Should it have ended, its locks stay until they are released in its name or \
             the daemon ends",
            self.owner_text(pid)
        );
        self.enter_watch(pid, None);
        self.note_watch(pid);
    }

    fn watch_later(&mut self, pid: Pid, asked_by: Option<Pid>) {
        self.watches.wanted.insert(pid, asked_by);
        if self.deadlines.get(Deadline::Watch).is_none() {
            let again = Moment::now().plus_ms(WATCH_RETRY_MS);
            self.deadlines.set(Deadline::Watch, again);
        }
    }

    /// Tries again to watch those that could not be watched. One that still cannot ends it for now:
    /// the others lack the same.
    pub fn watch_wanted(&mut self) {
        while let Some((pid, asked_by)) = self.watches.wanted.pop_first() {
            if !self.has_lent(pid) || self.fences.of(pid).is_some() {
                continue;
            }
            self.begin_to_watch(pid, asked_by);
            if self.watches.wanted.contains_key(&pid) {
                return;
            }
        }
    }

    fn enter_watch(&mut self, pid: Pid, process: Option<Process>) {
        let pidfd = process.as_ref().map(|process| process.pidfd().as_raw_fd());
        let place = self.watches.watched.insert(Watched { pid, process });
        self.watches.by_pid.insert(pid, place);
        if let Some(pidfd) = pidfd
            && let Err(error) = Source::Watched(place).watch(&self.registry, pidfd)
        {
            tracing::error!(
                target: "locking.lock_daemon",
                "The death of {} cannot be waited for: {error}. It is looked for now and then",
                self.owner_text(pid)
            );
            let again = Moment::now().plus_ms(WATCH_RETRY_MS);
            self.deadlines.set(Deadline::Unheard(pid), again);
        }
    }

    fn note_watch(&mut self, pid: Pid) {
        if let Some(watched) = self.watches.of(pid) {
            self.ledger.note(&Event::Watched(state_of(watched)));
        }
    }

    /// A watched process gave a sign.
    pub fn look_at_watched(&mut self, place: usize) {
        if let Some(watched) = self.watches.watched.get(place)
            && self.watches.is_dead(watched.pid)
        {
            self.dead.push_back(watched.pid);
        }
    }

    /// The poll does not tell of the death of this one.
    pub fn look_for_unheard(&mut self, pid: Pid) {
        if self.watches.is_dead(pid) {
            self.dead.push_back(pid);
        } else if self.watches.of(pid).is_some() {
            let again = Moment::now().plus_ms(WATCH_RETRY_MS);
            self.deadlines.set(Deadline::Unheard(pid), again);
        }
    }

    /// A process that was fenced or watched is dead: its locks go.
    pub fn bury(&mut self, pid: Pid) {
        self.fenced(pid);
        if self.watches.is_dead(pid) {
            self.end_watch(pid);
            // A later process of the same number, which is being fenced, has the rest freed.
            if self.fences.of(pid).is_none() && self.keeper.table().holds(pid) {
                self.free_unless_succeeded(pid);
            }
        }
    }

    /// A lock is about to be asked for on behalf of an owner. Should that number have belonged to
    /// another one that is dead, its locks go before anybody mistakes the two for one.
    pub fn settle_number(&mut self, pid: Pid) {
        let is_fenced = self
            .fences
            .of(pid)
            .is_some_and(|fence| fence.process.is_dead());
        if is_fenced || self.watches.is_dead(pid) {
            self.bury(pid);
        }
    }

    /// A connection that spoke for an owner does so no more. If the owner holds nothing it need not be
    /// watched. Not as soon as it holds nothing: whoever takes and releases a lock again and again
    /// would have it watched as often.
    pub fn end_idle_watch(&mut self, pid: Pid) {
        if !self.watches.is_empty() && !self.keeper.table().holds(pid) {
            self.end_watch(pid);
        }
    }

    /// An owner need not be watched any more.
    pub fn end_watch(&mut self, pid: Pid) {
        self.watches.wanted.remove(&pid);
        let Some(place) = self.watches.by_pid.remove(&pid) else {
            return;
        };
        let watched = self.watches.watched.try_remove(place);
        if let Some(process) = watched.and_then(|watched| watched.process) {
            // Before the descriptor is closed: a copy of it elsewhere would keep the registration.
            let descriptor = process.pidfd().as_raw_fd();
            let _ = self.registry.deregister(&mut SourceFd(&descriptor));
            self.deadlines.unset(Deadline::Unheard(pid));
        }
        self.ledger.note(&Event::Unwatched { pid });
        self.reserve.refill();
    }

    /// Goes on watching what an earlier image of this process watched.
    pub fn resume_watch(&mut self, pid: Pid, pidfd: Option<OwnedFd>) {
        self.enter_watch(pid, pidfd.map(Process::from_pidfd));
    }

    /// Behind a start on an earlier image's state: owners that have no connection of their own, and
    /// that nobody watched there, are watched from now on.
    pub fn watch_the_unwatched(&mut self) {
        // A process that stands for several domains is watched once.
        let unwatched: BTreeSet<Pid> = self
            .keeper
            .table()
            .owners()
            .filter(|owner| {
                let pid = owner.pid;
                let has_own = match owner.key().uuid {
                    Some(uuid) => self.own_connections.has(pid, &uuid),
                    None => self.own_connections.has_any(pid),
                };
                !has_own && self.watches.of(pid).is_none() && self.fences.of(pid).is_none()
            })
            .map(|owner| owner.pid)
            .collect();
        if unwatched.is_empty() {
            return;
        }
        // Whoever still has a connection for one of them says whether the number means the same here.
        let peers: HashMap<Pid, Pid> = self
            .connections
            .iter()
            .filter_map(|(_, connection)| {
                Some((connection.session.owner()?.pid, connection.peer.pid))
            })
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

    /// Whether an owner is one that the daemon knows: it holds something, or has a connection of its
    /// own.
    pub fn is_known(&self, pid: Pid, uuid: &[u8; 16]) -> bool {
        // Of what was taken over from libvirt's daemon it may not be known which domain holds it.
        let mut holders = self.keeper.table().owners_of(pid);
        holders.any(|owner| owner.key().uuid.is_none_or(|known| known == *uuid))
            || self.own_connections.has(pid, uuid)
    }
}
