//! The successor's trial run: it is asked by the running daemon, beside it, whether it could take over.
//!
//! It makes what the real start makes, with the same functions, and drops it again: what the host
//! refuses to this program must be known while the locks are still in safe hands.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::plan;
use crate::cli::{self, Options, Outcome};
use crate::config::Config;
use crate::custody::ledger::{self, Ledger};
use crate::exit::ExitCode;
use crate::host::paths::Paths;
use crate::host::refusal::Refusal;
use crate::restart::handover::{DISMISSES, READABLE};
use crate::server::reactor::Reactor;

/// Asked by the running daemon, with its ledger as standard input: could this program go on with
/// this state, these options and this configuration? Changes nothing.
pub fn rehearse(arguments: &[OsString]) -> ExitCode {
    let words: Vec<OsString> = arguments
        .iter()
        .enumerate()
        .filter(|(position, _)| *position != 1)
        .map(|(_, word)| word.clone())
        .collect();
    match rehearsed(&words) {
        Ok(line) => {
            let _ = writeln!(std::io::stdout(), "{line}");
            ExitCode::Success
        }
        Err(reason) => {
            let _ = writeln!(std::io::stderr(), "{reason}");
            ExitCode::Initialisation
        }
    }
}

fn rehearsed(words: &[OsString]) -> Result<String, String> {
    let options = match cli::parse(words, nix::unistd::geteuid().is_root()) {
        Outcome::Run(options) => options,
        Outcome::Refused(error) => return Err(error.to_string()),
        Outcome::Exit { .. } => return Err("its options do not start a daemon".into()),
    };
    let input: OwnedFd = std::os::fd::AsFd::as_fd(&std::io::stdin())
        .try_clone_to_owned()
        .map_err(|error| format!("there is no ledger on standard input: {error}"))?;
    let state = ledger::load(&input).map_err(|reason| format!("the ledger: {reason}"))?;
    state.check_descriptors()?;
    // As the successor will find it: by the path that the first start made absolute.
    let options = match &state.settings().config_file {
        Some(path) => Options {
            config_file: Some(PathBuf::from(OsString::from_vec(path.clone()))),
            ..options
        },
        None => options,
    };
    let _: Config = plan::load_configuration(&options, &Paths::of_this_process())
        .map_err(|error| error.to_string())?;
    try_out().map_err(|refusal| refusal.to_string())?;
    Ok(format!(
        "{READABLE}: {} connections, {} locks{DISMISSES}",
        state.client_count(),
        state.table().len()
    ))
}

/// Whether the host lets this program have what a daemon that takes over cannot do without. What a
/// start has another way for is no reason to stay with the program before.
fn try_out() -> Result<(), Refusal> {
    plan::raise_limit();
    let reactor = Reactor::new(Box::new(|| Err("this is a trial".to_owned())), None)?;
    reactor.try_out()?;
    Ledger::try_out(&Paths::of_this_process().run_directory)
}
