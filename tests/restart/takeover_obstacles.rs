//! libvirt's daemon does not ask its successor whether it can take over. So this program must,
//! whatever stands in its way: all locks of the host depend on it.

use crate::support;
use crate::support::client::{Client, acquire, register};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, wait_until};
use nix::sys::signal::Signal;
use std::path::Path;

const PROGRAM: &str = "/run/virtlockd-under-test";
const CONFIG: &str = "/run/virtlockd-test.conf";
const PID_FILE: &str = "/run/virtlockd-test.pid";

/// libvirt's daemon with a client that holds a lock, to be replaced by the daemon under test.
struct Scene {
    namespace: Namespace,
    daemon: Daemon,
    client: Client,
}

impl Scene {
    /// `None` where this cannot be tried.
    fn new() -> Option<Scene> {
        if !support::require_root() {
            return None;
        }
        let c_daemon = daemon::c_daemon()?;
        let namespace = Namespace::sealed();
        support::install_program(c_daemon, namespace.path(PROGRAM));
        std::fs::write(namespace.path("/run/disk"), "data").expect("write a disk");
        std::fs::write(namespace.path(CONFIG), "max_clients = 5\n").expect("write a configuration");
        let options = ["-f", CONFIG, "-p", PID_FILE];
        let daemon = Daemon::start_program(PROGRAM.as_ref(), &namespace, &options, &[]);
        let mut client = daemon.client();
        client.call(&register(4242)).expect_ok();
        client.call(&acquire("", "/run/disk", 0)).expect_ok();
        Some(Scene {
            namespace,
            daemon,
            client,
        })
    }

    /// SIGUSR1: the daemon under test takes over, and has the lock and the client.
    fn take_over(&mut self) {
        let (program, next) = (
            self.namespace.path(PROGRAM),
            self.namespace.path("/run/next"),
        );
        support::install_program(daemon::program(), &next);
        std::fs::rename(&next, &program).expect("replace the program");
        let inode = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(path).map(|found| found.ino()).ok()
        };
        let executed = format!("/proc/{}/exe", self.daemon.pid());
        self.daemon.signal(Signal::SIGUSR1);
        wait_until(DEADLINE, "the program to take over", || {
            assert_eq!(self.daemon.ended(), None, "{}", self.daemon.stderr());
            inode(executed.as_ref()) == inode(&program)
        });
        self.client
            .call(&acquire("", "/run/disk", 0))
            .expect_error(87, 51);
        let disk = self.namespace.path("/run/disk");
        assert!(support::lock_probe(&disk).is_some());
    }
}

#[test]
fn a_broken_configuration_loses_no_lock_when_libvirts_daemon_is_replaced() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    std::fs::write(scene.namespace.path(CONFIG), "max_clients = \n").expect("break it");
    scene.take_over();
    let log = scene.daemon.stderr();
    assert!(log.contains("without its configuration"), "{log}");
    // Put right, it counts.
    std::fs::write(scene.namespace.path(CONFIG), "max_clients = 1\n").expect("mend it");
    scene.daemon.signal(Signal::SIGHUP);
    wait_until(DEADLINE, "the limit to count", || {
        !scene.daemon.client().call(&register(4243)).is_ok()
    });
}

#[test]
fn a_pid_file_that_another_process_has_loses_no_lock_when_libvirts_daemon_is_replaced() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let pid_file = scene.namespace.path(PID_FILE);
    std::fs::remove_file(&pid_file).expect("remove the pid file");
    std::fs::write(&pid_file, "").expect("make another pid file");
    let _other = support::foreign_lock(&pid_file, true);
    scene.take_over();
    let log = scene.daemon.stderr();
    assert!(log.contains("without a pid file"), "{log}");
}
