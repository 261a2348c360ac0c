//! What the kernel says of an open file by itself (`/proc/self/fdinfo`, proc(5)): its file system is not asked,
//! which may not answer.

use std::os::fd::AsRawFd;

use super::mounts::MountId;

/// The mount that a file was opened on. `None` if that cannot be found out.
pub fn mount_id(file: &impl AsRawFd) -> Option<MountId> {
    let text = text_of(file)?;
    let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok().map(MountId)
}

/// Whether this kernel keeps the lock that an open file has: false where a server alone does. `None` if that
/// cannot be found out.
pub fn keeps_lock(file: &impl AsRawFd) -> Option<bool> {
    let text = text_of(file)?;
    Some(text.lines().any(|line| line.starts_with("lock:")))
}

fn text_of(file: &impl AsRawFd) -> Option<String> {
    std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::file::{LockType, Lockable};

    #[test]
    #[cfg_attr(miri, ignore = "it locks a real file")]
    fn a_lock_that_this_kernel_keeps_is_seen() {
        let path = std::env::temp_dir().join(format!("virtlockd-fdinfo-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        assert!(mount_id(&file).is_some());
        let mut file = Lockable::from(std::os::fd::OwnedFd::from(file));
        assert_eq!(keeps_lock(&file), Some(false));
        file.lock(LockType::Write).unwrap();
        assert_eq!(keeps_lock(&file), Some(true));
        std::fs::remove_file(&path).unwrap();
    }
}
