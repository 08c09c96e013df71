//! Why guest memory can't be mapped or used.

use std::fmt;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap};

use crate::{Direction, Error};

/// Guest memory in one piece, by guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// The address of the first byte.
    pub start: GuestAddress,
    /// Length in bytes.
    pub len: u64,
}

impl GuestRange {
    pub(super) fn of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Self {
        Self {
            start: region.start_addr(),
            len: GuestMemoryRegion::len(region),
        }
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, len } = self;
        write!(f, "{len:#x} bytes of guest memory at {:#x}", start.0)
    }
}

/// Why a region of guest memory could not be mapped, or not be unmapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The protection of the memory permits nothing of what the device is to do.
    #[error(
        "{region} can't be mapped for direction {direction:?}: its protection is {prot:#x} (PROT_ of mmap)"
    )]
    Protection {
        /// The region.
        region: GuestRange,
        /// What it was mapped with into this process: `PROT_` bits of mmap(2).
        prot: i32,
        /// What the [`GuestMappings`](super::GuestMappings) are for.
        direction: Direction,
    },
    /// The region begins or ends within a page of the IOMMU; the device would reach what else lies
    /// in that page.
    #[error(
        "{region}, at host address {addr:#x}, begins or ends within one of the IOMMU's pages of \
         {page_size:#x} bytes"
    )]
    PartialPages {
        /// The region.
        region: GuestRange,
        /// Where it begins in this process.
        addr: usize,
        /// The IOMMU's smallest page, in bytes.
        page_size: usize,
    },
    /// The address space refused it.
    #[error("{region} could not be mapped for the device")]
    Map {
        /// The region.
        region: GuestRange,
        /// Why.
        source: Error,
    },
    /// The region could not be unmapped. The device may still reach it, so its memory is kept for
    /// ever.
    #[error("{region} could not be unmapped from the device")]
    Unmap {
        /// The region.
        region: GuestRange,
        /// Why.
        source: Error,
    },
}

impl RegionError {
    /// The region that it is about.
    #[must_use]
    pub fn region(&self) -> GuestRange {
        match *self {
            Self::Protection { region, .. }
            | Self::PartialPages { region, .. }
            | Self::Map { region, .. }
            | Self::Unmap { region, .. } => region,
        }
    }
}

/// Why guest memory can't be used for a request as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LookUpError {
    /// There is no guest memory, or none that the guest permits to access so.
    #[error("there is no guest memory to access at {:#x}", .addr.0)]
    NotGuestMemory {
        /// The first guest address of the range of which that is so; the first of all if the range
        /// reaches over the end of the addresses.
        addr: GuestAddress,
        /// What vm-memory says.
        source: GuestMemoryError,
    },
    /// The guest has that memory, but it is not mapped for the device in this direction: not at all,
    /// no longer, or read-only.
    #[error("{len:#x} bytes of guest memory at {:#x} are not mapped for direction {direction:?}", .addr.0)]
    NotMapped {
        /// The guest address where the piece begins.
        addr: GuestAddress,
        /// How long the piece is, in bytes.
        len: usize,
        /// What was asked for.
        direction: Direction,
    },
}
