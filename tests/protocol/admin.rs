//! What an operator sees: every command of libvirt's own virt-admin, given to libvirt's daemon and
//! to ours, exits and prints the same.
//!
//! Times and process ids differ between any two runs and are masked. Client numbers do not: both
//! daemons meet the same connections in the same order.

use crate::support;
use crate::support::client::{Client, acquire, register_as};
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use std::path::Path;
use std::process::Command;

/// libvirt's defaults; ours are larger.
const CONFIG: &str = "max_clients = 1024\nadmin_max_clients = 5000\n";

/// What our daemon does.
enum Ours {
    /// As libvirt's, with this exit status.
    Same(i32),
    /// Something else, on purpose.
    Differs {
        why: &'static str,
        status: i32,
        prints: &'static str,
    },
}
use Ours::{Differs, Same};

/// Commands as they are typed after `virt-admin`, given one after the other to one daemon. Client 1
/// of the lock server has made calls, client 2 has not; both are still there.
const COMMANDS: &[(&str, Ours)] = &[
    ("uri", Same(0)),
    ("version", Same(0)),
    ("connect virtlockd:///system", Same(0)),
    ("srv-list", Same(0)),
    ("server-list", Same(0)),
    ("srv-threadpool-info virtlockd", Same(0)),
    ("server-threadpool-info admin", Same(0)),
    ("srv-threadpool-info nosuch", Same(1)),
    ("srv-threadpool-info", Same(1)),
    ("srv-threadpool-set virtlockd", Same(1)),
    ("srv-threadpool-set virtlockd --priority-workers 3", Same(0)),
    ("srv-threadpool-info virtlockd", Same(0)),
    ("srv-threadpool-info admin", Same(0)),
    ("srv-threadpool-set virtlockd --max-workers 3", Same(1)),
    (
        "server-threadpool-set virtlockd --min-workers 3 --max-workers 2",
        Same(1),
    ),
    (
        "srv-threadpool-set virtlockd --min-workers 0 --max-workers 0",
        Same(0),
    ),
    ("srv-threadpool-set nosuch --max-workers 3", Same(1)),
    ("srv-clients-info virtlockd", Same(0)),
    ("server-clients-info admin", Same(0)),
    ("srv-clients-info nosuch", Same(1)),
    ("srv-clients-set virtlockd --max-clients 2000", Same(0)),
    ("srv-clients-set virtlockd --max-clients 50", Same(1)),
    (
        "server-clients-set virtlockd --max-clients 50 --max-unauth-clients 40",
        Same(0),
    ),
    ("srv-clients-set virtlockd", Same(1)),
    (
        "srv-clients-set admin --max-clients 10 --max-unauth-clients 10",
        Same(0),
    ),
    ("srv-clients-info virtlockd", Same(0)),
    ("srv-clients-info admin", Same(0)),
    ("client-list virtlockd", Same(0)),
    ("srv-clients-list virtlockd", Same(0)),
    ("client-list admin", Same(0)),
    ("client-list nosuch", Same(1)),
    ("client-info virtlockd 1", Same(0)),
    (
        "client-info virtlockd 2",
        Differs {
            why: "who a client is, is known from its connect() on, not from its first call",
            status: 0,
            prints: "id             : 2
connection_time: <time>
transport      : unix
readonly       : no
unix_user_id   : 0
unix_user_name : root
unix_group_id  : 0
unix_group_name: root
unix_process_id: <pid>
",
        },
    ),
    ("client-info virtlockd 77", Same(1)),
    ("client-info nosuch 1", Same(1)),
    ("client-info virtlockd x", Same(1)),
    ("client-disconnect virtlockd 77", Same(1)),
    ("client-disconnect nosuch 1", Same(1)),
    ("client-disconnect virtlockd 2", Same(0)),
    ("client-list virtlockd", Same(0)),
    ("srv-update-tls virtlockd", Same(1)),
    ("server-update-tls admin", Same(1)),
    ("srv-update-tls nosuch", Same(1)),
    ("daemon-log-filters", Same(0)),
    ("daemon-log-filters '1:util 4:+rpc'", Same(0)),
    ("daemon-log-filters", Same(0)),
    ("daemon-log-filters bogus", Same(1)),
    ("daemon-log-filters 7:util", Same(1)),
    ("daemon-log-filters 1:+", Same(1)),
    ("daemon-log-filters ''", Same(0)),
    ("daemon-log-filters", Same(0)),
    ("daemon-log-outputs", Same(0)),
    (
        "daemon-log-outputs '4:stderr 3:file:/run/virtlockd.log'",
        Same(0),
    ),
    ("daemon-log-outputs", Same(0)),
    ("daemon-log-outputs 3:file:run/relative.log", Same(0)),
    ("daemon-log-outputs", Same(0)),
    ("daemon-log-outputs bogus", Same(1)),
    ("daemon-log-outputs 9:stderr", Same(1)),
    ("daemon-log-outputs 1:nowhere", Same(1)),
    ("daemon-log-outputs 1:file", Same(1)),
    ("daemon-log-outputs 3:file:/run/nosuch/log", Same(1)),
    ("daemon-log-outputs ''", Same(0)),
    ("daemon-log-outputs", Same(0)),
    // Names of older releases, which this one no longer knows.
    ("dmn-log-info", Same(1)),
    ("dmn-log-filters", Same(1)),
    ("dmn-log-outputs", Same(1)),
    ("dmn-log-define", Same(1)),
    ("daemon-timeout 120", Same(0)),
    ("daemon-timeout 4294967295", Same(0)),
    ("daemon-timeout --timeout 0", Same(0)),
    ("daemon-timeout 4294967296", Same(1)),
    ("daemon-timeout soon", Same(1)),
    ("daemon-timeout", Same(1)),
    // virt-admin itself reports that the daemon has closed the connection.
    ("daemon-shutdown --preserve", Same(1)),
];

#[test]
fn every_command_of_virt_admin_does_what_it_does_with_libvirts_daemon() {
    let Some(c_daemon) = both_are_there() else {
        return;
    };
    let theirs = run_all(&c_daemon);
    let ours = run_all(&daemon::program());
    let mut wrong = Vec::new();
    for (((command, expected), theirs), ours) in COMMANDS.iter().zip(theirs).zip(ours) {
        let (what, right) = match expected {
            Same(status) => (
                "as libvirt's",
                ours == theirs && ours.status == Some(*status),
            ),
            Differs {
                why,
                status,
                prints,
            } => {
                let right =
                    ours.status == Some(*status) && ours.stdout.trim_end() == prints.trim_end();
                (*why, right)
            }
        };
        if !right {
            wrong.push(format!(
                "virt-admin {command} ({what}):\n libvirt's: {theirs:?}\n ours: {ours:?}"
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} commands differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn daemon_shutdown_ends_the_daemon_as_sigterm_does() {
    let Some(c_daemon) = both_are_there() else {
        return;
    };
    for program in [c_daemon, daemon::program()] {
        let namespace = Namespace::new();
        let mut daemon = start(&program, &namespace, &[]);
        run(&namespace, "daemon-shutdown");
        assert_eq!(daemon.wait_end().code(), Some(0), "{}", program.display());
        assert!(!daemon.lock_socket().exists());
        assert!(!daemon.admin_socket().exists());
    }
}

#[test]
fn a_timeout_set_by_virt_admin_ends_an_idle_daemon() {
    let Some(c_daemon) = both_are_there() else {
        return;
    };
    for program in [c_daemon, daemon::program()] {
        let namespace = Namespace::new();
        let mut daemon = start(&program, &namespace, &[]);
        run(&namespace, "daemon-timeout 1");
        assert_eq!(daemon.wait_end().code(), Some(0), "{}", program.display());
    }
}

/// The path of libvirt's daemon, if everything is installed that the comparison needs.
fn both_are_there() -> Option<std::path::PathBuf> {
    if !support::require_root() {
        return None;
    }
    let has_virt_admin = Command::new("virt-admin")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    let c_daemon = daemon::c_daemon().filter(|_| has_virt_admin);
    if c_daemon.is_none() {
        support::skip("needs libvirt's virtlockd and virt-admin to compare with");
    }
    c_daemon
}

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Gives all commands to one daemon.
fn run_all(program: &Path) -> Vec<Outcome> {
    let namespace = Namespace::new();
    std::fs::write(namespace.path("/run/disk"), "").expect("make a disk");
    let config = "/run/admin.conf";
    std::fs::write(namespace.path(config), CONFIG).expect("write the configuration");
    let mut daemon = start(program, &namespace, &["-f", config]);
    let mut caller = daemon.client();
    caller.call(&register_as("guest", 4242)).expect_ok();
    caller.call(&acquire("", "/run/disk", 0)).expect_ok();
    let mut silent = Client::connect(daemon.lock_socket());
    silent.ping();
    let outcomes = COMMANDS
        .iter()
        .map(|(command, _)| run(&namespace, command))
        .collect();
    daemon.wait_end();
    outcomes
}

/// Starts a daemon and waits for its admin socket, which is the later one.
fn start(program: &Path, namespace: &Namespace, args: &[&str]) -> Daemon {
    let mut daemon = Daemon::spawn(program, namespace, args, &[]);
    let admin_socket = daemon.admin_socket().to_owned();
    daemon.wait_for_socket(&admin_socket);
    daemon
}

/// Runs one command of virt-admin; a shell takes the quotes off.
fn run(namespace: &Namespace, command: &str) -> Outcome {
    let output = namespace
        .command("sh")
        .args([
            "-c",
            &format!("virt-admin -c virtlockd:///system {command}"),
        ])
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .output()
        .expect("run virt-admin");
    let stdout = masked(&String::from_utf8_lossy(&output.stdout));
    let is_server_list = ["srv-list", "server-list"].contains(&command);
    Outcome {
        status: output.status.code(),
        stdout: if is_server_list {
            without_order(&stdout)
        } else {
            stdout
        },
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// libvirt's daemon lists its servers in an order that changes from start to start.
fn without_order(list: &str) -> String {
    let mut names: Vec<&str> = list.split_whitespace().collect();
    names.sort_unstable();
    names.join(" ")
}

fn masked(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        match line.split_once("unix_process_id:") {
            Some(_) => out.push_str("unix_process_id: <pid>"),
            None => out.push_str(&without_times(line)),
        }
        out.push('\n');
    }
    out
}

/// Times look like `2026-11-22 08:04:25+0000`.
fn without_times(line: &str) -> String {
    const FORM: &[u8] = b"0000-00-00 00:00:00+0000";
    let is_time = |window: &[u8]| {
        window.iter().zip(FORM).all(|(byte, form)| match form {
            b'0' => byte.is_ascii_digit(),
            _ => byte == form,
        })
    };
    match line.as_bytes().windows(FORM.len()).position(is_time) {
        Some(at) => format!("{}<time>{}", &line[..at], &line[at + FORM.len()..]),
        None => line.to_owned(),
    }
}
