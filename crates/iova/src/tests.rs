//! Tests of the whole address space, on the test mapper.

mod behaviour;
mod cases;
mod model;
mod panics;
mod pinning;
mod requests;
mod sharing;
mod stress;
mod threads;

use std::num::NonZero;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::testing::TestMapper;
use crate::{
    AddressSpace, Direction, Error, FixedMapping, Geometry, HostMemory, Mapped, Owner, Segment,
};

const PAGE: usize = 0x1000;

/// Memory that isn't there: the test mapper doesn't touch it.
fn memory(addr: usize, len: usize) -> HostMemory<'static> {
    let addr = NonZero::new(addr).expect("tests map nothing at 0");
    HostMemory::new(NonNull::without_provenance(addr), len)
}

/// An address space of the kind that a PC has, and its mapper.
fn space() -> (AddressSpace, Arc<TestMapper>) {
    on(TestMapper::default())
}

fn on(mapper: TestMapper) -> (AddressSpace, Arc<TestMapper>) {
    let mapper = Arc::new(mapper);
    (
        AddressSpace::new(Arc::clone(&mapper) as _).expect("a usable geometry"),
        mapper,
    )
}

fn with_max_mappings(max: u64) -> Geometry {
    Geometry {
        usable: Vec::new(),
        page_sizes: PAGE as u64,
        max_mappings: Some(max),
        unmaps_runs: true,
    }
}

fn register(
    space: &AddressSpace,
    addr: usize,
    len: usize,
    direction: Direction,
    owner: Owner,
) -> Result<FixedMapping, Error> {
    // SAFETY: the test mapper never touches memory.
    unsafe { space.try_register(memory(addr, len), direction, owner) }
}

fn map_temporary(
    space: &AddressSpace,
    addr: usize,
    len: usize,
    direction: Direction,
    owner: Option<Owner>,
) -> Result<Mapped, Error> {
    let segment = Segment::new(memory(addr, len));
    let segment = match owner {
        Some(owner) => segment.owned_by(owner),
        None => segment,
    };
    // SAFETY: the test mapper never touches memory.
    let mapped = unsafe { space.try_map([segment], direction) };
    mapped.map(|mut mapped| mapped.pop().expect("one segment, one guard"))
}

fn look_up(space: &AddressSpace, addr: usize, len: usize, direction: Direction) -> Option<Mapped> {
    space.look_up(std::ptr::without_provenance(addr), len, direction)
}

/// Whether the counts that take long are wanted.
fn full() -> bool {
    std::env::var_os("NVME_ASYNC_FULL").is_some()
}
