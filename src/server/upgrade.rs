//! SIGUSR1: the daemon replaces its own program and keeps every lock and every client.
//!
//! The successor is checked first, beside the running reactor. Only when it has shown that it can
//! take over, everything is handed to it in one turn: the state in a closed ledger (or, for
//! libvirt's daemon, in its document), and all descriptors. Whatever goes wrong on the way, the
//! daemon says so and goes on as if nothing had been asked.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use super::clients::connection::Connection;
use super::deadlines::{Deadline, Deadlines};
use super::lines::Lines;
use super::watch::{Source, Watch};
use crate::custody::Custody;
use crate::custody::clients::ClientId;
use crate::custody::earlier;
use crate::custody::roll::Roll;
use crate::desk::Desk;
use crate::desk::control::{Failure, Order};
use crate::host::clock::Moment;
use crate::host::errno::{self, Errno};
use crate::host::memory::Memory;
use crate::host::{descriptors, notify, process};
use crate::restart::handover::{
    self, Check, CommandLine, HANDOVER_VARIABLE, ProgramFile, Successor, Unfit,
};
use crate::restart::libvirt_json;

/// How long a successor may take to show that it can take over, milliseconds.
const CHECK_MS: u64 = 10_000;
/// How long until it is looked again whether a successor that was killed is over, milliseconds.
const REAP_MS: u64 = 500;
/// How long to wait for a moment in which libvirt's daemon can take over, milliseconds.
const QUIET_MS: u64 = 10_000;

/// Where the replacement of the program stands.
#[derive(Debug, Default)]
pub enum Stage {
    /// Nothing was asked.
    #[default]
    None,
    /// The successor shows whether it can take over.
    Checking(Check),
    /// It can: it does at the end of this turn.
    Ready(Successor),
}

/// The replacement of the program.
#[derive(Debug, Default)]
pub struct Upgrade {
    /// Where it stands.
    pub stage: Stage,
    /// How the daemon was started.
    pub command_line: Option<CommandLine>,
    /// Where libvirt's daemon looks for its state.
    pub document: PathBuf,
    /// It was asked for again meanwhile: the program may have been replaced once more.
    again: bool,
    /// It was looked at once more for that reason. Not a third time: whoever sends SIGUSR1 without
    /// end must not keep the upgrade from happening.
    looked_again: bool,
    /// The program that was looked at last.
    seen: Option<ProgramFile>,
    /// The successor is an earlier version, which reads ledgers up to this format.
    earlier: Option<u32>,
    /// Successors that took too long and were killed, and are not over yet.
    abandoned: Vec<Check>,
    /// An earlier image of this process may have left such successors behind.
    has_inherited: bool,
    /// Where the guardian finds its orders, if there is one.
    desk: Option<&'static Desk>,
    /// The guardian has the order to execute the successor: this reactor is over.
    is_ordered: bool,
}

impl Upgrade {
    /// For a daemon that was started so, and whose state libvirt's daemon would find there.
    pub fn of(
        command_line: CommandLine,
        document: PathBuf,
        desk: Option<&'static Desk>,
    ) -> Upgrade {
        Upgrade {
            command_line: Some(command_line),
            document,
            desk,
            ..Upgrade::default()
        }
    }

    /// Whether one has begun.
    pub fn is_under_way(&self) -> bool {
        !matches!(self.stage, Stage::None)
    }

    /// Whether the guardian is to execute the successor.
    pub fn is_ordered(&self) -> bool {
        self.is_ordered
    }

    /// Whether a successor may take over at the end of this turn.
    pub fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready(_))
    }

    /// SIGUSR1: begins to look at the successor.
    pub fn begin(&mut self, going: &mut Going<'_>) {
        if self.is_under_way() {
            self.again = true;
            return;
        }
        self.reap_abandoned(going);
        let Some(command_line) = &self.command_line else {
            return;
        };
        let command_line = command_line.clone();
        if let Some(desk) = self.desk {
            desk.begin(Signal::SIGUSR1);
        }
        descriptors::fill_standard_places();
        self.seen = command_line.file();
        self.earlier = None;
        // Short and true: it is what the successor reads now, and what it will go on from.
        let begun = match going.custody.renew() {
            Ok(()) => {
                let withheld = going.kept();
                Check::begin(&command_line, going.custody.ledger(), &withheld)
            }
            Err(reason) => Err(cannot_write(reason)),
        };
        self.wait_for(going, begun);
    }

    /// The successor is an earlier version: it is looked at once more, with a ledger of its own format.
    fn begin_earlier(&mut self, going: &mut Going<'_>, version: u32) {
        let Some(command_line) = self.command_line.clone() else {
            return;
        };
        self.earlier = Some(version);
        let begun = match going.for_earlier(version) {
            Ok(ledger) => {
                let withheld = going.kept();
                Check::begin(&command_line, ledger.descriptor(), &withheld)
            }
            Err(reason) => Err(cannot_write(reason)),
        };
        self.wait_for(going, begun);
    }

    /// Waits for what a successor has to say.
    fn wait_for(&mut self, going: &mut Going<'_>, begun: Result<Check, String>) {
        let check = match begun {
            Ok(check) => check,
            Err(reason) => return self.failed(going, &reason),
        };
        let descriptor = check.descriptor();
        if let Err(error) = going.watch.add(Source::Successor, descriptor) {
            self.abandon(going, check);
            return self.failed(going, &format!("the successor cannot be watched: {error}"));
        }
        going
            .deadlines
            .set(Deadline::Successor, Moment::now().plus_ms(CHECK_MS));
        self.stage = Stage::Checking(check);
    }

    /// The successor may have ended.
    pub fn look_at_successor(&mut self, going: &mut Going<'_>) {
        self.reap_abandoned(going);
        let Stage::Checking(check) = &self.stage else {
            return;
        };
        if !check.is_over() {
            return;
        }
        let Some(check) = self.end_check(going) else {
            return;
        };
        going.watch.remove(check.descriptor());
        match check.verdict() {
            Ok(successor) => {
                going
                    .deadlines
                    .set(Deadline::Quiet, Moment::now().plus_ms(QUIET_MS));
                self.stage = Stage::Ready(successor);
            }
            Err(Unfit::Earlier(version, _))
                if self.earlier.is_none() && earlier::is_earlier(version) =>
            {
                self.begin_earlier(going, version);
            }
            Err(Unfit::Earlier(_, reason) | Unfit::Ever(reason)) => self.failed(going, &reason),
        }
    }

    /// The successor takes too long.
    pub fn successor_is_late(&mut self, going: &mut Going<'_>) {
        // Its end may have gone unnoticed.
        self.look_at_successor(going);
        // A later one has a deadline of its own.
        let is_another = going.deadlines.get(Deadline::Successor).is_some();
        if is_another || !matches!(self.stage, Stage::Checking(_)) {
            return;
        }
        if let Some(check) = self.end_check(going) {
            self.abandon(going, check);
            let reason = format!("it does not say its version within {} s", CHECK_MS / 1000);
            self.failed(going, &reason);
        }
    }

    /// The daemon ends: a successor that is being looked at must not stay behind.
    pub fn abandon_upgrade(&mut self, going: &mut Going<'_>) {
        if let Some(check) = self.end_check(going) {
            self.abandon(going, check);
        }
    }

    fn end_check(&mut self, going: &mut Going<'_>) -> Option<Check> {
        going.deadlines.unset(Deadline::Successor);
        match std::mem::take(&mut self.stage) {
            Stage::Checking(check) => Some(check),
            Stage::None | Stage::Ready(_) => None,
        }
    }

    /// Kills a successor and looks for its end now and then, also if that cannot be watched: it is
    /// reaped when it is over, not waited for.
    fn abandon(&mut self, going: &mut Going<'_>, mut check: Check) {
        check.kill();
        self.abandoned.push(check);
        self.reap_abandoned(going);
    }

    /// Forgets the abandoned successors that are over.
    pub fn reap_abandoned(&mut self, going: &mut Going<'_>) {
        let (over, left) = std::mem::take(&mut self.abandoned)
            .into_iter()
            .partition(Check::is_over);
        self.abandoned = left;
        let over: Vec<Check> = over;
        for check in over {
            going.watch.remove(check.descriptor());
            check.reap();
        }
        if self.abandoned.is_empty() && !self.has_inherited {
            going.deadlines.unset(Deadline::Abandoned);
        } else {
            let again = Moment::now().plus_ms(REAP_MS);
            going.deadlines.set(Deadline::Abandoned, again);
        }
    }

    /// An earlier image of this process was here before: what it abandoned is a child of this one.
    pub fn inherit_abandoned(&mut self, going: &mut Going<'_>) {
        self.has_inherited = true;
        self.reap_inherited(going);
    }

    /// Forgets those that an earlier image abandoned, while there is no child of this one.
    pub fn reap_inherited(&mut self, going: &mut Going<'_>) {
        if !self.has_inherited {
            return;
        }
        let has_own = matches!(self.stage, Stage::Checking(_)) || !self.abandoned.is_empty();
        self.has_inherited = has_own || process::reap_children();
        if self.has_inherited {
            let again = Moment::now().plus_ms(REAP_MS);
            going.deadlines.set(Deadline::Abandoned, again);
        }
    }

    fn failed(&mut self, going: &mut Going<'_>, reason: &str) {
        self.stage = Stage::None;
        self.looked_again = false;
        going.deadlines.unset(Deadline::Quiet);
        say_failed(reason);
        if let Some(desk) = self.desk {
            desk.end(Signal::SIGUSR1);
        }
        if std::mem::take(&mut self.again) {
            self.begin(going);
        }
    }

    /// Hands over, if a successor is ready: at the end of a turn, when nothing is half done. Connections
    /// that are over and owners that are dead are not handed over: they have been seen to before.
    pub fn go_ahead(&mut self, going: &mut Going<'_>) {
        let Stage::Ready(successor) = self.stage else {
            return;
        };
        let is_the_moment = match (successor, self.earlier) {
            (Successor::Libvirt, _) => going.is_quiet(),
            (_, Some(version)) => earlier::knows_the_watched(version) || going.is_settled(),
            (_, None) => true,
        };
        if !is_the_moment {
            // Tried again after the next turn, until the time for it is over.
            return;
        }
        // What was looked at may not be what is there: the state of one program would be lost on
        // the other one.
        let is_another = self.program_file() != self.seen;
        let again = std::mem::take(&mut self.again);
        if (again || is_another) && !self.looked_again {
            self.looked_again = true;
            self.stage = Stage::None;
            going.deadlines.unset(Deadline::Quiet);
            return self.begin(going);
        }
        if is_another {
            let reason = "its program is exchanged all the time; try again when it is in place";
            return self.failed(going, reason);
        }
        match (successor, self.earlier) {
            (Successor::Libvirt, _) => self.hand_over_to_libvirt(going),
            (_, Some(version)) => self.hand_over_to_earlier(going, successor, version),
            (_, None) => self.hand_over(going, successor),
        }
    }

    fn program_file(&self) -> Option<ProgramFile> {
        self.command_line.as_ref()?.file()
    }

    fn hand_over(&mut self, going: &mut Going<'_>, successor: Successor) {
        let number = match going.custody.ledger() {
            Ok(descriptor) => descriptor.as_raw_fd(),
            Err(refusal) => {
                return self.failed(going, &handover::nothing_to_pass_on(refusal));
            }
        };
        if let Err(reason) = going.lay_down() {
            going.custody.reopen();
            return self.failed(going, &cannot_write(reason));
        }
        let kept = going.kept();
        self.replace(going, successor, &kept, Some(number));
        if !self.is_ordered {
            // Still here: the ledger goes on from what is now.
            going.custody.reopen();
        }
    }

    fn hand_over_to_earlier(&mut self, going: &mut Going<'_>, successor: Successor, version: u32) {
        let ledger = match going.for_earlier(version) {
            Ok(ledger) => ledger,
            Err(reason) => return self.failed(going, &cannot_write(reason)),
        };
        let number = match ledger.descriptor() {
            Ok(descriptor) => descriptor.as_raw_fd(),
            Err(refusal) => {
                return self.failed(going, &handover::nothing_to_pass_on(refusal));
            }
        };
        if let Err(reason) = self.lay_down_for_another(going) {
            return self.failed(going, &reason);
        }
        if !earlier::knows_the_watched(version) {
            warn_of_unwatched(going, "this earlier version of the daemon");
        }
        let kept = going.kept_for_earlier(version, number);
        self.leave_file(going);
        self.replace(going, successor, &kept, Some(number));
        if self.is_ordered {
            // The guardian passes it on.
            std::mem::forget(ledger);
        } else {
            going.custody.reopen();
            going.returns_to_file();
        }
    }

    /// Whoever goes on should a successor that does not read our ledger not serve, does from that. Without
    /// a guardian nobody does.
    fn lay_down_for_another(&self, going: &mut Going<'_>) -> Result<(), String> {
        if self.desk.is_none() {
            return Ok(());
        }
        if let Err(refusal) = going.custody.ledger() {
            return Err(handover::nothing_to_pass_on(refusal));
        }
        going.lay_down().map_err(|reason| {
            going.custody.reopen();
            cannot_write(reason)
        })
    }

    /// A successor that does not write our ledger makes it untrue. Where there is an understudy, it removes the
    /// ledger from the run directory when the successor serves.
    fn leave_file(&self, going: &mut Going<'_>) {
        if self.desk.is_none() {
            going.custody.leaves_file();
        }
    }

    fn hand_over_to_libvirt(&mut self, going: &mut Going<'_>) {
        if let Some(reason) = going.gone_client() {
            return self.failed(going, &reason);
        }
        let state = going.custody.state();
        let written = libvirt_json::write(state, process::started()).and_then(|document| {
            write_document(&self.document, &document)
                .map_err(|error| format!("its state document cannot be written: {error}"))
        });
        if let Err(reason) = written {
            // Half a document would keep the next daemon from starting.
            let _ = std::fs::remove_file(&self.document);
            return self.failed(going, &reason);
        }
        if let Err(reason) = self.lay_down_for_another(going) {
            let _ = std::fs::remove_file(&self.document);
            return self.failed(going, &reason);
        }
        warn_of_unwatched(going, "libvirt's daemon");
        let kept = libvirt_json::descriptors(going.custody.state());
        self.leave_file(going);
        self.replace(going, Successor::Libvirt, &kept, None);
        if !self.is_ordered {
            let _ = std::fs::remove_file(&self.document);
            going.custody.reopen();
            going.returns_to_file();
        }
    }

    /// The moment for libvirt's daemon did not come.
    pub fn never_quiet(&mut self, going: &mut Going<'_>) {
        let reason = match self.stage {
            Stage::Ready(Successor::Libvirt) => {
                "always an owner being fenced or a message on its way, which libvirt's daemon cannot"
            }
            Stage::Ready(_) if self.earlier.is_some() => {
                "always a dead owner whose locks are being freed, or an owner that cannot be reached, \
                 which this earlier version cannot"
            }
            _ => return,
        };
        let seconds = QUIET_MS / 1000;
        let reason = format!("for {seconds} s there was {reason} go on with; try again");
        self.failed(going, &reason);
    }

    /// The exec, by the guardian if there is one. Without one, it comes back only if it failed.
    fn replace(
        &mut self,
        going: &mut Going<'_>,
        successor: Successor,
        kept: &[i32],
        ledger: Option<i32>,
    ) {
        self.reap_abandoned(going);
        let Some(command_line) = &self.command_line else {
            return;
        };
        tracing::info!(target: "rpc.netdaemon", "SIGUSR1: the daemon hands over to its successor");
        let reason = match self.desk {
            Some(desk) => match self.order(desk, successor, kept, ledger) {
                Ok(()) => {
                    self.is_ordered = true;
                    return;
                }
                Err(reason) => reason,
            },
            None => {
                let value = |number| format!("{number}:{}", process::started());
                let variable = ledger.map(|number| (HANDOVER_VARIABLE, value(number)));
                notify::reloading();
                let variables = variable.as_slice();
                let reason = handover::replace(successor, command_line, kept, variables);
                notify::ready();
                reason
            }
        };
        self.failed(going, &reason);
    }

    /// Leaves the guardian the order to execute a successor with these descriptors.
    fn order(
        &self,
        desk: &Desk,
        successor: Successor,
        kept: &[i32],
        ledger: Option<i32>,
    ) -> Result<(), String> {
        let command_line = self.command_line.as_ref().ok_or("there is no program")?;
        let path = command_line.text_of_path()?;
        let too_long = || "the path of a file is too long".to_owned();
        let document = self.document.as_os_str().as_bytes();
        let document = CString::new(document).map_err(|_| too_long())?;
        handover::prepare(kept)?;
        let order = match successor {
            Successor::Ours => Order::Ours,
            Successor::OursBefore => Order::Earlier,
            Successor::Libvirt => Order::Libvirt,
        };
        let is_given = desk.set_document(&document) && desk.order(order, &path, ledger);
        is_given.then_some(()).ok_or_else(too_long)
    }
}

/// The guardian could not execute a successor, or that did not serve: this reactor goes on.
pub fn say_what_failed(failure: Failure, program: &CStr) {
    let program = program.to_string_lossy();
    let reason = match failure {
        Failure::Exec(reason) => {
            format!("{program} cannot be executed: {}", errno::text(reason))
        }
        Failure::NoUnderstudy(reason) => {
            let reason = errno::text(reason);
            format!("nobody could go on should {program} not serve (fork): {reason}")
        }
        Failure::Ended => format!("{program} was executed and ended before it served"),
        Failure::Late => format!("{program} was executed and did not serve in time"),
    };
    say_failed(&reason);
}

/// The host refuses for ever what a copy of the guardian needs that would go on should the successor not
/// serve: it is executed without one.
pub fn say_that_nobody_stands_by(reason: Errno, program: &CStr) {
    tracing::warn!(
        target: "rpc.netdaemon",
        "SIGUSR1: the host refuses a copy of this daemon that could go on should {} not serve once it is \
         executed: {}. It is executed all the same, and has shown that it can take over; should it crash \
         then, all locks are free while the guests run on",
        program.to_string_lossy(),
        errno::text(reason)
    );
}

/// Reactors died of it, or while it was under way.
pub fn say_given_up() {
    say_failed("the process that serves the clients died twice while it was looked at");
}

fn say_failed(reason: &str) {
    tracing::error!(
        target: "rpc.netdaemon",
        "SIGUSR1: the daemon goes on as it is, because its successor cannot take over: {reason}"
    );
}

/// What an upgrade works with, borrowed side by side from the reactor.
#[derive(Debug)]
pub struct Going<'a> {
    /// All that lasts.
    pub custody: &'a mut Custody,
    /// All connections.
    pub connections: &'a mut Roll<Connection>,
    /// Where what they have on their way lies.
    pub desk: &'a Desk,
    /// Who waits.
    pub lines: &'a mut Lines,
    /// What happens when.
    pub deadlines: &'a mut Deadlines,
    /// Where readiness is asked for.
    pub watch: &'a Watch,
}

impl Going<'_> {
    /// The numbers of all descriptors that a successor needs.
    fn kept(&self) -> Vec<i32> {
        let state = self.custody.state();
        let mut kept: Vec<i32> = state.descriptors().map(|number| number.0).collect();
        kept.extend(self.custody.ledger().map(AsRawFd::as_raw_fd));
        kept.push(self.watch.descriptor());
        kept.sort_unstable();
        kept.dedup();
        kept
    }

    /// Closes the ledger for a successor. What the poll has said of a connection and was not worked on
    /// it is made to say once more; the successor asks by itself when a reply can be sent.
    fn lay_down(&mut self) -> Result<(), Errno> {
        let has_more_to_say = |connection: &Connection| {
            connection.readable
                || connection.hung_up
                || connection.queued
                || connection.waits_to_send
                || !connection.is_quiet()
        };
        let unfinished: Vec<i32> = self
            .connections
            .iter()
            .filter(|(_, connection)| has_more_to_say(connection))
            .map(|(number, _)| number)
            .collect();
        for number in unfinished {
            let id = ClientId(number);
            self.watch
                .add(Source::Connection(id), number)
                .map_err(|error| errno::of(&error))?;
            // Should there be no successor after all, this daemon asks anew, too.
            if let Some(connection) = self.connections.get_mut(number) {
                connection.waits_to_send = false;
                self.lines.enqueue(id, connection);
            }
        }
        self.close_ledger(Some(self.watch.descriptor()))
    }

    /// Closes the ledger, with all bytes that are on their way.
    pub fn close_ledger(&mut self, poll: Option<RawFd>) -> Result<(), Errno> {
        let memory = self.desk.memory();
        let traffic = self
            .connections
            .iter()
            .filter(|(_, connection)| !connection.is_quiet())
            .map(|(number, connection)| (ClientId(number), connection.traffic(number, memory)));
        self.custody.close(traffic, poll)
    }

    /// The state for an earlier version of this program. What is on its way goes with it; what the poll
    /// has said is not needed, because that version asks anew.
    fn for_earlier(&self, version: u32) -> Result<Memory, Errno> {
        let memory = self.desk.memory();
        let traffic = self
            .connections
            .iter()
            .filter(|(_, connection)| !connection.is_quiet())
            .map(|(number, connection)| (ClientId(number), connection.traffic(number, memory)));
        self.custody.for_earlier(version, traffic)
    }

    /// Still here, after the ledger's file was removed for somebody who does not write it.
    fn returns_to_file(&mut self) {
        // Tried again with each renewal.
        let _ = self.custody.renew();
    }

    /// The numbers of all descriptors that an earlier version needs.
    fn kept_for_earlier(&self, version: u32, ledger: i32) -> Vec<i32> {
        let state = self.custody.state();
        let mut kept: Vec<i32> = state.descriptors().map(|number| number.0).collect();
        // It does not know of these, and would never close them.
        let unknown = (!earlier::knows_the_watched(version)).then(|| state.watched().values());
        for watched in unknown.into_iter().flatten() {
            let process = watched.process.as_ref().map(AsRawFd::as_raw_fd);
            kept.retain(|number| Some(*number) != process);
        }
        kept.push(ledger);
        kept.sort_unstable();
        kept.dedup();
        kept
    }

    /// Whether an earlier version of this program could go on from here: it knows of no dead owner whose
    /// locks are still to be freed, and would take one that cannot be reached for dead.
    fn is_settled(&self) -> bool {
        let state = self.custody.state();
        state.estates().is_empty()
            && !state.has_unreachable()
            && state.clients().all(|(_, client)| !client.is_over())
    }

    /// Whether libvirt's daemon could go on from here: it knows of no message that is on its way
    /// and of no owner that is being fenced.
    fn is_quiet(&self) -> bool {
        let state = self.custody.state();
        let quiet = |(number, connection): (i32, &Connection)| {
            let client = state.client(ClientId(number));
            let is_refused = client.is_some_and(|client| client.is_refused());
            is_refused || connection.is_quiet()
        };
        state.fences().is_empty()
            && state.estates().is_empty()
            && self.connections.iter().all(quiet)
            && state.clients().all(|(_, client)| !client.is_over())
    }

    /// The C daemon dies of a client whose process is gone while its connection lives on.
    fn gone_client(&self) -> Option<String> {
        let state = self.custody.state();
        state.clients().find_map(|(_, client)| {
            let pid = client.peer().pid;
            process::start_time(pid).is_err().then(|| {
                format!(
                    "the process {pid} that made one of the connections is gone, which libvirt's \
                     daemon does not survive ({})",
                    client.text()
                )
            })
        })
    }
}

/// Tells of the owners whose end the successor will not notice.
fn warn_of_unwatched(going: &Going<'_>, successor: &str) {
    let watched = going.custody.state().watched().len();
    if watched > 0 {
        tracing::warn!(
            target: "locking.lock_daemon",
            "{successor} watches no owner: should one of the {watched} end that hold locks here \
             without a connection of their own, it will not free them"
        );
    }
}

pub(super) fn cannot_write(reason: Errno) -> String {
    format!("the state cannot be written: {}", errno::text(reason))
}

fn write_document(path: &std::path::Path, document: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o700)
        .open(path)?;
    file.write_all(document)
}
