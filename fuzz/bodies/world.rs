//! The files that hostile calls are let loose on, and the names that such calls are given instead
//! of their own, so that nothing outside of a scratch directory is ever reached.
//!
//! In the default lockspace a name is a path of the host: there it is replaced by one of a few. In
//! a lockspace's directory a name stays as it is, because holding it below the directory is what
//! the daemon promises; but it may climb no higher than the scratch directory is deep, and what is
//! up there is looked at after each run that made calls with names. Files are made anew only after a
//! run whose calls may make or remove files: most of the fuzzer's time went into that.

use std::cell::{Cell, OnceCell};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use virtlockd::wire::lock::{AUTOCREATE, Call, Target};

/// How far the directories of lockspaces are below the scratch directory.
const DEPTH: usize = 8;

/// A scratch directory, used again and again by one thread.
pub struct World {
    root: PathBuf,
    /// Where lockspaces are.
    deep: PathBuf,
    /// What no call may change, and how it was at first.
    outside: Vec<(PathBuf, Look)>,
    /// What the calls of this run could do to the files.
    reached: Cell<Reach>,
}

/// What is seen of a file from outside: its inode, number of names, length and time of change.
#[derive(Debug, PartialEq)]
struct Look(u64, u64, u64, SystemTime);

impl Look {
    fn at(path: &Path) -> Look {
        let seen = fs::symlink_metadata(path).expect("look at a file");
        Look(
            seen.ino(),
            seen.nlink(),
            seen.len(),
            seen.modified().unwrap(),
        )
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    /// No call named a file.
    Nothing,
    /// Files were named, by calls that must not make or remove any.
    Opened,
    /// Files may have been made or removed.
    Changed,
}

thread_local! {
    static WORLD: OnceCell<World> = const { OnceCell::new() };
}

/// Hands `work` this thread's world, with every file as it was at first.
pub fn with(work: impl FnOnce(&World)) {
    WORLD.with(|world| {
        let world = world.get_or_init(World::new);
        if world.reached.get() == Reach::Changed {
            world.reset();
        }
        world.reached.set(Reach::Nothing);
        work(world);
        if world.reached.get() > Reach::Nothing {
            world.check_outside();
        }
    });
}

impl World {
    fn new() -> World {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("virtlockd-fuzz-{}-{count}", std::process::id());
        let root = std::env::temp_dir().join(name);
        fs::create_dir(&root).expect("make a scratch directory");
        fs::write(root.join("outside"), "outside").unwrap();
        fs::create_dir(root.join("disks")).unwrap();
        fs::write(root.join("disks/disk"), "precious").unwrap();
        fs::hard_link(root.join("disks/disk"), root.join("disks/hard")).unwrap();
        symlink("disk", root.join("disks/soft")).unwrap();
        let deep = root.join(["d"; DEPTH].join("/"));
        fs::create_dir_all(&deep).unwrap();
        let mut outside: Vec<PathBuf> = ["outside", "disks/disk", "disks/hard", "disks/soft"]
            .map(|name| root.join(name))
            .into();
        // A file that is made or removed in a directory changes its time.
        outside.extend(deep.ancestors().skip(1).take(DEPTH).map(PathBuf::from));
        let look = |path: PathBuf| {
            let seen = Look::at(&path);
            (path, seen)
        };
        World {
            root,
            deep,
            outside: outside.into_iter().map(look).collect(),
            reached: Cell::new(Reach::Changed),
        }
    }

    fn reset(&self) {
        // The directory itself stays, so that those above it are never changed.
        for entry in fs::read_dir(&self.deep).expect("list the lockspaces") {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                fs::remove_dir_all(entry.path()).expect("clear a lockspace");
            } else {
                fs::remove_file(entry.path()).expect("clear the lockspaces");
            }
        }
        for made in ["missing", "behind-link"] {
            let _ = fs::remove_file(self.root.join("disks").join(made));
        }
        let link = self.root.join("disks/dangling");
        let _ = fs::remove_file(&link);
        symlink("behind-link", link).unwrap();
        for directory in ["one", "one/sub", "unmade"] {
            fs::create_dir(self.deep.join(directory)).unwrap();
        }
        fs::write(self.deep.join("file"), "").unwrap();
        fs::write(self.deep.join("one/x"), "").unwrap();
        symlink("x", self.deep.join("one/link")).unwrap();
        symlink(self.root.join("disks/disk"), self.deep.join("one/out")).unwrap();
        symlink("../..", self.deep.join("one/up")).unwrap();
    }

    fn check_outside(&self) {
        for (path, before) in &self.outside {
            assert_eq!(&Look::at(path), before, "{} was changed", path.display());
        }
    }

    /// The path of a resource of the default lockspace: an empty one stays.
    fn disk(&self, name: &[u8]) -> Vec<u8> {
        let choice = match name.last() {
            None => return Vec::new(),
            Some(byte) => byte % 9,
        };
        let disks = self.root.join("disks");
        bytes(match choice {
            0 => disks.join("disk"),
            1 => disks.join("hard"),
            2 => disks.join("soft"),
            3 => disks.join("missing"),
            4 => disks.join("dangling"),
            5 => disks,
            6 => self.deep.join("one/x"),
            7 => disks.join("nowhere/missing"),
            _ => disks.join("n".repeat(5000)),
        })
    }

    /// The path of a lockspace: the empty one, for the default lockspace, stays.
    fn lockspace(&self, path: &[u8]) -> Vec<u8> {
        let choice = match path.last() {
            None => return Vec::new(),
            Some(byte) => byte % 8,
        };
        bytes(match choice {
            0..=2 => self.deep.join("one"),
            3 => self.deep.join("unmade"),
            4 => self.deep.join("new/deeper"),
            5 => self.deep.join("file"),
            6 => self.deep.join("one/"),
            _ => self.deep.join("l".repeat(5000)),
        })
    }

    fn target<'a>(&self, target: Target<'_>, kept: &'a mut (Vec<u8>, Vec<u8>)) -> Target<'a> {
        kept.0 = self.lockspace(target.lockspace);
        kept.1 = if target.lockspace.is_empty() {
            self.disk(target.name)
        } else {
            climb_at_most(DEPTH, target.name)
        };
        Target {
            lockspace: &kept.0,
            name: &kept.1,
        }
    }

    /// The call with names of this world, as a frame.
    pub fn rename(&self, call: Call<'_>) -> Vec<u8> {
        let reach = match call {
            Call::Register { .. } | Call::Restrict { .. } => Reach::Nothing,
            Call::ReleaseResource { .. } => Reach::Opened,
            Call::AcquireResource { flags, .. } if flags & AUTOCREATE == 0 => Reach::Opened,
            _ => Reach::Changed,
        };
        self.reached.set(self.reached.get().max(reach));
        let kept = &mut (Vec::new(), Vec::new());
        let path;
        let call = match call {
            Call::Register { .. } | Call::Restrict { .. } => call,
            Call::New { path: old, flags } => {
                path = self.lockspace(old);
                Call::New { path: &path, flags }
            }
            Call::CreateLockspace { path: old } => {
                path = self.lockspace(old);
                // The C daemon, too, takes the empty path for the default lockspace.
                Call::CreateLockspace { path: &path }
            }
            Call::CreateResource { target, flags } => Call::CreateResource {
                target: self.target(target, kept),
                flags,
            },
            Call::DeleteResource { target, flags } => Call::DeleteResource {
                target: self.target(target, kept),
                flags,
            },
            Call::AcquireResource { target, flags } => Call::AcquireResource {
                target: self.target(target, kept),
                flags,
            },
            Call::ReleaseResource { target, flags } => Call::ReleaseResource {
                target: self.target(target, kept),
                flags,
            },
        };
        let mut frame = Vec::new();
        call.encode(&mut frame, 0);
        frame
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    path.as_ref().as_os_str().as_bytes().to_vec()
}

/// The name with all but its first `most` steps upwards made ordinary.
fn climb_at_most(most: usize, name: &[u8]) -> Vec<u8> {
    let mut steps = 0;
    let components: Vec<&[u8]> = name
        .split(|byte| *byte == b'/')
        .map(|component| {
            if component == b".." {
                steps += 1;
                if steps > most {
                    return &b"up"[..];
                }
            }
            component
        })
        .collect();
    components.join(&b'/')
}
