//! Calls and their arguments, which are borrowed from the bytes that came in.

use super::parameter::{self, Parameter};
use super::program::{PROGRAM, Procedure, STRING_LIMIT, TRANSPORT_UNIX, VERSION};
use crate::wire::frame::{self, Header, Kind};
use crate::wire::xdr::{DecodeError, Decoder, Encoder};

/// A client as a call names it. The other two fields of the protocol's structure are what a look-up
/// gave the caller before; nobody looks at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientName<'a> {
    /// The server that it is a client of.
    pub server: &'a [u8],
    /// Its number there.
    pub id: u64,
}

/// A decoded call. Strings are as they came, cut at their first NUL.
#[derive(Clone, Debug, PartialEq)]
pub enum Call<'a> {
    /// [`Procedure::ConnectOpen`]
    ConnectOpen {
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectClose`]
    ConnectClose,
    /// [`Procedure::ConnectGetLibVersion`]
    ConnectGetLibVersion,
    /// [`Procedure::ConnectListServers`]
    ConnectListServers {
        /// Whether the list is wanted, or only how long it would be.
        wants_list: bool,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectLookupServer`]. Its flags are not looked at.
    ConnectLookupServer {
        /// The server's name.
        server: &'a [u8],
    },
    /// [`Procedure::ServerGetThreadpoolParameters`]
    ServerGetThreadpoolParameters {
        /// The server's name.
        server: &'a [u8],
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ServerSetThreadpoolParameters`]
    ServerSetThreadpoolParameters {
        /// The server's name.
        server: &'a [u8],
        /// What to set.
        parameters: Vec<Parameter<'a>>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ServerListClients`]
    ServerListClients {
        /// The server's name.
        server: &'a [u8],
        /// Whether the list is wanted, or only how long it would be.
        wants_list: bool,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ServerLookupClient`]
    ServerLookupClient {
        /// Which client.
        client: ClientName<'a>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ClientGetInfo`]
    ClientGetInfo {
        /// Which client.
        client: ClientName<'a>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ClientClose`]
    ClientClose {
        /// Which client.
        client: ClientName<'a>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ServerGetClientLimits`]
    ServerGetClientLimits {
        /// The server's name.
        server: &'a [u8],
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ServerSetClientLimits`]
    ServerSetClientLimits {
        /// The server's name.
        server: &'a [u8],
        /// What to set.
        parameters: Vec<Parameter<'a>>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectGetLoggingOutputs`]
    ConnectGetLoggingOutputs {
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectGetLoggingFilters`]
    ConnectGetLoggingFilters {
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectSetLoggingOutputs`]
    ConnectSetLoggingOutputs {
        /// The new ones; none, or an empty text, for the default.
        text: Option<&'a [u8]>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectSetLoggingFilters`]
    ConnectSetLoggingFilters {
        /// The new ones, if there are to be any.
        text: Option<&'a [u8]>,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ServerUpdateTlsFiles`]
    ServerUpdateTlsFiles {
        /// The server's name.
        server: &'a [u8],
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectSetDaemonTimeout`]
    ConnectSetDaemonTimeout {
        /// Seconds; 0 for never.
        timeout_s: u32,
        /// Must be 0.
        flags: u32,
    },
    /// [`Procedure::ConnectDaemonShutdown`]
    ConnectDaemonShutdown {
        /// [`super::PRESERVE`].
        flags: u32,
    },
}

/// Decodes the arguments of `procedure`. Bytes after them are ignored.
pub fn decode<'a>(procedure: Procedure, payload: &'a [u8]) -> Result<Call<'a>, DecodeError> {
    let from = &mut Decoder::new(payload);
    let call = match procedure {
        Procedure::ConnectOpen => Call::ConnectOpen { flags: from.u32()? },
        Procedure::ConnectClose => Call::ConnectClose,
        Procedure::ConnectGetLibVersion => Call::ConnectGetLibVersion,
        Procedure::ConnectListServers => Call::ConnectListServers {
            wants_list: from.u32()? != 0,
            flags: from.u32()?,
        },
        Procedure::ConnectLookupServer => {
            let server = from.string(STRING_LIMIT)?;
            from.u32()?;
            Call::ConnectLookupServer { server }
        }
        Procedure::ServerGetThreadpoolParameters => Call::ServerGetThreadpoolParameters {
            server: from.string(STRING_LIMIT)?,
            flags: from.u32()?,
        },
        Procedure::ServerSetThreadpoolParameters => Call::ServerSetThreadpoolParameters {
            server: from.string(STRING_LIMIT)?,
            parameters: parameter::decode(from)?,
            flags: from.u32()?,
        },
        Procedure::ServerListClients => Call::ServerListClients {
            server: from.string(STRING_LIMIT)?,
            wants_list: from.u32()? != 0,
            flags: from.u32()?,
        },
        Procedure::ServerLookupClient => Call::ServerLookupClient {
            client: ClientName {
                server: from.string(STRING_LIMIT)?,
                id: from.u64()?,
            },
            flags: from.u32()?,
        },
        Procedure::ClientGetInfo => Call::ClientGetInfo {
            client: client(from)?,
            flags: from.u32()?,
        },
        Procedure::ClientClose => Call::ClientClose {
            client: client(from)?,
            flags: from.u32()?,
        },
        Procedure::ServerGetClientLimits => Call::ServerGetClientLimits {
            server: from.string(STRING_LIMIT)?,
            flags: from.u32()?,
        },
        Procedure::ServerSetClientLimits => Call::ServerSetClientLimits {
            server: from.string(STRING_LIMIT)?,
            parameters: parameter::decode(from)?,
            flags: from.u32()?,
        },
        Procedure::ConnectGetLoggingOutputs => {
            Call::ConnectGetLoggingOutputs { flags: from.u32()? }
        }
        Procedure::ConnectGetLoggingFilters => {
            Call::ConnectGetLoggingFilters { flags: from.u32()? }
        }
        Procedure::ConnectSetLoggingOutputs => Call::ConnectSetLoggingOutputs {
            text: from.optional_string(STRING_LIMIT)?,
            flags: from.u32()?,
        },
        Procedure::ConnectSetLoggingFilters => Call::ConnectSetLoggingFilters {
            text: from.optional_string(STRING_LIMIT)?,
            flags: from.u32()?,
        },
        Procedure::ServerUpdateTlsFiles => Call::ServerUpdateTlsFiles {
            server: from.string(STRING_LIMIT)?,
            flags: from.u32()?,
        },
        Procedure::ConnectSetDaemonTimeout => Call::ConnectSetDaemonTimeout {
            timeout_s: from.u32()?,
            flags: from.u32()?,
        },
        Procedure::ConnectDaemonShutdown => Call::ConnectDaemonShutdown { flags: from.u32()? },
    };
    Ok(call)
}

fn client<'a>(from: &mut Decoder<'a>) -> Result<ClientName<'a>, DecodeError> {
    let client = ClientName {
        server: from.string(STRING_LIMIT)?,
        id: from.u64()?,
    };
    let (_timestamp, _transport) = (from.i64()?, from.u32()?);
    Ok(client)
}

impl Call<'_> {
    /// The procedure that this is a call of.
    pub fn procedure(&self) -> Procedure {
        match self {
            Call::ConnectOpen { .. } => Procedure::ConnectOpen,
            Call::ConnectClose => Procedure::ConnectClose,
            Call::ConnectGetLibVersion => Procedure::ConnectGetLibVersion,
            Call::ConnectListServers { .. } => Procedure::ConnectListServers,
            Call::ConnectLookupServer { .. } => Procedure::ConnectLookupServer,
            Call::ServerGetThreadpoolParameters { .. } => Procedure::ServerGetThreadpoolParameters,
            Call::ServerSetThreadpoolParameters { .. } => Procedure::ServerSetThreadpoolParameters,
            Call::ServerListClients { .. } => Procedure::ServerListClients,
            Call::ServerLookupClient { .. } => Procedure::ServerLookupClient,
            Call::ClientGetInfo { .. } => Procedure::ClientGetInfo,
            Call::ClientClose { .. } => Procedure::ClientClose,
            Call::ServerGetClientLimits { .. } => Procedure::ServerGetClientLimits,
            Call::ServerSetClientLimits { .. } => Procedure::ServerSetClientLimits,
            Call::ConnectGetLoggingOutputs { .. } => Procedure::ConnectGetLoggingOutputs,
            Call::ConnectGetLoggingFilters { .. } => Procedure::ConnectGetLoggingFilters,
            Call::ConnectSetLoggingOutputs { .. } => Procedure::ConnectSetLoggingOutputs,
            Call::ConnectSetLoggingFilters { .. } => Procedure::ConnectSetLoggingFilters,
            Call::ServerUpdateTlsFiles { .. } => Procedure::ServerUpdateTlsFiles,
            Call::ConnectSetDaemonTimeout { .. } => Procedure::ConnectSetDaemonTimeout,
            Call::ConnectDaemonShutdown { .. } => Procedure::ConnectDaemonShutdown,
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
        frame::encode(out, header, |payload| self.encode_arguments(payload));
    }

    fn encode_arguments(&self, out: &mut Encoder<'_>) {
        match self {
            Call::ConnectClose | Call::ConnectGetLibVersion => out,
            Call::ConnectOpen { flags }
            | Call::ConnectGetLoggingOutputs { flags }
            | Call::ConnectGetLoggingFilters { flags }
            | Call::ConnectDaemonShutdown { flags } => out.u32(*flags),
            Call::ConnectListServers { wants_list, flags } => {
                out.u32(u32::from(*wants_list)).u32(*flags)
            }
            Call::ConnectLookupServer { server } => out.string(server).u32(0),
            Call::ServerGetThreadpoolParameters { server, flags }
            | Call::ServerGetClientLimits { server, flags }
            | Call::ServerUpdateTlsFiles { server, flags } => out.string(server).u32(*flags),
            Call::ServerSetThreadpoolParameters {
                server,
                parameters,
                flags,
            }
            | Call::ServerSetClientLimits {
                server,
                parameters,
                flags,
            } => {
                out.string(server);
                parameter::encode(out, parameters);
                out.u32(*flags)
            }
            Call::ServerListClients {
                server,
                wants_list,
                flags,
            } => out.string(server).u32(u32::from(*wants_list)).u32(*flags),
            Call::ServerLookupClient { client, flags } => {
                out.string(client.server).u64(client.id).u32(*flags)
            }
            Call::ClientGetInfo { client, flags } | Call::ClientClose { client, flags } => out
                .string(client.server)
                .u64(client.id)
                .i64(0)
                .u32(TRANSPORT_UNIX)
                .u32(*flags),
            Call::ConnectSetLoggingOutputs { text, flags }
            | Call::ConnectSetLoggingFilters { text, flags } => {
                out.optional_string(*text).u32(*flags)
            }
            Call::ConnectSetDaemonTimeout { timeout_s, flags } => out.u32(*timeout_s).u32(*flags),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::admin::Value;
    use crate::wire::frame::{LONGEST, Split, split};

    fn every_value() -> Vec<Parameter<'static>> {
        [
            Value::Int(-7),
            Value::Uint(7),
            Value::Llong(-1 << 40),
            Value::Ullong(1 << 40),
            Value::Double(0.5),
            Value::Boolean(true),
            Value::String(b"text".into()),
        ]
        .into_iter()
        .map(|value| Parameter {
            field: value.type_name().as_bytes(),
            value,
        })
        .collect()
    }

    fn every_call() -> Vec<Call<'static>> {
        let server = &b"virtlockd"[..];
        let client = ClientName { server, id: 9 };
        let (text, flags, wants_list) = (Some(&b"1:util"[..]), 3, true);
        vec![
            Call::ConnectOpen { flags },
            Call::ConnectClose,
            Call::ConnectGetLibVersion,
            Call::ConnectListServers { wants_list, flags },
            Call::ConnectLookupServer { server },
            Call::ServerGetThreadpoolParameters { server, flags },
            Call::ServerSetThreadpoolParameters {
                server,
                parameters: every_value(),
                flags,
            },
            Call::ServerListClients {
                server,
                wants_list,
                flags,
            },
            Call::ServerLookupClient { client, flags },
            Call::ClientGetInfo { client, flags },
            Call::ClientClose { client, flags },
            Call::ServerGetClientLimits { server, flags },
            Call::ServerSetClientLimits {
                server,
                parameters: every_value(),
                flags,
            },
            Call::ConnectGetLoggingOutputs { flags },
            Call::ConnectGetLoggingFilters { flags },
            Call::ConnectSetLoggingOutputs { text, flags },
            Call::ConnectSetLoggingFilters { text: None, flags },
            Call::ServerUpdateTlsFiles { server, flags },
            Call::ConnectSetDaemonTimeout {
                timeout_s: 120,
                flags,
            },
            Call::ConnectDaemonShutdown { flags },
        ]
    }

    fn encoded(call: &Call<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        call.encode(&mut out, 3);
        out
    }

    #[test]
    fn every_call_is_read_back_as_it_was_written() {
        for (call, number) in every_call().into_iter().zip(1..) {
            let bytes = encoded(&call);
            let Split::Frame(frame) = split(&bytes, LONGEST) else {
                panic!("no frame")
            };
            assert_eq!(frame.header.procedure, number);
            let procedure = Procedure::from_number(number).unwrap();
            assert_eq!(decode(procedure, frame.payload), Ok(call));
        }
    }

    #[test]
    fn every_call_cut_anywhere_does_not_decode() {
        for call in every_call() {
            let bytes = encoded(&call);
            let payload = &bytes[frame::HEADER..];
            for cut in 0..payload.len() {
                let result = decode(call.procedure(), &payload[..cut]);
                assert!(result.is_err(), "{call:?} {cut}");
            }
        }
    }

    #[test]
    fn an_unknown_type_and_a_33rd_parameter_do_not_decode() {
        let set = |count: usize, kind: u32| {
            let mut out = Vec::new();
            let mut encoder = Encoder::new(&mut out);
            encoder.string(b"admin").count(count);
            for _ in 0..count {
                encoder.string(b"x").u32(kind).u32(0);
            }
            encoder.u32(0);
            decode(Procedure::ServerSetClientLimits, &out).map(|_| ())
        };
        assert_eq!(set(32, 2), Ok(()));
        assert_eq!(set(33, 2), Err(DecodeError::OverLimit));
        for kind in [0, 8, 99, u32::MAX] {
            assert_eq!(set(1, kind), Err(DecodeError::UnknownVariant));
        }
    }
}
