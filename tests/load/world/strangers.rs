//! Somebody outside of the daemon who locks its files: with an open file's lock from this process,
//! or, as another host or an older daemon does, with a POSIX lock from a process of its own.
//!
//! The POSIX lockers must be processes of their own: a process loses its POSIX lock on a file when
//! it closes any descriptor of it, and the test opens and closes them all the time.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::model::{Kind, Mode};
use crate::support::{ForeignLock, try_foreign_lock};

/// At most one lock at a time.
pub enum Stranger {
    OpenFile(Option<ForeignLock>),
    Posix(Locker),
}

impl Stranger {
    /// Even numbers lock open files.
    pub fn new(number: usize) -> Stranger {
        if number < super::STRANGERS / 2 {
            Stranger::OpenFile(None)
        } else {
            Stranger::Posix(Locker::start())
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Stranger::OpenFile(_) => Kind::OpenFile,
            Stranger::Posix(_) => Kind::Posix,
        }
    }

    /// Whether it got the lock.
    pub fn lock(&mut self, path: &Path, mode: Mode) -> bool {
        let exclusive = mode == Mode::Exclusive;
        match self {
            Stranger::OpenFile(lock) => {
                *lock = try_foreign_lock(path, exclusive);
                lock.is_some()
            }
            Stranger::Posix(locker) => {
                let kind = if exclusive { "EX" } else { "SH" };
                locker.order(&format!("{kind} {}", path.display())) == "got it"
            }
        }
    }

    pub fn unlock(&mut self) {
        match self {
            Stranger::OpenFile(lock) => *lock = None,
            Stranger::Posix(locker) => assert_eq!(locker.order("UN -"), "let go"),
        }
    }

    /// It dies, and its lock with it; another one takes its place.
    pub fn kill(&mut self) {
        match self {
            Stranger::OpenFile(lock) => *lock = None,
            Stranger::Posix(locker) => *locker = Locker::start(),
        }
    }
}

/// A process with at most one POSIX lock.
pub struct Locker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Locker {
    fn start() -> Locker {
        let script = "
import fcntl, sys
for line in sys.stdin:
    kind, path = line.rstrip('\\n').split(' ', 1)
    if kind == 'UN':
        file.close()
        print('let go', flush=True)
        continue
    file = open(path, 'r+b')
    try:
        fcntl.lockf(file, fcntl.LOCK_NB | getattr(fcntl, 'LOCK_' + kind), 1, 0)
        print('got it', flush=True)
    except BlockingIOError:
        file.close()
        print('busy', flush=True)
";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start python3 as a process that locks files");
        Locker {
            orders: child.stdin.take().expect("stdin is a pipe"),
            answers: BufReader::new(child.stdout.take().expect("stdout is a pipe")),
            child,
        }
    }

    fn order(&mut self, line: &str) -> String {
        writeln!(self.orders, "{line}").expect("give the locker an order");
        let mut answer = String::new();
        self.answers
            .read_line(&mut answer)
            .expect("read from the locker");
        answer.trim_end().to_owned()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
