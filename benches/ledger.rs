//! The ledger alone: what a call pays for having its change written down before it is answered, what
//! writing it anew costs for each guest, and what reading it costs a successor.

mod support;

use std::hint::black_box;

use support::{Cost, Table as Report, cost, spent};
use virtlockd::host::file::FileIdentity;
use virtlockd::locks::table::{Mode, Owner};
use virtlockd::restart::event::Event;
use virtlockd::restart::ledger::{self, Ledger};
use virtlockd::restart::state::{
    ClientState, LockKindState, ResourceState, Service, State, Traffic,
};

const SIZES: [u32; 3] = [10, 1000, 6000];
/// Calls between two looks at the clock.
const CALLS: u64 = 1000;

fn owner(number: u32) -> Owner {
    Owner {
        pid: i32::try_from(number).expect("a small number"),
        id: number + 1,
        name: format!("guest-{number}").into_bytes().into(),
        uuid: [7; 16],
    }
}

fn descriptor(number: u32) -> i32 {
    i32::try_from(10 + number).expect("a small number")
}

/// Guests with one connection and two locks each.
fn state(guests: u32) -> State {
    let mut state = State::default();
    for number in 0..guests {
        let owner = owner(number);
        state.clients.push(ClientState {
            descriptor: descriptor(number * 3),
            server: Service::Lock,
            id: u64::from(number) + 1,
            peer: None,
            start_time: None,
            connected_at: 1_795_325_634,
            has_called: true,
            refused: false,
            owner: Some(owner.clone()),
            restricted: true,
            traffic: Traffic::default(),
        });
        for disk in 1..3 {
            state.resources.push(ResourceState {
                lockspace: Vec::new(),
                name: format!("/var/lib/libvirt/images/guest-{number}-{disk}.raw").into_bytes(),
                descriptor: descriptor(number * 3 + disk),
                identity: Some(FileIdentity {
                    device: 1,
                    inode: u64::from(number * 3 + disk),
                }),
                mode: Mode::Exclusive,
                autocreate: false,
                created: false,
                kind: LockKindState::OpenFile,
                parked: Vec::new(),
                holders: vec![(owner.clone(), 1)],
            });
        }
    }
    state
}

fn main() {
    let Some(request) = support::request() else {
        return;
    };
    let columns = [
        "guests",
        "an acquire and its release",
        "written anew, each guest",
        "read, each guest",
    ];
    let mut report = Report::new(&columns);
    for guests in SIZES {
        let state = state(guests);
        let owner = owner(1_000_000);
        let name: &[u8] = b"/var/lib/libvirt/images/visitor.raw";
        let pair = cost(request.time(), CALLS, || {
            let mut ledger = Ledger::of(&state).expect("memory for a ledger");
            spent(|| {
                for _ in 0..CALLS {
                    let granted = Event::Granted {
                        owner: (&owner).into(),
                        lockspace: b"",
                        name,
                        descriptor: 9,
                        identity: FileIdentity {
                            device: 1,
                            inode: 1 << 40,
                        },
                        mode: Mode::Exclusive,
                        autocreate: false,
                        created: false,
                        kind: LockKindState::OpenFile,
                    };
                    let released = Event::Released {
                        pid: owner.pid,
                        lockspace: b"",
                        name,
                    };
                    ledger.append(&granted).expect("room in the ledger");
                    ledger.append(&released).expect("room in the ledger");
                }
            })
        });
        let written = cost(request.time(), u64::from(guests), || {
            spent(|| drop(black_box(Ledger::of(&state).expect("memory for a ledger"))))
        });
        let ledger = Ledger::of(&state).expect("memory for a ledger");
        let read = cost(request.time(), u64::from(guests), || {
            spent(|| {
                drop(black_box(
                    ledger::replay(ledger.content()).expect("our own ledger"),
                ))
            })
        });
        let cell = |cost: Cost| format!("{:.0} ns, {:.1} allocations", cost.ns, cost.allocations);
        report.row(&[
            &guests.to_string(),
            &cell(pair),
            &cell(written),
            &cell(read),
        ]);
    }
    request.report("ledger", report.text());
}
