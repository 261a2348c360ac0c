//! How libvirt and the host are set up, as `doctor` sees it, in a user's session.

use crate::commands::Scene;
use crate::run::{self, Ran, program};
use crate::support;
use crate::support::daemon::{self, Daemon};
use crate::support::namespace::Namespace;
use crate::support::skip;
use serde_json::Value;
use std::path::Path;

fn doctor(namespace: &Namespace, json: bool) -> Ran {
    let mut command = namespace.command("env");
    command.args([
        "XDG_CONFIG_HOME=/run/config",
        "XDG_RUNTIME_DIR=/run",
        program(),
    ]);
    command.args(["--session", "doctor"]);
    if json {
        command.arg("--json");
    }
    run::of(&mut command)
}

#[track_caller]
fn says(said: &Value, level: &str, words: &str) {
    let findings = said["findings"].as_array().expect("findings").iter();
    let mut of_level = findings.filter(|it| it["level"] == level);
    let says = |it: &Value| it["what"].as_str().expect("a text").contains(words);
    assert!(of_level.any(says), "{level} {words}: {said:#}");
}

#[test]
fn doctor_says_what_is_wrong_and_what_to_do() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let config = scene.namespace.path("/run/config/libvirt");
    std::fs::create_dir_all(&config).expect("make a directory");
    let write = |name: &str, text: &str| {
        std::fs::write(config.join(name), text).expect("write a setting");
    };
    let said = doctor(&scene.namespace, true).json(2);
    says(&said, "bad", "There is no");
    says(&said, "ok", "answers, process");
    says(&said, "ok", "virtlockd-sock is for its owner alone");

    write("qemu.conf", "lock_manager = \"lockd\"\n");
    let said = doctor(&scene.namespace, false);
    assert!(
        said.stdout.lines().all(|line| line.starts_with("ok    ")),
        "{said:?}"
    );
    said.expect(0);

    write("qemu-lockd.conf", "file_lockspace_dir = \"/run/leases\"\n");
    says(
        &doctor(&scene.namespace, true).json(2),
        "bad",
        "/run/leases, is no directory",
    );
    std::fs::create_dir(scene.namespace.path("/run/leases")).expect("make it");
    says(
        &doctor(&scene.namespace, true).json(1),
        "warn",
        "which is this host's alone",
    );
    write("qemu-lockd.conf", "auto_disk_leases = 0\n");
    says(
        &doctor(&scene.namespace, true).json(2),
        "bad",
        "switches automatic leases off",
    );
    write("qemu-lockd.conf", "auto_disk_leases = \n");
    says(
        &doctor(&scene.namespace, true).json(2),
        "bad",
        "configuration file syntax error",
    );
    write("qemu-lockd.conf", "# Nothing.\n");
    write("qemu.conf", "lock_manager = \"other\"\n");
    says(
        &doctor(&scene.namespace, true).json(2),
        "bad",
        "a lock manager 'other'",
    );
    write("qemu.conf", "lock_manager = \"lockd\"\n");

    let socket = scene.namespace.path("/run/libvirt/virtlockd-sock");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&socket, open).expect("open the socket");
    says(
        &doctor(&scene.namespace, true).json(1),
        "warn",
        "may be connected to by others",
    );
    scene.daemon.stop();
    let said = doctor(&scene.namespace, true).json(2);
    says(&said, "bad", "No daemon answers");
}

#[test]
fn doctor_says_that_the_program_was_replaced_and_that_open_files_run_out() {
    if !support::require_root() {
        return;
    }
    if daemon::program().starts_with("/usr") {
        return skip("libvirt's daemon does not say which process it is");
    }
    let namespace = Namespace::new();
    let inside = Path::new("/run/program");
    let install = || {
        let new = namespace.path("/run/program.new");
        std::fs::copy(daemon::program(), &new).expect("copy the program");
        std::fs::rename(&new, namespace.path(inside)).expect("put it in place");
    };
    install();
    let daemon = Daemon::start_program(inside, &namespace, &[], &[]);
    let said = doctor(&namespace, true).json(2);
    says(
        &said,
        "ok",
        "The program that runs is the one installed, /run/program",
    );
    says(&said, "ok", "open files that it may have");
    install();
    let mut prlimit = namespace.command("prlimit");
    let pid = daemon.pid().to_string();
    run::of(prlimit.args(["--nofile=24:24", "--pid", &pid])).expect(0);
    let said = doctor(&namespace, true).json(2);
    says(
        &said,
        "warn",
        "/run/program was replaced since the daemon was started",
    );
    says(
        &said,
        "warn",
        "of 24 open files that it may have: there is no room",
    );
}

#[test]
fn a_shell_completes_commands_options_kinds_and_files() {
    let script = r#"
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_virtlockctl
printf '%s\n' "${COMPREPLY[@]}""#;
    let completed = |words: &[&str]| -> Vec<String> {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/dist/virtlockctl.bash-completion"
        );
        let mut command = std::process::Command::new("bash");
        command
            .args(["-c", script, "bash", file, program()])
            .args(words);
        let said = run::of(&mut command).expect(0);
        said.split_whitespace().map(str::to_owned).collect()
    };
    let commands = [
        "status", "who", "events", "metrics", "audit", "doctor", "exec",
    ];
    assert_eq!(completed(&[""]), commands);
    assert_eq!(completed(&["st"]), ["status"]);
    assert_eq!(completed(&["--json", "me"]), ["metrics"]);
    assert_eq!(completed(&["--socket", "/x", "au"]), ["audit"]);
    assert_eq!(completed(&["events", "--o"]), ["--only"]);
    assert_eq!(
        completed(&["events", "--only", "re"]),
        ["registered", "released", "refused", "recovered"]
    );
    assert_eq!(
        completed(&["exec", "--s"]),
        ["--session", "--socket", "--shared"]
    );
    let files = completed(&["who", "/etc/passw"]);
    assert!(files.contains(&"/etc/passwd".to_owned()), "{files:?}");
}

/// The words of a text that begin so.
fn words_of(text: &str, start: &str) -> Vec<String> {
    let is_part = |it: char| it.is_ascii_lowercase() || it == '-';
    let words = text.split(|it: char| !is_part(it)).map(str::to_owned);
    words
        .filter(|word| word.len() > start.len() && word.starts_with(start))
        .collect()
}

#[test]
fn each_shell_knows_every_command_option_and_kind() {
    let say = |words: &[&str]| {
        let mut command = std::process::Command::new(program());
        run::of(command.args(words)).expect(0)
    };
    let help = say(&["--help"]);
    let commands: Vec<String> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .map(|line| words_of(line, "").remove(0))
        .collect();
    assert_eq!(commands.len(), 7, "{commands:?}");
    let mut words = commands.clone();
    words.extend(words_of(&help, "--"));
    for command in &commands {
        let help = say(&[command, "--help"]);
        words.extend(words_of(
            help.split("\n\n").next().unwrap_or_default(),
            "--",
        ));
    }
    let events = say(&["events", "--help"]);
    let kinds = events
        .split("Kinds:")
        .nth(1)
        .and_then(|it| it.split('.').next());
    words.extend(words_of(kinds.expect("the kinds"), ""));
    for word in ["audit", "--lease", "--version", "recovered"] {
        assert!(words.iter().any(|it| it == word), "{word}: {words:?}");
    }
    for (shell, file) in [
        ("bash", "virtlockctl.bash-completion"),
        ("zsh", "virtlockctl.zsh-completion"),
        ("fish", "virtlockctl.fish"),
    ] {
        let path = format!("{}/src/dist/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).expect("read the completion");
        for word in &words {
            let word = match word.strip_prefix("--").filter(|_| shell == "fish") {
                Some(option) => format!("-l {option}"),
                None => word.clone(),
            };
            assert!(text.contains(&word), "{file} does not know {word}");
        }
        // Where there is such a shell it can read the file.
        let mut command = std::process::Command::new(shell);
        if let Ok(status) = command.args(["-n", &path]).status() {
            assert!(status.success(), "{shell} does not read {file}");
        }
    }
}
