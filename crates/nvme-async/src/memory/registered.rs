//! Foreign memory.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::volatile;

/// Memory that somebody else manages and others may change, such as the memory of a guest.
///
/// The driver holds the value for as long as a command uses the memory. It touches the memory only
/// through the device and by volatile copies, and never makes a reference to it.
///
/// # Safety
///
/// For as long as the value lives, and wherever it is moved:
///
/// * `addr` and `len` always return the same, and describe one allocation or mapping that is valid
///   for reads and writes and stays at that address.
/// * If `file` returns something, it always does, and the memory is a shared mapping of that file
///   from that offset on, and of nothing else.
/// * While the driver uses a part of the memory, this process has no reference to that part, and
///   accesses it by volatile or atomic operations only. A part that a read is to fill is left
///   alone. Others than this process, such as a guest, may access it at any time; contents are
///   then unspecified, as they would be with a real disk.
pub unsafe trait Registered: Send + Sync + 'static {
    /// The first byte.
    fn addr(&self) -> NonNull<u8>;

    /// How many bytes there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A file that this memory is a mapping of, and the offset of the first byte in it.
    ///
    /// Controllers in other processes can use the memory only if there is one.
    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
}

// SAFETY: the value inside is the one that keeps the contract, and lives as long as its handles.
unsafe impl<T: Registered + ?Sized> Registered for Arc<T> {
    fn addr(&self) -> NonNull<u8> {
        (**self).addr()
    }

    fn len(&self) -> usize {
        (**self).len()
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        (**self).file()
    }
}

/// A range that is not inside of the [`Registered`] memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset} are not inside of {size} bytes of registered memory")]
pub(crate) struct OutOfRange {
    /// Where the range starts, in bytes.
    pub(crate) offset: usize,
    /// How long it is, in bytes.
    pub(crate) len: usize,
    /// How much memory there is, in bytes.
    pub(crate) size: usize,
}

/// Fills `dst` from the bytes of `memory` at `offset`.
///
/// For the driver alone: this is one of the uses that the contract of [`Registered`] speaks of.
///
/// # Errors
///
/// [`OutOfRange`]; nothing is copied then.
pub(crate) fn copy_from_registered(
    memory: &(impl Registered + ?Sized),
    offset: usize,
    dst: &mut [u8],
) -> Result<(), OutOfRange> {
    let src = part(memory, offset, dst.len())?;
    // SAFETY: `part` checked the range; the contract of `Registered` makes it valid, and leaves
    // it to volatile accesses, so that the slice cannot be a part of it.
    unsafe { volatile::copy_from_volatile(src, dst) };
    Ok(())
}

/// Writes `src` to the bytes of `memory` at `offset`.
///
/// For the driver alone, as [`copy_from_registered`].
///
/// # Errors
///
/// [`OutOfRange`]; nothing is copied then.
pub(crate) fn copy_to_registered(
    memory: &(impl Registered + ?Sized),
    offset: usize,
    src: &[u8],
) -> Result<(), OutOfRange> {
    let dst = part(memory, offset, src.len())?;
    // SAFETY: as for `copy_from_registered`.
    unsafe { volatile::copy_to_volatile(dst, src) };
    Ok(())
}

fn part(
    memory: &(impl Registered + ?Sized),
    offset: usize,
    len: usize,
) -> Result<NonNull<u8>, OutOfRange> {
    let size = memory.len();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(OutOfRange { offset, len, size });
    }
    // SAFETY: offset <= size, and addr..addr + size is one allocation or mapping by the contract
    // of `Registered`.
    Ok(unsafe { memory.addr().add(offset) })
}

#[cfg(test)]
mod tests {
    use super::super::SharedMemory;
    use super::*;

    struct Guest(SharedMemory);

    // SAFETY: the mapping is live, stays where it is, and is accessed by nothing else.
    unsafe impl Registered for Guest {
        fn addr(&self) -> NonNull<u8> {
            self.0.addr()
        }

        fn len(&self) -> usize {
            self.0.len()
        }

        fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
            Some((self.0.fd(), 0))
        }
    }

    #[test]
    fn copies_both_ways_within_bounds() {
        let guest: Arc<dyn Registered> = Arc::new(Guest(SharedMemory::new(4096).unwrap()));
        assert!(!guest.is_empty());
        assert!(Registered::file(&guest).is_some());

        copy_to_registered(&guest, 4090, b"sixsix").unwrap();
        let mut out = [0; 7];
        copy_from_registered(&*guest, 4089, &mut out).unwrap();
        assert_eq!(&out, b"\0sixsix");
        copy_to_registered(&guest, 4096, b"").unwrap();
    }

    #[test]
    fn ranges_beyond_the_end_are_refused() {
        let guest = Guest(SharedMemory::new(4096).unwrap());
        for (offset, len) in [(4096, 1), (4090, 7), (0, 4097), (usize::MAX, 1), (4097, 0)] {
            let expected = Err(OutOfRange {
                offset,
                len,
                size: 4096,
            });
            assert_eq!(
                copy_from_registered(&guest, offset, &mut vec![0; len]),
                expected
            );
            assert_eq!(copy_to_registered(&guest, offset, &vec![1; len]), expected);
        }
        let mut all = [1; 4096];
        copy_from_registered(&guest, 0, &mut all).unwrap();
        assert_eq!(all, [0; 4096]);
    }
}
