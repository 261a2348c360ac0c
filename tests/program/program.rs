//! The program around the reactor, as scripts and service managers see it: options, configuration,
//! paths, pid file, sockets, activation, notification, the background. Where libvirt's own daemon
//! is installed, what it says about options and configuration files is what ours has to say.

use crate::support;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::client::{
    AUTOCREATE, Client, DOMAIN_LOCKSPACE, RESOURCE_BUSY, SHARED, acquire, create_lockspace,
    delete_resource, register,
};
use crate::support::daemon::{ADMIN_SOCKET, Daemon, LOCK_SOCKET, c_daemon, program};
use crate::support::namespace::Namespace;
use crate::support::{DEADLINE, lock_probe, require_root, skip, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PID_FILE: &str = "/run/virtlockd.pid";
/// A pid file that cannot be made: it ends a start that has got past its configuration.
const NO_PID_FILE: [&str; 2] = ["-p", "/nonexistent/virtlockd.pid"];
/// An ordinary user, who owns nothing on the host.
const USER: u32 = 65534;

/// What a start that failed, or that had nothing to do, left behind.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    /// Without the two lines that introduce the daemon, and without time, pid and place.
    stderr: String,
}

fn run(program: &Path, namespace: &Namespace, args: &[&str]) -> Ended {
    let mut daemon = Daemon::spawn(program, namespace, args, &[]);
    let code = daemon.wait_end().code();
    let name = program.display().to_string();
    Ended {
        code,
        stdout: daemon.stdout(),
        stderr: plain(&daemon.stderr()).replace(&name, "NAME"),
    }
}

/// Log lines reduced to their texts.
fn plain(stderr: &str) -> String {
    let mut text = String::new();
    for line in stderr.lines().filter(|line| !line.contains(": info : ")) {
        let message = line
            .split_once(": error : ")
            .and_then(|(_, rest)| Some(rest.split_once(" : ")?.1))
            .unwrap_or(line);
        text.push_str(message);
        text.push('\n');
    }
    text
}

/// Our daemon's refusal: its exit code and the one line it says.
fn refused(namespace: &Namespace, args: &[&str]) -> (Option<i32>, String) {
    let ended = run(&program(), namespace, args);
    (ended.code, ended.stderr.trim_end().to_owned())
}

/// The C daemon, or a skip.
fn reference() -> Option<PathBuf> {
    let found = c_daemon();
    if found.is_none() {
        skip("needs libvirt's virtlockd to compare with");
    }
    found
}

#[test]
fn options_are_read_as_the_c_daemon_reads_them() {
    if !require_root() {
        return;
    }
    let Some(reference) = reference() else { return };
    let namespace = Namespace::new();
    let words: &[&[&str]] = &[
        &["--x"],
        &["-x"],
        &["-dx"],
        &["-t"],
        &["--ti"],
        &["--conf"],
        &["-vf"],
        &["--ver"],
        &["--v=1"],
        &["--="],
        &["--vers=3"],
        &["--daemo=1"],
        &["-v-"],
        &["-:"],
        &["-x", "-t", "abc"],
        &["-t", "abc", "-x"],
        &["-t", "abc", "-V"],
        &["-t", "-1", "-V"],
        &["-t", "", "-V"],
        &["--timeout=", "-V"],
        &["-t", "2147484", "-V"],
        &["-t", "--", "-V"],
        &["-f", "-V"],
        &["-f", ""],
        &["-f", "/run"],
        &["-f", "first", "-f", "second"],
        &["-f/nonexistent/file"],
        &["word", "-f", "nothing", "word"],
    ];
    for args in words {
        let theirs = without_usage(run(&reference, &namespace, args));
        assert_eq!(theirs.code, Some(1), "{args:?}");
        assert_eq!(
            without_usage(run(&program(), &namespace, args)),
            theirs,
            "{args:?}"
        );
    }
}

/// The wording of the option list is ours, its beginning and its paths are not.
fn without_usage(mut ended: Ended) -> Ended {
    if let Some((before, usage)) = ended.stderr.split_once("Options:\n") {
        let paths = usage
            .split_once("Default paths:")
            .expect("a list of paths")
            .1;
        ended.stderr = format!("{before}{paths}");
    }
    ended
}

#[test]
fn help_goes_to_stderr_and_the_version_to_stdout() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    for args in [
        ["-h"].as_slice(),
        &["-vhx"],
        &["--he"],
        &["word", "-t5x", "--help"],
    ] {
        let ended = run(&program(), &namespace, args);
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (Some(0), ""),
            "{args:?}"
        );
        assert!(
            ended.stderr.starts_with("\nUsage:\n  NAME [options]\n"),
            "{}",
            ended.stderr
        );
        assert!(
            ended.stderr.contains("      /run/libvirt/virtlockd-sock\n"),
            "{}",
            ended.stderr
        );
        if let Some(reference) = c_daemon() {
            assert_eq!(
                without_usage(ended),
                without_usage(run(&reference, &namespace, args)),
                "{args:?}"
            );
        }
    }
    for args in [
        ["-V"].as_slice(),
        &["-vVx"],
        &["--vers", "-t", "abc"],
        &["-t", " 7 ", "-V"],
    ] {
        let ended = run(&program(), &namespace, args);
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(0), ""),
            "{args:?}"
        );
        let name = program().display().to_string();
        let (before, _version) = ended.stdout.rsplit_once(' ').expect("a version");
        assert!(
            before == format!("{name} (virtlockd-rs)") || before == format!("{name} (libvirt)")
        );
    }
}

#[test]
fn configuration_errors_are_those_of_the_c_daemon() {
    if !require_root() {
        return;
    }
    let Some(reference) = reference() else { return };
    let namespace = Namespace::new();
    let file = "/run/test.conf";
    for text in [
        "max_clients = 3",
        "max_clients = 3\nmax_clients = \"x\"",
        "max_clients = \"x\"",
        "max_clients = -1",
        "max_clients = [1]",
        "max_clients = 4294967296",
        "max_clients = 9223372036854775808",
        "admin_max_clients = 'x'\nmax_clients = 'x'",
        "log_filters = 1",
        "log_outputs = [1]",
        "log_level = 'x'",
        "",
        "# only a comment",
        " ",
        "\n\n",
        "a",
        "a =\n1",
        "a = 1 b = 2",
        "a = 1;b = 2;",
        "a = 1;;",
        "\n;",
        "a = 0x10",
        "a = [1, [2], ]",
        "a = [1,\n\nx]",
        "a = [1 2]",
        "a = [",
        "a = '1\n'",
        "a = \"\"\"\n\n\"\"\"\n5",
        "a = \"\"\"\"\"\"",
        "a = --1",
        "1a = 1",
    ] {
        std::fs::write(namespace.path(file), text).expect("write the configuration");
        let args = ["-f", file, NO_PID_FILE[0], NO_PID_FILE[1]];
        let theirs = run(&reference, &namespace, &args);
        assert_eq!(theirs.code, Some(1), "{text:?}");
        assert_eq!(run(&program(), &namespace, &args), theirs, "{text:?}");
    }
}

#[test]
fn the_pid_file_holds_the_pid_and_keeps_a_second_daemon_away() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    // What a daemon that was killed leaves behind stops nobody.
    std::fs::write(namespace.path(PID_FILE), "1234567890").expect("write a stale pid file");
    let mut daemon = Daemon::start(&namespace, &[], &[]);
    let written = std::fs::read_to_string(namespace.path(PID_FILE)).expect("read the pid file");
    assert_eq!(written, daemon.pid().to_string());
    let text = "Failed to acquire pid file '/run/virtlockd.pid': Resource temporarily unavailable";
    assert_eq!(refused(&namespace, &[]), (Some(1), text.to_owned()));
    UnixStream::connect(daemon.lock_socket()).expect("the first daemon still serves");
    assert_eq!(daemon.stop().code(), Some(0));
    assert!(!namespace.path(PID_FILE).exists());
}

#[test]
fn a_pid_file_can_be_named_left_out_or_impossible() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let mut named = Daemon::start(&namespace, &["--pid=/run/other.pid"], &[]);
    let written = std::fs::read_to_string(namespace.path("/run/other.pid")).expect("a pid file");
    assert_eq!(written, named.pid().to_string());
    assert!(!namespace.path(PID_FILE).exists());
    named.stop();
    assert!(!namespace.path("/run/other.pid").exists());

    let mut without = Daemon::start(&namespace, &["-p", ""], &[]);
    assert!(!namespace.path(PID_FILE).exists());
    without.stop();

    let text = "Failed to open pid file '/nonexistent/virtlockd.pid': No such file or directory";
    assert_eq!(
        refused(&namespace, &NO_PID_FILE),
        (Some(1), text.to_owned())
    );
    let text = "Failed to open pid file '/run': Is a directory";
    assert_eq!(
        refused(&namespace, &["-p", "/run"]),
        (Some(1), text.to_owned())
    );
}

#[test]
fn the_sockets_are_for_their_user_only_and_go_at_a_clean_end() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let mut daemon = Daemon::start(&namespace, &[], &[]);
    daemon.wait_for_socket(&namespace.path(ADMIN_SOCKET));
    for path in [LOCK_SOCKET, ADMIN_SOCKET] {
        let file = std::fs::symlink_metadata(namespace.path(path)).expect("a socket");
        assert!(file.file_type().is_socket());
        assert_eq!(
            (file.mode() & 0o7777, file.uid(), file.gid()),
            (0o700, 0, 0)
        );
    }
    daemon.stop();
    for path in [LOCK_SOCKET, ADMIN_SOCKET] {
        assert!(!namespace.path(path).exists());
    }
}

#[test]
fn what_a_killed_daemon_leaves_behind_is_replaced() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let mut killed = Daemon::start(&namespace, &[], &[]);
    wait_until(DEADLINE, "the admin socket", || {
        namespace.path(ADMIN_SOCKET).exists()
    });
    killed.kill();
    for path in [LOCK_SOCKET, ADMIN_SOCKET, PID_FILE] {
        assert!(namespace.path(path).exists(), "{path} is gone");
    }
    Daemon::start(&namespace, &[], &[]);
    // A file that is no socket is in nobody's use either.
    std::fs::remove_file(namespace.path(LOCK_SOCKET)).expect("remove the socket");
    std::fs::write(namespace.path(LOCK_SOCKET), "").expect("write a file in its place");
    Daemon::start(&namespace, &[], &[]);
}

#[test]
fn a_second_daemon_never_takes_over_a_live_ones_socket() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let mut daemon = Daemon::start(&namespace, &[], &[]);
    let (code, text) = refused(&namespace, &["-p", "/run/other.pid"]);
    assert_eq!(code, Some(6));
    assert!(
        text.starts_with("Failed to bind socket to '/run/libvirt/virtlockd-sock': another program"),
        "{text}"
    );
    assert!(!namespace.path("/run/other.pid").exists());
    UnixStream::connect(daemon.lock_socket()).expect("the first daemon still serves");
    daemon.stop();
}

#[test]
fn of_daemons_that_start_at_the_same_time_one_serves() {
    if !require_root() {
        return;
    }
    for _ in 0..5 {
        let namespace = Namespace::new();
        let mut daemons: Vec<Daemon> = (0..4)
            .map(|number| {
                let pid_file = format!("/run/{number}.pid");
                Daemon::spawn(&program(), &namespace, &["-p", &pid_file], &[])
            })
            .collect();
        wait_until(DEADLINE, "all but one to give up", || {
            daemons.retain_mut(|daemon| match daemon.ended() {
                Some(status) => {
                    assert_eq!(status.code(), Some(6), "{}", daemon.stderr());
                    false
                }
                None => true,
            });
            daemons.len() <= 1
        });
        let served = daemons.first_mut().expect("one daemon left");
        served.wait_for_socket(&namespace.path(LOCK_SOCKET));
        served.wait_for_socket(&namespace.path(ADMIN_SOCKET));
        assert_eq!(served.stop().code(), Some(0));
    }
}

#[test]
fn the_units_listen_where_clients_look() {
    for (unit, path) in [
        (include_str!("../../src/dist/virtlockd.socket"), LOCK_SOCKET),
        (
            include_str!("../../src/dist/virtlockd-admin.socket"),
            ADMIN_SOCKET,
        ),
    ] {
        assert!(
            unit.lines()
                .any(|line| line == format!("ListenStream={path}")),
            "{unit}"
        );
    }
}

#[test]
fn a_socket_that_cannot_be_made_ends_the_start() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    for path in [LOCK_SOCKET, ADMIN_SOCKET] {
        std::fs::create_dir(namespace.path(path)).expect("make a directory in the way");
        let text = format!("Failed to bind socket to '{path}': Address already in use");
        assert_eq!(refused(&namespace, &[]), (Some(6), text));
        assert!(!namespace.path(PID_FILE).exists());
        std::fs::remove_dir(namespace.path(path)).expect("clear the way");
    }
}

#[test]
fn a_start_that_fails_for_want_of_descriptors_leaves_nothing_behind() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let mut failed_at_its_sockets = 0;
    // Fewer than a daemon without clients needs.
    for count in 6..=10 {
        let limit = format!("--nofile={count}:{count}");
        let program = program();
        let words = [&limit, program.to_str().expect("a path in UTF-8")];
        let mut daemon = Daemon::spawn(Path::new("prlimit"), &namespace, &words, &[]);
        let code = daemon.wait_end().code();
        failed_at_its_sockets += usize::from(code == Some(6));
        let left = std::fs::read_dir(namespace.path("/run/libvirt")).expect("the run directory");
        let left: Vec<_> = left.flatten().map(|entry| entry.file_name()).collect();
        assert!(left.is_empty(), "limit {count}, exit {code:?}: {left:?}");
        assert!(!namespace.path(PID_FILE).exists(), "limit {count}");
    }
    assert!(failed_at_its_sockets > 0, "no start failed there");
}

#[test]
fn the_run_directory_is_made_or_the_start_ends() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let directory = namespace.path("/run/libvirt");
    std::fs::remove_dir(&directory).expect("remove the run directory");
    Daemon::start(&namespace, &[], &[]).stop();
    assert_eq!(
        std::fs::metadata(&directory).expect("a directory").mode() & 0o7777,
        0o755
    );

    std::fs::remove_dir_all(&directory).expect("remove the run directory");
    std::fs::write(&directory, "").expect("put a file in its place");
    let text = "unable to create rundir /run/libvirt: Not a directory".to_owned();
    assert_eq!(refused(&namespace, &[]), (Some(2), text));
}

/// A daemon of an ordinary user with nothing but these variables in its environment.
struct UsersDaemon(Child);

impl UsersDaemon {
    fn start(namespace: &Namespace, variables: &[&str], socket: &str) -> Self {
        // The place where the program was built may be closed to other users.
        let copy = "/run/program";
        support::install_program(program(), namespace.path(copy));
        let child = namespace
            .command("setpriv")
            .args([
                &format!("--reuid={USER}"),
                &format!("--regid={USER}"),
                "--clear-groups",
            ])
            .args(["env", "-i"])
            .args(variables)
            .arg(copy)
            .stdin(Stdio::null())
            .spawn()
            .expect("start a user's daemon");
        let mut daemon = Self(child);
        wait_until(DEADLINE, socket, || {
            assert!(
                daemon.0.try_wait().expect("ask for its status").is_none(),
                "it ended"
            );
            namespace.path(socket).exists()
        });
        daemon
    }
}

impl Drop for UsersDaemon {
    fn drop(&mut self) {
        // It is not waited for before: the number is its own.
        if let Some(main) = support::daemon::Main::of(self.0.id().cast_signed()) {
            main.kill_all();
        }
        let _ = self.0.wait();
    }
}

#[test]
fn an_ordinary_users_daemon_keeps_to_the_users_directories() {
    if !require_root() {
        return;
    }
    for (variables, run_directory) in [
        (
            ["HOME=/run/user", "XDG_RUNTIME_DIR=/run/user/r"].as_slice(),
            "/run/user/r/libvirt",
        ),
        (
            &["HOME=/run/user", "XDG_CACHE_HOME=/run/user/k"],
            "/run/user/k/libvirt",
        ),
        (
            &["HOME=/run/user", "XDG_RUNTIME_DIR=", "XDG_CACHE_HOME="],
            "/run/user/.cache/libvirt",
        ),
    ] {
        let namespace = Namespace::new();
        let home = namespace.path("/run/user");
        std::fs::create_dir(&home).expect("make a home directory");
        std::os::unix::fs::chown(&home, Some(USER), Some(USER)).expect("give it to the user");
        let lock_socket = format!("{run_directory}/virtlockd-sock");
        let admin_socket = format!("{run_directory}/virtlockd-admin-sock");
        let daemon = UsersDaemon::start(&namespace, variables, &admin_socket);
        assert!(namespace.path(&lock_socket).exists(), "{variables:?}");
        let directory = std::fs::metadata(namespace.path(run_directory)).expect("a directory");
        assert_eq!((directory.mode() & 0o7777, directory.uid()), (0o700, USER));
        let pid = std::fs::read_to_string(namespace.path(format!("{run_directory}/virtlockd.pid")));
        assert_eq!(pid.expect("a pid file"), daemon.0.id().to_string());
    }
}

/// A daemon that a service manager starts with these sockets, as descriptors 3 and 4.
fn activated(
    namespace: &Namespace,
    sockets: Vec<UnixListener>,
    variables: &[(&str, &str)],
) -> Child {
    // Standard input and output carry the sockets across the fork, where no other test's child can
    // inherit them; the shell moves them to where they belong and becomes the daemon.
    let moves = match sockets.len() {
        1 => "exec 3<&0 0</dev/null 1>/dev/null",
        _ => "exec 3<&0 4<&1 0</dev/null 1>/dev/null",
    };
    let script = format!("{moves}; LISTEN_PID=${{LISTEN_PID:-$$}}; export LISTEN_PID; exec \"$@\"");
    let mut sockets = sockets
        .into_iter()
        .map(|socket| Stdio::from(OwnedFd::from(socket)));
    let command = namespace.command(program());
    Command::new("sh")
        .args(["-c", &script, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .env_remove("LISTEN_PID")
        .env("LIBVIRT_LOG_OUTPUTS", "3:file:/run/log")
        .envs(variables.iter().copied())
        .stdin(sockets.next().unwrap_or_else(Stdio::null))
        .stdout(sockets.next().unwrap_or_else(Stdio::null))
        .spawn()
        .expect("start sh with the daemon")
}

fn listener(namespace: &Namespace, path: &str) -> UnixListener {
    UnixListener::bind(namespace.path(path)).expect("bind an activation socket")
}

fn end(mut child: Child) -> Option<i32> {
    // A pid that belongs to a child not yet waited for.
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid is an i32"));
    kill(pid, Signal::SIGTERM).expect("end the daemon");
    wait_for(DEADLINE, "the end of the daemon", || {
        child.try_wait().expect("its status")
    })
    .code()
}

#[test]
fn activation_sockets_are_served_by_name_and_left_in_place() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let notified = notifications(&namespace);
    let sockets = vec![
        listener(&namespace, "/run/a"),
        listener(&namespace, "/run/l"),
    ];
    let names = "virtlockd-admin.socket:virtlockd.socket";
    let variables = [
        ("LISTEN_FDS", "2"),
        ("LISTEN_FDNAMES", names),
        ("NOTIFY_SOCKET", "/run/notify"),
    ];
    let daemon = activated(&namespace, sockets, &variables);
    assert_eq!(next_notification(&notified), "READY=1");
    Client::connect(&namespace.path("/run/l")).ping();
    for path in [LOCK_SOCKET, ADMIN_SOCKET] {
        assert!(!namespace.path(path).exists(), "{path} was made");
    }
    assert_eq!(end(daemon), Some(0));
    for path in ["/run/a", "/run/l"] {
        assert!(namespace.path(path).exists(), "{path} was removed");
    }
}

#[test]
fn one_activation_socket_means_that_the_other_one_is_not_wanted() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let notified = notifications(&namespace);
    let variables = [
        ("LISTEN_FDS", "1"),
        ("LISTEN_FDNAMES", "virtlockd.socket"),
        ("NOTIFY_SOCKET", "/run/notify"),
    ];
    let daemon = activated(&namespace, vec![listener(&namespace, "/run/l")], &variables);
    assert_eq!(next_notification(&notified), "READY=1");
    assert!(!namespace.path(ADMIN_SOCKET).exists());
    assert_eq!(end(daemon), Some(0));
}

#[test]
fn an_activation_descriptor_without_a_known_name_ends_the_start() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let sockets = vec![
        listener(&namespace, "/run/l"),
        listener(&namespace, "/run/x"),
    ];
    let variables = [
        ("LISTEN_FDS", "2"),
        ("LISTEN_FDNAMES", "virtlockd.socket:other"),
    ];
    let mut daemon = activated(&namespace, sockets, &variables);
    let status = wait_for(DEADLINE, "the end", || {
        daemon.try_wait().expect("its status")
    });
    assert_eq!(status.code(), Some(6));
    let log = std::fs::read_to_string(namespace.path("/run/log")).expect("a log");
    assert!(
        log.contains("Some activation file descriptors are unclaimed"),
        "{log}"
    );
}

#[test]
fn activation_that_is_not_for_this_process_or_makes_no_sense_is_passed_over() {
    if !require_root() {
        return;
    }
    for variables in [
        [
            ("LISTEN_FDS", "1"),
            ("LISTEN_FDNAMES", "virtlockd.socket"),
            ("LISTEN_PID", "1"),
        ],
        [
            ("LISTEN_FDS", "x"),
            ("LISTEN_FDNAMES", "virtlockd.socket"),
            ("A", ""),
        ],
        [
            ("LISTEN_FDS", "1"),
            ("LISTEN_FDNAMES", "virtlockd.socket:other"),
            ("A", ""),
        ],
        [("LISTEN_FDS", "1"), ("A", ""), ("B", "")],
    ] {
        let namespace = Namespace::new();
        let daemon = activated(&namespace, vec![listener(&namespace, "/run/l")], &variables);
        wait_until(DEADLINE, "own sockets", || {
            UnixStream::connect(namespace.path(LOCK_SOCKET)).is_ok()
        });
        assert_eq!(end(daemon), Some(0), "{variables:?}");
    }
}

fn notifications(namespace: &Namespace) -> UnixDatagram {
    let socket = UnixDatagram::bind(namespace.path("/run/notify")).expect("bind a socket");
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("set a deadline");
    socket
}

fn next_notification(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let length = socket
        .recv(&mut buffer)
        .expect("a notification before the deadline");
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

#[test]
fn the_service_manager_hears_of_the_start_and_of_the_end() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let notified = notifications(&namespace);
    let mut daemon = Daemon::start(&namespace, &[], &[("NOTIFY_SOCKET", "/run/notify")]);
    assert_eq!(next_notification(&notified), "READY=1");
    daemon.stop();
    assert_eq!(next_notification(&notified), "STOPPING=1");
}

#[test]
fn a_service_manager_that_does_not_listen_stops_nothing() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    for socket in ["/run/nothing", "@virtlockd-test-nothing", "relative", ""] {
        let mut daemon = Daemon::start(&namespace, &[], &[("NOTIFY_SOCKET", socket)]);
        assert_eq!(daemon.stop().code(), Some(0), "{socket:?}");
    }
}

/// A daemon in the background, ended with the test.
struct Background {
    pid: Pid,
}

impl Background {
    fn of(namespace: &Namespace) -> Self {
        let text = std::fs::read_to_string(namespace.path(PID_FILE)).expect("read the pid file");
        Self {
            pid: Pid::from_raw(text.parse().expect("a number in the pid file")),
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGTERM);
    }
}

/// Starts with `-d`: the exit code of the process that was started, and what it said.
fn start_in_background(namespace: &Namespace, args: &[&str]) -> (Option<i32>, String) {
    let args: Vec<&str> = ["-d"].into_iter().chain(args.iter().copied()).collect();
    let outputs = [("LIBVIRT_LOG_OUTPUTS", "3:file:/run/log")];
    let mut parent = Daemon::spawn(&program(), namespace, &args, &outputs);
    let code = parent.wait_end().code();
    (
        code,
        parent
            .stderr()
            .replace(&program().display().to_string(), "NAME"),
    )
}

#[test]
fn a_daemon_in_the_background_serves_when_its_parent_comes_back() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    // A relative pid file is relative to `/`, wherever the daemon was started.
    let started = start_in_background(&namespace, &["-p", "run/virtlockd.pid"]);
    assert_eq!(started, (Some(0), String::new()));
    UnixStream::connect(namespace.path(LOCK_SOCKET)).expect("it serves");
    let daemon = Background::of(&namespace);
    assert_eq!(
        std::fs::read_link(daemon.proc("cwd")).expect("cwd"),
        Path::new("/")
    );
    for descriptor in ["fd/0", "fd/1", "fd/2"] {
        let open = std::fs::read_link(daemon.proc(descriptor)).expect("a descriptor");
        assert_eq!(open, Path::new("/dev/null"));
    }
    let session = nix::unistd::getsid(Some(daemon.pid)).expect("its session");
    assert_ne!(
        session, daemon.pid,
        "a session leader can get a terminal back"
    );
    assert_ne!(session, nix::unistd::getsid(None).expect("our session"));
    kill(daemon.pid, Signal::SIGTERM).expect("end it");
    wait_until(DEADLINE, "the pid file to go", || {
        !namespace.path(PID_FILE).exists()
    });
}

#[test]
fn a_start_in_the_background_that_fails_is_told_by_its_parent() {
    if !require_root() {
        return;
    }
    let said = |text: &str| {
        let advice = "Check /var/log/messages or run without --daemon for more info.";
        (Some(1), format!("NAME: error: {text}. {advice}\n"))
    };
    let namespace = Namespace::new();
    let mut running = Daemon::start(&namespace, &[], &[]);
    assert_eq!(
        start_in_background(&namespace, &[]),
        said("Unable to obtain pidfile")
    );
    running.stop();
    std::fs::create_dir(namespace.path(ADMIN_SOCKET)).expect("put a directory in the way");
    assert_eq!(
        start_in_background(&namespace, &[]),
        said("Unable to initialize network sockets")
    );
    assert!(!namespace.path(PID_FILE).exists());
}

#[test]
fn the_descriptor_limit_is_raised_as_far_as_it_goes() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let child = namespace
        .command("prlimit")
        .arg("--nofile=64:4096")
        .arg(program())
        .env("LIBVIRT_LOG_OUTPUTS", "3:file:/run/log")
        .stdin(Stdio::null())
        .spawn()
        .expect("start prlimit with the daemon");
    wait_until(DEADLINE, "the daemon", || {
        UnixStream::connect(namespace.path(LOCK_SOCKET)).is_ok()
    });
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).expect("limits");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .expect("a line");
    let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers, ["4096", "4096"]);
    assert_eq!(end(child), Some(0));
}

#[test]
fn a_configuration_file_that_cannot_be_read_ends_the_start() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let file = namespace.path("/run/secret.conf");
    std::fs::write(&file, "").expect("write a file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).expect("close it");
    support::install_program(program(), namespace.path("/run/program"));
    let output = namespace
        .command("setpriv")
        .args([
            &format!("--reuid={USER}"),
            &format!("--regid={USER}"),
            "--clear-groups",
        ])
        .args(["/run/program", "-f", "/run/secret.conf"])
        .stdin(Stdio::null())
        .output()
        .expect("run a user's daemon");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        plain(&String::from_utf8_lossy(&output.stderr)),
        "Can't load config file: Failed to open file '/run/secret.conf': Permission denied: \
         /run/secret.conf\n"
    );
}

/// What stands in the place of a file that is to be read, and what is said of it.
const NOT_TO_BE_READ: [(&str, &str); 5] = [
    ("mkfifo", "It is a FIFO, and only a regular file is read"),
    ("zeros", "It is a device, and only a regular file is read"),
    ("socket", "It is a socket, and only a regular file is read"),
    ("endless", "It is longer than 10485760 bytes"),
    ("directory", "Is a directory"),
];

/// Puts one of [`NOT_TO_BE_READ`] in the place of a file.
fn put(what: &str, path: &Path) {
    let _ = std::fs::remove_file(path);
    match what {
        "mkfifo" => nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("make a FIFO"),
        "zeros" => std::os::unix::fs::symlink("/dev/zero", path).expect("link a device"),
        "socket" => drop(UnixListener::bind(path).expect("make a socket")),
        "endless" => std::fs::File::create(path)
            .and_then(|file| file.set_len(1 << 40))
            .expect("make a file of nothing but a hole"),
        _ => std::fs::create_dir(path).expect("make a directory"),
    }
}

#[test]
fn a_start_and_sighup_never_wait_for_a_configuration_that_is_no_file_with_an_end() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let file = "/run/test.conf";
    let path = namespace.path(file);
    // A link to a file counts as the file.
    std::fs::write(namespace.path("/run/real.conf"), "max_clients = 1\n").expect("write it");
    std::os::unix::fs::symlink("real.conf", &path).expect("link the configuration");
    let daemon = Daemon::start(&namespace, &["-f", file], &[]);
    let mut guest = daemon.client();
    guest.call(&register(4711)).expect_ok();
    for (what, reason) in NOT_TO_BE_READ {
        put(what, &path);
        let error =
            format!("Can't load config file: Failed to read file '{file}': {reason}: {file}");
        let mut other = Daemon::spawn(&program(), &namespace, &["-f", file], &[]);
        assert_eq!(other.wait_end().code(), Some(1), "{what}");
        assert_eq!(plain(&other.stderr()), format!("{error}\n"), "{what}");

        let logged = daemon.stderr().len();
        daemon.signal(Signal::SIGHUP);
        wait_until(DEADLINE, "the refusal of the configuration", || {
            daemon.stderr()[logged..].contains(&error)
        });
        guest.ping();
        let log = daemon.stderr();
        let errors = log[logged..]
            .lines()
            .filter(|line| line.contains(": error :"));
        assert_eq!(errors.count(), 1, "{log}");
        let second = daemon.client().call(&register(4712));
        assert!(!second.is_ok(), "{what}: the limit of before is gone");
    }
}

#[test]
fn a_start_never_waits_for_a_state_document_that_is_no_file_with_an_end() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let document = "/run/virtlockd-restart-exec.json";
    for (what, reason) in NOT_TO_BE_READ {
        put(what, &namespace.path(document));
        let mut daemon = Daemon::spawn(&program(), &namespace, &[], &[]);
        assert!(!daemon.wait_end().success(), "{what}");
        let said = plain(&daemon.stderr());
        // A document may be longer than a configuration.
        let reason = reason.replace("10485760", "268435456");
        let error = format!("Failed to read file '{document}': {reason}\n");
        assert!(said.ends_with(&error), "{what}: {said}");
    }
}

#[test]
fn nobody_can_have_the_pid_file_locked_or_deleted() {
    if !require_root() {
        return;
    }
    let namespace = Namespace::new();
    let daemon = Daemon::start(&namespace, &[], &[]);
    let pid_file = namespace.path(PID_FILE);
    std::fs::hard_link(&pid_file, namespace.path("/run/alias")).expect("link the pid file");
    let mut client = daemon.client();
    client.call(&register(4711)).expect_ok();
    client.call(&create_lockspace("/run")).expect_ok();
    for flags in [0, SHARED, AUTOCREATE] {
        for (space, name) in [
            ("", PID_FILE),
            ("", "/run/alias"),
            ("/run", "virtlockd.pid"),
        ] {
            let reply = client.call(&acquire(space, name, flags));
            reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
            assert!(
                lock_probe(&pid_file).is_some_and(|lock| lock.exclusive),
                "{space} {name} {flags}: the pid file's lock was lost"
            );
        }
    }
    let reply = client.call(&delete_resource("/run", "virtlockd.pid"));
    reply.expect_error(RESOURCE_BUSY, DOMAIN_LOCKSPACE);
    assert!(pid_file.exists());
}
