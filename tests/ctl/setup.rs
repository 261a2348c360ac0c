//! How libvirt and the host are set up, as `doctor` sees it, in a user's session.

use crate::commands::Scene;
use crate::run::{self, Ran, program};
use serde_json::Value;

fn doctor(scene: &Scene, json: bool) -> Ran {
    let mut command = scene.namespace.command("env");
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
    let said = doctor(&scene, true).json(2);
    says(&said, "bad", "There is no");
    says(&said, "ok", "answers, process");
    says(&said, "ok", "virtlockd-sock is for its owner alone");

    write("qemu.conf", "lock_manager = \"lockd\"\n");
    let said = doctor(&scene, false);
    assert!(
        said.stdout.lines().all(|line| line.starts_with("ok    ")),
        "{said:?}"
    );
    said.expect(0);

    write("qemu-lockd.conf", "file_lockspace_dir = \"/run/leases\"\n");
    says(
        &doctor(&scene, true).json(2),
        "bad",
        "/run/leases, is no directory",
    );
    std::fs::create_dir(scene.namespace.path("/run/leases")).expect("make it");
    says(
        &doctor(&scene, true).json(1),
        "warn",
        "which is this host's alone",
    );
    write("qemu-lockd.conf", "auto_disk_leases = 0\n");
    says(
        &doctor(&scene, true).json(2),
        "bad",
        "switches automatic leases off",
    );
    write("qemu-lockd.conf", "auto_disk_leases = \n");
    says(
        &doctor(&scene, true).json(2),
        "bad",
        "configuration file syntax error",
    );
    write("qemu-lockd.conf", "# Nothing.\n");
    write("qemu.conf", "lock_manager = \"other\"\n");
    says(
        &doctor(&scene, true).json(2),
        "bad",
        "a lock manager 'other'",
    );
    write("qemu.conf", "lock_manager = \"lockd\"\n");

    let socket = scene.namespace.path("/run/libvirt/virtlockd-sock");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&socket, open).expect("open the socket");
    says(
        &doctor(&scene, true).json(1),
        "warn",
        "may be connected to by others",
    );
    scene.daemon.stop();
    let said = doctor(&scene, true).json(2);
    says(&said, "bad", "No daemon answers");
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
