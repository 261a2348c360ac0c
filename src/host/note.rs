//! The note in a lease file, which says who has it, for whoever finds the file locked from another host: a
//! text of [`SIZE`] bytes whose first line is our mark. It is written on one host and read on another, where
//! anybody may have put anything in its place: what is read is taken for nothing but printable characters.
//! `src/dist/lease-notes.md` describes it.

use std::os::fd::AsFd;

use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::uio::pread;
use serde::{Deserialize, Serialize};

/// The first line, with the version of what follows.
pub const MARK: &[u8] = b"virtlockd lease note 1\n";

/// So many bytes a note has: one write replaces it whole. A file that is longer has none.
pub const SIZE: usize = 512;

/// The longest value, in characters.
const LONGEST: usize = 256;
/// The longest name of a host, in characters.
const LONGEST_HOST: usize = 64;

/// Who has a lease, as its file says. What is empty it does not say. All of it is printable ASCII, with
/// `\xNN` for other bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The host.
    pub host: String,
    /// The domain's name.
    pub domain: String,
    /// The domain's uuid.
    pub uuid: String,
    /// The process on that host; 0 if it does not say.
    pub pid: i32,
    /// `exclusive` or `shared`: then this is one of several that may have it.
    pub mode: String,
    /// Since when, RFC 3339.
    pub since: String,
}

/// Whether a file may have a note and be no disk, as far as can be said without its content.
pub fn may_be_in(stat: &FileStat) -> bool {
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    kind == SFlag::S_IFREG && usize::try_from(stat.st_size).is_ok_and(|size| size <= SIZE)
}

/// The front of a value, in printable characters.
fn escaped(bytes: &[u8], longest: usize) -> String {
    const DOTS: &str = "...";
    let mut text = String::new();
    for byte in bytes {
        let one = match byte {
            b' '..=b'~' if *byte != b'\\' => char::from(*byte).to_string(),
            _ => format!("\\x{byte:02x}"),
        };
        if text.len().saturating_add(one.len()) > longest.saturating_sub(DOTS.len()) {
            text.push_str(DOTS);
            break;
        }
        text.push_str(&one);
    }
    text
}

impl Note {
    /// The name of this host, as its notes have it.
    pub fn own_host() -> String {
        let name = nix::unistd::gethostname().unwrap_or_default();
        Note::host_text(name.as_encoded_bytes())
    }

    /// The name of a host, as notes have it.
    pub fn host_text(name: &[u8]) -> String {
        escaped(name, LONGEST_HOST)
    }

    /// The name of a domain, as notes have it.
    pub fn domain_text(name: &[u8]) -> String {
        escaped(name, LONGEST)
    }

    /// The note as it stands in the file.
    pub fn to_bytes(&self) -> [u8; SIZE] {
        let pid = self.pid.to_string();
        let lines = [
            ("host", self.host.as_str()),
            ("domain", &self.domain),
            ("uuid", &self.uuid),
            ("pid", &pid),
            ("mode", &self.mode),
            ("since", &self.since),
        ];
        let mut text = MARK.to_vec();
        for (key, value) in lines {
            text.extend_from_slice(format!("{key}: {value}\n").as_bytes());
        }
        // Lines without anything in them.
        text.resize(SIZE, b'\n');
        text.first_chunk().copied().unwrap_or([b'\n'; SIZE])
    }

    /// What a file says, as far as it says it; `None` if it does not begin with our mark or is too long.
    pub fn read(bytes: &[u8]) -> Option<Note> {
        let rest = bytes.strip_prefix(MARK)?;
        if bytes.len() > SIZE {
            return None;
        }
        let mut note = Note::default();
        for line in rest.split(|byte| *byte == b'\n') {
            let Some((key, value)) = std::str::from_utf8(line)
                .ok()
                .and_then(|line| line.split_once(": "))
            else {
                continue;
            };
            let is_printable = value.bytes().all(|byte| matches!(byte, b' '..=b'~'));
            if !is_printable || value.len() > LONGEST {
                continue;
            }
            match key {
                "host" if value.len() <= LONGEST_HOST => value.clone_into(&mut note.host),
                "domain" => value.clone_into(&mut note.domain),
                "uuid" => value.clone_into(&mut note.uuid),
                "pid" => note.pid = value.parse().unwrap_or(0).max(0),
                "mode" => value.clone_into(&mut note.mode),
                "since" => value.clone_into(&mut note.since),
                // A later version may say more.
                _ => (),
            }
        }
        Some(note)
    }

    /// What a file says of a lock that somebody on another host has. A note of this host is one that was
    /// left behind, and says nothing of them.
    pub fn of_another_host(bytes: &[u8]) -> Option<Note> {
        let note = Note::read(bytes)?;
        (!note.host.is_empty() && note.host != Note::own_host()).then_some(note)
    }

    /// What an open file says of the other host that has it locked; nothing of one that cannot be a lease's.
    pub fn in_file_of_another_host(file: &impl AsFd) -> Option<Note> {
        let stat = fstat(file).ok()?;
        let mut bytes = [0; SIZE];
        let length = pread(file, may_be_in(&stat).then_some(&mut bytes)?, 0).ok()?;
        Note::of_another_host(bytes.get(..length)?)
    }

    /// Who it is, as the middle of a sentence: `host 'a', domain 'guest' (uuid ..., pid 7), since ...`.
    pub fn text(&self) -> String {
        let mut text = format!("host '{}'", self.host);
        if !self.domain.is_empty() {
            text.push_str(&format!(", domain '{}'", self.domain));
        }
        let mut more = Vec::new();
        if !self.uuid.is_empty() {
            more.push(format!("uuid {}", self.uuid));
        }
        if self.pid > 0 {
            more.push(format!("pid {}", self.pid));
        }
        if !more.is_empty() {
            text.push_str(&format!(" ({})", more.join(", ")));
        }
        if self.mode == "shared" {
            text.push_str(", shared, perhaps with others");
        }
        if !self.since.is_empty() {
            text.push_str(&format!(", since {}", self.since));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note() -> Note {
        Note {
            host: "a".to_owned(),
            domain: "guest".to_owned(),
            uuid: "01010101-0101-0101-0101-010101010101".to_owned(),
            pid: 7,
            mode: "exclusive".to_owned(),
            since: "2026-11-22T05:33:54.007Z".to_owned(),
        }
    }

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let written = note().to_bytes();
        assert!(written.starts_with(MARK));
        assert_eq!(Note::read(&written), Some(note()));
        assert_eq!(
            note().text(),
            "host 'a', domain 'guest' (uuid 01010101-0101-0101-0101-010101010101, pid 7), since \
             2026-11-22T05:33:54.007Z"
        );
    }

    #[test]
    fn names_of_any_bytes_leave_every_line_of_the_note_whole() {
        for name in [
            [0xff; 1000].as_slice(),
            b"a\nhost: b\npid: 1",
            &[b'x'; 1000],
            b"\\x41",
            b"",
        ] {
            let written = Note {
                host: Note::host_text(name),
                domain: Note::domain_text(name),
                pid: i32::MAX,
                ..note()
            };
            let read = Note::read(&written.to_bytes());
            assert_eq!(read.as_ref(), Some(&written));
        }
        assert_eq!(Note::domain_text(b"a\n\\\x1b"), "a\\x0a\\x5c\\x1b");
    }

    #[test]
    fn what_anybody_may_have_put_there_is_printable_or_nothing() {
        let with = |rest: &[u8]| [MARK, rest].concat();
        for nothing in [&b""[..], b"virtlockd lease note 2\nhost: a\n", b"QFI\xfb"] {
            assert_eq!(Note::read(nothing), None);
        }
        assert_eq!(Note::read(&with(&[b' '; SIZE])), None, "it is too long");
        for hostile in [
            &b"host: \x1b[2J\n"[..],
            b"host: \xff\n",
            b"host:a\n",
            b"host",
            b": \n:\n",
            b"pid: -5\n",
            b"pid: 99999999999999999999\n",
            b"\0\0\0\0",
        ] {
            assert_eq!(Note::read(&with(hostile)), Some(Note::default()));
        }
        let mut state = 1u64;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..64)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let alphabet = b"host: domain: pid: 0\n\n\x1b\xff\\";
                    alphabet[(state >> 33) as usize % alphabet.len()]
                })
                .collect();
            let text = Note::read(&with(&bytes)).unwrap().text();
            assert!(
                text.bytes().all(|byte| matches!(byte, b' '..=b'~')),
                "{text}"
            );
        }
    }

    #[test]
    fn a_note_of_this_host_says_nothing_of_another() {
        let own = Note {
            host: Note::own_host(),
            ..note()
        };
        assert_eq!(Note::of_another_host(&own.to_bytes()), None);
        let other = Note {
            host: format!("{}-2", own.host),
            ..note()
        };
        assert!(Note::of_another_host(&other.to_bytes()).is_some());
    }
}
