//! Data pointers against a plain reading of the specification.

use std::cell::RefCell;
use std::collections::BTreeMap;

use nvme_spec::DataPointer;
use nvme_spec::sgl::{Sgl, SglDescriptor};
use proptest::prelude::*;

use crate::queue::data_pointer::{
    ListMemory, Segment, SglSupport, Shape, describe, in_two_entries, list_bytes, shape,
};

const LIST: u64 = 0xffff_1234_0000_0000;

/// List memory of exactly so many words.
struct List {
    words: usize,
    stored: RefCell<BTreeMap<usize, u64>>,
}

impl List {
    fn new(bytes: u64) -> Self {
        assert!(bytes.is_multiple_of(8));
        Self {
            words: (bytes / 8) as usize,
            stored: RefCell::default(),
        }
    }

    /// What the device reads at `address`.
    fn read(&self, address: u64) -> u64 {
        let offset = address.checked_sub(LIST).expect("inside of the list");
        assert!(offset.is_multiple_of(8));
        self.stored.borrow()[&((offset / 8) as usize)]
    }
}

impl ListMemory for List {
    fn iova(&self) -> u64 {
        LIST
    }

    fn store_u64(&self, index: usize, value: u64) {
        assert!(index < self.words, "word {index} of {}", self.words);
        assert!(self.stored.borrow_mut().insert(index, value).is_none());
    }
}

/// Runs of addresses, joined where one follows another: two lists of runs are the same bytes in
/// the same order if they are equal.
#[derive(Debug, Default, PartialEq)]
struct Runs(Vec<(u64, u64)>);

impl Runs {
    fn push(&mut self, address: u64, len: u64) {
        match self.0.last_mut() {
            Some((start, known)) if *start + *known == address => *known += len,
            _ => self.0.push((address, len)),
        }
    }

    fn of(segments: &[Segment]) -> Self {
        let mut runs = Self::default();
        for segment in segments {
            runs.push(segment.iova, segment.len);
        }
        runs
    }
}

/// Walks PRP entries as a controller does (NVMe base specification 2.0, section 4.1.1).
fn read_prps(prp1: u64, prp2: u64, len: u64, page: u64, list: &List) -> Runs {
    let mut runs = Runs::default();
    assert_eq!(prp1 % 4, 0, "PRP entry 1 is a multiple of four");
    let first = len.min(page - prp1 % page);
    runs.push(prp1, first);
    let mut left = len - first;
    if left == 0 {
        assert_eq!(prp2, 0, "PRP entry 2 is reserved");
    } else if left <= page {
        assert_eq!(prp2 % page, 0, "PRP entry 2 starts a page");
        runs.push(prp2, left);
    } else {
        assert_eq!(prp2 % 8, 0, "a list starts at a multiple of eight");
        let mut at = prp2;
        while left > 0 {
            let entry = list.read(at);
            assert_eq!(entry % page, 0, "an entry of a list starts a page");
            let last_of_page = (at + 8).is_multiple_of(page);
            if last_of_page && left > page {
                at = entry;
                continue;
            }
            let now = left.min(page);
            runs.push(entry, now);
            left -= now;
            at += 8;
        }
    }
    runs
}

/// Reads an SGL as a controller does (section 4.1.2).
fn read_sgl(descriptor: SglDescriptor, list: &List) -> (Runs, Vec<(u64, u32)>) {
    let mut blocks = Vec::new();
    match descriptor.decode().expect("it is valid") {
        Sgl::DataBlock { address, length } => blocks.push((address, length)),
        Sgl::LastSegment { address, length } => {
            for offset in (0..u64::from(length)).step_by(16) {
                let at = address + offset;
                let descriptor = SglDescriptor::from_qwords([list.read(at), list.read(at + 8)]);
                match descriptor.decode().expect("it is valid") {
                    Sgl::DataBlock { address, length } => blocks.push((address, length)),
                    other => panic!("{other:?} in the last segment"),
                }
            }
        }
        other => panic!("{other:?} in a command"),
    }
    let mut runs = Runs::default();
    for &(address, length) in &blocks {
        runs.push(address, length.into());
    }
    (runs, blocks)
}

/// Whether PRP entries can say it: cut into pages behind what the first entry leaves of its page,
/// no piece has a jump inside, and all but the first start a page.
fn fits_prps(segments: &[Segment], page: u64) -> bool {
    let first = segments[0].iova;
    let mut filled = first % page;
    let fits = segments.iter().enumerate().all(|(index, segment)| {
        let starts_well = index == 0 || filled == 0 && segment.iova.is_multiple_of(page);
        filled = (filled + segment.len) % page;
        starts_well
    });
    fits && first.is_multiple_of(4)
}

fn check(segments: &[Segment], page: u64, sgl: SglSupport) {
    let shape = shape(segments, page, sgl);
    let bytes = list_bytes(shape, segments, page);
    let list = List::new(bytes);
    let pointer = describe(shape, segments, page, Some(&list));
    assert_eq!(
        list.stored.borrow().len(),
        list.words,
        "the list is as long as was said"
    );
    if bytes == 0 && shape != Shape::Inexpressible {
        assert_eq!(describe(shape, segments, page, None::<&List>), pointer);
    }
    if let [segment] = *segments {
        let is_short = matches!(shape, Shape::Prp { list: 0 | 1 });
        assert_eq!(in_two_entries(segment, page), pointer.filter(|_| is_short));
    }
    let len = segments.iter().map(|segment| segment.len).sum();
    match pointer {
        Some(DataPointer::Prp { prp1, prp2 }) => {
            assert_eq!(read_prps(prp1, prp2, len, page, &list), Runs::of(segments));
        }
        Some(DataPointer::Sgl(descriptor)) => {
            let (runs, blocks) = read_sgl(descriptor, &list);
            assert_eq!(runs, Runs::of(segments));
            assert_ne!(sgl, SglSupport::None);
            if sgl == SglSupport::DwordAligned {
                assert!(
                    blocks
                        .iter()
                        .all(|&(address, len)| address % 4 == 0 && len % 4 == 0)
                );
            }
        }
        None => {
            assert_eq!(shape, Shape::Inexpressible);
            assert!(!fits_prps(segments, page), "PRP entries would do");
            let aligned = |segment: &Segment| (segment.iova | segment.len).is_multiple_of(4);
            let short = segments
                .iter()
                .all(|segment| segment.len <= u64::from(u32::MAX));
            match sgl {
                SglSupport::None => {}
                SglSupport::DwordAligned => assert!(!short || !segments.iter().all(aligned)),
                SglSupport::Any => assert!(!short),
            }
        }
    }
    assert_eq!(
        matches!(shape, Shape::Prp { .. }),
        fits_prps(segments, page)
    );
}

fn segment(iova: u64, len: u64) -> Segment {
    Segment { iova, len }
}

#[test]
fn by_hand() {
    let none = SglSupport::None;
    let prp = |segments: &[Segment]| {
        let shape = shape(segments, 4096, none);
        let list = List::new(list_bytes(shape, segments, 4096));
        (
            shape,
            describe(shape, segments, 4096, Some(&list)),
            list.stored.into_inner(),
        )
    };
    let pointer = |prp1, prp2| Some(DataPointer::Prp { prp1, prp2 });

    let (found, dptr, list) = prp(&[segment(0x5000, 512)]);
    assert_eq!(
        (found, dptr, list.len()),
        (Shape::Prp { list: 0 }, pointer(0x5000, 0), 0)
    );
    let (found, dptr, list) = prp(&[segment(0x5e00, 1024)]);
    assert_eq!(
        (found, dptr, list.len()),
        (Shape::Prp { list: 1 }, pointer(0x5e00, 0x6000), 0)
    );
    let (found, dptr, list) = prp(&[segment(0x5e00, 512), segment(0x9000, 4096)]);
    assert_eq!(
        (found, dptr, list.len()),
        (Shape::Prp { list: 1 }, pointer(0x5e00, 0x9000), 0)
    );
    let (found, dptr, list) = prp(&[segment(0x5e00, 512), segment(0x9000, 8192)]);
    assert_eq!(
        (found, dptr),
        (Shape::Prp { list: 2 }, pointer(0x5e00, LIST))
    );
    assert_eq!(list, BTreeMap::from([(0, 0x9000), (1, 0xa000)]));
    let (found, dptr, _) = prp(&[segment(0x5e00, 256), segment(0x9000, 4096)]);
    assert_eq!((found, dptr), (Shape::Inexpressible, None));
    let (found, ..) = prp(&[segment(0x5002, 512)]);
    assert_eq!(found, Shape::Inexpressible);
}

#[test]
fn lists_are_chained_where_a_page_of_them_is_full() {
    for page in [0x1000u64, 0x2000, 0x1_0000] {
        let per_page = page / 8;
        for entries in [
            per_page - 1,
            per_page,
            per_page + 1,
            2 * per_page - 2,
            2 * per_page - 1,
            2 * per_page,
            3 * per_page - 2,
            3 * per_page - 1,
        ] {
            for offset in [0, 512] {
                let segments = [segment(page * 3 + offset, page - offset + entries * page)];
                assert_eq!(
                    shape(&segments, page, SglSupport::None),
                    Shape::Prp { list: entries }
                );
                check(&segments, page, SglSupport::None);
            }
        }
    }
}

/// Some controllers read the list as one array, without pointers to further pages in it (SPDK's, which
/// transfer at most 128 KiB).
#[test]
fn lists_of_up_to_2_mib_are_one_array() {
    let page = 0x1000;
    for (offset, len) in [
        (0, 12 << 10),
        (4, 128 << 10),
        (512, 128 << 10),
        (0, 2 << 20),
    ] {
        let segments = [segment(page * 5 + offset, len)];
        let shape = shape(&segments, page, SglSupport::None);
        let list = List::new(list_bytes(shape, &segments, page));
        let pointer = describe(shape, &segments, page, Some(&list));
        let prp1 = page * 5 + offset;
        assert_eq!(pointer, Some(DataPointer::Prp { prp1, prp2: LIST }));
        let entries = (offset + len).div_ceil(page) - 1;
        for index in 0..entries {
            assert_eq!(list.read(LIST + index * 8), page * (6 + index));
        }
    }
}

#[test]
fn a_segment_of_4_gib_takes_no_sgl_descriptor() {
    let segments = [segment(2, 1 << 32)];
    assert_eq!(
        shape(&segments, 4096, SglSupport::Any),
        Shape::Inexpressible
    );
    check(&segments, 4096, SglSupport::Any);
    check(&[segment(2, (1 << 32) - 1)], 4096, SglSupport::Any);
}

fn segments(page: u64) -> impl Strategy<Value = Vec<Segment>> {
    let offset = prop_oneof![
        6 => Just(0),
        2 => (0..page / 4).prop_map(|words| words * 4),
        1 => 0..page,
    ];
    let len = prop_oneof![
        5 => (1u64..6).prop_map(move |pages| pages * page),
        2 => Just(0).prop_map(|_| 0),
        2 => (1..page).prop_map(|words| words * 4),
        1 => 1..3 * page,
        1 => (500u64..1600).prop_map(move |pages| pages * page),
    ];
    let one = (1u64..1 << 30, offset, len).prop_map(move |(number, offset, len)| {
        let iova = number * page + offset;
        // 0 stands for: to the end of the page.
        segment(iova, if len == 0 { page - offset } else { len })
    });
    prop::collection::vec(one, 1..7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn devices_find_what_was_described(
        (page, segments) in prop::sample::select(vec![0x1000u64, 0x2000, 0x1_0000])
            .prop_flat_map(|page| (Just(page), segments(page))),
        sgl in prop::sample::select(vec![
            SglSupport::None,
            SglSupport::DwordAligned,
            SglSupport::Any,
        ]),
    ) {
        check(&segments, page, sgl);
    }
}
