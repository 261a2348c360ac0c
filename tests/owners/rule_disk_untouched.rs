//! The rule "disks are never written", seen from outside: whatever is called on the default
//! lockspace, a disk that was there before keeps its content, size, times, inode and place.
//!
//! `VIRTLOCKD_DISK_SEED` repeats a run whose seed was printed.

use crate::support;
use crate::support::client::{
    AUTOCREATE, Call, Client, Reply, SHARED, UUID, acquire, create_lockspace, delete_resource,
    register, release,
};
use crate::support::daemon::{Daemon, WATCHED};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::random::Random;
use crate::support::upgrade::Disturbed;
use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const DISKS: &str = "/run/disks";
const ROUNDS: u64 = 12;
const CALLS_PER_ROUND: usize = 400;

/// What a disk looks like from outside; the time of the last access is no part of it.
#[derive(Debug, PartialEq, Eq)]
struct Disk {
    content: Vec<u8>,
    device: u64,
    inode: u64,
    links: u64,
    mode: u32,
    owner: (u32, u32),
    modified_ns: (i64, i64),
    changed_ns: (i64, i64),
}

impl Disk {
    fn look(path: &Path) -> Disk {
        let status = path
            .symlink_metadata()
            .unwrap_or_else(|error| panic!("the disk {} is gone: {error}", path.display()));
        let content = match (status.is_file(), status.is_symlink()) {
            (true, _) => std::fs::read(path).expect("read a disk"),
            (_, true) => {
                let target = std::fs::read_link(path).expect("read a symlink");
                target.into_os_string().into_encoded_bytes()
            }
            _ => Vec::new(),
        };
        Disk {
            content,
            device: status.dev(),
            inode: status.ino(),
            links: status.nlink(),
            mode: status.mode(),
            owner: (status.uid(), status.gid()),
            modified_ns: (status.mtime(), status.mtime_nsec()),
            changed_ns: (status.ctime(), status.ctime_nsec()),
        }
    }
}

struct Scene {
    namespace: Namespace,
    daemon: Daemon,
    before: BTreeMap<PathBuf, Disk>,
}

impl Scene {
    /// Disks of every kind that a name may lead to, and a daemon.
    fn new() -> Scene {
        let namespace = Namespace::sealed();
        let at = |name: &str| namespace.path(DISKS).join(name);
        std::fs::create_dir(at("")).expect("make the directory of the disks");
        std::fs::write(at("small"), "boot sector").expect("write a disk");
        std::fs::write(at("empty"), "").expect("write a disk");
        std::fs::write(at("large"), vec![7; 1 << 20]).expect("write a disk");
        std::fs::write(at("readonly"), "installation medium").expect("write a disk");
        let mut rights = at("readonly")
            .metadata()
            .expect("look at a disk")
            .permissions();
        rights.set_readonly(true);
        std::fs::set_permissions(at("readonly"), rights).expect("take the right to write");
        std::fs::hard_link(at("small"), at("hardlink")).expect("make a hard link");
        std::os::unix::fs::symlink("large", at("symlink")).expect("make a symlink");
        let everybody = nix::sys::stat::Mode::from_bits_truncate(0o644);
        nix::unistd::mkfifo(&at("fifo"), everybody).expect("make a fifo");
        std::fs::create_dir(at("lockspace")).expect("make a directory");
        let names = [
            "small", "empty", "large", "readonly", "hardlink", "symlink", "fifo",
        ]
        .map(at);
        let before = names
            .into_iter()
            .map(|path| (path.clone(), Disk::look(&path)))
            .collect();
        let daemon = Daemon::start(&namespace, &[], &[]);
        Scene {
            namespace,
            daemon,
            before,
        }
    }

    /// Panics if any disk is not what it was.
    fn compare(&self, after: &str) {
        for (path, before) in &self.before {
            assert_eq!(
                &Disk::look(path),
                before,
                "{} after {after}",
                path.display()
            );
        }
    }

    /// Files that were not there before.
    fn new_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.namespace.path(DISKS)).expect("list the disks");
        let paths = entries.map(|entry| entry.expect("a directory entry").path());
        paths
            .filter(|path| !self.before.contains_key(path) && !path.ends_with("lockspace"))
            .collect()
    }
}

/// A call on the default lockspace, or one of the others that need no lockspace: all eight
/// procedures, all flags, every spelling of a disk's name.
fn random_call(random: &mut Random) -> Call {
    let flags = if random.percent(5) {
        random.next() as u32
    } else {
        random.below(4) as u32
    };
    let no_flags = if random.percent(5) {
        random.next() as u32
    } else {
        0
    };
    let name = format!(
        "{}/{}",
        random.pick(&[
            DISKS,
            "/run/./disks",
            "/run//disks",
            "/run/disks/lockspace/..",
            "run/disks"
        ]),
        random.pick(&[
            "small", "empty", "large", "readonly", "hardlink", "symlink", "missing", "absent/x",
            "",
        ])
    );
    let (path, name) = (Vec::new(), name.into_bytes());
    match random.below(20) {
        0 => Call::Register {
            uuid: UUID,
            name: b"guest".to_vec(),
            id: 7,
            pid: *random.pick(&[4242, 5555]),
            flags: no_flags,
        },
        1 => Call::New {
            path: name,
            flags: no_flags,
        },
        2 => Call::CreateLockspace { path: name },
        3..6 => Call::CreateResource {
            path,
            name,
            flags: no_flags,
        },
        6..9 => Call::DeleteResource {
            path,
            name,
            flags: no_flags,
        },
        9..15 => Call::Acquire { path, name, flags },
        _ => Call::Release {
            path,
            name,
            flags: no_flags,
        },
    }
}

#[test]
fn random_calls_on_the_default_lockspace_leave_every_disk_as_it_was() {
    if !support::require_root() {
        return;
    }
    let seed = Random::seed_from("VIRTLOCKD_DISK_SEED");
    println!("VIRTLOCKD_DISK_SEED={seed}");
    for round in 0..ROUNDS {
        let seed = seed.wrapping_add(round);
        let mut random = Random::new(seed);
        let mut scene = Scene::new();
        let mut clients: Vec<Client> = (0..3).map(|_| scene.daemon.client()).collect();
        let mut owners: Vec<Owner> = ["one", "two"]
            .map(|name| Owner::register(scene.daemon.lock_socket(), name, OnTerm::Die))
            .into();
        for _ in 0..CALLS_PER_ROUND {
            let call = random_call(&mut random);
            match random.below(4) {
                // An owner keeps its own pid, so that its end is the end of an owner.
                3 if matches!(call, Call::Register { .. }) => {}
                3 => drop(random_owner(&mut random, &mut owners).call(&call)),
                at => drop(clients[at].call(&call)),
            }
            if random.percent(5) {
                scene.compare(&format!("{call:?}; VIRTLOCKD_DISK_SEED={seed}"));
            }
        }
        if random.percent(50) {
            clients[0].call(&Call::Restrict { flags: 0 });
        }
        for owner in &mut owners {
            // One is killed, the other only closes its connection and is fenced if it holds locks.
            if random.percent(50) {
                owner.kill()
            } else {
                owner.close_connection()
            }
        }
        drop(owners);
        scene.daemon.client().ping();
        scene.compare(&format!("the owners' end; VIRTLOCKD_DISK_SEED={seed}"));
        drop(clients);
        if random.percent(50) {
            assert!(
                scene.daemon.stop().success(),
                "a regular end; VIRTLOCKD_DISK_SEED={seed}"
            );
        } else {
            scene.daemon.kill();
        }
        scene.compare(&format!("the daemon's end; VIRTLOCKD_DISK_SEED={seed}"));
    }
}

fn random_owner<'a>(random: &mut Random, owners: &'a mut [Owner]) -> &'a mut Owner {
    let count = owners.len();
    &mut owners[random.below(count)]
}

#[test]
fn an_owners_end_leaves_a_disk_that_autocreate_found() {
    if !support::require_root() {
        return;
    }
    for flags in [AUTOCREATE, AUTOCREATE | SHARED] {
        let scene = Scene::new();
        let mut owner = Owner::register(scene.daemon.lock_socket(), "guest", OnTerm::Die);
        owner
            .call(&acquire("", "/run/disks/small", flags))
            .expect_ok();
        owner.kill();
        owner.wait_end();
        let disk = scene.namespace.path("/run/disks/small");
        support::wait_until(support::DEADLINE, "the lock to end with its owner", || {
            support::lock_probe(&disk).is_none()
        });
        scene.compare("an owner's end");
    }
}

#[test]
fn a_daemons_regular_end_leaves_a_disk_that_autocreate_found() {
    if !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let mut client = scene.daemon.client();
    client.call(&register(4242)).expect_ok();
    client
        .call(&acquire("", "/run/disks/small", AUTOCREATE))
        .expect_ok();
    client
        .call(&acquire("", "/run/disks/missing", AUTOCREATE))
        .expect_ok();
    assert!(scene.daemon.stop().success());
    scene.compare("the daemon's end");
    assert_eq!(
        scene.new_files(),
        Vec::<PathBuf>::new(),
        "what AUTOCREATE made is removed"
    );
}

#[test]
fn a_fifo_in_place_of_a_disk_stays_and_nobody_waits_for_it() {
    if !support::require_root() {
        return;
    }
    let scene = Scene::new();
    let fifo = scene.namespace.path("/run/disks/fifo");
    assert!(fifo.symlink_metadata().unwrap().file_type().is_fifo());
    let mut client = scene.daemon.client();
    client.call(&register(4242)).expect_ok();
    let mut bystander = scene.daemon.client();
    let calls = [
        acquire("", "/run/disks/fifo", 0),
        acquire("", "/run/disks/fifo", AUTOCREATE),
        support::client::create_resource("", "/run/disks/fifo"),
        support::client::delete_resource("", "/run/disks/fifo"),
        support::client::release("", "/run/disks/fifo"),
    ];
    for call in calls {
        client.post(&call);
        bystander.ping();
        match client.receive_within(Duration::from_secs(5)) {
            support::client::Received::Frame(_) => {}
            other => panic!("{call:?} on a fifo: {other:?}"),
        }
    }
    scene.compare("calls on a fifo");
}

/// DELETE_RESOURCE has to find out first whether the file is held under another name.
#[test]
fn a_held_file_is_not_deleted_because_nobody_could_see_that_it_is_held() {
    if !support::require_root() || !support::require_strace() {
        return;
    }
    let namespace = Namespace::new();
    std::fs::create_dir(namespace.path("/run/space")).expect("make a directory");
    let file = namespace.path("/run/space/file");
    std::fs::write(&file, "data").expect("make a file");
    let program = support::daemon::program();
    let program = program.to_str().expect("a path in UTF-8");
    // It is opened without ado, but below a directory nothing can be looked at.
    let words = [
        "-D",
        "-f",
        "-o",
        "/run/trace",
        "-e",
        "trace=openat2",
        "-e",
        "inject=openat2:error=EMFILE",
        program,
    ];
    let daemon = Daemon::start_program(Path::new("strace"), &namespace, &words, &[]);
    let mut guest = daemon.client();
    guest.call(&register(4711)).expect_ok();
    guest.call(&acquire("", "/run/space/file", 0)).expect_ok();
    let mut other = daemon.client();
    other.call(&register(4712)).expect_ok();
    other.call(&create_lockspace("/run/space")).expect_ok();
    let refused = other.call(&delete_resource("/run/space", "file"));
    assert!(matches!(refused, Reply::Error(_)), "{refused:?}");
    assert!(file.exists(), "a file that is held was deleted");
}

#[test]
fn a_lock_file_that_was_made_for_a_lock_which_could_not_be_had_is_removed() {
    if !support::require_root() || !support::require_strace() {
        return;
    }
    let namespace = Namespace::new();
    std::fs::create_dir(namespace.path("/run/space")).expect("make a directory");
    let daemon = Daemon::start(&namespace, &[], &[WATCHED]);
    let mut client = daemon.client();
    client.call(&register(4711)).expect_ok();
    client.call(&create_lockspace("/run/space")).expect_ok();
    // Some of these calls are no locks: the standard library looks at descriptors, too.
    for space in ["/run/space", ""] {
        let mut refusals = 0;
        for nth in 1..=6 {
            let file = format!("/run/space/file{nth}");
            let name = if space.is_empty() {
                file.clone()
            } else {
                format!("file{nth}")
            };
            let failing = Disturbed::with(&daemon, "fcntl", &format!("error=ENOLCK:when={nth}"));
            match client.call(&acquire(space, &name, AUTOCREATE)) {
                Reply::Ok { .. } => client.call(&release(space, &name)).expect_ok(),
                Reply::Error(error) => {
                    assert!(error.message.contains("No locks available"), "{error:?}");
                    refusals += 1;
                }
            }
            drop(failing);
            let left = namespace.path(&file).exists();
            assert!(
                !left,
                "{file} is left, with call {nth} of '{space}' failing"
            );
        }
        assert!(refusals > 0, "no lock of '{space}' failed");
    }
}
