//! What is mounted where, as the kernel lists it. Nothing here asks a file system.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub place: PathBuf,
    /// The kind of file system.
    pub kind: Vec<u8>,
    /// Its options, with commas between them.
    pub options: Vec<u8>,
}

impl Mount {
    /// Whether other hosts may have it, too.
    pub fn is_remote(&self) -> bool {
        let remote = [
            &b"nfs"[..],
            b"cifs",
            b"smb3",
            b"ceph",
            b"gfs2",
            b"ocfs2",
            b"lustre",
            b"gpfs",
            b"fuse.glusterfs",
            b"glusterfs",
            b"afs",
            b"9p",
            b"virtiofs",
        ];
        let is_one = |kind: &&[u8]| self.kind.starts_with(kind);
        remote.iter().any(is_one)
    }
}

/// All mounts of this process, the later of one place behind the earlier.
pub fn all() -> Vec<Mount> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(parse).collect()
}

/// The mount that a path without symbolic links is on.
pub fn of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let over = mounts.iter().filter(|mount| path.starts_with(&mount.place));
    over.max_by_key(|mount| mount.place.as_os_str().len())
}

/// A line of mountinfo: `36 35 98:0 /root /place options... - kind source options`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let place = words.nth(4)?;
    let own = words.next()?;
    words.find(|word| *word == b"-")?;
    let (kind, _source, options) = (words.next()?, words.next()?, words.next()?);
    Some(Mount {
        place: PathBuf::from(std::ffi::OsString::from_vec(plain(place))),
        kind: kind.to_vec(),
        options: [own, b",", options].concat(),
    })
}

/// Without the octal escapes of blanks and backslashes.
fn plain(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = word;
    while let Some((byte, behind)) = rest.split_first() {
        let digits = behind.get(..3).and_then(|it| std::str::from_utf8(it).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped.filter(|_| *byte == b'\\') {
            Some(escaped) => {
                plain.push(escaped);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                plain.push(*byte);
                rest = behind;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_path_is_on_the_innermost_mount_over_it() {
        let lines: [&[u8]; 3] = [
            b"1 0 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw",
            b"2 1 0:50 / /srv\\040x rw - nfs4 host:/srv rw,vers=4.2,soft",
            b"3 1 8:2 / /srv\\040x/y rw - xfs /dev/sdb rw",
        ];
        let mounts: Vec<Mount> = lines.into_iter().filter_map(parse).collect();
        assert_eq!(mounts.len(), 3);
        let kind = |path: &str| of(&mounts, Path::new(path)).unwrap().kind.clone();
        assert_eq!(kind("/srv x/disk"), b"nfs4");
        assert_eq!(kind("/srv x/y/disk"), b"xfs");
        assert_eq!(kind("/srv xy"), b"ext4");
        assert!(mounts[1].is_remote() && !mounts[0].is_remote());
        assert_eq!(mounts[1].options, b"rw,rw,vers=4.2,soft");
        assert_eq!(mounts[1].place.as_os_str().as_bytes(), b"/srv x");
    }
}
