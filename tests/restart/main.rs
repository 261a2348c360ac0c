//! One daemon after another: upgrades, successors that cannot take over, the way from libvirt's daemon
//! and back, and the ledger that goes from one to the next.

#[path = "../support/mod.rs"]
mod support;

mod cold_start;
mod crash;
mod handover_signals;
mod killed_anywhere;
mod ledger_truth;
mod ledgers;
mod libvirt_upgrade;
mod outside_calls;
mod recoveries;
mod shutdown;
mod status;
mod store;
mod story;
mod successors;
mod systemd;
mod takeover_obstacles;
mod understudy;
mod upgrade;
