//! The admin program (`wire.md` section 8).

/// The program number.
pub const PROGRAM: u32 = 0x0690_0690;
/// The program's version.
pub const VERSION: u32 = 1;
