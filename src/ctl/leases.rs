//! Where libvirt puts the lease of a disk. With `file_lockspace_dir` in qemu-lockd.conf a guest's disk is not
//! locked itself: a file in that directory is, whose name is the SHA-256 sum of the disk's path.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::sha256;
use crate::config::Other;

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
    let home = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")));
    match home.filter(|_| is_session) {
        Some(home) => home.join("libvirt/qemu-lockd.conf"),
        None => PathBuf::from(SETTINGS),
    }
}

/// The name of a disk's lease.
pub fn name(path: &Path) -> String {
    let sum = sha256::sum(path.as_os_str().as_bytes());
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}
