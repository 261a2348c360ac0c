//! The list of mounts, kept as it is now: the kernel says when it changes (a priority event on mountinfo, proc(5)),
//! and it is read again when somebody looks at it next. Neither the one nor the other asks a file system.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::mounts::{self, Mount, MountId};

/// Of the thread that opens it: it need not be in the mount namespace of the process's first one.
const LIST: &str = "/proc/thread-self/mountinfo";

/// Shares were mounted at some time, as far as anybody here looked.
static WERE_SEEN: AtomicBool = AtomicBool::new(false);

/// Whether a file on a share may be open: whoever opened one had looked.
pub fn shares_were_seen() -> bool {
    WERE_SEEN.load(Ordering::Relaxed)
}

/// The mounts of this process.
#[derive(Debug)]
pub struct Mounts {
    /// `None` if it could not be opened yet.
    list: Option<File>,
    mounts: Vec<Mount>,
    /// The mounts are known, as of some moment.
    is_known: bool,
    /// They may be other ones by now.
    is_stale: bool,
    /// Whoever waits for changes tells of them.
    is_told: bool,
    has_shares: bool,
    remembers_attributes: bool,
    /// How often they were read.
    version: u64,
}

impl Default for Mounts {
    fn default() -> Mounts {
        Mounts::open()
    }
}

impl Mounts {
    /// Those of the thread that calls this. What cannot be opened or read is tried again each time that it is
    /// looked at, and until then nothing is known to be local.
    pub fn open() -> Mounts {
        let mut mounts = Mounts {
            list: None,
            mounts: Vec::new(),
            is_known: false,
            is_stale: true,
            is_told: false,
            has_shares: true,
            remembers_attributes: false,
            version: 0,
        };
        mounts.freshen();
        mounts
    }

    /// What becomes ready with a priority event when something is mounted or unmounted; `None` where the list
    /// cannot be opened.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.list.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// From now on [`Mounts::changed`] is called when the descriptor says so. Without that the kernel is asked at
    /// each look.
    pub fn is_told_of_changes(&mut self) {
        self.is_told = true;
    }

    /// Something was mounted or unmounted.
    pub fn changed(&mut self) {
        self.is_stale = true;
    }

    /// Whether any share is mounted where a file could be looked for: if not, every file is on this host.
    pub fn has_shares(&mut self) -> bool {
        self.freshen();
        self.has_shares
    }

    /// Whether the list could be read.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// Whether the kernel gives the attributes that it remembers of any file without waiting for anybody.
    pub fn remembers_attributes(&self) -> bool {
        self.remembers_attributes
    }

    /// A mount by its number.
    pub fn get(&self, id: MountId) -> Option<&Mount> {
        self.mounts.iter().find(|mount| mount.id == id)
    }

    /// The mount that a path without symbolic links is on.
    pub fn of(&self, path: &[u8]) -> Option<&Mount> {
        mounts::of(&self.mounts, Path::new(OsStr::from_bytes(path)))
    }

    /// Changes whenever the mounts may have.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What is mounted in some directory of this mount under this name, and what is on that: the uppermost last.
    pub fn named(&self, parent: MountId, name: &[u8]) -> Vec<&Mount> {
        let of_name = |mount: &&Mount| mount.parent == parent && mount.name() == Some(name);
        let mut found: Vec<&Mount> = self.mounts.iter().filter(of_name).collect();
        let mut next = 0;
        while let Some(below) = found.get(next).copied() {
            let is_on = |mount: &&Mount| mount.parent == below.id && mount.place == below.place;
            let is_new = |mount: &&Mount| found.iter().all(|it| it.id != mount.id);
            let above: Vec<&Mount> = self.mounts.iter().filter(is_on).filter(is_new).collect();
            found.extend(above);
            next = next.saturating_add(1);
        }
        found
    }

    /// Reads the list again, if the kernel says that it has changed since. Whether it did.
    pub fn refresh(&mut self) -> bool {
        self.is_stale |= self.list.as_ref().is_none_or(has_changed);
        self.freshen_if_stale()
    }

    fn freshen(&mut self) {
        if !self.is_told {
            self.refresh();
        } else {
            self.freshen_if_stale();
        }
    }

    fn freshen_if_stale(&mut self) -> bool {
        if !self.is_stale {
            return false;
        }
        // What changes while it is read makes it stale again.
        match self.read() {
            Some(mounts) => self.put(mounts),
            None => {
                self.put(Vec::new());
                (self.is_known, self.has_shares) = (false, true);
                WERE_SEEN.store(true, Ordering::Relaxed);
                self.is_stale = true;
            }
        }
        true
    }

    fn put(&mut self, mounts: Vec<Mount>) {
        self.mounts = mounts;
        let shares = || self.mounts.iter().filter(|mount| !mount.is_local());
        let (has_shares, remembers) = (
            shares().any(|mount| !self.is_out_of_the_way(mount)),
            shares().all(Mount::remembers_attributes),
        );
        (self.has_shares, self.remembers_attributes) = (has_shares, remembers);
        if has_shares {
            WERE_SEEN.store(true, Ordering::Relaxed);
        }
        (self.is_known, self.is_stale) = (true, false);
        self.version = self.version.wrapping_add(1);
    }

    /// Every host with systemd mounts binfmt_misc by autofs, which is in /proc, where nobody has disks.
    fn is_out_of_the_way(&self, mount: &Mount) -> bool {
        mount.kind == b"autofs" && self.get(mount.parent).is_some_and(|it| it.kind == b"proc")
    }

    fn read(&mut self) -> Option<Vec<Mount>> {
        let mut text = Vec::new();
        if self.list.is_none() {
            self.list = File::open(LIST).ok();
        }
        let list = self.list.as_mut()?;
        list.rewind().ok()?;
        list.read_to_end(&mut text).ok()?;
        let mounts = mounts::parse(&text);
        (!mounts.is_empty()).then_some(mounts)
    }
}

fn has_changed(list: &File) -> bool {
    let mut asked = [PollFd::new(list.as_fd(), PollFlags::POLLPRI)];
    match poll(&mut asked, PollTimeout::ZERO) {
        Ok(0) => false,
        // Also if it cannot be asked.
        Ok(_) | Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Mounts {
        /// As if these were mounted.
        pub fn of_text(text: &str) -> Mounts {
            let mut mounts = Mounts::open();
            mounts.is_told_of_changes();
            mounts.put(mounts::parse(text.as_bytes()));
            mounts
        }
    }

    #[test]
    fn only_a_share_on_which_there_can_be_disks_counts() {
        const OWN: &str = "1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:3 / /proc rw - proc proc rw\n\
                           3 2 0:7 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw,fd=30\n";
        assert!(!Mounts::of_text(OWN).has_shares());
        for share in ["autofs systemd-1", "nfs host:/x", "unheard-of x"] {
            let mut mounts = Mounts::of_text(&format!("{OWN}4 1 0:9 / /srv rw - {share} rw\n"));
            assert!(mounts.has_shares(), "{share}");
            assert_eq!(mounts.remembers_attributes(), !share.starts_with("unheard"));
        }
    }

    #[test]
    fn what_is_mounted_under_a_name_is_found_with_what_is_on_it() {
        let mounts = Mounts::of_text(
            "1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:7 / /srv/x rw - autofs a rw\n\
             3 2 0:8 / /srv/x rw - nfs host:/x rw\n4 3 0:9 / /srv/x/x rw - tmpfs t rw\n",
        );
        let named = |parent, name: &[u8]| {
            let found = mounts.named(MountId(parent), name);
            found.iter().map(|mount| mount.id.0).collect::<Vec<_>>()
        };
        assert_eq!(named(1, b"x"), [2, 3]);
        assert_eq!(named(3, b"x"), [4]);
        assert_eq!(named(1, b"y"), [0u64; 0]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "it reads what is mounted")]
    fn the_list_is_read_again_only_when_it_may_have_changed() {
        let mut mounts = Mounts::open();
        assert!(mounts.is_known() && mounts.descriptor().is_some());
        mounts.is_told_of_changes();
        let before = mounts.version();
        mounts.has_shares();
        assert_eq!(mounts.version(), before);
        mounts.changed();
        mounts.has_shares();
        assert_eq!(mounts.version(), before + 1);
    }

    #[test]
    fn where_nothing_is_known_nothing_is_known_to_be_local() {
        let mut mounts = Mounts::of_text("1 0 8:1 / / rw - ext4 /dev/sda rw");
        mounts.list = File::open("/dev/null").ok();
        mounts.changed();
        assert!(mounts.has_shares() && !mounts.is_known());
    }
}
