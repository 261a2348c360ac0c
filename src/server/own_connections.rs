//! Which domains a process stands for over connections that it made itself. A connection's end means
//! the end of its owner, but not where the same process goes on standing for other domains (Xen's are
//! all libvirtd's own). To see that must not take a look at every connection.

use foldhash::HashMap;

use super::connection::Connection;
use crate::locks::table::{OwnerKey, Pid};

/// How many connections there are that owners made themselves, and that are not over.
#[derive(Debug, Default)]
pub struct OwnConnections {
    of_process: HashMap<Pid, u32>,
    of_owner: HashMap<OwnerKey, u32>,
}

impl OwnConnections {
    /// An owner has one more.
    pub fn add(&mut self, owner: OwnerKey) {
        let of_process = self.of_process.entry(owner.pid).or_insert(0);
        *of_process = of_process.saturating_add(1);
        let of_owner = self.of_owner.entry(owner).or_insert(0);
        *of_owner = of_owner.saturating_add(1);
    }

    /// An owner has one less.
    pub fn remove(&mut self, owner: OwnerKey) {
        take_one(&mut self.of_process, owner.pid);
        take_one(&mut self.of_owner, owner);
    }

    /// A connection stands for another owner than before, or for one at last.
    pub fn replace(&mut self, before: Option<OwnerKey>, now: Option<OwnerKey>) {
        before.into_iter().for_each(|owner| self.remove(owner));
        now.into_iter().for_each(|owner| self.add(owner));
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.of_process.is_empty() && self.of_owner.is_empty()
    }

    /// Whether the process of an owner has connections for other domains.
    pub fn has_other_domains(&self, owner: OwnerKey) -> bool {
        let all = self.of_process.get(&owner.pid).copied().unwrap_or(0);
        all > self.of_owner.get(&owner).copied().unwrap_or(0)
    }
}

fn take_one<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, u32>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

impl Connection {
    /// The owner that this connection stands for, if that made it itself. A peer that cannot be seen
    /// from here (pid 0) stands for nobody.
    pub fn own_owner(&self) -> Option<OwnerKey> {
        let owner = self.session.owner()?;
        (owner.pid > 0 && owner.pid == self.peer.pid).then(|| owner.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_other_domains_until_the_last_connection_of_the_last_one_is_over() {
        let owner = |number| OwnerKey {
            pid: 7,
            uuid: Some([number; 16]),
        };
        let mut own = OwnConnections::default();
        own.add(owner(1));
        own.add(owner(1));
        assert!(!own.has_other_domains(owner(1)));
        own.replace(None, Some(owner(3)));
        own.replace(Some(owner(3)), Some(owner(2)));
        assert!(own.has_other_domains(owner(1)) && own.has_other_domains(owner(2)));
        own.remove(owner(1));
        assert!(own.has_other_domains(owner(2)));
        own.remove(owner(1));
        assert!(!own.has_other_domains(owner(2)));
        // One that is over itself asks, too.
        assert!(own.has_other_domains(owner(1)));
        own.remove(owner(2));
        assert!(own.is_empty());
    }
}
