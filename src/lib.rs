//! The lock daemon of libvirt: it holds the locks on the disks of virtual machines, so that two
//! machines never write one disk, and so that libvirtd can restart without losing them.
//!
//! The map, from the top down; a module uses only what stands below it.
//!
//! * `main.rs`, [`cli`], [`config`], [`exit`]: options, `virtlockd.conf`, and how the program may end.
//! * [`life`]: the process: the order of a start, who was here before, and how it goes on from there.
//! * [`server`]: what passes: the reactor, one state machine a connection, the two programs it serves, and
//!   the killing of owners that leave while they hold locks.
//! * [`restart`]: ways from one image of the process to the next.
//! * [`custody`]: what lasts: all of it as one value, changed through one door that writes each change
//!   down, in the ledger.
//! * [`locks`]: who holds what. It knows owners and files; sockets and bytes are not its business.
//! * [`wire`]: bytes to messages and back. No input or output, no state.
//! * [`log`]: libvirt's log settings and lines, on top of `tracing`.
//! * [`host`]: what a Unix daemon owes its host. The only place with `unsafe`.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod cli;
pub mod config;
pub mod custody;
pub mod exit;
pub mod host;
pub mod life;
pub mod locks;
pub mod log;
pub mod restart;
pub mod server;
pub mod wire;
