//! Who is measured, and how a server is started: in a mount namespace of its own with a tmpfs on
//! /run, with the same options for everybody, and killed at the end of the run.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client;
use crate::helper::{ROLE, own_program};
use crate::measure::Outcome;
use crate::probe;

/// One of the servers that are compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// libvirt's own daemon.
    C,
    /// The daemon of this crate.
    Ours,
    /// Another build of it, most often an earlier one: what has a change cost?
    Before,
    /// The bare echo server of `floor.rs`.
    Floor,
}

pub const SUBJECTS: [Subject; 4] = [Subject::C, Subject::Ours, Subject::Before, Subject::Floor];

impl Subject {
    /// The word in options and in the JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::C => "c",
            Self::Ours => "ours",
            Self::Before => "before",
            Self::Floor => "floor",
        }
    }

    /// The name in tables and pictures.
    pub fn title(self) -> &'static str {
        match self {
            Self::C => "C daemon",
            Self::Ours => "virtlockd-rs",
            Self::Before => "before",
            Self::Floor => "floor",
        }
    }
}

/// Which CPUs the server and the bench run on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Both on one and the same CPU: a round trip costs what both sides compute, no wake-up of
    /// another CPU is in it.
    Shared,
    /// The server on one CPU, the bench on the next: throughput of the server alone.
    Split,
    /// As `Split`, and the server's real-time priority keeps the machine's other programs from its
    /// CPU.
    Apart,
    /// Wherever the scheduler likes, as on a host.
    Anywhere,
}

/// The CPUs this program may use.
fn all_cpus() -> Outcome<Vec<usize>> {
    // The parent's set: this process narrows its own. The first call happens before that.
    static CPUS: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(cpus.clone());
    }
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(|e| format!("sched_getaffinity: {e}"))?;
    let allowed = |&cpu: &usize| set.is_set(cpu).unwrap_or(false);
    let found = (0..CpuSet::count()).filter(allowed).collect();
    Ok(CPUS.get_or_init(|| found).clone())
}

impl Placement {
    fn server_cpus(self) -> Outcome<Vec<usize>> {
        let cpus = all_cpus()?;
        Ok(if self == Self::Anywhere {
            cpus
        } else {
            cpus[..1].to_vec()
        })
    }

    /// The server's CPUs as taskset wants them.
    pub fn server_cpu_list(self) -> Outcome<String> {
        let cpus: Vec<String> = self.server_cpus()?.iter().map(usize::to_string).collect();
        Ok(cpus.join(","))
    }

    fn bench_cpus(self) -> Outcome<Vec<usize>> {
        let cpus = all_cpus()?;
        Ok(match self {
            Self::Shared => cpus[..1].to_vec(),
            Self::Split | Self::Apart if cpus.len() > 1 => cpus[1..2].to_vec(),
            _ => cpus,
        })
    }

    pub fn move_the_bench(self) -> Outcome<()> {
        let mut set = CpuSet::new();
        for cpu in self.bench_cpus()? {
            set.set(cpu).map_err(|e| format!("naming CPU {cpu}: {e}"))?;
        }
        sched_setaffinity(Pid::from_raw(0), &set).map_err(|e| format!("sched_setaffinity: {e}"))
    }
}

/// Where the programs are.
pub struct Programs {
    pub ours: PathBuf,
    pub before: Option<PathBuf>,
    pub c: PathBuf,
    /// Servers write their log here.
    pub logs: PathBuf,
}

/// A running server.
pub struct Server {
    child: Child,
    pub pid: i32,
    /// The same for whoever looks from outside.
    root: PathBuf,
    log: PathBuf,
}

const START_LIMIT: Duration = Duration::from_secs(20);
/// Made in the new tmpfs before the server starts: as long as it is missing, the path still leads
/// to the host's own /run, whose virtlockd must not be touched.
const MARK: &str = "run/virtlockd-bench";

/// Mounts the tmpfs, writes the configuration, becomes the server.
const PREPARE: &str = "mount -t tmpfs tmpfs /run && mkdir -p /run/libvirt /run/disks && \
    printf 'max_clients = %s\\n' \"$1\" > /run/virtlockd.conf && touch /run/virtlockd-bench && \
    shift && exec \"$@\"";

/// How much a server may have.
#[derive(Clone, Copy)]
pub struct Limits {
    /// `max_clients` of its configuration.
    pub clients: u32,
    /// Its limit of open files, if it is to have another than the bench.
    pub descriptors: Option<u32>,
}

/// More than any scenario needs.
const NO_LIMITS: Limits = Limits {
    clients: 100_000,
    descriptors: None,
};

/// How a subject is started.
fn command_line(programs: &Programs, subject: Subject) -> Outcome<Vec<OsString>> {
    let before = programs.before.as_ref();
    let daemon = match subject {
        Subject::Before => before.ok_or("--before does not say which daemon")?,
        Subject::C => &programs.c,
        Subject::Ours => &programs.ours,
        Subject::Floor => {
            let role = format!("{ROLE}floor");
            let words = [
                own_program()?.into(),
                role.into(),
                IN_NAMESPACE_SOCKET.into(),
            ];
            return Ok(words.into());
        }
    };
    Ok([daemon.as_os_str(), "-f".as_ref(), CONFIGURATION.as_ref()]
        .map(OsString::from)
        .into())
}

impl Server {
    /// Starts the server, and moves the bench to its own place. Returns when the server answers.
    pub fn start(programs: &Programs, subject: Subject, placement: Placement) -> Outcome<Self> {
        Self::start_limited(programs, subject, placement, NO_LIMITS)
    }

    /// The same, by way of a program that starts it: it gets the server's command line behind these words,
    /// and can be talked to.
    pub fn start_through(
        programs: &Programs,
        subject: Subject,
        placement: Placement,
        words: &[&str],
    ) -> Outcome<(Self, ChildStdin, BufReader<ChildStdout>)> {
        let mut server = Self::launch(programs, subject, placement, NO_LIMITS, words)?;
        let orders = server.child.stdin.take();
        let answers = server.child.stdout.take();
        match (orders, answers) {
            (Some(orders), Some(answers)) => Ok((server, orders, BufReader::new(answers))),
            _ => Err("a program that starts a server has no pipes".into()),
        }
    }

    /// The same with less room.
    pub fn start_limited(
        programs: &Programs,
        subject: Subject,
        placement: Placement,
        limits: Limits,
    ) -> Outcome<Self> {
        Self::launch(programs, subject, placement, limits, &[])
    }

    fn launch(
        programs: &Programs,
        subject: Subject,
        placement: Placement,
        limits: Limits,
        through: &[&str],
    ) -> Outcome<Self> {
        placement.move_the_bench()?;
        let cpus = placement.server_cpu_list()?;
        let log = programs.logs.join(format!("{}.log", subject.word()));
        let log_file = File::create(&log).map_err(|e| format!("making {}: {e}", log.display()))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "taskset", "-c", &cpus]);
        if placement == Placement::Apart {
            command.args(["chrt", "--fifo", "1"]);
        }
        command.args([
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            PREPARE,
            "sh",
            &limits.clients.to_string(),
        ]);
        if let Some(descriptors) = limits.descriptors {
            command.args(["prlimit", &format!("--nofile={descriptors}:{descriptors}")]);
        }
        let pipe = || match through {
            [] => Stdio::null(),
            _ => Stdio::piped(),
        };
        let child = command
            .args(through)
            .args(command_line(programs, subject)?)
            .stdin(pipe())
            .stdout(pipe())
            .stderr(Stdio::from(log_file))
            .spawn()
            .map_err(|e| format!("starting the {} through setpriv: {e}", subject.title()))?;
        let pid = i32::try_from(child.id()).map_err(|e| format!("a pid: {e}"))?;
        let root = root_of(pid);
        let mut server = Self {
            child,
            pid,
            root,
            log,
        };
        server.wait_until_it_answers()?;
        Ok(server)
    }

    fn wait_until_it_answers(&mut self) -> Outcome<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let answers = self.root.join(MARK).exists() && client::connect(&self.socket()).is_ok();
            if answers {
                return Ok(());
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                return Err(format!(
                    "no socket within {START_LIMIT:?}; {}",
                    self.last_words()
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// An error if the server has ended.
    pub fn check_alive(&mut self) -> Outcome<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!(
                "the server ended ({status}); {}",
                self.last_words()
            )),
            Err(error) => Err(format!("looking after the server: {error}")),
        }
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        format!(
            "its log ({}) ends: {}",
            self.log.display(),
            lines.join(" / ")
        )
    }

    pub fn socket(&self) -> PathBuf {
        socket_of(self.pid)
    }

    /// Where administrators connect.
    pub fn admin_socket(&self) -> PathBuf {
        self.socket().with_file_name("virtlockd-admin-sock")
    }

    /// The path of a disk as requests name it.
    pub fn disk(&self, number: u32) -> String {
        format!("/run/disks/{number}")
    }

    /// The same disk from here.
    pub fn outside(&self, disk: &str) -> PathBuf {
        self.root.join(disk.trim_start_matches('/'))
    }

    pub fn make_disks(&self, numbers: std::ops::Range<u32>) -> Outcome<()> {
        for number in numbers {
            client::make_disk(&self.outside(&self.disk(number)))?;
        }
        Ok(())
    }
}

const CONFIGURATION: &str = "/run/virtlockd.conf";
const IN_NAMESPACE_SOCKET: &str = "/run/libvirt/virtlockd-sock";

/// The root directory of the server with this pid, from here.
pub fn root_of(server: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{server}/root"))
}

/// The socket of the server with this pid, from here.
pub fn socket_of(server: i32) -> PathBuf {
    root_of(server).join(IN_NAMESPACE_SOCKET.trim_start_matches('/'))
}

impl Server {
    /// Kills all of the server and starts it once more where it was: how long that takes until it answers.
    pub fn start_again(
        &mut self,
        programs: &Programs,
        subject: Subject,
        placement: Placement,
    ) -> Outcome<Duration> {
        let path = format!("/proc/{}/ns/mnt", self.pid);
        let namespace = File::open(&path).map_err(|e| format!("opening {path}: {e}"))?;
        let namespace = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        let log = File::options().append(true).open(&self.log);
        let log = log.map_err(|e| format!("opening {}: {e}", self.log.display()))?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "taskset", "-c"])
            .arg(placement.server_cpu_list()?)
            .args(["nsenter", &format!("--mount={namespace}")])
            .args(command_line(programs, subject)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log));
        self.end();
        let begun = Instant::now();
        let child = command.spawn();
        self.child = child.map_err(|e| format!("starting the server again: {e}"))?;
        self.pid = i32::try_from(self.child.id()).map_err(|e| format!("a pid: {e}"))?;
        self.root = root_of(self.pid);
        self.wait_until_it_answers()?;
        Ok(begun.elapsed())
    }

    fn end(&mut self) {
        // Not SIGTERM: a regular end would fence owners, and nothing here is worth saving. Stopped, a
        // guardian makes no other process that serves; which of the rest serves and which helps is all the same.
        let signal = |pid, signal| _ = kill(Pid::from_raw(pid), signal);
        signal(self.pid, Signal::SIGSTOP);
        let mut rest = probe::family(self.pid);
        rest.retain(|&pid| pid != self.pid);
        for &pid in &rest {
            signal(pid, Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Until the last of them is gone, its socket answers and its locks are held.
        while rest.iter().any(|&pid| probe::is_alive(pid)) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The version line of a daemon, if the program can be run. The line starts with the words that the
/// program was called by; of those only its name is kept.
pub fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let line = String::from_utf8_lossy(&output.stdout);
    let name = program.file_name()?.to_string_lossy();
    Some(line.trim().replacen(&*program.to_string_lossy(), &name, 1))
}
