//! The daemon over its socket, beside libvirt's own daemon and beside the floor.
//!
//! Each scenario starts each server in a mount namespace of its own, in turn, several times, and
//! checks what it measures: replies are good, locks are held, and an answer that never comes ends
//! the bench. `benches/README.md` says how to read the report.
//!
//! This file has the list of the scenarios and runs them. The others, in the order in which a reader
//! meets them:
//!
//! What is measured, and with what:
//!
//! * `options.rs`: what the person asked for: scenarios, subjects, sizes.
//! * `subject.rs`: the servers that are compared, and how each is started in a namespace of its own and ended.
//! * `floor.rs`: the last of them, a bare server that makes the file calls and checks nothing.
//! * `helper.rs`: processes of this very program in another role, and how they are talked to.
//! * `measure.rs`: the clock, percentiles and medians; `Outcome`, the result of all that can fail.
//! * `probe.rs`: what is seen from outside: locks on files, and /proc's word on a process.
//!
//! Those who use the server:
//!
//! * `protocol.rs`, in `tests/support/`: the wire protocol of a client, shared with the tests.
//! * `client.rs`: a client of the lock program, one call at a time.
//! * `crowd.rs`: idle guests, held by helpers.
//! * `machines.rs`: running machines: real processes with a connection each.
//! * `nursery.rs`: owners that are real processes, and their parent, who kills and reaps them.
//! * `bystander.rs`: a helper that makes two calls a millisecond and notes how long it waited.
//! * `watch.rs`: a client that is busy while something happens to the daemon.
//! * `mounts.rs`: a share for a server, shared with the tests.
//! * `attacker.rs`: a helper that does one of fourteen hostile things as fast as it can.
//!
//! The scenarios, in the order in which they run:
//!
//! * `rtt.rs`: round trips, one call at a time, beside idle guests.
//! * `pipeline.rs`: 64 calls at once.
//! * `fan.rs`: many clients that are busy at the same time.
//! * `boot.rs`: machines start as libvirtd starts them, twenty at a time.
//! * `storm.rs`: all owners are killed at once.
//! * `fence.rs`: an owner closes its connection and does not want to die.
//! * `reexec.rs`: the daemon replaces itself under thousands of guests.
//! * `crash.rs`: it is killed under thousands of guests.
//! * `stop.rs`: the daemon stops and starts under thousands of guests.
//! * `listing.rs`: somebody lists all that is held, again and again.
//! * `share.rs`: disks on a share that hangs, or that takes its time.
//! * `idle.rs`: guests that do nothing, and what they cost.
//! * `hostile.rs`: what a bystander notices of each attacker.
//!
//! What becomes of it:
//!
//! * `progress.rs`: the line for the person who waits, and the watchdog.
//! * `results.rs`: the numbers of all runs.
//! * `goals.rs`: the goals, and whether the numbers meet them.
//! * `report.rs`: the table for people and the JSON for programs.
//! * `picture.rs`: the pictures, as SVG.

#![forbid(unsafe_code)]

mod attacker;
mod boot;
mod bystander;
mod client;
mod crash;
mod crowd;
mod fan;
mod fence;
mod floor;
mod goals;
mod helper;
mod hostile;
mod idle;
mod listing;
mod machines;
mod measure;
mod mounts;
mod nursery;
mod options;
mod picture;
mod pipeline;
mod probe;
mod progress;
// Shared with the tests, which use more of it.
#[path = "../../tests/support/protocol.rs"]
#[allow(dead_code)]
mod protocol;
mod reexec;
mod report;
mod results;
mod rtt;
mod share;
mod stop;
mod storm;
mod subject;
mod watch;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use measure::Outcome;
use options::{Options, Request};
use results::Results;
use subject::{Programs, Subject};

type Run = fn(&Options, &Programs, Subject, &mut Results) -> Outcome<()>;

struct Scenario {
    name: &'static str,
    run: Run,
    /// Whether the floor can do it too: it knows no owners and no restart.
    has_floor: bool,
}

const SCENARIOS: [Scenario; 13] = [
    Scenario {
        name: rtt::NAME,
        run: rtt::run,
        has_floor: true,
    },
    Scenario {
        name: pipeline::NAME,
        run: pipeline::run,
        has_floor: true,
    },
    Scenario {
        name: fan::NAME,
        run: fan::run,
        has_floor: true,
    },
    Scenario {
        name: boot::NAME,
        run: boot::run,
        has_floor: true,
    },
    Scenario {
        name: storm::NAME,
        run: storm::run,
        has_floor: false,
    },
    Scenario {
        name: fence::NAME,
        run: fence::run,
        has_floor: false,
    },
    Scenario {
        name: reexec::NAME,
        run: reexec::run,
        has_floor: false,
    },
    Scenario {
        name: crash::NAME,
        run: crash::run,
        has_floor: false,
    },
    Scenario {
        name: stop::NAME,
        run: stop::run,
        has_floor: false,
    },
    Scenario {
        name: listing::NAME,
        run: listing::run,
        has_floor: false,
    },
    Scenario {
        name: share::NAME,
        run: share::run,
        has_floor: false,
    },
    Scenario {
        name: idle::NAME,
        run: idle::run,
        has_floor: true,
    },
    Scenario {
        name: hostile::NAME,
        run: hostile::run,
        has_floor: false,
    },
];

/// One run of one scenario of one server. The C daemon needs minutes to take 20,000 clients in.
const RUN_LIMIT: Duration = Duration::from_secs(1500);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let role = arguments
        .get(1)
        .and_then(|word| word.strip_prefix(helper::ROLE));
    let outcome = match role {
        Some(role) => play(role, &arguments[2..]).map(|()| true),
        None => bench(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{}: {error}", role.unwrap_or("bench"));
            ExitCode::FAILURE
        }
    }
}

/// What a helper process does.
fn play(role: &str, arguments: &[String]) -> Outcome<()> {
    let text = |number: usize| {
        let argument = arguments.get(number).map(String::as_str);
        argument.ok_or_else(|| format!("the {role} needs more arguments"))
    };
    let count = |number: usize| {
        text(number)?
            .parse::<u32>()
            .map_err(|e| format!("argument {number} of the {role}: {e}"))
    };
    if role == "owner" {
        return nursery::live(Path::new(text(0)?), count(1)?, text(2)?);
    }
    helper::end_with_parent()?;
    if role == "machine" {
        return machines::live();
    }
    helper::raise_descriptor_limit()?;
    match role {
        "floor" => floor::serve(Path::new(text(0)?)),
        "crowd" => crowd::hold(Path::new(text(0)?), count(1)?, count(2)?),
        "nursery" => nursery::keep(text(0)?, count(1)?, text(2)?, text(3)?),
        "lister" => listing::list(Path::new(text(0)?)),
        "attacker" => attacker::attack(Path::new(text(0)?), text(1)?, text(2)?),
        "share" => mounts::serve(text(0)?, count(1)?),
        "bystander" => bystander::stand_by(Path::new(text(0)?), text(1)?),
        _ => Err("no such role".into()),
    }
}

/// Runs what was asked for; says whether nothing failed.
fn bench() -> Outcome<bool> {
    let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    let mut options = match options::parse(&names)? {
        Request::Help => {
            print!("{}", options::HELP);
            return Ok(true);
        }
        Request::NotABench => {
            println!("this measures for minutes: start it with `cargo bench --bench daemon`");
            return Ok(true);
        }
        Request::Run(options) => options,
    };
    if !nix::unistd::geteuid().is_root() {
        return Err("run as root: each server gets a mount namespace of its own".into());
    }
    helper::raise_descriptor_limit()?;
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench-results");
    fs::create_dir_all(&target).map_err(|e| format!("making {}: {e}", target.display()))?;
    let mut results = Results::default();
    leave_out_what_is_not_there(&mut options, &mut results);
    let programs = Programs {
        ours: options.ours.clone(),
        before: options.before.clone(),
        c: options.c.clone(),
        logs: target.clone(),
    };
    let place = report::Place::here();
    progress::watch();
    for scenario in SCENARIOS
        .iter()
        .filter(|scenario| options.wants(scenario.name))
    {
        run_scenario(scenario, &options, &programs, &mut results);
    }
    progress::done();
    let goals = goals::goals(&results, &options.sizes);
    let table = report::table(&results, &goals, &place, &options);
    println!("{table}");
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let directory = if options.keep { kept } else { target };
    let json = report::as_json(&results, &goals, &place, &options);
    let mut files = vec![("daemon.md", table), ("daemon.json", format!("{json:#}\n"))];
    let latency = picture::latency(&results, &options.sizes, &place.line());
    files.extend(latency.map(|svg| ("latency.svg", svg)));
    files.extend(picture::bars(&results, &place.line()).map(|svg| ("boot-and-storm.svg", svg)));
    write_all(&directory, &files)?;
    println!("written to {}", directory.display());
    Ok(results.failures.is_empty())
}

/// The C daemon is measured where it is installed, and only if it is libvirt's.
fn leave_out_what_is_not_there(options: &mut Options, results: &mut Results) {
    let version = subject::version(&options.c);
    if !version
        .as_ref()
        .is_some_and(|version| version.contains("(libvirt)"))
    {
        let path = options.c.display();
        results.note(format!(
            "{path} is not libvirt's daemon: it was not measured"
        ));
        options.subjects.retain(|&subject| subject != Subject::C);
    }
}

/// Runs are interleaved: what disturbs the machine for a while disturbs all subjects.
fn run_scenario(
    scenario: &Scenario,
    options: &Options,
    programs: &Programs,
    results: &mut Results,
) {
    let name = scenario.name;
    for run in 1..=options.runs {
        for &subject in &options.subjects {
            if subject == Subject::Floor && !scenario.has_floor {
                continue;
            }
            let title = subject.title();
            progress::step(
                format!("{name}, run {run} of {}, {title}", options.runs),
                RUN_LIMIT,
            );
            if let Err(error) = (scenario.run)(options, programs, subject, results) {
                let failure = format!("{name}, run {run}, {title}: {error}");
                eprintln!("\nFAILED: {failure}");
                results.failures.push(failure);
            }
            if let Err(error) = machines::muster() {
                results.failures.push(format!("the machines: {error}"));
            }
        }
    }
}

fn write_all(directory: &Path, files: &[(&str, String)]) -> Outcome<()> {
    fs::create_dir_all(directory).map_err(|e| format!("making {}: {e}", directory.display()))?;
    for (name, text) in files {
        let path = directory.join(name);
        fs::write(&path, text).map_err(|e| format!("writing {}: {e}", path.display()))?;
    }
    Ok(())
}
