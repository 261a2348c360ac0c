//! Who was here before? An earlier image of this process may have left its state: this program's (a
//! ledger in a memory file) or the C daemon's (its state document). How it is gone on from is told in
//! [`super::go_on`].

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::Plan;
use crate::exit::{ExitCode, Failed, StartError, unusable};
use crate::host::descriptors;
use crate::host::paths::Paths;
use crate::host::process::Process;
use crate::host::{environment, errno};
use crate::restart::handover::HANDOVER_VARIABLE;
use crate::restart::ledger::Ledger;
use crate::restart::libvirt_json::{self, Unusable};
use crate::restart::state::{Service, State};

/// A state document larger than this is not read, bytes. libvirt's daemon writes it whole even if
/// it could not read it again.
const DOCUMENT_LIMIT: u64 = 256 * 1024 * 1024;

/// Whose state it is.
pub enum Predecessor {
    /// This program's, perhaps another version: the state, and the ledger to go on writing.
    Ours(State, Ledger),
    /// libvirt's, with the document that is to be removed when the state has been taken over.
    Libvirt(State, PathBuf),
}

/// The state that a predecessor of this program handed over, if this process was made by it.
pub fn take_ledger() -> Option<Result<Predecessor, Failed>> {
    let value = environment::take(HANDOVER_VARIABLE)?;
    let (descriptor, pid) = value.to_str()?.split_once(':')?;
    // The variable of another process means nothing: this one is not its successor.
    if pid != std::process::id().to_string() {
        return None;
    }
    let descriptor: OwnedFd = match descriptor.parse().ok().map(descriptors::adopt) {
        Some(Ok(descriptor)) => descriptor,
        _ => return Some(Err(unusable("its descriptor is not open").into())),
    };
    let loaded = Ledger::take_over(descriptor)
        .map(|(state, ledger)| Predecessor::Ours(state, ledger))
        .map_err(|reason| unusable(&reason.to_string()).into());
    Some(loaded)
}

/// The state that the C daemon left for this process, if it did. A running daemon's that is about to
/// execute its successor is not touched.
///
/// # Errors
/// A document that is there and cannot be used.
pub fn find_document(plan: &Plan) -> Result<Option<Predecessor>, StartError> {
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
    let socket = |service| {
        let path = match service {
            Service::Lock => &paths.lock_socket,
            Service::Admin => &paths.admin_socket,
        };
        path.as_os_str().as_bytes().to_vec()
    };
    match libvirt_json::read(&document, std::process::id(), socket) {
        Ok(state) => Ok(Some(Predecessor::Libvirt(state, path.clone()))),
        Err(Unusable::Foreign(magic)) if is_alive(&magic) => {
            tracing::warn!(
                "Found restart exec file with old magic {magic} vs wanted {}: it is left alone, \
                 because process {magic} runs",
                std::process::id()
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
                std::process::id()
            );
            let _ = std::fs::remove_file(path);
            Ok(None)
        }
        Err(Unusable::Damaged(reason)) => {
            // It may be the only copy of what guests depend on: kept, out of the next start's way.
            let aside = path.with_extension("json.damaged");
            let kept = match std::fs::rename(path, &aside) {
                Ok(()) => aside,
                Err(_) => path.clone(),
            };
            let message = format!(
                "The state file '{}' is damaged and cannot be taken over: {reason}. It is kept as \
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

/// Whether the C daemon left its state for this process.
pub fn is_awaited(paths: &Paths) -> bool {
    let document = read_document(&paths.restart_state);
    document.is_ok_and(|document| {
        document.is_some_and(|document| {
            libvirt_json::read(&document, std::process::id(), |_| Vec::new()).is_ok()
        })
    })
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

fn read_document(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let length = match std::fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if length > DOCUMENT_LIMIT {
        return Err(std::io::Error::from_raw_os_error(libc::EFBIG));
    }
    std::fs::read(path).map(Some)
}
