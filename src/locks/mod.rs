//! Who holds what. This room knows owners and files; sockets and messages are not its business.
//!
//! [`table`] decides, on plain data; [`lease`] opens and locks a file, [`again`] one that was locked before,
//! [`job`] is the rest of the work on one, [`errand`] any of that as a message to a process which does it; [`holder`] says in words who has it, and [`note`] in the file itself. The
//! room above puts them together.
#![forbid(unsafe_code)]

pub mod again;
pub mod errand;
pub mod holder;
pub mod job;
pub mod lease;
pub mod lockspace;
pub mod note;
pub mod place;
pub mod table;
