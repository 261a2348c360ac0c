//! Which settings count: configuration file, environment and command line, and the output that
//! is used when none of them names one. Plain data in, plain data out.

use std::ffi::OsString;
use std::path::Path;

use super::level::Level;
use super::settings::{
    FilterSetting, OutputSetting, SettingError, Target, parse_filters, parse_level, parse_outputs,
};

/// Everything that decides what is logged and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The level of a category that no filter matches.
    pub level: Level,
    /// The first that matches a category decides its level.
    pub filters: Vec<FilterSetting>,
    /// Where lines go. Never empty when it comes from [`resolve`].
    pub outputs: Vec<OutputSetting>,
    /// What the outputs become when they are taken away at run time.
    pub default_output: OutputSetting,
}

impl Settings {
    /// What holds before any setting is known: warnings and errors on stderr.
    pub fn initial() -> Settings {
        let stderr = OutputSetting {
            level: Level::DEFAULT,
            target: Target::Stderr,
        };
        Settings {
            level: Level::DEFAULT,
            filters: Vec::new(),
            outputs: vec![stderr.clone()],
            default_output: stderr,
        }
    }
}

/// The keys of the configuration file that concern the log.
#[derive(Clone, Copy, Debug, Default)]
pub struct Configured<'a> {
    /// `log_level`; 0 means that it is not set.
    pub level: u32,
    /// `log_filters`
    pub filters: Option<&'a str>,
    /// `log_outputs`
    pub outputs: Option<&'a str>,
}

/// The environment variables that concern the log; an empty one counts as not set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `LIBVIRT_DEBUG`
    pub level: Option<String>,
    /// `LIBVIRT_LOG_FILTERS`
    pub filters: Option<String>,
    /// `LIBVIRT_LOG_OUTPUTS`
    pub outputs: Option<String>,
}

impl Environment {
    /// Asks `lookup` (`std::env::var_os` in the daemon) for the three variables.
    ///
    /// # Errors
    /// [`SettingError::NotUtf8`] names the variable that is not text.
    pub fn read(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Environment, SettingError> {
        let read = |name: &'static str| match lookup(name) {
            Some(value) if value.is_empty() => Ok(None),
            Some(value) => value
                .into_string()
                .map(Some)
                .map_err(|_| SettingError::NotUtf8(name)),
            None => Ok(None),
        };
        Ok(Environment {
            level: read("LIBVIRT_DEBUG")?,
            filters: read("LIBVIRT_LOG_FILTERS")?,
            outputs: read("LIBVIRT_LOG_OUTPUTS")?,
        })
    }
}

/// How the daemon runs, as far as the log asks.
#[derive(Clone, Copy, Debug)]
pub struct RunMode<'a> {
    /// `-v`
    pub verbose: bool,
    /// `-d`
    pub background: bool,
    /// Standard input is a terminal.
    pub stdin_is_tty: bool,
    /// The journal's socket can be written to; see [`super::journal_is_writable`].
    pub journal_writable: bool,
    /// Where the log of a background daemon goes when there is no journal.
    pub log_file: &'a Path,
    /// The working directory, for relative paths of files.
    pub directory: &'a Path,
}

/// The settings that count: the environment goes over the file, `-v` over both. Each list of the
/// environment replaces that of the file as a whole.
///
/// # Errors
/// The first malformed setting in the order level, filters, outputs; the file's before the
/// environment's. A malformed setting of the file is an error even if the environment would
/// replace it. The daemon prints it with [`super::early_error`] and exits with 1.
pub fn resolve(
    configured: Configured<'_>,
    environment: &Environment,
    mode: RunMode<'_>,
) -> Result<Settings, SettingError> {
    let mut level = match configured.level {
        0 => Level::DEFAULT,
        number => {
            Level::from_number(number).ok_or_else(|| SettingError::Level(number.to_string()))?
        }
    };
    let mut filters = parse_filters(configured.filters.unwrap_or(""))?;
    let mut outputs = parse_outputs(configured.outputs.unwrap_or(""), mode.directory)?;
    if let Some(text) = &environment.level {
        level = parse_level(text)?;
    }
    if let Some(text) = &environment.filters {
        filters = parse_filters(text)?;
    }
    if let Some(text) = &environment.outputs {
        outputs = parse_outputs(text, mode.directory)?;
    }
    if mode.verbose {
        level = level.min(Level::Info);
    }
    let default_output = default_output(level, mode);
    if outputs.is_empty() {
        outputs.push(default_output.clone());
    }
    Ok(Settings {
        level,
        filters,
        outputs,
        default_output,
    })
}

/// The journal gets no debug lines unless an output asks for them: they would drown the host's log.
fn default_output(level: Level, mode: RunMode<'_>) -> OutputSetting {
    let target = match (mode.background, mode.journal_writable) {
        (true, false) => Target::File(mode.log_file.to_owned()),
        (true, true) => Target::Journald,
        (false, true) if !mode.stdin_is_tty => Target::Journald,
        (false, _) => Target::Stderr,
    };
    let level = match target {
        Target::Journald => level.max(Level::Info),
        _ => level,
    };
    OutputSetting { level, target }
}

#[cfg(test)]
mod tests {
    use super::super::settings::{format_filters, format_outputs};
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    fn foreground() -> RunMode<'static> {
        RunMode {
            verbose: false,
            background: false,
            stdin_is_tty: false,
            journal_writable: false,
            log_file: Path::new("/var/log/libvirt/virtlockd.log"),
            directory: Path::new("/"),
        }
    }

    fn shown(configured: Configured<'_>, environment: &Environment, mode: RunMode<'_>) -> String {
        match resolve(configured, environment, mode) {
            Ok(settings) => format!(
                "{} [{}] [{}] [{}]",
                settings.level.number(),
                format_filters(&settings.filters),
                format_outputs(&settings.outputs),
                settings.default_output
            ),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_default_output_follows_the_way_the_daemon_runs() {
        for (background, journal_writable, stdin_is_tty, output) in [
            (true, true, false, "3:journald"),
            (true, true, true, "3:journald"),
            (true, false, false, "3:file:/var/log/libvirt/virtlockd.log"),
            (false, true, false, "3:journald"),
            (false, true, true, "3:stderr"),
            (false, false, false, "3:stderr"),
            (false, false, true, "3:stderr"),
        ] {
            let mode = RunMode {
                background,
                journal_writable,
                stdin_is_tty,
                ..foreground()
            };
            assert_eq!(
                shown(Configured::default(), &Environment::default(), mode),
                format!("3 [] [{output}] [{output}]")
            );
        }
    }

    #[test]
    fn environment_goes_over_the_file_and_verbose_over_both() {
        let configured = Configured {
            level: 4,
            filters: Some("1:a"),
            outputs: Some("1:stderr"),
        };
        let mut environment = Environment::default();
        assert_eq!(
            shown(configured, &environment, foreground()),
            "4 [1:*a* ] [1:stderr] [4:stderr]"
        );
        environment.level = Some("warning".to_owned());
        environment.filters = Some("2:b".to_owned());
        environment.outputs = Some("2:file:x".to_owned());
        assert_eq!(
            shown(configured, &environment, foreground()),
            "3 [2:*b* ] [2:file:/x] [3:stderr]"
        );
        let verbose = RunMode {
            verbose: true,
            ..foreground()
        };
        assert_eq!(
            shown(configured, &environment, verbose),
            "2 [2:*b* ] [2:file:/x] [2:stderr]"
        );
    }

    #[test]
    fn verbose_never_makes_the_log_quieter() {
        let configured = Configured {
            level: 1,
            ..Configured::default()
        };
        let mode = RunMode {
            verbose: true,
            ..foreground()
        };
        assert!(shown(configured, &Environment::default(), mode).starts_with("1 "));
    }

    #[test]
    fn the_journal_is_never_the_default_for_debug_lines() {
        let configured = Configured {
            level: 1,
            ..Configured::default()
        };
        let mode = RunMode {
            journal_writable: true,
            ..foreground()
        };
        assert_eq!(
            shown(configured, &Environment::default(), mode),
            "1 [] [2:journald] [2:journald]"
        );
    }

    #[test]
    fn a_list_of_blanks_is_no_list() {
        let configured = Configured {
            outputs: Some(" "),
            filters: Some(""),
            ..Configured::default()
        };
        assert_eq!(
            shown(configured, &Environment::default(), foreground()),
            "3 [] [3:stderr] [3:stderr]"
        );
    }

    #[test]
    fn the_first_malformed_setting_ends_the_start() {
        let bad = Configured {
            level: 7,
            filters: Some("1"),
            outputs: Some("1"),
        };
        let replaced = Environment {
            level: Some("1".to_owned()),
            filters: Some("1:a".to_owned()),
            outputs: Some("1:+".to_owned()),
        };
        let sentence = "invalid argument: Failed to set logging priority, argument '7' is invalid";
        assert_eq!(shown(bad, &replaced, foreground()), sentence);
        let bad = Configured { level: 0, ..bad };
        let sentence = "invalid argument: Malformed format for filter '1'";
        assert_eq!(shown(bad, &replaced, foreground()), sentence);
        let bad = Configured {
            filters: None,
            ..bad
        };
        let sentence = "invalid argument: Malformed format for log output '1'";
        assert_eq!(shown(bad, &replaced, foreground()), sentence);
        let sentence = "invalid argument: Invalid log destination '+' for log output '1:+'";
        assert_eq!(
            shown(Configured::default(), &replaced, foreground()),
            sentence
        );
    }

    #[test]
    fn an_empty_variable_is_not_set_and_bytes_that_are_no_text_are_refused() {
        let environment = Environment::read(|name| match name {
            "LIBVIRT_DEBUG" => Some(OsString::new()),
            "LIBVIRT_LOG_FILTERS" => Some(OsString::from("1:a")),
            _ => None,
        })
        .expect("text");
        assert_eq!(environment.level, None);
        assert_eq!(environment.filters.as_deref(), Some("1:a"));
        assert_eq!(environment.outputs, None);
        let error = Environment::read(|_| Some(OsString::from_vec(vec![0xff]))).expect_err("bytes");
        assert_eq!(error, SettingError::NotUtf8("LIBVIRT_DEBUG"));
    }
}
