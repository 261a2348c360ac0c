//! What a Unix daemon owes its host: thin, safe faces of the system calls, one idea a file.
//! The only place in the crate that may use `unsafe`.
#![allow(unsafe_code)]

pub mod apart;
pub mod child;
pub mod clock;
pub mod clone;
pub mod closer;
pub mod daemonize;
pub mod descendants;
pub mod descriptors;
pub mod environment;
pub mod errno;
pub mod fdinfo;
pub mod file;
pub mod heap;
pub mod helper;
pub mod leash;
pub mod limits;
pub mod listen;
pub mod memory;
pub mod mount_table;
pub mod mounts;
pub mod names;
pub mod note;
pub mod notify;
pub mod passing;
pub mod paths;
pub mod patience;
pub mod pid_file;
pub mod privileges;
pub mod process;
pub mod program;
pub mod refusal;
pub mod scribe;
pub mod shared;
pub mod signals;
pub mod stream;
pub mod terminal;
pub mod text;
pub mod timer;
pub mod whereabouts;
pub mod whole_file;
