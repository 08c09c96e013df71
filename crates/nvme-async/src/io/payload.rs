//! The kinds of memory that reads fill and writes send.
#![expect(
    unsafe_code,
    reason = "data is copied while parts of the memory may be under DMA"
)]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use iova::{HostMemory, Owner};

use super::registration::RegisteredSlice;
use crate::memory::DmaBuf;
use crate::memory::registered::{copy_from_registered, copy_to_registered};

/// Memory that a command can use. It is implemented for a closed set of types.
pub trait IoBuffer: Convert + Send + Sized + 'static {}

/// Memory that a read can fill: [`DmaBuf`], [`RegisteredSlice`], or several of either.
pub trait ReadBuffer: IoBuffer {}

/// Memory that a write can send: [`DmaBuf`], [`Bytes`], `Vec<u8>`, [`RegisteredSlice`], or several
/// `DmaBuf`s, `Bytes` or `RegisteredSlice`s.
///
/// Memory of the controller's pool (also as `Bytes`) and registered memory is used where it is;
/// of other memory, small buffers are copied, and large ones (64 KiB and more) mapped for the time of
/// the write. Where the IOMMU takes no more mappings, or no more memory can be locked, the write waits
/// its turn, and is copied if the queue stands still. `Bytes` may
/// [stay mapped](crate::OpenOptions::retained_bytes).
pub trait WriteBuffer: IoBuffer {}

mod sealed {
    use super::Payload;

    pub trait Convert {
        #[doc(hidden)]
        fn into_payload(self) -> Payload;
        #[doc(hidden)]
        fn from_payload(payload: Payload) -> Option<Self>
        where
            Self: Sized;
    }
}

pub(crate) use sealed::Convert;

/// Any of the buffer types, while a command has it.
#[derive(Default)]
pub enum Payload {
    #[default]
    #[doc(hidden)]
    None,
    #[doc(hidden)]
    Dma(DmaBuf),
    #[doc(hidden)]
    Bytes(Bytes),
    #[doc(hidden)]
    Vec(Vec<u8>),
    #[doc(hidden)]
    Registered(RegisteredSlice),
    #[doc(hidden)]
    ManyDma(Vec<DmaBuf>),
    #[doc(hidden)]
    ManyBytes(Vec<Bytes>),
    #[doc(hidden)]
    ManyRegistered(Vec<RegisteredSlice>),
    /// Shared by the parts of a split request.
    #[doc(hidden)]
    Shared(Arc<Self>),
}

macro_rules! convert {
    ($($type:ty => $variant:ident: $($kind:ident),+;)+) => {$(
        impl Convert for $type {
            #[inline]
            fn into_payload(self) -> Payload {
                Payload::$variant(self)
            }

            #[inline]
            fn from_payload(payload: Payload) -> Option<Self> {
                match payload {
                    Payload::$variant(buffer) => Some(buffer),
                    _ => None,
                }
            }
        }
        impl IoBuffer for $type {}
        $(impl $kind for $type {})+
    )+};
}

convert! {
    DmaBuf => Dma: ReadBuffer, WriteBuffer;
    Bytes => Bytes: WriteBuffer;
    Vec<u8> => Vec: WriteBuffer;
    RegisteredSlice => Registered: ReadBuffer, WriteBuffer;
    Vec<DmaBuf> => ManyDma: ReadBuffer, WriteBuffer;
    Vec<Bytes> => ManyBytes: WriteBuffer;
    Vec<RegisteredSlice> => ManyRegistered: ReadBuffer, WriteBuffer;
}

/// One run of memory of a payload.
pub(crate) enum Piece<'a> {
    Dma {
        buf: &'a DmaBuf,
        range: Range<usize>,
    },
    Foreign {
        bytes: &'a [u8],
        /// The shared, immutable memory that they are a part of.
        owner: Option<&'a Bytes>,
    },
    Registered {
        slice: &'a RegisteredSlice,
        range: Range<usize>,
    },
}

impl Payload {
    /// How many bytes there are.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Dma(buf) => buf.len(),
            Self::Bytes(bytes) => bytes.len(),
            Self::Vec(bytes) => bytes.len(),
            Self::Registered(slice) => slice.len(),
            Self::ManyDma(bufs) => bufs.iter().map(|buf| buf.len()).sum(),
            Self::ManyBytes(bytes) => bytes.iter().map(Bytes::len).sum(),
            Self::ManyRegistered(slices) => slices.iter().map(RegisteredSlice::len).sum(),
            Self::Shared(payload) => payload.len(),
        }
    }

    /// Calls `f` with the runs of memory that hold the bytes of `range`, in order, until it
    /// returns an error.
    pub(crate) fn try_for_each<E>(
        &self,
        range: Range<usize>,
        mut f: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::None => Ok(()),
            Self::Shared(payload) => payload.try_for_each(range, f),
            Self::Dma(buf) => f(Piece::Dma { buf, range }),
            Self::Bytes(bytes) => f(shared(bytes, range)),
            Self::Vec(bytes) => f(Piece::Foreign {
                bytes: &bytes[range],
                owner: None,
            }),
            Self::Registered(slice) => f(Piece::Registered { slice, range }),
            Self::ManyDma(bufs) => each_within(
                bufs.iter(),
                |buf| buf.len(),
                range,
                |buf, range| f(Piece::Dma { buf, range }),
            ),
            Self::ManyBytes(all) => each_within(
                all.iter(),
                |bytes| bytes.len(),
                range,
                |bytes, range| f(shared(bytes, range)),
            ),
            Self::ManyRegistered(slices) => each_within(
                slices.iter(),
                |slice| slice.len(),
                range,
                |slice, range| f(Piece::Registered { slice, range }),
            ),
        }
    }

    /// Copies the bytes of `range` to `to`, which is as long.
    pub(crate) fn copy_out(&self, range: Range<usize>, to: &mut [u8]) {
        let mut rest = to;
        let copied: Result<(), ()> = self.try_for_each(range, |piece| {
            let (len, source) = piece.source();
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            rest = later;
            match source {
                Side::Memory(from) => {
                    // SAFETY: the piece is `len` readable bytes of a buffer that `self` owns, and
                    // that the device at most reads: this is a write's payload. `now` is other
                    // memory, since it is borrowed mutably.
                    unsafe { now.as_mut_ptr().copy_from_nonoverlapping(from, len) };
                    Ok(())
                }
                Side::Registered(slice, offset) => {
                    copy_from_registered(slice.memory(), offset, now).map_err(drop)
                }
            }
        });
        debug_assert_eq!(copied, Ok(()));
    }

    /// Copies `from` to the bytes of `range`.
    ///
    /// # Safety
    ///
    /// The payload is one that a read may fill, and nothing else accesses the bytes of `range`:
    /// no command uses them, and no reference to them exists.
    pub(crate) unsafe fn fill(&self, range: Range<usize>, from: &[u8]) {
        let mut rest = from;
        let copied: Result<(), ()> = self.try_for_each(range, |piece| {
            let (now, later) = rest.split_at(piece.len());
            rest = later;
            match piece {
                Piece::Dma { buf, range } => {
                    // SAFETY: the range lies inside of the buffer (`each_within`, or the request's
                    // own check of its length).
                    let to = unsafe { buf.addr().add(range.start) };
                    // SAFETY: writable memory of a buffer that `self` owns and that, by the
                    // caller's word, nothing else accesses; `now` is other memory, since a shared
                    // borrow of it exists.
                    unsafe { to.copy_from_nonoverlapping(NonNull::from(now).cast(), now.len()) };
                    Ok(())
                }
                Piece::Registered { slice, range } => {
                    let offset = slice.offset() + range.start;
                    copy_to_registered(slice.memory(), offset, now).map_err(drop)
                }
                Piece::Foreign { .. } => Err(()),
            }
        });
        debug_assert_eq!(copied, Ok(()));
    }
}

enum Side<'a> {
    Memory(*const u8),
    Registered(&'a RegisteredSlice, usize),
}

impl<'a> Piece<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Dma { range, .. } | Self::Registered { range, .. } => range.len(),
            Self::Foreign { bytes, .. } => bytes.len(),
        }
    }

    /// The first byte. For its address; a piece of a read's payload is written through other ways.
    pub(crate) fn addr(&self) -> *const u8 {
        match self {
            Self::Dma { buf, range } => buf.addr().as_ptr().wrapping_add(range.start),
            Self::Foreign { bytes, .. } => bytes.as_ptr(),
            Self::Registered { slice, range } => slice.addr().wrapping_add(range.start),
        }
    }

    /// What keeps the memory in place and unchanged beyond the request, and all of that memory.
    pub(crate) fn owner(&self) -> Option<(HostMemory<'static>, Owner)> {
        match self {
            Self::Foreign {
                owner: Some(bytes), ..
            } => {
                let whole = NonNull::new(bytes.as_ptr().cast_mut())?;
                let whole = HostMemory::new(whole, bytes.len());
                Some((whole, Arc::new(Bytes::clone(bytes))))
            }
            _ => None,
        }
    }

    fn source(&self) -> (usize, Side<'a>) {
        let len = self.len();
        let side = match self {
            Self::Dma { buf, range } => Side::Memory(buf.addr().as_ptr().wrapping_add(range.start)),
            Self::Foreign { bytes, .. } => Side::Memory(bytes.as_ptr()),
            Self::Registered { slice, range } => {
                Side::Registered(slice, slice.offset() + range.start)
            }
        };
        (len, side)
    }
}

fn shared(bytes: &Bytes, range: Range<usize>) -> Piece<'_> {
    Piece::Foreign {
        bytes: &bytes[range],
        owner: Some(bytes),
    }
}

fn each_within<T, E>(
    buffers: impl Iterator<Item = T>,
    len_of: impl Fn(&T) -> usize,
    range: Range<usize>,
    mut f: impl FnMut(T, Range<usize>) -> Result<(), E>,
) -> Result<(), E> {
    let mut start = 0;
    for buffer in buffers {
        let len = len_of(&buffer);
        let from = range.start.clamp(start, start + len) - start;
        let to = range.end.clamp(start, start + len) - start;
        if from < to {
            f(buffer, from..to)?;
        }
        start += len;
    }
    Ok(())
}
