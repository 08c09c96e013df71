//! Regions that come and go.

use std::pin::pin;
use std::sync::Weak;
use std::task::Waker;

use super::*;

fn first_poll(removal: Pin<&mut Removal>) -> Poll<Result<(), RegionError>> {
    removal.poll(&mut Context::from_waker(Waker::noop()))
}

fn weak(region: &GuestRegionMmap) -> Weak<MmapRegion> {
    Arc::downgrade(&region.get_mmap())
}

#[test]
fn inserting_again_changes_nothing() {
    let (space, mapper) = space();
    let mut mappings = GuestMappings::new(&space, Bidirectional);
    let ram = region(0, MIB);
    let guard = mappings.insert(&ram).expect("room").guard();
    let again = mappings.insert(&ram).expect("mapped");
    assert_eq!((again.iova(), again.guards()), (guard.iova(), 1));
    assert_eq!((mappings.len(), mapper.map_calls()), (1, 1));
    assert!(mappings.mapping(&region(0, MIB)).is_none());
}

#[test]
fn sync_maps_what_is_new_and_unmaps_what_is_gone() {
    let (space, mapper) = space();
    let [a, b, c] = [0, HIGH, 2 * HIGH].map(|start| region(start, MIB));
    let mut mappings = GuestMappings::of(&space, &memory([&a, &b]), Bidirectional).expect("room");
    let stays = mappings.mapping(&b).expect("mapped").iova();
    assert_eq!((mapper.map_calls(), mapper.unmap_calls()), (2, 0));

    let mut removal = pin!(mappings.sync(&memory([&a, &b])).expect("nothing to do"));
    assert!(matches!(first_poll(removal.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!((mapper.map_calls(), mapper.unmap_calls()), (2, 0));

    let mut removal = pin!(mappings.sync(&memory([&b, &c])).expect("room"));
    assert!(matches!(first_poll(removal.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!((mapper.map_calls(), mapper.unmap_calls()), (3, 1));
    assert!(mappings.mapping(&a).is_none());
    assert!(mappings.mapping(&c).is_some());
    assert_eq!(mappings.mapping(&b).expect("still mapped").iova(), stays);

    // Another region at the same place is another region.
    let other = region(2 * HIGH, MIB);
    drop(mappings.sync(&memory([&b, &other])).expect("room"));
    assert_eq!((mapper.map_calls(), mapper.unmap_calls()), (4, 2));
    assert!(mappings.mapping(&c).is_none());

    let nothing = GuestMemoryMmap::<()>::new();
    drop(mappings.sync(&nothing).expect("nothing new"));
    assert!(mappings.is_empty());
    assert_eq!(mapper.live(), []);
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn what_is_gone_goes_after_what_is_new_came() {
    let (space, mapper) = space();
    let (a, b) = (region(0, MIB), region(HIGH, MIB));
    let mut mappings = GuestMappings::of(&space, &memory([&a]), Bidirectional).expect("room");
    mapper.limit_mappings(Some(1));
    let error = mappings
        .sync(&memory([&b]))
        .expect_err("there is room for one");
    assert!(matches!(&error, RegionError::Map { source, .. } if source.is_limit()));
    assert!(mappings.mapping(&a).is_some());
    assert_eq!(mapper.unmap_calls(), 0);
}

#[test]
fn memory_that_moves_in_the_guest_stays_mapped() {
    let (space, mapper) = space();
    let low = region(0, MIB);
    let mut mappings = GuestMappings::of(&space, &memory([&low]), Bidirectional).expect("room");
    let high = GuestRegionMmap::with_arc(low.get_mmap(), GuestAddress(HIGH));
    let high = Arc::new(high.expect("within the addresses"));

    // It is there twice, then elsewhere.
    drop(mappings.sync(&memory([&low, &high])).expect("mapped"));
    drop(mappings.sync(&memory([&high])).expect("mapped"));
    assert_eq!((mappings.len(), mapper.map_calls()), (1, 1));
    assert_eq!(mapper.unmap_calls(), 0);

    mapper.fail_unmap(Failure::Io);
    let mut removal = pin!(mappings.remove_all());
    match first_poll(removal.as_mut()) {
        Poll::Ready(Err(error)) => assert_eq!(error.region(), GuestRange::of(&*high)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_that_the_guest_sees_twice_is_registered_once() {
    let (space, mapper) = space();
    let low = region(0, MIB);
    let high = GuestRegionMmap::with_arc(low.get_mmap(), GuestAddress(HIGH));
    let high = Arc::new(high.expect("within the addresses"));
    let mut mappings = GuestMappings::new(&space, Bidirectional);
    drop(mappings.sync(&memory([&low, &high])).expect("room"));
    assert_eq!(mapper.map_calls(), 1);

    // Who registers it a second time isn't told whether it could be unmapped.
    mapper.fail_unmap(Failure::Io);
    let mut removal = pin!(mappings.remove(&low).expect("mapped"));
    let removed = first_poll(removal.as_mut());
    assert!(matches!(removed, Poll::Ready(Err(_))), "{removed:?}");
    assert!(mappings.is_empty());
}

#[test]
fn a_failure_leaves_everything_as_it_was() {
    let regions: Vec<_> = (0..4).map(|at| region(at * HIGH, MIB)).collect();
    let [a, b, c, d] = [0, 1, 2, 3].map(|at| &regions[at]);
    for failing in 0..3 {
        let (space, mapper) = space();
        mapper.pass_maps(failing);
        mapper.fail_map(Failure::OutOfEntries);
        let error = GuestMappings::of(&space, &memory([a, b, c]), Bidirectional);
        let error = error.expect_err("one fails");
        assert_eq!(error.region(), GuestRange::of(&*regions[failing]));
        assert_eq!(mapper.live(), []);

        let mut mappings = GuestMappings::of(&space, &memory([a]), Bidirectional).expect("room");
        let before = mapper.live();
        mapper.pass_maps(failing);
        mapper.fail_map(Failure::MemoryLimit);
        let error = mappings.sync(&memory([b, c, d])).expect_err("one fails");
        assert_eq!(error.region(), GuestRange::of(&*regions[failing + 1]));
        assert_eq!(mapper.live(), before);
        assert_eq!(mappings.len(), 1);
        assert!(mappings.mapping(a).is_some());

        drop(mappings.sync(&memory([b, c, d])).expect("now it works"));
        assert_eq!(mappings.len(), 3);
        drop(mappings);
        assert_eq!(mapper.live(), []);
        assert_eq!(space.usage().leaked_mappings, 0);
        assert_eq!(mapper.violations(), [""; 0]);
    }
    for region in &regions {
        assert_eq!(weak(region).strong_count(), 1, "not held any more");
    }
}

#[test]
fn a_removed_region_is_there_until_its_last_guard_is_gone() {
    let (space, mapper) = space();
    let [stays, goes] = [0, HIGH].map(|start| region(start, MIB));
    let mut mappings =
        GuestMappings::of(&space, &memory([&stays, &goes]), Bidirectional).expect("room");
    let guard = space.look_up(goes.as_ptr(), PAGE, FromDevice);
    let guard = guard.expect("mapped");
    let (addr, memory) = (host(&goes), weak(&goes));

    let mut removal = pin!(mappings.remove(&goes).expect("mapped"));
    assert!(mappings.remove(&goes).is_none(), "removed already");
    assert!(space.look_up(goes.as_ptr(), PAGE, FromDevice).is_none());
    // The VMM forgets about it.
    drop(goes);
    assert!(first_poll(removal.as_mut()).is_pending());
    assert_eq!(
        mapper.translate(guard.iova(), PAGE, FromDevice),
        Some(addr),
        "the device still uses it"
    );
    assert!(memory.upgrade().is_some(), "so it is not freed");

    drop(guard);
    assert_eq!(mapper.live().len(), 1);
    assert!(memory.upgrade().is_none());
    assert!(matches!(first_poll(removal.as_mut()), Poll::Ready(Ok(()))));
}

#[tokio::test]
async fn a_removal_waits_for_all_regions() {
    let (space, mapper) = space();
    let regions = [0, HIGH, 2 * HIGH].map(|start| region(start, MIB));
    let mut mappings =
        GuestMappings::of(&space, &memory(regions.each_ref()), Bidirectional).expect("room");
    let guards = regions.each_ref().map(|region| {
        let guard = space.look_up(region.as_ptr(), PAGE, ToDevice);
        guard.expect("mapped")
    });
    let removal = mappings.remove_all();
    assert!(mappings.is_empty());
    let removal = async {
        removal.await.expect("unmapped");
        assert_eq!(mapper.unmap_calls(), 3);
    };
    let requests = async {
        for guard in guards {
            drop(guard);
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(removal, requests);
    assert_eq!(mapper.live(), []);
}

#[tokio::test]
async fn plugged_in_again_before_it_is_out() {
    let (space, mapper) = space();
    let ram = region(0, MIB);
    let mut mappings = GuestMappings::new(&space, Bidirectional);
    let first = mappings.insert(&ram).expect("room").guard();
    let removal = mappings.remove(&ram).expect("mapped");
    let second = mappings.insert(&ram).expect("room").iova();
    assert_ne!(first.iova(), second);
    drop(first);
    // Not for the new mapping.
    removal.await.expect("unmapped");
    assert_eq!(mapper.live().len(), 1);
    assert_eq!(mapper.live()[0].iova, second);
}

#[tokio::test]
async fn a_region_that_cannot_be_unmapped_is_named_and_kept() {
    let (space, mapper) = space();
    let [a, b, c] = [0, HIGH, 2 * HIGH].map(|start| region(start, MIB));
    let mut mappings =
        GuestMappings::of(&space, &memory([&a, &b, &c]), Bidirectional).expect("room");
    let guard = space.look_up(c.as_ptr(), PAGE, ToDevice).expect("mapped");
    mapper.fail_unmap(Failure::Io);
    drop(mappings.remove(&b).expect("mapped"));

    let removal = mappings.remove_all();
    mapper.fail_unmap(Failure::ShortUnmap);
    let name = GuestRange::of(&*c);
    let kept = [weak(&b), weak(&c)];
    let freed = weak(&a);
    drop((a, b, c));
    let (removed, ()) = tokio::join!(removal, async { drop(guard) });
    match removed.expect_err("it could not be") {
        RegionError::Unmap {
            region,
            source: Error::Unmap { source, .. },
        } => {
            assert_eq!(region, name);
            assert!(matches!(*source, MapError::ShortUnmap { .. }), "{source}");
        }
        other => panic!("{other}"),
    }
    assert!(freed.upgrade().is_none());
    assert!(kept.iter().all(|kept| kept.upgrade().is_some()));
    assert_eq!(space.usage().leaked_mappings, 2);
    assert_eq!(mapper.live().len(), 2);
}

#[tokio::test]
async fn mappings_of_one_address_space_share() {
    let (space, mapper) = space();
    let memory = memory([&region(0, MIB), &region(HIGH, MIB)]);
    let mut first = GuestMappings::of(&space, &memory, Bidirectional).expect("room");
    let mut second = GuestMappings::of(&space, &memory, Bidirectional).expect("room");
    assert_eq!(mapper.map_calls(), 2);
    let mut removal = pin!(first.remove_all());
    assert!(first_poll(removal.as_mut()).is_pending());
    second.remove_all().await.expect("unmapped");
    removal.await.expect("unmapped");
    assert_eq!(mapper.live(), []);
}
