//! What the fuzz targets share: a controller that misbehaves as its input says, a program that uses
//! it, and a clock that nobody waits for.

pub mod clock;
pub mod device;
pub mod program;
pub mod script;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// An eventfd that does not block.
fn eventfd() -> OwnedFd {
    // SAFETY: it takes no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    assert!(fd >= 0, "eventfd: {}", io::Error::last_os_error());
    // SAFETY: it was just opened, and is nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
