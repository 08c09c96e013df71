//! Guest memory on the test mapper. The memory is really mapped into this process, and never
//! touched.

mod changes;
mod look_up;

use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;
use crate::Direction::{Bidirectional, FromDevice, ToDevice};
use crate::testing::{Failure, TestMapper};
use crate::{Geometry, MapError};

const PAGE: usize = 0x1000;
const MIB: usize = 1 << 20;
/// Where guest memory goes on after the window for devices.
const HIGH: u64 = 1 << 32;

fn space() -> (AddressSpace, Arc<TestMapper>) {
    on(TestMapper::default())
}

fn on(mapper: TestMapper) -> (AddressSpace, Arc<TestMapper>) {
    let mapper = Arc::new(mapper);
    let space = AddressSpace::new(Arc::clone(&mapper) as _).expect("a usable geometry");
    (space, mapper)
}

fn region(start: u64, len: usize) -> Arc<GuestRegionMmap> {
    let region = GuestRegionMmap::from_range(GuestAddress(start), len, None);
    Arc::new(region.expect("anonymous memory"))
}

/// A region with a protection and flags of its own.
fn special(
    start: u64,
    file: Option<FileOffset>,
    prot: i32,
    flags: i32,
) -> Result<Arc<GuestRegionMmap>, Box<dyn std::error::Error>> {
    let mapped = MmapRegion::build(file, 2 * PAGE, prot, flags)?;
    let region = GuestRegionMmap::new(mapped, GuestAddress(start)).ok_or("over the end")?;
    Ok(Arc::new(region))
}

fn memory<const N: usize>(regions: [&Arc<GuestRegionMmap>; N]) -> GuestMemoryMmap {
    let regions = regions.map(Arc::clone).to_vec();
    GuestMemoryMmap::from_arc_regions(regions).expect("sorted and apart")
}

fn host(region: &GuestRegionMmap) -> usize {
    region.as_ptr().addr()
}

#[test]
fn all_regions_are_mapped_as_they_lie_in_large_pages() {
    let (space, mapper) = space();
    let (low, high) = (region(0, 5 * MIB), region(HIGH, 2 * MIB + PAGE));
    let mappings = GuestMappings::of(&space, &memory([&low, &high]), Bidirectional);
    let mappings = mappings.expect("room");
    assert_eq!(mappings.len(), 2);
    for region in [&low, &high] {
        let fixed = mappings.mapping(region).expect("mapped");
        assert_eq!(fixed.len(), region.size());
        assert_eq!(
            fixed.iova() % (2 * MIB) as u64,
            (host(region) % (2 * MIB)) as u64
        );
        let reached = mapper.translate(fixed.iova(), fixed.len(), Bidirectional);
        assert_eq!(reached, Some(host(region)));
    }
    assert_eq!(mapper.live().len(), 2);

    drop(mappings);
    assert_eq!(mapper.live(), []);
    assert_eq!(mapper.violations(), [""; 0]);
    assert_eq!(Arc::strong_count(&low.get_mmap()), 2, "low's and this one");
}

#[test]
fn regions_are_mapped_as_far_as_their_protection_permits() {
    let (space, mapper) = space();
    let anonymous = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    let rom = special(HIGH, None, libc::PROT_READ, anonymous).expect("anonymous memory");
    let none = special(HIGH, None, libc::PROT_NONE, anonymous).expect("anonymous memory");
    let ram = region(0, PAGE);

    let mappings = GuestMappings::of(&space, &memory([&ram, &rom]), Bidirectional).expect("room");
    let access = |region| {
        let iova = mappings.mapping(region).expect("mapped").iova();
        [ToDevice, FromDevice].map(|direction| mapper.translate(iova, PAGE, direction).is_some())
    };
    assert_eq!((access(&ram), access(&rom)), ([true, true], [true, false]));

    let mut reading = GuestMappings::new(&space, ToDevice);
    reading.insert(&rom).expect("room");
    let iova = reading.insert(&ram).expect("room").iova();
    assert_eq!(mapper.translate(iova, PAGE, FromDevice), None);

    let mut writing = GuestMappings::new(&space, FromDevice);
    for (mappings, region, prot) in [
        (&mut writing, &rom, libc::PROT_READ),
        (&mut reading, &none, libc::PROT_NONE),
    ] {
        let direction = mappings.direction;
        match mappings.insert(region).expect_err("nothing is permitted") {
            RegionError::Protection {
                region,
                prot: found,
                direction: asked,
            } => {
                assert_eq!(region.start, GuestAddress(HIGH));
                assert_eq!((found, asked), (prot, direction));
            }
            other => panic!("{other}"),
        }
    }
    assert!(writing.is_empty());
    // The ROM is mapped once for both.
    assert_eq!(mapper.map_calls(), 3);
}

#[test]
fn the_mapper_gets_the_file_that_is_the_memory() {
    let (space, mapper) = space();
    let file = Arc::new(tempfile::tempfile().expect("a file"));
    file.set_len(16 * PAGE as u64).expect("space");
    let at = |page| Some(FileOffset::from_arc(Arc::clone(&file), page * PAGE as u64));
    let both = libc::PROT_READ | libc::PROT_WRITE;

    let shared = special(0, at(3), both, libc::MAP_SHARED).expect("mapped");
    let private = special(0, at(3), both, libc::MAP_PRIVATE).expect("mapped");
    let anonymous = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let elsewhere = special(0, at(3), both, anonymous).expect("mapped");
    // SAFETY: `shared` outlives it.
    let builder = unsafe {
        vm_memory::mmap::MmapRegionBuilder::<()>::new(2 * PAGE)
            .with_raw_mmap_pointer(shared.as_ptr())
    };
    let given = builder
        .with_mmap_prot(both)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(at(7).expect("a file"))
        .build();
    let given = GuestRegionMmap::new(given.expect("page-aligned"), GuestAddress(0));
    let given = Arc::new(given.expect("within the addresses"));

    for (region, offset) in [
        (shared, Some(3 * PAGE as u64)),
        (private, None),
        (elsewhere, None),
        (given, None),
    ] {
        let mut mappings = GuestMappings::new(&space, Bidirectional);
        mapper.require_files(false);
        mappings.insert(&region).expect("room");
        assert_eq!(mapper.live()[0].file_offset, offset);
        drop(mappings);

        let mut mappings = GuestMappings::new(&space, Bidirectional);
        mapper.require_files(true);
        match mappings.insert(&region) {
            Ok(_) => assert!(offset.is_some()),
            Err(RegionError::Map {
                source: Error::Map { source, .. },
                ..
            }) => {
                assert!(matches!(source, MapError::NeedsFile), "{source}");
                assert_eq!(offset, None);
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_region_that_shares_a_page_of_the_iommu_is_refused() {
    let (space, mapper) = on(TestMapper::new(Geometry {
        usable: Vec::new(),
        page_sizes: 0x1_0000,
        max_mappings: None,
        unmaps_runs: true,
    }));
    let mut mappings = GuestMappings::new(&space, Bidirectional);
    // Whatever the address is.
    let odd = region(HIGH, MIB + PAGE);
    match mappings.insert(&odd).expect_err("not whole pages") {
        RegionError::PartialPages {
            region,
            addr,
            page_size,
        } => {
            assert_eq!(region, GuestRange::of(&*odd));
            assert_eq!((addr, page_size), (host(&odd), 0x1_0000));
        }
        other => panic!("{other}"),
    }
    assert_eq!(mapper.map_calls(), 0);
}

#[test]
fn errors_name_the_region() {
    let (space, mapper) = space();
    mapper.fail_map(Failure::MemoryLimit);
    let memory = memory([&region(HIGH, MIB)]);
    let error = GuestMappings::of(&space, &memory, Bidirectional).expect_err("refused");
    assert_eq!(error.region().start, GuestAddress(HIGH));
    assert_eq!(
        error.to_string(),
        "0x100000 bytes of guest memory at 0x100000000 could not be mapped for the device"
    );
    let source = std::error::Error::source(&error).expect("the address space's reason");
    assert!(source.to_string().contains("RLIMIT_MEMLOCK"), "{source}");
}
