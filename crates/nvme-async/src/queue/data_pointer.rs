//! PRP entries and SGLs: how a command says where its data is.

use nvme_spec::DataPointer;
use nvme_spec::sgl::SglDescriptor;

/// A run of device addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) iova: u64,
    pub(crate) len: u64,
}

/// Which SGLs the controller takes (Identify Controller, SGLS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SglSupport {
    None,
    /// Addresses and lengths are multiples of four bytes.
    DwordAligned,
    /// Any address and length.
    Any,
}

/// How the data of a command can be described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// PRP entries; `list` of them besides PRP entry 1.
    Prp { list: u64 },
    /// One SGL data block descriptor in the command itself.
    SglBlock,
    /// A list of SGL data block descriptors.
    SglList,
    /// Neither can describe it: the data must be copied.
    Inexpressible,
}

/// Memory for a PRP list or SGL segment, contiguous in device addresses.
pub(crate) trait ListMemory {
    fn iova(&self) -> u64;
    /// Stores a little-endian 64-bit word at `index`.
    fn store_u64(&self, index: usize, value: u64);
}

/// The data pointer of a single run of memory, which is not empty, if PRP entries 1 and 2 can describe
/// it without a list: what [`describe`] makes of it, in less time.
#[inline]
pub(crate) fn in_two_entries(segment: Segment, page_size: u64) -> Option<DataPointer> {
    let Segment { iova, len } = segment;
    let offset = iova % page_size;
    if !iova.is_multiple_of(4) || len > 2 * page_size - offset {
        return None;
    }
    let prp2 = match len > page_size - offset {
        true => iova - offset + page_size,
        false => 0,
    };
    Some(DataPointer::Prp { prp1: iova, prp2 })
}

/// The cheapest way to describe `segments`, in order (NVMe base specification 2.0, sections
/// 4.1.1 and 4.1.2).
///
/// There are at least one segment and no empty ones, and none starts where the one before it ends.
pub(crate) fn shape(segments: &[Segment], page_size: u64, sgl: SglSupport) -> Shape {
    if prp_can_describe(segments, page_size) {
        let pages: u64 = segments
            .iter()
            .map(|segment| pages_touched(segment, page_size))
            .sum();
        return Shape::Prp { list: pages - 1 };
    }
    let aligned =
        |segment: &Segment| segment.iova.is_multiple_of(4) && segment.len.is_multiple_of(4);
    let expressible = segments
        .iter()
        .all(|segment| u32::try_from(segment.len).is_ok())
        && match sgl {
            SglSupport::None => false,
            SglSupport::DwordAligned => segments.iter().all(aligned),
            SglSupport::Any => true,
        };
    match (expressible, segments.len()) {
        (false, _) => Shape::Inexpressible,
        (true, 1) => Shape::SglBlock,
        (true, _) => Shape::SglList,
    }
}

/// Bytes of list memory that `shape` needs for `segments`; 0 if none.
pub(crate) fn list_bytes(shape: Shape, segments: &[Segment], page_size: u64) -> u64 {
    match shape {
        Shape::Prp { list } if list > 1 => prp_list_words(list, page_size) * 8,
        Shape::SglList => segments.len() as u64 * 16,
        _ => 0,
    }
}

/// Writes the list that `shape` needs into `memory` and returns the data pointer.
///
/// `memory` is there whenever [`list_bytes`] is not 0, is at least that large and, for a PRP
/// list, aligned to `page_size`.
pub(crate) fn describe(
    shape: Shape,
    segments: &[Segment],
    page_size: u64,
    memory: Option<&impl ListMemory>,
) -> Option<DataPointer> {
    let first = segments.first()?;
    match shape {
        Shape::Prp { list: 0 } => Some(DataPointer::Prp {
            prp1: first.iova,
            prp2: 0,
        }),
        Shape::Prp { list: 1 } => {
            let prp2 = prp_pages(segments, page_size).nth(1)?;
            Some(DataPointer::Prp {
                prp1: first.iova,
                prp2,
            })
        }
        Shape::Prp { list } => {
            let memory = memory?;
            write_prp_list(
                prp_pages(segments, page_size).skip(1),
                list,
                page_size,
                memory,
            );
            Some(DataPointer::Prp {
                prp1: first.iova,
                prp2: memory.iova(),
            })
        }
        Shape::SglBlock => {
            let len = u32::try_from(first.len).ok()?;
            Some(DataPointer::Sgl(SglDescriptor::data_block(first.iova, len)))
        }
        Shape::SglList => {
            let memory = memory?;
            for (index, segment) in segments.iter().enumerate() {
                let len = u32::try_from(segment.len).ok()?;
                let [low, high] = SglDescriptor::data_block(segment.iova, len).qwords();
                memory.store_u64(index * 2, low);
                memory.store_u64(index * 2 + 1, high);
            }
            let bytes = u32::try_from(segments.len() * 16).ok()?;
            SglDescriptor::last_segment(memory.iova(), bytes)
                .ok()
                .map(DataPointer::Sgl)
        }
        Shape::Inexpressible => None,
    }
}

/// PRP entry 1 may start inside of a page, at a multiple of four; every other entry starts a
/// page, and only the last may end inside of one.
fn prp_can_describe(segments: &[Segment], page_size: u64) -> bool {
    let last = segments.len() - 1;
    segments.iter().enumerate().all(|(index, segment)| {
        let starts_well = if index == 0 {
            segment.iova.is_multiple_of(4)
        } else {
            segment.iova.is_multiple_of(page_size)
        };
        let ends_well = index == last || (segment.iova + segment.len).is_multiple_of(page_size);
        starts_well && ends_well
    })
}

fn pages_touched(segment: &Segment, page_size: u64) -> u64 {
    (segment.iova % page_size + segment.len).div_ceil(page_size)
}

fn prp_pages(segments: &[Segment], page_size: u64) -> impl Iterator<Item = u64> {
    segments.iter().flat_map(move |segment| {
        let start = segment.iova - segment.iova % page_size;
        (0..pages_touched(segment, page_size)).map(move |page| start + page * page_size)
    })
}

/// Words of a list of `entries` entries, pointers to further list pages included.
fn prp_list_words(entries: u64, page_size: u64) -> u64 {
    let per_page = page_size / 8;
    // Each page but the last gives its last word to the pointer to the next one.
    let full_pages = entries.saturating_sub(per_page).div_ceil(per_page - 1);
    entries + full_pages
}

fn write_prp_list(
    entries: impl Iterator<Item = u64>,
    count: u64,
    page_size: u64,
    memory: &impl ListMemory,
) {
    let per_page = (page_size / 8) as usize;
    let mut word = 0;
    let mut left = count;
    for entry in entries {
        if word % per_page == per_page - 1 && left > 1 {
            memory.store_u64(word, memory.iova() + (word as u64 + 1) * 8);
            word += 1;
        }
        memory.store_u64(word, entry);
        word += 1;
        left -= 1;
    }
}
