//! `virtlockctl audit`: which guests write to disks that no lock protects, and which locks protect nothing?

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::ask::{Link, Trouble};
use super::exit::{Exit, complain};
use super::guests::{self, Guest, Open};
use super::kernel::{self, Lock};
use super::leases::Leases;
use super::options::Common;
use super::show::{self, Out};
use super::text::{count, safe};
use super::view::{self, Owner, Resource};
use crate::host::process;

/// What protects disks here.
enum Locks {
    /// What our daemon says that it holds.
    Ours(Vec<Resource>),
    /// What the kernel knows of another daemon: for whom it is, nobody says.
    Another(Vec<Lock>),
    /// No lock daemon runs.
    None,
}

/// A disk that a guest writes, and what is the matter with it.
struct Disk<'a> {
    guest: &'a Guest,
    path: &'a Path,
    reason: String,
}

/// A lock that protects nothing.
struct Idle {
    path: Vec<u8>,
    owner: Option<Owner>,
    reason: &'static str,
}

/// Runs the command.
pub fn run(common: &Common, out: &mut Out) -> Exit {
    let (leases, wrong) = Leases::configured(common.is_session);
    if let Some(wrong) = wrong {
        complain(&format!("{wrong}. Indirect leases are not known"));
    }
    let locks = match locks(common) {
        Ok(locks) => locks,
        Err(reason) => {
            complain(&reason);
            return Exit::Unknown;
        }
    };
    let guests = guests::running(&leases);
    let mut unprotected = Vec::new();
    let mut unknown = Vec::new();
    for guest in &guests {
        for open in guest.open.iter().flatten().filter(|open| open.writes) {
            let Some(reason) = unprotected_because(&locks, guest, open) else {
                continue;
            };
            let path = &open.path;
            match &open.lease {
                Ok(_) => unprotected.push(Disk {
                    guest,
                    path,
                    reason,
                }),
                Err(doubt) => unknown.push(Disk {
                    guest,
                    path,
                    reason: doubt.clone(),
                }),
            }
        }
    }
    let idle = idle(&locks, &leases, &guests);
    let unseen: Vec<i32> = guests
        .iter()
        .filter(|guest| guest.open.is_none())
        .map(|guest| guest.pid)
        .collect();
    if common.json {
        out.json(&json!({
            "command": "audit",
            "guests": guests.len(),
            "unprotected": unprotected.iter().map(disk_json).collect::<Vec<_>>(),
            "unknown": unknown.iter().map(disk_json).collect::<Vec<_>>(),
            "idle_locks": idle.iter().map(idle_json).collect::<Vec<_>>(),
            "unseen": unseen,
        }));
    } else {
        say(&locks, &guests, &unprotected, &idle, out);
    }
    for disk in &unknown {
        let path = safe(disk.path.as_os_str().as_bytes());
        complain(&format!(
            "whether a lock protects {path} of {} cannot be told: {}",
            guest_text(disk.guest),
            disk.reason
        ));
    }
    if !unseen.is_empty() {
        complain(&format!(
            "the open files of {} guests may not be looked at: only root may",
            unseen.len()
        ));
    }
    if !unprotected.is_empty() || !idle.is_empty() {
        Exit::No
    } else if unseen.is_empty() && unknown.is_empty() {
        Exit::Yes
    } else {
        Exit::Unknown
    }
}

fn locks(common: &Common) -> Result<Locks, String> {
    let link = Link::open(&common.socket);
    let listens = link.as_ref().ok().and_then(|link| link.peer);
    match link.and_then(|mut link| view::all(&mut link)) {
        Ok(view) => Ok(Locks::Ours(view.resources)),
        Err(trouble @ (Trouble::Another | Trouble::Nobody(..))) => {
            // Libvirt's daemon need not have an admin socket.
            match kernel::daemon(listens) {
                Some(pid) => match kernel::locks_of(pid) {
                    Ok(locks) => Ok(Locks::Another(locks)),
                    Err(error) => Err(format!(
                        "the open files of virtlockd, process {pid}, cannot be looked at: {error}"
                    )),
                },
                None if matches!(trouble, Trouble::Nobody(..)) => Ok(Locks::None),
                None => Err(trouble.to_string()),
            }
        }
        Err(trouble) => Err(trouble.to_string()),
    }
}

/// Whether this is the path of the lease of a disk.
fn is_lease_of(open: &Open, path: &[u8]) -> bool {
    let lease = open.lease.as_ref().ok();
    lease.and_then(Option::as_deref) == Some(path)
}

/// Why nothing protects a disk that a guest has open; `None` if something does.
fn unprotected_because(locks: &Locks, guest: &Guest, open: &Open) -> Option<String> {
    match locks {
        Locks::None => Some("no lock daemon runs".to_owned()),
        Locks::Ours(resources) => {
            let is_it = |resource: &&Resource| {
                resource.file == open.file || is_lease_of(open, &resource.path())
            };
            let all: Vec<&Resource> = resources.iter().filter(is_it).collect();
            if all.is_empty() {
                return Some("no lock".to_owned());
            }
            let is_own = |resource: &Resource| {
                let mut holders = resource.holders.iter();
                holders.any(|(owner, _)| owner.key.pid == guest.pid)
            };
            if all.iter().any(|resource| is_own(resource)) {
                return None;
            }
            let other = all.iter().find_map(|resource| resource.holders.first());
            let other = other.map(|(owner, _)| show::owner(owner));
            Some(format!(
                "the lock on it is another's: {}",
                other.unwrap_or_default()
            ))
        }
        Locks::Another(locks) => {
            let device = kernel::device(open.file.0);
            let is_it = |lock: &Lock| {
                (lock.inode == open.file.1 && lock.device == device)
                    || lock.path == open.path.as_os_str().as_bytes()
                    || is_lease_of(open, &lock.path)
            };
            (!locks.iter().any(is_it)).then(|| "no lock".to_owned())
        }
    }
}

fn idle(locks: &Locks, leases: &Leases, guests: &[Guest]) -> Vec<Idle> {
    let has_open = |guest: &Guest, path: &[u8], file: Option<(u64, u64)>| {
        // What cannot be seen is believed to be right.
        guest.open.as_ref().is_none_or(|open| {
            open.iter().any(|open| {
                Some(open.file) == file
                    || open.path.as_os_str().as_bytes() == path
                    || is_lease_of(open, path)
                    || open.lease.is_err()
            })
        })
    };
    match locks {
        Locks::None => Vec::new(),
        Locks::Ours(resources) => resources
            .iter()
            .flat_map(|resource| {
                resource
                    .holders
                    .iter()
                    .map(move |(owner, _)| (resource, owner))
            })
            .filter_map(|(resource, owner)| {
                let guest = guests.iter().find(|guest| guest.pid == owner.key.pid);
                let reason = match guest {
                    Some(guest) if has_open(guest, &resource.path(), Some(resource.file)) => {
                        return None;
                    }
                    // A lease of the guest's own configuration names no disk.
                    Some(_) if !is_of_disk(leases, resource) => return None,
                    Some(_) => "its guest does not have the disk open",
                    None if process::name(owner.key.pid).is_none() => "its owner is no process",
                    // No guest of QEMU's: nobody knows what it has.
                    None => return None,
                };
                Some(Idle {
                    path: resource.path(),
                    owner: Some(owner.clone()),
                    reason,
                })
            })
            .collect(),
        Locks::Another(locks) => locks
            .iter()
            .filter(|lock| {
                let mut guests = guests.iter();
                !guests.any(|guest| has_open(guest, &lock.path, None))
            })
            .map(|lock| Idle {
                path: lock.path.clone(),
                owner: None,
                reason: "no guest has the disk open",
            })
            .collect(),
    }
}

/// Whether a resource is for a disk: by its path, or by libvirt's lease for one.
fn is_of_disk(leases: &Leases, resource: &Resource) -> bool {
    resource.lockspace.is_empty() || leases.is_one(&resource.lockspace, &resource.name)
}

fn guest_text(guest: &Guest) -> String {
    match &guest.name {
        Some(name) => safe(name),
        None => "?".to_owned(),
    }
}

fn say(locks: &Locks, guests: &[Guest], unprotected: &[Disk<'_>], idle: &[Idle], out: &mut Out) {
    let disks: usize = guests
        .iter()
        .map(|guest| guest.open.iter().flatten().filter(|it| it.writes).count())
        .fold(0, usize::saturating_add);
    let by = match locks {
        Locks::Ours(_) => "virtlockd",
        Locks::Another(_) => "another virtlockd, of which the kernel tells",
        Locks::None => "no lock daemon",
    };
    out.line(&format!(
        "{}, {} open for writing, locks of {by}: {} unprotected, {} for nothing",
        count(guests.len() as u64, "guest", "guests"),
        count(disks as u64, "disk", "disks"),
        count(unprotected.len() as u64, "disk", "disks"),
        count(idle.len() as u64, "lock", "locks"),
    ));
    if !unprotected.is_empty() {
        let rows = unprotected.iter().map(|it| {
            vec![
                safe(it.path.as_os_str().as_bytes()),
                guest_text(it.guest),
                it.guest.pid.to_string(),
                it.reason.clone(),
            ]
        });
        out.line("");
        out.table(
            &["UNPROTECTED", "DOMAIN", "PID", "BECAUSE"],
            &rows.collect::<Vec<_>>(),
        );
    }
    if !idle.is_empty() {
        let rows = idle.iter().map(|it| {
            let owner = it.owner.as_ref();
            vec![
                safe(&it.path),
                owner.map_or_else(|| "?".to_owned(), |owner| safe(&owner.name)),
                owner.map_or_else(|| "?".to_owned(), |owner| owner.key.pid.to_string()),
                it.reason.to_owned(),
            ]
        });
        out.line("");
        out.table(
            &["LOCK FOR NOTHING", "DOMAIN", "PID", "BECAUSE"],
            &rows.collect::<Vec<_>>(),
        );
    }
}

fn disk_json(it: &Disk<'_>) -> Value {
    let mut json = Map::new();
    json.insert("pid".into(), it.guest.pid.into());
    json.insert("reason".into(), it.reason.as_str().into());
    match &it.guest.name {
        Some(name) => show::put_bytes(&mut json, "domain", name),
        None => _ = json.insert("domain".into(), Value::Null),
    }
    show::put_bytes(&mut json, "path", it.path.as_os_str().as_bytes());
    Value::Object(json)
}

fn idle_json(it: &Idle) -> Value {
    let mut json = Map::new();
    json.insert("reason".into(), it.reason.into());
    show::put_bytes(&mut json, "path", &it.path);
    let owner = it.owner.as_ref().map(show::owner_json);
    json.insert("owner".into(), owner.map_or(Value::Null, Value::Object));
    Value::Object(json)
}
