//! The process that was started. It keeps its number, the signals from outside and the exec, and sees to it
//! that there is a reactor: a copy of itself that shares its table of descriptors, so that nothing is closed
//! when it dies. It knows nothing of what the reactor serves, opens, closes and allocates nothing once there
//! is one, and does nothing when nothing happens. Whatever ends it ends it at once: what it owns by its
//! numbers is the reactor's.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::store::Store;
use super::understudy::{self, Stands};
use crate::desk::Desk;
use crate::desk::control::{Death, ENDS, Failure, Message, Order, Phase};
use crate::exit::ExitCode;
use crate::host::clock::Moment;
use crate::host::clone::{self, Ended, Which};
use crate::host::errno::Errno;
use crate::host::notify::Herald;
use crate::host::patience::patiently;
use crate::host::process::Process;
use crate::host::program::{Environment, Program};
use crate::host::refusal::Refusal;
use crate::host::signals::{self, POKE};
use crate::host::{descriptors, pid_file, process};
use crate::log;
use crate::restart::handover::{HANDOVER_VARIABLE, UNDERSTUDY_VARIABLE};

/// How often the guardian looks at a reactor that has something to do.
const LOOK_MS: u64 = 5_000;
/// One that is so late was frozen, and so was the reactor: it says nothing.
const LATE_MS: u64 = 1_000;
/// A reactor that is at the same thing at so many looks is killed: for ten seconds at least.
const LOOKS: u64 = 3;
/// The same for one that has not come to its first poll: it may have much to read. Half a minute.
const FIRST_LOOKS: u64 = 7;
/// A reactor that dies so soon after its start did not get anywhere, milliseconds.
const SOON_MS: u64 = 1_000;
/// How long the third one in a row is waited with; then twice as long each time, milliseconds.
const FIRST_PAUSE_MS: u64 = 100;
/// The longest pause, and that before a ledger is read once more that could not be read, milliseconds.
const LONGEST_PAUSE_MS: u64 = 10_000;
/// If the process that was started dies, a service manager that does not take another one for the daemon ends
/// what is left of it, at once or when a program for that is over, to which it gives so long. Milliseconds.
const DISOWNED_MS: u64 = 90_000;
/// How long the reactor of a successor that died waits for the end of the understudy, milliseconds.
const UNDERSTUDY_ENDS_MS: u16 = 800;

/// Descriptors for which there is room from the start: ten thousand guests with two disks each. It is 256 KiB
/// of the kernel's memory.
const DESCRIPTORS: i32 = 32 * 1024;

/// How the reactor's process ends, where it does of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The daemon is over: it has stopped, or never was.
    Over(ExitCode),
    /// It is over until the next start, for which the service manager keeps everything.
    Kept,
    /// This process is over as if it was killed, because the service manager takes the daemon for dead.
    Left,
    /// A program is to be executed: the desk has the order.
    Ordered,
    /// The ledger cannot be read.
    Unreadable,
    /// There is no guardian any more.
    Orphaned,
}

/// Statuses of the reactor's process beside those of [`ExitCode`].
const ORDERED: u8 = 80;
const KEPT: u8 = ExitCode::Kept.number();
const UNREADABLE: u8 = 82;
const LEFT: u8 = 83;

impl End {
    fn status(self) -> u8 {
        match self {
            End::Over(exit) => exit.number(),
            End::Kept => KEPT,
            End::Left => LEFT,
            End::Ordered => ORDERED,
            End::Unreadable | End::Orphaned => UNREADABLE,
        }
    }

    /// Ends the reactor's process so, and drops nothing.
    pub fn leave(self) -> ! {
        clone::leave(self.status())
    }
}

/// What is shared with the guardian, or why there is none.
pub type Guarded = Result<&'static Desk, Refusal>;
/// What a reactor does first, in a process of its own.
pub type First = Box<dyn FnOnce(Guarded) -> End>;
/// What it does when there was one before, or another image of this process.
pub type Again = Box<dyn Fn(Guarded) -> End>;

/// The guardian.
pub struct Guardian {
    desk: &'static Desk,
    program: Program,
    herald: Option<Herald>,
    store: Store,
    /// What was said about a start that fails leads to the end of the daemon, not to another try.
    is_fresh: bool,
    again: Again,
    /// How many reactors died one after the other without getting anywhere.
    in_a_row: u64,
    /// What the desk says of the reactor before its first poll.
    first_turn: u64,
}

impl Guardian {
    /// With all that it will need.
    ///
    /// If this process was executed, there may be an understudy, which it ends.
    pub fn new(
        desk: &'static Desk,
        program: Program,
        is_fresh: bool,
        again: Again,
        (understudy, mut store): (Option<i32>, Store),
    ) -> Guardian {
        signals::hear_of_children();
        descriptors::make_room(DESCRIPTORS);
        // What is open here is the reactor's as well.
        clone::end_at_once_on_panic();
        let herald = Herald::open();
        desk.set_herald(herald.as_ref().map(Herald::number));
        desk.set_guardian(process::started());
        desk.set_understudy(understudy.filter(|pid| clone::is_child(*pid)));
        store.prepare(desk, herald.as_ref());
        Guardian {
            desk,
            program,
            herald,
            store,
            is_fresh,
            again,
            in_a_row: 0,
            first_turn: 0,
        }
    }

    /// Sees to it that there is a reactor until the daemon is over. Without `first`, somebody was here
    /// before.
    ///
    /// Comes back only where the host refuses the first copy of this process: with the end of a daemon that
    /// has no guardian.
    pub fn guard(mut self, first: Option<First>) -> End {
        let mut first = first;
        let mut is_first = true;
        if first.is_none() {
            self.desk.serves();
        }
        loop {
            // Until its first poll it has something to do.
            let _ = self.desk.is_away(Moment::now());
            self.first_turn = self.desk.turns();
            let copy = if is_first {
                patiently(clone::sharing_descriptors)
            } else {
                clone::sharing_descriptors()
            };
            match copy {
                Err(reason) if is_first => {
                    let what = "the process cannot be copied (clone)";
                    self.dismiss_understudy();
                    return alone(Refusal { what, reason }, first, &self.again);
                }
                // All clients wait for it.
                Err(_) => {
                    self.in_a_row = self.in_a_row.saturating_add(1);
                    self.pause(pause_ms(self.in_a_row).max(FIRST_PAUSE_MS));
                }
                Ok(Which::Original(reactor)) => {
                    is_first = false;
                    self.keep(reactor);
                }
                Ok(Which::Copy) => {
                    let end = self.be_reactor(&mut first);
                    self.outlive(end);
                    is_first = false;
                }
            }
        }
    }

    /// The life of a reactor.
    fn be_reactor(&self, first: &mut Option<First>) -> End {
        clone::end_at_once_on_panic();
        // As long as there is an understudy it has all, and this process ends with the guardian. Refused,
        // the guardian's death goes unnoticed until the next time that somebody asks.
        let has_understudy = self.desk.understudy().is_some();
        let follows = if has_understudy {
            Signal::SIGKILL
        } else {
            POKE
        };
        let _ = clone::follow_parent(Some(follows));
        if !self.desk.has_guardian() {
            if has_understudy {
                End::Unreadable.leave();
            }
            return End::Orphaned;
        }
        match (first.take(), self.desk.phase()) {
            (Some(first), Phase::Starting) => first(Ok(self.desk)),
            (first, _) => {
                // What it would close belongs to somebody else by now.
                std::mem::forget(first);
                log::forget_outputs();
                (self.again)(Ok(self.desk))
            }
        }
    }

    /// This was a reactor, which is over. Comes back if the process is the guardian from here on, and ends
    /// it otherwise.
    fn outlive(&mut self, end: End) {
        let serves = self.desk.phase() == Phase::Serving;
        match end {
            End::Ordered => self.stand_by(),
            End::Orphaned => self.succeed(),
            End::Over(ExitCode::Success) => end.leave(),
            // The service manager has everything, whether or not there is a guardian.
            End::Kept | End::Left => end.leave(),
            // Nobody else would go on.
            _ if serves && !self.desk.has_guardian() => self.succeed(),
            _ => end.leave(),
        }
    }

    /// Makes the understudy for what was ordered, or is it: then its time has come.
    fn stand_by(&mut self) {
        let without = self.desk.is_without_understudy();
        if let Some(order) = self.desk.ordered().filter(|_| !without) {
            match understudy::stand_by(self.desk, order) {
                Ok(Stands::There) => (),
                Ok(Stands::Here(failure)) => {
                    let _ = clone::follow_parent(None);
                    if let Some(number) = self.desk.pid_file() {
                        // The successor had it, and is over.
                        let _ = patiently(|| pid_file::lock_again(number));
                    }
                    self.be_guardian();
                    self.store.renew(self.desk, self.herald.as_ref());
                    return self.desk.order_failed(failure);
                }
                Err(reason) => self.desk.order_failed(Failure::NoUnderstudy(reason)),
            }
        }
        End::Ordered.leave()
    }

    /// The guardian is dead, and this was its reactor: from here on it is the guardian.
    fn succeed(&mut self) {
        let _ = clone::follow_parent(None);
        self.be_guardian();
        self.desk.died(Death::Guardian, 1);
    }

    /// This process is the guardian from here on.
    fn be_guardian(&mut self) {
        process::set_started();
        let own = process::started();
        self.desk.set_guardian(own);
        self.desk.stands_in(Moment::now());
        self.desk.set_understudy(None);
        if let Some(number) = self.desk.pid_file() {
            // What a script reads there is wrong otherwise, and nothing else.
            let _ = pid_file::write_number(number, own);
        }
        self.say(format_args!("MAINPID={own}"));
        self.in_a_row = 0;
    }

    /// Whether there is one that lives: to rely on a dead one would be the end of all.
    fn has_understudy(&self) -> bool {
        let lives = self.desk.understudy().is_some_and(clone::is_child);
        if !lives {
            self.desk.set_understudy(None);
        }
        lives
    }

    fn dismiss_understudy(&self) {
        if let Some(pid) = self.desk.understudy() {
            understudy::dismiss(pid);
            self.desk.set_understudy(None);
        }
    }

    fn say(&self, message: std::fmt::Arguments<'_>) {
        if let Some(herald) = &self.herald {
            herald.say(message);
        }
    }

    /// From a reactor's start to what follows from its end.
    fn keep(&mut self, reactor: i32) {
        let start = Moment::now();
        let (ended, was_away) = self.watch(reactor);
        let is_starting = self.desk.phase() == Phase::Starting;
        let death = match ended {
            Ended::Status(status) if status == i32::from(ExitCode::Success.number()) => {
                self.leave(ExitCode::Success.number());
            }
            Ended::Status(status) if status == i32::from(KEPT) => {
                clone::leave(KEPT);
            }
            Ended::Status(status) if status == i32::from(LEFT) => self.leave(self.left_status()),
            Ended::Status(status) if status == i32::from(ORDERED) => return self.obey(),
            Ended::Status(status) if status == i32::from(UNREADABLE) => Death::Unreadable,
            Ended::Status(status) if is_starting && status < i32::from(ORDERED) => {
                self.leave(u8::try_from(status).unwrap_or(ExitCode::Failure.number()));
            }
            _ if is_starting && self.is_fresh => {
                self.leave(ExitCode::Initialisation.number());
            }
            _ if was_away => Death::Away,
            Ended::Status(status) => Death::Status(status),
            Ended::Signal(signal) => Death::Signal(signal),
        };
        let is_first = self.in_a_row == 0;
        let may_be_chance = is_first && matches!(death, Death::Signal(_));
        if self.desk.ordered().is_some_and(|it| it != Order::WayBack) {
            // It died on the way to that. Who stands by already does so until the next one serves.
            self.desk.order_failed(Failure::Exec(Errno::EINTR));
        } else if self.has_understudy() && !may_be_chance {
            // It has everything as it was, and tries nothing that has just failed. But the locks that libvirt's
            // daemon took are this process's: the understudy has to take them again.
            clone::leave(ExitCode::ReExecution.number());
        }
        let is_soon = Moment::now().ms_since(start) < SOON_MS;
        self.in_a_row = if is_soon {
            self.in_a_row.saturating_add(1)
        } else {
            1
        };
        let in_a_row = self.in_a_row;
        self.desk.died(death, in_a_row);
        if death == Death::Unreadable {
            self.say(format_args!(
                "STATUS=The ledger cannot be read: all locks stay, and nobody is served"
            ));
            // Should somebody ask for the end, it would free all locks, and nobody knows whom to fence before.
            // It is put off until the ledger can be read, which may be soon.
            return self.pause(LONGEST_PAUSE_MS);
        }
        self.say(format_args!(
            "STATUS=The reactor died ({in_a_row} in a row) and is started again; all locks stay"
        ));
        self.pause(pause_ms(in_a_row));
    }

    /// A signal came. One that asks for the end means nothing but an end of this process, as if it was killed,
    /// if it is from a service manager that takes the daemon for dead: no guest has to die for that.
    fn ask(&self, signal: Signal) {
        let now = Moment::now();
        let stands_in = self.desk.stands_in_since();
        let is_disowned = self.herald.is_some()
            && stands_in.is_some_and(|since| now.ms_since(since) < DISOWNED_MS);
        // Where a stop keeps everything the others are somebody's who wants it otherwise.
        let may_be_managers = signal == Signal::SIGTERM || self.desk.mouth().is_none();
        if is_disowned
            && may_be_managers
            && ENDS.contains(&signal)
            && self.desk.asked_to_end().is_none()
        {
            self.desk.leaves();
        } else {
            self.desk.ask(signal);
        }
    }

    /// The daemon is over, and nothing is to be kept for the next start but what was before.
    fn leave(&mut self, status: u8) -> ! {
        self.store.give_up(self.herald.as_ref());
        clone::leave(status);
    }

    /// How this process ends as if it was killed. A unit that knows of the store knows the status that asks for
    /// the next start; for any other one it would be a failure.
    fn left_status(&self) -> u8 {
        let exit = match self.desk.mouth() {
            Some(_) => ExitCode::Kept,
            None => ExitCode::Success,
        };
        exit.number()
    }

    /// Waits for the end of the reactor, and whether that was brought about by the guardian.
    fn watch(&mut self, reactor: i32) -> (Ended, bool) {
        let mut next_look = Some(Moment::now().plus_ms(LOOK_MS));
        let first = self.first_turn;
        let mut seen = first;
        // What it was away for at the last looks, and at how many of them.
        let mut same: (Option<Moment>, u64) = (None, 0);
        let mut was_away = false;
        self.desk.guardian_sleeps(false);
        loop {
            let wait =
                next_look.map(|at| Duration::from_nanos(at.0.saturating_sub(Moment::now().0)));
            match signals::wait(wait) {
                Some(signal) if is_order(signal) => {
                    self.ask(signal);
                    clone::signal(reactor, POKE);
                }
                _ => (),
            }
            let mut end = None;
            while let Some((pid, ended)) = clone::next_ended() {
                if pid == reactor {
                    end = Some(ended);
                } else if self.desk.understudy() == Some(pid) {
                    self.desk.set_understudy(None);
                }
            }
            self.pass_on_messages();
            if let Some(ended) = end {
                return (ended, was_away);
            }
            let now = Moment::now();
            match next_look {
                // It was told that there is something to look at.
                None if !self.desk.does_guardian_sleep() => {
                    next_look = Some(now.plus_ms(LOOK_MS));
                }
                Some(at) if at <= now => {
                    let away = self.desk.away_since();
                    let turns = self.desk.turns();
                    if now.ms_since(at) > LATE_MS {
                        same.1 = 0;
                    } else if away.is_some() && away == same.0 {
                        same.1 = same.1.saturating_add(1);
                    } else {
                        same = (away, 1);
                    }
                    let has_polled = turns != first;
                    let limit = if has_polled { LOOKS } else { FIRST_LOOKS };
                    let is_serving = self.desk.phase() == Phase::Serving;
                    if away.is_some() && is_serving && same.1 >= limit {
                        was_away = true;
                        clone::signal(reactor, Signal::SIGKILL);
                    }
                    let is_busy = turns != std::mem::replace(&mut seen, turns) || away.is_some();
                    next_look =
                        (is_busy || !self.falls_asleep(turns)).then(|| now.plus_ms(LOOK_MS));
                }
                _ => (),
            }
        }
    }

    /// False if there is something to do for the reactor after all.
    fn falls_asleep(&self, turns: u64) -> bool {
        self.desk.guardian_sleeps(true);
        let is_idle = self.desk.turns() == turns && self.desk.away_since().is_none();
        if !is_idle {
            self.desk.guardian_sleeps(false);
        }
        is_idle
    }

    fn pass_on_messages(&mut self) {
        if self.desk.take_told(Message::Ready) {
            let understudy = self.desk.understudy();
            // One of an order that was laid down since is needed. The number of one that has died may be anybody's.
            if understudy.is_some() && self.desk.ordered().is_none() && self.has_understudy() {
                self.dismiss_understudy();
            }
            self.store.forget_given(self.herald.as_ref());
            match self.in_a_row {
                0 => self.say(format_args!("READY=1")),
                _ => self.say(format_args!("READY=1\nSTATUS=It serves")),
            }
        }
        if self.desk.take_told(Message::Stopping) {
            self.say(format_args!("STOPPING=1"));
        }
    }

    /// Lets time pass in which there is no reactor.
    fn pause(&self, milliseconds: u64) {
        let until = Moment::now().plus_ms(milliseconds);
        loop {
            // Where everything can be kept the next reactor does that first.
            if self.desk.is_to_leave() && self.desk.mouth().is_none() {
                clone::leave(ExitCode::Success.number());
            }
            let left = until.0.saturating_sub(Moment::now().0);
            if left == 0 {
                return;
            }
            match signals::wait(Some(Duration::from_nanos(left))) {
                Some(signal) if is_order(signal) => self.ask(signal),
                Some(Signal::SIGCHLD) => while clone::next_ended().is_some() {},
                _ => (),
            }
        }
    }

    /// Executes what the reactor, which is over, has ordered. Comes back if that cannot be done.
    fn obey(&mut self) {
        let Some(order) = self.desk.ordered() else {
            return;
        };
        let is_there = match order {
            Order::WayBack => true,
            _ if self.desk.is_without_understudy() => true,
            // It is not a child of this one.
            Order::Libvirt => self.desk.understudy().is_some(),
            Order::Ours | Order::Earlier => self.desk.understudy().is_some_and(clone::is_child),
        };
        let failure = if is_there {
            Failure::Exec(self.execute(order))
        } else {
            self.desk.set_understudy(None);
            Failure::NoUnderstudy(Errno::ESRCH)
        };
        // The understudy stands by until the next reactor serves.
        self.desk.order_failed(failure);
    }

    fn execute(&mut self, order: Order) -> Errno {
        // Whoever comes next may not read what was asked of this one.
        if self.desk.asked_to_end().is_some() || self.desk.is_to_leave() {
            return Errno::EINTR;
        }
        if order != Order::WayBack
            && let Some(herald) = &self.herald
        {
            herald.reloading();
        }
        for signal in [Signal::SIGHUP, Signal::SIGUSR1] {
            if self.desk.take_asked(signal) {
                clone::signal(process::own_number(), signal);
            }
        }
        // A program that does not know of it would not start with it one day.
        self.store.give_up(self.herald.as_ref());
        let reason = self.become_ordered(order);
        self.store.renew(self.desk, self.herald.as_ref());
        reason
    }

    fn become_ordered(&mut self, order: Order) -> Errno {
        let path = self.desk.ordered_path();
        match order {
            Order::Libvirt | Order::WayBack => {
                if let Err(reason) = signals::unblock() {
                    let _ = signals::block_again();
                    return reason;
                }
                let reason = self.program.execute(path, Environment::Plain);
                let _ = signals::block_again();
                reason
            }
            Order::Ours | Order::Earlier => {
                let ledger = self.desk.ordered_ledger().unwrap_or(-1);
                let own = process::started();
                let understudy = self.desk.understudy().unwrap_or(0);
                let handover = format_args!("{HANDOVER_VARIABLE}={ledger}:{own}");
                let understudy = format_args!("{UNDERSTUDY_VARIABLE}={understudy}");
                let variables = [Some(handover), Some(understudy)];
                self.program.execute(path, Environment::Ours(variables))
            }
        }
    }
}

/// Has the guardian say that the daemon serves, and end a successor's understudy. Waits until that is over: what
/// is done from here on it does not have.
///
/// Ends this process if the understudy has taken the place of a guardian that died.
pub fn begin_to_serve(desk: &Desk) {
    let understudy = desk.understudy().map(Process::open_any);
    // From here on nobody else may be left when the guardian is dead. Where that cannot be seen it stays as it
    // was: whoever loses its guardian before the understudy is over ends with it.
    if !matches!(understudy, Some(Err(reason)) if reason != Errno::ESRCH) {
        let _ = clone::follow_parent(Some(POKE));
    }
    desk.tell(Message::Ready);
    desk.wake_guardian();
    match understudy {
        None | Some(Err(Errno::ESRCH)) => (),
        Some(Ok(understudy)) => {
            while !understudy.ends_within(1) {
                if !desk.has_guardian() {
                    // It may have been told to end, or not. One that has seen the guardian's death first does
                    // not end.
                    let _ = understudy.signal(POKE);
                    if !understudy.ends_within(UNDERSTUDY_ENDS_MS) {
                        End::Unreadable.leave();
                    }
                }
            }
        }
        Some(Err(_)) => {
            while desk.understudy().is_some() && desk.has_guardian() {
                clone::pause(Duration::from_millis(1));
            }
            let _ = clone::follow_parent(Some(POKE));
        }
    }
}

/// The daemon without a guardian, because of this.
pub fn alone(refusal: Refusal, first: Option<First>, again: &Again) -> End {
    match first {
        Some(first) => first(Err(refusal)),
        None => again(Err(refusal)),
    }
}

/// Whether a signal asks for something that the reactor does.
fn is_order(signal: Signal) -> bool {
    !matches!(signal, POKE | Signal::SIGCHLD)
}

/// How long the next reactor is waited with when so many died in a row.
fn pause_ms(in_a_row: u64) -> u64 {
    let Some(doublings) = in_a_row.checked_sub(2) else {
        return 0;
    };
    let factor = u32::try_from(doublings)
        .ok()
        .and_then(|it| 1u64.checked_shl(it));
    FIRST_PAUSE_MS
        .saturating_mul(factor.unwrap_or(u64::MAX))
        .min(LONGEST_PAUSE_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_reactors_die_in_a_row_the_longer_the_next_one_is_waited_with() {
        let pauses: Vec<u64> = (1..=9).map(pause_ms).collect();
        let expected = [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000];
        assert_eq!(pauses, expected);
        assert_eq!(pause_ms(u64::MAX), 10_000);
    }
}
