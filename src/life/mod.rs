//! The life of the process: how it starts, who was here before it, and how it goes on. It serves nobody
//! itself. [`start`] has the order and knows all the others; none knows it.
#![forbid(unsafe_code)]

pub mod cold_start;
pub mod go_on;
pub mod guardian;
pub mod helper;
pub mod kept;
pub mod plan;
pub mod posix_locks;
pub mod rehearsal;
pub mod serve;
pub mod standard;
pub mod start;
pub mod store;
pub mod sweep;
pub mod takeover;
pub mod understudy;
pub mod way_back;
