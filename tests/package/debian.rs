//! The Debian packages, installed, upgraded, reinstalled, interrupted, removed and purged by the real dpkg on a
//! running host: guests live through all of it, nobody else ever has one of their locks, and a program is in its
//! place at every moment.

use super::host::{Host, LIBVIRTS_PROGRAM, PROGRAM};
use crate::support::client::{Call, Client, acquire};
use crate::support::daemon::{LOCK_SOCKET, program};
use crate::support::owner::Owner;
use crate::support::packages::{self, OURS, Packages, STANDALONE};
use crate::support::systemd::SERVICE;
use crate::support::{DEADLINE, TempDir, lock_probe, skip, wait_for, wait_until};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn the_package_takes_a_running_host_over_and_gives_it_back_as_it_was() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, _) = packages::ours();
    let before = host.files();
    for _ in 0..2 {
        let said = host.with_ours("--install", ours).well();
        assert!(said.contains("with every lock and connection"), "{said}");
        // Its environment is that of libvirt's daemon, which knows of no store.
        assert!(said.contains("a stop of it ends the machines"), "{said}");
        host.is_ours();
        host.all_is_well();
        assert_eq!(host.status(OURS), "ii");
        host.dpkg(&["--verify", OURS]).well();
        // systemd has read the drop-ins: it keeps a unit that is two processes.
        assert_eq!(host.systemd.property("ExitType"), "cgroup");
        // And knows already what has to end before the daemon.
        wait_until(DEADLINE, "the order of a shutdown to be there", || {
            host.order_of_shutdown() == "active"
        });
        let said = host.dpkg(&["--remove", OURS]).well();
        assert!(said.contains("with every lock and connection"), "{said}");
        host.is_libvirts();
        host.all_is_well();
        assert_eq!(host.systemd.property("ExitType"), "main");
        wait_until(DEADLINE, "the order of a shutdown to be gone", || {
            host.order_of_shutdown() == "inactive"
        });
    }
    host.dpkg(&["--purge", OURS]).well();
    assert_eq!(host.diversions(), "");
    assert_eq!(host.files(), before);
    assert_eq!(host.status(OURS), "none");
    host.dpkg(&["--verify", packages::LIBVIRTS[0]]).well();
    host.all_is_well();
    host.nothing_was_lost();
}

#[test]
fn an_upgrade_a_reinstallation_and_a_downgrade_are_upgrades_in_place() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (one, next) = packages::ours();
    let mut last = host.executed();
    for version in [one, next, next, one] {
        host.with_ours("--install", version).well();
        host.is_ours();
        host.all_is_well();
        assert_ne!(host.executed(), last);
        last = host.executed();
    }
    host.dpkg(&["--purge", OURS]).well();
    host.is_libvirts();
    host.all_is_well();
    host.nothing_was_lost();
}

#[test]
fn libvirts_packages_may_be_reinstalled_and_upgraded_before_between_and_after() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, next) = packages::ours();
    host.install_libvirts("").well();
    host.all_is_well();
    // Between the two halves of an installation.
    host.with_ours("--unpack", ours).well();
    host.install_libvirts("").well();
    host.all_is_well();
    host.dpkg(&["--configure", OURS]).well();
    host.is_ours();
    // While ours is there: it stays in its place.
    for suffix in ["", "+1"] {
        let program = host.file(PROGRAM);
        let libvirts = host.file(LIBVIRTS_PROGRAM);
        host.install_libvirts(suffix).well();
        assert_eq!(host.file(PROGRAM), program);
        assert_ne!(host.file(LIBVIRTS_PROGRAM), libvirts);
        host.is_ours();
        host.all_is_well();
    }
    host.with_ours("--install", next).well();
    host.install_libvirts("+2").well();
    host.is_ours();
    // What comes back is the newest of theirs.
    let newest = host.file(LIBVIRTS_PROGRAM);
    host.dpkg(&["--remove", OURS]).well();
    assert_eq!(host.file(PROGRAM), newest);
    host.is_libvirts();
    host.install_libvirts("+3").well();
    host.all_is_well();
    host.dpkg(&["--verify", packages::LIBVIRTS[0]]).well();
    host.nothing_was_lost();
}

#[test]
fn a_process_of_the_daemons_that_hangs_does_not_hold_an_upgrade_up() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (one, next) = packages::ours();
    host.with_ours("--install", one).well();
    // What works for the daemon has a name of its own, and may hang as long as a share: here it is another daemon,
    // which executes the same file.
    let script = "
        set -e
        ln /usr/sbin/virtlockd /usr/sbin/virtlockd-works
        mkdir -m 0700 /run/nobody
        chown 65534:65534 /run/nobody
        echo $$ >/sys/fs/cgroup$(sed -n s/^0:://p /proc/$1/cgroup)/cgroup.procs
        exec setpriv --reuid=65534 --regid=65534 --clear-groups \
            env HOME=/run/nobody XDG_RUNTIME_DIR=/run/nobody /usr/sbin/virtlockd-works";
    let main = host.systemd.property("MainPID");
    let mut command = host.systemd.command("sh");
    let started = command.args(["-c", script, "sh", &main]).spawn();
    let mut started = started.expect("start a process");
    let works = |host: &Host| host.run(&["pgrep", "-x", "virtlockd-works"]).succeeded;
    wait_until(DEADLINE, "it to execute the same file", || works(&host));
    let before = host.executed();
    let said = host.with_ours("--install", next).well();
    assert!(said.contains("with every lock and connection"), "{said}");
    assert_ne!(host.executed(), before);
    assert!(works(&host));
    host.all_is_well();
    host.nothing_was_lost();
    started.wait().expect("it ended with the host");
}

/// Starts dpkg, and kills it with all that it has started at one moment.
fn interrupt(host: &mut Host, words: &[&str], after: Duration) {
    let mut child = host
        .systemd
        .command("setsid")
        .args([
            "--wait",
            "sh",
            "-c",
            "echo $$ >/run/dpkg; exec dpkg \"$@\"",
            "dpkg",
        ])
        .args(["--force-unsafe-io", "--no-triggers"])
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start dpkg");
    let group = wait_for(DEADLINE, "dpkg", || {
        let group = std::fs::read_to_string(host.systemd.path("/run/dpkg")).ok()?;
        group.ends_with('\n').then(|| group.trim().to_owned())
    });
    std::thread::sleep(after);
    // It may have ended already.
    let group = format!("-{group}");
    host.run(&["/bin/kill", "-KILL", "--", &group]);
    child.wait().expect("wait for dpkg");
    std::fs::remove_file(host.systemd.path("/run/dpkg")).expect("forget it");
}

#[test]
fn an_interrupted_installation_or_removal_loses_nothing_and_can_be_finished() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, _) = packages::ours();
    let file = host.carry_in(&ours.file(OURS));
    // `VIRTLOCKD_INTERRUPTIONS` has it killed at more moments.
    let count = std::env::var("VIRTLOCKD_INTERRUPTIONS").ok();
    let count: u64 = count.map_or(8, |text| text.parse().expect("a number"));
    for step in 0..count {
        let after = Duration::from_millis(20 + step * 720 / count);
        interrupt(&mut host, &["--install", &file], after);
        host.all_is_well();
        host.dpkg(&["--install", &file]).well();
        host.is_ours();
        host.all_is_well();
        interrupt(&mut host, &["--remove", OURS], after);
        host.all_is_well();
        if step % 2 == 0 {
            // It is wanted after all.
            host.dpkg(&["--install", &file]).well();
            host.is_ours();
            host.all_is_well();
        }
        host.dpkg(&["--purge", OURS]).well();
        host.is_libvirts();
        assert_eq!(host.diversions(), "");
        host.all_is_well();
    }
    host.nothing_was_lost();
}

/// A program that cannot take over, and where it is kept.
pub fn broken_program() -> (TempDir, PathBuf) {
    let folder = TempDir::new();
    let path = folder.path().join("virtlockd");
    std::fs::write(&path, "#!/bin/sh\necho 'no libraries here' >&2\nexit 1\n")
        .expect("write a program");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&path, executable).expect("make it executable");
    (folder, path)
}

/// A guest whose name is no text.
pub fn odd_guest(host: &Host) -> Owner {
    let mut odd = host.systemd.owner("odd");
    let register = Call::Register {
        uuid: [7; 16],
        name: b"caf\xe9".to_vec(),
        id: 3,
        pid: odd.pid() as u32,
        flags: 0,
    };
    odd.call(&register).expect_ok();
    odd
}

#[test]
fn a_take_over_that_is_refused_says_why_and_how_to_go_on() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, _) = packages::ours();
    let (_folder, broken) = broken_program();
    let broken = Packages::build("1.2", &broken);
    let words = [
        "no libraries here",
        "goes on with every lock",
        "dpkg --configure virtlockd-rs",
    ];
    // Where libvirt's daemon runs, and where ours does.
    for before in ["none", "ii"] {
        host.with_ours("--install", &broken).badly(&words);
        assert_eq!(host.status(OURS), "iF");
        host.all_is_well();
        host.dpkg(&["--configure", OURS]).badly(&words);
        // A good one mends it, and so does going back.
        if before == "none" {
            host.dpkg(&["--remove", OURS]).well();
            host.is_libvirts();
            host.all_is_well();
            host.with_ours("--install", &broken).badly(&words);
        }
        host.with_ours("--install", ours).well();
        host.is_ours();
        host.all_is_well();
    }
    host.nothing_was_lost();
}

/// What the kernel says of the daemon's domain is the text of another file from here on. The place of that.
fn label(host: &Host, text: &str) -> String {
    std::fs::write(host.systemd.path("/run/label"), text).expect("write a label");
    let attribute = format!("/proc/{}/attr/current", host.systemd.property("MainPID"));
    host.run(&["mount", "--bind", "/run/label", &attribute])
        .well();
    attribute
}

#[test]
fn a_policy_that_lets_the_daemon_not_execute_the_program_is_asked_before_the_signal() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, _) = packages::ours();
    // There is no such policy here: whatever is asked then is refused.
    let label = |text: &str| label(&host, text);
    let attribute = label("virtlockd (enforce)\n");
    let words = [
        "AppArmor does not let",
        "the profile virtlockd execute",
        "goes on with every lock",
    ];
    host.with_ours("--install", ours).badly(&words);
    assert_ne!(Some(host.executed()), host.file(PROGRAM));
    host.run(&["umount", &attribute]).well();
    // One that only complains lets it.
    let attribute = label("virtlockd (complain)\n");
    host.dpkg(&["--configure", OURS]).well();
    host.is_ours();
    host.run(&["umount", &attribute]).well();
    host.all_is_well();
    host.nothing_was_lost();
}

/// What the kernel has in `/sys/fs/selinux` where there is a policy, as far as it is asked here.
const SELINUX: &str = "
    set -e
    mkdir -p /run/fs/cgroup /run/fs/selinux/class/file/perms
    mount --rbind /sys/fs/cgroup /run/fs/cgroup
    cd /run/fs/selinux
    printf 1 >enforce
    printf 6 >class/file/index
    printf 14 >class/file/perms/execute
    printf 18 >class/file/perms/execute_no_trans
    mount --rbind /run/fs /sys/fs";

#[test]
fn selinux_is_asked_whether_the_daemon_may_execute_the_program_before_the_signal() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, _) = packages::ours();
    host.run(&["sh", "-c", SELINUX]).well();
    let attribute = label(&host, "system_u:system_r:virtlogd_t:s0\0");
    // Who asks finds the answer there before the question: rights, and at the end the flags of the domain.
    let answer = |host: &Host, words: &str| {
        let path = host.systemd.path("/sys/fs/selinux/access");
        let _ = std::fs::remove_file(&path);
        host.run(&["mkfifo", "/sys/fs/selinux/access"]).well();
        let pipe = std::fs::File::options().read(true).write(true).open(path);
        let mut pipe = pipe.expect("open a pipe");
        writeln!(pipe, "{words}").expect("answer");
        pipe
    };
    let words = [
        "SELinux does not let system_u:system_r:virtlogd_t:s0 execute /usr/sbin/virtlockd",
        "restorecon -v /usr/sbin/virtlockd",
        "goes on with every lock",
    ];
    let before = host.executed();
    let _pipe = answer(&host, "0 ffffffff 0 0 1 0");
    host.with_ours("--install", ours).badly(&words);
    // To execute it and come into another domain is not enough.
    let _pipe = answer(&host, "2000 ffffffff 0 0 1 0");
    host.dpkg(&["--configure", OURS]).badly(&words);
    // Nor is an answer that says nothing.
    let _pipe = answer(&host, "");
    host.dpkg(&["--configure", OURS]).badly(&words);
    assert_eq!(host.executed(), before);
    let mut pipe = answer(&host, "22013 ffffffff 0 0 1 0");
    host.dpkg(&["--configure", OURS]).well();
    host.is_ours();
    let mut question = [0; 256];
    let length = pipe.read(&mut question).expect("the question");
    let question = String::from_utf8_lossy(&question[..length]);
    assert!(
        question.starts_with("system_u:system_r:virtlogd_t:s0 ") && question.ends_with(" 6"),
        "{question}"
    );
    host.run(&["umount", &attribute]).well();
    host.all_is_well();
    // A domain that is only complained of may do it.
    let attribute = label(&host, "system_u:system_r:virtlogd_t:s0\0");
    let _pipe = answer(&host, "0 ffffffff 0 0 1 1");
    host.with_ours("--install", packages::ours().1).well();
    host.is_ours();
    host.run(&["umount", &attribute]).well();
    host.all_is_well();
    host.nothing_was_lost();
}

#[test]
fn a_death_of_libvirts_daemon_in_the_take_over_is_not_called_a_success() {
    let Some(host) = Host::without_guests() else {
        return;
    };
    let (ours, _) = packages::ours();
    let mut guest = host.systemd.owner("guest");
    std::fs::write(host.systemd.path("/run/disk"), "data").expect("make a disk");
    guest.call(&acquire("", "/run/disk", 0)).expect_ok();
    // libvirt's daemon ends of SIGUSR1 while somebody is connected who has not said who he is.
    let _silent = Client::connect(&host.systemd.path(LOCK_SOCKET));
    let words = [
        "and ended: the locks that it had are gone",
        "Make sure that none is started twice",
    ];
    host.with_ours("--install", ours).badly(&words);
    assert!(guest.is_alive());
    assert!(lock_probe(&host.systemd.path("/run/disk")).is_none());
}

#[test]
fn a_removal_that_libvirts_daemon_cannot_follow_leaves_the_package_and_the_guests() {
    let Some(mut host) = Host::start() else {
        return;
    };
    let (ours, _) = packages::ours();
    host.with_ours("--install", ours).well();
    // Stopped: systemd has the locks, of which libvirt's daemon knows nothing. (The daemon that took over was
    // started before the unit had a store, so it is killed whole and started anew.)
    host.end_guests();
    host.systemd.ctl(&["kill", "-s", "KILL", SERVICE]);
    wait_until(DEADLINE, "the unit to be started again", || {
        host.systemd.property("NRestarts") == "1"
            && host.systemd.property("ActiveState") == "active"
    });
    let mut guest = host.systemd.owner("late");
    std::fs::write(host.systemd.path("/run/disks/late"), "data").expect("make a disk");
    guest.call(&acquire("", "/run/disks/late", 0)).expect_ok();
    host.systemd.ctl(&["stop", SERVICE]);
    assert_eq!(host.systemd.property("SubState"), "dead-resources-pinned");
    host.dpkg(&["--remove", OURS])
        .badly(&["systemctl start virtlockd", "stays installed"]);
    assert_eq!(host.systemd.property("SubState"), "dead-resources-pinned");
    // Wanted gone, and installed.
    assert_eq!(host.status(OURS), "ri");
    // An upgrade meanwhile is fine.
    host.with_ours("--install", packages::ours().1).well();
    assert_eq!(host.systemd.property("SubState"), "dead-resources-pinned");
    host.systemd.ctl(&["start", SERVICE]);
    guest
        .call(&acquire("", "/run/disks/late", 0))
        .expect_error(87, 51);
    // Nor can a name that is no text be written down for it.
    let odd = odd_guest(&host);
    host.main = host.systemd.main_pid();
    host.dpkg(&["--remove", OURS])
        .badly(&["goes on with every lock", "stays installed"]);
    assert_eq!(host.status(OURS), "ri");
    host.is_ours();
    guest
        .call(&acquire("", "/run/disks/late", 0))
        .expect_error(87, 51);
    drop(odd);
    host.dpkg(&["--remove", OURS]).well();
    host.is_libvirts();
    guest
        .call(&acquire("", "/run/disks/late", 0))
        .expect_error(87, 51);
}

#[test]
fn where_libvirts_package_is_not_there_the_other_one_brings_units_and_configuration() {
    let Some(mut host) = Host::without_libvirt() else {
        return;
    };
    let (one, next) = packages::ours();
    let file = host.carry_in(&one.file(STANDALONE));
    host.dpkg(&["--install", &file]).well();
    assert_eq!(host.systemd.property("ActiveState"), "active");
    assert!(host.systemd.path("/etc/libvirt/virtlockd.conf").exists());
    assert_eq!(host.order_of_shutdown(), "active");
    host.main = host.systemd.main_pid();
    host.has_guests();
    host.all_is_well();
    let before = host.executed();
    let file = host.carry_in(&next.file(STANDALONE));
    host.dpkg(&["--install", &file]).well();
    assert_ne!(host.executed(), before);
    host.all_is_well();
    // Its daemon has no successor.
    host.dpkg(&["--remove", STANDALONE])
        .badly(&["/run/disks/0", "--kill-whom=main -s INT"]);
    host.all_is_well();
    host.systemd.ctl(&["stop", SERVICE]);
    host.dpkg(&["--remove", STANDALONE])
        .badly(&["systemctl start virtlockd"]);
    host.systemd.ctl(&["start", SERVICE]);
    host.main = host.systemd.main_pid();
    host.all_is_well();
    host.end_guests();
    host.dpkg(&["--remove", STANDALONE]).well();
    assert_eq!(host.systemd.main_pid(), 0);
    wait_until(DEADLINE, "the order of a shutdown to be gone", || {
        host.order_of_shutdown() == "inactive"
    });
    host.dpkg(&["--purge", STANDALONE]).well();
    assert_eq!(host.status(STANDALONE), "none");
    assert!(!host.systemd.path("/etc/libvirt/virtlockd.conf").exists());
}

#[test]
fn lintian_finds_neither_errors_nor_what_it_warns_of_in_the_packages() {
    if !packages::can_run() {
        return;
    }
    if !Path::new("/usr/bin/lintian").exists() {
        return skip("needs lintian (tests/run installs it)");
    }
    let built = Packages::build_for_release(env!("CARGO_PKG_VERSION"), &program());
    let output = Command::new("lintian")
        .args(["--allow-root", "--fail-on", "error,warning"])
        .arg(built.changes())
        .stdin(Stdio::null())
        .output()
        .expect("run lintian");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
}
