//! `virtlockctl doctor`: is everything as it must be for locks to protect anything? Each finding is ok, a warning
//! or bad, with what to do about it.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::ask::{Link, Trouble};
use super::exit::Exit;
use super::kernel;
use super::options::Common;
use super::show::{self, Out};
use super::text::{count, safe};
use super::view::{self, View};
use crate::config::Other;
use crate::host::mounts::{self, Locks, Mount};

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Ok,
    Warn,
    Bad,
}

/// What was looked at, and what to do about it.
struct Finding {
    level: Level,
    what: String,
    advice: String,
}

fn ok(what: impl Into<String>) -> Finding {
    finding(Level::Ok, what, "")
}

fn finding(level: Level, what: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding {
        level,
        what: what.into(),
        advice: advice.into(),
    }
}

/// Runs the command.
pub fn run(common: &Common, out: &mut Out) -> Exit {
    let directory = configuration(common);
    let mounts = mounts::all();
    let mut findings = Vec::new();
    driver(&directory, &mut findings);
    let lockspaces = settings(&directory, &mut findings);
    directories(&lockspaces, &mounts, &mut findings);
    let view = daemon(common, &mut findings);
    sockets(common, &mut findings);
    shares(view.as_ref(), &mounts, &mut findings);
    if common.json {
        let all = findings.iter().map(json).collect::<Vec<_>>();
        out.json(&json!({ "command": "doctor", "findings": all }));
    } else {
        for finding in &findings {
            let advice = if finding.advice.is_empty() {
                String::new()
            } else {
                format!(". {}", finding.advice)
            };
            out.line(&format!(
                "{:4}  {}{advice}",
                word(finding.level),
                finding.what
            ));
        }
    }
    match findings.iter().map(|finding| finding.level).max() {
        Some(Level::Bad) => Exit::Unknown,
        Some(Level::Warn) => Exit::No,
        _ => Exit::Yes,
    }
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Bad => "bad",
    }
}

fn json(finding: &Finding) -> Value {
    let mut json = Map::new();
    json.insert("level".into(), word(finding.level).into());
    json.insert("what".into(), finding.what.as_str().into());
    json.insert("advice".into(), finding.advice.as_str().into());
    Value::Object(json)
}

/// Where libvirt's configuration is.
fn configuration(common: &Common) -> PathBuf {
    if common.is_session {
        super::leases::session_directory()
    } else {
        PathBuf::from("/etc/libvirt")
    }
}

/// Whether libvirt asks for locks at all.
fn driver(directory: &Path, findings: &mut Vec<Finding>) {
    let path = directory.join("qemu.conf");
    let shown = path.display();
    let advice = format!("Set lock_manager = \"lockd\" in {shown} and restart libvirt");
    findings.push(match Other::load(&path) {
        Err(error) => finding(Level::Bad, error.to_string(), "Repair the file"),
        Ok(None) => finding(
            Level::Bad,
            format!("There is no {shown}: guests' disks are not locked"),
            advice,
        ),
        Ok(Some(settings)) => match settings.text("lock_manager") {
            Some(b"lockd") => ok(format!("{shown} has guests' disks locked by virtlockd")),
            Some(b"sanlock") => finding(
                Level::Warn,
                format!("{shown} has guests' disks locked by sanlock, not by virtlockd"),
                "Nothing that is said here of virtlockd counts for guests then",
            ),
            Some(other) => finding(
                Level::Bad,
                format!(
                    "{shown} names a lock manager '{}' that libvirt does not have",
                    safe(other)
                ),
                advice,
            ),
            None => finding(
                Level::Bad,
                format!("{shown} names no lock manager: guests' disks are not locked"),
                advice,
            ),
        },
    });
}

/// The settings of libvirt's driver; the lockspaces that they name, each with what it is for.
fn settings(directory: &Path, findings: &mut Vec<Finding>) -> Vec<(&'static str, PathBuf)> {
    let path = directory.join("qemu-lockd.conf");
    let shown = path.display();
    let settings = match Other::load(&path) {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            findings.push(ok(format!(
                "There is no {shown}: every disk itself is locked"
            )));
            return Vec::new();
        }
        Err(error) => {
            findings.push(finding(Level::Bad, error.to_string(), "Repair the file"));
            return Vec::new();
        }
    };
    if settings.number("auto_disk_leases") == Some(0) {
        let (level, what) = if settings.number("require_lease_for_disks") == Some(1) {
            (
                Level::Warn,
                "guests without leases of their own do not start",
            )
        } else {
            (
                Level::Bad,
                "disks without a lease in the guest's configuration are not locked",
            )
        };
        findings.push(finding(
            level,
            format!("{shown} switches automatic leases off: {what}"),
            "Take auto_disk_leases = 0 out, or give every guest its leases",
        ));
    } else {
        findings.push(ok(format!(
            "{shown} has every disk locked that is not read-only"
        )));
    }
    let names = [
        ("file_lockspace_dir", "files"),
        ("lvm_lockspace_dir", "logical volumes"),
        ("scsi_lockspace_dir", "SCSI disks"),
    ];
    let named = names.into_iter().filter_map(|(key, of)| {
        let path = settings.text(key)?;
        Some((of, PathBuf::from(std::ffi::OsStr::from_bytes(path))))
    });
    named.collect()
}

/// Whether the lockspaces' directories are there, and on what.
fn directories(
    lockspaces: &[(&'static str, PathBuf)],
    mounts: &[Mount],
    findings: &mut Vec<Finding>,
) {
    for (of, path) in lockspaces {
        let shown = safe(path.as_os_str().as_bytes());
        let Some(mount) = mounts::of(mounts, path) else {
            continue;
        };
        // A share that hangs is not asked.
        if mount.is_local() && !path.is_dir() {
            findings.push(finding(
                Level::Bad,
                format!("The lockspace of {of}, {shown}, is no directory"),
                "Make it, on a file system that all hosts share",
            ));
            continue;
        }
        let kind = safe(&mount.kind);
        findings.push(match mount.locks() {
            Locks::Own => finding(
                Level::Warn,
                format!(
                    "The lockspace of {of}, {shown}, is on {kind}, which is this host's alone: its locks keep no \
                     other host from a disk"
                ),
                "Mount a shared file system there, or lock the disks themselves",
            ),
            Locks::Unseen(flaw) => finding(
                Level::Bad,
                format!(
                    "The lockspace of {of}, {shown}, {}: its locks keep no other host from a disk",
                    flaw.why
                ),
                flaw.advice,
            ),
            Locks::Untold => ok(format!(
                "The lockspace of {of}, {shown}, is on {kind}: whether other hosts see its locks the daemon says \
                 when it has the first one there"
            )),
            // Nobody writes to a lease but its owner.
            Locks::Seen | Locks::Hindering(_) => ok(format!(
                "The lockspace of {of}, {shown}, is on {kind}: other hosts see its locks"
            )),
        });
    }
}

/// Whether a daemon runs, whose, and whether it has what it needs.
fn daemon(common: &Common, findings: &mut Vec<Finding>) -> Option<View> {
    let link = Link::open(&common.socket);
    let listens = link.as_ref().ok().and_then(|link| link.peer);
    let (pid, view) = match link.and_then(|mut link| view::all(&mut link)) {
        Ok(view) => {
            findings.push(ok(format!(
                "virtlockd {} answers, process {}, with {}",
                safe(&view.about.version),
                view.about.pid,
                count(view.about.resources, "lock", "locks")
            )));
            if view.about.fenced > 0 {
                findings.push(finding(
                    Level::Warn,
                    format!(
                        "{} owners left locks behind and are being fenced",
                        view.about.fenced
                    ),
                    "Look at the log for why",
                ));
            }
            let unseen = view.owners.iter().filter(|owner| {
                let words = show::standing(owner.standing);
                words.contains(&"unseen") || words.contains(&"unreachable")
            });
            let unseen = unseen.count();
            if unseen > 0 {
                findings.push(finding(
                    Level::Warn,
                    format!("The processes of {unseen} owners cannot be seen: their deaths free nothing"),
                    "Release their locks when their guests are gone (virtlockctl status names them)",
                ));
            }
            (Some(view.about.pid), Some(view))
        }
        Err(Trouble::Another) => {
            findings.push(finding(
                Level::Warn,
                "The daemon that answers is libvirt's, or an earlier version: it does not say what it holds",
                "Its locks are lost when it is killed",
            ));
            (kernel::daemon(listens), None)
        }
        Err(trouble) => {
            let what = trouble.to_string();
            findings.push(finding(
                Level::Bad,
                format!("No daemon answers: {what}"),
                "Start virtlockd.socket and virtlockd-admin.socket",
            ));
            (None, None)
        }
    };
    if let Some(pid) = pid {
        program(pid, findings);
        limit(pid, findings);
    }
    view
}

/// Whether the program that runs is the one that is installed.
fn program(pid: i32, findings: &mut Vec<Finding>) {
    let Ok(running) = std::fs::read_link(format!("/proc/{pid}/exe")) else {
        return;
    };
    let text = running.as_os_str().as_bytes();
    let advice = "systemctl reload virtlockd: no lock and no guest is lost by it";
    if let Some(path) = text.strip_suffix(b" (deleted)") {
        findings.push(finding(
            Level::Warn,
            format!("{} was replaced since the daemon was started", safe(path)),
            advice,
        ));
    } else {
        findings.push(ok(format!(
            "The program that runs is the one installed, {}",
            safe(text)
        )));
    }
}

/// Whether the daemon's limit of open files leaves room: two of them a guest, and more.
fn limit(pid: i32, findings: &mut Vec<Finding>) {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
    let (Some(soft), Ok(open)) = (soft, open) else {
        return;
    };
    let what = format!("The daemon has {open} of {soft} open files that it may have");
    findings.push(if open.saturating_mul(2) > soft {
        finding(
            Level::Warn,
            format!("{what}: there is no room for as many guests again"),
            format!(
                "Raise LimitNOFILE= of virtlockd.service, and that of the running daemon with prlimit \
                 --nofile --pid {pid} and a reload"
            ),
        )
    } else {
        ok(what)
    });
}

/// Who may connect.
fn sockets(common: &Common, findings: &mut Vec<Finding>) {
    let lock = common.socket.with_file_name("virtlockd-sock");
    for socket in [&lock, &common.socket] {
        let shown = safe(socket.as_os_str().as_bytes());
        let Ok(seen) = std::fs::metadata(socket) else {
            continue;
        };
        if !seen.file_type().is_socket() {
            findings.push(finding(
                Level::Bad,
                format!("{shown} is no socket"),
                "Remove it and start the daemon's socket units again",
            ));
        } else if seen.mode() & 0o022 != 0 {
            findings.push(finding(
                Level::Warn,
                format!(
                    "{shown} may be connected to by others (mode {:03o})",
                    seen.mode() & 0o777
                ),
                "The daemon turns them away; chmod 0700, or SocketMode=0700 in its unit",
            ));
        } else {
            findings.push(ok(format!("{shown} is for its owner alone")));
        }
    }
}

/// Shares on which locks are not what they seem.
fn shares(view: Option<&View>, mounts: &[Mount], findings: &mut Vec<Finding>) {
    let held: Vec<PathBuf> = view
        .into_iter()
        .flat_map(|view| &view.resources)
        .map(|it| PathBuf::from(std::ffi::OsStr::from_bytes(&it.path())))
        .collect();
    for mount in mounts.iter().filter(|mount| !mount.is_local()) {
        let is_nfs = [&b"nfs"[..], b"nfs4"].contains(&&*mount.kind);
        let shown = safe(mount.place.as_os_str().as_bytes());
        let mine =
            |path: &&PathBuf| mounts::of(mounts, path).is_some_and(|it| it.place == mount.place);
        let count = held.iter().filter(mine).count();
        match mount.locks() {
            Locks::Unseen(flaw) => findings.push(finding(
                Level::Bad,
                format!(
                    "{shown} {}: its locks keep no other host away ({count} are held)",
                    flaw.why
                ),
                flaw.advice,
            )),
            Locks::Hindering(flaw) => findings.push(finding(
                Level::Warn,
                format!("{shown} {} ({count} locks)", flaw.why),
                flaw.advice,
            )),
            Locks::Seen if is_nfs => {
                findings.push(if let Some(option) = mount.option(&["soft", "softerr"]) {
                    finding(
                        Level::Warn,
                        format!(
                            "{shown} is mounted with {option}: a short outage gives guests errors ({count} locks)"
                        ),
                        "Mount it hard",
                    )
                } else {
                    ok(format!(
                        "{shown} ({count} locks) is mounted so that locks reach its server"
                    ))
                });
            }
            Locks::Own | Locks::Seen | Locks::Untold => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_whose_options_hide_losses_is_named_with_what_to_do() {
        let mount = |kind: &str, options: &str| {
            mounts::parse(format!("2 1 0:50 / /srv rw - {kind} host:/srv {options}").as_bytes())
        };
        for (kind, options, level, word) in [
            ("nfs4", "rw,hard,vers=4.2", Level::Ok, "reach its server"),
            ("nfs4", "rw,soft", Level::Warn, "soft"),
            ("nfs4", "rw,softerr,vers=4.2", Level::Warn, "softerr"),
            ("nfs4", "rw,nolock,soft", Level::Bad, "nolock"),
            ("nfs4", "rw,local_lock=all", Level::Bad, "local_lock=all"),
            ("nfs4", "rw,local_lock=none", Level::Ok, "reach its server"),
            ("cifs", "rw,nobrl", Level::Bad, "nobrl"),
            ("cifs", "rw", Level::Warn, "nobody write"),
            ("9p", "rw", Level::Bad, "grants every lock"),
        ] {
            let mut findings = Vec::new();
            shares(None, &mount(kind, options), &mut findings);
            let [found] = findings.as_slice() else {
                panic!("{options}: one finding");
            };
            assert!(
                found.level == level && found.what.contains(word),
                "{options}"
            );
            assert_eq!(found.advice.is_empty(), level == Level::Ok, "{options}");
        }
        let mut findings = Vec::new();
        shares(None, &mount("xfs", "rw,soft"), &mut findings);
        shares(None, &mount("ceph", "rw"), &mut findings);
        assert!(findings.is_empty());
    }
}
