//! Saved state: what was written once is read for ever, what is damaged is refused, and any state
//! comes back as it was, from the ledger and from libvirt's document.
//!
//! The ledgers in `tests/restart/ledgers/` are of the format in their names. They are never made anew; a
//! new format gets new files (run the ignored test that makes them).

mod plain;

use plain::{Plain, PlainClient, PlainResource};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use virtlockd::custody::clients::{Arrival, Standing, Traffic};
use virtlockd::custody::descriptor::{Number, Saved};
use virtlockd::custody::earlier;
use virtlockd::custody::event::{Event, Here, KindRecord, OwnerRecord, ResourceName};
use virtlockd::custody::fences::{Fence, Stage, Watched};
use virtlockd::custody::ledger::{self, Ledger, Unreadable};
use virtlockd::custody::servers::{Listening, Server, Service};
use virtlockd::custody::settings::{LogSettings, Settings};
use virtlockd::custody::state::State;
use virtlockd::host::clock::Moment;
use virtlockd::host::file::FileIdentity;
use virtlockd::host::process::Life;
use virtlockd::host::stream::Peer;
use virtlockd::locks::table::{Mode, Owner};
use virtlockd::restart::libvirt_json::{self, Unusable};

/// Bytes in front of the events.
const HEADER: usize = 320;
/// The same of formats 3 and 4, which had no counts.
const HEADER_WITHOUT_COUNTS: usize = 64;
/// The same up to format 2.
const OLD_HEADER: usize = 32;
/// Where the header says which extent counts, and where the two are.
const WHICH_AT: usize = 16;
const EXTENTS_AT: [usize; 2] = [32, 48];
/// A page of memory, or a part of one.
const PAGE: usize = 4096;

fn saved(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/restart/ledgers")
        .join(name)
}

fn read_saved(name: &str) -> Vec<u8> {
    let path = saved(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

fn owner(pid: i32, name: &[u8]) -> Owner {
    Owner {
        pid,
        id: pid.cast_unsigned() + 1,
        name: name.into(),
        uuid: std::array::from_fn(|position| 0x10 + position as u8),
    }
}

fn client(descriptor: i32, server: Service, id: u64) -> PlainClient {
    PlainClient {
        descriptor,
        arrival: Arrival {
            server,
            id,
            peer: Some(Peer {
                pid: 4000 + descriptor,
                uid: 0,
                gid: 107,
            }),
            start_time: None,
            connected_at: 1_795_325_634,
            refused: false,
        },
        standing: Standing::Served,
        has_called: true,
        owner: None,
        registered_at: 0,
        wanted: 0,
        life: None,
        restricted: false,
        traffic: Traffic::default(),
    }
}

fn resource(lockspace: &[u8], name: &[u8], descriptor: i32) -> PlainResource {
    PlainResource {
        lockspace: lockspace.to_vec(),
        name: name.to_vec(),
        descriptor,
        identity: FileIdentity {
            device: 0xfd00,
            inode: 1 << 40,
        },
        mode: Mode::Exclusive,
        autocreate: false,
        created: false,
        kind: KindRecord::OpenFile,
        since: 0,
        parked: vec![],
        holders: vec![(owner(4010, b"guest"), 1)],
    }
}

/// A state with at least one of everything that format 1 has words for.
fn everything_of_format_1() -> Plain {
    let [first, second] = [owner(4010, b"guest"), owner(4011, b"caf\xe9 \0\"\\\xff")];
    let listener = |server, descriptor, path: Option<&str>| Listening {
        server,
        socket: Number(descriptor),
        path: path.map(|path| path.as_bytes().to_vec()),
    };
    let refused = client(13, Service::Lock, 76);
    let unseen = client(14, Service::Admin, 2);
    Plain {
        lock_server: Server {
            limit: 10_000,
            unauthenticated_limit: 1024,
            configured: Some(5000),
            next_id: 77,
            workers: [1, 2, 3],
        },
        admin_server: Server {
            limit: 5000,
            unauthenticated_limit: 5000,
            configured: None,
            next_id: 3,
            workers: [0; 3],
        },
        listeners: vec![
            listener(Service::Lock, 4, Some("/run/libvirt/virtlockd-sock")),
            listener(Service::Admin, 5, None),
        ],
        clients: vec![
            PlainClient {
                owner: Some(first.clone()),
                restricted: true,
                ..client(10, Service::Lock, 1)
            },
            PlainClient {
                owner: Some(second.clone()),
                traffic: Traffic {
                    pending: b"half a call".to_vec(),
                    descriptors_at_end: true,
                    arrived: 2,
                    unsent: b"half a reply".to_vec(),
                    closing: false,
                },
                ..client(11, Service::Lock, 2)
            },
            PlainClient {
                has_called: false,
                ..client(12, Service::Lock, 3)
            },
            PlainClient {
                has_called: false,
                standing: Standing::Refused,
                arrival: Arrival {
                    refused: true,
                    start_time: NonZeroU64::new(123_456),
                    ..refused.arrival
                },
                ..refused
            },
            PlainClient {
                arrival: Arrival {
                    peer: None,
                    ..unseen.arrival
                },
                traffic: Traffic {
                    closing: true,
                    ..Traffic::default()
                },
                ..unseen
            },
        ],
        lockspaces: vec![b"/var/lib/libvirt/lockd/files".to_vec()],
        resources: vec![
            resource(b"", b"/srv/disk1.img", 20),
            PlainResource {
                mode: Mode::Shared,
                kind: KindRecord::Process,
                parked: vec![30, 31],
                holders: vec![(first, 2), (second.clone(), 1)],
                ..resource(b"", b"/srv/\xff\xfe", 21)
            },
            PlainResource {
                autocreate: true,
                created: true,
                kind: KindRecord::Unknown,
                holders: vec![(second, 1)],
                ..resource(b"/var/lib/libvirt/lockd/files", b"0a1b2c", 22)
            },
        ],
        fences: vec![
            Fence {
                pid: 4012,
                process: Number(40),
                stage: Stage::Asked,
                next_step: Moment(1_600_000_000),
            },
            Fence {
                pid: 4013,
                process: Number(41),
                stage: Stage::Killed,
                next_step: Moment(u64::MAX),
            },
        ],
        settings: Settings {
            pid_file: Some((6, b"/run/virtlockd.pid".to_vec())),
            config_file: Some(b"/etc/libvirt/virtlockd.conf".to_vec()),
            program: b"/usr/sbin/virtlockd".to_vec(),
            idle_timeout_s: 120,
            logging: LogSettings {
                level: 3,
                filters: "1:util 4:+rpc".into(),
                outputs: "1:file:/var/log/virtlockd.log".into(),
                default_output: "1:journald".into(),
            },
        },
        ..Plain::default()
    }
}

/// A state with at least one of everything.
fn everything() -> Plain {
    let mut all = everything_of_format_4();
    all.clients[0].registered_at = 1_795_325_634_567;
    all.clients[4].wanted = 0x3ff;
    for (resource, since) in all
        .resources
        .iter_mut()
        .zip([1_795_325_634_568, 0, 1, u64::MAX])
    {
        resource.since = since;
    }
    all
}

/// A state with at least one of everything that format 4 has words for.
fn everything_of_format_4() -> Plain {
    let mut all = everything_of_format_3();
    all.here = Some(Here {
        boot: Some([0xb0; 16]),
        namespace: Some(4_026_531_836),
    });
    all.clients[0].life = Some(Life::Inode(5_000_000_000));
    all.clients[1].life = Some(Life::Start(123_456));
    all.lives = vec![
        (4012, Life::Inode(5_000_000_001)),
        (4014, Life::Start(123_457)),
    ];
    all
}

/// A state with at least one of everything that format 3 has words for.
fn everything_of_format_3() -> Plain {
    let mut all = everything_of_format_1();
    all.clients.push(PlainClient {
        standing: Standing::Over,
        owner: Some(owner(4016, b"leaving")),
        ..client(15, Service::Lock, 70)
    });
    let left = |name: &[u8], descriptor| PlainResource {
        holders: vec![],
        ..resource(b"", name, descriptor)
    };
    all.estates = vec![
        (
            4016,
            vec![
                PlainResource {
                    mode: Mode::Shared,
                    kind: KindRecord::Process,
                    parked: vec![32],
                    ..left(b"/srv/left", 23)
                },
                PlainResource {
                    autocreate: true,
                    created: true,
                    ..left(b"/srv/made", 24)
                },
            ],
        ),
        // The number of a process is given again, and so is the name of what it left.
        (4016, vec![left(b"/srv/left", 25)]),
    ];
    // Somebody else has it by now.
    all.resources.push(resource(b"", b"/srv/made", 26));
    all.watched = vec![
        Watched {
            pid: 4014,
            process: Some(Number(42)),
        },
        Watched {
            pid: 4015,
            process: None,
        },
    ];
    all.unreachable = vec![4017];
    all.poll = Some(Number(7));
    all
}

/// What a ledger says of it that is still written, or of which nobody knows whether somebody went on from it
/// since: that one has the poll, or closed it.
fn still_written(mut all: Plain) -> Plain {
    all.poll = None;
    all.sorted()
}

fn sorted(state: &State<Saved>) -> Plain {
    Plain::of(state).sorted()
}

/// A ledger that says a state and nothing else.
fn ledger_of(state: &State<Saved>) -> Ledger {
    let mut ledger = Ledger::new().expect("memory for a ledger");
    ledger.rewrite(state.entries()).expect("write it");
    ledger
}

fn closed_ledger(state: &State<Saved>) -> Vec<u8> {
    let mut ledger = ledger_of(state);
    ledger.close();
    ledger.content().to_vec()
}

/// What a ledger says.
fn said(ledger: &Ledger) -> Plain {
    let content = ledger::replay(ledger.content()).expect("read it");
    let read = ledger.replay().expect("read what lies in memory");
    assert_eq!(sorted(&read), sorted(&content));
    if let Ok(descriptor) = ledger.descriptor() {
        let file = ledger::load(descriptor).expect("read the file");
        assert_eq!(sorted(&file), sorted(&content));
    }
    sorted(&content)
}

/// What a file of memory is: its descriptor, its number, its length and what it takes, bytes.
fn file(ledger: &Ledger) -> (i32, u64, usize, usize) {
    let descriptor = ledger.descriptor().expect("a memory file");
    let seen = nix::sys::stat::fstat(descriptor).expect("look at the ledger");
    let number = |number: i64| usize::try_from(number).expect("a small number");
    let (length, taken) = (number(seen.st_size), number(seen.st_blocks) * 512);
    (descriptor.as_raw_fd(), seen.st_ino, length, taken)
}

fn append(ledger: &mut Ledger, count: usize) {
    for _ in 0..count {
        ledger.append(&Event::IdleTimeout(60)).expect("append");
    }
}

#[test]
fn a_small_ledger_is_written_anew_in_its_file_and_a_large_one_is_given_back() {
    let mut ledger = Ledger::new().expect("make a ledger");
    append(&mut ledger, 50_000);
    ledger.lose();
    let (descriptor, inode, ..) = file(&ledger);
    let is_the_same = |ledger: &Ledger| {
        let now = file(ledger);
        assert_eq!((now.0, now.1), (descriptor, inode));
    };
    let expected = still_written(everything());
    let state = everything().state();
    ledger.rewrite(state.entries()).expect("write it anew");
    is_the_same(&ledger);
    assert_eq!(said(&ledger), expected);
    assert!(!ledger.is_stale() && !ledger.wants_compaction());
    // What it said before is gone for good, also for what is appended now.
    append(&mut ledger, 1);
    assert_eq!(said(&ledger).settings.idle_timeout_s, 60);

    append(&mut ledger, 600_000);
    assert!(file(&ledger).2 > 1_100_000);
    ledger.rewrite(state.entries()).expect("write it anew");
    let (.., length, taken) = file(&ledger);
    assert!(length < 100_000 && taken < 100_000, "{length}, {taken}");
    assert_eq!(said(&ledger), expected);
    is_the_same(&ledger);
}

#[test]
fn a_small_ledger_that_grows_long_again_and_again_keeps_its_pages() {
    let state = everything().state();
    let mut ledger = Ledger::new().expect("make a ledger");
    let mut again = || {
        append(&mut ledger, 35_000);
        let long = file(&ledger);
        ledger.rewrite(state.entries()).expect("write it anew");
        assert_eq!(said(&ledger), still_written(everything()));
        assert_eq!(file(&ledger), long, "pages went");
        long
    };
    // In front of what counts and behind it: then there are pages for both.
    again();
    let (.., taken) = again();
    for _ in 0..4 {
        assert_eq!(again().3, taken, "pages came");
    }
}

#[test]
fn the_memory_of_a_large_ledger_comes_back_and_can_be_written_again() {
    let expected = still_written(everything());
    let state = everything().state();
    let mut ledger = Ledger::new().expect("make a ledger");
    for _ in 0..3 {
        append(&mut ledger, 600_000);
        assert!(file(&ledger).3 > 1_100_000);
        // Behind what counted, whose memory goes; then in front of it, and the file ends there.
        ledger.rewrite(state.entries()).expect("write it anew");
        let (.., taken) = file(&ledger);
        assert!(taken < 200_000 && ledger.size() < 200_000, "{taken} bytes");
        assert_eq!(said(&ledger), expected);
        // Nor does it come back to whoever goes on with it.
        ledger.close();
        let witness = ledger.descriptor().expect("a memory file");
        let witness = witness.try_clone().expect("a descriptor of our own");
        let passed_on = witness.try_clone().expect("a descriptor of our own");
        let (_, taken_over) = Ledger::take_over(passed_on).expect("take it over");
        ledger = taken_over.expect("one of the present format");
        assert!(file(&ledger).3 < 200_000);
        // A page that cannot be had is an error of the rewrite, not a signal: all are there before the
        // first is written.
        let filled = state.entries().inspect(|_| {
            let seen = nix::sys::stat::fstat(&witness).expect("look at the ledger");
            assert!(seen.st_blocks * 512 > 1_100_000);
        });
        ledger.rewrite(filled).expect("write it anew");
        let (.., length, taken) = file(&ledger);
        assert!(length < 100_000 && taken < 100_000, "{length}, {taken}");
        assert_eq!(said(&ledger), expected);
        append(&mut ledger, 1);
        assert_eq!(said(&ledger).settings.idle_timeout_s, 60);
    }
}

#[test]
fn a_ledger_has_one_descriptor_for_its_life_also_when_it_is_passed_on() {
    let state = everything().state();
    let mut ledger = ledger_of(&state);
    let (descriptor, inode, ..) = file(&ledger);
    for _ in 0..3 {
        append(&mut ledger, 100_000);
        ledger.rewrite(state.entries()).expect("write it anew");
        ledger.close();
        let passed_on = ledger.descriptor().expect("a memory file");
        let passed_on = passed_on.try_clone().expect("a descriptor of our own");
        let number = passed_on.as_raw_fd();
        let (read, taken_over) = Ledger::take_over(passed_on).expect("take it over");
        assert_eq!(sorted(&read), everything().sorted());
        let mut taken_over = taken_over.expect("one of the present format");
        let now = file(&taken_over);
        assert_eq!((now.0, now.1), (number, inode));
        append(&mut taken_over, 100_000);
        taken_over.rewrite(state.entries()).expect("write it anew");
        assert_eq!(said(&taken_over), still_written(everything()));
        // The first one looks at the same file and goes on for itself.
        drop(taken_over);
        ledger = Ledger::take_over(
            ledger
                .descriptor()
                .expect("a memory file")
                .try_clone()
                .expect("a descriptor of our own"),
        )
        .expect("take it over")
        .1
        .expect("one of the present format");
        assert_eq!(file(&ledger).1, inode);
    }
    assert!(descriptor >= 0);
}

#[test]
fn a_ledger_in_the_process_s_own_memory_is_written_anew_as_well() {
    let refusal = virtlockd::host::refusal::Refusal::of("no memory file, says the test");
    let refusal = refusal(virtlockd::host::errno::Errno::EACCES);
    let mut ledger = Ledger::private(refusal).expect("memory for a ledger");
    assert!(ledger.descriptor().is_err());
    let state = everything().state();
    for _ in 0..5 {
        append(&mut ledger, 100_000);
        ledger.rewrite(state.entries()).expect("write it anew");
        assert_eq!(said(&ledger), still_written(everything()));
    }
}

/// Where a ledger's bytes have the events that count, and which extent that is.
fn counts(content: &[u8]) -> (usize, Range<usize>) {
    let word = |at: usize| {
        let word = content[at..].first_chunk().expect("a word");
        usize::try_from(u64::from_le_bytes(*word)).expect("a small number")
    };
    let which = word(WHICH_AT);
    let at = EXTENTS_AT[which];
    (which, word(at)..word(at) + word(at + 8))
}

/// The words of the header in the order in which a rewrite stores them: with each of them the ledger
/// says either what it said or what it says now, and the last one decides.
fn is_whole_at_each_word(before: &[u8], after: &[u8], old: &Plain, new: &Plain) {
    let (_, live) = counts(before);
    let (which, fresh) = counts(after);
    assert!(fresh.end <= live.start || live.end <= fresh.start);
    let mut content = before.to_vec();
    content.resize(before.len().max(after.len()), 0);
    let replayed = |content: &[u8]| sorted(&ledger::replay(content).expect("a whole state"));
    // The events, cut at any point.
    for at in fresh.clone().step_by(97).chain([fresh.end]) {
        content[fresh.start..at].copy_from_slice(&after[fresh.start..at]);
        assert_eq!(replayed(&content), *old);
    }
    let at = EXTENTS_AT[which];
    for word in [at, at + 8] {
        content[word..word + 8].copy_from_slice(&after[word..word + 8]);
        assert_eq!(replayed(&content), *old);
    }
    content[WHICH_AT..WHICH_AT + 8].copy_from_slice(&after[WHICH_AT..WHICH_AT + 8]);
    assert_eq!(replayed(&content), *new);
    // Of what counted no byte has changed, but for whole pages that were given back.
    for position in live {
        let page = position / PAGE * PAGE;
        let page = after.get(page..page + PAGE);
        let is_given_back = page.is_none_or(|page| page.iter().all(|byte| *byte == 0));
        let is_kept = after.get(position) == Some(&before[position]);
        assert!(is_kept || is_given_back, "byte {position}");
    }
}

/// All bytes of the ledger's file.
fn bytes_of(descriptor: &OwnedFd) -> Vec<u8> {
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    std::fs::read(path).expect("read the ledger's file")
}

#[test]
fn a_rewrite_that_is_cut_short_at_any_point_leaves_one_whole_state() {
    let old = still_written(everything());
    let mut new = everything();
    new.resources.truncate(1);
    new.settings.idle_timeout_s = 7;
    let new = still_written(new);
    let mut ledger = ledger_of(&everything().state());
    let witness = ledger.descriptor().expect("a memory file");
    let witness = witness.try_clone().expect("a descriptor of our own");
    let states = [(&old, everything().state()), (&new, new.state())];
    let mut places = BTreeSet::new();
    // Behind what counts, in front of it, and behind it after what is in front was too short.
    for turn in 1..12 {
        let [(was, _), (will_be, state)] = match turn % 2 {
            0 => [&states[1], &states[0]],
            _ => [&states[0], &states[1]],
        };
        let before = bytes_of(&witness);
        let steps = Cell::new(0);
        // Whoever reads the file while it is written anew finds the state before.
        let watched = state.entries().inspect(|_| {
            steps.set(steps.get() + 1);
            let found = ledger::load(&witness).expect("a whole state");
            assert_eq!(sorted(&found), **was);
            let (_, live) = counts(&before);
            assert_eq!(bytes_of(&witness)[live.clone()], before[live]);
        });
        ledger.rewrite(watched).expect("write it anew");
        assert!(steps.get() > 10);
        let after = bytes_of(&witness);
        assert_eq!(said(&ledger), **will_be);
        is_whole_at_each_word(&before, &after, was, will_be);
        places.insert(counts(&after).1.start > counts(&before).1.start);
    }
    assert_eq!(places.len(), 2, "both in front of it and behind it");
}

#[test]
fn a_ledger_that_lacks_something_says_so_until_it_is_written_anew() {
    let state = everything().state();
    let mut ledger = ledger_of(&state);
    let says_so = |ledger: &Ledger| ledger.content()[24..32] == 1u64.to_le_bytes();
    assert!(!says_so(&ledger));
    ledger.lose();
    assert!(says_so(&ledger) && ledger.is_stale());
    // Whoever goes on from it, because the other one died, knows it.
    let passed_on = ledger.descriptor().expect("a memory file");
    let passed_on = passed_on.try_clone().expect("a descriptor of our own");
    let (read, taken_over) = Ledger::take_over(passed_on).expect("take it over");
    assert_eq!(sorted(&read), still_written(everything()));
    let mut taken_over = taken_over.expect("one of the present format");
    assert!(says_so(&taken_over) && taken_over.is_stale());
    taken_over.rewrite(state.entries()).expect("write it anew");
    assert!(!says_so(&taken_over) && !taken_over.is_stale());
    // In one that is closed there is a checksum, whatever it is.
    taken_over.close();
    let passed_on = taken_over.descriptor().expect("a memory file");
    let passed_on = passed_on.try_clone().expect("a descriptor of our own");
    let (_, again) = Ledger::take_over(passed_on).expect("take it over");
    assert!(!again.expect("one of the present format").is_stale());
}

#[test]
fn a_rewrite_for_which_the_room_in_front_is_too_small_goes_behind() {
    let mut ledger = ledger_of(&Plain::default().state());
    append(&mut ledger, 500);
    let small = Plain::default().state();
    // There is as much room in front as the last state took, and the next one takes more.
    ledger.rewrite(small.entries()).expect("write it anew");
    let (_, live) = counts(ledger.content());
    assert!(live.start > HEADER + 500);
    let mut large = everything();
    for number in 1000..1100 {
        let name = format!("/srv/disk-{number}");
        large.resources.push(resource(b"", name.as_bytes(), number));
    }
    let state = large.state();
    ledger.rewrite(state.entries()).expect("write it anew");
    let (_, now) = counts(ledger.content());
    assert!(now.start >= live.end);
    assert_eq!(said(&ledger), still_written(large));
    ledger.rewrite(small.entries()).expect("write it anew");
    assert_eq!(said(&ledger), Plain::default());
}

#[test]
fn a_rewrite_that_ends_in_the_middle_leaves_the_ledger_as_it_was() {
    let mut ledger = ledger_of(&everything().state());
    let other = Plain::default().state();
    for turn in 0..4 {
        let before = ledger.content().to_vec();
        let cut = other.entries().inspect(|_| {
            std::panic::resume_unwind(Box::new("the end"));
        });
        let cut = other.entries().chain(cut);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = ledger.rewrite(cut);
        }));
        assert!(ended.is_err());
        assert_eq!(ledger.content()[..HEADER], before[..HEADER]);
        assert_eq!(said(&ledger).clients, everything().sorted().clients);
        append(&mut ledger, 1);
        assert_eq!(said(&ledger).settings.idle_timeout_s, 60);
        // So also where there is room in front.
        if turn == 1 {
            append(&mut ledger, 3000);
            let state = everything().state();
            ledger.rewrite(state.entries()).expect("write it anew");
        }
    }
}

#[test]
fn an_append_that_is_cut_short_leaves_what_was_before() {
    let mut ledger = ledger_of(&everything().state());
    let before = ledger.content().to_vec();
    let resource = ResourceName {
        lockspace: b"",
        name: b"/srv/new",
    };
    let other = owner(9, b"other");
    ledger
        .append(&granted((&other).into(), resource.name, 99))
        .expect("append");
    let after = ledger.content().to_vec();
    let length_at = EXTENTS_AT[counts(&after).0] + 8;
    for end in before.len()..=after.len() {
        let mut content = after[..end].to_vec();
        content[length_at..length_at + 8].copy_from_slice(&before[length_at..length_at + 8]);
        let state = ledger::replay(&content).expect("a whole state");
        assert_eq!(sorted(&state), still_written(everything()));
    }
    assert_eq!(
        said(&ledger).resources.len(),
        everything().resources.len() + 1
    );
}

#[test]
#[ignore = "makes the fixtures of the present format, which is done once for each format"]
fn make_the_saved_ledgers() {
    let whole = closed_ledger(&everything().state());
    let mut flipped = whole.clone();
    let middle = HEADER + (whole.len() - HEADER) / 2;
    flipped[middle] ^= 0x10;
    let version = ledger::VERSION;
    let write = |name: &str, bytes: &[u8]| {
        let path = saved(name);
        assert!(!path.exists(), "{} is there already", path.display());
        std::fs::write(&path, bytes).expect("write a ledger");
    };
    write(&format!("format-{version}.bin"), &whole);
    write(
        &format!("format-{version}-truncated.bin"),
        &whole[..whole.len() - 7],
    );
    write(&format!("format-{version}-flipped.bin"), &flipped);
}

#[test]
fn a_saved_ledger_of_every_format_loads() {
    for version in [1, 2] {
        let state = ledger::replay(&read_saved(&format!("format-{version}.bin")));
        let state = state.unwrap_or_else(|reason| panic!("a ledger of format {version}: {reason}"));
        assert_eq!(sorted(&state), everything_of_format_1().sorted());
        // Nobody goes on with the poll of a format 2, but it is ours and must be closed.
        let has_poll = state.descriptors().any(|number| number == Number(7));
        assert_eq!(has_poll, version == 2);
    }
    for (version, all) in [
        (3, everything_of_format_3()),
        (4, everything_of_format_4()),
        (ledger::VERSION, everything()),
    ] {
        let state = ledger::replay(&read_saved(&format!("format-{version}.bin")));
        let state = state.unwrap_or_else(|reason| panic!("a ledger of format {version}: {reason}"));
        assert_eq!(sorted(&state), all.sorted());
    }
}

/// The domain with this number of one process.
fn domain(number: u8) -> Owner {
    Owner {
        uuid: [number; 16],
        ..owner(ONE_PROCESS, b"guest")
    }
}

fn disk(name: &[u8]) -> ResourceName<'_> {
    ResourceName {
        lockspace: b"",
        name,
    }
}

fn joined<'a>(owner: &'a Owner, name: &'a [u8]) -> Event<'a> {
    Event::Joined(owner.into(), disk(name))
}

fn granted<'a>(owner: OwnerRecord<'a>, name: &'a [u8], descriptor: i32) -> Event<'a> {
    Event::Granted {
        owner,
        resource: disk(name),
        descriptor: Number(descriptor),
        identity: FileIdentity {
            device: 1,
            inode: 1,
        },
        mode: Mode::Shared,
        autocreate: false,
        created: false,
        kind: KindRecord::OpenFile,
        since: 1_795_325_634_000,
    }
}

/// A resource's name, and who holds it, how often.
type Held = (Vec<u8>, Vec<(Owner, u32)>);

/// What these events say, written in this format.
fn after(version: u32, events: &[Event<'_>]) -> State<Saved> {
    if version < ledger::VERSION {
        let memory = earlier::write(version, events.iter().cloned()).expect("write it");
        return ledger::replay(memory.bytes()).expect("read it");
    }
    let mut ledger = Ledger::new().expect("memory for a ledger");
    events
        .iter()
        .for_each(|event| ledger.append(event).expect("append"));
    ledger::replay(ledger.content()).expect("read it")
}

/// Who holds what after these events, written in this format.
fn holders_after(version: u32, events: &[Event<'_>]) -> Vec<Held> {
    let resources = sorted(&after(version, events)).resources;
    let resources = resources.into_iter().map(|held| (held.name, held.holders));
    resources.collect()
}

#[test]
fn a_released_holding_is_that_of_the_domain_or_else_one_that_only_the_process_is_known_of() {
    let [one, other, unknown] = [domain(1), domain(2), Owner::unknown(ONE_PROCESS)];
    let released = |owner: &Owner| Event::ReleasedBy(owner.pid, owner.uuid, disk(b"disk"));
    let mut events = vec![
        granted((&one).into(), b"disk", 9),
        joined(&other, b"disk"),
        joined(&unknown, b"disk"),
        released(&other),
    ];
    let left = |events: &[Event<'_>]| holders_after(ledger::VERSION, events)[0].1.clone();
    assert_eq!(left(&events), [(unknown.clone(), 1), (one.clone(), 1)]);
    events.push(released(&other));
    assert_eq!(left(&events), [(one.clone(), 1)]);
    events.push(released(&one));
    assert!(holders_after(ledger::VERSION, &events).is_empty());
    events.truncate(events.len() - 1);
    events.push(Event::OwnerEnded(ONE_PROCESS));
    assert!(holders_after(ledger::VERSION, &events).is_empty());
}

#[test]
fn what_several_domains_of_a_process_held_in_an_earlier_format_is_of_any_of_them() {
    let [one, other, stranger] = [domain(1), domain(2), owner(78, b"stranger")];
    let arrival = Arrival {
        server: Service::Lock,
        id: 1,
        peer: None,
        start_time: None,
        connected_at: 0,
        refused: false,
    };
    let client = Event::Connected(Number(5), arrival);
    let registered = Event::Registered(Number(5), (&other).into());
    let unknown = Owner::unknown(ONE_PROCESS);
    // Written anew, everything was given to the domain that had registered last; and a release did not
    // say whose holding it was.
    let written_anew = [
        client,
        registered,
        granted((&one).into(), b"a", 9),
        granted((&stranger).into(), b"b", 10),
    ];
    let expected = vec![
        (b"a".to_vec(), vec![(unknown.clone(), 1)]),
        (b"b".to_vec(), vec![(stranger.clone(), 1)]),
    ];
    assert_eq!(holders_after(2, &written_anew), expected);
    let released = [
        granted((&one).into(), b"a", 9),
        joined(&other, b"a"),
        joined(&one, b"a"),
        Event::Released(ONE_PROCESS, disk(b"a")),
    ];
    let expected = vec![(b"a".to_vec(), vec![(unknown, 2)])];
    for version in [2, ledger::VERSION] {
        assert_eq!(holders_after(version, &released), expected);
    }
    // Where a process stands for one domain, it is known which.
    let alone = [granted((&one).into(), b"a", 9)];
    let expected = vec![(b"a".to_vec(), vec![(one.clone(), 1)])];
    assert_eq!(holders_after(2, &alone), expected);
}

#[test]
fn what_a_dead_owner_left_is_its_estate_until_it_is_freed() {
    let [dead, other] = [domain(1), owner(78, b"other")];
    let mut events = vec![
        granted((&dead).into(), b"shared", 9),
        joined(&other, b"shared"),
        granted((&dead).into(), b"first", 10),
        granted((&dead).into(), b"second", 11),
        Event::Died(ONE_PROCESS),
    ];
    let left = |events: &[Event<'_>]| {
        let state = sorted(&after(ledger::VERSION, events));
        let held: Vec<_> = state.resources.iter().map(|it| it.name.clone()).collect();
        let numbers = |(pid, left): &(i32, Vec<PlainResource>)| {
            let numbers: Vec<i32> = left.iter().map(|it| it.descriptor).collect();
            (*pid, numbers)
        };
        let estates: Vec<_> = state.estates.iter().map(numbers).collect();
        (held, estates)
    };
    let (held, estates) = left(&events);
    assert_eq!(held, [b"shared".to_vec()]);
    assert_eq!(estates, [(ONE_PROCESS, vec![10, 11])]);
    // Somebody else takes one by name, and dies.
    let third = owner(79, b"third");
    events.push(granted((&third).into(), b"first", 12));
    assert_eq!(left(&events).0, [b"first".to_vec(), b"shared".to_vec()]);
    events.push(Event::Died(79));
    events.push(Event::Freed(Number(10)));
    let (held, estates) = left(&events);
    assert_eq!(held, [b"shared".to_vec()]);
    assert_eq!(estates, [(ONE_PROCESS, vec![11]), (79, vec![12])]);
    // Not in the order in which they died.
    events.push(Event::Freed(Number(12)));
    events.push(Event::Freed(Number(11)));
    assert_eq!(left(&events), (vec![b"shared".to_vec()], vec![]));
    // The program that wrote OwnerEnded had closed the files before: nothing is left.
    events.truncate(4);
    events.push(Event::OwnerEnded(ONE_PROCESS));
    for version in [2, ledger::VERSION] {
        let state = after(version, &events);
        assert_eq!(state.left_count(), 0);
        let resources: Vec<_> = state.descriptors().collect();
        assert_eq!(resources, [Number(9)]);
    }
}

#[test]
fn what_has_ended_is_not_in_a_ledger_that_is_read() {
    let watched = |process| Event::Watched(Watched { pid: 5, process });
    let events = [
        Event::Unreachable(5),
        watched(None),
        watched(Some(Number(8))),
        Event::Listening(Listening {
            server: Service::Lock,
            socket: Number(4),
            path: None,
        }),
    ];
    let state = after(ledger::VERSION, &events);
    assert!(state.is_unreachable(5) && !state.is_unreachable(6));
    let known: Vec<_> = state.watched().values().copied().collect();
    let expected = Watched {
        pid: 5,
        process: Some(Number(8)),
    };
    assert_eq!(known, [expected]);
    assert_eq!(state.listeners().len(), 1);
    let ended = [Event::Reachable(5), Event::Unwatched(5), Event::Deaf];
    let state = after(ledger::VERSION, &[&events[..], &ended].concat());
    assert!(!state.is_unreachable(5));
    assert_eq!(sorted(&state), Plain::default());
}

#[test]
fn a_client_that_was_refused_and_left_takes_nobody_s_room() {
    let arrival = Arrival {
        refused: true,
        ..client(13, Service::Lock, 1).arrival
    };
    let events = [
        Event::Connected(Number(13), arrival),
        Event::Leaving(Number(13)),
    ];
    let state = after(ledger::VERSION, &events);
    assert!(state.served(Service::Lock).next().is_none());
    let again = ledger::replay(ledger_of(&state).content()).expect("read it");
    assert!(again.served(Service::Lock).next().is_none());
    assert_eq!(sorted(&again), sorted(&state));
}

#[test]
fn a_process_that_started_at_boot_does_not_make_an_earlier_ledger_damaged() {
    let arrival = Arrival {
        peer: None,
        // One byte, which is looked for.
        start_time: NonZeroU64::new(0xaa),
        connected_at: 0,
        ..client(13, Service::Lock, 1).arrival
    };
    let mut ledger = Ledger::new().expect("memory for a ledger");
    ledger
        .append(&Event::Connected(Number(13), arrival))
        .expect("append");
    let mut content = ledger.content().to_vec();
    let at = content.iter().rposition(|byte| *byte == 0xaa);
    content[at.expect("the start time")] = 0;
    let state = ledger::replay(&content).expect("what an earlier program wrote");
    let client = Plain::of(&state).clients.remove(0);
    assert_eq!(client.arrival.start_time, None);
}

#[test]
fn a_ledger_of_an_earlier_format_is_written_anew_before_it_is_gone_on_with() {
    for version in 1..=ledger::VERSION {
        let content = read_saved(&format!("format-{version}.bin"));
        let memory = nix::sys::memfd::memfd_create(c"ledger", nix::sys::memfd::MFdFlags::empty());
        let memory = memory.expect("a memory file");
        nix::unistd::write(&memory, &content).expect("fill it");
        let (state, ledger) = Ledger::take_over(memory).expect("take it over");
        let expected = ledger::replay(&content).expect("read it");
        assert_eq!(sorted(&state), sorted(&expected), "format {version}");
        match ledger {
            None => assert!(version < ledger::VERSION, "format {version}"),
            Some(ledger) => {
                assert_eq!(version, ledger::VERSION);
                assert!(!ledger.is_stale());
                assert_eq!(said(&ledger), still_written(everything()));
            }
        }
        // Written anew it says the same, in the present format.
        let mut ledger = ledger_of(&state);
        assert_eq!(said(&ledger), still_written(Plain::of(&expected)));
        ledger.close();
        assert_eq!(ledger.content()[8..12], ledger::VERSION.to_le_bytes());
    }
}

#[test]
fn what_is_written_for_an_earlier_program_is_a_ledger_of_its_format() {
    let state = everything().state();
    for version in 1..ledger::VERSION {
        let entries: Box<dyn Iterator<Item = Event<'_>>> = if earlier::knows_the_watched(version) {
            Box::new(state.entries())
        } else {
            Box::new(state.entries_of_the_living())
        };
        let memory = earlier::write(version, entries).expect("write it");
        assert_eq!(memory.bytes()[8..12], version.to_le_bytes());
        let read = sorted(&ledger::replay(memory.bytes()).expect("read it"));
        let mut all = match version {
            4 => everything_of_format_4(),
            _ => everything_of_format_3(),
        };
        all.poll = None;
        if version < 3 {
            all.estates.clear();
            all.watched.clear();
            all.unreachable.clear();
            for client in &mut all.clients {
                if client.standing == Standing::Over {
                    client.standing = Standing::Served;
                }
            }
        }
        // Up to format 2 nobody knows which of several domains of a process has what.
        assert_eq!(read, all.sorted(), "format {version}");
    }
}

#[test]
fn a_truncated_ledger_is_refused() {
    for version in 1..=ledger::VERSION {
        let refused = ledger::replay(&read_saved(&format!("format-{version}-truncated.bin")));
        let refused = refused.map(drop);
        assert!(
            matches!(refused, Err(Unreadable::Damaged(_))),
            "{refused:?}"
        );
        let whole = read_saved(&format!("format-{version}.bin"));
        for length in 0..whole.len() {
            assert!(ledger::replay(&whole[..length]).is_err(), "{length} bytes");
        }
    }
}

#[test]
fn a_ledger_with_a_flipped_bit_is_refused() {
    for version in 1..=ledger::VERSION {
        let refused = ledger::replay(&read_saved(&format!("format-{version}-flipped.bin")));
        let refused = refused.map(drop);
        assert!(
            matches!(refused, Err(Unreadable::Damaged(_))),
            "{refused:?}"
        );
        let whole = read_saved(&format!("format-{version}.bin"));
        let header = match version {
            1 | 2 => OLD_HEADER,
            3 | 4 => HEADER_WITHOUT_COUNTS,
            _ => HEADER,
        };
        let which = version > 2;
        // Also where the header says what counts.
        let which = which
            .then_some(WHICH_AT..WHICH_AT + 8)
            .into_iter()
            .flatten();
        for position in which.chain(header..whole.len()) {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[position] ^= 1 << bit;
                let refused = ledger::replay(&damaged);
                assert!(refused.is_err(), "bit {bit} of byte {position}");
            }
        }
    }
}

#[test]
fn a_ledger_of_a_later_format_says_so() {
    let version = |content: &[u8]| ledger::replay(content).map(drop);
    let mut later = read_saved("format-2.bin");
    let next = ledger::VERSION + 1;
    later[8..12].copy_from_slice(&next.to_le_bytes());
    assert_eq!(version(&later), Err(Unreadable::Version(next)));
    later[8..12].fill(0);
    assert_eq!(version(&later), Err(Unreadable::Version(0)));
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..40)
}

fn any_owner() -> impl Strategy<Value = Owner> {
    // One process may stand for many domains.
    let pid = prop_oneof![4 => any::<i32>(), 1 => Just(ONE_PROCESS)];
    (pid, 1..=u32::MAX, bytes(), any::<[u8; 16]>()).prop_map(|(pid, id, name, uuid)| Owner {
        pid,
        id,
        name: name.into(),
        uuid,
    })
}

/// The owner of a lock: perhaps one of which only the process is known.
fn any_holder() -> impl Strategy<Value = Owner> {
    prop_oneof![
        4 => any_owner(),
        1 => any_owner().prop_map(|owner| Owner::unknown(owner.pid)),
    ]
}

const ONE_PROCESS: i32 = 77;

fn any_service() -> impl Strategy<Value = Service> {
    prop::sample::select(Service::ALL.to_vec())
}

fn any_server() -> impl Strategy<Value = Server> {
    (
        any::<u32>(),
        any::<u32>(),
        any::<Option<u32>>(),
        any::<u64>(),
        any::<[u32; 3]>(),
    )
        .prop_map(
            |(limit, unauthenticated_limit, configured, next_id, workers)| Server {
                limit,
                unauthenticated_limit,
                configured,
                next_id,
                workers,
            },
        )
}

fn any_peer() -> impl Strategy<Value = Peer> {
    (any::<i32>(), any::<u32>(), any::<u32>()).prop_map(|(pid, uid, gid)| Peer { pid, uid, gid })
}

fn any_traffic() -> impl Strategy<Value = Traffic> {
    (bytes(), any::<bool>(), any::<u32>(), bytes(), any::<bool>()).prop_map(
        |(pending, descriptors_at_end, arrived, unsent, closing)| Traffic {
            // They speak of the bytes that wait.
            descriptors_at_end: descriptors_at_end && !pending.is_empty(),
            arrived: if pending.is_empty() { 0 } else { arrived },
            pending,
            unsent,
            closing,
        },
    )
}

fn any_life() -> impl Strategy<Value = Life> {
    prop_oneof![
        any::<u64>().prop_map(Life::Inode),
        any::<u64>().prop_map(Life::Start)
    ]
}

fn any_here() -> impl Strategy<Value = Here> {
    (any::<Option<[u8; 16]>>(), any::<Option<u64>>())
        .prop_map(|(boot, namespace)| Here { boot, namespace })
}

fn any_client() -> impl Strategy<Value = PlainClient> {
    (
        any_service(),
        0..u64::MAX,
        prop::option::of(any_peer()),
        any::<Option<u64>>(),
        any::<i64>(),
        prop::sample::select(vec![
            (false, Standing::Served, false),
            (false, Standing::Refused, true),
            (true, Standing::Served, false),
            (false, Standing::Over, false),
            (false, Standing::Over, true),
            (true, Standing::Over, false),
        ]),
        prop::option::of(any_owner()),
        (
            any::<bool>(),
            prop::option::of(any_life()),
            any::<u64>(),
            0..4u32,
        ),
        any_traffic(),
    )
        .prop_map(
            |(server, id, peer, start_time, connected_at, stage, owner, more, traffic)| {
                let (restricted, life, registered_at, wanted) = more;
                // Who registers again does it at another time.
                let registered_at = if owner.is_some() { registered_at } else { 0 };
                PlainClient {
                    descriptor: 0,
                    arrival: Arrival {
                        server,
                        id,
                        peer,
                        start_time: start_time.and_then(NonZeroU64::new),
                        connected_at,
                        refused: stage.2,
                    },
                    standing: stage.1,
                    // One that made a call was not refused.
                    has_called: stage.0,
                    owner,
                    registered_at,
                    wanted,
                    life,
                    restricted,
                    traffic,
                }
            },
        )
}

fn any_resource() -> impl Strategy<Value = PlainResource> {
    (
        (bytes(), bytes()),
        (any::<u64>(), any::<u64>()),
        prop::sample::select(vec![Mode::Exclusive, Mode::Shared]),
        (any::<bool>(), any::<u64>()),
        any::<bool>(),
        prop::sample::select(vec![KindRecord::OpenFile, KindRecord::Process]),
        prop::collection::vec(any::<i32>(), 0..3),
        prop::collection::vec((any_holder(), 1..4u32), 1..4),
    )
        .prop_map(
            |((lockspace, name), file, mode, autocreate, created, kind, parked, mut holders)| {
                let (autocreate, since) = autocreate;
                let mut seen = BTreeSet::new();
                holders.retain(|(owner, _)| seen.insert(owner.key()));
                PlainResource {
                    lockspace,
                    name,
                    descriptor: 0,
                    identity: FileIdentity {
                        device: file.0,
                        inode: file.1,
                    },
                    mode,
                    autocreate,
                    created,
                    kind,
                    since,
                    // Only beside a POSIX lock descriptors are kept.
                    parked: match kind {
                        KindRecord::Process => parked,
                        KindRecord::OpenFile | KindRecord::Unknown => vec![],
                    },
                    holders,
                }
            },
        )
}

fn any_fence() -> impl Strategy<Value = Fence<Number>> {
    (any::<i32>(), any::<i32>(), any::<bool>(), any::<u64>()).prop_map(
        |(pid, descriptor, killed, next_step)| Fence {
            pid,
            process: Number(descriptor),
            stage: if killed { Stage::Killed } else { Stage::Asked },
            next_step: Moment(next_step),
        },
    )
}

fn any_process() -> impl Strategy<Value = Settings> {
    (
        prop::option::of((any::<i32>(), bytes())),
        prop::option::of(bytes()),
        bytes(),
        any::<u32>(),
        (any::<u32>(), ".{0,20}", ".{0,20}", ".{0,20}"),
    )
        .prop_map(
            |(pid_file, config_file, program, idle_timeout_s, log)| Settings {
                pid_file,
                config_file,
                program,
                idle_timeout_s,
                logging: LogSettings {
                    level: log.0,
                    filters: log.1,
                    outputs: log.2,
                    default_output: log.3,
                },
            },
        )
}

fn any_listener() -> impl Strategy<Value = Listening<Number>> {
    (any_service(), any::<i32>(), prop::option::of(bytes())).prop_map(
        |(server, descriptor, path)| Listening {
            server,
            socket: Number(descriptor),
            path,
        },
    )
}

fn any_watch() -> impl Strategy<Value = Watched<Number>> {
    (any::<i32>(), any::<Option<i32>>()).prop_map(|(pid, descriptor)| Watched {
        pid,
        process: descriptor.map(Number),
    })
}

/// What owners leave: the same process may have died more than once.
fn any_estates() -> impl Strategy<Value = Vec<(i32, Vec<PlainResource>)>> {
    let pid = prop_oneof![any::<i32>(), Just(ONE_PROCESS)];
    let estate = (pid, prop::collection::vec(any_resource(), 1..4));
    prop::collection::vec(estate, 0..4)
}

fn any_state() -> impl Strategy<Value = Plain> {
    let owners = (
        prop::collection::vec(any_fence(), 0..3),
        prop::collection::vec(any_watch(), 0..3),
        prop::collection::vec(any::<i32>(), 0..3),
        any_estates(),
        prop::collection::vec(any_life(), 0..4),
        prop::option::of(any_here()),
    );
    (
        any_server(),
        any_server(),
        prop::collection::vec(any_listener(), 0..4),
        prop::collection::vec(any_client(), 0..6),
        prop::collection::vec(bytes(), 0..3),
        prop::collection::vec(any_resource(), 0..8),
        owners,
        any_process(),
        any::<Option<i32>>(),
    )
        .prop_map(
            |(lock, admin, listeners, clients, lockspaces, resources, owners, settings, poll)| {
                let (fences, watched, unreachable, estates, lives, here) = owners;
                let mut state = Plain {
                    lock_server: lock,
                    admin_server: admin,
                    listeners,
                    clients,
                    lockspaces,
                    resources,
                    estates,
                    fences,
                    watched,
                    lives: Vec::new(),
                    here,
                    unreachable,
                    settings,
                    poll: poll.map(Number),
                };
                // The default one needs not be made.
                state.lockspaces.retain(|directory| !directory.is_empty());
                // Descriptors are numbers of things that are open at the same time.
                for (number, client) in (100..).zip(&mut state.clients) {
                    client.descriptor = number;
                }
                for (number, resource) in (200..).zip(&mut state.resources) {
                    resource.descriptor = number;
                }
                let mut numbers = 300..;
                for (_, left) in &mut state.estates {
                    let mut seen = BTreeSet::new();
                    left.retain(|one| seen.insert((one.lockspace.clone(), one.name.clone())));
                    for resource in left {
                        resource.descriptor = numbers.next().expect("a number");
                        resource.holders.clear();
                    }
                }
                let mut seen = BTreeSet::new();
                state
                    .resources
                    .retain(|one| seen.insert((one.lockspace.clone(), one.name.clone())));
                let mut seen = BTreeSet::new();
                state.fences.retain(|fence| seen.insert(fence.pid));
                let mut seen = BTreeSet::new();
                state.watched.retain(|watched| seen.insert(watched.pid));
                // Those of processes that there is a descriptor of.
                let fenced = state.fences.iter().map(|fence| fence.pid);
                let watched = state.watched.iter().map(|watched| watched.pid);
                let pids: BTreeSet<i32> = fenced.chain(watched).collect();
                state.lives = pids.into_iter().zip(lives).collect();
                let mut seen = BTreeSet::new();
                state.unreachable.retain(|pid| seen.insert(*pid));
                state
            },
        )
}

/// All that a state says, to be compared.
fn lines(state: &State<Saved>) -> Vec<String> {
    let mut lines: Vec<String> = state.entries().map(|event| format!("{event:?}")).collect();
    lines.sort_unstable();
    lines
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_state_comes_back_from_its_ledger(plain in any_state()) {
        let state = plain.state();
        prop_assert_eq!(sorted(&state), plain.clone().sorted());
        let ledger = ledger_of(&state);
        let open = ledger::replay(ledger.content()).expect("a ledger that is still written");
        let still_written = still_written(plain.clone());
        prop_assert_eq!(lines(&open), lines(&still_written.state()));
        prop_assert_eq!(sorted(&open), still_written);
        let closed = ledger::replay(&closed_ledger(&state)).expect("a closed ledger");
        prop_assert_eq!(sorted(&closed), plain.sorted());
        prop_assert_eq!(lines(&closed), lines(&state));
    }

    #[test]
    fn any_state_comes_back_from_a_ledger_that_is_written_anew_again_and_again(
        states in prop::collection::vec((any_state(), 0..2000usize), 1..5),
    ) {
        let mut ledger = Ledger::new().expect("memory for a ledger");
        for (plain, more) in states {
            append(&mut ledger, more);
            let state = plain.state();
            ledger.rewrite(state.entries()).expect("write it anew");
            prop_assert_eq!(said(&ledger), still_written(plain));
        }
    }

    #[test]
    fn no_damage_to_a_ledger_that_is_still_written_is_a_panic(
        plain in any_state(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut content = ledger_of(&plain.state()).content().to_vec();
        for (position, byte) in damage {
            let position = position.index(content.len());
            content[position] = byte;
        }
        // Refused or not: what is accepted can be written down again.
        if let Ok(state) = ledger::replay(&content) {
            let again = ledger::replay(&closed_ledger(&state));
            prop_assert!(again.is_ok_and(|again| lines(&again) == lines(&state)));
        }
    }

    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(ledger::replay(&bytes).is_err() || bytes.len() >= OLD_HEADER);
        let _ = libvirt_json::read(&bytes, 1, |_| Vec::new());
    }

    #[test]
    fn any_state_that_libvirt_can_have_comes_back_from_its_document(plain in libvirt_state()) {
        let document = libvirt_json::write(&plain.state(), 4242).expect("a document");
        let back = libvirt_json::read(&document, 4242, socket_path).expect("a state");
        let expected = by_descriptor(as_the_document_says(plain));
        prop_assert_eq!(by_descriptor(Plain::of(&back)), expected);
        let foreign = libvirt_json::read(&document, 4243, socket_path).map(drop);
        prop_assert_eq!(foreign, Err(Unusable::Foreign("4242".into())));
    }

    #[test]
    fn a_document_that_is_cut_short_is_damaged(
        plain in libvirt_state(),
        cut in any::<prop::sample::Index>(),
    ) {
        let document = libvirt_json::write(&plain.state(), 4242).expect("a document");
        let cut = cut.index(document.len());
        let read = libvirt_json::read(&document[..cut], 4242, socket_path);
        prop_assert!(matches!(read, Err(Unusable::Damaged(_))));
    }
}

fn socket_path(service: Service) -> Vec<u8> {
    format!("/run/libvirt/{}-sock", service.name()).into_bytes()
}

/// States that the document has words for.
fn libvirt_state() -> impl Strategy<Value = Plain> {
    let name = || r#"[ -~\n\t"\\é€]{0,20}"#;
    let people = prop::collection::vec(
        (
            prop_oneof![2..i32::MAX, Just(ONE_PROCESS)],
            1..=u32::MAX,
            name(),
            any::<[u8; 16]>(),
        )
            .prop_map(|(pid, id, name, uuid)| Owner {
                pid,
                id,
                name: name.into_bytes().into(),
                uuid,
            }),
        1..4,
    );
    (
        any_state(),
        people,
        prop::collection::vec(name(), 32),
        any::<u64>(),
    )
        .prop_map(|(mut state, people, names, seed)| {
            let mut names = names.into_iter().zip(0..).map(|(name, number)| {
                // Different from all others.
                format!("/{number}{name}").into_bytes()
            });
            let mut name = || names.next().expect("enough names");
            state.fences.clear();
            state.watched.clear();
            state.unreachable.clear();
            state.estates.clear();
            state.poll = None;
            state.settings = Settings::default();
            for directory in &mut state.lockspaces {
                *directory = name();
            }
            for (number, listener) in (50..).zip(&mut state.listeners) {
                listener.socket = Number(number);
                listener.path = listener.path.as_ref().map(|_| socket_path(listener.server));
            }
            for (number, client) in (0usize..).zip(&mut state.clients) {
                client.traffic = Traffic::default();
                client.arrival.refused = false;
                client.standing = Standing::Served;
                client.arrival.id = number as u64 + 1;
                client.owner = match client.arrival.server {
                    Service::Admin => None,
                    Service::Lock => people.get(number).cloned(),
                };
                client.restricted &= client.arrival.server == Service::Lock;
            }
            for (number, resource) in (0usize..).zip(&mut state.resources) {
                resource.name = name();
                let directory = (seed as usize).wrapping_add(number) % 3;
                let directory = state.lockspaces.get(directory);
                resource.lockspace = directory.cloned().unwrap_or_default();
                resource.parked.clear();
                for (owner, _) in &mut resource.holders {
                    owner.pid = owner.pid.checked_abs().unwrap_or(1);
                }
                let mut seen = BTreeSet::new();
                resource.holders.retain(|(owner, _)| seen.insert(owner.pid));
                if let Some(one) = people.get(number) {
                    resource.holders = vec![(one.clone(), 2)];
                }
            }
            for server in [&mut state.lock_server, &mut state.admin_server] {
                server.unauthenticated_limit = server.unauthenticated_limit.min(server.limit);
                server.next_id = server.next_id.max(100);
            }
            state
        })
}

/// What is left of a state when it has been a document.
fn as_the_document_says(mut state: Plain) -> Plain {
    let mut known: BTreeMap<i32, Owner> = BTreeMap::new();
    for owner in state.clients.iter().filter_map(|it| it.owner.clone()) {
        let pid = owner.pid;
        if known.insert(pid, owner).is_some() {
            // Which of the domains holds what is not written there.
            known.insert(pid, Owner::unknown(pid));
        }
    }
    for client in &mut state.clients {
        (client.arrival.peer, client.arrival.start_time) = (None, None);
        (client.has_called, client.life) = (false, None);
        (client.registered_at, client.wanted) = (0, 0);
    }
    for resource in &mut state.resources {
        let unknown = FileIdentity {
            device: 0,
            inode: 0,
        };
        (resource.identity, resource.created) = (unknown, false);
        (resource.kind, resource.since) = (KindRecord::Unknown, 0);
        for (owner, _) in &mut resource.holders {
            let unknown = || Owner::unknown(owner.pid);
            *owner = known.get(&owner.pid).cloned().unwrap_or_else(unknown);
        }
    }
    (state.here, state.lives) = (None, Vec::new());
    for server in [&mut state.lock_server, &mut state.admin_server] {
        server.configured = None;
    }
    state
}

fn by_descriptor(state: Plain) -> Plain {
    let mut state = state.sorted();
    state.clients.sort_by_key(|client| client.descriptor);
    state.resources.sort_by_key(|resource| resource.descriptor);
    state.listeners.sort_by_key(|listener| listener.socket);
    state
}

#[test]
fn events_that_speak_of_nobody_are_refused() {
    let gone = [
        Event::Gone(Number(9)),
        Event::Called(Number(9)),
        Event::Restricted(Number(9)),
        Event::Leaving(Number(9)),
        Event::Released(1, disk(b"disk")),
        Event::ReleasedBy(1, [1; 16], disk(b"disk")),
        Event::Freed(Number(9)),
        Event::Parked(disk(b"disk"), Number(9)),
    ];
    for event in gone {
        let mut ledger = Ledger::new().expect("memory for a ledger");
        ledger.append(&event).expect("room for one event");
        let refused = ledger::replay(ledger.content());
        assert!(matches!(refused, Err(Unreadable::Damaged(_))), "{event:?}");
    }
}
