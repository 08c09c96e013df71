//! Which part of BAR 0 is mapped for doorbells, and which must never be written as one.

use std::any::Any;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use nvme_spec::registers;

use super::function::Function;
use super::info::Region;
use super::sys::Mapping;
use crate::device::MappedRegisters;

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

/// Maps the doorbells of a function, as far as the kernel allows that.
pub(super) fn map_doorbells(
    function: &Arc<Function>,
    stride: u8,
    page: u64,
) -> io::Result<Vec<MappedRegisters>> {
    /// Unmaps, and only then lets go of the function whose file the mapping holds open.
    struct Owner {
        _mapping: Mapping,
        _function: Arc<Function>,
    }

    let bar = function.bar();
    windows(bar, end_of_doorbells(stride), page)
        .into_iter()
        .filter_map(|window| {
            // Registers have 32-bit offsets; what lies beyond is reached by calls.
            let first = u32::try_from(window.first).ok()?;
            Some((first, window))
        })
        .map(|(first, window)| {
            let len = usize::try_from(window.mapped).map_err(io::Error::other)?;
            let mapping = Mapping::new(function.file().as_fd(), bar.offset + window.first, len)?;
            let base = mapping.base();
            let owner: Arc<dyn Any + Send + Sync> = Arc::new(Owner {
                _mapping: mapping,
                _function: function.clone(),
            });
            // SAFETY: `mapping` is `window.mapped` bytes of the BAR, readable and writable, of
            // which the first `window.len` are registers; it lives as long as `owner`; its base
            // is the start of a page.
            Ok(unsafe { MappedRegisters::new(base, first, window.len as usize, owner) })
        })
        .collect()
}

/// The parts of BAR 0 that hold the MSI-X table and its pending bits.
///
/// They may lie in mapped pages. A doorbell written there, by a stride that the device made up,
/// would redirect interrupts.
#[derive(Clone, Debug, Default)]
pub(super) struct Reserved(pub(super) Vec<Range<u64>>);

impl Reserved {
    /// Whether the 32-bit register at `offset` touches such a part.
    pub(super) fn holds(&self, offset: u32) -> bool {
        let (first, end) = (u64::from(offset), u64::from(offset) + 4);
        self.0
            .iter()
            .any(|part| first < part.end && part.start < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn msix_table_is_no_doorbell() {
        let reserved = Reserved(vec![0x2000..0x2410, 0x3000..0x3010]);
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
