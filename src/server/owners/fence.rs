//! The killing of owners that left while they hold locks.
//!
//! An owner whose connection ends may go on writing to its disks, so its locks stay until it is
//! dead: it is asked to end (SIGTERM), and made to (SIGKILL) 1.6 seconds later. Unless its process
//! stands for other domains, too, over connections that go on: these must not die with one of them,
//! so it is left alone, and the locks stay. Nor does it die with one that has given back all that it
//! had. The signals go to the very process that connected, through a pidfd, never to a number that
//! another process may have by now. Nothing here waits: the pidfd becomes readable, or the deadline
//! passes.

use std::os::fd::{AsRawFd, OwnedFd};

use super::{ASKED_WITH, KILLED_WITH, Owners};
use crate::custody::clients::{Client, ClientId};
use crate::custody::fences::Stage;
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Process};
use crate::host::stream;
use crate::locks::holder;
use crate::locks::table::{Owner, OwnerKey, Pid};
use crate::server::deadlines::Deadline;
use crate::server::reserve::Reserve;
use crate::server::watch::Source;

/// How long an owner has between SIGTERM and SIGKILL.
const GRACE_MS: u64 = Stage::Asked.lasts_ms();
/// How long after SIGKILL an owner that lives on is worth a line in the log.
const OVERDUE_MS: u64 = Stage::Killed.lasts_ms();
/// How long until SIGKILL is tried again that could not be sent, milliseconds.
const KILL_AGAIN_MS: u64 = 10_000;

/// What follows for an owner from the end of a connection.
#[derive(Debug)]
pub enum Left {
    /// Nothing: it did not stand for the owner, or the owner is being fenced already, or its process
    /// goes on for other domains.
    Nothing,
    /// The process that it stood for is to be fenced, or its locks are free if it is dead already.
    Owner(Pid, Result<Process, Errno>),
}

impl Owners<'_> {
    /// What follows from the end of this connection for the owner that it stood for.
    pub fn left_with(&mut self, id: ClientId) -> Left {
        let Some(pid) = self.ends_with(id).map(|owner| owner.pid) else {
            return Left::Nothing;
        };
        match self.is_fenced_and_dead(pid) {
            Some(false) => return Left::Nothing,
            // This connection may be a later process's of the same number.
            Some(true) => self.fenced(pid),
            None => (),
        }
        let Some(owner) = self.ends_with(id) else {
            return Left::Nothing;
        };
        let Some(client) = self.custody.state().client(id) else {
            return Left::Nothing;
        };
        let process = process_of(client, self.names_processes, self.reserve);
        let is_dead = match &process {
            Ok(process) => process.is_dead() || process::is_exiting(owner.pid),
            Err(errno) => matches!(*errno, Errno::ESRCH | Errno::EINVAL),
        };
        let state = self.custody.state();
        if !is_dead && !self.is_ending && state.holds_for_others_only(owner) {
            self.watch_process(owner.pid);
            return Left::Nothing;
        }
        if !is_dead && self.stands_for_itself(owner) {
            return Left::Nothing;
        }
        if !is_dead && self.stands_for_others(owner) {
            self.keep_for_others(owner);
            return Left::Nothing;
        }
        Left::Owner(owner.pid, process)
    }

    fn ends_with(&self, id: ClientId) -> Option<OwnerKey> {
        let state = self.custody.state();
        state.ends_with(state.client(id)?)
    }

    /// Whether an owner has another connection that it made itself and that goes on: it has not left. In which
    /// order the end of one and a call of the other are heard says nothing, least of all behind a death.
    fn stands_for_itself(&mut self, owner: OwnerKey) -> bool {
        let state = self.custody.state();
        let has_another = |uuid: [u8; 16]| state.has_own_connection(owner.pid, &uuid);
        owner.uuid.is_some_and(has_another) && self.lives_by(|other| other.key() == owner)
    }

    /// Whether the process of an owner stands for other domains over connections that it made itself
    /// and that go on.
    pub fn stands_for_others(&mut self, owner: OwnerKey) -> bool {
        self.custody.state().stands_for_others(owner)
            && self.lives_by(|other| other.pid == owner.pid && other.key() != owner)
    }

    /// Whether a process lives that made one of these owners' connections for itself, which goes on. It may be of
    /// an earlier process that had the number, and that is dead while somebody else keeps it open. All connections
    /// are looked through: only where there are some.
    fn lives_by(&mut self, is_one: impl Fn(&Owner) -> bool) -> bool {
        let (names_processes, reserve) = (self.names_processes, &mut *self.reserve);
        let clients = self.custody.state().clients().map(|(_, client)| client);
        let mut others =
            clients.filter(|client| !client.is_over() && client.own_owner().is_some_and(&is_one));
        others.any(|client| {
            let process = process_of(client, names_processes, reserve);
            process.is_ok_and(|process| !process.is_dead())
        })
    }

    /// A connection is over whose process goes on standing for other domains.
    fn keep_for_others(&self, owner: OwnerKey) {
        let table = self.custody.state().table();
        let of_process = OwnerKey::of_process(owner.pid);
        if table.held_by(owner) > 0 {
            tracing::warn!(
                target: "locking.lock_daemon",
                "{} closed its connection while it holds locks. Its process stands for other domains, \
                 too, and is left alone: the locks are kept until the domain gives them back or the \
                 process is dead. If the domain has ended, restart the process",
                holder::domain_text(table, owner)
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
    pub fn owner_left(&mut self, id: ClientId, pid: Pid, process: Result<Process, Errno>) {
        // Process 1 of a host or container cannot be fenced: it goes with everything else.
        if pid == 1 {
            return self.free(pid);
        }
        match process {
            Ok(process) if !process.is_dead() => self.fence(pid, process.into_pidfd()),
            Ok(_) | Err(Errno::ESRCH | Errno::EINVAL) => self.free_unless_succeeded(pid, Some(id)),
            Err(errno) => self.is_out_of_reach(pid, errno),
        }
    }

    /// Says once that an owner cannot be fenced.
    pub fn is_out_of_reach(&mut self, pid: Pid, reason: Errno) {
        if self.custody.is_out_of_reach(pid) {
            tracing::error!(
                target: "locking.lock_daemon",
                "{} closed its connection but cannot be fenced, because its process cannot be \
                 reached: {}. Its locks stay until it can be or the daemon ends: stop the process \
                 by hand",
                self.text(pid), errno::text(reason)
            );
        }
    }

    /// Frees the locks of an owner that is dead, unless another one has its number by now: the table
    /// could not tell the locks of the two apart. The connection that `ended` is nobody's any more.
    pub fn free_unless_succeeded(&mut self, pid: Pid, ended: Option<ClientId>) {
        if self.has_successor(pid, ended) {
            tracing::warn!(
                target: "locking.lock_daemon",
                "A process with pid {pid} is dead and a later one of the same number holds \
                 locks, too: whatever either holds is kept until {} ends",
                self.text(pid)
            );
        } else {
            self.free(pid);
        }
    }

    /// Whether the number of a dead owner belongs to another one by now. Somebody else may have kept
    /// the connection of the dead one open for long.
    fn has_successor(&self, pid: Pid, ended: Option<ClientId>) -> bool {
        let number_is_free = match Process::open_any(pid) {
            Ok(process) => process.is_dead(),
            Err(errno) => errno == Errno::ESRCH,
        };
        // All connections are looked through only in the rare other case.
        !number_is_free
            && (self.is_watched_and_dead(pid) == Some(false)
                || self.custody.state().clients().any(|(id, client)| {
                    let owner = client.own_owner();
                    Some(id) != ended && owner.is_some_and(|owner| owner.pid == pid)
                }))
    }

    /// Begins to fence an owner that left.
    pub fn fence(&mut self, pid: Pid, process: OwnedFd) {
        let text = self.text(pid);
        if process::is_exiting(pid) {
            tracing::info!(target: "locking.lock_daemon", "{text} is ending");
        } else {
            let why = if self.is_ending {
                "holds locks while the daemon ends"
            } else {
                "closed its connection while it holds locks"
            };
            tracing::warn!(
                target: "locking.lock_daemon",
                "{text} {why}: it is sent SIGTERM now, and SIGKILL if it has not ended within \
                 1.6 s; its locks are kept until it is dead"
            );
        }
        self.ask_to_end(pid, process, &text);
    }

    /// Begins to fence an owner of which `what` says that somebody else has by now what it writes to. It may
    /// hold nothing any more.
    pub fn fence_the_robbed(&mut self, pid: Pid, process: OwnedFd, what: &str) {
        tracing::error!(
            target: "locking.lock_daemon",
            "{what}. Both may write it: the owner is sent SIGTERM now, and SIGKILL if it has not ended \
             within 1.6 s"
        );
        if !self.custody.state().fences().contains_key(&pid) {
            let text = self.text(pid);
            self.ask_to_end(pid, process, &text);
        }
    }

    fn ask_to_end(&mut self, pid: Pid, process: OwnedFd, text: &str) {
        self.custody.is_within_reach(pid);
        match process::signal(&process, ASKED_WITH) {
            Ok(()) => (),
            Err(Errno::ESRCH) => return self.free(pid),
            Err(errno) => tracing::error!(
                target: "locking.lock_daemon",
                "{text} could not be sent SIGTERM: {}", errno::text(errno)
            ),
        }
        let kill_at = Moment::now().plus_ms(GRACE_MS);
        self.custody.fencing(pid, process, kill_at);
        self.follow(pid);
    }

    /// Waits for the death of a process that is being fenced, or for the time to do more about it.
    pub fn follow(&mut self, pid: Pid) {
        let Some(fence) = self.custody.state().fences().get(&pid) else {
            return;
        };
        if let Err(error) = self
            .watch
            .add(Source::Fence(pid), fence.process.as_raw_fd())
        {
            // The deadlines still look whether it is dead.
            tracing::error!(
                target: "locking.lock_daemon",
                "The death of process {pid} cannot be waited for: {error}"
            );
        }
        let deadline = match fence.stage {
            Stage::Asked => Deadline::Kill(pid),
            Stage::Killed => Deadline::StillAlive(pid),
        };
        self.deadlines.set(deadline, fence.next_step);
    }

    /// A process that is being fenced gave a sign.
    pub fn look_at_fence(&mut self, pid: Pid) {
        if self.is_fenced_and_dead(pid) == Some(true) {
            self.lines.dead.push_back(pid);
        }
    }

    /// The grace of an owner is over.
    pub fn kill(&mut self, pid: Pid) {
        match self.is_fenced_and_dead(pid) {
            None => return,
            Some(true) => return self.lines.dead.push_back(pid),
            Some(false) => (),
        }
        let Some(fence) = self.custody.state().fences().get(&pid) else {
            return;
        };
        let text = self.text(pid);
        let now = Moment::now();
        let (stage, next_step) = match process::signal(&fence.process, KILLED_WITH) {
            Ok(()) => {
                tracing::warn!(
                    target: "locking.lock_daemon",
                    "{text} did not end on SIGTERM: it is sent SIGKILL"
                );
                (Stage::Killed, now.plus_ms(OVERDUE_MS))
            }
            Err(errno) => {
                tracing::error!(
                    target: "locking.lock_daemon",
                    "{text} could not be sent SIGKILL: {}. Its locks are kept until it is dead. It is \
                     tried again in {} s: find out why, or stop the process by hand",
                    errno::text(errno), KILL_AGAIN_MS / 1000
                );
                (fence.stage, now.plus_ms(KILL_AGAIN_MS))
            }
        };
        self.custody.fence_goes_on(pid, stage, next_step);
        let deadline = match stage {
            Stage::Asked => Deadline::Kill(pid),
            Stage::Killed => Deadline::StillAlive(pid),
        };
        self.deadlines.set(deadline, next_step);
    }

    /// An owner that was sent SIGKILL should long be dead.
    pub fn still_alive(&mut self, pid: Pid) {
        match self.is_fenced_and_dead(pid) {
            None => return,
            Some(true) => return self.lines.dead.push_back(pid),
            Some(false) => (),
        }
        tracing::error!(
            target: "locking.lock_daemon",
            "{} is still alive {} s after SIGKILL, probably stuck in the kernel: its locks \
             are kept until it is dead", self.text(pid), OVERDUE_MS / 1000
        );
        let next_step = Moment::now().plus_ms(OVERDUE_MS);
        self.custody.fence_goes_on(pid, Stage::Killed, next_step);
        self.deadlines.set(Deadline::StillAlive(pid), next_step);
    }

    /// A fenced owner is dead: its locks go.
    pub fn fenced(&mut self, pid: Pid) {
        // Its death may have been noticed twice, and a later process of the same number may be
        // being fenced by now.
        if self.is_fenced_and_dead(pid) != Some(true) {
            return;
        }
        // First of all: should this process die, the next one knows of the death by the fence alone.
        self.free_unless_succeeded(pid, None);
        let Some(process) = self.custody.fenced(pid) else {
            return;
        };
        self.deadlines.unset(Deadline::Kill(pid));
        self.deadlines.unset(Deadline::StillAlive(pid));
        self.watch.remove(process.as_raw_fd());
    }
}

/// The process that made a connection. ESRCH or EINVAL if it has been reaped.
fn process_of(
    client: &Client<OwnedFd>,
    names_processes: bool,
    reserve: &mut Reserve,
) -> Result<Process, Errno> {
    reserve.spend(|| {
        if names_processes {
            return stream::peer_process(&client.socket);
        }
        let pid = client.peer().pid;
        match client.arrival.start_time {
            Some(start_time) => Process::open(pid, start_time.get()),
            // Never found out: nobody knows whether the one that has the number now is the
            // one that connected. Only that there is none is certain.
            None => Process::open_any(pid).and(Err(Errno::EPERM)),
        }
    })
}
