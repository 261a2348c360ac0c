//! The guests that run on this host, as `/proc` shows them: QEMU's processes, and the disks that they have open.
//! Nothing here waits for a file system for ever.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::kernel;
use super::leases::Leases;
use crate::host::file;
use crate::host::process;

/// A file that a guest has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The name by which it was opened.
    pub path: PathBuf,
    /// As the daemon tells files apart.
    pub file: (u64, u64),
    /// Whether it may write to it.
    pub writes: bool,
    /// The path of libvirt's lease for it, if it has one; or why nobody can tell.
    pub lease: Result<Option<Vec<u8>>, String>,
}

/// A guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its process.
    pub pid: i32,
    /// The domain's name, if its command line has one.
    pub name: Option<Vec<u8>>,
    /// Its open files, but for what no lock daemon locks; `None` if they may not be looked at.
    pub open: Option<Vec<Open>>,
}

/// All of them, with the leases that their disks have.
pub fn running(leases: &Leases) -> Vec<Guest> {
    let mut guests: Vec<Guest> = kernel::processes()
        .into_iter()
        .filter(|pid| {
            let name = process::name(*pid).unwrap_or_default();
            name.starts_with(b"qemu-system") || name == b"qemu-kvm"
        })
        .map(|pid| Guest {
            pid,
            name: name(pid),
            open: open_files(pid, leases),
        })
        .collect();
    guests.sort_by(|one, other| (&one.name, one.pid).cmp(&(&other.name, other.pid)));
    guests
}

/// What stands behind `-name guest=`.
fn name(pid: i32) -> Option<Vec<u8>> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    words.find(|word| *word == b"-name")?;
    let value = words.next()?;
    let value = value.strip_prefix(b"guest=").unwrap_or(value);
    // A comma in a name is doubled.
    let mut name = Vec::new();
    let mut rest = value.iter().peekable();
    while let Some(byte) = rest.next() {
        if *byte == b',' && rest.next_if(|next| **next == b',').is_none() {
            break;
        }
        name.push(*byte);
    }
    Some(name)
}

fn open_files(pid: i32, leases: &Leases) -> Option<Vec<Open>> {
    let mut open: Vec<Open> = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        let Ok(entry) = entry else { continue };
        let Ok(path) = std::fs::read_link(entry.path()) else {
            continue;
        };
        let number = entry.file_name();
        let info = format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy());
        let info = std::fs::read_to_string(info).unwrap_or_default();
        let Some(file) = disk(&entry.path(), &path) else {
            continue;
        };
        let writes = writes(&info);
        if let Some(known) = open.iter_mut().find(|known| known.file == file) {
            known.writes |= writes;
            continue;
        }
        let lease = leases.of(&path, Some(file));
        open.push(Open {
            lease: lease
                .map(|lease| lease.map(|(directory, name)| [&*directory, b"/", &*name].concat())),
            path,
            file,
            writes,
        });
    }
    open.sort_by(|one, other| one.path.cmp(&other.path));
    Some(open)
}

/// Which file it is, if it may be a disk.
fn disk(link: &std::path::Path, path: &std::path::Path) -> Option<(u64, u64)> {
    let bytes = path.as_os_str().as_bytes();
    // Logs, sockets' locks and memory; libvirt locks no firmware variables.
    let is_none = [&b"/var/log/"[..], b"/run/", b"/dev/shm/", b"/dev/hugepages"]
        .iter()
        .any(|start| bytes.starts_with(start))
        && !bytes.ends_with(b".img")
        && !bytes.ends_with(b".qcow2");
    let is_other = [&b".log"[..], b"_VARS.fd", b" (deleted)", b".pid"]
        .iter()
        .any(|end| bytes.ends_with(end));
    if !bytes.starts_with(b"/") || is_none || is_other || bytes.starts_with(b"/memfd:") {
        return None;
    }
    let link = CString::new(link.as_os_str().as_bytes()).ok()?;
    let (identity, is_disk) = file::known_here(&link).ok()?;
    is_disk.then_some((identity.device, identity.inode))
}

/// Whether an open file may be written, by its flags in `/proc/PID/fdinfo`, which are octal.
fn writes(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}
