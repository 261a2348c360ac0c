//! UNIX stream sockets: accept, read with passed descriptors, write, and who the peer is.
//! Nothing here waits.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{self, SockFlag, sockopt};

use super::errno::{self, Errno};
use super::patience::patiently;
use super::process::Process;
use super::shared::Shared;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes read; 0 at the end of the stream.
    pub bytes: usize,
    /// Whether descriptors came with the last of these bytes. They are closed already: no
    /// procedure of this daemon uses any, and only their arrival is part of the protocol.
    pub descriptors: bool,
}

const DESCRIPTOR: usize = size_of::<RawFd>();

/// Room for the control message of one descriptor. The kernel drops what does not fit.
const CONTROL: usize = 24;

/// A message on its way through the kernel, which writes from inside the call how many bytes it moved: in
/// memory that outlives this process, whoever comes next knows it.
#[repr(C)]
struct Letter {
    header: libc::mmsghdr,
    vector: libc::iovec,
    control: [u64; CONTROL / 8],
}

/// What a letter takes of the memory that it lies in, bytes.
pub const LETTER: usize = 128;
const _: () = assert!(size_of::<Letter>() <= LETTER);

/// In the place of a number of bytes: the call that is to say it has not come back from the kernel.
const NOT_YET: u32 = u32::MAX;

fn letter(memory: &Shared, at: usize) -> Result<*mut Letter, Errno> {
    let place = memory.address(at, LETTER).ok_or(Errno::EINVAL)?;
    let place: *mut Letter = place.as_ptr().cast();
    if place.is_aligned() {
        Ok(place)
    } else {
        Err(Errno::EINVAL)
    }
}

/// Makes the letter at this place one that has moved nothing: to be done before the next is sent or
/// received with it.
pub fn blank(memory: &Shared, at: usize) {
    if let Ok(letter) = letter(memory, at) {
        // SAFETY: the place is inside the mapping and aligned; letters are only reached through these
        // functions, none of which keeps a reference.
        unsafe {
            (&raw mut (*letter).header.msg_len).write_volatile(NOT_YET);
        }
    }
}

/// What the letter at this place moved, perhaps for a process that is dead. `None` if nothing has come back.
pub fn moved(memory: &Shared, at: usize) -> Option<Received> {
    let letter = letter(memory, at).ok()?;
    // SAFETY: as in `blank`. The kernel or `receive` filled the header in, and its pointers are not followed.
    let (count, flags, mut header) = unsafe {
        let count = (&raw const (*letter).header.msg_len).read_volatile();
        let header = (&raw const (*letter).header.msg_hdr).read();
        (count, header.msg_flags, header)
    };
    if count == NOT_YET {
        return None;
    }
    // SAFETY: inside the mapping: only the place is computed.
    header.msg_control = unsafe { (&raw mut (*letter).control).cast() };
    let is_possible = (1..=CONTROL as _).contains(&header.msg_controllen);
    let came = is_possible && each_passed(&header, drop);
    Some(Received {
        bytes: usize::try_from(count).unwrap_or(0),
        descriptors: came || flags & libc::MSG_CTRUNC != 0,
    })
}

/// Reads what is there from the socket with this number into this range of the memory, and collects passed
/// descriptors, with the blank letter at `at`. A read never goes past the bytes that a descriptor was sent
/// with (unix(7)), so one mark for the last byte is enough.
pub fn receive(
    socket: RawFd,
    memory: &Shared,
    at: usize,
    buffer: Range<usize>,
) -> Result<Received, Errno> {
    let letter = letter(memory, at)?;
    let place = memory.address(buffer.start, buffer.len());
    let place = place.ok_or(Errno::EINVAL)?.as_ptr();
    // SAFETY: as in `blank`; the letter, its control part and the buffer are inside the mapping.
    let header = unsafe {
        (*letter).vector = libc::iovec {
            iov_base: place.cast(),
            iov_len: buffer.len(),
        };
        let header = &raw mut (*letter).header.msg_hdr;
        fill(header, &raw mut (*letter).vector);
        (*header).msg_control = (&raw mut (*letter).control).cast();
        (*header).msg_controllen = CONTROL as _;
        &raw mut (*letter).header
    };
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let mut is_again = false;
    loop {
        // SAFETY: one message, whose header, vector, control part and buffer are alive and of the stated
        // sizes; nobody else touches them meanwhile.
        let called = unsafe { libc::recvmmsg(socket, header, 1, flags as _, std::ptr::null_mut()) };
        match Errno::result(called) {
            Ok(_) => break,
            // Unlike recvmsg(2) this tells of the other side's end before it gives what came before it,
            // and only once.
            Err(Errno::ECONNRESET) if !is_again => is_again = true,
            // A security policy may not know it: without it the number is written down here.
            Err(Errno::ENOSYS | Errno::EPERM) => {
                // SAFETY: as above.
                let count = unsafe { libc::recvmsg(socket, &raw mut (*header).msg_hdr, flags) };
                let count = u32::try_from(Errno::result(count)?).map_err(|_| Errno::EIO)?;
                // SAFETY: as above.
                unsafe { (&raw mut (*header).msg_len).write_volatile(count) };
                break;
            }
            Err(reason) => return Err(reason),
        }
    }
    // SAFETY: the kernel filled in the header, whose pointers are still those of above.
    let (message, bytes) = unsafe {
        let bytes = (&raw const (*header).msg_len).read_volatile();
        ((&raw const (*header).msg_hdr).read(), bytes)
    };
    // Those for which this process had no room, in its buffer or its table of open files, came too.
    let dropped = message.msg_flags & libc::MSG_CTRUNC != 0;
    let closed = message.msg_controllen > 0
        && each_passed(&message, |passed| {
            // SAFETY: the kernel wrote this descriptor just now; it is new and ours.
            drop(unsafe { OwnedFd::from_raw_fd(passed) });
        });
    Ok(Received {
        bytes: usize::try_from(bytes).map_err(|_| Errno::EIO)?,
        descriptors: closed || dropped,
    })
}

/// A header of a message of this one vector, with nothing else.
///
/// # Safety
/// `header` is valid to be written.
unsafe fn fill(header: *mut libc::msghdr, vector: *mut libc::iovec) {
    // SAFETY: all zero is a valid msghdr (null pointers with zero lengths), and the caller vouches for the
    // place.
    unsafe {
        header.write(std::mem::zeroed());
        (*header).msg_iov = vector;
        (*header).msg_iovlen = 1;
    }
}

/// Hands out the numbers of the descriptors that came with `message`; whether there were any.
fn each_passed(message: &libc::msghdr, mut each: impl FnMut(RawFd)) -> bool {
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
            let count = length.saturating_sub(head).min(CONTROL) / DESCRIPTOR;
            // SAFETY: `header` is a control message in the buffer; this points behind its header.
            let data = unsafe { libc::CMSG_DATA(header) };
            for position in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there.
                each(unsafe { data.cast::<RawFd>().add(position).read_unaligned() });
                any = true;
            }
        }
        // SAFETY: `header` is a control message of `message`, as CMSG_NXTHDR wants.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    any
}

/// Writes what the socket with this number takes now, with the blank letter at `at`.
pub fn send(socket: RawFd, memory: &Shared, at: usize, bytes: &[u8]) -> Result<usize, Errno> {
    let letter = letter(memory, at)?;
    // SAFETY: as in `blank`; the kernel only reads what the vector points at.
    let header = unsafe {
        (*letter).vector = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        fill(&raw mut (*letter).header.msg_hdr, &raw mut (*letter).vector);
        &raw mut (*letter).header
    };
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // The kernel's call and not the C library's: musl makes another one of it and writes the number itself.
    // SAFETY: one message, whose header, vector and bytes are alive and of the stated sizes.
    let called = unsafe { libc::syscall(libc::SYS_sendmmsg, socket, header, 1, flags) };
    match Errno::result(called) {
        Ok(_) => (),
        // As in `receive`.
        Err(Errno::ENOSYS | Errno::EPERM) => {
            // SAFETY: as above.
            let count = unsafe { libc::sendmsg(socket, &raw const (*header).msg_hdr, flags) };
            let count = u32::try_from(Errno::result(count)?).map_err(|_| Errno::EIO)?;
            // SAFETY: as above.
            unsafe { (&raw mut (*header).msg_len).write_volatile(count) };
        }
        Err(reason) => return Err(reason),
    }
    // SAFETY: as above.
    let count = unsafe { (&raw const (*header).msg_len).read_volatile() };
    usize::try_from(count).map_err(|_| Errno::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockType, sendmsg, socketpair,
    };
    use std::io::IoSlice;
    use std::num::NonZeroUsize;

    /// Letters and a buffer.
    struct Desk(Shared);

    impl Desk {
        fn new() -> Desk {
            Desk(Shared::new(NonZeroUsize::new(8192).unwrap()).unwrap())
        }

        fn receive(&self, socket: &OwnedFd) -> Result<Received, Errno> {
            blank(&self.0, 0);
            assert_eq!(moved(&self.0, 0), None);
            let received = receive(socket.as_raw_fd(), &self.0, 0, 4096..4160);
            assert_eq!(moved(&self.0, 0), received.ok(), "who comes next knows it");
            received
        }

        fn send(&self, socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
            blank(&self.0, 256);
            let sent = send(socket.as_raw_fd(), &self.0, 256, bytes);
            let moved = moved(&self.0, 256).map(|it| it.bytes);
            assert_eq!(moved, sent.ok(), "who comes next knows it");
            sent
        }
    }

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
        let desk = Desk::new();
        desk.send(&theirs, b"frame").unwrap();
        pass(&theirs, b"\0", &[0]);
        desk.send(&theirs, b"next").unwrap();
        let first = desk.receive(&ours).unwrap();
        assert_eq!((first.bytes, first.descriptors), (6, true));
        assert_eq!(desk.0.read(4096..4102), b"frame\0");
        let second = desk.receive(&ours).unwrap();
        assert_eq!((second.bytes, second.descriptors), (4, false));
        assert_eq!(desk.receive(&ours).err(), Some(Errno::EAGAIN));
    }

    #[test]
    fn no_passed_descriptor_stays_open_however_many_come() {
        let (ours, theirs) = pair();
        let before = open_descriptors();
        pass(&theirs, b"x", &[0; 253]);
        let received = Desk::new().receive(&ours).unwrap();
        assert!(received.descriptors);
        // Other tests of this process open descriptors too: look again until the count fits.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while open_descriptors() > before + 100 {
            assert!(std::time::Instant::now() < deadline, "descriptors leaked");
        }
    }

    #[test]
    fn what_came_before_an_end_is_read_although_the_other_side_left_replies_unread() {
        let (ours, theirs) = pair();
        let desk = Desk::new();
        desk.send(&ours, b"unread").unwrap();
        desk.send(&theirs, b"last words").unwrap();
        drop(theirs);
        assert_eq!(desk.receive(&ours).map(|it| it.bytes), Ok(10));
        assert_eq!(desk.receive(&ours).map(|it| it.bytes), Ok(0));
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
