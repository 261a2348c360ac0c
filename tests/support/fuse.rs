//! A share: a file system whose server is a thread of the test and speaks the kernel's FUSE protocol
//! (linux/fuse.h) itself. It keeps the locks, as the server of a cluster does, and shows them; it lets
//! go of one when it is told to, and perhaps when a file is closed ([`Habits`]); and each kind of call
//! can be made to fail, to take its time or to hang ([`Trouble`]), for all files or for one. It tells what is
//! asked of it at this moment and which files are open. It is mounted in the daemon's mount namespace, where
//! there may be several.
//!
//! There is one directory of flat files. What is written to one at its beginning is kept.

use super::namespace::Namespace;
use super::{DEADLINE, skip, wait_until};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// When the server lets go of a lock, besides when it is told to, and what it says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Habits {
    /// When any descriptor of the file is closed by the process whose lock it is (FLUSH, which names the
    /// process: a POSIX lock goes, that of an open file does not).
    pub drops_on_flush: bool,
    /// When the open file that locked is closed for good (RELEASE).
    pub drops_on_release: bool,
    /// Whether it says which process has a lock.
    pub names_processes: bool,
}

impl Habits {
    /// Every kind of server.
    pub fn all() -> impl Iterator<Item = Habits> {
        (0..8).map(|bits| Habits {
            drops_on_flush: bits & 1 != 0,
            drops_on_release: bits & 2 != 0,
            names_processes: bits & 4 != 0,
        })
    }

    /// One that keeps a lock until it is told to let go.
    pub fn tenacious() -> Habits {
        Habits {
            drops_on_flush: false,
            drops_on_release: false,
            names_processes: false,
        }
    }
}

/// What a share is asked to do. Nobody waits for [`Operation::Release`]: the kernel asks for it on the side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    LookUp,
    GetAttributes,
    Open,
    Create,
    Lock,
    Unlock,
    GetLock,
    Unlink,
    Flush,
    Release,
    Write,
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 11] = [
        Operation::LookUp,
        Operation::GetAttributes,
        Operation::Open,
        Operation::Create,
        Operation::Lock,
        Operation::Unlock,
        Operation::GetLock,
        Operation::Unlink,
        Operation::Flush,
        Operation::Release,
        Operation::Write,
    ];
}

/// What goes wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It is not done.
    Fails(Errno),
    /// It is done, and said to have failed.
    IsDoneAndFails(Errno),
    /// It takes this long.
    Takes(Duration),
    /// It is not begun until the trouble is over ([`Share::mend`]) or another one, which it has then.
    Hangs,
}

/// A mounted share. Its server ends when it is dropped; whatever hangs then fails.
pub struct Share {
    control: Arc<Control>,
    server: Option<JoinHandle<()>>,
    inside: String,
    outside: PathBuf,
}

impl Share {
    /// Mounts one at `/run/NAME` of the namespace. `None`, said aloud, where there is no FUSE.
    pub fn mount(namespace: &Namespace, name: &str, habits: Habits) -> Option<Share> {
        Share::mount_with(namespace, name, habits, KEEPS_LOCKS)
    }

    /// One whose server is not asked for locks: the kernel keeps them.
    pub fn mount_lockless(namespace: &Namespace, name: &str) -> Option<Share> {
        Share::mount_with(namespace, name, Habits::tenacious(), 0)
    }

    fn mount_with(
        namespace: &Namespace,
        name: &str,
        habits: Habits,
        abilities: u32,
    ) -> Option<Share> {
        let open = File::options().read(true).write(true).open("/dev/fuse");
        let Ok(device) = open else {
            skip("needs /dev/fuse");
            return None;
        };
        let inside = format!("/run/{name}");
        let outside = namespace.path(&inside);
        std::fs::create_dir(&outside).expect("make the share's directory");
        // The descriptor is the command's stdin. -i: without the program that FUSE libraries bring.
        let mounted = namespace
            .command("mount")
            .args(["-i", "-t", "fuse", "-o"])
            .arg("fd=0,rootmode=40000,user_id=0,group_id=0,allow_other")
            .args([&server_of(name), &inside])
            .stdin(Stdio::from(device.try_clone().expect("copy /dev/fuse")))
            .output()
            .expect("run mount");
        if !mounted.status.success() {
            let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
            skip(&format!("needs to mount a FUSE file system: {said}"));
            return None;
        }
        let control = Arc::new(Control {
            habits,
            abilities,
            state: Mutex::default(),
            changed: Condvar::new(),
            is_over: AtomicBool::new(false),
        });
        let server = std::thread::spawn({
            let control = control.clone();
            move || serve(&Arc::new(device), &control)
        });
        Some(Share {
            control,
            server: Some(server),
            inside,
            outside,
        })
    }

    /// What it is mounted from, as the kernel lists it.
    pub fn server(&self) -> String {
        let name = self.inside.rsplit('/').next();
        server_of(name.expect("a share has a name"))
    }

    /// A file's path in the namespace.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.inside)
    }

    /// The share's directory in the namespace: a lockspace, perhaps.
    pub fn directory(&self) -> &str {
        &self.inside
    }

    /// A file's path for this process.
    pub fn outside(&self, name: &str) -> PathBuf {
        self.outside.join(name)
    }

    /// Puts an empty file there, as another host would. One of that name is replaced.
    pub fn put(&self, name: &str) {
        let mut state = self.control.state();
        state.unlink(name);
        state.create(name);
    }

    /// What is in a file from now on, as another host wrote it.
    pub fn fill(&self, name: &str, content: &[u8]) {
        let mut state = self.control.state();
        let node = *state.names.get(name).expect("the file is there");
        state.sizes.insert(node, content.len() as u64);
        state.contents.insert(node, content.to_vec());
    }

    /// Takes a file away, as another host would.
    pub fn remove(&self, name: &str) {
        assert!(self.control.state().unlink(name), "there is a {name}");
    }

    /// From now on the kernel may believe for so long what it was told a name leads to.
    pub fn let_names_be_remembered(&self, time: Duration) {
        self.control.state().remembered = time;
    }

    /// The names of the files that are there.
    pub fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = self.control.state().names.keys().cloned().collect();
        names.sort();
        names
    }

    /// What the server has locked, each as `NAME read` or `NAME write`; a file without a name is `?`.
    pub fn locks(&self) -> Vec<String> {
        let state = self.control.state();
        let describe = |lock: &Held| {
            let name = state.names.iter().find(|(_, node)| **node == lock.node);
            let name = name.map_or("?", |(name, _)| name);
            format!("{name} {}", if lock.exclusive { "write" } else { "read" })
        };
        let mut locks: Vec<String> = state.locks.iter().map(describe).collect();
        locks.sort();
        locks
    }

    /// Waits for the server to have exactly these locks: the kernel tells it of a closed file later.
    #[track_caller]
    pub fn wait_locks(&self, expected: &[&str], when: &str) {
        let end = Instant::now() + Duration::from_secs(5);
        while self.locks() != expected {
            assert!(
                Instant::now() < end,
                "{when}, {:?}: {:?} is locked, not {expected:?}",
                self.control.habits,
                self.locks()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Another host has locked a file. (As [`Share::lose_locks`] first, if one of ours is on it.)
    pub fn stranger_locks(&self, name: &str, exclusive: bool) {
        let mut state = self.control.state();
        let node = *state.names.get(name).expect("the stranger's file is there");
        state.locks.push(Held {
            node,
            exclusive,
            owner: u64::MAX,
            file: 0,
            pid: 0,
        });
    }

    /// The server forgets all its locks.
    pub fn lose_locks(&self) {
        self.control.state().locks.clear();
    }

    /// From now on this happens to so many of these operations.
    pub fn trouble(&self, operation: Operation, trouble: Trouble, times: usize) {
        let mut state = self.control.state();
        state.troubles.insert((operation, None), (trouble, times));
    }

    /// The same with one file alone, which is meant by the name that it has or had when it was made.
    pub fn trouble_with(&self, name: &str, operation: Operation, trouble: Trouble, times: usize) {
        let mut state = self.control.state();
        let key = (operation, Some(name.to_owned()));
        state.troubles.insert(key, (trouble, times));
    }

    /// From now on these operations hang, until they are mended.
    pub fn hang(&self, operation: Operation) {
        self.trouble(operation, Trouble::Hangs, usize::MAX);
    }

    /// From now on everything hangs.
    pub fn hang_all(&self) {
        Operation::ALL.iter().for_each(|it| self.hang(*it));
    }

    /// From now on everything takes so long.
    pub fn slow_down(&self, time: Duration) {
        let slow = |it: &Operation| self.trouble(*it, Trouble::Takes(time), usize::MAX);
        Operation::ALL.iter().for_each(slow);
    }

    /// The trouble with these operations is over, and what hangs goes on.
    pub fn mend(&self, operation: Operation) {
        let is_other = |key: &Key| key.0 != operation;
        self.control.state().troubles.retain(|key, _| is_other(key));
        self.control.changed.notify_all();
    }

    /// All trouble is over.
    pub fn mend_all(&self) {
        self.control.state().troubles.clear();
        self.control.changed.notify_all();
    }

    /// How many of these operations wait for the trouble to be over.
    pub fn hanging(&self, operation: Operation) -> usize {
        let state = self.control.state();
        state.waiting.get(&operation).copied().unwrap_or(0)
    }

    /// Waits until one of these hangs.
    #[track_caller]
    pub fn wait_hanging(&self, operation: Operation) {
        wait_until(DEADLINE, &format!("{operation:?} to hang"), || {
            self.hanging(operation) > 0
        });
    }

    /// How many operations were slow or hung at the same time, at most. (Not those for which nobody waits.)
    pub fn most_at_once(&self) -> usize {
        self.control.state().most_at_once
    }

    /// The files that somebody has open, each once for each time that it is.
    pub fn open_files(&self) -> Vec<String> {
        let state = self.control.state();
        let name = |node: &u64| state.called.get(node).cloned().unwrap_or("?".into());
        let mut files: Vec<String> = state.open.values().map(name).collect();
        files.sort();
        files
    }

    /// Waits until nothing was asked for a while, and nothing hangs: who works on the share has come to an end.
    #[track_caller]
    pub fn wait_quiet(&self) {
        let a_while = Duration::from_millis(100);
        wait_until(DEADLINE, "the share to be left alone", || {
            let state = self.control.state();
            let is_idle = state.waiting.values().all(|count| *count == 0);
            is_idle && state.last_asked.is_none_or(|last| last.elapsed() > a_while)
        });
    }

    /// Waits until nobody has any file open.
    #[track_caller]
    pub fn wait_closed(&self, when: &str) {
        let end = Instant::now() + Duration::from_secs(5);
        while !self.open_files().is_empty() {
            assert!(
                Instant::now() < end,
                "{when}: {:?} open still",
                self.open_files()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How often this was asked for.
    pub fn calls(&self, operation: Operation) -> usize {
        let state = self.control.state();
        state.calls.get(&operation).copied().unwrap_or(0)
    }

    /// Waits until so many of these operations were asked for.
    pub fn wait_calls(&self, operation: Operation, count: usize) {
        wait_until(DEADLINE, &format!("{count} times {operation:?}"), || {
            self.calls(operation) >= count
        });
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.control.is_over.store(true, Ordering::Relaxed);
        self.control.changed.notify_all();
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// What the test and the server share.
struct Control {
    habits: Habits,
    /// What the kernel is told at the beginning that the server can do.
    abilities: u32,
    state: Mutex<State>,
    changed: Condvar,
    is_over: AtomicBool,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the share's state")
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// The number of the root directory.
const ROOT: u64 = 1;

/// What a trouble is with: an operation, on any file or on this one.
type Key = (Operation, Option<String>);

/// How the mount of a share of this name is listed.
fn server_of(name: &str) -> String {
    format!("server:/{name}")
}

#[derive(Default)]
struct State {
    names: HashMap<String, u64>,
    sizes: HashMap<u64, u64>,
    contents: HashMap<u64, Vec<u8>>,
    locks: Vec<Held>,
    /// What is open: the number of the open file, and the node.
    open: HashMap<u64, u64>,
    /// The name that each node has, or had when it was made.
    called: HashMap<u64, String>,
    troubles: HashMap<Key, (Trouble, usize)>,
    calls: HashMap<Operation, usize>,
    /// How many are made to wait.
    waiting: HashMap<Operation, usize>,
    most_at_once: usize,
    last_asked: Option<Instant>,
    /// How long names may be remembered.
    remembered: Duration,
    /// How many nodes and open files there have been.
    count: u64,
}

/// A lock on byte 0, the only one that anybody here asks for.
struct Held {
    node: u64,
    exclusive: bool,
    owner: u64,
    file: u64,
    pid: u32,
}

impl State {
    fn number(&mut self) -> u64 {
        self.count += 1;
        ROOT + self.count
    }

    fn create(&mut self, name: &str) -> u64 {
        let node = self.number();
        self.names.insert(name.to_owned(), node);
        self.called.insert(node, name.to_owned());
        node
    }

    fn unlink(&mut self, name: &str) -> bool {
        self.names.remove(name).is_some()
    }

    fn in_the_way(&self, node: u64, owner: u64, exclusive: bool) -> Option<&Held> {
        self.locks
            .iter()
            .find(|held| held.node == node && held.owner != owner && (exclusive || held.exclusive))
    }

    /// The trouble that a request has now, one time less than before. That of its file comes first.
    fn take_trouble(&mut self, request: &Request) -> Option<Trouble> {
        let key = self.key_of(request)?;
        let (trouble, times) = self.troubles.get_mut(&key)?;
        let trouble = *trouble;
        *times = times.saturating_sub(1);
        if *times == 0 && trouble != Trouble::Hangs {
            self.troubles.remove(&key);
        }
        Some(trouble)
    }

    /// Under which key there is a trouble with a request.
    fn key_of(&self, request: &Request) -> Option<Key> {
        let operation = request.operation()?;
        let its = (operation, request.file(self));
        let keys = [its, (operation, None)];
        keys.into_iter().find(|key| self.troubles.contains_key(key))
    }

    fn hangs(&self, request: &Request) -> bool {
        let key = self.key_of(request);
        let trouble = key.and_then(|key| self.troubles.get(&key));
        matches!(trouble, Some((Trouble::Hangs, _)))
    }

    fn begins_to_wait(&mut self, operation: Operation) {
        *self.waiting.entry(operation).or_insert(0) += 1;
        let are_waited_for = self.waiting.iter().filter(|it| *it.0 != Operation::Release);
        let now = are_waited_for.map(|(_, count)| count).sum();
        self.most_at_once = self.most_at_once.max(now);
    }

    fn has_waited(&mut self, operation: Operation) {
        if let Some(count) = self.waiting.get_mut(&operation) {
            *count -= 1;
        }
    }
}

/// One request of the kernel's: its header taken apart, and what follows it.
struct Request {
    opcode: u32,
    unique: u64,
    node: u64,
    body: Vec<u8>,
}

const HEADER: usize = 40;

impl Request {
    fn parse(bytes: &[u8]) -> Request {
        let mut request = Request {
            opcode: 0,
            unique: 0,
            node: 0,
            body: bytes.to_vec(),
        };
        (request.opcode, request.unique, request.node) =
            (request.u32(4), request.u64(8), request.u64(16));
        request.body.drain(..HEADER);
        request
    }

    fn u32(&self, at: usize) -> u32 {
        let bytes = self.body[at..at + 4].try_into();
        u32::from_ne_bytes(bytes.expect("four bytes"))
    }

    fn u64(&self, at: usize) -> u64 {
        let bytes = self.body[at..at + 8].try_into();
        u64::from_ne_bytes(bytes.expect("eight bytes"))
    }

    fn name(&self, at: usize) -> String {
        let name = self.body[at..].split(|byte| *byte == 0).next();
        String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
    }

    /// The name of the file that it is about.
    fn file(&self, state: &State) -> Option<String> {
        match self.opcode {
            LOOKUP | UNLINK => Some(self.name(0)),
            CREATE => Some(self.name(16)),
            _ => state.called.get(&self.node).cloned(),
        }
    }

    fn operation(&self) -> Option<Operation> {
        Some(match self.opcode {
            LOOKUP => Operation::LookUp,
            GETATTR if self.node != ROOT => Operation::GetAttributes,
            OPEN => Operation::Open,
            CREATE => Operation::Create,
            SETLK | SETLKW if self.u32(32) == libc::F_UNLCK as u32 => Operation::Unlock,
            SETLK | SETLKW => Operation::Lock,
            GETLK => Operation::GetLock,
            UNLINK => Operation::Unlink,
            FLUSH => Operation::Flush,
            RELEASE => Operation::Release,
            WRITE => Operation::Write,
            _ => return None,
        })
    }
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// FUSE_POSIX_LOCKS: locks are the server's.
const KEEPS_LOCKS: u32 = 1 << 1;
/// FUSE_PARALLEL_DIROPS: names of one directory are looked up at the same time. Without it the kernel asks
/// for one after the other, as no network file system does.
const TAKES_LOOK_UPS_AT_ONCE: u32 = 1 << 18;
/// The largest request is a write of a page, and the kernel wants room for this.
const BUFFER: usize = 64 * 1024;

fn serve(device: &Arc<File>, control: &Arc<Control>) {
    let mut buffer = vec![0; BUFFER];
    let mut waiting = Vec::new();
    while !control.is_over() {
        let mut readable = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        match poll(&mut readable, 20u16) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => (),
            Err(error) => panic!("wait for the kernel's requests: {error}"),
        }
        let length = match (&**device).read(&mut buffer) {
            Ok(length) => length,
            // It was interrupted before it could be read, or was unmounted.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => break,
            Err(_) => continue,
        };
        let request = Request::parse(&buffer[..length]);
        if matches!(request.opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            continue;
        }
        let trouble = {
            let mut state = control.state();
            state.last_asked = Some(Instant::now());
            if let Some(operation) = request.operation() {
                *state.calls.entry(operation).or_insert(0) += 1;
            }
            state.take_trouble(&request)
        };
        if matches!(trouble, Some(Trouble::Hangs | Trouble::Takes(_))) {
            let (device, control) = (device.clone(), control.clone());
            // Each that is kept keeps a stack, and there may be thousands of calls.
            waiting.retain(|thread: &JoinHandle<()>| !thread.is_finished());
            waiting.push(std::thread::spawn(move || {
                let trouble = wait_out(&request, trouble, &control);
                answer(&device, &request, trouble, &control);
            }));
        } else {
            answer(device, &request, trouble, control);
        }
    }
    for thread in waiting {
        let _ = thread.join();
    }
}

/// Waits until a request may be worked on; the trouble that it has then.
fn wait_out(request: &Request, trouble: Option<Trouble>, control: &Control) -> Option<Trouble> {
    let operation = request.operation()?;
    let end = match trouble {
        Some(Trouble::Takes(time)) => Some(Instant::now() + time),
        _ => None,
    };
    let mut state = control.state();
    state.begins_to_wait(operation);
    loop {
        let now = Instant::now();
        let is_over = end.map_or(!state.hangs(request), |end| now >= end);
        if is_over || control.is_over() {
            break;
        }
        let most = Duration::from_millis(5);
        let pause = end.map_or(most, |end| most.min(end - now));
        let waited = control.changed.wait_timeout(state, pause);
        state = waited.expect("the share's state").0;
    }
    state.has_waited(operation);
    state.last_asked = Some(Instant::now());
    match trouble {
        Some(Trouble::Hangs) => state.take_trouble(request),
        _ => None,
    }
}

fn answer(device: &File, request: &Request, trouble: Option<Trouble>, control: &Control) {
    let result = match trouble {
        Some(Trouble::Fails(errno)) => Err(errno),
        Some(Trouble::IsDoneAndFails(errno)) => {
            let done = carry_out(request, control);
            if let (OPEN | CREATE, Ok(body)) = (request.opcode, &done) {
                // Nobody will ever close it.
                let at = body.len() - opened(0).len();
                let file = body[at..at + 8].try_into().expect("eight bytes");
                control.state().open.remove(&u64::from_ne_bytes(file));
            }
            done.and(Err(errno))
        }
        _ => carry_out(request, control),
    };
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-(errno as i32), Vec::new()),
    };
    let mut reply = Vec::with_capacity(16 + body.len());
    reply.extend(((16 + body.len()) as u32).to_ne_bytes());
    reply.extend(error.to_ne_bytes());
    reply.extend(request.unique.to_ne_bytes());
    reply.extend(body);
    // It fails if nobody waits for the answer any more.
    let _ = (&*device).write(&reply);
}

fn carry_out(request: &Request, control: &Control) -> Result<Vec<u8>, Errno> {
    let mut state = control.state();
    match request.opcode {
        INIT => Ok(words(&[
            7,
            31,
            0,
            control.abilities | TAKES_LOOK_UPS_AT_ONCE,
            (16 << 16) | 12,
            4096,
            1,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ])),
        LOOKUP => {
            let node = state.names.get(&request.name(0)).ok_or(Errno::ENOENT)?;
            Ok(entry(&state, *node))
        }
        GETATTR => Ok(attributes_reply(&state, request.node)),
        SETATTR => {
            if request.u32(0) & (1 << 3) != 0 {
                state.sizes.insert(request.node, request.u64(16));
            }
            Ok(attributes_reply(&state, request.node))
        }
        OPENDIR => Ok(opened(state.number())),
        OPEN => {
            let file = state.number();
            state.open.insert(file, request.node);
            Ok(opened(file))
        }
        CREATE => {
            let name = request.name(16);
            let exclusive = request.u32(0) & libc::O_EXCL as u32 != 0;
            let node = match state.names.get(&name) {
                Some(_) if exclusive => return Err(Errno::EEXIST),
                Some(node) => *node,
                None => state.create(&name),
            };
            let file = state.number();
            state.open.insert(file, node);
            Ok([entry(&state, node), opened(file)].concat())
        }
        UNLINK if state.unlink(&request.name(0)) => Ok(Vec::new()),
        UNLINK => Err(Errno::ENOENT),
        FLUSH => {
            let owner = request.u64(16);
            if control.habits.drops_on_flush {
                let is_its = |held: &Held| held.node == request.node && held.owner == owner;
                state.locks.retain(|held| !is_its(held));
            }
            Ok(Vec::new())
        }
        RELEASE => {
            let file = request.u64(0);
            state.open.remove(&file);
            if control.habits.drops_on_release {
                state.locks.retain(|held| held.file != file);
            }
            Ok(Vec::new())
        }
        GETLK => {
            let exclusive = request.u32(32) == libc::F_WRLCK as u32;
            let found = state.in_the_way(request.node, request.u64(8), exclusive);
            let kind = match found {
                None => libc::F_UNLCK,
                Some(held) if held.exclusive => libc::F_WRLCK,
                Some(_) => libc::F_RDLCK,
            };
            let pid = found.map_or(0, |held| held.pid);
            let pid = if control.habits.names_processes {
                pid
            } else {
                0
            };
            Ok([&[0; 16][..], &words(&[kind as u32, pid])].concat())
        }
        SETLK | SETLKW => set_lock(&mut state, request).map(|()| Vec::new()),
        WRITE => {
            if request.u64(8) == 0 {
                let content = request.body[40..].to_vec();
                state.sizes.insert(request.node, content.len() as u64);
                state.contents.insert(request.node, content);
            }
            Ok(words(&[request.u32(16), 0]))
        }
        READ => {
            let content = state.contents.get(&request.node);
            let is_first = request.u64(8) == 0;
            Ok(content.filter(|_| is_first).cloned().unwrap_or_default())
        }
        STATFS => Ok(vec![0; 80]),
        READDIR | RELEASEDIR | FSYNC | DESTROY => Ok(Vec::new()),
        _ => Err(Errno::ENOSYS),
    }
}

fn set_lock(state: &mut State, request: &Request) -> Result<(), Errno> {
    let (node, owner, kind) = (request.node, request.u64(8), request.u32(32));
    let exclusive = kind == libc::F_WRLCK as u32;
    let unlocks = kind == libc::F_UNLCK as u32;
    if !unlocks && state.in_the_way(node, owner, exclusive).is_some() {
        return Err(Errno::EAGAIN);
    }
    state
        .locks
        .retain(|held| held.node != node || held.owner != owner);
    if !unlocks {
        state.locks.push(Held {
            node,
            exclusive,
            owner,
            file: request.u64(0),
            pid: request.u32(36),
        });
    }
    Ok(())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A node's attributes. They may not be remembered: each look at them asks the server.
fn attributes(state: &State, node: u64) -> Vec<u8> {
    let (mode, links) = if node == ROOT {
        (libc::S_IFDIR | 0o755, 2)
    } else {
        let is_linked = state.names.values().any(|linked| *linked == node);
        (libc::S_IFREG | 0o600, u32::from(is_linked))
    };
    let size = state.sizes.get(&node).copied().unwrap_or(0);
    let long: [u64; 6] = [node, size, 0, 0, 0, 0];
    let mut bytes: Vec<u8> = long.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(words(&[0, 0, 0, mode, links, 0, 0, 0, 4096, 0]));
    bytes
}

fn attributes_reply(state: &State, node: u64) -> Vec<u8> {
    [vec![0; 16], attributes(state, node)].concat()
}

fn entry(state: &State, node: u64) -> Vec<u8> {
    let long = [node, 0, state.remembered.as_secs(), 0, 0];
    let mut bytes: Vec<u8> = long.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(attributes(state, node));
    bytes
}

fn opened(file: u64) -> Vec<u8> {
    [&file.to_ne_bytes()[..], &[0; 8]].concat()
}
