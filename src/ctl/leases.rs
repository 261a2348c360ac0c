//! Where libvirt puts the lease of a disk. With lockspaces in qemu-lockd.conf a guest's disk is not locked itself:
//! a file in one of these directories is. A logical volume's is called by the volume's uuid (`lvm_lockspace_dir`), a
//! SCSI disk's by what the disk says of itself (`scsi_lockspace_dir`), any other by the SHA-256 sum of the disk's path
//! (`file_lockspace_dir`).

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel;
use super::patience::{self, Answer};
use super::sha256;
use super::text::safe;
use crate::config::Other;
use crate::host::paths::Paths;

/// libvirt's settings for its lock daemon.
const SETTINGS: &str = "/etc/libvirt/qemu-lockd.conf";

/// The program that libvirt asks for the name of a SCSI disk.
const SCSI_ID: &str = "/lib/udev/scsi_id";

/// How guests' disks are locked.
#[derive(Debug, Default)]
pub struct Leases {
    /// The directory of the leases of files, if they have such.
    files: Option<Vec<u8>>,
    /// That of logical volumes.
    volumes: Option<Vec<u8>>,
    /// That of SCSI disks.
    scsi: Option<Vec<u8>>,
}

/// A lockspace and a name in it.
pub type Lease = (Vec<u8>, Vec<u8>);

impl Leases {
    /// As libvirt is configured. A word about it if that cannot be found out.
    pub fn configured(is_session: bool) -> (Leases, Option<String>) {
        let path = settings(is_session);
        match Other::load(&path) {
            Ok(Some(settings)) => {
                let text = |key| settings.text(key).map(<[u8]>::to_vec);
                let leases = Leases {
                    files: text("file_lockspace_dir"),
                    volumes: text("lvm_lockspace_dir"),
                    scsi: text("scsi_lockspace_dir"),
                };
                (leases, None)
            }
            Ok(None) => (Leases::default(), None),
            Err(error) => (Leases::default(), Some(error.to_string())),
        }
    }

    /// The lease of the disk with this path, if it has one. `file` is as the daemon tells files apart, if that is
    /// known.
    ///
    /// # Errors
    /// Why nobody can tell.
    pub fn of(&self, path: &Path, file: Option<(u64, u64)>) -> Result<Option<Lease>, String> {
        let device = file.and_then(|(device, inode)| (inode == 0).then_some(device));
        // libvirt looks at nothing else of a disk before it asks for these.
        if let Some(device) = device
            && path.as_os_str().as_bytes().starts_with(b"/dev")
        {
            if let Some(directory) = &self.volumes
                && let Some(uuid) = volume(device)
            {
                return Ok(Some((directory.clone(), uuid)));
            }
            if let Some(directory) = &self.scsi
                && let Some(id) = scsi_id(path)?
            {
                return Ok(Some((directory.clone(), id)));
            }
        }
        let name = || name(path).into_bytes();
        Ok(self.files.clone().map(|directory| (directory, name())))
    }

    /// Whether a name in a lockspace is one of these.
    pub fn is_one(&self, lockspace: &[u8], name: &[u8]) -> bool {
        let is_in = |directory: &Option<Vec<u8>>| directory.as_deref() == Some(lockspace);
        let is_sum = name.len() == 64 && name.iter().all(u8::is_ascii_hexdigit);
        (is_in(&self.files) && is_sum) || is_in(&self.volumes) || is_in(&self.scsi)
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

/// The name of a file's lease.
pub fn name(path: &Path) -> String {
    let sum = sha256::sum(path.as_os_str().as_bytes());
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The uuid of the logical volume that this device is, as `lvs` writes it; the kernel knows it, and no device is
/// asked.
fn volume(device: u64) -> Option<Vec<u8>> {
    let (major, minor) = kernel::device(device);
    let path = format!("/sys/dev/block/{major}:{minor}/dm/uuid");
    uuid_of_volume(&std::fs::read(path).ok()?)
}

/// Behind `LVM-` stands the uuid of the group, then that of the volume. What has more behind it is a part of one.
fn uuid_of_volume(text: &[u8]) -> Option<Vec<u8>> {
    const UUID: usize = 32;
    const GROUPS: [usize; 7] = [6, 4, 4, 4, 4, 4, 6];
    let both = text.trim_ascii_end().strip_prefix(b"LVM-")?;
    let mut rest = both.get(UUID..)?;
    if rest.len() != UUID || !rest.iter().all(u8::is_ascii_alphanumeric) {
        return None;
    }
    let mut uuid = Vec::new();
    for length in GROUPS {
        let (group, behind) = rest.split_at_checked(length)?;
        if !uuid.is_empty() {
            uuid.push(b'-');
        }
        uuid.extend_from_slice(group);
        rest = behind;
    }
    Some(uuid)
}

/// What a SCSI disk says that it is; `None` of any other disk.
fn scsi_id(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let mut command = Command::new(SCSI_ID);
    command
        .args(["--replace-whitespace", "--whitelisted", "--device"])
        .arg(path);
    let Answer { text, is_success } = patience::answer(&mut command).map_err(|reason| {
        format!(
            "the name of its lease cannot be asked for ({SCSI_ID} --device {}): {reason}",
            safe(path.as_os_str().as_bytes())
        )
    })?;
    let id = text.split(|byte| *byte == b'\n').next();
    let id = id.filter(|id| is_success && !id.is_empty());
    Ok(id.map(<[u8]>::to_vec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volumes_uuid_is_the_second_one_and_has_the_groups_that_lvs_writes() {
        let group = "a".repeat(32);
        let volume = "cWlhGM0123456789abcdefghijklmn42";
        let text = format!("LVM-{group}{volume}\n");
        let uuid = uuid_of_volume(text.as_bytes()).unwrap();
        assert_eq!(uuid, b"cWlhGM-0123-4567-89ab-cdef-ghij-klmn42");
        for other in [
            format!("LVM-{group}{volume}-cow\n"),
            format!("LVM-{group}\n"),
            format!("CRYPT-LUKS2-{group}{volume}\n"),
            String::new(),
        ] {
            assert_eq!(uuid_of_volume(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn a_file_has_the_lease_of_its_path_and_no_other() {
        let leases = Leases {
            files: Some(b"/files".to_vec()),
            volumes: Some(b"/volumes".to_vec()),
            scsi: Some(b"/scsi".to_vec()),
        };
        let sum = name(Path::new("/disk"));
        let found = leases.of(Path::new("/disk"), Some((1, 2)));
        assert_eq!(
            found,
            Ok(Some((b"/files".to_vec(), sum.clone().into_bytes())))
        );
        assert!(leases.is_one(b"/files", sum.as_bytes()) && !leases.is_one(b"", sum.as_bytes()));
        assert!(!leases.is_one(b"/files", b"lease") && leases.is_one(b"/scsi", b"lease"));
        let none = Leases::default();
        assert_eq!(none.of(Path::new("/dev/null"), None), Ok(None));
    }
}
