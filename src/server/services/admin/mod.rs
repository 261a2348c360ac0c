//! The admin program: what virt-admin asks and steers.
//!
//! A call is decoded, checked (names of servers, then parameters, then flags, as libvirt's daemon does),
//! carried out at once and answered. What it sets lasts: client limits and workers of both servers, the
//! idle timeout, the log's settings.

mod clients;
mod logging;
mod parameters;

use crate::custody::clients::ClientId;
use crate::custody::servers::Service;
use crate::log::{self, Printable};
use crate::server::flow::{Flow, flow};
use crate::server::hall::{Hall, Order};
use crate::wire::admin::{self, Answer, Call, Procedure};
use crate::wire::error::{self, Code, Domain, Error};
use crate::wire::frame::Header;

/// How much of an error's text goes into a line of the log, bytes. A client may put megabytes in.
const LOGGED_TEXT: usize = 1024;

/// How a call ends that is not refused.
#[derive(Debug)]
enum Outcome {
    /// With a reply.
    Answer(Answer<'static>),
    /// With a reply, and then the connection ends.
    AnswerAndClose(Answer<'static>),
    /// With the end of the connection.
    Close,
}

impl From<Answer<'static>> for Outcome {
    fn from(answer: Answer<'static>) -> Outcome {
        Outcome::Answer(answer)
    }
}

/// Carries out a call of this client.
pub fn dispatch(
    hall: &mut Hall<'_>,
    id: ClientId,
    header: Header,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Flow {
    let result = match Procedure::from_number(header.procedure) {
        None => Err(error::unknown_procedure(header.procedure)),
        Some(procedure) => match admin::decode(procedure, payload) {
            Err(_) => Err(error::undecodable()),
            Ok(call) => serve(hall, id, &call),
        },
    };
    match result {
        Ok(Outcome::Answer(answer)) => answer.encode_reply(out, header),
        Ok(Outcome::AnswerAndClose(answer)) => {
            answer.encode_reply(out, header);
            return Flow::Close;
        }
        Ok(Outcome::Close) => return Flow::Close,
        Err(error) => {
            let message = error.message();
            log_refused(hall, id, header.procedure, &error, &message);
            if message.len() > error::STRING_LIMIT as usize {
                // A name of 4 MiB leaves no room for the words around it: no client could read the
                // reply, and the C daemon sends none either.
                return Flow::Close;
            }
            error.encode_reply(out, header);
        }
    }
    flow(out)
}

fn log_refused(hall: &Hall<'_>, id: ClientId, procedure: i32, error: &Error, message: &[u8]) {
    let text = message.get(..LOGGED_TEXT).unwrap_or(message);
    tracing::error!(
        target: "admin.admin_server",
        domain = error.domain.number(),
        code = error.code.number(),
        "{} (procedure {procedure}, for {})", Printable(text), caller(hall, id)
    );
}

fn serve(hall: &mut Hall<'_>, id: ClientId, call: &Call<'_>) -> Result<Outcome, Error> {
    let procedure = call.procedure();
    match call {
        Call::ConnectOpen { flags } => {
            check_flags(procedure, *flags)?;
            Ok(Answer::Done.into())
        }
        Call::ConnectClose => Ok(Outcome::AnswerAndClose(Answer::Done)),
        Call::ConnectGetLibVersion => Ok(Answer::Version(admin::LIBVIRT_VERSION).into()),
        Call::ConnectListServers { wants_list, flags } => {
            check_flags(procedure, *flags)?;
            let all: &[&str] = &["virtlockd", "admin"];
            Ok(Answer::Servers(if *wants_list { all } else { &[] }, 2).into())
        }
        Call::ConnectLookupServer { server } => {
            Ok(Answer::Server(server_named(server)?.name()).into())
        }
        Call::ServerGetThreadpoolParameters { server, flags } => {
            let service = server_named(server)?;
            check_flags(procedure, *flags)?;
            Ok(parameters::workers(hall.custody, service).into())
        }
        Call::ServerSetThreadpoolParameters {
            server,
            parameters,
            flags,
        } => {
            let service = server_matching(server)?;
            parameters::check_names(parameters)?;
            check_flags(procedure, *flags)?;
            let caller = caller(hall, id);
            check_room(hall)?;
            parameters::set_workers(hall.custody, service, parameters, &caller)?;
            Ok(Answer::Done.into())
        }
        Call::ServerListClients {
            server,
            wants_list,
            flags,
        } => {
            let service = server_named(server)?;
            check_flags(procedure, *flags)?;
            Ok(clients::list(hall, service, *wants_list)?.into())
        }
        Call::ServerLookupClient { client, flags } => {
            let service = server_named(client.server)?;
            check_flags(procedure, *flags)?;
            Ok(clients::look_up(hall, service, client.id)?.into())
        }
        Call::ClientGetInfo { client, flags } => {
            let service = server_matching(client.server)?;
            let asked = clients::matching(hall, service, client.id)?;
            check_flags(procedure, *flags)?;
            Ok(clients::info(hall, asked).into())
        }
        Call::ClientClose { client, flags } => {
            let service = server_named(client.server)?;
            let asked = clients::with_id(hall, service, client.id)?;
            check_flags(procedure, *flags)?;
            if asked == id {
                return Ok(Outcome::Close);
            }
            let caller = caller(hall, id);
            clients::close(hall, asked, &caller);
            Ok(Answer::Done.into())
        }
        Call::ServerGetClientLimits { server, flags } => {
            let service = server_named(server)?;
            check_flags(procedure, *flags)?;
            Ok(parameters::client_limits(hall.custody, service).into())
        }
        Call::ServerSetClientLimits {
            server,
            parameters,
            flags,
        } => {
            let service = server_matching(server)?;
            parameters::check_names(parameters)?;
            check_flags(procedure, *flags)?;
            let caller = caller(hall, id);
            check_room(hall)?;
            parameters::set_client_limits(hall.custody, service, parameters, &caller)?;
            hall.orders.push(Order::LetIn(service));
            Ok(Answer::Done.into())
        }
        Call::ConnectGetLoggingOutputs { flags } => {
            check_flags(procedure, *flags)?;
            Ok(logging::outputs().into())
        }
        Call::ConnectGetLoggingFilters { flags } => {
            check_flags(procedure, *flags)?;
            Ok(logging::filters().into())
        }
        Call::ConnectSetLoggingOutputs { text, flags } => {
            check_flags(procedure, *flags)?;
            check_room(hall)?;
            logging::set_outputs(text.unwrap_or_default(), &caller(hall, id))?;
            hall.custody.log_changed(log::saved());
            Ok(Answer::Done.into())
        }
        Call::ConnectSetLoggingFilters { text, flags } => {
            check_flags(procedure, *flags)?;
            check_room(hall)?;
            logging::set_filters(text.unwrap_or_default(), &caller(hall, id))?;
            hall.custody.log_changed(log::saved());
            Ok(Answer::Done.into())
        }
        Call::ServerUpdateTlsFiles { server, flags } => {
            server_named(server)?;
            check_flags(procedure, *flags)?;
            let detail = "no tls service found, unable to update tls files";
            Err(Error::new(Code::InternalError, Domain::Rpc, detail))
        }
        Call::ConnectSetDaemonTimeout { timeout_s, flags } => {
            check_flags(procedure, *flags)?;
            let caller = caller(hall, id);
            check_room(hall)?;
            set_timeout(hall, *timeout_s, &caller);
            Ok(Answer::Done.into())
        }
        Call::ConnectDaemonShutdown { flags } => {
            check_flags(procedure, *flags)?;
            tracing::info!(
                target: "admin.admin_server",
                "The daemon ends: {} asked for it", caller(hall, id)
            );
            hall.orders.push(Order::Stop);
            Ok(Outcome::Close)
        }
    }
}

fn check_flags(procedure: Procedure, flags: u32) -> Result<(), Error> {
    let known = match procedure {
        // Nothing is ever lost that could be kept: the flag is taken, and changes nothing.
        Procedure::ConnectDaemonShutdown => admin::PRESERVE,
        _ => 0,
    };
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::flags(Domain::Admin, procedure.function(), unknown)),
    }
}

/// That what is set can be written down.
fn check_room(hall: &mut Hall<'_>) -> Result<(), Error> {
    let what = b"Unable to record what is asked for";
    let room = hall.custody.make_room();
    room.map_err(|reason| Error::system(Domain::Admin, what, reason))
}

fn find_server(name: &[u8]) -> Option<Service> {
    Service::ALL
        .into_iter()
        .find(|service| service.name().as_bytes() == name)
}

/// A server that is looked up first thing.
fn server_named(name: &[u8]) -> Result<Service, Error> {
    find_server(name).ok_or_else(|| {
        let detail = [b"No server named '", name, b"'"].concat();
        Error::new(Code::NoServer, Domain::Rpc, detail)
    })
}

/// As [`server_named`], in the words that the C daemon has for three of the procedures.
fn server_matching(name: &[u8]) -> Result<Service, Error> {
    find_server(name).ok_or_else(|| {
        let detail = [b"no server with matching name '", name, b"' found"].concat();
        Error::new(Code::NoServer, Domain::Admin, detail)
    })
}

/// Sets after how long without work the daemon ends. The C daemon takes any number here, unlike on
/// its command line. Its clock starts anew: the caller is a client, so it is not running now.
fn set_timeout(hall: &mut Hall<'_>, timeout_s: u32, caller: &str) {
    hall.custody.set_idle_timeout(timeout_s);
    if timeout_s == 0 {
        tracing::info!(
            target: "admin.admin_server",
            "The daemon stays when it has nothing to do: {caller} asked for it"
        );
    } else {
        tracing::info!(
            target: "admin.admin_server",
            "The daemon ends after {timeout_s} s without clients and locks: {caller} asked for it"
        );
    }
}

/// Who calls, as an operator reads it.
fn caller(hall: &Hall<'_>, id: ClientId) -> String {
    let client = hall.custody.state().client(id);
    let pid = client.map(|client| client.peer().pid);
    format!("the admin client with pid {}", pid.unwrap_or_default())
}
