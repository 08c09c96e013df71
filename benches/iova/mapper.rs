//! Mappers without a device: one that does nothing, one that keeps the books.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use iova::{AddressSpace, Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};

/// 4 KiB, 2 MiB and 1 GiB, as the IOMMUs of today.
const PAGE_SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;

/// Agrees to everything and does nothing, over 48 bits of addresses.
#[derive(Default)]
pub(crate) struct Nowhere {
    pub(crate) max_mappings: Option<u64>,
}

// SAFETY: there is no device, so none can reach anything.
unsafe impl DmaMapper for Nowhere {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: vec![IovaRange {
                first: 0x1_0000,
                last: (1 << 48) - 1,
            }],
            page_sizes: PAGE_SIZES,
            max_mappings: self.max_mappings,
            unmaps_runs: true,
        }
    }

    unsafe fn map(&self, _: u64, _: &HostMemory<'_>, _: Direction) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&self, _: u64, _: u64) -> Result<(), MapError> {
        Ok(())
    }
}

/// Counts calls and knows what is mapped where, within a limit that it enforces.
pub(crate) struct Counting {
    max_mappings: usize,
    books: Mutex<Books>,
}

/// Calls to a mapper.
#[derive(Clone, Copy, Default)]
pub(crate) struct Calls {
    /// Those that failed included.
    pub(crate) map: u64,
    pub(crate) unmap: u64,
}

#[derive(Default)]
struct Books {
    calls: Calls,
    /// IOVA to host address and length.
    mapped: BTreeMap<u64, (u64, u64)>,
}

impl Counting {
    pub(crate) fn new(max_mappings: usize) -> Self {
        Self {
            max_mappings,
            books: Mutex::default(),
        }
    }

    /// The calls until now.
    pub(crate) fn calls(&self) -> Calls {
        self.books().calls
    }

    /// Whether a device would reach all of `memory` through `iova`.
    pub(crate) fn reaches(&self, iova: u64, memory: &HostMemory<'_>) -> bool {
        let books = self.books();
        let below = books.mapped.range(..=iova).next_back();
        below.is_some_and(|(first, (host, len))| {
            let offset = iova - first;
            host + offset == memory.addr().addr().get() as u64
                && offset + memory.len() as u64 <= *len
        })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// SAFETY: there is no device, so none can reach anything.
unsafe impl DmaMapper for Counting {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: vec![AddressSpace::DEFAULT_RANGE],
            page_sizes: PAGE_SIZES,
            max_mappings: Some(self.max_mappings as u64),
            unmaps_runs: true,
        }
    }

    unsafe fn map(&self, iova: u64, memory: &HostMemory<'_>, _: Direction) -> Result<(), MapError> {
        let (host, len) = (memory.addr().addr().get() as u64, memory.len() as u64);
        let mut books = self.books();
        books.calls.map += 1;
        if books.mapped.len() >= self.max_mappings {
            return Err(MapError::OutOfEntries);
        }
        let before = books.mapped.range(..iova + len).next_back();
        if before.is_some_and(|(first, (_, len))| first + len > iova) {
            return Err(MapError::AlreadyMapped);
        }
        books.mapped.insert(iova, (host, len));
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mut books = self.books();
        books.calls.unmap += 1;
        let whole = books.mapped.range(iova..iova + len);
        let whole: Vec<_> = whole.map(|(first, (_, len))| (*first, *len)).collect();
        let unmapped = whole.iter().map(|(_, len)| len).sum();
        for (first, _) in whole {
            books.mapped.remove(&first);
        }
        if unmapped == len {
            Ok(())
        } else {
            Err(MapError::ShortUnmap {
                expected: len,
                unmapped,
            })
        }
    }
}
