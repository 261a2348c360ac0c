//! One log line: what it says, and its layout in libvirt's words. Text from outside cannot forge a
//! second line: what would move the cursor or end the line is written as an escape.

use std::fmt::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use super::level::Level;
use crate::host::{clock, process};

/// The longest text in bytes. The admin program takes strings of 4 MiB, which no log wants, and a
/// datagram of the journal must stay below its socket's buffer (212,992 bytes).
pub const MAX_TEXT_BYTES: usize = 64 * 1024;

/// Where in the code a line comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The module, without the name of the crate.
    pub module: &'a str,
    /// The source file.
    pub file: &'a str,
    /// The line of the source file.
    pub line: u32,
}

/// One thing to be logged.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    /// When it happened.
    pub time: SystemTime,
    /// How grave it is.
    pub level: Level,
    /// What the filters match, for example `rpc.server`.
    pub category: &'a str,
    /// Absent in the lines that the log writes about itself.
    pub place: Option<Place<'a>>,
    /// What happened.
    pub text: &'a str,
    /// The number of libvirt's error domain, for errors.
    pub domain: Option<u64>,
    /// The number of libvirt's error code, for errors.
    pub code: Option<u64>,
}

impl Record<'_> {
    /// The line of a file or terminal: `time: pid: level : place : text`, with its line end.
    pub fn line(&self) -> String {
        format!("{}: {}\n", utc(self.time), self.body())
    }

    /// The line without its time and line end, as syslog gets it.
    pub fn body(&self) -> String {
        let mut body = format!("{}: {} : ", process::started(), self.level.word());
        if let Some(place) = self.place {
            // Writing to a String cannot fail.
            let _ = write!(body, "{}:{} : ", place.module, place.line);
        }
        push_printable(&mut body, cut(self.text));
        body
    }
}

/// The most of one [`Printable`] that is shown whole, bytes: a path can be as long, and the text around
/// it. What is longer is the sort of thing that only a hostile client sends, and it would cost the
/// daemon the time of dozens of calls to write it down.
const SHOWN_BYTES: usize = 5 * 1024;
/// How much of its beginning, and how much of its end, where a sentence says why, is shown then.
const SHOWN_ENDS_BYTES: usize = 512;

/// Bytes from outside, to be shown in a text: what is not UTF-8 appears as `\xNN`, and the middle of
/// what is very long is left out.
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(pub &'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.len() <= SHOWN_BYTES {
            return show(f, self.0);
        }
        let left_out = self
            .0
            .len()
            .saturating_sub(SHOWN_ENDS_BYTES.saturating_mul(2));
        let end = SHOWN_ENDS_BYTES.saturating_add(left_out);
        show(f, self.0.get(..SHOWN_ENDS_BYTES).unwrap_or_default())?;
        write!(f, "[{left_out} bytes left out]")?;
        show(f, self.0.get(end..).unwrap_or_default())
    }
}

fn show(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for chunk in bytes.utf8_chunks() {
        f.write_str(chunk.valid())?;
        for byte in chunk.invalid() {
            write!(f, "\\x{byte:02x}")?;
        }
    }
    Ok(())
}

/// The first [`MAX_TEXT_BYTES`] of a text, cut between two characters.
pub fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or("")
}

fn push_printable(line: &mut String, text: &str) {
    // Nearly every text is like that, and it is seen much sooner.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return line.push_str(text);
    }
    let mut rest = text;
    while let Some((at, character)) = rest.char_indices().find(|(_, found)| !is_plain(*found)) {
        let (plain, escaped) = rest.split_at(at);
        line.push_str(plain);
        match character {
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            _ if character.is_control() => {
                let _ = write!(line, "\\x{:02x}", u32::from(character));
            }
            _ => {
                let _ = write!(line, "\\u{{{:x}}}", u32::from(character));
            }
        }
        rest = escaped.get(character.len_utf8()..).unwrap_or_default();
    }
    line.push_str(rest);
}

/// Besides control characters, separators of lines, and marks that turn the direction of writing,
/// make a line read differently from what it says.
fn is_plain(character: char) -> bool {
    !character.is_control()
        && !matches!(
            character,
            '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// `2026-11-22 05:28:24.494+0000`
fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let date = clock::utc(seconds);
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:03}+0000",
        i64::from(date.tm_year).saturating_add(1900),
        date.tm_mon.saturating_add(1),
        date.tm_mday,
        date.tm_hour,
        date.tm_min,
        date.tm_sec,
        since.subsec_millis()
    )
}

/// `Nov 22 07:21:27`, in the zone of the host: the time of day as syslog(3) writes it.
pub fn syslog_time(time: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let date = clock::local(seconds);
    let month = usize::try_from(date.tm_mon)
        .ok()
        .and_then(|month| MONTHS.get(month))
        .unwrap_or(&"Jan");
    format!(
        "{month} {:2} {:02}:{:02}:{:02}",
        date.tm_mday, date.tm_hour, date.tm_min, date.tm_sec
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn record(text: &str) -> Record<'_> {
        Record {
            time: UNIX_EPOCH + Duration::from_millis(1_795_325_304_494),
            level: Level::Error,
            category: "test",
            place: Some(Place {
                module: "server::fence",
                file: "src/server/fence.rs",
                line: 112,
            }),
            text,
            domain: None,
            code: None,
        }
    }

    #[test]
    fn a_line_has_libvirts_layout() {
        assert_eq!(
            record("no such lease").line(),
            format!(
                "2026-11-22 05:28:24.494+0000: {}: error : server::fence:112 : no such lease\n",
                std::process::id()
            )
        );
    }

    #[test]
    fn a_line_about_the_log_itself_has_no_place() {
        let mut record = record("hostname: a");
        record.level = Level::Info;
        record.place = None;
        assert_eq!(
            record.body(),
            format!("{}: info : hostname: a", std::process::id())
        );
    }

    #[test]
    fn leap_days_and_ends_of_years_are_right() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_735_689_599, "2024-12-31 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(
                utc(UNIX_EPOCH + Duration::from_secs(seconds)),
                format!("{date}.000+0000")
            );
        }
    }

    #[test]
    fn a_clock_before_the_epoch_does_not_stop_the_log() {
        assert_eq!(
            utc(UNIX_EPOCH - Duration::from_secs(5)),
            "1970-01-01 00:00:00.000+0000"
        );
    }

    #[test]
    fn text_from_outside_cannot_forge_a_line() {
        let line = record("a\n2026: 1: error : b\r\u{1b}[2J\0\u{85}\u{2028}\u{202e}\tz ü\\").line();
        assert!(line.ends_with(
            " : a\\n2026: 1: error : b\\r\\x1b[2J\\x00\\x85\\u{2028}\\u{202e}\\tz ü\\\n"
        ));
        assert_eq!(line.matches('\n').count(), 1);
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_as_numbers() {
        assert_eq!(Printable(b"a\xff\xc3z").to_string(), "a\\xff\\xc3z");
    }

    #[test]
    fn of_very_long_bytes_the_start_and_the_end_are_shown() {
        let name = [b"start", vec![b'x'; SHOWN_BYTES].as_slice(), b"end"].concat();
        let shown = Printable(&name).to_string();
        assert!(shown.starts_with("startxx") && shown.ends_with("xxend"));
        assert!(shown.contains("xx[4104 bytes left out]xx"), "{shown}");
        let path = vec![b'p'; 4096];
        assert_eq!(Printable(&path).to_string().as_bytes(), path);
    }

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        let long = format!("a{}", "ü".repeat(MAX_TEXT_BYTES));
        let short = cut(&long);
        assert_eq!(short.len(), MAX_TEXT_BYTES - 1);
        assert!(long.starts_with(short));
    }
}
