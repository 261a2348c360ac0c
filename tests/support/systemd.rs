//! Real systemd as process 1 of namespaces of its own, with our units and nothing else: what it keeps, kills
//! and starts is seen and not assumed. It lives on an overlay of the host's root file system, in a control
//! group below ours, and goes with everything in it when this value is dropped, or the test dies.

use super::owner::Owner;
use super::{DEADLINE, TempDir, skip, wait_for, wait_until};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// The unit of the daemon.
pub const SERVICE: &str = "virtlockd.service";
/// Those of its sockets.
pub const SOCKETS: [&str; 2] = ["virtlockd.socket", "virtlockd-admin.socket"];
/// The oldest systemd whose store outlives a stop.
const OLDEST: u32 = 254;

/// How long systemd may take for what it is asked for, seconds: more than it gives the daemon for a start.
const LONGEST: &str = "120";

/// Whose units the daemon is started by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Units {
    /// Ours, from `src/dist/`.
    Ours,
    /// libvirt's, as they come with it.
    Libvirts,
    /// libvirt's with our drop-ins.
    LibvirtsWithOurs,
    /// Those of the packages that are installed inside, at any time.
    Packages,
}

/// libvirt's units beside those of its lock daemon, and what they name of systemd's.
const LIBVIRT: [&str; 9] = [
    "libvirtd.service",
    "libvirtd.socket",
    "libvirt-guests.service",
    "virt-guest-shutdown.target",
    "virtlogd.service",
    "virtlogd.socket",
    "machine.slice",
    "network.target",
    "remote-fs.target",
];

/// What the stand-ins for libvirt's programs run at their stop.
const ASKS: &str = "/run/asks";
const ASKS_SCRIPT: &str = "#!/bin/sh
: >/run/asks-$1
while [ ! -e /run/answered-$1 ]; do sleep 0.05; done
";

/// A running systemd. It is killed when dropped.
pub struct Systemd {
    holder: Child,
    /// Its number outside.
    pid: i32,
    group: PathBuf,
    files: TempDir,
    /// They end with it.
    machines: Vec<Child>,
}

impl Systemd {
    /// Starts it with these units and this program as the daemon, which does not run yet. `None`, with a skip,
    /// where that cannot be.
    pub fn start(units: Units, program: &Path) -> Option<Systemd> {
        if let Err(reason) = is_possible(units) {
            skip(&reason);
            return None;
        }
        let files = TempDir::new();
        let group = make_group();
        let script = SCRIPT.replace("GROUP", group.to_str().expect("a path is text"));
        let mut holder = Command::new("setpriv")
            // It must not outlive this test, however that ends; and process 1 not the one that made it.
            .args(["--pdeathsig", "KILL", "bash", "-c", &script, "systemd"])
            .arg(files.path())
            .arg(program)
            .arg(std::env::current_exe().expect("the path of this test program"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start a shell for systemd");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("stdout is a pipe");
        let _ = BufReader::new(stdout).read_line(&mut line);
        if line != "made\n" {
            let output = holder.wait_with_output().expect("wait for the shell");
            remove_group(&group);
            skip(&format!(
                "systemd cannot have namespaces of its own here: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ));
            return None;
        }
        let holder_pid = i32::try_from(holder.id()).expect("a pid is an i32");
        let pid = wait_for(DEADLINE, "systemd to be process 1", || child_of(holder_pid));
        let systemd = Systemd {
            holder,
            pid,
            group,
            files,
            machines: Vec::new(),
        };
        systemd.install(units);
        std::fs::write(systemd.path("/run/go"), "").expect("let systemd begin");
        wait_until(DEADLINE, "systemd to be up", || {
            let state = systemd.systemctl(&["is-system-running"]);
            matches!(text(&state.stdout).trim(), "running" | "degraded")
        });
        Some(systemd)
    }

    fn install(&self, units: Units) {
        let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist");
        let copy = |from: &Path, to: &str| {
            let text = std::fs::read(from).unwrap_or_else(|error| panic!("{from:?}: {error}"));
            std::fs::write(self.path(to), text).expect("install a unit");
        };
        for name in [SERVICE].iter().chain(&SOCKETS) {
            let from = match units {
                Units::Ours => dist.join(name),
                Units::Libvirts | Units::LibvirtsWithOurs => libvirts(name),
                Units::Packages => {
                    self.link_units(&[name, &format!("{name}.d")]);
                    continue;
                }
            };
            copy(&from, &format!("/units/{name}"));
        }
        if units == Units::Packages {
            self.link_units(&["virtlockd-shutdown.service"]);
        } else if units != Units::Libvirts {
            copy(
                &dist.join("virtlockd-shutdown.service"),
                "/units/virtlockd-shutdown.service",
            );
        }
        if !matches!(units, Units::Libvirts | Units::Packages) {
            let folder = "/etc/systemd/system/machine-.scope.d";
            std::fs::create_dir_all(self.path(folder)).expect("make a folder for a drop-in");
            let from = dist.join("drop-in/machine-.scope.conf");
            copy(&from, &format!("{folder}/virtlockd.conf"));
        }
        if units == Units::LibvirtsWithOurs {
            for name in [SERVICE].iter().chain(&SOCKETS) {
                let folder = self.path(format!("/etc/systemd/system/{name}.d"));
                std::fs::create_dir_all(folder).expect("make a folder for a drop-in");
                let from = dist.join("drop-in").join(format!("{name}.conf"));
                copy(&from, &format!("/etc/systemd/system/{name}.d/keep.conf"));
            }
        }
        if super::is_sanitized() && matches!(units, Units::Ours | Units::LibvirtsWithOurs) {
            // LeakSanitizer looks at a process by ptrace(2), which no unit needs otherwise. (libvirt's own has no
            // filter, and would allow nothing else with this one.)
            let folder = format!("/run/systemd/system/{SERVICE}.d");
            std::fs::create_dir_all(self.path(&folder)).expect("make a folder for a drop-in");
            let drop_in = "[Service]\nSystemCallFilter=@debug\n";
            let file = format!("{folder}/sanitizer.conf");
            std::fs::write(self.path(file), drop_in).expect("write a drop-in");
        }
        let log = "LIBVIRT_DEBUG=2\nLIBVIRT_LOG_OUTPUTS=2:file:/run/virtlockd.log\n";
        std::fs::write(self.path("/etc/default/virtlockd"), log).expect("say where the log goes");
    }

    /// systemd looks for these where packages have them. (For nothing else there: it would start the host.)
    fn link_units(&self, names: &[&str]) {
        for name in names {
            let to = Path::new("/usr/lib/systemd/system").join(name);
            let link = self.path(format!("/units/{name}"));
            std::os::unix::fs::symlink(to, link).expect("link a unit");
        }
    }

    /// Installs libvirt's other units, as they are ordered, and what they name. In the place of their programs
    /// are some that do nothing, and whose stop waits for an [`Systemd::answer`].
    pub fn add_libvirt(&self) {
        for name in LIBVIRT {
            let text = std::fs::read(libvirts(name)).expect("read a unit of libvirt");
            std::fs::write(self.path(format!("/units/{name}")), text).expect("install a unit");
        }
        let asks = self.path(ASKS);
        std::fs::write(&asks, ASKS_SCRIPT).expect("write a script");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(asks, mode).expect("make a script executable");
        for (unit, settings) in [
            (
                "libvirtd.service",
                "Type=exec\nExecStart=\nExecStart=/bin/sleep infinity\nExecStop=/run/asks daemon\n",
            ),
            (
                "libvirt-guests.service",
                "ExecStart=\nExecStart=/bin/true\nExecStop=\nExecStop=/run/asks guests\n",
            ),
        ] {
            let folder = self.path(format!("/etc/systemd/system/{unit}.d"));
            std::fs::create_dir_all(&folder).expect("make a folder for a drop-in");
            std::fs::write(
                folder.join("stand-in.conf"),
                format!("[Service]\n{settings}"),
            )
            .expect("write a drop-in");
        }
        self.ctl(&["daemon-reload"]);
    }

    /// Starts what stands for a machine, in a scope as libvirt has systemd make one. Its stop waits for an
    /// [`Systemd::answer`].
    pub fn start_machine(&mut self) {
        // systemd signals whatever is in the scope until nobody new is: the shell asks by itself.
        let script = "
            trap '
                trap \"\" TERM
                : >/run/asks-machine
                while [ ! -e /run/answered-machine ]; do sleep 0.05; done
                exit
            ' TERM
            : >/run/machine
            while :; do sleep 0.05; done";
        let mut command = self.command("systemd-run");
        command
            .args(["--scope", "--collect", "--slice=machine.slice"])
            .args(["--unit", r"machine-qemu\x2d1\x2dguest.scope"])
            .args(["-p", "After=libvirtd.service"])
            .args(["-p", "Before=virt-guest-shutdown.target"])
            .args(["sh", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let machine = command.spawn().expect("run systemd-run");
        self.machines.push(machine);
        wait_until(DEADLINE, "the machine to run", || {
            self.path("/run/machine").exists()
        });
    }

    /// Waits until the stop of this one waits for an answer: `guests`, `machine`, `daemon`.
    pub fn await_question(&self, who: &str) {
        wait_until(DEADLINE, &format!("the stop of {who} to begin"), || {
            self.path(format!("/run/asks-{who}")).exists()
        });
    }

    /// The stop of this one goes on.
    pub fn answer(&self, who: &str) {
        std::fs::write(self.path(format!("/run/answered-{who}")), "").expect("answer a stop");
    }

    /// What systemd has to say of one start of everything, with all units that are installed on this machine
    /// instead of the few that are enough for a test.
    pub fn verify(&self) -> String {
        std::fs::create_dir(self.path("/verify")).expect("make a folder for units");
        let names = [
            SERVICE,
            SOCKETS[0],
            SOCKETS[1],
            "virtlockd-shutdown.service",
        ];
        for name in names {
            let text = std::fs::read(self.path(format!("/units/{name}"))).expect("read a unit");
            std::fs::write(self.path(format!("/verify/{name}")), text).expect("write a unit");
        }
        let mut wanted = format!(
            "{} multi-user.target libvirt-guests.service",
            names.join(" ")
        );
        // Where the daemons of the drivers are not installed they are what libvirt makes of the same template.
        let daemon = std::fs::read_to_string(libvirts("libvirtd.service"));
        let daemon = daemon.expect("read a unit of libvirt");
        for name in ["libvirtd", "virtqemud", "virtlxcd", "virtxend"] {
            let unit = format!("{name}.service");
            if !libvirts(&unit).exists() {
                let text = daemon.replace("libvirtd", name);
                std::fs::write(self.path(format!("/verify/{unit}")), text).expect("write a unit");
            }
            wanted.push_str(&format!(" {unit}"));
        }
        std::fs::write(
            self.path("/verify/everything.target"),
            format!("[Unit]\nWants={wanted}\n"),
        )
        .expect("write a unit");
        let mut command = self.command("env");
        let output = command
            .arg("SYSTEMD_UNIT_PATH=/etc/systemd/system:/verify:/lib/systemd/system")
            .args(["systemd-analyze", "verify", "everything.target"])
            .stdin(Stdio::null())
            .output()
            .expect("run systemd-analyze");
        text(&output.stdout) + &text(&output.stderr)
    }

    /// How a file inside is reached from outside.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let relative = inside.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.pid)).join(relative)
    }

    /// A command that runs a program inside.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "-t",
                &self.pid.to_string(),
                "-m",
                "-p",
                "-i",
                "-u",
                "-C",
                "-n",
            ])
            .arg(program.as_ref());
        command
    }

    /// Runs systemctl inside.
    pub fn systemctl(&self, arguments: &[&str]) -> Output {
        // It waits for ever for a systemd that has crashed.
        let mut command = self.command("timeout");
        command.args(["--kill-after=5", LONGEST, "systemctl"]);
        let output = command.args(arguments).stdin(Stdio::null()).output();
        output.expect("run systemctl")
    }

    /// The same, which has to succeed.
    #[track_caller]
    pub fn ctl(&self, arguments: &[&str]) {
        let output = self.systemctl(arguments);
        assert!(
            output.status.success(),
            "systemctl {arguments:?}: {}{}",
            text(&output.stderr),
            self.last_words()
        );
    }

    /// A property of the daemon's unit.
    pub fn property(&self, name: &str) -> String {
        let output = self.systemctl(&["show", "--value", "-p", name, SERVICE]);
        text(&output.stdout).trim().to_owned()
    }

    /// How many descriptors are stored for the daemon.
    pub fn stored(&self) -> usize {
        let count = self.property("NFileDescriptorStore");
        count.parse().expect("a number of descriptors")
    }

    /// The daemon's process, as it is called outside. 0 if it does not run.
    pub fn main_pid(&self) -> i32 {
        match self.property("MainPID").parse().expect("a number") {
            0 => 0,
            // It may have died since.
            inside => self.find(inside).unwrap_or(0),
        }
    }

    /// The number outside of a process inside.
    pub fn outside(&self, inside: i32) -> i32 {
        self.find(inside)
            .unwrap_or_else(|| panic!("no process {inside} inside"))
    }

    fn find(&self, inside: i32) -> Option<i32> {
        let group = std::fs::read_dir("/proc").expect("list processes");
        let numbers = group.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let is_it = |pid: &i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok();
            let numbers = status.as_deref().and_then(|it| field(it, "NSpid"));
            let is_number = numbers.is_some_and(|it| it.ends_with(&format!("\t{inside}")));
            is_number && namespace(*pid) == namespace(self.pid)
        };
        numbers.into_iter().find(is_it)
    }

    /// A process inside with a connection to the daemon.
    pub fn owner(&self, name: &str) -> Owner {
        let mut command = self.command("/run/owner");
        let mut owner = Owner::started(&mut command, Path::new(LOCK_SOCKET));
        owner.is_inside(|inside| self.outside(inside));
        owner.register_as(name);
        owner
    }

    /// Has the kernel kill this process of the daemon because its control group has no memory for it, when it
    /// wants more.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn starve(&self, pid: i32) -> Result<(), String> {
        let file = |name: &str| self.group.join("system.slice/virtlockd.service").join(name);
        if file("memory.max").exists() {
            // It is killed rather than the other one.
            let score = format!("/proc/{pid}/oom_score_adj");
            std::fs::write(score, "1000").map_err(|error| error.to_string())?;
            std::fs::write(file("memory.max"), "4096").map_err(|error| error.to_string())?;
            return Ok(());
        }
        // The memory controller is in the older hierarchy here: there one process can be put alone.
        let group = Path::new("/sys/fs/cgroup/memory")
            .join(self.group.file_name().expect("the group has a name"));
        std::fs::create_dir(&group).map_err(|error| format!("no group for memory: {error}"))?;
        let write = |name: &str, text: &str| {
            std::fs::write(group.join(name), text).map_err(|error| format!("{name}: {error}"))
        };
        write("memory.limit_in_bytes", "65536")?;
        write("cgroup.procs", &pid.to_string())
    }

    /// There is memory again for all of the daemon's processes.
    pub fn feed(&self) {
        let limit = self.group.join("system.slice/virtlockd.service/memory.max");
        if limit.exists() {
            std::fs::write(limit, "max").expect("lift the limit of memory");
        }
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("/run/virtlockd.log")).unwrap_or_default()
    }

    /// What systemd and the daemon said last.
    pub fn last_words(&self) -> String {
        let console = std::fs::read(self.path("/run/console")).unwrap_or_default();
        let last = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(30)..];
            last.iter()
                .map(|line| format!("  {line:.300}\n"))
                .collect::<String>()
        };
        let (console, log) = (last(&text(&console)), last(&self.log()));
        format!("\nsystemd:\n{console}the daemon:\n{log}")
    }
}

/// Where the daemon listens.
const LOCK_SOCKET: &str = "/run/libvirt/virtlockd-sock";

impl Drop for Systemd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.last_words());
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        for machine in &mut self.machines {
            let _ = machine.wait();
        }
        remove_group(&self.group);
        let name = self.group.file_name().expect("the group has a name");
        let memory = Path::new("/sys/fs/cgroup/memory").join(name);
        if memory.exists() {
            remove_group(&memory);
        }
    }
}

/// Prepares the root directory and becomes systemd in it. Its arguments: a directory of the test's own, the
/// daemon, and the program that plays owners.
const SCRIPT: &str = r#"
set -e
echo $$ >GROUP/cgroup.procs
exec unshare --mount --pid --ipc --uts --cgroup --net --fork --kill-child --propagation private bash -c '
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --rbind /dev dev
mkdir -p units run/before run/libvirt etc/default
rm -rf etc/systemd/system
mkdir -p etc/systemd/system
: >etc/machine-id
touch run/console run/owner
mount --bind run/console dev/console
mount --bind "$3" run/owner
cp --remove-destination "$2" usr/sbin/virtlockd
for target in sysinit basic sockets multi-user shutdown; do
    printf "[Unit]\nDescription=%s\nDefaultDependencies=no\n" $target >units/$target.target
done
printf "Requires=sysinit.target\nWants=sockets.target\nAfter=sysinit.target sockets.target\n" >>units/basic.target
printf "Requires=basic.target\nAfter=basic.target\n" >>units/multi-user.target
pivot_root . run/before
umount -l /run/before
echo made
while [ ! -e /run/go ]; do sleep 0.01; done
exec env -i container=x PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/system:/units \
    /lib/systemd/systemd --unit=multi-user.target --log-target=console --show-status=0 >/dev/null 2>&1
' systemd "$@"
"#;

/// Why it cannot be.
fn is_possible(units: Units) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("needs root to give systemd namespaces of its own".into());
    }
    let version = Command::new("systemctl").arg("--version").output().ok();
    let version = version
        .map(|output| text(&output.stdout))
        .unwrap_or_default();
    let number = version.split_whitespace().nth(1);
    let number: Option<u32> = number.and_then(|number| number.parse().ok());
    if number < Some(OLDEST) || !Path::new("/lib/systemd/systemd").exists() {
        return Err(format!(
            "needs systemd {OLDEST} or later (tests/run installs it)"
        ));
    }
    if groups().is_none() {
        return Err("needs control groups (cgroup2)".into());
    }
    if units != Units::Ours && !libvirts(SERVICE).exists() {
        return Err("needs libvirt's units (tests/run installs them)".into());
    }
    Ok(())
}

fn libvirts(name: &str) -> PathBuf {
    Path::new("/lib/systemd/system").join(name)
}

/// Where control groups are.
fn groups() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let place = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(place))
    })?;
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mount.join(own))
}

/// A control group for one systemd. What tests that were killed have left goes.
fn make_group() -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let groups = groups().expect("there are control groups");
    const NAME: &str = "virtlockd-test-";
    let others = std::fs::read_dir(&groups).into_iter().flatten();
    for other in others.filter_map(Result::ok) {
        let name = other.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(NAME));
        let owner = owner.and_then(|name| name.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove_group(&other.path());
        }
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let group = groups.join(format!("{NAME}{}-{count}", std::process::id()));
    std::fs::create_dir(&group).expect("make a control group");
    group
}

/// Removes a control group with those in it, as soon as nobody is in them.
fn remove_group(group: &Path) {
    let end = std::time::Instant::now() + DEADLINE;
    while remove_groups(group).is_err() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn remove_groups(group: &Path) -> std::io::Result<()> {
    let inner = match std::fs::read_dir(group) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        inner => inner?,
    };
    for entry in inner {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    std::fs::remove_dir(group)
}

fn child_of(pid: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn namespace(pid: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = status.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
