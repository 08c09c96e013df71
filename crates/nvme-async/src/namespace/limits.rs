//! What a namespace allows in one command.

use std::ops::Range;
use std::sync::Arc;

use nvme_spec::identify::IdentifyNamespace;

use super::NamespaceInner;
use super::live::{Condition, Live};
use super::seen::Seen;
use crate::io::split::{Limits, fits};
use crate::{Controller, Error};

/// Most blocks in one command: NLB has 16 bits and counts from 0.
const MAX_BLOCKS: u64 = 65_536;

impl NamespaceInner {
    /// Checks whether this driver can use the namespace.
    pub(super) fn new(controller: Controller, nsid: u32, seen: Seen) -> Result<Self, Error> {
        let unusable = |reason: String| Error::Unusable {
            address: controller.address().to_owned(),
            reason: format!("namespace {nsid} {reason}"),
        };
        let geometry = seen.geometry();
        if geometry.metadata != 0 {
            return Err(unusable(format!(
                "has {} bytes of metadata with each block, which is not supported; \
                 format it without",
                geometry.metadata
            )));
        }
        if geometry.block_size > 65_536 {
            return Err(unusable(format!(
                "has logical blocks of {} bytes; 512 to 65536 are supported",
                geometry.block_size
            )));
        }
        let block_shift = geometry.block_size.trailing_zeros();
        let max_transfer = controller.inner.limits.max_transfer;
        if max_transfer < 1 << block_shift {
            return Err(unusable(format!(
                "has logical blocks of {} bytes, and the controller transfers at most \
                 {max_transfer} at a time",
                1u64 << block_shift
            )));
        }
        Ok(Self {
            controller,
            nsid,
            block_shift,
            max_blocks: (max_transfer >> block_shift).min(MAX_BLOCKS),
            live: Live::new(seen),
        })
    }

    #[inline]
    pub(crate) fn block_shift(&self) -> u32 {
        self.block_shift
    }

    #[inline]
    pub(crate) fn block_size(&self) -> u32 {
        1 << self.block_shift
    }

    #[inline]
    pub(crate) fn transfer_limits(&self) -> Limits {
        Limits {
            max_blocks: self.max_blocks,
            boundary: self.live.boundaries().optimal_io.into(),
        }
    }

    /// The limits of a Write Zeroes.
    pub(super) fn zeroing_limits(&self) -> Limits {
        self.limits_without_transfer(self.controller.inner.limits.write_zeroes_bytes)
    }

    /// The limits of a Verify.
    pub(super) fn verify_limits(&self) -> Limits {
        self.limits_without_transfer(self.controller.inner.limits.verify_bytes)
    }

    /// The limits of commands that transfer no data.
    fn limits_without_transfer(&self, bytes: Option<u64>) -> Limits {
        let by_controller = match bytes {
            Some(bytes) => (bytes >> self.block_shift).max(1),
            None => MAX_BLOCKS,
        };
        Limits {
            max_blocks: by_controller.min(MAX_BLOCKS),
            boundary: 0,
        }
    }

    /// What the device says of it at present.
    pub(crate) fn identify(&self) -> Arc<IdentifyNamespace> {
        self.live.seen().identify().clone()
    }

    /// In bytes; 0 while it can't be used.
    pub(crate) fn capacity(&self) -> u64 {
        match self.live.condition() {
            Condition::Usable { blocks } => blocks << self.block_shift,
            Condition::Gone | Condition::Changed { .. } => 0,
        }
    }

    /// How many logical blocks there are, unless it can't be used.
    #[inline]
    pub(crate) fn check_usable(&self) -> Result<u64, Error> {
        match self.live.condition() {
            Condition::Usable { blocks } => Ok(blocks),
            Condition::Gone => Err(self.gone()),
            Condition::Changed { how } => Err(self.changed(how)),
        }
    }

    /// The logical blocks of a range of bytes.
    #[inline]
    pub(crate) fn blocks(&self, offset: u64, len: u64) -> Result<Range<u64>, Error> {
        let capacity = self.check_usable()? << self.block_shift;
        let mask = u64::from(self.block_size()) - 1;
        if (offset | len) & mask != 0 || len == 0 {
            return Err(self.unaligned(offset, len));
        }
        match offset.checked_add(len) {
            Some(end) if end <= capacity => Ok(offset >> self.block_shift..end >> self.block_shift),
            _ => Err(Error::OutOfRange {
                offset,
                len,
                capacity,
            }),
        }
    }

    #[cold]
    fn gone(&self) -> Error {
        Error::NamespaceGone {
            address: self.address().to_owned(),
            nsid: self.nsid,
        }
    }

    #[cold]
    fn changed(&self, how: &'static str) -> Error {
        Error::NamespaceChanged {
            address: self.address().to_owned(),
            nsid: self.nsid,
            how,
        }
    }

    #[cold]
    fn unaligned(&self, offset: u64, len: u64) -> Error {
        Error::Unaligned {
            offset,
            len,
            block_size: self.block_size(),
        }
    }

    /// In bytes.
    pub(super) fn atomic_write_limit(&self) -> u64 {
        u64::from(self.atomic_blocks()) << self.block_shift
    }

    /// Whether a write of `blocks` is atomic also when power fails (NVM command set specification
    /// 1.0, "Atomic Operation").
    pub(crate) fn check_atomic(&self, blocks: &Range<u64>) -> Result<(), Error> {
        let limit = u64::from(self.atomic_blocks());
        let count = blocks.end - blocks.start;
        let not_atomic = |reason: String| {
            Err(Error::NotAtomic {
                offset: blocks.start << self.block_shift,
                len: count << self.block_shift,
                reason,
            })
        };
        if count > limit {
            return not_atomic(format!(
                "the controller promises no more than {} bytes",
                limit << self.block_shift
            ));
        }
        if !fits(blocks, self.transfer_limits()) {
            return not_atomic("it would take more than one command".to_owned());
        }
        let (boundary, offset) = self.atomic_boundary();
        if boundary != 0 {
            // Boundaries lie at the offset and at multiples of the boundary size from there.
            let zone = |block: u64| (block + boundary - offset % boundary) / boundary;
            if zone(blocks.start) != zone(blocks.end - 1) {
                return not_atomic(format!(
                    "it crosses one of the atomic boundaries, every {} bytes",
                    boundary << self.block_shift
                ));
            }
        }
        Ok(())
    }

    /// Blocks that are written atomically even when power fails: NAWUPF where the namespace has
    /// fields of its own, else AWUPF; both count from 0.
    fn atomic_blocks(&self) -> u32 {
        let of_controller = self.controller.inner.identify.awupf.get();
        let blocks = match self.live.boundaries().atomic_write {
            0 => of_controller,
            blocks => blocks,
        };
        u32::from(blocks) + 1
    }

    /// The distance of atomic boundaries in blocks (NABSPF, counting from 0 where it exists), and
    /// where the first one lies (NABO).
    fn atomic_boundary(&self) -> (u64, u64) {
        let boundaries = self.live.boundaries();
        match boundaries.atomic_boundary {
            0 => (0, 0),
            size => (u64::from(size) + 1, boundaries.atomic_offset.into()),
        }
    }
}
