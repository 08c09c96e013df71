//! Memory that the driver and the device change at the same time.

use std::fmt;
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

use super::pool::Block;
use super::{AllocError, Pool};

/// A page-aligned array of words for queues and PRP lists.
///
/// The device may change any of it at any time, so it is never a slice of integers or of entries,
/// only of atomics. Words hold what the device sees: little-endian values.
///
/// Dropping it returns the memory to its pool. The device must be done with it by then.
pub struct DmaWords {
    block: Block,
    len: usize,
}

impl DmaWords {
    /// Allocates `len` words from `pool`, all zero, at the start of a device page.
    ///
    /// # Errors
    ///
    /// Those of [`Pool::alloc`].
    pub fn new(pool: &Pool, len: usize) -> Result<Self, AllocError> {
        let bytes = len.saturating_mul(size_of::<u32>());
        let block = pool.alloc_block(bytes)?;
        // SAFETY: the block's bytes are writable, nobody else has the block, and the device has
        // not been told of it.
        unsafe { block.addr().write_bytes(0, block.len()) };
        Ok(Self { block, len })
    }

    /// The I/O virtual address at which the device finds the first word, a multiple of 4096.
    pub fn iova(&self) -> u64 {
        self.block.iova()
    }

    /// Stores a 64-bit value in the words `2 * index` and `2 * index + 1`, as the entry `index` of
    /// a PRP list (NVMe base specification 2.0, section 4.1.1). `value` is in the host's order.
    ///
    /// These are two relaxed stores. A device that reads the entry meanwhile may see one of them,
    /// so an entry is stored before the command that refers to it is submitted.
    ///
    /// # Panics
    ///
    /// If the words are outside of the array.
    pub fn store_u64(&self, index: usize, value: u64) {
        let entry = &self.as_ref()[2 * index..2 * index + 2];
        entry[0].store((value as u32).to_le(), Ordering::Relaxed);
        entry[1].store(((value >> 32) as u32).to_le(), Ordering::Relaxed);
    }
}

impl AsRef<[AtomicU32]> for DmaWords {
    fn as_ref(&self) -> &[AtomicU32] {
        // SAFETY: the block holds at least `len` initialized words at a page boundary and lives as
        // long as `self`. The process accesses it through these atomics only; the device does by
        // its own means, which for atomic words is what it would be from another thread.
        unsafe { slice::from_raw_parts(self.block.addr().cast().as_ptr(), self.len) }
    }
}

impl fmt::Debug for DmaWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaWords")
            .field("len", &self.len)
            .field("iova", &format_args!("{:#x}", self.iova()))
            .finish()
    }
}
