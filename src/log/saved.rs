//! The log's settings as text, to be passed on to the next image of the process.

use serde::{Deserialize, Serialize};

use super::resolve::Settings;
use super::settings::{filters_setting, outputs_setting};

/// Log settings as they are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// 1 debug to 4 error.
    pub level: u32,
    /// As libvirt writes them.
    pub filters: String,
    /// As libvirt writes them, with the paths as [`outputs_setting`] does.
    pub outputs: String,
    /// What is used when there are no outputs, written in the same way.
    pub default_output: String,
}

impl From<Settings> for Saved {
    fn from(settings: Settings) -> Saved {
        Saved {
            level: settings.level.number(),
            filters: filters_setting(&settings.filters),
            outputs: outputs_setting(&settings.outputs),
            default_output: outputs_setting(&[settings.default_output]),
        }
    }
}
