//! Making a payload reachable for the device: in place where that can be expressed, else through a
//! bounce buffer.
#![expect(
    unsafe_code,
    reason = "memory is mapped for DMA for the time of a command"
)]

use std::ops::Range;
use std::panic::catch_unwind;
use std::pin::pin;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::{Either, poll_immediate, select};
use iova::{AddressSpace, Direction, HostMemory, MapRequest, Mapped};
use nvme_spec::DataPointer;
use smallvec::SmallVec;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::payload::{Payload, Piece};
use super::{Bounce, Holdings, Reach};
use crate::Error;
use crate::memory::{AllocError, DEVICE_PAGE, DmaBuf, DmaWords, Pool};
use crate::queue::data_pointer::{
    ListMemory, Segment, SglSupport, Shape, describe, in_two_entries, list_bytes, shape,
};

/// The memory page size that all controllers are set to (CC.MPS).
const PAGE_SIZE: u64 = DEVICE_PAGE as u64;

/// Foreign memory of at least so many bytes is mapped for the command instead of copied.
///
/// Mapping costs two system calls and the pinning of each page, copying the time of a memcpy.
const MAP_FROM: usize = 64 * 1024;

/// How long a command waits for room in the I/O address space while nobody else gets any. Then it does
/// without: those before it may be futures that nobody polls any more, or have commands that never
/// complete.
const PATIENCE: Duration = Duration::from_millis(100);

/// Bounce buffers that are kept for when the pool has reached its limit.
const RESERVE_BLOCKS: usize = 2;

/// What data transfers of one controller need.
pub(crate) struct DmaContext {
    pub(crate) space: AddressSpace,
    pub(crate) pool: Pool,
    sgl: SglSupport,
    /// Whether data is always copied, so that the device never reaches memory of the caller.
    isolate: bool,
    /// Whether the pool maps nothing more, and has no block that is larger than a chunk.
    has_whole_pool: bool,
    reserve: Arc<Reserve>,
    bounced_bytes: AtomicU64,
}

/// Which way the data of a command flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The device writes memory.
    Read,
    /// The device reads memory.
    Write,
}

impl From<Flow> for Direction {
    fn from(flow: Flow) -> Self {
        match flow {
            Flow::Read => Self::FromDevice,
            Flow::Write => Self::ToDevice,
        }
    }
}

/// Why a payload could not be made reachable at once. [`DmaContext::prepare_later`] goes on.
pub(crate) enum Unready {
    /// It is to be mapped for the command, which may have to wait for room.
    Unmapped,
    /// The pool is used up; a block of the reserve will do.
    PoolExhausted,
    Failed(Error),
}

impl From<AllocError> for Unready {
    fn from(error: AllocError) -> Self {
        if is_exhaustion(&error) {
            Self::PoolExhausted
        } else {
            Self::Failed(error.into())
        }
    }
}

/// Where the device finds a run of memory.
enum Located {
    Pool(u64),
    Mapped(Mapped),
}

impl DmaContext {
    /// # Errors
    ///
    /// The reserve, of `max_transfer` bytes a block, could not be allocated.
    pub(crate) fn new(
        space: AddressSpace,
        pool: Pool,
        sgl: SglSupport,
        isolate: bool,
        has_whole_pool: bool,
        max_transfer: usize,
    ) -> Result<Self, AllocError> {
        let reserve = Arc::new(Reserve::new(&pool, max_transfer)?);
        let bounced_bytes = AtomicU64::new(0);
        Ok(Self {
            space,
            pool,
            sgl,
            isolate,
            has_whole_pool,
            reserve,
            bounced_bytes,
        })
    }

    /// Bytes that were copied because the device could not reach them in place.
    pub(crate) fn bounced_bytes(&self) -> u64 {
        self.bounced_bytes.load(Ordering::Relaxed)
    }

    /// A buffer of `len` bytes with unspecified contents.
    pub(crate) fn buffer(&self, len: usize) -> Result<DmaBuf, Error> {
        if self.isolate || (self.has_whole_pool && len > Pool::LARGEST_PART) {
            Ok(DmaBuf::heap(len))
        } else {
            Ok(self.pool.alloc(len)?)
        }
    }

    /// A buffer of `len` bytes for a read: from the pool, or, past its limit or when isolating,
    /// from the heap.
    pub(crate) fn read_buffer(&self, len: usize) -> Result<DmaBuf, Error> {
        match self.buffer(len) {
            Err(Error::Memory(error)) if is_exhaustion(&error) => Ok(DmaBuf::heap(len)),
            allocated => allocated,
        }
    }

    /// How the device finds the bytes of `range` of a payload, if the command itself can say all of
    /// that, as for a short run of memory of the pool.
    #[inline]
    pub(crate) fn address(&self, payload: &Payload, range: &Range<usize>) -> Option<DataPointer> {
        let Payload::Dma(buf) = payload else {
            return None;
        };
        let iova = buf.iova_in(&self.pool).filter(|_| !self.isolate)? + range.start as u64;
        let len = range.len() as u64;
        in_two_entries(Segment { iova, len }, PAGE_SIZE)
    }

    /// Makes the bytes of `range` of the payload that is in `holdings` reachable, if that can be done
    /// without waiting, and puts there what else the command needs for that. Returns how the device
    /// finds the data.
    pub(crate) fn prepare(
        &self,
        flow: Flow,
        holdings: &mut Holdings,
        range: Range<usize>,
    ) -> Result<DataPointer, Unready> {
        if self.isolate {
            return self.through_pool(flow, holdings, range);
        }
        let mut is_worth_mapping = false;
        let described = self.describe(&holdings.payload, range.clone(), |piece| {
            if let Some(iova) = self.pool_address(piece) {
                return Some(Located::Pool(iova));
            }
            let (addr, len) = (piece.addr(), piece.len());
            let mapped = self.space.look_up(addr, len, flow.into());
            is_worth_mapping = mapped.is_none() && len >= MAP_FROM;
            mapped.map(Located::Mapped)
        });
        match described? {
            Some(parts) => Ok(parts.put(holdings)),
            None if is_worth_mapping => Err(Unready::Unmapped),
            None => self.through_pool(flow, holdings, range),
        }
    }

    /// Goes on where [`prepare`](Self::prepare) could not.
    ///
    /// Both kinds of waiting are in order of arrival, and for what comes back when commands
    /// complete: this waits for no memory that callers hold. But a future whose turn it is has it
    /// until it is polled or dropped; so the wait for a mapping ends, and data is copied, when the
    /// queue does not move.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the place in the queue and drops the payload.
    pub(crate) async fn prepare_later(
        &self,
        flow: Flow,
        unready: Unready,
        payload: Payload,
        range: Range<usize>,
    ) -> (Result<DataPointer, Error>, Holdings) {
        let mut holdings = Holdings::new(payload);
        let prepared = match unready {
            Unready::Unmapped => self.map(flow, &mut holdings, range.clone()).await,
            unready => Err(unready),
        };
        let prepared = match prepared {
            Ok(pointer) => Ok(pointer),
            Err(Unready::Failed(error)) => Err(error),
            Err(Unready::Unmapped | Unready::PoolExhausted) => {
                let block = self.reserve_block().await;
                self.through_reserve(flow, &mut holdings, range, block)
            }
        };
        (prepared, holdings)
    }

    /// Maps memory that is not mapped yet, for the command or, if it is shared and immutable, for
    /// later ones too. What can't be mapped is copied.
    async fn map(
        &self,
        flow: Flow,
        holdings: &mut Holdings,
        range: Range<usize>,
    ) -> Result<DataPointer, Unready> {
        let mapped = match self.map_request(flow, &holdings.payload, range.clone()) {
            Some(request) => self.in_turn(request).await,
            None => None,
        };
        let Some(mapped) = mapped else {
            tracing::trace!(len = range.len(), "copying instead of mapping");
            return self.through_pool(flow, holdings, range);
        };
        let mut mapped = mapped.into_iter();
        let described = self.describe(&holdings.payload, range.clone(), |piece| {
            match self.pool_address(piece) {
                Some(iova) => Some(Located::Pool(iova)),
                None => mapped.next().map(Located::Mapped),
            }
        });
        match described? {
            Some(parts) => Ok(parts.put(holdings)),
            None => self.through_pool(flow, holdings, range),
        }
    }

    /// The mappings, if there can be some, waiting as long as the queue moves.
    async fn in_turn(&self, mut request: MapRequest<'static>) -> Option<Vec<Mapped>> {
        if let Some(mapped) = poll_immediate(&mut request).await {
            return mapped.ok();
        }
        loop {
            let before = self.space.usage().done_waiting;
            // Tokio has no way to ask whether there is a runtime, with timers; without, it panics.
            let timer = catch_unwind(|| tokio::time::sleep(PATIENCE)).ok()?;
            match select(request, pin!(timer)).await {
                Either::Left((mapped, _)) => return mapped.ok(),
                Either::Right(_) if self.space.usage().done_waiting == before => return None,
                Either::Right(((), waiting)) => request = waiting,
            }
        }
    }

    /// The mappings of all that is not memory of the pool; nothing if some of it is too short to
    /// be worth it. To be dropped before the payload.
    fn map_request(
        &self,
        flow: Flow,
        payload: &Payload,
        range: Range<usize>,
    ) -> Option<MapRequest<'static>> {
        let mut pieces: SmallVec<[iova::Segment<'static>; 4]> = SmallVec::new();
        let all = payload.try_for_each(range, |piece| {
            if self.pool_address(&piece).is_some() {
                return Ok(());
            }
            let memory = NonNull::new(piece.addr().cast_mut())
                .filter(|_| piece.len() >= MAP_FROM)
                .map(|addr| HostMemory::new(addr, piece.len()))
                .ok_or(())?;
            let segment = iova::Segment::new(memory);
            pieces.push(match piece.owner() {
                Some((whole, owner)) => segment.within(whole, owner),
                None => segment,
            });
            Ok::<_, ()>(())
        });
        all.ok()?;
        // SAFETY: the memory belongs to the payload. What has an owner is a `Bytes`, whose memory
        // its clone keeps in place and nobody changes, and the device only reads it. Other memory
        // is neither freed nor moved while a guard lives: until a guard goes into the same
        // `Holdings` as the payload, before it, the request is dropped before the payload is; and
        // `Holdings` are kept until the device is done with the command. Where they are taken apart,
        // on the way to the queue and back (`Course`), the guard goes first too. Until then a payload
        // that is written to is not accessed, and others are not changed.
        Some(unsafe { self.space.map(pieces, flow.into()) })
    }

    /// Makes the bytes of `range` of the payload, at most a transfer, reachable through a block of the
    /// reserve.
    fn through_reserve(
        &self,
        flow: Flow,
        holdings: &mut Holdings,
        range: Range<usize>,
        block: Option<ReserveBlock>,
    ) -> Result<DataPointer, Error> {
        let filled = block.and_then(|mut block| {
            let payload = &holdings.payload;
            let pointer = block.fill_from(flow, payload, range.clone())?;
            Some((pointer, block))
        });
        let Some((pointer, block)) = filled else {
            // A block holds a whole transfer, and no command is larger than that.
            let limit = self.pool.stats().limit;
            return Err(AllocError::LimitReached { limit }.into());
        };
        self.count_bounce(range.len());
        holdings.reach = Some(Reach {
            bounce: Some(Bounce::Reserve(Box::new(block))),
            ..Reach::default()
        });
        Ok(pointer)
    }

    /// Waits for a bounce buffer of the reserve.
    fn reserve_block(&self) -> impl Future<Output = Option<ReserveBlock>> + Send + 'static {
        let reserve = self.reserve.clone();
        async move {
            let permit = reserve.permits.clone().acquire_owned().await.ok()?;
            let memory = reserve.lock().pop()?;
            Some(ReserveBlock {
                memory: Some(memory),
                reserve,
                _permit: permit,
            })
        }
    }

    /// Describes memory to the device where it is. Nothing if that can't be expressed, or if some
    /// of it was not located.
    fn describe(
        &self,
        payload: &Payload,
        range: Range<usize>,
        mut locate: impl FnMut(&Piece<'_>) -> Option<Located>,
    ) -> Result<Option<InPlace>, AllocError> {
        let mut mapped = SmallVec::new();
        let mut segments: SmallVec<[Segment; 4]> = SmallVec::new();
        let whole = payload.try_for_each(range, |piece| {
            let iova = match locate(&piece).ok_or(())? {
                Located::Pool(iova) => iova,
                Located::Mapped(guard) => {
                    let iova = guard.iova();
                    mapped.push(guard);
                    iova
                }
            };
            let len = piece.len() as u64;
            match segments.last_mut() {
                Some(last) if last.iova + last.len == iova => last.len += len,
                _ => segments.push(Segment { iova, len }),
            }
            Ok::<_, ()>(())
        });
        if whole.is_err() || segments.is_empty() {
            return Ok(None);
        }
        let shape = shape(&segments, PAGE_SIZE, self.sgl);
        let list = match list_bytes(shape, &segments, PAGE_SIZE) {
            0 => None,
            bytes => Some(DmaWords::new(&self.pool, bytes.div_ceil(4) as usize)?),
        };
        let pointer = describe(shape, &segments, PAGE_SIZE, list.as_ref());
        Ok(pointer.map(|pointer| InPlace {
            pointer,
            mapped,
            list,
        }))
    }

    /// Where the device finds a run of memory of the pool.
    fn pool_address(&self, piece: &Piece<'_>) -> Option<u64> {
        match piece {
            Piece::Dma { buf, range } => Some(buf.iova_in(&self.pool)? + range.start as u64),
            Piece::Registered { .. } | Piece::Foreign { .. } => None,
        }
    }

    fn through_pool(
        &self,
        flow: Flow,
        holdings: &mut Holdings,
        range: Range<usize>,
    ) -> Result<DataPointer, Unready> {
        let mut buf = self.pool.alloc(range.len())?;
        let segment = [Segment {
            iova: buf.iova().expect("a block of the pool has an address"),
            len: range.len() as u64,
        }];
        let shape = shape(&segment, PAGE_SIZE, self.sgl);
        let list = match list_bytes(shape, &segment, PAGE_SIZE) {
            0 => None,
            bytes => Some(DmaWords::new(&self.pool, bytes.div_ceil(4) as usize)?),
        };
        let pointer =
            describe(shape, &segment, PAGE_SIZE, list.as_ref()).ok_or(Unready::PoolExhausted)?;
        self.count_bounce(range.len());
        if flow == Flow::Write {
            holdings.payload.copy_out(range, &mut buf);
        }
        holdings.reach = Some(Reach {
            _list: list,
            bounce: Some(Bounce::Pool(buf)),
            ..Reach::default()
        });
        Ok(pointer)
    }

    fn count_bounce(&self, bytes: usize) {
        self.bounced_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Reach {
    /// Copies what a read left in a bounce buffer, if there is one, to where it belongs, `range` of the
    /// payload.
    pub(crate) fn collect(&self, payload: &Payload, range: Range<usize>) {
        let bytes = match &self.bounce {
            Some(Bounce::Pool(buf)) => &buf[..range.len()],
            Some(Bounce::Reserve(block)) => block.bytes(range.len()),
            None => return,
        };
        // SAFETY: the command that the range belongs to is complete, and other commands of the
        // same request use other ranges. The payload is that of a read, owned by the request.
        unsafe { payload.fill(range, bytes) };
    }
}

/// Memory that is described to the device where it is.
struct InPlace {
    pointer: DataPointer,
    mapped: SmallVec<[Mapped; 1]>,
    list: Option<DmaWords>,
}

impl InPlace {
    /// Puts what the device needs for it to the payload.
    fn put(self, holdings: &mut Holdings) -> DataPointer {
        if !self.mapped.is_empty() || self.list.is_some() {
            holdings.reach = Some(Reach {
                mapped: self.mapped,
                _list: self.list,
                bounce: None,
            });
        }
        self.pointer
    }
}

fn is_exhaustion(error: &AllocError) -> bool {
    match error {
        AllocError::LimitReached { .. } | AllocError::Memory(_) => true,
        AllocError::Mapping(error) => error.is_limit(),
        _ => false,
    }
}

impl ListMemory for DmaWords {
    fn iova(&self) -> u64 {
        Self::iova(self)
    }

    fn store_u64(&self, index: usize, value: u64) {
        Self::store_u64(self, index, value);
    }
}

/// Bounce buffers for when the pool gives none.
struct Reserve {
    permits: Arc<Semaphore>,
    memory: Mutex<Vec<ReserveMemory>>,
}

struct ReserveMemory {
    data: DmaBuf,
    list: DmaWords,
}

impl Reserve {
    fn new(pool: &Pool, max_transfer: usize) -> Result<Self, AllocError> {
        let list_words = (max_transfer / DEVICE_PAGE + 1).next_multiple_of(DEVICE_PAGE / 8) * 4;
        let memory = (0..RESERVE_BLOCKS)
            .map(|_| {
                Ok(ReserveMemory {
                    data: pool.alloc(max_transfer)?,
                    list: DmaWords::new(pool, list_words)?,
                })
            })
            .collect::<Result<_, AllocError>>()?;
        Ok(Self {
            permits: Arc::new(Semaphore::new(RESERVE_BLOCKS)),
            memory: Mutex::new(memory),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<ReserveMemory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bounce buffer of the reserve; it goes back there when dropped.
pub(crate) struct ReserveBlock {
    memory: Option<ReserveMemory>,
    reserve: Arc<Reserve>,
    /// Given up last, when the memory is back.
    _permit: OwnedSemaphorePermit,
}

impl ReserveBlock {
    fn fill_from(
        &mut self,
        flow: Flow,
        payload: &Payload,
        range: Range<usize>,
    ) -> Option<DataPointer> {
        let memory = self.memory.as_mut()?;
        let len = range.len();
        let data = memory.data.get_mut(..len)?;
        if flow == Flow::Write {
            payload.copy_out(range, data);
        }
        let segment = [Segment {
            iova: memory.data.iova()?,
            len: len as u64,
        }];
        let shape: Shape = shape(&segment, PAGE_SIZE, SglSupport::None);
        describe(shape, &segment, PAGE_SIZE, Some(&memory.list))
    }

    fn bytes(&self, len: usize) -> &[u8] {
        self.memory
            .as_ref()
            .and_then(|memory| memory.data.get(..len))
            .unwrap_or_default()
    }
}

impl Drop for ReserveBlock {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.reserve.lock().push(memory);
        }
    }
}
