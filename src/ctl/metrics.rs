//! `virtlockctl metrics`: numbers for a monitor, as OpenMetrics text. No label names a disk or a guest: of those
//! there may be thousands.

use serde_json::json;

use super::ask::{Link, Trouble};
use super::exit::{Exit, complain};
use super::kernel;
use super::options::Common;
use super::show::Out;
use super::view::{self, About};

/// What the daemon counts, and what that is for people.
const HELP: [(&str, &str); 12] = [
    ("connections", "Connections, also those turned away."),
    (
        "owners_registered",
        "Guests that registered over connections of their own.",
    ),
    ("locks_granted", "Locks granted, shared holdings too."),
    ("locks_released", "Locks given back by their owners."),
    ("locks_refused", "Acquires refused."),
    (
        "owners_fenced",
        "Owners sent SIGTERM because they left their locks.",
    ),
    (
        "owners_killed",
        "Owners sent SIGKILL because they did not end.",
    ),
    ("owners_died", "Owners that died and held something."),
    ("upgrades", "Programs that took over from the one before."),
    ("recoveries", "Processes that went on for one that died."),
    (
        "locks_lost",
        "Locks that others had when the daemon took its locks again.",
    ),
    (
        "events_missed",
        "Events that subscribers were too slow for.",
    ),
];

/// A gauge: its name, what it is, and its value.
type Gauge = (&'static str, &'static str, u64);

/// Runs the command.
pub fn run(common: &Common, out: &mut Out) -> Exit {
    let link = Link::open(&common.socket);
    let listens = link.as_ref().ok().and_then(|link| link.peer);
    let told = link.and_then(|mut link| {
        let about = view::about(&mut link)?;
        Ok((about, view::counters(&mut link)?))
    });
    match told {
        Ok((about, counters)) => {
            let version = String::from_utf8_lossy(&about.version).into_owned();
            let counters: Vec<(&str, &str, u64)> = HELP
                .iter()
                .filter_map(|(name, help)| {
                    let row = counters.iter().find(|(it, _)| it == name.as_bytes())?;
                    Some((*name, *help, row.1))
                })
                .collect();
            print(
                common,
                ("virtlockd", &version),
                &gauges(&about),
                &counters,
                out,
            );
            Exit::Yes
        }
        Err(Trouble::Another) => {
            let pid = kernel::daemon(listens);
            let locks = pid.and_then(|pid| kernel::locks_of(pid).ok());
            let mut gauges = vec![UP];
            if let Some(locks) = locks {
                gauges.push(("locks", LOCKS, locks.len() as u64));
            }
            print(common, ("libvirt", ""), &gauges, &[], out);
            Exit::Yes
        }
        Err(trouble) => {
            complain(&trouble.to_string());
            let down: Gauge = (UP.0, UP.1, 0);
            print(common, ("", ""), &[down], &[], out);
            Exit::Unknown
        }
    }
}

const UP: Gauge = ("up", "Whether a lock daemon answers.", 1);
const LOCKS: &str = "Resources that are locked.";

fn gauges(about: &About) -> Vec<Gauge> {
    vec![
        UP,
        ("locks", LOCKS, about.resources),
        (
            "locks_being_freed",
            "Locks of dead owners that are being freed.",
            about.left,
        ),
        (
            "fences",
            "Owners that are being fenced.",
            about.fenced.into(),
        ),
        (
            "lockspaces",
            "Lockspaces, the default one not among them.",
            about.lockspaces.into(),
        ),
        (
            "clients",
            "Clients of the lock socket.",
            about.lock_clients.into(),
        ),
        (
            "admin_clients",
            "Clients of the admin socket.",
            about.admin_clients.into(),
        ),
        (
            "serving_since_timestamp_seconds",
            "When the process that serves began.",
            about.serves_since / 1000,
        ),
    ]
}

fn print(
    common: &Common,
    (kind, version): (&str, &str),
    gauges: &[Gauge],
    counters: &[(&str, &str, u64)],
    out: &mut Out,
) {
    if common.json {
        let all = |rows: &[(&str, &str, u64)]| {
            let rows = rows
                .iter()
                .map(|(name, _, value)| ((*name).to_owned(), json!(value)));
            rows.collect::<serde_json::Map<_, _>>()
        };
        out.json(&json!({
            "command": "metrics",
            "kind": kind,
            "version": version,
            "gauges": all(gauges),
            "counters": all(counters),
        }));
        return;
    }
    if !kind.is_empty() {
        // Not of the type `info`: the textfile collector drops a file that has one.
        out.line("# HELP virtlockd_build_info Which lock daemon answers.");
        out.line("# TYPE virtlockd_build_info gauge");
        out.line(&format!(
            "virtlockd_build_info{{implementation=\"{kind}\",version=\"{}\"}} 1",
            label(version)
        ));
    }
    for (name, help, value) in gauges {
        out.line(&format!("# HELP virtlockd_{name} {help}"));
        out.line(&format!("# TYPE virtlockd_{name} gauge"));
        out.line(&format!("virtlockd_{name} {value}"));
    }
    for (name, help, value) in counters {
        out.line(&format!("# HELP virtlockd_{name} {help}"));
        out.line(&format!("# TYPE virtlockd_{name} counter"));
        out.line(&format!("virtlockd_{name}_total {value}"));
    }
    out.line("# EOF");
}

/// The value of a label.
fn label(text: &str) -> String {
    text.chars()
        .flat_map(|character| match character {
            '\\' => vec!['\\', '\\'],
            '"' => vec!['\\', '"'],
            '\n' => vec!['\\', 'n'],
            other => vec![other],
        })
        .collect()
}
