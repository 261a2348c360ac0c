//! SIGUSR1: the daemon replaces its own program and keeps every lock and every client.
//!
//! The successor is checked first, beside the running reactor. Only when it has shown that it can
//! take over, everything is handed to it in one turn: the state in a closed ledger (or, for
//! libvirt's daemon, in its document), and all descriptors. Whatever goes wrong on the way, the
//! daemon says so and goes on as if nothing had been asked.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use mio::unix::SourceFd;

use super::connection::{Connection, Phase};
use super::daemon::{Daemon, State};
use super::deadlines::Deadline;
use super::token::Source;
use crate::host::clock::Moment;
use crate::host::{descriptors, notify, process};
use crate::restart::handover::{
    self, Check, CommandLine, HANDOVER_VARIABLE, ProgramFile, Successor,
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
    /// Successors that took too long and were killed, and are not over yet.
    abandoned: Vec<Check>,
    /// An earlier image of this process may have left such successors behind.
    has_inherited: bool,
}

impl Upgrade {
    /// Whether one has begun.
    pub fn is_under_way(&self) -> bool {
        !matches!(self.stage, Stage::None)
    }
}

impl Daemon {
    /// SIGUSR1: begins to look at the successor.
    pub fn begin_upgrade(&mut self) {
        if self.state != State::Serving {
            return;
        }
        if self.upgrade.is_under_way() {
            self.upgrade.again = true;
            return;
        }
        self.reap_abandoned();
        let Some(command_line) = &self.upgrade.command_line else {
            return;
        };
        let command_line = command_line.clone();
        descriptors::fill_standard_places();
        self.upgrade.seen = command_line.file();
        // Short and true: it is what the successor reads now, and what it will go on from.
        let begun = match self.renew_ledger() {
            Ok(()) => {
                let withheld = self.kept_descriptors();
                Check::begin(&command_line, self.ledger.descriptor(), &withheld)
            }
            Err(reason) => Err(cannot_write(reason)),
        };
        let check = match begun {
            Ok(check) => check,
            Err(reason) => return self.upgrade_failed(&reason),
        };
        let descriptor = check.descriptor();
        if let Err(error) = Source::Successor.watch(&self.registry, descriptor) {
            self.abandon(check);
            return self.upgrade_failed(&format!("the successor cannot be watched: {error}"));
        }
        self.deadlines
            .set(Deadline::Successor, Moment::now().plus_ms(CHECK_MS));
        self.upgrade.stage = Stage::Checking(check);
    }

    /// The successor may have ended.
    pub fn look_at_successor(&mut self) {
        self.reap_abandoned();
        let Stage::Checking(check) = &self.upgrade.stage else {
            return;
        };
        if !check.is_over() {
            return;
        }
        let Some(check) = self.end_check() else {
            return;
        };
        self.unwatch(&check);
        match check.verdict() {
            Ok(successor) => {
                self.deadlines
                    .set(Deadline::Quiet, Moment::now().plus_ms(QUIET_MS));
                self.upgrade.stage = Stage::Ready(successor);
            }
            Err(reason) => self.upgrade_failed(&reason),
        }
    }

    /// The successor takes too long.
    pub fn successor_is_late(&mut self) {
        // Its end may have gone unnoticed.
        self.look_at_successor();
        // A later one has a deadline of its own.
        let is_another = self.deadlines.get(Deadline::Successor).is_some();
        if is_another || !matches!(self.upgrade.stage, Stage::Checking(_)) {
            return;
        }
        if let Some(check) = self.end_check() {
            self.abandon(check);
            let reason = format!("it does not say its version within {} s", CHECK_MS / 1000);
            self.upgrade_failed(&reason);
        }
    }

    /// The daemon ends: a successor that is being looked at must not stay behind.
    pub fn abandon_upgrade(&mut self) {
        if let Some(check) = self.end_check() {
            self.abandon(check);
        }
    }

    fn end_check(&mut self) -> Option<Check> {
        self.deadlines.unset(Deadline::Successor);
        match std::mem::take(&mut self.upgrade.stage) {
            Stage::Checking(check) => Some(check),
            Stage::None | Stage::Ready(_) => None,
        }
    }

    fn unwatch(&self, check: &Check) {
        let _ = self.registry.deregister(&mut SourceFd(&check.descriptor()));
    }

    /// Kills a successor and looks for its end now and then, also if that cannot be watched: it is
    /// reaped when it is over, not waited for.
    fn abandon(&mut self, mut check: Check) {
        check.kill();
        self.upgrade.abandoned.push(check);
        self.reap_abandoned();
    }

    /// Forgets the abandoned successors that are over.
    pub fn reap_abandoned(&mut self) {
        let (over, left) = std::mem::take(&mut self.upgrade.abandoned)
            .into_iter()
            .partition(Check::is_over);
        self.upgrade.abandoned = left;
        let over: Vec<Check> = over;
        for check in over {
            self.unwatch(&check);
            check.reap();
        }
        if self.upgrade.abandoned.is_empty() && !self.upgrade.has_inherited {
            self.deadlines.unset(Deadline::Abandoned);
        } else {
            let again = Moment::now().plus_ms(REAP_MS);
            self.deadlines.set(Deadline::Abandoned, again);
        }
    }

    /// An earlier image of this process was here before: what it abandoned is a child of this one.
    pub fn inherit_abandoned(&mut self) {
        self.upgrade.has_inherited = true;
        self.reap_inherited();
    }

    /// Forgets those that an earlier image abandoned, while there is no child of this one.
    pub fn reap_inherited(&mut self) {
        if !self.upgrade.has_inherited {
            return;
        }
        let has_own =
            matches!(self.upgrade.stage, Stage::Checking(_)) || !self.upgrade.abandoned.is_empty();
        self.upgrade.has_inherited = has_own || process::reap_children();
        if self.upgrade.has_inherited {
            let again = Moment::now().plus_ms(REAP_MS);
            self.deadlines.set(Deadline::Abandoned, again);
        }
    }

    fn upgrade_failed(&mut self, reason: &str) {
        self.upgrade.stage = Stage::None;
        self.upgrade.looked_again = false;
        self.deadlines.unset(Deadline::Quiet);
        tracing::error!(
            target: "rpc.netdaemon",
            "SIGUSR1: the daemon goes on as it is, because its successor cannot take over: {reason}"
        );
        if std::mem::take(&mut self.upgrade.again) {
            self.begin_upgrade();
        }
    }

    /// Hands over, if a successor is ready: at the end of a turn, when nothing is half done.
    pub fn upgrade_if_ready(&mut self) {
        let Stage::Ready(successor) = self.upgrade.stage else {
            return;
        };
        if self.state != State::Serving {
            return;
        }
        self.finish_endings();
        if successor == Successor::Libvirt && !self.is_quiet() {
            // Tried again after the next turn, until the time for it is over.
            return;
        }
        // What was looked at may not be what is there: the state of one program would be lost on
        // the other one.
        let is_another = self.program_file() != self.upgrade.seen;
        let again = std::mem::take(&mut self.upgrade.again);
        if (again || is_another) && !self.upgrade.looked_again {
            self.upgrade.looked_again = true;
            self.upgrade.stage = Stage::None;
            self.deadlines.unset(Deadline::Quiet);
            return self.begin_upgrade();
        }
        if is_another {
            let reason = "its program is exchanged all the time; try again when it is in place";
            return self.upgrade_failed(reason);
        }
        match successor {
            Successor::Ours => self.hand_over(),
            Successor::Libvirt => self.hand_over_to_libvirt(),
        }
    }

    fn program_file(&self) -> Option<ProgramFile> {
        self.upgrade.command_line.as_ref()?.file()
    }

    /// Connections that are over and owners that are dead need not be handed over.
    fn finish_endings(&mut self) {
        while let Some(place) = self.ending.pop_front() {
            self.clear_away(place);
        }
        while let Some(pid) = self.dead.pop_front() {
            self.bury(pid);
        }
        while self.free_some() {}
    }

    fn hand_over(&mut self) {
        if let Err(reason) = self.complete_ledger() {
            return self.upgrade_failed(&cannot_write(reason));
        }
        self.ledger.close();
        let kept = self.kept_descriptors();
        let number = match self.ledger.descriptor() {
            Ok(descriptor) => descriptor.as_raw_fd(),
            Err(refusal) => {
                self.replace_ledger();
                return self.upgrade_failed(&handover::nothing_to_pass_on(refusal));
            }
        };
        let value = format!("{number}:{}", process::started());
        self.replace(Successor::Ours, &kept, &[(HANDOVER_VARIABLE, value)]);
        // Still here: the ledger goes on from what is now.
        self.replace_ledger();
    }

    fn hand_over_to_libvirt(&mut self) {
        let mut state = self.state();
        // The C daemon takes its pid file anew: it must find it unlocked, which closing it does.
        state.process.pid_file = None;
        // It watches nobody.
        state.watches.clear();
        if let Some(reason) = self.gone_client() {
            return self.upgrade_failed(&reason);
        }
        let written = libvirt_json::write(&state, process::started()).and_then(|document| {
            write_document(&self.upgrade.document, &document)
                .map_err(|error| format!("its state document cannot be written: {error}"))
        });
        if let Err(reason) = written {
            // Half a document would keep the next daemon from starting.
            let _ = std::fs::remove_file(&self.upgrade.document);
            return self.upgrade_failed(&reason);
        }
        state.clients.retain(|client| !client.refused);
        if !self.watches.is_empty() {
            tracing::warn!(
                target: "locking.lock_daemon",
                "libvirt's daemon watches no owner: should one of the {} end that hold locks here \
                 without a connection of their own, it will not free them",
                self.watches.len()
            );
        }
        self.replace(Successor::Libvirt, &state.descriptors(), &[]);
        let _ = std::fs::remove_file(&self.upgrade.document);
    }

    /// Whether libvirt's daemon could go on from here: it knows of no message that is on its way
    /// and of no owner that is being fenced.
    fn is_quiet(&self) -> bool {
        let quiet = |connection: &Connection| {
            matches!(connection.phase, Phase::Refused(_))
                || connection.phase == Phase::Served
                    && connection.conversation().is_none()
                    && connection.unsent().is_empty()
        };
        self.fences.is_empty()
            && self
                .connections
                .iter()
                .all(|(_, connection)| quiet(connection))
    }

    /// The C daemon dies of a client whose process is gone while its connection lives on.
    fn gone_client(&self) -> Option<String> {
        self.connections.iter().find_map(|(_, connection)| {
            process::start_time(connection.peer.pid).is_err().then(|| {
                format!(
                    "the process {} that made one of the connections is gone, which libvirt's \
                     daemon does not survive ({})",
                    connection.peer.pid,
                    super::dispatch::caller(connection)
                )
            })
        })
    }

    /// The moment for libvirt's daemon did not come.
    pub fn never_quiet(&mut self) {
        if matches!(self.upgrade.stage, Stage::Ready(_)) {
            let reason = format!(
                "for {} s there was always an owner being fenced or a message on its way, which \
                 libvirt's daemon cannot go on with; try again",
                QUIET_MS / 1000
            );
            self.upgrade_failed(&reason);
        }
    }

    /// The exec. Comes back only if it failed.
    fn replace(&mut self, successor: Successor, kept: &[i32], variables: &[(&str, String)]) {
        self.reap_abandoned();
        let Some(command_line) = &self.upgrade.command_line else {
            return;
        };
        tracing::info!(target: "rpc.netdaemon", "SIGUSR1: the daemon hands over to its successor");
        notify::reloading();
        let reason = handover::replace(successor, command_line, kept, variables);
        notify::ready();
        self.upgrade_failed(&reason);
    }
}

fn cannot_write(reason: crate::host::errno::Errno) -> String {
    format!(
        "the state cannot be written: {}",
        crate::host::errno::text(reason)
    )
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
