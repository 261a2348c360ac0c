//! A bystander: a client with nothing to do with what happens, that makes one call every
//! millisecond and remembers the longest wait. It runs in a process of its own with real-time
//! priority, so that it is the daemon's slowness that it sees, and not its own place in the queue.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::client::{Client, acquire, make_disk, paper_pid, register, release};
use crate::helper::Helper;
use crate::measure::{Outcome, now_ns, percentile};
use crate::subject::Server;

/// Nobody else's index or disk.
const INDEX: u32 = 900_000;
const START_LIMIT: Duration = Duration::from_secs(60);
/// The C daemon stops for 3 s for each owner that it fences.
const ANSWER_LIMIT: Duration = Duration::from_secs(200);

pub struct Bystander {
    helper: Helper,
}

/// What the bystander saw, in nanoseconds.
pub struct Waits {
    pub worst: u64,
    pub calls: u64,
}

impl Bystander {
    pub fn start(server: &Server) -> Outcome<Self> {
        let disk = server.disk(INDEX);
        make_disk(&server.outside(&disk))?;
        let arguments = [server.socket().display().to_string(), disk];
        let prefix = ["chrt", "--fifo", "1"];
        let mut helper = Helper::start_through(&prefix, "bystander", &arguments)?;
        helper.hear_numbers("ready", START_LIMIT)?;
        Ok(Self { helper })
    }

    /// What was seen since the last time, or since the start.
    pub fn take(&mut self) -> Outcome<Waits> {
        self.helper.say("take")?;
        let numbers = self.helper.hear_numbers("waits", ANSWER_LIMIT)?;
        match numbers.as_slice() {
            &[worst, calls] if calls > 0 => Ok(Waits { worst, calls }),
            _ => Err("the bystander made no call".into()),
        }
    }
}

/// The helper's side.
pub fn stand_by(socket: &Path, disk: &str) -> Outcome<()> {
    let mut client = Client::connect(socket)?;
    client.call(&mut register(INDEX, paper_pid(INDEX)))?;
    let mut frames = [acquire(disk), release(disk)];
    let mut waits: Vec<u64> = Vec::new();
    println!("ready");
    for turn in 0_usize.. {
        let start = now_ns();
        client.call(&mut frames[turn % 2])?;
        waits.push(now_ns() - start);
        let stdin = std::io::stdin();
        let mut interest = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let told =
            poll(&mut interest, PollTimeout::from(1_u8)).map_err(|e| format!("poll: {e}"))?;
        if told == 0 {
            continue;
        }
        let mut line = String::new();
        stdin
            .read_line(&mut line)
            .map_err(|e| format!("reading a command: {e}"))?;
        if line.is_empty() {
            break;
        }
        let calls = waits.len();
        println!("waits {} {calls}", percentile(&mut waits, 1.0));
        waits.clear();
    }
    Ok(())
}
