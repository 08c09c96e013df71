//! Making a payload reachable for the device: in place where that can be expressed, else through a
//! bounce buffer.
#![expect(
    unsafe_code,
    reason = "memory is mapped for DMA for the time of a command"
)]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use iova::{AddressSpace, Direction, HostMemory, Mapped};
use nvme_spec::DataPointer;
use smallvec::SmallVec;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::payload::{Payload, Piece};
use super::{Bounce, Holdings};
use crate::Error;
use crate::memory::{AllocError, DmaBuf, DmaWords, Pool};
use crate::queue::data_pointer::{
    ListMemory, Segment, SglSupport, Shape, describe, list_bytes, shape,
};

/// Foreign memory of at least so many bytes is mapped for the command instead of copied.
///
/// Mapping costs two system calls and the pinning of each page, copying the time of a memcpy.
const MAP_FROM: usize = 64 * 1024;

/// Bounce buffers that are kept for when the pool has reached its limit.
const RESERVE_BLOCKS: usize = 2;

/// What data transfers of one controller need.
pub(crate) struct DmaContext {
    pub(crate) space: AddressSpace,
    pub(crate) pool: Pool,
    page_size: u64,
    sgl: SglSupport,
    /// Whether data is always copied, so that the device never reaches memory of the caller.
    isolate: bool,
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

/// Why a payload could not be made reachable.
pub(crate) enum Unready {
    /// The pool is used up; a [`ReserveBlock`] will do.
    PoolExhausted(Payload),
    Failed(Error, Payload),
}

impl DmaContext {
    /// # Errors
    ///
    /// The reserve, of `max_transfer` bytes a block, could not be allocated.
    pub(crate) fn new(
        space: AddressSpace,
        pool: Pool,
        page_size: u64,
        sgl: SglSupport,
        isolate: bool,
        max_transfer: usize,
    ) -> Result<Self, AllocError> {
        let reserve = Arc::new(Reserve::new(&pool, page_size as usize, max_transfer)?);
        let bounced_bytes = AtomicU64::new(0);
        Ok(Self {
            space,
            pool,
            page_size,
            sgl,
            isolate,
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
        if self.isolate {
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

    /// Makes the bytes of `range` of `payload` reachable.
    pub(crate) fn prepare(
        &self,
        flow: Flow,
        payload: Payload,
        range: Range<usize>,
    ) -> Result<(DataPointer, Holdings), Unready> {
        match self.in_place(flow, &payload, range.clone()) {
            Ok(Some((pointer, mapped, list))) => Ok((
                pointer,
                Holdings {
                    mapped,
                    list,
                    bounce: None,
                    payload,
                },
            )),
            Ok(None) => self.through_pool(flow, payload, range),
            Err(error) if is_exhaustion(&error) => Err(Unready::PoolExhausted(payload)),
            Err(error) => Err(Unready::Failed(error.into(), payload)),
        }
    }

    /// Makes the bytes of `range` of `payload`, at most a transfer, reachable through `block`.
    pub(crate) fn prepare_in_reserve(
        &self,
        flow: Flow,
        payload: Payload,
        range: Range<usize>,
        mut block: ReserveBlock,
    ) -> Result<(DataPointer, Holdings), Unready> {
        let pointer = block.fill_from(flow, &payload, range.clone(), self.page_size);
        let Some(pointer) = pointer else {
            // A block holds a whole transfer, and no command is larger than that.
            let limit = self.pool.stats().limit;
            return Err(Unready::Failed(
                AllocError::LimitReached { limit }.into(),
                payload,
            ));
        };
        self.count_bounce(range.len());
        let bounce = Some(Bounce::Reserve(block));
        Ok((
            pointer,
            Holdings {
                bounce,
                payload,
                ..Holdings::default()
            },
        ))
    }

    /// Waits for a bounce buffer of the reserve, in order of arrival. Blocks come back when
    /// commands complete, so this waits for no memory that callers hold; but a block that was granted
    /// to a future is its own until that is polled or dropped.
    pub(crate) fn reserve_block(
        &self,
    ) -> impl Future<Output = Option<ReserveBlock>> + Send + 'static {
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

    /// Copies what a read left in a bounce buffer to where it belongs, `range` of the payload.
    pub(crate) fn collect(&self, holdings: &mut Holdings, range: Range<usize>) {
        let Some(bounce) = holdings.bounce.take() else {
            return;
        };
        let bytes = match &bounce {
            Bounce::Pool(buf) => &buf[..range.len()],
            Bounce::Reserve(block) => block.bytes(range.len()),
        };
        // SAFETY: the command that the range belongs to is complete, and other commands of the
        // same request use other ranges. The payload is that of a read, owned by the request.
        unsafe { holdings.payload.fill(range, bytes) };
    }

    /// Nothing if the memory can't be described to the device where it is.
    #[expect(clippy::type_complexity, reason = "the parts of Holdings, used once")]
    fn in_place(
        &self,
        flow: Flow,
        payload: &Payload,
        range: Range<usize>,
    ) -> Result<Option<(DataPointer, SmallVec<[Mapped; 1]>, Option<DmaWords>)>, AllocError> {
        if self.isolate {
            return Ok(None);
        }
        let mut mapped = SmallVec::new();
        let mut segments: SmallVec<[Segment; 4]> = SmallVec::new();
        let whole = payload.try_for_each(range, |piece| {
            let segment = self.locate(flow, &piece, &mut mapped).ok_or(())?;
            match segments.last_mut() {
                Some(last) if last.iova + last.len == segment.iova => last.len += segment.len,
                _ => segments.push(segment),
            }
            Ok::<_, ()>(())
        });
        if whole.is_err() || segments.is_empty() {
            return Ok(None);
        }
        let shape = shape(&segments, self.page_size, self.sgl);
        let list = match list_bytes(shape, &segments, self.page_size) {
            0 => None,
            bytes => Some(DmaWords::new(&self.pool, bytes.div_ceil(4) as usize)?),
        };
        let pointer = describe(shape, &segments, self.page_size, list.as_ref());
        Ok(pointer.map(|pointer| (pointer, mapped, list)))
    }

    fn locate(
        &self,
        flow: Flow,
        piece: &Piece<'_>,
        mapped: &mut SmallVec<[Mapped; 1]>,
    ) -> Option<Segment> {
        let len = piece.len();
        let addr = match piece {
            Piece::Dma { buf, range } => {
                if let Some(iova) = buf.iova_in(&self.pool) {
                    return Some(Segment {
                        iova: iova + range.start as u64,
                        len: len as u64,
                    });
                }
                buf.addr().as_ptr().wrapping_add(range.start).cast_const()
            }
            Piece::Registered { slice, range } => slice.addr().wrapping_add(range.start),
            Piece::Foreign { addr, .. } => *addr,
        };
        let guard = match self.space.look_up(addr, len, flow.into()) {
            Some(guard) => guard,
            None if len >= MAP_FROM => self.map(flow, addr, len)?,
            None => return None,
        };
        let segment = Segment {
            iova: guard.iova(),
            len: len as u64,
        };
        mapped.push(guard);
        Some(segment)
    }

    /// Maps memory that the payload owns. Whatever keeps it from being mapped, it can still be
    /// copied.
    fn map(&self, flow: Flow, addr: *const u8, len: usize) -> Option<Mapped> {
        let addr = NonNull::new(addr.cast_mut())?;
        // SAFETY: the memory belongs to the payload, which goes into the same `Holdings` as the
        // guard, behind it, so it is neither freed nor moved while the guard lives. `Holdings` are
        // kept until the device is done with the command. Until then a payload that is written to
        // is not accessed, and others are not changed.
        let mapped = unsafe {
            self.space
                .map_temporary(HostMemory::new(addr, len), flow.into(), None)
        };
        mapped
            .inspect_err(|error| tracing::trace!(%error, len, "copying instead of mapping"))
            .ok()
    }

    fn through_pool(
        &self,
        flow: Flow,
        payload: Payload,
        range: Range<usize>,
    ) -> Result<(DataPointer, Holdings), Unready> {
        let bounced = self.pool.alloc(range.len()).and_then(|mut buf| {
            if flow == Flow::Write {
                payload.copy_out(range.clone(), &mut buf);
            }
            let segment = [Segment {
                iova: buf.iova().expect("a block of the pool has an address"),
                len: range.len() as u64,
            }];
            let shape = shape(&segment, self.page_size, self.sgl);
            let list = match list_bytes(shape, &segment, self.page_size) {
                0 => None,
                bytes => Some(DmaWords::new(&self.pool, bytes.div_ceil(4) as usize)?),
            };
            Ok((
                describe(shape, &segment, self.page_size, list.as_ref()),
                list,
                buf,
            ))
        });
        match bounced {
            Ok((Some(pointer), list, buf)) => {
                self.count_bounce(range.len());
                let bounce = Some(Bounce::Pool(buf));
                Ok((
                    pointer,
                    Holdings {
                        list,
                        bounce,
                        payload,
                        ..Holdings::default()
                    },
                ))
            }
            Ok((None, ..)) => Err(Unready::PoolExhausted(payload)),
            Err(error) if is_exhaustion(&error) => Err(Unready::PoolExhausted(payload)),
            Err(error) => Err(Unready::Failed(error.into(), payload)),
        }
    }

    fn count_bounce(&self, bytes: usize) {
        self.bounced_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
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
    fn new(pool: &Pool, page_size: usize, max_transfer: usize) -> Result<Self, AllocError> {
        let list_words = (max_transfer / page_size + 1).next_multiple_of(page_size / 8) * 4;
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
        page_size: u64,
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
        let shape: Shape = shape(&segment, page_size, SglSupport::None);
        describe(shape, &segment, page_size, Some(&memory.list))
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
