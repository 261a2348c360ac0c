//! The log: libvirt's settings, levels and layout, on top of the macros of `tracing`.
//!
//! The program calls [`install`] with [`Settings::initial`] first thing, and again as soon as
//! [`resolve`] has told what counts; from then on the settings may be exchanged at any time. A log
//! that blocks or fails never stops the daemon: its lines are dropped and counted.
//!
//! * `saved`: the settings as they are passed on.
//! * `level`, `settings`, `resolve`: what people write, and which of it counts. Plain data.
//! * `line`: a record and its layout.
//! * `stream`, `datagram`, `output`: where lines go.
//! * `logger`, `subscriber`: the state, and the way from an event to it.
#![forbid(unsafe_code)]

mod aside;
mod datagram;
mod level;
mod line;
mod logger;
mod output;
mod resolve;
mod saved;
mod settings;
mod stream;
mod subscriber;
#[cfg(test)]
mod test_directory;

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

pub use aside::{Said, aside};
pub use level::Level;
pub use line::Printable;
pub use resolve::{Configured, Environment, RunMode, Settings, resolve};
pub use saved::Saved;
pub use settings::{
    FilterSetting, OutputSetting, SettingError, Target, filters_setting, format_filters,
    format_outputs, outputs_setting, parse_filters, parse_level, parse_outputs, restore_outputs,
    setting_text,
};

use logger::Logger;
use output::Services;
use stream::Stream;
use subscriber::LogSubscriber;

static LOGGER: OnceLock<Arc<Logger>> = OnceLock::new();

/// Makes the log work with these settings; later calls exchange all of them.
///
/// # Errors
/// [`SettingError::Open`] if an output cannot be opened. Then nothing has changed.
pub fn install(settings: Settings) -> Result<(), SettingError> {
    if let Some(logger) = LOGGER.get() {
        return logger.replace(settings);
    }
    let logger = Arc::new(Logger::open(settings, Services::default())?);
    if LOGGER.set(logger.clone()).is_ok() {
        // This fails only where a test has put its own subscriber in place.
        let _ = tracing::subscriber::set_global_default(LogSubscriber::new(logger));
    }
    Ok(())
}

/// The settings as they are now; the initial ones before [`install`].
pub fn settings() -> Settings {
    LOGGER
        .get()
        .map_or_else(Settings::initial, |logger| logger.settings())
}

/// The settings as they are now, to be passed on.
pub fn saved() -> Saved {
    settings().into()
}

/// The outputs, as the admin socket shows them.
pub fn outputs() -> String {
    format_outputs(&settings().outputs)
}

/// The filters, as the admin socket shows them.
pub fn filters() -> String {
    format_filters(&settings().filters)
}

/// Exchanges the outputs for those of the text. A text without entries restores the default
/// output. Relative paths start at `directory`. Without [`install`] only the text is checked.
///
/// # Errors
/// The text is malformed or an output cannot be opened; the old outputs stay.
pub fn set_outputs(text: &str, directory: &Path) -> Result<(), SettingError> {
    let outputs = parse_outputs(text, directory)?;
    LOGGER
        .get()
        .map_or(Ok(()), |logger| logger.set_outputs(outputs))
}

/// Exchanges the filters for those of the text. Without [`install`] only the text is checked.
///
/// # Errors
/// The text is malformed; the old filters stay.
pub fn set_filters(text: &str) -> Result<(), SettingError> {
    let filters = parse_filters(text)?;
    if let Some(logger) = LOGGER.get() {
        logger.set_filters(filters);
    }
    Ok(())
}

/// Exchanges the level of the categories that no filter matches.
pub fn set_level(level: Level) {
    if let Some(logger) = LOGGER.get() {
        logger.set_level(level);
    }
}

/// To be called when descriptor 2 has become another file, as it does when the daemon goes to the
/// background: outputs to stderr would keep the old terminal or pipe open.
pub fn stderr_was_replaced() {
    if let Some(logger) = LOGGER.get() {
        logger.reopen_stderr();
    }
}

/// To be called before anything is written, where descriptor 2 is no standard error but belongs to what
/// the daemon holds: lines that would go there are counted as lost.
pub fn stderr_is_not_ours() {
    stream::stderr_is_not_ours();
    stderr_was_replaced();
}

/// To be called before anything is written, where another process has used this one's descriptors since the
/// log was opened: the numbers mean something else by now.
pub fn forget_outputs() {
    if let Some(logger) = LOGGER.get() {
        logger.forget_outputs();
    }
}

/// Prints an error in the log settings on stderr as libvirt does, where the log itself cannot be used.
pub fn early_error(error: &SettingError) {
    let line = format!("libvirt:  error : {error}\n");
    // Nowhere is left to tell that stderr does not take it; the exit code still tells of the error.
    let _ = Stream::stderr().write_line(line.as_bytes());
}

/// Whether the journal's socket is there and may be written to, for [`RunMode::journal_writable`].
pub fn journal_is_writable() -> bool {
    let journal = Services::default().journal;
    nix::unistd::access(&journal, nix::unistd::AccessFlags::W_OK).is_ok()
}

/// Makes the directory of the default log file with its parents, mode 0700. For a daemon that is
/// not root's and whose default output is a file; root's directory belongs to the package.
///
/// # Errors
/// Those of mkdir(2).
pub fn make_log_directory(log_file: &Path) -> io::Result<()> {
    match log_file.parent() {
        Some(directory) => DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory),
        None => Ok(()),
    }
}
