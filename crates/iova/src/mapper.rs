//! What reaches the IOMMU: the trait, and the words it speaks in.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Puts memory into a device's I/O address space and takes it out again: the kernel's VFIO, a
/// vfio-user socket, or the IOMMU of a software controller.
///
/// An [`AddressSpace`](crate::AddressSpace) calls it from any thread and never holds a lock of its
/// own meanwhile, so an implementation may block and may be called several times at once (never for
/// overlapping ranges of IOVA).
///
/// # Safety
///
/// Other memory safety rests on what an implementation says:
///
/// * After `Ok` from [`map`](Self::map), the device's accesses to `iova..iova + len` reach exactly
///   the memory that was given, offset by offset, and only in the direction that was given (where
///   the transport can enforce it).
/// * After `Err` from `map`, the device can reach nothing through that range that it could not
///   reach before.
/// * After `Ok` from [`unmap`](Self::unmap), the device can reach nothing through that range, and
///   accesses that were in progress have ended. `Err` may mean anything. Memory that came with an
///   owner is then never freed; other memory may be, once the device is done with it.
/// * The memory is touched on the device's behalf only, and by its address only: it may consist of
///   several allocations side by side.
/// * No live mapping ends by itself, except together with the device's ability to access memory at
///   all.
/// * [`geometry`](Self::geometry) always gives the same answer, and what it calls usable is.
pub unsafe trait DmaMapper: Send + Sync {
    /// The addresses, page sizes and number of mappings that are there to be used. Asked once, by
    /// [`AddressSpace::new`](crate::AddressSpace::new).
    fn geometry(&self) -> Geometry;

    /// Makes `memory` reachable for the device at `iova`.
    ///
    /// # Errors
    ///
    /// See [`MapError`]. Nothing is mapped then.
    ///
    /// # Safety
    ///
    /// The caller makes sure that, until an [`unmap`](Self::unmap) of the same range has returned
    /// `Ok`,
    ///
    /// * the memory is valid for reads (and, unless `direction` is [`Direction::ToDevice`], for
    ///   writes) by the device, which may access it at any time, and isn't moved or unmapped;
    /// * if a file is given, its bytes at that offset are that memory (a shared mapping of it).
    ///
    /// Address, length, file offset and `iova` are multiples of the smallest page size, and the
    /// range is usable (adjacent usable ranges count as one) and overlaps no live mapping.
    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError>;

    /// Takes away what one [`map`](Self::map) put at `iova`; `len` is the length it was given. Where
    /// [`Geometry::unmaps_runs`] says so, also what several put there without a gap, `len` being
    /// their sum.
    ///
    /// # Errors
    ///
    /// Also when less than `len` bytes were unmapped: [`MapError::ShortUnmap`]. It is then unknown
    /// what is still mapped.
    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError>;
}

/// Which way the data of a mapping flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The device reads the memory: what a write command sends.
    ToDevice,
    /// The device writes the memory: what a read command fills.
    FromDevice,
    /// Both.
    Bidirectional,
}

impl Direction {
    /// Whether a mapping made for `self` serves a request that needs `wanted`.
    #[must_use]
    pub fn allows(self, wanted: Self) -> bool {
        self == Self::Bidirectional || self == wanted
    }
}

/// A stretch of this process's memory: an address, a length in bytes and, for transports that pass
/// memory as file descriptors, the file that it is a shared mapping of.
///
/// A description only: that the memory is there is promised to the `unsafe` functions that take
/// one.
#[derive(Clone, Copy, Debug)]
pub struct HostMemory<'fd> {
    addr: NonNull<u8>,
    len: usize,
    file: Option<(BorrowedFd<'fd>, u64)>,
}

// SAFETY: nothing is read or written through a `HostMemory`; whoever dereferences the address
// answers for that under the contract of `DmaMapper::map`, which has no threads in it.
unsafe impl Send for HostMemory<'_> {}

// SAFETY: as for `Send`; and there is no interior mutability.
unsafe impl Sync for HostMemory<'_> {}

impl<'fd> HostMemory<'fd> {
    /// `len` bytes from `addr`.
    #[must_use]
    pub fn new(addr: NonNull<u8>, len: usize) -> Self {
        Self {
            addr,
            len,
            file: None,
        }
    }

    /// Adds that the memory is a shared mapping of `fd`, whose byte `offset` is the first one.
    #[must_use]
    pub fn with_file(self, fd: BorrowedFd<'fd>, offset: u64) -> Self {
        Self {
            file: Some((fd, offset)),
            ..self
        }
    }

    /// The first byte.
    #[must_use]
    pub fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of the last byte; of the first if there is none.
    pub(crate) fn last(&self) -> usize {
        let first = self.addr.addr().get();
        first.saturating_add(self.len.saturating_sub(1))
    }

    /// Whether all of `other` lies in it.
    pub(crate) fn holds(&self, other: &HostMemory<'_>) -> bool {
        self.addr <= other.addr && other.last() <= self.last()
    }

    /// This and `next` as one, if it begins where this ends, in the file too.
    pub(crate) fn extended_by(&self, next: &Self) -> Option<Self> {
        let adjoins = self.addr.addr().get().checked_add(self.len)? == next.addr.addr().get();
        let continues = match (self.file, next.file) {
            (None, None) => true,
            (Some((fd, offset)), Some((next_fd, next_offset))) => {
                fd.as_raw_fd() == next_fd.as_raw_fd()
                    && offset.checked_add(self.len as u64) == Some(next_offset)
            }
            _ => false,
        };
        let len = self.len.checked_add(next.len)?;
        let is_one = adjoins && continues && !self.is_empty() && !next.is_empty();
        is_one.then_some(Self { len, ..*self })
    }

    /// Whether there is no memory in it; such is never mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file that this is a shared mapping of, and the offset in it of the first byte.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'fd>, u64)> {
        self.file
    }
}

/// I/O virtual addresses `first..=last`. Inclusive, because the last one may be `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IovaRange {
    /// The lowest address.
    pub first: u64,
    /// The highest address.
    pub last: u64,
}

/// What a transport's IOMMU offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The addresses that may be used, in any order; reserved windows (such as x86's MSI window at
    /// 0xfee00000) are the holes. Empty when the transport doesn't know:
    /// [`AddressSpace::DEFAULT_RANGE`](crate::AddressSpace::DEFAULT_RANGE) then.
    pub usable: Vec<IovaRange>,
    /// The page sizes in bytes, as a mask: bit 12 for 4 KiB, bit 21 for 2 MiB.
    pub page_sizes: u64,
    /// How many mappings there can be at a time; `None` when no limit is known.
    pub max_mappings: Option<u64>,
    /// Whether one call can unmap several mappings that lie side by side.
    pub unmaps_runs: bool,
}

/// Why a [`DmaMapper`] refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The IOMMU's driver allows no more mappings at a time (VFIO: ENOSPC, `dma_entry_limit`).
    #[error("no more mappings are allowed at a time")]
    OutOfEntries,
    /// The memory can't be pinned: RLIMIT_MEMLOCK, or there is too little of it (VFIO: ENOMEM).
    #[error("the memory could not be locked (RLIMIT_MEMLOCK)")]
    MemoryLimit,
    /// Something is mapped there already (VFIO: EEXIST).
    #[error("something is mapped at this address already")]
    AlreadyMapped,
    /// The transport can't do it with such arguments.
    #[error("invalid mapping: {reason}")]
    Invalid {
        /// What is wrong.
        reason: String,
    },
    /// Less was unmapped than was asked for.
    #[error("{unmapped:#x} bytes were unmapped instead of {expected:#x}")]
    ShortUnmap {
        /// How many bytes were to be unmapped.
        expected: u64,
        /// How many were.
        unmapped: u64,
    },
    /// The device is not there to map for: it was given back to its host, or was removed.
    #[error("the device was given back to its host or removed")]
    DeviceGone,
    /// This transport passes memory as file descriptors, and the memory has none.
    #[error("this transport needs memory that is a shared mapping of a file")]
    NeedsFile,
    /// The system call failed.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for MapError {
    /// Sorts an error of the kernel's map or unmap call into the variants above by its kind:
    /// ENOSPC, ENOMEM and EEXIST have their own.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull => Self::OutOfEntries,
            io::ErrorKind::OutOfMemory => Self::MemoryLimit,
            io::ErrorKind::AlreadyExists => Self::AlreadyMapped,
            _ => Self::Io(error),
        }
    }
}
