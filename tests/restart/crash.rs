//! The daemon's two processes, the one that was started and the one that serves, are killed: nobody notices
//! more than a pause. See [`super::support::daemon::Daemon::reactor`] for which is which.

use crate::support::client::{
    ADMIN_PROGRAM, AUTOCREATE, CALL, CALL_WITH_FDS, Client, LOCK_PROGRAM, Received, Reply, acquire,
    frame, put_u32, register_as, release,
};
use crate::support::daemon::{Daemon, Main, kill_all, reactor_of};
use crate::support::owner::{OnTerm, Owner, process_state};
use crate::support::upgrade::{
    Background, Host, PROGRAM, Rival, image, upgrade, wait_for_successor,
};
use crate::support::{DEADLINE, lock_probe, require_root, require_strace, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal a process of the daemon");
}

/// A daemon whose guest has a disk.
struct Scene {
    host: Host,
    daemon: Daemon,
    guest: Owner,
    disk: String,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !require_root() {
            return None;
        }
        let host = Host::new();
        let daemon = host.start(&[], &[]);
        let disk = host.disk("disk");
        let guest = host.guest(&daemon, "guest", &disk);
        Some(Scene {
            host,
            daemon,
            guest,
            disk,
        })
    }

    fn rival(&self) -> Rival {
        Rival::of(vec![self.host.path(&self.disk)])
    }

    /// Kills the process that serves and waits until there is another one; its number.
    #[track_caller]
    fn kill_reactor(&self) -> i32 {
        let before = wait_for(DEADLINE, "a process that serves", || {
            let now = self.daemon.reactor();
            (now != self.daemon.pid()).then_some(now)
        });
        send(before, Signal::SIGKILL);
        wait_for(DEADLINE, "another process that serves", || {
            let now = self.daemon.reactor();
            (now != before && now != self.daemon.pid()).then_some(now)
        })
    }

    /// The guest's connection is answered, and its disk can be given up and had again.
    #[track_caller]
    fn serves(&mut self) {
        self.guest.call(&release("", &self.disk)).expect_ok();
        self.host.assert_free(&self.disk);
        self.guest.call(&acquire("", &self.disk, 0)).expect_ok();
        self.host.assert_held(&self.disk);
        let mut new = self.daemon.client();
        new.call(&register_as("new", 4242)).expect_ok();
        new.call(&acquire("", &self.disk, 0)).expect_error(87, 51);
    }

    fn logged(&self, text: &str) -> usize {
        self.daemon.stderr().matches(text).count()
    }
}

#[test]
fn a_process_that_serves_and_is_killed_takes_no_lock_and_no_connection_along() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let descriptors = scene.daemon.descriptors();
    let rival = scene.rival();
    for _ in 0..5 {
        scene.kill_reactor();
        scene
            .guest
            .call(&acquire("", &scene.disk, 0))
            .expect_error(87, 51);
    }
    rival.never_succeeded();
    scene.serves();
    assert_eq!(scene.daemon.ended(), None);
    assert_eq!(scene.logged("was killed by SIGKILL"), 5);
    scene.daemon.wait_until_asleep();
    wait_until(DEADLINE, "what the dead had open to be closed", || {
        scene.daemon.descriptors() == descriptors
    });
    assert_eq!(scene.daemon.stop().code(), Some(0));
}

#[test]
fn a_fence_goes_on_when_the_process_that_began_it_is_killed() {
    let Some(scene) = Scene::new() else { return };
    let disk = scene.host.disk("stubborn");
    let mut owner = Owner::register(scene.daemon.lock_socket(), "stubborn", OnTerm::Ignore);
    owner.call(&acquire("", &disk, 0)).expect_ok();
    owner.close_connection();
    wait_until(DEADLINE, "the owner to be fenced", || {
        scene.logged("SIGTERM") > 0
    });
    scene.kill_reactor();
    scene.host.assert_held(&disk);
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    scene.host.wait_free(&disk);
}

#[test]
fn a_guest_that_dies_while_nobody_serves_is_noticed_by_the_next_one() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    send(scene.daemon.pid(), Signal::SIGSTOP);
    send(scene.daemon.reactor(), Signal::SIGKILL);
    scene.guest.kill();
    scene.guest.wait_end();
    scene.host.assert_held(&scene.disk);
    send(scene.daemon.pid(), Signal::SIGCONT);
    scene.host.wait_free(&scene.disk);
}

/// The process that is the daemon now, read in its pid file, once that is another than before.
#[track_caller]
fn new_guardian(scene: &Scene, before: i32) -> i32 {
    wait_for(DEADLINE, "another main process", || {
        let text = std::fs::read_to_string(scene.host.path("/run/virtlockd.pid")).ok()?;
        let pid: i32 = text.trim().parse().ok()?;
        (pid != before && reactor_of(pid) != pid).then_some(pid)
    })
}

#[test]
fn the_process_that_serves_takes_the_place_of_the_main_process_when_that_is_killed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    let (first, reactor) = (scene.daemon.pid(), scene.daemon.reactor());
    send(first, Signal::SIGKILL);
    let second = new_guardian(&scene, first);
    assert_eq!(second, reactor);
    scene.serves_but_for_rivals();
    // One after the other, in either order.
    let before = reactor_of(second);
    send(before, Signal::SIGKILL);
    wait_until(DEADLINE, "another process that serves", || {
        ![before, second].contains(&reactor_of(second))
    });
    scene.serves_but_for_rivals();
    send(second, Signal::SIGKILL);
    let third = new_guardian(&scene, second);
    let main = Main::of(third).expect("it runs");
    scene.serves_but_for_rivals();
    // It does all that the first one did.
    let old = image(third);
    send(third, Signal::SIGUSR1);
    wait_for_successor(third, &old);
    scene.serves_but_for_rivals();
    rival.never_succeeded();
    send(third, Signal::SIGTERM);
    wait_until(DEADLINE, "the end of the daemon", || {
        process_state(third).is_none_or(|state| state == 'Z')
    });
    assert!(!scene.host.path("/run/virtlockd.pid").exists());
    assert!(lock_probe(&scene.host.path(&scene.disk)).is_none());
    main.kill_all();
}

/// Its successor's reactor ends with it, but only until that serves.
#[test]
fn a_main_process_that_was_replaced_may_be_killed_as_well() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    let mut main = scene.daemon.pid();
    for _ in 0..10 {
        let before = image(main);
        send(main, Signal::SIGUSR1);
        wait_for_successor(main, &before);
        scene.serves_but_for_rivals();
        send(main, Signal::SIGKILL);
        main = new_guardian(&scene, main);
        scene.serves_but_for_rivals();
    }
    rival.never_succeeded();
    kill_all(main);
}

impl Scene {
    /// As [`Scene::serves`], without a moment in which somebody else may have the disk.
    #[track_caller]
    fn serves_but_for_rivals(&mut self) {
        self.guest
            .call(&acquire("", &self.disk, 0))
            .expect_error(87, 51);
        let spare = self.host.disk("spare");
        self.guest.call(&acquire("", &spare, 0)).expect_ok();
        self.host.assert_held(&spare);
        self.guest.call(&release("", &spare)).expect_ok();
        self.host.assert_free(&spare);
    }
}

#[test]
fn a_signal_to_both_processes_is_one_and_one_to_the_process_that_serves_is_none() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let reactor = scene.daemon.reactor();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGHUP,
    ] {
        send(reactor, signal);
    }
    let before = image(scene.daemon.pid());
    scene.serves();
    send(reactor, Signal::SIGUSR1);
    send(scene.daemon.pid(), Signal::SIGUSR1);
    wait_for_successor(scene.daemon.pid(), &before);
    scene.serves();
    scene.daemon.wait_until_asleep();
    assert_eq!(scene.logged("hands over to its successor"), 1);
    assert_eq!(scene.logged("the configuration was read again"), 0);
    // After the second upgrade everything is as after the first.
    upgrade(&scene.daemon);
    // Until it has served somebody it may be its understudy that goes on.
    scene.serves();
    scene.kill_reactor();
    scene.serves();
    scene.daemon.signal(Signal::SIGHUP);
    wait_until(DEADLINE, "the configuration to be read again", || {
        scene.logged("the configuration was read again") == 1
    });
}

#[test]
fn processes_that_die_in_a_row_are_followed_ever_more_slowly_and_the_next_one_serves() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    for _ in 0..6 {
        scene.kill_reactor();
    }
    rival.never_succeeded();
    scene.serves();
    // Who is killed at once does not get to say it.
    let log = scene.daemon.stderr();
    let counts = log.split(" in a row)").filter_map(|it| it.rsplit_once('('));
    let last: Option<u32> = counts.filter_map(|(_, count)| count.parse().ok()).last();
    assert!(last.is_some_and(|count| (2..=6).contains(&count)), "{log}");
}

#[test]
fn the_service_manager_is_told_that_the_process_that_serves_died_and_that_another_one_serves() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let manager = UnixDatagram::bind(host.path("/run/notify")).expect("bind the manager's socket");
    let patience = manager.set_read_timeout(Some(DEADLINE));
    patience.expect("set how long to wait");
    let is_told = |text: &str| {
        let mut bytes = [0; 4096];
        loop {
            let count = manager.recv(&mut bytes).expect("a message");
            if String::from_utf8_lossy(&bytes[..count]).contains(text) {
                return;
            }
        }
    };
    let daemon = host.start(&[], &[("NOTIFY_SOCKET", "/run/notify")]);
    is_told("READY=1");
    send(daemon.reactor(), Signal::SIGKILL);
    is_told("STATUS=The reactor died (1 in a row) and is started again; all locks stay");
    is_told("STATUS=It serves");
}

#[test]
fn an_end_that_was_asked_for_is_gone_on_with_when_the_process_that_serves_is_killed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let disk = scene.host.disk("stubborn");
    let mut owner = Owner::register(scene.daemon.lock_socket(), "stubborn", OnTerm::Ignore);
    owner.call(&acquire("", &disk, 0)).expect_ok();
    scene.daemon.signal(Signal::SIGTERM);
    wait_until(DEADLINE, "the end to begin", || {
        scene.logged("the daemon ends") > 0
    });
    let reactor = scene.daemon.reactor();
    send(reactor, Signal::SIGKILL);
    assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
    assert_eq!(scene.daemon.wait_end().code(), Some(0));
    assert!(!scene.host.path("/run/virtlockd.pid").exists());
}

#[test]
fn an_end_that_is_asked_for_while_the_ledger_cannot_be_read_is_put_off_until_it_can() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let rival = scene.rival();
    let ledger = scene.host.path("/run/libvirt/virtlockd-ledger");
    let ledger = std::fs::File::options().read(true).write(true).open(ledger);
    let ledger = ledger.expect("open the ledger");
    let mut magic = [0; 8];
    ledger.read_exact_at(&mut magic, 0).expect("read its magic");
    ledger.write_all_at(&[0; 8], 0).expect("damage it");
    send(scene.daemon.reactor(), Signal::SIGKILL);
    wait_until(DEADLINE, "the ledger to be missed", || {
        scene.logged("All locks stay, nobody is served") > 0
    });
    scene.daemon.signal(Signal::SIGTERM);
    let status = format!("/proc/{}/status", scene.daemon.pid());
    wait_until(DEADLINE, "the signal to be taken", || {
        let status = std::fs::read_to_string(&status).expect("the daemon's status");
        let pending = status.lines().find_map(|it| it.strip_prefix("ShdPnd:"));
        let pending = pending.and_then(|it| u64::from_str_radix(it.trim(), 16).ok());
        pending.is_some_and(|it| it & (1 << (Signal::SIGTERM as u64 - 1)) == 0)
    });
    // It acts on a signal in the moment in which it takes it.
    rival.never_succeeded();
    assert_eq!(scene.daemon.ended(), None);
    scene.host.assert_held(&scene.disk);
    ledger.write_all_at(&magic, 0).expect("mend it");
    // From there on it is the end as ever: the owner is dead before its lock is free.
    let witness = std::fs::File::options()
        .read(true)
        .write(true)
        .open(scene.host.path(&scene.disk));
    crate::support::wait_for_lock(&witness.expect("open the disk"));
    assert!(!scene.guest.is_alive(), "its disk was free while it lived");
    assert_eq!(scene.daemon.wait_end().code(), Some(0));
}

/// strace, attached to the process that serves alone.
struct Slowed(Child);

impl Slowed {
    fn of(process: i32, call: &str, delay: &str) -> Slowed {
        let strace = Command::new("strace")
            .args(["-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:{delay}")])
            .args(["-p", &process.to_string()])
            .stderr(Stdio::null())
            .spawn()
            .expect("start strace");
        let status = format!("/proc/{process}/status");
        wait_until(DEADLINE, "strace to be attached", || {
            let status = std::fs::read_to_string(&status).expect("the process's status");
            !status.contains("TracerPid:\t0\n")
        });
        Slowed(strace)
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_that_does_not_come_back_from_a_call_is_killed_and_followed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let reactor = scene.daemon.reactor();
    let spare = scene.host.disk("spare");
    let mut other = scene.daemon.client();
    other.call(&register_as("other", 4243)).expect_ok();
    scene.daemon.wait_until_asleep();
    // It is stopped in the middle of a call, and stays there when strace is gone.
    let slowed = Slowed::of(reactor, "openat,openat2", "delay_enter=300000000");
    other.post(&acquire("", &spare, 0));
    let opens = format!("/proc/{reactor}/syscall");
    let numbers = [libc::SYS_openat, libc::SYS_openat2].map(|number| format!("{number} "));
    wait_until(DEADLINE, "the process to open the disk", || {
        let call = std::fs::read_to_string(&opens).expect("the call that it makes");
        numbers.iter().any(|number| call.starts_with(number))
    });
    send(reactor, Signal::SIGSTOP);
    drop(slowed);
    let rival = scene.rival();
    wait_until(DEADLINE, "the process to be killed", || {
        ![reactor, scene.daemon.pid()].contains(&scene.daemon.reactor())
    });
    rival.never_succeeded();
    scene.serves();
    assert_eq!(scene.logged("did not come back from what it was doing"), 1);
}

/// Whether a thread reads from anything but standard input.
fn waits_for_a_reply(thread: &Path) -> bool {
    let call = std::fs::read_to_string(thread.join("syscall")).unwrap_or_default();
    let mut words = call.split(' ');
    let number = words.next().and_then(|word| word.parse().ok());
    let reads = [libc::SYS_read, libc::SYS_recvfrom].map(Some);
    reads.contains(&number) && words.next() != Some("0x0")
}

/// What becomes of a reactor for which two things wait: the end of one connection of an owner, and a call of
/// another.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    /// It goes on.
    GoesOn,
    /// It dies.
    Dies,
    /// It has been told that there is something, and dies before it looks. Whoever goes on asks by the numbers
    /// of the connections, in which the call comes first.
    DiesHavingHeard,
}

#[test]
fn an_owner_that_gave_up_a_connection_before_it_took_a_lock_with_another_is_no_owner_that_leaves() {
    let Some(scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let all = [
        Meanwhile::GoesOn,
        Meanwhile::Dies,
        Meanwhile::DiesHavingHeard,
    ];
    for meanwhile in all {
        let disk = scene.host.disk(&format!("{meanwhile:?}"));
        let mut owner = Owner::register(scene.daemon.lock_socket(), "owner", OnTerm::Die);
        owner.connect_again();
        owner.call(&register_as("owner", owner.pid())).expect_ok();
        let mut bystander = scene.daemon.client();
        bystander.call(&register_as("bystander", 4242)).expect_ok();
        let descriptors = scene.daemon.descriptors();
        let reactor = scene.daemon.reactor();
        send(reactor, Signal::SIGSTOP);
        wait_until(DEADLINE, "the process to be stopped", || {
            matches!(process_state(reactor), Some('T'))
        });
        // It is looked at first.
        bystander.post(&acquire("", "/run/none", 0));
        owner.close_connection();
        owner.use_connection(0);
        let threads = format!("/proc/{}/task", owner.pid());
        std::thread::scope(|scope| {
            let calling = scope.spawn(|| owner.call(&acquire("", &disk, 0)));
            wait_until(DEADLINE, "the call to be sent", || {
                let mut threads = std::fs::read_dir(&threads).expect("the owner's threads");
                threads.any(|thread| waits_for_a_reply(&thread.expect("a thread").path()))
            });
            match meanwhile {
                Meanwhile::GoesOn => send(reactor, Signal::SIGCONT),
                Meanwhile::Dies => send(reactor, Signal::SIGKILL),
                Meanwhile::DiesHavingHeard => {
                    let slowed = Slowed::of(reactor, "recvmmsg", "delay_enter=300000000");
                    send(reactor, Signal::SIGCONT);
                    let calls = format!("/proc/{reactor}/syscall");
                    let reads = format!("{} ", libc::SYS_recvmmsg);
                    wait_until(DEADLINE, "the process to look", || {
                        let call = std::fs::read_to_string(&calls).expect("the call that it makes");
                        call.starts_with(&reads)
                    });
                    send(reactor, Signal::SIGSTOP);
                    drop(slowed);
                    send(reactor, Signal::SIGKILL);
                }
            }
            calling.join().expect("the call").expect_ok();
        });
        wait_until(DEADLINE, "the connection to be closed", || {
            // One less, and the disk.
            scene.daemon.descriptors() == descriptors
        });
        scene.daemon.wait_until_asleep();
        assert_eq!(
            scene.logged("closed its connection while it holds"),
            0,
            "{meanwhile:?}"
        );
        assert!(owner.is_alive());
        scene.host.assert_held(&disk);
    }
    assert_eq!(scene.logged("was killed by SIGKILL"), 2);
}

#[test]
fn a_connection_that_was_accepted_and_not_written_down_is_served() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    scene.daemon.wait_until_asleep();
    let descriptors = scene.daemon.descriptors();
    let reactor = scene.daemon.reactor();
    let slowed = Slowed::of(reactor, "accept4", "delay_exit=300000000");
    let mut client = Client::connect(scene.daemon.lock_socket());
    wait_until(DEADLINE, "the connection to be accepted", || {
        scene.daemon.descriptors() > descriptors
    });
    send(reactor, Signal::SIGKILL);
    drop(slowed);
    client.call(&register_as("late", 4244)).expect_ok();
    let spare = scene.host.disk("spare");
    client.call(&acquire("", &spare, 0)).expect_ok();
    scene.host.assert_held(&spare);
    scene.serves();
}

#[test]
fn a_disk_that_took_the_place_of_a_file_that_was_made_is_not_removed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let (image, upload) = (
        scene.host.path("/run/image"),
        scene.host.path("/run/upload"),
    );
    std::fs::write(&upload, "somebody's data").expect("write an image");
    let inode = std::fs::metadata(&upload).expect("look at it").ino();
    let mut other = scene.daemon.client();
    other.call(&register_as("other", 4245)).expect_ok();
    let reactor = scene.daemon.reactor();
    let slowed = Slowed::of(reactor, "fcntl", "delay_enter=500000");
    other.post(&acquire("", "/run/image", AUTOCREATE));
    wait_until(DEADLINE, "the file to be made", || image.exists());
    std::fs::rename(&upload, &image).expect("put the image in its place");
    wait_until(DEADLINE, "the image to be opened", || {
        let open = std::fs::read_dir(format!("/proc/{reactor}/fd")).expect("what it has open");
        open.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
            .any(|file| file.ino() == inode)
    });
    send(reactor, Signal::SIGKILL);
    drop(slowed);
    Reply::parse(&other.receive()).expect_ok();
    scene.host.assert_held("/run/image");
    other.call(&release("", "/run/image")).expect_ok();
    let data = std::fs::read_to_string(&image).expect("read the image");
    assert_eq!(data, "somebody's data");
    scene.serves();
}

#[test]
fn a_connection_that_was_being_ended_is_not_let_in_again() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    scene.daemon.wait_until_asleep();
    let reactor = scene.daemon.reactor();
    let mut broken = scene.daemon.client();
    broken.ping();
    let slowed = Slowed::of(reactor, "close", "signal=KILL:when=1");
    broken.send(&[0xff; 30]);
    broken.expect_closed();
    wait_until(DEADLINE, "the process to be killed", || {
        ![reactor, scene.daemon.pid()].contains(&scene.daemon.reactor())
    });
    drop(slowed);
    scene.serves();
}

#[test]
fn a_main_process_takes_little_memory_and_sleeps_when_nothing_happens() {
    let Some(scene) = Scene::new() else { return };
    let mut clients: Vec<Client> = (0..200).map(|_| scene.daemon.client()).collect();
    clients.iter_mut().for_each(Client::ping);
    let read = |name: &str| {
        let path = format!("/proc/{}/{name}", scene.daemon.pid());
        std::fs::read_to_string(path).expect("what the main process takes")
    };
    let smaps = read("smaps_rollup");
    let line = smaps
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib: u64 = line
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .expect("its private memory");
    crate::support::assert_memory(kib < 1024, || format!("{kib} KiB"));
    scene.daemon.wait_until_asleep();
    // It looks once more, five seconds after the last thing that happened, and then never.
    let state = || read("stat").split_whitespace().nth(2).map(str::to_owned);
    wait_until(DEADLINE, "the main process to wait for ever", || {
        let before = read("schedstat");
        std::thread::sleep(std::time::Duration::from_secs(6));
        before == read("schedstat") && state().as_deref() == Some("S")
    });
}

/// Procedure of the admin program.
const SHUTDOWN: i32 = 20;

#[test]
fn an_end_that_an_admin_client_asks_for_is_gone_on_with_when_the_process_that_serves_is_killed() {
    if !require_strace() {
        return;
    }
    // While it fences the owners, and in the middle of the call.
    for is_in_call in [false, true] {
        let Some(mut scene) = Scene::new() else {
            return;
        };
        let disk = scene.host.disk("stubborn");
        let mut owner = Owner::register(scene.daemon.lock_socket(), "stubborn", OnTerm::Ignore);
        owner.call(&acquire("", &disk, 0)).expect_ok();
        let mut admin = scene.daemon.admin_client();
        admin.ping();
        let reactor = scene.daemon.reactor();
        let slowed = is_in_call.then(|| Slowed::of(reactor, "unlink", "delay_enter=300000000"));
        let mut payload = Vec::new();
        put_u32(&mut payload, 0);
        admin.send(&frame(ADMIN_PROGRAM, 1, SHUTDOWN, CALL, 1, 0, &payload));
        if is_in_call {
            let call = format!("/proc/{reactor}/syscall");
            let number = format!("{} ", libc::SYS_unlink);
            wait_until(DEADLINE, "the daemon's socket to be removed", || {
                let call = std::fs::read_to_string(&call).expect("the call that it makes");
                call.starts_with(&number)
            });
        } else {
            wait_until(DEADLINE, "the owner to be fenced", || {
                scene.logged("SIGTERM now") > 0
            });
        }
        send(reactor, Signal::SIGKILL);
        drop(slowed);
        // There is no answer to this call, not half of one either.
        let end = admin.receive_within(DEADLINE);
        let is_end = matches!(&end, Received::Closed { partial } if partial.is_empty());
        assert!(is_end, "no end of the connection");
        scene.host.assert_held(&disk);
        assert_eq!(owner.wait_signal(), Some(Signal::SIGKILL as i32));
        assert_eq!(scene.daemon.wait_end().code(), Some(0));
        assert!(!scene.guest.is_alive());
        assert!(!scene.daemon.lock_socket().exists());
        assert!(!scene.host.path("/run/virtlockd.pid").exists());
    }
}

/// How many descriptors of this file the daemon has.
fn open_of(daemon: &Daemon, path: &str) -> usize {
    let directory = format!("/proc/{}/fd", daemon.pid());
    let entries = std::fs::read_dir(directory).expect("list the daemon's descriptors");
    let links = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links.filter(|link| link.as_os_str() == path).count()
}

#[test]
fn descriptors_that_come_with_a_call_are_counted_and_closed_also_when_the_process_that_serves_is_killed()
 {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let passed = std::fs::File::open("/dev/zero").expect("open /dev/zero");
    let is_closed = |scene: &Scene| {
        wait_until(DEADLINE, "what was passed to be closed", || {
            open_of(&scene.daemon, "/dev/zero") == 0
        });
    };
    let call = |serial: u32| {
        let mut payload = 2u32.to_be_bytes().to_vec();
        payload.extend_from_slice(&register_as("passes", 4245).payload());
        frame(LOCK_PROGRAM, 1, 1, CALL_WITH_FDS, serial, 0, &payload)
    };
    let mut client = scene.daemon.client();
    client.send(&call(1));
    client
        .send_descriptors(&[passed.as_fd()])
        .expect("pass the first one");
    scene.daemon.wait_until_asleep();
    // The first one has come, and that is known to the next process that serves.
    scene.kill_reactor();
    scene.daemon.client().ping();
    client
        .send_descriptors(&[passed.as_fd()])
        .expect("pass the second one");
    Reply::parse(&client.receive()).expect_ok();
    is_closed(&scene);

    // They are in the daemon's table when it dies, and nobody has looked at them.
    let mut client = scene.daemon.client();
    client.send(&call(2));
    scene.daemon.client().ping();
    scene.daemon.wait_until_asleep();
    let reactor = scene.daemon.reactor();
    let slowed = Slowed::of(reactor, "recvmmsg", "delay_exit=300000000");
    client
        .send_descriptors(&[passed.as_fd()])
        .expect("pass the first one");
    wait_until(DEADLINE, "the first one to be received", || {
        open_of(&scene.daemon, "/dev/zero") == 1
    });
    send(reactor, Signal::SIGKILL);
    drop(slowed);
    client
        .send_descriptors(&[passed.as_fd()])
        .expect("pass the second one");
    Reply::parse(&client.receive()).expect_ok();
    is_closed(&scene);
    scene.serves();
}

/// Kills all that runs in the host's namespace, whoever is the daemon.
fn kill_all_in(host: &Host) {
    let namespace = |pid: &str| {
        let namespace = std::fs::metadata(format!("/proc/{pid}/ns/mnt"));
        namespace.ok().map(|it| it.ino())
    };
    let holder = host.namespace.holder_pid().to_string();
    let own = namespace(&holder);
    wait_until(DEADLINE, "the end of all processes", || {
        let all = std::fs::read_dir("/proc").expect("all processes");
        let names = all.filter_map(|it| it.ok()?.file_name().into_string().ok());
        let ours: Vec<i32> = names
            .filter(|it| *it != holder && namespace(it) == own)
            .filter_map(|it| it.parse().ok())
            .filter(|pid| process_state(*pid).is_some_and(|state| state != 'Z'))
            .collect();
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in &ours {
                let _ = kill(Pid::from_raw(*pid), signal);
            }
        }
        ours.is_empty()
    });
}

#[test]
fn a_main_process_that_is_killed_at_any_moment_of_an_upgrade_costs_nothing() {
    for after in 0..60 {
        let Some(mut scene) = Scene::new() else {
            return;
        };
        let rival = scene.rival();
        scene.daemon.signal(Signal::SIGUSR1);
        std::thread::sleep(Duration::from_millis(after));
        send(scene.daemon.pid(), Signal::SIGKILL);
        scene.serves_but_for_rivals();
        rival.never_succeeded();
        kill_all_in(&scene.host);
    }
}

#[test]
fn a_manager_that_ends_the_rest_of_a_daemon_whose_main_process_died_ends_no_guest() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut daemon = host.start(&[], &[("NOTIFY_SOCKET", "@nobody-listens-here")]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    let (first, second) = (daemon.pid(), daemon.reactor());
    send(first, Signal::SIGKILL);
    // As systemd does: at once, and to all that is left.
    daemon.wait_end();
    send(second, Signal::SIGTERM);
    wait_until(DEADLINE, "the end of the daemon", || {
        process_state(second).is_none_or(|state| state == 'Z')
    });
    host.wait_free(&disk);
    assert!(guest.is_alive());
    let again = host.start(&[], &[]);
    host.assert_held(&disk);
    assert!(guest.is_alive());
    drop(again);
    kill_all_in(&host);
}

#[test]
fn a_manager_that_has_not_lost_the_main_process_ends_the_daemon_in_order() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let mut daemon = host.start(&[], &[("NOTIFY_SOCKET", "@nobody-listens-here")]);
    let disk = host.disk("disk");
    let mut guest = host.guest(&daemon, "guest", &disk);
    send(daemon.reactor(), Signal::SIGKILL);
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(guest.wait_signal(), Some(Signal::SIGTERM as i32));
    host.assert_free(&disk);
}

#[test]
fn what_the_process_that_serves_was_sent_does_not_count_when_it_is_the_main_process_later() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let (first, reactor) = (scene.daemon.pid(), scene.daemon.reactor());
    let old = image(reactor);
    for signal in [Signal::SIGTERM, Signal::SIGUSR1] {
        send(reactor, signal);
    }
    scene.serves();
    send(first, Signal::SIGKILL);
    let second = new_guardian(&scene, first);
    scene.serves();
    scene.serves();
    assert_eq!(scene.logged("the daemon ends"), 0);
    assert_eq!(scene.logged("hands over to its successor"), 0);
    assert_eq!(image(second), old);
    assert!(scene.guest.is_alive());
    // What comes then does.
    send(second, Signal::SIGTERM);
    assert_eq!(scene.guest.wait_signal(), Some(Signal::SIGTERM as i32));
    kill_all_in(&scene.host);
}

#[test]
fn an_end_that_nobody_is_left_for_is_over_at_once_whoever_goes_on_with_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.guest.kill();
    scene.host.wait_free(&scene.disk);
    scene.daemon.wait_until_asleep();
    let guardian = scene.daemon.pid();
    send(guardian, Signal::SIGSTOP);
    send(scene.daemon.reactor(), Signal::SIGKILL);
    scene.daemon.signal(Signal::SIGTERM);
    let start = Instant::now();
    send(guardian, Signal::SIGCONT);
    let ended = wait_for(2 * DEADLINE, "the end of the daemon", || {
        scene.daemon.ended()
    });
    assert_eq!(ended.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_daemon_that_was_frozen_is_not_taken_for_one_that_hangs() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let (guardian, reactor) = (scene.daemon.pid(), scene.daemon.reactor());
    let spare = scene.host.disk("spare");
    let mut other = scene.daemon.client();
    other.call(&register_as("other", 4243)).expect_ok();
    scene.daemon.wait_until_asleep();
    let slowed = Slowed::of(reactor, "openat,openat2", "delay_enter=4000000");
    other.post(&acquire("", &spare, 0));
    let opens = format!("/proc/{reactor}/syscall");
    let numbers = [libc::SYS_openat, libc::SYS_openat2].map(|number| format!("{number} "));
    wait_until(DEADLINE, "the process to open the disk", || {
        let call = std::fs::read_to_string(&opens).expect("the call that it makes");
        numbers.iter().any(|number| call.starts_with(number))
    });
    for process in [guardian, reactor] {
        send(process, Signal::SIGSTOP);
    }
    // As long as a machine is paused.
    std::thread::sleep(Duration::from_secs(12));
    send(guardian, Signal::SIGCONT);
    // It looks before the reactor can have done anything.
    std::thread::sleep(Duration::from_millis(500));
    send(reactor, Signal::SIGCONT);
    drop(slowed);
    Reply::parse(&other.receive()).expect_ok();
    assert_eq!(scene.daemon.reactor(), reactor);
    scene.serves();
}

#[test]
fn a_process_that_hangs_before_it_serves_is_killed_and_followed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    if !require_strace() {
        return;
    }
    let (guardian, first) = (scene.daemon.pid(), scene.daemon.reactor());
    let strace = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", "trace=epoll_create1"])
        .args(["-e", "inject=epoll_create1:delay_enter=300000000"])
        .args(["-p", &guardian.to_string()])
        .stderr(Stdio::null())
        .spawn()
        .expect("start strace");
    let strace = Slowed(strace);
    let status = format!("/proc/{guardian}/status");
    wait_until(DEADLINE, "strace to be attached", || {
        let status = std::fs::read_to_string(&status).expect("the process's status");
        !status.contains("TracerPid:\t0\n")
    });
    send(first, Signal::SIGKILL);
    let second = wait_for(DEADLINE, "another process", || {
        let now = reactor_of(guardian);
        (now != first && now != guardian).then_some(now)
    });
    let call = format!("/proc/{second}/syscall");
    let number = format!("{} ", libc::SYS_epoll_create1);
    wait_until(DEADLINE, "it to be in the middle of its start", || {
        let call = std::fs::read_to_string(&call).expect("the call that it makes");
        call.starts_with(&number)
    });
    send(second, Signal::SIGSTOP);
    drop(strace);
    let rival = scene.rival();
    wait_until(3 * DEADLINE, "it to be killed", || {
        let now = reactor_of(guardian);
        now != second && now != guardian
    });
    scene.serves_but_for_rivals();
    rival.never_succeeded();
    assert_eq!(scene.logged("did not come back from what it was doing"), 1);
}

#[test]
fn a_number_that_was_the_daemons_own_at_its_start_is_nobody_elses_later() {
    if !require_root() || !require_strace() {
        return;
    }
    let host = Host::new();
    let daemon = Background::start(&host, host.namespace.command(PROGRAM).arg("-d"));
    let reactor = reactor_of(daemon.pid);
    let count = || {
        std::fs::read_dir(format!("/proc/{reactor}/fd"))
            .map(Iterator::count)
            .ok()
    };
    let socket = host.path(crate::support::daemon::LOCK_SOCKET);
    Client::connect(&socket).ping();
    let before = wait_for(DEADLINE, "the daemon to have nothing to do", || {
        let before = count();
        std::thread::sleep(Duration::from_millis(200));
        before.filter(|_| before == count())
    });
    let slowed = Slowed::of(reactor, "accept4", "delay_exit=300000000");
    let mut client = Client::connect(&socket);
    wait_until(DEADLINE, "the connection to be accepted", || {
        count().is_some_and(|now| now > before)
    });
    send(reactor, Signal::SIGKILL);
    drop(slowed);
    client.call(&register_as("late", 4244)).expect_ok();
}

#[test]
fn what_was_written_for_libvirts_daemon_does_not_outlive_who_wrote_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let document = scene.host.path("/run/virtlockd-restart-exec.json");
    for (magic, stays) in [(scene.daemon.pid(), false), (1, true)] {
        std::fs::write(&document, format!("{{\"magic\": \"{magic}\"}}")).expect("write it");
        scene.kill_reactor();
        scene.serves();
        assert_eq!(document.exists(), stays);
    }
}
