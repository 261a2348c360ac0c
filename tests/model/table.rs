//! The lock table against the simplest reference that can be: a list of rows, one a holding,
//! searched from end to end. The same random steps are done to both; after each one every index of
//! the table must say what the rows say, and nothing else.
//!
//! A failure prints the shortest steps that show it. `PROPTEST_CASES` makes it run longer.

use proptest::prelude::*;
use virtlockd::host::file::FileIdentity;
use virtlockd::locks::table::{
    Decision, Granted, Mode, NotReleased, Owner, OwnerKey, Pid, Resource, ResourceId, Table,
};

/// Names that a table which glued lockspace and name together carelessly would mix up.
const LOCKSPACES: [&[u8]; 3] = [b"", b"/a", b"/a/b"];
const NAMES: [&[u8]; 4] = [b"", b"c", b"b/c", b"/a"];
const PIDS: [Pid; 4] = [-2, 0, 1, 4242];
/// Domains of a process. Of the first one only the process is known, as of what was libvirt's daemon's.
const DOMAINS: u8 = 3;
const FILES: u64 = 4;

type Key = (&'static [u8], &'static [u8]);

#[derive(Clone, Copy, Debug)]
enum Step {
    Acquire {
        key: Key,
        pid: Pid,
        domain: u8,
        /// The domain's id: a later registration of the same owner replaces the earlier one.
        id: u32,
        mode: Mode,
        file: FileIdentity,
        /// Grant it although the file is held under another name, as the C daemon did.
        whatever_the_file: bool,
    },
    Release {
        key: Key,
        pid: Pid,
        domain: u8,
    },
    EndOwner {
        pid: Pid,
    },
}

fn keys() -> impl Strategy<Value = Key> {
    (0..LOCKSPACES.len(), 0..NAMES.len())
        .prop_map(|(lockspace, name)| (LOCKSPACES[lockspace], NAMES[name]))
}

fn pids() -> impl Strategy<Value = Pid> {
    (0..PIDS.len()).prop_map(|number| PIDS[number])
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Shared), Just(Mode::Exclusive)]
}

fn file(inode: u64) -> FileIdentity {
    FileIdentity { device: 1, inode }
}

fn steps() -> impl Strategy<Value = Step> {
    let owner = (pids(), 0..DOMAINS, 1u32..3);
    let acquire = (keys(), owner, modes(), 0..FILES, any::<bool>());
    prop_oneof![
        6 => acquire.prop_map(|(key, (pid, domain, id), mode, inode, whatever_the_file)| {
            Step::Acquire {
                key,
                pid,
                domain,
                id,
                mode,
                file: file(inode),
                whatever_the_file,
            }
        }),
        3 => (keys(), pids(), 1..DOMAINS)
            .prop_map(|(key, pid, domain)| Step::Release { key, pid, domain }),
        1 => pids().prop_map(|pid| Step::EndOwner { pid }),
    ]
}

fn owner(pid: Pid, domain: u8, id: u32) -> Owner {
    if domain == 0 {
        return Owner::unknown(pid);
    }
    Owner {
        pid,
        id,
        name: format!("guest-{pid}-{domain}-{id}").into_bytes().into(),
        uuid: [domain; 16],
    }
}

fn all_owners() -> impl Iterator<Item = OwnerKey> {
    PIDS.into_iter()
        .flat_map(|pid| (0..DOMAINS).map(move |domain| owner(pid, domain, 1).key()))
}

/// One holding of one owner.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    key: Key,
    owner: OwnerKey,
    mode: Mode,
    file: FileIdentity,
    /// Which grant it belongs to; stands for the kernel's lock.
    ticket: u32,
}

#[derive(Default)]
struct Reference {
    rows: Vec<Row>,
    /// The latest registration of each owner.
    owners: Vec<Owner>,
    tickets: u32,
}

impl Reference {
    fn of_key(&self, key: Key) -> Vec<&Row> {
        self.rows.iter().filter(|row| row.key == key).collect()
    }

    fn remember(&mut self, owner: Owner) {
        self.owners.retain(|known| known.key() != owner.key());
        self.owners.push(owner);
    }

    /// The tickets of the resources of this file, of this process, or all.
    fn tickets(&self, wanted: impl Fn(&Row) -> bool) -> Vec<u32> {
        let mut tickets: Vec<u32> = self
            .rows
            .iter()
            .filter(|row| wanted(row))
            .map(|row| row.ticket)
            .collect();
        tickets.sort_unstable();
        tickets.dedup();
        tickets
    }
}

/// The table and the rows, side by side.
#[derive(Default)]
struct Both {
    table: Table<u32>,
    reference: Reference,
}

impl Both {
    fn ticket(&self, id: ResourceId) -> u32 {
        self.table.get(id).expect("an id that is held").lease
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Acquire {
                key,
                pid,
                domain,
                id,
                mode,
                file,
                whatever_the_file,
            } => self.acquire(key, owner(pid, domain, id), mode, file, whatever_the_file),
            Step::Release { key, pid, domain } => self.release(key, owner(pid, domain, 1).key()),
            Step::EndOwner { pid } => self.end_owner(pid),
        }
        self.check();
    }

    fn acquire(&mut self, key: Key, owner: Owner, mode: Mode, file: FileIdentity, forced: bool) {
        let held = self.reference.of_key(key).first().map(|row| (*row).clone());
        match (self.table.decide(key.0, key.1, mode), held) {
            (Decision::Busy(id), Some(row)) => {
                assert!(mode == Mode::Exclusive || row.mode == Mode::Exclusive);
                assert_eq!(self.ticket(id), row.ticket);
            }
            (Decision::Join(id), Some(row)) => {
                assert_eq!((mode, row.mode), (Mode::Shared, Mode::Shared));
                assert_eq!(self.ticket(id), row.ticket);
                self.table.join(id, &owner);
                let key = owner.key();
                self.reference.remember(owner);
                self.reference.rows.push(Row { owner: key, ..row });
            }
            (Decision::Open, None) => {
                if !forced && self.table.find_file(file).is_some() {
                    return;
                }
                let ticket = self.reference.tickets;
                self.reference.tickets += 1;
                let granted = Granted {
                    lockspace: key.0,
                    name: key.1,
                    identity: file,
                    mode,
                    autocreate: false,
                    since: 0,
                    lease: ticket,
                };
                let vacant = self.table.vacant(key.0, key.1).expect("it is not held");
                let id = self.table.enter(vacant, &owner, granted);
                assert_eq!(self.ticket(id), ticket);
                self.reference.rows.push(Row {
                    key,
                    owner: owner.key(),
                    mode,
                    file,
                    ticket,
                });
                self.reference.remember(owner);
            }
            (decision, held) => panic!("decided {decision:?}, though held is {held:?}"),
        }
    }

    fn release(&mut self, key: Key, owner: OwnerKey) {
        let rows = &mut self.reference.rows;
        let is_held = rows.iter().any(|row| row.key == key);
        let of = |owner| {
            rows.iter()
                .position(|row| row.key == key && row.owner == owner)
        };
        let holding = of(owner).or_else(|| of(OwnerKey::of_process(owner.pid)));
        let released = self.table.release(key.0, key.1, owner);
        let Some(holding) = holding else {
            let expected = if is_held {
                NotReleased::NotYours
            } else {
                NotReleased::NotHeld
            };
            assert_eq!(released.err(), Some(expected));
            return;
        };
        let row = rows.remove(holding);
        let goes_on = rows.iter().any(|row| row.key == key);
        match released.expect("a holding is released") {
            None => assert!(goes_on),
            Some(ended) => {
                assert!(!goes_on);
                assert_eq!(self.ended_ticket(&ended), row.ticket);
            }
        }
    }

    fn end_owner(&mut self, pid: Pid) {
        let before = self.reference.tickets(|row| row.owner.pid == pid);
        self.reference.rows.retain(|row| row.owner.pid != pid);
        let expected: Vec<u32> = before
            .into_iter()
            .filter(|ticket| self.reference.rows.iter().all(|row| row.ticket != *ticket))
            .collect();
        let ended = self.table.end_owner(pid);
        let mut tickets: Vec<u32> = ended.iter().map(|ended| ended.lease).collect();
        tickets.sort_unstable();
        assert_eq!(tickets, expected);
        // The last one of a file says that the file is not held any more.
        if let Some(last) = ended.last() {
            self.ended_ticket(last);
        }
    }

    /// The ticket that an ended resource hands back; what the table says of its file is checked.
    fn ended_ticket(&self, ended: &Resource<u32>) -> u32 {
        let identity = ended.identity;
        let others = self.reference.tickets(|row| row.file == identity);
        match self.table.find_file(identity) {
            None => assert!(others.is_empty()),
            Some(id) => assert!(others.contains(&self.ticket(id))),
        }
        ended.lease
    }

    fn check(&mut self) {
        self.check_names();
        self.check_files();
        self.check_owners();
        let all = self.reference.tickets(|_| true);
        assert_eq!(self.table.len(), all.len());
        assert_eq!(self.table.is_empty(), all.is_empty());
        let mut listed: Vec<u32> = self.table.iter().map(|(_, held)| held.lease).collect();
        listed.sort_unstable();
        assert_eq!(listed, all);
    }

    fn check_names(&mut self) {
        for key in LOCKSPACES
            .into_iter()
            .flat_map(|lockspace| NAMES.map(|name| (lockspace, name)))
        {
            let found = self.table.find(key.0, key.1);
            let rows = self.reference.of_key(key);
            assert_eq!(found.is_some(), !rows.is_empty(), "{key:?}");
            let Some(resource) = found.and_then(|id| self.table.get(id)) else {
                continue;
            };
            assert_eq!((resource.lockspace(), resource.name()), key);
            let mut holders = vec![];
            for row in rows {
                assert_eq!(resource.lease, row.ticket);
                assert_eq!(resource.mode, row.mode);
                assert_eq!(resource.identity, row.file);
                match holders.iter_mut().find(|(owner, _)| *owner == row.owner) {
                    Some((_, times)) => *times += 1,
                    None => holders.push((row.owner, 1u32)),
                }
            }
            holders.sort_unstable();
            assert_eq!(resource.holders().collect::<Vec<_>>(), holders);
            assert!(resource.mode == Mode::Shared || holders.len() == 1 && holders[0].1 == 1);
            assert_eq!(resource.holder_count(), holders.len());
            let named = resource.any_holder().expect("a holder");
            assert!(holders.iter().any(|(owner, _)| *owner == named));
        }
    }

    fn check_files(&self) {
        for file in (0..FILES).map(file) {
            let mut found: Vec<u32> = self
                .table
                .same_file(file)
                .map(|id| self.ticket(id))
                .collect();
            found.sort_unstable();
            assert_eq!(found, self.reference.tickets(|row| row.file == file));
            assert_eq!(self.table.find_file(file).is_none(), found.is_empty());
        }
    }

    fn check_owners(&self) {
        let mut holding = vec![];
        for owner in all_owners() {
            let held = self.reference.tickets(|row| row.owner == owner).len();
            assert_eq!(self.table.held_by(owner), held);
            let registered = self.reference.owners.iter().find(|it| it.key() == owner);
            let expected = registered.filter(|_| held > 0);
            assert_eq!(self.table.owner(owner), expected);
            holding.extend(expected);
        }
        holding.sort_unstable_by_key(|owner| owner.key());
        let mut owners: Vec<&Owner> = self.table.owners().collect();
        owners.sort_unstable_by_key(|owner| owner.key());
        assert_eq!(owners, holding);
        for pid in PIDS {
            let mut of_process: Vec<&Owner> = self.table.owners_of(pid).collect();
            of_process.sort_unstable_by_key(|owner| owner.key());
            let expected: Vec<&Owner> = holding
                .iter()
                .copied()
                .filter(|owner| owner.pid == pid)
                .collect();
            assert_eq!(of_process, expected);
            assert_eq!(self.table.holds(pid), !expected.is_empty());
            assert_eq!(
                self.table.processes().any(|it| it == pid),
                !expected.is_empty()
            );
        }
    }
}

proptest! {
    // A failure is told by its steps, which are short enough to become a test of their own.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_any_steps_every_index_of_the_table_says_what_the_rows_say(
        steps in prop::collection::vec(steps(), 1..80)
    ) {
        let mut both = Both::default();
        for step in steps {
            both.step(step);
        }
        for pid in PIDS {
            both.step(Step::EndOwner { pid });
        }
        prop_assert!(both.table.is_empty());
    }
}
