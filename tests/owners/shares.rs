//! Locks on file systems that do not behave as a local disk does: whose server keeps the locks and lets
//! go of them when it likes, whose files become stale, or that cannot be written.

use crate::support;
use crate::support::client::{
    AUTOCREATE, Call, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, Reply, SHARED, SYSTEM_ERROR,
    acquire, create_lockspace, delete_resource, register_as, release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::fuse::{Habits, Operation, Share, Trouble};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::upgrade::{Disturbed, Host, upgrade};
use crate::support::{DEADLINE, foreign_lock, lock_probe, require_root, skip, wait_until};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// Every time that this is asked for.
const FOR_EVER: usize = usize::MAX;

/// The daemon under test beside a share, which is a lockspace, and a client with an owner.
struct Scene {
    daemon: Daemon,
    share: Share,
    client: Client,
    namespace: Namespace,
}

impl Scene {
    fn with(habits: Habits) -> Option<Scene> {
        if !require_root() {
            return None;
        }
        let namespace = Namespace::new();
        let share = Share::mount(&namespace, "share", habits)?;
        let daemon = Daemon::start(&namespace, &[], &[]);
        let mut client = daemon.client();
        client.call(&register_as("guest", 4242)).expect_ok();
        client
            .call(&create_lockspace(share.directory()))
            .expect_ok();
        Some(Scene {
            daemon,
            share,
            client,
            namespace,
        })
    }

    /// A way to lock a file of the share: as a disk by its path, or in the lockspace.
    fn calls(&self, way: &Way) -> (Call, Call) {
        let path = self.share.path("x");
        let (lockspace, name) = if way.in_lockspace {
            (self.share.directory(), "x")
        } else {
            ("", &path[..])
        };
        (
            acquire(lockspace, name, way.flags),
            release(lockspace, name),
        )
    }

    /// Files are as before the next try.
    fn prepare(&self, way: &Way) {
        if way.flags & AUTOCREATE == 0 && self.share.files().is_empty() {
            self.share.put("x");
        }
    }

    /// The files that there should be when nobody holds anything.
    fn files_at_rest(&self, way: &Way) -> &[&str] {
        if way.flags & AUTOCREATE == 0 {
            &["x"]
        } else {
            &[]
        }
    }
}

/// How a file is locked.
#[derive(Debug)]
struct Way {
    in_lockspace: bool,
    flags: u32,
}

const WAYS: [Way; 5] = [
    Way::disk(0),
    Way::disk(SHARED),
    Way::lockspace(AUTOCREATE),
    Way::lockspace(AUTOCREATE | SHARED),
    Way::disk(AUTOCREATE),
];

impl Way {
    const fn disk(flags: u32) -> Way {
        Way {
            in_lockspace: false,
            flags,
        }
    }

    const fn lockspace(flags: u32) -> Way {
        Way {
            in_lockspace: true,
            flags,
        }
    }

    fn lock(&self) -> &'static str {
        if self.flags & SHARED == 0 {
            "x write"
        } else {
            "x read"
        }
    }
}

#[test]
fn a_server_that_keeps_locks_keeps_none_that_was_given_back_or_refused() {
    for habits in Habits::all() {
        let Some(mut scene) = Scene::with(habits) else {
            return;
        };
        for way in &WAYS {
            let (take, give) = scene.calls(way);
            scene.prepare(way);
            scene.client.call(&take).expect_ok();
            scene.share.wait_locks(&[way.lock()], "held");
            // A second owner is refused, or shares; another name is refused.
            let again = scene.client.call(&take);
            assert_eq!(again.is_ok(), way.flags & SHARED != 0, "{way:?}");
            if again.is_ok() {
                scene.client.call(&give).expect_ok();
            }
            let other = format!("{}/./x", scene.share.directory());
            let other = scene.client.call(&acquire("", &other, way.flags));
            other.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
            scene.share.wait_locks(&[way.lock()], "another was refused");
            scene.client.call(&give).expect_ok();
            scene.share.wait_locks(&[], "given back");
            assert_eq!(scene.share.files(), scene.files_at_rest(way), "{way:?}");

            // An owner that dies.
            let mut owner = Owner::register(scene.daemon.lock_socket(), "dies", OnTerm::Die);
            owner.call(&take).expect_ok();
            owner.kill();
            scene.share.wait_locks(&[], "its owner died");
            if way.flags & AUTOCREATE == 0 {
                // Somebody else's lock stands in the way, and goes.
                let stranger = foreign_lock(&scene.share.outside("x"), true);
                scene
                    .client
                    .call(&take)
                    .expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
                drop(stranger);
                scene.share.wait_locks(&[], "refused");
                scene.share.remove("x");
            }
        }
    }
}

#[test]
fn a_half_made_lease_is_undone_with_its_lock() {
    let Some(mut scene) = Scene::with(Habits::tenacious()) else {
        return;
    };
    // The file is replaced between open and lock: the first lock is on a file that nobody finds.
    let auto = Way::lockspace(AUTOCREATE);
    let (take, give) = scene.calls(&auto);
    scene
        .share
        .trouble(Operation::Lock, Trouble::Hangs, FOR_EVER);
    scene.client.post(&take);
    scene.share.wait_calls(Operation::Lock, 1);
    scene.share.put("x");
    scene.share.mend(Operation::Lock);
    scene.client.receive();
    scene.share.wait_locks(&["x write"], "after another round");
    scene.client.call(&give).expect_ok();
    scene.share.wait_locks(&[], "given back");
    assert!(scene.share.files().is_empty());

    // The server grants and says that it did not.
    for way in &WAYS {
        let (take, give) = scene.calls(way);
        for errno in [Errno::EIO, Errno::ETIMEDOUT, Errno::ENOLCK, Errno::ESTALE] {
            scene.prepare(way);
            let trouble = Trouble::IsDoneAndFails(errno);
            scene.share.trouble(Operation::Lock, trouble, 1);
            let reply = scene.client.call(&take);
            if reply.is_ok() {
                scene.share.wait_locks(&[way.lock()], "granted after all");
                scene.client.call(&give).expect_ok();
            } else {
                let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
                assert!(text.contains("/run/share/x"), "{text}");
            }
            scene.share.wait_locks(&[], "refused, and perhaps granted");
            assert_eq!(scene.share.files(), scene.files_at_rest(way), "{way:?}");
        }
        // It does not let go at the first time.
        scene.prepare(way);
        scene.client.call(&take).expect_ok();
        let trouble = Trouble::Fails(Errno::EIO);
        scene.share.trouble(Operation::Unlock, trouble, 1);
        scene.client.call(&give).expect_ok();
        scene.share.wait_locks(&[], "given back twice");
        scene
            .share
            .files()
            .iter()
            .for_each(|name| scene.share.remove(name));
    }
}

#[test]
fn the_end_and_an_upgrade_of_the_daemon_leave_no_lock_that_nobody_holds() {
    if !require_root() {
        return;
    }
    let host = Host::new();
    let Some(share) = Share::mount(&host.namespace, "share", Habits::tenacious()) else {
        return;
    };
    share.put("x");
    let disk = share.path("x");
    let mut daemon = host.start(&[], &[]);
    let mut guest = host.guest(&daemon, "guest", &disk);
    upgrade(&daemon);
    share.wait_locks(&["x write"], "after the upgrade");
    guest.call(&release("", &disk)).expect_ok();
    share.wait_locks(&[], "given back after the upgrade");
    guest.call(&acquire("", &disk, SHARED)).expect_ok();
    daemon.stop();
    share.wait_locks(&[], "the daemon was stopped");
}

/// Libvirt's daemon in front of a share, and one of ours that is to take over.
fn theirs_with(habits: Habits) -> Option<(Host, Share, Daemon)> {
    if !require_root() {
        return None;
    }
    let Some(theirs) = daemon::c_daemon() else {
        skip("needs libvirt's virtlockd");
        return None;
    };
    let host = Host::with(&theirs);
    let share = Share::mount(&host.namespace, "share", habits)?;
    let daemon = host.start(&[], &[]);
    Some((host, share, daemon))
}

#[test]
fn a_lock_of_libvirts_daemon_is_known_as_our_own_whatever_the_server_says_of_it() {
    for habits in Habits::all() {
        for way in &WAYS[..4] {
            let Some((host, share, daemon)) = theirs_with(habits) else {
                return;
            };
            let (lockspace, name) = if way.in_lockspace {
                (share.directory(), "x".to_owned())
            } else {
                share.put("x");
                ("", share.path("x"))
            };
            let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
            let mut other = Owner::register(daemon.lock_socket(), "other", OnTerm::Die);
            guest.call(&create_lockspace(share.directory())).expect_ok();
            guest
                .call(&acquire(lockspace, &name, way.flags))
                .expect_ok();
            share.wait_locks(&[way.lock()], "libvirt's");
            host.install(&daemon::program());
            upgrade(&daemon);
            let when = format!("taken over, {way:?}");
            share.wait_locks(&[way.lock()], &when);
            // To look at the file under another name must not close it.
            for flags in [0, SHARED] {
                let second = format!("{}/./x", share.directory());
                other
                    .call(&acquire("", &second, flags))
                    .expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
            }
            share.wait_locks(&[way.lock()], &when);
            let log = daemon.stderr();
            assert!(!log.contains("was lost"), "{habits:?} {way:?}: {log}");
            guest.kill();
            share.wait_locks(&[], "its owner died");
            // And once more, with a lock of our own.
            share.put("x");
            let disk = share.path("x");
            other.call(&acquire("", &disk, 0)).expect_ok();
            other.call(&release("", &disk)).expect_ok();
            share.wait_locks(&[], "given back");
        }
    }
}

#[test]
fn two_shared_names_of_libvirts_daemon_are_taken_over_and_each_is_given_back() {
    for habits in Habits::all() {
        let Some((host, share, daemon)) = theirs_with(habits) else {
            return;
        };
        share.put("x");
        let names = [share.path("x"), share.path("./x")];
        let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
        for name in &names {
            guest.call(&acquire("", name, SHARED)).expect_ok();
        }
        share.wait_locks(&["x read"], "libvirt's");
        host.install(&daemon::program());
        upgrade(&daemon);
        assert!(!daemon.stderr().contains("was lost"), "{habits:?}");
        guest.call(&release("", &names[1])).expect_ok();
        let seen = lock_probe(&share.outside("x"));
        assert!(seen.is_some_and(|lock| !lock.exclusive), "{habits:?}");
        guest.call(&release("", &names[0])).expect_ok();
        share.wait_locks(&[], "both were given back");
    }
}

#[test]
fn a_lock_that_a_stranger_has_by_now_is_told_after_a_take_over() {
    for habits in Habits::all() {
        for flags in [0, SHARED] {
            let Some((host, share, daemon)) = theirs_with(habits) else {
                return;
            };
            share.put("x");
            let disk = share.path("x");
            let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
            guest.call(&acquire("", &disk, flags)).expect_ok();
            share.lose_locks();
            share.stranger_locks("x", true);
            host.install(&daemon::program());
            upgrade(&daemon);
            wait_until(DEADLINE, "the loss to be told", || {
                daemon.stderr().contains("was lost by the program")
            });
            guest.call(&release("", &disk)).expect_ok();
            share.wait_locks(&["x write"], "the stranger's");
        }
    }
}

#[test]
fn a_stale_file_is_opened_by_its_name_again() {
    let Some(mut scene) = Scene::with(Habits::tenacious()) else {
        return;
    };
    for way in &WAYS {
        for operation in [
            Operation::LookUp,
            Operation::Open,
            Operation::GetAttributes,
            Operation::Lock,
            Operation::Unlink,
        ] {
            let (take, give) = scene.calls(way);
            scene.prepare(way);
            let stale = Trouble::Fails(Errno::ESTALE);
            scene.share.trouble(operation, stale, 1);
            let reply = scene.client.call(&take);
            assert!(reply.is_ok(), "{way:?} {operation:?}: {reply:?}");
            scene.share.wait_locks(&[way.lock()], "granted");
            scene.share.trouble(operation, stale, 1);
            scene.client.call(&give).expect_ok();
            scene.share.mend(operation);
            scene.share.wait_locks(&[], "given back");
            let files = scene.share.files();
            assert_eq!(files, scene.files_at_rest(way), "{way:?} {operation:?}");
            scene
                .share
                .files()
                .iter()
                .for_each(|name| scene.share.remove(name));
        }
    }
    // What is gone is gone.
    scene.share.put("k");
    let done = Trouble::IsDoneAndFails(Errno::ESTALE);
    scene.share.trouble(Operation::Unlink, done, 1);
    let delete = delete_resource(scene.share.directory(), "k");
    scene.client.call(&delete).expect_ok();
}

#[test]
fn a_file_that_stays_stale_is_refused_with_path_and_reason_and_leaves_nothing() {
    let Some(mut scene) = Scene::with(Habits::tenacious()) else {
        return;
    };
    // From the first lease on there is a process that writes notes, and a way to it.
    let lockspace = scene.share.directory();
    for call in [
        acquire(lockspace, "first", AUTOCREATE),
        release(lockspace, "first"),
    ] {
        scene.client.call(&call).expect_ok();
    }
    scene.daemon.wait_until_asleep();
    let descriptors = scene.daemon.descriptors();
    for way in &WAYS {
        for operation in [Operation::LookUp, Operation::Open, Operation::Lock] {
            let (take, give) = scene.calls(way);
            scene.prepare(way);
            let stale = Trouble::Fails(Errno::ESTALE);
            scene.share.trouble(operation, stale, FOR_EVER);
            let reply = scene.client.call(&take);
            scene.share.mend(operation);
            if operation == Operation::Open && reply.is_ok() {
                // A file that was missing is made, not opened.
                assert_ne!(way.flags & AUTOCREATE, 0);
                scene.client.call(&give).expect_ok();
            } else {
                let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
                assert!(text.contains("/run/share/x"), "{text}");
                assert!(text.contains("Stale file handle"), "{text}");
            }
            scene.share.wait_locks(&[], "refused");
            wait_until(DEADLINE, "what was open for it to be closed", || {
                scene.daemon.descriptors() == descriptors
            });
            // What was made and could not be locked is not known to be free: it stays, and is told.
            if operation == Operation::Lock && way.flags & AUTOCREATE != 0 {
                assert_eq!(scene.share.files(), ["x"]);
                assert!(scene.daemon.stderr().contains("was made for a lock"));
            } else if way.flags & AUTOCREATE != 0 {
                assert!(scene.share.files().is_empty(), "{way:?} {operation:?}");
            }
            scene
                .share
                .files()
                .iter()
                .for_each(|name| scene.share.remove(name));
            // When the trouble is over, it is as if nothing had been.
            scene.prepare(way);
            scene.client.call(&take).expect_ok();
            scene.client.call(&give).expect_ok();
            scene.share.wait_locks(&[], "given back");
            scene
                .share
                .files()
                .iter()
                .for_each(|name| scene.share.remove(name));
        }
    }
}

/// Longer than any test.
const AN_HOUR: Duration = Duration::from_secs(3600);

/// Each way to have a file that comes and goes.
fn leases() -> impl Iterator<Item = &'static Way> {
    WAYS.iter().filter(|way| way.flags & AUTOCREATE != 0)
}

/// A client asks for a lease whose file is open by then, and not locked yet.
fn about_to_lock(way: &Way) -> Option<Scene> {
    let mut scene = Scene::with(Habits::tenacious())?;
    scene.share.let_names_be_remembered(AN_HOUR);
    scene.share.put("x");
    scene
        .share
        .trouble(Operation::Lock, Trouble::Hangs, FOR_EVER);
    let (take, _) = scene.calls(way);
    scene.client.post(&take);
    scene.share.wait_calls(Operation::Lock, 1);
    Some(scene)
}

#[test]
fn a_lease_that_is_locked_after_another_host_put_a_new_file_at_its_name_is_not_had() {
    for way in leases() {
        let Some(mut scene) = about_to_lock(way) else {
            return;
        };
        // Who had the file gives it up and removes it, and somebody has a new one.
        scene.share.put("x");
        scene.share.stranger_locks("x", true);
        scene.share.mend(Operation::Lock);
        let reply = Reply::parse(&scene.client.receive());
        reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        scene.share.wait_locks(&["x write"], "refused");
        assert_eq!(scene.share.files(), ["x"]);
    }
}

#[test]
fn a_lease_that_is_locked_after_another_host_removed_it_is_had_with_a_new_file() {
    for way in leases() {
        let Some(mut scene) = about_to_lock(way) else {
            return;
        };
        scene.share.remove("x");
        scene.share.mend(Operation::Lock);
        Reply::parse(&scene.client.receive()).expect_ok();
        assert_eq!(scene.share.files(), ["x"]);
        scene.share.wait_locks(&[way.lock()], "granted");
        let (_, give) = scene.calls(way);
        scene.client.call(&give).expect_ok();
        scene.share.wait_locks(&[], "given back");
        assert_eq!(scene.share.files(), [""; 0]);
    }
}

#[test]
fn a_lease_that_another_host_has_by_now_is_not_removed_by_who_had_it_before() {
    for way in leases() {
        for is_new in [false, true] {
            let Some(mut scene) = Scene::with(Habits::tenacious()) else {
                return;
            };
            scene.share.let_names_be_remembered(AN_HOUR);
            let (take, give) = scene.calls(way);
            scene.client.call(&take).expect_ok();
            // The server gives our lock away; the file may have been removed and made again since.
            scene.share.lose_locks();
            if is_new {
                scene.share.put("x");
            }
            scene.share.stranger_locks("x", true);
            scene.client.call(&give).expect_ok();
            scene.share.wait_locks(&["x write"], "given back");
            assert_eq!(scene.share.files(), ["x"], "{way:?}, a new file: {is_new}");
        }
    }
}

#[test]
fn a_lease_of_a_daemon_that_was_killed_whole_is_not_had_again_if_its_file_goes_before_it_is_locked()
{
    let Some(mut scene) = Habits::all().last().and_then(Scene::with) else {
        return;
    };
    scene.share.let_names_be_remembered(AN_HOUR);
    let mut owner = Owner::register(scene.daemon.lock_socket(), "lives", OnTerm::Die);
    let (take, _) = scene.calls(&WAYS[2]);
    owner.call(&take).expect_ok();
    scene.daemon.kill();
    // The server lets go of what a dead process had.
    scene.share.wait_locks(&[], "the daemon was killed");
    let before = scene.share.calls(Operation::Lock);
    scene
        .share
        .trouble(Operation::Lock, Trouble::Hangs, FOR_EVER);
    let program = daemon::program();
    scene.daemon = Daemon::spawn(&program, &scene.namespace, &[], &[]);
    scene.share.wait_calls(Operation::Lock, before + 1);
    // Its look at the name is behind it: another host has the lease, gives it up, and somebody makes it again.
    scene.share.put("x");
    scene.share.mend(Operation::Lock);
    let socket = scene.daemon.lock_socket().to_owned();
    scene.daemon.wait_for_socket(&socket);
    wait_until(DEADLINE, "the loss to be told", || {
        scene.daemon.stderr().contains("another file has its name")
    });
    scene.share.wait_locks(&[], "lost");
    assert_eq!(scene.share.files(), ["x"]);
    assert!(owner.is_alive());
}

#[test]
fn a_lease_whose_name_cannot_be_asked_for_is_refused_and_one_that_is_had_is_given_back() {
    let Some(mut scene) = Scene::with(Habits::tenacious()) else {
        return;
    };
    scene.share.let_names_be_remembered(AN_HOUR);
    let (take, give) = scene.calls(&WAYS[2]);
    for number in ["EIO", "EACCES", "EPERM", "ENOENT"] {
        scene.share.put("x");
        let fails = Disturbed::with(&scene.daemon, "linkat", &format!("error={number}"));
        let reply = scene.client.call(&take);
        assert!(matches!(reply, Reply::Error(_)), "{number}: {reply:?}");
        scene.share.wait_locks(&[], "refused");
        drop(fails);
        scene.client.call(&take).expect_ok();
        let fails = Disturbed::with(&scene.daemon, "linkat", &format!("error={number}"));
        scene.client.call(&give).expect_ok();
        drop(fails);
        scene.share.wait_locks(&[], "given back");
        // Nobody knows whether that is the file that was locked.
        assert_eq!(scene.share.files(), ["x"]);
        scene.share.remove("x");
    }
}

#[test]
fn a_disk_that_cannot_be_asked_which_file_it_is_is_locked_all_the_same() {
    let Some(mut scene) = Scene::with(Habits::tenacious()) else {
        return;
    };
    scene.share.put("x");
    let names = [scene.share.path("x"), scene.share.path("./x")];
    for errno in [Errno::ESTALE, Errno::EIO, Errno::EACCES] {
        let trouble = Trouble::Fails(errno);
        scene
            .share
            .trouble(Operation::GetAttributes, trouble, FOR_EVER);
        scene.client.call(&acquire("", &names[0], 0)).expect_ok();
        scene.share.wait_locks(&["x write"], "granted");
        // The kernel's lock alone keeps others away.
        for flags in [0, SHARED] {
            let reply = scene.client.call(&acquire("", &names[1], flags));
            reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        }
        let said = scene.daemon.stderr();
        assert!(said.contains("could not be found out"), "{said}");
        scene.share.mend(Operation::GetAttributes);
        let reply = scene.client.call(&acquire("", &names[1], 0));
        reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        scene.client.call(&release("", &names[0])).expect_ok();
        scene.share.wait_locks(&[], "given back");
        // Where a file may be made or removed, it must be known which one it is.
        scene
            .share
            .trouble(Operation::GetAttributes, trouble, FOR_EVER);
        let auto = acquire(scene.share.directory(), "x", AUTOCREATE);
        let reply = scene.client.call(&auto);
        let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
        assert!(text.contains("/run/share/x"), "{text}");
        scene.share.mend(Operation::GetAttributes);
        scene.share.wait_locks(&[], "refused");
        assert_eq!(scene.share.files(), ["x"]);
    }
}

#[test]
fn a_disk_that_may_have_a_posix_lock_is_not_opened_before_it_is_known() {
    let habits = Habits {
        drops_on_flush: true,
        ..Habits::tenacious()
    };
    let Some((host, share, daemon)) = theirs_with(habits) else {
        return;
    };
    share.put("x");
    let (held, second) = (share.path("x"), share.path("./x"));
    let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
    guest.call(&acquire("", &held, 0)).expect_ok();
    host.install(&daemon::program());
    upgrade(&daemon);
    let trouble = Trouble::Fails(Errno::EIO);
    share.trouble(Operation::GetAttributes, trouble, FOR_EVER);
    let reply = guest.call(&acquire("", &second, 0));
    let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
    assert!(
        text.contains("/run/share/./x: Input/output error"),
        "{text}"
    );
    share.mend(Operation::GetAttributes);
    share.wait_locks(&["x write"], "another name was refused");
    guest.call(&release("", &held)).expect_ok();
    share.wait_locks(&[], "given back");
}

#[test]
fn a_block_device_is_not_locked_without_knowing_which_one_it_is() {
    if !require_root() || !support::require_strace() {
        return;
    }
    let namespace = Namespace::new();
    std::fs::write(namespace.path("/run/image"), [0; 4096]).expect("write an image");
    let output = namespace
        .command("losetup")
        .args(["-f", "--show", "/run/image"])
        .output()
        .expect("run losetup");
    if !output.status.success() {
        return skip("needs a loop device");
    }
    let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let detached = Detached(&namespace, &device);
    let daemon = Daemon::start(&namespace, &[], &[]);
    let mut client = daemon.client();
    client.call(&register_as("guest", 4242)).expect_ok();
    let disturbed = Disturbed::with(&daemon, "fstat,newfstatat", "error=EIO:when=1+");
    // Two nodes of one device do not exclude each other by their locks; two names of a file do.
    client.call(&acquire("", "/run/image", 0)).expect_ok();
    let reply = client.call(&acquire("", &device, 0));
    let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
    let expected = format!("resource {device}: Input/output error");
    assert!(text.ends_with(&expected), "{text}");
    drop(disturbed);
    client.call(&acquire("", &device, 0)).expect_ok();
    drop((daemon, detached));
}

/// A loop device that is given back.
struct Detached<'a>(&'a Namespace, &'a str);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let mut command = self.0.command("losetup");
        let _ = command.args(["-d", self.1]).status();
    }
}

#[test]
fn a_call_on_a_share_is_answered_when_the_server_has_done_it() {
    let Some(mut scene) = Scene::with(Habits::tenacious()) else {
        return;
    };
    scene.share.put("x");
    let (take, give) = scene.calls(&Way::disk(0));
    let time = Duration::from_millis(50);
    for operation in [Operation::Open, Operation::Lock, Operation::Unlock] {
        scene.share.trouble(operation, Trouble::Takes(time), 1);
        let start = Instant::now();
        scene.client.call(&take).expect_ok();
        scene.share.wait_locks(&["x write"], "granted");
        scene.client.call(&give).expect_ok();
        assert_eq!(scene.share.locks(), Vec::<String>::new(), "given back");
        assert!(start.elapsed() >= time, "{operation:?} took no time");
    }
}

#[test]
fn a_disk_on_a_medium_that_cannot_be_written_is_locked_shared_and_not_exclusively() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let run = |words: &[&str]| {
        let status = namespace.command(words[0]).args(&words[1..]).status();
        assert!(status.expect("run a command").success(), "{words:?}");
    };
    run(&["mkdir", "/run/medium"]);
    run(&["mount", "-t", "tmpfs", "medium", "/run/medium"]);
    run(&["touch", "/run/medium/disk"]);
    run(&["mount", "-o", "remount,ro", "/run/medium"]);
    let daemon = Daemon::start(&namespace, &[], &[]);
    let mut client = daemon.client();
    client.call(&register_as("guest", 4242)).expect_ok();
    daemon.wait_until_asleep();
    let descriptors = daemon.descriptors();
    let disk = "/run/medium/disk";
    let outside = namespace.path(disk);
    for flags in [SHARED, SHARED | AUTOCREATE] {
        client.call(&acquire("", disk, flags)).expect_ok();
        client.call(&acquire("", disk, flags)).expect_ok();
        assert!(lock_probe(&outside).is_some_and(|lock| !lock.exclusive));
        client.call(&release("", disk)).expect_ok();
        client.call(&release("", disk)).expect_ok();
        assert_eq!(lock_probe(&outside), None);
        assert!(outside.exists());
    }
    for flags in [0, AUTOCREATE] {
        let reply = client.call(&acquire("", disk, flags));
        let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
        assert!(
            text.ends_with("resource /run/medium/disk: Read-only file system"),
            "{text}"
        );
    }
    // One that is not there is not made, and the reason is the one that counts.
    let missing = acquire("", "/run/medium/missing", SHARED | AUTOCREATE);
    let reply = client.call(&missing);
    let text = reply.expect_error(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
    assert!(text.ends_with("Read-only file system"), "{text}");
    assert_eq!(daemon.descriptors(), descriptors);
}

#[test]
fn a_shared_lock_through_a_file_open_for_reading_goes_to_libvirts_daemon_and_comes_back() {
    if !require_root() {
        return;
    }
    let Some(theirs) = daemon::c_daemon() else {
        return skip("needs libvirt's virtlockd");
    };
    let host = Host::new();
    let run = |words: &[&str]| {
        let status = host.namespace.command(words[0]).args(&words[1..]).status();
        assert!(status.expect("run a command").success(), "{words:?}");
    };
    run(&["mkdir", "/run/medium"]);
    run(&["mount", "-t", "tmpfs", "medium", "/run/medium"]);
    run(&["touch", "/run/medium/disk", "/run/medium/other"]);
    run(&["mount", "-o", "remount,ro", "/run/medium"]);
    let disk = "/run/medium/disk";
    let process_lock = host.disk("process-lock");
    let daemon = host.start(&[], &[]);
    let mut guest = Owner::register(daemon.lock_socket(), "guest", OnTerm::Die);
    guest.call(&acquire("", disk, SHARED)).expect_ok();
    for program in [&daemon::program(), &theirs, &daemon::program()] {
        host.install(program);
        upgrade(&daemon);
        let seen = lock_probe(&host.path(disk));
        assert!(seen.is_some_and(|lock| !lock.exclusive), "{seen:?}");
        if *program == theirs {
            guest.call(&acquire("", &process_lock, 0)).expect_ok();
        }
    }
    assert!(!daemon.stderr().contains("was lost"));
    // Files are looked at before they are opened by now, and this one can be read, too.
    let other = "/run/medium/other";
    guest.call(&acquire("", other, SHARED)).expect_ok();
    assert!(lock_probe(&host.path(other)).is_some_and(|lock| !lock.exclusive));
    guest.call(&release("", other)).expect_ok();
    host.assert_held(&process_lock);
    guest.call(&release("", disk)).expect_ok();
    host.wait_free(disk);
    daemon.signal(Signal::SIGTERM);
}
