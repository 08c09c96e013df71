//! From guest addresses to I/O addresses.

use std::iter::FusedIterator;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryResult, VolatileSlice};

use super::*;

/// The host address and length of each piece, as the device would reach it.
fn reached(
    space: &AddressSpace,
    mapper: &TestMapper,
    memory: &impl GuestMemory,
    addr: u64,
    len: usize,
    direction: Direction,
) -> Result<Vec<(usize, usize)>, LookUpError> {
    let reach = |piece: Result<Mapped, _>| {
        let piece = piece?;
        let host = mapper.translate(piece.iova(), piece.len(), direction);
        Ok((host.expect("mapped so"), piece.len()))
    };
    let pieces = space.look_up_guest(memory, GuestAddress(addr), len, direction);
    pieces.map(reach).collect()
}

#[test]
fn ranges_across_regions_come_in_pieces() {
    let (space, mapper) = space();
    let (a, b) = (region(0, MIB), region(MIB as u64, 2 * PAGE));
    let c = region((MIB + 2 * PAGE) as u64, PAGE);
    let memory = memory([&a, &b, &c]);
    let _mappings = GuestMappings::of(&space, &memory, Bidirectional).expect("room");
    let reached =
        |addr, len| reached(&space, &mapper, &memory, addr, len, FromDevice).expect("guest memory");
    let end = MIB as u64;

    assert_eq!(reached(0x801, PAGE), [(host(&a) + 0x801, PAGE)]);
    assert_eq!(reached(0, MIB), [(host(&a), MIB)]);
    assert_eq!(
        reached(end - 0x10, 0x30),
        [(host(&a) + MIB - 0x10, 0x10), (host(&b), 0x20)]
    );
    assert_eq!(
        reached(end - 1, 2 + 2 * PAGE),
        [(host(&a) + MIB - 1, 1), (host(&b), 2 * PAGE), (host(&c), 1)]
    );
    assert_eq!(reached(5, 0), []);
}

#[test]
fn ranges_that_are_not_guest_memory_are_errors() {
    let (space, mapper) = space();
    let (low, high) = (region(0, MIB), region(HIGH, MIB));
    let memory = memory([&low, &high]);
    let _mappings = GuestMappings::of(&space, &memory, Bidirectional).expect("room");
    let end = HIGH + MIB as u64;
    for (addr, len, missing) in [
        (MIB as u64 - 0x10, 0x11, MIB as u64),
        (MIB as u64, 1, MIB as u64),
        (0, usize::MAX, MIB as u64),
        (HIGH - 1, 2, HIGH - 1),
        (end - 1, 2, end),
        (u64::MAX, 1, u64::MAX),
        (HIGH, usize::MAX, HIGH),
        (u64::MAX, usize::MAX, u64::MAX),
    ] {
        match reached(&space, &mapper, &memory, addr, len, ToDevice) {
            Err(LookUpError::NotGuestMemory { addr, .. }) => assert_eq!(addr.0, missing),
            other => panic!("{addr:#x}, {len:#x}: {other:?}"),
        }
        // It is the last item.
        let mut pieces = space.look_up_guest(&memory, GuestAddress(addr), len, ToDevice);
        assert!(pieces.by_ref().any(|piece| piece.is_err()));
        assert!(pieces.next().is_none());
    }
    assert_eq!(mapper.live().len(), 2);
}

#[test]
fn what_is_not_mapped_so_is_an_error() {
    let (space, mapper) = space();
    let anonymous = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    let rom = special(HIGH, None, libc::PROT_READ, anonymous).expect("anonymous memory");
    let ram = region(HIGH - MIB as u64, MIB);
    let unmapped = region(2 * HIGH, MIB);
    let mappings = GuestMappings::of(&space, &memory([&ram, &rom]), Bidirectional).expect("room");

    let memory = memory([&ram, &rom, &unmapped]);
    let reached = |addr, len, direction| reached(&space, &mapper, &memory, addr, len, direction);
    reached(HIGH - 8, 16, ToDevice).expect("the ROM is readable");
    for (addr, len, wanted, piece, piece_len) in [
        (HIGH - 8, 24, FromDevice, HIGH, 16),
        (HIGH + 8, 16, Bidirectional, HIGH + 8, 16),
        (2 * HIGH + 8, 16, ToDevice, 2 * HIGH + 8, 16),
    ] {
        match reached(addr, len, wanted) {
            Err(LookUpError::NotMapped {
                addr,
                len,
                direction,
            }) => assert_eq!((addr.0, len, direction), (piece, piece_len, wanted)),
            other => panic!("{addr:#x}: {other:?}"),
        }
    }

    drop(mappings);
    // The snapshot still has it, the device no longer.
    let error = reached(HIGH - 8, 4, ToDevice).expect_err("not mapped");
    assert!(matches!(error, LookUpError::NotMapped { .. }));
}

#[test]
fn dirty_pages_are_for_the_caller_to_mark() {
    let (space, _mapper) = space();
    let ranges = [(GuestAddress(0), MIB)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).expect("memory");
    let _mappings = GuestMappings::of(&space, &memory, Bidirectional).expect("room");
    let mut pieces = space.look_up_guest(&memory, GuestAddress(0x2000), PAGE, FromDevice);
    let _guard = pieces.next().expect("a piece").expect("mapped");
    let region = memory.iter().next().expect("one");
    assert!(!region.bitmap().dirty_at(0x2000));

    // As the documentation of the module says.
    let slices = GuestMemory::get_slices(&memory, GuestAddress(0x2000), PAGE, Permissions::Write);
    for slice in slices.expect("memory") {
        let slice = slice.expect("memory");
        slice.bitmap().mark_dirty(0, slice.len());
    }
    assert!(region.bitmap().dirty_at(0x2000));
    assert!(!region.bitmap().dirty_at(0x3000));
}

/// Guest memory behind a virtual IOMMU, which shows the guest's first two pages the other way
/// round, and for the device to read only.
struct Swapped(GuestMemoryMmap);

struct Slices<'a>(std::vec::IntoIter<VolatileSlice<'a>>);

impl<'a> Iterator for Slices<'a> {
    type Item = GuestMemoryResult<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(Ok)
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}

impl GuestMemory for Swapped {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.get_slices(addr, count, access).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, ()>>> {
        if (addr.0, count) != (0, 2 * PAGE) || access != Permissions::Read {
            return Err(GuestMemoryError::InvalidGuestAddress(addr));
        }
        let page = |at| self.0.get_slice(GuestAddress(at), PAGE);
        Ok(Slices(vec![page(PAGE as u64)?, page(0)?].into_iter()))
    }
}

#[test]
fn a_virtual_iommu_has_its_say() {
    let (space, mapper) = space();
    let ram = region(0, MIB);
    let memory = memory([&ram]);
    let _mappings = GuestMappings::of(&space, &memory, Bidirectional).expect("room");
    let swapped = Swapped(memory);
    assert_eq!(
        reached(&space, &mapper, &swapped, 0, 2 * PAGE, ToDevice).expect("readable"),
        [(host(&ram) + PAGE, PAGE), (host(&ram), PAGE)]
    );
    for direction in [FromDevice, Bidirectional] {
        let error = reached(&space, &mapper, &swapped, 0, 2 * PAGE, direction);
        let error = error.expect_err("not writable");
        assert!(matches!(error, LookUpError::NotGuestMemory { .. }));
    }
}

const ROUNDS: usize = 400;
const READERS: usize = 3;

#[test]
fn threads_look_up_while_regions_come_and_go() {
    let (space, mapper) = space();
    let stays = region(0, MIB);
    let plugged: [_; 3] = std::array::from_fn(|_| region(MIB as u64, 16 * PAGE));
    let mut mappings = GuestMappings::of(&space, &memory([&stays]), Bidirectional).expect("room");
    let current = GuestMemoryAtomic::new(memory([&stays]));
    let found: [_; READERS] = std::array::from_fn(|_| AtomicBool::new(false));
    let done = AtomicBool::new(false);

    std::thread::scope(|scope| {
        for found in &found {
            let (space, current, mapper, done) = (&space, current.clone(), &mapper, &done);
            scope.spawn(move || {
                for round in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let snapshot = current.memory();
                    let addr = MIB - 8 * (1 + round % 64);
                    let inside = reached(space, mapper, &*snapshot, addr as u64, 8, ToDevice);
                    let hosts: Vec<_> = snapshot.iter().map(host).collect();
                    assert_eq!(inside.expect("always mapped"), [(hosts[0] + addr, 8)]);

                    // Into what comes and goes, and held for a while.
                    let addr = GuestAddress(addr as u64);
                    let pieces = space.look_up_guest(&*snapshot, addr, 1024, FromDevice);
                    let Ok(pieces) = pieces.collect::<Result<Vec<_>, _>>() else {
                        continue;
                    };
                    std::thread::yield_now();
                    let reached = pieces
                        .iter()
                        .map(|piece| mapper.translate(piece.iova(), piece.len(), FromDevice));
                    let expected = [hosts[0] + addr.0 as usize, hosts[1]].map(Some);
                    assert_eq!(reached.collect::<Vec<_>>(), expected);
                    found.store(true, Ordering::Relaxed);
                }
            });
        }
        let changes = scope.spawn(|| {
            let mut rounds = 0;
            while rounds < ROUNDS || !found.iter().all(|found| found.load(Ordering::Relaxed)) {
                let next = memory([&stays, &plugged[rounds % plugged.len()]]);
                drop(mappings.sync(&next).expect("room"));
                current.lock().expect("unharmed").replace(next);
                std::thread::yield_now();
                rounds += 1;
            }
            rounds
        });
        let rounds = changes.join();
        // Or the readers would never end.
        done.store(true, Ordering::Relaxed);
        assert_eq!(mapper.map_calls(), 1 + rounds.expect("no failure") as u64);
    });
    drop(mappings);
    assert_eq!(mapper.live(), []);
    assert_eq!(mapper.violations(), [""; 0]);
}
