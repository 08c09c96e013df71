//! Descriptor chains of a split virtqueue (virtio 1.2, section 2.7.5), checked.

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use super::MAX_QUEUE_SIZE;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// Bytes of a chain (section 2.7.5.2: no more than 2^32 in total).
const MAX_BYTES: u64 = 1 << 32;

/// What a driver must not do. Its queue is stopped, because nothing that follows can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// A descriptor that the table does not have.
    #[error("descriptor {index} is not in a table of {size}")]
    Index {
        /// Which one.
        index: u16,
        /// How many there are.
        size: u16,
    },
    /// A chain without an end, or longer than the queue.
    #[error("a chain of more than {0} descriptors")]
    Long(u16),
    /// More bytes than a chain may have.
    #[error("a chain of more than 2^32 bytes")]
    Large,
    /// Memory for the device to read after some for it to write.
    #[error("a descriptor to read from after one to write to")]
    Order,
    /// A table of descriptors that is none, or not the last of its chain, or in a table itself, or was not agreed on.
    #[error("an indirect table of {len} bytes that is not allowed here")]
    Indirect {
        /// How large it is said to be, in bytes.
        len: u32,
    },
    /// The table is not in the guest's memory.
    #[error("a table of descriptors outside of memory, at {0:#x}")]
    Table(u64),
    /// Less than the header of a request.
    #[error("a request without a header")]
    NoHeader,
    /// No byte to say how the request ended.
    #[error("a request without a place for its status")]
    NoStatus,
}

/// A run of guest memory. It need not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it is.
    pub(super) address: GuestAddress,
    /// How long it is; not 0.
    pub(super) len: u32,
}

/// The memory of a chain, in order.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// For the device to read.
    pub(super) readable: SmallVec<[Segment; 4]>,
    /// For the device to write.
    pub(super) writable: SmallVec<[Segment; 4]>,
}

impl Chain {
    /// Follows the chain that starts at descriptor `head` of the `size` ones at `table`. Tables in memory are allowed
    /// if `is_indirect_allowed`; the chain is no longer than the queue with them either.
    ///
    /// # Errors
    ///
    /// [`ChainError`], other than those about what a request is.
    pub(super) fn read<M: GuestMemory>(
        memory: &M,
        table: GuestAddress,
        size: u16,
        head: u16,
        is_indirect_allowed: bool,
    ) -> Result<Self, ChainError> {
        let mut chain = Self::default();
        let (mut table, mut table_size, mut index) = (table, size, head);
        let mut is_in_table = false;
        let mut bytes = 0;
        // A driver that does not know of it has no longer chains than its queue; with tables there may be as many as
        // the configuration says.
        let limit = size.max(super::config::SEG_MAX + 2);
        // A table's own descriptor is one more.
        for _ in 0..=limit {
            if index >= table_size {
                let size = table_size;
                return Err(ChainError::Index { index, size });
            }
            let descriptor = table
                .checked_add(u64::from(index) * DESCRIPTOR)
                .and_then(|place| memory.read_obj::<Descriptor>(place).ok())
                .ok_or(ChainError::Table(table.0))?;
            if descriptor.refers_to_indirect_table() {
                let len = descriptor.len();
                let entries = u64::from(len) / DESCRIPTOR;
                let is_allowed = is_indirect_allowed && !is_in_table && !descriptor.has_next();
                table_size = u16::try_from(entries)
                    .ok()
                    .filter(|&entries| is_allowed && entries > 0 && entries <= MAX_TABLE)
                    .filter(|_| u64::from(len).is_multiple_of(DESCRIPTOR))
                    .ok_or(ChainError::Indirect { len })?;
                (table, index, is_in_table) = (descriptor.addr(), 0, true);
                continue;
            }
            bytes += u64::from(descriptor.len());
            if bytes > MAX_BYTES {
                return Err(ChainError::Large);
            }
            chain.add(&descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(ChainError::Long(limit))
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let segment = Segment {
            address: descriptor.addr(),
            len: descriptor.len(),
        };
        let is_empty = segment.len == 0;
        if descriptor.is_write_only() {
            self.writable.extend((!is_empty).then_some(segment));
        } else if self.writable.is_empty() {
            self.readable.extend((!is_empty).then_some(segment));
        } else {
            return Err(ChainError::Order);
        }
        Ok(())
    }

    /// Takes the first bytes to read, as many as `to` has, away and into `to`. If there are not as many, or they are
    /// outside of the guest's memory, there is no saying what becomes of both.
    pub(super) fn read_first<M: GuestMemory>(&mut self, memory: &M, to: &mut [u8]) -> Option<()> {
        let mut rest = to;
        while !rest.is_empty() {
            let segment = self.readable.first_mut()?;
            let len = rest.len().min(segment.len as usize);
            let (now, later) = rest.split_at_mut(len);
            memory.read_slice(now, segment.address).ok()?;
            rest = later;
            if len as u32 == segment.len {
                self.readable.remove(0);
            } else {
                segment.len -= len as u32;
                segment.address = segment.address.checked_add(len as u64)?;
            }
        }
        Some(())
    }

    /// Takes the last byte to write away, and says where it is.
    pub(super) fn take_last(&mut self) -> Option<GuestAddress> {
        let segment = self.writable.last_mut()?;
        segment.len -= 1;
        let address = segment.address.checked_add(segment.len.into())?;
        if segment.len == 0 {
            self.writable.pop();
        }
        Some(address)
    }
}

/// How many bytes there are.
pub(super) fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Descriptors of an indirect table.
const MAX_TABLE: u16 = MAX_QUEUE_SIZE;
