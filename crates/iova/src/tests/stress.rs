//! Everything at once, in several threads, on memory that is really there and really freed: a
//! device that reads and writes through the guards would notice a mapping that went too early, and
//! AddressSanitizer memory that did.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::RwLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use super::*;
use crate::{DmaMapper, MapError, Retention};

const THREADS: usize = 4;
const LIMIT: u64 = 12;

/// An IOMMU that the test's device accesses memory through.
#[derive(Default)]
struct Reaching {
    live: RwLock<BTreeMap<u64, (usize, usize)>>,
    most: AtomicUsize,
}

// SAFETY: `access` translates by what is mapped, and the test accesses memory only while it holds
// a guard for it, so nothing is in progress when `unmap` is called for it.
unsafe impl DmaMapper for Reaching {
    fn geometry(&self) -> Geometry {
        with_max_mappings(LIMIT)
    }

    unsafe fn map(&self, iova: u64, memory: &HostMemory<'_>, _: Direction) -> Result<(), MapError> {
        let mut live = self.live.write().expect("live");
        let addr = memory.addr().as_ptr().expose_provenance();
        live.insert(iova, (addr, memory.len()));
        self.most.fetch_max(live.len(), Ordering::Relaxed);
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mut live = self.live.write().expect("live");
        let mut unmapped = 0;
        while unmapped < len {
            let gone = live.remove(&(iova + unmapped));
            unmapped += gone.expect("it was mapped").1 as u64;
        }
        Ok(())
    }
}

impl Reaching {
    /// Where an access ends up.
    fn translate(&self, iova: u64) -> *mut u8 {
        let live = self.live.read().expect("live");
        let (start, (addr, len)) = live.range(..=iova).next_back().expect("a stray access");
        let offset = (iova - start) as usize;
        assert!(offset < *len, "a stray access");
        std::ptr::with_exposed_provenance_mut(addr + offset)
    }

    /// The device checks that the memory behind a guard is `expected` in every page.
    fn check(&self, guard: &Mapped, expected: u8) {
        for offset in (0..guard.len()).step_by(512) {
            let at = self.translate(guard.iova() + offset as u64);
            // SAFETY: a guard for it exists, so by what is tested here the memory is there; all
            // memory of the test is initialized and not written after that.
            assert_eq!(unsafe { at.read_volatile() }, expected);
        }
    }
}

/// Whole pages of one value.
struct Buffer {
    bytes: Box<[UnsafeCell<u8>]>,
    value: u8,
}

// SAFETY: it is only read.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn new(pages: usize, value: u8) -> Arc<Self> {
        let bytes = (0..(pages + 1) * PAGE).map(|_| UnsafeCell::new(value));
        Arc::new(Self {
            bytes: bytes.collect(),
            value,
        })
    }

    /// Not at a page, as memory of an allocator isn't.
    fn memory(&self) -> HostMemory<'static> {
        let part = &self.bytes[8..self.bytes.len() - 8];
        HostMemory::new(NonNull::from(part).cast(), part.len())
    }

    fn part(&self, offset: usize, len: usize) -> HostMemory<'static> {
        let part = &self.bytes[8..self.bytes.len() - 8][offset..offset + len];
        HostMemory::new(NonNull::from(part).cast(), len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // What a device would read that still has it.
        for byte in &mut self.bytes {
            *byte.get_mut() = !self.value;
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[test]
fn everything_at_once() {
    let rounds = if full() { 100_000 } else { 1_500 };
    let mapper = Arc::new(Reaching::default());
    let retention = Retention {
        bytes: 64 * PAGE as u64,
        mappings: 6,
    };
    let space = AddressSpace::with_retention(mapper.clone(), retention).expect("usable");
    let hot: Vec<_> = (0..8).map(|value| Buffer::new(3, value)).collect();

    thread::scope(|scope| {
        for number in 0..THREADS {
            let (space, mapper, hot) = (space.clone(), &mapper, &hot);
            scope.spawn(move || {
                let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(number as u64 + 1);
                let mut random = |below: usize| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state % below as u64) as usize
                };
                for _ in 0..rounds {
                    match random(8) {
                        0 => registered(&space, mapper, Buffer::new(1 + random(3), 0x40)),
                        1 | 2 => {
                            let buffer = Buffer::new(1 + random(3), 0x60);
                            let segment = Segment::new(buffer.memory());
                            transfer(&space, mapper, [(segment, buffer.value)]);
                        }
                        3 => {
                            let buffer = Buffer::new(1, 0x61);
                            let segment = Segment::new(buffer.memory()).owned_by(buffer.clone());
                            drop(buffer);
                            transfer(&space, mapper, [(segment, 0x61)]);
                        }
                        4 => {
                            let buffer = &hot[random(hot.len())];
                            let memory = buffer.part(random(PAGE), 600);
                            let addr = memory.addr().as_ptr();
                            if let Some(guard) = space.look_up(addr, 600, Direction::ToDevice) {
                                mapper.check(&guard, buffer.value);
                            }
                        }
                        _ => {
                            let segments = [random(8), random(8), random(8)].map(|index| {
                                let buffer = &hot[index];
                                let part = buffer.part(random(PAGE), 1 + random(2 * PAGE));
                                let segment = Segment::new(part);
                                let segment = segment.within(buffer.memory(), buffer.clone());
                                (segment, buffer.value)
                            });
                            transfer(&space, mapper, segments);
                        }
                    }
                }
            });
        }
    });

    let usage = space.usage();
    assert_eq!((usage.fixed_mappings, usage.waiting), (0, 0));
    assert_eq!(usage.temporary_mappings, usage.kept_mappings);
    assert!(usage.recycled_mappings > 0);
    assert!(mapper.most.load(Ordering::Relaxed) as u64 <= LIMIT);
    space.give_up_kept();
    assert!(space.finds_nothing());
    assert!(mapper.live.read().expect("live").is_empty());
    assert!(hot.iter().all(|buffer| Arc::strong_count(buffer) == 1));
}

/// Registers the buffer, uses it by address, and unregisters it while it is in use.
fn registered(space: &AddressSpace, mapper: &Reaching, buffer: Arc<Buffer>) {
    let (memory, value) = (buffer.memory(), buffer.value);
    // SAFETY: the owner keeps the memory, which is only read.
    let fixed = unsafe { space.try_register(memory, Direction::ToDevice, buffer) };
    // The limit may be reached by what is in use.
    let Ok(fixed) = fixed else { return };
    let addr = memory.addr().as_ptr();
    let guard = space.look_up(addr, memory.len(), Direction::ToDevice);
    let guard = guard.expect("it is registered");
    let removed = fixed.unregister();
    mapper.check(&guard, value);
    drop(guard);
    block_on(removed).expect("unmaps");
}

/// Maps, waiting for room if need be, and lets the device read.
fn transfer<const N: usize>(
    space: &AddressSpace,
    mapper: &Reaching,
    segments: [(Segment<'static>, u8); N],
) {
    let values = segments.each_ref().map(|(_, value)| *value);
    let segments = segments.map(|(segment, _)| segment);
    // SAFETY: the callers or the owners keep the memory, which is only read.
    let mapped = block_on(unsafe { space.map(segments, Direction::ToDevice) });
    let mapped = mapped.expect("room, sooner or later");
    for (guard, value) in mapped.iter().zip(values) {
        mapper.check(guard, value);
    }
}
