//! The words of the command line, and what is said about them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::text::safe;
use crate::host::paths::Paths;
use crate::wire::status::Kind;

/// What all commands have in common.
#[derive(Debug)]
pub struct Common {
    /// Where the daemon listens for administrators.
    pub socket: PathBuf,
    /// Where it listens for those who want locks.
    pub lock_socket: PathBuf,
    /// JSON instead of a table.
    pub json: bool,
    /// Whether it is about a user's session.
    pub is_session: bool,
}

/// A command.
#[derive(Debug)]
pub enum Command {
    /// All that is held, or one owner.
    Status(Option<OsString>),
    /// Who has these files.
    Who(Vec<PathBuf>),
    /// What happens, of kinds by their bits.
    Events(u32),
    /// Numbers for a monitor.
    Metrics,
    /// Which disks no lock protects.
    Audit,
    /// Is everything as it must be?
    Doctor,
    /// A command with locks.
    Exec(Wish),
}

/// What is to be run, and with which locks.
#[derive(Debug)]
pub struct Wish {
    /// Others may have the locks, too.
    pub shared: bool,
    /// For how long locks that are held are waited for, seconds.
    pub wait_s: u64,
    /// Not the files are locked but libvirt's leases for them, in this directory.
    pub lease: Option<PathBuf>,
    /// The files.
    pub files: Vec<PathBuf>,
    /// The command and its words.
    pub command: Vec<OsString>,
}

/// What the words lead to.
#[derive(Debug)]
pub enum Words {
    /// This is to be said, and that is all.
    Say(String),
    /// A helper of this program's own: looks at a file that may never answer.
    LookAt(PathBuf),
    /// A command is to be run.
    Do(Common, Command),
}

const HELP: &str = "\
Usage: virtlockctl [--session | --socket PATH] [--json] COMMAND [ARGUMENT...]

Who has this disk? Asks virtlockd, the kernel and libvirt's configuration.

Commands:
  status [DOMAIN|UUID|PID]   what is held, or what one guest holds
  who FILE...                who has a disk
  events                     what happens, as it happens
  metrics                    numbers, as OpenMetrics text
  audit                      guests' disks that no lock protects
  doctor                     is locking set up as it must be?
  exec FILE... -- COMMAND    runs a command that has locks

Options:
  --session       the daemon of this user's session, not the system's
  --socket PATH   the daemon whose admin socket this is
  --json          JSON instead of tables (virtlockctl.schema.json says which)
  --help          this text; after a command, the command's
  --version       the version

Exit codes: those of each command stand in its help; 64 if the words are wrong.";

const STATUS: &str = "\
Usage: virtlockctl status [DOMAIN|UUID|PID]

What is held, in which mode, since when and by whom; the guests that have registered; the lockspaces. With the name or
uuid of a domain, or the number of a process: only that one's.

Beside libvirt's daemon, which does not say what it holds, the locks are listed that the kernel knows of it.

Exit codes:
  0  told
  1  no such guest has registered or holds anything
  2  nobody can tell: no daemon answers

Example:
  virtlockctl status web1";

const WHO: &str = "\
Usage: virtlockctl who FILE...

Who has a disk: by any name of its file, by any node of its block device, or by the path that stands in a guest's
configuration where libvirt is set to indirect leases (file_lockspace_dir, lvm_lockspace_dir, scsi_lockspace_dir in
qemu-lockd.conf). Locks of processes that
are not virtlockd, and of other hosts, are told as far as the kernel knows of them. A file system that does not answer
is not waited for.

Exit codes:
  0  held (of several files: at least one of them)
  1  free (all of them)
  2  nobody can tell (of at least one of them)

Example:
  virtlockctl who /var/lib/libvirt/images/web1.qcow2";

const EVENTS: &str = "\
Usage: virtlockctl events [--only KIND[,KIND...]]

A line, or with --json a line of JSON, whenever something happens, until it is interrupted. Kinds: registered, granted,
released, refused, fenced, killed, died, upgraded, recovered. A reader who is too slow is told how many it missed.

Exit codes:
  0  nobody reads the lines any more
  2  the daemon is gone, or cannot be asked

Example:
  virtlockctl events --only refused,fenced,died";

const METRICS: &str = "\
Usage: virtlockctl metrics

The daemon's counters and sizes as OpenMetrics text, for the textfile collector of Prometheus' node exporter or whatever
else runs a command. Counters go on over upgrades and crashes. No label names a disk or a guest.

Exit codes:
  0  told
  2  no daemon answers; virtlockd_up is 0 then

Example:
  virtlockctl metrics > /var/lib/node_exporter/virtlockd.prom.$$ &&
    mv /var/lib/node_exporter/virtlockd.prom.$$ /var/lib/node_exporter/virtlockd.prom";

const AUDIT: &str = "\
Usage: virtlockctl audit

Which running guests (QEMU's processes) have a disk open for writing that no lock protects, as one has that was started
before locking was switched on; and which locks protect nothing. Beside libvirt's daemon by what the kernel knows of its
locks. Firmware variables, logs and memory files are no disks: libvirt has no locks for them.

Exit codes:
  0  every disk is protected, and every lock protects one
  1  not so
  2  nobody can tell (of at least one guest)

Example:
  virtlockctl audit";

const DOCTOR: &str = "\
Usage: virtlockctl doctor

Is locking on (qemu.conf, qemu-lockd.conf)? Are the lockspaces' directories there, and do other hosts see the locks in
them? Does a daemon answer, has it room, is its program the one installed, who may connect to it? Are shares mounted so
that locks reach their servers? A line each: ok, warn or bad, with what to do.

Exit codes:
  0  all is well
  1  a warning
  2  something is bad

Example:
  virtlockctl doctor";

const EXEC: &str = "\
Usage: virtlockctl exec [--shared] [--wait SECONDS] [--lease DIR] FILE... -- COMMAND [WORD...]

Runs a command that has the locks of these files, as a guest has them: no guest is started with them meanwhile, and if one
has them the command is not run. --shared shares them with others who do. --wait waits for locks that are held; virtlockd
says when they are free. --lease locks not the files but libvirt's leases for them in this lockspace (the
file_lockspace_dir of qemu-lockd.conf).

The locks are kept until the command and all that it has started have ended, also what it leaves behind in the background.
If the daemon closes the connection, or virtlockctl is killed, all of that is ended (SIGTERM first, if only the connection
was lost). SIGTERM, SIGINT, SIGHUP and SIGQUIT are passed on to all of it. Not reached are: what the command has others
start for it (systemd-run, docker, at); programs of another user (set-uid ones) unless virtlockctl is root's; and what is
left if both processes of virtlockctl are killed at once, but for the command itself, if it is no set-uid program.

Exit codes: the command's own (128 and its number if a signal ended it), or
   69  the daemon cannot be asked
   75  a lock is held; the message says by whom
   76  the connection was lost, and the command was ended
  127  the command cannot be run

Example:
  virtlockctl exec --wait 60 /srv/web1.img -- qemu-img resize /srv/web1.img +10G";

/// Reads the words.
///
/// # Errors
/// What is wrong with them.
pub fn parse(words: Vec<OsString>) -> Result<Words, String> {
    if let [first, path] = words.as_slice()
        && first == LOOK_AT
    {
        return Ok(Words::LookAt(path.into()));
    }
    // What is behind it is not for us to read.
    let (words, command) = split(words);
    let mut words = pico_args::Arguments::from_vec(words);
    let wants_help = words.contains(["-h", "--help"]);
    if words.contains(["-V", "--version"]) {
        return Ok(Words::Say(format!(
            "virtlockctl {}",
            env!("CARGO_PKG_VERSION")
        )));
    }
    let is_session = words.contains("--session");
    let socket = words
        .opt_value_from_os_str("--socket", |word| Ok::<_, String>(PathBuf::from(word)))
        .map_err(|error| error.to_string())?;
    let json = words.contains("--json");
    let only: Option<String> = words
        .opt_value_from_str("--only")
        .map_err(|error| error.to_string())?;
    let wish = (
        words.contains("--shared"),
        words
            .opt_value_from_str::<_, u64>("--wait")
            .map_err(|error| error.to_string())?,
        words
            .opt_value_from_os_str("--lease", |word| Ok::<_, String>(PathBuf::from(word)))
            .map_err(|error| error.to_string())?,
    );
    let mut rest = words.finish().into_iter();
    let Some(name) = rest.next() else {
        return if wants_help {
            Ok(Words::Say(HELP.to_owned()))
        } else {
            Err(format!("no command is given\n\n{HELP}"))
        };
    };
    let rest: Vec<OsString> = rest.collect();
    let help = match name.to_str() {
        Some("status") => STATUS,
        Some("who") => WHO,
        Some("events") => EVENTS,
        Some("metrics") => METRICS,
        Some("audit") => AUDIT,
        Some("doctor") => DOCTOR,
        Some("exec") => EXEC,
        _ => {
            let name = safe(name.as_encoded_bytes());
            return Err(if name.starts_with('-') {
                format!("there is no option '{name}' (virtlockctl --help lists them)")
            } else {
                format!("there is no command '{name}' (virtlockctl --help lists them)")
            });
        }
    };
    if wants_help {
        return Ok(Words::Say(help.to_owned()));
    }
    if let Some(option) = rest.iter().find(|word| is_option(word)) {
        let option = safe(option.as_encoded_bytes());
        return Err(format!("there is no option '{option}'\n\n{help}"));
    }
    if only.is_some() && name != "events" {
        return Err(format!("--only is an option of events alone\n\n{help}"));
    }
    if wish != (false, None, None) && name != "exec" {
        return Err(format!(
            "--shared, --wait and --lease are options of exec alone\n\n{help}"
        ));
    }
    // What follows `--` may begin as an option does; of exec alone it is a command.
    let (rest, command) = match command {
        Some(command) if name != "exec" => ([rest, command].concat(), None),
        command => (rest, command),
    };
    let command = match (name.to_str(), rest.as_slice()) {
        (Some("status"), []) => Command::Status(None),
        (Some("status"), [whom]) => Command::Status(Some(whom.clone())),
        (Some("who"), [_, ..]) => Command::Who(rest.into_iter().map(PathBuf::from).collect()),
        (Some("who"), []) => return Err(format!("no file is given\n\n{help}")),
        (Some("events"), []) => Command::Events(kinds(only.as_deref())?),
        (Some("metrics"), []) => Command::Metrics,
        (Some("audit"), []) => Command::Audit,
        (Some("doctor"), []) => Command::Doctor,
        (Some("exec"), [_, ..]) => Command::Exec(wish_of(wish, rest, command, help)?),
        (Some("exec"), []) => return Err(format!("no file is given\n\n{help}")),
        _ => return Err(format!("there are too many words\n\n{help}")),
    };
    let socket = match (socket, is_session) {
        (Some(_), true) => {
            return Err("--session and --socket do not go together".to_owned());
        }
        (Some(socket), false) => socket,
        (None, true) => Paths::of_session().admin_socket,
        (None, false) => Paths::of_system().admin_socket,
    };
    let common = Common {
        lock_socket: lock_socket(&socket),
        socket,
        json,
        is_session,
    };
    Ok(Words::Do(common, command))
}

/// The word that makes this program look at a file for another process of it.
pub const LOOK_AT: &str = "--look-at-a-file-that-may-never-answer";

fn is_option(word: &OsStr) -> bool {
    let word = word.as_encoded_bytes();
    word.starts_with(b"-") && word.len() > 1 && word != b"--"
}

/// The words in front of `--`, and those behind it.
fn split(mut words: Vec<OsString>) -> (Vec<OsString>, Option<Vec<OsString>>) {
    let Some(place) = words.iter().position(|word| word == "--") else {
        return (words, None);
    };
    let behind = words.split_off(place).into_iter().skip(1).collect();
    (words, Some(behind))
}

/// Where the lock socket is, beside an admin socket.
fn lock_socket(admin: &Path) -> PathBuf {
    let name = admin.file_name().unwrap_or_default();
    let is_named = name.as_bytes().ends_with(b"-admin-sock");
    admin.with_file_name(if is_named {
        "virtlockd-sock"
    } else {
        "lock-sock"
    })
}

fn wish_of(
    (shared, wait_s, lease): (bool, Option<u64>, Option<PathBuf>),
    files: Vec<OsString>,
    command: Option<Vec<OsString>>,
    help: &str,
) -> Result<Wish, String> {
    let Some(command) = command.filter(|command| !command.is_empty()) else {
        return Err(format!("no command is given behind --\n\n{help}"));
    };
    Ok(Wish {
        shared,
        wait_s: wait_s.unwrap_or(0),
        lease,
        files: files.into_iter().map(PathBuf::from).collect(),
        command,
    })
}

fn kinds(only: Option<&str>) -> Result<u32, String> {
    let Some(only) = only else {
        return Ok(Kind::ALL.into_iter().fold(0, |all, kind| all | kind.bit()));
    };
    only.split(',').try_fold(0, |all, word| {
        let kind = Kind::ALL.into_iter().find(|kind| kind.word() == word);
        match kind {
            Some(kind) => Ok(all | kind.bit()),
            None => Err(format!(
                "nothing of the kind '{}' happens (virtlockctl events --help lists the kinds)",
                safe(word.as_bytes())
            )),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Words, String> {
        parse(words.iter().map(OsString::from).collect())
    }

    #[test]
    fn every_command_has_a_help_with_its_exit_codes_and_an_example() {
        for command in [
            "status", "who", "events", "metrics", "audit", "doctor", "exec",
        ] {
            let Ok(Words::Say(help)) = parsed(&[command, "--help"]) else {
                panic!("no help for {command}")
            };
            for part in ["Usage:", "Exit codes:", "Example:"] {
                assert!(help.contains(part), "{command}: {part}");
            }
            assert!(help.contains(&format!("virtlockctl {command}")));
            assert!(HELP.contains(&format!("\n  {command} ")));
        }
        assert!(matches!(parsed(&["--help"]), Ok(Words::Say(text)) if text == HELP));
    }

    #[test]
    fn what_is_behind_the_separator_is_a_command_or_a_file() {
        let words = ["exec", "--wait", "5", "/disk", "--", "sh", "-c", "--json"];
        let Ok(Words::Do(common, Command::Exec(wish))) = parsed(&words) else {
            panic!("the words are right")
        };
        assert!(!common.json && !wish.shared);
        assert_eq!((wish.wait_s, wish.files.len()), (5, 1));
        assert_eq!(wish.command, ["sh", "-c", "--json"]);
        assert_eq!(
            common.lock_socket,
            PathBuf::from("/run/libvirt/virtlockd-sock")
        );
        let Ok(Words::Do(_, Command::Who(files))) = parsed(&["who", "--", "-disk"]) else {
            panic!("the words are right")
        };
        assert_eq!(files, [PathBuf::from("-disk")]);
    }

    #[test]
    fn wrong_words_are_answered_with_a_sentence_that_helps() {
        for (words, sentence) in [
            (&[][..], "no command"),
            (&["frobnicate"], "no command 'frobnicate'"),
            (&["--frobnicate"], "no option '--frobnicate'"),
            (&["status", "--all"], "no option '--all'"),
            (&["status", "a", "b"], "too many words"),
            (&["who"], "no file is given"),
            (&["metrics", "--only", "granted"], "option of events"),
            (&["who", "--wait", "3", "/x"], "options of exec"),
            (&["exec", "/x"], "no command is given behind --"),
            (&["exec", "--wait", "x", "/x", "--", "true"], "x"),
            (&["events", "--only", "granted,x"], "the kind 'x'"),
            (
                &["--session", "--socket", "/x", "status"],
                "do not go together",
            ),
            (&["status", "--socket"], "--socket"),
        ] {
            let wrong = parsed(words).expect_err("wrong words");
            assert!(wrong.contains(sentence), "{words:?}: {wrong}");
        }
    }

    #[test]
    fn options_may_stand_anywhere() {
        let words = ["status", "--json", "guest", "--socket", "/s"];
        let Ok(Words::Do(common, Command::Status(Some(whom)))) = parsed(&words) else {
            panic!("the words are right")
        };
        assert!(common.json && whom == "guest");
        assert_eq!(common.socket, PathBuf::from("/s"));
    }
}
