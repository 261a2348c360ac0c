//! A daemon that is killed with all its processes: its ledger stays in the run directory, and the next start
//! has every lock again before it serves anybody. What it must not believe, and what must not be left for it.

mod places;
mod proof;

use crate::support;
use crate::support::client::{acquire, create_lockspace, register_as, release};
use crate::support::daemon::{Daemon, c_daemon, program};
use crate::support::owner::{OnTerm, Owner, runs};
use crate::support::upgrade::{Host, refused_upgrade, upgrade};
use crate::support::{DEADLINE, TempDir, lock_probe, skip, wait_for_lock, wait_until};
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Where a daemon of root's has its ledger.
const LEDGER: &str = "/run/libvirt/virtlockd-ledger";
/// Greater than any process id can be.
const NO_PROCESS: i32 = i32::MAX;
const SHARED: u32 = 1;
const AUTOCREATE: u32 = 2;
/// What the log says of a ledger that was gone on from.
const AGAIN: &str = "were taken again";

/// A host with a daemon that can be killed and started again. `None`, with a skip, where that cannot be.
struct Scene {
    host: Host,
    daemon: Daemon,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !support::require_root() {
            return None;
        }
        if program().starts_with("/usr") {
            skip("libvirt's daemon loses its locks when it is killed");
            return None;
        }
        let host = Host::new();
        let daemon = host.start(&[], &[]);
        let scene = Scene { host, daemon };
        scene.wait_for_ledger();
        Some(scene)
    }

    /// It is put in place when the sockets are there.
    fn wait_for_ledger(&self) {
        wait_until(DEADLINE, "the ledger to be there", || {
            self.ledger().exists()
        });
    }

    fn ledger(&self) -> PathBuf {
        self.host.path(LEDGER)
    }

    fn kill(&mut self) {
        self.daemon.kill();
        assert!(
            self.ledger().exists(),
            "the ledger of a killed daemon stays"
        );
    }

    fn start(&mut self) {
        self.daemon = self.host.start(&[], &[]);
        self.daemon.wait_until_asleep();
    }

    /// Killed, and started again.
    fn cold_start(&mut self) {
        self.kill();
        self.start();
    }

    fn logged(&self, words: &str) -> bool {
        self.daemon.stderr().contains(words)
    }

    #[track_caller]
    fn assert_logged(&self, words: &str) {
        let log = self.daemon.stderr();
        assert!(log.contains(words), "'{words}' is not in the log:\n{log}");
    }

    /// How a disk is locked.
    fn lock(&self, disk: &str) -> Option<bool> {
        lock_probe(&self.host.path(disk)).map(|seen| seen.exclusive)
    }

    /// An owner that takes a disk, and perhaps more.
    fn owner(&self, name: &str, calls: &[(&str, &str, u32)]) -> Owner {
        let mut owner = Owner::register(self.daemon.lock_socket(), name, OnTerm::Die);
        for (lockspace, resource, flags) in calls {
            owner
                .call(&acquire(lockspace, resource, *flags))
                .expect_ok();
        }
        owner
    }
}

/// A process that does nothing.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Sleeper {
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        Sleeper(child.expect("start a process"))
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("a pid is an i32")
    }

    /// Starts a process that has this number, and one that ends it with itself: the kernel gives a number that
    /// is asked for (clone3(2), set_tid), and others' numbers are as they would have been. `None`, with
    /// a skip, where that cannot be.
    fn with_number(pid: i32) -> Option<Sleeper> {
        const SCRIPT: &str = "import ctypes, os, struct, sys
wanted = ctypes.c_int(int(sys.argv[1]))
words = [0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(wanted), 1, 0]
arguments = ctypes.create_string_buffer(struct.pack('11Q', *words))
pid = ctypes.CDLL(None).syscall(435, arguments, 88)
if pid == 0:
    os.execvp('sleep', ['sleep', '1000'])
print(pid, flush=True)
sys.stdin.read()
if pid > 0:
    os.kill(pid, 9)";
        let child = Command::new("/usr/bin/python3")
            .args(["-c", SCRIPT, &pid.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.ok()?;
        let mut line = String::new();
        let said = child.stdout.take().expect("a pipe");
        BufReader::new(said).read_line(&mut line).expect("a line");
        if line.trim() != pid.to_string() {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        Some(Sleeper(child))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Of either kind: they read from a pipe of ours until it is closed.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_start_after_the_death_of_all_has_every_lock_again_and_the_owners_live() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let files = scene.host.path("/run/files");
    std::fs::create_dir(&files).expect("make a lockspace");
    let [alone, both, lent] = ["alone", "both", "lent"].map(|name| scene.host.disk(name));
    let mut client = scene.daemon.client();
    client.call(&create_lockspace("/run/files")).expect_ok();
    let mut one = scene.owner(
        "one",
        &[
            ("", &alone, 0),
            ("", &both, SHARED),
            ("/run/files", "lease", AUTOCREATE),
        ],
    );
    let mut two = scene.owner("two", &[("", &both, SHARED), ("", &both, SHARED)]);
    // Over somebody else's connection, as libvirtd does.
    let mut guest = Sleeper::start();
    let mut helper = scene.daemon.client();
    helper.call(&register_as("lent", guest.pid())).expect_ok();
    helper.call(&acquire("", &lent, 0)).expect_ok();
    let held = [
        (alone.as_str(), Some(true)),
        (&both, Some(false)),
        ("/run/files/lease", Some(true)),
        (&lent, Some(true)),
    ];
    for (disk, how) in held {
        assert_eq!(scene.lock(disk), how, "{disk}");
    }
    for _ in 0..3 {
        scene.kill();
        for (disk, _) in held {
            assert_eq!(scene.lock(disk), None, "{disk}");
        }
        scene.start();
        scene.assert_logged("4 locks of 3 owners were taken again");
        for (disk, how) in held {
            assert_eq!(scene.lock(disk), how, "{disk}");
        }
        assert!(one.is_alive() && two.is_alive() && runs(guest.pid()));
    }
    // Each holding is what it was: in their names all are given back.
    let mut helper = scene.daemon.client();
    helper.call(&register_as("two", two.pid())).expect_ok();
    helper.call(&release("", &both)).expect_ok();
    helper.call(&release("", &both)).expect_ok();
    helper.call(&release("", &both)).expect_error(1, 51);
    assert_eq!(scene.lock(&both), Some(false));
    // Their deaths are noticed, without a connection.
    guest.0.kill().expect("kill the guest");
    guest.0.wait().expect("reap it");
    one.kill();
    one.wait_end();
    for (disk, _) in held {
        if disk == "/run/files/lease" {
            wait_until(DEADLINE, "the lease file to be removed", || {
                !files.join("lease").exists()
            });
        } else {
            scene.host.wait_free(disk);
        }
    }
    assert!(two.is_alive());
}

#[test]
fn nobody_gets_a_lock_over_the_daemon_before_those_who_had_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disks: Vec<String> = (0..40)
        .map(|it| scene.host.disk(&format!("disk{it}")))
        .collect();
    let mut owners: Vec<Owner> = disks
        .iter()
        .map(|disk| scene.owner("owner", &[("", disk, 0)]))
        .collect();
    scene.kill();
    let stop = Arc::new(AtomicBool::new(false));
    let socket = scene.daemon.lock_socket().to_owned();
    let rival = std::thread::spawn({
        let (stop, disks) = (stop.clone(), disks.clone());
        move || {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                let Ok(stream) = std::os::unix::net::UnixStream::connect(&socket) else {
                    continue;
                };
                let mut client = support::client::Client::over(stream);
                client.call(&register_as("rival", NO_PROCESS)).expect_ok();
                for disk in &disks {
                    client.call(&acquire("", disk, 0)).expect_error(87, 51);
                    asked += 1;
                }
            }
            asked
        }
    });
    scene.daemon = scene.host.start(&[], &[]);
    std::thread::sleep(std::time::Duration::from_millis(100));
    stop.store(true, Ordering::Relaxed);
    assert!(rival.join().expect("the rival gets nothing") > 0);
    assert!(owners.iter_mut().all(Owner::is_alive));
}

#[test]
fn an_owner_that_died_meanwhile_leaves_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    std::fs::create_dir(scene.host.path("/run/files")).expect("make a lockspace");
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner(
        "dies",
        &[("", &disk, 0), ("/run/files", "lease", AUTOCREATE)],
    );
    scene.kill();
    owner.kill();
    owner.wait_end();
    scene.start();
    scene.assert_logged("2 of dead owners are free");
    assert_eq!(scene.lock(&disk), None);
    assert!(!scene.host.path("/run/files/lease").exists());
    scene.owner("next", &[("", &disk, 0)]);
}

#[test]
fn another_process_of_an_owner_s_number_has_nothing_and_lives() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [disk, robbed] = ["disk", "robbed"].map(|name| scene.host.disk(name));
    let mut owner = scene.owner("recycled", &[("", &disk, 0), ("", &robbed, 0)]);
    let pid = owner.pid();
    scene.kill();
    owner.kill();
    owner.wait_end();
    drop(owner);
    // Nor is it fenced where somebody else has a disk by now.
    let _thief = support::foreign_lock(&scene.host.path(&robbed), true);
    let Some(_another) = Sleeper::with_number(pid) else {
        return skip("the number of a process cannot be given again here");
    };
    scene.start();
    scene.assert_logged("2 of dead owners are free");
    assert_eq!(scene.lock(&disk), None);
    assert!(runs(pid));
}

#[test]
fn what_somebody_took_meanwhile_is_reported_and_its_owner_fenced() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [robbed, kept] = ["robbed", "kept"].map(|name| scene.host.disk(name));
    let mut victim = scene.owner("victim", &[("", &robbed, 0), ("", &kept, 0)]);
    let mut other = scene.owner("other", &[]);
    let path = scene.host.path(&robbed);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open the disk");
    // It waits in the kernel, and has it in the moment when the daemon dies.
    let waiting = std::thread::spawn(move || {
        wait_for_lock(&file);
        file
    });
    scene.kill();
    let thief = waiting.join().expect("the rival has it");
    scene.start();
    scene.assert_logged("Domain 'victim'");
    scene.assert_logged("lost its lock on '/run/robbed' while no daemon ran: by a process");
    assert_eq!(victim.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(other.is_alive());
    scene.host.wait_free(&kept);
    drop(thief);
}

#[test]
fn a_file_that_is_gone_or_another_by_now_is_reported_and_not_touched() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [gone, replaced] = ["gone", "replaced"].map(|name| scene.host.disk(name));
    let mut owner = scene.owner("owner", &[("", &gone, 0), ("", &replaced, 0)]);
    scene.kill();
    std::fs::remove_file(scene.host.path(&gone)).expect("remove it");
    let new = scene.host.path("/run/new");
    std::fs::write(&new, "another").expect("write another");
    std::fs::rename(&new, scene.host.path(&replaced)).expect("put it in place");
    scene.start();
    scene.assert_logged("lost its lock on '/run/gone' with the daemon that was killed: it is not");
    scene.assert_logged(
        "'/run/replaced' with the daemon that was killed: another file has its name",
    );
    assert_eq!(scene.lock(&replaced), None);
    assert!(owner.is_alive());
}

#[test]
fn a_fence_goes_on_in_the_daemon_that_was_started_again() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut owner = Owner::register(scene.daemon.lock_socket(), "undead", OnTerm::Ignore);
    owner.call(&acquire("", &disk, 0)).expect_ok();
    owner.close_connection();
    wait_until(DEADLINE, "the fence to begin", || {
        scene.logged("is sent SIGTERM now")
    });
    scene.cold_start();
    assert_eq!(scene.lock(&disk), Some(true));
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.host.wait_free(&disk);
}

#[test]
fn an_owner_that_cannot_be_seen_keeps_its_lock_and_no_process_is_taken_for_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let nobody = NO_PROCESS;
    let mut helper = scene.daemon.client();
    helper.call(&register_as("nobody", nobody)).expect_ok();
    helper.call(&acquire("", &disk, 0)).expect_ok();
    scene.cold_start();
    assert_eq!(scene.lock(&disk), Some(true));
    scene.assert_logged("its process cannot be told");
    let mut helper = scene.daemon.client();
    helper.call(&register_as("nobody", nobody)).expect_ok();
    helper.call(&release("", &disk)).expect_ok();
    scene.host.assert_free(&disk);
}

#[test]
fn a_ledger_of_another_boot_of_the_host_is_removed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let _owner = scene.owner("owner", &[("", &disk, 0)]);
    scene.kill();
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the boot's name");
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let boot = support::owner::from_hex(&digits);
    let mut content = std::fs::read(scene.ledger()).expect("read the ledger");
    let at = content.windows(16).position(|bytes| bytes == boot);
    content[at.expect("the ledger names the boot")] ^= 1;
    std::fs::write(scene.ledger(), content).expect("change it");
    scene.start();
    assert_eq!(scene.lock(&disk), None);
    assert!(!scene.logged(AGAIN));
}

/// Where the events of a ledger begin that count.
fn first_event(content: &[u8]) -> usize {
    let word = |at: usize| {
        let bytes = content[at..].first_chunk();
        u64::from_le_bytes(*bytes.expect("a whole word")) as usize
    };
    word(32 + 16 * word(16))
}

/// Changes a daemon's ledger, does what says that a start refuses it, and puts it back.
fn refused_with(scene: &mut Scene, disk: &str, change: impl FnOnce(&mut Vec<u8>), why: &str) {
    let whole = std::fs::read(scene.ledger()).expect("read the ledger");
    let mut content = whole.clone();
    change(&mut content);
    std::fs::write(scene.ledger(), &content).expect("change it");
    // Tried as often as somebody likes.
    for _ in 0..2 {
        scene.daemon = Daemon::spawn(
            std::path::Path::new(support::upgrade::PROGRAM),
            &scene.host.namespace,
            &[],
            &[],
        );
        assert_eq!(scene.daemon.wait_end().code(), Some(3));
        scene.assert_logged("cannot be used");
        scene.assert_logged(why);
        let socket = std::os::unix::net::UnixStream::connect(scene.daemon.lock_socket());
        assert!(socket.is_err(), "nobody is served");
        let kept = std::fs::read(scene.ledger()).expect("it is kept");
        assert!(kept == content, "it is as it was");
        assert_eq!(scene.lock(disk), None);
    }
    // In the background whoever started it knows.
    let status = scene
        .host
        .namespace
        .command(support::upgrade::PROGRAM)
        .arg("-d")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert_eq!(status.expect("start it").code(), Some(1));
    std::fs::write(scene.ledger(), whole).expect("put it back");
}

#[test]
fn with_a_ledger_that_cannot_be_read_nothing_is_granted_until_it_can_or_somebody_removes_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    scene.kill();
    type Change = fn(&mut Vec<u8>);
    let changes: [(Change, &str); 4] = [
        (
            |content| {
                let first = first_event(content);
                content[first] = 0xff;
            },
            "it is damaged",
        ),
        (|content| content[8] = 99, "its format 99 is newer"),
        (|content| content[0] = b'x', "it is not a ledger"),
        (|content| content.truncate(100), "it is damaged"),
    ];
    for (change, why) in changes {
        refused_with(&mut scene, &disk, change, why);
    }
    scene.start();
    scene.assert_logged("1 locks of 1 owners were taken again");
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
    // Removed by hand.
    scene.kill();
    std::fs::remove_file(scene.ledger()).expect("remove it");
    scene.start();
    assert_eq!(scene.lock(&disk), None);
    assert!(owner.is_alive());
    scene.wait_for_ledger();
}

#[test]
fn a_ledger_that_there_is_no_memory_to_read_is_read_when_there_is() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !support::require_strace() {
        return;
    }
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    scene.kill();
    let start = |scene: &mut Scene, error: &str, when: &str| {
        let inject = format!("inject=mmap,pread64:error={error}:when={when}");
        let ledger = "/run/libvirt/virtlockd-ledger";
        let words = ["-f", "-qq", "-o", "/dev/null", "-P", ledger, "-e", &inject];
        scene.daemon = Daemon::spawn(
            std::path::Path::new("strace"),
            &scene.host.namespace,
            &[&words[..], &[support::upgrade::PROGRAM]].concat(),
            &[support::daemon::WATCHED],
        );
    };
    for (error, text) in [
        ("ENOMEM", "Cannot allocate memory"),
        ("EIO", "output error"),
    ] {
        start(&mut scene, error, "1+");
        assert_eq!(scene.daemon.wait_end().code(), Some(3));
        scene.assert_logged(text);
        assert!(scene.ledger().exists());
    }
    start(&mut scene, "ENOMEM", "1..3");
    wait_until(DEADLINE, "the ledger to be read", || {
        scene.logged("1 locks of 1 owners were taken again")
    });
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
    // strace is its parent, and goes first.
    let pid = std::fs::read_to_string(scene.host.path("/run/virtlockd.pid")).expect("its number");
    let main = support::daemon::Main::of(pid.trim().parse().expect("a number"));
    main.expect("it runs").kill_all();
}

#[test]
fn a_ledger_that_cannot_be_looked_at_is_reported_and_never_replaced() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    scene.kill();
    let aside = scene.host.path("/run/libvirt/aside");
    std::fs::rename(scene.ledger(), &aside).expect("move it");
    std::os::unix::fs::symlink("aside", scene.ledger()).expect("link it");
    let before = std::fs::read(&aside).expect("read it");
    scene.start();
    scene.assert_logged("cannot be looked at");
    scene.assert_logged("a ledger that has no name");
    assert!(scene.ledger().is_symlink());
    assert!(std::fs::read(&aside).expect("read it") == before);
    scene.kill();
    std::fs::rename(&aside, scene.ledger()).expect("put it back");
    scene.start();
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
}

#[test]
fn a_daemon_that_was_waited_for_is_not_killed_once_more_by_its_number() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let pid = scene.daemon.pid();
    scene.kill();
    let Some(_another) = Sleeper::with_number(pid) else {
        return skip("the number of a process cannot be given again here");
    };
    drop(scene);
    assert!(runs(pid));
}

#[test]
fn a_daemon_that_ends_in_order_leaves_no_ledger() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let found = std::fs::metadata(scene.ledger()).expect("the ledger of a daemon that serves");
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    assert!(scene.daemon.stop().success());
    assert_eq!(owner.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(!scene.ledger().exists());
    // Nor does one that had nothing to do.
    let mut idle = scene.host.start(&["-t", "1"], &[]);
    assert!(idle.wait_end().success());
    assert!(!scene.ledger().exists());
}

#[test]
fn a_ledger_of_another_daemon_that_serves_is_not_touched() {
    let Some(scene) = Scene::new() else {
        return;
    };
    let before = std::fs::metadata(scene.ledger()).expect("its ledger").ino();
    // Other sockets, so that only the run directory is the same.
    let (mut second, _) = scene.host.start_activated_with(&["-p", "/run/second.pid"]);
    wait_until(DEADLINE, "the second one to say so", || {
        second.stderr().contains("is another process's")
    });
    let now = || std::fs::metadata(scene.ledger()).expect("its ledger").ino();
    assert_eq!(now(), before);
    upgrade(&second);
    assert_eq!(now(), before);
    assert!(second.stop().success());
    assert_eq!(now(), before);
}

#[test]
fn where_the_run_directory_takes_no_file_the_daemon_serves_without_and_upgrades() {
    let Some(scene) = Scene::new() else {
        return;
    };
    drop(scene);
    let disk_file_system = TempDir::new();
    let outside = disk_file_system.path().display().to_string();
    let mounts: [&[&str]; 2] = [
        &["-t", "tmpfs", "-o", "ro", "tmpfs", "/run/libvirt"],
        &["--bind", &outside, "/run/libvirt"],
    ];
    for mount in mounts {
        let host = Host::new();
        let status = host.namespace.command("mount").args(mount).status();
        assert!(status.expect("run mount").success());
        let (daemon, socket) = host.start_activated();
        let disk = host.disk("disk");
        let mut owner = Owner::register(&socket, "owner", OnTerm::Die);
        owner.call(&acquire("", &disk, 0)).expect_ok();
        assert!(!host.path(LEDGER).exists());
        let log = daemon.stderr();
        assert!(log.contains("a ledger that has no name"), "{log}");
        upgrade(&daemon);
        host.assert_held(&disk);
        assert!(owner.is_alive());
    }
}

#[test]
fn a_run_directory_that_is_full_keeps_nobody_from_a_lock_and_leaves_no_ledger_that_lies() {
    let Some(scene) = Scene::new() else {
        return;
    };
    drop(scene);
    let host = Host::new();
    let status = host
        .namespace
        .command("mount")
        .args(["-t", "tmpfs", "-o", "size=200k", "tmpfs", "/run/libvirt"])
        .status();
    assert!(status.expect("run mount").success());
    let mut daemon = host.start(&[], &[]);
    let ledger = host.path(LEDGER);
    wait_until(DEADLINE, "the ledger to be there", || ledger.exists());
    // Whatever is left of it.
    let _ = std::fs::write(host.path("/run/libvirt/filler"), vec![1; 1 << 20]);
    let disk = host.disk("disk");
    let mut owner = Owner::register(daemon.lock_socket(), "owner", OnTerm::Die);
    let mut count = 0;
    while ledger.exists() {
        owner.call(&acquire("", &disk, SHARED)).expect_ok();
        count += 1;
        assert!(count < 20_000, "the ledger does not grow");
    }
    owner.call(&acquire("", &disk, SHARED)).expect_ok();
    assert!(
        daemon.stderr().contains("cannot grow"),
        "{}",
        daemon.stderr()
    );
    upgrade(&daemon);
    assert!(owner.is_alive());
    // With room it has its name again at the next renewal.
    std::fs::remove_file(host.path("/run/libvirt/filler")).expect("make room");
    let status = host
        .namespace
        .command("mount")
        .args(["-o", "remount,size=8m", "/run/libvirt"])
        .status();
    assert!(status.expect("run mount").success());
    upgrade(&daemon);
    assert!(ledger.exists());
    daemon.kill();
    let daemon = host.start(&[], &[]);
    assert!(daemon.stderr().contains(AGAIN));
    assert!(lock_probe(&host.path(&disk)).is_some());
}

#[test]
fn a_ledger_that_could_only_be_shorter_keeps_its_name_where_there_is_no_room() {
    let Some(scene) = Scene::new() else {
        return;
    };
    drop(scene);
    let host = Host::new();
    let status = host
        .namespace
        .command("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs", "/run/libvirt"])
        .status();
    assert!(status.expect("run mount").success());
    let mut daemon = host.start(&[], &[]);
    let ledger = host.path(LEDGER);
    let disk = host.disk("disk");
    let mut owner = Owner::register(daemon.lock_socket(), "owner", OnTerm::Die);
    // Each holding is an event of its own, however often the ledger is written anew: until it has been once,
    // and then until there is no room to do it again, neither in front of what counts nor behind it.
    let mut acquire_one = || owner.call(&acquire("", &disk, SHARED)).expect_ok();
    while std::fs::metadata(&ledger).map_or(0, |it| it.len()) <= 128 << 10 {
        acquire_one();
    }
    (0..800).for_each(|_| acquire_one());
    let _ = std::fs::write(host.path("/run/libvirt/filler"), vec![1; 1 << 20]);
    let reactor = daemon.reactor();
    let signalled = nix::unistd::Pid::from_raw(reactor);
    nix::sys::signal::kill(signalled, Signal::SIGKILL).expect("kill the process that serves");
    wait_until(DEADLINE, "another process that serves", || {
        ![reactor, daemon.pid()].contains(&daemon.reactor())
    });
    // There is room for this: nothing is written behind it.
    owner.call(&release("", &disk)).expect_ok();
    daemon.wait_until_asleep();
    assert!(ledger.exists(), "{}", daemon.stderr());
    daemon.kill();
    let daemon = host.start(&[], &[]);
    assert!(daemon.stderr().contains(AGAIN), "{}", daemon.stderr());
    assert!(owner.is_alive());
    assert!(lock_probe(&host.path(&disk)).is_some());
}

#[test]
fn an_upgrade_goes_on_with_the_same_ledger_and_the_next_cold_start_knows_what_came_after() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [before, after] = ["before", "after"].map(|name| scene.host.disk(name));
    let mut owner = scene.owner("owner", &[("", &before, 0)]);
    let inode = |scene: &Scene| std::fs::metadata(scene.ledger()).expect("a ledger").ino();
    let first = inode(&scene);
    upgrade(&scene.daemon);
    assert_eq!(inode(&scene), first);
    owner.call(&acquire("", &after, 0)).expect_ok();
    owner.call(&release("", &before)).expect_ok();
    scene.cold_start();
    assert_eq!(
        (scene.lock(&before), scene.lock(&after)),
        (None, Some(true))
    );
    upgrade(&scene.daemon);
    assert_eq!(
        (scene.lock(&before), scene.lock(&after)),
        (None, Some(true))
    );
    assert!(owner.is_alive());
    scene.cold_start();
    assert_eq!(scene.lock(&after), Some(true));
    assert!(owner.is_alive());
}

#[test]
fn a_program_that_writes_no_such_ledger_leaves_none_that_is_believed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let Some(libvirts) = c_daemon() else {
        return skip("libvirt's daemon is not installed");
    };
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    // One that cannot take over changes nothing.
    scene.host.install_script("exit 1");
    refused_upgrade(&scene.daemon);
    assert!(scene.ledger().exists());
    scene.host.install(&libvirts);
    upgrade(&scene.daemon);
    wait_until(DEADLINE, "the understudy to end", || {
        !scene.ledger().exists()
    });
    // And back: its POSIX locks are in a ledger with a name again, and are taken again as locks of our kind.
    scene.host.install(&program());
    upgrade(&scene.daemon);
    scene.wait_for_ledger();
    scene.daemon.wait_until_asleep();
    scene.cold_start();
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
    // Also of what libvirt's daemon had is known which process it is: its death is noticed.
    owner.kill();
    owner.wait_end();
    scene.host.wait_free(&disk);
}

#[test]
fn an_exec_that_fails_leaves_a_ledger_that_is_true() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    // It says that it is libvirt's when it is asked, and cannot be executed afterwards.
    scene.host.install_script(
        "case $1 in --version) rm -f /run/interpreter.sh; echo 'virtlockd (libvirt) 11.3.0';; esac",
    );
    let program = scene.host.path("/run/programs/virtlockd");
    let script = std::fs::read_to_string(&program).expect("read the script");
    let interpreter = scene.host.path("/run/interpreter.sh");
    std::fs::copy("/bin/sh", &interpreter).expect("make an interpreter");
    std::fs::write(
        &program,
        script.replace("#!/bin/sh", "#!/run/interpreter.sh"),
    )
    .expect("write the script");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    refused_upgrade(&scene.daemon);
    scene.wait_for_ledger();
    scene.cold_start_with_our_program();
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
}

#[test]
fn a_start_that_is_killed_at_any_moment_leaves_what_it_found() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disks: Vec<String> = (0..60)
        .map(|it| scene.host.disk(&format!("disk{it}")))
        .collect();
    let mut owners: Vec<Owner> = disks
        .chunks(10)
        .map(|some| {
            let calls: Vec<(&str, &str, u32)> =
                some.iter().map(|disk| ("", disk.as_str(), 0)).collect();
            scene.owner("owner", &calls)
        })
        .collect();
    scene.kill();
    let start = Instant::now();
    let mut delay = 0;
    while delay < 60_000 && start.elapsed() < DEADLINE {
        let mut daemon = Daemon::spawn(
            std::path::Path::new(support::upgrade::PROGRAM),
            &scene.host.namespace,
            &[],
            &[],
        );
        let kill_at = Instant::now() + std::time::Duration::from_micros(delay);
        while Instant::now() < kill_at {
            std::hint::spin_loop();
        }
        daemon.kill();
        assert!(scene.ledger().exists());
        delay += 700;
    }
    scene.start();
    scene.assert_logged("60 locks of 6 owners were taken again");
    for disk in &disks {
        assert_eq!(scene.lock(disk), Some(true), "{disk}");
    }
    assert!(owners.iter_mut().all(Owner::is_alive));
}

impl Scene {
    /// As [`Scene::cold_start`], with our program in its place again.
    fn cold_start_with_our_program(&mut self) {
        self.kill();
        self.host.install(&program());
        self.start();
    }
}
