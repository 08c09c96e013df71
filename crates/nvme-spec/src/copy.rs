//! The data of Copy (NVM, section 3.2.2, figure "Copy - Source Range Entries Descriptor Format 0h").

use core::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most source ranges of one command; MSRC of the namespace may allow less.
pub const MAX_RANGES: usize = 256;

/// A source range in descriptor format 0, 32 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SourceRange {
    #[doc(hidden)]
    pub reserved_0: [u8; 8],
    /// The first logical block.
    pub slba: U64,
    /// Number of Logical Blocks, 0's based.
    pub nlb: U16,
    #[doc(hidden)]
    pub reserved_18: [u8; 6],
    /// Expected Initial Logical Block Reference Tag, for protection information.
    pub eilbrt: U32,
    /// Expected Logical Block Application Tag, for protection information.
    pub elbat: U16,
    /// Expected Logical Block Application Tag Mask, for protection information.
    pub elbatm: U16,
}

const _: () = {
    assert!(size_of::<SourceRange>() == 32);
    assert!(offset_of!(SourceRange, slba) == 8);
    assert!(offset_of!(SourceRange, nlb) == 16);
    assert!(offset_of!(SourceRange, eilbrt) == 24);
    assert!(offset_of!(SourceRange, elbat) == 28);
    assert!(offset_of!(SourceRange, elbatm) == 30);
};

impl SourceRange {
    /// `blocks` logical blocks from `slba` on, 1 to 65,536: debug builds assert it, others clamp.
    pub const fn new(slba: u64, blocks: u32) -> Self {
        Self {
            reserved_0: [0; 8],
            slba: U64::new(slba),
            nlb: U16::new(crate::admin::zeroes_based(blocks, 1) as u16),
            reserved_18: [0; 6],
            eilbrt: U32::ZERO,
            elbat: U16::ZERO,
            elbatm: U16::ZERO,
        }
    }

    /// How many logical blocks, 1 to 65,536.
    pub const fn blocks(&self) -> u32 {
        self.nlb.get() as u32 + 1
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn a_source_range_counts_from_zero() {
        let range = SourceRange::new(0x0102_0304_0506_0708, 0x1_0000);
        let mut expected = [0; 32];
        expected[8..16].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        expected[16..18].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(range.as_bytes(), expected);
        assert_eq!(range.blocks(), 0x1_0000);
        assert_eq!(SourceRange::new(0, 1).nlb.get(), 0);
    }
}
