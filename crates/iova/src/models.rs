//! Models of what threads do to each other, tried by loom in all interleavings (up to a number of
//! preemptions): `RUSTFLAGS="--cfg loom" cargo test -p iova --release --lib models::`.
//!
//! The table has two levels of two entries then, so all host addresses lie in four pages.

use std::num::NonZero;
use std::ptr::NonNull;
use std::sync::Arc;

use loom::thread;

use crate::testing::TestMapper;
use crate::{AddressSpace, Direction, FixedMapping, Geometry, HostMemory, Mapped, Owner, Segment};

const PAGE: usize = 0x1000;
const BOTH: Direction = Direction::Bidirectional;

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

fn space(max_mappings: Option<u64>) -> (AddressSpace, Arc<TestMapper>) {
    let mapper = Arc::new(TestMapper::new(Geometry {
        usable: Vec::new(),
        page_sizes: PAGE as u64,
        max_mappings,
        unmaps_runs: true,
    }));
    let space = AddressSpace::new(Arc::clone(&mapper) as _).expect("a usable geometry");
    (space, mapper)
}

fn memory(page: usize) -> HostMemory<'static> {
    let addr = NonZero::new(page * PAGE).expect("not page 0");
    HostMemory::new(NonNull::without_provenance(addr), PAGE)
}

fn register(space: &AddressSpace, page: usize, direction: Direction, owner: Owner) -> FixedMapping {
    // SAFETY: the test mapper never touches memory.
    let fixed = unsafe { space.try_register(memory(page), direction, owner) };
    fixed.expect("room")
}

fn look_up(space: &AddressSpace, page: usize) -> Option<Mapped> {
    let addr = std::ptr::without_provenance(page * PAGE + 8);
    space.look_up(addr, 16, Direction::ToDevice)
}

fn map(space: &AddressSpace, segment: Segment<'static>) -> Mapped {
    // SAFETY: the test mapper never touches memory.
    let mapped = unsafe { space.try_map([segment], Direction::ToDevice) };
    mapped.expect("room").pop().expect("one segment, one guard")
}

/// The device reaches the page through the guard.
fn assert_reaches(mapper: &TestMapper, guard: &Mapped, page: usize) {
    let reached = mapper.translate(guard.iova(), guard.len(), Direction::ToDevice);
    assert_eq!(reached, Some(page * PAGE + 8));
}

/// Looks page 1 up in another thread, where what is found must be reached.
fn look_up_elsewhere(space: &AddressSpace, mapper: &Arc<TestMapper>) -> thread::JoinHandle<()> {
    let (space, mapper) = (space.clone(), Arc::clone(mapper));
    thread::spawn(move || {
        if let Some(guard) = look_up(&space, 1) {
            assert_reaches(&mapper, &guard, 1);
        }
    })
}

fn assert_gone(mapper: &TestMapper, owner: &Arc<()>) {
    assert_eq!(mapper.live(), []);
    assert_eq!(mapper.violations(), [""; 0]);
    assert_eq!(Arc::strong_count(owner), 1);
}

/// A guard that a look-up got keeps the memory mapped, and the last use ends it, once.
#[test]
fn look_up_against_removal() {
    check(|| {
        let (space, mapper) = space(None);
        let owner = Arc::new(());
        let fixed = register(&space, 1, BOTH, owner.clone());
        let other = look_up_elsewhere(&space, &mapper);
        drop(fixed);
        assert!(look_up(&space, 1).is_none());
        other.join().expect("the look-up");
        assert_gone(&mapper, &owner);
    });
}

/// A slot that is used for other memory never stands for the memory that it was used for before.
#[test]
fn look_up_against_reuse_of_the_slot() {
    check(|| {
        let (space, mapper) = space(None);
        let owner = Arc::new(());
        let fixed = register(&space, 1, BOTH, owner.clone());
        let other = look_up_elsewhere(&space, &mapper);
        drop(fixed);
        let next = register(&space, 2, BOTH, owner.clone());
        let guard = look_up(&space, 2).expect("registered");
        assert_reaches(&mapper, &guard, 2);
        other.join().expect("the look-up");
        drop((guard, next));
        assert_gone(&mapper, &owner);
    });
}

/// Memory that is registered all the time is found all the time, whatever happens to other
/// registrations of the same page, and to the cells and nodes of the table.
#[test]
fn look_up_of_what_stays_registered() {
    check(|| {
        let (space, mapper) = space(None);
        let owner = Arc::new(());
        let stays = register(&space, 1, Direction::ToDevice, owner.clone());
        // The head of the page's list, which leads to the other one.
        let narrow = register(&space, 1, Direction::FromDevice, owner.clone());
        let other = {
            let (space, mapper) = (space.clone(), Arc::clone(&mapper));
            thread::spawn(move || {
                let guard = look_up(&space, 1).expect("registered all the time");
                assert_reaches(&mapper, &guard, 1);
            })
        };
        drop(narrow);
        // These use its cell and its slot again, in the list of another page.
        let elsewhere = [Direction::FromDevice, BOTH];
        let elsewhere = elsewhere.map(|direction| register(&space, 2, direction, owner.clone()));
        other.join().expect("the look-up");
        drop((elsewhere, stays));
        assert_gone(&mapper, &owner);
    });
}

/// A kept mapping is either found and stays, or given up and is not found.
#[test]
fn look_up_against_recycling() {
    check(|| {
        let (space, mapper) = space(None);
        let owner = Arc::new(());
        drop(map(&space, Segment::new(memory(1)).owned_by(owner.clone())));
        let other = look_up_elsewhere(&space, &mapper);
        space.give_up_kept();
        other.join().expect("the look-up");
        space.give_up_kept();
        assert_gone(&mapper, &owner);
    });
}

/// The last handle goes while a request is under way: nothing stays behind.
#[test]
fn closing_against_a_request() {
    check(|| {
        let (space, mapper) = space(None);
        let owner = Arc::new(());
        let segment = Segment::new(memory(1)).owned_by(owner.clone());
        // SAFETY: the test mapper never touches memory.
        let request = unsafe { space.map([segment], Direction::ToDevice) };
        let other = thread::spawn(move || {
            let guards = loom::future::block_on(request);
            drop(guards.expect("room"));
        });
        drop(space);
        other.join().expect("the request");
        assert_gone(&mapper, &owner);
    });
}

/// Room for one, wanted by two: whoever waits is woken.
#[test]
fn a_request_waits_for_a_guard() {
    check(|| {
        let (space, mapper) = space(Some(1));
        let held = map(&space, Segment::new(memory(1)));
        // SAFETY: the test mapper never touches memory.
        let request = unsafe { space.map([Segment::new(memory(2))], Direction::ToDevice) };
        let other = thread::spawn(move || drop(held));
        let guards = loom::future::block_on(request).expect("room, sooner or later");
        drop(guards);
        other.join().expect("the drop");
        assert_eq!(mapper.live(), []);
    });
}

/// The same when what is in the way is kept and in use, or becomes kept just then.
#[test]
fn a_request_waits_for_a_kept_mapping() {
    check(|| {
        let (space, mapper) = space(Some(1));
        let owner = Arc::new(());
        let other = {
            let (space, owner) = (space.clone(), owner.clone());
            thread::spawn(move || {
                let segment = Segment::new(memory(1)).owned_by(owner);
                // SAFETY: the test mapper never touches memory.
                let request = unsafe { space.map([segment], Direction::ToDevice) };
                let guards = loom::future::block_on(request);
                drop(guards.expect("room, sooner or later"));
            })
        };
        // SAFETY: the test mapper never touches memory.
        let request = unsafe { space.map([Segment::new(memory(2))], Direction::ToDevice) };
        let guards = loom::future::block_on(request).expect("room, sooner or later");
        drop(guards);
        other.join().expect("the request");
        space.give_up_kept();
        assert_gone(&mapper, &owner);
    });
}

/// Room for one, wanted by a registration and a request: nobody waits for what stays.
#[test]
fn a_request_against_a_registration() {
    check(|| {
        let (space, mapper) = space(Some(1));
        let owner = Arc::new(());
        let other = {
            let (space, owner) = (space.clone(), owner.clone());
            thread::spawn(move || {
                // SAFETY: the test mapper never touches memory.
                let register = unsafe { space.register(memory(1), BOTH, owner) };
                loom::future::block_on(register).expect("room, sooner or later")
            })
        };
        // SAFETY: the test mapper never touches memory.
        let request = unsafe { space.map([Segment::new(memory(2))], Direction::ToDevice) };
        match loom::future::block_on(request) {
            Ok(guards) => drop(guards),
            Err(error) => assert!(
                matches!(error, crate::Error::MappingLimit { .. }),
                "{error}"
            ),
        }
        drop(other.join().expect("the registration"));
        assert_gone(&mapper, &owner);
    });
}

/// A look-up on its way never keeps a mapping that it was not for.
#[test]
fn removal_without_guards_is_at_once() {
    check(|| {
        let (space, mapper) = space(None);
        let owner = Arc::new(());
        let fixed = register(&space, 1, BOTH, owner.clone());
        let other = {
            let space = space.clone();
            thread::spawn(move || drop(look_up(&space, 1)))
        };
        drop(fixed);
        // It has the slot that the look-up may still be about to pin.
        drop(register(&space, 2, BOTH, owner.clone()));
        let live = mapper.live();
        assert!(live.iter().all(|live| live.addr != 2 * PAGE), "{live:?}");
        other.join().expect("the look-up");
        assert_gone(&mapper, &owner);
    });
}

/// What is retired for the one who waits may be used for ever; another one becomes idle.
#[test]
fn a_request_waits_for_whatever_becomes_idle() {
    check(|| {
        let (space, mapper) = space(Some(2));
        let owner = Arc::new(());
        let long = map(&space, Segment::new(memory(1)).owned_by(owner.clone()));
        let short = map(&space, Segment::new(memory(2)).owned_by(owner.clone()));
        // SAFETY: the test mapper never touches memory.
        let request = unsafe { space.map([Segment::new(memory(3))], Direction::ToDevice) };
        let other = thread::spawn(move || drop(short));
        let guards = loom::future::block_on(request).expect("room, sooner or later");
        other.join().expect("the drop");
        drop((guards, long));
        space.give_up_kept();
        assert_gone(&mapper, &owner);
    });
}
