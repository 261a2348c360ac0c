//! UNIX stream sockets: accept, read with passed descriptors, write, and who the peer is.
//! Nothing here waits.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{self, MsgFlags, SockFlag, sockopt};

use super::errno::{self, Errno};
use super::patience::patiently;
use super::process::Process;

/// The process that called connect(), as the kernel noted it then (SO_PEERCRED, unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Peer {
    /// Its process id, 0 if it cannot be seen from this pid namespace.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
}

/// Somebody of whom the kernel does not tell.
pub const UNKNOWN_PEER: Peer = Peer {
    pid: 0,
    uid: u32::MAX,
    gid: u32::MAX,
};

/// The next waiting connection, non-blocking and close-on-exec. EAGAIN when there is none.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Who is at the other end.
pub fn peer(socket: &OwnedFd) -> Result<Peer, Errno> {
    let credentials = socket::getsockopt(socket, sockopt::PeerCredentials)?;
    Ok(Peer {
        pid: credentials.pid(),
        uid: credentials.uid(),
        gid: credentials.gid(),
    })
}

/// Whether a descriptor is a connection that was made to the listening socket with this number: it has its
/// name.
pub fn is_connection_to(listener: RawFd, descriptor: RawFd) -> bool {
    use nix::sys::socket::{SockType, UnixAddr, getpeername, getsockname};
    // SAFETY: only asked what it is; the caller knows that it is open.
    let socket = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let Ok(name) = getsockname::<UnixAddr>(descriptor) else {
        return false;
    };
    socket::getsockopt(&socket, sockopt::SockType) == Ok(SockType::Stream)
        && getpeername::<UnixAddr>(descriptor).is_ok()
        && getsockname::<UnixAddr>(listener) == Ok(name)
}

/// The SELinux context of the process at the other end when it called connect() (SO_PEERSEC).
/// `None` where SELinux is not in use: another security module would answer with labels of its own.
pub fn selinux_context(socket: &OwnedFd) -> Option<Vec<u8>> {
    if !std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        return None;
    }
    // Contexts are shorter than a page.
    let mut context = vec![0u8; 4096];
    let mut length = libc::socklen_t::try_from(context.len()).ok()?;
    // SAFETY: the kernel writes at most `length` bytes to `context` and the number of those it
    // wrote to `length`; both are alive and borrowed for the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERSEC,
            context.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result).ok()?;
    context.truncate(usize::try_from(length).ok()?);
    // The kernel counts the byte that ends the string.
    while context.last() == Some(&0) {
        context.pop();
    }
    Some(context)
}

/// The process at the other end, whatever became of its number since (SO_PEERPIDFD, Linux 6.5).
/// ESRCH or EINVAL when it has been reaped, ENOPROTOOPT on an older kernel.
pub fn peer_process(socket: &OwnedFd) -> Result<Process, Errno> {
    let pidfd = socket::getsockopt(socket, sockopt::PeerPidfd)?;
    Ok(Process::from_pidfd(pidfd))
}

/// Whether this kernel knows SO_PEERPIDFD (ENOPROTOOPT: it does not). Takes three descriptors for a
/// moment. May wait, as [`patiently`] does: what passes, such as a lack of them, is no answer.
pub fn peer_process_is_known() -> bool {
    let asked = patiently(|| match own_peer_process() {
        Err(reason) if errno::may_pass(reason) => Err(reason),
        answer => Ok(answer.is_ok()),
    });
    // A wrong yes keeps locks that could be freed, a wrong no may kill another process.
    asked.unwrap_or(true)
}

/// This process, as the other end of a pair of its sockets.
fn own_peer_process() -> Result<Process, Errno> {
    let (ours, _theirs) = socket::socketpair(
        socket::AddressFamily::Unix,
        socket::SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    peer_process(&ours)
}

/// What one read brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes read; 0 at the end of the stream.
    pub bytes: usize,
    /// Whether descriptors came with the last of these bytes. They are closed already: no
    /// procedure of this daemon uses any, and only their arrival is part of the protocol.
    pub descriptors: bool,
}

const DESCRIPTOR: usize = size_of::<RawFd>();

/// Room for the control message of one descriptor. The kernel drops what does not fit.
#[repr(C, align(8))]
struct Control([u8; 24]);

/// Reads what is there from the socket with this number, at most `buffer`, and collects passed descriptors. A read never goes past
/// the bytes that a descriptor was sent with (unix(7)), so one mark for the last byte is enough.
pub fn receive(socket: RawFd, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut control = Control([0; 24]);
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zero is a valid msghdr (null pointers with zero lengths).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points at `vector` and `control`, both alive and of the stated sizes, and
    // `vector` at `buffer`, borrowed mutably for the call.
    let count = unsafe { libc::recvmsg(socket, &raw mut message, flags) };
    let bytes = usize::try_from(Errno::result(count)?).map_err(|_| Errno::EIO)?;
    // Those for which this process had no room, in its buffer or its table of open files, came too.
    let dropped = message.msg_flags & libc::MSG_CTRUNC != 0;
    let closed = message.msg_controllen > 0 && close_passed(&message);
    Ok(Received {
        bytes,
        descriptors: closed || dropped,
    })
}

/// Closes the descriptors that came with `message`; whether there were any.
fn close_passed(message: &libc::msghdr) -> bool {
    let mut any = false;
    // SAFETY: the kernel filled in `message`; the CMSG macros walk its control buffer, which is
    // alive, and yield null at its end.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, so it points at a header inside the control buffer.
        let (level, kind, length) = unsafe {
            (
                (*header).cmsg_level,
                (*header).cmsg_type,
                (*header).cmsg_len as usize,
            )
        };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: only computes how long a header is.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = length.saturating_sub(head) / DESCRIPTOR;
            // SAFETY: `header` is a control message in the buffer; this points behind its header.
            let data = unsafe { libc::CMSG_DATA(header) };
            for position in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there; each is new and ours.
                let passed = unsafe {
                    OwnedFd::from_raw_fd(data.cast::<RawFd>().add(position).read_unaligned())
                };
                drop(passed);
                any = true;
            }
        }
        // SAFETY: `header` is a control message of `message`, as CMSG_NXTHDR wants.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    any
}

/// Writes what the socket with this number takes now.
pub fn send(socket: RawFd, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(socket::send(socket.as_raw_fd(), bytes, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, ControlMessage, SockType, sendmsg, socketpair};
    use std::io::IoSlice;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    fn pass(socket: &OwnedFd, bytes: &[u8], descriptors: &[RawFd]) {
        let control = [ControlMessage::ScmRights(descriptors)];
        let vector = [IoSlice::new(bytes)];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &vector,
            &control,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    #[test]
    fn a_read_stops_behind_the_bytes_that_a_descriptor_came_with() {
        let (ours, theirs) = pair();
        send(theirs.as_raw_fd(), b"frame").unwrap();
        pass(&theirs, b"\0", &[0]);
        send(theirs.as_raw_fd(), b"next").unwrap();
        let mut buffer = [0; 64];
        let first = receive(ours.as_raw_fd(), &mut buffer).unwrap();
        assert_eq!((first.bytes, first.descriptors), (6, true));
        let second = receive(ours.as_raw_fd(), &mut buffer).unwrap();
        assert_eq!((second.bytes, second.descriptors), (4, false));
        assert_eq!(
            receive(ours.as_raw_fd(), &mut buffer).err(),
            Some(Errno::EAGAIN)
        );
    }

    #[test]
    fn no_passed_descriptor_stays_open_however_many_come() {
        let (ours, theirs) = pair();
        let before = open_descriptors();
        pass(&theirs, b"x", &[0; 253]);
        let received = receive(ours.as_raw_fd(), &mut [0; 8]).unwrap();
        assert!(received.descriptors);
        // Other tests of this process open descriptors too: look again until the count fits.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while open_descriptors() > before + 100 {
            assert!(std::time::Instant::now() < deadline, "descriptors leaked");
        }
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (ours, _theirs) = pair();
        assert_eq!(
            peer(&ours).unwrap().pid,
            i32::try_from(std::process::id()).unwrap()
        );
        if peer_process_is_known() {
            assert!(!peer_process(&ours).unwrap().is_dead());
        }
    }
}
