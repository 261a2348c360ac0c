//! The commands beside our daemon.

use crate::run::{Ran, Running, ctl, program};
use crate::schema;
use crate::support;
use crate::support::client::{
    AUTOCREATE, Call, SHARED, acquire, create_lockspace, register_as, release,
};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::{DEADLINE, ForeignLock, foreign_lock, skip, wait_for, wait_until};
use nix::sys::stat;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;

/// A daemon with two guests: the first has a disk, and both share another one.
pub struct Scene {
    pub namespace: Namespace,
    pub daemon: Daemon,
    pub first: Owner,
    pub second: Owner,
}

impl Scene {
    pub fn new() -> Option<Scene> {
        if !support::require_root() {
            return None;
        }
        if daemon::program().starts_with("/usr") {
            skip("libvirt's daemon has no status program");
            return None;
        }
        let namespace = Namespace::new();
        let daemon = Daemon::start(&namespace, &[], &[]);
        for disk in ["disk", "shared", "free"] {
            std::fs::write(namespace.path(format!("/run/{disk}")), b"").expect("make a disk");
        }
        let register = |name| Owner::register(daemon.lock_socket(), name, OnTerm::Die);
        let (mut first, mut second) = (register("first"), register("second"));
        first.call(&acquire("", "/run/disk", 0)).expect_ok();
        for owner in [&mut first, &mut second] {
            owner.call(&acquire("", "/run/shared", SHARED)).expect_ok();
        }
        Some(Scene {
            namespace,
            daemon,
            first,
            second,
        })
    }

    pub fn ctl(&self, words: &[&str]) -> Ran {
        ctl(&self.namespace, words)
    }
}

/// The lines that it prints from now on.
fn lines_of(running: &mut Running) -> Receiver<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let stdout = running.0.stdout.take().expect("its output");
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn names<'a>(rows: &'a Value, key: &str) -> Vec<&'a str> {
    let rows = rows.as_array().expect("rows").iter();
    rows.map(|row| row[key].as_str().expect("a text")).collect()
}

#[test]
fn status_tells_all_that_is_held_and_by_whom() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let table = scene.ctl(&["status"]).expect(0);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("virtlockd "), "{table}");
    assert!(
        lines[0].ends_with("2 locks, 2 owners, 0 lockspaces"),
        "{table}"
    );
    let of = |start: &[&str]| {
        let is_it = |line: &&&str| {
            line.split_whitespace()
                .collect::<Vec<_>>()
                .starts_with(start)
        };
        lines.iter().filter(is_it).count()
    };
    let pid = scene.first.pid().to_string();
    assert_eq!(of(&["first", &pid, "2"]), 1, "{table}");
    assert_eq!(of(&["/run/disk", "exclusive"]), 1, "{table}");
    assert_eq!(of(&["/run/shared", "shared"]), 2, "{table}");

    scene
        .second
        .call(&create_lockspace("/run/space"))
        .expect_ok();
    let lease = acquire("/run/space", "lease", AUTOCREATE);
    scene.second.call(&lease).expect_ok();
    let all = scene.ctl(&["--json", "status"]).json(0);
    assert_eq!(all["daemon"]["pid"], scene.daemon.pid());
    assert_eq!(names(&all["lockspaces"], "path"), ["/run/space"]);
    let paths = ["/run/disk", "/run/shared", "/run/space/lease"];
    assert_eq!(names(&all["resources"], "path"), paths);
    assert_eq!(names(&all["owners"], "domain"), ["first", "second"]);
    assert_eq!(
        names(&all["resources"][1]["owners"], "domain"),
        ["first", "second"]
    );
    assert!(all["resources"][0]["since"].is_string());
    assert!(
        scene
            .ctl(&["status"])
            .expect(0)
            .contains("lockspace /run/space")
    );
}

#[test]
fn status_of_one_guest_takes_its_name_its_uuid_or_its_process() {
    let Some(scene) = Scene::new() else { return };
    let pid = scene.first.pid().to_string();
    for whom in ["first", pid.as_str()] {
        let table = scene.ctl(&["status", whom]).expect(0);
        assert!(
            table.contains("/run/disk") && table.contains("first"),
            "{table}"
        );
        assert!(!table.contains("second"), "{table}");
        let json = scene.ctl(&["status", "--json", whom]).json(0);
        assert_eq!(names(&json["owners"], "domain"), ["first"]);
        assert_eq!(
            names(&json["resources"], "path"),
            ["/run/disk", "/run/shared"]
        );
    }
    // All of this test's owners have the same one.
    let uuid = "10111213-1415-1617-1819-1A1B1C1D1E1F";
    let json = scene.ctl(&["status", "--json", uuid]).json(0);
    assert_eq!(names(&json["owners"], "domain"), ["first", "second"]);
    let nobody = scene.ctl(&["status", "nobody"]);
    assert!(nobody.stderr.contains("no guest 'nobody'"), "{nobody:?}");
    nobody.expect(1);
    assert_eq!(
        scene.ctl(&["--json", "status", "nobody"]).json(1)["owners"],
        json!([])
    );
}

#[test]
fn an_owner_that_shares_with_many_is_listed_with_all_of_them() {
    let Some(scene) = Scene::new() else { return };
    let mut client = scene.daemon.client();
    for number in 0..100u8 {
        let call = Call::Register {
            uuid: [number; 16],
            name: format!("guest{number}").into(),
            id: 5,
            pid: 4_000_000,
            flags: 0,
        };
        client.call(&call).expect_ok();
        client.call(&acquire("", "/run/shared", SHARED)).expect_ok();
    }
    let json = scene.ctl(&["--json", "who", "/run/shared"]).json(0);
    let owners = json["files"][0]["resources"][0]["owners"].as_array();
    assert_eq!(owners.expect("owners").len(), 102);
    let json = scene.ctl(&["--json", "status"]).json(0);
    assert_eq!(json["owners"].as_array().expect("owners").len(), 102);
}

#[test]
fn who_finds_a_disk_by_any_name_of_it() {
    let Some(scene) = Scene::new() else { return };
    let inside = |name: &str| scene.namespace.path(format!("/run/{name}"));
    std::os::unix::fs::symlink("/run/disk", inside("symlink")).expect("make a link");
    std::fs::hard_link(inside("disk"), inside("link")).expect("make a link");
    let holder = format!(
        "by domain 'first' (uuid 10111213-1415-1617-1819-1a1b1c1d1e1f, pid {})",
        scene.first.pid()
    );
    // Its working directory is the root.
    for name in [
        "/run/disk",
        "/run/./disk",
        "run/disk",
        "/run/symlink",
        "/run/link",
    ] {
        let said = scene.ctl(&["who", name]).expect(0);
        let start = format!("{name}: held exclusive since 20");
        assert!(said.starts_with(&start) && said.contains(&holder), "{said}");
        let json = scene.ctl(&["who", "--json", name]).json(0);
        assert_eq!(json["files"][0]["held_by"], "guest");
        assert_eq!(json["files"][0]["resources"][0]["path"], "/run/disk");
    }
    assert_eq!(
        scene.ctl(&["who", "/run/free"]).expect(1),
        "/run/free: free\n"
    );
    let both = scene.ctl(&["who", "/run/free", "/run/shared"]).expect(0);
    assert!(
        both.contains("/run/free: free\n/run/shared: held shared"),
        "{both}"
    );
    let missing = scene.ctl(&["who", "/run/disk", "/run/missing"]).expect(2);
    assert!(
        missing.contains("/run/missing: nobody can tell: No such file"),
        "{missing}"
    );
    // A disk that was removed under its guest's feet is known by its name.
    std::fs::remove_file(inside("disk")).expect("remove it");
    scene.ctl(&["who", "/run/disk"]).expect(0);
}

#[test]
fn who_finds_a_disk_by_the_lease_that_libvirt_has_for_it() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let settings = "auto_disk_leases = 1\nfile_lockspace_dir = \"/run/space\"\n";
    scene
        .first
        .call(&create_lockspace("/run/space"))
        .expect_ok();
    // printf %s /run/free | sha256sum
    let sum = "9da276a7b4b3ad9e47a8c9c9ffc26dba2a7f6a27c72a0bb9d4cbbd1bc9dd8ff2";
    let sum = sha256sum("/run/free").unwrap_or_else(|| sum.to_owned());
    let lease = acquire("/run/space", &sum, AUTOCREATE);
    let namespace = &scene.namespace;
    let session = |words: &[&str]| session(namespace, settings, words);
    session(&["who", "/run/free"]).expect(1);
    scene.first.call(&lease).expect_ok();
    let said = session(&["who", "/run/free"]).expect(0);
    let through = format!("through its lease /run/space/{sum}");
    assert!(
        said.contains("by domain 'first'") && said.contains(&through),
        "{said}"
    );
    // A stranger has the lease.
    scene.first.call(&release("/run/space", &sum)).expect_ok();
    let path = scene.namespace.path(format!("/run/space/{sum}"));
    std::fs::write(&path, b"").expect("make the lease");
    let _foreign = foreign_lock(&path, true);
    let said = session(&["who", "/run/free"]).expect(0);
    let by = format!(
        "by a process that is not virtlockd, pid {}",
        std::process::id()
    );
    assert!(said.contains(&by) && said.contains(&through), "{said}");
    let json = session(&["--json", "who", "/run/free"]).json(0);
    assert_eq!(json["files"][0]["lease"], format!("/run/space/{sum}"));
}

fn sha256sum(text: &str) -> Option<String> {
    use std::io::Write;
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    child.stdin.take()?.write_all(text.as_bytes()).ok()?;
    let output = child.wait_with_output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.split_whitespace().next()?.to_owned())
}

/// A user's session of the namespace, whose settings these are.
fn session(namespace: &Namespace, settings: &str, words: &[&str]) -> Ran {
    let config = namespace.path("/run/config/libvirt");
    std::fs::create_dir_all(&config).expect("make a directory");
    std::fs::write(config.join("qemu-lockd.conf"), settings).expect("write the settings");
    let mut command = namespace.command("env");
    command.args([
        "XDG_CONFIG_HOME=/run/config",
        "XDG_RUNTIME_DIR=/run",
        program(),
    ]);
    crate::run::of(command.arg("--session").args(words))
}

/// A loop device that is given back.
struct LoopDevice<'a>(&'a Namespace, String);

impl<'a> LoopDevice<'a> {
    fn new(namespace: &'a Namespace) -> Option<LoopDevice<'a>> {
        std::fs::write(namespace.path("/run/image"), [0; 4096]).expect("write an image");
        let mut command = namespace.command("losetup");
        let made = crate::run::of(command.args(["-f", "--show", "/run/image"]));
        if made.code != 0 {
            skip("needs a loop device");
            return None;
        }
        Some(LoopDevice(namespace, made.stdout.trim().to_owned()))
    }

    /// Another node of it, and its number as the kernel writes it.
    fn node(&self, path: &str) -> String {
        let number = std::fs::metadata(&self.1).expect("look at it").rdev();
        let (major, minor) = (stat::major(number), stat::minor(number));
        let words = [path, "b", &major.to_string(), &minor.to_string()];
        let mut command = self.0.command("mknod");
        crate::run::of(command.args(words)).expect(0);
        format!("{major}:{minor}")
    }
}

impl Drop for LoopDevice<'_> {
    fn drop(&mut self) {
        let mut command = Command::new("losetup");
        let _ = command.args(["-d", &self.1]).status();
    }
}

#[test]
fn who_finds_a_block_device_by_any_node_of_it() {
    let Some(scene) = Scene::new() else { return };
    let Scene {
        namespace,
        daemon: _daemon,
        mut first,
        ..
    } = scene;
    let Some(device) = LoopDevice::new(&namespace) else {
        return;
    };
    device.node("/run/node");
    assert_eq!(
        ctl(&namespace, &["who", "/run/node"]).expect(1),
        "/run/node: free\n"
    );
    first.call(&acquire("", &device.1, 0)).expect_ok();
    for node in [&device.1, "/run/node"] {
        let said = ctl(&namespace, &["who", node]).expect(0);
        assert!(said.contains("by domain 'first'"), "{said}");
    }
}

#[test]
fn who_finds_a_logical_volume_and_a_scsi_disk_by_libvirts_leases_for_them() {
    let Some(scene) = Scene::new() else { return };
    let Scene {
        namespace,
        daemon: _daemon,
        mut first,
        ..
    } = scene;
    let Some(device) = LoopDevice::new(&namespace) else {
        return;
    };
    let number = device.node("/run/node");
    let run = |script: &str| {
        let mut command = namespace.command("sh");
        crate::run::of(command.args(["-ec", script])).expect(0);
    };
    // The kernel says that it is a logical volume, and udev's program what kind of SCSI disk it is.
    let uuid = "cWlhGM0123456789abcdefghijklmn42";
    run(&format!(
        "mkdir -p /run/sys/{number}/dm /run/scsi /run/volumes
         printf 'LVM-%032d{uuid}\\n' 0 > /run/sys/{number}/dm/uuid
         mount --bind /run/sys /sys/dev/block
         printf '#!/bin/sh\\necho \"id of $*\" | tr \" /\" ___\\n' > /run/scsi_id
         chmod 755 /run/scsi_id
         mount --bind /run/scsi_id /lib/udev/scsi_id"
    ));
    let scsi = "scsi_lockspace_dir = \"/run/scsi\"\n";
    let both = format!("{scsi}lvm_lockspace_dir = \"/run/volumes\"\n");
    let id = format!(
        "id_of_--replace-whitespace_--whitelisted_--device_{}",
        device.1.replace('/', "_")
    );
    let volume = "cWlhGM-0123-4567-89ab-cdef-ghij-klmn42";
    for (settings, lockspace, name) in [
        (both.as_str(), "/run/volumes", volume),
        (scsi, "/run/scsi", &id),
    ] {
        let who = || session(&namespace, settings, &["who", &device.1]);
        who().expect(1);
        first.call(&create_lockspace(lockspace)).expect_ok();
        first
            .call(&acquire(lockspace, name, AUTOCREATE))
            .expect_ok();
        let said = who().expect(0);
        let through = format!("through its lease {lockspace}/{name}");
        assert!(
            said.contains("by domain 'first'") && said.contains(&through),
            "{said}"
        );
        // libvirt does not look at a node elsewhere.
        session(&namespace, settings, &["who", "/run/node"]).expect(1);
        first.call(&release(lockspace, name)).expect_ok();
    }
    // Nobody knows what such a disk is that does not say it.
    run("printf '#!/bin/sh\\nexec sleep 100\\n' > /run/scsi_id");
    let said = session(&namespace, scsi, &["who", &device.1]).expect(2);
    assert!(
        said.contains("the name of its lease cannot be asked for"),
        "{said}"
    );
    // Nor whether a lock protects it in a guest. (Its locks would have nothing that they are for.)
    first.call(&release("", "/run/disk")).expect_ok();
    let guest = "cp /bin/sleep /run/qemu-system-it; exec /run/qemu-system-it 1000 3<>$0";
    let mut command = namespace.command("sh");
    let mut guest = command
        .args(["-ec", guest, &device.1])
        .spawn()
        .expect("start a guest");
    let pid = i64::from(guest.id());
    let comm = format!("/proc/{pid}/comm");
    wait_until(DEADLINE, "the guest to run", || {
        std::fs::read(&comm).is_ok_and(|name| name == b"qemu-system-it\n")
    });
    let audit = session(&namespace, scsi, &["--json", "audit"]);
    guest.kill().expect("end the guest");
    guest.wait().expect("wait for the guest");
    let text = format!("whether a lock protects {} of", device.1);
    assert!(audit.stderr.contains(&text), "{}", audit.stderr);
    let said = schema::check(&audit.stdout);
    // What runs on this machine beside the tests may be unprotected, and comes first.
    let is_empty = |list: &str| said[list].as_array().expect("a list").is_empty();
    let is_all = is_empty("unprotected") && is_empty("idle_locks");
    assert_eq!(audit.code, if is_all { 2 } else { 1 });
    let unknown = &said["unknown"];
    assert!(
        unknown
            .as_array()
            .expect("a list")
            .iter()
            .any(|disk| disk["pid"] == pid),
        "{unknown}"
    );
}

#[test]
fn who_names_a_process_that_is_not_virtlockd_whichever_kind_of_lock_it_has() {
    let Some(scene) = Scene::new() else { return };
    let path = scene.namespace.path("/run/free");
    let own = std::process::id();
    let expected = format!("/run/free: held by a process that is not virtlockd, pid {own}");
    {
        let _lock: ForeignLock = foreign_lock(&path, false);
        let said = scene.ctl(&["who", "/run/free"]).expect(0);
        assert!(said.starts_with(&expected), "{said}");
    }
    let mut python = Command::new("python3")
        .args([
            "-c",
            "import fcntl, sys
file = open(sys.argv[1], 'r+')
fcntl.lockf(file, fcntl.LOCK_EX, 1)
print('locked', flush=True)
sys.stdin.read()",
        ])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start python");
    let mut line = String::new();
    let mut stdout = BufReader::new(python.stdout.take().expect("its output"));
    stdout.read_line(&mut line).expect("read its output");
    let said = scene.ctl(&["who", "/run/free"]).expect(0);
    let expected = format!("pid {} (python3)\n", python.id());
    assert!(said.ends_with(&expected), "{said}");
    let json = scene.ctl(&["who", "--json", "/run/free"]).json(0);
    assert_eq!(json["files"][0]["pid"], python.id());
    drop(python.stdin.take());
    python.wait().expect("its end");
    scene.ctl(&["who", "/run/free"]).expect(1);
}

#[test]
fn events_are_lines_as_they_happen_until_nobody_reads_them() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let mut running = Running::start(&scene.namespace, &["events"]);
    let mut of_some = Running::start(&scene.namespace, &["events", "--json", "--only", "refused"]);
    let (lines, json) = (lines_of(&mut running), lines_of(&mut of_some));
    // They have subscribed when they have told of something.
    let mut probe = scene.daemon.client();
    probe.call(&register_as("probe", 4_000_000)).expect_ok();
    for told in [&lines, &json] {
        wait_until(DEADLINE, "it to have subscribed", || {
            probe
                .call(&acquire("", "/run/disk", 0))
                .expect_error(87, 51);
            told.try_recv().is_ok()
        });
    }
    let next = |told: &Receiver<String>| {
        wait_for(DEADLINE, "a line", || {
            told.try_recv()
                .ok()
                .filter(|line| !line.contains("'probe'") && !line.contains("\"probe\""))
        })
    };
    let second = scene.second.pid();
    let uuid = "10111213-1415-1617-1819-1a1b1c1d1e1f";
    let who = format!("domain 'second' (uuid {uuid}, pid {second})");
    scene.second.call(&acquire("", "/run/free", 0)).expect_ok();
    scene
        .second
        .call(&acquire("", "/run/disk", 0))
        .expect_error(87, 51);
    scene.second.call(&release("", "/run/free")).expect_ok();
    for (word, end) in [
        ("granted", format!("{who} exclusive /run/free")),
        (
            "refused",
            format!("{who} exclusive /run/disk: resource busy: Lockspace resource"),
        ),
        ("released", format!("{who} /run/free")),
    ] {
        let line = next(&lines);
        let (time, rest) = line.split_once(' ').expect("a time");
        assert!(time.starts_with("20") && time.ends_with('Z'), "{line}");
        assert!(rest.starts_with(&format!("{word} {end}")), "{line}");
    }
    let refused = next(&json);
    let refused = schema::check(&refused);
    assert_eq!(
        (refused["event"].as_str(), refused["path"].as_str()),
        (Some("refused"), Some("/run/disk"))
    );
    assert_eq!(refused["owner"]["domain"], "second");
    // Nobody reads any more: it sees that with the next line.
    let mut unread = Running::start(&scene.namespace, &["events"]);
    drop(unread.0.stdout.take());
    wait_until(DEADLINE, "it to end", || {
        probe
            .call(&acquire("", "/run/disk", 0))
            .expect_error(87, 51);
        unread.0.try_wait().expect("look at it").is_some()
    });
    let status = unread.0.wait().expect("its end");
    assert_eq!(status.code(), Some(0));
    // The daemon ends.
    scene.daemon.kill();
    let status = of_some.0.wait().expect("its end");
    assert_eq!(status.code(), Some(2));
}

#[test]
fn metrics_are_openmetrics_text_without_the_name_of_any_disk_or_guest() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene
        .second
        .call(&acquire("", "/run/disk", 0))
        .expect_error(87, 51);
    let text = scene.ctl(&["metrics"]).expect(0);
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut types = std::collections::BTreeMap::new();
    for line in text.lines().take_while(|line| *line != "# EOF") {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words.as_slice() {
            ["#", "TYPE", name, kind] => {
                assert_eq!(types.insert((*name).to_owned(), (*kind).to_owned()), None);
            }
            ["#", "HELP", _, help] => assert!(help.ends_with('.'), "{line}"),
            [sample, value] => {
                let _: u64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
                let name = sample.split('{').next().expect("a name");
                let of = |ending: &str| types.get(name.strip_suffix(ending)?).cloned();
                let kind = types.get(name).cloned();
                // The textfile collector knows no other types.
                let fits =
                    kind.as_deref() == Some("gauge") || of("_total").as_deref() == Some("counter");
                assert!(fits, "{line}");
                assert!(name.starts_with("virtlockd_"), "{line}");
            }
            _ => panic!("{line}"),
        }
    }
    for sample in [
        "virtlockd_up 1",
        "virtlockd_locks 2",
        "virtlockd_locks_granted_total 3",
        "virtlockd_locks_refused_total 1",
        "virtlockd_owners_registered_total 2",
    ] {
        assert!(text.lines().any(|line| line == sample), "{sample}: {text}");
    }
    for name in ["first", "disk", "/run"] {
        assert!(!text.contains(name), "{name}: {text}");
    }
    let json = scene.ctl(&["--json", "metrics"]).json(0);
    assert_eq!(json["counters"]["locks_granted"], 3);
}

#[test]
fn names_of_any_bytes_are_escaped_for_people_and_whole_in_json() {
    let Some(scene) = Scene::new() else { return };
    let disk = b"/run/d\x1b[31m\n\\n\xff\"";
    let path = scene.namespace.path(std::ffi::OsStr::from_bytes(disk));
    std::fs::write(path, b"").expect("make a disk");
    let mut client = scene.daemon.client();
    let name = b"g\x07\xe2\x80\xae\xc2\x9b\xfe".to_vec();
    client
        .call(&Call::Register {
            uuid: [0xee; 16],
            name: name.clone(),
            id: 9,
            pid: 4_000_000,
            flags: 0,
        })
        .expect_ok();
    client
        .call(&Call::Acquire {
            path: vec![],
            name: disk.to_vec(),
            flags: 0,
        })
        .expect_ok();
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let table = scene.ctl(&["status"]).expect(0);
    assert!(
        table.contains("/run/d\\u{1b}[31m\\u{a}\\\\n\\xff\""),
        "{table}"
    );
    assert!(table.contains("g\\u{7}\\u{202e}\\u{9b}\\xfe"), "{table}");
    assert!(!table.contains('\u{1b}') && !table.contains('\u{202e}'));
    let whom = std::ffi::OsStr::from_bytes(&name);
    let words = [std::ffi::OsStr::new("--json"), "status".as_ref(), whom];
    let said = ctl(&scene.namespace, &words);
    assert!(said.stdout.contains("\\u202e\\u009b"), "{said:?}");
    assert!(!said.stdout.contains(['\u{9b}', '\u{202e}']), "{said:?}");
    let json = said.json(0);
    let lossy = String::from_utf8_lossy(&name);
    assert_eq!(json["owners"][0]["domain"], *lossy);
    assert_eq!(json["owners"][0]["domain_hex"], hex(&name));
    assert_eq!(json["resources"][0]["path_hex"], hex(disk));
    let words = ["who".as_ref(), std::ffi::OsStr::from_bytes(disk)];
    assert!(
        ctl(&scene.namespace, &words)
            .expect(0)
            .starts_with("/run/d\\u{1b}")
    );
}

#[test]
fn thousands_of_locks_are_all_listed_while_the_daemon_is_replaced() {
    let Some(scene) = Scene::new() else { return };
    let mut client = scene.daemon.client();
    client.call(&register_as("many", 4_000_000)).expect_ok();
    for number in 0..2000 {
        let disk = format!("/run/many{number}");
        std::fs::write(scene.namespace.path(&disk), b"").expect("make a disk");
        client.call(&acquire("", &disk, 0)).expect_ok();
    }
    let all = scene.ctl(&["--json", "status", "many"]).json(0);
    assert_eq!(all["resources"].as_array().expect("rows").len(), 2000);
    for _ in 0..3 {
        scene.daemon.signal(nix::sys::signal::Signal::SIGUSR1);
        let all = scene.ctl(&["--json", "status"]).json(0);
        assert_eq!(all["resources"].as_array().expect("rows").len(), 2002);
    }
}
