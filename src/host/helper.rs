//! A process that does for this one what may hang for as long as a share does not answer: one job after the
//! other, each asked for and answered by a message over a pair of sockets. A job may have a file with it, and its
//! answer another one.
//!
//! It is this program once more, with nothing of what this process has: no descriptor but its socket and standard
//! output and error, and none of its memory. It is never waited for. Whoever has the other end may be gone when
//! it has done its job: then it undoes what it did, and ends.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::apart::{self, Files};
use super::clone;
use super::errno::Errno;
use super::passing::{self, Message};
use super::privileges;

/// Set in a program that is a helper, and nothing else.
pub const VARIABLE: &str = "VIRTLOCKD_HELPER";

/// The process's name, at most 15 characters.
pub const NAME: &[u8] = b"virtlockd-share";

/// The longest message, bytes: two paths of the longest kind, and what is said with them.
pub const LONGEST: usize = 64 * 1024;

/// A message that says that the last answer has arrived. No job is so short.
const ARRIVED: &[u8] = b"k";
/// A message that says that its file has not, for want of room.
const LOST: &[u8] = b"l";

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

/// As long as this is there, the process is, unless it ended by itself.
#[derive(Debug)]
pub struct Helper {
    socket: OwnedFd,
    program: apart::Program,
}

/// One that is told nothing any more, and ends when it has done what it is at.
#[derive(Debug)]
pub struct Dismissed(i32);

impl Dismissed {
    /// Whether it is not over yet. If it is, it is forgotten.
    pub fn is_there(&self) -> bool {
        clone::is_child(self.0)
    }
}

impl Helper {
    /// Starts one.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn start() -> Result<Helper, Errno> {
        let (ours, theirs) = passing::pair()?;
        let files = Files {
            standard: [theirs.as_raw_fd(), libc::STDOUT_FILENO, libc::STDERR_FILENO],
            other: None,
        };
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno::EINVAL);
        let variable = text(&[VARIABLE.as_bytes(), b"=1"].concat())?;
        // Also if another program has the name of this one by now.
        let program = text(b"/proc/self/exe")?;
        let program = apart::start(&program, &[text(NAME)?], &[variable], &files)?;
        Ok(Helper {
            socket: ours,
            program,
        })
    }

    /// It is needed no more.
    pub fn dismiss(self) -> Dismissed {
        Dismissed(self.program.pid())
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

    /// The answer to its job, if that is there, with its bytes in the buffer. From then on nothing of it is undone.
    ///
    /// # Errors
    /// EPIPE if it is over, and there is none.
    pub fn answer(&self, buffer: &mut [u8]) -> Result<Option<Message>, Errno> {
        match passing::receive(self.socket.as_raw_fd(), buffer) {
            Ok(message) if message.length == 0 => Err(Errno::EPIPE),
            Ok(message) => {
                // It closes what it has open for it, or undoes it. The next job tells it that it has arrived, too.
                let word = if message.is_cut { LOST } else { ARRIVED };
                let _ = passing::send(self.socket.as_raw_fd(), word, &[]);
                Ok(Some(message))
            }
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

/// The life of a helper: `work` is done for each message that comes in over standard input.
///
/// # Errors
/// What the host refuses it. It has undone what nobody got the answer to.
pub fn serve(work: Work) -> Result<(), Errno> {
    let name = CString::new(NAME).unwrap_or_default();
    // A name of its own in a list of processes. Where it cannot be had it does without.
    let _ = nix::sys::prctl::set_name(&name);
    // Where that is refused it may do more than it needs.
    let _ = privileges::keep_those_of_files();
    serve_at(libc::STDIN_FILENO, work)
}

fn serve_at(socket: RawFd, work: Work) -> Result<(), Errno> {
    // SAFETY: F_SETFL takes an integer and touches no memory of ours. The other end does not wait for all that.
    Errno::result(unsafe { libc::fcntl(socket, libc::F_SETFL, 0) })?;
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
        let last_one = last.take();
        if buffer.get(..message.length) == Some(LOST) {
            undo(last_one);
            continue;
        }
        drop(last_one);
        let job = match buffer.get(..message.length) {
            None | Some([]) => return Ok(()),
            Some(ARRIVED) => continue,
            Some(job) => job.to_vec(),
        };
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
    use crate::host::clone::Which;
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

    #[test]
    #[cfg_attr(miri, ignore = "it makes processes")]
    fn what_nobody_got_is_undone_and_what_somebody_got_stays() {
        for is_read in [true, false] {
            let (mut reads, writes) = std::io::pipe().unwrap();
            let (ours, theirs) = passing::pair().unwrap();
            let pid = match clone::with_own_descriptors().unwrap() {
                Which::Copy => {
                    drop((ours, writes));
                    let _ = serve_at(theirs.as_raw_fd(), echo);
                    clone::leave(0)
                }
                Which::Original(pid) => pid,
            };
            drop(theirs);
            let end = writes.as_raw_fd();
            passing::send(ours.as_raw_fd(), b"job", &[end]).unwrap();
            drop(writes);
            while !passing::has_message(&ours) {
                clone::pause(Duration::from_millis(5));
            }
            if is_read {
                let message = passing::receive(ours.as_raw_fd(), &mut [0; 64]).unwrap();
                assert_eq!((message.length, message.descriptors.len()), (3, 1));
            }
            drop(ours);
            let mut said = String::new();
            reads.read_to_string(&mut said).unwrap();
            assert_eq!(said, if is_read { "" } else { "undone" });
            clone::wait_for_end(pid);
        }
    }
}
