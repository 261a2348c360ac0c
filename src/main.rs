//! The program: from its words to its exit code. What lies between is told in [`virtlockd::life`].
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

use std::ffi::{OsStr, OsString};
use std::io::Write;

use virtlockd::cli::{self, Outcome};
use virtlockd::exit::{ExitCode, Failed, StartError};
use virtlockd::host::{errno, process, signals};
use virtlockd::life::{helper, rehearsal, start};
use virtlockd::restart::handover::CHECK_VARIABLE;

fn main() -> std::process::ExitCode {
    // Before anything else: a signal must find either nobody or the reactor.
    let blocked = signals::block();
    process::set_started();
    if helper::is_wanted() {
        return u8::from(helper::serve().is_err()).into();
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let outcome = cli::parse(&arguments, nix::unistd::geteuid().is_root());
    if let Outcome::Exit {
        exit,
        stdout,
        stderr,
    } = &outcome
    {
        // A caller that does not want to read the text wants the exit code all the same.
        let _ = std::io::stdout().write_all(stdout);
        let _ = std::io::stderr().write_all(stderr);
        if std::env::var_os(CHECK_VARIABLE).is_some() && *exit == ExitCode::Success {
            return rehearsal::rehearse(&arguments).number().into();
        }
        return exit.number().into();
    }
    let ended = blocked
        .map_err(|error| StartError::new(ExitCode::Signals, errno::text(error)))
        .map_err(Failed::from)
        .and_then(|()| {
            let program = arguments
                .first()
                .map_or(OsStr::new("virtlockd"), OsString::as_os_str);
            start::start(outcome, program)
        });
    let exit = ended.unwrap_or_else(|failed| start::say(&failed));
    exit.number().into()
}
