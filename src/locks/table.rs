//! The flat table of held resources: who holds what, and may somebody else have it?
//!
//! Every resource that is held has one entry, found in three ways: by lockspace and name, by the
//! identity of its file, and by its owner: a domain of a process. Each step costs what the one owner or the
//! one resource holds, however many there are. The table never touches a file: what stands for the
//! kernel's lock is a value `L` that it keeps and hands back.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hasher};
use std::ops::Bound;
use std::rc::Rc;

use foldhash::fast::RandomState;
use foldhash::{HashMap, HashMapExt};
use hashbrown::HashTable;
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

/// What tells an owner from every other: its process and, because one process may stand for several
/// domains (Xen's are all libvirtd's), its domain's uuid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerKey {
    /// The process.
    pub pid: Pid,
    /// The domain's uuid. `None` where only the process is known, because libvirt's daemon, from which
    /// the lock was taken over, knows no more: such a lock any domain of the process may give back.
    pub uuid: Option<[u8; 16]>,
}

impl OwnerKey {
    /// The owner of what only the process is known of.
    pub fn of_process(pid: Pid) -> OwnerKey {
        OwnerKey { pid, uuid: None }
    }
}

/// Who a lock is for, as REGISTER said. Cheap to copy: each of an owner's entries has its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub pid: Pid,
    /// The domain's id. 0 where only the process is known: nobody can register that.
    pub id: u32,
    /// The domain's name.
    pub name: Rc<[u8]>,
    /// The domain's uuid.
    pub uuid: [u8; 16],
}

impl Owner {
    /// An owner of which only the process is known.
    pub fn unknown(pid: Pid) -> Owner {
        Owner {
            pid,
            id: 0,
            name: Rc::default(),
            uuid: [0; 16],
        }
    }

    /// What tells it from every other.
    pub fn key(&self) -> OwnerKey {
        OwnerKey {
            pid: self.pid,
            uuid: (self.id != 0).then_some(self.uuid),
        }
    }
}

/// A lockspace and a name in it, as one string of bytes: neither can hold a NUL.
#[derive(Debug)]
struct Key(Box<[u8]>);

impl Key {
    fn lockspace(&self, length: u32) -> &[u8] {
        self.0.get(..length as usize).unwrap_or_default()
    }

    fn name(&self, lockspace_length: u32) -> &[u8] {
        let start = (lockspace_length as usize).saturating_add(1);
        self.0.get(start..).unwrap_or_default()
    }
}

/// A resource that somebody holds.
#[derive(Debug)]
pub struct Resource<L> {
    key: Key,
    /// Four bytes suffice, and with them the whole is short enough to be moved quickly.
    lockspace_length: u32,
    /// The file.
    pub identity: FileIdentity,
    /// As the first owner took it.
    pub mode: Mode,
    /// Whether the first owner wanted the file made, and so removed at the end.
    pub autocreate: bool,
    /// When it was granted first, milliseconds since the epoch; 0 if nobody knows.
    pub since: u64,
    /// The kernel's lock.
    pub lease: L,
    holders: Holders,
    /// Another resource that is the same file. Only a daemon that did not compare files can have
    /// granted it: the C daemon, whose state was taken over.
    next_of_identity: Option<ResourceId>,
}

/// What is known of a resource whose lock is to become something else.
#[derive(Clone, Copy, Debug)]
pub struct Unmapped<'a> {
    /// The name in its lockspace.
    pub name: &'a [u8],
    /// The file, as far as it is known.
    pub identity: FileIdentity,
    /// As the first owner took it.
    pub mode: Mode,
}

impl<L> Resource<L> {
    /// The same resource with something else for the kernel's lock.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn try_map<M, E>(
        self,
        mut make: impl FnMut(Unmapped<'_>, L) -> Result<(FileIdentity, M), E>,
    ) -> Result<Resource<M>, E> {
        let unmapped = Unmapped {
            name: self.key.name(self.lockspace_length),
            identity: self.identity,
            mode: self.mode,
        };
        let (identity, lease) = make(unmapped, self.lease)?;
        Ok(Resource {
            key: self.key,
            lockspace_length: self.lockspace_length,
            identity,
            mode: self.mode,
            autocreate: self.autocreate,
            since: self.since,
            lease,
            holders: self.holders,
            next_of_identity: None,
        })
    }

    /// The lease alone.
    pub fn into_lease(self) -> L {
        self.lease
    }

    /// The lease, to change it, with its lockspace's directory and its name there.
    pub fn lease_mut(&mut self) -> (&mut L, &[u8], &[u8]) {
        let (key, length) = (&self.key, self.lockspace_length);
        (&mut self.lease, key.lockspace(length), key.name(length))
    }

    /// The lockspace's directory; empty for the default one.
    pub fn lockspace(&self) -> &[u8] {
        self.key.lockspace(self.lockspace_length)
    }

    /// The name in the lockspace.
    pub fn name(&self) -> &[u8] {
        self.key.name(self.lockspace_length)
    }

    /// The owners that hold it, each with how often.
    pub fn holders(&self) -> impl Iterator<Item = (OwnerKey, u32)> + Clone {
        match &self.holders {
            Holders::One { owner, times } => Some((*owner, *times)).into_iter().chain(Vec::new()),
            Holders::Many(many) => {
                let all: Vec<_> = many.iter().map(|(owner, times)| (*owner, *times)).collect();
                None.into_iter().chain(all)
            }
        }
    }

    /// Those of them that come behind this one in their order, or all of them.
    pub fn holders_behind(
        &self,
        after: Option<OwnerKey>,
    ) -> impl Iterator<Item = (OwnerKey, u32)> + Clone {
        let (one, many) = match &self.holders {
            Holders::One { owner, times } => (Some((*owner, *times)), None),
            Holders::Many(many) => {
                let start = after.map_or(Bound::Unbounded, Bound::Excluded);
                (None, Some(many.range((start, Bound::Unbounded))))
            }
        };
        let one = one.filter(|(owner, _)| after.is_none_or(|after| *owner > after));
        let many = many.into_iter().flatten();
        one.into_iter()
            .chain(many.map(|(owner, times)| (*owner, *times)))
    }

    /// One of them, for a message.
    pub fn any_holder(&self) -> Option<OwnerKey> {
        match &self.holders {
            Holders::One { owner, .. } => Some(*owner),
            Holders::Many(many) => many.keys().next().copied(),
        }
    }

    /// How many owners hold it.
    pub fn holder_count(&self) -> usize {
        match &self.holders {
            Holders::One { .. } => 1,
            Holders::Many(many) => many.len(),
        }
    }
}

/// Nearly every resource has one holder; a shared one may have thousands.
#[derive(Debug)]
enum Holders {
    One { owner: OwnerKey, times: u32 },
    Many(BTreeMap<OwnerKey, u32>),
}

/// What is left of a resource after one holding of it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The same owner holds it once more.
    ByTheSame,
    /// Others hold it.
    ByOthers,
    /// Nobody does.
    Nothing,
}

impl Holders {
    fn add(&mut self, owner: OwnerKey) -> bool {
        match self {
            Holders::One { owner: only, times } if *only == owner => {
                *times = times.saturating_add(1);
                false
            }
            Holders::One { owner: only, times } => {
                *self = Holders::Many(BTreeMap::from([(*only, *times), (owner, 1)]));
                true
            }
            Holders::Many(many) => {
                let times = many.entry(owner).or_insert(0);
                *times = times.saturating_add(1);
                *times == 1
            }
        }
    }

    fn times(&self, owner: OwnerKey) -> u32 {
        match self {
            Holders::One { owner: only, times } if *only == owner => *times,
            Holders::One { .. } => 0,
            Holders::Many(many) => many.get(&owner).copied().unwrap_or(0),
        }
    }

    /// What one owner has, another has from now on. Whether that is a holder who was none before, or is
    /// the same one.
    fn give(&mut self, from: OwnerKey, to: OwnerKey) -> bool {
        match self {
            Holders::One { owner, .. } => {
                *owner = to;
                true
            }
            Holders::Many(many) => {
                let given = many.remove(&from).unwrap_or(0);
                let times = many.entry(to).or_insert(0);
                let is_new = *times == 0;
                *times = times.saturating_add(given);
                is_new
            }
        }
    }

    /// Takes `count` holdings away from `owner`, which has at least as many.
    fn remove(&mut self, owner: OwnerKey, count: u32) -> Left {
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
                let times = many.entry(owner).or_insert(0);
                *times = times.saturating_sub(count);
                if *times > 0 {
                    return Left::ByTheSame;
                }
                many.remove(&owner);
                if many.is_empty() {
                    Left::Nothing
                } else {
                    Left::ByOthers
                }
            }
        }
    }
}

/// What one owner holds.
#[derive(Debug)]
struct Holding {
    owner: Owner,
    resources: Vec<ResourceId>,
}

/// What the owners that are one process hold. Nearly every process stands for one domain.
#[derive(Debug)]
enum Holdings {
    One(Holding),
    Many(BTreeMap<OwnerKey, Holding>),
}

impl Holdings {
    fn iter(&self) -> impl Iterator<Item = &Holding> + Clone {
        let (one, many) = match self {
            Holdings::One(holding) => (Some(holding), None),
            Holdings::Many(many) => (None, Some(many)),
        };
        one.into_iter()
            .chain(many.into_iter().flat_map(BTreeMap::values))
    }

    fn get(&self, owner: OwnerKey) -> Option<&Holding> {
        match self {
            Holdings::One(holding) => (holding.owner.key() == owner).then_some(holding),
            Holdings::Many(many) => many.get(&owner),
        }
    }

    fn get_mut(&mut self, owner: OwnerKey) -> Option<&mut Holding> {
        match self {
            Holdings::One(holding) => (holding.owner.key() == owner).then_some(holding),
            Holdings::Many(many) => many.get_mut(&owner),
        }
    }

    /// Enters an owner that is not there yet.
    fn insert(self, holding: Holding) -> Holdings {
        let mut many = match self {
            Holdings::One(other) => BTreeMap::from([(other.owner.key(), other)]),
            Holdings::Many(many) => many,
        };
        many.insert(holding.owner.key(), holding);
        Holdings::Many(many)
    }

    /// Takes an owner out that holds nothing any more. Whether there is no other.
    fn remove(&mut self, owner: OwnerKey) -> bool {
        match self {
            Holdings::One(_) => true,
            Holdings::Many(many) => {
                many.remove(&owner);
                many.is_empty()
            }
        }
    }

    fn into_holdings(self) -> impl Iterator<Item = Holding> {
        let (one, many) = match self {
            Holdings::One(holding) => (Some(holding), None),
            Holdings::Many(many) => (None, Some(many)),
        };
        one.into_iter()
            .chain(many.into_iter().flat_map(BTreeMap::into_values))
    }
}

/// A place in the table for a resource that nobody holds.
#[derive(Debug)]
pub struct Vacant {
    hash: u64,
    key: Key,
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
    /// The names are in the resources.
    by_name: HashTable<ResourceId>,
    hasher: RandomState,
    by_identity: HashMap<FileIdentity, ResourceId>,
    /// By process: all that one holds ends with it.
    by_owner: HashMap<Pid, Holdings>,
    /// Where a key is put together for a look-up, so that it costs no allocation.
    scratch: Vec<u8>,
}

impl<L> Default for Table<L> {
    fn default() -> Self {
        Table {
            resources: Slab::new(),
            by_name: HashTable::new(),
            hasher: RandomState::default(),
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
        let (resources, hasher) = (&self.resources, &self.hasher);
        let hash = |id: &ResourceId| hash_at(hasher, resources, *id);
        self.by_name.reserve(count, hash);
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
        let hash = self.spell(lockspace, name);
        let found = self.find_spelled(hash);
        // One huge name must not keep its memory for ever.
        if self.scratch.capacity() > 64 * 1024 {
            self.scratch = Vec::new();
        }
        found
    }

    /// The resource whose key was put together and has this hash.
    #[inline]
    fn find_spelled(&self, hash: u64) -> Option<ResourceId> {
        let is_it = |id: &ResourceId| {
            let held = self.resources.get(id.0);
            held.is_some_and(|held| *held.key.0 == *self.scratch)
        };
        self.by_name.find(hash, is_it).copied()
    }

    /// Puts a key together, and makes its hash.
    fn spell(&mut self, lockspace: &[u8], name: &[u8]) -> u64 {
        self.scratch.clear();
        // Disks are in the default one, whose directory is empty.
        if !lockspace.is_empty() {
            self.scratch.extend_from_slice(lockspace);
        }
        self.scratch.push(0);
        self.scratch.extend_from_slice(name);
        hash_of(&self.hasher, &self.scratch)
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
    pub fn iter(&self) -> impl Iterator<Item = (ResourceId, &Resource<L>)> + Clone {
        self.resources
            .iter()
            .map(|(number, resource)| (ResourceId(number), resource))
    }

    /// How many places there are for resources, those that are empty among them. A resource stays at its
    /// place as long as anybody holds it: whoever looks at one place after the other, in as many steps as he
    /// likes, sees each resource once that is held all the time.
    pub fn places(&self) -> usize {
        self.resources.capacity()
    }

    /// The resource at a place.
    pub fn at(&self, place: usize) -> Option<&Resource<L>> {
        self.resources.get(place)
    }

    /// All held resources that are this file.
    pub fn same_file(&self, identity: FileIdentity) -> impl Iterator<Item = ResourceId> {
        std::iter::successors(self.find_file(identity), |id| {
            self.get(*id)?.next_of_identity
        })
    }

    /// What an owner registered, if it holds anything.
    pub fn owner(&self, owner: OwnerKey) -> Option<&Owner> {
        let holding = self.by_owner.get(&owner.pid)?.get(owner)?;
        Some(&holding.owner)
    }

    /// The owners that are this process and hold anything.
    pub fn owners_of(&self, pid: Pid) -> impl Iterator<Item = &Owner> + Clone {
        let holdings = self.by_owner.get(&pid);
        holdings
            .into_iter()
            .flat_map(Holdings::iter)
            .map(|holding| &holding.owner)
    }

    /// All owners that hold anything.
    pub fn owners(&self) -> impl Iterator<Item = &Owner> {
        self.by_owner
            .values()
            .flat_map(Holdings::iter)
            .map(|holding| &holding.owner)
    }

    /// All processes that hold anything.
    pub fn processes(&self) -> impl Iterator<Item = Pid> {
        self.by_owner.keys().copied()
    }

    /// Whether a process holds anything.
    pub fn holds(&self, pid: Pid) -> bool {
        self.by_owner.contains_key(&pid)
    }

    /// How many resources an owner holds.
    pub fn held_by(&self, owner: OwnerKey) -> usize {
        let holding = self.by_owner.get(&owner.pid).and_then(|all| all.get(owner));
        holding.map_or(0, |holding| holding.resources.len())
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
        if resource.holders.add(owner.key()) {
            note_holding(&mut self.by_owner, owner, id);
        } else if let Some(holdings) = self.by_owner.get_mut(&owner.pid)
            && let Some(holding) = holdings.get_mut(owner.key())
        {
            holding.owner.clone_from(owner);
        }
    }

    /// Whether nobody holds a resource: its place then, for [`Table::enter`].
    pub fn vacant(&mut self, lockspace: &[u8], name: &[u8]) -> Option<Vacant> {
        let hash = self.spell(lockspace, name);
        if self.find_spelled(hash).is_some() {
            return None;
        }
        let key = Key(self.scratch.as_slice().into());
        Some(Vacant { hash, key })
    }

    /// Enters a resource that was locked, after [`Decision::Open`], at its place that was found vacant just
    /// now.
    pub fn enter(&mut self, vacant: Vacant, owner: &Owner, granted: Granted<'_, L>) -> ResourceId {
        let Vacant { hash, key } = vacant;
        let entry = self.resources.vacant_entry();
        let id = ResourceId(entry.key());
        let next_of_identity = self.by_identity.insert(granted.identity, id);
        entry.insert(Resource {
            key,
            // No event and no call has one of 4 GiB.
            lockspace_length: u32::try_from(granted.lockspace.len()).unwrap_or(u32::MAX),
            identity: granted.identity,
            mode: granted.mode,
            autocreate: granted.autocreate,
            since: granted.since,
            lease: granted.lease,
            holders: Holders::One {
                owner: owner.key(),
                times: 1,
            },
            next_of_identity,
        });
        let (resources, hasher) = (&self.resources, &self.hasher);
        self.by_name
            .insert_unique(hash, id, |id| hash_at(hasher, resources, *id));
        note_holding(&mut self.by_owner, owner, id);
        id
    }

    /// Whether an owner may give the resource back, and which one it is: it, or else a process that may be
    /// its own, has a holding of it.
    ///
    /// # Errors
    /// Why not.
    pub fn may_release(
        &mut self,
        lockspace: &[u8],
        name: &[u8],
        owner: OwnerKey,
    ) -> Result<ResourceId, NotReleased> {
        let id = self.find(lockspace, name).ok_or(NotReleased::NotHeld)?;
        let holders = self.get(id).map(|resource| &resource.holders);
        let times = |owner| holders.map_or(0, |holders| holders.times(owner));
        if times(owner) == 0 && times(OwnerKey::of_process(owner.pid)) == 0 {
            return Err(NotReleased::NotYours);
        }
        Ok(id)
    }

    /// Of what a process holds nobody knows any more for which of its domains.
    pub fn forget_domains(&mut self, pid: Pid) {
        let Some(holdings) = self.by_owner.remove(&pid) else {
            return;
        };
        let unknown = Owner::unknown(pid);
        for Holding { owner, resources } in holdings.into_holdings() {
            for id in resources {
                let Some(resource) = self.resources.get_mut(id.0) else {
                    continue;
                };
                if resource.holders.give(owner.key(), unknown.key()) {
                    note_holding(&mut self.by_owner, &unknown, id);
                }
            }
        }
    }

    /// The same table with something else for the kernel's locks, and perhaps with files that are known
    /// only now. The first failure ends it.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn try_map<M, E>(
        self,
        mut make: impl FnMut(Unmapped<'_>, L) -> Result<(FileIdentity, M), E>,
    ) -> Result<Table<M>, E> {
        let mut by_identity = HashMap::with_capacity(self.by_identity.len());
        let mut resources = Vec::with_capacity(self.resources.len());
        for (number, resource) in self.resources {
            let mut resource = resource.try_map(&mut make)?;
            resource.next_of_identity = by_identity.insert(resource.identity, ResourceId(number));
            resources.push((number, resource));
        }
        Ok(Table {
            resources: resources.into_iter().collect(),
            by_name: self.by_name,
            hasher: self.hasher,
            by_identity,
            by_owner: self.by_owner,
            scratch: Vec::new(),
        })
    }

    /// Ends one holding of an owner: its own, or else one of which only the process is known. A
    /// resource that nobody holds any more is taken out of the table and returned; its lease is still
    /// to be ended.
    pub fn release(
        &mut self,
        lockspace: &[u8],
        name: &[u8],
        owner: OwnerKey,
    ) -> Result<Option<Resource<L>>, NotReleased> {
        let id = self.find(lockspace, name).ok_or(NotReleased::NotHeld)?;
        self.release_at(id, owner)
    }

    /// The same for a resource whose place is known.
    ///
    /// # Errors
    /// Why there is nothing to end.
    pub fn release_at(
        &mut self,
        id: ResourceId,
        mut owner: OwnerKey,
    ) -> Result<Option<Resource<L>>, NotReleased> {
        let resource = self.resources.get_mut(id.0).ok_or(NotReleased::NotHeld)?;
        if resource.holders.times(owner) == 0 {
            owner = OwnerKey::of_process(owner.pid);
            if resource.holders.times(owner) == 0 {
                return Err(NotReleased::NotYours);
            }
        }
        let left = resource.holders.remove(owner, 1);
        if left == Left::ByTheSame {
            return Ok(None);
        }
        if let Entry::Occupied(mut holdings) = self.by_owner.entry(owner.pid)
            && let Some(holding) = holdings.get_mut().get_mut(owner)
        {
            let resources = &mut holding.resources;
            if let Some(position) = resources.iter().position(|held| *held == id) {
                resources.swap_remove(position);
            }
            if resources.is_empty() && holdings.get_mut().remove(owner) {
                holdings.remove();
            }
        }
        Ok(match left {
            Left::Nothing => self.take_out(id),
            Left::ByTheSame | Left::ByOthers => None,
        })
    }

    /// Ends everything that a process holds, for whichever domains and however often it took it. What
    /// nobody else holds is taken out of the table and returned.
    pub fn end_owner(&mut self, pid: Pid) -> Vec<Resource<L>> {
        let Some(holdings) = self.by_owner.remove(&pid) else {
            return Vec::new();
        };
        let mut ended = Vec::new();
        for Holding { owner, resources } in holdings.into_holdings() {
            let owner = owner.key();
            for id in resources {
                let Some(resource) = self.resources.get_mut(id.0) else {
                    continue;
                };
                let times = resource.holders.times(owner);
                if resource.holders.remove(owner, times) == Left::Nothing {
                    ended.extend(self.take_out(id));
                }
            }
        }
        ended
    }

    fn take_out(&mut self, id: ResourceId) -> Option<Resource<L>> {
        let resource = self.resources.try_remove(id.0)?;
        let hash = hash_of(&self.hasher, &resource.key.0);
        if let Ok(entry) = self.by_name.find_entry(hash, |it| *it == id) {
            entry.remove();
        }
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

/// The hash of a key.
#[inline]
fn hash_of(hasher: &RandomState, key: &[u8]) -> u64 {
    let mut hasher = hasher.build_hasher();
    hasher.write(key);
    hasher.finish()
}

/// The hash of the key of a resource.
fn hash_at<L>(hasher: &RandomState, resources: &Slab<Resource<L>>, id: ResourceId) -> u64 {
    let held = resources.get(id.0);
    held.map_or(0, |held| hash_of(hasher, &held.key.0))
}

fn note_holding(by_owner: &mut HashMap<Pid, Holdings>, owner: &Owner, id: ResourceId) {
    let holding = || Holding {
        owner: owner.clone(),
        resources: vec![id],
    };
    match by_owner.entry(owner.pid) {
        Entry::Vacant(vacant) => {
            vacant.insert(Holdings::One(holding()));
        }
        Entry::Occupied(mut holdings) => match holdings.get_mut().get_mut(owner.key()) {
            Some(known) => {
                if known.owner != *owner {
                    known.owner.clone_from(owner);
                }
                known.resources.push(id);
            }
            None => {
                let others = holdings.remove();
                by_owner.insert(owner.pid, others.insert(holding()));
            }
        },
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
    /// When, milliseconds since the epoch; 0 if nobody knows.
    pub since: u64,
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
            since: 0,
            lease: 0,
        };
        let vacant = table.vacant(granted.lockspace, granted.name).unwrap();
        table.enter(vacant, &owner(pid), granted)
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
        let [seven, eight] = [7, 8].map(|pid| owner(pid).key());
        assert!(matches!(table.release(b"", b"a", seven), Ok(None)));
        assert!(matches!(
            table.release(b"", b"a", seven),
            Err(NotReleased::NotYours)
        ));
        assert!(matches!(table.release(b"", b"a", eight), Ok(Some(_))));
        assert!(matches!(
            table.release(b"", b"a", eight),
            Err(NotReleased::NotHeld)
        ));
        assert!(table.is_empty() && table.owners().next().is_none());
    }

    #[test]
    fn a_double_shared_holding_ends_whole_with_its_owner() {
        let mut table = Table::new();
        let id = grant(&mut table, b"a", 1, Mode::Shared, 7);
        table.join(id, &owner(7));
        assert_eq!(table.held_by(owner(7).key()), 1);
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
        assert!(matches!(
            table.release(b"", b"b", owner(7).key()),
            Ok(Some(_))
        ));
        assert_eq!(
            table.same_file(file(1)).collect::<Vec<_>>(),
            [ids[2], ids[0]]
        );
        assert_eq!(table.end_owner(7).len(), 2);
        assert_eq!(table.find_file(file(1)), None);
    }

    fn domain(pid: Pid, number: u8) -> Owner {
        Owner {
            uuid: [number; 16],
            ..owner(pid)
        }
    }

    fn grant_to(table: &mut Table<u32>, name: &[u8], mode: Mode, owner: &Owner) -> ResourceId {
        let granted = Granted {
            lockspace: b"",
            name,
            identity: file(1),
            mode,
            autocreate: false,
            since: 0,
            lease: 0,
        };
        let vacant = table.vacant(granted.lockspace, granted.name).unwrap();
        table.enter(vacant, owner, granted)
    }

    #[test]
    fn one_domain_of_a_process_does_not_release_what_another_one_holds() {
        let mut table = Table::new();
        let [one, other] = [domain(7, 1), domain(7, 2)];
        grant_to(&mut table, b"a", Mode::Exclusive, &one);
        grant_to(&mut table, b"b", Mode::Exclusive, &other);
        for (name, stranger) in [(b"a", &other), (b"b", &one)] {
            assert!(matches!(
                table.release(b"", name, stranger.key()),
                Err(NotReleased::NotYours)
            ));
        }
        assert_eq!(table.owner(one.key()), Some(&one));
        assert_eq!(table.owners_of(7).collect::<Vec<_>>(), [&one, &other]);
        assert!(matches!(table.release(b"", b"a", one.key()), Ok(Some(_))));
        assert_eq!(table.owners_of(7).collect::<Vec<_>>(), [&other]);
        assert!(table.holds(7));
    }

    #[test]
    fn what_all_domains_of_a_process_hold_ends_with_it() {
        let mut table = Table::new();
        let [one, other, stranger] = [domain(7, 1), domain(7, 2), domain(8, 1)];
        let shared = grant_to(&mut table, b"shared", Mode::Shared, &one);
        table.join(shared, &other);
        let kept = grant_to(&mut table, b"kept", Mode::Shared, &other);
        table.join(kept, &stranger);
        grant_to(&mut table, b"own", Mode::Exclusive, &Owner::unknown(7));
        let mut ended: Vec<Vec<u8>> = table
            .end_owner(7)
            .iter()
            .map(|held| held.name().to_vec())
            .collect();
        ended.sort();
        assert_eq!(ended, [b"own".to_vec(), b"shared".to_vec()]);
        assert!(!table.holds(7));
        assert_eq!(table.owners().collect::<Vec<_>>(), [&stranger]);
    }

    #[test]
    fn what_only_the_process_is_known_of_any_domain_of_it_may_release_behind_its_own() {
        let mut table = Table::new();
        let [one, other] = [domain(7, 1), domain(7, 2)];
        let id = grant_to(&mut table, b"a", Mode::Shared, &Owner::unknown(7));
        table.join(id, &one);
        let stranger = domain(8, 1).key();
        assert!(matches!(
            table.release(b"", b"a", stranger),
            Err(NotReleased::NotYours)
        ));
        assert!(matches!(table.release(b"", b"a", one.key()), Ok(None)));
        assert_eq!(table.held_by(OwnerKey::of_process(7)), 1);
        assert!(matches!(table.release(b"", b"a", other.key()), Ok(Some(_))));
        assert!(table.is_empty() && !table.holds(7));
    }
}
