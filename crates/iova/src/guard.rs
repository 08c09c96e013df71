//! A request's use of a mapping.

use std::fmt;
use std::ops::Range;

use crate::lease::Lease;
use crate::table::{Pinned, SlotRef};

/// A guard: as long as it lives, the bytes it was asked for are mapped at [`iova`](Self::iova).
///
/// A request holds it until the device is known to be done with the memory. Dropping the last guard
/// unmaps a temporary mapping that is not kept, and a fixed mapping that was unregistered
/// meanwhile.
#[must_use = "the mapping may go away when this is dropped"]
pub struct Mapped {
    pinned: Pinned<Lease>,
    iova: u64,
    len: usize,
}

impl Mapped {
    #[inline]
    pub(crate) fn new(pinned: Pinned<Lease>, iova: u64, len: usize) -> Self {
        Self { pinned, iova, len }
    }

    /// The I/O virtual address of the first byte.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Length in bytes; never 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// A guard for a part of it; nothing if the range is empty or reaches past the end.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        (range.start < range.end && range.end <= self.len).then(|| Self {
            pinned: self.pinned.clone(),
            iova: self.iova + range.start as u64,
            len: range.len(),
        })
    }

    pub(crate) fn slot(&self) -> SlotRef<Lease> {
        self.pinned.slot()
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({:#x} bytes at IOVA {:#x})", self.len, self.iova)
    }
}
