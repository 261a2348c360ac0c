//! The code without a daemon: the lock table against a list of rows, and the bodies of the fuzzer.
//!
//! No test here starts a process. A child has every open file of this process until it executes, and so
//! has its locks for a moment longer; but the kernel is asked for these locks.

mod regressions;
mod table;
