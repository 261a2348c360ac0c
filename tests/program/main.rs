//! The daemon as a program: its options, files, signals and log, and its system calls, of which any may
//! fail once or be refused for ever.

#[path = "../support/mod.rs"]
mod support;

mod confined;
mod faults;
mod injector;
mod logging;
mod program;
mod system_calls;
