//! How a command ends, and what it complains of.

/// How a command ends, as its help says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Yes, or done.
    Yes = 0,
    /// No.
    No = 1,
    /// Nobody can tell.
    Unknown = 2,
    /// The words of the command line are wrong (EX_USAGE).
    Usage = 64,
}

/// A sentence on standard error.
pub fn complain(text: &str) {
    use std::io::Write;
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stderr(), "virtlockctl: {text}");
}
