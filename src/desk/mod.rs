//! What a reactor that dies leaves to the next one beside ledger and descriptors: what it was asked for from
//! outside, the call that it was working on, and the bytes that were on their way. All of it lies in memory
//! that the guardian made before its first clone and that outlives every reactor.
#![forbid(unsafe_code)]

pub mod control;

use std::num::NonZeroUsize;

use crate::host::refusal::Refusal;
use crate::host::shared::Shared;

/// The desk.
#[derive(Debug)]
pub struct Desk {
    memory: Shared,
}

impl Desk {
    /// An empty desk.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn new(size: NonZeroUsize) -> Result<Desk, Refusal> {
        Shared::new(size).map(|memory| Desk { memory })
    }

    /// The memory itself.
    pub fn memory(&self) -> &Shared {
        &self.memory
    }
}
