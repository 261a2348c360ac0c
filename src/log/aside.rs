//! What is said where there is no log: in a process that has closed all outputs, and under whose numbers
//! other files are open by now. It is kept, for somebody who has a log.

use std::cell::RefCell;
use std::fmt::Write as _;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Metadata, Subscriber};

/// A warning or an error that was said.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Said {
    /// Whether it is an error.
    pub is_error: bool,
    /// The sentence.
    pub text: String,
}

impl Said {
    /// Says it here.
    pub fn repeat(&self) {
        if self.is_error {
            tracing::error!(target: "locking.lockspace", "{}", self.text);
        } else {
            tracing::warn!(target: "locking.lockspace", "{}", self.text);
        }
    }
}

/// Does work in which nothing reaches the log; what was said of warnings and errors.
pub fn aside<T>(work: impl FnOnce() -> T) -> (T, Vec<Said>) {
    KEPT.with_borrow_mut(Vec::clear);
    let done = tracing::subscriber::with_default(Keeper, work);
    (done, KEPT.with_borrow_mut(std::mem::take))
}

thread_local! {
    static KEPT: RefCell<Vec<Said>> = const { RefCell::new(Vec::new()) };
}

struct Keeper;

impl Subscriber for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= tracing::Level::WARN
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let said = Said {
            is_error: *event.metadata().level() == tracing::Level::ERROR,
            text: text.0,
        };
        KEPT.with_borrow_mut(|kept| kept.push(said));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            // Writing to a String fails only if the value's own formatting does; then the text is cut.
            let _ = write!(self.0, "{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_and_errors_are_kept_in_their_order_and_nothing_else() {
        let (done, said) = aside(|| {
            tracing::info!("not this");
            tracing::warn!(target: "locking.lockspace", "the file {} stays", "/x");
            tracing::error!("lost");
            7
        });
        assert_eq!(done, 7);
        let text = |is_error, text: &str| Said {
            is_error,
            text: text.to_owned(),
        };
        assert_eq!(said, [text(false, "the file /x stays"), text(true, "lost")]);
        assert_eq!(aside(|| ()).1, []);
    }
}
