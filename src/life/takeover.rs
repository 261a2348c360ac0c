//! Who was here before? An earlier image of this process may have left its state: this program's (a
//! ledger in a memory file) or the C daemon's (its state document). How it is gone on from is told in
//! [`super::go_on`].

use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::plan::Plan;
use super::way_back::WayBack;
use crate::custody::descriptor::Saved;
use crate::custody::servers::Service;
use crate::custody::state::State;
use crate::exit::{ExitCode, Failed, StartError, unusable};
use crate::host::environment;
use crate::host::errno::{self, Errno};
use crate::host::paths::Paths;
use crate::host::process::{self, Process};
use crate::host::whole_file::{self, Unread};
use crate::restart::handover::{HANDOVER_VARIABLE, UNDERSTUDY_VARIABLE};
use crate::restart::libvirt_json::{self, Unusable};

/// A state document larger than this is not read, bytes. libvirt's daemon writes it whole even if
/// it could not read it again.
const DOCUMENT_LIMIT: u64 = 256 * 1024 * 1024;

/// The descriptor of the ledger that a predecessor of this program handed over, if this process was made by
/// it.
pub fn handed_over() -> Option<Result<RawFd, StartError>> {
    let value = environment::take(HANDOVER_VARIABLE)?;
    let (descriptor, pid) = value.to_str()?.split_once(':')?;
    // The variable of another process means nothing: this one is not its successor.
    if pid != process::started().to_string() {
        return None;
    }
    let number = descriptor.parse();
    Some(number.map_err(|_| unusable("its descriptor is not open")))
}

/// The process that goes on should this one not serve, if the predecessor made one.
pub fn understudy() -> Option<i32> {
    let value = environment::take(UNDERSTUDY_VARIABLE)?;
    let pid = value.to_str()?.parse().ok()?;
    (pid > 0).then_some(pid)
}

/// Whether the C daemon left a document for this process. It is read by whoever goes on from it.
pub fn is_awaited(paths: &Paths) -> bool {
    let document = read_document(&paths.restart_state);
    document.is_ok_and(|it| it.is_some_and(|it| libvirt_json::is_of(&it, process::started())))
}

/// The state that the C daemon left for this process, if it did and it can be used. Says and changes
/// nothing: see [`find_document`].
pub fn awaited(paths: &Paths) -> Option<State<Saved>> {
    let document = read_document(&paths.restart_state).ok()??;
    read(&document, paths).ok()
}

fn read(document: &[u8], paths: &Paths) -> Result<State<Saved>, Unusable> {
    libvirt_json::read(document, process::started(), |service| {
        let path = match service {
            Service::Lock => &paths.lock_socket,
            Service::Admin => &paths.admin_socket,
        };
        path.as_os_str().as_bytes().to_vec()
    })
}

/// What becomes of a state document that is not [`awaited`]. That of a running daemon which is about to
/// execute its successor is not touched.
///
/// # Errors
/// A document that is there and cannot be used.
pub fn find_document(plan: &Plan, way_back: &WayBack) -> Result<Option<State<Saved>>, StartError> {
    let paths = &plan.paths;
    let path = &paths.restart_state;
    // Whoever writes the document holds the pid file until it is whole: asked before it is read.
    let may_be_half = path.exists() && plan.is_another_running();
    let document = match read_document(path) {
        Ok(Some(document)) => document,
        Ok(None) => return Ok(None),
        Err(error) => {
            let message = format!("Failed to read file '{}': {error}", path.display());
            return Err(StartError::new(ExitCode::Initialisation, message));
        }
    };
    match read(&document, paths) {
        Ok(state) => Ok(Some(state)),
        Err(Unusable::Foreign(magic)) if is_alive(&magic) => {
            tracing::warn!(
                "Found restart exec file with old magic {magic} vs wanted {}: it is left alone, \
                 because process {magic} runs",
                process::started()
            );
            Ok(None)
        }
        Err(Unusable::Damaged(reason)) if may_be_half => {
            let message = format!(
                "The state file '{}' is damaged or not yet whole: {reason}. It is left alone, because \
                 another process has the pid file",
                path.display()
            );
            Err(StartError::new(ExitCode::Initialisation, message))
        }
        Err(Unusable::Foreign(magic)) => {
            tracing::warn!(
                "Found restart exec file with old magic {magic} vs wanted {}: it is removed",
                process::started()
            );
            let _ = std::fs::remove_file(path);
            Ok(None)
        }
        Err(Unusable::Damaged(reason)) => {
            let is_for_us = libvirt_json::is_of(&document, process::started());
            // The program that wrote it may know better.
            let damaged = if is_for_us {
                way_back.execute(&reason)
            } else {
                reason
            };
            // It may be the only copy of what guests depend on: kept, out of the next start's way.
            let aside = path.with_extension("json.damaged");
            let kept = match std::fs::rename(path, &aside) {
                Ok(()) => aside,
                Err(_) => path.clone(),
            };
            let message = format!(
                "The state file '{}' is damaged and cannot be taken over: {damaged}. It is kept as \
                 '{}'",
                path.display(),
                kept.display()
            );
            Err(StartError::new(ExitCode::Initialisation, message))
        }
    }
}

/// Whether the process that a document's magic names may be running.
fn is_alive(magic: &str) -> bool {
    let Ok(pid) = magic.parse() else {
        return false;
    };
    match Process::open_any(pid) {
        Ok(process) => !process.is_dead(),
        Err(reason) => errno::may_pass(reason),
    }
}

/// Says what is wrong and will be, until it is put right and the daemon told (SIGHUP).
pub fn go_on_regardless(failed: &Failed) {
    let reason = match failed {
        Failed::Error(error) => error.to_string(),
        Failed::Log(error) => error.to_string(),
    };
    tracing::error!(
        "The daemon takes over without its configuration, because of this: {reason}. Put it right \
         and send SIGHUP"
    );
}

fn read_document(path: &Path) -> Result<Option<Vec<u8>>, Unread> {
    match whole_file::read(path, DOCUMENT_LIMIT) {
        Ok(document) => Ok(Some(document)),
        Err(Unread::Open(Errno::ENOENT)) => Ok(None),
        Err(reason) => Err(reason),
    }
}
