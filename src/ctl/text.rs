//! Bytes from outside as text that does no harm, and uuids and times as people and programs write them.

use crate::host::clock;

/// Bytes as text that does nothing to a terminal: what is no text, or steers, is written as `\xNN` or
/// `\u{N}`, and a backslash as two, so that nothing else is written like that.
pub fn safe(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '\\' {
                text.push_str("\\\\");
            } else if character.is_control() || steers(character) {
                text.extend(character.escape_unicode());
            } else {
                text.push(character);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// JSON that does nothing to a terminal either: what steers is written as `\uNNNN`, which readers of JSON take for
/// the same.
pub fn safe_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        // The newlines are those between the values; in texts they are escaped already.
        if character != '\n' && (character.is_control() || steers(character)) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            text.push(character);
        }
    }
    text
}

/// Whether a character changes the direction of others, or cannot be seen.
fn steers(character: char) -> bool {
    matches!(
        character,
        '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
    )
}

/// A uuid as libvirt writes it.
pub fn uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (position, byte) in uuid.iter().enumerate() {
        if matches!(position, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// A time as RFC 3339 has it; `None` of 0, which means that nobody knows.
pub fn time(ms: u64) -> Option<String> {
    clock::rfc3339(ms)
}

/// So many of something.
pub fn count(number: u64, one: &str, many: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {many}"),
    }
}

/// For how long something has been so, in few characters.
pub fn age(since: u64, now: u64) -> String {
    if since == 0 {
        return "?".to_owned();
    }
    let seconds = now.saturating_sub(since) / 1000;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_from_outside_do_nothing_to_a_terminal() {
        assert_eq!(safe(b"/srv/disk \xc3\xa9.img"), "/srv/disk \u{e9}.img");
        assert_ne!(safe(b"\\xff"), safe(b"\xff"));
        assert_eq!(safe(b"a\\xff\\"), "a\\\\xff\\\\");
        let hostile = b"\x1b[2J\n\xff\xc2\x9b\xe2\x80\xae";
        assert_eq!(safe(hostile), "\\u{1b}[2J\\u{a}\\xff\\u{9b}\\u{202e}");
    }

    #[test]
    fn json_from_outside_does_nothing_to_a_terminal_and_is_read_as_it_was() {
        let hostile = "\u{1b}[2J\n\u{7f}\u{85}\u{9b}\u{61c}\u{202e}\u{2069}\u{e0041}\u{e9}\\";
        let value = serde_json::json!({ hostile: [hostile] });
        for json in [value.to_string(), format!("{value:#}")] {
            let text = safe_json(&json);
            assert!(
                !text
                    .chars()
                    .any(|it| it != '\n' && (it.is_control() || steers(it)))
            );
            assert!(
                text.contains("\\u007f\\u0085\\u009b\\u061c\\u202e\\u2069\\udb40\\udc41\u{e9}")
            );
            let read: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(read, value);
        }
    }

    #[test]
    fn times_are_those_of_rfc_3339() {
        let ms = 1_795_325_634_007;
        assert_eq!(time(ms).unwrap(), "2026-11-22T05:33:54.007Z");
        assert_eq!(time(0), None);
        assert_eq!(age(ms - 119_000, ms), "119s");
        assert_eq!(age(ms - 7_200_000, ms), "2h");
        assert_eq!(age(0, ms), "?");
    }
}
