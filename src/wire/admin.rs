//! The admin program (`wire.md` section 8): twenty procedures, their arguments, and what they
//! return. Arguments are borrowed from the bytes that came in.

use std::borrow::Cow;

use super::frame::{self, Header, Kind};
use super::xdr::{DecodeError, Decoder, Encoder};

/// The program number.
pub const PROGRAM: u32 = 0x0690_0690;
/// The program's version.
pub const VERSION: u32 = 1;
/// The longest string of a call or a reply, bytes.
pub const STRING_LIMIT: u32 = 4_194_304;
/// The most servers or clients that a reply can list.
pub const LIST_LIMIT: usize = 16384;
/// The most parameters of a call.
pub const PARAMETERS_LIMIT: u32 = 32;
/// CONNECT_DAEMON_SHUTDOWN flag: keep the state of what is running.
pub const PRESERVE: u32 = 1;
/// The release of libvirt whose admin protocol this is: 11.3.0, the first number in millions, the
/// second in thousands. virt-admin takes it for the version of the library below the daemon.
pub const LIBVIRT_VERSION: u64 = 11_003_000;

/// A procedure of the program, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Procedure {
    /// The first call of virt-admin.
    ConnectOpen = 1,
    /// Its last one.
    ConnectClose = 2,
    /// Which release this is.
    ConnectGetLibVersion = 3,
    /// The names of the servers.
    ConnectListServers = 4,
    /// Whether there is a server of a name.
    ConnectLookupServer = 5,
    /// The numbers of a thread pool.
    ServerGetThreadpoolParameters = 6,
    /// Sets numbers of a thread pool.
    ServerSetThreadpoolParameters = 7,
    /// The clients of a server.
    ServerListClients = 8,
    /// One client of a server.
    ServerLookupClient = 9,
    /// Who a client is.
    ClientGetInfo = 10,
    /// Ends a client's connection.
    ClientClose = 11,
    /// How many clients a server has, and may have.
    ServerGetClientLimits = 12,
    /// Sets how many clients a server may have.
    ServerSetClientLimits = 13,
    /// Where the log goes.
    ConnectGetLoggingOutputs = 14,
    /// Which lines the log takes.
    ConnectGetLoggingFilters = 15,
    /// Sets where the log goes.
    ConnectSetLoggingOutputs = 16,
    /// Sets which lines the log takes.
    ConnectSetLoggingFilters = 17,
    /// Reads certificates again.
    ServerUpdateTlsFiles = 18,
    /// Sets after how long without work the daemon ends.
    ConnectSetDaemonTimeout = 19,
    /// Ends the daemon.
    ConnectDaemonShutdown = 20,
}

impl Procedure {
    /// All of them, in the order of their numbers.
    pub const ALL: [Procedure; 20] = [
        Procedure::ConnectOpen,
        Procedure::ConnectClose,
        Procedure::ConnectGetLibVersion,
        Procedure::ConnectListServers,
        Procedure::ConnectLookupServer,
        Procedure::ServerGetThreadpoolParameters,
        Procedure::ServerSetThreadpoolParameters,
        Procedure::ServerListClients,
        Procedure::ServerLookupClient,
        Procedure::ClientGetInfo,
        Procedure::ClientClose,
        Procedure::ServerGetClientLimits,
        Procedure::ServerSetClientLimits,
        Procedure::ConnectGetLoggingOutputs,
        Procedure::ConnectGetLoggingFilters,
        Procedure::ConnectSetLoggingOutputs,
        Procedure::ConnectSetLoggingFilters,
        Procedure::ServerUpdateTlsFiles,
        Procedure::ConnectSetDaemonTimeout,
        Procedure::ConnectDaemonShutdown,
    ];

    /// The procedure with `number`, if there is one.
    pub fn from_number(number: i32) -> Option<Procedure> {
        Procedure::ALL
            .into_iter()
            .find(|procedure| *procedure as i32 == number)
    }

    /// The name that the reference daemon's error about unknown flags gives. Three procedures have
    /// no flags that could be unknown: their names are never sent.
    pub fn function(self) -> &'static str {
        match self {
            Procedure::ConnectOpen => "adminDispatchConnectOpen",
            Procedure::ConnectClose => "adminDispatchConnectClose",
            Procedure::ConnectGetLibVersion => "adminConnectGetLibVersion",
            Procedure::ConnectListServers => "adminConnectListServers",
            Procedure::ConnectLookupServer => "adminConnectLookupServer",
            Procedure::ServerGetThreadpoolParameters => "adminServerGetThreadPoolParameters",
            Procedure::ServerSetThreadpoolParameters => "adminServerSetThreadPoolParameters",
            Procedure::ServerListClients => "adminServerListClients",
            Procedure::ServerLookupClient => "adminServerLookupClient",
            Procedure::ClientGetInfo => "adminClientGetInfo",
            Procedure::ClientClose => "adminClientClose",
            Procedure::ServerGetClientLimits => "adminServerGetClientLimits",
            Procedure::ServerSetClientLimits => "adminServerSetClientLimits",
            Procedure::ConnectGetLoggingOutputs => "adminConnectGetLoggingOutputs",
            Procedure::ConnectGetLoggingFilters => "adminConnectGetLoggingFilters",
            Procedure::ConnectSetLoggingOutputs => "adminConnectSetLoggingOutputs",
            Procedure::ConnectSetLoggingFilters => "adminConnectSetLoggingFilters",
            Procedure::ServerUpdateTlsFiles => "adminServerUpdateTlsFiles",
            Procedure::ConnectSetDaemonTimeout => "adminConnectSetDaemonTimeout",
            Procedure::ConnectDaemonShutdown => "adminConnectDaemonShutdown",
        }
    }
}

/// A named value.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter<'a> {
    /// Its name.
    pub field: &'a [u8],
    /// Its value.
    pub value: Value<'a>,
}

impl Parameter<'static> {
    /// An unsigned number.
    pub fn uint(field: &'static str, value: u32) -> Parameter<'static> {
        Parameter {
            field: field.as_bytes(),
            value: Value::Uint(value),
        }
    }
}

/// A value and its type.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// 1
    Int(i32),
    /// 2
    Uint(u32),
    /// 3
    Llong(i64),
    /// 4
    Ullong(u64),
    /// 5
    Double(f64),
    /// 6
    Boolean(bool),
    /// 7
    String(Cow<'a, [u8]>),
}

impl Value<'_> {
    /// The type's name in error texts.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Int(_) => "int",
            Value::Uint(_) => "uint",
            Value::Llong(_) => "llong",
            Value::Ullong(_) => "ullong",
            Value::Double(_) => "double",
            Value::Boolean(_) => "boolean",
            Value::String(_) => "string",
        }
    }

    fn decode<'a>(decoder: &mut Decoder<'a>) -> Result<Value<'a>, DecodeError> {
        match decoder.i32()? {
            1 => decoder.i32().map(Value::Int),
            2 => decoder.u32().map(Value::Uint),
            3 => decoder.i64().map(Value::Llong),
            4 => decoder.u64().map(Value::Ullong),
            5 => decoder.f64().map(Value::Double),
            6 => decoder.i32().map(|word| Value::Boolean(word != 0)),
            7 => decoder
                .string(STRING_LIMIT)
                .map(|text| Value::String(Cow::Borrowed(text))),
            _ => Err(DecodeError::UnknownVariant),
        }
    }

    fn encode(&self, out: &mut Encoder<'_>) {
        match self {
            Value::Int(value) => out.i32(1).i32(*value),
            Value::Uint(value) => out.i32(2).u32(*value),
            Value::Llong(value) => out.i32(3).i64(*value),
            Value::Ullong(value) => out.i32(4).u64(*value),
            Value::Double(value) => out.i32(5).f64(*value),
            Value::Boolean(value) => out.i32(6).i32(i32::from(*value)),
            Value::String(value) => out.i32(7).string(value),
        };
    }
}

/// A client as a call names it. The other two fields of the protocol's structure are what a look-up
/// gave the caller before; nobody looks at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientName<'a> {
    /// The server that it is a client of.
    pub server: &'a [u8],
    /// Its number there.
    pub id: u64,
}

/// A client as a reply describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The server that it is a client of.
    pub server: &'static str,
    /// Its number there.
    pub id: u64,
    /// When it connected, seconds since the epoch.
    pub connected_at: i64,
}

/// A client connects over a UNIX socket, always.
const TRANSPORT_UNIX: u32 = 0;

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
        /// [`PRESERVE`].
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
            parameters: parameters(from)?,
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
            parameters: parameters(from)?,
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

fn parameters<'a>(from: &mut Decoder<'a>) -> Result<Vec<Parameter<'a>>, DecodeError> {
    (0..from.count(PARAMETERS_LIMIT)?)
        .map(|_| {
            Ok(Parameter {
                field: from.string(STRING_LIMIT)?,
                value: Value::decode(from)?,
            })
        })
        .collect()
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
                encode_parameters(out, parameters);
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

/// What a procedure returns.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer<'a> {
    /// Nothing but that it was done.
    Done,
    /// [`LIBVIRT_VERSION`]
    Version(u64),
    /// The names of servers, if they were wanted, and how many there are.
    Servers(&'a [&'a str], u32),
    /// The name of a server.
    Server(&'a str),
    /// Clients, if they were wanted, at most [`LIST_LIMIT`]; and how many there are.
    Clients(Vec<Client>, u32),
    /// A client.
    Client(Client),
    /// Named values.
    Parameters(Vec<Parameter<'a>>),
    /// A text, and how many entries it has.
    Entries(String, u32),
    /// As [`Answer::Entries`]; the text is left out if it has no entries.
    PerhapsEntries(String, u32),
}

impl Answer<'_> {
    /// Appends the whole reply to the call with `header`.
    pub fn encode_reply(&self, out: &mut Vec<u8>, header: Header) {
        frame::encode(out, header.reply(frame::STATUS_OK), |payload| {
            self.encode(payload);
        });
    }

    fn encode(&self, out: &mut Encoder<'_>) {
        match self {
            Answer::Done => (),
            Answer::Version(version) => {
                out.u64(*version);
            }
            Answer::Servers(names, count) => {
                encode_count(out, names.len());
                for name in *names {
                    out.string(name.as_bytes());
                }
                out.u32(*count);
            }
            Answer::Server(name) => {
                out.string(name.as_bytes());
            }
            Answer::Clients(clients, count) => {
                encode_count(out, clients.len());
                for client in clients {
                    encode_client(out, client);
                }
                out.u32(*count);
            }
            Answer::Client(client) => encode_client(out, client),
            Answer::Parameters(parameters) => encode_parameters(out, parameters),
            Answer::Entries(text, count) => {
                out.string(text.as_bytes()).u32(*count);
            }
            Answer::PerhapsEntries(text, count) => {
                let text = (*count > 0).then_some(text.as_bytes());
                out.optional_string(text).u32(*count);
            }
        }
    }
}

fn encode_client(out: &mut Encoder<'_>, client: &Client) {
    out.string(client.server.as_bytes())
        .u64(client.id)
        .i64(client.connected_at)
        .u32(TRANSPORT_UNIX);
}

fn encode_parameters(out: &mut Encoder<'_>, parameters: &[Parameter<'_>]) {
    encode_count(out, parameters.len());
    for parameter in parameters {
        out.string(parameter.field);
        parameter.value.encode(out);
    }
}

/// Our lists are far shorter than 2^32 elements.
fn encode_count(out: &mut Encoder<'_>, count: usize) {
    out.u32(u32::try_from(count).unwrap_or(u32::MAX));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{LONGEST, Split, split};

    fn every_value() -> Vec<Parameter<'static>> {
        [
            Value::Int(-7),
            Value::Uint(7),
            Value::Llong(-1 << 40),
            Value::Ullong(1 << 40),
            Value::Double(0.5),
            Value::Boolean(true),
            Value::String(Cow::Borrowed(b"text")),
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
            encode_count(encoder.string(b"admin"), count);
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

    #[test]
    fn numbers_outside_1_to_20_are_no_procedures() {
        for number in [-1, 0, 21, i32::MAX] {
            assert_eq!(Procedure::from_number(number), None);
        }
    }
}
