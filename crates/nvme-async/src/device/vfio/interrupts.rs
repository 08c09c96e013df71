//! Interrupts as eventfds.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio as abi;

use super::error::OpenError;
use super::function::Function;
use super::pci::PciAddress;
use super::sys;
use crate::device::{Notice, host};

/// Enables MSI-X with one eventfd for each vector: as many as the device has, but at most `most`.
///
/// All in one call: the kernel can't add vectors later without disabling the others on the way
/// (`VFIO_IRQ_INFO_NORESIZE`).
pub(super) fn enable_vectors(
    function: &Function,
    address: PciAddress,
    most: u16,
) -> Result<Vec<Arc<OwnedFd>>, OpenError> {
    let system = |source| OpenError::System {
        address,
        operation: "enabling MSI-X",
        source,
    };
    let index = abi::VFIO_PCI_MSIX_IRQ_INDEX;
    let info = function
        .with_file(|device| sys::irq_info(device, index))
        .map_err(system)?;
    if info.count == 0 || info.flags & abi::VFIO_IRQ_INFO_EVENTFD == 0 {
        let reason = "it has no MSI-X interrupts".to_owned();
        return Err(OpenError::Unusable { address, reason });
    }
    let vectors = u16::try_from(info.count)
        .unwrap_or(u16::MAX)
        .min(most.max(1));
    let mut eventfds = (0..vectors)
        .map(|_| host::eventfd().map(Arc::new))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => OpenError::OpenFiles {
                address,
                vectors,
                source,
            },
            _ => system(source),
        })?;
    loop {
        let borrowed: Vec<BorrowedFd<'_>> = eventfds.iter().map(|fd| fd.as_fd()).collect();
        let available = function
            .with_file(|device| sys::set_eventfds(device, index, &borrowed))
            .map_err(system)?;
        if available == eventfds.len() {
            return Ok(eventfds);
        }
        // The host is short of interrupts and says how many it has left.
        if available > eventfds.len() {
            return Err(system(io::Error::other(format!(
                "the kernel answered {available}"
            ))));
        }
        tracing::warn!(%address, wanted = eventfds.len(), available, "fewer interrupts than wanted");
        eventfds.truncate(available);
    }
}

/// The eventfds that say that the device is asked for or has failed, as far as the kernel has them.
pub(super) fn enable_notices(
    function: &Function,
    address: PciAddress,
) -> Vec<(Notice, Arc<OwnedFd>)> {
    let sources = [
        (Notice::ReleaseRequested, abi::VFIO_PCI_REQ_IRQ_INDEX),
        (Notice::Failed, abi::VFIO_PCI_ERR_IRQ_INDEX),
    ];
    let enable = |(notice, index)| match enable_notice(function, index) {
        Ok(Some(eventfd)) => Some((notice, Arc::new(eventfd))),
        Ok(None) => None,
        Err(error) => {
            tracing::warn!(%address, ?notice, %error, "this notice is not available");
            None
        }
    };
    sources.into_iter().filter_map(enable).collect()
}

fn enable_notice(function: &Function, index: u32) -> io::Result<Option<OwnedFd>> {
    // Functions that are no PCI Express devices have no error interrupt: EINVAL.
    let Ok(info) = function.with_file(|device| sys::irq_info(device, index)) else {
        return Ok(None);
    };
    if info.count == 0 {
        return Ok(None);
    }
    let eventfd = host::eventfd()?;
    function.with_file(|device| sys::set_eventfds(device, index, &[eventfd.as_fd()]))?;
    Ok(Some(eventfd))
}
