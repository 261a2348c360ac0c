//! The lock program: eight procedures, none of which returns anything.

use super::frame::{self, Header, Kind};
use super::xdr::{DecodeError, Decoder};

/// The program number.
pub const PROGRAM: u32 = 0x0EA7_BEEF;
/// The program's version.
pub const VERSION: u32 = 1;
/// The longest string of a call, bytes.
pub const STRING_LIMIT: u32 = 65536;
/// The longest frame on the lock socket, bytes: two strings of the limit, the header and the small
/// words fit in it, so a longer one cannot be a call that anybody would want to make.
pub const LONGEST_FRAME: usize = 132 * 1024;

/// ACQUIRE_RESOURCE flag: other shared owners may hold the resource too.
pub const SHARED: u32 = 1;
/// ACQUIRE_RESOURCE flag: make the file if it is missing, remove it with the last owner.
pub const AUTOCREATE: u32 = 2;

/// A procedure of the program, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Procedure {
    /// Says who the owner is.
    Register = 1,
    /// Allows no further procedure on this connection.
    Restrict = 2,
    /// Makes a lockspace that must not exist yet.
    New = 3,
    /// Makes a resource's file.
    CreateResource = 4,
    /// Removes a resource's file.
    DeleteResource = 5,
    /// Takes a lock.
    AcquireResource = 6,
    /// Gives a lock back.
    ReleaseResource = 7,
    /// Makes a lockspace if it does not exist yet.
    CreateLockspace = 8,
}

impl Procedure {
    /// All of them, in the order of their numbers.
    pub const ALL: [Procedure; 8] = [
        Procedure::Register,
        Procedure::Restrict,
        Procedure::New,
        Procedure::CreateResource,
        Procedure::DeleteResource,
        Procedure::AcquireResource,
        Procedure::ReleaseResource,
        Procedure::CreateLockspace,
    ];

    /// The procedure with `number`, if there is one.
    pub fn from_number(number: i32) -> Option<Procedure> {
        Procedure::ALL
            .into_iter()
            .find(|procedure| *procedure as i32 == number)
    }

    /// The name that the reference daemon's error about unknown flags gives.
    pub fn function(self) -> &'static str {
        match self {
            Procedure::Register => "virLockSpaceProtocolDispatchRegister",
            Procedure::Restrict => "virLockSpaceProtocolDispatchRestrict",
            Procedure::New => "virLockSpaceProtocolDispatchNew",
            Procedure::CreateResource => "virLockSpaceProtocolDispatchCreateResource",
            Procedure::DeleteResource => "virLockSpaceProtocolDispatchDeleteResource",
            Procedure::AcquireResource => "virLockSpaceProtocolDispatchAcquireResource",
            Procedure::ReleaseResource => "virLockSpaceProtocolDispatchReleaseResource",
            Procedure::CreateLockspace => "virLockSpaceProtocolDispatchCreateLockSpace",
        }
    }
}

/// A resource within a lockspace, as a call names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// The lockspace's directory; empty for the default lockspace.
    pub lockspace: &'a [u8],
    /// The resource's name in it; in the default lockspace the path of a file.
    pub name: &'a [u8],
}

/// A decoded call. Strings are as they came, cut at their first NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call<'a> {
    /// The owner of this connection's locks.
    Register {
        /// The domain's uuid.
        uuid: &'a [u8; 16],
        /// The domain's name.
        name: &'a [u8],
        /// The domain's id; 0 is refused.
        id: u32,
        /// The process that the locks are for.
        pid: i32,
        /// Must be 0.
        flags: u32,
    },
    /// No further calls on this connection.
    Restrict {
        /// Must be 0.
        flags: u32,
    },
    /// A new lockspace.
    New {
        /// Its directory.
        path: &'a [u8],
        /// Must be 0.
        flags: u32,
    },
    /// Make a resource's file.
    CreateResource {
        /// Which.
        target: Target<'a>,
        /// Must be 0.
        flags: u32,
    },
    /// Remove a resource's file.
    DeleteResource {
        /// Which.
        target: Target<'a>,
        /// Must be 0.
        flags: u32,
    },
    /// Take a lock.
    AcquireResource {
        /// Which.
        target: Target<'a>,
        /// [`SHARED`], [`AUTOCREATE`].
        flags: u32,
    },
    /// Give a lock back.
    ReleaseResource {
        /// Which.
        target: Target<'a>,
        /// Must be 0.
        flags: u32,
    },
    /// A lockspace, new or not.
    CreateLockspace {
        /// Its directory.
        path: &'a [u8],
    },
}

/// Decodes the arguments of `procedure`. Bytes after them are ignored.
pub fn decode<'a>(procedure: Procedure, payload: &'a [u8]) -> Result<Call<'a>, DecodeError> {
    let mut decoder = Decoder::new(payload);
    let call = match procedure {
        Procedure::Register => Call::Register {
            uuid: decoder.fixed()?,
            name: decoder.string(STRING_LIMIT)?,
            id: decoder.u32()?,
            // An unsigned word on the wire, a process id in the daemon: 0xFFFFFFFE is -2.
            pid: decoder.i32()?,
            flags: decoder.u32()?,
        },
        Procedure::Restrict => Call::Restrict {
            flags: decoder.u32()?,
        },
        Procedure::New => Call::New {
            path: decoder.string(STRING_LIMIT)?,
            flags: decoder.u32()?,
        },
        Procedure::CreateResource => Call::CreateResource {
            target: target(&mut decoder)?,
            flags: decoder.u32()?,
        },
        Procedure::DeleteResource => Call::DeleteResource {
            target: target(&mut decoder)?,
            flags: decoder.u32()?,
        },
        Procedure::AcquireResource => Call::AcquireResource {
            target: target(&mut decoder)?,
            flags: decoder.u32()?,
        },
        Procedure::ReleaseResource => Call::ReleaseResource {
            target: target(&mut decoder)?,
            flags: decoder.u32()?,
        },
        Procedure::CreateLockspace => Call::CreateLockspace {
            path: decoder.string(STRING_LIMIT)?,
        },
    };
    Ok(call)
}

fn target<'a>(decoder: &mut Decoder<'a>) -> Result<Target<'a>, DecodeError> {
    Ok(Target {
        lockspace: decoder.string(STRING_LIMIT)?,
        name: decoder.string(STRING_LIMIT)?,
    })
}

impl Call<'_> {
    /// The procedure that this is a call of.
    pub fn procedure(&self) -> Procedure {
        match self {
            Call::Register { .. } => Procedure::Register,
            Call::Restrict { .. } => Procedure::Restrict,
            Call::New { .. } => Procedure::New,
            Call::CreateResource { .. } => Procedure::CreateResource,
            Call::DeleteResource { .. } => Procedure::DeleteResource,
            Call::AcquireResource { .. } => Procedure::AcquireResource,
            Call::ReleaseResource { .. } => Procedure::ReleaseResource,
            Call::CreateLockspace { .. } => Procedure::CreateLockspace,
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
        frame::encode(out, header, |payload| {
            match *self {
                Call::Register {
                    uuid,
                    name,
                    id,
                    pid,
                    flags,
                } => payload.fixed(uuid).string(name).u32(id).i32(pid).u32(flags),
                Call::Restrict { flags } => payload.u32(flags),
                Call::New { path, flags } => payload.string(path).u32(flags),
                Call::CreateResource { target, flags }
                | Call::DeleteResource { target, flags }
                | Call::AcquireResource { target, flags }
                | Call::ReleaseResource { target, flags } => payload
                    .string(target.lockspace)
                    .string(target.name)
                    .u32(flags),
                Call::CreateLockspace { path } => payload.string(path),
            };
        });
    }
}

/// Appends the reply to a call that succeeded: a header and nothing else.
pub fn encode_success(out: &mut Vec<u8>, header: Header) {
    frame::encode(out, header.reply(frame::STATUS_OK), |_| ());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{LONGEST, Split, split};

    fn every_call() -> Vec<Call<'static>> {
        let target = Target {
            lockspace: b"/ls",
            name: b"disk",
        };
        let uuid = &[7; 16];
        vec![
            Call::Register {
                uuid,
                name: b"guest",
                id: 7,
                pid: -2,
                flags: 0,
            },
            Call::Restrict { flags: 1 },
            Call::New {
                path: b"/ls",
                flags: 0,
            },
            Call::CreateResource { target, flags: 0 },
            Call::DeleteResource { target, flags: 0 },
            Call::AcquireResource {
                target,
                flags: SHARED | AUTOCREATE,
            },
            Call::ReleaseResource { target, flags: 0 },
            Call::CreateLockspace { path: b"" },
        ]
    }

    #[test]
    fn every_call_is_read_back_as_it_was_written() {
        for call in every_call() {
            let mut out = Vec::new();
            call.encode(&mut out, 3);
            let Split::Frame(frame) = split(&out, LONGEST) else {
                panic!("no frame")
            };
            let procedure = Procedure::from_number(frame.header.procedure).unwrap();
            assert_eq!(decode(procedure, frame.payload), Ok(call));
        }
    }

    #[test]
    fn every_call_cut_anywhere_does_not_decode() {
        for call in every_call() {
            let mut out = Vec::new();
            call.encode(&mut out, 3);
            let payload = &out[frame::HEADER..];
            for cut in 0..payload.len() {
                assert!(
                    decode(call.procedure(), &payload[..cut]).is_err(),
                    "{call:?} {cut}"
                );
            }
        }
    }

    #[test]
    fn the_longest_call_fits_the_longest_frame() {
        let text = vec![b'x'; STRING_LIMIT as usize];
        let target = Target {
            lockspace: &text,
            name: &text,
        };
        let mut out = Vec::new();
        Call::AcquireResource { target, flags: 0 }.encode(&mut out, 0);
        // Four more for the count of a call with descriptors.
        assert!(out.len() + 4 <= LONGEST_FRAME);
    }

    #[test]
    fn numbers_outside_1_to_8_are_no_procedures() {
        for number in [-1, 0, 9, i32::MAX] {
            assert_eq!(Procedure::from_number(number), None);
        }
    }
}
