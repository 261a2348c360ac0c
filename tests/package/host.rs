//! A host with real systemd, dpkg and libvirt's daemon, and with guests whose disks rivals try to lock all the
//! time; and somebody who looks all the time whether there is a lock daemon's program in its place.

use crate::support::client::{Client, acquire, register_as, release};
use crate::support::daemon::LOCK_SOCKET;
use crate::support::owner::{Owner, rival};
use crate::support::packages::{self, Packages};
use crate::support::systemd::{SERVICE, Systemd, Units};
use crate::support::{DEADLINE, lock_probe, wait_until};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where the daemon's program is, and libvirt's beside ours.
pub const PROGRAM: &str = "/usr/sbin/virtlockd";
pub const LIBVIRTS_PROGRAM: &str = "/usr/sbin/virtlockd.libvirt";
/// How many guests there are.
const GUESTS: usize = 2;
/// How long one run of dpkg may take, seconds.
const LONGEST: &str = "180";

pub struct Host {
    pub systemd: Systemd,
    pub guests: Vec<Owner>,
    rivals: Vec<JoinHandle<bool>>,
    looker: Option<JoinHandle<u64>>,
    over: Arc<AtomicBool>,
    /// The daemon's process: it never becomes another one.
    pub main: i32,
}

/// What a command inside ended with.
pub struct Ended {
    pub succeeded: bool,
    pub said: String,
}

impl Ended {
    #[track_caller]
    pub fn well(self) -> String {
        assert!(self.succeeded, "{}", self.said);
        self.said
    }

    /// It failed, and said why.
    #[track_caller]
    pub fn badly(self, words: &[&str]) {
        assert!(!self.succeeded, "{}", self.said);
        for word in words {
            assert!(self.said.contains(word), "no \"{word}\" in: {}", self.said);
        }
    }
}

fn disk(guest: usize) -> String {
    format!("/run/disks/{guest}")
}

impl Host {
    /// libvirt's daemon serves guests on it.
    pub fn start() -> Option<Host> {
        let mut host = Host::without_guests()?;
        host.has_guests();
        Some(host)
    }

    /// libvirt's daemon runs on it.
    pub fn without_guests() -> Option<Host> {
        if !packages::can_run() {
            return None;
        }
        let systemd = Systemd::start(Units::Packages, Path::new(PROGRAM))?;
        systemd.ctl(&["start", SERVICE]);
        Some(Host {
            main: systemd.main_pid(),
            systemd,
            guests: Vec::new(),
            rivals: Vec::new(),
            looker: None,
            over: Arc::default(),
        })
    }

    /// From here on guests have their disks, and rivals want them.
    pub fn has_guests(&mut self) {
        let folder = self.systemd.path("/run/disks");
        std::fs::create_dir_all(folder).expect("make a folder for disks");
        for number in 0..GUESTS {
            let mut guest = self.systemd.owner(&format!("guest-{number}"));
            let path = self.systemd.path(disk(number));
            std::fs::write(&path, "data").expect("make a disk");
            guest.call(&acquire("", &disk(number), 0)).expect_ok();
            let (over, pid) = (self.over.clone(), guest.outside());
            let tries = std::thread::spawn(move || {
                rival(&path, pid, &over).is_some_and(|(_, could_run)| could_run)
            });
            self.rivals.push(tries);
            self.guests.push(guest);
        }
        let (over, program) = (self.over.clone(), self.systemd.path(PROGRAM));
        self.looker = Some(std::thread::spawn(move || {
            let mut missing = 0;
            while !over.load(Ordering::Relaxed) {
                let found = std::fs::metadata(&program);
                let is_program = |mode: u32| mode & 0o111 != 0;
                if !found.is_ok_and(|found| is_program(found.permissions().mode())) {
                    missing += 1;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            missing
        }));
    }

    /// The same host without libvirt's daemon.
    pub fn without_libvirt() -> Option<Host> {
        if !packages::can_run() {
            return None;
        }
        let systemd = Systemd::start(Units::Packages, Path::new(PROGRAM))?;
        let host = Host {
            main: 0,
            systemd,
            guests: Vec::new(),
            rivals: Vec::new(),
            looker: None,
            over: Arc::default(),
        };
        // A machine that is made for tests may forbid packages to start services.
        let _ = std::fs::remove_file(host.systemd.path("/usr/sbin/policy-rc.d"));
        let gone = ["--purge", "--force-depends"];
        host.dpkg(&[&gone[..], &packages::LIBVIRTS].concat()).well();
        Some(host)
    }

    /// Runs a command inside.
    pub fn run(&self, words: &[&str]) -> Ended {
        let mut command = self.systemd.command("timeout");
        let output = command
            .args(["--kill-after=5", LONGEST])
            .args(words)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output();
        let output = output.expect("run a command inside");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended {
            succeeded: output.status.success(),
            said: text(&output.stdout) + &text(&output.stderr),
        }
    }

    /// dpkg, with nothing forced. (It need not wait for a disk that nobody reads after a power cut.)
    pub fn dpkg(&self, words: &[&str]) -> Ended {
        let options = ["dpkg", "--force-unsafe-io", "--no-triggers"];
        self.run(&[&options[..], words].concat())
    }

    /// A file of this machine, inside: what it is called there.
    pub fn carry_in(&self, file: &Path) -> String {
        let folder = self.systemd.path("/run/packages");
        std::fs::create_dir_all(folder).expect("make a folder for packages");
        let name = file.file_name().and_then(|name| name.to_str());
        let inside = format!("/run/packages/{}", name.expect("a file has a name"));
        std::fs::copy(file, self.systemd.path(&inside)).expect("carry a package in");
        inside
    }

    /// dpkg with the package of this name of ours.
    pub fn with_ours(&self, what: &str, packages: &Packages) -> Ended {
        let file = self.carry_in(&packages.file(packages::OURS));
        self.dpkg(&[what, &file])
    }

    /// libvirt's packages are installed once more, or upgraded where there is something behind the version.
    pub fn install_libvirts(&self, suffix: &str) -> Ended {
        let (_folder, files) = packages::libvirts(suffix);
        let files: Vec<String> = files.iter().map(|file| self.carry_in(file)).collect();
        let files = files.iter().map(String::as_str);
        self.dpkg(&["--install"].into_iter().chain(files).collect::<Vec<_>>())
    }

    /// The state of the unit that has the daemon end late when the host is shut down.
    pub fn order_of_shutdown(&self) -> String {
        let unit = "virtlockd-shutdown.service";
        let said = self.run(&[
            "systemctl",
            "show",
            "--property=ActiveState",
            "--value",
            unit,
        ]);
        said.well().trim().to_owned()
    }

    /// Which file this is, by device and inode.
    pub fn file(&self, path: &str) -> Option<(u64, u64)> {
        let found = std::fs::metadata(self.systemd.path(path)).ok()?;
        Some((found.dev(), found.ino()))
    }

    /// Which file the daemon executes.
    pub fn executed(&self) -> (u64, u64) {
        let path = format!("/proc/{}/exe", self.main);
        let found = std::fs::metadata(path).expect("the daemon runs");
        (found.dev(), found.ino())
    }

    /// The version line of a program inside.
    pub fn version(&self, path: &str) -> String {
        self.run(&[path, "--version"]).well()
    }

    /// What dpkg says of our package.
    pub fn status(&self, package: &str) -> String {
        let format = "--showformat=${db:Status-Abbrev}";
        let ended = self.run(&["dpkg-query", "--show", format, package]);
        if ended.succeeded {
            ended.said.trim().to_owned()
        } else {
            "none".into()
        }
    }

    /// The diversions that anybody made of the daemon's files.
    pub fn diversions(&self) -> String {
        self.run(&["dpkg-divert", "--list", "*virtlockd*"]).well()
    }

    /// The daemon's own program and manual, under whatever name.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for folder in [
            "/usr/sbin",
            "/usr/share/man/man8",
            "/usr/lib/systemd/system",
        ] {
            let entries = std::fs::read_dir(self.systemd.path(folder)).expect("list a folder");
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let ours = names.filter(|name| name.starts_with("virtlockd"));
            files.extend(ours.map(|name| Path::new(folder).join(name)));
        }
        files.sort();
        files
    }

    /// The daemon is the program in its place, which is ours.
    #[track_caller]
    pub fn is_ours(&self) {
        assert!(self.version(PROGRAM).contains("(virtlockd-rs)"));
        assert_eq!(Some(self.executed()), self.file(PROGRAM));
        let libvirts = self.version(LIBVIRTS_PROGRAM);
        assert!(libvirts.contains("(libvirt)"), "{libvirts}");
    }

    /// The daemon is the program in its place, which is libvirt's.
    #[track_caller]
    pub fn is_libvirts(&self) {
        assert!(self.version(PROGRAM).contains("(libvirt)"));
        assert_eq!(Some(self.executed()), self.file(PROGRAM));
    }

    /// Every guest lives, is answered over its old connection, has its lock, and gets what it asks for; and the
    /// daemon is still the process that it was.
    #[track_caller]
    pub fn all_is_well(&mut self) {
        assert_eq!(
            self.systemd.main_pid(),
            self.main,
            "{}",
            self.systemd.last_words()
        );
        assert_eq!(self.systemd.property("NRestarts"), "0");
        for (number, guest) in self.guests.iter_mut().enumerate() {
            assert!(guest.is_alive(), "guest {number} is dead");
            let more = format!("/run/disks/more-{number}");
            std::fs::write(self.systemd.path(&more), "data").expect("make a disk");
            guest.call(&acquire("", &more, 0)).expect_ok();
            guest.call(&release("", &more)).expect_ok();
            guest
                .call(&acquire("", &disk(number), 0))
                .expect_error(87, 51);
            let lock = lock_probe(&self.systemd.path(disk(number)));
            assert!(lock.is_some_and(|lock| lock.exclusive));
        }
        // Somebody new is served.
        let mut new = Client::connect(&self.systemd.path(LOCK_SOCKET));
        new.call(&register_as("new", 1)).expect_ok();
        new.call(&acquire("", &disk(0), 0)).expect_error(87, 51);
    }

    /// No rival had a lock while its guest could run, and there was a program at every moment.
    #[track_caller]
    pub fn nothing_was_lost(mut self) {
        self.over.store(true, Ordering::Relaxed);
        for rival in self.rivals.drain(..) {
            let got = rival.join().expect("a rival does not panic");
            assert!(!got, "a rival had a lock of a guest that lived");
        }
        if let Some(looker) = self.looker.take() {
            let missing = looker.join().expect("it does not panic");
            assert_eq!(
                missing, 0,
                "there was no program in its place, so many times"
            );
        }
    }

    /// Ends the guests; their disks are free.
    pub fn end_guests(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for guest in self.guests.drain(..) {
            drop(guest);
        }
        self.rivals.drain(..).for_each(|rival| {
            rival.join().expect("a rival does not panic");
        });
        wait_until(DEADLINE, "the disks to be free", || {
            (0..GUESTS).all(|number| lock_probe(&self.systemd.path(disk(number))).is_none())
        });
    }
}
