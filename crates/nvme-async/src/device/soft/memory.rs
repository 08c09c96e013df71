//! The memory behind one mapping.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use iova::MapError;

/// Memory that the controller may access.
///
/// # Invariant
///
/// `len` bytes from `base` are valid for reads if the mapping is readable and for writes if it is
/// writable, for as long as this value lives: for memory of the host the caller of
/// `DmaMapper::map` keeps it so until `unmap`, which drops this value, has returned; a mapping of
/// our own lives in `own`. Others access the memory at the same time only as one accesses what a
/// device may touch.
pub(super) struct Memory {
    base: NonNull<u8>,
    len: usize,
    _own: Option<OwnMapping>,
}

// SAFETY: `base` is a plain address whose validity does not depend on the thread (see the
// invariant), and accesses are as unsynchronized as a device's by nature.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory of the host, through the host's own address.
    ///
    /// # Safety
    ///
    /// The invariant of this type holds until the value is dropped.
    pub(super) unsafe fn of_host(base: NonNull<u8>, len: usize) -> Self {
        Self {
            base,
            len,
            _own: None,
        }
    }

    /// The same memory through a mapping of our own of its file, which knows nothing of the
    /// host's address.
    pub(super) fn of_file(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        readable: bool,
        writable: bool,
    ) -> Result<Self, MapError> {
        let own = OwnMapping::new(file, offset, len, readable, writable)?;
        Ok(Self {
            base: own.base,
            len,
            _own: Some(own),
        })
    }

    /// Copies out of readable memory. Nothing is copied if the range is not inside of it.
    pub(super) fn read(&self, offset: usize, out: &mut [u8]) {
        if let Some(from) = self.at(offset, out.len()) {
            // SAFETY: `at` checked the bounds; by the invariant the range is readable, and `out`
            // is an exclusive buffer of the controller's that cannot overlap mapped memory.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) }
        }
    }

    /// Copies into writable memory. Nothing is copied if the range is not inside of it.
    pub(super) fn write(&self, offset: usize, data: &[u8]) {
        if let Some(to) = self.at(offset, data.len()) {
            // SAFETY: `at` checked the bounds; by the invariant the range is writable, and `data`
            // is a buffer of the controller's that cannot overlap mapped memory.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to.as_ptr(), data.len()) }
        }
    }

    /// Stores an aligned little-endian word after all that was written before. Nothing is stored
    /// if it is not inside of the memory, or not aligned.
    pub(super) fn store_release(&self, offset: usize, value: u32) {
        let Some(to) = self.at(offset, size_of::<u32>()) else {
            return;
        };
        let to = to.cast::<u32>();
        if to.is_aligned() {
            // SAFETY: `at` checked the bounds, the alignment is checked, and by the invariant the
            // word is writable while `self` lives. The host loads it atomically.
            let word = unsafe { AtomicU32::from_ptr(to.as_ptr()) };
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Loads an aligned little-endian word before all that is read after it; 0 if it is not inside of
    /// the memory, or not aligned.
    pub(super) fn load_acquire(&self, offset: usize) -> u32 {
        match self.at(offset, size_of::<u32>()) {
            Some(from) if from.cast::<u32>().is_aligned() => {
                // SAFETY: `at` checked the bounds, the alignment is checked, and by the invariant the
                // word is readable while `self` lives. The host stores it atomically.
                let word = unsafe { AtomicU32::from_ptr(from.cast().as_ptr()) };
                // The memory may be mapped for reading only, which allows a relaxed load alone.
                let value = word.load(Ordering::Relaxed);
                fence(Ordering::Acquire);
                u32::from_le(value)
            }
            _ => 0,
        }
    }

    fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= self.len, checked above, so the result is inside of the memory or one
        // past its end.
        Some(unsafe { self.base.add(offset) })
    }
}

/// A shared mapping of a file, unmapped on drop.
struct OwnMapping {
    base: NonNull<u8>,
    len: usize,
}

impl OwnMapping {
    fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        readable: bool,
        writable: bool,
    ) -> Result<Self, MapError> {
        // Past the end of the file an access would be a SIGBUS. That it does not shrink later is
        // the host's promise: the memory is mapped there too.
        let size = File::from(file.try_clone_to_owned()?).metadata()?.len();
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(MapError::Invalid {
                reason: format!("{len:#x} bytes at {offset:#x} reach past the end of the file"),
            });
        }
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let protection = if readable { libc::PROT_READ } else { 0 }
            | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address that the kernel chooses affects no other memory.
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
            return Err(io::Error::last_os_error().into());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { base, len })
    }
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; whoever had its address has dropped it with us.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_loaded_where_they_are_stored() {
        let words = [const { AtomicU32::new(0) }; 2];
        let base = NonNull::from(&words).cast();
        // SAFETY: the words outlive the memory, and are only accessed as atomics.
        let memory = unsafe { Memory::of_host(base, size_of_val(&words)) };
        memory.store_release(4, 0x0102_0304);
        assert_eq!(words[1].load(Ordering::Acquire), 0x0102_0304_u32.to_le());
        assert_eq!(memory.load_acquire(4), 0x0102_0304);
        assert_eq!(memory.load_acquire(0), 0);
        // Not aligned, and outside.
        assert_eq!((memory.load_acquire(2), memory.load_acquire(8)), (0, 0));
    }
}
