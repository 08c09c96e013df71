//! The kernel's VFIO as a mapper: a container with the type 1 IOMMU driver.
//!
//! A VFIO *container* is an I/O address space; the devices of all groups that were put into it
//! share it. [`Type1Container`] maps memory into one by its file descriptor. How that came about is
//! the caller's business: open `/dev/vfio/vfio` and the group, put the group into the container,
//! and choose the IOMMU driver.
//!
//! ```no_run
//! use std::fs::File;
//! use std::io;
//! use std::os::fd::AsRawFd;
//! use std::sync::Arc;
//!
//! use iova::AddressSpace;
//! use iova::vfio::Type1Container;
//!
//! // From linux/vfio.h; the crate `vfio-bindings` has the rest of it.
//! const VFIO_GROUP_SET_CONTAINER: libc::Ioctl = 0x3b68;
//! const VFIO_SET_IOMMU: libc::Ioctl = 0x3b66;
//! const VFIO_TYPE1V2_IOMMU: libc::c_ulong = 3;
//!
//! let open = |path| File::options().read(true).write(true).open(path);
//! let succeeded = |result| match result {
//!     0 => Ok(()),
//!     _ => Err(io::Error::last_os_error()),
//! };
//!
//! let container = open("/dev/vfio/vfio")?;
//! let group = open("/dev/vfio/26")?;
//! let number = container.as_raw_fd();
//! // SAFETY: the argument is a pointer to a descriptor's number, which the kernel only reads.
//! succeeded(unsafe {
//!     libc::ioctl(group.as_raw_fd(), VFIO_GROUP_SET_CONTAINER, &raw const number)
//! })?;
//! // SAFETY: the argument is a number.
//! succeeded(unsafe { libc::ioctl(number, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU) })?;
//!
//! // SAFETY: the container was made here, and nobody else gets its descriptor.
//! let container = unsafe { Type1Container::new(container) }?;
//! let space = AddressSpace::new(Arc::new(container))?;
//! // Device files come from `group`, which stays open for as long as they are used.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! With the crate `vfio-ioctls`, whose `VfioContainer` has the driver chosen when its first
//! `VfioDevice` is made, duplicate the descriptor that it shows:
//! `unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) }.try_clone_to_owned()`.
//!
//! Several address spaces can share one container if each has a part of its addresses: a
//! [`DmaMapper`] of one's own, with a narrower [`Geometry`], maps and unmaps through one
//! `Type1Container` in an `Arc`, and ends with [`unmap_within`](Type1Container::unmap_within).
//!
//! [`get_info`] and [`InfoReply`] read the other replies of VFIO that end in capabilities, those
//! about a device's regions among them.

mod info;

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vfio_bindings::bindings::vfio as abi;

pub use self::info::{InfoReply, get_info};

use crate::{Direction, DmaMapper, Geometry, HostMemory, MapError};

/// `_IO(VFIO_TYPE, VFIO_BASE)`, from which the numbers of the ioctls count.
const BASE: u32 = (abi::VFIO_TYPE as u32) << 8 | abi::VFIO_BASE;
const IOMMU_GET_INFO: u32 = BASE + 12;
const IOMMU_MAP_DMA: u32 = BASE + 13;
const IOMMU_UNMAP_DMA: u32 = BASE + 14;

/// A VFIO container with the type 1 IOMMU driver.
///
/// `F` is whatever has the container's file descriptor: a `File` or an `OwnedFd`, which it then
/// owns, or an `Arc` of one, which is shared. The mappings of a container end at the latest when
/// its last descriptor is closed, or when the last group leaves it (as it does when its devices are
/// removed from the host): from then on unmapping succeeds, and mapping gives
/// [`MapError::DeviceGone`].
pub struct Type1Container<F> {
    descriptor: F,
    geometry: Geometry,
}

impl<F: AsFd> Type1Container<F> {
    /// Asks the kernel what the container's IOMMU offers.
    ///
    /// The groups are in the container and its driver is `VFIO_TYPE1v2_IOMMU` by then. The answer
    /// is kept: a group that joins later may have fewer usable addresses than that.
    ///
    /// Of the [`Geometry`], [`usable`](Geometry::usable) is what the kernel reports, or 39 bits
    /// without x86's window for interrupt messages where it is silent (before 5.4), and
    /// [`max_mappings`](Geometry::max_mappings) is how many there can be *more* than there are at
    /// this moment (`VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`), if the kernel says so (since 5.10).
    ///
    /// # Errors
    ///
    /// `EINVAL` when the container has no driver yet, `ENOTTY` when the descriptor is something
    /// else than a container. VFIO gives the same numbers to requests of different kinds of files,
    /// so a device's file may be found out only by [`map`](DmaMapper::map), as
    /// [`MapError::Invalid`].
    ///
    /// # Safety
    ///
    /// For as long as anything is mapped through this value,
    ///
    /// * that is unmapped, or replaced, through this value alone: not by ioctls of another
    ///   library's or the caller's own on the same container, and not through another
    ///   `Type1Container`. Otherwise a device could reach other memory by an address than was
    ///   mapped there;
    /// * `descriptor` keeps giving the same descriptor.
    ///
    /// What others map elsewhere in the container does no harm: such addresses are refused with
    /// [`MapError::AlreadyMapped`].
    pub unsafe fn new(descriptor: F) -> io::Result<Self> {
        let geometry = info::iommu(descriptor.as_fd())?;
        Ok(Self {
            descriptor,
            geometry,
        })
    }

    /// Unmaps all mappings in `iova..iova + len`, however many there are and with gaps between
    /// them, and gives the number of bytes that were mapped. After that, devices reach nothing
    /// through those addresses. When the last group has left the container, all its mappings ended
    /// with that, and none are counted.
    ///
    /// # Errors
    ///
    /// [`MapError::Invalid`] when a mapping lies in that range only in part, or the range is empty,
    /// misaligned, or goes over the end of the addresses. Nothing is unmapped then.
    pub fn unmap_within(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        Ok(self.unmap_if_any(iova, len)?.unwrap_or(0))
    }

    /// Unmaps, and gives the number of bytes; nothing if no mapping can exist any more.
    fn unmap_if_any(&self, iova: u64, len: u64) -> Result<Option<u64>, MapError> {
        let mut unmap = abi::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<abi::vfio_iommu_type1_dma_unmap>() as u32,
            iova,
            size: len,
            ..Default::default()
        };
        let descriptor = self.descriptor.as_fd();
        // SAFETY: the argument is the structure of this request, with its size in argsz.
        let unmapped = unsafe { ioctl(descriptor, IOMMU_UNMAP_DMA, (&raw mut unmap).cast()) };
        match unmapped {
            Ok(()) => Ok(Some(unmap.size)),
            Err(_) if !info::has_driver(descriptor) => Ok(None),
            Err(error) => Err(map_error(error)),
        }
    }
}

// SAFETY: the kernel maps and unmaps exactly the pages that it is told to and, unmapping, waits
// until the IOMMU has forgotten them; the directions are the IOMMU's page permissions. Mappings end
// otherwise only with the container or with its last group, and a device that is in no container
// reaches no memory. The last group takes the container's driver with it, so without a driver
// nothing is mapped. That nobody else unmaps them is the promise of whoever called `new`. The
// geometry was asked once.
unsafe impl<F: AsFd + Send + Sync> DmaMapper for Type1Container<F> {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let mut map = abi::vfio_iommu_type1_dma_map {
            argsz: size_of::<abi::vfio_iommu_type1_dma_map>() as u32,
            flags: map_flags(direction),
            vaddr: memory.addr().as_ptr().expose_provenance() as u64,
            iova,
            size: memory.len() as u64,
        };
        let descriptor = self.descriptor.as_fd();
        // SAFETY: the argument is the structure of this request, with its size in argsz; that the
        // memory stays valid for what devices then do with it is the caller's promise.
        match unsafe { ioctl(descriptor, IOMMU_MAP_DMA, (&raw mut map).cast()) } {
            Ok(()) => Ok(()),
            Err(_) if !info::has_driver(descriptor) => Err(MapError::DeviceGone),
            Err(error) => Err(map_error(error)),
        }
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let unmapped = self.unmap_if_any(iova, len)?;
        unmapped.map_or(Ok(()), |unmapped| all_of(len, unmapped))
    }
}

impl<F: AsFd> fmt::Debug for Type1Container<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Type1Container")
            .field("descriptor", &self.descriptor.as_fd())
            .field("geometry", &self.geometry)
            .finish()
    }
}

/// What the device may do with the memory: `VFIO_DMA_MAP_FLAG_*`.
fn map_flags(direction: Direction) -> u32 {
    match direction {
        Direction::ToDevice => abi::VFIO_DMA_MAP_FLAG_READ,
        Direction::FromDevice => abi::VFIO_DMA_MAP_FLAG_WRITE,
        Direction::Bidirectional => abi::VFIO_DMA_MAP_FLAG_READ | abi::VFIO_DMA_MAP_FLAG_WRITE,
    }
}

/// An error unless as much was unmapped as was to be.
fn all_of(expected: u64, unmapped: u64) -> Result<(), MapError> {
    if unmapped == expected {
        Ok(())
    } else {
        Err(MapError::ShortUnmap { expected, unmapped })
    }
}

fn map_error(error: io::Error) -> MapError {
    let reason = match error.raw_os_error() {
        Some(libc::EINVAL) => "address, length or IOVA is misaligned, or in a reserved window",
        Some(libc::EFAULT) => "there is no memory there, or none that may be accessed so",
        _ => return error.into(),
    };
    MapError::Invalid {
        reason: reason.to_owned(),
    }
}

/// # Safety
///
/// `argument` points to what the kernel expects for `request` on any kind of descriptor that has
/// such a request: memory of the size that its `argsz` says, live and writable during the call.
unsafe fn ioctl(fd: BorrowedFd<'_>, request: u32, argument: *mut c_void) -> io::Result<()> {
    // SAFETY: the descriptor is open while borrowed; the argument is the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::ptr::NonNull;
    use std::sync::Arc;

    use super::*;

    fn no_container() -> File {
        File::open("/dev/null").expect("every system has it")
    }

    fn container(descriptor: File) -> Type1Container<Arc<File>> {
        Type1Container {
            descriptor: Arc::new(descriptor),
            geometry: Geometry {
                usable: Vec::new(),
                page_sizes: 0x1000,
                max_mappings: None,
                unmaps_runs: true,
            },
        }
    }

    #[test]
    fn request_numbers_are_the_kernels() {
        assert_eq!(IOMMU_GET_INFO, 0x3b70);
        assert_eq!(IOMMU_MAP_DMA, 0x3b71);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3b72);
    }

    #[test]
    fn what_is_no_container_has_no_geometry() {
        // SAFETY: nothing is mapped through it.
        let error = unsafe { Type1Container::new(no_container()) }.expect_err("no container");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn what_is_no_container_neither_maps_nor_unmaps() {
        let container = container(no_container());
        assert_eq!(container.geometry(), container.geometry);
        assert!(format!("{container:?}").contains("page_sizes: 4096"));

        let is_no_container = |result: Result<(), MapError>| match result {
            Err(MapError::Io(error)) => error.raw_os_error() == Some(libc::ENOTTY),
            _ => false,
        };
        let page = NonNull::without_provenance(0x1_0000.try_into().expect("not null"));
        let page = HostMemory::new(page, 0x1000);
        // SAFETY: there is no device to access the memory.
        let mapped = unsafe { container.map(0x1_0000, &page, Direction::ToDevice) };
        assert!(is_no_container(mapped));
        assert!(is_no_container(container.unmap(0x1_0000, 0x1000)));
        let within = container.unmap_within(0, u64::MAX);
        assert!(is_no_container(within.map(|_| ())));
    }

    #[test]
    fn without_a_group_nothing_is_left_to_unmap() {
        // This device's answer to all requests of others is that of a container without a driver.
        let without_driver = File::open("/dev/urandom").expect("every system has it");
        let container = container(without_driver);
        assert!(container.unmap(0x1_0000, 0x1000).is_ok());
        assert!(matches!(container.unmap_within(0, 0x1000), Ok(0)));

        let page = NonNull::without_provenance(0x1_0000.try_into().expect("not null"));
        let page = HostMemory::new(page, 0x1000);
        // SAFETY: there is no device to access the memory.
        let mapped = unsafe { container.map(0x1_0000, &page, Direction::ToDevice) };
        assert!(matches!(mapped, Err(MapError::DeviceGone)), "{mapped:?}");
    }

    #[test]
    fn a_device_may_do_what_the_direction_says() {
        assert_eq!(map_flags(Direction::ToDevice), 0b01);
        assert_eq!(map_flags(Direction::FromDevice), 0b10);
        assert_eq!(map_flags(Direction::Bidirectional), 0b11);
    }

    #[test]
    fn a_short_unmap_is_an_error() {
        assert!(all_of(0x2000, 0x2000).is_ok());
        assert!(matches!(
            all_of(0x2000, 0x1000),
            Err(MapError::ShortUnmap {
                expected: 0x2000,
                unmapped: 0x1000
            })
        ));
        assert!(matches!(
            all_of(0x2000, 0),
            Err(MapError::ShortUnmap { unmapped: 0, .. })
        ));
    }

    #[test]
    fn errors_of_mapping() {
        let error = |code| map_error(io::Error::from_raw_os_error(code));
        assert!(matches!(error(libc::ENOSPC), MapError::OutOfEntries));
        assert!(matches!(error(libc::ENOMEM), MapError::MemoryLimit));
        assert!(matches!(error(libc::EEXIST), MapError::AlreadyMapped));
        assert!(matches!(error(libc::EINVAL), MapError::Invalid { .. }));
        assert!(matches!(error(libc::EFAULT), MapError::Invalid { .. }));
        assert!(matches!(error(libc::ENODEV), MapError::Io(_)));
    }
}
