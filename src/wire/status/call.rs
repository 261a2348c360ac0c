//! Calls and their arguments, which are borrowed from the bytes that came in.

use super::program::{PROGRAM, Procedure, STRING_LIMIT, VERSION};
use crate::wire::frame::{self, Header, Kind};
use crate::wire::lock::Target;
use crate::wire::xdr::{DecodeError, Decoder, Encoder};

/// Where a list goes on. The first page begins at [`Cursor::START`], every other one where the page before
/// says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Which list it is: a daemon that has been replaced has another one. 0 for any.
    pub list: u64,
    /// The place in it.
    pub place: u64,
}

impl Cursor {
    /// The beginning of any list.
    pub const START: Cursor = Cursor { list: 0, place: 0 };

    pub(super) fn decode(from: &mut Decoder<'_>) -> Result<Cursor, DecodeError> {
        Ok(Cursor {
            list: from.u64()?,
            place: from.u64()?,
        })
    }

    pub(super) fn encode(self, out: &mut Encoder<'_>) {
        out.u64(self.list).u64(self.place);
    }
}

/// What tells an owner from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The process.
    pub pid: i32,
    /// The domain; `None` where only the process is known.
    pub uuid: Option<[u8; 16]>,
}

impl Key {
    pub(super) fn decode(from: &mut Decoder<'_>) -> Result<Key, DecodeError> {
        let pid = from.i32()?;
        let uuid = match from.u32()? {
            0 => None,
            _ => Some(*from.fixed()?),
        };
        Ok(Key { pid, uuid })
    }

    pub(super) fn encode(&self, out: &mut Encoder<'_>) {
        out.i32(self.pid).u32(u32::from(self.uuid.is_some()));
        if let Some(uuid) = &self.uuid {
            out.fixed(uuid);
        }
    }
}

/// A decoded call. Flags must be 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call<'a> {
    /// [`Procedure::Daemon`]
    Daemon,
    /// [`Procedure::Counters`]
    Counters,
    /// [`Procedure::Lockspaces`]: those behind this one, or all.
    Lockspaces(Option<&'a [u8]>),
    /// [`Procedure::Resources`]
    Resources(Cursor),
    /// [`Procedure::Owners`]
    Owners(Cursor),
    /// [`Procedure::Holders`]: those behind this one, or all.
    Holders(Target<'a>, Option<Key>),
    /// [`Procedure::File`]
    File {
        /// The device of its file system, or its own if it is a block device: as the daemon compares files.
        device: u64,
        /// Its inode.
        inode: u64,
    },
    /// [`Procedure::Resource`]
    Resource(Target<'a>),
    /// [`Procedure::Subscribe`]: a bit for each kind.
    Subscribe(u32),
}

/// Decodes the arguments of `procedure`, and the flags behind them. Bytes after them are ignored.
pub fn decode(procedure: Procedure, payload: &[u8]) -> Result<(Call<'_>, u32), DecodeError> {
    let from = &mut Decoder::new(payload);
    let call = match procedure {
        Procedure::Daemon => Call::Daemon,
        Procedure::Counters => Call::Counters,
        Procedure::Lockspaces => Call::Lockspaces(from.optional_string(STRING_LIMIT)?),
        Procedure::Resources => Call::Resources(Cursor::decode(from)?),
        Procedure::Owners => Call::Owners(Cursor::decode(from)?),
        Procedure::Holders => {
            let target = target(from)?;
            let after = match from.u32()? {
                0 => None,
                _ => Some(Key::decode(from)?),
            };
            Call::Holders(target, after)
        }
        Procedure::File => Call::File {
            device: from.u64()?,
            inode: from.u64()?,
        },
        Procedure::Resource => Call::Resource(target(from)?),
        Procedure::Subscribe => Call::Subscribe(from.u32()?),
    };
    Ok((call, from.u32()?))
}

fn target<'a>(from: &mut Decoder<'a>) -> Result<Target<'a>, DecodeError> {
    Ok(Target {
        lockspace: from.string(STRING_LIMIT)?,
        name: from.string(STRING_LIMIT)?,
    })
}

impl Call<'_> {
    /// The procedure that this is a call of.
    pub fn procedure(&self) -> Procedure {
        match self {
            Call::Daemon => Procedure::Daemon,
            Call::Counters => Procedure::Counters,
            Call::Lockspaces(_) => Procedure::Lockspaces,
            Call::Resources(_) => Procedure::Resources,
            Call::Owners(_) => Procedure::Owners,
            Call::Holders(..) => Procedure::Holders,
            Call::File { .. } => Procedure::File,
            Call::Resource(_) => Procedure::Resource,
            Call::Subscribe(_) => Procedure::Subscribe,
        }
    }

    /// Appends the call as a whole frame, as a client sends it.
    pub fn encode(&self, out: &mut Vec<u8>, serial: u32) {
        let header = Header {
            program: PROGRAM,
            version: VERSION,
            procedure: self.procedure() as i32,
            kind: Kind::Call,
            serial,
            status: frame::STATUS_OK,
        };
        frame::encode(out, header, |out| {
            self.encode_arguments(out);
            out.u32(0);
        });
    }

    fn encode_arguments(&self, out: &mut Encoder<'_>) {
        match self {
            Call::Daemon | Call::Counters => (),
            Call::Lockspaces(after) => _ = out.optional_string(*after),
            Call::Resources(from) | Call::Owners(from) => from.encode(out),
            Call::Holders(target, after) => {
                out.string(target.lockspace).string(target.name);
                out.u32(u32::from(after.is_some()));
                if let Some(after) = after {
                    after.encode(out);
                }
            }
            Call::File { device, inode } => _ = out.u64(*device).u64(*inode),
            Call::Resource(target) => _ = out.string(target.lockspace).string(target.name),
            Call::Subscribe(kinds) => _ = out.u32(*kinds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{HEADER, LONGEST, Split, split};

    fn every_call() -> Vec<Call<'static>> {
        let target = Target {
            lockspace: b"/ls",
            name: b"disk",
        };
        let (known, unknown) = (Some([7; 16]), None);
        let key = |uuid| Some(Key { pid: -2, uuid });
        let cursor = Cursor {
            list: u64::MAX,
            place: 64,
        };
        vec![
            Call::Daemon,
            Call::Counters,
            Call::Lockspaces(None),
            Call::Lockspaces(Some(b"/ls")),
            Call::Resources(Cursor::START),
            Call::Owners(cursor),
            Call::Holders(target, None),
            Call::Holders(target, key(known)),
            Call::Holders(target, key(unknown)),
            Call::File {
                device: 0xfd00,
                inode: u64::MAX,
            },
            Call::Resource(target),
            Call::Subscribe(0x3ff),
        ]
    }

    #[test]
    fn every_call_is_read_back_as_it_was_written_and_not_if_it_is_cut() {
        for call in every_call() {
            let mut out = Vec::new();
            call.encode(&mut out, 3);
            let Split::Frame(frame) = split(&out, LONGEST) else {
                panic!("no frame")
            };
            let procedure = Procedure::from_number(frame.header.procedure).unwrap();
            assert_eq!(decode(procedure, frame.payload), Ok((call, 0)));
            let payload = &out[HEADER..];
            for cut in 0..payload.len() {
                assert!(
                    decode(procedure, &payload[..cut]).is_err(),
                    "{call:?} {cut}"
                );
            }
        }
        for number in [-1, 0, 10, i32::MAX] {
            assert_eq!(Procedure::from_number(number), None);
        }
    }
}
