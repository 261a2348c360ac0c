//! The reactor and what it serves.
//!
//! [`reactor`] is the loop; [`daemon`] is everything the loop turns over, and what happens to it:
//! clients come, call and go. A call goes one straight way: in a connection's [`turn`] its bytes are
//! read, [`conversation`] cuts a frame out of them, [`dispatch`] finds the procedure,
//! [`lock_service`] or [`admin_service`] carries it out and appends the reply to the bytes that go
//! back.
#![forbid(unsafe_code)]

pub mod accept;
pub mod admin_service;
pub mod clients;
pub mod connection;
pub mod conversation;
pub mod daemon;
pub mod deadlines;
pub mod dispatch;
pub mod ending;
pub mod fence;
pub mod holder;
pub mod lasting;
pub mod lock_service;
pub mod own_connections;
pub mod reactor;
pub mod resume;
pub mod token;
pub mod turn;
pub mod upgrade;
pub mod watch;
