//! Interrupt vectors and notices as eventfds.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nvme_soft::Interrupts;

/// One nonblocking eventfd for each vector.
pub(super) struct Vectors(Vec<Arc<OwnedFd>>);

impl Vectors {
    pub(super) fn new(count: u16) -> io::Result<Self> {
        (0..count)
            .map(|_| eventfd().map(Arc::new))
            .collect::<io::Result<_>>()
            .map(Self)
    }

    pub(super) fn descriptors(&self) -> &[Arc<OwnedFd>] {
        &self.0
    }
}

impl Interrupts for Vectors {
    fn count(&self) -> u16 {
        // At most as many as `new` was asked for.
        self.0.len() as u16
    }

    fn raise(&self, vector: u16) {
        let Some(descriptor) = self.0.get(usize::from(vector)) else {
            return;
        };
        signal(descriptor);
    }
}

/// Makes an eventfd readable.
pub(super) fn signal(eventfd: &OwnedFd) {
    let one = 1_u64.to_ne_bytes();
    // The only error that an open eventfd can have here is that its counter is at its maximum, when
    // it is readable anyway.
    //
    // SAFETY: `one` is readable for its length during the call.
    unsafe { libc::write(eventfd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// A nonblocking eventfd.
pub(super) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
