//! Log outputs and filters over the admin socket. What is malformed or cannot be opened is refused,
//! and the log goes on as it was.

use std::path::{Path, PathBuf};

use crate::log::{self, SettingError, setting_text};
use crate::wire::admin::Answer;
use crate::wire::error::{Code, Domain, Error};

/// Where the log goes.
pub fn outputs() -> Answer<'static> {
    let outputs = log::settings().outputs;
    Answer::Entries(log::format_outputs(&outputs), count(outputs.len()))
}

/// Which lines the log takes.
pub fn filters() -> Answer<'static> {
    let filters = log::settings().filters;
    Answer::PerhapsEntries(log::format_filters(&filters), count(filters.len()))
}

fn count(entries: usize) -> u32 {
    u32::try_from(entries).unwrap_or(u32::MAX)
}

/// Exchanges the outputs; nothing stands for the default output. A relative path starts where the
/// daemon runs.
pub fn set_outputs(setting: &[u8], caller: &str) -> Result<(), Error> {
    let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    setting_text("The list of log outputs", setting)
        .and_then(|text| log::set_outputs(text, Path::new(&directory)))
        .map_err(refusal)?;
    tracing::info!(
        target: "admin.admin_server",
        "The log outputs are now '{}': {caller} asked for it", log::outputs()
    );
    Ok(())
}

/// Exchanges the filters.
pub fn set_filters(setting: &[u8], caller: &str) -> Result<(), Error> {
    setting_text("The list of log filters", setting)
        .and_then(log::set_filters)
        .map_err(refusal)?;
    tracing::info!(
        target: "admin.admin_server",
        "The log filters are now '{}': {caller} asked for it", log::filters()
    );
    Ok(())
}

fn refusal(error: SettingError) -> Error {
    match error {
        SettingError::Open(what, errno) => {
            let what = format!("failed to open {what}");
            Error::system(Domain::None, what.as_bytes(), errno)
        }
        error => Error::new(Code::InvalidArgument, Domain::None, error.detail()),
    }
}
