//! The address space itself.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::inner::Space;
use crate::ranges::DEFAULT_RANGE;
use crate::state::{Amount, Tallies};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::{
    Direction, DmaMapper, Error, FixedMapping, HostMemory, IovaRange, MapRequest, Mapped, Register,
    Segment,
};

/// Keeps memory alive and unmoved for as long as it is held: a clone of the `Arc` or `Bytes` that
/// the memory belongs to, for example.
pub type Owner = Arc<dyn Any + Send + Sync>;

/// One device's I/O virtual address space. Clones are handles to the same one.
///
/// The [crate documentation](crate) shows the model. Nothing here blocks except for the mapper's
/// own calls and short locks, and none of the locks is held during a mapper's call, an owner's drop
/// or a wake-up.
///
/// When the last handle is dropped, kept mappings are removed. Registrations, guards and requests
/// may outlive it.
#[derive(Clone)]
pub struct AddressSpace {
    handle: Arc<Handle>,
}

/// What all clones of an [`AddressSpace`] share, and mappings don't.
struct Handle {
    space: Arc<Space>,
}

/// How much an address space may keep for later: temporary mappings that no request uses, of memory
/// that came with an owner.
///
/// What is kept stays pinned, and its owner held. It is given up when room is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// At most so many bytes, in whole pages; 64 MiB by default. What is in use counts too.
    pub bytes: u64,
    /// At most so many mappings; 65,536 by default. There are never more than the mapper allows.
    pub mappings: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            bytes: 64 << 20,
            mappings: 65_536,
        }
    }
}

impl Retention {
    /// Keeps nothing.
    pub const NONE: Self = Self {
        bytes: 0,
        mappings: 0,
    };
}

impl AddressSpace {
    /// What is used when the mapper reports no usable range: 39 bits of addresses, the least that
    /// IOMMUs have in practice, without the lowest 64 KiB.
    pub const DEFAULT_RANGE: IovaRange = DEFAULT_RANGE;

    /// An address space in which nothing is mapped, over all whole pages that `mapper` calls
    /// usable (except for the very first and the very last page of 64-bit addresses), with the
    /// default [`Retention`].
    ///
    /// # Errors
    ///
    /// [`Error::Geometry`] when no page size is supported, a usable range ends before it begins,
    /// or no whole page is usable.
    pub fn new(mapper: Arc<dyn DmaMapper>) -> Result<Self, Error> {
        Self::with_retention(mapper, Retention::default())
    }

    /// As [`new`](Self::new), with a limit of one's own on what is kept for later.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_retention(mapper: Arc<dyn DmaMapper>, retention: Retention) -> Result<Self, Error> {
        let space = Arc::new(Space::new(mapper, retention)?);
        Ok(Self {
            handle: Arc::new(Handle { space }),
        })
    }

    /// Maps memory for as long as the [`FixedMapping`] that the future gives is kept, at the lowest
    /// free addresses, and lets [`look_up`](Self::look_up) find it.
    ///
    /// The whole pages around the memory become reachable for the device, but look-ups answer only
    /// for the bytes given.
    ///
    /// The same memory may be registered several times (each registration makes it take a little
    /// longer to look that memory up). Memory that lies within another
    /// registration of the same direction shares its mapping; a mapping goes away with the last of
    /// those who share it. Memory that overlaps others without lying within one of them gets a
    /// mapping of its own.
    ///
    /// When a limit is reached, it is as with [`map`](Self::map), whose queue this shares: kept
    /// temporary mappings are removed to make room, and if that is not enough the registration waits
    /// for requests to finish.
    ///
    /// `owner` is dropped only after the device can no longer reach the memory on behalf of this
    /// registration: after the drop of the `FixedMapping`, and of the last [`Mapped`] guard of it,
    /// and of those registrations that share the mapping that was made for this one. If removing
    /// fails, owner and addresses are leaked on purpose, counted in [`Usage::leaked_mappings`] and
    /// logged.
    ///
    /// # Errors
    ///
    /// The future gives an [`Error`] if the memory can't be mapped, even after waiting for all
    /// requests; nothing is mapped then, and `owner` has been dropped.
    ///
    /// # Cancel safety
    ///
    /// Nothing is done before the first poll. Dropping the future gives up the place in the queue.
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
    pub unsafe fn register<'fd>(
        &self,
        memory: HostMemory<'fd>,
        direction: Direction,
        owner: Owner,
    ) -> Register<'fd> {
        Register::new(Arc::clone(&self.handle.space), memory, direction, owner)
    }

    /// As [`register`](Self::register), without waiting, neither for room nor for those who wait for
    /// it: for memory that others depend on, such as queues.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::is_limit`] tells whether the same may succeed later. Nothing is mapped
    /// then, and `owner` has been dropped.
    ///
    /// # Safety
    ///
    /// As for [`register`](Self::register).
    pub unsafe fn try_register(
        &self,
        memory: HostMemory<'_>,
        direction: Direction,
        owner: Owner,
    ) -> Result<FixedMapping, Error> {
        Register::new(Arc::clone(&self.handle.space), memory, direction, owner).now()
    }

    /// The mapping that holds all of `addr..addr + len` and allows `direction`: a fixed one, or a
    /// temporary one that is kept.
    ///
    /// Takes no lock and makes neither a system call nor an allocation. A buffer that reaches from
    /// one mapping into the next is not found, nor is an empty one. The pointer is compared, never
    /// followed.
    #[must_use]
    #[inline]
    pub fn look_up(&self, addr: *const u8, len: usize, direction: Direction) -> Option<Mapped> {
        self.handle.space.look_up(addr.addr(), len, direction)
    }

    /// Maps the memory of one request, waiting for room if there is none: a future that resolves
    /// to a guard for each segment, in their order, once all are mapped. Nothing is done before it
    /// is first polled.
    ///
    /// What is mapped already is used as it is. Other memory is mapped at the highest free
    /// addresses, the whole pages around it. If the segment came with an
    /// [owner](Segment::owned_by), the mapping may be kept after the request and found again, by
    /// this function or by [`look_up`](Self::look_up), within the limits of [`Retention`]; without
    /// one it goes away with its guard. Unowned segments that lie side by side share one mapping.
    ///
    /// When a limit is reached (I/O addresses, number of mappings, locked memory), the request does
    /// without what it doesn't need (the rest of an owner's memory), and mappings that are kept and
    /// unused are removed, least recently used ones first and an eighth of them at a time (at most
    /// 64). If that is not enough the request waits. Requests are served in order of arrival, but one
    /// that needs nothing new waits for nobody. Of the mappings that others use, as many as the first
    /// in the queue needs are used for no further request.
    ///
    /// # Errors
    ///
    /// The future gives an [`Error`] if the request can't be served even if it waits: the memory
    /// can't be mapped, or is more than a limit allows beside what is registered. No guard is given
    /// then; what came with an owner and was mapped already may be kept.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue, and what was mapped so far.
    ///
    /// # Deadlocks
    ///
    /// A guard held while waiting for more may be what others, or the request itself, wait for: give
    /// all segments of a request to one call. And a future whose turn has come keeps it until it is
    /// polled or dropped, so one that is not polled any more (in a `select!` whose other branch is
    /// being worked on, in a runtime that nobody drives) holds up all that come after it. Where that
    /// can happen, put an end to the wait, and do without the mapping.
    ///
    /// # Safety
    ///
    /// As for [`register`](Self::register). It holds, for a segment with an owner, for as long as
    /// the owner is held, and for all the memory that was said to be the owner's; without one,
    /// until the guard was dropped (which must not be before the device is done with the memory)
    /// or the future was.
    ///
    /// If removing the mapping of memory without an owner fails, that memory can't be kept from being
    /// freed: it is counted and logged, and what keeps the device from it is only that it was done
    /// with it. Give an owner where the device isn't trusted with that.
    pub unsafe fn map<'fd>(
        &self,
        segments: impl IntoIterator<Item = Segment<'fd>>,
        direction: Direction,
    ) -> MapRequest<'fd> {
        MapRequest::new(Arc::clone(&self.handle.space), segments, direction)
    }

    /// As [`map`](Self::map), without waiting: where it would wait, the error says why.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::is_limit`] tells whether the same may succeed later. No guard is given
    /// then.
    ///
    /// # Safety
    ///
    /// As for [`map`](Self::map).
    pub unsafe fn try_map<'fd>(
        &self,
        segments: impl IntoIterator<Item = Segment<'fd>>,
        direction: Direction,
    ) -> Result<Vec<Mapped>, Error> {
        MapRequest::new(Arc::clone(&self.handle.space), segments, direction).now()
    }

    /// Removes the kept temporary mappings that no request uses, and drops their owners.
    pub fn give_up_kept(&self) {
        self.handle.space.make_room(Amount::ALL);
    }

    /// As [`give_up_kept`](Self::give_up_kept), and nothing is kept from now on: mappings in use go
    /// away with their guards. It is what happens when the last handle is dropped.
    pub fn end_retention(&self) {
        self.handle.space.end_retention();
    }

    /// The smallest page of the IOMMU in bytes, a power of two: what mappings are rounded out to.
    #[must_use]
    pub fn page_size(&self) -> usize {
        // Fits: checked by `new`.
        self.handle.space.page_size as usize
    }

    /// The limit on what is kept for later.
    #[must_use]
    pub fn retention(&self) -> Retention {
        self.handle.space.retention
    }

    /// Whether look-ups would find nothing at all.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn finds_nothing(&self) -> bool {
        self.handle.space.table.is_empty()
    }

    /// What is in use now.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let space = &self.handle.space;
        let state = lock(&space.state);
        let Tallies {
            fixed,
            temporary,
            leaked,
        } = state.tallies;
        let kept = state.cache.amount();
        Usage {
            fixed_mappings: fixed.mappings,
            fixed_bytes: fixed.bytes,
            temporary_mappings: temporary.mappings,
            temporary_bytes: temporary.bytes,
            kept_mappings: kept.mappings,
            kept_bytes: kept.bytes,
            leaked_mappings: leaked.mappings,
            leaked_bytes: leaked.bytes,
            max_mappings: space.max_mappings,
            free_bytes: state.free.total(),
            waiting: state.waiters.len() as u64,
            done_waiting: state.waiters.left(),
            recycled_mappings: state.recycled,
            look_up_misses: space.look_up_misses.0.load(Ordering::Relaxed),
        }
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.space.end_retention();
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
    /// Mappings made for requests, those that are kept included.
    pub temporary_mappings: u64,
    /// Their size in bytes.
    pub temporary_bytes: u64,
    /// Temporary mappings that look-ups find, in use or kept for later.
    pub kept_mappings: u64,
    /// Their size in bytes.
    pub kept_bytes: u64,
    /// Mappings that could not be removed, and addresses that turned out to be in use by someone
    /// else. They and their owners are kept for ever.
    pub leaked_mappings: u64,
    /// Their size in bytes.
    pub leaked_bytes: u64,
    /// How many mappings there can be at a time, leaked ones included, as far as the mapper knows.
    pub max_mappings: Option<u64>,
    /// Free I/O virtual addresses, in bytes.
    pub free_bytes: u64,
    /// Requests that wait for room.
    pub waiting: u64,
    /// Requests that have left the queue, in which they waited or had to make room, since the
    /// beginning. While this grows, the queue moves.
    pub done_waiting: u64,
    /// How many kept mappings were given up for others, since the beginning.
    pub recycled_mappings: u64,
    /// How many look-ups found nothing, since the beginning. (Hits aren't counted: a shared counter
    /// would cost as much as they do.)
    pub look_up_misses: u64,
}
