//! The log of the daemon.
pub mod level;
pub mod line;
pub mod resolve;
pub mod settings;
