//! Machines: real processes, each with the connection that the child of libvirtd which becomes QEMU
//! makes for itself (the peer pid is the owner's pid). Their locks are taken by the bench over other
//! connections that name the machine's pid, as libvirtd does it.
//!
//! A daemon treats an owner without a process, or without a connection of its own, in another way than
//! a guest: it looks into /proc, it watches, it warns. A bench whose owners are on paper would measure
//! that and not guests.
//!
//! Thousands of processes take longer to start than what is measured. So they are started once, and
//! wait at one pipe for the word to start; the kernel wakes one of them for each word. When the server
//! is gone they wait again, for the next one. To start, a machine does the calls of a guest and nothing
//! else. All of them live on the CPU on which the bench drives a busy server.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::client::{Client, register, restrict};
use crate::helper::{ROLE, own_program};
use crate::measure::Outcome;
use crate::subject::{Placement, Server, socket_of};

/// Machines that [`Machines::start_all`] has starting at the same time: libvirtd's default of
/// max_workers.
const WORKERS: u32 = 20;
/// No machine has started, or is ready, for so long.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// What a machine says of itself, in the third word of a report.
const WAITS: u32 = 0;
const RUNS: u32 = 1;
const FAILED: u32 = 2;

/// A word to start: which machine, and the pid of its server.
type Order = [u32; 2];
/// Which machine, its pid, and how it is.
type Report = [u32; 3];

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// All processes that are there.
struct Pool {
    processes: Vec<Child>,
    orders: PipeWriter,
    /// The end at which the processes wait, for those that are still to be started.
    waiting: PipeReader,
    reports: PipeReader,
    reporting: PipeWriter,
    /// How many wait for an order.
    ready: usize,
}

impl Pool {
    fn new() -> Outcome<Self> {
        let new_pipe = || pipe().map_err(|e| format!("a pipe for machines: {e}"));
        let ((waiting, orders), (reports, reporting)) = (new_pipe()?, new_pipe()?);
        Ok(Self {
            processes: Vec::new(),
            orders,
            waiting,
            reports,
            reporting,
            ready: 0,
        })
    }

    fn grow_to(&mut self, count: u32) -> Outcome<()> {
        let program = own_program()?;
        while self.processes.len() < count as usize {
            let copies = (self.waiting.try_clone(), self.reporting.try_clone());
            let (Ok(orders), Ok(reports)) = copies else {
                return Err("a descriptor for a machine cannot be copied".into());
            };
            let process = Command::new(&program)
                .arg(format!("{ROLE}machine"))
                .stdin(Stdio::from(orders))
                .stdout(Stdio::from(reports))
                .spawn()
                .map_err(|e| format!("starting the process of a machine: {e}"))?;
            self.processes.push(process);
        }
        Ok(())
    }

    /// The next report. Those that are ready are counted.
    fn hear(&mut self) -> Outcome<Report> {
        let mut interest = [PollFd::new(self.reports.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(SILENCE_LIMIT).map_err(|e| format!("a timeout: {e}"))?;
        let heard = poll(&mut interest, limit).map_err(|e| format!("poll: {e}"))?;
        if heard == 0 {
            return Err(format!("no machine said anything for {SILENCE_LIMIT:?}"));
        }
        let report: Report = read_words(&mut self.reports)?.ok_or("the machines are gone")?;
        self.ready += usize::from(report[2] == WAITS);
        Ok(report)
    }

    /// Waits until all processes are ready, whatever became of them before.
    fn muster(&mut self) -> Outcome<()> {
        while self.ready < self.processes.len() {
            self.hear()?;
        }
        Ok(())
    }
}

/// The machines of one server.
pub struct Machines {
    pool: MutexGuard<'static, Option<Pool>>,
}

/// Waits until the machines of the server before, which is gone, are ready for the next one.
pub fn muster() -> Outcome<()> {
    let mut pool = POOL.lock().map_err(|_| "the machines are in disorder")?;
    pool.as_mut().map_or(Ok(()), Pool::muster)
}

impl Machines {
    /// At least so many machines that wait for the word to start. Before the server starts: the bench is
    /// moved to where they are.
    pub fn ready(count: u32) -> Outcome<Self> {
        let mut pool = POOL.lock().map_err(|_| "the machines are in disorder")?;
        if pool.is_none() {
            *pool = Some(Pool::new()?);
        }
        let mut machines = Self { pool };
        Placement::Split.move_the_bench()?;
        let pool = machines.pool()?;
        pool.grow_to(count)?;
        pool.muster()?;
        Ok(machines)
    }

    fn pool(&mut self) -> Outcome<&mut Pool> {
        self.pool.as_mut().ok_or_else(|| "no machines".to_owned())
    }

    /// Tells a machine to start, and does not wait for it.
    pub fn start(&mut self, server: &Server, index: u32) -> Outcome<()> {
        let pool = self.pool()?;
        let order: Order = [index, server.pid as u32];
        pool.ready = pool.ready.saturating_sub(1);
        pool.orders
            .write_all(&bytes_of(&order))
            .map_err(|e| format!("telling machine {index} to start: {e}"))
    }

    /// Where it can be read that a machine runs.
    pub fn news(&self) -> Outcome<BorrowedFd<'_>> {
        let pool = self.pool.as_ref().ok_or("no machines")?;
        Ok(pool.reports.as_fd())
    }

    /// The next machine that runs, and its pid.
    pub fn started(&mut self) -> Outcome<(u32, u32)> {
        let pool = self.pool()?;
        loop {
            match pool.hear()? {
                [_, _, WAITS] => (),
                [index, pid, RUNS] => return Ok((index, pid)),
                [index, ..] => {
                    return Err(format!(
                        "machine {index} did not start; its reason is printed above"
                    ));
                }
            }
        }
    }

    /// Starts machines and returns their pids, in the order of their indexes, when all of them run.
    pub fn start_all(
        &mut self,
        server: &Server,
        indexes: std::ops::Range<u32>,
    ) -> Outcome<Vec<u32>> {
        let mut pids = vec![0; indexes.len()];
        let first = indexes.start;
        let mut rest = indexes.clone();
        for index in rest.by_ref().take(WORKERS as usize) {
            self.start(server, index)?;
        }
        for _ in indexes {
            let (index, pid) = self.started()?;
            pids[(index - first) as usize] = pid;
            if let Some(next) = rest.next() {
                self.start(server, next)?;
            }
        }
        Ok(pids)
    }

    /// Starts one machine and returns its pid.
    pub fn start_one(&mut self, server: &Server, index: u32) -> Outcome<u32> {
        self.start(server, index)?;
        Ok(self.started()?.1)
    }
}

/// The machine's side: it starts whenever it is told to, and runs until its server is gone.
pub fn live() -> Outcome<()> {
    // Not through std's own, which read ahead: one word is for one machine.
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    let orders = own(std::io::stdin().as_fd()).map_err(|e| format!("no orders: {e}"));
    let reports = own(std::io::stdout().as_fd()).map_err(|e| format!("no reports: {e}"));
    let (mut orders, mut reports) = (orders?, reports?);
    let pid = std::process::id();
    let mut say = |index: u32, how: u32| {
        let report: Report = [index, pid, how];
        reports
            .write_all(&bytes_of(&report))
            .map_err(|e| format!("saying how machine {index} is: {e}"))
    };
    let mut index = 0;
    loop {
        say(index, WAITS)?;
        let order: Option<Order> = read_words(&mut orders)?;
        let Some([number, server]) = order else {
            return Ok(());
        };
        index = number;
        match start(index, pid, server) {
            Ok(mut client) => {
                say(index, RUNS)?;
                client.wait_for_end()?;
            }
            Err(error) => {
                eprintln!("machine {index}: {error}");
                say(index, FAILED)?;
            }
        }
    }
}

fn start(index: u32, pid: u32, server: u32) -> Outcome<Client> {
    let mut client = Client::connect(&socket_of(server as i32))?;
    client.call(&mut register(index, pid))?;
    client.call(&mut restrict())?;
    Ok(client)
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// So many words, or nothing at the end. They were written at once, and a pipe does not part them.
fn read_words<const COUNT: usize>(from: &mut impl Read) -> Outcome<Option<[u32; COUNT]>> {
    let mut bytes = vec![0; COUNT * 4];
    let count = from
        .read(&mut bytes)
        .map_err(|e| format!("reading a pipe of machines: {e}"))?;
    if count == 0 {
        return Ok(None);
    }
    if count != bytes.len() {
        return Err("a pipe of machines was read in parts".into());
    }
    let (words, _) = bytes.as_chunks::<4>();
    let mut found = [0; COUNT];
    for (place, word) in found.iter_mut().zip(words) {
        *place = u32::from_ne_bytes(*word);
    }
    Ok(Some(found))
}
