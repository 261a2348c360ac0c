//! The attacker: a process that does one hostile thing as fast as it can (or as slowly as the
//! hostility asks for), until it is told to stop. Nothing that it does waits for the server: its
//! sockets never block, and what the server does not take is not sent.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

use crate::client::{acquire, paper_pid, register, register_as, release};
use crate::helper::Helper;
use crate::measure::Outcome;
use crate::protocol::{
    CALL_WITH_FDS, HEADER_BYTES, LOCK_PROGRAM, PING, REGISTER, STATUS_OK, at, frame, put_u32,
    set_word,
};
use crate::subject::{Limits, Server};

/// Indexes and disks of its own.
const INDEX: u32 = 600_000;
/// Connections of those who talk all the time.
const FEW: u32 = 16;
/// Connections of those who mostly sit there.
const MANY: u32 = 1000;
/// The largest frame that the lock program has.
const LARGEST_FRAME: u32 = 132 * 1024;
/// Descriptors that one message can carry (SCM_MAX_FD).
const MOST_DESCRIPTORS: usize = 253;
/// Between two looks whether it is to stop.
const ROUND: Duration = Duration::from_millis(2);
const START_LIMIT: Duration = Duration::from_secs(120);

/// What the attacker does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hostility {
    Silence,
    HalfFrames,
    OneByteASecond,
    OneByteAWrite,
    LengthWords,
    NeverReading,
    Pings,
    LongNames,
    Registers,
    Calls,
    Vanishing,
    Descriptors,
    OverTheLimit,
    NoDescriptors,
}

use Hostility::*;

/// All of them, and the case of their rows in the report.
const CASES: [(Hostility, &str); 14] = [
    (Silence, "1000 silent connections"),
    (HalfFrames, "half frames"),
    (OneByteASecond, "one byte a second, 1000 connections"),
    (OneByteAWrite, "one byte a write"),
    (LengthWords, "giant length words"),
    (NeverReading, "never reading"),
    (Pings, "PING flood"),
    (LongNames, "60,000-byte names"),
    (Registers, "REGISTER flood"),
    (Calls, "acquires without end"),
    (Vanishing, "connect and vanish"),
    (Descriptors, "unasked descriptors"),
    (OverTheLimit, "more clients than the limit"),
    (NoDescriptors, "descriptors exhausted"),
];

/// All of them, in the order of the report.
pub fn hostilities() -> impl Iterator<Item = Hostility> {
    CASES.into_iter().map(|(hostility, _)| hostility)
}

impl Hostility {
    /// The case of its rows in the report.
    pub fn case(self) -> &'static str {
        let found = CASES.iter().find(|(hostility, _)| *hostility == self);
        found.map_or("", |(_, case)| case)
    }

    /// What the server is given, where the hostility is to use it up.
    pub fn limits(self) -> Option<Limits> {
        match self {
            OverTheLimit => Some(Limits {
                clients: 8,
                descriptors: None,
            }),
            NoDescriptors => Some(Limits {
                clients: 100_000,
                descriptors: Some(64),
            }),
            _ => None,
        }
    }

    /// Whether the server can still give a lock to somebody else.
    pub fn leaves_descriptors(self) -> bool {
        self != NoDescriptors
    }

    fn named(case: &str) -> Outcome<Self> {
        let found = hostilities().find(|kind| kind.case() == case);
        found.ok_or_else(|| format!("no hostility is called '{case}'"))
    }
}

/// The attacker as the bench sees it: at work until it is stopped or dropped.
pub struct Attacker {
    helper: Helper,
}

impl Attacker {
    pub fn start(server: &Server, hostility: Hostility) -> Outcome<Self> {
        server.make_disks(INDEX..INDEX + FEW)?;
        let disks: Vec<String> = (INDEX..INDEX + FEW).map(|disk| server.disk(disk)).collect();
        let arguments = [
            server.socket().display().to_string(),
            hostility.case().to_owned(),
            disks.join(","),
        ];
        let mut helper = Helper::start("attacker", &arguments)?;
        helper.hear_numbers("ready", START_LIMIT)?;
        Ok(Self { helper })
    }

    /// How often it has done what it does, since the last time it was asked.
    pub fn take(&mut self) -> Outcome<u64> {
        self.helper.say("take")?;
        let numbers = self.helper.hear_numbers("acts", START_LIMIT)?;
        numbers
            .first()
            .copied()
            .ok_or_else(|| "the attacker counted nothing".into())
    }
}

/// The helper's side.
pub fn attack(socket: &Path, hostility: &str, disks: &str) -> Outcome<()> {
    let disks: Vec<&str> = disks.split(',').collect();
    let mut attack = Attack {
        hostility: Hostility::named(hostility)?,
        socket: UnixAddr::new(socket).map_err(|e| format!("{}: {e}", socket.display()))?,
        crowd: VecDeque::new(),
        next: 0,
        acts: 0,
        scratch: vec![0; 256 * 1024],
    };
    let messages = attack.prepare(&disks)?;
    println!("ready");
    loop {
        let start = Instant::now();
        while start.elapsed() < ROUND {
            attack.act(&messages)?;
        }
        if let Some(line) = heard()? {
            if line.is_empty() {
                return Ok(());
            }
            println!("acts {}", std::mem::take(&mut attack.acts));
        }
    }
}

/// A line that was said to this helper, if there is one; an empty one at the end of its input.
fn heard() -> Outcome<Option<String>> {
    let stdin = std::io::stdin();
    let mut interest = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let told = poll(&mut interest, PollTimeout::ZERO).map_err(|e| format!("poll: {e}"))?;
    if told == 0 {
        return Ok(None);
    }
    let mut line = String::new();
    stdin
        .read_line(&mut line)
        .map_err(|e| format!("reading a command: {e}"))?;
    Ok(Some(line))
}

/// A connection, and how far it is with what it sends.
struct Enemy {
    stream: UnixStream,
    message: usize,
    sent: usize,
}

struct Attack {
    hostility: Hostility,
    socket: UnixAddr,
    crowd: VecDeque<Enemy>,
    /// Whose turn it is.
    next: usize,
    acts: u64,
    scratch: Vec<u8>,
}

impl Attack {
    /// Makes the connections that are there from the start; what they send, one message for each,
    /// over and over.
    fn prepare(&mut self, disks: &[&str]) -> Outcome<Vec<Vec<u8>>> {
        let at_first = match self.hostility {
            Silence | OneByteASecond => MANY,
            OneByteAWrite | NeverReading | Pings | LongNames | Registers | Calls => FEW,
            HalfFrames | LengthWords | Vanishing | Descriptors | OverTheLimit | NoDescriptors => 0,
        };
        let deadline = Instant::now() + START_LIMIT;
        while self.crowd.len() < at_first as usize {
            if !self.connect()? {
                std::thread::sleep(Duration::from_millis(1));
            }
            if Instant::now() > deadline {
                return Err("the server does not accept the attacker".into());
            }
        }
        let long = "n".repeat(60_000);
        let greeting = register(INDEX, paper_pid(INDEX));
        let mut messages = Vec::new();
        for disk in disks {
            messages.push(match self.hostility {
                Silence => Vec::new(),
                HalfFrames => half_frame(),
                OneByteASecond | OneByteAWrite => register_as(&long, INDEX, paper_pid(INDEX)),
                LengthWords => {
                    let mut bytes = greeting.clone();
                    bytes[..4].fill(0xff);
                    bytes
                }
                NeverReading => acquire("/run/disks/none").repeat(200),
                Pings => PING.repeat(2000),
                LongNames => {
                    let register = register_as(&long, INDEX, paper_pid(INDEX));
                    [register, acquire(&long)].concat()
                }
                Registers => {
                    let other = register(INDEX + 1, paper_pid(INDEX + 1));
                    [greeting.clone(), other].concat().repeat(250)
                }
                Calls => {
                    let mut calls = greeting.clone();
                    for _ in 0..100 {
                        calls.extend_from_slice(&acquire(disk));
                        calls.extend_from_slice(&release(disk));
                    }
                    calls
                }
                Descriptors => {
                    let mut payload = Vec::new();
                    put_u32(&mut payload, 32);
                    payload.extend_from_slice(&greeting[HEADER_BYTES..]);
                    let kind = CALL_WITH_FDS;
                    frame(LOCK_PROGRAM, 1, REGISTER, kind, 0, STATUS_OK, &payload)
                }
                Vanishing => Vec::new(),
                OverTheLimit | NoDescriptors => greeting.clone(),
            });
        }
        Ok(messages)
    }

    /// One more connection, if the server's backlog has room for it.
    fn connect(&mut self) -> Outcome<bool> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let made = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let descriptor: OwnedFd = made.map_err(|e| format!("making a socket: {e}"))?;
        match connect(descriptor.as_raw_fd(), &self.socket) {
            Ok(()) => {
                self.crowd.push_back(Enemy {
                    stream: descriptor.into(),
                    message: self.crowd.len(),
                    sent: 0,
                });
                Ok(true)
            }
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(format!("connecting to the server: {errno}")),
        }
    }

    /// One more connection in the place of the one that is there for longest, if there are enough.
    fn replace(&mut self, enough: u32) -> Outcome<bool> {
        if self.crowd.len() >= enough as usize {
            self.crowd.pop_front();
        }
        self.connect()
    }

    fn act(&mut self, messages: &[Vec<u8>]) -> Outcome<()> {
        match self.hostility {
            Silence => std::thread::sleep(Duration::from_millis(1)),
            OneByteASecond => {
                std::thread::sleep(Duration::from_secs(1) / MANY);
                self.send(messages, 1);
            }
            OneByteAWrite => self.send(messages, 1),
            Pings | LongNames | Registers | Calls => {
                self.send(messages, usize::MAX);
                self.read();
            }
            NeverReading => {
                if !self.send_on(messages, self.next, usize::MAX) {
                    self.crowd.remove(self.next);
                    self.connect()?;
                }
                self.next = (self.next + 1) % self.crowd.len().max(1);
            }
            HalfFrames => self.newcomer(messages, 100)?,
            LengthWords => self.newcomer(messages, FEW)?,
            OverTheLimit | NoDescriptors => self.newcomer(messages, 100)?,
            Vanishing => {
                if self.connect()? {
                    self.acts += 1;
                }
                self.crowd.clear();
            }
            Descriptors => {
                if self.replace(FEW)? {
                    self.send_descriptors(&messages[0])?;
                }
            }
        }
        Ok(())
    }

    /// A new connection that sends its message.
    fn newcomer(&mut self, messages: &[Vec<u8>], enough: u32) -> Outcome<()> {
        if self.replace(enough)? {
            self.send_on(messages, self.crowd.len() - 1, usize::MAX);
        }
        Ok(())
    }

    /// The next connection goes on with its message, at most so many bytes.
    fn send(&mut self, messages: &[Vec<u8>], most: usize) {
        self.next = (self.next + 1) % self.crowd.len().max(1);
        self.send_on(messages, self.next, most);
    }

    /// Whether the server took anything.
    fn send_on(&mut self, messages: &[Vec<u8>], number: usize, most: usize) -> bool {
        let Some(enemy) = self.crowd.get_mut(number) else {
            return false;
        };
        let message = &messages[enemy.message % messages.len()];
        let end = enemy.sent.saturating_add(most).min(message.len());
        match enemy.stream.write(&message[enemy.sent..end]) {
            Ok(count) => {
                enemy.sent = (enemy.sent + count) % message.len();
                self.acts += 1;
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            // The server has closed it, which is its right.
            Err(_) => true,
        }
    }

    /// Whoever's turn it is reads its replies.
    fn read(&mut self) {
        if let Some(enemy) = self.crowd.get_mut(self.next) {
            let _ = enemy.stream.read(&mut self.scratch);
        }
    }

    fn send_descriptors(&mut self, call: &[u8]) -> Outcome<()> {
        let Some(enemy) = self.crowd.back_mut() else {
            return Ok(());
        };
        let _ = enemy.stream.write(call);
        let stdin = std::io::stdin();
        let many = [stdin.as_raw_fd(); MOST_DESCRIPTORS];
        for descriptors in [&many[..1], &many, &many[..2]] {
            let sent = sendmsg::<()>(
                enemy.stream.as_raw_fd(),
                &[IoSlice::new(b"\0")],
                &[ControlMessage::ScmRights(descriptors)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(_) => self.acts += 1,
                // Closed already; too many on their way; no room.
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ETOOMANYREFS | Errno::EAGAIN) => {
                    return Ok(());
                }
                Err(errno) => return Err(format!("sending descriptors: {errno}")),
            }
        }
        Ok(())
    }
}

/// The greater part of a frame whose end never comes.
fn half_frame() -> Vec<u8> {
    let mut bytes = acquire("/run/disks/none");
    bytes.resize(100_000, b'x');
    set_word(&mut bytes, at::LENGTH, LARGEST_FRAME);
    bytes
}
