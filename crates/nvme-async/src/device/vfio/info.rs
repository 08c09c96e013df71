//! What the kernel says about an IOMMU and about a device's regions, taken apart.

use std::io;
use std::mem::offset_of;

use iova::{Geometry, IovaRange};
use vfio_bindings::bindings::vfio as abi;

/// The addresses that are taken as usable when the kernel (before 5.4) does not say: 39 bits,
/// which every IOMMU has, without x86's window for interrupt messages.
const ASSUMED_USABLE: [IovaRange; 2] = [
    IovaRange {
        first: 0x1_0000,
        last: 0xfedf_ffff,
    },
    IovaRange {
        first: 0xfef0_0000,
        last: (1 << 39) - 1,
    },
];

/// Reads the geometry from a reply of `VFIO_IOMMU_GET_INFO`.
///
/// `page_size` is the host's, for kernels that do not report page sizes.
pub(super) fn geometry(reply: &[u8], page_size: u64) -> io::Result<Geometry> {
    type Info = abi::vfio_iommu_type1_info;
    type Ranges = abi::vfio_iommu_type1_info_cap_iova_range;
    type Available = abi::vfio_iommu_type1_info_dma_avail;

    let flags = u32_at(reply, offset_of!(Info, flags))?;
    let page_sizes = match flags & abi::VFIO_IOMMU_INFO_PGSIZES {
        0 => page_size,
        _ => u64_at(reply, offset_of!(Info, iova_pgsizes))?,
    };
    let mut geometry = Geometry {
        usable: ASSUMED_USABLE.to_vec(),
        page_sizes,
        max_mappings: None,
        // Type 1 v2 unmaps all mappings that lie in a range.
        unmaps_runs: true,
    };
    if flags & abi::VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(geometry);
    }
    for (id, capability) in capabilities(reply, u32_at(reply, offset_of!(Info, cap_offset))?) {
        match id {
            abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = u32_at(capability, offset_of!(Ranges, nr_iovas))?;
                geometry.usable = pairs(capability, offset_of!(Ranges, iova_ranges), count)?
                    .into_iter()
                    .map(|(first, last)| IovaRange { first, last })
                    .collect();
            }
            abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                let available = u32_at(capability, offset_of!(Available, avail))?;
                geometry.max_mappings = Some(u64::from(available));
            }
            _ => {}
        }
    }
    Ok(geometry)
}

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

/// Reads a region from a reply of `VFIO_DEVICE_GET_REGION_INFO`.
pub(super) fn region(reply: &[u8]) -> io::Result<Region> {
    type Info = abi::vfio_region_info;
    type Sparse = abi::vfio_region_info_cap_sparse_mmap;

    let flags = u32_at(reply, offset_of!(Info, flags))?;
    let offset = u64_at(reply, offset_of!(Info, offset))?;
    let size = u64_at(reply, offset_of!(Info, size))?;
    let mut region = Region {
        offset,
        size,
        mappable: Vec::new(),
    };
    if flags & abi::VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Ok(region);
    }
    region.mappable = vec![(0, size)];
    if flags & abi::VFIO_REGION_INFO_FLAG_CAPS != 0 {
        for (id, capability) in capabilities(reply, u32_at(reply, offset_of!(Info, cap_offset))?) {
            if id == abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                let count = u32_at(capability, offset_of!(Sparse, nr_areas))?;
                region.mappable = pairs(capability, offset_of!(Sparse, areas), count)?;
            }
        }
    }
    Ok(region)
}

/// The capabilities of a reply, each as its number and the bytes from its header on.
fn capabilities(reply: &[u8], first: u32) -> impl Iterator<Item = (u32, &[u8])> {
    type Header = abi::vfio_info_cap_header;

    let mut next = first as usize;
    std::iter::from_fn(move || {
        let capability = reply.get(next..).filter(|_| next != 0)?;
        let id = capability.get(..2)?;
        let following = u32_at(capability, offset_of!(Header, next)).ok()? as usize;
        // A chain that leads back would never end.
        next = if following > next { following } else { 0 };
        Some((u32::from(u16::from_ne_bytes([id[0], id[1]])), capability))
    })
}

/// An array of `count` pairs of 64-bit numbers at `offset`.
fn pairs(bytes: &[u8], offset: usize, count: u32) -> io::Result<Vec<(u64, u64)>> {
    (0..count as usize)
        .map(|index| {
            let at = index.checked_mul(16).and_then(|at| at.checked_add(offset));
            let at = at.ok_or_else(truncated)?;
            Ok((u64_at(bytes, at)?, u64_at(bytes, at + 8)?))
        })
        .collect()
}

fn u32_at(bytes: &[u8], offset: usize) -> io::Result<u32> {
    let word = bytes
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .ok_or_else(truncated)?;
    Ok(u32::from_ne_bytes(*word))
}

fn u64_at(bytes: &[u8], offset: usize) -> io::Result<u64> {
    let word = bytes
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .ok_or_else(truncated)?;
    Ok(u64::from_ne_bytes(*word))
}

fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's reply is shorter than it says",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reply with capabilities, built as the kernel builds it.
    struct Reply(Vec<u8>);

    impl Reply {
        fn iommu(flags: u32, page_sizes: u64, cap_offset: u32) -> Self {
            let mut bytes = Vec::new();
            bytes.extend(0_u32.to_ne_bytes());
            bytes.extend(flags.to_ne_bytes());
            bytes.extend(page_sizes.to_ne_bytes());
            bytes.extend(cap_offset.to_ne_bytes());
            bytes.extend(0_u32.to_ne_bytes());
            Self(bytes)
        }

        fn region(flags: u32, cap_offset: u32, size: u64, offset: u64) -> Self {
            let mut bytes = Vec::new();
            for word in [0, flags, 0, cap_offset] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(size.to_ne_bytes());
            bytes.extend(offset.to_ne_bytes());
            Self(bytes)
        }

        fn capability(mut self, id: u32, next: u32, body: &[u64]) -> Self {
            self.0.extend((id as u16).to_ne_bytes());
            self.0.extend(1_u16.to_ne_bytes());
            self.0.extend(next.to_ne_bytes());
            for word in body {
                self.0.extend(word.to_ne_bytes());
            }
            self
        }
    }

    #[test]
    fn geometry_with_ranges_and_entry_limit() {
        let reply = Reply::iommu(0x3, 0x4020_1000, 24)
            .capability(
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION,
                56,
                &[0, 0x1000, 0x100],
            )
            .capability(
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
                104,
                &[2, 0, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff],
            )
            .capability(abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 0, &[66]);
        let geometry = geometry(&reply.0, 0x1000).unwrap();
        assert_eq!(geometry.page_sizes, 0x4020_1000);
        assert_eq!(geometry.max_mappings, Some(66));
        assert_eq!(
            geometry.usable,
            [
                IovaRange {
                    first: 0,
                    last: 0xfedf_ffff
                },
                IovaRange {
                    first: 0xfef0_0000,
                    last: 0x7f_ffff_ffff
                },
            ]
        );
    }

    #[test]
    fn geometry_of_an_old_kernel_is_assumed() {
        let geometry = geometry(&Reply::iommu(0, 0, 0).0, 0x1_0000).unwrap();
        assert_eq!(geometry.page_sizes, 0x1_0000);
        assert_eq!(geometry.max_mappings, None);
        assert_eq!(geometry.usable, ASSUMED_USABLE);
        let msi = 0xfee0_0000_u64;
        assert!(
            geometry
                .usable
                .iter()
                .all(|range| msi < range.first || msi > range.last)
        );
    }

    #[test]
    fn geometry_that_lies_about_its_length_is_an_error() {
        let reply = Reply::iommu(0x3, 0x1000, 24).capability(
            abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
            0,
            &[3, 0, 0xfedf_ffff],
        );
        assert!(geometry(&reply.0, 0x1000).is_err());
        assert!(geometry(&[0; 3], 0x1000).is_err());
    }

    #[test]
    fn a_chain_that_leads_back_ends() {
        let reply = Reply::iommu(0x2, 0, 24).capability(99, 24, &[0]);
        assert_eq!(capabilities(&reply.0, 24).count(), 1);
        assert_eq!(capabilities(&reply.0, 0).count(), 0);
        assert_eq!(capabilities(&reply.0, 0x1000).count(), 0);
    }

    #[test]
    fn region_mappable_whole_in_parts_or_not() {
        let none = region(&Reply::region(0x3, 0, 0x4000, 0x10).0).unwrap();
        assert_eq!(
            none,
            Region {
                offset: 0x10,
                size: 0x4000,
                mappable: vec![]
            }
        );

        let whole = Reply::region(0xf, 32, 0x4000, 0).capability(
            abi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
            0,
            &[],
        );
        assert_eq!(region(&whole.0).unwrap().mappable, [(0, 0x4000)]);

        let parts = Reply::region(0xf, 32, 0x4000, 0).capability(
            abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP,
            0,
            &[2, 0, 0x2000, 0x3000, 0x1000],
        );
        assert_eq!(
            region(&parts.0).unwrap().mappable,
            [(0, 0x2000), (0x3000, 0x1000)]
        );
    }
}
