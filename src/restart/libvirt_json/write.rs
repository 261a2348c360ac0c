//! A state as libvirt's daemon reads it after an exec. What that one could not go on with is said before anything
//! is given up.

use std::collections::BTreeMap;

use serde::Serialize;

use super::read::{FLAG_AUTOCREATE, FLAG_SHARED};
use crate::custody::clients::Client;
use crate::custody::descriptor::{Descriptor, Form, Number};
use crate::custody::servers::Service;
use crate::custody::state::State;
use crate::locks::holder::uuid_text;
use crate::locks::lease::Lease;
use crate::locks::table::{Mode, OwnerKey, Pid, Resource};

/// The largest document that the C daemon reads, bytes.
const LARGEST: usize = 10 * 1024 * 1024;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DocumentOut<'a> {
    daemon: DaemonOut<'a>,
    default_lockspace: LockspaceOut<'a>,
    lockspaces: Vec<LockspaceOut<'a>>,
    magic: String,
}

#[derive(Serialize)]
struct DaemonOut<'a> {
    servers: BTreeMap<&'static str, ServerOut<'a>>,
}

#[derive(Serialize)]
struct ServerOut<'a> {
    min_workers: u32,
    max_workers: u32,
    priority_workers: u32,
    max_clients: u32,
    max_anonymous_clients: u32,
    #[serde(rename = "keepaliveInterval")]
    keepalive_interval: u32,
    #[serde(rename = "keepaliveCount")]
    keepalive_count: u32,
    next_client_id: u64,
    services: Vec<ServiceOut>,
    clients: Vec<ClientOut<'a>>,
}

#[derive(Serialize)]
struct ServiceOut {
    auth: i32,
    readonly: bool,
    nrequests_client_max: u32,
    socks: Vec<SockOut>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SockOut {
    fd: i32,
    errfd: i32,
    pid: i32,
    is_client: bool,
    #[serde(rename = "unlinkUNIX")]
    unlink_unix: bool,
}

#[derive(Serialize)]
struct ClientOut<'a> {
    id: u64,
    auth: i32,
    auth_pending: bool,
    readonly: bool,
    nrequests_max: u32,
    conn_time: i64,
    sock: SockOut,
    #[serde(rename = "privateData")]
    private_data: PrivateOut<'a>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct PrivateOut<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    restricted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_name: Option<&'a str>,
    #[serde(rename = "ownerUUID", skip_serializing_if = "Option::is_none")]
    owner_uuid: Option<String>,
}

#[derive(Serialize)]
struct LockspaceOut<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<&'a str>,
    resources: Vec<ResourceOut<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResourceOut<'a> {
    name: &'a str,
    path: String,
    fd: i32,
    lock_held: bool,
    flags: u32,
    owners: Vec<u64>,
}

/// The descriptors that a C daemon which takes over needs: what it knows of. It takes its pid file anew,
/// and must find it unlocked, which closing it does.
pub fn descriptors<F: Form>(state: &State<F>) -> Vec<i32> {
    let listeners = state.listeners().iter().map(|it| it.socket.number());
    let clients = state.clients().filter(|(_, client)| !client.is_refused());
    let clients = clients.map(|(_, client)| client.socket.number());
    let files = state.table().iter().flat_map(|(_, resource)| {
        let Lease {
            descriptor, kind, ..
        } = &resource.lease;
        let parked = kind.parked().iter().map(Descriptor::number);
        std::iter::once(descriptor.number()).chain(parked)
    });
    let all = listeners.chain(clients).chain(files);
    all.map(|number| number.0).collect()
}

/// Writes the document for a C daemon that takes over as process `own_pid`. What it cannot say is
/// an error: a sentence for the log. Messages that are on their way are not in the state, and would be
/// lost: whoever calls this makes sure that there are none.
pub fn write<F: Form>(state: &State<F>, own_pid: u32) -> Result<Vec<u8>, String> {
    if !state.fences().is_empty() {
        return Err("an owner is being fenced, which libvirt's daemon cannot go on with".into());
    }
    let mut servers = BTreeMap::new();
    for service in Service::ALL {
        servers.insert(service.name(), server_out(state, service)?);
    }
    let lockspaces: Result<_, String> = state
        .lockspaces()
        .map(|directory| lockspace_out(state, directory, Some(utf8(directory, "lockspace")?)))
        .collect();
    let document = DocumentOut {
        daemon: DaemonOut { servers },
        default_lockspace: lockspace_out(state, b"", None)?,
        lockspaces: lockspaces?,
        magic: own_pid.to_string(),
    };
    let text = serde_json::to_vec_pretty(&document)
        .map_err(|error| format!("the state cannot be written as JSON: {error}"))?;
    if text.len() >= LARGEST {
        return Err(format!(
            "its state would be {} bytes long, and libvirt's daemon reads less than {LARGEST}",
            text.len()
        ));
    }
    Ok(text)
}

fn utf8<'a>(name: &'a [u8], what: &str) -> Result<&'a str, String> {
    std::str::from_utf8(name).map_err(|_| {
        format!(
            "the name of the {what} '{}' is not UTF-8, which libvirt's daemon refuses",
            String::from_utf8_lossy(name)
        )
    })
}

fn server_out<F: Form>(state: &State<F>, service: Service) -> Result<ServerOut<'_>, String> {
    let numbers = state.server(service);
    let socks = state
        .listeners()
        .iter()
        .filter(|listening| listening.server == service)
        .map(|listening| sock_out(listening.socket.number(), false, listening.path.is_some()))
        .collect();
    let clients: Result<_, String> = state
        // In the order of connecting. A client that there is no room for has not been let in yet: it is
        // left out.
        .served(service)
        .map(client_out)
        .collect();
    let [min_workers, max_workers, priority_workers] = numbers.workers;
    Ok(ServerOut {
        min_workers,
        max_workers,
        priority_workers,
        max_clients: numbers.limit,
        max_anonymous_clients: numbers.unauthenticated_limit.min(numbers.limit),
        keepalive_interval: u32::MAX,
        keepalive_count: 0,
        next_client_id: numbers.next_id,
        services: vec![ServiceOut {
            auth: 0,
            readonly: false,
            nrequests_client_max: 1,
            socks,
        }],
        clients: clients?,
    })
}

fn sock_out(Number(fd): Number, is_client: bool, unlink_unix: bool) -> SockOut {
    SockOut {
        fd,
        errfd: -1,
        pid: 0,
        is_client,
        unlink_unix,
    }
}

fn client_out<D: Descriptor>(client: &Client<D>) -> Result<ClientOut<'_>, String> {
    let private_data = match (client.arrival.server, &client.owner) {
        (Service::Admin, _) => PrivateOut::default(),
        // The C daemon itself cannot write this and dies of it; it can read it, if there is a name.
        (Service::Lock, None) => private_out(client.restricted, 0, 0, "", &[0; 16]),
        (Service::Lock, Some(owner)) => {
            let name = utf8(&owner.name, "domain")?;
            private_out(client.restricted, owner.pid, owner.id, name, &owner.uuid)
        }
    };
    Ok(ClientOut {
        id: client.arrival.id,
        auth: 0,
        auth_pending: false,
        readonly: false,
        nrequests_max: 1,
        conn_time: client.arrival.connected_at,
        sock: sock_out(client.socket.number(), true, false),
        private_data,
    })
}

fn private_out<'a>(
    restricted: bool,
    pid: Pid,
    id: u32,
    name: &'a str,
    uuid: &[u8; 16],
) -> PrivateOut<'a> {
    PrivateOut {
        restricted: Some(restricted),
        owner_pid: Some(pid.cast_unsigned()),
        owner_id: Some(id),
        owner_name: Some(name),
        owner_uuid: Some(uuid_text(uuid)),
    }
}

fn lockspace_out<'a, F: Form>(
    state: &'a State<F>,
    lockspace: &[u8],
    directory: Option<&'a str>,
) -> Result<LockspaceOut<'a>, String> {
    let resources: Result<_, String> = state
        .table()
        .iter()
        .map(|(_, resource)| resource)
        .filter(|resource| resource.lockspace() == lockspace)
        .map(|resource| resource_out(resource, directory))
        .collect();
    Ok(LockspaceOut {
        directory,
        resources: resources?,
    })
}

fn resource_out<'a, D: Descriptor>(
    resource: &'a Resource<Lease<D>>,
    directory: Option<&str>,
) -> Result<ResourceOut<'a>, String> {
    let name = utf8(resource.name(), "resource")?;
    let is_shared = resource.mode == Mode::Shared;
    let flags = if is_shared { FLAG_SHARED } else { 0 }
        | if resource.autocreate {
            FLAG_AUTOCREATE
        } else {
            0
        };
    let repeated = |(owner, times): (OwnerKey, u32)| {
        let pid = i64::from(owner.pid).cast_unsigned();
        (0..times).map(move |_| pid)
    };
    Ok(ResourceOut {
        name,
        path: directory.map_or_else(
            || name.to_owned(),
            |directory| format!("{directory}/{name}"),
        ),
        fd: resource.lease.descriptor.number().0,
        lock_held: true,
        flags,
        owners: resource.holders().flat_map(repeated).collect(),
    })
}
