//! Somebody who reads every line of the log: names from hostile calls stand in them, and a line is
//! only made when it is wanted.

use std::fmt::{Debug, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

struct LogReader;

/// Has every line of this process read from now on.
pub fn install() {
    let _ = tracing::subscriber::set_global_default(LogReader);
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, _field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, "{value:?}");
    }
}

impl Subscriber for LogReader {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        // That it stays one line is the work of the log's outputs, which is tested there.
        let mut line = Line(String::new());
        event.record(&mut line);
        std::hint::black_box(line);
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}
