//! From a plan to a daemon that serves: its pid file, its sockets, its reactor, and the run to its end.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::cold_start;
use super::guardian::{self, End, Guarded};
use super::kept;
use super::plan::{self, Plan};
use crate::custody::servers::{Listening, Service};
use crate::custody::settings::Settings;
use crate::exit::{ExitCode, Failed, StartError, refused};
use crate::host::daemonize::StatusPipe;
use crate::host::errno;
use crate::host::listen::{self, Given, Listener, Listeners};
use crate::host::notify;
use crate::host::pid_file::PidFile;
use crate::host::refusal::Refusal;
use crate::log;
use crate::server::reactor::{Ended, Reactor, Way};
use crate::server::upgrade::Upgrade;

/// The daemon itself: takes its pid file and sockets, says that it is there, and runs.
///
/// # Errors
/// Why there is no daemon; a waiting parent knows it.
pub fn serve(
    plan: Plan,
    given: Given,
    status: Option<StatusPipe>,
    desk: Guarded,
) -> Result<End, Failed> {
    let pid_file = match plan.take_pid_file() {
        Ok(pid_file) => pid_file,
        Err(error) => return Err(tell_parent(status, error)),
    };
    let reactor = match open_for_clients(plan, given, pid_file.as_ref(), desk) {
        Ok(reactor) => reactor,
        Err(error) => {
            remove(pid_file);
            return Err(tell_parent(status, error));
        }
    };
    if let Some(status) = status {
        status.report(ExitCode::Success.number());
    }
    run(reactor, pid_file, desk)
}

/// The reactor with its sockets, ready to run. What a daemon that stopped or was killed has left is taken before
/// anybody can connect.
///
/// If this fails the reactor is not dropped, which would let go of locks that whoever comes next has, too.
fn open_for_clients(
    plan: Plan,
    given: Given,
    pid_file: Option<&PidFile>,
    desk: Guarded,
) -> Result<ManuallyDrop<Reactor>, StartError> {
    let descriptors = plan::raise_limit();
    let limits = plan::client_limits(&plan.config, descriptors);
    let paths = plan.paths.clone();
    let Given {
        activation, stored, ..
    } = given;
    let kept = kept::find(stored, &paths.run_directory)?;
    let mut reactor = ManuallyDrop::new(reactor(plan, descriptors, pid_file, desk)?);
    reactor.configure(limits);
    let network = |error| StartError::new(ExitCode::Network, error);
    if let Some(kept) = kept {
        let (before, left) = kept.go_on(&mut reactor, limits)?;
        let opened = Listeners::open_again(activation, &paths, before);
        let (listeners, old) = opened.map_err(network)?;
        listen_at(&mut reactor, listeners)?;
        left.settle(&mut reactor, old, &paths.run_directory, desk);
        return Ok(reactor);
    }
    let left = cold_start::take_again(&mut reactor, &paths.run_directory, limits)?;
    let listeners = Listeners::open(activation, &paths).map_err(network)?;
    left.settle(&mut reactor);
    let sockets = listeners.paths();
    match listen_at(&mut reactor, listeners) {
        Ok(()) => Ok(reactor),
        Err(error) => {
            // They are closed then, so there are descriptors to ask whether anybody else listens.
            drop(ManuallyDrop::into_inner(reactor));
            sockets.iter().for_each(|path| listen::remove_socket(path));
            Err(error)
        }
    }
}

fn listen_at(reactor: &mut Reactor, listeners: Listeners) -> Result<(), StartError> {
    say_what_is_refused(reactor);
    // Nothing is lost yet: what is only lacking now is better had than done without for ever.
    let mut refusals = reactor.refusals().into_iter().filter_map(|(_, it)| it);
    if let Some(lack) = refusals.find(|refusal| errno::may_pass(refusal.reason)) {
        return Err(refused(lack));
    }
    let lock = listeners.lock.into_iter().map(|one| (one, Service::Lock));
    let admin = listeners.admin.into_iter().map(|one| (one, Service::Admin));
    for (listener, service) in lock.chain(admin) {
        reactor
            .listen(listening(listener, service))
            .map_err(refused)?;
    }
    Ok(())
}

/// A reactor without sockets that knows all about its process.
pub fn reactor(
    plan: Plan,
    descriptors: u64,
    pid_file: Option<&PidFile>,
    desk: Guarded,
) -> Result<Reactor, StartError> {
    let idle_timeout_s = plan.options.timeout_seconds;
    let command_line = plan.command_line.clone();
    let document = plan.paths.restart_state.clone();
    let config_file = plan.options.config_file.as_ref();
    let config_file = config_file.map(|path| path.as_os_str().as_bytes().to_vec());
    let reload = Box::new(move || plan.reload(descriptors));
    let mut reactor = Reactor::new(reload, desk.ok()).map_err(refused)?;
    if let Err(refusal) = desk {
        say_that_it_dies_alone(refusal);
    }
    if let Ok(desk) = desk {
        desk.set_pid_file(pid_file.map(|file| file.as_fd().as_raw_fd()));
    }
    let custody = reactor.custody_mut();
    custody.set_own_file(pid_file.and_then(PidFile::identity));
    custody.set_process(Settings {
        pid_file: pid_file.map(|file| {
            let path = file.path().as_os_str().as_bytes().to_vec();
            (file.as_fd().as_raw_fd(), path)
        }),
        config_file,
        program: command_line.program.as_bytes().to_vec(),
        idle_timeout_s,
        logging: log::saved(),
    });
    reactor.set_upgrade(Upgrade::of(command_line, document, desk.ok()));
    Ok(reactor)
}

/// Says that the daemon is there, and runs it to its end, or to that of this process. What is open stays open
/// then, unless the daemon is over: it is the guardian's as well.
pub fn run(
    mut reactor: ManuallyDrop<Reactor>,
    pid_file: Option<PidFile>,
    desk: Guarded,
) -> Result<End, Failed> {
    let pid_file = ManuallyDrop::new(pid_file);
    match desk {
        Ok(desk) => {
            desk.set_ledger(reactor.custody().ledger().ok().map(AsRawFd::as_raw_fd));
            desk.serves();
            guardian::begin_to_serve(desk);
        }
        Err(_) => notify::ready(),
    }
    let ran = reactor.run();
    match (&ran, desk) {
        // Should this process die before it has ended, the next one finds everything open and ends.
        (Ok(Ended::Stopped | Ended::Kept), Ok(_)) => {
            if let Some(pid_file) = &*pid_file {
                pid_file.remove();
            }
        }
        (Ok(Ended::Stopped) | Err(_), Err(_)) => {
            remove(ManuallyDrop::into_inner(pid_file));
            drop(ManuallyDrop::into_inner(reactor));
        }
        _ => (),
    }
    match ran {
        Ok(Ended::Stopped) => Ok(End::Over(ExitCode::Success)),
        Ok(Ended::Kept) => Ok(End::Kept),
        Ok(Ended::Ordered) => Ok(End::Ordered),
        Ok(Ended::Orphaned) => Ok(End::Orphaned),
        // As if it was killed: nothing is closed or removed.
        Ok(Ended::Left) => Ok(End::Left),
        Err(error) => {
            let message = format!("The reactor cannot go on: {error}");
            Err(StartError::new(ExitCode::Failure, message).into())
        }
    }
}

/// Says what the host refuses, and what that costs.
pub fn say_what_is_refused(reactor: &Reactor) {
    for (way, refusal) in reactor.refusals() {
        let Some(refusal) = refusal else {
            continue;
        };
        match way {
            Way::Ledger => tracing::error!(
                "{refusal}. The daemon serves without a ledger that could be passed on: SIGUSR1 is \
                 refused, unless it is for libvirt's own daemon, as long as the host refuses this"
            ),
            Way::Signals => tracing::warn!("{refusal}. The kernel is asked for them now and then"),
            Way::Timer => tracing::warn!("{refusal}. Deadlines are kept without one"),
        }
    }
}

fn say_that_it_dies_alone(refusal: Refusal) {
    tracing::error!(
        "{refusal}. The daemon serves without a guardian: should it be killed or crash, all its locks are \
         free while the guests run on"
    );
}

/// Tells a waiting parent why there is no daemon, and hands the error on for the log.
fn tell_parent(status: Option<StatusPipe>, error: StartError) -> Failed {
    if let Some(status) = status {
        status.report(error.exit.number());
    }
    Failed::Error(error)
}

fn remove(pid_file: Option<PidFile>) {
    if let Some(pid_file) = pid_file {
        pid_file.remove();
    }
}

fn listening(listener: Listener, server: Service) -> Listening<OwnedFd> {
    let path = listener.path;
    Listening {
        server,
        socket: listener.socket,
        path: path.map(|path| path.into_os_string().into_vec()),
    }
}
