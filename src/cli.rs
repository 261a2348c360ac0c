//! The command line: the options of `virtlockd`, with every form that getopt_long takes.
//!
//! Scripts and units pass options to the C daemon in all the forms of getopt_long: prefixes of long
//! names (`--conf=F`), bundles (`-vd`, `-t5`), options after other words, and `--`. A small
//! normaliser turns them into long names with their values as words of their own, in the order
//! given; pico-args then reads those. Options count in that order: `-V` ends the program where it
//! stands, but a bad `-t` before it wins.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::exit::{ExitCode, StartError};

/// What the command line asks the daemon to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Log level INFO, if the level would be less talkative otherwise.
    pub verbose: bool,
    /// Go to the background.
    pub daemon: bool,
    /// Seconds without clients and locks after which the daemon ends; 0 means never.
    pub timeout_seconds: u32,
    /// The configuration file, which must exist when it is given.
    pub config_file: Option<PathBuf>,
    /// The pid file. An empty path means that there is none.
    pub pid_file: Option<PathBuf>,
}

/// Where the command line leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Run the daemon.
    Run(Options),
    /// Print what there is to print and end.
    Exit {
        /// The exit code.
        exit: ExitCode,
        /// The bytes for standard output. Not text: they quote `argv[0]`.
        stdout: Vec<u8>,
        /// The bytes for standard error.
        stderr: Vec<u8>,
    },
    /// A value is wrong. Unlike a wrong option this is a log line, not a message of getopt.
    Refused(StartError),
}

/// One option as the table knows it.
#[derive(Clone, Copy)]
struct Known {
    short: u8,
    long: &'static str,
    takes_value: bool,
}

const HELP: &str = "--help";
const VERBOSE: &str = "--verbose";
const DAEMON: &str = "--daemon";
const CONFIG: &str = "--config";
const TIMEOUT: &str = "--timeout";
const PID_FILE: &str = "--pid-file";
const VERSION: &str = "--version";

/// The order is that of the C daemon: messages about ambiguous prefixes list the names in it.
const OPTIONS: [Known; 7] = [
    Known {
        short: b'v',
        long: VERBOSE,
        takes_value: false,
    },
    Known {
        short: b'd',
        long: DAEMON,
        takes_value: false,
    },
    Known {
        short: b'f',
        long: CONFIG,
        takes_value: true,
    },
    Known {
        short: b't',
        long: TIMEOUT,
        takes_value: true,
    },
    Known {
        short: b'p',
        long: PID_FILE,
        takes_value: true,
    },
    Known {
        short: b'V',
        long: VERSION,
        takes_value: false,
    },
    Known {
        short: b'h',
        long: HELP,
        takes_value: false,
    },
];

/// The longest timeout, in seconds: libvirt keeps it in milliseconds in an int.
const TIMEOUT_MAX: i64 = (i32::MAX / 1000) as i64;

/// Reads the command line. `args` begins with the program's own name; `privileged` (effective uid
/// 0) decides which default paths the usage text shows.
pub fn parse(args: &[OsString], privileged: bool) -> Outcome {
    let (program, words) = match args.split_first() {
        Some((program, words)) => (program.as_bytes(), words),
        None => (b"virtlockd".as_slice(), [].as_slice()),
    };
    let Normalised { words, ending } = normalise(words);
    let options = match read(words) {
        Ok(options) => options,
        Err(error) => return Outcome::Refused(error),
    };
    match ending {
        Ending::Words => Outcome::Run(options),
        Ending::Version => Outcome::Exit {
            exit: ExitCode::Success,
            stdout: [
                program,
                b" (virtlockd-rs) ",
                env!("CARGO_PKG_VERSION").as_bytes(),
                b"\n",
            ]
            .concat(),
            stderr: Vec::new(),
        },
        Ending::Help => Outcome::Exit {
            exit: ExitCode::Success,
            stdout: Vec::new(),
            stderr: usage(program, privileged),
        },
        Ending::Wrong(message) => Outcome::Exit {
            exit: ExitCode::Failure,
            stdout: Vec::new(),
            stderr: [program, b": ", &message, b"\n", &usage(program, privileged)].concat(),
        },
    }
}

/// Reads canonical words: a bad timeout is an error, the last of several values counts.
fn read(words: Vec<OsString>) -> Result<Options, StartError> {
    let mut arguments = pico_args::Arguments::from_vec(words);
    let mut options = Options::default();
    for value in values(&mut arguments, TIMEOUT)? {
        options.timeout_seconds = timeout_seconds(value.as_bytes())
            .ok_or_else(|| StartError::new(ExitCode::Failure, "Invalid value for timeout"))?;
    }
    options.config_file = values(&mut arguments, CONFIG)?.pop().map(PathBuf::from);
    options.pid_file = values(&mut arguments, PID_FILE)?.pop().map(PathBuf::from);
    options.verbose = arguments.contains(VERBOSE);
    options.daemon = arguments.contains(DAEMON);
    Ok(options)
}

/// All values of one option, without the `=` that the normaliser put in front of them.
fn values(
    arguments: &mut pico_args::Arguments,
    name: &'static str,
) -> Result<Vec<OsString>, StartError> {
    fn unmarked(word: &OsStr) -> Result<OsString, Infallible> {
        let bytes = word.as_bytes();
        Ok(OsStr::from_bytes(bytes.strip_prefix(b"=").unwrap_or(bytes)).to_os_string())
    }
    arguments
        .values_from_os_str(name, unmarked)
        .map_err(|error| StartError::new(ExitCode::Failure, error))
}

/// A number of seconds as C's strtol reads it: blanks before it and anything after it are ignored.
/// `None`: there is no number, or it is negative or greater than [`TIMEOUT_MAX`].
fn timeout_seconds(value: &[u8]) -> Option<u32> {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r');
    let start = value
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(value.len());
    let rest = value.get(start..).unwrap_or_default();
    let (negative, digits) = match rest.split_first() {
        Some((b'-', digits)) => (true, digits),
        Some((b'+', digits)) => (false, digits),
        _ => (false, rest),
    };
    let mut seconds: Option<i64> = None;
    for digit in digits.iter().take_while(|byte| byte.is_ascii_digit()) {
        let value = i64::from(digit.wrapping_sub(b'0'));
        seconds = Some(
            seconds
                .unwrap_or(0)
                .saturating_mul(10)
                .saturating_add(value),
        );
    }
    match seconds {
        Some(0) => Some(0),
        Some(seconds) if !negative && seconds <= TIMEOUT_MAX => u32::try_from(seconds).ok(),
        _ => None,
    }
}

/// The words before the one that ends the program, if there is one, in canonical form.
struct Normalised {
    /// `--name` for a flag; `--name`, `=value` for an option. The `=` keeps a value that looks like
    /// an option (`-f --daemon`) from being taken for one.
    words: Vec<OsString>,
    ending: Ending,
}

/// What the options end with.
enum Ending {
    /// Nothing special: all words were read.
    Words,
    Help,
    Version,
    /// getopt's message, without the program's name.
    Wrong(Vec<u8>),
}

fn normalise(arguments: &[OsString]) -> Normalised {
    let mut words = Vec::new();
    let mut rest = arguments.iter();
    let ending = loop {
        let Some(word) = rest.next() else {
            break Ending::Words;
        };
        let word = word.as_bytes();
        let end = if word == b"--" {
            break Ending::Words;
        } else if let Some(long) = word.strip_prefix(b"--") {
            normalise_long(long, &mut rest, &mut words)
        } else if let Some(bundle) = word.strip_prefix(b"-") {
            normalise_bundle(bundle, &mut rest, &mut words)
        } else {
            // The daemon has no use for other words, and has always ignored them.
            continue;
        };
        if let Err(ending) = end {
            break ending;
        }
    };
    Normalised { words, ending }
}

/// One word that begins with `--`; `word` is what follows the dashes.
fn normalise_long(
    word: &[u8],
    rest: &mut std::slice::Iter<'_, OsString>,
    words: &mut Vec<OsString>,
) -> Result<(), Ending> {
    let (name, value) = match word.iter().position(|byte| *byte == b'=') {
        Some(at) => (
            word.get(..at).unwrap_or_default(),
            word.get(at.saturating_add(1)..),
        ),
        None => (word, None),
    };
    let known = find_long(name, word)?;
    let value = match (known.takes_value, value) {
        (false, None) => None,
        (false, Some(_)) => {
            let message = format!("option '{}' doesn't allow an argument", known.long);
            return Err(Ending::Wrong(message.into_bytes()));
        }
        (true, Some(value)) => Some(OsStr::from_bytes(value)),
        (true, None) => match rest.next() {
            Some(value) => Some(value.as_os_str()),
            None => {
                let message = format!("option '{}' requires an argument", known.long);
                return Err(Ending::Wrong(message.into_bytes()));
            }
        },
    };
    take(known, value, words)
}

/// The option that `name` is the name or the only possible beginning of.
fn find_long(name: &[u8], word: &[u8]) -> Result<Known, Ending> {
    let long_name = |known: &Known| known.long.trim_start_matches('-').as_bytes();
    if let Some(known) = OPTIONS.iter().find(|known| long_name(known) == name) {
        return Ok(*known);
    }
    let candidates: Vec<Known> = OPTIONS
        .iter()
        .copied()
        .filter(|known| long_name(known).starts_with(name))
        .collect();
    match candidates.as_slice() {
        [known] => Ok(*known),
        [] => Err(Ending::Wrong(
            [b"unrecognized option '--", word, b"'"].concat(),
        )),
        several => {
            let mut message = [b"option '--", word, b"' is ambiguous; possibilities:"].concat();
            for known in several {
                message.extend_from_slice(format!(" '{}'", known.long).as_bytes());
            }
            Err(Ending::Wrong(message))
        }
    }
}

/// One word of short options; `bundle` is what follows the dash. A lone dash is ignored.
fn normalise_bundle(
    bundle: &[u8],
    rest: &mut std::slice::Iter<'_, OsString>,
    words: &mut Vec<OsString>,
) -> Result<(), Ending> {
    let mut letters = bundle;
    while let Some((letter, following)) = letters.split_first() {
        letters = following;
        let Some(known) = OPTIONS.iter().find(|known| known.short == *letter) else {
            return Err(Ending::Wrong(
                [b"invalid option -- '", [*letter].as_slice(), b"'"].concat(),
            ));
        };
        let value = if !known.takes_value {
            None
        } else if !following.is_empty() {
            letters = &[];
            Some(OsStr::from_bytes(following))
        } else if let Some(value) = rest.next() {
            Some(value.as_os_str())
        } else {
            let quoted = [*letter];
            return Err(Ending::Wrong(
                [b"option requires an argument -- '", quoted.as_slice(), b"'"].concat(),
            ));
        };
        take(*known, value, words)?;
    }
    Ok(())
}

/// Appends one option to the canonical words, or ends the program where `-h` or `-V` stands.
fn take(known: Known, value: Option<&OsStr>, words: &mut Vec<OsString>) -> Result<(), Ending> {
    match known.long {
        HELP => return Err(Ending::Help),
        VERSION => return Err(Ending::Version),
        name => words.push(OsString::from(name)),
    }
    if let Some(value) = value {
        words.push(OsString::from_vec([b"=", value.as_bytes()].concat()));
    }
    Ok(())
}

/// The text of `-h`, which a wrong option prints too.
fn usage(program: &[u8], privileged: bool) -> Vec<u8> {
    let (config_file, socket, pid_file) = if privileged {
        (
            "/etc/libvirt/virtlockd.conf",
            "/run/libvirt/virtlockd-sock",
            "PID file (unless overridden by -p):\n      /run/virtlockd.pid",
        )
    } else {
        (
            "$XDG_CONFIG_HOME/libvirt/virtlockd.conf",
            "$XDG_RUNTIME_DIR/libvirt/virtlockd-sock",
            "PID file:\n      $XDG_RUNTIME_DIR/libvirt/virtlockd.pid",
        )
    };
    let text = format!(
        " [options]

Options:
  -h | --help            Print this text and end.
  -v | --verbose         Log informational messages too.
  -d | --daemon          Go to the background once the sockets listen.
  -t | --timeout <secs>  End after so many seconds without clients and locks.
  -f | --config <file>   Read this configuration file.
  -V | --version         Print the version and end.
  -p | --pid-file <file> Write the process id to this file.

Ways to end it:

  SIGUSR1 (systemctl reload)
    The program is replaced in place: every lock and every client stays.
  SIGTERM (systemctl stop)
    Where systemd has a store for it, and its unit says that this outlives a
    stop (VIRTLOCKD_ON_STOP=keep), every lock and every client stays there
    until the next start, and the exit status is 81. Elsewhere the owners of
    locks are killed.
  SIGINT (systemctl kill --kill-whom=main -s INT, virt-admin daemon-shutdown)
    The owners of locks are killed, wherever it runs: for a host that is to
    be emptied.

libvirt lock management daemon:

  Default paths:

    Configuration file (unless overridden by -f):
      {config_file}

    Sockets:
      {socket}

    {pid_file}

"
    );
    [b"\nUsage:\n  ", program, text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Outcome {
        let mut args = vec![OsString::from("virtlockd")];
        args.extend(words.iter().map(OsString::from));
        parse(&args, true)
    }

    fn options(words: &[&str]) -> Options {
        match parsed(words) {
            Outcome::Run(options) => options,
            other => panic!("{words:?} gave {other:?}"),
        }
    }

    fn message(words: &[&str]) -> String {
        match parsed(words) {
            Outcome::Exit {
                exit: ExitCode::Failure,
                stderr,
                ..
            } => String::from_utf8(stderr)
                .unwrap()
                .lines()
                .next()
                .unwrap()
                .to_owned(),
            other => panic!("{words:?} gave {other:?}"),
        }
    }

    #[test]
    fn every_form_of_an_option_means_the_same() {
        let expected = Options {
            verbose: true,
            daemon: true,
            timeout_seconds: 5,
            config_file: Some("F".into()),
            pid_file: Some("P".into()),
        };
        for words in [
            ["-v", "-d", "-t", "5", "-f", "F", "-p", "P"].as_slice(),
            &["-vdt5", "-fF", "-pP"],
            &["-vdt", "5x", "--conf=F", "--p", "P"],
            &[
                "--verb",
                "--d",
                "--timeout=5",
                "other",
                "--config",
                "F",
                "-",
                "--pid-file=P",
            ],
            &["-f", "old", "-fF", "-t9", "-t5", "-pP", "-dv", "--", "-h"],
        ] {
            assert_eq!(options(words), expected, "{words:?}");
        }
    }

    #[test]
    fn a_value_that_looks_like_an_option_is_a_value() {
        let read = options(&["-p", "--config", "-f", "--daemon"]);
        assert_eq!(read.pid_file, Some("--config".into()));
        assert_eq!(read.config_file, Some("--daemon".into()));
        assert!(!read.daemon);
        assert_eq!(options(&["--pid="]).pid_file, Some("".into()));
        assert_eq!(options(&["-p", "=x"]).pid_file, Some("=x".into()));
    }

    #[test]
    fn a_wrong_option_gives_the_message_of_getopt() {
        for (words, expected) in [
            (["--x"], "unrecognized option '--x'"),
            (["-x"], "invalid option -- 'x'"),
            (["-v-"], "invalid option -- '-'"),
            (["-vt"], "option requires an argument -- 't'"),
            (["--ti"], "option '--timeout' requires an argument"),
            (["--vers=3"], "option '--version' doesn't allow an argument"),
            (
                ["--ver"],
                "option '--ver' is ambiguous; possibilities: '--verbose' '--version'",
            ),
        ] {
            assert_eq!(message(&words), format!("virtlockd: {expected}"));
        }
    }

    #[test]
    fn options_count_in_the_order_given() {
        let refused = Outcome::Refused(StartError::new(
            ExitCode::Failure,
            "Invalid value for timeout",
        ));
        assert_eq!(parsed(&["-t", "abc", "-V"]), refused);
        assert_eq!(parsed(&["-t", "abc", "-x"]), refused);
        assert_eq!(
            parsed(&["-V", "-t", "abc", "-x"]),
            Outcome::Exit {
                exit: ExitCode::Success,
                stdout: format!("virtlockd (virtlockd-rs) {}\n", env!("CARGO_PKG_VERSION"))
                    .into_bytes(),
                stderr: Vec::new(),
            }
        );
    }

    #[test]
    fn a_timeout_is_read_as_strtol_reads_it() {
        for (value, seconds) in [
            ("5", Some(5)),
            ("0", Some(0)),
            ("-0", Some(0)),
            (" \t\x0b5 ", Some(5)),
            ("+5", Some(5)),
            ("010", Some(10)),
            ("0x10", Some(0)),
            ("2147483", Some(2_147_483)),
            ("2147484", None),
            ("99999999999999999999999", None),
            ("-1", None),
            ("--5", None),
            ("- 5", None),
            ("", None),
            (" ", None),
            ("x", None),
        ] {
            assert_eq!(timeout_seconds(value.as_bytes()), seconds, "{value:?}");
        }
    }
}
