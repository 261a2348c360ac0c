//! What is installed besides the program: manuals, units, packages.

#[path = "../support/mod.rs"]
mod support;

mod hardening;
mod manual;
