//! `virtlockctl`: who has this disk? It asks a running daemon over its status program; where libvirt's own
//! daemon runs, or none, it says so and tells what the kernel knows. It changes nothing.
//!
//! A command is one file. [`ask`] speaks, [`view`] gathers, [`kernel`] and [`look`] see for themselves,
//! [`leases`] knows libvirt's names for disks, [`show`] and [`text`] are what is printed.
#![forbid(unsafe_code)]

mod ask;
mod audit;
mod doctor;
mod events;
mod exec;
mod exit;
mod guests;
mod keeper;
mod kernel;
mod leases;
mod look;
mod metrics;
mod options;
mod patience;
mod sha256;
mod show;
mod status;
mod text;
mod view;
mod who;

use std::ffi::OsString;
use std::process::ExitCode;

use exit::{Exit, complain};
use options::{Command, Words};
use show::Out;

use crate::host::process;

/// Does what the words say, but for the program's own name.
pub fn run(words: Vec<OsString>) -> ExitCode {
    process::set_started();
    let mut out = Out::new();
    let exit = match options::parse(words) {
        Ok(Words::Say(text)) => {
            out.line(&text);
            Exit::Yes
        }
        Ok(Words::LookAt(path)) => look::report(&path, &mut out),
        Ok(Words::Do(common, command)) => match command {
            Command::Status(whom) => status::run(&common, whom.as_deref(), &mut out),
            Command::Who(files) => who::run(&common, &files, &mut out),
            Command::Events(kinds) => events::run(&common, kinds, &mut out),
            Command::Metrics => metrics::run(&common, &mut out),
            Command::Audit => audit::run(&common, &mut out),
            Command::Doctor => doctor::run(&common, &mut out),
            Command::Exec(wish) => exec::run(&common, &wish),
        },
        Err(wrong) => {
            complain(&wrong);
            Exit::Usage
        }
    };
    ExitCode::from(exit.number())
}
