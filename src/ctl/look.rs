//! A look at a file that may be on a share which does not answer: done by another process of this program,
//! which is not waited for for ever. It opens the file to ask for its lock, and closes it: no process that
//! has a lock is affected by that.

use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::exit::Exit;
use super::options::LOOK_AT;
use super::patience;
use super::show::Out;
use crate::host::errno::{self, Errno};
use crate::host::file::{self, Conflict, FileIdentity, LockType, Start};
use crate::host::note::{self, Note};

/// Who has a lock, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    /// Nobody.
    Free,
    /// A process.
    Process(i32),
    /// Somebody of this host.
    Here,
    /// Nobody of this host, and yet somebody.
    Elsewhere,
    /// It could not be asked.
    Unknown,
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// As the daemon tells files apart.
    pub file: (u64, u64),
    /// The path without symbolic links.
    pub canonical: PathBuf,
    /// Who has a lock on it.
    pub locked: Locked,
    /// What it says of another host that has one.
    pub note: Option<Note>,
}

/// Why a file cannot be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unseen {
    /// As the end of a sentence.
    pub reason: String,
    /// There is none.
    pub is_missing: bool,
}

impl From<String> for Unseen {
    fn from(reason: String) -> Unseen {
        Unseen {
            reason,
            is_missing: false,
        }
    }
}

/// Looks at a file.
///
/// # Errors
/// Why it cannot be looked at.
pub fn at(path: &Path) -> Result<Seen, Unseen> {
    let mut command = Command::new("/proc/self/exe");
    let answer = patience::answer(command.arg(LOOK_AT).arg(path))?;
    let said: Value = serde_json::from_slice(&answer.text).unwrap_or_default();
    if let Some(reason) = said.get("reason").and_then(Value::as_str) {
        return Err(Unseen {
            reason: reason.to_owned(),
            is_missing: said.get("missing") == Some(&Value::Bool(true)),
        });
    }
    read(&said).ok_or_else(|| "the process that looked at it died".to_owned().into())
}

fn read(said: &Value) -> Option<Seen> {
    let number = |name: &str| said.get(name)?.as_u64();
    let bytes = |name: &str| -> Option<Vec<u8>> {
        let bytes = said.get(name)?.as_array()?.iter();
        bytes
            .map(|byte| u8::try_from(byte.as_u64()?).ok())
            .collect()
    };
    let pid = i32::try_from(said.get("pid")?.as_i64()?).ok()?;
    let locked = match said.get("locked")?.as_str()? {
        "free" => Locked::Free,
        "process" => Locked::Process(pid),
        "here" => Locked::Here,
        "elsewhere" => Locked::Elsewhere,
        _ => Locked::Unknown,
    };
    Some(Seen {
        file: (number("device")?, number("inode")?),
        canonical: PathBuf::from(std::ffi::OsStr::from_bytes(&bytes("canonical")?)),
        note: Note::of_another_host(&bytes("note").unwrap_or_default()),
        locked,
    })
}

/// What the other process does: looks, and says what it saw.
pub fn report(path: &Path, out: &mut Out) -> Exit {
    let bytes = path.as_os_str().as_bytes();
    let answer = match file::look_up(Start::Anywhere, bytes) {
        Err(reason) => {
            let is_missing = matches!(reason, Errno::ENOENT | Errno::ENOTDIR);
            json!({ "reason": errno::text(reason), "missing": is_missing })
        }
        Ok(found) if found.is_directory => json!({ "reason": "it is a directory" }),
        Ok(found) => {
            let canonical = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            let canonical = canonical.as_os_str().as_bytes();
            let (conflict, note) = ask(path).unzip();
            let (locked, pid) = match conflict {
                Some(Conflict::None) => ("free", 0),
                Some(Conflict::Process(pid)) => ("process", pid),
                Some(Conflict::OpenFile) => ("here", 0),
                Some(Conflict::Elsewhere) => ("elsewhere", 0),
                None => ("unknown", 0),
            };
            let FileIdentity { device, inode } = found.identity;
            json!({
                "device": device, "inode": inode, "canonical": canonical,
                "locked": locked, "pid": pid, "note": note.unwrap_or_default(),
            })
        }
    };
    out.line(&answer.to_string());
    Exit::Yes
}

/// Who has a lock, and, if that is another host, what the file says of it: all of it, if it is so short that it
/// can be a note.
fn ask(path: &Path) -> Option<(Conflict, Vec<u8>)> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = std::fs::metadata(path).ok()?;
    let kind = metadata.file_type();
    // To open a FIFO or a device that is no disk may do something.
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let open = file::open_to_read(Start::Anywhere, path.as_os_str().as_bytes()).ok()?;
    let conflict = file::holder(&open, LockType::Write).ok()?;
    let mut note = Vec::new();
    if conflict == Conflict::Elsewhere && kind.is_file() && metadata.len() <= note::SIZE as u64 {
        let most = note::SIZE as u64;
        // What cannot be read says nothing.
        let _ = std::fs::File::from(open).take(most).read_to_end(&mut note);
    }
    Some((conflict, note))
}
