//! The reactor and what it serves: all that passes.
//!
//! [`reactor`] is the loop, and owns the pieces. A call goes one straight way: in a connection's
//! [`turn`](clients::turn) its bytes are read, its [`conversation`](clients::conversation) cuts a frame
//! out of them, [`dispatch`](services::dispatch) finds the procedure, a [service](services) carries it
//! out and appends the reply to the bytes that go back. [`owners`] sees to processes: who must die,
//! whose death is waited for, what the dead leave; [`shares`] to files whose servers may not answer. What lasts is not here but in
//! [`custody`](crate::custody).
#![forbid(unsafe_code)]

pub mod clients;
pub mod deadlines;
pub mod flow;
pub mod ground;
pub mod hall;
pub mod keep;
pub mod lines;
pub mod notes;
pub mod owners;
pub mod reactor;
pub mod reserve;
pub mod services;
pub mod shares;
pub mod stop;
pub mod upgrade;
pub mod waiting_room;
pub mod watch;
