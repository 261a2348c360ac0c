//! What happened in a run, and the judgement on it: was there an instant in which two exclusive
//! owners had a file, or in which a lock that was granted was free?
//!
//! Each entry has two moments of one monotonic clock, before and after. What is said of a lock is
//! the least that is certain: it is held from the moment its grant was read until the moment before
//! its release was sent, its owner was killed, or its owner was last seen to run. Somebody else had
//! it at some moment between before and after; only if all of that lies in the time in which it was
//! held for certain, something is wrong.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// Nanoseconds since the beginning of the run.
pub type Moment = u64;
/// A process that locks belong to; each has a number of its own.
pub type OwnerId = u32;
/// One of the contended files.
pub type FileId = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Exclusive,
    Shared,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The owner asked for a lock and got it.
    Granted(OwnerId, FileId, Mode),
    /// The owner asked for a lock and did not get it.
    Refused(OwnerId, FileId, Mode),
    /// The owner gave a lock back.
    Released(OwnerId, FileId),
    /// The owner was sent SIGKILL.
    Killed(OwnerId),
    /// The owner closed its connection, for which the daemon kills it.
    Left(OwnerId),
    /// The owner, having left, was seen to run still.
    Runs(OwnerId),
    /// A rival, not through the daemon, had the lock at some moment.
    Robbed(FileId, Mode),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Before the call was sent, the signal sent, the process looked at.
    pub before: Moment,
    /// After the reply was read, the kill had returned, the lock was had.
    pub after: Moment,
    pub what: What,
}

/// A lock that was held for certain from one moment until the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    pub owner: OwnerId,
    pub file: FileId,
    pub mode: Mode,
    pub from: Moment,
    pub until: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Two owners had it at once, and not both shared.
    TwoOwners(Hold, Hold),
    /// It was free, or a rival could not have had it.
    Free(Hold, Entry),
}

/// The locks that were held for certain. The entries of an owner come in the order in which it did
/// things, whatever stands between them.
pub fn holds(entries: &[Entry]) -> Vec<Hold> {
    // From when on an owner may be dead. One that left lives as long as it was seen to.
    let mut killed = HashMap::<OwnerId, Moment>::new();
    let mut left = HashMap::<OwnerId, Moment>::new();
    for entry in entries {
        match entry.what {
            What::Killed(owner) => {
                let moment = killed.entry(owner).or_insert(entry.before);
                *moment = entry.before.min(*moment);
            }
            What::Left(owner) | What::Runs(owner) => {
                let moment = left.entry(owner).or_insert(entry.before);
                *moment = entry.before.max(*moment);
            }
            _ => {}
        }
    }
    let end_of = |owner: OwnerId| {
        let killed = killed.get(&owner).copied().unwrap_or(Moment::MAX);
        let left = left.get(&owner).copied().unwrap_or(Moment::MAX);
        killed.min(left)
    };
    let mut open = HashMap::<(OwnerId, FileId), Hold>::new();
    let mut holds = Vec::new();
    for entry in entries {
        match entry.what {
            What::Granted(owner, file, mode) => {
                let hold = Hold {
                    owner,
                    file,
                    mode,
                    from: entry.after,
                    until: end_of(owner),
                };
                let earlier = open.insert((owner, file), hold);
                assert_eq!(earlier, None, "an owner has a file once");
            }
            What::Released(owner, file) => {
                if let Some(hold) = open.remove(&(owner, file)) {
                    let until = hold.until.min(entry.before);
                    holds.push(Hold { until, ..hold });
                }
            }
            _ => {}
        }
    }
    holds.extend(open.into_values());
    // Granted to somebody who may have been dead by then: not even for a moment certain.
    holds.retain(|hold| hold.from < hold.until);
    holds.sort_by_key(|hold| hold.from);
    holds
}

/// Proves from the entries that no instant had two exclusive owners of a file, or an exclusive and a
/// shared one, and that no lock was free while it was granted. Or the first instant that had.
pub fn check(entries: &[Entry]) -> Result<(), Violation> {
    let holds = holds(entries);
    let mut files = BTreeMap::<FileId, Vec<Hold>>::new();
    for hold in holds {
        files.entry(hold.file).or_default().push(hold);
    }
    for holds in files.values() {
        no_two_owners(holds)?;
    }
    let mut against_exclusive = BTreeMap::new();
    let mut against_shared = BTreeMap::new();
    for (file, holds) in files {
        let exclusive = holds.iter().filter(|hold| hold.mode == Mode::Exclusive);
        against_shared.insert(file, Longest::of(exclusive.copied()));
        against_exclusive.insert(file, Longest::of(holds.into_iter()));
    }
    for entry in entries {
        if let What::Robbed(file, mode) = entry.what {
            let in_the_way = match mode {
                Mode::Exclusive => &against_exclusive,
                Mode::Shared => &against_shared,
            };
            let around = in_the_way.get(&file);
            if let Some(hold) = around.and_then(|holds| holds.around(*entry)) {
                return Err(Violation::Free(hold, *entry));
            }
        }
    }
    Ok(())
}

/// Of one file, in the order of their beginning.
fn no_two_owners(holds: &[Hold]) -> Result<(), Violation> {
    let mut last: Option<Hold> = None;
    let mut last_exclusive: Option<Hold> = None;
    for hold in holds {
        let in_the_way = match hold.mode {
            Mode::Exclusive => last,
            Mode::Shared => last_exclusive,
        };
        if let Some(earlier) = in_the_way
            && hold.from < earlier.until
        {
            return Err(Violation::TwoOwners(earlier, *hold));
        }
        let later = |one: Option<Hold>| match one {
            Some(one) if one.until >= hold.until => Some(one),
            _ => Some(*hold),
        };
        last = later(last);
        if hold.mode == Mode::Exclusive {
            last_exclusive = later(last_exclusive);
        }
    }
    Ok(())
}

/// Of the holds of a file, in the order of their beginning, each time the one that lasts longest so
/// far: there may be a million robberies to look at.
struct Longest(Vec<(Moment, Hold)>);

impl Longest {
    fn of(holds: impl Iterator<Item = Hold>) -> Longest {
        let mut longest: Option<Hold> = None;
        let with_longest = holds.map(|hold| {
            let so_far = longest.filter(|longest| longest.until >= hold.until);
            longest = Some(so_far.unwrap_or(hold));
            (hold.from, so_far.unwrap_or(hold))
        });
        Longest(with_longest.collect())
    }

    /// A hold in which all of a robbery lies.
    fn around(&self, robbery: Entry) -> Option<Hold> {
        let begun = self.0.partition_point(|(from, _)| *from <= robbery.before);
        let (_, longest) = self.0.get(begun.checked_sub(1)?)?;
        (longest.until >= robbery.after).then_some(*longest)
    }
}

impl Violation {
    /// The moment from which on it was wrong.
    pub fn moment(&self) -> Moment {
        match self {
            Violation::TwoOwners(_, later) => later.from,
            Violation::Free(_, robbery) => robbery.before,
        }
    }

    pub fn file(&self) -> FileId {
        match self {
            Violation::TwoOwners(hold, _) | Violation::Free(hold, _) => hold.file,
        }
    }
}

/// The entries as text, one a line, in the order of their beginning.
pub fn text<'a>(entries: impl Iterator<Item = &'a Entry>) -> String {
    let mut sorted: Vec<&Entry> = entries.collect();
    sorted.sort_by_key(|entry| entry.before);
    let mut text = String::new();
    for Entry {
        before,
        after,
        what,
    } in sorted
    {
        let (before, after) = (*before as f64 / 1e6, *after as f64 / 1e6);
        writeln!(text, "{before:14.6} ms .. {after:14.6} ms  {what:?}").expect("write to a string");
    }
    text
}

/// Whether an entry says something of a file, or of an owner.
pub fn concerns(entry: &Entry, of: FileId) -> bool {
    match entry.what {
        What::Granted(_, file, _) | What::Refused(_, file, _) => file == of,
        What::Released(_, file) | What::Robbed(file, _) => file == of,
        What::Killed(_) | What::Left(_) | What::Runs(_) => true,
    }
}

mod judgement {
    //! Histories made by hand, good and bad: the judge must see what is wrong and nothing else.

    use super::Mode::{Exclusive, Shared};
    use super::What::{Granted, Killed, Left, Released, Robbed, Runs};
    use super::*;

    fn entries(list: &[(Moment, Moment, What)]) -> Vec<Entry> {
        let entry = |&(before, after, what)| Entry {
            before,
            after,
            what,
        };
        list.iter().map(entry).collect()
    }

    fn is_good(list: &[(Moment, Moment, What)]) {
        assert_eq!(check(&entries(list)), Ok(()));
    }

    #[track_caller]
    fn has_two_owners(list: &[(Moment, Moment, What)], first: OwnerId, second: OwnerId) {
        match check(&entries(list)) {
            Err(Violation::TwoOwners(one, other)) => {
                assert_eq!((one.owner, other.owner), (first, second));
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn was_free(list: &[(Moment, Moment, What)], owner: OwnerId) {
        match check(&entries(list)) {
            Err(Violation::Free(hold, _)) => assert_eq!(hold.owner, owner),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn two_exclusive_owners_at_once_are_seen() {
        let list = [
            (0, 10, Granted(1, 0, Exclusive)),
            (20, 30, Granted(2, 0, Exclusive)),
            (40, 50, Released(1, 0)),
            (60, 70, Released(2, 0)),
        ];
        has_two_owners(&list, 1, 2);
    }

    #[test]
    fn two_owners_that_never_let_go_are_seen() {
        let list = [
            (0, 10, Granted(1, 0, Exclusive)),
            (20, 30, Granted(2, 0, Exclusive)),
        ];
        has_two_owners(&list, 1, 2);
    }

    #[test]
    fn an_exclusive_owner_beside_a_shared_one_is_seen_whoever_was_first() {
        for (first, second) in [(Exclusive, Shared), (Shared, Exclusive)] {
            let list = [
                (0, 10, Granted(1, 0, first)),
                (20, 30, Granted(2, 0, second)),
                (40, 50, Released(1, 0)),
            ];
            has_two_owners(&list, 1, 2);
        }
    }

    #[test]
    fn a_long_hold_is_seen_behind_many_short_ones() {
        let list = [
            (0, 10, Granted(1, 0, Shared)),
            (11, 12, Granted(2, 0, Shared)),
            (13, 14, Released(2, 0)),
            (15, 16, Granted(3, 0, Shared)),
            (17, 18, Released(3, 0)),
            (19, 20, Granted(4, 0, Exclusive)),
            (30, 40, Released(1, 0)),
            (50, 60, Released(4, 0)),
        ];
        has_two_owners(&list, 1, 4);
    }

    #[test]
    fn shared_owners_and_owners_of_other_files_do_not_meet() {
        is_good(&[
            (0, 10, Granted(1, 0, Shared)),
            (0, 10, Granted(2, 0, Shared)),
            (0, 10, Granted(1, 1, Exclusive)),
            (0, 10, Granted(2, 2, Exclusive)),
        ]);
    }

    #[test]
    fn a_grant_that_is_read_before_the_release_is_answered_is_fine() {
        is_good(&[
            (0, 10, Granted(1, 0, Exclusive)),
            (5, 30, Granted(2, 0, Exclusive)),
            (20, 40, Released(1, 0)),
            (50, 60, Released(2, 0)),
        ]);
    }

    #[test]
    fn what_a_killed_owner_held_may_be_granted_as_soon_as_it_is_killed_and_not_before() {
        let granted_at = |moment| {
            [
                (0, 10, Granted(1, 0, Exclusive)),
                (20, 30, Killed(1)),
                (11, moment, Granted(2, 0, Exclusive)),
                (50, 60, Released(2, 0)),
            ]
        };
        is_good(&granted_at(20));
        has_two_owners(&granted_at(19), 1, 2);
    }

    #[test]
    fn a_grant_to_one_who_may_be_dead_says_nothing() {
        is_good(&[
            (0, 30, Granted(1, 0, Exclusive)),
            (20, 25, Killed(1)),
            (35, 40, Granted(2, 0, Exclusive)),
        ]);
    }

    #[test]
    fn an_owner_that_left_holds_for_as_long_as_it_is_seen_to_run() {
        let granted_at = |moment| {
            [
                (0, 10, Granted(1, 0, Exclusive)),
                (20, 30, Left(1)),
                (40, 45, Runs(1)),
                (90, 95, Runs(1)),
                (41, moment, Granted(2, 0, Exclusive)),
            ]
        };
        is_good(&granted_at(90));
        has_two_owners(&granted_at(89), 1, 2);
    }

    #[test]
    fn a_rival_within_a_hold_is_seen_and_one_at_its_edges_is_not() {
        let robbed = |before, after| {
            [
                (0, 10, Granted(1, 0, Exclusive)),
                (30, 40, Released(1, 0)),
                (before, after, Robbed(0, Exclusive)),
            ]
        };
        was_free(&robbed(10, 30), 1);
        was_free(&robbed(15, 16), 1);
        is_good(&robbed(9, 16));
        is_good(&robbed(15, 31));
        is_good(&robbed(5, 35));
    }

    #[test]
    fn a_rival_may_share_what_is_shared_and_nothing_else() {
        let robbed = |held, wanted| {
            [
                (0, 10, Granted(1, 0, held)),
                (15, 16, Robbed(0, wanted)),
                (15, 16, Robbed(1, Exclusive)),
            ]
        };
        is_good(&robbed(Shared, Shared));
        was_free(&robbed(Shared, Exclusive), 1);
        was_free(&robbed(Exclusive, Shared), 1);
    }

    #[test]
    fn a_rival_within_a_long_hold_is_seen_although_later_ones_are_over() {
        let list = [
            (0, 10, Granted(1, 0, Shared)),
            (11, 12, Granted(2, 0, Shared)),
            (13, 14, Released(2, 0)),
            (15, 16, Robbed(0, Exclusive)),
            (30, 40, Released(1, 0)),
        ];
        was_free(&list, 1);
    }
}
