//! The C daemon's state document: what it writes before an exec, and reads after one. Hosts come to this
//! program and leave it over this document, without stopping a single guest.
//!
//! Strings are bytes here: the C daemon writes names as they are, valid UTF-8 or not, and refuses
//! to read those that are not; this program reads all that it may write.

mod read;
mod write;

pub use read::{Unusable, is_of, read};
pub use write::{descriptors, write};
