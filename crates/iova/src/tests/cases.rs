//! The cases in which the talk's allocator fails, by name.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::pinning::Pinning;
use super::*;
use crate::Direction::{FromDevice, ToDevice};
use crate::testing::Failure;
use crate::{MapRequest, Retention};

type Request = Pin<Box<MapRequest<'static>>>;

fn request(space: &AddressSpace, segments: impl IntoIterator<Item = Segment<'static>>) -> Request {
    // SAFETY: the test mapper never touches memory.
    Box::pin(unsafe { space.map(segments, ToDevice) })
}

fn poll(request: &mut Request) -> Poll<Result<Vec<Mapped>, Error>> {
    request
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
}

fn on_limit(max: u64) -> (AddressSpace, Arc<TestMapper>) {
    on(TestMapper::new(with_max_mappings(max)))
}

/// Pages that lie apart from each other.
fn apart(number: usize) -> usize {
    0x1000_0000 + number * 2 * PAGE
}

#[track_caller]
fn assert_reach(mapper: &TestMapper, guards: &[Mapped], addrs: &[usize]) {
    assert_eq!(guards.len(), addrs.len());
    for (guard, addr) in guards.iter().zip(addrs) {
        let reached = mapper.translate(guard.iova(), guard.len(), ToDevice);
        assert_eq!(reached, Some(*addr));
    }
}

/// What is recycled for a later segment must not be what an earlier one uses: the talk's allocator
/// hands out addresses of the earlier ones again.
#[test]
fn entry_limit_3_with_8_segment_requests_and_a_recycle_between_segments() {
    let (space, mapper) = on_limit(3);
    // Eight segments in three pieces of memory: one with an owner, two without.
    let request_of = |number: usize, owner: &Arc<()>| {
        let (one, two, three) = (
            apart(6 * number),
            apart(6 * number + 2),
            apart(6 * number + 4),
        );
        let owned = memory(one, PAGE);
        let mut addrs: Vec<usize> = (0..4).map(|part| one + part * 0x400).collect();
        addrs.extend((0..2).map(|part| two + part * 0x400));
        addrs.extend((0..2).map(|part| three + part * 0x400));
        let segments = addrs.iter().enumerate().map(|(index, addr)| {
            let segment = Segment::new(memory(*addr, 0x400));
            match index {
                0..4 => segment.within(owned, owner.clone()),
                _ => segment,
            }
        });
        (request(&space, segments.collect::<Vec<_>>()), addrs)
    };
    let owners: Vec<_> = (0..6).map(|_| Arc::new(())).collect();

    // Three kept mappings, so that each of the segments' pieces needs one of them to go.
    for number in 0..3 {
        let segment = Segment::new(memory(apart(100 + number), PAGE));
        let kept = request(&space, [segment.owned_by(Arc::new(()))]);
        let mut kept = kept;
        assert!(poll(&mut kept).is_ready());
    }
    assert_eq!(mapper.live().len(), 3);
    let (mut first, addrs) = request_of(0, &owners[0]);
    let Poll::Ready(Ok(guards)) = poll(&mut first) else {
        panic!("what is kept makes room");
    };
    assert_reach(&mapper, &guards, &addrs);
    drop(guards);

    // Many at a time, of which one fits, completed and dropped in turn.
    let mut waiting: VecDeque<_> = (0..24).map(|n| request_of(n, &owners[n % 6])).collect();
    let mut served = 0;
    let mut round = 0;
    while let Some((mut now, addrs)) = waiting.pop_front() {
        round += 1;
        assert!(round < 1000, "nothing moves");
        match poll(&mut now) {
            Poll::Ready(Ok(guards)) => {
                // Others come meanwhile, and must not get what this one uses.
                for (other, _) in waiting.iter_mut().take(3) {
                    assert!(poll(other).is_pending());
                    assert_reach(&mapper, &guards, &addrs);
                }
                served += 1;
            }
            Poll::Ready(Err(error)) => panic!("{error}"),
            Poll::Pending => waiting.push_back((now, addrs)),
        }
    }
    assert_eq!(served, 24);

    // Eight that lie apart can never fit, and the error says so.
    let segments = (0..8).map(|number| Segment::new(memory(apart(number), PAGE)));
    let Poll::Ready(Err(error)) = poll(&mut request(&space, segments)) else {
        panic!("eight into three");
    };
    assert!(
        matches!(
            error,
            Error::MappingLimit {
                needed: 8,
                max: Some(3),
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(mapper.violations(), [""; 0]);
}

/// Those who wait for temporaries get theirs although other I/O never pauses.
#[test]
fn steady_fixed_mapping_load_while_others_wait_for_temporaries() {
    const LIMIT: u64 = 8;
    const DEPTH: usize = 32;
    let (space, mapper) = on_limit(LIMIT);
    let owner = Arc::new(());
    let _fixed = register(&space, 0x10_0000, 64 * PAGE, ToDevice, owner.clone()).expect("room");
    // Hot buffers that are kept and always in use by somebody fill the rest of the limit.
    let hot: Vec<_> = (0..LIMIT as usize - 1)
        .map(|number| Segment::new(memory(apart(number), PAGE)).owned_by(owner.clone()))
        .collect();
    let mut fixed_load: VecDeque<Mapped> = VecDeque::new();
    let mut hot_load: VecDeque<Vec<Mapped>> = VecDeque::new();
    let mut hot_waiting: VecDeque<Request> = VecDeque::new();
    let mut waiting: VecDeque<(Request, usize)> = VecDeque::new();
    let (mut fixed_done, mut temporary_done) = (0, 0);
    let mut longest = 0;
    let mut served = 0;
    let rounds = if full() { 200_000 } else { 5_000 };
    for round in 0..rounds {
        // One of the fixed ones completes, another comes: at no time is there none.
        while fixed_load.len() < DEPTH {
            let addr = 0x10_0000 + (round % 64) * PAGE;
            fixed_load.push_back(look_up(&space, addr, PAGE, ToDevice).expect("registered"));
        }
        fixed_load.pop_front();
        fixed_done += 1;
        // The same with the hot buffers, which go on to be asked for.
        if hot_waiting.len() + hot_load.len() < DEPTH {
            hot_waiting.push_back(request(&space, [hot[round % hot.len()].clone()]));
        }
        if let Some(mut next) = hot_waiting.pop_front() {
            match poll(&mut next) {
                Poll::Ready(guards) => hot_load.push_back(guards.expect("fits")),
                Poll::Pending => hot_waiting.push_front(next),
            }
        }
        if hot_load.len() > DEPTH / 2 || (hot_load.len() > 1 && !hot_waiting.is_empty()) {
            hot_load.pop_front();
            temporary_done += 1;
        }
        // Somebody without an owner comes now and then, and waits.
        if waiting.len() < 3 {
            let segments =
                [500, 502].map(|number| Segment::new(memory(apart(number + round % 7), PAGE)));
            let mut new = request(&space, segments);
            if poll(&mut new).is_pending() {
                waiting.push_back((new, temporary_done));
            }
        }
        if let Some((mut first, since)) = waiting.pop_front() {
            match poll(&mut first) {
                Poll::Ready(guards) => {
                    drop(guards.expect("fits"));
                    longest = longest.max(temporary_done - since);
                    served += 1;
                }
                Poll::Pending => waiting.push_front((first, since)),
            }
        }
    }
    assert_eq!(fixed_done, rounds, "nothing waits for a look-up");
    assert!(served > rounds / 100, "{served} were served");
    // In completions of those who held what was waited for, counted for those before it in the
    // queue too: never for the whole load to end.
    assert!(longest <= 4 * DEPTH, "one waited for {longest} completions");
    drop((hot_load, waiting, hot_waiting, fixed_load));
    assert_eq!(mapper.violations(), [""; 0]);
}

/// Each a mapping of its own, made and removed: nothing may run out or pile up.
#[test]
fn ten_million_unregistered_buffer_requests_through_a_66_entry_limit() {
    const DEPTH: usize = 80;
    let requests = if full() { 10_000_000 } else { 100_000 };
    let (space, mapper) = on_limit(66);
    let _queues: Vec<_> = (0..6)
        .map(|number| register(&space, apart(number), PAGE, ToDevice, Arc::new(())))
        .collect::<Result<_, _>>()
        .expect("room");
    let mut in_flight: VecDeque<Vec<Mapped>> = VecDeque::new();
    let mut waiting: VecDeque<Request> = VecDeque::new();
    let mut stalls: u64 = 0;
    for number in 0..requests {
        let addr = apart(10 + number % 4099);
        let len = PAGE * (1 + number % 3) / 2;
        waiting.push_back(request(&space, [Segment::new(memory(addr, len))]));
        while let Some(first) = waiting.front_mut() {
            match poll(first) {
                Poll::Ready(Ok(guards)) => {
                    in_flight.push_back(guards);
                    waiting.pop_front();
                }
                Poll::Ready(Err(error)) => panic!("request {number}: {error}"),
                Poll::Pending => {
                    stalls += 1;
                    in_flight
                        .pop_front()
                        .expect("somebody has what it waits for");
                    if waiting.len() + in_flight.len() < DEPTH {
                        break;
                    }
                }
            }
        }
    }
    while let Some(mut first) = waiting.pop_front() {
        in_flight.pop_front();
        drop(poll(&mut first));
    }
    assert!(stalls > 0, "the limit was never reached");
    drop((in_flight, waiting));
    let usage = space.usage();
    assert_eq!((usage.temporary_mappings, usage.waiting), (0, 0));
    assert_eq!((mapper.live().len(), mapper.violations().len()), (6, 0));
    assert_eq!(mapper.map_calls(), requests as u64 + 6);
    assert_eq!(mapper.unmap_calls(), requests as u64);
}

/// A page of memory. Dropping it frees the page, and the next one has the same address.
struct Page(Arc<Pinning>);

impl Page {
    const ADDR: usize = 0x7f00_0000_0000;

    fn segment() -> Segment<'static> {
        Segment::new(memory(Self::ADDR, PAGE))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.0.renew(Self::ADDR);
    }
}

/// A cache by host address alone would give the device the pages of the freed memory.
#[test]
fn memory_freed_and_the_same_address_mapped_anew_must_read_the_new_data() {
    let host = Arc::new(Pinning::new(TestMapper::default()));
    let space = AddressSpace::new(Arc::clone(&host) as _).expect("a usable geometry");
    let device_reads = |segment: Segment<'static>| {
        let Poll::Ready(Ok(guards)) = poll(&mut request(&space, [segment])) else {
            panic!("there is room");
        };
        host.pinned(guards[0].iova())
    };
    let freed = || host.contents(Page::ADDR);
    // Without an owner.
    for contents in 0..3 {
        let _page = Page(host.clone());
        assert_eq!(device_reads(Page::segment()), contents);
    }
    // With one: the memory is not freed while the mapping is kept, so the address is not free ...
    let page = Arc::new(Page(host.clone()));
    assert_eq!(device_reads(Page::segment().owned_by(page.clone())), 3);
    drop(page);
    assert_eq!(freed(), 3, "three, not this one");
    assert_eq!(
        device_reads(Page::segment()),
        3,
        "found by address, and right"
    );
    assert_eq!(host.mapper.map_calls(), 4);
    // ... until it is given up.
    space.give_up_kept();
    for contents in 4..7 {
        let page = Arc::new(Page(host.clone()));
        let segment = Page::segment().owned_by(page.clone());
        assert_eq!(device_reads(segment), contents);
        drop(page);
        space.give_up_kept();
    }
    // And registered, with a request that outlives the registration.
    let page = Arc::new(Page(host.clone()));
    let fixed = register(&space, Page::ADDR, PAGE, ToDevice, page).expect("room");
    let guard = look_up(&space, Page::ADDR, PAGE, ToDevice).expect("registered");
    drop(fixed);
    assert_eq!(freed(), 7, "in use");
    drop(guard);
    assert_eq!(freed(), 8);
    let _page = Page(host.clone());
    assert_eq!(device_reads(Page::segment()), 8);
}

/// A bit of everything, in an order in which limits are reached; every step may fail.
fn script(space: &AddressSpace, owners: &[Arc<()>]) {
    let owned =
        |number: usize| Segment::new(memory(apart(number), PAGE)).owned_by(owners[number].clone());
    let unowned = |number: usize| Segment::new(memory(apart(20 + number), PAGE));
    let run = |segments: Vec<Segment<'static>>| match poll(&mut request(space, segments)) {
        Poll::Ready(Ok(guards)) => guards,
        _ => Vec::new(),
    };
    let whole = register(space, 0x10_0000, 4 * PAGE, FromDevice, owners[0].clone());
    let part = register(space, 0x10_1000, PAGE, FromDevice, owners[1].clone());
    drop(run(vec![owned(2), unowned(0), owned(3)]));
    let held = run(vec![owned(2), unowned(1)]);
    let other = register(space, 0x20_0000, PAGE, ToDevice, owners[4].clone());
    drop(run(vec![owned(5), owned(6), unowned(2)]));
    drop(whole);
    let guard = look_up(space, 0x10_1000, PAGE, FromDevice);
    drop(part);
    let mut waiting = request(space, [unowned(3), unowned(4), unowned(5)]);
    let got = poll(&mut waiting);
    drop((held, guard));
    let got = match got {
        Poll::Pending => poll(&mut waiting),
        got => got,
    };
    drop(run(vec![owned(7)]));
    drop((got, waiting, other));
    drop(run(vec![owned(5), owned(7)]));
    space.give_up_kept();
    drop(run(vec![owned(2)]));
}

#[test]
fn forced_failure_at_every_mapper_call() {
    let new_owners = || -> Vec<Arc<()>> { (0..8).map(|_| Arc::new(())).collect() };
    let new_space = || {
        let mapper = Arc::new(TestMapper::new(with_max_mappings(6)));
        let retention = Retention {
            bytes: 1 << 20,
            mappings: 3,
        };
        let space = AddressSpace::with_retention(mapper.clone(), retention);
        (space.expect("a usable geometry"), mapper)
    };
    let (maps, unmaps) = {
        let (space, mapper) = new_space();
        script(&space, &new_owners());
        assert!(space.usage().recycled_mappings > 0, "the script recycles");
        drop(space);
        assert_eq!(mapper.live(), []);
        (mapper.map_calls(), mapper.unmap_calls())
    };
    assert!(maps > 10 && unmaps > 5, "{maps} maps, {unmaps} unmaps");
    let failures = [
        Failure::OutOfEntries,
        Failure::MemoryLimit,
        Failure::AlreadyMapped,
        Failure::Invalid,
        Failure::ShortUnmap,
        Failure::Io,
    ];
    for (call, failure) in (0..maps + unmaps).flat_map(|call| failures.map(|it| (call, it))) {
        let (space, mapper) = new_space();
        let fails_unmap = call >= maps;
        if fails_unmap {
            mapper.pass_unmaps((call - maps) as usize);
            mapper.fail_unmap(failure);
        } else {
            mapper.pass_maps(call as usize);
            mapper.fail_map(failure);
        }
        let owners = new_owners();
        script(&space, &owners);
        let context = format!("call {call}, {failure:?}");
        let failed = mapper.map_calls() > call.min(maps - 1) || fails_unmap;
        assert!(failed, "{context}: never came");
        let usage = space.usage();
        assert_eq!((usage.fixed_mappings, usage.waiting), (0, 0), "{context}");
        assert_eq!(usage.temporary_mappings, usage.kept_mappings, "{context}");
        if failure != Failure::AlreadyMapped {
            let counted = usage.temporary_mappings + usage.leaked_mappings;
            assert_eq!(counted, mapper.live().len() as u64, "{context}");
        }
        drop(space);
        assert_eq!(mapper.violations(), [""; 0], "{context}");
        let left = mapper.live();
        if fails_unmap {
            // What is still mapped, and nothing else, is kept for ever: its owner too.
            assert!(!left.is_empty(), "{context}");
            let held = owners.iter().filter(|owner| Arc::strong_count(owner) > 1);
            let shared = 1;
            assert!(held.count() <= left.len() + shared, "{context}");
        } else {
            assert_eq!(left, [], "{context}");
            assert!(
                owners.iter().all(|it| Arc::strong_count(it) == 1),
                "{context}"
            );
        }
    }
}
