//! Host memory as the device reaches it: through the mappings that the driver made, and no others.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use iova::{Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};

const PAGE: u64 = 4096;

/// The IOMMU of the device.
pub(super) struct Mapper {
    mappings: Mutex<BTreeMap<u64, Mapping>>,
    limit: Option<u64>,
    /// Takes the number of mappings that there are when the driver drops this.
    left: Arc<AtomicUsize>,
    /// Closed after that.
    _alive: mpsc::Sender<Infallible>,
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.left.store(self.table().len(), Ordering::Release);
    }
}

#[derive(Clone, Copy)]
struct Mapping {
    memory: NonNull<u8>,
    len: u64,
    direction: Direction,
}

// SAFETY: the pointer is only used under the lock of the table that it is in, and as long as it is
// in there the memory is for the device to access.
unsafe impl Send for Mapping {}

/// There is no such memory, or not in this direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

impl Mapper {
    pub(super) fn new(
        limit: Option<u64>,
        left: Arc<AtomicUsize>,
        alive: mpsc::Sender<Infallible>,
    ) -> Self {
        Self {
            mappings: Mutex::default(),
            limit,
            left,
            _alive: alive,
        }
    }

    /// Where the mapping with this number, modulo how many there are, begins.
    pub(super) fn address_of(&self, index: usize) -> Option<u64> {
        let table = self.table();
        let index = index.checked_rem(table.len())?;
        table.keys().nth(index).copied()
    }

    /// Reads memory.
    pub(super) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Refused> {
        let len = out.len();
        let mut rest = out;
        self.each_piece(address, len, Direction::ToDevice, |memory, len| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            rest = later;
            // SAFETY: `each_piece` gives memory that the driver lets the device read, under the
            // lock without which it is not unmapped; `now` is the device's own.
            unsafe { now.as_mut_ptr().copy_from(memory.as_ptr(), len) };
        })
    }

    /// Writes memory.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Refused> {
        let mut rest = data;
        self.each_piece(address, data.len(), Direction::FromDevice, |memory, len| {
            let (now, later) = rest.split_at(len);
            rest = later;
            // SAFETY: as for `read`, and the driver lets the device write it.
            unsafe { memory.as_ptr().copy_from(now.as_ptr(), len) };
        })
    }

    /// Whether memory could be read or written.
    pub(super) fn reach(
        &self,
        address: u64,
        len: usize,
        direction: Direction,
    ) -> Result<(), Refused> {
        self.each_piece(address, len, direction, |_, _| {})
    }

    /// All of it is checked before any of it is used.
    fn each_piece(
        &self,
        address: u64,
        len: usize,
        direction: Direction,
        mut f: impl FnMut(NonNull<u8>, usize),
    ) -> Result<(), Refused> {
        let table = self.table();
        for check in [true, false] {
            let mut next = address;
            let mut left = len as u64;
            while left > 0 {
                let (&start, mapping) = table.range(..=next).next_back().ok_or(Refused)?;
                let offset = next - start;
                if offset >= mapping.len || !mapping.direction.allows(direction) {
                    return Err(Refused);
                }
                let now = left.min(mapping.len - offset);
                if !check {
                    // SAFETY: the offset is within the mapping, as was just checked.
                    let memory = unsafe { mapping.memory.add(offset as usize) };
                    f(memory, now as usize);
                }
                next = next.checked_add(now).ok_or(Refused)?;
                left -= now;
            }
        }
        Ok(())
    }

    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// SAFETY: what is mapped is what was given, it is reached through the table only, and what was
// removed from the table is not reached any more: all accesses are made under its lock.
unsafe impl DmaMapper for Mapper {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: vec![IovaRange {
                first: 0x10_0000,
                last: 0xffff_ffff,
            }],
            page_sizes: PAGE,
            max_mappings: self.limit,
            unmaps_runs: false,
        }
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let mut table = self.table();
        if self.limit.is_some_and(|limit| table.len() as u64 >= limit) {
            return Err(MapError::OutOfEntries);
        }
        let len = memory.len() as u64;
        assert!(
            iova.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0,
            "the driver maps {len:#x} bytes at {iova:#x}"
        );
        let next = table.range(..iova + len).next_back();
        assert!(
            next.is_none_or(|(start, mapping)| start + mapping.len <= iova),
            "the driver maps {iova:#x} twice"
        );
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
        let removed = self.table().remove(&iova);
        assert_eq!(
            removed.map(|mapping| mapping.len),
            Some(len),
            "the driver unmaps {iova:#x}"
        );
        Ok(())
    }
}
