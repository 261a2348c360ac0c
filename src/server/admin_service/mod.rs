//! The admin program: what virt-admin asks and steers.
//!
//! A call is decoded, checked, carried out at once and answered. The checks of each procedure (the
//! server that it names, its flags, its parameters) come in libvirt's order, which shows in what a call
//! that is wrong in several ways is told. What it sets is kept in [`Daemon`] (client limits and workers of both servers, the idle
//! timeout) and in the log's own settings, and written down for the next image of the process before
//! the answer goes out.

mod clients;
mod logging;
mod parameters;

use super::connection::Service;
use super::conversation::Flow;
use super::daemon::Daemon;
use super::dispatch;
use crate::log::Printable;
use crate::wire::admin::{self, Answer, Call, Procedure};
use crate::wire::error::{self, Code, Domain, Error, undecodable, unknown_procedure};
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

/// Carries out a call of the connection at `place`.
pub fn dispatch(
    daemon: &mut Daemon,
    place: usize,
    header: Header,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Flow {
    let result = match Procedure::from_number(header.procedure) {
        None => Err(unknown_procedure(header.procedure)),
        Some(procedure) => match admin::decode(procedure, payload) {
            Err(_) => Err(undecodable()),
            Ok(call) => serve(daemon, place, &call),
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
            log_refused(daemon, place, header.procedure, &error, &message);
            if message.len() > error::STRING_LIMIT as usize {
                // A name of 4 MiB leaves no room for the words around it: no client could read the
                // reply, and the C daemon sends none either.
                return Flow::Close;
            }
            error.encode_reply(out, header);
        }
    }
    dispatch::flow(out)
}

fn log_refused(daemon: &Daemon, place: usize, procedure: i32, error: &Error, message: &[u8]) {
    let text = message.get(..LOGGED_TEXT).unwrap_or(message);
    tracing::error!(
        target: "admin.admin_server",
        domain = error.domain.number(),
        code = error.code.number(),
        "{} (procedure {procedure}, for {})", Printable(text), caller(daemon, place)
    );
}

fn serve(daemon: &mut Daemon, place: usize, call: &Call<'_>) -> Result<Outcome, Error> {
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
            Ok(parameters::workers(daemon, service).into())
        }
        Call::ServerSetThreadpoolParameters {
            server,
            parameters,
            flags,
        } => {
            let service = server_matching(server)?;
            parameters::check_names(parameters)?;
            check_flags(procedure, *flags)?;
            parameters::set_workers(daemon, service, parameters, &caller(daemon, place))?;
            Ok(Answer::Done.into())
        }
        Call::ServerListClients {
            server,
            wants_list,
            flags,
        } => {
            let service = server_named(server)?;
            check_flags(procedure, *flags)?;
            Ok(clients::list(daemon, service, *wants_list)?.into())
        }
        Call::ServerLookupClient { client, flags } => {
            let service = server_named(client.server)?;
            check_flags(procedure, *flags)?;
            Ok(clients::look_up(daemon, service, client.id)?.into())
        }
        Call::ClientGetInfo { client, flags } => {
            let service = server_matching(client.server)?;
            let asked = clients::matching(daemon, service, client.id)?;
            check_flags(procedure, *flags)?;
            Ok(clients::info(daemon, asked).into())
        }
        Call::ClientClose { client, flags } => {
            let service = server_named(client.server)?;
            let asked = clients::with_id(daemon, service, client.id)?;
            check_flags(procedure, *flags)?;
            if asked == place {
                return Ok(Outcome::Close);
            }
            clients::close(daemon, asked, &caller(daemon, place));
            Ok(Answer::Done.into())
        }
        Call::ServerGetClientLimits { server, flags } => {
            let service = server_named(server)?;
            check_flags(procedure, *flags)?;
            Ok(parameters::client_limits(daemon, service).into())
        }
        Call::ServerSetClientLimits {
            server,
            parameters,
            flags,
        } => {
            let service = server_matching(server)?;
            parameters::check_names(parameters)?;
            check_flags(procedure, *flags)?;
            parameters::set_client_limits(daemon, service, parameters, &caller(daemon, place))?;
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
            logging::set_outputs(text.unwrap_or_default(), &caller(daemon, place))?;
            daemon.note_logging();
            Ok(Answer::Done.into())
        }
        Call::ConnectSetLoggingFilters { text, flags } => {
            check_flags(procedure, *flags)?;
            logging::set_filters(text.unwrap_or_default(), &caller(daemon, place))?;
            daemon.note_logging();
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
            set_timeout(daemon, *timeout_s, &caller(daemon, place));
            Ok(Answer::Done.into())
        }
        Call::ConnectDaemonShutdown { flags } => {
            check_flags(procedure, *flags)?;
            tracing::info!(
                target: "admin.admin_server",
                "The daemon ends: {} asked for it", caller(daemon, place)
            );
            daemon.stop();
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
fn set_timeout(daemon: &mut Daemon, timeout_s: u32, caller: &str) {
    daemon.idle_timeout_s = timeout_s;
    daemon.note_idle_timeout();
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
fn caller(daemon: &Daemon, place: usize) -> String {
    let pid = daemon.connections.get(place).map(|c| c.peer.pid);
    format!("the admin client with pid {}", pid.unwrap_or_default())
}
