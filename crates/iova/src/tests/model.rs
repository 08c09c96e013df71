//! Random histories against a naive model: a list of mappings, and a map of single pages.

use std::sync::Weak;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::RngSeed;

use super::*;
use crate::testing::{Failure, LiveMapping};
use crate::{IovaRange, MapError};

/// Pages of I/O addresses; few, so that they run out. Unusable: the first, the last, and a window.
const PAGES: usize = 24;
const RESERVED: [usize; 4] = [0, 9, 10, PAGES - 1];
const MAX_MAPPINGS: usize = 9;
/// Host memory: a few pages, so that registrations overlap.
const HOST: usize = 0x10_0000;
const HOST_LEN: usize = 10 * PAGE;

#[derive(Clone, Debug)]
enum Step {
    Register(Place, Option<Failure>),
    MapTemporary(Place, bool, Option<Failure>),
    LookUp(Place),
    Guard(Index),
    Unregister(Index, Option<Failure>),
    Release(Index, Option<Failure>),
}

#[derive(Clone, Copy, Debug)]
struct Place {
    addr: usize,
    len: usize,
    direction: Direction,
}

impl Place {
    fn holds(&self, other: &Self) -> bool {
        self.addr <= other.addr && other.addr + other.len <= self.addr + self.len
    }
}

fn places() -> impl Strategy<Value = Place> {
    let directions = [
        Direction::ToDevice,
        Direction::FromDevice,
        Direction::Bidirectional,
    ];
    // Half of all places begin at a page: many that are equal, adjacent, or one byte off.
    let offset = prop_oneof![Just(0), Just(1), Just(PAGE - 1), 0..PAGE];
    let len = prop_oneof![Just(PAGE), Just(1), Just(PAGE + 1), 1..4 * PAGE];
    (
        0..HOST_LEN / PAGE,
        offset,
        len,
        prop::sample::select(directions.to_vec()),
    )
        .prop_map(|(page, offset, len, direction)| Place {
            addr: HOST + page * PAGE + offset,
            len,
            direction,
        })
}

fn map_failures() -> impl Strategy<Value = Option<Failure>> {
    let failures = [
        Failure::OutOfEntries,
        Failure::MemoryLimit,
        Failure::AlreadyMapped,
        Failure::Invalid,
        Failure::Io,
    ];
    prop::option::weighted(0.1, prop::sample::select(failures.to_vec()))
}

fn unmap_failures() -> impl Strategy<Value = Option<Failure>> {
    let failures = [Failure::ShortUnmap, Failure::Invalid, Failure::Io];
    prop::option::weighted(0.03, prop::sample::select(failures.to_vec()))
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (places(), map_failures()).prop_map(|(place, failure)| Step::Register(place, failure)),
        3 => (places(), any::<bool>(), map_failures())
            .prop_map(|(place, owned, failure)| Step::MapTemporary(place, owned, failure)),
        6 => places().prop_map(Step::LookUp),
        1 => any::<Index>().prop_map(Step::Guard),
        3 => (any::<Index>(), unmap_failures())
            .prop_map(|(which, failure)| Step::Unregister(which, failure)),
        5 => (any::<Index>(), unmap_failures())
            .prop_map(|(which, failure)| Step::Release(which, failure)),
    ]
}

/// A mapping as the model knows it.
#[derive(Debug)]
struct Expected {
    place: Place,
    fixed: bool,
    /// First page of I/O addresses, and how many.
    pages: (usize, usize),
    /// The registration and the guards that hold it.
    holders: usize,
    registered: bool,
    leaked: bool,
    /// Dead when the owner was dropped; `None` without one.
    owner: Option<Weak<()>>,
}

impl Expected {
    fn iova(&self) -> u64 {
        (self.pages.0 * PAGE + self.place.addr % PAGE) as u64
    }

    fn live(&self) -> LiveMapping {
        LiveMapping {
            iova: (self.pages.0 * PAGE) as u64,
            addr: self.place.addr - self.place.addr % PAGE,
            len: self.pages.1 * PAGE,
            readable: self.place.direction != Direction::FromDevice,
            writable: self.place.direction != Direction::ToDevice,
            file_offset: None,
        }
    }
}

struct World {
    space: AddressSpace,
    mapper: Arc<TestMapper>,
    /// By number; gone ones are `None`, so that the numbers stay.
    mappings: Vec<Option<Expected>>,
    registrations: Vec<(usize, FixedMapping)>,
    guards: Vec<(usize, Place, Mapped)>,
    /// Pages that the mapper said someone else uses.
    quarantined: Vec<(usize, usize)>,
}

impl World {
    fn new() -> Self {
        let usable = (0..PAGES)
            .filter(|page| !RESERVED.contains(page))
            .map(|page| IovaRange {
                first: (page * PAGE) as u64,
                last: (page * PAGE + PAGE - 1) as u64,
            });
        let (space, mapper) = on(TestMapper::new(Geometry {
            usable: merged(usable),
            page_sizes: PAGE as u64,
            max_mappings: Some(MAX_MAPPINGS as u64),
        }));
        Self {
            space,
            mapper,
            mappings: Vec::new(),
            registrations: Vec::new(),
            guards: Vec::new(),
            quarantined: Vec::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Register(place, failure) => self.map(place, true, true, failure),
            Step::MapTemporary(place, owned, failure) => self.map(place, false, owned, failure),
            Step::LookUp(place) => self.look_up(place),
            Step::Guard(which) if !self.registrations.is_empty() => {
                let (number, fixed) = which.get(&self.registrations);
                let guard = fixed.guard();
                let mapping = self.mappings[*number].as_mut().expect("held");
                mapping.holders += 1;
                self.guards.push((*number, mapping.place, guard));
            }
            Step::Unregister(which, failure) if !self.registrations.is_empty() => {
                let (number, fixed) = self
                    .registrations
                    .swap_remove(which.index(self.registrations.len()));
                self.mappings[number].as_mut().expect("held").registered = false;
                self.let_go(number, failure, fixed);
            }
            Step::Release(which, failure) if !self.guards.is_empty() => {
                let (number, _, guard) = self.guards.swap_remove(which.index(self.guards.len()));
                self.let_go(number, failure, guard);
            }
            Step::Guard(_) | Step::Unregister(..) | Step::Release(..) => {}
        }
        self.check();
    }

    fn map(&mut self, place: Place, fixed: bool, owned: bool, failure: Option<Failure>) {
        let count = (place.addr % PAGE + place.len).div_ceil(PAGE);
        let expected = self.first_fit(count, fixed);
        if let Some(failure) = failure {
            self.mapper.fail_map(failure);
        }
        let memory = Arc::new(());
        let owner = owned.then(|| Arc::downgrade(&memory));
        let Place {
            addr,
            len,
            direction,
        } = place;
        let number = self.mappings.len();
        let result = if fixed {
            register(&self.space, addr, len, direction, memory).map(|fixed| {
                assert_eq!(fixed.len(), len);
                let iova = fixed.iova();
                self.registrations.push((number, fixed));
                iova
            })
        } else {
            let owner = owned.then_some(memory as Owner);
            map_temporary(&self.space, addr, len, direction, owner).map(|guard| {
                assert_eq!(guard.len(), len);
                let iova = guard.iova();
                self.guards.push((number, place, guard));
                iova
            })
        };
        self.mapper.clear_failures();

        match (result, expected, failure) {
            (
                Err(Error::MappingLimit {
                    in_use,
                    max: Some(_),
                }),
                ..,
            ) if self.entries() == MAX_MAPPINGS => {
                assert_eq!(in_use, MAX_MAPPINGS as u64);
            }
            (result, ..) if self.entries() == MAX_MAPPINGS => panic!("{result:?} past the limit"),
            (Err(Error::OutOfAddresses { .. }), None, _) => {}
            (Err(Error::MappingLimit { .. }), Some(_), Some(Failure::OutOfEntries))
            | (Err(Error::MemoryLimit { .. }), Some(_), Some(Failure::MemoryLimit)) => {}
            (
                Err(Error::Map {
                    source: MapError::AlreadyMapped,
                    ..
                }),
                Some(first),
                Some(Failure::AlreadyMapped),
            ) => self.quarantined.push((first, count)),
            (Err(Error::Map { .. }), Some(_), Some(Failure::Invalid | Failure::Io)) => {}
            (Ok(iova), Some(first), None) => {
                let mapping = Expected {
                    place,
                    fixed,
                    pages: (first, count),
                    holders: 1,
                    registered: fixed,
                    leaked: false,
                    owner,
                };
                assert_eq!(iova, mapping.iova());
                self.mappings.push(Some(mapping));
                return;
            }
            (result, ..) => panic!("{result:?} where {expected:?} was expected ({failure:?})"),
        }
        assert!(
            owner.is_none_or(|owner| owner.strong_count() == 0),
            "refused, so not kept"
        );
    }

    fn look_up(&mut self, wanted: Place) {
        let found = look_up(&self.space, wanted.addr, wanted.len, wanted.direction);
        let holders: Vec<_> = self
            .mappings
            .iter_mut()
            .enumerate()
            .filter_map(|(number, mapping)| Some((number, mapping.as_mut()?)))
            .filter(|(_, mapping)| mapping.registered && mapping.place.holds(&wanted))
            .filter(|(_, mapping)| mapping.place.direction.allows(wanted.direction))
            .collect();
        let Some(guard) = found else {
            assert!(holders.is_empty(), "{wanted:x?} is in {holders:x?}");
            return;
        };
        assert_eq!(guard.len(), wanted.len);
        let (number, mapping) = holders
            .into_iter()
            .find(|(_, mapping)| {
                mapping.iova() + (wanted.addr - mapping.place.addr) as u64 == guard.iova()
            })
            .expect("what is found is registered");
        mapping.holders += 1;
        self.guards.push((number, wanted, guard));
    }

    fn let_go<T>(&mut self, number: usize, failure: Option<Failure>, handle: T) {
        if let Some(failure) = failure {
            self.mapper.fail_unmap(failure);
        }
        drop(handle);
        self.mapper.clear_failures();
        let slot = &mut self.mappings[number];
        let mapping = slot.as_mut().expect("held");
        mapping.holders -= 1;
        if mapping.holders == 0 {
            mapping.leaked = failure.is_some();
            if !mapping.leaked {
                let owner = slot.take().and_then(|mapping| mapping.owner);
                assert!(
                    owner.is_none_or(|owner| owner.strong_count() == 0),
                    "unmapped, so freed"
                );
            }
        }
    }

    fn check(&self) {
        assert_eq!(self.mapper.violations(), [""; 0]);

        let mut live: Vec<_> = self.mappings.iter().flatten().map(Expected::live).collect();
        live.sort();
        assert_eq!(self.mapper.live(), live);

        for mapping in self.mappings.iter().flatten() {
            let owner = mapping.owner.as_ref();
            assert!(
                owner.is_none_or(|owner| owner.strong_count() == 1),
                "mapped, so kept"
            );
        }
        for (_, place, guard) in &self.guards {
            let reached = self
                .mapper
                .translate(guard.iova(), guard.len(), place.direction);
            assert_eq!(reached, Some(place.addr));
        }

        let usage = self.space.usage();
        let count = |fixed| {
            let held = self
                .mappings
                .iter()
                .flatten()
                .filter(|mapping| !mapping.leaked);
            held.filter(|mapping| mapping.fixed == fixed).count() as u64
        };
        assert_eq!(
            (usage.fixed_mappings, usage.temporary_mappings),
            (count(true), count(false))
        );
        let mappings = usage.fixed_mappings + usage.temporary_mappings + usage.leaked_mappings;
        assert_eq!(mappings, self.entries() as u64);
        let free = self.free_pages().iter().filter(|free| **free).count();
        assert_eq!(usage.free_bytes, (free * PAGE) as u64);
        let taken = usage.fixed_bytes + usage.temporary_bytes + usage.leaked_bytes;
        assert_eq!(
            taken + usage.free_bytes,
            ((PAGES - RESERVED.len()) * PAGE) as u64
        );
    }

    fn entries(&self) -> usize {
        self.mappings.iter().flatten().count() + self.quarantined.len()
    }

    fn free_pages(&self) -> [bool; PAGES] {
        let mut free = [true; PAGES];
        RESERVED.iter().for_each(|page| free[*page] = false);
        let mapped = self.mappings.iter().flatten().map(|mapping| mapping.pages);
        for (first, count) in mapped.chain(self.quarantined.iter().copied()) {
            free[first..first + count].fill(false);
        }
        free
    }

    fn first_fit(&self, count: usize, lowest: bool) -> Option<usize> {
        let free = self.free_pages();
        let mut fits =
            (0..=PAGES - count).filter(|first| free[*first..first + count].iter().all(|f| *f));
        if lowest {
            fits.next()
        } else {
            fits.next_back()
        }
    }

    /// Everything is let go of; what remains mapped is what could not be unmapped.
    fn finish(mut self) {
        while let Some((number, _, guard)) = self.guards.pop() {
            self.let_go(number, None, guard);
        }
        while let Some((number, fixed)) = self.registrations.pop() {
            self.mappings[number].as_mut().expect("held").registered = false;
            self.let_go(number, None, fixed);
        }
        assert!(self.mappings.iter().flatten().all(|mapping| mapping.leaked));
        self.check();
        drop(self.space);
        assert_eq!(
            Arc::strong_count(&self.mapper),
            1,
            "nothing but leaked owners is left"
        );
    }
}

/// Adjacent ranges as one, as a kernel reports them.
fn merged(ranges: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
    let mut merged: Vec<IovaRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(before) if before.last + 1 == range.first => before.last = range.last,
            _ => merged.push(range),
        }
    }
    merged
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::with_cases(400)
    })]

    #[test]
    fn agrees_with_the_model(steps in prop::collection::vec(steps(), 1..150)) {
        let mut world = World::new();
        steps.into_iter().for_each(|step| world.step(step));
        world.finish();
    }
}
