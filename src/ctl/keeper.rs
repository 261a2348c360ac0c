//! The command that `virtlockctl exec` runs, and all that it starts: a lock is given back, or its loss survived,
//! only when nothing of that is left which could write.
//!
//! Two processes see to it, of which each ends what is left should the other be killed. The outer one is the one
//! that was started: it passes signals on and says how the command ended. The inner one is the owner of the
//! locks and the command's parent, so a kill of the process that people see frees no lock before the inner one
//! is dead, and that is when everything else is. Orphans below come to them, so that what leaves its parents,
//! its session and its process group is still found.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};

use super::ask::Link;
use super::exit::{Exit, complain};
use crate::host::clone::{self, Ended, Heard, Which};
use crate::host::errno::Errno;
use crate::host::{descendants, process, signals};

/// What is to end has so long before it is killed: less than the 1.6 s after which the daemon kills the owner of
/// locks whose connection it has closed, so that everything else is dead by then.
const GRACE: Duration = Duration::from_secs(1);
/// What has been killed is looked after so often.
const AGAIN: Duration = Duration::from_millis(20);
/// What a command leaves behind may end as quickly as that, and then nothing is said of it.
const NOT_WORTH_A_WORD: Duration = Duration::from_millis(500);
/// A signal of the terminal, which all processes of its foreground have got (`SI_KERNEL`, sigaction(2)).
const OF_TERMINAL: i32 = 0x80;

/// The signals of one of the two processes.
#[derive(Debug)]
pub struct Post {
    signals: SignalFd,
    /// The outer process; of itself its parent.
    above: i32,
}

/// Which of the two this is.
#[derive(Debug)]
pub enum Part {
    /// The outer one, and its child.
    Outer(Post, i32),
    /// The inner one.
    Inner(Post),
}

/// One process becomes two.
///
/// # Errors
/// What the host refuses.
pub fn part() -> Result<Part, Errno> {
    signals::hear_of_children();
    let wanted = wanted();
    wanted.thread_block()?;
    let signals = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let outer = process::own_number();
    descendants::adopt_orphans()?;
    match clone::with_own_descriptors()? {
        Which::Original(inner) => {
            let above = clone::parent();
            Ok(Part::Outer(Post { signals, above }, inner))
        }
        Which::Copy => {
            process::set_started();
            descendants::adopt_orphans()?;
            // It wakes, and is nothing to act on: the parent is looked at.
            clone::follow_parent(Some(Signal::SIGCHLD))?;
            let above = outer;
            Ok(Part::Inner(Post { signals, above }))
        }
    }
}

/// The signals that are passed on, and the one of the children's ends. What is ignored stays so: nohup(1).
fn wanted() -> SigSet {
    let ignored = process::ignored_signals();
    let passed_on = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ];
    let mut wanted: SigSet = passed_on
        .into_iter()
        .filter(|signal| {
            let bit = (*signal as u32).saturating_sub(1);
            ignored & 1u64.wrapping_shl(bit) == 0
        })
        .collect();
    wanted.add(Signal::SIGCHLD);
    wanted
}

impl Post {
    /// The next signal but SIGCHLD, and whether it is the terminal's.
    fn next(&self) -> Option<(Signal, bool)> {
        while let Ok(Some(found)) = self.signals.read_signal() {
            match signal(&found) {
                Some(Signal::SIGCHLD) | None => (),
                Some(signal) => return Some((signal, found.ssi_code == OF_TERMINAL)),
            }
        }
        None
    }

    /// Why there is to be an end before there is a command: a signal, or the outer process is dead.
    pub fn end(&self) -> Option<Exit> {
        if self.is_alone() {
            return Some(Exit::Lost);
        }
        self.next().map(|(signal, _)| killed(signal as i32))
    }

    fn is_alone(&self) -> bool {
        clone::parent() != self.above
    }

    /// Waits for a signal, or for something on this connection, so long at most: for ever if that is `None`.
    /// Whether there is something on the connection.
    pub fn wait(&self, link: Option<&Link>, most: Option<Duration>) -> bool {
        let signals = PollFd::new(self.signals.as_fd(), PollFlags::POLLIN);
        let most = most.map_or(PollTimeout::NONE, |most| {
            // A wait of less than a millisecond would be none.
            let most = most.max(Duration::from_millis(1));
            PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX)
        });
        let mut watched = vec![signals];
        watched.extend(link.map(|link| PollFd::new(link.as_fd(), PollFlags::POLLIN)));
        let _ = poll(&mut watched, most);
        let of_link = watched.get(1).and_then(PollFd::revents);
        of_link.is_some_and(|it| !it.is_empty())
    }
}

fn signal(found: &siginfo) -> Option<Signal> {
    let number = i32::try_from(found.ssi_signo).ok()?;
    Signal::try_from(number).ok()
}

/// What the outer process does: passes signals on until the inner one ends, and ends what that left if it was
/// killed.
pub fn stand_by(post: &Post, inner: i32) -> Exit {
    let ended = loop {
        match clone::hear() {
            Heard::Ended(pid, ended) if pid == inner => break Some(ended),
            Heard::Ended(..) => continue,
            Heard::Nobody => break None,
            Heard::AllRun => (),
        }
        post.wait(None, None);
        while let Some((signal, is_of_terminal)) = post.next() {
            if !is_of_terminal {
                clone::signal(inner, signal);
            }
        }
    };
    if let Some(Ended::Status(code)) = ended {
        return Exit::Of(u8::try_from(code).unwrap_or(u8::MAX));
    }
    complain(
        "the process that had the locks was killed: they may be lost, and the command is ended",
    );
    loop {
        match clone::hear() {
            Heard::Ended(..) => continue,
            Heard::Nobody => return Exit::Lost,
            Heard::AllRun => (),
        }
        let _ = descendants::signal_all(Signal::SIGKILL);
        post.wait(None, Some(AGAIN));
        while post.next().is_some() {}
    }
}

/// What the inner process does from the command's start on: passes signals on, waits until nothing is left of
/// the command and of what it has started, and ends all that if the connection does or the outer process is
/// killed.
pub fn attend(command: i32, link: &Link, post: &Post) -> Exit {
    let mut end: Option<(Exit, Instant)> = None;
    let mut lost: Option<Instant> = None;
    let mut has_said = false;
    loop {
        match clone::hear() {
            Heard::Ended(pid, ended) => {
                if pid == command {
                    end = Some((of(ended), Instant::now()));
                }
                continue;
            }
            Heard::Nobody if lost.is_some() => return Exit::Lost,
            Heard::Nobody => return end.map_or(Exit::Lost, |(exit, _)| exit),
            Heard::AllRun => (),
        }
        let send = |signal: Signal| {
            if descendants::signal_all(signal).is_err() && end.is_none() {
                clone::signal(command, signal);
            }
        };
        if post.is_alone() || lost.is_some_and(|since| since.elapsed() >= GRACE) {
            send(Signal::SIGKILL);
        }
        let leaves = end.is_some_and(|(_, at)| at.elapsed() >= NOT_WORTH_A_WORD);
        if leaves && !has_said && lost.is_none() {
            complain(
                "the command has ended, but not all that it has started: the locks are kept until that has \
                 ended, too",
            );
            has_said = true;
        }
        let most = if post.is_alone() || lost.is_some() {
            Some(AGAIN)
        } else {
            (end.is_some() && !has_said).then_some(NOT_WORTH_A_WORD)
        };
        // Nothing is due on the connection but its end, which is there for ever.
        let is_over = post.wait(lost.is_none().then_some(link), most);
        while let Some((signal, is_of_terminal)) = post.next() {
            if !is_of_terminal {
                send(signal);
            }
        }
        if is_over {
            complain(
                "the daemon has closed the connection: the locks may be lost, and the command is ended",
            );
            send(Signal::SIGTERM);
            lost = Some(Instant::now());
        }
    }
}

/// The command's own end, as a shell says it.
fn of(ended: Ended) -> Exit {
    match ended {
        Ended::Status(code) => Exit::Of(u8::try_from(code).unwrap_or(u8::MAX)),
        Ended::Signal(signal) => killed(signal),
    }
}

fn killed(signal: i32) -> Exit {
    Exit::Of(u8::try_from(signal).unwrap_or(0).saturating_add(128))
}
