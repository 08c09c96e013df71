//! What sysfs knows about a function, its driver and its IOMMU group.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::error::OpenError;

/// Class code of an NVMe I/O controller (NVMe over PCIe transport specification 1.0, section 3.8.1).
const NVME_CLASS: &str = "0x010802";

/// The address of a PCI function: domain, bus, device and function, as in `0000:44:00.0`.
///
/// Parsed with or without its domain; always shown with it, as sysfs names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    #[cfg(test)]
    pub(super) const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Self {
        Self {
            domain,
            bus,
            device,
            function,
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl FromStr for PciAddress {
    type Err = ParsePciAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_address(text).ok_or_else(|| ParsePciAddressError {
            text: text.to_owned(),
        })
    }
}

fn parse_address(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    let digits = |text: &str, most| match text.len() {
        len if len > most || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) => None,
        _ => u32::from_str_radix(text, 16).ok(),
    };
    Some(PciAddress {
        domain: digits(domain, 8)?,
        bus: digits(bus, 2)? as u8,
        device: digits(device, 2).filter(|&device| device < 0x20)? as u8,
        function: digits(function, 1).filter(|&function| function < 8)? as u8,
    })
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a PCI address such as 0000:44:00.0")]
pub struct ParsePciAddressError {
    /// What was given.
    pub text: String,
}

/// Where the kernel shows itself; elsewhere in tests.
#[derive(Clone, Debug)]
pub(super) struct Roots {
    sysfs: PathBuf,
    dev: PathBuf,
    proc: PathBuf,
}

impl Roots {
    /// The running system's.
    pub(super) fn system() -> Self {
        Self::under(Path::new("/"))
    }

    /// Those below a directory.
    pub(super) fn under(root: &Path) -> Self {
        Self {
            sysfs: root.join("sys"),
            dev: root.join("dev"),
            proc: root.join("proc"),
        }
    }

    /// The device file of a group.
    pub(super) fn group_node(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    fn function(&self, address: PciAddress) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(address.to_string())
    }
}

/// Another device of an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address, as sysfs names it.
    pub address: String,
    /// The driver that it is bound to.
    pub driver: Option<String>,
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({})",
            self.address,
            self.driver.as_deref().unwrap_or("no driver")
        )
    }
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name, as the kernel shortens it.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.command, self.pid)
    }
}

/// Checks that a function is an NVMe controller behind an IOMMU and bound to VFIO's driver; gives
/// its IOMMU group.
pub(super) fn locate(roots: &Roots, address: PciAddress) -> Result<u32, OpenError> {
    let function = roots.function(address);
    if !function.exists() {
        return Err(OpenError::NoSuchFunction { address });
    }
    let class = fs::read_to_string(function.join("class")).unwrap_or_default();
    if class.trim() != NVME_CLASS {
        return Err(OpenError::NotNvme {
            address,
            class: class.trim().to_owned(),
        });
    }
    let group = link_name(&function.join("iommu_group")).and_then(|group| group.parse().ok());
    let Some(group) = group else {
        return Err(OpenError::NoIommu { address });
    };
    // VFIO's mode without an IOMMU makes up groups of this name.
    let name = fs::read_to_string(function.join("iommu_group/name")).unwrap_or_default();
    if name.trim() == "vfio-noiommu" {
        return Err(OpenError::NoIommu { address });
    }
    match link_name(&function.join("driver")) {
        Some(driver) if is_vfio(&driver) => Ok(group),
        driver => Err(OpenError::NotBound { address, driver }),
    }
}

/// The devices of a group, other than `address`, that keep it from being used through VFIO; all
/// others if none is found to.
pub(super) fn others_in_group(roots: &Roots, group: u32, address: PciAddress) -> Vec<Neighbour> {
    let devices = roots
        .sysfs
        .join(format!("kernel/iommu_groups/{group}/devices"));
    let mut others: Vec<_> = entries(&devices)
        .into_iter()
        .filter(|entry| !entry.ends_with(address.to_string()))
        .map(|entry| Neighbour {
            address: entry
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            driver: link_name(&entry.join("driver")),
        })
        .collect();
    others.sort_by(|a, b| a.address.cmp(&b.address));
    let in_the_way = |other: &Neighbour| {
        other
            .driver
            .as_deref()
            .is_some_and(|driver| !is_vfio(driver) && driver != "pci-stub" && driver != "pcieport")
    };
    if others.iter().any(in_the_way) {
        others.retain(in_the_way);
    }
    others
}

/// The processes that have a group open, as far as we may look.
pub(super) fn holders(roots: &Roots, group: u32) -> Vec<Holder> {
    // A process's descriptors name the device file as that process sees it.
    let node = format!("/dev/vfio/{group}");
    let has_it_open = |process: &Path| {
        entries(&process.join("fd"))
            .iter()
            .any(|fd| fs::read_link(fd).is_ok_and(|target| target.as_os_str() == node.as_str()))
    };
    let holder = |process: PathBuf| {
        let pid = process.file_name()?.to_str()?.parse().ok()?;
        let command = fs::read_to_string(process.join("comm")).unwrap_or_default();
        has_it_open(&process).then(|| Holder {
            pid,
            command: command.trim().to_owned(),
        })
    };
    entries(&roots.proc)
        .into_iter()
        .filter_map(holder)
        .collect()
}

/// Owner, group and permissions of a file, in words.
pub(super) fn owner(path: &Path) -> String {
    match fs::metadata(path) {
        Ok(meta) => {
            let (uid, gid, mode) = (meta.uid(), meta.gid(), meta.mode() & 0o7777);
            format!("owner uid {uid}, group gid {gid}, mode {mode:04o}")
        }
        Err(error) => format!("owner unknown: {error}"),
    }
}

/// Whether a driver is VFIO's own or one of its variants for particular devices.
fn is_vfio(driver: &str) -> bool {
    driver.ends_with("vfio-pci") || driver.ends_with("vfio_pci")
}

/// The last part of where a symbolic link leads.
fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

#[cfg(test)]
mod tests;
