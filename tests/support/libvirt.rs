//! An unmodified libvirtd with real guests, in front of the daemon under test.
//!
//! Each [`Libvirt`] is a host of its own: a mount namespace with empty directories where libvirt
//! keeps its state, a lock daemon, a libvirtd, and the helper process that parents the guests
//! ([`init`]). Guests are described in [`guest`]. Process ids are the machine's, so a test can
//! look at and kill guests from outside.

pub mod guest;
pub mod init;

use super::daemon::Daemon;
use super::namespace::Namespace;
use super::{DEADLINE, TempDir, lock_probe, skip, wait_until};
use guest::Guest;
use init::Init;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

const LIBVIRTD: &str = "/usr/sbin/libvirtd";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Seconds for one virsh command; forty guests that start at once on a small machine need many.
const VIRSH_SECONDS: &str = "120";
/// The ordinary user of a session: "nobody", who has no other processes to disturb.
const SESSION_UID: u32 = 65534;

/// What QEMU's configuration holds in every test: locks through the lock daemon, and nothing of
/// the host that a test machine may lack.
const QEMU_CONF: &str = r#"
lock_manager = "lockd"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
"#;

/// The same where libvirtd is root's.
pub const ROOT_CONFIGURATION: &str = r#"
lock_manager = "lockd"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
user = "root"
group = "root"
"#;

/// QEMU without its own image locks, so that only the lock daemon stands between two guests.
/// libvirt asks the emulator for its abilities too; those calls pass unchanged.
const EMULATOR: &str = r#"#!/bin/bash
arguments=()
for argument in "$@"; do
    arguments+=("${argument//'"driver":"file"'/'"driver":"file","locking":"off"'}")
done
exec /usr/bin/qemu-system-x86_64 "${arguments[@]}"
"#;

/// True where libvirt and QEMU can run. Elsewhere the test is skipped, aloud.
pub fn can_run() -> bool {
    if !super::require_root() {
        return false;
    }
    for program in [LIBVIRTD, QEMU, "/usr/bin/virsh"] {
        if !Path::new(program).exists() {
            skip(&format!("needs {program} (tests/run installs it)"));
            return false;
        }
    }
    true
}

/// libvirtd, its lock daemon and its guests. All of them are killed when this is dropped.
pub struct Libvirt {
    // Fields are dropped in this order: first whatever uses the others.
    init: Init,
    libvirtd: i32,
    lockd: Option<Daemon>,
    namespace: Namespace,
    files: TempDir,
    session: Option<Session>,
}

/// The directories of an ordinary user.
struct Session {
    home: PathBuf,
    program_directory: PathBuf,
}

impl Libvirt {
    /// The system's libvirtd in front of `program`, with `lockd_conf` as `qemu-lockd.conf`.
    pub fn start(program: &Path, lockd_conf: &str) -> Libvirt {
        let namespace = prepared_namespace();
        let etc = namespace.path("/etc/libvirt");
        write(&etc.join("qemu.conf"), ROOT_CONFIGURATION);
        // A file of nothing but blank lines is an error to libvirt.
        let lockd_conf = format!("# Of a test.\n{lockd_conf}\n");
        write(&etc.join("qemu-lockd.conf"), &lockd_conf);
        write(&etc.join("libvirtd.conf"), "log_outputs = \"3:stderr\"\n");
        let lockd = Daemon::start_program(program, &namespace, &[], &[]);
        Libvirt::start_libvirtd(namespace, Some(lockd), TempDir::new(), None)
    }

    /// An ordinary user's libvirtd, which starts `program` itself when it first needs a lock.
    pub fn start_session(program: &Path) -> Libvirt {
        let namespace = prepared_namespace();
        let files = TempDir::new();
        // The program may lie where an ordinary user may not look.
        let program_directory = files.path().join("bin");
        let home = files.path().join("home");
        let configuration = home.join("config/libvirt");
        for directory in [&program_directory, &configuration] {
            std::fs::create_dir_all(directory).expect("make a directory for the session");
        }
        super::install_program(program, program_directory.join("virtlockd"));
        write(&configuration.join("qemu.conf"), QEMU_CONF);
        let log = "log_outputs = \"3:stderr\"\n";
        write(&configuration.join("libvirtd.conf"), log);
        for name in ["run", "cache", "data"] {
            std::fs::create_dir(home.join(name)).expect("make a directory for the session");
        }
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(home.join("run"), private).expect("make the directory private");
        let owned = ["", "run", "cache", "data", "config", "config/libvirt"];
        for directory in owned {
            let id = Some(SESSION_UID);
            std::os::unix::fs::chown(home.join(directory), id, id)
                .expect("give the directory to the user of the session");
        }
        let session = Session {
            home,
            program_directory,
        };
        Libvirt::start_libvirtd(namespace, None, files, Some(session))
    }

    fn start_libvirtd(
        namespace: Namespace,
        lockd: Option<Daemon>,
        files: TempDir,
        session: Option<Session>,
    ) -> Libvirt {
        let init = Init::start(&namespace);
        let mut libvirt = Libvirt {
            init,
            libvirtd: 0,
            lockd,
            namespace,
            files,
            session,
        };
        std::fs::write(libvirt.firmware(), guest::firmware()).expect("write the firmware");
        libvirt.spawn_libvirtd();
        libvirt
    }

    fn spawn_libvirtd(&mut self) {
        let argv = self.as_caller(&[LIBVIRTD]);
        self.libvirtd = self.init.spawn(&self.log(), &argv);
        wait_until(DEADLINE, "an answer of libvirtd", || {
            assert!(
                process_exists(self.libvirtd),
                "libvirtd ended at its start:\n{}",
                self.libvirtd_log()
            );
            self.virsh(&["version"]).is_ok()
        });
    }

    /// Ends libvirtd as a package upgrade does, and starts it again. Guests and locks stay.
    pub fn restart_libvirtd(&mut self) {
        let pid = self.libvirtd;
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("end libvirtd");
        wait_until(DEADLINE, "the end of libvirtd", || !process_exists(pid));
        self.spawn_libvirtd();
    }

    /// The lock daemon that the test started; a session has none.
    pub fn lockd(&mut self) -> &mut Daemon {
        self.lockd.as_mut().expect("a session starts its daemon")
    }

    /// The lock daemon, for a test that looks after it while others use libvirt. It has to be
    /// dropped after the guests are gone, or it takes their locks with it.
    pub fn take_lockd(&mut self) -> Daemon {
        self.lockd.take().expect("a session starts its daemon")
    }

    /// Ends the lock daemon and starts `program` in its place, knowing nothing of the past.
    pub fn replace_lockd(&mut self, program: &Path) {
        self.lockd().stop();
        let fresh = Daemon::start_program(program, &self.namespace, &[], &[]);
        self.lockd = Some(fresh);
    }

    /// Kills the lock daemon as a crash does, and starts `program` in its place.
    pub fn crash_lockd(&mut self, program: &Path) {
        self.lockd().kill();
        self.lockd = Some(Daemon::start_program(program, &self.namespace, &[], &[]));
    }

    /// As [`Libvirt::replace_lockd`], with this configuration.
    pub fn configure_lockd(&mut self, program: &Path, configuration: &str) {
        let etc = self.namespace.path("/etc/libvirt");
        write(&etc.join("virtlockd.conf"), configuration);
        self.replace_lockd(program);
    }

    /// Runs virsh with these words: what it printed, or its error text.
    pub fn virsh(&self, words: &[&str]) -> Result<String, String> {
        let uri = match self.session {
            Some(_) => "qemu:///session",
            None => "qemu:///system",
        };
        let mut argv = self.as_caller(&["timeout", VIRSH_SECONDS, "virsh", "-q", "-c", uri]);
        argv.extend(words.iter().map(|&word| word.to_owned()));
        let mut command = self.namespace.command(&argv[0]);
        let output = isolated(&mut command)
            .args(&argv[1..])
            .stdin(Stdio::null())
            .output()
            .expect("run virsh");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(format!("{} ({})", text(&output.stderr), output.status)),
        }
    }

    /// Starts a guest; it runs when this returns.
    pub fn create(&self, guest: &Guest) -> Result<(), String> {
        // An ordinary user may not have the right to /dev/kvm.
        let kvm = self.session.is_none()
            && std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok();
        let kind = if kvm { "kvm" } else { "qemu" };
        let emulator = match self.session {
            Some(_) => Path::new(QEMU),
            None => emulator(),
        };
        let xml = guest.xml(kind, emulator, &self.firmware());
        self.with_xml("create", &[], &guest.name, &xml)
    }

    /// Ends a guest as if its power was cut.
    pub fn destroy(&self, guest: &str) {
        self.virsh(&["destroy", guest]).expect("destroy a guest");
    }

    /// Plugs a disk into a running guest; see [`guest::plugged_disk_xml`].
    pub fn attach(&self, guest: &str, disk_xml: &str) -> Result<(), String> {
        self.with_xml(
            "attach-device",
            &[guest],
            &format!("{guest}-disk"),
            disk_xml,
        )
    }

    /// Unplugs a disk from a running guest.
    pub fn detach(&self, guest: &str, disk_xml: &str) -> Result<(), String> {
        self.with_xml(
            "detach-device",
            &[guest],
            &format!("{guest}-disk"),
            disk_xml,
        )
    }

    fn with_xml(&self, verb: &str, words: &[&str], name: &str, xml: &str) -> Result<(), String> {
        let file = self.files.path().join(format!("{name}.xml"));
        write(&file, xml);
        let mut line = vec![verb];
        line.extend_from_slice(words);
        line.push(file.to_str().expect("a path in UTF-8"));
        self.virsh(&line).map(drop)
    }

    /// libvirt's word for the state of a guest: "running", "paused", ...
    pub fn state(&self, guest: &str) -> String {
        self.virsh(&["domstate", guest]).expect("ask for a guest")
    }

    /// The pid of a guest's QEMU.
    pub fn guest_pid(&self, guest: &str) -> i32 {
        let directory = match &self.session {
            Some(session) => session.home.join("run/libvirt/qemu/run"),
            None => self.namespace.path("/run/libvirt/qemu"),
        };
        read_pid(&directory.join(format!("{guest}.pid")))
    }

    /// The lock daemon that a session's libvirtd has started: its pid and its command line.
    pub fn session_lockd(&self) -> (i32, Vec<String>) {
        let session = self.session.as_ref().expect("a session");
        let pid = read_pid(&session.home.join("run/libvirt/virtlockd.pid"));
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .expect("read the command line of the lock daemon");
        let words = line.trim_end_matches('\0').split('\0');
        (pid, words.map(str::to_owned).collect())
    }

    /// Where all of it runs.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A directory that is removed at the end. The host and the guests see it at the same path.
    pub fn files(&self) -> &Path {
        self.files.path()
    }

    /// A new raw disk of 1 MiB.
    pub fn disk(&self, name: &str) -> PathBuf {
        let path = self.files.path().join(name);
        let file = std::fs::File::create_new(&path).expect("make a disk");
        file.set_len(1 << 20).expect("give the disk its size");
        if self.session.is_some() {
            std::os::unix::fs::chown(&path, Some(SESSION_UID), Some(SESSION_UID))
                .expect("give the disk to the user of the session");
        }
        path
    }

    /// What libvirtd has logged so far.
    pub fn libvirtd_log(&self) -> String {
        std::fs::read_to_string(self.log()).expect("read the log of libvirtd")
    }

    fn log(&self) -> PathBuf {
        self.files.path().join("libvirtd.log")
    }

    fn firmware(&self) -> PathBuf {
        self.files.path().join("firmware")
    }

    /// These words, for the user who runs libvirtd and virsh.
    fn as_caller(&self, words: &[&str]) -> Vec<String> {
        let mut argv = Vec::new();
        if let Some(session) = &self.session {
            let id = SESSION_UID.to_string();
            let path = |name: &str| session.home.join(name).display().to_string();
            argv.extend(["setpriv", "--reuid", &id, "--regid", &id].map(str::to_owned));
            argv.extend(["--clear-groups", "env", "-i"].map(str::to_owned));
            argv.extend([
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
                format!("HOME={}", session.home.display()),
                format!("XDG_RUNTIME_DIR={}", path("run")),
                format!("XDG_CONFIG_HOME={}", path("config")),
                format!("XDG_CACHE_HOME={}", path("cache")),
                format!("XDG_DATA_HOME={}", path("data")),
                format!("VIRTLOCKD_PATH={}", session.program_directory.display()),
            ]);
        }
        argv.extend(words.iter().map(|&word| word.to_owned()));
        argv
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of libvirtd:\n{}", self.libvirtd_log());
        }
    }
}

/// Does somebody hold a lock on this disk, as another host or program would see it?
pub fn is_locked(disk: &Path) -> bool {
    lock_probe(disk).is_some()
}

/// Waits until nobody holds a lock on these disks.
pub fn wait_until_free(disks: &[PathBuf]) {
    wait_until(DEADLINE, "the end of the locks", || {
        !disks.iter().any(|disk| is_locked(disk))
    });
}

/// A namespace in which libvirt finds all its directories empty, but for its knowledge of QEMU:
/// asking an emulator takes seconds, so what was learned is kept from run to run. (libvirt asks
/// again by itself when the emulator or libvirt has changed.)
///
/// Of libvirt's drivers only QEMU's is there: the others look for devices and networks of the
/// machine, which no test needs, and the one for devices sometimes keeps libvirtd from ending (its
/// thread is never woken; libvirtd gives up after 30 s).
fn prepared_namespace() -> Namespace {
    let namespace = Namespace::new();
    let script = r#"
        set -e
        for name in /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt; do
            mount -t tmpfs tmpfs "$name"
        done
        mkdir -p /var/cache/libvirt/qemu/capabilities
        mount --bind "$1" /var/cache/libvirt/qemu/capabilities
        for drivers in /usr/lib/*/libvirt/connection-driver /usr/lib64/libvirt/connection-driver; do
            [ -d "$drivers" ] || continue
            mkdir /run/drivers
            touch /run/drivers/libvirt_driver_qemu.so
            # A copy would be newer than what libvirt has learned.
            mount --bind "$drivers/libvirt_driver_qemu.so" /run/drivers/libvirt_driver_qemu.so
            mount --rbind /run/drivers "$drivers"
            break
        done
    "#;
    let learned = kept_directory().join("capabilities");
    std::fs::create_dir_all(&learned).expect("make the directory of capabilities");
    let mut command = namespace.command("sh");
    let status = isolated(&mut command)
        .args(["-c", script, "sh"])
        .arg(&learned)
        .status()
        .expect("start a shell to mount in the namespace");
    assert!(status.success(), "mount directories for libvirt: {status}");
    namespace
}

/// The emulator of [`EMULATOR`]. Its path is always the same, because libvirt keeps what it
/// learns of an emulator by its path.
pub fn emulator() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = kept_directory().join("qemu-without-image-locks");
        // Written only when it differs: a new time would make libvirt ask again.
        if std::fs::read_to_string(&path).ok().as_deref() != Some(EMULATOR) {
            std::fs::create_dir_all(kept_directory()).expect("make a directory");
            write(&path, EMULATOR);
            let executable = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(&path, executable).expect("make the emulator executable");
        }
        path
    })
}

/// Where is kept what takes libvirt long to learn.
pub fn kept_directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvirt")
}

/// Without the variables by which a developer may have changed what libvirt does.
fn isolated(command: &mut Command) -> &mut Command {
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    command.env_clear().env("PATH", path).env("LC_ALL", "C")
}

/// True until the process has ended and its parent has noticed.
fn process_exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn read_pid(file: &Path) -> i32 {
    let text = std::fs::read_to_string(file)
        .unwrap_or_else(|error| panic!("read the pid file {}: {error}", file.display()));
    text.trim().parse().expect("a pid file holds a number")
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
}
