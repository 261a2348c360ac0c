//! From events back to the state: each is applied in its turn, and one that does not fit what came
//! before says that the ledger is damaged.

use std::hash::BuildHasher;

use foldhash::HashMap;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use slab::Slab;

use super::event::{Event, OwnerRecord};
use super::state::{ClientState, FenceState, ResourceState, State, Traffic, WatchState};
use crate::locks::table::{Owner, Pid};

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
    /// What each process last said of itself. The table keeps nothing else.
    owners: HashMap<Pid, Owner>,
    /// One of them said something new.
    has_changed_owner: bool,
}

/// The fewest bytes that the events of a client, or of a resource, usually take.
const BYTES_EACH: usize = 100;

impl Replay {
    /// For a ledger of this length, bytes.
    pub fn of_length(length: usize) -> Replay {
        let count = length / BYTES_EACH;
        let mut replay = Replay::default();
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
                let holder = resource
                    .holders
                    .iter_mut()
                    .find(|(known, _)| known.pid == owner.pid);
                match holder {
                    Some((_, times)) => *times = times.saturating_add(1),
                    None => {
                        if let Some(held) = &mut self.held {
                            held.entry(owner.pid).or_default().push(place);
                        }
                        resource.holders.push((owner, 1));
                    }
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
                if self.release(pid, place, 1)? == Left::Nothing
                    && let Some(held) = &mut self.held
                    && let Some(held) = held.get_mut(&pid)
                {
                    held.retain(|known| *known != place);
                }
            }
            Event::OwnerEnded { pid } => {
                let held = self.held.get_or_insert_with(|| held(&self.resources));
                for place in held.remove(&pid).unwrap_or_default() {
                    self.release(pid, place, u32::MAX)?;
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

    /// Takes holdings away from a process, which may leave the resource without any.
    fn release(&mut self, pid: Pid, place: usize, count: u32) -> Result<Left, String> {
        let resource = self.resources.get_mut(place).ok_or("a place is empty")?;
        let position = resource
            .holders
            .iter()
            .position(|(owner, _)| owner.pid == pid)
            .ok_or("it releases what an owner does not hold")?;
        if let Some((_, times)) = resource.holders.get_mut(position) {
            *times = times.saturating_sub(count);
            if *times > 0 {
                return Ok(Left::Something);
            }
        }
        resource.holders.swap_remove(position);
        if resource.holders.is_empty() {
            let hash = hash_of(&self.hasher, &resource.lockspace, &resource.name);
            if let Ok(entry) = self.by_name.find_entry(hash, |known| *known == place) {
                entry.remove();
            }
            self.resources.try_remove(place);
        }
        Ok(Left::Nothing)
    }

    /// The owner of an event, whose word about itself holds for everything that it has.
    fn latest(&mut self, owner: OwnerRecord<'_>) -> Owner {
        match self.owners.get(&owner.pid) {
            Some(known) if OwnerRecord::from(known) == owner => return known.clone(),
            Some(_) => self.has_changed_owner = true,
            None => (),
        }
        let owner = owner.to_owner();
        self.owners.insert(owner.pid, owner.clone());
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
                if let Some(latest) = self.owners.get(&owner.pid) {
                    owner.clone_from(latest);
                }
            }
        }
        state.fences = self.fences.into_values().collect();
        state.watches = self.watches.into_values().collect();
        state
    }
}

/// Places of the resources that each process holds.
fn held(resources: &Slab<ResourceState>) -> HashMap<Pid, Vec<usize>> {
    let mut held: HashMap<Pid, Vec<usize>> = HashMap::default();
    for (place, resource) in resources {
        for (owner, _) in &resource.holders {
            held.entry(owner.pid).or_default().push(place);
        }
    }
    held
}

/// What a process has left of a resource.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Something,
    Nothing,
}

fn hash_of(hasher: &RandomState, lockspace: &[u8], name: &[u8]) -> u64 {
    hasher.hash_one((lockspace, name))
}
