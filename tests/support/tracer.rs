//! A process that is looked at from outside, call by call or instruction by instruction (ptrace(2)), to be
//! killed at a place of one's choice. All of it is done by the thread that seized the process.

use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::DEADLINE;

/// What a process that was let go on did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It enters or leaves a system call, or made the step that was asked for.
    Stopped,
    /// It made a child, which is stopped, and traced from now on.
    Child(i32),
    /// It is gone.
    Gone,
}

/// A process that is traced.
#[derive(Debug)]
pub struct Tracer {
    pid: Pid,
}

impl Tracer {
    /// Seizes a process, which is stopped when this returns; with `children`, those that it makes are
    /// seized, too. `None` if it is gone.
    pub fn seize(pid: i32, children: bool) -> Option<Tracer> {
        let pid = Pid::from_raw(pid);
        let mut options = Options::PTRACE_O_TRACESYSGOOD;
        if children {
            options |= Options::PTRACE_O_TRACEFORK | Options::PTRACE_O_TRACECLONE;
        }
        ptrace::seize(pid, options).ok()?;
        ptrace::interrupt(pid).ok()?;
        let tracer = Tracer { pid };
        (tracer.wait() != Seen::Gone).then_some(tracer)
    }

    /// A child of a traced process that [`Seen::Child`] told of, once it has stopped.
    pub fn child(pid: i32) -> Option<Tracer> {
        let tracer = Tracer {
            pid: Pid::from_raw(pid),
        };
        (tracer.wait() != Seen::Gone).then_some(tracer)
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits until it is stopped; signals are passed on.
    fn wait(&self) -> Seen {
        let end = Instant::now() + DEADLINE;
        let mut pauses = 0u32;
        loop {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::StillAlive) => {
                    pauses += 1;
                    if pauses < 1000 {
                        std::thread::yield_now();
                    } else {
                        assert!(Instant::now() < end, "process {} does not stop", self.pid);
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
                Ok(WaitStatus::PtraceEvent(_, _, event))
                    if event == libc::PTRACE_EVENT_FORK || event == libc::PTRACE_EVENT_CLONE =>
                {
                    let child = ptrace::getevent(self.pid).unwrap_or(0);
                    return Seen::Child(i32::try_from(child).expect("a pid"));
                }
                Ok(WaitStatus::Stopped(_, signal)) if signal != Signal::SIGTRAP => {
                    if ptrace::cont(self.pid, signal).is_err() {
                        return Seen::Gone;
                    }
                }
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(_) => {
                    return Seen::Gone;
                }
                Ok(_) => return Seen::Stopped,
            }
        }
    }

    /// Lets it go on to the next system call, or to the end of the one that it is in.
    pub fn to_next_call(&self) -> Seen {
        match ptrace::syscall(self.pid, None) {
            Ok(()) => self.wait(),
            Err(_) => Seen::Gone,
        }
    }

    /// Lets it go on to what it does next that is told: a child, or its end.
    pub fn run(&self) -> Seen {
        match ptrace::cont(self.pid, None) {
            Ok(()) => self.wait(),
            Err(_) => Seen::Gone,
        }
    }

    /// One instruction, which is no system call that may take its time.
    pub fn step(&self) -> Seen {
        if ptrace::step(self.pid, None).is_err() {
            return Seen::Gone;
        }
        match waitpid(self.pid, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP)) => Seen::Stopped,
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(_) => Seen::Gone,
            // A signal came: the step is not made yet.
            Ok(WaitStatus::Stopped(_, signal)) => match ptrace::step(self.pid, signal) {
                Ok(()) => self.wait(),
                Err(_) => Seen::Gone,
            },
            Ok(_) => self.step(),
        }
    }

    /// The system call that it is in, and what it has returned (-ENOSYS at its beginning).
    pub fn call(&self) -> Option<(u64, i64)> {
        let registers = ptrace::getregs(self.pid).ok()?;
        Some((registers.orig_rax, registers.rax.cast_signed()))
    }

    /// The system call that its next instruction makes, if that is one.
    pub fn next_call(&self) -> Option<u64> {
        let registers = ptrace::getregs(self.pid).ok()?;
        let at = registers.rip as *mut libc::c_void;
        let bytes = ptrace::read(self.pid, at).ok()?.to_le_bytes();
        bytes.starts_with(&[0x0f, 0x05]).then_some(registers.rax)
    }

    /// Kills it and waits for its end.
    pub fn kill(self) {
        let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
        while self.wait() != Seen::Gone {}
    }

    /// Lets it go.
    pub fn release(self) {
        let _ = ptrace::detach(self.pid, None);
    }
}
