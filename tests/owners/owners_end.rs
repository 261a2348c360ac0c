//! The end of an owner and the end of the daemon: whose locks are freed, when, and who is killed
//! for it. The owners are real processes, and their locks are looked at from outside.

use crate::support;
use crate::support::client::{
    AUTOCREATE, Call, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, Reply, SHARED, UUID, acquire,
    new_lockspace, register, register_as, release,
};
use crate::support::daemon::{ADMIN_SOCKET, Daemon, LOCK_SOCKET, WATCHED, c_daemon, program};
use crate::support::namespace::Namespace;
use crate::support::owner::{NOBODY, OnTerm, Owner, process_state, rival, runs};
use crate::support::upgrade::image;
use crate::support::{DEADLINE, TempDir, lock_probe, wait_for, wait_until};
use nix::sys::signal::Signal;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What an owner has between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(1600);
/// How long nothing is to happen. Long enough for whatever would happen wrongly: the daemon acts
/// at once, or 1.6 s later.
const A_WHILE: Duration = Duration::from_millis(2500);

/// How many owners hold locks when the daemon ends.
const OWNERS_AT_THE_END: u32 = 20;
/// For what takes 30 s.
const SLOW_DEADLINE: Duration = Duration::from_secs(60);
/// The configuration file, in the namespace.
const CONFIGURATION: &str = "/run/virtlockd.conf";
/// Where strace writes to, in the namespace.
const TRACE: &str = "/run/strace";

/// A daemon and a directory with disks.
struct Scene {
    daemon: Daemon,
    namespace: Namespace,
    disks: TempDir,
}

impl Scene {
    /// `None`, with a skip, where there can be no daemon of its own.
    fn new() -> Option<Scene> {
        Scene::with(&[], &[])
    }

    fn with(args: &[&str], env: &[(&str, &str)]) -> Option<Scene> {
        Scene::under(&[], args, env)
    }

    /// The daemon is started by another program, which these words run.
    fn under(words: &[&str], args: &[&str], env: &[(&str, &str)]) -> Option<Scene> {
        if !can_run() {
            return None;
        }
        let namespace = Namespace::new();
        let program = program();
        let mut line = words.to_vec();
        line.push(program.to_str().expect("a path in UTF-8"));
        line.extend_from_slice(args);
        let daemon = Daemon::start_program(Path::new(line[0]), &namespace, &line[1..], env);
        Some(Scene {
            daemon,
            namespace,
            disks: TempDir::new(),
        })
    }

    /// The daemon under strace, which makes some of its system calls fail and writes down the
    /// `traced` ones, see [`Scene::trace`].
    fn with_calls_that_fail(injection: &str, traced: &str) -> Option<Scene> {
        if !support::require_strace() {
            return None;
        }
        let traced = format!("trace={traced}");
        // -D: the daemon is the process that was started, and strace its child.
        let words = [
            "strace", "-D", "-f", "-o", TRACE, "-e", &traced, "-e", injection,
        ];
        Scene::under(&words, &[], &[WATCHED])
    }

    /// What strace has written down.
    fn trace(&self) -> String {
        std::fs::read_to_string(self.namespace.path(TRACE)).expect("read what strace saw")
    }

    /// With a configuration file of this text.
    fn configured(text: &str) -> Option<Scene> {
        if !can_run() {
            return None;
        }
        let namespace = Namespace::new();
        std::fs::write(namespace.path(CONFIGURATION), text).expect("write the configuration");
        let daemon = Daemon::start(&namespace, &["-f", CONFIGURATION], &[]);
        Some(Scene {
            daemon,
            namespace,
            disks: TempDir::new(),
        })
    }

    /// How many descriptors the daemon may have from now on.
    fn limit_descriptors(&self, count: usize) {
        self.daemon.limit(&format!("--nofile={count}:"));
    }

    fn configure(&self, text: &str) {
        let file = self.namespace.path(CONFIGURATION);
        std::fs::write(file, text).expect("write the configuration");
    }

    fn remove_configuration(&self) {
        let file = self.namespace.path(CONFIGURATION);
        std::fs::remove_file(file).expect("remove the configuration");
    }

    fn disk(&self, name: &str) -> PathBuf {
        let path = self.disks.path().join(name);
        std::fs::write(&path, "data").expect("write a disk");
        path
    }

    fn owner(&self, name: &str, on_term: OnTerm) -> Owner {
        Owner::register(self.daemon.lock_socket(), name, on_term)
    }

    /// An owner that holds an exclusive lock on a disk of its name.
    fn owner_with_disk(&self, name: &str, on_term: OnTerm) -> (Owner, PathBuf) {
        let disk = self.disk(name);
        let mut owner = self.owner(name, on_term);
        owner.call(&take(&disk)).expect_ok();
        (owner, disk)
    }

    /// A client that is nobody's owner: its pid is not its own.
    fn stranger(&self) -> Client {
        let mut client = self.daemon.client();
        client.call(&register_as("stranger", 1)).expect_ok();
        client
    }

    /// How many lines of the daemon's log contain all of these.
    #[track_caller]
    fn logged(&self, words: &[&str]) -> usize {
        let log = self.daemon.stderr();
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        log.lines().filter(has_all).count()
    }
}

/// True where the rules of this file hold: libvirt's daemon frees before it kills, kills one owner
/// after the other, and dies of SIGHUP.
fn can_run() -> bool {
    if c_daemon().is_some_and(|path| path == program()) {
        support::skip("libvirt's own daemon has other rules for the end of an owner");
        return false;
    }
    support::require_root()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn take(disk: &Path) -> Call {
    acquire("", text(disk), 0)
}

fn wait_until_free(disk: &Path) {
    wait_until(DEADLINE, "the end of a lock", || lock_probe(disk).is_none());
}

#[test]
fn the_locks_of_a_killed_owner_are_free_before_anybody_reaps_it() {
    let Some(scene) = Scene::new() else { return };
    let (mut owner, disk) = scene.owner_with_disk("victim", OnTerm::Die);
    owner.kill();
    wait_until_free(&disk);
    assert_eq!(process_state(owner.pid()), Some('Z'), "not reaped so far");
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.stranger().call(&take(&disk)).expect_ok();
}

#[test]
fn an_owner_that_closes_its_connection_is_ended_and_its_lock_is_never_free_before() {
    for (on_term, signal, least) in [
        (OnTerm::Die, Signal::SIGTERM, Duration::ZERO),
        (OnTerm::Ignore, Signal::SIGKILL, GRACE),
    ] {
        let Some(scene) = Scene::new() else { return };
        let (mut owner, disk) = scene.owner_with_disk("leaver", on_term);
        let (pid, give_up) = (owner.pid(), AtomicBool::new(false));
        let (free_at, owner_ran, closed_at) = std::thread::scope(|scope| {
            let rival = scope.spawn(|| rival(&disk, pid, &give_up));
            let closed_at = Instant::now();
            owner.close_connection();
            assert_eq!(owner.wait_signal(), Some(signal as i32), "{on_term:?}");
            wait_until(DEADLINE, "the rival to get the lock", || {
                rival.is_finished()
            });
            give_up.store(true, Ordering::Relaxed);
            let (free_at, owner_ran) = rival
                .join()
                .expect("the rival's thread")
                .expect("it has the lock");
            (free_at, owner_ran, closed_at)
        });
        assert!(!owner_ran, "{on_term:?}: the lock was free while it lived");
        let took = free_at - closed_at;
        assert!(took >= least, "{on_term:?}: SIGKILL came after {took:?}");
    }
}

#[test]
fn many_owners_are_ended_at_once_and_a_bystander_is_answered_meanwhile() {
    const OWNERS: u32 = 50;
    let Some(scene) = Scene::new() else { return };
    let mut owners: Vec<(Owner, PathBuf)> = (0..OWNERS)
        .map(|number| scene.owner_with_disk(&format!("guest{number}"), OnTerm::Ignore))
        .collect();
    let mut bystander = scene.stranger();
    let other = scene.disk("other");
    bystander.call(&take(&other)).expect_ok();

    let first_closed = Instant::now();
    for (owner, _) in &mut owners {
        owner.close_connection();
    }
    let last_closed = Instant::now();
    let mut longest = Duration::ZERO;
    while owners.iter().any(|(owner, _)| runs(owner.pid())) {
        let asked = Instant::now();
        bystander.ping();
        bystander.call(&release("", text(&other))).expect_ok();
        bystander.call(&take(&other)).expect_ok();
        longest = longest.max(asked.elapsed());
        assert!(first_closed.elapsed() < DEADLINE, "owners live on");
    }
    let took = last_closed.elapsed();
    eprintln!("{OWNERS} owners dead {took:?} after the last had left; a call waited {longest:?}");
    assert!(first_closed.elapsed() >= GRACE);
    // One after the other they would take 1.6 s each.
    assert!(
        took < GRACE * OWNERS / 10,
        "not at the same time: {took:?} after the last had left"
    );
    assert!(longest < GRACE, "a bystander had to wait: {longest:?}");
    for (owner, disk) in &mut owners {
        assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
        wait_until_free(disk);
    }
}

#[test]
fn a_connection_of_somebody_else_frees_nothing_when_it_ends() {
    let Some(scene) = Scene::new() else { return };
    let (mut owner, disk) = scene.owner_with_disk("guest", OnTerm::Die);

    // As libvirtd does to plug a disk: registered as the guest, from another process.
    let plugged = scene.disk("plugged");
    let mut libvirtd = scene.daemon.client();
    libvirtd
        .call(&register_as("guest", owner.pid()))
        .expect_ok();
    libvirtd.call(&take(&plugged)).expect_ok();
    drop(libvirtd);
    // Without any owner at all.
    let mut nobody = scene.daemon.client();
    nobody.ping();
    drop(nobody);

    std::thread::sleep(A_WHILE);
    assert!(owner.is_alive());
    assert!(lock_probe(&disk).is_some() && lock_probe(&plugged).is_some());
    // The end of its own connection frees both.
    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(Signal::SIGTERM as i32));
    wait_until_free(&disk);
    wait_until_free(&plugged);
}

#[test]
fn an_owner_without_locks_may_leave_and_live() {
    let Some(scene) = Scene::new() else { return };
    let (mut owner, disk) = scene.owner_with_disk("guest", OnTerm::Die);
    owner.call(&release("", text(&disk))).expect_ok();
    owner.close_connection();
    std::thread::sleep(A_WHILE);
    assert!(owner.is_alive());
    assert_eq!(
        scene.logged(&["guest"]),
        0,
        "nothing to say about it:\n{}",
        scene.daemon.stderr()
    );
}

#[test]
fn an_owner_with_two_connections_has_left_when_both_are_over() {
    let Some(scene) = Scene::new() else { return };
    let disks = [scene.disk("first"), scene.disk("second")];
    let mut owner = scene.owner("guest", OnTerm::Ignore);
    owner.call(&take(&disks[0])).expect_ok();
    owner.connect_again();
    owner.call(&register_as("guest", owner.pid())).expect_ok();
    owner.call(&take(&disks[1])).expect_ok();
    owner.close_connection();
    owner.use_connection(0);
    // It is answered behind what becomes of the end of the other.
    owner.call(&take(&disks[1])).expect_error(87, 51);
    scene.daemon.wait_until_asleep();
    assert!(owner.is_alive());
    assert!(disks.iter().all(|disk| lock_probe(disk).is_some()));
    assert_eq!(scene.logged(&["'guest'", "SIGTERM now"]), 0);
    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    for disk in &disks {
        wait_until_free(disk);
    }
    assert_eq!(
        scene.logged(&["'guest'", "SIGTERM now"]),
        1,
        "fenced once:\n{}",
        scene.daemon.stderr()
    );
}

#[test]
fn a_shared_lock_taken_many_times_is_free_when_its_owner_is_dead() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.disk("shared");
    let mut owner = scene.owner("guest", OnTerm::Die);
    for _ in 0..3 {
        owner.call(&acquire("", text(&disk), SHARED)).expect_ok();
    }
    // A lock that was taken once tells when the owner's end has been handled.
    let once = scene.disk("once");
    owner.call(&take(&once)).expect_ok();
    let mut other = scene.stranger();
    other.call(&acquire("", text(&disk), SHARED)).expect_ok();
    owner.close_connection();
    wait_until_free(&once);
    assert!(lock_probe(&disk).is_some(), "the other one's is left");
    other.call(&release("", text(&disk))).expect_ok();
    assert!(lock_probe(&disk).is_none());
    other.call(&take(&disk)).expect_ok();
}

#[test]
fn a_peer_that_the_daemon_cannot_see_stands_for_nobody() {
    // In a pid namespace of its own the daemon sees pid 0 for whoever connects from outside.
    let words = ["unshare", "--pid", "--fork", "--kill-child"];
    let Some(scene) = Scene::under(&words, &[], &[]) else {
        return;
    };
    for number in [0, 1] {
        let disk = scene.disk(&format!("disk{number}"));
        let mut owner = Owner::connect(scene.daemon.lock_socket(), OnTerm::Die);
        let pid = if number == 0 { 0 } else { owner.pid() };
        owner.call(&register_as("unseen", pid)).expect_ok();
        owner.call(&take(&disk)).expect_ok();
        owner.close_connection();
        std::thread::sleep(A_WHILE);
        assert!(owner.is_alive(), "registered as {pid}");
        assert!(lock_probe(&disk).is_some(), "registered as {pid}");
        let mut client = scene.daemon.client();
        client.call(&register_as("unseen", pid)).expect_ok();
        client.call(&release("", text(&disk))).expect_ok();
    }
}

#[test]
fn owners_are_ended_on_kernels_that_do_not_name_the_process_of_a_peer() {
    // The first question that the daemon asks a socket is whether the kernel can.
    let injection = "inject=getsockopt:error=ENOPROTOOPT:when=1";
    let traced = "getsockopt,pidfd_open";
    let Some(scene) = Scene::with_calls_that_fail(injection, traced) else {
        return;
    };
    for (on_term, signal) in [
        (OnTerm::Die, Signal::SIGTERM),
        (OnTerm::Ignore, Signal::SIGKILL),
    ] {
        let (mut owner, disk) = scene.owner_with_disk("leaver", on_term);
        owner.close_connection();
        assert_eq!(owner.wait_signal(), Some(signal as i32));
        wait_until_free(&disk);
    }
    let (owner, disk) = scene.owner_with_disk("victim", OnTerm::Die);
    owner.kill();
    wait_until_free(&disk);
    let opened = format!("pidfd_open({}", owner.pid());
    let trace = scene.trace();
    assert!(trace.contains(&opened), "not the way meant:\n{trace}");
}

#[test]
fn a_want_of_descriptors_at_the_start_is_no_older_kernel() {
    let inject = |count: usize| format!("inject=socketpair:error=EMFILE:when=1..{count}");
    let traced = "socketpair,getsockopt";
    let Some(scene) = Scene::with_calls_that_fail(&inject(3), traced) else {
        return;
    };
    let is_named_by_the_kernel = |scene: &Scene| {
        let (mut owner, disk) = scene.owner_with_disk("leaver", OnTerm::Die);
        owner.close_connection();
        assert_eq!(owner.wait_signal(), Some(Signal::SIGTERM as i32));
        wait_until_free(&disk);
        // The kernel was asked whether it names peers, and then for this one, to know it again and to
        // fence it. Not every strace knows SO_PEERPIDFD by name.
        let trace = scene.trace();
        let is_named = |line: &&str| {
            (line.contains("SO_PEERPIDFD") || line.contains("0x4d")) && line.ends_with("= 0")
        };
        assert_eq!(trace.lines().filter(is_named).count(), 3, "{trace}");
    };
    is_named_by_the_kernel(&scene);
    scene.daemon.wait_until_asleep();
    // Room for one client and its disk, but not for what the question takes.
    let limit = scene.daemon.descriptors() + 2;
    drop(scene);
    let limit = format!("--nofile={limit}:{limit}");
    let traced = format!("trace={traced}");
    let words = ["strace", "-D", "-f", "-o", TRACE, "-e", &traced];
    let words = [&["prlimit", &limit][..], &words].concat();
    if let Some(scene) = Scene::under(&words, &[], &[WATCHED]) {
        is_named_by_the_kernel(&scene);
    }
}

/// A daemon on a kernel that does not name the process of a peer.
fn on_an_older_kernel(traced: &str) -> Option<Scene> {
    Scene::with_calls_that_fail("inject=socketpair:error=EOPNOTSUPP", traced)
}

#[test]
fn a_client_whose_process_cannot_be_looked_at_is_turned_away_on_older_kernels() {
    let Some(scene) = on_an_older_kernel("socketpair") else {
        return;
    };
    let mut earlier = scene.owner("earlier", OnTerm::Die);
    let mut unmount = scene.namespace.command("umount");
    let status = unmount.args(["-l", "/proc"]).status();
    assert!(status.expect("run umount").success());
    let mut late = Owner::connect(scene.daemon.lock_socket(), OnTerm::Die);
    let refused = late.try_call(&register_as("late", late.pid()));
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(scene.logged(&["turned away", "cannot be looked at"]), 1);
    earlier.call(&take(&scene.disk("disk"))).expect_ok();
}

#[test]
fn what_a_dead_client_sent_counts_on_older_kernels_too() {
    let Some(scene) = on_an_older_kernel("socketpair") else {
        return;
    };
    let disk = scene.disk("disk");
    let words = [register_as("dead", 1).frame(0), take(&disk).frame(1)].concat();
    let script = "import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(bytes.fromhex(sys.argv[2]))";
    scene.daemon.signal(Signal::SIGSTOP);
    let mut client = Command::new("python3");
    client.arg("-c").arg(script).arg(scene.daemon.lock_socket());
    let status = client.arg(support::owner::to_hex(&words)).status();
    assert!(status.expect("run python3").success());
    scene.daemon.signal(Signal::SIGCONT);
    wait_until(DEADLINE, "the lock of the client that is gone", || {
        lock_probe(&disk).is_some()
    });
    assert_eq!(scene.logged(&["turned away"]), 0);
}

/// Starts an owner that gets the pid of one that is gone. Other processes of the machine are in
/// the way at times; `None`, with a skip, where numbers cannot be chosen.
fn owner_with_pid(scene: &Scene, pid: i32) -> Option<Owner> {
    let before = (pid - 1).to_string();
    wait_for(DEADLINE, "a process to get that pid", || {
        if let Err(error) = std::fs::write("/proc/sys/kernel/ns_last_pid", &before) {
            support::skip(&format!("cannot choose the pid of a process: {error}"));
            return Some(None);
        }
        let owner = Owner::connect(scene.daemon.lock_socket(), OnTerm::Die);
        (owner.pid() == pid).then_some(Some(owner))
    })
}

/// An owner is dead, somebody else keeps its connection open, and its number belongs to another
/// process when that connection ends at last.
fn number_is_used_again(scene: &Scene) {
    for is_owner_again in [false, true] {
        let (mut first, disk) = scene.owner_with_disk("first", OnTerm::Die);
        let (pid, borrower) = (first.pid(), first.lend_connection());
        first.kill();
        first.wait_end();
        // Start times, which older kernels offer, count in hundredths of a second. Without a choice
        // no number comes again so soon.
        std::thread::sleep(Duration::from_millis(30));
        let Some(mut second) = owner_with_pid(scene, pid) else {
            return;
        };
        let own = scene.disk("second");
        if is_owner_again {
            second.call(&register_as("second", pid)).expect_ok();
            second.call(&take(&own)).expect_ok();
        }
        assert!(lock_probe(&disk).is_some(), "its connection is still there");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(borrower), Signal::SIGKILL)
            .expect("end the process that has the connection");
        if is_owner_again {
            wait_until(DEADLINE, "the end to be handled", || {
                scene.logged(&["a later one of the same number"]) > 0
            });
            std::thread::sleep(A_WHILE);
            assert!(lock_probe(&own).is_some(), "of one that lives");
            assert!(second.is_alive());
            // Whose the first lock is cannot be said any more: it goes with the second owner.
            second.close_connection();
            assert_eq!(second.wait_signal(), Some(Signal::SIGTERM as i32));
            wait_until_free(&own);
        } else {
            wait_until_free(&disk);
            std::thread::sleep(A_WHILE);
            assert!(second.is_alive(), "it has nothing to do with it");
        }
        wait_until_free(&disk);
    }
}

#[test]
fn a_process_that_got_the_number_of_a_dead_owner_is_let_alone() {
    if let Some(scene) = Scene::new() {
        number_is_used_again(&scene);
    }
}

#[test]
fn a_process_that_got_the_number_of_a_dead_owner_is_let_alone_on_older_kernels_too() {
    let injection = "inject=getsockopt:error=ENOPROTOOPT:when=1";
    if let Some(scene) = Scene::with_calls_that_fail(injection, "getsockopt") {
        number_is_used_again(&scene);
    }
}

/// A fenced owner is dead and its number belongs to another owner, before the daemon has come to free
/// what the first one had: it is busy with one that died before, and had much.
#[test]
fn the_locks_of_an_owner_whose_number_a_fenced_one_had_stay() {
    let Some(scene) = Scene::new() else {
        return;
    };
    let lockspace = scene.disks.path().join("lockspace");
    let mut rich = scene.owner("rich", OnTerm::Ignore);
    rich.call(&new_lockspace(text(&lockspace))).expect_ok();
    for number in 0..4000 {
        let lease = acquire(text(&lockspace), &number.to_string(), AUTOCREATE);
        rich.call(&lease).expect_ok();
    }
    let (mut first, disk) = scene.owner_with_disk("first", OnTerm::Ignore);
    let (pid, own) = (first.pid(), scene.disk("second"));
    rich.close_connection();
    first.close_connection();
    for name in ["'rich'", "'first'"] {
        wait_until(DEADLINE, "the fence to begin", || {
            scene.logged(&[name, "it is sent SIGTERM now"]) > 0
        });
    }
    scene.daemon.signal(Signal::SIGSTOP);
    for owner in [&mut rich, &mut first] {
        owner.kill();
        owner.wait_end();
    }
    let Some(mut second) = owner_with_pid(&scene, pid) else {
        return scene.daemon.signal(Signal::SIGCONT);
    };
    let calls = [register_as("second", pid).frame(1), take(&own).frame(2)];
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| second.exchange(&calls.concat()).expect_ok());
        // They shall be there when the daemon goes on.
        std::thread::sleep(Duration::from_millis(200));
        scene.daemon.signal(Signal::SIGCONT);
        sent.join().expect("the second owner's calls");
    });
    second
        .exchange_behind(&register_as("second", pid).frame(3), &calls[1])
        .expect_ok();
    wait_until(DEADLINE, "what the others had to be handled", || {
        scene.logged(&["a later one of the same number"]) > 0
    });
    assert!(lock_probe(&own).is_some(), "of one that lives");
    let busy = scene.stranger().call(&take(&own));
    busy.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    // Whose the first lock is cannot be said any more: it goes with the second owner.
    second.close_connection();
    assert_eq!(second.wait_signal(), Some(Signal::SIGTERM as i32));
    wait_until_free(&own);
    wait_until_free(&disk);
}

#[test]
fn when_many_locks_of_a_dead_owner_are_said_to_be_free_they_are() {
    let Some(scene) = Scene::configured("log_level = 2\n") else {
        return;
    };
    let lockspace = scene.disks.path().join("lockspace");
    let (mut owner, disk) = scene.owner_with_disk("many", OnTerm::Die);
    owner.call(&new_lockspace(text(&lockspace))).expect_ok();
    for number in 0..500 {
        let lease = acquire(text(&lockspace), &number.to_string(), AUTOCREATE);
        owner.call(&lease).expect_ok();
    }
    owner.kill();
    wait_until(DEADLINE, "the locks to be freed", || {
        scene.logged(&["'many'", "is dead: 501 of its locks are free"]) > 0
    });
    assert!(lock_probe(&disk).is_none());
    let left = std::fs::read_dir(&lockspace).expect("the lockspace's directory stays");
    assert_eq!(left.count(), 0, "leases that were left behind");
}

#[test]
fn the_end_of_the_daemon_ends_the_owners_with_locks_and_leaves_nothing_behind() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let env = [("NOTIFY_SOCKET", "/run/notify")];
        let Some(mut scene) = Scene::with(&[], &env) else {
            return;
        };
        let notified = UnixDatagram::bind(scene.namespace.path("/run/notify"))
            .expect("bind the service manager's socket");
        notified
            .set_read_timeout(Some(DEADLINE))
            .expect("set a deadline");

        let lockspace = scene.disks.path().join("lockspace");
        let mut owners: Vec<(Owner, PathBuf)> = (0..OWNERS_AT_THE_END)
            .map(|number| scene.owner_with_disk(&format!("guest{number}"), OnTerm::Ignore))
            .collect();
        let mut idle = scene.owner("idle", OnTerm::Die);
        // One lock file of an owner that is fenced, one of an owner without a connection.
        let lock_of = |name| acquire(text(&lockspace), name, AUTOCREATE);
        let (first, first_disk) = &mut owners[0];
        first.call(&new_lockspace(text(&lockspace))).expect_ok();
        first.call(&lock_of("fenced")).expect_ok();
        scene.stranger().call(&lock_of("dropped")).expect_ok();

        let (pid, give_up) = (first.pid(), AtomicBool::new(false));
        let begun = Instant::now();
        let status = std::thread::scope(|scope| {
            let rival = scope.spawn(|| rival(first_disk, pid, &give_up));
            scene.daemon.signal(signal);
            wait_until(DEADLINE, "the end to be told", || {
                let mut message = [0; 64];
                let length = notified.recv(&mut message).expect("a notification");
                &message[..length] == b"STOPPING=1"
            });
            assert!(runs(pid), "the end is told when it begins");
            let status = scene.daemon.wait_end();
            give_up.store(true, Ordering::Relaxed);
            let (_, owner_ran) = rival
                .join()
                .expect("the rival's thread")
                .expect("the lock is free after the end");
            assert!(!owner_ran, "{signal}: the lock was free while it lived");
            status
        });
        let took = begun.elapsed();
        eprintln!("{signal}: the end took {took:?}");
        assert_eq!(status.code(), Some(0), "{signal}");
        assert!(took >= GRACE && took < GRACE * OWNERS_AT_THE_END / 4);
        for (owner, disk) in &mut owners {
            assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
            assert!(lock_probe(disk).is_none());
        }
        assert!(idle.is_alive(), "it held nothing");
        let left: Vec<_> = std::fs::read_dir(&lockspace)
            .expect("the lockspace's directory stays")
            .collect();
        assert!(left.is_empty(), "{signal}: {left:?}");
        for file in [LOCK_SOCKET, ADMIN_SOCKET, "/run/virtlockd.pid"] {
            assert!(!scene.namespace.path(file).exists(), "{signal}: {file}");
        }
    }
}

/// Slow: the daemon gives a process 30 s.
#[test]
fn an_owner_that_cannot_be_killed_keeps_its_lock_and_is_named_every_30_s() {
    // Sent, as far as the daemon knows.
    let injection = "inject=pidfd_send_signal:retval=0";
    let Some(scene) = Scene::with_calls_that_fail(injection, "pidfd_send_signal") else {
        return;
    };
    let (mut owner, disk) = scene.owner_with_disk("undead", OnTerm::Die);
    owner.close_connection();
    wait_until(SLOW_DEADLINE, "the daemon to name it", || {
        scene.logged(&["Domain 'undead'", "is still alive 30 s after SIGKILL"]) > 0
    });
    for tried in ["is sent SIGTERM now", "it is sent SIGKILL"] {
        assert_eq!(scene.logged(&["Domain 'undead'", tried]), 1, "{tried}");
    }
    assert!(owner.is_alive() && lock_probe(&disk).is_some());
    let busy = scene.stranger().call(&take(&disk));
    busy.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    // It ends after all, of something else.
    owner.kill();
    wait_until_free(&disk);
}

#[test]
fn sigkill_that_could_not_be_sent_is_tried_again() {
    let injection = "inject=pidfd_send_signal:error=EPERM:when=1..2";
    let Some(scene) = Scene::with_calls_that_fail(injection, "pidfd_send_signal") else {
        return;
    };
    let (mut owner, disk) = scene.owner_with_disk("spared", OnTerm::Die);
    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    wait_until_free(&disk);
    for tried in ["could not be sent SIGTERM", "could not be sent SIGKILL"] {
        assert_eq!(scene.logged(&["Domain 'spared'", tried]), 1, "{tried}");
    }
}

/// Slow: the daemon gives a process 30 s.
#[test]
fn a_daemon_that_ends_waits_30_s_for_an_owner_and_names_it() {
    let injection = "inject=pidfd_send_signal:error=EPERM";
    let Some(mut scene) = Scene::with_calls_that_fail(injection, "pidfd_send_signal") else {
        return;
    };
    let lockspace = scene.disks.path().join("lockspace");
    let (mut owner, disk) = scene.owner_with_disk("undead", OnTerm::Die);
    let mut stranger = scene.stranger();
    stranger.call(&new_lockspace(text(&lockspace))).expect_ok();
    let file = acquire(text(&lockspace), "dropped", AUTOCREATE);
    stranger.call(&file).expect_ok();

    let begun = Instant::now();
    scene.daemon.signal(Signal::SIGTERM);
    let status = wait_for(SLOW_DEADLINE, "the end", || {
        let ended = scene.daemon.ended();
        if ended.is_none() && begun.elapsed() < Duration::from_secs(29) {
            assert!(lock_probe(&disk).is_some(), "free while its owner lives");
        }
        ended
    });
    assert_eq!(status.code(), Some(0));
    let line = ["Domain 'undead'", "could not be fenced within 30 s"];
    assert_eq!(scene.logged(&line), 1, "{}", scene.daemon.stderr());
    assert!(owner.is_alive());
    assert!(!lockspace.join("dropped").exists());
}

#[test]
fn sighup_reads_the_limits_and_the_log_settings_again() {
    let Some(scene) = Scene::configured("max_clients = 2\n") else {
        return;
    };
    // The probe of the start may still be there.
    let one = served_client(&scene.daemon);
    let _two = served_client(&scene.daemon);
    assert!(!scene.daemon.client().call(&register(1)).is_ok());

    let log = scene.disks.path().join("log");
    let outputs = format!("2:file:{}", log.display());
    scene.configure(&format!(
        "max_clients = 3\nlog_level = 2\nlog_outputs = \"{outputs}\"\n"
    ));
    scene.daemon.signal(Signal::SIGHUP);
    let logged = |words: &str| {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.contains(words)
    };
    wait_until(DEADLINE, "the new log to be used", || {
        logged("SIGHUP: the configuration was read again")
    });
    let _three = served_client(&scene.daemon);
    let refusal = scene.daemon.client().call(&register(1));
    assert!(refusal.error().message.contains("limit of 3"));

    for broken in [
        "max_clients = 9\nlog_level = \"much\"\n",
        "max_clients = 9\nlog_outputs = \"2:nowhere\"\n",
        "max_clients = 9\n]",
        "max_clients = -9\n",
    ] {
        std::fs::write(&log, "").expect("empty the log");
        scene.configure(broken);
        scene.daemon.signal(Signal::SIGHUP);
        wait_until(DEADLINE, "the report", || {
            logged("the settings stay as they are")
        });
        let refusal = scene.daemon.client().call(&register(1));
        assert!(refusal.error().message.contains("limit of 3"), "{broken}");
    }
    scene.remove_configuration();
    std::fs::write(&log, "").expect("empty the log");
    scene.daemon.signal(Signal::SIGHUP);
    wait_until(DEADLINE, "the report", || {
        logged("the settings stay as they are")
    });

    // A lower limit sends nobody away.
    scene.configure("max_clients = 1\n");
    scene.daemon.signal(Signal::SIGHUP);
    wait_until(DEADLINE, "the limit to be lower", || {
        let refusal = scene.daemon.client().call(&register(1));
        refusal.error().message.contains("limit of 1")
    });
    let mut one = one;
    one.ping();
}

#[test]
fn sigpipe_changes_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (_owner, disk) = scene.owner_with_disk("guest", OnTerm::Die);
    scene.daemon.signal(Signal::SIGPIPE);
    // And the cause of it: replies to somebody who does not wait for them.
    for _ in 0..50 {
        let mut client = scene.daemon.client();
        for _ in 0..20 {
            client.post(&register(1));
        }
    }
    scene.stranger().ping();
    assert!(scene.daemon.ended().is_none());
    assert!(lock_probe(&disk).is_some());
}

#[test]
fn the_idle_timeout_counts_clients_and_locks() {
    let Some(mut scene) = Scene::with(&["-t", "1"], &[]) else {
        return;
    };
    let disk = scene.disk("disk");
    let mut client = scene.stranger();
    std::thread::sleep(A_WHILE);
    assert!(scene.daemon.ended().is_none(), "there is a client");
    client.call(&take(&disk)).expect_ok();
    drop(client);
    std::thread::sleep(A_WHILE);
    assert!(scene.daemon.ended().is_none(), "there is a lock");
    scene.stranger().call(&release("", text(&disk))).expect_ok();
    assert_eq!(scene.daemon.wait_end().code(), Some(0));
}

#[test]
fn without_descriptors_left_clients_are_told_so_and_owners_are_still_ended() {
    let Some(scene) = Scene::new() else { return };
    let (mut owner, disk) = scene.owner_with_disk("guest", OnTerm::Ignore);
    scene.daemon.wait_until_asleep();
    scene.limit_descriptors(scene.daemon.descriptors() + 4);

    let mut served = Vec::new();
    let refusal = wait_for(DEADLINE, "a client to be refused", || {
        let mut client = scene.daemon.client();
        match client.call(&register(1)) {
            Reply::Ok { .. } => {
                served.push(client);
                None
            }
            Reply::Error(error) => Some(error),
        }
    });
    assert!(
        refusal.message.contains("Too many open files"),
        "{refusal:?}"
    );
    // More than there are reserves for, and none of them says anything.
    let _silent: Vec<Client> = (0..40).map(|_| scene.daemon.client()).collect();
    scene.daemon.wait_until_asleep();

    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    wait_until_free(&disk);
}

#[test]
fn owners_that_took_the_last_descriptors_are_ended_on_older_kernels_too() {
    let injection = "inject=getsockopt:error=ENOPROTOOPT:when=1";
    let Some(scene) = Scene::with_calls_that_fail(injection, "getsockopt") else {
        return;
    };
    scene.daemon.wait_until_asleep();
    let limit = scene.daemon.descriptors() + 2;
    scene.limit_descriptors(limit);
    let mut owners = Vec::new();
    loop {
        let mut owner = Owner::connect(scene.daemon.lock_socket(), OnTerm::Ignore);
        match owner.call(&register_as("late", owner.pid())) {
            Reply::Ok { .. } => owners.push(owner),
            Reply::Error(_) => break,
        }
    }
    assert!(!owners.is_empty());
    scene.limit_descriptors(limit + 100);
    for (number, owner) in owners.iter_mut().enumerate() {
        let disk = scene.disk(&format!("disk{number}"));
        owner.call(&take(&disk)).expect_ok();
        owner.close_connection();
        assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
        wait_until_free(&disk);
    }
}

#[test]
fn the_end_of_an_owner_is_readable_lines_with_its_name() {
    let Some(scene) = Scene::with(&["-v"], &[]) else {
        return;
    };
    let disk = scene.disk("disk");
    let mut owner = Owner::connect(scene.daemon.lock_socket(), OnTerm::Ignore);
    let call = Call::Register {
        uuid: UUID,
        name: b"evil\n\x1b[2J\xff".to_vec(),
        id: 7,
        pid: owner.pid() as u32,
        flags: 0,
    };
    owner.call(&call).expect_ok();
    owner.call(&take(&disk)).expect_ok();
    owner.close_connection();
    owner.wait_end();
    wait_until_free(&disk);
    let (pid, name) = (owner.pid().to_string(), "Domain 'evil\\n");
    for step in [
        "SIGTERM now",
        "it is sent SIGKILL",
        "is dead: 1 of its locks",
    ] {
        wait_until(DEADLINE, step, || scene.logged(&[step]) > 0);
        assert_eq!(scene.logged(&[name, &pid, step]), 1, "{step}");
    }
    let log = scene.daemon.stderr();
    assert!(
        log.chars()
            .all(|letter| letter == '\n' || !letter.is_control()),
        "{log:?}"
    );
}

/// A client that is served, once those that are leaving have left.
fn served_client(daemon: &Daemon) -> Client {
    wait_for(DEADLINE, "a new client to be served", || {
        let mut client = daemon.client();
        client.call(&register(1)).is_ok().then_some(client)
    })
}

/// What README says under "Privileges".
#[test]
fn two_capabilities_are_all_that_the_daemon_needs() {
    if !Path::new("/usr/bin/setpriv").exists() {
        return support::skip("needs setpriv (tests/run installs it with util-linux)");
    }
    let words = [
        "setpriv",
        "--bounding-set",
        "-all,+dac_override,+kill",
        "--inh-caps",
        "-all",
    ];
    let Some(scene) = Scene::under(&words, &["--verbose"], &[]) else {
        return;
    };
    // The disk of a machine whose QEMU is somebody else.
    let disk = scene.disk("disk");
    let lockspace = scene.disks.path().join("lockspace");
    std::fs::set_permissions(&disk, PermissionsExt::from_mode(0o600)).expect("close the disk");
    chown(&disk, Some(NOBODY), Some(NOBODY)).expect("give the disk away");
    let mut owner = scene.owner("guest", OnTerm::Ignore);
    owner.call(&take(&disk)).expect_ok();
    owner.call(&new_lockspace(text(&lockspace))).expect_ok();
    let lease = acquire(text(&lockspace), "lease", AUTOCREATE);
    owner.call(&lease).expect_ok();

    let before = image(scene.daemon.pid());
    scene.daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the upgrade", || {
        image(scene.daemon.pid()) != before
    });
    let busy = scene.stranger().call(&take(&disk));
    busy.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);

    owner.become_nobody();
    owner.close_connection();
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    wait_until_free(&disk);
    wait_until(DEADLINE, "the lease to go", || {
        !lockspace.join("lease").exists()
    });
}
