//! The log seen from outside: what a start refuses, what the journal gets, and that a log nobody
//! reads stops nothing. What the settings mean in detail is tested beside the code.

use crate::support::client::{Client, acquire};
use crate::support::daemon::{Daemon, program};
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, TempDir, require_root, wait_until};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use tracing::{error, info, warn};
use virtlockd::log;

const JOURNAL: &str = "/run/systemd/journal/socket";

/// Starts a daemon that is to end at once; its exit code and what it printed on stderr.
fn refused_start(
    namespace: &Namespace,
    args: &[&str],
    env: &[(&str, &str)],
) -> (Option<i32>, String) {
    let mut daemon = Daemon::spawn(&program(), namespace, args, env);
    let status = daemon.wait_end();
    (status.code(), daemon.stderr())
}

/// A socket in the place of the journal's.
fn journal_socket(namespace: &Namespace) -> UnixDatagram {
    let path = namespace.path(JOURNAL);
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("make the directory");
    let socket = UnixDatagram::bind(path).expect("bind the journal's socket");
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("set a deadline");
    socket
}

/// A call that is refused, and therefore logged as an error.
fn refused_call(client: &mut Client) {
    assert!(!client.call(&acquire("", "/run/x", 0)).is_ok());
}

#[test]
fn a_malformed_log_setting_ends_the_start_with_libvirts_sentence() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let config = "/run/test.conf";
    let cases = [
        (
            "log_level = 7",
            "LIBVIRT_DEBUG",
            "1",
            "invalid argument: Failed to set logging priority, argument '7' is invalid",
        ),
        (
            "log_filters = \"1\"",
            "LIBVIRT_LOG_FILTERS",
            "1:a",
            "invalid argument: Malformed format for filter '1'",
        ),
        (
            "log_outputs = \"1\"",
            "LIBVIRT_LOG_OUTPUTS",
            "1:stderr",
            "invalid argument: Malformed format for log output '1'",
        ),
        (
            "",
            "LIBVIRT_DEBUG",
            "warn",
            "invalid argument: Failed to set logging priority, argument 'warn' is invalid",
        ),
        (
            "",
            "LIBVIRT_LOG_FILTERS",
            "1:+",
            "invalid argument: Invalid match string '+'",
        ),
        (
            "",
            "LIBVIRT_LOG_OUTPUTS",
            "1:foo",
            "invalid argument: Invalid log destination 'foo' for log output '1:foo'",
        ),
        (
            "",
            "LIBVIRT_LOG_OUTPUTS",
            "1:file:/nonexistent/x",
            "failed to open /nonexistent/x: No such file or directory",
        ),
        (
            "log_outputs = \"1:file:/nonexistent/x\"",
            "LIBVIRT_DEBUG",
            "",
            "failed to open /nonexistent/x: No such file or directory",
        ),
    ];
    for (line, name, value, sentence) in cases {
        std::fs::write(namespace.path(config), format!("{line}\n# end\n")).expect("write");
        let (code, stderr) = refused_start(&namespace, &["-f", config], &[(name, value)]);
        assert_eq!(code, Some(1), "{line} {name}={value}: {stderr}");
        assert_eq!(stderr, format!("libvirt:  error : {sentence}\n"));
    }
}

#[test]
fn without_a_terminal_errors_go_to_the_journal_with_libvirts_fields() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let journal = journal_socket(&namespace);
    let daemon = Daemon::start(&namespace, &[], &[]);
    refused_call(&mut daemon.client());
    let mut introduction = Vec::new();
    let mut bytes = [0; 65536];
    let fields = loop {
        let length = journal.recv(&mut bytes).expect("a datagram");
        let fields = String::from_utf8_lossy(&bytes[..length]).into_owned();
        if fields.contains("\nPRIORITY=3\n") {
            break fields;
        }
        introduction.push(fields);
    };
    assert!(introduction[0].contains("version: "), "{introduction:?}");
    assert!(introduction[1].starts_with("MESSAGE=hostname: "));
    for name in [
        "SYSLOG_FACILITY=3\n",
        "LIBVIRT_SOURCE=",
        "CODE_FILE=",
        "CODE_LINE=",
        "CODE_FUNC=",
        "LIBVIRT_DOMAIN=",
        "LIBVIRT_CODE=",
    ] {
        assert!(fields.contains(&format!("\n{name}")), "{name} in {fields}");
    }
}

#[test]
fn a_journal_that_nobody_reads_stops_nothing() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let _unread = journal_socket(&namespace);
    let outputs = [
        ("LIBVIRT_DEBUG", "1"),
        ("LIBVIRT_LOG_OUTPUTS", "1:journald"),
    ];
    let daemon = Daemon::start(&namespace, &["-v"], &outputs);
    let mut client = daemon.client();
    for _ in 0..2000 {
        refused_call(&mut client);
    }
}

#[test]
fn a_log_fifo_stops_nothing_and_tells_of_lost_lines_when_it_is_read_again() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let path = namespace.path("/run/fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let outputs = [("LIBVIRT_LOG_OUTPUTS", "1:file:/run/fifo")];
    let daemon = Daemon::start(&namespace, &[], &outputs);
    let mut client = daemon.client();
    refused_call(&mut client);
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .expect("open the fifo for reading");
    for _ in 0..5000 {
        refused_call(&mut client);
    }
    let mut log = Vec::new();
    wait_until(DEADLINE, "a line about lost lines", || {
        // The end of what is in the fifo now is an error, and what was read is kept.
        let _ = std::io::Read::read_to_end(&mut reader, &mut log);
        refused_call(&mut client);
        String::from_utf8_lossy(&log).contains(" log lines were lost: ")
    });
    let log = String::from_utf8(log).expect("text");
    for line in log.lines() {
        assert!(line.starts_with("20") && line.contains("+0000: "), "{line}");
    }
}

/// The texts of a log file.
fn texts(path: &Path) -> Vec<String> {
    let log = std::fs::read_to_string(path).expect("read the log");
    log.lines()
        .filter_map(|line| line.split(" : ").last())
        .map(str::to_owned)
        .collect()
}

// The only test here that installs the log of this process.
#[test]
fn the_installed_log_is_exchanged_while_it_runs() {
    let directory = TempDir::new();
    let base: PathBuf = directory.path().canonicalize().expect("a real path");
    log::install(log::Settings::initial()).expect("stderr");
    assert_eq!(
        (log::outputs(), log::filters()),
        ("3:stderr".into(), String::new())
    );

    let configured = log::Configured {
        level: 4,
        filters: Some("2:chatty"),
        outputs: Some("1:file:first"),
    };
    let mode = log::RunMode {
        verbose: false,
        background: true,
        stdin_is_tty: false,
        journal_writable: false,
        log_file: &base.join("default"),
        directory: &base,
    };
    let settings = log::resolve(configured, &log::Environment::default(), mode).expect("settings");
    log::install(settings).expect("the file");
    let speak = |number: u32| {
        info!(target: "chatty.one", "info {number}");
        warn!(target: "other", "warning {number}");
        error!(target: "other", "error {number}");
    };
    speak(1);
    log::set_filters("").expect("filters");
    speak(2);
    log::set_filters("1:+").expect_err("malformed");
    log::set_outputs("2:file:second", &base).expect("outputs");
    log::set_outputs("2:file:none/second", &base).expect_err("no directory");
    log::set_level(log::Level::Info);
    log::stderr_was_replaced();
    speak(3);
    log::set_outputs("", &base).expect("the default output");
    speak(4);

    assert_eq!(
        texts(&base.join("first"))[2..],
        ["info 1", "error 1", "error 2"]
    );
    assert_eq!(
        texts(&base.join("second"))[2..],
        ["info 3", "warning 3", "error 3"]
    );
    assert_eq!(texts(&base.join("default"))[2..], ["error 4"]);
    assert_eq!(log::outputs(), format!("4:file:{}/default", base.display()));
}
