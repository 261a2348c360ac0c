//! A file of this host on which another process has a lease (fcntl(2), F_SETLEASE; Samba's oplocks, delegations
//! of the kernel's NFS server): to open it takes until the lease is given back. Only who wants the file waits.

use crate::scene::{PATIENCE, Scene, VARIANTS, answer, for_each};
use crate::support::client::{DOMAIN_LOCKSPACE, RESOURCE_BUSY, acquire, release};
use crate::support::namespace::Namespace;
use crate::support::upgrade::upgrade;
use crate::support::{DEADLINE, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

/// A process that has a lease on a file, and gives it back when it is told to.
struct Holder {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Holder {
    /// It has the lease when this returns.
    fn of(namespace: &Namespace, path: &str) -> Holder {
        let script = "
import fcntl, signal, sys
signal.signal(signal.SIGIO, lambda *_: None)
file = open(sys.argv[1], 'rb')
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
print('has', flush=True)
for order in sys.stdin:
    if order == 'give\\n':
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        print('given', flush=True)
    else:
        is_wanted = fcntl.fcntl(file, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        print('wanted' if is_wanted else 'has', flush=True)
";
        let mut child = namespace
            .command("python3")
            .args(["-c", script, path])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start python3 with a lease");
        let orders = child.stdin.take().expect("stdin is a pipe");
        let answers = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let mut holder = Holder {
            child,
            orders,
            answers,
        };
        assert_eq!(holder.answer(), "has", "a lease can be had");
        holder
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        read.expect("read from who has the lease");
        line.trim_end().to_owned()
    }

    fn order(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").expect("tell who has the lease");
        self.answer()
    }

    /// Waits until somebody wants the file.
    #[track_caller]
    fn wait_wanted(&mut self) {
        wait_until(DEADLINE, "somebody to want the file", || {
            self.order("ask") == "wanted"
        });
    }

    fn give_back(&mut self) {
        assert_eq!(self.order("give"), "given");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that wants a disk on which somebody has a lease.
fn waiting() -> Option<(Scene, String, Holder)> {
    let mut scene = Scene::new(VARIANTS[0])?;
    let disk = scene.host.disk("leased");
    let mut holder = Holder::of(&scene.host.namespace, &disk);
    scene.guest.post(&acquire("", &disk, 0));
    holder.wait_wanted();
    Some((scene, disk, holder))
}

#[test]
fn a_file_with_a_lease_is_had_when_the_lease_is_given_back_and_nobody_else_waits() {
    let Some((mut scene, disk, mut holder)) = waiting() else {
        return;
    };
    scene.others_are_served();
    holder.give_back();
    scene.guest.receive().expect_ok();
    scene.host.assert_held(&disk);
    let reply = answer(&mut scene.bystander, &acquire("", &disk, 0));
    reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    scene.guest.call(&release("", &disk)).expect_ok();
    scene.host.assert_free(&disk);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    CallerLeaves,
    OwnerDies,
    Upgrade,
    Crash,
    Stop,
}

const EVENTS: [Event; 5] = [
    Event::CallerLeaves,
    Event::OwnerDies,
    Event::Upgrade,
    Event::Crash,
    Event::Stop,
];

#[test]
fn whatever_happens_while_a_lease_is_waited_for_leaves_no_lock_behind() {
    for_each(&EVENTS, |event| {
        let Some((mut scene, disk, mut holder)) = waiting() else {
            return;
        };
        match event {
            Event::CallerLeaves => scene.guest.close_connection(),
            Event::OwnerDies => {
                scene.guest.kill();
                scene.guest.wait_end();
            }
            Event::Upgrade => upgrade(&scene.daemon),
            Event::Crash => {
                let before = scene.daemon.reactor();
                kill(Pid::from_raw(before), Signal::SIGKILL).expect("kill the reactor");
                wait_for(DEADLINE, "another process that serves", || {
                    let now = scene.daemon.reactor();
                    (now != before && now != scene.daemon.pid()).then_some(now)
                });
            }
            Event::Stop => {
                scene.daemon.signal(Signal::SIGTERM);
                wait_until(2 * PATIENCE, "the end of the daemon", || {
                    scene.daemon.ended().is_some()
                });
            }
        }
        if *event != Event::Stop {
            scene.others_are_served();
        }
        holder.give_back();
        if matches!(event, Event::Upgrade | Event::Crash) {
            scene.guest.receive().expect_ok();
            scene.host.assert_held(&disk);
            scene.guest.call(&release("", &disk)).expect_ok();
        }
        scene.host.wait_free(&disk);
        if *event != Event::Stop {
            answer(&mut scene.bystander, &acquire("", &disk, 0)).expect_ok();
            scene.host.assert_held(&disk);
            answer(&mut scene.bystander, &release("", &disk)).expect_ok();
            scene.host.assert_free(&disk);
        }
    });
}
