//! The agent: what a host does for a test. It is this test program, started by the host's init, with a port for
//! orders. Each order is a line with a number in front, each answer one with the same number; what takes its time,
//! a call that waits for the server for instance, holds up no other order.
//!
//! An owner is a process of its own. Nothing here decides whether something is as it should be, but in one case: in
//! [`take_turns`] there is no time to ask the test each time.

use crate::support::client::{Call, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, Reply};
use crate::support::client::{acquire, create_lockspace, release, restrict};
use crate::support::daemon::Daemon;
use crate::support::manager::Manager;
use crate::support::owner::{OnTerm, Owner, process_state};
use crate::support::upgrade::{self, Disturbed, PROGRAM};
use crate::support::{DEADLINE, drop_lock, lock_probe, set_lock, wait_until};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::process::ExitStatusExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::image::{LIBVIRTS, OURS};

/// How long turns may take, on a machine that is too slow for all of them.
const TURNS: Duration = Duration::from_secs(15);
const PORT_VARIABLE: &str = "VIRTLOCKD_TEST_AGENT_PORT";
/// Stands in a line for the end of a line.
pub const NEW_LINE: char = '\r';
/// Stands between several calls, and between what came of them.
pub const BETWEEN: &str = " ; ";

/// Everything that the host has for the story that is told.
struct Agent {
    manager: Manager,
    daemon: Mutex<Option<Daemon>>,
    owners: Mutex<HashMap<String, Known>>,
    rivals: Mutex<HashMap<String, Rival>>,
    disturbed: Mutex<Option<Disturbed>>,
}

/// An owner, and what can be done with it while it waits for the reply to a call.
#[derive(Clone)]
struct Known {
    owner: Arc<Mutex<Owner>>,
    pid: i32,
}

/// Somebody who tries all the time to lock a file.
struct Rival {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<String>,
}

/// Not a test: what runs on a host.
#[test]
#[ignore = "a helper process that tests start themselves"]
fn the_agent_of_a_host() {
    let Some(port) = std::env::var_os(PORT_VARIABLE) else {
        return;
    };
    let port = File::options().read(true).write(true).open(port);
    let port = port.expect("open the port for orders");
    let answers = Arc::new(Mutex::new(port.try_clone().expect("copy a descriptor")));
    let answer = move |number: &str, text: &str| {
        let text = text.replace('\n', &NEW_LINE.to_string());
        writeln!(lock(&answers), "{number} {text}").expect("answer the test");
    };
    let mut agent = Arc::new(Agent::new());
    answer("0", "hello");
    for line in BufReader::new(port).lines() {
        let line = line.expect("read an order");
        let (number, order) = line.split_once(' ').expect("a number and an order");
        if order == "forget" {
            agent.end();
            agent = Arc::new(Agent::new());
            answer(number, "forgotten");
            continue;
        }
        let (agent, answer) = (agent.clone(), answer.clone());
        let (number, order) = (number.to_owned(), order.replace(NEW_LINE, "\n"));
        std::thread::spawn(move || {
            let done = std::panic::catch_unwind(AssertUnwindSafe(|| agent.obey(&order)));
            match done {
                Ok(text) => answer(&number, &text),
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&it| it.into()));
                    answer(&number, &format!("failed {}", text.unwrap_or_default()));
                }
            }
        });
    }
}

/// Whatever another order failed at.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    fn new() -> Agent {
        Agent {
            manager: Manager::new(),
            daemon: Mutex::default(),
            owners: Mutex::default(),
            rivals: Mutex::default(),
            disturbed: Mutex::default(),
        }
    }

    /// Ends whatever a story has left.
    fn end(&self) {
        *lock(&self.disturbed) = None;
        for (_, rival) in lock(&self.rivals).drain() {
            rival.stop.store(true, Ordering::Relaxed);
        }
        for (_, known) in lock(&self.owners).drain() {
            kill(known.pid);
        }
        *lock(&self.daemon) = None;
    }

    fn obey(&self, order: &str) -> String {
        let (word, rest) = order.split_once(' ').unwrap_or((order, ""));
        let (first, others) = rest.split_once(' ').unwrap_or((rest, ""));
        match word {
            "start" => self.start(first),
            "daemon" => self.daemon(first),
            "slow" => self.slow(first, others),
            "owner" => self.owner(first),
            "call" => {
                let owner = self.known(first).owner;
                let reply = lock(&owner).try_call(&call(others));
                told(reply)
            }
            "kill" => {
                kill(self.known(first).pid);
                "killed".into()
            }
            "ended" => {
                let owner = self.known(first).owner;
                let status = lock(&owner).wait_end();
                match status.signal() {
                    Some(signal) => format!("signal {signal}"),
                    None => format!("{status}"),
                }
            }
            "lives" => {
                let state = process_state(self.known(first).pid);
                matches!(state, Some(it) if it != 'Z').to_string()
            }
            "short" => self.short(first, others),
            "turns" => self.turns(first, others),
            "probe" => match lock_probe(Path::new(first)) {
                None => "free".into(),
                Some(lock) if lock.exclusive => format!("exclusive {}", lock.pid),
                Some(lock) => format!("shared {}", lock.pid),
            },
            "rival" => self.rival(first),
            "outdone" => {
                let rival = lock(&self.rivals).remove(first).expect("a rival's file");
                rival.stop.store(true, Ordering::Relaxed);
                rival.thread.join().expect("the rival's thread")
            }
            "sh" => shell(rest),
            _ => panic!("an order that nobody knows"),
        }
    }

    fn known(&self, name: &str) -> Known {
        let owners = lock(&self.owners);
        owners.get(name).expect("an owner of this name").clone()
    }

    fn with_daemon<T>(&self, with: impl FnOnce(&mut Daemon) -> T) -> T {
        with(lock(&self.daemon).as_mut().expect("a daemon was started"))
    }

    /// Starts a daemon: "ours", "kept" (ours, whose stop keeps everything), "libvirts".
    fn start(&self, kind: &str) -> String {
        let host = &self.manager.host;
        let mut daemon = lock(&self.daemon);
        *daemon = None;
        *daemon = Some(match kind {
            "ours" => host.start(&[], &[]),
            "kept" => self.manager.start(),
            "libvirts" => {
                host.install(Path::new(LIBVIRTS));
                Daemon::start_program(Path::new(PROGRAM), &host.namespace, &[], &[])
            }
            _ => panic!("no such daemon"),
        });
        "started".into()
    }

    fn daemon(&self, what: &str) -> String {
        match what {
            "upgrade" => self.with_daemon(|daemon| upgrade::upgrade(daemon)),
            "take-over" => {
                self.manager.host.install(Path::new(OURS));
                self.with_daemon(|daemon| upgrade::upgrade(daemon));
            }
            "crash" => self.with_daemon(|daemon| {
                let reactor = daemon.reactor();
                kill(reactor);
                let is_other = || ![daemon.pid(), reactor].contains(&daemon.reactor());
                wait_until(DEADLINE, "another reactor", is_other);
            }),
            "kill" => self.with_daemon(Daemon::kill),
            "stop" => {
                let status = self.with_daemon(Daemon::stop);
                self.manager.settle();
                return status.code().map_or("?".into(), |code| code.to_string());
            }
            "log" => return self.with_daemon(|daemon| daemon.stderr()),
            _ => panic!("nothing that a daemon does"),
        }
        "done".into()
    }

    /// From now on each of the daemon's system calls of this name waits before it is made, so many microseconds.
    fn slow(&self, call: &str, microseconds: &str) -> String {
        let injection = format!("delay_enter={microseconds}");
        let slow = self.with_daemon(|daemon| Disturbed::with(daemon, call, &injection));
        *lock(&self.disturbed) = Some(slow);
        "done".into()
    }

    fn owner(&self, name: &str) -> String {
        let socket = self.with_daemon(|daemon| daemon.lock_socket().to_owned());
        let owner = Owner::register(&socket, name, OnTerm::Die);
        let pid = owner.pid();
        let owner = Arc::new(Mutex::new(owner));
        lock(&self.owners).insert(name.into(), Known { owner, pid });
        pid.to_string()
    }

    fn speak_for(&self, name: &str) -> Client {
        let pid = self.known(name).pid;
        self.with_daemon(|daemon| upgrade::helper_client(daemon, name, pid))
    }

    /// What libvirtd does for a guest that runs: a connection of its own, for these calls.
    fn short(&self, name: &str, calls: &str) -> String {
        let mut client = self.speak_for(name);
        let one = |text: &str| told(client.try_call(&call(text)));
        let answers: Vec<String> = calls.split(BETWEEN).map(one).collect();
        answers.join(BETWEEN)
    }

    fn turns(&self, name: &str, words: &str) -> String {
        let [count, keep, lease] = words.splitn(3, ' ').collect::<Vec<_>>()[..] else {
            panic!("how often, how long, what: {words}");
        };
        let client = self.speak_for(name);
        let count = count.parse().expect("a number of turns");
        let keep = Duration::from_millis(keep.parse().expect("milliseconds"));
        take_turns(client, count, keep, lease)
    }

    fn rival(&self, path: &str) -> String {
        let file = File::options().read(true).write(true).open(path);
        let file = file.expect("open the rival's file");
        let stop = Arc::new(AtomicBool::new(false));
        let (told, mut tries, mut had) = (stop.clone(), 0, 0);
        let thread = std::thread::spawn(move || {
            // Once at least.
            loop {
                tries += 1;
                if set_lock(&file, true) {
                    had += 1;
                    drop_lock(&file);
                }
                if told.load(Ordering::Relaxed) {
                    return format!("{tries} {had}");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        lock(&self.rivals).insert(path.into(), Rival { stop, thread });
        "tries".into()
    }
}

/// Kills a process. It may be dead.
fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
}

/// Runs a script: its exit status, and what it said.
fn shell(script: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1\n{script}")])
        .stdin(Stdio::null())
        .output()
        .expect("start a shell");
    let status = output.status.code().unwrap_or(-1);
    format!(
        "{status} {}",
        String::from_utf8_lossy(&output.stdout).trim_end()
    )
}

/// A call in words. A lockspace of "-" is the default one.
fn call(text: &str) -> Call {
    let words: Vec<&str> = text.split(' ').collect();
    let space = |name: &str| if name == "-" { "" } else { name }.to_owned();
    match words[..] {
        ["acquire", flags, lockspace, name] => {
            let flags = flags.parse().expect("flags are a number");
            acquire(&space(lockspace), name, flags)
        }
        ["release", lockspace, name] => release(&space(lockspace), name),
        ["lockspace", path] => create_lockspace(path),
        ["restrict"] => restrict(),
        _ => panic!("a call that nobody knows: {text}"),
    }
}

/// What came of a call, in words.
fn told(reply: Result<Reply, String>) -> String {
    match reply {
        Ok(Reply::Ok { .. }) => "granted".into(),
        Ok(Reply::Error(error)) if is_held(&error.message, error.code, error.domain) => {
            format!("held {}", error.message)
        }
        Ok(Reply::Error(error)) => {
            format!("error {} {} {}", error.code, error.domain, error.message)
        }
        Err(why) => format!("silence {why}"),
    }
}

/// Whether a refusal says that somebody else has the lock.
fn is_held(message: &str, code: i32, domain: i32) -> bool {
    (code, domain) == (RESOURCE_BUSY, DOMAIN_LOCKSPACE) && message.contains("is locked")
}

/// Takes a lock, keeps it and gives it back until it was had so often, or the time is over. Whoever has it makes a
/// file that must not be there, as no two can at one time, and removes it. (A file system gives no name to two
/// makers, and this has nothing to do with locks.)
fn take_turns(mut client: Client, count: u32, keep: Duration, lease: &str) -> String {
    let words: Vec<&str> = lease.split(' ').collect();
    let [mark, flags, lockspace, name] = words[..] else {
        panic!("a mark, flags, a lockspace and a name: {lease}");
    };
    let take = call(&format!("acquire {flags} {lockspace} {name}"));
    let give = call(&format!("release {lockspace} {name}"));
    let begun = Instant::now();
    let (mut had, mut held) = (0, 0);
    let mut wrong = Vec::new();
    while had < count && wrong.len() < 10 && begun.elapsed() < TURNS {
        match told(client.try_call(&take)) {
            answer if answer == "granted" => (),
            answer if answer.starts_with("held ") => {
                held += 1;
                continue;
            }
            answer => {
                wrong.push(format!("acquire: {answer}"));
                continue;
            }
        }
        had += 1;
        let file = File::options().write(true).create_new(true).open(mark);
        match file {
            Ok(_) => (),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                wrong.push(format!("turn {had}: somebody else has it, too"));
            }
            Err(error) => wrong.push(format!("make {mark}: {error}")),
        }
        std::thread::sleep(keep);
        if let Err(error) = std::fs::remove_file(mark) {
            wrong.push(format!("turn {had}: remove {mark}: {error}"));
        }
        let answer = told(client.try_call(&give));
        if answer != "granted" {
            wrong.push(format!("release: {answer}"));
        }
    }
    let seconds = begun.elapsed().as_secs_f32();
    format!("{had} {held} {seconds:.1} {}", wrong.join(BETWEEN))
}
