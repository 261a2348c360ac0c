//! The wire protocol as a client speaks it, written from its description alone and not with the
//! crate's own encoder: a mistake there must not be repeated here. Tests and benches share this
//! file. It knows no sockets, and nothing of the crate or of the rest of the support library.
//!
//! A message is a length word (it counts itself), six words of header, a payload; integers are
//! big-endian and every item fills whole words of four bytes.

pub const LOCK_PROGRAM: u32 = 0x0EA7_BEEF;
pub const ADMIN_PROGRAM: u32 = 0x0690_0690;
pub const STATUS_PROGRAM: u32 = 0x564c_5354;
pub const KEEPALIVE_PROGRAM: u32 = 0x6b65_6570;

/// Message types.
pub const CALL: i32 = 0;
pub const REPLY: i32 = 1;
pub const MESSAGE: i32 = 2;
pub const CALL_WITH_FDS: i32 = 4;

/// Statuses of a reply.
pub const STATUS_OK: i32 = 0;
pub const STATUS_ERROR: i32 = 1;

/// Procedures of the lock program.
pub const REGISTER: i32 = 1;
pub const RESTRICT: i32 = 2;
pub const NEW: i32 = 3;
pub const CREATE_RESOURCE: i32 = 4;
pub const DELETE_RESOURCE: i32 = 5;
pub const ACQUIRE: i32 = 6;
pub const RELEASE: i32 = 7;
pub const CREATE_LOCKSPACE: i32 = 8;

/// The look-up of a server, the first procedure that a client of the admin program calls.
pub const LOOKUP_SERVER: i32 = 5;

/// Lists of the status program.
pub const RESOURCES: i32 = 4;
pub const OWNERS: i32 = 5;

/// Flags of ACQUIRE_RESOURCE.
pub const SHARED: u32 = 1;
pub const AUTOCREATE: u32 = 2;

/// Error codes.
pub const INTERNAL_ERROR: i32 = 1;
pub const INVALID_ARG: i32 = 8;
pub const OPERATION_DENIED: i32 = 29;
pub const SYSTEM_ERROR: i32 = 38;
pub const RPC_ERROR: i32 = 39;
pub const OPERATION_INVALID: i32 = 55;
pub const RESOURCE_BUSY: i32 = 87;

/// Error domains.
pub const DOMAIN_NONE: i32 = 0;
pub const DOMAIN_RPC: i32 = 7;
pub const DOMAIN_LOCKSPACE: i32 = 51;

/// Bytes of the length word and the header: a whole message that has no payload.
pub const HEADER_BYTES: usize = 28;

/// Where the words in front of a payload stand.
pub mod at {
    pub const LENGTH: usize = 0;
    pub const PROGRAM: usize = 4;
    pub const VERSION: usize = 8;
    pub const PROCEDURE: usize = 12;
    pub const TYPE: usize = 16;
    pub const SERIAL: usize = 20;
    pub const STATUS: usize = 24;
}

/// The word at this place. Panics where the bytes end before it does.
pub fn word(bytes: &[u8], at: usize) -> u32 {
    let rest = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u32::from_be_bytes(*rest.expect("a whole word"))
}

/// Puts another word in this place of an encoded message.
pub fn set_word(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// The length that a message gives itself, as soon as its length word is there.
pub fn length_word(bytes: &[u8]) -> Option<usize> {
    let word = bytes.first_chunk()?;
    Some(u32::from_be_bytes(*word) as usize)
}

/// Any message, with a correct length word.
pub fn frame(
    program: u32,
    version: u32,
    procedure: i32,
    kind: i32,
    serial: u32,
    status: i32,
    payload: &[u8],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    put_u32(
        &mut out,
        u32::try_from(HEADER_BYTES + payload.len()).expect("a message fits in 4 GiB"),
    );
    put_u32(&mut out, program);
    put_u32(&mut out, version);
    put_u32(&mut out, procedure as u32);
    put_u32(&mut out, kind as u32);
    put_u32(&mut out, serial);
    put_u32(&mut out, status as u32);
    out.extend_from_slice(payload);
    out
}

pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// A counted string, padded with zeros to a multiple of four bytes.
pub fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(
        out,
        u32::try_from(bytes.len()).expect("a string fits in 4 GiB"),
    );
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The call to the keepalive program that every daemon answers with [`PONG`].
pub const PING: [u8; HEADER_BYTES] = keepalive(1);
/// The answer to [`PING`].
pub const PONG: [u8; HEADER_BYTES] = keepalive(2);

const fn keepalive(procedure: u8) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[3] = 28;
    (bytes[4], bytes[5], bytes[6], bytes[7]) = (b'k', b'e', b'e', b'p');
    bytes[11] = 1;
    bytes[15] = procedure;
    bytes[19] = MESSAGE as u8;
    bytes
}

/// A call of the lock program. Strings are bytes, because the protocol does not ask for UTF-8; a
/// test owns those of its calls (`Vec<u8>`), a bench borrows them (`&[u8]`).
#[derive(Clone, PartialEq, Eq)]
pub enum Call<Bytes> {
    Register {
        uuid: [u8; 16],
        name: Bytes,
        id: u32,
        pid: u32,
        flags: u32,
    },
    Restrict {
        flags: u32,
    },
    New {
        path: Bytes,
        flags: u32,
    },
    CreateResource {
        path: Bytes,
        name: Bytes,
        flags: u32,
    },
    DeleteResource {
        path: Bytes,
        name: Bytes,
        flags: u32,
    },
    Acquire {
        path: Bytes,
        name: Bytes,
        flags: u32,
    },
    Release {
        path: Bytes,
        name: Bytes,
        flags: u32,
    },
    CreateLockspace {
        path: Bytes,
    },
}

impl<Bytes: AsRef<[u8]>> Call<Bytes> {
    pub fn procedure(&self) -> i32 {
        match self {
            Call::Register { .. } => REGISTER,
            Call::Restrict { .. } => RESTRICT,
            Call::New { .. } => NEW,
            Call::CreateResource { .. } => CREATE_RESOURCE,
            Call::DeleteResource { .. } => DELETE_RESOURCE,
            Call::Acquire { .. } => ACQUIRE,
            Call::Release { .. } => RELEASE,
            Call::CreateLockspace { .. } => CREATE_LOCKSPACE,
        }
    }

    /// The arguments as they stand on the wire.
    pub fn payload(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Call::Register {
                uuid,
                name,
                id,
                pid,
                flags,
            } => {
                out.extend_from_slice(uuid);
                put_string(&mut out, name.as_ref());
                put_u32(&mut out, *id);
                put_u32(&mut out, *pid);
                put_u32(&mut out, *flags);
            }
            Call::Restrict { flags } => put_u32(&mut out, *flags),
            Call::New { path, flags } => {
                put_string(&mut out, path.as_ref());
                put_u32(&mut out, *flags);
            }
            Call::CreateResource { path, name, flags }
            | Call::DeleteResource { path, name, flags }
            | Call::Acquire { path, name, flags }
            | Call::Release { path, name, flags } => {
                put_string(&mut out, path.as_ref());
                put_string(&mut out, name.as_ref());
                put_u32(&mut out, *flags);
            }
            Call::CreateLockspace { path } => put_string(&mut out, path.as_ref()),
        }
        out
    }

    /// The whole message.
    pub fn frame(&self, serial: u32) -> Vec<u8> {
        frame(
            LOCK_PROGRAM,
            1,
            self.procedure(),
            CALL,
            serial,
            STATUS_OK,
            &self.payload(),
        )
    }
}

/// What a refused call gets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ErrorObject {
    pub code: i32,
    pub domain: i32,
    pub message: String,
    pub level: i32,
    pub str1: Option<String>,
    pub str2: Option<String>,
    pub int1: i32,
    pub int2: i32,
}

impl ErrorObject {
    /// Takes the payload of an error reply apart, or says what is wrong with it.
    pub fn parse(payload: &[u8]) -> Result<Self, &'static str> {
        let mut reader = Reader::new(payload);
        let code = reader.u32()? as i32;
        let domain = reader.u32()? as i32;
        let message = reader
            .optional_string()?
            .ok_or("the error has no message")?;
        let level = reader.u32()? as i32;
        if reader.u32()? != 0 {
            return Err("the error names a domain object");
        }
        let (str1, str2) = (reader.optional_string()?, reader.optional_string()?);
        if reader.u32()? != 0 {
            return Err("the error has a third string");
        }
        let (int1, int2) = (reader.u32()? as i32, reader.u32()? as i32);
        if reader.u32()? != 0 {
            return Err("the error names a network object");
        }
        if reader.at != payload.len() {
            return Err("bytes stand behind the error object");
        }
        Ok(Self {
            code,
            domain,
            message,
            level,
            str1,
            str2,
            int1,
            int2,
        })
    }
}

/// Reads one item after the other; says what is wrong where that cannot be.
pub struct Reader<'a> {
    bytes: &'a [u8],
    /// Where the next item starts.
    pub at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub fn u32(&mut self) -> Result<u32, &'static str> {
        let rest = self.bytes.get(self.at..);
        let word = rest.and_then(|rest| rest.first_chunk());
        let word = word.ok_or("the bytes end before an item does")?;
        self.at += 4;
        Ok(u32::from_be_bytes(*word))
    }

    /// Where the bytes of an optional string are.
    pub fn optional_bytes(&mut self) -> Result<Option<std::ops::Range<usize>>, &'static str> {
        if self.u32()? == 0 {
            return Ok(None);
        }
        let length = self.u32()? as usize;
        let place = self.at..self.at + length;
        if self.bytes.get(place.clone()).is_none() {
            return Err("the bytes end inside a string");
        }
        self.at += length.next_multiple_of(4);
        Ok(Some(place))
    }

    pub fn optional_string(&mut self) -> Result<Option<String>, &'static str> {
        let place = self.optional_bytes()?;
        Ok(place.map(|place| String::from_utf8_lossy(&self.bytes[place]).into_owned()))
    }
}
