//! The crate `iova` without a device: what it costs a request to find memory that is mapped, and to
//! map memory that is not.
//!
//! The look-ups and mappings are timed with a mapper that does nothing, so what is measured is the
//! address space alone. Before that, a table is printed of how often the mapper (a system call, or
//! a message to another process) is called at all: [`trace`].

#[path = "iova/mapper.rs"]
mod mapper;
#[path = "iova/talk.rs"]
mod talk;
#[path = "iova/trace.rs"]
mod trace;

use std::hint::black_box;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastrand::Rng;
use iova::{AddressSpace, Direction, FixedMapping, HostMemory, Mapped, Owner, Retention, Segment};

use crate::mapper::Nowhere;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Where mapped memory ends; the kernel places it from the top down, as here.
const TOP: usize = 0x7f12_3456_7000;

/// The size of a fixed mapping, and how far apart they begin: with the gap, they lie differently
/// within the large pages, as memory that a program gets does.
const REGION: usize = 2 * MIB;
const REGION_STRIDE: usize = REGION + 12 * KIB;

/// The buffers that a program's queues have in use.
const WORKING_SET: usize = 1024;
/// Buffers visited before it begins anew: more than a processor's branch prediction remembers ...
const VISITS: usize = 1 << 16;
/// ... and more than there are mappings.
const UNIFORM_VISITS: usize = 1 << 20;

/// The size of a buffer that nobody registered, and how far apart they begin: none adjoins another.
const BUFFER: usize = 32 * KIB;
const BUFFER_STRIDE: usize = BUFFER + 4 * KIB;
/// Buffers that a program uses again and again.
const POOL: usize = 512;
/// Mappings there can be at a time.
const MAX_MAPPINGS: u64 = 1024;

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = calls_to_the_mapper, look_up, temporary
}
criterion_main!(benches);

/// Counts, so not a matter for criterion.
fn calls_to_the_mapper(_: &mut Criterion) {
    trace::print();
}

/// A look-up of registered memory: the guard taken and dropped.
fn look_up(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("look_up");
    group.throughput(Throughput::Elements(1));
    for count in [10, 1000, 100_000] {
        let mut rng = Rng::with_seed(count as u64);
        let (space, _registered) = registered(count, &mut rng);
        for (size, len) in [("4KiB", 4 * KIB), ("1MiB", MIB)] {
            let set: Vec<_> = (0..WORKING_SET)
                .map(|_| buffer_in_region(count, len, &mut rng))
                .collect();
            let working_set: Vec<_> = (0..VISITS).map(|_| set[rng.usize(..set.len())]).collect();
            let uniform: Vec<_> = (0..UNIFORM_VISITS)
                .map(|_| buffer_in_region(count, len, &mut rng))
                .collect();
            for (pattern, visits) in [("working_set", working_set), ("uniform", uniform)] {
                let found = |addr: &usize| find(&space, *addr, len).is_some();
                assert!(visits.iter().all(found), "all of it is registered");
                let mut visits = visits.iter().cycle();
                let id = BenchmarkId::new(format!("{pattern}/{size}"), count);
                group.bench_function(id, |bencher| {
                    bencher.iter_custom(|iterations| {
                        let began = Instant::now();
                        for addr in visits.by_ref().take(iterations as usize) {
                            drop(black_box(find(&space, *addr, len)));
                        }
                        began.elapsed()
                    });
                });
            }
        }
    }
    group.finish();
}

/// Requests for memory that nobody registered.
fn temporary(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("temporary");
    group.throughput(Throughput::Elements(1));
    let owner: Owner = Arc::new(());
    let mut rng = Rng::with_seed(1);
    let pool: Vec<_> = (0..VISITS)
        .map(|_| buffer_outside(rng.usize(..POOL)))
        .collect();
    // By the time that one is visited again, its mapping has long been given up.
    let fresh: Vec<_> = (0..VISITS).map(buffer_outside).collect();

    let space = limited_space();
    for index in 0..POOL {
        drop(map(&space, owned(buffer_outside(index), &owner)));
    }
    let mut visits = pool.iter().cycle();
    group.bench_function("hit/look_up", |bencher| {
        bencher.iter(|| {
            let addr = visits.next().expect("there is always one more");
            find(&space, *addr, BUFFER).expect("it is kept")
        });
    });
    group.bench_function("hit/try_map", |bencher| {
        bencher.iter(|| {
            let addr = visits.next().expect("there is always one more");
            map(&space, owned(*addr, &owner))
        });
    });
    assert_eq!(
        space.usage().temporary_mappings,
        POOL as u64,
        "nothing was mapped anew"
    );

    let space = limited_space();
    let mut visits = fresh.iter().cycle();
    group.bench_function("miss/with_owner", |bencher| {
        bencher.iter(|| {
            let addr = visits.next().expect("there is always one more");
            map(&space, owned(*addr, &owner))
        });
    });
    group.bench_function("miss/without_owner", |bencher| {
        let space = limited_space();
        bencher.iter(|| {
            let addr = visits.next().expect("there is always one more");
            map(&space, Segment::new(memory(*addr, BUFFER)))
        });
    });
    group.finish();
}

/// An address space with `count` fixed mappings, registered in a random order.
fn registered(count: usize, rng: &mut Rng) -> (AddressSpace, Vec<FixedMapping>) {
    let space = AddressSpace::new(Arc::new(Nowhere::default())).expect("a usable geometry");
    let owner: Owner = Arc::new(());
    let mut order: Vec<_> = (0..count).collect();
    rng.shuffle(&mut order);
    let began = Instant::now();
    let registered = order.into_iter().map(|index| {
        let memory = memory(region(index), REGION);
        // SAFETY: the mapper never touches memory, and there is no device.
        let fixed =
            unsafe { space.try_register(memory, Direction::Bidirectional, Arc::clone(&owner)) };
        fixed.expect("48 bits of addresses are enough")
    });
    let registered = registered.collect();
    println!("registered {count} mappings in {:.2?}", began.elapsed());
    (space, registered)
}

/// An address space that keeps as many temporary mappings as there can be.
fn limited_space() -> AddressSpace {
    let mapper = Nowhere {
        max_mappings: Some(MAX_MAPPINGS),
    };
    AddressSpace::with_retention(Arc::new(mapper), RETENTION).expect("a usable geometry")
}

/// So much that only the number of mappings is a limit.
const RETENTION: Retention = Retention {
    bytes: 1 << 40,
    mappings: u64::MAX,
};

/// Where a fixed mapping's memory begins.
fn region(index: usize) -> usize {
    TOP - (index + 1) * REGION_STRIDE
}

/// Whole pages anywhere in any of the fixed mappings.
fn buffer_in_region(count: usize, len: usize, rng: &mut Rng) -> usize {
    let pages = (REGION - len) / (4 * KIB);
    region(rng.usize(..count)) + rng.usize(..=pages) * 4 * KIB
}

/// Where a buffer begins that is not registered.
fn buffer_outside(index: usize) -> usize {
    TOP - (index + 1) * BUFFER_STRIDE
}

/// An address is all that these benchmarks need of memory.
fn memory(addr: usize, len: usize) -> HostMemory<'static> {
    let addr = NonNull::new(ptr::without_provenance_mut(addr)).expect("not null");
    HostMemory::new(addr, len)
}

fn owned(addr: usize, owner: &Owner) -> Segment<'static> {
    Segment::new(memory(addr, BUFFER)).owned_by(Arc::clone(owner))
}

fn find(space: &AddressSpace, addr: usize, len: usize) -> Option<Mapped> {
    space.look_up(ptr::without_provenance(addr), len, Direction::ToDevice)
}

fn map(space: &AddressSpace, segment: Segment<'static>) -> Vec<Mapped> {
    // SAFETY: the mapper never touches memory, and there is no device.
    let mapped = unsafe { space.try_map([segment], Direction::ToDevice) };
    mapped.expect("what is kept makes room")
}
