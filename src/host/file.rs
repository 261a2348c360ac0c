//! Files as the lock table needs them: opened without waiting, locked with open-file-description
//! locks, unlocked before they are closed, told apart by device and inode.

use std::ffi::CStr;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{self, FcntlArg, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{self, FileStat, Mode, SFlag};
use nix::sys::statfs::{self, FsType};
use nix::unistd::{self, UnlinkatFlags};

use super::errno::Errno;

/// Which file it is, whatever its name (stat(2)). A block device may have several nodes, which all
/// lead to the same disk: it is told by its own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct FileIdentity {
    /// The number of the device that it is on, or of the block device that it is.
    pub device: u64,
    /// Its inode number; 0, which no file has, for a block device.
    pub inode: u64,
}

impl From<FileStat> for FileIdentity {
    fn from(stat: FileStat) -> FileIdentity {
        if kind(&stat) == SFlag::S_IFBLK {
            return FileIdentity {
                device: stat.st_rdev,
                inode: 0,
            };
        }
        FileIdentity {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

impl FileIdentity {
    /// Stands for an open file that cannot be asked which one it is: no other has it.
    pub fn unknown(file: &impl AsRawFd) -> FileIdentity {
        FileIdentity {
            device: u64::MAX,
            inode: u64::try_from(file.as_raw_fd()).unwrap_or(u64::MAX),
        }
    }

    /// Whether it says which file it is.
    pub fn is_known(&self) -> bool {
        self.device != u64::MAX
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Identity and type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInformation {
    /// Which file it is.
    pub identity: FileIdentity,
    /// Whether it is a directory.
    pub is_directory: bool,
}

fn information(stat: FileStat) -> FileInformation {
    FileInformation {
        is_directory: kind(&stat) == SFlag::S_IFDIR,
        identity: stat.into(),
    }
}

/// Where the path of a call starts, and whether it may lead elsewhere.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// An ordinary path: absolute, or relative to the daemon's working directory.
    Anywhere,
    /// Below this directory: a path that leaves it, be it over `..` or a symbolic link, fails with
    /// EXDEV (RESOLVE_BENEATH, openat2(2)).
    Beneath(BorrowedFd<'a>),
}

/// The mode of files that the daemon makes.
const MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Opens without ever waiting: not for the other end of a FIFO, not for a lease to be given back.
#[inline]
fn open(start: Start<'_>, path: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
    let mut flags = flags | OFlag::O_CLOEXEC;
    // O_PATH waits for nothing, and openat2(2) allows no other flags with it.
    if !flags.contains(OFlag::O_PATH) {
        flags |= OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    }
    match start {
        Start::Anywhere => fcntl::open(path, flags, MODE).map_err(Errno::from),
        Start::Beneath(directory) => {
            let mode = if flags.contains(OFlag::O_CREAT) {
                MODE
            } else {
                Mode::empty()
            };
            let how = OpenHow::new()
                .flags(flags)
                .mode(mode)
                .resolve(ResolveFlag::RESOLVE_BENEATH);
            // EAGAIN: something was renamed meanwhile, and the kernel could not be sure.
            let mut tries = 0u8;
            loop {
                match fcntl::openat2(directory, path, how).map_err(Errno::from) {
                    Err(Errno::EAGAIN) if tries < 16 => tries = tries.saturating_add(1),
                    // Linux before 5.6 has no such call, and a security policy may not know it.
                    Err(Errno::ENOSYS | Errno::EPERM | Errno::EACCES) => {
                        return open_step_by_step(directory, path, flags, mode);
                    }
                    result => return result,
                }
            }
        }
    }
}

/// Opens a path beneath a directory without the kernel's word that it stays there: one directory
/// after the other, through no symbolic link and never upwards.
fn open_step_by_step(
    start: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlag,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    if path.starts_with(b"/") {
        return Err(Errno::EXDEV);
    }
    if path.is_empty() {
        return Err(Errno::ENOENT);
    }
    if path.ends_with(b"/") && flags.contains(OFlag::O_CREAT) {
        return Err(Errno::EISDIR);
    }
    let mut steps = path
        .split(|byte| *byte == b'/')
        .filter(|step| *step != b".");
    let last = steps.next_back().ok_or(Errno::ENOENT)?;
    let step_of_a_path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut reached: Option<OwnedFd> = None;
    for step in steps.filter(|step| !step.is_empty()) {
        if step == b".." {
            return Err(Errno::EXDEV);
        }
        let from = reached.as_ref().map_or(start, AsFd::as_fd);
        reached = Some(fcntl::openat(from, step, step_of_a_path, Mode::empty())?);
    }
    if last == b".." {
        return Err(Errno::EXDEV);
    }
    // A path that ends with a slash is one of a directory.
    let (last, flags) = match last {
        b"" => (&b"."[..], flags | OFlag::O_DIRECTORY),
        last => (last, flags),
    };
    let from = reached.as_ref().map_or(start, AsFd::as_fd);
    let file = fcntl::openat(from, last, flags | OFlag::O_NOFOLLOW, mode)?;
    // A handle would be one on the link itself.
    if flags.contains(OFlag::O_PATH) && kind(&stat::fstat(&file)?) == SFlag::S_IFLNK {
        return Err(Errno::ELOOP);
    }
    Ok(file)
}

/// Opens a file for reading and writing, as a write lock needs.
#[inline]
pub fn open_existing(start: Start<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(start, path, OFlag::O_RDWR)
}

/// Opens a file for reading, which is all that a read lock needs.
pub fn open_to_read(start: Start<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(start, path, OFlag::O_RDONLY)
}

/// Opens a file for reading and writing and makes it if it is missing.
pub fn open_or_create(start: Start<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(start, path, OFlag::O_RDWR | OFlag::O_CREAT)
}

/// Makes a file and opens it. EEXIST if there is one.
pub fn create(start: Start<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(start, path, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL)
}

/// A handle on the file itself, without opening it: it can be asked for its identity, and closing
/// it drops no lock (open(2), O_PATH).
pub fn handle(start: Start<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(start, path, OFlag::O_PATH)
}

/// Opens the file behind a handle, whatever its path leads to by now.
pub fn open_handle(handle: &OwnedFd) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    open(Start::Anywhere, path.as_bytes(), OFlag::O_RDWR)
}

/// Another descriptor of an open file, or of that behind a handle, through which it can be read and not
/// changed.
pub fn read_only(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    open(Start::Anywhere, path.as_bytes(), OFlag::O_RDONLY)
}

/// A file that holds nothing.
pub fn open_nothing() -> Result<OwnedFd, Errno> {
    open(Start::Anywhere, b"/dev/null", OFlag::O_RDONLY)
}

/// A handle on a directory, to start paths from.
pub fn open_directory(path: &[u8]) -> Result<OwnedFd, Errno> {
    open(Start::Anywhere, path, OFlag::O_PATH | OFlag::O_DIRECTORY)
}

/// A handle on a directory below another one.
fn open_directory_beneath(start: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(
        Start::Beneath(start),
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY,
    )
}

/// Which file a descriptor is of.
#[inline]
pub fn identity(file: impl AsFd) -> Result<FileIdentity, Errno> {
    Ok(stat::fstat(file)?.into())
}

/// As [`identity`], of what is known here: no server of a network file system is asked, which may not
/// answer (statx(2), AT_STATX_DONT_SYNC).
pub fn known_identity(file: impl AsFd) -> Result<FileIdentity, Errno> {
    match known(file.as_fd().as_raw_fd(), c"", libc::AT_EMPTY_PATH) {
        Ok((identity, _)) => Ok(identity),
        // A security policy may not know the call.
        Err(Errno::ENOSYS | Errno::EPERM) => identity(file),
        Err(reason) => Err(reason),
    }
}

/// What kind of file a descriptor is of (inode(7), `S_IFMT`), as far as is known here.
pub fn known_kind(file: impl AsFd) -> Result<libc::mode_t, Errno> {
    let number = file.as_fd().as_raw_fd();
    match known_status(number, c"", libc::AT_EMPTY_PATH) {
        Ok(found) => Ok(libc::mode_t::from(found.stx_mode) & libc::S_IFMT),
        Err(Errno::ENOSYS | Errno::EPERM) => Ok(stat::fstat(file)?.st_mode & libc::S_IFMT),
        Err(reason) => Err(reason),
    }
}

/// Whether a descriptor is of a block device: asked without fstat(2), which may have failed.
pub fn is_block_device(file: &impl AsRawFd) -> bool {
    /// BLKGETSIZE64 of linux/fs.h: other files do not know it.
    const SIZE_OF_BLOCK_DEVICE: u32 = 0x8008_1272;
    let mut bytes = 0u64;
    // SAFETY: the call stores a 64 bit integer at the address, which is that of a living one.
    unsafe { libc::ioctl(file.as_raw_fd(), SIZE_OF_BLOCK_DEVICE as _, &raw mut bytes) == 0 }
}

/// What a path leads to now.
pub fn look_up(start: Start<'_>, path: &[u8]) -> Result<FileInformation, Errno> {
    match start {
        Start::Anywhere => Ok(information(stat::stat(path)?)),
        Start::Beneath(_) => Ok(information(stat::fstat(handle(start, path)?)?)),
    }
}

/// Has whoever keeps the names of a file system asked what this one leads to now: the kernel may remember what it
/// saw before, which another host has changed since. What is looked up next is as it was after this call began.
///
/// No call has just this meaning. (That the directory's attributes are asked for, statx(2) with
/// AT_STATX_FORCE_SYNC, is not enough: FUSE remembers names for a time, and on NFS two changes of a directory
/// may have one time.) But where a name is to be made that must not be there the kernel believes nothing that it
/// remembers (LOOKUP_EXCL). So here a link is asked for that can never be made, to a directory of another file
/// system: that is found out only behind the question whether its name is free.
pub fn ask_anew(start: Start<'_>, path: &[u8]) -> Result<(), Errno> {
    let result = match start {
        Start::Anywhere => link_nothing(fcntl::AT_FDCWD, path),
        Start::Beneath(directory) => match split(path) {
            None => link_nothing(directory, path),
            Some((parent, name)) => link_nothing(&open_directory_beneath(directory, parent)?, name),
        },
    };
    match result {
        // There is something of this name, or nothing; where nothing can be made the kernel says that instead.
        Ok(()) | Err(Errno::EEXIST | Errno::EXDEV | Errno::EROFS) => Ok(()),
        Err(reason) => Err(reason),
    }
}

fn link_nothing(directory: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    let flags = fcntl::AtFlags::empty();
    Ok(unistd::linkat(
        fcntl::AT_FDCWD,
        c"/proc",
        directory,
        name,
        flags,
    )?)
}

/// Whether nobody but this kernel changes the file system that an open file is on, so that what it remembers of a
/// name is so. False if that is not known.
///
/// A file system on a block device has the device's number; where hosts share one, their kernels agree on names
/// before they change them. This costs nothing then.
pub fn has_names_for_itself(file: impl AsFd, identity: FileIdentity) -> bool {
    let is_on_device = identity.inode != 0 && libc::major(identity.device) != 0;
    is_on_device
        || statfs::fstatfs(file).is_ok_and(|found| {
            const ZFS: FsType = FsType(0x2fc1_2fc1);
            const RAMFS: FsType = FsType(0x8584_58f6);
            let local = [statfs::TMPFS_MAGIC, statfs::BTRFS_SUPER_MAGIC, ZFS, RAMFS];
            local.contains(&found.filesystem_type())
        })
}

/// What is known here of the file that a path leads to: a server of a network file system is not asked, so
/// this does not wait for one. Identity, and whether it is a regular file or a block device.
pub fn known_here(path: &CStr) -> Result<(FileIdentity, bool), Errno> {
    known(libc::AT_FDCWD, path, 0)
}

fn known_status(start: RawFd, path: &CStr, flags: i32) -> Result<libc::statx, Errno> {
    let mut found = std::mem::MaybeUninit::<libc::statx>::uninit();
    let flags = flags | libc::AT_STATX_DONT_SYNC;
    let wanted = libc::STATX_TYPE | libc::STATX_INO;
    // SAFETY: the path is a text with a zero byte, and the pointer to room for what the call fills in.
    let result = unsafe { libc::statx(start, path.as_ptr(), flags, wanted, found.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: the call succeeded, so it has filled it in.
    Ok(unsafe { found.assume_init() })
}

fn known(start: RawFd, path: &CStr, flags: i32) -> Result<(FileIdentity, bool), Errno> {
    let found = known_status(start, path, flags)?;
    let kind = libc::mode_t::from(found.stx_mode) & libc::S_IFMT;
    let identity = if kind == libc::S_IFBLK {
        FileIdentity {
            device: libc::makedev(found.stx_rdev_major, found.stx_rdev_minor),
            inode: 0,
        }
    } else {
        FileIdentity {
            device: libc::makedev(found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
        }
    };
    Ok((identity, matches!(kind, libc::S_IFREG | libc::S_IFBLK)))
}

/// The directory of a path, if it has one, and the name in it.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = path.iter().rposition(|byte| *byte == b'/')?;
    let (parent, name) = path.split_at_checked(at)?;
    Some((parent, name.strip_prefix(b"/").unwrap_or(name)))
}

/// Removes a name. Of a symbolic link, the link.
pub fn unlink(start: Start<'_>, path: &[u8]) -> Result<(), Errno> {
    match start {
        Start::Anywhere => Ok(unistd::unlink(path)?),
        Start::Beneath(directory) => {
            let Some((parent, name)) = split(path) else {
                return Ok(unistd::unlinkat(
                    directory,
                    path,
                    UnlinkatFlags::NoRemoveDir,
                )?);
            };
            let parent = open_directory_beneath(directory, parent)?;
            Ok(unistd::unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?)
        }
    }
}

/// Whose lock stands in the way of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Nobody's.
    None,
    /// A POSIX record lock of this process.
    Process(i32),
    /// An open-file-description lock, or one that a server keeps: the kernel does not say whose.
    OpenFile,
    /// One of a process that has no number here: on another host, or in another namespace.
    Elsewhere,
}

/// Kinds of lock on byte 0 of a file (fcntl(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockType {
    /// Several may hold it.
    Read,
    /// One may hold it.
    Write,
    /// None.
    Unlock,
}

/// Byte 0, one byte: where the reference daemon puts its locks.
fn region(kind: LockType) -> libc::flock {
    let kind = match kind {
        LockType::Read => libc::F_RDLCK,
        LockType::Write => libc::F_WRLCK,
        LockType::Unlock => libc::F_UNLCK,
    };
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 1,
        // The kernel wants 0 here for open-file-description locks.
        l_pid: 0,
    }
}

/// An open file that is locked, or may be. It is unlocked before it is closed, wherever that happens:
/// a FUSE server may take a closed file for a locked one for ever, and a copy of the descriptor
/// elsewhere keeps the lock. (Whoever is killed cannot unlock: then the kernel only closes.)
#[derive(Debug)]
pub struct Lockable {
    descriptor: OwnedFd,
    /// Whether there may be an open-file-description lock on it.
    open_file: bool,
    /// Whether there may be a POSIX lock of this process on it, to be given up with it.
    process: bool,
}

impl From<OwnedFd> for Lockable {
    /// A file that nobody has tried to lock through this descriptor.
    fn from(descriptor: OwnedFd) -> Lockable {
        Lockable {
            descriptor,
            open_file: false,
            process: false,
        }
    }
}

impl Lockable {
    /// A file that an earlier image of this process locked, in one way or the other.
    pub fn inherited(descriptor: OwnedFd) -> Lockable {
        Lockable {
            descriptor,
            open_file: true,
            process: true,
        }
    }

    /// A file whose open-file-description lock another process set on a copy of this descriptor.
    pub fn locked_elsewhere(descriptor: OwnedFd) -> Lockable {
        Lockable {
            descriptor,
            open_file: true,
            process: false,
        }
    }

    /// The descriptor alone: whoever has a copy of it sees to its lock.
    pub fn into_descriptor(self) -> OwnedFd {
        let whole = ManuallyDrop::new(self);
        // SAFETY: it is read once, and what it was read from is never used or dropped.
        unsafe { std::ptr::read(&raw const whole.descriptor) }
    }

    /// Sets the open file's lock, or changes it. EAGAIN when somebody else's stands in the way.
    #[inline]
    pub fn lock(&mut self, kind: LockType) -> Result<(), Errno> {
        let result = set_open_file(&self.descriptor, kind);
        self.open_file = is_owed(self.open_file, kind, result);
        result
    }

    /// Sets this process's POSIX lock on the file, or changes it.
    pub fn lock_process(&mut self, kind: LockType) -> Result<(), Errno> {
        let result = set_process(&self.descriptor, kind);
        self.process = is_owed(self.process, kind, result);
        result
    }

    /// The POSIX lock, if there is one, is not to be given up with this descriptor: there is none, or
    /// it is another name's.
    pub fn leave_process_lock(&mut self) {
        self.process = false;
    }

    /// Lets go of every lock that there may be. What fails is tried once more when this is dropped.
    #[inline]
    pub fn unlock(&mut self) -> Result<(), Errno> {
        let process = if self.process {
            self.lock_process(LockType::Unlock)
        } else {
            Ok(())
        };
        if self.open_file {
            self.lock(LockType::Unlock)?;
        }
        process
    }
}

impl Drop for Lockable {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; closing unlocks nearly everywhere.
        let _ = self.unlock();
    }
}

impl AsFd for Lockable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl AsRawFd for Lockable {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

/// Whether there may be a lock after this attempt. What was refused was not granted; after any other
/// failure a server may have granted it all the same, or yet may.
fn is_owed(was: bool, kind: LockType, result: Result<(), Errno>) -> bool {
    match (kind, result) {
        (LockType::Unlock, Ok(())) => false,
        (LockType::Unlock, Err(_)) | (_, Err(Errno::EAGAIN | Errno::EACCES)) => was,
        (LockType::Read | LockType::Write, _) => true,
    }
}

fn set_open_file(file: &OwnedFd, kind: LockType) -> Result<(), Errno> {
    fcntl::fcntl(file, FcntlArg::F_OFD_SETLK(&region(kind)))?;
    Ok(())
}

fn set_process(file: &OwnedFd, kind: LockType) -> Result<(), Errno> {
    fcntl::fcntl(file, FcntlArg::F_SETLK(&region(kind)))?;
    Ok(())
}

/// Who would stand in the way of this open file's lock.
pub fn conflict(file: impl AsFd, kind: LockType) -> Result<Conflict, Errno> {
    let mut found = region(kind);
    fcntl::fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(conflict_of(&found))
}

/// Who would stand in the way of a POSIX lock of this process. The kernel says here whose lock it is
/// also where F_OFD_GETLK says -1 of every lock: on FUSE and NFS (locks_translate_pid in fs/locks.c).
pub fn holder(file: impl AsFd, kind: LockType) -> Result<Conflict, Errno> {
    let mut found = region(kind);
    fcntl::fcntl(file, FcntlArg::F_GETLK(&mut found))?;
    Ok(conflict_of(&found))
}

fn conflict_of(found: &libc::flock) -> Conflict {
    if found.l_type == libc::F_UNLCK as i16 {
        return Conflict::None;
    }
    match found.l_pid {
        -1 => Conflict::OpenFile,
        pid if pid > 0 => Conflict::Process(pid),
        // NFS gives the number of a process on another host with a minus.
        _ => Conflict::Elsewhere,
    }
}

/// Reads what a pipe holds now; 0 if it is empty or broken.
pub fn read_now(number: i32, buffer: &mut [u8]) -> usize {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD stores an int at the address, which is that of a living one.
    if unsafe { libc::ioctl(number, libc::FIONREAD, &raw mut waiting) } != 0 || waiting <= 0 {
        return 0;
    }
    // SAFETY: the buffer is as long as stated; there are bytes, so the call does not wait.
    let count = unsafe { libc::read(number, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    /// A directory of this test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path =
                std::env::temp_dir().join(format!("virtlockd-{}-{name}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn bytes(path: &Path) -> &[u8] {
        path.as_os_str().as_bytes()
    }

    #[test]
    fn nothing_above_a_directory_is_reached_from_below_it() {
        let scratch = Scratch::new("beneath");
        let below = scratch.0.join("below");
        std::fs::create_dir(&below).unwrap();
        std::fs::write(scratch.0.join("disk"), "precious").unwrap();
        std::os::unix::fs::symlink("../disk", below.join("link")).unwrap();
        std::os::unix::fs::symlink("..", below.join("up")).unwrap();
        let directory = open_directory(bytes(&below)).unwrap();
        let start = Start::Beneath(directory.as_fd());
        for path in [&b"../disk"[..], b"link", b"up/disk"] {
            assert_eq!(open_existing(start, path).err(), Some(Errno::EXDEV));
            assert_eq!(open_or_create(start, path).err(), Some(Errno::EXDEV));
            assert_eq!(look_up(start, path).err(), Some(Errno::EXDEV));
        }
        assert_eq!(unlink(start, b"up/disk"), Err(Errno::EXDEV));
        unlink(start, b"link").unwrap();
        assert!(scratch.0.join("disk").exists());
        let made = open_or_create(start, b"made").unwrap();
        assert_eq!(
            look_up(start, b"made").unwrap().identity,
            identity(&made).unwrap()
        );
    }

    #[test]
    fn without_the_kernels_word_nothing_above_a_directory_is_reached_from_below_it_either() {
        let scratch = Scratch::new("steps");
        let below = scratch.0.join("below");
        std::fs::create_dir_all(below.join("deep")).unwrap();
        std::fs::write(scratch.0.join("disk"), "precious").unwrap();
        std::fs::write(below.join("deep/lease"), "").unwrap();
        std::os::unix::fs::symlink("../disk", below.join("link")).unwrap();
        std::os::unix::fs::symlink("..", below.join("up")).unwrap();
        let directory = open_directory(bytes(&below)).unwrap();
        let step = |path: &[u8], flags| {
            let flags = flags | OFlag::O_CLOEXEC;
            open_step_by_step(directory.as_fd(), path, flags, MODE).map(|file| identity(&file))
        };
        for path in [&b"../disk"[..], b"deep/../../disk", b"..", b"/disk"] {
            assert_eq!(step(path, OFlag::O_RDWR).err(), Some(Errno::EXDEV));
            assert_eq!(step(path, OFlag::O_PATH).err(), Some(Errno::EXDEV));
        }
        for flags in [OFlag::O_RDWR, OFlag::O_PATH, OFlag::O_RDWR | OFlag::O_CREAT] {
            assert_eq!(step(b"link", flags).err(), Some(Errno::ELOOP));
            assert_eq!(step(b"up/disk", flags).err(), Some(Errno::ENOTDIR));
        }
        let (by_steps, at_once) = (
            step(b"./deep//lease", OFlag::O_RDWR),
            below.join("deep/lease"),
        );
        let at_once = identity(open_existing(Start::Anywhere, bytes(&at_once)).unwrap());
        assert_eq!(by_steps.unwrap(), at_once);
        step(b"deep/made", OFlag::O_RDWR | OFlag::O_CREAT)
            .unwrap()
            .unwrap();
        assert!(below.join("deep/made").exists());
        assert_eq!(
            step(b"made/", OFlag::O_RDWR | OFlag::O_CREAT).err(),
            Some(Errno::EISDIR)
        );
        assert_eq!(step(b"", OFlag::O_RDWR).err(), Some(Errno::ENOENT));
    }

    #[test]
    fn an_open_files_lock_survives_the_closing_of_another_descriptor_and_excludes_it() {
        let scratch = Scratch::new("lock");
        let path = scratch.0.join("disk");
        std::fs::write(&path, "").unwrap();
        let open = || Lockable::from(open_existing(Start::Anywhere, bytes(&path)).unwrap());
        let mut first = open();
        first.lock(LockType::Write).unwrap();
        for _ in 0..2 {
            let mut second = open();
            assert_eq!(second.lock(LockType::Read), Err(Errno::EAGAIN));
            assert_eq!(conflict(&second, LockType::Read), Ok(Conflict::OpenFile));
        }
        first.unlock().unwrap();
        let mut second = open();
        assert_eq!(conflict(&second, LockType::Write), Ok(Conflict::None));
        second.lock_process(LockType::Write).unwrap();
        let own_pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(
            conflict(&first, LockType::Write),
            Ok(Conflict::Process(own_pid))
        );
    }

    // Where a copy of the descriptor is left, closing alone does not unlock.
    #[test]
    fn a_file_that_was_or_may_have_been_locked_is_unlocked_before_it_is_closed() {
        let scratch = Scratch::new("guard");
        let path = scratch.0.join("disk");
        std::fs::write(&path, "").unwrap();
        let open = || open_existing(Start::Anywhere, bytes(&path)).unwrap();
        let descriptor = open();
        let copy = descriptor.try_clone().unwrap();
        let outside = open();
        let mut locked = Lockable::from(descriptor);
        locked.lock(LockType::Write).unwrap();
        assert_eq!(conflict(&outside, LockType::Read), Ok(Conflict::OpenFile));
        drop(locked);
        assert_eq!(conflict(&outside, LockType::Read), Ok(Conflict::None));

        for (was, kind, result, owed) in [
            (false, LockType::Write, Ok(()), true),
            (false, LockType::Write, Err(Errno::EAGAIN), false),
            (true, LockType::Write, Err(Errno::EAGAIN), true),
            (false, LockType::Read, Err(Errno::EINTR), true),
            (false, LockType::Write, Err(Errno::ETIMEDOUT), true),
            (true, LockType::Unlock, Err(Errno::EIO), true),
            (true, LockType::Unlock, Ok(()), false),
        ] {
            assert_eq!(is_owed(was, kind, result), owed, "{kind:?} {result:?}");
        }
        drop(copy);
    }

    #[test]
    fn what_is_shown_for_reading_can_be_neither_written_nor_cut() {
        let memory =
            nix::sys::memfd::memfd_create(c"shown", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .unwrap();
        unistd::write(&memory, b"state").unwrap();
        let shown = read_only(&memory).unwrap();
        assert_eq!(unistd::write(&shown, b"x"), Err(nix::Error::EBADF));
        assert_eq!(unistd::ftruncate(&shown, 0), Err(nix::Error::EINVAL));
        let mut content = [0; 8];
        assert_eq!(unistd::read(&shown, &mut content), Ok(5));
    }

    #[test]
    fn all_nodes_of_a_block_device_are_the_same_disk() {
        let stat = |kind: SFlag, number, inode| {
            // SAFETY: zeros are a valid stat structure, which has nothing but numbers.
            let mut stat: FileStat = unsafe { std::mem::zeroed() };
            (stat.st_mode, stat.st_dev) = (kind.bits(), 5);
            (stat.st_rdev, stat.st_ino) = (number, inode);
            FileIdentity::from(stat)
        };
        let first = stat(SFlag::S_IFBLK, 7, 100);
        assert_eq!(stat(SFlag::S_IFBLK, 7, 101), first);
        assert_ne!(stat(SFlag::S_IFBLK, 8, 100), first);
        // Files of a file system on that device have its number, too.
        assert_ne!(stat(SFlag::S_IFREG, 0, 100), stat(SFlag::S_IFREG, 0, 101));
        assert_ne!(stat(SFlag::S_IFCHR, 7, 100), stat(SFlag::S_IFCHR, 7, 101));
    }

    #[test]
    fn opening_a_fifo_does_not_wait_for_its_other_end() {
        let scratch = Scratch::new("fifo");
        let path = scratch.0.join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        open_existing(Start::Anywhere, bytes(&path)).unwrap();
        open_or_create(Start::Anywhere, bytes(&path)).unwrap();
    }
}
