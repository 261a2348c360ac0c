//! What libvirt's daemon wrote before it executed this program, as a state. What it leaves out or may write
//! in more than one way is settled here; what it cannot have meant is an error.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::fmt;

use foldhash::HashMap;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::custody::clients::Arrival;
use crate::custody::descriptor::{Number, Saved};
use crate::custody::event::{Event, KindRecord, ResourceName};
use crate::custody::servers::{Listening, Server, Service};
use crate::custody::state::State;
use crate::host::file::FileIdentity;
use crate::locks::table::{Mode, Owner, Pid};

/// Why a document is no state to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It was written by another process.
    Foreign(String),
    /// It is damaged or not such a document.
    Damaged(String),
}

/// Bytes of a JSON string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Text(Vec<u8>);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Text;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Text, E> {
                Ok(Text(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// A number that the C daemon keeps in a pid_t and may write with or without its sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PidNumber(Pid);

impl<'de> Deserialize<'de> for PidNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PidNumber, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        let bits = match (number.as_i64(), number.as_u64()) {
            (Some(signed), _) => signed,
            (None, Some(unsigned)) => unsigned.cast_signed(),
            (None, None) => return Err(serde::de::Error::custom("a process id is no integer")),
        };
        // The lower half is the pid_t, whichever way it was widened.
        Ok(PidNumber((bits & 0xffff_ffff) as u32 as i32))
    }
}

#[derive(Deserialize)]
struct DocumentIn {
    magic: Option<Text>,
    daemon: Option<ServerIn>,
    server: Option<ServerIn>,
    #[serde(rename = "defaultLockspace")]
    default_lockspace: LockspaceIn,
    lockspaces: Vec<LockspaceIn>,
}

/// A server; or, at the top, a daemon that has servers. The oldest documents have one server where
/// later ones have the daemon, so this is both.
#[derive(Deserialize)]
struct ServerIn {
    servers: Option<ServersIn>,
    min_workers: Option<u32>,
    max_workers: Option<u32>,
    priority_workers: Option<u32>,
    max_clients: Option<u32>,
    max_anonymous_clients: Option<u32>,
    next_client_id: Option<u64>,
    services: Option<Vec<ServiceIn>>,
    clients: Option<Vec<ClientIn>>,
}

/// By name; an array with one element is the lock server alone.
struct ServersIn(Vec<(String, ServerIn)>);

impl<'de> Deserialize<'de> for ServersIn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ServersIn, D::Error> {
        struct Servers;
        impl<'de> Visitor<'de> for Servers {
            type Value = ServersIn;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("servers by name, or a list of one")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ServersIn, A::Error> {
                let mut servers = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    servers.push(entry);
                }
                Ok(ServersIn(servers))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<ServersIn, A::Error> {
                let mut servers = Vec::new();
                while let Some(server) = list.next_element()? {
                    servers.push((Service::Lock.name().to_owned(), server));
                }
                if servers.len() > 1 {
                    return Err(serde::de::Error::custom("a list of several servers"));
                }
                Ok(ServersIn(servers))
            }
        }
        deserializer.deserialize_any(Servers)
    }
}

#[derive(Deserialize)]
struct ServiceIn {
    socks: Vec<SockIn>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SockIn {
    fd: i32,
    is_client: bool,
    #[serde(rename = "unlinkUNIX")]
    unlink_unix: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClientIn {
    id: Option<u64>,
    #[serde(rename = "conn_time")]
    conn_time: Option<i64>,
    sock: SockIn,
    private_data: Option<PrivateIn>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PrivateIn {
    restricted: Option<bool>,
    owner_pid: Option<PidNumber>,
    owner_id: Option<u32>,
    owner_name: Option<Text>,
    #[serde(rename = "ownerUUID")]
    owner_uuid: Option<Text>,
}

#[derive(Deserialize)]
struct LockspaceIn {
    directory: Option<Text>,
    resources: Vec<ResourceIn>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ResourceIn {
    name: Text,
    #[serde(rename = "path")]
    _path: Text,
    fd: i32,
    #[serde(rename = "lockHeld")]
    _lock_held: bool,
    flags: u32,
    owners: Vec<PidNumber>,
}

pub(super) const FLAG_SHARED: u32 = 1;
pub(super) const FLAG_AUTOCREATE: u32 = 2;

/// Reads a document. `own_pid` is what its magic must say; `socket_path` tells where a listening
/// socket is that the daemon removes at its end.
pub fn read(
    document: &[u8],
    own_pid: u32,
    socket_path: impl Fn(Service) -> Vec<u8>,
) -> Result<State<Saved>, Unusable> {
    let damaged = |what: String| Unusable::Damaged(what);
    let document: DocumentIn =
        serde_json::from_slice(document).map_err(|error| damaged(error.to_string()))?;
    let magic = document
        .magic
        .ok_or_else(|| damaged("it has no magic".into()))?;
    if magic.0 != own_pid.to_string().as_bytes() {
        return Err(Unusable::Foreign(
            String::from_utf8_lossy(&magic.0).into_owned(),
        ));
    }
    let daemon = document
        .daemon
        .or(document.server)
        .ok_or_else(|| damaged("it has no daemon".into()))?;
    let mut read = Read::default();
    let servers = match daemon.servers {
        Some(ServersIn(servers)) => servers,
        None => vec![(Service::Lock.name().to_owned(), daemon)],
    };
    for (name, server) in servers {
        let service = Service::ALL
            .into_iter()
            .find(|service| service.name() == name)
            .ok_or_else(|| damaged(format!("it has an unknown server '{name}'")))?;
        read_server(&mut read, service, server, &socket_path).map_err(damaged)?;
    }
    let owners = owners_by_pid(&read.clients);
    read_lockspace(&mut read, &owners, document.default_lockspace);
    for lockspace in document.lockspaces {
        if lockspace.directory.is_none() {
            return Err(damaged("a lockspace has no directory".into()));
        }
        read_lockspace(&mut read, &owners, lockspace);
    }
    State::of_events(read.events()).map_err(damaged)
}

/// What was read, before it is a state.
#[derive(Default)]
struct Read {
    servers: Vec<(Service, Server)>,
    listeners: Vec<Listening<Number>>,
    clients: Vec<ReadClient>,
    lockspaces: Vec<Vec<u8>>,
    resources: Vec<ReadResource>,
}

struct ReadClient {
    descriptor: Number,
    arrival: Arrival,
    owner: Option<Owner>,
    restricted: bool,
}

struct ReadResource {
    lockspace: Vec<u8>,
    name: Vec<u8>,
    descriptor: Number,
    mode: Mode,
    autocreate: bool,
    holders: Vec<(Owner, u32)>,
}

impl Read {
    fn events(&self) -> impl Iterator<Item = Event<'_>> {
        let listeners = self.listeners.iter().cloned().map(Event::Listening);
        let lockspaces = self.lockspaces.iter();
        let lockspaces = lockspaces.map(|directory| Event::Lockspace(directory));
        let servers = self.servers.iter();
        let servers = servers.map(|(service, server)| Event::Server(*service, *server));
        listeners
            .chain(self.clients.iter().flat_map(ReadClient::events))
            .chain(lockspaces)
            .chain(self.resources.iter().flat_map(ReadResource::events))
            // Behind the clients, whose numbers would otherwise raise the next one.
            .chain(servers)
    }
}

impl ReadClient {
    fn events(&self) -> impl Iterator<Item = Event<'_>> {
        let number = self.descriptor;
        let owner = self.owner.as_ref();
        std::iter::once(Event::Connected(number, self.arrival))
            .chain(owner.map(|owner| Event::Registered(number, owner.into())))
            .chain(self.restricted.then_some(Event::Restricted(number)))
    }
}

impl ReadResource {
    fn events(&self) -> impl Iterator<Item = Event<'_>> {
        let resource = ResourceName {
            lockspace: &self.lockspace,
            name: &self.name,
        };
        let first = self.holders.first();
        let granted = first.map(|(owner, _)| Event::Granted {
            owner: owner.into(),
            resource,
            descriptor: self.descriptor,
            // The document says neither: the kernel must be asked.
            identity: FileIdentity {
                device: 0,
                inode: 0,
            },
            mode: self.mode,
            autocreate: self.autocreate,
            // Nobody knows: so a file of the default lockspace is never removed.
            created: false,
            kind: KindRecord::Unknown,
            since: 0,
        });
        let again = self.holders.iter().enumerate();
        let joined = again.flat_map(move |(place, (owner, times))| {
            let from = u32::from(place == 0);
            (from..*times).map(move |_| Event::Joined(owner.into(), resource))
        });
        granted.into_iter().chain(joined)
    }
}

/// Whether a document was written by the process with this number, whatever else is in it.
pub fn is_of(document: &[u8], own_pid: u32) -> bool {
    #[derive(Deserialize)]
    struct Magic {
        magic: Option<Text>,
    }
    serde_json::from_slice(document).is_ok_and(|document: Magic| {
        document
            .magic
            .is_some_and(|magic| magic.0 == own_pid.to_string().as_bytes())
    })
}

fn missing(key: &str) -> String {
    format!("'{key}' is missing")
}

fn read_server(
    read: &mut Read,
    service: Service,
    server: ServerIn,
    socket_path: impl Fn(Service) -> Vec<u8>,
) -> Result<(), String> {
    let limit = server.max_clients.ok_or_else(|| missing("max_clients"))?;
    let workers = [
        server.min_workers.ok_or_else(|| missing("min_workers"))?,
        server.max_workers.ok_or_else(|| missing("max_workers"))?,
        server
            .priority_workers
            .ok_or_else(|| missing("priority_workers"))?,
    ];
    let unauthenticated_limit = server.max_anonymous_clients.unwrap_or(limit);
    if unauthenticated_limit > limit {
        return Err("'max_anonymous_clients' is above 'max_clients'".into());
    }
    let mut next_id = server.next_client_id.unwrap_or(1);
    for socket in server
        .services
        .ok_or_else(|| missing("services"))?
        .iter()
        .flat_map(|one| &one.socks)
    {
        let path = socket
            .unlink_unix
            .unwrap_or(!socket.is_client)
            .then(|| socket_path(service));
        read.listeners.push(Listening {
            server: service,
            socket: Number(socket.fd),
            path,
        });
    }
    for client in server.clients.ok_or_else(|| missing("clients"))? {
        let id = client.id.unwrap_or(next_id);
        next_id = next_id.max(id.saturating_add(1));
        read.clients.push(read_client(service, id, client)?);
    }
    let server = Server {
        limit,
        unauthenticated_limit,
        configured: None,
        next_id,
        workers,
    };
    read.servers.push((service, server));
    Ok(())
}

fn read_client(service: Service, id: u64, client: ClientIn) -> Result<ReadClient, String> {
    let mut owner = None;
    let mut restricted = false;
    if service == Service::Lock {
        let data = client.private_data.ok_or_else(|| missing("privateData"))?;
        restricted = data.restricted.ok_or_else(|| missing("restricted"))?;
        let registered = Owner {
            pid: data.owner_pid.ok_or_else(|| missing("ownerPid"))?.0,
            id: data.owner_id.ok_or_else(|| missing("ownerId"))?,
            name: data
                .owner_name
                .ok_or_else(|| missing("ownerName"))?
                .0
                .into(),
            uuid: read_uuid(&data.owner_uuid.ok_or_else(|| missing("ownerUUID"))?.0)?,
        };
        // An owner without an id has not been registered.
        if registered.id != 0 {
            owner = Some(registered);
        }
    }
    Ok(ReadClient {
        descriptor: Number(client.sock.fd),
        arrival: Arrival {
            server: service,
            id,
            peer: None,
            start_time: None,
            connected_at: client.conn_time.unwrap_or(0),
            refused: false,
        },
        owner,
        restricted,
    })
}

fn read_uuid(text: &[u8]) -> Result<[u8; 16], String> {
    let damaged = || format!("'{}' is no uuid", String::from_utf8_lossy(text));
    let digits: String = text
        .iter()
        .filter(|byte| !matches!(byte, b'-' | b' '))
        .map(|byte| char::from(*byte))
        .collect();
    if digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(damaged());
    }
    let number = u128::from_str_radix(&digits, 16).map_err(|_| damaged())?;
    Ok(number.to_be_bytes())
}

/// The document names owners of locks by their process only; which domain that is, is known from the
/// connections. Where those of one process are of several domains, nobody can tell which of them holds
/// what.
fn owners_by_pid(clients: &[ReadClient]) -> HashMap<Pid, Owner> {
    let mut owners: HashMap<Pid, Owner> = HashMap::default();
    for owner in clients.iter().filter_map(|it| it.owner.as_ref()) {
        match owners.entry(owner.pid) {
            Entry::Vacant(vacant) => _ = vacant.insert(owner.clone()),
            Entry::Occupied(mut known) if known.get().key() == owner.key() => {
                known.insert(owner.clone());
            }
            Entry::Occupied(mut known) => _ = known.insert(Owner::unknown(owner.pid)),
        }
    }
    owners
}

fn read_lockspace(read: &mut Read, owners: &HashMap<Pid, Owner>, lockspace: LockspaceIn) {
    let directory = lockspace.directory.unwrap_or_default().0;
    if !directory.is_empty() {
        read.lockspaces.push(directory.clone());
    }
    for resource in lockspace.resources {
        let mut times: BTreeMap<Pid, u32> = BTreeMap::new();
        for PidNumber(pid) in resource.owners {
            let count = times.entry(pid).or_insert(0);
            *count = count.saturating_add(1);
        }
        let holders = times
            .into_iter()
            .map(|(pid, times)| {
                let owner = owners.get(&pid).cloned();
                (owner.unwrap_or_else(|| Owner::unknown(pid)), times)
            })
            .collect();
        let is_shared = resource.flags & FLAG_SHARED != 0;
        read.resources.push(ReadResource {
            lockspace: directory.clone(),
            name: resource.name.0,
            descriptor: Number(resource.fd),
            mode: if is_shared {
                Mode::Shared
            } else {
                Mode::Exclusive
            },
            autocreate: resource.flags & FLAG_AUTOCREATE != 0,
            holders,
        });
    }
}
