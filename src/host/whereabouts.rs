//! Whether a file is on this host or on a share, found out without asking a share: a server that does not answer
//! keeps nobody waiting here.
//!
//! What the kernel remembers is asked first (openat2(2), RESOLVE_CACHED; statx(2), AT_STATX_DONT_SYNC). What it
//! does not remember is looked up, one name after the other, in directories that are on this host; in the
//! directory of a share nothing is. That a look-up on this host ends on a share by itself cannot be: the kernel
//! always remembers the places where something is mounted, and symbolic links are followed by hand.
//!
//! A path says what is so now. Where it leads over a share to this host's files, which the kernel remembered, the
//! share may be asked the next time.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{self, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::Mode;

use super::errno::Errno;
use super::fdinfo;
use super::file::FileIdentity;
use super::mount_table::{self, Mounts};
use super::mounts::{Mount, MountId};

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whereabouts {
    /// To open it asks this host's kernel only.
    Local,
    /// Somebody else may have to be asked: on this mount, or on one that could not be found out.
    Share(Option<MountId>),
}

/// How often a path may lead on over a symbolic link, as for the kernel.
const MOST_LINKS: usize = 40;
/// How many names are looked up for one path: whoever needs more wants to keep us busy.
const MOST_STEPS: usize = 1000;
/// How often the kernel is asked for what it must remember. It says that it does not when something is renamed
/// or mounted at the same time.
const ROUNDS: usize = 16;

/// A handle on a name itself, which opens nothing.
const HANDLE: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);

/// Where the file of a path is, or would be: relative to the working directory, or from the root.
pub fn of_path(mounts: &mut Mounts, path: &[u8]) -> Whereabouts {
    // Without any share that is the end of it. And the kernel looks nowhere for what is no path.
    if !mounts.has_shares() || path.is_empty() || path.contains(&0) {
        return Whereabouts::Local;
    }
    if !mounts.is_known() {
        return Whereabouts::Share(None);
    }
    match remembered(fcntl::AT_FDCWD, path, HANDLE) {
        Ok(file) => of_handle(mounts, &file),
        Err(_) => Walk::begin(mounts, path).map_or(Whereabouts::Share(None), Walk::run),
    }
}

/// Where an open file is.
pub fn of_descriptor(mounts: &mut Mounts, file: impl AsFd) -> Whereabouts {
    // It may be on one that is mounted nowhere any more.
    if !mounts.has_shares() && !mount_table::shares_were_seen() {
        return Whereabouts::Local;
    }
    of_handle(mounts, file)
}

fn of_handle(mounts: &mut Mounts, file: impl AsFd) -> Whereabouts {
    match mount_of(mounts, file.as_fd()) {
        Some(mount) if mount.is_local() => Whereabouts::Local,
        Some(mount) => Whereabouts::Share(Some(mount.id)),
        None => Whereabouts::Share(None),
    }
}

/// The mount that an open file is on.
fn mount_of<'a>(mounts: &'a mut Mounts, file: BorrowedFd<'_>) -> Option<&'a Mount> {
    let asked = mounts.remembers_attributes().then(|| asked_mount_id(file));
    let id = asked.flatten().or_else(|| fdinfo::mount_id(&file))?;
    if mounts.get(id).is_none() {
        // It was mounted a moment ago.
        mounts.refresh();
    }
    mounts.get(id)
}

/// The number of the mount by statx(2), which Linux before 5.8 does not say.
fn asked_mount_id(file: BorrowedFd<'_>) -> Option<MountId> {
    let found = asked(file, libc::STATX_MNT_ID)?;
    Some(MountId(found.stx_mnt_id))
}

/// What the kernel remembers of a file's attributes, if it has these.
fn asked(file: BorrowedFd<'_>, wanted: libc::c_uint) -> Option<libc::statx> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let mut found = std::mem::MaybeUninit::<libc::statx>::uninit();
    let place = found.as_mut_ptr();
    // SAFETY: the path is a text with a zero byte, and the pointer to room for what the call fills in.
    let result = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, wanted, place) };
    Errno::result(result).ok()?;
    // SAFETY: the call succeeded, so it has filled it in.
    let found = unsafe { found.assume_init() };
    (found.stx_mask & wanted == wanted).then_some(found)
}

/// Which directory a path leads to, if the kernel knows that without asking anybody.
pub fn known_directory(mounts: &Mounts, path: &[u8]) -> Option<FileIdentity> {
    let directory = remembered(fcntl::AT_FDCWD, path, HANDLE).ok()?;
    if !mounts.remembers_attributes() {
        return None;
    }
    let found = asked(directory.as_fd(), libc::STATX_INO)?;
    Some(FileIdentity {
        device: libc::makedev(found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
    })
}

/// A handle on what a path leads to, if the kernel knows that without asking anybody; EAGAIN if it does not.
fn remembered(start: impl AsFd, path: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
    if IS_REFUSED.load(Ordering::Relaxed) {
        return Err(Errno::ENOSYS);
    }
    let resolve = ResolveFlag::from_bits_retain(libc::RESOLVE_CACHED);
    let how = OpenHow::new().flags(flags).resolve(resolve);
    let found = fcntl::openat2(start, path, how).map_err(Errno::from);
    if found.as_ref().err() == Some(&Errno::ENOSYS) {
        IS_REFUSED.store(true, Ordering::Relaxed);
    }
    found
}

/// The kernel, or who restricts this process, does not know openat2(2), and never will.
static IS_REFUSED: AtomicBool = AtomicBool::new(false);

/// A way along a path, name by name.
struct Walk<'a> {
    mounts: &'a mut Mounts,
    /// Where it has come to.
    standing: OwnedFd,
    /// The mount that this is on.
    mount: MountId,
    /// Names yet to be looked up, the next one last.
    names: Vec<Vec<u8>>,
    links: usize,
}

/// How a step ends.
enum Step {
    /// On a handle.
    On(OwnedFd),
    /// Where the way has come to it ends for whoever opens the file, too.
    Ends,
    /// Here, because there is no going on without asking somebody.
    At(Whereabouts),
}

impl<'a> Walk<'a> {
    /// As far as the kernel remembers. `None` if there is nowhere to start from.
    fn begin(mounts: &'a mut Mounts, path: &[u8]) -> Option<Walk<'a>> {
        let path = without_slashes_behind(path);
        let place = path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = match place {
            None => (&b"."[..], path),
            Some(0) => (&b"/"[..], path.get(1..)?),
            Some(place) => (path.get(..place)?, path.get(place.checked_add(1)?..)?),
        };
        let (standing, rest) = match remembered(fcntl::AT_FDCWD, parent, HANDLE) {
            Ok(standing) => (standing, name),
            Err(_) => (start_of(path).ok()?, path),
        };
        let mount = mount_of(mounts, standing.as_fd())?.id;
        Some(Walk {
            mounts,
            standing,
            mount,
            names: names_of(rest),
            links: 0,
        })
    }

    fn run(mut self) -> Whereabouts {
        for _ in 0..MOST_STEPS {
            let Some(name) = self.names.pop() else {
                return self.here();
            };
            match self.step(&name) {
                Step::On(found) => match self.stand_on(found) {
                    None => (),
                    Some(end) => return end,
                },
                Step::Ends => return self.here(),
                Step::At(end) => return end,
            }
        }
        Whereabouts::Share(None)
    }

    fn here(&self) -> Whereabouts {
        if self.is_local() {
            Whereabouts::Local
        } else {
            Whereabouts::Share(Some(self.mount))
        }
    }

    fn is_local(&self) -> bool {
        self.mounts.get(self.mount).is_some_and(Mount::is_local)
    }

    /// Looks a name up where the way has come to.
    fn step(&self, name: &[u8]) -> Step {
        let flags = HANDLE | OFlag::O_NOFOLLOW;
        let mounted = self.mounts.named(self.mount, name);
        let rounds = if mounted.is_empty() { 1 } else { ROUNDS };
        for _ in 0..rounds {
            match remembered(&self.standing, name, flags) {
                Ok(found) => return Step::On(found),
                Err(reason) if ends(reason) => return Step::Ends,
                Err(_) => (),
            }
        }
        if !self.is_local() {
            return Step::At(self.here());
        }
        // It may be that what the name leads to is mounted: nobody else than that may be asked.
        if let Some(share) = mounted.iter().rfind(|mount| !mount.is_local()) {
            return Step::At(Whereabouts::Share(Some(share.id)));
        }
        match fcntl::openat(&self.standing, name, flags, Mode::empty()).map_err(Errno::from) {
            Ok(found) => Step::On(found),
            Err(reason) if ends(reason) || reason == Errno::EACCES => Step::Ends,
            Err(_) => Step::At(Whereabouts::Share(None)),
        }
    }

    /// The way has come to this; if it is a symbolic link, to where that starts from. Where it ends, if it does.
    fn stand_on(&mut self, found: OwnedFd) -> Option<Whereabouts> {
        let Some(mount) = mount_of(self.mounts, found.as_fd()) else {
            return Some(Whereabouts::Share(None));
        };
        let (id, is_local, is_proc) = (mount.id, mount.is_local(), mount.kind == b"proc");
        // What a link of a share says is not asked: if it is one, the next name is not found in it.
        let text = is_local
            .then(|| fcntl::readlinkat(&found, c"").ok())
            .flatten();
        let Some(text) = text.map(OsStringExt::into_vec) else {
            (self.standing, self.mount) = (found, id);
            return None;
        };
        self.links = self.links.saturating_add(1);
        if self.links > MOST_LINKS {
            return Some(self.here());
        }
        if text.starts_with(b"/") {
            // Those in /proc lead to files themselves, whatever their texts say.
            let root = (!is_proc).then(|| start_of(&text).ok()).flatten();
            let Some(root) = root else {
                return Some(Whereabouts::Share(None));
            };
            let Some(mount) = mount_of(self.mounts, root.as_fd()) else {
                return Some(Whereabouts::Share(None));
            };
            self.mount = mount.id;
            self.standing = root;
        }
        self.names.extend(names_of(&text));
        None
    }
}

/// Whether to whoever opens the file the look-up of this name fails in the same way, where it was looked up.
fn ends(reason: Errno) -> bool {
    matches!(
        reason,
        Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG
    )
}

/// The directory that a path starts from. No name is looked up for it.
fn start_of(path: &[u8]) -> Result<OwnedFd, Errno> {
    let start = if path.starts_with(b"/") { c"/" } else { c"." };
    Ok(fcntl::openat(
        fcntl::AT_FDCWD,
        start,
        HANDLE,
        Mode::empty(),
    )?)
}

fn without_slashes_behind(path: &[u8]) -> &[u8] {
    let mut path = path;
    while let Some(rest) = path.strip_suffix(b"/") {
        path = rest;
    }
    path
}

/// The names of a path, the first one last.
fn names_of(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/');
    let names = names.filter(|name| !name.is_empty() && *name != b".");
    names.rev().map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    /// Two directories of this test's own: one on this host, one on a share, as far as the list of mounts says.
    struct Scratch {
        own: PathBuf,
        share: PathBuf,
        mounts: Mounts,
        id: MountId,
    }

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let name = format!("virtlockd-whereabouts-{}-{name}", std::process::id());
            let (own, share) = (
                std::env::temp_dir().join(&name),
                Path::new("/dev/shm").join(&name),
            );
            std::fs::create_dir(&own).unwrap();
            std::fs::create_dir(&share).unwrap();
            let directory = std::fs::File::open(&share).unwrap();
            let id = fdinfo::mount_id(&directory).unwrap();
            let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let begin = format!("{} ", id.0);
            let lines = text.lines().map(|line| match line.starts_with(&begin) {
                true => line.replace("- tmpfs ", "- nfs4 ") + "\n",
                false => line.to_owned() + "\n",
            });
            let mounts = Mounts::of_text(&lines.collect::<String>());
            Scratch {
                own,
                share,
                mounts,
                id,
            }
        }

        fn of(&mut self, path: impl AsRef<Path>) -> Whereabouts {
            of_path(&mut self.mounts, path.as_ref().as_os_str().as_bytes())
        }

        fn is_local(&mut self, path: impl AsRef<Path>) -> bool {
            self.of(path) == Whereabouts::Local
        }

        fn is_on_share(&mut self, path: impl AsRef<Path>) -> bool {
            self.of(path) == Whereabouts::Share(Some(self.id))
        }

        fn link(&self, name: &str, target: impl AsRef<Path>) -> PathBuf {
            let link = self.own.join(name);
            std::os::unix::fs::symlink(target, &link).unwrap();
            link
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.own);
            let _ = std::fs::remove_dir_all(&self.share);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it looks at real files")]
    fn a_file_that_is_there_or_not_is_where_its_directory_is() {
        let mut scratch = Scratch::new("plain");
        let (own, share) = (scratch.own.clone(), scratch.share.clone());
        for name in ["there", "x\u{1}\\ y"] {
            std::fs::write(own.join(name), "").unwrap();
            std::fs::write(share.join(name), "").unwrap();
        }
        for name in [
            "there",
            "x\u{1}\\ y",
            "there/below",
            "missing",
            "missing/below",
            "./there",
            "a/../there",
            "",
        ] {
            assert!(scratch.is_local(own.join(name)), "{name}");
            assert!(scratch.is_on_share(share.join(name)), "{name}");
        }
        let twice =
            |path: &Path| PathBuf::from(format!("/{}//", path.display()).replace('/', "//"));
        assert!(scratch.is_local(twice(&own)) && scratch.is_on_share(twice(&share)));
        assert!(scratch.is_local("/") && scratch.is_local("") && scratch.is_local("/x\0y"));
        assert!(scratch.is_on_share(own.join("..").join(format!("..{}/there", share.display()))));
        assert!(scratch.is_local(share.join("../../..").join(format!(".{}", own.display()))));
        // Relative to where the tests run.
        assert!(
            scratch.is_local("src/lib.rs")
                && scratch.is_local("missing")
                && scratch.is_local("../missing")
        );
        let file = std::fs::File::open(share.join("there")).unwrap();
        let found = of_descriptor(&mut scratch.mounts, &file);
        assert_eq!(found, Whereabouts::Share(Some(scratch.id)));
        let file = std::fs::File::open(own.join("there")).unwrap();
        assert_eq!(
            of_descriptor(&mut scratch.mounts, &file),
            Whereabouts::Local
        );
    }

    #[test]
    #[cfg_attr(miri, ignore = "it looks at real files")]
    fn symbolic_links_on_this_host_are_followed_to_wherever_they_lead() {
        let mut scratch = Scratch::new("links");
        let (own, share) = (scratch.own.clone(), scratch.share.clone());
        std::fs::create_dir(own.join("deep")).unwrap();
        let up = "../".repeat(20);
        let to_share = scratch.link("absolute", &share);
        let relative = scratch.link(
            "relative",
            format!("{up}{}", &share.display().to_string()[1..]),
        );
        let twice = scratch.link("twice", "deep/../absolute/");
        let nowhere = scratch.link("nowhere", "missing");
        let missing = scratch.link("to-missing", share.join("missing"));
        let around = scratch.link("around", "around");
        for link in [&to_share, &relative, &twice] {
            assert!(scratch.is_on_share(link), "{link:?}");
            assert!(scratch.is_on_share(link.join("missing")), "{link:?}");
        }
        assert!(scratch.is_on_share(missing));
        assert!(
            scratch.is_local(nowhere)
                && scratch.is_local(&around)
                && scratch.is_local(around.join("x"))
        );
        std::os::unix::fs::symlink(&own, share.join("back")).unwrap();
        std::fs::write(own.join("there"), "").unwrap();
        // Which the kernel remembers, and does not.
        assert!(scratch.is_local(share.join("back/there")));
        assert!(
            scratch.is_on_share(share.join("back/missing/below"))
                || scratch.is_local(share.join("back/missing/below"))
        );
        // A link of /proc leads to the file itself.
        let file = std::fs::File::open(own.join("there")).unwrap();
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        assert_eq!(scratch.of(link), Whereabouts::Share(None));
        assert!(scratch.is_local("/proc/self/status") && scratch.is_local("/dev/null"));
    }

    #[test]
    #[cfg_attr(miri, ignore = "it looks at real files")]
    fn whoever_wants_to_keep_us_busy_is_not_followed_for_ever() {
        let mut scratch = Scratch::new("busy");
        scratch.link("self", ".");
        let path = scratch.own.join("self/".repeat(35) + &"./../".repeat(300));
        let many = "missing/../".repeat(360);
        for name in [path, scratch.own.join(many)] {
            let _ = scratch.of(&name);
        }
        let turns = scratch.link("turns", "x/../".repeat(700) + "turns");
        std::fs::create_dir(scratch.own.join("x")).unwrap();
        assert_eq!(scratch.of(turns.join("missing")), Whereabouts::Share(None));
    }

    #[test]
    #[cfg_attr(miri, ignore = "it looks at real files")]
    fn a_mount_that_is_not_in_the_list_is_no_local_one() {
        let mut scratch = Scratch::new("unlisted");
        std::fs::write(scratch.share.join("there"), "").unwrap();
        let share = scratch.share.clone();
        scratch.mounts = Mounts::of_text("1000000 1 0:1 / /net rw - nfs host:/ rw\n");
        assert_eq!(scratch.of(share.join("there")), Whereabouts::Share(None));
        scratch.mounts = Mounts::of_text("1000000 1 8:1 / / rw - ext4 /dev/sda rw\n");
        assert_eq!(scratch.of(share.join("there")), Whereabouts::Local);
    }
}
