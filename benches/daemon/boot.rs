//! Booting: machines start as libvirtd starts them, twenty at a time (its worker threads). For each
//! machine one connection REGISTERs, RESTRICTs and stays; then a short one REGISTERs, acquires two
//! disks and closes.

use std::io::{Read, Write};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::client::{Client, REPLY_BYTES, acquire, is_ok, paper_pid, register, restrict, stamp};
use crate::measure::Outcome;
use crate::options::Options;
use crate::probe;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "boot";
pub const TIME: &str = "all running";

/// Machines that start at the same time: libvirtd's default of max_workers.
const WORKERS: usize = 20;
pub const DISKS_PER_MACHINE: u32 = 2;
const SILENCE_LIMIT_MS: u16 = 60_000;

pub fn case(machines: u32) -> String {
    format!("{machines} VMs")
}

/// What a worker waits for.
#[derive(Clone, Copy)]
enum Step {
    GuestRegister,
    GuestRestrict,
    HostRegister,
    HostAcquire { disk: u32 },
}

/// A thread of libvirtd, so to speak, with the machine that it starts.
struct Worker {
    machine: u32,
    step: Step,
    client: Client,
    serial: u32,
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    for &machines in &options.sizes.boot {
        let server = Server::start(programs, subject, Placement::Split)?;
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        let cpu = probe::cpu_ns(server.pid)?;
        let start = Instant::now();
        let guests = boot(&server, machines)?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        let cpu = probe::cpu_ns(server.pid)? - cpu;
        check_all_locked(&server, machines)?;
        drop(guests);
        let mut row = results.recorder(NAME, case(machines), subject);
        row(TIME, "ms", milliseconds);
        row("CPU per VM", "us", cpu as f64 / 1e3 / f64::from(machines));
    }
    Ok(())
}

/// All disks of the machines are locked, as seen from outside.
pub fn check_all_locked(server: &Server, machines: u32) -> Outcome<()> {
    for number in 0..machines * DISKS_PER_MACHINE {
        let disk = server.disk(number);
        if !probe::is_locked(&server.outside(&disk))? {
            return Err(format!(
                "{disk} of machine {} is not locked",
                number / DISKS_PER_MACHINE
            ));
        }
    }
    Ok(())
}

/// Starts the machines; returns the connections that their guests keep. The disks exist already.
pub fn boot(server: &Server, machines: u32) -> Outcome<Vec<Client>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| format!("epoll: {e}"))?;
    let mut guests = Vec::with_capacity(machines as usize);
    let mut waiting = 0..machines;
    let mut workers = Vec::new();
    for (slot, machine) in (0..WORKERS).zip(waiting.by_ref()) {
        workers.push(Some(Worker::begin(server, machine, slot, &epoll)?));
    }
    let mut events = [EpollEvent::empty(); WORKERS];
    while workers.iter().any(Option::is_some) {
        let ready = epoll
            .wait(&mut events, EpollTimeout::from(SILENCE_LIMIT_MS))
            .map_err(|e| format!("epoll_wait: {e}"))?;
        if ready == 0 {
            return Err(format!("no machine moved for {SILENCE_LIMIT_MS} ms"));
        }
        for event in &events[..ready] {
            let slot = event.data() as usize;
            let Some(worker) = workers[slot].as_mut() else {
                continue;
            };
            if worker.advance(server, slot, &epoll, &mut guests)? {
                workers[slot] = match waiting.next() {
                    Some(machine) => Some(Worker::begin(server, machine, slot, &epoll)?),
                    None => None,
                };
            }
        }
    }
    Ok(guests)
}

fn open(server: &Server, slot: usize, epoll: &Epoll) -> Outcome<Client> {
    let client = Client::connect(&server.socket())?;
    client
        .stream
        .set_nonblocking(true)
        .map_err(|e| format!("non-blocking: {e}"))?;
    let event = EpollEvent::new(EpollFlags::EPOLLIN, slot as u64);
    epoll
        .add(&client.stream, event)
        .map_err(|e| format!("epoll_ctl: {e}"))?;
    Ok(client)
}

impl Worker {
    fn begin(server: &Server, machine: u32, slot: usize, epoll: &Epoll) -> Outcome<Self> {
        let client = open(server, slot, epoll)?;
        let mut worker = Self {
            machine,
            step: Step::GuestRegister,
            client,
            serial: 0,
        };
        worker.send(register(machine, paper_pid(machine)))?;
        Ok(worker)
    }

    fn send(&mut self, mut frame: Vec<u8>) -> Outcome<()> {
        stamp(&mut frame, self.serial);
        let sent = self
            .client
            .stream
            .write(&frame)
            .map_err(|e| format!("sending: {e}"))?;
        if sent == frame.len() {
            Ok(())
        } else {
            Err("the socket took a part of a call".into())
        }
    }

    /// Reads the answer and sends the next call; says whether the machine runs.
    fn advance(
        &mut self,
        server: &Server,
        slot: usize,
        epoll: &Epoll,
        guests: &mut Vec<Client>,
    ) -> Outcome<bool> {
        let mut reply = [0; REPLY_BYTES + 4];
        let count = self
            .client
            .stream
            .read(&mut reply)
            .map_err(|e| format!("reading: {e}"))?;
        if count != REPLY_BYTES || !is_ok(&reply[..REPLY_BYTES], self.serial) {
            let machine = self.machine;
            return Err(format!(
                "machine {machine}: bad reply ({count} bytes): {reply:02x?}"
            ));
        }
        self.serial += 1;
        let disk_of = |disk| server.disk(self.machine * DISKS_PER_MACHINE + disk);
        match self.step {
            Step::GuestRegister => {
                self.step = Step::GuestRestrict;
                self.send(restrict())?;
            }
            Step::GuestRestrict => {
                epoll
                    .delete(&self.client.stream)
                    .map_err(|e| format!("epoll_ctl: {e}"))?;
                let host = open(server, slot, epoll)?;
                guests.push(std::mem::replace(&mut self.client, host));
                self.serial = 0;
                self.step = Step::HostRegister;
                self.send(register(self.machine, paper_pid(self.machine)))?;
            }
            Step::HostRegister => {
                self.step = Step::HostAcquire { disk: 0 };
                self.send(acquire(&disk_of(0)))?;
            }
            Step::HostAcquire { disk } if disk + 1 < DISKS_PER_MACHINE => {
                self.step = Step::HostAcquire { disk: disk + 1 };
                self.send(acquire(&disk_of(disk + 1)))?;
            }
            // Its connection closes as soon as the worker takes the next machine.
            Step::HostAcquire { .. } => return Ok(true),
        }
        Ok(false)
    }
}
