//! Which connections processes made for themselves. A connection's end means the end of its owner, but
//! not where the same process goes on standing for other domains (Xen's are all libvirtd's own); and an
//! owner that has none is watched. Neither must take a look at every connection.

use std::collections::BTreeMap;

use foldhash::HashMap;

use super::clients::ClientId;
use crate::locks::table::Pid;

/// A domain's uuid, whole: people write uuids by hand, and what is made of a part or a mixture of such a
/// one is easily the same for two.
pub type Domain = [u8; 16];

/// The connections that owners made themselves, and that are not over. Nearly every process has one, and
/// there are thousands: so for such a one only the connection is kept, which knows its domain.
#[derive(Debug, Default)]
pub struct OwnConnections {
    one: HashMap<Pid, ClientId>,
    /// How many a process has for each domain, of those that have had several at a time.
    many: BTreeMap<Pid, BTreeMap<Domain, u32>>,
    /// How many are over.
    over: u32,
}

/// When somebody looked. What was there then is there as long as none is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen(u32);

/// What a process has.
#[derive(Clone, Copy, Debug)]
pub enum Own<'a> {
    /// No connection of its own.
    Nothing,
    /// This one.
    One(ClientId),
    /// So many for each domain.
    Many(&'a BTreeMap<Domain, u32>),
}

impl OwnConnections {
    /// What a process has.
    pub fn of(&self, pid: Pid) -> Own<'_> {
        if let Some(id) = self.one.get(&pid) {
            return Own::One(*id);
        }
        self.many.get(&pid).map_or(Own::Nothing, Own::Many)
    }

    /// Whoever looks now saw this.
    pub fn now(&self) -> Seen {
        Seen(self.over.saturating_add(1))
    }

    /// Whether what was there then is there still. Of [`Seen::default`], and after more ends than can be
    /// counted, nobody knows.
    pub fn are_all_there_since(&self, seen: Seen) -> bool {
        seen == self.now() && seen.0 != u32::MAX
    }

    /// A process has one more, for this domain. `domain_of` knows that of the one that it has.
    pub fn add(
        &mut self,
        (pid, id, domain): (Pid, ClientId, Domain),
        domain_of: impl Fn(ClientId) -> Option<Domain>,
    ) {
        if let Some(counts) = self.many.get_mut(&pid) {
            return count(counts, domain);
        }
        let Some(other) = self.one.remove(&pid) else {
            self.one.insert(pid, id);
            return;
        };
        let counts = self.many.entry(pid).or_default();
        if let Some(domain) = domain_of(other) {
            count(counts, domain);
        }
        count(counts, domain);
    }

    /// A process has one less for this domain.
    pub fn remove(&mut self, pid: Pid, domain: Domain) {
        self.over = self.over.saturating_add(1);
        if self.one.remove(&pid).is_some() {
            return;
        }
        let Some(counts) = self.many.get_mut(&pid) else {
            return;
        };
        if let Some(left) = counts.get_mut(&domain) {
            *left = left.saturating_sub(1);
            if *left == 0 {
                counts.remove(&domain);
            }
        }
        if counts.is_empty() {
            self.many.remove(&pid);
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.one.is_empty() && self.many.is_empty()
    }
}

fn count(counts: &mut BTreeMap<Domain, u32>, domain: Domain) {
    let count = counts.entry(domain).or_insert(0);
    *count = count.saturating_add(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_counts_until_a_connection_is_over() {
        let mut own = OwnConnections::default();
        assert!(!own.are_all_there_since(Seen::default()));
        own.add((7, ClientId(10), [1; 16]), |_| None);
        let seen = own.now();
        own.add((8, ClientId(11), [1; 16]), |_| None);
        assert!(own.are_all_there_since(seen));
        own.remove(8, [1; 16]);
        assert!(!own.are_all_there_since(seen) && own.are_all_there_since(own.now()));
        own.over = u32::MAX - 1;
        own.remove(7, [1; 16]);
        assert!(!own.are_all_there_since(own.now()));
    }

    #[test]
    fn the_domains_of_a_process_are_known_until_the_last_connection_of_each_is_over() {
        let mut own = OwnConnections::default();
        let [one, other] = [[1; 16], [2; 16]];
        own.add((7, ClientId(10), one), |_| None);
        assert!(matches!(own.of(7), Own::One(ClientId(10))));
        own.remove(7, one);
        assert!(own.is_empty());
        own.add((7, ClientId(10), one), |_| None);
        own.add((7, ClientId(11), one), |id| (id.0 == 10).then_some(one));
        own.add((7, ClientId(12), other), |_| None);
        own.remove(7, one);
        let Own::Many(counts) = own.of(7) else {
            panic!("it has several");
        };
        assert!(counts.keys().eq(&[one, other]));
        own.remove(7, one);
        assert!(matches!(own.of(7), Own::Many(counts) if counts.keys().eq(&[other])));
        own.remove(7, other);
        own.remove(8, other);
        assert!(own.is_empty() && matches!(own.of(7), Own::Nothing));
    }
}
