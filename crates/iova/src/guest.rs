//! The memory of a guest in a device's I/O address space, for VMMs (feature `vm-memory`).
//!
//! A VMM that drives a device for its guest (a virtual disk on an NVMe device, say) lets the device
//! read and write guest memory in place. [`GuestMappings`] maps that memory once, region by region,
//! and follows it when regions are plugged and unplugged; [`AddressSpace::look_up_guest`] translates
//! the guest addresses of a request to I/O addresses, in any thread and without a lock.
//!
//! ```
//! use std::sync::Arc;
//!
//! use iova::guest::GuestMappings;
//! use iova::{AddressSpace, Direction, DmaMapper, Mapped};
//! use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
//! # use vm_memory::GuestRegionMmap;
//!
//! # async fn example(mapper: Arc<dyn DmaMapper>) -> Result<(), Box<dyn std::error::Error>> {
//! let space = AddressSpace::new(mapper)?;
//! let memory: GuestMemoryMmap =
//!     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20), (GuestAddress(1 << 32), 64 << 20)])?;
//! let mut mappings = GuestMappings::of(&space, &memory, Direction::Bidirectional)?;
//! let memory = GuestMemoryAtomic::new(memory);
//!
//! // A device's queue, in any thread: 8 KiB that the guest wants to be filled.
//! let snapshot = memory.memory();
//! let guards: Vec<Mapped> = space
//!     .look_up_guest(&*snapshot, GuestAddress(0x1000), 8192, Direction::FromDevice)
//!     .collect::<Result<_, _>>()?;
//! // ... put `guards[..].iova()` into the device's command, keep `guards` until it is done.
//!
//! // The VMM: memory is plugged. First the device has to reach it, then the guest may use it.
//! # let region: Arc<GuestRegionMmap> =
//! #     Arc::new(GuestRegionMmap::from_range(GuestAddress(2 << 32), 64 << 20, None)?);
//! let larger = memory.memory().insert_region(region)?;
//! let removal = mappings.sync(&larger)?;
//! memory.lock().map_err(|_| "poisoned")?.replace(larger);
//! // Nothing was unplugged, so there is nothing to wait for. Otherwise this waits for requests.
//! removal.await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What it is not for
//!
//! Addresses are chosen by the [`AddressSpace`]: an I/O address is not a guest address. A device
//! that is passed through to the guest, whose driver knows guest addresses only, needs another
//! address space than this.
//!
//! # What to know about mapped guest memory
//!
//! * **It is pinned**: a mapper such as VFIO allocates all of it at once and locks it. It counts
//!   towards RLIMIT_MEMLOCK, and is never swapped out.
//! * **It must not be discarded** while it is mapped: ballooning, free page reporting, virtio-mem
//!   within a region, `madvise(MADV_DONTNEED)`, holes punched into a file, a file truncated. The
//!   guest would get fresh pages while the device goes on with the old ones: data is lost, silently.
//!   Remove the region first and wait for the [`Removal`].
//! * **What the device writes is not in vm-memory's dirty bitmap.** A VMM that migrates its guest
//!   marks it, when the device is done and before the guest is told: with `mark_dirty` of the
//!   bitmaps of the slices that [`GuestMemory::get_slices`] gives for the same range.

mod error;
#[cfg(test)]
mod tests;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::ptr::NonNull;
use std::task::{Context, Poll};

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestRegionMmap, MmapRegion, Permissions,
};

pub use self::error::{GuestRange, LookUpError, RegionError};

use crate::{AddressSpace, Direction, Error, FixedMapping, HostMemory, Mapped, Unregister};

/// Regions of guest memory, each a [fixed mapping](AddressSpace::register) of an address space for
/// as long as it is in here.
///
/// What counts is the memory, an [`MmapRegion`], not where the guest sees it: a region that moves
/// to another guest address stays mapped as it is, and one that the guest sees at two addresses is
/// mapped once. One `GuestMappings` is enough for an address space, whatever the number of virtual
/// devices behind it. Several share what they have in common; a [`Removal`] from the one that mapped
/// it then waits for the others.
///
/// Each region is mapped for the direction given to [`new`](Self::new), as far as its protection
/// permits: read-only memory (a ROM) among regions for [`Direction::Bidirectional`] is mapped
/// [`ToDevice`](Direction::ToDevice), and is not found by requests that would write it.
///
/// Changes call the mapper, which takes its time with large memory, and need exclusive access.
/// Look-ups don't go through here: [`AddressSpace::look_up_guest`] is open to all threads meanwhile.
///
/// Dropping it removes all regions as [`remove_all`](Self::remove_all) does.
#[derive(Debug)]
pub struct GuestMappings {
    space: AddressSpace,
    direction: Direction,
    regions: HashMap<Identity, Region>,
}

/// Which memory it is: the address of an [`MmapRegion`], which its registration keeps from being
/// another's.
type Identity = usize;

#[derive(Debug)]
struct Region {
    range: GuestRange,
    mapping: FixedMapping,
}

impl GuestMappings {
    /// Maps no memory yet.
    #[must_use]
    pub fn new(space: &AddressSpace, direction: Direction) -> Self {
        Self {
            space: space.clone(),
            direction,
            regions: HashMap::new(),
        }
    }

    /// Maps all regions of a guest's memory.
    ///
    /// # Errors
    ///
    /// [`RegionError`], about the first region that can't be mapped. None is then.
    pub fn of<B>(
        space: &AddressSpace,
        memory: &GuestMemoryMmap<B>,
        direction: Direction,
    ) -> Result<Self, RegionError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mut mappings = Self::new(space, direction);
        for region in memory.iter() {
            mappings.insert(region)?;
        }
        Ok(mappings)
    }

    /// Maps one region, if it isn't mapped yet, and says where.
    ///
    /// The mapping keeps the [`MmapRegion`], and with it the memory, until the device can no longer
    /// reach it. Memory that vm-memory was given as a pointer must stay in place until then: wait
    /// for the [`Removal`].
    ///
    /// If vm-memory has made it as a shared mapping of a file, the mapper is given the file, too.
    ///
    /// # Errors
    ///
    /// [`RegionError`]; nothing has changed then. [`Error::is_limit`] of its source tells whether it
    /// may succeed once there is more room.
    pub fn insert<B>(&mut self, region: &GuestRegionMmap<B>) -> Result<&FixedMapping, RegionError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let region = match self.regions.entry(identity(region)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => {
                vacant.insert(Region::map(&self.space, region, self.direction)?)
            }
        };
        Ok(&region.mapping)
    }

    /// Unregisters the memory of a region, whatever guest addresses it is at; nothing if it wasn't
    /// mapped. From now on look-ups don't find it, and the future resolves when the device can no
    /// longer reach it: when the last request that uses it has dropped its guard.
    pub fn remove<B: Bitmap>(&mut self, region: &GuestRegionMmap<B>) -> Option<Removal> {
        let region = self.regions.remove(&identity(region))?;
        Some(Removal::of([region]))
    }

    /// Unregisters all regions. See [`remove`](Self::remove).
    pub fn remove_all(&mut self) -> Removal {
        Removal::of(std::mem::take(&mut self.regions).into_values())
    }

    /// Makes this hold the regions of `memory`, no others: maps those that are new, all of them
    /// first, then unregisters those that are gone. The mapper hears nothing about the rest.
    ///
    /// The future resolves when the device can no longer reach what is gone; at once if nothing is.
    /// To plug memory, call this before the guest is told of it; to unplug it, after the guest has
    /// given it up. An older snapshot of the memory may be in use all the while: look-ups find of it
    /// what is mapped.
    ///
    /// For a moment both what is new and what is gone are mapped. If that is more than a limit
    /// allows, call this with what stays first.
    ///
    /// # Errors
    ///
    /// [`RegionError`], about the first region that can't be mapped. Nothing has changed then: those
    /// that had been mapped before it are unregistered again, and nothing else is. (If the mapper
    /// fails at that, too, they count among [`Usage::leaked_mappings`](crate::Usage::leaked_mappings).)
    pub fn sync<B>(&mut self, memory: &GuestMemoryMmap<B>) -> Result<Removal, RegionError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mut wanted = HashSet::new();
        let mut added = Vec::new();
        for region in memory.iter() {
            let identity = identity(region);
            if wanted.insert(identity) && !self.regions.contains_key(&identity) {
                let mapped = Region::map(&self.space, region, self.direction)?;
                added.push((identity, mapped));
            }
        }
        self.regions.extend(added);

        let gone = self
            .regions
            .extract_if(|identity, _| !wanted.contains(identity));
        let removal = Removal::of(gone.map(|(_, region)| region));
        for region in memory.iter() {
            if let Some(moved) = self.regions.get_mut(&identity(region)) {
                moved.range = GuestRange::of(region);
            }
        }
        Ok(removal)
    }

    /// The mapping of a region: where it is, and how many guards of it there are.
    #[must_use]
    pub fn mapping<B: Bitmap>(&self, region: &GuestRegionMmap<B>) -> Option<&FixedMapping> {
        let region = self.regions.get(&identity(region))?;
        Some(&region.mapping)
    }

    /// How many regions are mapped, each memory counted once.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether no region is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

fn identity<B>(region: &GuestRegionMmap<B>) -> Identity {
    std::ptr::from_ref::<MmapRegion<B>>(region).addr()
}

impl Region {
    fn map<B>(
        space: &AddressSpace,
        region: &GuestRegionMmap<B>,
        wanted: Direction,
    ) -> Result<Self, RegionError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let range = GuestRange::of(region);
        let (addr, len) = (region.as_ptr(), region.size());
        let Some(direction) = permitted(wanted, region.prot()) else {
            return Err(RegionError::Protection {
                region: range,
                prot: region.prot(),
                direction: wanted,
            });
        };
        // Pages of the IOMMU may be larger than the host's. What else lies in them is neither kept
        // in place by the region nor the device's to reach.
        if (addr.addr() | len) & (space.page_size() - 1) != 0 {
            return Err(RegionError::PartialPages {
                region: range,
                addr: addr.addr(),
                page_size: space.page_size(),
            });
        }
        let refused = |source| RegionError::Map {
            region: range,
            source,
        };
        let addr =
            NonNull::new(addr).ok_or_else(|| refused(Error::OutOfBounds { addr: 0, len }))?;
        let mut memory = HostMemory::new(addr, len);
        if let Some(file) = shared_file(region) {
            memory = memory.with_file(file.file().as_fd(), file.start());
        }
        // SAFETY: the owner is the `MmapRegion` itself, which keeps its mapping in place until it is
        // dropped; where it doesn't own the mapping, whoever gave vm-memory the pointer has promised
        // that. The memory is whole pages, checked above, and so protected that the device may access
        // it in this direction (`permitted`). vm-memory gives out no references to guest memory but
        // to atomics: its safe functions copy from and to `VolatileSlice`s, because the guest changes
        // the memory at any time, just as the device does. The file is the memory (`shared_file`).
        let mapping = unsafe { space.try_register(memory, direction, region.get_mmap()) };
        let mapping = mapping.map_err(refused)?;
        Ok(Self { range, mapping })
    }
}

/// What of `wanted` memory of this protection permits.
fn permitted(wanted: Direction, prot: i32) -> Option<Direction> {
    let reads = wanted != Direction::FromDevice && prot & libc::PROT_READ != 0;
    let writes = wanted != Direction::ToDevice && prot & libc::PROT_WRITE != 0;
    match (reads, writes) {
        (true, true) => Some(Direction::Bidirectional),
        (true, false) => Some(Direction::ToDevice),
        (false, true) => Some(Direction::FromDevice),
        (false, false) => None,
    }
}

/// The file that a region is a shared mapping of, where that is certain.
fn shared_file<B: Bitmap>(region: &MmapRegion<B>) -> Option<&FileOffset> {
    // Whoever gives vm-memory a mapping of their own may name any file with it.
    let is_shared = region.owned()
        && region.flags() & (libc::MAP_SHARED | libc::MAP_ANONYMOUS) == libc::MAP_SHARED;
    region.file_offset().filter(|_| is_shared)
}

/// Resolves when the device can no longer reach the regions that were removed, and their memory is
/// no longer held on this account. What somebody else has registered too stays in its reach for
/// them.
///
/// # Errors
///
/// [`RegionError::Unmap`] if a region could not be unmapped, about the first one if there are
/// several; all others have been waited for. The memory of those that could not is never freed,
/// counted in [`Usage::leaked_mappings`](crate::Usage::leaked_mappings) and logged.
///
/// # Cancel safety
///
/// The regions were unregistered by the call that returned this. Dropping it changes nothing.
#[derive(Debug)]
#[must_use = "the device may reach the memory until this resolves"]
pub struct Removal {
    leaving: Vec<(GuestRange, Unregister)>,
    failure: Option<RegionError>,
}

impl Removal {
    fn of(regions: impl IntoIterator<Item = Region>) -> Self {
        let leaving = regions
            .into_iter()
            .map(|Region { range, mapping }| (range, mapping.unregister()));
        Self {
            leaving: leaving.collect(),
            failure: None,
        }
    }
}

impl Future for Removal {
    type Output = Result<(), RegionError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { leaving, failure } = &mut *self;
        leaving.retain_mut(|(region, unregister)| match Pin::new(unregister).poll(cx) {
            Poll::Pending => true,
            Poll::Ready(Ok(())) => false,
            Poll::Ready(Err(source)) => {
                failure.get_or_insert(RegionError::Unmap {
                    region: *region,
                    source,
                });
                false
            }
        });
        if leaving.is_empty() {
            Poll::Ready(failure.take().map_or(Ok(()), Err))
        } else {
            Poll::Pending
        }
    }
}

impl AddressSpace {
    /// [Looks up](Self::look_up) the guest memory of a request: the guards for `len` bytes from
    /// `addr` on, in order, a further one wherever the range goes on in another region. Usually it
    /// is one.
    ///
    /// `memory` is the caller's view of the guest's memory, for example a snapshot that it took from
    /// a `GuestMemoryAtomic`. With [`GuestMemoryMmap`] this costs a binary search among the regions
    /// and a look-up for each piece, and takes no lock and allocates nothing. With memory behind a
    /// virtual IOMMU the guest's addresses are what its IOMMU translates, with the permissions that
    /// `direction` needs, and at the price of that.
    ///
    /// Addresses and lengths may come from the guest: a bad one is an error. An empty range has no
    /// pieces.
    ///
    /// # Errors
    ///
    /// [`LookUpError`], of the piece at that place. No piece follows one that is not in guest memory;
    /// to stop at the first error of either kind, collect into a `Result`, which drops the guards
    /// before it.
    pub fn look_up_guest<'a, M: GuestMemory>(
        &'a self,
        memory: &'a M,
        addr: GuestAddress,
        len: usize,
        direction: Direction,
    ) -> impl Iterator<Item = Result<Mapped, LookUpError>> + 'a {
        let slices = match addr.checked_add(len as u64) {
            Some(_) => memory.get_slices(addr, len, permissions(direction)),
            None => Err(GuestMemoryError::GuestAddressOverflow),
        };
        let (slices, refused) = match slices {
            Ok(slices) => (Some(slices), None),
            Err(error) => (None, Some(Err(error))),
        };
        let mut next = addr;
        let pieces = slices.into_iter().flatten().chain(refused);
        pieces.map(move |slice| {
            let addr = next;
            let slice = slice.map_err(|source| LookUpError::NotGuestMemory { addr, source })?;
            let len = slice.len();
            next = addr.unchecked_add(len as u64);
            self.look_up(slice.ptr_guard().as_ptr(), len, direction)
                .ok_or(LookUpError::NotMapped {
                    addr,
                    len,
                    direction,
                })
        })
    }
}

/// What the guest must permit.
fn permissions(direction: Direction) -> Permissions {
    match direction {
        Direction::ToDevice => Permissions::Read,
        Direction::FromDevice => Permissions::Write,
        Direction::Bidirectional => Permissions::ReadWrite,
    }
}
