//! What a reactor that dies leaves to the next one beside ledger and descriptors: what it was asked for from
//! outside, the call that it was working on, and the bytes that were on their way. All of it lies in memory
//! that the guardian made before its first clone and that outlives every reactor.
#![forbid(unsafe_code)]

pub mod control;
pub mod layout;
pub mod slot;
pub mod turn;

use std::num::NonZeroUsize;
use std::sync::Mutex;

use crate::host::refusal::Refusal;
use crate::host::shared::Shared;

/// Where those are that stay: whoever looks for memory that was lost (LeakSanitizer) finds that it was not.
static FOR_EVER: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// The desk.
#[derive(Debug)]
pub struct Desk {
    memory: Shared,
}

impl Desk {
    /// An empty desk of this size, of which [`size`] says how much is needed.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn new(size: NonZeroUsize) -> Result<Desk, Refusal> {
        Shared::new(size).map(|memory| Desk { memory })
    }

    /// One that ends with this process: it can be worked at, and nobody finds anything there.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn private() -> Result<Desk, Refusal> {
        Shared::private(layout::WITHOUT_SLOTS)
            .map(|memory| Desk { memory })
            .map_err(Refusal::of("there is no memory for the turns of clients"))
    }

    /// It is there as long as the process is.
    pub fn for_ever(self) -> &'static Desk {
        let desk: &'static Desk = Box::leak(Box::new(self));
        if let Ok(mut all) = FOR_EVER.lock() {
            all.push(std::ptr::from_ref(desk).addr());
        }
        desk
    }

    /// The memory itself.
    pub fn memory(&self) -> &Shared {
        &self.memory
    }
}

/// How large a desk is for a process with at most so many descriptors.
pub fn size(descriptors: u64) -> NonZeroUsize {
    layout::size(descriptors)
}
