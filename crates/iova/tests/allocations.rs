//! Look-ups allocate nothing, at the table's real size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;

use iova::{AddressSpace, Direction, DmaMapper, Geometry, HostMemory, MapError};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Nowhere;

// SAFETY: there is no device, so none can reach anything.
unsafe impl DmaMapper for Nowhere {
    fn geometry(&self) -> Geometry {
        Geometry {
            usable: Vec::new(),
            page_sizes: 0x1000,
            max_mappings: None,
            unmaps_runs: false,
        }
    }

    unsafe fn map(&self, _: u64, _: &HostMemory<'_>, _: Direction) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&self, _: u64, _: u64) -> Result<(), MapError> {
        Ok(())
    }
}

const MAPPINGS: usize = 5000;

/// Host addresses with gaps between them, in an order that fills the table everywhere.
fn addr(index: usize) -> usize {
    0x10_0000 + (index * 1999 % MAPPINGS) * 0x3000
}

#[test]
fn look_ups_allocate_nothing() {
    let space = AddressSpace::new(Arc::new(Nowhere)).expect("a usable geometry");
    let owner = Arc::new(());
    let mut registered: Vec<_> = (0..MAPPINGS)
        .map(|index| {
            let addr = NonNull::without_provenance(addr(index).try_into().expect("not null"));
            let memory = HostMemory::new(addr, 0x2000);
            // SAFETY: the mapper never touches memory.
            let fixed =
                unsafe { space.try_register(memory, Direction::Bidirectional, owner.clone()) };
            Some(fixed.expect("room"))
        })
        .collect();
    registered
        .iter_mut()
        .step_by(3)
        .for_each(|fixed| drop(fixed.take()));

    let look_up =
        |addr, len| space.look_up(std::ptr::without_provenance(addr), len, Direction::ToDevice);
    // The first look-up of a thread sets up what the thread needs.
    drop(look_up(0x10_0000, 1));

    let before = ALLOCATIONS.get();
    let mut wrong = 0;
    for (index, fixed) in registered.iter().enumerate() {
        let found = look_up(addr(index) + 0x123, 0x1000).map(|guard| guard.iova());
        wrong += u64::from(found != fixed.as_ref().map(|fixed| fixed.iova() + 0x123));
        wrong += u64::from(look_up(addr(index) + 0x1fff, 2).is_some());
    }
    assert_eq!((wrong, ALLOCATIONS.get() - before), (0, 0));
}
