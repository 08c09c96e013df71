//! Mappers and owners that panic: nothing is freed that the device may reach, everything is counted,
//! and nobody waits for what will not come.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use super::*;
use crate::Direction::ToDevice;
use crate::{DmaMapper, MapError};

#[derive(Default)]
struct Panicking {
    mapper: TestMapper,
    map: AtomicBool,
    unmap: AtomicBool,
}

// SAFETY: there is no device, so none can reach anything.
unsafe impl DmaMapper for Panicking {
    fn geometry(&self) -> Geometry {
        with_max_mappings(2)
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        assert!(!self.map.swap(false, Ordering::Relaxed), "as planned");
        // SAFETY: the contract is the same.
        unsafe { self.mapper.map(iova, memory, direction) }
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        assert!(!self.unmap.swap(false, Ordering::Relaxed), "as planned");
        self.mapper.unmap(iova, len)
    }
}

fn panicking() -> (AddressSpace, Arc<Panicking>) {
    let mapper = Arc::new(Panicking::default());
    let space = AddressSpace::new(mapper.clone()).expect("a usable geometry");
    (space, mapper)
}

fn panics<T>(what: impl FnOnce() -> T) {
    assert!(catch_unwind(AssertUnwindSafe(what)).is_err(), "no panic");
}

#[test]
fn a_mapper_that_panics_while_it_maps() {
    let (space, mapper) = panicking();
    mapper.map.store(true, Ordering::Relaxed);
    panics(|| map_temporary(&space, 0x10_0000, PAGE, ToDevice, None));
    let usage = space.usage();
    assert_eq!((usage.leaked_mappings, usage.temporary_mappings), (1, 0));
    let segments = [0x20_0000, 0x30_0000].map(|addr| Segment::new(memory(addr, PAGE)));
    // SAFETY: the mapper never touches memory.
    let mut request = pin!(unsafe { space.map(segments, ToDevice) });
    let polled = request
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    assert!(
        matches!(polled, Poll::Ready(Err(Error::MappingLimit { .. }))),
        "it would wait for what never goes: {polled:?}"
    );
    drop(map_temporary(&space, 0x10_0000, PAGE, ToDevice, None).expect("room for one"));
}

#[test]
fn a_mapper_that_panics_at_the_first_of_two_mappings() {
    let (space, mapper) = panicking();
    mapper.map.store(true, Ordering::Relaxed);
    let segments = [0x20_0000, 0x30_0000].map(|addr| Segment::new(memory(addr, PAGE)));
    // SAFETY: the mapper never touches memory.
    let mut request = pin!(unsafe { space.map(segments, ToDevice) });
    panics(|| {
        request
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
    });
    let usage = space.usage();
    assert_eq!((usage.leaked_mappings, usage.temporary_mappings), (1, 0));
    drop(map_temporary(&space, 0x10_0000, PAGE, ToDevice, None).expect("room for one"));
    let segments = [0x40_0000].map(|addr| Segment::new(memory(addr, PAGE)));
    // SAFETY: as above.
    let mut next = pin!(unsafe { space.map(segments, ToDevice) });
    let polled = next.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(Ok(_))), "{polled:?}");
}

#[test]
fn a_mapper_that_panics_while_it_unmaps() {
    let (space, mapper) = panicking();
    let owner = Arc::new(());
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner.clone()).expect("room");
    let guard = fixed.guard();
    let mut removed = pin!(fixed.unregister());
    mapper.unmap.store(true, Ordering::Relaxed);
    panics(|| drop(guard));
    assert_eq!(
        (space.usage().leaked_mappings, Arc::strong_count(&owner)),
        (1, 2)
    );
    let polled = removed
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(Err(Error::Unmap { .. }))));
}

#[test]
fn an_owner_that_panics() {
    struct Owned(bool);
    impl Drop for Owned {
        fn drop(&mut self) {
            assert!(!self.0, "as planned");
        }
    }
    let (space, mapper) = panicking();
    for (number, panics) in [true, false].into_iter().enumerate() {
        let addr = 0x10_0000 * (number + 1);
        let owner = Some(Arc::new(Owned(panics)) as Owner);
        drop(map_temporary(&space, addr, PAGE, ToDevice, owner).expect("room"));
    }
    panics(|| space.give_up_kept());
    let usage = space.usage();
    assert_eq!((usage.temporary_mappings, usage.leaked_mappings), (0, 0));
    assert_eq!(mapper.mapper.live(), []);

    let owner = Arc::new(Owned(true));
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner).expect("room");
    let guard = fixed.guard();
    let mut removed = pin!(fixed.unregister());
    panics(|| drop(guard));
    let polled = removed
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(Ok(()))), "{polled:?}");
}
