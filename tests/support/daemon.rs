//! A running lock daemon: ours, or libvirt's to compare with.

use super::client::Client;
use super::namespace::Namespace;
use super::owner::process_state;
use super::{DEADLINE, TempDir, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use virtlockd::host::process::Process;

/// Where a root daemon listens, inside its namespace.
pub const LOCK_SOCKET: &str = "/run/libvirt/virtlockd-sock";
/// Where a root daemon's admin service listens.
pub const ADMIN_SOCKET: &str = "/run/libvirt/virtlockd-admin-sock";

/// The daemon under test: the one just built, or the program named by `VIRTLOCKD_UNDER_TEST`.
pub fn program() -> PathBuf {
    match std::env::var_os("VIRTLOCKD_UNDER_TEST") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(env!("CARGO_BIN_EXE_virtlockd")),
    }
}

/// Libvirt's own daemon, where it is installed.
pub fn c_daemon() -> Option<PathBuf> {
    let path = PathBuf::from("/usr/sbin/virtlockd");
    path.exists().then_some(path)
}

/// For the environment of a daemon that strace is to watch: where the daemon was built to look for
/// leaks (`tests/sanitize`), it cannot do so then, and would fail for that.
pub const WATCHED: (&str, &str) = ("LSAN_OPTIONS", "detect_leaks=0");

/// A daemon in the foreground. It is killed (SIGKILL) when dropped.
pub struct Daemon {
    child: Child,
    lock_socket: PathBuf,
    admin_socket: PathBuf,
    files: TempDir,
}

impl Daemon {
    /// Starts [`program`] in `namespace` and waits until its lock socket answers.
    pub fn start(namespace: &Namespace, args: &[&str], env: &[(&str, &str)]) -> Daemon {
        Daemon::start_program(&program(), namespace, args, env)
    }

    /// As [`Daemon::start`], with any program.
    pub fn start_program(
        program: &Path,
        namespace: &Namespace,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Daemon {
        let mut daemon = Daemon::spawn(program, namespace, args, env);
        let socket = daemon.lock_socket.clone();
        daemon.wait_for_socket(&socket);
        daemon
    }

    /// As [`Daemon::start_program`] with a configuration file of this text.
    pub fn start_configured(program: &Path, namespace: &Namespace, config: &str) -> Daemon {
        let inside = "/run/virtlockd-test.conf";
        std::fs::write(namespace.path(inside), config).expect("write the configuration file");
        Daemon::start_program(program, namespace, &["-f", inside], &[])
    }

    /// Starts the program and waits for nothing.
    ///
    /// The environment is this process's without whatever could change what a daemon does; `env`
    /// is added to it.
    pub fn spawn(
        program: &Path,
        namespace: &Namespace,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Daemon {
        Daemon::spawn_between(program, namespace, args, env, (None, None))
    }

    /// The same, with something else as standard input and output than nothing and a file.
    pub fn spawn_between(
        program: &Path,
        namespace: &Namespace,
        args: &[&str],
        env: &[(&str, &str)],
        (input, output): (Option<Stdio>, Option<Stdio>),
    ) -> Daemon {
        let files = TempDir::new();
        let create =
            |name| std::fs::File::create(files.path().join(name)).expect("make a log file");
        let mut command = namespace.command(program);
        for (name, _) in std::env::vars_os() {
            if changes_a_daemon(&name) {
                command.env_remove(name);
            }
        }
        let child = command
            .args(args)
            .env("LC_ALL", "C")
            .envs(env.iter().copied())
            .stdin(input.unwrap_or_else(Stdio::null))
            .stdout(output.unwrap_or_else(|| create("stdout").into()))
            .stderr(create("stderr"))
            .spawn()
            .expect("start nsenter with the daemon");
        Daemon {
            child,
            lock_socket: namespace.path(LOCK_SOCKET),
            admin_socket: namespace.path(ADMIN_SOCKET),
            files,
        }
    }

    /// Waits until somebody listens on `socket`. The probe is a client of the daemon, so client
    /// ids on that socket go on from 2.
    pub fn wait_for_socket(&mut self, socket: &Path) {
        let what = format!("an answer on {}", socket.display());
        wait_for(DEADLINE, &what, || {
            if let Some(status) = self.ended() {
                panic!(
                    "the daemon ended at its start ({status}); stderr:\n{}",
                    self.stderr()
                );
            }
            UnixStream::connect(socket).ok().map(drop)
        });
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is an i32")
    }

    /// The process that serves: the daemon's child, or the daemon itself where it has none (libvirt's, or
    /// one that can have no guardian).
    pub fn reactor(&self) -> i32 {
        reactor_of(self.pid())
    }

    /// Sets a limit as prlimit(1) takes it, of the daemon's processes and of those that follow them.
    pub fn limit(&self, limit: &str) {
        for process in [self.pid(), self.reactor()] {
            let pid = format!("--pid={process}");
            let status = std::process::Command::new("prlimit")
                .args([&pid, limit])
                .status();
            let status = status.expect("run prlimit");
            assert!(status.success(), "prlimit {limit}: {status}");
        }
    }

    /// The lock socket, as reached from outside of the namespace.
    pub fn lock_socket(&self) -> &Path {
        &self.lock_socket
    }

    /// The admin socket, as reached from outside of the namespace.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }

    /// A new connection to the lock socket.
    pub fn client(&self) -> Client {
        Client::connect(&self.lock_socket)
    }

    /// A new connection to the admin socket, which a daemon makes after the lock socket. It has its name before
    /// anybody listens there.
    #[track_caller]
    pub fn admin_client(&self) -> Client {
        let stream = wait_for(DEADLINE, "the admin socket to be there", || {
            UnixStream::connect(&self.admin_socket).ok()
        });
        Client::over(stream)
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("send a signal to the daemon");
    }

    /// The exit status if it has ended already.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .expect("ask for the daemon's exit status")
    }

    /// Waits for the daemon's end.
    pub fn wait_end(&mut self) -> ExitStatus {
        wait_for(DEADLINE, "the end of the daemon", || self.ended())
    }

    /// Ends the daemon as an administrator would (SIGTERM).
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_end()
    }

    /// Ends the daemon at once (SIGKILL), all of it.
    pub fn kill(&mut self) {
        // The number of one that was waited for may be anybody's by now.
        if self.ended().is_none() {
            kill_all(self.pid());
        }
        let _ = self.child.wait();
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        self.output("stderr")
    }

    /// What it wrote to stdout so far.
    pub fn stdout(&self) -> String {
        self.output("stdout")
    }

    fn output(&self, name: &str) -> String {
        let bytes = std::fs::read(self.files.path().join(name)).expect("read the daemon's output");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.reactor()))
            .expect("list the daemon's descriptors")
            .count()
    }

    /// Waits until the daemon does nothing at all: it has not run for a tenth of a second. One that
    /// goes round and round over something it cannot finish never gets there.
    pub fn wait_until_asleep(&self) {
        // Time on a processor in nanoseconds, time waited for one, number of times it ran. The guardian
        // looks at a reactor now and then that had something to do: it does not count.
        let runs = || std::fs::read_to_string(format!("/proc/{}/schedstat", self.reactor())).ok();
        wait_until(DEADLINE, "the daemon to have nothing to do", || {
            let before = runs();
            std::thread::sleep(Duration::from_millis(100));
            before.is_some() && before == runs()
        });
    }

    /// A size in KiB out of `/proc/PID/status`, for example `VmRSS` or `VmSize`.
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.reactor()))
            .expect("read the daemon's status");
        status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or_else(|| panic!("no {field} in the daemon's status"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let stderr = self.stderr();
            let lines: Vec<&str> = stderr.lines().collect();
            eprintln!("the last of the daemon {}'s stderr:", self.child.id());
            for line in &lines[lines.len().saturating_sub(10)..] {
                eprintln!("  {:.300}", line);
            }
        }
    }
}

/// The main process of a daemon that is nobody's child here, and whose number may be another one's when it has
/// ended: it is meant by a pidfd.
pub struct Main {
    pub pid: i32,
    process: Process,
}

impl Main {
    /// The one that has this number now; `None` if there is none.
    pub fn of(pid: i32) -> Option<Main> {
        let process = Process::open_any(pid).ok()?;
        Some(Main { pid, process })
    }

    /// Signals it, if it is there.
    pub fn signal(&self, signal: Signal) {
        let _ = self.process.signal(signal);
    }

    /// Kills the daemon's processes, so that none of them makes another one. They are dead when this returns: as
    /// long as one of them is not, it listens.
    pub fn kill_all(&self) {
        // Stopped, it does not act on the death of a child, and its children keep their numbers.
        self.stop();
        let children = match self.process.is_dead() {
            true => Vec::new(),
            false => children_of(self.pid),
        };
        let children: Vec<Main> = children.into_iter().filter_map(Main::of).collect();
        children.iter().for_each(Main::stop);
        let helpers: Vec<i32> = children.iter().flat_map(|it| children_of(it.pid)).collect();
        for process in children.iter().chain([self]) {
            process.signal(Signal::SIGKILL);
        }
        // Not asserted: this is done while a failed test unwinds, too.
        let end = Instant::now() + DEADLINE;
        let all = children.iter().chain([self]);
        while all.clone().any(|one| !one.process.is_dead()) && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(100));
        }
        // One that it had just made has for a moment all that was open, sockets that seem to be listened to as
        // well. (One that hangs while it closes that is not waited for.)
        let give_up = Instant::now() + Duration::from_secs(1);
        while helpers.iter().any(|pid| has_much_open(*pid)) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Stops it, and waits until it is. (One that hangs in the kernel is not, and does nothing either.)
    fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let is_stopped = || matches!(process_state(self.pid), Some('T' | 't'));
        let give_up = Instant::now() + Duration::from_secs(1);
        while !self.process.is_dead() && !is_stopped() && Instant::now() < give_up {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Whether a process has more open than one that works for a daemon under a name of its own needs: standard input,
/// output and error, the socket over which it is told what to do, and a file or two. No daemon has as little.
fn has_much_open(pid: i32) -> bool {
    const ENOUGH: usize = 8;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"));
    open.is_ok_and(|open| open.count() > ENOUGH)
}

/// The same with the number of one that runs for sure.
pub fn kill_all(pid: i32) {
    if let Some(main) = Main::of(pid) {
        main.kill_all();
    }
}

/// The processes that this one has made, in the order of their making.
pub fn children_of(pid: i32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let numbers = children.split_whitespace();
    numbers.filter_map(|it| it.parse().ok()).collect()
}

/// The process that serves for the daemon with this number: its youngest child, if it has any but those that
/// only do something for it ([`helps`]).
pub fn reactor_of(pid: i32) -> i32 {
    let children = children_of(pid);
    let serves = children.iter().rfind(|child| !helps(**child));
    serves.copied().unwrap_or(pid)
}

/// Whether a process is one that a daemon made to do something that may take long, under a name of its own.
pub fn helps(pid: i32) -> bool {
    // A copy of the program may be called anything else.
    const NAMES: [&str; 4] = ["notes", "share", "close", "left"];
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| {
        let what = name.trim_end().strip_prefix("virtlockd-");
        what.is_some_and(|what| NAMES.contains(&what))
    })
}

/// The processes that do something on shares for the daemon with this number: all that help but the one that
/// writes notes. They are its children, or those of the process that serves.
pub fn helpers_of(pid: i32) -> Vec<i32> {
    let serves = reactor_of(pid);
    let mut all = children_of(pid);
    if serves != pid {
        all.extend(children_of(serves));
    }
    all.retain(|it| helps(*it) && !writes_notes(*it));
    all
}

/// Whether a process is one that works on files of shares.
pub fn works_on_shares(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name == "virtlockd-share\n")
}

/// Whether a process is one that writes notes into lease files, for the one that made it.
pub fn writes_notes(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name == "virtlockd-notes\n")
}

/// How many processes write notes for the daemon with this number.
pub fn writers_of_notes(pid: i32) -> usize {
    let children = children_of(reactor_of(pid));
    children
        .iter()
        .filter(|child| writes_notes(**child))
        .count()
}

fn changes_a_daemon(name: &OsStr) -> bool {
    let prefixes = [
        "LIBVIRT_",
        "LISTEN_",
        "NOTIFY_SOCKET",
        "FDSTORE",
        "VIRTLOCKD_ON_STOP",
        "LC_",
        "LANG",
        "XDG_",
    ];
    name.to_str()
        .is_some_and(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
}
