//! How things are shown: tables that fit, and the words and the JSON that all commands have in common.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::text::{safe, safe_json, time, uuid};
use super::view::{About, Owner, Resource};
use crate::host::terminal;
use crate::wire::status::{CONNECTED, FENCED, UNREACHABLE, UNSEEN, WATCHED};

/// An owner as a refusal and the log name it.
pub fn owner(owner: &Owner) -> String {
    match &owner.key.uuid {
        Some(id) => format!(
            "domain '{}' (uuid {}, pid {})",
            safe(&owner.name),
            uuid(id),
            owner.key.pid
        ),
        None => format!("a domain of process {}", owner.key.pid),
    }
}

/// How a lock is held.
pub fn mode(is_shared: bool) -> &'static str {
    if is_shared { "shared" } else { "exclusive" }
}

/// How the daemon knows of an owner's end, and what it does about it.
pub fn standing(standing: u32) -> Vec<&'static str> {
    let words = [
        (CONNECTED, "connected"),
        (WATCHED, "watched"),
        (UNSEEN, "unseen"),
        (FENCED, "fenced"),
        (UNREACHABLE, "unreachable"),
    ];
    let words = words.into_iter().filter(|(bit, _)| standing & bit != 0);
    words.map(|(_, word)| word).collect()
}

/// Bytes under a name in JSON: as text, and if they are none also in hexadecimal digits under `<name>_hex`.
pub fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    object.insert(name.to_owned(), Value::from(&*text));
    if std::str::from_utf8(bytes).is_err() {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        object.insert(format!("{name}_hex"), Value::from(digits));
    }
}

/// An object of JSON that the value is known to be.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// The daemon in JSON.
pub fn about_json(about: &About) -> Value {
    json!({
        "kind": "virtlockd",
        "version": String::from_utf8_lossy(&about.version),
        "pid": about.pid,
        "serves_since": time(about.serves_since),
        "resources": about.resources,
        "being_freed": about.left,
        "owners_fenced": about.fenced,
        "lock_clients": about.lock_clients,
        "admin_clients": about.admin_clients,
    })
}

/// An owner in JSON.
pub fn owner_json(owner: &Owner) -> Map<String, Value> {
    let mut json = object(json!({
        "pid": owner.key.pid,
        "uuid": owner.key.uuid.as_ref().map(uuid),
        "id": owner.id,
        "since": time(owner.since),
        "held": owner.held,
        "standing": standing(owner.standing),
    }));
    put_bytes(&mut json, "domain", &owner.name);
    json
}

/// A resource in JSON.
pub fn resource_json(resource: &Resource) -> Value {
    let holders = resource.holders.iter().map(|(owner, times)| {
        let mut json = owner_json(owner);
        // It is not told with each resource.
        json.remove("since");
        json.insert("times".into(), Value::from(*times));
        Value::Object(json)
    });
    let mut json = object(json!({
        "mode": mode(resource.is_shared),
        "device": resource.file.0,
        "inode": resource.file.1,
        "since": time(resource.since),
        "owners": holders.collect::<Vec<_>>(),
    }));
    put_bytes(&mut json, "lockspace", &resource.lockspace);
    put_bytes(&mut json, "name", &resource.name);
    put_bytes(&mut json, "path", &resource.path());
    Value::Object(json)
}

/// Where everything is printed to. That nobody reads any more is no error: then there is nothing to say.
#[derive(Debug)]
pub struct Out {
    is_closed: bool,
    /// How many characters a line may have; `None` where it is no terminal.
    pub width: Option<usize>,
}

impl Out {
    /// Standard output.
    pub fn new() -> Out {
        Out {
            is_closed: false,
            width: terminal::width(io::stdout()),
        }
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// A line.
    pub fn line(&mut self, text: &str) {
        let mut out = io::stdout().lock();
        let written = out
            .write_all(text.as_bytes())
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush());
        self.is_closed |= written.is_err();
    }

    /// JSON on as many lines as it takes.
    pub fn json(&mut self, value: &Value) {
        self.line(&safe_json(&format!("{value:#}")));
    }

    /// JSON on one line.
    pub fn json_line(&mut self, value: &Value) {
        self.line(&safe_json(&value.to_string()));
    }

    /// A table whose first column is cut at its front where a line would not fit.
    pub fn table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        for line in table(head, rows, self.width) {
            self.line(&line);
        }
    }
}

fn table(head: &[&str], rows: &[Vec<String>], most: Option<usize>) -> Vec<String> {
    const GAP: usize = 2;
    /// Less than this would say nothing.
    const LEAST: usize = 16;
    let head: Vec<String> = head.iter().map(|word| (*word).to_owned()).collect();
    let length = |text: &String| text.chars().count();
    let mut widths: Vec<usize> = head.iter().map(length).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(length(cell));
        }
    }
    if let (Some(most), Some((first, others))) = (most, widths.split_first_mut()) {
        let others = others.iter().fold(0usize, |sum, width| {
            sum.saturating_add(*width).saturating_add(GAP)
        });
        *first = (*first).min(most.saturating_sub(others).max(LEAST));
    }
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (place, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if place > 0 {
                line.push_str("  ");
            }
            let cell = end_of(cell, *width);
            line.push_str(&cell);
            let missing = width.saturating_sub(length(&cell));
            line.extend(std::iter::repeat_n(' ', missing));
        }
        let line = line.trim_end();
        match most {
            // Whatever does not fit even so is cut at its end.
            Some(most) => line.chars().take(most.max(LEAST)).collect(),
            None => line.to_owned(),
        }
    };
    std::iter::once(&head).chain(rows).map(line).collect()
}

/// The end of a text, which says more of a path than its front does.
fn end_of(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let skipped = length.saturating_sub(width.saturating_sub(1));
    std::iter::once('\u{2026}')
        .chain(text.chars().skip(skipped))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_in_json_whole() {
        let mut json = Map::new();
        put_bytes(&mut json, "name", b"a\xff");
        put_bytes(&mut json, "path", b"b\n");
        let text = Value::Object(json).to_string();
        let read: Value = serde_json::from_str(&text).unwrap();
        let expected = json!({ "name": "a\u{fffd}", "name_hex": "61ff", "path": "b\n" });
        assert_eq!(read, expected);
    }

    #[test]
    fn a_table_fits_its_terminal_and_shows_the_end_of_a_path() {
        let rows = [
            vec!["/var/lib/libvirt/images/disk.qcow2".into(), "shared".into()],
            vec!["/d".into(), "exclusive".into()],
        ];
        let whole = table(&["FILE", "MODE"], &rows, None);
        assert_eq!(whole[0], "FILE                                MODE");
        assert_eq!(whole[2], "/d                                  exclusive");
        let cut = table(&["FILE", "MODE"], &rows, Some(30));
        assert_eq!(cut[1], "\u{2026}/images/disk.qcow2  shared");
        assert!(cut.iter().all(|line| line.chars().count() <= 30));
    }
}
