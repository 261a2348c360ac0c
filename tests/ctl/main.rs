//! The other program, `virtlockctl`, run beside our daemon, beside libvirt's, and beside none.

#[path = "../support/mod.rs"]
mod support;

mod beside_libvirt;
mod commands;
mod exec;
mod run;
mod schema;
mod setup;
mod trouble;
