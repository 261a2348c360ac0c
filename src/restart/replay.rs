//! From events back to the state: each is applied in its turn, and one that does not fit what came
//! before says that the ledger is damaged.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use foldhash::{HashMap, HashSet};
use hashbrown::HashTable;
use slab::Slab;

use super::event::{Event, OwnerRecord};
use super::state::{ClientState, FenceState, ResourceState, State, Traffic, WatchState};
use crate::locks::table::{Owner, OwnerKey, Pid};

/// A state under replay, with the look-ups that a long ledger needs.
#[derive(Default)]
pub struct Replay {
    state: State,
    clients: Slab<ClientState>,
    /// Places of the clients.
    by_descriptor: HashMap<i32, usize>,
    resources: Slab<ResourceState>,
    /// Places of the resources.
    by_name: HashTable<usize>,
    hasher: RandomState,
    /// Places of the resources that a process holds. Made when it is first needed: in most ledgers
    /// no owner ends.
    held: Option<HashMap<Pid, Vec<usize>>>,
    fences: HashMap<Pid, FenceState>,
    watches: HashMap<Pid, WatchState>,
    /// What each owner last said of itself. The table keeps nothing else.
    owners: HashMap<OwnerKey, Owner>,
    /// One of them said something new.
    has_changed_owner: bool,
    /// Whether the ledger was written by a program that knew owners by their process only.
    knows_processes_only: bool,
}

/// The first format that tells the domains of a process apart.
const FIRST_WITH_DOMAINS: u32 = 3;

/// The fewest bytes that the events of a client, or of a resource, usually take.
const BYTES_EACH: usize = 100;

impl Replay {
    /// For a ledger of this format and length, bytes.
    pub fn of_ledger(version: u32, length: usize) -> Replay {
        let count = length / BYTES_EACH;
        let mut replay = Replay {
            knows_processes_only: version < FIRST_WITH_DOMAINS,
            ..Replay::default()
        };
        replay.clients.reserve(count / 2);
        replay.by_descriptor.reserve(count / 2);
        replay.resources.reserve(count);
        replay.by_name.reserve(count, |_| 0);
        replay.owners.reserve(count / 2);
        replay
    }

    /// Applies the next event; a sentence about the damage if it does not fit.
    pub fn apply(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Connected {
                descriptor,
                server,
                id,
                peer,
                start_time,
                connected_at,
                refused,
            } => {
                let next = id.checked_add(1).ok_or("a client's number is too great")?;
                let numbers = self.state.server_mut(server);
                numbers.next_id = numbers.next_id.max(next);
                let client = ClientState {
                    descriptor,
                    server,
                    id,
                    peer,
                    start_time,
                    connected_at,
                    has_called: false,
                    refused,
                    owner: None,
                    restricted: false,
                    traffic: Traffic::default(),
                };
                let place = self.clients.insert(client);
                if self.by_descriptor.insert(descriptor, place).is_some() {
                    return Err(format!("two clients have the descriptor {descriptor}"));
                }
            }
            Event::Called { descriptor } => {
                let client = self.client(descriptor)?;
                client.has_called = true;
                client.refused = false;
            }
            Event::Registered { descriptor, owner } => {
                self.client(descriptor)?.owner = Some(owner.to_owner());
            }
            Event::Restricted { descriptor } => self.client(descriptor)?.restricted = true,
            Event::Traffic {
                descriptor,
                traffic,
            } => {
                // Where there are no bytes, nothing can be said about them.
                let traffic = if traffic.is_empty() {
                    Traffic::default()
                } else {
                    *traffic
                };
                self.client(descriptor)?.traffic = traffic;
            }
            Event::Gone { descriptor } => {
                self.client(descriptor)?;
                if let Some(place) = self.by_descriptor.remove(&descriptor) {
                    self.clients.try_remove(place);
                }
            }
            Event::Lockspace { directory } => self.state.lockspaces.push(directory.to_vec()),
            Event::Granted {
                owner,
                lockspace,
                name,
                descriptor,
                identity,
                mode,
                autocreate,
                created,
                kind,
            } => {
                let hash = self.hash(lockspace, name);
                if self.find(hash, lockspace, name).is_some() {
                    return Err("a resource is granted twice".into());
                }
                let owner = self.latest(owner);
                let pid = owner.pid;
                let place = self.resources.insert(ResourceState {
                    lockspace: lockspace.to_vec(),
                    name: name.to_vec(),
                    descriptor,
                    identity: Some(identity),
                    mode,
                    autocreate,
                    created,
                    kind,
                    parked: Vec::new(),
                    holders: vec![(owner, 1)],
                });
                let (resources, hasher) = (&self.resources, &self.hasher);
                self.by_name.insert_unique(hash, place, |place| {
                    resources
                        .get(*place)
                        .map_or(0, |held| hash_of(hasher, &held.lockspace, &held.name))
                });
                if let Some(held) = &mut self.held {
                    held.entry(pid).or_default().push(place);
                }
            }
            Event::Joined {
                owner,
                lockspace,
                name,
            } => {
                let owner = self.latest(owner);
                let place = self.place(lockspace, name)?;
                let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
                if !has_holder(resource, owner.pid)
                    && let Some(held) = &mut self.held
                {
                    held.entry(owner.pid).or_default().push(place);
                }
                let key = owner.key();
                let holder = resource
                    .holders
                    .iter_mut()
                    .find(|(known, _)| known.key() == key);
                match holder {
                    Some((_, times)) => *times = times.saturating_add(1),
                    None => resource.holders.push((owner, 1)),
                }
            }
            Event::Parked {
                lockspace,
                name,
                descriptor,
            } => {
                let place = self.place(lockspace, name)?;
                let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
                resource.parked.push(descriptor);
            }
            Event::Released {
                pid,
                lockspace,
                name,
            } => {
                let place = self.place(lockspace, name)?;
                let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
                // Of several domains nobody knows any more which of them has the rest.
                let of_process = |(owner, _): &&(Owner, u32)| owner.pid == pid;
                if resource.holders.iter().filter(of_process).count() > 1 {
                    forget_domains(resource, pid);
                }
                let position = resource.holders.iter().position(|(it, _)| it.pid == pid);
                self.release_one(place, pid, position)?;
            }
            Event::ReleasedBy {
                pid,
                uuid,
                lockspace,
                name,
            } => {
                let place = self.place(lockspace, name)?;
                let resource = self.resources.get(place).ok_or("a place is empty")?;
                let holding = |owner| {
                    let mut holders = resource.holders.iter();
                    holders.position(|(known, _)| known.key() == owner)
                };
                let uuid = Some(uuid);
                // As the table does it: a domain's own holding before one that may be another's.
                let position =
                    holding(OwnerKey { pid, uuid }).or_else(|| holding(OwnerKey::of_process(pid)));
                self.release_one(place, pid, position)?;
            }
            Event::OwnerEnded { pid } => {
                let held = self.held.get_or_insert_with(|| held(&self.resources));
                for place in held.remove(&pid).unwrap_or_default() {
                    let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
                    resource.holders.retain(|(owner, _)| owner.pid != pid);
                    self.take_out_if_free(place);
                }
            }
            Event::Fencing(fence) => {
                self.fences.insert(fence.pid, fence);
            }
            Event::Fenced { pid } => {
                self.fences.remove(&pid);
            }
            Event::Watched(watch) => {
                self.watches.insert(watch.pid, watch);
            }
            Event::Unwatched { pid } => {
                self.watches.remove(&pid);
            }
            Event::Server { name, state } => *self.state.server_mut(name) = state,
            Event::Listening(listener) => self.state.listeners.push(listener),
            Event::Process(process) => self.state.process = *process,
            Event::Logging(logging) => self.state.process.logging = *logging,
            Event::Poll(poll) => self.state.poll = Some(poll),
            Event::IdleTimeout(seconds) => self.state.process.idle_timeout_s = seconds,
        }
        Ok(())
    }

    fn client(&mut self, descriptor: i32) -> Result<&mut ClientState, String> {
        self.by_descriptor
            .get(&descriptor)
            .and_then(|place| self.clients.get_mut(*place))
            .ok_or_else(|| format!("it speaks of a client {descriptor} that never connected"))
    }

    fn hash(&self, lockspace: &[u8], name: &[u8]) -> u64 {
        hash_of(&self.hasher, lockspace, name)
    }

    fn find(&self, hash: u64, lockspace: &[u8], name: &[u8]) -> Option<usize> {
        let is_it = |place: &usize| {
            let held = self.resources.get(*place);
            held.is_some_and(|held| held.lockspace == lockspace && held.name == name)
        };
        self.by_name.find(hash, is_it).copied()
    }

    fn place(&self, lockspace: &[u8], name: &[u8]) -> Result<usize, String> {
        self.find(self.hash(lockspace, name), lockspace, name)
            .ok_or_else(|| "it speaks of a resource that nobody holds".to_owned())
    }

    /// Takes one holding away from a process: the one at this position of the resource's holders.
    fn release_one(
        &mut self,
        place: usize,
        pid: Pid,
        position: Option<usize>,
    ) -> Result<(), String> {
        let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
        let position = position.ok_or("it releases what an owner does not hold")?;
        if let Some((_, times)) = resource.holders.get_mut(position) {
            *times = times.saturating_sub(1);
            if *times > 0 {
                return Ok(());
            }
        }
        resource.holders.swap_remove(position);
        if !has_holder(resource, pid)
            && let Some(held) = &mut self.held
            && let Some(held) = held.get_mut(&pid)
        {
            held.retain(|known| *known != place);
        }
        self.take_out_if_free(place);
        Ok(())
    }

    /// A resource that nobody holds any more is none.
    fn take_out_if_free(&mut self, place: usize) {
        let Some(resource) = self.resources.get(place) else {
            return;
        };
        if resource.holders.is_empty() {
            let hash = hash_of(&self.hasher, &resource.lockspace, &resource.name);
            if let Ok(entry) = self.by_name.find_entry(hash, |known| *known == place) {
                entry.remove();
            }
            self.resources.try_remove(place);
        }
    }

    /// The owner of an event, whose word about itself holds for everything that it has.
    fn latest(&mut self, owner: OwnerRecord<'_>) -> Owner {
        match self.owners.get(&owner.key()) {
            Some(known) if OwnerRecord::from(known) == owner => return known.clone(),
            Some(_) => self.has_changed_owner = true,
            None => (),
        }
        let owner = owner.to_owner();
        self.owners.insert(owner.key(), owner.clone());
        owner
    }

    /// The state that the events so far say.
    pub fn finish(self) -> State {
        let mut state = self.state;
        state.clients = self.clients.into_iter().map(|(_, it)| it).collect();
        state
            .clients
            .sort_by_key(|client| (client.server, client.id));
        state.resources = self.resources.into_iter().map(|(_, it)| it).collect();
        if self.has_changed_owner {
            let holders = state
                .resources
                .iter_mut()
                .flat_map(|held| &mut held.holders);
            for (owner, _) in holders {
                if let Some(latest) = self.owners.get(&owner.key()) {
                    owner.clone_from(latest);
                }
            }
        }
        if self.knows_processes_only {
            forget_mixed_domains(&mut state);
        }
        state.fences = self.fences.into_values().collect();
        state.watches = self.watches.into_values().collect();
        state
    }
}

/// The program that wrote this gave all that a process holds to the domain that it had registered last.
/// Where a process stood for several, nobody knows which of them holds what.
fn forget_mixed_domains(state: &mut State) {
    let mut domains: HashMap<Pid, [u8; 16]> = HashMap::default();
    let mut mixed: HashSet<Pid> = HashSet::default();
    let clients = state.clients.iter().filter_map(|it| it.owner.as_ref());
    let holders = state.resources.iter().flat_map(|held| &held.holders);
    for owner in clients.chain(holders.map(|(owner, _)| owner)) {
        if *domains.entry(owner.pid).or_insert(owner.uuid) != owner.uuid {
            mixed.insert(owner.pid);
        }
    }
    for pid in mixed {
        let of_process = |held: &&mut ResourceState| has_holder(held, pid);
        let resources = state.resources.iter_mut().filter(of_process);
        resources.for_each(|resource| forget_domains(resource, pid));
    }
}

/// Makes one holding of all that the domains of a process have of a resource: of whichever.
fn forget_domains(resource: &mut ResourceState, pid: Pid) {
    let of_process = |(owner, _): &&(Owner, u32)| owner.pid == pid;
    let times = resource.holders.iter().filter(of_process);
    let times = times.fold(0u32, |sum, (_, times)| sum.saturating_add(*times));
    resource.holders.retain(|(owner, _)| owner.pid != pid);
    resource.holders.push((Owner::unknown(pid), times));
}

fn has_holder(resource: &ResourceState, pid: Pid) -> bool {
    resource.holders.iter().any(|(owner, _)| owner.pid == pid)
}

/// Places of the resources that each process holds.
fn held(resources: &Slab<ResourceState>) -> HashMap<Pid, Vec<usize>> {
    let mut held: HashMap<Pid, Vec<usize>> = HashMap::default();
    for (place, resource) in resources {
        for (owner, _) in &resource.holders {
            let places = held.entry(owner.pid).or_default();
            // Once, for whichever domains.
            if places.last() != Some(&place) {
                places.push(place);
            }
        }
    }
    held
}

fn hash_of(hasher: &RandomState, lockspace: &[u8], name: &[u8]) -> u64 {
    hasher.hash_one((lockspace, name))
}
