//! What the fuzz targets do with the bytes they are given. Each body panics when a rule is broken
//! and returns otherwise. The fuzzer calls them, and so does `tests/model/regressions.rs` with the
//! bytes that have found something before.

pub mod admin_call;
pub mod config;
pub mod connection;
pub mod error_object;
pub mod frame;
pub mod keepalive;
pub mod ledger;
pub mod libvirt_json;
pub mod lock_call;
mod log_reader;
pub mod log_settings;
mod reference;
pub mod status;
mod world;

/// A body by the name of its target.
pub type Body = (&'static str, fn(&[u8]));

/// All of them.
pub const ALL: [Body; 11] = [
    ("frame", frame::run),
    ("lock_call", lock_call::run),
    ("admin_call", admin_call::run),
    ("status", status::run),
    ("keepalive", keepalive::run),
    ("error_object", error_object::run),
    ("connection", connection::run),
    ("config", config::run),
    ("log_settings", log_settings::run),
    ("ledger", ledger::run),
    ("libvirt_json", libvirt_json::run),
];
