//! Successors that cannot take over: whatever is in the place of the program when SIGUSR1 comes,
//! the daemon serves on, with every lock, and says why nothing came of it.

use crate::support;
use crate::support::client::{Client, Received, SHARED, acquire, register, release};
use crate::support::daemon::{self, Daemon};
use crate::support::owner::{OnTerm, Owner};
use crate::support::protocol::{PING, PONG};
use crate::support::upgrade::{
    CONFIG, Host, Rival, helper_client, long_name, refusals, refused_upgrade, upgrade,
};
use crate::support::{DEADLINE, require_root, wait_until};
use nix::sys::signal::Signal;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use virtlockd::custody::ledger::VERSION;

/// The ledger in the run directory.
const LEDGER: &str = "/run/libvirt/virtlockd-ledger";

/// A daemon at work.
struct Scene {
    host: Host,
    daemon: Daemon,
    guest: Owner,
    helper: Client,
    disk: String,
    shared: String,
    spare: String,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(Host::new(), |host| host.start(&[], &[]))
    }

    fn with(host: Host, start: impl FnOnce(&Host) -> Daemon) -> Scene {
        let daemon = start(&host);
        let [disk, shared, spare] = ["disk", "shared", "spare"].map(|name| host.disk(name));
        let mut guest = host.guest(&daemon, "guest", &disk);
        guest.call(&acquire("", &shared, SHARED)).expect_ok();
        let helper = helper_client(&daemon, "guest", guest.pid());
        Scene {
            host,
            daemon,
            guest,
            helper,
            disk,
            shared,
            spare,
        }
    }

    /// SIGUSR1 changes nothing; the reason in the log.
    #[track_caller]
    fn refuses(&mut self) -> String {
        self.daemon.wait_until_asleep();
        let descriptors = self.daemon.descriptors();
        let rival = Rival::of(vec![self.host.path(&self.disk)]);
        let reason = refused_upgrade(&self.daemon);
        self.serves();
        rival.never_succeeded();
        wait_until(DEADLINE, "the successor to be reaped", || {
            children(&self.daemon).is_empty()
        });
        self.daemon.wait_until_asleep();
        assert_eq!(self.daemon.descriptors(), descriptors, "descriptors leaked");
        reason
    }

    /// The daemon looks at a successor that hangs: the pid of that one.
    fn looks_at_a_sleeper(&mut self) -> i32 {
        self.host.install_script("exec sleep 1000");
        self.daemon.signal(Signal::SIGUSR1);
        support::wait_for(DEADLINE, "the successor to sleep", || {
            let pid = children(&self.daemon).trim().to_owned();
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            let is_asleep = name.is_ok_and(|name| name == "sleep\n");
            is_asleep.then(|| pid.parse().expect("a pid"))
        })
    }

    /// Everything is as it was, and the daemon does what it is asked for.
    #[track_caller]
    fn serves(&mut self) {
        assert_eq!(self.daemon.ended(), None);
        self.host.assert_held(&self.disk);
        assert!(support::lock_probe(&self.host.path(&self.shared)).is_some());
        let take = acquire("", &self.spare, 0);
        self.guest.call(&take).expect_ok();
        self.host.assert_held(&self.spare);
        assert!(!self.helper.call(&take).is_ok(), "it is held");
        self.guest.call(&release("", &self.spare)).expect_ok();
        self.host.assert_free(&self.spare);
        self.daemon.client().ping();
    }

    /// With the right program it works.
    #[track_caller]
    fn recovers(&mut self) {
        self.host.install(&daemon::program());
        upgrade(&self.daemon);
        self.serves();
        self.guest.call(&release("", &self.disk)).expect_ok();
        self.host.assert_free(&self.disk);
    }
}

/// The children of the process that serves.
fn children(daemon: &Daemon) -> String {
    let pid = daemon.reactor();
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .expect("list the daemon's children")
}

/// Sets a soft limit of the running daemon, as an administrator would.
fn limit(daemon: &Daemon, limit: &str) {
    daemon.limit(limit);
}

#[test]
fn a_missing_successor_is_refused() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.host.uninstall();
    let reason = scene.refuses();
    assert!(reason.contains("/run/programs/virtlockd"), "{reason}");
    assert!(reason.contains("No such file or directory"), "{reason}");
    scene.recovers();
}

#[test]
fn a_successor_that_is_not_executable_is_refused() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.host.install_copy(Path::new("/etc/hostname"));
    let program = scene.host.path("/run/programs/virtlockd");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o644))
        .expect("take away the right to execute it");
    let reason = scene.refuses();
    assert!(reason.contains("Permission denied"), "{reason}");
    // Executable, but no program.
    std::fs::write(&program, b"\x7fELF and nothing more").expect("write half a program");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))
        .expect("make it executable");
    let reason = scene.refuses();
    assert!(reason.contains("Exec format error"), "{reason}");
    // A directory.
    scene.host.uninstall();
    std::fs::create_dir(&program).expect("make a directory");
    let reason = scene.refuses();
    assert!(reason.contains("Permission denied"), "{reason}");
    std::fs::remove_dir(&program).expect("remove the directory");
    scene.recovers();
}

#[test]
fn a_crashing_successor_is_refused() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene
        .host
        .install_script("echo 'no such library' >&2; exit 1");
    let reason = scene.refuses();
    assert!(reason.contains("exit status: 1"), "{reason}");
    assert!(reason.contains("no such library"), "{reason}");
    scene.host.install_script("kill -ABRT $$");
    let reason = scene.refuses();
    assert!(reason.contains("signal: 6"), "{reason}");
    scene.recovers();
}

#[test]
fn a_wrong_program_is_refused() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    for program in ["/bin/true", "/bin/echo", "/bin/cat"] {
        scene.host.install(Path::new(program));
        let reason = scene.refuses();
        assert!(reason.contains("no lock daemon"), "{reason}");
    }
    scene.host.install_script("exit 0");
    let reason = scene.refuses();
    assert!(reason.contains("no lock daemon"), "{reason}");
    scene.recovers();
}

#[test]
fn a_successor_that_reads_another_format_is_refused() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.host.install_script("echo 'x (virtlockd-rs) 0.0.1'");
    let reason = scene.refuses();
    assert!(reason.contains("x (virtlockd-rs) 0.0.1"), "{reason}");
    assert!(reason.contains("does not read the ledger"), "{reason}");
    scene.recovers();
}

/// A version that takes no later format than this one, as far as this daemon can tell.
/// It is this program, which reads the earlier formats, too.
fn earlier_version(last: u32) -> String {
    let program = daemon::program();
    format!(
        r#"if [ -n "$VIRTLOCKD_CHECK_LEDGER" ]; then
    format=$(od -An -tu4 -j8 -N4)
    if [ $format -gt {last} ]; then
        echo 'virtlockd (virtlockd-rs) 0.0.1'
        echo "the ledger: its format $((format)) is newer than {last}, the last that this program knows" >&2
        exit 3
    fi
fi
exec bash -c 'exec -a "$0" {} "$@"' "$0" "$@""#,
        program.display()
    )
}

#[test]
fn an_earlier_version_is_given_a_ledger_that_it_reads() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    // Somebody who is watched, which that version knows nothing of.
    let lent = scene.host.disk("lent");
    let lent_guest = Owner::connect(scene.daemon.lock_socket(), OnTerm::Die);
    let mut lender = helper_client(&scene.daemon, "lent", lent_guest.pid());
    lender.call(&acquire("", &lent, 0)).expect_ok();
    // Half a call is on its way.
    let call = release("", &lent).frame(77);
    let (begin, rest) = call.split_at(40);
    lender.send(begin);
    scene.daemon.wait_until_asleep();
    let rival = Rival::of(vec![scene.host.path(&scene.disk), scene.host.path(&lent)]);
    scene.host.install_script(&earlier_version(2));
    upgrade(&scene.daemon);
    let log = scene.daemon.stderr();
    assert!(
        log.contains("this earlier version of the daemon watches no owner"),
        "{log}"
    );
    assert!(refusals(&scene.daemon).is_empty(), "{log}");
    scene.serves();
    upgrade(&scene.daemon);
    scene.host.assert_held(&lent);
    rival.never_succeeded();
    lender.send(rest);
    lender.receive();
    scene.host.assert_free(&lent);
    scene.recovers();
}

#[test]
fn an_earlier_version_leaves_no_ledger_of_ours_in_the_run_directory() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.host.assert_keeps_ledger(scene.daemon.pid());
    let path = scene.host.path(LEDGER);
    let inode = |path: &Path| std::fs::metadata(path).ok().map(|it| it.ino());
    let ours = inode(&path);
    scene.host.install_script(&earlier_version(4));
    upgrade(&scene.daemon);
    assert_eq!(refusals(&scene.daemon), [""; 0]);
    scene.serves();
    // Nobody writes it any more: a start would believe it.
    wait_until(DEADLINE, "the ledger to lose its name", || {
        inode(&path) != ours
    });
    scene.recovers();
}

#[test]
fn a_ledger_of_an_earlier_format_gives_its_name_to_the_next_one_at_once() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    let disk = scene.disk.clone();
    // Without locks format 5 is format 4, but for the header.
    for name in [&disk, &scene.shared] {
        scene.guest.call(&release("", name)).expect_ok();
    }
    let successor = format!(
        r#"if [ -n "$VIRTLOCKD_HANDOVER" ]; then
    printf '\004' | dd of=/proc/self/fd/${{VIRTLOCKD_HANDOVER%:*}} bs=1 seek=8 conv=notrunc 2>/dev/null
fi
exec bash -c 'exec -a "$0" {} "$@"' "$0" "$@""#,
        daemon::program().display()
    );
    scene.host.install_script(&successor);
    upgrade(&scene.daemon);
    assert_eq!(refusals(&scene.daemon), [""; 0]);
    // It serves.
    scene.guest.call(&acquire("", &disk, 0)).expect_ok();
    let pid = scene.daemon.pid();
    scene.host.assert_keeps_ledger(pid);
    let ledger = std::fs::read(scene.host.path(LEDGER)).expect("read the ledger");
    assert_eq!(ledger[8..12], VERSION.to_le_bytes());
    let log = scene.daemon.stderr();
    assert!(!log.contains("a ledger that has no name"), "{log}");
    scene
        .guest
        .call(&acquire("", &scene.shared, SHARED))
        .expect_ok();
    scene.recovers();
}

#[test]
fn a_hanging_successor_stops_nobody_and_is_given_up_after_ten_seconds() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    // One that sleeps, and one that fills its pipe.
    let mut flooded = Scene::new();
    scene.host.install_script("exec sleep 1000");
    flooded.host.install_script("exec yes");
    let flood = std::thread::spawn(move || {
        let reason = flooded.refuses();
        assert!(reason.contains("within 10 s"), "{reason}");
        flooded.recovers();
    });
    let descriptors = scene.daemon.descriptors();
    let begun = Instant::now();
    scene.daemon.signal(Signal::SIGUSR1);
    wait_until(DEADLINE, "the successor to run", || {
        !children(&scene.daemon).is_empty()
    });
    scene.serves();
    assert!(!children(&scene.daemon).is_empty(), "still being checked");
    wait_until(DEADLINE, "the daemon to give it up", || {
        !refusals(&scene.daemon).is_empty()
    });
    assert!(begun.elapsed() >= Duration::from_secs(9));
    wait_until(DEADLINE, "the successor to be reaped", || {
        children(&scene.daemon).is_empty()
    });
    // Reaped first, its descriptors closed then.
    wait_until(DEADLINE, "the descriptors to be those of before", || {
        scene.daemon.descriptors() == descriptors
    });
    scene.recovers();
    flood.join().expect("the successor that floods");
}

#[test]
fn the_end_of_the_daemon_leaves_no_successor_behind() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    let successor = scene.looks_at_a_sleeper();
    scene.daemon.stop();
    wait_until(DEADLINE, "the successor to be dead", || {
        !support::owner::runs(successor)
    });
}

/// The processes of the group of a successor that is looked at, once there are this many.
fn group(daemon: &Daemon, count: usize) -> Vec<i32> {
    support::wait_for(DEADLINE, "the successor and what it starts", || {
        let leader: i32 = children(daemon).trim().parse().ok()?;
        let is_in_it = |pid: &i32| {
            let pid = nix::unistd::Pid::from_raw(*pid);
            let group = nix::unistd::getpgid(Some(pid));
            group.is_ok_and(|group| group.as_raw() == leader)
        };
        let processes = std::fs::read_dir("/proc").expect("list all processes");
        let found: Vec<i32> = processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(is_in_it)
            .collect();
        (found.len() == count).then_some(found)
    })
}

#[test]
fn a_daemon_that_is_killed_leaves_no_successor_behind_nor_what_that_one_started() {
    if !require_root() {
        return;
    }
    let send = |pid: i32, signal| {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, signal).expect("signal a process of the daemon");
    };
    let ways: [&dyn Fn(&Daemon); 4] = [
        &|daemon| send(daemon.pid(), Signal::SIGTERM),
        &|daemon| daemon::kill_all(daemon.pid()),
        // One of the two goes on, which is not the one that looks at the successor.
        &|daemon| send(daemon.reactor(), Signal::SIGKILL),
        &|daemon| send(daemon.pid(), Signal::SIGKILL),
    ];
    for end in ways {
        let scene = Scene::new();
        scene.host.install_script("sleep 1000 & sleep 1000; exit");
        scene.daemon.signal(Signal::SIGUSR1);
        let successors = group(&scene.daemon, 3);
        let reactor = scene.daemon.reactor();
        // The group exists, and all that is in it may run, before the daemon comes to tie it to itself: that is
        // the next thing that it does.
        scene.daemon.wait_until_asleep();
        let start = Instant::now();
        end(&scene.daemon);
        wait_until(DEADLINE, "the successor to be dead", || {
            !successors.iter().any(|pid| support::owner::runs(*pid))
        });
        // Not because it took too long.
        assert!(start.elapsed() < Duration::from_secs(9));
        let text = std::fs::read_to_string(scene.host.path("/run/virtlockd.pid"));
        if text.is_ok_and(|text| text.trim() == reactor.to_string()) {
            // It is the daemon now, and not this test's child.
            daemon::kill_all(reactor);
        }
    }
}

#[test]
fn what_a_successor_leaves_running_ends_when_it_has_been_looked_at() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene
        .host
        .install_script("sleep 1000 & while [ ! -e /run/go ]; do sleep 0.01; done; exit 1");
    scene.daemon.signal(Signal::SIGUSR1);
    let sleeper = support::wait_for(DEADLINE, "the one that stays", || {
        let all = group(&scene.daemon, 3);
        let name = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let is_it = |pid: &i32| name(pid).is_ok_and(|name| name == "sleep\x001000\0");
        all.into_iter().find(is_it)
    });
    std::fs::write(scene.host.path("/run/go"), "").expect("let it end");
    wait_until(DEADLINE, "the refusal", || {
        !refusals(&scene.daemon).is_empty()
    });
    wait_until(DEADLINE, "the one that stayed to be dead", || {
        !support::owner::runs(sleeper)
    });
    scene.recovers();
}

#[test]
fn a_right_successor_is_found_although_one_before_it_hung() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.looks_at_a_sleeper();
    let before = support::upgrade::image(scene.daemon.pid());
    scene.host.install(&daemon::program());
    scene.daemon.signal(Signal::SIGUSR1);
    support::upgrade::wait_for_successor(scene.daemon.pid(), &before);
    scene.serves();
    wait_until(DEADLINE, "the one that hung to be reaped", || {
        children(&scene.daemon).is_empty()
    });
}

/// Scripts that say what our program says that can take over, and what libvirt's says.
const SAYS_OURS: &str = "echo 'x (virtlockd-rs) 0.0.1'; echo 'ledger readable'";
const SAYS_THEIRS: &str = "echo 'x (libvirt) 11.3.0'";

#[test]
fn a_program_that_is_exchanged_while_it_is_looked_at_is_looked_at_again() {
    if !require_root() {
        return;
    }
    let Some(theirs) = daemon::c_daemon() else {
        return support::skip("needs libvirt's virtlockd");
    };
    let mut scene = Scene::new();
    let rival = Rival::of(vec![scene.host.path(&scene.disk)]);
    // Each says that it is the other program than the one that then is in its place.
    for (said, program) in [(SAYS_OURS, theirs), (SAYS_THEIRS, daemon::program())] {
        let next = scene.host.path("/run/programs/next");
        std::os::unix::fs::symlink(&program, &next).expect("link the next program");
        if said == SAYS_THEIRS {
            // Libvirt's daemon executes what is there without a look, and does not survive a
            // connection that has not registered: the last one must be gone.
            scene.daemon.wait_until_asleep();
            scene.host.install(&daemon::program());
            upgrade(&scene.daemon);
        }
        let exchange = "mv /run/programs/next /run/programs/virtlockd";
        scene.host.install_script(&format!("{said}; {exchange}"));
        upgrade(&scene.daemon);
        scene.serves();
    }
    assert_eq!(refusals(&scene.daemon), Vec::<String>::new());
    rival.never_succeeded();
    scene.recovers();
}

// It lives on for seconds, and a lock lives as long as anybody has its file open.
#[test]
fn a_successor_that_is_looked_at_gets_no_descriptor_that_was_taken_over() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    upgrade(&scene.daemon);
    let sleeper = scene.looks_at_a_sleeper();
    let open: Vec<String> = std::fs::read_dir(format!("/proc/{sleeper}/fd"))
        .expect("the sleeper's descriptors")
        // It may close one of its own meanwhile.
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|what| what.display().to_string())
        .filter(|what| what.starts_with("socket:") || what.starts_with("/run/"))
        // What it is shown.
        .filter(|what| what != "/run/programs/virtlockd" && what != "/run/libvirt/virtlockd-ledger")
        .collect();
    assert_eq!(open, [""; 0], "clients and locks");
    scene.serves();
    let sleeper = nix::unistd::Pid::from_raw(sleeper);
    nix::sys::signal::kill(sleeper, Signal::SIGKILL).unwrap();
    scene.recovers();
}

/// What the daemon has open and with which flags. The numbers are left out: a ledger that was
/// written anew has another one.
fn open_files(daemon: &Daemon) -> Vec<(PathBuf, String)> {
    let mut all: Vec<(PathBuf, String)> = descriptors(daemon)
        .into_iter()
        .filter_map(|number| {
            let process = format!("/proc/{}", daemon.pid());
            let mut what = std::fs::read_link(format!("{process}/fd/{number}")).ok()?;
            // Each process that serves reads its own list of mounts.
            if what.ends_with("mountinfo") {
                what = "mountinfo".into();
            }
            let text = std::fs::read_to_string(format!("{process}/fdinfo/{number}")).ok()?;
            let flags = text.lines().find(|line| line.starts_with("flags:"))?;
            Some((what, flags.to_owned()))
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_successor_that_is_gone_when_its_time_has_come_is_not_missed() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    for said in [SAYS_OURS, SAYS_THEIRS] {
        for (leaves, why) in [("rm", "No such file"), ("chmod 644", "Permission denied")] {
            scene.daemon.wait_until_asleep();
            let before = open_files(&scene.daemon);
            scene
                .host
                .install_script(&format!("{said}; {leaves} /run/programs/virtlockd"));
            let reason = scene.refuses();
            assert!(reason.contains(why), "{reason}");
            let after = open_files(&scene.daemon);
            assert_eq!(after, before, "descriptors are as before");
            let document = scene.host.path("/run/virtlockd-restart-exec.json");
            assert!(!document.exists(), "the document is removed");
        }
    }
    // SIGUSR1 is still blocked, or this would be the end.
    scene.refuses();
    scene.recovers();
}

#[test]
fn a_successor_that_refuses_the_configuration_does_not_get_to_run() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::with(Host::new(), |host| {
        host.start_configured("max_clients = 20\n")
    });
    let config = scene.host.path(CONFIG);
    std::fs::write(&config, "max_clients = \"many\n").expect("break the configuration");
    let reason = scene.refuses();
    assert!(reason.contains(CONFIG), "{reason}");
    std::fs::remove_file(&config).expect("remove the configuration");
    let reason = scene.refuses();
    assert!(reason.contains(CONFIG), "{reason}");
    // Nor does it wait for one that nobody writes.
    nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRWXU).expect("make a FIFO");
    let reason = scene.refuses();
    assert!(reason.contains("It is a FIFO"), "{reason}");
    std::fs::remove_file(&config).expect("remove the FIFO");
    std::fs::write(&config, "max_clients = 20\n").expect("mend the configuration");
    scene.recovers();
}

#[test]
fn a_ledger_that_cannot_grow_refuses_upgrades_and_locks_until_it_can() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    // The memory file is a file to this limit; the log file stays below it.
    limit(&scene.daemon, "--fsize=60000:");
    let reason = scene.refuses();
    assert!(reason.contains("File too large"), "{reason}");
    // What the ledger has room for is granted, and not one lock more.
    let granted = (0..100)
        .take_while(|number| {
            let file = format!("long-{number}");
            scene.host.disk(&file);
            let name = long_name(&file, 4000);
            scene.helper.call(&acquire("", &name, 0)).is_ok()
        })
        .count();
    assert!((5..100).contains(&granted), "{granted} locks were granted");
    let refused = format!("long-{granted}");
    let again = acquire("", &long_name(&refused, 4000), 0);
    scene.daemon.wait_until_asleep();
    let descriptors = scene.daemon.descriptors();
    let error = scene.helper.call(&again);
    assert!(!error.is_ok());
    scene.host.assert_free(&format!("/run/{refused}"));
    assert_eq!(scene.daemon.descriptors(), descriptors);
    let reason = refused_upgrade(&scene.daemon);
    assert!(reason.contains("File too large"), "{reason}");
    for number in 0..granted {
        scene.host.assert_held(&format!("/run/long-{number}"));
    }
    // Who is there is served, and gives back what it has; whoever comes waits in front of the door, as it
    // could not be written down that it is there.
    let mut comes = scene.daemon.client();
    comes.send(&PING);
    let first = long_name("long-0", 4000);
    scene.helper.call(&release("", &first)).expect_ok();
    scene.host.assert_free("/run/long-0");
    // A process that goes on finds all that was so.
    let before = scene.daemon.reactor();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), Signal::SIGKILL).unwrap();
    wait_until(DEADLINE, "another process that serves", || {
        ![before, scene.daemon.pid()].contains(&scene.daemon.reactor())
    });
    scene.helper.ping();
    scene.host.assert_free("/run/long-0");
    for number in 1..granted {
        scene.host.assert_held(&format!("/run/long-{number}"));
        let name = long_name(&format!("long-{number}"), 4000);
        assert!(!scene.helper.call(&acquire("", &name, 0)).is_ok());
    }
    // It is not: what the helper was told came behind it.
    let answer = comes.receive_within(Duration::from_millis(1));
    assert!(matches!(answer, Received::Silence { .. }), "{answer:?}");
    limit(&scene.daemon, "--fsize=unlimited:");
    assert_eq!(comes.receive(), PONG);
    wait_until(DEADLINE, "locks to be granted again", || {
        scene.helper.call(&again).is_ok()
    });
    upgrade(&scene.daemon);
    for number in 1..=granted {
        scene.host.assert_held(&format!("/run/long-{number}"));
        let name = long_name(&format!("long-{number}"), 4000);
        scene.helper.call(&release("", &name)).expect_ok();
    }
    scene.recovers();
}

#[test]
fn at_the_limit_of_descriptors_an_upgrade_works_or_is_refused() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.daemon.wait_until_asleep();
    let before = support::upgrade::image(scene.daemon.pid());
    let open = descriptors(&scene.daemon);
    let count = open.len();
    // The kernel gives numbers below the limit only: each number that is not taken is one free.
    let limits: Vec<i32> = (3..200).filter(|number| !open.contains(number)).collect();
    let mut refused = 0;
    for number in limits {
        let seen = refusals(&scene.daemon).len();
        limit(&scene.daemon, &format!("--nofile={number}:"));
        scene.daemon.signal(Signal::SIGUSR1);
        wait_until(DEADLINE, "the upgrade, or its refusal", || {
            support::upgrade::image(scene.daemon.pid()) != before
                || refusals(&scene.daemon).len() > seen
        });
        scene.helper.ping();
        scene.host.assert_held(&scene.disk);
        if support::upgrade::image(scene.daemon.pid()) != before {
            break;
        }
        refused += 1;
        wait_until(DEADLINE, "the successor to be reaped", || {
            children(&scene.daemon).is_empty()
        });
        scene.daemon.wait_until_asleep();
        assert_eq!(scene.daemon.descriptors(), count, "below {number}");
    }
    println!("refused {refused} times");
    assert!((1..64).contains(&refused), "refused {refused} times");
    let reason = refusals(&scene.daemon).remove(0);
    assert!(reason.contains("Too many open files"), "{reason}");
    limit(&scene.daemon, "--nofile=10000:");
    scene.recovers();
}

fn descriptors(daemon: &Daemon) -> Vec<i32> {
    std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .expect("list the daemon's descriptors")
        .map(|entry| {
            let name = entry.expect("a descriptor").file_name();
            name.to_str()
                .and_then(|name| name.parse().ok())
                .expect("a number")
        })
        .collect()
}

#[test]
fn an_upgrade_to_a_program_that_is_not_there_can_be_asked_for_a_thousand_times() {
    if !require_root() {
        return;
    }
    let mut scene = Scene::new();
    scene.host.uninstall();
    scene.refuses();
    let descriptors = scene.daemon.descriptors();
    for _ in 0..1000 {
        scene.daemon.signal(Signal::SIGUSR1);
        scene.helper.call(&register(scene.guest.pid())).expect_ok();
    }
    scene.daemon.wait_until_asleep();
    assert_eq!(scene.daemon.descriptors(), descriptors);
    scene.recovers();
}
