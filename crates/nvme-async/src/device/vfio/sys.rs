//! The system calls of VFIO, behind safe functions.
//!
//! All that is `unsafe` about talking to the kernel is here, and in [`iova::vfio`] what concerns
//! the IOMMU. `vfio-ioctls` opens the container; the rest it either does not offer (geometry of the
//! IOMMU, map direction, eventfds of requests and errors), or offers without telling whether it
//! worked (reset, region access, interrupts), or can't take back safely: its device type can't
//! exist without also opening the group, and its `drop` finds the group again through sysfs and
//! panics when the device has just been removed.

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use iova::vfio::get_info;
use vfio_bindings::bindings::vfio as abi;
use vfio_ioctls::{VfioContainer, VfioError};

const SET_IOMMU: u32 = request(2);
const GROUP_GET_STATUS: u32 = request(3);
const GROUP_SET_CONTAINER: u32 = request(4);
const GROUP_GET_DEVICE_FD: u32 = request(6);
const DEVICE_GET_INFO: u32 = request(7);
const DEVICE_GET_REGION_INFO: u32 = request(8);
const DEVICE_GET_IRQ_INFO: u32 = request(9);
const DEVICE_SET_IRQS: u32 = request(10);
const DEVICE_RESET: u32 = request(11);

/// The number of an ioctl, as `_IO(VFIO_TYPE, VFIO_BASE + number)` makes it.
const fn request(number: u32) -> u32 {
    (abi::VFIO_TYPE as u32) << 8 | (abi::VFIO_BASE + number)
}

/// # Safety
///
/// `argument` is what the kernel expects for `request` on this kind of descriptor: a number, or a
/// pointer to memory of the size that its `argsz` says, live and writable during the call.
unsafe fn ioctl(fd: BorrowedFd<'_>, request: u32, argument: *mut c_void) -> io::Result<c_int> {
    // SAFETY: the descriptor is open while borrowed; the argument is the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A container that `vfio-ioctls` opened.
pub(super) struct Container(VfioContainer);

impl Container {
    /// A new one, without groups.
    pub(super) fn open() -> Result<Self, VfioError> {
        VfioContainer::new(None).map(Self)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the container owns this descriptor and is borrowed for as long as the result.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Flags of a group: `VFIO_GROUP_FLAGS_*`.
pub(super) fn group_flags(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = abi::vfio_group_status {
        argsz: size_of::<abi::vfio_group_status>() as u32,
        ..Default::default()
    };
    // SAFETY: the argument is the structure of this request, with its size in argsz.
    unsafe { ioctl(group, GROUP_GET_STATUS, (&raw mut status).cast())? };
    Ok(status.flags)
}

/// Puts a group into a container.
pub(super) fn group_set_container(
    group: BorrowedFd<'_>,
    container: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut fd = container.as_raw_fd();
    // SAFETY: the argument is a pointer to the descriptor's number, which the kernel only reads.
    unsafe { ioctl(group, GROUP_SET_CONTAINER, (&raw mut fd).cast())? };
    Ok(())
}

/// Chooses the IOMMU driver of a container: `VFIO_TYPE1v2_IOMMU` and the like.
pub(super) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: the argument of this request is a number.
    unsafe {
        ioctl(
            container,
            SET_IOMMU,
            ptr::without_provenance_mut(kind as usize),
        )?
    };
    Ok(())
}

/// Opens a function of a group by its PCI address.
pub(super) fn group_device(group: BorrowedFd<'_>, address: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the argument is a string with its final zero, which the kernel only reads.
    let fd = unsafe {
        ioctl(
            group,
            GROUP_GET_DEVICE_FD,
            address.as_ptr().cast_mut().cast(),
        )?
    };
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The reply of `VFIO_DEVICE_GET_REGION_INFO`, capabilities included.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    const INDEX: usize = std::mem::offset_of!(abi::vfio_region_info, index);
    let mut structure = [0; size_of::<abi::vfio_region_info>()];
    structure[INDEX..INDEX + 4].copy_from_slice(&index.to_ne_bytes());
    // SAFETY: that is this request's structure, without pointers, and the kernel keeps to argsz.
    unsafe { get_info(device, DEVICE_GET_REGION_INFO, &structure) }
}

/// Flags and counts of a device.
pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<abi::vfio_device_info> {
    let mut info = abi::vfio_device_info {
        argsz: size_of::<abi::vfio_device_info>() as u32,
        ..Default::default()
    };
    // SAFETY: the argument is the structure of this request, with its size in argsz.
    unsafe { ioctl(device, DEVICE_GET_INFO, (&raw mut info).cast())? };
    Ok(info)
}

/// Flags and count of one kind of interrupt: `VFIO_PCI_MSIX_IRQ_INDEX` and the like.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<abi::vfio_irq_info> {
    let mut info = abi::vfio_irq_info {
        argsz: size_of::<abi::vfio_irq_info>() as u32,
        index,
        ..Default::default()
    };
    // SAFETY: the argument is the structure of this request, with its size in argsz.
    unsafe { ioctl(device, DEVICE_GET_IRQ_INFO, (&raw mut info).cast())? };
    Ok(info)
}

/// Enables the interrupts `0..eventfds.len()` of one kind, all at once.
///
/// Gives the number that could be had: less than asked for means that none is enabled, and that
/// a call with that many may succeed.
pub(super) fn set_eventfds(
    device: BorrowedFd<'_>,
    index: u32,
    eventfds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let flags = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
    // The fields of vfio_irq_set, all of 32 bits, and then the descriptors' numbers.
    let mut words = vec![0, flags, index, 0, eventfds.len() as u32];
    words.extend(eventfds.iter().map(|fd| fd.as_raw_fd() as u32));
    words[0] = size_of_val(words.as_slice()) as u32;
    // SAFETY: the argument is the structure of this request with `count` descriptors behind it,
    // and its whole size in argsz.
    let available = unsafe { ioctl(device, DEVICE_SET_IRQS, words.as_mut_ptr().cast())? };
    Ok(if available == 0 {
        eventfds.len()
    } else {
        available as usize
    })
}

/// Resets a function.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this request takes no argument.
    unsafe { ioctl(device, DEVICE_RESET, ptr::null_mut())? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::eventfd;

    #[test]
    fn request_numbers_are_the_kernels() {
        assert_eq!(SET_IOMMU, 0x3b66);
        assert_eq!(GROUP_GET_DEVICE_FD, 0x3b6a);
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(DEVICE_RESET, 0x3b6f);
    }

    #[test]
    fn what_is_no_vfio_descriptor_gives_an_error() {
        let fd = eventfd().unwrap();
        assert_eq!(
            group_flags(fd.as_fd()).unwrap_err().raw_os_error(),
            Some(libc::ENOTTY)
        );
        assert!(region_info(fd.as_fd(), 0).is_err());
        assert!(set_eventfds(fd.as_fd(), 2, &[fd.as_fd()]).is_err());
        assert!(reset(fd.as_fd()).is_err());
    }
}
