//! Why a function can't be opened, and what to do about it.

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;

use super::pci::{Holder, Neighbour, PciAddress};

/// Why a function could not be opened through VFIO. The messages say what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
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
    /// The function is behind no IOMMU, so user space can't be given access to it.
    #[error(
        "{address} is behind no IOMMU: switch VT-d or AMD-Vi on in the firmware, and boot with the kernel \
         parameter intel_iommu=on (Intel) or without amd_iommu=off (AMD); in a virtual machine, give it a \
         virtual IOMMU"
    )]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// The function is not bound to VFIO's driver.
    #[error(
        "{address} is bound to {}, not to vfio-pci: run `nvme-async bind {address}` (which takes its disks \
         away from the kernel)",
        driver_name(.driver)
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// The driver that it is bound to.
        driver: Option<String>,
    },
    /// The kernel has no VFIO, or no driver for this kind of IOMMU.
    #[error(
        "VFIO is not there: run `modprobe vfio-pci` and `modprobe vfio_iommu_type1` ({source})"
    )]
    ModulesNotLoaded {
        /// What was tried and failed.
        source: Box<dyn Error + Send + Sync>,
    },
    /// /dev/vfio/vfio can't be opened.
    #[error(
        "/dev/vfio/vfio can't be opened: {source}; everyone may normally read and write it, but a \
         container needs it among its devices"
    )]
    Container {
        /// The reason.
        source: io::Error,
    },
    /// The function is bound to VFIO's driver, but its group has no device file.
    #[error(
        "{address} is bound to vfio-pci, but {} is missing: in a container, pass that device (and \
         /dev/vfio/vfio) in",
        .node.display()
    )]
    GroupNodeMissing {
        /// The function.
        address: PciAddress,
        /// The device file.
        node: PathBuf,
    },
    /// The group's device file may not be opened by this user.
    #[error(
        "no permission to open {} ({owner}): run as root, `chown` it to this user, or add a udev rule for \
         it; in a container, allow the device",
        .node.display()
    )]
    GroupAccess {
        /// The device file.
        node: PathBuf,
        /// Its owner and permissions, in words.
        owner: String,
        /// The reason.
        source: io::Error,
    },
    /// This process has the function open.
    #[error(
        "{address} is open in this process already: open its namespaces through the same controller, or drop \
         all handles of the earlier one first"
    )]
    AlreadyOpen {
        /// The function.
        address: PciAddress,
    },
    /// Another process has the group open, or another library in this one.
    #[error(
        "{address}: IOMMU group {group} is in use by {}; only one process at a time can have it",
        list(.holders, "another process")
    )]
    GroupBusy {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The processes that have it open; empty if none could be found.
        holders: Vec<Holder>,
    },
    /// The kernel's drivers use other devices of the group.
    #[error(
        "{address}: the kernel uses other devices of IOMMU group {group}, which can only be given away \
         whole: {}. Bind them to vfio-pci (`nvme-async bind` if they are NVMe), or to no driver",
        list(.others, "see /sys/kernel/iommu_groups")
    )]
    GroupNotViable {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The other devices and their drivers.
        others: Vec<Neighbour>,
    },
    /// The IOMMU does not check where interrupts go, so a device could forge them.
    #[error(
        "{address}: this machine has no interrupt remapping, without which the kernel gives no device to \
         user space: switch it on in the firmware (in QEMU, -device intel-iommu,intremap=on with \
         kernel-irqchip=split), or accept that the device can inject interrupts: `modprobe vfio_iommu_type1 \
         allow_unsafe_interrupts=1`"
    )]
    NoInterruptRemapping {
        /// The function.
        address: PciAddress,
    },
    /// The process may have no more open files.
    #[error(
        "{address}: the {vectors} interrupt vectors need one open file each, and the limit is reached: raise \
         it (`ulimit -n`, systemd's LimitNOFILE=), or ask for fewer queues"
    )]
    OpenFiles {
        /// The function.
        address: PciAddress,
        /// How many vectors were to be set up.
        vectors: u16,
        /// The reason.
        source: io::Error,
    },
    /// The controller lacks something that this driver needs.
    #[error("{address} can't be used: {reason}")]
    Unusable {
        /// The function.
        address: PciAddress,
        /// What is missing.
        reason: String,
    },
    /// A system call failed for an uncommon reason.
    #[error("{address}: {operation} failed: {source}")]
    System {
        /// The function.
        address: PciAddress,
        /// What was attempted.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
}

fn driver_name(driver: &Option<String>) -> String {
    driver.as_ref().map_or_else(
        || "no driver".to_owned(),
        |name| format!("the driver `{name}`"),
    )
}

fn list(items: &[impl Display], if_none: &str) -> String {
    if items.is_empty() {
        return if_none.to_owned();
    }
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
