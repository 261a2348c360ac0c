//! The RPM package on a running host, with rpm itself and libvirt's package as an RPM: taken over, upgraded, put
//! back in its place behind libvirt's, removed. (The host is Debian's; rpm has a database of its own there.)

use super::host::{Ended, Host, LIBVIRTS_PROGRAM, PROGRAM};
use crate::support::daemon::program;
use crate::support::{DEADLINE, TempDir, packages, skip, wait_until};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A package that has libvirt's program, as that of Fedora does.
const LIBVIRTS: &str = r#"
Name: libvirt-daemon-lock
Version: %{version_}
Release: 1
Summary: Of a test
License: LGPL-2.1-or-later
AutoReqProv: no
%global debug_package %{nil}
%global _build_id_links none
%global __os_install_post %{nil}
%description
Of a test.
%install
install -D -m 0755 /usr/sbin/virtlockd %{buildroot}/usr/sbin/virtlockd
%files
/usr/sbin/virtlockd
"#;

/// Runs a command that builds a package, and finds it in this folder.
fn build(command: &mut Command, folder: &Path) -> PathBuf {
    let output = command.stdin(Stdio::null()).output();
    let output = output.expect("build a package");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("list a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rpm") {
                return path;
            }
        }
    }
    panic!("no package was built: {said}");
}

/// Ours as this version.
pub fn ours(version: &str, folder: &TempDir) -> PathBuf {
    ours_of(version, &program(), folder)
}

/// The same with this program.
fn ours_of(version: &str, program: &Path, folder: &TempDir) -> PathBuf {
    let output = folder.path().join(format!("ours-{version}"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist/build-rpm");
    let mut command = Command::new(script);
    command
        .args(["--version", version, "--program"])
        .arg(program)
        .arg("--virtlockctl")
        .arg(packages::virtlockctl());
    build(command.arg("--output").arg(&output), &output)
}

fn libvirts(version: &str, folder: &TempDir) -> PathBuf {
    let output = folder.path().join(format!("libvirts-{version}"));
    let spec = folder.path().join("libvirts.spec");
    std::fs::write(&spec, LIBVIRTS).expect("write a spec");
    let mut command = Command::new("rpmbuild");
    command.arg("-bb").arg(&spec);
    let top = folder.path().join("top").display().to_string();
    let values = [("_topdir", &*top), ("version_", version)];
    for (name, value) in values {
        command.args(["--define", &format!("{name} {value}")]);
    }
    let to = format!("_rpmdir {}", output.display());
    build(command.args(["--define", &to]), &output)
}

impl Host {
    fn rpm(&self, words: &[&str]) -> Ended {
        let options = ["rpm", "--force-debian", "--dbpath", "/run/rpm", "--nodeps"];
        self.run(&[&options[..], words].concat())
    }
}

#[test]
fn the_rpm_takes_a_running_host_over_stays_behind_libvirts_and_gives_it_back() {
    if !Path::new("/usr/bin/rpmbuild").exists() {
        return skip("needs rpmbuild (tests/run installs it)");
    }
    if !packages::can_run() {
        return;
    }
    let folder = TempDir::new();
    let theirs = [libvirts("1", &folder), libvirts("2", &folder)];
    let packages = [ours("1.0", &folder), ours("1.1", &folder)];
    let Some(mut host) = Host::start() else {
        return;
    };
    let theirs = theirs.map(|file| host.carry_in(&file));
    let packages = packages.map(|file| host.carry_in(&file));
    // What is there is what their package would bring.
    host.rpm(&["--install", "--justdb", &theirs[0]]).well();
    host.rpm(&["--install", &packages[0]]).well();
    host.is_ours();
    host.all_is_well();
    let before = host.executed();
    host.rpm(&["--upgrade", &packages[1]]).well();
    host.is_ours();
    host.all_is_well();
    assert_ne!(host.executed(), before);
    wait_until(DEADLINE, "the order of a shutdown to be there", || {
        host.order_of_shutdown() == "active"
    });
    // Theirs goes over ours, and ours comes back behind it.
    let libvirts = host.file(LIBVIRTS_PROGRAM);
    host.rpm(&["--upgrade", &theirs[1]]).well();
    assert_ne!(host.file(LIBVIRTS_PROGRAM), libvirts);
    host.is_ours();
    host.all_is_well();
    let newest = host.file(LIBVIRTS_PROGRAM);
    host.rpm(&["--erase", "virtlockd-rs"]).well();
    assert_eq!(host.file(PROGRAM), newest);
    host.is_libvirts();
    host.all_is_well();
    assert!(host.file(LIBVIRTS_PROGRAM).is_none());
    wait_until(DEADLINE, "the order of a shutdown to be gone", || {
        host.order_of_shutdown() == "inactive"
    });
    host.nothing_was_lost();
}

#[test]
fn what_the_rpm_is_refused_it_says_and_every_lock_stays() {
    if !Path::new("/usr/bin/rpmbuild").exists() {
        return skip("needs rpmbuild (tests/run installs it)");
    }
    if !packages::can_run() {
        return;
    }
    let folder = TempDir::new();
    let (_kept, broken) = super::debian::broken_program();
    let theirs = libvirts("1", &folder);
    let packages = [
        ours_of("1.0", &broken, &folder),
        ours("1.1", &folder),
        ours_of("1.2", &broken, &folder),
        ours("1.3", &folder),
    ];
    let Some(mut host) = Host::start() else {
        return;
    };
    let theirs = host.carry_in(&theirs);
    let packages = packages.map(|file| host.carry_in(&file));
    host.rpm(&["--install", "--justdb", &theirs]).well();
    // Where libvirt's daemon runs, and where ours does.
    for (how, bad, good) in [("--install", 0, 1), ("--upgrade", 2, 3)] {
        let before = host.executed();
        let said = host.rpm(&[how, &packages[bad]]).said;
        for word in [
            "no libraries here",
            "goes on with every lock",
            "another program holds the locks",
        ] {
            assert!(said.contains(word), "{said}");
        }
        assert_eq!(host.executed(), before);
        host.all_is_well();
        host.rpm(&["--upgrade", &packages[good]]).well();
        host.is_ours();
        host.all_is_well();
    }
    // A name that is no text cannot be written down for libvirt's daemon.
    let odd = super::debian::odd_guest(&host);
    host.rpm(&["--erase", "virtlockd-rs"])
        .badly(&["goes on with every lock", "stays installed"]);
    host.is_ours();
    host.all_is_well();
    drop(odd);
    host.rpm(&["--erase", "virtlockd-rs"]).well();
    host.is_libvirts();
    host.all_is_well();
    host.nothing_was_lost();
}
