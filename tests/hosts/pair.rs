//! Two hosts that share a directory: the first serves it over NFSv4.2, both have it at `/share`. What a story does
//! with them, in its own words.

use super::agent::{BETWEEN, NEW_LINE};
use super::image::Image;
use super::machine::{Directory, Machine, PATIENCE, Pending};
use crate::support::wait_until;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long the server lets a client be silent before others may have its locks; and how long it waits, started
/// anew, for its clients to say which locks they have.
pub const LEASE: Duration = Duration::from_secs(10);
/// Where both hosts have the share.
const SHARE: &str = "/share";
/// A lockspace on it.
pub const LOCKSPACE: &str = "/share/locks";

/// What the server needs.
const PREPARE: &str = "
mount -t tmpfs tmpfs /srv
mkdir -p /srv/locks /var/lib/nfs/rpc_pipefs /var/lib/nfs/nfsdcld
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -a && nfsdcld && rpc.mountd -N 2 -N 3
";
/// Stops the server if it runs, and starts it. nfsdcld keeps in mind who has locks, over a restart. The server waits
/// for it for a second, which may be too short here, and does without it then: that is seen in the kernel's log alone.
const START: &str = "
until dmesg | grep -q 'Using nfsdcld client tracking'; do
    rpc.nfsd 0
    rpc.nfsd -N 3 -L 10 -G 10 4 || exit
done
dmesg -c >/dev/null
";
const MOUNT: &str = "mount.nfs4 10.0.0.1:/ /share -o vers=4.2";

/// The hosts. `a` has the server.
pub struct Pair {
    pub a: Host,
    pub b: Host,
    image: Image,
    /// How many names of files were given.
    names: AtomicU32,
    // Dropped last.
    directory: Directory,
}

impl Pair {
    /// Switches both on.
    pub fn start() -> Pair {
        let directory = Directory::new();
        let image = Image::make(directory.path());
        let (a, b) = std::thread::scope(|scope| {
            let b = scope.spawn(|| Host::start("b", (2, "a"), &image, &directory));
            let a = Host::start("a", (1, "b"), &image, &directory);
            (a, b.join().expect("the other host starts"))
        });
        a.sh(PREPARE);
        a.sh(START);
        for host in [&a, &b] {
            host.sh(MOUNT);
        }
        Pair {
            a,
            b,
            image,
            names: AtomicU32::new(0),
            directory,
        }
    }

    pub fn has_libvirts_daemon(&self) -> bool {
        self.image.has_libvirts
    }

    /// Switches the second host on again.
    pub fn switch_on(&self) {
        let b = Machine::start("b", (2, "a"), &self.image, self.directory.path());
        *self.b.machine.lock().expect("the machine") = Arc::new(b);
        self.b.sh(MOUNT);
        self.b.order("forget");
    }

    /// Nothing of an earlier story is there: no daemon, no owner. (And where daemons run is made anew: what was
    /// mounted later is not seen there.)
    pub fn forget(&self) {
        for host in [&self.a, &self.b] {
            host.order("forget");
        }
    }

    /// A name that nothing on the share has had: a host believes for a while what it saw last.
    fn name(&self, name: &str) -> String {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        format!("{name}-{number}")
    }

    /// A disk of a guest, which both have.
    pub fn disk(&self, name: &str) -> Lease {
        let name = self.name(name);
        self.a.sh(&format!("echo data >/srv/{name}"));
        let path = format!("{SHARE}/{name}");
        // The other one may have looked for it before it was there.
        wait_until(PATIENCE, "both hosts to see the disk", || {
            self.b.tried(&format!("test -s {path}")).0 == 0
        });
        Lease {
            lockspace: "-".into(),
            name: path.clone(),
            autocreate: false,
            path,
        }
    }

    /// What libvirt locks in place of a disk when it has a directory for leases: a file that comes and goes.
    pub fn lease(&self, name: &str) -> Lease {
        let name = self.name(name);
        Lease {
            lockspace: LOCKSPACE.into(),
            path: format!("{LOCKSPACE}/{name}"),
            name,
            autocreate: true,
        }
    }

    /// Stops the server and starts it again at once. It knows who had locks, not which.
    pub fn restart_server(&self) {
        self.a.sh(START);
    }
}

/// Something to be locked.
#[derive(Clone)]
pub struct Lease {
    lockspace: String,
    name: String,
    autocreate: bool,
    /// Its file.
    pub path: String,
}

impl Lease {
    pub fn take(&self) -> String {
        self.acquire(0)
    }

    pub fn share(&self) -> String {
        self.acquire(1)
    }

    fn acquire(&self, flags: u32) -> String {
        let flags = flags | if self.autocreate { 2 } else { 0 };
        format!("acquire {flags} {} {}", self.lockspace, self.name)
    }

    pub fn give(&self) -> String {
        format!("release {} {}", self.lockspace, self.name)
    }

    /// For the agent's turns: the file that only one can make, and the lock.
    fn turns(&self) -> String {
        let flags = if self.autocreate { 2 } else { 0 };
        let (_, file) = self.path.rsplit_once('/').expect("an absolute path");
        format!(
            "{SHARE}/mark-{file} {flags} {} {}",
            self.lockspace, self.name
        )
    }
}

/// One host.
pub struct Host {
    machine: Mutex<Arc<Machine>>,
}

/// The daemons that a host can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ours,
    /// Ours, with a service manager that keeps its locks while it is stopped.
    Kept,
    Libvirts,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Granted,
    /// Somebody else has it; the message.
    Held(String),
    /// Anything else.
    Wrong(String),
}

impl Outcome {
    fn of(words: &str) -> Outcome {
        if words == "granted" {
            return Outcome::Granted;
        }
        match words.strip_prefix("held ") {
            Some(message) => Outcome::Held(message.into()),
            None => Outcome::Wrong(words.into()),
        }
    }

    pub fn is_granted(&self) -> bool {
        *self == Outcome::Granted
    }

    #[track_caller]
    pub fn granted(&self) {
        assert_eq!(*self, Outcome::Granted);
    }

    /// It was refused, because somebody else has it; the message.
    #[track_caller]
    pub fn held(&self) -> &str {
        match self {
            Outcome::Held(message) => message,
            other => panic!("somebody else has it, and yet: {other:?}"),
        }
    }
}

impl Host {
    fn start(
        name: &'static str,
        network: (u32, &str),
        image: &Image,
        directory: &Directory,
    ) -> Host {
        let machine = Machine::start(name, network, image, directory.path());
        Host {
            machine: Mutex::new(Arc::new(machine)),
        }
    }

    pub fn machine(&self) -> Arc<Machine> {
        self.machine.lock().expect("the machine").clone()
    }

    #[track_caller]
    fn order(&self, order: &str) -> String {
        self.machine().begin(order).answer()
    }

    /// Runs a script, which has to succeed; what it says.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let (status, text) = self.tried(script);
        assert_eq!(status, 0, "on the host {}: {script}\n{text}", self.name());
        text
    }

    /// Runs a script.
    #[track_caller]
    pub fn tried(&self, script: &str) -> (i32, String) {
        let answer = self.order(&format!("sh {}", one_line(script)));
        let (status, text) = answer.split_once(' ').expect("a status and a text");
        (status.parse().expect("a status"), lines(text))
    }

    pub fn name(&self) -> &'static str {
        self.machine().name
    }

    /// Starts a daemon, which serves when this returns.
    #[track_caller]
    pub fn start_daemon(&self, kind: Kind) {
        let word = match kind {
            Kind::Ours => "ours",
            Kind::Kept => "kept",
            Kind::Libvirts => "libvirts",
        };
        self.order(&format!("start {word}"));
    }

    /// The daemon replaces itself.
    #[track_caller]
    pub fn upgrade(&self) {
        self.order("daemon upgrade");
    }

    /// Ours takes over from libvirt's.
    #[track_caller]
    pub fn take_over(&self) {
        self.order("daemon take-over");
    }

    /// The process that serves is killed; another one serves when this returns.
    #[track_caller]
    pub fn crash_daemon(&self) {
        self.order("daemon crash");
    }

    /// From now on each of the daemon's system calls of this name waits for so long before it is made.
    #[track_caller]
    pub fn slow_down(&self, call: &str, by: Duration) {
        self.order(&format!("slow {call} {}", by.as_micros()));
    }

    /// All of the daemon is killed.
    #[track_caller]
    pub fn kill_daemon(&self) {
        self.order("daemon kill");
    }

    /// The daemon is stopped; its exit status.
    #[track_caller]
    pub fn stop_daemon(&self) -> i32 {
        let status = self.order("daemon stop");
        status.parse().expect("an exit status")
    }

    /// What the daemon has said.
    #[track_caller]
    pub fn daemon_log(&self) -> String {
        lines(&self.order("daemon log"))
    }

    /// A guest: a process with a connection to the daemon. One with this name is ended.
    #[track_caller]
    pub fn guest(&self, name: &str) -> Guest {
        self.order(&format!("owner {name}"));
        Guest {
            machine: self.machine(),
            name: name.into(),
        }
    }

    /// What stands in the way of a stranger's exclusive lock, in the agent's words.
    #[track_caller]
    pub fn probe(&self, lease: &Lease) -> String {
        self.order(&format!("probe {}", lease.path))
    }

    /// Somebody on this host tries from now on, all the time, to lock this file.
    #[track_caller]
    pub fn rival(&self, lease: &Lease) -> Rival<'_> {
        self.order(&format!("rival {}", lease.path));
        Rival {
            host: self,
            path: lease.path.clone(),
        }
    }
}

/// Somebody who tries to have a file's lock, without a daemon.
pub struct Rival<'a> {
    host: &'a Host,
    path: String,
}

impl Rival<'_> {
    /// Gives up; how often it has tried, and had it.
    #[track_caller]
    pub fn gives_up(self) -> (u32, u32) {
        let answer = self.host.order(&format!("outdone {}", self.path));
        let (tries, had) = answer.split_once(' ').expect("two numbers");
        (
            tries.parse().expect("a number"),
            had.parse().expect("a number"),
        )
    }

    #[track_caller]
    pub fn never_had_it(self) {
        let (tries, had) = self.gives_up();
        assert_eq!(
            had, 0,
            "a rival on the other host had the lock, of {tries} tries"
        );
        eprintln!("    a rival has tried {tries} times");
    }
}

/// A guest on a host.
pub struct Guest {
    machine: Arc<Machine>,
    name: String,
}

/// A call without its reply.
pub struct Begun(Pending);

impl Begun {
    /// The reply, if it comes in this time.
    #[track_caller]
    pub fn within(&self, limit: Duration) -> Option<Outcome> {
        self.0
            .within(limit)
            .map(|answer| Outcome::of(&lines(&answer)))
    }

    #[track_caller]
    pub fn outcome(&self) -> Outcome {
        Outcome::of(&lines(&self.0.answer()))
    }
}

impl Guest {
    fn begin_order(&self, order: &str) -> Pending {
        self.machine.begin(order)
    }

    #[track_caller]
    fn order(&self, order: &str) -> String {
        lines(&self.begin_order(order).answer())
    }

    /// A call over its own connection.
    #[track_caller]
    pub fn call(&self, call: &str) -> Outcome {
        self.begin(call).outcome()
    }

    /// The same without waiting for the reply.
    pub fn begin(&self, call: &str) -> Begun {
        Begun(self.begin_order(&format!("call {} {call}", self.name)))
    }

    #[track_caller]
    pub fn take(&self, lease: &Lease) -> Outcome {
        self.call(&lease.take())
    }

    #[track_caller]
    pub fn share(&self, lease: &Lease) -> Outcome {
        self.call(&lease.share())
    }

    #[track_caller]
    pub fn give(&self, lease: &Lease) -> Outcome {
        self.call(&lease.give())
    }

    /// Calls for it over a short connection of somebody else, as libvirtd makes one.
    #[track_caller]
    pub fn short(&self, calls: &[String]) -> Vec<Outcome> {
        let order = format!("short {} {}", self.name, calls.join(BETWEEN));
        let answer = self.order(&order);
        answer.split(BETWEEN).map(Outcome::of).collect()
    }

    /// Takes the lock, keeps it for so long and gives it back, so often.
    pub fn begin_turns(&self, count: u32, keep: Duration, lease: &Lease) -> Turns {
        let keep = keep.as_millis();
        let order = format!("turns {} {count} {keep} {}", self.name, lease.turns());
        Turns(self.begin_order(&order))
    }

    /// Tries to have it until it does; how long that took.
    #[track_caller]
    pub fn takes_when_free(&self, lease: &Lease) -> Duration {
        let begun = Instant::now();
        wait_until(PATIENCE, "the lock to be free", || match self.take(lease) {
            Outcome::Granted => true,
            Outcome::Held(_) => false,
            Outcome::Wrong(why) => panic!("neither granted nor held: {why}"),
        });
        begun.elapsed()
    }

    pub fn kill(&self) {
        self.order(&format!("kill {}", self.name));
    }

    /// Waits for its end; what ended it.
    #[track_caller]
    pub fn end(&self) -> String {
        self.order(&format!("ended {}", self.name))
    }

    #[track_caller]
    pub fn lives(&self) -> bool {
        self.order(&format!("lives {}", self.name)) == "true"
    }
}

/// Turns that are being taken.
pub struct Turns(Pending);

/// How they went.
pub struct Ended {
    /// How often the lock was had, and refused because somebody else had it.
    pub had: u32,
    pub held: u32,
    pub seconds: f32,
    /// What must not be.
    pub wrong: Vec<String>,
}

impl Turns {
    #[track_caller]
    pub fn end(&self) -> Ended {
        let answer = lines(&self.0.answer());
        let words: Vec<&str> = answer.splitn(4, ' ').collect();
        let [had, held, seconds, wrong] = words[..] else {
            panic!("three numbers and a text: {answer}");
        };
        let wrong = wrong.split(BETWEEN).filter(|it| !it.is_empty());
        Ended {
            had: had.parse().expect("a number"),
            held: held.parse().expect("a number"),
            seconds: seconds.parse().expect("a number"),
            wrong: wrong.map(str::to_owned).collect(),
        }
    }
}

fn one_line(text: &str) -> String {
    text.trim().replace('\n', &NEW_LINE.to_string())
}

fn lines(text: &str) -> String {
    text.replace(NEW_LINE, "\n")
}
