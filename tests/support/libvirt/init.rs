//! The parent of every process without one, as pid 1 is on a real host.
//!
//! libvirtd detaches its guests and the session daemon, so that they outlive it; on a host the
//! first process adopts them. A test needs more care: a dead guest has to be reaped at once (in a
//! container nobody may do it), and none may stay behind when the test fails or is killed. So
//! libvirtd is started by a helper process that adopts (`PR_SET_CHILD_SUBREAPER`), reaps, and
//! kills all that it has adopted when the pipe from the test closes.
//!
//! The helper is this test program, started again to run the helper "test" below.

use crate::support::namespace::Namespace;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const VARIABLE: &str = "VIRTLOCKD_TEST_INIT";
const MARK: &str = "started> ";

/// The helper process. When this value is dropped, everything that descends from it is killed.
pub struct Init {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Init {
    /// Starts it in `namespace`, with an environment of little more than a search path.
    pub fn start(namespace: &Namespace) -> Init {
        let program = std::env::current_exe().expect("the path of this test program");
        let mut child = namespace
            .command(program)
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg("support::libvirt::init::the_init_process")
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            // libvirtd runs much code between fork and exec of a guest. GLib's own allocator (before
            // 2.76) may then be locked for ever by a thread that the child does not have: seen as
            // a guest that never starts when many start at once.
            .env("G_SLICE", "always-malloc")
            .env(VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start this program again as the parent of libvirtd");
        let answers = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let orders = child.stdin.take();
        Init {
            child,
            orders,
            answers,
        }
    }

    /// Starts a program whose output is appended to the file `log`; gives its pid.
    pub fn spawn(&mut self, log: &Path, argv: &[String]) -> i32 {
        let mut words = vec![log.to_str().expect("a path in UTF-8").to_owned()];
        words.extend_from_slice(argv);
        assert!(
            words.iter().all(|word| !word.contains(['\t', '\n'])),
            "no word of {words:?} may contain what separates them"
        );
        let orders = self.orders.as_mut().expect("the helper listens until drop");
        writeln!(orders, "{}", words.join("\t")).expect("give an order to the helper");
        let mut line = String::new();
        loop {
            line.clear();
            let count = self
                .answers
                .read_line(&mut line)
                .expect("read from the helper");
            assert!(count > 0, "the helper process ended");
            // The test harness of the helper writes to the same pipe, even on the same line.
            if let Some(at) = line.find(MARK) {
                return line[at + MARK.len()..].trim_end().parse().expect("a pid");
            }
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.child.wait();
    }
}

/// Not a test: what [`Init`] runs in its process.
#[test]
#[ignore = "a helper process that tests start themselves"]
fn the_init_process() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    nix::sys::prctl::set_child_subreaper(true).expect("become the parent of orphans");
    let (orders, input) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if orders.send(line).is_err() {
                break;
            }
        }
    });
    loop {
        reap();
        match input.recv_timeout(Duration::from_millis(5)) {
            Ok(line) => start(&line),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    // Killing one process hands its children to us, so look again until there are none.
    while reap() {
        for pid in children() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

// `reap` waits for this child like for any other.
#[allow(clippy::zombie_processes)]
fn start(line: &str) {
    let words: Vec<&str> = line.split('\t').collect();
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(words[0])
        .expect("open the log file");
    let child = Command::new(words[1])
        .args(&words[2..])
        .env_remove(VARIABLE)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second descriptor of the log"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("start {}: {error}", words[1]));
    let mut out = std::io::stdout();
    writeln!(out, "{MARK}{}", child.id())
        .and_then(|()| out.flush())
        .expect("answer the test");
}

/// Reaps whatever has ended; false when there is no child left at all.
fn reap() -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return true,
            Ok(_) => {}
            Err(Errno::ECHILD) => return false,
            Err(error) => panic!("wait for ended processes: {error}"),
        }
    }
}

fn children() -> Vec<i32> {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").expect("list the processes");
    processes
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in parentheses may contain anything; the state and the parent follow it.
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?;
            (parent == own).then_some(pid)
        })
        .collect()
}
