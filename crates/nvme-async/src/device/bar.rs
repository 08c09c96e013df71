//! Which part of BAR 0 is mapped for doorbells, and which must never be written as one.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nvme_spec::registers;

use super::config::Msix;
use super::host::Mapping;
use super::{Doorbell, MappedRegisters};

/// A region of a device: a BAR, or the configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Where it begins in the device's file.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) size: u64,
    /// The parts of it that can be mapped, as offset in the region and length.
    pub(super) mappable: Vec<(u64, u64)>,
}

/// Where doorbells begin in BAR 0.
pub(super) const DOORBELLS: u64 = registers::offset::DOORBELLS as u64;

/// The end of the last doorbell that a controller with this CAP.DSTRD can have: two for each of
/// 65,536 queues.
pub(super) fn end_of_doorbells(stride: u8) -> u64 {
    DOORBELLS + ((2 * 0x1_0000) << (2 + u32::from(stride & 0xf)))
}

/// A stretch of BAR 0 that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    /// Its first byte, on a page of the host.
    first: u64,
    /// How many bytes of it are registers.
    len: u64,
    /// How many bytes are mapped: whole pages.
    mapped: u64,
}

/// Chooses what to map of a BAR so that doorbells up to `end` are in it.
///
/// A window begins below the first doorbell where the host's pages are larger than 4 KiB. A page
/// that the kernel gives only in part is left out, except for the one that the BAR ends in.
fn windows(bar: &Region, end: u64, page: u64) -> Vec<Window> {
    let window = |&(offset, len): &(u64, u64)| {
        let first = offset
            .max(DOORBELLS - DOORBELLS % page)
            .checked_next_multiple_of(page)?;
        let area_end = offset.checked_add(len)?.min(bar.size);
        let needed_end = area_end.min(end);
        let pages_end = needed_end.checked_next_multiple_of(page)?;
        let mapped_end = if pages_end <= area_end || area_end == bar.size {
            pages_end
        } else {
            area_end - area_end % page
        };
        let last = mapped_end.min(area_end);
        (last > first && last > DOORBELLS).then(|| Window {
            first,
            len: last - first,
            mapped: mapped_end - first,
        })
    };
    bar.mappable.iter().filter_map(window).collect()
}

/// Doorbells that are mapped.
#[derive(Debug)]
pub(super) struct MappedDoorbells {
    registers: MappedRegisters,
    owner: Arc<Owner>,
}

/// Unmaps, and only then lets go of the function whose file the mapping holds open.
#[derive(Debug)]
struct Owner {
    mapping: Mapping,
    _function: Arc<dyn Any + Send + Sync>,
}

impl MappedDoorbells {
    /// The doorbell at `offset` of BAR 0, if it is one of these.
    pub(super) fn doorbell(&self, offset: u32) -> Option<Doorbell> {
        self.registers.doorbell(offset)
    }

    /// Takes the BAR away, also from those who have doorbells of it: what they write from here on
    /// goes nowhere.
    pub(super) fn detach(&self) -> io::Result<()> {
        self.owner.mapping.detach()
    }
}

/// Maps the doorbells of a BAR, as far as the kernel allows that. The mappings keep `function`, as
/// which its `file` was opened.
pub(super) fn map_doorbells(
    file: BorrowedFd<'_>,
    bar: &Region,
    stride: u8,
    page: u64,
    function: &Arc<dyn Any + Send + Sync>,
) -> io::Result<Vec<MappedDoorbells>> {
    windows(bar, end_of_doorbells(stride), page)
        .into_iter()
        .filter_map(|window| {
            // Registers have 32-bit offsets; what lies beyond is reached by calls.
            let first = u32::try_from(window.first).ok()?;
            Some((first, window))
        })
        .map(|(first, window)| {
            let len = usize::try_from(window.mapped).map_err(io::Error::other)?;
            let mapping = Mapping::new(file, bar.offset + window.first, len)?;
            let base = mapping.base();
            let owner = Arc::new(Owner {
                mapping,
                _function: function.clone(),
            });
            // SAFETY: `mapping` is `window.mapped` bytes of the BAR, readable and writable, of
            // which the first `window.len` are registers; it lives as long as `owner`, and is
            // replaced only as `Mapping::detach` does it; its base is the start of a page.
            let registers =
                unsafe { MappedRegisters::new(base, first, window.len as usize, owner.clone()) };
            Ok(MappedDoorbells { registers, owner })
        })
        .collect()
}

/// The parts of BAR 0 that hold the MSI-X table and its pending bits.
///
/// They may lie in mapped pages. A doorbell written there, by a stride that the device made up,
/// would redirect interrupts.
#[derive(Clone, Debug, Default)]
pub(super) struct Reserved(pub(super) Msix);

impl Reserved {
    /// Whether the 32-bit register at `offset` touches such a part.
    pub(super) fn holds(&self, offset: u32) -> bool {
        let (first, end) = (u64::from(offset), u64::from(offset) + 4);
        let parts = [&self.0.table, &self.0.pending_bits];
        parts
            .into_iter()
            .flatten()
            .any(|part| first < part.end && part.start < end)
    }

    /// Where the Vector Control word of a vector is (PCI local bus specification 3.0, section
    /// 6.8.2.9).
    pub(super) fn vector_control(&self, vector: u16) -> Option<u32> {
        let table = self.0.table.as_ref()?;
        let entry = table.start + u64::from(vector) * 16;
        let fits = entry + 16 <= table.end;
        u32::try_from(entry + 12).ok().filter(|_| fits)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::device::host;

    const K: u64 = 0x400;
    const END: u64 = DOORBELLS + 512 * K;

    fn bar(size: u64, mappable: &[(u64, u64)]) -> Region {
        Region {
            offset: 0,
            size,
            mappable: mappable.to_vec(),
        }
    }

    fn chosen(bar: &Region, end: u64, page: u64) -> Vec<(u64, u64, u64)> {
        let tuple = |window: Window| (window.first, window.len, window.mapped);
        windows(bar, end, page).into_iter().map(tuple).collect()
    }

    #[test]
    fn last_doorbell_by_stride() {
        assert_eq!(end_of_doorbells(0), 0x1000 + 2 * 65536 * 4);
        assert_eq!(end_of_doorbells(4), 0x1000 + 2 * 65536 * 64);
    }

    #[test]
    fn a_whole_bar_is_mapped_from_the_first_doorbell_on() {
        let bar = bar(16 * K, &[(0, 16 * K)]);
        assert_eq!(chosen(&bar, END, 4 * K), [(0x1000, 12 * K, 12 * K)]);
    }

    #[test]
    fn with_large_pages_the_registers_before_are_mapped_too() {
        let small = bar(16 * K, &[(0, 16 * K)]);
        assert_eq!(chosen(&small, END, 64 * K), [(0, 16 * K, 64 * K)]);
        let large = bar(256 * K, &[(0, 256 * K)]);
        assert_eq!(chosen(&large, END, 64 * K), [(0, 256 * K, 256 * K)]);
    }

    #[test]
    fn what_lies_behind_the_last_doorbell_is_not_mapped() {
        let bar = bar(1 << 30, &[(0, 1 << 30)]);
        assert_eq!(chosen(&bar, END, 4 * K), [(0x1000, 512 * K, 512 * K)]);
        assert_eq!(chosen(&bar, END, 64 * K), [(0, 576 * K, 576 * K)]);
    }

    #[test]
    fn sparse_areas_give_what_is_in_them() {
        let around = bar(32 * K, &[(0, 8 * K), (12 * K, 20 * K)]);
        assert_eq!(
            chosen(&around, END, 4 * K),
            [(0x1000, 4 * K, 4 * K), (12 * K, 20 * K, 20 * K)]
        );
        let registers_only = bar(16 * K, &[(0, 4 * K)]);
        assert_eq!(chosen(&registers_only, END, 4 * K), []);
        let empty = bar(16 * K, &[(0, 0)]);
        assert_eq!(chosen(&empty, END, 4 * K), []);
    }

    #[test]
    fn partial_pages_inside_of_the_bar_are_left_out() {
        let bar = bar(256 * K, &[(4 * K, 70 * K), (100 * K, 100 * K)]);
        assert_eq!(chosen(&bar, END, 64 * K), [(128 * K, 64 * K, 64 * K)]);
    }

    #[test]
    fn nothing_mappable_gives_no_window() {
        assert_eq!(chosen(&bar(16 * K, &[]), END, 4 * K), []);
    }

    #[test]
    fn absurd_areas_give_no_window() {
        assert_eq!(chosen(&bar(16 * K, &[(u64::MAX - 1, 16)]), END, 4 * K), []);
        assert_eq!(chosen(&bar(16 * K, &[(32 * K, 16 * K)]), END, 4 * K), []);
    }

    fn is_mapped(path: &Path) -> bool {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .any(|line| line.ends_with(path.to_str().unwrap()))
    }

    fn word(file: &File, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn detached_doorbells_can_be_rung_and_hold_no_file() {
        let page = host::page_size();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 * page + 0x4000).unwrap();
        let bar = Region {
            offset: 4 * page,
            size: 0x4000,
            mappable: vec![(0, 0x4000)],
        };
        let function: Arc<dyn Any + Send + Sync> = Arc::new(());
        let mapped = map_doorbells(file.as_file().as_fd(), &bar, 0, page, &function).unwrap();
        let doorbell = |offset| mapped[0].doorbell(offset).unwrap();
        let (first, last) = (doorbell(0x1000), doorbell(0x3ffc));
        first.ring(7);
        last.ring(8);
        assert_eq!(word(file.as_file(), 4 * page + 0x1000), 7);
        assert_eq!(word(file.as_file(), 4 * page + 0x3ffc), 8);
        assert!(is_mapped(file.path()));

        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let ringing = scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    first.ring(7);
                }
            });
            mapped[0].detach().unwrap();
            ended.store(true, Ordering::Relaxed);
            ringing.join().unwrap();
        });
        assert!(!is_mapped(file.path()));
        first.ring(9);
        last.ring(10);
        mapped[0].doorbell(0x1004).unwrap().ring(11);
        assert_eq!(word(file.as_file(), 4 * page + 0x1000), 7);
        assert_eq!(word(file.as_file(), 4 * page + 0x3ffc), 8);

        mapped[0].detach().unwrap();
        drop(mapped);
        first.ring(12);
        assert_eq!(Arc::strong_count(&function), 2);
        drop((first, last));
        assert_eq!(Arc::strong_count(&function), 1);
    }

    #[test]
    fn msix_table_is_no_doorbell() {
        let reserved = Reserved(Msix {
            table: Some(0x2000..0x2410),
            pending_bits: Some(0x3000..0x3010),
        });
        assert_eq!(reserved.vector_control(0), Some(0x200c));
        assert_eq!(reserved.vector_control(64), Some(0x240c));
        assert_eq!(reserved.vector_control(65), None);
        assert_eq!(Reserved::default().vector_control(0), None);
        for (offset, held) in [
            (0x1ffc, false),
            (0x1ffe, true),
            (0x2000, true),
            (0x240c, true),
            (0x2410, false),
            (0x3008, true),
        ] {
            assert_eq!(reserved.holds(offset), held, "{offset:#x}");
        }
    }
}
