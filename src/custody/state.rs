//! All that lasts, as one value: live, in a daemon that serves, with open descriptors; read from a
//! ledger, with their numbers. Both are changed by the same events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use foldhash::HashMap;

use super::clients::{Arrival, Client, ClientId, Standing, Traffic};
use super::descriptor::{Descriptor, Form, Number, Saved};
use super::event::{Event, Here, OwnerRecord, ResourceName};
use super::fences::{Fence, Watched};
use super::own_connections::{Own, OwnConnections};
use super::roll::Roll;
use super::served::Served;
use super::servers::{Both, Listening, Server, Service};
use super::settings::Settings;
use crate::host::file::FileIdentity;
use crate::host::process::Life;
use crate::locks::lease::{Lease, LockKind};
use crate::locks::table::{Granted, Owner, OwnerKey, Pid, Resource, ResourceId, Table};
use crate::log::Printable;

/// The state of a daemon, with its descriptors in one form or the other.
#[derive(Debug)]
pub struct State<F: Form> {
    pub(in crate::custody) servers: Both<Server>,
    pub(in crate::custody) listeners: Vec<Listening<F::Other>>,
    pub(in crate::custody) clients: Roll<Client<F::Other>>,
    /// The clients that are served, in the order of connecting.
    pub(in crate::custody) served: Both<Served>,
    /// Which domains processes stand for over connections of their own.
    pub(in crate::custody) own_connections: OwnConnections,
    /// Bytes on their way, of the clients that have any. Written down when a state is passed on, and
    /// taken out when somebody goes on with it.
    pub(in crate::custody) traffic: BTreeMap<ClientId, Traffic>,
    /// The clients that are told of what happens.
    pub(in crate::custody) subscribers: BTreeSet<ClientId>,
    pub(in crate::custody) lockspaces: BTreeSet<Box<[u8]>>,
    pub(in crate::custody) table: Table<Lease<F::File>>,
    /// The files that must not be opened and closed: those with POSIX locks, each as often as it is
    /// held, and the daemon's own from when somebody wanted it. While there are any, files are looked at
    /// before they are opened.
    pub(in crate::custody) avoid: Vec<FileIdentity>,
    pub(in crate::custody) estates: VecDeque<Estate<F::File>>,
    pub(in crate::custody) fences: HashMap<Pid, Fence<F::Other>>,
    pub(in crate::custody) watched: HashMap<Pid, Watched<F::Other>>,
    /// The processes that are watched or being fenced, to be known again.
    pub(in crate::custody) lives: HashMap<Pid, Life>,
    /// Where the numbers of processes mean what they do.
    pub(in crate::custody) here: Option<Here>,
    pub(in crate::custody) unreachable: BTreeSet<Pid>,
    pub(in crate::custody) settings: Settings,
    pub(in crate::custody) poll: Option<Number>,
    /// The poll of an image that called its connections otherwise: to be closed.
    pub(in crate::custody) old_poll: Option<Number>,
}

/// What a dead owner left: the table does not have it any more, the kernel does.
#[derive(Debug)]
pub struct Estate<D> {
    /// The dead process.
    pub pid: Pid,
    /// The files that are still locked.
    pub resources: Vec<Resource<Lease<D>>>,
}

impl<F: Form> Default for State<F> {
    fn default() -> Self {
        State {
            servers: Both::default(),
            listeners: Vec::new(),
            clients: Roll::default(),
            served: Both::default(),
            own_connections: OwnConnections::default(),
            traffic: BTreeMap::new(),
            subscribers: BTreeSet::new(),
            lockspaces: BTreeSet::new(),
            table: Table::new(),
            avoid: Vec::new(),
            estates: VecDeque::new(),
            fences: HashMap::default(),
            watched: HashMap::default(),
            lives: HashMap::default(),
            here: None,
            unreachable: BTreeSet::new(),
            settings: Settings::default(),
            poll: None,
            old_poll: None,
        }
    }
}

/// Where an event's descriptors and owners come from: from the hand of whoever made the change, or out
/// of the event itself.
pub trait Source<F: Form> {
    /// The file that the event calls by this number.
    fn file(&mut self, number: Number) -> Result<F::File, String>;

    /// The socket or process that the event calls by this number.
    fn other(&mut self, number: Number) -> Result<F::Other, String>;

    /// The owner of an event. All that one owner has shares its name's memory.
    fn owner(&mut self, record: OwnerRecord<'_>) -> Owner;

    /// The place of the resource that the event names, where it was looked up already.
    fn held(&self) -> Option<ResourceId> {
        None
    }
}

/// Events that are read back: numbers stay numbers.
#[derive(Debug, Default)]
pub struct Numbers {
    owners: HashMap<(Pid, [u8; 16]), Owner>,
}

impl Source<Saved> for Numbers {
    fn file(&mut self, number: Number) -> Result<Number, String> {
        Ok(number)
    }

    fn other(&mut self, number: Number) -> Result<Number, String> {
        Ok(number)
    }

    fn owner(&mut self, record: OwnerRecord<'_>) -> Owner {
        match self.owners.get(&(record.pid, record.uuid)) {
            Some(known) if OwnerRecord::from(known) == record => known.clone(),
            _ => {
                let owner = record.to_owner();
                self.owners.insert((owner.pid, owner.uuid), owner.clone());
                owner
            }
        }
    }
}

/// What an event left over: it is not part of the state any more and still something in the world.
#[derive(Debug)]
pub enum Left<F: Form> {
    /// Nothing.
    Nothing,
    /// A connection, to be closed.
    Client(Client<F::Other>),
    /// A file that nobody holds any more, to be unlocked and closed.
    Resource(Resource<Lease<F::File>>),
    /// A process that nobody waits for any more.
    Process(F::Other),
    /// Sockets at which nobody is let in any more.
    Listeners(Vec<Listening<F::Other>>),
}

impl<F: Form> State<F> {
    /// Makes the change that an event says. A sentence about the damage if it does not fit what came
    /// before; then the state is not to be used.
    ///
    /// Whoever makes one of the two changes that every lock takes says which, so that this comes down to the
    /// one arm where it is inlined.
    #[inline(always)]
    pub(in crate::custody) fn apply(
        &mut self,
        event: Event<'_>,
        source: &mut impl Source<F>,
    ) -> Result<Left<F>, String> {
        match event {
            Event::Granted {
                owner,
                resource,
                descriptor,
                identity,
                mode,
                autocreate,
                created,
                kind,
                since,
            } => {
                let ResourceName { lockspace, name } = resource;
                let vacant = self.table.vacant(lockspace, name);
                let vacant = vacant.ok_or("a resource is granted twice")?;
                let kind = kind.into();
                if matches!(kind, LockKind::Process { .. }) {
                    self.avoid.push(identity);
                }
                let granted = Granted {
                    lockspace,
                    name,
                    identity,
                    mode,
                    autocreate,
                    since,
                    lease: Lease {
                        descriptor: source.file(descriptor)?,
                        kind,
                        created,
                    },
                };
                self.table.enter(vacant, &source.owner(owner), granted);
                Ok(Left::Nothing)
            }
            Event::ReleasedBy(pid, uuid, resource) => {
                let uuid = Some(uuid);
                let id = source.held().map_or_else(|| self.held(resource), Ok)?;
                self.release(OwnerKey { pid, uuid }, id)
            }
            event => self.apply_rare(event, source),
        }
    }

    /// The same for what is not done with every lock.
    #[inline(never)]
    fn apply_rare(
        &mut self,
        event: Event<'_>,
        source: &mut impl Source<F>,
    ) -> Result<Left<F>, String> {
        match event {
            Event::Connected(descriptor, arrival) => {
                if descriptor.0 < 0 {
                    return Err(format!("it uses descriptor {}", descriptor.0));
                }
                let next = arrival
                    .id
                    .checked_add(1)
                    .ok_or("a client's number is too great")?;
                let server = self.servers.of_mut(arrival.server);
                server.next_id = server.next_id.max(next);
                let client = Client::new(source.other(descriptor)?, arrival);
                self.clients
                    .insert(descriptor.0, client)
                    .map_err(|_| format!("two clients have the descriptor {}", descriptor.0))?;
                if !arrival.refused {
                    self.set_served(descriptor, true);
                }
            }
            Event::Called(number) => {
                let client = self.client_mut(number)?;
                client.has_called = true;
                client.arrival.refused = false;
                if client.is_refused() {
                    client.standing = Standing::Served;
                    self.set_served(number, true);
                }
            }
            Event::Registered(number, record) => {
                let owner = Box::new(source.owner(record));
                self.client_mut(number)?;
                self.stands_no_more(number);
                let client = self.client_mut(number)?;
                (client.owner, client.registered_at) = (Some(owner), 0);
                self.stands_from_now(number);
            }
            Event::Restricted(number) => self.client_mut(number)?.restricted = true,
            Event::Leaving(number) => {
                self.client_mut(number)?;
                self.stands_no_more(number);
                self.client_mut(number)?.standing = Standing::Over;
            }
            Event::Gone(number) => {
                self.subscribers.remove(&ClientId(number.0));
                self.traffic.remove(&ClientId(number.0));
                self.stands_no_more(number);
                self.set_served(number, false);
                let client = self.clients.remove(number.0);
                return client.map(Left::Client).ok_or_else(|| no_client(number));
            }
            Event::Traffic(number, traffic) => {
                self.client_mut(number)?;
                let id = ClientId(number.0);
                if traffic.is_empty() {
                    self.traffic.remove(&id);
                } else {
                    self.traffic.insert(id, *traffic);
                }
            }
            Event::Lockspace(directory) => _ = self.lockspaces.insert(directory.into()),
            Event::Joined(owner, resource) => {
                let id = self.held(resource)?;
                self.table.join(id, &source.owner(owner));
            }
            Event::Released(pid, resource) => {
                let id = self.held(resource)?;
                let held = self.table.get(id).ok_or("a place is empty")?;
                let own = held.holders().filter(|(key, _)| key.pid == pid);
                let own: Vec<OwnerKey> = own.map(|(key, _)| key).collect();
                return match own.as_slice() {
                    [] => Err("it releases what an owner does not hold".into()),
                    [only] => self.release(*only, id),
                    // Of several domains nobody knows any more which of them has the rest.
                    _ => {
                        self.table.forget_domains(pid);
                        self.release(OwnerKey::of_process(pid), id)
                    }
                };
            }
            Event::Parked(resource, number) => {
                let id = self.held(resource)?;
                let descriptor = source.file(number)?;
                let held = self.table.get_mut(id).ok_or("a place is empty")?;
                match &mut held.lease.kind {
                    LockKind::Process { parked } => parked.push(descriptor),
                    LockKind::OpenFile | LockKind::Unknown => {
                        return Err("a descriptor is parked where there is no POSIX lock".into());
                    }
                }
            }
            Event::OwnerEnded(pid) => {
                // The files were closed by the program that wrote this.
                for resource in self.table.end_owner(pid) {
                    self.forget_process_lock(&resource);
                }
            }
            Event::Died(pid) => {
                let resources = self.table.end_owner(pid);
                if !resources.is_empty() {
                    self.estates.push_back(Estate { pid, resources });
                }
            }
            Event::Freed(number) => return self.free(number),
            Event::Fencing(fence) => return self.fence(fence, source),
            Event::Fenced(pid) => {
                let fence = self.fences.remove(&pid);
                self.forget_life(pid);
                return Ok(fence.map_or(Left::Nothing, |fence| Left::Process(fence.process)));
            }
            Event::Unreachable(pid) => _ = self.unreachable.insert(pid),
            Event::Reachable(pid) => _ = self.unreachable.remove(&pid),
            Event::Watched(Watched { pid, process }) => {
                let process = process.map(|number| source.other(number)).transpose()?;
                let before = self.watched.insert(pid, Watched { pid, process });
                return Ok(process_of(before));
            }
            Event::Unwatched(pid) => {
                let before = self.watched.remove(&pid);
                self.forget_life(pid);
                return Ok(process_of(before));
            }
            Event::Here(here) => self.here = Some(here),
            Event::ClientIs(number, life) => self.client_mut(number)?.life = Some(life),
            Event::OwnerIs(pid, life) => _ = self.lives.insert(pid, life),
            Event::RegisteredAt(number, at) => self.client_mut(number)?.registered_at = at,
            Event::Subscribed(number, wanted) => {
                self.client_mut(number)?.wanted = wanted;
                let id = ClientId(number.0);
                if wanted == 0 {
                    self.subscribers.remove(&id);
                } else {
                    self.subscribers.insert(id);
                }
            }
            Event::Server(service, server) => *self.servers.of_mut(service) = server,
            Event::Listening(listening) => {
                let Listening {
                    server,
                    socket,
                    path,
                } = listening;
                let socket = source.other(socket)?;
                self.listeners.push(Listening {
                    server,
                    socket,
                    path,
                });
            }
            Event::Process(settings) => self.settings = *settings,
            Event::Logging(logging) => self.settings.logging = *logging,
            Event::IdleTimeout(seconds) => self.settings.idle_timeout_s = seconds,
            Event::Poll(poll) => self.poll = Some(poll),
            Event::OldPoll(poll, _) => self.old_poll = Some(poll),
            Event::Deaf => return Ok(Left::Listeners(std::mem::take(&mut self.listeners))),
            Event::Granted { .. } | Event::ReleasedBy(..) => return self.apply(event, source),
        }
        Ok(Left::Nothing)
    }

    fn forget_life(&mut self, pid: Pid) {
        if !self.fences.contains_key(&pid) && !self.watched.contains_key(&pid) {
            self.lives.remove(&pid);
        }
    }

    fn client_mut(&mut self, number: Number) -> Result<&mut Client<F::Other>, String> {
        self.clients
            .get_mut(number.0)
            .ok_or_else(|| no_client(number))
    }

    fn held(&mut self, resource: ResourceName<'_>) -> Result<ResourceId, String> {
        self.table
            .find(resource.lockspace, resource.name)
            .ok_or_else(|| "it speaks of a resource that nobody holds".to_owned())
    }

    /// One holding of a process ended: of this domain's, or of whichever has one.
    fn release(&mut self, owner: OwnerKey, id: ResourceId) -> Result<Left<F>, String> {
        let released = self
            .table
            .release_at(id, owner)
            .map_err(|_| "it releases what an owner does not hold")?;
        Ok(match released {
            Some(resource) => {
                self.forget_process_lock(&resource);
                Left::Resource(resource)
            }
            None => Left::Nothing,
        })
    }

    /// A resource that nobody holds any more has no POSIX lock. Its file may be held under another
    /// name, which has an entry of its own.
    fn forget_process_lock(&mut self, resource: &Resource<Lease<F::File>>) {
        if matches!(resource.lease.kind, LockKind::Process { .. })
            && let Some(place) = self
                .avoid
                .iter()
                .position(|file| *file == resource.identity)
        {
            self.avoid.swap_remove(place);
        }
    }

    /// A held resource that is this file and has a POSIX lock.
    pub fn process_lock_on(&self, identity: FileIdentity) -> Option<ResourceId> {
        if self.avoid.is_empty() {
            return None;
        }
        let is_process = |id: &ResourceId| {
            let held = self.table.get(*id);
            held.is_some_and(|held| matches!(held.lease.kind, LockKind::Process { .. }))
        };
        // What could not be asked which file it is may be any of these.
        if identity.is_known() {
            self.table.same_file(identity).find(is_process)
        } else {
            self.table.iter().map(|(id, _)| id).find(is_process)
        }
    }

    /// A client is one of those that are served from now on, or none of them any more.
    fn set_served(&mut self, number: Number, is_served: bool) {
        let Some(client) = self.clients.get(number.0) else {
            return;
        };
        let Arrival { server, id, .. } = client.arrival;
        let number_of = |other: ClientId| Some(self.clients.get(other.0)?.arrival.id);
        let (served, client) = (self.served.of_mut(server), ClientId(number.0));
        if is_served {
            served.insert(client, id, number_of);
        } else {
            served.remove(client, id, number_of);
        }
    }

    /// A client does not stand for its owner any more, if it did.
    fn stands_no_more(&mut self, number: Number) {
        if let Some(client) = self.clients.get(number.0)
            && !client.is_over()
            && let Some(owner) = client.own_owner()
        {
            self.own_connections.remove(owner.pid, owner.uuid);
        }
    }

    /// A client stands for its owner, if it made the connection itself.
    fn stands_from_now(&mut self, number: Number) {
        if let Some(client) = self.clients.get(number.0)
            && !client.is_over()
            && let Some(owner) = client.own_owner()
        {
            let clients = &self.clients;
            let one = (owner.pid, ClientId(number.0), owner.uuid);
            self.own_connections
                .add(one, |id| Some(clients.get(id.0)?.owner.as_deref()?.uuid));
        }
    }

    /// Finds out anew which clients stand for their owners.
    pub(in crate::custody) fn count_own_connections(&mut self) {
        self.own_connections = OwnConnections::default();
        let numbers: Vec<i32> = self.clients.numbers().collect();
        for number in numbers {
            self.stands_from_now(Number(number));
        }
    }

    /// Makes room for so many locks.
    pub(in crate::custody) fn reserve_locks(&mut self, count: usize) {
        self.table.reserve(count);
    }

    /// How many files dead owners left that are still to be freed.
    pub fn left_count(&self) -> usize {
        self.estates.iter().fold(0, |count: usize, estate| {
            count.saturating_add(estate.resources.len())
        })
    }

    /// The file with this descriptor, which a dead owner left. It is mostly the last one of the first of them.
    pub(in crate::custody) fn left_mut(
        &mut self,
        number: Number,
    ) -> Option<&mut Resource<Lease<F::File>>> {
        let left = self.estates.iter_mut();
        left.flat_map(|estate| estate.resources.iter_mut().rev())
            .find(|held| held.lease.descriptor.number() == number)
    }

    /// The number for a new connection.
    pub(in crate::custody) fn take_id(&mut self, service: Service) -> u64 {
        let server = self.servers.of_mut(service);
        let id = server.next_id;
        server.next_id = id.saturating_add(1);
        id
    }

    /// The owner whose life this client stands for: the one that made the connection itself, and whose
    /// process holds something.
    pub fn ends_with(&self, client: &Client<F::Other>) -> Option<OwnerKey> {
        let owner = client.own_owner()?.key();
        self.table.holds(owner.pid).then_some(owner)
    }

    /// Whether an owner is one that the daemon knows: it holds something, or has a connection of its
    /// own.
    pub fn is_known(&self, pid: Pid, uuid: &[u8; 16]) -> bool {
        // Of what was taken over from libvirt's daemon it may not be known which domain holds it.
        let mut holders = self.table.owners_of(pid);
        holders.any(|owner| owner.key().uuid.is_none_or(|known| known == *uuid))
            || self.has_own_connection(pid, uuid)
    }

    /// The connections that processes made for themselves.
    pub fn own_connections(&self) -> &OwnConnections {
        &self.own_connections
    }

    /// The domain of a client that has registered.
    fn domain_of(&self, id: ClientId) -> Option<[u8; 16]> {
        Some(self.client(id)?.owner.as_deref()?.uuid)
    }

    /// Whether an owner has a connection of its own.
    pub fn has_own_connection(&self, pid: Pid, uuid: &[u8; 16]) -> bool {
        match self.own_connections.of(pid) {
            Own::Nothing => false,
            Own::One(id) => self.domain_of(id) == Some(*uuid),
            Own::Many(counts) => counts.contains_key(uuid),
        }
    }

    /// Whether what a process holds is other domains' alone. One that has given back all that was its own
    /// has left in peace, and the others must not die of it.
    pub fn holds_for_others_only(&self, owner: OwnerKey) -> bool {
        let of_process = OwnerKey::of_process(owner.pid);
        self.table.held_by(owner) == 0 && self.table.held_by(of_process) == 0
    }

    /// Whether a process holds anything for a domain without a connection of its own.
    pub fn has_lent(&self, pid: Pid) -> bool {
        let has_none = |owner: &Owner| !self.has_own_connection(pid, &owner.uuid);
        self.table.owners_of(pid).any(has_none)
    }

    /// Whether the process of an owner has connections of its own for other domains.
    pub fn stands_for_others(&self, owner: OwnerKey) -> bool {
        match self.own_connections.of(owner.pid) {
            Own::Nothing => false,
            Own::One(id) => self.domain_of(id) != owner.uuid,
            Own::Many(counts) => counts.keys().any(|other| Some(*other) != owner.uuid),
        }
    }

    /// Takes a file out of what dead owners left. It is mostly the last one of the first of them.
    fn free(&mut self, number: Number) -> Result<Left<F>, String> {
        let is_it = |held: &Resource<Lease<F::File>>| held.lease.descriptor.number() == number;
        let found = self.estates.iter().enumerate().find_map(|(at, estate)| {
            let place = estate.resources.iter().rposition(is_it)?;
            Some((at, place))
        });
        let (at, place) = found.ok_or("it frees a file that no dead owner left")?;
        let estate = self.estates.get_mut(at).ok_or("a place is empty")?;
        let resource = estate.resources.swap_remove(place);
        if estate.resources.is_empty() {
            self.estates.remove(at);
        }
        // Not before: a file that is still locked must not be opened and closed.
        self.forget_process_lock(&resource);
        Ok(Left::Resource(resource))
    }

    fn fence(
        &mut self,
        fence: Fence<Number>,
        source: &mut impl Source<F>,
    ) -> Result<Left<F>, String> {
        if let Some(known) = self.fences.get_mut(&fence.pid)
            && known.process.number() == fence.process
        {
            (known.stage, known.next_step) = (fence.stage, fence.next_step);
            return Ok(Left::Nothing);
        }
        let process = source.other(fence.process)?;
        let fence = Fence {
            pid: fence.pid,
            process,
            stage: fence.stage,
            next_step: fence.next_step,
        };
        let before = self.fences.insert(fence.pid, fence);
        Ok(before.map_or(Left::Nothing, |before| Left::Process(before.process)))
    }

    /// A server's numbers.
    pub fn server(&self, service: Service) -> &Server {
        self.servers.of(service)
    }

    /// The clients of a server that are served, in the order of connecting.
    pub fn served(&self, service: Service) -> impl Iterator<Item = &Client<F::Other>> {
        let served = self.served.of(service).iter();
        served.filter_map(|id| self.client(id))
    }

    /// How many they are.
    pub fn served_count(&self, service: Service) -> usize {
        self.served.of(service).len()
    }

    /// The one of them with this number.
    pub fn served_with(&self, service: Service, number: u64) -> Option<&Client<F::Other>> {
        let number_of = |id| Some(self.client(id)?.arrival.id);
        self.client(self.served.of(service).find(number, number_of)?)
    }

    /// Whether one more client may be served.
    pub fn has_room(&self, service: Service) -> bool {
        let count = self.served_count(service);
        self.server(service).has_room_beside(count)
    }

    /// Whether one more may be served that speaks for an owner that is known.
    pub fn has_room_for_known(&self, service: Service) -> bool {
        let count = self.served_count(service);
        self.server(service).has_room_for_known_beside(count)
    }

    /// The sockets that clients connect to.
    pub fn listeners(&self) -> &[Listening<F::Other>] {
        &self.listeners
    }

    /// A client.
    pub fn client(&self, id: ClientId) -> Option<&Client<F::Other>> {
        self.clients.get(id.0)
    }

    /// All clients.
    pub fn clients(&self) -> impl Iterator<Item = (ClientId, &Client<F::Other>)> {
        let clients = self.clients.iter();
        clients.map(|(number, client)| (ClientId(number), client))
    }

    /// Up to which number of a descriptor there may be clients.
    pub fn client_end(&self) -> usize {
        self.clients.end()
    }

    /// How many clients there are.
    pub fn client_count(&self) -> usize {
        self.clients.len()
    }

    /// Bytes of clients that were on their way when the state was passed on.
    pub fn traffic(&self) -> &BTreeMap<ClientId, Traffic> {
        &self.traffic
    }

    /// The clients that are told of what happens.
    pub fn subscribers(&self) -> &BTreeSet<ClientId> {
        &self.subscribers
    }

    /// The directories of the lockspaces, the default one not among them.
    pub fn lockspaces(&self) -> impl Iterator<Item = &[u8]> + Clone {
        self.lockspaces.iter().map(|directory| &**directory)
    }

    /// Those of them that come behind this one in their order, or all of them.
    pub fn lockspaces_behind(&self, after: Option<&[u8]>) -> impl Iterator<Item = &[u8]> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.lockspaces.range::<[u8], _>((start, Bound::Unbounded));
        behind.map(|directory| &**directory)
    }

    /// Whether there is such a lockspace. The default one, with the empty path, always is.
    pub fn has_lockspace(&self, directory: &[u8]) -> bool {
        directory.is_empty() || self.lockspaces.contains(directory)
    }

    /// What is held.
    pub fn table(&self) -> &Table<Lease<F::File>> {
        &self.table
    }

    /// The files that must not be opened and closed.
    pub fn avoid(&self) -> &[FileIdentity] {
        &self.avoid
    }

    /// What dead owners left and is being freed, in the order in which it is.
    pub fn estates(&self) -> &VecDeque<Estate<F::File>> {
        &self.estates
    }

    /// The owners that are being fenced.
    pub fn fences(&self) -> &HashMap<Pid, Fence<F::Other>> {
        &self.fences
    }

    /// The owners without a connection of their own.
    pub fn watched(&self) -> &HashMap<Pid, Watched<F::Other>> {
        &self.watched
    }

    /// The process of an owner that is watched or being fenced, to be known again.
    pub fn lives(&self) -> &HashMap<Pid, Life> {
        &self.lives
    }

    /// Where the numbers of processes mean what they do; `None` if nobody has said so.
    pub fn here(&self) -> Option<Here> {
        self.here
    }

    /// Whether an owner holds something that is to be fenced and whose process cannot be reached.
    pub fn has_unreachable(&self) -> bool {
        self.unreachable.iter().any(|pid| self.table.holds(*pid))
    }

    /// Whether an owner that is to be fenced could not be reached.
    pub fn is_unreachable(&self, pid: Pid) -> bool {
        self.unreachable.contains(&pid)
    }

    /// The process's own things.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The poll of the image before, if it watches every client by its descriptor.
    pub fn poll(&self) -> Option<Number> {
        self.poll
    }

    /// The numbers of all descriptors that belong to the state. There is no other list of them.
    pub fn descriptors(&self) -> impl Iterator<Item = Number> {
        let sockets = self.listeners.iter().map(|it| it.socket.number());
        let clients = self.clients.numbers().map(Number);
        let held = self.table.iter().map(|(_, resource)| resource);
        let left = self.estates.iter().flat_map(|estate| &estate.resources);
        let files = held.chain(left).flat_map(|resource| {
            let Lease {
                descriptor, kind, ..
            } = &resource.lease;
            std::iter::once(descriptor)
                .chain(kind.parked())
                .map(Descriptor::number)
        });
        let fences = self.fences.values().map(|fence| fence.process.number());
        let watched = self.watched.values().filter_map(|it| it.process.as_ref());
        let watched = watched.map(Descriptor::number);
        let pid_file = self.settings.pid_file.iter();
        let pid_file = pid_file.map(|(number, _)| Number(*number));
        sockets
            .chain(clients)
            .chain(files)
            .chain(fences)
            .chain(watched)
            .chain(pid_file)
            .chain(self.poll)
            .chain(self.old_poll)
    }

    /// What a descriptor is of, for a message.
    pub fn meaning(&self, number: Number) -> String {
        if let Some(client) = self.clients.get(number.0) {
            let Arrival { id, server, .. } = client.arrival;
            return format!("client {id} of the {} server", server.name());
        }
        let is_its = |resource: &&Resource<Lease<F::File>>| {
            let Lease {
                descriptor, kind, ..
            } = &resource.lease;
            descriptor.number() == number || kind.parked().iter().any(|it| it.number() == number)
        };
        let mut held = self.table.iter().map(|(_, resource)| resource);
        if let Some(resource) = held.find(is_its) {
            return format!("the file of resource '{}'", Printable(resource.name()));
        }
        if self.listeners.iter().any(|it| it.socket.number() == number) {
            "a listening socket".into()
        } else {
            "one of the daemon's own".into()
        }
    }
}

fn process_of<F: Form>(watched: Option<Watched<F::Other>>) -> Left<F> {
    let process = watched.and_then(|watched| watched.process);
    process.map_or(Left::Nothing, Left::Process)
}

fn no_client(number: Number) -> String {
    format!("it speaks of a client {} that never connected", number.0)
}

impl State<Saved> {
    /// What these events say.
    ///
    /// # Errors
    /// A sentence about one that does not fit.
    pub fn of_events<'a>(events: impl IntoIterator<Item = Event<'a>>) -> Result<Self, String> {
        State::default().with(events)
    }

    /// The same, and what these events say.
    ///
    /// # Errors
    /// A sentence about one that does not fit.
    pub fn with<'a>(mut self, events: impl IntoIterator<Item = Event<'a>>) -> Result<Self, String> {
        let mut numbers = Numbers::default();
        for event in events {
            self.apply(event, &mut numbers)?;
        }
        Ok(self)
    }

    /// Makes room for what a ledger of this length, bytes, may say.
    pub(in crate::custody) fn reserve(&mut self, length: usize) {
        /// The fewest bytes that the events of a client, or of a resource, usually take.
        const BYTES_EACH: usize = 100;
        let count = length / BYTES_EACH;
        self.clients.reserve(count / 2);
        self.table.reserve(count);
    }

    /// The program that wrote a ledger before format 3 gave all that a process holds to the domain that
    /// it had registered last. Where a process stood for several, nobody knows which of them holds what.
    pub(in crate::custody) fn forget_mixed_domains(&mut self) {
        let mut domains: HashMap<Pid, [u8; 16]> = HashMap::default();
        let mut mixed: BTreeSet<Pid> = BTreeSet::new();
        let clients = self.clients.iter();
        let clients = clients.filter_map(|(_, client)| client.owner.as_deref());
        for owner in clients.chain(self.table.owners()) {
            if *domains.entry(owner.pid).or_insert(owner.uuid) != owner.uuid {
                mixed.insert(owner.pid);
            }
        }
        for pid in mixed {
            self.table.forget_domains(pid);
        }
    }

    /// There is no poll to be gone on with: another program has, or it is over.
    pub fn forget_poll(&mut self) {
        (self.poll, self.old_poll) = (None, None);
    }

    /// Whether a descriptor is of a socket, listening or a client's.
    pub fn has_socket(&self, number: Number) -> bool {
        let mut listeners = self.listeners.iter().map(|listening| listening.socket);
        listeners.any(|it| it == number) || self.clients.contains(number.0)
    }

    /// A socket has another number now.
    pub fn renumber_socket(&mut self, before: Number, now: Number) {
        for listening in &mut self.listeners {
            if listening.socket == before {
                listening.socket = now;
            }
        }
        self.set_served(before, false);
        if let Some(mut client) = self.clients.remove(before.0) {
            client.socket = now;
            let is_served = !client.arrival.refused;
            // The kernel has just given this number: it is nobody else's.
            let _ = self.clients.insert(now.0, client);
            if self.subscribers.remove(&ClientId(before.0)) {
                self.subscribers.insert(ClientId(now.0));
            }
            if is_served {
                self.set_served(now, true);
            }
        }
    }

    /// Whether every descriptor is one and belongs to one thing only: a state that says otherwise is
    /// damaged, and acting on it would close the wrong files.
    ///
    /// # Errors
    /// A sentence that says which one.
    pub fn check_descriptors(&self) -> Result<(), String> {
        let mut numbers: Vec<Number> = self.descriptors().collect();
        numbers.sort_unstable();
        if let Some(Number(number)) = numbers.iter().find(|number| number.0 < 0) {
            return Err(format!("the state is damaged: it uses descriptor {number}"));
        }
        let twice = numbers
            .iter()
            .zip(numbers.iter().skip(1))
            .find(|(one, next)| one == next);
        match twice {
            Some((Number(number), _)) => Err(format!(
                "the state is damaged: it uses descriptor {number} twice"
            )),
            None => Ok(()),
        }
    }
}
