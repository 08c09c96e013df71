//! What the documentation promises, case by case.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::Direction::{Bidirectional, FromDevice, ToDevice};
use crate::testing::Failure;
use crate::{IovaRange, MapError, Usage};

fn owner() -> Owner {
    Arc::new(())
}

#[test]
fn fixed_from_the_bottom_temporary_from_the_top() {
    let (space, mapper) = space();
    let one = register(&space, 0x10_0000, 2 * PAGE, ToDevice, owner()).expect("room");
    let two = register(&space, 0x20_0000, PAGE, ToDevice, owner()).expect("room");
    assert_eq!((one.iova(), two.iova()), (0x1_0000, 0x1_2000));
    let three = map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect("room");
    let four = map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect("room");
    assert_eq!(
        (three.iova(), four.iova()),
        (0x7f_ffff_f000, 0x7f_ffff_e000)
    );

    drop((one, three));
    let again = register(&space, 0x40_0000, 2 * PAGE, ToDevice, owner()).expect("room");
    assert_eq!(again.iova(), 0x1_0000, "addresses are reclaimed");
    drop((two, four, again));
    assert_eq!(mapper.live(), []);
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn holes_are_skipped() {
    let usable = vec![
        IovaRange {
            first: 0,
            last: 0xfedf_ffff,
        },
        IovaRange {
            first: 0xfef0_0000,
            last: 0xff0f_ffff,
        },
    ];
    let (space, mapper) = on(TestMapper::new(Geometry {
        usable,
        page_sizes: PAGE as u64,
        max_mappings: None,
        unmaps_runs: false,
    }));
    // Guest RAM that would reach over x86's MSI window goes elsewhere or nowhere.
    let low = register(&space, 0x1000_0000, 0xfe00_0000, Bidirectional, owner()).expect("room");
    assert_eq!(low.iova(), 0x1000);
    let error = register(&space, 0x2_0000_0000, 0x200_0000, Bidirectional, owner());
    match error.expect_err("no such stretch") {
        Error::OutOfAddresses { len, free, largest } => {
            assert_eq!(
                (len, free, largest),
                (0x200_0000, 0xdf_f000 + 0x20_0000, 0xdf_f000)
            );
        }
        other => panic!("{other}"),
    }
    let high = map_temporary(&space, 0x2_0000_0000, 0x30_0000, ToDevice, None).expect("room");
    assert_eq!(high.iova(), 0xfeb0_0000, "no room above the hole");
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn unaligned_memory_is_rounded_out_to_pages() {
    let (space, mapper) = space();
    let fixed = register(&space, 0x10_0ffe, 4, ToDevice, owner()).expect("room");
    assert_eq!((fixed.iova(), fixed.len()), (0x1_0ffe, 4));
    assert_eq!(
        (mapper.live()[0].addr, mapper.live()[0].len),
        (0x10_0000, 2 * PAGE)
    );
    let mapped = map_temporary(&space, 0x10_0801, PAGE, ToDevice, None).expect("room");
    assert_eq!((mapped.iova(), mapped.len()), (0x7f_ffff_e801, PAGE));
    assert!(look_up(&space, 0x10_0ffe, 4, ToDevice).is_some());
    assert!(
        look_up(&space, 0x10_0ffd, 4, ToDevice).is_none(),
        "a neighbour's byte"
    );
    assert!(
        look_up(&space, 0x10_0ffe, 5, ToDevice).is_none(),
        "a neighbour's byte"
    );
}

#[test]
fn larger_pages_of_the_iommu_count() {
    let (space, mapper) = on(TestMapper::new(Geometry {
        usable: Vec::new(),
        page_sizes: 0x2001_0000,
        max_mappings: None,
        unmaps_runs: false,
    }));
    assert_eq!(space.page_size(), 0x1_0000);
    let fixed = register(&space, 0x10_3000, PAGE, ToDevice, owner()).expect("room");
    assert_eq!(fixed.iova(), 0x1_3000);
    assert_eq!(
        (mapper.live()[0].addr, mapper.live()[0].len),
        (0x10_0000, 0x1_0000)
    );
}

#[test]
fn large_memory_lies_as_in_the_host_modulo_large_pages() {
    let (space, _mapper) = space();
    let fixed = register(&space, 0x7f00_0012_3000, 0x80_0000, ToDevice, owner()).expect("room");
    assert_eq!(fixed.iova(), 0x12_3000);
    let huge = register(&space, 0x7f12_3456_7000, 0x1_0000_0000, ToDevice, owner()).expect("room");
    assert_eq!(huge.iova() % 0x4000_0000, 0x7f12_3456_7000 % 0x4000_0000);
    let small = register(&space, 0x7f00_0000_0000, PAGE, ToDevice, owner()).expect("room");
    assert_eq!(small.iova(), 0x1_0000, "the gap is used");
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let (space, mapper) = space();
    let refused = |addr, len| {
        let fixed = register(&space, addr, len, ToDevice, owner());
        let temporary = map_temporary(&space, addr, len, ToDevice, None);
        (fixed.expect_err("refused"), temporary.expect_err("refused"))
    };
    assert!(matches!(refused(0x1000, 0), (Error::Empty, Error::Empty)));
    for (addr, len) in [
        (0x800, 0x100),
        (0x1000, usize::MAX),
        (0x1001, usize::MAX),
        (0x1001, usize::MAX - 0x1000),
        (usize::MAX, 1),
        (usize::MAX, 2),
    ] {
        let (fixed, temporary) = refused(addr, len);
        assert!(matches!(fixed, Error::OutOfBounds { .. }), "{fixed}");
        assert!(
            matches!(temporary, Error::OutOfBounds { .. }),
            "{temporary}"
        );
    }
    assert_eq!(mapper.map_calls(), 0);
}

#[test]
fn files_are_rounded_with_the_memory() {
    let (space, mapper) = space();
    mapper.require_files(true);
    let file = std::fs::File::open("/dev/null").expect("/dev/null");
    let map = |addr, offset| {
        let memory = memory(addr, 0x100).with_file(file.as_fd(), offset);
        // SAFETY: the test mapper never touches memory.
        unsafe { space.try_register(memory, ToDevice, owner()) }
    };
    let _fixed = map(0x10_0080, 0x7080).expect("room");
    assert_eq!(
        (mapper.live()[0].addr, mapper.live()[0].file_offset),
        (0x10_0000, Some(0x7000))
    );
    let error = map(0x10_0080, 0x7000).expect_err("lies differently");
    assert!(matches!(
        error,
        Error::Misaligned {
            addr: 0x10_0080,
            offset: 0x7000,
            ..
        }
    ));
    let error = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect_err("no file");
    assert!(matches!(
        error,
        Error::Map {
            source: MapError::NeedsFile,
            ..
        }
    ));
}

#[test]
fn look_up_checks_both_ends_and_the_direction() {
    let (space, _mapper) = space();
    let fixed = register(&space, 0x10_0000, 2 * PAGE, FromDevice, owner()).expect("room");
    let mapped = look_up(&space, 0x10_0010, 2 * PAGE - 0x10, FromDevice).expect("registered");
    assert_eq!(
        (mapped.iova(), mapped.len()),
        (fixed.iova() + 0x10, 2 * PAGE - 0x10)
    );
    for (addr, len) in [
        (0x10_0010, 2 * PAGE - 0xf),
        (0xf_ffff, 2),
        (0x10_2000, 1),
        (0x10_0000, 0),
        (0x10_0000, usize::MAX),
        (0, 1),
        (usize::MAX, 2),
    ] {
        assert!(
            look_up(&space, addr, len, FromDevice).is_none(),
            "{addr:#x}, {len:#x}"
        );
    }
    assert!(look_up(&space, 0x10_0000, 1, ToDevice).is_none());
    assert!(look_up(&space, 0x10_0000, 1, Bidirectional).is_none());
    assert_eq!(space.usage().look_up_misses, 9);
}

#[test]
fn a_buffer_across_two_registrations_is_not_found() {
    let (space, _mapper) = space();
    let _one = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    let _two = register(&space, 0x10_1000, PAGE, ToDevice, owner()).expect("room");
    assert!(look_up(&space, 0x10_0ff0, 0x20, ToDevice).is_none());
}

#[test]
fn a_narrower_direction_does_not_hide_a_wider_mapping() {
    let (space, _mapper) = space();
    let wide = register(&space, 0x10_0000, 4 * PAGE, Bidirectional, owner()).expect("room");
    let _narrow = register(&space, 0x10_1000, PAGE, ToDevice, owner()).expect("room");
    let mapped = look_up(&space, 0x10_1000, PAGE, FromDevice).expect("registered");
    assert_eq!(mapped.iova(), wide.iova() + PAGE as u64);
}

#[test]
fn guards_outlive_the_registration() {
    let (space, mapper) = space();
    let memory = Arc::new(());
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, memory.clone()).expect("room");
    let guard = look_up(&space, 0x10_0000, 0x10, ToDevice).expect("registered");
    let whole = fixed.guard();
    assert_eq!((whole.iova(), whole.len()), (fixed.iova(), fixed.len()));
    drop(fixed);
    assert!(look_up(&space, 0x10_0000, 0x10, ToDevice).is_none());
    drop(whole);
    assert_eq!(
        mapper.translate(guard.iova(), 0x10, ToDevice),
        Some(0x10_0000)
    );
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(guard);
    assert_eq!(mapper.live(), []);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn a_part_of_a_guard_keeps_the_mapping() {
    let (space, mapper) = space();
    let guard = map_temporary(&space, 0x20_0100, 0x200, ToDevice, None).expect("room");
    let part = guard.slice(0x80..0x200).expect("inside");
    assert_eq!((part.iova(), part.len()), (guard.iova() + 0x80, 0x180));
    let whole = guard.slice(0..0x200).expect("inside");
    assert_eq!((whole.iova(), whole.len()), (guard.iova(), 0x200));
    for outside in [0..0, 0x200..0x200, 0x80..0x201, 0x201..0x202] {
        assert!(guard.slice(outside.clone()).is_none(), "{outside:x?}");
    }
    drop((guard, whole));
    assert_eq!(
        mapper.translate(part.iova(), part.len(), ToDevice),
        Some(0x20_0180)
    );
    drop(part);
    assert_eq!(mapper.live(), []);
}

#[test]
fn guards_and_registrations_outlive_the_last_handle() {
    let (space, mapper) = space();
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    let guard = map_temporary(&space, 0x20_0000, PAGE, ToDevice, None).expect("room");
    drop(space);
    assert_eq!(mapper.live().len(), 2);
    drop((fixed, guard));
    assert_eq!(mapper.live(), []);
    assert_eq!(Arc::strong_count(&mapper), 1);
}

/// Looks, when it is dropped, how much is still mapped.
struct Witness(Arc<TestMapper>, Arc<AtomicU64>);

impl Drop for Witness {
    fn drop(&mut self) {
        self.1.store(self.0.live().len() as u64, Ordering::Relaxed);
    }
}

#[test]
fn the_owner_goes_after_the_mapping() {
    let (space, mapper) = space();
    let seen = Arc::new(AtomicU64::new(u64::MAX));
    let witness = || Arc::new(Witness(Arc::clone(&mapper), Arc::clone(&seen)));

    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, witness()).expect("room");
    assert_eq!(seen.load(Ordering::Relaxed), u64::MAX);
    drop(fixed);
    assert_eq!(seen.swap(u64::MAX, Ordering::Relaxed), 0);

    let mapped = map_temporary(&space, 0x10_0000, PAGE, ToDevice, Some(witness())).expect("room");
    drop(mapped);
    assert_eq!(seen.load(Ordering::Relaxed), u64::MAX, "kept");
    space.give_up_kept();
    assert_eq!(seen.load(Ordering::Relaxed), 0);
}

#[test]
fn an_owner_may_use_the_address_space_in_its_drop() {
    struct Chain(AddressSpace, Option<FixedMapping>);
    impl Drop for Chain {
        fn drop(&mut self) {
            drop(self.1.take());
            let mapped = map_temporary(&self.0, 0x50_0000, PAGE, ToDevice, None);
            assert!(mapped.is_ok());
        }
    }
    let (space, mapper) = space();
    let inner = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    let chain = Arc::new(Chain(space.clone(), Some(inner)));
    let outer = register(&space, 0x20_0000, PAGE, ToDevice, chain).expect("room");
    drop(outer);
    assert_eq!(mapper.live(), []);
}

#[test]
fn a_failing_unmap_leaks_owner_and_addresses() {
    let (space, mapper) = space();
    let (one, two) = (Arc::new(()), Arc::new(()));
    for failure in [Failure::Io, Failure::ShortUnmap] {
        mapper.fail_unmap(failure);
    }
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, one.clone()).expect("room");
    let mapped = map_temporary(&space, 0x20_0000, 2 * PAGE, ToDevice, Some(two.clone()));
    let leaked = fixed.iova();
    drop((fixed, mapped));
    space.give_up_kept();
    assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (2, 2));
    let usage = space.usage();
    assert_eq!(
        (usage.leaked_mappings, usage.leaked_bytes),
        (2, 3 * PAGE as u64)
    );
    assert_eq!((usage.fixed_mappings, usage.temporary_mappings), (0, 0));
    assert!(look_up(&space, 0x10_0000, PAGE, ToDevice).is_none());

    let next = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    assert_ne!(next.iova(), leaked, "never handed out again");
    assert_eq!(mapper.violations(), [""; 0]);
}

#[test]
fn every_failing_map_leaves_nothing_behind() {
    for failure in [
        Failure::OutOfEntries,
        Failure::MemoryLimit,
        Failure::Invalid,
        Failure::Io,
    ] {
        let (space, mapper) = space();
        let before = space.usage();
        let memory = Arc::new(());
        mapper.fail_map(failure);
        let error = register(&space, 0x10_0000, PAGE, ToDevice, memory.clone());
        let error = error.expect_err("as planned");
        assert_eq!(
            error.is_limit(),
            matches!(failure, Failure::OutOfEntries | Failure::MemoryLimit)
        );
        assert_eq!(Arc::strong_count(&memory), 1);
        mapper.fail_map(failure);
        map_temporary(&space, 0x10_0000, PAGE, ToDevice, None).expect_err("as planned");
        let expected = Usage {
            done_waiting: space.usage().done_waiting,
            ..before
        };
        assert_eq!(space.usage(), expected);
        assert_eq!(mapper.live(), []);
        assert!(look_up(&space, 0x10_0000, PAGE, ToDevice).is_none());
    }
}

#[test]
fn addresses_that_someone_else_uses_are_not_tried_again() {
    let (space, mapper) = space();
    mapper.fail_map(Failure::AlreadyMapped);
    let error = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect_err("as planned");
    assert!(matches!(
        error,
        Error::Map {
            iova: 0x1_0000,
            source: MapError::AlreadyMapped,
            ..
        }
    ));
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    assert_eq!(fixed.iova(), 0x1_1000);
    assert_eq!(space.usage().leaked_mappings, 1);
}

#[test]
fn the_announced_limit_is_kept_without_asking_the_mapper() {
    let (space, mapper) = on(TestMapper::new(with_max_mappings(2)));
    let fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    let guard = map_temporary(&space, 0x20_0000, PAGE, ToDevice, None).expect("room");
    let error = map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect_err("full");
    assert!(
        matches!(
            error,
            Error::MappingLimit {
                needed: 1,
                in_use: 2,
                max: Some(2)
            }
        ) && error.is_limit()
    );
    let text = error.to_string();
    assert!(
        text.starts_with("no room for 1 more I/O mappings: 2 of 2 are in use."),
        "{text}"
    );
    assert!(text.contains("dma_entry_limit"), "{text}");
    assert_eq!(mapper.map_calls(), 2);
    drop(guard);
    drop(map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect("room again"));
    drop(fixed);
}

#[test]
fn a_leaked_mapping_still_counts_towards_the_limit() {
    let (space, mapper) = on(TestMapper::new(with_max_mappings(1)));
    mapper.fail_unmap(Failure::Io);
    drop(map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect("room"));
    let error = map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect_err("full");
    assert!(matches!(
        error,
        Error::MappingLimit {
            needed: 1,
            in_use: 1,
            max: Some(1)
        }
    ));
}

#[test]
fn limits_that_only_the_mapper_knows_are_told_apart() {
    let (space, mapper) = space();
    let _fixed = register(&space, 0x10_0000, PAGE, ToDevice, owner()).expect("room");
    mapper.limit_mappings(Some(1));
    let error = map_temporary(&space, 0x30_0000, PAGE, ToDevice, None).expect_err("full");
    assert!(matches!(
        error,
        Error::MappingLimit {
            needed: 1,
            in_use: 1,
            max: None
        }
    ));
    assert!(
        error
            .to_string()
            .starts_with("no room for 1 more I/O mappings: 1 are in use."),
        "{error}"
    );

    mapper.limit_mappings(None);
    mapper.limit_bytes(Some(2 * PAGE));
    let error = map_temporary(&space, 0x30_0000, 2 * PAGE, ToDevice, None).expect_err("full");
    assert!(matches!(
        error,
        Error::MemoryLimit {
            len: 0x2000,
            mapped: 0x1000
        }
    ));
    assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
}

#[test]
fn a_geometry_without_pages_is_refused() {
    let geometry = Geometry {
        usable: Vec::new(),
        page_sizes: 0,
        max_mappings: None,
        unmaps_runs: false,
    };
    let error = AddressSpace::new(Arc::new(TestMapper::new(geometry))).expect_err("no page size");
    assert!(matches!(error, Error::Geometry { .. }));
}

#[test]
fn kernel_errors_are_sorted_by_errno() {
    let sorted = |errno| MapError::from(std::io::Error::from_raw_os_error(errno));
    assert!(matches!(sorted(28), MapError::OutOfEntries), "ENOSPC");
    assert!(matches!(sorted(12), MapError::MemoryLimit), "ENOMEM");
    assert!(matches!(sorted(17), MapError::AlreadyMapped), "EEXIST");
    assert!(matches!(sorted(14), MapError::Io(_)), "EFAULT");
    assert!(matches!(sorted(22), MapError::Io(_)), "EINVAL");
}
