//! What is said on the sockets, held against what libvirt's daemon says: bytes, calls, refusals, the
//! administrator's commands, and bytes that are none of these.

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod admin_socket;
mod bad_input;
mod differential;
mod refusals;
mod status;
mod vectors;
mod weaknesses;
