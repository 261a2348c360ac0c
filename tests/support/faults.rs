//! System calls that fail: which ones a daemon makes, with which errors each may fail, and how
//! strace makes the nth one fail without the daemon knowing of it.

use std::path::Path;

/// The system calls that are made to fail, each with errors that its manual lists and that a host in
/// trouble really gives: no memory, no descriptors, a full or broken disk, missing rights, a signal.
/// Errors that only a mistake in the program can bring (EBADF, EFAULT, most of EINVAL) are not among
/// them.
pub const FAILING: &[(&str, &str)] = &[
    (
        "accept4",
        "EMFILE ENFILE ENOMEM ENOBUFS ECONNABORTED EINTR EPERM EPROTO",
    ),
    ("access", "EACCES ENOENT ENOMEM EIO"),
    ("bind", "EACCES EADDRINUSE ENOMEM EROFS ENOSPC"),
    ("clone", "EAGAIN ENOMEM EPERM"),
    ("clone3", "EAGAIN ENOMEM EPERM ENOSYS"),
    ("connect", "EACCES EPERM EAGAIN EINTR"),
    ("dup3", "EMFILE EBUSY EINTR"),
    ("epoll_create1", "EMFILE ENFILE ENOMEM"),
    ("epoll_ctl", "ENOMEM ENOSPC"),
    ("epoll_wait", "EINTR"),
    (
        "execve",
        "EACCES ENOENT ENOMEM ETXTBSY EIO EMFILE ENFILE EPERM EAGAIN",
    ),
    ("fallocate", "ENOSPC ENOMEM EINTR EFBIG EPERM EOPNOTSUPP"),
    ("fcntl", "ENOLCK EAGAIN EACCES EINTR EMFILE EPERM"),
    ("flock", "EINTR ENOLCK EAGAIN"),
    ("fstat", "ENOMEM EIO EOVERFLOW"),
    ("fstatfs", "ENOMEM EACCES EINTR"),
    ("ftruncate", "EIO EINTR EPERM"),
    ("getcwd", "EACCES ENOENT ENOMEM"),
    ("getrandom", "EINTR ENOSYS"),
    ("getsockopt", "EMFILE ENFILE ENOMEM"),
    ("ioctl", "ENOTTY EIO"),
    ("listen", "EADDRINUSE EOPNOTSUPP"),
    ("madvise", "EAGAIN ENOMEM"),
    ("memfd_create", "EMFILE ENFILE ENOMEM"),
    ("mkdir", "EACCES ENOSPC EROFS ENOMEM EDQUOT"),
    ("mmap", "ENOMEM EAGAIN ENFILE EPERM"),
    ("mprotect", "ENOMEM EACCES"),
    ("mremap", "ENOMEM EAGAIN"),
    ("newfstatat", "ENOMEM EACCES EIO EOVERFLOW ESTALE"),
    (
        "openat",
        "EMFILE ENFILE ENOMEM EACCES EPERM EROFS ENOSPC EDQUOT EINTR EIO ELOOP",
    ),
    (
        "openat2",
        "EMFILE ENFILE ENOMEM EACCES EPERM EROFS ENOSPC EDQUOT EAGAIN EINTR EIO EXDEV ENOSYS",
    ),
    ("pidfd_open", "EMFILE ENFILE ENOMEM"),
    ("pidfd_send_signal", "EPERM"),
    ("pipe2", "EMFILE ENFILE"),
    ("poll", "EINTR ENOMEM"),
    ("pread64", "EIO EINTR"),
    ("prlimit64", "EPERM"),
    ("read", "EINTR EIO"),
    ("readlink", "EACCES EIO ENOMEM"),
    ("recvmmsg", "EINTR ENOMEM ENOBUFS ECONNRESET"),
    ("sendmmsg", "EAGAIN EINTR ENOBUFS ENOMEM EPIPE ECONNRESET"),
    ("rename", "EACCES EBUSY ENOSPC ENOMEM EPERM EROFS"),
    ("signalfd4", "EMFILE ENFILE ENOMEM ENODEV"),
    ("socket", "EMFILE ENFILE ENOBUFS ENOMEM EACCES"),
    ("socketpair", "EMFILE ENFILE ENOMEM"),
    ("statx", "ENOMEM EACCES EIO ENOENT ESTALE"),
    ("timerfd_create", "EMFILE ENFILE ENOMEM ENODEV"),
    ("unlink", "EACCES EBUSY EIO ENOMEM EPERM EROFS"),
    ("unlinkat", "EACCES EBUSY EIO ENOMEM EPERM EROFS"),
    ("wait4", "EINTR ECHILD"),
    ("waitid", "EINTR ECHILD"),
    ("write", "ENOSPC EIO EINTR EDQUOT EFBIG EPIPE EAGAIN"),
];

/// The least that a daemon has to call in the story, so that it can fail: if one of these is not seen,
/// it is strace or the story that does not do what it should.
pub const ESSENTIAL: &[&str] = &[
    "accept4",
    "epoll_ctl",
    "epoll_wait",
    "execve",
    "fallocate",
    "fcntl",
    "getsockopt",
    "memfd_create",
    "mmap",
    "mremap",
    "newfstatat",
    "openat",
    "openat2",
    "pidfd_open",
    "pidfd_send_signal",
    "read",
    "recvmmsg",
    "sendmmsg",
    "statx",
    "unlink",
    "write",
];

/// The system calls that are not made to fail, and why.
pub const LEFT_ALONE: &[(&str, &str)] = &[
    (
        "brk",
        "it says no with the old end of the heap, which strace cannot; then mmap is asked",
    ),
    ("uname", "it cannot fail"),
    ("lseek", "it cannot fail"),
    ("arch_prctl", ONLY_MISTAKES),
    (
        "close",
        "it closes whatever it says; strace would keep it from closing",
    ),
    ("exit_group", "it does not come back"),
    ("geteuid", "it cannot fail"),
    ("getpid", "it cannot fail"),
    ("gettid", "it cannot fail"),
    ("munmap", "strace would keep it from giving the memory back"),
    ("rseq", "the C library's start; it goes on without"),
    ("rt_sigaction", ONLY_MISTAKES),
    ("rt_sigprocmask", ONLY_MISTAKES),
    (
        "sched_getaffinity",
        "the runtime's start; it goes on without",
    ),
    ("set_robust_list", ONLY_MISTAKES),
    ("set_tid_address", "it cannot fail"),
    ("sigaltstack", ONLY_MISTAKES),
    ("timerfd_settime", ONLY_MISTAKES),
    ("umask", "it cannot fail"),
];

const ONLY_MISTAKES: &str = "only a mistake in the program makes it fail";

/// One failure: the `nth` call of this name, counted from 1 over the life of the process, fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
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
const PROBE: &str = "socketpair";
/// With an error that does not pass: the daemon would try again.
const PROBE_ERROR: &str = "EOPNOTSUPP";

impl std::fmt::Display for Fault {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}:{}", self.call, self.error, self.nth)?;
        match self.kernel {
            Kernel::This => Ok(()),
            Kernel::NamesNoPeers => write!(out, " where the kernel names no peers"),
        }
    }
}

/// The words of a command line in front of the daemon's own: strace, which writes what it sees to
/// `output` and makes one call fail, or none.
pub fn strace_words(fault: Option<&Fault>, kernel: Kernel, output: &str) -> Vec<String> {
    // -D: the daemon is the process that was started, and strace its grandchild. -y: descriptors are
    // shown with what they are of.
    let mut words: Vec<String> = ["strace", "-D", "-q", "-y", "-o", output]
        .map(str::to_owned)
        .into();
    if kernel == Kernel::NamesNoPeers {
        words.push(format!("--inject={PROBE}:error={PROBE_ERROR}"));
    }
    if let Some(Fault {
        call, error, nth, ..
    }) = fault
    {
        words.push(format!("--trace={call},{PROBE}"));
        words.push(format!("--inject={call}:error={error}:when={nth}"));
    }
    words
}

/// The calls in a trace, each as its name and its line.
pub fn calls(trace: &str) -> impl Iterator<Item = (&str, &str)> {
    trace.lines().filter_map(|line| {
        let (name, _) = line.split_once('(')?;
        let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        name.chars().all(is_name).then_some((name, line))
    })
}

/// The line of the call that was made to fail, if it came to that.
pub fn injected<'a>(trace: &'a str, fault: &Fault) -> Option<&'a str> {
    let is_it = |(name, line): &(&str, &str)| *name == fault.call && line.contains("(INJECTED)");
    calls(trace).find(is_it).map(|(_, line)| line)
}

/// Whether strace has seen the end of the process.
pub fn is_complete(trace: &str) -> bool {
    trace
        .lines()
        .next_back()
        .is_some_and(|line| line.starts_with("+++"))
}

/// Waits for strace to have seen the end of the process; what it wrote down.
pub fn complete_trace(path: &Path) -> String {
    super::wait_for(super::DEADLINE, "the end of strace", || {
        let trace = std::fs::read_to_string(path).unwrap_or_default();
        is_complete(&trace).then_some(trace)
    })
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
        ("fcntl", "EMFILE") => !is_about(&["F_DUPFD"]),
        ("fcntl", _) => is_about(&["F_DUPFD"]) || cannot_fail(line),
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
