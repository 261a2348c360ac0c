//! Booting: machines start as libvirtd starts them, twenty at a time (its worker threads). Each
//! machine is a process, whose own connection REGISTERs, RESTRICTs and stays; then a short one of
//! libvirtd, which is the bench, REGISTERs in the machine's name, acquires two disks and closes.

use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::client::{Client, acquire, register};
use crate::machines::Machines;
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

/// What is heard of here: no worker has this number.
const MACHINES: usize = WORKERS;

/// What a worker waits for.
enum Step {
    /// The machine makes its own calls.
    Machine,
    /// The answer to libvirtd's REGISTER.
    Register { libvirtd: Client },
    /// The answer to its ACQUIRE.
    Acquire { libvirtd: Client, disk: u32 },
}

/// A thread of libvirtd, so to speak, with the machine that it starts.
struct Worker {
    machine: u32,
    step: Step,
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    for &machines in &options.sizes.boot {
        let mut processes = Machines::ready(machines)?;
        let server = Server::start(programs, subject, Placement::Split)?;
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        let cpu = probe::cpu_ns(server.pid)?;
        let start = Instant::now();
        boot(&server, &mut processes, machines)?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        let cpu = probe::cpu_ns(server.pid)? - cpu;
        check_all_locked(&server, machines)?;
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

/// Starts the machines, each with two disks of the server's own. The disks exist already.
pub fn boot(server: &Server, processes: &mut Machines, machines: u32) -> Outcome<()> {
    let disk_of = |machine, disk| {
        let is_one = disk < DISKS_PER_MACHINE;
        is_one.then(|| server.disk(machine * DISKS_PER_MACHINE + disk))
    };
    boot_with(server, processes, machines, disk_of)
}

/// The same with other disks: `disk_of` says where the disk with this number of a machine is, or that the
/// machine has no more of them. Each has at least one.
pub fn boot_with(
    server: &Server,
    processes: &mut Machines,
    machines: u32,
    disk_of: impl Fn(u32, u32) -> Option<String>,
) -> Outcome<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| format!("epoll: {e}"))?;
    let event = EpollEvent::new(EpollFlags::EPOLLIN, MACHINES as u64);
    epoll
        .add(processes.news()?, event)
        .map_err(|e| format!("epoll_ctl: {e}"))?;
    let mut waiting = 0..machines;
    let mut workers: [Option<Worker>; WORKERS] = Default::default();
    for (worker, machine) in workers.iter_mut().zip(waiting.by_ref()) {
        *worker = Some(Worker::begin(server, processes, machine)?);
    }
    let mut events = [EpollEvent::empty(); WORKERS + 1];
    while workers.iter().any(Option::is_some) {
        let ready = epoll
            .wait(&mut events, EpollTimeout::from(SILENCE_LIMIT_MS))
            .map_err(|e| format!("epoll_wait: {e}"))?;
        if ready == 0 {
            return Err(format!("no machine moved for {SILENCE_LIMIT_MS} ms"));
        }
        for event in &events[..ready] {
            let slot = event.data() as usize;
            if slot == MACHINES {
                let (machine, pid) = processes.started()?;
                let its = |it: &Option<Worker>| it.as_ref().is_some_and(|it| it.machine == machine);
                let slot = workers.iter().position(its);
                let slot = slot.ok_or("a machine started that nobody waits for")?;
                let step = Step::Register {
                    libvirtd: open(server, slot, &epoll, register(machine, pid))?,
                };
                workers[slot] = Some(Worker { machine, step });
                continue;
            }
            let Some(worker) = workers[slot].as_mut() else {
                continue;
            };
            if worker.advance(&disk_of)? {
                // Its connection closes before the next machine begins.
                workers[slot] = None;
                if let Some(machine) = waiting.next() {
                    workers[slot] = Some(Worker::begin(server, processes, machine)?);
                }
            }
        }
    }
    Ok(())
}

/// A connection of libvirtd, with its first call on the way.
fn open(server: &Server, slot: usize, epoll: &Epoll, mut first: Vec<u8>) -> Outcome<Client> {
    let mut client = Client::connect(&server.socket())?;
    let event = EpollEvent::new(EpollFlags::EPOLLIN, slot as u64);
    epoll
        .add(&client.stream, event)
        .map_err(|e| format!("epoll_ctl: {e}"))?;
    client.send(&mut first)?;
    Ok(client)
}

impl Worker {
    fn begin(server: &Server, processes: &mut Machines, machine: u32) -> Outcome<Self> {
        processes.start(server, machine)?;
        let step = Step::Machine;
        Ok(Self { machine, step })
    }

    /// Reads the answer and sends the next call; says whether the machine runs.
    fn advance(&mut self, disk_of: impl Fn(u32, u32) -> Option<String>) -> Outcome<bool> {
        let (mut libvirtd, answered, next) = match std::mem::replace(&mut self.step, Step::Machine)
        {
            Step::Machine => return Err("an answer to nobody".into()),
            Step::Register { libvirtd } => (libvirtd, 0, 0),
            Step::Acquire { libvirtd, disk } => (libvirtd, disk + 1, disk + 1),
        };
        libvirtd
            .receive_at_once(answered)
            .map_err(|e| format!("machine {}: {e}", self.machine))?;
        let Some(path) = disk_of(self.machine, next) else {
            return Ok(true);
        };
        libvirtd.send(&mut acquire(&path))?;
        let disk = next;
        self.step = Step::Acquire { libvirtd, disk };
        Ok(false)
    }
}
