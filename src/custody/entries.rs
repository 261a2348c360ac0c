//! A state as the fewest events that say it: what a ledger is written anew with, and what an earlier program
//! is given. Whoever applies them to an empty state has this one.

use super::clients::Client;
use super::descriptor::{Descriptor, Form, Number};
use super::event::{Event, OwnerRecord, ResourceName};
use super::servers::Service;
use super::state::{Estate, State};
use crate::locks::lease::Lease;
use crate::locks::table::{Resource, Table};

impl<F: Form> State<F> {
    /// The fewest events that say all this.
    pub fn entries(&self) -> impl Iterator<Item = Event<'_>> + Clone {
        self.entries_of(true)
    }

    /// The same, but for what dead owners left.
    pub fn entries_of_the_living(&self) -> impl Iterator<Item = Event<'_>> + Clone {
        self.entries_of(false)
    }

    fn entries_of(&self, has_estates: bool) -> impl Iterator<Item = Event<'_>> + Clone {
        let here = self.here.map(Event::Here).into_iter();
        let settings = std::iter::once_with(|| Event::Process(Box::new(self.settings.clone())));
        let listeners = self.listeners.iter();
        let listeners = listeners.map(|it| Event::Listening(it.by_number()));
        let clients = self.clients.numbers().filter_map(|it| self.clients.get(it));
        let traffic = self
            .traffic
            .iter()
            .map(|(id, traffic)| Event::Traffic(Number(id.0), Box::new(traffic.clone())));
        let estates = self.estates.iter().filter(move |_| has_estates);
        let estates = estates.flat_map(estate_entries);
        let held = self.table.iter();
        let held = held.flat_map(|(_, it)| resource_entries(&self.table, it));
        let fences = self.fences.values();
        let fences = fences.map(|fence| Event::Fencing(fence.by_number()));
        let watched = self.watched.values();
        let watched = watched.map(|watched| Event::Watched(watched.by_number()));
        let lives = self.lives.iter();
        let lives = lives.map(|(pid, life)| Event::OwnerIs(*pid, *life));
        let unreachable = self.unreachable.iter().copied().map(Event::Unreachable);
        // Behind the clients, whose numbers would otherwise raise the next one.
        let servers = Service::ALL.into_iter();
        let servers = servers.map(|it| Event::Server(it, *self.servers.of(it)));
        here.chain(settings)
            .chain(listeners)
            .chain(clients.flat_map(client_entries))
            .chain(traffic)
            .chain(self.lockspaces().map(Event::Lockspace))
            // In front of what others may hold by the same names.
            .chain(estates)
            .chain(held)
            .chain(fences)
            .chain(watched)
            .chain(lives)
            .chain(unreachable)
            .chain(servers)
            .chain(self.poll.map(Event::Poll))
    }
}

fn client_entries<D: Descriptor>(client: &Client<D>) -> impl Iterator<Item = Event<'_>> + Clone {
    let number = client.socket.number();
    let owner = client.owner.as_deref();
    let registered_at = client.registered_at;
    let registered_at = (registered_at != 0).then_some(Event::RegisteredAt(number, registered_at));
    let wanted = client.wanted;
    let wanted = (wanted != 0).then_some(Event::Subscribed(number, wanted));
    // Also when it is over, one that was refused is not among those that are served.
    std::iter::once(Event::Connected(number, client.arrival))
        .chain(client.has_called.then_some(Event::Called(number)))
        .chain(owner.map(|owner| Event::Registered(number, owner.into())))
        .chain(client.life.map(|life| Event::ClientIs(number, life)))
        .chain(registered_at)
        .chain(wanted)
        .chain(client.restricted.then_some(Event::Restricted(number)))
        .chain(client.is_over().then_some(Event::Leaving(number)))
}

fn name_of<D>(resource: &Resource<Lease<D>>) -> ResourceName<'_> {
    ResourceName {
        lockspace: resource.lockspace(),
        name: resource.name(),
    }
}

fn granted_to<'a, D: Descriptor>(
    owner: OwnerRecord<'a>,
    resource: &'a Resource<Lease<D>>,
) -> impl Iterator<Item = Event<'a>> + Clone {
    let name = name_of(resource);
    let granted = Event::Granted {
        owner,
        resource: name,
        descriptor: resource.lease.descriptor.number(),
        identity: resource.identity,
        mode: resource.mode,
        autocreate: resource.autocreate,
        created: resource.lease.created,
        kind: (&resource.lease.kind).into(),
        since: resource.since,
    };
    let parked = resource.lease.kind.parked().iter();
    std::iter::once(granted).chain(parked.map(move |it| Event::Parked(name, it.number())))
}

fn resource_entries<'a, D: Descriptor>(
    table: &'a Table<Lease<D>>,
    resource: &'a Resource<Lease<D>>,
) -> impl Iterator<Item = Event<'a>> + Clone {
    let name = name_of(resource);
    let owner = move |key| table.owner(key).map(OwnerRecord::from);
    let mut holders = resource
        .holders()
        .filter_map(move |(key, times)| Some((owner(key)?, times)));
    let first = holders.next();
    let again = first.map(|(owner, times)| (owner, times.saturating_sub(1)));
    let joined = again
        .into_iter()
        .chain(holders)
        .flat_map(move |(owner, times)| (0..times).map(move |_| Event::Joined(owner, name)));
    first
        .into_iter()
        .flat_map(|(owner, _)| granted_to(owner, resource))
        .chain(joined)
}

/// As something that the dead process held and left.
fn estate_entries<D: Descriptor>(estate: &Estate<D>) -> impl Iterator<Item = Event<'_>> + Clone {
    let owner = OwnerRecord {
        pid: estate.pid,
        id: 0,
        name: b"",
        uuid: [0; 16],
    };
    let granted = estate.resources.iter();
    granted
        .flat_map(move |resource| granted_to(owner, resource))
        .chain([Event::Died(estate.pid)])
}
