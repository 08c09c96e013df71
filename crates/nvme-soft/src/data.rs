//! Where a command's data is in host memory: PRP entries and lists, and SGLs
//! (base specification 2.0, sections 4.1.1 and 4.1.2).

use std::sync::Arc;

use nvme_spec::sgl::{Sgl, SglDescriptor};
use nvme_spec::{DataPointer, Status};
use zerocopy::FromBytes;

use crate::dma::Dma;
use crate::fault::Behaviour;

/// The segments of one SGL. A host can chain empty segments without end.
const MAX_SGL_SEGMENTS: usize = 1024;
/// The descriptors of one SGL, with those that describe nothing: they take time, and memory until the data is
/// moved. As many as the pieces that a host's memory is in need.
const MAX_SGL_DESCRIPTORS: u32 = 1 << 16;
/// Descriptors that are read at a time.
const SGL_READ: usize = 256;

/// What a piece of the data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Memory {
        address: u64,
        len: u64,
    },
    /// Data for the host that it does not want.
    BitBucket {
        len: u64,
    },
}

impl Piece {
    fn len(self) -> u64 {
        match self {
            Self::Memory { len, .. } | Self::BitBucket { len } => len,
        }
    }
}

/// Which way a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    ToHost,
    FromHost,
}

/// What a fault does to the data that a command sends to the host.
pub(crate) struct DataTamper {
    behaviour: Arc<Behaviour>,
    /// How far the data was moved, in bytes.
    moved: u64,
}

impl DataTamper {
    pub(crate) fn new(behaviour: Arc<Behaviour>) -> Self {
        Self {
            behaviour,
            moved: 0,
        }
    }

    /// Changes the next part of the data; returns how much of it reaches the host.
    fn apply(&mut self, data: &mut [u8]) -> usize {
        let start = self.moved;
        self.moved += data.len() as u64;
        match &*self.behaviour {
            Behaviour::CorruptData { offset, bytes } => {
                for (at, byte) in (*offset..).zip(bytes) {
                    if let Some(index) = at.checked_sub(start)
                        && let Some(place) = usize::try_from(index)
                            .ok()
                            .and_then(|index| data.get_mut(index))
                    {
                        *place = *byte;
                    }
                }
                data.len()
            }
            Behaviour::TruncateData(limit) => data
                .len()
                .min(usize::try_from(limit.saturating_sub(start)).unwrap_or(usize::MAX)),
            _ => data.len(),
        }
    }
}

/// The data of the command that is being served. Reused from command to command, so that small
/// ones allocate nothing.
#[derive(Default)]
pub(crate) struct Transfer {
    pieces: Vec<Piece>,
    /// How far the data was moved: whole pieces, and bytes of the next.
    done: usize,
    done_of_next: u64,
    list: Vec<u8>,
    /// For the command that is being served.
    pub(crate) tamper: Option<DataTamper>,
}

impl Transfer {
    /// Finds the `len` bytes that `data` describes; nothing of them is moved yet.
    pub(crate) fn prepare(
        &mut self,
        dma: &Dma,
        data: DataPointer,
        flow: Flow,
        len: u64,
        page_size: u64,
    ) -> Result<(), Status> {
        self.pieces.clear();
        self.done = 0;
        self.done_of_next = 0;
        match data {
            DataPointer::Prp { prp1, prp2 } => self.walk_prps(dma, prp1, prp2, len, page_size),
            DataPointer::Sgl(descriptor) => self.walk_sgl(dma, descriptor, flow, len),
        }
    }

    /// Moves the next `data.len()` bytes into host memory.
    pub(crate) fn send(&mut self, dma: &Dma, mut data: &[u8]) -> Result<(), Status> {
        if self.tamper.is_some() {
            return self.send_tampered(dma, data);
        }
        while let Some((piece, len)) = self.next(data.len()) {
            if let Piece::Memory { address, .. } = piece {
                dma.write(address, &data[..len])?;
            }
            data = &data[len..];
        }
        Ok(())
    }

    #[cold]
    fn send_tampered(&mut self, dma: &Dma, data: &[u8]) -> Result<(), Status> {
        let mut data = data.to_vec();
        let mut reaches = match &mut self.tamper {
            Some(tamper) => tamper.apply(&mut data),
            None => data.len(),
        };
        let mut data = data.as_slice();
        while let Some((piece, len)) = self.next(data.len()) {
            let part = len.min(reaches);
            if let Piece::Memory { address, .. } = piece
                && part > 0
            {
                dma.write(address, &data[..part])?;
            }
            reaches -= part;
            data = &data[len..];
        }
        Ok(())
    }

    /// Moves the next `out.len()` bytes out of host memory.
    pub(crate) fn receive(&mut self, dma: &Dma, mut out: &mut [u8]) -> Result<(), Status> {
        while let Some((piece, len)) = self.next(out.len()) {
            let (now, rest) = out.split_at_mut(len);
            if let Piece::Memory { address, .. } = piece {
                dma.read(address, now)?;
            }
            out = rest;
        }
        Ok(())
    }

    /// The next stretch of at most `limit` bytes, which then counts as moved.
    fn next(&mut self, limit: usize) -> Option<(Piece, usize)> {
        if limit == 0 {
            return None;
        }
        let piece = *self.pieces.get(self.done)?;
        let left = piece.len() - self.done_of_next;
        let len = left.min(limit as u64);
        let part = match piece {
            Piece::Memory { address, .. } => Piece::Memory {
                address: address + self.done_of_next,
                len,
            },
            Piece::BitBucket { .. } => Piece::BitBucket { len },
        };
        if len == left {
            self.done += 1;
            self.done_of_next = 0;
        } else {
            self.done_of_next += len;
        }
        Some((part, len as usize))
    }

    /// Adds a piece, as part of the one before where they touch.
    fn push(&mut self, address: u64, len: u64) {
        if let Some(Piece::Memory {
            address: before,
            len: before_len,
        }) = self.pieces.last_mut()
            && before.checked_add(*before_len) == Some(address)
        {
            *before_len += len;
            return;
        }
        self.pieces.push(Piece::Memory { address, len });
    }

    fn walk_prps(
        &mut self,
        dma: &Dma,
        prp1: u64,
        prp2: u64,
        len: u64,
        page_size: u64,
    ) -> Result<(), Status> {
        // Only the first entry may have an offset, and that of whole dwords.
        if !prp1.is_multiple_of(4) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let first = (page_size - prp1 % page_size).min(len);
        self.push(prp1, first);
        let left = len - first;
        if left == 0 {
            return Ok(());
        }
        if left <= page_size {
            return self.push_page(prp2, left, page_size).map(drop);
        }
        if !prp2.is_multiple_of(8) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        self.walk_prp_list(dma, prp2, left, page_size)
    }

    fn walk_prp_list(
        &mut self,
        dma: &Dma,
        mut list: u64,
        mut left: u64,
        page_size: u64,
    ) -> Result<(), Status> {
        let mut bytes = std::mem::take(&mut self.list);
        let mut result = Ok(());
        while left > 0 && result.is_ok() {
            // A list ends with its page; when more is needed its last entry is the next list.
            let room = (page_size - list % page_size) / 8;
            let needed = left.div_ceil(page_size);
            let chained = needed > room;
            let entries = if chained { room } else { needed };
            bytes.resize(entries as usize * 8, 0);
            result = dma.read(list, &mut bytes).and_then(|()| {
                let (entries, _) = bytes.as_chunks::<8>();
                let pages = entries.len() - usize::from(chained);
                for entry in &entries[..pages] {
                    left -= self.push_page(u64::from_le_bytes(*entry), left, page_size)?;
                }
                if chained {
                    list = u64::from_le_bytes(entries[pages]);
                    // Only the first list may begin within its page.
                    if !list.is_multiple_of(page_size) {
                        return Err(Status::PRP_OFFSET_INVALID);
                    }
                }
                Ok(())
            });
        }
        self.list = bytes;
        result
    }

    /// Adds a page, or what of `left` is in it; returns how much that is.
    fn push_page(&mut self, entry: u64, left: u64, page_size: u64) -> Result<u64, Status> {
        if !entry.is_multiple_of(page_size) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let len = left.min(page_size);
        self.push(entry, len);
        Ok(len)
    }

    fn walk_sgl(
        &mut self,
        dma: &Dma,
        first: SglDescriptor,
        flow: Flow,
        len: u64,
    ) -> Result<(), Status> {
        let mut total = 0;
        let mut next = self.take_descriptor(first, flow, &mut total)?;
        let mut descriptors = 0;
        let mut bytes = std::mem::take(&mut self.list);
        let mut segments = 0;
        let mut result = Ok(());
        while let Some(segment) = next
            && result.is_ok()
        {
            segments += 1;
            descriptors += u64::from(segment.len / SglDescriptor::SIZE);
            let is_too_long =
                segments > MAX_SGL_SEGMENTS || descriptors > MAX_SGL_DESCRIPTORS.into();
            result = if is_too_long {
                Err(Status::INVALID_SGL_COUNT)
            } else {
                self.walk_sgl_segment(dma, segment, flow, &mut total, &mut bytes)
                    .map(|following| next = following)
            };
        }
        self.list = bytes;
        result?;
        // Neither shorter nor longer: the latter is optional (SGLS bit 18) and not announced.
        if total == len {
            Ok(())
        } else {
            Err(Status::DATA_SGL_LENGTH_INVALID)
        }
    }

    fn walk_sgl_segment(
        &mut self,
        dma: &Dma,
        segment: Segment,
        flow: Flow,
        total: &mut u64,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<Segment>, Status> {
        let mut address = segment.address;
        let mut left = segment.len / SglDescriptor::SIZE;
        while left > 0 {
            let count = left.min(SGL_READ as u32);
            bytes.resize((count * SglDescriptor::SIZE) as usize, 0);
            dma.read(address, bytes)?;
            for chunk in bytes.chunks_exact(SglDescriptor::SIZE as usize) {
                left -= 1;
                let Ok(descriptor) = SglDescriptor::read_from_bytes(chunk) else {
                    return Err(Status::INTERNAL_ERROR);
                };
                let Some(following) = self.take_descriptor(descriptor, flow, total)? else {
                    continue;
                };
                if segment.last {
                    return Err(Status::INVALID_SGL_SEGMENT);
                }
                if left > 0 {
                    return Err(Status::INVALID_SGL_COUNT);
                }
                return Ok(Some(following));
            }
            address = address.wrapping_add(u64::from(count * SglDescriptor::SIZE));
        }
        // A segment that is not the last one ends with a descriptor of the next.
        if segment.last {
            Ok(None)
        } else {
            Err(Status::INVALID_SGL_SEGMENT)
        }
    }

    /// Takes in one descriptor; returns the segment that it points to, if it does.
    fn take_descriptor(
        &mut self,
        descriptor: SglDescriptor,
        flow: Flow,
        total: &mut u64,
    ) -> Result<Option<Segment>, Status> {
        match descriptor.decode().map_err(|error| error.status())? {
            Sgl::DataBlock { address, length } => {
                if address.checked_add(length.into()).is_none() {
                    return Err(Status::DATA_TRANSFER_ERROR);
                }
                if length > 0 {
                    self.push(address, length.into());
                    *total += u64::from(length);
                }
                Ok(None)
            }
            Sgl::BitBucket { length } => {
                // For data from the host a bit bucket has no meaning and no length.
                if flow == Flow::ToHost && length > 0 {
                    self.pieces.push(Piece::BitBucket { len: length.into() });
                    *total += u64::from(length);
                }
                Ok(None)
            }
            Sgl::Segment { address, length } => Ok(Some(Segment {
                address,
                len: length,
                last: false,
            })),
            Sgl::LastSegment { address, length } => Ok(Some(Segment {
                address,
                len: length,
                last: true,
            })),
        }
    }
}

#[derive(Clone, Copy)]
struct Segment {
    address: u64,
    len: u32,
    last: bool,
}
