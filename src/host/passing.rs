//! Descriptors in messages (SCM_RIGHTS, unix(7)): sent into one of a pair of sockets they wait in the other,
//! whoever has that one open, and what they stand for stays open as long. A message can be looked at, which
//! copies what is in it, and stays where it is.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use super::errno::Errno;

/// How many descriptors a message holds at most (SCM_MAX_FD).
pub const MOST: usize = 253;

/// Two sockets: what is sent into the first waits in the second. Neither waits, neither stays open on exec.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        flags,
    )?)
}

/// Sends a message with these descriptors. EAGAIN if there is no room, ETOOMANYREFS if more would be on
/// their way than this user may have there (RLIMIT_NOFILE), EPIPE if nobody has the second socket open.
pub fn send(socket: RawFd, bytes: &[u8], descriptors: &[RawFd]) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let parts = [IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(descriptors)];
    sendmsg::<()>(socket, &parts, &rights, flags, None)?;
    Ok(())
}

/// The next look is at the first message.
pub fn begin_to_look(socket: &OwnedFd) -> Result<(), Errno> {
    let first: libc::c_int = 0;
    let length = size_of_val(&first) as libc::socklen_t;
    // SAFETY: the kernel reads one number of ours, of the size that is said.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const first).cast(),
            length,
        )
    };
    Errno::result(result).map(drop)
}

/// What was found in a message.
#[derive(Debug, Default)]
pub struct Message {
    /// How many bytes it has.
    pub length: usize,
    /// Copies of its descriptors, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// It has more, for which there was no room in this process.
    pub is_cut: bool,
}

/// Room for the descriptors of a message and its head, in words so that it is aligned.
const ROOM: usize = (MOST * size_of::<RawFd>()).div_ceil(size_of::<u64>()) + 4;

/// Looks at the next message, if there is one. No message is empty.
pub fn look(socket: &OwnedFd, bytes: &mut [u8]) -> Result<Option<Message>, Errno> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    match read(socket.as_raw_fd(), bytes, flags) {
        // The second of a pair whose first is closed.
        Ok(message) if message.length == 0 => Ok(None),
        Err(Errno::EAGAIN) => Ok(None),
        message => message.map(Some),
    }
}

/// Takes the next message out, with all that is in it. One of no bytes says that nobody has the other end.
/// EAGAIN if there is none and the socket does not wait; ECONNRESET if somebody closed the other end who had not
/// read all that was sent there.
pub fn receive(socket: RawFd, bytes: &mut [u8]) -> Result<Message, Errno> {
    read(socket, bytes, 0)
}

fn read(socket: RawFd, bytes: &mut [u8], flags: libc::c_int) -> Result<Message, Errno> {
    let mut room = [MaybeUninit::<u64>::zeroed(); ROOM];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a header of zeros is one that says nothing.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = room.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&room) as _;
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header leads to memory of ours, as long as it says, which lives over the call.
    let length = Errno::result(unsafe { libc::recvmsg(socket, &raw mut header, flags) })?;
    let mut message = Message {
        length: usize::try_from(length).unwrap_or(0),
        descriptors: Vec::new(),
        is_cut: header.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) != 0,
    };
    // SAFETY: the kernel has filled the header and the room in; these follow its marks and stay in it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: as above; what is not null is a whole head.
    while let Some(head) = unsafe { next.as_ref() } {
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: as above; the numbers behind the head are as many as it says.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(next) }.cast();
            // SAFETY: only counts.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let length: usize = head.cmsg_len as _;
            let room = length.saturating_sub(empty);
            let count = room.checked_div(size_of::<RawFd>()).unwrap_or(0);
            for place in 0..count {
                // SAFETY: it is one of those that the head counts, and nobody else knows of what the
                // kernel has just opened.
                let descriptor = unsafe {
                    let number = data.add(place).read_unaligned();
                    OwnedFd::from_raw_fd(number)
                };
                message.descriptors.push(descriptor);
            }
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok(message)
}

/// Whether there is a message, as far as can be told: only what is known to be empty is.
pub fn has_message(socket: &OwnedFd) -> bool {
    let mut byte = [0; 1];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let read = begin_to_look(socket).and_then(|()| {
        let read = nix::sys::socket::recv(socket.as_raw_fd(), &mut byte, flags);
        read.map_err(Errno::from)
    });
    !matches!(read, Ok(0) | Err(Errno::EAGAIN))
}

/// Takes the first message out, with all that is in it: nobody finds it any more. False if there is none.
pub fn discard_first(socket: impl AsFd) -> Result<bool, Errno> {
    let mut byte = [0; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_DONTWAIT;
    // Without room for them its descriptors are nobody's.
    let number = socket.as_fd().as_raw_fd();
    let taken = nix::sys::socket::recvmsg::<()>(number, &mut parts, None, flags);
    let length = taken.map(|message| message.bytes);
    match length.map_err(Errno::from) {
        Ok(0) | Err(Errno::EAGAIN) => Ok(false),
        Ok(_) => Ok(true),
        Err(reason) => Err(reason),
    }
}

/// Whether anybody has the second of a pair of sockets open, or it is on its way to somebody.
pub fn has_other_end(first: RawFd) -> bool {
    let mut looked_at = libc::pollfd {
        fd: first,
        events: 0,
        revents: 0,
    };
    // SAFETY: the pointer is to one structure of ours, as is said.
    let found = unsafe { libc::poll(&raw mut looked_at, 1, 0) };
    found == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_looked_at_stays_until_it_is_taken_out() {
        let (into, out_of) = pair().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        send(into.as_raw_fd(), b"one", &[theirs.as_raw_fd()]).unwrap();
        send(
            into.as_raw_fd(),
            b"another",
            &[theirs.as_raw_fd(), theirs.as_raw_fd()],
        )
        .unwrap();
        drop((into, theirs));
        for _ in 0..2 {
            begin_to_look(&out_of).unwrap();
            let mut bytes = [0; 16];
            let first = look(&out_of, &mut bytes).unwrap().unwrap();
            assert_eq!(&bytes[..first.length], b"one");
            assert_eq!(first.descriptors.len(), 1);
            let second = look(&out_of, &mut bytes).unwrap().unwrap();
            assert_eq!(&bytes[..second.length], b"another");
            assert_eq!(second.descriptors.len(), 2);
            assert!(look(&out_of, &mut bytes).unwrap().is_none());
        }
        let is_open = |ours: &mut UnixStream| ours.read(&mut [0]).is_err();
        assert!(discard_first(&out_of).unwrap());
        assert!(is_open(&mut ours));
        assert!(discard_first(&out_of).unwrap());
        assert!(!is_open(&mut ours));
        assert!(!discard_first(&out_of).unwrap());
    }

    #[test]
    fn an_end_is_there_as_long_as_it_is_on_its_way() {
        let (ours, theirs) = pair().unwrap();
        let (into, out_of) = pair().unwrap();
        send(into.as_raw_fd(), b"x", &[theirs.as_raw_fd()]).unwrap();
        drop(theirs);
        assert!(has_other_end(ours.as_raw_fd()));
        drop(out_of);
        assert!(!has_other_end(ours.as_raw_fd()));
    }
}
