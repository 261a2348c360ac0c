//! Where libvirt puts the lease of a disk. With `file_lockspace_dir` in qemu-lockd.conf a guest's disk is not
//! locked itself: a file in that directory is, whose name is the SHA-256 sum of the disk's path.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::sha256;
use crate::config::Other;
use crate::host::paths::Paths;

/// libvirt's settings for its lock daemon.
const SETTINGS: &str = "/etc/libvirt/qemu-lockd.conf";

/// How guests' disks are locked.
#[derive(Debug, Default)]
pub struct Leases {
    /// The directory of the leases of files, if they have such.
    pub files: Option<Vec<u8>>,
}

impl Leases {
    /// As libvirt is configured. A word about it if that cannot be found out.
    pub fn configured(is_session: bool) -> (Leases, Option<String>) {
        let path = settings(is_session);
        match Other::load(&path) {
            Ok(Some(settings)) => {
                let text = |key| settings.text(key).map(<[u8]>::to_vec);
                let files = text("file_lockspace_dir");
                (Leases { files }, None)
            }
            Ok(None) => (Leases::default(), None),
            Err(error) => (Leases::default(), Some(error.to_string())),
        }
    }

    /// The lockspace and the name of the lease of the disk with this path.
    pub fn of(&self, path: &Path) -> Option<(Vec<u8>, Vec<u8>)> {
        let directory = self.files.clone()?;
        Some((directory, name(path).into_bytes()))
    }
}

fn settings(is_session: bool) -> PathBuf {
    if is_session {
        session_directory().join("qemu-lockd.conf")
    } else {
        PathBuf::from(SETTINGS)
    }
}

/// Where libvirt's configuration of a user's session is.
pub fn session_directory() -> PathBuf {
    let config = Paths::of_session().config_file;
    config.parent().map(Path::to_owned).unwrap_or_default()
}

/// The name of a disk's lease.
pub fn name(path: &Path) -> String {
    let sum = sha256::sum(path.as_os_str().as_bytes());
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether something may be the name of a disk's lease.
pub fn is_name(name: &[u8]) -> bool {
    name.len() == 64 && name.iter().all(u8::is_ascii_hexdigit)
}
