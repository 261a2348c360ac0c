//! Bytes to messages and back, for the two UNIX sockets of the daemon.
//!
//! Nothing here reads or writes a descriptor or remembers anything. Decoding borrows from the
//! buffer the bytes were read into; encoding appends to a buffer the caller keeps. Every number is
//! libvirt's, and `tests/protocol/vectors.rs` holds bytes of its own daemon against them.
#![forbid(unsafe_code)]

pub mod admin;
pub mod error;
pub mod frame;
pub mod keepalive;
pub mod lock;
pub mod status;
pub mod xdr;
