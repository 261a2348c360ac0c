//! A process that does for this one what may hang for as long as a share does not answer: one job after the
//! other, each asked for and answered by a message over a pair of sockets. A job may have a file with it, and its
//! answer another one.
//!
//! It is a copy of this process that has given up all that this one has: no descriptor of a client, of another
//! disk or of the ledger stays open in it, and nothing stays mapped that others share. It is never waited for.
//! Whoever has the other end may be gone when it has done its job: then it undoes what it did, and ends.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::apart::{self, Apart};
use super::clone;
use super::errno::Errno;
use super::passing::{self, Message};
use super::scribe::give_up_shared_memory;

/// The process's name, at most 15 characters.
pub const NAME: &[u8] = b"virtlockd-share";

/// The longest message, bytes: two paths of the longest kind, and what is said with them.
pub const LONGEST: usize = 64 * 1024;

/// What became of a job.
#[derive(Debug)]
pub struct Done {
    /// The answer.
    pub bytes: Vec<u8>,
    /// A file that goes with it.
    pub file: Option<OwnedFd>,
    /// How it is undone should nobody get the answer. It has the file.
    pub undo: Option<Undo>,
}

/// How a job is undone whose answer nobody got.
pub type Undo = fn(job: &[u8], answer: &[u8], file: OwnedFd);

/// Does a job.
pub type Work = fn(job: &[u8], file: Option<OwnedFd>) -> Done;

/// As long as this is there, the process is, unless it ended by itself. Dropped, it ends the process when that has
/// done what it is at.
#[derive(Debug)]
pub struct Helper {
    socket: OwnedFd,
    pid: i32,
}

impl Helper {
    /// Starts a process that does `work` for each message.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn start(work: Work) -> Result<Helper, Errno> {
        match apart::copy()? {
            Apart::Original(pid, socket) => Ok(Helper { socket, pid }),
            Apart::Copy => {
                let _ = live(work);
                clone::leave(0)
            }
        }
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Gives it a job, with a file perhaps, of which it gets a copy.
    ///
    /// # Errors
    /// EPIPE if it is over, EMSGSIZE if the job is too long; others if the host refuses to pass it on now.
    pub fn ask(&self, job: &[u8], file: Option<RawFd>) -> Result<(), Errno> {
        if job.len() > LONGEST {
            return Err(Errno::EMSGSIZE);
        }
        passing::send(self.socket.as_raw_fd(), job, file.as_slice())
    }

    /// The answer to its job, if that is there, with its bytes in the buffer.
    ///
    /// # Errors
    /// EPIPE if it is over, and there is none.
    pub fn answer(&self, buffer: &mut [u8]) -> Result<Option<Message>, Errno> {
        match passing::receive(self.socket.as_raw_fd(), buffer) {
            Ok(message) if message.length == 0 => Err(Errno::EPIPE),
            Ok(message) => Ok(Some(message)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(Errno::ECONNRESET) => Err(Errno::EPIPE),
            Err(reason) => Err(reason),
        }
    }
}

impl AsRawFd for Helper {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The copy's life.
fn live(work: Work) -> Result<(), Errno> {
    // A name of its own in a list of processes. Where it cannot be had it does without.
    let name = CString::new(NAME).unwrap_or_default();
    let _ = nix::sys::prctl::set_name(&name);
    clone::end_at_once_on_panic();
    // Whatever ends with the daemon does not end this: it undoes what it did, first.
    clone::follow_parent(None)?;
    give_up_shared_memory()?;
    let socket = libc::STDIN_FILENO;
    let mut buffer = vec![0; LONGEST];
    let mut last: Option<(Vec<u8>, Done)> = None;
    loop {
        let message = match passing::receive(socket, &mut buffer) {
            Err(Errno::EINTR) => continue,
            // Nobody read the last answer.
            Err(Errno::ECONNRESET) => {
                undo(last);
                return Ok(());
            }
            message => message?,
        };
        // Whoever asks for more, or has nothing more to ask, has read the last answer. Its file is closed here, and
        // stays as it is there.
        drop(last.take());
        if message.length == 0 {
            return Ok(());
        }
        let job = buffer.get(..message.length).unwrap_or_default().to_vec();
        let done = work(&job, message.descriptors.into_iter().next());
        let file = done.file.as_ref().map(AsRawFd::as_raw_fd);
        match answer(socket, &done.bytes, file) {
            Ok(()) => last = Some((job, done)),
            Err(_) => {
                undo(Some((job, done)));
                return Ok(());
            }
        }
    }
}

fn answer(socket: RawFd, bytes: &[u8], file: Option<RawFd>) -> Result<(), Errno> {
    loop {
        match passing::send(socket, bytes, file.as_slice()) {
            // There is always room for one answer; there may be no memory for it now.
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR) => {
                clone::pause(std::time::Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

fn undo(last: Option<(Vec<u8>, Done)>) {
    if let Some((
        job,
        Done {
            bytes,
            file: Some(file),
            undo: Some(undo),
        },
    )) = last
    {
        undo(&job, &bytes, file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Duration;

    /// Answers with the job, and with an end of a pipe into which "undone" is written if nobody gets it.
    fn echo(job: &[u8], file: Option<OwnedFd>) -> Done {
        Done {
            bytes: job.to_vec(),
            file,
            undo: Some(|_, _, file| {
                let _ = std::fs::File::from(file).write_all(b"undone");
            }),
        }
    }

    fn answer_of(helper: &Helper) -> Message {
        let mut buffer = [0; 64];
        for _ in 0..1000 {
            if let Some(message) = helper.answer(&mut buffer).unwrap() {
                return message;
            }
            clone::pause(Duration::from_millis(5));
        }
        panic!("no answer");
    }

    // One after the other: a copy has the place of standard input for a moment.
    #[test]
    #[cfg_attr(miri, ignore = "it makes processes")]
    fn what_nobody_got_is_undone_and_what_somebody_got_stays_and_one_that_is_over_says_so() {
        one_that_is_over_says_so();
        for is_read in [true, false] {
            let (mut reads, writes) = std::io::pipe().unwrap();
            let helper = Helper::start(echo).unwrap();
            helper.ask(b"job", Some(writes.as_raw_fd())).unwrap();
            if is_read {
                let message = answer_of(&helper);
                assert_eq!((message.length, message.descriptors.len()), (3, 1));
            } else {
                while !passing::has_message(&helper.socket) {
                    clone::pause(Duration::from_millis(5));
                }
            }
            drop(writes);
            let pid = helper.pid();
            drop(helper);
            let mut said = String::new();
            reads.read_to_string(&mut said).unwrap();
            assert_eq!(said, if is_read { "" } else { "undone" });
            clone::wait_for_end(pid);
        }
    }

    fn one_that_is_over_says_so() {
        let helper = Helper::start(|_, _| clone::leave(1)).unwrap();
        helper.ask(b"job", None).unwrap();
        clone::wait_for_end(helper.pid());
        assert!(matches!(helper.answer(&mut [0; 8]), Err(Errno::EPIPE)));
    }
}
