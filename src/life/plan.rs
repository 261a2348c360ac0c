//! What is known before there is a daemon: the options, the configuration, the default paths, the
//! words of the command line, and what follows from them for the log, the pid file, the limits and the
//! run directory. Nothing here serves anybody.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::cli::Options;
use crate::config::{self, Config};
use crate::custody::servers::ClientLimit;
use crate::exit::{ExitCode, Failed, StartError};
use crate::host::paths::{self, Paths};
use crate::host::pid_file::PidFile;
use crate::host::{errno, limits};
use crate::log::{self, SettingError};
use crate::restart::handover::CommandLine;
use crate::server::reactor::Limits;

/// Admin clients that may be connected at a time, unless the configuration says otherwise.
const ADMIN_CLIENTS: u32 = 5000;
/// Lock clients that may always be connected, even on a host with few descriptors: libvirt's
/// default for all hosts.
const LOCK_CLIENTS_LEAST: u32 = 1024;

/// What is known before there is a daemon.
pub struct Plan {
    /// The options.
    pub options: Options,
    /// The configuration.
    pub config: Config,
    /// The default paths.
    pub paths: Paths,
    /// How the program was called.
    pub command_line: CommandLine,
}

impl Plan {
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
    ///
    /// # Errors
    /// What is wrong, for the caller's eyes.
    pub fn prepare(options: Options, command_line: CommandLine) -> Result<Self, Failed> {
        let paths = Paths::of_this_process();
        let config = load_configuration(&options, &paths)?;
        let options = with_absolute_paths(options, &command_line.directory);
        let plan = Self {
            options,
            config,
            paths,
            command_line,
        };
        plan.apply_log_settings(&plan.config)?;
        make_run_directory(&plan.paths.run_directory)?;
        Ok(plan)
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

    /// SIGHUP: the configuration as it is now. If it cannot be used, nothing changes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn reload(&self, descriptors: u64) -> Result<Limits, String> {
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
