//! The clients of a server over the admin socket: who they are, and their end on demand.

use std::borrow::Cow;

use crate::locks::table::OwnerKey;
use crate::server::connection::{Connection, Phase, Service};
use crate::server::daemon::Daemon;
use crate::wire::admin::{Answer, Client, LIST_LIMIT, Parameter, Value};
use crate::wire::error::{Code, Domain, Error};

/// The clients of a server, in the order of connecting. The error of the C daemon if there are more
/// than the protocol can list; it gives it as well when only their number was asked for.
pub fn list(daemon: &Daemon, service: Service, wants_list: bool) -> Result<Answer<'static>, Error> {
    let clients: Vec<Client> = daemon
        .clients(service)
        .by_id
        .values()
        .filter_map(|place| daemon.connections.get(*place))
        .filter(|connection| connection.phase != Phase::Over)
        .map(description)
        .collect();
    if clients.len() > LIST_LIMIT {
        let detail = format!(
            "Too many clients '{}' for limit '{LIST_LIMIT}'",
            clients.len()
        );
        return Err(Error::new(Code::InternalError, Domain::Admin, detail));
    }
    let count = u32::try_from(clients.len()).unwrap_or(u32::MAX);
    let listed = if wants_list { clients } else { Vec::new() };
    Ok(Answer::Clients(listed, count))
}

fn description(connection: &Connection) -> Client {
    Client {
        server: connection.service.name(),
        id: connection.id,
        connected_at: connection.connected_at,
    }
}

/// One client of a server.
pub fn look_up(daemon: &Daemon, service: Service, id: u64) -> Result<Answer<'static>, Error> {
    let place = with_id(daemon, service, id)?;
    match daemon.connections.get(place) {
        Some(connection) => Ok(Answer::Client(description(connection))),
        None => Err(unknown(id)),
    }
}

/// The place of a client that is looked up.
pub fn with_id(daemon: &Daemon, service: Service, id: u64) -> Result<usize, Error> {
    find(daemon, service, id).ok_or_else(|| unknown(id))
}

/// As [`with_id`], in the words that the C daemon has for one of the procedures.
pub fn matching(daemon: &Daemon, service: Service, id: u64) -> Result<usize, Error> {
    find(daemon, service, id).ok_or_else(|| {
        let detail = format!("no client with matching id '{id}' found");
        Error::new(Code::NoClient, Domain::Admin, detail)
    })
}

fn unknown(id: u64) -> Error {
    let detail = format!("No client with matching ID '{id}'");
    Error::new(Code::NoClient, Domain::Rpc, detail)
}

fn find(daemon: &Daemon, service: Service, id: u64) -> Option<usize> {
    let place = *daemon.clients(service).by_id.get(&id)?;
    let connection = daemon.connections.get(place)?;
    (connection.phase != Phase::Over).then_some(place)
}

/// Who a client is: known since it connected, so also before its first call. (The C daemon knows it
/// only after that.) A name is left out if the host has none for the number, and so is the SELinux
/// context where SELinux is not in use.
pub fn info(daemon: &mut Daemon, place: usize) -> Answer<'static> {
    let Some(connection) = daemon.connections.get(place) else {
        return Answer::Parameters(Vec::new());
    };
    let peer = connection.peer;
    let context = crate::host::stream::selinux_context(&connection.socket);
    let user_name = daemon.names.user(peer.uid).map(text);
    let group_name = daemon.names.group(peer.gid).map(text);
    let number = |number: u32| Some(Value::Int(number.cast_signed()));
    let values = [
        ("readonly", Some(Value::Boolean(false))),
        ("unix_user_id", number(peer.uid)),
        ("unix_user_name", user_name),
        ("unix_group_id", number(peer.gid)),
        ("unix_group_name", group_name),
        ("unix_process_id", Some(Value::Int(peer.pid))),
        (
            "selinux_context",
            context.map(|context| Value::String(Cow::Owned(context))),
        ),
    ];
    let parameters = values.into_iter().filter_map(|(field, value)| {
        let field = field.as_bytes();
        Some(Parameter {
            field,
            value: value?,
        })
    });
    Answer::Parameters(parameters.collect())
}

fn text(text: &str) -> Value<'static> {
    Value::String(Cow::Owned(text.as_bytes().to_vec()))
}

/// Ends a client's connection, whatever that means for the domain it stands for: the operator who
/// asked for it, and the one who looks for the reason later, read it in the log.
pub fn close(daemon: &mut Daemon, place: usize, caller: &str) {
    let Some(connection) = daemon.connections.get(place) else {
        return;
    };
    let client = format!(
        "Client {} of the {} server (pid {})",
        connection.id,
        connection.service.name(),
        connection.peer.pid
    );
    let ends = daemon.ends_with(connection);
    // What is to be said of one whose process goes on is said where its connection ends.
    let is_stopped = |owner: &OwnerKey| {
        !daemon.holds_for_others_only(*owner) && !daemon.stands_for_others(*owner)
    };
    match ends.filter(is_stopped) {
        Some(owner) => tracing::warn!(
            target: "admin.admin_server",
            "{client} is disconnected because {caller} asked for it. {} holds locks and is stopped \
             with it", daemon.owner_text(owner.pid)
        ),
        None => tracing::info!(
            target: "admin.admin_server",
            "{client} is disconnected because {caller} asked for it"
        ),
    }
    daemon.end_connection(place);
}
