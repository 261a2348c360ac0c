//! A state as plain values that can be made up, changed and compared. What it makes of a state it asks
//! of the state's getters, and what events it makes are its own: so it says whether what the program
//! writes and reads is what there was.

use std::collections::{BTreeMap, BTreeSet};
use virtlockd::custody::clients::{Arrival, Client, ClientId, Standing, Traffic};
use virtlockd::custody::descriptor::{Descriptor, Number, Saved};
use virtlockd::custody::event::{Event, Here, KindRecord, OwnerRecord, ResourceName};
use virtlockd::custody::fences::{Fence, Watched};
use virtlockd::custody::servers::{Listening, Server, Service};
use virtlockd::custody::settings::Settings;
use virtlockd::custody::state::State;
use virtlockd::host::file::FileIdentity;
use virtlockd::host::process::Life;
use virtlockd::locks::lease::Lease;
use virtlockd::locks::table::{Mode, Owner, Pid, Resource};

/// A client.
#[derive(Clone, Debug, PartialEq)]
pub struct PlainClient {
    pub descriptor: i32,
    pub arrival: Arrival,
    pub standing: Standing,
    pub has_called: bool,
    pub restricted: bool,
    pub owner: Option<Owner>,
    pub registered_at: u64,
    pub wanted: u32,
    pub life: Option<Life>,
    pub traffic: Traffic,
}

/// A resource that is held, or was by a dead owner: then it has no holders.
#[derive(Clone, Debug, PartialEq)]
pub struct PlainResource {
    pub lockspace: Vec<u8>,
    pub name: Vec<u8>,
    pub descriptor: i32,
    pub identity: FileIdentity,
    pub mode: Mode,
    pub autocreate: bool,
    pub created: bool,
    pub kind: KindRecord,
    pub since: u64,
    pub parked: Vec<i32>,
    pub holders: Vec<(Owner, u32)>,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plain {
    pub lock_server: Server,
    pub admin_server: Server,
    pub listeners: Vec<Listening<Number>>,
    pub clients: Vec<PlainClient>,
    pub lockspaces: Vec<Vec<u8>>,
    pub resources: Vec<PlainResource>,
    pub estates: Vec<(Pid, Vec<PlainResource>)>,
    pub fences: Vec<Fence<Number>>,
    pub watched: Vec<Watched<Number>>,
    pub lives: Vec<(Pid, Life)>,
    pub here: Option<Here>,
    pub unreachable: Vec<Pid>,
    pub settings: Settings,
    pub poll: Option<Number>,
}

impl PlainClient {
    fn of(client: &Client<Number>, traffic: Option<&Traffic>) -> PlainClient {
        PlainClient {
            descriptor: client.socket.0,
            arrival: client.arrival,
            standing: client.standing,
            has_called: client.has_called,
            restricted: client.restricted,
            owner: client.owner.as_deref().cloned(),
            registered_at: client.registered_at,
            wanted: client.wanted,
            life: client.life,
            traffic: traffic.cloned().unwrap_or_default(),
        }
    }

    fn events(&self) -> Vec<Event<'_>> {
        let number = Number(self.descriptor);
        let mut events = vec![Event::Connected(number, self.arrival)];
        if self.has_called {
            events.push(Event::Called(number));
        }
        if let Some(owner) = &self.owner {
            events.push(Event::Registered(number, owner.into()));
        }
        if self.registered_at != 0 {
            events.push(Event::RegisteredAt(number, self.registered_at));
        }
        if self.wanted != 0 {
            events.push(Event::Subscribed(number, self.wanted));
        }
        if let Some(life) = self.life {
            events.push(Event::ClientIs(number, life));
        }
        if self.restricted {
            events.push(Event::Restricted(number));
        }
        if self.traffic != Traffic::default() {
            events.push(Event::Traffic(number, Box::new(self.traffic.clone())));
        }
        if self.standing == Standing::Over {
            events.push(Event::Leaving(number));
        }
        events
    }
}

impl PlainResource {
    fn of(resource: &Resource<Lease<Number>>, holders: Vec<(Owner, u32)>) -> PlainResource {
        let Lease {
            descriptor,
            kind,
            created,
        } = &resource.lease;
        PlainResource {
            lockspace: resource.lockspace().to_vec(),
            name: resource.name().to_vec(),
            descriptor: descriptor.0,
            identity: resource.identity,
            mode: resource.mode,
            autocreate: resource.autocreate,
            created: *created,
            kind: kind.into(),
            since: resource.since,
            parked: kind.parked().iter().map(|it| it.number().0).collect(),
            holders,
        }
    }

    fn resource(&self) -> ResourceName<'_> {
        ResourceName {
            lockspace: &self.lockspace,
            name: &self.name,
        }
    }

    fn granted<'a>(&'a self, owner: OwnerRecord<'a>) -> Vec<Event<'a>> {
        let resource = self.resource();
        let granted = Event::Granted {
            owner,
            resource,
            descriptor: Number(self.descriptor),
            identity: self.identity,
            mode: self.mode,
            autocreate: self.autocreate,
            created: self.created,
            kind: self.kind,
            since: self.since,
        };
        let parked = self.parked.iter();
        let parked = parked.map(|number| Event::Parked(resource, Number(*number)));
        std::iter::once(granted).chain(parked).collect()
    }

    fn events(&self) -> Vec<Event<'_>> {
        let mut events = self.granted((&self.holders[0].0).into());
        for (place, (owner, times)) in (0..).zip(&self.holders) {
            let already = u32::from(place == 0);
            let joined = || Event::Joined(owner.into(), self.resource());
            events.extend((already..*times).map(|_| joined()));
        }
        events
    }
}

impl Plain {
    /// What a state says.
    pub fn of(state: &State<Saved>) -> Plain {
        let traffic = state.traffic();
        let clients = state.clients();
        let clients = clients.map(|(id, client)| PlainClient::of(client, traffic.get(&id)));
        let held = state.table().iter().map(|(_, resource)| {
            let owner = |key| state.table().owner(key).expect("a holder").clone();
            let holders = resource.holders().map(|(key, times)| (owner(key), times));
            PlainResource::of(resource, holders.collect())
        });
        let estates = state.estates().iter().map(|estate| {
            let left = estate.resources.iter();
            let left = left.map(|resource| PlainResource::of(resource, vec![]));
            (estate.pid, left.collect())
        });
        let unreachable = state.entries().filter_map(|event| match event {
            Event::Unreachable(pid) => Some(pid),
            _ => None,
        });
        let plain = Plain {
            lock_server: *state.server(Service::Lock),
            admin_server: *state.server(Service::Admin),
            listeners: state.listeners().to_vec(),
            clients: clients.collect(),
            lockspaces: state.lockspaces().map(<[u8]>::to_vec).collect(),
            resources: held.collect(),
            estates: estates.collect(),
            fences: state.fences().values().copied().collect(),
            watched: state.watched().values().copied().collect(),
            lives: state
                .lives()
                .iter()
                .map(|(pid, life)| (*pid, *life))
                .collect(),
            here: state.here(),
            unreachable: unreachable.collect(),
            settings: state.settings().clone(),
            poll: state.poll(),
        };
        plain.check(state);
        plain
    }

    /// What a state knows twice is the same.
    fn check(&self, state: &State<Saved>) {
        for pid in &self.unreachable {
            assert!(state.is_unreachable(*pid));
        }
        let served = |service| {
            let clients = self.clients.iter();
            let served = clients.filter(|it| it.arrival.server == service && !it.arrival.refused);
            let served = served.map(|it| (it.arrival.id, ClientId(it.descriptor)));
            served.collect::<BTreeMap<_, _>>()
        };
        for service in Service::ALL {
            let now = state.served(service);
            let now: Vec<(u64, ClientId)> = now.map(|it| (it.arrival.id, it.id())).collect();
            let served: Vec<(u64, ClientId)> = served(service).into_iter().collect();
            assert_eq!(now, served, "{service:?}");
            assert_eq!(state.served_count(service), now.len(), "{service:?}");
        }
        let told = self.clients.iter().filter(|it| it.wanted != 0);
        let told: BTreeSet<ClientId> = told.map(|it| ClientId(it.descriptor)).collect();
        assert_eq!(state.subscribers(), &told);
        let mut own: Vec<(Pid, [u8; 16])> = Vec::new();
        for client in self
            .clients
            .iter()
            .filter(|it| it.standing != Standing::Over)
        {
            let owner = client.owner.as_ref();
            let peer = client.arrival.peer.map(|peer| peer.pid);
            if let Some(owner) = owner.filter(|it| it.pid > 0 && Some(it.pid) == peer) {
                own.push((owner.pid, owner.uuid));
            }
        }
        for (pid, uuid) in own {
            assert!(state.has_own_connection(pid, &uuid), "{pid}");
        }
        let left = self.estates.iter().flat_map(|(_, left)| left);
        let avoided = self.resources.iter().chain(left);
        let avoided = avoided.filter(|it| it.kind == KindRecord::Process);
        let mut avoided: Vec<_> = avoided
            .map(|it| (it.identity.device, it.identity.inode))
            .collect();
        let avoid = state.avoid().iter();
        let mut avoid: Vec<_> = avoid.map(|it| (it.device, it.inode)).collect();
        avoided.sort_unstable();
        avoid.sort_unstable();
        assert_eq!(avoid, avoided);
        let left: usize = self.estates.iter().map(|(_, left)| left.len()).sum();
        assert_eq!(state.left_count(), left);
    }

    /// Events that say it.
    pub fn events(&self) -> Vec<Event<'_>> {
        let mut events: Vec<Event<'_>> = self.here.map(Event::Here).into_iter().collect();
        events.push(Event::Process(Box::new(self.settings.clone())));
        events.extend(self.listeners.iter().cloned().map(Event::Listening));
        events.extend(self.clients.iter().flat_map(PlainClient::events));
        let directories = self.lockspaces.iter();
        events.extend(directories.map(|directory| Event::Lockspace(directory)));
        for (pid, left) in &self.estates {
            let owner = OwnerRecord {
                pid: *pid,
                id: 5,
                name: b"dead",
                uuid: [5; 16],
            };
            events.extend(left.iter().flat_map(|resource| resource.granted(owner)));
            events.push(Event::Died(*pid));
        }
        events.extend(self.resources.iter().flat_map(PlainResource::events));
        events.extend(self.fences.iter().copied().map(Event::Fencing));
        events.extend(self.watched.iter().copied().map(Event::Watched));
        let lives = self.lives.iter();
        events.extend(lives.map(|(pid, life)| Event::OwnerIs(*pid, *life)));
        events.extend(self.unreachable.iter().copied().map(Event::Unreachable));
        // Behind the clients, whose numbers raise the next one.
        events.push(Event::Server(Service::Lock, self.lock_server));
        events.push(Event::Server(Service::Admin, self.admin_server));
        events.extend(self.poll.map(Event::Poll));
        events
    }

    /// The state that it says.
    pub fn state(&self) -> State<Saved> {
        State::of_events(self.events()).expect("events that fit")
    }

    /// The order of what has none.
    #[must_use]
    pub fn sorted(mut self) -> Plain {
        self.clients
            .sort_by_key(|client| (client.arrival.server, client.arrival.id, client.descriptor));
        self.resources.sort_by(|one, other| {
            (&one.lockspace, &one.name).cmp(&(&other.lockspace, &other.name))
        });
        for resource in &mut self.resources {
            resource.holders.sort_by_key(|(owner, _)| owner.key());
        }
        for (_, left) in &mut self.estates {
            left.sort_by_key(|resource| resource.descriptor);
        }
        self.fences.sort_by_key(|fence| fence.pid);
        self.watched.sort_by_key(|watched| watched.pid);
        self.lives.sort_unstable();
        self.unreachable.sort_unstable();
        self.lockspaces.sort();
        self.lockspaces.dedup();
        self
    }
}
