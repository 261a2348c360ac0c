//! The clients of a server over the admin socket: who they are, and their end on demand.

use std::borrow::Cow;
use std::os::fd::OwnedFd;

use crate::custody::clients::{Client as Connected, ClientId};
use crate::custody::servers::Service;
use crate::locks::holder;
use crate::server::hall::{Hall, Order};
use crate::wire::admin::{Answer, Client, LIST_LIMIT, Parameter, Value};
use crate::wire::error::{Code, Domain, Error};

/// The clients of a server, in the order of connecting. The error of the C daemon if there are more
/// than the protocol can list; it gives it as well when only their number was asked for.
pub fn list(hall: &Hall<'_>, service: Service, wants_list: bool) -> Result<Answer<'static>, Error> {
    let state = hall.custody.state();
    let clients: Vec<Client> = state
        .served(service)
        .filter(|client| !client.is_over())
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

fn description(client: &Connected<OwnedFd>) -> Client {
    Client {
        server: client.arrival.server.name(),
        id: client.arrival.id,
        connected_at: client.arrival.connected_at,
    }
}

/// One client of a server.
pub fn look_up(hall: &Hall<'_>, service: Service, number: u64) -> Result<Answer<'static>, Error> {
    let found = find(hall, service, number).ok_or_else(|| unknown(number))?;
    Ok(Answer::Client(description(found)))
}

/// A client that is looked up.
pub fn with_id(hall: &Hall<'_>, service: Service, number: u64) -> Result<ClientId, Error> {
    let found = find(hall, service, number).ok_or_else(|| unknown(number))?;
    Ok(found.id())
}

/// As [`with_id`], in the words that the C daemon has for one of the procedures.
pub fn matching(hall: &Hall<'_>, service: Service, number: u64) -> Result<ClientId, Error> {
    match find(hall, service, number) {
        Some(found) => Ok(found.id()),
        None => {
            let detail = format!("no client with matching id '{number}' found");
            Err(Error::new(Code::NoClient, Domain::Admin, detail))
        }
    }
}

fn unknown(number: u64) -> Error {
    let detail = format!("No client with matching ID '{number}'");
    Error::new(Code::NoClient, Domain::Rpc, detail)
}

fn find<'a>(hall: &'a Hall<'_>, service: Service, number: u64) -> Option<&'a Connected<OwnedFd>> {
    let state = hall.custody.state();
    let found = state.served_with(service, number);
    found.filter(|client| !client.is_over())
}

/// Who a client is: known since it connected, so also before its first call. (The C daemon knows it
/// only after that.) A name is left out if the host has none for the number, and so is the SELinux
/// context where SELinux is not in use.
pub fn info(hall: &mut Hall<'_>, id: ClientId) -> Answer<'static> {
    let Some(client) = hall.custody.state().client(id) else {
        return Answer::Parameters(Vec::new());
    };
    let peer = client.peer();
    let context = crate::host::stream::selinux_context(&client.socket);
    let user_name = hall.names.user(peer.uid).map(text);
    let group_name = hall.names.group(peer.gid).map(text);
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
pub fn close(hall: &mut Hall<'_>, id: ClientId, caller: &str) {
    let state = hall.custody.state();
    let Some(client) = state.client(id) else {
        return;
    };
    let text = format!(
        "Client {} of the {} server (pid {})",
        client.arrival.id,
        client.arrival.server.name(),
        client.peer().pid
    );
    // What is to be said of one whose process goes on for other domains is said where its connection ends.
    let ends = state
        .ends_with(client)
        .filter(|owner| !state.holds_for_others_only(*owner) && !state.stands_for_others(*owner));
    match ends {
        Some(owner) => tracing::warn!(
            target: "admin.admin_server",
            "{text} is disconnected because {caller} asked for it. {} holds locks and is stopped \
             with it", holder::process_text(state.table(), owner.pid)
        ),
        None => tracing::info!(
            target: "admin.admin_server",
            "{text} is disconnected because {caller} asked for it"
        ),
    }
    hall.orders.push(Order::End(id));
}
