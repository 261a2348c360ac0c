//! Lists of what is held and by whom, a page at a time. A page looks at so many places of the table, or has
//! so many bytes, and then says where the next one begins. Whoever is at a place all the time while the
//! pages are fetched is listed once, whatever comes and goes meanwhile: things keep their places.

use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::descriptor::Open;
use crate::custody::servers::Service;
use crate::custody::state::State;
use crate::host::file::{FileIdentity, Lockable};
use crate::locks::lease::Lease;
use crate::locks::table;
use crate::wire::error::{Code, Domain, Error};
use crate::wire::frame::{self, Header};
use crate::wire::lock::Target;
use crate::wire::status::{
    CONNECTED, Cursor, FENCED, Holder, Key, Owner, Resource, UNREACHABLE, UNSEEN, WATCHED,
    encode_next,
};
use crate::wire::xdr::Encoder;

/// So many places are looked at for a page.
const PLACES: usize = 512;
/// So many rows are in it,
const ROWS: usize = 64;
/// and when it has so many bytes there is no further one.
const BYTES: usize = 32 * 1024;
/// So many of those who hold a resource stand with it; the others have a list of their own.
const HOLDERS: usize = 8;
/// So many resources of one file are told of. Only what libvirt's daemon granted can be more than one.
const NAMES: usize = 64;

type Held = table::Resource<Lease<Lockable>>;

/// How far a page has come.
struct Page {
    start: usize,
    rows: usize,
}

impl Page {
    fn begin(out: &[u8]) -> Page {
        Page {
            start: out.len(),
            rows: 0,
        }
    }

    fn is_full(&self, length: usize) -> bool {
        self.rows >= ROWS || length.saturating_sub(self.start) >= BYTES
    }

    fn row(&mut self, out: &mut Encoder<'_>) {
        self.rows = self.rows.saturating_add(1);
        out.u32(1);
    }
}

fn reply(out: &mut Vec<u8>, header: Header, rows: impl FnOnce(&mut Encoder<'_>)) {
    frame::encode(out, header.reply(frame::STATUS_OK), rows);
}

/// Where a list that is asked for begins.
fn place(custody: &Custody, from: Cursor) -> Result<usize, Error> {
    if from != Cursor::START && from.list != custody.begun_at() {
        let detail = "the list is another one since the daemon was replaced: begin anew";
        return Err(Error::new(Code::OperationInvalid, Domain::Admin, detail));
    }
    Ok(usize::try_from(from.place).unwrap_or(usize::MAX))
}

/// Writes a page of what is at these places, from `from` on.
fn places(
    custody: &Custody,
    (from, end): (usize, usize),
    header: Header,
    out: &mut Vec<u8>,
    mut row: impl FnMut(usize, &mut Page, &mut Encoder<'_>),
) {
    let mut page = Page::begin(out);
    reply(out, header, |out| {
        let mut next = from;
        while next < end && next.saturating_sub(from) < PLACES && !page.is_full(out.length()) {
            row(next, &mut page, out);
            next = next.saturating_add(1);
        }
        let next = (next < end).then_some(Cursor {
            list: custody.begun_at(),
            place: next as u64,
        });
        encode_next(out, next);
    });
}

/// What is held.
///
/// # Errors
/// If the list is another one by now.
pub fn resources(
    custody: &Custody,
    from: Cursor,
    header: Header,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let state = custody.state();
    let range = (place(custody, from)?, state.table().places());
    places(custody, range, header, out, |place, page, out| {
        if let Some(held) = state.table().at(place) {
            page.row(out);
            encode_resource(state, held, out);
        }
    });
    Ok(())
}

/// The owners that have a connection of their own.
///
/// # Errors
/// If the list is another one by now.
pub fn owners(
    custody: &Custody,
    from: Cursor,
    header: Header,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let state = custody.state();
    let range = (place(custody, from)?, state.client_end());
    places(custody, range, header, out, |place, page, out| {
        let client = i32::try_from(place).ok();
        let client = client.and_then(|number| state.client(ClientId(number)));
        let client = client.filter(|it| it.arrival.server == Service::Lock && !it.is_over());
        if let Some(client) = client
            && let Some(own) = client.own_owner()
        {
            page.row(out);
            let since = client.registered_at;
            owner(state, own, since).encode(out);
        }
    });
    Ok(())
}

/// All who hold one resource, in the order of what tells them apart.
pub fn holders(
    custody: &mut Custody,
    target: Target<'_>,
    after: Option<Key>,
    header: Header,
    out: &mut Vec<u8>,
) {
    let id = custody.find(target.lockspace, target.name);
    let state = custody.state();
    let held = id.and_then(|id| state.table().get(id));
    let after = after.map(|Key { pid, uuid }| table::OwnerKey { pid, uuid });
    let mut page = Page::begin(out);
    reply(out, header, |out| {
        let mut rest = held.into_iter().flat_map(|held| held.holders_behind(after));
        let mut is_last = true;
        for (key, times) in rest.by_ref() {
            if page.is_full(out.length()) {
                is_last = false;
                break;
            }
            page.row(out);
            holder(state, key, times).encode(out);
        }
        out.u32(0).u32(u32::from(!is_last));
    });
}

/// What is held of one file.
pub fn file(custody: &Custody, (device, inode): (u64, u64), header: Header, out: &mut Vec<u8>) {
    let state = custody.state();
    let same = state.table().same_file(FileIdentity { device, inode });
    reply(out, header, |out| {
        for held in same.take(NAMES).filter_map(|id| state.table().get(id)) {
            out.u32(1);
            encode_resource(state, held, out);
        }
        out.u32(0);
    });
}

/// One resource, if it is held.
pub fn resource(custody: &mut Custody, target: Target<'_>, header: Header, out: &mut Vec<u8>) {
    let id = custody.find(target.lockspace, target.name);
    let state = custody.state();
    reply(out, header, |out| {
        if let Some(held) = id.and_then(|id| state.table().get(id)) {
            out.u32(1);
            encode_resource(state, held, out);
        }
        out.u32(0);
    });
}

/// The lockspaces, in the order of their names.
pub fn lockspaces(custody: &Custody, after: Option<&[u8]>, header: Header, out: &mut Vec<u8>) {
    let mut page = Page::begin(out);
    reply(out, header, |out| {
        let mut is_last = true;
        for directory in custody.state().lockspaces_behind(after) {
            if page.is_full(out.length()) {
                is_last = false;
                break;
            }
            page.row(out);
            out.string(directory);
        }
        out.u32(0).u32(u32::from(!is_last));
    });
}

fn encode_resource(state: &State<Open>, held: &Held, out: &mut Encoder<'_>) {
    let FileIdentity { device, inode } = held.identity;
    let resource = Resource {
        lockspace: held.lockspace(),
        name: held.name(),
        device,
        inode,
        is_shared: held.mode == table::Mode::Shared,
        since: held.since,
        holders: u32::try_from(held.holder_count()).unwrap_or(u32::MAX),
    };
    let holders = held.holders_behind(None).take(HOLDERS);
    resource.encode(out, holders.map(|(key, times)| holder(state, key, times)));
}

fn holder(state: &State<Open>, key: table::OwnerKey, times: u32) -> Holder<'_> {
    let owner = match state.table().owner(key) {
        Some(known) => owner(state, known, 0),
        None => Owner {
            key: Key {
                pid: key.pid,
                uuid: key.uuid,
            },
            id: 0,
            name: b"",
            since: 0,
            held: 1,
            standing: 0,
        },
    };
    Holder { owner, times }
}

fn owner<'a>(state: &'a State<Open>, owner: &'a table::Owner, since: u64) -> Owner<'a> {
    let key = owner.key();
    let watched = state.watched().get(&key.pid);
    let standing = [
        (CONNECTED, state.has_own_connection(key.pid, &owner.uuid)),
        (WATCHED, watched.is_some_and(|it| it.process.is_some())),
        (UNSEEN, watched.is_some_and(|it| it.process.is_none())),
        (FENCED, state.fences().contains_key(&key.pid)),
        (UNREACHABLE, state.is_unreachable(key.pid)),
    ];
    let standing = standing.into_iter().filter(|(_, is_so)| *is_so);
    Owner {
        key: Key {
            pid: key.pid,
            uuid: key.uuid,
        },
        id: owner.id,
        name: &owner.name,
        since,
        held: u32::try_from(state.table().held_by(key)).unwrap_or(u32::MAX),
        standing: standing.fold(0, |all, (bit, _)| all | bit),
    }
}
