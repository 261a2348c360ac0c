//! Somebody lists what is held again and again, as `virtlockctl status` does, while thousands of machines run:
//! what does a bystander notice? The one who lists never waits for anything but the next page, and has the CPU that
//! the server does not have.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::boot::{DISKS_PER_MACHINE, boot, check_all_locked};
use crate::bystander::Bystander;
use crate::client::connect;
use crate::helper::Helper;
use crate::machines::Machines;
use crate::measure::{Outcome, microseconds};
use crate::options::Options;
use crate::probe;
use crate::protocol::{
    CALL, HEADER_BYTES, OWNERS, RESOURCES, STATUS_OK, STATUS_PROGRAM, at, frame, length_word,
    put_u32, word,
};
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "listing";
pub const RATIO: &str = "pair, p99: listed / before";

/// The bystander alone, and beside the one who lists; either ends before it is asked what it saw.
const CALM: Duration = Duration::from_secs(3);
const LISTED: Duration = Duration::from_secs(5);
const BEGINNING: Duration = Duration::from_millis(200);
const START_LIMIT: Duration = Duration::from_secs(60);
/// The longest page that is read, bytes.
const LONGEST_PAGE: usize = 1 << 20;

pub fn case(machines: u32) -> String {
    format!("{machines} VMs")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    if subject == Subject::C {
        results.note("listing: libvirt's daemon does not say what it holds".into());
        return Ok(());
    }
    for &machines in &options.sizes.listed {
        let mut processes = Machines::ready(machines)?;
        let mut server = Server::start(programs, subject, Placement::Apart)?;
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        boot(&server, &mut processes, machines)?;
        let mut bystander = Bystander::start_beside(&server, true)?;
        std::thread::sleep(BEGINNING);
        bystander.take()?;
        std::thread::sleep(CALM);
        let calm = bystander.take()?;
        let socket = server.admin_socket().display().to_string();
        let mut lister = Helper::start("lister", &[socket])?;
        lister.hear_numbers("ready", START_LIMIT)?;
        std::thread::sleep(BEGINNING);
        bystander.take()?;
        count(&mut lister)?;
        let (start, cpu) = (Instant::now(), probe::cpu_ns(server.pid)?);
        std::thread::sleep(LISTED);
        let (pages, lists) = count(&mut lister)?;
        let waits = bystander.take()?;
        let cpu_ns = probe::cpu_ns(server.pid)? - cpu;
        let seconds = start.elapsed().as_secs_f64();
        drop(lister);
        server.check_alive()?;
        check_all_locked(&server, machines)?;
        if lists == 0 {
            return Err(format!("{pages} pages, and no whole list in {LISTED:?}"));
        }
        let mut row = results.recorder(NAME, case(machines), subject);
        let time = |nanoseconds: u64| microseconds(nanoseconds as f64);
        row("pair before, p50", "us", time(calm.pair_p50));
        row("pair before, p99", "us", time(calm.pair_p99));
        row("pair, p50", "us", time(waits.pair_p50));
        row("pair, p99", "us", time(waits.pair_p99));
        row(RATIO, "", waits.pair_p99 as f64 / calm.pair_p99 as f64);
        row("worst wait", "us", time(waits.worst));
        row("lists", "a second", lists as f64 / seconds);
        row("pages", "a second", pages as f64 / seconds);
        row("CPU", "%", cpu_ns as f64 / 1e7 / seconds);
    }
    Ok(())
}

/// How many pages and whole lists there were since the last time.
fn count(lister: &mut Helper) -> Outcome<(u64, u64)> {
    lister.say("count")?;
    match lister.hear_numbers("listed", START_LIMIT)?.as_slice() {
        &[pages, lists] => Ok((pages, lists)),
        other => Err(format!("the lister counted {other:?}")),
    }
}

/// The helper's side.
pub fn list(socket: &Path) -> Outcome<()> {
    let mut stream = connect(socket)?;
    println!("ready");
    let (mut pages, mut lists) = (0u64, 0u64);
    let mut page = Vec::new();
    let mut serial = 0;
    loop {
        for procedure in [RESOURCES, OWNERS] {
            let mut next = Some([0; 16]);
            while let Some(from) = next {
                serial += 1;
                next = turn_page(&mut stream, procedure, serial, from, &mut page)?;
                pages += 1;
                let stdin = std::io::stdin();
                let mut interest = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
                let told = poll(&mut interest, PollTimeout::ZERO);
                if told.map_err(|e| format!("poll: {e}"))? == 0 {
                    continue;
                }
                let mut line = String::new();
                stdin
                    .read_line(&mut line)
                    .map_err(|e| format!("reading a command: {e}"))?;
                if line.is_empty() {
                    return Ok(());
                }
                println!("listed {pages} {lists}");
                (pages, lists) = (0, 0);
            }
        }
        lists += 1;
    }
}

/// One page of a list; where the next one begins.
fn turn_page(
    stream: &mut UnixStream,
    procedure: i32,
    serial: u32,
    from: [u8; 16],
    page: &mut Vec<u8>,
) -> Outcome<Option<[u8; 16]>> {
    let failed = |error: std::io::Error| format!("page {serial}: {error}");
    let mut arguments = from.to_vec();
    put_u32(&mut arguments, 0);
    let call = frame(
        STATUS_PROGRAM,
        1,
        procedure,
        CALL,
        serial,
        STATUS_OK,
        &arguments,
    );
    stream.write_all(&call).map_err(failed)?;
    page.resize(HEADER_BYTES, 0);
    stream.read_exact(page).map_err(failed)?;
    let length = length_word(page).unwrap_or_default();
    if !(HEADER_BYTES..LONGEST_PAGE).contains(&length) {
        return Err(format!("page {serial} has {length} bytes"));
    }
    page.resize(length, 0);
    stream
        .read_exact(&mut page[HEADER_BYTES..])
        .map_err(failed)?;
    if word(page, at::SERIAL) != serial || word(page, at::STATUS) as i32 != STATUS_OK {
        return Err(format!("page {serial} was refused"));
    }
    // At the end stands where to go on: a one and sixteen bytes of which the last are not zero, or a zero.
    let is_last = page.last_chunk() == Some(&[0; 4]);
    Ok(page.last_chunk().filter(|_| !is_last).copied())
}
