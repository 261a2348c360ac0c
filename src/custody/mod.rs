//! All that lasts, and the door to it.
//!
//! [`Custody`] owns the [`State`] and the [`Ledger`]. Every change is one method here, which writes it
//! down and makes it; nothing else can do one without the other, because nothing else gets hold of
//! either. An event is written first and then applied. Where the kernel comes first (a file was
//! locked), an event that cannot be written undoes it. What has happened and cannot be refused is applied
//! in any case, and a ledger that could not take it is written anew before anything more is granted.
#![forbid(unsafe_code)]

pub mod adopt;
pub mod clients;
pub mod cold;
pub mod counters;
pub mod descriptor;
pub mod earlier;
pub mod elsewhere;
mod encoding;
mod entries;
pub mod event;
pub mod fences;
pub mod ledger;
pub mod locking;
pub mod news;
pub mod own_connections;
pub mod renumber;
pub mod roll;
pub mod served;
pub mod servers;
pub mod settings;
pub mod since;
pub mod state;
pub mod unwanted;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use crate::host::clone;
use crate::host::errno::{self, Errno};

use self::clients::{Arrival, Client, ClientId, Traffic};
use self::counters::Counter;
use self::descriptor::{Descriptor, Number, Open};
use self::event::{Event, Here, OwnerRecord, ResourceName};
use self::fences::{Fence, Stage, Watched};
use self::ledger::{Counts, Ledger, OldFile};
use self::news::{News, What};
use self::servers::{Listening, Server, Service};
use self::settings::{LogSettings, Settings};
use self::state::{Left, Source, State};
use self::unwanted::Unwanted;
use crate::host::clock::{self, Moment};
use crate::host::file::{FileIdentity, Lockable};
use crate::host::memory::Memory;
use crate::host::process::{self, Life, Process};
use crate::host::refusal::Refusal;
use crate::host::stream;
use crate::locks::place::Place;
use crate::locks::table::{Mode, Owner, Pid, ResourceId};

/// What a connection or a lock usually takes of the ledger at most, bytes.
const LEDGER_ENTRY: usize = 512;
/// A ledger up to this size is no waste, bytes.
const SMALL_LEDGER: usize = 256 * 1024;
/// How long what must be written down is waited with until it is tried again.
const BETWEEN_TRIES: Duration = Duration::from_millis(100);

/// All that lasts.
#[derive(Debug)]
pub struct Custody {
    state: State<Open>,
    ledger: Ledger,
    news: News,
    /// When this reactor began, milliseconds since the epoch.
    begun_at: u64,
    own_file: Option<OwnFile>,
    /// What a connection or a lock took of the ledger when it was last found too long, bytes.
    ledger_entry: usize,
    /// Somebody goes on from the ledger should this process die.
    is_read_after_death: bool,
    /// The descriptors of files of which other processes are letting go.
    elsewhere: BTreeSet<RawFd>,
    /// What was locked elsewhere and is not wanted.
    unwanted: Vec<Unwanted>,
}

/// The daemon's pid file, which is nobody's resource. It has a POSIX lock.
#[derive(Clone, Copy, Debug)]
struct OwnFile {
    identity: FileIdentity,
    descriptor: RawFd,
}

/// What an event of a change takes from whoever makes it.
#[derive(Default)]
struct Given<'a> {
    file: Option<Lockable>,
    other: Option<OwnedFd>,
    owner: Option<&'a Owner>,
    held: Option<ResourceId>,
}

impl<'a> Given<'a> {
    fn of_owner(owner: &'a Owner) -> Given<'a> {
        Given {
            owner: Some(owner),
            ..Given::default()
        }
    }
}

impl Source<Open> for Given<'_> {
    fn file(&mut self, _: Number) -> Result<Lockable, String> {
        self.file.take().ok_or_else(|| "there is no file".into())
    }

    fn other(&mut self, _: Number) -> Result<OwnedFd, String> {
        self.other
            .take()
            .ok_or_else(|| "there is no descriptor".into())
    }

    fn owner(&mut self, record: OwnerRecord<'_>) -> Owner {
        self.owner.cloned().unwrap_or_else(|| record.to_owner())
    }

    fn held(&self) -> Option<ResourceId> {
        self.held
    }
}

impl Custody {
    /// Of nothing yet.
    pub fn new(ledger: Ledger) -> Custody {
        Custody {
            state: State::default(),
            ledger,
            news: News::default(),
            begun_at: clock::wall_ms(),
            own_file: None,
            ledger_entry: 0,
            is_read_after_death: false,
            elsewhere: BTreeSet::new(),
            unwanted: Vec::new(),
        }
    }

    /// From now on somebody may go on at any moment from what the ledger says: nothing happens any more that it
    /// does not say.
    pub fn is_read_after_death(&mut self) {
        self.is_read_after_death = true;
    }

    /// Sees to it that what a call changes can be written down.
    ///
    /// # Errors
    /// Those of the memory file.
    #[inline]
    pub fn make_room(&mut self) -> Result<(), Errno> {
        self.ledger.make_room()
    }

    /// Goes on with a state that was taken over, and the ledger that says it. Without one, it is written
    /// down in the ledger that is there.
    pub fn go_on(&mut self, state: State<Open>, ledger: Option<Ledger>) {
        self.state = state;
        match ledger {
            Some(ledger) => self.ledger = ledger,
            None => {
                if self.renew().is_err() {
                    self.ledger.lose();
                }
            }
        }
    }

    /// The poll of an earlier image that watches every client by its descriptor, if there is one, to
    /// go on with it.
    pub fn take_poll(&mut self) -> Option<Number> {
        self.state.poll.take()
    }

    /// The poll of a program of before format 3, which is of no use and stays open until it is taken.
    pub fn take_old_poll(&mut self) -> Option<Number> {
        self.state.old_poll.take()
    }

    /// To look at.
    pub fn state(&self) -> &State<Open> {
        &self.state
    }

    /// Writes an event down and makes its change. If it cannot be written nothing changes.
    #[inline(always)]
    fn commit(&mut self, event: Event<'_>, given: &mut Given<'_>) -> Result<Left<Open>, Errno> {
        self.ledger.append(&event)?;
        self.note(&event);
        Ok(self.apply(event, given))
    }

    /// Writes down what has happened, or must, and makes its change.
    #[inline(always)]
    fn record(&mut self, event: Event<'_>, mut given: Given<'_>) -> Left<Open> {
        if let Err(reason) = self.ledger.append_what_must_be(&event) {
            self.write_down_at_last(&event, reason);
        }
        self.note(&event);
        self.apply(event, &mut given)
    }

    /// What cannot be refused and cannot be written down is waited with, as whoever went on from a ledger that
    /// lacks it would take what is closed now, or has another's number, for what the ledger tells of. Where
    /// nobody goes on from it, it is written down later.
    #[cold]
    fn write_down_at_last(&mut self, event: &Event<'_>, reason: Errno) {
        let is_read = self.is_read_after_death && self.ledger.descriptor().is_ok();
        if !is_read || reason == Errno::EINVAL {
            return self.ledger.lose();
        }
        tracing::error!(
            target: "locking.lock_daemon",
            "The state cannot be written down: {}. All locks stay, and nobody is served until it can: free some \
             memory",
            errno::text(reason)
        );
        loop {
            let is_whole = !self.ledger.is_stale() || self.renew().is_ok();
            if is_whole && self.ledger.append_what_must_be(event).is_ok() {
                return;
            }
            clone::pause(BETWEEN_TRIES);
        }
    }

    /// Counts an event that is about to be applied, and tells those who listen.
    #[inline(always)]
    fn note(&mut self, event: &Event<'_>) {
        let stage = || match event {
            Event::Fencing(fence) => self.state.fences().get(&fence.pid).map(|it| it.stage),
            _ => None,
        };
        if let Some(counter) = Counter::of(event, stage) {
            self.ledger.count(counter);
            if self.is_listened_to() {
                self.news.tell(event, &self.state);
            }
        }
    }

    /// Whether anybody is to be told of what happens.
    fn is_listened_to(&self) -> bool {
        !self.state.subscribers().is_empty()
    }

    #[inline(always)]
    fn apply(&mut self, event: Event<'_>, given: &mut Given<'_>) -> Left<Open> {
        match self.state.apply(event, given) {
            Ok(left) => left,
            Err(reason) => {
                self.does_not_fit(&reason);
                Left::Nothing
            }
        }
    }

    #[cold]
    fn does_not_fit(&mut self, reason: &str) {
        debug_assert!(false, "a change that cannot be: {reason}");
        tracing::error!(
            target: "locking.lock_daemon",
            "A change of the daemon's state does not fit ({reason}): this is a fault of the program; \
             please report it"
        );
        self.ledger.lose();
    }

    /// The resource `name` of `lockspace`, if somebody holds it.
    pub fn find(&mut self, lockspace: &[u8], name: &[u8]) -> Option<ResourceId> {
        self.state.table.find(lockspace, name)
    }

    // What happens.

    /// How much was counted of something.
    pub fn counted(&self, counter: Counter) -> u64 {
        self.ledger.counted(counter)
    }

    /// So much was counted by a daemon that this one goes on for.
    pub fn count_more(&mut self, counts: &Counts) {
        for (counter, more) in Counter::ALL.into_iter().zip(counts) {
            self.ledger.count_many(counter, *more);
        }
    }

    /// When this reactor began, milliseconds since the epoch. No other one of the service began then.
    pub fn begun_at(&self) -> u64 {
        self.begun_at
    }

    /// What has happened, as far as anybody listens.
    pub fn news(&self) -> &News {
        &self.news
    }

    /// So many things happened of which a subscriber was not told.
    pub fn missed(&mut self, count: u64) {
        self.ledger.count_many(Counter::Missed, count);
    }

    /// A client is to be told of what happens, of kinds that these bits mean to it; 0 for nothing.
    pub fn subscribes(&mut self, id: ClientId, wanted: u32) {
        if self.state.client(id).is_some_and(|it| it.wanted != wanted) {
            self.record(Event::Subscribed(Number(id.0), wanted), Given::default());
        }
        self.forget_news();
    }

    fn forget_news(&mut self) {
        if !self.is_listened_to() {
            self.news.forget();
        }
    }

    /// A new program took over.
    pub fn was_upgraded(&mut self) {
        self.happened(Counter::Upgraded, What::Upgraded, "");
    }

    /// This process went on for one that died, as these words say.
    pub fn was_recovered(&mut self, how: &str) {
        self.happened(Counter::Recovered, What::Recovered, how);
    }

    fn happened(&mut self, counter: Counter, what: What, text: &str) {
        self.ledger.count(counter);
        if self.is_listened_to() {
            self.news.tell_of_daemon(what, text);
        }
    }

    /// An owner was refused a resource; `by` says by whom it is held, or what else is the matter.
    pub fn was_refused(&mut self, owner: &Owner, place: Place<'_>, mode: Mode, by: &[u8]) {
        self.ledger.count(Counter::Refused);
        if self.is_listened_to() {
            let resource = ResourceName {
                lockspace: place.lockspace,
                name: place.name,
            };
            self.news.tell_of_refusal(owner, resource, mode, by);
        }
    }

    /// Somebody else has a lock that an owner had.
    pub fn lost_a_lock(&mut self) {
        self.ledger.count(Counter::Lost);
    }

    // The process and its servers.

    /// The process's own things, but for its log, which is as it was.
    pub fn set_process(&mut self, settings: Settings) {
        self.record(Event::Process(Box::new(settings)), Given::default());
    }

    /// The pid file, to be kept from whoever asks for it as a resource.
    pub fn set_own_file(&mut self, file: Option<(FileIdentity, RawFd)>) {
        self.own_file = file.map(|(identity, descriptor)| OwnFile {
            identity,
            descriptor,
        });
    }

    /// The log has these settings now.
    pub fn log_changed(&mut self, settings: LogSettings) {
        self.record(Event::Logging(Box::new(settings)), Given::default());
    }

    /// After how long without clients and locks the daemon ends, seconds; 0 for never.
    pub fn set_idle_timeout(&mut self, seconds: u32) {
        self.record(Event::IdleTimeout(seconds), Given::default());
    }

    /// A server's numbers.
    pub fn set_server(&mut self, service: Service, server: Server) {
        if *self.state.server(service) != server {
            self.record(Event::Server(service, server), Given::default());
        }
    }

    /// One more socket that clients connect to.
    pub fn listens(&mut self, listening: Listening<OwnedFd>) {
        let event = Event::Listening(listening.by_number());
        let given = Given {
            other: Some(listening.socket),
            ..Given::default()
        };
        self.record(event, given);
    }

    /// A socket that clients connect to, by its place.
    pub fn listener(&self, place: usize) -> Option<BorrowedFd<'_>> {
        let listening = self.state.listeners().get(place)?;
        Some(listening.socket.as_fd())
    }

    /// Nobody is let in any more: the sockets, to be removed.
    pub fn stops_listening(&mut self) -> Vec<Listening<OwnedFd>> {
        match self.record(Event::Deaf, Given::default()) {
            Left::Listeners(listeners) => listeners,
            _ => Vec::new(),
        }
    }

    // Clients.

    /// The number for a new connection, which counts also if it is turned away.
    pub fn take_id(&mut self, service: Service) -> u64 {
        self.state.take_id(service)
    }

    /// A client connected.
    pub fn connected(&mut self, socket: OwnedFd, arrival: Arrival) {
        let event = Event::Connected(socket.number(), arrival);
        let given = Given {
            other: Some(socket),
            ..Given::default()
        };
        self.record(event, given);
    }

    /// A client made a call, or was let in after it had been refused.
    pub fn called(&mut self, id: ClientId) {
        let client = self.state.client(id);
        if client.is_some_and(|client| !client.has_called || client.is_refused()) {
            self.record(Event::Called(Number(id.0)), Given::default());
        }
    }

    /// A client said for which owner it calls.
    pub fn registers(&mut self, id: ClientId, owner: &Owner) {
        let Some(client) = self.state.client(id) else {
            return;
        };
        if client.owner.as_deref() == Some(owner) {
            return;
        }
        let event = Event::Registered(Number(id.0), owner.into());
        self.record(event, Given::of_owner(owner));
        self.note_registration(id);
        self.note_life_of_client(id);
    }

    /// When a client registered that stands for its owner, if nobody has written that down: just now.
    pub fn note_registration(&mut self, id: ClientId) {
        let client = self.state.client(id);
        if client.is_some_and(|it| it.own_owner().is_some() && it.registered_at == 0) {
            let event = Event::RegisteredAt(Number(id.0), clock::wall_ms());
            self.record(event, Given::default());
        }
    }

    /// A client that stands for its owner is to be known again, should all processes of this daemon be
    /// killed: once a connection.
    fn note_life_of_client(&mut self, id: ClientId) {
        let Some(client) = self.state.client(id) else {
            return;
        };
        if client.life.is_some() || client.own_owner().is_none() {
            return;
        }
        let life = match client.arrival.start_time {
            Some(start) => Process::open(client.peer().pid, start.get())
                .and_then(|_| process::life_from(start.get())),
            None => stream::peer_process(&client.socket)
                .and_then(|process| process::life(process.pidfd(), client.peer().pid)),
        };
        // Unknown, its locks are kept as those of somebody who cannot be seen.
        if let Ok(life) = life {
            self.record(Event::ClientIs(Number(id.0), life), Given::default());
        }
    }

    /// The program before may have found out less.
    fn note_missing_lives(&mut self) {
        let clients = self.state.clients();
        let unknown = clients.filter(|(_, client)| client.life.is_none());
        let unknown: Vec<ClientId> = unknown.map(|(id, _)| id).collect();
        for id in unknown {
            self.note_life_of_client(id);
        }
        let fenced = self.state.fences().values();
        let fenced = fenced.map(|fence| (fence.pid, &fence.process));
        let watched = self.state.watched().values();
        let watched = watched.filter_map(|it| Some((it.pid, it.process.as_ref()?)));
        let is_unknown = |pid: &Pid| !self.state.lives().contains_key(pid);
        let unknown: Vec<(Pid, Option<Life>)> = fenced
            .chain(watched)
            .filter(|(pid, _)| is_unknown(pid))
            .map(|(pid, process)| (pid, process::life(process, pid).ok()))
            .collect();
        for (pid, life) in unknown {
            self.note_life_of_owner(pid, life);
        }
    }

    /// The same of an owner whose process is watched or being fenced.
    fn note_life_of_owner(&mut self, pid: Pid, life: Option<Life>) {
        if let Some(life) = life
            && self.state.lives().get(&pid) != Some(&life)
        {
            self.record(Event::OwnerIs(pid, life), Given::default());
        }
    }

    /// A client gave up its right to call.
    pub fn restricts(&mut self, id: ClientId) {
        self.record(Event::Restricted(Number(id.0)), Given::default());
    }

    /// A client's connection is over. False if that was known.
    pub fn leaves(&mut self, id: ClientId) -> bool {
        let is_news = self
            .state
            .client(id)
            .is_some_and(|client| !client.is_over());
        if is_news {
            self.record(Event::Leaving(Number(id.0)), Given::default());
        }
        is_news
    }

    /// A client is cleared away. Whoever gets it closes the socket, and only then can another client
    /// have its number.
    pub fn gone(&mut self, id: ClientId) -> Option<Client<OwnedFd>> {
        self.state.client(id)?;
        let left = self.record(Event::Gone(Number(id.0)), Given::default());
        self.forget_news();
        match left {
            Left::Client(client) => Some(client),
            _ => None,
        }
    }

    /// The bytes of a client that were on their way, to go on with them: passed on once more they would
    /// be worked on or sent twice.
    pub fn take_traffic(&mut self, id: ClientId) -> Option<Traffic> {
        let traffic = self.state.traffic().get(&id)?.clone();
        self.record(
            Event::Traffic(Number(id.0), Box::default()),
            Given::default(),
        );
        Some(traffic)
    }

    // Owners.

    /// An owner is to be fenced: it was sent SIGTERM.
    pub fn fencing(&mut self, pid: Pid, process: OwnedFd, next_step: Moment) {
        let life = process::life(&process, pid).ok();
        let event = Event::Fencing(Fence {
            pid,
            process: process.number(),
            stage: Stage::Asked,
            next_step,
        });
        let given = Given {
            other: Some(process),
            ..Given::default()
        };
        self.record(event, given);
        self.note_life_of_owner(pid, life);
    }

    /// The fencing of an owner took its next step.
    pub fn fence_goes_on(&mut self, pid: Pid, stage: Stage, next_step: Moment) {
        let Some(fence) = self.state.fences().get(&pid) else {
            return;
        };
        let event = Event::Fencing(Fence {
            stage,
            next_step,
            ..fence.by_number()
        });
        self.record(event, Given::default());
    }

    /// An owner need not be fenced any more: its process, if it was being fenced.
    pub fn fenced(&mut self, pid: Pid) -> Option<OwnedFd> {
        self.state.fences().get(&pid)?;
        match self.record(Event::Fenced(pid), Given::default()) {
            Left::Process(process) => Some(process),
            _ => None,
        }
    }

    /// An owner is to be fenced and its process cannot be reached. False if that was known.
    pub fn is_out_of_reach(&mut self, pid: Pid) -> bool {
        let is_news = !self.state.is_unreachable(pid);
        if is_news {
            self.record(Event::Unreachable(pid), Given::default());
        }
        is_news
    }

    /// An owner can be reached, or holds nothing any more.
    pub fn is_within_reach(&mut self, pid: Pid) {
        if self.state.is_unreachable(pid) {
            self.record(Event::Reachable(pid), Given::default());
        }
    }

    /// An owner holds something without a connection of its own: it is watched through this pidfd, or
    /// cannot be seen. What it was watched through before is closed.
    pub fn watches(&mut self, pid: Pid, process: Option<OwnedFd>) {
        let life = process.as_ref();
        let life = life.and_then(|process| process::life(process, pid).ok());
        let event = Event::Watched(Watched {
            pid,
            process: process.as_ref().map(Descriptor::number),
        });
        let given = Given {
            other: process,
            ..Given::default()
        };
        self.record(event, given);
        self.note_life_of_owner(pid, life);
    }

    /// An owner is not watched any more: what it was watched through, to be closed.
    pub fn unwatches(&mut self, pid: Pid) -> Option<Watched<OwnedFd>> {
        let was = self.state.watched().contains_key(&pid);
        let left = was.then(|| self.record(Event::Unwatched(pid), Given::default()));
        match left? {
            Left::Process(process) => Some(Watched {
                pid,
                process: Some(process),
            }),
            _ => Some(Watched { pid, process: None }),
        }
    }

    // The ledger.

    /// Where the ledger is now: what is written from here on is behind it.
    pub fn mark(&self) -> u64 {
        self.ledger.mark()
    }

    /// Writes the ledger anew, to have it short. If that fails it stays as it is.
    ///
    /// # Errors
    /// Those of the memory file.
    pub fn renew(&mut self) -> Result<(), Errno> {
        let is_elsewhere = self.ledger.wants_name() || self.ledger.descriptor().is_err();
        if is_elsewhere && self.renew_elsewhere() {
            return Ok(());
        }
        self.ledger.rewrite(self.state.entries())
    }

    /// What the host refused once it may allow by now: a ledger that has no name, or cannot be passed on,
    /// is written anew into one that has, or can. False if there is none, and then it stays as it is.
    fn renew_elsewhere(&mut self) -> bool {
        let entries = self.state.entries();
        if self.ledger.wants_name() && self.ledger.move_to_name(entries).is_ok() {
            return true;
        }
        self.ledger.descriptor().is_err() && self.ledger.move_to_memory(self.state.entries())
    }

    /// From now on the ledger is in this directory, if it can be, so that a start after the death of all
    /// processes finds it.
    ///
    /// # Errors
    /// Why it cannot: it has no name then.
    pub fn keep_in(&mut self, run_directory: &Path, old: OldFile) -> Result<(), Refusal> {
        let here = Here {
            boot: process::boot(),
            namespace: process::namespace(),
        };
        if self.state.here() != Some(here) {
            self.record(Event::Here(here), Given::default());
        }
        self.note_missing_lives();
        if self.ledger.call(ledger::file_in(run_directory), old) {
            return Ok(());
        }
        let moved = self.ledger.move_to_name(self.state.entries());
        // It says what was.
        match old {
            _ if moved.is_ok() => (),
            OldFile::IsReplaced => {
                if let Ok(Some(orphan)) = ledger::find_orphan(run_directory) {
                    orphan.remove();
                }
            }
            OldFile::IsPredecessors(file) => ledger::remove_if(run_directory, file),
            OldFile::IsKept => (),
        }
        moved
    }

    /// Somebody else goes on with the locks who does not write the ledger, or nobody does: a later start must
    /// not find it.
    pub fn leaves_file(&mut self) {
        self.ledger.lose_name();
    }

    /// Whether the ledger has grown too long, or lacks something, and is to be written anew.
    pub fn wants_renewal(&self) -> bool {
        self.ledger.wants_compaction()
    }

    /// Whether the ledger lacks something: nothing is granted until it is written anew.
    pub fn is_behind(&self) -> bool {
        self.ledger.is_stale()
    }

    /// Puts off the next renewal after one that failed, until the ledger has grown as much again.
    pub fn put_off_renewal(&mut self) {
        self.ledger.put_off_compaction();
    }

    /// Gives back the memory of a ledger that is much too long for what it has to say by now. It is not
    /// written anew again and again where few have much to say.
    pub fn give_memory_back(&mut self) {
        let held = self.state.table().len();
        let entries = self.state.client_count().saturating_add(held);
        let enough = entries
            .saturating_mul(self.ledger_entry.saturating_mul(2).max(LEDGER_ENTRY))
            .max(SMALL_LEDGER);
        if self.ledger.size() > enough && self.renew().is_ok() {
            self.ledger_entry = self.ledger.size().checked_div(entries).unwrap_or(0);
        }
    }

    /// Closes the ledger for a handover, with the bytes that are on their way and the poll that watches
    /// the clients, if that is handed over: if not, it may still tell of one that was before. Until then bytes
    /// are not written down: they would be worked on or sent once more.
    ///
    /// # Errors
    /// What the host refuses, or what cannot be written: then nobody can take over.
    pub fn close(
        &mut self,
        traffic: impl Iterator<Item = (ClientId, Traffic)>,
        poll: Option<RawFd>,
    ) -> Result<(), Errno> {
        if self.ledger.is_stale() {
            self.renew()?;
        }
        for service in Service::ALL {
            // The numbers of connections that were turned away are in no event.
            let server = *self.state.server(service);
            self.commit(Event::Server(service, server), &mut Given::default())?;
        }
        debug_assert!(self.is_written_down(), "the ledger does not say what is");
        for (id, traffic) in traffic {
            let event = Event::Traffic(Number(id.0), Box::new(traffic));
            self.commit(event, &mut Given::default())?;
        }
        if let Some(poll) = poll {
            self.commit(Event::Poll(Number(poll)), &mut Given::default())?;
        }
        self.ledger.close();
        Ok(())
    }

    /// The state, with the bytes that are on their way, for programs that read ledgers up to this format
    /// only: see [`earlier`].
    ///
    /// # Errors
    /// What the kernel says when it has no memory for that.
    pub fn for_earlier(
        &self,
        version: u32,
        traffic: impl Iterator<Item = (ClientId, Traffic)>,
    ) -> Result<Memory, Errno> {
        let traffic = traffic.map(|(id, it)| Event::Traffic(Number(id.0), Box::new(it)));
        if earlier::knows_the_watched(version) {
            earlier::write(version, self.state.entries().chain(traffic))
        } else {
            earlier::write(version, self.state.entries_of_the_living().chain(traffic))
        }
    }

    /// Goes on after a handover that failed.
    pub fn reopen(&mut self) {
        self.ledger.reopen();
        self.state.traffic.clear();
        self.state.poll = None;
        if self.renew().is_err() {
            self.ledger.lose();
        }
    }

    /// The ledger's descriptor, which is the same for its life; what the host refused, if there is
    /// none: then it cannot be passed on.
    ///
    /// # Errors
    /// The refusal.
    pub fn ledger(&self) -> Result<&OwnedFd, Refusal> {
        self.ledger.descriptor()
    }

    /// Whether the ledger, read, says what is.
    pub fn is_written_down(&self) -> bool {
        fn said<'a>(entries: impl Iterator<Item = Event<'a>>) -> Vec<String> {
            let mut said: Vec<String> = entries.map(|event| format!("{event:?}")).collect();
            said.sort_unstable();
            said
        }
        self.ledger
            .replay()
            .is_ok_and(|replayed| said(replayed.entries()) == said(self.state.entries()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::host::stream::{Peer, UNKNOWN_PEER};

    #[test]
    fn a_registration_that_a_death_cut_short_has_its_time_and_is_counted_once() {
        let mut custody = Custody::new(Ledger::new().unwrap());
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let id = ClientId(ours.as_raw_fd());
        let pid = process::own_number();
        let arrival = Arrival {
            server: Service::Lock,
            id: custody.take_id(Service::Lock),
            peer: Some(Peer {
                pid,
                ..UNKNOWN_PEER
            }),
            start_time: None,
            connected_at: 0,
            refused: false,
        };
        custody.connected(OwnedFd::from(ours), arrival);
        let owner = Owner {
            pid,
            id: 1,
            name: b"guest"[..].into(),
            uuid: [1; 16],
        };
        let event = Event::Registered(Number(id.0), (&owner).into());
        custody.record(event, Given::of_owner(&owner));
        let seen = |custody: &Custody| {
            let at = custody.state().client(id).map(|it| it.registered_at);
            (at.unwrap(), custody.counted(Counter::Registered))
        };
        assert_eq!(seen(&custody), (0, 0));
        custody.note_registration(id);
        let (at, count) = seen(&custody);
        assert!(at > 0 && count == 1);
        custody.note_registration(id);
        assert_eq!(seen(&custody), (at, 1));
        assert!(custody.is_written_down());
    }
}
