//! The order of a start. Each step is a function that says what it needs and how it can fail.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use super::plan::Plan;
use super::{go_on, serve, takeover};
use crate::cli::Outcome;
use crate::config::Config;
use crate::exit::{ExitCode, Failed, StartError, status_text};
use crate::host::daemonize::{self, Background, Started};
use crate::host::listen::Activation;
use crate::host::paths::Paths;
use crate::host::{errno, log};
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
    log::install(log::Settings::initial())?;
    let options = match outcome {
        Outcome::Run(options) => options,
        Outcome::Refused(error) => return Err(error.into()),
        Outcome::Exit { exit, .. } => return Ok(exit),
    };
    let command_line = CommandLine::of_this_process();
    if let Some(predecessor) = takeover::take_ledger() {
        return go_on::resume(predecessor?, options, command_line);
    }
    let plan = match Plan::prepare(options.clone(), command_line.clone()) {
        Ok(plan) => plan,
        // Nobody asked this program beforehand whether it could take over: ending now would lose
        // every lock of the host.
        Err(failed) if takeover::is_awaited(&Paths::of_this_process()) => {
            takeover::go_on_regardless(&failed);
            Plan::of_successor(options, command_line, Config::default())
        }
        Err(failed) => return Err(failed),
    };
    if let Some(predecessor) = takeover::find_document(&plan)? {
        // What was activated for a process before an exec is part of its state.
        drop(activation);
        return go_on::resume_started(predecessor, plan);
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
