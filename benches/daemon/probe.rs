//! What can be seen from outside: whether a file is locked, and what /proc says of a process.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::measure::{Outcome, now_ns};

/// The byte that every lock daemon locks: the first one.
pub fn byte_zero(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    }
}

fn open_disk(path: &Path) -> Outcome<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map_err(|e| format!("opening {} to look at its lock: {e}", path.display()))
}

/// Whether anybody else holds a lock on the file, of either kind.
fn is_locked_file(file: &File) -> Outcome<bool> {
    let mut lock = byte_zero(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(|e| format!("F_OFD_GETLK: {e}"))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

pub fn is_locked(disk: &Path) -> Outcome<bool> {
    is_locked_file(&open_disk(disk)?)
}

/// Waits until a disk is free and returns when that was seen. Looks every 50 us.
pub fn wait_until_free(disk: &Path, deadline: Instant) -> Outcome<u64> {
    let file = open_disk(disk)?;
    while is_locked_file(&file)? {
        if Instant::now() > deadline {
            return Err(format!(
                "{} is still locked at the deadline",
                disk.display()
            ));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(now_ns())
}

fn read(path: &str) -> Outcome<String> {
    fs::read_to_string(path).map_err(|e| format!("reading {path}: {e}"))
}

/// The process and everything it has started: a daemon may serve from a child of its own.
pub fn family(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        found.extend(
            children
                .split_whitespace()
                .filter_map(|child| child.parse::<i32>().ok()),
        );
    }
    found
}

/// The last that a process has started: a daemon's guardian has one, which serves.
pub fn youngest_child(pid: i32) -> Outcome<Option<i32>> {
    let children = read(&format!("/proc/{pid}/task/{pid}/children"))?;
    let last = children.split_whitespace().next_back();
    last.map(|child| child.parse().map_err(|e| format!("a pid: {e}")))
        .transpose()
}

fn threads(pid: i32) -> Vec<String> {
    let mut found = Vec::new();
    for pid in family(pid) {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        found.extend(
            entries
                .flatten()
                .map(|entry| entry.path().display().to_string()),
        );
    }
    found
}

/// CPU time of all threads so far, in nanoseconds.
pub fn cpu_ns(pid: i32) -> Outcome<u64> {
    let mut sum = 0;
    for thread in threads(pid) {
        let text = read(&format!("{thread}/schedstat"))?;
        let first = text
            .split_whitespace()
            .next()
            .and_then(|field| field.parse::<u64>().ok());
        sum += first.ok_or_else(|| format!("{thread}/schedstat is not a number: {text}"))?;
    }
    Ok(sum)
}

fn status_field(path: &str, field: &str) -> Outcome<u64> {
    let text = read(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| format!("{path} has no {field}"))
}

/// How often the threads went to sleep so far. A process that sleeps for ever adds nothing.
pub fn wakeups(pid: i32) -> Outcome<u64> {
    let counts = threads(pid)
        .into_iter()
        .map(|thread| status_field(&format!("{thread}/status"), "voluntary_ctxt_switches:"));
    counts.sum()
}

/// Resident memory in KiB.
pub fn resident_kib(pid: i32) -> Outcome<u64> {
    family(pid)
        .into_iter()
        .map(|pid| status_field(&format!("/proc/{pid}/status"), "VmRSS:"))
        .sum()
}

fn stat_field(pid: i32, number: usize) -> Outcome<String> {
    let text = read(&format!("/proc/{pid}/stat"))?;
    // The name in field 2 may hold blanks; what follows its closing bracket does not.
    let rest = text
        .rsplit_once(')')
        .map(|(_, rest)| rest)
        .unwrap_or_default();
    let field = rest.split_whitespace().nth(number - 3);
    field
        .map(str::to_owned)
        .ok_or_else(|| format!("/proc/{pid}/stat has no field {number}"))
}

/// Where the stack of the process starts: the kernel draws a new place at every exec.
pub fn stack_place(pid: i32) -> Outcome<String> {
    stat_field(pid, 28)
}

/// Whether the process runs. A zombie does not.
pub fn is_alive(pid: i32) -> bool {
    stat_field(pid, 3).is_ok_and(|state| state != "Z" && state != "X")
}
