//! The admin program's numbers: its own, its limits, and those of its procedures.

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

/// A client connects over a UNIX socket, always.
pub const TRANSPORT_UNIX: u32 = 0;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_1_to_20_are_no_procedures() {
        for number in [-1, 0, 21, i32::MAX] {
            assert_eq!(Procedure::from_number(number), None);
        }
    }
}
