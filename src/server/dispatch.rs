//! From a frame to the procedure that it calls. libvirt's order of the checks, which shows in what a
//! call that is wrong in several ways is told: keepalive goes first; what is no call is dropped
//! without a word; then program and version, status, number of the procedure, arguments. None of
//! these errors ends the connection.

use std::os::fd::AsRawFd;

use super::connection::{Connection, NoRoom, Phase, Service};
use super::conversation::Flow;
use super::daemon::Daemon;
use super::lock_service::{self, Context, Session};
use crate::locks::table::Owner;
use crate::log::Printable;
use crate::wire::error::{Error, rpc, undecodable, unknown_procedure};
use crate::wire::frame::{self, Header, Kind};
use crate::wire::keepalive;
use crate::wire::lock::{self, Call, Procedure, Target};

/// So many bytes of replies are sent before more are made: a client that reads nothing can make the
/// daemon hold this many bytes, those of one turn, which are as many at most, and one reply.
pub const ENOUGH_OUTPUT: usize = 64 * 1024;

/// Works on one frame of a connection; the reply is appended to `out`.
pub fn dispatch(
    daemon: &mut Daemon,
    place: usize,
    header: Header,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Flow {
    let Some(connection) = daemon.connections.get_mut(place) else {
        return Flow::Close;
    };
    if keepalive::is_ours(&header) {
        if header.procedure == keepalive::PING {
            keepalive::pong(out);
        }
        return flow(out);
    }
    if !matches!(header.kind, Kind::Call | Kind::CallWithDescriptors) {
        return Flow::Continue;
    }
    if let Phase::Refused(reason) = connection.phase
        && let Err(error) = {
            let is_known = is_for_known(daemon, place, header, payload);
            daemon.admit(place, reason, is_known)
        }
    {
        error.encode_reply(out, header);
        return Flow::Close;
    }
    let Some(connection) = daemon.connections.get_mut(place) else {
        return Flow::Close;
    };
    if let Err(error) = check_program(connection.service, header) {
        log_refused(connection, "a call", &error);
        error.encode_reply(out, header);
        return flow(out);
    }
    match connection.service {
        Service::Lock => {
            daemon.note_call(place);
            match lock_call(daemon, place, header, payload) {
                Ok(()) => lock::encode_success(out, header),
                Err(error) => error.encode_reply(out, header),
            }
            flow(out)
        }
        Service::Admin => super::admin_service::dispatch(daemon, place, header, payload, out),
    }
}

/// Whether a call says that the client speaks for an owner that the daemon knows.
fn is_for_known(daemon: &Daemon, place: usize, header: Header, payload: &[u8]) -> bool {
    let Some(connection) = daemon.connections.get(place) else {
        return false;
    };
    if connection.service != Service::Lock
        || check_program(Service::Lock, header).is_err()
        || Procedure::from_number(header.procedure) != Some(Procedure::Register)
    {
        return false;
    }
    let Ok(Call::Register { uuid, pid, .. }) = lock::decode(Procedure::Register, payload) else {
        return false;
    };
    // One for whose process there was no descriptor could not be fenced when it ends.
    let can_be_fenced = daemon.names_processes || connection.start_time.is_some();
    (pid != connection.peer.pid || can_be_fenced) && daemon.is_known(pid, uuid)
}

/// Whether to go on with the next frame at once.
pub fn flow(out: &[u8]) -> Flow {
    if out.len() >= ENOUGH_OUTPUT {
        Flow::Pause
    } else {
        Flow::Continue
    }
}

fn check_program(service: Service, header: Header) -> Result<(), Error> {
    let (program, version) = match service {
        Service::Lock => (lock::PROGRAM, lock::VERSION),
        Service::Admin => (crate::wire::admin::PROGRAM, crate::wire::admin::VERSION),
    };
    if (header.program, header.version) != (program, version) {
        let detail = format!(
            "Cannot find program {} version {}",
            header.program.cast_signed(),
            header.version.cast_signed()
        );
        return Err(rpc(detail));
    }
    if header.status != frame::STATUS_OK {
        return Err(rpc(format!(
            "Unexpected message status {}",
            header.status.cast_unsigned()
        )));
    }
    Ok(())
}

fn lock_call(
    daemon: &mut Daemon,
    place: usize,
    header: Header,
    payload: &[u8],
) -> Result<(), Error> {
    let Some(connection) = daemon.connections.get_mut(place) else {
        return Err(undecodable());
    };
    let Some(procedure) = Procedure::from_number(header.procedure) else {
        let error = unknown_procedure(header.procedure);
        log_refused(connection, "a call", &error);
        return Err(error);
    };
    let Ok(call) = lock::decode(procedure, payload) else {
        let error = undecodable();
        log_refused(connection, &format!("{procedure:?}"), &error);
        return Err(error);
    };
    let is_lent = connection.own_owner().is_none();
    if is_lent
        && matches!(call, Call::AcquireResource { .. })
        && let Some(owner) = connection.session.owner()
    {
        let pid = owner.pid;
        daemon.settle_number(pid);
    }
    let Some(connection) = daemon.connections.get_mut(place) else {
        return Err(undecodable());
    };
    let before = match call {
        Call::Register { .. } => connection.session.owner().cloned(),
        _ => None,
    };
    let context = Context {
        descriptor: connection.socket.as_raw_fd(),
        session: &mut connection.session,
        keeper: &mut daemon.keeper,
        ledger: &mut daemon.ledger,
    };
    let result = lock_service::call(context, &call);
    if procedure == Procedure::Register {
        let own = &mut daemon.own_connections;
        if let Some(before) = before
            .as_ref()
            .filter(|before| connection.stands_for(before))
        {
            own.remove(before);
        }
        if let Some(owner) = connection.own_owner() {
            own.add(owner);
        }
    }
    match &result {
        Ok(()) => tracing::debug!(
            target: "locking.lock_daemon",
            "{} for {}: done", describe(&call), caller(connection)
        ),
        Err(error) => log_refused(connection, &describe(&call), error),
    }
    if result.is_ok() {
        note_owner(daemon, place, &call, before);
    }
    result
}

/// Keeps account of who has a connection of its own, and of those that hold something and have none.
fn note_owner(daemon: &mut Daemon, place: usize, call: &Call<'_>, before: Option<Owner>) {
    match call {
        Call::Register { .. } => daemon.owner_changed(place, before.as_ref()),
        Call::AcquireResource { .. } => daemon.watch_owner(place),
        _ => (),
    }
}

fn log_refused(connection: &Connection, what: &str, error: &Error) {
    tracing::error!(
        target: "rpc.netserverclient",
        domain = error.domain.number(),
        code = error.code.number(),
        "{} ({what}, for {})", Printable(&error.message()), caller(connection)
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

/// Who calls, as an operator reads it.
pub fn caller(connection: &Connection) -> String {
    match &connection.session {
        Session::Unregistered => format!(
            "a client that has not registered, pid {}",
            connection.peer.pid
        ),
        Session::Registered(owner) | Session::Restricted(owner) => {
            format!("domain '{}', pid {}", Printable(&owner.name), owner.pid)
        }
    }
}

/// The error for a client that there is no room for.
pub fn no_room(reason: NoRoom, limit: u32) -> Error {
    match reason {
        NoRoom::Limit => rpc(format!(
            "Too many clients: the limit of {limit} is reached; raise max_clients or try again later"
        )),
        NoRoom::Descriptors => rpc(
            "Too many open files: the lock daemon has no descriptors left for another client; \
             raise its limit of open files or try again later",
        ),
    }
}
