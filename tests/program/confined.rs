//! A security policy that refuses system calls for ever: a daemon that starts under it serves, and no
//! lock is lost when the program is replaced, whoever has it before and whoever has it then.
//!
//! The refusal is a seccomp filter, which outlives an exec. It is set by a few lines of Python that then
//! become the program.

use crate::support;
use crate::support::client::{AUTOCREATE, acquire, create_lockspace, register_as, release};
use crate::support::daemon::{self, Daemon};
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{Host, PROGRAM, refusals, refused_upgrade, upgrade};
use crate::support::{DEADLINE, require_root, skip, wait_until};
use nix::sys::signal::Signal;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A call and what it is refused with.
#[derive(Clone, Copy, Debug)]
struct Refused {
    call: &'static str,
    number: i64,
    errno: i32,
}

const fn refused(call: &'static str, number: i64, errno: i32) -> Refused {
    Refused {
        call,
        number,
        errno,
    }
}

const ERRORS: [i32; 3] = [libc::EPERM, libc::EACCES, libc::ENOSYS];

/// Without these there is no ledger to pass on.
const OF_THE_LEDGER: [(&str, i64); 2] = [
    ("fallocate", libc::SYS_fallocate),
    // Only that of a file, shared.
    ("mmap", libc::SYS_mmap),
];

/// Not the number of a call: clone(2) as fork(2), with a table of descriptors of its own, refused to a process
/// that may make one that shares it. So is the copy of a daemon that goes on should a successor not serve.
const FORK: i64 = -1;

/// For these there is another way, or they are not needed to serve.
const OF_OTHERS: [(&str, i64); 24] = [
    ("timerfd_create", libc::SYS_timerfd_create),
    ("timerfd_settime", libc::SYS_timerfd_settime),
    ("signalfd4", libc::SYS_signalfd4),
    // The ledger is a file in the run directory.
    ("memfd_create", libc::SYS_memfd_create),
    ("mremap", libc::SYS_mremap),
    ("eventfd2", libc::SYS_eventfd2),
    ("openat2", libc::SYS_openat2),
    ("statx", libc::SYS_statx),
    ("fstatfs", libc::SYS_fstatfs),
    // Asked for where a file system is not known to be this host's own.
    ("linkat", libc::SYS_linkat),
    ("prlimit64", libc::SYS_prlimit64),
    ("getcwd", libc::SYS_getcwd),
    ("readlink", libc::SYS_readlink),
    ("madvise", libc::SYS_madvise),
    ("getrandom", libc::SYS_getrandom),
    ("sysinfo", libc::SYS_sysinfo),
    ("socketpair", libc::SYS_socketpair),
    ("sched_getaffinity", libc::SYS_sched_getaffinity),
    ("sigaltstack", libc::SYS_sigaltstack),
    ("gettid", libc::SYS_gettid),
    ("dup3", libc::SYS_dup3),
    // The daemon serves in the process that was started.
    ("clone", libc::SYS_clone),
    ("kill", libc::SYS_kill),
    ("fork", FORK),
];

/// Each of these with each error.
fn with_errors(calls: &[(&'static str, i64)]) -> Vec<Refused> {
    let of_one = |(call, number): &(&'static str, i64)| {
        let (call, number) = (*call, *number);
        ERRORS.map(|errno| refused(call, number, errno))
    };
    calls.iter().flat_map(of_one).collect()
}

/// Becomes the program of the third word and those behind it, to which a call is refused.
const CONFINE: &str = r#"
import ctypes, os, struct, sys
def confine(number, errno):
    load = lambda place: (0x20, 0, 0, place)
    allow, refuse = (0x06, 0, 0, 0x7fff0000), (0x06, 0, 0, 0x50000 | errno)
    if number == @MMAP@:
        # Flags with MAP_SHARED, and a file.
        test = [(0x15, 0, 5, number), load(40), (0x45, 0, 3, 1), load(48), (0x15, 1, 0, 0xffffffff)]
    elif number == @FORK@:
        # A table of descriptors of its own.
        test = [(0x15, 0, 3, @CLONE@), load(16), (0x45, 1, 0, 0x400)]
    else:
        test = [(0x15, 0, 1, number)]
    code = b''.join(struct.pack('HBBI', *one) for one in [load(0), *test, refuse, allow])
    text = ctypes.create_string_buffer(code)
    program = struct.pack('HxxxxxxQ', len(code) // 8, ctypes.addressof(text))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
"#;

fn confine() -> String {
    let numbers = [
        ("@MMAP@", libc::SYS_mmap),
        ("@FORK@", FORK),
        ("@CLONE@", libc::SYS_clone),
    ];
    let fill_in =
        |text: String, (name, number): (&str, i64)| text.replace(name, &number.to_string());
    numbers.into_iter().fold(CONFINE.to_owned(), fill_in)
}

const PYTHON: &str = "/usr/bin/python3";
const LOG: [(&str, &str); 2] = [("LIBVIRT_DEBUG", "2"), ("LIBVIRT_LOG_OUTPUTS", "2:stderr")];
const LOCKSPACE: &str = "/run/lockspace";

/// A host on which a daemon serves one guest with a disk and a lease file.
struct Scene {
    host: Host,
    daemon: Daemon,
    guest: Owner,
    disk: String,
    spare: String,
}

impl Scene {
    /// The program that is installed runs, and these calls are refused to it.
    fn of(program: &Path, calls: &[Refused]) -> Scene {
        Scene::begin(program, calls).expect("the daemon to start")
    }

    /// `None` if it does not start.
    fn begin(program: &Path, calls: &[Refused]) -> Option<Scene> {
        let host = Host::new();
        host.install_copy(program);
        let mut script = confine();
        for Refused { number, errno, .. } in calls {
            script.push_str(&format!("confine({number}, {errno})\n"));
        }
        script.push_str("os.execv(sys.argv[1], sys.argv[1:])\n");
        let words = ["-c", &script, PROGRAM];
        let mut daemon = Daemon::spawn(Path::new(PYTHON), &host.namespace, &words, &LOG);
        let socket = daemon.lock_socket().to_owned();
        let is_up = support::wait_for(DEADLINE, "the daemon to serve or to end", || {
            let connected = std::os::unix::net::UnixStream::connect(&socket).is_ok();
            (connected || daemon.ended().is_some()).then_some(connected)
        });
        if !is_up {
            return None;
        }
        let [disk, spare] = ["disk", "spare"].map(|name| host.disk(name));
        let mut guest = host.guest(&daemon, "guest", &disk);
        guest.call(&create_lockspace(LOCKSPACE)).expect_ok();
        let lease = acquire(LOCKSPACE, "lease", AUTOCREATE);
        guest.call(&lease).expect_ok();
        Some(Scene {
            host,
            daemon,
            guest,
            disk,
            spare,
        })
    }

    /// Puts the program in place, confined by a script of that name if there are calls to refuse.
    fn install_confined(&self, program: &Path, call: Refused) {
        let real = self.host.path("/run/programs/real");
        support::install_program(program, real);
        let script = format!(
            "#!{PYTHON}\n{}confine({}, {})\nos.execv('/run/programs/real', sys.argv)\n",
            confine(),
            call.number,
            call.errno
        );
        let new = self.host.path("/run/programs/new");
        std::fs::write(&new, script).expect("write the script");
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        std::fs::rename(new, self.host.path(PROGRAM)).expect("put the script in place");
    }

    /// Everything is held, and the daemon does what it is asked for.
    #[track_caller]
    fn serves(&mut self, what: &dyn std::fmt::Debug) {
        assert_eq!(self.daemon.ended(), None, "{what:?}");
        self.host.assert_held(&self.disk);
        self.host.assert_held(&format!("{LOCKSPACE}/lease"));
        self.guest.call(&acquire("", &self.spare, 0)).expect_ok();
        self.host.assert_held(&self.spare);
        self.guest.call(&release("", &self.spare)).expect_ok();
        self.host.assert_free(&self.spare);
        let more = acquire(LOCKSPACE, "more", AUTOCREATE);
        self.guest.call(&more).expect_ok();
        self.guest.call(&release(LOCKSPACE, "more")).expect_ok();
        let mut other = self.daemon.client();
        other
            .call(&register_as("other", std::process::id() as i32))
            .expect_ok();
        let refusal = other.call(&acquire("", &self.disk, 0));
        refusal.expect_error(87, 51);
    }

    /// What cannot be had of the survival of deaths is said, and nothing else.
    #[track_caller]
    fn says_what_it_does_not_survive(&self, cell: Refused, is_upgraded: bool) {
        let log = self.daemon.stderr();
        let is_of_the_ledger = OF_THE_LEDGER.iter().any(|(call, _)| *call == cell.call);
        let has_guardian = !is_of_the_ledger && !["clone", "kill"].contains(&cell.call);
        let says = |what: &str| log.contains(what);
        let is_alone = self.daemon.reactor() == self.daemon.pid();
        assert_eq!(is_alone, !has_guardian, "{cell:?}");
        assert_eq!(says("without a guardian"), !has_guardian, "{cell:?}: {log}");
        let has_copy = !["fork", "memfd_create"].contains(&cell.call);
        let is_told = has_guardian && is_upgraded && !has_copy;
        let text = "the host refuses a copy of this daemon";
        assert_eq!(says(text), is_told, "{cell:?}: {log}");
    }

    /// The file at a path is the one that the daemon runs.
    fn runs(&self, program: &Path) -> bool {
        let file = |path: &Path| {
            let found = std::fs::metadata(path).ok()?;
            Some((found.dev(), found.ino()))
        };
        let executed = format!("/proc/{}/exe", self.daemon.pid());
        file(Path::new(&executed)) == file(program)
    }

    /// SIGUSR1, and waits until this program runs.
    #[track_caller]
    fn becomes(&mut self, program: &Path, what: &dyn std::fmt::Debug) {
        let refused = refusals(&self.daemon).len();
        self.daemon.signal(Signal::SIGUSR1);
        wait_until(
            DEADLINE,
            &format!("{} ({what:?})", program.display()),
            || {
                let log = self.daemon.stderr();
                assert_eq!(self.daemon.ended(), None, "{log}");
                assert_eq!(refusals(&self.daemon).len(), refused, "{log}");
                self.runs(program)
            },
        );
    }
}

fn theirs() -> Option<PathBuf> {
    if !can_run() {
        return None;
    }
    let found = daemon::c_daemon();
    if found.is_none() {
        skip("needs libvirt's virtlockd");
    }
    found
}

fn can_run() -> bool {
    let python = Path::new(PYTHON).exists();
    if !python {
        skip("needs python3 to set a seccomp filter");
    }
    python && require_root()
}

fn all_that_can_be_done_without() -> Vec<Refused> {
    let mut cells = with_errors(&OF_THE_LEDGER);
    cells.extend(with_errors(&OF_OTHERS));
    cells.push(refused("pidfd_open", libc::SYS_pidfd_open, libc::EACCES));
    cells
}

#[test]
fn a_daemon_serves_whatever_of_these_calls_is_refused_to_it() {
    if !can_run() {
        return;
    }
    for cell in all_that_can_be_done_without() {
        let mut scene = Scene::of(&daemon::program(), &[cell]);
        scene.serves(&cell);
        scene.daemon.signal(Signal::SIGHUP);
        wait_until(DEADLINE, &format!("SIGHUP to be heard ({cell:?})"), || {
            scene.daemon.stderr().contains("SIGHUP")
        });
        let is_of_the_ledger = OF_THE_LEDGER.iter().any(|(call, _)| *call == cell.call);
        if is_of_the_ledger {
            let reason = refused_upgrade(&scene.daemon);
            assert!(reason.contains(cell.call), "{cell:?}: {reason}");
        } else if cell.call != "pidfd_open" {
            upgrade(&scene.daemon);
        }
        scene.serves(&cell);
        let is_upgraded = !is_of_the_ledger && cell.call != "pidfd_open";
        scene.says_what_it_does_not_survive(cell, is_upgraded);
        assert_eq!(scene.daemon.stop().code(), Some(0), "{cell:?}");
    }
}

#[test]
fn without_timers_an_owner_that_does_not_heed_sigterm_is_killed_all_the_same() {
    if !can_run() {
        return;
    }
    for (call, number) in &OF_OTHERS[..2] {
        let cell = refused(call, *number, libc::EPERM);
        let scene = Scene::of(&daemon::program(), &[cell]);
        let mut stubborn = Owner::register(scene.daemon.lock_socket(), "stubborn", OnTerm::Ignore);
        stubborn.call(&acquire("", &scene.spare, 0)).expect_ok();
        stubborn.close_connection();
        scene.host.wait_free(&scene.spare);
        assert!(
            scene.daemon.stderr().contains(call),
            "{}",
            scene.daemon.stderr()
        );
    }
}

#[test]
fn a_successor_to_which_something_is_refused_is_refused_or_goes_on_without_it() {
    if !can_run() {
        return;
    }
    let needed = [
        refused("epoll_create1", libc::SYS_epoll_create1, libc::EPERM),
        refused("epoll_ctl", libc::SYS_epoll_ctl, libc::EACCES),
        refused("pidfd_open", libc::SYS_pidfd_open, libc::ENOSYS),
    ];
    let needed: Vec<Refused> = with_errors(&OF_THE_LEDGER)
        .into_iter()
        .chain(needed)
        .collect();
    let mut scene = Scene::of(&daemon::program(), &[]);
    for cell in needed {
        scene.install_confined(&daemon::program(), cell);
        let reason = refused_upgrade(&scene.daemon);
        assert!(reason.contains(cell.call), "{cell:?}: {reason}");
        scene.serves(&cell);
    }
    for cell in with_errors(&OF_OTHERS) {
        // A filter stays for ever: each gets a daemon of its own.
        let mut scene = Scene::of(&daemon::program(), &[]);
        scene.install_confined(&daemon::program(), cell);
        let real = scene.host.path("/run/programs/real");
        scene.becomes(&real, &cell);
        scene.serves(&cell);
    }
}

#[test]
fn nothing_that_libvirts_daemon_did_not_need_costs_a_lock_when_it_is_replaced() {
    let Some(theirs) = theirs() else {
        return;
    };
    for cell in all_that_can_be_done_without() {
        let Some(mut scene) = Scene::begin(&theirs, &[cell]) else {
            eprintln!("libvirt's daemon itself needs {cell:?}");
            continue;
        };
        let program = scene.host.path(PROGRAM);
        scene.host.install_copy(&daemon::program());
        scene.becomes(&program, &cell);
        scene.serves(&cell);
        let is_of_the_ledger = OF_THE_LEDGER.iter().any(|(call, _)| *call == cell.call);
        if is_of_the_ledger {
            let log = scene.daemon.stderr();
            assert!(log.contains(cell.call), "{cell:?}: {log}");
            let reason = refused_upgrade(&scene.daemon);
            assert!(reason.contains(cell.call), "{cell:?}: {reason}");
            scene.serves(&cell);
        }
        scene.says_what_it_does_not_survive(cell, false);
        if cell.call == "pidfd_open" {
            continue;
        }
        // The way back needs no ledger.
        scene.host.install_copy(&theirs);
        scene.becomes(&program, &cell);
        scene.host.assert_held(&scene.disk);
        scene.guest.call(&acquire("", &scene.spare, 0)).expect_ok();
        scene.guest.call(&release("", &scene.disk)).expect_ok();
        scene.host.assert_free(&scene.disk);
    }
}

/// What the policies of the distributions do not give to the lock daemon's domain (src/dist/CONFINEMENT.md): memory
/// files and mappings of files in the run directory, and signals among its own processes.
const OF_NO_POLICY: [Refused; 3] = [
    refused("memfd_create", libc::SYS_memfd_create, libc::EACCES),
    refused("mmap", libc::SYS_mmap, libc::EACCES),
    refused("kill", libc::SYS_kill, libc::EACCES),
];

#[test]
fn what_no_policy_of_a_distribution_gives_may_be_refused_all_at_once_and_costs_no_lock() {
    let Some(theirs) = theirs() else {
        return;
    };
    let mut scene = Scene::of(&theirs, &OF_NO_POLICY);
    let program = scene.host.path(PROGRAM);
    scene.host.install_copy(&daemon::program());
    scene.becomes(&program, &OF_NO_POLICY);
    scene.serves(&OF_NO_POLICY);
    // It says that it cannot be replaced by itself, and that its death would be noticed.
    let reason = refused_upgrade(&scene.daemon);
    assert!(reason.contains("memory file"), "{reason}");
    let log = scene.daemon.stderr();
    assert!(log.contains("without a guardian"), "{log}");
    scene.serves(&OF_NO_POLICY);
    // Owners are killed all the same.
    let mut leaver = Owner::register(scene.daemon.lock_socket(), "leaver", OnTerm::Die);
    leaver.call(&acquire("", &scene.spare, 0)).expect_ok();
    leaver.close_connection();
    leaver.wait_signal().expect("it is killed");
    scene.host.wait_free(&scene.spare);
    scene.host.install_copy(&theirs);
    scene.becomes(&program, &OF_NO_POLICY);
    scene.host.assert_held(&scene.disk);
    scene.guest.call(&release("", &scene.disk)).expect_ok();
    scene.host.assert_free(&scene.disk);
}

#[test]
fn where_there_is_no_way_on_libvirts_own_program_goes_on_as_if_nothing_had_been_asked() {
    let Some(theirs) = theirs() else {
        return;
    };
    for (call, number) in [
        // Before anything is taken over, and when all is half done.
        ("epoll_create1", libc::SYS_epoll_create1),
        ("epoll_ctl", libc::SYS_epoll_ctl),
    ] {
        for errno in ERRORS {
            let cell = refused(call, number, errno);
            let mut scene = Scene::of(&theirs, &[cell]);
            let beside = scene.host.path(format!("{PROGRAM}.libvirt"));
            support::install_program(&theirs, &beside);
            scene.host.install_copy(&daemon::program());
            scene.becomes(&beside, &cell);
            scene.serves(&cell);
            let log = scene.daemon.stderr();
            assert!(
                log.contains("cannot take over") && log.contains(call),
                "{log}"
            );
        }
    }
}
