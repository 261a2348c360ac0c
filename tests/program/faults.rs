//! Every system call that the daemon makes is made to fail once, from its start over an upgrade to
//! its end; it must go on, or end and say why.
//!
//! The first call of a name fails, in the next run the second, and so on until a run is over before the
//! one that would fail: each for itself in the process that was started, in those that serve, and in the
//! copy that goes on should a successor not serve. In each run a story is played to the daemon: owners
//! that lock, share, conflict, release and leave, the admin socket, SIGHUP, SIGUSR1, SIGTERM. Since one
//! call fails only once, whatever was refused because of it must work when it is asked for again. All the
//! time what was granted is compared with what the kernel says.
//!
//! By default each name fails with one of its errors, chosen by a printed seed. `CI=true` or
//! `VIRTLOCKD_FAULTS=all` tries all errors, `VIRTLOCKD_FAULTS=reactor:openat:EMFILE:17,read:EIO,poll` these
//! (one failure, all calls with one error, all errors), `VIRTLOCKD_FAULTS_SEED` repeats a choice.

use crate::support;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::injector::{self, Injector};
use crate::support::client::{
    ADMIN_PROGRAM, AUTOCREATE, CALL, Call, Client, PING, PONG, RESOURCE_BUSY, Received, Reply,
    SHARED, acquire, create_resource, delete_resource, frame, new_lockspace, put_string, put_u32,
    register_as, release, restrict,
};
use crate::support::daemon::{self, Daemon, writers_of_notes};
use crate::support::faults::{self, ESSENTIAL, FAILING, Failing, Fault, Kernel, LEFT_ALONE, Role};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner, runs};
use crate::support::random::Random;
use crate::support::upgrade::{Disturbed, image, refusals};
use crate::support::{DEADLINE, lock_probe, wait_for, wait_until};
use nix::sys::signal::Signal;

const CONFIG: &str = "/run/virtlockd-test.conf";
const PID_FILE: &str = "/run/virtlockd-test.pid";
/// The log file that the admin client turns on and off again.
const LOG_FILE: &str = "/run/log";
/// Procedure of the admin program.
const SET_LOG_OUTPUTS: i32 = 16;

/// How often something is tried that may fail once. Twice does, but for a daemon that turns one failure
/// into a refusal first and a closed connection then.
const TRIES: usize = 3;

#[test]
fn whatever_system_call_fails_no_lock_is_lost_and_none_is_left() {
    if !support::require_root() {
        return;
    }
    if daemon::c_daemon().is_some_and(|path| path == daemon::program()) {
        return support::skip("libvirt's own daemon has other rules");
    }
    let censuses = [Kernel::This, Kernel::NamesNoPeers].map(census);
    let jobs = Mutex::new(jobs(&censuses));
    let outcomes = Mutex::new(Outcomes::default());
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(4);
    let quiet = std::panic::take_hook();
    // A failed run is told at the end, with what failed in it.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(fault) = next(&jobs) {
                    let (end, injected) = play(&fault);
                    if injected.is_none() {
                        over(&jobs, &fault);
                    }
                    let mut outcomes = outcomes.lock().expect("the outcomes");
                    outcomes.note(&fault, end, injected.as_deref());
                }
            });
        }
    });
    std::panic::set_hook(quiet);
    outcomes.into_inner().expect("the outcomes").report();
}

/// NFS and FUSE let numbers out that the kernel means for itself; whoever reads them must be able to
/// look them up.
#[test]
fn an_error_number_without_a_name_is_told_as_it_is() {
    if !support::require_root() || !support::require_strace() {
        return;
    }
    if daemon::c_daemon().is_some_and(|path| path == daemon::program()) {
        return support::skip("libvirt's own daemon makes other system calls");
    }
    let namespace = Namespace::new();
    let daemon = Daemon::start(&namespace, &[], &[]);
    std::fs::write(namespace.path("/run/disk"), "").expect("write a disk");
    let mut client = daemon.client();
    client.call(&register_as("guest", 4242)).expect_ok();
    client.call(&new_lockspace("/run/leases")).expect_ok();
    client
        .call(&create_resource("/run/leases", "old"))
        .expect_ok();
    let cases = [
        ("openat", 512, acquire("", "/run/disk", 0)),
        ("fcntl", 524, acquire("", "/run/disk", 0)),
        ("openat2", 528, acquire("/run/leases", "new", AUTOCREATE)),
        ("openat2", 512, create_resource("/run/leases", "new")),
        ("unlinkat", 524, delete_resource("/run/leases", "old")),
        ("mkdir", 528, new_lockspace("/run/more")),
    ];
    for (system_call, number, call) in cases {
        let disturbed = Disturbed::with(&daemon, system_call, &format!("error={number}"));
        let reply = client.call(&call);
        drop(disturbed);
        let error = reply.error();
        let text = format!("Unknown error {number}");
        assert_eq!(error.int1, number, "{system_call}: {error:?}");
        assert!(error.message.ends_with(&text), "{system_call}: {error:?}");
    }
    let mut admin = daemon.admin_client();
    let disturbed = Disturbed::with(&daemon, "openat", "error=512");
    let mut payload = Vec::new();
    put_u32(&mut payload, 1);
    put_string(&mut payload, format!("1:file:{LOG_FILE}").as_bytes());
    put_u32(&mut payload, 0);
    admin.send(&frame(
        ADMIN_PROGRAM,
        1,
        SET_LOG_OUTPUTS,
        CALL,
        1,
        0,
        &payload,
    ));
    let reply = Reply::parse(&admin.receive());
    drop(disturbed);
    let error = reply.error();
    assert_eq!(error.int1, 512, "{error:?}");
    assert!(error.message.ends_with("Unknown error 512"), "{error:?}");
}

/// All calls of one name by processes of one role, failing with one error.
struct Job<'a> {
    role: Role,
    call: &'static str,
    error: &'static str,
    next: usize,
    last: usize,
    census: &'a Census,
}

/// What is to be tried.
fn jobs(censuses: &[Census]) -> Vec<Job<'_>> {
    let wanted = wanted();
    let seed = Random::seed_from("VIRTLOCKD_FAULTS_SEED");
    eprintln!("VIRTLOCKD_FAULTS_SEED={seed}");
    let mut random = Random::new(seed);
    let mut jobs = Vec::new();
    for Failing { name, errors, .. } in FAILING {
        let errors: Vec<&'static str> = errors.split(' ').collect();
        for role in Role::ALL {
            let chosen = chosen(&mut random, &errors, |error| {
                let mut censuses = censuses.iter();
                censuses.any(|census| census.has_one_for(role, name, error))
            });
            for error in &errors {
                let numbers: Vec<(usize, usize)> = match wanted.as_str() {
                    "" if Some(*error) == chosen => vec![(1, usize::MAX)],
                    "" => Vec::new(),
                    "all" => vec![(1, usize::MAX)],
                    list => list
                        .split(',')
                        .filter_map(|one| numbers(one, role, name, error))
                        .collect(),
                };
                for (next, last) in numbers {
                    let with = censuses
                        .iter()
                        .filter(|census| census.calls.contains_key(&(role, (*name).to_owned())));
                    jobs.extend(with.map(|census| Job {
                        role,
                        call: name,
                        error,
                        next,
                        last,
                        census,
                    }));
                }
            }
        }
    }
    assert!(
        !jobs.is_empty(),
        "VIRTLOCKD_FAULTS={wanted}: nothing to try"
    );
    jobs
}

/// One of the errors that the kernel would give for a call that was seen: with another one none would fail.
/// Where it would give none of them a number is used up as well, so that a seed chooses the same for the rest.
fn chosen(
    random: &mut Random,
    errors: &[&'static str],
    would_be_given: impl Fn(&'static str) -> bool,
) -> Option<&'static str> {
    let mut possible = errors.to_vec();
    possible.retain(|error| would_be_given(error));
    let number = random.next();
    let at = number.checked_rem(possible.len() as u64)?;
    possible.get(at as usize).copied()
}

/// Which failures are asked for; nothing for one error of each call.
fn wanted() -> String {
    std::env::var("VIRTLOCKD_FAULTS").unwrap_or_else(|_| {
        let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
        if is_ci { "all" } else { "" }.to_owned()
    })
}

/// The first and last call that `wanted` (a name, or with an error, or with a number, too; perhaps with a role
/// in front) asks for.
fn numbers(wanted: &str, role: Role, call: &str, error: &str) -> Option<(usize, usize)> {
    let mut words: Vec<&str> = wanted.split(':').collect();
    if let Some(asked_for) = Role::of(words[0]) {
        words.remove(0);
        if asked_for != role {
            return None;
        }
    }
    match words[..] {
        [] => Some((1, usize::MAX)),
        [name] if name == call => Some((1, usize::MAX)),
        [name, code] if (name, code) == (call, error) => Some((1, usize::MAX)),
        [name, code, nth] if (name, code) == (call, error) => {
            let nth = nth.parse().expect("VIRTLOCKD_FAULTS: a number");
            Some((nth, nth))
        }
        _ => None,
    }
}

fn next(jobs: &Mutex<Vec<Job<'_>>>) -> Option<Fault> {
    let mut jobs = jobs.lock().expect("the jobs");
    loop {
        let job = jobs.last_mut()?;
        let nth = job.next;
        if nth > job.last {
            jobs.pop();
            continue;
        }
        job.next += 1;
        let (role, call, error, kernel) = (job.role, job.call, job.error, job.census.kernel);
        let fault = Fault {
            role,
            call,
            error,
            nth,
            kernel,
        };
        match job
            .census
            .calls
            .get(&(role, call.to_owned()))
            .and_then(|lines| lines.get(nth - 1))
        {
            Some(line) if !is_to_fail(&fault, line) => (),
            None if kernel != Kernel::This => job.last = nth,
            _ => return Some(fault),
        }
    }
}

/// Whether this call of an undisturbed run is worth a run in which it fails so.
fn is_to_fail(fault: &Fault, line: &str) -> bool {
    // On a kernel that names no peers the rest is as on this one.
    let is_another = fault.kernel == Kernel::This || faults::is_about_processes(line);
    is_another && !faults::cannot_fail(line) && !faults::is_untrue(fault, line)
}

/// There were not as many calls: no further one is tried.
fn over(jobs: &Mutex<Vec<Job<'_>>>, fault: &Fault) {
    let mut jobs = jobs.lock().expect("the jobs");
    let is_meant = |job: &Job<'_>| {
        let job = (job.role, job.call, job.error, job.census.kernel);
        job == (fault.role, fault.call, fault.error, fault.kernel)
    };
    jobs.retain(|job| !is_meant(job));
}

/// The calls of an undisturbed run.
struct Census {
    kernel: Kernel,
    /// By role and name, each with its lines.
    calls: BTreeMap<(Role, String), Vec<String>>,
}

impl Census {
    /// Whether there is a call for which the kernel would give this error.
    fn has_one_for(&self, role: Role, call: &'static str, error: &'static str) -> bool {
        let fault = Fault {
            role,
            call,
            error,
            nth: 1,
            kernel: self.kernel,
        };
        let lines = self.calls.get(&(role, call.to_owned()));
        lines.is_some_and(|lines| lines.iter().any(|line| is_to_fail(&fault, line)))
    }
}

/// Plays the story once undisturbed. A system call that is in neither list is a failure: somebody
/// has to say what happens when it fails.
fn census(kernel: Kernel) -> Census {
    let scene = Scene::new();
    let (_, injector) = scene.story(None, kernel);
    let mut calls: BTreeMap<(Role, String), Vec<String>> = BTreeMap::new();
    for (role, line) in injector.seen() {
        let (name, _) = line.split_once('(').expect("a call");
        calls.entry((role, name.to_owned())).or_default().push(line);
    }
    let is_known = |name: &str| {
        let mut failing = FAILING.iter().map(|known| known.name);
        let mut left_alone = LEFT_ALONE.iter().map(|(known, ..)| *known);
        failing.any(|known| known == name) || left_alone.any(|known| known == name)
    };
    let unknown: Vec<_> = calls.keys().filter(|(_, name)| !is_known(name)).collect();
    assert!(
        unknown.is_empty(),
        "the daemon makes calls that nobody makes fail: {unknown:?}"
    );
    if kernel == Kernel::This {
        let missing = essential().filter(|call| !calls.contains_key(call));
        let missing: Vec<_> = missing.collect();
        assert!(
            missing.is_empty(),
            "the daemon was not seen to make these calls: {missing:?}"
        );
    }
    Census { kernel, calls }
}

fn essential() -> impl Iterator<Item = (Role, String)> {
    let of_one = |(role, names): &(Role, &'static [&'static str])| {
        let role = *role;
        names.iter().map(move |name| (role, (*name).to_owned()))
    };
    ESSENTIAL.iter().flat_map(of_one)
}

/// How a run ended.
enum End {
    /// The daemon went on.
    Served,
    /// It did not start, and said this.
    NoStart(String),
    /// Something is wrong.
    Wrong(String),
}

/// Plays the story with a fault: how it ended, and the call that failed.
fn play(fault: &Fault) -> (End, Option<String>) {
    let scene = Scene::new();
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let (end, injector) = scene.story(Some(fault), fault.kernel);
        let seen = injector.seen();
        (end, injector::injected(&seen).map(str::to_owned))
    }));
    ran.unwrap_or_else(|cause| {
        let text = cause.downcast::<String>().map_or_else(
            |other| other.downcast::<&str>().map_or("", |text| *text).to_owned(),
            |text| *text,
        );
        (End::Wrong(text), scene.injected())
    })
}

/// What all runs brought.
#[derive(Default)]
struct Outcomes {
    runs: usize,
    /// How often each call failed as the kernel would let it fail.
    injected: BTreeMap<(Role, String), usize>,
    untrue: usize,
    wrong: Vec<String>,
    ended: BTreeMap<String, Vec<String>>,
}

impl Outcomes {
    fn note(&mut self, fault: &Fault, end: End, injected: Option<&str>) {
        self.runs += 1;
        let Some(line) = injected else {
            if let End::Wrong(text) = end {
                self.wrong.push(format!("{fault} (nothing failed): {text}"));
            }
            return;
        };
        if faults::is_untrue(fault, line) {
            self.untrue += 1;
            return;
        }
        let call = (fault.role, fault.call.to_owned());
        *self.injected.entry(call).or_default() += 1;
        let mut ended = |how: &str, text: String| {
            self.ended
                .entry(format!("{how}: {text}"))
                .or_default()
                .push(fault.to_string());
        };
        match end {
            End::Served => (),
            End::NoStart(text) => ended("no start", text),
            End::Wrong(text) => {
                // At once: whoever waits for a thousand runs may not want to.
                eprintln!("{fault}: {line}\n    {text}");
                self.wrong.push(format!("{fault}: {line}\n    {text}"));
            }
        }
    }

    fn report(self) {
        let Outcomes {
            runs,
            injected,
            untrue,
            wrong,
            ended,
        } = self;
        for (how, faults) in &ended {
            eprintln!("{how}\n    {}", faults.join(" "));
        }
        let ends: usize = ended.values().map(Vec::len).sum();
        let calls: Vec<_> = injected
            .iter()
            .map(|((role, call), count)| format!("{} {call} {count}", role.name()))
            .collect();
        eprintln!("failed: {}", calls.join(", "));
        if matches!(wanted().as_str(), "" | "all") {
            let spared = essential().filter(|call| !injected.contains_key(call));
            let spared: Vec<_> = spared.collect();
            assert!(spared.is_empty(), "these calls never failed: {spared:?}");
        }
        let injected: usize = injected.values().sum();
        eprintln!(
            "{runs} runs, {injected} of them with a call that failed, {untrue} with one that failed as the \
             kernel would not let it; the daemon ended and said why in {ends}"
        );
        assert!(
            wrong.is_empty(),
            "{} runs went wrong:\n{}",
            wrong.len(),
            wrong.join("\n")
        );
    }
}

// The files of the story, all in the namespace.
/// Held by the guest alone, until it is dead.
const WITNESS: &str = "/run/witness";
/// The ledger: in the run directory, or in memory without a name.
const LEDGER_FILE: &str = "virtlockd-ledger";
/// What the daemon can do without, and how it says that it does.
const DONE_WITHOUT: [(&str, &str); 3] = [
    (LEDGER_FILE, "without a ledger that could be passed on"),
    (SIGNALS, "The kernel is asked for them now and then"),
    (TIMER, "Deadlines are kept without one"),
];
const SIGNALS: &str = "anon_inode:[signalfd]";
const TIMER: &str = "anon_inode:[timerfd]";
const MOUNTS: &str = "/mountinfo";
/// Two that listen, the guest's, the helper's.
const SOCKETS: usize = 4;
/// Held by the guest and the helper together.
const COMMON: &str = "/run/common";
/// Held by the guest, then by the helper.
const HANDED_ON: &str = "/run/handed-on";
/// Another name of the witness.
const ALIAS: &str = "/run/alias";
/// Made by AUTOCREATE in the default lockspace.
const MADE: &str = "/run/made";
/// A lockspace that is a directory.
const SPACE: &str = "/run/space";
/// Made by AUTOCREATE in it.
const LEASE: &str = "lease";
/// Held by the one who comes late.
const LATE: &str = "/run/late";

/// A namespace with disks and a configuration.
struct Scene {
    namespace: Namespace,
}

impl Scene {
    fn new() -> Scene {
        let namespace = Namespace::new();
        for disk in [WITNESS, COMMON, HANDED_ON, LATE] {
            std::fs::write(namespace.path(disk), "data").expect("make a disk");
        }
        std::fs::hard_link(namespace.path(WITNESS), namespace.path(ALIAS)).expect("make a link");
        std::fs::write(namespace.path(CONFIG), "max_clients = 100\n").expect("configure");
        Scene { namespace }
    }

    /// The line of the call that was made to fail, if it came to that.
    fn injected(&self) -> Option<String> {
        let seen = injector::read(&self.namespace);
        injector::injected(&seen).map(str::to_owned)
    }

    fn start(&self, fault: Option<&Fault>, kernel: Kernel) -> (Daemon, Injector) {
        let words = ["-f", CONFIG, "-p", PID_FILE];
        // cargo's directories of libraries would be searched, with dozens of calls.
        let env = [("LD_LIBRARY_PATH", "")];
        Injector::start(&self.namespace, &words, &env, fault, kernel)
    }

    /// From the start of a daemon to its end.
    fn story(&self, fault: Option<&Fault>, kernel: Kernel) -> (End, Injector) {
        let (mut daemon, injector) = self.start(fault, kernel);
        let is_there = wait_for(DEADLINE, "the daemon to serve or to end", || {
            if daemon.ended().is_some() {
                return Some(false);
            }
            serves(&daemon).then_some(true)
        });
        if !is_there {
            return (self.not_started(&mut daemon, fault), injector);
        }
        // SIGKILL is sent to those alone that do not die of SIGTERM, and after a while only; as long
        // it takes until memory is given back.
        let on_term = match fault {
            Some(fault) if !["pidfd_send_signal", "madvise"].contains(&fault.call) => OnTerm::Die,
            _ => OnTerm::Ignore,
        };
        let mut play = Play::new(&self.namespace, daemon, on_term);
        play.compare();
        play.lease();
        // The other kernel is one that has no pair of sockets, which that process needs.
        let is_of_notes = fault.is_none_or(|fault| fault.role == Role::Scribe);
        if is_of_notes && kernel == Kernel::This {
            self.note_or_failure();
        }
        play.locks();
        play.administration();
        play.reload();
        play.upgrade();
        play.owner_leaves();
        play.end();
        (End::Served, injector)
    }

    /// Nobody waits for the process that writes notes, which may not have begun when the lease is released
    /// again: then its calls are seen in one run and not in the next.
    fn note_or_failure(&self) {
        let file = self.namespace.path(file_of(SPACE, LEASE));
        wait_for(DEADLINE, "a note in the lease file, or a failure", || {
            let is_written = std::fs::metadata(&file).is_ok_and(|file| file.len() > 0);
            (is_written || self.injected().is_some()).then_some(())
        });
    }

    /// The daemon ended at its start: it says why, and nothing of it is left.
    fn not_started(&self, daemon: &mut Daemon, fault: Option<&Fault>) -> End {
        let status = daemon.wait_end();
        let said = last_words(&daemon.stderr());
        did_not_panic(daemon);
        assert!(
            !status.success(),
            "it did not start and ended with {status}"
        );
        assert!(
            said_enough(&said, fault),
            "it did not start ({status}) and did not say why"
        );
        for socket in [daemon.lock_socket(), daemon.admin_socket()] {
            let answer = UnixStream::connect(socket);
            assert!(answer.is_err(), "somebody answers on {}", socket.display());
        }
        let pid_file = self.namespace.path(PID_FILE);
        if pid_file.exists() {
            assert_eq!(lock_probe(&pid_file), None, "the pid file is locked");
        }
        End::NoStart(format!("{status}: {said}"))
    }
}

/// Whether it was said why the daemon ended. Without memory for its first page the dynamic loader
/// crashes, before any line of ours has run.
fn said_enough(said: &str, fault: Option<&Fault>) -> bool {
    !said.is_empty() || fault.is_some_and(|fault| fault.call == "mmap")
}

/// No failure of the system is a mistake in the program. (The runtime panics, before the program
/// begins, if it cannot have a stack for the handling of stack overflows.)
fn did_not_panic(daemon: &Daemon) {
    let log = daemon.stderr();
    let is_panic =
        |line: &str| line.contains("panicked at") && !line.contains("/stack_overflow.rs:");
    let panic = log.lines().skip_while(|line| !is_panic(line));
    let panic: Vec<&str> = panic.take(3).collect();
    assert!(panic.is_empty(), "the daemon panicked: {panic:?}");
}

/// Whether the daemon answers somebody new.
fn serves(daemon: &Daemon) -> bool {
    let Ok(stream) = UnixStream::connect(daemon.lock_socket()) else {
        return false;
    };
    let mut client = Client::over(stream);
    let sent = client.try_send(&PING).is_ok();
    sent && matches!(client.receive_within(DEADLINE), Received::Frame(answer) if answer == PONG)
}

/// The error that was written last, be it the daemon's or, before it runs, the dynamic loader's or
/// the runtime's.
fn last_words(log: &str) -> String {
    let is_error = |line: &&str| match line.split_once(": ") {
        Some((date, _)) if date.ends_with("+0000") => line.contains(": error : "),
        _ => !line.trim().is_empty(),
    };
    let line = log.lines().rev().find(is_error).unwrap_or_default();
    // Without the date and the process, so that equal ones are equal.
    let after_date = line.split_once(": error : ").map_or(line, |(_, text)| text);
    after_date.to_owned()
}

/// A domain: whose locks are compared with the kernel's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    /// A process that holds a connection of its own, and is fenced when it closes it.
    Guest,
    /// A domain whose process is another one than the client: libvirt's plugin is such a client.
    Helper,
}

/// What came of a call.
enum Said {
    Granted,
    Refused(String),
    /// Busy: another has it.
    Busy,
    /// The connection was closed instead.
    Closed(String),
}

impl Said {
    fn of(reply: Reply) -> Said {
        match reply {
            Reply::Ok { .. } => Said::Granted,
            Reply::Error(error) if error.code == RESOURCE_BUSY => Said::Busy,
            Reply::Error(error) => Said::Refused(error.message),
        }
    }
}

/// A daemon and who uses it, and what was granted.
struct Play<'a> {
    namespace: &'a Namespace,
    daemon: Daemon,
    /// The process that is the daemon: another one after an upgrade whose successor did not serve.
    pid: i32,
    guest: Owner,
    helper: Client,
    helper_pid: i32,
    /// Lock files by their paths in the namespace: who holds it, and whether shared.
    held: BTreeMap<String, (BTreeSet<Who>, bool)>,
    watch: Option<Watch>,
    /// Descriptors that were open when the daemon was started, by number: they stay open over an exec,
    /// which no descriptor of the daemon's own does.
    inherited: BTreeSet<i32>,
}

impl Play<'_> {
    fn new(namespace: &Namespace, daemon: Daemon, on_term: OnTerm) -> Play<'_> {
        let guest = Owner::connect(daemon.lock_socket(), on_term);
        let helper = daemon.client();
        let helper_pid = i32::try_from(namespace.holder_pid()).expect("a pid");
        let mut play = Play {
            namespace,
            pid: daemon.pid(),
            daemon,
            guest,
            helper,
            helper_pid,
            held: BTreeMap::new(),
            watch: None,
            inherited: BTreeSet::new(),
        };
        play.inherited = play
            .descriptors()
            .into_iter()
            .filter(|(number, _)| {
                let path = format!("/proc/{}/fdinfo/{number}", play.pid);
                std::fs::read_to_string(path).is_ok_and(|text| !is_close_on_exec(&text))
            })
            .map(|(number, _)| number)
            .collect();
        play.register(Who::Guest);
        play.register(Who::Helper);
        play
    }

    fn call_once(&mut self, who: Who, call: &Call) -> Said {
        assert!(
            runs(self.pid),
            "the daemon ended: {}",
            last_words(&self.daemon.stderr())
        );
        match who {
            Who::Guest => match self.guest.try_call(call) {
                Ok(reply) => Said::of(reply),
                Err(why) => Said::Closed(why),
            },
            Who::Helper => call_of(&mut self.helper, &call.frame(7)),
        }
    }

    /// A call that is right, so that it must be granted, if not at once then when it is tried again.
    fn granted(&mut self, who: Who, call: &Call) {
        let mut refusals = Vec::new();
        for _ in 0..TRIES {
            match self.call_once(who, call) {
                Said::Granted => return self.note_granted(who, call),
                Said::Busy => refusals.push("busy".to_owned()),
                Said::Refused(text) => refusals.push(text),
                Said::Closed(text) => {
                    refusals.push(text);
                    self.recover(who);
                    self.forget(who, call);
                }
            }
            self.compare_locks();
        }
        panic!("{who:?}: {call:?} was refused again and again: {refusals:?}");
    }

    /// A call that asks for what another one has.
    fn busy(&mut self, who: Who, call: &Call) {
        let mut refusals = Vec::new();
        for _ in 0..TRIES {
            match self.call_once(who, call) {
                Said::Busy => return,
                Said::Granted => panic!("{who:?}: {call:?} was granted, and another one has it"),
                Said::Refused(text) => refusals.push(text),
                Said::Closed(text) => {
                    refusals.push(text);
                    self.recover(who);
                }
            }
            self.compare_locks();
        }
        panic!("{who:?}: {call:?} was not answered with busy: {refusals:?}");
    }

    fn register(&mut self, who: Who) {
        let mut refusals = Vec::new();
        for _ in 0..TRIES {
            let call = match who {
                Who::Guest => register_as("guest", self.guest.pid()),
                // So long that a few of its locks make the ledger grow.
                Who::Helper => register_as(&"h".repeat(30_000), self.helper_pid),
            };
            match self.call_once(who, &call) {
                Said::Granted => return,
                Said::Busy => refusals.push("busy".to_owned()),
                Said::Refused(text) | Said::Closed(text) => refusals.push(text),
            }
            self.connect_again(who);
        }
        panic!("{who:?} could not register: {refusals:?}");
    }

    fn connect_again(&mut self, who: Who) {
        match who {
            Who::Guest => self.guest.connect_again(),
            Who::Helper => self.helper = self.daemon.client(),
        }
    }

    /// The daemon closed a connection because a call on it failed. For an owner that holds locks
    /// this is as if it had left: it is fenced, and another one comes for it.
    fn recover(&mut self, who: Who) {
        match who {
            Who::Helper => self.connect_again(who),
            Who::Guest => {
                let files: Vec<(String, bool)> = self
                    .held
                    .iter()
                    .filter(|(_, (holders, _))| holders.contains(&Who::Guest))
                    .map(|(file, (_, shared))| (file.clone(), *shared))
                    .collect();
                if files.is_empty() {
                    self.guest.kill();
                }
                self.guest_is_dead();
                self.guest = Owner::connect(self.daemon.lock_socket(), OnTerm::Die);
                self.register(who);
                for (file, shared) in files {
                    let flags = if shared { SHARED } else { 0 };
                    let (space, name) = match file.strip_prefix(SPACE) {
                        Some(name) => (SPACE, name.trim_start_matches('/')),
                        None => ("", file.as_str()),
                    };
                    let create = if space.is_empty() { 0 } else { AUTOCREATE };
                    self.granted(who, &acquire(space, name, flags | create));
                }
                return;
            }
        }
        self.register(who);
    }

    /// Whether a call took effect whose answer was lost is not known: what it was about is given
    /// back, so that it can be tried again.
    fn forget(&mut self, who: Who, call: &Call) {
        if let (Who::Helper, Call::Acquire { path, name, .. } | Call::Release { path, name, .. }) =
            (who, call)
        {
            let (path, name) = (text(path), text(name));
            match self.call_once(who, &release(path, name)) {
                Said::Closed(text) => panic!("closed once more: {text}"),
                Said::Granted | Said::Busy | Said::Refused(_) => (),
            }
            if let Call::Release { .. } = call {
                // So that there is something to be released.
                let flags = self
                    .held
                    .get(&file_of(path, name))
                    .map_or(0, |(_, shared)| if *shared { SHARED } else { 0 });
                self.granted(who, &acquire(path, name, flags | AUTOCREATE));
            }
        }
    }

    fn note_granted(&mut self, who: Who, call: &Call) {
        match call {
            Call::Acquire { path, name, flags } => {
                let file = file_of(text(path), text(name));
                if file == WITNESS {
                    self.watch = Some(Watch::of(self.namespace.path(&file), self.guest.pid()));
                }
                let (holders, shared) = self.held.entry(file).or_default();
                holders.insert(who);
                *shared = flags & SHARED != 0;
            }
            Call::Release { path, name, .. } => {
                let file = file_of(text(path), text(name));
                if let Some((holders, _)) = self.held.get_mut(&file) {
                    holders.remove(&who);
                    if holders.is_empty() {
                        self.held.remove(&file);
                    }
                }
            }
            _ => (),
        }
    }

    /// The guest dies: what it alone held becomes free, and was not before.
    fn guest_is_dead(&mut self) {
        self.guest.wait_end();
        for (holders, _) in self.held.values_mut() {
            holders.remove(&Who::Guest);
        }
        self.held.retain(|_, (holders, _)| !holders.is_empty());
        if let Some(watch) = self.watch.take() {
            watch.owner_was_dead();
        }
        self.compare_locks();
    }

    /// Waits until the kernel has the locks that were granted and no others, and the daemon the
    /// descriptors that it needs for that and no others.
    fn compare(&self) {
        self.compare_locks();
        let mut seen = String::new();
        let end = std::time::Instant::now() + DEADLINE;
        loop {
            match self.wrong_descriptors() {
                None => return,
                Some(text) if std::time::Instant::now() < end => seen = text,
                Some(_) => panic!("descriptors: {seen}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What is held is locked at any moment; what is free may still be being freed.
    fn compare_locks(&self) {
        for file in self.files() {
            let path = self.namespace.path(&file);
            match self.held.get(&file) {
                Some((holders, shared)) => {
                    let seen = lock_probe(&path);
                    assert!(
                        seen.is_some_and(|lock| lock.exclusive != *shared),
                        "{holders:?} hold {file}, but the kernel says {seen:?}"
                    );
                }
                None => wait_until(DEADLINE, &format!("{file} to be free"), || {
                    !path.exists() || lock_probe(&path).is_none()
                }),
            }
        }
    }

    fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = [WITNESS, COMMON, HANDED_ON, MADE, LATE]
            .map(str::to_owned)
            .into();
        if let Ok(entries) = std::fs::read_dir(self.namespace.path(SPACE)) {
            files.extend(entries.map(|entry| {
                let name = entry.expect("a lock file").file_name();
                format!("{SPACE}/{}", name.to_str().expect("a name in UTF-8"))
            }));
        }
        files.extend(self.held.keys().cloned());
        files.sort();
        files.dedup();
        files
    }

    /// The daemon's descriptors but for the first three, and what each is of.
    fn descriptors(&self) -> Vec<(i32, String)> {
        let directory = PathBuf::from(format!("/proc/{}/fd", self.pid));
        let entries = std::fs::read_dir(&directory).expect("the daemon's descriptors");
        entries
            .filter_map(|entry| {
                let name = entry.expect("a descriptor").file_name();
                let number: i32 = name.to_str()?.parse().ok()?;
                // One that was closed meanwhile cannot be read.
                let of = std::fs::read_link(directory.join(&name)).ok()?;
                (number > 2).then(|| (number, of.to_string_lossy().into_owned()))
            })
            .collect()
    }

    /// What is wrong with the daemon's descriptors, if anything.
    fn wrong_descriptors(&self) -> Option<String> {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        for (number, of) in self.descriptors() {
            // The log may open stderr, and the runtime a source of random numbers, once for all.
            let stderr = std::fs::read_link(format!("/proc/{}/fd/2", self.pid));
            let is_stderr = stderr.is_ok_and(|path| path.as_os_str() == of.as_str());
            if !self.inherited.contains(&number) && !is_stderr && of != "/dev/urandom" {
                let mut kind = ["socket:", LEDGER_FILE, MOUNTS].into_iter();
                let kind = kind.find(|kind| of.contains(kind));
                let kind = kind.map_or(of.as_str(), |kind| kind.trim_end_matches(':'));
                *kinds.entry(kind.to_owned()).or_default() += 1;
            }
        }
        let expected = [
            ("socket", SOCKETS),
            ("anon_inode:[eventpoll]", 2),
            (SIGNALS, 1),
            (TIMER, 1),
            (LEDGER_FILE, 1),
            (PID_FILE, 1),
        ];
        let mut expected: BTreeMap<String, usize> = expected
            .map(|(kind, count)| (kind.to_owned(), count))
            .into();
        expected.extend(self.held.keys().map(|file| (file.clone(), 1)));
        // One to whoever writes notes; that it is over is noticed with the next note.
        if let Some(count) = kinds.get_mut("socket") {
            let more = count.saturating_sub(SOCKETS);
            *count -= more.min(writers_of_notes(self.pid));
        }
        // The reserve: up to sixteen, and fewer if there were none to be had.
        if kinds.get("/").is_some_and(|count| *count <= 16) {
            kinds.remove("/");
        }
        // What is mounted, if that could be opened.
        if kinds.get(MOUNTS).is_some_and(|count| *count == 1) {
            kinds.remove(MOUNTS);
        }
        // What the host refused, which is not a lack of something, the daemon does without, and says so.
        let log = self.daemon.stderr();
        for (kind, words) in DONE_WITHOUT {
            if !kinds.contains_key(kind) && log.contains(words) {
                expected.remove(kind);
            }
        }
        // Whom the helper speaks for has no connection of its own, and is watched if that can be had.
        kinds.retain(|kind, count| !is_pidfd(kind) || *count > 1);
        (kinds != expected).then(|| format!("{kinds:?} instead of {expected:?}"))
    }

    fn lease(&mut self) {
        self.lockspace();
        self.granted(Who::Guest, &acquire(SPACE, LEASE, AUTOCREATE));
    }

    fn locks(&mut self) {
        let (guest, helper) = (Who::Guest, Who::Helper);
        self.granted(guest, &acquire("", WITNESS, 0));
        self.granted(guest, &acquire("", COMMON, SHARED));
        self.granted(guest, &acquire("", HANDED_ON, 0));
        self.granted(helper, &acquire("", COMMON, SHARED));
        self.busy(helper, &acquire("", HANDED_ON, 0));
        self.busy(helper, &acquire("", ALIAS, SHARED));
        self.busy(helper, &acquire(SPACE, LEASE, AUTOCREATE));
        self.compare();
        self.granted(guest, &release("", HANDED_ON));
        self.granted(guest, &release(SPACE, LEASE));
        self.is_removed(&file_of(SPACE, LEASE));
        self.granted(helper, &acquire("", HANDED_ON, 0));
        self.granted(helper, &acquire("", MADE, AUTOCREATE));
        self.compare();
        self.granted(helper, &create_resource(SPACE, "resource"));
        self.granted(helper, &delete_resource(SPACE, "resource"));
        self.granted(helper, &release("", HANDED_ON));
        self.granted(helper, &release("", MADE));
        self.is_removed(MADE);
        self.compare();
        self.restricted();
    }

    /// What was made for a lock goes with it, or the log says that it could not be removed.
    fn is_removed(&self, file: &str) {
        if self.namespace.path(file).exists() {
            let log = self.daemon.stderr();
            let told = log
                .lines()
                .any(|line| line.contains(file) && line.contains("not be removed"));
            assert!(told, "{file} is still there, and nothing was said about it");
        }
    }

    /// NEW is refused the second time, also where the answer to the first was lost.
    fn lockspace(&mut self) {
        for _ in 0..TRIES {
            match self.call_once(Who::Guest, &new_lockspace(SPACE)) {
                Said::Granted => return,
                Said::Refused(text) if text.contains("already exists") => return,
                Said::Closed(_) => self.recover(Who::Guest),
                Said::Refused(_) | Said::Busy => (),
            }
        }
        panic!("the lockspace could not be made");
    }

    /// A client that gives its rights up, and leaves.
    fn restricted(&mut self) {
        let mut said = Vec::new();
        for _ in 0..TRIES {
            let mut client = self.daemon.client();
            let replies = [register_as("restricted", 1), restrict()]
                .map(|call| call_of(&mut client, &call.frame(1)));
            if let [Said::Granted, Said::Granted] = replies {
                return;
            }
            said.extend(replies.map(|reply| match reply {
                Said::Granted => "granted".to_owned(),
                Said::Busy => "busy".to_owned(),
                Said::Refused(text) | Said::Closed(text) => text,
            }));
        }
        panic!("nobody could be restricted: {said:?}");
    }

    /// The log goes to a file, and back to where it went.
    fn administration(&mut self) {
        for outputs in [&format!("3:file:{LOG_FILE}"), ""] {
            let mut said = Vec::new();
            let is_done = (0..TRIES).any(|_| {
                let mut admin = self.daemon.admin_client();
                let mut payload = Vec::new();
                put_u32(&mut payload, 1);
                put_string(&mut payload, outputs.as_bytes());
                put_u32(&mut payload, 0);
                let call = frame(ADMIN_PROGRAM, 1, SET_LOG_OUTPUTS, CALL, 1, 0, &payload);
                match call_of(&mut admin, &call) {
                    Said::Granted => true,
                    Said::Busy => false,
                    Said::Refused(text) | Said::Closed(text) => {
                        said.push(text);
                        false
                    }
                }
            });
            assert!(
                is_done,
                "the log outputs '{outputs}' were refused: {said:?}"
            );
        }
        self.compare();
    }

    fn reload(&mut self) {
        self.signal(Signal::SIGHUP);
        // Signals come before calls: when this is answered, the configuration has been read.
        self.granted(Who::Helper, &acquire("", HANDED_ON, 0));
        self.granted(Who::Helper, &release("", HANDED_ON));
        self.compare();
    }

    fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        nix::sys::signal::kill(pid, signal).expect("signal the daemon");
    }

    /// SIGUSR1. One that is refused must succeed the second time. Should the successor be executed and
    /// not serve, the daemon is another process, and says why.
    fn upgrade(&mut self) {
        for _ in 0..TRIES {
            let before = image(self.pid);
            let refused = refusals(&self.daemon).len();
            self.signal(Signal::SIGUSR1);
            let is_done = wait_for(DEADLINE, "the upgrade to be done or refused", || {
                if refusals(&self.daemon).len() > refused {
                    return Some(false);
                }
                let now = image(self.pid);
                let is_another = !now.is_empty() && now != before;
                // One that is about to be over has not served.
                (is_another && serves(&self.daemon) && runs(self.pid)).then_some(true)
            });
            if is_done {
                self.compare();
                return;
            }
            if runs(self.pid) {
                let now = image(self.pid);
                assert_eq!(now, before, "refused, and another image");
            } else {
                let text = std::fs::read_to_string(self.namespace.path(PID_FILE));
                let text = text.expect("read the pid file");
                self.pid = text.trim().parse().expect("a pid");
                assert!(runs(self.pid), "the daemon ended");
            }
            did_not_panic(&self.daemon);
            self.compare();
        }
        let refusals = refusals(&self.daemon);
        panic!("the upgrade was refused {TRIES} times: {refusals:?}");
    }

    /// The guest closes its connection and lives on: it is killed, and only then its locks are free.
    fn owner_leaves(&mut self) {
        self.guest.close_connection();
        self.guest_is_dead();
        // And another one comes.
        self.guest = Owner::connect(self.daemon.lock_socket(), OnTerm::Die);
        self.register(Who::Guest);
        self.granted(Who::Guest, &acquire("", WITNESS, 0));
        self.granted(Who::Helper, &acquire("", LATE, 0));
        self.compare();
    }

    /// SIGTERM: the owner is fenced before its lock is free, and the daemon leaves nothing.
    fn end(&mut self) {
        self.signal(Signal::SIGTERM);
        wait_until(DEADLINE, "the end of the daemon", || !runs(self.pid));
        did_not_panic(&self.daemon);
        if self.pid == self.daemon.pid() {
            let status = self.daemon.wait_end();
            assert!(
                status.success(),
                "the daemon ended with {status}: {}",
                last_words(&self.daemon.stderr())
            );
        }
        self.watch
            .take()
            .expect("the witness was held")
            .owner_was_dead();
        assert!(
            !self.guest.is_alive(),
            "the daemon ended, and an owner lives"
        );
        self.held.clear();
        self.compare_locks();
        for socket in [self.daemon.lock_socket(), self.daemon.admin_socket()] {
            let answer = UnixStream::connect(socket);
            assert!(answer.is_err(), "somebody answers on {}", socket.display());
        }
    }
}

/// Somebody who waits for the witness's lock in the kernel: it gets it in the very moment in which
/// nobody has it.
struct Watch {
    thread: JoinHandle<bool>,
}

impl Watch {
    fn of(path: PathBuf, owner: i32) -> Watch {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .expect("open the witness");
        let thread = std::thread::spawn(move || {
            support::wait_for_lock(&file);
            let ran = runs(owner);
            support::drop_lock(&file);
            ran
        });
        Watch { thread }
    }

    /// Waits until the lock was to be had; the owner must have been dead then.
    fn owner_was_dead(self) {
        let ran = self.thread.join().expect("who waits for the witness");
        assert!(!ran, "the lock was free while its owner could run");
    }
}

fn call_of(client: &mut Client, bytes: &[u8]) -> Said {
    if let Err(error) = client.try_send(bytes) {
        return Said::Closed(error.to_string());
    }
    match client.receive_within(DEADLINE) {
        Received::Frame(reply) => Said::of(Reply::parse(&reply)),
        Received::Closed { .. } => Said::Closed("closed".into()),
        Received::Silence { .. } => panic!("a call is not answered"),
    }
}

/// Whether an entry of `/proc/PID/fdinfo` says close-on-exec.
fn is_close_on_exec(information: &str) -> bool {
    let flags = information
        .lines()
        .find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.map(|flags| i32::from_str_radix(flags.trim(), 8));
    flags.is_some_and(|flags| flags.is_ok_and(|flags| flags & libc::O_CLOEXEC != 0))
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("a name in UTF-8")
}

/// Whether a descriptor is of a process; kernels name these in two ways.
fn is_pidfd(kind: &str) -> bool {
    kind.contains("[pidfd]") || kind.starts_with("pidfd:")
}

fn file_of(space: &str, name: &str) -> String {
    if space.is_empty() {
        name.to_owned()
    } else {
        format!("{space}/{name}")
    }
}
