//! The free addresses: a set of disjoint ranges that hands out from either end and merges what
//! comes back.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Error, IovaRange};

/// What is used when the transport doesn't know: 39 bits, the least that IOMMUs have in practice,
/// without the lowest 64 KiB.
pub(crate) const DEFAULT_RANGE: IovaRange = IovaRange {
    first: 0x1_0000,
    last: 0x7f_ffff_ffff,
};

/// Which end of the free addresses to take from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Lowest,
    Highest,
}

/// Addresses that are `residue` modulo `modulus`, a power of two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alignment {
    pub(crate) modulus: u64,
    pub(crate) residue: u64,
}

/// Disjoint free ranges, never adjacent to each other.
#[derive(Debug)]
pub(crate) struct FreeRanges {
    /// First address to last address.
    free: BTreeMap<u64, u64>,
    /// The first addresses of those of about the same length. Alignment leaves many gaps, and what
    /// is too long for them must not look at each.
    by_length: Box<[BTreeSet<u64>]>,
    total: u64,
}

/// Lengths have the same class if they agree in their first three bits.
const CLASSES: usize = 4 * 64;

fn class(len: u64) -> usize {
    let exponent = len.ilog2();
    // The two bits after the first one.
    let rest = (u128::from(len) << 2 >> exponent) & 3;
    4 * exponent as usize + rest as usize
}

impl FreeRanges {
    /// The whole pages within `usable`, in any order and overlapping or not; the default range if
    /// there are none.
    ///
    /// Neither IOVA 0 is among them, which too many take for "none", nor the last page of all,
    /// so that `first + length` never overflows for anyone.
    pub(crate) fn new(usable: &[IovaRange], page_size: u64) -> Result<Self, Error> {
        let usable = if usable.is_empty() {
            &[DEFAULT_RANGE]
        } else {
            usable
        };
        let mut ranges = Vec::with_capacity(usable.len());
        for range in usable {
            if range.first > range.last {
                return Err(Error::Geometry {
                    reason: "a usable range ends before it begins",
                });
            }
            ranges.extend(whole_pages(*range, page_size));
        }
        ranges.sort_unstable_by_key(|range| range.first);

        let mut free = Self {
            free: BTreeMap::new(),
            by_length: vec![BTreeSet::new(); CLASSES].into(),
            total: 0,
        };
        let mut next = 0;
        for range in ranges {
            let first = range.first.max(next);
            if first <= range.last {
                free.give_back(first, range.last - first + 1);
                next = range.last + 1;
            }
        }
        if free.free.is_empty() {
            return Err(Error::Geometry {
                reason: "no usable range holds a whole page",
            });
        }
        Ok(free)
    }

    /// Takes `len` addresses as near to `end` as there are free ones so aligned; returns the first.
    pub(crate) fn take(&mut self, len: u64, end: End, alignment: Alignment) -> Option<u64> {
        let fits = |first: &u64| {
            let last = self.free[first];
            place(*first, last, len, end, alignment).map(|taken| (*first, last, taken))
        };
        let long_enough = self.by_length[class(len)..].iter();
        let (first, last, taken) = match end {
            End::Lowest => long_enough
                .filter_map(|firsts| firsts.iter().find_map(fits))
                .min(),
            End::Highest => long_enough
                .filter_map(|firsts| firsts.iter().rev().find_map(fits))
                .max(),
        }?;
        let taken_last = taken + (len - 1);
        self.remove(first);
        if first < taken {
            self.insert(first, taken - 1);
        }
        if taken_last < last {
            self.insert(taken_last + 1, last);
        }
        self.total -= len;
        Some(taken)
    }

    /// Makes `len` addresses from `first` free, which were taken before.
    pub(crate) fn give_back(&mut self, first: u64, len: u64) {
        let last = first + (len - 1);
        let mut merged = IovaRange { first, last };
        if let Some((&before, &before_last)) = self.free.range(..first).next_back() {
            debug_assert!(before_last < first, "given back twice");
            if before_last + 1 == first {
                self.remove(before);
                merged.first = before;
            }
        }
        if let Some(after_last) = last.checked_add(1).and_then(|after| self.remove(after)) {
            merged.last = after_last;
        }
        self.insert(merged.first, merged.last);
        self.total += len;
    }

    fn insert(&mut self, first: u64, last: u64) {
        self.free.insert(first, last);
        self.by_length[class(last - first + 1)].insert(first);
    }

    /// Takes out the range that begins at `first`, if there is one; returns its last address.
    fn remove(&mut self, first: u64) -> Option<u64> {
        let last = self.free.remove(&first)?;
        self.by_length[class(last - first + 1)].remove(&first);
        Some(last)
    }

    /// How many addresses are free.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The length of the longest free range.
    pub(crate) fn largest(&self) -> u64 {
        let longest = self
            .by_length
            .iter()
            .rev()
            .find(|firsts| !firsts.is_empty());
        let lengths = longest.into_iter().flatten();
        lengths
            .map(|first| self.free[first] - first + 1)
            .max()
            .unwrap_or(0)
    }
}

fn whole_pages(range: IovaRange, page_size: u64) -> Option<IovaRange> {
    let first = range.first.max(1).checked_next_multiple_of(page_size)?;
    // Exclusive; at most the beginning of the last page of all, see `FreeRanges::new`.
    let end = range.last.saturating_add(1) & !(page_size - 1);
    (first < end).then(|| IovaRange {
        first,
        last: end - 1,
    })
}

fn place(first: u64, last: u64, len: u64, end: End, alignment: Alignment) -> Option<u64> {
    let mask = alignment.modulus - 1;
    let highest = last.checked_sub(len - 1)?;
    let taken = match end {
        End::Lowest => first.checked_add(alignment.residue.wrapping_sub(first) & mask)?,
        End::Highest => highest.checked_sub(highest.wrapping_sub(alignment.residue) & mask)?,
    };
    (first..=highest).contains(&taken).then_some(taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    const PAGE: u64 = 0x1000;
    const ANYWHERE: Alignment = Alignment {
        modulus: PAGE,
        residue: 0,
    };

    fn free(usable: &[(u64, u64)]) -> FreeRanges {
        let usable: Vec<_> = usable
            .iter()
            .map(|&(first, last)| IovaRange { first, last })
            .collect();
        FreeRanges::new(&usable, PAGE).expect("usable")
    }

    fn ranges(free: &FreeRanges) -> Vec<(u64, u64)> {
        free.free
            .iter()
            .map(|(first, last)| (*first, *last))
            .collect()
    }

    #[test]
    fn none_reported_means_39_bits_from_64_kib() {
        let free = FreeRanges::new(&[], PAGE).expect("usable");
        assert_eq!(ranges(&free), [(0x1_0000, 0x7f_ffff_ffff)]);
        assert_eq!(free.total(), 0x7f_ffff_0000);
    }

    #[test]
    fn neither_address_zero_nor_the_last_page_is_handed_out() {
        let mut free = free(&[(0, u64::MAX)]);
        assert_eq!(ranges(&free), [(0x1000, 0xffff_ffff_ffff_efff)]);
        assert_eq!(free.take(PAGE, End::Lowest, ANYWHERE), Some(0x1000));
        assert_eq!(
            free.take(PAGE, End::Highest, ANYWHERE),
            Some(0xffff_ffff_ffff_e000)
        );
    }

    #[test]
    fn ranges_shrink_to_whole_pages_and_may_come_in_any_order() {
        let free = free(&[
            (0xfef0_0000, 0xffff_ffff),
            (0x5123, 0x9fff),
            (0x9000, 0xfedf_fffe),
            (0x1_0000_0800, 0x1_0000_1000),
        ]);
        assert_eq!(
            ranges(&free),
            [(0x6000, 0xfedf_efff), (0xfef0_0000, 0xffff_ffff)]
        );
        assert_eq!(free.largest(), 0xfedf_9000);
    }

    #[test]
    fn adjacent_ranges_are_one() {
        assert_eq!(
            ranges(&free(&[(0x2000, 0x2fff), (0x1000, 0x1fff)])),
            [(0x1000, 0x2fff)]
        );
    }

    #[test]
    fn hundreds_of_ranges_are_all_usable() {
        let usable: Vec<_> = (1..=1000)
            .map(|n| (n * 4 * PAGE, n * 4 * PAGE + PAGE - 1))
            .collect();
        let mut free = free(&usable);
        assert_eq!(free.take(2 * PAGE, End::Lowest, ANYWHERE), None);
        for (first, _) in usable {
            assert_eq!(free.take(PAGE, End::Lowest, ANYWHERE), Some(first));
        }
        assert_eq!(free.total(), 0);
    }

    #[test]
    fn nonsense_is_refused() {
        let backwards = [IovaRange {
            first: 0x3000,
            last: 0x2000,
        }];
        assert!(matches!(
            FreeRanges::new(&backwards, PAGE),
            Err(Error::Geometry { .. })
        ));
        let tiny = [IovaRange {
            first: 0x1001,
            last: 0x2ffe,
        }];
        assert!(matches!(
            FreeRanges::new(&tiny, PAGE),
            Err(Error::Geometry { .. })
        ));
    }

    #[test]
    fn alignment_follows_the_residue() {
        let mut free = free(&[(0x10_0000, 0x7fff_ffff)]);
        let alignment = Alignment {
            modulus: 0x20_0000,
            residue: 0x3000,
        };
        assert_eq!(
            free.take(0x20_0000, End::Lowest, alignment),
            Some(0x20_3000)
        );
        assert_eq!(
            free.take(0x20_0000, End::Highest, alignment),
            Some(0x7fc0_3000)
        );
        assert_eq!(free.take(PAGE, End::Lowest, ANYWHERE), Some(0x10_0000));
    }

    const WORLD: usize = 40;

    /// One history against a map of single pages: first fit from either end, nothing lost.
    fn run(holes: &[usize], steps: &[(bool, usize, usize)]) {
        let mut pages = [false; WORLD];
        pages[1..WORLD - 1].fill(true);
        holes.iter().for_each(|hole| pages[*hole] = false);
        let usable: Vec<_> = (0..WORLD)
            .filter(|page| pages[*page])
            .map(|page| (page as u64 * PAGE, page as u64 * PAGE + PAGE - 1))
            .collect();
        let mut free = free(&usable);
        let mut taken: Vec<(usize, usize)> = Vec::new();
        for &(lowest, len, choice) in steps {
            if choice % 3 == 0 && !taken.is_empty() {
                let (first, len) = taken.swap_remove(choice % taken.len());
                free.give_back(first as u64 * PAGE, len as u64 * PAGE);
                pages[first..first + len].fill(true);
            } else {
                let mut starts =
                    (0..=WORLD - len).filter(|first| pages[*first..first + len].iter().all(|p| *p));
                let expected = if lowest {
                    starts.next()
                } else {
                    starts.next_back()
                };
                let end = if lowest { End::Lowest } else { End::Highest };
                let got = free.take(len as u64 * PAGE, end, ANYWHERE);
                assert_eq!(got, expected.map(|first| first as u64 * PAGE));
                if let Some(first) = expected {
                    pages[first..first + len].fill(false);
                    taken.push((first, len));
                }
            }
            let count = pages.iter().filter(|page| **page).count();
            assert_eq!(free.total(), count as u64 * PAGE);
            for pair in ranges(&free).windows(2) {
                assert!(pair[0].1 + 1 < pair[1].0, "free ranges are merged");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            rng_seed: RngSeed::Fixed(1),
            ..ProptestConfig::with_cases(200)
        })]

        #[test]
        fn agrees_with_a_map_of_pages(
            holes in prop::collection::vec(1..WORLD - 1, 0..6),
            steps in prop::collection::vec((any::<bool>(), 1_usize..9, any::<usize>()), 1..120),
        ) {
            run(&holes, &steps);
        }
    }
}
