//! A stop that keeps everything and the start that goes on from it, with thousands of guests: how long until
//! the process is gone, and how long from the next one's exec until a call is answered that waited?
//!
//! The service manager is a stand-in: it stores what it is told to and gives it to the next start. So nothing
//! of systemd's own time is in the numbers.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};

use crate::boot::{DISKS_PER_MACHINE, boot, check_all_locked};
use crate::client::{Client, acquire, register};
use crate::machines::Machines;
use crate::measure::{Outcome, milliseconds, now_ns};
use crate::options::Options;
use crate::results::Results;
use crate::subject::{Placement, Programs, Server, Subject};

pub const NAME: &str = "stop";
pub const GONE: &str = "stop: process gone";
pub const ANSWERED: &str = "start: first answer";

const INDEX: u32 = 700_000;

pub fn case(machines: u32) -> String {
    format!("{machines} VMs")
}

pub fn run(
    options: &Options,
    programs: &Programs,
    subject: Subject,
    results: &mut Results,
) -> Outcome<()> {
    if subject == Subject::C {
        results.note("stop: libvirt's daemon kills the guests, or lets all locks go".into());
        return Ok(());
    }
    for &machines in &options.sizes.reexec {
        let mut processes = Machines::ready(machines + 1)?;
        let words = ["python3", "-c", MANAGER];
        let (server, orders, answers) =
            Server::start_through(programs, subject, Placement::Split, &words)?;
        let mut manager = Manager { orders, answers };
        server.make_disks(0..machines * DISKS_PER_MACHINE)?;
        boot(&server, &mut processes, machines)?;
        let owner = processes.start_one(&server, INDEX)?;
        let mut client = Client::connect(&server.socket())?;
        client.call(&mut register(INDEX, owner))?;
        let disk = server.disk(INDEX);
        crate::client::make_disk(&server.outside(&disk))?;
        let gone_ns = match manager.order("stop") {
            Err(reason) if subject == Subject::Before => {
                results.note(format!(
                    "stop: the program of before keeps nothing: {reason}"
                ));
                return Ok(());
            }
            gone_ns => gone_ns?,
        };
        check_all_locked(&server, machines)?;
        let waiting = client.send(&mut acquire(&disk))?;
        let start_ns = manager.order("start")?;
        client.receive(waiting)?;
        let answered_ns = now_ns() - start_ns;
        check_all_locked(&server, machines)?;
        let mut row = results.recorder(NAME, case(machines), subject);
        row(GONE, "ms", milliseconds(gone_ns as f64));
        row(ANSWERED, "ms", milliseconds(answered_ns as f64));
        drop(manager);
    }
    Ok(())
}

/// The stand-in for the service manager, and how it is talked to. The daemon ends with it.
struct Manager {
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Manager {
    /// Has it do this; the number that it answers with.
    fn order(&mut self, word: &str) -> Outcome<u64> {
        writeln!(self.orders, "{word}").map_err(|e| format!("ordering a {word}: {e}"))?;
        let mut answer = String::new();
        let read = self.answers.read_line(&mut answer);
        read.map_err(|e| format!("the answer to {word}: {e}"))?;
        let number = answer.trim().parse();
        number.map_err(|e| format!("the answer to {word} is '{}': {e}", answer.trim()))
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.order("end");
    }
}

/// Starts the daemon that its arguments name. To "stop" it answers with how many nanoseconds it took until
/// the process was gone, to "start" with the time of it on the monotonic clock.
const MANAGER: &str = r#"
import os, select, signal, socket, sys, time
NOTIFY = '/run/notify'
words = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
words.bind(NOTIFY)
store = {}
def listen(seconds):
    while select.select([words], [], [], seconds)[0]:
        message, descriptors, _, _ = socket.recv_fds(words, 4096, 8)
        lines = message.decode().split('\n')
        name = next((line[7:] for line in lines if line.startswith('FDNAME=')), '')
        if 'FDSTORE=1' in lines:
            store[name] = descriptors[0]
        elif 'FDSTOREREMOVE=1' in lines and name in store:
            os.close(store.pop(name))
        seconds = 0
def start():
    environment = dict(os.environ, NOTIFY_SOCKET=NOTIFY, FDSTORE='8', VIRTLOCKD_ON_STOP='keep')
    begin = time.monotonic_ns()
    pid = os.fork()
    if pid == 0:
        for number, descriptor in enumerate(store.values()):
            os.dup2(descriptor, 100 + number)
        os.closerange(3, 100)
        for number in range(len(store)):
            os.dup2(100 + number, 3 + number)
        os.closerange(100, 100 + len(store))
        nothing = os.open('/dev/null', os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.close(nothing)
        if store:
            environment.update(LISTEN_FDS=str(len(store)), LISTEN_FDNAMES=':'.join(store),
                               LISTEN_PID=str(os.getpid()))
        os.execvpe(sys.argv[1], sys.argv[1:], environment)
    return pid, begin
def kill(pid):
    os.kill(pid, signal.SIGSTOP)
    for child in open(f'/proc/{pid}/task/{pid}/children').read().split():
        os.kill(int(child), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
daemon, _ = start()
for line in sys.stdin:
    listen(0.2)
    if line == 'stop\n':
        begin = time.monotonic_ns()
        os.kill(daemon, signal.SIGTERM)
        _, status = os.waitpid(daemon, 0)
        # It says by this that everything is kept.
        code = os.waitstatus_to_exitcode(status)
        print(time.monotonic_ns() - begin if code == 81 else f'status {code}', flush=True)
    elif line == 'start\n':
        daemon, begin = start()
        print(begin, flush=True)
    else:
        break
kill(daemon)
print(0, flush=True)
"#;
