//! What the kernel says about a device's regions, taken apart.

use std::io;
use std::mem::offset_of;

use iova::vfio::InfoReply;
use vfio_bindings::bindings::vfio as abi;

use crate::device::bar::Region;

/// Reads a region from a reply of `VFIO_DEVICE_GET_REGION_INFO`.
pub(super) fn region(reply: InfoReply<'_>) -> io::Result<Region> {
    type Info = abi::vfio_region_info;
    type Sparse = abi::vfio_region_info_cap_sparse_mmap;

    let flags = reply.u32_at(offset_of!(Info, flags))?;
    let offset = reply.u64_at(offset_of!(Info, offset))?;
    let size = reply.u64_at(offset_of!(Info, size))?;
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
        for (id, capability) in reply.capabilities(reply.u32_at(offset_of!(Info, cap_offset))?) {
            if id == abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                let count = capability.u32_at(offset_of!(Sparse, nr_areas))?;
                region.mappable = capability.pairs_at(offset_of!(Sparse, areas), count)?;
            }
        }
    }
    Ok(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reply with capabilities, built as the kernel builds it.
    struct Reply(Vec<u8>);

    impl Reply {
        fn new(flags: u32, cap_offset: u32, size: u64, offset: u64) -> Self {
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

        fn read(&self) -> Region {
            region(InfoReply::new(&self.0)).unwrap()
        }
    }

    #[test]
    fn region_mappable_whole_in_parts_or_not() {
        let none = Reply::new(0x3, 0, 0x4000, 0x10).read();
        assert_eq!(
            none,
            Region {
                offset: 0x10,
                size: 0x4000,
                mappable: vec![]
            }
        );

        let whole = Reply::new(0xf, 32, 0x4000, 0).capability(
            abi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
            0,
            &[],
        );
        assert_eq!(whole.read().mappable, [(0, 0x4000)]);

        let parts = Reply::new(0xf, 32, 0x4000, 0).capability(
            abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP,
            0,
            &[2, 0, 0x2000, 0x3000, 0x1000],
        );
        assert_eq!(parts.read().mappable, [(0, 0x2000), (0x3000, 0x1000)]);
    }
}
