//! Registrations that share a mapping, and how they end.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::Direction::{Bidirectional, ToDevice};
use crate::testing::Failure;

fn owner() -> Owner {
    Arc::new(())
}

fn is_ready<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    future
        .poll(&mut Context::from_waker(Waker::noop()))
        .is_ready()
}

#[test]
fn the_same_region_twice_shares_a_mapping_until_both_are_gone() {
    let (space, mapper) = space();
    let (first_owner, second_owner) = (Arc::new(()), Arc::new(()));
    let first = register(&space, 0x10_0000, PAGE, ToDevice, first_owner.clone()).expect("room");
    let second = register(&space, 0x10_0000, PAGE, ToDevice, second_owner.clone()).expect("room");
    assert_eq!(first.iova(), second.iova());
    assert_eq!((mapper.map_calls(), space.usage().fixed_mappings), (1, 1));

    drop(first);
    assert_eq!(
        Arc::strong_count(&first_owner),
        2,
        "its memory is still mapped"
    );
    let guard = look_up(&space, 0x10_0000, PAGE, ToDevice).expect("registered once more");
    drop(second);
    assert!(look_up(&space, 0x10_0000, PAGE, ToDevice).is_none());
    assert_eq!(Arc::strong_count(&second_owner), 2, "in use");
    assert_eq!(
        mapper.translate(guard.iova(), PAGE, ToDevice),
        Some(0x10_0000)
    );
    drop(guard);
    assert_eq!(Arc::strong_count(&first_owner), 1);
    assert_eq!(Arc::strong_count(&second_owner), 1);
    assert_eq!((mapper.live(), mapper.unmap_calls()), (vec![], 1));
}

#[test]
fn a_part_of_a_region_shares_its_mapping() {
    let (space, mapper) = space();
    let whole = register(&space, 0x10_0000, 8 * PAGE, ToDevice, owner()).expect("room");
    let part = register(&space, 0x10_1800, PAGE, ToDevice, owner()).expect("room");
    assert_eq!(part.iova(), whole.iova() + 0x1800);
    drop(whole);
    let guard = look_up(&space, 0x10_1900, 0x100, ToDevice).expect("the part is registered");
    assert_eq!(
        mapper.translate(guard.iova(), 0x100, ToDevice),
        Some(0x10_1900)
    );
    assert!(
        look_up(&space, 0x10_0000, 0x100, ToDevice).is_none(),
        "the rest is not"
    );
    drop((part, guard));
    assert_eq!(mapper.live(), []);
}

#[test]
fn overlapping_regions_and_other_directions_have_mappings_of_their_own() {
    let (space, mapper) = space();
    let one = register(&space, 0x10_0000, 2 * PAGE, ToDevice, owner()).expect("room");
    let two = register(&space, 0x10_1000, 2 * PAGE, ToDevice, owner()).expect("room");
    let both_ways = register(&space, 0x10_0000, PAGE, Bidirectional, owner()).expect("room");
    assert_eq!(mapper.live().len(), 3);
    let protected = mapper.live().iter().filter(|live| !live.writable).count();
    assert_eq!(protected, 2, "none is wider than it was registered");
    drop(one);
    let guard = look_up(&space, 0x10_1000, PAGE, ToDevice).expect("registered by the other");
    assert_eq!(guard.iova(), two.iova());
    drop((two, both_ways, guard));
    assert_eq!(mapper.live(), []);
}

/// A kept mapping may be given up at any time, so a registration doesn't rest on it.
#[test]
fn a_kept_mapping_is_not_shared() {
    let (space, mapper) = space();
    let guard = map_temporary(&space, 0x10_0000, PAGE, ToDevice, Some(owner())).expect("room");
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    assert_ne!(fixed.iova(), guard.iova());
    drop(guard);
    space.give_up_kept();
    assert_eq!(mapper.live().len(), 1);
    let found = look_up(&space, 0x10_0000, PAGE, ToDevice).expect("registered");
    assert_eq!(found.iova(), fixed.iova());
}

#[test]
fn a_share_that_ends_leaves_the_others() {
    let (space, mapper) = space();
    let whole = register(&space, 0x10_0000, 4 * PAGE, ToDevice, owner()).expect("room");
    let part_owner = Arc::new(());
    let part = register(&space, 0x10_1000, PAGE, ToDevice, part_owner.clone()).expect("room");
    let mut removed = pin!(part.unregister());
    assert!(is_ready(removed.as_mut()), "nobody uses it");
    assert_eq!(Arc::strong_count(&part_owner), 1);
    assert!(look_up(&space, 0x10_1000, PAGE, ToDevice).is_some());
    drop(whole);
    assert_eq!(mapper.live(), []);
}

/// The one that is left when the others are gone hears what becomes of the mapping.
#[test]
fn the_last_share_ends_with_the_mapping() {
    for failure in [None, Some(Failure::Io)] {
        let (space, mapper) = space();
        let whole = register(&space, 0x10_0000, 4 * PAGE, ToDevice, owner()).expect("room");
        let memory = Arc::new(());
        let part = register(&space, 0x10_1000, PAGE, ToDevice, memory.clone()).expect("room");
        drop(whole);
        if let Some(failure) = failure {
            mapper.fail_unmap(failure);
        }
        let done = pin!(part.unregister()).poll(&mut Context::from_waker(Waker::noop()));
        match failure {
            None => assert!(matches!(done, Poll::Ready(Ok(())))),
            Some(_) => assert!(matches!(done, Poll::Ready(Err(Error::Unmap { .. })))),
        }
        let held = if failure.is_some() { 2 } else { 1 };
        assert_eq!(Arc::strong_count(&memory), held);
    }
}

#[test]
fn unregistering_waits_for_requests() {
    let (space, mapper) = space();
    let memory = Arc::new(());
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, memory.clone()).expect("room");
    let guards = [(); 3].map(|()| look_up(&space, 0x10_0000, PAGE, ToDevice));
    assert_eq!(fixed.guards(), 3);
    let mut removed = pin!(fixed.unregister());
    assert!(look_up(&space, 0x10_0000, PAGE, ToDevice).is_none());
    for guard in guards {
        assert!(!is_ready(removed.as_mut()));
        assert_eq!((mapper.live().len(), Arc::strong_count(&memory)), (1, 2));
        drop(guard);
    }
    assert_eq!((mapper.live().len(), Arc::strong_count(&memory)), (0, 1));
    let done = removed.poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(done, Poll::Ready(Ok(()))));
}

#[test]
fn unregistering_waits_for_those_who_share() {
    let (space, _mapper) = space();
    let whole = register(&space, 0x10_0000, 4 * PAGE, ToDevice, owner()).expect("room");
    let part = register(&space, 0x10_1000, PAGE, ToDevice, owner()).expect("room");
    let mut removed = pin!(whole.unregister());
    assert!(!is_ready(removed.as_mut()));
    drop(part);
    assert!(is_ready(removed.as_mut()));
}

#[test]
fn unregistering_tells_when_unmapping_fails() {
    let (space, mapper) = space();
    let memory = Arc::new(());
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, memory.clone()).expect("room");
    mapper.fail_unmap(Failure::ShortUnmap);
    let done = pin!(fixed.unregister()).poll(&mut Context::from_waker(Waker::noop()));
    match done {
        Poll::Ready(Err(error @ Error::Unmap { len: 0x1000, .. })) => {
            let source = std::error::Error::source(&error).expect("what the mapper says");
            assert!(source.to_string().contains("instead of 0x1000"), "{source}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(Arc::strong_count(&memory), 2, "kept for ever");
}
