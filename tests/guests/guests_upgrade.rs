//! The program of the lock daemon is replaced (SIGUSR1) while real guests run: by itself, again and
//! again and under load, and by libvirt's own daemon and back. Another program tries all the time
//! to get the locks of the guests' disks, and never does.

use crate::support::client::{
    Call, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, Reply, acquire, register_as, release,
};
use crate::support::daemon::{Daemon, c_daemon, program};
use crate::support::libvirt::guest::Guest;
use crate::support::libvirt::{self, Libvirt, is_locked, wait_until_free};
use crate::support::owner::{OnTerm, Owner, rival};
use crate::support::{DEADLINE, TempDir, skip, wait_until};
use crate::{alone, support};
use nix::sys::signal::Signal;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The file that the daemon is started from, to be exchanged while it runs.
struct Installed {
    directory: TempDir,
}

impl Installed {
    fn new(program: &Path) -> Installed {
        let installed = Installed {
            directory: TempDir::new(),
        };
        installed.exchange(program);
        installed
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("virtlockd")
    }

    /// As a package upgrade does it: the new file takes the name of the old one.
    fn exchange(&self, program: &Path) {
        let new = self.directory.path().join("virtlockd.new");
        support::install_program(program, &new);
        std::fs::rename(new, self.path()).expect("exchange the program");
    }

    /// Exchanges the file, and tells the daemon. The new program serves when this returns.
    fn upgrade(&self, daemon: &mut Daemon, program: &Path) {
        self.exchange(program);
        daemon.signal(Signal::SIGUSR1);
        self.wait_until_run(daemon);
    }

    fn wait_until_run(&self, daemon: &mut Daemon) {
        let file = |path: &Path| {
            let data = std::fs::metadata(path).expect("look at a program");
            (data.dev(), data.ino())
        };
        let own = file(&self.path());
        let running = format!("/proc/{}/exe", daemon.pid());
        wait_until(DEADLINE, "the new program to run", || {
            assert_eq!(daemon.ended(), None, "{}", daemon.stderr());
            file(Path::new(&running)) == own
        });
        // Registered, because libvirt's daemon does not survive its next SIGUSR1 otherwise.
        let mut client = daemon.client();
        client.call(&register_as("look", 1)).expect_ok();
    }
}

/// A program that tries to lock disks, again and again, as one of another host would. It must
/// never succeed.
pub struct Competitor<'a> {
    disks: &'a [PathBuf],
    pub stop: AtomicBool,
    pub tries: AtomicUsize,
}

impl<'a> Competitor<'a> {
    pub fn new(disks: &'a [PathBuf]) -> Competitor<'a> {
        Competitor {
            disks,
            stop: AtomicBool::new(false),
            tries: AtomicUsize::new(0),
        }
    }

    /// Tries until [`Competitor::stop`]; gives the disk that it has got, which ends it at once.
    pub fn run(&self) -> Option<PathBuf> {
        let open = |disk: &PathBuf| {
            let file = std::fs::File::options().read(true).write(true).open(disk);
            (disk.clone(), file.expect("open a disk"))
        };
        let files: Vec<_> = self.disks.iter().map(open).collect();
        while !self.stop.load(Ordering::Relaxed) {
            for (disk, file) in &files {
                if support::try_lock(file) {
                    return Some(disk.clone());
                }
            }
            self.tries.fetch_add(files.len(), Ordering::Relaxed);
            // Guests need the processors too. Far less than what the calls are held up for.
            std::thread::sleep(Duration::from_micros(20));
        }
        None
    }
}

/// Ends what runs beside a test, also when the test fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// strace, which holds up each fcntl and close of the daemon for half a millisecond: a lock that is
/// dropped and taken again at once would be free for as long.
struct Delays {
    strace: Child,
    files: TempDir,
    daemon: i32,
}

impl Delays {
    fn of(daemon: &Daemon) -> Option<Delays> {
        if !support::require_strace() {
            return None;
        }
        let files = TempDir::new();
        let pid = daemon.pid().to_string();
        let strace = Command::new("strace")
            .args([
                "-q",
                "-f",
                "-p",
                &pid,
                "-p",
                &daemon.reactor().to_string(),
                "-o",
            ])
            .arg(files.path().join("seen"))
            .args(["-e", "trace=execve,fcntl,close"])
            .args(["-e", "inject=fcntl,close:delay_enter=500"])
            .stdin(Stdio::null())
            .spawn()
            .expect("start strace");
        for process in [daemon.pid(), daemon.reactor()] {
            let status = format!("/proc/{process}/status");
            wait_until(DEADLINE, "strace to watch the daemon", || {
                let status = std::fs::read_to_string(&status).expect("read the daemon's status");
                !status.contains("TracerPid:\t0")
            });
        }
        Some(Delays {
            strace,
            files,
            daemon: daemon.pid(),
        })
    }

    /// That it has held up calls of every program that ran, and seen this many upgrades.
    fn check(self, upgrades: usize) {
        let seen = std::fs::read_to_string(self.files.path().join("seen"));
        let seen = seen.expect("read what strace saw");
        // Lines begin with the pid; the check of a successor is an exec of another process. What works on
        // files is the daemon's child.
        let daemon = format!("{} ", self.daemon);
        let mut held_up: Vec<usize> = vec![0];
        for line in seen.lines() {
            if line.starts_with(&daemon) && line.contains("execve(") {
                held_up.push(0);
            } else if line.ends_with("(DELAYED)") {
                *held_up.last_mut().expect("never empty") += 1;
            }
        }
        eprintln!("calls held up, program by program: {held_up:?}");
        assert_eq!(held_up.len(), 1 + upgrades);
        assert!(held_up.iter().all(|count| *count > 0), "{held_up:?}");
    }
}

impl Drop for Delays {
    fn drop(&mut self) {
        // It lets the daemon go when it is interrupted.
        let pid = i32::try_from(self.strace.id()).expect("a pid is an i32");
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGINT);
        let _ = self.strace.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The refusal must come from the lock daemon and say which lock it is about.
#[track_caller]
fn assert_refused_by_lock_daemon(result: Result<(), String>, disk: &Path) {
    let error = result.expect_err("this had to be refused");
    assert!(
        error.contains("resource busy: Lockspace resource") && error.contains(text(disk)),
        "not the lock daemon's refusal: {error}"
    );
}

/// Guests that run for the whole test, two disks each, and two more that share one.
pub fn start_guests(libvirt: &Libvirt, count: usize) -> (Vec<String>, Vec<PathBuf>) {
    let mut names = Vec::new();
    let mut disks = Vec::new();
    for number in 0..count {
        let name = format!("old{number}");
        let own = ["a", "b"].map(|letter| libvirt.disk(&format!("{name}{letter}")));
        let guest = Guest::new(&name).disk(&own[0]).disk(&own[1]);
        libvirt.create(&guest).expect("start a guest");
        names.push(name);
        disks.extend(own);
    }
    let shared = libvirt.disk("shared");
    for name in ["sharing0", "sharing1"] {
        let guest = Guest::new(name).shareable(&shared);
        libvirt.create(&guest).expect("start a guest that shares");
        names.push(name.to_owned());
    }
    disks.push(shared);
    (names, disks)
}

/// Old guests stop and leave their disks free, new ones start there, and conflicts are refused.
pub fn check_afterwards(libvirt: &Libvirt, names: &[String], disks: &[PathBuf]) {
    for name in names {
        assert_eq!(libvirt.state(name), "running");
        libvirt.destroy(name);
    }
    wait_until_free(disks);
    for (number, disk) in disks.iter().take(2).enumerate() {
        let guest = Guest::new(&format!("new{number}")).disk(disk);
        libvirt.create(&guest).expect("start a guest afterwards");
        assert!(is_locked(disk));
        let second = Guest::new("second").disk(disk);
        assert_refused_by_lock_daemon(libvirt.create(&second), disk);
    }
}

/// A connection whose calls all have a known answer: one that was lost, or carried out twice, would
/// change it. Gives the number of calls.
pub fn call_until(stop: &AtomicBool, socket: &Path, disk: &Path) -> usize {
    let mut client = Client::connect(socket);
    client.call(&register_as("caller", 1)).expect_ok();
    let (take, give) = (acquire("", text(disk), 0), release("", text(disk)));
    let calls: [Call; 4] = [take.clone(), take, give.clone(), give];
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let replies = client.pipeline(&calls);
        assert!(replies[0].is_ok() && replies[2].is_ok(), "{replies:?}");
        for refused in [&replies[1], &replies[3]] {
            refused.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        }
        count += calls.len();
        // There are many of these, and guests need the processors too.
        std::thread::sleep(Duration::from_millis(2));
    }
    count
}

/// Guests that start and die, one after the other.
pub fn churn_until(
    stop: &AtomicBool,
    libvirt: &Libvirt,
    name: &str,
    disk: &Path,
    rounds: &AtomicUsize,
) {
    let guest = Guest::new(name).disk(disk);
    while !stop.load(Ordering::Relaxed) {
        libvirt.create(&guest).expect("start a guest meanwhile");
        assert!(is_locked(disk));
        libvirt.destroy(name);
        wait_until_free(&[disk.to_owned()]);
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// The first half of a call before the upgrade, the second half after it.
struct HalfCall {
    client: Client,
    rest: Vec<u8>,
}

impl HalfCall {
    fn begin(daemon: &Daemon, call: &Call, half: usize) -> HalfCall {
        let mut client = daemon.client();
        client.call(&register_as("half", 1)).expect_ok();
        let mut frame = call.frame(1);
        let rest = frame.split_off(half);
        client.send(&frame);
        HalfCall { client, rest }
    }

    fn finish(mut self) {
        self.client.send(&self.rest);
        Reply::parse(&self.client.receive()).expect_ok();
    }
}

/// Replaces the daemon by itself, `rounds` times, while everything happens at once.
fn upgrades_under_load(rounds: usize, delayed: bool) {
    if !libvirt::can_run() {
        return;
    }
    let _alone = alone();
    let installed = Installed::new(&program());
    let mut libvirt = Libvirt::start(&installed.path(), "");
    let mut lockd = libvirt.take_lockd();
    let (names, disks) = start_guests(&libvirt, 2);
    let delays = match delayed {
        true => match Delays::of(&lockd) {
            Some(delays) => Some(delays),
            None => return,
        },
        false => None,
    };
    let [churned, half_disk] = [libvirt.disk("churned"), libvirt.disk("half")];
    let called: Vec<PathBuf> = (0..8)
        .map(|n| libvirt.disk(&format!("called{n}")))
        .collect();
    let fenced: Vec<PathBuf> = (0..rounds)
        .map(|n| libvirt.disk(&format!("fenced{n}")))
        .collect();
    let socket = lockd.lock_socket().to_owned();
    let (starts, competitor) = (AtomicUsize::new(0), Competitor::new(&disks));
    let stop = &competitor.stop;

    std::thread::scope(|scope| {
        let _stop = StopOnDrop(stop);
        let competing = scope.spawn(|| competitor.run());
        let callers: Vec<_> = called
            .iter()
            .map(|disk| scope.spawn(|| call_until(stop, &socket, disk)))
            .collect();
        scope.spawn(|| churn_until(stop, &libvirt, "churn", &churned, &starts));

        let mut rivals = Vec::new();
        for (round, disk) in fenced.iter().enumerate() {
            let mut owner = Owner::register(&socket, &format!("leaver{round}"), OnTerm::Ignore);
            owner.call(&acquire("", text(disk), 0)).expect_ok();
            let pid = owner.pid();
            rivals.push((
                scope.spawn(move || rival(disk, pid, stop)),
                Instant::now(),
                owner,
            ));
            let call = acquire("", text(&half_disk), 0);
            // In the length word, in the header, in the payload.
            let half = HalfCall::begin(&lockd, &call, [2, 20, 33][round % 3]);
            let (_, _, owner) = rivals.last_mut().expect("just pushed");
            owner.close_connection();

            installed.exchange(&program());
            // Whoever sends several signals wants one upgrade and harms nothing.
            let signals = if round % 3 == 2 && !delayed { 3 } else { 1 };
            for _ in 0..signals {
                lockd.signal(Signal::SIGUSR1);
            }
            installed.wait_until_run(&mut lockd);
            half.finish();
            assert!(is_locked(&half_disk));
            let mut client = lockd.client();
            client.call(&register_as("half", 1)).expect_ok();
            client.call(&release("", text(&half_disk))).expect_ok();
            let before = starts.load(Ordering::Relaxed);
            wait_until(DEADLINE, "a guest to start and die", || {
                starts.load(Ordering::Relaxed) > before || competing.is_finished()
            });
        }
        for (rival, closed_at, mut owner) in rivals {
            assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
            wait_until(DEADLINE, "the end of a lock", || rival.is_finished());
            let got = rival.join().expect("the rival's thread");
            let (free_at, owner_ran) = got.expect("a dead owner's lock is free");
            assert!(!owner_ran, "the lock was free while its owner lived");
            assert!(free_at - closed_at >= Duration::from_millis(1600));
        }
        let second = Guest::new("second").disk(&disks[0]);
        assert_refused_by_lock_daemon(libvirt.create(&second), &disks[0]);
        stop.store(true, Ordering::Relaxed);
        let got = competing.join().expect("the competitor's thread");
        assert_eq!(got, None, "somebody else got a running guest's lock");
        let calls: usize = callers
            .into_iter()
            .map(|caller| caller.join().expect("a caller's thread"))
            .sum();
        eprintln!(
            "{rounds} upgrades: {calls} calls, {} guests, {} tries to get a lock",
            starts.load(Ordering::Relaxed),
            competitor.tries.load(Ordering::Relaxed)
        );
    });
    if let Some(delays) = delays {
        delays.check(rounds);
    }
    check_afterwards(&libvirt, &names, &disks);
}

#[test]
fn ten_upgrades_under_load_lose_no_lock_no_call_and_no_guest() {
    upgrades_under_load(10, false);
}

#[test]
fn no_lock_is_free_for_a_moment_when_each_step_of_an_upgrade_takes_long() {
    upgrades_under_load(3, true);
}

/// Libvirt's daemon, ours, libvirt's, ours, with guests that run all the time.
fn there_and_back(delayed: bool) {
    if !libvirt::can_run() {
        return;
    }
    let Some(theirs) = c_daemon() else {
        return skip("needs libvirt's own daemon (tests/run installs it)");
    };
    let _alone = alone();
    let installed = Installed::new(&theirs);
    let mut libvirt = Libvirt::start(&installed.path(), "");
    let mut lockd = libvirt.take_lockd();
    let (mut names, disks) = start_guests(&libvirt, 2);
    let delays = match delayed {
        true => match Delays::of(&lockd) {
            Some(delays) => Some(delays),
            None => return,
        },
        false => None,
    };
    let paused = libvirt.disk("pausing");
    let guest = Guest::new("pausing").disk(&paused);
    libvirt.create(&guest).expect("start a guest");
    let competitor = Competitor::new(&disks);
    let shared = disks.last().expect("there are disks");
    let mut more = Vec::new();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&competitor.stop);
        let competing = scope.spawn(|| competitor.run());
        for (step, program) in [program(), theirs.clone(), program()].iter().enumerate() {
            // Another name of a guest's disk: a daemon that opened and closed it would drop the
            // lock that libvirt's daemon has taken.
            let link = libvirt.files().join(format!("link{step}"));
            std::fs::hard_link(&disks[0], &link).expect("link a disk");

            // An owner that is being fenced is fenced, whoever goes on after that.
            let name = format!("leaver{step}");
            let left = libvirt.disk(&name);
            let mut owner = Owner::register(lockd.lock_socket(), &name, OnTerm::Ignore);
            owner.call(&acquire("", text(&left), 0)).expect_ok();
            let leaves_before = step > 0;
            if leaves_before {
                owner.close_connection();
            }

            installed.upgrade(&mut lockd, program);
            if !leaves_before {
                // It came to the program before, and leaves this one.
                owner.close_connection();
            }
            assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
            wait_until_free(std::slice::from_ref(&left));
            assert!(disks.iter().all(|disk| is_locked(disk)));
            for disk in [&disks[0], shared] {
                let second = Guest::new("second").disk(disk);
                assert_refused_by_lock_daemon(libvirt.create(&second), disk);
            }
            if *program != theirs {
                let mut client = lockd.client();
                client.call(&register_as("linker", 1)).expect_ok();
                let refused = client.call(&acquire("", text(&link), 0));
                refused.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
            }
            let name = format!("step{step}");
            let disk = libvirt.disk(&name);
            let guest = Guest::new(&name).disk(&disk);
            libvirt.create(&guest).expect("start a guest meanwhile");
            names.push(name);
            more.push(disk);
            // A suspended guest gives its locks back to one program and takes them from another.
            let act = if step % 2 == 0 { "suspend" } else { "resume" };
            libvirt.virsh(&[act, "pausing"]).expect("suspend or resume");
            assert_eq!(is_locked(&paused), act == "resume");
            // One that was started under the program before stops under this one.
            if step == 1 {
                libvirt.destroy("step0");
                wait_until_free(&more[..1]);
                names.retain(|name| name != "step0");
            }
        }
        competitor.stop.store(true, Ordering::Relaxed);
        let got = competing.join().expect("the competitor's thread");
        assert_eq!(got, None, "somebody else got a running guest's lock");
        let tries = competitor.tries.load(Ordering::Relaxed);
        eprintln!("three exchanges: {tries} tries to get a lock");
    });
    if let Some(delays) = delays {
        delays.check(3);
    }
    libvirt.destroy("pausing");
    let all: Vec<PathBuf> = disks.into_iter().chain(more).collect();
    check_afterwards(&libvirt, &names, &all);
}

#[test]
fn guests_come_from_libvirts_daemon_go_back_and_come_again() {
    there_and_back(false);
}

#[test]
fn no_lock_is_free_for_a_moment_on_the_way_from_libvirts_daemon_and_back() {
    there_and_back(true);
}

#[test]
fn a_lock_file_goes_with_its_guest_whichever_daemon_made_it() {
    if !libvirt::can_run() {
        return;
    }
    let Some(theirs) = c_daemon() else {
        return skip("needs libvirt's own daemon (tests/run installs it)");
    };
    let _alone = alone();
    let directory = TempDir::new();
    let conf = format!("file_lockspace_dir = \"{}\"\n", directory.path().display());
    let installed = Installed::new(&theirs);
    let mut libvirt = Libvirt::start(&installed.path(), &conf);
    let mut lockd = libvirt.take_lockd();
    // Starts a guest; its lock file.
    let start = |name: &str| {
        let before = files_in(directory.path());
        let guest = Guest::new(name).disk(&libvirt.disk(name));
        libvirt.create(&guest).expect("start a guest");
        let mut files = files_in(directory.path());
        files.retain(|file| !before.contains(file));
        let [file] = files.try_into().expect("one disk is one lock file");
        assert!(is_locked(&file));
        file
    };
    let stop = |name: &str, file: &Path| {
        libvirt.destroy(name);
        wait_until(DEADLINE, "the end of the lock file", || !file.exists());
    };

    let first = start("first");
    let kept = [start("kept")];
    let competitor = Competitor::new(&kept);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&competitor.stop);
        let competing = scope.spawn(|| competitor.run());
        installed.upgrade(&mut lockd, &program());
        stop("first", &first);
        let second = start("second");
        installed.upgrade(&mut lockd, &theirs);
        stop("second", &second);
        let third = start("third");
        installed.upgrade(&mut lockd, &program());
        installed.upgrade(&mut lockd, &program());
        stop("third", &third);
        competitor.stop.store(true, Ordering::Relaxed);
        let got = competing.join().expect("the competitor's thread");
        assert_eq!(got, None, "somebody else got a running guest's lock");
    });
    stop("kept", &kept[0]);
    assert!(files_in(directory.path()).is_empty());
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("list a directory");
    entries
        .map(|entry| entry.expect("list a directory").path())
        .collect()
}
