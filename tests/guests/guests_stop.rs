//! Real systemd restarts, stops and starts the lock daemon under an unmodified libvirtd and a real guest: the
//! guest lives, libvirt can end it and start others, and nobody else ever has its disk.

use crate::alone;
use crate::support::daemon::program;
use crate::support::libvirt::guest::{Guest, firmware};
use crate::support::libvirt::{self, ROOT_CONFIGURATION, emulator, is_locked, kept_directory};
use crate::support::owner::rival;
use crate::support::systemd::{SERVICE, Systemd, Units};
use crate::support::{DEADLINE, wait_until};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A host with systemd, the lock daemon and libvirtd.
pub struct Host {
    libvirtd: Child,
    pub systemd: Systemd,
}

impl Drop for Host {
    fn drop(&mut self) {
        let log = std::fs::read_to_string(self.systemd.path("/run/libvirtd.log"));
        if std::thread::panicking() {
            eprintln!("log of libvirtd:\n{}", log.unwrap_or_default());
        }
        // What it has started ends with process 1.
        let _ = self.libvirtd.kill();
        let _ = self.libvirtd.wait();
    }
}

/// Directories as libvirt finds them on a new host, but for what it knows of the emulator; and none of its
/// drivers but QEMU's.
const PREPARE: &str = r#"
set -e
for name in /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt; do
    mount -t tmpfs tmpfs "$name"
done
mkdir -p /var/cache/libvirt/qemu/capabilities /run/disks
mount --bind "$1" /var/cache/libvirt/qemu/capabilities
for driver in /usr/lib/*/libvirt/connection-driver/* /usr/lib64/libvirt/connection-driver/*; do
    case $driver in
    *_qemu.so | *'*') ;;
    *) rm "$driver" ;;
    esac
done
"#;

impl Host {
    /// With these units, and this program as the lock daemon.
    pub fn start(units: Units, lockd: &Path) -> Option<Host> {
        let systemd = Systemd::start(units, lockd)?;
        let learned = kept_directory().join("capabilities");
        std::fs::create_dir_all(&learned).expect("make the directory of capabilities");
        let mut prepare = systemd.command("sh");
        let prepared = prepare.args(["-c", PREPARE, "sh"]).arg(&learned).status();
        assert!(prepared.expect("run a shell").success());
        let write = |name: &str, text: &str| {
            std::fs::write(systemd.path(name), text).expect("write a file");
        };
        write("/etc/libvirt/qemu.conf", ROOT_CONFIGURATION);
        write("/etc/libvirt/qemu-lockd.conf", "# Of a test.\n\n");
        write(
            "/etc/libvirt/libvirtd.conf",
            "log_outputs = \"3:file:/run/libvirtd.log\"\n",
        );
        std::fs::write(systemd.path("/run/firmware"), firmware()).expect("write the firmware");
        systemd.ctl(&["start", SERVICE]);
        let libvirtd = systemd
            .command("/usr/sbin/libvirtd")
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("G_SLICE", "always-malloc")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start libvirtd");
        let host = Host { libvirtd, systemd };
        wait_until(DEADLINE, "an answer of libvirtd", || {
            host.virsh(&["version"]).is_ok()
        });
        Some(host)
    }

    pub fn virsh(&self, words: &[&str]) -> Result<String, String> {
        let mut command = self.systemd.command("timeout");
        let output = command
            .args(["120", "virsh", "-q", "-c", "qemu:///system"])
            .args(words)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .expect("run virsh");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    }

    pub fn disk(&self, name: &str) -> PathBuf {
        let inside = PathBuf::from(format!("/run/disks/{name}"));
        let file = std::fs::File::create_new(self.systemd.path(&inside)).expect("make a disk");
        file.set_len(1 << 20).expect("give the disk its size");
        inside
    }

    pub fn create(&self, name: &str, disk: &Path) -> Result<(), String> {
        let kvm = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        let kind = if kvm.is_ok() { "kvm" } else { "qemu" };
        let guest = Guest::new(name).disk(disk);
        let xml = guest.xml(kind, emulator(), Path::new("/run/firmware"));
        let file = format!("/run/{name}.xml");
        std::fs::write(self.systemd.path(&file), xml).expect("describe a guest");
        self.virsh(&["create", &file]).map(drop)
    }

    /// The process of a guest.
    pub fn pid(&self, guest: &str) -> i32 {
        let file = format!("/run/libvirt/qemu/{guest}.pid");
        let pid = std::fs::read_to_string(self.systemd.path(file));
        let pid = pid.expect("the guest's pid file").trim().parse();
        self.systemd.outside(pid.expect("a number"))
    }

    pub fn is_locked(&self, disk: &Path) -> bool {
        is_locked(&self.systemd.path(disk))
    }
}

#[test]
fn a_real_guest_lives_through_a_restart_and_through_a_stop_and_a_start() {
    if !libvirt::can_run() {
        return;
    }
    let _alone = alone();
    let Some(host) = Host::start(Units::Ours, &program()) else {
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
    let is_well = || {
        assert_eq!(host.virsh(&["domstate", "guest"]).as_deref(), Ok("running"));
        assert!(host.is_locked(&disk));
        let refused = host
            .create("thief", &disk)
            .expect_err("the disk is the guest's");
        assert!(refused.contains("is locked"), "{refused}");
    };
    is_well();
    for _ in 0..2 {
        host.systemd.ctl(&["restart", SERVICE]);
        is_well();
    }
    host.systemd.ctl(&["stop", SERVICE]);
    assert_eq!(host.virsh(&["domstate", "guest"]).as_deref(), Ok("running"));
    std::thread::sleep(Duration::from_secs(2));
    assert!(host.is_locked(&disk));
    host.systemd.ctl(&["start", SERVICE]);
    is_well();
    // Libvirt gives locks up and takes new ones through the daemon that goes on.
    over.store(true, Ordering::Relaxed);
    assert!(competitor.join().expect("it does not panic").is_none());
    host.virsh(&["suspend", "guest"]).expect("pause the guest");
    host.virsh(&["resume", "guest"])
        .expect("let the guest go on");
    is_well();
    let other = host.disk("other");
    host.create("another", &other).expect("start another guest");
    assert!(host.is_locked(&other));
    for (guest, disk) in [("guest", &disk), ("another", &other)] {
        host.virsh(&["destroy", guest]).expect("end a guest");
        wait_until(DEADLINE, "its disk to be free", || !host.is_locked(disk));
    }
    host.create("thief", &disk).expect("the disk is nobody's");
}
