//! Two clients that watch a daemon while something happens to it: one that is busy, and one that tells a
//! lost answer from a late one.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::client::{Client, REPLY_BYTES, acquire, make_disk, register, release};
use crate::measure::{Outcome, now_ns};
use crate::subject::Server;

/// The number of the machine for which the busy client calls.
pub const INDEX: u32 = 700_000;
/// The busy client is busy for so long before the event.
const BEFORE: Duration = Duration::from_millis(200);
/// What has not happened by then does not happen.
const START_LIMIT: Duration = Duration::from_secs(10);
/// The busy client is busy for so long after the event was seen.
const AFTER: Duration = Duration::from_millis(1500);
/// An answer that takes longer than this is waited for on a second connection too.
const PATIENCE_MS: u16 = 20;
/// The daemon answers others, so this reply is overdue.
const LOST_AFTER_MS: u16 = 1000;
const ANSWER_LIMIT_MS: u16 = 60_000;

/// The busy client with a file that it locks and unlocks, and a second connection for the case
/// that the first one's reply never comes.
pub struct Watch {
    /// The pid of the machine for which the busy client calls.
    owner: u32,
    busy: Client,
    frames: [Vec<u8>; 2],
    turn: usize,
    second: Client,
    second_frame: Vec<u8>,
    files: u32,
    last_answer_ns: u64,
    /// The longest wait for an answer.
    pub silence_ns: u64,
    /// Calls that were never answered.
    pub lost: u32,
    /// Answers to nothing that was asked.
    pub doubled: u32,
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
    pub fn begin(server: &Server, owner: u32) -> Outcome<Self> {
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
            doubled: 0,
        })
    }

    /// One event under way of the busy client: `act` brings it about, and it has happened when `look` sees
    /// something else than before. Says whether it happened.
    pub fn round(
        &mut self,
        server: &Server,
        act: impl FnOnce() -> nix::Result<()> + Send + 'static,
        look: impl Fn() -> Outcome<String>,
    ) -> Outcome<bool> {
        let before = look()?;
        // From another thread: what comes between two calls of this one would harm nothing.
        let actor = std::thread::spawn(move || {
            std::thread::sleep(BEFORE);
            act()
        });
        self.last_answer_ns = now_ns();
        let start = Instant::now();
        let mut seen = None;
        loop {
            self.call(server)?;
            match seen {
                None if look()? != before => seen = Some(Instant::now()),
                None if start.elapsed() > START_LIMIT => break,
                Some(seen) if seen.elapsed() > AFTER => break,
                _ => {}
            }
            // The look at /proc is not the daemon's silence.
            self.last_answer_ns = now_ns();
        }
        let sent = actor.join().map_err(|_| "the signalling thread panicked")?;
        sent.map_err(|e| format!("sending a signal: {e}"))?;
        Ok(seen.is_some())
    }

    /// One call of the busy client, with the second connection as a witness when it takes long.
    fn call(&mut self, server: &Server) -> Outcome<()> {
        if readable(&[&self.busy], 0)? {
            self.doubled += 1;
            self.busy.read_fully(&mut [0; REPLY_BYTES])?;
        }
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
