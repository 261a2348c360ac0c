//! Who holds what. This room knows owners and files; sockets and messages are not its business.
//!
//! [`table`] decides, on plain data; [`lease`] does it to a file; [`keeper`] puts the two together,
//! so that nothing above this room opens or locks a file itself.
#![forbid(unsafe_code)]

pub mod keeper;
pub mod lease;
pub mod lockspace;
pub mod place;
pub mod table;
