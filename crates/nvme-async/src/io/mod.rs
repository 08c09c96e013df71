//! From a buffer and a range of bytes to commands and back.

mod context;
mod part;
pub(crate) mod payload;
pub(crate) mod registration;
mod requests;
pub(crate) mod split;
mod transfer;

use iova::Mapped;
use smallvec::SmallVec;

pub(crate) use self::context::{DmaContext, Flow, ReserveBlock};
pub(crate) use self::part::{End, Order, Part, Reason};
pub(crate) use self::payload::{Convert, Payload};
pub use self::payload::{IoBuffer, ReadBuffer, WriteBuffer};
pub use self::registration::{RegisteredSlice, Registration};
pub use self::requests::{Compare, Read, ReadInto, Write};

use crate::memory::{DmaBuf, DmaWords};

/// Everything that a command uses until the device is done with it.
///
/// The fields are dropped in this order.
#[derive(Default)]
pub(crate) struct Holdings {
    /// Nothing for memory of the pool that the command itself says all of.
    pub(crate) reach: Option<Reach>,
    /// The caller's memory.
    pub(crate) payload: Payload,
}

/// What it takes, besides the command, that the device reaches a payload.
///
/// The fields are dropped in this order: mappings before the memory that they map.
#[derive(Default)]
pub(crate) struct Reach {
    /// Mappings that exist for this command, and look-ups in those that exist anyway.
    pub(crate) mapped: SmallVec<[Mapped; 1]>,
    /// The PRP list or SGL segment.
    pub(crate) _list: Option<DmaWords>,
    /// Memory that the device uses in place of the payload.
    pub(crate) bounce: Option<Bounce>,
}

impl Holdings {
    pub(crate) fn new(payload: Payload) -> Self {
        Self {
            reach: None,
            payload,
        }
    }

    /// The caller's memory, after all else was dropped.
    #[inline]
    pub(crate) fn take_payload(&mut self) -> Payload {
        self.reach = None;
        std::mem::take(&mut self.payload)
    }

    #[inline]
    pub(crate) fn as_mut(&mut self) -> HoldingsMut<'_> {
        HoldingsMut {
            reach: &mut self.reach,
            payload: &mut self.payload,
        }
    }
}

/// Holdings whose parts may lie in different places: the future of a request keeps its payload, and
/// has no room for what is large and rare.
pub(crate) struct HoldingsMut<'a> {
    pub(crate) reach: &'a mut Option<Reach>,
    pub(crate) payload: &'a mut Payload,
}

impl HoldingsMut<'_> {
    #[inline]
    pub(crate) fn reborrow(&mut self) -> HoldingsMut<'_> {
        HoldingsMut {
            reach: self.reach,
            payload: self.payload,
        }
    }

    /// Swaps them with others.
    #[inline]
    pub(crate) fn swap(self, other: &mut Holdings) {
        std::mem::swap(self.payload, &mut other.payload);
        if self.reach.is_some() || other.reach.is_some() {
            std::mem::swap(self.reach, &mut other.reach);
        }
    }
}

/// A bounce buffer.
pub(crate) enum Bounce {
    Pool(DmaBuf),
    /// Boxed, since it is larger than all else and rare.
    Reserve(Box<ReserveBlock>),
}
