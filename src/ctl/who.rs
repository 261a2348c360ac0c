//! `virtlockctl who`: who has these disks? The daemon is asked by the names that a disk may have for it, and
//! by the file itself; what it does not hold the kernel may know of.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::ask::{Link, Trouble};
use super::exit::{Exit, complain};
use super::kernel;
use super::leases::{Lease, Leases};
use super::look::{self, Locked, Seen};
use super::options::Common;
use super::show::{self, Out, mode};
use super::text::{safe, time};
use super::view::{self, Resource};
use crate::host::note::Note;
use crate::host::process;
use crate::wire::lock::Target;
use crate::wire::status::Call;

/// Who is there to be asked.
struct Asked {
    /// Our daemon, unless it went away.
    link: Option<Link>,
    /// The process of another daemon.
    another: Option<i32>,
    /// Why our daemon says nothing.
    silence: Option<String>,
    leases: Leases,
}

/// Who has a disk.
#[derive(Debug)]
enum Finding {
    /// Guests, by these resources of our daemon.
    Held(Vec<Resource>),
    /// A lock daemon for a guest of which it does not say the name: libvirt's, an earlier one of ours, or one
    /// that does not answer.
    Another(i32, Via),
    /// Some other process.
    Process(i32, Via),
    /// Somebody of this host.
    Here(Via),
    /// Nobody of this host: another one, and what the locked file says of it.
    Elsewhere(Via, Option<Note>),
    /// Nobody.
    Free,
    /// Nobody can tell.
    Unknown(String),
}

/// What is locked: the disk, or libvirt's lease for it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Via {
    Itself,
    Lease(Vec<u8>),
}

/// Runs the command.
pub fn run(common: &Common, files: &[PathBuf], out: &mut Out) -> Exit {
    let (leases, wrong) = Leases::configured(common.is_session);
    if let Some(wrong) = wrong {
        complain(&format!("{wrong}. Indirect leases are not looked for"));
    }
    let mut asked = Asked {
        link: None,
        another: None,
        silence: None,
        leases,
    };
    match Link::open(&common.socket) {
        Ok(mut link) => match view::about(&mut link) {
            Ok(_) => asked.link = Some(link),
            Err(Trouble::Another) => asked.another = kernel::daemon(link.peer),
            Err(trouble) => asked.silence = Some(trouble.to_string()),
        },
        Err(trouble) => asked.silence = Some(trouble.to_string()),
    }
    let findings: Vec<(&PathBuf, Finding)> = files
        .iter()
        .map(|file| (file, find(&mut asked, file)))
        .collect();
    if let Some(silence) = &asked.silence {
        complain(&format!("{silence}. Only the kernel was asked"));
    }
    if common.json {
        let files = findings.iter().map(|(file, finding)| json(file, finding));
        out.json(&json!({ "command": "who", "files": files.collect::<Vec<_>>() }));
    } else {
        for (file, finding) in &findings {
            say(file, finding, out);
        }
    }
    let is_any = |is_it: fn(&Finding) -> bool| findings.iter().any(|(_, it)| is_it(it));
    if is_any(|it| matches!(it, Finding::Unknown(_))) {
        Exit::Unknown
    } else if is_any(|it| !matches!(it, Finding::Free)) {
        Exit::Yes
    } else {
        Exit::No
    }
}

fn find(asked: &mut Asked, file: &Path) -> Finding {
    let path = match std::path::absolute(file) {
        Ok(path) => path,
        Err(error) => return Finding::Unknown(error.to_string()),
    };
    let seen = look::at(&path);
    let mut names = vec![path.clone()];
    if let Ok(seen) = &seen
        && seen.canonical != path
    {
        names.push(seen.canonical.clone());
    }
    let (leases, mut doubt) = leases(&asked.leases, &names, seen.as_ref().ok());
    match ask(asked, (&names, &leases), seen.as_ref().ok()) {
        Ok(held) if !held.is_empty() => return Finding::Held(held),
        Ok(_) => (),
        Err(trouble) => {
            // What is left is what the kernel knows.
            asked.link = None;
            asked.silence = Some(trouble.to_string());
        }
    }
    let found = match &seen {
        Ok(seen) => by_kernel(asked, seen, Via::Itself),
        Err(unseen) => Finding::Unknown(unseen.reason.clone()),
    };
    if !matches!(found, Finding::Free | Finding::Unknown(_)) {
        return found;
    }
    for (directory, lease) in leases {
        let lease = [&*directory, b"/", &*lease].concat();
        let by = match look::at(Path::new(std::ffi::OsStr::from_bytes(&lease))) {
            Ok(seen) => by_kernel(asked, &seen, Via::Lease(lease.clone())),
            // It is made when it is locked.
            Err(unseen) if unseen.is_missing => Finding::Free,
            Err(unseen) => Finding::Unknown(unseen.reason),
        };
        match by {
            Finding::Free => (),
            Finding::Unknown(reason) => {
                doubt = Some(format!("its lease {}: {reason}", safe(&lease)));
            }
            by => return by,
        }
    }
    match (found, doubt) {
        (Finding::Free, Some(doubt)) => Finding::Unknown(doubt),
        (found, _) => found,
    }
}

/// The leases that a disk of these names may have; why that is not known of one.
fn leases(leases: &Leases, names: &[PathBuf], seen: Option<&Seen>) -> (Vec<Lease>, Option<String>) {
    let (mut all, mut doubt) = (Vec::new(), None);
    for name in names {
        match leases.of(name, seen.map(|seen| seen.file)) {
            Ok(Some(lease)) if !all.contains(&lease) => all.push(lease),
            Ok(_) => (),
            Err(reason) => doubt = Some(reason),
        }
    }
    (all, doubt)
}

/// What our daemon holds of a disk, by its names and as a file.
fn ask(
    asked: &mut Asked,
    (names, leases): (&[PathBuf], &[Lease]),
    seen: Option<&Seen>,
) -> Result<Vec<Resource>, Trouble> {
    let Some(link) = &mut asked.link else {
        return Ok(Vec::new());
    };
    let mut all: Vec<Resource> = Vec::new();
    let mut add = |rows: Vec<Resource>| {
        for row in rows {
            if !all.contains(&row) {
                all.push(row);
            }
        }
    };
    let names = names.iter().map(|name| Target {
        lockspace: b"",
        name: name.as_os_str().as_bytes(),
    });
    let leases = leases.iter().map(|(directory, lease)| Target {
        lockspace: directory,
        name: lease,
    });
    for target in names.chain(leases) {
        add(view::held(link, &Call::Resource(target))?);
    }
    if let Some(Seen {
        file: (device, inode),
        ..
    }) = seen
    {
        let (device, inode) = (*device, *inode);
        add(view::held(link, &Call::File { device, inode })?);
    }
    Ok(all)
}

fn by_kernel(asked: &Asked, seen: &Seen, via: Via) -> Finding {
    let by = |pid: i32, via: Via| {
        let is_daemon = || process::name(pid).is_some_and(|name| name == b"virtlockd");
        if asked.another == Some(pid) || is_daemon() {
            Finding::Another(pid, via)
        } else {
            Finding::Process(pid, via)
        }
    };
    match seen.locked {
        Locked::Free => Finding::Free,
        Locked::Process(pid) => by(pid, via),
        Locked::Here => {
            let (device, inode) = seen.file;
            let holders = kernel::holders(kernel::device(device), inode);
            match holders.first() {
                Some(pid) => by(*pid, via),
                None => Finding::Here(via),
            }
        }
        Locked::Elsewhere => Finding::Elsewhere(via, seen.note.clone()),
        Locked::Unknown => Finding::Unknown("the kernel cannot be asked for its lock".into()),
    }
}

fn through(via: &Via) -> String {
    match via {
        Via::Itself => String::new(),
        Via::Lease(lease) => format!(", through its lease {}", safe(lease)),
    }
}

fn named(pid: i32) -> String {
    match process::name(pid) {
        Some(name) => format!("{pid} ({})", safe(&name)),
        None => pid.to_string(),
    }
}

fn say(file: &Path, finding: &Finding, out: &mut Out) {
    let file = safe(file.as_os_str().as_bytes());
    match finding {
        Finding::Held(held) => {
            for resource in held {
                let is_itself = resource.lockspace.is_empty();
                let through = if is_itself {
                    String::new()
                } else {
                    format!(", through its lease {}", safe(&resource.path()))
                };
                let since =
                    time(resource.since).map_or_else(String::new, |it| format!(" since {it}"));
                for (owner, _) in &resource.holders {
                    out.line(&format!(
                        "{file}: held {}{since} by {}{through}",
                        mode(resource.is_shared),
                        show::owner(owner)
                    ));
                }
            }
        }
        Finding::Another(pid, via) => out.line(&format!(
            "{file}: held by virtlockd, pid {pid}, which does not say for whom{}",
            through(via)
        )),
        Finding::Process(pid, via) => out.line(&format!(
            "{file}: held by a process that is not virtlockd, pid {}{}",
            named(*pid),
            through(via)
        )),
        Finding::Here(via) => out.line(&format!(
            "{file}: held by a process of this host that cannot be seen{}",
            through(via)
        )),
        Finding::Elsewhere(via, note) => {
            let by = note.as_ref().map_or_else(String::new, |note| {
                format!(", as its lease file says: {}", note.text())
            });
            out.line(&format!(
                "{file}: held from another host{}{by}",
                through(via)
            ));
        }
        Finding::Free => out.line(&format!("{file}: free")),
        Finding::Unknown(reason) => {
            out.line(&format!("{file}: nobody can tell: {reason}"));
        }
    }
}

fn json(file: &Path, finding: &Finding) -> Value {
    let mut json = Map::new();
    show::put_bytes(&mut json, "file", file.as_os_str().as_bytes());
    let mut put = |name: &str, value: Value| _ = json.insert(name.to_owned(), value);
    let word = match finding {
        Finding::Held(held) => {
            let held = held.iter().map(show::resource_json).collect::<Vec<_>>();
            put("resources", Value::from(held));
            "guest"
        }
        Finding::Another(pid, _) => {
            put("pid", Value::from(*pid));
            "another-virtlockd"
        }
        Finding::Process(pid, _) => {
            put("pid", Value::from(*pid));
            let name = process::name(*pid).map(|name| safe(&name));
            put("process", Value::from(name));
            "process"
        }
        Finding::Here(_) => "this-host",
        Finding::Elsewhere(_, note) => {
            if let Some(note) = note {
                put("note", note_json(note));
            }
            "another-host"
        }
        Finding::Free => "nobody",
        Finding::Unknown(reason) => {
            put("reason", Value::from(reason.as_str()));
            "unknown"
        }
    };
    put("held_by", Value::from(word));
    let via = match finding {
        Finding::Another(_, via)
        | Finding::Process(_, via)
        | Finding::Here(via)
        | Finding::Elsewhere(via, _) => Some(via),
        _ => None,
    };
    if let Some(Via::Lease(lease)) = via {
        show::put_bytes(&mut json, "lease", lease);
    }
    Value::Object(json)
}

/// What a lease file says; null where it does not.
fn note_json(note: &Note) -> Value {
    let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "host": said(&note.host),
        "domain": said(&note.domain),
        "uuid": said(&note.uuid),
        "pid": (note.pid > 0).then_some(note.pid),
        "mode": said(&note.mode),
        "since": said(&note.since),
    })
}
