//! A process that looks at a daemon from its first step on, call by call (ptrace(2)), writes down what it
//! sees, and makes one system call of one of the daemon's processes fail: strace(1) counts each process for
//! itself and cannot be told which one is meant.
//!
//! It is this very test program, started again, because whoever traces a process is told of it instead of
//! whoever waits for it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::support::daemon::{self, Daemon};
use crate::support::faults::{self, Fault, Kernel, Of, PROBE_ERRNO, PROBE_NUMBER, Role};
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, wait_for};

/// What the helper process is to do: lines of text.
const VARIABLE: &str = "VIRTLOCKD_TEST_INJECTOR";
/// The daemon waits in front of its exec until somebody writes here, inside the namespace.
const GATE: &str = "/run/gate";
/// Where the helper writes to, inside the namespace.
const SEEN: &str = "/run/seen";
/// How a line of a call that was made to fail ends.
const INJECTED: &str = " (INJECTED)";

/// The helper process.
pub struct Injector {
    child: Child,
    seen: PathBuf,
}

impl Injector {
    /// Starts the daemon under test with these words, and a process that looks at it.
    pub fn start(
        namespace: &Namespace,
        args: &[&str],
        env: &[(&str, &str)],
        fault: Option<&Fault>,
        kernel: Kernel,
    ) -> (Daemon, Injector) {
        let gate = namespace.path(GATE);
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).expect("make the gate");
        let program = daemon::program();
        let program = program.to_str().expect("a path in UTF-8");
        let script = format!("read go < {GATE}; exec \"$0\" \"$@\"");
        let words = [&["-c", &script, program], args].concat();
        let daemon = Daemon::spawn(Path::new("/bin/sh"), namespace, &words, env);
        let seen = namespace.path(SEEN);
        let mut lines: Vec<OsString> = vec![
            daemon.pid().to_string().into(),
            program.into(),
            gate.into(),
            seen.clone().into(),
            (kernel == Kernel::NamesNoPeers).to_string().into(),
        ];
        if let Some(fault) = fault {
            let number = faults::number(fault.call).expect("a system call");
            lines.extend(
                [
                    fault.role.name().to_owned(),
                    number.to_string(),
                    faults::errno(fault.error).to_string(),
                    fault.nth.to_string(),
                ]
                .map(OsString::from),
            );
        }
        let child = Command::new(std::env::current_exe().expect("this test program"))
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg("injector::the_injector_process")
            .env(VARIABLE, lines.join("\n".as_ref()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start this program again as an injector");
        (daemon, Injector { child, seen })
    }

    /// Waits until all of the daemon's processes are over; what was seen of them, each call as the role of
    /// its process and its line.
    pub fn seen(mut self) -> Vec<(Role, String)> {
        wait_for(DEADLINE, "the end of all of the daemon's processes", || {
            self.child.try_wait().expect("ask for the injector's end")
        });
        lines(&self.seen)
    }
}

/// What was seen so far of the daemon in this namespace.
pub fn read(namespace: &Namespace) -> Vec<(Role, String)> {
    lines(&namespace.path(SEEN))
}

fn lines(seen: &Path) -> Vec<(Role, String)> {
    let text = std::fs::read_to_string(seen).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (role, line) = line.split_once(' ')?;
            Some((Role::of(role)?, line.to_owned()))
        })
        .collect()
}

impl Drop for Injector {
    fn drop(&mut self) {
        // What it traces goes with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line of the call that was made to fail, if it came to that.
pub fn injected(seen: &[(Role, String)]) -> Option<&str> {
    let lines = seen.iter().map(|(_, line)| line.as_str());
    lines.filter_map(|line| line.strip_suffix(INJECTED)).next()
}

/// Not a test: what [`Injector`] runs in its process.
#[test]
#[ignore = "a helper process that tests start themselves"]
fn the_injector_process() {
    let Ok(text) = std::env::var(VARIABLE) else {
        return;
    };
    let lines: Vec<&str> = text.lines().collect();
    let [pid, program, gate, seen, is_other_kernel, fault @ ..] = &lines[..] else {
        panic!("{text}");
    };
    let fault = match fault {
        [role, number, errno, nth] => Some(Wanted {
            role: Role::of(role).expect("a role"),
            number: number.parse().expect("a system call"),
            errno: errno.parse().expect("an error"),
            left: nth.parse().expect("a number"),
        }),
        _ => None,
    };
    let pid = pid.parse().expect("a pid");
    let gate = PathBuf::from(gate);
    let injection = Injection {
        program: (*program).to_owned(),
        seen: std::fs::File::create(seen).expect("make a file for what is seen"),
        is_census: fault.is_none(),
        fault,
        names_no_peers: *is_other_kernel == "true",
        processes: HashMap::new(),
    };
    injection.run(Pid::from_raw(pid), &gate);
}

/// The call that is to fail.
struct Wanted {
    role: Role,
    number: u64,
    errno: i64,
    /// How many there are up to it.
    left: usize,
}

/// A process that is traced.
#[derive(Default)]
struct Traced {
    /// `None` until its maker has told of it.
    role: Option<Role>,
    /// It has stopped for the first time.
    has_stopped: bool,
    /// The call that it is in returns this.
    returns: Option<i64>,
}

struct Injection {
    program: String,
    seen: std::fs::File,
    is_census: bool,
    fault: Option<Wanted>,
    names_no_peers: bool,
    processes: HashMap<Pid, Traced>,
}

impl Injection {
    fn run(mut self, daemon: Pid, gate: &Path) {
        // Not what it starts beside itself, which would not be over for the daemon as long as it is traced.
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_EXITKILL;
        ptrace::seize(daemon, options).expect("seize the daemon");
        ptrace::interrupt(daemon).expect("stop the daemon");
        // Its role begins with the exec of the program.
        self.processes.insert(daemon, Traced::default());
        let gate = gate.to_owned();
        // It may have to be traced to get there.
        std::thread::spawn(move || std::fs::write(gate, "go\n"));
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::__WALL)) {
            match status {
                WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) => {
                    self.processes.remove(&pid);
                }
                WaitStatus::PtraceSyscall(pid) => {
                    self.at_call(pid, pid == daemon);
                    self.go_on(pid, None);
                }
                WaitStatus::PtraceEvent(pid, signal, event) => self.at_event(pid, signal, event),
                WaitStatus::Stopped(pid, signal) => self.go_on(pid, Some(signal)),
                _ => (),
            }
        }
    }

    fn at_event(&mut self, pid: Pid, signal: Signal, event: i32) {
        match event {
            libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_CLONE => {
                let child = ptrace::getevent(pid).unwrap_or(0);
                let child = Pid::from_raw(i32::try_from(child).expect("a pid"));
                let made_by = self.processes.get(&pid).and_then(|it| it.role);
                let role = made_by.map(|maker| role_of_child(pid, maker));
                let traced = self.processes.entry(child).or_default();
                traced.role = role;
                if traced.has_stopped {
                    self.go_on(child, None);
                }
                self.go_on(pid, None);
            }
            libc::PTRACE_EVENT_STOP => {
                let traced = self.processes.entry(pid).or_default();
                let is_new = !std::mem::replace(&mut traced.has_stopped, true);
                if is_new && traced.role.is_none() && self.processes.len() > 1 {
                    // Its maker tells in a moment.
                    return;
                }
                if matches!(
                    signal,
                    Signal::SIGSTOP | Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU
                ) && !is_new
                {
                    // It stays stopped, which only SIGKILL ends here: nobody continues a daemon.
                } else {
                    self.go_on(pid, None);
                }
            }
            _ => self.go_on(pid, None),
        }
    }

    /// Lets a process go on: to its next call, if that matters.
    fn go_on(&self, pid: Pid, signal: Option<Signal>) {
        let traced = self.processes.get(&pid);
        let role = traced.and_then(|it| it.role);
        let wanted = self.fault.as_ref().map(|it| it.role);
        let matters = self.is_census
            || self.names_no_peers
            || role.is_none()
            || traced.is_some_and(|it| it.returns.is_some())
            || wanted == role;
        let _ = if matters {
            ptrace::syscall(pid, signal)
        } else {
            ptrace::cont(pid, signal)
        };
    }

    /// A process enters or leaves a call.
    fn at_call(&mut self, pid: Pid, is_daemon: bool) {
        let Ok(mut registers) = ptrace::getregs(pid) else {
            return;
        };
        let Some(is_entry) = enters(pid) else { return };
        if !is_entry {
            let traced = self.processes.entry(pid).or_default();
            if let Some(result) = traced.returns.take() {
                registers.rax = result.cast_unsigned();
                let _ = ptrace::setregs(pid, registers);
            }
            return;
        }
        let (number, arguments) = (
            registers.orig_rax,
            [registers.rdi, registers.rsi, registers.rdx],
        );
        let role = self.processes.get(&pid).and_then(|it| it.role);
        let role = match role {
            Some(role) => role,
            // The shell and what is in front of it are nobody's.
            None if is_daemon && number == libc::SYS_execve as u64 => {
                if text(pid, arguments[0]) != self.program {
                    return;
                }
                self.processes.entry(pid).or_default().role = Some(Role::Guardian);
                Role::Guardian
            }
            None => return,
        };
        let mut fails = None;
        if self.names_no_peers && number == PROBE_NUMBER {
            fails = Some(PROBE_ERRNO);
        }
        let mut is_it = false;
        if let Some(fault) = &mut self.fault
            && (fault.role, fault.number) == (role, number)
        {
            fault.left -= 1;
            is_it = fault.left == 0;
            if is_it {
                fails = Some(fault.errno);
            }
        }
        if self.is_census || is_it {
            let line = line(pid, number, arguments);
            let end = if is_it { INJECTED } else { "" };
            let line = format!("{} {line}{end}\n", role.name());
            self.seen.write_all(line.as_bytes()).expect("write it down");
        }
        if is_it {
            self.fault = None;
        }
        if let Some(errno) = fails {
            // No call at all.
            registers.orig_rax = u64::MAX;
            let _ = ptrace::setregs(pid, registers);
            self.processes.entry(pid).or_default().returns = Some(-errno);
        }
    }
}

/// What a process is for that one of the daemon's is making. What serves makes none that does.
fn role_of_child(maker: Pid, role: Role) -> Role {
    let registers = ptrace::getregs(maker).expect("the registers of a process that makes one");
    let shares_descriptors = registers.rdi & libc::CLONE_FILES as u64 != 0;
    if shares_descriptors && role == Role::Reactor {
        Role::Scribe
    } else if shares_descriptors {
        Role::Reactor
    } else {
        Role::Understudy
    }
}

/// Whether a process that is stopped at a call enters it. `None` if it is gone.
fn enters(pid: Pid) -> Option<bool> {
    const ENTRY: u8 = 1;
    let information = ptrace::syscall_info(pid).ok()?;
    Some(information.op == ENTRY)
}

/// A call in words: its name, and what its descriptors are of, its paths and its commands.
fn line(pid: Pid, number: u64, arguments: [u64; 3]) -> String {
    let (name, kinds) = faults::call(number);
    let words: Vec<String> = kinds
        .iter()
        .zip(arguments)
        .map(|(kind, argument)| match kind {
            Of::Number => format!("{argument:#x}"),
            Of::Path => format!("\"{}\"", text(pid, argument)),
            Of::Command => command(argument).to_owned(),
            Of::Descriptor => {
                let number = argument as u32 as i32;
                let link = format!("/proc/{pid}/fd/{number}");
                let of = std::fs::read_link(link).unwrap_or_default();
                format!("{number}<{}>", kind_of(&of.to_string_lossy()))
            }
        })
        .collect();
    format!("{name}({})", words.join(", "))
}

/// As strace(1) names what is no file.
fn kind_of(link: &str) -> String {
    match link.strip_prefix("anon_inode:") {
        Some(_) => link.to_owned(),
        None => link.replace(":[", ":"),
    }
}

fn command(number: u64) -> &'static str {
    match number as i32 {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => "F_DUPFD",
        libc::F_GETFD => "F_GETFD",
        libc::F_SETFD => "F_SETFD",
        libc::F_GETFL => "F_GETFL",
        libc::F_SETFL => "F_SETFL",
        _ => "another command",
    }
}

/// A text in the memory of a process that is stopped.
fn text(pid: Pid, at: u64) -> String {
    let mut bytes = [0; 4096];
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"));
    let count = memory.and_then(|memory| memory.read_at(&mut bytes, at));
    let read = &bytes[..count.unwrap_or(0)];
    let text = read.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}
