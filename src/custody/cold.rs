//! From the ledger of a daemon that was killed with all its processes to a state that holds everything
//! again: without a descriptor of what it held, by name. An owner that lives, and is the same process, has
//! its locks again and is watched; what a dead one left is ended. Its connection is gone in any case.
//!
//! Whose process cannot be told keeps its locks as one that cannot be seen: to free them could destroy a disk,
//! and to kill it could kill another one. What somebody else has by now is lost, and said.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::Duration;

use foldhash::HashMap;

use super::descriptor::{Descriptor, Number, Open, Saved};
use super::event::{Event, Here, OwnerRecord, ResourceName};
use super::fences::{Fence, Watched};
use super::servers::{Both, Server, Service};
use super::state::State;
use super::{Given, settings::Settings};
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Life, Process};
use crate::locks::again::{Again, NotAgain};
use crate::locks::holder;
use crate::locks::job::End;
use crate::locks::lease::Lease;
use crate::locks::place::Place;
use crate::locks::table::{Mode, Owner, OwnerKey, Pid, Resource};

/// How long a lock that somebody has is tried for, milliseconds: the kernel may still be closing the files of
/// the daemon that was killed.
const PATIENCE_MS: u64 = 2000;
/// The same for a lock file that is only to be removed.
const PATIENCE_FOR_ENDS_MS: u64 = 200;
/// How long until it is tried again.
const PAUSE: Duration = Duration::from_millis(5);

/// What became of the process of an owner.
enum Fate {
    /// It lives, and is the same. The pidfd is given away once.
    Alive(Option<OwnedFd>),
    /// Nobody can tell.
    Unseen,
    /// It is dead, whoever has its number now.
    Dead,
}

/// Why an owner does not have its lock any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The file could not be locked.
    NotLocked(NotAgain),
    /// Under another name it is another owner's, as only libvirt's daemon can have granted it.
    SameFile,
}

/// A lock that is lost.
#[derive(Debug)]
pub struct Loss {
    /// Who had it, as an operator reads it.
    pub owner: String,
    /// Its process.
    pub pid: Pid,
    /// The process itself, if it is to be fenced for that.
    pub process: Option<OwnedFd>,
    /// Whether it is fenced, for this or something else.
    pub is_fenced: bool,
    /// The path of the file.
    pub path: Vec<u8>,
    /// Why.
    pub why: Why,
}

/// What was taken again.
#[derive(Debug)]
pub struct TakenAgain {
    /// All that lasts.
    pub state: State<Open>,
    /// How many locks of dead owners are free.
    pub freed: usize,
    /// What is lost.
    pub losses: Vec<Loss>,
    /// Who was to be fenced, and had not been sent a signal yet.
    pub to_fence: Vec<(Pid, OwnedFd)>,
    /// Owners whose processes cannot be told, as an operator reads them.
    pub unseen: Vec<String>,
}

/// Whether a ledger was written in another boot of the host: then nobody of whom it tells is left.
pub fn is_of_another_boot(state: &State<Saved>) -> bool {
    let then = state.here().and_then(|here| here.boot);
    then.is_some_and(|then| process::boot().is_some_and(|now| now != then))
}

/// Takes again what a ledger tells of. The process's own settings are those of this one.
pub fn take_again(saved: &State<Saved>, settings: Settings) -> TakenAgain {
    let then = saved.here().unwrap_or_default();
    let now = Here {
        boot: process::boot(),
        namespace: process::namespace(),
    };
    let mut work = Work {
        saved,
        fates: fates(saved, then, now),
        may_kill: then.boot.is_some() && then == now,
    };
    let mut taken = TakenAgain {
        state: State {
            servers: without_connections(saved.servers),
            settings,
            ..State::default()
        },
        freed: 0,
        losses: Vec::new(),
        to_fence: Vec::new(),
        unseen: Vec::new(),
    };
    work.lock_all(&mut taken);
    work.end_what_the_dead_left(&mut taken);
    work.go_on_fencing(&mut taken);
    work.watch_all(&mut taken);
    work.find_who_is_robbed(&mut taken);
    work.begin_to_fence(&mut taken);
    taken
}

/// The numbers of the servers, of which nobody is a client.
fn without_connections(mut servers: Both<Server>) -> Both<Server> {
    for service in Service::ALL {
        servers.of_mut(service).next_id = Server::default().next_id;
    }
    servers
}

/// What became of the processes of all owners.
fn fates(saved: &State<Saved>, then: Here, now: Here) -> HashMap<Pid, Fate> {
    let mut lives: HashMap<Pid, Vec<Life>> = HashMap::default();
    // The kernel said of these that the number is theirs here.
    let mut seen: BTreeSet<Pid> = BTreeSet::new();
    for (_, client) in saved.clients() {
        let Some(owner) = client.own_owner() else {
            continue;
        };
        seen.insert(owner.pid);
        let start = client.arrival.start_time;
        let start = start.map(|start| Life::Start(start.get()));
        lives
            .entry(owner.pid)
            .or_default()
            .extend(client.life.or(start));
    }
    for (pid, life) in saved.lives() {
        lives.entry(*pid).or_default().push(*life);
    }
    let is_elsewhere = matches!(
        (then.namespace, now.namespace),
        (Some(then), Some(now)) if then != now
    );
    let processes = saved.table().processes();
    let fenced = saved.fences().keys().copied();
    processes
        .chain(fenced)
        .map(|pid| {
            let known = lives.get(&pid).map_or(&[][..], Vec::as_slice);
            let fate = if is_elsewhere {
                Fate::Unseen
            } else {
                fate(pid, known, seen.contains(&pid))
            };
            (pid, fate)
        })
        .collect()
}

/// What became of the process that had this number and one of these lives.
fn fate(pid: Pid, lives: &[Life], is_seen: bool) -> Fate {
    let opened = Process::open_any(pid);
    if lives.is_empty() {
        return match opened {
            Err(Errno::ESRCH) if is_seen => Fate::Dead,
            _ => Fate::Unseen,
        };
    }
    let found = match &opened {
        Ok(process) if process.is_dead() => return Fate::Dead,
        Ok(process) => process::life(process.pidfd(), pid),
        Err(Errno::ESRCH) => return Fate::Dead,
        Err(_) => process::start_time(pid).map(Life::Start),
    };
    match (found, opened) {
        (Ok(life), Ok(process)) if lives.contains(&life) => Fate::Alive(Some(process.into_pidfd())),
        (Ok(life), _) if lives.contains(&life) => Fate::Unseen,
        // What is told in another way cannot be compared.
        (Ok(life), _) if lives.iter().any(|known| is_comparable(*known, life)) => Fate::Dead,
        (Err(Errno::ESRCH), _) => Fate::Dead,
        _ => Fate::Unseen,
    }
}

fn is_comparable(one: Life, other: Life) -> bool {
    matches!(
        (one, other),
        (Life::Inode(_), Life::Inode(_)) | (Life::Start(_), Life::Start(_))
    )
}

struct Work<'a> {
    saved: &'a State<Saved>,
    fates: HashMap<Pid, Fate>,
    /// Whether a process that lives is known to be the one that was meant.
    may_kill: bool,
}

type Held = Resource<Lease<Number>>;

impl Work<'_> {
    fn is_dead(&self, pid: Pid) -> bool {
        matches!(self.fates.get(&pid), Some(Fate::Dead) | None)
    }

    /// The process of an owner that lives: once.
    fn process(&mut self, pid: Pid) -> Option<OwnedFd> {
        match self.fates.get_mut(&pid) {
            Some(Fate::Alive(process)) => process.take(),
            _ => None,
        }
    }

    /// The process of an owner that is to be fenced, if it is known to be the one that was meant. What is
    /// watched is watched besides. Process 1 goes with everything else.
    fn process_to_fence(&mut self, pid: Pid, state: &State<Open>) -> Option<OwnedFd> {
        if !self.may_kill || pid <= 1 {
            return None;
        }
        let watched = state.watched().get(&pid);
        match watched.and_then(|watched| watched.process.as_ref()) {
            Some(process) => process.try_clone().ok(),
            None => self.process(pid),
        }
    }

    /// The owners that hold a resource still, each with how often.
    fn holders(&self, resource: &Held) -> Vec<(&Owner, u32)> {
        let table = self.saved.table();
        let holders = resource.holders();
        let holders = holders.filter(|(key, _)| !self.is_dead(key.pid));
        holders
            .filter_map(|(key, times)| Some((table.owner(key)?, times)))
            .collect()
    }

    fn lock_all(&self, taken: &mut TakenAgain) {
        let held = self.saved.table().iter().map(|(_, resource)| resource);
        let mut left: Vec<(&Held, NotAgain)> = Vec::new();
        taken.state.reserve_locks(self.saved.table().len());
        for resource in held {
            if let Err(reason) = self.lock(resource, taken) {
                left.push((resource, reason));
            }
        }
        let give_up = Moment::now().plus_ms(PATIENCE_MS);
        while left.iter().any(|(_, reason)| may_pass(*reason)) && Moment::now() < give_up {
            std::thread::sleep(PAUSE);
            left.retain_mut(|(resource, reason)| {
                if !may_pass(*reason) {
                    return true;
                }
                match self.lock(resource, taken) {
                    Ok(()) => false,
                    Err(now) => {
                        *reason = now;
                        true
                    }
                }
            });
        }
        for (resource, reason) in left {
            self.lose(resource, Why::NotLocked(reason), taken);
        }
    }

    /// Locks one file, for those who hold it still. If nobody does, that is all.
    fn lock(&self, resource: &Held, taken: &mut TakenAgain) -> Result<(), NotAgain> {
        let holders = self.holders(resource);
        let Some((first, _)) = holders.first() else {
            return Ok(());
        };
        let table = taken.state.table();
        let other = table
            .find_file(resource.identity)
            .and_then(|id| table.get(id));
        if let Some(other) = other
            && (other.mode == Mode::Exclusive || resource.mode == Mode::Exclusive)
        {
            self.lose(resource, Why::SameFile, taken);
            return Ok(());
        }
        let place = place_of(resource);
        let again = Again {
            place,
            identity: resource.identity,
            mode: resource.mode,
        };
        let mut lease = again.run()?;
        lease.created = resource.lease.created;
        let name = ResourceName {
            lockspace: place.lockspace,
            name: place.name,
        };
        let granted = Event::Granted {
            owner: OwnerRecord::from(*first),
            resource: name,
            descriptor: lease.descriptor.number(),
            identity: resource.identity,
            mode: resource.mode,
            autocreate: resource.autocreate,
            created: lease.created,
            kind: (&lease.kind).into(),
            since: resource.since,
        };
        let mut given = Given::of_owner(first);
        given.file = Some(lease.descriptor);
        // One that nobody has anything in is opened when it is used, as after any start.
        if !place.is_default() && !taken.state.has_lockspace(place.lockspace) {
            let lockspace = Event::Lockspace(place.lockspace);
            let _ = taken.state.apply(lockspace, &mut Given::default());
        }
        // A ledger that was read has each name once.
        let _ = taken.state.apply(granted, &mut given);
        for (position, (owner, times)) in holders.iter().enumerate() {
            let known = u32::from(position == 0);
            for _ in known..*times {
                let joined = Event::Joined(OwnerRecord::from(*owner), name);
                let _ = taken.state.apply(joined, &mut Given::of_owner(owner));
            }
        }
        Ok(())
    }

    /// A lock is lost: by all who held it.
    fn lose(&self, resource: &Held, why: Why, taken: &mut TakenAgain) {
        for (owner, _) in self.holders(resource) {
            taken.losses.push(Loss {
                owner: holder::domain_text(self.saved.table(), owner.key()),
                pid: owner.pid,
                process: None,
                is_fenced: false,
                path: place_of(resource).path(),
                why,
            });
        }
    }

    /// Who writes what somebody else has by now is to be fenced; one that stands for other domains must not
    /// die with one of them.
    fn find_who_is_robbed(&mut self, taken: &mut TakenAgain) {
        let mut found: BTreeSet<Pid> = taken.state.fences().keys().copied().collect();
        for loss in &mut taken.losses {
            let is_robbed = matches!(loss.why, Why::NotLocked(NotAgain::Taken(_)));
            let is_alone = self.saved.table().owners_of(loss.pid).count() == 1;
            if is_robbed && is_alone && !found.contains(&loss.pid) {
                loss.process = self.process_to_fence(loss.pid, &taken.state);
                if loss.process.is_some() {
                    found.insert(loss.pid);
                }
            }
            loss.is_fenced = is_robbed && found.contains(&loss.pid);
        }
    }

    /// Lock files that nobody needs any more are removed, as at the end of any lock.
    fn end_what_the_dead_left(&self, taken: &mut TakenAgain) {
        let held = self.saved.table().iter().map(|(_, resource)| resource);
        let held = held.filter(|resource| self.holders(resource).is_empty());
        let left = self.saved.estates().iter();
        let left = left.flat_map(|estate| &estate.resources);
        let ended: Vec<&Held> = held.chain(left).collect();
        taken.freed = ended.len();
        let mut files: Vec<&Held> = ended
            .into_iter()
            .filter(|resource| End::of(resource).removes.is_some())
            .collect();
        let give_up = Moment::now().plus_ms(PATIENCE_FOR_ENDS_MS);
        loop {
            files.retain(|resource| is_in_use(resource));
            if files.is_empty() || Moment::now() >= give_up {
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn go_on_fencing(&mut self, taken: &mut TakenAgain) {
        for (pid, fence) in self.saved.fences() {
            if let Some(process) = self.process(*pid) {
                self.note_life(*pid, &process, taken);
                let fence = Fence {
                    pid: *pid,
                    process,
                    stage: fence.stage,
                    next_step: fence.next_step,
                };
                taken.state.fences.insert(*pid, fence);
            } else if !self.is_dead(*pid) {
                taken.state.unreachable.insert(*pid);
            }
        }
    }

    fn watch_all(&mut self, taken: &mut TakenAgain) {
        let pids: Vec<Pid> = taken.state.table().processes().collect();
        for pid in pids {
            if taken.state.fences().contains_key(&pid) {
                continue;
            }
            let process = self.process(pid);
            match &process {
                Some(process) => self.note_life(pid, process, taken),
                None => {
                    let text = holder::process_text(taken.state.table(), pid);
                    taken.unseen.push(text);
                }
            }
            taken.state.watched.insert(pid, Watched { pid, process });
        }
    }

    fn note_life(&self, pid: Pid, process: &OwnedFd, taken: &mut TakenAgain) {
        if let Ok(life) = process::life(process, pid) {
            taken.state.lives.insert(pid, life);
        }
    }

    /// Owners whose connections had ended while they held locks, and those that could not be reached.
    fn begin_to_fence(&mut self, taken: &mut TakenAgain) {
        let saved = self.saved;
        let over = saved.clients().filter(|(_, client)| client.is_over());
        let over = over.filter_map(|(_, client)| {
            let owner: OwnerKey = saved.ends_with(client)?;
            let goes_on = saved.holds_for_others_only(owner) || saved.stands_for_others(owner);
            (!goes_on).then_some(owner.pid)
        });
        let unreachable = saved.unreachable.iter().copied();
        let pids: BTreeMap<Pid, ()> = over.chain(unreachable).map(|pid| (pid, ())).collect();
        for pid in pids.into_keys() {
            let state = &mut taken.state;
            if !state.table().holds(pid) || state.fences().contains_key(&pid) {
                continue;
            }
            match self.process_to_fence(pid, state) {
                Some(process) => taken.to_fence.push((pid, process)),
                None => _ = state.unreachable.insert(pid),
            }
        }
    }
}

/// Whether a lock may be had a moment later.
fn may_pass(reason: NotAgain) -> bool {
    match reason {
        NotAgain::Taken(_) => true,
        NotAgain::Open(reason) | NotAgain::Lock(reason) => errno::may_pass(reason),
        NotAgain::Gone | NotAgain::Replaced => false,
    }
}

/// Removes a lock file of dead owners. True if somebody has it locked.
fn is_in_use(resource: &Held) -> bool {
    let place = place_of(resource);
    let again = Again {
        place,
        identity: resource.identity,
        mode: Mode::Exclusive,
    };
    match again.run() {
        Ok(lease) => {
            // Nobody shares it: it is locked alone.
            let end = End {
                place,
                identity: resource.identity,
                removes: Some(Mode::Exclusive),
            };
            end.run(lease);
            false
        }
        Err(reason) => matches!(reason, NotAgain::Taken(_)),
    }
}

fn place_of(resource: &Held) -> Place<'_> {
    Place {
        lockspace: resource.lockspace(),
        name: resource.name(),
    }
}
