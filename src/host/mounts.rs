//! What is mounted where, as the kernel lists it (mountinfo, proc(5)): which file systems are this host's own,
//! and what locks on the others are worth. Nothing here asks a file system.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The number of a mount, as statx(2) gives it, too. It may be another one's when the mount is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MountId(pub u64);

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number.
    pub id: MountId,
    /// The mount that it is on.
    pub parent: MountId,
    /// The number of the device that its files are on, as in [`FileIdentity`](super::file::FileIdentity).
    pub device: u64,
    /// What is mounted: a directory of the file system.
    pub root: PathBuf,
    /// Where it is.
    pub place: PathBuf,
    /// The kind of file system.
    pub kind: Vec<u8>,
    /// What it was mounted from: a device, or a server's name and directory.
    pub source: Vec<u8>,
    /// The options of this mount, with commas between them.
    pub options: Vec<u8>,
    /// Those of its file system, which all mounts of it have in common.
    pub super_options: Vec<u8>,
    is_local: bool,
}

/// What a lock on a file is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Locks {
    /// The file system is this host's own: nobody else has the file.
    Own,
    /// Every host that has the file system mounted sees them.
    Seen,
    /// They keep nobody on another host away.
    Unseen(Flaw),
    /// Others see them, and are kept from writing to the file by them.
    Hindering(Flaw),
    /// The list of mounts does not tell: a lock that is held does
    /// ([`fdinfo::keeps_lock`](super::fdinfo::keeps_lock)).
    Untold,
}

/// What is wrong with the locks of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Why, as the end of a sentence: "is mounted with nolock".
    pub why: Cow<'static, str>,
    /// What to do about it, as a sentence without its full stop.
    pub advice: &'static str,
}

/// File systems that only this host's kernel has a part in: on its disks, in its memory, or made up by it.
const LOCAL: [&str; 57] = [
    "adfs",
    "affs",
    "bcachefs",
    "bfs",
    "binder",
    "binfmt_misc",
    "bpf",
    "btrfs",
    "cgroup",
    "cgroup2",
    "configfs",
    "cpuset",
    "cramfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "efs",
    "erofs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "fusectl",
    "hfs",
    "hfsplus",
    "hpfs",
    "hugetlbfs",
    "iso9660",
    "jffs2",
    "jfs",
    "minix",
    "mqueue",
    "msdos",
    "nfsd",
    "nilfs2",
    "nsfs",
    "ntfs3",
    "proc",
    "pstore",
    "ramfs",
    "reiserfs",
    "resctrl",
    "romfs",
    "rootfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "squashfs",
    "sysfs",
    "tmpfs",
    "tracefs",
    "udf",
    "vfat",
    "xfs",
    "zfs",
];

/// Others whose attributes the kernel gives without a word to anybody if it is asked so (statx(2),
/// AT_STATX_DONT_SYNC). The rest may ask their server or their cluster all the same.
const REMEMBERING: [&str; 9] = [
    "autofs", "ceph", "cifs", "fuse", "fuseblk", "nfs", "nfs4", "smb3", "virtiofs",
];

/// How many overlays may lie on one another.
const DEEPEST: usize = 8;

impl Mount {
    /// Whether no server, no other host and no program has a part in it: what is asked of it is answered by this
    /// host's kernel alone. An overlay is local if all that it lies on is. What is not known is not local.
    pub fn is_local(&self) -> bool {
        self.is_local
    }

    /// For operators: where it is, what kind, and from where.
    pub fn text(&self) -> String {
        let place = self.place.to_string_lossy();
        let kind = String::from_utf8_lossy(&self.kind);
        let source = String::from_utf8_lossy(&self.source);
        format!("{place} ({kind}, {source})")
    }

    /// The first of these options that it has.
    pub fn option(&self, wanted: &[&str]) -> Option<&str> {
        let of_both = [&self.options, &self.super_options];
        let mut all = of_both
            .into_iter()
            .flat_map(|options| options.split(|byte| *byte == b','))
            .filter_map(|option| std::str::from_utf8(option).ok());
        all.find(|option| wanted.contains(option))
    }

    /// What locks on its files are worth.
    pub fn locks(&self) -> Locks {
        const MOUNT_WITHOUT: &str = "Mount it without that option when no guest uses it";
        let with = |option: &str| Flaw {
            why: format!("is mounted with {option}").into(),
            advice: MOUNT_WITHOUT,
        };
        let unseen_with = |wanted: &[&str]| match self.option(wanted) {
            Some(option) => Locks::Unseen(with(option)),
            None => Locks::Seen,
        };
        if self.is_local {
            return Locks::Own;
        }
        match &*self.kind {
            b"nfs" | b"nfs4" => unseen_with(&["nolock", "local_lock=all", "local_lock=posix"]),
            b"cifs" | b"smb3" => {
                let unseen = unseen_with(&["nobrl"]);
                // Only the extensions for Unix of the first SMB have locks that hinder nobody.
                let is_advisory = self.option(&["unix"]).is_some()
                    && self.option(&["forcemand", "forcemandatorylock"]).is_none();
                if unseen != Locks::Seen || is_advisory {
                    return unseen;
                }
                Locks::Hindering(Flaw {
                    why: "is mounted without nobrl: its server lets nobody write where a file is locked".into(),
                    advice: "Put the leases in a lockspace on another file system, so that no disk there is locked \
                             itself",
                })
            }
            b"ocfs2" => {
                let has_stack = self.super_options.split(|byte| *byte == b',').any(|it| {
                    it.strip_prefix(b"cluster_stack=")
                        .is_some_and(|stack| stack != b"o2cb")
                });
                match unseen_with(&["localflocks"]) {
                    Locks::Seen if !has_stack => Locks::Unseen(Flaw {
                        why:
                            "is an OCFS2 with the o2cb stack, which keeps POSIX locks on each host"
                                .into(),
                        advice: "Use a cluster stack of user space (pcmk), or put the lockspace on another shared \
                                 file system",
                    }),
                    other => other,
                }
            }
            b"gfs2" => unseen_with(&["localflocks", "lockproto=lock_nolock"]),
            b"lustre" => unseen_with(&["localflock"]),
            b"9p" => Locks::Unseen(Flaw {
                why: "is a 9p, whose server grants every lock to every host".into(),
                advice: "Put the disks and lockspaces on a file system with locks, such as NFS",
            }),
            // Whether its server was asked for locks is agreed upon when it is mounted, and told nowhere.
            _ if self.is_fuse() => Locks::Untold,
            _ => Locks::Seen,
        }
    }

    /// What [`Locks::Untold`] is when it has turned out that this kernel alone keeps a lock.
    pub fn unseen_after_all(&self) -> Flaw {
        Flaw {
            why: "has a server (FUSE) that is not asked for locks".into(),
            advice: "Start its server with locks, if it has them; else put the disks and lockspaces on a file system \
                     with locks, such as NFS",
        }
    }

    fn is_fuse(&self) -> bool {
        [&b"fuse"[..], b"fuseblk", b"virtiofs"].contains(&&*self.kind)
            || self.kind.starts_with(b"fuse.")
    }

    /// Whether what the kernel remembers of a file's attributes can be had without waiting for anybody.
    pub fn remembers_attributes(&self) -> bool {
        self.is_local
            || self.is_fuse()
            || self.kind == b"overlay"
            || is_one(&REMEMBERING, &self.kind)
    }

    /// The name in its directory of the place that it is mounted at; none for a root.
    pub fn name(&self) -> Option<&[u8]> {
        self.place.file_name().map(OsStrExt::as_bytes)
    }

    /// The directories that an overlay lies on; `None` if one of them is not known.
    fn layers(&self) -> Option<Vec<PathBuf>> {
        let mut layers = Vec::new();
        for option in self.super_options.split(|byte| *byte == b',') {
            let mut halves = option.splitn(2, |byte| *byte == b'=');
            let (key, value) = (halves.next()?, halves.next().unwrap_or_default());
            let value = plain(value);
            match key {
                b"lowerdir" => layers.extend(split_layers(&value)),
                b"lowerdir+" | b"datadir+" | b"upperdir" => layers.push(value),
                _ => (),
            }
        }
        let layers: Vec<PathBuf> = layers.into_iter().map(path).collect();
        let are_known = !layers.is_empty() && layers.iter().all(|layer| layer.is_absolute());
        are_known.then_some(layers)
    }
}

/// The directories of `lowerdir=`: with colons between them, and backslashes in front of colons of their own.
fn split_layers(value: &[u8]) -> Vec<Vec<u8>> {
    let mut layers = vec![Vec::new()];
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        let own = (*byte == b'\\').then(|| bytes.next()).flatten();
        match (own, byte, layers.last_mut()) {
            (Some(own), _, Some(layer)) => layer.push(*own),
            (None, b':', _) => layers.push(Vec::new()),
            (None, byte, Some(layer)) => layer.push(*byte),
            (_, _, None) => (),
        }
    }
    layers.retain(|layer| !layer.is_empty());
    layers
}

/// All mounts of this process, the later of one place behind the earlier; none if they cannot be read.
pub fn all() -> Vec<Mount> {
    parse(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// The mounts that this text lists.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    let lines = text.split(|byte| *byte == b'\n');
    let mut mounts: Vec<Mount> = lines.filter_map(parse_line).collect();
    let local: Vec<bool> = mounts
        .iter()
        .map(|mount| is_local(&mounts, mount, 0))
        .collect();
    for (mount, is_local) in mounts.iter_mut().zip(local) {
        mount.is_local = is_local;
    }
    mounts
}

fn is_local(mounts: &[Mount], mount: &Mount, depth: usize) -> bool {
    if is_one(&LOCAL, &mount.kind) {
        return true;
    }
    if mount.kind != b"overlay" || depth > DEEPEST {
        return false;
    }
    let is_over_local = |layer: &PathBuf| {
        of(mounts, layer).is_some_and(|below| {
            // It was mounted where its layers could be seen, which they cannot from here: as with the root of
            // a container. Whoever lives on it hangs with it.
            below.id == mount.id || is_local(mounts, below, depth.saturating_add(1))
        })
    };
    mount
        .layers()
        .is_some_and(|layers| layers.iter().all(is_over_local))
}

fn is_one(kinds: &[&str], kind: &[u8]) -> bool {
    kinds.iter().any(|one| one.as_bytes() == kind)
}

/// The mount that a path without symbolic links is on.
pub fn of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let over = mounts.iter().filter(|mount| path.starts_with(&mount.place));
    over.max_by_key(|mount| mount.place.as_os_str().len())
}

/// A line of mountinfo: `36 35 98:0 /root /place options... - kind source options`.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let (id, parent) = (number(words.next()?)?, number(words.next()?)?);
    let mut device = words.next()?.splitn(2, |byte| *byte == b':');
    let (major, minor) = (number(device.next()?)?, number(device.next()?)?);
    let (root, place, options) = (words.next()?, words.next()?, words.next()?);
    words.find(|word| *word == b"-")?;
    let (kind, source) = (words.next()?, words.next()?);
    Some(Mount {
        id: MountId(id),
        parent: MountId(parent),
        device: libc::makedev(u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        root: path(plain(root)),
        place: path(plain(place)),
        kind: plain(kind),
        source: plain(source),
        options: options.to_vec(),
        super_options: words.next().unwrap_or_default().to_vec(),
        is_local: false,
    })
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

fn path(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
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

    fn one(kind: &str, source: &str, options: &str) -> Mount {
        let line = format!("7 1 0:50 / /srv rw,relatime shared:3 - {kind} {source} {options}");
        parse(line.as_bytes()).pop().unwrap()
    }

    #[test]
    fn a_path_is_on_the_innermost_mount_over_it() {
        let lines = b"1 0 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
                      2 1 0:50 /sub /srv\\040x rw - nfs4 host:/srv rw,vers=4.2,soft\n\
                      3 1 8:2 / /srv\\040x/y rw - xfs /dev/sdb rw\n\
                      broken line\n";
        let mounts = parse(lines);
        assert_eq!(mounts.len(), 3);
        let kind = |path: &str| of(&mounts, Path::new(path)).unwrap().kind.clone();
        assert_eq!(kind("/srv x/disk"), b"nfs4");
        assert_eq!(kind("/srv x/y/disk"), b"xfs");
        assert_eq!(kind("/srv xy"), b"ext4");
        assert!(mounts[0].is_local() && !mounts[1].is_local());
        let share = &mounts[1];
        assert_eq!((share.id, share.parent), (MountId(2), MountId(1)));
        assert_eq!(share.device, libc::makedev(0, 50));
        assert_eq!(share.root, Path::new("/sub"));
        assert_eq!(
            (&*share.options, &*share.super_options),
            (&b"rw"[..], &b"rw,vers=4.2,soft"[..])
        );
        assert_eq!(share.option(&["soft"]), Some("soft"));
        assert_eq!(share.text(), "/srv x (nfs4, host:/srv)");
        assert_eq!(share.name(), Some(&b"srv x"[..]));
    }

    #[test]
    fn a_mount_without_a_source_is_one() {
        let mount = parse(b"5 1 0:5 / /x rw - tmpfs  rw").pop().unwrap();
        assert!(mount.is_local() && mount.source.is_empty() && mount.super_options == b"rw");
    }

    #[test]
    fn what_is_not_known_to_be_this_hosts_own_is_not() {
        for local in [
            "ext4", "xfs", "btrfs", "tmpfs", "zfs", "devtmpfs", "nfsd", "fusectl",
        ] {
            assert!(one(local, "x", "rw").is_local(), "{local}");
        }
        for share in [
            "nfs",
            "nfs4",
            "cifs",
            "ceph",
            "gfs2",
            "ocfs2",
            "autofs",
            "fuse",
            "fuse.sshfs",
            "fuseblk",
            "9p",
            "virtiofs",
            "lustre",
            "ecryptfs",
            "nextfs",
            "ext4x",
            "",
        ] {
            assert!(!one(share, "x", "rw").is_local(), "{share}");
        }
        assert!(one("fuse.sshfs", "x", "rw").remembers_attributes());
        assert!(
            !one("gfs2", "x", "rw").remembers_attributes()
                && !one("9p", "x", "rw").remembers_attributes()
        );
    }

    #[test]
    fn an_overlay_is_this_hosts_own_if_all_that_it_lies_on_is() {
        let lines = |layers: &str, root: &str| {
            format!(
                "1 0 8:1 / / rw - {root}\n\
                 2 1 0:9 / /net rw - nfs host:/net rw\n\
                 3 1 0:10 / /net/a:b rw - tmpfs tmpfs rw\n\
                 4 1 0:11 / /merged rw - overlay overlay rw,{layers},workdir=/net/work"
            )
        };
        for (layers, is_local) in [
            ("lowerdir=/a:/b,upperdir=/c", true),
            ("lowerdir=/a", true),
            ("lowerdir=/a:/net/b,upperdir=/c", false),
            ("lowerdir=/a,upperdir=/net/c", false),
            ("lowerdir=/net/a\\134:b/c:/b", true),
            ("lowerdir+=/a,lowerdir+=/net/b", false),
            ("lowerdir+=/a,datadir+=/b", true),
            // From where, nobody knows.
            ("lowerdir=a:b", false),
            ("rw", false),
        ] {
            let mounts = parse(lines(layers, "ext4 /dev/sda rw").as_bytes());
            assert_eq!(mounts[3].is_local(), is_local, "{layers}");
        }
        // Over one that is over itself, as the root of a container is; and over one that is over a share.
        for (root, is_local) in [
            ("overlay o rw,lowerdir=/x,upperdir=/y", true),
            ("overlay o rw,lowerdir=/net/x", false),
        ] {
            let mounts = parse(lines("lowerdir=/a", root).as_bytes());
            assert_eq!(mounts[3].is_local(), is_local, "{root}");
        }
    }

    #[test]
    fn locks_that_other_hosts_do_not_see_are_known_by_the_mounts_options() {
        for (kind, options, why) in [
            ("nfs", "rw,vers=3,nolock,local_lock=all", "nolock"),
            ("nfs4", "rw,local_lock=posix", "local_lock=posix"),
            ("cifs", "rw,nounix,nobrl", "nobrl"),
            ("ocfs2", "rw,heartbeat=local", "o2cb"),
            ("ocfs2", "rw,cluster_stack=o2cb", "o2cb"),
            ("ocfs2", "rw,cluster_stack=pcmk,localflocks", "localflocks"),
            ("gfs2", "rw,localflocks", "localflocks"),
            ("gfs2", "rw,lockproto=lock_nolock", "lock_nolock"),
            ("lustre", "rw,localflock", "localflock"),
            ("9p", "rw,trans=virtio", "9p"),
        ] {
            match one(kind, "x", options).locks() {
                Locks::Unseen(flaw) => {
                    assert!(
                        flaw.why.contains(why) && !flaw.advice.is_empty(),
                        "{kind} {options}: {flaw:?}"
                    );
                }
                other => panic!("{kind} {options}: {other:?}"),
            }
        }
        for (kind, options) in [
            ("nfs4", "rw,vers=4.2,local_lock=none"),
            ("nfs", "rw,local_lock=flock"),
            ("cifs", "rw,unix"),
            ("ocfs2", "rw,cluster_stack=pcmk"),
            ("gfs2", "rw"),
            ("ceph", "rw"),
        ] {
            assert_eq!(
                one(kind, "x", options).locks(),
                Locks::Seen,
                "{kind} {options}"
            );
        }
        for options in ["rw,nounix", "rw,unix,forcemand"] {
            let locks = one("smb3", "x", options).locks();
            assert!(matches!(locks, Locks::Hindering(_)), "{options}: {locks:?}");
        }
        assert_eq!(one("fuse.glusterfs", "x", "rw").locks(), Locks::Untold);
        assert_eq!(one("virtiofs", "x", "rw").locks(), Locks::Untold);
        assert_eq!(one("xfs", "x", "rw").locks(), Locks::Own);
    }
}
