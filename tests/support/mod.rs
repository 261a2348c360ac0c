//! What every integration test stands on: skipping aloud, waiting with a deadline, temporary
//! directories. Its parts start daemons in their own mount namespace ([`namespace`], [`daemon`]),
//! speak the wire without the crate's own code, so that no mistake cancels itself out
//! ([`protocol`], [`client`]), and act as the process of a virtual machine ([`owner`]).

// Every test program compiles its own copy of this module and uses a part of it.
#![allow(dead_code)]

pub mod client;
pub mod company;
pub mod daemon;
pub mod faults;
pub mod fuse;
pub mod libvirt;
pub mod manager;
pub mod namespace;
pub mod owner;
pub mod packages;
pub mod protocol;
pub mod random;
pub mod scene;
pub mod status;
pub mod systemd;
pub mod tracer;
pub mod upgrade;

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a test waits for something that must happen. Generous, because a slow machine is not
/// a failure; a passing test never waits that long.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Says aloud that a test does not run here. The caller returns after it.
///
/// The reason goes to stderr and, as a line, to the file named by `VIRTLOCKD_TEST_SKIPS`.
/// Where `CI` is `true` everything has to run, so there a skip is a failure.
pub fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
    if let Some(path) = std::env::var_os("VIRTLOCKD_TEST_SKIPS") {
        let line = format!("{reason}\n");
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("note the skipped test in $VIRTLOCKD_TEST_SKIPS");
    }
    if std::env::var("CI").is_ok_and(|value| value == "true") {
        panic!("a test was skipped where everything has to run: {reason}");
    }
}

/// Whether the daemon under test was built with a sanitizer (`VIRTLOCKD_SANITIZED`, set by
/// `tests/sanitize`). That keeps freed memory and its own notes: the daemon's size says nothing then.
pub fn is_sanitized() -> bool {
    std::env::var_os("VIRTLOCKD_SANITIZED").is_some()
}

/// Asserts a bound on the daemon's memory. With a sanitizer it is only said aloud that it does not
/// hold; the rest of the test holds there, too.
#[track_caller]
pub fn assert_memory(holds: bool, what: impl FnOnce() -> String) {
    if is_sanitized() && !holds {
        return eprintln!("NOT ASSERTED with a sanitizer: {}", what());
    }
    assert!(holds, "{}", what());
}

/// True for root. Anybody else gets a skip and false: mount namespaces need root.
pub fn require_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("needs root to make mount namespaces");
    }
    root
}

/// True where there is strace, which makes system calls slow or fail. A skip and false elsewhere.
pub fn require_strace() -> bool {
    let there = Path::new("/usr/bin/strace").exists();
    if !there {
        skip("needs strace (tests/run installs it)");
    }
    there
}

/// Asks `answer` every millisecond until it gives a value; panics with `what` after `limit`.
pub fn wait_for<T>(limit: Duration, what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = answer() {
            return value;
        }
        assert!(
            Instant::now() < end,
            "after {limit:?} still waiting for: {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// [`wait_for`] a condition.
pub fn wait_until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(limit, what, || holds().then_some(()));
}

/// A directory of a test's own, removed with everything in it when dropped.
pub struct TempDir {
    path: PathBuf,
}

impl TempDir {
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("virtlockd-test-{}-{count}", std::process::id());
            let path = std::env::temp_dir().join(name);
            match std::fs::create_dir(&path) {
                Ok(()) => return TempDir { path },
                // Left by a test that was killed, whose pid this one has now.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => (),
                Err(error) => panic!("make the directory {}: {error}", path.display()),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // A failure here must not hide the failure that unwinds through us.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A lock on byte 0 of a file, as somebody outside of the daemon sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenLock {
    /// A write lock; otherwise a read lock.
    pub exclusive: bool,
    /// The holder's pid; -1 for an open-file-description lock, which no process owns.
    pub pid: i32,
}

/// Who would stand in the way of an exclusive lock on byte 0 of `path`? `None`: nobody.
///
/// Only asks (`F_OFD_GETLK`); the file is opened for reading and nothing about it changes.
pub fn lock_probe(path: &Path) -> Option<SeenLock> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap_or_else(|error| panic!("open {} to ask for its lock: {error}", path.display()));
    let mut lock = byte_zero(libc::F_WRLCK);
    nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_GETLK(&mut lock))
        .unwrap_or_else(|error| panic!("F_OFD_GETLK on {}: {error}", path.display()));
    (i32::from(lock.l_type) != libc::F_UNLCK).then(|| SeenLock {
        exclusive: i32::from(lock.l_type) == libc::F_WRLCK,
        pid: lock.l_pid,
    })
}

/// A lock that a stranger to the daemon has, until it is dropped.
pub struct ForeignLock(std::fs::File);

impl Drop for ForeignLock {
    fn drop(&mut self) {
        // Closing alone does not do: a child that another test forks at this moment has the open
        // file, too.
        drop_lock(&self.0);
    }
}

/// Takes a lock on byte 0 as a stranger to the daemon would.
#[track_caller]
pub fn foreign_lock(path: &Path, exclusive: bool) -> ForeignLock {
    try_foreign_lock(path, exclusive)
        .unwrap_or_else(|| panic!("{} is locked by somebody", path.display()))
}

/// As [`foreign_lock`]; `None` if somebody's lock stands in the way.
pub fn try_foreign_lock(path: &Path, exclusive: bool) -> Option<ForeignLock> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap_or_else(|error| panic!("open {} to lock it: {error}", path.display()));
    set_lock(&file, exclusive).then(|| ForeignLock(file))
}

/// Tries to take an exclusive lock on byte 0 of an open file, as a stranger to the daemon would.
pub fn try_lock(file: &std::fs::File) -> bool {
    set_lock(file, true)
}

/// Tries to take a lock on byte 0 of an open file, of the kind that `exclusive` says.
pub fn set_lock(file: &std::fs::File, exclusive: bool) -> bool {
    let lock = byte_zero(if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    });
    match nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => true,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => false,
        Err(error) => panic!("F_OFD_SETLK: {error}"),
    }
}

/// Gives up whatever lock this open file has on byte 0.
pub fn drop_lock(file: &std::fs::File) {
    let lock = byte_zero(libc::F_UNLCK);
    nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_SETLK(&lock))
        .unwrap_or_else(|error| panic!("F_OFD_SETLK to unlock: {error}"));
}

/// Waits in the kernel until an exclusive lock on byte 0 can be had, and takes it.
pub fn wait_for_lock(file: &std::fs::File) {
    let lock = byte_zero(libc::F_WRLCK);
    loop {
        match nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_SETLKW(&lock)) {
            Ok(_) => return,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => panic!("F_OFD_SETLKW: {error}"),
        }
    }
}

fn byte_zero(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    }
}

/// Copies a program that is to be executed. A child process does the copying: a copy that this
/// process writes may be open for writing in a child that another test forks at that moment, and
/// then nobody can execute it (ETXTBSY).
pub fn install_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let status = std::process::Command::new("cp")
        .arg("--remove-destination")
        .args([from.as_ref(), to.as_ref()])
        .status()
        .expect("run cp");
    assert!(status.success(), "copy {}", from.as_ref().display());
}
