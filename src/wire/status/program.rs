//! The status program's numbers.

/// The program number: `VLST`.
pub const PROGRAM: u32 = 0x564c_5354;
/// The program's version.
pub const VERSION: u32 = 1;
/// The longest string of a call or a reply, bytes: a name of the lock program, and words around it.
pub const STRING_LIMIT: u32 = 128 * 1024;

/// A procedure of the program, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Procedure {
    /// What the daemon is, and how much of everything it has.
    Daemon = 1,
    /// How often what happened.
    Counters = 2,
    /// The lockspaces.
    Lockspaces = 3,
    /// What is held.
    Resources = 4,
    /// The owners with a connection of their own.
    Owners = 5,
    /// All who hold one resource.
    Holders = 6,
    /// What is held of one file, whatever it is called.
    File = 7,
    /// One resource.
    Resource = 8,
    /// To be told of what happens.
    Subscribe = 9,
}

/// The number of the daemon's messages about what happened, which nobody calls.
pub const HAPPENED: i32 = 10;

impl Procedure {
    /// All of them, in the order of their numbers.
    pub const ALL: [Procedure; 9] = [
        Procedure::Daemon,
        Procedure::Counters,
        Procedure::Lockspaces,
        Procedure::Resources,
        Procedure::Owners,
        Procedure::Holders,
        Procedure::File,
        Procedure::Resource,
        Procedure::Subscribe,
    ];

    /// The procedure with `number`, if there is one.
    pub fn from_number(number: i32) -> Option<Procedure> {
        Procedure::ALL
            .into_iter()
            .find(|procedure| *procedure as i32 == number)
    }

    /// Its name in an error about unknown flags.
    pub fn function(self) -> &'static str {
        match self {
            Procedure::Daemon => "statusDaemon",
            Procedure::Counters => "statusCounters",
            Procedure::Lockspaces => "statusLockspaces",
            Procedure::Resources => "statusResources",
            Procedure::Owners => "statusOwners",
            Procedure::Holders => "statusHolders",
            Procedure::File => "statusFile",
            Procedure::Resource => "statusResource",
            Procedure::Subscribe => "statusSubscribe",
        }
    }
}
