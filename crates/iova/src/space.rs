//! The address space itself.

use std::any::Any;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ranges::{Alignment, DEFAULT_RANGE, End, FreeRanges};
use crate::table::{Entry, Table};
use crate::{Direction, DmaMapper, Error, FixedMapping, HostMemory, IovaRange, MapError, Mapped};

/// Keeps memory alive and unmoved for as long as it is held: a clone of the `Arc` or `Bytes` that
/// the memory belongs to, for example.
pub type Owner = Arc<dyn Any + Send + Sync>;

/// One device's I/O virtual address space. Clones are handles to the same one.
///
/// The [crate documentation](crate) shows the model. Nothing here blocks except for the mapper's
/// own calls and short locks, and none of the locks is held during a mapper's call or an owner's
/// drop.
#[derive(Clone)]
pub struct AddressSpace {
    space: Arc<Space>,
}

impl AddressSpace {
    /// What is used when the mapper reports no usable range: 39 bits of addresses, the least that
    /// IOMMUs have in practice, without the lowest 64 KiB.
    pub const DEFAULT_RANGE: IovaRange = DEFAULT_RANGE;

    /// An address space in which nothing is mapped, over all whole pages that `mapper` calls
    /// usable (except for the very first and the very last page of 64-bit addresses).
    ///
    /// # Errors
    ///
    /// [`Error::Geometry`] when no page size is supported, a usable range ends before it begins,
    /// or no whole page is usable.
    pub fn new(mapper: Arc<dyn DmaMapper>) -> Result<Self, Error> {
        let geometry = mapper.geometry();
        let page_size = geometry.page_sizes & geometry.page_sizes.wrapping_neg();
        if page_size == 0 || usize::try_from(page_size).is_err() {
            return Err(Error::Geometry {
                reason: "no page size is supported",
            });
        }
        let free = FreeRanges::new(&geometry.usable, page_size)?;
        let space = Space {
            mapper,
            page_size,
            page_sizes: geometry.page_sizes,
            max_mappings: geometry.max_mappings,
            table: Table::new(),
            look_up_misses: AtomicU64::new(0),
            state: Mutex::new(State {
                free,
                tallies: Tallies::default(),
            }),
        };
        Ok(Self {
            space: Arc::new(space),
        })
    }

    /// Maps memory for as long as the returned [`FixedMapping`] is kept, at the lowest free
    /// addresses, and lets [`look_up`](Self::look_up) find it.
    ///
    /// The whole pages around the memory become reachable for the device, but look-ups answer only
    /// for the bytes given. The same or overlapping memory may be registered any number of times:
    /// each registration is a mapping of its own, at other addresses, with its own guards.
    ///
    /// `owner` is dropped only after the mapping was removed: by the drop of the `FixedMapping` or
    /// of the last [`Mapped`] guard of it, whichever is later. If removing fails, owner and
    /// addresses are leaked on purpose, counted in [`Usage::leaked_mappings`] and logged.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing is mapped then, and `owner` has been dropped.
    ///
    /// # Safety
    ///
    /// As long as `owner` is held, the caller keeps to the following.
    ///
    /// * All pages ([`page_size`](Self::page_size)) that the memory touches stay where they are,
    ///   and are readable for the device and, unless `direction` is [`Direction::ToDevice`],
    ///   writable.
    /// * No reference is held to bytes that the device is made to write, and no mutable reference
    ///   to those that it is made to read, while it may do so: from when their I/O address is given
    ///   to the device until it is done with them. This holds for whatever [`look_up`](
    ///   Self::look_up) finds in the memory too.
    /// * If a file is given, its bytes at that offset are that memory, in a shared mapping.
    pub unsafe fn register(
        &self,
        memory: HostMemory<'_>,
        direction: Direction,
        owner: Owner,
    ) -> Result<FixedMapping, Error> {
        // SAFETY: the caller keeps the memory in place until `owner` is dropped, and the lease
        // drops it only after it was unmapped.
        let (lease, iova) = unsafe { self.map(memory, direction, Kind::Fixed, Some(owner)) }?;
        let first = memory.addr().addr().get();
        self.space.table.insert(Entry {
            first,
            last: first + (memory.len() - 1),
            iova,
            direction,
            lease: Arc::downgrade(&lease),
        });
        Ok(FixedMapping::new(lease, first, iova, memory.len()))
    }

    /// Maps memory for one request, at the highest free addresses.
    ///
    /// The whole pages around the memory become reachable for the device; the guard's
    /// [`iova`](Mapped::iova) is that of the first byte given. Each call makes a mapping of its
    /// own, which goes away with its guard.
    ///
    /// An `owner` is treated as in [`register`](Self::register). Without one, the memory can't be
    /// kept from being freed when removing the mapping fails: the addresses are leaked and counted,
    /// and what keeps the device from the memory is only that it was done with it.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing is mapped then, and `owner` has been dropped.
    ///
    /// # Safety
    ///
    /// As for [`register`](Self::register), for as long as `owner` is held; without an owner, until
    /// the guard was dropped, which must not be before the device is done with the memory.
    pub unsafe fn map_temporary(
        &self,
        memory: HostMemory<'_>,
        direction: Direction,
        owner: Option<Owner>,
    ) -> Result<Mapped, Error> {
        // SAFETY: the caller keeps the memory in place until `owner` is dropped or, without one,
        // until the guard is, which holds the only reference to the lease.
        let (lease, iova) = unsafe { self.map(memory, direction, Kind::Temporary, owner) }?;
        Ok(Mapped::new(lease, iova, memory.len()))
    }

    /// The fixed mapping that holds all of `addr..addr + len` and allows `direction`.
    ///
    /// Takes no lock and makes neither a system call nor an allocation (except for one small
    /// allocation the first time that a thread calls it). A buffer that reaches from one
    /// registration into the next is not found, nor is an empty one. The pointer is compared, never
    /// followed.
    #[must_use]
    pub fn look_up(&self, addr: *const u8, len: usize, direction: Direction) -> Option<Mapped> {
        let found = len
            .checked_sub(1)
            .and_then(|rest| addr.addr().checked_add(rest))
            .and_then(|last| self.space.table.find(addr.addr(), last, direction));
        if found.is_none() {
            self.space.look_up_misses.fetch_add(1, Ordering::Relaxed);
        }
        found.map(|(lease, iova)| Mapped::new(lease, iova, len))
    }

    /// The smallest page of the IOMMU in bytes, a power of two: what mappings are rounded out to.
    #[must_use]
    pub fn page_size(&self) -> usize {
        // Fits: checked by `new`.
        self.space.page_size as usize
    }

    /// What is in use now.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let state = self.space.lock();
        let Tallies {
            fixed,
            temporary,
            leaked,
        } = state.tallies;
        Usage {
            fixed_mappings: fixed.mappings,
            fixed_bytes: fixed.bytes,
            temporary_mappings: temporary.mappings,
            temporary_bytes: temporary.bytes,
            leaked_mappings: leaked.mappings,
            leaked_bytes: leaked.bytes,
            max_mappings: self.space.max_mappings,
            free_bytes: state.free.total(),
            look_up_misses: self.space.look_up_misses.load(Ordering::Relaxed),
        }
    }

    /// Maps the whole pages around `memory`; returns the lease and the I/O address of the first
    /// byte.
    ///
    /// # Safety
    ///
    /// The pages are what [`DmaMapper::map`] requires, until `owner` is dropped or, without one,
    /// until the lease is.
    unsafe fn map(
        &self,
        memory: HostMemory<'_>,
        direction: Direction,
        kind: Kind,
        owner: Option<Owner>,
    ) -> Result<(Arc<Lease>, u64), Error> {
        let (pages, offset) = self.space.whole_pages(&memory)?;
        let len = pages.len() as u64;
        let iova = self.space.reserve(&pages, kind)?;
        // SAFETY: the caller answers for the memory. The addresses are free, usable and aligned
        // (the allocator's invariant), and reserved until they are unmapped.
        if let Err(error) = unsafe { self.space.mapper.map(iova, &pages, direction) } {
            return Err(self.space.refused(iova, len, kind, error));
        }
        let lease = Lease {
            space: Arc::clone(&self.space),
            iova,
            len,
            kind,
            owner,
        };
        Ok((Arc::new(lease), iova + offset))
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

/// What of an [`AddressSpace`] is in use. Bytes are counted in whole pages; memory that is mapped
/// twice counts twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Mappings made by [`AddressSpace::register`].
    pub fixed_mappings: u64,
    /// Their size in bytes.
    pub fixed_bytes: u64,
    /// Mappings made by [`AddressSpace::map_temporary`].
    pub temporary_mappings: u64,
    /// Their size in bytes.
    pub temporary_bytes: u64,
    /// Mappings that could not be removed, and addresses that turned out to be in use by someone
    /// else. They and their owners are kept for ever.
    pub leaked_mappings: u64,
    /// Their size in bytes.
    pub leaked_bytes: u64,
    /// How many mappings there can be at a time, leaked ones included, as far as the mapper knows.
    pub max_mappings: Option<u64>,
    /// Free I/O virtual addresses, in bytes.
    pub free_bytes: u64,
    /// How many look-ups found nothing, since the beginning. (Hits aren't counted: a shared counter
    /// would cost as much as they do.)
    pub look_up_misses: u64,
}

/// A live mapping. Its drop, when the last guard and the registration are gone, removes it.
pub(crate) struct Lease {
    space: Arc<Space>,
    iova: u64,
    /// In whole pages, as mapped.
    len: u64,
    kind: Kind,
    owner: Option<Owner>,
}

impl Lease {
    /// Hides a fixed mapping, which starts at host address `first`, from look-ups.
    pub(crate) fn unpublish(self: &Arc<Self>, first: usize) {
        self.space.table.remove(first, &Arc::downgrade(self));
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Not dropped by an unwinding mapper either.
        let owner = ManuallyDrop::new(self.owner.take());
        match self.space.mapper.unmap(self.iova, self.len) {
            Ok(()) => {
                self.space.give_back(self.iova, self.len, self.kind);
                drop(ManuallyDrop::into_inner(owner));
            }
            Err(error) => {
                self.space.leak(self.len, self.kind);
                tracing::error!(
                    iova = format_args!("{:#x}", self.iova),
                    len = format_args!("{:#x}", self.len),
                    %error,
                    "unmapping failed: the addresses and the memory's owner are leaked"
                );
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Fixed,
    Temporary,
}

struct Space {
    mapper: Arc<dyn DmaMapper>,
    page_size: u64,
    page_sizes: u64,
    max_mappings: Option<u64>,
    table: Table<Lease>,
    look_up_misses: AtomicU64,
    state: Mutex<State>,
}

struct State {
    free: FreeRanges,
    tallies: Tallies,
}

/// Counts what isn't free: what is mapped, and what is being mapped or unmapped.
#[derive(Clone, Copy, Default)]
struct Tallies {
    fixed: Tally,
    temporary: Tally,
    leaked: Tally,
}

impl Tallies {
    fn of(&mut self, kind: Kind) -> &mut Tally {
        match kind {
            Kind::Fixed => &mut self.fixed,
            Kind::Temporary => &mut self.temporary,
        }
    }

    fn mappings(&self) -> u64 {
        self.fixed.mappings + self.temporary.mappings + self.leaked.mappings
    }

    fn bytes(&self) -> u64 {
        self.fixed.bytes + self.temporary.bytes + self.leaked.bytes
    }
}

#[derive(Clone, Copy, Default)]
struct Tally {
    mappings: u64,
    bytes: u64,
}

impl Tally {
    fn add(&mut self, len: u64) {
        self.mappings += 1;
        self.bytes += len;
    }

    fn remove(&mut self, len: u64) {
        self.mappings -= 1;
        self.bytes -= len;
    }
}

impl Space {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock calls foreign code, so a poisoned state is still a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole pages around `memory`, and how far into them it begins.
    fn whole_pages<'fd>(&self, memory: &HostMemory<'fd>) -> Result<(HostMemory<'fd>, u64), Error> {
        if memory.is_empty() {
            return Err(Error::Empty);
        }
        let addr = memory.addr().addr().get();
        let out_of_bounds = Error::OutOfBounds {
            addr,
            len: memory.len(),
        };
        // Fits: checked by `AddressSpace::new`.
        let page_size = self.page_size as usize;
        let offset = addr & (page_size - 1);
        let len = memory.len().checked_add(offset);
        let Some(len) = len.and_then(|len| len.checked_next_multiple_of(page_size)) else {
            return Err(out_of_bounds);
        };
        let first = NonNull::new(memory.addr().as_ptr().wrapping_sub(offset));
        let (Some(first), Some(_)) = (first, (addr - offset).checked_add(len)) else {
            return Err(out_of_bounds);
        };
        let pages = HostMemory::new(first, len);
        let Some((fd, file_offset)) = memory.file() else {
            return Ok((pages, offset as u64));
        };
        if file_offset & (self.page_size - 1) != offset as u64 {
            return Err(Error::Misaligned {
                addr,
                offset: file_offset,
                page_size: self.page_size,
            });
        }
        Ok((
            pages.with_file(fd, file_offset - offset as u64),
            offset as u64,
        ))
    }

    /// Takes addresses and an entry for `pages`.
    fn reserve(&self, pages: &HostMemory<'_>, kind: Kind) -> Result<u64, Error> {
        let len = pages.len() as u64;
        let end = match kind {
            Kind::Fixed => End::Lowest,
            Kind::Temporary => End::Highest,
        };
        let state = &mut *self.lock();
        let in_use = state.tallies.mappings();
        if self.max_mappings.is_some_and(|max| in_use >= max) {
            return Err(Error::MappingLimit {
                in_use,
                max: self.max_mappings,
            });
        }
        let iova = self
            .alignments(pages)
            .find_map(|alignment| state.free.take(len, end, alignment))
            .ok_or_else(|| Error::OutOfAddresses {
                len,
                free: state.free.total(),
                largest: state.free.largest(),
            })?;
        state.tallies.of(kind).add(len);
        Ok(iova)
    }

    /// The alignments to try in turn: like the host address within the largest page that could be
    /// used, so that the IOMMU can use it; then any page.
    fn alignments(&self, pages: &HostMemory<'_>) -> impl Iterator<Item = Alignment> {
        /// The larger pages of IOMMUs, those that are worth leaving gaps for.
        const LARGE: [u64; 2] = [0x4000_0000, 0x20_0000];

        let (addr, len) = (pages.addr().addr().get() as u64, pages.len() as u64);
        let (page_sizes, page_size) = (self.page_sizes, self.page_size);
        LARGE
            .into_iter()
            .filter(move |size| page_sizes & size != 0 && *size > page_size && *size <= len)
            .chain([page_size])
            .map(move |modulus| Alignment {
                modulus,
                residue: addr & (modulus - 1),
            })
    }

    /// Undoes [`reserve`](Self::reserve) after the mapper refused.
    fn refused(&self, iova: u64, len: u64, kind: Kind, error: MapError) -> Error {
        let in_use = {
            let tallies = self.lock().tallies;
            Tally {
                mappings: tallies.mappings() - 1,
                bytes: tallies.bytes() - len,
            }
        };
        if matches!(error, MapError::AlreadyMapped) {
            // Not ours, and never handed out again: what a device reads or writes there is another
            // mapping's memory.
            self.leak(len, kind);
            tracing::error!(
                iova = format_args!("{iova:#x}"),
                len = format_args!("{len:#x}"),
                "the mapper has something mapped at a free address: no longer used"
            );
        } else {
            self.give_back(iova, len, kind);
        }
        match error {
            MapError::OutOfEntries => Error::MappingLimit {
                in_use: in_use.mappings,
                max: self.max_mappings,
            },
            MapError::MemoryLimit => Error::MemoryLimit {
                len,
                mapped: in_use.bytes,
            },
            source => Error::Map { iova, len, source },
        }
    }

    fn give_back(&self, iova: u64, len: u64, kind: Kind) {
        let mut state = self.lock();
        state.tallies.of(kind).remove(len);
        state.free.give_back(iova, len);
    }

    /// Counts as leaked what was counted as `kind`; the addresses stay taken.
    fn leak(&self, len: u64, kind: Kind) {
        let mut state = self.lock();
        state.tallies.of(kind).remove(len);
        state.tallies.leaked.add(len);
    }
}
