//! Requests: what is kept for later, what is given up, who waits, and for how long.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use super::*;
use crate::Direction::{FromDevice, ToDevice};
use crate::testing::Failure;
use crate::{MapRequest, Retention};

/// Counts how often it is woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A request and its task.
struct Task {
    request: Pin<Box<MapRequest<'static>>>,
    wakes: Arc<Wakes>,
}

impl Task {
    fn new(space: &AddressSpace, segments: impl IntoIterator<Item = Segment<'static>>) -> Self {
        // SAFETY: the test mapper never touches memory.
        let request = unsafe { space.map(segments, ToDevice) };
        Self {
            request: Box::pin(request),
            wakes: Arc::default(),
        }
    }

    fn poll(&mut self) -> Poll<Result<Vec<Mapped>, Error>> {
        let waker = Waker::from(self.wakes.clone());
        self.request.as_mut().poll(&mut Context::from_waker(&waker))
    }

    fn wakes(&self) -> usize {
        self.wakes.0.load(Ordering::Relaxed)
    }

    #[track_caller]
    fn done(&mut self) -> Vec<Mapped> {
        match self.poll() {
            Poll::Ready(Ok(mapped)) => mapped,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn waits(&mut self) {
        let polled = self.poll();
        assert!(polled.is_pending(), "{polled:?}");
    }
}

/// Page `number` of memory without an owner. No two lie side by side.
fn unowned(number: usize) -> Segment<'static> {
    Segment::new(memory(0x100_0000 + number * 2 * PAGE, PAGE))
}

fn owned(number: usize, owner: &Arc<()>) -> Segment<'static> {
    unowned(number).owned_by(owner.clone())
}

fn limited(max: u64) -> (AddressSpace, Arc<TestMapper>) {
    on(TestMapper::new(with_max_mappings(max)))
}

#[test]
fn owned_memory_is_mapped_once_and_found_again() {
    let (space, mapper) = space();
    let memory = Arc::new(());
    let first = Task::new(&space, [owned(0, &memory)]).done();
    let iova = first[0].iova();
    drop(first);
    assert_eq!(space.usage().kept_mappings, 1);
    let again = Task::new(&space, [owned(0, &memory)]).done();
    assert_eq!(again[0].iova(), iova);
    let guard = look_up(&space, 0x100_0010, 0x20, ToDevice).expect("kept");
    assert_eq!(guard.iova(), iova + 0x10);
    assert!(look_up(&space, 0x100_0010, 0x20, FromDevice).is_none());
    assert_eq!((mapper.map_calls(), mapper.unmap_calls()), (1, 0));
    assert_eq!(Arc::strong_count(&memory), 2, "one is the space's");
    drop((again, guard));
    space.give_up_kept();
    assert_eq!((mapper.live(), Arc::strong_count(&memory)), (vec![], 1));
}

#[test]
fn the_whole_memory_of_an_owner_is_mapped_at_once() {
    let (space, mapper) = space();
    let owner = Arc::new(());
    let whole = memory(0x10_0000, 16 * PAGE);
    let segments = |pages: std::ops::Range<usize>| {
        pages.map(|page| {
            let part = memory(0x10_0000 + page * PAGE, PAGE);
            Segment::new(part).within(whole, owner.clone())
        })
    };
    let guards = Task::new(&space, segments(0..8)).done();
    assert_eq!(guards.len(), 8);
    for (page, guard) in guards.iter().enumerate() {
        let reached = mapper.translate(guard.iova(), PAGE, ToDevice);
        assert_eq!(reached, Some(0x10_0000 + page * PAGE));
    }
    drop(guards);
    drop(Task::new(&space, segments(8..16)).done());
    assert_eq!(mapper.map_calls(), 1);
}

#[test]
fn memory_outside_of_its_owners_is_refused() {
    let (space, mapper) = space();
    let segment = Segment::new(memory(0x10_0800, PAGE));
    let segment = segment.within(memory(0x10_0000, PAGE), Arc::new(()));
    let refused = Task::new(&space, [segment]).poll();
    assert!(matches!(
        refused,
        Poll::Ready(Err(Error::OutsideOfOwner {
            addr: 0x10_0800,
            ..
        }))
    ));
    assert_eq!(mapper.map_calls(), 0);
}

#[test]
fn unowned_memory_is_mapped_for_one_request_only() {
    let (space, mapper) = space();
    for round in 1..=3 {
        let guards = Task::new(&space, [unowned(0)]).done();
        assert!(look_up(&space, 0x100_0000, PAGE, ToDevice).is_none());
        drop(guards);
        assert_eq!((mapper.map_calls(), mapper.unmap_calls()), (round, round));
    }
}

#[test]
fn unowned_segments_side_by_side_share_a_mapping() {
    let (space, mapper) = space();
    let segments = (0..8).map(|index| Segment::new(memory(0x10_0800 + index * 0x300, 0x300)));
    let guards = Task::new(&space, segments).done();
    assert_eq!(mapper.map_calls(), 1);
    for (index, guard) in guards.iter().enumerate() {
        let reached = mapper.translate(guard.iova(), 0x300, ToDevice);
        assert_eq!(reached, Some(0x10_0800 + index * 0x300));
    }
    drop(guards);
    assert_eq!(mapper.live(), []);
}

#[test]
fn what_is_retained_is_bounded() {
    let mapper = Arc::new(TestMapper::default());
    let retention = Retention {
        bytes: 8 * PAGE as u64,
        mappings: 5,
    };
    let space = AddressSpace::with_retention(mapper.clone(), retention).expect("usable");
    let owners: Vec<_> = (0..40).map(|_| Arc::new(())).collect();
    for (number, owner) in owners.iter().enumerate() {
        let len = if number % 2 == 0 { PAGE } else { 3 * PAGE };
        let segment = Segment::new(memory(0x100_0000 + number * 8 * PAGE, len));
        drop(Task::new(&space, [segment.owned_by(owner.clone())]).done());
        let usage = space.usage();
        assert!(usage.kept_bytes <= retention.bytes && usage.kept_mappings <= retention.mappings);
        let held = owners.iter().filter(|owner| Arc::strong_count(owner) == 2);
        assert_eq!(
            held.count() as u64,
            usage.kept_mappings,
            "no other owner is held"
        );
    }
    assert!(space.usage().kept_mappings >= 2, "something is kept");
    let large = Segment::new(memory(0x800_0000, 9 * PAGE)).owned_by(owners[0].clone());
    drop(Task::new(&space, [large]).done());
    assert!(look_up(&space, 0x800_0000, PAGE, ToDevice).is_none());
    drop(space);
    assert_eq!(mapper.live(), []);
}

/// Also when all that is kept is in use: then the new one is not kept.
#[test]
fn what_is_in_use_counts_as_retained() {
    let mapper = Arc::new(TestMapper::default());
    let retention = Retention {
        bytes: 1 << 20,
        mappings: 2,
    };
    let space = AddressSpace::with_retention(mapper.clone(), retention).expect("usable");
    let owner = Arc::new(());
    let guards: Vec<_> = (0..4)
        .map(|number| Task::new(&space, [owned(number, &owner)]).done())
        .collect();
    assert_eq!(space.usage().kept_mappings, 2);
    assert_eq!(space.usage().temporary_mappings, 4);
    drop(guards);
    assert_eq!(mapper.live().len(), 2);
}

#[test]
fn the_least_recently_used_go_first_and_not_all_at_once() {
    let (space, mapper) = limited(16);
    let owner = Arc::new(());
    for number in 0..16 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    let kept = |number: usize| look_up(&space, 0x100_0000 + number * 2 * PAGE, PAGE, ToDevice);
    // A first recycling begins a generation; what is used in it outlives what is not.
    drop(Task::new(&space, [owned(16, &owner)]).done());
    for number in 2..9 {
        assert!(kept(number).is_some(), "{number}");
    }
    for number in 17..24 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    for number in 2..9 {
        assert!(kept(number).is_some(), "{number} was used");
    }
    for number in 9..15 {
        assert!(kept(number).is_none(), "{number} was not used");
    }
    assert!(space.usage().kept_mappings >= 14, "two at a time");
    assert_eq!(mapper.violations(), [""; 0]);
}

/// A generation lies side by side, so one call removes it.
#[test]
fn neighbours_are_unmapped_in_one_call() {
    let (space, mapper) = limited(64);
    let owner = Arc::new(());
    for number in 0..64 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    drop(Task::new(&space, [owned(64, &owner)]).done());
    assert_eq!(space.usage().recycled_mappings, 8);
    assert_eq!((mapper.unmap_calls(), mapper.live().len()), (1, 57));
    space.give_up_kept();
    assert_eq!(mapper.live(), []);
}

#[test]
fn mappings_are_unmapped_one_by_one_where_the_mapper_wants_that() {
    let (space, mapper) = on(TestMapper::new(Geometry {
        unmaps_runs: false,
        ..with_max_mappings(64)
    }));
    let owner = Arc::new(());
    for number in 0..8 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    space.give_up_kept();
    assert_eq!((mapper.unmap_calls(), mapper.live().len()), (8, 0));
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn requests_wait_in_order_and_one_is_woken_at_a_time() {
    let (space, mapper) = limited(2);
    let mut first = Task::new(&space, [unowned(0), unowned(1)]);
    let mut held = first.done();
    let mut waiting: Vec<_> = (2..6).map(|n| Task::new(&space, [unowned(n)])).collect();
    waiting.iter_mut().for_each(Task::waits);
    assert_eq!(space.usage().waiting, 4);
    let wakes = |waiting: &[Task]| waiting.iter().map(Task::wakes).collect::<Vec<_>>();

    held.pop();
    assert_eq!(wakes(&waiting), [1, 0, 0, 0]);
    for task in &mut waiting[1..] {
        task.waits();
    }
    let one = waiting[0].done();
    assert_eq!(
        wakes(&waiting),
        [1, 1, 0, 0],
        "there may be room for the next"
    );
    waiting[1].waits();
    drop(one);
    assert_eq!(wakes(&waiting), [1, 2, 0, 0]);
    let two = waiting[1].done();
    assert_eq!(wakes(&waiting), [1, 2, 1, 0]);
    waiting[2].waits();

    // One that is dropped passes its turn on.
    drop((two, waiting.remove(2)));
    let last = waiting.last_mut().expect("one more");
    assert_eq!(last.wakes(), 1);
    drop(last.done());
    assert_eq!(space.usage().waiting, 0);
    drop(held);
    assert_eq!((mapper.live(), mapper.violations()), (vec![], vec![]));
}

#[test]
fn a_request_in_the_middle_of_the_queue_may_be_dropped() {
    let (space, _mapper) = limited(1);
    let held = Task::new(&space, [unowned(0)]).done();
    let mut waiting: Vec<_> = (1..4).map(|n| Task::new(&space, [unowned(n)])).collect();
    waiting.iter_mut().for_each(Task::waits);
    drop(waiting.remove(1));
    drop(held);
    drop(waiting[0].done());
    assert_eq!(waiting[1].wakes(), 1);
    drop(waiting[1].done());
}

/// Two requests that each have half of what the other one needs.
#[test]
fn requests_that_wait_hold_nothing() {
    let (space, mapper) = limited(4);
    let owner = Arc::new(());
    let held = Task::new(&space, [unowned(8), unowned(9)]).done();
    drop(Task::new(&space, [owned(0, &owner)]).done());
    drop(Task::new(&space, [owned(1, &owner)]).done());
    let mut one = Task::new(&space, [owned(0, &owner), unowned(2), unowned(3)]);
    let mut two = Task::new(&space, [owned(1, &owner), unowned(4), unowned(5)]);
    one.waits();
    two.waits();
    drop(held);
    drop(one.done());
    assert_eq!(two.wakes(), 1);
    drop(two.done());
    assert_eq!(mapper.violations(), [""; 0]);
}

/// What it found on the way may be what it waits for.
#[test]
fn the_first_in_the_queue_does_not_hold_what_is_about_to_go() {
    let geometry = Geometry {
        usable: vec![crate::IovaRange {
            first: 0x1000,
            last: 0x4fff,
        }],
        ..with_max_mappings(100)
    };
    let (space, mapper) = on(TestMapper::new(geometry));
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, Arc::new(())).expect("room");
    let held = Task::new(&space, [unowned(0)]).done();
    let hit = Segment::new(memory(0x10_0000, PAGE));
    let all = Segment::new(memory(0x800_0000, 4 * PAGE));
    let mut waiting = Task::new(&space, [hit.clone(), all]);
    waiting.waits();
    drop(fixed);
    assert_eq!(mapper.live().len(), 1, "nobody holds it");
    drop(held);
    // Its first segment is not registered any more, and both together are too much.
    let refused = waiting.poll();
    assert!(
        matches!(refused, Poll::Ready(Err(Error::OutOfAddresses { .. }))),
        "{refused:?}"
    );
    assert_eq!(mapper.live(), []);
    drop(Task::new(&space, [hit]).done());
}

#[test]
fn a_hit_waits_for_nobody() {
    let (space, _mapper) = limited(2);
    let owner = Arc::new(());
    drop(Task::new(&space, [owned(0, &owner)]).done());
    let _pinned = look_up(&space, 0x100_0000, PAGE, ToDevice).expect("kept");
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner.clone()).expect("room");
    let mut waiting = Task::new(&space, [unowned(1)]);
    waiting.waits();
    let hit = Segment::new(memory(0x10_0000, PAGE));
    drop(Task::new(&space, [hit]).done());
    drop(fixed);
}

#[test]
fn what_can_never_fit_is_an_error_at_once() {
    let (space, mapper) = limited(3);
    let _fixed = register(&space, 0x10_0000, PAGE, ToDevice, Arc::new(())).expect("room");
    let held = Task::new(&space, [unowned(0)]).done();
    let refused = Task::new(&space, (1..4).map(unowned)).poll();
    let Poll::Ready(Err(error)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        matches!(
            error,
            Error::MappingLimit {
                needed: 3,
                in_use: 1,
                max: Some(3)
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("dma_entry_limit"), "{error}");
    let mut fits = Task::new(&space, (1..3).map(unowned));
    fits.waits();
    drop(held);
    drop(fits.done());
    assert_eq!(mapper.live().len(), 1);
}

/// Of what a request needs, some may be mapped.
#[test]
fn what_is_mapped_already_counts_towards_the_limit() {
    let (space, _mapper) = limited(3);
    let owner = Arc::new(());
    let _held = Task::new(&space, [unowned(9)]).done();
    for number in 0..2 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    let segments = [owned(0, &owner), owned(1, &owner), unowned(2), unowned(3)];
    let refused = Task::new(&space, segments).poll();
    let at_once = matches!(
        refused,
        Poll::Ready(Err(Error::MappingLimit { needed: 4, .. }))
    );
    assert!(at_once, "{refused:?}");
}

#[test]
fn leaked_mappings_are_no_room() {
    let (space, mapper) = limited(3);
    mapper.fail_unmap(Failure::Io);
    drop(Task::new(&space, [unowned(0)]).done());
    let _held = Task::new(&space, [unowned(1)]).done();
    let refused = Task::new(&space, (2..5).map(unowned)).poll();
    assert!(
        matches!(
            refused,
            Poll::Ready(Err(Error::MappingLimit { in_use: 1, .. }))
        ),
        "{refused:?}"
    );
}

/// The limits that only show when they are reached.
#[test]
fn limits_that_are_not_announced_are_waited_for_too() {
    type Limit = fn(&TestMapper);
    let entries: Limit = |mapper| mapper.limit_mappings(Some(3));
    let bytes: Limit = |mapper| mapper.limit_bytes(Some(3 * PAGE));
    for limit in [entries, bytes] {
        let (space, mapper) = space();
        limit(&mapper);
        let held = Task::new(&space, [unowned(0)]).done();
        let mut waiting = Task::new(&space, (1..4).map(unowned));
        waiting.waits();
        assert_eq!(mapper.live().len(), 3, "it holds what it got");
        let mut behind = Task::new(&space, [unowned(4)]);
        behind.waits();
        drop(held);
        let got = waiting.done();
        behind.waits();
        drop(got);
        drop(behind.done());

        let refused = Task::new(&space, (1..5).map(unowned)).poll();
        let Poll::Ready(Err(error)) = refused else {
            panic!("{refused:?}");
        };
        let is_that = matches!(
            error,
            Error::MappingLimit { max: None, .. } | Error::MemoryLimit { .. }
        );
        assert!(is_that && error.is_limit(), "{error}");
        assert_eq!(mapper.live(), [], "nothing of it is mapped");
        drop(Task::new(&space, [unowned(0)]).done());
    }
}

#[test]
fn running_out_of_addresses_is_waited_for_too() {
    let geometry = Geometry {
        usable: vec![crate::IovaRange {
            first: 0x1000,
            last: 0x4fff,
        }],
        ..with_max_mappings(100)
    };
    let (space, mapper) = on(TestMapper::new(geometry));
    let owner = Arc::new(());
    for number in 0..4 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    let large = || Segment::new(memory(0x800_0000, 3 * PAGE));
    let held = Task::new(&space, [owned(3, &owner)]).done();
    // Whatever is kept in the middle is given up for it; what is in use is waited for.
    let mut waiting = Task::new(&space, [large(), unowned(9)]);
    waiting.waits();
    drop(held);
    drop(waiting.done());
    let refused = Task::new(
        &space,
        [large(), Segment::new(memory(0x900_0000, 2 * PAGE))],
    )
    .poll();
    assert!(
        matches!(refused, Poll::Ready(Err(Error::OutOfAddresses { .. }))),
        "{refused:?}"
    );
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn trying_to_register_makes_room_of_what_is_kept_and_does_not_wait() {
    let (space, mapper) = limited(2);
    let owner = Arc::new(());
    drop(Task::new(&space, [owned(0, &owner)]).done());
    let held = Task::new(&space, [owned(1, &owner)]).done();
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner.clone()).expect("makes room");
    let refused = register(&space, 0x20_0000, PAGE, ToDevice, owner.clone());
    assert!(refused.expect_err("in use").is_limit());
    drop((held, fixed));
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn trying_does_not_overtake_those_who_wait() {
    let (space, _mapper) = limited(2);
    let held = Task::new(&space, [unowned(0)]).done();
    let mut waiting = Task::new(&space, [unowned(1), unowned(2)]);
    waiting.waits();
    let error = map_temporary(&space, 0x200_0000, PAGE, ToDevice, None).expect_err("others wait");
    assert!(matches!(error, Error::Queued { waiting: 1 }) && error.is_limit());
    drop(held);
    drop(waiting.done());
    drop(map_temporary(&space, 0x200_0000, PAGE, ToDevice, None).expect("room"));
}

#[test]
fn registrations_wait_in_the_same_queue() {
    let (space, mapper) = limited(1);
    let owner = Arc::new(());
    let held = Task::new(&space, [unowned(0)]).done();
    let mut waiting = Task::new(&space, [unowned(1)]);
    waiting.waits();
    // SAFETY: the test mapper never touches memory.
    let register = |page| unsafe { space.register(memory(page, PAGE), ToDevice, owner.clone()) };
    let wakes = Arc::<Wakes>::default();
    let waker = Waker::from(wakes.clone());
    let cx = &mut Context::from_waker(&waker);
    let mut one = Box::pin(register(0x10_0000));
    let mut two = Box::pin(register(0x20_0000));
    assert!(one.as_mut().poll(cx).is_pending());
    assert!(two.as_mut().poll(cx).is_pending());
    let refused = super::register(&space, 0x30_0000, PAGE, ToDevice, owner.clone());
    let refused = refused.expect_err("no room, and it does not wait");
    assert!(matches!(refused, Error::MappingLimit { .. }), "{refused}");

    drop(held);
    let got = waiting.done();
    assert!(one.as_mut().poll(cx).is_pending());
    drop(got);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 2);
    let Poll::Ready(Ok(fixed)) = one.as_mut().poll(cx) else {
        panic!("there is room");
    };
    assert!(one.as_mut().poll(cx).is_pending(), "as most futures");
    // Nothing that will go is left, so the other one can't wait for anything.
    let refused = two.as_mut().poll(cx);
    assert!(
        matches!(refused, Poll::Ready(Err(Error::MappingLimit { .. }))),
        "{refused:?}"
    );
    // What lies within it needs no room.
    let shared = super::register(&space, 0x10_0000, 0x10, ToDevice, owner.clone());
    drop((shared.expect("shares"), fixed));
    assert_eq!((mapper.live(), Arc::strong_count(&owner)), (vec![], 1));
}

#[test]
fn a_request_may_be_dropped_half_mapped() {
    let (space, mapper) = space();
    mapper.limit_mappings(Some(3));
    let owner = Arc::new(());
    let held = Task::new(&space, [unowned(0)]).done();
    let mut waiting = Task::new(&space, [owned(1, &owner), unowned(2), unowned(3)]);
    waiting.waits();
    assert_eq!(mapper.live().len(), 3);
    drop(waiting);
    assert_eq!(mapper.live().len(), 2, "one is kept");
    drop(held);
    space.give_up_kept();
    assert_eq!((mapper.live(), Arc::strong_count(&owner)), (vec![], 1));
}

#[test]
fn other_refusals_end_the_request() {
    let (space, mapper) = space();
    mapper.pass_maps(2);
    mapper.fail_map(Failure::Invalid);
    let refused = Task::new(&space, (0..4).map(unowned)).poll();
    assert!(
        matches!(refused, Poll::Ready(Err(Error::Map { .. }))),
        "{refused:?}"
    );
    assert_eq!((mapper.live(), mapper.map_calls()), (vec![], 3));
    assert_eq!(space.usage().temporary_mappings, 0);
}

#[test]
fn nothing_is_done_before_the_first_poll_or_after_the_last() {
    let (space, mapper) = space();
    let mut task = Task::new(&space, [unowned(0)]);
    assert_eq!(mapper.map_calls(), 0);
    drop(task.done());
    task.waits();
    assert_eq!(mapper.map_calls(), 1);
    assert_eq!(Task::new(&space, []).done().len(), 0);
}

#[test]
fn what_is_kept_goes_with_the_last_handle() {
    let (space, mapper) = space();
    let owner = Arc::new(());
    let guard = Task::new(&space, [owned(0, &owner)]).done();
    drop(Task::new(&space, [owned(1, &owner)]).done());
    let mut late = Task::new(&space, [owned(2, &owner)]);
    drop(space);
    assert_eq!(mapper.live().len(), 1, "in use");
    drop(late.done());
    assert_eq!(mapper.live().len(), 1, "not kept");
    drop((guard, late));
    assert_eq!((mapper.live(), Arc::strong_count(&owner)), (vec![], 1));
    assert_eq!(Arc::strong_count(&mapper), 1);
}

/// A task may be polled for other reasons than having been woken.
#[test]
fn the_first_in_the_queue_does_not_wake_itself() {
    let (space, mapper) = space();
    mapper.limit_mappings(Some(1));
    let held = Task::new(&space, [unowned(0)]).done();
    let mut waiting = Task::new(&space, [unowned(1)]);
    for _ in 0..3 {
        waiting.waits();
    }
    assert_eq!(waiting.wakes(), 0);
    drop(held);
    assert_eq!(waiting.wakes(), 1);
    drop(waiting.done());
}

/// One of those in use may be so for long; whichever ends first makes room.
#[test]
fn the_first_in_the_queue_hears_of_every_end() {
    for hung in 0..3 {
        let (space, _mapper) = limited(3);
        let owner = Arc::new(());
        let mut guards = vec![
            Task::new(&space, [unowned(0)]).done(),
            Task::new(&space, [owned(1, &owner)]).done(),
            Task::new(&space, [owned(2, &owner)]).done(),
        ];
        let mut waiting = Task::new(&space, [unowned(3)]);
        waiting.waits();
        let _hung = guards.remove(hung);
        guards.pop();
        assert_eq!(waiting.wakes(), 1, "{hung} hangs");
        drop(waiting.done());
    }
}

/// Whoever needs room has the place before those who come while it makes some.
#[test]
fn nobody_overtakes_the_one_who_makes_room() {
    /// Asks for a mapping when it is dropped, as another thread might just then.
    struct Overtaker(AddressSpace, Arc<AtomicUsize>);
    impl Drop for Overtaker {
        fn drop(&mut self) {
            let got = map_temporary(&self.0, 0x500_0000, PAGE, ToDevice, None);
            self.1
                .fetch_add(usize::from(got.is_ok()), Ordering::Relaxed);
        }
    }
    let (space, _mapper) = limited(2);
    let overtook = Arc::<AtomicUsize>::default();
    for number in 0..2 {
        let owner = Arc::new(Overtaker(space.clone(), overtook.clone()));
        drop(Task::new(&space, [unowned(number).owned_by(owner)]).done());
    }
    drop(Task::new(&space, [unowned(2), unowned(3)]).done());
    assert_eq!(overtook.load(Ordering::Relaxed), 0);
}

#[test]
fn neighbours_are_joined_only_where_they_have_to_be_mapped() {
    let (space, mapper) = limited(2);
    let owner = Arc::new(());
    let side_by_side = [0x10_0000, 0x10_1000];
    let _registered = side_by_side
        .map(|addr| register(&space, addr, PAGE, ToDevice, owner.clone()).expect("room"));
    let segments = side_by_side.map(|addr| Segment::new(memory(addr, PAGE)));
    assert_eq!(Task::new(&space, segments).done().len(), 2);
    assert_eq!(mapper.map_calls(), 2);
}

#[test]
fn neighbours_that_fit_only_apart_are_mapped_apart() {
    let page = |page: u64| crate::IovaRange {
        first: page << 12,
        last: (page << 12) + 0xfff,
    };
    let (space, mapper) = on(TestMapper::new(Geometry {
        usable: vec![page(1), page(3)],
        ..with_max_mappings(100)
    }));
    let segments = [0x10_0000, 0x10_1000].map(|addr| Segment::new(memory(addr, PAGE)));
    drop(Task::new(&space, segments).done());
    assert_eq!((mapper.live(), mapper.violations()), (vec![], vec![]));
}

/// All of an owner's memory is mapped only where that is not too much.
#[test]
fn of_too_large_an_owner_only_the_part_is_mapped() {
    let (space, mapper) = space();
    mapper.limit_bytes(Some(8 * PAGE));
    let owner = Arc::new(());
    for number in 0..4 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    let whole = memory(0x800_0000, 32 * PAGE);
    let part = Segment::new(memory(0x800_4000, PAGE)).within(whole, owner.clone());
    let guards = Task::new(&space, [part]).done();
    assert_eq!(
        mapper.translate(guards[0].iova(), PAGE, ToDevice),
        Some(0x800_4000)
    );
    assert_eq!(space.usage().recycled_mappings, 0);
}

#[test]
fn only_as_many_as_needed_are_recycled() {
    let (space, _mapper) = limited(16);
    let owner = Arc::new(());
    for number in 0..8 {
        drop(Task::new(&space, [owned(number, &owner)]).done());
    }
    let _held = Task::new(&space, (20..22).map(unowned)).done();
    // Six are free.
    drop(Task::new(&space, (40..47).map(unowned)).done());
    assert_eq!(space.usage().recycled_mappings, 1);
}

#[test]
fn the_same_memory_many_times_is_mapped_once() {
    let (space, mapper) = limited(1);
    let parts = (0..20).map(|part| Segment::new(memory(0x10_0000 + (part % 3) * 8, 0x100)));
    let whole = Segment::new(memory(0x10_0000, 0x200));
    let guards = Task::new(&space, std::iter::once(whole).chain(parts)).done();
    assert_eq!((guards.len(), mapper.map_calls()), (21, 1));
}
