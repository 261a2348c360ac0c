//! What the procedures return. Rows of a list stand behind each other, each with a word in front of it that
//! says that there is one; so a page needs not be counted before it is written.

use super::call::{Cursor, Key};
use super::program::STRING_LIMIT;
use crate::wire::frame::{self, Header};
use crate::wire::xdr::{DecodeError, Decoder, Encoder};

/// What the daemon is, and how much of everything it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Daemon<'a> {
    /// Its version.
    pub version: &'a [u8],
    /// The process that was started.
    pub pid: i32,
    /// What time it is there, milliseconds since the epoch; all times are so.
    pub now: u64,
    /// Since when the process that serves does.
    pub serves_since: u64,
    /// Resources that are held.
    pub resources: u64,
    /// Files that dead owners left and that are being freed.
    pub left: u64,
    /// Owners that are being fenced.
    pub fenced: u32,
    /// Lockspaces, the default one not among them.
    pub lockspaces: u32,
    /// Clients of the lock socket.
    pub lock_clients: u32,
    /// Clients of the admin socket.
    pub admin_clients: u32,
}

impl<'a> Daemon<'a> {
    /// From a reply's payload.
    pub fn decode(payload: &'a [u8]) -> Result<Daemon<'a>, DecodeError> {
        let from = &mut Decoder::new(payload);
        Ok(Daemon {
            version: from.string(STRING_LIMIT)?,
            pid: from.i32()?,
            now: from.u64()?,
            serves_since: from.u64()?,
            resources: from.u64()?,
            left: from.u64()?,
            fenced: from.u32()?,
            lockspaces: from.u32()?,
            lock_clients: from.u32()?,
            admin_clients: from.u32()?,
        })
    }

    /// Appends the whole reply.
    pub fn encode_reply(&self, out: &mut Vec<u8>, header: Header) {
        frame::encode(out, header.reply(frame::STATUS_OK), |out| {
            out.string(self.version)
                .i32(self.pid)
                .u64(self.now)
                .u64(self.serves_since)
                .u64(self.resources)
                .u64(self.left)
                .u32(self.fenced)
                .u32(self.lockspaces)
                .u32(self.lock_clients)
                .u32(self.admin_clients);
        });
    }
}

/// How often something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted<'a> {
    /// What.
    pub name: &'a [u8],
    /// How often.
    pub count: u64,
}

impl<'a> Counted<'a> {
    /// A row.
    pub fn decode(from: &mut Decoder<'a>) -> Result<Counted<'a>, DecodeError> {
        Ok(Counted {
            name: from.string(STRING_LIMIT)?,
            count: from.u64()?,
        })
    }

    /// A row.
    pub fn encode(&self, out: &mut Encoder<'_>) {
        out.string(self.name).u64(self.count);
    }
}

/// An owner, as the daemon knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner<'a> {
    /// What tells it from every other.
    pub key: Key,
    /// The domain's id; 0 where only the process is known.
    pub id: u32,
    /// The domain's name.
    pub name: &'a [u8],
    /// Since when: of one with a connection of its own since it registered. 0 if nobody knows.
    pub since: u64,
    /// How many resources it holds.
    pub held: u32,
    /// How the daemon knows of its end: the sum of the bits below.
    pub standing: u32,
}

/// It has a connection of its own.
pub const CONNECTED: u32 = 1;
/// It has none, and its process is watched.
pub const WATCHED: u32 = 2;
/// It has none, and its process cannot be seen: its death frees nothing.
pub const UNSEEN: u32 = 4;
/// It left its locks and is being killed.
pub const FENCED: u32 = 8;
/// It is to be killed and cannot be reached.
pub const UNREACHABLE: u32 = 16;

impl<'a> Owner<'a> {
    /// A row.
    pub fn decode(from: &mut Decoder<'a>) -> Result<Owner<'a>, DecodeError> {
        Ok(Owner {
            key: Key::decode(from)?,
            id: from.u32()?,
            name: from.string(STRING_LIMIT)?,
            since: from.u64()?,
            held: from.u32()?,
            standing: from.u32()?,
        })
    }

    /// A row.
    pub fn encode(&self, out: &mut Encoder<'_>) {
        self.key.encode(out);
        out.u32(self.id)
            .string(self.name)
            .u64(self.since)
            .u32(self.held)
            .u32(self.standing);
    }
}

/// Somebody who holds a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder<'a> {
    /// Who.
    pub owner: Owner<'a>,
    /// How often.
    pub times: u32,
}

impl<'a> Holder<'a> {
    /// A row.
    pub fn decode(from: &mut Decoder<'a>) -> Result<Holder<'a>, DecodeError> {
        Ok(Holder {
            owner: Owner::decode(from)?,
            times: from.u32()?,
        })
    }

    /// A row.
    pub fn encode(&self, out: &mut Encoder<'_>) {
        self.owner.encode(out);
        out.u32(self.times);
    }
}

/// A resource that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource<'a> {
    /// The lockspace's directory; empty for the default one.
    pub lockspace: &'a [u8],
    /// The name there.
    pub name: &'a [u8],
    /// The file's device; 0 if the daemon could not ask.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Whether others may hold it, too.
    pub is_shared: bool,
    /// When it was locked; 0 if nobody knows.
    pub since: u64,
    /// How many hold it.
    pub holders: u32,
}

impl<'a> Resource<'a> {
    /// A row without those who hold it, of whom the first few follow as a list.
    pub fn decode(from: &mut Decoder<'a>) -> Result<Resource<'a>, DecodeError> {
        Ok(Resource {
            lockspace: from.string(STRING_LIMIT)?,
            name: from.string(STRING_LIMIT)?,
            device: from.u64()?,
            inode: from.u64()?,
            is_shared: from.u32()? != 0,
            since: from.u64()?,
            holders: from.u32()?,
        })
    }

    /// A row, and the first few who hold it.
    pub fn encode<'h>(&self, out: &mut Encoder<'_>, holders: impl Iterator<Item = Holder<'h>>) {
        out.string(self.lockspace)
            .string(self.name)
            .u64(self.device)
            .u64(self.inode)
            .u32(u32::from(self.is_shared))
            .u64(self.since)
            .u32(self.holders);
        for holder in holders {
            out.u32(1);
            holder.encode(out);
        }
        out.u32(0);
    }
}

/// The rest of a list.
pub fn decode_list<'a, T>(
    from: &mut Decoder<'a>,
    mut row: impl FnMut(&mut Decoder<'a>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let mut rows = Vec::new();
    while from.u32()? != 0 {
        rows.push(row(from)?);
    }
    Ok(rows)
}

/// Where the next page of a list begins, from what stands behind this one's rows; `None` behind the last.
pub fn decode_next(from: &mut Decoder<'_>) -> Result<Option<Cursor>, DecodeError> {
    match from.u32()? {
        0 => Ok(None),
        _ => Cursor::decode(from).map(Some),
    }
}

/// What stands behind the rows of a page.
pub fn encode_next(out: &mut Encoder<'_>, next: Option<Cursor>) {
    out.u32(0).u32(u32::from(next.is_some()));
    if let Some(next) = next {
        next.encode(out);
    }
}
