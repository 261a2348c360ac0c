//! From libvirt's daemon to ours and back, by the exec that each of them does on SIGUSR1: nobody
//! notices, and what libvirt's daemon would not survive is not done to it.

use crate::support;
use crate::support::client::{
    AUTOCREATE, Call, Client, Reply, SHARED, acquire, create_lockspace, look_up_server,
    register_as, release, restrict,
};
use crate::support::daemon::{self, ADMIN_SOCKET, Daemon, LOCK_SOCKET};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{
    ACTIVATED_ADMIN, Background, Disturbed, Host, Orphan, PROGRAM, Rival, helper_client, image,
    long_name, refusals, refused_upgrade, upgrade, wait_for_successor,
};
use crate::support::{DEADLINE, lock_probe, require_root, skip, wait_until};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const DOCUMENT: &str = "/run/virtlockd-restart-exec.json";

/// Libvirt's daemon, or a skip.
fn theirs() -> Option<PathBuf> {
    if !require_root() {
        return None;
    }
    let found = daemon::c_daemon();
    if found.is_none() {
        skip("needs libvirt's virtlockd");
    }
    found
}

/// Everything that a daemon can have in it.
struct Scene {
    host: Host,
    daemon: Daemon,
    first: Owner,
    second: Owner,
    helper: Client,
    admin: Client,
    exclusive: String,
    shared: String,
    spare: String,
    lockfile: PathBuf,
    calls: u32,
}

const LOCKSPACE: &str = "/run/lockspace";

impl Scene {
    fn of(program: &Path) -> Scene {
        let host = Host::with(program);
        let daemon = host.start(&[], &[]);
        let [exclusive, shared, spare] =
            ["exclusive", "shared", "spare"].map(|name| host.disk(name));
        let mut first = host.guest(&daemon, "first", &exclusive);
        let mut second = Owner::register(daemon.lock_socket(), "second", OnTerm::Die);
        let mut helper = helper_client(&daemon, "first", first.pid());
        for owner in [&mut first, &mut second] {
            owner.call(&acquire("", &shared, SHARED)).expect_ok();
        }
        helper.call(&create_lockspace(LOCKSPACE)).expect_ok();
        helper
            .call(&acquire(LOCKSPACE, "0a1b2c", AUTOCREATE))
            .expect_ok();
        first.call(&restrict()).expect_ok();
        let mut admin = daemon.admin_client();
        look_up_server(&mut admin, 0);
        let lockfile = host.path(format!("{LOCKSPACE}/0a1b2c"));
        Scene {
            host,
            daemon,
            first,
            second,
            helper,
            admin,
            exclusive,
            shared,
            spare,
            lockfile,
            calls: 0,
        }
    }

    fn rival(&self) -> Rival {
        let mut held: Vec<PathBuf> = [&self.exclusive, &self.shared]
            .map(|disk| self.host.path(disk))
            .into();
        held.push(self.lockfile.clone());
        Rival::of(held)
    }

    /// All is there and works.
    #[track_caller]
    fn check(&mut self) {
        self.host.assert_held(&self.exclusive);
        let shared = lock_probe(&self.host.path(&self.shared));
        assert!(shared.is_some_and(|lock| !lock.exclusive), "{shared:?}");
        assert!(lock_probe(&self.lockfile).is_some());
        self.calls += 1;
        look_up_server(&mut self.admin, self.calls);
        assert!(
            !self.first.call(&release("", &self.exclusive)).is_ok(),
            "restricted"
        );
        for (lockspace, name) in [
            ("", &self.exclusive[..]),
            ("", &self.shared),
            (LOCKSPACE, "0a1b2c"),
        ] {
            let again = self.second.call(&acquire(lockspace, name, 0));
            assert!(!again.is_ok(), "{name} is held");
        }
        self.second.call(&acquire("", &self.spare, 0)).expect_ok();
        self.host.assert_held(&self.spare);
        self.second.call(&release("", &self.spare)).expect_ok();
        self.host.assert_free(&self.spare);
        let mut new = helper_client(&self.daemon, "second", self.second.pid());
        new.call(&acquire("", &self.spare, SHARED)).expect_ok();
        new.call(&release("", &self.spare)).expect_ok();
        assert!(!self.host.path(DOCUMENT).exists(), "the document is gone");
    }

    /// The next program takes over.
    #[track_caller]
    fn hand_to(&mut self, program: &Path) {
        self.host.install(program);
        upgrade(&self.daemon);
        self.check();
    }

    /// Everything is given back, and the last files go.
    #[track_caller]
    fn finish(mut self) {
        self.second.call(&release("", &self.shared)).expect_ok();
        assert!(
            lock_probe(&self.host.path(&self.shared)).is_some(),
            "the other one has it"
        );
        self.helper.call(&release(LOCKSPACE, "0a1b2c")).expect_ok();
        assert!(
            !self.lockfile.exists(),
            "made for the lock, removed with it"
        );
        self.first.kill();
        self.first.wait_end();
        self.host.wait_free(&self.exclusive);
        self.host.wait_free(&self.shared);
        self.second
            .call(&acquire("", &self.exclusive, 0))
            .expect_ok();
        self.second.call(&release("", &self.exclusive)).expect_ok();
    }
}

#[test]
fn from_libvirts_daemon_to_ours_and_back_twice() {
    let Some(theirs) = theirs() else { return };
    let ours = daemon::program();
    let mut scene = Scene::of(&theirs);
    scene.check();
    let rival = scene.rival();
    scene.hand_to(&ours);
    scene.hand_to(&theirs);
    scene.hand_to(&theirs);
    scene.hand_to(&ours);
    scene.hand_to(&ours);
    rival.never_succeeded();
    scene.finish();
}

#[test]
fn from_ours_to_libvirts_daemon_and_what_ends_there() {
    let Some(theirs) = theirs() else { return };
    let ours = daemon::program();
    let mut scene = Scene::of(&ours);
    let rival = scene.rival();
    scene.hand_to(&theirs);
    scene.hand_to(&ours);
    scene.hand_to(&theirs);
    rival.never_succeeded();
    scene.finish();
}

#[test]
fn no_rival_gets_a_lock_between_the_programs_although_every_fcntl_and_close_is_slow() {
    let Some(theirs) = theirs() else { return };
    if !support::require_strace() {
        return;
    }
    let ours = daemon::program();
    let mut scene = Scene::of(&theirs);
    let slowed = Disturbed::slow(&scene.daemon);
    let rival = scene.rival();
    scene.hand_to(&ours);
    scene.hand_to(&theirs);
    scene.hand_to(&ours);
    rival.never_succeeded();
    drop(slowed);
    scene.finish();
}

/// Libvirt's daemon locks one file under two names for two owners; the kernel has one POSIX lock.
#[test]
fn two_names_of_one_file_are_both_taken_over_and_one_keeps_the_lock_of_the_other() {
    let Some(theirs) = theirs() else { return };
    let host = Host::with(&theirs);
    let daemon = host.start(&[], &[]);
    let one = host.disk("one");
    let two = "/run/two".to_owned();
    std::fs::hard_link(host.path(&one), host.path(&two)).expect("make a second name");
    let mut first = host.guest(&daemon, "first", &one);
    let mut second = host.guest(&daemon, "second", &two);
    let rival = Rival::of(vec![host.path(&one)]);
    host.install(&daemon::program());
    for _ in 0..2 {
        upgrade(&daemon);
        host.assert_held(&one);
    }
    // A third name, and calls that only look at the file, drop nothing.
    std::fs::hard_link(host.path(&one), host.path("/run/three")).expect("make a third name");
    let mut helper = helper_client(&daemon, "first", first.pid());
    assert!(!helper.call(&acquire("", "/run/three", 0)).is_ok());
    assert!(!helper.call(&acquire("", "/run/three", SHARED)).is_ok());
    host.assert_held(&one);
    first.call(&release("", &one)).expect_ok();
    host.assert_held(&two);
    // The descriptor that must stay open goes on as well.
    upgrade(&daemon);
    host.assert_held(&two);
    assert!(!helper.call(&acquire("", &one, 0)).is_ok(), "held as two");
    rival.never_succeeded();
    second.call(&release("", &two)).expect_ok();
    host.assert_free(&one);
    helper.call(&acquire("", &one, 0)).expect_ok();
    host.assert_held(&one);
}

#[test]
fn a_parked_descriptor_goes_back_to_libvirts_daemon_without_dropping_the_lock() {
    let Some(theirs) = theirs() else { return };
    let host = Host::with(&theirs);
    let daemon = host.start(&[], &[]);
    let one = host.disk("one");
    std::fs::hard_link(host.path(&one), host.path("/run/two")).expect("make a second name");
    let mut first = host.guest(&daemon, "first", &one);
    let mut second = host.guest(&daemon, "second", "/run/two");
    host.install(&daemon::program());
    upgrade(&daemon);
    first.call(&release("", &one)).expect_ok();
    let rival = Rival::of(vec![host.path(&one)]);
    host.install(&theirs);
    upgrade(&daemon);
    second
        .call(&register_as("second", second.pid()))
        .expect_ok();
    rival.never_succeeded();
    host.assert_held(&one);
    second.call(&release("", "/run/two")).expect_ok();
    host.assert_free(&one);
}

#[test]
fn libvirts_daemon_gets_no_state_above_10_mib() {
    let Some(theirs) = theirs() else { return };
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut client = helper_client(&daemon, "guest", guest.pid());
    let files: Vec<String> = (0..1400).map(|number| format!("d-{number}")).collect();
    for file in &files {
        host.disk(file);
        client
            .call(&acquire("", &long_name(file, 4000), 0))
            .expect_ok();
    }
    host.install(&theirs);
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("10485760"), "{reason}");
    assert!(!host.path(DOCUMENT).exists());
    host.assert_held("/run/d-1399");
    for file in &files[100..] {
        client
            .call(&release("", &long_name(file, 4000)))
            .expect_ok();
    }
    upgrade(&daemon);
    client.call(&register_as("guest", guest.pid())).expect_ok();
    for file in &files[..100] {
        host.assert_held(&format!("/run/{file}"));
    }
    host.assert_held(&disk);
}

#[test]
fn libvirts_daemon_gets_no_name_that_is_not_utf8() {
    let Some(theirs) = theirs() else { return };
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut client = daemon.client();
    let name = |name: &[u8]| Call::Register {
        uuid: [7; 16],
        name: name.to_vec(),
        id: 3,
        pid: guest.pid() as u32,
        flags: 0,
    };
    host.install(&theirs);
    client.call(&name(b"caf\xe9")).expect_ok();
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("is not UTF-8"), "{reason}");
    client.call(&name("café \t\"\\".as_bytes())).expect_ok();
    let odd = Call::Acquire {
        path: Vec::new(),
        name: b"/run/./d\xffisk".to_vec(),
        flags: AUTOCREATE,
    };
    client.call(&odd).expect_ok();
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("is not UTF-8"), "{reason}");
    let give = Call::Release {
        path: Vec::new(),
        name: b"/run/./d\xffisk".to_vec(),
        flags: 0,
    };
    client.call(&give).expect_ok();
    upgrade(&daemon);
    client.ping();
    host.assert_held(&disk);
}

#[test]
fn libvirts_daemon_gets_no_client_whose_process_is_gone() {
    let Some(theirs) = theirs() else { return };
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    let mut orphan = Orphan::connect(daemon.lock_socket());
    Reply::parse(&orphan.send(&register_as("orphan", guest.pid()).frame(0))).expect_ok();
    host.install(&theirs);
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("is gone"), "{reason}");
    assert!(reason.contains("'orphan'"), "{reason}");
    drop(orphan);
    daemon.wait_until_asleep();
    upgrade(&daemon);
    guest.call(&release("", &disk)).expect_ok();
    // libvirt's daemon only closes the file, which the understudy has for a moment yet.
    host.wait_free(&disk);
}

#[test]
fn a_connection_that_has_not_registered_is_mended_for_libvirts_daemon() {
    let Some(theirs) = theirs() else { return };
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    let mut silent = daemon.client();
    silent.ping();
    host.install(&theirs);
    upgrade(&daemon);
    silent.ping();
    let refused = silent.call(&acquire("", &disk, 0));
    assert!(!refused.is_ok(), "it has not registered");
    host.install(&daemon::program());
    upgrade(&daemon);
    silent.call(&register_as("late", guest.pid())).expect_ok();
    guest.call(&release("", &disk)).expect_ok();
}

#[test]
fn libvirts_daemon_takes_over_when_a_fence_has_ended() {
    let Some(theirs) = theirs() else { return };
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let [disk, other] = ["disk", "other"].map(|name| host.disk(name));
    let mut guest = host.guest(&daemon, "guest", &other);
    let mut stubborn = Owner::register(daemon.lock_socket(), "stubborn", OnTerm::Ignore);
    stubborn.call(&acquire("", &disk, 0)).expect_ok();
    host.install(&theirs);
    let before = image(daemon.pid());
    stubborn.close_connection();
    daemon.signal(nix::sys::signal::Signal::SIGUSR1);
    while stubborn.is_alive() {
        assert!(
            image(daemon.pid()) == before || !stubborn.is_alive(),
            "handed over in the middle of a fence"
        );
        guest.call(&register_as("guest", guest.pid())).expect_ok();
    }
    assert_eq!(stubborn.wait_signal(), Some(libc::SIGKILL));
    wait_for_successor(daemon.pid(), &before);
    guest.call(&acquire("", &disk, 0)).expect_ok();
    host.assert_held(&other);
    assert_eq!(refusals(&daemon), Vec::<String>::new());
}

#[test]
fn libvirts_daemon_takes_over_when_a_half_message_is_whole() {
    let Some(theirs) = theirs() else { return };
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let disk = host.disk("disk");
    let guest = host.guest(&daemon, "guest", &disk);
    let mut client = daemon.client();
    let call = register_as("slow", guest.pid()).frame(5);
    client.send(&call[..20]);
    daemon.wait_until_asleep();
    host.install(&theirs);
    let before = image(daemon.pid());
    daemon.signal(nix::sys::signal::Signal::SIGUSR1);
    let mut other = helper_client(&daemon, "guest", guest.pid());
    for _ in 0..100 {
        other.ping();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(image(daemon.pid()), before, "it would lose half a message");
    client.send(&call[20..]);
    Reply::parse(&client.receive()).expect_ok();
    wait_for_successor(daemon.pid(), &before);
    client.ping();
    // Half a message for ever: then libvirt's daemon does not come, and the caller is told.
    host.install(&daemon::program());
    upgrade(&daemon);
    client.send(&call[..20]);
    daemon.wait_until_asleep();
    host.install(&theirs);
    let reason = refused_upgrade(&daemon);
    assert!(reason.contains("try again"), "{reason}");
    client.send(&call[20..]);
    Reply::parse(&client.receive()).expect_ok();
    host.assert_held(&disk);
}

/// Releasing one of two names of a file drops the lock of the other in libvirt's daemon.
#[test]
fn a_lock_that_libvirts_daemon_lost_is_taken_again_or_reported() {
    let Some(theirs) = theirs() else { return };
    let host = Host::with(&theirs);
    let daemon = host.start(&[], &[]);
    let mut owners = Vec::new();
    for name in ["free", "robbed"] {
        let disk = host.disk(name);
        let alias = format!("{disk}-alias");
        std::fs::hard_link(host.path(&disk), host.path(&alias)).expect("make a second name");
        let owner = host.guest(&daemon, name, &disk);
        let mut second = host.guest(&daemon, name, &alias);
        second.call(&release("", &alias)).expect_ok();
        host.assert_free(&disk);
        owners.extend([owner, second]);
    }
    let robber = support::foreign_lock(&host.path("/run/robbed"), true);
    host.install(&daemon::program());
    upgrade(&daemon);
    let pid = owners[1].pid();
    owners[1].call(&register_as("free", pid)).expect_ok();
    host.assert_held("/run/free");
    let log = daemon.stderr();
    let line = log.lines().find(|line| line.contains("was lost"));
    assert!(
        line.is_some_and(|line| line.contains("'/run/robbed'")),
        "{line:?}"
    );
    owners[0].call(&release("", "/run/free")).expect_ok();
    host.assert_free("/run/free");
    owners[2].call(&release("", "/run/robbed")).expect_ok();
    drop(robber);
    // A process that another test is just starting may have a copy of the robber's descriptor.
    host.wait_free("/run/robbed");
}

#[test]
fn sockets_that_libvirts_daemon_was_activated_with_are_served_on() {
    let Some(theirs) = theirs() else { return };
    let host = Host::with(&theirs);
    let (mut daemon, socket) = host.start_activated();
    let disk = host.disk("disk");
    let mut guest = Owner::register(&socket, "guest", OnTerm::Die);
    // libvirt's daemon would die of a connection that has not registered.
    let register = register_as("guest", guest.pid());
    let mut client = Client::connect(&socket);
    client.call(&register).expect_ok();
    guest.call(&acquire("", &disk, 0)).expect_ok();
    for program in [daemon::program(), theirs, daemon::program()] {
        host.install(&program);
        upgrade(&daemon);
        client.ping();
        Client::connect(&socket).call(&register).expect_ok();
        Client::connect(&host.path(ACTIVATED_ADMIN)).ping();
        host.assert_held(&disk);
    }
    guest.call(&release("", &disk)).expect_ok();
    drop(guest);
    assert_eq!(daemon.stop().code(), Some(0));
    assert!(socket.exists(), "it is the service manager's");
}

#[test]
fn a_daemon_in_the_background_stays_the_same_process() {
    let Some(theirs) = theirs() else { return };
    let host = Host::with(&theirs);
    let daemon = Background::start(&host, host.namespace.command(PROGRAM).arg("-d"));
    let pid_file = || std::fs::read_to_string(host.path("/run/virtlockd.pid")).expect("a pid file");
    let text = pid_file();
    let socket = host.path(LOCK_SOCKET);
    let disk = host.disk("disk");
    let mut guest = Owner::register(&socket, "guest", OnTerm::Die);
    guest.call(&acquire("", &disk, 0)).expect_ok();
    for program in [
        daemon::program(),
        daemon::program(),
        theirs,
        daemon::program(),
    ] {
        host.install(&program);
        daemon.upgrade();
        guest.call(&register_as("guest", guest.pid())).expect_ok();
        host.assert_held(&disk);
        assert_eq!(pid_file().trim(), text.trim());
    }
    guest.call(&release("", &disk)).expect_ok();
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    wait_until(DEADLINE, "the end of the daemon", || {
        image(daemon.pid).is_empty()
    });
    assert!(!socket.exists());
}

/// A process that has open what a document speaks of, and then becomes our daemon: descriptor 10
/// and 11 listen, 12 is the test's connection, 13 is the disk, exclusively locked as libvirt does
/// it, 14 another one, shared. The last word gives some of them other numbers.
const FORERUNNER: &str = r#"
import fcntl, os, socket, sys
numbers = {int(a): int(b) for a, b in (pair.split('=') for pair in sys.argv[4].split())}
def keep(number, what):
    os.dup2(what, numbers.get(number, number))
    os.close(what)
# The lock socket last: whoever gets through to it finds the other one, too.
for number, path in [(11, sys.argv[3]), (10, sys.argv[2])]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(5)
    keep(number, listener.detach())
listener = socket.socket(fileno=os.dup(numbers.get(10, 10)))
keep(12, listener.accept()[0].detach())
listener.close()
for number in (10, 11, 12):
    os.set_blocking(numbers.get(number, number), False)
for number, path, kind in [(13, '/run/disk', fcntl.LOCK_EX), (14, '/run/shared', fcntl.LOCK_SH)]:
    keep(number, os.open(path, os.O_RDWR))
    fcntl.lockf(numbers.get(number, number), kind, 1, 0)
text = open('/run/document', 'rb').read().replace(b'@PID@', str(os.getpid()).encode())
open('/run/virtlockd-restart-exec.json', 'wb').write(text)
os.closerange(15, 100)
os.execv(sys.argv[1], [sys.argv[1]])
"#;

/// The document that libvirt 11.3 writes.
fn document(guest: i32) -> Value {
    let sock = |fd: i32, client: bool| json!({"fd": fd, "errfd": -1, "pid": 0, "isClient": client, "unlinkUNIX": !client});
    let server = |fd: i32, clients: Value| {
        json!({
            "min_workers": 0, "max_workers": 0, "priority_workers": 0,
            "max_clients": 1024, "max_anonymous_clients": 1024,
            "keepaliveInterval": 4294967295u32, "keepaliveCount": 0, "next_client_id": 7,
            "services": [{"auth": 0, "readonly": false, "nrequests_client_max": 1,
                          "socks": [sock(fd, false)]}],
            "clients": clients,
        })
    };
    let client = json!({
        "id": 6, "auth": 0, "auth_pending": false, "readonly": false, "nrequests_max": 1,
        "conn_time": 1795325633, "sock": sock(12, true),
        "privateData": {"restricted": false, "ownerPid": guest, "ownerId": 7,
            "ownerName": "guest", "ownerUUID": "10111213-1415-1617-1819-1a1b1c1d1e1f"},
    });
    let resource = |name: &str, fd: i32, flags: u32| {
        json!({"name": name, "path": name, "fd": fd, "lockHeld": true, "flags": flags,
               "owners": [guest]})
    };
    json!({
        "daemon": {"servers": {"admin": server(11, json!([])),
                               "virtlockd": server(10, json!([client]))}},
        "defaultLockspace": {
            "resources": [resource("/run/disk", 13, 0), resource("/run/shared", 14, 1)]},
        "lockspaces": [],
        "magic": "@PID@",
    })
}

/// Greater than any process id can be (PID_MAX_LIMIT).
const NO_PROCESS: &str = "4194305";

/// What a daemon made of a document.
struct Outcome {
    host: Host,
    daemon: Daemon,
    client: Client,
    /// The process that the document names as owner.
    owner: Child,
}

impl Outcome {
    fn of(text: impl FnOnce(i32) -> Vec<u8>) -> Outcome {
        Outcome::with(&[], text)
    }

    /// Some descriptors have other numbers than [`FORERUNNER`] says.
    fn with(numbers: &[(i32, i32)], text: impl FnOnce(i32) -> Vec<u8>) -> Outcome {
        let numbers: Vec<String> = numbers
            .iter()
            .map(|(usual, number)| format!("{usual}={number}"))
            .collect();
        let host = Host::new();
        host.disk("disk");
        host.disk("shared");
        let owner = Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("start an owner");
        let guest = i32::try_from(owner.id()).expect("a pid");
        std::fs::write(host.path("/run/document"), text(guest)).expect("write the document");
        let daemon = Daemon::spawn(
            Path::new("/usr/bin/python3"),
            &host.namespace,
            &[
                "-c",
                FORERUNNER,
                PROGRAM,
                LOCK_SOCKET,
                ADMIN_SOCKET,
                &numbers.join(" "),
            ],
            &[("LIBVIRT_DEBUG", "2"), ("LIBVIRT_LOG_OUTPUTS", "2:stderr")],
        );
        let socket = host.path(LOCK_SOCKET);
        let stream = support::wait_for(DEADLINE, "the forerunner to listen", || {
            UnixStream::connect(&socket).ok()
        });
        Outcome {
            host,
            daemon,
            client: Client::over(stream),
            owner,
        }
    }

    /// Of the document that libvirt 11 writes, with a change.
    fn of_changed(change: impl FnOnce(&mut Value)) -> Outcome {
        Outcome::of(|guest| {
            let mut document = document(guest);
            change(&mut document);
            document.to_string().into_bytes()
        })
    }

    /// The locks, the connection and the sockets have been taken over.
    #[track_caller]
    fn expect_taken_over(self) {
        self.expect_taken_over_with(|| ());
    }

    /// As [`Outcome::expect_taken_over`], and this holds at the end.
    #[track_caller]
    fn expect_taken_over_with(mut self, holds: impl FnOnce()) {
        self.client.ping();
        self.host.assert_held("/run/disk");
        assert!(lock_probe(&self.host.path("/run/shared")).is_some());
        assert!(!self.host.path(DOCUMENT).exists(), "adopted, so removed");
        self.client
            .call(&acquire("", "/run/shared", SHARED))
            .expect_ok();
        self.daemon.client().ping();
        self.client.call(&release("", "/run/disk")).expect_ok();
        self.host.assert_free("/run/disk");
        upgrade(&self.daemon);
        for _ in 0..2 {
            assert!(lock_probe(&self.host.path("/run/shared")).is_some());
            self.client.call(&release("", "/run/shared")).expect_ok();
        }
        self.host.assert_free("/run/shared");
        assert_eq!(self.daemon.stop().code(), Some(0));
        holds();
    }

    /// Nothing has been taken over: exit 3, with this in the log.
    #[track_caller]
    fn expect_refused(mut self, reason: &str) -> Outcome {
        assert_eq!(
            self.daemon.wait_end().code(),
            Some(3),
            "{}",
            self.daemon.stderr()
        );
        let log = self.daemon.stderr();
        assert!(log.contains(reason), "'{reason}' is not in:\n{log}");
        self
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        let _ = self.owner.kill();
        let _ = self.owner.wait();
    }
}

fn lock_server(document: &mut Value) -> &mut Value {
    &mut document["daemon"]["servers"]["virtlockd"]
}

#[test]
fn a_document_as_libvirt_11_writes_it_is_taken_over() {
    if !require_root() {
        return;
    }
    let outcome = Outcome::of_changed(|_| ());
    Client::connect(&outcome.host.path(ADMIN_SOCKET)).ping();
    outcome.expect_taken_over();
}

#[test]
fn a_document_with_a_list_of_one_server_is_taken_over() {
    if !require_root() {
        return;
    }
    Outcome::of_changed(|document| {
        let server = lock_server(document).take();
        document["daemon"]["servers"] = json!([server]);
    })
    .expect_taken_over();
}

#[test]
fn a_document_whose_daemon_is_the_lock_server_itself_is_taken_over() {
    if !require_root() {
        return;
    }
    Outcome::of_changed(|document| {
        document["daemon"] = lock_server(document).take();
    })
    .expect_taken_over();
}

#[test]
fn a_very_old_document_with_a_server_instead_of_a_daemon_is_taken_over() {
    if !require_root() {
        return;
    }
    Outcome::of_changed(|document| {
        document["server"] = lock_server(document).take();
        document
            .as_object_mut()
            .expect("an object")
            .remove("daemon");
    })
    .expect_taken_over();
}

#[test]
fn a_document_without_its_optional_keys_is_taken_over() {
    if !require_root() {
        return;
    }
    Outcome::of_changed(|document| {
        let remove = |value: &mut Value, keys: &[&str]| {
            for key in keys {
                let object = value.as_object_mut().expect("an object");
                assert!(object.remove(*key).is_some(), "{key}");
            }
        };
        let server = lock_server(document);
        remove(server, &["max_anonymous_clients", "next_client_id"]);
        remove(&mut server["services"][0]["socks"][0], &["unlinkUNIX"]);
        let client = &mut server["clients"][0];
        remove(client, &["id", "auth_pending", "conn_time"]);
        remove(&mut client["sock"], &["unlinkUNIX"]);
    })
    .expect_taken_over();
}

#[test]
fn a_document_of_another_process_is_removed_and_the_daemon_starts_afresh() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut stale = document(1);
    stale["magic"] = json!(NO_PROCESS);
    std::fs::write(host.path(DOCUMENT), stale.to_string()).expect("write the document");
    let daemon = host.start(&[], &[]);
    let warning = format!("Found restart exec file with old magic {NO_PROCESS} vs wanted");
    assert!(daemon.stderr().contains(&warning), "{}", daemon.stderr());
    assert!(!host.path(DOCUMENT).exists(), "the document is removed");
    let disk = host.disk("disk");
    let _guest = host.guest(&daemon, "guest", &disk);
    upgrade(&daemon);
    host.assert_held(&disk);
}

#[test]
fn a_stray_start_leaves_the_document_of_a_running_daemon_alone() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let daemon = host.start(&[], &[]);
    let mut whole = document(1);
    whole["magic"] = json!(daemon.pid().to_string());
    let whole = whole.to_string();
    // As the daemon writes it, and as its successor would find it.
    for (text, words, code) in [
        (&whole[..whole.len() / 2], &[][..], 3),
        (&whole, &[], 1),
        (&whole, &["-p", "/run/other.pid"], 6),
    ] {
        std::fs::write(host.path(DOCUMENT), text).expect("write the document");
        let program = Path::new(PROGRAM);
        let mut stray = Daemon::spawn(program, &host.namespace, words, &[]);
        let ended = stray.wait_end().code();
        assert_eq!(ended, Some(code), "{}", stray.stderr());
        let left = std::fs::read_to_string(host.path(DOCUMENT)).expect("the document");
        assert_eq!(left, text);
    }
    daemon.client().ping();
}

/// What a daemon has that was started with standard input, output and error closed: in turn sockets and
/// disks have their numbers.
#[test]
fn a_descriptor_0_1_or_2_of_libvirts_daemon_is_taken_over_and_nothing_is_written_to_it() {
    if !require_root() {
        return;
    }
    for numbers in [
        &[(10, 0), (11, 1), (12, 2)][..],
        &[(12, 0), (10, 1), (13, 2)],
        &[(13, 0), (14, 1), (10, 2)],
        &[(14, 2)],
    ] {
        let mut outcome = Outcome::with(numbers, |guest| {
            let mut document = document(guest);
            let number = |usual: i32| {
                let found = numbers.iter().find(|(from, _)| *from == usual);
                json!(found.map_or(usual, |(_, number)| *number))
            };
            let servers = &mut document["daemon"]["servers"];
            servers["admin"]["services"][0]["socks"][0]["fd"] = number(11);
            let server = &mut servers["virtlockd"];
            server["services"][0]["socks"][0]["fd"] = number(10);
            server["clients"][0]["sock"]["fd"] = number(12);
            for (place, usual) in [(0, 13), (1, 14)] {
                document["defaultLockspace"]["resources"][place]["fd"] = number(usual);
            }
            document.to_string().into_bytes()
        });
        outcome.client.ping();
        // What the daemon says of this goes to standard error, if it is one.
        let again = outcome.client.call(&acquire("", "/run/disk", 0));
        again.expect_error(87, 51);
        upgrade(&outcome.daemon);
        outcome.client.ping();
        outcome.host.assert_held("/run/disk");
        let disks = ["/run/disk", "/run/shared"].map(|disk| outcome.host.path(disk));
        outcome.expect_taken_over_with(|| {
            for disk in &disks {
                assert_eq!(
                    std::fs::read(disk).expect("read a disk"),
                    b"",
                    "{numbers:?}"
                );
            }
        });
    }
}

#[test]
fn a_damaged_document_ends_the_start_and_is_kept() {
    if !require_root() {
        return;
    }
    let whole = |guest| document(guest).to_string().into_bytes();
    let outcome = Outcome::of(|guest| {
        let whole = whole(guest);
        whole[..whole.len() / 2].to_vec()
    });
    let outcome = outcome.expect_refused("is damaged and cannot be taken over");
    assert!(!outcome.host.path(DOCUMENT).exists());
    let kept = outcome.host.path(format!("{DOCUMENT}.damaged"));
    let kept = std::fs::read(kept).expect("the damaged document");
    assert!(kept.starts_with(b"{\"daemon\""));
    let without = |key: &'static str, reason: &'static str| {
        let outcome = Outcome::of_changed(|document| {
            document.as_object_mut().expect("an object").remove(key);
        });
        let outcome = outcome.expect_refused(reason);
        assert!(outcome.host.path(format!("{DOCUMENT}.damaged")).exists());
    };
    without("magic", "it has no magic");
    without("daemon", "it has no daemon");
    without("defaultLockspace", "defaultLockspace");
    without("lockspaces", "lockspaces");
}

#[test]
fn a_document_that_speaks_of_what_is_not_open_ends_the_start_and_is_kept() {
    if !require_root() {
        return;
    }
    type Damage = fn(&mut Value);
    let damages: [(Damage, &str); 6] = [
        (
            |document| document["defaultLockspace"]["resources"][0]["fd"] = json!(77),
            "descriptor 77",
        ),
        (
            |document| document["defaultLockspace"]["resources"][0]["fd"] = json!(14),
            "uses descriptor 14 twice",
        ),
        (
            |document| lock_server(document)["clients"][0]["sock"]["fd"] = json!(-1),
            "uses descriptor -1",
        ),
        (
            // Standard output, which is a file.
            |document| lock_server(document)["clients"][0]["sock"]["fd"] = json!(1),
            "a client cannot be watched",
        ),
        (
            |document| {
                let server = lock_server(document).take();
                document["daemon"]["servers"]["virtlogd"] = server;
                let servers = document["daemon"]["servers"].as_object_mut();
                servers.expect("an object").remove("virtlockd");
            },
            "unknown server 'virtlogd'",
        ),
        (
            |document| lock_server(document)["clients"][0]["privateData"] = json!({}),
            "'restricted' is missing",
        ),
    ];
    for (damage, reason) in damages {
        let outcome = Outcome::of_changed(|document| {
            damage(document);
        });
        let outcome = outcome.expect_refused(reason);
        let kept = [DOCUMENT.to_owned(), format!("{DOCUMENT}.damaged")];
        assert!(
            kept.iter().any(|path| outcome.host.path(path).exists()),
            "{reason}"
        );
    }
}

#[test]
fn a_name_in_a_document_may_be_any_bytes() {
    if !require_root() {
        return;
    }
    Outcome::of(|guest| {
        let text = document(guest).to_string().into_bytes();
        let at = text
            .windows(7)
            .position(|piece| piece == b"\"guest\"")
            .expect("the owner's name");
        [&text[..at + 1], b"caf\xe9\\u0001", &text[at + 6..]].concat()
    })
    .expect_taken_over();
}

#[test]
fn a_disk_that_is_where_standard_error_was_is_not_written_to_when_the_ledger_cannot_be_read() {
    if !require_root() {
        return;
    }
    let mut outcome = Outcome::with(&[(14, 2)], |guest| {
        let mut document = document(guest);
        document["defaultLockspace"]["resources"][1]["fd"] = json!(2);
        document.to_string().into_bytes()
    });
    outcome.client.ping();
    let (guardian, reactor) = (outcome.daemon.pid(), outcome.daemon.reactor());
    let open = std::fs::read_dir(format!("/proc/{reactor}/fd")).expect("its descriptors");
    let is_ledger = |path: &std::path::PathBuf| {
        let file = std::fs::read_link(path).unwrap_or_default();
        file.to_string_lossy().contains("ledger")
    };
    let mut paths = open.filter_map(|it| Some(it.ok()?.path()));
    let ledger = paths.find(is_ledger).expect("its ledger");
    let ledger = std::fs::File::options().write(true).open(ledger);
    let ledger = ledger.expect("open its ledger");
    std::os::unix::fs::FileExt::write_all_at(&ledger, b"NOLEDGER", 0).expect("spoil it");
    let kill = |process| {
        let process = nix::unistd::Pid::from_raw(process);
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).expect("kill it");
    };
    kill(reactor);
    wait_until(DEADLINE, "another process to come and go", || {
        let is_alone = || daemon::reactor_of(guardian) == guardian;
        // It is only tried again after a while.
        is_alone() && {
            std::thread::sleep(std::time::Duration::from_millis(500));
            is_alone()
        }
    });
    let shared = outcome.host.path("/run/shared");
    assert_eq!(std::fs::read(shared).expect("read a disk"), b"");
    outcome.host.assert_held("/run/disk");
}

#[test]
fn what_a_supervisor_passed_on_stays_open_when_a_process_dies_that_went_on_for_libvirts_daemon() {
    let Some(theirs) = theirs() else { return };
    let host = Host::with(&theirs);
    let script = format!(
        "import os; os.dup2(os.open('/dev/null', 0), 40); os.execv('{PROGRAM}', ['{PROGRAM}'])"
    );
    let python = std::path::Path::new("/usr/bin/python3");
    let mut daemon = Daemon::spawn(python, &host.namespace, &["-c", &script], &[]);
    let socket = host.path(LOCK_SOCKET);
    daemon.wait_for_socket(&socket);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    host.install(&daemon::program());
    upgrade(&daemon);
    guest.call(&acquire("", &disk, 0)).expect_error(87, 51);
    let reactor = nix::unistd::Pid::from_raw(daemon.reactor());
    nix::sys::signal::kill(reactor, nix::sys::signal::Signal::SIGKILL).expect("kill it");
    guest.call(&acquire("", &disk, 0)).expect_error(87, 51);
    assert_ne!(daemon.reactor(), reactor.as_raw());
    let passed_on = format!("/proc/{}/fd/40", daemon.pid());
    assert!(std::path::Path::new(&passed_on).exists());
    host.assert_held(&disk);
}
