//! Reactors that are killed at any moment, and the ones that go on from their ledger, their descriptors and
//! their desk: each call has its one right answer.
//!
//! A program of its own, because it shares its descriptors with the reactors, which it clones itself: no
//! other thread may work meanwhile. `VIRTLOCKD_DESK_SEED` repeats a run's choices, `VIRTLOCKD_DESK_KILLS` says
//! how many kills there are.
#![allow(unsafe_code)]

#[path = "../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::client::{
    ADMIN_PROGRAM, AUTOCREATE, CALL, Call, PING, PONG, RESOURCE_BUSY, Reply, SHARED, acquire,
    create_lockspace, create_resource, delete_resource, frame, length_word, new_lockspace,
    put_string, put_u32, release, restrict,
};
use support::random::Random;
use virtlockd::custody::Custody;
use virtlockd::custody::clients::{Arrival, ClientId};
use virtlockd::custody::ledger::{self, Ledger};
use virtlockd::custody::servers::{Server, Service};
use virtlockd::desk::slot::Places;
use virtlockd::desk::turn::{self, Rest, Whose};
use virtlockd::desk::{self, Desk};
use virtlockd::host::descriptors::{self, Inherited};
use virtlockd::host::stream::Peer;
use virtlockd::server::clients::turn::whose;
use virtlockd::server::reactor::{GoesOn, Reactor};

/// How long nothing may come of a call.
const DEADLINE: Duration = Duration::from_secs(30);
/// What a call is told that reactors died of.
const POISON: &str = "failed 2 times to carry out this call";

/// What is due for a call.
#[derive(Clone, Debug)]
enum Due {
    Ok,
    /// An error of this code, or any.
    Error(Option<i32>),
    Pong,
}

/// What a client does, whatever becomes of the reactor.
struct Script {
    stream: UnixStream,
    whose: Whose,
    /// Bytes that are to be sent.
    out: Vec<u8>,
    received: Vec<u8>,
    /// Serial, what is due, what to do should the call be refused because reactors died of it.
    due: VecDeque<(u32, Due, String)>,
    serial: u32,
    /// Resources of its own, and how often it has them.
    held: BTreeMap<(String, String, u32), u32>,
    answered: usize,
    since: Instant,
    kind: Kind,
    number: usize,
    spaces: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It speaks for this process, or for another one.
    Machine,
    /// It sends long frames in small pieces.
    Slow,
    Admin,
}

struct World {
    directory: PathBuf,
    random: Random,
}

impl Script {
    fn post(&mut self, bytes: &dyn Fn(u32) -> Vec<u8>, due: Due, what: String) {
        self.serial += 1;
        if self.due.is_empty() {
            self.since = Instant::now();
        }
        self.out.extend(bytes(self.serial));
        self.due.push_back((self.serial, due, what));
    }

    fn call(&mut self, call: &Call, due: Due) {
        let what = format!("{call:?}");
        self.post(&|serial| call.frame(serial), due, what);
    }

    /// One or more calls with what is due for them.
    fn invent(&mut self, world: &mut World) {
        let random = &mut world.random;
        if random.percent(10) {
            return self.post(&|_| PING.to_vec(), Due::Pong, "PING".into());
        }
        if self.kind == Kind::Admin {
            return self.invent_admin(random);
        }
        let space = world.directory.join("space").display().to_string();
        let disk = |name: &str| world.directory.join(name).display().to_string();
        match random.below(16) {
            // The daemon takes no more than 1,024.
            0 if self.spaces < 150 => {
                self.spaces += 1;
                let path = disk(&format!("made-{}-{}", self.number, self.spaces));
                self.call(&new_lockspace(&path), Due::Ok);
                self.call(&new_lockspace(&path), Due::Error(Some(1)));
                self.call(&create_lockspace(&path), Due::Ok);
            }
            1 => {
                let name = format!("plain-{}", self.number);
                self.call(&create_resource(&space, &name), Due::Ok);
                self.call(&delete_resource(&space, &name), Due::Ok);
            }
            2 => self.call(
                &acquire("", &disk("busy"), 0),
                Due::Error(Some(RESOURCE_BUSY)),
            ),
            3 => self.call(&acquire("", &disk("missing"), 0), Due::Error(None)),
            4 => self.call(&release("", &disk("busy")), Due::Error(None)),
            _ => {
                let number = random.below(3);
                let is_disk = random.percent(40);
                let is_made = is_disk && number == 1;
                let (path, name) = if is_made {
                    // In the default lockspace only what the daemon made is removed.
                    (String::new(), disk(&format!("auto-{}", self.number)))
                } else if is_disk {
                    (
                        String::new(),
                        disk(&format!("disk-{}-{number}", self.number)),
                    )
                } else {
                    (space, format!("file-{}-{number}", self.number))
                };
                let flags = if is_disk && !is_made { 0 } else { AUTOCREATE };
                let flags = if number == 2 { flags | SHARED } else { flags };
                let key = (path.clone(), name.clone(), flags);
                let times = self.held.get(&key).copied().unwrap_or(0);
                let may_have_more = times == 0 || (number == 2 && times < 3);
                if may_have_more && (times == 0 || random.percent(50)) {
                    self.held.insert(key, times + 1);
                    self.call(&acquire(&path, &name, flags), Due::Ok);
                } else {
                    if number != 2 && random.percent(30) {
                        let busy = Due::Error(Some(RESOURCE_BUSY));
                        self.call(&acquire(&path, &name, flags), busy);
                    }
                    match times {
                        1 => _ = self.held.remove(&key),
                        _ => _ = self.held.insert(key, times - 1),
                    }
                    self.call(&release(&path, &name), Due::Ok);
                }
            }
        }
    }

    fn invent_admin(&mut self, random: &mut Random) {
        let server = |payload: &mut Vec<u8>| put_string(payload, b"virtlockd");
        let mut payload = Vec::new();
        // List of clients, look-up, limits, idle timeout, a server that is not there.
        let (procedure, due) = match random.below(5) {
            0 => {
                server(&mut payload);
                put_u32(&mut payload, 1);
                put_u32(&mut payload, 0);
                (8, Due::Ok)
            }
            1 => {
                server(&mut payload);
                put_u32(&mut payload, 0);
                (5, Due::Ok)
            }
            2 => {
                server(&mut payload);
                put_u32(&mut payload, 1);
                put_string(&mut payload, b"nclients_max");
                put_u32(&mut payload, 2);
                put_u32(&mut payload, 500 + random.below(100) as u32);
                put_u32(&mut payload, 0);
                (13, Due::Ok)
            }
            3 => {
                put_u32(&mut payload, 0);
                put_u32(&mut payload, 0);
                (19, Due::Ok)
            }
            _ => {
                put_string(&mut payload, &vec![b'x'; random.below(30_000)]);
                put_u32(&mut payload, 0);
                (5, Due::Error(None))
            }
        };
        let bytes = |serial| frame(ADMIN_PROGRAM, 1, procedure, CALL, serial, 0, &payload);
        self.post(&bytes, due, format!("admin procedure {procedure}"));
    }

    /// Sends and reads what goes without waiting.
    fn go(&mut self, world: &mut World, may_begin: bool) {
        if self.due.is_empty() && may_begin {
            let most = if self.kind == Kind::Machine { 12 } else { 2 };
            for _ in 0..=world.random.below(most) {
                self.invent(world);
            }
        }
        if !self.out.is_empty() {
            let most = match self.kind {
                Kind::Slow => 1 + world.random.below(40),
                _ if world.random.percent(50) => self.out.len(),
                _ => 1 + world.random.below(self.out.len()),
            };
            let piece = most.min(self.out.len());
            match self.stream.write(&self.out[..piece]) {
                Ok(count) => _ = self.out.drain(..count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => (),
                Err(error) => panic!("{}: {error}", self.number),
            }
        }
        // Some read late, so that replies have to wait.
        if !world.random.percent(70) {
            return;
        }
        let mut buffer = [0; 65536];
        match self.stream.read(&mut buffer) {
            Ok(0) => panic!("the daemon closed connection {}", self.number),
            Ok(count) => self.received.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => (),
            Err(error) => panic!("{}: {error}", self.number),
        }
        while let Some(length) = length_word(&self.received)
            && length <= self.received.len()
        {
            let reply: Vec<u8> = self.received.drain(..length).collect();
            self.take(&reply);
        }
        if let Some((serial, due, what)) = self.due.front() {
            assert!(
                self.since.elapsed() < DEADLINE,
                "connection {}: no answer to call {serial}, {what} ({due:?})",
                self.number
            );
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.since = Instant::now();
        let Some((serial, due, what)) = self.due.pop_front() else {
            panic!(
                "connection {}: an answer too many: {bytes:02x?}",
                self.number
            );
        };
        self.answered += 1;
        let about = format!("connection {}, call {serial}, {what}", self.number);
        if matches!(due, Due::Pong) {
            assert_eq!(bytes, PONG, "{about}");
            return;
        }
        assert_eq!(
            bytes[20..24],
            serial.to_be_bytes(),
            "{about}: the answer to another call"
        );
        let reply = Reply::parse(bytes);
        match (due, reply) {
            (_, Reply::Error(error)) if error.message.contains(POISON) => {
                panic!("{about}: so many kills by chance in one call are to be avoided");
            }
            (Due::Ok, reply) => assert!(reply.is_ok(), "{about}: {reply:?}"),
            (Due::Error(code), reply) => {
                assert!(!reply.is_ok(), "{about}: it was granted");
                if let Some(code) = code {
                    assert_eq!(reply.error().code, code, "{about}: {reply:?}");
                }
            }
            (Due::Pong, _) => unreachable!(),
        }
    }
}

/// Where the kills fell.
#[derive(Debug, Default)]
struct Fallen {
    before_serving: usize,
    idle: usize,
    in_turns: usize,
    in_calls: usize,
    received_and_not_done: usize,
    made_and_not_sent: usize,
}

/// The process's open descriptors.
fn open_descriptors() -> BTreeSet<RawFd> {
    let listed: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    listed
        .into_iter()
        .filter(|number| descriptors::keep_on_exec(*number, true).is_ok())
        .collect()
}

/// A reactor. It ends before the test's connections are closed when a check fails: it would fence this
/// process for them, and nobody would read what failed.
struct Child(libc::pid_t);

impl Child {
    fn signal(&self, signal: i32) {
        // SAFETY: numbers; the child is ours and not reaped yet.
        unsafe { libc::kill(self.0, signal) };
    }

    /// Whether it has ended, or stopped, with what.
    fn wait(&self, options: i32) -> Option<i32> {
        let mut status = 0;
        // SAFETY: takes a pointer to a living number.
        let pid = unsafe { libc::waitpid(self.0, &raw mut status, options) };
        (pid == self.0).then_some(status)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        self.wait(0);
    }
}

/// A child that shares this process's descriptors: nothing in the child.
fn clone_sharing_descriptors() -> Option<Child> {
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: to ignore a signal runs no code of this program.
    unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
    // SAFETY: a null stack makes it a fork; no other thread of this process works at the moment.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    assert!(pid >= 0);
    (pid > 0).then(|| Child(pid as libc::pid_t))
}

/// What the guardian's reactor does. `known` are descriptors that are not its own.
fn reactor(desk: Desk, ledger: RawFd, known: &BTreeSet<RawFd>, serving_at: usize) -> ! {
    let run = move || {
        let before = open_descriptors();
        let mark = turn::ledger_before(desk.memory());
        let file = descriptors::adopt(ledger).unwrap();
        let (state, ledger, since) = Ledger::take_over_since(file, mark).unwrap();
        let numbers: Vec<RawFd> = state.descriptors().map(|number| number.0).collect();
        let mut inherited =
            Inherited::of(&numbers, &descriptors::open_numbers()).expect("they are open");
        let spared: BTreeSet<RawFd> = numbers.into_iter().chain(since.descriptors()).collect();
        let state = state.adopt(&mut inherited).unwrap();
        let reload = Box::new(|| Err("there is no configuration".to_owned()));
        let desk: &'static Desk = Box::leak(Box::new(desk));
        // The test is its guardian, and does not listen to it.
        desk.set_guardian(std::os::unix::process::parent_id());
        let mut reactor = Reactor::new(reload, Some(desk)).unwrap();
        let is_left = |number: &RawFd| !known.contains(number) && !spared.contains(number);
        let left = before.into_iter().filter(is_left);
        let mut left = left.flat_map(descriptors::adopt).collect();
        let from = GoesOn {
            state,
            ledger: Some(ledger),
            since,
            poll: None,
            left: &mut left,
            run_directory: None,
        };
        reactor.go_on(from).unwrap();
        // A word that nobody uses otherwise.
        reactor.desk().memory().store(serving_at, 1);
        reactor.run().unwrap();
    };
    // SAFETY: prctl takes numbers; _exit ends this process without running what is the parent's.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        libc::_exit(if ended.is_ok() { 0 } else { 101 })
    }
}

fn connect(custody: &mut Custody, service: Service) -> (UnixStream, Whose) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let id = custody.take_id(service);
    let client = ClientId(ours.as_raw_fd());
    let peer = Peer {
        pid: std::process::id() as i32,
        uid: 0,
        gid: 0,
    };
    let arrival = Arrival {
        server: service,
        id,
        peer: Some(peer),
        start_time: None,
        connected_at: 0,
        refused: false,
    };
    custody.connected(OwnedFd::from(ours), arrival);
    (theirs, whose(client, service, id))
}

#[test]
fn however_often_the_reactor_is_killed_each_call_has_its_one_right_answer() {
    const SERVING_AT: usize = 8192;
    let seed = Random::seed_from("VIRTLOCKD_DESK_SEED");
    let kills: usize =
        std::env::var("VIRTLOCKD_DESK_KILLS").map_or(500, |text| text.parse().expect("a number"));
    eprintln!("VIRTLOCKD_DESK_SEED={seed}");
    let directory = support::TempDir::new();
    let mut world = World {
        directory: directory.path().to_owned(),
        random: Random::new(seed),
    };
    std::fs::create_dir(directory.path().join("space")).unwrap();
    let mut other = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let desk = Desk::new(desk::size(4096)).unwrap();
    let mut custody = Custody::new(Ledger::new().unwrap());
    for service in Service::ALL {
        let server = *custody.state().server(service);
        custody.set_server(
            service,
            Server {
                limit: 100,
                ..server
            },
        );
    }
    let space = directory.path().join("space").display().to_string();
    custody.make_lockspace(space.as_bytes()).unwrap();
    let ledger = custody.ledger().unwrap().as_raw_fd();
    let mut scripts = Vec::new();
    for (number, kind) in [
        Kind::Machine,
        Kind::Machine,
        Kind::Machine,
        Kind::Slow,
        Kind::Admin,
        Kind::Machine,
    ]
    .into_iter()
    .enumerate()
    {
        let service = if kind == Kind::Admin {
            Service::Admin
        } else {
            Service::Lock
        };
        let (stream, whose) = connect(&mut custody, service);
        for disk in 0..3 {
            std::fs::write(directory.path().join(format!("disk-{number}-{disk}")), "").unwrap();
        }
        let mut script = Script {
            stream,
            whose,
            out: Vec::new(),
            received: Vec::new(),
            due: VecDeque::new(),
            serial: 0,
            held: BTreeMap::new(),
            answered: 0,
            since: Instant::now(),
            kind,
            number,
            spaces: 0,
        };
        if kind != Kind::Admin {
            // One of them speaks for another process.
            let pid = if number == 1 {
                other.id() as i32
            } else {
                std::process::id() as i32
            };
            let registration = Call::Register {
                uuid: [number as u8 + 1; 16],
                name: format!("machine-{number}").into(),
                id: 7,
                pid: pid as u32,
                flags: 0,
            };
            script.call(&registration, Due::Ok);
        }
        if number == 5 {
            // It has what the others want, and may do nothing more.
            let busy = directory.path().join("busy").display().to_string();
            std::fs::write(&busy, "").unwrap();
            script.call(&acquire("", &busy, 0), Due::Ok);
            script.call(&restrict(), Due::Ok);
            script.held.insert((String::new(), busy, 0), 1);
        }
        scripts.push(script);
    }
    // From here on the reactors have it.
    std::mem::forget(custody);
    let known: BTreeSet<RawFd> = {
        let mut known: BTreeSet<RawFd> = open_descriptors();
        for script in &scripts {
            known.remove(&(script.whose.number as RawFd));
        }
        known
    };
    let mut fallen = Fallen::default();
    let mut killed = 0;
    let mut protected: Option<(usize, usize)> = None;
    let is_done = |scripts: &[Script]| {
        scripts
            .iter()
            .all(|it| it.due.is_empty() && it.out.is_empty())
    };
    loop {
        desk.memory().store(SERVING_AT, 0);
        let Some(child) = clone_sharing_descriptors() else {
            reactor(desk, ledger, &known, SERVING_AT);
        };
        let is_last = killed >= kills;
        let begun = Instant::now();
        let dies_in_start = world.random.percent(15);
        let life = Duration::from_micros(world.random.below(1500) as u64);
        let mut served_since = None;
        loop {
            // Nobody is refused what the last one has before it has it.
            let is_set_up = scripts.last().is_some_and(|it| it.due.is_empty());
            for script in &mut scripts {
                let may_begin = is_set_up && !is_last && script.number != 5;
                script.go(&mut world, may_begin);
            }
            if served_since.is_none() && desk.memory().load(SERVING_AT) == 1 {
                served_since = Some(Instant::now());
            }
            let is_time = match served_since {
                _ if is_last => is_done(&scripts),
                Some(since) => since.elapsed() >= life,
                None => dies_in_start && begun.elapsed() >= life,
            };
            let ended = child.wait(libc::WNOHANG);
            assert_eq!(ended, None, "the reactor ended by itself");
            if !is_time {
                continue;
            }
            // Who died of a call by chance must not do so again: it would be taken for poison. Dying before
            // it serves is nothing to the call.
            let is_served = protected.is_none_or(|(number, answered): (usize, usize)| {
                scripts[number].answered >= answered
            });
            if is_served || is_last {
                break;
            }
            child.signal(libc::SIGSTOP);
            child.wait(libc::WUNTRACED);
            if desk.memory().load(SERVING_AT) == 0 {
                break;
            }
            child.signal(libc::SIGCONT);
        }
        drop(child);
        killed += 1;
        if is_last {
            break;
        }
        let memory = desk.memory();
        if desk.memory().load(SERVING_AT) == 1 {
            protected = None;
        }
        if served_since.is_none() {
            fallen.before_serving += 1;
        }
        match turn::whose_turn(memory).and_then(|whose| turn::rest(memory, whose)) {
            None => fallen.idle += 1,
            Some((rest, interrupted)) => {
                let is_idle = rest.pending.is_empty() && rest.unsent.is_empty();
                fallen.idle += usize::from(is_idle);
                fallen.in_turns += usize::from(!is_idle);
                fallen.in_calls += usize::from(interrupted.is_some());
                if interrupted.is_some() {
                    let turn = turn::whose_turn(memory);
                    let number = scripts
                        .iter()
                        .position(|it| Some(it.whose) == turn)
                        .unwrap();
                    let script = &scripts[number];
                    protected = Some((number, script.answered + script.due.len()));
                }
                fallen.received_and_not_done += usize::from(!rest.pending.is_empty());
                fallen.made_and_not_sent += usize::from(!rest.unsent.is_empty());
            }
        }
    }
    let answered: usize = scripts.iter().map(|it| it.answered).sum();
    eprintln!("{killed} kills, {answered} calls: {fallen:?}");
    // A reactor died of this call, and now a second one does, in the middle of it.
    let memory = desk.memory();
    let client = &mut scripts[0];
    let disk = world.directory.join("poison").display().to_string();
    std::fs::write(&disk, "").unwrap();
    let mut pending = acquire("", &disk, 0).frame(77);
    pending.extend(PING);
    let once = Rest {
        pending,
        deaths: 1,
        ..Rest::default()
    };
    turn::none(memory);
    assert!(turn::settle(
        memory,
        &mut Places::find(memory, None),
        client.whose,
        &once
    ));
    turn::begin(memory, client.whose);
    turn::frame_begins(memory, 0, 0);
    let Some(child) = clone_sharing_descriptors() else {
        reactor(desk, ledger, &known, SERVING_AT);
    };
    client.stream.set_nonblocking(false).unwrap();
    client.stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut reply = vec![0; 4];
    client.stream.read_exact(&mut reply).unwrap();
    reply.resize(length_word(&reply).unwrap(), 0);
    client.stream.read_exact(&mut reply[4..]).unwrap();
    let message = Reply::parse(&reply).expect_error(1, 7).to_owned();
    assert!(message.contains(POISON), "{message}");
    let mut pong = [0; PONG.len()];
    client.stream.read_exact(&mut pong).unwrap();
    assert_eq!(pong, PONG, "what waits behind it is worked on");
    drop(child);
    let file = descriptors::adopt(ledger).unwrap();
    let state = ledger::load(&file).unwrap();
    judge(&world.directory, &scripts, &state);
    let expected = known.len() + state.descriptors().count() + 1;
    let other_end = open_descriptors();
    // Those of the last reactor that was killed are left: poll, timer, signals, and a reserve.
    assert!(
        other_end.len() < expected + 60,
        "descriptors are left: {other_end:?}"
    );
    let _ = other.kill();
    let _ = other.wait();
    std::mem::forget(file);
}

/// What is held is what was granted and not given back: in the ledger, in the kernel, and on the disk.
fn judge(
    directory: &Path,
    scripts: &[Script],
    state: &virtlockd::custody::state::State<virtlockd::custody::descriptor::Saved>,
) {
    let mut expected: BTreeMap<(String, String), u32> = BTreeMap::new();
    for script in scripts {
        for ((path, name, _), times) in &script.held {
            expected.insert((path.clone(), name.clone()), *times);
        }
    }
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let held: BTreeMap<(String, String), u32> = state
        .table()
        .iter()
        .map(|(_, resource)| {
            let times = resource.holders().map(|(_, times)| times).sum();
            ((text(resource.lockspace()), text(resource.name())), times)
        })
        .collect();
    assert_eq!(held, expected);
    let files: BTreeSet<String> = std::fs::read_dir(directory.join("space"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let wanted: BTreeSet<String> = expected
        .keys()
        .filter(|(path, _)| !path.is_empty())
        .map(|(_, name)| name.clone())
        .collect();
    assert_eq!(files, wanted, "lock files that nobody holds are gone");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let name = path.display().to_string();
            let is_held = expected.contains_key(&(String::new(), name.clone()));
            assert!(
                is_held || !name.contains("auto-"),
                "{name} was made for a lock and left"
            );
            assert_eq!(
                support::lock_probe(&path).is_some(),
                is_held,
                "{}",
                path.display()
            );
        }
    }
    for name in &wanted {
        let path = directory.join("space").join(name);
        assert!(support::lock_probe(&path).is_some(), "{}", path.display());
    }
}
