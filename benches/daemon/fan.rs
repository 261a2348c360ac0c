//! Many busy clients: each sends one call for a running machine, waits for the answer and sends the
//! next, on a file of its own.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::client::{Client, REPLY_BYTES, acquire, connect_many, is_ok, register, release, stamp};
use crate::machines::Machines;
use crate::measure::{Outcome, microseconds};
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "fan";
pub const RATE: &str = "throughput";

const WARM_UP: Duration = Duration::from_millis(500);
const MEASURE: Duration = Duration::from_secs(2);
/// No answer to any of the clients for so long is a failure.
const SILENCE_LIMIT_MS: u16 = 60_000;

pub fn case(busy: u32) -> String {
    format!("{busy} busy")
}

/// A client and its turn: it asks for its lock, then gives it back.
struct Busy {
    client: Client,
    frames: [Vec<u8>; 2],
    serial: u32,
    answers: u64,
}

impl Busy {
    fn send(&mut self) -> Outcome<()> {
        let frame = &mut self.frames[self.serial as usize % 2];
        stamp(frame, self.serial);
        let sent = self
            .client
            .stream
            .write(frame)
            .map_err(|e| format!("sending: {e}"))?;
        if sent == frame.len() {
            Ok(())
        } else {
            Err("the socket took a part of a call".into())
        }
    }

    fn receive(&mut self) -> Outcome<()> {
        let mut reply = [0; REPLY_BYTES + 4];
        let count = self
            .client
            .stream
            .read(&mut reply)
            .map_err(|e| format!("reading: {e}"))?;
        if count != REPLY_BYTES || !is_ok(&reply[..REPLY_BYTES], self.serial) {
            return Err(format!("not the good reply ({count} bytes): {reply:02x?}"));
        }
        self.serial = self.serial.wrapping_add(1);
        self.answers += 1;
        Ok(())
    }
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    for &busy in &options.sizes.busy {
        let mut machines = Machines::ready(busy)?;
        let server = Server::start(programs, subject, Placement::Split)?;
        server.make_disks(0..busy)?;
        let owners = machines.start_all(&server, 0..busy)?;
        let (rate, cpu) = measure(&server, &owners)?;
        let mut row = results.recorder(NAME, case(busy), subject);
        row(RATE, "requests/s", rate);
        row("CPU per request", "us", cpu);
    }
    Ok(())
}

fn measure(server: &Server, owners: &[u32]) -> Outcome<(f64, f64)> {
    let busy = owners.len() as u32;
    let greeting = |index| vec![register(index, owners[index as usize])];
    let clients = connect_many(&server.socket(), 0..busy, greeting)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| format!("epoll: {e}"))?;
    let mut crowd = Vec::with_capacity(clients.len());
    for (number, client) in (0_u32..).zip(clients) {
        client
            .stream
            .set_nonblocking(true)
            .map_err(|e| format!("non-blocking: {e}"))?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number.into());
        epoll
            .add(&client.stream, event)
            .map_err(|e| format!("epoll_ctl: {e}"))?;
        let disk = server.disk(number);
        let frames = [acquire(&disk), release(&disk)];
        crowd.push(Busy {
            client,
            frames,
            serial: 1000,
            answers: 0,
        });
    }
    for client in &mut crowd {
        client.send()?;
    }
    converse(&epoll, &mut crowd, WARM_UP)?;
    let cpu = probe::cpu_ns(server.pid)?;
    let start = Instant::now();
    let answers = converse(&epoll, &mut crowd, MEASURE)?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu = probe::cpu_ns(server.pid)? - cpu;
    if let Some(hungry) = crowd.iter().position(|client| client.answers == 0) {
        return Err(format!("client {hungry} of {busy} was never answered"));
    }
    Ok((
        answers as f64 / seconds,
        microseconds(cpu as f64 / answers as f64),
    ))
}

/// Answers are read and the next calls sent until the time is over; returns the answers.
fn converse(epoll: &Epoll, crowd: &mut [Busy], time: Duration) -> Outcome<u64> {
    let mut events = [EpollEvent::empty(); 512];
    let deadline = Instant::now() + time;
    let mut answers = 0;
    while Instant::now() < deadline {
        let ready = epoll
            .wait(&mut events, EpollTimeout::from(SILENCE_LIMIT_MS))
            .map_err(|e| format!("epoll_wait: {e}"))?;
        if ready == 0 {
            return Err(format!("no answer to anybody for {SILENCE_LIMIT_MS} ms"));
        }
        for event in &events[..ready] {
            let client = &mut crowd[event.data() as usize];
            client.receive()?;
            client.send()?;
        }
        answers += ready as u64;
    }
    Ok(answers)
}
