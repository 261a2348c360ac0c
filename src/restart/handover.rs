//! The change of programs: is there one that can take over, and the exec itself.
//!
//! The successor is started once, beside the running daemon, with `--version` and the ledger as
//! its standard input. That shows that it starts at all, which program it is, and whether it can
//! read the state and its own configuration. Only then does the daemon replace itself.

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::host::apart::{self, Files};
use crate::host::errno::Errno;
use crate::host::leash::{Collar, Leash};
use crate::host::process::Process;
use crate::host::program::Program;
use crate::host::refusal::Refusal;
use crate::host::{descriptors, environment, errno, file, mount_table, signals};

/// Set in a program that is only to say whether it could take over: the ledger is its standard
/// input.
pub const CHECK_VARIABLE: &str = "VIRTLOCKD_CHECK_LEDGER";
/// Set in a program that takes over: descriptor of the ledger, colon, process id.
pub const HANDOVER_VARIABLE: &str = "VIRTLOCKD_HANDOVER";
/// Set in a program that takes over: the process that goes on should it not serve.
pub const UNDERSTUDY_VARIABLE: &str = "VIRTLOCKD_UNDERSTUDY";
/// Set in a program that takes over: where the daemon was started.
const DIRECTORY_VARIABLE: &str = "VIRTLOCKD_DIRECTORY";
/// What a successor's second line of output begins with when it can read the ledger.
pub const READABLE: &str = "ledger readable";

/// What the end of that line is where the successor ends its understudy.
pub const DISMISSES: &str = "; its understudy is dismissed";

/// What stands in the complaint of a program whose ledgers are of an earlier format, in front of the
/// last one that it reads. It is part of what those programs say, and may not change.
pub const NEWER_THAN: &str = "newer than ";

/// Why a successor does not take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It reads ledgers up to this format; what it says of this one's.
    Earlier(u32, String),
    /// It cannot.
    Ever(String),
}

/// Which program takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successor {
    /// This one, perhaps another version.
    Ours,
    /// A version of this one that does not know of understudies.
    OursBefore,
    /// libvirt's.
    Libvirt,
}

/// The words that the daemon was started with, where that was, and where its program is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// The program: an absolute path, or a bare name that is looked up in PATH.
    pub program: OsString,
    /// The words, the program's name first.
    pub words: Vec<OsString>,
    /// The working directory of the start, which relative paths begin at. A daemon in the background
    /// has another one.
    pub directory: PathBuf,
}

impl CommandLine {
    /// The command line of this process. A relative path is made absolute: the daemon may change
    /// its working directory. To be called once: it takes the variable of an earlier image.
    pub fn of_this_process() -> CommandLine {
        let mut words: Vec<OsString> = std::env::args_os().collect();
        let first = words
            .first()
            .cloned()
            .unwrap_or_else(|| OsString::from("virtlockd"));
        let is_bare = !first.as_bytes().contains(&b'/');
        let now = std::env::current_dir();
        let program = match &now {
            Ok(directory) if !is_bare => directory.join(&first).into_os_string(),
            _ => first,
        };
        let directory = environment::take(DIRECTORY_VARIABLE)
            .map(PathBuf::from)
            .or(now.ok())
            .unwrap_or_else(|| PathBuf::from("/"));
        if !is_bare && let Some(word) = words.first_mut() {
            word.clone_from(&program);
        }
        CommandLine {
            program,
            words,
            directory,
        }
    }

    /// The same words for the program that stands beside this one, with this behind its name.
    pub fn beside(&self, suffix: &str) -> Result<CommandLine, String> {
        let mut program = self.path()?.into_os_string();
        program.push(suffix);
        Ok(CommandLine {
            program,
            ..self.clone()
        })
    }

    /// Where the program is now, for a guardian that executes it.
    pub fn text_of_path(&self) -> Result<CString, String> {
        text(self.path()?.as_os_str().as_bytes())
    }

    /// The words, and the environment as it is now, laid out for the day when a successor is executed.
    pub fn prepared(&self) -> Result<Program, String> {
        let words: Result<_, _> = self.words.iter().map(|it| text(it.as_bytes())).collect();
        let plain: Result<_, _> = std::env::vars_os()
            .map(|(name, value)| variable(&name, &value))
            .collect();
        let directory = variable(DIRECTORY_VARIABLE.as_ref(), self.directory.as_os_str())?;
        Ok(Program::new(words?, plain?, vec![directory]))
    }

    /// Where the program is now.
    fn path(&self) -> Result<PathBuf, String> {
        if self.program.as_bytes().contains(&b'/') {
            return Ok(PathBuf::from(&self.program));
        }
        let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/sbin:/usr/bin"));
        std::env::split_paths(&path)
            .map(|directory| directory.join(&self.program))
            .find(|candidate| {
                nix::unistd::access(candidate, nix::unistd::AccessFlags::X_OK).is_ok()
            })
            .ok_or_else(|| format!("there is no program {} in PATH", self.program.display()))
    }
}

/// Which file a program is. When one of these differs, another program is in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramFile {
    device: u64,
    inode: u64,
    size: i64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl CommandLine {
    /// The program's file as it is now; `None` if there is none.
    pub fn file(&self) -> Option<ProgramFile> {
        let found = nix::sys::stat::stat(&self.path().ok()?).ok()?;
        Some(ProgramFile {
            device: found.st_dev,
            inode: found.st_ino,
            size: found.st_size,
            modified: (found.st_mtime, found.st_mtime_nsec),
        })
    }
}

/// A successor that is being looked at.
#[derive(Debug)]
pub struct Check {
    child: Child,
    /// What it says, and what it complains of.
    said: OwnedFd,
    complained: OwnedFd,
    process: Process,
    /// It is not shown the ledger, because of this: only a successor that needs none may take over.
    without_ledger: Option<Refusal>,
    /// `None` once it is killed. What it started goes with it, and all of it with this daemon.
    leash: Option<Leash>,
}

/// Why a daemon without a ledger that can be passed on has no successor of this kind.
pub fn nothing_to_pass_on(refusal: Refusal) -> String {
    format!(
        "the locks and connections cannot be passed on, because {refusal}. libvirt's own daemon could \
         take over"
    )
}

impl Check {
    /// Starts the successor. It can read the ledger, and it gets none of the descriptors in
    /// `withheld`: those that this process took over are open for any program that it starts.
    pub fn begin(
        command_line: &CommandLine,
        ledger: Result<&OwnedFd, Refusal>,
        withheld: &[RawFd],
    ) -> Result<Check, String> {
        let path = command_line.path()?;
        keep(withheld, false)?;
        // It is the running daemon's own: a program that is not the right one must not spoil it.
        let shown = match ledger {
            Ok(ledger) => file::read_only(ledger),
            Err(_) => file::open_nothing(),
        };
        let shown = shown.map_err(|reason| {
            let reason = errno::text(reason);
            format!("the ledger cannot be shown to {}: {reason}", path.display())
        })?;
        // Room for the descriptor that watches it: a successor that nobody watches is never reaped.
        let room = shown.try_clone().map_err(|error| {
            let reason = errno::text(errno::of(&error));
            format!("{} cannot be watched: {reason}", path.display())
        })?;
        let untied = |reason| {
            let reason = errno::text(reason);
            format!("{} might outlive this daemon: {reason}", path.display())
        };
        let collar = Collar::new().map_err(untied)?;
        let (name, rest) = match command_line.words.split_first() {
            Some((name, rest)) => (name.as_os_str(), rest),
            None => (OsStr::new("virtlockd"), [].as_slice()),
        };
        let unstarted = |reason| {
            let reason = errno::text(reason);
            format!("{} cannot be started: {reason}", path.display())
        };
        let (said, output) = apart::pipe().map_err(unstarted)?;
        let (complained, error) = apart::pipe().map_err(unstarted)?;
        let words: Vec<&OsStr> = [name, OsStr::new("--version")]
            .into_iter()
            .chain(rest.iter().map(OsString::as_os_str))
            .collect();
        let has_ledger = ledger.is_ok();
        let is_apart = mount_table::shares_were_seen();
        let apart = is_apart.then(|| {
            let files = Files {
                standard: [&shown, &output, &error].map(AsRawFd::as_raw_fd),
                other: Some(collar.theirs()),
            };
            start_apart(&path, &words, has_ledger, &files)
        });
        let mut child = match apart {
            Some(Ok(program)) => Child::Apart(program),
            // As everywhere else it closes what this process has open.
            Some(Err(_)) | None => {
                let standard = [shown, output, error];
                start_plainly(&path, &words, has_ledger, (standard, &collar)).map_err(unstarted)?
            }
        };
        let leash = match collar.tie(child.pid()) {
            Ok(leash) => Some(leash),
            Err(reason) => {
                end(&mut child);
                return Err(untied(reason));
            }
        };
        drop(room);
        match Process::open_any(child.pid()) {
            Ok(process) => Ok(Check {
                child,
                said,
                complained,
                process,
                without_ledger: ledger.err(),
                leash,
            }),
            Err(reason) => {
                end(&mut child);
                Err(format!(
                    "{} cannot be watched: {}",
                    path.display(),
                    errno::text(reason)
                ))
            }
        }
    }

    /// Readable once the successor has said what it has to say and ended.
    pub fn descriptor(&self) -> RawFd {
        self.process.pidfd().as_raw_fd()
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.process.is_dead()
    }

    /// What became of it, once it is over.
    pub fn verdict(mut self) -> Result<Successor, Unfit> {
        let status = match self.child.ended() {
            Some(status) => status,
            None => {
                end(&mut self.child);
                return Err(Unfit::Ever("it does not end".into()));
            }
        };
        // It has ended, so what it said is in the pipes; a child of its own may keep them open.
        let said = said(&self.said);
        let complained = said_text(&self.complained);
        let complaint = complained.lines().next_back().unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        if !status.success() {
            let reason = format!("it ends with {status} when asked for its version: {complaint}");
            return Err(match last_format(complaint) {
                Some(format) => Unfit::Earlier(format, reason),
                None => Unfit::Ever(reason),
            });
        }
        let mut lines = said.lines();
        let version = lines.next().unwrap_or_default();
        if version.contains("(libvirt)") {
            return Ok(Successor::Libvirt);
        }
        if !version.contains("(virtlockd-rs)") {
            let reason = format!("it is no lock daemon: its version is '{version}'");
            return Err(Unfit::Ever(reason));
        }
        if let Some(refusal) = self.without_ledger {
            return Err(Unfit::Ever(nothing_to_pass_on(refusal)));
        }
        match lines.next() {
            Some(line) if line.starts_with(READABLE) => Ok(if line.ends_with(DISMISSES) {
                Successor::Ours
            } else {
                Successor::OursBefore
            }),
            _ => Err(Unfit::Ever(format!(
                "'{version}' does not read the ledger of this daemon: {complaint}"
            ))),
        }
    }

    /// Kills a successor that takes too long. It is over when the kernel is done with it, which may
    /// take a while: then it is to be reaped with [`Check::reap`].
    pub fn kill(&mut self) {
        self.leash = None;
        // It may have closed all that it does not know.
        self.child.kill();
    }

    /// Forgets a successor that is over. Without this it stays in the list of processes.
    pub fn reap(mut self) {
        let _ = self.child.ended();
    }
}

/// The last format that a program reads, of what it says about a later one.
fn last_format(complaint: &str) -> Option<u32> {
    let (_, behind) = complaint.split_once(NEWER_THAN)?;
    let digits = behind.split(|it: char| !it.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// The process of a successor that is being looked at.
#[derive(Debug)]
enum Child {
    /// One that never had what this process has open.
    Apart(apart::Program),
    /// One that closed it.
    Plain(std::process::Child),
}

impl Child {
    fn pid(&self) -> i32 {
        match self {
            Child::Apart(program) => program.pid(),
            Child::Plain(child) => child.id().cast_signed(),
        }
    }

    /// How it ended, if it has; it is forgotten with that.
    fn ended(&mut self) -> Option<ExitStatus> {
        match self {
            Child::Apart(program) => program.ended(),
            Child::Plain(child) => child.try_wait().ok().flatten(),
        }
    }

    fn kill(&mut self) {
        match self {
            Child::Apart(program) => program.kill(),
            // It may be over.
            Child::Plain(child) => _ = child.kill(),
        }
    }
}

/// Starts a successor that is to be looked at, with none of the files that this process has open: to close one of a
/// share may take for ever.
fn start_apart(
    path: &Path,
    words: &[&OsStr],
    has_ledger: bool,
    files: &Files,
) -> Result<apart::Program, Errno> {
    let no_text = |_: String| Errno::EINVAL;
    let words: Result<Vec<CString>, String> =
        words.iter().map(|word| text(word.as_bytes())).collect();
    let environment: Result<Vec<CString>, String> = std::env::vars_os()
        .filter(|(name, _)| name != NOTIFY && name != CHECK_VARIABLE)
        .chain(has_ledger.then(|| (CHECK_VARIABLE.into(), "1".into())))
        .map(|(name, value)| variable(&name, &value))
        .collect();
    let program = text(path.as_os_str().as_bytes()).map_err(no_text)?;
    apart::start(
        &program,
        &words.map_err(no_text)?,
        &environment.map_err(no_text)?,
        files,
    )
}

fn start_plainly(
    path: &Path,
    words: &[&OsStr],
    has_ledger: bool,
    ([input, output, error], collar): ([OwnedFd; 3], &Collar),
) -> Result<Child, Errno> {
    descriptors::keep_on_exec(collar.theirs(), true)?;
    let mut command = Command::new(path);
    if let Some((name, rest)) = words.split_first() {
        command.arg0(name).args(rest);
    }
    let started = command
        .envs(has_ledger.then_some((CHECK_VARIABLE, "1")))
        .env_remove(NOTIFY)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::from(error))
        .process_group(0)
        .spawn();
    descriptors::keep_on_exec(collar.theirs(), false)?;
    started.map(Child::Plain).map_err(|error| errno::of(&error))
}

/// Where a service manager is told of a start: not this one.
const NOTIFY: &str = "NOTIFY_SOCKET";

fn end(child: &mut Child) {
    // Killed, it is over at once unless it is stuck in the kernel: then it is not waited for.
    child.kill();
    let _ = child.ended();
}

/// What is in a pipe now, at most 4 KiB.
fn said(pipe: &OwnedFd) -> Vec<u8> {
    let mut text = vec![0; 4096];
    let count = file::read_now(pipe.as_raw_fd(), &mut text);
    text.truncate(count);
    text
}

fn said_text(pipe: &OwnedFd) -> String {
    String::from_utf8_lossy(&said(pipe)).into_owned()
}

/// A text for the kernel.
fn text(bytes: &[u8]) -> Result<CString, String> {
    CString::new(bytes).map_err(|_| "a word of the command line holds a zero byte".to_owned())
}

fn variable(name: &OsStr, value: &OsStr) -> Result<CString, String> {
    text(&[name.as_bytes(), b"=", value.as_bytes()].concat())
}

/// An exec by the guardian will keep these descriptors. Says why not, and then it keeps none.
pub fn prepare(kept: &[RawFd]) -> Result<(), String> {
    keep(kept, true).inspect_err(|_| {
        let _ = keep(kept, false);
    })
}

/// Replaces this process by the successor. The descriptors in `kept` stay open under their
/// numbers. Comes back only with the reason why it could not be done; then nothing has changed.
pub fn replace(
    successor: Successor,
    command_line: &CommandLine,
    kept: &[RawFd],
    variables: &[(&str, String)],
) -> String {
    let path = match command_line.path() {
        Ok(path) => path,
        Err(reason) => return reason,
    };
    let words: Result<Vec<_>, _> = command_line
        .words
        .iter()
        .map(|word| text(word.as_bytes()))
        .collect();
    let directory = (successor != Successor::Libvirt).then(|| {
        let directory = command_line.directory.as_os_str();
        (DIRECTORY_VARIABLE.into(), directory.as_bytes().to_vec())
    });
    let environment: Result<Vec<_>, _> = std::env::vars_os()
        .map(|(name, value)| (name.into_vec(), value.into_vec()))
        .chain(directory)
        .chain(
            variables
                .iter()
                .map(|(name, value)| (name.as_bytes().to_vec(), value.clone().into_bytes())),
        )
        .map(|(name, value)| text(&[&name[..], b"=", &value].concat()))
        .collect();
    let (program, words, environment) =
        match (text(path.as_os_str().as_bytes()), words, environment) {
            (Ok(program), Ok(words), Ok(environment)) => (program, words, environment),
            (Err(reason), _, _) | (_, Err(reason), _) | (_, _, Err(reason)) => return reason,
        };
    let reason = match keep(kept, true) {
        Err(reason) => reason,
        Ok(()) => execute(successor, &program, &words, &environment),
    };
    // Should this fail, it is done again before another program is started.
    let _ = keep(kept, false);
    reason
}

/// An exec keeps these descriptors, or closes them.
fn keep(descriptors: &[RawFd], is_kept: bool) -> Result<(), String> {
    for number in descriptors {
        descriptors::keep_on_exec(*number, is_kept).map_err(|reason| {
            let what = if is_kept { "kept" } else { "withheld" };
            let reason = errno::text(reason);
            format!("descriptor {number} cannot be {what}: {reason}")
        })?;
    }
    Ok(())
}

/// The exec. Comes back only with the reason why there was none.
fn execute(
    successor: Successor,
    program: &CString,
    words: &[CString],
    environment: &[CString],
) -> String {
    // This program begins with its signals blocked and reads those that came meanwhile; libvirt's
    // takes over a blocked signal as one that it never gets.
    if successor == Successor::Libvirt
        && let Err(reason) = signals::unblock()
    {
        let _ = signals::block_again();
        return format!("signals cannot be unblocked: {}", errno::text(reason));
    }
    let Err(reason) = nix::unistd::execve(program, words, environment);
    if successor == Successor::Libvirt {
        let _ = signals::block_again();
    }
    format!(
        "{} cannot be executed: {}",
        program.to_string_lossy(),
        errno::text(reason.into())
    )
}
