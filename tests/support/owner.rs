//! The process of a virtual machine, as the daemon sees it: a process with a connection of its
//! own, which can close that connection, ignore SIGTERM, or be killed.
//!
//! It is this very test program, started again to run the one helper "test" below. The test in
//! front passes it messages through a pipe and gets the replies back.

use super::client::{Call, Reply, register_as};
use super::protocol::{at, word};
use super::{DEADLINE, wait_for};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SOCKET_VARIABLE: &str = "VIRTLOCKD_TEST_OWNER_SOCKET";
const MARK: &str = "answer> ";

/// A user who may do nothing.
pub const NOBODY: u32 = 65534;

/// How the owner answers SIGTERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTerm {
    Die,
    /// As a hung QEMU does: only SIGKILL helps.
    Ignore,
}

/// A process with a connection. It is killed when dropped, and ends by itself if the test dies.
pub struct Owner {
    child: Child,
    /// Its number, as the daemon sees it, and as this process does.
    pid: i32,
    outside: i32,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// Of the next call.
    serial: u32,
    /// The call whose reply was not waited for.
    begun: Vec<u8>,
}

impl Owner {
    /// Starts the process; it is connected to `socket` when this returns.
    pub fn connect(socket: &Path, on_term: OnTerm) -> Owner {
        let program = std::env::current_exe().expect("the path of this test program");
        let mut command = match on_term {
            OnTerm::Die => Command::new(&program),
            OnTerm::Ignore => {
                // An ignored signal stays ignored over exec.
                let mut command = Command::new("env");
                command.arg("--ignore-signal=TERM").arg(&program);
                command
            }
        };
        Owner::started(&mut command, socket)
    }

    /// Starts the process by this command, which has no arguments yet.
    pub fn started(command: &mut Command, socket: &Path) -> Owner {
        let mut child = command
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg("support::owner::the_owner_process")
            .env(SOCKET_VARIABLE, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start this program again as an owner process");
        let answers = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let orders = child.stdin.take();
        let pid = i32::try_from(child.id()).expect("a pid is an i32");
        let mut owner = Owner {
            child,
            pid,
            outside: pid,
            orders,
            answers,
            serial: 0,
            begun: Vec::new(),
        };
        assert_eq!(
            owner.answer(),
            "connected",
            "the owner process did not connect"
        );
        owner
    }

    /// [`Owner::connect`], then REGISTER as the domain `name` with the process's own pid.
    pub fn register(socket: &Path, name: &str, on_term: OnTerm) -> Owner {
        let mut owner = Owner::connect(socket, on_term);
        owner.register_as(name);
        owner
    }

    /// REGISTER as the domain `name` with the process's own pid.
    #[track_caller]
    pub fn register_as(&mut self, name: &str) {
        let pid = self.pid;
        self.call(&register_as(name, pid)).expect_ok();
    }

    /// It is in a pid namespace of its own: it is asked how it is called there, and `outside` how that is
    /// called here.
    pub fn is_inside(&mut self, outside: impl FnOnce(i32) -> i32) {
        self.order("pid");
        let answer = self.answer();
        let pid = answer.strip_prefix("pid ").expect("a pid");
        self.pid = pid.parse().expect("a pid is a number");
        self.outside = outside(self.pid);
    }

    /// Its number, as the daemon sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its number, as this process sees it.
    pub fn outside(&self) -> i32 {
        self.outside
    }

    /// A call over the owner's own connection.
    #[track_caller]
    pub fn call(&mut self, call: &Call) -> Reply {
        let message = self.next_frame(call);
        self.exchange(&message)
    }

    fn next_frame(&mut self, call: &Call) -> Vec<u8> {
        self.serial += 1;
        call.frame(self.serial)
    }

    /// Sends a message, whatever it is, and takes the reply to it.
    #[track_caller]
    pub fn exchange(&mut self, message: &[u8]) -> Reply {
        self.exchange_behind(message, message)
    }

    /// The same where the reply to one before is still to come: that one.
    #[track_caller]
    pub fn exchange_behind(&mut self, message: &[u8], earlier: &[u8]) -> Reply {
        self.send(message);
        self.reply_to(earlier)
    }

    /// Sends a call, and does not wait for the reply.
    pub fn begin(&mut self, call: &Call) {
        let message = self.next_frame(call);
        self.send(&message);
        self.begun = message;
    }

    /// The reply to the call that was begun.
    #[track_caller]
    pub fn reply(&mut self) -> Reply {
        let message = std::mem::take(&mut self.begun);
        self.reply_to(&message)
    }

    /// Sends a call, and reads nothing: the connection may be closed before the reply comes.
    pub fn post(&mut self, call: &Call) {
        let message = self.next_frame(call);
        self.order(&format!("send {}", to_hex(&message)));
        assert_eq!(self.answer(), "sent");
        self.begun = message;
    }

    /// The reply to the call that was posted.
    #[track_caller]
    pub fn receive(&mut self) -> Reply {
        self.order("receive");
        self.reply()
    }

    /// The same, where there may be none: then why.
    pub fn try_receive(&mut self) -> Result<Reply, String> {
        self.order("receive");
        let answer = self.answer_or_end().unwrap_or_else(|| "it ended".into());
        match answer.strip_prefix("reply ") {
            Some(hex) => Ok(reply_to(&self.begun, hex)),
            None => Err(answer),
        }
    }

    fn send(&mut self, message: &[u8]) {
        self.order(&format!("call {}", to_hex(message)));
    }

    #[track_caller]
    fn reply_to(&mut self, message: &[u8]) -> Reply {
        let answer = self.answer();
        let hex = answer
            .strip_prefix("reply ")
            .unwrap_or_else(|| panic!("no reply: {answer}"));
        reply_to(message, hex)
    }

    /// As [`Owner::call`], where the daemon may close the connection instead of answering: then why
    /// there is no reply. The process lives on.
    pub fn try_call(&mut self, call: &Call) -> Result<Reply, String> {
        let message = self.next_frame(call);
        self.order(&format!("call {}", to_hex(&message)));
        let answer = self.answer_or_end().unwrap_or_else(|| "it ended".into());
        match answer.strip_prefix("reply ") {
            Some(hex) => Ok(reply_to(&message, hex)),
            None => Err(answer),
        }
    }

    /// Makes one more connection, which calls go over from now on. The others stay open for as
    /// long as the process lives.
    pub fn connect_again(&mut self) {
        self.order("connect");
        assert_eq!(self.answer(), "connected", "one more connection");
    }

    /// Calls go over this connection from now on: 0 is the first one.
    pub fn use_connection(&mut self, number: usize) {
        self.order(&format!("use {number}"));
    }

    /// Starts a process that has the connection open as well, for as long as it lives; its pid.
    pub fn lend_connection(&mut self) -> i32 {
        self.order("lend");
        let answer = self.answer();
        let pid = answer.strip_prefix("lent to ").expect("a pid");
        pid.parse().expect("a pid is a number")
    }

    /// The process goes on as the user [`NOBODY`], as QEMU does.
    pub fn become_nobody(&mut self) {
        self.order("nobody");
        assert_eq!(self.answer(), "nobody");
    }

    /// Closes the connection. The process lives on, unless the daemon kills it for that.
    pub fn close_connection(&mut self) {
        self.order("close");
        let answer = self.answer_or_end();
        assert!(
            matches!(answer.as_deref(), None | Some("closed")),
            "closed: {answer:?}"
        );
    }

    /// Sends what makes the daemon end the connection, and waits for that end. The process lives on,
    /// unless the daemon kills it for that.
    pub fn spoil_connection(&mut self, bytes: &[u8]) {
        self.order(&format!("spoil {}", to_hex(bytes)));
        let answer = self.answer_or_end();
        assert!(
            matches!(answer.as_deref(), None | Some("ended")),
            "ended by the daemon: {answer:?}"
        );
    }

    /// Kills the process with SIGKILL, as a crash does. It stays a zombie until
    /// [`Owner::wait_end`] or the drop of this value.
    pub fn kill(&self) {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.outside),
            nix::sys::signal::Signal::SIGKILL,
        )
        .expect("kill the owner process");
    }

    /// True until the process has ended. Reaps it.
    pub fn is_alive(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("ask for the owner's end")
            .is_none()
    }

    /// Waits for its end and reaps it.
    pub fn wait_end(&mut self) -> ExitStatus {
        wait_for(DEADLINE, "the end of the owner process", || {
            self.child.try_wait().expect("ask for the owner's end")
        })
    }

    /// Waits for its end; the signal that ended it.
    pub fn wait_signal(&mut self) -> Option<i32> {
        self.wait_end().signal()
    }

    fn order(&mut self, line: &str) {
        let orders = self.orders.as_mut().expect("the owner still listens");
        // One that was killed meanwhile is found out when it does not answer.
        let _ = writeln!(orders, "{line}");
    }

    #[track_caller]
    fn answer(&mut self) -> String {
        self.answer_or_end()
            .expect("the owner process lives and answers")
    }

    fn answer_or_end(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            let count = self
                .answers
                .read_line(&mut line)
                .expect("read from the owner process");
            if count == 0 {
                return None;
            }
            // The test harness of the child writes to the same pipe, even on the same line.
            if let Some(at) = line.find(MARK) {
                return Some(line[at + MARK.len()..].trim_end().to_owned());
            }
        }
    }
}

/// A reply, which has to carry the serial of the message that it answers.
#[track_caller]
fn reply_to(message: &[u8], hex: &str) -> Reply {
    let reply = from_hex(hex);
    let serial = at::SERIAL..at::SERIAL + 4;
    assert_eq!(
        reply.get(serial.clone()),
        message.get(serial),
        "serial of the reply"
    );
    Reply::parse(&reply)
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The state letter of a process in `/proc`; `None` when it is gone.
pub fn process_state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether a process may still do something. A zombie cannot.
pub fn runs(pid: i32) -> bool {
    !matches!(process_state(pid), None | Some('Z' | 'X'))
}

/// Tries to get an exclusive lock on a disk until it does, as a program that waits for it would.
/// The moment, and whether `owner` could still run then.
pub fn rival(disk: &Path, owner: i32, give_up: &AtomicBool) -> Option<(Instant, bool)> {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(disk)
        .expect("open the disk");
    loop {
        // Tried once more after it is told to give up: it may not have run since the lock was free.
        let is_last = give_up.load(Ordering::Relaxed);
        if super::try_lock(&file) {
            return Some((Instant::now(), runs(owner)));
        }
        if is_last {
            return None;
        }
        // Often enough: an owner takes longer to die. And others need the processor.
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Not a test: what [`Owner`] runs in its process.
// What a connection is lent to outlives this process, which never waits for it.
#[allow(clippy::zombie_processes)]
#[test]
#[ignore = "a helper process that tests start themselves"]
fn the_owner_process() {
    let Some(socket) = std::env::var_os(SOCKET_VARIABLE) else {
        return;
    };
    let answer = |text: &str| {
        let mut out = std::io::stdout();
        writeln!(out, "{MARK}{text}")
            .and_then(|()| out.flush())
            .expect("answer the test");
    };
    let connect = || UnixStream::connect(&socket).expect("connect to the daemon");
    let mut connections = vec![Some(connect())];
    let mut current = 0;
    answer("connected");
    for line in std::io::stdin().lines() {
        let line = line.expect("read an order");
        let (order, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let stream = &mut connections[current];
        match order {
            "close" => {
                *stream = None;
                answer("closed");
            }
            "nobody" => {
                let nobody = nix::unistd::Uid::from_raw(NOBODY);
                nix::unistd::setuid(nobody).expect("become another user");
                answer("nobody");
            }
            "lend" => {
                let stream = stream.as_ref().expect("the connection is open");
                let copy = stream.try_clone().expect("copy the descriptor");
                let borrower = Command::new("cat")
                    .stdin(Stdio::from(std::os::fd::OwnedFd::from(copy)))
                    .stdout(Stdio::null())
                    .spawn()
                    .expect("start cat on the connection");
                answer(&format!("lent to {}", borrower.id()));
            }
            "connect" => {
                current = connections.len();
                connections.push(Some(connect()));
                answer("connected");
            }
            "pid" => answer(&format!("pid {}", std::process::id())),
            "use" => current = argument.parse().expect("the number of a connection"),
            "call" => {
                let stream = stream.as_mut().expect("the connection is open");
                match exchange(stream, &from_hex(argument)) {
                    Ok(reply) => answer(&format!("reply {}", to_hex(&reply))),
                    Err(error) => answer(&format!("no reply: {error}")),
                }
            }
            "send" => {
                let stream = stream.as_mut().expect("the connection is open");
                let sent = stream.write_all(&from_hex(argument));
                sent.expect("send a call");
                answer("sent");
            }
            "receive" => {
                let stream = stream.as_mut().expect("the connection is open");
                match receive(stream) {
                    Ok(reply) => answer(&format!("reply {}", to_hex(&reply))),
                    Err(error) => answer(&format!("no reply: {error}")),
                }
            }
            "spoil" => {
                let mut stream = stream.take().expect("the connection is open");
                // The daemon may end it before everything is sent, and with bytes unread.
                let _ = stream.write_all(&from_hex(argument));
                let _ = stream.read_to_end(&mut Vec::new());
                answer("ended");
            }
            _ => panic!("an order that nobody knows: {line}"),
        }
    }
}

/// Sends a call and reads its reply.
fn exchange(stream: &mut UnixStream, call: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(call)?;
    receive(stream)
}

/// Reads a reply.
fn receive(stream: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut reply = vec![0; 4];
    stream.read_exact(&mut reply)?;
    reply.resize(word(&reply, at::LENGTH) as usize, 0);
    stream.read_exact(&mut reply[4..])?;
    Ok(reply)
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn from_hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "half a byte of hex: {text}");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex digits"))
        .collect()
}
