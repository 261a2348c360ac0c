//! What the fuzzer starts from: the bytes captured from libvirt's daemon (`tests/protocol/vectors/`),
//! put in the form of each target's input, and a few texts and states for the rest.

use std::path::Path;

use serde_json::Value;
use virtlockd::custody::clients::Arrival;
use virtlockd::custody::descriptor::Number;
use virtlockd::custody::event::{Event, KindRecord, OwnerRecord, ResourceName};
use virtlockd::custody::fences::{Fence, Stage, Watched};
use virtlockd::custody::ledger::Ledger;
use virtlockd::custody::servers::{Listening, Server, Service};
use virtlockd::custody::state::State;
use virtlockd::host::clock::Moment;
use virtlockd::host::file::FileIdentity;
use virtlockd::host::stream::Peer;
use virtlockd::locks::table::Mode;
use virtlockd::restart::libvirt_json;
use virtlockd::wire::frame::{self, Frame, HEADER, LONGEST, STATUS_ERROR, Split};
use virtlockd::wire::status::{
    Call, Cursor, Happened, Holder, Key, Kind, Owner, Resource, encode_next,
};
use virtlockd::wire::xdr::Encoder;
use virtlockd::wire::{admin, lock};

/// An input of a target, named.
pub struct Seed {
    pub target: &'static str,
    pub name: String,
    pub bytes: Vec<u8>,
}

const VECTORS: [&str; 6] = [
    "framing",
    "keepalive",
    "lock_success",
    "lock_errors",
    "limits",
    "admin",
];

/// Longer inputs than this slow the fuzzer down more than they teach it, bytes.
const LONGEST_SEED: usize = 4096;

pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for file in VECTORS {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("tests/protocol/vectors/{file}.jsonl"));
        let text = std::fs::read_to_string(&path).expect("read the vectors");
        for line in text.lines() {
            let vector: Value = serde_json::from_str(line).expect("a vector");
            from_vector(&mut seeds, &vector);
        }
    }
    for (number, steps) in CALLS.into_iter().enumerate() {
        add(
            &mut seeds,
            "connection",
            &format!("calls-{number}"),
            &steps.concat(),
        );
    }
    for (number, steps) in PINGS.into_iter().enumerate() {
        add(&mut seeds, "keepalive", &number.to_string(), steps);
    }
    status_seeds(&mut seeds);
    add(&mut seeds, "config", "empty", b"");
    add(
        &mut seeds,
        "config",
        "default",
        include_bytes!("../src/dist/virtlockd.conf"),
    );
    for (number, text) in CONFIGURATIONS.into_iter().enumerate() {
        add(&mut seeds, "config", &number.to_string(), text.as_bytes());
    }
    for (number, text) in LOG_SETTINGS.into_iter().enumerate() {
        add(
            &mut seeds,
            "log_settings",
            &number.to_string(),
            text.as_bytes(),
        );
    }
    let events = |events: &[Event<'_>]| {
        let mut ledger = Ledger::new().expect("a ledger");
        let before = ledger.content().len();
        for event in events {
            ledger.append(event).expect("room in the ledger");
        }
        ledger.content()[before..].to_vec()
    };
    let (held, ending) = (held(), ending());
    let all = [&held[..], &ending].concat();
    add(&mut seeds, "ledger", "state", &events(&all));
    add(&mut seeds, "ledger", "nothing", &events(&[]));
    let state = State::of_events(held).expect("events that fit");
    let document = libvirt_json::write(&state, 1).expect("a document");
    add(&mut seeds, "libvirt_json", "state", &document);
    seeds
}

/// Calls as the target `connection` chooses them: what to do; procedure, lockspace, name, flags.
const CALLS: [[[u8; 5]; 6]; 5] = [
    // Two owners share a file and give it back.
    [
        [32, 0, 1, 1, 65],
        [33, 0, 1, 2, 66],
        [32, 5, 1, 0, 3],
        [33, 5, 1, 0, 3],
        [32, 9, 1, 0, 0],
        [33, 9, 1, 0, 0],
    ],
    // A disk under two names, shared and not.
    [
        [32, 0, 1, 1, 65],
        [33, 0, 1, 2, 66],
        [32, 5, 0, 9, 1],
        [33, 5, 0, 10, 1],
        [33, 5, 0, 11, 0],
        [33, 5, 0, 9, 1],
    ],
    // A disk under two names; its owner dies.
    [
        [32, 0, 1, 1, 65],
        [32, 5, 0, 9, 0],
        [33, 0, 1, 2, 66],
        [33, 5, 0, 10, 0],
        [48, 5, 0, 9, 1],
        [33, 5, 0, 10, 1],
    ],
    // A lockspace and its files come and go; so do connections.
    [
        [32, 0, 1, 1, 65],
        [32, 2, 4, 0, 0],
        [32, 3, 4, 0, 0],
        [40, 5, 4, 0, 2],
        [33, 0, 1, 1, 65],
        [33, 4, 4, 0, 0],
    ],
    // There is no room for the third one until the first has ended.
    [
        [32, 0, 1, 1, 65],
        [33, 0, 1, 2, 66],
        [35, 5, 1, 0, 3],
        [40, 5, 1, 0, 3],
        [35, 0, 1, 1, 67],
        [35, 5, 1, 0, 1],
    ],
];

/// Inputs of the target `keepalive`: the connection, a plan of pieces, steps.
const PINGS: [&[u8]; 3] = [
    // A PING with a payload; a PONG; a PING that is a call; one of another version.
    &[
        0, 1, 5, 0, 0, 0, 0, 3, 40, 0, 0, 8, 3, 40, 0, 0, 64, 3, 40, 0, 0, 3, 3, 40,
    ],
    // So many of them that the client has to read first.
    &[
        129, 1, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
    // A call with descriptors that names the program, and a PING behind it.
    &[3, 2, 36, 1, 1, 1, 0, 0, 96, 1, 16, 0, 0, 0, 0, 0],
];

const CONFIGURATIONS: [&str; 4] = [
    "log_level = 3\nlog_filters=\"3:remote 4:event\"\nlog_outputs = \"1:stderr\" # why\n",
    "max_clients = 1024\nadmin_max_clients=5 ; log_level = 1\n",
    "key = [ \"a\", 'b', \"\"\"c\nd\"\"\", [ 1, -2 ] ]\n",
    "log_filters = '1:a'\r\n\r\n# end",
];

const LOG_SETTINGS: [&str; 6] = [
    "1:stderr",
    "3:syslog:virtlockd 1:file:/var/log/x.log",
    "2:journald 4:file:relative",
    "3:remote 4:event",
    "1:+util *:x 2:*a?b*",
    "1:qemu.* 2:+*x* 3:",
];

fn add(seeds: &mut Vec<Seed>, target: &'static str, name: &str, bytes: &[u8]) {
    if bytes.len() <= LONGEST_SEED {
        let (name, bytes) = (name.to_owned(), bytes.to_vec());
        seeds.push(Seed {
            target,
            name,
            bytes,
        });
    }
}

fn bytes_of(vector: &Value, key: &str) -> Vec<u8> {
    let digits = vector[key].as_str().unwrap_or_default().as_bytes();
    let digit = |digit: u8| char::from(digit).to_digit(16).expect("a hexadecimal digit") as u8;
    let pairs = digits.as_chunks::<2>().0.iter();
    pairs
        .map(|[high, low]| digit(*high) << 4 | digit(*low))
        .collect()
}

fn from_vector(seeds: &mut Vec<Seed>, vector: &Value) {
    let name = vector["name"].as_str().expect("the vector's name");
    let request = bytes_of(vector, "request_hex");
    let connection = if vector["socket"] == "admin" { 2 } else { 0 };
    let mut steps = Vec::new();
    let setup = vector["setup"].as_array().into_iter().flatten();
    for step in setup {
        // What another connection did before is done by the second one.
        let other = u8::from(connection == 0 && step["conn"] != "self");
        step_of(
            &mut steps,
            connection + other,
            &bytes_of(step, "request_hex"),
        );
    }
    step_of(&mut steps, connection, &request);
    add(seeds, "connection", name, &steps);
    for (kind, plan) in [("whole", &[0u8][..]), ("cut", &[3, 1, 0, 29, 2, 200, 0])] {
        add(
            seeds,
            "frame",
            &format!("{name}-{kind}"),
            &[plan, &request].concat(),
        );
    }
    for connection in 0..4 {
        // In steps, of which each says how many bytes of the stream follow.
        let steps = request.chunks(255).flat_map(|part| {
            let length = u8::try_from(part.len()).expect("a chunk's length");
            [&[1, length], part].concat()
        });
        let plan = [connection, 2, 9, 2, 200, 0];
        let bytes: Vec<u8> = plan.into_iter().chain(steps).collect();
        add(seeds, "keepalive", &format!("{name}-{connection}"), &bytes);
    }
    for Frame {
        header, payload, ..
    } in frames(&request)
    {
        let Ok(procedure) = u8::try_from(header.procedure) else {
            continue;
        };
        match header.program {
            lock::PROGRAM => {
                let choice = procedure.wrapping_sub(1);
                add(seeds, "lock_call", name, &[&[choice], payload].concat());
            }
            admin::PROGRAM => add(seeds, "admin_call", name, &[&[procedure], payload].concat()),
            _ => (),
        }
    }
    for Frame {
        header, payload, ..
    } in frames(&bytes_of(vector, "reply_hex"))
    {
        if header.status == STATUS_ERROR {
            add(seeds, "error_object", name, payload);
        }
    }
}

/// Calls, results and messages of the status program, of which there are no vectors: it is our own.
fn status_seeds(seeds: &mut Vec<Seed>) {
    let target = lock::Target {
        lockspace: b"",
        name: b"/disk",
    };
    let key = Key {
        pid: 7,
        uuid: Some([7; 16]),
    };
    let calls = [
        Call::Daemon,
        Call::Counters,
        Call::Lockspaces(Some(b"/ls")),
        Call::Resources(Cursor::START),
        Call::Owners(Cursor::START),
        Call::Holders(target, Some(key)),
        Call::File {
            device: 1,
            inode: 1,
        },
        Call::Resource(target),
        Call::Subscribe(0x3ff),
    ];
    let mut all = Vec::new();
    for call in calls {
        let mut frame = Vec::new();
        call.encode(&mut frame, 1);
        step_of(&mut all, 2, &frame);
        let choice = call.procedure() as u8;
        let name = format!("{:?}", call.procedure());
        let arguments = &frame[HEADER..];
        add(seeds, "status", &name, &[&[choice], arguments].concat());
        let result = [&[64 + choice][..], &[0; 64]].concat();
        add(seeds, "status", &format!("{name}-result"), &result);
    }
    add(seeds, "connection", "status", &all);
    let owner = Owner {
        key,
        id: 1,
        name: b"guest",
        since: 1,
        held: 1,
        standing: 1,
    };
    let holder = Holder { owner, times: 1 };
    let resource = Resource {
        lockspace: b"",
        name: b"/disk",
        device: 1,
        inode: 1,
        is_shared: true,
        since: 1,
        holders: 1,
    };
    let mut page = vec![64 + 4];
    let mut out = Encoder::new(&mut page);
    out.u32(1);
    resource.encode(&mut out, std::iter::once(holder));
    encode_next(&mut out, Some(Cursor { list: 1, place: 64 }));
    add(seeds, "status", "a-page", &page);
    let happened = Happened {
        kind: Kind::Refused,
        at: 1,
        count: 1,
        owner: Some((key, 1, b"guest")),
        lockspace: b"",
        name: b"/disk",
        mode: 2,
        text: b"is locked",
    };
    let mut message = Vec::new();
    happened.encode(&mut message);
    let payload = &message[HEADER..];
    add(seeds, "status", "a-message", &[&[128], payload].concat());
}

/// The whole frames at the front.
fn frames(mut stream: &[u8]) -> Vec<Frame<'_>> {
    let mut frames = Vec::new();
    while let Split::Frame(frame) = frame::split(stream, LONGEST) {
        debug_assert!(frame.length >= HEADER);
        stream = &stream[frame.length..];
        frames.push(frame);
    }
    frames
}

/// A step of the target `connection`.
fn step_of(steps: &mut Vec<u8>, connection: u8, bytes: &[u8]) {
    for part in bytes.chunks(usize::from(u16::MAX)) {
        let length = u16::try_from(part.len()).expect("a chunk's length");
        steps.push(connection);
        steps.extend_from_slice(&length.to_le_bytes());
        steps.extend_from_slice(part);
    }
}

fn guest(pid: i32) -> OwnerRecord<'static> {
    OwnerRecord {
        pid,
        id: 7,
        name: b"guest",
        uuid: [7; 16],
    }
}

fn granted(
    lockspace: &'static [u8],
    number: i32,
    mode: Mode,
    owner: OwnerRecord<'static>,
) -> Event<'static> {
    Event::Granted {
        owner,
        resource: ResourceName {
            lockspace,
            name: b"/disk",
        },
        descriptor: Number(number),
        identity: FileIdentity {
            device: 1,
            inode: number as u64,
        },
        mode,
        autocreate: !lockspace.is_empty(),
        created: false,
        kind: KindRecord::OpenFile,
        since: 1_795_325_634_000,
    }
}

/// A state that libvirt's document has words for.
fn held() -> Vec<Event<'static>> {
    let mut events = vec![
        Event::Lockspace(b"/lockspace"),
        Event::Listening(Listening {
            server: Service::Lock,
            socket: Number(3),
            path: Some(b"virtlockd".to_vec()),
        }),
    ];
    let peer = Peer {
        pid: 42,
        uid: 0,
        gid: 0,
    };
    for (number, server) in [(4, Service::Lock), (5, Service::Admin)] {
        let arrival = Arrival {
            server,
            id: 1,
            peer: Some(peer),
            start_time: None,
            connected_at: 1_700_000_000,
            refused: false,
        };
        events.push(Event::Connected(Number(number), arrival));
        events.push(Event::Called(Number(number)));
    }
    events.push(Event::Registered(Number(4), guest(42)));
    let shared = ResourceName {
        lockspace: b"/lockspace",
        name: b"/disk",
    };
    events.extend([
        granted(b"", 6, Mode::Exclusive, guest(42)),
        granted(b"/lockspace", 7, Mode::Shared, guest(42)),
        Event::Joined(guest(42), shared),
        Event::Joined(guest(43), shared),
    ]);
    let server = Server {
        limit: 9,
        unauthenticated_limit: 9,
        next_id: 3,
        ..Server::default()
    };
    events.push(Event::Server(Service::Lock, server));
    events
}

/// What may happen then, one of everything.
fn ending() -> Vec<Event<'static>> {
    let watched = [(44, Some(Number(9))), (45, None)];
    let watched = watched.map(|(pid, process)| Event::Watched(Watched { pid, process }));
    let fencing = Event::Fencing(Fence {
        pid: 43,
        process: Number(8),
        stage: Stage::Asked,
        next_step: Moment(1_700_000_000_000),
    });
    let rest = [
        fencing,
        Event::Unreachable(46),
        Event::Unreachable(47),
        Event::Reachable(47),
        granted(b"/other", 10, Mode::Exclusive, guest(48)),
        granted(b"/another", 11, Mode::Exclusive, guest(48)),
        Event::Died(48),
        Event::Freed(Number(11)),
        Event::Leaving(Number(4)),
        Event::Poll(Number(12)),
    ];
    watched.into_iter().chain(rest).collect()
}
