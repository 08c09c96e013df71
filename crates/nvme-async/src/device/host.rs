//! What transports need of the kernel: eventfds, and mappings of a device's registers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// A nonblocking eventfd, closed on exec.
pub(super) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an eventfd readable.
#[cfg(any(feature = "soft", feature = "vfio-user"))]
pub(super) fn signal(eventfd: impl AsFd) {
    // The only error that an open eventfd can have here is that its counter is at its maximum, when
    // it is readable anyway.
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}

/// The size of the host's pages in bytes.
pub(super) fn page_size() -> u64 {
    // SAFETY: the call takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(0x1000)
}

/// A shared, readable and writable mapping of a part of a file; unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes from `offset`, which is a multiple of the page size.
    pub(super) fn new(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice, touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast())
            .ok_or_else(|| io::Error::other("the kernel mapped at address 0"))?;
        Ok(Self { base, len })
    }

    /// Puts private memory into the place of the file's, in one step: whoever still writes there
    /// does no harm, and the file is not held open by this any more.
    pub(super) fn detach(&self) -> io::Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: what is replaced is this mapping and nothing else: it is ours alone, and unmapped
        // only by `drop`. Nothing in it is a Rust object: those who were given its address make
        // single accesses to what may change at any time, and they may do so before and after.
        let base = unsafe {
            libc::mmap(
                self.base.as_ptr().cast(),
                self.len,
                protection,
                // Without it a host that is strict about memory might refuse when it is too late
                // to leave the old one.
                flags | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The first byte.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours alone, and whoever was given its address holds it alive.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

// SAFETY: a mapping belongs to the process, not to a thread; the address is only given out.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_mapping_shows_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        let page = page_size();
        file.set_len(2 * page).unwrap();
        file.write_all(b"first").unwrap();
        let mapping = Mapping::new(file.as_fd(), 0, page as usize).unwrap();
        // SAFETY: the mapping is at least one page long and lives.
        assert_eq!(unsafe { mapping.base().read_volatile() }, b'f');
        assert!(Mapping::new(file.as_fd(), 1, page as usize).is_err());
    }
}
