//! A storm: all owners are killed at once. How long until every lock is free, and what does a
//! bystander notice?

use std::time::{Duration, Instant};

use crate::bystander::Bystander;
use crate::measure::{Outcome, milliseconds, now_ns};
use crate::nursery::{DISKS_PER_OWNER, Funeral, Nursery, Temper};
use crate::options::Options;
use crate::probe;
use crate::results::{Results, Row};
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "storm";
pub const FREE: &str = "all free after the last death";
pub const WORST: &str = "bystander's worst wait";

const FREE_LIMIT: Duration = Duration::from_secs(300);
/// The C daemon waits 3 s for each zombie, one after the other: so many are enough to see it.
const C_ZOMBIES: u32 = 4;
/// The bystander goes on for this long after the last lock is free.
const AFTERMATH: Duration = Duration::from_millis(200);
/// The bystander looks on for this long before the storm: what it sees then is the machine's doing.
const CALM: Duration = Duration::from_millis(500);

pub fn case(owners: u32, funeral: Funeral) -> String {
    let funeral = if funeral == Funeral::Reaped {
        "reaped"
    } else {
        "zombies"
    };
    format!("{owners} owners, {funeral}")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    let sizes = &options.sizes;
    let reaped = sizes
        .storm_reaped
        .iter()
        .map(|&owners| (owners, Funeral::Reaped));
    let zombies = sizes
        .storm_zombies
        .iter()
        .map(|&owners| (owners, Funeral::Zombies));
    for (owners, funeral) in reaped.chain(zombies) {
        let extrapolates = subject == Subject::C && funeral == Funeral::Zombies;
        let killed = if extrapolates {
            owners.min(C_ZOMBIES)
        } else {
            owners
        };
        let storm = measure(programs, subject, killed, funeral)?;
        let row = |metric| Row {
            scenario: NAME,
            case: case(owners, funeral),
            metric,
            unit: "ms",
        };
        let calm = milliseconds(storm.calm_ns as f64);
        results.record(row("bystander's worst wait before"), subject, calm);
        let times = [
            // The last owner's locks are free before it is fenced, but after all others were.
            (FREE, storm.free_ns, killed - 1),
            ("all free after the first kill", storm.all_ns, killed - 1),
            (WORST, storm.worst_ns, killed),
        ];
        for (metric, value, fences) in times {
            let measured = milliseconds(value as f64);
            if killed == owners {
                results.record(row(metric), subject, measured);
            } else {
                let each = measured / f64::from(fences.max(1));
                let more = each * f64::from(owners - killed);
                results.record_extrapolated(row(metric), subject, measured + more);
            }
        }
    }
    Ok(())
}

struct Storm {
    free_ns: u64,
    all_ns: u64,
    worst_ns: u64,
    calm_ns: u64,
}

fn measure(programs: &Programs, subject: Subject, owners: u32, funeral: Funeral) -> Outcome<Storm> {
    let mut server = Server::start(programs, subject, Placement::Split)?;
    let mut nursery = Nursery::start(&server, owners, funeral, Temper::Mild)?;
    let disks: Vec<_> = (0..owners * DISKS_PER_OWNER)
        .map(|disk| server.outside(&server.disk(disk)))
        .collect();
    for disk in &disks {
        if !probe::is_locked(disk)? {
            return Err(format!("{} is not locked before the storm", disk.display()));
        }
    }
    let mut bystander = Bystander::start(&server)?;
    std::thread::sleep(CALM);
    let calm = bystander.take()?;
    let (first_kill, last_death) = nursery.kill_all()?;
    let deadline = Instant::now() + FREE_LIMIT;
    // A lock that is free stays free: one walk over the disks ends when the last is free.
    for disk in &disks {
        probe::wait_until_free(disk, deadline)?;
    }
    let free = now_ns();
    std::thread::sleep(AFTERMATH);
    let waits = bystander.take()?;
    server.check_alive()?;
    Ok(Storm {
        free_ns: free.saturating_sub(last_death),
        all_ns: free.saturating_sub(first_kill),
        worst_ns: waits.worst,
        calm_ns: calm.worst,
    })
}
