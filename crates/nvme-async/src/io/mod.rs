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
pub(crate) use self::part::{End, Order, Part};
pub(crate) use self::payload::{Convert, Payload};
pub use self::payload::{IoBuffer, ReadBuffer, WriteBuffer};
pub use self::registration::{RegisteredSlice, Registration};
pub use self::requests::{Compare, Read, ReadInto, Write};

use crate::memory::{DmaBuf, DmaWords};

/// Everything that a command uses until the device is done with it.
///
/// The fields are dropped in this order: mappings before the memory that they map.
#[derive(Default)]
pub(crate) struct Holdings {
    /// Mappings that exist for this command, and look-ups in those that exist anyway.
    pub(crate) mapped: SmallVec<[Mapped; 1]>,
    /// The PRP list or SGL segment.
    pub(crate) list: Option<DmaWords>,
    /// Memory that the device uses in place of the payload.
    pub(crate) bounce: Option<Bounce>,
    /// The caller's memory.
    pub(crate) payload: Payload,
}

impl Holdings {
    /// The caller's memory, after all else was dropped.
    pub(crate) fn take_payload(&mut self) -> Payload {
        self.mapped.clear();
        (self.list, self.bounce) = (None, None);
        std::mem::take(&mut self.payload)
    }
}

/// A bounce buffer.
pub(crate) enum Bounce {
    Pool(DmaBuf),
    /// Boxed, since it is larger than all else and rare.
    Reserve(Box<ReserveBlock>),
}
