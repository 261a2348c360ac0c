//! The order of a start. Each step is a function that says what it needs and how it can fail.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use virtlockd::cli::{Options, Outcome};
use virtlockd::config::{self, Config};
use virtlockd::exit::{ExitCode, StartError, status_text};
use virtlockd::host::daemonize::{self, Background, Started, StatusPipe};
use virtlockd::host::listen::{self, Activation, Listener, Listeners};
use virtlockd::host::paths::{self, Paths};
use virtlockd::host::pid_file::PidFile;
use virtlockd::host::{errno, limits, notify};
use virtlockd::log::{self, SettingError};
use virtlockd::restart::handover::CommandLine;
use virtlockd::server::accept;
use virtlockd::server::clients::ClientLimit;
use virtlockd::server::connection::Service;
use virtlockd::server::reactor::{Limits, Reactor};

use crate::Failed;
use crate::takeover;

/// Admin clients that may be connected at a time, unless the configuration says otherwise.
const ADMIN_CLIENTS: u32 = 5000;
/// Lock clients that may always be connected, even on a host with few descriptors: libvirt's
/// default for all hosts.
const LOCK_CLIENTS_LEAST: u32 = 1024;

/// From the options to the end of the daemon, or to the end of the process that started it.
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
        return takeover::resume(predecessor?, options, command_line);
    }
    let start = match Start::prepare(options.clone(), command_line.clone()) {
        Ok(start) => start,
        // Nobody asked this program beforehand whether it could take over: ending now would lose
        // every lock of the host.
        Err(failed) if takeover::is_awaited(&Paths::of_this_process()) => {
            takeover::go_on_regardless(&failed);
            Start::of_successor(options, command_line, Config::default())
        }
        Err(failed) => return Err(failed),
    };
    if let Some(predecessor) = takeover::find_document(&start)? {
        // What was activated for a process before an exec is part of its state.
        drop(activation);
        return takeover::resume_started(predecessor, start);
    }
    if !start.options.daemon {
        return start.serve(activation, None);
    }
    match go_to_background()? {
        Background::Daemon(status) => start.serve(activation, Some(status)),
        Background::Parent(started) => Ok(say_how_it_went(program, &started)),
    }
}

/// What is known before there is a daemon.
pub struct Start {
    /// The options.
    pub options: Options,
    /// The configuration.
    pub config: Config,
    /// The default paths.
    pub paths: Paths,
    /// How the program was called.
    pub command_line: CommandLine,
}

impl Start {
    /// For a daemon that goes on: what fails here is told and does not stop it.
    pub fn of_successor(options: Options, command_line: CommandLine, config: Config) -> Self {
        let paths = Paths::of_this_process();
        Self {
            options,
            config,
            paths,
            command_line,
        }
    }

    /// Everything that fails in front of the caller's eyes, even with `-d`: configuration, log,
    /// run directory.
    fn prepare(options: Options, command_line: CommandLine) -> Result<Self, Failed> {
        let paths = Paths::of_this_process();
        let config = load_configuration(&options, &paths)?;
        let options = with_absolute_paths(options, &command_line.directory);
        let start = Self {
            options,
            config,
            paths,
            command_line,
        };
        start.apply_log_settings(&start.config)?;
        make_run_directory(&start.paths.run_directory)?;
        Ok(start)
    }

    /// The daemon itself: takes its pid file and sockets, says that it is there, and runs.
    fn serve(self, activation: Activation, status: Option<StatusPipe>) -> Result<ExitCode, Failed> {
        let pid_file = match self.take_pid_file() {
            Ok(pid_file) => pid_file,
            Err(error) => return Err(tell_parent(status, error)),
        };
        let mut reactor = match self.open_for_clients(activation, pid_file.as_ref()) {
            Ok(reactor) => reactor,
            Err(error) => {
                remove(pid_file);
                return Err(tell_parent(status, error));
            }
        };
        if let Some(status) = status {
            status.report(ExitCode::Success.number());
        }
        run(&mut reactor, pid_file)
    }

    /// An empty path on the command line means that no pid file is wanted.
    fn pid_file_path(&self) -> Option<&Path> {
        let path = self.options.pid_file.as_ref();
        let path = path.unwrap_or(&self.paths.pid_file);
        (!path.as_os_str().is_empty()).then_some(path)
    }

    /// Whether another process holds the pid file: a daemon that serves.
    pub fn is_another_running(&self) -> bool {
        self.pid_file_path().is_some_and(PidFile::is_held)
    }

    /// Takes the pid file, if one is wanted.
    pub fn take_pid_file(&self) -> Result<Option<PidFile>, StartError> {
        let Some(path) = self.pid_file_path() else {
            return Ok(None);
        };
        PidFile::acquire(path)
            .map(Some)
            .map_err(|error| StartError::new(ExitCode::Failure, error))
    }

    /// The reactor with its sockets, ready to run.
    fn open_for_clients(
        self,
        activation: Activation,
        pid_file: Option<&PidFile>,
    ) -> Result<Reactor, StartError> {
        let descriptors = raise_limit();
        let listeners = Listeners::open(activation, &self.paths)
            .map_err(|error| StartError::new(ExitCode::Network, error))?;
        let paths = listeners.paths();
        // They are closed by then, so there are descriptors to ask whether anybody else listens.
        self.serving_reactor(listeners, descriptors, pid_file)
            .inspect_err(|_| paths.iter().for_each(|path| listen::remove_socket(path)))
    }

    fn serving_reactor(
        self,
        listeners: Listeners,
        descriptors: u64,
        pid_file: Option<&PidFile>,
    ) -> Result<Reactor, StartError> {
        let limits = client_limits(&self.config, descriptors);
        let mut reactor = self.reactor(descriptors, pid_file)?;
        reactor.configure(limits);
        let lock = listeners.lock.into_iter().map(|one| (one, Service::Lock));
        let admin = listeners.admin.into_iter().map(|one| (one, Service::Admin));
        for (listener, service) in lock.chain(admin) {
            reactor
                .listen(serving(listener, service))
                .map_err(no_event_loop)?;
        }
        reactor.daemon.replace_ledger();
        Ok(reactor)
    }

    /// A reactor without sockets that knows all about its process.
    pub fn reactor(
        self,
        descriptors: u64,
        pid_file: Option<&PidFile>,
    ) -> Result<Reactor, StartError> {
        let idle_timeout_s = self.options.timeout_seconds;
        let command_line = self.command_line.clone();
        let document = self.paths.restart_state.clone();
        let config_file = self.options.config_file.as_ref();
        let config_file = config_file.map(|path| path.as_os_str().as_bytes().to_vec());
        let reload = Box::new(move || self.reload(descriptors));
        let mut reactor = Reactor::new(reload).map_err(no_event_loop)?;
        let daemon = &mut reactor.daemon;
        daemon.idle_timeout_s = idle_timeout_s;
        daemon.process.program = command_line.program.as_bytes().to_vec();
        daemon.process.config_file = config_file;
        daemon.keeper.own_file = pid_file.and_then(PidFile::identity);
        daemon.process.pid_file = pid_file.map(|file| {
            let path = file.path().as_os_str().as_bytes().to_vec();
            (file.as_fd().as_raw_fd(), path)
        });
        daemon.upgrade.command_line = Some(command_line);
        daemon.upgrade.document = document;
        Ok(reactor)
    }

    /// SIGHUP: the configuration as it is now. If it cannot be used, nothing changes.
    fn reload(&self, descriptors: u64) -> Result<Limits, String> {
        let config =
            load_configuration(&self.options, &self.paths).map_err(|error| error.to_string())?;
        self.apply_log_settings(&config)
            .map_err(|error| error.to_string())?;
        Ok(client_limits(&config, descriptors))
    }

    /// Applies the log settings of the configuration, the environment and the options.
    pub fn apply_log_settings(&self, config: &Config) -> Result<(), SettingError> {
        let configured = log::Configured {
            level: config.log_level,
            filters: setting("log_filters", config.log_filters.as_ref())?,
            outputs: setting("log_outputs", config.log_outputs.as_ref())?,
        };
        let environment = log::Environment::read(|name| std::env::var_os(name))?;
        let mode = log::RunMode {
            verbose: self.options.verbose,
            background: self.options.daemon,
            stdin_is_tty: std::io::stdin().is_terminal(),
            journal_writable: log::journal_is_writable(),
            log_file: &self.paths.log_file,
            directory: &self.command_line.directory,
        };
        let settings = log::resolve(configured, &environment, mode)?;
        let to_default_file = settings
            .outputs
            .iter()
            .any(|output| output.target == log::Target::File(self.paths.log_file.clone()));
        if to_default_file && !nix::unistd::geteuid().is_root() {
            // What stands in the way is what opening the file reports.
            let _ = log::make_log_directory(&self.paths.log_file);
        }
        log::install(settings)
    }
}

/// Says that the daemon is there, and runs it to its end.
pub fn run(reactor: &mut Reactor, pid_file: Option<PidFile>) -> Result<ExitCode, Failed> {
    notify::ready();
    let ran = reactor.run();
    remove(pid_file);
    match ran {
        Ok(()) => Ok(ExitCode::Success),
        Err(error) => {
            let message = format!("The reactor cannot go on: {error}");
            Err(StartError::new(ExitCode::Failure, message).into())
        }
    }
}

/// The error of a reactor that cannot be set up.
pub fn no_event_loop(error: std::io::Error) -> StartError {
    let message = format!("Failed to set up the event loop: {error}");
    StartError::new(ExitCode::Initialisation, message)
}

/// Raises the limit of open files as far as it goes. How many there may be.
pub fn raise_limit() -> u64 {
    limits::raise_open_files().unwrap_or_else(|error| {
        tracing::warn!(
            "The limit of open files stays as it is, which may be too low for many machines: {}",
            errno::text(error)
        );
        u64::from(LOCK_CLIENTS_LEAST)
    })
}

/// The configuration file is read again later, when the working directory is another one.
fn with_absolute_paths(mut options: Options, directory: &Path) -> Options {
    options.config_file = options.config_file.map(|path| directory.join(path));
    options
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

/// A log setting of the configuration file as text.
fn setting<'a>(
    name: &'static str,
    value: Option<&'a OsString>,
) -> Result<Option<&'a str>, SettingError> {
    value
        .map(|value| log::setting_text(name, value.as_bytes()))
        .transpose()
}

/// The configuration: the file that the options name, or the default one if it is there.
pub fn load_configuration(options: &Options, paths: &Paths) -> Result<Config, StartError> {
    let (path, explicit): (&Path, bool) = match &options.config_file {
        Some(path) => (path, true),
        None => (&paths.config_file, false),
    };
    config::load(path, explicit).map_err(|error| StartError::new(ExitCode::Failure, error))
}

/// How many clients there may be. One connection a machine: so the default of the lock socket is
/// what the descriptors allow, with one left for a disk of each machine.
pub fn client_limits(config: &Config, descriptors: u64) -> Limits {
    let half = u32::try_from(descriptors.checked_div(2).unwrap_or(0)).unwrap_or(u32::MAX);
    Limits {
        max_clients: ClientLimit {
            configured: config.max_clients,
            default: half.max(LOCK_CLIENTS_LEAST),
            default_unauthenticated: LOCK_CLIENTS_LEAST,
        },
        admin_max_clients: ClientLimit {
            configured: config.admin_max_clients,
            default: ADMIN_CLIENTS,
            default_unauthenticated: ADMIN_CLIENTS,
        },
    }
}

/// An ordinary user's run directory comes into play earlier in the C daemon, where its paths are
/// worked out, and fails with another text and code.
fn make_run_directory(directory: &Path) -> Result<(), StartError> {
    paths::make_run_directory(directory).map_err(|error| {
        let (directory, reason) = (directory.display(), errno::text(error));
        if nix::unistd::geteuid().is_root() {
            let message = format!("unable to create rundir {directory}: {reason}");
            StartError::new(ExitCode::RunDirectory, message)
        } else {
            let message = format!("Cannot create user runtime directory '{directory}': {reason}");
            StartError::new(ExitCode::Failure, message)
        }
    })
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

fn serving(listener: Listener, service: Service) -> accept::Listener {
    accept::Listener {
        socket: listener.socket,
        path: listener.path,
        service,
        readable: true,
        queued: true,
    }
}
