//! placeholder until merge
use super::mount_table::Mounts;
use std::os::fd::RawFd;
pub type MountId = u64;
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Whereabouts {
    Local,
    Share(Option<MountId>),
}
pub fn of_path(mounts: &Mounts, path: &[u8]) -> Whereabouts {
    let text = String::from_utf8_lossy(path).into_owned();
    let over = mounts
        .all
        .iter()
        .filter(|(_, place, _)| text.starts_with(place.as_str()));
    match over.max_by_key(|(_, place, _)| place.len()) {
        Some((id, _, true)) => Whereabouts::Share(Some(*id)),
        _ => Whereabouts::Local,
    }
}
pub fn of_descriptor(mounts: &Mounts, number: RawFd) -> Whereabouts {
    let path = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
    use std::os::unix::ffi::OsStrExt;
    of_path(mounts, path.as_os_str().as_bytes())
}
