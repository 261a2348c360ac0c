//! The Debian package comes to a host and goes from it under an unmodified libvirtd and a real guest: the guest
//! lives, libvirt goes on with it, and nobody else ever has its disk.

use crate::alone;
use crate::guests_stop::Host;
use crate::support::libvirt;
use crate::support::owner::rival;
use crate::support::packages::{self, OURS, Packages};
use crate::support::systemd::Units;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const PROGRAM: &str = "/usr/sbin/virtlockd";

fn dpkg(host: &Host, words: &[&str]) {
    let mut command = host.systemd.command("dpkg");
    let output = command
        .args(["--force-unsafe-io", "--no-triggers"])
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .expect("run dpkg");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn carry_in(host: &Host, packages: &Packages) -> String {
    let file = packages.file(OURS);
    let name = file.file_name().and_then(|name| name.to_str());
    let inside = format!("/run/{}", name.expect("a file has a name"));
    std::fs::copy(&file, host.systemd.path(&inside)).expect("carry a package in");
    inside
}

#[test]
fn a_real_guest_lives_through_the_installation_the_upgrade_and_the_removal_of_the_package() {
    if !libvirt::can_run() || !packages::can_run() {
        return;
    }
    let _alone = alone();
    let (one, next) = packages::ours();
    let Some(host) = Host::start(Units::Packages, Path::new(PROGRAM)) else {
        return;
    };
    let disk = host.disk("disk");
    host.create("guest", &disk).expect("start a guest");
    let pid = host.pid("guest");
    let over = Arc::new(AtomicBool::new(false));
    let competitor = std::thread::spawn({
        let (path, over) = (host.systemd.path(&disk), over.clone());
        move || rival(&path, pid, &over)
    });
    let main = host.systemd.main_pid();
    let is_well = || {
        assert_eq!(host.systemd.main_pid(), main);
        assert_eq!(host.virsh(&["domstate", "guest"]).as_deref(), Ok("running"));
        assert!(host.is_locked(&disk));
        let refused = host
            .create("thief", &disk)
            .expect_err("the disk is the guest's");
        assert!(refused.contains("is locked"), "{refused}");
    };
    is_well();
    for packages in [one, next] {
        dpkg(&host, &["--install", &carry_in(&host, packages)]);
        is_well();
    }
    // Guests come and go, whoever has their locks.
    let other = host.disk("other");
    host.create("another", &other).expect("start another guest");
    dpkg(&host, &["--purge", OURS]);
    is_well();
    assert!(host.is_locked(&other));
    over.store(true, Ordering::Relaxed);
    assert!(competitor.join().expect("it does not panic").is_none());
    for guest in ["guest", "another"] {
        host.virsh(&["destroy", guest]).expect("end a guest");
    }
}
