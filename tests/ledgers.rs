//! Saved state: what was written once is read for ever, what is damaged is refused, and any state
//! comes back as it was, from the ledger and from libvirt's document.
//!
//! The ledgers in `tests/ledgers/` are of the format in their names. They are never made anew; a
//! new format gets new files (run the ignored test that makes them).

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use virtlockd::host::clock::Moment;
use virtlockd::host::file::FileIdentity;
use virtlockd::host::stream::Peer;
use virtlockd::locks::table::{Mode, Owner};
use virtlockd::restart::event::{Event, OwnerRecord};
use virtlockd::restart::ledger::{self, Ledger, Unreadable};
use virtlockd::restart::libvirt_json::{self, Unusable};
use virtlockd::restart::state::{
    ClientState, FenceState, ListenerState, LockKindState, LogState, PollState, ProcessState,
    ResourceState, ServerState, Service, State, Traffic, WatchState,
};

/// Bytes in front of the events.
const HEADER: usize = 32;

fn saved(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/ledgers")
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

fn client(descriptor: i32, server: Service, id: u64) -> ClientState {
    ClientState {
        descriptor,
        server,
        id,
        peer: Some(Peer {
            pid: 4000 + descriptor,
            uid: 0,
            gid: 107,
        }),
        start_time: None,
        connected_at: 1_795_325_634,
        has_called: true,
        refused: false,
        owner: None,
        restricted: false,
        traffic: Traffic::default(),
    }
}

/// A state with at least one of everything.
fn everything() -> State {
    let [first, second] = [owner(4010, b"guest"), owner(4011, b"caf\xe9 \0\"\\\xff")];
    let listener = |server, descriptor, path: Option<&str>| ListenerState {
        server,
        descriptor,
        path: path.map(|path| path.as_bytes().to_vec()),
    };
    let resource = |lockspace: &[u8], name: &[u8], descriptor| ResourceState {
        lockspace: lockspace.to_vec(),
        name: name.to_vec(),
        descriptor,
        identity: Some(FileIdentity {
            device: 0xfd00,
            inode: 1 << 40,
        }),
        mode: Mode::Exclusive,
        autocreate: false,
        created: false,
        kind: LockKindState::OpenFile,
        parked: vec![],
        holders: vec![(first.clone(), 1)],
    };
    State {
        lock_server: ServerState {
            limit: 10_000,
            unauthenticated_limit: 1024,
            configured: Some(5000),
            next_id: 77,
            workers: [1, 2, 3],
        },
        admin_server: ServerState {
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
            ClientState {
                owner: Some(first.clone()),
                restricted: true,
                ..client(10, Service::Lock, 1)
            },
            ClientState {
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
            ClientState {
                has_called: false,
                ..client(12, Service::Lock, 3)
            },
            ClientState {
                has_called: false,
                refused: true,
                start_time: Some(123_456),
                ..client(13, Service::Lock, 76)
            },
            ClientState {
                peer: None,
                traffic: Traffic {
                    closing: true,
                    ..Traffic::default()
                },
                ..client(14, Service::Admin, 2)
            },
        ],
        lockspaces: vec![b"/var/lib/libvirt/lockd/files".to_vec()],
        resources: vec![
            resource(b"", b"/srv/disk1.img", 20),
            ResourceState {
                mode: Mode::Shared,
                kind: LockKindState::Process,
                parked: vec![30, 31],
                holders: vec![(first.clone(), 2), (second.clone(), 1)],
                ..resource(b"", b"/srv/\xff\xfe", 21)
            },
            ResourceState {
                autocreate: true,
                created: true,
                kind: LockKindState::Unknown,
                holders: vec![(second, 1)],
                ..resource(b"/var/lib/libvirt/lockd/files", b"0a1b2c", 22)
            },
        ],
        fences: vec![
            FenceState {
                pid: 4012,
                descriptor: 40,
                killed: false,
                next_step: Moment(1_600_000_000),
            },
            FenceState {
                pid: 4013,
                descriptor: 41,
                killed: true,
                next_step: Moment(u64::MAX),
            },
        ],
        watches: vec![
            WatchState {
                pid: 4014,
                descriptor: Some(42),
            },
            WatchState {
                pid: 4015,
                descriptor: None,
            },
        ],
        process: ProcessState {
            pid_file: Some((6, b"/run/virtlockd.pid".to_vec())),
            config_file: Some(b"/etc/libvirt/virtlockd.conf".to_vec()),
            program: b"/usr/sbin/virtlockd".to_vec(),
            idle_timeout_s: 120,
            logging: LogState {
                level: 3,
                filters: "1:util 4:+rpc".into(),
                outputs: "1:file:/var/log/virtlockd.log".into(),
                default_output: "1:journald".into(),
            },
        },
        poll: Some(PollState {
            descriptor: 7,
            places: vec![(10, 0), (11, 3), (12, 1), (13, 2), (14, 4)],
        }),
    }
}

/// The order of what has none.
fn sorted(mut state: State) -> State {
    state
        .clients
        .sort_by_key(|client| (client.server, client.id, client.descriptor));
    state
        .resources
        .sort_by(|one, other| (&one.lockspace, &one.name).cmp(&(&other.lockspace, &other.name)));
    state.fences.sort_by_key(|fence| fence.pid);
    state.watches.sort_by_key(|watch| watch.pid);
    state
}

fn closed_ledger(state: &State) -> Vec<u8> {
    let mut ledger = Ledger::of(state).expect("memory for a ledger");
    ledger.close();
    ledger.content().to_vec()
}

#[test]
fn a_small_ledger_is_written_anew_in_its_file_and_a_large_one_is_given_back() {
    let file = |ledger: &Ledger| {
        let descriptor = ledger.descriptor().expect("a memory file");
        let seen = nix::sys::stat::fstat(descriptor).expect("look at the ledger");
        (seen.st_ino, seen.st_size)
    };
    let events = |ledger: &mut Ledger, count: usize| {
        for _ in 0..count {
            ledger.append(&Event::IdleTimeout(60)).expect("append");
        }
    };
    let mut ledger = Ledger::new().expect("make a ledger");
    events(&mut ledger, 50_000);
    ledger.lose();
    let before = file(&ledger);
    let state = everything();
    let said = |ledger: &Ledger| sorted(ledger::replay(ledger.content()).expect("read it"));
    ledger.rewrite(&state).expect("write it anew");
    assert_eq!(file(&ledger), before);
    assert_eq!(said(&ledger), sorted(state.clone()));
    assert!(!ledger.is_stale() && !ledger.wants_compaction());
    // What it said before is gone for good, also for what is appended now.
    events(&mut ledger, 1);
    assert_eq!(said(&ledger).process.idle_timeout_s, 60);

    events(&mut ledger, 600_000);
    assert!(file(&ledger).1 > 1_100_000);
    ledger.rewrite(&state).expect("write it anew");
    assert!(file(&ledger).1 < 100_000);
    assert_eq!(said(&ledger), sorted(state));
}

#[test]
#[ignore = "makes the fixtures of the present format, which is done once for each format"]
fn make_the_saved_ledgers() {
    let whole = closed_ledger(&everything());
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
    let state = ledger::replay(&read_saved("format-1.bin")).expect("a ledger of format 1");
    let without_watches = State {
        watches: vec![],
        ..everything()
    };
    let without_poll = State {
        poll: None,
        ..without_watches.clone()
    };
    assert_eq!(sorted(state), sorted(without_poll));
    for (version, expected) in [(2, without_watches), (ledger::VERSION, everything())] {
        let state = ledger::replay(&read_saved(&format!("format-{version}.bin")));
        let state = state.unwrap_or_else(|reason| panic!("a ledger of format {version}: {reason}"));
        assert_eq!(sorted(state), sorted(expected));
    }
}

/// The domain with this number of one process.
fn domain(number: u8) -> Owner {
    Owner {
        uuid: [number; 16],
        ..owner(ONE_PROCESS, b"guest")
    }
}

fn joined<'a>(owner: &'a Owner, name: &'a [u8]) -> Event<'a> {
    Event::Joined {
        owner: owner.into(),
        lockspace: b"",
        name,
    }
}

fn granted<'a>(owner: OwnerRecord<'a>, name: &'a [u8], descriptor: i32) -> Event<'a> {
    Event::Granted {
        owner,
        lockspace: b"",
        name,
        descriptor,
        identity: FileIdentity {
            device: 1,
            inode: 1,
        },
        mode: Mode::Shared,
        autocreate: false,
        created: false,
        kind: LockKindState::OpenFile,
    }
}

/// A resource's name, and who holds it, how often.
type Held = (Vec<u8>, Vec<(Owner, u32)>);

/// Who holds what after these events, written in this format.
fn holders_after(version: u32, events: &[Event<'_>]) -> Vec<Held> {
    let mut ledger = Ledger::new().expect("memory for a ledger");
    events
        .iter()
        .for_each(|event| ledger.append(event).expect("append"));
    let mut content = ledger.content().to_vec();
    content[8..12].copy_from_slice(&version.to_le_bytes());
    let state = sorted(ledger::replay(&content).expect("read it"));
    let resources = state.resources.into_iter().map(|mut held| {
        held.holders.sort_by_key(|(owner, _)| owner.key());
        (held.name, held.holders)
    });
    resources.collect()
}

#[test]
fn a_released_holding_is_that_of_the_domain_or_else_one_that_only_the_process_is_known_of() {
    let [one, other, unknown] = [domain(1), domain(2), Owner::unknown(ONE_PROCESS)];
    let released = |owner: &Owner| Event::ReleasedBy {
        pid: owner.pid,
        uuid: owner.uuid,
        lockspace: b"",
        name: b"disk",
    };
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
    events.push(Event::OwnerEnded { pid: ONE_PROCESS });
    assert!(holders_after(ledger::VERSION, &events).is_empty());
}

#[test]
fn what_several_domains_of_a_process_held_in_an_earlier_format_is_of_any_of_them() {
    let [one, other, stranger] = [domain(1), domain(2), owner(78, b"stranger")];
    let client = Event::Connected {
        descriptor: 5,
        server: Service::Lock,
        id: 1,
        peer: None,
        start_time: None,
        connected_at: 0,
        refused: false,
    };
    let registered = Event::Registered {
        descriptor: 5,
        owner: (&other).into(),
    };
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
        Event::Released {
            pid: ONE_PROCESS,
            lockspace: b"",
            name: b"a",
        },
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
fn a_ledger_of_an_earlier_format_is_written_anew_before_it_is_gone_on_with() {
    for (version, is_stale) in [(2, true), (ledger::VERSION, false)] {
        let content = read_saved(&format!("format-{version}.bin"));
        let memory = nix::sys::memfd::memfd_create(c"ledger", nix::sys::memfd::MFdFlags::empty());
        let memory = memory.expect("a memory file");
        nix::unistd::write(&memory, &content).expect("fill it");
        let (_, ledger) = Ledger::take_over(memory).expect("take it over");
        assert_eq!(ledger.is_stale(), is_stale, "format {version}");
    }
}

#[test]
fn a_truncated_ledger_is_refused() {
    let refused = ledger::replay(&read_saved("format-2-truncated.bin"));
    assert!(
        matches!(refused, Err(Unreadable::Damaged(_))),
        "{refused:?}"
    );
    let whole = read_saved("format-2.bin");
    for length in 0..whole.len() {
        assert!(ledger::replay(&whole[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn a_ledger_with_a_flipped_bit_is_refused() {
    let refused = ledger::replay(&read_saved("format-2-flipped.bin"));
    assert!(
        matches!(refused, Err(Unreadable::Damaged(_))),
        "{refused:?}"
    );
    let whole = read_saved("format-2.bin");
    for position in HEADER..whole.len() {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[position] ^= 1 << bit;
            let refused = ledger::replay(&damaged);
            assert!(refused.is_err(), "bit {bit} of byte {position}");
        }
    }
}

#[test]
fn a_ledger_of_a_later_format_says_so() {
    let mut later = read_saved("format-2.bin");
    let next = ledger::VERSION + 1;
    later[8..12].copy_from_slice(&next.to_le_bytes());
    assert_eq!(ledger::replay(&later), Err(Unreadable::Version(next)));
    later[8..12].fill(0);
    assert_eq!(ledger::replay(&later), Err(Unreadable::Version(0)));
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

fn any_server() -> impl Strategy<Value = ServerState> {
    (
        any::<u32>(),
        any::<u32>(),
        any::<Option<u32>>(),
        any::<u64>(),
        any::<[u32; 3]>(),
    )
        .prop_map(
            |(limit, unauthenticated_limit, configured, next_id, workers)| ServerState {
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

fn any_client() -> impl Strategy<Value = ClientState> {
    (
        any_service(),
        0..u64::MAX,
        prop::option::of(any_peer()),
        any::<Option<u64>>(),
        any::<i64>(),
        prop::sample::select(vec![(false, false), (false, true), (true, false)]),
        prop::option::of(any_owner()),
        any::<bool>(),
        any_traffic(),
    )
        .prop_map(
            |(server, id, peer, start_time, connected_at, stage, owner, restricted, traffic)| {
                ClientState {
                    descriptor: 0,
                    server,
                    id,
                    peer,
                    start_time,
                    connected_at,
                    // One that made a call was not refused.
                    has_called: stage.0,
                    refused: stage.1,
                    owner,
                    restricted,
                    traffic,
                }
            },
        )
}

fn any_resource() -> impl Strategy<Value = ResourceState> {
    (
        (bytes(), bytes()),
        (any::<u64>(), any::<u64>()),
        prop::sample::select(vec![Mode::Exclusive, Mode::Shared]),
        any::<bool>(),
        any::<bool>(),
        prop::sample::select(vec![LockKindState::OpenFile, LockKindState::Process]),
        prop::collection::vec(any::<i32>(), 0..3),
        prop::collection::vec((any_holder(), 1..4u32), 1..4),
    )
        .prop_map(
            |((lockspace, name), file, mode, autocreate, created, kind, parked, mut holders)| {
                let mut seen = BTreeSet::new();
                holders.retain(|(owner, _)| seen.insert(owner.key()));
                ResourceState {
                    lockspace,
                    name,
                    descriptor: 0,
                    identity: Some(FileIdentity {
                        device: file.0,
                        inode: file.1,
                    }),
                    mode,
                    autocreate,
                    created,
                    kind,
                    parked,
                    holders,
                }
            },
        )
}

fn any_fence() -> impl Strategy<Value = FenceState> {
    (any::<i32>(), any::<i32>(), any::<bool>(), any::<u64>()).prop_map(
        |(pid, descriptor, killed, next_step)| FenceState {
            pid,
            descriptor,
            killed,
            next_step: Moment(next_step),
        },
    )
}

fn any_process() -> impl Strategy<Value = ProcessState> {
    (
        prop::option::of((any::<i32>(), bytes())),
        prop::option::of(bytes()),
        bytes(),
        any::<u32>(),
        (any::<u32>(), ".{0,20}", ".{0,20}", ".{0,20}"),
    )
        .prop_map(
            |(pid_file, config_file, program, idle_timeout_s, log)| ProcessState {
                pid_file,
                config_file,
                program,
                idle_timeout_s,
                logging: LogState {
                    level: log.0,
                    filters: log.1,
                    outputs: log.2,
                    default_output: log.3,
                },
            },
        )
}

fn any_listener() -> impl Strategy<Value = ListenerState> {
    (any_service(), any::<i32>(), prop::option::of(bytes())).prop_map(
        |(server, descriptor, path)| ListenerState {
            server,
            descriptor,
            path,
        },
    )
}

fn any_watch() -> impl Strategy<Value = WatchState> {
    (any::<i32>(), any::<Option<i32>>())
        .prop_map(|(pid, descriptor)| WatchState { pid, descriptor })
}

fn any_state() -> impl Strategy<Value = State> {
    (
        any_server(),
        any_server(),
        prop::collection::vec(any_listener(), 0..4),
        prop::collection::vec(any_client(), 0..6),
        prop::collection::vec(bytes(), 0..3),
        prop::collection::vec(any_resource(), 0..8),
        prop::collection::vec(any_fence(), 0..3),
        prop::collection::vec(any_watch(), 0..3),
        any_process(),
    )
        .prop_map(
            |(lock, admin, listeners, clients, lockspaces, resources, fences, watches, process)| {
                let mut state = State {
                    lock_server: lock,
                    admin_server: admin,
                    listeners,
                    clients,
                    lockspaces,
                    resources,
                    fences,
                    watches,
                    process,
                    poll: None,
                };
                // Descriptors are numbers of things that are open at the same time.
                for (number, client) in (100..).zip(&mut state.clients) {
                    client.descriptor = number;
                }
                for (number, resource) in (200..).zip(&mut state.resources) {
                    resource.descriptor = number;
                }
                let mut seen = BTreeSet::new();
                state
                    .resources
                    .retain(|one| seen.insert((one.lockspace.clone(), one.name.clone())));
                let mut seen = BTreeSet::new();
                state.fences.retain(|fence| seen.insert(fence.pid));
                let mut seen = BTreeSet::new();
                state.watches.retain(|watch| seen.insert(watch.pid));
                state
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_state_comes_back_from_its_ledger(state in any_state()) {
        let ledger = Ledger::of(&state).expect("memory for a ledger");
        let open = ledger::replay(ledger.content()).expect("a ledger that is still written");
        prop_assert_eq!(sorted(open), sorted(state.clone()));
        let closed = ledger::replay(&closed_ledger(&state)).expect("a closed ledger");
        prop_assert_eq!(sorted(closed), sorted(state));
    }

    #[test]
    fn no_damage_to_a_ledger_that_is_still_written_is_a_panic(
        state in any_state(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut content = Ledger::of(&state).expect("memory for a ledger").content().to_vec();
        for (position, byte) in damage {
            let position = position.index(content.len());
            content[position] = byte;
        }
        // Refused or not: what is accepted can be written down again.
        if let Ok(state) = ledger::replay(&content) {
            let again = closed_ledger(&state);
            prop_assert!(ledger::replay(&again).is_ok());
        }
    }

    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(ledger::replay(&bytes).is_err() || bytes.len() >= HEADER);
        let _ = libvirt_json::read(&bytes, 1, |_| Vec::new());
    }

    #[test]
    fn any_state_that_libvirt_can_have_comes_back_from_its_document(state in libvirt_state()) {
        let document = libvirt_json::write(&state, 4242).expect("a document");
        let back = libvirt_json::read(&document, 4242, socket_path).expect("a state");
        prop_assert_eq!(by_descriptor(back), by_descriptor(as_the_document_says(state)));
        let foreign = libvirt_json::read(&document, 4243, socket_path);
        prop_assert_eq!(foreign, Err(Unusable::Foreign("4242".into())));
    }

    #[test]
    fn a_document_that_is_cut_short_is_damaged(
        state in libvirt_state(),
        cut in any::<prop::sample::Index>(),
    ) {
        let document = libvirt_json::write(&state, 4242).expect("a document");
        let cut = cut.index(document.len());
        let read = libvirt_json::read(&document[..cut], 4242, socket_path);
        prop_assert!(matches!(read, Err(Unusable::Damaged(_))));
    }
}

fn socket_path(service: Service) -> Vec<u8> {
    format!("/run/libvirt/{}-sock", service.name()).into_bytes()
}

/// States that the document has words for.
fn libvirt_state() -> impl Strategy<Value = State> {
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
            state.watches.clear();
            state.process = ProcessState::default();
            for directory in &mut state.lockspaces {
                *directory = name();
            }
            for (number, listener) in (50..).zip(&mut state.listeners) {
                listener.descriptor = number;
                listener.path = listener.path.as_ref().map(|_| socket_path(listener.server));
            }
            for (number, client) in (0usize..).zip(&mut state.clients) {
                client.traffic = Traffic::default();
                client.refused = false;
                client.id = number as u64 + 1;
                client.owner = match client.server {
                    Service::Admin => None,
                    Service::Lock => people.get(number).cloned(),
                };
                client.restricted &= client.server == Service::Lock;
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
fn as_the_document_says(mut state: State) -> State {
    let mut known: BTreeMap<i32, Owner> = BTreeMap::new();
    for owner in state.clients.iter().filter_map(|it| it.owner.clone()) {
        let pid = owner.pid;
        if known.insert(pid, owner).is_some() {
            // Which of the domains holds what is not written there.
            known.insert(pid, Owner::unknown(pid));
        }
    }
    for client in &mut state.clients {
        (client.peer, client.start_time, client.has_called) = (None, None, false);
    }
    for resource in &mut state.resources {
        (resource.identity, resource.created) = (None, false);
        resource.kind = LockKindState::Unknown;
        for (owner, _) in &mut resource.holders {
            let unknown = || Owner::unknown(owner.pid);
            *owner = known.get(&owner.pid).cloned().unwrap_or_else(unknown);
        }
        resource.holders.sort_by_key(|(owner, _)| owner.pid);
    }
    for server in [&mut state.lock_server, &mut state.admin_server] {
        server.configured = None;
    }
    state
}

fn by_descriptor(mut state: State) -> State {
    state.clients.sort_by_key(|client| client.descriptor);
    state.resources.sort_by_key(|resource| resource.descriptor);
    state.listeners.sort_by_key(|listener| listener.descriptor);
    state
}

#[test]
fn events_that_speak_of_nobody_are_refused() {
    let gone = [
        Event::Gone { descriptor: 9 },
        Event::Restricted { descriptor: 9 },
        Event::Released {
            pid: 1,
            lockspace: b"",
            name: b"disk",
        },
        Event::ReleasedBy {
            pid: 1,
            uuid: [1; 16],
            lockspace: b"",
            name: b"disk",
        },
    ];
    for event in gone {
        let mut ledger = Ledger::new().expect("memory for a ledger");
        ledger.append(&event).expect("room for one event");
        let refused = ledger::replay(ledger.content());
        assert!(matches!(refused, Err(Unreadable::Damaged(_))), "{event:?}");
    }
}
