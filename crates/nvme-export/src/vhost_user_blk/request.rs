//! Requests (virtio 1.2, section 5.2.6): what a chain asks for, and doing it.

use std::ops::Range;
use std::sync::Arc;

use nvme_async::{Error, RegisteredSlice, Zeroes};
use smallvec::SmallVec;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError, total};
use super::config::{
    MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, SECTOR, SEG_MAX, SIZE_MAX,
};
use super::device::QueueDevice;
use super::memory::{self, Regions};
use crate::Export;

/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a segment of Discard and Write Zeroes: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// In the flags of such a segment: the blocks may be deallocated.
const UNMAP: u32 = 1 << 0;
/// Bytes of an identifier (VIRTIO_BLK_ID_BYTES).
pub(super) const ID: usize = 20;
/// Bytes of a request's data.
const MAX_DATA: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// A request that was read from guest memory and checked.
pub(super) struct Request {
    operation: Operation,
    /// Where its status goes.
    status: GuestAddress,
    /// Bytes that the device writes before the status.
    data_in: u64,
}

enum Operation {
    Read(u64, Vec<RegisteredSlice>),
    Write(u64, Vec<RegisteredSlice>),
    Flush,
    Discard(Vec<Range<u64>>),
    WriteZeroes(SmallVec<[(Range<u64>, Zeroes); 1]>),
    /// There is nothing to do any more.
    Done(u8),
}

/// A request that is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) head: u16,
    pub(super) status: u8,
    pub(super) status_at: GuestAddress,
    /// Bytes that were written for the driver, for the used ring.
    pub(super) written: u32,
}

impl Request {
    /// Understands a chain.
    ///
    /// # Errors
    ///
    /// The chain is no request, so that there is nobody to answer. Everything else is answered.
    pub(super) fn read(
        export: &Export,
        id: &[u8; ID],
        regions: &Regions,
        mut chain: Chain,
    ) -> Result<Self, ChainError> {
        let mut header = [0; HEADER];
        chain
            .read_first(regions, &mut header)
            .ok_or(ChainError::NoHeader)?;
        let status = chain.take_last().ok_or(ChainError::NoStatus)?;
        let data_in = total(&chain.writable);
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let operation = match kind {
            VIRTIO_BLK_T_IN => transfer(export, regions, sector, &chain.writable)
                .map(|(offset, slices)| Operation::Read(offset, slices)),
            VIRTIO_BLK_T_OUT if export.is_read_only() => Err(IOERR),
            VIRTIO_BLK_T_OUT => transfer(export, regions, sector, &chain.readable)
                .map(|(offset, slices)| Operation::Write(offset, slices)),
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID => identify(regions, id, &chain),
            VIRTIO_BLK_T_DISCARD if export.is_read_only() => Err(IOERR),
            VIRTIO_BLK_T_DISCARD => discard(export, regions, &mut chain),
            VIRTIO_BLK_T_WRITE_ZEROES if export.is_read_only() => Err(IOERR),
            VIRTIO_BLK_T_WRITE_ZEROES => write_zeroes(export, regions, &mut chain),
            _ => Err(UNSUPP),
        };
        Ok(Self {
            operation: operation.unwrap_or_else(Operation::Done),
            status,
            data_in,
        })
    }

    /// Does it. `is_durable` says that what is written stays when it is done, whatever happens.
    pub(super) async fn execute(
        self,
        queue: Arc<QueueDevice>,
        head: u16,
        is_durable: bool,
    ) -> Done {
        let has_data = matches!(self.operation, Operation::Read(..));
        let status = match self.operation.execute(&queue.export, is_durable).await {
            Ok(status) => status,
            // It stays in flight, for the next server.
            Err(error) if is_end_of_runtime(&error) => std::future::pending().await,
            Err(error) => {
                if let Some(left_out) = queue.device.log_limit.pass() {
                    tracing::warn!(%error, left_out, "a request of a guest");
                }
                IOERR
            }
        };
        // What comes first among the bytes to write, up to the status if that is reached.
        let written = match (status, self.data_in) {
            (OK, data) if has_data => u32::try_from(data + 1).unwrap_or(u32::MAX),
            (_, 0) => 1,
            _ => 0,
        };
        Done {
            head,
            status,
            status_at: self.status,
            written,
        }
    }
}

/// Whether a request has failed because the runtime that serves it ends: that is nothing for a guest to know.
fn is_end_of_runtime(error: &Error) -> bool {
    match error {
        Error::RuntimeGone { .. } | Error::NoRuntime { .. } => true,
        Error::Split(split) => split.failures().any(|(_, error)| is_end_of_runtime(error)),
        _ => false,
    }
}

impl Operation {
    async fn execute(self, export: &Export, is_durable: bool) -> Result<u8, Error> {
        let namespace = export.namespace();
        match self {
            Self::Read(offset, slices) => drop(namespace.read_into(offset, slices).await?),
            Self::Write(offset, slices) => {
                // It may be done twice: to the guest it is under way until it is told that it is done, and a request
                // of the same blocks that it makes meanwhile may come before or after it.
                let write = namespace.write(offset, slices).repeatable();
                drop(match is_durable {
                    true => write.fua().await?,
                    false => write.await?,
                });
            }
            Self::Flush => namespace.flush().await?,
            Self::Discard(ranges) => {
                if !ranges.is_empty() {
                    namespace.discard(&ranges).await?;
                }
            }
            Self::WriteZeroes(ranges) => {
                for (range, zeroes) in ranges {
                    let len = range.end - range.start;
                    namespace.write_zeroes(range.start, len, zeroes).await?;
                }
                if is_durable {
                    namespace.flush().await?;
                }
            }
            Self::Done(status) => return Ok(status),
        }
        Ok(OK)
    }
}

/// Where in the namespace a read or write is, and its memory.
fn transfer(
    export: &Export,
    regions: &Regions,
    sector: u64,
    data: &[super::chain::Segment],
) -> Result<(u64, Vec<RegisteredSlice>), u8> {
    let len = total(data);
    let offset = sector.checked_mul(SECTOR).ok_or(IOERR)?;
    let block = u64::from(export.block_size());
    if len == 0 || len > MAX_DATA || !len.is_multiple_of(block) || !offset.is_multiple_of(block) {
        return Err(IOERR);
    }
    let offset = export.locate(offset, len).map_err(|_| IOERR)?;
    let mut slices = Vec::with_capacity(data.len());
    for segment in data {
        memory::slices(regions, segment.address, segment.len.into(), &mut slices).ok_or(IOERR)?;
    }
    Ok((offset, slices))
}

/// Writes the identifier, which needs no device.
fn identify(regions: &Regions, id: &[u8; ID], chain: &Chain) -> Result<Operation, u8> {
    let mut rest = id.as_slice();
    for segment in &chain.writable {
        let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
        regions
            .write_slice(now, segment.address)
            .map_err(|_| IOERR)?;
        rest = later;
    }
    Ok(Operation::Done(OK))
}

/// The ranges of a Discard in the namespace: blocks that are only touched stay.
fn discard(export: &Export, regions: &Regions, chain: &mut Chain) -> Result<Operation, u8> {
    let block = u64::from(export.block_size());
    let mut ranges = Vec::new();
    for (range, flags) in segments(export, regions, chain, MAX_DISCARD_SECTORS)? {
        if flags != 0 {
            return Err(UNSUPP);
        }
        let (start, end) = (
            range.start.next_multiple_of(block),
            range.end / block * block,
        );
        if start < end {
            ranges.push(start..end);
        }
    }
    Ok(Operation::Discard(ranges))
}

fn write_zeroes(export: &Export, regions: &Regions, chain: &mut Chain) -> Result<Operation, u8> {
    let block = u64::from(export.block_size());
    let mut ranges = SmallVec::new();
    for (range, flags) in segments(export, regions, chain, MAX_WRITE_ZEROES_SECTORS)? {
        if flags & !UNMAP != 0 {
            return Err(UNSUPP);
        }
        if !range.start.is_multiple_of(block) || !range.end.is_multiple_of(block) {
            return Err(IOERR);
        }
        let zeroes = match flags & UNMAP {
            0 => Zeroes::Allocated,
            _ => Zeroes::MayDeallocate,
        };
        if !range.is_empty() {
            ranges.push((range, zeroes));
        }
    }
    Ok(Operation::WriteZeroes(ranges))
}

/// The segments of a Discard or Write Zeroes: bytes of the namespace, and flags.
fn segments(
    export: &Export,
    regions: &Regions,
    chain: &mut Chain,
    max_sectors: u32,
) -> Result<Vec<(Range<u64>, u32)>, u8> {
    let bytes = total(&chain.readable);
    let most = u64::from(MAX_SEGMENTS) * SEGMENT as u64;
    if bytes == 0 || bytes > most || !bytes.is_multiple_of(SEGMENT as u64) {
        return Err(IOERR);
    }
    let mut list = vec![0; bytes as usize];
    chain.read_first(regions, &mut list).ok_or(IOERR)?;
    let (list, _) = list.as_chunks::<SEGMENT>();
    list.iter()
        .map(|segment| {
            let [low, high, sectors, flags] = words(segment);
            let sector = u64::from(high) << 32 | u64::from(low);
            let (offset, len) = (sector.checked_mul(SECTOR), u64::from(sectors) * SECTOR);
            let start = offset.and_then(|offset| export.locate(offset, len).ok());
            match start {
                Some(start) if sectors <= max_sectors => Ok((start..start + len, flags)),
                _ => Err(IOERR),
            }
        })
        .collect()
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|index| u32::from_le_bytes(words[index]))
}
