//! The daemon's messages about what happened, to those who subscribed. They have no answer.

use super::call::Key;
use super::program::{HAPPENED, PROGRAM, STRING_LIMIT, VERSION};
use crate::wire::frame::{self, Header};
use crate::wire::xdr::{DecodeError, Decoder};

/// What happened. Its number is also that of its bit in a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The subscriber read too slowly: so many messages are missing here. Nobody needs to ask for it.
    Missed = 0,
    /// An owner registered over a connection of its own.
    Registered = 1,
    /// An owner was granted a lock.
    Granted = 2,
    /// An owner gave a lock back.
    Released = 3,
    /// An owner was refused a lock.
    Refused = 4,
    /// An owner left its locks and was sent SIGTERM.
    Fenced = 5,
    /// It was sent SIGKILL.
    Killed = 6,
    /// An owner died, and what it held is free.
    Died = 7,
    /// A new program took over.
    Upgraded = 8,
    /// Another process went on for one that died.
    Recovered = 9,
}

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Kind; 10] = [
        Kind::Missed,
        Kind::Registered,
        Kind::Granted,
        Kind::Released,
        Kind::Refused,
        Kind::Fenced,
        Kind::Killed,
        Kind::Died,
        Kind::Upgraded,
        Kind::Recovered,
    ];

    /// The kind with this number.
    pub fn from_number(number: u32) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// Its bit in a subscription.
    pub fn bit(self) -> u32 {
        1 << self as u32
    }

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Missed => "missed",
            Kind::Registered => "registered",
            Kind::Granted => "granted",
            Kind::Released => "released",
            Kind::Refused => "refused",
            Kind::Fenced => "fenced",
            Kind::Killed => "killed",
            Kind::Died => "died",
            Kind::Upgraded => "upgraded",
            Kind::Recovered => "recovered",
        }
    }
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Happened<'a> {
    /// What.
    pub kind: Kind,
    /// When, milliseconds since the epoch.
    pub at: u64,
    /// How many are missing, of [`Kind::Missed`].
    pub count: u64,
    /// To whom: what tells it from others, the domain's id and name.
    pub owner: Option<(Key, u32, &'a [u8])>,
    /// The lockspace of the resource that it is about; empty also if it is about none.
    pub lockspace: &'a [u8],
    /// The resource's name; empty if it is about none.
    pub name: &'a [u8],
    /// 1 if it was wanted alone, 2 if shared, 0 if that does not apply.
    pub mode: u32,
    /// The rest in words.
    pub text: &'a [u8],
}

impl<'a> Happened<'a> {
    /// From a message's payload.
    ///
    /// # Errors
    /// Also for a kind that a later version knows.
    pub fn decode(payload: &'a [u8]) -> Result<Happened<'a>, DecodeError> {
        let from = &mut Decoder::new(payload);
        let kind = Kind::from_number(from.u32()?).ok_or(DecodeError::UnknownVariant)?;
        let (at, count) = (from.u64()?, from.u64()?);
        let owner = match from.u32()? {
            0 => None,
            _ => Some((Key::decode(from)?, from.u32()?, from.string(STRING_LIMIT)?)),
        };
        Ok(Happened {
            kind,
            at,
            count,
            owner,
            lockspace: from.string(STRING_LIMIT)?,
            name: from.string(STRING_LIMIT)?,
            mode: from.u32()?,
            text: from.string(STRING_LIMIT)?,
        })
    }

    /// Appends the whole message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let header = Header {
            program: PROGRAM,
            version: VERSION,
            procedure: HAPPENED,
            kind: frame::Kind::Message,
            serial: 0,
            status: frame::STATUS_OK,
        };
        frame::encode(out, header, |out| {
            out.u32(self.kind as u32).u64(self.at).u64(self.count);
            out.u32(u32::from(self.owner.is_some()));
            if let Some((key, id, name)) = &self.owner {
                key.encode(out);
                out.u32(*id).string(name);
            }
            out.string(self.lockspace)
                .string(self.name)
                .u32(self.mode)
                .string(self.text);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_back_as_it_was_written_and_not_if_it_is_cut() {
        let uuid = Some([3; 16]);
        for (kind, owner) in Kind::ALL.into_iter().zip([
            None,
            Some((Key { pid: 7, uuid }, 1, &b"guest"[..])),
            Some((Key { pid: 7, uuid: None }, 0, &b""[..])),
        ]) {
            let happened = Happened {
                kind,
                at: 1_795_325_634_000,
                count: 3,
                owner,
                lockspace: b"",
                name: b"/disk\xff",
                mode: 2,
                text: b"by somebody",
            };
            let mut out = Vec::new();
            happened.encode(&mut out);
            let payload = &out[frame::HEADER..];
            assert_eq!(Happened::decode(payload), Ok(happened));
            for cut in 0..payload.len() {
                assert!(Happened::decode(&payload[..cut]).is_err(), "{cut}");
            }
        }
        let numbers = Kind::ALL.map(|kind| Kind::from_number(kind as u32));
        assert_eq!(numbers, Kind::ALL.map(Some));
    }
}
