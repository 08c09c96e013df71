//! Random histories against naive models: sets of byte ranges, and an IOMMU that pins pages.

use std::future::Future;
use std::pin::Pin;
use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::RngSeed;

use super::pinning::{Pinning, pages};
use super::*;
use crate::testing::Failure;
use crate::{IovaRange, MapError, MapRequest, Register, Retention, Unregister};

/// Pages of I/O addresses; few, so that they run out. Unusable: the first, the last, and a window.
const PAGES: usize = 24;
const RESERVED: [usize; 4] = [0, 9, 10, PAGES - 1];
const MAX_MAPPINGS: usize = 9;
const RETENTION: Retention = Retention {
    bytes: 6 * PAGE as u64,
    mappings: 4,
};
/// Memory that is registered, or used without an owner: a few pages, so that ranges overlap.
const HOST: usize = 0x10_0000;
const HOST_LEN: usize = 10 * PAGE;
/// Memory with an owner: this much for each.
const OWNED: usize = 0x80_0000;
const OWNED_LEN: usize = 2 * PAGE + 0x400;
const OWNERS: usize = 5;

#[derive(Clone, Debug)]
enum Step {
    Register(Place, Option<Failure>),
    RegisterWaiting(Place),
    Unregister(Index, bool, Option<Failure>),
    Request(Vec<Part>, Direction, Option<(usize, Failure)>),
    Poll(Index),
    DropRequest(Index),
    LookUp(Place),
    LookUpOwned(Part, Direction),
    Guard(Index),
    Release(Index, Option<Failure>),
    Reallocate(usize),
    Remap(usize),
    GiveUp(Option<Failure>),
}

#[derive(Clone, Copy, Debug)]
struct Place {
    addr: usize,
    len: usize,
    direction: Direction,
}

impl Place {
    fn holds(&self, other: &Self) -> bool {
        self.addr <= other.addr
            && other.addr + other.len <= self.addr + self.len
            && self.direction.allows(other.direction)
    }

    fn touches(&self, page: usize) -> bool {
        pages(self.addr, self.len).any(|touched| touched == page)
    }
}

/// One segment of a request.
#[derive(Clone, Copy, Debug)]
enum Part {
    Unowned {
        addr: usize,
        len: usize,
    },
    Owned {
        owner: usize,
        offset: usize,
        len: usize,
    },
}

impl Part {
    fn place(self, direction: Direction) -> Place {
        let (addr, len) = match self {
            Self::Unowned { addr, len } => (addr, len),
            Self::Owned { owner, offset, len } => (owned(owner) + offset, len),
        };
        Place {
            addr,
            len,
            direction,
        }
    }
}

fn owned(owner: usize) -> usize {
    OWNED + owner * 0x1_0000 + 0x200
}

fn directions() -> impl Strategy<Value = Direction> {
    prop::sample::select(vec![
        Direction::ToDevice,
        Direction::FromDevice,
        Direction::Bidirectional,
    ])
}

fn ranges() -> impl Strategy<Value = (usize, usize)> {
    // Half of all begin at a page: many that are equal, adjacent, or one byte off.
    let offset = prop_oneof![Just(0), Just(1), Just(PAGE - 1), 0..PAGE];
    let len = prop_oneof![Just(PAGE), Just(1), Just(PAGE + 1), 1..4 * PAGE];
    (0..HOST_LEN / PAGE, offset, len)
        .prop_map(|(page, offset, len)| (HOST + page * PAGE + offset, len))
}

fn places() -> impl Strategy<Value = Place> {
    (ranges(), directions()).prop_map(|((addr, len), direction)| Place {
        addr,
        len,
        direction,
    })
}

fn owned_parts() -> impl Strategy<Value = Part> {
    (0..OWNERS, 0..OWNED_LEN, any::<Index>()).prop_map(|(owner, offset, len)| Part::Owned {
        owner,
        offset,
        len: 1 + len.index(OWNED_LEN - offset),
    })
}

fn parts() -> impl Strategy<Value = Part> {
    let unowned = ranges().prop_map(|(addr, len)| Part::Unowned { addr, len });
    prop_oneof![unowned, owned_parts()]
}

fn map_failures() -> impl Strategy<Value = Failure> {
    prop::sample::select(vec![
        Failure::OutOfEntries,
        Failure::MemoryLimit,
        Failure::AlreadyMapped,
        Failure::Invalid,
        Failure::Io,
    ])
}

fn unmap_failures() -> impl Strategy<Value = Option<Failure>> {
    let failures = [Failure::ShortUnmap, Failure::Invalid, Failure::Io];
    prop::option::weighted(0.02, prop::sample::select(failures.to_vec()))
}

fn steps() -> impl Strategy<Value = Step> {
    let failure = || prop::option::weighted(0.1, map_failures());
    let later_failure = prop::option::weighted(0.1, (0..3_usize, map_failures()));
    let which = any::<Index>;
    prop_oneof![
        4 => (places(), failure()).prop_map(|(place, failure)| Step::Register(place, failure)),
        2 => places().prop_map(Step::RegisterWaiting),
        3 => (which(), any::<bool>(), unmap_failures())
            .prop_map(|(which, asks, failure)| Step::Unregister(which, asks, failure)),
        6 => (prop::collection::vec(parts(), 1..5), directions(), later_failure)
            .prop_map(|(parts, direction, failure)| Step::Request(parts, direction, failure)),
        3 => which().prop_map(Step::Poll),
        1 => which().prop_map(Step::DropRequest),
        4 => places().prop_map(Step::LookUp),
        3 => (owned_parts(), directions())
            .prop_map(|(part, direction)| Step::LookUpOwned(part, direction)),
        1 => which().prop_map(Step::Guard),
        8 => (which(), unmap_failures()).prop_map(|(which, failure)| Step::Release(which, failure)),
        2 => (0..OWNERS).prop_map(Step::Reallocate),
        2 => (0..HOST_LEN / PAGE + 4).prop_map(Step::Remap),
        1 => unmap_failures().prop_map(Step::GiveUp),
    ]
}

struct Registration {
    place: Place,
    fixed: FixedMapping,
    owner: Weak<()>,
}

struct Leaving {
    place: Place,
    owner: Weak<()>,
    removal: Option<Pin<Box<Unregister>>>,
}

struct Request {
    what: What,
    wakes: Arc<Wakes>,
    /// How many wakes came before the last poll.
    seen: usize,
    /// Its own clones of the owners, as a buffer would have.
    _owners: Vec<Arc<()>>,
}

enum What {
    Map {
        parts: Vec<Part>,
        direction: Direction,
        future: Pin<Box<MapRequest<'static>>>,
    },
    Register {
        place: Place,
        owner: Weak<()>,
        future: Pin<Box<Register<'static>>>,
    },
}

impl What {
    fn places(&self) -> Vec<Place> {
        match self {
            Self::Map {
                parts, direction, ..
            } => parts.iter().map(|part| part.place(*direction)).collect(),
            Self::Register { place, .. } => vec![*place],
        }
    }
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Guard {
    place: Place,
    mapped: Mapped,
    _owner: Option<Arc<()>>,
}

struct World {
    space: AddressSpace,
    mapper: Arc<TestMapper>,
    pinning: Arc<Pinning>,
    registrations: Vec<Registration>,
    /// Unregistered memory that requests may still use.
    leaving: Vec<Leaving>,
    requests: Vec<Request>,
    guards: Vec<Guard>,
    /// The memory of each owner.
    owners: Vec<Arc<()>>,
    quarantined: u64,
    leaked: u64,
}

impl World {
    fn new() -> Self {
        let usable = (0..PAGES).filter(|page| !RESERVED.contains(page));
        let usable = usable.map(|page| IovaRange {
            first: (page * PAGE) as u64,
            last: (page * PAGE + PAGE - 1) as u64,
        });
        let geometry = Geometry {
            usable: merged(usable),
            ..with_max_mappings(MAX_MAPPINGS as u64)
        };
        let pinning = Arc::new(Pinning::new(TestMapper::new(geometry)));
        let space = AddressSpace::with_retention(Arc::clone(&pinning) as _, RETENTION);
        Self {
            space: space.expect("a usable geometry"),
            mapper: Arc::clone(&pinning.mapper),
            pinning,
            registrations: Vec::new(),
            leaving: Vec::new(),
            requests: Vec::new(),
            guards: Vec::new(),
            owners: (0..OWNERS).map(|_| Arc::new(())).collect(),
            quarantined: 0,
            leaked: 0,
        }
    }

    fn step(&mut self, step: Step) {
        let expects_leak = matches!(
            &step,
            Step::Unregister(_, _, Some(_)) | Step::Release(_, Some(_)) | Step::GiveUp(Some(_))
        );
        match step {
            Step::Register(place, failure) => self.register(place, failure),
            Step::RegisterWaiting(place) => {
                let memory = Arc::new(());
                let owner = Arc::downgrade(&memory);
                let host = super::memory(place.addr, place.len);
                // SAFETY: the mapper never touches memory.
                let future = unsafe { self.space.register(host, place.direction, memory) };
                self.request(
                    What::Register {
                        place,
                        owner,
                        future: Box::pin(future),
                    },
                    Vec::new(),
                    None,
                );
            }
            Step::Unregister(which, asks, failure) if !self.registrations.is_empty() => {
                self.fail_unmap(failure);
                let index = which.index(self.registrations.len());
                let Registration {
                    place,
                    fixed,
                    owner,
                } = self.registrations.swap_remove(index);
                let removal = if asks {
                    Some(Box::pin(fixed.unregister()))
                } else {
                    drop(fixed);
                    None
                };
                self.leaving.push(Leaving {
                    place,
                    owner,
                    removal,
                });
            }
            Step::Request(parts, direction, failure) => self.map(parts, direction, failure),
            Step::Poll(which) if !self.requests.is_empty() => {
                self.poll(which.index(self.requests.len()), None);
            }
            Step::DropRequest(which) if !self.requests.is_empty() => {
                drop(self.requests.remove(which.index(self.requests.len())));
            }
            Step::LookUp(place) => self.look_up(place, None),
            Step::LookUpOwned(part, direction) => {
                let Part::Owned { owner, .. } = part else {
                    unreachable!("the strategy makes owned ones")
                };
                let owner = Some(self.owners[owner].clone());
                self.look_up(part.place(direction), owner);
            }
            Step::Guard(which) if !self.registrations.is_empty() => {
                let registration = &self.registrations[which.index(self.registrations.len())];
                self.guards.push(Guard {
                    place: registration.place,
                    mapped: registration.fixed.guard(),
                    _owner: None,
                });
            }
            Step::Release(which, failure) if !self.guards.is_empty() => {
                self.fail_unmap(failure);
                drop(self.guards.swap_remove(which.index(self.guards.len())));
            }
            Step::Reallocate(owner) => self.reallocate(owner),
            Step::Remap(page) => self.remap(HOST + page * PAGE),
            Step::GiveUp(failure) => {
                self.fail_unmap(failure);
                self.space.give_up_kept();
            }
            Step::Unregister(..)
            | Step::Poll(_)
            | Step::DropRequest(_)
            | Step::Guard(_)
            | Step::Release(..) => {}
        }
        self.mapper.clear_failures();
        let leaked = self.space.usage().leaked_mappings - self.quarantined;
        assert!(
            leaked == self.leaked || expects_leak,
            "leaked for no reason"
        );
        self.leaked = leaked;
        self.check();
    }

    fn fail_unmap(&self, failure: Option<Failure>) {
        if let Some(failure) = failure {
            self.mapper.fail_unmap(failure);
        }
    }

    fn register(&mut self, place: Place, failure: Option<Failure>) {
        if let Some(failure) = failure {
            self.mapper.fail_map(failure);
        }
        let before = self.mapper.map_calls();
        let memory = Arc::new(());
        let owner = Arc::downgrade(&memory);
        match register(&self.space, place.addr, place.len, place.direction, memory) {
            Ok(fixed) => {
                assert_eq!(fixed.len(), place.len);
                let is_shared = self.mapper.map_calls() == before;
                let shares_with = |other: &Registration| {
                    other.place.holds(&place) && other.place.direction == place.direction
                };
                assert_eq!(is_shared, self.registrations.iter().any(shares_with));
                self.registrations.push(Registration {
                    place,
                    fixed,
                    owner,
                });
            }
            Err(error) => {
                self.refused(&error, failure);
                assert_eq!(owner.strong_count(), 0, "refused, so not kept");
            }
        }
    }

    /// Whether a refusal has a reason.
    fn refused(&mut self, error: &Error, failure: Option<Failure>) {
        let usage = self.space.usage();
        match error {
            Error::MappingLimit { max: Some(max), .. } => {
                assert_eq!(*max, MAX_MAPPINGS as u64);
            }
            Error::OutOfAddresses { len, .. } => assert!(*len > 0),
            Error::Queued { waiting } => assert_eq!(*waiting, usage.waiting),
            Error::MappingLimit { max: None, .. } => {
                assert_eq!(failure, Some(Failure::OutOfEntries));
            }
            Error::MemoryLimit { .. } => assert_eq!(failure, Some(Failure::MemoryLimit)),
            Error::Map { source, .. } => {
                assert!(failure.is_some(), "{error}");
                if matches!(source, MapError::AlreadyMapped) {
                    self.quarantined += 1;
                }
            }
            _ => panic!("{error}: {usage:?}"),
        }
    }

    fn map(&mut self, parts: Vec<Part>, direction: Direction, failure: Option<(usize, Failure)>) {
        let segments = parts.iter().map(|part| {
            let place = part.place(direction);
            let segment = Segment::new(memory(place.addr, place.len));
            match *part {
                Part::Unowned { .. } => segment,
                Part::Owned { owner, .. } => {
                    let whole = memory(owned(owner), OWNED_LEN);
                    segment.within(whole, self.owners[owner].clone())
                }
            }
        });
        // SAFETY: the mapper never touches memory.
        let future = unsafe { self.space.map(segments.collect::<Vec<_>>(), direction) };
        let owners = parts.iter().filter_map(|part| match *part {
            Part::Owned { owner, .. } => Some(self.owners[owner].clone()),
            Part::Unowned { .. } => None,
        });
        let owners = owners.collect();
        let what = What::Map {
            parts,
            direction,
            future: Box::pin(future),
        };
        self.request(what, owners, failure);
    }

    fn request(&mut self, what: What, owners: Vec<Arc<()>>, failure: Option<(usize, Failure)>) {
        self.requests.push(Request {
            what,
            wakes: Arc::default(),
            seen: 0,
            _owners: owners,
        });
        self.poll(self.requests.len() - 1, failure);
    }

    fn poll(&mut self, index: usize, failure: Option<(usize, Failure)>) {
        if let Some((later, failure)) = failure {
            self.mapper.pass_maps(later);
            self.mapper.fail_map(failure);
        }
        let request = &mut self.requests[index];
        request.seen = request.wakes.0.load(Ordering::Relaxed);
        let waker = Waker::from(request.wakes.clone());
        let cx = &mut Context::from_waker(&waker);
        let result = match &mut request.what {
            What::Map {
                parts,
                direction,
                future,
            } => match future.as_mut().poll(cx) {
                Poll::Pending => None,
                Poll::Ready(Err(error)) => Some(Err(error)),
                Poll::Ready(Ok(mapped)) => {
                    assert_eq!(mapped.len(), parts.len(), "all or none");
                    for (part, mapped) in parts.iter().zip(mapped) {
                        let place = part.place(*direction);
                        assert_eq!(mapped.len(), place.len);
                        let _owner = match *part {
                            Part::Owned { owner, .. } => Some(self.owners[owner].clone()),
                            Part::Unowned { .. } => None,
                        };
                        self.guards.push(Guard {
                            place,
                            mapped,
                            _owner,
                        });
                    }
                    Some(Ok(()))
                }
            },
            What::Register {
                place,
                owner,
                future,
            } => match future.as_mut().poll(cx) {
                Poll::Pending => None,
                Poll::Ready(Err(error)) => {
                    assert_eq!(owner.strong_count(), 0, "refused, so not kept");
                    Some(Err(error))
                }
                Poll::Ready(Ok(fixed)) => {
                    self.registrations.push(Registration {
                        place: *place,
                        fixed,
                        owner: owner.clone(),
                    });
                    Some(Ok(()))
                }
            },
        };
        let Some(result) = result else {
            assert!(self.space.usage().waiting > 0);
            return;
        };
        drop(self.requests.remove(index));
        if let Err(error) = result {
            self.refused(&error, failure.map(|(_, failure)| failure));
        }
    }

    fn look_up(&mut self, place: Place, owner: Option<Arc<()>>) {
        let found = look_up(&self.space, place.addr, place.len, place.direction);
        let is_registered = self
            .registrations
            .iter()
            .any(|registration| registration.place.holds(&place));
        match found {
            Some(mapped) => {
                assert!(
                    is_registered || owner.is_some(),
                    "memory without an owner is never kept"
                );
                self.guards.push(Guard {
                    place,
                    mapped,
                    _owner: owner,
                });
            }
            None => assert!(!is_registered, "{place:x?} is registered"),
        }
    }

    /// Frees an owner's memory, if nobody holds it any more, and has the same addresses anew.
    fn reallocate(&mut self, owner: usize) {
        let freed = Arc::downgrade(&std::mem::take(&mut self.owners[owner]));
        match freed.upgrade() {
            Some(alive) => self.owners[owner] = alive,
            None => pages(owned(owner), OWNED_LEN).for_each(|page| self.pinning.renew(page)),
        }
    }

    /// The page gets other memory, as when it was freed and mapped anew, if that is allowed.
    fn remap(&mut self, page: usize) {
        let promised = self.registrations.iter().map(|it| it.place);
        let promised = promised.chain(self.guards.iter().map(|guard| guard.place));
        let requests = self.requests.iter();
        let promised = promised.chain(requests.flat_map(|request| request.what.places()));
        let still_owned = self.leaving.iter();
        let still_owned = still_owned.filter(|it| it.owner.strong_count() > 0);
        let mut promised = promised.chain(still_owned.map(|it| it.place));
        if !promised.any(|place| place.touches(page)) {
            self.pinning.renew(page);
        }
    }

    fn check(&mut self) {
        assert_eq!(self.mapper.violations(), [""; 0]);
        for guard in &self.guards {
            self.check_reached(&guard.place, guard.mapped.iova());
        }
        for registration in &self.registrations {
            self.check_reached(&registration.place, registration.fixed.iova());
            assert_eq!(registration.owner.strong_count(), 1);
        }
        let usage = self.space.usage();
        let counted = usage.fixed_mappings + usage.temporary_mappings + usage.leaked_mappings;
        assert_eq!(counted, self.mapper.live().len() as u64 + self.quarantined);
        assert!(counted <= MAX_MAPPINGS as u64);
        let taken = usage.fixed_bytes + usage.temporary_bytes + usage.leaked_bytes;
        let all = ((PAGES - RESERVED.len()) * PAGE) as u64;
        assert_eq!(taken + usage.free_bytes, all);
        assert!(usage.kept_mappings <= RETENTION.mappings && usage.kept_bytes <= RETENTION.bytes);

        let leaked = self.leaked > 0;
        self.leaving.retain_mut(|Leaving { owner, removal, .. }| {
            let polled = removal.as_mut().map(|removal| {
                let waker = Waker::noop();
                removal.as_mut().poll(&mut Context::from_waker(waker))
            });
            match polled {
                Some(Poll::Ready(Ok(()))) => assert_eq!(owner.strong_count(), 0),
                Some(Poll::Ready(Err(_))) => assert!(leaked && owner.strong_count() == 1),
                Some(Poll::Pending) => {
                    assert!(owner.strong_count() == 1, "its owner is gone");
                    return true;
                }
                None => return owner.strong_count() > 0,
            }
            false
        });
    }

    /// The device reaches, at `iova`, what is in that place of host memory now.
    fn check_reached(&self, place: &Place, iova: u64) {
        let reached = self.mapper.translate(iova, place.len, place.direction);
        assert_eq!(reached, Some(place.addr));
        let first = iova - iova % PAGE as u64;
        for (index, page) in pages(place.addr, place.len).enumerate() {
            let device_sees = self.pinning.pinned(first + (index * PAGE) as u64);
            let now = self.pinning.contents(page);
            assert_eq!(
                device_sees, now,
                "the device sees what was at {page:#x} before"
            );
        }
    }

    /// Everything is let go of, and whoever waits gets its turn: woken, not asked.
    fn finish(mut self) {
        self.guards.clear();
        while let Some(Registration {
            fixed,
            owner,
            place,
        }) = self.registrations.pop()
        {
            drop(fixed);
            self.leaving.push(Leaving {
                place,
                owner,
                removal: None,
            });
        }
        // The first in the queue may not have been polled since it was woken.
        while !self.requests.is_empty() {
            let woken = self
                .requests
                .iter()
                .position(|request| request.wakes.0.load(Ordering::Relaxed) > request.seen);
            let woken = woken.expect("somebody waits, and nobody is woken");
            self.poll(woken, None);
            self.guards.clear();
            self.registrations.clear();
        }
        self.check();
        let usage = self.space.usage();
        assert_eq!((usage.waiting, usage.fixed_mappings), (0, 0));
        assert_eq!(usage.temporary_mappings, usage.kept_mappings);
        self.space.give_up_kept();
        assert!(self.space.finds_nothing(), "nothing is left in the table");
        drop(self.space);
        let left = self.mapper.live().len() as u64;
        assert_eq!(left, self.leaked, "only what could not be removed is left");
        assert_eq!(Arc::strong_count(&self.pinning), 1);
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
        ..ProptestConfig::with_cases(if full() { 20_000 } else { 400 })
    })]

    #[test]
    fn agrees_with_the_model(steps in prop::collection::vec(steps(), 1..150)) {
        let mut world = World::new();
        steps.into_iter().for_each(|step| world.step(step));
        world.finish();
    }
}
