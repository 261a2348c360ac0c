//! The real thing: an unmodified libvirtd runs real guests through the daemon under test.
//!
//! Locks are looked at from outside, as another host would see them; what is refused has to be
//! refused by the lock daemon, so QEMU's own image locks are off.

use crate::support::daemon::{c_daemon, program};
use crate::support::libvirt::guest::{Format, Guest, plugged_disk_xml};
use crate::support::libvirt::{self, Libvirt, is_locked, wait_until_free};
use crate::support::{DEADLINE, lock_probe, skip, wait_until};
use crate::{alone, support};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Runs a test against a libvirtd of its own, where there can be one.
fn with_libvirt(lockd_conf: &str, test: impl FnOnce(Libvirt)) {
    if libvirt::can_run() {
        let _alone = alone();
        test(Libvirt::start(&program(), lockd_conf));
    }
}

/// True, with a skip, when libvirt's own daemon is tested, which cannot do `what`.
fn only_ours_can(what: &str) -> bool {
    let theirs = c_daemon().is_some_and(|path| path == program());
    if theirs {
        skip(&format!("libvirt's own daemon cannot {what}"));
    }
    !theirs
}

/// The refusal must come from the lock daemon and say which lock it is about.
#[track_caller]
fn assert_refused_by_lock_daemon(result: Result<(), String>, resource: &str) {
    let error = result.expect_err("this had to be refused");
    assert!(
        error.contains("resource busy: Lockspace resource") && error.contains(resource),
        "not the lock daemon's refusal: {error}"
    );
}

fn path_text(path: &std::path::Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn a_guest_holds_the_locks_of_its_disks_from_start_to_end() {
    with_libvirt("", |libvirt| {
        let disks = [libvirt.disk("a"), libvirt.disk("b")];
        assert!(!disks.iter().any(|disk| is_locked(disk)));

        let guest = Guest::new("guest").disk(&disks[0]).disk(&disks[1]);
        libvirt.create(&guest).expect("start the guest");
        for disk in &disks {
            let seen = lock_probe(disk).expect("the disk of a running guest is locked");
            assert!(seen.exclusive);
        }

        libvirt.destroy("guest");
        wait_until_free(&disks);
        libvirt.create(&guest).expect("start the guest again");
    });
}

#[test]
fn a_second_guest_on_the_same_disk_is_refused_by_the_lock_daemon() {
    with_libvirt("", |libvirt| {
        let [shared, other] = [libvirt.disk("shared"), libvirt.disk("other")];
        let first = Guest::new("first").disk(&shared);
        let second = Guest::new("second").disk(&other).disk(&shared);
        libvirt.create(&first).expect("start the first guest");

        assert_refused_by_lock_daemon(libvirt.create(&second), path_text(&shared));
        assert!(is_locked(&shared), "the refusal must not free the first");
        assert_eq!(libvirt.state("first"), "running");
        wait_until_free(&[other]);

        libvirt.destroy("first");
        wait_until_free(std::slice::from_ref(&shared));
        libvirt.create(&second).expect("start the second guest");
    });
}

#[test]
fn a_shareable_disk_has_many_users_but_never_an_exclusive_one_beside_them() {
    with_libvirt("", |libvirt| {
        let disk = libvirt.disk("disk");
        let exclusive = Guest::new("exclusive").disk(&disk);
        for name in ["one", "two"] {
            let guest = Guest::new(name).shareable(&disk);
            libvirt.create(&guest).expect("start a guest that shares");
        }
        let seen = lock_probe(&disk).expect("a shared disk is locked");
        assert!(!seen.exclusive);

        assert_refused_by_lock_daemon(libvirt.create(&exclusive), path_text(&disk));
        libvirt.destroy("one");
        assert_refused_by_lock_daemon(libvirt.create(&exclusive), path_text(&disk));
        libvirt.destroy("two");
        wait_until_free(std::slice::from_ref(&disk));
        libvirt
            .create(&exclusive)
            .expect("start the exclusive guest");
        let shareable = Guest::new("three").shareable(&disk);
        assert_refused_by_lock_daemon(libvirt.create(&shareable), path_text(&disk));
    });
}

#[test]
fn with_a_lockspace_directory_a_disk_is_locked_by_a_file_that_goes_with_the_guest() {
    let directory = support::TempDir::new();
    let conf = format!("file_lockspace_dir = \"{}\"\n", directory.path().display());
    with_libvirt(&conf, |libvirt| {
        let disk = libvirt.disk("disk");
        let leases = || files_in(directory.path());
        let guest = Guest::new("guest").disk(&disk);
        libvirt.create(&guest).expect("start the guest");
        let [lease] = leases().try_into().expect("one disk is one lock file");
        assert!(is_locked(&lease));
        assert!(
            !is_locked(&disk),
            "the lock is on the file in the directory"
        );

        let name = lease.file_name().expect("a name").to_str().expect("UTF-8");
        let second = Guest::new("second").disk(&disk);
        assert_refused_by_lock_daemon(libvirt.create(&second), name);
        assert!(is_locked(&lease), "the refusal must not free the first");

        libvirt.destroy("guest");
        wait_until(DEADLINE, "the end of the lock file", || leases().is_empty());
        assert!(disk.exists());
    });
}

#[test]
fn a_plugged_disk_is_locked_and_an_unplugged_one_is_free() {
    with_libvirt("", |libvirt| {
        let [disk, plugged] = [libvirt.disk("disk"), libvirt.disk("plugged")];
        let guest = Guest::new("guest").disk(&disk);
        libvirt.create(&guest).expect("start the guest");
        let xml = plugged_disk_xml(&plugged, Format::Raw);

        libvirt.attach("guest", &xml).expect("plug the disk");
        assert!(is_locked(&plugged));
        libvirt.detach("guest", &xml).expect("unplug the disk");
        wait_until_free(std::slice::from_ref(&plugged));
        assert!(is_locked(&disk));
    });
}

#[test]
fn a_disk_of_another_guest_cannot_be_plugged() {
    with_libvirt("", |libvirt| {
        let [first, second] = [libvirt.disk("first"), libvirt.disk("second")];
        for (name, disk) in [("one", &first), ("two", &second)] {
            let guest = Guest::new(name).disk(disk);
            libvirt.create(&guest).expect("start a guest");
        }
        let xml = plugged_disk_xml(&first, Format::Raw);
        assert_refused_by_lock_daemon(libvirt.attach("two", &xml), path_text(&first));
        assert!(is_locked(&first) && is_locked(&second));
    });
}

#[test]
fn a_plug_that_qemu_refuses_leaves_no_lock_behind() {
    with_libvirt("", |libvirt| {
        let [disk, plugged] = [libvirt.disk("disk"), libvirt.disk("plugged")];
        let guest = Guest::new("guest").disk(&disk);
        libvirt.create(&guest).expect("start the guest");

        let wrong = plugged_disk_xml(&plugged, Format::Qcow2);
        let error = libvirt.attach("guest", &wrong).expect_err("not qcow2");
        assert!(error.contains("QEMU command"), "not QEMU refused: {error}");
        wait_until_free(std::slice::from_ref(&plugged));
        assert!(is_locked(&disk));

        let right = plugged_disk_xml(&plugged, Format::Raw);
        libvirt.attach("guest", &right).expect("plug the disk");
        assert!(is_locked(&plugged));
    });
}

#[test]
fn a_suspended_guest_holds_no_lock_and_resumes_only_when_it_gets_it_again() {
    with_libvirt("", |libvirt| {
        let disks = [libvirt.disk("a"), libvirt.disk("b")];
        let guest = Guest::new("guest").disk(&disks[0]).disk(&disks[1]);
        libvirt.create(&guest).expect("start the guest");

        libvirt.virsh(&["suspend", "guest"]).expect("suspend");
        wait_until_free(&disks);
        // The first disk, because libvirt does not give back what it got before a refusal.
        let other = Guest::new("other").disk(&disks[0]);
        libvirt.create(&other).expect("start a guest meanwhile");
        let resume = || libvirt.virsh(&["resume", "guest"]).map(drop);
        assert_refused_by_lock_daemon(resume(), path_text(&disks[0]));
        assert_eq!(libvirt.state("guest"), "paused");

        libvirt.destroy("other");
        wait_until_free(&disks);
        resume().expect("resume once the disk is free");
        assert!(disks.iter().all(|disk| is_locked(disk)));
    });
}

#[test]
fn a_saved_guest_holds_no_lock_and_takes_it_again_when_restored() {
    with_libvirt("", |libvirt| {
        let disk = libvirt.disk("disk");
        let image = libvirt.files().join("saved");
        let guest = Guest::new("guest").disk(&disk);
        libvirt.create(&guest).expect("start the guest");

        let save = ["save", "guest", path_text(&image)];
        libvirt.virsh(&save).expect("save the guest");
        wait_until_free(std::slice::from_ref(&disk));
        let other = Guest::new("other").disk(&disk);
        libvirt.create(&other).expect("start a guest meanwhile");
        let restore = || libvirt.virsh(&["restore", path_text(&image)]).map(drop);
        assert_refused_by_lock_daemon(restore(), path_text(&disk));

        libvirt.destroy("other");
        wait_until_free(std::slice::from_ref(&disk));
        restore().expect("restore the guest once the disk is free");
        assert!(is_locked(&disk));
        libvirt.destroy("guest");
        wait_until_free(&[disk]);
    });
}

#[test]
fn the_locks_of_a_killed_guest_are_free_within_100_ms() {
    with_libvirt("", |libvirt| {
        // A machine that does something else for a moment is no fault of the daemon's.
        let took = (0..3).map(|try_number| {
            let disks = ["a", "b"].map(|disk| libvirt.disk(&format!("{disk}{try_number}")));
            let name = format!("guest{try_number}");
            let guest = Guest::new(&name).disk(&disks[0]).disk(&disks[1]);
            libvirt.create(&guest).expect("start the guest");
            assert!(disks.iter().all(|disk| is_locked(disk)));
            let pid = nix::unistd::Pid::from_raw(libvirt.guest_pid(&name));

            let killed = Instant::now();
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill the guest");
            wait_until_free(&disks);
            killed.elapsed()
        });
        let took: Vec<Duration> = took.collect();
        assert!(
            took.iter().any(|took| *took < Duration::from_millis(100)),
            "the locks were free only this long after the kill: {took:?}"
        );
    });
}

/// Guests whose own connections went with the daemon before, one of them suspended meanwhile, and
/// whose locks libvirtd takes for them from the next one.
#[test]
fn the_locks_of_guests_that_outlived_a_daemon_are_free_when_they_are_over() {
    if !only_ours_can("tell when a guest is over that has no connection to it") {
        return;
    }
    with_libvirt("", |mut libvirt| {
        let names = ["suspended", "paused", "running"];
        let disks = names.map(|name| libvirt.disk(name));
        let plugged = names.map(|name| libvirt.disk(&format!("plugged-{name}")));
        for (name, disk) in names.iter().zip(&disks) {
            let guest = Guest::new(name).disk(disk);
            libvirt.create(&guest).expect("start a guest");
        }
        libvirt.virsh(&["suspend", names[0]]).expect("suspend");
        libvirt.virsh(&["suspend", names[1]]).expect("suspend");
        libvirt.crash_lockd(&program());
        for (name, disk) in names.iter().zip(&plugged) {
            if *name != "paused" {
                let xml = plugged_disk_xml(disk, Format::Raw);
                if *name == "suspended" {
                    libvirt.virsh(&["resume", name]).expect("resume");
                }
                libvirt.attach(name, &xml).expect("plug a disk");
                assert!(is_locked(disk));
            }
        }
        assert!(is_locked(&disks[0]));
        // An upgrade makes no difference to that.
        support::upgrade::upgrade(libvirt.lockd());
        libvirt.virsh(&["resume", "paused"]).expect("resume");
        assert!(is_locked(&disks[1]));

        libvirt.destroy("suspended");
        wait_until_free(&[disks[0].clone(), plugged[0].clone()]);
        assert!(is_locked(&disks[1]) && is_locked(&plugged[2]));
        for (name, disk) in [("paused", &disks[1]), ("running", &plugged[2])] {
            let pid = nix::unistd::Pid::from_raw(libvirt.guest_pid(name));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill the guest");
            wait_until_free(std::slice::from_ref(disk));
        }
        let next = Guest::new("next").disk(&disks[0]).disk(&plugged[2]);
        libvirt.create(&next).expect("start a guest on their disks");
    });
}

#[test]
fn at_the_limit_of_clients_a_running_guest_is_served_and_a_new_one_is_not() {
    if !only_ours_can("serve a running guest at the limit of clients") {
        return;
    }
    with_libvirt("", |mut libvirt| {
        libvirt.configure_lockd(&program(), "max_clients = 2\n");
        let [one, two, three, plugged] =
            ["one", "two", "three", "plugged"].map(|name| libvirt.disk(name));
        for (name, disk) in [("one", &one), ("two", &two)] {
            let guest = Guest::new(name).disk(disk);
            libvirt.create(&guest).expect("start a guest");
        }
        let refuse_a_third = || {
            let third = Guest::new("three").disk(&three);
            let error = libvirt.create(&third).expect_err("there is no room for it");
            assert!(error.contains("Too many clients"), "{error}");
            assert!(!is_locked(&three));
        };
        refuse_a_third();

        libvirt.virsh(&["suspend", "one"]).expect("suspend");
        wait_until_free(std::slice::from_ref(&one));
        libvirt.virsh(&["resume", "one"]).expect("resume");
        assert!(is_locked(&one));
        let xml = plugged_disk_xml(&plugged, Format::Raw);
        libvirt.attach("one", &xml).expect("plug a disk");
        assert!(is_locked(&plugged));
        libvirt.detach("one", &xml).expect("unplug the disk");
        wait_until_free(std::slice::from_ref(&plugged));
        let twice = plugged_disk_xml(&one, Format::Raw);
        assert_refused_by_lock_daemon(libvirt.attach("one", &twice), path_text(&one));
        refuse_a_third();

        libvirt.destroy("one");
        wait_until_free(&[one]);
        let third = Guest::new("three").disk(&three);
        libvirt
            .create(&third)
            .expect("start a guest when there is room");
    });
}

#[test]
fn guests_and_locks_outlive_a_restart_of_libvirtd() {
    with_libvirt("", |mut libvirt| {
        let disk = libvirt.disk("disk");
        let guest = Guest::new("guest").disk(&disk);
        libvirt.create(&guest).expect("start the guest");
        let pid = libvirt.guest_pid("guest");

        libvirt.restart_libvirtd();
        assert_eq!(libvirt.state("guest"), "running");
        assert_eq!(libvirt.guest_pid("guest"), pid);
        assert!(is_locked(&disk));
        let second = Guest::new("second").disk(&disk);
        assert_refused_by_lock_daemon(libvirt.create(&second), path_text(&disk));

        libvirt.destroy("guest");
        wait_until_free(std::slice::from_ref(&disk));
        libvirt.create(&second).expect("start a guest afterwards");
    });
}

#[test]
fn forty_guests_start_and_end_at_once() {
    with_libvirt("", |mut libvirt| {
        let disks: Vec<[PathBuf; 2]> = (0..40)
            .map(|number| ["a", "b"].map(|letter| libvirt.disk(&format!("{number}{letter}"))))
            .collect();
        let names: Vec<String> = (0..40).map(|number| format!("guest{number}")).collect();
        let all: Vec<PathBuf> = disks.iter().flatten().cloned().collect();

        // Two at a time: of forty that libvirtd starts in the same moment, one now and then hangs
        // in its fork, with any lock daemon (tests/README.md).
        let guests: Vec<(&String, &[PathBuf; 2])> = names.iter().zip(&disks).collect();
        std::thread::scope(|scope| {
            for share in guests.chunks(20) {
                let libvirt = &libvirt;
                scope.spawn(move || {
                    for (name, disks) in share {
                        let guest = Guest::new(name).disk(&disks[0]).disk(&disks[1]);
                        libvirt.create(&guest).expect("start a guest");
                    }
                });
            }
        });
        assert!(all.iter().all(|disk| is_locked(disk)));
        assert!(libvirt.lockd().descriptors() >= 120, "a guest is a client");

        std::thread::scope(|scope| {
            for name in &names {
                let libvirt = &libvirt;
                scope.spawn(move || libvirt.destroy(name));
            }
        });
        wait_until_free(&all);
        wait_until(DEADLINE, "the end of all clients", || {
            libvirt.lockd().descriptors() < 40
        });
    });
}

#[test]
fn a_fresh_daemon_opens_the_lockspace_of_a_running_libvirtd_when_it_is_used() {
    if !only_ours_can("open a lockspace that it was not told of") {
        return;
    }
    let directory = support::TempDir::new();
    let conf = format!("file_lockspace_dir = \"{}\"\n", directory.path().display());
    with_libvirt(&conf, |mut libvirt| {
        libvirt.replace_lockd(&program());
        let guest = Guest::new("guest").disk(&libvirt.disk("disk"));
        libvirt.create(&guest).expect("start the guest");
        let [lease] = files_in(directory.path())
            .try_into()
            .expect("one disk is one lock file");
        assert!(is_locked(&lease));
    });
}

#[test]
fn a_lease_of_a_guest_is_a_lock_in_the_lockspace_that_it_names() {
    if !only_ours_can("open a lockspace that it was not told of") {
        return;
    }
    with_libvirt("", |libvirt| {
        let lockspace = libvirt.files().join("lockspace");
        std::fs::create_dir(&lockspace).expect("make the lockspace's directory");
        let key = lockspace.join("key");
        std::fs::File::create_new(&key).expect("make the lease's file");
        let first = Guest::new("first").lease(&lockspace, "key");
        let second = Guest::new("second").lease(&lockspace, "key");

        libvirt.create(&first).expect("start the first guest");
        assert!(is_locked(&key));
        assert_refused_by_lock_daemon(libvirt.create(&second), "key");
        libvirt.destroy("first");
        wait_until_free(std::slice::from_ref(&key));
        assert!(key.exists(), "a lease that was there before stays");
        libvirt.create(&second).expect("start the second guest");
    });
}

#[test]
fn an_ordinary_users_libvirtd_starts_the_daemon_by_itself() {
    if !libvirt::can_run() {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start_session(&program());
    let disk = libvirt.disk("disk");
    let guest = Guest::new("guest").disk(&disk);
    libvirt.create(&guest).expect("start the guest");
    assert!(is_locked(&disk));

    let (pid, command_line) = libvirt.session_lockd();
    let own = libvirt.files().join("bin/virtlockd");
    assert_eq!(command_line, [path_text(&own), "--timeout=120"]);

    // A second guest is served by the same daemon.
    let other_disk = libvirt.disk("other");
    let other = Guest::new("other").disk(&other_disk);
    libvirt.create(&other).expect("start another guest");
    assert!(is_locked(&other_disk));
    assert_eq!(libvirt.session_lockd().0, pid);

    for name in ["guest", "other"] {
        libvirt.destroy(name);
    }
    wait_until_free(&[disk, other_disk]);
}

fn files_in(directory: &std::path::Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("list a directory");
    entries
        .map(|entry| entry.expect("list a directory").path())
        .collect()
}
