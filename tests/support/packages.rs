//! Debian packages, built for a test: ours by the one command of the repository, libvirt's put together again of
//! the files and scripts that it has installed.

use super::daemon::program;
use super::{TempDir, install_program, skip};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The name of the package that takes the place of libvirt's daemon.
pub const OURS: &str = "virtlockd-rs";
/// The one for hosts without it.
pub const STANDALONE: &str = "virtlockd-rs-standalone";
/// libvirt's, which bring its daemon and what libvirtd needs to speak to it.
pub const LIBVIRTS: [&str; 2] = ["libvirt-daemon-lock", "libvirt-daemon-plugin-lockd"];

/// The other program.
pub fn virtlockctl() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_virtlockctl"))
}

/// Where packages of one version are.
pub struct Packages {
    folder: TempDir,
    version: String,
}

impl Packages {
    /// Ours as this version, with this program: quickly, without its symbols, and nothing compressed.
    pub fn build(version: &str, program: &Path) -> Packages {
        let folder = TempDir::new();
        let strip = |from: &Path, name: &str| {
            let stripped = folder.path().join(name);
            install_program(from, &stripped);
            // One that is no program stays as it is.
            let _ = Command::new("strip")
                .arg(&stripped)
                .stderr(Stdio::null())
                .status();
            stripped
        };
        let programs = [
            strip(program, "program"),
            strip(virtlockctl(), "virtlockctl"),
        ];
        let quickly = [
            ("DEB_BUILD_OPTIONS", "nostrip noautodbgsym"),
            ("DPKG_DEB_COMPRESSOR_TYPE", "none"),
        ];
        Packages::run(version, programs, folder, &quickly)
    }

    /// As they are for everybody, without those of symbols.
    pub fn build_for_release(version: &str, program: &Path) -> Packages {
        let programs = [program.to_owned(), virtlockctl().to_owned()];
        let without_symbols = [("DEB_BUILD_OPTIONS", "noautodbgsym")];
        Packages::run(version, programs, TempDir::new(), &without_symbols)
    }

    fn run(
        version: &str,
        programs: [PathBuf; 2],
        folder: TempDir,
        more: &[(&str, &str)],
    ) -> Packages {
        let [program, virtlockctl] = programs;
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist/build-deb");
        let output = Command::new(build)
            .args(["--version", version, "--program"])
            .arg(program)
            .arg("--virtlockctl")
            .arg(virtlockctl)
            .arg("--output")
            .arg(folder.path())
            .envs(more.iter().copied())
            .stdin(Stdio::null())
            .output()
            .expect("run build-deb");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        Packages {
            folder,
            version: version.to_owned(),
        }
    }

    /// The file of one of them.
    pub fn file(&self, name: &str) -> PathBuf {
        let architecture = Command::new("dpkg").arg("--print-architecture").output();
        let architecture = architecture.expect("run dpkg").stdout;
        let architecture = String::from_utf8_lossy(&architecture);
        let file = format!("{name}_{}_{}.deb", self.version, architecture.trim());
        self.folder.path().join(file)
    }

    /// What describes all of them.
    pub fn changes(&self) -> PathBuf {
        let mut entries = std::fs::read_dir(self.folder.path()).expect("list the packages");
        let is_it = |path: &PathBuf| path.extension().is_some_and(|it| it == "changes");
        let found = entries.find_map(|entry| Some(entry.ok()?.path()).filter(is_it));
        found.expect("there is a .changes")
    }
}

/// Ours of the program under test, as 1.0, and as 1.1 of a program whose file is another one.
pub fn ours() -> (&'static Packages, &'static Packages) {
    static BUILT: OnceLock<(Packages, Packages)> = OnceLock::new();
    let (one, next) = BUILT.get_or_init(|| {
        (
            Packages::build("1.0", &program()),
            Packages::build("1.1", &program()),
        )
    });
    (one, next)
}

/// libvirt's packages once more, with this behind their version. The daemon's program is another file of the same
/// program.
pub fn libvirts(suffix: &str) -> (TempDir, Vec<PathBuf>) {
    let folder = TempDir::new();
    let files = LIBVIRTS.map(|name| {
        let file = folder.path().join(format!("{name}.deb"));
        let stage = folder.path().join(name);
        let output = Command::new("bash")
            .args(["-c", AGAIN, "again", name, suffix])
            .args([&stage, &file])
            .stdin(Stdio::null())
            .output()
            .expect("run a shell");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {said}");
        file
    });
    (folder, files.to_vec())
}

/// Its arguments: the package, what its version ends with, a folder to work in, the file to make.
const AGAIN: &str = r#"
set -euo pipefail
mkdir -p "$3/DEBIAN"
dpkg-query --listfiles "$1" | while read -r path; do
    if [[ -f $path || -L $path ]]; then
        install -d "$3$(dirname "$path")"
        cp -a "$path" "$3$path"
    fi
done
dpkg-query --status "$1" | sed -e '/^Status:/d' -e "s/^Version: .*/&$2/" \
    -e "s/libvirt-daemon-lock (= \([^)]*\))/libvirt-daemon-lock (= \1$2)/" \
    -e '/^Conffiles:/,/^[^ ]/{/^Conffiles:/d;/^ /d}' >"$3/DEBIAN/control"
for part in conffiles preinst postinst prerm postrm; do
    if [[ -e /var/lib/dpkg/info/$1.$part ]]; then
        cp "/var/lib/dpkg/info/$1.$part" "$3/DEBIAN/$part"
    fi
done
if [[ -e $3/usr/sbin/virtlockd ]]; then
    printf again >>"$3/usr/sbin/virtlockd"
fi
# Their settings are the test's by now, which is nothing to be asked about.
rm -f "$3/etc/default/virtlockd"
if [[ -e $3/DEBIAN/conffiles ]]; then
    sed -i '/default.virtlockd/d' "$3/DEBIAN/conffiles"
fi
dpkg-deb --root-owner-group -Znone --build "$3" "$4" >/dev/null
"#;

/// Whether packages can be built and installed here. A skip and false elsewhere.
pub fn can_run() -> bool {
    let needed = [
        "/usr/bin/dpkg-buildpackage",
        "/usr/bin/dh",
        "/usr/bin/dpkg-divert",
    ];
    for program in needed {
        if !Path::new(program).exists() {
            skip(&format!("needs {program} (tests/run installs it)"));
            return false;
        }
    }
    for name in LIBVIRTS {
        let installed = Command::new("dpkg-query").args(["--status", name]).output();
        if !installed.is_ok_and(|output| output.status.success()) {
            skip(&format!("needs the package {name} (tests/run installs it)"));
            return false;
        }
    }
    if std::env::var_os("VIRTLOCKD_UNDER_TEST").is_some() {
        skip("packages carry our daemon");
        return false;
    }
    super::require_root()
}
