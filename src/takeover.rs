//! Going on where an earlier image of this process stopped: this program's (a ledger in a memory
//! file) or the C daemon's (its state document). The process and its pid are the same, its locks
//! and connections are open; nothing may fail here that could have been found out before.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use virtlockd::cli::{self, Options, Outcome};
use virtlockd::config::Config;
use virtlockd::exit::{ExitCode, StartError};
use virtlockd::host::descriptors::{self, Inherited};
use virtlockd::host::errno::{self, Errno};
use virtlockd::host::paths::Paths;
use virtlockd::host::pid_file::PidFile;
use virtlockd::host::process::Process;
use virtlockd::host::whole_file::{self, Unread};
use virtlockd::host::{environment, listen};
use virtlockd::log::{self, Level, Printable, SettingError, Settings};
use virtlockd::restart::handover::{CommandLine, HANDOVER_VARIABLE, READABLE};
use virtlockd::restart::ledger::{self, Ledger};
use virtlockd::restart::libvirt_json::{self, Unusable};
use virtlockd::restart::state::{LogState, Service, State};
use virtlockd::server::reactor::Reactor;
use virtlockd::server::resume;

use crate::Failed;
use crate::start::{self, Start};

/// A state document larger than this is not read, bytes. libvirt's daemon writes it whole even if
/// it could not read it again.
const DOCUMENT_LIMIT: u64 = 256 * 1024 * 1024;

/// Whose state it is.
pub enum Predecessor {
    /// This program's, perhaps another version: the state, and the ledger to go on writing.
    Ours(State, Ledger),
    /// libvirt's, with the document that is to be removed when the state has been taken over.
    Libvirt(State, PathBuf),
}

/// The state that a predecessor of this program handed over, if this process was made by it.
pub fn take_ledger() -> Option<Result<Predecessor, Failed>> {
    let value = environment::take(HANDOVER_VARIABLE)?;
    let (descriptor, pid) = value.to_str()?.split_once(':')?;
    // The variable of another process means nothing: this one is not its successor.
    if pid != std::process::id().to_string() {
        return None;
    }
    let descriptor: OwnedFd = match descriptor.parse().ok().map(descriptors::adopt) {
        Some(Ok(descriptor)) => descriptor,
        _ => return Some(Err(unusable("its descriptor is not open").into())),
    };
    let loaded = Ledger::take_over(descriptor)
        .map(|(state, ledger)| Predecessor::Ours(state, ledger))
        .map_err(|reason| unusable(&reason.to_string()).into());
    Some(loaded)
}

fn unusable(reason: &str) -> StartError {
    let message = format!(
        "The state of the daemon that this one was to go on for cannot be used: {reason}. Its \
         locks and connections are lost: stop the guests, or make sure that none is started twice"
    );
    StartError::new(ExitCode::Initialisation, message)
}

/// The state that the C daemon left for this process, if it did. A running daemon's that is about to
/// execute its successor is not touched.
pub fn find_document(start: &Start) -> Result<Option<Predecessor>, StartError> {
    let paths = &start.paths;
    let path = &paths.restart_state;
    // Whoever writes the document holds the pid file until it is whole: asked before it is read.
    let may_be_half = path.exists() && start.is_another_running();
    let document = match read_document(path) {
        Ok(Some(document)) => document,
        Ok(None) => return Ok(None),
        Err(error) => {
            let message = format!("Failed to read file '{}': {error}", path.display());
            return Err(StartError::new(ExitCode::Initialisation, message));
        }
    };
    let socket = |service| {
        let path = match service {
            Service::Lock => &paths.lock_socket,
            Service::Admin => &paths.admin_socket,
        };
        path.as_os_str().as_bytes().to_vec()
    };
    match libvirt_json::read(&document, std::process::id(), socket) {
        Ok(state) => Ok(Some(Predecessor::Libvirt(state, path.clone()))),
        Err(Unusable::Foreign(magic)) if is_alive(&magic) => {
            tracing::warn!(
                "Found restart exec file with old magic {magic} vs wanted {}: it is left alone, \
                 because process {magic} runs",
                std::process::id()
            );
            Ok(None)
        }
        Err(Unusable::Damaged(reason)) if may_be_half => {
            let message = format!(
                "The state file '{}' is damaged or not yet whole: {reason}. It is left alone, because \
                 another process has the pid file",
                path.display()
            );
            Err(StartError::new(ExitCode::Initialisation, message))
        }
        Err(Unusable::Foreign(magic)) => {
            tracing::warn!(
                "Found restart exec file with old magic {magic} vs wanted {}: it is removed",
                std::process::id()
            );
            let _ = std::fs::remove_file(path);
            Ok(None)
        }
        Err(Unusable::Damaged(reason)) => {
            // It may be the only copy of what guests depend on: kept, out of the next start's way.
            let aside = path.with_extension("json.damaged");
            let kept = match std::fs::rename(path, &aside) {
                Ok(()) => aside,
                Err(_) => path.clone(),
            };
            let message = format!(
                "The state file '{}' is damaged and cannot be taken over: {reason}. It is kept as \
                 '{}'",
                path.display(),
                kept.display()
            );
            Err(StartError::new(ExitCode::Initialisation, message))
        }
    }
}

/// Whether the process that a document's magic names may be running.
fn is_alive(magic: &str) -> bool {
    let Ok(pid) = magic.parse() else {
        return false;
    };
    match Process::open_any(pid) {
        Ok(process) => !process.is_dead(),
        Err(reason) => errno::may_pass(reason),
    }
}

/// Whether the C daemon left its state for this process.
pub fn is_awaited(paths: &Paths) -> bool {
    let document = read_document(&paths.restart_state);
    document.is_ok_and(|document| {
        document.is_some_and(|document| {
            libvirt_json::read(&document, std::process::id(), |_| Vec::new()).is_ok()
        })
    })
}

/// Says what is wrong and will be, until it is put right and the daemon told (SIGHUP).
pub fn go_on_regardless(failed: &Failed) {
    let reason = match failed {
        Failed::Error(error) => error.to_string(),
        Failed::Log(error) => error.to_string(),
    };
    tracing::error!(
        "The daemon takes over without its configuration, because of this: {reason}. Put it right \
         and send SIGHUP"
    );
}

fn read_document(path: &Path) -> Result<Option<Vec<u8>>, Unread> {
    match whole_file::read(path, DOCUMENT_LIMIT) {
        Ok(document) => Ok(Some(document)),
        Err(Unread::Open(Errno::ENOENT)) => Ok(None),
        Err(reason) => Err(reason),
    }
}

/// Goes on for a predecessor of this program. Options and configuration were looked at before the
/// exec; should the configuration have become unusable since, the settings in force stay.
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
    let config = match start::load_configuration(&options, &Paths::of_this_process()) {
        Ok(config) => Some(config),
        Err(error) => {
            tracing::error!("The settings in force stay, because of this: {error}");
            None
        }
    };
    let limits_are_known = config.is_some();
    let start = Start::of_successor(options, command_line, config.unwrap_or_default());
    if let Err(reason) = log_restored {
        replace_log_settings(&start, &state.process.logging, &reason);
    }
    let mut reactor = set_up(
        (state, &mut inherited),
        Some(ledger),
        start,
        pid_file.as_ref(),
        limits_are_known,
    )?;
    start::run(&mut reactor, pid_file)
}

/// Goes on for the C daemon, after an ordinary start up to this point.
pub fn resume_started(predecessor: Predecessor, start: Start) -> Result<ExitCode, Failed> {
    let (mut state, document) = match predecessor {
        Predecessor::Libvirt(state, document) => (state, document),
        Predecessor::Ours(..) => return Err(unusable("it is not libvirt's").into()),
    };
    let pid_file = start.take_pid_file().unwrap_or_else(|error| {
        tracing::error!("The daemon takes over without a pid file: {error}");
        None
    });
    state.process.idle_timeout_s = start.options.timeout_seconds;
    // A limit of the configuration that counts already is not news.
    state.lock_server.configured = start.config.max_clients;
    state.admin_server.configured = start.config.admin_max_clients;
    let mut inherited = inherit(&state)?;
    let took_over = (state, &mut inherited);
    let mut reactor = set_up(took_over, None, start, pid_file.as_ref(), true)?;
    // Everything is in our hands and in our ledger: now the only copy may go.
    let _ = std::fs::remove_file(&document);
    start::run(&mut reactor, pid_file)
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
    start: Start,
    pid_file: Option<&PidFile>,
    limits_are_known: bool,
) -> Result<Reactor, StartError> {
    let descriptors = start::raise_limit();
    let limits = start::client_limits(&start.config, descriptors);
    let mut reactor = start.reactor(descriptors, pid_file)?;
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
        if is_known && reactor.inherit(&descriptor).map_err(start::no_event_loop)? {
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
        reactor.listen(listener).map_err(start::no_event_loop)?;
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
fn replace_log_settings(start: &Start, saved: &LogState, reason: &str) {
    let now = match start.apply_log_settings(&start.config) {
        Ok(()) => "those of the configuration count".to_owned(),
        Err(error) => format!("and those of the configuration cannot be used either: {error}"),
    };
    tracing::error!(
        "The log settings '{}' '{}' could not be restored ({reason}): {now}",
        Printable(saved.outputs.as_bytes()),
        saved.filters
    );
}

/// Asked by the running daemon, with its ledger as standard input: could this program go on with
/// this state, these options and this configuration? Changes nothing.
pub fn rehearse(arguments: &[OsString]) -> ExitCode {
    let words: Vec<OsString> = arguments
        .iter()
        .enumerate()
        .filter(|(position, _)| *position != 1)
        .map(|(_, word)| word.clone())
        .collect();
    match rehearsed(&words) {
        Ok(line) => {
            let _ = writeln!(std::io::stdout(), "{line}");
            ExitCode::Success
        }
        Err(reason) => {
            let _ = writeln!(std::io::stderr(), "{reason}");
            ExitCode::Initialisation
        }
    }
}

fn rehearsed(words: &[OsString]) -> Result<String, String> {
    let options = match cli::parse(words, nix::unistd::geteuid().is_root()) {
        Outcome::Run(options) => options,
        Outcome::Refused(error) => return Err(error.to_string()),
        Outcome::Exit { .. } => return Err("its options do not start a daemon".into()),
    };
    let input: OwnedFd = std::os::fd::AsFd::as_fd(&std::io::stdin())
        .try_clone_to_owned()
        .map_err(|error| format!("there is no ledger on standard input: {error}"))?;
    let state = ledger::load(&input).map_err(|reason| format!("the ledger: {reason}"))?;
    state.check_descriptors()?;
    // As the successor will find it: by the path that the first start made absolute.
    let options = match &state.process.config_file {
        Some(path) => Options {
            config_file: Some(PathBuf::from(OsString::from_vec(path.clone()))),
            ..options
        },
        None => options,
    };
    let _: Config = start::load_configuration(&options, &Paths::of_this_process())
        .map_err(|error| error.to_string())?;
    Ok(format!(
        "{READABLE}: {} connections, {} locks",
        state.clients.len(),
        state.resources.len()
    ))
}
