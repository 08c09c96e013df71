//! Cutting a range of blocks into commands.

use std::ops::Range;

/// What limits one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Most blocks in one command; not 0.
    pub(crate) max_blocks: u64,
    /// Commands should not cross multiples of so many blocks (NOIOB, NVM command set
    /// specification 1.0, "Identify Namespace"); 0 if it does not matter.
    pub(crate) boundary: u64,
}

/// The commands for `blocks`, in order and without a gap.
pub(crate) fn split(blocks: Range<u64>, limits: Limits) -> impl Iterator<Item = Range<u64>> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        if next >= blocks.end {
            return None;
        }
        let start = next;
        next = end_of_first(start..blocks.end, limits);
        Some(start..next)
    })
}

/// Whether one command is enough for `blocks`.
#[inline]
pub(crate) fn fits(blocks: &Range<u64>, limits: Limits) -> bool {
    end_of_first(blocks.clone(), limits) == blocks.end
}

#[inline]
fn end_of_first(blocks: Range<u64>, limits: Limits) -> u64 {
    let by_size = blocks.start.saturating_add(limits.max_blocks);
    let by_boundary = match limits.boundary {
        0 => u64::MAX,
        boundary => (blocks.start / boundary + 1).saturating_mul(boundary),
    };
    blocks.end.min(by_size).min(by_boundary)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_cover_the_range_and_keep_the_limits(
            start in 0..1_000_000u64,
            len in 1..5000u64,
            max_blocks in 1..600u64,
            boundary in prop_oneof![Just(0u64), 1..300u64],
        ) {
            let limits = Limits { max_blocks, boundary };
            let parts: Vec<_> = split(start..start + len, limits).collect();
            let mut next = start;
            for part in &parts {
                prop_assert_eq!(part.start, next);
                prop_assert!(part.start < part.end);
                prop_assert!(part.end - part.start <= max_blocks);
                prop_assert_eq!(
                    part.start.checked_div(boundary),
                    (part.end - 1).checked_div(boundary)
                );
                next = part.end;
            }
            prop_assert_eq!(next, start + len);
            prop_assert_eq!(parts.len() == 1, fits(&(start..start + len), limits));
        }
    }
}
