//! A host as a machine: a QEMU that emulates all of it, a cable to the other one, and a line to the agent that
//! runs in it. It can be switched off, and its cable pulled and put back.

use super::image::Image;
use std::cell::OnceCell;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{wait_for, wait_until};

pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// How long a host may take for anything. What is emulated is slow, on a busy machine most of all.
pub const PATIENCE: Duration = Duration::from_secs(90);
const MEMORY_MIB: u32 = 512;

/// Runs something until its standard input ends, as it does when this test program is dead, however that came.
/// (In a process group of its own: who kills all of this program's leaves this one to its work.)
const UNTIL_THE_END: &str = r#""$@" & it=$!
cat >/dev/null
kill -KILL $it
wait $it
"#;

/// A directory that is removed when this is dropped, or this test program is dead.
pub struct Directory {
    path: PathBuf,
    keeper: Child,
}

impl Directory {
    pub fn new() -> Directory {
        let name = format!("virtlockd-hosts-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("make a directory for the hosts");
        let script = "cat >/dev/null; rm -rf \"$1\"";
        let keeper = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(&path)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("start a shell that removes the directory at the end");
        Directory { path, keeper }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// A host that is switched on. Off when dropped.
pub struct Machine {
    pub name: &'static str,
    directory: PathBuf,
    holder: Mutex<Child>,
    line: Line,
}

impl Machine {
    /// Switches it on and waits for its agent. `number` is that of its network card.
    pub fn start(
        name: &'static str,
        (number, other): (u32, &str),
        image: &Image,
        hosts: &Path,
    ) -> Machine {
        let directory = hosts.join(name);
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).expect("make a directory for a host");
        // The cable is two datagram sockets, and whichever machine is on has one: a frame that
        // nobody is there for is lost.
        let cable = |name: &str| hosts.join(format!("cable-{name}")).display().to_string();
        let _ = std::fs::remove_file(cable(name));
        let path = |file: &str| directory.join(file).display().to_string();
        let mut command = Command::new("sh");
        command.args(["-c", UNTIL_THE_END, "sh", QEMU]);
        command.args([
            "-accel",
            "tcg,tb-size=128",
            "-cpu",
            "max",
            "-smp",
            "1",
            "-m",
        ]);
        command.arg(MEMORY_MIB.to_string());
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-kernel"]);
        command.arg(&image.kernel).arg("-initrd").arg(&image.files);
        command.arg("-append").arg(format!(
            "console=ttyS0 loglevel=5 panic=-1 mitigations=off no5lvl tsc=reliable host_name={name} \
             host_address=10.0.0.{number}/24"
        ));
        command.args(["-serial", &format!("file:{}", path("console"))]);
        command.arg("-netdev").arg(format!(
            "dgram,id=cable,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            cable(name),
            cable(other)
        ));
        let card = format!("virtio-net-pci,netdev=cable,romfile=,mac=52:54:00:00:00:0{number}");
        command.args(["-device", &card, "-device", "virtio-serial-pci"]);
        let socket = format!("socket,id=agent,server=on,wait=off,path={}", path("agent"));
        command.args(["-chardev", &socket]);
        command.args(["-device", "virtserialport,chardev=agent,name=agent"]);
        let control = format!("unix:{},server=on,wait=off", path("control"));
        command.args(["-qmp", &control]);
        let log = std::fs::File::create(directory.join("qemu")).expect("make a log");
        let holder = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start a host");
        let socket = directory.join("agent");
        let stream = wait_for(PATIENCE, "QEMU to listen for the agent's line", || {
            UnixStream::connect(&socket).ok()
        });
        let machine = Machine {
            name,
            line: Line::over(stream),
            directory,
            holder: Mutex::new(holder),
        };
        wait_until(PATIENCE, "a host to start", || {
            machine.line.is_up() || {
                assert!(!machine.line.is_cut(), "it is off:\n{}", machine.console());
                false
            }
        });
        machine
    }

    /// Gives the agent an order; the answer comes when it comes.
    pub fn begin(&self, order: &str) -> Pending {
        self.line.begin(order)
    }

    /// Pulls its cable, or puts it back.
    pub fn set_cable(&self, is_in: bool) {
        let mut control = UnixStream::connect(self.directory.join("control")).expect("reach QEMU");
        let mut answers = BufReader::new(control.try_clone().expect("copy a descriptor"));
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("QEMU's greeting");
        let set =
            format!(r#"{{"execute":"set_link","arguments":{{"name":"cable","up":{is_in}}}}}"#);
        for order in [r#"{"execute":"qmp_capabilities"}"#, &set] {
            writeln!(control, "{order}").expect("tell QEMU");
            answer.clear();
            while !answer.contains("return") {
                assert!(!answer.contains("error"), "{order}: {answer}");
                answer.clear();
                answers.read_line(&mut answer).expect("QEMU's answer");
            }
        }
    }

    /// Cuts its power: it is off when this returns.
    pub fn switch_off(&self) {
        let mut holder = self.holder.lock().expect("the holder");
        drop(holder.stdin.take());
        let _ = holder.wait();
    }

    /// The last lines of its console, and what QEMU said.
    pub fn console(&self) -> String {
        let mut text = String::new();
        for file in ["console", "qemu"] {
            let bytes = std::fs::read(self.directory.join(file)).unwrap_or_default();
            let all = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = all.lines().collect();
            for line in &lines[lines.len().saturating_sub(25)..] {
                text.push_str(&format!("  {}: {}\n", self.name, line.trim_end()));
            }
        }
        text
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.switch_off();
        if std::thread::panicking() {
            eprintln!("the last lines of the console:\n{}", self.console());
        }
    }
}

/// Who waits for the answer to which order; `None` when nothing can come any more.
type Waiting = Arc<Mutex<Option<HashMap<u64, Sender<String>>>>>;

/// The line to an agent: orders with numbers, and answers with theirs, in any order.
struct Line {
    stream: UnixStream,
    waiting: Waiting,
    next: Mutex<u64>,
    hello: Mutex<Receiver<String>>,
}

impl Line {
    fn over(stream: UnixStream) -> Line {
        let (up, hello) = channel();
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::from([(0, up)]))));
        let reader = BufReader::new(stream.try_clone().expect("copy a descriptor"));
        let heard = waiting.clone();
        std::thread::spawn(move || {
            for line in reader.lines() {
                let Ok(line) = line else { break };
                let (number, answer) = line.split_once(' ').unwrap_or((&line, ""));
                let Ok(number) = number.parse() else { continue };
                let mut heard = heard.lock().expect("who waits");
                let waits = heard.as_mut().and_then(|all| all.remove(&number));
                if let Some(waits) = waits {
                    // Nobody may want to know any more.
                    let _ = waits.send(answer.to_owned());
                }
            }
            *heard.lock().expect("who waits") = None;
        });
        Line {
            stream,
            waiting,
            next: Mutex::new(1),
            hello: Mutex::new(hello),
        }
    }

    /// Whether the agent has said that it is there. True once.
    fn is_up(&self) -> bool {
        self.hello
            .lock()
            .expect("the agent's hello")
            .try_recv()
            .is_ok()
    }

    fn is_cut(&self) -> bool {
        self.waiting.lock().expect("who waits").is_none()
    }

    fn begin(&self, order: &str) -> Pending {
        let mut next = self.next.lock().expect("the next number");
        let number = *next;
        *next += 1;
        let (sender, receiver) = channel();
        if let Some(all) = self.waiting.lock().expect("who waits").as_mut() {
            all.insert(number, sender);
        }
        assert!(!order.contains('\n'), "an order is a line: {order}");
        // A host that is off does not answer: that is noticed.
        let _ = writeln!(&self.stream, "{number} {order}");
        Pending {
            order: order.to_owned(),
            receiver,
            answer: OnceCell::new(),
        }
    }
}

/// The answer to an order, which may still be on its way.
pub struct Pending {
    order: String,
    receiver: Receiver<String>,
    /// It has come.
    answer: OnceCell<String>,
}

impl Pending {
    /// The answer, if it comes within this time.
    #[track_caller]
    pub fn within(&self, limit: Duration) -> Option<String> {
        if let Some(answer) = self.answer.get() {
            return Some(answer.clone());
        }
        match self.receiver.recv_timeout(limit) {
            Ok(answer) => match answer.strip_prefix("failed ") {
                Some(why) => panic!("the agent, told to {}: {why}", self.order),
                None => Some(self.answer.get_or_init(|| answer).clone()),
            },
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                panic!("the host was off before it had done: {}", self.order)
            }
        }
    }

    #[track_caller]
    pub fn answer(&self) -> String {
        self.within(PATIENCE)
            .unwrap_or_else(|| panic!("after {PATIENCE:?} no answer to: {}", self.order))
    }
}
