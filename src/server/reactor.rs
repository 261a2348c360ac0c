//! The loop.
//!
//! Eight things can wake it: a signal, a deadline, a listening socket, a connection, the death of an
//! owner that is being fenced or watched, the end of a successor that is being looked at, and a change of what is
//! mounted. The kernel
//! reports each change once (edge-triggered), so what it said is kept in lists of things to do.
//! Connections on which something happened have a turn first; what needs longer waits in line behind
//! them and is worked off in short pieces, with a poll after each few: whoever comes with one call never
//! waits for somebody's thousand. Nothing here ever waits, except in the poll when there is nothing to
//! do.
//!
//! The reactor owns what passes, piece by piece, and lends it side by side; what lasts is
//! [`Custody`]'s. Nobody in this room imports the reactor: what others want of it they return.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use mio::{Events, Poll};
use nix::sys::signal::Signal;

use super::clients::accept::{Accepted, Entrance, Gate};
use super::clients::connection::{Appetite, Connection};
use super::clients::recovery::{self, Making};
use super::clients::turn::{Buffers, Pace, Turn, Turned, whose};
use super::deadlines::{Deadline, Deadlines, RETRY_MS};
use super::ground::Ground;
use super::hall::{Hall, Order};
use super::keep;
use super::lines::{Line, Lines, ROTATION};
use super::notes::Notes;
use super::owners::fence::Left;
use super::owners::{Freeing, Owners, Wanted};
use super::reserve::Reserve;
use super::shares::{self, Shares};
use super::stop;
use super::upgrade::{Going, Upgrade};
use super::waiting_room::{NoRoom, WaitingRoom, no_room};
use super::watch::{Source, Watch};
use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::descriptor::{Number, Open};
use crate::custody::ledger::{self, Ledger, OldFile, Read};
use crate::custody::own_connections::Seen;
use crate::custody::roll::Roll;
use crate::custody::servers::{ClientLimit, Listening, Service};
use crate::custody::since::Since;
use crate::custody::state::State;
use crate::desk::Desk;
use crate::desk::control::Message;
use crate::desk::turn::{self as step, Rest, Whose};
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::memory::Adopted;
use crate::host::names::Names;
use crate::host::patience::{patiently, while_it_may_pass};
use crate::host::process::{self, Process};
use crate::host::refusal::Refusal;
use crate::host::signals::{self, Signals};
use crate::host::timer::Timer;
use crate::host::{closer, descriptors, heap, notify, passing};
use crate::locks::lease::{self, Lease, LockKind};
use crate::locks::place::Place;
use crate::locks::table::{Pid, Resource, ResourceId};
use crate::log::{self, Printable};

/// How many connections on which something happened have their turn between two polls.
const CONNECTIONS_A_TURN: usize = 64;
/// How many events one poll reports.
const EVENTS: usize = 256;
/// How much may be kept of messages that are not whole yet and of replies that are not sent yet, over
/// all admin clients, bytes. The protocol allows each message 32 MiB.
const ADMIN_BYTES: u32 = 64 * 1024 * 1024;
/// After a ledger that could not be written anew, how long until it is tried again, milliseconds.
const LEDGER_RETRY_MS: u64 = 1000;

/// How long until it is looked again whether files of shares are closed that must be before somebody else goes on,
/// milliseconds.
const SHARES_MS: u64 = 20;

/// How long an upgrade waits for them until that is said, milliseconds.
const UNSETTLED_MS: u64 = 1_000;

/// What a configuration file can change while the daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Clients of the lock server.
    pub max_clients: ClientLimit,
    /// Clients of the admin server.
    pub admin_max_clients: ClientLimit,
}

impl Limits {
    fn by_service(self) -> [(Service, ClientLimit); 2] {
        [
            (Service::Lock, self.max_clients),
            (Service::Admin, self.admin_max_clients),
        ]
    }
}

/// Reads the configuration again and applies its log settings; the limits in it, or a sentence
/// about what is wrong with it.
pub type Reload = Box<dyn FnMut() -> Result<Limits, String>>;

/// What can be done in more than one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The ledger: in a file that can be passed on, or in the process's own memory.
    Ledger,
    /// Signals: told by the kernel, or asked for.
    Signals,
    /// Deadlines: told by the kernel, or by the length of a wait.
    Timer,
}

/// How a reactor's run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The daemon has stopped.
    Stopped,
    /// It has, and everything is kept for the next start.
    Kept,
    /// The guardian has the order to execute a program.
    Ordered,
    /// There is no guardian any more.
    Orphaned,
    /// The daemon leaves without an end in order.
    Left,
}

/// What the daemon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It serves.
    Serving,
    /// It serves until everything can be put away for the next start.
    Keeping,
    /// Everything is.
    Kept,
    /// It ends when the owners it fences are dead, or at a deadline.
    Ending,
    /// It has ended.
    Ended,
    /// It leaves as it is.
    Leaving,
}

/// The poll and what it watches, and all that passes.
pub struct Reactor {
    poll: Poll,
    watch: Watch,
    signals: Signals,
    timer: Timer,
    reload: Reload,
    doing: Doing,
    /// All that lasts.
    custody: Custody,
    /// The passing half of each client.
    connections: Roll<Connection>,
    gate: Gate,
    waiting: WaitingRoom,
    lines: Lines,
    deadlines: Deadlines,
    reserve: Reserve,
    wanted: Wanted,
    freeing: Freeing,
    names: Names,
    ground: Ground,
    upgrade: Upgrade,
    desk: &'static Desk,
    buffers: Buffers,
    pace: Pace,
    /// What calls asked for in the turn that is just over.
    orders: Vec<Order>,
    /// Leases that were granted in it.
    leases: Vec<ResourceId>,
    notes: Notes,
    shares: Shares,
    /// Since when an upgrade waits for them, and whether that was said.
    unsettled_since: Option<Moment>,
    is_unsettled_told: bool,
    /// At the end, until when what is under way there is waited for.
    shares_until: Option<Moment>,
    /// What all admin clients together take of [`ADMIN_BYTES`].
    admin_bytes: u32,
    /// What is shared with the guardian, if there is one.
    guard: Option<&'static Desk>,
    /// There was a guardian, and there is none any more.
    is_orphaned: bool,
    /// Where a reactor that died was making a file.
    making: Option<Making>,
    /// Up to this number subscribers were woken for what happened.
    told: u64,
}

/// Whether the poll has the connections that are gone on with.
#[derive(Clone, Copy)]
enum Watched {
    /// Those of an earlier image of this process, which had done what it had heard of.
    Already,
    /// Most of them, from a reactor that died in the middle of it.
    Unheard,
    /// None of them.
    Not,
}

/// What a reactor goes on from.
#[derive(Debug)]
pub struct GoesOn<'a> {
    /// What lasts.
    pub state: State<Open>,
    /// The ledger that says so, if there is one: else another one is written.
    pub ledger: Option<Read>,
    /// What happened behind the mark that [`step::ledger_before`] finds on the desk, if somebody died there.
    pub since: Since,
    /// The poll of a reactor that died: what that one had heard of and not done is said once more.
    pub poll: Option<RawFd>,
    /// What a reactor that died left open and nobody knows: closed, before anybody is served. A file that it
    /// was about to lock may have to be removed again.
    pub left: &'a mut Vec<OwnedFd>,
    /// Where a ledger of an earlier format may have its name.
    pub run_directory: Option<&'a Path>,
}

impl Reactor {
    /// A reactor that watches signals and the timer; listeners are added with
    /// [`Reactor::listen`]. It works at the guardian's desk, if there is a guardian. What can be done another way
    /// where the host refuses it is, and is told by [`Reactor::refusals`].
    ///
    /// # Errors
    /// What the host refuses for which there is no other way.
    pub fn new(reload: Reload, guard: Option<&'static Desk>) -> Result<Reactor, Refusal> {
        let desk = match guard {
            Some(desk) => desk,
            // There is one reactor in a process, and it lives as long.
            None => patiently(Desk::private)?.for_ever(),
        };
        let no_poll = Refusal::of("events cannot be waited for (epoll_create1)");
        // Where there is no other way it is tried for a while, whatever the reason.
        let poll = patiently(|| Poll::new().map_err(&no_poll))?;
        let registry = patiently(|| {
            let copy = poll.registry().try_clone();
            copy.map_err(Refusal::of("a descriptor cannot be copied (fcntl)"))
        })?;
        let watch = Watch::new(registry);
        let signals = while_it_may_pass(|| {
            let signals = Signals::open(guard.is_some())?;
            add(&watch, Source::Signals, signals.as_raw_fd())?;
            Ok(signals)
        })
        .unwrap_or_else(Signals::Asked);
        let timer = while_it_may_pass(|| {
            let timer = Timer::new()?;
            add(&watch, Source::Timer, timer.as_raw_fd())?;
            Ok(timer)
        })
        .unwrap_or_else(Timer::without_descriptor);
        let no_memory = Refusal::of("there is no memory for a ledger");
        let ledger = while_it_may_pass(|| Ledger::new().map_err(&no_memory))
            .or_else(|refusal| Ledger::private(refusal).map_err(&no_memory))?;
        heap::settle();
        // Before the reserve takes what descriptors there are.
        let gate = Gate::new();
        let mut custody = Custody::new(ledger);
        if let Some(desk) = guard {
            custody.is_read_after_death();
            // It keeps its number where another one is put in its place.
            desk.set_poll(poll.as_raw_fd());
        }
        let mut reserve = Reserve::default();
        reserve.refill();
        Ok(Reactor {
            poll,
            watch,
            signals,
            timer,
            reload,
            doing: Doing::Serving,
            custody,
            connections: Roll::default(),
            waiting: WaitingRoom::new(gate.names_processes()),
            gate,
            lines: Lines::default(),
            deadlines: Deadlines::default(),
            reserve,
            wanted: Wanted::new(),
            freeing: Freeing::default(),
            names: Names::default(),
            ground: Ground::default(),
            upgrade: Upgrade::default(),
            buffers: Buffers::new(desk),
            desk,
            pace: Pace::default(),
            orders: Vec::new(),
            leases: Vec::new(),
            notes: Notes::default(),
            shares: Shares::default(),
            unsettled_since: None,
            is_unsettled_told: false,
            shares_until: None,
            admin_bytes: 0,
            guard,
            is_orphaned: false,
            making: None,
            told: 0,
        })
    }

    /// All that lasts.
    pub fn custody(&self) -> &Custody {
        &self.custody
    }

    /// All that lasts, to change it through its door.
    pub fn custody_mut(&mut self) -> &mut Custody {
        &mut self.custody
    }

    /// Where it works.
    pub fn desk(&self) -> &Desk {
        self.desk
    }

    /// How the program is replaced.
    pub fn set_upgrade(&mut self, upgrade: Upgrade) {
        self.upgrade = upgrade;
    }

    /// Whether a process can be watched, which is what killing an owner stands on.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn try_out(&self) -> Result<(), Refusal> {
        let own = process::started().cast_signed();
        let process = Process::open_any(own).map_err(Refusal::of(
            "the process of an owner cannot be watched (pidfd_open)",
        ))?;
        let pidfd = process.pidfd().as_raw_fd();
        add(&self.watch, Source::Successor, Some(pidfd))
    }

    /// What the host refused and is done another way: each costs something, as the log must say.
    pub fn refusals(&self) -> [(Way, Option<Refusal>); 3] {
        [
            (Way::Ledger, self.custody.ledger().err()),
            (Way::Signals, self.signals.refusal()),
            (Way::Timer, self.timer.refusal()),
        ]
    }

    /// Sets the limits that the configuration gives.
    pub fn configure(&mut self, limits: Limits) {
        for (service, limit) in limits.by_service() {
            let server = *self.custody.state().server(service);
            self.custody.set_server(service, server.configured(limit));
        }
    }

    /// Sets the limits that the configuration gives, where it gives others than before an upgrade.
    pub fn configure_if_changed(&mut self, limits: Limits) {
        for (service, limit) in limits.by_service() {
            let server = *self.custody.state().server(service);
            let server = server.configured_if_changed(limit);
            self.custody.set_server(service, server);
        }
    }

    /// Adds a listening socket. It is the daemon's even if it cannot be watched.
    ///
    /// # Errors
    /// Why it cannot be watched.
    pub fn listen(&mut self, listening: Listening<OwnedFd>) -> Result<(), Refusal> {
        let (service, descriptor) = (listening.server, listening.socket.as_raw_fd());
        self.custody.listens(listening);
        self.open_door(service, descriptor)
    }

    fn open_door(&mut self, service: Service, descriptor: i32) -> Result<(), Refusal> {
        let source = Source::Listener(self.gate.len());
        self.gate.open(service);
        patiently(|| add(&self.watch, source, Some(descriptor)))
    }

    /// Goes on where somebody stopped, also in the middle of a turn at the desk. Whatever has been taken
    /// when this fails is the reactor's, and open.
    ///
    /// # Errors
    /// What the host refuses for which there is no other way.
    pub fn go_on(&mut self, from: GoesOn<'_>) -> Result<(), Refusal> {
        let GoesOn {
            state,
            ledger,
            mut since,
            poll,
            left,
            run_directory,
        } = from;
        match ledger {
            Some(Read::Ours(ledger)) => self.custody.go_on(state, Some(ledger)),
            Some(Read::Old(old)) => {
                self.custody.go_on(state, None);
                self.custody.count_more(&ledger::counts_of(old.bytes()));
                // As long as the next reactor would go on from the old one, and not later: what has the name is
                // what a start believes when all are dead.
                if let Some(run_directory) = run_directory
                    && let Some(file) = ledger::named_in(run_directory, &old)
                {
                    let old = OldFile::IsPredecessors(file);
                    // Why not is said when all is taken over.
                    let _ = self.custody.keep_in(run_directory, old);
                }
                self.have_ledger_instead(old)?;
            }
            None => self.custody.go_on(state, None),
        }
        if let Some(Number(old_poll)) = self.custody.take_old_poll() {
            drop(descriptors::adopt(old_poll));
        }
        let found = match (self.custody.take_poll(), poll) {
            (Some(Number(theirs)), poll) => {
                // Nobody died who watched anything in another one.
                drop(poll.filter(|poll| *poll != theirs).map(descriptors::adopt));
                match self.inherit(theirs)? {
                    true => Watched::Already,
                    false => Watched::Not,
                }
            }
            (None, Some(poll)) if self.inherit(poll)? => Watched::Unheard,
            _ => Watched::Not,
        };
        let doors: Vec<(Service, i32)> = self
            .custody
            .state()
            .listeners()
            .iter()
            .map(|listening| (listening.server, listening.socket.as_raw_fd()))
            .collect();
        let mut all_heard = Ok(());
        for (service, descriptor) in doors {
            all_heard = all_heard.and(self.open_door(service, descriptor));
        }
        all_heard?;
        let clients: Vec<(ClientId, bool, bool)> = self
            .custody
            .state()
            .clients()
            .map(|(id, client)| (id, client.is_refused(), client.is_over()))
            .collect();
        let mut interrupted = None;
        for (id, is_refused, is_over) in clients {
            let source = Source::Connection(id);
            patiently(|| match found {
                Watched::Already => Ok(()),
                Watched::Unheard => self.watch.add_again(source, id.0),
                Watched::Not => self.watch.add(source, id.0),
            })
            .map_err(Refusal::of("a client cannot be watched (epoll_ctl)"))?;
            let (mut connection, of_turn) = self.find_traffic(id, &mut since);
            let has_traffic = !connection.is_quiet();
            if self.custody.state().subscribers().contains(&id) {
                // From the first thing that this process has to tell.
                connection.told = Some(0);
            }
            // Its number is its socket's, of which there is one.
            let _ = self.connections.insert(id.0, connection);
            if is_over {
                self.lines.endings.push_back(id);
            } else if is_refused {
                self.wait_for_first_call(id, NoRoom::Limit);
            }
            if of_turn.is_some() {
                interrupted = of_turn;
            } else if has_traffic {
                self.enqueue(id);
            }
        }
        let (upgrade, mut going) = self.going();
        upgrade.inherit_abandoned(&mut going);
        let state = self.custody.state();
        let fenced: Vec<i32> = state.fences().keys().copied().collect();
        let watched: Vec<i32> = state.watched().keys().copied().collect();
        let mut owners = self.owners();
        fenced.into_iter().for_each(|pid| owners.follow(pid));
        watched
            .into_iter()
            .for_each(|pid| owners.follow_watched(pid));
        owners.watch_the_unwatched();
        self.carry_out_orders();
        // As long as the call counts as interrupted the next one knows that a file was being made for it.
        self.shares.goes_on();
        for descriptor in std::mem::take(left) {
            match self.shares.of_file(descriptor.as_raw_fd()) {
                Some(_) => self.shares.let_go_of_unknown(descriptor),
                None => lease::take_back(descriptor, self.making.as_ref().map(Making::place)),
            }
        }
        if let Some((id, rest)) = interrupted {
            // From here on the call that a reactor died in is one that waits like others. It goes first:
            // what it may have been told already must still be true.
            let whose = self.whose(id);
            let is_kept = whose.is_some_and(|it| self.buffers.settle(self.desk, it, &rest));
            if let Some(connection) = self.connections.get_mut(id.0) {
                connection.appetite = Appetite::Small;
                if is_kept {
                    connection.lies_on_desk();
                }
            }
            self.enqueue(id);
        }
        step::none(self.desk.memory());
        Ok(())
    }

    /// Should this reactor die, the next one reads the ledger that was written, and not the old one any more,
    /// which is closed only then. Nothing has been closed before that it tells of.
    fn have_ledger_instead(&self, old: Adopted) -> Result<(), Refusal> {
        let Some(desk) = self.guard else {
            return Ok(());
        };
        let lack = match self.custody.ledger() {
            Ok(_) if self.custody.is_behind() => Some(Refusal {
                what: "there is no memory for a ledger",
                reason: Errno::ENOMEM,
            }),
            Ok(_) => None,
            Err(refusal) => Some(refusal).filter(|refusal| errno::may_pass(refusal.reason)),
        };
        if let Some(refusal) = lack {
            std::mem::forget(old);
            return Err(refusal);
        }
        desk.set_ledger(self.custody.ledger().ok().map(AsRawFd::as_raw_fd));
        Ok(())
    }

    /// Fences an owner of which `what` says that somebody else has by now what it writes to.
    pub fn fence_the_robbed(&mut self, pid: Pid, process: OwnedFd, what: &str) {
        self.owners().fence_the_robbed(pid, process, what);
    }

    /// Fences an owner that left while it held locks, unless it is being fenced.
    pub fn fence_who_left(&mut self, pid: Pid, process: OwnedFd) {
        if !self.custody.state().fences().contains_key(&pid) {
            self.owners().fence(pid, process);
        }
    }

    /// The passing half of a client as somebody left it who died at the desk, or passed it on. If it was
    /// this one's turn, what it has on its way is to be left in its slot when its orders are carried out.
    fn find_traffic(
        &mut self,
        id: ClientId,
        since: &mut Since,
    ) -> (Connection, Option<(ClientId, Rest)>) {
        let Some(whose) = self.whose(id) else {
            return (Connection::default(), None);
        };
        let memory = self.desk.memory();
        let (custody, orders) = (&mut self.custody, &mut self.orders);
        let found = recovery::recover(memory, whose, id, custody, since, orders);
        let is_of_turn = step::whose_turn(memory) == Some(whose);
        let passed_on = self.custody.state().traffic().get(&id).map(recovery::rest);
        let (rest, is_known) = match (found, passed_on.is_some()) {
            (Some(recovered), _) => {
                self.making = self.making.take().or(recovered.making);
                for resource in recovered.released {
                    self.end_again(resource);
                }
                (recovered.rest, true)
            }
            (None, true) => (passed_on.unwrap_or_default(), false),
            (None, false) => return (Connection::default(), None),
        };
        let service = self
            .custody
            .state()
            .client(id)
            .map_or(Service::Lock, |it| it.arrival.server);
        if let Some((lockspace, name)) = recovery::gives_back(&rest, service) {
            let place = Place {
                lockspace: &lockspace,
                name: &name,
            };
            self.shares.may_let_go(id, place);
        }
        let is_kept = is_known || self.buffers.settle(self.desk, whose, &rest);
        // Passed on once more it would be worked on or sent twice.
        self.custody.take_traffic(id);
        let mut connection = Connection::resume(recovery::traffic(&rest));
        if is_of_turn {
            return (connection, Some((id, rest)));
        }
        if is_kept {
            connection.lies_on_desk();
        }
        (connection, None)
    }

    /// Goes on with the end of a lock that a reactor died over.
    fn end_again(&mut self, resource: Resource<Lease<Number>>) {
        let is_own = matches!(resource.lease.kind, LockKind::OpenFile);
        if is_own && self.shares.of_file(resource.lease.descriptor.0).is_some() {
            self.custody.end_again_elsewhere(resource);
        } else {
            self.custody.end_again(resource);
        }
    }

    /// What was ordered is done: the step in which it was ends. How the turn ends, if it does.
    fn end_step(&mut self, id: ClientId) -> Option<Turned> {
        let whose = self.whose(id)?;
        let connection = self.connections.get_mut(id.0)?;
        (!self.buffers.end(self.desk, whose, connection)).then_some(Turned::Over)
    }

    fn whose(&self, id: ClientId) -> Option<Whose> {
        let arrival = self.custody.state().client(id)?.arrival;
        Some(whose(id, arrival.server, arrival.id))
    }

    /// Goes on with the poll of an earlier image of this process, which watches the connections
    /// already: to take thousands out of one poll and into another would keep all of them waiting.
    /// False if that cannot be done, and everything is to be watched anew.
    fn inherit(&mut self, poll: RawFd) -> Result<bool, Refusal> {
        let Ok(poll) = descriptors::adopt(poll) else {
            return Ok(false);
        };
        if patiently(|| descriptors::put_in_place(&poll, self.watch.descriptor())).is_err() {
            return Ok(false);
        }
        // From here on there is no way back: half of it would be asked for in one poll and waited
        // for in the other.
        patiently(|| descriptors::put_in_place(&poll, self.poll.as_raw_fd()))
            .map_err(Refusal::of("a descriptor cannot be put in place (dup3)"))?;
        let (signals, timer) = (self.signals.as_raw_fd(), self.timer.as_raw_fd());
        if let Err(refusal) = while_it_may_pass(|| add(&self.watch, Source::Signals, signals)) {
            self.signals = Signals::Asked(refusal);
        }
        if let Err(refusal) = while_it_may_pass(|| add(&self.watch, Source::Timer, timer)) {
            self.timer = Timer::without_descriptor(refusal);
        }
        Ok(true)
    }

    /// Serves somebody who was let in by a reactor that died before it had written that down.
    pub fn take_in(&mut self, socket: OwnedFd, service: Service) {
        let (gate, mut entrance) = self.entrance();
        let accepted = gate.take_in(socket, service, &mut entrance);
        self.let_in_accepted(accepted);
    }

    /// Runs until the daemon has ended, or this reactor has.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub fn run(&mut self) -> std::io::Result<Ended> {
        let mut events = Events::with_capacity(EVENTS);
        // Not heard of, it is found out by a stop.
        let _ = add(&self.watch, Source::Store, self.guard.and_then(Desk::mouth));
        self.watch_mounts();
        self.do_what_was_asked();
        // Somebody may have died at the end who left nothing to do.
        self.pack_if_settled();
        self.finish();
        while !matches!(self.doing, Doing::Ended | Doing::Kept) {
            if let Some(ended) = self.is_over_before_the_daemon() {
                match ended {
                    Ended::Left => self.leave_shares_behind(),
                    Ended::Orphaned => self.shares.stop_closing(),
                    _ => (),
                }
                return Ok(ended);
            }
            self.tend_shares();
            self.watch_idleness();
            if let Err(refusal) = self.timer.set(self.deadlines.first()) {
                tracing::warn!("{refusal}. Deadlines are kept without one");
            }
            let has_more = self.lines.has_ready() || self.shares.has_more_to_give_out();
            let wait = if has_more || self.has_pieces() {
                Some(Duration::ZERO)
            } else {
                self.longest_wait()
            };
            self.leave_word();
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error),
                _ => (),
            }
            if let Some(desk) = self.guard
                && desk.is_away(Moment::now())
            {
                desk.wake_guardian();
            }
            for event in &events {
                self.take_event(event);
            }
            self.ask_what_is_not_told();
            self.wake_who_waited();
            self.work();
            self.write_notes();
            self.wake_subscribers();
            self.tend_ledger();
            self.upgrade_if_ready();
            self.pack_if_settled();
            self.finish();
        }
        self.leave_shares_behind();
        Ok(match self.doing {
            Doing::Kept => Ended::Kept,
            _ => Ended::Stopped,
        })
    }

    /// Has the kernel tell of mounts. Where it does not it is asked each time that somebody wants to know.
    fn watch_mounts(&mut self) {
        if let Some(list) = self.shares.mounts().descriptor()
            && self.watch.add_unusual(Source::Mounts, list).is_ok()
        {
            self.shares.mounts().is_told_of_changes();
        }
    }

    /// What whoever goes on must know before anything else, should this be the last that is heard of this
    /// reactor.
    fn leave_word(&self) {
        if let Some(desk) = self.guard {
            desk.set_ledger(self.custody.ledger().ok().map(AsRawFd::as_raw_fd));
            desk.is_back();
        }
    }

    fn is_over_before_the_daemon(&self) -> Option<Ended> {
        if self.upgrade.is_ordered() {
            Some(Ended::Ordered)
        } else if self.doing == Doing::Leaving {
            Some(Ended::Left)
        } else {
            self.is_orphaned.then_some(Ended::Orphaned)
        }
    }

    /// How long nothing may be heard of signals and deadlines: for ever, as the kernel tells of them,
    /// unless that was refused.
    fn longest_wait(&self) -> Option<Duration> {
        match (self.signals.longest_wait(), self.timer.longest_wait()) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }

    /// Asks for signals and deadlines where the kernel does not tell of them.
    fn ask_what_is_not_told(&mut self) {
        if self.signals.refusal().is_some() {
            self.take_signals();
        }
        if self.timer.went_off_unheard() {
            self.pass_deadlines();
        }
    }

    /// Whether anything waits that is done in pieces.
    fn has_pieces(&self) -> bool {
        let has_estates = self.custody.has_left();
        self.lines.has_pieces() || has_estates || self.gate.has_queue()
    }

    /// Keeps what an event said for the time when it can be acted on.
    fn take_event(&mut self, event: &mio::event::Event) {
        match Source::of(event.token()) {
            Some(Source::Connection(id)) => {
                if let Some(connection) = self.connections.get_mut(id.0) {
                    connection.readable |= event.is_readable();
                    connection.hung_up |= event.is_read_closed() || event.is_error();
                    connection.gone |= event.is_write_closed();
                    self.lines.enqueue(id, connection);
                }
            }
            Some(Source::Listener(place)) => self.gate.knock(place),
            Some(Source::Fence(pid)) => self.owners().look_at_fence(pid),
            Some(Source::Watched(pid)) => self.owners().look_at_watched(pid),
            Some(Source::Signals) => self.take_signals(),
            Some(Source::Timer) => self.pass_deadlines(),
            Some(Source::Successor) => {
                let (upgrade, mut going) = self.going();
                upgrade.look_at_successor(&mut going);
            }
            Some(Source::Store) => self.look_at_store(),
            Some(Source::Helper(number)) => self.shares.hear(number, &mut self.custody),
            Some(Source::Mounts) => self.shares.mounts().changed(),
            None => (),
        }
    }

    /// Calls that waited for others' work on files of shares go on.
    fn wake_who_waited(&mut self) {
        for id in self.shares.take_woken() {
            if let Some(connection) = self.connections.get_mut(id.0) {
                connection.waits = false;
                self.lines.enqueue(id, connection);
            }
        }
    }

    /// Gives out what is to be done on shares.
    fn tend_shares(&mut self) {
        let unwanted = self.custody.take_unwanted();
        self.shares.let_go_of_unwanted(unwanted);
        self.owners().tell_who_is_freed();
        self.wake_who_waited();
        if !self.shares.is_busy() {
            return;
        }
        let watch = &self.watch;
        self.shares.give_out(&mut self.custody, |number, socket| {
            watch.add(Source::Helper(number), socket).is_ok()
        });
        self.shares.tend_closing();
        if self.deadlines.get(Deadline::Shares).is_none() {
            let again = Moment::now().plus_ms(shares::LOOK_MS);
            self.deadlines.set(Deadline::Shares, again);
        }
        self.wake_who_waited();
    }

    /// The files of the leases that were granted are to say so.
    fn write_notes(&mut self) {
        if !self.leases.is_empty() {
            self.notes.write(&mut self.leases, &self.custody);
        }
    }

    /// Something happened of which subscribers are to be told.
    fn wake_subscribers(&mut self) {
        let next = self.custody.news().next();
        if next == self.told {
            return;
        }
        self.told = next;
        for id in self.custody.state().subscribers() {
            // Whose socket is full is woken when it takes bytes again, and is told then.
            if let Some(connection) = self.connections.get_mut(id.0)
                && !connection.waits_to_send
            {
                self.lines.enqueue(*id, connection);
            }
        }
    }

    /// The service manager may have dropped what a stop would use.
    fn look_at_store(&self) {
        let mouth = self.guard.and_then(Desk::mouth);
        if mouth.is_some_and(|mouth| !passing::has_other_end(mouth)) {
            tracing::error!(
                target: "rpc.netdaemon",
                "The service manager keeps nothing for this unit any more (FileDescriptorStoreMax=, or it is \
                 masked): a stop would fence every owner of a lock. Put the unit right, and have the daemon \
                 replace itself (SIGUSR1), which changes nothing else"
            );
        }
    }

    /// A turn of everybody who is ready, then, for about as long as one such turn, pieces of what
    /// waits.
    fn work(&mut self) {
        let did_anything_wait = self.has_pieces();
        let mut served = 0usize;
        while served < CONNECTIONS_A_TURN
            && let Some(id) = self.lines.next_ready()
        {
            self.serve(id, None);
            served = served.saturating_add(1);
        }
        if self.has_pieces() {
            // Who left something to do and is alone with it is not its own company.
            if served > 1 || (served > 0 && did_anything_wait) {
                self.pace.has_company();
            }
            let end = self.pace.turn_end(Moment::now());
            while self.piece(end) && Moment::now() < end {}
        }
    }

    /// One piece of what waits, from each line in turn. False if nothing waits.
    fn piece(&mut self, end: Moment) -> bool {
        for _ in ROTATION {
            if let Some(line) = self.lines.next_line()
                && self.piece_of(line, end)
            {
                return true;
            }
        }
        false
    }

    fn piece_of(&mut self, line: Line, end: Moment) -> bool {
        match line {
            Line::Unfinished => match self.lines.next_unfinished() {
                Some(id) => self.serve(id, Some(end)),
                None => return false,
            },
            Line::Newcomers => {
                if !self.lines.may_let_in() {
                    return false;
                }
                let had_queue = self.gate.has_queue();
                for place in 0..self.gate.len() {
                    self.accept(place);
                }
                return had_queue;
            }
            Line::Endings => match self.lines.endings.pop_front() {
                Some(id) => self.clear_away(id),
                None => return false,
            },
            Line::Dead => {
                let mut owners = self.owners();
                if owners.free_some() {
                    return true;
                }
                match owners.lines.dead.pop_front() {
                    Some(pid) => owners.bury(pid),
                    None => return false,
                }
            }
        }
        true
    }

    /// One connection's turn. It is shorter if an `end` is given that comes earlier.
    fn serve(&mut self, id: ClientId, end: Option<Moment>) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        connection.queued = false;
        let start = Moment::now();
        let end = end.unwrap_or_else(|| self.pace.turn_end(start));
        let mut turned = self.turn(id, start, end);
        while turned == Turned::Ordered {
            self.carry_out_orders();
            turned = self
                .end_step(id)
                .unwrap_or_else(|| self.turn(id, start, end));
        }
        if turned == Turned::Over {
            self.end_connection(id);
        }
        self.count_admin_bytes(id);
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        connection.appetite = turned.appetite(connection.appetite);
        if turned == Turned::Unfinished {
            self.lines.enqueue(id, connection);
        }
    }

    fn turn(&mut self, id: ClientId, start: Moment, end: Moment) -> Turned {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return Turned::Over;
        };
        let mut turn = Turn {
            hall: Hall {
                custody: &mut self.custody,
                waiting: &mut self.waiting,
                deadlines: &mut self.deadlines,
                reserve: &self.reserve,
                names: &mut self.names,
                ground: &mut self.ground,
                orders: &mut self.orders,
                leases: &mut self.leases,
                shares: &mut self.shares,
                making: step::making(self.desk.memory()),
                own_seen: Seen::default(),
            },
            watch: &self.watch,
            desk: self.desk,
            buffers: &mut self.buffers,
            pace: self.pace,
        };
        turn.run(id, connection, start, end)
    }

    /// Does what calls asked for.
    fn carry_out_orders(&mut self) {
        while !self.orders.is_empty() {
            match self.orders.remove(0) {
                Order::Stop => self.stop(),
                Order::End(id) => self.end_connection(id),
                Order::LetIn(service) => self.let_in(service),
                Order::Settle(pid) => self.owners().bury(pid),
                Order::Watch(id) => self.watch_owner(id),
                Order::Spoke(id, before) => self.owners().owner_changed(id, before),
            }
        }
    }

    /// A client that speaks for others was granted a lock.
    fn watch_owner(&mut self, id: ClientId) {
        let was_trusted = self
            .connections
            .get(id.0)
            .is_some_and(|it| it.shares_numbers);
        let is_trusted = self.owners().watch_owner(id, was_trusted);
        if let Some(connection) = self.connections.get_mut(id.0) {
            connection.shares_numbers = is_trusted;
        }
    }

    /// Keeps count of the memory that admin clients take, and closes the one that takes too much.
    fn count_admin_bytes(&mut self, id: ClientId) {
        let Some(connection) = self.connections.get_mut(id.0) else {
            return;
        };
        let held = u32::try_from(connection.held()).unwrap_or(u32::MAX);
        if held == connection.counted {
            return;
        }
        let client = self.custody.state().client(id);
        let Some(client) = client.filter(|it| it.arrival.server == Service::Admin) else {
            return;
        };
        let others = self.admin_bytes.saturating_sub(connection.counted);
        connection.counted = held;
        self.admin_bytes = others.saturating_add(held);
        if self.admin_bytes > ADMIN_BYTES && held > 0 && !client.is_over() {
            tracing::error!(
                target: "rpc.netserverclient",
                "The admin client with pid {} is closed: unfinished messages and unread replies \
                 of all admin clients together would take more than {} MiB",
                client.peer().pid, ADMIN_BYTES >> 20
            );
            self.end_connection(id);
        }
    }

    /// Puts a connection in a list of those with something to do.
    fn enqueue(&mut self, id: ClientId) {
        if let Some(connection) = self.connections.get_mut(id.0) {
            self.lines.enqueue(id, connection);
        }
    }

    /// Takes in a connection that waits at this socket.
    fn accept(&mut self, place: usize) {
        let (gate, mut entrance) = self.entrance();
        let accepted = gate.accept(place, &mut entrance);
        self.let_in_accepted(accepted);
    }

    fn entrance(&mut self) -> (&mut Gate, Entrance<'_>) {
        let entrance = Entrance {
            custody: &mut self.custody,
            reserve: &mut self.reserve,
            deadlines: &mut self.deadlines,
            watch: &self.watch,
        };
        (&mut self.gate, entrance)
    }

    fn let_in_accepted(&mut self, accepted: Accepted) {
        let Accepted::Client(id, refused) = accepted else {
            return;
        };
        // The kernel has just given this number.
        let _ = self.connections.insert(id.0, Connection::new());
        self.enqueue(id);
        if let Some(reason) = refused {
            self.refuse(id, reason);
        }
    }

    fn refuse(&mut self, id: ClientId, reason: NoRoom) {
        let state = self.custody.state();
        let Some(client) = state.client(id) else {
            return;
        };
        let service = client.arrival.server;
        let error = no_room(reason, state.server(service).limit);
        tracing::error!(
            target: "rpc.netserver", domain = error.domain.number(), code = error.code.number(),
            "{} (client of the {} server, pid {})",
            Printable(&error.message()), service.name(), client.peer().pid
        );
        self.wait_for_first_call(id, reason);
    }

    fn wait_for_first_call(&mut self, id: ClientId, reason: NoRoom) {
        let longest = self.waiting.enter(id, reason, &mut self.deadlines);
        if let Some(longest) = longest {
            self.end_connection(longest);
        }
    }

    /// There may be room now for clients that were refused for want of it.
    fn let_in(&mut self, service: Service) {
        self.waiting
            .let_in(service, &mut self.custody, &mut self.deadlines);
    }

    /// A connection is over. It is cleared away when the reactor comes to it.
    fn end_connection(&mut self, id: ClientId) {
        if self.custody.leaves(id) {
            self.lines.endings.push_back(id);
        }
    }

    /// Clears away a connection that is over. An owner that leaves with its last word unspoken is
    /// fenced, or its locks are freed if it is dead already.
    ///
    /// An owner that cannot be reached for want of memory or descriptors must not live on for that:
    /// its connection stays, and it is tried again.
    fn clear_away(&mut self, id: ClientId) {
        // What it gave back is not its own any more.
        self.shares.leaves(id, &mut self.custody);
        let mut owners = self.owners();
        let left = owners.left_with(id);
        if let Left::Owner(pid, Err(reason)) = &left
            && errno::may_pass(*reason)
        {
            owners.is_out_of_reach(*pid, *reason);
            let again = Moment::now().plus_ms(RETRY_MS);
            return self.deadlines.set(Deadline::ClearAway(id), again);
        }
        let Some(client) = owners.custody.state().client(id) else {
            return;
        };
        let service = client.arrival.server;
        let spoke_for = client.owner.as_deref().map(|owner| owner.pid);
        match left {
            Left::Owner(pid, process) => owners.owner_left(id, pid, process),
            Left::Nothing => {
                if let Some(pid) = spoke_for {
                    if !owners.custody.state().table().holds(pid) {
                        owners.custody.is_within_reach(pid);
                    }
                    owners.end_idle_watch(pid);
                }
            }
        }
        self.deadlines.unset(Deadline::Serve(id));
        self.deadlines.unset(Deadline::ClearAway(id));
        self.waiting.forget(id, &mut self.deadlines);
        self.watch.remove(id.0);
        if let Some(connection) = self.connections.remove(id.0) {
            self.admin_bytes = self.admin_bytes.saturating_sub(connection.counted);
        }
        self.buffers.leave(self.desk, id);
        // Behind what becomes of its owner, and before anybody else can have its number. Who finds a connection
        // that nobody knows would let it in again.
        self.desk.set_ending(Some(id.0));
        drop(self.custody.gone(id));
        self.desk.set_ending(None);
        self.reserve.refill();
        self.deadlines.give_memory_back_later();
        self.let_in(service);
        // One that could not accept for want of descriptors tries again.
        self.gate.try_again();
    }

    fn owners(&mut self) -> Owners<'_> {
        Owners {
            names_processes: self.gate.names_processes(),
            custody: &mut self.custody,
            deadlines: &mut self.deadlines,
            watch: &self.watch,
            reserve: &mut self.reserve,
            lines: &mut self.lines,
            wanted: &mut self.wanted,
            shares: &mut self.shares,
            freeing: &mut self.freeing,
            is_ending: matches!(self.doing, Doing::Ending | Doing::Ended),
        }
    }

    fn going(&mut self) -> (&mut Upgrade, Going<'_>) {
        let going = Going {
            custody: &mut self.custody,
            connections: &mut self.connections,
            desk: self.desk,
            lines: &mut self.lines,
            deadlines: &mut self.deadlines,
            watch: &self.watch,
        };
        (&mut self.upgrade, going)
    }

    /// Hands over, if a successor is ready: at the end of a turn, when nothing is half done.
    fn upgrade_if_ready(&mut self) {
        if self.doing != Doing::Serving || !self.upgrade.is_ready() {
            return;
        }
        self.settle();
        if !self.are_shares_settled() {
            return;
        }
        let (upgrade, mut going) = self.going();
        upgrade.go_ahead(&mut going);
    }

    /// Whether everything that is open is somebody's who goes on: it is closed soon, or its lock let go of, what is
    /// not. What a process closes with the table of descriptors that it shares with this one must be closed
    /// before.
    fn are_shares_settled(&mut self) -> bool {
        self.tend_shares();
        if self.shares.is_settled() {
            (self.unsettled_since, self.is_unsettled_told) = (None, false);
            return true;
        }
        let again = Moment::now().plus_ms(SHARES_MS);
        self.deadlines.set(Deadline::Shares, again);
        let since = *self.unsettled_since.get_or_insert_with(Moment::now);
        if Moment::now().ms_since(since) >= UNSETTLED_MS && !self.is_unsettled_told {
            self.is_unsettled_told = true;
            tracing::warn!(
                target: "rpc.netdaemon",
                "The daemon replaces itself when files on shares are closed that nobody has any more. It serves \
                 meanwhile. What is under way: {}",
                self.shares.under_way().join("; ")
            );
        }
        false
    }

    /// Connections that are over and owners that are dead need not be handed over.
    fn settle(&mut self) {
        while let Some(id) = self.lines.endings.pop_front() {
            self.clear_away(id);
        }
        let mut owners = self.owners();
        while let Some(pid) = owners.lines.dead.pop_front() {
            owners.bury(pid);
        }
        while owners.free_some() {}
    }

    /// Writes the ledger anew if it has grown too long or lacks something.
    fn tend_ledger(&mut self) {
        let is_read = self.upgrade.is_under_way();
        if !self.custody.wants_renewal()
            || self.deadlines.get(Deadline::Ledger).is_some()
            // A successor is reading the file.
            || is_read && !self.custody.is_behind()
        {
            return;
        }
        match self.custody.renew() {
            // The state took memory, too.
            Ok(()) => self.deadlines.give_memory_back_later(),
            Err(reason) => {
                if self.custody.is_behind() {
                    tracing::error!(
                        target: "locking.lock_daemon",
                        "The state that an upgrade needs cannot be written down: {}. No new lock \
                         is granted until it can: free some memory",
                        errno::text(reason)
                    );
                } else {
                    self.custody.put_off_renewal();
                }
                self.deadlines
                    .set(Deadline::Ledger, Moment::now().plus_ms(LEDGER_RETRY_MS));
            }
        }
    }

    fn pass_deadlines(&mut self) {
        self.timer.clear();
        let now = Moment::now();
        while let Some(deadline) = self.deadlines.take_due(now) {
            self.pass_deadline(deadline);
        }
    }

    /// Does what has come due.
    fn pass_deadline(&mut self, deadline: Deadline) {
        match deadline {
            Deadline::Kill(pid) => self.owners().kill(pid),
            Deadline::StillAlive(pid) => self.owners().still_alive(pid),
            Deadline::Watch => self.owners().watch_wanted(),
            Deadline::Unheard(pid) => self.owners().look_for_unheard(pid),
            Deadline::Refused(id) => self.end_connection(id),
            Deadline::Serve(id) => self.enqueue(id),
            Deadline::ClearAway(id) => self.lines.endings.push_back(id),
            Deadline::Accept => self.gate.try_again(),
            Deadline::Idle => self.end_if_idle(),
            // At the end of the turn everything is packed, whoever is not dead by then.
            Deadline::Stop if self.doing == Doing::Keeping => (),
            Deadline::Stop => {
                self.owners().give_up();
                self.doing = Doing::Ended;
            }
            Deadline::Memory => {
                // A successor may be reading the ledger.
                if !self.upgrade.is_under_way() {
                    self.custody.give_memory_back();
                }
                heap::give_back();
                let state = self.custody.state();
                self.buffers.give_back(self.desk, |number, who| {
                    let id = i32::try_from(number).map(ClientId);
                    let client = id.ok().and_then(|id| Some((id, state.client(id)?.arrival)));
                    client.is_some_and(|(id, arrival)| {
                        whose(id, arrival.server, arrival.id).who == who
                    })
                });
            }
            Deadline::Ledger => (),
            Deadline::Shares => _ = self.shares.look(),
            Deadline::Successor => {
                let (upgrade, mut going) = self.going();
                upgrade.successor_is_late(&mut going);
            }
            Deadline::Abandoned => {
                let (upgrade, mut going) = self.going();
                upgrade.reap_abandoned(&mut going);
                upgrade.reap_inherited(&mut going);
            }
            Deadline::Quiet => {
                let (upgrade, mut going) = self.going();
                upgrade.never_quiet(&mut going);
            }
        }
    }

    /// Whether nobody needs the daemon: no client of either server, no lock.
    fn is_idle(&self) -> bool {
        let state = self.custody.state();
        state.client_count() == 0 && state.table().is_empty() && state.estates().is_empty()
    }

    /// Starts or stops the clock of the idle timeout.
    fn watch_idleness(&mut self) {
        let timeout = self.custody.state().settings().idle_timeout_s;
        if timeout == 0 || self.doing != Doing::Serving || !self.is_idle() {
            self.deadlines.unset(Deadline::Idle);
        } else if self.deadlines.get(Deadline::Idle).is_none() {
            let timeout = u64::from(timeout).saturating_mul(1000);
            self.deadlines
                .set(Deadline::Idle, Moment::now().plus_ms(timeout));
        }
    }

    fn end_if_idle(&mut self) {
        // Somebody may have come in the same moment.
        for place in 0..self.gate.len() {
            self.gate.knock(place);
            self.accept(place);
        }
        if !self.is_idle() {
            return;
        }
        tracing::info!(
            target: "rpc.netdaemon",
            "No client and no lock for {} s: the daemon ends",
            self.custody.state().settings().idle_timeout_s
        );
        self.stop();
    }

    /// Whether the service manager has something to keep everything in, and there is anything to be kept.
    fn mouth(&self) -> Option<i32> {
        let is_needed = !self.is_idle() || !self.custody.state().fences().is_empty();
        self.guard?.mouth().filter(|_| is_needed)
    }

    /// Begins the end for which nobody is fenced who need not be: everything is kept for the next start.
    fn begin_to_keep(&mut self) {
        self.doing = Doing::Keeping;
        self.tell_that_it_ends();
        self.deadlines
            .set(Deadline::Stop, Moment::now().plus_ms(stop::STOP_MS));
        if self
            .guard
            .is_some_and(|desk| desk.begins_to_pack() >= keep::TRIES)
        {
            return self.cannot_keep("the process that serves died of it again and again");
        }
        let state = self.custody.state();
        let unkeepable = keep::unkeepable(state);
        let connections = keep::connections_of(state, &unkeepable);
        for pid in unkeepable {
            tracing::error!(
                target: "locking.lock_daemon",
                "{} has locks that libvirt's daemon took, which end with this process: it has to be dead before. \
                 What the others have is kept",
                self.owners().text(pid)
            );
        }
        for id in connections {
            self.end_connection(id);
        }
    }

    /// Puts everything away for the next start, at the end of a turn, if nothing stands in the way of that.
    fn pack_if_settled(&mut self) {
        if self.doing != Doing::Keeping {
            return;
        }
        self.settle();
        let state = self.custody.state();
        let mut waits_for = keep::unkeepable(state).into_iter();
        let waits = waits_for.any(|pid| state.fences().contains_key(&pid));
        if !waits || self.deadlines.get(Deadline::Stop).is_none() {
            self.pack();
        }
    }

    fn pack(&mut self) {
        self.deadlines.unset(Deadline::Stop);
        for pid in keep::unkeepable(self.custody.state()) {
            // As with every stop; the others lose nothing by it.
            tracing::error!(
                target: "locking.lock_daemon",
                "{} could not be ended, and the locks that it has from libvirt's daemon end with this process: \
                 until the next start takes them again nothing keeps others from its disks",
                self.owners().text(pid)
            );
        }
        let Some(mouth) = self.mouth() else {
            return self.stop();
        };
        self.reserve = Reserve::default();
        let (_, mut going) = self.going();
        match going.pack(mouth) {
            Ok(()) => {
                let state = self.custody.state();
                tracing::info!(
                    target: "rpc.netdaemon",
                    "The service manager keeps {} connections and {} locks until the next start",
                    state.client_count(),
                    state.table().len()
                );
                self.doing = Doing::Kept;
            }
            Err(reason) => {
                self.custody.reopen();
                self.reserve.refill();
                self.cannot_keep(&reason);
            }
        }
    }

    fn cannot_keep(&mut self, reason: &str) {
        // The service manager may have lost its main process; if so, it starts the daemon again at once.
        if self.guard.is_some_and(Desk::is_to_leave) {
            tracing::error!(
                target: "rpc.netdaemon",
                "The service manager cannot keep the locks until the next start: {reason}"
            );
            return self.leave_as_it_is();
        }
        tracing::error!(
            target: "rpc.netdaemon",
            "The service manager cannot keep the locks until the next start: {reason}. So the owners are \
             fenced"
        );
        self.stop();
    }

    fn tell_that_it_ends(&mut self) {
        let (upgrade, mut going) = self.going();
        upgrade.abandon_upgrade(&mut going);
        match self.guard {
            Some(desk) => {
                desk.tell(Message::Stopping);
                desk.wake_guardian();
            }
            None => notify::stopping(),
        }
        self.deadlines.unset(Deadline::Idle);
    }

    /// Begins the end: no new clients, every connection closed, every owner that holds something
    /// over its own connection fenced.
    fn stop(&mut self) {
        if !matches!(self.doing, Doing::Serving | Doing::Keeping) {
            return;
        }
        self.doing = Doing::Ending;
        if let Some(desk) = self.guard {
            // Whoever goes on should this reactor die goes on with this end.
            desk.ask(Signal::SIGINT);
        }
        self.tell_that_it_ends();
        self.deadlines
            .set(Deadline::Stop, Moment::now().plus_ms(stop::STOP_MS));
        self.gate.close();
        stop::close_listeners(&mut self.custody, &self.watch);
        let clients = self.custody.state().clients();
        let clients: Vec<ClientId> = clients.map(|(id, _)| id).collect();
        for id in clients {
            self.end_connection(id);
        }
    }

    /// Whether nothing is to be waited for that is under way on shares: it is done, or has had its time, and is left
    /// as it is.
    fn are_shares_over(&mut self) -> bool {
        self.tend_shares();
        let now = Moment::now();
        let end = *self
            .shares_until
            .get_or_insert_with(|| now.plus_ms(stop::SHARES_MS));
        let is_settled = self.shares.is_settled() && self.custody.state().estates().is_empty();
        let end = end.max(self.shares.answered_at().plus_ms(stop::SHARES_MS));
        if !is_settled && now < end {
            let again = now.plus_ms(SHARES_MS);
            self.deadlines.set(Deadline::Shares, again);
            return false;
        }
        for what in self.shares.under_way() {
            tracing::error!(
                target: "locking.lockspace",
                "The daemon ends while {what} waits for a server that does not answer. What may be locked there is \
                 let go of when it does"
            );
        }
        true
    }

    /// The end of the daemon does not wait until files on shares are closed.
    fn leave_shares_behind(&self) {
        let files = closer::on_shares();
        if files.is_empty() {
            return;
        }
        let daemon = match self.guard {
            Some(desk) => desk.guardian().cast_signed(),
            None => process::own_number(),
        };
        // Otherwise it waits for them, as every process does at its end.
        let _ = closer::stay_behind(&files, daemon);
    }

    /// The last step of the end, when there is nobody left to fence.
    fn finish(&mut self) {
        if self.doing != Doing::Ending || !self.owners().is_over() {
            return;
        }
        if self.shares_until.is_none() {
            debug_assert!(self.custody.state().own_connections().is_empty());
            self.owners().end_all();
        }
        if self.are_shares_over() {
            self.doing = Doing::Ended;
        }
    }

    /// What is sent to a process that has a guardian counts for nothing; but what comes when that is dead is
    /// meant for this one, as the next guardian.
    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.next() {
            match self.guard {
                None => self.act_on(signal),
                Some(desk) if !desk.has_guardian() => {
                    // It is pending again, and read when this process waits for it.
                    signals::keep(signal);
                    break;
                }
                Some(_) => (),
            }
        }
        self.do_what_was_asked();
    }

    /// What the guardian was asked for, if there is one.
    fn do_what_was_asked(&mut self) {
        let Some(desk) = self.guard else {
            return;
        };
        self.is_orphaned = !desk.has_guardian();
        if desk.is_to_leave() && self.doing == Doing::Serving {
            self.leave();
        }
        if let Some(signal) = desk.asked_to_end() {
            self.act_on(signal);
        }
        for signal in [Signal::SIGHUP, Signal::SIGUSR1] {
            if desk.begin_asked(signal) {
                self.act_on(signal);
            }
        }
    }

    /// The service manager ends what is left of a daemon whose main process has died: that is no end in order. A
    /// unit that has everything kept does not end it for that, so there it is one.
    fn leave(&mut self) {
        if self.mouth().is_some() {
            tracing::info!(target: "rpc.netdaemon", "The service manager ends the daemon");
            self.begin_to_keep();
        } else {
            self.leave_as_it_is();
        }
    }

    fn leave_as_it_is(&mut self) {
        tracing::error!(
            target: "rpc.netdaemon",
            "The service manager has lost the daemon's main process and ends this one as well. No guest is \
             ended for that: the locks are free until the next start takes them again. Start the daemon at \
             once, and let its unit say NotifyAccess=all and ExitType=cgroup"
        );
        self.doing = Doing::Leaving;
    }

    fn act_on(&mut self, signal: Signal) {
        match signal {
            Signal::SIGTERM if self.doing == Doing::Serving && self.mouth().is_some() => {
                tracing::info!(target: "rpc.netdaemon", "{signal}: the daemon ends");
                self.begin_to_keep();
            }
            Signal::SIGTERM if self.doing == Doing::Keeping => (),
            Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM
                if matches!(self.doing, Doing::Serving | Doing::Keeping) =>
            {
                tracing::info!(target: "rpc.netdaemon", "{signal}: the daemon ends");
                if signal == Signal::SIGTERM
                    && notify::has_lasting_store()
                    && self.guard.is_none_or(|desk| desk.mouth().is_none())
                {
                    tracing::error!(
                        target: "rpc.netdaemon",
                        "The service manager could not be given what it was to keep, as was said when the daemon \
                         started. So the owners are fenced"
                    );
                }
                self.stop();
            }
            Signal::SIGHUP => {
                self.reload_configuration();
                if let Some(desk) = self.guard {
                    desk.end(signal);
                }
            }
            Signal::SIGUSR1 if self.doing == Doing::Serving => {
                let (upgrade, mut going) = self.going();
                upgrade.begin(&mut going);
            }
            _ => (),
        }
    }

    fn reload_configuration(&mut self) {
        match (self.reload)() {
            Ok(limits) => {
                self.configure(limits);
                self.custody.log_changed(log::saved());
                for service in Service::ALL {
                    self.let_in(service);
                }
                tracing::info!(target: "rpc.netdaemon", "SIGHUP: the configuration was read again");
            }
            Err(reason) => tracing::error!(
                target: "rpc.netdaemon",
                "SIGHUP: the settings stay as they are, because the configuration cannot be \
                 used: {reason}"
            ),
        }
    }
}

/// Watches a descriptor, if there is one.
fn add(watch: &Watch, source: Source, descriptor: Option<i32>) -> Result<(), Refusal> {
    descriptor.map_or(Ok(()), |descriptor| {
        watch
            .add(source, descriptor)
            .map_err(Refusal::of("a descriptor cannot be watched (epoll_ctl)"))
    })
}
