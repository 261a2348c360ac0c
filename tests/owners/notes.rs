//! Notes in lease files: who has the lease, for other hosts. They are written where only lease files are, and
//! nobody waits for them.

use crate::support;
use crate::support::client::{
    AUTOCREATE, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, SHARED, acquire, create_lockspace,
    register_as, release,
};
use crate::support::daemon::{self, Daemon, children_of};
use crate::support::fuse::{Habits, Operation, Share, Trouble};
use crate::support::namespace::Namespace;
use crate::support::upgrade::{Host, upgrade};
use crate::support::{DEADLINE, skip, wait_until};
use std::path::{Path, PathBuf};
use std::time::Instant;

const LEASES: &str = "/run/leases";
const MARK: &str = "virtlockd lease note 1\n";

/// A daemon with a lockspace, and a client with an owner.
struct Scene {
    host: Host,
    daemon: Daemon,
    client: Client,
}

fn is_ours() -> bool {
    if daemon::program().starts_with("/usr") {
        skip("libvirt's daemon writes no notes");
        return false;
    }
    true
}

impl Scene {
    fn new() -> Option<Scene> {
        if !support::require_root() || !is_ours() {
            return None;
        }
        let host = Host::new();
        let daemon = host.start(&[], &[]);
        let mut client = daemon.client();
        client.call(&register_as("guest", 4242)).expect_ok();
        client.call(&create_lockspace(LEASES)).expect_ok();
        Some(Scene {
            host,
            daemon,
            client,
        })
    }

    fn lease(&self, name: &str) -> PathBuf {
        self.host.path(format!("{LEASES}/{name}"))
    }

    /// Takes a lease and waits for its note: what was to be written before it is, by then.
    fn noted(&mut self, name: &str) -> String {
        let call = acquire(LEASES, name, AUTOCREATE);
        self.client.call(&call).expect_ok();
        note(&self.lease(name))
    }
}

fn note(path: &Path) -> String {
    let read = || std::fs::read_to_string(path).unwrap_or_default();
    wait_until(DEADLINE, "the note to be written", || {
        read().starts_with(MARK)
    });
    read()
}

#[test]
fn a_lease_file_says_who_has_it_over_an_upgrade_and_a_crash_and_goes_with_the_lock() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let said = scene.noted("first");
    assert_eq!(said.len(), 512, "{said}");
    let host = nix::unistd::gethostname().expect("a host name");
    let host = format!("\nhost: {}\n", host.to_string_lossy());
    for line in [
        &*host,
        "\ndomain: guest\n",
        "\npid: 4242\n",
        "\nmode: exclusive\n",
    ] {
        assert!(said.contains(line), "{said}");
    }
    upgrade(&scene.daemon);
    assert_eq!(note(&scene.lease("first")), said);
    scene.noted("second");
    kill(scene.daemon.reactor());
    scene.noted("third");
    assert_eq!(note(&scene.lease("first")), said);
    for name in ["first", "second", "third"] {
        scene.client.call(&release(LEASES, name)).expect_ok();
        assert!(!scene.lease(name).exists());
    }
}

#[test]
fn the_process_that_writes_notes_has_nothing_of_the_daemons_and_ends_with_who_serves() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let reactor = scene.daemon.reactor();
    assert!(children_of(reactor).is_empty(), "none before a lease");
    scene.noted("lease");
    let scribe = match children_of(reactor)[..] {
        [scribe] => scribe,
        ref others => panic!("{others:?}"),
    };
    let numbers = std::fs::read_dir(format!("/proc/{scribe}/fd")).expect("its descriptors");
    let what = numbers.map(|it| std::fs::read_link(it.expect("a descriptor").path()));
    let what: Vec<String> = what
        .map(|it| it.expect("what it is").to_string_lossy().into_owned())
        .collect();
    assert!(what.len() <= 4, "{what:?}");
    assert!(!what.iter().any(|it| it.contains("lease")), "{what:?}");
    let maps = std::fs::read_to_string(format!("/proc/{scribe}/maps")).expect("its memory");
    let is_shared = |line: &str| {
        let rights = line.split_ascii_whitespace().nth(1);
        rights.is_some_and(|rights| rights.ends_with('s'))
    };
    assert!(!maps.lines().any(is_shared), "{maps}");
    let is_there = || std::fs::read(format!("/proc/{scribe}/comm")).is_ok();
    kill(reactor);
    wait_until(DEADLINE, "it to end with the reactor", || !is_there());
    assert!(support::lock_probe(&scene.lease("lease")).is_some());
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill it");
}

#[test]
fn nothing_is_written_to_a_file_that_could_be_a_disk() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    std::fs::write(scene.lease("disk"), b"QFI\xfb").expect("write a disk");
    std::fs::write(scene.lease("zeros"), [0; 512]).expect("write a disk");
    std::fs::write(scene.lease("empty"), b"").expect("write a file");
    let default = scene.host.path("/run/default");
    for (lockspace, name, flags) in [
        (LEASES, "disk", AUTOCREATE),
        (LEASES, "zeros", AUTOCREATE),
        (LEASES, "empty", 0),
        ("", "/run/default", AUTOCREATE),
    ] {
        let call = acquire(lockspace, name, flags);
        scene.client.call(&call).expect_ok();
    }
    scene.noted("last");
    let read = |path: &Path| std::fs::read(path).expect("read it");
    assert_eq!(read(&scene.lease("disk")), b"QFI\xfb");
    assert_eq!(read(&scene.lease("zeros")), [0; 512]);
    assert_eq!(read(&scene.lease("empty")), b"");
    assert_eq!(read(&default), b"");
}

#[test]
fn an_owner_of_any_name_and_a_shared_lease_leave_the_note_whole() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let name = format!("a\nhost: b\n\u{e9}{}", "x".repeat(3000));
    scene.client.call(&register_as(&name, 4242)).expect_ok();
    let call = acquire(LEASES, "shared", AUTOCREATE | SHARED);
    scene.client.call(&call).expect_ok();
    let said = note(&scene.lease("shared"));
    assert_eq!(said.len(), 512, "{said}");
    let start = "\ndomain: a\\x0ahost: b\\x0a\\xc3\\xa9xxx";
    assert!(said.contains(start), "{said}");
    assert!(said.contains("...\nuuid: "), "{said}");
    assert!(said.contains("\nmode: shared\nsince: 2"), "{said}");
}

#[test]
fn a_share_that_hangs_over_a_note_keeps_nobody_waiting() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let habits = Habits::tenacious();
    let Some(share) = Share::mount(&scene.host.namespace, "share", habits) else {
        return;
    };
    scene
        .client
        .call(&create_lockspace(share.directory()))
        .expect_ok();
    share.trouble(Operation::Write, Trouble::Hangs, usize::MAX);
    let start = Instant::now();
    let call = acquire(share.directory(), "x", AUTOCREATE);
    scene.client.call(&call).expect_ok();
    share.wait_calls(Operation::Write, 1);
    // More than there is room for.
    for number in 0..2000 {
        let name = format!("lease{}", number % 7);
        scene
            .client
            .call(&acquire(LEASES, &name, AUTOCREATE))
            .expect_ok();
        scene.client.call(&release(LEASES, &name)).expect_ok();
    }
    assert!(
        scene
            .daemon
            .stderr()
            .matches("do not all say at the moment")
            .count()
            == 1,
        "{}",
        scene.daemon.stderr()
    );
    upgrade(&scene.daemon);
    assert!(scene.noted("after").contains("\ndomain: guest\n"));
    assert!(start.elapsed() < DEADLINE);
    share.mend(Operation::Write);
    scene
        .client
        .call(&release(share.directory(), "x"))
        .expect_ok();
    share.wait_locks(&[], "given back");
}

#[test]
fn a_refusal_from_another_host_says_what_the_lease_file_says() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let habits = Habits::tenacious();
    let Some(share) = Share::mount(&scene.host.namespace, "share", habits) else {
        return;
    };
    let lockspace = share.directory();
    scene.client.call(&create_lockspace(lockspace)).expect_ok();
    let said = "host: other\ndomain: its guest\nuuid: u\npid: 7\nmode: exclusive\nsince: then\n";
    let own = format!(
        "host: {}\n",
        nix::unistd::gethostname().unwrap().to_string_lossy()
    );
    let unknown = ": probably from another host";
    for (name, content, expected) in [
        (
            "noted",
            format!("{MARK}{said}"),
            ": from another host, as its lease file says: host 'other', domain 'its guest' (uuid u, pid 7), \
             since then",
        ),
        ("empty", String::new(), unknown),
        ("disk", "host: other\n".to_owned(), unknown),
        ("hostile", format!("{MARK}host: \x1b[2J\n"), unknown),
        ("own", format!("{MARK}{own}"), unknown),
        ("long", format!("{MARK}{said}{}", "\n".repeat(512)), unknown),
    ] {
        share.put(name);
        share.fill(name, content.as_bytes());
        share.stranger_locks(name, true);
        let reply = scene.client.call(&acquire(lockspace, name, AUTOCREATE));
        let message = reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        assert!(
            message.ends_with(&format!("is locked{expected}")),
            "{name}: {message}"
        );
    }
    // As a disk it has no note, whatever is in it.
    let reply = scene.client.call(&acquire("", &share.path("noted"), 0));
    let message = reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    assert!(message.ends_with(unknown), "{message}");
}

#[test]
fn libvirts_daemon_does_not_mind_a_note() {
    if !support::require_root() || !is_ours() {
        return;
    }
    let Some(theirs) = daemon::c_daemon() else {
        skip("needs libvirt's own daemon");
        return;
    };
    let namespace = Namespace::new();
    let daemon = Daemon::start_program(&theirs, &namespace, &[], &[]);
    let mut client = daemon.client();
    client.call(&register_as("guest", 4242)).expect_ok();
    client.call(&create_lockspace(LEASES)).expect_ok();
    let lease = namespace.path(format!("{LEASES}/left"));
    std::fs::write(&lease, format!("{MARK}host: other\n")).expect("leave a note");
    client
        .call(&acquire(LEASES, "left", AUTOCREATE))
        .expect_ok();
    assert!(support::lock_probe(&lease).is_some());
    client.call(&release(LEASES, "left")).expect_ok();
    assert!(!lease.exists());
}
