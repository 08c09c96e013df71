//! Distributing ranges of blocks over commands that take lists of them.

use std::ops::Range;

/// What limits one command.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchLimits {
    /// Ranges; not 0.
    pub(super) ranges: usize,
    /// Blocks of one range; not 0.
    pub(super) range_blocks: u64,
    /// Blocks of all ranges together; not 0.
    pub(super) blocks: u64,
}

/// The lists of as few commands as the limits allow, with all blocks in their order. `entry` makes
/// the list's entry of a first block and a number of blocks.
pub(super) fn batches<T>(
    ranges: &[Range<u64>],
    limits: BatchLimits,
    entry: impl Fn(u64, u64) -> T,
) -> impl Iterator<Item = Vec<T>> {
    let mut ranges = ranges.iter().cloned();
    let mut rest = 0..0;
    std::iter::from_fn(move || {
        let mut batch = Vec::new();
        let mut room = limits.blocks;
        while batch.len() < limits.ranges && room > 0 {
            if rest.is_empty() {
                match ranges.next() {
                    Some(range) => rest = range,
                    None => break,
                }
                continue;
            }
            let count = (rest.end - rest.start).min(limits.range_blocks).min(room);
            batch.push(entry(rest.start, count));
            room -= count;
            rest.start += count;
        }
        (!batch.is_empty()).then_some(batch)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn batches_hold_all_blocks_in_order_within_the_limits(
            lens in prop::collection::vec((0..1000u64, 1..5000u64), 0..40),
            max_ranges in 1..20usize,
            range_blocks in 1..3000u64,
            blocks in 1..20_000u64,
        ) {
            let ranges: Vec<_> = lens.iter().map(|&(start, len)| start..start + len).collect();
            let limits = BatchLimits { ranges: max_ranges, range_blocks, blocks };
            let batches: Vec<_> = batches(&ranges, limits, |start, count| (start, count)).collect();
            let mut found = Vec::new();
            for (index, batch) in batches.iter().enumerate() {
                prop_assert!(!batch.is_empty() && batch.len() <= max_ranges);
                let total: u64 = batch.iter().map(|&(_, count)| count).sum();
                prop_assert!(total <= blocks);
                for &(start, count) in batch {
                    prop_assert!(count > 0 && count <= range_blocks);
                    found.extend(start..start + count);
                }
                // None could have taken more.
                let last = index + 1 == batches.len();
                prop_assert!(last || batch.len() == max_ranges || total == blocks);
            }
            let expected: Vec<u64> = ranges.iter().cloned().flatten().collect();
            prop_assert_eq!(found, expected);
        }
    }
}
