//! A story with every kind of call, an owner's death, a fence and an upgrade, told by clients who must not
//! notice what becomes of the daemon's processes meanwhile; and what must be true at its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::client::{
    ADMIN_PROGRAM, AUTOCREATE, CALL, Client, Reply, SHARED, acquire, create_lockspace,
    create_resource, delete_resource, frame, new_lockspace, put_string, put_u32, release, restrict,
};
use crate::support::daemon::{Daemon, kill_all, reactor_of};
use crate::support::owner::{OnTerm, Owner, process_state};
use crate::support::upgrade::{Host, REFUSAL, helper_client, image};
use crate::support::{DEADLINE, lock_probe, wait_for, wait_for_lock, wait_until};

/// What the tests of this folder have to say of a daemon that two disks and a domain depend on.
pub struct Story {
    pub host: Host,
    pub daemon: Daemon,
    /// Holds `held` and, with others, `shared`, all the time.
    pub guest: Owner,
    waits: Waits,
}

/// Somebody who waits in the kernel for locks that are never free, and has one as soon as it is.
struct Waits {
    is_over: Arc<AtomicBool>,
    robbed: Arc<AtomicUsize>,
}

impl Waits {
    fn for_locks(paths: Vec<std::path::PathBuf>) -> Waits {
        let is_over = Arc::new(AtomicBool::new(false));
        let robbed = Arc::new(AtomicUsize::new(0));
        for path in paths {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .expect("open a held file");
            let (is_over, robbed) = (is_over.clone(), robbed.clone());
            // It ends when the daemon has let go of the lock.
            std::thread::spawn(move || {
                wait_for_lock(&file);
                if !is_over.load(Ordering::SeqCst) {
                    robbed.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        Waits { is_over, robbed }
    }
}

/// What became of an upgrade that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// There is a successor.
    Done,
    /// The log says why not.
    Refused,
    /// The process that was asked is dead, and another one is in its place.
    Lost,
    /// All processes are dead.
    Nobody,
}

impl Story {
    pub fn begin() -> Story {
        Story::of(&crate::support::daemon::program())
    }

    /// With this program.
    pub fn of(program: &std::path::Path) -> Story {
        let host = Host::with(program);
        let daemon = host.start(&[], &[]);
        let (held, shared) = (host.disk("held"), host.disk("shared"));
        host.disk("taken");
        std::fs::create_dir(host.path("/run/leases")).expect("make a lockspace");
        std::fs::create_dir(host.path("/run/more")).expect("make a lockspace");
        let mut guest = host.guest(&daemon, "guest", &held);
        guest.call(&acquire("", &shared, SHARED)).expect_ok();
        let waits = Waits::for_locks(vec![host.path(&held), host.path(&shared)]);
        Story {
            host,
            daemon,
            guest,
            waits,
        }
    }

    /// The process that is the daemon now.
    pub fn main(&self) -> i32 {
        let text = std::fs::read_to_string(self.host.path("/run/virtlockd.pid"));
        let number = text.ok().and_then(|text| text.trim().parse().ok());
        number.unwrap_or(self.daemon.pid())
    }

    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.main()), signal);
    }

    fn helper(&self) -> Client {
        helper_client(&self.daemon, "guest", self.guest.pid())
    }

    /// The calls of the lock program.
    pub fn locks(&mut self) {
        let (host, taken) = (&self.host, "/run/taken");
        let mut helper = self.helper();
        helper.call(&acquire("", taken, 0)).expect_ok();
        host.assert_held(taken);
        assert!(!helper.call(&acquire("", taken, 0)).is_ok());
        helper.call(&release("", taken)).expect_ok();
        host.assert_free(taken);
        assert!(!helper.call(&release("", taken)).is_ok());
        // Lockspaces, and lock files in them.
        helper.call(&new_lockspace("/run/leases")).expect_ok();
        helper.call(&create_lockspace("/run/more")).expect_ok();
        helper.call(&create_lockspace("/run/more")).expect_ok();
        for resource in [create_resource, delete_resource] {
            helper.call(&resource("/run/leases", "made")).expect_ok();
        }
        assert!(!host.path("/run/leases/made").exists());
        helper
            .call(&acquire("/run/leases", "lease", AUTOCREATE))
            .expect_ok();
        host.assert_held("/run/leases/lease");
        assert!(
            !helper
                .call(&delete_resource("/run/leases", "lease"))
                .is_ok()
        );
        helper.call(&release("/run/leases", "lease")).expect_ok();
        assert!(!host.path("/run/leases/lease").exists());
        helper
            .call(&acquire("/run/more", "both", AUTOCREATE | SHARED))
            .expect_ok();
        let mut second = self.helper();
        second
            .call(&acquire("/run/more", "both", AUTOCREATE | SHARED))
            .expect_ok();
        helper.call(&release("/run/more", "both")).expect_ok();
        assert!(host.path("/run/more/both").exists());
        second.call(&release("/run/more", "both")).expect_ok();
        helper
            .call(&acquire("", "/run/new", AUTOCREATE))
            .expect_ok();
        helper.call(&release("", "/run/new")).expect_ok();
        assert!(!host.path("/run/new").exists());
        // A call in two pieces, and many at once.
        let call = acquire("", taken, 0).frame(7777);
        helper.send(&call[..11]);
        second.ping();
        helper.send(&call[11..]);
        Reply::parse(&helper.receive()).expect_ok();
        let many: Vec<_> = (0..6)
            .flat_map(|_| [release("", taken), acquire("", taken, 0)])
            .collect();
        helper.pipeline(&many).iter().for_each(Reply::expect_ok);
        helper.call(&release("", taken)).expect_ok();
        helper.ping();
        helper.call(&restrict()).expect_ok();
        assert!(!helper.call(&acquire("", taken, 0)).is_ok());
    }

    /// The calls of the admin program.
    pub fn admin(&mut self) {
        let doomed = self.helper();
        let mut admin = Admin::connect(&self.daemon);
        let server = string("virtlockd");
        let no_flags = words(&[0]);
        let (list, named) = (words(&[1, 0]), [&server[..], &no_flags].concat());
        admin.ok(1, &no_flags);
        admin.ok(3, &[]);
        admin.ok(4, &list);
        admin.ok(5, &named);
        admin.ok(6, &named);
        let set = |field: &str, value| {
            let field = string(field);
            let parts = [&server[..], &words(&[1]), &field, &words(&[2, value, 0])];
            parts.concat()
        };
        admin.ok(7, &set("prioWorkers", 7));
        assert!(find(&admin.ok(6, &named), "prioWorkers", 7));
        let clients = admin.ok(8, &[&server[..], &list].concat());
        // The newest one is the last: number, time of its coming, transport, and a count behind the list.
        let last = clients.len() - 4 - (8 + 8 + 4);
        let client = [&server[..], &clients[last..last + 8]].concat();
        admin.ok(9, &[&client[..], &no_flags].concat());
        let client = [&client[..], &[0; 8], &words(&[0, 0])].concat();
        admin.ok(10, &client);
        admin.ok(11, &client);
        let mut doomed = doomed;
        doomed.expect_closed();
        admin.ok(12, &named);
        admin.ok(13, &set("nclients_max", 4000));
        assert!(find(&admin.ok(12, &named), "nclients_max", 4000));
        let (outputs, filters) = (admin.ok(14, &no_flags), admin.ok(15, &no_flags));
        let text = |text: &str| [&words(&[1]), &string(text)[..], &no_flags].concat();
        admin.ok(16, &text("2:stderr"));
        admin.ok(17, &text("3:util"));
        assert_ne!(admin.ok(15, &no_flags), filters);
        assert_eq!(admin.ok(14, &no_flags), outputs);
        admin.refused(18, &named);
        admin.ok(19, &words(&[0, 0]));
        admin.ok(2, &[]);
    }

    /// An owner dies, and others leave and are fenced.
    pub fn ends(&mut self) {
        let (host, daemon) = (&self.host, &self.daemon);
        let (taken, shared) = ("/run/taken", "/run/shared");
        let mut dies = Owner::register(daemon.lock_socket(), "dies", OnTerm::Die);
        dies.call(&acquire("", taken, 0)).expect_ok();
        dies.call(&acquire("", shared, SHARED)).expect_ok();
        dies.kill();
        host.wait_free(taken);
        // One that has no connection of its own.
        let mut watched = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("start a process");
        let pid = i32::try_from(watched.id()).expect("a pid");
        let mut helper = helper_client(daemon, "watched", pid);
        helper.call(&acquire("", taken, 0)).expect_ok();
        drop(helper);
        watched.kill().expect("kill the process");
        watched.wait().expect("the end of the process");
        host.wait_free(taken);
        let mut leaves = Owner::register(daemon.lock_socket(), "leaves", OnTerm::Die);
        leaves.call(&acquire("", taken, 0)).expect_ok();
        leaves.close_connection();
        assert_eq!(leaves.wait_signal(), Some(Signal::SIGTERM as i32));
        host.wait_free(taken);
    }

    /// Somebody leaves who does not end when asked to. It takes 1.6 s.
    pub fn fence(&mut self) {
        let (host, daemon) = (&self.host, &self.daemon);
        let mut leaves = Owner::register(daemon.lock_socket(), "stays", OnTerm::Ignore);
        leaves.call(&acquire("", "/run/taken", 0)).expect_ok();
        leaves.close_connection();
        assert!(leaves.is_alive());
        host.assert_held("/run/taken");
        assert_eq!(leaves.wait_signal(), Some(Signal::SIGKILL as i32));
        host.wait_free("/run/taken");
    }

    /// Asks for an upgrade, and waits for what becomes of it.
    #[track_caller]
    pub fn upgrade(&mut self) -> Asked {
        let main = self.main();
        let (before, refusals) = (image(main), self.refusals());
        self.signal(Signal::SIGUSR1);
        self.await_upgrade(main, &before, refusals)
    }

    #[track_caller]
    pub fn await_upgrade(&self, main: i32, before: &[u8], refusals: usize) -> Asked {
        wait_for(DEADLINE, "the upgrade to be done or refused", || {
            if self.refusals() > refusals {
                return Some(Asked::Refused);
            }
            let now = image(main);
            if !now.is_empty() && now != before {
                return Some(Asked::Done);
            }
            if self.is_nobody_left() {
                return Some(Asked::Nobody);
            }
            let now = self.main();
            (!is_alive(main) && now != main && reactor_of(now) != now).then_some(Asked::Lost)
        })
    }

    /// Whether all processes of the daemon are dead.
    pub fn is_nobody_left(&self) -> bool {
        let refused = || std::os::unix::net::UnixStream::connect(self.daemon.lock_socket());
        !is_alive(self.main()) && refused().is_err()
    }

    /// As [`Story::is_nobody_left`], when a connection has just ended: processes close what they have before
    /// they are dead.
    pub fn is_nobody_left_soon(&self) -> bool {
        let end = Instant::now() + Duration::from_secs(2);
        while !self.is_nobody_left() {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// All processes are dead: the next start has every lock again, and its owner lives.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.waits.is_over.store(true, Ordering::SeqCst);
        wait_until(DEADLINE, "whoever got the locks to let go of them", || {
            let disks = ["/run/held", "/run/shared"];
            disks
                .iter()
                .all(|disk| lock_probe(&self.host.path(disk)).is_none())
        });
        self.daemon = self.host.start(&[], &[]);
        self.host.assert_held("/run/held");
        assert!(self.guest.is_alive());
        let mut other = helper_client(&self.daemon, "other", self.guest.pid());
        assert!(!other.call(&acquire("", "/run/held", 0)).is_ok());
        assert!(!other.call(&acquire("", "/run/shared", 0)).is_ok());
        let after = self.host.disk("after");
        other.call(&acquire("", &after, 0)).expect_ok();
        self.host.assert_held(&after);
    }

    pub fn refusals(&self) -> usize {
        self.daemon.stderr().matches(REFUSAL).count()
    }

    /// Everything is as it was.
    #[track_caller]
    pub fn holds(&mut self) {
        let mut other = helper_client(&self.daemon, "other", self.guest.pid());
        other.call(&acquire("", "/run/taken", 0)).expect_ok();
        self.host.assert_held("/run/taken");
        other.call(&release("", "/run/taken")).expect_ok();
        self.host.assert_free("/run/taken");
        self.holds_but_for_taken();
    }

    /// As [`Story::holds`], while somebody may have the third disk.
    #[track_caller]
    pub fn holds_but_for_taken(&mut self) {
        let mut other = helper_client(&self.daemon, "other", self.guest.pid());
        assert!(!other.call(&acquire("", "/run/held", 0)).is_ok());
        assert!(!other.call(&acquire("", "/run/shared", 0)).is_ok());
        let busy = self.guest.call(&acquire("", "/run/held", 0));
        busy.expect_error(87, 51);
        self.never_robbed();
    }

    /// Nobody has had a lock that was never to be free.
    #[track_caller]
    pub fn never_robbed(&mut self) {
        let robbed = self.waits.robbed.load(Ordering::SeqCst);
        assert_eq!(robbed, 0, "somebody else got a lock");
        assert!(self.guest.is_alive());
    }

    /// From here on locks may end.
    pub fn may_end(&mut self) {
        self.never_robbed();
        self.waits.is_over.store(true, Ordering::SeqCst);
    }

    /// Everything that the daemon does until it is told to end.
    pub fn tell(&mut self) -> Asked {
        self.locks();
        self.admin();
        self.ends();
        let asked = self.upgrade();
        self.holds();
        asked
    }

    /// A fence, and the end of the daemon while somebody holds something.
    pub fn stop(&mut self) {
        self.fence();
        self.holds();
        let main = self.main();
        self.may_end();
        let mut admin = Admin::connect(&self.daemon);
        // The connection ends without an answer.
        admin.client.send(&Admin::frame(20, 1, &words(&[0])));
        admin.client.expect_closed();
        self.await_end(main);
    }

    /// The daemon ends: its owners first, then what they hold.
    #[track_caller]
    pub fn await_end(&mut self, main: i32) {
        assert_eq!(self.guest.wait_signal(), Some(Signal::SIGTERM as i32));
        wait_until(DEADLINE, "the end of the daemon", || {
            !is_alive(main) && !is_alive(self.main())
        });
        // The file names a guardian that was killed until somebody has taken its place, or has brought the end
        // about without.
        wait_until(DEADLINE, "the pid file to be removed", || {
            !self.host.path("/run/virtlockd.pid").exists()
        });
        for disk in ["/run/held", "/run/shared"] {
            // Whoever waited for it may have it for a moment.
            self.host.wait_free(disk);
        }
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        self.waits.is_over.store(true, Ordering::SeqCst);
        let main = self.main();
        if main != self.daemon.pid() {
            kill_all(main);
        }
    }
}

fn is_alive(pid: i32) -> bool {
    process_state(pid).is_some_and(|state| state != 'Z')
}

/// An administrator.
struct Admin {
    client: Client,
    serial: u32,
}

impl Admin {
    fn connect(daemon: &Daemon) -> Admin {
        Admin {
            client: daemon.admin_client(),
            serial: 0,
        }
    }

    fn frame(procedure: i32, serial: u32, payload: &[u8]) -> Vec<u8> {
        frame(ADMIN_PROGRAM, 1, procedure, CALL, serial, 0, payload)
    }

    #[track_caller]
    fn call(&mut self, procedure: i32, payload: &[u8]) -> Reply {
        self.serial += 1;
        self.client
            .send(&Admin::frame(procedure, self.serial, payload));
        let reply = self.client.receive();
        assert_eq!(
            reply[20..24],
            self.serial.to_be_bytes(),
            "serial of the reply"
        );
        Reply::parse(&reply)
    }

    #[track_caller]
    fn ok(&mut self, procedure: i32, payload: &[u8]) -> Vec<u8> {
        match self.call(procedure, payload) {
            Reply::Ok { payload } => payload,
            Reply::Error(error) => panic!("admin procedure {procedure} was refused: {error:?}"),
        }
    }

    #[track_caller]
    fn refused(&mut self, procedure: i32, payload: &[u8]) {
        let reply = self.call(procedure, payload);
        assert!(!reply.is_ok(), "admin procedure {procedure} was granted");
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    values.iter().for_each(|value| put_u32(&mut out, *value));
    out
}

fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, text.as_bytes());
    out
}

/// Whether a number of this name is in a list.
fn find(list: &[u8], field: &str, value: u32) -> bool {
    let wanted = [string(field), words(&[2, value])].concat();
    list.windows(wanted.len()).any(|window| window == wanted)
}
