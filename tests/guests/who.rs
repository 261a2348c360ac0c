//! What an operator is told of real guests: by a refused start, and by `virtlockctl`.

use crate::alone;
use crate::support::daemon::{c_daemon, program};
use crate::support::libvirt::guest::Guest;
use crate::support::libvirt::{self, Libvirt};
use crate::support::{DEADLINE, TempDir, skip, wait_until};
use serde_json::Value;
use std::path::Path;

/// Runs a test against a libvirtd of its own in front of this daemon, where there can be one.
fn with_libvirt(program: &Path, lockd_conf: &str, test: impl FnOnce(Libvirt)) {
    if libvirt::can_run() {
        let _alone = alone();
        test(Libvirt::start(program, lockd_conf));
    }
}

fn is_theirs() -> bool {
    let theirs = c_daemon().is_some_and(|path| path == program());
    if theirs {
        skip("libvirt's own daemon names nobody");
    }
    theirs
}

/// Runs virtlockctl there: its exit code and what it printed.
fn ctl(libvirt: &Libvirt, words: &[&str]) -> (i32, String) {
    let output = libvirt
        .namespace()
        .command(env!("CARGO_BIN_EXE_virtlockctl"))
        .args(words)
        .output()
        .expect("run virtlockctl");
    let text = String::from_utf8(output.stdout.clone()).expect("it prints text");
    let code = output.status.code().expect("it ends by itself");
    assert!(!text.is_empty(), "{output:?}");
    (code, text)
}

fn json(libvirt: &Libvirt, words: &[&str]) -> Value {
    let (_, text) = ctl(libvirt, words);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// What is said of one guest, among those of others on this machine.
fn of<'a>(rows: &'a Value, key: &str, value: impl Into<Value>) -> Vec<&'a Value> {
    let value = value.into();
    let rows = rows.as_array().expect("rows").iter();
    rows.filter(|row| row[key] == value).collect()
}

#[test]
fn a_refused_start_names_the_guest_that_has_the_disk() {
    if is_theirs() {
        return;
    }
    with_libvirt(&program(), "", |libvirt| {
        let disk = libvirt.disk("disk");
        libvirt
            .create(&Guest::new("first").disk(&disk))
            .expect("start the guest");
        let refused = libvirt
            .create(&Guest::new("second").disk(&disk))
            .expect_err("the disk is the first one's");
        let uuid = libvirt.virsh(&["domuuid", "first"]).expect("its uuid");
        let pid = libvirt.guest_pid("first");
        let expected = format!(
            "resource busy: Lockspace resource '{}' is locked: by domain 'first' (uuid {uuid}, pid {pid}), exclusive",
            disk.display()
        );
        assert!(refused.contains(&expected), "{refused}");
        // The same words.
        let (code, said) = ctl(&libvirt, &["who", disk.to_str().expect("a path of text")]);
        let expected = format!("by domain 'first' (uuid {uuid}, pid {pid})");
        assert!(code == 0 && said.contains(&expected), "{said}");
        let (code, said) = ctl(&libvirt, &["status", "first"]);
        assert!(code == 0 && said.contains("connected"), "{said}");
    });
}

#[test]
fn who_finds_a_disk_by_its_path_where_libvirt_locks_a_lease_for_it() {
    if is_theirs() {
        return;
    }
    let directory = TempDir::new();
    let conf = format!("file_lockspace_dir = \"{}\"\n", directory.path().display());
    with_libvirt(&program(), &conf, |libvirt| {
        let disk = libvirt.disk("disk");
        let disk = disk.to_str().expect("a path of text");
        assert_eq!(ctl(&libvirt, &["who", disk]).0, 1);
        libvirt
            .create(&Guest::new("guest").disk(Path::new(disk)))
            .expect("start the guest");
        let (code, said) = ctl(&libvirt, &["who", disk]);
        assert_eq!(code, 0, "{said}");
        assert!(said.contains("by domain 'guest'"), "{said}");
        let through = format!("through its lease {}", directory.path().display());
        assert!(said.contains(&through), "{said}");
        // And it is protected.
        let audit = json(&libvirt, &["--json", "audit"]);
        let pid = libvirt.guest_pid("guest");
        assert_eq!(of(&audit["unprotected"], "pid", pid), [&Value::Null; 0]);
        let doctor = json(&libvirt, &["--json", "doctor"]);
        let says = |level: &str, words: &str| {
            let findings = doctor["findings"].as_array().expect("findings").iter();
            let mut what = findings.filter(|it| it["level"] == level);
            assert!(
                what.any(|it| it["what"].as_str().expect("a text").contains(words)),
                "{level} {words}: {doctor:#}"
            );
        };
        says("ok", "qemu.conf has guests' disks locked by virtlockd");
        says("warn", "which is this host's alone");
        says("ok", "answers, process");
    });
}

#[test]
fn audit_finds_guests_that_were_started_before_locking_was_switched_on_and_locks_for_nothing() {
    let mut daemons = vec![program()];
    daemons.extend(c_daemon().filter(|path| *path != program()));
    for daemon in daemons {
        with_libvirt(&daemon, "", |mut libvirt| {
            let (early, late) = (libvirt.disk("early"), libvirt.disk("late"));
            let etc = libvirt.namespace().path("/etc/libvirt/qemu.conf");
            let on = std::fs::read_to_string(&etc).expect("read the configuration");
            let off = on.replace("lock_manager = \"lockd\"", "");
            std::fs::write(&etc, off).expect("switch locking off");
            libvirt.restart_libvirtd();
            libvirt
                .create(&Guest::new("early").disk(&early))
                .expect("start a guest without locks");
            std::fs::write(&etc, &on).expect("switch locking on");
            libvirt.restart_libvirtd();
            libvirt
                .create(&Guest::new("late").disk(&late))
                .expect("start a guest with locks");
            let path = |disk: &Path| disk.to_str().expect("a path of text").to_owned();
            let (code, table) = ctl(&libvirt, &["audit"]);
            assert_eq!(code, 1, "{table}");
            let audit = json(&libvirt, &["--json", "audit"]);
            let found = of(&audit["unprotected"], "pid", libvirt.guest_pid("early"));
            assert_eq!(found.len(), 1, "{audit:#}");
            assert_eq!(found[0]["path"], path(&early));
            assert_eq!(found[0]["domain"], "early");
            let found = of(&audit["unprotected"], "pid", libvirt.guest_pid("late"));
            assert_eq!(found.len(), 0, "{audit:#}");
            assert_eq!(of(&audit["idle_locks"], "path", path(&late)).len(), 0);

            // A lock that is forgotten.
            let nobody = libvirt.disk("nobody");
            let mut client = libvirt.lockd().client();
            let register = crate::support::client::register_as("gone", 4_999_999);
            client.call(&register).expect_ok();
            let acquire = crate::support::client::acquire("", &path(&nobody), 0);
            client.call(&acquire).expect_ok();
            wait_until(DEADLINE, "the lock for nothing to be found", || {
                let audit = json(&libvirt, &["--json", "audit"]);
                of(&audit["idle_locks"], "path", path(&nobody)).len() == 1
            });
        });
    }
}
