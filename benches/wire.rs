//! Bytes to calls and calls to bytes: nanoseconds and bytes per second for each call of the lock
//! program, as a connection does it. Neither direction may allocate.

mod support;

use std::hint::black_box;

use support::{Cost, Request, Table, cost, spent};
use virtlockd::wire::frame::{Frame, Split, split};
use virtlockd::wire::lock::{self, Call, LONGEST_FRAME, Procedure, SHARED, Target, encode_success};

/// Operations between two looks at the clock.
const BATCH: u64 = 1000;

fn main() {
    let Some(request) = support::request() else {
        return;
    };
    let columns = [
        "call",
        "bytes",
        "decode ns",
        "decode MB/s",
        "encode ns",
        "encode MB/s",
    ];
    let mut table = Table::new(&columns);
    for (name, call) in calls() {
        let mut bytes = Vec::with_capacity(LONGEST_FRAME);
        call.encode(&mut bytes, 7);
        let decode = decode_cost(&request, &bytes, call);
        let encode = encode_cost(&request, |out| call.encode(out, black_box(7)));
        row(&mut table, name, bytes.len(), Some(decode), encode);
    }
    let mut call = Vec::new();
    calls()[0].1.encode(&mut call, 7);
    let header = whole_frame(&call).header;
    let mut bytes = Vec::with_capacity(LONGEST_FRAME);
    encode_success(&mut bytes, header);
    let encode = encode_cost(&request, |out| encode_success(out, black_box(header)));
    row(
        &mut table,
        "reply without a result",
        bytes.len(),
        None,
        encode,
    );
    request.report("wire", table.text());
}

/// Every call, with strings of the length that libvirt sends.
fn calls() -> [(&'static str, Call<'static>); 8] {
    let disk = Target {
        lockspace: b"",
        name: b"/var/lib/libvirt/images/guest-0815.raw",
    };
    let hashed = Target {
        lockspace: b"/var/lib/libvirt/lockd/files",
        name: b"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    };
    let register = Call::Register {
        uuid: &[7; 16],
        name: b"guest-0815",
        id: 815,
        pid: 4711,
        flags: 0,
    };
    [
        ("REGISTER", register),
        ("RESTRICT", Call::Restrict { flags: 0 }),
        (
            "NEW",
            Call::New {
                path: hashed.lockspace,
                flags: 0,
            },
        ),
        (
            "CREATE_RESOURCE",
            Call::CreateResource {
                target: hashed,
                flags: 0,
            },
        ),
        (
            "DELETE_RESOURCE",
            Call::DeleteResource {
                target: hashed,
                flags: 0,
            },
        ),
        (
            "ACQUIRE_RESOURCE",
            Call::AcquireResource {
                target: disk,
                flags: SHARED,
            },
        ),
        (
            "RELEASE_RESOURCE",
            Call::ReleaseResource {
                target: disk,
                flags: 0,
            },
        ),
        (
            "CREATE_LOCKSPACE",
            Call::CreateLockspace {
                path: hashed.lockspace,
            },
        ),
    ]
}

fn whole_frame(bytes: &[u8]) -> Frame<'_> {
    match split(bytes, LONGEST_FRAME) {
        Split::Frame(frame) => frame,
        other => panic!("an encoded call is split as {other:?}"),
    }
}

fn decode_call(bytes: &[u8]) -> Call<'_> {
    let frame = whole_frame(bytes);
    let procedure = Procedure::from_number(frame.header.procedure).expect("a known procedure");
    lock::decode(procedure, frame.payload).expect("an encoded call decodes")
}

fn decode_cost(request: &Request, bytes: &[u8], call: Call<'_>) -> Cost {
    assert_eq!(
        decode_call(bytes),
        call,
        "a call is not read as it was written"
    );
    cost(request.time(), BATCH, || {
        spent(|| {
            for _ in 0..BATCH {
                black_box(decode_call(black_box(bytes)));
            }
        })
    })
}

fn encode_cost(request: &Request, encode: impl Fn(&mut Vec<u8>)) -> Cost {
    let mut out = Vec::with_capacity(LONGEST_FRAME);
    cost(request.time(), BATCH, || {
        spent(|| {
            for _ in 0..BATCH {
                out.clear();
                encode(&mut out);
                black_box(&out);
            }
        })
    })
}

fn row(table: &mut Table, name: &str, bytes: usize, decode: Option<Cost>, encode: Cost) {
    for cost in decode.iter().chain([&encode]) {
        assert!(
            cost.allocations == 0.0,
            "{name}: {} allocations a frame",
            cost.allocations
        );
    }
    let ns = |cost: &Cost| format!("{:.1}", cost.ns);
    let rate = |cost: &Cost| format!("{:.0}", bytes as f64 * 1e3 / cost.ns);
    let none = || "-".to_owned();
    table.row(&[
        name,
        &bytes.to_string(),
        &decode.as_ref().map_or_else(none, ns),
        &decode.as_ref().map_or_else(none, rate),
        &ns(&encode),
        &rate(&encode),
    ]);
}
