//! The program: options, configuration, start, run.
#![forbid(unsafe_code)]

fn main() {}
