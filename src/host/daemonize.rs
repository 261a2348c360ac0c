//! The start in the background (`-d`): fork twice, and let the first process wait until the daemon
//! says that it serves, so that a script which comes back from `virtlockd -d` can connect at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};

use super::errno::Errno;
use super::process;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2, setsid};
use nix::{fcntl::OFlag, libc};

/// Which of the two processes this is after the fork.
#[derive(Debug)]
pub enum Background {
    /// The one that was started: it says how the start went and ends.
    Parent(Started),
    /// The daemon.
    Daemon(StatusPipe),
}

/// What the parent learns.
#[derive(Debug)]
pub enum Started {
    /// The daemon serves.
    Yes,
    /// The daemon could not start; the byte says why (see `exit::status_text`).
    No(u8),
    /// The daemon ended without a word.
    Unknown(io::Error),
}

/// The daemon's end of the pipe to the parent.
#[derive(Debug)]
pub struct StatusPipe(File);

impl StatusPipe {
    /// Tells the parent how the start went: 0, or an exit code. A parent that is gone is no error.
    pub fn report(mut self, status: u8) {
        if let Err(error) = self.0.write_all(&[status]) {
            tracing::debug!("nobody waits for the result of the start: {error}");
        }
    }
}

/// Puts the daemon into the background: in its own session, without a terminal, child of init, with
/// `/dev/null` for standard input, output and error. The working directory is the caller's business.
///
/// Must be called while the process has a single thread. An error is the parent's: no daemon runs.
pub fn into_background() -> io::Result<Background> {
    let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).map_err(Errno::from)?;
    // SAFETY: the process has a single thread, so the child finds every lock of the C library and of
    // the allocator free.
    match unsafe { fork() }.map_err(Errno::from)? {
        ForkResult::Parent { child } => {
            drop(write_end);
            Ok(Background::Parent(wait_for_status(
                child,
                File::from(read_end),
            )?))
        }
        ForkResult::Child => {
            drop(read_end);
            match become_daemon() {
                Ok(()) => Ok(Background::Daemon(StatusPipe(File::from(write_end)))),
                // The parent reads the reason from the exit status alone.
                Err(_) => exit_child(libc::EXIT_FAILURE),
            }
        }
    }
}

/// What the first child does: returns in the grandchild only.
fn become_daemon() -> io::Result<()> {
    let nothing = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&nothing).map_err(Errno::from)?;
    nix::unistd::dup2_stdout(&nothing).map_err(Errno::from)?;
    nix::unistd::dup2_stderr(&nothing).map_err(Errno::from)?;
    // A session of its own, and then a process that does not lead it and so can never get a
    // terminal back.
    setsid().map_err(Errno::from)?;
    // SAFETY: a process just forked has a single thread.
    match unsafe { fork() }.map_err(Errno::from)? {
        ForkResult::Parent { .. } => exit_child(libc::EXIT_SUCCESS),
        ForkResult::Child => {
            process::set_started();
            Ok(())
        }
    }
}

/// Ends a forked process without running the exit handlers of the program it was copied from.
fn exit_child(status: i32) -> ! {
    // SAFETY: _exit(2) only ends the process.
    unsafe { libc::_exit(status) }
}

fn wait_for_status(child: Pid, mut read_end: File) -> io::Result<Started> {
    let status = loop {
        match waitpid(child, None).map_err(Errno::from) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    if status != WaitStatus::Exited(child, 0) {
        return Err(io::Error::other(
            "the first child could not put the daemon into the background",
        ));
    }
    let mut byte = [0];
    Ok(match read_end.read_exact(&mut byte) {
        Ok(()) if byte == [0] => Started::Yes,
        Ok(()) => Started::No(byte[0]),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Started::Unknown(io::Error::other("it ended before it served"))
        }
        Err(error) => Started::Unknown(error),
    })
}
