//! Pipelining: one client sends 64 calls at once (32 pairs on 32 files) for a running
//! machine, and reads 64 replies.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::client::{Client, REPLY_BYTES, acquire, is_ok, register, release, stamp};
use crate::machines::Machines;
use crate::measure::{Outcome, microseconds};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "pipeline";
pub const CASE: &str = "batches of 64";
pub const RATE: &str = "throughput";

const PAIRS: u32 = 32;
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURE: Duration = Duration::from_secs(2);

/// The encoded batch and where each frame of it starts.
struct Batch {
    bytes: Vec<u8>,
    starts: Vec<usize>,
    replies: Vec<u8>,
    serial: u32,
}

impl Batch {
    fn new(frames: impl Iterator<Item = Vec<u8>>) -> Self {
        let mut bytes = Vec::new();
        let mut starts = Vec::new();
        for frame in frames {
            starts.push(bytes.len());
            bytes.extend_from_slice(&frame);
        }
        let replies = vec![0; starts.len() * REPLY_BYTES];
        Self {
            bytes,
            starts,
            replies,
            serial: 1000,
        }
    }

    fn exchange(&mut self, client: &mut Client) -> Outcome<()> {
        for (serial, &start) in (self.serial..).zip(&self.starts) {
            stamp(&mut self.bytes[start..], serial);
        }
        client
            .stream
            .write_all(&self.bytes)
            .map_err(|e| format!("sending a batch: {e}"))?;
        client.read_fully(&mut self.replies)?;
        for (serial, reply) in (self.serial..).zip(self.replies.chunks(REPLY_BYTES)) {
            if !is_ok(reply, serial) {
                return Err(format!(
                    "a reply of a batch is not the good one: {reply:02x?}"
                ));
            }
        }
        self.serial = self.serial.wrapping_add(self.starts.len() as u32) & 0x7fff_ffff;
        Ok(())
    }
}

pub fn run(_: &Options, programs: &Programs, of: Subject, results: &mut Results) -> Outcome<()> {
    let mut machines = Machines::ready(1)?;
    let server = Server::start(programs, of, Placement::Split)?;
    server.make_disks(0..PAIRS)?;
    let mut client = Client::connect(&server.socket())?;
    let owner = machines.start_one(&server, 0)?;
    client.call(&mut register(0, owner))?;
    let disks = || (0..PAIRS).map(|number| server.disk(number));
    // Once in halves, to see the locks.
    Batch::new(disks().map(|disk| acquire(&disk))).exchange(&mut client)?;
    for disk in disks() {
        if !probe::is_locked(&server.outside(&disk))? {
            return Err(format!("{disk} was granted in a batch, but is not locked"));
        }
    }
    Batch::new(disks().map(|disk| release(&disk))).exchange(&mut client)?;
    let mut batch = Batch::new(disks().flat_map(|disk| [acquire(&disk), release(&disk)]));
    let warm = Instant::now();
    while warm.elapsed() < WARM_UP {
        batch.exchange(&mut client)?;
    }
    let cpu = probe::cpu_ns(server.pid)?;
    let start = Instant::now();
    let mut requests = 0_u64;
    while start.elapsed() < MEASURE {
        batch.exchange(&mut client)?;
        requests += batch.starts.len() as u64;
    }
    let seconds = start.elapsed().as_secs_f64();
    let cpu = probe::cpu_ns(server.pid)? - cpu;
    let mut row = results.recorder(NAME, CASE, of);
    row(RATE, "requests/s", requests as f64 / seconds);
    row(
        "CPU per request",
        "us",
        microseconds(cpu as f64 / requests as f64),
    );
    Ok(())
}
