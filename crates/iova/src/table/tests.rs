//! The table against a list, with tenants that only count.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::RngSeed;

use super::*;

/// A tenant that gives its slot back to its table, as leases do.
struct Tally {
    table: Weak<Table<Self>>,
    left: Arc<AtomicUsize>,
}

impl Tenant for Tally {
    type Notify = ();

    fn notify(&self) {}

    fn idle((): ()) {}

    fn leave(self: Box<Self>, slot: SlotRef<Self>) {
        self.left.fetch_add(1, Ordering::Relaxed);
        if let Some(table) = self.table.upgrade() {
            table.recycle(slot);
        }
    }
}

struct World {
    table: Arc<Table<Tally>>,
    left: Arc<AtomicUsize>,
    entries: Vec<(Place, SlotRef<Tally>)>,
    admitted: usize,
}

impl World {
    fn new() -> Self {
        Self {
            table: Arc::new(Table::new()),
            left: Arc::default(),
            entries: Vec::new(),
            admitted: 0,
        }
    }

    fn insert(&mut self, first: usize, len: usize, direction: Direction) {
        self.admitted += 1;
        let place = Place {
            first,
            last: first + (len - 1),
            // Tells mappings apart, and from offsets in them.
            iova: (self.admitted as u64) << 44,
            direction,
            temporary: false,
        };
        let tenant = Box::new(Tally {
            table: Arc::downgrade(&self.table),
            left: Arc::clone(&self.left),
        });
        let slot = self.table.admit(place, tenant, true, 0);
        self.table.link(slot);
        self.entries.push((place, slot));
    }

    fn remove(&mut self, index: usize) -> SlotRef<Tally> {
        let (_, slot) = self.entries.swap_remove(index);
        self.table.unlink(slot);
        if let Some(tenant) = slot.end() {
            tenant.leave(slot);
        }
        slot
    }

    fn find(&self, first: usize, len: usize, direction: Direction) -> Option<Found<Tally>> {
        self.table
            .find(first, first + (len - 1), direction, |_| true)
    }

    fn check(&self, first: usize, len: usize, direction: Direction) {
        let holders: Vec<u64> = self
            .entries
            .iter()
            .map(|(place, _)| place)
            .filter(|place| place.first <= first && first + (len - 1) <= place.last)
            .filter(|place| place.direction.allows(direction))
            .map(|place| place.iova + (first - place.first) as u64)
            .collect();
        match self.find(first, len, direction) {
            Some(found) => assert!(holders.contains(&found.iova)),
            None => assert!(holders.is_empty(), "{holders:x?}"),
        }
    }

    fn finish(mut self) {
        while !self.entries.is_empty() {
            self.remove(0);
        }
        assert!(self.table.is_empty());
        assert_eq!(self.left.load(Ordering::Relaxed), self.admitted);
    }
}

const PAGE: usize = 0x1000;
const KIB_64: usize = 0x1_0000;
const MIB_2: usize = 0x20_0000;
const GIB: usize = 0x4000_0000;

#[test]
fn every_edge_of_every_span() {
    let mut world = World::new();
    let all = [PAGE, KIB_64, MIB_2, GIB, 512 * GIB];
    for size in all {
        for first in [size, 3 * size - PAGE, 3 * size + PAGE, 5 * size + 1] {
            for len in [1, PAGE, size - 1, size, size + 1, 2 * size] {
                world.insert(first, len, Direction::Bidirectional);
                let last = first + (len - 1);
                for at in [first - 1, first, first + len / 2, last, last + 1] {
                    world.check(at, 1, Direction::ToDevice);
                    world.check(at, 2, Direction::ToDevice);
                    world.check(at, PAGE, Direction::ToDevice);
                }
                world.check(first, len, Direction::FromDevice);
                world.check(first, len + 1, Direction::FromDevice);
                world.remove(world.entries.len() - 1);
                assert!(world.find(first, 1, Direction::ToDevice).is_none());
                assert!(world.table.is_empty());
            }
        }
    }
    world.finish();
}

#[test]
fn large_memory_takes_few_entries() {
    let world = &mut World::new();
    world.insert(
        0x7f00_0000_0000 + 3 * PAGE,
        64 * GIB,
        Direction::Bidirectional,
    );
    let writer = lock(&world.table.writer.0);
    let nodes: usize = writer.nodes.iter().map(|arena| arena.slabs.len()).sum();
    // The root, one each down to the entries of 1 GiB, and three more at each end.
    assert!(nodes <= 9, "{nodes} nodes");
}

#[test]
fn addresses_beyond_all_processors_are_not_found() {
    let world = World::new();
    assert!(
        world
            .find(END_OF_HOST - 1, 1, Direction::ToDevice)
            .is_none()
    );
    assert!(world.find(END_OF_HOST, 1, Direction::ToDevice).is_none());
    assert!(world.find(usize::MAX, 1, Direction::ToDevice).is_none());
}

#[test]
fn a_tenant_leaves_with_the_last_guard() {
    let mut world = World::new();
    world.insert(0x10_0000, PAGE, Direction::ToDevice);
    let one = world
        .find(0x10_0000, 1, Direction::ToDevice)
        .expect("there");
    let two = one.pinned.clone();
    let slot = world.remove(0);
    assert!(world.find(0x10_0000, 1, Direction::ToDevice).is_none());
    assert_eq!((slot.guards(), world.left.load(Ordering::Relaxed)), (2, 0));
    drop(one);
    assert_eq!(world.left.load(Ordering::Relaxed), 0);
    drop(two);
    assert_eq!(world.left.load(Ordering::Relaxed), 1);
    // The next one gets the slot.
    world.insert(0x20_0000, PAGE, Direction::ToDevice);
    assert!(world.entries[0].1 == slot);
    world.finish();
}

#[test]
fn memory_is_used_again() {
    let mut world = World::new();
    let size = |world: &World| {
        let writer = lock(&world.table.writer.0);
        let nodes: usize = writer.nodes.iter().map(|arena| arena.slabs.len()).sum();
        let cells: usize = writer.cells.iter().map(|arena| arena.slabs.len()).sum();
        (nodes, cells, writer.slots.slabs.len())
    };
    let mut after_first = None;
    for round in 0..50 {
        // Elsewhere each time, as the addresses of a program that runs for long.
        let base = 0x5500_0000_0000 + round * 3 * GIB;
        for index in 0..40 {
            world.insert(base + index * KIB_64 / 2, KIB_64, Direction::ToDevice);
        }
        while !world.entries.is_empty() {
            world.remove(world.entries.len() / 2);
        }
        assert_eq!(
            *after_first.get_or_insert_with(|| size(&world)),
            size(&world)
        );
    }
    world.finish();
}

#[derive(Clone, Debug)]
enum Step {
    Insert(usize, usize, Direction),
    Remove(Index),
    Find(usize, usize, Direction),
}

fn directions() -> impl Strategy<Value = Direction> {
    prop::sample::select(vec![
        Direction::ToDevice,
        Direction::FromDevice,
        Direction::Bidirectional,
    ])
}

/// Addresses near the edges of spans of all sizes, so that many ranges overlap and nest.
fn ranges() -> impl Strategy<Value = (usize, usize)> {
    let size = prop::sample::select(vec![1, 0x100, PAGE, KIB_64, MIB_2, GIB]);
    let near = || prop::sample::select(vec![-0x1000_isize, -1, 0, 1, 0x1000]);
    (size, 1..4_usize, near(), 1..3_usize, near()).prop_map(|(size, at, by, count, longer)| {
        let first = (0x7f00_0000_0000 + at * size).wrapping_add_signed(by);
        let len = (count * size).saturating_add_signed(longer).max(1);
        (first, len)
    })
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (ranges(), directions())
            .prop_map(|((first, len), direction)| Step::Insert(first, len, direction)),
        2 => any::<Index>().prop_map(Step::Remove),
        5 => (ranges(), directions())
            .prop_map(|((first, len), direction)| Step::Find(first, len, direction)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::with_cases(400)
    })]

    #[test]
    fn agrees_with_a_list(steps in prop::collection::vec(steps(), 1..150)) {
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Insert(first, len, direction) => world.insert(first, len, direction),
                Step::Remove(index) if !world.entries.is_empty() => {
                    world.remove(index.index(world.entries.len()));
                }
                Step::Remove(_) => {}
                Step::Find(first, len, direction) => world.check(first, len, direction),
            }
        }
        world.finish();
    }
}
