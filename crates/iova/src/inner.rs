//! An address space as its mappings see it: what is mapped and unmapped, and by which rules.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::lease::{Kind, Lease, Mapping};
use crate::ranges::{Alignment, End, FreeRanges};
use crate::state::State;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{Apart, Mutex, lock};
use crate::table::{END_OF_HOST, Found, Table};
use crate::{Direction, DmaMapper, Error, HostMemory, MapError, Mapped, Retention};

/// An address space without its handles. Whatever is mapped keeps it.
pub(crate) struct Space {
    mapper: Arc<dyn DmaMapper>,
    pub(crate) page_size: u64,
    page_sizes: u64,
    pub(crate) max_mappings: Option<u64>,
    unmaps_runs: bool,
    pub(crate) retention: Retention,
    pub(crate) table: Table<Lease>,
    /// Raised each time that kept mappings are given up.
    pub(crate) generation: AtomicU32,
    /// Apart from what each look-up reads.
    pub(crate) look_up_misses: Apart<AtomicU64>,
    pub(crate) state: Mutex<State>,
}

impl Space {
    /// See [`AddressSpace::with_retention`](crate::AddressSpace::with_retention).
    pub(crate) fn new(mapper: Arc<dyn DmaMapper>, retention: Retention) -> Result<Self, Error> {
        let geometry = mapper.geometry();
        let page_size = geometry.page_sizes & geometry.page_sizes.wrapping_neg();
        if page_size == 0 || usize::try_from(page_size).is_err() {
            return Err(Error::Geometry {
                reason: "no page size is supported",
            });
        }
        let free = FreeRanges::new(&geometry.usable, page_size)?;
        Ok(Self {
            mapper,
            page_size,
            page_sizes: geometry.page_sizes,
            max_mappings: geometry.max_mappings,
            unmaps_runs: geometry.unmaps_runs,
            retention,
            table: Table::new(),
            generation: AtomicU32::new(0),
            look_up_misses: Apart(AtomicU64::new(0)),
            state: Mutex::new(State::new(free)),
        })
    }

    #[inline]
    pub(crate) fn look_up(&self, addr: usize, len: usize, direction: Direction) -> Option<Mapped> {
        let found = len
            .checked_sub(1)
            .and_then(|rest| addr.checked_add(rest))
            .and_then(|last| self.find(addr, last, direction));
        let Some(found) = found else {
            self.look_up_misses.0.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        Some(Mapped::new(found.pinned, found.iova, len))
    }

    /// The mapping that holds `first..=last`, which counts as used now.
    #[inline]
    pub(crate) fn find(
        &self,
        first: usize,
        last: usize,
        direction: Direction,
    ) -> Option<Found<Lease>> {
        let found = self.table.find(first, last, direction, |_| true)?;
        if found.temporary {
            let generation = self.generation.load(Ordering::Relaxed);
            found.pinned.slot().set_used(generation);
        }
        Some(found)
    }

    /// The whole pages around `memory`.
    pub(crate) fn whole_pages<'fd>(
        &self,
        memory: &HostMemory<'fd>,
    ) -> Result<HostMemory<'fd>, Error> {
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
        let end = (addr - offset).checked_add(len);
        let (Some(first), Some(_)) = (first, end.filter(|end| *end <= END_OF_HOST)) else {
            return Err(out_of_bounds);
        };
        let pages = HostMemory::new(first, len);
        let Some((fd, file_offset)) = memory.file() else {
            return Ok(pages);
        };
        if file_offset & (self.page_size - 1) != offset as u64 {
            return Err(Error::Misaligned {
                addr,
                offset: file_offset,
                page_size: self.page_size,
            });
        }
        Ok(pages.with_file(fd, file_offset - offset as u64))
    }

    /// How far into its first page `memory` begins.
    pub(crate) fn offset(&self, memory: &HostMemory<'_>) -> u64 {
        memory.addr().addr().get() as u64 & (self.page_size - 1)
    }

    /// Takes addresses and an entry for `pages`; whether there is an entry was checked.
    pub(crate) fn reserve(
        &self,
        state: &mut State,
        pages: &HostMemory<'_>,
        kind: Kind,
    ) -> Result<u64, Error> {
        let len = pages.len() as u64;
        let end = match kind {
            Kind::Fixed => End::Lowest,
            Kind::Temporary => End::Highest,
        };
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

    /// Maps `pages` at `iova`, which was reserved for that. If it fails, that is undone.
    ///
    /// # Safety
    ///
    /// The pages are what [`DmaMapper::map`] requires, until the mapping was removed.
    pub(crate) unsafe fn carry_out(
        &self,
        iova: u64,
        pages: &HostMemory<'_>,
        direction: Direction,
        kind: Kind,
    ) -> Result<u64, Error> {
        // SAFETY: the caller answers for the memory. The addresses are free, usable and aligned
        // (the allocator's invariant), and reserved until they are unmapped.
        let map = || unsafe { self.mapper.map(iova, pages, direction) };
        match catch_unwind(AssertUnwindSafe(map)) {
            Ok(Ok(())) => Ok(iova),
            Ok(Err(error)) => Err(self.refused(iova, pages.len() as u64, kind, error)),
            Err(panic) => {
                // What it did before it panicked is unknown.
                self.change(|state| state.leak(pages.len() as u64, kind));
                resume_unwind(panic)
            }
        }
    }

    /// Undoes [`reserve`](Self::reserve) after the mapper refused.
    fn refused(&self, iova: u64, len: u64, kind: Kind, error: MapError) -> Error {
        let in_use = self.change(|state| {
            if matches!(error, MapError::AlreadyMapped) {
                // Not ours, and never handed out again: what a device reads or writes there is
                // another mapping's memory.
                state.leak(len, kind);
            } else {
                state.give_back(iova, len, kind);
            }
            state.tallies
        });
        if matches!(error, MapError::AlreadyMapped) {
            tracing::error!(
                iova = format_args!("{iova:#x}"),
                len = format_args!("{len:#x}"),
                "the mapper has something mapped at a free address: no longer used"
            );
        }
        match error {
            // Fewer than announced, if that was: others may use the same IOMMU.
            MapError::OutOfEntries => Error::MappingLimit {
                needed: 1,
                in_use: in_use.mappings(),
                max: None,
            },
            MapError::MemoryLimit => Error::MemoryLimit {
                len,
                mapped: in_use.bytes(),
            },
            source => Error::Map { iova, len, source },
        }
    }

    /// Gives back what was [reserved](Self::reserve) and not mapped.
    pub(crate) fn give_back(&self, iova: u64, len: u64, kind: Kind) {
        self.change(|state| state.give_back(iova, len, kind));
    }

    /// Removes mappings and drops their owners. Those that can't be removed are leaked.
    ///
    /// Whatever panics, a mapper or an owner, all of that is done for all of them.
    pub(crate) fn remove(&self, mut mappings: Vec<Mapping>) {
        mappings.sort_unstable_by_key(|mapping| mapping.iova);
        let mut panic = None;
        let runs =
            mappings.chunk_by(|one, next| self.unmaps_runs && one.iova + one.len == next.iova);
        let results: Vec<_> = runs
            .map(|run| {
                let result = self.unmap(run).unwrap_or_else(|payload| {
                    panic.get_or_insert(payload);
                    Err(MapError::Invalid {
                        reason: "the mapper panicked".to_owned(),
                    })
                });
                (run.len(), result.map_err(Arc::new))
            })
            .collect();
        let mut mappings = mappings.into_iter();
        for (count, result) in results {
            for mapping in mappings.by_ref().take(count) {
                match &result {
                    Ok(()) => {
                        let removed = catch_unwind(AssertUnwindSafe(|| mapping.removed()));
                        panic = panic.or_else(|| removed.err());
                    }
                    Err(error) => mapping.leaked(error),
                }
            }
        }
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Unmaps mappings that lie side by side, and gives back or leaks their addresses.
    fn unmap(&self, run: &[Mapping]) -> std::thread::Result<Result<(), MapError>> {
        let iova = run.first().map_or(0, |first| first.iova);
        let len = run.iter().map(|mapping| mapping.len).sum();
        let result = catch_unwind(AssertUnwindSafe(|| self.mapper.unmap(iova, len)));
        self.change(|state| {
            for mapping in run {
                match result {
                    Ok(Ok(())) => state.give_back(mapping.iova, mapping.len, mapping.kind),
                    _ => state.leak(mapping.len, mapping.kind),
                }
            }
        });
        if let Ok(Err(error)) = &result {
            tracing::error!(
                iova = format_args!("{iova:#x}"),
                len = format_args!("{len:#x}"),
                %error,
                "unmapping failed: the addresses and the memory's owner are leaked"
            );
        }
        result
    }

    /// Changes something that the first one who waits may be waiting for, and wakes it.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let result = change(&mut state);
        state.releases += 1;
        let waker = state.waiters.wake_first();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        result
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").finish_non_exhaustive()
    }
}
