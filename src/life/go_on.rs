//! Going on where an earlier image of this process stopped. The process and its pid are the same, its
//! locks and connections are open; nothing may fail here that could have been found out before.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::plan::{self, Plan};
use super::serve;
use super::way_back::WayBack;
use crate::cli::Options;
use crate::custody::descriptor::{Number, Saved};
use crate::custody::event::Event;
use crate::custody::ledger::Ledger;
use crate::custody::servers::{Server, Service};
use crate::custody::settings::{LogSettings, Settings as ProcessSettings};
use crate::custody::since::Since;
use crate::custody::state::State;
use crate::exit::{ExitCode, Failed, StartError, unusable};
use crate::host::descriptors::Inherited;
use crate::host::listen;
use crate::host::paths::Paths;
use crate::host::pid_file::PidFile;
use crate::log::{self, Level, Printable, SettingError, Settings};
use crate::restart::handover::CommandLine;
use crate::server::reactor::{Limits, Reactor};

/// Goes on for a predecessor of this program. Options and configuration were looked at before the
/// exec; should the configuration have become unusable since, the settings in force stay.
///
/// # Errors
/// Why everything is lost.
pub fn resume(
    (state, ledger): (State<Saved>, Option<Ledger>),
    mut options: Options,
    mut command_line: CommandLine,
) -> Result<ExitCode, Failed> {
    let log_restored = restore_log(&state.settings().logging);
    // As it was found at the first start: the working directory may have changed since.
    if let Some(path) = &state.settings().config_file {
        options.config_file = Some(PathBuf::from(OsString::from_vec(path.clone())));
    }
    if !state.settings().program.is_empty() {
        command_line.program = OsString::from_vec(state.settings().program.clone());
    }
    let mut inherited = inherit(&state)?;
    let pid_file = match &state.settings().pid_file {
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
        replace_log_settings(&plan, &state.settings().logging, &reason);
    }
    let (mut reactor, limits) = open_reactor(plan, pid_file.as_ref())?;
    let limits = limits_are_known.then_some(limits);
    let idle_timeout_s = state.settings().idle_timeout_s;
    let theirs = (ledger, Some(idle_timeout_s));
    set_up(&mut reactor, state, &mut inherited, theirs, limits)?;
    serve::run(&mut reactor, pid_file)
}

/// Goes on for the C daemon, from its state and the document in which it was. What its own program would
/// not end for does not end this one; what cannot be helped leads back to it.
///
/// # Errors
/// Why everything is lost.
pub fn resume_started(
    (state, document): (State<Saved>, PathBuf),
    plan: Plan,
    way_back: &WayBack,
) -> Result<ExitCode, Failed> {
    let back = |error| way_back.go(error);
    let pid_file = plan.take_pid_file().unwrap_or_else(|error| {
        tracing::error!("The daemon takes over without a pid file: {error}");
        None
    });
    // A limit of the configuration that counts already is not news.
    let configured = [
        (Service::Lock, plan.config.max_clients),
        (Service::Admin, plan.config.admin_max_clients),
    ];
    let events = configured.map(|(service, configured)| {
        let server = *state.server(service);
        Event::Server(
            service,
            Server {
                configured,
                ..server
            },
        )
    });
    let state = state.with(events).map_err(|why| back(unusable(&why)))?;
    let (mut reactor, limits) = open_reactor(plan, pid_file.as_ref()).map_err(back)?;
    let mut inherited = inherit(&state).map_err(back)?;
    // What it has taken by then stays open in the reactor until libvirt's program has it.
    let nothing = (None, None);
    set_up(&mut reactor, state, &mut inherited, nothing, Some(limits)).map_err(back)?;
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
fn inherit(state: &State<Saved>) -> Result<Inherited, StartError> {
    state.check_descriptors().map_err(|why| unusable(&why))?;
    let numbers: Vec<i32> = state.descriptors().map(|number| number.0).collect();
    Inherited::of(&numbers).map_err(|number| {
        let kind = state.meaning(Number(number));
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
    state: State<Saved>,
    inherited: &mut Inherited,
    (ledger, idle_timeout_s): (Option<Ledger>, Option<u32>),
    limits: Option<Limits>,
) -> Result<(), StartError> {
    let settings = reactor.custody().state().settings().clone();
    let state = state.adopt(inherited).map_err(|why| unusable(&why))?;
    for listening in state.listeners() {
        // libvirt's backlog is 30: a host that boots its guests fills it at once.
        let _ = listen::widen_backlog(&listening.socket);
    }
    // libvirt's document does not say it: the option does.
    let idle_timeout_s = idle_timeout_s.unwrap_or(settings.idle_timeout_s);
    reactor
        .go_on(state, ledger, Since::default())
        .map_err(serve::refused)?;
    reactor.custody_mut().set_process(ProcessSettings {
        idle_timeout_s,
        ..settings
    });
    if let Some(limits) = limits {
        reactor.configure_if_changed(limits);
    }
    let state = reactor.custody().state();
    tracing::info!(
        "Took over {} connections and {} locks",
        state.client_count(),
        state.table().len()
    );
    Ok(())
}

/// The log as it was. If it cannot be restored, it stays that of a start; the reason why.
fn restore_log(saved: &LogSettings) -> Result<(), String> {
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
fn replace_log_settings(plan: &Plan, saved: &LogSettings, reason: &str) {
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
