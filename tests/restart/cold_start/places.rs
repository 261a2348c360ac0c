//! Where the ledger is, who else has to do with its file, and what it is when it could not be written.

use super::*;
use crate::support::daemon::Main;
use crate::support::upgrade::PROGRAM;
use std::path::Path;

/// An ordinary user.
const USER: u32 = support::owner::NOBODY;
const NO_NAME: &str = "a ledger that has no name";

/// A directory in memory that everybody reaches, removed when dropped.
struct UsersDirectory(PathBuf);

impl UsersDirectory {
    fn new() -> Option<UsersDirectory> {
        let memory = Path::new("/dev/shm");
        let found = nix::sys::statfs::statfs(memory).ok()?;
        if found.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC {
            return None;
        }
        let path = memory.join(format!("virtlockd-test-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("make a directory");
        std::os::unix::fs::chown(&path, Some(USER), Some(USER)).expect("give it to the user");
        Some(UsersDirectory(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Starts a daemon of the user's, who has this run directory.
    fn start(&self, host: &Host) -> Daemon {
        let user = format!("--reuid={USER}");
        let group = format!("--regid={USER}");
        let variable = format!("XDG_RUNTIME_DIR={}", self.0.display());
        let words = [
            &user,
            &group,
            "--clear-groups",
            "env",
            "HOME=/nowhere",
            &variable,
            "LIBVIRT_LOG_OUTPUTS=2:stderr",
            PROGRAM,
        ];
        let mut daemon = Daemon::spawn(Path::new("setpriv"), &host.namespace, &words, &[]);
        daemon.wait_for_socket(&self.path("libvirt/virtlockd-sock"));
        daemon.wait_until_asleep();
        daemon
    }

    /// An owner with a disk, a process of the user's.
    fn owner(&self, disk: &Path) -> Owner {
        let mut owner = Owner::connect(&self.path("libvirt/virtlockd-sock"), OnTerm::Die);
        owner.become_nobody();
        owner.connect_again();
        let pid = owner.pid();
        owner.call(&register_as("domain", pid)).expect_ok();
        let disk = disk.to_str().expect("a path");
        owner.call(&acquire("", disk, 0)).expect_ok();
        owner
    }
}

impl Drop for UsersDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_user_s_daemon_that_was_killed_has_every_lock_again() {
    if !support::require_root() {
        return;
    }
    if !Path::new("/usr/bin/setpriv").exists() {
        return skip("needs setpriv (tests/run installs it with util-linux)");
    }
    let Some(directory) = UsersDirectory::new() else {
        return skip("needs a tmpfs on /dev/shm");
    };
    let host = Host::new();
    // The place where the program was built may be closed to other users.
    host.install_copy(&program());
    let disks = ["robbed", "kept"].map(|name| directory.path(name));
    for disk in &disks {
        std::fs::write(disk, "").expect("make a disk");
        std::os::unix::fs::chown(disk, Some(USER), Some(USER)).expect("give it to the user");
    }
    let [robbed, kept] = &disks;
    let mut daemon = directory.start(&host);
    let ledger = directory.path("libvirt/virtlockd-ledger");
    let found = std::fs::metadata(&ledger).expect("the ledger is in the run directory");
    assert_eq!((found.uid(), found.mode() & 0o777), (USER, 0o600));
    let (mut victim, mut other) = (directory.owner(robbed), directory.owner(kept));
    daemon.kill();
    daemon = directory.start(&host);
    let log = daemon.stderr();
    assert!(
        log.contains("2 locks of 2 owners were taken again"),
        "{log}"
    );
    let is_locked = |disk| lock_probe(disk).is_some_and(|seen| seen.exclusive);
    assert!(is_locked(robbed) && is_locked(kept));
    daemon.kill();
    let _thief = support::foreign_lock(robbed, true);
    daemon = directory.start(&host);
    assert_eq!(victim.wait_signal(), Some(Signal::SIGTERM as i32));
    assert!(other.is_alive() && is_locked(kept));
    assert!(daemon.stop().success());
    assert!(!ledger.exists());
}

#[test]
fn by_a_ledger_that_could_not_be_written_nobody_is_fenced_for_what_it_may_have_given_back() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [given, kept] = ["given", "kept"].map(|name| scene.host.disk(name));
    let mut owner = scene.owner("owner", &[("", &given, 0), ("", &kept, 0)]);
    scene.kill();
    // It is noted where the checksum of a closed one is.
    let mut content = std::fs::read(scene.ledger()).expect("read the ledger");
    assert_eq!((content[12], content[24]), (0, 0));
    content[24] = 1;
    std::fs::write(scene.ledger(), content).expect("change it");
    let _rightful = support::foreign_lock(&scene.host.path(&given), true);
    scene.start();
    scene.assert_logged("could not be written for a while");
    scene.assert_logged("had perhaps given it back");
    assert!(!scene.logged("is sent SIGTERM"));
    assert!(owner.is_alive());
    assert_eq!(scene.lock(&kept), Some(true));
    // The next one says what is.
    scene.cold_start();
    assert!(!scene.logged("could not be written for a while"));
    assert_eq!(scene.lock(&kept), Some(true));
}

#[test]
fn a_ledger_that_somebody_else_has_locked_is_reported_and_never_replaced_by_another() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    scene.kill();
    let inode = |scene: &Scene| {
        std::fs::metadata(scene.ledger())
            .expect("it is there")
            .ino()
    };
    let before = inode(&scene);
    let stranger = support::foreign_lock(&scene.ledger(), true);
    scene.start();
    scene.assert_logged("is another process's");
    scene.assert_logged(NO_NAME);
    assert_eq!(inode(&scene), before);
    // Whoever had it is gone, and nobody has read it.
    drop(stranger);
    upgrade(&scene.daemon);
    scene.daemon.wait_until_asleep();
    assert_eq!(inode(&scene), before);
    scene.cold_start();
    scene.assert_logged("1 locks of 1 owners were taken again");
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
}

#[test]
fn a_run_directory_on_a_disk_is_said_once() {
    let Some(scene) = Scene::new() else {
        return;
    };
    drop(scene);
    let disk_file_system = TempDir::new();
    let outside = disk_file_system.path().display().to_string();
    let host = Host::new();
    let mount = host
        .namespace
        .command("mount")
        .args(["--bind", &outside, "/run/libvirt"])
        .status();
    assert!(mount.expect("run mount").success());
    let (daemon, _) = host.start_activated();
    let said = |daemon: &Daemon| daemon.stderr().matches(NO_NAME).count();
    wait_until(DEADLINE, "it to be said", || said(&daemon) == 1);
    let log = daemon.stderr();
    assert!(log.contains("is not in memory (tmpfs)"), "{log}");
    upgrade(&daemon);
    daemon.wait_until_asleep();
    let reactor = Main::of(daemon.reactor()).expect("it serves");
    reactor.signal(Signal::SIGKILL);
    wait_until(DEADLINE, "another process that serves", || {
        ![reactor.pid, daemon.pid()].contains(&daemon.reactor())
    });
    daemon.wait_until_asleep();
    assert_eq!(said(&daemon), 1, "{}", daemon.stderr());
}

#[test]
fn without_any_ledger_the_daemon_serves_and_an_upgrade_takes_no_lock_along() {
    let Some(scene) = Scene::new() else {
        return;
    };
    drop(scene);
    let Some(libvirts) = c_daemon() else {
        return skip("libvirt's daemon is not installed");
    };
    let disk_file_system = TempDir::new();
    let outside = disk_file_system.path().display().to_string();
    let host = Host::new();
    let mount = host
        .namespace
        .command("mount")
        .args(["--bind", &outside, "/run/libvirt"])
        .status();
    assert!(mount.expect("run mount").success());
    // A policy that refuses memory files.
    let script = format!(
        "import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, {}), (0x06, 0, 0, 0x50000 | 13), (0x06, 0, 0, 0x7fff0000)]
code = b''.join(struct.pack('HBBI', *one) for one in code)
text = ctypes.create_string_buffer(code)
program = struct.pack('HxxxxxxQ', len(code) // 8, ctypes.addressof(text))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])",
        libc::SYS_memfd_create
    );
    let words = ["-c", &script, PROGRAM];
    let log = [("LIBVIRT_DEBUG", "2"), ("LIBVIRT_LOG_OUTPUTS", "2:stderr")];
    let python = Path::new("/usr/bin/python3");
    let mut daemon = Daemon::spawn(python, &host.namespace, &words, &log);
    let socket = daemon.lock_socket().to_owned();
    daemon.wait_for_socket(&socket);
    let disk = host.disk("disk");
    let mut owner = host.guest(&daemon, "owner", &disk);
    let log = daemon.stderr();
    assert!(log.contains("without a guardian"), "{log}");
    assert!(log.contains("SIGUSR1 is refused"), "{log}");
    for _ in 0..2 {
        refused_upgrade(&daemon);
        host.assert_held(&disk);
    }
    host.install(&libvirts);
    upgrade(&daemon);
    host.assert_held(&disk);
    owner.call(&release("", &disk)).expect_ok();
    host.assert_free(&disk);
}

#[test]
fn after_a_successor_that_did_not_serve_the_ledger_says_what_is_then() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let [before, after] = ["before", "after"].map(|name| scene.host.disk(name));
    let mut owner = scene.owner("owner", &[("", &before, 0)]);
    let says = "echo 'x (virtlockd-rs) 0.0.1'; \
                echo 'ledger readable: 1 connections, 1 locks; its understudy is dismissed'";
    let script = format!("if [ \"$1\" = --version ]; then {says}; exit 0; fi; exit 3");
    scene.host.install_script(&script);
    scene.daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the understudy to go on", || {
        scene.logged("ended before it served")
    });
    owner.call(&acquire("", &after, 0)).expect_ok();
    owner.call(&release("", &before)).expect_ok();
    let pid = std::fs::read_to_string(scene.host.path("/run/virtlockd.pid")).expect("its number");
    let main = Main::of(pid.trim().parse().expect("a number"));
    main.expect("it runs").kill_all();
    scene.cold_start_with_our_program();
    assert_eq!(
        (scene.lock(&before), scene.lock(&after)),
        (None, Some(true))
    );
    assert!(owner.is_alive());
}

/// Everything that runs in the namespace of a host, but for its holder.
fn processes_in(host: &Host) -> Vec<i32> {
    let space = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let holder = host.namespace.holder_pid().to_string();
    let own = space(&holder).expect("the holder's namespace");
    let numbers = std::fs::read_dir("/proc").expect("list the processes");
    let numbers = numbers.filter_map(|it| it.ok()?.file_name().into_string().ok());
    let inside = numbers.filter(|pid| *pid != holder && space(pid).as_ref() == Some(&own));
    inside.filter_map(|pid| pid.parse().ok()).collect()
}

#[test]
fn until_libvirts_daemon_serves_the_ledger_is_there_and_not_from_then_on() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let Some(libvirts) = c_daemon() else {
        return skip("libvirt's daemon is not installed");
    };
    let disk = scene.host.disk("disk");
    let mut owner = scene.owner("owner", &[("", &disk, 0)]);
    // It is taken for libvirt's, and does nothing.
    let says = "if [ \"$1\" = --version ]; then echo 'virtlockd (libvirt) 11.3.0'; exit 0; fi";
    scene
        .host
        .install_script(&format!("{says}; exec sleep 1000"));
    let inode = |scene: &Scene| {
        std::fs::metadata(scene.ledger())
            .expect("it is there")
            .ino()
    };
    let before = inode(&scene);
    let first = support::upgrade::image(scene.daemon.pid());
    scene.daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the successor to be executed", || {
        support::upgrade::image(scene.daemon.pid()) != first
    });
    assert_eq!(inode(&scene), before);
    // In that moment everything dies, the understudy too.
    let all: Vec<Main> = processes_in(&scene.host)
        .into_iter()
        .filter_map(Main::of)
        .collect();
    assert!(all.len() >= 2, "the successor and the understudy");
    all.iter().for_each(|one| one.signal(Signal::SIGSTOP));
    all.iter().for_each(|one| one.signal(Signal::SIGKILL));
    wait_until(DEADLINE, "all to be dead", || scene.lock(&disk).is_none());
    scene.cold_start_with_our_program();
    scene.assert_logged("1 locks of 1 owners were taken again");
    assert_eq!(scene.lock(&disk), Some(true));
    // One that ends is followed by the understudy, and the ledger is the same.
    let before = inode(&scene);
    scene.host.install_script(&format!("{says}; exit 3"));
    let main = scene.daemon.pid();
    scene.daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the understudy to go on", || {
        scene.logged("ended before it served")
    });
    assert_eq!(inode(&scene), before);
    let pid = std::fs::read_to_string(scene.host.path("/run/virtlockd.pid")).expect("its number");
    let pid = pid.trim().parse().expect("a number");
    assert_ne!(pid, main);
    let understudy = Main::of(pid).expect("it runs");
    scene.host.install(&libvirts);
    understudy.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the ledger to be gone", || {
        !scene.ledger().exists()
    });
    assert_eq!(scene.lock(&disk), Some(true));
    assert!(owner.is_alive());
    understudy.kill_all();
}
