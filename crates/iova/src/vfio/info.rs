//! What the kernel answers in variable length, asked for and taken apart.

use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;

use vfio_bindings::bindings::vfio as abi;

use super::{IOMMU_GET_INFO, ioctl};
use crate::{Geometry, IovaRange};

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

/// How often an information request is repeated with more room. What there is to tell can grow
/// between two calls, so twice may not be enough.
const CALLS: u32 = 8;

/// What the container's IOMMU offers.
pub(super) fn iommu(container: BorrowedFd<'_>) -> io::Result<Geometry> {
    let structure = [0; size_of::<abi::vfio_iommu_type1_info>()];
    // SAFETY: that is the size of this request's structure, which has no pointers in it.
    let reply = unsafe { get_info(container, IOMMU_GET_INFO, &structure) }?;
    geometry(InfoReply::new(&reply), page_size())
}

/// Whether an IOMMU driver is chosen for the container. The last group that leaves takes it along,
/// and with it all mappings.
pub(super) fn has_driver(container: BorrowedFd<'_>) -> bool {
    // The only reason for this answer to a request that is well-formed.
    let without_driver = |error: io::Error| error.raw_os_error() == Some(libc::EINVAL);
    !iommu(container).is_err_and(without_driver)
}

/// Makes an information request of VFIO whose reply can be longer than its structure, with as much
/// room as the kernel says it needs: `VFIO_IOMMU_GET_INFO`, `VFIO_DEVICE_GET_REGION_INFO` and
/// others with a `cap_offset`.
///
/// `structure` is the request's structure with its input fields set; its `argsz` is set here. The
/// reply is the structure as the kernel filled it in and, behind it, the capabilities;
/// [`InfoReply`] takes it apart.
///
/// # Errors
///
/// What the ioctl fails with, `ENOTTY` or `EINVAL` for a descriptor without such a request.
///
/// # Safety
///
/// `request` is the number of an ioctl whose argument is a structure of `structure.len()` bytes
/// that begins with the 32-bit `argsz`, in which `structure` has no pointers, and beyond whose
/// `argsz` the kernel does not write.
pub unsafe fn get_info(fd: BorrowedFd<'_>, request: u32, structure: &[u8]) -> io::Result<Vec<u8>> {
    with_room(structure, |reply| {
        // SAFETY: the argument begins with its own size, and the caller promises that the kernel
        // keeps to that. The kernel copies bytes, so their alignment doesn't matter.
        unsafe { ioctl(fd, request, reply.as_mut_ptr().cast()) }
    })
}

/// Makes a call with an argument that begins with its size, until the size that is left there is
/// not larger.
fn with_room(
    structure: &[u8],
    mut call: impl FnMut(&mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<u8>> {
    let mut room = structure.len();
    for _ in 0..CALLS {
        let mut reply = structure.to_vec();
        reply.resize(room, 0);
        let argsz = u32::try_from(room).map_err(io::Error::other)?;
        *reply.first_chunk_mut().ok_or_else(truncated)? = argsz.to_ne_bytes();
        call(&mut reply)?;
        let needed = InfoReply::new(&reply).u32_at(0)? as usize;
        if needed <= room {
            return Ok(reply);
        }
        room = needed;
    }
    Err(io::Error::other("the kernel's reply kept growing"))
}

/// The reply to an information request, or the part of it that begins with a capability. Offsets
/// are those of fields in the structures of `linux/vfio.h`; a reply that is too short for one is
/// an error ([`InvalidData`](io::ErrorKind::InvalidData)).
#[derive(Clone, Copy, Debug)]
pub struct InfoReply<'a>(&'a [u8]);

impl<'a> InfoReply<'a> {
    /// A reply as [`get_info`] gives it.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The 32-bit number at `offset`.
    ///
    /// # Errors
    ///
    /// The reply is shorter than that.
    pub fn u32_at(self, offset: usize) -> io::Result<u32> {
        self.bytes_at(offset).map(u32::from_ne_bytes)
    }

    /// The 64-bit number at `offset`.
    ///
    /// # Errors
    ///
    /// The reply is shorter than that.
    pub fn u64_at(self, offset: usize) -> io::Result<u64> {
        self.bytes_at(offset).map(u64::from_ne_bytes)
    }

    /// An array of `count` pairs of 64-bit numbers at `offset`, such as ranges of IOVA or the
    /// mappable areas of a region.
    ///
    /// # Errors
    ///
    /// The reply is shorter than that.
    pub fn pairs_at(self, offset: usize, count: u32) -> io::Result<Vec<(u64, u64)>> {
        let (numbers, _) = self.0.get(offset..).unwrap_or_default().as_chunks();
        let (pairs, _) = numbers.as_chunks();
        let pairs = pairs.get(..count as usize).ok_or_else(truncated)?;
        let pair = |[one, other]: &[_; 2]| (u64::from_ne_bytes(*one), u64::from_ne_bytes(*other));
        Ok(pairs.iter().map(pair).collect())
    }

    /// The capabilities of the reply, each as its number and what begins with its header.
    ///
    /// `first` is the reply's `cap_offset`; 0 means that there are none. A chain that leads out of
    /// the reply or back ends there.
    pub fn capabilities(self, first: u32) -> impl Iterator<Item = (u32, Self)> {
        type Header = abi::vfio_info_cap_header;

        let mut next = first as usize;
        std::iter::from_fn(move || {
            let capability = Self(self.0.get(next..).filter(|_| next != 0)?);
            let id = u16::from_ne_bytes(capability.bytes_at(offset_of!(Header, id)).ok()?);
            let following = capability.u32_at(offset_of!(Header, next)).ok()? as usize;
            // A chain that leads back would never end.
            next = if following > next { following } else { 0 };
            Some((u32::from(id), capability))
        })
    }

    fn bytes_at<const N: usize>(self, offset: usize) -> io::Result<[u8; N]> {
        let bytes = self.0.get(offset..).and_then(<[u8]>::first_chunk);
        bytes.copied().ok_or_else(truncated)
    }
}

/// Reads the geometry from a reply of `VFIO_IOMMU_GET_INFO`.
///
/// `page_size` is the host's, for kernels that do not report page sizes.
fn geometry(reply: InfoReply<'_>, page_size: u64) -> io::Result<Geometry> {
    type Info = abi::vfio_iommu_type1_info;
    type Ranges = abi::vfio_iommu_type1_info_cap_iova_range;
    type Available = abi::vfio_iommu_type1_info_dma_avail;

    let flags = reply.u32_at(offset_of!(Info, flags))?;
    let page_sizes = match flags & abi::VFIO_IOMMU_INFO_PGSIZES {
        0 => page_size,
        _ => reply.u64_at(offset_of!(Info, iova_pgsizes))?,
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
    for (id, capability) in reply.capabilities(reply.u32_at(offset_of!(Info, cap_offset))?) {
        match id {
            abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = capability.u32_at(offset_of!(Ranges, nr_iovas))?;
                geometry.usable = capability
                    .pairs_at(offset_of!(Ranges, iova_ranges), count)?
                    .into_iter()
                    .map(|(first, last)| IovaRange { first, last })
                    .collect();
            }
            abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                let available = capability.u32_at(offset_of!(Available, avail))?;
                geometry.max_mappings = Some(u64::from(available));
            }
            _ => {}
        }
    }
    Ok(geometry)
}

/// The size of the host's pages in bytes.
fn page_size() -> u64 {
    // SAFETY: the call takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(0x1000)
}

fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's reply is shorter than it says",
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    /// A reply with capabilities, built as the kernel builds it.
    struct Reply(Vec<u8>);

    impl Reply {
        fn new(flags: u32, page_sizes: u64, cap_offset: u32) -> Self {
            let mut bytes = Vec::new();
            bytes.extend(0_u32.to_ne_bytes());
            bytes.extend(flags.to_ne_bytes());
            bytes.extend(page_sizes.to_ne_bytes());
            bytes.extend(cap_offset.to_ne_bytes());
            bytes.extend(0_u32.to_ne_bytes());
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

        fn geometry(&self, page_size: u64) -> io::Result<Geometry> {
            geometry(InfoReply::new(&self.0), page_size)
        }
    }

    #[test]
    fn geometry_with_ranges_and_entry_limit() {
        let geometry = Reply::new(0x3, 0x4020_1000, 24)
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
            .capability(abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 0, &[66])
            .geometry(0x1000)
            .expect("a complete reply");
        assert_eq!(geometry.page_sizes, 0x4020_1000);
        assert_eq!(geometry.max_mappings, Some(66));
        assert!(geometry.unmaps_runs);
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
    fn geometry_with_any_number_of_ranges() {
        for count in [0, 1, 1000] {
            let mut body = vec![count];
            body.extend((0..2 * count).map(|n| n << 20));
            let reply = Reply::new(0x3, 0x1000, 24).capability(
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
                0,
                &body,
            );
            let geometry = reply.geometry(0x1000).expect("a complete reply");
            assert_eq!(geometry.usable.len() as u64, count);
            if let Some(range) = geometry.usable.last() {
                let (first, last) = ((2 * count - 2) << 20, (2 * count - 1) << 20);
                assert_eq!(*range, IovaRange { first, last });
            }
        }
    }

    #[test]
    fn geometry_of_an_old_kernel_is_assumed() {
        let geometry = Reply::new(0, 0, 0)
            .geometry(0x1_0000)
            .expect("a complete reply");
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
        let ranges = |count| {
            Reply::new(0x3, 0x1000, 24).capability(
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
                0,
                &[count, 0, 0xfedf_ffff, 0],
            )
        };
        ranges(1).geometry(0x1000).expect("that one is there");
        for count in [2, 3, u64::from(u32::MAX)] {
            let error = ranges(count).geometry(0x1000).expect_err("too short");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        Reply(vec![0; 3]).geometry(0x1000).expect_err("too short");
    }

    #[test]
    fn a_chain_that_leads_back_ends() {
        let reply = Reply::new(0x2, 0, 24).capability(99, 24, &[0]);
        let reply = InfoReply::new(&reply.0);
        assert_eq!(reply.capabilities(24).count(), 1);
        assert_eq!(reply.capabilities(0).count(), 0);
        assert_eq!(reply.capabilities(0x1000).count(), 0);
    }

    #[test]
    fn a_capability_whose_header_is_cut_off_is_none() {
        let reply = Reply::new(0x2, 0, 24).capability(99, 0, &[]);
        for end in 24..32 {
            let reply = InfoReply::new(&reply.0[..end]);
            assert_eq!(reply.capabilities(24).count(), 0, "{end}");
        }
        assert_eq!(InfoReply::new(&reply.0).capabilities(24).count(), 1);
    }

    #[test]
    fn a_reply_gets_the_room_that_it_needs() {
        let mut sizes = [20, 40, 44, 44].into_iter();
        let mut rooms = Vec::new();
        let reply = with_room(&[9; 12], |reply| {
            let argsz = InfoReply::new(reply).u32_at(0)?;
            assert_eq!(argsz as usize, reply.len());
            assert_eq!(reply[4..12], [9; 8], "the input fields");
            rooms.push(argsz);
            let needed: u32 = sizes.next().expect("no more calls than needed");
            reply[4..].fill(needed as u8);
            reply[..4].copy_from_slice(&needed.to_ne_bytes());
            Ok(())
        })
        .expect("room enough in the end");
        assert_eq!(rooms, [12, 20, 40, 44]);
        assert_eq!(reply[4..], [44; 40]);
    }

    #[test]
    fn a_reply_that_grows_without_end_is_an_error() {
        let mut calls = 0;
        with_room(&[0; 12], |reply| {
            calls += 1;
            let more = reply.len() as u32 + 1;
            reply[..4].copy_from_slice(&more.to_ne_bytes());
            Ok(())
        })
        .expect_err("never enough");
        assert_eq!(calls, CALLS);
    }

    #[test]
    fn what_has_no_size_is_not_asked_for() {
        let asked = with_room(&[0; 3], |_| unreachable!("no room for argsz"));
        assert!(asked.is_err());
    }

    #[test]
    fn what_is_no_vfio_descriptor_gives_an_error() {
        let file = File::open("/dev/null").expect("every system has it");
        let error = iommu(file.as_fd()).expect_err("no container");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn pages_are_those_of_the_host() {
        assert!(page_size().is_power_of_two() && page_size() >= 0x1000);
    }
}
