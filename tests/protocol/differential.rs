//! The same random calls go to libvirt's daemon and to ours; replies, locks as seen from outside
//! and files left behind have to be the same.
//!
//! Each daemon has its own namespace and in it an equal tree of files. Our daemon differs on
//! purpose in a few points ([`Rule`]): the random sequences leave out calls whose answer a rule
//! changes, and every rule has a test of its own below that makes exactly that call.
//!
//! `VIRTLOCKD_DIFFERENTIAL_SEED` repeats a run whose seed was printed. With
//! `VIRTLOCKD_UNDER_TEST` naming libvirt's daemon, it is compared with itself.

use crate::support;
use crate::support::client::{
    AUTOCREATE, Call, Client, Reply, SHARED, UUID, acquire, create_lockspace, create_resource,
    delete_resource, new_lockspace, register, release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::random::Random;
use crate::support::{DEADLINE, wait_until};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use virtlockd::host::note;

const BASE: &str = "/run/diff";
const SEQUENCES: u64 = 60;
const CALLS_PER_SEQUENCE: usize = 250;
const CALLS_BETWEEN_LOOKS: usize = 5;
const CONNECTIONS: usize = 4;
/// Owners' numbers that no process has (the highest is 4,194,304): closing a connection ends no owner, and no
/// owner's locks are freed because a process of its number ends.
const PIDS: [u32; 5] = [1_000_004_242, 1_000_005_555, 1_000_006_666, 0, 0xffff_fffe];

/// A daemon with its files.
struct World {
    program: PathBuf,
    namespace: Namespace,
    daemon: Daemon,
}

impl World {
    fn new(program: &Path) -> World {
        let namespace = Namespace::sealed();
        let at = |name: &str| namespace.path(BASE).join(name);
        for directory in ["", "sub", "ls1", "ls1/sub", "ls3", "ls3/sub"] {
            std::fs::create_dir(at(directory)).expect("make a directory");
        }
        let files = [
            "a", "b", "c", "plain", "sub/x", "ls1/r1", "ls1/r2", "ls3/r1",
        ];
        for name in files {
            std::fs::write(at(name), format!("content of {name}")).expect("write a file");
        }
        std::fs::hard_link(at("a"), at("a.hard")).expect("make a hard link");
        std::os::unix::fs::symlink("b", at("b.sym")).expect("make a symlink");
        std::os::unix::fs::symlink("gone", at("gone.sym")).expect("make a dangling symlink");
        std::os::unix::fs::symlink("r2", at("ls1/s")).expect("make a symlink");
        let daemon = Daemon::start_program(program, &namespace, &[], &[]);
        World {
            program: program.to_owned(),
            namespace,
            daemon,
        }
    }

    /// A file of this world, as reached from outside.
    fn path(&self, inside: &str) -> PathBuf {
        self.namespace.path(inside)
    }

    /// A client that is registered with this pid.
    fn registered(&self, pid: i32) -> Client {
        let mut client = self.daemon.client();
        client.call(&register(pid)).expect_ok();
        client
    }

    /// Everything below the base: kind, permissions, content, and the lock seen from outside.
    fn look(&self) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        let root = self.path(BASE);
        let mut left = vec![root.clone()];
        while let Some(directory) = left.pop() {
            for entry in std::fs::read_dir(&directory).expect("list a directory") {
                let path = entry.expect("a directory entry").path();
                let status = path.symlink_metadata().expect("look at a file");
                let mode = status.permissions().mode() & 0o7777;
                let kind = status.file_type();
                let text = if kind.is_dir() {
                    left.push(path.clone());
                    format!("directory {mode:o}")
                } else if kind.is_symlink() {
                    format!(
                        "symlink to {}",
                        std::fs::read_link(&path).expect("a link").display()
                    )
                } else if kind.is_fifo() {
                    format!("fifo {mode:o}")
                } else {
                    let content = std::fs::read(&path).expect("read a file");
                    // Only ours says in a lease's file who has it.
                    let content = match content.starts_with(note::MARK) {
                        true => Vec::new(),
                        false => content,
                    };
                    let lock = support::lock_probe(&path).map(|lock| lock.exclusive);
                    let lock = match lock {
                        None => "free",
                        Some(true) => "locked exclusively",
                        Some(false) => "locked shared",
                    };
                    format!("file {mode:o} {lock} \"{}\"", content.escape_ascii())
                };
                let name = path.strip_prefix(&root).expect("below the base").to_owned();
                found.insert(name, text);
            }
        }
        found
    }
}

/// Where our daemon differs from libvirt's, on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Rule {
    /// A file that is held under one name is busy under every other name.
    SecondNameIsBusy,
    /// A resource name may not lead out of its lockspace's directory.
    NameLeavesLockspace,
    /// DELETE_RESOURCE in the default lockspace is refused: files there are disks.
    DiskIsNeverDeleted,
    /// AUTOCREATE in the default lockspace removes only what it made.
    FoundDiskIsKept,
    /// NEW says why it could not make the directory.
    NewReportsErrors,
    /// ACQUIRE opens a lockspace that nobody made if its directory is there.
    LockspaceAppearsWhenUsed,
    /// CREATE_RESOURCE leaves a file that is there alone, and does not drop its lock.
    CreateLeavesFilesAlone,
    /// DELETE_RESOURCE finds the holder of a file under every name.
    DeleteKnowsOtherNames,
}

/// What a resource is known by: lockspace and name, both as the daemon sees them.
type Key = (Vec<u8>, Vec<u8>);

/// A device and an inode.
type Identity = (u64, u64);

struct Held {
    owners: Vec<u32>,
    identity: Identity,
    is_shared: bool,
}

#[derive(Clone, Copy, Default)]
struct Session {
    pid: Option<u32>,
    restricted: bool,
}

/// What the test knows of the daemons' state, learnt from their replies. It serves one purpose: to
/// see which [`Rule`] a call would meet.
#[derive(Default)]
struct Known {
    sessions: [Session; CONNECTIONS],
    /// The domain's name that each connection registered.
    names: [Vec<u8>; CONNECTIONS],
    /// The domain's name with which each process took something last.
    holders: HashMap<u32, Vec<u8>>,
    lockspaces: BTreeSet<Vec<u8>>,
    held: HashMap<Key, Held>,
}

impl Known {
    fn rule(&self, world: &World, session: usize, call: &Call) -> Option<Rule> {
        let Session { pid, restricted } = self.sessions[session];
        if restricted || pid.is_none() {
            return None; // Refused before anything else counts.
        }
        let (lockspace, name) = match call {
            Call::New { path, flags: 0 } => return self.new_rule(world, until_nul(path)),
            Call::CreateResource {
                path,
                name,
                flags: 0,
            }
            | Call::DeleteResource {
                path,
                name,
                flags: 0,
            }
            | Call::Release {
                path,
                name,
                flags: 0,
            } => (until_nul(path), until_nul(name)),
            Call::Acquire { path, name, flags } if flags & !(SHARED | AUTOCREATE) == 0 => {
                (until_nul(path), until_nul(name))
            }
            _ => return None,
        };
        let acquires = matches!(call, Call::Acquire { .. });
        let default = lockspace.is_empty();
        let releases = matches!(call, Call::Release { .. });
        if !default && !releases && climbs_out(name) {
            return Some(Rule::NameLeavesLockspace);
        }
        if !default && !self.lockspaces.contains(lockspace) {
            let opens = acquires && inside(world, lockspace).is_dir();
            return opens.then_some(Rule::LockspaceAppearsWhenUsed);
        }
        let file = match default {
            true => inside(world, name),
            false => inside(world, &[lockspace, b"/", name].concat()),
        };
        let status = file.metadata().ok();
        let exists = file.symlink_metadata().is_ok();
        let key = (lockspace.to_vec(), name.to_vec());
        let held_here = self.held.contains_key(&key);
        let held_elsewhere = !held_here
            && status.as_ref().is_some_and(|status| {
                let identity = (status.dev(), status.ino());
                self.held.values().any(|held| held.identity == identity)
            });
        match call {
            Call::Acquire { .. } if held_elsewhere => Some(Rule::SecondNameIsBusy),
            Call::Acquire { flags, .. }
                if default && exists && !held_here && flags & AUTOCREATE != 0 =>
            {
                Some(Rule::FoundDiskIsKept)
            }
            Call::DeleteResource { .. } if default => Some(Rule::DiskIsNeverDeleted),
            Call::DeleteResource { .. } if held_elsewhere => Some(Rule::DeleteKnowsOtherNames),
            Call::CreateResource { .. } if held_here => None,
            Call::CreateResource { .. }
                if held_elsewhere || exists && !status.is_some_and(|status| status.is_file()) =>
            {
                Some(Rule::CreateLeavesFilesAlone)
            }
            _ => None,
        }
    }

    /// The owner holds it shared and takes it again: at its end, libvirt's daemon keeps one of the
    /// two for ever. A rule that only matters where owners end.
    fn takes_again(&self, session: usize, call: &Call) -> bool {
        let Call::Acquire { path, name, .. } = call else {
            return false;
        };
        let key = (until_nul(path).to_vec(), until_nul(name).to_vec());
        let pid = self.sessions[session].pid.unwrap_or_default();
        self.held
            .get(&key)
            .is_some_and(|held| held.owners.contains(&pid))
    }

    /// An owner has ended.
    fn forget(&mut self, session: usize) {
        let pid = self.sessions[session].pid.take();
        for held in self.held.values_mut() {
            held.owners.retain(|owner| Some(*owner) != pid);
        }
        self.held.retain(|_, held| !held.owners.is_empty());
    }

    /// What our daemon says behind libvirt's words where a call is refused because the resource is
    /// locked. `pid` gives a process its number there.
    fn holder(&self, call: &Call, pid: impl Fn(u32) -> i32) -> String {
        let (Call::CreateResource { path, name, .. }
        | Call::DeleteResource { path, name, .. }
        | Call::Acquire { path, name, .. }) = call
        else {
            return String::new();
        };
        let key = (until_nul(path).to_vec(), until_nul(name).to_vec());
        let Some(held) = self.held.get(&key) else {
            return ": by a process of this host that is not this virtlockd".to_owned();
        };
        let pids: BTreeMap<i32, u32> = held.owners.iter().map(|it| (pid(*it), *it)).collect();
        let (pid, owner) = pids.first_key_value().expect("an owner");
        let name = String::from_utf8_lossy(&self.holders[owner]);
        let uuid = "10111213-1415-1617-1819-1a1b1c1d1e1f";
        let more = match pids.len() - 1 {
            0 => String::new(),
            others => format!(" and {others} more"),
        };
        let mode = if held.is_shared {
            "shared"
        } else {
            "exclusive"
        };
        format!(": by domain '{name}' (uuid {uuid}, pid {pid}){more}, {mode}")
    }

    fn new_rule(&self, world: &World, path: &[u8]) -> Option<Rule> {
        if path.is_empty() || self.lockspaces.contains(path) {
            return None;
        }
        // It can be made if the nearest ancestor that is there is a directory and no part of the
        // name is too long for a file system.
        let file = inside(world, path);
        let made = file
            .ancestors()
            .find(|part| part.exists())
            .is_some_and(|part| part.is_dir());
        (!made || path.len() > 255).then_some(Rule::NewReportsErrors)
    }

    fn learn(&mut self, world: &World, session: usize, call: &Call, reply: &Reply) {
        if !reply.is_ok() {
            return;
        }
        let own_pid = self.sessions[session].pid.unwrap_or_default();
        match call {
            Call::Register { pid, name, .. } => {
                self.sessions[session].pid = Some(*pid);
                self.names[session] = until_nul(name).to_vec();
            }
            Call::Restrict { .. } => self.sessions[session].restricted = true,
            Call::New { path, .. } | Call::CreateLockspace { path } => {
                self.lockspaces.insert(until_nul(path).to_vec());
            }
            Call::Acquire { path, name, flags } => {
                let (lockspace, name) = (until_nul(path), until_nul(name));
                let file = match lockspace.is_empty() {
                    true => inside(world, name),
                    false => inside(world, &[lockspace, b"/", name].concat()),
                };
                let status = file.metadata().expect("a granted file is there");
                let held = self
                    .held
                    .entry((lockspace.to_vec(), name.to_vec()))
                    .or_insert(Held {
                        owners: Vec::new(),
                        identity: (status.dev(), status.ino()),
                        is_shared: flags & SHARED != 0,
                    });
                held.owners.push(own_pid);
                self.holders.insert(own_pid, self.names[session].clone());
            }
            Call::Release { path, name, .. } => {
                let key = (until_nul(path).to_vec(), until_nul(name).to_vec());
                let held = self
                    .held
                    .get_mut(&key)
                    .expect("a released resource was held");
                let at = held.owners.iter().position(|&owner| owner == own_pid);
                held.owners.remove(at.expect("the owner held it"));
                if held.owners.is_empty() {
                    self.held.remove(&key);
                }
            }
            Call::CreateResource { .. } | Call::DeleteResource { .. } => {}
        }
    }
}

/// True if the name goes above the directory that it is relative to.
fn climbs_out(name: &[u8]) -> bool {
    let mut depth = 0;
    name.split(|&byte| byte == b'/').any(|part| {
        depth += match part {
            b"" | b"." => 0,
            b".." => -1,
            _ => 1,
        };
        depth < 0
    })
}

/// A string of the protocol ends at its first NUL for every use but its length.
fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// The file that a daemon means by this path: its working directory is `/`.
fn inside(world: &World, path: &[u8]) -> PathBuf {
    let relative = path
        .iter()
        .position(|&byte| byte != b'/')
        .map_or(&b""[..], |at| &path[at..]);
    world.path("/").join(std::ffi::OsStr::from_bytes(relative))
}

/// What happens next in a sequence.
enum Step {
    Call(usize, Call),
    Reconnect(usize),
    /// Somebody who is no client takes a lock, or lets go of all he has.
    ForeignLock {
        file: &'static str,
        exclusive: bool,
    },
    ForeignRelease,
}

fn random_step(random: &mut Random, known: &Known) -> Step {
    let at = random.below(CONNECTIONS);
    let Session { pid, restricted } = known.sessions[at];
    match random.below(100) {
        // Such a connection gets refusals only: seen often enough.
        _ if restricted && random.percent(30) => Step::Reconnect(at),
        0..2 => Step::Reconnect(at),
        2..4 => Step::ForeignLock {
            file: random.pick::<&'static str>(&["b", "c", "ls1/r1", "ls2/k1"]),
            exclusive: random.percent(50),
        },
        4..7 => Step::ForeignRelease,
        7..30 if pid.is_some() => Step::Call(
            at,
            release_of_own(random, known, at).unwrap_or_else(|| random_call(random)),
        ),
        7..60 if pid.is_none() => Step::Call(at, random_register(random)),
        _ => Step::Call(at, random_call(random)),
    }
}

/// The release of something that the connection's owner holds; hash maps have no order, so it is
/// taken from the sorted list.
fn release_of_own(random: &mut Random, known: &Known, at: usize) -> Option<Call> {
    let pid = known.sessions[at].pid?;
    let own = known
        .held
        .iter()
        .filter(|(_, held)| held.owners.contains(&pid));
    let keys: BTreeSet<&Key> = own.map(|(key, _)| key).collect();
    let (path, name) = keys.iter().nth(random.below(keys.len().max(1)))?;
    Some(Call::Release {
        path: path.clone(),
        name: name.clone(),
        flags: 0,
    })
}

fn random_register(random: &mut Random) -> Call {
    Call::Register {
        uuid: UUID,
        name: random
            .pick(&["guest", "", "other guest"])
            .as_bytes()
            .to_vec(),
        id: if random.percent(5) { 0 } else { 7 },
        pid: *random.pick(&PIDS),
        flags: random_bad_flags(random),
    }
}

fn random_bad_flags(random: &mut Random) -> u32 {
    if random.percent(3) {
        *random.pick(&[1, 4, 0x10, 0x8000_0000])
    } else {
        0
    }
}

fn random_call(random: &mut Random) -> Call {
    let flags = random_bad_flags(random);
    match random.below(100) {
        0..6 => random_register(random),
        6..7 => Call::Restrict { flags },
        7..12 => Call::New {
            path: random_lockspace(random),
            flags,
        },
        12..18 => Call::CreateLockspace {
            path: random_lockspace(random),
        },
        kind => {
            let path = random_lockspace(random);
            let name = random_name(random, path.is_empty());
            match kind {
                18..26 => Call::CreateResource { path, name, flags },
                26..34 => Call::DeleteResource { path, name, flags },
                34..80 => {
                    let flags = flags | *random.pick(&[0, 0, SHARED, SHARED, AUTOCREATE, 3]);
                    Call::Acquire { path, name, flags }
                }
                _ => Call::Release { path, name, flags },
            }
        }
    }
}

fn random_lockspace(random: &mut Random) -> Vec<u8> {
    let choice = match random.below(20) {
        0..7 => "",
        7..12 => "/run/diff/ls1",
        12..16 => "/run/diff/ls2",
        _ => *random.pick(&[
            "/run/diff/ls1/",
            "/run/diff/ls3",
            "/run/diff/deep/er/ls4",
            "/run/diff/plain",
            "/run/diff/plain/x",
            "/run/diff/ls2\0nothing",
            "run/diff/relative",
        ]),
    };
    choice.as_bytes().to_vec()
}

fn random_name(random: &mut Random, default: bool) -> Vec<u8> {
    let mut name = match (default, random.percent(70)) {
        (true, true) => random
            .pick(&["a", "b", "c", "new1", "new2"])
            .as_bytes()
            .to_vec(),
        (true, false) => random
            .pick(&[
                &b"a.hard"[..],
                b"b.sym",
                b"gone.sym",
                b"./a",
                b"sub/../b",
                b"sub",
                b"sub/x",
                b"none/x",
                b"plain/x",
                b"ls1/r1",
                b"ls1/k1",
                b"c\0tail",
                b"\xff\xfe",
            ])
            .to_vec(),
        (false, true) => random.pick(&["r1", "r2", "k1", "k2"]).as_bytes().to_vec(),
        (false, false) => random
            .pick(&[
                &b"./r1"[..],
                b"s",
                b"sub",
                b"sub/k",
                b"no/such",
                b"",
                b".",
                b"/r1",
                b"../a",
                b"sub/../r1",
                b"k1\0tail",
                b"k\xff",
            ])
            .to_vec(),
    };
    if default {
        match random.below(40) {
            0 => return Vec::new(),
            1 => return b"run/diff/c".to_vec(),
            _ => name = [b"/run/diff/", &name[..]].concat(),
        }
    }
    if random.percent(1) {
        name.resize(5000, b'n');
    }
    name
}

#[test]
fn random_calls_get_the_same_answers_leave_the_same_locks_and_the_same_files() {
    let Some(c_program) = c_program() else { return };
    let seed = Random::seed_from("VIRTLOCKD_DIFFERENTIAL_SEED");
    println!("VIRTLOCKD_DIFFERENTIAL_SEED={seed}");
    let mut granted = 0;
    let mut avoided: HashMap<Rule, usize> = HashMap::new();
    for sequence in 0..SEQUENCES {
        // The sequence that fails is the first one of a run with the printed seed.
        let seed = seed.wrapping_add(sequence);
        granted += run_sequence(seed, &c_program, &mut avoided);
    }
    println!("{granted} acquires granted; calls left out: {avoided:?}");
    assert!(
        granted > 500,
        "the sequences are of no use: only {granted} acquires were granted"
    );
}

/// Runs one sequence of random steps; gives the number of granted acquires.
fn run_sequence(seed: u64, c_program: &Path, avoided: &mut HashMap<Rule, usize>) -> usize {
    let mut random = Random::new(seed);
    let worlds = [World::new(c_program), World::new(&daemon::program())];
    let connect = || worlds.each_ref().map(|world| world.daemon.client());
    let mut clients: [[Client; 2]; CONNECTIONS] = std::array::from_fn(|_| connect());
    let mut foreign = Vec::new();
    let mut known = Known::default();
    let mut history: Vec<String> = Vec::new();
    let is_libvirts = daemon::program() == c_program;
    let mut granted = 0;
    // Prepared so that the calls which follow have something to meet.
    let mut prepared = vec![
        create_lockspace("/run/diff/ls1"),
        create_lockspace("/run/diff/ls2"),
    ];
    let mut sent = 0;
    while sent < CALLS_PER_SEQUENCE {
        let step = match prepared.pop() {
            Some(call) => Step::Call(0, call),
            None => random_step(&mut random, &known),
        };
        match step {
            Step::Reconnect(at) => {
                history.push(format!("connection {at}: closed and opened"));
                clients[at] = connect();
                known.sessions[at] = Session::default();
            }
            Step::ForeignLock { file, exclusive } => {
                let paths = worlds.each_ref().map(|world| world.path(BASE).join(file));
                let free = |path: &PathBuf| {
                    path.exists()
                        && support::lock_probe(path)
                            .is_none_or(|lock| !lock.exclusive && !exclusive)
                };
                if paths.iter().all(free) {
                    history.push(format!("foreign lock on {file}, exclusive: {exclusive}"));
                    foreign.push(paths.map(|path| support::foreign_lock(&path, exclusive)));
                }
            }
            Step::ForeignRelease => {
                history.push("foreign locks released".to_owned());
                foreign.clear();
            }
            Step::Call(at, call) => {
                if let Some(rule) = known.rule(&worlds[0], at, &call) {
                    *avoided.entry(rule).or_default() += 1;
                    continue;
                }
                sent += 1;
                let [theirs, ours] = clients[at].each_mut().map(|client| client.call_raw(&call));
                let reply = Reply::parse(&theirs);
                history.push(format!("connection {at}: {call:?}\n    -> {reply:?}"));
                let due = if is_libvirts {
                    theirs
                } else {
                    let holder = known.holder(&call, |pid| pid as i32);
                    Reply::with_holder(&theirs, &holder)
                };
                if due != ours {
                    fail(
                        seed,
                        &history,
                        &format!("our reply: {:?}", Reply::parse(&ours)),
                    );
                }
                known.learn(&worlds[0], at, &call, &reply);
                granted += usize::from(reply.is_ok() && matches!(call, Call::Acquire { .. }));
                if sent % CALLS_BETWEEN_LOOKS == 0 {
                    compare_looks(&worlds, seed, &history);
                }
            }
        }
    }
    drop(clients);
    compare_looks(&worlds, seed, &history);
    // The end of a daemon releases what is held and removes what AUTOCREATE made.
    let [mut theirs, mut ours] = worlds;
    assert!(theirs.daemon.stop().success());
    assert!(
        ours.daemon.stop().success(),
        "our daemon ended with an error"
    );
    history.push("both daemons stopped".to_owned());
    compare_looks(&[theirs, ours], seed, &history);
    granted
}

const OWNER_SEQUENCES: u64 = 8;
const OWNERS: usize = 3;
const CALLS_BEFORE_AN_END: usize = 25;

#[test]
fn owners_that_end_leave_the_same_locks_and_the_same_files() {
    let Some(c_program) = c_program() else { return };
    let seed = Random::seed_from("VIRTLOCKD_DIFFERENTIAL_SEED");
    println!("VIRTLOCKD_DIFFERENTIAL_SEED={seed}");
    for sequence in 0..OWNER_SEQUENCES {
        run_owner_sequence(seed.wrapping_add(sequence), &c_program);
    }
}

/// Owners take and release locks over their own connections until each of them has been killed, or
/// has closed its connection and is fenced for that.
fn run_owner_sequence(seed: u64, c_program: &Path) {
    let mut random = Random::new(seed);
    let worlds = [World::new(c_program), World::new(&daemon::program())];
    let mut known = Known::default();
    let mut history = Vec::new();
    let mut owners: Vec<[Owner; 2]> = (0..OWNERS)
        .map(|_| {
            let start =
                |world: &World| Owner::register(world.daemon.lock_socket(), "guest", OnTerm::Die);
            worlds.each_ref().map(start)
        })
        .collect();
    for at in 0..OWNERS {
        // The two worlds have other pids: here a number stands for both.
        known.sessions[at].pid = Some(at as u32);
        known.names[at] = b"guest".to_vec();
        // Each holds something, so that each is fenced.
        let own = acquire("", &format!("/run/diff/own{at}"), AUTOCREATE);
        owner_call(
            &worlds,
            &mut known,
            &mut owners,
            at,
            &own,
            &mut history,
            seed,
        );
    }
    for directory in ["/run/diff/ls1", "/run/diff/ls2"] {
        let call = create_lockspace(directory);
        owner_call(
            &worlds,
            &mut known,
            &mut owners,
            0,
            &call,
            &mut history,
            seed,
        );
    }
    for ending in 0..OWNERS {
        let mut sent = 0;
        while sent < CALLS_BEFORE_AN_END {
            let at = ending + random.below(OWNERS - ending);
            let call = random_call(&mut random);
            let of_owner = matches!(call, Call::Register { .. } | Call::Restrict { .. });
            let left_out = of_owner
                || known.rule(&worlds[0], at, &call).is_some()
                || known.takes_again(at, &call);
            if !left_out {
                sent += 1;
                owner_call(
                    &worlds,
                    &mut known,
                    &mut owners,
                    at,
                    &call,
                    &mut history,
                    seed,
                );
            }
        }
        let killed = random.percent(50);
        history.push(format!("owner {ending} ends; killed: {killed}"));
        for owner in &mut owners[ending] {
            if killed {
                owner.kill()
            } else {
                owner.close_connection()
            }
            owner.wait_end();
        }
        known.forget(ending);
        // An owner's end is not answered: it has begun when its own file is gone, and it has to
        // come to the same result.
        let own = Path::new(BASE).join(format!("own{ending}"));
        for world in &worlds {
            let file = world.namespace.path(&own);
            wait_until(DEADLINE, "an owner's end to be handled", || !file.exists());
        }
        let deadline = Instant::now() + DEADLINE;
        while worlds[0].look() != worlds[1].look() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        compare_looks(&worlds, seed, &history);
    }
}

fn owner_call(
    worlds: &[World; 2],
    known: &mut Known,
    owners: &mut [[Owner; 2]],
    at: usize,
    call: &Call,
    history: &mut Vec<String>,
    seed: u64,
) {
    let pids = owners[at].each_ref().map(Owner::pid);
    let [theirs, ours] = owners[at].each_mut().map(|owner| owner.call(call));
    history.push(format!("owner {at}: {call:?}\n    -> {theirs:?}"));
    let without_pid =
        |reply: &Reply, pid: i32| format!("{reply:?}").replace(&format!("owner {pid} "), "");
    let mut due = theirs.clone();
    if let Reply::Error(error) = &mut due
        && error.message.ends_with("' is locked")
        && daemon::program() != worlds[0].program
    {
        let holder = known.holder(call, |at| owners[at as usize][1].pid());
        error.message.push_str(&holder);
        error
            .str2
            .iter_mut()
            .for_each(|text| text.push_str(&holder));
    }
    if without_pid(&due, pids[0]) != without_pid(&ours, pids[1]) {
        fail(seed, history, &format!("ours: {ours:?}"));
    }
    known.learn(&worlds[0], at, call, &theirs);
}

fn compare_looks(worlds: &[World; 2], seed: u64, history: &[String]) {
    let [theirs, ours] = worlds.each_ref().map(World::look);
    if theirs != ours {
        let only = |left: &BTreeMap<PathBuf, String>, right: &BTreeMap<PathBuf, String>| {
            let differs = left
                .iter()
                .filter(|(path, text)| right.get(*path) != Some(*text));
            differs
                .map(|(path, text)| format!("{}: {text}", path.display()))
                .collect::<Vec<_>>()
        };
        let text = format!(
            "libvirt's: {:#?}\nours: {:#?}",
            only(&theirs, &ours),
            only(&ours, &theirs)
        );
        fail(seed, history, &text);
    }
}

fn fail(seed: u64, history: &[String], text: &str) -> ! {
    let shown = &history[history.len().saturating_sub(25)..];
    panic!(
        "VIRTLOCKD_DIFFERENTIAL_SEED={seed}\n...\n{}\n{text}",
        shown.join("\n")
    );
}

/// Libvirt's daemon, or a skip.
fn c_program() -> Option<PathBuf> {
    if !support::require_root() {
        return None;
    }
    let program = daemon::c_daemon();
    if program.is_none() {
        support::skip("libvirt's own virtlockd is not installed: nothing to compare with");
    }
    program
}

#[test]
fn a_path_longer_than_the_system_takes_gets_the_same_answer() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        let deep = format!("/run/diff{}", format!("/{}", "d".repeat(200)).repeat(20));
        client.call(&create_lockspace("/run/diff/ls1")).expect_ok();
        client.call(&create_lockspace(&deep)).expect_ok();
        // Too long as a whole, although no part of it is, nor the name behind the directory.
        let name = "n".repeat(200);
        // Too long as a whole, and its directory is missing: two errors to choose from.
        let missing = format!("no/such{}", "n".repeat(5000));
        let mut replies = Vec::new();
        for (lockspace, name) in [(deep.as_str(), &name), ("/run/diff/ls1", &missing)] {
            for flags in [0, AUTOCREATE] {
                replies.push(client.call(&acquire(lockspace, name, flags)));
            }
            replies.push(client.call(&create_resource(lockspace, name)));
            replies.push(client.call(&delete_resource(lockspace, name)));
        }
        replies
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(theirs, ours);
    }
}

/// Plays a scene with libvirt's daemon and with ours; both answers, libvirt's first.
fn in_both<T>(scene: impl Fn(&World) -> T) -> Option<[T; 2]> {
    let c_program = c_program()?;
    if daemon::program() == c_program {
        support::skip("libvirt's own daemon is under test: it has no differences from itself");
        return None;
    }
    Some([c_program, daemon::program()].map(|program| scene(&World::new(&program))))
}

#[test]
fn a_second_name_of_a_held_file_is_busy_where_libvirts_daemon_grants_it() {
    for second in ["/run/diff/a.hard", "/run/diff/./a", "run/diff/a"] {
        let scene = |world: &World| {
            let (mut one, mut two) = (
                world.registered(1_000_004_242),
                world.registered(1_000_005_555),
            );
            one.call(&acquire("", "/run/diff/a", 0)).expect_ok();
            two.call(&acquire("", second, 0))
        };
        let Some([theirs, ours]) = in_both(scene) else {
            return;
        };
        theirs.expect_ok();
        let text = ours.expect_error(87, 51);
        let start = format!("resource busy: Lockspace resource '{second}' is locked");
        assert!(text.starts_with(&start), "{text}");
        for word in [
            "guest",
            "10111213-1415-1617-1819-1a1b1c1d1e1f",
            "1000004242",
            "/run/diff/a",
        ] {
            assert!(text[start.len()..].contains(word), "no {word} in: {text}");
        }
    }
}

#[test]
fn a_symlink_to_a_held_file_is_busy() {
    let scene = |world: &World| {
        let (mut one, mut two) = (
            world.registered(1_000_004_242),
            world.registered(1_000_005_555),
        );
        one.call(&acquire("", "/run/diff/b", 0)).expect_ok();
        two.call(&acquire("", "/run/diff/b.sym", 0))
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    theirs.expect_ok();
    ours.expect_error(87, 51);
}

#[test]
fn a_file_held_in_one_lockspace_is_busy_in_every_other() {
    let scene = |world: &World| {
        let (mut one, mut two) = (
            world.registered(1_000_004_242),
            world.registered(1_000_005_555),
        );
        one.call(&create_lockspace("/run/diff/ls1")).expect_ok();
        one.call(&acquire("/run/diff/ls1", "r1", 0)).expect_ok();
        two.call(&acquire("", "/run/diff/ls1/r1", 0))
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    theirs.expect_ok();
    ours.expect_error(87, 51);
}

#[test]
fn releasing_one_name_never_drops_the_lock_under_another() {
    let scene = |world: &World| {
        let (mut one, mut two) = (
            world.registered(1_000_004_242),
            world.registered(1_000_005_555),
        );
        one.call(&acquire("", "/run/diff/a", 0)).expect_ok();
        if two.call(&acquire("", "/run/diff/a.hard", 0)).is_ok() {
            two.call(&release("", "/run/diff/a.hard")).expect_ok();
        }
        support::lock_probe(&world.path("/run/diff/a")).is_some()
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(!theirs, "libvirt's daemon lost the lock");
    assert!(ours, "our daemon keeps it");
}

#[test]
fn a_name_that_leaves_its_lockspace_directory_is_refused() {
    let directory = "/run/diff/ls1";
    for call in [
        acquire(directory, "../c", 0),
        create_resource(directory, "../c"),
    ] {
        let scene = |world: &World| {
            let mut client = world.registered(1_000_004_242);
            client.call(&create_lockspace(directory)).expect_ok();
            client.call(&call)
        };
        let Some([theirs, ours]) = in_both(scene) else {
            return;
        };
        theirs.expect_ok();
        let text = ours.expect_error(8, 51);
        assert_eq!(
            text,
            "invalid argument: resource name '../c' leaves lockspace directory '/run/diff/ls1'"
        );
    }
}

#[test]
fn a_symlink_that_leaves_its_lockspace_directory_is_refused() {
    let scene = |world: &World| {
        std::os::unix::fs::symlink("../c", world.path("/run/diff/ls1/out")).unwrap();
        let mut client = world.registered(1_000_004_242);
        client.call(&create_lockspace("/run/diff/ls1")).expect_ok();
        client.call(&acquire("/run/diff/ls1", "out", 0))
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    theirs.expect_ok();
    assert_eq!(
        ours.expect_error(8, 51),
        "invalid argument: resource name 'out' leaves lockspace directory '/run/diff/ls1'"
    );
}

#[test]
fn a_deleted_name_that_leaves_its_lockspace_directory_is_refused_and_the_file_stays() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        client.call(&create_lockspace("/run/diff/ls1")).expect_ok();
        let reply = client.call(&delete_resource("/run/diff/ls1", "../c"));
        (reply, world.path("/run/diff/c").exists())
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(theirs.0.is_ok() && !theirs.1);
    ours.0.expect_error(8, 51);
    assert!(ours.1, "the file outside of the lockspace is there");
}

#[test]
fn delete_resource_in_the_default_lockspace_is_refused_and_the_disk_stays() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        let reply = client.call(&delete_resource("", "/run/diff/c"));
        (reply, world.path("/run/diff/c").exists())
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(theirs.0.is_ok() && !theirs.1);
    let text = ours.0.expect_error(29, 51);
    assert!(text.starts_with("operation forbidden: "), "{text}");
    assert!(ours.1, "the disk is there");
}

#[test]
fn autocreate_in_the_default_lockspace_keeps_a_disk_that_it_found() {
    for flags in [AUTOCREATE, AUTOCREATE | SHARED] {
        let scene = |world: &World| {
            let mut client = world.registered(1_000_004_242);
            client.call(&acquire("", "/run/diff/c", flags)).expect_ok();
            client.call(&release("", "/run/diff/c")).expect_ok();
            std::fs::read_to_string(world.path("/run/diff/c")).ok()
        };
        let Some([theirs, ours]) = in_both(scene) else {
            return;
        };
        assert_eq!(theirs, None);
        assert_eq!(ours.as_deref(), Some("content of c"));
    }
}

#[test]
fn new_reports_that_its_directory_cannot_be_made() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        ["/run/diff/plain", "/run/diff/plain/x"].map(|path| client.call(&new_lockspace(path)))
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(theirs.iter().all(Reply::is_ok));
    assert_eq!(
        ours[0].expect_error(1, 51),
        "internal error: Lockspace location /run/diff/plain exists, but is not a directory"
    );
    assert_eq!(
        ours[1].expect_error(38, 51),
        "Unable to create lockspace /run/diff/plain/x: Not a directory"
    );
}

#[test]
fn an_acquire_in_an_unknown_lockspace_opens_it_if_its_directory_is_there() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        ["/run/diff/ls3", "/run/diff/nowhere"].map(|path| client.call(&acquire(path, "r1", 0)))
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    theirs[0].expect_error(1, 7);
    ours[0].expect_ok();
    assert_eq!(
        theirs[1], ours[1],
        "without a directory: libvirt's own answer"
    );
    ours[1].expect_error(1, 7);
}

#[test]
fn a_shared_lock_taken_twice_by_one_owner_is_free_when_the_owner_is_dead() {
    let scene = |world: &World| {
        let disk = "/run/diff/c";
        let mut owner = Owner::register(world.daemon.lock_socket(), "guest", OnTerm::Die);
        owner.call(&acquire("", disk, SHARED)).expect_ok();
        owner.call(&acquire("", disk, SHARED)).expect_ok();
        // A lock that was taken once tells when the owner's end has been handled.
        owner.call(&acquire("", "/run/diff/b", 0)).expect_ok();
        owner.kill();
        owner.wait_end();
        wait_until(
            support::DEADLINE,
            "the end of the owner to be handled",
            || support::lock_probe(&world.path("/run/diff/b")).is_none(),
        );
        world.daemon.client().ping();
        support::lock_probe(&world.path(disk)).is_none()
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(!theirs, "libvirt's daemon keeps one of the two for ever");
    assert!(ours, "our daemon frees both");
}

#[test]
fn create_resource_leaves_a_file_that_is_there_alone() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        client.call(&create_lockspace("/run/diff/ls1")).expect_ok();
        client.call(&acquire("", "/run/diff/ls1/r1", 0)).expect_ok();
        client.call(&create_resource("/run/diff/ls1", "r1"));
        let content = std::fs::read_to_string(world.path("/run/diff/ls1/r1")).unwrap();
        assert_eq!(content, "content of ls1/r1");
        support::lock_probe(&world.path("/run/diff/ls1/r1")).is_some()
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(
        !theirs,
        "libvirt's daemon opens and closes it, which drops the lock"
    );
    assert!(ours, "our daemon keeps the lock");
}

#[test]
fn delete_resource_refuses_a_file_that_is_held_under_another_name() {
    let scene = |world: &World| {
        let mut client = world.registered(1_000_004_242);
        client.call(&create_lockspace("/run/diff/ls1")).expect_ok();
        client.call(&acquire("", "/run/diff/ls1/r1", 0)).expect_ok();
        let reply = client.call(&delete_resource("/run/diff/ls1", "r1"));
        (reply, world.path("/run/diff/ls1/r1").exists())
    };
    let Some([theirs, ours]) = in_both(scene) else {
        return;
    };
    assert!(theirs.0.is_ok() && !theirs.1);
    let text = ours.0.expect_error(87, 51);
    assert!(
        text.starts_with("resource busy: Lockspace resource 'r1' is locked"),
        "{text}"
    );
    assert!(ours.1, "the held file is there");
}
