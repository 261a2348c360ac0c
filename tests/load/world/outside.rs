//! The world as somebody outside of the daemon sees it: its real files, their names and contents,
//! and what the kernel says of their locks.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::{
    BOUND, DIRECTORIES, FILES, FileId, HARD_LINKS, LINKED, MOUNTED, Node, ROOT, SYMBOLIC_LINKS,
};
use super::model::{Kind, Mode};
use crate::support::fuse::Share;
use crate::support::lock_probe;
use crate::support::upgrade::Host;
use virtlockd::host::note;

/// On what the files of the world are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// A file system of this host.
    ThisHost,
    /// One that is nobody's alone, as far as can be known: an overlay on a share without files.
    Share,
}

/// Mounts it; `None` where that cannot be.
fn mount_share(host: &Host) -> Option<Share> {
    let share = Share::mount_lockless(&host.namespace, "lower")?;
    fs::create_dir(host.path("/run/upper")).expect("make a directory");
    mount(host, &["-t", "tmpfs", "tmpfs", "/run/upper"]);
    for name in ["files", "work"] {
        fs::create_dir(host.path("/run/upper").join(name)).expect("make a directory");
    }
    let options = "lowerdir=/run/lower,upperdir=/run/upper/files,workdir=/run/upper/work";
    mount(host, &["-t", "overlay", "-o", options, "overlay", ROOT]);
    Some(share)
}

pub struct Outside {
    share: Option<Share>,
    pub host: Host,
    /// A handle on each file that ever was, so that it can be asked for when it has no name, and
    /// its number is never used again; and what is in it.
    handles: BTreeMap<FileId, (File, String)>,
}

impl Outside {
    /// A host with this program, and the files with all their names.
    pub fn new(program: &Path, on: On) -> Outside {
        let host = Host::with(program);
        let at = |name: &str| host.path(ROOT).join(name);
        fs::create_dir(host.path(ROOT)).expect("make the root of the world");
        // A file system of its own: every lock on it must be explained.
        let share = match on {
            On::ThisHost => {
                mount(&host, &["-t", "tmpfs", "tmpfs", ROOT]);
                None
            }
            On::Share => mount_share(&host),
        };
        for name in DIRECTORIES.into_iter().chain(BOUND.map(|(name, _)| name)) {
            fs::create_dir(at(name)).expect("make a directory");
        }
        for name in FILES {
            fs::write(at(name), format!("content of {name}")).expect("write a file");
        }
        for (name, file) in HARD_LINKS {
            fs::hard_link(at(file), at(name)).expect("make a hard link");
        }
        for (name, target) in LINKED.into_iter().chain(SYMBOLIC_LINKS) {
            symlink(target, at(name)).expect("make a symbolic link");
        }
        for (name, _) in MOUNTED {
            fs::write(at(name), "behind a mount").expect("write a file to mount on");
        }
        for (name, source) in BOUND.into_iter().chain(MOUNTED) {
            let (name, source) = (format!("{ROOT}/{name}"), format!("{ROOT}/{source}"));
            mount(&host, &["--bind", &source, &name]);
        }
        Outside {
            share,
            host,
            handles: BTreeMap::new(),
        }
    }

    /// From now on every name that is not known takes a while to be looked up, or not any more.
    pub fn slow_down(&self, time: Option<Duration>) {
        if let Some(share) = &self.share {
            share.mend_all();
            if let Some(time) = time {
                share.slow_down(time);
            }
        }
    }

    /// A file of the world, as reached from outside of the namespace.
    pub fn path(&self, name: &str) -> PathBuf {
        self.host.path(ROOT).join(name)
    }

    pub fn device(&self) -> u64 {
        fs::metadata(self.path("")).expect("look at the root").dev()
    }

    /// The files in an overlay have the number of another device than their directories, whose is the file system's.
    pub fn device_of_files(&self) -> u64 {
        let file = self.handles.keys().next();
        file.map_or_else(|| self.device(), |file| file.device)
    }

    /// All names, but not those below a bind mount, which are listed where they are bound from.
    pub fn list(&self) -> BTreeMap<String, Node> {
        let mut nodes = BTreeMap::new();
        let mut left = vec![String::new()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(self.path(&directory)).expect("list a directory") {
                let entry = entry.expect("list a directory").file_name();
                let entry = entry.to_str().expect("a name in UTF-8");
                let name = format!("{directory}/{entry}").trim_matches('/').to_owned();
                let status = self.path(&name).symlink_metadata().expect("look at a file");
                let node = if status.is_dir() {
                    if BOUND.iter().any(|(bound, _)| *bound == name) {
                        continue;
                    }
                    left.push(name.clone());
                    Node::Directory
                } else if status.is_symlink() {
                    let target = fs::read_link(self.path(&name)).expect("read a link");
                    Node::Link(target.to_str().expect("a name in UTF-8").to_owned())
                } else {
                    Node::File(id_of(&status))
                };
                nodes.insert(name, node);
            }
        }
        nodes
    }

    pub fn keep_handle(&mut self, file: FileId, name: &str) {
        let path = self.path(name);
        self.handles.entry(file).or_insert_with(|| {
            let content = fs::read_to_string(&path).expect("read a file");
            (File::open(&path).expect("open a file"), content)
        });
    }

    /// What the kernel says to somebody who wants the file for himself: as it is locked.
    pub fn seen(&self, file: FileId) -> Option<Mode> {
        let handle = self.handles[&file].0.as_raw_fd();
        let path = format!("/proc/self/fd/{handle}");
        let lock = lock_probe(Path::new(&path))?;
        Some(if lock.exclusive {
            Mode::Exclusive
        } else {
            Mode::Shared
        })
    }

    /// Every file that ever was.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.handles.keys().copied()
    }

    /// Nobody has written to any file, but a note into one that was empty, as a lease's is. (Where no note may be is
    /// shown by the owners' tests.)
    pub fn check_contents(&self) {
        for (file, (handle, content)) in &self.handles {
            let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
            let now = fs::read_to_string(path).expect("read a file");
            let is_note = |text: &str| text.as_bytes().starts_with(note::MARK);
            let is_lease = (content.is_empty() || is_note(content)) && is_note(&now);
            assert!(
                is_lease || &now == content,
                "the content of {file:?}: {now}"
            );
        }
    }

    /// Every lock on the world's file system.
    pub fn kernel_locks(&self) -> Vec<(FileId, Kind, Mode)> {
        let (device, device_of_files) = (self.device(), self.device_of_files());
        let (major, minor) = (libc::major(device), libc::minor(device));
        let place = format!("{major:02x}:{minor:02x}:");
        let list = fs::read_to_string("/proc/locks").expect("read the kernel's list of locks");
        let mut locks: Vec<_> = list
            .lines()
            .filter_map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let inode = words.iter().find_map(|word| word.strip_prefix(&place))?;
                assert_eq!(words[words.len() - 2..], ["0", "0"], "byte 0: {line}");
                let file = FileId {
                    device: device_of_files,
                    inode: inode.parse().expect("a number of an inode"),
                };
                let kind = match words[1] {
                    "OFDLCK" => Kind::OpenFile,
                    "POSIX" => Kind::Posix,
                    other => panic!("a lock of kind {other}: {line}"),
                };
                let mode = match words[3] {
                    "WRITE" => Mode::Exclusive,
                    "READ" => Mode::Shared,
                    other => panic!("a lock for {other}: {line}"),
                };
                Some((file, kind, mode))
            })
            .collect();
        locks.sort();
        locks
    }
}

pub fn id_of(status: &fs::Metadata) -> FileId {
    FileId {
        device: status.dev(),
        inode: status.ino(),
    }
}

fn mount(host: &Host, words: &[&str]) {
    let status = host.namespace.command("mount").args(words).status();
    assert!(status.expect("run mount").success(), "mount {words:?}");
}

/// On which file systems a process has files open.
pub fn open_devices(pid: i32) -> impl Iterator<Item = u64> {
    let list = fs::read_dir(format!("/proc/{pid}/fd")).expect("list descriptors");
    list.filter_map(|entry| Some(entry.ok()?.path().metadata().ok()?.dev()))
}
