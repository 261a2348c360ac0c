//! From the ledger of a daemon that was killed with all its processes to a state that holds everything
//! again: without a descriptor of what it held, by name. An owner that lives, and is the same process, has
//! its locks again and is watched; what a dead one left is ended. Its connection is gone in any case.
//!
//! Whose process cannot be told keeps its locks as one that cannot be seen: to free them could destroy a disk,
//! and to kill it could kill another one. So nobody is dead unless all that is known of it says so, and nobody
//! is sent a signal unless all that is known of the one that is meant says that this is the one. What somebody
//! else has by now is lost, and said.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Duration;

use foldhash::HashMap;

use super::clients::ClientId;
use super::descriptor::{Descriptor, Number, Open, Saved};
use super::event::{Event, Here, OwnerRecord, ResourceName};
use super::fences::{Fence, Watched};
use super::servers::{Both, Server, Service};
use super::state::State;
use super::{Given, settings::Settings};
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::process::{self, Life, Likeness, Process};
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
    /// It lives. The pidfd is given away once.
    Alive(Option<OwnedFd>),
    /// Nobody can tell.
    Unseen,
    /// It is dead, whoever has its number now.
    Dead,
}

/// Something that the ledger says of the process that had a number.
struct Sign {
    of: Whom,
    /// By what it was known, unless that could not be found out.
    life: Option<Life>,
    /// Whether that is the process of this number now.
    likeness: Likeness,
}

/// Of whom a sign is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whom {
    /// Who made a client's connection, and stands for a domain with it.
    Client(ClientId, [u8; 16]),
    /// Who was watched or fenced.
    Followed,
}

/// Why an owner does not have its lock any more.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The same by its key.
    pub key: OwnerKey,
    /// Its process, if it is to be fenced for that.
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
    /// Owners that were to be fenced, of whose processes it is not proved that they are meant.
    pub spared: Vec<String>,
}

/// Whether a ledger was written in another boot of the host: then nobody of whom it tells is left.
pub fn is_of_another_boot(state: &State<Saved>) -> bool {
    let then = state.here().and_then(|here| here.boot);
    then.is_some_and(|then| process::boot().is_some_and(|now| now != then))
}

/// Takes again what a ledger tells of. The process's own settings are those of this one. If the ledger
/// `is_stale`, what somebody else has by now may have been given back to him.
pub fn take_again(saved: &State<Saved>, is_stale: bool, settings: Settings) -> TakenAgain {
    let then = saved.here().unwrap_or_default();
    let now = Here {
        boot: process::boot(),
        namespace: process::namespace(),
    };
    let is_here = then.namespace.is_some() && then.namespace == now.namespace;
    let (fates, signs) = fates(saved, is_here);
    let mut work = Work {
        saved,
        fates,
        signs,
        may_kill: is_here && then.boot.is_some() && then.boot == now.boot,
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
        spared: Vec::new(),
    };
    work.lock_all(&mut taken);
    work.end_what_the_dead_left(&mut taken);
    work.go_on_fencing(&mut taken);
    work.watch_all(&mut taken);
    if !is_stale {
        work.find_who_is_robbed(&mut taken);
    }
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

/// What became of the processes of all owners, and what is known of them.
fn fates(saved: &State<Saved>, is_here: bool) -> (HashMap<Pid, Fate>, HashMap<Pid, Vec<Sign>>) {
    let mut signs: HashMap<Pid, Vec<Sign>> = HashMap::default();
    let mut note = |pid: Pid, of: Whom, life: Option<Life>| {
        let likeness = Likeness::Unknown;
        let sign = Sign { of, life, likeness };
        signs.entry(pid).or_default().push(sign);
    };
    for (id, client) in saved.clients() {
        if let Some(owner) = client.own_owner() {
            note(owner.pid, Whom::Client(id, owner.uuid), client.life);
        }
    }
    let watched = saved.watched().values();
    let watched = watched.filter(|it| it.process.is_some()).map(|it| it.pid);
    let followed: BTreeSet<Pid> = watched.chain(saved.fences().keys().copied()).collect();
    for pid in followed {
        note(pid, Whom::Followed, saved.lives().get(&pid).copied());
    }
    let processes = saved.table().processes();
    let fenced = saved.fences().keys().copied();
    let pids: BTreeSet<Pid> = processes.chain(fenced).collect();
    let fate_of = |pid: Pid| {
        let watched = saved.watched().get(&pid);
        // The number means another process to whoever took a lock in its name, or may do so.
        let is_unseen = watched.is_some_and(|it| it.process.is_none());
        match signs.get_mut(&pid) {
            Some(signs) if is_here && !is_unseen => (pid, fate(pid, signs)),
            _ => (pid, Fate::Unseen),
        }
    };
    (pids.into_iter().map(fate_of).collect(), signs)
}

/// What became of the process that had this number, of which these signs are.
fn fate(pid: Pid, signs: &mut [Sign]) -> Fate {
    let process = match Process::open_any(pid) {
        Ok(process) if process.is_dead() => return Fate::Dead,
        Ok(process) => process,
        Err(Errno::ESRCH) => return Fate::Dead,
        Err(_) => return Fate::Unseen,
    };
    for sign in signs.iter_mut() {
        if let Some(life) = sign.life {
            sign.likeness = process::compare(process.pidfd(), pid, life);
        }
    }
    let is_any = |which: &[Likeness]| signs.iter().any(|sign| which.contains(&sign.likeness));
    if is_any(&[Likeness::Same, Likeness::Alike]) {
        Fate::Alive(Some(process.into_pidfd()))
    } else if is_any(&[Likeness::Unknown]) && !process.is_dead() {
        Fate::Unseen
    } else {
        Fate::Dead
    }
}

struct Work<'a> {
    saved: &'a State<Saved>,
    fates: HashMap<Pid, Fate>,
    signs: HashMap<Pid, Vec<Sign>>,
    /// Whether what tells processes apart does so between then and now.
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

    /// The process of an owner that is to be fenced, if all signs of whom is meant, of which there must be
    /// one, say that it is the one. What is watched is watched besides.
    fn process_to_fence(
        &mut self,
        pid: Pid,
        is_meant: impl Fn(Whom) -> bool,
        state: &State<Open>,
    ) -> Option<OwnedFd> {
        let signs = self.signs.get(&pid).map_or(&[][..], Vec::as_slice);
        let mut signs = signs.iter().filter(|sign| is_meant(sign.of)).peekable();
        let is_proved = signs.peek().is_some() && signs.all(|sign| sign.likeness == Likeness::Same);
        if !self.may_kill || !is_proved || !process::may_be_owner(pid) {
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
        while left.iter().any(|(_, reason)| may_pass(reason)) && Moment::now() < give_up {
            std::thread::sleep(PAUSE);
            left.retain_mut(|(resource, reason)| {
                if !may_pass(reason) {
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
            autocreate: resource.autocreate,
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
                key: owner.key(),
                process: None,
                is_fenced: false,
                path: place_of(resource).path(),
                why: why.clone(),
            });
        }
    }

    /// Who writes what somebody else has by now is to be fenced; one that stands for other domains must not
    /// die with one of them.
    fn find_who_is_robbed(&mut self, taken: &mut TakenAgain) {
        let mut found: BTreeSet<Pid> = taken.state.fences().keys().copied().collect();
        for loss in &mut taken.losses {
            let is_robbed = matches!(loss.why, Why::NotLocked(NotAgain::Taken(_)));
            let pid = loss.key.pid;
            let is_alone = self.saved.table().owners_of(pid).count() == 1;
            if is_robbed && is_alone && !found.contains(&pid) {
                let is_meant = |of: Whom| match (of, loss.key.uuid) {
                    (Whom::Client(_, domain), Some(robbed)) => domain == robbed,
                    (Whom::Client(..), None) | (Whom::Followed, _) => true,
                };
                loss.process = self.process_to_fence(pid, is_meant, &taken.state);
                if loss.process.is_some() {
                    found.insert(pid);
                }
            }
            loss.is_fenced = is_robbed && found.contains(&pid);
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
        let saved = self.saved;
        for (pid, fence) in saved.fences() {
            let is_meant = |of| of == Whom::Followed;
            if let Some(process) = self.process_to_fence(*pid, is_meant, &taken.state) {
                self.note_life(*pid, &process, taken);
                // Another time namespace has another clock.
                let latest = Moment::now().plus_ms(fence.stage.lasts_ms());
                let fence = Fence {
                    pid: *pid,
                    process,
                    stage: fence.stage,
                    next_step: fence.next_step.min(latest),
                };
                taken.state.fences.insert(*pid, fence);
            } else if !self.is_dead(*pid) {
                spare(*pid, taken);
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

    /// Owners whose connections had ended while they held locks. Of those that could not be reached nobody
    /// knows which process it was: they are not now either.
    fn begin_to_fence(&mut self, taken: &mut TakenAgain) {
        let saved = self.saved;
        let over = saved.clients().filter(|(_, client)| client.is_over());
        let over = over.filter_map(|(id, client)| {
            let owner: OwnerKey = saved.ends_with(client)?;
            let goes_on = saved.holds_for_others_only(owner) || saved.stands_for_others(owner);
            (!goes_on).then_some((owner.pid, id))
        });
        let over: Vec<(Pid, ClientId)> = over.collect();
        for (pid, id) in over {
            let state = &taken.state;
            let is_begun = |(other, _): &(Pid, OwnedFd)| *other == pid;
            if !state.table().holds(pid)
                || state.fences().contains_key(&pid)
                || taken.to_fence.iter().any(is_begun)
            {
                continue;
            }
            let is_meant = |of| matches!(of, Whom::Client(other, _) if other == id);
            match self.process_to_fence(pid, is_meant, state) {
                Some(process) => taken.to_fence.push((pid, process)),
                None => spare(pid, taken),
            }
        }
        for pid in &saved.unreachable {
            if taken.state.table().holds(*pid) {
                taken.state.unreachable.insert(*pid);
            }
        }
    }
}

/// An owner is to be fenced, and its process may be another one.
fn spare(pid: Pid, taken: &mut TakenAgain) {
    if taken.state.table().holds(pid) && taken.state.unreachable.insert(pid) {
        let text = holder::process_text(taken.state.table(), pid);
        taken.spared.push(text);
    }
}

/// Whether a lock may be had a moment later.
fn may_pass(reason: &NotAgain) -> bool {
    match reason {
        NotAgain::Taken(_) => true,
        NotAgain::Open(reason) | NotAgain::Lock(reason) => errno::may_pass(*reason),
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
        autocreate: resource.autocreate,
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
