//! Going on where an earlier image of this process stopped. The process and its pid are the same, its
//! locks and connections are open; nothing may fail here that could have been found out before.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::plan::{self, Plan};
use super::serve;
use super::takeover::Predecessor;
use crate::cli::Options;
use crate::exit::{ExitCode, Failed, StartError, unusable};
use crate::host::descriptors::Inherited;
use crate::host::listen;
use crate::host::log::{self, Level, Printable, SettingError, Settings};
use crate::host::paths::Paths;
use crate::host::pid_file::PidFile;
use crate::restart::handover::CommandLine;
use crate::restart::ledger::Ledger;
use crate::restart::state::{LogState, State};
use crate::server::reactor::Reactor;
use crate::server::resume;

/// Goes on for a predecessor of this program. Options and configuration were looked at before the
/// exec; should the configuration have become unusable since, the settings in force stay.
///
/// # Errors
/// Why everything is lost.
pub fn resume(
    predecessor: Predecessor,
    mut options: Options,
    mut command_line: CommandLine,
) -> Result<ExitCode, Failed> {
    let Predecessor::Ours(state, ledger) = predecessor else {
        return Err(unusable("it is not this program's").into());
    };
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
    let mut reactor = set_up(
        (state, &mut inherited),
        Some(ledger),
        plan,
        pid_file.as_ref(),
        limits_are_known,
    )?;
    serve::run(&mut reactor, pid_file)
}

/// Goes on for the C daemon, after an ordinary start up to this point.
///
/// # Errors
/// Why everything is lost.
pub fn resume_started(predecessor: Predecessor, plan: Plan) -> Result<ExitCode, Failed> {
    let (mut state, document) = match predecessor {
        Predecessor::Libvirt(state, document) => (state, document),
        Predecessor::Ours(..) => return Err(unusable("it is not libvirt's").into()),
    };
    let pid_file = plan.take_pid_file().unwrap_or_else(|error| {
        tracing::error!("The daemon takes over without a pid file: {error}");
        None
    });
    state.process.idle_timeout_s = plan.options.timeout_seconds;
    // A limit of the configuration that counts already is not news.
    state.lock_server.configured = plan.config.max_clients;
    state.admin_server.configured = plan.config.admin_max_clients;
    let mut inherited = inherit(&state)?;
    let took_over = (state, &mut inherited);
    let mut reactor = set_up(took_over, None, plan, pid_file.as_ref(), true)?;
    // Everything is in our hands and in our ledger: now the only copy may go.
    let _ = std::fs::remove_file(&document);
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

/// The reactor as it was. Without a ledger of the predecessor's one is written.
fn set_up(
    (mut state, inherited): (State, &mut Inherited),
    ledger: Option<Ledger>,
    plan: Plan,
    pid_file: Option<&PidFile>,
    limits_are_known: bool,
) -> Result<Reactor, StartError> {
    let descriptors = plan::raise_limit();
    let limits = plan::client_limits(&plan.config, descriptors);
    let mut reactor = serve::reactor(plan, descriptors, pid_file)?;
    let process = reactor.daemon.process.clone();
    let has_ledger = ledger.is_some();
    if let Some(ledger) = ledger {
        reactor.daemon.ledger = ledger;
    }
    let listeners =
        resume::resume_listeners(&state.listeners, inherited).map_err(|why| unusable(&why))?;
    if let Some(poll) = state.poll.take() {
        let descriptor = inherited
            .take(poll.descriptor)
            .map_err(|_| unusable("the descriptor of its poll is not open"))?;
        let is_known = poll.knows(&state.clients);
        // Without it every connection is watched anew, which takes longer.
        if is_known && reactor.inherit(&descriptor).map_err(serve::no_event_loop)? {
            state.poll = Some(poll);
        }
    }
    reactor
        .daemon
        .resume(state, inherited)
        .map_err(|why| unusable(&why))?;
    reactor.daemon.process = process;
    if limits_are_known {
        reactor.configure_if_changed(limits);
    }
    for listener in listeners {
        // libvirt's backlog is 30: a host that boots its guests fills it at once.
        let _ = listen::widen_backlog(&listener.socket);
        reactor.listen(listener).map_err(serve::no_event_loop)?;
    }
    if !has_ledger {
        reactor.daemon.replace_ledger();
    }
    tracing::info!(
        "Took over {} connections and {} locks",
        reactor.daemon.connections.len(),
        reactor.daemon.keeper.table().len()
    );
    Ok(reactor)
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
