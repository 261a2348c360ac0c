//! The listening sockets: made at their paths, or inherited from a service manager that listened
//! before the daemon ran (socket activation, sd_listen_fds(3)).
//!
//! The C daemon removes whatever is at a socket's path, so that a second daemon cuts off a running
//! one, whose guests keep their locks but can never reach them again. Here a path at which somebody
//! answers is left alone and the start ends.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, getsockname,
    listen, shutdown, socket,
};
use nix::sys::stat::{Mode, umask};

use super::errno::Errno;
use super::paths::Paths;
use super::{environment, errno, process};

/// The sockets that the daemon accepts clients on. An activated daemon may have several of a kind,
/// or none.
#[derive(Debug, Default)]
pub struct Listeners {
    /// For lock clients.
    pub lock: Vec<Listener>,
    /// For admin clients.
    pub admin: Vec<Listener>,
}

/// One listening socket, non-blocking and close-on-exec.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: OwnedFd,
    /// Where it is, if it is ours to remove at the end. Activation sockets are the manager's.
    pub path: Option<PathBuf>,
}

/// Why there is no socket to listen on.
#[derive(Debug, PartialEq, Eq)]
pub enum ListenError {
    /// The path does not fit into a socket address.
    PathTooLong(PathBuf),
    /// Another program answers there.
    Alive(PathBuf),
    /// It cannot be told whether another program answers there.
    Unclear(PathBuf, Errno),
    /// A socket could not be made at all.
    Create(Errno),
    /// The socket could not be put at its path.
    Bind(PathBuf, Errno),
    /// The socket at this path could not be made to listen.
    Listen(PathBuf, Errno),
    /// An activation descriptor is not a listening socket.
    Inherited(&'static str, Errno),
    /// An activation descriptor has a name that means nothing to this daemon.
    Unclaimed,
}

impl fmt::Display for ListenError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PathTooLong(path) => {
                let most = size_of::<libc::sockaddr_un>()
                    .saturating_sub(std::mem::offset_of!(libc::sockaddr_un, sun_path))
                    .saturating_sub(1);
                let path = path.display();
                write!(
                    out,
                    "Path {path} too long for unix socket: at most {most} bytes are possible"
                )
            }
            Self::Alive(path) => write!(
                out,
                "Failed to bind socket to '{}': another program listens there, stop it first \
                 (a running virtlockd, or its systemd socket unit)",
                path.display()
            ),
            Self::Unclear(path, error) => write!(
                out,
                "Failed to bind socket to '{}': cannot tell whether another program listens there: {}",
                path.display(),
                errno::text(*error)
            ),
            Self::Create(error) => write!(out, "Failed to create socket: {}", errno::text(*error)),
            Self::Bind(path, error) => {
                write!(
                    out,
                    "Failed to bind socket to '{}': {}",
                    path.display(),
                    errno::text(*error)
                )
            }
            Self::Listen(path, error) => {
                write!(
                    out,
                    "Unable to listen on socket '{}': {}",
                    path.display(),
                    errno::text(*error)
                )
            }
            Self::Inherited(attempt, error) => {
                write!(out, "Unable to {attempt}: {}", errno::text(*error))
            }
            Self::Unclaimed => {
                out.write_str("internal error: Some activation file descriptors are unclaimed")
            }
        }
    }
}

impl std::error::Error for ListenError {}

impl Listeners {
    /// Takes the sockets of the activation, or makes the two sockets of `paths`.
    pub fn open(activation: Activation, paths: &Paths) -> Result<Self, ListenError> {
        let inherited = match activation {
            Activation::Sockets { lock, admin } => return Ok(Self { lock, admin }),
            Activation::Wrong(error) => return Err(error),
            Activation::Unusable { reason, inherited } => {
                tracing::error!("{reason}");
                inherited
            }
            Activation::None => Vec::new(),
        };
        Self::at(paths, &inherited)
    }

    /// The same for a daemon that goes on from one that stopped and had these sockets. Its own stay, unless
    /// their paths are another's by now. Those at which nobody arrives any more come second: clients may
    /// have come to them before.
    pub fn open_again(
        activation: Activation,
        paths: &Paths,
        before: Listeners,
    ) -> Result<(Self, Self), ListenError> {
        if !matches!(activation, Activation::None) {
            let now = Self::open(activation, paths)?;
            let old = Self {
                lock: others(before.lock, &now.lock),
                admin: others(before.admin, &now.admin),
            };
            return Ok((now, old));
        }
        for listener in before.lock.iter().chain(&before.admin) {
            // Whoever connects is told that it is this process which listens. One that waited would keep the
            // daemon waiting.
            let again = set_flags(&listener.socket).and_then(|()| widen_backlog(&listener.socket));
            again.map_err(|error| ListenError::Inherited("listen on socket", error))?;
        }
        let (lock, old_lock) = own(before.lock, &paths.lock_socket);
        let (admin, old_admin) = own(before.admin, &paths.admin_socket);
        // Clients of these two may come to an old socket of this daemon still.
        let mut answers = vec![paths.lock_socket.clone(), paths.admin_socket.clone()];
        answers.retain(|path| is_of_this_process(path));
        let one = |own: Option<Listener>, path: &Path| {
            own.map_or_else(|| Listener::at(path, &answers), Ok)
        };
        let now = Self {
            lock: vec![one(lock, &paths.lock_socket)?],
            admin: vec![one(admin, &paths.admin_socket)?],
        };
        let old = Self {
            lock: old_lock,
            admin: old_admin,
        };
        Ok((now, old))
    }

    fn at(paths: &Paths, inherited: &[PathBuf]) -> Result<Self, ListenError> {
        let lock = Listener::at(&paths.lock_socket, inherited)?;
        match Listener::at(&paths.admin_socket, inherited) {
            Ok(admin) => Ok(Self {
                lock: vec![lock],
                admin: vec![admin],
            }),
            Err(error) => {
                lock.remove();
                Err(error)
            }
        }
    }

    /// Where those sockets are that are ours to remove.
    pub fn paths(&self) -> Vec<PathBuf> {
        let all = self.lock.iter().chain(&self.admin);
        all.filter_map(|listener| listener.path.clone()).collect()
    }
}

impl Listener {
    /// Makes a socket at `path` that only this user can connect to (mode 0700). `inherited` are
    /// paths whose listener is known to be no other daemon.
    fn at(path: &Path, inherited: &[PathBuf]) -> Result<Self, ListenError> {
        let address = UnixAddr::new(path).map_err(|error| match error.into() {
            Errno::ENAMETOOLONG => ListenError::PathTooLong(path.to_path_buf()),
            error => ListenError::Bind(path.to_path_buf(), error),
        })?;
        let _one_at_a_time = lock_directory(path);
        if !inherited.iter().any(|known| known == path) {
            match presence(&address) {
                Presence::Nobody => {}
                Presence::Somebody | Presence::ThisProcess => {
                    return Err(ListenError::Alive(path.to_path_buf()));
                }
                Presence::Unclear(error) => {
                    return Err(ListenError::Unclear(path.to_path_buf(), error));
                }
            }
        }
        let socket = new_socket().map_err(ListenError::Create)?;
        // What cannot be removed (a directory) is what bind reports.
        let _ = std::fs::remove_file(path);
        let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
        let bound = bind(socket.as_raw_fd(), &address).map_err(Errno::from);
        umask(before);
        bound.map_err(|error| ListenError::Bind(path.to_path_buf(), error))?;
        let listening = widen_backlog(&socket);
        let listener = Self {
            socket,
            path: Some(path.to_path_buf()),
        };
        match listening {
            Ok(()) => Ok(listener),
            Err(error) => {
                listener.remove();
                Err(ListenError::Listen(path.to_path_buf(), error))
            }
        }
    }

    /// An activation socket.
    fn inherited(socket: OwnedFd) -> Result<Self, ListenError> {
        getsockname::<UnixAddr>(socket.as_raw_fd())
            .map_err(|error| ListenError::Inherited("get local socket name", error.into()))?;
        set_flags(&socket).map_err(|error| ListenError::Inherited("set up socket", error))?;
        widen_backlog(&socket)
            .map_err(|error| ListenError::Inherited("listen on socket", error))?;
        Ok(Self { socket, path: None })
    }

    /// Removes the socket of a daemon that ends, unless somebody else answers there by now.
    pub fn remove(self) {
        let Some(path) = self.path else {
            return;
        };
        // A process that was just made for something else may have it open yet, and would seem to answer.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        drop(self.socket);
        remove_socket(&path);
    }
}

/// Those of `before` that are none of `now`, which may have them open once more.
fn others(before: Vec<Listener>, now: &[Listener]) -> Vec<Listener> {
    let key = |listener: &Listener| {
        let stat = nix::sys::stat::fstat(&listener.socket).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    let is_there = |one: &Listener| now.iter().any(|other| key(other) == key(one));
    before.into_iter().filter(|one| !is_there(one)).collect()
}

/// The one that this daemon made at a path where clients still come to it, and the others.
fn own(before: Vec<Listener>, path: &Path) -> (Option<Listener>, Vec<Listener>) {
    let arrives = is_of_this_process(path);
    let is_there = |one: &Listener| arrives && one.path.as_deref() == Some(path);
    let (mut own, mut others): (Vec<_>, Vec<_>) = before.into_iter().partition(is_there);
    let last = own.pop();
    others.extend(own);
    (last, others)
}

/// Removes a socket that this process has closed.
pub fn remove_socket(path: &Path) {
    // The C daemon may have taken the path over: then somebody still answers there.
    if UnixAddr::new(path).is_ok_and(|address| presence(&address) == Presence::Nobody)
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::debug!("socket '{}' is not removed: {error}", path.display());
    }
}

/// The queue of connections not yet accepted is as long as the kernel allows
/// (net.core.somaxconn): after a restart of the host all its machines connect at once, and a client
/// that finds the queue full fails at once or waits.
pub fn widen_backlog(socket: &OwnedFd) -> Result<(), Errno> {
    Ok(listen(socket, Backlog::MAXALLOWABLE)?)
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

fn set_flags(socket: &OwnedFd) -> Result<(), Errno> {
    use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
    fcntl(socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let status = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Whether somebody listens at an address.
#[derive(Debug, PartialEq, Eq)]
enum Presence {
    /// There is no file, no socket, or one whose process is gone.
    Nobody,
    /// There is a process with this socket open.
    Somebody,
    /// This process has it open, and said that it listens.
    ThisProcess,
    Unclear(Errno),
}

/// Asks by connecting, which never waits here.
fn presence(address: &UnixAddr) -> Presence {
    let probe = match new_socket() {
        Ok(probe) => probe,
        Err(error) => return Presence::Unclear(error),
    };
    match connect(probe.as_raw_fd(), address).map_err(Errno::from) {
        Ok(()) if is_from_here(&probe) => Presence::ThisProcess,
        // EAGAIN: its queue is full. EPROTOTYPE: it is a socket of another type, but alive.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Presence::Somebody,
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Presence::Nobody,
        // The path leads nowhere, which bind will say better.
        Err(Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG) => Presence::Nobody,
        Err(error) => Presence::Unclear(error),
    }
}

/// Whether whoever connects to this path comes to this process.
fn is_of_this_process(path: &Path) -> bool {
    UnixAddr::new(path).is_ok_and(|address| presence(&address) == Presence::ThisProcess)
}

/// Whether it was this process that said of the socket at the other end that it listens: the kernel notes who
/// did so last (unix(7), SO_PEERCRED).
fn is_from_here(probe: &OwnedFd) -> bool {
    let other = nix::sys::socket::getsockopt(probe, nix::sys::socket::sockopt::PeerCredentials);
    other.is_ok_and(|other| other.pid() == process::own_number())
}

/// Keeps two daemons that start in the same moment from both finding the path free and the second
/// from removing the first's socket: between its bind and its listen it looks dead.
///
/// Whoever may look into the directory can take this lock, so it is only waited for briefly and the
/// start goes on without it.
///
/// Closing the directory gives the lock back: nix's own guard panics if it cannot be unlocked.
fn lock_directory(path: &Path) -> Option<File> {
    const ATTEMPTS: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(10);
    let directory = File::open(path.parent()?).ok()?;
    for _ in 0..ATTEMPTS {
        // SAFETY: flock(2) takes two integers and touches no memory of ours.
        let result = unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        match Errno::result(result) {
            Ok(_) => return Some(directory),
            Err(Errno::EAGAIN) => std::thread::sleep(PAUSE),
            Err(Errno::EINTR) => (),
            Err(_) => return None,
        }
    }
    None
}

/// What a service manager gave to this process when it started it.
#[derive(Debug)]
pub struct Given {
    /// Sockets.
    pub activation: Activation,
    /// What this daemon had put into the manager's store before, and how that is called there.
    pub stored: Vec<(String, OwnedFd)>,
    /// Whether that is all that it gives with a start: nothing was announced to another process, or could
    /// not be taken.
    pub is_whole: bool,
}

/// The sockets that a service manager left for this process.
#[derive(Debug)]
pub enum Activation {
    /// Nothing, or it is not meant for this process.
    None,
    /// Listening sockets.
    Sockets {
        /// Those named `virtlockd.socket`.
        lock: Vec<Listener>,
        /// Those named `virtlockd-admin.socket`.
        admin: Vec<Listener>,
    },
    /// Descriptors without usable names: the daemon makes its own sockets, as the C daemon does.
    Unusable {
        /// The line for the log.
        reason: String,
        /// Where the descriptors listen: no other daemon is to be feared there.
        inherited: Vec<PathBuf>,
    },
    /// Descriptors that the daemon must not run with.
    Wrong(ListenError),
}

/// The first descriptor that a service manager passes (SD_LISTEN_FDS_START).
const FIRST_DESCRIPTOR: RawFd = 3;

const LOCK_NAME: &[u8] = b"virtlockd.socket";
const ADMIN_NAME: &[u8] = b"virtlockd-admin.socket";
/// How the names begin of what this daemon puts into the manager's store.
pub const STORED: &str = "virtlockd-bag-";

impl Given {
    /// Nothing, whatever there may be.
    pub fn nothing() -> Given {
        Given {
            activation: Activation::None,
            stored: Vec::new(),
            is_whole: false,
        }
    }

    /// Whether a descriptor is one that this daemon had put into the manager's store.
    pub fn has_stored(&self, number: RawFd) -> bool {
        let mut stored = self.stored.iter();
        stored.any(|(_, stored)| stored.as_raw_fd() == number)
    }

    /// Takes the descriptors that LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES announce, and removes
    /// these variables, which mean nothing to a child or a successor.
    ///
    /// To be called once, by main, before the process opens any descriptor: it takes possession of
    /// the descriptors from 3 on.
    pub fn take() -> Given {
        let (pid, count, names) = (
            environment::take("LISTEN_PID"),
            environment::take("LISTEN_FDS"),
            environment::take("LISTEN_FDNAMES"),
        );
        let activation = match plan(
            pid.as_deref(),
            count.as_deref(),
            names.as_deref(),
            process::started(),
        ) {
            Plan::Ignore => Activation::None,
            Plan::Unusable { reason, count } => Activation::Unusable {
                reason,
                inherited: paths(count),
            },
            // SAFETY: main has opened no descriptor yet, so these are the manager's.
            Plan::Take(kinds) => return unsafe { Given::adopt(kinds) },
        };
        Given {
            activation,
            is_whole: count.is_none(),
            ..Given::nothing()
        }
    }

    /// # Safety
    ///
    /// The descriptors from 3 on, as many as there are `kinds`, must belong to nobody.
    unsafe fn adopt(kinds: Vec<Kind>) -> Given {
        let mut given = Given {
            is_whole: true,
            ..Given::nothing()
        };
        let mut sockets = Vec::new();
        for (descriptor, kind) in (FIRST_DESCRIPTOR..).zip(kinds) {
            match kind {
                Kind::Stored(name) => {
                    // SAFETY: by the contract of this function it is nobody else's.
                    let stored = unsafe { stored(descriptor) };
                    given.stored.extend(stored.map(|stored| (name, stored)));
                }
                kind => sockets.push((descriptor, kind)),
            }
        }
        if !sockets.is_empty() {
            // SAFETY: as above.
            let sockets = unsafe { Activation::adopt(&sockets) };
            given.activation = sockets.unwrap_or_else(Activation::Wrong);
        }
        given
    }
}

/// What has been stored, if it is open.
///
/// # Safety
///
/// The descriptor must belong to nobody.
unsafe fn stored(number: RawFd) -> Option<OwnedFd> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    // SAFETY: borrowed for this call, which says so if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: it is open, and by the contract of this function nobody else's.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

impl Activation {
    /// # Safety
    ///
    /// These descriptors must belong to nobody.
    unsafe fn adopt(sockets: &[(RawFd, Kind)]) -> Result<Self, ListenError> {
        if sockets.iter().any(|(_, kind)| *kind == Kind::Other) {
            return Err(ListenError::Unclaimed);
        }
        let (mut lock, mut admin) = (Vec::new(), Vec::new());
        for (descriptor, kind) in sockets {
            // Only an open descriptor may be owned.
            getsockname::<UnixAddr>(*descriptor)
                .map_err(|error| ListenError::Inherited("get local socket name", error.into()))?;
            // SAFETY: it is open, and by the contract of this function nobody else's.
            let listener = Listener::inherited(unsafe { OwnedFd::from_raw_fd(*descriptor) })?;
            match kind {
                Kind::Lock => lock.push(listener),
                _ => admin.push(listener),
            }
        }
        Ok(Self::Sockets { lock, admin })
    }
}

/// What the variables ask for.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Ignore,
    Unusable { reason: String, count: u32 },
    Take(Vec<Kind>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Lock,
    Admin,
    /// Of this daemon, under this name.
    Stored(String),
    Other,
}

fn plan(pid: Option<&OsStr>, count: Option<&OsStr>, names: Option<&OsStr>, own_pid: u32) -> Plan {
    if number(pid) != Some(own_pid) {
        return Plan::Ignore;
    }
    let Some(count @ 1..) = number(count) else {
        return Plan::Ignore;
    };
    let Some(names) = names else {
        let reason =
            "internal error: Missing LISTEN_FDNAMES env from systemd socket activation".to_owned();
        return Plan::Unusable { reason, count };
    };
    let kinds: Vec<Kind> = match names.as_bytes() {
        b"" => Vec::new(),
        names => names.split(|byte| *byte == b':').map(kind).collect(),
    };
    if u32::try_from(kinds.len()) != Ok(count) {
        let reason = format!(
            "internal error: Expecting {count} FD names but got {}",
            kinds.len()
        );
        return Plan::Unusable { reason, count };
    }
    Plan::Take(kinds)
}

fn kind(name: &[u8]) -> Kind {
    match name {
        LOCK_NAME => Kind::Lock,
        ADMIN_NAME => Kind::Admin,
        name => match std::str::from_utf8(name) {
            Ok(name) if name.starts_with(STORED) => Kind::Stored(name.to_owned()),
            _ => Kind::Other,
        },
    }
}

/// A number as strtoul reads it, blanks before it included; nothing may follow it.
fn number(text: Option<&OsStr>) -> Option<u32> {
    text?.to_str()?.trim_ascii_start().parse().ok()
}

/// Where the first `count` inherited descriptors listen. Those that are no sockets have no path.
fn paths(count: u32) -> Vec<PathBuf> {
    // More names than this cannot be at the two paths that matter.
    const LOOKED_AT: usize = 64;
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(LOOKED_AT);
    (FIRST_DESCRIPTOR..)
        .take(count)
        .filter_map(|descriptor| {
            getsockname::<UnixAddr>(descriptor)
                .ok()?
                .path()
                .map(PathBuf::from)
        })
        .collect()
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn planned(pid: &str, count: &str, names: Option<&str>) -> Plan {
        plan(
            Some(pid.as_ref()),
            Some(count.as_ref()),
            names.map(OsStr::new),
            7,
        )
    }

    #[test]
    fn descriptors_are_taken_by_name() {
        let names = "virtlockd-admin.socket:virtlockd.socket:x:virtlockd.socket:virtlockd-bag-7";
        let stored = Kind::Stored("virtlockd-bag-7".into());
        let kinds = vec![Kind::Admin, Kind::Lock, Kind::Other, Kind::Lock, stored];
        assert_eq!(planned("7", " 5", Some(names)), Plan::Take(kinds));
    }

    #[test]
    fn variables_of_another_process_and_malformed_ones_are_ignored() {
        for (pid, count) in [
            ("8", "1"),
            ("x", "1"),
            ("7x", "1"),
            ("7", "1x"),
            ("7", "0"),
            ("7", "-1"),
        ] {
            assert_eq!(
                planned(pid, count, Some("virtlockd.socket")),
                Plan::Ignore,
                "{pid} {count}"
            );
        }
    }

    #[test]
    fn names_that_do_not_fit_make_the_descriptors_unusable() {
        for (names, got) in [("", 0), ("virtlockd.socket", 1), ("a:b:c", 3)] {
            let reason = format!("internal error: Expecting 2 FD names but got {got}");
            assert_eq!(
                planned("7", "2", Some(names)),
                Plan::Unusable { reason, count: 2 }
            );
        }
        assert!(matches!(
            planned("7", "2", None),
            Plan::Unusable { count: 2, .. }
        ));
    }

    fn place(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("virtlockd-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    fn presence_at(path: &Path) -> Presence {
        presence(&UnixAddr::new(path).unwrap())
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let path = place("stale");
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(presence_at(&path), Presence::Nobody);
        let first = Listener::at(&path, &[]).unwrap();
        assert_eq!(
            Listener::at(&path, &[]).err(),
            Some(ListenError::Alive(path.clone()))
        );
        let second = Listener::at(&path, std::slice::from_ref(&path)).unwrap();
        // The end of the one that was pushed aside leaves the other's socket in place.
        first.remove();
        assert_eq!(presence_at(&path), Presence::ThisProcess);
        second.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_daemon_that_goes_on_listens_where_it_did_and_keeps_sockets_in_which_clients_may_wait() {
        let paths = |name: &str| Paths {
            lock_socket: place(&format!("{name}-lock")),
            admin_socket: place(&format!("{name}-admin")),
            ..Paths::of_this_process()
        };
        let listener = |path: &Path, is_own: bool| {
            let socket = UnixListener::bind(path).unwrap();
            Listener {
                socket: socket.into(),
                path: is_own.then(|| path.to_path_buf()),
            }
        };
        let inode = |one: &Listener| nix::sys::stat::fstat(&one.socket).unwrap().st_ino;
        // Its own go on, and nothing else is there.
        let own = paths("own");
        let before = Listeners {
            lock: vec![listener(&own.lock_socket, true)],
            admin: vec![listener(&own.admin_socket, true)],
        };
        let there = (inode(&before.lock[0]), inode(&before.admin[0]));
        let (now, old) = Listeners::open_again(Activation::None, &own, before).unwrap();
        assert_eq!((inode(&now.lock[0]), inode(&now.admin[0])), there);
        assert!(old.lock.is_empty() && old.admin.is_empty());
        // One that is not at its path any more is replaced.
        std::fs::remove_file(&own.lock_socket).unwrap();
        let (now, old) = Listeners::open_again(Activation::None, &own, now).unwrap();
        assert_eq!((inode(&old.lock[0]), inode(&now.admin[0])), there);
        assert!(own.lock_socket.exists() && old.admin.is_empty());
        // Those of a manager that does not listen any more are, too, though somebody answers there.
        let theirs = paths("theirs");
        let before = Listeners {
            lock: vec![listener(&theirs.lock_socket, false)],
            admin: vec![listener(&theirs.admin_socket, false)],
        };
        let (new, old) = Listeners::open_again(Activation::None, &theirs, before).unwrap();
        assert_eq!(new.lock[0].path.as_ref(), Some(&theirs.lock_socket));
        assert_eq!((old.lock.len(), old.admin.len()), (1, 1));
        // Those that a manager gives count, and are not there twice.
        let again = Listener {
            socket: old.lock[0].socket.try_clone().unwrap(),
            path: None,
        };
        let given = Activation::Sockets {
            lock: vec![again],
            admin: Vec::new(),
        };
        let (now, old) = Listeners::open_again(given, &theirs, old).unwrap();
        assert_eq!((now.lock.len(), now.admin.len()), (1, 0));
        assert_eq!((old.lock.len(), old.admin.len()), (0, 1));
        for path in [&own, &theirs] {
            let _ = std::fs::remove_file(&path.lock_socket);
            let _ = std::fs::remove_file(&path.admin_socket);
        }
    }

    #[test]
    fn a_full_queue_and_a_socket_of_another_type_are_alive() {
        let path = place("full");
        let socket = new_socket().unwrap();
        let address = UnixAddr::new(&path).unwrap();
        bind(socket.as_raw_fd(), &address).unwrap();
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        let waiting: Vec<OwnedFd> = (0..3).map(|_| new_socket().unwrap()).collect();
        let full = waiting
            .iter()
            .any(|one| connect(one.as_raw_fd(), &address) == Err(nix::Error::EAGAIN));
        assert!(full, "the queue of the test is not full");
        assert_eq!(presence_at(&path), Presence::Somebody);
        std::fs::remove_file(&path).unwrap();

        let _datagram = UnixDatagram::bind(&path).unwrap();
        assert_eq!(presence_at(&path), Presence::Somebody);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_path_that_is_too_long_is_said_to_be() {
        let path = PathBuf::from(format!("/{}", "x".repeat(107)));
        let error = Listener::at(&path, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "Path {} too long for unix socket: at most 107 bytes are possible",
                path.display()
            )
        );
    }
}
