//! The log as a subscriber of `tracing`: an event becomes a record. Spans are not logged.
//!
//! Whether a place in the code is wanted is decided once, when it is first reached and when the
//! settings change; tracing keeps the answer there, so an event that nobody wants costs a load
//! and a branch.
//!
//! An event says its category with `target:`, in libvirt's names (`locking.lock_daemon`,
//! `rpc.server`). The fields `domain` and `code` are the numbers of a libvirt error and go to the
//! journal; any other field is appended to the text as ` name=value`.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};

use super::level::Level;
use super::line::{Place, Record};
use super::logger::Logger;

/// Hands events to a [`Logger`].
#[derive(Clone, Debug)]
pub struct LogSubscriber(Arc<Logger>);

impl LogSubscriber {
    /// A subscriber for this logger.
    pub fn new(logger: Arc<Logger>) -> LogSubscriber {
        LogSubscriber(logger)
    }
}

impl Subscriber for LogSubscriber {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
            && self
                .0
                .wants(Level::of_event(metadata.level()), metadata.target())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match self.0.least_level() {
            Level::Debug => LevelFilter::TRACE,
            Level::Info => LevelFilter::INFO,
            Level::Warning => LevelFilter::WARN,
            Level::Error => LevelFilter::ERROR,
        })
    }

    /// The fields are formatted before the logger is locked: their formatting may log itself.
    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let text = fields.message + &fields.others;
        let place = metadata.module_path().map(|module| Place {
            module: short_module(module),
            file: metadata.file().unwrap_or_default(),
            line: metadata.line().unwrap_or_default(),
        });
        self.0.write(&Record {
            time: SystemTime::now(),
            level: Level::of_event(metadata.level()),
            category: metadata.target(),
            place,
            text: &text,
            domain: fields.domain,
            code: fields.code,
        });
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The module without the crate's name, which every line would repeat. The root of the program
/// is its `main.rs`.
fn short_module(module: &str) -> &str {
    match module.strip_prefix(env!("CARGO_PKG_NAME")) {
        Some("") => "main",
        Some(rest) => rest.strip_prefix("::").unwrap_or(module),
        None => module,
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
    domain: Option<u64>,
    code: Option<u64>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "domain" => self.domain = Some(value),
            "code" => self.code = Some(value),
            _ => self.record_debug(field, &value),
        }
    }

    /// A plain number in the code is an i32.
    fn record_i64(&mut self, field: &Field, value: i64) {
        match u64::try_from(value) {
            Ok(value) => self.record_u64(field, value),
            Err(_) => self.record_debug(field, &value),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String fails only if the value's own formatting does; then the text is cut.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.others, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Services;
    use super::super::resolve::Settings;
    use super::super::settings::{parse_filters, parse_outputs};
    use super::super::test_directory::TestDirectory;
    use super::*;
    use std::path::Path;
    use tracing::subscriber::with_default;
    use tracing::{debug, error, info, info_span, warn};

    /// A logger of its own that writes everything to the file `log` in a new directory.
    fn logger(outputs: &str, filters: &str) -> (TestDirectory, Arc<Logger>, LogSubscriber) {
        let directory = TestDirectory::new();
        let settings = Settings {
            outputs: parse_outputs(outputs, &directory).expect("outputs"),
            filters: parse_filters(filters).expect("filters"),
            ..Settings::initial()
        };
        let logger = Arc::new(Logger::open(settings, Services::default()).expect("open"));
        let subscriber = LogSubscriber::new(logger.clone());
        (directory, logger, subscriber)
    }

    /// The texts in a log file, without the two lines of introduction.
    fn texts(path: &Path) -> Vec<String> {
        let log = std::fs::read_to_string(path).unwrap_or_default();
        log.lines()
            .skip(2)
            .filter_map(|line| line.split(" : ").last())
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn an_event_becomes_a_line_with_its_place() {
        let (directory, _, subscriber) = logger("1:file:log", "");
        let mut line = 0;
        with_default(subscriber, || {
            line = line!() + 1;
            error!(domain = 7, code = 39u32, owner = "vm", "no {}", 1);
        });
        let log = std::fs::read_to_string(directory.join("log")).expect("log");
        let end = format!(
            " {}: error : log::subscriber::tests:{line} : no 1 owner=\"vm\"",
            std::process::id()
        );
        assert_eq!(log.lines().count(), 3);
        assert!(log.trim_end().ends_with(&end), "{log}");
    }

    #[test]
    fn the_first_filter_that_matches_decides_and_the_default_level_is_for_the_rest() {
        let (directory, _, subscriber) = logger("1:file:log", "4:rpc.quiet 1:rpc 3:rpc.loud");
        with_default(subscriber, || {
            warn!(target: "rpc.quiet", "no");
            error!(target: "rpc.quiet", "quiet error");
            debug!(target: "rpc.loud", "loud debug");
            info!(target: "locking", "no");
            warn!(target: "locking", "warning");
        });
        assert_eq!(
            texts(&directory.join("log")),
            ["quiet error", "loud debug", "warning"]
        );
    }

    #[test]
    fn each_output_has_its_own_level() {
        let (directory, _, subscriber) = logger("4:file:errors 1:file:all", "1:a");
        with_default(subscriber, || {
            info!(target: "a", "i");
            error!(target: "a", "e");
        });
        assert_eq!(texts(&directory.join("errors")), ["e"]);
        assert_eq!(texts(&directory.join("all")), ["i", "e"]);
    }

    #[test]
    fn what_no_output_takes_is_not_wanted() {
        let (_directory, logger, _) = logger("4:file:log", "1:a");
        assert!(!logger.wants(Level::Warning, "a"));
        assert!(logger.wants(Level::Error, "a"));
        assert_eq!(logger.least_level(), Level::Error);
    }

    #[test]
    fn filters_level_and_outputs_are_exchanged_without_losing_a_line() {
        let (directory, logger, subscriber) = logger("1:file:old", "");
        let speak = |number: u32| debug!(target: "a.b", "line {number}");
        with_default(subscriber, || {
            speak(1);
            logger.set_filters(parse_filters("1:a").expect("filters"));
            speak(2);
            let outputs = parse_outputs("1:file:new", &directory).expect("outputs");
            logger.set_outputs(outputs).expect("set");
            speak(3);
            logger.set_filters(Vec::new());
            speak(4);
            logger.set_level(Level::Debug);
            speak(5);
        });
        assert_eq!(texts(&directory.join("old")), ["line 2"]);
        assert_eq!(texts(&directory.join("new")), ["line 3", "line 5"]);
    }

    #[test]
    fn outputs_that_cannot_be_opened_leave_the_old_ones_in_place() {
        let (directory, logger, subscriber) = logger("1:file:old", "");
        let before = logger.settings();
        let wrong = parse_outputs("1:file:new 1:file:none/x", &directory).expect("outputs");
        logger.set_outputs(wrong.clone()).expect_err("set");
        let replacement = Settings {
            outputs: wrong,
            level: Level::Debug,
            ..before.clone()
        };
        logger.replace(replacement).expect_err("replace");
        assert_eq!(logger.settings(), before);
        with_default(subscriber, || warn!("still here"));
        assert_eq!(texts(&directory.join("old")), ["still here"]);
    }

    #[test]
    fn no_outputs_restore_the_default_output() {
        let (_directory, logger, _) = logger("1:file:log", "");
        logger.set_outputs(Vec::new()).expect("set");
        assert_eq!(
            logger.settings().outputs,
            [Settings::initial().default_output]
        );
    }

    #[test]
    fn a_value_that_logs_while_it_is_formatted_does_not_stop_the_log() {
        struct Chatty;
        impl fmt::Debug for Chatty {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                warn!("inner");
                f.write_str("outer")
            }
        }
        let (directory, _, subscriber) = logger("1:file:log", "");
        with_default(subscriber, || warn!("{:?}", Chatty));
        let texts = texts(&directory.join("log"));
        assert_eq!(texts.last().map(String::as_str), Some("outer"));
    }

    #[test]
    fn spans_are_accepted_and_not_logged() {
        let (directory, _, subscriber) = logger("1:file:log", "1:a");
        with_default(subscriber, || {
            let span = info_span!(target: "a", "span", number = 1);
            let _entered = span.enter();
            info!(target: "a", "inside");
        });
        assert_eq!(texts(&directory.join("log")), ["inside"]);
    }

    #[test]
    fn a_place_is_named_without_the_crate() {
        assert_eq!(short_module("virtlockd"), "main");
        assert_eq!(short_module("virtlockd::server::fence"), "server::fence");
        assert_eq!(short_module("virtlockdx::a"), "virtlockdx::a");
        assert_eq!(short_module("mio::poll"), "mio::poll");
    }
}
