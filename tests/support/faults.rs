//! System calls that fail: which ones a daemon makes, with which errors each may fail, and in which of its
//! processes.

use nix::errno::Errno;

/// What one of the daemon's processes is for. The calls of each are counted for themselves, over all
/// processes that come after one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The process that was started, from its first step, and what it becomes by an upgrade.
    Guardian,
    /// The processes that serve.
    Reactor,
    /// The copies of the guardian that go on should a successor not serve.
    Understudy,
    /// The processes that write notes into lease files.
    Scribe,
}

impl Role {
    pub const ALL: [Role; 4] = [
        Role::Guardian,
        Role::Reactor,
        Role::Understudy,
        Role::Scribe,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Role::Guardian => "guardian",
            Role::Reactor => "reactor",
            Role::Understudy => "understudy",
            Role::Scribe => "scribe",
        }
    }

    pub fn of(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// What an argument of a system call is, where that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    Number,
    Descriptor,
    Path,
    /// Of fcntl(2).
    Command,
}

/// A system call that is made to fail.
#[derive(Debug)]
pub struct Failing {
    pub name: &'static str,
    number: i64,
    /// Its first arguments.
    arguments: &'static [Of],
    /// The names of its errors, with blanks in between.
    pub errors: &'static str,
}

const fn failing(
    name: &'static str,
    number: i64,
    arguments: &'static [Of],
    errors: &'static str,
) -> Failing {
    Failing {
        name,
        number,
        arguments,
        errors,
    }
}

/// A system call's name, and what its first arguments are.
pub fn call(number: u64) -> (String, &'static [Of]) {
    let number = number.cast_signed();
    let failing = FAILING.iter().find(|it| it.number == number);
    let alone = LEFT_ALONE.iter().find(|it| it.1 == number);
    match (failing, alone) {
        (Some(failing), _) => (failing.name.to_owned(), failing.arguments),
        (None, Some((name, ..))) => ((*name).to_owned(), &[]),
        (None, None) => (format!("call_{number}"), &[]),
    }
}

/// The number of a call that is made to fail.
pub fn number(name: &str) -> Option<i64> {
    let found = FAILING.iter().find(|it| it.name == name);
    found.map(|it| it.number)
}

/// The number of an error.
pub fn errno(name: &str) -> i32 {
    let found = (1..200).find(|number| format!("{:?}", Errno::from_raw(*number)) == name);
    found.unwrap_or_else(|| panic!("there is no error {name}"))
}

/// The system calls that are made to fail, each with errors that its manual lists and that a host in
/// trouble really gives: no memory, no descriptors, a full or broken disk, missing rights, a signal.
/// Errors that only a mistake in the program can bring (EBADF, EFAULT, most of EINVAL) are not among
/// them.
pub const FAILING: &[Failing] = &[
    failing(
        "accept4",
        libc::SYS_accept4,
        &[Of::Descriptor],
        "EMFILE ENFILE ENOMEM ENOBUFS ECONNABORTED EINTR EPERM EPROTO",
    ),
    failing(
        "access",
        libc::SYS_access,
        &[Of::Path],
        "EACCES ENOENT ENOMEM EIO",
    ),
    failing(
        "bind",
        libc::SYS_bind,
        &[Of::Descriptor],
        "EACCES EADDRINUSE ENOMEM EROFS ENOSPC",
    ),
    failing("clock_nanosleep", libc::SYS_clock_nanosleep, &[], "EINTR"),
    failing("clone", libc::SYS_clone, &[], "EAGAIN ENOMEM EPERM"),
    failing(
        "clone3",
        libc::SYS_clone3,
        &[],
        "EAGAIN ENOMEM EPERM ENOSYS",
    ),
    failing("close_range", libc::SYS_close_range, &[], "ENOSYS EPERM"),
    failing(
        "connect",
        libc::SYS_connect,
        &[Of::Descriptor],
        "EACCES EPERM EAGAIN EINTR",
    ),
    failing(
        "dup2",
        libc::SYS_dup2,
        &[Of::Descriptor, Of::Number],
        "EMFILE EBUSY EINTR",
    ),
    failing(
        "dup3",
        libc::SYS_dup3,
        &[Of::Descriptor, Of::Number],
        "EMFILE EBUSY EINTR",
    ),
    failing(
        "epoll_create1",
        libc::SYS_epoll_create1,
        &[],
        "EMFILE ENFILE ENOMEM",
    ),
    failing(
        "epoll_ctl",
        libc::SYS_epoll_ctl,
        &[Of::Descriptor],
        "ENOMEM ENOSPC",
    ),
    failing(
        "epoll_wait",
        libc::SYS_epoll_wait,
        &[Of::Descriptor],
        "EINTR",
    ),
    failing(
        "execve",
        libc::SYS_execve,
        &[Of::Path],
        "EACCES ENOENT ENOMEM ETXTBSY EIO EMFILE ENFILE EPERM EAGAIN",
    ),
    failing(
        "fallocate",
        libc::SYS_fallocate,
        &[Of::Descriptor],
        "ENOSPC ENOMEM EINTR EFBIG EPERM EOPNOTSUPP",
    ),
    failing(
        "fcntl",
        libc::SYS_fcntl,
        &[Of::Descriptor, Of::Command],
        "ENOLCK EAGAIN EACCES EINTR EMFILE EPERM",
    ),
    failing(
        "flock",
        libc::SYS_flock,
        &[Of::Descriptor],
        "EINTR ENOLCK EAGAIN",
    ),
    failing(
        "fstat",
        libc::SYS_fstat,
        &[Of::Descriptor],
        "ENOMEM EIO EOVERFLOW",
    ),
    failing(
        "fstatfs",
        libc::SYS_fstatfs,
        &[Of::Descriptor],
        "ENOMEM EACCES EINTR",
    ),
    failing(
        "ftruncate",
        libc::SYS_ftruncate,
        &[Of::Descriptor],
        "EIO EINTR EPERM",
    ),
    failing("getcwd", libc::SYS_getcwd, &[], "EACCES ENOENT ENOMEM"),
    failing("getrandom", libc::SYS_getrandom, &[], "EINTR ENOSYS"),
    failing(
        "getsockopt",
        libc::SYS_getsockopt,
        &[Of::Descriptor],
        "EMFILE ENFILE ENOMEM",
    ),
    failing("ioctl", libc::SYS_ioctl, &[Of::Descriptor], "ENOTTY EIO"),
    failing("kill", libc::SYS_kill, &[Of::Number], "EPERM"),
    failing(
        "linkat",
        libc::SYS_linkat,
        &[Of::Number, Of::Path],
        "ENOMEM EACCES EIO EPERM ENOENT",
    ),
    failing(
        "listen",
        libc::SYS_listen,
        &[Of::Descriptor],
        "EADDRINUSE EOPNOTSUPP",
    ),
    failing("madvise", libc::SYS_madvise, &[], "EAGAIN ENOMEM"),
    failing(
        "memfd_create",
        libc::SYS_memfd_create,
        &[],
        "EMFILE ENFILE ENOMEM",
    ),
    failing(
        "mkdir",
        libc::SYS_mkdir,
        &[Of::Path],
        "EACCES ENOSPC EROFS ENOMEM EDQUOT",
    ),
    failing("mmap", libc::SYS_mmap, &[], "ENOMEM EAGAIN ENFILE EPERM"),
    failing("mprotect", libc::SYS_mprotect, &[], "ENOMEM EACCES"),
    failing("mremap", libc::SYS_mremap, &[], "ENOMEM EAGAIN"),
    failing(
        "newfstatat",
        libc::SYS_newfstatat,
        &[Of::Descriptor, Of::Path],
        "ENOMEM EACCES EIO EOVERFLOW ESTALE",
    ),
    failing(
        "openat",
        libc::SYS_openat,
        &[Of::Descriptor, Of::Path],
        "EMFILE ENFILE ENOMEM EACCES EPERM EROFS ENOSPC EDQUOT EINTR EIO ELOOP",
    ),
    failing(
        "openat2",
        libc::SYS_openat2,
        &[Of::Descriptor, Of::Path],
        "EMFILE ENFILE ENOMEM EACCES EPERM EROFS ENOSPC EDQUOT EAGAIN EINTR EIO EXDEV ENOSYS",
    ),
    failing(
        "pidfd_open",
        libc::SYS_pidfd_open,
        &[Of::Number],
        "EMFILE ENFILE ENOMEM",
    ),
    failing(
        "pidfd_send_signal",
        libc::SYS_pidfd_send_signal,
        &[Of::Descriptor],
        "EPERM",
    ),
    failing("pipe2", libc::SYS_pipe2, &[], "EMFILE ENFILE"),
    failing("poll", libc::SYS_poll, &[], "EINTR ENOMEM"),
    failing("prctl", libc::SYS_prctl, &[Of::Number], "EPERM EINVAL"),
    failing("pread64", libc::SYS_pread64, &[Of::Descriptor], "EIO EINTR"),
    failing("prlimit64", libc::SYS_prlimit64, &[], "EPERM"),
    failing(
        "pwrite64",
        libc::SYS_pwrite64,
        &[Of::Descriptor],
        "ENOSPC EIO EINTR",
    ),
    failing("read", libc::SYS_read, &[Of::Descriptor], "EINTR EIO"),
    failing(
        "readlink",
        libc::SYS_readlink,
        &[Of::Path],
        "EACCES EIO ENOMEM",
    ),
    failing(
        "recvfrom",
        libc::SYS_recvfrom,
        &[Of::Descriptor],
        "EINTR ENOMEM",
    ),
    failing(
        "recvmsg",
        libc::SYS_recvmsg,
        &[Of::Descriptor],
        "ENOMEM ENOBUFS EINTR",
    ),
    failing(
        "recvmmsg",
        libc::SYS_recvmmsg,
        &[Of::Descriptor],
        "EINTR ENOMEM ENOBUFS ECONNRESET",
    ),
    failing(
        "rename",
        libc::SYS_rename,
        &[Of::Path, Of::Path],
        "EACCES EBUSY ENOSPC ENOMEM EPERM EROFS",
    ),
    failing("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &[], "EINTR"),
    failing(
        "sendmmsg",
        libc::SYS_sendmmsg,
        &[Of::Descriptor],
        "EAGAIN EINTR ENOBUFS ENOMEM EPIPE ECONNRESET",
    ),
    failing(
        "sendmsg",
        libc::SYS_sendmsg,
        &[Of::Descriptor],
        "EAGAIN EINTR ENOBUFS ENOMEM EPIPE",
    ),
    failing(
        "sendto",
        libc::SYS_sendto,
        &[Of::Descriptor],
        "EAGAIN EINTR ENOBUFS ECONNREFUSED",
    ),
    failing("setpgid", libc::SYS_setpgid, &[], "EPERM EACCES"),
    failing(
        "signalfd4",
        libc::SYS_signalfd4,
        &[Of::Descriptor],
        "EMFILE ENFILE ENOMEM ENODEV",
    ),
    failing(
        "socket",
        libc::SYS_socket,
        &[],
        "EMFILE ENFILE ENOBUFS ENOMEM EACCES",
    ),
    failing(
        "socketpair",
        libc::SYS_socketpair,
        &[],
        "EMFILE ENFILE ENOMEM",
    ),
    failing(
        "statx",
        libc::SYS_statx,
        &[Of::Descriptor, Of::Path],
        "ENOMEM EACCES EIO ENOENT ESTALE",
    ),
    failing(
        "timerfd_create",
        libc::SYS_timerfd_create,
        &[],
        "EMFILE ENFILE ENOMEM ENODEV",
    ),
    failing(
        "unlink",
        libc::SYS_unlink,
        &[Of::Path],
        "EACCES EBUSY EIO ENOMEM EPERM EROFS",
    ),
    failing(
        "unlinkat",
        libc::SYS_unlinkat,
        &[Of::Descriptor, Of::Path],
        "EACCES EBUSY EIO ENOMEM EPERM EROFS",
    ),
    failing("wait4", libc::SYS_wait4, &[Of::Number], "EINTR ECHILD"),
    failing("waitid", libc::SYS_waitid, &[], "EINTR ECHILD"),
    failing(
        "write",
        libc::SYS_write,
        &[Of::Descriptor],
        "ENOSPC EIO EINTR EDQUOT EFBIG EPIPE EAGAIN",
    ),
];

/// The least that a daemon has to call in the story, so that it can fail: if one of these is not seen,
/// it is the injector or the story that does not do what it should.
pub const ESSENTIAL: &[(Role, &[&str])] = &[
    (
        Role::Guardian,
        &["clone", "execve", "mmap", "rt_sigtimedwait", "wait4"],
    ),
    (
        Role::Reactor,
        &[
            "accept4",
            "epoll_ctl",
            "epoll_wait",
            "fallocate",
            "fcntl",
            "getsockopt",
            "kill",
            "mmap",
            "mremap",
            "newfstatat",
            "openat",
            "openat2",
            "pidfd_open",
            "pidfd_send_signal",
            "read",
            "recvmmsg",
            "rename",
            "sendmmsg",
            "statx",
            "unlink",
            "write",
        ],
    ),
    (Role::Understudy, &["poll"]),
    (
        Role::Scribe,
        &["close_range", "openat", "prctl", "pwrite64", "recvfrom"],
    ),
];

/// The system calls that are not made to fail, and why.
pub const LEFT_ALONE: &[(&str, i64, &str)] = &[
    (
        "brk",
        libc::SYS_brk,
        "it says no with the old end of the heap, which strace cannot; then mmap is asked",
    ),
    ("uname", libc::SYS_uname, "it cannot fail"),
    ("lseek", libc::SYS_lseek, "it cannot fail"),
    ("arch_prctl", libc::SYS_arch_prctl, ONLY_MISTAKES),
    (
        "close",
        libc::SYS_close,
        "it closes whatever it says; strace would keep it from closing",
    ),
    ("exit_group", libc::SYS_exit_group, "it does not come back"),
    ("shutdown", libc::SYS_shutdown, ONLY_MISTAKES),
    ("geteuid", libc::SYS_geteuid, "it cannot fail"),
    ("getpid", libc::SYS_getpid, "it cannot fail"),
    ("getppid", libc::SYS_getppid, "it cannot fail"),
    ("gettid", libc::SYS_gettid, "it cannot fail"),
    (
        "munmap",
        libc::SYS_munmap,
        "strace would keep it from giving the memory back",
    ),
    (
        "rseq",
        libc::SYS_rseq,
        "the C library's start; it goes on without",
    ),
    ("rt_sigaction", libc::SYS_rt_sigaction, ONLY_MISTAKES),
    ("rt_sigprocmask", libc::SYS_rt_sigprocmask, ONLY_MISTAKES),
    (
        "sched_getaffinity",
        libc::SYS_sched_getaffinity,
        "the runtime's start; it goes on without",
    ),
    ("set_robust_list", libc::SYS_set_robust_list, ONLY_MISTAKES),
    (
        "set_tid_address",
        libc::SYS_set_tid_address,
        "it cannot fail",
    ),
    ("sigaltstack", libc::SYS_sigaltstack, ONLY_MISTAKES),
    ("timerfd_settime", libc::SYS_timerfd_settime, ONLY_MISTAKES),
    ("umask", libc::SYS_umask, "it cannot fail"),
];

const ONLY_MISTAKES: &str = "only a mistake in the program makes it fail";

/// One failure: the `nth` call of this name by a process of this role, counted from 1, fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub role: Role,
    pub call: &'static str,
    pub error: &'static str,
    pub nth: usize,
    pub kernel: Kernel,
}

/// What the kernel can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// What this one can.
    This,
    /// It does not name the process of a peer (SO_PEERPIDFD, Linux 6.5). The daemon finds that out with
    /// a pair of sockets, and is never given one.
    NamesNoPeers,
}

/// The call that fails on a kernel that names no peers.
pub const PROBE_NUMBER: u64 = libc::SYS_socketpair as u64;
/// With an error that does not pass: the daemon would try again.
pub const PROBE_ERRNO: i64 = libc::EOPNOTSUPP as i64;

impl std::fmt::Display for Fault {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Fault {
            role,
            call,
            error,
            nth,
            kernel,
        } = self;
        write!(out, "{}:{call}:{error}:{nth}", role.name())?;
        match kernel {
            Kernel::This => Ok(()),
            Kernel::NamesNoPeers => write!(out, " where the kernel names no peers"),
        }
    }
}

/// Whether a call cannot fail, though others of its name can. The standard library also looks whether
/// a descriptor is open before it closes it, in a debug build.
pub fn cannot_fail(line: &str) -> bool {
    ["F_GETFD", "F_SETFD", "F_GETFL", "F_SETFL"]
        .iter()
        .any(|command| line.contains(command))
}

/// Whether a call serves to find and follow a process on a kernel that names no peers.
pub fn is_about_processes(line: &str) -> bool {
    ["/stat\"", "/stat>", "pidfd_open("]
        .iter()
        .any(|word| line.contains(word))
}

/// Whether the kernel would never have given this error for this call: then nothing follows from
/// what the daemon made of it.
pub fn is_untrue(fault: &Fault, line: &str) -> bool {
    let is_about = |words: &[&str]| words.iter().any(|word| line.contains(word));
    match (fault.call, fault.error) {
        // It has a child while it has a reactor, and where it has none it is told so by the kernel.
        ("wait4", "ECHILD") => fault.role == Role::Guardian,
        ("fcntl", "EMFILE") => !is_about(&["F_DUPFD"]),
        ("fcntl", _) => is_about(&["F_DUPFD"]) || cannot_fail(line),
        // A name is always had (PR_SET_NAME).
        ("prctl", _) => is_about(&["prctl(0xf)"]),
        // Root is not denied this, and there is no disk behind it.
        ("openat", "EACCES" | "EPERM" | "EROFS" | "ENOSPC" | "EDQUOT" | "EIO" | "ELOOP") => {
            is_about(&["\"/proc/"])
        }
        ("read", "EIO") if is_about(&["</proc/"]) => true,
        // There is no disk and no network behind these.
        (_, "EIO" | "ESTALE") => is_about(&["<anon_inode:", "<pipe:", "<socket:", "</memfd:"]),
        _ => false,
    }
}
