//! The settings of the log as people write them: libvirt's strings for outputs and filters, read
//! and written back. No input or output here.
//!
//! The texts of the errors are those of libvirt 11.3, because they also travel over the admin
//! socket.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::level::Level;
use crate::host::errno::{self, Errno};

/// Where an output writes, with the name that tells two of one kind apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Descriptor 2.
    Stderr,
    /// The journal of systemd, over its native socket.
    Journald,
    /// syslog, with the name that stands before each message.
    Syslog(String),
    /// A file that is appended to. The path is absolute.
    File(PathBuf),
}

/// One output: what it takes and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputSetting {
    /// Lines below this level are not written there.
    pub level: Level,
    /// Where the lines go.
    pub target: Target,
}

/// One filter: the level of all categories that match a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterSetting {
    /// Lines below this level are not written.
    pub level: Level,
    /// What the category must match, in the sense of fnmatch(3); the stars around it are included.
    pub pattern: String,
}

/// Why a log setting cannot be taken.
///
/// `Display` gives the whole sentence as libvirt prints it; [`SettingError::detail`] the part of
/// it that is the detail of an error reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingError {
    /// `LIBVIRT_DEBUG` or `log_level` is not a level.
    Level(String),
    /// The list of outputs is malformed; the text is the detail.
    Output(String),
    /// The list of filters is malformed; the text is the detail.
    Filter(String),
    /// The setting of this name is not UTF-8.
    NotUtf8(&'static str),
    /// An output cannot be opened: what it is, and the errno.
    Open(String, Errno),
}

impl SettingError {
    /// The sentence without libvirt's name of the error class ("invalid argument: ").
    pub fn detail(&self) -> String {
        match self {
            SettingError::Level(text) => {
                format!("Failed to set logging priority, argument '{text}' is invalid")
            }
            SettingError::Output(text) | SettingError::Filter(text) => text.clone(),
            SettingError::NotUtf8(name) => format!("{name} is not UTF-8 text"),
            SettingError::Open(what, errno) => {
                format!("failed to open {what}: {}", errno::text(*errno))
            }
        }
    }

    /// The errno, if a system call failed; such an error is libvirt's code 38 (system error),
    /// every other one code 8 (invalid argument).
    pub fn errno(&self) -> Option<Errno> {
        match self {
            SettingError::Open(_, errno) => Some(*errno),
            _ => None,
        }
    }
}

impl fmt::Display for SettingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno() {
            Some(_) => f.write_str(&self.detail()),
            None => write!(f, "invalid argument: {}", self.detail()),
        }
    }
}

/// Reads the value of `LIBVIRT_DEBUG`: a number from 1 to 4 or one of the four words, nothing around it.
///
/// # Errors
/// [`SettingError::Level`] for everything else.
pub fn parse_level(text: &str) -> Result<Level, SettingError> {
    match text {
        "1" | "debug" => Ok(Level::Debug),
        "2" | "info" => Ok(Level::Info),
        "3" | "warning" => Ok(Level::Warning),
        "4" | "error" => Ok(Level::Error),
        _ => Err(SettingError::Level(text.to_owned())),
    }
}

impl std::error::Error for SettingError {}

/// Bytes from outside (a file, the environment, the admin socket) as the text of the setting `name`.
///
/// # Errors
/// [`SettingError::NotUtf8`]; libvirt takes any bytes, but a setting must be readable in a log.
pub fn setting_text<'a>(name: &'static str, bytes: &'a [u8]) -> Result<&'a str, SettingError> {
    std::str::from_utf8(bytes).map_err(|_| SettingError::NotUtf8(name))
}

/// Reads a list of outputs. Blanks separate the entries; a relative path of a file starts at
/// `directory`. Of two entries of one kind and name the later one stays, in its later place.
/// The list may be empty.
///
/// # Errors
/// [`SettingError::Output`] for the first entry that is malformed.
pub fn parse_outputs(text: &str, directory: &Path) -> Result<Vec<OutputSetting>, SettingError> {
    let mut outputs: Vec<OutputSetting> = Vec::new();
    for entry in entries(text) {
        let output = parse_output(entry, directory)?;
        outputs.retain(|earlier| earlier.target != output.target);
        outputs.push(output);
    }
    Ok(outputs)
}

/// Reads a list of filters. Blanks separate the entries, their order is kept, and none is left out.
///
/// # Errors
/// [`SettingError::Filter`] for the first entry that is malformed.
pub fn parse_filters(text: &str) -> Result<Vec<FilterSetting>, SettingError> {
    entries(text).map(parse_filter).collect()
}

/// The outputs as the admin socket shows them, and as [`parse_outputs`] reads them.
pub fn format_outputs(outputs: &[OutputSetting]) -> String {
    let entries: Vec<String> = outputs.iter().map(ToString::to_string).collect();
    entries.join(" ")
}

/// The filters as the admin socket shows them: each is followed by a blank, the last one too.
pub fn format_filters(filters: &[FilterSetting]) -> String {
    filters
        .iter()
        .map(|filter| format!("{}:{} ", filter.level.number(), filter.pattern))
        .collect()
}

/// The filters as [`parse_filters`] reads them: without the stars that it puts around a pattern.
/// For the settings that a restart carries over; [`format_filters`] read back would gain stars.
pub fn filters_setting(filters: &[FilterSetting]) -> String {
    let entries: Vec<String> = filters
        .iter()
        .map(|filter| {
            let inner = filter.pattern.strip_prefix('*').unwrap_or(&filter.pattern);
            let inner = inner.strip_suffix('*').unwrap_or(inner);
            // The plus is dropped on reading, and protects a pattern that starts with one itself.
            format!("{}:+{inner}", filter.level.number())
        })
        .collect();
    entries.join(" ")
}

/// The outputs as [`restore_outputs`] reads them, for the settings that a restart carries over: a path
/// may hold what separates entries and their parts, or bytes that are no text.
pub fn outputs_setting(outputs: &[OutputSetting]) -> String {
    let entry = |output: &OutputSetting| match &output.target {
        Target::File(path) => format!("{}:file:{}", output.level.number(), protected(path)),
        _ => output.to_string(),
    };
    let entries: Vec<String> = outputs.iter().map(entry).collect();
    entries.join(" ")
}

/// Reads what [`outputs_setting`] wrote.
///
/// # Errors
/// [`SettingError::Output`] for the first entry that is malformed.
pub fn restore_outputs(text: &str) -> Result<Vec<OutputSetting>, SettingError> {
    let mut outputs = parse_outputs(text, Path::new("/"))?;
    for output in &mut outputs {
        if let Target::File(path) = &mut output.target {
            let plain = unprotected(path).ok_or_else(|| {
                let path = path.display();
                SettingError::Output(format!("Malformed path '{path}' of a log output"))
            })?;
            *path = plain;
        }
    }
    Ok(outputs)
}

/// A path without blanks and colons, in UTF-8. What is left out stands there as a zero byte, which no
/// path holds, and two hexadecimal digits.
fn protected(path: &Path) -> String {
    let is_text = path.to_str().is_some();
    let mut text = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b' ' | b':' | 0) || !is_text && !byte.is_ascii() {
            text.extend_from_slice(format!("\0{byte:02x}").as_bytes());
        } else {
            text.push(*byte);
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn unprotected(path: &Path) -> Option<PathBuf> {
    let mut pieces = path.as_os_str().as_bytes().split(|byte| *byte == 0);
    let mut plain = pieces.next()?.to_vec();
    for piece in pieces {
        let (digits, rest) = piece.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        plain.push(u8::from_str_radix(digits, 16).ok()?);
        plain.extend_from_slice(rest);
    }
    Some(PathBuf::from(OsString::from_vec(plain)))
}

impl fmt::Display for OutputSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = self.level.number();
        match &self.target {
            Target::Stderr => write!(f, "{level}:stderr"),
            Target::Journald => write!(f, "{level}:journald"),
            Target::Syslog(ident) => write!(f, "{level}:syslog:{ident}"),
            Target::File(path) => write!(f, "{level}:file:{}", path.display()),
        }
    }
}

/// Only the blank separates: a tab belongs to an entry, as in libvirt.
fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.split(' ').filter(|entry| !entry.is_empty())
}

fn parse_output(entry: &str, directory: &Path) -> Result<OutputSetting, SettingError> {
    let mut parts = entry.split(':');
    let (Some(level_text), Some(kind)) = (parts.next(), parts.next()) else {
        return Err(SettingError::Output(format!(
            "Malformed format for log output '{entry}'"
        )));
    };
    let (name, excess) = (parts.next(), parts.next());
    let level = parse_entry_level(level_text).ok_or_else(|| {
        SettingError::Output(format!(
            "Invalid log priority '{level_text}' for log output '{entry}'"
        ))
    })?;
    let target = match (kind, name, excess) {
        ("stderr", None, None) => Target::Stderr,
        ("journald", None, None) => Target::Journald,
        ("syslog", Some(ident), None) => Target::Syslog(ident.to_owned()),
        ("file", Some(path), None) => Target::File(absolute(path, directory)),
        ("stderr" | "journald" | "syslog" | "file", _, _) => {
            return Err(SettingError::Output(format!(
                "Log output '{entry}' does not meet the format requirements for destination type '{kind}'"
            )));
        }
        _ => {
            return Err(SettingError::Output(format!(
                "Invalid log destination '{kind}' for log output '{entry}'"
            )));
        }
    };
    Ok(OutputSetting { level, target })
}

/// Whatever follows a second colon is ignored, as in libvirt.
fn parse_filter(entry: &str) -> Result<FilterSetting, SettingError> {
    let mut parts = entry.split(':');
    let (Some(level_text), Some(pattern)) = (parts.next(), parts.next()) else {
        return Err(SettingError::Filter(format!(
            "Malformed format for filter '{entry}'"
        )));
    };
    let level = parse_entry_level(level_text).ok_or_else(|| {
        SettingError::Filter(format!(
            "Invalid priority '{level_text}' for filter '{entry}'"
        ))
    })?;
    let inner = pattern.strip_prefix('+').unwrap_or(pattern);
    // A zero byte would end the pattern for fnmatch(3).
    if inner.is_empty() || inner.contains('\0') {
        return Err(SettingError::Filter(format!(
            "Invalid match string '{pattern}'"
        )));
    }
    Ok(FilterSetting {
        level,
        pattern: format!("*{inner}*"),
    })
}

/// A level in an entry is what strtoul(3) takes: white space, a plus and leading zeros may stand
/// before the digits, nothing after them.
fn parse_entry_level(text: &str) -> Option<Level> {
    let digits = text.trim_start_matches(['\t', '\n', '\u{b}', '\u{c}', '\r']);
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Level::from_number(digits.parse().ok()?)
}

/// The path from the root, without `.`, `..` and doubled slashes. Only the text is looked at, as
/// libvirt does it: links are not followed, and nothing needs to exist.
fn absolute(path: &str, directory: &Path) -> PathBuf {
    let mut absolute = PathBuf::from("/");
    for component in directory.join(path).components() {
        match component {
            Component::Normal(name) => absolute.push(name),
            Component::ParentDir => {
                absolute.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    absolute
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_level_is_a_number_or_a_word() {
        for level in [Level::Debug, Level::Info, Level::Warning, Level::Error] {
            assert_eq!(parse_level(&level.number().to_string()), Ok(level));
            assert_eq!(parse_level(level.word()), Ok(level));
            assert_eq!(Level::from_number(level.number()), Some(level));
        }
    }

    #[test]
    fn anything_else_is_refused_with_libvirts_sentence() {
        for text in ["", "0", "5", "01", " 1", "1 ", "Debug", "warn", "err"] {
            let error = parse_level(text).expect_err(text);
            assert_eq!(
                error.to_string(),
                format!(
                    "invalid argument: Failed to set logging priority, argument '{text}' is invalid"
                )
            );
        }
    }

    fn outputs(text: &str) -> Result<String, String> {
        parse_outputs(text, Path::new("/base/dir"))
            .map(|list| format_outputs(&list))
            .map_err(|error| error.to_string())
    }

    fn filters(text: &str) -> Result<String, String> {
        parse_filters(text)
            .map(|list| format_filters(&list))
            .map_err(|error| error.to_string())
    }

    // Every case below was seen on libvirt's daemon 11.3 through its admin socket.
    #[test]
    fn outputs_are_read_and_shown_as_libvirt_does() {
        for (text, shown) in [
            ("4:stderr 3:file:/var/log/x", "4:stderr 3:file:/var/log/x"),
            (
                "1:file:rel.log 4:stderr",
                "1:file:/base/dir/rel.log 4:stderr",
            ),
            (
                "4:file:a 3:stderr 2:file:a   1:stderr",
                "2:file:/base/dir/a 1:stderr",
            ),
            ("3:syslog:a 3:syslog:b 2:syslog:a", "3:syslog:b 2:syslog:a"),
            ("+3:stderr", "3:stderr"),
            ("03:stderr", "3:stderr"),
            ("\t3:stderr", "3:stderr"),
            ("3:file:/tmp/d//x/../x.log", "3:file:/tmp/d/x.log"),
            ("3:syslog:", "3:syslog:"),
            ("3:file:", "3:file:/base/dir"),
            ("3:journald", "3:journald"),
            ("", ""),
            ("  ", ""),
        ] {
            assert_eq!(outputs(text).as_deref(), Ok(shown), "{text:?}");
        }
    }

    #[test]
    fn malformed_outputs_are_refused_with_libvirts_sentences() {
        for (text, sentence) in [
            ("x", "Malformed format for log output 'x'"),
            ("stderr", "Malformed format for log output 'stderr'"),
            ("3:stderr bad", "Malformed format for log output 'bad'"),
            (
                ":stderr",
                "Invalid log priority '' for log output ':stderr'",
            ),
            (
                "0:stderr",
                "Invalid log priority '0' for log output '0:stderr'",
            ),
            (
                "5:stderr",
                "Invalid log priority '5' for log output '5:stderr'",
            ),
            (
                "-3:stderr",
                "Invalid log priority '-3' for log output '-3:stderr'",
            ),
            (
                "3\t:stderr",
                "Invalid log priority '3\t' for log output '3\t:stderr'",
            ),
            (
                "3:Stderr",
                "Invalid log destination 'Stderr' for log output '3:Stderr'",
            ),
            (
                "3:stderr\t",
                "Invalid log destination 'stderr\t' for log output '3:stderr\t'",
            ),
            (
                "3:stderr:",
                "Log output '3:stderr:' does not meet the format requirements for destination type 'stderr'",
            ),
            (
                "3:file:/a:b",
                "Log output '3:file:/a:b' does not meet the format requirements for destination type 'file'",
            ),
            (
                "3:syslog",
                "Log output '3:syslog' does not meet the format requirements for destination type 'syslog'",
            ),
        ] {
            assert_eq!(
                outputs(text),
                Err(format!("invalid argument: {sentence}")),
                "{text:?}"
            );
        }
    }

    #[test]
    fn filters_are_read_and_shown_as_libvirt_does() {
        for (text, shown) in [
            (
                "1:+foo 2:bar:baz 4:x*[a-c] +3:q",
                "1:*foo* 2:*bar* 4:*x*[a-c]* 3:*q* ",
            ),
            ("1:a 2:a 1:a", "1:*a* 2:*a* 1:*a* "),
            ("1:++", "1:*+* "),
            (" 1:a", "1:*a* "),
            ("\t1:a", "1:*a* "),
            ("1:a\t", "1:*a\t* "),
            ("", ""),
            (" ", ""),
        ] {
            assert_eq!(filters(text).as_deref(), Ok(shown), "{text:?}");
        }
    }

    #[test]
    fn malformed_filters_are_refused_with_libvirts_sentences() {
        for (text, sentence) in [
            ("1", "Malformed format for filter '1'"),
            (":a", "Invalid priority '' for filter ':a'"),
            ("7:a", "Invalid priority '7' for filter '7:a'"),
            ("1:+", "Invalid match string '+'"),
            ("1:", "Invalid match string ''"),
        ] {
            assert_eq!(
                filters(text),
                Err(format!("invalid argument: {sentence}")),
                "{text:?}"
            );
        }
    }

    #[test]
    fn filters_survive_a_restart_as_their_setting() {
        let list = parse_filters("1:+foo 2:++x 3:*y* 4:**").expect("filters");
        assert_eq!(parse_filters(&filters_setting(&list)), Ok(list));
    }

    #[test]
    fn outputs_survive_a_restart_whatever_their_directory_is_called() {
        use std::ffi::OsStr;
        for directory in [
            &b"/plain"[..],
            b"/a dir:1",
            b"/a \xff b",
            "/gr\u{fc}n".as_bytes(),
        ] {
            let directory = Path::new(OsStr::from_bytes(directory));
            let list = parse_outputs("1:file:x 3:stderr 2:syslog:me", directory).expect("outputs");
            assert_eq!(restore_outputs(&outputs_setting(&list)), Ok(list));
        }
        assert!(restore_outputs("1:file:/a\0zz").is_err());
        assert!(restore_outputs("1:file:/a\0").is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_shown_reads_back(text in "([ :+*/.\t0-6a-d\\[]|stderr|file:|syslog:|journald|\\PC){0,24}") {
            let directory = Path::new("/base");
            if let Ok(list) = parse_outputs(&text, directory) {
                prop_assert_eq!(restore_outputs(&outputs_setting(&list)), Ok(list.clone()));
                prop_assert_eq!(parse_outputs(&format_outputs(&list), directory), Ok(list));
            }
            if let Ok(list) = parse_filters(&text) {
                prop_assert_eq!(parse_filters(&filters_setting(&list)), Ok(list));
            }
        }
    }
}
