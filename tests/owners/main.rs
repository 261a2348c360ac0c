//! Whose locks they are: what becomes of them when an owner dies, leaves, will not die or shares its
//! process with others; and what becomes of the files themselves, on the host and on shares.

#[path = "../support/mod.rs"]
mod support;

mod domains;
mod ground;
mod notes;
mod owners_end;
mod rule_disk_untouched;
mod shares;
mod watched_owners;
mod whereabouts;
