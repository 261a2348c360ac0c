//! The status program: what is held and by whom, in pages; how often what happened; and who is to be told
//! of what happens. It changes nothing but the last, and a call does a small piece of work, however much
//! there is to tell.

mod lists;
mod news;

pub use news::tell;

use crate::custody::clients::ClientId;
use crate::custody::counters::Counter;
use crate::custody::servers::Service;
use crate::host::{clock, process};
use crate::log::Printable;
use crate::server::flow::{Flow, flow};
use crate::server::hall::Hall;
use crate::wire::error::{self, Code, Domain, Error};
use crate::wire::frame::{self, Header};
use crate::wire::status::{self, Call, Counted, Daemon, Kind, Procedure};

/// So many clients are told of what happens. Each costs something whenever anything does.
const MOST_SUBSCRIBERS: usize = 32;

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
        Some(procedure) => match status::decode(procedure, payload) {
            Err(_) => Err(error::undecodable()),
            Ok((_, flags)) if flags != 0 => {
                Err(Error::flags(Domain::Admin, procedure.function(), flags))
            }
            Ok((call, _)) => serve(hall, id, call, header, out),
        },
    };
    if let Err(error) = result {
        let client = hall.custody.state().client(id);
        tracing::error!(
            target: "admin.admin_server",
            domain = error.domain.number(),
            code = error.code.number(),
            "{} (status procedure {}, for the admin client with pid {})",
            Printable(&error.message()),
            header.procedure,
            client.map(|client| client.peer().pid).unwrap_or_default()
        );
        error.encode_reply(out, header);
    }
    flow(out)
}

fn serve(
    hall: &mut Hall<'_>,
    id: ClientId,
    call: Call<'_>,
    header: Header,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    match call {
        Call::Daemon => daemon(hall).encode_reply(out, header),
        Call::Counters => counters(hall, header, out),
        Call::Lockspaces(after) => lists::lockspaces(hall.custody, after, header, out),
        Call::Resources(from) => lists::resources(hall.custody, from, header, out)?,
        Call::Owners(from) => lists::owners(hall.custody, from, header, out)?,
        Call::Holders(target, after) => lists::holders(hall.custody, target, after, header, out),
        Call::File { device, inode } => {
            lists::file(hall.custody, (device, inode), header, out);
        }
        Call::Resource(target) => lists::resource(hall.custody, target, header, out),
        Call::Subscribe(kinds) => {
            let known = Kind::ALL
                .into_iter()
                .fold(0, |known, kind| known | kind.bit());
            if kinds & !known != 0 {
                let procedure = Procedure::Subscribe.function();
                return Err(Error::flags(Domain::Admin, procedure, kinds & !known));
            }
            let subscribers = hall.custody.state().subscribers();
            if subscribers.len() >= MOST_SUBSCRIBERS && !subscribers.contains(&id) && kinds != 0 {
                let detail = format!("there are {MOST_SUBSCRIBERS} subscribers already");
                return Err(Error::new(Code::OperationInvalid, Domain::Admin, detail));
            }
            hall.custody.subscribes(id, kinds);
            frame::encode(out, header.reply(frame::STATUS_OK), |_| ());
        }
    }
    Ok(())
}

fn daemon(hall: &Hall<'_>) -> Daemon<'static> {
    let custody = &*hall.custody;
    let state = custody.state();
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Daemon {
        version: env!("CARGO_PKG_VERSION").as_bytes(),
        pid: process::started().cast_signed(),
        now: clock::wall_ms(),
        serves_since: custody.begun_at(),
        resources: state.table().len() as u64,
        left: state.left_count() as u64,
        fenced: number(state.fences().len()),
        lockspaces: number(state.lockspaces().count()),
        lock_clients: number(state.served_count(Service::Lock)),
        admin_clients: number(state.served_count(Service::Admin)),
    }
}

fn counters(hall: &Hall<'_>, header: Header, out: &mut Vec<u8>) {
    frame::encode(out, header.reply(frame::STATUS_OK), |out| {
        for counter in Counter::ALL {
            out.u32(1);
            let counted = Counted {
                name: counter.name().as_bytes(),
                count: hall.custody.counted(counter),
            };
            counted.encode(out);
        }
        out.u32(0);
    });
}
