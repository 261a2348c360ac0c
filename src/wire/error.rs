//! The error object of a failed reply: its codes, domains and shapes.

use super::frame::{self, Header};
use super::xdr::{DecodeError, Decoder, Encoder};
use crate::host::errno::{self, Errno};

/// The longest string of an error object, bytes.
pub const STRING_LIMIT: u32 = 4_194_304;

/// What went wrong (`virErrorNumber`). The names are libvirt's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// 1
    InternalError,
    /// 8
    InvalidArgument,
    /// 29
    OperationDenied,
    /// 38: a system call failed; the error object carries its errno.
    SystemError,
    /// 39
    Rpc,
    /// 55
    OperationInvalid,
    /// 74
    ArgumentUnsupported,
    /// 87
    ResourceBusy,
    /// 95
    NoServer,
    /// 96
    NoClient,
}

impl Code {
    /// The number on the wire.
    pub fn number(self) -> i32 {
        match self {
            Code::InternalError => 1,
            Code::InvalidArgument => 8,
            Code::OperationDenied => 29,
            Code::SystemError => 38,
            Code::Rpc => 39,
            Code::OperationInvalid => 55,
            Code::ArgumentUnsupported => 74,
            Code::ResourceBusy => 87,
            Code::NoServer => 95,
            Code::NoClient => 96,
        }
    }

    /// What stands before the detail in the message; nothing for two of the codes.
    fn prefix(self) -> Option<&'static str> {
        match self {
            Code::InternalError => Some("internal error"),
            Code::InvalidArgument => Some("invalid argument"),
            Code::OperationDenied => Some("operation forbidden"),
            Code::OperationInvalid => Some("Requested operation is not valid"),
            Code::ArgumentUnsupported => Some("argument unsupported"),
            Code::ResourceBusy => Some("resource busy"),
            Code::NoServer => Some("Server not found"),
            Code::NoClient => Some("Client not found"),
            Code::SystemError | Code::Rpc => None,
        }
    }
}

/// Which part of the daemon speaks (`virErrorDomain`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// 0: helper modules (file creation, log settings, parameters, thread pool).
    None,
    /// 7: framing, dispatch and the checks before a lock procedure.
    Rpc,
    /// 51: the lock procedures.
    Lockspace,
    /// 62: the admin procedures.
    Admin,
}

impl Domain {
    /// The number on the wire.
    pub fn number(self) -> i32 {
        match self {
            Domain::None => 0,
            Domain::Rpc => 7,
            Domain::Lockspace => 51,
            Domain::Admin => 62,
        }
    }
}

/// What a failed call is answered with. Texts are bytes: names from outside go in unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub code: Code,
    /// Who says so.
    pub domain: Domain,
    /// The text after the code's prefix.
    pub detail: Vec<u8>,
    /// What the other fields of the object hold.
    pub shape: Shape,
}

/// The shapes of an error object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The message is the detail, with the prefix of the code if it has one.
    Plain,
    /// A system call failed with this errno.
    System(i32),
    /// Unknown bits in a flags word of the named function.
    Flags(&'static str),
}

impl Error {
    /// An error whose message is the code's prefix and `detail`.
    pub fn new(code: Code, domain: Domain, detail: impl Into<Vec<u8>>) -> Error {
        Error {
            code,
            domain,
            detail: detail.into(),
            shape: Shape::Plain,
        }
    }

    /// A system call failed: `what` was attempted, the kernel's text follows it.
    pub fn system(domain: Domain, what: &[u8], errno: Errno) -> Error {
        let detail = [what, b": ", errno::text(errno).as_bytes()].concat();
        let shape = Shape::System(errno.number());
        Error {
            code: Code::SystemError,
            domain,
            detail,
            shape,
        }
    }

    /// `flags` has bits that `function` does not know.
    pub fn flags(domain: Domain, function: &'static str, unknown: u32) -> Error {
        let detail = format!("unsupported flags (0x{unknown:x}) in function {function}");
        let shape = Shape::Flags(function);
        Error {
            code: Code::InvalidArgument,
            domain,
            detail: detail.into(),
            shape,
        }
    }

    /// The message as a person reads it, prefix included.
    pub fn message(&self) -> Vec<u8> {
        match (self.shape, self.code.prefix()) {
            (Shape::Plain, Some(prefix)) => {
                [prefix.as_bytes(), b": ", self.detail.as_slice()].concat()
            }
            _ => self.detail.clone(),
        }
    }

    /// Appends the whole reply to the call with `header`.
    pub fn encode_reply(&self, out: &mut Vec<u8>, header: Header) {
        frame::encode(out, header.reply(frame::STATUS_ERROR), |payload| {
            self.encode(payload)
        });
    }

    fn encode(&self, out: &mut Encoder<'_>) {
        out.i32(self.code.number()).i32(self.domain.number());
        match (self.shape, self.code.prefix()) {
            (Shape::Plain, Some(prefix)) => {
                let prefix = prefix.as_bytes();
                out.u32(1).string_of(&[prefix, b": ", &self.detail]);
                out.i32(LEVEL_ERROR).u32(0);
                out.u32(1)
                    .string_of(&[prefix, b": %1$s"])
                    .optional_string(Some(&self.detail));
                out.u32(0).i32(-1).i32(-1);
            }
            (Shape::Flags(function), _) => {
                out.optional_string(Some(&self.detail))
                    .i32(LEVEL_ERROR)
                    .u32(0);
                out.optional_string(Some(function.as_bytes()))
                    .optional_string(Some(b"flags"));
                out.u32(0).i32(0).i32(0);
            }
            (Shape::Plain, None) | (Shape::System(_), _) => {
                out.optional_string(Some(&self.detail))
                    .i32(LEVEL_ERROR)
                    .u32(0);
                out.optional_string(Some(b"%s"))
                    .optional_string(Some(&self.detail));
                let errno = if let Shape::System(errno) = self.shape {
                    errno
                } else {
                    -1
                };
                out.u32(0).i32(errno).i32(-1);
            }
        }
        out.u32(0);
    }
}

/// An error of the framing and dispatching itself.
pub fn rpc(detail: impl Into<Vec<u8>>) -> Error {
    Error::new(Code::Rpc, Domain::Rpc, detail)
}

/// The error for a procedure number that means nothing.
pub fn unknown_procedure(number: i32) -> Error {
    rpc(format!("unknown procedure: {number}"))
}

/// The error for arguments that do not decode.
pub fn undecodable() -> Error {
    rpc("Unable to decode message payload")
}

const LEVEL_ERROR: i32 = 2;

/// An error object as a client sees it, with every field that can be present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received<'a> {
    /// Number of the code.
    pub code: i32,
    /// Number of the domain.
    pub domain: i32,
    /// The whole message.
    pub message: Option<&'a [u8]>,
    /// 2 for an error.
    pub level: i32,
    /// The format that the message was made with, or a function's name.
    pub str1: Option<&'a [u8]>,
    /// The detail.
    pub str2: Option<&'a [u8]>,
    /// Always absent from this daemon.
    pub str3: Option<&'a [u8]>,
    /// errno of a system error.
    pub int1: i32,
    /// Unused.
    pub int2: i32,
}

/// Reads an error object, as a client does.
pub fn decode(payload: &[u8]) -> Result<Received<'_>, DecodeError> {
    let mut decoder = Decoder::new(payload);
    let code = decoder.i32()?;
    let domain = decoder.i32()?;
    let message = decoder.optional_string(STRING_LIMIT)?;
    let level = decoder.i32()?;
    if decoder.u32()? != 0 {
        decoder.string(STRING_LIMIT)?;
        decoder.fixed::<16>()?;
        decoder.i32()?;
    }
    let str1 = decoder.optional_string(STRING_LIMIT)?;
    let str2 = decoder.optional_string(STRING_LIMIT)?;
    let str3 = decoder.optional_string(STRING_LIMIT)?;
    let int1 = decoder.i32()?;
    let int2 = decoder.i32()?;
    if decoder.u32()? != 0 {
        decoder.string(STRING_LIMIT)?;
        decoder.fixed::<16>()?;
    }
    Ok(Received {
        code,
        domain,
        message,
        level,
        str1,
        str2,
        str3,
        int1,
        int2,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent_and_received(error: &Error, check: impl FnOnce(Received<'_>)) {
        let mut out = Vec::new();
        error.encode(&mut Encoder::new(&mut out));
        check(decode(&out).unwrap());
    }

    #[test]
    fn a_plain_error_names_its_prefix_in_message_and_format() {
        let error = Error::new(Code::ResourceBusy, Domain::Lockspace, "x");
        assert_eq!(error.message(), b"resource busy: x");
        sent_and_received(&error, |got| {
            assert_eq!((got.code, got.domain, got.level), (87, 51, 2));
            assert_eq!(got.message, Some(&b"resource busy: x"[..]));
            assert_eq!(got.str1, Some(&b"resource busy: %1$s"[..]));
            assert_eq!(got.str2, Some(&b"x"[..]));
            assert_eq!((got.int1, got.int2), (-1, -1));
        });
    }

    #[test]
    #[cfg_attr(miri, ignore = "miri's own strerror says more")]
    fn a_system_error_carries_its_errno_and_the_kernels_text() {
        let error = Error::system(
            Domain::Lockspace,
            b"Unable to open resource /x",
            Errno::ENOENT,
        );
        sent_and_received(&error, |got| {
            let text = &b"Unable to open resource /x: No such file or directory"[..];
            assert_eq!((got.code, got.message, got.int1), (38, Some(text), 2));
            assert_eq!((got.str1, got.str2), (Some(&b"%s"[..]), Some(text)));
        });
    }

    #[test]
    fn a_flags_error_names_the_unknown_bits_and_the_function() {
        let error = Error::flags(Domain::Rpc, "someFunction", 0x10);
        sent_and_received(&error, |got| {
            let text = &b"unsupported flags (0x10) in function someFunction"[..];
            assert_eq!((got.code, got.message), (8, Some(text)));
            assert_eq!(
                (got.str1, got.str2),
                (Some(&b"someFunction"[..]), Some(&b"flags"[..]))
            );
            assert_eq!((got.int1, got.int2), (0, 0));
        });
    }
}
