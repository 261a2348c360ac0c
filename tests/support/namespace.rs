//! A mount namespace with an empty `/run`, so that a daemon under test uses its built-in paths and
//! meets neither the host's daemon nor another test's.

use super::DEADLINE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// The namespace lives as long as its holder process, which this value owns.
pub struct Namespace {
    holder: Child,
}

impl Namespace {
    /// A private copy of the mount table with a tmpfs on `/run` and an empty `/run/libvirt`.
    pub fn new() -> Namespace {
        Namespace::with_root("true")
    }

    /// As [`Namespace::new`], and the root file system cannot be written in it: for calls with
    /// names that nobody has looked at before.
    pub fn sealed() -> Namespace {
        Namespace::with_root("mount -o remount,bind,ro /")
    }

    fn with_root(prepare: &str) -> Namespace {
        // The holder is `cat` on a pipe of ours: if this process dies without dropping anything,
        // the pipe closes and the holder ends as well. (Some cats see that their output is a pipe that nobody reads
        // any more, and end.)
        let run =
            "mount -t tmpfs tmpfs /run && mkdir /run/libvirt && echo made && exec cat >/dev/null";
        let script = format!("{prepare} && {run}");
        let mut holder = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start unshare to make a mount namespace");
        let stdout = holder
            .stdout
            .take()
            .expect("stdout of the holder is a pipe");
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("read from the namespace holder");
        assert_eq!(
            line, "made\n",
            "the namespace holder did not mount its /run"
        );
        Namespace { holder }
    }

    /// A process that is in it as long as it lives.
    pub fn holder(&self) -> i32 {
        i32::try_from(self.holder.id()).expect("a pid is an i32")
    }

    /// How a file of the namespace is reached from outside of it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let relative = inside
            .strip_prefix("/")
            .expect("a path inside a namespace is absolute");
        PathBuf::from(format!("/proc/{}/root", self.holder.id())).join(relative)
    }

    /// A command that runs `program` inside. It is executed in place: the child's pid is its pid.
    /// Its working directory is `/`, because entering a mount namespace sets that.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg("-t")
            .arg(self.holder.id().to_string())
            .arg("-m")
            .arg(program.as_ref());
        command
    }

    /// The process whose mount namespace this is.
    pub fn holder_pid(&self) -> u32 {
        self.holder.id()
    }
}

impl Namespace {
    /// The other processes in it.
    fn processes(&self) -> Vec<i32> {
        let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let holder = self.holder.id() as i32;
        let Some(ours) = namespace(holder) else {
            return Vec::new();
        };
        let Ok(listed) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        listed
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != holder && namespace(*pid).as_ref() == Some(&ours))
            .collect()
    }
}

impl Drop for Namespace {
    /// Ends what is left in it: a daemon that goes on for one that failed is nobody's child, and each of its
    /// processes makes a new one when the other one dies.
    fn drop(&mut self) {
        let begun = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() || begun.elapsed() > DEADLINE {
                break;
            }
            for pid in left {
                // It may have ended.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
