//! What a process may do beyond others, given up where it is not needed (capabilities(7)).

use super::errno::Errno;

/// Files may be opened, made and removed whoever has them, and looked for by their handles: CAP_DAC_OVERRIDE,
/// CAP_DAC_READ_SEARCH, CAP_FOWNER of linux/capability.h.
const OF_FILES: [u32; 2] = [1 << 1 | 1 << 2 | 1 << 3, 0];

/// The version of the structures that have two words (_LINUX_CAPABILITY_VERSION_3).
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Word {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// From now on this process has no more than what work on files takes, of what it has, and no program that it
/// would execute gets more.
///
/// # Errors
/// What the host refuses: then it has what it had.
pub fn keep_those_of_files() -> Result<(), Errno> {
    nix::sys::prctl::set_no_new_privs()?;
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut words = [Word::default(); 2];
    // SAFETY: the kernel fills in the two words that this version has, and the header is one of ours.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) };
    Errno::result(result)?;
    for (word, kept) in words.iter_mut().zip(OF_FILES) {
        word.effective &= kept;
        word.permitted &= kept;
        word.inheritable = 0;
    }
    // SAFETY: as above, and it only reads them.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) };
    Errno::result(result).map(drop)
}
