//! The way back to libvirt's daemon, should this program turn out not to be able to take over from it:
//! the program that stands beside ours is executed on what was left for us. It finds its document and
//! its descriptors as they were.

use crate::desk::Desk;
use crate::desk::control::{Failure, Order};
use crate::exit::StartError;
use crate::host::{descriptors, errno};
use crate::restart::handover::{self, CommandLine, Successor};

use super::guardian::End;
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
    /// Who executes it, if there is a guardian.
    pub desk: Option<&'static Desk>,
}

impl WayBack {
    /// Executes libvirt's program, because of this error. Comes back only if that cannot be done, with
    /// the error to end with. Whatever was taken over must still be open.
    pub fn go(&self, error: StartError) -> StartError {
        let message = self.execute(&error.message);
        StartError::new(error.exit, message)
    }

    /// As [`WayBack::go`], with the words alone.
    pub fn execute(&self, why: &str) -> String {
        // It was tried by the reactor before.
        if let Some(desk) = self.desk
            && let Some((Order::WayBack, Failure::Exec(reason))) = desk.failed_order()
        {
            desk.forget_failed_order();
            let program = desk.ordered_path().to_string_lossy();
            let reason = errno::text(reason);
            return format!(
                "{why}. Nor can libvirt's own program go on: {program} cannot be executed: {reason}"
            );
        }
        let reason = match self.command_line.beside(SUFFIX) {
            Ok(libvirts) => {
                tracing::error!(
                    "This program cannot take over, so {} is executed on what was left for it. The \
                     reason: {why}",
                    libvirts.program.display()
                );
                self.replace(&libvirts)
            }
            Err(reason) => reason,
        };
        format!("{why}. Nor can libvirt's own program go on: {reason}")
    }

    fn replace(&self, libvirts: &CommandLine) -> String {
        for (number, now) in &self.moved {
            if let Err(reason) = descriptors::put_back(*now, *number) {
                let reason = errno::text(reason);
                return format!("descriptor {number} cannot be put back: {reason}");
            }
            if let Some(desk) = self.desk {
                desk.set_moved(*number, None);
            }
        }
        match self.desk {
            Some(desk) => order(desk, libvirts),
            None => handover::replace(Successor::Libvirt, libvirts, &[], &[]),
        }
    }
}

/// Has the guardian execute it. Comes back only with the reason why it cannot be asked to.
fn order(desk: &Desk, libvirts: &CommandLine) -> String {
    match libvirts.text_of_path() {
        Ok(path) if desk.order(Order::WayBack, &path, None) => End::Ordered.leave(),
        Ok(_) => "the path of its program is too long".into(),
        Err(reason) => reason,
    }
}
