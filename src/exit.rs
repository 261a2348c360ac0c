//! How a start ends: the exit codes that scripts and service managers know, and the error that
//! carries one of them to `main`, the only place that prints it.
#![forbid(unsafe_code)]

use crate::host::refusal::Refusal;
use crate::log::SettingError;

/// The exit codes of the daemon. The numbers are libvirt's; the ones that this program has no use
/// for are left out. A start in the background passes the number to the waiting parent as one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Help, version, or a regular end.
    Success = 0,
    /// A bad option or value, a bad configuration, or a pid file that cannot be taken.
    Failure = 1,
    /// The run directory cannot be made.
    RunDirectory = 2,
    /// Initialisation failed, or the state of the process before cannot be loaded.
    Initialisation = 3,
    /// Signal handlers cannot be set up.
    Signals = 4,
    /// A socket cannot be made, or an activation descriptor is nobody's.
    Network = 6,
    /// The successor cannot be started.
    ReExecution = 9,
    /// The daemon has ended, and the next start goes on from where it was. Not libvirt's: a unit has to tell it from
    /// an end after which nothing is locked any more, because unless systemd itself asked for it the next start
    /// has to follow at once.
    Kept = 81,
}

impl ExitCode {
    /// The number as the shell sees it, and as the status byte of a background start.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// What the parent of a background start says about the status byte that its child sent. The list
/// holds every byte of libvirt's, because the child may be another version of the daemon.
pub fn status_text(byte: u8) -> &'static str {
    match byte {
        0 => "No error",
        1 => "Unable to obtain pidfile",
        2 => "Unable to create rundir",
        3 => "Unable to initialize libvirt",
        4 => "Unable to setup signal handlers",
        5 => "Unable to drop privileges",
        6 => "Unable to initialize network sockets",
        7 => "Unable to load configuration file",
        8 => "Unable to look for hook scripts",
        9 => "Unable to re-execute daemon",
        10 => "Unable to initialize audit system",
        11 => "Unable to initialize driver",
        _ => "Unknown failure",
    }
}

/// Why the daemon cannot start: one sentence for the log, and the exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartError {
    /// The exit code of the process.
    pub exit: ExitCode,
    /// The sentence, without a line end.
    pub message: String,
}

impl StartError {
    /// An error that ends the process with `exit`.
    pub fn new(exit: ExitCode, message: impl ToString) -> Self {
        Self {
            exit,
            message: message.to_string(),
        }
    }
}

impl std::fmt::Display for StartError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.message)
    }
}

impl std::error::Error for StartError {}

/// The state that a predecessor left for this process is of no use.
pub fn unusable(reason: &str) -> StartError {
    let message = format!(
        "The state of the daemon that this one was to go on for cannot be used: {reason}. Its \
         locks and connections are lost: stop the guests, or make sure that none is started twice"
    );
    StartError::new(ExitCode::Initialisation, message)
}

/// The error of a daemon that the host refuses something for which there is no other way.
pub fn refused(refusal: Refusal) -> StartError {
    let message = format!("The daemon cannot serve: {refusal}");
    StartError::new(ExitCode::Initialisation, message)
}

/// Why the program ends before its time.
pub enum Failed {
    /// To be logged.
    Error(StartError),
    /// The log itself cannot be set up.
    Log(SettingError),
}

impl From<StartError> for Failed {
    fn from(error: StartError) -> Self {
        Self::Error(error)
    }
}

impl From<SettingError> for Failed {
    fn from(error: SettingError) -> Self {
        Self::Log(error)
    }
}
