//! A refusal says who has it: behind libvirt's words, on the wire and in the log.

use crate::support::client::{
    Call, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, SHARED, acquire, create_resource, register_as,
    release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, lock_probe, require_root, skip, wait_until};
use std::process::{Child, Command, Stdio};

const DISK: &str = "/run/disk";
const LIBVIRTS: &str = "resource busy: Lockspace resource '/run/disk' is locked";
const UUID_TEXT: &str = "10111213-1415-1617-1819-1a1b1c1d1e1f";

struct Scene {
    namespace: Namespace,
    daemon: Daemon,
}

impl Scene {
    fn new() -> Option<Scene> {
        if daemon::c_daemon().is_some_and(|theirs| theirs == daemon::program()) {
            skip("libvirt's own daemon does not say who has it");
            return None;
        }
        if !require_root() {
            return None;
        }
        let namespace = Namespace::new();
        std::fs::write(namespace.path(DISK), "data").expect("write a disk");
        let daemon = Daemon::start(&namespace, &[], &[]);
        Some(Scene { namespace, daemon })
    }

    fn client(&self, name: &str, pid: i32) -> Client {
        let mut client = self.daemon.client();
        client.call(&register_as(name, pid)).expect_ok();
        client
    }

    /// What stands behind libvirt's words when somebody wants the disk for himself. The log says the
    /// same.
    #[track_caller]
    fn refused(&self) -> String {
        let mut client = self.client("late", 7);
        let reply = client.call(&acquire("", DISK, 0));
        let text = reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        let by = text.strip_prefix(LIBVIRTS).expect("libvirt's words");
        let log = self.daemon.stderr();
        assert!(log.contains(text), "not in the log: {text}");
        by.to_owned()
    }
}

/// A process that has a lock of the kind that this python call takes. It ends when it is dropped.
struct Stranger(Child);

impl Stranger {
    fn with(scene: &Scene, call: &str) -> Stranger {
        let path = scene.namespace.path(DISK);
        let code = format!(
            "import ctypes, fcntl, os, struct, sys
open('/proc/self/comm', 'w').write('strange (one)')
file = os.open(sys.argv[1], os.O_RDWR)
{call}
sys.stdin.read()"
        );
        let child = Command::new("python3")
            .args(["-c", &code])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .expect("start python");
        wait_until(DEADLINE, "the stranger's lock", || {
            lock_probe(&path).is_some()
        });
        Stranger(child)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_refusal_names_the_domain_that_holds_it_and_counts_the_others() {
    let Some(scene) = Scene::new() else { return };
    let mut first = scene.client("first", 4242);
    first.call(&acquire("", DISK, SHARED)).expect_ok();
    let named = format!(": by domain 'first' (uuid {UUID_TEXT}, pid 4242)");
    assert_eq!(scene.refused(), format!("{named}, shared"));
    let mut others = [4343, 4444].map(|pid| scene.client("other", pid));
    for other in &mut others {
        other.call(&acquire("", DISK, SHARED)).expect_ok();
    }
    assert_eq!(scene.refused(), format!("{named} and 2 more, shared"));
    let created = others[0].call(&create_resource("", DISK));
    let text = created.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    assert_eq!(text, format!("{LIBVIRTS}{named} and 2 more, shared"));
    for owner in others.iter_mut().chain([&mut first]) {
        owner.call(&release("", DISK)).expect_ok();
    }
    first.call(&acquire("", DISK, 0)).expect_ok();
    assert_eq!(scene.refused(), format!("{named}, exclusive"));
}

#[test]
fn a_name_of_any_bytes_and_length_is_cut_on_the_wire_and_escaped_in_the_log() {
    let Some(scene) = Scene::new() else { return };
    let mut first = scene.daemon.client();
    let mut name = b"caf\xe9\n".to_vec();
    name.resize(60_000, b'x');
    let named = Call::Register {
        uuid: [7; 16],
        name,
        id: 1,
        pid: 4242,
        flags: 0,
    };
    first.call(&named).expect_ok();
    first.call(&acquire("", DISK, 0)).expect_ok();
    let mut late = scene.client("late", 7);
    let reply = late.call_raw(&acquire("", DISK, 0));
    let shown = [&b"domain 'caf\xe9\nxxx"[..], b"xxx...' (uuid 0707"];
    for part in shown {
        let count = reply.windows(part.len()).filter(|it| *it == part).count();
        assert_eq!(count, 2, "in the message and in the detail");
    }
    assert!(reply.len() < 2000, "{} bytes", reply.len());
    let log = scene.daemon.stderr();
    let line = log.lines().find(|line| line.contains("is locked: by"));
    let line = line.expect("a line of the log");
    assert!(
        line.contains("late") && line.contains("xxx...' (uuid 0707"),
        "{line}"
    );
}

#[test]
fn a_refusal_names_the_process_with_a_posix_lock() {
    let Some(scene) = Scene::new() else { return };
    let stranger = Stranger::with(&scene, "fcntl.lockf(file, fcntl.LOCK_EX, 1)");
    let pid = stranger.0.id();
    assert_eq!(
        scene.refused(),
        format!(": by a process that is not virtlockd, pid {pid} (strange (one))")
    );
}

#[test]
fn a_refusal_says_that_somebody_on_this_host_has_an_open_file_description_lock() {
    let Some(scene) = Scene::new() else { return };
    // F_OFD_SETLK.
    let call = "fcntl.fcntl(file, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 1, 0))";
    let _stranger = Stranger::with(&scene, call);
    assert_eq!(
        scene.refused(),
        ": by a process of this host that is not this virtlockd"
    );
}

#[test]
fn a_refusal_because_of_libvirts_daemon_beside_ours_names_that() {
    let Some(scene) = Scene::new() else { return };
    let call = "fcntl.lockf(file, fcntl.LOCK_EX, 1)
open('/proc/self/comm', 'w').write('virtlockd')";
    let stranger = Stranger::with(&scene, call);
    let comm = format!("/proc/{}/comm", stranger.0.id());
    wait_until(DEADLINE, "its other name", || {
        std::fs::read_to_string(&comm).is_ok_and(|name| name == "virtlockd\n")
    });
    let pid = stranger.0.id();
    assert_eq!(
        scene.refused(),
        format!(": by another virtlockd, pid {pid}")
    );
}

#[test]
fn a_refusal_to_lock_the_pid_file_says_that_it_is_the_daemons_own() {
    let Some(scene) = Scene::new() else { return };
    let mut client = scene.client("guest", 4242);
    let reply = client.call(&acquire("", "/run/virtlockd.pid", 0));
    let text = reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    assert!(
        text.ends_with("is locked: by virtlockd itself, whose pid file it is"),
        "{text}"
    );
}
