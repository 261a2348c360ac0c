//! The four levels of libvirt's logs.

/// How grave a log line is. The numbers are those of libvirt's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// 1: for the one who looks for a fault.
    Debug = 1,
    /// 2: what happens in normal work.
    Info = 2,
    /// 3: the default: something is odd, the work goes on.
    Warning = 3,
    /// 4: something could not be done.
    Error = 4,
}

impl Level {
    /// The level when nothing sets one.
    pub const DEFAULT: Level = Level::Warning;

    /// The number in settings, 1 to 4.
    pub fn number(self) -> u32 {
        match self {
            Level::Debug => 1,
            Level::Info => 2,
            Level::Warning => 3,
            Level::Error => 4,
        }
    }

    /// The level with this number, if it is 1 to 4.
    pub fn from_number(number: u32) -> Option<Level> {
        match number {
            1 => Some(Level::Debug),
            2 => Some(Level::Info),
            3 => Some(Level::Warning),
            4 => Some(Level::Error),
            _ => None,
        }
    }

    /// The word in a log line and in `LIBVIRT_DEBUG`.
    pub fn word(self) -> &'static str {
        match self {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warning => "warning",
            Level::Error => "error",
        }
    }

    /// The priority of syslog(3), which the journal uses too.
    pub fn syslog_priority(self) -> u32 {
        match self {
            Level::Debug => 7,
            Level::Info => 6,
            Level::Warning => 4,
            Level::Error => 3,
        }
    }

    /// The level of a tracing event. libvirt has nothing below debug, so `trace` counts as debug.
    pub fn of_event(level: &tracing::Level) -> Level {
        match *level {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warning,
            tracing::Level::INFO => Level::Info,
            tracing::Level::DEBUG | tracing::Level::TRACE => Level::Debug,
        }
    }
}
