//! The buffers that reads fill and writes may send.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;

use bytes::Bytes;

use super::Pool;
use super::pool::Block;

/// A buffer that belongs to one owner: to the caller, or to the driver while a command uses it.
///
/// It comes from a [`Pool`](super::Pool), in which case the device reads and writes it without a
/// copy, or from the heap ([`DmaBuf::heap`]), in which case data passes through memory of the
/// driver. Otherwise there is no difference. Everything in it is initialized at all times.
///
/// Dropping it returns the block to its pool. It may outlive the pool and the controller.
///
/// It becomes [`Bytes`] by `Bytes::from`, without a copy. That takes one small allocation; the
/// memory returns to its pool when the last clone of the `Bytes` is dropped.
pub struct DmaBuf {
    memory: Memory,
    /// At most the capacity of `memory`.
    len: usize,
}

enum Memory {
    Pool(Block),
    Heap(Heap),
}

/// Memory of the heap as an address rather than a box, so that parts of a buffer can be filled
/// while the others are still waited for, without a reference to the whole.
struct Heap {
    bytes: NonNull<[u8]>,
}

// SAFETY: it owns the memory, as a box would.
unsafe impl Send for Heap {}
// SAFETY: as for Send; shared access only reads.
unsafe impl Sync for Heap {}

impl Heap {
    fn new(len: usize) -> Self {
        Self {
            bytes: NonNull::from(Box::leak(vec![0; len].into_boxed_slice())),
        }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: `new` took it from a box, and nothing else owns it.
        drop(unsafe { Box::from_raw(self.bytes.as_ptr()) });
    }
}

impl DmaBuf {
    /// A zeroed buffer of `len` bytes that no device can reach.
    ///
    /// For devices that are not trusted after a command has completed, and for when the pool has
    /// reached its limit.
    pub fn heap(len: usize) -> Self {
        Self {
            memory: Memory::Heap(Heap::new(len)),
            len,
        }
    }

    pub(super) fn from_block(block: Block, len: usize) -> Self {
        debug_assert!(len <= block.len());
        Self {
            memory: Memory::Pool(block),
            len,
        }
    }

    /// How many bytes the buffer had when it was allocated, rounded up to its block.
    pub fn capacity(&self) -> usize {
        match &self.memory {
            Memory::Pool(block) => block.len(),
            Memory::Heap(heap) => heap.bytes.len(),
        }
    }

    /// Shortens the buffer to its first `len` bytes. Nothing happens if it is not longer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Where the buffer is: `len` initialized bytes, valid for as long as it lives.
    ///
    /// For the driver, which has the buffer while a command uses it and then makes no reference to
    /// all of it.
    pub(crate) fn addr(&self) -> NonNull<u8> {
        match &self.memory {
            Memory::Pool(block) => block.addr(),
            Memory::Heap(heap) => heap.bytes.cast(),
        }
    }

    /// The I/O virtual address for the device that `pool` belongs to, if that device reaches it.
    pub(crate) fn iova_in(&self, pool: &Pool) -> Option<u64> {
        match &self.memory {
            Memory::Pool(block) if block.is_from(pool) => Some(block.iova()),
            _ => None,
        }
    }

    /// The I/O virtual address at which the device finds the first byte, a multiple of 4096; the
    /// others follow without a gap. Nothing if the device cannot reach the buffer.
    pub fn iova(&self) -> Option<u64> {
        match &self.memory {
            Memory::Pool(block) => Some(block.iova()),
            Memory::Heap(_) => None,
        }
    }
}

impl Deref for DmaBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.memory {
            // SAFETY: the block's bytes are initialized and valid while it lives, and len is at
            // most their number. They belong to this value alone, so only `deref_mut` changes
            // them, and that takes `&mut self`. The device writes them only between the
            // submission and the completion of a command, when the driver holds this value and
            // does not dereference it.
            Memory::Pool(block) => unsafe {
                slice::from_raw_parts(block.addr().as_ptr(), self.len)
            },
            // SAFETY: the bytes are initialized, valid while `heap` lives, and this value's alone.
            Memory::Heap(heap) => unsafe { &heap.bytes.as_ref()[..self.len] },
        }
    }
}

impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            // SAFETY: as for `deref`, and `&mut self` excludes all other references.
            Memory::Pool(block) => unsafe {
                slice::from_raw_parts_mut(block.addr().as_ptr(), self.len)
            },
            // SAFETY: as for `deref`, and `&mut self` excludes all other references.
            Memory::Heap(heap) => unsafe { &mut heap.bytes.as_mut()[..self.len] },
        }
    }
}

impl AsRef<[u8]> for DmaBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for DmaBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl From<DmaBuf> for Bytes {
    fn from(buf: DmaBuf) -> Self {
        Self::from_owner(buf)
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuf")
            .field("len", &self.len)
            .field("capacity", &self.capacity())
            .field("iova", &self.iova().map(|iova| format!("{iova:#x}")))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heap_buffers_are_zeroed_and_out_of_reach() {
        let mut buf = DmaBuf::heap(5000);
        assert_eq!((buf.len(), buf.capacity(), buf.iova()), (5000, 5000, None));
        assert!(buf.iter().all(|&byte| byte == 0));
        buf[4999] = 7;
        buf.truncate(6000);
        assert_eq!(buf.len(), 5000);
        assert_eq!(Bytes::from(buf)[4999], 7);
        assert!(DmaBuf::heap(0).is_empty());
    }

    #[test]
    fn truncation_keeps_the_capacity() {
        let mut buf = DmaBuf::heap(10);
        buf.truncate(3);
        assert_eq!((buf.len(), buf.capacity()), (3, 10));
        assert_eq!((buf.as_ref().len(), buf.as_mut().len()), (3, 3));
        assert_eq!(Bytes::from(buf).len(), 3);
    }

    #[test]
    fn debug_does_not_show_contents() {
        let mut buf = DmaBuf::heap(4);
        buf.fill(0xab);
        assert_eq!(
            format!("{buf:?}"),
            "DmaBuf { len: 4, capacity: 4, iova: None }"
        );
    }

    #[test]
    fn goes_from_thread_to_thread() {
        fn check<T: Send + Sync + 'static>() {}
        check::<DmaBuf>();
    }
}
