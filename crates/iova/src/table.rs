//! Finding the fixed mapping that holds a buffer: an immutable, sorted snapshot that readers use
//! without a lock and writers replace.
//!
//! The snapshot is an array of chunks of at most [`CHUNK`] entries, shared between snapshots, so
//! that a change costs one chunk and the array of chunks rather than everything. Mappings may
//! overlap in host memory (the same memory registered twice): the search begins at the last one
//! that starts at or before the buffer and goes back as long as an earlier one may reach its end.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::ArcSwap;

use crate::Direction;

/// The most entries in a chunk; few in unit tests, so that they see many chunks.
const CHUNK: usize = if cfg!(test) { 4 } else { 256 };

/// One fixed mapping: the host bytes `first..=last`, and the lease that keeps it mapped.
#[derive(Debug)]
pub(crate) struct Entry<L> {
    pub(crate) first: usize,
    pub(crate) last: usize,
    /// The I/O address of byte `first`.
    pub(crate) iova: u64,
    pub(crate) direction: Direction,
    /// Weak, so that neither the table nor an old snapshot of it keeps anything mapped.
    pub(crate) lease: Weak<L>,
}

impl<L> Clone for Entry<L> {
    fn clone(&self) -> Self {
        Self {
            lease: Weak::clone(&self.lease),
            ..*self
        }
    }
}

/// The fixed mappings by host address.
#[derive(Debug)]
pub(crate) struct Table<L> {
    snapshot: ArcSwap<Snapshot<L>>,
    writer: Mutex<()>,
}

impl<L> Table<L> {
    pub(crate) fn new() -> Self {
        Self {
            snapshot: ArcSwap::from_pointee(Snapshot::new(Vec::new())),
            writer: Mutex::new(()),
        }
    }

    /// A live mapping that holds all of `first..=last` and allows `direction`: its lease, and the
    /// I/O address of byte `first`.
    pub(crate) fn find(
        &self,
        first: usize,
        last: usize,
        direction: Direction,
    ) -> Option<(Arc<L>, u64)> {
        self.snapshot.load().find(first, last, direction)
    }

    pub(crate) fn insert(&self, entry: Entry<L>) {
        self.replace(|snapshot| snapshot.with(entry));
    }

    /// Takes out the entry of `lease`, which starts at `first`.
    pub(crate) fn remove(&self, first: usize, lease: &Weak<L>) {
        self.replace(|snapshot| snapshot.without(first, lease));
    }

    fn replace(&self, change: impl FnOnce(&Snapshot<L>) -> Snapshot<L>) {
        // What the lock guards is replaced whole, so a panic elsewhere can't have left it broken.
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.snapshot.load());
        self.snapshot.store(Arc::new(changed));
    }
}

/// Three arrays of one length; the first two are all that most searches touch of the upper level.
#[derive(Debug)]
struct Snapshot<L> {
    /// Where the first entry of each chunk starts.
    starts: Box<[usize]>,
    /// The highest `last` in this chunk and all before it.
    reaches: Box<[usize]>,
    chunks: Vec<Arc<Chunk<L>>>,
}

impl<L> Snapshot<L> {
    fn new(chunks: Vec<Arc<Chunk<L>>>) -> Self {
        Self {
            starts: chunks.iter().map(|chunk| chunk.starts[0]).collect(),
            reaches: running_maximum(chunks.iter().map(|chunk| chunk.reach())),
            chunks,
        }
    }

    fn find(&self, first: usize, last: usize, direction: Direction) -> Option<(Arc<L>, u64)> {
        let candidates = self.starts.partition_point(|start| *start <= first);
        (0..candidates)
            .rev()
            .take_while(|chunk| self.reaches[*chunk] >= last)
            .find_map(|chunk| self.chunks[chunk].find(first, last, direction))
    }

    fn with(&self, entry: Entry<L>) -> Self {
        let mut chunks = self.chunks.clone();
        let position = self
            .starts
            .partition_point(|start| *start <= entry.first)
            .max(1)
            - 1;
        let mut entries = chunks
            .get(position)
            .map_or_else(Vec::new, |chunk| chunk.entries.to_vec());
        let within = entries.partition_point(|other| other.first <= entry.first);
        entries.insert(within, entry);
        let replaced = position..chunks.len().min(position + 1);
        chunks.splice(replaced, split(entries));
        Self::new(chunks)
    }

    fn without(&self, first: usize, lease: &Weak<L>) -> Self {
        let mut chunks = self.chunks.clone();
        let candidates = self.starts.partition_point(|start| *start <= first);
        let holder = (0..candidates)
            .rev()
            .find_map(|chunk| Some((chunk, chunks[chunk].position(first, lease)?)));
        if let Some((chunk, position)) = holder {
            let mut entries = chunks[chunk].entries.to_vec();
            entries.remove(position);
            let mut replaced = chunk..chunk + 1;
            // Small neighbours become one, or a history of removals would leave chunks of one.
            if let Some(next) = chunks.get(chunk + 1)
                && entries.len() + next.entries.len() <= CHUNK / 2
            {
                entries.extend(next.entries.iter().cloned());
                replaced.end += 1;
            }
            chunks.splice(replaced, split(entries));
        }
        Self::new(chunks)
    }
}

/// Entries sorted by `first`; never empty.
#[derive(Debug)]
struct Chunk<L> {
    /// `first` of each entry, apart so that the search touches few cache lines.
    starts: Box<[usize]>,
    /// The highest `last` of each entry and all before it.
    reaches: Box<[usize]>,
    entries: Box<[Entry<L>]>,
}

impl<L> Chunk<L> {
    fn new(entries: &[Entry<L>]) -> Self {
        Self {
            starts: entries.iter().map(|entry| entry.first).collect(),
            reaches: running_maximum(entries.iter().map(|entry| entry.last)),
            entries: entries.into(),
        }
    }

    fn reach(&self) -> usize {
        self.reaches[self.reaches.len() - 1]
    }

    fn find(&self, first: usize, last: usize, direction: Direction) -> Option<(Arc<L>, u64)> {
        let candidates = self.starts.partition_point(|start| *start <= first);
        (0..candidates)
            .rev()
            .take_while(|index| self.reaches[*index] >= last)
            .find_map(|index| {
                let entry = &self.entries[index];
                if entry.last < last || !entry.direction.allows(direction) {
                    return None;
                }
                let lease = entry.lease.upgrade()?;
                Some((lease, entry.iova + (first - entry.first) as u64))
            })
    }

    fn position(&self, first: usize, lease: &Weak<L>) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.first == first && entry.lease.ptr_eq(lease))
    }
}

fn split<L>(entries: Vec<Entry<L>>) -> impl Iterator<Item = Arc<Chunk<L>>> {
    let size = if entries.len() > CHUNK {
        entries.len().div_ceil(2)
    } else {
        CHUNK
    };
    let chunks: Vec<_> = entries
        .chunks(size)
        .map(|part| Arc::new(Chunk::new(part)))
        .collect();
    chunks.into_iter()
}

fn running_maximum(values: impl Iterator<Item = usize>) -> Box<[usize]> {
    values
        .scan(0, |maximum, value| {
            *maximum = value.max(*maximum);
            Some(*maximum)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    fn entry(lease: &Arc<u64>, first: usize, len: usize, direction: Direction) -> Entry<u64> {
        let last = first + (len - 1);
        Entry {
            first,
            last,
            iova: **lease,
            direction,
            lease: Arc::downgrade(lease),
        }
    }

    /// What the search relies on: chunks sorted and full enough, and none empty.
    fn check<L>(table: &Table<L>) -> usize {
        let snapshot = table.snapshot.load();
        let entries: Vec<_> = snapshot
            .chunks
            .iter()
            .flat_map(|chunk| chunk.entries.iter())
            .collect();
        assert!(entries.is_sorted_by_key(|entry| entry.first));
        assert!(
            snapshot
                .chunks
                .iter()
                .all(|chunk| (1..=CHUNK).contains(&chunk.entries.len()))
        );
        entries.len()
    }

    #[test]
    fn both_ends_must_be_inside() {
        let table = Table::new();
        let lease = Arc::new(0x10_0000);
        table.insert(entry(&lease, 0x1000, 0x1000, Direction::Bidirectional));
        let iova = |first, last| {
            table
                .find(first, last, Direction::ToDevice)
                .map(|found| found.1)
        };
        assert_eq!(iova(0x1000, 0x1fff), Some(0x10_0000));
        assert_eq!(iova(0x1fff, 0x1fff), Some(0x10_0fff));
        assert_eq!(iova(0x1fff, 0x2000), None);
        assert_eq!(iova(0x0fff, 0x1000), None);
        assert_eq!(iova(0x2000, 0x2000), None);
        assert_eq!(iova(0x0, 0xffff), None);
    }

    #[test]
    fn a_dead_lease_is_not_found_and_the_next_one_is() {
        let table = Table::new();
        let (wide, narrow) = (Arc::new(0x10_0000), Arc::new(0x20_0000));
        table.insert(entry(&wide, 0x1000, 0x4000, Direction::Bidirectional));
        table.insert(entry(&narrow, 0x2000, 0x1000, Direction::Bidirectional));
        let iova = || {
            table
                .find(0x2000, 0x2fff, Direction::ToDevice)
                .map(|found| found.1)
        };
        assert_eq!(iova(), Some(0x20_0000));
        drop(narrow);
        assert_eq!(iova(), Some(0x10_1000));
        drop(wide);
        assert_eq!(iova(), None);
    }

    #[test]
    fn removing_the_same_lease_twice_changes_nothing() {
        let table = Table::new();
        let (one, other) = (Arc::new(1 << 20), Arc::new(2 << 20));
        table.insert(entry(&one, 0x1000, 0x1000, Direction::ToDevice));
        table.insert(entry(&other, 0x1000, 0x1000, Direction::ToDevice));
        table.remove(0x1000, &Arc::downgrade(&one));
        table.remove(0x1000, &Arc::downgrade(&one));
        assert_eq!(check(&table), 1);
        let found = table
            .find(0x1000, 0x1000, Direction::ToDevice)
            .expect("the other one");
        assert_eq!(*found.0, 2 << 20);
    }

    fn directions() -> impl Strategy<Value = Direction> {
        prop::sample::select(vec![
            Direction::ToDevice,
            Direction::FromDevice,
            Direction::Bidirectional,
        ])
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(usize, usize, Direction),
        Remove(prop::sample::Index),
        Find(usize, usize, Direction),
    }

    fn steps() -> impl Strategy<Value = Step> {
        // Few places, and a few very long ones among the short: many overlaps at any distance.
        let len = prop_oneof![6 => 1_usize..9, 1 => 20_usize..200];
        prop_oneof![
            3 => (1_usize..200, len.clone(), directions())
                .prop_map(|(first, len, direction)| Step::Insert(first, len, direction)),
            2 => any::<prop::sample::Index>().prop_map(Step::Remove),
            5 => (1_usize..200, len, directions())
                .prop_map(|(first, len, direction)| Step::Find(first, len, direction)),
        ]
    }

    fn run(steps: Vec<Step>) {
        let table = Table::new();
        let mut held: Vec<(Arc<u64>, usize, usize, Direction)> = Vec::new();
        for (step, number) in steps.into_iter().zip(1_u64..) {
            match step {
                Step::Insert(first, len, direction) => {
                    let lease = Arc::new(number << 32);
                    table.insert(entry(&lease, first, len, direction));
                    held.push((lease, first, len, direction));
                }
                Step::Remove(index) if !held.is_empty() => {
                    let (lease, first, ..) = held.swap_remove(index.index(held.len()));
                    table.remove(first, &Arc::downgrade(&lease));
                }
                Step::Remove(_) => {}
                Step::Find(first, len, direction) => {
                    let holders: Vec<u64> = held
                        .iter()
                        .filter(|(_, start, length, allowed)| {
                            *start <= first
                                && first + len <= start + length
                                && (*allowed == direction || *allowed == Direction::Bidirectional)
                        })
                        .map(|(lease, start, ..)| **lease + (first - start) as u64)
                        .collect();
                    match table.find(first, first + len - 1, direction) {
                        Some((_, iova)) => assert!(holders.contains(&iova)),
                        None => assert_eq!(holders, []),
                    }
                }
            }
            assert_eq!(check(&table), held.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            rng_seed: RngSeed::Fixed(1),
            ..ProptestConfig::with_cases(200)
        })]

        #[test]
        fn agrees_with_a_list(steps in prop::collection::vec(steps(), 1..150)) {
            run(steps);
        }
    }
}
