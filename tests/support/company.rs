//! All processes of a daemon, looked at call by call (ptrace(2)), so that any of them can be killed, refused
//! something or sent a signal at a system call of one's choice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::daemon::reactor_of;

/// What a process is to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It was started, keeps the others alive, and is each image that is executed in an upgrade.
    Guardian,
    /// It serves.
    Reactor,
    /// A successor that shows whether it can take over.
    Check,
    /// It goes on should a successor not serve.
    Understudy,
    /// It writes notes into lease files.
    Scribe,
}

/// A system call that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub role: Role,
    /// How many processes had this role before.
    pub before: usize,
    /// How many calls this process has made, with this one.
    pub of_process: usize,
    /// How many calls all in this role have made, with this one.
    pub nth: usize,
    /// Its number.
    pub call: u64,
    pub arguments: [u64; 3],
}

/// What is to become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    GoOn,
    /// The process is killed as it enters the call.
    Kill,
    /// As [`Act::Kill`], and from then on nobody is looked at any more.
    KillAndLeave,
    /// The call is not made: it returns this error.
    Refuse(i32),
    /// The guardian is sent a signal first.
    Tell(Signal),
    /// The guardian is sent a signal, and nobody is looked at any more.
    TellAndLeave(Signal),
}

struct Member {
    role: Role,
    before: usize,
    calls: usize,
    /// The call that it is in is to return this.
    refused: Option<i32>,
    /// It is in a call that it was seen to enter.
    is_inside: bool,
}

/// How many calls each role has made.
pub type Counts = BTreeMap<Role, usize>;

/// What was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    pub counts: Counts,
    /// The last call that was not simply made.
    pub last: Option<At>,
}

/// The daemon's processes while they are looked at.
pub struct Company {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Seen>>,
}

impl Company {
    /// Looks at the daemon with this number, and asks what is to become of each call. It has begun when this
    /// returns.
    pub fn of(guardian: i32, decide: impl FnMut(&At) -> Act + Send + 'static) -> Company {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                let mut looker = Looker {
                    guardian: Pid::from_raw(guardian),
                    members: BTreeMap::new(),
                    seen: BTreeMap::new(),
                    counts: Counts::new(),
                    last: None,
                    decide,
                };
                looker.seize(guardian, Role::Guardian);
                let reactor = reactor_of(guardian);
                if reactor != guardian {
                    looker.seize(reactor, Role::Reactor);
                }
                ready.send(()).expect("somebody waits");
                looker.look(&stop);
                // Whoever is still traced is let go with the end of this thread.
                Seen {
                    counts: looker.counts,
                    last: looker.last,
                }
            }
        });
        is_ready.recv().expect("the processes are seized");
        Company {
            stop,
            thread: Some(thread),
        }
    }

    /// Lets all of them go.
    pub fn leave(mut self) -> Seen {
        self.end().expect("it ends once")
    }

    fn end(&mut self) -> Option<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        Some(self.thread.take()?.join().expect("the tracer"))
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Looker<Decide> {
    guardian: Pid,
    members: BTreeMap<Pid, Member>,
    /// How many there were in each role.
    seen: BTreeMap<Role, usize>,
    counts: Counts,
    last: Option<At>,
    decide: Decide,
}

impl<Decide: FnMut(&At) -> Act> Looker<Decide> {
    fn seize(&mut self, pid: i32, role: Role) {
        let pid = Pid::from_raw(pid);
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC;
        ptrace::seize(pid, options).expect("seize a process of the daemon");
        ptrace::interrupt(pid).expect("stop a process of the daemon");
        self.enter(pid, role);
    }

    fn enter(&mut self, pid: Pid, role: Role) {
        let seen = self.seen.entry(role).or_default();
        let member = Member {
            role,
            before: *seen,
            calls: 0,
            refused: None,
            is_inside: false,
        };
        *seen += 1;
        self.members.insert(pid, member);
    }

    fn look(&mut self, stop: &AtomicBool) {
        let mut idle = 0u32;
        while !stop.load(Ordering::Relaxed) && !self.members.is_empty() {
            let mut has_any = false;
            for pid in self.members.keys().copied().collect::<Vec<_>>() {
                match self.news_of(pid) {
                    WaitStatus::StillAlive => continue,
                    status => {
                        has_any = true;
                        if self.act(pid, status) {
                            return;
                        }
                    }
                }
            }
            idle = if has_any { 0 } else { idle + 1 };
            match idle {
                0 => (),
                1..200 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    fn news_of(&self, pid: Pid) -> WaitStatus {
        let now = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
        if pid == self.guardian {
            // Its end is for the test to be told.
            let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
            if let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) =
                waitid(Id::Pid(pid), look)
            {
                return WaitStatus::Exited(pid, 0);
            }
            // It may end here.
            let stops = WaitPidFlag::WSTOPPED | now;
            return match waitid(Id::Pid(pid), stops) {
                Ok(WaitStatus::PtraceEvent(pid, signal, 0)) => WaitStatus::Stopped(pid, signal),
                Ok(status) => status,
                Err(_) => WaitStatus::StillAlive,
            };
        }
        waitpid(pid, Some(now)).unwrap_or(WaitStatus::Exited(pid, 0))
    }

    /// True if nobody is to be looked at any more.
    fn act(&mut self, pid: Pid, status: WaitStatus) -> bool {
        let mut signal = None;
        match status {
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                self.members.remove(&pid);
                if pid == self.guardian {
                    self.succeed();
                }
                return false;
            }
            WaitStatus::PtraceSyscall(_) => return self.at_call(pid),
            WaitStatus::PtraceEvent(_, _, event) => match event {
                libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
                    let child = ptrace::getevent(pid).unwrap_or(0);
                    let child = Pid::from_raw(i32::try_from(child).expect("a pid"));
                    self.born(pid, child, event == libc::PTRACE_EVENT_CLONE);
                }
                libc::PTRACE_EVENT_EXEC => {
                    if let Some(member) = self.members.get_mut(&pid) {
                        member.is_inside = true;
                    }
                }
                _ => (),
            },
            WaitStatus::Stopped(_, it) if it != Signal::SIGTRAP => signal = Some(it),
            _ => (),
        }
        let _ = ptrace::syscall(pid, signal);
        false
    }

    /// The guardian is dead: somebody is in its place.
    fn succeed(&mut self) {
        let next = [Role::Understudy, Role::Reactor]
            .into_iter()
            .find_map(|role| {
                let mut members = self.members.iter();
                members.find(|(_, it)| it.role == role).map(|(pid, _)| *pid)
            });
        if let Some(pid) = next {
            self.guardian = pid;
            self.enter(pid, Role::Guardian);
        }
    }

    fn born(&mut self, parent: Pid, child: Pid, is_thread: bool) {
        let role = self.members.get(&parent).map(|it| it.role);
        let registers = ptrace::getregs(parent).ok();
        let flags = registers.map_or(0, |it| it.rdi);
        // A check is started as another program, and shares memory until it is one.
        let is_copy = registers.is_some_and(|it| it.orig_rax == libc::SYS_clone as u64)
            && flags & libc::CLONE_VM as u64 == 0;
        let shares = flags & libc::CLONE_FILES as u64 != 0;
        let role = match role {
            // libvirt's daemon has some.
            _ if is_thread => return let_go(child),
            Some(Role::Guardian) if shares => Role::Reactor,
            Some(Role::Guardian | Role::Understudy) => Role::Understudy,
            Some(Role::Reactor) if is_copy && shares => Role::Scribe,
            Some(Role::Reactor) if is_copy => Role::Understudy,
            Some(Role::Reactor) => Role::Check,
            // What a check starts is nobody's.
            _ => return let_go(child),
        };
        self.enter(child, role);
    }

    fn at_call(&mut self, pid: Pid) -> bool {
        let Ok(mut registers) = ptrace::getregs(pid) else {
            return false;
        };
        let Some(member) = self.members.get_mut(&pid) else {
            return false;
        };
        if std::mem::take(&mut member.is_inside) {
            if let Some(reason) = member.refused.take() {
                registers.rax = (-i64::from(reason)).cast_unsigned();
                let _ = ptrace::setregs(pid, registers);
            }
            let _ = ptrace::syscall(pid, None);
            return false;
        }
        if registers.rax.cast_signed() != -i64::from(libc::ENOSYS) {
            // The end of one that was not seen to begin.
            let _ = ptrace::syscall(pid, None);
            return false;
        }
        member.is_inside = true;
        member.calls += 1;
        let count = self.counts.entry(member.role).or_default();
        *count += 1;
        let at = At {
            role: member.role,
            before: member.before,
            of_process: member.calls,
            nth: *count,
            call: registers.orig_rax,
            arguments: [registers.rdi, registers.rsi, registers.rdx],
        };
        let tell = |signal| kill(self.guardian, signal).expect("signal the guardian");
        let act = (self.decide)(&at);
        if act != Act::GoOn {
            self.last = Some(at);
        }
        match act {
            Act::GoOn => (),
            Act::Kill => {
                let _ = kill(pid, Signal::SIGKILL);
                return false;
            }
            Act::KillAndLeave => {
                let _ = kill(pid, Signal::SIGKILL);
                return true;
            }
            Act::Refuse(reason) => {
                member.refused = Some(reason);
                registers.orig_rax = u64::MAX;
                let _ = ptrace::setregs(pid, registers);
            }
            Act::Tell(signal) => tell(signal),
            Act::TellAndLeave(signal) => {
                tell(signal);
                return true;
            }
        }
        let _ = ptrace::syscall(pid, None);
        false
    }
}

/// A child that has just been made.
fn let_go(child: Pid) {
    let _ = waitpid(child, Some(WaitPidFlag::__WALL));
    let _ = ptrace::detach(child, None);
}
