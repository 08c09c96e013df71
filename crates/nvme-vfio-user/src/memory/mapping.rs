//! Memory that is shared with another process: the only unsafe code of this crate.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping of a part of a file, unmapped on drop.
///
/// # Invariant
///
/// `len` bytes from `base` are mapped for as long as this value lives, for reads if `readable` and for writes
/// if `writable`. Nothing in this process refers to them but this value, which copies from and to them and
/// uses atomics. The other process accesses them at the same time, as one accesses what a device may touch.
///
/// That the file does not become shorter, which would make accesses raise SIGBUS, is for whoever makes this
/// value to see to: it is the end of the process, but no undefined behaviour.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    readable: bool,
    writable: bool,
}

// SAFETY: a mapping belongs to the process, not to a thread, and accesses are as unsynchronized as those of
// another process by nature.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        readable: bool,
        writable: bool,
    ) -> io::Result<Self> {
        let mut protection = ProtFlags::empty();
        protection.set(ProtFlags::READ, readable);
        protection.set(ProtFlags::WRITE, writable);
        // SAFETY: a new mapping at an address that the kernel chooses affects no other memory.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self {
            base,
            len,
            readable,
            writable,
        })
    }

    /// Copies out of the memory; returns whether it is readable there.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, out.len()).filter(|_| self.readable) else {
            return false;
        };
        // SAFETY: `at` checked the bounds and the range is readable; `out` is an exclusive buffer, which
        // cannot overlap the mapping, to which there are no references.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        true
    }

    /// Copies into the memory; returns whether it is writable there.
    pub(crate) fn write(&self, offset: usize, data: &[u8]) -> bool {
        let Some(to) = self.at(offset, data.len()).filter(|_| self.writable) else {
            return false;
        };
        // SAFETY: `at` checked the bounds and the range is writable; `data` is a buffer, which cannot overlap
        // the mapping, to which there are no references.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to.as_ptr(), data.len()) };
        true
    }

    /// Stores an aligned little-endian word after all that was written before; returns whether it is
    /// writable there.
    pub(crate) fn store_release(&self, offset: usize, value: u32) -> bool {
        let word = self.word(offset).filter(|_| self.writable);
        if let Some(word) = word {
            word.store(value.to_le(), Ordering::Release);
        }
        word.is_some()
    }

    /// Loads an aligned little-endian word before all that is read after it; `None` if it is not readable
    /// there.
    pub(crate) fn load_acquire(&self, offset: usize) -> Option<u32> {
        let word = self.word(offset).filter(|_| self.readable)?;
        // The memory may be mapped for reading only, which allows a relaxed load alone.
        let value = word.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Some(u32::from_le(value))
    }

    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        let word = self.at(offset, size_of::<u32>())?.cast::<u32>();
        if !word.is_aligned() {
            return None;
        }
        // SAFETY: `at` checked the bounds, the alignment is checked, and the word is mapped while `self` lives.
        Some(unsafe { AtomicU32::from_ptr(word.as_ptr()) })
    }

    fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= self.len, checked above, so the result is inside of the mapping or one past its
        // end.
        Some(unsafe { self.base.add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; nothing but `self` refers to it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "memory stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn file() -> File {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(8192).expect("sized");
        file
    }

    #[test]
    fn it_is_the_file_and_has_bounds() {
        let file = file();
        let mapping = Mapping::new(file.as_fd(), 4096, 4096, true, true).expect("mapped");
        assert!(mapping.write(4, &[1, 2, 3, 4]));
        assert!(mapping.store_release(8, 0x0403_0201));
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 4096 + 4).expect("read");
        assert_eq!(bytes, [1, 2, 3, 4, 1, 2, 3, 4]);
        assert_eq!(mapping.load_acquire(8), Some(0x0403_0201));
        assert!(mapping.read(4088, &mut bytes));
        assert_eq!(bytes, [0; 8]);
        for offset in [4089, 4096, 4097, usize::MAX] {
            assert!(!mapping.read(offset, &mut bytes), "{offset}");
            assert!(!mapping.write(offset, &bytes), "{offset}");
            assert!(!mapping.store_release(offset, 0), "{offset}");
            assert_eq!(mapping.load_acquire(offset), None, "{offset}");
        }
        // Not aligned.
        assert_eq!(mapping.load_acquire(6), None);
    }

    #[test]
    fn what_is_not_writable_is_not_written() {
        let file = file();
        let mapping = Mapping::new(file.as_fd(), 0, 4096, true, false).expect("mapped");
        assert!(!mapping.write(0, &[1]) && !mapping.store_release(0, 1));
        assert_eq!(mapping.load_acquire(0), Some(0));
        let mapping = Mapping::new(file.as_fd(), 0, 4096, false, true).expect("mapped");
        assert!(!mapping.read(0, &mut [0]) && mapping.load_acquire(0).is_none());
        assert!(mapping.write(0, &[1]));
    }
}
