//! The allocator's memory. It keeps what was freed for the next time, wherever something small that
//! was allocated later lies behind it: a moment with many large messages would be paid for ever.

/// Makes the allocator keep what is used again and again. To be called once.
///
/// Does nothing with C libraries whose allocator has no such settings.
pub fn settle() {
    #[cfg(target_env = "gnu")]
    {
        /// What is larger than this has pages of its own, bytes: more than the longest frame of the lock
        /// program, because to have pages mapped and cleared takes longer than all that is done with them.
        const OWN_PAGES: i32 = 144 * 1024;
        /// So much free memory is kept for the next one until [`give_back`] is called, bytes.
        const KEPT: i32 = 64 * 1024 * 1024;
        for (setting, value) in [
            (libc::M_MMAP_THRESHOLD, OWN_PAGES),
            (libc::M_TRIM_THRESHOLD, KEPT),
        ] {
            // SAFETY: mallopt(3) takes two numbers; one that it does not like it ignores.
            unsafe {
                libc::mallopt(setting, value);
            }
        }
    }
}

/// Gives whole free pages back to the kernel. Takes as long as there are many; microseconds usually.
///
/// Does nothing with C libraries whose allocator has no such call.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes a number and has no precondition.
    unsafe {
        libc::malloc_trim(0);
    }
}
