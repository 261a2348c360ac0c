//! The state that outlives a process image.
//!
//! [`state`] is all of it as plain data. [`ledger`] keeps it as it changes, [`event`] by event, in
//! a memory file, and [`replay`] makes the state of it again; [`libvirt_json`] reads and writes it as the C daemon does; [`handover`] passes it
//! to the program that takes over.
#![forbid(unsafe_code)]

pub mod event;
pub mod handover;
pub mod ledger;
pub mod libvirt_json;
pub mod replay;
pub mod state;
