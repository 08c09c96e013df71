//! The memory of the client, as the controller reaches it: by DMA address.

mod backing;
#[expect(unsafe_code, reason = "it maps memory that another process has, too")]
pub(crate) mod mapping;

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nvme_soft::{AccessFault, HostMemory, LogLimit};
use rustix::io::Errno;
use vfio_user::{DmaMap, DmaUnmap};

use self::backing::Backing;
use crate::link::Link;

/// Mappings that a client may have at a time.
pub(crate) const MAX_MAPS: usize = 8192;
/// Bytes of files that a client may have mapped at a time. Files may be as large as numbers go, of nothing, and
/// without addresses left this process could not even allocate.
const MAX_MAPPED: u64 = 1 << 44;
/// What addresses, sizes and offsets of mappings are multiples of.
pub(crate) const PAGE: u64 = 4096;

/// A range of DMA addresses.
#[derive(Debug)]
struct Region {
    first: u64,
    len: u64,
    readable: bool,
    writable: bool,
    backing: Backing,
}

impl Region {
    fn holds(&self, address: u64) -> bool {
        address
            .checked_sub(self.first)
            .is_some_and(|offset| offset < self.len)
    }
}

/// The memory of the client that there is, if any.
///
/// The lock is held for as long as an access takes: when a region has been removed, nothing accesses it any
/// more.
#[derive(Debug, Default)]
pub(crate) struct ClientMemory {
    /// By address; they do not overlap.
    regions: RwLock<Vec<Region>>,
    /// Where the last access found its region.
    last_hit: AtomicUsize,
    log_limit: LogLimit,
}

impl ClientMemory {
    fn read_lock(&self) -> RwLockReadGuard<'_, Vec<Region>> {
        // The list is changed by single operations of Vec, so it is whole after any panic.
        self.regions.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Vec<Region>> {
        self.regions.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a region, in a file or else at the client's end of `link`.
    ///
    /// # Errors
    ///
    /// The error that the client is to be told of.
    pub(crate) fn map(
        &self,
        map: &DmaMap,
        fd: Option<OwnedFd>,
        link: &Arc<Link>,
        trust: bool,
    ) -> Result<(), Errno> {
        if !(map.address | map.size | map.offset).is_multiple_of(PAGE) {
            return Err(Errno::INVAL);
        }
        let is_too_much = fd.is_some() && {
            let regions = self.read_lock();
            let files = regions.iter().filter(|region| region.backing.is_file());
            let mapped: u64 = files.map(|region| region.len).sum();
            // No more than the limit, or it would not be there.
            map.size > MAX_MAPPED - mapped
        };
        if is_too_much {
            return Err(Errno::NOMEM);
        }
        let backing = match fd {
            Some(fd) => Backing::of_file(fd, map, trust)?,
            None if link.may_ask() => Backing::Messages(link.clone()),
            None => return Err(Errno::INVAL),
        };
        let mut regions = self.write_lock();
        if regions.len() >= MAX_MAPS {
            return Err(Errno::NOSPC);
        }
        let index = regions.partition_point(|region| region.first < map.address);
        // The message was refused if this overflows.
        let last = map.address.saturating_add(map.size - 1);
        let overlaps_next = regions.get(index).is_some_and(|next| next.first <= last);
        let overlaps_previous = index
            .checked_sub(1)
            .is_some_and(|previous| regions[previous].holds(map.address));
        if overlaps_next || overlaps_previous {
            return Err(Errno::EXIST);
        }
        let region = Region {
            first: map.address,
            len: map.size,
            readable: map.readable,
            writable: map.writable,
            backing,
        };
        regions.insert(index, region);
        Ok(())
    }

    /// Removes a region, or all. Returns when nothing accesses it any more.
    ///
    /// # Errors
    ///
    /// EINVAL if there is no such region.
    pub(crate) fn unmap(&self, unmap: &DmaUnmap) -> Result<(), Errno> {
        if unmap.all {
            self.clear();
            return Ok(());
        }
        let mut regions = self.write_lock();
        let found = regions.binary_search_by_key(&unmap.address, |region| region.first);
        let index = found.map_err(|_| Errno::INVAL)?;
        if regions[index].len != unmap.size {
            return Err(Errno::INVAL);
        }
        let gone = regions.remove(index);
        // Unmapped outside of the lock.
        drop(regions);
        drop(gone);
        Ok(())
    }

    /// Removes all regions.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *self.write_lock());
        drop(gone);
    }

    /// Serves an access in pieces that each lie in one region; `piece` gets the region's bytes, the offset in
    /// them, and which bytes of the access these are.
    fn access(
        &self,
        fault: AccessFault,
        mut piece: impl FnMut(&Backing, u64, Range<usize>) -> io::Result<()>,
    ) -> Result<(), AccessFault> {
        let regions = self.read_lock();
        let mut done = 0;
        while done < fault.len {
            let address = fault.address.checked_add(done as u64).ok_or(fault)?;
            let region = self.find(&regions, address).ok_or(fault)?;
            let is_allowed = if fault.is_write {
                region.writable
            } else {
                region.readable
            };
            if !is_allowed {
                return Err(fault);
            }
            let offset = address - region.first;
            let part = (region.len - offset).min((fault.len - done) as u64) as usize;
            if let Err(error) = piece(&region.backing, offset, done..done + part) {
                if let Some(left_out) = self.log_limit.pass() {
                    tracing::warn!(%error, %fault, left_out, "memory of the client");
                }
                return Err(fault);
            }
            done += part;
        }
        Ok(())
    }

    fn find<'a>(&self, regions: &'a [Region], address: u64) -> Option<&'a Region> {
        let hint = self.last_hit.load(Ordering::Relaxed);
        if let Some(region) = regions.get(hint).filter(|region| region.holds(address)) {
            return Some(region);
        }
        let index = regions
            .partition_point(|region| region.first <= address)
            .checked_sub(1)?;
        let region = regions[index].holds(address).then_some(&regions[index])?;
        self.last_hit.store(index, Ordering::Relaxed);
        Some(region)
    }
}

impl HostMemory for ClientMemory {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        let fault = AccessFault::read(address, out.len());
        self.access(fault, |backing, offset, part| {
            let at = address + part.start as u64;
            backing.read(offset, at, &mut out[part])
        })
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault> {
        let fault = AccessFault::write(address, data.len());
        self.access(fault, |backing, offset, part| {
            let at = address + part.start as u64;
            backing.write(offset, at, &data[part])
        })
    }

    fn store_release(&self, address: u64, value: u32) -> Result<(), AccessFault> {
        let fault = AccessFault::write(address, size_of::<u32>());
        // Aligned, so that it never spans two regions, which begin and end on pages.
        if !address.is_multiple_of(4) {
            return Err(fault);
        }
        self.access(fault, |backing, offset, _| {
            backing.store_release(offset, address, value)
        })
    }

    fn load_acquire(&self, address: u64) -> Result<u32, AccessFault> {
        let fault = AccessFault::read(address, size_of::<u32>());
        if !address.is_multiple_of(4) {
            return Err(fault);
        }
        let mut value = 0;
        self.access(fault, |backing, offset, _| {
            value = backing.load_acquire(offset, address)?;
            Ok(())
        })?;
        Ok(value)
    }
}
