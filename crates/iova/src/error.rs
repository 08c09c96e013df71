//! Why an address space refuses.

use std::sync::Arc;

use crate::MapError;
use crate::state::Amount;

/// Why memory could not be mapped, or an [`AddressSpace`](crate::AddressSpace) not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the mapper says about its IOMMU makes no sense.
    #[error("the IOMMU's geometry is unusable: {reason}")]
    Geometry {
        /// What is wrong.
        reason: &'static str,
    },
    /// There is no memory to map.
    #[error("memory of length 0 can't be mapped")]
    Empty,
    /// The memory, rounded out to whole pages, does not lie within the host's address space.
    #[error("{len:#x} bytes at {addr:#x} reach over the end of the host's address space")]
    OutOfBounds {
        /// Address of the first byte.
        addr: usize,
        /// Length in bytes.
        len: usize,
    },
    /// Address and file offset differ in their position within a page, so no page of the IOMMU can
    /// hold both.
    #[error(
        "address {addr:#x} and file offset {offset:#x} lie differently within the IOMMU's pages of \
         {page_size:#x} bytes"
    )]
    Misaligned {
        /// Address of the first byte.
        addr: usize,
        /// Offset in the file of the first byte.
        offset: u64,
        /// The smallest page size, in bytes.
        page_size: u64,
    },
    /// No free stretch of I/O virtual addresses is long enough.
    #[error(
        "no free stretch of {len:#x} I/O virtual addresses ({free:#x} are free in all, \
         {largest:#x} in one piece): unregister memory, or wait for requests to finish"
    )]
    OutOfAddresses {
        /// How many are needed: the memory rounded out to whole pages.
        len: u64,
        /// How many are free.
        free: u64,
        /// The longest free stretch.
        largest: u64,
    },
    /// The IOMMU takes no more mappings at a time.
    #[error(
        "no room for {needed} more I/O mappings: {in_use}{} are in use. Register fewer, larger \
         regions, or raise the limit (VFIO: module parameter dma_entry_limit of vfio_iommu_type1; \
         vfio-user: the server's max_dma_maps)",
        allowed(.max)
    )]
    MappingLimit {
        /// How many the request needs at a time.
        needed: u64,
        /// How many mappings this address space has, those that could not be unmapped included.
        in_use: u64,
        /// How many the mapper had announced, if it had.
        max: Option<u64>,
    },
    /// The memory can't be locked.
    #[error(
        "{len:#x} bytes of memory can't be locked for the device (with {mapped:#x} bytes mapped \
         already): raise RLIMIT_MEMLOCK (`ulimit -l`, systemd's LimitMEMLOCK=), give the process \
         CAP_IPC_LOCK, or map less"
    )]
    MemoryLimit {
        /// How many bytes were to be mapped.
        len: u64,
        /// How many bytes this address space has mapped.
        mapped: u64,
    },
    /// Others wait for room, and were there before.
    #[error("{waiting} requests wait for room in the I/O address space, in order of arrival")]
    Queued {
        /// How many.
        waiting: u64,
    },
    /// A segment's memory does not lie within the memory of its owner.
    #[error("{len:#x} bytes at {addr:#x} do not lie within the memory of their owner")]
    OutsideOfOwner {
        /// Address of the first byte.
        addr: usize,
        /// Length in bytes.
        len: usize,
    },
    /// A mapping could not be removed. The device may still reach its memory, so memory and
    /// addresses are never used for anything else.
    #[error("unmapping {len:#x} bytes at IOVA {iova:#x} failed; their memory is kept for ever")]
    Unmap {
        /// Where it is mapped.
        iova: u64,
        /// How many bytes.
        len: u64,
        /// What the mapper says.
        source: Arc<MapError>,
    },
    /// The mapper refused for another reason.
    #[error("mapping {len:#x} bytes at IOVA {iova:#x} failed")]
    Map {
        /// Where it was to be mapped.
        iova: u64,
        /// How many bytes.
        len: u64,
        /// What the mapper says.
        source: MapError,
    },
}

impl Error {
    /// Whether a limit was reached, so that the same may succeed once other mappings are gone.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        matches!(
            self,
            Self::OutOfAddresses { .. }
                | Self::MappingLimit { .. }
                | Self::MemoryLimit { .. }
                | Self::Queued { .. }
        )
    }

    /// What would have to go for this not to happen.
    pub(crate) fn need(&self) -> Amount {
        match *self {
            Self::MappingLimit {
                needed,
                in_use,
                max,
            } => Amount {
                mappings: needed - max.map_or(0, |max| max.saturating_sub(in_use)).min(needed),
                bytes: 0,
            },
            Self::OutOfAddresses { len, .. } | Self::MemoryLimit { len, .. } => Amount {
                mappings: 0,
                bytes: len,
            },
            _ => Amount::default(),
        }
    }
}

fn allowed(max: &Option<u64>) -> String {
    max.map_or_else(String::new, |max| format!(" of {max}"))
}
