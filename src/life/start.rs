//! The order of a start. Each step is a function that says what it needs and how it can fail.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use super::plan::Plan;
use super::way_back::WayBack;
use super::{go_on, serve, standard, takeover};
use crate::cli::{Options, Outcome};
use crate::config::Config;
use crate::custody::descriptor::Saved;
use crate::custody::state::State;
use crate::exit::{ExitCode, Failed, StartError, status_text};
use crate::host::daemonize::{self, Background, Started};
use crate::host::errno;
use crate::host::listen::Activation;
use crate::host::paths::Paths;
use crate::log;
use crate::restart::handover::CommandLine;

/// From the options to the end of the daemon, or to the end of the process that started it.
///
/// # Errors
/// Why there is no daemon any more, or never was.
pub fn start(outcome: Outcome, program: &OsStr) -> Result<ExitCode, Failed> {
    let activation = match &outcome {
        // First of all, because it takes descriptors that nobody else may have opened. A daemon in
        // the background has another pid than the one that the descriptors are for.
        Outcome::Run(options) if !options.daemon => Activation::take(),
        _ => Activation::None,
    };
    let command_line = CommandLine::of_this_process();
    // Before a word is written: standard error may be somebody's.
    if let Some(predecessor) = takeover::take_ledger() {
        if let Ok((state, _)) = &predecessor {
            standard::keep_clear_of(state);
        }
        log::install(log::Settings::initial())?;
        return go_on::resume(predecessor?, wanted(outcome)?, command_line);
    }
    if let Some(mut state) = takeover::awaited(&Paths::of_this_process()) {
        // What was activated for a process before an exec is part of its state.
        drop(activation);
        let moved = standard::clear(&mut state);
        return take_over(
            state,
            WayBack {
                command_line,
                moved,
            },
            outcome,
        );
    }
    log::install(log::Settings::initial())?;
    start_afresh(wanted(outcome)?, command_line, activation, program)
}

fn wanted(outcome: Outcome) -> Result<Options, StartError> {
    match outcome {
        Outcome::Run(options) => Ok(options),
        Outcome::Refused(error) => Err(error),
        Outcome::Exit { exit, .. } => Err(StartError::new(exit, "no daemon was asked for")),
    }
}

/// From libvirt's daemon. Nobody asked this program beforehand whether it could: what does not stop
/// libvirt's own must not stop it, because every lock of the host would be lost.
fn take_over(state: State<Saved>, way_back: WayBack, outcome: Outcome) -> Result<ExitCode, Failed> {
    log::install(log::Settings::initial())?;
    let options = wanted(outcome).map_err(|error| way_back.go(error))?;
    let command_line = way_back.command_line.clone();
    let plan = Plan::prepare(options.clone(), command_line.clone()).unwrap_or_else(|failed| {
        takeover::go_on_regardless(&failed);
        Plan::of_successor(options, command_line, Config::default())
    });
    let document = plan.paths.restart_state.clone();
    go_on::resume_started((state, document), plan, &way_back)
}

fn start_afresh(
    options: Options,
    command_line: CommandLine,
    activation: Activation,
    program: &OsStr,
) -> Result<ExitCode, Failed> {
    let way_back = WayBack {
        command_line: command_line.clone(),
        moved: Vec::new(),
    };
    let plan = Plan::prepare(options, command_line)?;
    if let Some(state) = takeover::find_document(&plan, &way_back)? {
        drop(activation);
        let document = plan.paths.restart_state.clone();
        return go_on::resume_started((state, document), plan, &way_back);
    }
    if !plan.options.daemon {
        return serve::serve(plan, activation, None);
    }
    match go_to_background()? {
        Background::Daemon(status) => serve::serve(plan, activation, Some(status)),
        Background::Parent(started) => Ok(say_how_it_went(program, &started)),
    }
}

/// The working directory is left so that its file system can be unmounted; a relative pid file is
/// therefore relative to `/`.
fn go_to_background() -> Result<Background, StartError> {
    let failed = |what: &str, error: std::io::Error| {
        let reason = errno::text(errno::of(&error));
        StartError::new(ExitCode::Failure, format!("{what}: {reason}"))
    };
    std::env::set_current_dir("/")
        .map_err(|error| failed("cannot change to root directory", error))?;
    let background =
        daemonize::into_background().map_err(|error| failed("Failed to fork as daemon", error))?;
    if matches!(background, Background::Daemon(_)) {
        log::stderr_was_replaced();
    }
    Ok(background)
}

/// The last words of the process that started the daemon.
fn say_how_it_went(program: &OsStr, started: &Started) -> ExitCode {
    let message = match started {
        Started::Yes => return ExitCode::Success,
        Started::No(byte) => format!(
            "{}. Check /var/log/messages or run without --daemon for more info.",
            status_text(*byte)
        ),
        Started::Unknown(error) => format!("unable to determine if daemon is running: {error}"),
    };
    let line = [program.as_bytes(), b": error: ", message.as_bytes(), b"\n"].concat();
    // The exit code says the same, should nobody read the line.
    let _ = std::io::stderr().write_all(&line);
    ExitCode::Failure
}
