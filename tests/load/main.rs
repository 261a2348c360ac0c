//! The whole daemon under load and for a long time: in random steps against a model, in a history that a
//! judge looks through, with hostile clients, and for as long as is wanted.

#[path = "../support/mod.rs"]
mod support;

mod history;
mod hostile;
mod soak;
mod world;
