//! Files on shares: whoever touches one may hang for as long as its server does not answer. So nothing here does:
//! what is to be done with them is done by helpers, processes of each share's own, and the calls that want it
//! wait. A call that waits has not been worked on: when its errand is done it is worked on once more from its
//! beginning, finds what became of the errand, and goes on behind it. So a call under way is nothing but a message
//! that waits, whoever goes on with it.

mod crew;
mod purpose;
mod under_way;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::unwanted::Unwanted;
use crate::host::apart::Fillers;
use crate::host::clock::Moment;
use crate::host::closer::{self, Closer};
use crate::host::descriptors;
use crate::host::file::FileIdentity;
use crate::host::mount_table::Mounts;
use crate::host::mounts::Mount;
use crate::host::whereabouts::{self, Whereabouts};
use crate::locks::errand::{Errand, Kind, Outcome};
use crate::locks::job::End;
use crate::locks::lease::{Lease, LockKind};
use crate::locks::place::Place;
use crate::locks::table::{Mode, Resource};
use crate::log::Printable;

use crew::{Crew, Finished, Told};
use purpose::Purpose;
pub use purpose::{Finding, ShareId};
use under_way::{Calls, Who};

/// How often it is looked whether anything takes long, or nothing is to be done any more, milliseconds.
pub const LOOK_MS: u64 = 1000;

/// Behind the start of a reactor that goes on for another one, how long a lock that is in the way may be one of an
/// earlier image's helpers, milliseconds.
const AFTERMATH_MS: u64 = 3000;

/// Everything about shares that passes.
#[derive(Debug)]
pub struct Shares {
    mounts: Mounts,
    crews: BTreeMap<ShareId, Crew>,
    /// The share of each helper, by the helper's number.
    helpers: Vec<Option<ShareId>>,
    calls: Calls,
    /// Files whose locks are let go of and that are to be closed.
    to_close: Vec<OwnedFd>,
    closers: Vec<Closer>,
    /// Files of a reactor that died, of which nobody knows whether they are locked, by their shares: nobody is
    /// refused for them.
    unknown: BTreeMap<ShareId, BTreeSet<RawFd>>,
    /// Files that nobody wants, until their locks are let go of.
    unwanted: BTreeMap<RawFd, OwnedFd>,
    /// What keeps files of shares from having low numbers.
    fillers: Fillers,
    /// Clients that are to have a turn.
    woken: Vec<ClientId>,
    patient_until: Moment,
    /// When something was done last.
    answered_at: Moment,
    /// A share is or was mounted: files may be open that are on a mount which is gone.
    had_any: bool,
    /// The number of the next errand that is nobody's any more.
    next_serial: u64,
    /// An errand was asked for since it was last looked for long ones.
    is_busy: bool,
}

impl Default for Shares {
    /// Without anything to do.
    fn default() -> Shares {
        Shares {
            mounts: Mounts::open(),
            crews: BTreeMap::new(),
            helpers: Vec::new(),
            calls: Calls::default(),
            to_close: Vec::new(),
            closers: Vec::new(),
            unknown: BTreeMap::new(),
            unwanted: BTreeMap::new(),
            fillers: Fillers::default(),
            woken: Vec::new(),
            patient_until: Moment(0),
            answered_at: Moment(0),
            had_any: false,
            next_serial: 0,
            is_busy: false,
        }
    }
}

impl Shares {
    /// This reactor goes on for another one, whose helpers may not know yet.
    pub fn goes_on(&mut self) {
        self.patient_until = Moment::now().plus_ms(AFTERMATH_MS);
    }

    /// What is mounted.
    pub fn mounts(&mut self) -> &mut Mounts {
        &mut self.mounts
    }

    /// Whether any share is mounted.
    pub fn has_any(&mut self) -> bool {
        let has = self.mounts.has_shares();
        self.had_any |= has;
        has
    }

    /// When something was done last.
    pub fn answered_at(&self) -> Moment {
        self.answered_at
    }

    /// The share that a resource's file is on, if it is on one.
    pub fn of_place(&mut self, place: Place<'_>) -> Option<ShareId> {
        if !self.has_any() {
            return None;
        }
        let path = place.path();
        // The kernel takes no longer one.
        if path.len() >= libc::PATH_MAX as usize {
            return None;
        }
        self.of_path(&path)
    }

    /// The share that a path leads to, if it leads to one.
    pub fn of_path(&mut self, path: &[u8]) -> Option<ShareId> {
        share(whereabouts::of_path(&mut self.mounts, path))
    }

    /// The share that an open file is on, if it is on one.
    pub fn of_file(&mut self, number: RawFd) -> Option<ShareId> {
        if !self.had_any && !self.has_any() {
            return None;
        }
        share(descriptors::whereabouts(&mut self.mounts, number))
    }

    /// The share that a resource's file is on whose lock may be let go of elsewhere.
    pub fn of_lock(&mut self, resource: &Resource<Lease>) -> Option<ShareId> {
        let is_open_file = matches!(resource.lease.kind, LockKind::OpenFile);
        let number = resource.lease.descriptor.as_raw_fd();
        self.of_file(number).filter(|_| is_open_file)
    }

    /// A share as an operator reads it.
    pub fn text(&self, share: ShareId) -> String {
        let mount = match share {
            ShareId::Mount(id) => self.mounts.get(id).map(Mount::text),
            ShareId::Lessee => {
                let who =
                    "Who has a lease on a file of this host (Samba, nfsd; /proc/locks names it)";
                Some(who.to_owned())
            }
            ShareId::Unknown => None,
        };
        mount.unwrap_or_else(|| "A mount that is not known".to_owned())
    }

    // ---- calls ----

    /// Whether a call on this resource has to wait for what is under way with it: then it is woken.
    pub fn has_to_wait(&mut self, id: ClientId, place: Place<'_>) -> bool {
        self.calls.has_to_wait(id, place)
    }

    /// Whether what is under way with a resource is the end of what a dead owner left, on a share that has not
    /// answered for long: its share.
    pub fn is_left_on_hung(&self, place: Place<'_>) -> Option<ShareId> {
        let share = self.calls.left_on(place)?;
        let is_slow = self.crews.get(&share).is_some_and(Crew::is_slow);
        is_slow.then_some(share)
    }

    /// Whether a call has begun to let go of a lock elsewhere.
    pub fn lets_go(&self, id: ClientId) -> bool {
        self.calls.has_step(id, Kind::End)
    }

    /// Whether a file that is open may be on a share.
    pub fn may_have_files(&mut self) -> bool {
        self.has_any() || self.had_any
    }

    /// Whether a call waits for somebody to give back a lease on its file, or has.
    pub fn waits_for_lessee(&self, id: ClientId) -> bool {
        self.calls.has_step(id, Kind::Acquire)
    }

    /// A call waits for something that another process is at: it is woken.
    pub fn waits(&mut self, id: ClientId) {
        self.calls.waits(id);
    }

    /// Whether a call has to wait until files of a reactor that died are let go of on this share.
    pub fn waits_for_unknown(&mut self, id: ClientId, share: ShareId) -> bool {
        let waits = self.unknown.contains_key(&share);
        if waits {
            self.calls.waits(id);
        }
        waits
    }

    /// The next errand of a call: what became of it, if it is done. `None` says that the call waits now, and is
    /// woken. The errand is not asked for once more when it is.
    pub fn errand(
        &mut self,
        id: ClientId,
        share: ShareId,
        (place, errand): (Place<'_>, &Errand<'_>),
        file: Option<RawFd>,
        what: impl FnOnce() -> String,
    ) -> Option<Finding> {
        if let Some(step) = self.calls.step(id, errand.kind()) {
            return step;
        }
        if self.waits_for_unknown(id, share) {
            return None;
        }
        let bytes = match errand.to_bytes() {
            Ok(bytes) => bytes,
            Err(reason) => return Some(Finding::failed(reason)),
        };
        self.calls.asks(id, (errand.kind(), file), place);
        self.ask(share, Purpose::Call(id), bytes, file, what());
        None
    }

    /// Whether a lock may be in the way that a helper of an earlier image is about to let go of.
    pub fn is_patient(&self) -> bool {
        Moment::now() < self.patient_until
    }

    /// A call has been answered: what it asked for and did not take is let go of, and others that waited for it go on.
    pub fn call_ends(&mut self, id: ClientId, custody: &mut Custody) {
        self.end_call(id, None, custody);
    }

    fn end_call(&mut self, id: ClientId, then: Option<Who>, custody: &mut Custody) {
        let Some(left) = self.calls.ends(id, then) else {
            return;
        };
        for number in left.let_go {
            self.to_close.extend(custody.is_over(number));
        }
        for finding in left.findings {
            self.is_not_wanted(finding);
        }
        self.calls.wake_all(&mut self.woken);
    }

    /// The call of a client that waits here since an earlier reactor gives a resource back: that one may have begun with
    /// it.
    pub fn may_let_go(&mut self, id: ClientId, place: Place<'_>) {
        if self.has_any() {
            self.calls.may_let_go(id, place);
        }
    }

    /// A client is gone, perhaps in the middle of a call.
    pub fn leaves(&mut self, id: ClientId, custody: &mut Custody) {
        let serial = self.next_serial;
        let mut then = None;
        for crew in self.crews.values_mut() {
            let purpose = crew.leaves(id, |number| match number {
                // It stays that of a dead owner.
                Some(number) if custody.is_left(number) => Purpose::Left(number),
                // What was given back is nobody's from now on, whatever becomes of this process.
                Some(number) if custody.is_elsewhere(number) => Purpose::Unwanted(number),
                _ => Purpose::Nobody(serial),
            });
            match purpose {
                Some(Purpose::Left(number)) => then = Some(Who::LetGo(number)),
                Some(Purpose::Unwanted(number)) => {
                    then = Some(Who::LetGo(number));
                    if let Some(file) = custody.gives_back(number) {
                        self.unwanted.insert(number, file);
                    }
                }
                Some(_) => {
                    then = Some(Who::Nobody(serial));
                    self.next_serial = serial.wrapping_add(1);
                }
                None => (),
            }
        }
        self.end_call(id, then, custody);
    }

    fn is_not_wanted(&mut self, finding: Finding) {
        let Finding {
            asked,
            outcome,
            file: Some(file),
        } = finding
        else {
            return;
        };
        match (Errand::of_bytes(&asked), outcome) {
            (Ok(Errand::Acquire { place, mode, .. }), Outcome::Locked(identity, created)) => {
                let removes = created.then_some(mode);
                self.let_go(file, identity, (place, removes));
            }
            _ => self.let_go_of_nameless(file),
        }
    }

    // ---- locks that are let go of ----

    /// What a dead owner left is let go of, if it is on a share; otherwise nothing is done.
    pub fn let_go_of_left(&mut self, custody: &mut Custody) -> bool {
        let Some(resource) = custody.next_left() else {
            return false;
        };
        let Some(share) = self.of_lock(resource) else {
            return false;
        };
        if custody.state().process_lock_on(resource.identity).is_some() {
            return false;
        }
        let end = End::of(resource);
        let place = Place {
            lockspace: resource.lockspace(),
            name: resource.name(),
        };
        let errand = Errand::End {
            place,
            identity: end.identity,
            removes: end.removes,
        };
        let Ok(bytes) = errand.to_bytes() else {
            return false;
        };
        let number = resource.lease.descriptor.as_raw_fd();
        let what = format!("the lock on {} of a dead owner", Printable(&place.path()));
        self.calls.let_go_begins(number, place, Some(share));
        self.ask(share, Purpose::Left(number), bytes, Some(number), what);
        custody.goes_elsewhere(number);
        true
    }

    /// Locks that were had and are not wanted are let go of.
    pub fn let_go_of_unwanted(&mut self, unwanted: Vec<Unwanted>) {
        for it in unwanted {
            let place = Place {
                lockspace: &it.lockspace,
                name: &it.name,
            };
            self.let_go(it.file, it.identity, (place, it.removes));
        }
    }

    /// A reactor that died left a file open, and nobody knows whether it locked it.
    pub fn let_go_of_unknown(&mut self, file: OwnedFd) {
        let number = file.as_raw_fd();
        if let Some(share) = self.of_file(number) {
            self.unknown.entry(share).or_default().insert(number);
        }
        self.let_go_of_nameless(file);
    }

    fn let_go_of_nameless(&mut self, file: OwnedFd) {
        let name = closer::name_of(file.as_raw_fd());
        let place = Place {
            lockspace: b"",
            name: &name,
        };
        let identity = FileIdentity {
            device: 0,
            inode: 0,
        };
        self.let_go(file, identity, (place, None));
    }

    fn let_go(
        &mut self,
        file: OwnedFd,
        identity: FileIdentity,
        (place, removes): (Place<'_>, Option<Mode>),
    ) {
        let number = file.as_raw_fd();
        let errand = Errand::End {
            place,
            identity,
            removes,
        };
        let share = self.of_file(number).unwrap_or(ShareId::Unknown);
        match errand.to_bytes() {
            Ok(bytes) => {
                let what = format!("a lock on {} that nobody wants", Printable(&place.path()));
                self.unwanted.insert(number, file);
                self.calls.let_go_begins(number, place, None);
                self.ask(share, Purpose::Unwanted(number), bytes, Some(number), what);
            }
            Err(_) => self.close(file),
        }
    }

    /// A file whose lock is let go of is to be closed.
    pub fn close(&mut self, file: OwnedFd) {
        self.to_close.push(file);
    }

    // ---- helpers ----

    fn ask(
        &mut self,
        share: ShareId,
        purpose: Purpose,
        errand: Vec<u8>,
        file: Option<RawFd>,
        what: String,
    ) {
        self.is_busy = true;
        let crew = self.crews.entry(share).or_default();
        crew.ask(purpose, errand, file, what);
    }

    /// Gives out what is to be done. `watch` is told of each helper that is new: its number, and its descriptor.
    pub fn give_out(&mut self, custody: &mut Custody, mut watch: impl FnMut(usize, RawFd) -> bool) {
        let Shares { crews, helpers, .. } = self;
        let mut finished = Vec::new();
        for (share, crew) in crews.iter_mut() {
            let new = &mut |descriptor| {
                let number = helpers.iter().position(Option::is_none);
                let number = number.unwrap_or(helpers.len());
                if !watch(number, descriptor) {
                    return None;
                }
                match helpers.get_mut(number) {
                    Some(place) => *place = Some(*share),
                    None => helpers.push(Some(*share)),
                }
                Some(number)
            };
            finished.extend(crew.give_out(new));
        }
        for it in finished {
            self.take(it, custody);
        }
    }

    /// Whether more is to be given out at once.
    pub fn has_more_to_give_out(&self) -> bool {
        self.is_busy && self.crews.values().any(Crew::wants_helper)
    }

    /// A helper has something to say.
    pub fn hear(&mut self, number: usize, custody: &mut Custody) {
        let Some(Some(share)) = self.helpers.get(number).copied() else {
            return;
        };
        let Some(crew) = self.crews.get_mut(&share) else {
            return;
        };
        self.fillers.fill();
        let (finished, is_over) = crew.hear(number);
        if is_over && let Some(place) = self.helpers.get_mut(number) {
            *place = None;
        }
        if finished.is_some()
            && let Some(took) = crew.answers_again()
        {
            tracing::info!(
                target: "locking.lockspace",
                "{} answers again, after {:.1} s", self.text(share), took
            );
        }
        if let Some(it) = finished {
            self.take(it, custody);
        }
    }

    fn take(&mut self, finished: Finished, custody: &mut Custody) {
        let Finished { purpose, finding } = finished;
        self.answered_at = Moment::now();
        match purpose {
            Purpose::Call(id) => {
                if let Some(unwanted) = self.calls.is_done(id, finding) {
                    self.is_not_wanted(unwanted);
                }
                self.woken.push(id);
                return;
            }
            Purpose::Left(number) => {
                self.calls.let_go_ends(number);
                self.to_close.extend(custody.was_let_go(number));
            }
            Purpose::Unwanted(number) => {
                self.to_close.extend(self.unwanted.remove(&number));
                self.calls.let_go_ends(number);
                for files in self.unknown.values_mut() {
                    files.remove(&number);
                }
                let before = self.unknown.len();
                self.unknown.retain(|_, files| !files.is_empty());
                if self.unknown.len() < before {
                    // Those who asked for these files may be about to have them now.
                    self.goes_on();
                }
            }
            Purpose::Nobody(serial) => {
                self.calls.nobodys_ends(serial);
                self.is_not_wanted(finding);
            }
        }
        self.calls.wake_all(&mut self.woken);
    }

    /// Clients whose calls can go on.
    pub fn take_woken(&mut self) -> Vec<ClientId> {
        std::mem::take(&mut self.woken)
    }

    /// Closes what is to be closed, in a process of its own.
    pub fn tend_closing(&mut self) {
        self.closers.retain(Closer::is_there);
        if self.to_close.is_empty() {
            return;
        }
        match Closer::start(std::mem::take(&mut self.to_close)) {
            Ok(closer) => self.closers.push(closer),
            Err((_, files)) => self.to_close = files,
        }
    }

    /// Whether another process closes files of this one at the moment.
    fn is_closing(&self) -> bool {
        !self.closers.is_empty() || !self.to_close.is_empty()
    }

    /// Nothing more is to be closed elsewhere: this process is about to be another one's master, who sees to what is
    /// open.
    pub fn stop_closing(&self) {
        self.closers.iter().for_each(Closer::kill);
    }

    /// Whether no file is open that nobody knows of who would go on now.
    pub fn is_settled(&self) -> bool {
        !self.is_closing() && self.unwanted.is_empty()
    }

    /// Says what takes long, and ends helpers that have nothing to do. Whether it is to be looked again.
    pub fn look(&mut self) -> bool {
        let now = Moment::now();
        let mut over = Vec::new();
        let mut told = Vec::new();
        for (share, crew) in &mut self.crews {
            told.extend(crew.tell(now).map(|it| (*share, it)));
            over.extend(crew.end_idle(now));
        }
        for (
            share,
            Told {
                what,
                seconds,
                others,
            },
        ) in told
        {
            let others = match others {
                0 => String::new(),
                count => format!(" ({count} more wait for it)"),
            };
            tracing::warn!(
                target: "locking.lockspace",
                "{} has not answered for {seconds} s: {what} waits{others}. Others do not. If its server is gone, \
                 bring it back, or unmount it (umount -f)",
                self.text(share)
            );
            // Who waits for a name that a dead owner had is told so.
            self.calls.wake_all(&mut self.woken);
        }
        for number in over {
            if let Some(place) = self.helpers.get_mut(number) {
                *place = None;
            }
        }
        self.crews.retain(|_, crew| !crew.is_over());
        self.tend_closing();
        self.is_busy = !self.crews.is_empty() || self.is_closing();
        self.is_busy
    }

    /// Whether it is to be looked what takes long.
    pub fn is_busy(&self) -> bool {
        self.is_busy || self.is_closing()
    }

    /// What is under way, as an operator reads it.
    pub fn under_way(&self) -> Vec<String> {
        let crews = self.crews.iter();
        crews
            .flat_map(|(share, crew)| {
                let text = self.text(*share);
                crew.under_way()
                    .map(move |what| format!("{what} on {text}"))
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

fn share(whereabouts: Whereabouts) -> Option<ShareId> {
    match whereabouts {
        Whereabouts::Local => None,
        Whereabouts::Share(id) => Some(id.map_or(ShareId::Unknown, ShareId::Mount)),
    }
}
