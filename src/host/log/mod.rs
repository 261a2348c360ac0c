//! The log of the daemon.
pub mod datagram;
pub mod level;
pub mod line;
pub mod output;
pub mod resolve;
pub mod settings;
pub mod stream;
#[cfg(test)]
mod test_directory;
