//! Controllers on the PCI bus, reached through the kernel's VFIO.
//!
//! A function is opened by way of its IOMMU group, which is put into a type 1 container; functions
//! of one group in one process share both, and each gets a part of the container's addresses.
//! Registers are read and written through the function's file, so that a device that is gone gives
//! an error and not a signal; only doorbells are mapped. A doorbell that is written while the
//! function's memory is disabled (during a reset, or after surprise removal) raises SIGBUS, so
//! nobody may ring during [`Device::reset`].
//!
//! # Giving a device back
//!
//! A host that wants to remove a function says so ([`Notice::ReleaseRequested`]) and waits until
//! the function's file is closed and no region of it is mapped. [`Device::close`] does that while
//! everything that was made of the device lives on:
//!
//! * Mapped doorbells are replaced by memory of this process, at the same address and in one step,
//!   so that those who ring need neither a lock nor a check.
//! * The function's file is closed; what needs it gives `ENODEV` from then on.
//! * The IOMMU group is open for as long as any of its functions is. The last one gives it back,
//!   whereupon the kernel ends all mappings of its container. What others still hold of them counts
//!   as unmapped once the kernel says that the container has lost its IOMMU driver, and not before.
//!   As long as other functions are open, unmapping is what it ever was.
//!
//! Both are forgotten here at the same time, so that a device that is plugged in again (its group
//! has the same number) can be opened although buffers of the old one are still around.

mod closable;
mod error;
mod function;
mod group;
mod info;
mod interrupts;
mod lease;
mod pci;
mod registry;
mod sys;

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use iova::DmaMapper;
use nvme_spec::registers::{self, Capabilities};

pub use self::error::OpenError;
pub use self::pci::{Holder, Neighbour, ParsePciAddressError, PciAddress};

use self::function::Function;
use self::group::Group;
use self::lease::Lease;
use self::pci::Roots;
use crate::device::bar::{self, DOORBELLS, MappedDoorbells, Reserved};
use crate::device::config::{self, BUS_MASTER, INTX_DISABLE, MEMORY_SPACE};
use crate::device::{Device, DeviceError, Doorbell, Notice, VectorMask, host};

/// A PCI function that is bound to vfio-pci.
pub struct VfioDevice {
    function: Arc<Function>,
    lease: Arc<Lease>,
    doorbells: Vec<MappedDoorbells>,
    reserved: Reserved,
    vectors: Vec<Arc<OwnedFd>>,
    notices: Vec<(Notice, Arc<OwnedFd>)>,
}

impl VfioDevice {
    /// Opens the function at `address` with at most `most_vectors` interrupt vectors (and at least
    /// one), all of them enabled.
    ///
    /// The function is reset by the kernel if it can be, INTx is off and bus mastering not yet on.
    /// In one process it can be open only once at a time; it is closed by [`Device::close`], or when
    /// this value and everything that [`Device::doorbell`] has given are dropped. An opening
    /// meanwhile fails; one while another thread is dropping the last of it waits.
    ///
    /// This blocks, for a tenth of a second or more where the function is reset, and for 2 s at most
    /// while somebody else resets, binds or plugs it.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; nothing stays open then.
    pub fn open(address: PciAddress, most_vectors: u16) -> Result<Self, OpenError> {
        Self::open_in(&Roots::system(), address, most_vectors)
    }

    fn open_in(roots: &Roots, address: PciAddress, most_vectors: u16) -> Result<Self, OpenError> {
        let system = |operation| {
            move |source| OpenError::System {
                address,
                operation,
                source,
            }
        };
        let unusable = |reason: &str| OpenError::Unusable {
            address,
            reason: reason.to_owned(),
        };

        let member = Group::open(roots, pci::locate(roots, address)?, address)?;
        let group = member.group().clone();
        let function = Function::open(member, address)?;
        let lease = Lease::new(group).ok_or_else(|| {
            unusable("what this process still has mapped in its IOMMU group leaves no addresses")
        })?;
        if function.bar().size <= DOORBELLS {
            return Err(unusable("its BAR 0 has no room for doorbells"));
        }
        function
            .change_command(MEMORY_SPACE | INTX_DISABLE, BUS_MASTER)
            .map_err(system("enabling the function's registers"))?;

        let stride = doorbell_stride(&function).map_err(system("reading register CAP"))?;
        let keep: Arc<dyn Any + Send + Sync> = function.clone();
        let map = |file: BorrowedFd<'_>| {
            bar::map_doorbells(file, function.bar(), stride, host::page_size(), &keep)
        };
        let doorbells = match function.with_file(map) {
            Ok(doorbells) => doorbells,
            Err(error) => {
                tracing::warn!(%address, %error, "doorbells can't be mapped; each will be a call");
                Vec::new()
            }
        };
        let reserved = config::msix_in_bar0(&*function).map_err(system("looking for MSI-X"))?;
        let vectors = interrupts::enable_vectors(&function, address, most_vectors)?;
        let notices = interrupts::enable_notices(&function, address);
        tracing::debug!(
            %address,
            group = lease.group().id(),
            vectors = vectors.len(),
            doorbells = ?doorbells,
            geometry = ?lease.geometry(),
            "opened through VFIO"
        );
        Ok(Self {
            function,
            lease: Arc::new(lease),
            doorbells,
            reserved: Reserved(reserved),
            vectors,
            notices,
        })
    }

    /// The number of the function's IOMMU group.
    #[must_use]
    pub fn iommu_group(&self) -> u32 {
        self.lease.group().id()
    }

    /// A mapped word of BAR 0.
    fn mapped(&self, offset: u32) -> Option<Doorbell> {
        let mut mapped = self.doorbells.iter();
        mapped.find_map(|doorbells| doorbells.doorbell(offset))
    }

    fn error(&self, operation: String) -> impl FnOnce(io::Error) -> DeviceError {
        move |source| DeviceError {
            address: self.address().to_owned(),
            operation,
            source,
        }
    }
}

impl Device for VfioDevice {
    fn address(&self) -> &str {
        self.function.address()
    }

    fn read32(&self, offset: u32) -> Result<u32, DeviceError> {
        let result = self.function.read32(offset);
        result.map_err(self.error(format!("read of register {offset:#x}")))
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), DeviceError> {
        let result = self.function.write32(offset, value);
        result.map_err(self.error(format!("write of register {offset:#x}")))
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError> {
        let refused = |reason: &str| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, reason);
            self.error(format!("use of doorbell {offset:#x}"))(source)
        };
        let end = u64::from(offset) + 4;
        if !offset.is_multiple_of(4)
            || u64::from(offset) < DOORBELLS
            || end > self.function.bar().size
        {
            return Err(refused("BAR 0 has no doorbell there"));
        }
        if self.reserved.holds(offset) {
            return Err(refused("the MSI-X table or its pending bits are there"));
        }
        Ok(self.mapped(offset).unwrap_or_else(|| Doorbell::Call {
            target: self.function.clone(),
            offset,
        }))
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        &self.vectors
    }

    /// Where the kernel lets the MSI-X table be mapped (since Linux 4.16), and it is in BAR 0.
    fn vector_mask(&self, vector: u16) -> Option<VectorMask> {
        let enabled = usize::from(vector) < self.vectors.len();
        let word = self.reserved.vector_control(vector).filter(|_| enabled)?;
        self.mapped(word).map(VectorMask::new)
    }

    /// Maps into a part of the container's addresses that this opening alone has, for as long as
    /// the mapper lives. The IOMMU does not tell functions of one group apart, though: each can
    /// reach what the others have mapped. When the last of them is closed, all mappings end.
    fn mapper(&self) -> Arc<dyn DmaMapper> {
        let lease: Arc<Lease> = self.lease.clone();
        lease
    }

    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError> {
        let (set, clear) = if enabled {
            (BUS_MASTER, 0)
        } else {
            (0, BUS_MASTER)
        };
        let result = self.function.change_command(set, clear);
        let verb = if enabled { "enabling" } else { "disabling" };
        result.map_err(self.error(format!("{verb} bus mastering")))
    }

    /// Resets the function by what the kernel finds best: a function-level reset, a change of power
    /// state, or a reset of its slot. Interrupts and bus mastering are afterwards as they were.
    fn reset(&self) -> Result<(), DeviceError> {
        self.function
            .reset()
            // The kernel restores the configuration space, but not every device wakes up with it.
            .and_then(|()| self.function.change_command(MEMORY_SPACE | INTX_DISABLE, 0))
            .map_err(self.error("reset".to_owned()))
    }

    /// Closes the function, and its IOMMU group too if this process has no other function of it
    /// open: the group is then free for others, and mappings have ended.
    ///
    /// Where a function has vanished unseen by the kernel, this takes minutes.
    fn close(&self) {
        self.lease.end();
        for doorbells in &self.doorbells {
            if let Err(error) = doorbells.detach() {
                tracing::error!(
                    address = self.address(),
                    %error,
                    "doorbells stay mapped, and with that the device can't be given back"
                );
            }
        }
        self.function.close();
    }

    fn notices(&self) -> Vec<(Notice, Arc<OwnedFd>)> {
        self.notices.clone()
    }
}

impl fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioDevice")
            .field("address", &self.function.address())
            .field("iommu_group", &self.iommu_group())
            .field("vectors", &self.vectors.len())
            .field("doorbells", &self.doorbells)
            .finish_non_exhaustive()
    }
}

fn doorbell_stride(function: &Function) -> io::Result<u8> {
    let low = function.read32(registers::offset::CAP)?;
    let high = function.read32(registers::offset::CAP + 4)?;
    Ok(Capabilities::from_bits(u64::from(high) << 32 | u64::from(low)).dstrd())
}
