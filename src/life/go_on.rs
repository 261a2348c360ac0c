//! Going on where an earlier image of this process stopped. The process and its pid are the same, its
//! locks and connections are open; nothing may fail here that could have been found out before.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::plan::{self, Plan};
use super::serve;
use super::way_back::WayBack;
use crate::cli::Options;
use crate::exit::{ExitCode, Failed, StartError, unusable};
use crate::host::descriptors::Inherited;
use crate::host::listen;
use crate::host::paths::Paths;
use crate::host::pid_file::PidFile;
use crate::log::{self, Level, Printable, SettingError, Settings};
use crate::restart::handover::CommandLine;
use crate::restart::ledger::Ledger;
use crate::restart::state::{LogState, State};
use crate::server::reactor::{Limits, Reactor};
use crate::server::resume;

/// Goes on for a predecessor of this program. Options and configuration were looked at before the
/// exec; should the configuration have become unusable since, the settings in force stay.
///
/// # Errors
/// Why everything is lost.
pub fn resume(
    (state, ledger): (State, Ledger),
    mut options: Options,
    mut command_line: CommandLine,
) -> Result<ExitCode, Failed> {
    let log_restored = restore_log(&state.process.logging);
    // As it was found at the first start: the working directory may have changed since.
    if let Some(path) = &state.process.config_file {
        options.config_file = Some(PathBuf::from(OsString::from_vec(path.clone())));
    }
    if !state.process.program.is_empty() {
        command_line.program = OsString::from_vec(state.process.program.clone());
    }
    let mut inherited = inherit(&state)?;
    let pid_file = match &state.process.pid_file {
        None => None,
        Some((descriptor, path)) => {
            let path = PathBuf::from(OsString::from_vec(path.clone()));
            let descriptor = inherited
                .take(*descriptor)
                .map_err(|_| unusable("the descriptor of its pid file is not open"))?;
            Some(PidFile::inherited(descriptor, path))
        }
    };
    let config = match plan::load_configuration(&options, &Paths::of_this_process()) {
        Ok(config) => Some(config),
        Err(error) => {
            tracing::error!("The settings in force stay, because of this: {error}");
            None
        }
    };
    let limits_are_known = config.is_some();
    let plan = Plan::of_successor(options, command_line, config.unwrap_or_default());
    if let Err(reason) = log_restored {
        replace_log_settings(&plan, &state.process.logging, &reason);
    }
    let (mut reactor, limits) = open_reactor(plan, pid_file.as_ref())?;
    let limits = limits_are_known.then_some(limits);
    set_up(&mut reactor, state, &mut inherited, Some(ledger), limits)?;
    serve::run(&mut reactor, pid_file)
}

/// Goes on for the C daemon, from its state and the document in which it was. What its own program would
/// not end for does not end this one; what cannot be helped leads back to it.
///
/// # Errors
/// Why everything is lost.
pub fn resume_started(
    (mut state, document): (State, PathBuf),
    plan: Plan,
    way_back: &WayBack,
) -> Result<ExitCode, Failed> {
    let back = |error| way_back.go(error);
    let pid_file = plan.take_pid_file().unwrap_or_else(|error| {
        tracing::error!("The daemon takes over without a pid file: {error}");
        None
    });
    state.process.idle_timeout_s = plan.options.timeout_seconds;
    // A limit of the configuration that counts already is not news.
    state.lock_server.configured = plan.config.max_clients;
    state.admin_server.configured = plan.config.admin_max_clients;
    let (mut reactor, limits) = open_reactor(plan, pid_file.as_ref()).map_err(back)?;
    let mut inherited = inherit(&state).map_err(back)?;
    // What it has taken by then stays open in the reactor until libvirt's program has it.
    set_up(&mut reactor, state, &mut inherited, None, Some(limits)).map_err(back)?;
    // Everything is in our hands and in our ledger: now the only copy may go.
    if let Err(error) = std::fs::remove_file(&document) {
        tracing::error!(
            "The state document '{}' was taken over and cannot be removed: {error}. Remove it before \
             a daemon is started again",
            document.display()
        );
    }
    serve::run(&mut reactor, pid_file)
}

/// The descriptors that the state speaks of.
fn inherit(state: &State) -> Result<Inherited, StartError> {
    state.check_descriptors().map_err(|why| unusable(&why))?;
    Inherited::of(&state.descriptors()).map_err(|number| {
        let kind = state.meaning(number);
        unusable(&format!(
            "descriptor {number}, which should be {kind}, is not open"
        ))
    })
}

/// A reactor without sockets, and the limits that the configuration gives.
fn open_reactor(plan: Plan, pid_file: Option<&PidFile>) -> Result<(Reactor, Limits), StartError> {
    let descriptors = plan::raise_limit();
    let limits = plan::client_limits(&plan.config, descriptors);
    let reactor = serve::reactor(plan, descriptors, pid_file)?;
    Ok((reactor, limits))
}

/// The reactor as it was. Without a ledger of the predecessor's, or with one of an earlier format, one
/// is written; without limits those in force stay. Whatever has been taken when this fails is the
/// reactor's, and open.
fn set_up(
    reactor: &mut Reactor,
    mut state: State,
    inherited: &mut Inherited,
    ledger: Option<Ledger>,
    limits: Option<Limits>,
) -> Result<(), StartError> {
    let process = reactor.daemon.process.clone();
    let has_ledger = ledger.is_some();
    if let Some(ledger) = ledger {
        reactor.daemon.ledger.replace(ledger);
    }
    let listeners =
        resume::resume_listeners(&state.listeners, inherited).map_err(|why| unusable(&why))?;
    if let Some(poll) = state.poll.take() {
        let descriptor = inherited
            .take(poll.descriptor)
            .map_err(|_| unusable("the descriptor of its poll is not open"))?;
        let is_known = poll.knows(&state.clients);
        // Without it every connection is watched anew, which takes longer.
        if is_known && reactor.inherit(&descriptor).map_err(serve::refused)? {
            state.poll = Some(poll);
        }
    }
    let mut all_heard = Ok(());
    for listener in listeners {
        // libvirt's backlog is 30: a host that boots its guests fills it at once.
        let _ = listen::widen_backlog(&listener.socket);
        all_heard = all_heard.and(reactor.listen(listener).map_err(serve::refused));
    }
    all_heard?;
    reactor
        .daemon
        .resume(state, inherited)
        .map_err(|why| unusable(&why))?;
    reactor.daemon.process = process;
    if let Some(limits) = limits {
        reactor.configure_if_changed(limits);
    }
    if !has_ledger || reactor.daemon.ledger.is_stale() {
        reactor.daemon.replace_ledger();
    }
    tracing::info!(
        "Took over {} connections and {} locks",
        reactor.daemon.connections.len(),
        reactor.daemon.keeper.table().len()
    );
    Ok(())
}

/// The log as it was. If it cannot be restored, it stays that of a start; the reason why.
fn restore_log(saved: &LogState) -> Result<(), String> {
    let text = |error: SettingError| error.to_string();
    let default = log::restore_outputs(&saved.default_output).map_err(text)?;
    let settings = Settings {
        level: Level::from_number(saved.level).ok_or("there is no such level")?,
        filters: log::parse_filters(&saved.filters).map_err(text)?,
        outputs: log::restore_outputs(&saved.outputs).map_err(text)?,
        default_output: default.into_iter().next().ok_or("there is no default")?,
    };
    log::install(settings).map_err(text)
}

/// The log settings from before the upgrade could not be restored: those of the configuration count.
fn replace_log_settings(plan: &Plan, saved: &LogState, reason: &str) {
    let now = match plan.apply_log_settings(&plan.config) {
        Ok(()) => "those of the configuration count".to_owned(),
        Err(error) => format!("and those of the configuration cannot be used either: {error}"),
    };
    tracing::error!(
        "The log settings '{}' '{}' could not be restored ({reason}): {now}",
        Printable(saved.outputs.as_bytes()),
        saved.filters
    );
}
