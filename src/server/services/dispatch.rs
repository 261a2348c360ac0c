//! From a frame to the procedure that it calls. libvirt's order of the checks, which shows in what a
//! call that is wrong in several ways is told: keepalive goes first; what is no call is dropped
//! without a word; then program and version, status, number of the procedure, arguments. None of
//! these errors ends the connection.

use super::admin;
use super::lock::{self as lock_service, Called};
use super::status as status_service;
use crate::custody::clients::{Client, ClientId};
use crate::custody::servers::Service;
use crate::locks::table::Pid;
use crate::log::Printable;
use crate::server::flow::{Flow, flow};
use crate::server::hall::Hall;
use crate::wire::error::{self, Error};
use crate::wire::frame::{self, Header, Kind};
use crate::wire::keepalive;
use crate::wire::lock::{self, Call, Procedure, Target};
use crate::wire::status;

/// Works on one frame of a client; the reply is appended to `out`.
pub fn dispatch(
    hall: &mut Hall<'_>,
    id: ClientId,
    header: Header,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Flow {
    if keepalive::is_ours(&header) {
        if header.procedure == keepalive::PING {
            keepalive::pong(out);
        }
        return flow(out);
    }
    if !matches!(header.kind, Kind::Call | Kind::CallWithDescriptors) {
        return Flow::Continue;
    }
    let Some(client) = hall.custody.state().client(id) else {
        return Flow::Close;
    };
    let service = client.arrival.server;
    let is_first = !client.has_called;
    if client.is_refused() {
        let known = known_owner(hall, service, header, payload);
        if let Err(error) = hall.admit(id, known) {
            error.encode_reply(out, header);
            return Flow::Close;
        }
    }
    if let Err(error) = check_program(service, header) {
        log_refused(hall, id, "a call", &error);
        error.encode_reply(out, header);
        return flow(out);
    }
    match service {
        Service::Lock => {
            if is_first {
                hall.custody.called(id);
            }
            match lock_call(hall, id, header, payload) {
                Ok(Called::Done) => lock::encode_success(out, header),
                Ok(Called::Again) => return Flow::Again,
                Ok(Called::Waits) => return Flow::Wait,
                Err(error) => error.encode_reply(out, header),
            }
            flow(out)
        }
        Service::Admin if header.program == status::PROGRAM => {
            status_service::dispatch(hall, id, header, payload, out)
        }
        Service::Admin => admin::dispatch(hall, id, header, payload, out),
    }
}

fn check_program(service: Service, header: Header) -> Result<(), Error> {
    let programs: &[(u32, u32)] = match service {
        Service::Lock => &[(lock::PROGRAM, lock::VERSION)],
        Service::Admin => &[
            (crate::wire::admin::PROGRAM, crate::wire::admin::VERSION),
            (status::PROGRAM, status::VERSION),
        ],
    };
    if !programs.contains(&(header.program, header.version)) {
        let detail = format!(
            "Cannot find program {} version {}",
            header.program.cast_signed(),
            header.version.cast_signed()
        );
        return Err(error::rpc(detail));
    }
    if header.status != frame::STATUS_OK {
        return Err(error::rpc(format!(
            "Unexpected message status {}",
            header.status.cast_unsigned()
        )));
    }
    Ok(())
}

/// The process of the owner that a call says the client speaks for, if the daemon knows the owner.
fn known_owner(hall: &Hall<'_>, service: Service, header: Header, payload: &[u8]) -> Option<Pid> {
    if service != Service::Lock
        || check_program(service, header).is_err()
        || Procedure::from_number(header.procedure) != Some(Procedure::Register)
    {
        return None;
    }
    match lock::decode(Procedure::Register, payload) {
        Ok(Call::Register { uuid, pid, .. }) => {
            hall.custody.state().is_known(pid, uuid).then_some(pid)
        }
        _ => None,
    }
}

fn lock_call(
    hall: &mut Hall<'_>,
    id: ClientId,
    header: Header,
    payload: &[u8],
) -> Result<Called, Error> {
    let Some(procedure) = Procedure::from_number(header.procedure) else {
        let error = error::unknown_procedure(header.procedure);
        log_refused(hall, id, "a call", &error);
        return Err(error);
    };
    let Ok(call) = lock::decode(procedure, payload) else {
        let error = error::undecodable();
        log_refused(hall, id, &format!("{procedure:?}"), &error);
        return Err(error);
    };
    let result = lock_service::call(hall, id, &call);
    if !matches!(result, Ok(Called::Again | Called::Waits)) {
        hall.shares.call_ends(id, hall.custody);
    }
    match &result {
        Ok(Called::Again | Called::Waits) => (),
        Ok(Called::Done) => tracing::debug!(
            target: "locking.lock_daemon",
            "{} for {}: done", describe(&call), caller(hall, id)
        ),
        Err(error) => log_refused(hall, id, &describe(&call), error),
    }
    result
}

fn log_refused(hall: &Hall<'_>, id: ClientId, what: &str, error: &Error) {
    tracing::error!(
        target: "rpc.netserverclient",
        domain = error.domain.number(),
        code = error.code.number(),
        "{} ({what}, for {})", Printable(&error.message()), caller(hall, id)
    );
}

/// A call as an operator reads it: what, on which file.
fn describe(call: &Call<'_>) -> String {
    let procedure = call.procedure();
    match *call {
        Call::CreateResource { target, .. }
        | Call::DeleteResource { target, .. }
        | Call::AcquireResource { target, .. }
        | Call::ReleaseResource { target, .. } => {
            format!("{procedure:?} of {}", target_text(target))
        }
        Call::New { path, .. } | Call::CreateLockspace { path } => {
            format!("{procedure:?} of '{}'", Printable(path))
        }
        Call::Register { .. } | Call::Restrict { .. } => format!("{procedure:?}"),
    }
}

fn target_text(target: Target<'_>) -> String {
    let name = Printable(target.name);
    if target.lockspace.is_empty() {
        format!("'{name}'")
    } else {
        format!("'{name}' in lockspace '{}'", Printable(target.lockspace))
    }
}

fn caller(hall: &Hall<'_>, id: ClientId) -> String {
    let client = hall.custody.state().client(id);
    client.map_or_else(|| "a client that is gone".to_owned(), Client::text)
}
