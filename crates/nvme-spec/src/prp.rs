//! Physical region pages (Base, section 4.1.1 "Physical Region Page Entry and List").
//!
//! PRP1 of a command may start anywhere in a page (at a multiple of 4); every further entry starts a
//! page. With two pages PRP2 is the second one's address; with more it is the address of a list, which
//! may itself start inside of a page. The last entry of a page of the list points to the next page of
//! the list if entries remain.

/// The size of a PRP entry in bytes.
pub const ENTRY_BYTES: u32 = 8;

/// A PRP entry: the address of a memory page, and an offset into it.
///
/// `page_size` is the memory page size in use, `4096 << CC.MPS`: a power of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrpEntry(pub u64);

impl PrpEntry {
    /// The address of the page.
    pub const fn page(self, page_size: u32) -> u64 {
        self.0 & !(page_size as u64 - 1)
    }

    /// The offset into the page.
    pub const fn offset(self, page_size: u32) -> u32 {
        (self.0 & (page_size as u64 - 1)) as u32
    }

    /// How many bytes there are from here to the end of the page.
    pub const fn bytes_to_page_end(self, page_size: u32) -> u32 {
        page_size - self.offset(page_size)
    }

    /// Whether PRP1 of a command may be this: a multiple of 4.
    pub const fn is_valid_first(self) -> bool {
        self.0 & 0b11 == 0
    }

    /// Whether an entry behind the first may be this: it starts a page.
    pub const fn is_valid_further(self, page_size: u32) -> bool {
        self.offset(page_size) == 0
    }

    /// Whether the address of a PRP list may be this: a multiple of 8.
    pub const fn is_valid_list(self) -> bool {
        self.0 & 0b111 == 0
    }
}

/// How many PRP entries a transfer of `bytes` takes whose first entry is `first`: the pages that it
/// touches.
pub const fn entries(first: PrpEntry, bytes: u64, page_size: u32) -> u64 {
    let into_first = first.bytes_to_page_end(page_size) as u64;
    match bytes {
        0 => 0,
        _ if bytes <= into_first => 1,
        _ => 1 + (bytes - into_first).div_ceil(page_size as u64),
    }
}

/// How many whole pages a list of `entries` entries takes that starts a page, one entry of each page
/// but the last being the pointer to the next.
pub const fn list_pages(entries: u64, page_size: u32) -> u64 {
    let per_page = (page_size / ENTRY_BYTES) as u64;
    match entries {
        0 => 0,
        _ if entries <= per_page => 1,
        // Each page but the last holds one entry less; the last one may be full.
        _ => (entries - 1).div_ceil(per_page - 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_entry_is_a_page_and_an_offset() {
        let entry = PrpEntry(0x1_2345_6abc);
        assert_eq!(entry.page(0x1000), 0x1_2345_6000);
        assert_eq!(entry.offset(0x1000), 0xabc);
        assert_eq!(entry.bytes_to_page_end(0x1000), 0x544);
        assert_eq!(entry.page(0x1_0000), 0x1_2345_0000);
        assert!(
            entry.is_valid_first() && !entry.is_valid_list() && !entry.is_valid_further(0x1000)
        );
        assert!(!PrpEntry(2).is_valid_first());
        assert!(PrpEntry(0x2000).is_valid_further(0x1000));
        assert!(PrpEntry(0x2008).is_valid_list());
    }

    #[test]
    fn entries_by_hand() {
        assert_eq!(entries(PrpEntry(0x1000), 0, 0x1000), 0);
        assert_eq!(entries(PrpEntry(0x1000), 0x1000, 0x1000), 1);
        assert_eq!(entries(PrpEntry(0x1ffc), 4, 0x1000), 1);
        assert_eq!(entries(PrpEntry(0x1ffc), 5, 0x1000), 2);
        assert_eq!(entries(PrpEntry(0x1200), 0x2000, 0x1000), 3);
    }

    #[test]
    fn list_pages_by_hand() {
        assert_eq!(list_pages(0, 0x1000), 0);
        assert_eq!(list_pages(512, 0x1000), 1);
        assert_eq!(list_pages(513, 0x1000), 2);
        assert_eq!(list_pages(511 + 512, 0x1000), 2);
        assert_eq!(list_pages(511 + 513, 0x1000), 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn entries_are_the_pages_touched(first in 0u64..1 << 40, bytes in 1u64..1 << 24, mps in 0u32..5) {
            let page_size = 0x1000u32 << mps;
            let last = first + bytes - 1;
            let touched = last / u64::from(page_size) - first / u64::from(page_size) + 1;
            prop_assert_eq!(entries(PrpEntry(first), bytes, page_size), touched);
        }

        #[test]
        fn list_pages_hold_all_entries_and_no_page_is_spare(count in 1u64..5000) {
            let capacity = |pages: u64| pages * 511 + 1;
            let pages = list_pages(count, 0x1000);
            prop_assert!(capacity(pages) >= count);
            prop_assert!(pages == 1 || capacity(pages - 1) < count);
        }
    }
}
