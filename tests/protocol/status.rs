//! The status program, which libvirt's daemon does not have: what is held and by whom, also while that
//! changes; how often what happened; and what happens, as it happens.

use crate::support;
use crate::support::client::{
    AUTOCREATE, CALL, Call, Client, SHARED, acquire, create_lockspace, frame, register_as, release,
};
use crate::support::daemon::{Daemon, program};
use crate::support::namespace::Namespace;
use crate::support::owner::{OnTerm, Owner};
use crate::support::scene::Scene;
use crate::support::status::{self, Status, now_ms};
use crate::support::{DEADLINE, skip, wait_until};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

struct Host {
    namespace: Namespace,
    daemon: Daemon,
}

impl Host {
    fn new() -> Option<Host> {
        if !support::require_root() {
            return None;
        }
        if program().starts_with("/usr") {
            skip("libvirt's daemon has no status program");
            return None;
        }
        let namespace = Namespace::new();
        let daemon = Daemon::start(&namespace, &[], &[]);
        Some(Host { namespace, daemon })
    }

    fn disk(&self, name: &str) -> String {
        let inside = format!("/run/{name}");
        std::fs::write(self.namespace.path(&inside), b"").expect("make a disk");
        inside
    }

    fn owner(&self, name: &str) -> Owner {
        Owner::register(self.daemon.lock_socket(), name, OnTerm::Die)
    }
}

fn domain(name: &str, number: u32, pid: u32) -> Call {
    let mut uuid = [0; 16];
    uuid[..4].copy_from_slice(&number.to_be_bytes());
    Call::Register {
        uuid,
        name: name.into(),
        id: number + 1,
        pid,
        flags: 0,
    }
}

#[test]
fn what_is_held_is_listed_with_who_holds_it_and_since_when() {
    let Some(host) = Host::new() else { return };
    let before = now_ms();
    let (disk, shared) = (host.disk("disk"), host.disk("shared"));
    let (mut first, mut second) = (host.owner("first"), host.owner("second"));
    let idle = host.owner("idle");
    first.call(&create_lockspace("/run/space")).expect_ok();
    first.call(&acquire("", &disk, 0)).expect_ok();
    for owner in [&mut first, &mut second] {
        owner.call(&acquire("", &shared, SHARED)).expect_ok();
    }
    second.call(&acquire("", &shared, SHARED)).expect_ok();
    let file = acquire("/run/space", "file", AUTOCREATE);
    second.call(&file).expect_ok();
    let after = now_ms();

    let mut status = Status::of(&host.daemon);
    let daemon = status.daemon();
    assert_eq!(daemon.version, env!("CARGO_PKG_VERSION"));
    assert_eq!((daemon.pid, daemon.resources), (host.daemon.pid(), 3));
    assert_eq!((daemon.lockspaces, daemon.admin_clients), (1, 1));
    assert!(daemon.serves_since <= before && after <= daemon.now);
    assert_eq!(status.lockspaces(), ["/run/space"]);

    let all = status.resources();
    assert_eq!(all.len(), 3);
    for held in &all {
        assert!((before..=after).contains(&held.since), "{held:?}");
        let path = match held.lockspace.as_str() {
            "" => held.name.clone(),
            directory => format!("{directory}/{}", held.name),
        };
        let seen = std::fs::metadata(host.namespace.path(&path)).expect("look at it");
        assert_eq!((held.device, held.inode), (seen.dev(), seen.ino()));
        assert_eq!(
            status.file(held.device, held.inode).as_slice(),
            std::slice::from_ref(held)
        );
        let again = status.resource(&held.lockspace, &held.name);
        assert_eq!(again.as_ref(), Some(held));
    }
    let who = |name: &str| -> Vec<(i32, String, u32)> {
        let held = all.iter().find(|held| held.name == name).unwrap();
        assert_eq!(held.count as usize, held.holders.len());
        let mut who: Vec<_> = held
            .holders
            .iter()
            .map(|(owner, times)| {
                assert_eq!(owner.standing, status::CONNECTED);
                (owner.pid, owner.name.clone(), *times)
            })
            .collect();
        who.sort_by_key(|(_, name, _)| name.clone());
        who
    };
    let is = |owner: &Owner, name: &str, times| (owner.pid(), name.to_owned(), times);
    assert_eq!(who(&disk), [is(&first, "first", 1)]);
    let both = [is(&first, "first", 1), is(&second, "second", 2)];
    assert_eq!(who(&shared), both);
    assert_eq!(who("file"), [is(&second, "second", 1)]);
    let modes: Vec<bool> = all.iter().map(|held| held.shared).collect();
    assert_eq!(modes.iter().filter(|shared| **shared).count(), 1);

    let owners = status.owners();
    let mut owners: Vec<_> = owners
        .into_iter()
        .map(|owner| {
            assert!((before..=after).contains(&owner.since), "{owner:?}");
            (owner.pid, owner.name, owner.held)
        })
        .collect();
    owners.sort_by_key(|(_, name, _)| name.clone());
    let expected = [
        is(&first, "first", 2),
        is(&idle, "idle", 0),
        is(&second, "second", 2),
    ];
    assert_eq!(owners, expected);

    assert_eq!(status.resource("", "/run/no"), None);
    assert_eq!(status.file(1, 1), []);
}

#[test]
fn an_owner_that_others_speak_for_is_listed_with_what_it_holds_and_how_it_is_watched() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk("disk");
    let mut libvirtd = host.daemon.client();
    let mut process = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("start a process");
    libvirtd.call(&domain("guest", 1, process.id())).expect_ok();
    libvirtd.call(&acquire("", &disk, 0)).expect_ok();
    let mut status = Status::of(&host.daemon);
    let held = status.resource("", &disk).expect("it is held");
    let (owner, times) = &held.holders[0];
    assert_eq!((owner.pid.cast_unsigned(), *times), (process.id(), 1));
    assert_eq!((owner.name.as_str(), owner.id), ("guest", 2));
    assert_eq!(owner.standing, status::WATCHED);
    assert_eq!(status.owners(), [], "it has no connection");
    process.kill().expect("kill it");
    process.wait().expect("reap it");
}

#[test]
fn a_list_is_whole_while_others_come_and_go() {
    let Some(host) = Host::new() else { return };
    let disks = |kind: &str| -> Vec<String> {
        let disks = (0..300).map(|number| host.disk(&format!("{kind}{number}")));
        disks.collect()
    };
    let (staying, passing) = (disks("staying"), disks("passing"));
    let mut client = host.daemon.client();
    client.call(&register_as("guest", 4242)).expect_ok();
    for (stays, passes) in staying.iter().zip(&passing) {
        client.call(&acquire("", stays, 0)).expect_ok();
        client.call(&acquire("", passes, 0)).expect_ok();
    }
    let mut status = Status::of(&host.daemon);
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut is_held = true;
    let (mut next, mut pages) = (None, 0);
    loop {
        let (rows, behind) = status.resources_page(next);
        pages += 1;
        for row in rows {
            *seen.entry(row.name).or_default() += 1;
        }
        // All that does not stay goes, or comes again, at places that others had.
        for disk in passing.iter().rev() {
            let call = if is_held {
                release("", disk)
            } else {
                acquire("", disk, 0)
            };
            client.call(&call).expect_ok();
        }
        is_held = !is_held;
        next = behind;
        if next.is_none() {
            break;
        }
    }
    assert!(pages > 4, "{pages}");
    for disk in &staying {
        assert_eq!(seen.get(disk), Some(&1), "{disk}");
    }
}

#[test]
fn those_who_hold_a_shared_resource_come_in_pages_of_their_own() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk("disk");
    let mut client = host.daemon.client();
    for number in 0..200 {
        client.call(&domain("guest", number, 4_000_000)).expect_ok();
        client.call(&acquire("", &disk, SHARED)).expect_ok();
    }
    let mut status = Status::of(&host.daemon);
    let held = status.resource("", &disk).expect("it is held");
    assert_eq!((held.count, held.holders.len()), (200, 8));
    let (holders, pages) = status.holders("", &disk);
    assert!(pages > 3, "{pages}");
    let ids: Vec<u32> = holders.iter().map(|(owner, _)| owner.id).collect();
    assert_eq!(ids, (1..=200).collect::<Vec<_>>());
    assert_eq!(status.holders("", "/run/no"), (vec![], 1));
}

#[test]
fn what_happens_is_counted() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk("disk");
    let mut status = Status::of(&host.daemon);
    let before = status.counters();
    let mut owner = host.owner("guest");
    owner.call(&acquire("", &disk, 0)).expect_ok();
    owner.call(&acquire("", &disk, 0)).expect_error(87, 51);
    owner.call(&release("", &disk)).expect_ok();
    owner.call(&acquire("", &disk, 0)).expect_ok();
    owner.close_connection();
    owner.wait_end();
    let more = |status: &mut Status, name: &str| {
        let now = status.counters();
        now[name] - before[name]
    };
    wait_until(DEADLINE, "the owner's death to be counted", || {
        more(&mut status, "owners_died") == 1
    });
    for (name, expected) in [
        ("connections", 1),
        ("owners_registered", 1),
        ("locks_granted", 2),
        ("locks_released", 1),
        ("locks_refused", 1),
        ("owners_fenced", 1),
        ("owners_killed", 0),
        ("upgrades", 0),
        ("recoveries", 0),
    ] {
        assert_eq!(more(&mut status, name), expected, "{name}");
    }
}

#[test]
fn whoever_subscribes_is_told_of_what_happens_as_it_happens() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk("disk");
    let mut status = Status::of(&host.daemon);
    let mut choosy = Status::of(&host.daemon);
    status.subscribe(status::ALL);
    choosy.subscribe(1 << status::REFUSED);
    let before = now_ms();
    let mut owner = host.owner("guest");
    owner.call(&acquire("", &disk, 0)).expect_ok();
    let mut other = host.daemon.client();
    other.call(&register_as("other", 4242)).expect_ok();
    other.call(&acquire("", &disk, SHARED)).expect_error(87, 51);
    owner.close_connection();
    let who = (owner.pid(), "guest".to_owned());
    let expected = [
        (status::REGISTERED, Some(who.clone()), "", 0),
        (status::GRANTED, Some(who.clone()), disk.as_str(), 1),
        (status::REFUSED, Some((4242, "other".into())), &disk, 2),
        (status::FENCED, Some(who.clone()), "", 0),
        (status::DIED, Some(who.clone()), "", 0),
    ];
    for (kind, owner, name, mode) in expected {
        let told = status.next();
        assert_eq!((told.kind, told.count), (kind, 1), "{told:?}");
        assert_eq!(
            (&told.owner, told.name.as_str(), told.mode),
            (&owner, name, mode)
        );
        assert!((before..=now_ms()).contains(&told.at), "{told:?}");
        if kind == status::REFUSED {
            let holder = format!(
                "by domain 'guest' (uuid 10111213-1415-1617-1819-1a1b1c1d1e1f, pid {})",
                who.0
            );
            assert!(told.text.contains(&holder), "{told:?}");
            assert_eq!(choosy.next(), told);
        }
    }
    status.expect_silence();
    choosy.expect_silence();
    // Calls are answered in between, and nothing comes when it is over.
    other.call(&acquire("", &disk, 0)).expect_ok();
    assert_eq!(status.daemon().resources, 1);
    assert_eq!(status.next().kind, status::GRANTED);
    status.subscribe(0);
    other.call(&release("", &disk)).expect_ok();
    status.expect_silence();
}

#[test]
fn a_subscriber_who_reads_nothing_costs_little_and_is_told_how_much_it_missed() {
    if program().starts_with("/usr") || !support::require_root() {
        return;
    }
    let mut scene = Scene::new();
    let disk = "/run/disk-of-many-changes";
    std::fs::write(scene.namespace.path(disk), b"").expect("make a disk");
    let mut status = Status::of(&scene.daemon);
    status.subscribe(1 << status::GRANTED | 1 << status::RELEASED);
    let mut client = scene.daemon.client();
    client.call(&register_as("guest", 4242)).expect_ok();
    let calls = [acquire("", disk, 0), release("", disk)];
    let before = scene.daemon.memory_kib("VmRSS");
    // Far more than its socket holds and the daemon keeps.
    for _ in 0..10_000 {
        for reply in client.pipeline(&calls) {
            reply.expect_ok();
        }
    }
    let after = scene.daemon.memory_kib("VmRSS");
    support::assert_memory(after < before + 6 * 1024, || {
        format!("{before} KiB before, {after} KiB after")
    });
    scene.check_bystander();
    let (mut told, mut missed) = (0, 0);
    while told + missed < 20_000 {
        let next = status.next();
        if next.kind == status::MISSED {
            missed += next.count;
        } else {
            told += 1;
        }
    }
    assert!(missed > 0 && told > 100, "{told} told, {missed} missed");
    assert_eq!(told + missed, 20_000);
    assert_eq!(status.counters()["events_missed"], missed);
    status.expect_silence();
}

#[test]
fn there_are_only_so_many_subscribers() {
    let Some(host) = Host::new() else { return };
    let mut all: Vec<Status> = (0..32).map(|_| Status::of(&host.daemon)).collect();
    all.iter_mut().for_each(|one| one.subscribe(status::ALL));
    let mut late = Status::of(&host.daemon);
    let refused = late.call(status::SUBSCRIBE, &status::ALL.to_be_bytes(), 0);
    let text = refused.expect_error(55, 62);
    assert!(text.contains("32 subscribers"), "{text}");
    all[3].subscribe(0);
    late.subscribe(status::ALL);
    // One that ends leaves its place.
    drop(all.pop());
    wait_until(DEADLINE, "a place for another one", || {
        let kinds = status::ALL.to_be_bytes();
        all[3].call(status::SUBSCRIBE, &kinds, 0).is_ok()
    });
}

#[test]
fn what_is_wrong_with_a_status_call_is_said_as_libvirts_programs_say_it() {
    let Some(host) = Host::new() else { return };
    let mut status = Status::of(&host.daemon);
    let flags = status.call(status::RESOURCES, &[0; 16], 4);
    let text = flags.expect_error(8, 62);
    assert_eq!(text, "unsupported flags (0x4) in function statusResources");
    let unknown = status.call(status::SUBSCRIBE, &[0, 0, 4, 0], 0);
    let text = unknown.expect_error(8, 62);
    assert_eq!(
        text,
        "unsupported flags (0x400) in function statusSubscribe"
    );
    let stale = status.call(status::OWNERS, &[1; 16], 0);
    assert!(stale.expect_error(55, 62).contains("begin anew"));
    let text = status.call(77, &[], 0);
    assert_eq!(text.expect_error(39, 7), "unknown procedure: 77");
    status.client.send(&frame(
        status::PROGRAM,
        1,
        status::OWNERS,
        CALL,
        7,
        0,
        b"\0\0\0",
    ));
    let cut = support::client::Reply::parse(&status.client.receive());
    assert_eq!(cut.expect_error(39, 7), "Unable to decode message payload");
    // Another version, and the lock socket, know nothing of it.
    let program = status::PROGRAM;
    let mut lock = Client::connect(host.daemon.lock_socket());
    for (client, version) in [(&mut status.client, 2), (&mut lock, 1)] {
        client.send(&frame(program, version, 1, CALL, 7, 0, &[0; 4]));
        let refused = support::client::Reply::parse(&client.receive());
        let expected = format!("Cannot find program {program} version {version}");
        assert_eq!(refused.expect_error(39, 7), expected);
    }
}
