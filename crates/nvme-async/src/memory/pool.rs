//! Blocks of DMA-able memory for one device.

use std::fmt;
use std::io;
use std::mem;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iova::{AddressSpace, Direction, FixedMapping, HostMemory};

use super::buddy;
use super::free::{FreeBlocks, Place};
use super::{DEVICE_PAGE, DmaBuf, SharedMemory};

/// Bytes that the pool maps at a time.
const CHUNK: usize = buddy::PAGES * DEVICE_PAGE;

/// Memory that is mapped for one device before it is needed, and handed out in blocks.
///
/// The pool grows by chunks of 2 MiB, each a [`SharedMemory`] with one fixed mapping, up to a limit
/// that is set when it is made; or it has all of them from the start, as parts of one such mapping
/// (`map_all`). It keeps them until the last handle is dropped. A block is a power
/// of two of device pages (4 KiB) up to a chunk, aligned to its size in the chunk; what is larger
/// than a chunk gets one of its own, in whole pages, that is unmapped when it is freed.
///
/// To allocate and to free a block takes one short lock and neither allocates on the heap nor
/// enters the kernel, except that growing the pool maps memory, which may take a millisecond, and
/// that large buffers are mapped and unmapped each time.
///
/// A handle is cheap to clone. Blocks may outlive all handles: each keeps its own chunk mapped, and
/// chunks without any are unmapped when the last handle is dropped.
#[derive(Clone)]
pub struct Pool {
    handle: Arc<Handle>,
}

impl Pool {
    /// A pool in `space` that maps at most `limit` bytes. Nothing is mapped yet.
    ///
    /// Only whole chunks count, so with a limit below 2 MiB every allocation fails.
    pub fn new(space: AddressSpace, limit: usize) -> Self {
        let shared = Arc::new(Shared {
            limit,
            state: Mutex::default(),
        });
        Self {
            handle: Arc::new(Handle {
                shared,
                space,
                growing: Mutex::default(),
            }),
        }
    }

    /// The largest block that is a part of a chunk.
    pub(crate) const LARGEST_PART: usize = CHUNK;

    /// Maps all that the limit allows at once, so that nothing will be mapped, or unmapped before the
    /// last handle is dropped. Pages that are never used take no memory. What is larger than a chunk
    /// can't be allocated then.
    ///
    /// # Errors
    ///
    /// Those of [`alloc`](Self::alloc); nothing is mapped then.
    pub(crate) fn map_all(&self) -> Result<(), AllocError> {
        let _growing = lock(&self.handle.growing);
        let shared = &self.handle.shared;
        let first = shared.state().chunks.len();
        let count = (shared.limit / CHUNK).saturating_sub(first);
        if count == 0 {
            return Ok(());
        }
        let reservations: Vec<_> = (0..count)
            .map(|_| Reservation::new(shared, CHUNK))
            .collect::<Result<_, _>>()?;
        let area = Arc::new(self.map(count * CHUNK)?);
        let chunks: Vec<_> = reservations
            .into_iter()
            .enumerate()
            .map(|(number, reservation)| {
                let index = Some(first + number);
                Arc::new(Chunk::new(&area, number * CHUNK, CHUNK, index, reservation))
            })
            .collect();
        let mut state = shared.state();
        for chunk in chunks {
            state.add_chunk(chunk);
        }
        Ok(())
    }

    /// Allocates `len` bytes.
    ///
    /// They are initialized but their values are unspecified: zeroes, or what a former user of the
    /// same pool left there. They are not cleared, since most buffers are about to be overwritten.
    ///
    /// # Errors
    ///
    /// See [`AllocError`]. A failure changes nothing, and never waits for other buffers to be
    /// freed; [`DmaBuf::heap`] remains.
    pub fn alloc(&self, len: usize) -> Result<DmaBuf, AllocError> {
        Ok(DmaBuf::from_block(self.alloc_block(len)?, len))
    }

    /// What the pool holds at the moment.
    pub fn stats(&self) -> PoolStats {
        let state = self.handle.shared.state();
        PoolStats {
            limit: self.handle.shared.limit,
            mapped: state.mapped,
            chunks: state.mapped_chunks,
            allocated: state.allocated,
            outstanding: state.outstanding,
        }
    }

    /// Allocates a block of at least `len` bytes.
    pub(super) fn alloc_block(&self, len: usize) -> Result<Block, AllocError> {
        if len == 0 {
            return Err(AllocError::ZeroLength);
        }
        let shared = &self.handle.shared;
        let Some(order) = buddy::order_for(len.div_ceil(DEVICE_PAGE)) else {
            return self.alloc_chunk(len);
        };
        if let Some(block) = shared.take(order) {
            return Ok(block);
        }

        let _growing = lock(&self.handle.growing);
        // Whoever held the lock before has probably made room for more than itself.
        if let Some(block) = shared.take(order) {
            return Ok(block);
        }
        // Only the holder of `growing` adds chunks, so the number stays right.
        let index = shared.state().chunks.len();
        let chunk = Arc::new(self.map_chunk(CHUNK, Some(index))?);
        let mut state = shared.state();
        state.add_chunk(chunk);
        // Before anybody else can.
        Ok(state
            .take(order)
            .expect("a fresh chunk has free blocks of every order"))
    }

    /// Allocates a chunk for one block alone.
    fn alloc_chunk(&self, len: usize) -> Result<Block, AllocError> {
        let page = self.handle.space.page_size().max(DEVICE_PAGE);
        let limit = self.handle.shared.limit;
        let len = len
            .checked_next_multiple_of(page)
            .ok_or(AllocError::LimitReached { limit })?;
        let chunk = Arc::new(self.map_chunk(len, None)?);
        Ok(self.handle.shared.state().block(chunk, 0, len))
    }

    fn map_chunk(&self, len: usize, index: Option<usize>) -> Result<Chunk, AllocError> {
        let reservation = Reservation::new(&self.handle.shared, len)?;
        let area = Arc::new(self.map(len)?);
        Ok(Chunk::new(&area, 0, len, index, reservation))
    }

    fn map(&self, len: usize) -> Result<Area, AllocError> {
        let memory = Arc::new(SharedMemory::new(len).map_err(AllocError::Memory)?);
        let host_memory = HostMemory::new(memory.addr(), memory.len()).with_file(memory.fd(), 0);
        // SAFETY: `memory` owns a live, writable mapping of exactly that file range, which neither
        // moves nor shrinks while its owner lives, and the owner is a handle to it. The CPU side
        // follows the rules of `DmaBuf` and `DmaWords`, the only users of the chunk's blocks.
        let mapping = unsafe {
            self.handle
                .space
                .try_register(host_memory, Direction::Bidirectional, memory.clone())
        };
        let mapping = mapping.map_err(AllocError::Mapping)?;
        Ok(Area { mapping, memory })
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").field(&self.stats()).finish()
    }
}

/// What a [`Pool`] holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// The most bytes that the pool may map.
    pub limit: usize,
    /// Bytes mapped for the device, in use or not, with those that are just being mapped.
    pub mapped: usize,
    /// Chunks that these bytes are in.
    pub chunks: usize,
    /// Bytes in blocks that have not been freed, by the size of the block.
    pub allocated: usize,
    /// Blocks that have not been freed: buffers, and queues and lists of the driver.
    pub outstanding: usize,
}

/// Why a [`Pool`] could not allocate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AllocError {
    /// The length was zero.
    #[error("a buffer without any bytes can't be allocated")]
    ZeroLength,
    /// No free block is large enough, and the pool may not map more memory.
    #[error("the buffer pool has reached its limit of {limit} bytes")]
    LimitReached {
        /// The limit of the pool in bytes.
        limit: usize,
    },
    /// More memory could not be mapped for the device.
    #[error("memory for the buffer pool can't be mapped for the device")]
    Mapping(#[source] iova::Error),
    /// The kernel gave no more memory.
    #[error("no memory for the buffer pool")]
    Memory(#[source] io::Error),
}

/// What all clones of a [`Pool`] share, and its blocks do not.
struct Handle {
    shared: Arc<Shared>,
    space: AddressSpace,
    /// Held while a chunk is mapped, so that threads which run out of blocks at the same time
    /// share one new chunk. Taken before the lock of `Shared::state`.
    growing: Mutex<()>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let chunks = mem::take(&mut state.chunks);
        drop(state);
        // Unmaps those without blocks, which takes system calls.
        drop(chunks);
    }
}

/// What a pool and its blocks share.
struct Shared {
    limit: usize,
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn take(&self, order: usize) -> Option<Block> {
        self.state().take(order)
    }
}

#[derive(Default)]
struct State {
    /// The chunks that blocks are taken from. Empty once the last handle of the pool is gone,
    /// which is also what keeps chunks (which refer to `Shared`) and `Shared` from keeping each
    /// other alive.
    chunks: Vec<Arc<Chunk>>,
    /// The free blocks of `chunks`.
    free: FreeBlocks,
    mapped: usize,
    mapped_chunks: usize,
    allocated: usize,
    outstanding: usize,
}

impl State {
    fn take(&mut self, order: usize) -> Option<Block> {
        let Place { chunk, page } = self.free.take(order)?;
        let chunk = self.chunks[chunk].clone();
        Some(self.block(chunk, page * DEVICE_PAGE, DEVICE_PAGE << order))
    }

    fn add_chunk(&mut self, chunk: Arc<Chunk>) {
        debug_assert_eq!(chunk.index, Some(self.chunks.len()));
        self.chunks.push(chunk);
        self.free.add_chunk();
    }

    /// Makes the block of `len` bytes at `offset` of `chunk`, which is free.
    fn block(&mut self, chunk: Arc<Chunk>, offset: usize, len: usize) -> Block {
        assert!(offset + len <= chunk.len);
        // SAFETY: offset is inside of the chunk, as was just checked, and so of its mapping.
        let addr = unsafe { chunk.addr.0.add(offset) };
        self.allocated += len;
        self.outstanding += 1;
        Block {
            addr: Address(addr),
            len,
            chunk,
        }
    }
}

/// Memory that is one mapping of the address space.
///
/// The fields are dropped in this order: unmapped, and then freed.
struct Area {
    mapping: FixedMapping,
    memory: Arc<SharedMemory>,
}

/// A part of an area, or all of it.
///
/// The fields are dropped in this order: only when there is no memory is there room for another.
struct Chunk {
    addr: Address,
    iova: u64,
    len: usize,
    /// Its number among the chunks of the pool; nothing if it is a single block.
    index: Option<usize>,
    _area: Arc<Area>,
    reservation: Reservation,
}

impl Chunk {
    /// The part of `len` bytes at `offset`.
    fn new(
        area: &Arc<Area>,
        offset: usize,
        len: usize,
        index: Option<usize>,
        reservation: Reservation,
    ) -> Self {
        assert!(offset + len <= area.memory.len());
        // SAFETY: offset is inside of the area's mapping, as was just checked.
        let addr = unsafe { area.memory.addr().add(offset) };
        Self {
            addr: Address(addr),
            iova: area.mapping.iova() + offset as u64,
            len,
            index,
            _area: area.clone(),
            reservation,
        }
    }
}

/// A part of the pool's limit.
struct Reservation {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Reservation {
    fn new(shared: &Arc<Shared>, bytes: usize) -> Result<Self, AllocError> {
        let limit = shared.limit;
        let mut state = shared.state();
        let mapped = state
            .mapped
            .checked_add(bytes)
            .filter(|&mapped| mapped <= limit);
        state.mapped = mapped.ok_or(AllocError::LimitReached { limit })?;
        state.mapped_chunks += 1;
        Ok(Self {
            shared: shared.clone(),
            bytes,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.mapped -= self.bytes;
        state.mapped_chunks -= 1;
    }
}

/// A part of a chunk that belongs to whoever holds this value, and to nobody else.
///
/// It gives out an address, and leaves it to [`DmaBuf`] and [`DmaWords`](super::DmaWords) what is
/// accessed there and how.
pub(super) struct Block {
    addr: Address,
    len: usize,
    chunk: Arc<Chunk>,
}

impl Block {
    /// Where the block is; `len` bytes from there on are initialized, readable and writable for as
    /// long as the block lives. A multiple of [`DEVICE_PAGE`].
    pub(super) fn addr(&self) -> NonNull<u8> {
        self.addr.0
    }

    /// The length in bytes, a multiple of [`DEVICE_PAGE`].
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether `pool` made it.
    pub(super) fn is_from(&self, pool: &Pool) -> bool {
        Arc::ptr_eq(&self.chunk.reservation.shared, &pool.handle.shared)
    }

    /// Where the device finds the block.
    pub(super) fn iova(&self) -> u64 {
        self.chunk.iova + self.offset() as u64
    }

    /// Where in its chunk the block starts, in bytes.
    fn offset(&self) -> usize {
        self.addr.0.addr().get() - self.chunk.addr.0.addr().get()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut state = self.chunk.reservation.shared.state();
        state.allocated -= self.len;
        state.outstanding -= 1;
        // Once the last handle has taken the chunks away, nobody allocates from them any more.
        if let Some(index) = self.chunk.index
            && index < state.chunks.len()
        {
            let order = (self.len / DEVICE_PAGE).trailing_zeros() as usize;
            let page = self.offset() / DEVICE_PAGE;
            state.free.give_back(Place { chunk: index, page }, order);
        }
    }
}

/// The address of a [`Block`] or [`Chunk`], beside what keeps it valid: following that each time would cost two
/// dependent loads for every access to a buffer.
struct Address(NonNull<u8>);

// SAFETY: an address into a mapping, which belongs to the process, not to a thread; what is
// accessed there is decided by the types around it.
unsafe impl Send for Address {}
// SAFETY: as for Send; it is only copied.
unsafe impl Sync for Address {}

/// A panic while the lock was held leaves no state that is half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
