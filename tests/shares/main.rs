//! Shares that are slow, hang, or fail: only those wait who want something of the share, each of them gets its
//! one right answer, and nothing is left behind.

#[path = "../support/mod.rs"]
mod support;

mod bystanders;
mod calls;
mod errors;
mod events;
mod helpers;
mod leased;
mod scene;
mod told;
mod variants;
