//! Which pages of the chunks are free: a binary buddy allocator over bitmaps for each chunk, and
//! beside them an index of the chunks that have room.
//!
//! Numbers only: it has no lock, touches no memory of the pool, and allocates for itself only when
//! a chunk is added.

use super::free::Place;

/// Pages of one chunk.
pub(super) const PAGES: usize = 1 << (ORDERS - 1);

/// Sizes of blocks: a block of order `n` has `1 << n` pages and starts at a multiple of that.
pub(super) const ORDERS: usize = 10;

const WORD_BITS: usize = u64::BITS as usize;

/// Words of all bitmaps: one bit for each possible block, in whole words for each order.
const WORDS: usize = first_word(ORDERS);

/// The free blocks of all chunks.
#[derive(Debug, Default)]
pub(super) struct Buddies {
    chunks: Vec<Buddy>,
    /// For each order, a bitmap of the chunks that have such a block or a larger one.
    with_room: [Vec<u64>; ORDERS],
}

impl Buddies {
    /// Adds a chunk of which every page is free; its number is that of chunks before it.
    pub(super) fn add_chunk(&mut self) {
        let chunk = self.chunks.len();
        self.chunks.push(Buddy::new());
        for chunks in &mut self.with_room {
            chunks.resize(self.chunks.len().div_ceil(WORD_BITS), 0);
            chunks[chunk / WORD_BITS] |= bit(chunk);
        }
    }

    /// Takes a block of `order` from the first chunk that has one.
    pub(super) fn take(&mut self, order: usize) -> Option<Place> {
        let chunks = self.with_room.get(order)?;
        let word = chunks.iter().position(|&word| word != 0)?;
        let chunk = word * WORD_BITS + chunks[word].trailing_zeros() as usize;
        let page = self.change(chunk, |buddy| buddy.take(order))?;
        Some(Place { chunk, page })
    }

    /// Gives back a block that `take` returned for the same order.
    pub(super) fn give_back(&mut self, place: Place, order: usize) {
        self.change(place.chunk, |buddy| buddy.give_back(place.page, order));
    }

    fn change<T>(&mut self, chunk: usize, change: impl FnOnce(&mut Buddy) -> T) -> T {
        let buddy = &mut self.chunks[chunk];
        let before = buddy.orders_with_room();
        let result = change(buddy);
        let after = buddy.orders_with_room();
        for chunks in &mut self.with_room[before.min(after)..before.max(after)] {
            chunks[chunk / WORD_BITS] ^= bit(chunk);
        }
        result
    }
}

/// The smallest order whose blocks hold `pages` pages, if a chunk has such blocks.
pub(super) fn order_for(pages: usize) -> Option<usize> {
    let order = pages.checked_next_power_of_two()?.trailing_zeros() as usize;
    (order < ORDERS).then_some(order)
}

/// The free blocks of one chunk.
///
/// No two buddies are both free: they are one free block of the next order instead.
#[derive(Debug)]
struct Buddy {
    /// The bitmaps of all orders, lowest order first; a set bit is a free block.
    words: [u64; WORDS],
    /// Set bits in the bitmap of each order.
    free: [u16; ORDERS],
}

impl Buddy {
    /// A chunk of which every page is free.
    fn new() -> Self {
        let mut buddy = Self {
            words: [0; WORDS],
            free: [0; ORDERS],
        };
        buddy.insert(ORDERS - 1, 0);
        buddy
    }

    /// Takes the lowest free block of `order`, or part of the smallest larger one.
    ///
    /// Returns the block's first page.
    fn take(&mut self, order: usize) -> Option<usize> {
        let found = (order..ORDERS).find(|&order| self.free[order] > 0)?;
        let mut index = self.first(found)?;
        self.remove(found, index);
        for order in (order..found).rev() {
            index *= 2;
            self.insert(order, index + 1);
        }
        Some(index << order)
    }

    /// Gives back a block that `take` returned for the same order.
    fn give_back(&mut self, page: usize, order: usize) {
        let mut order = order;
        let mut index = page >> order;
        debug_assert_eq!(index << order, page, "no block of that order starts there");
        while order < ORDERS - 1 && self.contains(order, index ^ 1) {
            self.remove(order, index ^ 1);
            index /= 2;
            order += 1;
        }
        self.insert(order, index);
    }

    /// How many orders, from 0 on, there is a free block for.
    fn orders_with_room(&self) -> usize {
        self.free
            .iter()
            .rposition(|&free| free > 0)
            .map_or(0, |largest| largest + 1)
    }

    fn first(&self, order: usize) -> Option<usize> {
        let words = &self.words[first_word(order)..first_word(order + 1)];
        let word = words.iter().position(|&word| word != 0)?;
        Some(word * WORD_BITS + words[word].trailing_zeros() as usize)
    }

    fn contains(&self, order: usize, index: usize) -> bool {
        self.words[first_word(order) + index / WORD_BITS] & bit(index) != 0
    }

    fn insert(&mut self, order: usize, index: usize) {
        debug_assert!(!self.contains(order, index), "the block is free already");
        self.words[first_word(order) + index / WORD_BITS] |= bit(index);
        self.free[order] += 1;
    }

    fn remove(&mut self, order: usize, index: usize) {
        debug_assert!(self.contains(order, index), "the block is not free");
        self.words[first_word(order) + index / WORD_BITS] &= !bit(index);
        self.free[order] -= 1;
    }
}

const fn bit(index: usize) -> u64 {
    1 << (index % WORD_BITS)
}

/// Where the bitmap of `order` starts in [`Buddy::words`].
const fn first_word(order: usize) -> usize {
    let mut word = 0;
    let mut below = 0;
    while below < order {
        word += (PAGES >> below).div_ceil(WORD_BITS);
        below += 1;
    }
    word
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Take(usize),
        GiveBack(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            // Small blocks more often, or a few large ones end every sequence.
            3 => (0..3_usize).prop_map(Step::Take),
            2 => (0..ORDERS).prop_map(Step::Take),
            4 => any::<prop::sample::Index>().prop_map(Step::GiveBack),
        ]
    }

    fn config(cases: u32) -> ProptestConfig {
        // A fixed seed, and so no file of past failures in the tree.
        let rng_seed = RngSeed::Fixed(0x6e76_6d65);
        ProptestConfig {
            cases,
            rng_seed,
            failure_persistence: None,
            ..ProptestConfig::default()
        }
    }

    /// Pages in use, one `bool` each, and a search of all aligned places.
    struct Model([bool; PAGES]);

    impl Model {
        fn is_free(&self, page: usize, order: usize) -> bool {
            self.0[page..page + (1 << order)].iter().all(|used| !used)
        }

        fn can_take(&self, order: usize) -> bool {
            (0..PAGES)
                .step_by(1 << order)
                .any(|page| self.is_free(page, order))
        }

        fn set(&mut self, page: usize, order: usize, used: bool) {
            self.0[page..page + (1 << order)].fill(used);
        }
    }

    fn free_pages(buddy: &Buddy) -> usize {
        (0..ORDERS)
            .map(|order| usize::from(buddy.free[order]) << order)
            .sum()
    }

    proptest! {
        #![proptest_config(config(128))]

        #[test]
        fn agrees_with_a_naive_model(steps in prop::collection::vec(step(), 1..400)) {
            let mut buddy = Buddy::new();
            let mut model = Model([false; PAGES]);
            let mut taken = Vec::new();
            for step in steps {
                match step {
                    Step::Take(order) => match buddy.take(order) {
                        Some(page) => {
                            prop_assert!(page.is_multiple_of(1 << order));
                            prop_assert!(model.is_free(page, order), "an overlap at page {page}");
                            model.set(page, order, true);
                            taken.push((page, order));
                        }
                        // A buddy that can be merged always is, so a refusal is right only when
                        // no aligned place is left.
                        None => prop_assert!(!model.can_take(order)),
                    },
                    Step::GiveBack(_) if taken.is_empty() => {}
                    Step::GiveBack(index) => {
                        let (page, order) = taken.swap_remove(index.index(taken.len()));
                        buddy.give_back(page, order);
                        model.set(page, order, false);
                    }
                }
                let free = model.0.iter().filter(|&&used| !used).count();
                prop_assert_eq!(free_pages(&buddy), free);
                let room = (0..ORDERS).filter(|&order| model.can_take(order)).count();
                prop_assert_eq!(buddy.orders_with_room(), room);
                for order in 0..ORDERS {
                    let words = &buddy.words[first_word(order)..first_word(order + 1)];
                    let bits: u32 = words.iter().map(|word| word.count_ones()).sum();
                    prop_assert_eq!(bits, u32::from(buddy.free[order]));
                }
            }
            for (page, order) in taken {
                buddy.give_back(page, order);
            }
            prop_assert_eq!(buddy.orders_with_room(), ORDERS);
            prop_assert_eq!(free_pages(&buddy), PAGES);
        }
    }

    #[test]
    fn orders_are_the_powers_of_two_that_fit() {
        let orders = [
            (1, 0),
            (2, 1),
            (3, 2),
            (4, 2),
            (5, 3),
            (PAGES - 1, ORDERS - 1),
        ];
        for (pages, order) in orders {
            assert_eq!(order_for(pages), Some(order), "{pages} pages");
        }
        assert_eq!(order_for(PAGES), Some(ORDERS - 1));
        assert_eq!(order_for(PAGES + 1), None);
        assert_eq!(order_for(usize::MAX), None);
    }

    #[test]
    fn every_order_fills_the_chunk_exactly() {
        for order in 0..ORDERS {
            let mut buddy = Buddy::new();
            let blocks: Vec<_> = std::iter::from_fn(|| buddy.take(order)).collect();
            let expected: Vec<_> = (0..PAGES).step_by(1 << order).collect();
            assert_eq!(blocks, expected);
            assert_eq!(buddy.orders_with_room(), 0);
        }
    }

    #[test]
    fn a_small_block_comes_from_the_smallest_larger_one() {
        let mut buddy = Buddy::new();
        let first = buddy.take(0).unwrap();
        let large = buddy.take(ORDERS - 2).unwrap();
        // The splits for `first` left one free block of each order below.
        let second = buddy.take(0).unwrap();
        assert_eq!(second, first + 1);
        assert_eq!(buddy.take(ORDERS - 2), None);
        buddy.give_back(second, 0);
        buddy.give_back(first, 0);
        buddy.give_back(large, ORDERS - 2);
        assert_eq!(buddy.take(ORDERS - 1), Some(0));
    }

    #[test]
    fn the_first_chunk_with_room_serves() {
        let mut buddies = Buddies::default();
        assert_eq!(buddies.take(0), None);
        // More chunks than bits in a word of the index.
        for _ in 0..WORD_BITS + 2 {
            buddies.add_chunk();
        }
        for chunk in 0..WORD_BITS + 2 {
            assert_eq!(buddies.take(ORDERS - 1), Some(Place { chunk, page: 0 }));
        }
        assert_eq!(buddies.take(0), None);

        buddies.give_back(
            Place {
                chunk: WORD_BITS,
                page: 0,
            },
            ORDERS - 1,
        );
        assert_eq!(
            buddies.take(0),
            Some(Place {
                chunk: WORD_BITS,
                page: 0
            })
        );
        buddies.give_back(Place { chunk: 1, page: 0 }, ORDERS - 1);
        assert_eq!(buddies.take(ORDERS - 2), Some(Place { chunk: 1, page: 0 }));
        assert_eq!(buddies.take(ORDERS - 1), None);
        assert_eq!(
            buddies.take(ORDERS - 2),
            Some(Place {
                chunk: 1,
                page: PAGES / 2
            })
        );
        assert_eq!(
            buddies.take(ORDERS - 2),
            Some(Place {
                chunk: WORD_BITS,
                page: PAGES / 2
            })
        );
        assert_eq!(buddies.take(ORDERS - 2), None);
        assert_eq!(
            buddies.take(0),
            Some(Place {
                chunk: WORD_BITS,
                page: 1
            })
        );
    }

    proptest! {
        #![proptest_config(config(64))]

        #[test]
        fn the_index_of_chunks_is_exact(
            chunks in 1..4_usize,
            steps in prop::collection::vec(step(), 1..400),
        ) {
            let mut buddies = Buddies::default();
            for _ in 0..chunks {
                buddies.add_chunk();
            }
            let mut taken = Vec::new();
            for step in steps {
                match step {
                    Step::Take(order) => {
                        let expected =
                            buddies.chunks.iter().position(|buddy| buddy.orders_with_room() > order);
                        let block = buddies.take(order);
                        prop_assert_eq!(block.map(|place| place.chunk), expected);
                        taken.extend(block.map(|place| (place, order)));
                    }
                    Step::GiveBack(_) if taken.is_empty() => {}
                    Step::GiveBack(index) => {
                        let (place, order) = taken.swap_remove(index.index(taken.len()));
                        buddies.give_back(place, order);
                    }
                }
                for (order, with_room) in buddies.with_room.iter().enumerate() {
                    for (chunk, buddy) in buddies.chunks.iter().enumerate() {
                        let listed = with_room[chunk / WORD_BITS] & bit(chunk) != 0;
                        prop_assert_eq!(listed, buddy.orders_with_room() > order);
                    }
                }
            }
        }
    }
}
