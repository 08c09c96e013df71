//! Host memory as the model device reaches it: through the driver's mappings, and no others.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iova::{AddressSpace, Direction, DmaMapper, Geometry, HostMemory, MapError};

const PAGE: u64 = 4096;
/// The bytes of a word.
const WORD: usize = size_of::<u32>();

/// The IOMMU in front of the model device.
#[derive(Debug, Default)]
pub(crate) struct Iommu {
    /// By I/O address.
    mappings: Mutex<BTreeMap<u64, Mapping>>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    memory: NonNull<u8>,
    len: u64,
    direction: Direction,
}

// SAFETY: the pointer is only used under the lock of the table that it is in, and as long as it is
// in there the memory is the device's to access.
unsafe impl Send for Mapping {}

impl Iommu {
    /// The little-endian words at `iova`, or nothing if the device may not read all of them there.
    pub(crate) fn load<const N: usize>(&self, iova: u64) -> Option<[u32; N]> {
        let table = self.table();
        let words = words(&table, iova, N, Direction::ToDevice)?;
        Some(std::array::from_fn(|index| {
            u32::from_le(words[index].load(Ordering::Relaxed))
        }))
    }

    /// Stores little-endian words at `iova`, the last one after all others; nothing happens if the
    /// device may not write all of them there.
    pub(crate) fn store(&self, iova: u64, values: &[u32]) -> Option<()> {
        let table = self.table();
        let words = words(&table, iova, values.len(), Direction::FromDevice)?;
        let mut pairs = words.iter().zip(values);
        let last = pairs.next_back();
        for (word, value) in pairs {
            word.store(value.to_le(), Ordering::Relaxed);
        }
        if let Some((word, value)) = last {
            word.store(value.to_le(), Ordering::Release);
        }
        Some(())
    }

    /// Whether the device may write `len` bytes at `iova`.
    pub(crate) fn is_writable(&self, iova: u64, len: u64) -> bool {
        find(&self.table(), iova, len, Direction::FromDevice).is_some()
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        // It is changed by single operations, so it is whole after any panic.
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where `len` bytes of one mapping are.
fn find(
    table: &BTreeMap<u64, Mapping>,
    iova: u64,
    len: u64,
    direction: Direction,
) -> Option<NonNull<u8>> {
    let (first, mapping) = table.range(..=iova).next_back()?;
    let offset = iova - first;
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= mapping.len);
    if !inside || !mapping.direction.allows(direction) {
        return None;
    }
    // SAFETY: the offset is within the mapping, as was just checked.
    Some(unsafe { mapping.memory.add(offset as usize) })
}

/// `count` words of one mapping, for as long as the table is locked.
fn words(
    table: &BTreeMap<u64, Mapping>,
    iova: u64,
    count: usize,
    direction: Direction,
) -> Option<&[AtomicU32]> {
    let first = find(table, iova, (count * WORD) as u64, direction)?;
    let first = first.cast::<AtomicU32>();
    if !first.is_aligned() {
        return None;
    }
    // SAFETY: so many aligned words of memory that the driver keeps mapped, and thereby valid, for
    // longer than `table` is borrowed: its lock is held, and unmapping takes it. The driver accesses
    // queues as atomics too, and leaves other memory alone while the device has it.
    Some(unsafe { std::slice::from_raw_parts(first.as_ptr(), count) })
}

// SAFETY: the device reaches memory through the table only, in which there is exactly what was
// mapped and not yet unmapped; all its accesses are made under the table's lock.
unsafe impl DmaMapper for Iommu {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: vec![AddressSpace::DEFAULT_RANGE],
            page_sizes: PAGE,
            max_mappings: None,
            unmaps_runs: false,
        }
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let len = memory.len() as u64;
        let mut table = self.table();
        let before = table.range(..iova + len).next_back();
        if before.is_some_and(|(first, mapping)| first + mapping.len > iova) {
            return Err(MapError::AlreadyMapped);
        }
        let memory = memory.addr();
        table.insert(
            iova,
            Mapping {
                memory,
                len,
                direction,
            },
        );
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mut table = self.table();
        if table.get(&iova).is_none_or(|mapping| mapping.len != len) {
            return Err(MapError::ShortUnmap {
                expected: len,
                unmapped: 0,
            });
        }
        table.remove(&iova);
        Ok(())
    }
}
