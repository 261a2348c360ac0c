//! Idle guests: connections that REGISTER and RESTRICT as libvirt's do, then stay open in silence.
//! Helper processes hold them, because one process may have too few descriptors.

use std::path::Path;
use std::time::Duration;

use crate::client::{connect_many, paper_pid, register, restrict};
use crate::helper::Helper;
use crate::measure::Outcome;

/// Connections one helper holds: half of the 20,000 descriptors that a common hard limit allows.
const PER_HELPER: u32 = 10_000;
/// The C daemon accepts one client per turn and each turn costs all clients.
const GROW_LIMIT: Duration = Duration::from_secs(900);

/// The connections of all helpers so far.
#[derive(Default)]
pub struct Crowd {
    helpers: Vec<Helper>,
    size: u32,
}

impl Crowd {
    /// Adds guests until there are `size` of them.
    pub fn grow_to(&mut self, socket: &Path, size: u32) -> Outcome<()> {
        while self.size < size {
            let more = (size - self.size).min(PER_HELPER);
            let socket = socket.display().to_string();
            let arguments = [socket, self.size.to_string(), more.to_string()];
            let mut helper = Helper::start("crowd", &arguments)?;
            helper.hear_numbers("ready", GROW_LIMIT)?;
            self.helpers.push(helper);
            self.size += more;
        }
        Ok(())
    }
}

/// The helper's side: arguments are the socket, the first index and the number of guests.
pub fn hold(socket: &Path, first: u32, count: u32) -> Outcome<()> {
    let clients = connect_many(socket, first..first + count, |index| {
        vec![register(index, paper_pid(index)), restrict()]
    })?;
    println!("ready");
    let mut line = String::new();
    let end = std::io::stdin().read_line(&mut line);
    drop(clients);
    end.map(|_| ())
        .map_err(|e| format!("waiting for the end: {e}"))
}
