//! Which domains processes stand for over connections that they made themselves. A connection's end means
//! the end of its owner, but not where the same process goes on standing for other domains (Xen's are
//! all libvirtd's own); and an owner that has none is watched. Neither must take a look at every
//! connection.

use std::collections::BTreeMap;

use crate::locks::table::{Owner, Pid};

/// A domain's uuid, whole: people write uuids by hand, and what is made of a part or a mixture of such a
/// one is easily the same for two.
type Domain = [u8; 16];

/// How many connections there are that owners made themselves, and that are not over.
#[derive(Debug, Default)]
pub struct OwnConnections {
    counts: BTreeMap<(Pid, Domain), u32>,
}

impl OwnConnections {
    /// An owner has one more.
    pub fn add(&mut self, owner: &Owner) {
        let count = self.counts.entry((owner.pid, owner.uuid)).or_insert(0);
        *count = count.saturating_add(1);
    }

    /// An owner has one less.
    pub fn remove(&mut self, owner: &Owner) {
        let key = (owner.pid, owner.uuid);
        if let Some(count) = self.counts.get_mut(&key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.counts.remove(&key);
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Whether an owner has one.
    pub fn has(&self, pid: Pid, uuid: &Domain) -> bool {
        self.counts.contains_key(&(pid, *uuid))
    }

    /// Whether a process has one, for whichever domain.
    pub fn has_any(&self, pid: Pid) -> bool {
        self.of_process(pid).next().is_some()
    }

    fn of_process(&self, pid: Pid) -> impl Iterator<Item = &Domain> {
        let all = (pid, [0; 16])..=(pid, [u8::MAX; 16]);
        self.counts.range(all).map(|((_, domain), _)| domain)
    }

    /// Whether the process of an owner has connections for other domains.
    pub fn has_other_domains(&self, pid: Pid, uuid: &Domain) -> bool {
        self.of_process(pid).any(|other| other != uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_other_domains_until_the_last_connection_of_the_last_one_is_over() {
        let owner = |number: u8| Owner {
            pid: 7,
            id: 1,
            name: (*b"guest").into(),
            uuid: [number; 16],
        };
        let mut own = OwnConnections::default();
        own.add(&owner(1));
        own.add(&owner(1));
        assert!(own.has(7, &owner(1).uuid) && !own.has(8, &owner(1).uuid));
        assert!(!own.has_other_domains(7, &owner(1).uuid));
        own.add(&owner(2));
        assert!(
            own.has_other_domains(7, &owner(1).uuid) && own.has_other_domains(7, &owner(2).uuid)
        );
        own.remove(&owner(1));
        assert!(own.has_other_domains(7, &owner(2).uuid));
        own.remove(&owner(1));
        assert!(!own.has_other_domains(7, &owner(2).uuid) && !own.has(7, &owner(1).uuid));
        // One that is over itself asks, too.
        assert!(own.has_other_domains(7, &owner(1).uuid));
        own.remove(&owner(2));
        assert!(own.is_empty());
    }
}
