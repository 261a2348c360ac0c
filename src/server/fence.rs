//! The killing of owners that left while they hold locks.
//!
//! An owner whose connection ends may go on writing to its disks, so its locks stay until it is
//! dead: it is asked to end (SIGTERM), and made to (SIGKILL) 1.6 seconds later. Unless its process
//! stands for other domains, too, over connections that go on: these must not die with one of them,
//! so it is left alone, and the locks stay. Nor does it die with one that has given back all that it
//! had. The signals go to the very process that connected, through a pidfd, never to a number that another process may have by now. Nothing here waits: the pidfd becomes
//! readable, or the deadline passes.

use std::os::fd::AsRawFd;

use foldhash::HashMap;
use mio::unix::SourceFd;
use nix::sys::signal::Signal;
use slab::Slab;

use super::accept::Reserve;
use super::connection::{Connection, Phase};
use super::daemon::{Daemon, State};
use super::deadlines::Deadline;
use super::holder;
use super::token::Source;
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Process};
use crate::host::stream;
use crate::locks::keeper::Estate;
use crate::locks::table::{OwnerKey, Pid, Table};
use crate::log::Printable;
use crate::restart::event::Event;

/// How long an owner has between SIGTERM and SIGKILL, milliseconds (as in the C daemon).
pub const GRACE_MS: u64 = 1600;
/// How long after SIGKILL an owner that lives on is worth a line in the log, milliseconds.
pub const OVERDUE_MS: u64 = 30_000;
/// How long until SIGKILL is tried again that could not be sent, milliseconds.
const KILL_AGAIN_MS: u64 = 10_000;

/// So many domains of a process are named in one line of the log.
const MOST_NAMED: usize = 4;

/// How many locks of a dead owner are freed before somebody else has a turn.
const LEASES_A_PIECE: usize = 8;

/// A dead owner, as an operator reads it, whose locks are being freed.
#[derive(Debug)]
pub struct Freeing {
    owner: String,
    /// How many there were.
    count: usize,
    /// Those that the kernel still has.
    leases: Estate,
}

/// What an owner was sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Stage {
    /// SIGTERM.
    Asked,
    /// SIGKILL.
    Killed,
}

/// An owner that is to die.
#[derive(Debug)]
pub struct Fence {
    /// Its number, under which its locks are held.
    pub pid: Pid,
    /// The process.
    pub process: Process,
    /// What it was sent last.
    pub stage: Stage,
}

/// The owners that are to die, each once.
#[derive(Debug, Default)]
pub struct Fences {
    fences: Slab<Fence>,
    by_pid: HashMap<Pid, usize>,
}

impl Fences {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fences.is_empty()
    }

    /// The fence of a process.
    pub fn of(&self, pid: Pid) -> Option<&Fence> {
        self.fences.get(*self.by_pid.get(&pid)?)
    }

    /// The fence of a process, to change it.
    pub fn of_mut(&mut self, pid: Pid) -> Option<&mut Fence> {
        self.fences.get_mut(*self.by_pid.get(&pid)?)
    }

    /// The fence at a place.
    pub fn get(&self, place: usize) -> Option<&Fence> {
        self.fences.get(place)
    }

    /// Enters a fence and says at which place.
    pub fn insert(&mut self, fence: Fence) -> usize {
        let pid = fence.pid;
        let place = self.fences.insert(fence);
        self.by_pid.insert(pid, place);
        place
    }

    /// Takes a fence out.
    pub fn remove(&mut self, pid: Pid) -> Option<Fence> {
        self.fences.try_remove(self.by_pid.remove(&pid)?)
    }

    /// All of them, with their places.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Fence)> {
        self.fences.iter()
    }
}

impl Daemon {
    /// The owner whose life this connection stood for: the one that made it itself, and whose process
    /// holds something.
    pub fn ends_with(&self, connection: &Connection) -> Option<OwnerKey> {
        let owner = connection.own_owner()?.key();
        self.keeper.table().holds(owner.pid).then_some(owner)
    }

    /// The owner that a connection which is over stood for, unless it is being fenced already, and
    /// its process.
    pub fn owner_left_with(&mut self, place: usize) -> Option<(Pid, Result<Process, Errno>)> {
        let connection = self.connections.get(place)?;
        let pid = self.ends_with(connection)?.pid;
        if let Some(fence) = self.fences.of(pid) {
            if !fence.process.is_dead() {
                return None;
            }
            // This connection may be a later process's of the same number.
            self.fenced(pid);
        }
        let connection = self.connections.get(place)?;
        let owner = self.ends_with(connection)?;
        let process = process_of(connection, self.names_processes, &mut self.reserve);
        let is_dead = match &process {
            Ok(process) => process.is_dead() || process::is_exiting(owner.pid),
            Err(errno) => matches!(*errno, Errno::ESRCH | Errno::EINVAL),
        };
        if !is_dead && self.state == State::Serving && self.holds_for_others_only(owner) {
            self.watch_process(owner.pid);
            return None;
        }
        if !is_dead && self.stands_for_others(owner) {
            self.keep_for_others(owner);
            return None;
        }
        Some((owner.pid, process))
    }

    /// Whether what a process holds is other domains' alone. One that has given back all that was its own
    /// has left in peace, and the others must not die of it.
    pub fn holds_for_others_only(&self, owner: OwnerKey) -> bool {
        let table = self.keeper.table();
        table.held_by(owner) == 0 && table.held_by(OwnerKey::of_process(owner.pid)) == 0
    }

    /// Whether the process of an owner stands for other domains over connections that it made itself
    /// and that go on.
    pub fn stands_for_others(&mut self, owner: OwnerKey) -> bool {
        let uuid = owner.uuid.unwrap_or_default();
        if !self.own_connections.has_other_domains(owner.pid, &uuid) {
            return false;
        }
        // They may be of an earlier process that had the number, and that is dead while somebody else
        // keeps them open. All connections are looked through only where there are some of the number.
        let (names_processes, reserve) = (self.names_processes, &mut self.reserve);
        let mut others = self.connections.iter().filter(|(_, connection)| {
            let other = connection.own_owner();
            connection.phase != Phase::Over
                && other.is_some_and(|other| other.pid == owner.pid && other.key() != owner)
        });
        others.any(|(_, connection)| {
            let process = process_of(connection, names_processes, reserve);
            process.is_ok_and(|process| !process.is_dead())
        })
    }

    /// A connection is over whose process goes on standing for other domains.
    fn keep_for_others(&self, owner: OwnerKey) {
        let table = self.keeper.table();
        let of_process = OwnerKey::of_process(owner.pid);
        if table.held_by(owner) > 0 {
            tracing::warn!(
                target: "locking.lock_daemon",
                "{} closed its connection while it holds locks. Its process stands for other domains, \
                 too, and is left alone: the locks are kept until the domain gives them back or the \
                 process is dead. If the domain has ended, restart the process",
                domain_text(table, owner)
            );
        } else if table.held_by(of_process) > 0 {
            tracing::warn!(
                target: "locking.lock_daemon",
                "A domain of process {pid} closed its connection, and of some locks of the process it \
                 is not known which domain has them. The process stands for other domains, too, and is \
                 left alone: the locks are kept until a domain of it gives them back or it is dead",
                pid = owner.pid
            );
        }
    }

    /// The connection that stood for an owner is over: the owner is fenced, or its locks are free if
    /// it is dead already.
    pub fn owner_left(&mut self, pid: Pid, process: Result<Process, Errno>) {
        // Process 1 of a host or container cannot be fenced: it goes with everything else.
        if pid == 1 {
            self.free(pid);
            return;
        }
        match process {
            Ok(process) if !process.is_dead() => self.fence(pid, process),
            Ok(_) | Err(Errno::ESRCH | Errno::EINVAL) => self.free_unless_succeeded(pid),
            Err(errno) => self.note_unreachable(pid, errno),
        }
    }

    /// Says once that an owner cannot be fenced.
    pub fn note_unreachable(&mut self, pid: Pid, reason: Errno) {
        if self.unreachable.insert(pid) {
            tracing::error!(
                target: "locking.lock_daemon",
                "{} closed its connection but cannot be fenced, because its process cannot be \
                 reached: {}. Its locks stay until it can be or the daemon ends: stop the process \
                 by hand",
                self.owner_text(pid), errno::text(reason)
            );
        }
    }

    /// Frees the locks of an owner that is dead, unless another one has its number by now: the table
    /// could not tell the locks of the two apart.
    pub fn free_unless_succeeded(&mut self, pid: Pid) {
        if self.has_successor(pid) {
            tracing::warn!(
                target: "locking.lock_daemon",
                "A process with pid {pid} is dead and a later one of the same number holds \
                 locks, too: whatever either holds is kept until {} ends",
                self.owner_text(pid)
            );
        } else {
            self.free(pid);
        }
    }

    /// Whether the number of a dead owner belongs to another one by now. Somebody else may have kept
    /// the connection of the dead one open for long.
    fn has_successor(&self, pid: Pid) -> bool {
        let number_is_free = match Process::open_any(pid) {
            Ok(process) => process.is_dead(),
            Err(errno) => errno == Errno::ESRCH,
        };
        // All connections are looked through only in the rare other case.
        !number_is_free
            && (self.watches.is_alive(pid)
                || self.connections.iter().any(|(_, connection)| {
                    connection.own_owner().is_some_and(|owner| owner.pid == pid)
                }))
    }

    /// Begins to fence an owner.
    fn fence(&mut self, pid: Pid, process: Process) {
        self.unreachable.remove(&pid);
        let text = self.owner_text(pid);
        if process::is_exiting(pid) {
            tracing::info!(target: "locking.lock_daemon", "{text} is ending");
        } else {
            let why = match self.state {
                State::Serving => "closed its connection while it holds locks",
                State::Stopping | State::Ended => "holds locks while the daemon ends",
            };
            tracing::warn!(
                target: "locking.lock_daemon",
                "{text} {why}: it is sent SIGTERM now, and SIGKILL if it has not ended within \
                 1.6 s; its locks are kept until it is dead"
            );
        }
        match process.signal(Signal::SIGTERM) {
            Ok(()) => (),
            Err(Errno::ESRCH) => return self.free(pid),
            Err(errno) => tracing::error!(
                target: "locking.lock_daemon",
                "{text} could not be sent SIGTERM: {}", errno::text(errno)
            ),
        }
        let kill_at = Moment::now().plus_ms(GRACE_MS);
        self.follow(
            Fence {
                pid,
                process,
                stage: Stage::Asked,
            },
            kill_at,
        );
    }

    /// Waits for the death of a process, or for the time to do more about it.
    pub fn follow(&mut self, fence: Fence, next_step: Moment) {
        let (pid, stage, descriptor) = (fence.pid, fence.stage, fence.process.pidfd().as_raw_fd());
        let place = self.fences.insert(fence);
        if let Err(error) = Source::Fence(place).watch(&self.registry, descriptor) {
            // The deadlines still look whether it is dead.
            tracing::error!(
                target: "locking.lock_daemon",
                "The death of process {pid} cannot be waited for: {error}"
            );
        }
        let deadline = match stage {
            Stage::Asked => Deadline::Kill(pid),
            Stage::Killed => Deadline::StillAlive(pid),
        };
        self.deadlines.set(deadline, next_step);
        self.note_fence(pid);
    }

    /// A process that is being fenced gave a sign.
    pub fn look_at_fence(&mut self, place: usize) {
        if let Some(fence) = self.fences.get(place)
            && fence.process.is_dead()
        {
            self.dead.push_back(fence.pid);
        }
    }

    /// The grace of an owner is over.
    pub fn kill(&mut self, pid: Pid) {
        let text = self.owner_text(pid);
        let Some(fence) = self.fences.of_mut(pid) else {
            return;
        };
        if fence.process.is_dead() {
            self.dead.push_back(pid);
            return;
        }
        let now = Moment::now();
        match fence.process.signal(Signal::SIGKILL) {
            Ok(()) => {
                fence.stage = Stage::Killed;
                self.deadlines
                    .set(Deadline::StillAlive(pid), now.plus_ms(OVERDUE_MS));
                tracing::warn!(
                    target: "locking.lock_daemon",
                    "{text} did not end on SIGTERM: it is sent SIGKILL"
                );
            }
            Err(errno) => {
                self.deadlines
                    .set(Deadline::Kill(pid), now.plus_ms(KILL_AGAIN_MS));
                tracing::error!(
                    target: "locking.lock_daemon",
                    "{text} could not be sent SIGKILL: {}. Its locks are kept until it is dead. It is \
                     tried again in {} s: find out why, or stop the process by hand",
                    errno::text(errno), KILL_AGAIN_MS / 1000
                );
            }
        }
        self.note_fence(pid);
    }

    /// An owner that was sent SIGKILL should long be dead.
    pub fn still_alive(&mut self, pid: Pid) {
        let text = self.owner_text(pid);
        let Some(fence) = self.fences.of(pid) else {
            return;
        };
        if fence.process.is_dead() {
            self.dead.push_back(pid);
            return;
        }
        tracing::error!(
            target: "locking.lock_daemon",
            "{text} is still alive {} s after SIGKILL, probably stuck in the kernel: its locks \
             are kept until it is dead", OVERDUE_MS / 1000
        );
        self.deadlines
            .set(Deadline::StillAlive(pid), Moment::now().plus_ms(OVERDUE_MS));
    }

    /// A fenced owner is dead: its locks go.
    pub fn fenced(&mut self, pid: Pid) {
        // Its death may have been noticed twice, and a later process of the same number may be
        // being fenced by now.
        if self
            .fences
            .of(pid)
            .is_some_and(|fence| !fence.process.is_dead())
        {
            return;
        }
        let Some(fence) = self.fences.remove(pid) else {
            return;
        };
        self.deadlines.unset(Deadline::Kill(pid));
        self.deadlines.unset(Deadline::StillAlive(pid));
        let _ = self
            .registry
            .deregister(&mut SourceFd(&fence.process.pidfd().as_raw_fd()));
        self.ledger.note(&Event::Fenced { pid });
        self.free_unless_succeeded(pid);
    }

    /// Frees the locks of an owner that is dead: a few at once, many in pieces.
    fn free(&mut self, pid: Pid) {
        let owner = self.owner_text(pid);
        self.unreachable.remove(&pid);
        let leases = self.keeper.take_owner(pid);
        self.ledger.note(&Event::OwnerEnded { pid });
        self.end_watch(pid);
        let count = leases.len();
        self.estates.push_back(Freeing {
            owner,
            count,
            leases,
        });
        if self.estates.len() == 1 {
            self.free_some();
        }
    }

    /// Frees some of the locks of an owner that is dead. False if there are none to be freed.
    pub fn free_some(&mut self) -> bool {
        let Some(freeing) = self.estates.front_mut() else {
            return false;
        };
        self.keeper.end_some(&mut freeing.leases, LEASES_A_PIECE);
        if freeing.leases.is_empty() {
            let Freeing { owner, count, .. } = freeing;
            tracing::info!(
                target: "locking.lock_daemon",
                "{owner} is dead: {count} of its locks are free"
            );
            self.estates.pop_front();
        }
        true
    }

    /// A process that holds something as an operator reads it: its domains.
    pub fn owner_text(&self, pid: Pid) -> String {
        let table = self.keeper.table();
        let named = table
            .owners_of(pid)
            .filter(|owner| owner.key().uuid.is_some());
        let count = named.clone().count();
        if let (1, Some(owner)) = (count, named.clone().next()) {
            return domain_text(table, owner.key());
        }
        let named = named
            .take(MOST_NAMED)
            .map(|owner| Printable(&holder::owner(table, owner.key())).to_string());
        let named: Vec<String> = named.collect();
        match (named.is_empty(), count.saturating_sub(MOST_NAMED)) {
            (true, _) => format!("Process {pid}"),
            (false, 0) => format!("Process {pid} of {}", named.join(", ")),
            (false, others) => format!("Process {pid} of {} and {others} more", named.join(", ")),
        }
    }
}

/// An owner as an operator reads it, at the start of a sentence.
fn domain_text<L>(table: &Table<L>, owner: OwnerKey) -> String {
    let text = holder::owner(table, owner);
    let mut text = Printable(&text).to_string();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

/// The process that made a connection. ESRCH or EINVAL if it has been reaped.
fn process_of(
    connection: &Connection,
    names_processes: bool,
    reserve: &mut Reserve,
) -> Result<Process, Errno> {
    loop {
        let result = if names_processes {
            stream::peer_process(&connection.socket)
        } else {
            let pid = connection.peer.pid;
            match connection.start_time {
                Some(start_time) => Process::open(pid, start_time),
                // Never found out: nobody knows whether the one that has the number now is the
                // one that connected. Only that there is none is certain.
                None => Process::open_any(pid).and(Err(Errno::EPERM)),
            }
        };
        match result {
            Err(Errno::EMFILE | Errno::ENFILE) if reserve.give_up_one() => (),
            result => return result,
        }
    }
}
