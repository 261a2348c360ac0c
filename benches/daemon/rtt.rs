//! Round trips: acquire and release of one file, one call at a time for a running machine, beside more
//! and more idle guests. Client and server share one CPU.

use std::time::{Duration, Instant};

use crate::client::{Client, acquire, register, release};
use crate::crowd::Crowd;
use crate::machines::Machines;
use crate::measure::{Outcome, microseconds, now_ns, percentile};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "rtt";
pub const PAIR_P50: &str = "pair, p50";
pub const PAIR_P99: &str = "pair, p99";
pub const CPU: &str = "CPU per request";

const INDEX: u32 = 800_000;
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURE: Duration = Duration::from_secs(2);
/// A slow daemon gets more time, until the percentiles mean something.
const FEWEST_PAIRS: usize = 100;
const MOST_PAIRS: usize = 40_000;

/// The name of a row's case.
pub fn case(idle: u32) -> String {
    format!("{idle} idle")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    let mut machines = Machines::ready(1)?;
    let server = Server::start(programs, subject, Placement::Shared)?;
    let owner = machines.start_one(&server, INDEX)?;
    server.make_disks(0..1)?;
    let mut crowd = Crowd::default();
    for &idle in &options.sizes.idle {
        if subject == Subject::C && idle > options.c_most_idle {
            results.note(format!(
                "rtt: the C daemon was not measured with {idle} idle guests"
            ));
            continue;
        }
        crowd.grow_to(&server.socket(), idle)?;
        let mut row = results.recorder(NAME, case(idle), subject);
        let mut measured = measure(&server, owner)?;
        row(
            PAIR_P50,
            "us",
            microseconds(percentile(&mut measured.pairs, 0.50)),
        );
        row(
            PAIR_P99,
            "us",
            microseconds(percentile(&mut measured.pairs, 0.99)),
        );
        row(CPU, "us", microseconds(measured.cpu_per_request));
    }
    Ok(())
}

struct Pairs {
    pairs: Vec<u64>,
    cpu_per_request: f64,
}

fn measure(server: &Server, owner: u32) -> Outcome<Pairs> {
    let disk = server.disk(0);
    let outside = server.outside(&disk);
    let mut client = Client::connect(&server.socket())?;
    client.call(&mut register(INDEX, owner))?;
    let mut acquire = acquire(&disk);
    let mut release = release(&disk);
    client.call(&mut acquire)?;
    if !probe::is_locked(&outside)? {
        return Err("acquire was answered, but the disk is not locked".into());
    }
    client.call(&mut release)?;
    if probe::is_locked(&outside)? {
        return Err("release was answered, but the disk is still locked".into());
    }
    let warm = Instant::now();
    while warm.elapsed() < WARM_UP {
        client.call(&mut acquire)?;
        client.call(&mut release)?;
    }
    let mut pairs = Vec::with_capacity(MOST_PAIRS);
    let cpu = probe::cpu_ns(server.pid)?;
    let start = Instant::now();
    while pairs.len() < MOST_PAIRS && (start.elapsed() < MEASURE || pairs.len() < FEWEST_PAIRS) {
        let begin = now_ns();
        client.call(&mut acquire)?;
        client.call(&mut release)?;
        pairs.push(now_ns() - begin);
    }
    let cpu = probe::cpu_ns(server.pid)? - cpu;
    let cpu_per_request = cpu as f64 / (2 * pairs.len()) as f64;
    Ok(Pairs {
        pairs,
        cpu_per_request,
    })
}
