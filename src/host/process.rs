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
/// again without a descriptor of it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Life {
    /// The inode of its pidfds, which no other process of this boot has (Linux 6.9).
    Inode(u64),
    /// When it started, clock ticks since boot.
    Start(u64),
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
    let found = fstat(pidfd)?;
    if PIDFD_DEVICE.load(Ordering::Relaxed) == UNASKED {
        let has_own = fstatfs(pidfd)?.filesystem_type() == PIDFD_FILE_SYSTEM;
        let device = if has_own { found.st_dev } else { NONE };
        PIDFD_DEVICE.store(device, Ordering::Relaxed);
    }
    if found.st_dev == PIDFD_DEVICE.load(Ordering::Relaxed) {
        return Ok(Life::Inode(found.st_ino));
    }
    let started = start_time(pid)?;
    // Asked by its number: it was its own until here if it is not dead.
    if is_dead(pidfd) {
        return Err(Errno::ESRCH);
    }
    Ok(Life::Start(started))
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
/// closes the sockets of a process before it calls it dead. (PF_EXITING in the flags, field 9.)
pub fn is_exiting(pid: i32) -> bool {
    const PF_EXITING: u32 = 0x4;
    std::fs::read(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| field(&stat, 9)?.parse::<u32>().ok())
        .is_some_and(|flags| flags & PF_EXITING != 0)
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
