//! Leases whose files are to say who has them. They are written by a process of their own, when the answers
//! are out: a share that hangs keeps nobody waiting for that, and what cannot be written soon is not.

use super::deadlines::RETRY_MS;
use crate::custody::Custody;
use crate::host::clock::Moment;
use crate::host::errno::Errno;
use crate::host::scribe::{Dismissed, Scribe};
use crate::locks::note::{self, Writing};
use crate::locks::table::ResourceId;

/// After a process that wrote notes has ended, how long until there is another one, milliseconds: where the
/// host refuses it something it would be started for each lease.
const AGAIN_MS: u64 = 600 * RETRY_MS;

/// The process that writes them, once there is something to write.
#[derive(Debug, Default)]
pub struct Notes {
    scribe: Option<Scribe>,
    /// The one before it.
    before: Option<Dismissed>,
    /// There is no other one earlier.
    not_before: Option<Moment>,
    /// It hangs, and that has been said.
    hangs: bool,
}

impl Notes {
    /// These leases were granted, and are held yet, most often.
    pub fn write(&mut self, leases: &mut Vec<ResourceId>, custody: &Custody) {
        for id in leases.drain(..) {
            if let Some(writing) = Writing::of(custody.state().table(), id) {
                self.tell(&writing.to_bytes());
            }
        }
    }

    fn tell(&mut self, message: &[u8]) {
        if self.scribe.is_none() {
            self.start();
        }
        let Some(scribe) = &self.scribe else {
            return;
        };
        match scribe.tell(message) {
            Ok(()) => self.hangs = false,
            Err(reason) if is_full(reason) => {
                if !std::mem::replace(&mut self.hangs, true) {
                    tracing::warn!(
                        target: "locking.lockspace",
                        "Lease files do not all say at the moment who has them: a file system of one does not answer, \
                         or more are granted than can be written. The locks are held all the same"
                    );
                }
            }
            Err(_) => {
                self.before = self.scribe.take().map(Scribe::dismiss);
            }
        }
    }

    fn start(&mut self) {
        let now = Moment::now();
        let is_early = self.not_before.is_some_and(|moment| now < moment);
        if is_early || self.before.as_ref().is_some_and(Dismissed::is_there) {
            return;
        }
        self.before = None;
        self.not_before = Some(now.plus_ms(AGAIN_MS));
        self.scribe = Scribe::start(note::write_for_parent).ok();
    }
}

/// Whether it has enough to do.
fn is_full(reason: Errno) -> bool {
    matches!(reason, Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM)
}
