//! The order of a start. Each step is a function that says what it needs and how it can fail.

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use super::guardian::{self, Again, End, First, Guarded, Guardian};
use super::plan::Plan;
use super::store::{self, Store};
use super::way_back::WayBack;
use super::{go_on, serve, standard, sweep, takeover, understudy};
use crate::cli::{Options, Outcome};
use crate::config::Config;
use crate::custody::descriptor::Saved;
use crate::custody::ledger::Ledger;
use crate::custody::state::State;
use crate::desk::control::Death;
use crate::desk::{self, Desk};
use crate::exit::{ExitCode, Failed, StartError, status_text, unusable};
use crate::host::daemonize::{self, Background, Started};
use crate::host::errno::{self, Errno};
use crate::host::listen::Given;
use crate::host::paths::Paths;
use crate::host::patience::while_it_may_pass;
use crate::host::program::Program;
use crate::host::refusal::Refusal;
use crate::host::{clone, descriptors, limits, notify};
use crate::log;
use crate::restart::bag;
use crate::restart::handover::CommandLine;

/// From the options to the end of the daemon, or to the end of the process that started it.
///
/// # Errors
/// Why there is no daemon any more, or never was.
pub fn start(outcome: Outcome, program: &OsStr) -> Result<ExitCode, Failed> {
    let given = match &outcome {
        // First of all, because it takes descriptors that nobody else may have opened. A daemon in
        // the background has another pid than the one that the descriptors are for.
        Outcome::Run(options) if !options.daemon => Given::take(),
        _ => Given::nothing(),
    };
    let command_line = CommandLine::of_this_process();
    // Before a word is written: standard error may be somebody's.
    if let Some(ledger) = takeover::handed_over() {
        return Ok(guarded(
            wanted(outcome),
            command_line,
            Before::Ours(ledger?),
            None,
        ));
    }
    // Only these are somebody else's; a number that is given to what is opened here has another meaning one day.
    let mut open = descriptors::open_numbers();
    open.retain(|number| !given.has_stored(*number));
    if takeover::is_awaited(&Paths::of_this_process()) {
        // What was activated for a process before an exec is part of its state.
        std::mem::forget(given);
        let (theirs, words) = (wanted(outcome), command_line.clone());
        let options = theirs.clone();
        let first: First =
            Box::new(move |desk| finish(go_on_from_document(theirs, words, &open, desk)));
        return Ok(guarded(
            options,
            command_line,
            Before::Libvirts(Store::of_this_process()),
            Some(first),
        ));
    }
    log::install(log::Settings::initial())?;
    if notify::has_lasting_store() && !(given.is_whole && notify::is_started_by_manager()) {
        notify::leave_store_alone();
        tracing::error!(
            "The service manager keeps things for this service that are not given to this process, as it did not \
             start it itself, in the foreground. A stop will fence every owner of a lock: have the unit start \
             virtlockd without --daemon and without another program in front of it"
        );
    }
    start_afresh(wanted(outcome)?, command_line, (given, open), program)
}

/// Who was here before.
enum Before {
    /// Nobody: what was open then, and what there is in the service manager's store.
    Nobody(Vec<RawFd>, Store),
    Libvirts(Store),
    /// This program, and the ledger that it left.
    Ours(RawFd),
}

/// The daemon, in a process that the guardian makes, or in this one where there can be no guardian. Comes
/// back only from the latter.
fn guarded(
    options: Result<Options, StartError>,
    command_line: CommandLine,
    before: Before,
    first: Option<First>,
) -> ExitCode {
    let understudy = takeover::understudy();
    let prepared = prepare(&command_line);
    let is_fresh = matches!(before, Before::Nobody(..));
    let (ledger, open, store) = match before {
        Before::Ours(number) => (Some(number), Vec::new(), Store::of_this_process()),
        Before::Nobody(open, store) => (None, open, store),
        Before::Libvirts(store) => (None, Vec::new(), store),
    };
    let again: Again = Box::new(move |desk: Guarded| {
        let number = match desk {
            // Of what this process was given there may be nothing left, or something else of the same number.
            Ok(desk) => desk.ledger(),
            Err(_) => ledger,
        };
        finish(go_on_from_ledger(
            number,
            options.clone(),
            command_line.clone(),
            desk,
        ))
    });
    let end = match prepared {
        Err(refusal) => {
            if let Some(pid) = understudy.filter(|pid| clone::is_child(*pid)) {
                understudy::dismiss(pid);
            }
            guardian::alone(refusal, first, &again)
        }
        Ok((desk, program)) => {
            // Those of activation among them: they stay open as long as the daemon listens.
            open.into_iter()
                .for_each(|number| desk.set_stranger(number));
            desk.set_ledger(ledger);
            let from_before = (understudy, store);
            Guardian::new(desk, program, is_fresh, again, from_before).guard(first)
        }
    };
    match end {
        End::Over(exit) => exit,
        // What only a guardian's reactor comes to.
        End::Kept | End::Left | End::Ordered | End::Unreadable | End::Orphaned => ExitCode::Failure,
    }
}

/// The limit of open files where the host does not tell it: room on the desk costs nothing until it is used.
const SUPPOSED_LIMIT: u64 = 1 << 16;

/// What a guardian needs, unless the host refuses some of it for ever.
fn prepare(command_line: &CommandLine) -> Result<(&'static Desk, Program), Refusal> {
    // Without one nobody could go on from where a reactor dies.
    let run_directory = Paths::of_this_process().run_directory;
    match while_it_may_pass(|| Ledger::try_out(&run_directory)) {
        Err(refusal) if !errno::may_pass(refusal.reason) => return Err(refusal),
        _ => (),
    }
    while_it_may_pass(|| {
        clone::try_out_signals().map_err(Refusal::of("the processes cannot wake each other (kill)"))
    })?;
    // A reactor has the limits of its guardian, and says it if this one cannot be raised.
    let descriptors = limits::raise_open_files().unwrap_or(SUPPOSED_LIMIT);
    let desk = while_it_may_pass(|| Desk::new(desk::size(descriptors)))?;
    let program = command_line.prepared().map_err(|_| Refusal {
        what: "the command line cannot be passed on (execve)",
        reason: Errno::EINVAL,
    })?;
    Ok((desk.for_ever(), program))
}

/// What a reactor does that is not the first.
fn go_on_from_ledger(
    ledger: Option<RawFd>,
    options: Result<Options, StartError>,
    command_line: CommandLine,
    desk: Guarded,
) -> Result<End, Failed> {
    let Some(number) = ledger else {
        return Ok(End::Unreadable);
    };
    go_on::resume(number, options?, command_line, desk)
}

/// What the first reactor does for libvirt's daemon.
fn go_on_from_document(
    options: Result<Options, StartError>,
    command_line: CommandLine,
    open: &[RawFd],
    desk: Guarded,
) -> Result<End, Failed> {
    let respect = |state: &State<Saved>| {
        if let Ok(desk) = desk {
            sweep::respect(open, state, desk);
        }
    };
    let mut way_back = WayBack {
        command_line,
        moved: Vec::new(),
        desk: desk.ok(),
    };
    if let Some(mut state) = takeover::awaited(&Paths::of_this_process()) {
        respect(&state);
        way_back.moved = standard::clear(&mut state, desk);
        let died = desk.ok().and_then(|desk| go_on::clear_up(desk, &state));
        return take_over((state, died), way_back, options, desk);
    }
    log::install(log::Settings::initial())?;
    let plan = Plan::prepare(options?, way_back.command_line.clone())?;
    match takeover::find_document(&plan, &way_back)? {
        Some(state) => {
            respect(&state);
            let document = plan.paths.restart_state.clone();
            go_on::resume_started((state, document), plan, &way_back, desk)
        }
        None => Err(unusable("its document is gone").into()),
    }
}

/// Says why something ended, if it did not end well.
fn finish(ended: Result<End, Failed>) -> End {
    ended.unwrap_or_else(|failed| End::Over(say(&failed)))
}

/// The last words of a process that fails; its exit code.
pub fn say(failed: &Failed) -> ExitCode {
    match failed {
        Failed::Error(error) => {
            tracing::error!("{error}");
            error.exit
        }
        Failed::Log(error) => {
            log::early_error(error);
            ExitCode::Failure
        }
    }
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
fn take_over(
    (state, died): (State<Saved>, Option<(Death, u64)>),
    way_back: WayBack,
    options: Result<Options, StartError>,
    desk: Guarded,
) -> Result<End, Failed> {
    log::install(log::Settings::initial())?;
    if let Some(died) = died {
        go_on::say_death(died);
    }
    let options = options.map_err(|error| way_back.go(error))?;
    let command_line = way_back.command_line.clone();
    let plan = Plan::prepare(options.clone(), command_line.clone()).unwrap_or_else(|failed| {
        takeover::go_on_regardless(&failed);
        Plan::of_successor(options, command_line, Config::default())
    });
    let document = plan.paths.restart_state.clone();
    go_on::resume_started((state, document), plan, &way_back, desk)
}

fn start_afresh(
    options: Options,
    command_line: CommandLine,
    (given, open): (Given, Vec<RawFd>),
    program: &OsStr,
) -> Result<ExitCode, Failed> {
    let words = command_line.clone();
    let plan = Plan::prepare(options.clone(), command_line.clone())?;
    let way_back = WayBack {
        command_line: command_line.clone(),
        moved: Vec::new(),
        desk: None,
    };
    let stored = given.stored.iter();
    let stored = stored.map(|(name, bag)| (name.clone(), bag::is_full(bag)));
    let stored: store::Given = stored.collect();
    if takeover::find_document(&plan, &way_back)?.is_some() {
        std::mem::forget(given);
        let store = match stored.iter().any(|(_, is_full)| *is_full) {
            true => Store::of_another(),
            false => Store::of(stored),
        };
        let theirs = Ok(options.clone());
        let first: First =
            Box::new(move |desk| finish(go_on_from_document(theirs, words, &open, desk)));
        let options = Ok(options);
        return Ok(guarded(
            options,
            command_line,
            Before::Libvirts(store),
            Some(first),
        ));
    }
    let mut waiting = None;
    if plan.options.daemon {
        match go_to_background()? {
            Background::Daemon(status) => waiting = Some(status),
            Background::Parent(started) => return Ok(say_how_it_went(program, &started)),
        }
    }
    let serve = move |desk| finish(serve::serve(plan, given, waiting, desk));
    let first: First = Box::new(serve);
    Ok(guarded(
        Ok(options),
        command_line,
        Before::Nobody(open, Store::of(stored)),
        Some(first),
    ))
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
