//! Randomness of the standard library, and of what builds on it, comes from the seed within a world.
//!
//! The order of tokio's `select!` branches and of hash maps would else differ from run to run.

use std::ffi::c_void;

/// libc's `getrandom(2)`: the linker takes this one for the whole program.
///
/// # Safety
/// As libc's: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: u32) -> isize {
    if !machine::is_simulated() {
        // SAFETY: the caller's promise is the system call's; results that do not fit do not occur.
        let got = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return isize::try_from(got).unwrap_or(-1);
    }
    for at in 0..length {
        let [byte, ..] = machine::random_u64().to_le_bytes();
        // SAFETY: `at < length`, which the caller has room for.
        unsafe { buffer.cast::<u8>().add(at).write(byte) };
    }
    isize::try_from(length).unwrap_or(isize::MAX)
}
