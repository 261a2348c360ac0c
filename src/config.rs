//! The configuration file `virtlockd.conf`: libvirt's grammar, and the keys that this daemon knows.
//!
//! The grammar is libvirt's down to its quirks, so that a file which starts the C daemon starts this
//! one, and one which does not is refused with the same sentence. Keys that are not known are read
//! and ignored; of a key given twice the first counts.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use foldhash::HashMap;

use crate::host::errno::Errno;
use crate::host::whole_file::{self, Unread};

/// The longest configuration file, in bytes: libvirt's limit.
const FILE_BYTES_MAX: u64 = 10 * 1024 * 1024;

/// How deep lists may nest. No key of this daemon is a list; libvirt has no limit here, and dies of a
/// file of brackets.
const LIST_DEPTH_MAX: usize = 64;

/// What the configuration file says. `None` and 0 mean that it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// 1 debug, 2 information, 3 warnings, 4 errors; 0 if unset. Other values are an error, which
    /// the logging reports.
    pub log_level: u32,
    /// Filters in libvirt's syntax. The bytes are whatever the file holds.
    pub log_filters: Option<OsString>,
    /// Outputs in libvirt's syntax. The bytes are whatever the file holds.
    pub log_outputs: Option<OsString>,
    /// The greatest number of clients of the lock socket.
    pub max_clients: Option<u32>,
    /// The greatest number of clients of the admin socket.
    pub admin_max_clients: Option<u32>,
}

/// Why a configuration file cannot be used. Displayed as the C daemon logs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    file_name: String,
    problem: Problem,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Problem {
    Unread(Unread),
    Syntax { line: u32, text: &'static str },
    Overflow { line: u32 },
    NotUnsigned { key: &'static str },
    NotString { key: &'static str },
    OutOfRange { key: &'static str },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = &self.file_name;
        write!(out, "Can't load config file: ")?;
        match &self.problem {
            Problem::Unread(reason @ Unread::Open(_)) => {
                write!(out, "Failed to open file '{file}': {reason}")
            }
            Problem::Unread(reason) => write!(out, "Failed to read file '{file}': {reason}"),
            Problem::Syntax { line, text } => {
                write!(
                    out,
                    "configuration file syntax error: {file}:{line}: {text}"
                )
            }
            Problem::Overflow { line } => {
                write!(
                    out,
                    "numerical overflow: {file}:{line}: numeric overflow in conf value"
                )
            }
            Problem::NotUnsigned { key } => write!(
                out,
                "internal error: {file}: expected an unsigned integer for '{key}' parameter"
            ),
            Problem::NotString { key } => {
                write!(
                    out,
                    "internal error: {file}: expected a string for '{key}' parameter"
                )
            }
            Problem::OutOfRange { key } => write!(
                out,
                "internal error: {file}: value for '{key}' parameter must be in range 0:{}",
                u32::MAX
            ),
        }?;
        write!(out, ": {file}")
    }
}

impl std::error::Error for ConfigError {}

/// Reads the file at `path`. Only a file that nobody asked for (`explicit` is false) may be missing:
/// then everything has its default.
pub fn load(path: &Path, explicit: bool) -> Result<Config, ConfigError> {
    let file_name = path.to_string_lossy();
    match whole_file::read(path, FILE_BYTES_MAX) {
        Ok(bytes) => parse(&file_name, &bytes),
        Err(Unread::Open(Errno::ENOENT)) if !explicit => Ok(Config::default()),
        Err(reason) => Err(ConfigError {
            file_name: file_name.into_owned(),
            problem: Problem::Unread(reason),
        }),
    }
}

/// Reads the text of a configuration file. `file_name` is for error messages alone.
pub fn parse(file_name: &str, bytes: &[u8]) -> Result<Config, ConfigError> {
    read_settings(bytes)
        .and_then(interpret)
        .map_err(|problem| ConfigError {
            file_name: file_name.to_owned(),
            problem,
        })
}

/// Another of libvirt's configuration files, in the same grammar.
#[derive(Debug)]
pub struct Other(Settings);

impl Other {
    /// Reads the file at `path`; `None` if there is none.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn load(path: &Path) -> Result<Option<Other>, ConfigError> {
        let wrong = |problem| ConfigError {
            file_name: path.to_string_lossy().into_owned(),
            problem,
        };
        match whole_file::read(path, FILE_BYTES_MAX) {
            Ok(bytes) => match read_settings(&bytes) {
                Ok(settings) => Ok(Some(Other(settings))),
                Err(problem) => Err(wrong(problem)),
            },
            Err(Unread::Open(Errno::ENOENT)) => Ok(None),
            Err(reason) => Err(wrong(Problem::Unread(reason))),
        }
    }

    /// The text that a key has.
    pub fn text(&self, key: &str) -> Option<&[u8]> {
        match self.0.get(key.as_bytes()) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The number that a key has.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.0.get(key.as_bytes()) {
            Some(Value::Unsigned(number)) => Some(*number),
            _ => None,
        }
    }
}

/// A value as the grammar knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Unsigned(u64),
    /// Below zero: no key takes one, so the number itself is of no interest.
    Negative,
    String(Vec<u8>),
    /// No key takes a list, so only its form is checked.
    List,
}

type Settings = HashMap<Vec<u8>, Value>;

/// Picks the known keys. The order decides which of several errors is reported.
fn interpret(mut settings: Settings) -> Result<Config, Problem> {
    Ok(Config {
        log_level: unsigned(&mut settings, "log_level")?.unwrap_or(0),
        log_filters: string(&mut settings, "log_filters")?,
        log_outputs: string(&mut settings, "log_outputs")?,
        max_clients: unsigned(&mut settings, "max_clients")?,
        admin_max_clients: unsigned(&mut settings, "admin_max_clients")?,
    })
}

fn unsigned(settings: &mut Settings, key: &'static str) -> Result<Option<u32>, Problem> {
    match settings.remove(key.as_bytes()) {
        None => Ok(None),
        Some(Value::Unsigned(number)) => u32::try_from(number)
            .map(Some)
            .map_err(|_| Problem::OutOfRange { key }),
        Some(_) => Err(Problem::NotUnsigned { key }),
    }
}

fn string(settings: &mut Settings, key: &'static str) -> Result<Option<OsString>, Problem> {
    match settings.remove(key.as_bytes()) {
        None => Ok(None),
        Some(Value::String(bytes)) => Ok(Some(OsString::from_vec(bytes))),
        Some(_) => Err(Problem::NotString { key }),
    }
}

fn read_settings(bytes: &[u8]) -> Result<Settings, Problem> {
    let mut reader = Reader {
        rest: bytes,
        line: 1,
    };
    let mut settings = Settings::default();
    while !reader.rest.is_empty() {
        if let Some((name, value)) = reader.statement()? {
            settings.entry(name).or_insert(value);
        }
        reader.separator()?;
    }
    Ok(settings)
}

/// The text that is still to be read, and the number of the line that it begins on.
struct Reader<'a> {
    rest: &'a [u8],
    line: u32,
}

impl<'a> Reader<'a> {
    /// A setting or a comment. Blank lines before it belong to it: that is why a file of nothing
    /// but blank lines is an error.
    fn statement(&mut self) -> Result<Option<(Vec<u8>, Value)>, Problem> {
        self.skip_blanks_and_line_ends();
        if self.next() == Some(b'#') {
            self.skip_to_line_end();
            return Ok(None);
        }
        let name = self.name()?;
        self.skip_blanks();
        if self.next() != Some(b'=') {
            return Err(self.wrong("expecting an assignment"));
        }
        self.advance(1);
        let value = self.value(0)?;
        self.skip_blanks();
        if self.next() == Some(b'#') {
            self.skip_to_line_end();
        }
        Ok(Some((name.to_vec(), value)))
    }

    /// What stands between two statements.
    fn separator(&mut self) -> Result<(), Problem> {
        self.skip_blanks();
        match self.next() {
            None => {}
            Some(b'\n' | b'\r') => self.skip_blanks_and_line_ends(),
            Some(b';') => {
                self.advance(1);
                self.skip_blanks_and_line_ends();
            }
            Some(_) => return Err(self.wrong("expecting a separator")),
        }
        Ok(())
    }

    fn name(&mut self) -> Result<&'a [u8], Problem> {
        if !self.next().is_some_and(|byte| byte.is_ascii_alphabetic()) {
            return Err(self.wrong("expecting a name"));
        }
        Ok(self.take_while(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
    }

    /// `depth` is the number of lists that the value stands in.
    fn value(&mut self, depth: usize) -> Result<Value, Problem> {
        self.skip_blanks();
        match self.next() {
            Some(b'"' | b'\'') => Ok(Value::String(self.string()?.to_vec())),
            Some(b'[') => self.list(depth),
            Some(byte) if byte.is_ascii_digit() || byte == b'-' || byte == b'+' => self.number(),
            _ => Err(self.wrong("expecting a value")),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, Problem> {
        if depth >= LIST_DEPTH_MAX {
            return Err(self.wrong("lists are nested too deeply"));
        }
        let inside = depth.saturating_add(1);
        self.advance(1);
        self.skip_blanks_and_line_ends();
        if self.next().is_some_and(|byte| byte != b']') {
            self.value(inside)?;
            self.skip_blanks_and_line_ends();
        }
        while let Some(byte) = self.next() {
            match byte {
                b']' => break,
                b',' => self.advance(1),
                _ => return Err(self.wrong("expecting a separator in list")),
            }
            self.skip_blanks_and_line_ends();
            if self.next() == Some(b']') {
                break;
            }
            self.value(inside)?;
            self.skip_blanks_and_line_ends();
        }
        if self.next() != Some(b']') {
            return Err(self.wrong("list is not closed with ]"));
        }
        self.advance(1);
        Ok(Value::List)
    }

    fn number(&mut self) -> Result<Value, Problem> {
        let sign = self.next().filter(|byte| matches!(byte, b'-' | b'+'));
        if sign.is_some() {
            self.advance(1);
        }
        let digits = self.take_while(|byte| byte.is_ascii_digit());
        if digits.is_empty() {
            return Err(self.wrong("unterminated number"));
        }
        let mut number: i64 = 0;
        for digit in digits {
            number = number
                .checked_mul(10)
                .and_then(|tens| tens.checked_add(i64::from(digit.wrapping_sub(b'0'))))
                .ok_or(Problem::Overflow { line: self.line })?;
        }
        match (sign, u64::try_from(number)) {
            (Some(b'-'), _) | (_, Err(_)) => Ok(Value::Negative),
            (_, Ok(number)) => Ok(Value::Unsigned(number)),
        }
    }

    /// A string in quotes. There are no escapes.
    fn string(&mut self) -> Result<&'a [u8], Problem> {
        // Three quotes begin a long string only if more follows than three others: without it,
        // libvirt reads an empty string and then trips over the rest.
        if self.rest.starts_with(b"\"\"\"") && self.rest.len() > 6 {
            return self.long_string();
        }
        let quote = self.next();
        self.advance(1);
        let content = self.take_while(|byte| Some(byte) != quote && byte != b'\n' && byte != b'\r');
        if self.next() != quote {
            return Err(self.wrong("unterminated string"));
        }
        self.advance(1);
        Ok(content)
    }

    /// A string in three double quotes, which may hold line ends and quotes.
    fn long_string(&mut self) -> Result<&'a [u8], Problem> {
        self.advance(3);
        let end = self.rest.windows(3).position(|window| window == b"\"\"\"");
        let length = end.unwrap_or_else(|| self.rest.len().saturating_sub(2));
        let content = self.rest.get(..length).unwrap_or_default();
        self.count_lines(content);
        self.advance(length);
        if end.is_none() {
            return Err(self.wrong("unterminated string"));
        }
        self.advance(3);
        Ok(content)
    }

    fn next(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    fn advance(&mut self, count: usize) {
        self.rest = self.rest.get(count..).unwrap_or_default();
    }

    fn take_while(&mut self, wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let count = self.rest.iter().take_while(|byte| wanted(**byte)).count();
        let taken = self.rest.get(..count).unwrap_or_default();
        self.advance(count);
        taken
    }

    fn skip_blanks(&mut self) {
        self.take_while(|byte| byte == b' ' || byte == b'\t');
    }

    fn skip_blanks_and_line_ends(&mut self) {
        let skipped = self.take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'));
        self.count_lines(skipped);
    }

    fn skip_to_line_end(&mut self) {
        self.take_while(|byte| byte != b'\n' && byte != b'\r');
    }

    fn count_lines(&mut self, passed: &[u8]) {
        let line_ends = passed.iter().filter(|byte| **byte == b'\n').count();
        self.line = self
            .line
            .saturating_add(u32::try_from(line_ends).unwrap_or(u32::MAX));
    }

    fn wrong(&self, text: &'static str) -> Problem {
        Problem::Syntax {
            line: self.line,
            text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse("f", text.as_bytes()).unwrap_err().to_string()
    }

    fn syntax(line: u32, text: &str) -> String {
        format!("Can't load config file: configuration file syntax error: f:{line}: {text}: f")
    }

    #[test]
    fn every_key_is_read() {
        let text = "log_level = 2 # why\nlog_filters='1:a'; log_outputs = \"\"\"2:file:\n/x\"\"\"\n\
                    max_clients=7\r\nadmin_max_clients = +0\nunknown = [1, \"a\", [ ], ]\n";
        let expected = Config {
            log_level: 2,
            log_filters: Some("1:a".into()),
            log_outputs: Some("2:file:\n/x".into()),
            max_clients: Some(7),
            admin_max_clients: Some(0),
        };
        assert_eq!(parse("f", text.as_bytes()), Ok(expected));
    }

    #[test]
    fn of_a_key_given_twice_the_first_counts() {
        let config = parse("f", b"max_clients = 3\nmax_clients = \"x\"").unwrap();
        assert_eq!(config.max_clients, Some(3));
    }

    #[test]
    fn what_libvirt_accepts_is_accepted() {
        for text in [
            "",
            "#",
            "\n#",
            "a=1;",
            "a=1;b=2",
            "a=1  \n  ",
            "  a=1",
            "a=[]",
            "a=[1,]",
            "a=-1",
            "a=\"\"\"\"\"\"\n",
            "a=\"\"",
            "a=\"\"\"x\ry\"\"\"",
            "a='x'#c",
            "a=1;\n\n#c",
            "a_=1",
        ] {
            assert_eq!(
                parse("f", text.as_bytes()),
                Ok(Config::default()),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_syntax_error_names_the_line_and_what_was_expected() {
        for (text, line, expected) in [
            (" ", 1, "expecting a name"),
            ("\n\n", 3, "expecting a name"),
            ("a=1\n;", 2, "expecting a name"),
            ("a=1;;", 1, "expecting a name"),
            ("_a=1", 1, "expecting a name"),
            ("a", 1, "expecting an assignment"),
            ("a\n=1", 1, "expecting an assignment"),
            ("a=\n1", 1, "expecting a value"),
            ("a=[,]", 1, "expecting a value"),
            ("a=[1,\n", 2, "expecting a value"),
            ("a=0x1", 1, "expecting a separator"),
            ("a=1\0", 1, "expecting a separator"),
            ("a=\"\"\"\"\"\"", 1, "expecting a separator"),
            ("a=[1#x\n]", 1, "expecting a separator in list"),
            ("a=[", 1, "list is not closed with ]"),
            ("a='x\n'", 1, "unterminated string"),
            ("a=\"\"\"x\n\"\" \"\n", 2, "unterminated string"),
            ("a=--1", 1, "unterminated number"),
            ("a=\"\"\"\n\n\"\"\"\n5", 4, "expecting a name"),
        ] {
            assert_eq!(error(text), syntax(line, expected), "{text:?}");
        }
    }

    #[test]
    fn a_value_of_the_wrong_kind_names_its_key() {
        let prefix = "Can't load config file: internal error: f:";
        for text in ["max_clients=-1", "max_clients='1'", "max_clients=[1]"] {
            assert_eq!(
                error(text),
                format!("{prefix} expected an unsigned integer for 'max_clients' parameter: f")
            );
        }
        assert_eq!(
            error("log_filters=1"),
            format!("{prefix} expected a string for 'log_filters' parameter: f")
        );
        assert_eq!(
            error("max_clients=4294967296"),
            format!("{prefix} value for 'max_clients' parameter must be in range 0:4294967295: f")
        );
        assert_eq!(
            error("\na=9223372036854775808"),
            "Can't load config file: numerical overflow: f:2: numeric overflow in conf value: f"
        );
    }

    #[test]
    fn a_file_of_brackets_is_refused_without_deep_recursion() {
        let brackets = "[".repeat(1_000_000);
        assert_eq!(
            error(&format!("a={brackets}")),
            syntax(1, "lists are nested too deeply")
        );
    }

    #[test]
    fn strings_keep_bytes_that_are_not_text() {
        let config = parse("f", b"log_filters = '\xff'").unwrap();
        assert_eq!(config.log_filters, Some(OsString::from_vec(vec![0xff])));
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        let nowhere = Path::new("/nonexistent/virtlockd.conf");
        assert_eq!(load(nowhere, false), Ok(Config::default()));
        assert_eq!(
            load(nowhere, true).unwrap_err().to_string(),
            "Can't load config file: Failed to open file '/nonexistent/virtlockd.conf': \
             No such file or directory: /nonexistent/virtlockd.conf"
        );
    }

    #[test]
    fn the_installed_file_changes_nothing_and_shows_every_key() {
        let text = include_str!("dist/virtlockd.conf");
        assert_eq!(parse("f", text.as_bytes()), Ok(Config::default()));
        let settings: String = text
            .lines()
            .filter_map(|line| line.strip_prefix('#').filter(|rest| rest.contains(" = ")))
            .flat_map(|setting| [setting, "\n"])
            .collect();
        let config = parse("f", settings.as_bytes()).unwrap();
        assert!(config.log_level > 0 && config.log_filters.is_some());
        assert!(config.log_outputs.is_some() && config.max_clients.is_some());
        assert!(config.admin_max_clients.is_some());
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_a_panic(bytes in proptest::collection::vec(
            proptest::sample::select(b"a1\"'[],=;#\n\r -+\0".to_vec()), 0..60)) {
            let _ = parse("f", &bytes);
        }
    }
}
