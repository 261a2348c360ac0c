//! One client's connection, from its coming to its end: [`accept`] takes it in, in its [`turn`] bytes are
//! read, its [`conversation`] cuts frames out of them, and replies go out.

pub mod accept;
pub mod connection;
pub mod conversation;
pub mod poison;
pub mod recovery;
pub mod turn;
