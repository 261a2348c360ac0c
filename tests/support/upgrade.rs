//! A daemon whose program can be exchanged, as a package upgrade does, and that is then told to
//! replace itself (SIGUSR1). Seen from outside: what the kernel says of the process and its locks.

use super::client::{Client, register_as};
use super::daemon::{self, Daemon};
use super::namespace::Namespace;
use super::owner::{OnTerm, Owner, from_hex, to_hex};
use super::{DEADLINE, lock_probe, wait_until};
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Where the exchangeable program is, inside the namespace.
pub const PROGRAM: &str = "/run/programs/virtlockd";
/// The lock socket of a daemon that was activated.
pub const ACTIVATED_LOCK: &str = "/run/l";
/// The admin socket of a daemon that was activated.
pub const ACTIVATED_ADMIN: &str = "/run/a";
/// What the log says when an upgrade is refused.
pub const REFUSAL: &str = "its successor cannot take over";

/// A namespace with an exchangeable program in it.
pub struct Host {
    pub namespace: Namespace,
}

impl Host {
    /// With the daemon under test.
    pub fn new() -> Host {
        Host::with(&daemon::program())
    }

    pub fn with(program: &Path) -> Host {
        let host = Host {
            namespace: Namespace::new(),
        };
        std::fs::create_dir(host.path("/run/programs")).expect("make a directory for programs");
        host.install(program);
        host
    }

    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.namespace.path(inside)
    }

    /// Puts another program in the place of the daemon's, in one step, as a package manager does.
    pub fn install(&self, program: &Path) {
        let new = self.path("/run/programs/new");
        std::os::unix::fs::symlink(program, &new).expect("link the new program");
        std::fs::rename(new, self.path(PROGRAM)).expect("put the new program in place");
    }

    /// Starts the daemon as a service manager does that listens for it; the lock socket.
    pub fn start_activated(&self) -> (Daemon, PathBuf) {
        self.start_activated_with(&[])
    }

    /// As [`Host::start_activated`], with these words.
    pub fn start_activated_with(&self, args: &[&str]) -> (Daemon, PathBuf) {
        let words = [&[PROGRAM], args].concat();
        let script = format!(
            "import os, socket
listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
for number, path in enumerate(['{ACTIVATED_LOCK}', '{ACTIVATED_ADMIN}']):
    listeners[number].bind(path)
    listeners[number].listen(5)
    os.dup2(listeners[number].fileno(), 20 + number)
for number in range(2):
    os.dup2(20 + number, 3 + number)
os.environ.update(LISTEN_FDS='2', LISTEN_FDNAMES='virtlockd.socket:virtlockd-admin.socket',
                  LISTEN_PID=str(os.getpid()))
os.closerange(5, 100)
os.execv('{PROGRAM}', {words:?})"
        );
        let python = Path::new("/usr/bin/python3");
        let mut daemon = Daemon::spawn(python, &self.namespace, &["-c", &script], &[]);
        let socket = self.path(ACTIVATED_LOCK);
        daemon.wait_for_socket(&socket);
        (daemon, socket)
    }

    /// As [`Host::install`], but with a file of its own.
    pub fn install_copy(&self, program: &Path) {
        let new = self.path("/run/programs/new");
        super::install_program(program, &new);
        std::fs::rename(new, self.path(PROGRAM)).expect("put the new program in place");
    }

    /// Puts a shell script in the place of the daemon's program.
    pub fn install_script(&self, text: &str) {
        let new = self.path("/run/programs/new");
        std::fs::write(&new, format!("#!/bin/sh\n{text}\n")).expect("write the script");
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))
            .expect("make the script executable");
        std::fs::rename(new, self.path(PROGRAM)).expect("put the script in place");
    }

    /// There is no program any more.
    pub fn uninstall(&self) {
        std::fs::remove_file(self.path(PROGRAM)).expect("remove the program");
    }

    /// Starts the program; it says in its stderr what it does.
    pub fn start(&self, args: &[&str], env: &[(&str, &str)]) -> Daemon {
        let mut all = vec![("LIBVIRT_DEBUG", "2"), ("LIBVIRT_LOG_OUTPUTS", "2:stderr")];
        all.extend_from_slice(env);
        Daemon::start_program(Path::new(PROGRAM), &self.namespace, args, &all)
    }

    /// Starts the program with a configuration file of this text.
    pub fn start_configured(&self, config: &str) -> Daemon {
        std::fs::write(self.path(CONFIG), config).expect("write the configuration file");
        self.start(&["-f", CONFIG], &[])
    }

    /// Makes an empty disk; its path inside.
    pub fn disk(&self, name: &str) -> String {
        let inside = format!("/run/{name}");
        std::fs::write(self.path(&inside), b"").expect("make a disk");
        inside
    }

    /// A domain's process that holds the disk exclusively.
    pub fn guest(&self, daemon: &Daemon, name: &str, disk: &str) -> Owner {
        let mut owner = Owner::register(daemon.lock_socket(), name, OnTerm::Die);
        owner.call(&super::client::acquire("", disk, 0)).expect_ok();
        owner
    }

    #[track_caller]
    pub fn assert_held(&self, disk: &str) {
        let seen = lock_probe(&self.path(disk));
        assert!(
            seen.is_some_and(|lock| lock.exclusive),
            "{disk} should be locked exclusively: {seen:?}"
        );
    }

    #[track_caller]
    pub fn assert_free(&self, disk: &str) {
        assert_eq!(lock_probe(&self.path(disk)), None, "{disk} should be free");
    }

    /// The ledger in the run directory is one that this daemon has open.
    #[track_caller]
    pub fn assert_keeps_ledger(&self, pid: i32) {
        use std::os::unix::fs::MetadataExt;
        let key = |path: &Path| {
            let file = std::fs::metadata(path);
            file.ok().map(|file| (file.dev(), file.ino()))
        };
        let path = self.path("/run/libvirt/virtlockd-ledger");
        let is_open = || {
            let all = std::fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten();
            let mut all = all.filter_map(|entry| key(&entry.ok()?.path()));
            key(&path).is_some_and(|ledger| all.any(|open| open == ledger))
        };
        wait_until(DEADLINE, "the daemon's ledger to have the name", is_open);
    }

    /// Waits until a disk is free.
    pub fn wait_free(&self, disk: &str) {
        wait_until(DEADLINE, "the disk to be free", || {
            lock_probe(&self.path(disk)).is_none()
        });
    }
}

/// The configuration file of [`Host::start_configured`], inside the namespace.
pub const CONFIG: &str = "/run/virtlockd-test.conf";

/// Which image of a program a process runs: the kernel gives each exec other addresses and random
/// bytes.
pub fn image(pid: i32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/auxv")).unwrap_or_default()
}

/// Whether the process would survive SIGUSR1: it blocks the signal, or catches it. One that waits for the
/// signal does not show that it blocks it: what it has made to serve does.
fn survives_usr1(pid: i32) -> bool {
    let pid = daemon::reactor_of(pid);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| {
        let mask = line
            .strip_prefix("SigBlk:")
            .or_else(|| line.strip_prefix("SigCgt:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & (1 << (libc::SIGUSR1 - 1)) != 0)
    })
}

/// A daemon that went to the background. It is nobody's child: killed when this ends.
pub struct Background {
    pub pid: i32,
    process: daemon::Main,
}

impl Background {
    /// Runs the command, which starts the daemon with `-d`, and reads its number in the pid file.
    pub fn start(host: &Host, command: &mut Command) -> Background {
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("start the daemon in the background");
        assert!(status.success());
        let text = std::fs::read_to_string(host.path("/run/virtlockd.pid")).expect("its pid file");
        let pid = text.trim().parse().expect("a pid");
        let process = daemon::Main::of(pid).expect("the daemon runs");
        Background { pid, process }
    }

    pub fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        nix::sys::signal::kill(pid, signal).expect("signal the daemon");
    }

    /// Tells it to replace itself and waits until it has.
    #[track_caller]
    pub fn upgrade(&self) {
        let before = image(self.pid);
        self.signal(Signal::SIGUSR1);
        wait_for_successor(self.pid, &before);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.process.kill_all();
    }
}

/// Waits until the process runs another image than `before`, one that is past its first steps.
#[track_caller]
pub fn wait_for_successor(pid: i32, before: &[u8]) {
    wait_until(DEADLINE, "the daemon to replace itself", || {
        let now = image(pid);
        !now.is_empty() && now != before && survives_usr1(pid)
    });
}

/// Tells the daemon to replace itself and waits until it has.
#[track_caller]
pub fn upgrade(daemon: &Daemon) {
    wait_until(DEADLINE, "the daemon to be ready for SIGUSR1", || {
        survives_usr1(daemon.pid())
    });
    let before = image(daemon.pid());
    daemon.signal(Signal::SIGUSR1);
    wait_for_successor(daemon.pid(), &before);
}

/// Tells the daemon to replace itself and waits until it has refused; the line that says why.
#[track_caller]
pub fn refused_upgrade(daemon: &Daemon) -> String {
    let before = image(daemon.pid());
    let refusals = refusals(daemon).len();
    daemon.signal(Signal::SIGUSR1);
    let reason = super::wait_for(DEADLINE, "the upgrade to be refused", || {
        assert_eq!(image(daemon.pid()), before, "the daemon replaced itself");
        let all = self::refusals(daemon);
        (all.len() > refusals).then(|| all.last().cloned().unwrap_or_default())
    });
    assert_eq!(image(daemon.pid()), before, "the daemon replaced itself");
    reason
}

/// The lines of the log that refuse an upgrade.
pub fn refusals(daemon: &Daemon) -> Vec<String> {
    let log = daemon.stderr();
    let lines = log
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    lines
        .filter(|line| line.contains(REFUSAL))
        .map(str::to_owned)
        .collect()
}

/// A connection of this test's process that speaks for a domain whose process is `pid`: its end
/// ends nobody.
pub fn helper_client(daemon: &Daemon, name: &str, pid: i32) -> Client {
    let mut client = daemon.client();
    client.call(&register_as(name, pid)).expect_ok();
    client
}

/// Somebody who tries all the time to lock files that are held.
pub struct Rival {
    stop: Arc<AtomicBool>,
    tries: Arc<AtomicU64>,
    thread: Option<JoinHandle<Vec<PathBuf>>>,
}

impl Rival {
    /// It is at work when this returns.
    pub fn of(paths: Vec<PathBuf>) -> Rival {
        let stop = Arc::new(AtomicBool::new(false));
        let tries = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let (stop, tries) = (stop.clone(), tries.clone());
            move || rob(&paths, &stop, &tries)
        });
        let rival = Rival {
            stop,
            tries,
            thread: Some(thread),
        };
        rival.wait_for_tries(1);
        rival
    }

    fn wait_for_tries(&self, count: u64) {
        wait_until(DEADLINE, "the rival to try", || {
            self.tries.load(Ordering::Relaxed) >= count
        });
    }

    /// Stops; fails if a lock could be had even once.
    #[track_caller]
    pub fn never_succeeded(mut self) {
        self.wait_for_tries(100);
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("a rival stops once");
        let robbed = thread.join().expect("the rival's thread");
        assert_eq!(robbed, Vec::<PathBuf>::new(), "somebody else got the lock");
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn rob(paths: &[PathBuf], stop: &AtomicBool, tries: &AtomicU64) -> Vec<PathBuf> {
    let open = |path: &PathBuf| {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path);
        file.expect("open a held file")
    };
    let files: Vec<_> = paths.iter().map(open).collect();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    };
    let mut robbed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for (file, path) in files.iter().zip(paths) {
            tries.fetch_add(1, Ordering::Relaxed);
            let taken = nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_SETLK(&lock));
            if taken.is_ok() && !robbed.contains(path) {
                robbed.push(path.clone());
            }
        }
    }
    robbed
}

/// strace, attached to a daemon, that makes some of its system calls slow or fail.
pub struct Disturbed {
    strace: Child,
}

impl Disturbed {
    /// Each fcntl and close takes half a millisecond: a lock that is dropped and taken again at once
    /// shows only so.
    pub fn slow(daemon: &Daemon) -> Disturbed {
        Disturbed::with(daemon, "fcntl,close", "delay_enter=500")
    }

    /// With an injection into these system calls, which are counted from now on. It is at work when
    /// this returns.
    pub fn with(daemon: &Daemon, calls: &str, injection: &str) -> Disturbed {
        let mut processes = vec![daemon.pid(), daemon.reactor()];
        // Those that only close something are over in a moment.
        let mut helpers = daemon::helpers_of(daemon.pid());
        helpers.retain(|it| daemon::works_on_shares(*it));
        processes.extend(helpers);
        let numbers = processes.iter().map(i32::to_string);
        let strace = Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:{injection}")])
            .args(numbers.flat_map(|number| ["-p".to_owned(), number]))
            .stderr(Stdio::null())
            .spawn()
            .expect("start strace");
        for process in processes {
            let status = format!("/proc/{process}/status");
            wait_until(DEADLINE, "strace to be attached", || {
                let status = std::fs::read_to_string(&status).expect("the daemon's status");
                !status.contains("TracerPid:\t0\n")
            });
        }
        Disturbed { strace }
    }
}

impl Drop for Disturbed {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// A connection whose maker is gone: a child of it has the socket and passes messages on.
pub struct Orphan {
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Orphan {
    pub fn connect(socket: &Path) -> Orphan {
        let script = "
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
r, w = os.pipe()
if os.fork():
    os._exit(0)
os.close(w)
os.read(r, 1)
print('ready', flush=True)
for line in sys.stdin:
    s.sendall(bytes.fromhex(line))
    print(s.recv(65536).hex(), flush=True)
";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start python3 as a client that leaves");
        let mut orphan = Orphan {
            orders: child.stdin.take().expect("stdin is a pipe"),
            answers: BufReader::new(child.stdout.take().expect("stdout is a pipe")),
        };
        child.wait().expect("the maker of the connection ends");
        assert_eq!(orphan.answer(), "ready");
        orphan
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers
            .read_line(&mut line)
            .expect("read from the orphan");
        line.trim_end().to_owned()
    }

    /// Has the child send a message; the reply.
    pub fn send(&mut self, bytes: &[u8]) -> Vec<u8> {
        writeln!(self.orders, "{}", to_hex(bytes)).expect("give the orphan a message");
        from_hex(&self.answer())
    }
}

/// A name for a file in `/run` that is `length` bytes long.
pub fn long_name(file: &str, length: usize) -> String {
    let mut name = "/run".to_owned();
    while name.len() + 2 + file.len() < length {
        name.push_str("/.");
    }
    name.push('/');
    name.push_str(file);
    name
}
