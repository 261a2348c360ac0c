//! The re-exec at SIGUSR1 with thousands of guests: how long is the longest silence that a busy
//! client sees, and is a reply lost?

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::boot::{DISKS_PER_MACHINE, boot, check_all_locked};
use crate::client::{Client, acquire, make_disk, register, release};
use crate::machines::Machines;
use crate::measure::{Outcome, milliseconds, now_ns};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "reexec";
pub const SILENCE: &str = "longest silence";
pub const LOST: &str = "replies lost";

const INDEX: u32 = 700_000;
/// Re-execs in one run, each of which may lose a reply.
const ROUNDS: u32 = 5;
/// The busy client is busy for so long before the signal.
const BEFORE: Duration = Duration::from_millis(200);
/// A daemon that has not begun its re-exec by then does not have one.
const START_LIMIT: Duration = Duration::from_secs(10);
/// The busy client is busy for so long after the new image was seen.
const AFTER: Duration = Duration::from_millis(1500);
/// An answer that takes longer than this is waited for on a second connection too.
const PATIENCE_MS: u16 = 20;
/// The daemon answers others, so this reply is overdue.
const LOST_AFTER_MS: u16 = 1000;
const ANSWER_LIMIT_MS: u16 = 60_000;

pub fn case(machines: u32) -> String {
    format!("{machines} VMs")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    for &machines in &options.sizes.reexec {
        let mut processes = Machines::ready(machines + 1)?;
        let mut server = Server::start(programs, subject, Placement::Split)?;
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        boot(&server, &mut processes, machines)?;
        let owner = processes.start_one(&server, INDEX)?;
        let mut watch = Watch::begin(&server, owner)?;
        for _ in 0..ROUNDS {
            if !watch.round(&server)? {
                let title = subject.title();
                results.note(format!("reexec: the {title} does not re-exec at SIGUSR1"));
                return Ok(());
            }
        }
        server.check_alive()?;
        check_all_locked(&server, machines)?;
        let mut row = results.recorder(NAME, case(machines), subject);
        row(SILENCE, "ms", milliseconds(watch.silence_ns as f64));
        row(LOST, "of 5", f64::from(watch.lost));
    }
    Ok(())
}

/// The busy client with a file that it locks and unlocks, and a second connection for the case
/// that the first one's reply never comes.
struct Watch {
    /// The pid of the machine for which the busy client calls.
    owner: u32,
    busy: Client,
    frames: [Vec<u8>; 2],
    turn: usize,
    second: Client,
    second_frame: Vec<u8>,
    files: u32,
    last_answer_ns: u64,
    silence_ns: u64,
    lost: u32,
}

/// A busy client needs a new file when the state of the old one is unknown.
fn busy_client(server: &Server, owner: u32, file: u32) -> Outcome<(Client, [Vec<u8>; 2])> {
    let disk = server.disk(INDEX + file);
    make_disk(&server.outside(&disk))?;
    let mut busy = Client::connect(&server.socket())?;
    busy.call(&mut register(INDEX, owner))?;
    Ok((busy, [acquire(&disk), release(&disk)]))
}

impl Watch {
    fn begin(server: &Server, owner: u32) -> Outcome<Self> {
        let (busy, frames) = busy_client(server, owner, 0)?;
        let mut second_frame = register(INDEX, owner);
        let mut second = Client::connect(&server.socket())?;
        second.call(&mut second_frame)?;
        let last_answer_ns = now_ns();
        Ok(Self {
            owner,
            busy,
            frames,
            turn: 0,
            second,
            second_frame,
            files: 1,
            last_answer_ns,
            silence_ns: 0,
            lost: 0,
        })
    }

    /// One re-exec under way of the busy client; says whether there was one.
    fn round(&mut self, server: &Server) -> Outcome<bool> {
        let before = probe::stack_place(server.pid)?;
        let pid = Pid::from_raw(server.pid);
        // From another thread: a signal between two calls of this one would lose nothing.
        let signaller = std::thread::spawn(move || {
            std::thread::sleep(BEFORE);
            kill(pid, Signal::SIGUSR1)
        });
        self.last_answer_ns = now_ns();
        let start = Instant::now();
        let mut seen = None;
        loop {
            self.call(server)?;
            match seen {
                None if probe::stack_place(server.pid)? != before => seen = Some(Instant::now()),
                None if start.elapsed() > START_LIMIT => break,
                Some(seen) if seen.elapsed() > AFTER => break,
                _ => {}
            }
            // The look at /proc is not the daemon's silence.
            self.last_answer_ns = now_ns();
        }
        let sent = signaller
            .join()
            .map_err(|_| "the signalling thread panicked")?;
        sent.map_err(|e| format!("SIGUSR1: {e}"))?;
        Ok(seen.is_some())
    }

    /// One call of the busy client, with the second connection as a witness when it takes long.
    fn call(&mut self, server: &Server) -> Outcome<()> {
        let frame = &mut self.frames[self.turn % 2];
        let serial = self.busy.send(frame)?;
        let mut is_lost = false;
        if !readable(&[&self.busy], PATIENCE_MS)? {
            let witness = self.second.send(&mut self.second_frame)?;
            if !readable(&[&self.busy, &self.second], ANSWER_LIMIT_MS)? {
                return Err(format!("no answer to anybody for {ANSWER_LIMIT_MS} ms"));
            }
            self.answered();
            self.second.receive(witness)?;
            is_lost = !readable(&[&self.busy], LOST_AFTER_MS)?;
        }
        if is_lost {
            self.lost += 1;
            (self.busy, self.frames) = busy_client(server, self.owner, self.files)?;
            self.files += 1;
            self.turn = 0;
            // Waiting for the lost reply was this client's doing.
            self.last_answer_ns = now_ns();
        } else {
            self.busy.receive(serial)?;
            self.answered();
            self.turn += 1;
        }
        Ok(())
    }

    fn answered(&mut self) {
        let now = now_ns();
        self.silence_ns = self.silence_ns.max(now - self.last_answer_ns);
        self.last_answer_ns = now;
    }
}

/// Waits until one of the clients has something to read.
fn readable(clients: &[&Client], limit_ms: u16) -> Outcome<bool> {
    let mut interest: Vec<PollFd> = clients
        .iter()
        .map(|client| PollFd::new(client.stream.as_fd(), PollFlags::POLLIN))
        .collect();
    let ready = poll(&mut interest, PollTimeout::from(limit_ms));
    ready
        .map(|ready| ready > 0)
        .map_err(|e| format!("poll: {e}"))
}
