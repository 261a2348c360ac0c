//! The loop.
//!
//! Six things can wake it: a signal, a deadline, a listening socket, a connection, the death of an
//! owner that is being fenced, and the end of a successor that is being looked at. The kernel reports
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
use crate::host::patience::patiently;
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
    /// [`Reactor::listen`].
    pub fn new(reload: Reload) -> std::io::Result<Reactor> {
        let poll = patiently(Poll::new)?;
        let signals = patiently(Signals::open)?;
        let timer = patiently(Timer::new)?;
        let registry = patiently(|| poll.registry().try_clone())?;
        patiently(|| Source::Signals.watch(&registry, signals.as_raw_fd()))?;
        patiently(|| Source::Timer.watch(&registry, timer.as_raw_fd()))?;
        let daemon = Daemon::new(registry, patiently(Ledger::new)?);
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
    pub fn inherit(&mut self, poll: &OwnedFd) -> std::io::Result<bool> {
        let registry = &self.daemon.registry;
        if patiently(|| descriptors::put_in_place(poll, registry.as_raw_fd())).is_err() {
            return Ok(false);
        }
        // From here on there is no way back: half of it would be asked for in one poll and waited
        // for in the other.
        patiently(|| descriptors::put_in_place(poll, self.poll.as_raw_fd()))?;
        patiently(|| Source::Signals.watch(registry, self.signals.as_raw_fd()))?;
        patiently(|| Source::Timer.watch(registry, self.timer.as_raw_fd()))?;
        Ok(true)
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

    /// Adds a listening socket.
    pub fn listen(&mut self, listener: super::accept::Listener) -> std::io::Result<()> {
        let number = self.daemon.listeners.len();
        let descriptor = listener.socket.as_raw_fd();
        patiently(|| Source::Listener(number).watch(self.poll.registry(), descriptor))?;
        self.daemon.listeners.push(listener);
        Ok(())
    }

    /// Runs until the daemon has ended.
    pub fn run(&mut self) -> std::io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        while self.daemon.state != State::Ended {
            self.daemon.watch_idleness();
            self.timer.set(self.daemon.deadlines.first())?;
            let wait = if self.has_work() {
                Some(Duration::ZERO)
            } else {
                None
            };
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error),
                _ => (),
            }
            for event in &events {
                self.note(event);
            }
            self.work();
            self.daemon.tend_ledger();
            self.daemon.upgrade_if_ready();
            self.daemon.finish();
        }
        Ok(())
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
