//! Memory of the front end's, mapped. All unsafe code of this module but the registration of an eventfd is here.
#![expect(
    unsafe_code,
    reason = "memory that another process shares is mapped, and lent to the controller"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};

use nvme_async::Registered;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use tokio::sync::oneshot;
use vm_memory::VolatileSlice;

/// A part of a file, mapped shared for reads and writes, until it is dropped.
///
/// # Invariant
///
/// `len` bytes from `base` on are mapped for as long as this value lives, and are the bytes of `file` from
/// `offset` on. They lie in the `whole` bytes from `start` on that `new` has mapped. Nothing in this process
/// refers to them but through this value: by volatile and atomic accesses (`slice`), and by the controller
/// (`Registered`). The front end and its guest access them at any time, as another device would.
///
/// That the file does not become shorter, which would make accesses raise SIGBUS, is for whoever makes this
/// value to see to: it is the end of the process, but no undefined behaviour.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    start: NonNull<u8>,
    whole: usize,
    file: File,
    offset: u64,
    /// Dropped when nothing is mapped any more: see [`Mapping::new`].
    _gone: oneshot::Sender<()>,
}

// SAFETY: a mapping belongs to the process, not to a thread, and accesses are as unsynchronized as those of
// another process by nature.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, with what is before them in a page of the file, which is
    /// `page` bytes large (a power of two).
    ///
    /// What is returned with it resolves, with an error, when the mapping is gone: nobody uses it any more, the
    /// controller included.
    pub(super) fn new(
        file: File,
        offset: u64,
        len: usize,
        page: u64,
    ) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let lead = offset % page;
        let whole = usize::try_from(lead)
            .ok()
            .and_then(|lead| lead.checked_add(len))
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address that the kernel chooses affects no other memory.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                whole,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                offset - lead,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        // SAFETY: lead <= whole, and as many bytes were mapped.
        let base = unsafe { start.add(whole - len) };
        let (sender, gone) = oneshot::channel();
        let mapping = Self {
            base,
            len,
            start,
            whole,
            file,
            offset,
            _gone: sender,
        };
        Ok((mapping, gone))
    }

    /// All of it, for volatile and atomic accesses.
    pub(super) fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `len` bytes from `base` on are mapped while `self` is borrowed, and accessed by volatile and
        // atomic operations only.
        unsafe { VolatileSlice::new(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; slices borrow `self`, and the controller holds it for as long as it
        // uses the memory.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.whole) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "memory of a front end's stays mapped");
        }
    }
}

// SAFETY: `addr` and `len` describe a mapping that stays where it is for as long as the value lives, readable and
// writable, and shared with `file` from `offset` on. This process accesses it by `slice` only, which is volatile or
// atomic. A guest that has one part of its memory used twice, or puts its queues there, gets some mixture of
// contents, as it would if it wrote there itself.
unsafe impl Registered for Mapping {
    fn addr(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.file.as_fd(), self.offset))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nvme_async::memory::SharedMemory;
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn it_is_that_part_of_the_file_until_it_is_dropped() {
        let memory = SharedMemory::new(16 << 10).expect("a little memory");
        let file = || File::from(memory.fd().try_clone_to_owned().expect("cloned"));
        // As if pages of the file were of 8 KiB.
        let (mapping, mut gone) = Mapping::new(file(), 12 << 10, 4096, 8192).expect("mapped");
        mapping
            .slice()
            .write_slice(b"words", 4092)
            .expect_err("past its end");
        mapping
            .slice()
            .write_slice(b"words", 4091)
            .expect("its end");
        let mut read = [0; 5];
        file()
            .read_exact_at(&mut read, (16 << 10) - 5)
            .expect("read");
        assert_eq!(&read, b"words");
        assert_eq!(Registered::len(&mapping), 4096);
        assert_eq!(mapping.file().map(|(_, offset)| offset), Some(12 << 10));
        assert_eq!(gone.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(mapping);
        assert_eq!(gone.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }
}
