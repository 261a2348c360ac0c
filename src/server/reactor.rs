//! The loop.
//!
//! Six things can wake it: a signal, a deadline, a listening socket, a connection, the death of an
//! owner that is fenced or watched, and the end of a successor that is being looked at. The kernel reports
//! each change once (edge-triggered), so what it said is kept in lists of things to do. Connections
//! on which something happened have a turn first; what needs longer waits in line behind them and is
//! worked off in short pieces, with a poll after each few: whoever comes with one call never waits
//! for somebody's thousand. Nothing here ever waits, except in the poll when there is nothing to do.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use mio::{Events, Poll};
use nix::sys::signal::Signal;

use super::clients::ClientLimit;
use super::connection::Service;
use super::daemon::{Daemon, State};
use super::token::Source;
use crate::host::clock::Moment;
use crate::host::descriptors;
use crate::host::patience::{patiently, while_it_may_pass};
use crate::host::process::{self, Process};
use crate::host::refusal::Refusal;
use crate::host::signals::Signals;
use crate::host::timer::Timer;
use crate::restart::ledger::Ledger;

/// How many connections on which something happened have their turn between two polls.
const CONNECTIONS_A_TURN: usize = 64;
/// How many events one poll reports.
const EVENTS: usize = 256;

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

/// The lines in which work waits that does not have to be done at once.
#[derive(Clone, Copy)]
enum Line {
    /// Connections whose turn was too short.
    Unfinished,
    /// Connections that wait to be accepted.
    Newcomers,
    /// Connections that are to be cleared away.
    Endings,
    /// Dead owners whose locks are to be freed.
    Dead,
}

/// In which order they have a piece done, those that are empty passed over. A connection needs several
/// pieces until it is finished and cleared away, and one to be accepted: were newcomers let in as fast,
/// a flood of them would take up all descriptors.
const ROTATION: [Line; 8] = [
    Line::Unfinished,
    Line::Endings,
    Line::Unfinished,
    Line::Dead,
    Line::Unfinished,
    Line::Endings,
    Line::Unfinished,
    Line::Newcomers,
];

/// How many are let in while all that is unfinished has a piece done once. A newcomer may need many
/// pieces: those that come and send half a frame would otherwise be let in faster than they are read,
/// and fill the daemon's memory.
const NEWCOMERS_A_PASS: usize = 16;

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

/// The poll and what it watches.
pub struct Reactor {
    poll: Poll,
    signals: Signals,
    timer: Timer,
    reload: Reload,
    /// How far the rotation is.
    rotation: std::iter::Cycle<std::array::IntoIter<Line, 8>>,
    /// Pieces of what is unfinished since somebody was let in.
    pieces: usize,
    /// Everything else.
    pub daemon: Daemon,
}

impl Reactor {
    /// A reactor that watches signals and the timer; listeners are added with
    /// [`Reactor::listen`]. What can be done another way where the host refuses it is, and is told by
    /// [`Reactor::refusals`].
    pub fn new(reload: Reload) -> Result<Reactor, Refusal> {
        let no_poll = Refusal::of("events cannot be waited for (epoll_create1)");
        // Where there is no other way it is tried for a while, whatever the reason.
        let poll = patiently(|| Poll::new().map_err(&no_poll))?;
        let registry = patiently(|| {
            let copy = poll.registry().try_clone();
            copy.map_err(Refusal::of("a descriptor cannot be copied (fcntl)"))
        })?;
        let signals = while_it_may_pass(|| {
            let signals = Signals::open()?;
            watch(Source::Signals, &registry, signals.as_raw_fd())?;
            Ok(signals)
        })
        .unwrap_or_else(Signals::Asked);
        let timer = while_it_may_pass(|| {
            let timer = Timer::new()?;
            watch(Source::Timer, &registry, timer.as_raw_fd())?;
            Ok(timer)
        })
        .unwrap_or_else(Timer::without_descriptor);
        let no_memory = Refusal::of("there is no memory for a ledger");
        let ledger = while_it_may_pass(|| Ledger::new().map_err(&no_memory))
            .or_else(|refusal| Ledger::private(refusal).map_err(&no_memory))?;
        let daemon = Daemon::new(registry, ledger);
        Ok(Reactor {
            poll,
            signals,
            timer,
            reload,
            rotation: ROTATION.into_iter().cycle(),
            pieces: 0,
            daemon,
        })
    }

    /// Goes on with the poll of an earlier image of this process, which watches the connections
    /// already: to take thousands out of one poll and into another would keep all of them waiting.
    /// False if that cannot be done, and everything is to be watched anew.
    pub fn inherit(&mut self, poll: &OwnedFd) -> Result<bool, Refusal> {
        let registry = &self.daemon.registry;
        if patiently(|| descriptors::put_in_place(poll, registry.as_raw_fd())).is_err() {
            return Ok(false);
        }
        // From here on there is no way back: half of it would be asked for in one poll and waited
        // for in the other.
        patiently(|| descriptors::put_in_place(poll, self.poll.as_raw_fd()))
            .map_err(Refusal::of("a descriptor cannot be put in place (dup3)"))?;
        let (signals, timer) = (self.signals.as_raw_fd(), self.timer.as_raw_fd());
        if let Err(refusal) = while_it_may_pass(|| watch(Source::Signals, registry, signals)) {
            self.signals = Signals::Asked(refusal);
        }
        if let Err(refusal) = while_it_may_pass(|| watch(Source::Timer, registry, timer)) {
            self.timer = Timer::without_descriptor(refusal);
        }
        Ok(true)
    }

    /// Whether a process can be watched, which is what killing an owner stands on.
    pub fn try_out(&self) -> Result<(), Refusal> {
        let own = process::started().cast_signed();
        let process = Process::open_any(own).map_err(Refusal::of(
            "the process of an owner cannot be watched (pidfd_open)",
        ))?;
        let pidfd = process.pidfd().as_raw_fd();
        watch(Source::Successor, &self.daemon.registry, Some(pidfd))
    }

    /// What the host refused and is done another way: each costs something, as the log must say.
    pub fn refusals(&self) -> [(Way, Option<Refusal>); 3] {
        [
            (Way::Ledger, self.daemon.ledger.descriptor().err()),
            (Way::Signals, self.signals.refusal()),
            (Way::Timer, self.timer.refusal()),
        ]
    }

    /// Sets the limits that the configuration gives.
    pub fn configure(&mut self, limits: Limits) {
        for (service, limit) in limits.by_service() {
            self.daemon.clients_mut(service).configure(limit);
            self.daemon.note_server(service);
        }
    }

    /// Sets the limits that the configuration gives, where it gives others than before an upgrade.
    pub fn configure_if_changed(&mut self, limits: Limits) {
        for (service, limit) in limits.by_service() {
            self.daemon.clients_mut(service).configure_if_changed(limit);
            self.daemon.note_server(service);
        }
    }

    /// Adds a listening socket. It is the daemon's even if it cannot be watched.
    pub fn listen(&mut self, listener: super::accept::Listener) -> Result<(), Refusal> {
        let source = Source::Listener(self.daemon.listeners.len());
        let descriptor = listener.socket.as_raw_fd();
        self.daemon.listeners.push(listener);
        patiently(|| watch(source, self.poll.registry(), Some(descriptor)))
    }

    /// Runs until the daemon has ended.
    pub fn run(&mut self) -> std::io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        while self.daemon.state != State::Ended {
            self.daemon.watch_idleness();
            if let Err(refusal) = self.timer.set(self.daemon.deadlines.first()) {
                tracing::warn!("{refusal}. Deadlines are kept without one");
            }
            let wait = if self.has_work() {
                Some(Duration::ZERO)
            } else {
                self.longest_wait()
            };
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error),
                _ => (),
            }
            for event in &events {
                self.note(event);
            }
            self.ask_what_is_not_told();
            self.work();
            self.daemon.tend_ledger();
            self.daemon.upgrade_if_ready();
            self.daemon.finish();
        }
        Ok(())
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

    fn has_work(&self) -> bool {
        !self.daemon.ready.is_empty() || self.has_pieces()
    }

    /// Whether anything waits that is done in pieces.
    fn has_pieces(&self) -> bool {
        let daemon = &self.daemon;
        !daemon.unfinished.is_empty()
            || !daemon.ending.is_empty()
            || !daemon.dead.is_empty()
            || !daemon.estates.is_empty()
            || daemon.listeners.iter().any(|listener| listener.queued)
    }

    /// Keeps what an event said for the time when it can be acted on.
    fn note(&mut self, event: &mio::event::Event) {
        match Source::of(event.token()) {
            Some(Source::Connection(place)) => {
                if let Some(connection) = self.daemon.connections.get_mut(place) {
                    connection.readable |= event.is_readable();
                    connection.hung_up |= event.is_read_closed() || event.is_error();
                    self.daemon.enqueue(place);
                }
            }
            Some(Source::Listener(number)) => {
                if let Some(listener) = self.daemon.listeners.get_mut(number) {
                    listener.readable = true;
                    listener.queued = true;
                }
            }
            Some(Source::Fence(place)) => self.daemon.look_at_fence(place),
            Some(Source::Watched(place)) => self.daemon.look_at_watched(place),
            Some(Source::Signals) => self.take_signals(),
            Some(Source::Timer) => self.pass_deadlines(),
            Some(Source::Successor) => self.daemon.look_at_successor(),
            None => (),
        }
    }

    /// A turn of everybody who is ready, then, for about as long as one such turn, pieces of what
    /// waits.
    fn work(&mut self) {
        let did_anything_wait = self.has_pieces();
        let mut served = 0usize;
        while served < CONNECTIONS_A_TURN
            && let Some(place) = self.daemon.ready.pop_front()
        {
            self.daemon.serve(place, None);
            served = served.saturating_add(1);
        }
        if self.has_pieces() {
            // Who left something to do and is alone with it is not its own company.
            if served > 1 || (served > 0 && did_anything_wait) {
                self.daemon.note_company();
            }
            let end = self.daemon.turn_end(Moment::now());
            while self.piece(end) && Moment::now() < end {}
        }
    }

    /// One piece of what waits, from each line in turn: a line that is long, or made longer all the
    /// time, holds up no other. False if nothing waits.
    fn piece(&mut self, end: Moment) -> bool {
        for _ in ROTATION {
            if let Some(line) = self.rotation.next()
                && self.piece_of(line, end)
            {
                return true;
            }
        }
        false
    }

    fn piece_of(&mut self, line: Line, end: Moment) -> bool {
        let daemon = &mut self.daemon;
        match line {
            Line::Unfinished => match daemon.unfinished.pop_front() {
                Some(place) => {
                    self.pieces = self.pieces.saturating_add(1);
                    daemon.serve(place, Some(end));
                }
                None => return false,
            },
            Line::Newcomers => {
                if self.pieces.saturating_mul(NEWCOMERS_A_PASS) < daemon.unfinished.len() {
                    return false;
                }
                self.pieces = 0;
                let mut any = false;
                for number in 0..daemon.listeners.len() {
                    let listener = daemon.listeners.get(number);
                    if listener.is_some_and(|listener| listener.queued) {
                        let more = daemon.accept(number);
                        if let Some(listener) = daemon.listeners.get_mut(number) {
                            listener.queued = more;
                        }
                        any = true;
                    }
                }
                return any;
            }
            Line::Endings => match daemon.ending.pop_front() {
                Some(place) => daemon.clear_away(place),
                None => return false,
            },
            Line::Dead => {
                if daemon.free_some() {
                    return true;
                }
                match daemon.dead.pop_front() {
                    Some(pid) => daemon.bury(pid),
                    None => return false,
                }
            }
        }
        true
    }

    fn pass_deadlines(&mut self) {
        self.timer.clear();
        let now = Moment::now();
        while let Some(deadline) = self.daemon.deadlines.take_due(now) {
            self.daemon.pass_deadline(deadline);
        }
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.next() {
            match signal {
                Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM => {
                    tracing::info!(target: "rpc.netdaemon", "{signal}: the daemon ends");
                    self.daemon.stop();
                }
                Signal::SIGHUP => self.reload_configuration(),
                Signal::SIGUSR1 => self.daemon.begin_upgrade(),
                _ => (),
            }
        }
    }

    fn reload_configuration(&mut self) {
        match (self.reload)() {
            Ok(limits) => {
                self.configure(limits);
                self.daemon.note_logging();
                for service in Service::ALL {
                    self.daemon.admit_waiting(service);
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
fn watch(source: Source, registry: &mio::Registry, descriptor: Option<i32>) -> Result<(), Refusal> {
    descriptor.map_or(Ok(()), |descriptor| {
        source
            .watch(registry, descriptor)
            .map_err(Refusal::of("a descriptor cannot be watched (epoll_ctl)"))
    })
}
