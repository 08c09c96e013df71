//! What callers hold: a registration, and a request's use of a mapping.

use std::fmt;
use std::sync::Arc;

use crate::space::Lease;

/// A fixed mapping: memory that stays reachable for the device, and that
/// [`AddressSpace::look_up`](crate::AddressSpace::look_up) finds, until this is dropped.
///
/// Dropping it unregisters the memory: look-ups no longer find it, and as soon as the last
/// [`Mapped`] guard of it is gone (at once, if there is none) it is unmapped and its owner dropped.
/// Both happen in the thread that drops the last of them.
#[must_use = "the memory is unregistered when this is dropped"]
pub struct FixedMapping {
    lease: Arc<Lease>,
    first: usize,
    iova: u64,
    len: usize,
}

impl FixedMapping {
    pub(crate) fn new(lease: Arc<Lease>, first: usize, iova: u64, len: usize) -> Self {
        Self {
            lease,
            first,
            iova,
            len,
        }
    }

    /// The I/O virtual address of the first byte.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Length in bytes, as registered; never 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// A guard for the whole of it, as a look-up would give.
    pub fn guard(&self) -> Mapped {
        Mapped::new(Arc::clone(&self.lease), self.iova, self.len)
    }
}

impl Drop for FixedMapping {
    fn drop(&mut self) {
        self.lease.unpublish(self.first);
    }
}

impl fmt::Debug for FixedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FixedMapping({:#x} bytes at IOVA {:#x})",
            self.len, self.iova
        )
    }
}

/// A guard: as long as it lives, the bytes it was asked for are mapped at [`iova`](Self::iova).
///
/// A request holds it until the device is known to be done with the memory. Dropping the last guard
/// of a temporary mapping unmaps it; so does dropping the last guard of a fixed mapping that was
/// unregistered meanwhile.
#[must_use = "the mapping may go away when this is dropped"]
pub struct Mapped {
    /// Held for its `Drop`.
    _lease: Arc<Lease>,
    iova: u64,
    len: usize,
}

impl Mapped {
    pub(crate) fn new(lease: Arc<Lease>, iova: u64, len: usize) -> Self {
        Self {
            _lease: lease,
            iova,
            len,
        }
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
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({:#x} bytes at IOVA {:#x})", self.len, self.iova)
    }
}
