//! Going on where an earlier image of this process stopped. The process and its pid are the same, its
//! locks and connections are open; nothing may fail here that could have been found out before.

use std::ffi::OsString;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::guardian::{End, Guarded};
use super::plan::{self, Plan};
use super::sweep::{self, Swept};
use super::way_back::WayBack;
use super::{cold_start, kept, posix_locks, serve, standard, takeover, understudy};
use crate::cli::Options;
use crate::custody::descriptor::{Number, Saved};
use crate::custody::event::Event;
use crate::custody::ledger::{self, Ledger, OldFile, Read, Unreadable};
use crate::custody::servers::{Server, Service};
use crate::custody::settings::{LogSettings, Settings as ProcessSettings};
use crate::custody::since::Since;
use crate::custody::state::State;
use crate::desk::control::{Death, Failure, Order};
use crate::desk::{Desk, turn};
use crate::exit::{Failed, StartError, refused, unusable};
use crate::host::descriptors::{self, Inherited};
use crate::host::paths::Paths;
use crate::host::patience::patiently;
use crate::host::pid_file::{self, PidFile};
use crate::host::{errno, listen, process};
use crate::log::{self, Level, Printable, SettingError, Settings};
use crate::restart::handover::CommandLine;
use crate::server::reactor::{GoesOn, Limits, Reactor};
use crate::server::upgrade;

/// Goes on for a predecessor of this program, or for a reactor that died, from the ledger with this number.
/// Options and configuration were looked at before; should the configuration have become unusable since,
/// the settings in force stay.
///
/// With a guardian this process ends where it cannot go on, and nothing is closed: the next one tries again.
///
/// # Errors
/// Why everything is lost.
pub fn resume(
    number: RawFd,
    mut options: Options,
    mut command_line: CommandLine,
    desk: Guarded,
) -> Result<End, Failed> {
    // Before the ledger gets its name, which that of the daemon before has as long as this is full.
    let was_kept = desk.is_ok_and(kept::empty);
    let give_up = |error| end_without_loss(error, desk);
    standard::keep_clear(desk);
    let not_open = |_| (IsBroken::Yes, unusable("its descriptor is not open"));
    let descriptor = descriptors::adopt(number).map_err(not_open);
    let taken_over = descriptor.and_then(|descriptor| {
        let mark = desk
            .ok()
            .and_then(|desk| turn::ledger_before(desk.memory()));
        Ledger::take_over_since(descriptor, mark).map_err(|reason| {
            let is_broken = match reason {
                // Perhaps only for want of memory.
                Unreadable::System(_) => IsBroken::No,
                _ => IsBroken::Yes,
            };
            (is_broken, unusable(&reason.to_string()))
        })
    });
    if let Ok((state, _, _)) = &taken_over {
        standard::keep_clear_of(state, desk);
    }
    let (mut state, ledger, since) = match taken_over {
        Ok(theirs) => theirs,
        Err((is_broken, error)) => {
            log::install(Settings::initial())?;
            return match is_broken {
                IsBroken::Yes => cannot_read(error, desk),
                IsBroken::No => Err(give_up(error).into()),
            };
        }
    };
    let open = descriptors::open_numbers();
    let mut before = desk
        .ok()
        .and_then(|desk| look_back(desk, &mut state, number, &open, &since));
    log::install(Settings::initial())?;
    let log_restored = restore_log(&state.settings().logging);
    // As it was found at the first start: the working directory may have changed since.
    if let Some(path) = &state.settings().config_file {
        options.config_file = Some(PathBuf::from(OsString::from_vec(path.clone())));
    }
    if !state.settings().program.is_empty() {
        command_line.program = OsString::from_vec(state.settings().program.clone());
    }
    posix_locks::lock_again(&state);
    if let Some(Before {
        failed: Some((_, Failure::Ended | Failure::Late)),
        ..
    }) = &before
    {
        // The last of the dead may not be over yet, and has the ledger's name.
        let run_directory = Paths::of_this_process().run_directory;
        let _ = patiently(|| ledger::find_orphan(&run_directory).map(drop));
    }
    let mut inherited = inherit(&state, &open).map_err(give_up)?;
    let pid_file = match &state.settings().pid_file {
        None => None,
        Some((descriptor, path)) => {
            let path = PathBuf::from(OsString::from_vec(path.clone()));
            let descriptor = inherited
                .take(*descriptor)
                .map_err(|_| unusable("the descriptor of its pid file is not open"))
                .map_err(give_up)?;
            let file = PidFile::inherited(descriptor, path);
            let has_failed = before
                .as_ref()
                .is_some_and(|before| before.failed.is_some());
            let file = if has_failed { file.put_back() } else { file };
            keep_pid_file(&file);
            Some(file)
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
    let document = plan.paths.restart_state.clone();
    let (reactor, limits) = open_reactor(plan, pid_file.as_ref(), desk).map_err(give_up)?;
    let mut reactor = ManuallyDrop::new(reactor);
    let limits = limits_are_known.then_some(limits);
    let idle_timeout_s = state.settings().idle_timeout_s;
    let is_first = matches!(ledger, Read::Old(_));
    let has_failed = before.as_ref().is_some_and(|it| it.failed.is_some());
    let mut nothing = Vec::new();
    let theirs = Theirs {
        state,
        ledger: Some(ledger),
        since,
        idle_timeout_s: Some(idle_timeout_s),
        poll: before.as_ref().and_then(|before| before.poll),
        left: match &mut before {
            Some(before) => &mut before.swept.left,
            None => &mut nothing,
        },
    };
    set_up(&mut reactor, theirs, &mut inherited, limits).map_err(give_up)?;
    match &before {
        None => reactor.custody_mut().was_upgraded(),
        Some(Before {
            death: Some((death, _)),
            ..
        }) => reactor.custody_mut().was_recovered(&death_text(*death)),
        Some(_) => (),
    }
    if let (Some(before), Ok(desk)) = (before, desk) {
        before.say(desk, &document);
        desk.set_ending(None);
        for (socket, service) in before.swept.accepted {
            reactor.take_in(socket, service);
        }
    }
    // Only now the ledger of a successor that failed is nobody's.
    keep_in_run_directory(&mut reactor, is_first, has_failed || was_kept);
    if let Ok(desk) = desk {
        kept::forget(desk);
        // All that it asks for is done.
        desk.forget_failed_order();
    }
    serve::run(reactor, pid_file, desk)
}

/// Whether a ledger that could not be read never can.
enum IsBroken {
    Yes,
    No,
}

/// Whoever died may have closed another descriptor of the pid file, and with that its lock was gone.
fn keep_pid_file(pid_file: &PidFile) {
    if let Err(reason) = pid_file::lock_again(pid_file.as_fd().as_raw_fd()) {
        tracing::error!(
            "The lock of the pid file '{}' cannot be taken again: {}. If another process has it, stop that \
             one: a second daemon must not run",
            pid_file.path().display(),
            errno::text(reason)
        );
    }
}

/// Ends this process, if there is a guardian: whoever comes next finds everything open.
fn end_without_loss(error: StartError, desk: Guarded) -> StartError {
    if desk.is_ok() {
        tracing::error!("{error}");
        End::Over(error.exit).leave();
    }
    error
}

fn cannot_read(error: StartError, desk: Guarded) -> Result<End, Failed> {
    if desk.is_err() {
        return Err(error.into());
    }
    tracing::error!(
        "The daemon cannot go on, because its own record of what is held cannot be used: {}. All locks stay, \
         nobody is served, and it is tried again now and then. SIGTERM is put off until then: stop the guests, \
         then end the daemon with SIGKILL",
        error.message
    );
    Ok(End::Unreadable)
}

/// What happened before this reactor was.
struct Before {
    death: Option<(Death, u64)>,
    failed: Option<(Order, Failure)>,
    swept: Swept,
    /// In which the reactor that died watched what it served.
    poll: Option<RawFd>,
}

/// If there was another reactor before, what became of it, and of what it left open.
fn look_back(
    desk: &Desk,
    state: &mut State<Saved>,
    ledger: RawFd,
    open: &[RawFd],
    since: &Since,
) -> Option<Before> {
    let (death, failed) = (desk.take_death(), desk.failed_order());
    if death.is_none() && failed.is_none() {
        sweep::respect_strangers(state, ledger, open, desk);
        return None;
    }
    // Whatever became of a successor, it may have another idea of what is in it.
    let poll = desk
        .poll()
        .filter(|number| failed.is_none() && descriptors::is_poll(*number));
    let known: Vec<RawFd> = since.descriptors().chain(poll).collect();
    if let Some((_, Failure::Ended | Failure::Late)) = failed {
        // The successor has taken out of it what it closed.
        state.forget_poll();
    }
    if failed.is_some() {
        // They were to stay open over the exec.
        for Number(number) in state.descriptors().chain([Number(ledger)]) {
            let _ = descriptors::keep_on_exec(number, false);
        }
    }
    Some(Before {
        death,
        failed,
        swept: sweep::sweep(state, ledger, (open, &known), desk),
        poll,
    })
}

impl Before {
    /// Tells it.
    fn say(&self, desk: &Desk, document: &Path) {
        if let Some(death) = self.death {
            say_death(death);
        }
        // To read the configuration once more is of no use to anybody whom it kills.
        let _ = desk.ask_again(Signal::SIGHUP);
        if !desk.ask_again(Signal::SIGUSR1) {
            upgrade::say_given_up();
        }
        let is_libvirts = matches!(self.failed, Some((Order::Libvirt, _)));
        if is_libvirts || takeover::is_awaited(&Paths::of_this_process()) {
            // Nobody goes on from it any more. Another daemon would take it for its own, or not start.
            let _ = std::fs::remove_file(document);
        }
        for number in &self.swept.kept {
            tracing::warn!(
                "Descriptor {number} was left open and stays so: a lock of the same file would go with it"
            );
        }
        if let Some((_, failure)) = self.failed {
            desk.does_without_understudy(false);
            match failure {
                Failure::NoUnderstudy(reason) if !understudy::may_be_had_later(reason) => {
                    upgrade::say_that_nobody_stands_by(reason, desk.ordered_path());
                    desk.does_without_understudy(true);
                    desk.ask(Signal::SIGUSR1);
                }
                _ => upgrade::say_what_failed(failure, desk.ordered_path()),
            }
        }
    }
}

/// How a process of the daemon died.
fn death_text(death: Death) -> String {
    match death {
        Death::Signal(signal) => match Signal::try_from(signal) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        Death::Status(status) => format!("ended with status {status}"),
        Death::Away => "did not come back from what it was doing and was killed".into(),
        Death::Unreadable => "could not read the ledger".into(),
        Death::Guardian => "lost its main process".into(),
    }
}

/// Says how a process of the daemon died.
pub fn say_death((death, in_a_row): (Death, u64)) {
    if matches!(death, Death::Guardian) {
        tracing::error!(
            "The daemon's main process died. Process {} is in its place; all locks and connections stay",
            process::started()
        );
        return;
    }
    let how = death_text(death);
    tracing::error!(
        "The process that serves the clients {how} ({in_a_row} in a row). Another one goes on; all locks and \
         connections stay"
    );
}

/// If a reactor died before it had taken over from the C daemon: closes what it left open that would be in the
/// way of the next one. How it died.
pub fn clear_up(desk: &Desk, state: &State<Saved>) -> Option<(Death, u64)> {
    let death = desk.take_death()?;
    let run_directory = Paths::of_this_process().run_directory;
    let open = descriptors::open_numbers();
    for left in sweep::sweep(state, NO_LEDGER, (&open, &[]), desk).left {
        // With any other file a POSIX lock might go: nobody has said yet which files are locked.
        if !ledger::is_in(&run_directory, &left) {
            std::mem::forget(left);
        }
    }
    Some(death)
}

/// Not the number of a descriptor.
const NO_LEDGER: RawFd = -1;

/// Goes on for the C daemon, from its state and the document in which it was. What its own program would
/// not end for does not end this one; what cannot be helped leads back to it.
///
/// # Errors
/// Why everything is lost.
pub fn resume_started(
    (state, document): (State<Saved>, PathBuf),
    plan: Plan,
    way_back: &WayBack,
    desk: Guarded,
) -> Result<End, Failed> {
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
    let (reactor, limits) = open_reactor(plan, pid_file.as_ref(), desk).map_err(back)?;
    let mut reactor = ManuallyDrop::new(reactor);
    let mut inherited = inherit(&state, &descriptors::open_numbers()).map_err(back)?;
    // What it has taken by then stays open in the reactor until libvirt's program has it.
    let theirs = Theirs {
        state,
        ledger: None,
        since: Since::default(),
        idle_timeout_s: None,
        poll: None,
        left: &mut Vec::new(),
    };
    set_up(&mut reactor, theirs, &mut inherited, Some(limits)).map_err(back)?;
    keep_in_run_directory(&mut reactor, true, false);
    // Everything is in our hands and in our ledger: now the only copy may go.
    if let Ok(desk) = desk {
        desk.set_ledger(reactor.custody().ledger().ok().map(AsRawFd::as_raw_fd));
        desk.serves();
    }
    reactor.custody_mut().was_upgraded();
    if let Err(error) = std::fs::remove_file(&document) {
        tracing::error!(
            "The state document '{}' was taken over and cannot be removed: {error}. Remove it before \
             a daemon is started again",
            document.display()
        );
    }
    serve::run(reactor, pid_file, desk)
}

/// The descriptors that the state speaks of, of all that are open.
fn inherit(state: &State<Saved>, open: &[RawFd]) -> Result<Inherited, StartError> {
    state.check_descriptors().map_err(|why| unusable(&why))?;
    let numbers: Vec<i32> = state.descriptors().map(|number| number.0).collect();
    Inherited::of(&numbers, open).map_err(|number| {
        let kind = state.meaning(Number(number));
        unusable(&format!(
            "descriptor {number}, which should be {kind}, is not open"
        ))
    })
}

/// A reactor without sockets, and the limits that the configuration gives.
fn open_reactor(
    plan: Plan,
    pid_file: Option<&PidFile>,
    desk: Guarded,
) -> Result<(Reactor, Limits), StartError> {
    let descriptors = plan::raise_limit();
    let limits = plan::client_limits(&plan.config, descriptors);
    let reactor = serve::reactor(plan, descriptors, pid_file, desk)?;
    Ok((reactor, limits))
}

/// What is gone on from.
struct Theirs<'a> {
    state: State<Saved>,
    ledger: Option<Read>,
    since: Since,
    /// libvirt's document does not say it: the option does.
    idle_timeout_s: Option<u32>,
    poll: Option<RawFd>,
    left: &'a mut Vec<OwnedFd>,
}

/// The reactor as it was. Without a ledger of the predecessor's, or with one of an earlier format, one
/// is written; without limits those in force stay. Whatever has been taken when this fails is the
/// reactor's, and open.
fn set_up(
    reactor: &mut Reactor,
    theirs: Theirs<'_>,
    inherited: &mut Inherited,
    limits: Option<Limits>,
) -> Result<(), StartError> {
    let Theirs {
        state,
        ledger,
        since,
        idle_timeout_s,
        poll,
        left,
    } = theirs;
    let settings = reactor.custody().state().settings().clone();
    let state = state.adopt(inherited).map_err(|why| unusable(&why))?;
    for listening in state.listeners() {
        // libvirt's backlog is 30: a host that boots its guests fills it at once.
        let _ = listen::widen_backlog(&listening.socket);
    }
    let idle_timeout_s = idle_timeout_s.unwrap_or(settings.idle_timeout_s);
    let run_directory = Paths::of_this_process().run_directory;
    let from = GoesOn {
        state,
        ledger,
        since,
        poll,
        left,
        run_directory: Some(&run_directory),
    };
    reactor.go_on(from).map_err(refused)?;
    reactor.custody_mut().set_process(ProcessSettings {
        idle_timeout_s,
        ..settings
    });
    serve::say_what_is_refused(reactor);
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

/// The ledger is in the run directory from now on, if it can be. An earlier program, and libvirt's, know nothing of
/// what lies there; and what a successor has left that did not serve was this daemon's, as is what one has left
/// from which this one goes on.
fn keep_in_run_directory(reactor: &mut Reactor, is_first: bool, is_own: bool) {
    let old = match is_first || is_own {
        true => OldFile::IsReplaced,
        false => OldFile::IsKept,
    };
    let run_directory = Paths::of_this_process().run_directory;
    let kept = reactor.custody_mut().keep_in(&run_directory, old);
    // Otherwise it was said before.
    if is_first {
        kept.unwrap_or_else(cold_start::say_that_it_has_no_name);
    }
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
