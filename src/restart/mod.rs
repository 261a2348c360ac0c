//! Ways from one image of the process to the next: [`handover`] checks and executes the program that
//! takes over; [`libvirt_json`] reads and writes the state as the C daemon does. The state itself, and the
//! ledger in which this program passes it on, are [`custody`](crate::custody)'s.
#![forbid(unsafe_code)]

pub mod bag;
pub mod handover;
pub mod libvirt_json;
