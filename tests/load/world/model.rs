//! The reference: who holds what, as a list of rows. It says what each call must answer and what it
//! changes, from the rules alone, and knows neither the daemon's tables nor the kernel.

use std::collections::BTreeSet;

use super::files::{Behind, DEFAULT, FileId, Files, Node, Place, is_mounted, path_of, plain};
use crate::support::client::{
    AUTOCREATE, Call, DOMAIN_LOCKSPACE, DOMAIN_NONE, DOMAIN_RPC, INTERNAL_ERROR, INVALID_ARG,
    OPERATION_DENIED, OPERATION_INVALID, RESOURCE_BUSY, SHARED, SYSTEM_ERROR, UUID,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    Exclusive,
    Shared,
}

fn goes_with(mine: Mode, theirs: Mode) -> bool {
    (mine, theirs) == (Mode::Shared, Mode::Shared)
}

/// What a connection may do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Session {
    /// The process that it registered.
    pub pid: Option<i32>,
    pub is_restricted: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Ask {
    Register {
        pid: i32,
        id: u32,
    },
    Restrict,
    New(&'static str),
    CreateLockspace(&'static str),
    Create(Place),
    Delete(Place),
    Acquire {
        place: Place,
        mode: Mode,
        make: bool,
    },
    Release(Place),
}

/// A call, perhaps with a flag that nobody knows.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub ask: Ask,
    pub has_unknown_flag: bool,
}

const UNKNOWN_FLAG: u32 = 0x40;

impl Request {
    pub fn call(&self) -> Call {
        let flags = if self.has_unknown_flag {
            UNKNOWN_FLAG
        } else {
            0
        };
        let words = |place: Place| (place.lockspace.into(), place.name.into());
        match self.ask {
            Ask::Register { pid, id } => Call::Register {
                uuid: UUID,
                name: format!("guest-{pid}").into(),
                id,
                pid: pid as u32,
                flags,
            },
            Ask::Restrict => Call::Restrict { flags },
            Ask::New(directory) => Call::New {
                path: directory.into(),
                flags,
            },
            Ask::CreateLockspace(directory) => Call::CreateLockspace {
                path: directory.into(),
            },
            Ask::Create(place) => {
                let (path, name) = words(place);
                Call::CreateResource { path, name, flags }
            }
            Ask::Delete(place) => {
                let (path, name) = words(place);
                Call::DeleteResource { path, name, flags }
            }
            Ask::Acquire { place, mode, make } => {
                let (path, name) = words(place);
                let shared = if mode == Mode::Shared { SHARED } else { 0 };
                let make = if make { AUTOCREATE } else { 0 };
                let flags = flags | shared | make;
                Call::Acquire { path, name, flags }
            }
            Ask::Release(place) => {
                let (path, name) = words(place);
                Call::Release { path, name, flags }
            }
        }
    }
}

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: i32,
    pub domain: i32,
    /// The message names one of these processes.
    pub holders: Vec<i32>,
}

fn refuse<T>(code: i32, domain: i32) -> Result<T, Refusal> {
    Err(Refusal {
        code,
        domain,
        holders: Vec::new(),
    })
}

/// What a call that is not refused changes.
#[derive(Clone, Debug)]
pub enum Effect {
    Nothing,
    Register(i32),
    Restrict,
    Lockspace(&'static str),
    /// A file of this name is made.
    Make(String),
    /// A name is removed.
    Remove(String),
    /// One more holding of what is held already.
    Join(Row),
    /// A file is locked, made first if it is missing.
    Grant {
        place: Place,
        pid: i32,
        mode: Mode,
        target: String,
        goes_at_end: bool,
    },
    /// A holding ends: the row at this place of the list.
    End(usize),
}

/// What the rules say of a call.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// A lockspace that is opened by being used, whatever else comes of the call.
    pub opens: Option<&'static str>,
    pub outcome: Result<Effect, Refusal>,
}

/// One holding of one process.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub place: Place,
    pub pid: i32,
    pub mode: Mode,
    pub file: FileId,
    /// The name goes with its last holder.
    pub goes_at_end: bool,
    pub kind: Kind,
}

/// What kind of lock the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    OpenFile,
    /// Of a process, which has at most one on a file.
    Posix,
}

/// Whose program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Ours,
    Libvirts,
}

/// A lock of somebody outside of the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Stranger {
    pub number: usize,
    pub kind: Kind,
    pub mode: Mode,
    pub file: FileId,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub program: Program,
    pub files: Files,
    pub lockspaces: BTreeSet<&'static str>,
    pub rows: Vec<Row>,
    pub strangers: Vec<Stranger>,
}

impl Model {
    pub fn new(files: Files, program: Program) -> Model {
        Model {
            program,
            files,
            lockspaces: BTreeSet::from([DEFAULT]),
            rows: Vec::new(),
            strangers: Vec::new(),
        }
    }

    pub fn judge(&self, session: Session, request: Request) -> Verdict {
        let opens = match request.ask {
            Ask::Acquire { place, .. } => Some(place.lockspace),
            _ => None,
        };
        let outcome = self.check_session(session, request);
        // What is refused to the session does not come as far as the lockspace.
        let opens = opens.filter(|directory| {
            outcome.is_ok()
                && !self.lockspaces.contains(directory)
                && self.files.is_directory(&plain(directory))
        });
        let outcome = outcome.and_then(|pid| {
            let mut lockspaces = self.lockspaces.clone();
            lockspaces.extend(opens);
            self.decide(request.ask, pid, &lockspaces)
        });
        Verdict { opens, outcome }
    }

    /// The process for which the call is made; -1 where it is made for nobody.
    fn check_session(&self, session: Session, request: Request) -> Result<i32, Refusal> {
        let is_create = matches!(request.ask, Ask::CreateLockspace(_));
        if request.has_unknown_flag && !is_create {
            return refuse(INVALID_ARG, DOMAIN_RPC);
        }
        if session.is_restricted {
            return refuse(OPERATION_DENIED, DOMAIN_RPC);
        }
        match (request.ask, session.pid) {
            (Ask::Register { id: 0, .. }, _) => refuse(OPERATION_INVALID, DOMAIN_RPC),
            (Ask::Register { .. } | Ask::CreateLockspace(_), _) => Ok(-1),
            (_, None) => refuse(OPERATION_INVALID, DOMAIN_RPC),
            (_, Some(pid)) => Ok(pid),
        }
    }

    fn decide(
        &self,
        ask: Ask,
        pid: i32,
        lockspaces: &BTreeSet<&'static str>,
    ) -> Result<Effect, Refusal> {
        if let Ask::Create(place)
        | Ask::Delete(place)
        | Ask::Release(place)
        | Ask::Acquire { place, .. } = ask
            && !lockspaces.contains(place.lockspace)
        {
            return refuse(INTERNAL_ERROR, DOMAIN_RPC);
        }
        match ask {
            Ask::Register { pid, .. } => Ok(Effect::Register(pid)),
            Ask::Restrict => Ok(Effect::Restrict),
            Ask::New(DEFAULT) => refuse(OPERATION_INVALID, DOMAIN_RPC),
            Ask::New(directory) if lockspaces.contains(directory) => {
                refuse(INTERNAL_ERROR, DOMAIN_RPC)
            }
            Ask::CreateLockspace(directory) if lockspaces.contains(directory) => {
                Ok(Effect::Nothing)
            }
            Ask::New(directory) | Ask::CreateLockspace(directory) => {
                match self.files.nodes.get(&plain(directory)) {
                    Some(Node::File(_) | Node::Link(_)) => refuse(INTERNAL_ERROR, DOMAIN_LOCKSPACE),
                    Some(Node::Directory) | None => Ok(Effect::Lockspace(directory)),
                }
            }
            Ask::Create(place) => self.create(place),
            Ask::Delete(place) => self.delete(place),
            Ask::Acquire { place, mode, make } => self.acquire(place, pid, mode, make),
            Ask::Release(place) => self.release(place, pid),
        }
    }

    fn acquire(&self, place: Place, pid: i32, mode: Mode, make: bool) -> Result<Effect, Refusal> {
        if let Some(row) = self.rows.iter().find(|row| row.place == place) {
            if goes_with(mode, row.mode) {
                return Ok(Effect::Join(Row { pid, ..*row }));
            }
            return refuse(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        }
        let behind = self.files.behind(place);
        match behind {
            Behind::Outside => return refuse(INVALID_ARG, DOMAIN_LOCKSPACE),
            Behind::Directory | Behind::NoParent => return refuse(SYSTEM_ERROR, DOMAIN_LOCKSPACE),
            Behind::Nothing | Behind::DanglingLink if !make => {
                return refuse(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
            }
            // While there are POSIX locks, files are looked at before they are opened, and what
            // a link to nothing leads to is not made.
            Behind::DanglingLink if self.has_posix_locks() => {
                return refuse(SYSTEM_ERROR, DOMAIN_LOCKSPACE);
            }
            Behind::Nothing | Behind::DanglingLink => {}
            Behind::File(file) => {
                if !(self.program == Program::Libvirts && self.has_room(file, mode)) {
                    self.refuse_other_names(file)?;
                }
                let of_file = |lock: &&Stranger| lock.file == file;
                let mut strangers = self.strangers.iter().filter(of_file);
                if strangers.any(|lock| !goes_with(mode, lock.mode)) {
                    return refuse(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
                }
            }
        }
        let name = path_of(place).expect("a place that is inside has a path");
        // In a lockspace it is a lock file and goes; a disk goes only if the daemon made it.
        // Libvirt's daemon does not say which those are.
        let is_ours = self.program == Program::Ours;
        let may_go = place.lockspace != DEFAULT || behind == Behind::Nothing && is_ours;
        Ok(Effect::Grant {
            place,
            pid,
            mode,
            target: self.files.target(&name),
            goes_at_end: make && may_go,
        })
    }

    /// A file that is held is busy under every other name, whatever the modes.
    fn refuse_other_names(&self, file: FileId) -> Result<(), Refusal> {
        let holders: Vec<i32> = self
            .rows
            .iter()
            .filter(|row| row.file == file)
            .map(|row| row.pid)
            .collect();
        if holders.is_empty() {
            return Ok(());
        }
        Err(Refusal {
            code: RESOURCE_BUSY,
            domain: DOMAIN_LOCKSPACE,
            holders,
        })
    }

    fn release(&self, place: Place, pid: i32) -> Result<Effect, Refusal> {
        let mine = |row: &Row| row.place == place && row.pid == pid;
        match self.rows.iter().position(mine) {
            Some(holding) => Ok(Effect::End(holding)),
            None if self.is_held(place) => refuse(INTERNAL_ERROR, DOMAIN_LOCKSPACE),
            None => refuse(RESOURCE_BUSY, DOMAIN_LOCKSPACE),
        }
    }

    fn create(&self, place: Place) -> Result<Effect, Refusal> {
        if self.is_held(place) {
            return refuse(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        }
        match self.files.behind(place) {
            Behind::Outside => refuse(INVALID_ARG, DOMAIN_LOCKSPACE),
            Behind::Directory | Behind::NoParent => refuse(SYSTEM_ERROR, DOMAIN_NONE),
            Behind::File(_) => Ok(Effect::Nothing),
            Behind::Nothing | Behind::DanglingLink => {
                let name = path_of(place).expect("a place that is inside has a path");
                Ok(Effect::Make(self.files.target(&name)))
            }
        }
    }

    fn delete(&self, place: Place) -> Result<Effect, Refusal> {
        if self.is_held(place) {
            return refuse(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
        }
        if place.lockspace == DEFAULT {
            return refuse(OPERATION_DENIED, DOMAIN_LOCKSPACE);
        }
        let Some(name) = path_of(place) else {
            return refuse(INVALID_ARG, DOMAIN_LOCKSPACE);
        };
        if let Behind::File(file) = self.files.behind(place) {
            self.refuse_other_names(file)?;
        }
        match self.files.nodes.get(&name) {
            None => Ok(Effect::Nothing),
            Some(Node::Directory) => refuse(SYSTEM_ERROR, DOMAIN_LOCKSPACE),
            Some(_) if is_mounted(&name) => refuse(SYSTEM_ERROR, DOMAIN_LOCKSPACE),
            // Of a symbolic link, wherever it leads, the link itself goes.
            Some(Node::File(_) | Node::Link(_)) => Ok(Effect::Remove(name)),
        }
    }

    fn is_held(&self, place: Place) -> bool {
        self.rows.iter().any(|row| row.place == place)
    }

    /// Does to the reference what a call did. `identify` says which file a name is that was made.
    pub fn apply(&mut self, effect: Effect, identify: impl Fn(&str) -> FileId) {
        match effect {
            Effect::Nothing | Effect::Register(_) | Effect::Restrict => {}
            Effect::Lockspace(directory) => {
                self.files.nodes.insert(plain(directory), Node::Directory);
                self.lockspaces.insert(directory);
            }
            Effect::Make(name) => {
                let file = identify(&name);
                self.files.nodes.insert(name, Node::File(file));
            }
            Effect::Remove(name) => {
                self.files.nodes.remove(&name);
            }
            Effect::Join(row) => self.rows.push(row),
            Effect::Grant {
                place,
                pid,
                mode,
                target,
                goes_at_end,
            } => {
                let file = identify(&target);
                self.files.nodes.insert(target, Node::File(file));
                let kind = match self.program {
                    Program::Ours => Kind::OpenFile,
                    Program::Libvirts => Kind::Posix,
                };
                self.rows.push(Row {
                    place,
                    pid,
                    mode,
                    file,
                    goes_at_end,
                    kind,
                });
            }
            Effect::End(holding) => {
                let row = self.rows.remove(holding);
                self.end_resource(row);
            }
        }
    }

    /// Our daemon takes over from libvirt's. Exclusive locks stay as they are, and so do shared ones
    /// of a file that has two names; other shared ones become locks of our own kind.
    pub fn take_over(&mut self) {
        self.program = Program::Ours;
        let names: BTreeSet<(FileId, Place)> =
            self.rows.iter().map(|row| (row.file, row.place)).collect();
        for row in &mut self.rows {
            let is_alone = names.iter().filter(|(file, _)| *file == row.file).count() == 1;
            if row.mode == Mode::Shared && is_alone {
                row.kind = Kind::OpenFile;
            }
        }
    }

    fn has_posix_locks(&self) -> bool {
        self.program == Program::Ours && self.rows.iter().any(|row| row.kind == Kind::Posix)
    }

    /// What comes of the end of a holding that is in the list no more. Whether it was the last.
    fn end_resource(&mut self, row: Row) -> bool {
        if self.is_held(row.place) {
            return false;
        }
        let is_shared_outside = self.strangers.iter().any(|lock| lock.file == row.file);
        // Another name of the file is held with a POSIX lock, which every close would drop: then
        // nothing is closed, and nothing removed.
        let is_shared_inside = self.rows.iter().any(|other| other.file == row.file);
        // Only a name that still leads to the file that was locked is removed.
        let leads = self.files.behind(row.place) == Behind::File(row.file);
        if row.goes_at_end && leads && !is_shared_outside && !is_shared_inside {
            let name = path_of(row.place).expect("what was locked has a path");
            if !is_mounted(&name) {
                self.files.nodes.remove(&name);
            }
        }
        true
    }

    /// Ends all that a process holds; how many resources are free now.
    pub fn end_owner(&mut self, pid: i32) -> usize {
        let (ended, left) = self.rows.iter().partition(|row| row.pid == pid);
        self.rows = left;
        let mut ended: Vec<Row> = ended;
        ended.sort_by_key(|row| row.place);
        ended.dedup_by_key(|row| row.place);
        let is_free = |row: Row| self.end_resource(row);
        ended.into_iter().map(is_free).filter(|free| *free).count()
    }

    pub fn holds(&self, pid: i32) -> bool {
        self.rows.iter().any(|row| row.pid == pid)
    }

    /// May a stranger lock this file?
    pub fn has_room(&self, file: FileId, mode: Mode) -> bool {
        self.modes(file)
            .iter()
            .all(|theirs| goes_with(mode, *theirs))
    }

    /// All modes in which a file is locked, by whomever.
    pub fn modes(&self, file: FileId) -> Vec<Mode> {
        let held = self.rows.iter().filter(|row| row.file == file);
        let strangers = self.strangers.iter().filter(|lock| lock.file == file);
        held.map(|row| row.mode)
            .chain(strangers.map(|lock| lock.mode))
            .collect()
    }

    /// The locks that the kernel has: one for each resource that is held, or for each file where it
    /// is a POSIX lock, and one for each stranger.
    pub fn kernel_locks(&self) -> Vec<(FileId, Kind, Mode)> {
        let resources: BTreeSet<_> = self
            .rows
            .iter()
            .map(|row| {
                let place = (row.kind == Kind::OpenFile).then_some(row.place);
                (place, row.file, row.kind, row.mode)
            })
            .collect();
        let held = resources
            .into_iter()
            .map(|(_, file, kind, mode)| (file, kind, mode));
        let strangers = self
            .strangers
            .iter()
            .map(|lock| (lock.file, lock.kind, lock.mode));
        let mut all: Vec<_> = held.chain(strangers).collect();
        all.sort();
        all
    }

    /// The files that are free, but for strangers, when this process holds nothing any more.
    pub fn held_alone_by(&self, pid: i32) -> BTreeSet<FileId> {
        let of = |mine: bool| {
            let rows = self.rows.iter().filter(move |row| (row.pid == pid) == mine);
            rows.map(|row| row.file).collect::<BTreeSet<_>>()
        };
        &of(true) - &of(false)
    }
}
