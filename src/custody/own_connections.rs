//! Which domains processes stand for over connections that they made themselves. A connection's end means
//! the end of its owner, but not where the same process goes on standing for other domains (Xen's are
//! all libvirtd's own); and an owner that has none is watched. Neither must take a look at every
//! connection.

use std::collections::BTreeMap;

use crate::locks::table::{Owner, Pid};

/// A domain, told apart well enough: the halves of its uuid as one. Each connection of a guest has an
/// entry, so it is short.
type Domain = [u32; 2];

fn domain(uuid: &[u8; 16]) -> Domain {
    let word = |at: usize| {
        let bytes = uuid.get(at..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    [word(0) ^ word(8), word(4) ^ word(12)]
}

/// How many connections there are that owners made themselves, and that are not over.
#[derive(Debug, Default)]
pub struct OwnConnections {
    counts: BTreeMap<(Pid, Domain), u32>,
}

impl OwnConnections {
    /// An owner has one more.
    pub fn add(&mut self, owner: &Owner) {
        let count = self
            .counts
            .entry((owner.pid, domain(&owner.uuid)))
            .or_insert(0);
        *count = count.saturating_add(1);
    }

    /// An owner has one less.
    pub fn remove(&mut self, owner: &Owner) {
        let key = (owner.pid, domain(&owner.uuid));
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
    pub fn has(&self, pid: Pid, uuid: &[u8; 16]) -> bool {
        self.counts.contains_key(&(pid, domain(uuid)))
    }

    /// Whether a process has one, for whichever domain.
    pub fn has_any(&self, pid: Pid) -> bool {
        self.of_process(pid).next().is_some()
    }

    fn of_process(&self, pid: Pid) -> impl Iterator<Item = &Domain> {
        let all = (pid, [0; 2])..=(pid, [u32::MAX; 2]);
        self.counts.range(all).map(|((_, domain), _)| domain)
    }

    /// Whether the process of an owner has connections for other domains.
    pub fn has_other_domains(&self, pid: Pid, uuid: &[u8; 16]) -> bool {
        let own = domain(uuid);
        self.of_process(pid).any(|other| *other != own)
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
            uuid: std::array::from_fn(|at| number.wrapping_mul(at as u8)),
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
