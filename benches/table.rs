//! The lock table alone, without files: what an acquire, a release and the end of an owner cost
//! beside ten, ten thousand and a million held locks. The three must not differ by more than what
//! the caches of the machine make of it.

mod support;

use std::hint::black_box;
use std::time::Duration;

use support::{Cost, Table as Report, cost, spent};
use virtlockd::host::file::FileIdentity;
use virtlockd::locks::table::{Decision, Granted, Mode, Owner, Table};

const SIZES: [u32; 3] = [10, 10_000, 1_000_000];
/// Disks of a guest.
const DISKS: u32 = 2;
/// Guests that come and go between two looks at the clock; few, so that a small table stays small.
const GUESTS: u32 = 5;
/// How far apart the numbers of guests that come and go lie.
const STRIDE: u32 = 7919;

/// A guest with its disks. Their names are made beforehand: they come from the wire.
struct Guest {
    owner: Owner,
    disks: Vec<(Vec<u8>, FileIdentity)>,
}

impl Guest {
    fn new(number: u32) -> Self {
        let disk = |disk: u32| {
            let inode = u64::from(number * DISKS + disk);
            let name = format!("/var/lib/libvirt/images/guest-{number}-{disk}.raw");
            (name.into_bytes(), FileIdentity { device: 1, inode })
        };
        let owner = Owner {
            pid: i32::try_from(number).expect("a small number"),
            id: number + 1,
            name: format!("guest-{number}").into_bytes().into(),
            uuid: [7; 16],
        };
        Self {
            owner,
            disks: (0..DISKS).map(disk).collect(),
        }
    }

    /// The decisions and the entry of each disk, in the order in which the daemon takes them.
    fn acquire(&self, table: &mut Table<()>) {
        for (name, identity) in &self.disks {
            assert_eq!(table.decide(b"", name, Mode::Exclusive), Decision::Open);
            assert_eq!(table.find_file(*identity), None);
            let granted = Granted {
                lockspace: b"",
                name,
                identity: *identity,
                mode: Mode::Exclusive,
                autocreate: false,
                since: 0,
                lease: (),
            };
            let vacant = table.vacant(b"", name).expect("nobody holds it");
            black_box(table.enter(vacant, &self.owner, granted));
        }
    }

    fn release(&self, table: &mut Table<()>) {
        for (name, _) in &self.disks {
            let released = table.release(b"", name, self.owner.key());
            assert!(matches!(released, Ok(Some(_))));
            black_box(&released);
        }
    }
}

fn main() {
    let Some(request) = support::request() else {
        return;
    };
    let columns = [
        "held locks",
        "acquire ns",
        "release ns",
        "end of an owner with 2 locks ns",
    ];
    let mut report = Report::new(&columns);
    for size in SIZES {
        let mut table = Table::new();
        let guests = size / DISKS;
        for number in 0..guests {
            Guest::new(number).acquire(&mut table);
        }
        assert_eq!(table.len(), size as usize);
        let [acquire, release, end] = measure(&mut table, request.time(), guests);
        assert_eq!(
            table.len(),
            size as usize,
            "the bench leaves the table as it was"
        );
        let cell = |cost: Cost| format!("{:.0} ns, {:.1} allocations", cost.ns, cost.allocations);
        report.row(&[
            &size.to_string(),
            &cell(acquire),
            &cell(release),
            &cell(end),
        ]);
    }
    request.report("table", report.text());
}

/// Guests come and go, always others, so that no single entry stays in the cache.
fn measure(table: &mut Table<()>, time: Duration, first: u32) -> [Cost; 3] {
    let mut next = 0_u32;
    let mut visitors = move || -> Vec<Guest> {
        let guests = (0..GUESTS).map(|_| {
            next = (next + STRIDE) % 1_000_000;
            Guest::new(first + next)
        });
        guests.collect()
    };
    let locks = u64::from(GUESTS * DISKS);
    let acquire = cost(time, locks, || {
        let guests = visitors();
        let took = spent(|| guests.iter().for_each(|guest| guest.acquire(table)));
        guests.iter().for_each(|guest| guest.release(table));
        took
    });
    let release = cost(time, locks, || {
        let guests = visitors();
        guests.iter().for_each(|guest| guest.acquire(table));
        spent(|| guests.iter().for_each(|guest| guest.release(table)))
    });
    let end = cost(time, u64::from(GUESTS), || {
        let guests = visitors();
        guests.iter().for_each(|guest| guest.acquire(table));
        spent(|| {
            for guest in &guests {
                let ended = black_box(table.end_owner(guest.owner.pid));
                assert_eq!(ended.len(), DISKS as usize);
            }
        })
    });
    [acquire, release, end]
}
