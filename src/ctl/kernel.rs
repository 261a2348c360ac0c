//! What the kernel knows of locks: those of one process's open files, and who of this host has one on a file.
//! Numbers of processes mean what they do in this process's namespace.

use std::os::unix::ffi::OsStrExt;

use crate::host::process;

/// A lock on byte 0, which is the one that lock daemons take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Whether others may have one, too.
    pub is_shared: bool,
    /// The file's device, as major and minor number, and its inode.
    pub device: (u32, u32),
    /// Its inode.
    pub inode: u64,
    /// The name by which the process has it open.
    pub path: Vec<u8>,
}

/// The device of a `st_dev`, as the kernel writes it in lists of locks.
pub fn device(number: u64) -> (u32, u32) {
    let (major, minor) = (libc::major(number), libc::minor(number));
    (major, minor)
}

/// The locks of a process's open files, but for those of its own: a pid file and a ledger.
pub fn locks_of(pid: i32) -> std::io::Result<Vec<Lock>> {
    let mut locks = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let Ok(entry) = entry else { continue };
        // One that is closed by now has no lock.
        let Ok(text) = std::fs::read_to_string(entry.path()) else {
            continue;
        };
        for line in text.lines().filter_map(|line| line.strip_prefix("lock:")) {
            let number = entry.file_name();
            let link = format!("/proc/{pid}/fd/{}", number.to_string_lossy());
            let path = std::fs::read_link(link).unwrap_or_default();
            let path = path.as_os_str().as_bytes();
            if let Some(lock) = parse(line, path)
                && !is_own(path)
                && !locks.contains(&lock)
            {
                locks.push(lock);
            }
        }
    }
    locks.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(locks)
}

fn is_own(path: &[u8]) -> bool {
    [&b"/virtlockd.pid"[..], b"/virtlockd-ledger"]
        .iter()
        .any(|own| path.ends_with(own))
}

/// A line as in `/proc/locks`: `1: OFDLCK ADVISORY  WRITE -1 00:2f:4 0 0`.
fn parse(line: &str, path: &[u8]) -> Option<Lock> {
    let mut words = line.split_ascii_whitespace();
    let _number = words.next()?;
    let kind = words.next()?;
    if !matches!(kind, "POSIX" | "OFDLCK") {
        return None;
    }
    let (_advisory, mode, _pid) = (words.next()?, words.next()?, words.next()?);
    let mut file = words.next()?.split(':');
    let hexadecimal = |word: &str| u32::from_str_radix(word, 16).ok();
    let device = (hexadecimal(file.next()?)?, hexadecimal(file.next()?)?);
    let inode = file.next()?.parse().ok()?;
    if (words.next()?, words.next()?) != ("0", "0") {
        return None;
    }
    Some(Lock {
        is_shared: mode == "READ",
        device,
        inode,
        path: path.to_vec(),
    })
}

/// All processes of this host.
pub fn processes() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.collect()
}

/// The processes that have a lock on this file. All that may be looked at are, one open file after the other.
pub fn holders(device: (u32, u32), inode: u64) -> Vec<i32> {
    let has_it = |pid: &i32| {
        let locks = locks_of(*pid).unwrap_or_default();
        locks
            .iter()
            .any(|lock| lock.inode == inode && lock.device == device)
    };
    processes().into_iter().filter(has_it).collect()
}

/// The lock daemon that listens at a socket: whoever the kernel says listens there, if that is its name, or
/// else the only process of that name. (A service manager may have made the socket.)
pub fn daemon(listens: Option<i32>) -> Option<i32> {
    let is_it = |pid: &i32| process::name(*pid).is_some_and(|name| name == b"virtlockd");
    if let Some(pid) = listens.filter(is_it) {
        return Some(pid);
    }
    let mut all = processes().into_iter().filter(is_it);
    let first = all.next()?;
    all.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_of_byte_0_are_read_and_others_are_not() {
        let lock = parse("\t1: OFDLCK ADVISORY  WRITE -1 fd:2f:4 0 0", b"/d").unwrap();
        assert_eq!((lock.device, lock.inode), ((0xfd, 0x2f), 4));
        assert!(!lock.is_shared);
        assert!(
            parse("2: POSIX  ADVISORY  READ 7 00:2f:4 0 0", b"")
                .unwrap()
                .is_shared
        );
        for other in [
            "1: FLOCK  ADVISORY  WRITE 7 00:2f:4 0 EOF",
            "1: OFDLCK ADVISORY  WRITE -1 00:2f:4 0 EOF",
            "1: POSIX  ADVISORY  WRITE 7 00:2f:4 100 101",
            "1: POSIX",
            "",
        ] {
            assert_eq!(parse(other, b""), None, "{other}");
        }
    }
}
