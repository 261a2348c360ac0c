//! A copy of this process that has none of its files open. To close a file asks its server, if it is on a share,
//! and a copy that has to close one would hang for as long as that does not answer: so it never has them. It is
//! made with the same table of descriptors, and takes one of its own from it with the first three alone
//! (close_range(2), CLOSE_RANGE_UNSHARE). Its way to this process is in the place of standard input for that
//! moment.
//!
//! The kernel copies the numbers of a whole word of its bits (`dup_fd` in fs/file.c), and closes those again that are
//! too many: files that may hang are to have no such number, for which others take their places ([`Fillers`]).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::clone::{self, Which};
use super::errno::Errno;
use super::passing;

/// How often it is looked whether a copy lives that has no table of its own yet, and how long it is waited in between,
/// milliseconds. It takes a tenth of one.
const READY_LOOKS: u32 = 400;
const READY_LOOK_MS: u16 = 5;
/// How long it may take to become another program, milliseconds.
const STARTED_MS: u16 = 5_000;

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Apart {
    /// The copy. Standard input is its way to the other one: a message is received there, and does wait.
    Copy,
    /// The one that was copied: the copy's number, and the way to it, which does not wait.
    Original(i32, OwnedFd),
}

/// Makes such a copy.
///
/// # Errors
/// What the host refuses.
pub fn copy() -> Result<Apart, Errno> {
    let (ours, theirs) = passing::pair()?;
    // SAFETY: only copies a descriptor; the copy's number is nobody else's.
    let saved = unsafe { libc::fcntl(libc::STDIN_FILENO, libc::F_DUPFD_CLOEXEC, 3) };
    let saved = match Errno::result(saved) {
        Ok(saved) => Some(saved),
        // There is none.
        Err(Errno::EBADF) => None,
        Err(reason) => return Err(reason),
    };
    // SAFETY: nobody here reads standard input; it is put back below.
    let put = unsafe { libc::dup2(theirs.as_raw_fd(), libc::STDIN_FILENO) };
    let made = Errno::result(put).and_then(|_| clone::sharing_descriptors());
    if made == Ok(Which::Copy) {
        if take_own_table().is_err() || say_ready().is_err() {
            clone::leave(1);
        }
        // What it owned here is not open in its table.
        std::mem::forget((ours, theirs));
        return Ok(Apart::Copy);
    }
    let ready = made.and_then(|made| {
        let Which::Original(pid) = made else {
            return Err(Errno::EINVAL);
        };
        let ready = wait_until_ready(&ours, pid)
            .and_then(|()| passing::receive(ours.as_raw_fd(), &mut [0; 8]));
        if let Err(reason) = ready {
            // It is of no use, whatever it hangs in.
            clone::signal(pid, nix::sys::signal::Signal::SIGKILL);
            let _ = clone::raw_end(pid);
            return Err(reason);
        }
        Ok(pid)
    });
    match saved {
        Some(saved) => {
            // SAFETY: as above; the copy of it is this function's own, and is closed once.
            unsafe {
                libc::dup2(saved, libc::STDIN_FILENO);
                libc::close(saved);
            }
        }
        // SAFETY: it was not open before.
        None => _ = unsafe { libc::close(libc::STDIN_FILENO) },
    }
    Ok(Apart::Original(ready?, ours))
}

/// In the copy.
fn take_own_table() -> Result<(), Errno> {
    let first = libc::STDERR_FILENO.cast_unsigned().saturating_add(1);
    // <linux/close_range.h>
    const CLOSE_RANGE_UNSHARE: u32 = 2;
    let close = |flags: u32| {
        // SAFETY: with its own table, this copy closes nothing that it would use: it goes on with the first three.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
        Errno::result(result).map(drop)
    };
    match close(CLOSE_RANGE_UNSHARE) {
        Ok(()) => Ok(()),
        Err(_) => {
            // SAFETY: from here on the table is this copy's own.
            Errno::result(unsafe { libc::unshare(libc::CLONE_FILES) })?;
            close(0).or_else(|_| {
                for number in super::descriptors::open_numbers() {
                    if number > libc::STDERR_FILENO {
                        drop(super::descriptors::adopt(number));
                    }
                }
                Ok(())
            })
        }
    }
}

fn say_ready() -> Result<(), Errno> {
    // SAFETY: F_SETFL takes an integer and touches no memory of ours. The other end does not wait for all that.
    Errno::result(unsafe { libc::fcntl(libc::STDIN_FILENO, libc::F_SETFL, 0) })?;
    passing::send(libc::STDIN_FILENO, b"r", &[])
}

/// Waits until the copy has its own table. It may die of something before.
fn wait_until_ready(way: &OwnedFd, pid: i32) -> Result<(), Errno> {
    for _ in 0..READY_LOOKS {
        match wait(way, READY_LOOK_MS) {
            Err(Errno::ETIMEDOUT | Errno::EINTR) if clone::is_child(pid) => (),
            Err(Errno::ETIMEDOUT | Errno::EINTR) => return Err(Errno::ESRCH),
            result => return result,
        }
    }
    Err(Errno::ETIMEDOUT)
}

/// Waits until there is something to be received.
fn wait(socket: &OwnedFd, longest_ms: u16) -> Result<(), Errno> {
    let mut asked = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match poll(&mut asked, PollTimeout::from(longest_ms)).map_err(Errno::from) {
        Ok(0) => Err(Errno::ETIMEDOUT),
        Ok(_) => Ok(()),
        Err(reason) => Err(reason),
    }
}

/// A program that was started.
#[derive(Debug)]
pub struct Program {
    pid: i32,
}

/// What a program has open: in the places of standard input, output and error, and one more.
#[derive(Debug)]
pub struct Files {
    /// Standard input, output and error.
    pub standard: [RawFd; 3],
    /// Open under any number.
    pub other: Option<RawFd>,
}

/// Starts a program in a process group of its own, with these files open and no others. It has begun when this
/// returns.
///
/// # Errors
/// Why it has not.
pub fn start(
    path: &CString,
    words: &[CString],
    environment: &[CString],
    files: &Files,
) -> Result<Program, Errno> {
    let (program, way) = begin_to_start(path, words, environment, files)?;
    let answer = wait(&way, STARTED_MS).and_then(|()| {
        let mut number = [0; 4];
        let message = passing::receive(way.as_raw_fd(), &mut number)?;
        Ok((message.length > 0).then(|| i32::from_ne_bytes(number)))
    });
    let reason = match answer {
        Ok(None) => return Ok(program),
        Ok(Some(number)) => Errno::from_raw(number),
        Err(reason) => reason,
    };
    program.end();
    Err(reason)
}

/// The same, and does not wait until it has begun: a moment that somebody else may need. Should it not begin, what
/// it was given is closed.
///
/// # Errors
/// Why it will not.
pub fn start_soon(
    path: &CString,
    words: &[CString],
    environment: &[CString],
    files: &Files,
) -> Result<Program, Errno> {
    let (program, _) = begin_to_start(path, words, environment, files)?;
    Ok(program)
}

fn begin_to_start(
    path: &CString,
    words: &[CString],
    environment: &[CString],
    files: &Files,
) -> Result<(Program, OwnedFd), Errno> {
    match copy()? {
        Apart::Copy => {
            let reason = become_program(path, words, environment);
            // Its number is in nobody's way: the first three are taken.
            let _ = passing::send(WAY_BACK, &reason.number().to_ne_bytes(), &[]);
            clone::leave(127)
        }
        Apart::Original(pid, way) => {
            let program = Program { pid };
            let given: Vec<RawFd> = files.standard.into_iter().chain(files.other).collect();
            match passing::send(way.as_raw_fd(), b"f", &given) {
                Ok(()) => Ok((program, way)),
                Err(reason) => {
                    program.end();
                    Err(reason)
                }
            }
        }
    }
}

/// Where the copy has its way to the original while it becomes another program: closed with that.
const WAY_BACK: RawFd = 9;

/// In the copy. Comes back only with the reason why it is none.
fn become_program(path: &CString, words: &[CString], environment: &[CString]) -> Errno {
    let become_it = || -> Result<(), Errno> {
        let message = passing::receive(libc::STDIN_FILENO, &mut [0; 8])?;
        // SAFETY: this copy has the first three, and what came; these calls take numbers alone.
        unsafe {
            Errno::result(libc::dup3(libc::STDIN_FILENO, WAY_BACK, libc::O_CLOEXEC))?;
            for (place, file) in message.descriptors.iter().take(3).enumerate() {
                let place = i32::try_from(place).map_err(|_| Errno::EINVAL)?;
                Errno::result(libc::dup2(file.as_raw_fd(), place))?;
            }
        }
        if let Some(other) = message.descriptors.get(3) {
            super::descriptors::keep_on_exec(other.as_raw_fd(), true)?;
        }
        std::mem::forget(message);
        nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?;
        clone::follow_parent(None)?;
        let none = nix::sys::signal::SigSet::empty();
        none.thread_set_mask()?;
        // SAFETY: the default takes no function of ours.
        unsafe {
            nix::sys::signal::signal(
                nix::sys::signal::Signal::SIGPIPE,
                nix::sys::signal::SigHandler::SigDfl,
            )?;
        }
        let Err(reason) = nix::unistd::execve(path, words, environment);
        Err(reason.into())
    };
    become_it().err().unwrap_or(Errno::EIO)
}

impl Program {
    /// The number of its process, and of its group.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How it ended, if it has; it is forgotten with that.
    pub fn ended(&self) -> Option<ExitStatus> {
        clone::raw_end(self.pid).map(ExitStatus::from_raw)
    }

    /// Kills it.
    pub fn kill(&self) {
        clone::signal(self.pid, nix::sys::signal::Signal::SIGKILL);
    }

    fn end(&self) {
        self.kill();
        let _ = self.ended();
    }
}

/// Two ends of a pipe: what is written into the second is read from the first. Both are closed on exec.
///
/// # Errors
/// What the host refuses.
pub fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// The first number that the kernel does not copy with those of the first three.
const FIRST_NOT_COPIED: RawFd = 64;

/// What takes the places of low numbers.
#[derive(Debug, Default)]
pub struct Fillers(Vec<OwnedFd>);

impl Fillers {
    /// What is opened next gets a number that no copy gets, unless the host refuses so many.
    pub fn fill(&mut self) {
        if self.0.is_empty() {
            let Ok((one, _)) = passing::pair() else {
                return;
            };
            self.0.push(one);
        }
        let Some(first) = self.0.first().map(AsRawFd::as_raw_fd) else {
            return;
        };
        loop {
            // SAFETY: only copies a descriptor; the copy's number is nobody else's.
            let number = unsafe { libc::fcntl(first, libc::F_DUPFD_CLOEXEC, 3) };
            let Ok(number) = Errno::result(number) else {
                return;
            };
            // SAFETY: as above.
            let filler = unsafe { OwnedFd::from_raw_fd(number) };
            if number >= FIRST_NOT_COPIED {
                return;
            }
            self.0.push(filler);
        }
    }
}
