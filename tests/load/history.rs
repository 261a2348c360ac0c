//! A history under load, and a judgement on it.
//!
//! Owners, each a real process, take and give back a few files under all their names, over
//! connections of their own or as libvirtd does for them. They are killed, between calls and in the
//! midst of one, or leave and are killed by the daemon. The daemon is replaced again and again, and its
//! processes are killed ([`blows`]); each call has one answer all the same, but those over connections
//! that are lost because all of its processes were killed at once. All
//! the time a rival tries to lock the same files without the daemon, and another host takes and
//! removes the one that is made and removed with its lock ([`outside`]). Everything is written down
//! with the time, and afterwards a judge ([`record`]) looks for an instant with two exclusive owners,
//! or one in which a granted lock was free. A history that has not shown everything yet when its time is
//! over goes on for a while, and fails if it still has not then.
//!
//! `VIRTLOCKD_HISTORY_SECONDS` makes it longer, `VIRTLOCKD_HISTORY_SEED` draws the same numbers
//! again: not the same history, which depends on who is faster.

mod blows;
mod outside;
mod record;

use crate::support;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::support::client::{
    AUTOCREATE, Call, Client, INTERNAL_ERROR, RESOURCE_BUSY, Reply, SHARED, acquire, register_as,
    release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::owner::{OnTerm, Owner, runs};
use crate::support::random::Random;
use crate::support::upgrade::{Disturbed, Host};
use crate::support::{DEADLINE, lock_probe, require_root, skip};
use blows::{Blow, Victim};
use record::{Entry, FileId, Mode, Moment, OwnerId, What};

/// How long the owners are at work without being asked for more, seconds.
const SECONDS: u64 = 10;
/// The same where every fcntl and close is slow.
const SECONDS_SLOWED: u64 = 4;
const WORKERS: u32 = 6;
/// How many files an owner has at the most, and how many calls it makes.
const FILES_AT_ONCE: usize = 2;
const CALLS: usize = 150;

type IsOne = fn(&What) -> bool;

/// What owners do in a history that shows something.
const KINDS: [(&str, IsOne); 7] = [
    ("granted exclusively", |what| {
        matches!(what, What::Granted(_, _, Mode::Exclusive))
    }),
    ("granted shared", |what| {
        matches!(what, What::Granted(_, _, Mode::Shared))
    }),
    ("leases granted", |what| {
        matches!(what, What::Granted(_, LEASE, _))
    }),
    ("released", |what| matches!(what, What::Released(..))),
    ("refused", |what| matches!(what, What::Refused(..))),
    ("killed", |what| matches!(what, What::Killed(_))),
    ("left", |what| matches!(what, What::Left(_))),
];

/// Two histories at once would be half as dense.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const DISKS: usize = 4;
/// Behind the disks: a file in a lockspace that is made and removed with its lock.
const LEASE: FileId = DISKS;
const FILES: usize = DISKS + 1;
const LOCKSPACE: &str = "/run/h/leases";

/// A host with contended files, each of which has several names.
fn host() -> Host {
    let host = Host::new();
    for directory in ["/run/h", "/run/h/disks", "/run/h/bind", LOCKSPACE] {
        std::fs::create_dir(host.path(directory)).expect("make a directory");
    }
    for disk in 0..DISKS {
        let path = |name: String| host.path("/run/h/disks").join(name);
        std::fs::write(path(format!("{disk}")), "data").expect("write a disk");
        std::fs::hard_link(path(format!("{disk}")), path(format!("{disk}.hard")))
            .expect("make a hard link");
        symlink(format!("{disk}"), path(format!("{disk}.soft"))).expect("make a symbolic link");
    }
    let mut mount = host.namespace.command("mount");
    let status = mount
        .args(["--bind", "/run/h/disks", "/run/h/bind"])
        .status();
    assert!(status.expect("run mount").success());
    host
}

/// A resource as calls name it.
#[derive(Clone, Debug)]
struct Name {
    lockspace: &'static str,
    name: String,
}

fn name_of(file: FileId, random: &mut Random) -> Name {
    if file == LEASE {
        return Name {
            lockspace: LOCKSPACE,
            name: "lease".into(),
        };
    }
    let name = match random.below(10) {
        0 => format!("/run/h/disks/{file}.hard"),
        1 => format!("/run/h/disks/{file}.soft"),
        2 => format!("/run/h/bind/{file}"),
        3 => format!("/run/h//bind/../disks/./{file}"),
        _ => format!("/run/h/disks/{file}"),
    };
    Name {
        lockspace: "",
        name,
    }
}

fn wish(file: FileId, name: &Name, mode: Mode) -> Call {
    let shared = if mode == Mode::Shared { SHARED } else { 0 };
    let make = if file == LEASE { AUTOCREATE } else { 0 };
    acquire(name.lockspace, &name.name, shared | make)
}

/// The way in which calls are made for an owner.
enum Line {
    /// Over its own connection.
    Own,
    /// As libvirtd does: over a connection of another process, registered as the owner.
    Helper(Client),
}

struct Run<'a> {
    host: &'a Host,
    socket: PathBuf,
    begun: Instant,
    stop: AtomicBool,
    owners: AtomicU32,
    /// Closed while there is no daemon.
    gate: RwLock<()>,
    /// How often all of the daemon was killed.
    cold_starts: AtomicU32,
    /// The kinds of what owners did so far, one bit each.
    seen: AtomicU32,
}

/// Tells the threads to stop, also when this one fails: it would wait for them for ever.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Run<'_> {
    fn now(&self) -> Moment {
        self.begun.elapsed().as_nanos() as Moment
    }

    fn timed<T>(&self, act: impl FnOnce() -> T) -> (Moment, T, Moment) {
        let before = self.now();
        let done = act();
        (before, done, self.now())
    }

    fn see(&self, what: &What) {
        for (bit, (_, is)) in KINDS.iter().enumerate() {
            self.seen
                .fetch_or(u32::from(is(what)) << bit, Ordering::Relaxed);
        }
    }

    /// Whether owners did everything that makes a history worth its judgement.
    fn has_shown_all(&self) -> bool {
        self.seen.load(Ordering::Relaxed) == (1 << KINDS.len()) - 1
    }

    /// Owner after owner, until it is told to stop.
    fn work(&self, mut random: Random) -> Vec<Entry> {
        let mut entries = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            Life::begin(self, &mut random, &mut entries).live();
        }
        entries
    }
}

/// How an owner ends.
#[derive(Clone, Copy, Debug)]
enum End {
    GivesAllBack,
    Killed,
    /// A call is on its way when it is killed.
    KilledInACall,
    /// It closes its connection: the daemon has to kill it.
    Leaves,
}

struct Life<'a> {
    run: &'a Run<'a>,
    random: &'a mut Random,
    entries: &'a mut Vec<Entry>,
    id: OwnerId,
    owner: Owner,
    line: Line,
    held: Vec<(FileId, Name)>,
    end: End,
    /// How often all of the daemon had been killed when the connections were made.
    cold_starts: u32,
    /// The connections are lost for that.
    is_cut_off: bool,
}

impl<'a> Life<'a> {
    fn begin(run: &'a Run<'a>, random: &'a mut Random, entries: &'a mut Vec<Entry>) -> Life<'a> {
        let _daemon = run.gate.read().expect("the gate");
        let id = run.owners.fetch_add(1, Ordering::Relaxed);
        let end = match random.below(100) {
            0..20 => End::GivesAllBack,
            20..50 => End::Killed,
            50..75 => End::KilledInACall,
            _ => End::Leaves,
        };
        // Such a one takes 1.6 s to end.
        let on_term = if random.percent(20) {
            OnTerm::Ignore
        } else {
            OnTerm::Die
        };
        let name = format!("owner-{id}");
        let owner = Owner::register(&run.socket, &name, on_term);
        let line = if random.percent(60) || matches!(end, End::KilledInACall) {
            let mut client = Client::connect(&run.socket);
            client.call(&register_as(&name, owner.pid())).expect_ok();
            Line::Helper(client)
        } else {
            Line::Own
        };
        Life {
            run,
            random,
            entries,
            id,
            owner,
            line,
            held: Vec::new(),
            end,
            cold_starts: run.cold_starts.load(Ordering::Relaxed),
            is_cut_off: false,
        }
    }

    fn live(mut self) {
        for _ in 0..self.random.below(CALLS) + 1 {
            if self.run.stop.load(Ordering::Relaxed) || self.is_cut_off {
                break;
            }
            self.take_or_give_back();
            if self.random.percent(50) {
                let pause = self.random.below(1500) as u64;
                std::thread::sleep(Duration::from_micros(pause));
            }
        }
        self.is_answered_once();
        match self.end {
            _ if self.is_cut_off => self.outlive_its_connections(),
            End::GivesAllBack => {
                while !self.held.is_empty() && !self.is_cut_off {
                    self.give_back(0);
                }
                if self.is_cut_off {
                    // What it still has it has until it is dead.
                    self.outlive_its_connections();
                }
            }
            End::Killed => self.kill(),
            End::KilledInACall => self.kill_in_a_call(),
            End::Leaves => self.leave(),
        }
    }

    fn note(&mut self, before: Moment, after: Moment, what: What) {
        self.run.see(&what);
        self.entries.push(Entry {
            before,
            after,
            what,
        });
    }

    /// `None` if the connection is lost, for the one reason that there is.
    fn call(&mut self, call: &Call) -> (Moment, Option<Reply>, Moment) {
        let (run, line, owner) = (self.run, &mut self.line, &mut self.owner);
        let called = run.timed(|| match line {
            Line::Own => owner.try_call(call),
            Line::Helper(client) => client.try_call(call),
        });
        let (before, reply, after) = called;
        (before, self.or_cut_off(reply), after)
    }

    fn or_cut_off(&mut self, reply: Result<Reply, String>) -> Option<Reply> {
        if let Err(reason) = &reply {
            assert!(self.may_be_cut_off(), "an answer was due: {reason}");
            self.is_cut_off = true;
        }
        reply.ok()
    }

    fn may_be_cut_off(&self) -> bool {
        self.run.cold_starts.load(Ordering::Relaxed) > self.cold_starts
    }

    /// Nothing has come that answers no call: what answers the next one would not be its own.
    fn is_answered_once(&mut self) {
        if let Line::Helper(client) = &mut self.line
            && !client.has_nothing_to_read()
        {
            assert!(self.may_be_cut_off(), "an answer to no call");
            self.is_cut_off = true;
        }
    }

    /// Its locks are there for as long as it is, under the next daemon.
    fn outlive_its_connections(&mut self) {
        drop(self.run.gate.read().expect("the gate"));
        let pause = self.random.below(50) as u64;
        std::thread::sleep(Duration::from_millis(pause));
        self.kill();
    }

    fn take_or_give_back(&mut self) {
        let file = self.random.below(FILES);
        if let Some(held) = self.held.iter().position(|(held, _)| *held == file) {
            return self.give_back(held);
        }
        if self.held.len() >= FILES_AT_ONCE {
            let first = self.random.below(self.held.len());
            return self.give_back(first);
        }
        let (name, mode) = self.choose(file);
        let (before, Some(reply), after) = self.call(&wish(file, &name, mode)) else {
            return;
        };
        if self.note_acquire(file, mode, before, &reply, after) {
            self.held.push((file, name));
        }
    }

    fn choose(&mut self, file: FileId) -> (Name, Mode) {
        let mode = *self.random.pick(&[Mode::Exclusive, Mode::Shared]);
        (name_of(file, self.random), mode)
    }

    /// Whether it was granted; a refusal can only say that the file is busy.
    fn note_acquire(
        &mut self,
        file: FileId,
        mode: Mode,
        before: Moment,
        reply: &Reply,
        after: Moment,
    ) -> bool {
        if let Reply::Error(error) = reply {
            assert_eq!(error.code, RESOURCE_BUSY, "refused: {error:?}");
        }
        let what = if reply.is_ok() {
            What::Granted(self.id, file, mode)
        } else {
            What::Refused(self.id, file, mode)
        };
        self.note(before, after, what);
        reply.is_ok()
    }

    fn give_back(&mut self, held: usize) {
        let (file, name) = self.held.swap_remove(held);
        let (before, reply, after) = self.call(&release(name.lockspace, &name.name));
        // It may have been released.
        reply.iter().for_each(Reply::expect_ok);
        self.note(before, after, What::Released(self.id, file));
    }

    fn kill(&mut self) {
        let (before, (), after) = self.run.timed(|| self.owner.kill());
        self.note(before, after, What::Killed(self.id));
    }

    /// What was asked for by a dead owner's helper may have been granted behind the owner's end.
    /// Then it is kept until it is given back, as libvirtd has to when a start fails.
    fn kill_in_a_call(&mut self) {
        let file = self.random.below(FILES);
        let held = self.held.iter().position(|(held, _)| *held == file);
        let (name, mode) = match held {
            Some(held) => (self.held[held].1.clone(), Mode::Shared),
            None => self.choose(file),
        };
        let call = match held {
            Some(_) => release(name.lockspace, &name.name),
            None => wish(file, &name, mode),
        };
        let before = self.run.now();
        let Line::Helper(client) = &mut self.line else {
            panic!("an owner's own call ends with it");
        };
        let posted = client.try_send(&call.frame(u32::MAX));
        self.kill();
        let Line::Helper(client) = &mut self.line else {
            panic!("an owner's own call ends with it");
        };
        let reply = posted.map_err(|error| error.to_string());
        let reply = reply.and_then(|()| client.try_receive(u32::MAX));
        let reply = self.or_cut_off(reply);
        let after = self.run.now();
        if held.is_some() {
            reply.iter().for_each(expect_released_or_gone);
            return self.note(before, after, What::Released(self.id, file));
        }
        if reply.is_some_and(|reply| self.note_acquire(file, mode, before, &reply, after)) {
            self.wait_for_death();
            let (before, reply, after) = self.call(&release(name.lockspace, &name.name));
            reply.iter().for_each(expect_released_or_gone);
            self.note(before, after, What::Released(self.id, file));
        }
    }

    fn leave(&mut self) {
        let (before, (), after) = self.run.timed(|| self.owner.close_connection());
        self.note(before, after, What::Left(self.id));
        if self.held.is_empty() {
            // It may live: nobody has a reason to kill it.
            return;
        }
        self.wait_for_death();
    }

    /// Waits until it does not run any more, and writes down when it was last seen to.
    fn wait_for_death(&mut self) {
        let (pid, begun) = (self.owner.pid(), Instant::now());
        let mut seen = None;
        loop {
            let (before, lives, after) = self.run.timed(|| runs(pid));
            if !lives {
                break;
            }
            seen = Some((before, after));
            if self.may_be_cut_off() {
                // Nobody may have noticed that it left.
                return self.kill();
            }
            assert!(begun.elapsed() < DEADLINE, "owner {pid} is not ended");
            std::thread::sleep(Duration::from_micros(50));
        }
        if let Some((before, after)) = seen {
            self.note(before, after, What::Runs(self.id));
        }
    }
}

/// A release that meets the death of its owner.
fn expect_released_or_gone(reply: &Reply) {
    if let Reply::Error(error) = reply {
        let due = [RESOURCE_BUSY, INTERNAL_ERROR];
        assert!(due.contains(&error.code), "a release: {error:?}");
    }
}

/// Runs a history of so many seconds, in which these things befall the daemon, and judges it.
fn run_and_judge(host: &Host, daemon: Daemon, seconds: u64, blows: &[Blow]) {
    // A history that failed leaves nothing behind that could harm the next one.
    let _turn = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|error| error.into_inner());
    let seed = Random::seed_from("VIRTLOCKD_HISTORY_SEED");
    eprintln!("VIRTLOCKD_HISTORY_SEED={seed} for {seconds} s");
    let run = Run {
        host,
        socket: daemon.lock_socket().to_owned(),
        begun: Instant::now(),
        stop: AtomicBool::new(false),
        owners: AtomicU32::new(1),
        gate: RwLock::new(()),
        cold_starts: AtomicU32::new(0),
        seen: AtomicU32::new(0),
    };
    let tries = AtomicU64::new(0);
    let mut victim = Victim::new(daemon);
    let mut random = Random::new(seed.rotate_left(32));
    let entries: Vec<Entry> = std::thread::scope(|scope| {
        let (run, tries) = (&run, &tries);
        let stop = StopAtEnd(&run.stop);
        let mut threads = vec![
            scope.spawn(move || run.rob(tries)),
            scope.spawn(move || run.be_another_host(Random::new(!seed))),
        ];
        for worker in 0..WORKERS {
            let random = Random::new(seed ^ (u64::from(worker) << 32));
            threads.push(scope.spawn(move || run.work(random)));
        }
        let end = run.begun + Duration::from_secs(seconds);
        // On a slow machine few owners have come to their end by then.
        let latest = end + DEADLINE;
        let goes_on = || {
            let now = Instant::now();
            now < end || (now < latest && !run.has_shown_all())
        };
        while goes_on() && !threads.iter().any(|thread| thread.is_finished()) {
            victim.suffer(victim.next_of(blows, &mut random), run);
            std::thread::sleep(blows::BETWEEN);
        }
        drop(stop);
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .flat_map(|entries| entries.expect("a thread of the run"))
            .collect()
    });
    judge(&entries, seed);
    victim.check();
    let count = |is: IsOne| entries.iter().filter(|entry| is(&entry.what)).count();
    let mut needed = KINDS.map(|(kind, is)| (kind, count(is))).to_vec();
    needed.extend([
        (
            "had by the rival",
            count(|what| matches!(what, What::Robbed(..))),
        ),
        ("tries of the rival", tries.load(Ordering::Relaxed) as usize),
    ]);
    let names = blows.iter().map(|blow| format!("{blow:?}"));
    let names: Vec<String> = names.collect();
    let fallen = blows.iter().map(|blow| victim.count(*blow));
    needed.extend(names.iter().map(String::as_str).zip(fallen));
    let seen_to_run = count(|what| matches!(what, What::Runs(_)));
    eprintln!("{needed:?}, seen to run after they left {seen_to_run}");
    for (what, count) in needed {
        assert!(count > 0, "a history that shows nothing: {what} 0 times");
    }
    // Everybody is dead or has given back: nothing is left.
    for disk in 0..DISKS {
        let name = format!("/run/h/disks/{disk}");
        let (path, begun) = (host.path(&name), Instant::now());
        while let Some(seen) = lock_probe(&path) {
            let is_late = begun.elapsed() >= DEADLINE;
            assert!(!is_late, "{seen:?}: {:?}", victim.who_has(&name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn judge(entries: &[Entry], seed: u64) {
    const AROUND: Moment = 20_000_000;
    let Err(violation) = record::check(entries) else {
        return;
    };
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("history-{seed}.txt"));
    std::fs::write(&file, record::text(entries.iter())).expect("write the history down");
    let moment = violation.moment();
    let near = entries.iter().filter(|entry| {
        record::concerns(entry, violation.file())
            && entry.before <= moment.saturating_add(AROUND)
            && entry.after.saturating_add(AROUND) >= moment
    });
    panic!(
        "{violation:#?}\nwhat happened to file {} within 20 ms:\n{}all of it is in {}",
        violation.file(),
        record::text(near),
        file.display()
    );
}

fn seconds(default: u64) -> u64 {
    match std::env::var("VIRTLOCKD_HISTORY_SECONDS") {
        Ok(text) => text.parse().expect("VIRTLOCKD_HISTORY_SECONDS is a number"),
        Err(_) => default,
    }
}

fn can_run() -> bool {
    if daemon::c_daemon().is_some_and(|path| path == daemon::program()) {
        skip("libvirt's own daemon loses replies and frees before it kills");
        return false;
    }
    require_root()
}

#[test]
fn no_instant_has_two_exclusive_owners_and_no_granted_lock_is_ever_free() {
    if !can_run() {
        return;
    }
    let host = host();
    let daemon = host.start(&[], &[]);
    run_and_judge(&host, daemon, seconds(SECONDS), &[Blow::Upgrade]);
}

#[test]
fn nor_when_one_of_its_processes_is_killed_again_and_again() {
    if !can_run() {
        return;
    }
    let host = host();
    let daemon = host.start(&[], &[]);
    let blows = [Blow::Reactor, Blow::Guardian, Blow::Upgrade];
    run_and_judge(&host, daemon, seconds(SECONDS), &blows);
}

#[test]
fn nor_when_all_of_it_is_killed_and_started_again() {
    if !can_run() {
        return;
    }
    let host = host();
    let daemon = host.start(&[], &[]);
    let blows = [Blow::Both, Blow::Reactor, Blow::Guardian, Blow::Upgrade];
    run_and_judge(&host, daemon, seconds(SECONDS), &blows);
}

#[test]
fn nor_when_every_fcntl_and_close_is_slow() {
    if !can_run() {
        return;
    }
    if !support::require_strace() {
        return;
    }
    let host = host();
    let daemon = host.start(&[], &[daemon::WATCHED]);
    let _slowed = Disturbed::slow(&daemon);
    let blows = [Blow::Upgrade];
    run_and_judge(&host, daemon, seconds(SECONDS_SLOWED), &blows);
}
