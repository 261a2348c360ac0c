//! The ledger alone: what a call pays for having its change written down before it is answered, what
//! writing it anew costs for each guest, and what reading it costs a successor.

mod support;

use std::hint::black_box;

use support::{Cost, Table as Report, cost, spent};
use virtlockd::custody::clients::Arrival;
use virtlockd::custody::descriptor::{Number, Saved};
use virtlockd::custody::event::{Event, KindRecord, ResourceName};
use virtlockd::custody::ledger::{self, Ledger};
use virtlockd::custody::servers::Service;
use virtlockd::custody::state::State;
use virtlockd::host::file::FileIdentity;
use virtlockd::locks::table::{Mode, Owner};

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

fn descriptor(number: u32) -> Number {
    Number(i32::try_from(10 + number).expect("a small number"))
}

fn granted<'a>(owner: &'a Owner, name: &'a [u8], descriptor: Number, inode: u64) -> Event<'a> {
    Event::Granted {
        owner: owner.into(),
        resource: ResourceName {
            lockspace: b"",
            name,
        },
        descriptor,
        identity: FileIdentity { device: 1, inode },
        mode: Mode::Exclusive,
        autocreate: false,
        created: false,
        kind: KindRecord::OpenFile,
        since: 1_795_325_634_000,
    }
}

/// Guests with one connection and two locks each.
fn state(guests: u32) -> State<Saved> {
    let mut state = State::default();
    for number in 0..guests {
        let owner = owner(number);
        let client = descriptor(number * 3);
        let arrival = Arrival {
            server: Service::Lock,
            id: u64::from(number) + 1,
            peer: None,
            start_time: None,
            connected_at: 1_795_325_634,
            refused: false,
        };
        let name = |disk| format!("/var/lib/libvirt/images/guest-{number}-{disk}.raw");
        let names = [name(1), name(2)];
        let disks = (1..).zip(&names).map(|(disk, name)| {
            let number = number * 3 + disk;
            granted(
                &owner,
                name.as_bytes(),
                descriptor(number),
                u64::from(number),
            )
        });
        let client = [
            Event::Connected(client, arrival),
            Event::Called(client),
            Event::Registered(client, (&owner).into()),
            Event::Restricted(client),
        ];
        state = state
            .with(client.into_iter().chain(disks))
            .expect("events that fit");
    }
    state
}

fn ledger_of(state: &State<Saved>) -> Ledger {
    let mut ledger = Ledger::new().expect("memory for a ledger");
    let written = ledger.rewrite(state.entries());
    written.expect("room in the ledger");
    ledger
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
            let mut ledger = ledger_of(&state);
            spent(|| {
                for _ in 0..CALLS {
                    let granted = granted(&owner, name, Number(9), 1 << 40);
                    let resource = ResourceName {
                        lockspace: b"",
                        name,
                    };
                    let released = Event::ReleasedBy(owner.pid, owner.uuid, resource);
                    ledger.append(&granted).expect("room in the ledger");
                    ledger.append(&released).expect("room in the ledger");
                }
            })
        });
        let written = cost(request.time(), u64::from(guests), || {
            spent(|| drop(black_box(ledger_of(&state))))
        });
        let ledger = ledger_of(&state);
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
