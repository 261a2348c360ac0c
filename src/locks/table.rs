//! The flat table of held resources: who holds what, and may somebody else have it?
//!
//! Every resource that is held has one entry, found in three ways: by lockspace and name, by the
//! identity of its file, and by the process that owns it. Each step costs what the one owner or the
//! one resource holds, however many there are. The table never touches a file: what stands for the
//! kernel's lock is a value `L` that it keeps and hands back.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use foldhash::{HashMap, HashMapExt};
use slab::Slab;

use crate::host::file::FileIdentity;

/// A process id, as an owner registered it. Any number may be registered, also one of no process.
pub type Pid = i32;

/// A resource's place in the table, as long as somebody holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceId(usize);

/// Whether others may hold a resource at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Mode {
    /// Nobody else.
    Exclusive,
    /// Others that hold it shared, too.
    Shared,
}

/// Who a lock is for, as REGISTER said. Cheap to copy: each of an owner's entries has its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub pid: Pid,
    /// The domain's id, never 0.
    pub id: u32,
    /// The domain's name.
    pub name: Rc<[u8]>,
    /// The domain's uuid.
    pub uuid: [u8; 16],
}

impl Owner {
    /// Whether nothing but its number is known.
    pub fn is_unnamed(&self) -> bool {
        self.name.is_empty() && self.uuid == [0; 16]
    }
}

/// A lockspace and a name in it, as one string of bytes: neither can hold a NUL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key(Rc<[u8]>);

impl Key {
    fn lockspace(&self, length: usize) -> &[u8] {
        self.0.get(..length).unwrap_or_default()
    }

    fn name(&self, lockspace_length: usize) -> &[u8] {
        self.0
            .get(lockspace_length.saturating_add(1)..)
            .unwrap_or_default()
    }
}

impl std::borrow::Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// The lockspace and the name of a resource that is in the table no more.
#[derive(Clone, Debug)]
pub struct Name {
    key: Key,
    lockspace_length: usize,
}

impl Name {
    /// The lockspace's directory; empty for the default one.
    pub fn lockspace(&self) -> &[u8] {
        self.key.lockspace(self.lockspace_length)
    }

    /// The name in the lockspace.
    pub fn name(&self) -> &[u8] {
        self.key.name(self.lockspace_length)
    }
}

/// A resource that somebody holds.
#[derive(Debug)]
pub struct Resource<L> {
    key: Key,
    lockspace_length: usize,
    /// The file.
    pub identity: FileIdentity,
    /// As the first owner took it.
    pub mode: Mode,
    /// Whether the first owner wanted the file made, and so removed at the end.
    pub autocreate: bool,
    /// The kernel's lock.
    pub lease: L,
    holders: Holders,
    /// Another resource that is the same file. Only a daemon that did not compare files can have
    /// granted it: the C daemon, whose state was taken over.
    next_of_identity: Option<ResourceId>,
}

impl<L> Resource<L> {
    /// Takes the resource apart: its lease, and where its file is.
    pub fn into_lease(self) -> (L, Name) {
        (
            self.lease,
            Name {
                key: self.key,
                lockspace_length: self.lockspace_length,
            },
        )
    }

    /// The lockspace's directory; empty for the default one.
    pub fn lockspace(&self) -> &[u8] {
        self.key.lockspace(self.lockspace_length)
    }

    /// The name in the lockspace.
    pub fn name(&self) -> &[u8] {
        self.key.name(self.lockspace_length)
    }

    /// The processes that hold it, each with how often.
    pub fn holders(&self) -> impl Iterator<Item = (Pid, u32)> {
        match &self.holders {
            Holders::One { pid, times } => Some((*pid, *times)).into_iter().chain(Vec::new()),
            Holders::Many(many) => {
                let all: Vec<_> = many.iter().map(|(pid, times)| (*pid, *times)).collect();
                None.into_iter().chain(all)
            }
        }
    }
}

/// Nearly every resource has one holder; a shared one may have thousands.
#[derive(Debug)]
enum Holders {
    One { pid: Pid, times: u32 },
    Many(BTreeMap<Pid, u32>),
}

/// What is left of a resource after one holding of it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The same process holds it once more.
    ByTheSame,
    /// Others hold it.
    ByOthers,
    /// Nobody does.
    Nothing,
}

impl Holders {
    fn add(&mut self, pid: Pid) -> bool {
        match self {
            Holders::One { pid: only, times } if *only == pid => {
                *times = times.saturating_add(1);
                false
            }
            Holders::One { pid: only, times } => {
                *self = Holders::Many(BTreeMap::from([(*only, *times), (pid, 1)]));
                true
            }
            Holders::Many(many) => {
                let times = many.entry(pid).or_insert(0);
                *times = times.saturating_add(1);
                *times == 1
            }
        }
    }

    fn times(&self, pid: Pid) -> u32 {
        match self {
            Holders::One { pid: only, times } if *only == pid => *times,
            Holders::One { .. } => 0,
            Holders::Many(many) => many.get(&pid).copied().unwrap_or(0),
        }
    }

    /// Takes `count` holdings away from `pid`, which has at least as many.
    fn remove(&mut self, pid: Pid, count: u32) -> Left {
        match self {
            Holders::One { times, .. } => {
                *times = times.saturating_sub(count);
                if *times > 0 {
                    Left::ByTheSame
                } else {
                    Left::Nothing
                }
            }
            Holders::Many(many) => {
                let times = many.entry(pid).or_insert(0);
                *times = times.saturating_sub(count);
                if *times > 0 {
                    return Left::ByTheSame;
                }
                many.remove(&pid);
                if many.is_empty() {
                    Left::Nothing
                } else {
                    Left::ByOthers
                }
            }
        }
    }

    fn any(&self) -> Option<Pid> {
        match self {
            Holders::One { pid, .. } => Some(*pid),
            Holders::Many(many) => many.keys().next().copied(),
        }
    }
}

/// What one process holds.
#[derive(Debug)]
struct Holding {
    owner: Owner,
    resources: Vec<ResourceId>,
}

/// May an owner have a resource?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is held shared and wanted shared: no work on the file is needed.
    Join(ResourceId),
    /// It is held, and the two do not go together.
    Busy(ResourceId),
    /// Nobody holds it under this name: the file decides.
    Open,
}

/// Why a release is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReleased {
    /// Nobody holds it.
    NotHeld,
    /// Others do.
    NotYours,
}

/// The table.
#[derive(Debug)]
pub struct Table<L> {
    resources: Slab<Resource<L>>,
    by_name: HashMap<Key, ResourceId>,
    by_identity: HashMap<FileIdentity, ResourceId>,
    by_owner: HashMap<Pid, Holding>,
    /// Where a key is put together for a look-up, so that it costs no allocation.
    scratch: Vec<u8>,
}

impl<L> Default for Table<L> {
    fn default() -> Self {
        Table {
            resources: Slab::new(),
            by_name: HashMap::new(),
            by_identity: HashMap::new(),
            by_owner: HashMap::new(),
            scratch: Vec::new(),
        }
    }
}

impl<L> Table<L> {
    /// A table in which nothing is held.
    pub fn new() -> Self {
        Table::default()
    }

    /// Makes room for so many resources, to enter them quickly.
    pub fn reserve(&mut self, count: usize) {
        self.resources.reserve(count);
        self.by_name.reserve(count);
        self.by_identity.reserve(count);
    }

    /// How many resources are held.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// The resource `name` of `lockspace`, if somebody holds it.
    pub fn find(&mut self, lockspace: &[u8], name: &[u8]) -> Option<ResourceId> {
        self.spell(lockspace, name);
        let found = self.by_name.get(self.scratch.as_slice()).copied();
        // One huge name must not keep its memory for ever.
        if self.scratch.capacity() > 64 * 1024 {
            self.scratch = Vec::new();
        }
        found
    }

    /// Puts a key together.
    fn spell(&mut self, lockspace: &[u8], name: &[u8]) {
        self.scratch.clear();
        self.scratch.extend_from_slice(lockspace);
        self.scratch.push(0);
        self.scratch.extend_from_slice(name);
    }

    /// The first resource that is this file, if somebody holds one.
    pub fn find_file(&self, identity: FileIdentity) -> Option<ResourceId> {
        self.by_identity.get(&identity).copied()
    }

    /// A held resource.
    pub fn get(&self, id: ResourceId) -> Option<&Resource<L>> {
        self.resources.get(id.0)
    }

    /// A held resource, to change its lease.
    pub fn get_mut(&mut self, id: ResourceId) -> Option<&mut Resource<L>> {
        self.resources.get_mut(id.0)
    }

    /// All held resources.
    pub fn iter(&self) -> impl Iterator<Item = (ResourceId, &Resource<L>)> {
        self.resources
            .iter()
            .map(|(number, resource)| (ResourceId(number), resource))
    }

    /// All held resources that are this file.
    pub fn same_file(&self, identity: FileIdentity) -> impl Iterator<Item = ResourceId> {
        std::iter::successors(self.find_file(identity), |id| {
            self.get(*id)?.next_of_identity
        })
    }

    /// One of the owners of a resource, for a message.
    pub fn an_owner(&self, id: ResourceId) -> Option<&Owner> {
        self.owner(self.get(id)?.holders.any()?)
    }

    /// What a process registered, if it holds anything.
    pub fn owner(&self, pid: Pid) -> Option<&Owner> {
        self.by_owner.get(&pid).map(|holding| &holding.owner)
    }

    /// All processes that hold anything.
    pub fn owners(&self) -> impl Iterator<Item = &Owner> {
        self.by_owner.values().map(|holding| &holding.owner)
    }

    /// How many resources a process holds.
    pub fn held_by(&self, pid: Pid) -> usize {
        self.by_owner
            .get(&pid)
            .map_or(0, |holding| holding.resources.len())
    }

    /// May somebody have the resource in this mode? Not even its only owner may take it twice,
    /// unless both times shared.
    pub fn decide(&mut self, lockspace: &[u8], name: &[u8], mode: Mode) -> Decision {
        match self.find(lockspace, name) {
            None => Decision::Open,
            Some(id) => match (self.get(id).map(|resource| resource.mode), mode) {
                (Some(Mode::Shared), Mode::Shared) => Decision::Join(id),
                _ => Decision::Busy(id),
            },
        }
    }

    /// One more holding of a shared resource, after [`Decision::Join`].
    pub fn join(&mut self, id: ResourceId, owner: &Owner) {
        let Some(resource) = self.resources.get_mut(id.0) else {
            return;
        };
        if resource.holders.add(owner.pid) {
            self.note_holding(owner, id);
        } else if let Some(holding) = self.by_owner.get_mut(&owner.pid) {
            holding.owner.clone_from(owner);
        }
    }

    /// Enters a resource that was locked, after [`Decision::Open`].
    pub fn grant(&mut self, owner: &Owner, granted: Granted<'_, L>) -> ResourceId {
        self.spell(granted.lockspace, granted.name);
        let key = Key(self.scratch.as_slice().into());
        let entry = self.resources.vacant_entry();
        let id = ResourceId(entry.key());
        let next_of_identity = self.by_identity.insert(granted.identity, id);
        entry.insert(Resource {
            key: key.clone(),
            lockspace_length: granted.lockspace.len(),
            identity: granted.identity,
            mode: granted.mode,
            autocreate: granted.autocreate,
            lease: granted.lease,
            holders: Holders::One {
                pid: owner.pid,
                times: 1,
            },
            next_of_identity,
        });
        self.by_name.insert(key, id);
        self.note_holding(owner, id);
        id
    }

    fn note_holding(&mut self, owner: &Owner, id: ResourceId) {
        match self.by_owner.get_mut(&owner.pid) {
            Some(holding) => {
                if holding.owner != *owner {
                    holding.owner.clone_from(owner);
                }
                holding.resources.push(id);
            }
            None => {
                let holding = Holding {
                    owner: owner.clone(),
                    resources: vec![id],
                };
                self.by_owner.insert(owner.pid, holding);
            }
        }
    }

    /// Ends one holding of a process. A resource that nobody holds any more is taken out of the table
    /// and returned; its lease is still to be ended.
    pub fn release(
        &mut self,
        lockspace: &[u8],
        name: &[u8],
        pid: Pid,
    ) -> Result<Option<Resource<L>>, NotReleased> {
        let id = self.find(lockspace, name).ok_or(NotReleased::NotHeld)?;
        let resource = self.resources.get_mut(id.0).ok_or(NotReleased::NotHeld)?;
        if resource.holders.times(pid) == 0 {
            return Err(NotReleased::NotYours);
        }
        let left = resource.holders.remove(pid, 1);
        if left == Left::ByTheSame {
            return Ok(None);
        }
        if let Entry::Occupied(mut holding) = self.by_owner.entry(pid) {
            let resources = &mut holding.get_mut().resources;
            if let Some(position) = resources.iter().position(|held| *held == id) {
                resources.swap_remove(position);
            }
            if resources.is_empty() {
                holding.remove();
            }
        }
        Ok(match left {
            Left::Nothing => self.take_out(id),
            Left::ByTheSame | Left::ByOthers => None,
        })
    }

    /// Ends everything that a process holds, however often it took it. What nobody else holds is
    /// taken out of the table and returned.
    pub fn end_owner(&mut self, pid: Pid) -> Vec<Resource<L>> {
        let Some(holding) = self.by_owner.remove(&pid) else {
            return Vec::new();
        };
        let mut ended = Vec::new();
        for id in holding.resources {
            let Some(resource) = self.resources.get_mut(id.0) else {
                continue;
            };
            let times = resource.holders.times(pid);
            if resource.holders.remove(pid, times) == Left::Nothing {
                ended.extend(self.take_out(id));
            }
        }
        ended
    }

    fn take_out(&mut self, id: ResourceId) -> Option<Resource<L>> {
        let resource = self.resources.try_remove(id.0)?;
        self.by_name.remove(&resource.key);
        let Entry::Occupied(mut first) = self.by_identity.entry(resource.identity) else {
            return Some(resource);
        };
        if *first.get() == id {
            match resource.next_of_identity {
                Some(next) => _ = first.insert(next),
                None => _ = first.remove(),
            }
        } else {
            let first = Some(*first.get());
            let before =
                std::iter::successors(first, |id| self.get(*id)?.next_of_identity).find(|before| {
                    self.get(*before)
                        .is_some_and(|held| held.next_of_identity == Some(id))
                });
            if let Some(held) = before.and_then(|before| self.get_mut(before)) {
                held.next_of_identity = resource.next_of_identity;
            }
        }
        Some(resource)
    }
}

/// What [`Table::grant`] enters.
#[derive(Debug)]
pub struct Granted<'a, L> {
    /// The lockspace's directory; empty for the default one.
    pub lockspace: &'a [u8],
    /// The name in the lockspace.
    pub name: &'a [u8],
    /// The file.
    pub identity: FileIdentity,
    /// As asked for.
    pub mode: Mode,
    /// Whether the file is to be removed at the end.
    pub autocreate: bool,
    /// The kernel's lock.
    pub lease: L,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(pid: Pid) -> Owner {
        Owner {
            pid,
            id: 1,
            name: b"guest"[..].into(),
            uuid: [0; 16],
        }
    }

    fn file(inode: u64) -> FileIdentity {
        FileIdentity { device: 1, inode }
    }

    fn grant(table: &mut Table<u32>, name: &[u8], inode: u64, mode: Mode, pid: Pid) -> ResourceId {
        let granted = Granted {
            lockspace: b"",
            name,
            identity: file(inode),
            mode,
            autocreate: false,
            lease: 0,
        };
        table.grant(&owner(pid), granted)
    }

    #[test]
    fn an_exclusive_resource_is_busy_even_for_its_owner() {
        let mut table = Table::new();
        let id = grant(&mut table, b"a", 1, Mode::Exclusive, 7);
        assert_eq!(table.decide(b"", b"a", Mode::Exclusive), Decision::Busy(id));
        assert_eq!(table.decide(b"", b"a", Mode::Shared), Decision::Busy(id));
        assert_eq!(table.decide(b"x", b"a", Mode::Shared), Decision::Open);
    }

    #[test]
    fn a_shared_resource_is_joined_and_ends_with_its_last_holder() {
        let mut table = Table::new();
        let id = grant(&mut table, b"a", 1, Mode::Shared, 7);
        assert_eq!(table.decide(b"", b"a", Mode::Shared), Decision::Join(id));
        assert_eq!(table.decide(b"", b"a", Mode::Exclusive), Decision::Busy(id));
        table.join(id, &owner(8));
        assert!(matches!(table.release(b"", b"a", 7), Ok(None)));
        assert!(matches!(
            table.release(b"", b"a", 7),
            Err(NotReleased::NotYours)
        ));
        assert!(matches!(table.release(b"", b"a", 8), Ok(Some(_))));
        assert!(matches!(
            table.release(b"", b"a", 8),
            Err(NotReleased::NotHeld)
        ));
        assert!(table.is_empty() && table.owners().next().is_none());
    }

    #[test]
    fn a_double_shared_holding_ends_whole_with_its_owner() {
        let mut table = Table::new();
        let id = grant(&mut table, b"a", 1, Mode::Shared, 7);
        table.join(id, &owner(7));
        assert_eq!(table.held_by(7), 1);
        assert_eq!(table.end_owner(7).len(), 1);
        assert!(table.is_empty());
    }

    #[test]
    fn every_resource_of_one_file_is_found_until_it_ends() {
        let mut table = Table::new();
        let ids: Vec<_> = [b"a", b"b", b"c"]
            .iter()
            .map(|name| grant(&mut table, *name, 1, Mode::Exclusive, 7))
            .collect();
        assert_eq!(table.same_file(file(1)).count(), 3);
        assert!(matches!(table.release(b"", b"b", 7), Ok(Some(_))));
        assert_eq!(
            table.same_file(file(1)).collect::<Vec<_>>(),
            [ids[2], ids[0]]
        );
        assert_eq!(table.end_owner(7).len(), 2);
        assert_eq!(table.find_file(file(1)), None);
    }
}
