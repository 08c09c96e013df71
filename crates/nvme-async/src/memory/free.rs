//! The free blocks of a pool: a buddy allocator behind a short memory of what was freed last.

use super::buddy::{Buddies, ORDERS};

/// Blocks remembered for each order: a burst of completions at a usual queue depth.
const REMEMBERED: usize = 32;

/// Where a block starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Number of the chunk.
    pub(super) chunk: usize,
    /// First page in the chunk.
    pub(super) page: usize,
}

/// All free blocks.
///
/// In a pool that is mostly free, a buddy allocator would split a whole chunk for each small block
/// and put it together again when that is freed. So blocks that were just freed wait for the next
/// request of their size, which also finds them in the CPU's caches. They go back to the buddies
/// when there are too many, or when a request can't be met otherwise.
#[derive(Debug, Default)]
pub(super) struct FreeBlocks {
    buddies: Buddies,
    recent: [Recent; ORDERS],
}

impl FreeBlocks {
    /// Adds a chunk of which every page is free; its number is that of chunks before it.
    pub(super) fn add_chunk(&mut self) {
        self.buddies.add_chunk();
    }

    /// Takes a block of `order`, if there is one.
    pub(super) fn take(&mut self, order: usize) -> Option<Place> {
        if let Some(place) = self.recent[order].pop() {
            return Some(place);
        }
        self.buddies.take(order).or_else(|| {
            self.forget();
            self.buddies.take(order)
        })
    }

    /// Gives back a block that `take` returned for the same order.
    pub(super) fn give_back(&mut self, place: Place, order: usize) {
        if !self.recent[order].push(place) {
            self.buddies.give_back(place, order);
        }
    }

    fn forget(&mut self) {
        for (order, recent) in self.recent.iter_mut().enumerate() {
            while let Some(place) = recent.pop() {
                self.buddies.give_back(place, order);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Recent {
    places: [Place; REMEMBERED],
    len: usize,
}

impl Recent {
    fn push(&mut self, place: Place) -> bool {
        let Some(free) = self.places.get_mut(self.len) else {
            return false;
        };
        *free = place;
        self.len += 1;
        true
    }

    fn pop(&mut self) -> Option<Place> {
        self.len = self.len.checked_sub(1)?;
        Some(self.places[self.len])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::buddy::PAGES;
    use super::*;

    #[test]
    fn the_block_freed_last_is_used_first() {
        let mut free = FreeBlocks::default();
        free.add_chunk();
        let first = free.take(0).unwrap();
        let second = free.take(0).unwrap();
        free.give_back(first, 0);
        free.give_back(second, 0);
        assert_eq!((free.take(0), free.take(0)), (Some(second), Some(first)));
    }

    #[test]
    fn blocks_that_wait_are_merged_when_a_larger_one_is_needed() {
        let mut free = FreeBlocks::default();
        free.add_chunk();
        for freed in [1, REMEMBERED, REMEMBERED + 1, PAGES] {
            let blocks: Vec<_> = (0..freed).map(|_| free.take(0).unwrap()).collect();
            assert_eq!(free.take(ORDERS - 1), None);
            let distinct: BTreeSet<_> = blocks.iter().copied().collect();
            assert_eq!(distinct.len(), freed);

            blocks
                .into_iter()
                .for_each(|place| free.give_back(place, 0));
            let whole = free.take(ORDERS - 1);
            assert_eq!(whole, Some(Place { chunk: 0, page: 0 }));
            assert_eq!(free.take(0), None);
            free.give_back(Place { chunk: 0, page: 0 }, ORDERS - 1);
        }
    }
}
