//! How a command ends, and what it complains of.

/// How a command ends, as its help says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Yes, or done.
    Yes,
    /// No.
    No,
    /// Nobody can tell.
    Unknown,
    /// The words of the command line are wrong (EX_USAGE).
    Usage,
    /// The daemon cannot be asked (EX_UNAVAILABLE).
    Unavailable,
    /// A lock is held (EX_TEMPFAIL).
    Held,
    /// The locks may be lost (EX_PROTOCOL).
    Lost,
    /// A command cannot be run.
    NotRun,
    /// As a command ended.
    Of(u8),
}

impl Exit {
    /// The number as the shell sees it.
    pub fn number(self) -> u8 {
        match self {
            Exit::Yes => 0,
            Exit::No => 1,
            Exit::Unknown => 2,
            Exit::Usage => 64,
            Exit::Unavailable => 69,
            Exit::Held => 75,
            Exit::Lost => 76,
            Exit::NotRun => 127,
            Exit::Of(code) => code,
        }
    }
}

/// A sentence on standard error.
pub fn complain(text: &str) {
    use std::io::Write;
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stderr(), "virtlockctl: {text}");
}
