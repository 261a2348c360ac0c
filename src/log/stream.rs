//! Bytes to stderr or to a file, never waiting for whoever reads them. What cannot be written now
//! is refused as a whole line; a line that went out in part is finished before the next one.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::host::clone;
use crate::host::descriptors;
use crate::host::errno::Errno;

/// What a pipe takes at once when poll(2) says that it can be written to (PIPE_BUF).
const POLLED_WRITE_BYTES: usize = 4096;

/// How bytes get out without waiting.
#[derive(Debug)]
enum Channel {
    /// Our own opening of the file, with O_NONBLOCK.
    Own(OwnedFd),
    /// A regular file that somebody else opened. It never makes us wait, and its offset is shared
    /// with others who write to it, so it must not be opened again.
    SharedFile(BorrowedFd<'static>),
    /// A socket: each send says that it does not wait.
    Socket(BorrowedFd<'static>),
    /// Something that could not be opened again. O_NONBLOCK would change it for everybody who
    /// shares it, so poll(2) is asked before each small write.
    Polled(BorrowedFd<'static>),
    /// A FIFO that nobody reads yet; it is opened when somebody does.
    Unread(PathBuf),
    /// Standard error is something else: nothing is written.
    Nowhere,
}

/// Descriptor 2 is a client's socket or a guest's disk.
static STDERR_IS_NOT_OURS: AtomicBool = AtomicBool::new(false);

/// From now on nothing is written to descriptor 2, not even when this program panics.
pub fn stderr_is_not_ours() {
    STDERR_IS_NOT_OURS.store(true, Ordering::Relaxed);
    clone::say_nothing_on_panic();
}

/// An open stream of lines.
#[derive(Debug)]
pub struct Stream {
    channel: Channel,
    /// The rest of a line that went out in part; never more than one line.
    rest: Vec<u8>,
}

impl Stream {
    /// Descriptor 2 as it is now.
    pub fn stderr() -> Stream {
        if STDERR_IS_NOT_OURS.load(Ordering::Relaxed) {
            return Stream {
                channel: Channel::Nowhere,
                rest: Vec::new(),
            };
        }
        Stream::over(descriptors::stderr())
    }

    /// A descriptor that others share.
    fn over(descriptor: BorrowedFd<'static>) -> Stream {
        let kind = fstat(descriptor).map_or(SFlag::empty(), |status| {
            SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
        });
        let channel = if kind == SFlag::S_IFREG {
            Channel::SharedFile(descriptor)
        } else if kind == SFlag::S_IFSOCK {
            Channel::Socket(descriptor)
        } else {
            let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
            let flags = OFlag::O_WRONLY
                | OFlag::O_APPEND
                | OFlag::O_NONBLOCK
                | OFlag::O_NOCTTY
                | OFlag::O_CLOEXEC;
            open(path.as_str(), flags, Mode::empty())
                .map_or(Channel::Polled(descriptor), Channel::Own)
        };
        Stream {
            channel,
            rest: Vec::new(),
        }
    }

    /// A file to append to, made with mode 0600 if it is missing. A FIFO that nobody reads is no
    /// error: it is tried again at each line.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn file(path: &Path) -> io::Result<Stream> {
        let channel = match open_file(path) {
            Ok(file) => Channel::Own(file),
            Err(error) if is_unread_fifo(path, &error) => Channel::Unread(path.to_owned()),
            Err(error) => return Err(error),
        };
        Ok(Stream {
            channel,
            rest: Vec::new(),
        })
    }

    /// Takes the rest of the line that `old` has written in part to the same file.
    pub fn finish_line_of(&mut self, old: &mut Stream) {
        self.rest = std::mem::take(&mut old.rest);
    }

    /// Whether the line was taken. A line of which a part went out counts as taken: its rest is
    /// written first at the next call.
    pub fn write_line(&mut self, line: &[u8]) -> bool {
        if let Channel::Unread(path) = &self.channel {
            match open_file(path) {
                Ok(file) => self.channel = Channel::Own(file),
                Err(_) => return false,
            }
        }
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() {
            match self.write(&rest) {
                Ok([]) => {}
                Ok(unwritten) => {
                    self.rest = unwritten.to_vec();
                    return false;
                }
                // Nobody reads any more: a later reader must not get the tail of a line.
                Err(Errno::EPIPE) => return false,
                Err(_) => {
                    self.rest = rest;
                    return false;
                }
            }
        }
        match self.write(line) {
            Ok(unwritten) => {
                self.rest = unwritten.to_vec();
                true
            }
            Err(_) => false,
        }
    }

    /// Writes as much as goes without waiting and gives back what is left; an error only if
    /// nothing was written.
    fn write<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], Errno> {
        let mut left = bytes;
        while !left.is_empty() {
            match self.write_some(left) {
                Ok(0) => return Ok(left),
                Ok(written) => left = left.get(written..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(errno) if left.len() == bytes.len() => return Err(errno),
                Err(_) => return Ok(left),
            }
        }
        Ok(left)
    }

    fn write_some(&self, bytes: &[u8]) -> Result<usize, Errno> {
        Ok(match &self.channel {
            Channel::Own(file) => nix::unistd::write(file, bytes)?,
            Channel::SharedFile(file) => nix::unistd::write(file, bytes)?,
            Channel::Socket(socket) => send(
                socket.as_raw_fd(),
                bytes,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            )?,
            Channel::Polled(descriptor) => {
                let mut polled = [PollFd::new(descriptor.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut polled, PollTimeout::ZERO)? == 0 {
                    return Err(Errno::EAGAIN);
                }
                let some = bytes.get(..POLLED_WRITE_BYTES).unwrap_or(bytes);
                nix::unistd::write(descriptor, some)?
            }
            Channel::Unread(_) | Channel::Nowhere => return Err(Errno::ENXIO),
        })
    }
}

fn open_file(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(path)?;
    Ok(file.into())
}

/// open(2) says ENXIO for a socket too, and that one will never get a reader.
fn is_unread_fifo(path: &Path, error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENXIO)
        && std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

#[cfg(test)]
mod tests {
    use super::super::test_directory::TestDirectory;
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    fn shared(descriptor: impl Into<OwnedFd>) -> Stream {
        let kept: &'static OwnedFd = Box::leak(Box::new(descriptor.into()));
        Stream::over(kept.as_fd())
    }

    fn fill(stream: &mut Stream, line: &[u8]) -> usize {
        let mut taken = 0;
        while stream.write_line(line) {
            taken += 1;
            assert!(taken < 100_000, "the stream takes everything");
        }
        taken
    }

    #[test]
    fn a_log_file_is_appended_to_and_only_its_owner_may_read_it() {
        let directory = TestDirectory::new();
        let path = directory.join("log");
        for line in ["one\n", "two\n"] {
            assert!(
                Stream::file(&path)
                    .expect("open")
                    .write_line(line.as_bytes())
            );
        }
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "one\ntwo\n");
        let mode = std::fs::metadata(&path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_removed_log_file_is_written_on() {
        let directory = TestDirectory::new();
        let path = directory.join("log");
        let mut stream = Stream::file(&path).expect("open");
        std::fs::remove_file(&path).expect("remove");
        assert!(stream.write_line(b"x\n"));
        assert!(!path.exists());
    }

    #[test]
    fn a_missing_directory_is_an_error_at_once() {
        let directory = TestDirectory::new();
        let error = Stream::file(&directory.join("none/log")).expect_err("open");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        let error = Stream::file(&directory.join(".")).expect_err("open");
        assert_eq!(error.raw_os_error(), Some(libc::EISDIR));
    }

    #[test]
    fn a_full_disk_refuses_the_line() {
        let mut stream = Stream::file(Path::new("/dev/full")).expect("open");
        assert!(!stream.write_line(b"x\n"));
        assert!(!stream.write_line(b"x\n"));
    }

    #[test]
    fn a_fifo_takes_lines_as_soon_as_somebody_reads_it() {
        let directory = TestDirectory::new();
        let path = directory.join("fifo");
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).expect("mkfifo");
        let mut stream = Stream::file(&path).expect("no reader is no error");
        assert!(!stream.write_line(b"lost\n"));
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .expect("reader");
        assert!(stream.write_line(b"read\n"));
        let mut bytes = [0; 64];
        let length = reader.read(&mut bytes).expect("read");
        assert_eq!(&bytes[..length], b"read\n");
        drop(reader);
        assert!(!stream.write_line(b"nobody\n"));
    }

    #[test]
    fn a_socket_is_no_log_file() {
        let directory = TestDirectory::new();
        let path = directory.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).expect("bind");
        let error = Stream::file(&path).expect_err("open");
        assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
    }

    /// Fills the stream, reads everything, and checks that only whole lines came, in order.
    fn check_that_lines_stay_whole(mut stream: Stream, mut reader: impl Read) {
        let line = [b"x".repeat(2999), b"\n".to_vec()].concat();
        let taken = fill(&mut stream, &line);
        assert!(taken > 0);
        let mut received = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        while received.len() < taken * line.len() {
            let length = reader.read(&mut buffer).expect("read");
            received.extend_from_slice(&buffer[..length]);
            if received.len() < taken * line.len() {
                // The rest of the last line comes with the next one.
                stream.write_line(b"");
            }
        }
        assert_eq!(received, line.repeat(taken));
        assert!(stream.write_line(b"again\n"));
        let length = reader.read(&mut buffer).expect("read");
        assert_eq!(&buffer[..length], b"again\n");
    }

    #[test]
    fn a_pipe_that_nobody_reads_refuses_lines_and_keeps_them_whole() {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let stream = shared(writer);
        assert!(matches!(stream.channel, Channel::Own(_)));
        check_that_lines_stay_whole(stream, reader);
    }

    #[test]
    fn a_line_that_went_out_in_part_is_finished_by_the_next_opening() {
        let directory = TestDirectory::new();
        let path = directory.join("fifo");
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).expect("mkfifo");
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .expect("reader");
        let mut old = Stream::file(&path).expect("open");
        // More than a pipe holds.
        let line = [b"x".repeat(100_000), b"\n".to_vec()].concat();
        assert!(old.write_line(&line));
        let mut new = Stream::file(&path).expect("open");
        new.finish_line_of(&mut old);
        drop(old);
        let mut received = vec![0; 1 << 20];
        let length = reader.read(&mut received).expect("read");
        assert!(length < line.len(), "the line went out in part");
        assert!(new.write_line(b"next\n"));
        let more = reader.read(&mut received[length..]).expect("read");
        let expected = [line, b"next\n".to_vec()].concat();
        assert_eq!(received[..length + more], expected);
    }

    #[test]
    fn a_socket_that_nobody_reads_refuses_lines_and_keeps_them_whole() {
        let (reader, writer) = UnixStream::pair().expect("socketpair");
        let stream = shared(writer);
        assert!(matches!(stream.channel, Channel::Socket(_)));
        check_that_lines_stay_whole(stream, reader);
    }

    #[test]
    fn what_cannot_be_opened_again_is_polled() {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let kept: &'static OwnedFd = Box::leak(Box::new(writer.into()));
        let stream = Stream {
            channel: Channel::Polled(kept.as_fd()),
            rest: Vec::new(),
        };
        check_that_lines_stay_whole(stream, reader);
    }

    #[test]
    fn a_shared_descriptor_keeps_its_flags() {
        use nix::fcntl::{FcntlArg, fcntl};
        let (_reader, writer) = std::io::pipe().expect("pipe");
        let kept: &'static OwnedFd = Box::leak(Box::new(writer.into()));
        let before = fcntl(kept, FcntlArg::F_GETFL).expect("flags");
        let mut stream = Stream::over(kept.as_fd());
        assert!(stream.write_line(b"x\n"));
        assert_eq!(fcntl(kept, FcntlArg::F_GETFL).expect("flags"), before);
        assert_eq!(before & libc::O_NONBLOCK, 0);
    }

    #[test]
    fn a_shared_file_keeps_its_offset_with_the_others_who_write_to_it() {
        let directory = TestDirectory::new();
        let path = directory.join("shared");
        let mut file = File::create(&path).expect("create");
        let mut stream = shared(file.try_clone().expect("dup"));
        assert!(stream.write_line(b"ours\n"));
        std::io::Write::write_all(&mut file, b"theirs\n").expect("write");
        assert!(stream.write_line(b"ours\n"));
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, "ours\ntheirs\nours\n");
    }
}
