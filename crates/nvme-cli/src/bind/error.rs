//! Why a controller could not change hands.

use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};

use nvme_async::device::vfio::PciAddress;

use super::held::{Hold, Process};

/// Why [`bind`](super::bind) or [`unbind`](super::unbind) failed. The messages say what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// There is no PCI function at this address.
    #[error("{address}: no such PCI function; `nvme-async list` shows the NVMe controllers")]
    NoSuchFunction {
        /// The address that was asked for.
        address: PciAddress,
    },
    /// The function is something else than an NVMe controller.
    #[error("{address} is not an NVMe controller (class code {class}, not 0x010802)")]
    NotNvme {
        /// The function.
        address: PciAddress,
        /// Its class code, as sysfs shows it.
        class: String,
    },
    /// Without an IOMMU, VFIO has no use for the function.
    #[error(
        "{address} is behind no IOMMU, so it can't be given to user space: switch VT-d or AMD-Vi on in the \
         firmware, and boot with the kernel parameter intel_iommu=on (Intel) or without amd_iommu=off (AMD)"
    )]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// The driver vfio-pci is not there.
    #[error("the driver vfio-pci is not loaded: run `modprobe vfio-pci`")]
    NoVfio,
    /// Namespaces of the controller are in use.
    #[error(
        "{address} is in use: {}. Stop using it first; --force takes it away all the same, and data may be \
         lost",
        list(.holds)
    )]
    Held {
        /// The function.
        address: PciAddress,
        /// By whom.
        holds: Vec<Hold>,
    },
    /// It could not be found out whether a namespace is in use.
    #[error("whether {} is in use can't be found out: {source}; run as root, or use --force", .path.display())]
    Unknown {
        /// What could not be read.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A process has the controller open through VFIO.
    #[error(
        "{address} is in use through VFIO (IOMMU group {group}) by {}; end that first, or use --force to \
         wait until it lets go",
        list(.holders)
    )]
    GroupInUse {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The processes that have the group open.
        holders: Vec<Process>,
    },
    /// The kernel refused a step.
    #[error("{address}: writing {} failed: {source}{}", .attribute.display(), hint(.source))]
    Write {
        /// The function.
        address: PciAddress,
        /// The attribute of sysfs.
        attribute: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The driver did not take the function.
    #[error(
        "{address} was not taken by the driver it was offered to, but is bound to {}; the kernel log \
         (`dmesg`) may say why",
        .driver.as_deref().unwrap_or("none")
    )]
    NotTaken {
        /// The function.
        address: PciAddress,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// vfio-pci took the function back at once.
    #[error(
        "{address} was taken by vfio-pci again, which is told to by its own list of ids: look for \
         `vfio-pci.ids=` on the kernel's command line and `options vfio-pci ids=` in /etc/modprobe.d"
    )]
    StillVfio {
        /// The function.
        address: PciAddress,
    },
    /// A step failed after others had succeeded.
    #[error("{address} did not change its driver; {undone}: {error}")]
    Partly {
        /// The function.
        address: PciAddress,
        /// What failed.
        #[source]
        error: Box<Self>,
        /// Whether the steps before could be undone.
        undone: Undone,
    },
}

/// Whether what was done could be undone.
#[derive(Debug)]
pub(crate) enum Undone {
    /// All is as before.
    All,
    /// Something is not.
    Failed(Box<BindError>),
}

impl BindError {
    pub(super) fn write(address: PciAddress, attribute: &Path, source: io::Error) -> Self {
        Self::Write {
            address,
            attribute: attribute.to_owned(),
            source,
        }
    }

    pub(super) fn after(self, address: PciAddress, undo: Result<(), Self>) -> Self {
        let undone = match undo {
            Ok(()) => Undone::All,
            Err(error) => Undone::Failed(Box::new(error)),
        };
        Self::Partly {
            address,
            error: Box::new(self),
            undone,
        }
    }
}

impl Display for Undone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => write!(f, "all is as it was before"),
            Self::Failed(error) => write!(f, "undoing the steps before failed too ({error})"),
        }
    }
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; run as root",
        _ => "",
    }
}

fn list(items: &[impl Display]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
