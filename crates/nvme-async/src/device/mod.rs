//! How a controller is reached: one small trait, and the transports that implement it.

#[expect(unsafe_code, reason = "it maps doorbells")]
mod bar;
mod config;
#[expect(unsafe_code, reason = "doorbells are words of a mapped BAR")]
pub mod doorbell;
#[expect(unsafe_code, reason = "it makes system calls")]
mod host;
#[cfg(feature = "soft")]
#[expect(unsafe_code, reason = "it copies from and to memory as a device would")]
pub mod soft;
#[expect(unsafe_code, reason = "it makes system calls")]
pub mod vfio;

#[cfg(feature = "vfio-user")]
pub mod vfio_user;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use iova::DmaMapper;

use crate::Error;
use crate::url::Target;

pub use doorbell::{Doorbell, DoorbellCall, MappedRegisters, VectorMask};

/// A controller as a transport presents it.
///
/// Registers are the control path: a call is a system call, or a message to another process
/// ([`Device::waits_for_peer`]). Nothing here is called per command except what
/// [`Device::doorbell`] hands out.
pub trait Device: fmt::Debug + Send + Sync + 'static {
    /// The address by which the user opened it, for errors and traces.
    fn address(&self) -> &str;

    /// Reads a 32-bit controller register (NVMe base specification 2.0, section 3.1.3).
    fn read32(&self, offset: u32) -> Result<u32, DeviceError>;

    /// Writes a 32-bit controller register.
    fn write32(&self, offset: u32, value: u32) -> Result<(), DeviceError>;

    /// Reads a 64-bit controller register, as one access or as its low and then its high half.
    fn read64(&self, offset: u32) -> Result<u64, DeviceError> {
        let low = self.read32(offset)?;
        let high = self.read32(offset + 4)?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    /// Writes a 64-bit controller register, as one access or as its low and then its high half.
    fn write64(&self, offset: u32, value: u64) -> Result<(), DeviceError> {
        self.write32(offset, value as u32)?;
        self.write32(offset + 4, (value >> 32) as u32)
    }

    /// The doorbell whose register is at `offset` of BAR 0.
    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError>;

    /// The eventfds of the interrupt vectors, vector 0 first, all enabled when the device was
    /// opened. They are nonblocking.
    fn vectors(&self) -> &[Arc<OwnedFd>];

    /// How an interrupt vector is masked, where that takes no call into the kernel.
    fn vector_mask(&self, vector: u16) -> Option<VectorMask> {
        let _ = vector;
        None
    }

    /// Maps host memory for this device, at addresses that nothing else uses: where functions
    /// share an IOMMU container, each opening has addresses of its own.
    fn mapper(&self) -> Arc<dyn DmaMapper>;

    /// Allows or forbids the function to access host memory (PCI command register, bus master
    /// enable).
    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError>;

    /// Resets the function; afterwards the controller is disabled and accesses no host memory.
    fn reset(&self) -> Result<(), DeviceError>;

    /// Whether registers, mappings and resets are messages that another process answers when it gets
    /// round to it. The driver then makes such calls only in threads that may block, and has all
    /// memory of its pool mapped when the controller is opened, since buffers are allocated anywhere.
    fn waits_for_peer(&self) -> bool {
        false
    }

    /// The kernel's number of the thread that a software controller in this process runs in.
    fn software_thread(&self) -> Option<u32> {
        None
    }

    /// Gives the device back to the host, for good. Where the host wants to remove it, the removal
    /// goes on only after this.
    ///
    /// Recovery calls it when the controller was stopped or is gone, and every future is resolved,
    /// from a thread that may block: a transport may try for minutes to reset a device that does not
    /// answer any more. A second call does nothing; it does not wait for the first.
    ///
    /// Everything that was handed out can be used as before, to no effect. Registers give errors
    /// and doorbells go nowhere. Interrupts and notices are not signalled any more; their
    /// descriptors stay open. The mapper refuses new mappings with [`MapError::DeviceGone`]; those
    /// that exist end when they are unmapped, which succeeds, if not before.
    ///
    /// The default does nothing, for transports that hold nothing of the host's.
    ///
    /// [`MapError::DeviceGone`]: iova::MapError::DeviceGone
    fn close(&self) {}

    /// Becomes readable when the device must be released or has failed, one descriptor for each
    /// such cause that the transport can report.
    fn notices(&self) -> Vec<(Notice, Arc<OwnedFd>)> {
        Vec::new()
    }
}

/// What a transport reports out of band.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The host asks for the device back, usually because it is about to be removed.
    ReleaseRequested,
    /// The device reported an uncorrectable error.
    Failed,
    /// The device is gone, and accesses no memory any more.
    Gone,
}

/// A register access, reset or bus-master change that the transport could not do.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {operation} failed: {source}")]
pub struct DeviceError {
    /// The address of the device.
    pub address: String,
    /// What was attempted, for example `read of register 0x1c`.
    pub operation: String,
    /// Why it failed.
    pub source: io::Error,
}

/// Opens what a URL names, with at most `vectors` interrupt vectors. This may block.
pub(crate) fn open(target: &Target, vectors: u16) -> Result<Arc<dyn Device>, Error> {
    match target {
        Target::Pci { address, .. } => match vfio::VfioDevice::open(*address, vectors) {
            Ok(device) => Ok(Arc::new(device)),
            Err(error) => Err(Error::Open {
                address: address.to_string(),
                reason: Box::new(error),
            }),
        },
        #[cfg(feature = "soft")]
        Target::Soft(target) => soft::open(target, vectors),
        #[cfg(feature = "vfio-user")]
        Target::VfioUser { path, .. } => {
            let options = vfio_user::VfioUserOptions {
                vectors,
                ..Default::default()
            };
            match vfio_user::VfioUserDevice::open(path, &options) {
                Ok(device) => Ok(Arc::new(device)),
                Err(error) => Err(Error::Open {
                    address: vfio_user::address_of(path),
                    reason: Box::new(error),
                }),
            }
        }
    }
}
