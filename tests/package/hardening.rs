//! The daemon's units leave it little more than it needs: systemd's own score of them, which is 9.4 for the unit
//! of libvirt's daemon. And everything works all the same: here what the restrictions come near to, with our
//! daemon and with libvirt's as its successor; the rest in `tests/restart/systemd.rs` and in the tests of the
//! packages, which run under these units.

use crate::support::client::{AUTOCREATE, acquire, create_lockspace, release};
use crate::support::daemon::{c_daemon, program};
use crate::support::systemd::{SERVICE, Systemd, Units};
use crate::support::{DEADLINE, TempDir, install_program, lock_probe, skip, wait_until};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// What systemd may give at most, in tenths.
const LIMIT: &str = "25";

fn dist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist")
}

/// systemd's verdict on the unit in this folder: whether it is within the limit, and why not.
fn verdict(folder: &Path) -> Option<(bool, String)> {
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold", LIMIT])
        .arg(folder.join("virtlockd.service"))
        .env("SYSTEMD_UNIT_PATH", folder)
        .stdin(Stdio::null())
        .output();
    let Ok(output) = output else {
        skip("needs systemd-analyze (tests/run installs it)");
        return None;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("Overall exposure level"), "{said}");
    let against: Vec<&str> = said
        .lines()
        .filter(|line| !line.starts_with('\u{2713}'))
        .collect();
    Some((output.status.success(), against.join("\n")))
}

/// The settings that restrict, as they stand in a file.
fn restrictions(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(dist().join(file)).expect("read a unit");
    let begins = [
        "Capability",
        "Device",
        "Restrict",
        "IPAddress",
        "Private",
        "SystemCall",
        "Lock",
    ];
    let more = ["Memory", "Protect", "UMask", "NoNew"];
    let lines = text.lines().filter(|line| {
        let mut names = begins.iter().chain(&more);
        names.any(|name| line.starts_with(name))
    });
    lines.map(str::to_owned).collect()
}

#[test]
fn our_unit_scores_at_most_2_5() {
    let Some((is_within, why)) = verdict(&dist()) else {
        return;
    };
    assert!(is_within, "{why}");
}

#[test]
fn libvirts_unit_scores_at_most_2_5_with_our_drop_in_and_not_without() {
    let theirs = Path::new("/usr/lib/systemd/system/virtlockd.service");
    let Ok(unit) = std::fs::read_to_string(theirs) else {
        return skip("needs libvirt's units (tests/run installs them)");
    };
    let folder = TempDir::new();
    std::fs::write(folder.path().join("virtlockd.service"), unit).expect("copy the unit");
    let Some((is_within, _)) = verdict(folder.path()) else {
        return;
    };
    assert!(!is_within, "libvirt's own unit restricts by now");
    let drop_ins = folder.path().join("virtlockd.service.d");
    std::fs::create_dir(&drop_ins).expect("make a folder");
    std::fs::copy(
        dist().join("drop-in/virtlockd.service.conf"),
        drop_ins.join("ours.conf"),
    )
    .expect("copy ours");
    let (is_within, why) = verdict(folder.path()).expect("it was there before");
    assert!(is_within, "{why}");
}

#[test]
fn the_unit_and_the_drop_in_restrict_the_same() {
    let unit = restrictions("virtlockd.service");
    assert_eq!(unit, restrictions("drop-in/virtlockd.service.conf"));
    assert!(unit.len() > 15);
}

/// A block device of this machine that is a file of nothing.
struct Loop {
    device: String,
    _file: TempDir,
}

impl Loop {
    fn new() -> Option<Loop> {
        let folder = TempDir::new();
        let path = folder.path().join("blocks");
        let file = std::fs::File::create_new(&path).expect("make a file");
        file.set_len(1 << 20).expect("give it its size");
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&path)
            .output();
        let output = output.expect("run losetup");
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            skip(&format!("needs a loop device: {said}"));
            return None;
        }
        let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Some(Loop {
            device,
            _file: folder,
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", &self.device])
            .status();
    }
}

/// Whether the daemon does what the restrictions come near to.
#[track_caller]
fn does_everything(systemd: &Systemd, block_device: &str, round: u32) {
    // Disks and lockspaces anywhere, also where root has no right but by its capabilities.
    let mut owner = systemd.owner("owner");
    for folder in [
        "/home",
        "/tmp",
        "/root",
        "/var/lib",
        "/opt",
        "/usr/local",
        "/etc",
        "/boot",
    ] {
        let folder = format!("{folder}/virtlockd-{round}");
        std::fs::create_dir_all(systemd.path(&folder)).expect("make a folder");
        let disk = format!("{folder}/disk");
        std::fs::write(systemd.path(&disk), "data").expect("make a disk");
        for path in [&disk, &folder] {
            let script = format!("chown 65534:65534 {path} && chmod u=rwX,go= {path}");
            let changed = systemd.command("sh").args(["-c", &script]).status();
            assert!(changed.expect("run a shell").success());
        }
        owner.call(&acquire("", &disk, 0)).expect_ok();
        assert!(lock_probe(&systemd.path(&disk)).is_some(), "{disk}");
        let lockspace = format!("{folder}/lockspace");
        owner.call(&create_lockspace(&lockspace)).expect_ok();
        owner
            .call(&acquire(&lockspace, "lease", AUTOCREATE))
            .expect_ok();
        owner.call(&release(&lockspace, "lease")).expect_ok();
    }
    // A block device.
    owner.call(&acquire("", block_device, 0)).expect_ok();
    owner.call(&release("", block_device)).expect_ok();
    // Who leaves with locks is killed, whoever it is.
    let mut leaver = systemd.owner("leaver");
    let disk = format!("/tmp/virtlockd-left-{round}");
    std::fs::write(systemd.path(&disk), "data").expect("make a disk");
    leaver.call(&acquire("", &disk, 0)).expect_ok();
    leaver.become_nobody();
    leaver.close_connection();
    leaver.wait_signal().expect("it was killed");
    wait_until(DEADLINE, "the lock to be free", || {
        lock_probe(&systemd.path(&disk)).is_none()
    });
}

#[test]
fn everything_works_under_the_unit_for_our_daemon_and_for_libvirts_behind_it() {
    let Some(libvirts) = c_daemon() else {
        return skip("needs libvirt's virtlockd (tests/run installs it)");
    };
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        let Some(systemd) = Systemd::start(units, &program()) else {
            return;
        };
        let Some(block) = Loop::new() else { return };
        systemd.ctl(&["start", SERVICE]);
        let main = systemd.main_pid();
        // The restrictions are there: no capability to administer the host, and a filter of calls.
        let status = std::fs::read_to_string(format!("/proc/{main}/status"));
        let status = status.expect("the daemon runs");
        let line = |name: &str| {
            let mut lines = status.lines();
            lines
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        assert_eq!(line("Seccomp:"), Some("2"));
        assert_eq!(line("CapBnd:"), Some("000000000008002e"));
        does_everything(&systemd, &block.device, 0);
        for (round, program) in [(1, &program()), (2, &libvirts), (3, &program())] {
            let mut guest = systemd.owner("guest");
            let disk = format!("/run/disk-{round}");
            std::fs::write(systemd.path(&disk), "data").expect("make a disk");
            guest.call(&acquire("", &disk, 0)).expect_ok();
            let new = systemd.path("/usr/sbin/new");
            install_program(program, &new);
            std::fs::rename(new, systemd.path("/usr/sbin/virtlockd"))
                .expect("put the program in place");
            systemd.ctl(&["reload", SERVICE]);
            let in_place = systemd.path("/usr/sbin/virtlockd");
            wait_until(DEADLINE, "the successor", || {
                same_file(&format!("/proc/{main}/exe"), &in_place)
            });
            guest.call(&acquire("", &disk, 0)).expect_error(87, 51);
            assert!(guest.is_alive());
            does_everything(&systemd, &block.device, round);
            assert_eq!(systemd.main_pid(), main);
        }
    }
}

fn same_file(one: &str, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let number = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    let one = number(Path::new(one));
    one.is_some() && one == number(other)
}

/// A share whose server never says a word, mounted at this folder: it hangs as long as the descriptor is open.
/// `None`, with a skip, where that cannot be.
fn hanging_share(systemd: &Systemd, folder: &str) -> Option<std::fs::File> {
    let open = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    let Ok(device) = open else {
        skip("needs /dev/fuse");
        return None;
    };
    std::fs::create_dir_all(systemd.path(folder)).expect("make a folder");
    let mounted = systemd
        .command("mount")
        .args(["-i", "-t", "fuse", "-o"])
        .arg("fd=0,rootmode=40000,user_id=0,group_id=0,allow_other")
        .args(["share", folder])
        .stdin(Stdio::from(device.try_clone().expect("copy /dev/fuse")))
        .output()
        .expect("run mount");
    if !mounted.status.success() {
        let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
        skip(&format!("needs to mount a FUSE file system: {said}"));
        return None;
    }
    let mut hangs = systemd.command("timeout");
    let hangs = hangs.args(["--signal=KILL", "1", "ls", folder]).output();
    assert!(
        !hangs.expect("run ls").status.success(),
        "the share does not hang"
    );
    Some(device)
}

/// Some of the settings give the daemon a mount namespace, for which systemd goes through all mounts before it
/// executes the program: where it waited for one of them, no daemon would start as long as that hangs.
#[test]
fn a_share_that_hangs_holds_no_start_up() {
    for units in [Units::Ours, Units::LibvirtsWithOurs] {
        let Some(systemd) = Systemd::start(units, &program()) else {
            return;
        };
        // As systemd itself does on a host, and not in what it takes for a container.
        let shared = systemd
            .command("mount")
            .args(["--make-rshared", "/"])
            .status();
        assert!(shared.expect("run mount").success());
        let Some(before) = hanging_share(&systemd, "/srv/before") else {
            return;
        };
        let starts_in_time = |how: &str| {
            let asked = std::time::Instant::now();
            systemd.ctl(&[how, SERVICE]);
            assert!(asked.elapsed() < Duration::from_secs(10), "{how}");
            let mut owner = systemd.owner("owner");
            std::fs::write(systemd.path("/run/disk"), "data").expect("make a disk");
            owner.call(&acquire("", "/run/disk", 0)).expect_ok();
            owner.call(&release("", "/run/disk")).expect_ok();
        };
        let of_daemon = |file: &str| {
            let path = format!("/proc/{}/{file}", systemd.main_pid());
            std::fs::read_to_string(path).expect("the daemon runs")
        };
        starts_in_time("start");
        // It has a mount namespace of its own, and both shares in it: the one that was there before, and one that
        // is mounted while it runs.
        let namespace = |of: &str| std::fs::read_link(format!("{of}/ns/mnt")).expect("a process");
        let outside = systemd.path("/proc/1");
        let main = format!("/proc/{}", systemd.main_pid());
        assert_ne!(namespace(&main), namespace(outside.to_str().expect("text")));
        assert!(of_daemon("mountinfo").contains(" /srv/before "));
        let Some(while_it_runs) = hanging_share(&systemd, "/srv/later") else {
            return;
        };
        assert!(of_daemon("mountinfo").contains(" /srv/later "));
        starts_in_time("restart");
        systemd.ctl(&["kill", "-s", "KILL", SERVICE]);
        wait_until(DEADLINE, "the unit to be started again", || {
            systemd.property("NRestarts") == "1" && systemd.property("ActiveState") == "active"
        });
        systemd.ctl(&["stop", SERVICE]);
        starts_in_time("start");
        drop((before, while_it_runs));
    }
}
