//! The allocator's memory. It keeps what was freed for the next time, wherever something small that
//! was allocated later lies behind it: a moment with many large messages would be paid for ever.

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
