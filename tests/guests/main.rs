//! The real thing: an unmodified libvirtd and real guests, with the daemon under test behind them.

#[path = "../support/mod.rs"]
mod support;

mod guests;
mod guests_crash;
mod guests_package;
mod guests_stop;
mod guests_upgrade;
mod who;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test at a time: each starts a hypervisor, and one of them measures a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}
