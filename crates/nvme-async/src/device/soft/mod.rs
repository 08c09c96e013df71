//! A controller in this process: `nvme-soft` behind an IOMMU of our own.
//!
//! The controller is kept as far away as a PCIe device is. It reaches host memory only through
//! [`SoftIommu`], which refuses and counts what the driver did not map, and its interrupts are
//! eventfds.
//!
//! A program that wants to know what it does when its disk fails makes the controller fail:
//!
//! ```
//! use std::sync::Arc;
//!
//! use nvme_async::device::soft::{SoftDevice, SoftOptions};
//! use nvme_async::nvme_soft::fault::{Behaviour, Fault, FaultKind, FaultStatus};
//! use nvme_async::nvme_soft::{Config, NamespaceConfig, store::MemoryStore};
//! use nvme_async::nvme_spec::{Status, opcode::NvmOpcode};
//! use nvme_async::OpenOptions;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = Config::default();
//! config.namespaces.push(NamespaceConfig::new(MemoryStore::new(1 << 20)?, 512));
//! let device = Arc::new(SoftDevice::new("disk", config, &SoftOptions::default())?);
//! let controller = OpenOptions::new().attach(device.clone()).await?;
//! let namespace = controller.namespace(1).await?;
//!
//! let status = Status::UNRECOVERED_READ_ERROR.with_dnr(true);
//! let fault = Fault::new(Behaviour::Status(FaultStatus::new(status)))
//!     .opcode(NvmOpcode::READ)
//!     .blocks(8..16);
//! device.controller().inject(fault)?;
//! assert!(namespace.read(0, 4096).await.is_ok());
//! assert!(namespace.read(4096, 4096).await.is_err());
//! assert_eq!(device.controller().faults_hit(FaultKind::Status), 1);
//! # controller.shutdown().await?;
//! # Ok(())
//! # }
//! ```

mod iommu;
mod memory;
mod open;
mod vectors;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use iova::DmaMapper;
use nvme_soft::{Config, Counters, Doorbells, SoftController, StartError};

pub use iommu::{SoftIommu, Stray};
pub use open::config;
pub(crate) use open::open;

use self::vectors::Vectors;
use crate::device::host::{eventfd, signal};
use crate::device::{Device, DeviceError, Doorbell, DoorbellCall, Notice, VectorMask};

/// How a [`SoftDevice`] is attached to this process.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SoftOptions {
    /// Interrupt vectors, each of which is a file descriptor; at least 1.
    pub vectors: u16,
    /// The controller sees of mapped memory only file descriptor and offset, as a controller in
    /// another process does. Memory that is no shared mapping of a file is refused with
    /// [`iova::MapError::NeedsFile`], and a wrong offset shows as wrong data.
    pub fd_only: bool,
    /// Mappings that there may be at a time; `None` for no limit.
    pub max_mappings: Option<u64>,
}

impl Default for SoftOptions {
    fn default() -> Self {
        Self {
            vectors: 17,
            fd_only: false,
            max_mappings: None,
        }
    }
}

/// Why a [`SoftDevice`] could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SoftDeviceError {
    /// The controller's configuration is not possible.
    #[error(transparent)]
    Start(#[from] StartError),
    /// An eventfd could not be made, usually because too many files are open.
    #[error("an eventfd for an interrupt vector or a notice could not be made: {0}")]
    Vector(#[source] io::Error),
}

/// A software controller as a [`Device`].
///
/// Dropping it stops the controller's thread. Nothing is flushed then, as when power is lost.
pub struct SoftDevice {
    address: String,
    controller: SoftController,
    doorbells: Arc<Ring>,
    vectors: Arc<Vectors>,
    notices: [(Notice, Arc<OwnedFd>); 2],
    iommu: Arc<SoftIommu>,
}

impl SoftDevice {
    /// Starts a controller. `address` is what the user opened, for errors and traces.
    ///
    /// # Errors
    ///
    /// [`SoftDeviceError`] if the configuration is not possible or descriptors run out.
    pub fn new(
        address: impl Into<String>,
        config: Config,
        options: &SoftOptions,
    ) -> Result<Self, SoftDeviceError> {
        let vectors = Arc::new(Vectors::new(options.vectors).map_err(SoftDeviceError::Vector)?);
        let notice = |notice| match eventfd() {
            Ok(descriptor) => Ok((notice, Arc::new(descriptor))),
            Err(error) => Err(SoftDeviceError::Vector(error)),
        };
        let notices = [notice(Notice::ReleaseRequested)?, notice(Notice::Failed)?];
        let iommu = Arc::new(SoftIommu::new(options.fd_only, options.max_mappings));
        let controller = SoftController::start(config, iommu.clone(), vectors.clone())?;
        Ok(Self {
            address: address.into(),
            doorbells: Arc::new(Ring(controller.doorbells())),
            controller,
            vectors,
            notices,
            iommu,
        })
    }

    /// Plays the host's part: reports to the driver that the device is to be given back, or that it
    /// failed. The controller goes on; see
    /// [`SoftController::vanish`](nvme_soft::SoftController::vanish) for what usually follows.
    pub fn notify(&self, notice: Notice) {
        for (kind, descriptor) in &self.notices {
            if *kind == notice {
                signal(descriptor);
            }
        }
    }

    /// The controller itself, to hold it back, to inject faults or to see its counters.
    pub fn controller(&self) -> &SoftController {
        &self.controller
    }

    /// What the controller has done so far.
    pub fn counters(&self) -> Counters {
        self.controller.counters()
    }

    /// The kernel's identifier of the controller's thread.
    pub fn thread_id(&self) -> u32 {
        self.controller.thread_id()
    }

    /// The IOMMU between controller and host memory.
    pub fn iommu(&self) -> &Arc<SoftIommu> {
        &self.iommu
    }

    /// Accesses of the controller that were refused: outside of a live mapping, or against its
    /// direction. A correct driver causes none.
    pub fn stray_accesses(&self) -> u64 {
        self.iommu.stray_accesses()
    }
}

impl Device for SoftDevice {
    fn address(&self) -> &str {
        &self.address
    }

    fn software_thread(&self) -> Option<u32> {
        Some(self.thread_id())
    }

    fn read32(&self, offset: u32) -> Result<u32, DeviceError> {
        Ok(self.controller.read32(offset))
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), DeviceError> {
        self.controller.write32(offset, value);
        Ok(())
    }

    fn read64(&self, offset: u32) -> Result<u64, DeviceError> {
        Ok(self.controller.read64(offset))
    }

    fn write64(&self, offset: u32, value: u64) -> Result<(), DeviceError> {
        self.controller.write64(offset, value);
        Ok(())
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError> {
        Ok(Doorbell::Call {
            target: self.doorbells.clone(),
            offset,
        })
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        self.vectors.descriptors()
    }

    fn vector_mask(&self, vector: u16) -> Option<VectorMask> {
        let exists = usize::from(vector) < self.vectors().len();
        exists.then(|| {
            VectorMask::exclusive(Doorbell::Call {
                target: self.vectors.clone(),
                offset: vectors::control(vector),
            })
        })
    }

    fn mapper(&self) -> Arc<dyn DmaMapper> {
        self.iommu.clone()
    }

    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError> {
        self.controller.set_bus_master(enabled);
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.controller.reset().map_err(|error| DeviceError {
            address: self.address.clone(),
            operation: "reset".to_owned(),
            source: io::Error::other(error),
        })
    }

    fn notices(&self) -> Vec<(Notice, Arc<OwnedFd>)> {
        self.notices.to_vec()
    }
}

impl fmt::Debug for SoftDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftDevice")
            .field("address", &self.address)
            .field("controller", &self.controller)
            .field("iommu", &self.iommu)
            .finish_non_exhaustive()
    }
}

/// The controller's doorbells, of a type that is ours.
struct Ring(Arc<Doorbells>);

impl DoorbellCall for Ring {
    fn ring(&self, offset: u32, value: u32) {
        self.0.ring(offset, value);
    }
}
