//! The door's part for locks, over real files, against the simplest reference that can be: a list of
//! holdings, a list of strangers' locks, and what `stat` says of a name just before a call.
//!
//! Names of one file are tried in every way: hard links, symbolic links, a path into a lockspace's
//! directory, `./`, names that leave the directory. Strangers lock, remove and make files. After
//! each step the kernel is asked through second open files what is locked, the directory is listed
//! to see what was made and removed, the descriptors are counted, and the ledger is read.
//!
//! A failure prints the shortest steps that show it. `PROPTEST_CASES` makes it run longer.

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use support::TempDir;
use virtlockd::custody::Custody;
use virtlockd::custody::ledger::Ledger;
use virtlockd::custody::locking::{Acquired, Refusal};
use virtlockd::host::errno::Errno;
use virtlockd::host::file::{self, Conflict, FileIdentity, LockType, Lockable, Start};
use virtlockd::locks::lease;
use virtlockd::locks::place::Place;
use virtlockd::locks::table::{Mode, NotReleased, Owner, Pid};

/// Lockspaces, as directories below the scratch directory. The third one is never made.
const DEFAULT: &str = "";
const ONE: &str = "one";
const TWO: &str = "two";
const UNKNOWN: &str = "three";

/// Names, in the default lockspace below the scratch directory.
const PLACES: [(&str, &str); 22] = [
    (DEFAULT, "disk"),
    (DEFAULT, "hard"),
    (DEFAULT, "soft"),
    (DEFAULT, "missing"),
    (DEFAULT, "dangling"),
    (DEFAULT, "made-by-dangling"),
    (DEFAULT, "one/x"),
    (DEFAULT, "one"),
    (ONE, "x"),
    (ONE, "./x"),
    (ONE, "/x"),
    (ONE, "hard"),
    (ONE, "link"),
    (ONE, "out"),
    (ONE, "../disk"),
    (ONE, "sub/y"),
    (ONE, "sub"),
    (ONE, "no-such/z"),
    (ONE, "new"),
    (TWO, "x"),
    (TWO, "new"),
    (UNKNOWN, "x"),
];
const PIDS: [Pid; 2] = [0, 100];

type Key = (&'static str, &'static str);

#[derive(Clone, Copy, Debug)]
enum Step {
    Acquire(Key, Pid, Mode, bool),
    Release(Key, Pid),
    EndOwner(Pid),
    Create(Key),
    Delete(Key),
    MakeLockspace(&'static str),
    StrangerLocks(Key, Mode),
    StrangerUnlocks(usize),
    StrangerRemoves(Key),
    StrangerMakes(Key),
}

fn steps() -> impl Strategy<Value = Step> {
    // Steps that never meet show nothing: most of them fall on a few names and two owners.
    let key = prop_oneof![
        1 => prop::sample::select(&PLACES[..]),
        2 => prop::sample::select(vec![(DEFAULT, "disk"), (ONE, "x"), (ONE, "link")]),
    ];
    let key = key.boxed();
    let pid = prop::sample::select(&PIDS[..]).boxed();
    let mode = prop::sample::select(vec![Mode::Shared, Mode::Exclusive]).boxed();
    let acquire = (key.clone(), pid.clone(), mode.clone(), any::<bool>());
    prop_oneof![
        10 => acquire.prop_map(|(key, pid, mode, make)| Step::Acquire(key, pid, mode, make)),
        6 => (key.clone(), pid.clone()).prop_map(|(key, pid)| Step::Release(key, pid)),
        2 => pid.prop_map(Step::EndOwner),
        2 => key.clone().prop_map(Step::Create),
        2 => key.clone().prop_map(Step::Delete),
        1 => prop::sample::select(vec![ONE, TWO]).prop_map(Step::MakeLockspace),
        2 => (key.clone(), mode).prop_map(|(key, mode)| Step::StrangerLocks(key, mode)),
        1 => (0usize..3).prop_map(Step::StrangerUnlocks),
        1 => key.clone().prop_map(Step::StrangerRemoves),
        1 => key.prop_map(Step::StrangerMakes),
    ]
}

/// One holding of one process.
#[derive(Clone, Debug)]
struct Row {
    key: Key,
    pid: Pid,
    mode: Mode,
    file: FileIdentity,
    /// The file goes with its last holder.
    is_removed_at_end: bool,
}

/// A lock of somebody outside of the daemon.
struct Stranger {
    /// Open as long as the lock lasts.
    _descriptor: Lockable,
    mode: Mode,
    file: FileIdentity,
}

/// What stands behind a name, as the reference sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    File(FileIdentity),
    Directory,
    Nothing,
    /// A symbolic link to nothing.
    DanglingLink,
    NoParent,
    /// The name, or the link it names, is outside of the lockspace.
    Outside,
}

struct World {
    scratch: TempDir,
    custody: Custody,
    lockspaces: BTreeSet<&'static str>,
    rows: Vec<Row>,
    strangers: Vec<Stranger>,
    /// Every name below the scratch directory, as it should be.
    names: BTreeSet<PathBuf>,
    /// Open descriptors of the process while nothing is held.
    descriptors: usize,
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd")
        .expect("list descriptors")
        .count()
}

fn owner(pid: Pid) -> Owner {
    Owner {
        pid,
        id: 1,
        name: (*b"guest").into(),
        uuid: [0; 16],
    }
}

fn goes_with(mine: Mode, theirs: Mode) -> bool {
    (mine, theirs) == (Mode::Shared, Mode::Shared)
}

fn assert_held<T: std::fmt::Debug>(outcome: &Result<T, Refusal>, how: &str) {
    assert!(
        matches!(outcome, Err(Refusal::Held(_))),
        "{outcome:?}, though it is held {how}"
    );
}

fn lock_type(mode: Mode) -> LockType {
    match mode {
        Mode::Exclusive => LockType::Write,
        Mode::Shared => LockType::Read,
    }
}

fn open(path: &Path) -> OwnedFd {
    file::open_existing(Start::Anywhere, path.as_os_str().as_bytes())
        .unwrap_or_else(|errno| panic!("open {}: {errno:?}", path.display()))
}

fn identity_of(metadata: &fs::Metadata) -> FileIdentity {
    FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
    }
}

fn list(directory: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(directory).expect("list the scratch directory") {
        let entry = entry.expect("list the scratch directory");
        if entry.file_type().expect("type of an entry").is_dir() {
            list(&entry.path(), into);
        }
        into.insert(entry.path());
    }
}

impl World {
    fn new() -> World {
        let scratch = TempDir::new();
        let root = scratch.path();
        fs::create_dir(root.join(ONE)).unwrap();
        fs::create_dir(root.join("one/sub")).unwrap();
        fs::write(root.join("disk"), "precious").unwrap();
        fs::hard_link(root.join("disk"), root.join("hard")).unwrap();
        symlink("disk", root.join("soft")).unwrap();
        symlink("made-by-dangling", root.join("dangling")).unwrap();
        fs::write(root.join("one/x"), "").unwrap();
        fs::hard_link(root.join("one/x"), root.join("one/hard")).unwrap();
        symlink("x", root.join("one/link")).unwrap();
        symlink("../disk", root.join("one/out")).unwrap();
        let mut custody = Custody::new(Ledger::new().unwrap());
        let known = custody.make_lockspace(root.join(ONE).as_os_str().as_bytes());
        assert_eq!(known.map(drop), Ok(()));
        let mut names = BTreeSet::new();
        list(root, &mut names);
        World {
            descriptors: open_descriptors(),
            scratch,
            custody,
            lockspaces: BTreeSet::from([DEFAULT, ONE]),
            rows: Vec::new(),
            strangers: Vec::new(),
            names,
        }
    }

    /// Lockspace and name as a call gives them.
    fn call_names(&self, key: Key) -> (Vec<u8>, Vec<u8>) {
        let below = |name| {
            self.scratch
                .path()
                .join(name)
                .as_os_str()
                .as_bytes()
                .to_vec()
        };
        match key {
            (DEFAULT, name) => (Vec::new(), below(name)),
            (lockspace, name) => (below(lockspace), name.as_bytes().to_vec()),
        }
    }

    fn with_place<T>(&mut self, key: Key, act: impl FnOnce(&mut Custody, Place<'_>) -> T) -> T {
        let (lockspace, name) = self.call_names(key);
        let place = Place {
            lockspace: &lockspace,
            name: &name,
        };
        act(&mut self.custody, place)
    }

    /// The path of a place, without dots.
    fn path(&self, key: Key) -> PathBuf {
        let below = match key.1.strip_prefix("../") {
            Some(outside) => PathBuf::from(outside),
            None => Path::new(key.0).join(key.1.trim_start_matches('/')),
        };
        self.scratch.path().join(below).components().collect()
    }

    /// Where a file would be made: behind a symbolic link, if the path is one.
    fn target(&self, key: Key) -> PathBuf {
        let path = self.path(key);
        match fs::read_link(&path) {
            Ok(target) => path.with_file_name(target),
            Err(_) => path,
        }
    }

    fn behind(&self, key: Key) -> Behind {
        let path = self.path(key);
        let leaves = |target: PathBuf| key.0 != DEFAULT && target.starts_with("..");
        if key.1.starts_with("..") || fs::read_link(&path).is_ok_and(leaves) {
            return Behind::Outside;
        }
        match fs::metadata(&path) {
            Ok(found) if found.is_dir() => Behind::Directory,
            Ok(found) => Behind::File(identity_of(&found)),
            Err(_) if path.symlink_metadata().is_ok() => Behind::DanglingLink,
            Err(_) if path.parent().is_some_and(Path::is_dir) => Behind::Nothing,
            Err(_) => Behind::NoParent,
        }
    }

    fn key_is_held(&self, key: Key) -> bool {
        self.rows.iter().any(|row| row.key == key)
    }

    fn file_is_held(&self, file: FileIdentity) -> bool {
        self.rows.iter().any(|row| row.file == file)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Acquire(key, pid, mode, make) => self.acquire(key, pid, mode, make),
            Step::Release(key, pid) => self.release(key, pid),
            Step::EndOwner(pid) => self.end_owner(pid),
            Step::Create(key) => self.create(key),
            Step::Delete(key) => self.delete(key),
            Step::MakeLockspace(name) => self.make_lockspace(name),
            Step::StrangerLocks(key, mode) => self.stranger_locks(key, mode),
            Step::StrangerUnlocks(which) => {
                if which < self.strangers.len() {
                    self.strangers.remove(which);
                }
            }
            Step::StrangerRemoves(key) => {
                let path = self.path(key);
                if fs::remove_file(&path).is_ok() {
                    self.names.remove(&path);
                }
            }
            Step::StrangerMakes(key) => {
                let path = self.path(key);
                if OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .open(&path)
                    .is_ok()
                {
                    self.names.insert(path);
                }
            }
        }
        self.check_kernel();
        self.check_table();
        self.check_names();
        assert!(
            self.custody.is_written_down(),
            "the ledger says something else"
        );
    }

    fn acquire(&mut self, key: Key, pid: Pid, mode: Mode, make: bool) {
        let behind = self.behind(key);
        let target = self.target(key);
        let same_key = self.rows.iter().find(|row| row.key == key).cloned();
        let acquired = self.with_place(key, |custody, place| {
            custody.acquire(&owner(pid), place, mode, make)
        });
        let refused = |expected| assert_eq!(acquired, Err(expected), "{behind:?}");
        if !self.lockspaces.contains(key.0) {
            return refused(Refusal::NoLockspace);
        }
        if let Some(row) = same_key {
            if !goes_with(mode, row.mode) {
                assert_held(&acquired, "under the same name");
                return;
            }
            assert!(matches!(acquired, Ok(Acquired::Joined)), "{acquired:?}");
            self.rows.push(Row { pid, ..row });
            return;
        }
        let existing = match behind {
            Behind::Outside => return refused(Refusal::Leaves),
            Behind::Directory => return refused(Refusal::File(Errno::EISDIR)),
            Behind::NoParent => return refused(Refusal::File(Errno::ENOENT)),
            Behind::Nothing | Behind::DanglingLink if !make => {
                return refused(Refusal::File(Errno::ENOENT));
            }
            Behind::Nothing | Behind::DanglingLink => None,
            Behind::File(file) => Some(file),
        };
        if let Some(file) = existing {
            if self.file_is_held(file) {
                let Err(Refusal::HeldAs(id)) = acquired else {
                    panic!("{acquired:?}, though the file is held under another name");
                };
                assert_eq!(self.custody.state().table().get(id).unwrap().identity, file);
                return;
            }
            let mut strangers = self.strangers.iter().filter(|lock| lock.file == file);
            if strangers.any(|lock| !goes_with(mode, lock.mode)) {
                // The strangers' locks are open-file-description locks.
                return refused(Refusal::Taken(lease::Stranger::ThisHost));
            }
        } else {
            self.names.insert(target.clone());
        }
        assert!(
            matches!(acquired, Ok(Acquired::Granted)),
            "{acquired:?} {behind:?}"
        );
        let found = fs::metadata(&target).expect("what was granted is there");
        // In the default lockspace only what the daemon made itself goes.
        let may_go = key.0 != DEFAULT || behind == Behind::Nothing;
        self.rows.push(Row {
            key,
            pid,
            mode,
            file: existing.unwrap_or(identity_of(&found)),
            is_removed_at_end: make && may_go,
        });
    }

    /// The held names that still lead to the file that was locked: only such a name is removed.
    fn leading(&self) -> BTreeSet<Key> {
        let leads = |row: &&Row| {
            fs::metadata(self.path(row.key)).is_ok_and(|found| identity_of(&found) == row.file)
        };
        self.rows.iter().filter(leads).map(|row| row.key).collect()
    }

    fn release(&mut self, key: Key, pid: Pid) {
        let leading = self.leading();
        let released = self.with_place(key, |custody, place| custody.release(place, &owner(pid)));
        let of_owner = |row: &Row| row.key == key && row.pid == pid;
        match self.rows.iter().position(of_owner) {
            Some(holding) => {
                assert_eq!(released, Ok(()));
                self.end_row(holding, &leading);
            }
            None if self.key_is_held(key) => assert_eq!(released, Err(NotReleased::NotYours)),
            None => assert_eq!(released, Err(NotReleased::NotHeld)),
        }
    }

    fn end_owner(&mut self, pid: Pid) {
        let leading = self.leading();
        let before = self.custody.state().table().len();
        let ended = self.custody.owner_died(pid);
        self.custody.free_some(ended);
        assert_eq!(self.custody.state().left_count(), 0);
        while let Some(holding) = self.rows.iter().position(|row| row.pid == pid) {
            self.end_row(holding, &leading);
        }
        assert_eq!(ended, before - self.custody.state().table().len());
    }

    /// What the end of a holding does to the names, of which `leading` led to their locked files.
    fn end_row(&mut self, holding: usize, leading: &BTreeSet<Key>) {
        let row = self.rows.remove(holding);
        let is_shared_outside = self.strangers.iter().any(|lock| lock.file == row.file);
        if self.key_is_held(row.key) || !row.is_removed_at_end || is_shared_outside {
            return;
        }
        if leading.contains(&row.key) {
            self.names.remove(&self.path(row.key));
        }
    }

    fn create(&mut self, key: Key) {
        let behind = self.behind(key);
        let target = self.target(key);
        let created = self.with_place(key, |custody, place| custody.create(place));
        let expected = if !self.lockspaces.contains(key.0) {
            Err(Refusal::NoLockspace)
        } else if self.key_is_held(key) {
            return assert_held(&created, "under the same name");
        } else {
            match behind {
                Behind::Outside => Err(Refusal::Leaves),
                Behind::Directory => Err(Refusal::File(Errno::EISDIR)),
                Behind::NoParent => Err(Refusal::File(Errno::ENOENT)),
                Behind::File(_) => Ok(()),
                Behind::Nothing | Behind::DanglingLink => {
                    self.names.insert(target);
                    Ok(())
                }
            }
        };
        assert_eq!(created, expected, "{behind:?}");
    }

    fn delete(&mut self, key: Key) {
        let behind = self.behind(key);
        let path = self.path(key);
        let deleted = self.with_place(key, |custody, place| custody.delete(place));
        if !self.lockspaces.contains(key.0) {
            assert_eq!(deleted, Err(Refusal::NoLockspace));
        } else if self.key_is_held(key) {
            assert_held(&deleted, "under the same name");
        } else if key.0 == DEFAULT {
            assert_eq!(deleted, Err(Refusal::DefaultLockspace));
        } else if key.1.starts_with("..") {
            assert_eq!(deleted, Err(Refusal::Leaves));
        } else if behind == Behind::Directory {
            assert_eq!(deleted, Err(Refusal::File(Errno::EISDIR)));
        } else if matches!(behind, Behind::File(file) if self.file_is_held(file)) {
            assert!(matches!(deleted, Err(Refusal::HeldAs(_))), "{deleted:?}");
        } else {
            // Of a symbolic link, wherever it leads, the link itself goes.
            assert_eq!(deleted, Ok(()), "{behind:?}");
            self.names.remove(&path);
        }
    }

    fn make_lockspace(&mut self, name: &'static str) {
        let directory = self.scratch.path().join(name);
        let made = self
            .custody
            .make_lockspace(directory.as_os_str().as_bytes());
        assert_eq!(made.map(drop), Ok(()));
        self.lockspaces.insert(name);
        self.names.insert(directory);
    }

    fn stranger_locks(&mut self, key: Key, mode: Mode) {
        let path = self.path(key);
        if !fs::metadata(&path).is_ok_and(|found| found.is_file()) {
            return;
        }
        let mut descriptor = Lockable::from(open(&path));
        let file = file::identity(&descriptor).unwrap();
        let held = self
            .rows
            .iter()
            .filter(|row| row.file == file)
            .map(|row| row.mode);
        let strangers = self.strangers.iter().filter(|lock| lock.file == file);
        let is_free = held
            .chain(strangers.map(|lock| lock.mode))
            .all(|theirs| goes_with(mode, theirs));
        let locked = descriptor.lock(lock_type(mode));
        assert_eq!(locked.is_ok(), is_free, "{locked:?}");
        if is_free {
            self.strangers.push(Stranger {
                _descriptor: descriptor,
                mode,
                file,
            });
        }
    }

    /// What a second open file sees of the kernel's locks, of every file with a name and of every
    /// file that is held without one.
    fn check_kernel(&self) {
        for name in &self.names {
            if fs::metadata(name).is_ok_and(|found| found.is_file()) {
                self.check_lock(&open(name));
            }
        }
        for (_, resource) in self.custody.state().table().iter() {
            let number = resource.lease.descriptor.as_raw_fd();
            let second = open(Path::new(&format!("/proc/self/fd/{number}")));
            assert_eq!(file::identity(&second), Ok(resource.identity));
            self.check_lock(&second);
        }
        let open_now = open_descriptors();
        let held = self.custody.state().table().len() + self.strangers.len();
        assert_eq!(open_now, self.descriptors + held, "descriptors");
    }

    fn check_lock(&self, second: &OwnedFd) {
        let file = file::identity(second).unwrap();
        let modes: Vec<Mode> = self
            .rows
            .iter()
            .filter(|row| row.file == file)
            .map(|row| row.mode)
            .chain(
                self.strangers
                    .iter()
                    .filter(|lock| lock.file == file)
                    .map(|lock| lock.mode),
            )
            .collect();
        for wanted in [Mode::Shared, Mode::Exclusive] {
            let expected = if modes.iter().all(|held| goes_with(wanted, *held)) {
                Conflict::None
            } else {
                Conflict::OpenFile
            };
            let seen = file::conflict(second, lock_type(wanted));
            assert_eq!(seen, Ok(expected), "wanted {wanted:?}, held {modes:?}");
        }
    }

    fn check_table(&mut self) {
        let keys: BTreeSet<Key> = self.rows.iter().map(|row| row.key).collect();
        assert_eq!(self.custody.state().table().len(), keys.len());
        for pid in PIDS {
            let rows = self.rows.iter().filter(|row| row.pid == pid);
            let held: BTreeSet<Key> = rows.map(|row| row.key).collect();
            assert_eq!(
                self.custody.state().table().held_by(owner(pid).key()),
                held.len()
            );
        }
        for (_, resource) in self.custody.state().table().iter() {
            let key = keys.iter().find(|key| {
                let (lockspace, name) = self.call_names(**key);
                (resource.lockspace(), resource.name()) == (&lockspace[..], &name[..])
            });
            let row = self.rows.iter().find(|row| Some(&row.key) == key);
            let row = row.expect("a held resource has a row");
            assert_eq!((resource.mode, resource.identity), (row.mode, row.file));
        }
        let known: Vec<&[u8]> = self.custody.state().lockspaces().collect();
        assert_eq!(known.len(), self.lockspaces.len() - 1);
    }

    fn check_names(&self) {
        let mut names = BTreeSet::new();
        list(self.scratch.path(), &mut names);
        assert_eq!(names, self.names);
        for disk in ["disk", "hard"].map(|name| self.scratch.path().join(name)) {
            // A stranger may have put an empty file in its place.
            if let Ok(content) = fs::read(&disk) {
                assert!(content == b"precious" || content.is_empty());
            }
        }
    }
}

proptest! {
    // A failure is told by its steps, which are short enough to become a test of their own.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    // The only test of this program: it counts the descriptors of the process.
    #[test]
    fn after_any_steps_the_kernel_the_names_and_the_table_are_what_the_rows_say(
        steps in prop::collection::vec(steps(), 1..60)
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.strangers.clear();
        for pid in PIDS {
            world.step(Step::EndOwner(pid));
        }
        prop_assert!(world.custody.state().table().is_empty());
    }
}
