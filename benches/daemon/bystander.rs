//! A bystander: a client with nothing to do with what happens, that acquires and releases a disk
//! every millisecond and remembers how long it waited. It runs in a process of its own with
//! real-time priority, so that it is the daemon's slowness that it sees, and not its own place in
//! the queue.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::client::{Client, acquire, make_disk, register, release};
use crate::helper::Helper;
use crate::measure::{Outcome, now_ns, percentile};
use crate::subject::{Placement, Server};

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
    /// The longest wait for one answer.
    pub worst: u64,
    pub calls: u64,
    /// Acquire and release together.
    pub pair_p50: u64,
    pub pair_p99: u64,
}

impl Bystander {
    /// A bystander on the bench's own CPU.
    pub fn start(server: &Server) -> Outcome<Self> {
        Self::start_through(&["chrt", "--fifo", "1"], server, true)
    }

    /// A bystander on the CPU of a server that was placed apart, before which it goes. Without `locks` it
    /// registers twice instead: a server without descriptors cannot give it a lock.
    pub fn start_beside(server: &Server, locks: bool) -> Outcome<Self> {
        let cpu = Placement::Apart.server_cpu_list()?;
        Self::start_through(
            &["taskset", "-c", &cpu, "chrt", "--fifo", "2"],
            server,
            locks,
        )
    }

    fn start_through(prefix: &[&str], server: &Server, locks: bool) -> Outcome<Self> {
        let mut disk = String::new();
        if locks {
            disk = server.disk(INDEX);
            make_disk(&server.outside(&disk))?;
        }
        let arguments = [server.socket().display().to_string(), disk];
        let mut helper = Helper::start_through(prefix, "bystander", &arguments)?;
        helper.hear_numbers("ready", START_LIMIT)?;
        Ok(Self { helper })
    }

    /// What was seen since the last time, or since the start.
    pub fn take(&mut self) -> Outcome<Waits> {
        self.take_within(ANSWER_LIMIT)
    }

    /// The same where the server may answer nobody: an error if the bystander still waits for an answer
    /// after this time.
    pub fn take_within(&mut self, limit: Duration) -> Outcome<Waits> {
        self.helper.say("take")?;
        let numbers = self.helper.hear_numbers("waits", limit)?;
        match numbers.as_slice() {
            &[worst, calls, pair_p50, pair_p99] if calls > 0 => Ok(Waits {
                worst,
                calls,
                pair_p50,
                pair_p99,
            }),
            _ => Err("the bystander made no call".into()),
        }
    }
}

/// The helper's side.
pub fn stand_by(socket: &Path, disk: &str) -> Outcome<()> {
    let mut client = Client::connect(socket)?;
    // A machine of its own, which is this process.
    let own = std::process::id();
    client.call(&mut register(INDEX, own))?;
    let (mut first, mut second) = if disk.is_empty() {
        let again = register(INDEX, own);
        (again.clone(), again)
    } else {
        (acquire(disk), release(disk))
    };
    let (mut calls, mut pairs): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
    println!("ready");
    loop {
        let start = now_ns();
        client.call(&mut first)?;
        let middle = now_ns();
        client.call(&mut second)?;
        let end = now_ns();
        calls.extend([middle - start, end - middle]);
        pairs.push(end - start);
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
            return Ok(());
        }
        let (worst, count) = (percentile(&mut calls, 1.0), calls.len());
        let (p50, p99) = (percentile(&mut pairs, 0.5), percentile(&mut pairs, 0.99));
        println!("waits {worst} {count} {p50} {p99}");
        calls.clear();
        pairs.clear();
    }
}
