//! What is installed besides the program: manuals, units, packages.

#[path = "../support/mod.rs"]
mod support;

mod content;
mod debian;
mod hardening;
mod host;
mod manual;
mod rpm;
