//! The data of Dataset Management (NVM, section 3.2.3, figure "Dataset Management - Range
//! Definition").

use core::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most ranges of one command.
pub const MAX_RANGES: usize = 256;

/// A range of logical blocks, 16 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Range {
    /// Context Attributes: hints on the use of the range; 0 for none.
    pub context_attributes: U32,
    /// Length in logical blocks. Unlike most counts this is *not* 0's based: 0 is no block.
    pub blocks: U32,
    /// The first logical block.
    pub slba: U64,
}

const _: () = {
    assert!(size_of::<Range>() == 16);
    assert!(offset_of!(Range, blocks) == 4);
    assert!(offset_of!(Range, slba) == 8);
};

impl Range {
    /// `blocks` logical blocks from `slba` on, without hints.
    pub const fn new(slba: u64, blocks: u32) -> Self {
        Self {
            context_attributes: U32::ZERO,
            blocks: U32::new(blocks),
            slba: U64::new(slba),
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn a_range_has_its_length_before_its_start() {
        let range = Range::new(0x1122_3344_5566_7788, 0x0a0b_0c0d);
        assert_eq!(
            range.as_bytes(),
            [
                0, 0, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11
            ]
        );
    }
}
