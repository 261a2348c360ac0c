//! `virtlockctl status`: all that is held, or what one guest has.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Map, Value, json};

use super::ask::{Link, Trouble};
use super::exit::{Exit, complain};
use super::kernel::{self, Lock};
use super::options::Common;
use super::show::{self, Out, mode};
use super::text::{self, age, count, safe};
use super::view::{self, Owner, Resource, View};

/// Runs the command.
pub fn run(common: &Common, whom: Option<&OsStr>, out: &mut Out) -> Exit {
    let link = Link::open(&common.socket);
    let listens = link.as_ref().ok().and_then(|link| link.peer);
    match link.and_then(|mut link| view::all(&mut link)) {
        Ok(view) => show(common, whom, view, out),
        Err(Trouble::Another) => show_kernels(common, whom, listens, out),
        Err(trouble) => {
            complain(&trouble.to_string());
            Exit::Unknown
        }
    }
}

/// Whether an owner is meant by a domain's name, its uuid, or the number of its process.
fn is_meant(owner: &Owner, whom: &OsStr) -> bool {
    let text = whom.to_str();
    let is_pid = || text.and_then(|text| text.parse().ok()) == Some(owner.key.pid);
    let uuid = owner.key.uuid.as_ref().map(text::uuid);
    owner.name == whom.as_bytes()
        || text.is_some_and(|text| uuid.is_some_and(|uuid| uuid.eq_ignore_ascii_case(text)))
        || is_pid()
}

fn show(common: &Common, whom: Option<&OsStr>, mut view: View, out: &mut Out) -> Exit {
    if let Some(whom) = whom {
        view.owners.retain(|owner| is_meant(owner, whom));
        let is_theirs = |resource: &Resource| {
            let mut holders = resource.holders.iter();
            holders.any(|(owner, _)| is_meant(owner, whom))
        };
        view.resources.retain(is_theirs);
        view.lockspaces.clear();
        if view.owners.is_empty() && !common.json {
            complain(&format!(
                "no guest '{}' has registered or holds anything",
                safe(whom.as_bytes())
            ));
            return Exit::No;
        }
    }
    let exit = if whom.is_some() && view.owners.is_empty() {
        Exit::No
    } else {
        Exit::Yes
    };
    if common.json {
        let owners = view.owners.iter().map(show::owner_json);
        let lockspaces = view.lockspaces.iter().map(|directory| {
            let mut json = Map::new();
            show::put_bytes(&mut json, "path", directory);
            Value::Object(json)
        });
        out.json(&json!({
            "command": "status",
            "daemon": show::about_json(&view.about),
            "resources": view.resources.iter().map(show::resource_json).collect::<Vec<_>>(),
            "owners": owners.map(Value::Object).collect::<Vec<_>>(),
            "lockspaces": lockspaces.collect::<Vec<_>>(),
        }));
        return exit;
    }
    if whom.is_none() {
        say_daemon(&view, out);
    }
    let now = view.about.now;
    say_owners(&view.owners, now, out);
    if !view.resources.is_empty() {
        out.line("");
        out.table(
            &["FILE", "MODE", "SINCE", "DOMAIN", "PID"],
            &rows(&view, whom),
        );
    }
    for directory in &view.lockspaces {
        out.line(&format!("lockspace {}", safe(directory)));
    }
    exit
}

fn say_daemon(view: &View, out: &mut Out) {
    let about = &view.about;
    out.line(&format!(
        "virtlockd {} (pid {}), serving for {}: {}, {}, {}",
        safe(&about.version),
        about.pid,
        age(about.serves_since, about.now),
        count(about.resources, "lock", "locks"),
        count(view.owners.len() as u64, "owner", "owners"),
        count(about.lockspaces.into(), "lockspace", "lockspaces"),
    ));
    if about.fenced > 0 {
        let fenced = count(about.fenced.into(), "owner", "owners");
        out.line(&format!("{fenced} left locks behind and are being fenced"));
    }
    if about.left > 0 {
        let left = count(about.left, "lock", "locks");
        out.line(&format!("{left} of dead owners are being freed"));
    }
}

fn say_owners(owners: &[Owner], now: u64, out: &mut Out) {
    if owners.is_empty() {
        return;
    }
    let rows: Vec<Vec<String>> = owners
        .iter()
        .map(|owner| {
            let name = match &owner.key.uuid {
                Some(_) => safe(&owner.name),
                None => "?".to_owned(),
            };
            let uuid = owner.key.uuid.as_ref().map(text::uuid);
            vec![
                name,
                owner.key.pid.to_string(),
                owner.held.to_string(),
                age(owner.since, now),
                show::standing(owner.standing).join(","),
                uuid.unwrap_or_else(|| "?".to_owned()),
            ]
        })
        .collect();
    out.line("");
    out.table(&["DOMAIN", "PID", "LOCKS", "SINCE", "STATE", "UUID"], &rows);
}

fn rows(view: &View, whom: Option<&OsStr>) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for resource in &view.resources {
        for (owner, _) in &resource.holders {
            if whom.is_some_and(|whom| !is_meant(owner, whom)) {
                continue;
            }
            rows.push(vec![
                safe(&resource.path()),
                mode(resource.is_shared).to_owned(),
                age(resource.since, view.about.now),
                safe(&owner.name),
                owner.key.pid.to_string(),
            ]);
        }
    }
    rows
}

/// Beside a daemon that does not say what it holds.
fn show_kernels(
    common: &Common,
    whom: Option<&OsStr>,
    listens: Option<i32>,
    out: &mut Out,
) -> Exit {
    let Some(pid) = kernel::daemon(listens) else {
        complain(&format!(
            "{}; and which process it is cannot be told",
            Trouble::Another
        ));
        return Exit::Unknown;
    };
    if whom.is_some() {
        complain(&format!(
            "{}, and for whom it holds what it does not say either",
            Trouble::Another
        ));
        return Exit::Unknown;
    }
    let locks = match kernel::locks_of(pid) {
        Ok(locks) => locks,
        Err(error) => {
            complain(&format!(
                "{}, and its open files (/proc/{pid}/fdinfo) cannot be looked at: {error}",
                Trouble::Another
            ));
            return Exit::Unknown;
        }
    };
    if common.json {
        out.json(&json!({
            "command": "status",
            "daemon": { "kind": "libvirt", "pid": pid },
            "locks": locks.iter().map(lock_json).collect::<Vec<_>>(),
        }));
        return Exit::Yes;
    }
    out.line(&format!(
        "Another virtlockd (pid {pid}), which does not say what it holds: it is libvirt's, or an earlier version. By the \
         kernel it has {}",
        count(locks.len() as u64, "lock", "locks")
    ));
    if !locks.is_empty() {
        let rows = locks
            .iter()
            .map(|lock| vec![safe(&lock.path), mode(lock.is_shared).to_owned()]);
        out.line("");
        out.table(&["FILE", "MODE"], &rows.collect::<Vec<_>>());
    }
    Exit::Yes
}

fn lock_json(lock: &Lock) -> Value {
    let mut json = Map::new();
    let (major, minor) = lock.device;
    json.insert("mode".into(), mode(lock.is_shared).into());
    json.insert("device".into(), format!("{major}:{minor}").into());
    json.insert("inode".into(), lock.inode.into());
    show::put_bytes(&mut json, "path", &lock.path);
    Value::Object(json)
}
