//! What is in the packages: each unit, drop-in, page and document of `src/dist/` where it has to be, and as it is
//! there, so that none can be forgotten in a list of one of them.

use crate::support::packages::{self, OURS, STANDALONE};
use crate::support::{TempDir, skip};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What builds the packages, and is for whoever does.
const OF_THE_BUILD: [&str; 6] = [
    "PACKAGES.md",
    "build-deb",
    "build-rpm",
    "debian",
    "man/differences",
    "virtlockd-rs.spec",
];

/// What libvirt's package has of its own.
const LIBVIRTS: [&str; 5] = [
    "virtlockd-admin.socket",
    "virtlockd.conf",
    "virtlockd.default",
    "virtlockd.service",
    "virtlockd.socket",
];

fn dist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist")
}

/// Everything in `src/dist/` that is for hosts, named from there.
fn for_hosts() -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["", "drop-in", "man"] {
        let entries = std::fs::read_dir(dist().join(folder)).expect("list a folder");
        for entry in entries {
            let name = entry.expect("an entry").file_name();
            let name = Path::new(folder).join(name).display().to_string();
            if !OF_THE_BUILD.contains(&&*name) && !["drop-in", "man"].contains(&&*name) {
                found.push(name);
            }
        }
    }
    found
}

/// Where a host has it, below the root.
fn place(file: &str, package: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let end = name.rsplit('.').next().unwrap_or_default();
    match (file.split('/').next(), end) {
        (Some("drop-in"), _) => {
            let unit = name.trim_end_matches(".conf");
            format!("usr/lib/systemd/system/{unit}.d/virtlockd-rs.conf")
        }
        (Some("man"), section) => format!("usr/share/man/man{section}/{name}"),
        (_, "service" | "socket") => format!("usr/lib/systemd/system/{name}"),
        (_, "md" | "json") => format!("usr/share/doc/{package}/{name}"),
        (_, "bash-completion") => "usr/share/bash-completion/completions/virtlockctl".into(),
        (_, "zsh-completion") => "usr/share/zsh/vendor-completions/_virtlockctl".into(),
        (_, "fish") => format!("usr/share/fish/vendor_completions.d/{name}"),
        (_, "conf") => format!("etc/libvirt/{name}"),
        (_, "default") => "etc/default/virtlockd".into(),
        _ => format!("usr/libexec/virtlockd-rs/{name}"),
    }
}

/// The content of a file, which a package may have compressed.
fn content(path: &Path) -> Option<Vec<u8>> {
    if let Ok(content) = std::fs::read(path) {
        return Some(content);
    }
    let compressed = PathBuf::from(format!("{}.gz", path.display()));
    let output = Command::new("gzip")
        .args(["--decompress", "--stdout"])
        .arg(compressed)
        .output();
    let output = output.expect("run gzip");
    output.status.success().then_some(output.stdout)
}

/// This package, unpacked into this folder, has all that is for it.
#[track_caller]
fn has_everything(
    root: &Path,
    package: &str,
    is_it_for: impl Fn(&str) -> bool,
    elsewhere: &[(&str, &str)],
) {
    let mut count = 0;
    for file in for_hosts() {
        let mut place = place(&file, package);
        for (usual, here) in elsewhere {
            place = place.replace(usual, here);
        }
        let there = content(&root.join(&place));
        if !is_it_for(&file) {
            assert!(there.is_none(), "{package} has {place}");
            continue;
        }
        let ours = std::fs::read(dist().join(&file)).expect("read a file");
        let there = there.unwrap_or_else(|| panic!("{package} has no {place}"));
        assert!(there == ours, "{package} has another {place}");
        count += 1;
    }
    assert!(count > 8, "{count} files");
    let differences = root.join("usr/share/man/man7/virtlockd-differences.7");
    assert!(content(&differences).is_some(), "{package}");
    let version = Command::new(root.join("usr/bin/virtlockctl"))
        .arg("--version")
        .output();
    let version = version.unwrap_or_else(|error| panic!("{package}: virtlockctl: {error}"));
    assert!(version.status.success(), "{package}");
}

fn is_beside_libvirts(file: &str) -> bool {
    !LIBVIRTS.contains(&file)
}

#[test]
fn the_debian_packages_have_every_unit_page_and_document() {
    if !packages::can_run() {
        return;
    }
    let (built, _) = packages::ours();
    for package in [OURS, STANDALONE] {
        let root = TempDir::new();
        let unpacked = Command::new("dpkg-deb")
            .arg("--extract")
            .arg(built.file(package))
            .arg(root.path())
            .status();
        assert!(unpacked.expect("run dpkg-deb").success());
        let alone = |file: &str| !file.starts_with("drop-in/virtlockd");
        if package == OURS {
            has_everything(root.path(), package, is_beside_libvirts, &[]);
        } else {
            has_everything(root.path(), package, alone, &[]);
        }
    }
}

#[test]
fn the_rpm_has_every_unit_page_and_document() {
    if !Path::new("/usr/bin/rpmbuild").exists() {
        return skip("needs rpmbuild (tests/run installs it)");
    }
    let folder = TempDir::new();
    let package = super::rpm::ours("1.0", &folder);
    let script = r#"rpm2archive - <"$1" | tar --extract --gzip --directory "$2""#;
    let root = TempDir::new();
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([&package, root.path()])
        .stdin(Stdio::null())
        .output()
        .expect("run a shell");
    assert!(output.status.success(), "{output:?}");
    let elsewhere = [
        // libvirt's package has a page of that name.
        ("man8/virtlockd.8", "man8/virtlockd-rs.8"),
        ("zsh/vendor-completions", "zsh/site-functions"),
    ];
    has_everything(root.path(), OURS, is_beside_libvirts, &elsewhere);
}
