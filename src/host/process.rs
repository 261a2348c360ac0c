//! Other processes, through pidfds: a pidfd means one process for ever, whatever happens to its
//! number (pidfd_open(2)). And the number of our own.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};

use super::errno::Errno;

/// The number of the process that is the daemon to everybody outside; 0 until somebody has said so.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// From here on this process is the daemon: main says so first thing, and the process in the background
/// again. A child that works for the daemon keeps the number that it was told.
pub fn set_started() {
    STARTED.store(std::process::id(), Ordering::Relaxed);
}

/// The number of the process that was started: the one in the pid file, in the log, in the service
/// manager's hands, and the owner of the POSIX locks.
pub fn started() -> u32 {
    match STARTED.load(Ordering::Relaxed) {
        0 => std::process::id(),
        number => number,
    }
}

/// What tells a process from every other one of the same number, as long as the host is up: to know it
/// again without a descriptor of it. The order of the variants is part of the ledger's format.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Life {
    /// The inode of its pidfds, which no other process of this boot has (Linux 6.9).
    Inode(u64),
    /// When it started, clock ticks since boot, and it lived on when they were over: no later process of its
    /// number has started in the same tick.
    Start(u64),
    /// The same of one that was looked at in the very tick in which it started: should it have ended in it,
    /// too, another one may have its number and this start.
    Fresh(u64),
}

/// Whether a process is the one that was known by a [`Life`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// It is.
    Same,
    /// It is, or a later one that cannot be told from it; the other is dead then.
    Alike,
    /// It is another one.
    Another,
    /// Nobody can tell.
    Unknown,
}

/// The device of all pidfds, where these have inodes of their own; [`UNASKED`] or [`NONE`].
static PIDFD_DEVICE: AtomicU64 = AtomicU64::new(UNASKED);
const UNASKED: u64 = u64::MAX;
const NONE: u64 = u64::MAX - 1;

/// PID_FS_MAGIC of linux/magic.h: before it, all pidfds were one inode.
const PIDFD_FILE_SYSTEM: FsType = FsType(0x5049_4446);

/// What tells the process of a pidfd, whose number is `pid`, from every other. ESRCH if it has ended and
/// cannot be told any more.
pub fn life(pidfd: &OwnedFd, pid: i32) -> Result<Life, Errno> {
    if let Some(inode) = inode(pidfd)? {
        return Ok(Life::Inode(inode));
    }
    let started = start_time(pid)?;
    // Asked by its number: it was its own until here if it is not dead.
    if is_dead(pidfd) {
        return Err(Errno::ESRCH);
    }
    life_from(started)
}

/// What tells a process by its start (see [`start_time`]) that is alive.
///
/// # Errors
/// Why that says nothing of it.
pub fn life_from(started: u64) -> Result<Life, Errno> {
    if !has_own_numbers_in_proc()? {
        return Err(Errno::EXDEV);
    }
    let everywhere = ticks_everywhere(started)?;
    Ok(if ticks_now()? > started {
        Life::Start(everywhere)
    } else {
        Life::Fresh(everywhere)
    })
}

/// Whether the process of a pidfd, whose number is `pid`, is the one that was known by this.
pub fn compare(pidfd: &OwnedFd, pid: i32, known: Life) -> Likeness {
    let started = || -> Result<u64, Errno> {
        let started = start_time(pid)?;
        match has_own_numbers_in_proc()? && !is_dead(pidfd) {
            true => ticks_everywhere(started),
            false => Err(Errno::ESRCH),
        }
    };
    let (is_it, same) = match known {
        Life::Inode(then) => {
            let found = inode(pidfd).ok().flatten();
            (found.map(|now| now == then), Likeness::Same)
        }
        Life::Start(then) => (started().ok().map(|now| now == then), Likeness::Same),
        Life::Fresh(then) => (started().ok().map(|now| now == then), Likeness::Alike),
    };
    match is_it {
        Some(true) => same,
        Some(false) => Likeness::Another,
        None => Likeness::Unknown,
    }
}

/// The inode of a pidfd, where it is its process's own.
fn inode(pidfd: &OwnedFd) -> Result<Option<u64>, Errno> {
    let found = fstat(pidfd)?;
    if PIDFD_DEVICE.load(Ordering::Relaxed) == UNASKED {
        let has_own = fstatfs(pidfd)?.filesystem_type() == PIDFD_FILE_SYSTEM;
        let device = if has_own { found.st_dev } else { NONE };
        PIDFD_DEVICE.store(device, Ordering::Relaxed);
    }
    let has_own = found.st_dev == PIDFD_DEVICE.load(Ordering::Relaxed);
    Ok(has_own.then_some(found.st_ino))
}

/// Whether `/proc` calls processes by the numbers that they have here, and not by those of an outer namespace.
fn has_own_numbers_in_proc() -> Result<bool, Errno> {
    Ok(namespace_numbers("self")? == [own_number()])
}

/// Clock ticks since boot, as [`start_time`] has them.
fn ticks_now() -> Result<u64, Errno> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let seconds = u64::try_from(now.tv_sec()).map_err(|_| Errno::EIO)?;
    let nanoseconds = u64::try_from(now.tv_nsec()).map_err(|_| Errno::EIO)?;
    let of_second = nanoseconds / (NANOSECONDS / TICKS);
    Ok(seconds.saturating_mul(TICKS).saturating_add(of_second))
}

/// Ticks of a second in everything that the kernel shows (USER_HZ).
const TICKS: u64 = 100;
const NANOSECONDS: u64 = 1_000_000_000;

/// The same without what a time namespace adds for those in it (time_namespaces(7)): so it means the same in
/// every one of them.
fn ticks_everywhere(ticks: u64) -> Result<u64, Errno> {
    let offsets = match std::fs::read_to_string("/proc/self/timens_offsets") {
        Ok(offsets) => offsets,
        // There are no such namespaces.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(ticks),
        Err(error) => return Err(super::errno::of(&error)),
    };
    without_offset(ticks, &offsets).ok_or(Errno::EIO)
}

fn without_offset(ticks: u64, offsets: &str) -> Option<u64> {
    let offset = offsets
        .lines()
        .find_map(|line| line.strip_prefix("boottime"))?;
    let mut numbers = offset.split_ascii_whitespace().map(str::parse::<i64>);
    let (seconds, nanoseconds) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    // By a part of a tick both ends of it would be moved.
    let a_tick = i64::try_from(NANOSECONDS / TICKS).ok()?;
    if nanoseconds.checked_rem(a_tick)? != 0 {
        return None;
    }
    let more = seconds.checked_mul(i64::try_from(TICKS).ok()?)?;
    let more = more.checked_add(nanoseconds.checked_div(a_tick)?)?;
    ticks.checked_add_signed(more.checked_neg()?)
}

/// Which boot of the host this is. `None` if that cannot be found out.
pub fn boot() -> Option<[u8; 16]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let digits: Vec<u8> = text.into_iter().filter(u8::is_ascii_hexdigit).collect();
    let number = std::str::from_utf8(&digits).ok()?;
    let number = u128::from_str_radix(number, 16).ok()?;
    (digits.len() == 32).then_some(number.to_be_bytes())
}

/// In which pid namespace this process is: in another one numbers mean other processes. `None` if that
/// cannot be found out.
pub fn namespace() -> Option<u64> {
    let found = nix::sys::stat::stat("/proc/self/ns/pid").ok()?;
    Some(found.st_ino)
}

/// A process that cannot be confused with a later one of the same number.
#[derive(Debug)]
pub struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// The process behind a pidfd that the kernel gave us.
    pub fn from_pidfd(pidfd: OwnedFd) -> Process {
        Process { pidfd }
    }

    /// The process that has the number `pid` now, unless it started at another time than
    /// `start_time_then` (see [`start_time`]): then the one meant is gone, as it is with ESRCH. Any
    /// other error says nothing about it.
    pub fn open(pid: i32, start_time_then: u64) -> Result<Process, Errno> {
        let process = Process::open_any(pid)?;
        // Read after the pidfd is open: if the number had been taken over before, this shows it,
        // and afterwards the pidfd cannot change its meaning.
        if start_time(pid)? == start_time_then {
            Ok(process)
        } else {
            Err(Errno::ESRCH)
        }
    }

    /// The process that has the number `pid` now.
    pub fn open_any(pid: i32) -> Result<Process, Errno> {
        // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let descriptor = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Ok(Process { pidfd })
    }

    /// Waits until the process has ended.
    pub fn wait_for_end(&self) {
        while !self.is_dead() {
            let mut asked = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut asked, PollTimeout::NONE).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }

    /// Whether the process has ended: see [`is_dead`].
    pub fn is_dead(&self) -> bool {
        is_dead(&self.pidfd)
    }

    /// Waits for its end, so long at most; whether it has ended.
    pub fn ends_within(&self, milliseconds: u16) -> bool {
        let mut polled = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        // Interrupted, it is asked once more without a wait.
        match poll(&mut polled, PollTimeout::from(milliseconds)) {
            Ok(found) => found == 1,
            Err(_) => self.is_dead(),
        }
    }

    /// Sends a signal: see [`signal`].
    pub fn signal(&self, which: Signal) -> Result<(), Errno> {
        signal(&self.pidfd, which)
    }

    /// The descriptor, which goes on meaning this process.
    pub fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// The descriptor: readable once the process is dead.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }
}

/// Whether the process of a pidfd has ended. One that its parent has not reaped yet counts as dead: it
/// runs no code and has no open file.
pub fn is_dead(pidfd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut polled, PollTimeout::ZERO).map_err(Errno::from) {
            Err(Errno::EINTR) => (),
            result => return result == Ok(1),
        }
    }
}

/// Sends a signal to the process of a pidfd. ESRCH when it has been reaped.
pub fn signal(pidfd: &OwnedFd, signal: Signal) -> Result<(), Errno> {
    // SAFETY: a null siginfo is allowed (pidfd_send_signal(2)); nothing else is a pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as i32,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Whether a process is in the pid namespace of this one, so that the two mean the same process by a
/// number. ESRCH if there is no such process. (`NSpid` in `/proc/PID/status`; proc_pid_status(5)):
/// a process of our namespace has one number here, one of a namespace inside has two or more. Unlike
/// the links in `/proc/PID/ns`, everybody may read it.
pub fn shares_numbers(pid: i32) -> Result<bool, Errno> {
    if pid <= 0 {
        return Ok(false);
    }
    // Where /proc is that of an outer namespace, what it shows of a number is another process.
    let own = namespace_numbers("self")?;
    Ok(own == [own_number()] && namespace_numbers(&pid.to_string())?.len() == 1)
}

/// What `/proc/PID/status` hardly ever exceeds, bytes.
const LONGEST_STATUS: usize = 8 * 1024;

/// The number of this process.
pub fn own_number() -> i32 {
    nix::unistd::getpid().as_raw()
}

/// A process's numbers, from the namespace of `/proc` inwards to its own.
fn namespace_numbers(process: &str) -> Result<Vec<i32>, Errno> {
    let mut status = Vec::with_capacity(LONGEST_STATUS);
    let read = File::open(format!("/proc/{process}/status"))
        .and_then(|mut file| file.read_to_end(&mut status));
    match read {
        Ok(_) => (),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Errno::ESRCH),
        Err(error) => return Err(super::errno::of(&error)),
    }
    parse_namespace_numbers(&status).ok_or(Errno::EIO)
}

fn parse_namespace_numbers(status: &[u8]) -> Option<Vec<i32>> {
    // A newline in the program's name is written as two characters, so a line is a line.
    let line = status
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"NSpid:"))?;
    let numbers = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    numbers.map(|number| number.parse().ok()).collect()
}

/// Whether a process with this number can be the owner of locks whose death is brought about or waited for: it
/// is not that with which everything ends, nor this daemon, nor a part of the kernel.
pub fn may_be_owner(pid: i32) -> bool {
    pid > 1
        && pid != own_number()
        && pid != started().cast_signed()
        && flags(pid).is_none_or(|flags| flags & PF_KTHREAD == 0)
}

/// A thread of the kernel, in the flags of a process.
const PF_KTHREAD: u32 = 0x0020_0000;
/// One that is on its way out.
const PF_EXITING: u32 = 0x4;

/// The flags of a process (`/proc/PID/stat`, field 9).
fn flags(pid: i32) -> Option<u32> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    field(&stat, 9)?.parse().ok()
}

/// Forgets the children of this process that have ended. Whether there are others that have not.
pub fn reap_children() -> bool {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    let any = nix::unistd::Pid::from_raw(-1);
    loop {
        match waitpid(any, Some(WaitPidFlag::WNOHANG)).map_err(Errno::from) {
            Ok(WaitStatus::StillAlive) => return true,
            Ok(_) | Err(Errno::EINTR) => (),
            Err(_) => return false,
        }
    }
}

/// When a process started, in clock ticks since boot (`/proc/PID/stat`, field 22; proc(5)).
/// ESRCH if there is no such process; another error, which says nothing about the process, if its
/// file cannot be read.
pub fn start_time(pid: i32) -> Result<u64, Errno> {
    let stat = match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Errno::ESRCH),
        Err(error) => return Err(super::errno::of(&error)),
    };
    parse_start_time(&stat).ok_or(Errno::EIO)
}

/// The signals that this process ignores, as it was started: that of number n is bit n - 1. None if that cannot
/// be found out.
pub fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let digits = status.lines().find_map(|it| it.strip_prefix("SigIgn:"));
    digits.map_or(0, |it| u64::from_str_radix(it.trim(), 16).unwrap_or(0))
}

/// The process that made this one, or that it was given to when that one ended. `None` if there is no such
/// process.
pub fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    field(&stat, 4)?.parse().ok()
}

/// The name of a process's program as the kernel keeps it: 15 bytes at most, which the process itself may
/// have chosen.
pub fn name(pid: i32) -> Option<Vec<u8>> {
    let mut name = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Some(name)
}

fn parse_start_time(stat: &[u8]) -> Option<u64> {
    field(stat, 22)?.parse().ok()
}

/// The field with this number of a line of `/proc/PID/stat`, from the third one on.
fn field(stat: &[u8], number: usize) -> Option<&str> {
    // The second field is the program's name in parentheses, which may hold blanks and
    // parentheses itself: count from the last one.
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let after_name = std::str::from_utf8(stat.get(end_of_name..)?).ok()?;
    after_name
        .split_ascii_whitespace()
        .nth(number.checked_sub(2)?)
}

/// Whether a process waits until something happens at one of its descriptors, as the main loop of a daemon
/// does that has nothing to do (`/proc/PID/syscall`). EACCES or EPERM where others may not look.
pub fn waits_for_events(pid: u32) -> Result<bool, Errno> {
    let calls = [
        libc::SYS_ppoll,
        libc::SYS_epoll_pwait,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait,
    ];
    let call = std::fs::read_to_string(format!("/proc/{pid}/syscall"))
        .map_err(|error| super::errno::of(&error))?;
    // "running" if it does not wait at all.
    let number = call.split_ascii_whitespace().next().map(str::parse);
    Ok(matches!(number, Some(Ok(number)) if calls.contains(&number)))
}

/// Whether a process is on its way out already, so that a signal would change nothing: the kernel
/// closes the sockets of a process before it calls it dead.
pub fn is_exiting(pid: i32) -> bool {
    flags(pid).is_some_and(|flags| flags & PF_EXITING != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn the_start_time_survives_a_hostile_program_name() {
        let stat = b"7 (a) S 1 (b c) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_start_time(stat), Some(4711));
        assert_eq!(parse_start_time(b"7 (cut"), None);
    }

    #[test]
    fn a_process_inside_another_pid_namespace_has_more_than_one_number() {
        let status = b"Name:\tNSpid: 1\nPid:\t7\nNSpid:\t7\t1\nNSsid:\t7\t0\n";
        assert_eq!(parse_namespace_numbers(status), Some(vec![7, 1]));
        assert_eq!(parse_namespace_numbers(b"Name:\tx\n"), None);
        assert_eq!(shares_numbers(own_pid()), Ok(true));
        assert_eq!(shares_numbers(0), Ok(false));
        assert_eq!(shares_numbers(i32::MAX), Err(Errno::ESRCH));
    }

    #[test]
    fn only_a_missing_process_is_said_to_be_missing() {
        // Greater than any process id can be (PID_MAX_LIMIT).
        assert_eq!(start_time(i32::MAX), Err(Errno::ESRCH));
        assert!(start_time(own_pid()).is_ok());
    }

    #[test]
    fn a_recycled_number_is_not_the_process_that_was_meant() {
        let start = start_time(own_pid()).unwrap();
        assert!(Process::open(own_pid(), start).is_ok());
        assert_eq!(
            Process::open(own_pid(), start + 1).err(),
            Some(Errno::ESRCH)
        );
    }

    #[test]
    fn a_process_is_known_again_and_no_other_is_taken_for_it() {
        let life_of = |pid| {
            let process = Process::open_any(pid).unwrap();
            life(process.pidfd(), pid)
        };
        let own = life_of(own_pid()).unwrap();
        assert_eq!(life_of(own_pid()), Ok(own));
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let other = life_of(i32::try_from(child.id()).unwrap()).unwrap();
        // Clock ticks are long: two processes may have started in the same one, under two numbers.
        assert!(other != own || matches!(own, Life::Start(_)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(boot().map(|id| id.len()), Some(16));
        assert!(namespace().is_some());
    }

    #[test]
    fn a_process_is_compared_by_what_it_was_known_by() {
        let process = Process::open_any(own_pid()).unwrap();
        let is = |life| compare(process.pidfd(), own_pid(), life);
        let started = ticks_everywhere(start_time(own_pid()).unwrap()).unwrap();
        assert_eq!(is(Life::Start(started)), Likeness::Same);
        assert_eq!(is(Life::Fresh(started)), Likeness::Alike);
        assert_eq!(is(Life::Start(started + 1)), Likeness::Another);
        assert_eq!(is(Life::Fresh(started + 1)), Likeness::Another);
        let own = life(process.pidfd(), own_pid()).unwrap();
        assert_eq!(is(own), Likeness::Same);
        if let Life::Inode(inode) = own {
            assert_eq!(is(Life::Inode(inode + 1)), Likeness::Another);
        }
        // Its start can be asked for by its number alone.
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let other = Process::open_any(pid).unwrap();
        let start = ticks_everywhere(start_time(pid).unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let likeness = compare(other.pidfd(), pid, Life::Start(start));
        assert_eq!(likeness, Likeness::Unknown);
    }

    #[test]
    fn a_start_in_the_tick_that_is_now_may_be_another_one_s() {
        let now = ticks_now().unwrap();
        let everywhere = ticks_everywhere(0).unwrap();
        assert_eq!(everywhere, 0, "the tests run in no time namespace");
        assert_eq!(life_from(now - 1), Ok(Life::Start(now - 1)));
        assert_eq!(life_from(now + 1000), Ok(Life::Fresh(now + 1000)));
    }

    #[test]
    fn a_time_namespace_moves_a_start_by_whole_ticks_or_nobody_knows_it() {
        let offsets = |boot: &str| format!("monotonic           7         0\nboottime {boot}\n");
        let without = |boot| without_offset(100_000, &offsets(boot));
        assert_eq!(without("        0         0"), Some(100_000));
        assert_eq!(without("      10         0"), Some(99_000));
        assert_eq!(without("     -10         0"), Some(101_000));
        assert_eq!(without("     -10 990000000"), Some(100_901));
        assert_eq!(without("      10         1"), None);
        assert_eq!(without_offset(1, "monotonic 0 0"), None);
    }

    #[test]
    fn what_ends_with_everything_else_and_the_kernel_s_own_are_no_owners() {
        for pid in [i32::MIN, -1, 0, 1, own_pid()] {
            assert!(!may_be_owner(pid), "{pid}");
        }
        let parent = std::os::unix::process::parent_id();
        assert!(may_be_owner(i32::try_from(parent).unwrap()));
        if name(2).as_deref() == Some(b"kthreadd") {
            assert!(!may_be_owner(2));
        }
    }

    #[test]
    fn a_killed_process_is_dead_before_its_parent_reaps_it() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = Process::open_any(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(!process.is_dead());
        process.signal(Signal::SIGKILL).unwrap();
        let mut polled = [PollFd::new(process.pidfd().as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::from(10_000u16)).unwrap();
        assert!(process.is_dead());
        child.wait().unwrap();
        assert_eq!(process.signal(Signal::SIGKILL), Err(Errno::ESRCH));
    }
}
