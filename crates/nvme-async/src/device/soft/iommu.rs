//! The IOMMU between the software controller and host memory.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use iova::{Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};
use nvme_soft::AccessFault;

use super::memory::Memory;

/// What is mapped is mapped in units of this.
const PAGE: u64 = 4096;
/// Page sizes as VFIO reports them: 4 KiB, 2 MiB, 1 GiB.
const PAGE_SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;

/// All usable addresses are above 2^48, where no address of a process is: a host address that is
/// taken for an I/O address, or the other way round, never works by accident. The hole is where
/// x86 has its interrupt window.
const USABLE: [IovaRange; 2] = [
    IovaRange {
        first: 0x0001_0000_0000_0000,
        last: 0x0001_0000_fedf_ffff,
    },
    IovaRange {
        first: 0x0001_0000_fef0_0000,
        last: 0x0001_ffff_ffff_ffff,
    },
];

/// Translates the controller's accesses and refuses those that the host did not map.
///
/// Unmapping waits for the access that is in progress; there is at most one, because the
/// controller has one thread.
pub struct SoftIommu {
    /// Sorted by address, without overlaps. Held for reading during an access.
    mappings: RwLock<Vec<Mapping>>,
    /// Where in `mappings` the last access was, as a hint.
    last_hit: AtomicUsize,
    fd_only: bool,
    max_mappings: Option<u64>,
    strays: AtomicU64,
    last_stray: Mutex<Option<Stray>>,
}

struct Mapping {
    first: u64,
    len: u64,
    readable: bool,
    writable: bool,
    memory: Memory,
}

/// An access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stray {
    /// The first I/O address of the access.
    pub iova: u64,
    /// Its length in bytes.
    pub len: usize,
    /// Whether the controller was to write.
    pub is_write: bool,
}

impl SoftIommu {
    pub(super) fn new(fd_only: bool, max_mappings: Option<u64>) -> Self {
        Self {
            mappings: RwLock::default(),
            last_hit: AtomicUsize::new(0),
            fd_only,
            max_mappings,
            strays: AtomicU64::new(0),
            last_stray: Mutex::default(),
        }
    }

    /// Accesses that were refused: outside of a live mapping, or against its direction.
    pub fn stray_accesses(&self) -> u64 {
        self.strays.load(Ordering::Relaxed)
    }

    /// The last of them.
    pub fn last_stray(&self) -> Option<Stray> {
        *self
            .last_stray
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Mappings that there are now.
    pub fn mappings(&self) -> usize {
        self.read_lock().len()
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, Vec<Mapping>> {
        // The list is changed by single operations of Vec, so it is whole after any panic.
        self.mappings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Vec<Mapping>> {
        self.mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves an access in pieces that each lie in one mapping; `piece` gets the memory, the offset
    /// in it, and which bytes of the access these are.
    pub(super) fn access(
        &self,
        address: u64,
        len: usize,
        is_write: bool,
        mut piece: impl FnMut(&Memory, usize, std::ops::Range<usize>),
    ) -> Result<(), AccessFault> {
        let mappings = self.read_lock();
        let mut done = 0;
        while done < len {
            let found = address
                .checked_add(done as u64)
                .and_then(|at| Some((at, self.find(&mappings, at)?)))
                .filter(|(_, mapping)| {
                    if is_write {
                        mapping.writable
                    } else {
                        mapping.readable
                    }
                });
            let Some((at, mapping)) = found else {
                return Err(self.refuse(AccessFault {
                    address,
                    len,
                    is_write,
                }));
            };
            let offset = at - mapping.first;
            let part = (mapping.len - offset).min((len - done) as u64) as usize;
            piece(&mapping.memory, offset as usize, done..done + part);
            done += part;
        }
        Ok(())
    }

    fn find<'a>(&self, mappings: &'a [Mapping], address: u64) -> Option<&'a Mapping> {
        let hint = self.last_hit.load(Ordering::Relaxed);
        if let Some(mapping) = mappings.get(hint).filter(|mapping| mapping.holds(address)) {
            return Some(mapping);
        }
        let index = mappings
            .partition_point(|mapping| mapping.first <= address)
            .checked_sub(1)?;
        let mapping = mappings[index].holds(address).then_some(&mappings[index])?;
        self.last_hit.store(index, Ordering::Relaxed);
        Some(mapping)
    }

    #[cold]
    fn refuse(&self, fault: AccessFault) -> AccessFault {
        let stray = Stray {
            iova: fault.address,
            len: fault.len,
            is_write: fault.is_write,
        };
        self.strays.fetch_add(1, Ordering::Relaxed);
        *self
            .last_stray
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(stray);
        tracing::error!(%fault, "stray access");
        fault
    }

    fn check(&self, iova: u64, len: u64, addr: usize) -> Result<(), MapError> {
        let invalid = |reason: String| Err(MapError::Invalid { reason });
        if len == 0 || !(iova | len | addr as u64).is_multiple_of(PAGE) {
            return invalid(format!(
                "{len:#x} bytes at {iova:#x} from {addr:#x} are no whole pages"
            ));
        }
        let usable = iova.checked_add(len - 1).is_some_and(|last| {
            USABLE
                .iter()
                .any(|range| range.first <= iova && last <= range.last)
        });
        if !usable {
            return invalid(format!(
                "{len:#x} bytes at {iova:#x} are outside of what is usable"
            ));
        }
        Ok(())
    }
}

impl Mapping {
    fn holds(&self, address: u64) -> bool {
        address
            .checked_sub(self.first)
            .is_some_and(|offset| offset < self.len)
    }
}

// SAFETY: the controller reaches memory only through `access`, which translates by the list of
// mappings and holds its lock meanwhile. `map` enters exactly what it was given, and nothing on
// error; `unmap` removes under the write lock, so when it has returned accesses have ended and
// find nothing. Mappings go only by `unmap`, or with the IOMMU itself, which the controller keeps
// alive. The geometry is constant.
unsafe impl DmaMapper for SoftIommu {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: USABLE.to_vec(),
            page_sizes: PAGE_SIZES,
            max_mappings: self.max_mappings,
            unmaps_runs: true,
        }
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let len = memory.len() as u64;
        self.check(iova, len, memory.addr().addr().get())?;
        let readable = direction.allows(Direction::ToDevice);
        let writable = direction.allows(Direction::FromDevice);
        let memory = if self.fd_only {
            let (file, offset) = memory.file().ok_or(MapError::NeedsFile)?;
            Memory::of_file(file, offset, memory.len(), readable, writable)?
        } else {
            // SAFETY: the caller keeps the memory valid for the device until `unmap` has returned
            // Ok, which drops the value made here; without `unmap` it is never dropped while the
            // controller lives.
            unsafe { Memory::of_host(memory.addr(), memory.len()) }
        };
        let mut mappings = self.write_lock();
        if self
            .max_mappings
            .is_some_and(|max| mappings.len() as u64 >= max)
        {
            return Err(MapError::OutOfEntries);
        }
        let index = mappings.partition_point(|mapping| mapping.first < iova);
        let overlaps_next = mappings
            .get(index)
            .is_some_and(|next| next.first < iova + len);
        let overlaps_previous = index
            .checked_sub(1)
            .is_some_and(|previous| mappings[previous].holds(iova));
        if overlaps_next || overlaps_previous {
            return Err(MapError::AlreadyMapped);
        }
        mappings.insert(
            index,
            Mapping {
                first: iova,
                len,
                readable,
                writable,
                memory,
            },
        );
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mut mappings = self.write_lock();
        let first = mappings.partition_point(|mapping| mapping.first < iova);
        let mut end = first;
        let mut unmapped = 0;
        while let Some(mapping) = mappings.get(end)
            && mapping.first == iova + unmapped
            && unmapped + mapping.len <= len
        {
            unmapped += mapping.len;
            end += 1;
        }
        if unmapped != len {
            // Only whole mappings are ever unmapped, here as with VFIO.
            return Err(MapError::ShortUnmap {
                expected: len,
                unmapped: 0,
            });
        }
        let gone: Vec<Mapping> = mappings.drain(first..end).collect();
        // Mappings of this process are unmapped outside of the lock.
        drop(mappings);
        drop(gone);
        Ok(())
    }
}

impl nvme_soft::HostMemory for SoftIommu {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        self.access(address, out.len(), false, |memory, offset, part| {
            memory.read(offset, &mut out[part]);
        })
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault> {
        self.access(address, data.len(), true, |memory, offset, part| {
            memory.write(offset, &data[part]);
        })
    }

    fn store_release(&self, address: u64, value: u32) -> Result<(), AccessFault> {
        let len = size_of::<u32>();
        // Aligned, so that it never spans two mappings, which begin and end on pages.
        if !address.is_multiple_of(len as u64) {
            return Err(self.refuse(AccessFault::write(address, len)));
        }
        self.access(address, len, true, |memory, offset, _| {
            memory.store_release(offset, value)
        })
    }

    fn load_acquire(&self, address: u64) -> Result<u32, AccessFault> {
        let len = size_of::<u32>();
        if !address.is_multiple_of(len as u64) {
            return Err(self.refuse(AccessFault::read(address, len)));
        }
        let mut value = 0;
        self.access(address, len, false, |memory, offset, _| {
            value = memory.load_acquire(offset);
        })?;
        Ok(value)
    }
}

impl fmt::Debug for SoftIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftIommu")
            .field("mappings", &self.mappings())
            .field("fd_only", &self.fd_only)
            .field("max_mappings", &self.max_mappings)
            .field("stray_accesses", &self.stray_accesses())
            .field("last_stray", &self.last_stray())
            .finish_non_exhaustive()
    }
}
