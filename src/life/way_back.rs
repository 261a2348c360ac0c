//! The way back to libvirt's daemon, should this program turn out not to be able to take over from it:
//! the program that stands beside ours is executed on what was left for us. It finds its document and
//! its descriptors as they were.

use crate::exit::StartError;
use crate::host::descriptors;
use crate::restart::handover::{self, CommandLine, Successor};

use super::standard::Moved;

/// What libvirt's program is called beside ours: our name and this.
const SUFFIX: &str = ".libvirt";

/// What is needed for it.
#[derive(Debug)]
pub struct WayBack {
    /// How this program was called.
    pub command_line: CommandLine,
    /// What has another number than in the document.
    pub moved: Moved,
}

impl WayBack {
    /// Executes libvirt's program. Comes back only if that cannot be done, with the error to end with.
    /// Whatever was taken over must still be open.
    pub fn go(&self, error: StartError) -> StartError {
        let libvirts = match self.command_line.beside(SUFFIX) {
            Ok(libvirts) => libvirts,
            Err(reason) => return no_way_back(error, &reason),
        };
        tracing::error!(
            "{error}. This program cannot go on, so {} is executed on the state document as it is",
            libvirts.program.display()
        );
        for (number, now) in &self.moved {
            if let Err(reason) = descriptors::put_back(*now, *number) {
                let reason = format!(
                    "descriptor {number} cannot be put back: {}",
                    crate::host::errno::text(reason)
                );
                return no_way_back(error, &reason);
            }
        }
        let reason = handover::replace(Successor::Libvirt, &libvirts, &[], &[]);
        no_way_back(error, &reason)
    }
}

fn no_way_back(error: StartError, reason: &str) -> StartError {
    let message = format!("{error}. Nor can libvirt's own program go on: {reason}");
    StartError::new(error.exit, message)
}
