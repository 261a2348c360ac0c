//! Signals that are pending when libvirt's daemon takes over: this program blocks its signals and
//! that one does not, so what came meanwhile must neither end the one nor the other.

use crate::support;
use crate::support::client::{acquire, register};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, wait_until};
use nix::sys::signal::Signal;

const PROGRAM: &str = "/run/virtlockd-under-test";

fn file_size_limit(daemon: &Daemon, limit: &str) {
    daemon.limit(limit);
}

fn is_pending(daemon: &Daemon, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.reactor()))
        .expect("read the daemon's status");
    status
        .lines()
        .filter_map(|line| {
            line.strip_prefix("SigPnd:")
                .or(line.strip_prefix("ShdPnd:"))
        })
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & (1 << (signal as i32 - 1)) != 0)
}

#[test]
fn a_signal_that_nobody_reads_does_not_end_the_daemon_when_libvirts_takes_over() {
    if !support::require_root() {
        return;
    }
    let Some(c_daemon) = daemon::c_daemon() else {
        return;
    };
    let namespace = Namespace::sealed();
    let program = namespace.path(PROGRAM);
    support::install_program(daemon::program(), &program);
    let disk = namespace.path("/run/disk");
    std::fs::write(&disk, "data").expect("write a disk");
    let mut daemon = Daemon::start_program(PROGRAM.as_ref(), &namespace, &[], &[]);
    let mut client = daemon.client();
    client.call(&register(4242)).expect_ok();
    client.call(&acquire("", "/run/disk", 0)).expect_ok();

    // A line of the log beyond the limit of file sizes.
    file_size_limit(&daemon, "--fsize=0:unlimited");
    assert!(!client.call(&acquire("", "/run/disk", 0)).is_ok());
    wait_until(DEADLINE, "SIGXFSZ to be pending", || {
        is_pending(&daemon, Signal::SIGXFSZ)
    });
    file_size_limit(&daemon, "--fsize=unlimited:unlimited");

    let next = namespace.path("/run/next");
    support::install_program(c_daemon, &next);
    std::fs::rename(&next, &program).expect("replace the program");
    let inode = |path: &std::path::Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).map(|found| found.ino()).ok()
    };
    let executed = format!("/proc/{}/exe", daemon.pid());
    daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "libvirt's daemon to take over", || {
        assert_eq!(daemon.ended(), None, "{}", daemon.stderr());
        inode(executed.as_ref()) == inode(&program)
    });
    let busy = client.call(&acquire("", "/run/disk", 0));
    busy.expect_error(87, 51);
    assert!(support::lock_probe(&disk).is_some());
}
