//! What belongs to the process rather than to what it serves.

use serde::{Deserialize, Serialize};

pub use crate::log::Saved as LogSettings;

/// The process's own things.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The pid file, open and locked, and its path. The descriptor belongs to whoever took the file.
    pub pid_file: Option<(i32, Vec<u8>)>,
    /// The configuration file, if there is one.
    pub config_file: Option<Vec<u8>>,
    /// The program to start when the daemon is replaced.
    pub program: Vec<u8>,
    /// Seconds without clients and locks after which the daemon ends; 0 for never.
    pub idle_timeout_s: u32,
    /// Log level, filters and outputs, as text.
    pub logging: LogSettings,
}
