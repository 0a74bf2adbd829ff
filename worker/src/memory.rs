//! What the process does with memory that it frees.

/// Keeps freed memory for the next allocation, up to 256 MiB at the end of each arena, instead of giving it back at once.
///
/// Each layer of a step, and each message of rows, takes and frees buffers of some 100 KiB to some MiB. By default glibc
/// gives such back to the system, which clears the pages again for the next one: prompts took a quarter longer. What is larger
/// than 32 MiB, as the weights of a large expert are, still goes back. Elsewhere than in glibc this does nothing.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[expect(unsafe_code, reason = "libc offers the allocator's settings in no other way")]
    // SAFETY: `mallopt` takes two integers, and locks what it changes.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
    }
}
