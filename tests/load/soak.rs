//! A host's life at high speed, for as long as wanted: guests come and go, some are killed, disks are
//! plugged in and out, strangers send nonsense, administrators ask, and every few seconds the daemon
//! is replaced by its successor, and every second the process that serves is killed. Nobody ever loses a
//! lock, and with the same number of guests the daemon has as many descriptors as ever and no more memory.
//! For a third of the time there are no upgrades, which begin with an empty desk, and for another no kills
//! either, after which a heap is empty: what leaks has to add up.
//!
//! `VIRTLOCKD_SOAK_SECONDS` says for how long (default 20; a day is 86400), with a line of progress
//! every minute; `VIRTLOCKD_SOAK_SEED` repeats the choices of a run whose seed was printed.

use crate::support;
use crate::support::client::{
    ADMIN_PROGRAM, CALL, Call, Reply, acquire, frame, put_string, register_as, release, restrict,
};
use crate::support::daemon::{Daemon, children_of};
use crate::support::libvirt::guest::Guest as Domain;
use crate::support::libvirt::{self, Libvirt};
use crate::support::owner::{OnTerm, Owner};
use crate::support::random::Random;
use crate::support::scene::locks_of;
use crate::support::upgrade::{Host, upgrade};
use crate::support::{DEADLINE, assert_memory, lock_probe, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::MetadataExt;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How many guests there are whenever the daemon is looked at.
const GUESTS: usize = 16;
/// How many there may be in between.
const MOST_GUESTS: usize = 32;
/// Between two upgrades.
const UPGRADE_EVERY: Duration = Duration::from_secs(2);
/// Between two kills: those that are closer count as one after the other, and are waited with.
const KILL_EVERY: Duration = Duration::from_millis(1100);
/// How much more memory the daemon may have in the end than after the first third, KiB: a page here
/// and there, for an allocator is not the same twice. A leak of one KiB a guest would be many times
/// that within minutes.
const SLACK_KIB: u64 = 512;
const PROGRESS_EVERY: Duration = Duration::from_secs(60);

fn seconds() -> Duration {
    let text = std::env::var("VIRTLOCKD_SOAK_SECONDS").unwrap_or_else(|_| "20".into());
    let seconds = text
        .parse()
        .unwrap_or_else(|_| panic!("VIRTLOCKD_SOAK_SECONDS={text}: not a number"));
    Duration::from_secs(seconds)
}

/// A guest as the lock daemon sees it: a process with a connection that says nothing, and locks that
/// libvirtd took for it over short connections of its own.
struct Guest {
    process: Owner,
    name: String,
    /// Its two disks, by number.
    slot: usize,
    is_suspended: bool,
    has_plugged: bool,
}

impl Guest {
    fn disks(&self) -> [String; 2] {
        [
            format!("/run/{}-a", self.slot),
            format!("/run/{}-b", self.slot),
        ]
    }

    fn plugged_disk(&self) -> String {
        format!("/run/{}-c", self.slot)
    }

    /// Everything that it holds.
    fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        if !self.is_suspended {
            held.extend(self.disks());
        }
        if self.has_plugged {
            held.push(self.plugged_disk());
        }
        held
    }
}

struct Soak {
    host: Host,
    daemon: Daemon,
    guests: Vec<Guest>,
    random: Random,
    started: usize,
    upgrades: usize,
    kills: Kills,
}

/// What becomes of the daemon while a host lives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blows {
    UpgradesAndKills,
    Kills,
    None,
}

#[test]
fn with_the_same_guests_the_daemon_has_the_same_memory_and_descriptors_after_any_time() {
    if !support::require_root() {
        return;
    }
    let seed = Random::seed_from("VIRTLOCKD_SOAK_SEED");
    println!("VIRTLOCKD_SOAK_SEED={seed}");
    let host = Host::new();
    for slot in 0..MOST_GUESTS {
        for letter in ["a", "b", "c"] {
            host.disk(&format!("{slot}-{letter}"));
        }
    }
    let daemon = Daemon::start_program(
        std::path::Path::new(support::upgrade::PROGRAM),
        &host.namespace,
        &[],
        // Refused calls are logged as errors, and are part of this.
        &[("LIBVIRT_LOG_OUTPUTS", "3:file:/dev/null")],
    );
    let mut soak = Soak {
        host,
        daemon,
        guests: Vec::new(),
        random: Random::new(seed),
        started: 0,
        upgrades: 0,
        kills: Kills::new(),
    };
    let mut watch = Watch::new(seconds() / 3);
    while !watch.is_over() {
        soak.live(Blows::UpgradesAndKills);
        watch.steady.push(Look::at(&soak.daemon));
        upgrade(&soak.daemon);
        soak.upgrades += 1;
        soak.check_all();
        watch.upgraded.push(Look::at(&soak.daemon));
        watch.progress(|| soak.numbers());
    }
    watch.everything_is_flat();
    for blows in [Blows::Kills, Blows::None] {
        let mut watch = Watch::new(seconds() / 3);
        while !watch.is_over() {
            soak.live(blows);
            watch.steady.push(Look::at(&soak.daemon));
            watch.progress(|| soak.numbers());
        }
        watch.everything_is_flat();
    }
    eprintln!("soak: {}", soak.numbers());
    assert!(soak.kills.count > 0, "a soak without kills");
}

impl Soak {
    /// A while in the life of a host, until there are [`GUESTS`] guests and nobody else.
    fn live(&mut self, blows: Blows) {
        let until = Instant::now() + UPGRADE_EVERY;
        while Instant::now() < until {
            self.something_happens();
            if blows != Blows::None {
                self.kills.kill_in_time(&self.daemon, &mut self.random);
            }
            // An upgrade that nobody waits for.
            let with_upgrades = blows == Blows::UpgradesAndKills && !self.kills.is_one_on_its_way();
            if with_upgrades && self.random.percent(1) {
                self.daemon.signal(Signal::SIGUSR1);
            }
        }
        self.kills.wait();
        self.settle();
    }

    fn numbers(&self) -> String {
        let (started, upgrades, kills) = (self.started, self.upgrades, self.kills.count);
        format!("{started} guests, {upgrades} upgrades, {kills} kills")
    }

    fn something_happens(&mut self) {
        match self.random.below(100) {
            0..40 => self.start_guest(),
            40..55 => self.kill_guest(),
            55..65 => self.guest_leaves(),
            65..75 => self.suspend_or_resume(),
            75..85 => self.plug_or_unplug(),
            85..90 => self.rival(),
            90..95 => self.administrator_asks(),
            _ => self.stranger(),
        }
    }

    /// As libvirtd starts a guest: REGISTER and RESTRICT over the connection that QEMU keeps, and the
    /// locks over another one.
    fn start_guest(&mut self) {
        let used = |slot: &usize| self.guests.iter().any(|guest| guest.slot == *slot);
        let Some(slot) = (0..MOST_GUESTS).find(|slot| !used(slot)) else {
            return;
        };
        self.started += 1;
        let name = format!("guest-{}", self.started);
        let process = Owner::register(self.daemon.lock_socket(), &name, OnTerm::Die);
        let mut guest = Guest {
            process,
            name,
            slot,
            is_suspended: false,
            has_plugged: false,
        };
        guest.process.call(&restrict()).expect_ok();
        let calls = guest.disks().map(|disk| acquire("", &disk, 0));
        speak_for(&self.daemon, &guest, &calls);
        self.guests.push(guest);
    }

    fn any_guest(&mut self) -> Option<usize> {
        (!self.guests.is_empty()).then(|| self.random.below(self.guests.len()))
    }

    fn kill_guest(&mut self) {
        if let Some(number) = self.any_guest() {
            let guest = self.guests.swap_remove(number);
            guest.process.kill();
            self.wait_for_its_end(guest);
        }
    }

    /// Its connection ends while it holds locks: it is fenced.
    fn guest_leaves(&mut self) {
        if let Some(number) = self.any_guest() {
            let mut guest = self.guests.swap_remove(number);
            if guest.held().is_empty() {
                guest.process.kill();
            } else {
                guest.process.close_connection();
                assert_eq!(guest.process.wait_signal(), Some(libc::SIGTERM));
            }
            self.wait_for_its_end(guest);
        }
    }

    fn wait_for_its_end(&self, mut guest: Guest) {
        guest.process.wait_end();
        for disk in guest.held() {
            self.host.wait_free(&disk);
        }
    }

    fn suspend_or_resume(&mut self) {
        let Some(number) = self.any_guest() else {
            return;
        };
        let guest = &mut self.guests[number];
        let make = |disk: &String| match guest.is_suspended {
            true => acquire("", disk, 0),
            false => release("", disk),
        };
        let calls: Vec<Call> = guest.disks().iter().map(make).collect();
        guest.is_suspended = !guest.is_suspended;
        speak_for(&self.daemon, guest, &calls);
    }

    fn plug_or_unplug(&mut self) {
        let Some(number) = self.any_guest() else {
            return;
        };
        let guest = &mut self.guests[number];
        let disk = guest.plugged_disk();
        let call = match guest.has_plugged {
            true => release("", &disk),
            false => acquire("", &disk, 0),
        };
        guest.has_plugged = !guest.has_plugged;
        speak_for(&self.daemon, guest, &[call]);
    }

    /// Somebody wants the disks of a guest, in vain.
    fn rival(&mut self) {
        let Some(number) = self.any_guest() else {
            return;
        };
        let mut rival = self.daemon.client();
        rival.call(&register_as("rival", 4242)).expect_ok();
        for disk in self.guests[number].held() {
            rival.call(&acquire("", &disk, 0)).expect_error(87, 51);
        }
    }

    fn administrator_asks(&mut self) {
        const LIST_CLIENTS: i32 = 8;
        let mut admin = self.daemon.admin_client();
        let mut arguments = Vec::new();
        put_string(&mut arguments, b"virtlockd");
        // Wants a list, and no flags.
        arguments.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0]);
        admin.send(&frame(
            ADMIN_PROGRAM,
            1,
            LIST_CLIENTS,
            CALL,
            0,
            0,
            &arguments,
        ));
        Reply::parse(&admin.receive()).expect_ok();
    }

    /// Nonsense, half a message, or nothing at all.
    fn stranger(&mut self) {
        let count = self.random.below(2000);
        let mut bytes = self.random.bytes(count);
        if self.random.percent(50) {
            bytes = register_as("half", 4243).frame(0);
            bytes.truncate(self.random.below(60));
        }
        let mut stranger = self.daemon.client();
        // The daemon may have closed the connection, which is its right.
        let _ = stranger.try_send(&bytes);
    }

    /// Makes it [`GUESTS`] guests, none of them suspended or with a third disk, and nobody else.
    fn settle(&mut self) {
        while self.guests.len() > GUESTS {
            self.kill_guest();
        }
        while self.guests.len() < GUESTS {
            self.start_guest();
        }
        for guest in &mut self.guests {
            if std::mem::take(&mut guest.is_suspended) {
                let calls = guest.disks().map(|disk| acquire("", &disk, 0));
                speak_for(&self.daemon, guest, &calls);
            }
            if guest.has_plugged {
                let call = release("", &guest.plugged_disk());
                guest.has_plugged = false;
                speak_for(&self.daemon, guest, &[call]);
            }
        }
        self.check_all();
    }

    /// Every guest lives and holds what it has to, and nobody holds anything else.
    fn check_all(&mut self) {
        let mut held = 0;
        for guest in &mut self.guests {
            assert!(guest.process.is_alive(), "{} has ended", guest.name);
            for disk in guest.held() {
                self.host.assert_held(&disk);
                held += 1;
            }
        }
        let locks = locks_of(&self.daemon);
        let of_disks = locks.iter().filter(|lock| lock.contains("OFDLCK"));
        assert_eq!(of_disks.count(), held, "{locks:?}");
    }
}

/// The process that serves is killed, again and again, whatever it does at that moment.
struct Kills {
    count: usize,
    last: Instant,
    on_its_way: Option<JoinHandle<()>>,
}

impl Kills {
    fn new() -> Kills {
        Kills {
            count: 0,
            last: Instant::now(),
            on_its_way: None,
        }
    }

    /// If it is time to. Not while there is an understudy, which would take over, in a process of another
    /// number.
    fn kill_in_time(&mut self, daemon: &Daemon, random: &mut Random) {
        if self.last.elapsed() < KILL_EVERY {
            return;
        }
        self.wait();
        daemon.client().ping();
        if let [reactor] = children_of(daemon.pid())[..] {
            let pause = Duration::from_micros(random.below(5000) as u64);
            self.on_its_way = Some(std::thread::spawn(move || {
                std::thread::sleep(pause);
                kill(Pid::from_raw(reactor), Signal::SIGKILL)
                    .expect("kill the process that serves");
            }));
            self.count += 1;
        }
        self.last = Instant::now();
    }

    fn is_one_on_its_way(&self) -> bool {
        let kill = self.on_its_way.as_ref();
        kill.is_some_and(|kill| !kill.is_finished())
    }

    fn wait(&mut self) {
        if let Some(kill) = self.on_its_way.take() {
            kill.join().expect("a kill");
        }
    }
}

/// What libvirtd does for a guest: a connection that registers with the pid of the guest, makes its
/// calls and ends.
#[track_caller]
fn speak_for(daemon: &Daemon, guest: &Guest, calls: &[Call]) {
    let mut client = daemon.client();
    let pid = guest.process.pid();
    client.call(&register_as(&guest.name, pid)).expect_ok();
    for call in calls {
        client.call(call).expect_ok();
    }
}

/// What the daemon has at a moment at which there are [`GUESTS`] guests.
#[derive(Clone, Copy, Debug)]
struct Look {
    memory_kib: u64,
    /// What lies on the desk, which the next process that serves finds there.
    desk_kib: u64,
    descriptors: usize,
}

impl Look {
    fn at(daemon: &Daemon) -> Look {
        // A successor that has not begun yet is asleep, too: on a busy machine that takes a while.
        daemon.client().ping();
        // And then short connections are on their way out.
        daemon.wait_until_asleep();
        Look {
            memory_kib: daemon.memory_kib("VmRSS"),
            desk_kib: desk_kib(daemon),
            descriptors: daemon.descriptors(),
        }
    }
}

/// A size of what a look saw, KiB.
type Kib = fn(&Look) -> u64;

/// What the memory file takes that both processes of the daemon have mapped.
fn desk_kib(daemon: &Daemon) -> u64 {
    let process = format!("/proc/{}", daemon.pid());
    let maps = std::fs::read_to_string(format!("{process}/maps")).expect("what it has mapped");
    let desk = maps.lines().find(|line| line.contains("virtlockd-desk"));
    let range = desk.and_then(|line| line.split_whitespace().next());
    let file = range.map(|range| std::fs::metadata(format!("{process}/map_files/{range}")));
    file.map_or(0, |file| file.expect("the desk's file").blocks() / 2)
}

/// The looks so far, in the steady state and right after an upgrade.
struct Watch {
    begun: Instant,
    length: Duration,
    told: Instant,
    steady: Vec<Look>,
    upgraded: Vec<Look>,
}

impl Watch {
    fn new(length: Duration) -> Watch {
        Watch {
            begun: Instant::now(),
            length,
            told: Instant::now(),
            steady: Vec::new(),
            upgraded: Vec::new(),
        }
    }

    /// Not before there is something to compare.
    fn is_over(&self) -> bool {
        self.begun.elapsed() >= self.length && self.steady.len() >= 3
    }

    fn progress(&mut self, what: impl FnOnce() -> String) {
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            let minutes = self.begun.elapsed().as_secs() / 60;
            let (steady, upgraded) = (self.steady.last(), self.upgraded.last());
            eprintln!(
                "soak, {minutes} min: {}; before the last upgrade {steady:?}, after it {upgraded:?}",
                what()
            );
        }
    }

    fn everything_is_flat(&self) {
        for (what, looks) in [
            ("in the steady state", &self.steady),
            ("after an upgrade", &self.upgraded),
        ] {
            if looks.is_empty() {
                continue;
            }
            let third = looks.len() / 3;
            let (warm_up, rest) = looks.split_at(third);
            let last = &rest[rest.len() - third..];
            let kinds: [(&str, Kib); 2] = [
                ("memory", |look| look.memory_kib),
                ("the desk", |look| look.desk_kib),
            ];
            for (kind, kib) in kinds {
                let most = |looks: &[Look]| looks.iter().map(kib).max().expect("looks");
                let least = |looks: &[Look]| looks.iter().map(kib).min().expect("looks");
                let (before, after) = (most(warm_up), least(last));
                eprintln!(
                    "soak, {what}, {kind}: {} KiB at first, {before} KiB at most in the first third, \
                     {after} KiB at least and {} KiB at most in the last; {} descriptors",
                    kib(&looks[0]),
                    most(last),
                    looks[0].descriptors
                );
                assert_memory(after <= before + SLACK_KIB, || {
                    format!("{kind} grows: {looks:?}")
                });
            }
            let descriptors = looks[0].descriptors;
            assert!(
                looks.iter().all(|look| look.descriptors == descriptors),
                "the number of descriptors changes: {looks:?}"
            );
        }
    }
}

/// The same with libvirtd and real guests, more slowly.
#[test]
fn with_the_same_real_guests_the_daemon_has_the_same_memory_and_descriptors() {
    const REAL_GUESTS: usize = 4;
    if !libvirt::can_run() {
        return;
    }
    let seed = Random::seed_from("VIRTLOCKD_SOAK_SEED");
    println!("VIRTLOCKD_SOAK_SEED={seed}");
    let mut random = Random::new(seed);
    let mut libvirt = Libvirt::start(&support::daemon::program(), "");
    let domains: Vec<(Domain, std::path::PathBuf)> = (0..REAL_GUESTS)
        .map(|number| {
            let disk = libvirt.disk(&format!("soak-{number}"));
            let domain = Domain::new(&format!("soak-{number}")).disk(&disk);
            libvirt.create(&domain).expect("start a guest");
            (domain, disk)
        })
        .collect();
    let mut watch = Watch::new(seconds());
    let mut started = REAL_GUESTS;
    let mut upgrades = 0;
    let mut kills = Kills::new();
    while !watch.is_over() {
        for _ in 0..2 {
            let (domain, disk) = random.pick(&domains);
            if random.percent(50) {
                libvirt.destroy(&domain.name);
            } else {
                let pid = Pid::from_raw(libvirt.guest_pid(&domain.name));
                kill(pid, Signal::SIGKILL).expect("kill a guest");
            }
            wait_until(DEADLINE, "the disk to be free", || {
                lock_probe(disk).is_none()
            });
            kills.kill_in_time(libvirt.lockd(), &mut random);
            // libvirtd may take a moment to notice.
            wait_until(DEADLINE, "the guest to start again", || {
                libvirt.create(domain).is_ok()
            });
            started += 1;
        }
        kills.wait();
        let steady = Look::at(libvirt.lockd());
        upgrade(libvirt.lockd());
        upgrades += 1;
        for (_, disk) in &domains {
            assert!(lock_probe(disk).is_some(), "{} is free", disk.display());
        }
        let upgraded = Look::at(libvirt.lockd());
        watch.steady.push(steady);
        watch.upgraded.push(upgraded);
        watch.progress(|| {
            format!(
                "{started} guests, {upgrades} upgrades, {} kills",
                kills.count
            )
        });
    }
    eprintln!(
        "soak with libvirtd: {started} guests, {upgrades} upgrades, {} kills",
        kills.count
    );
    assert!(kills.count > 0, "a soak without kills");
    watch.everything_is_flat();
}
