//! NVMe controllers on the PCI bus, as the kernel shows them.

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nvme_async::device::vfio::PciAddress;
use serde::{Serialize, Serializer};

/// Class code of an NVMe I/O controller (NVMe over PCIe transport specification 1.0, section 3.8.1).
const NVME_CLASS: &str = "0x010802";

/// An NVMe controller on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Function {
    /// Its PCI address.
    #[serde(serialize_with = "as_text")]
    pub(crate) address: PciAddress,
    /// The driver that it is bound to.
    pub(crate) driver: Option<String>,
    /// Its IOMMU group; none without an IOMMU.
    pub(crate) iommu_group: Option<u32>,
    /// Its model, known while the kernel's driver has it.
    pub(crate) model: Option<String>,
    /// Bytes in all of its namespaces, known while the kernel's driver has it.
    pub(crate) size: Option<u64>,
}

fn as_text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// The running system, or a directory tree that looks like one.
pub(crate) struct Host {
    root: PathBuf,
    attributes: Box<dyn Attributes>,
}

/// Writes attributes of sysfs, which make the kernel act.
pub(crate) trait Attributes {
    /// Writes `text` to an attribute in one go.
    fn write(&self, attribute: &Path, text: &str) -> io::Result<()>;
}

/// The kernel's own attributes.
struct Sysfs;

impl Attributes for Sysfs {
    fn write(&self, attribute: &Path, text: &str) -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).open(attribute)?;
        io::Write::write_all(&mut file, text.as_bytes())
    }
}

impl Host {
    /// The system that this program runs on.
    pub(crate) fn system() -> Self {
        Self::new(Path::new("/"), Sysfs)
    }

    /// A tree below `root` with `sys`, `dev` and `proc`.
    pub(crate) fn new(root: &Path, attributes: impl Attributes + 'static) -> Self {
        Self {
            root: root.to_owned(),
            attributes: Box::new(attributes),
        }
    }

    /// A path of this system.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The directory of a function.
    pub(crate) fn function_path(&self, address: PciAddress) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address.to_string())
    }

    /// The directory of a PCI driver.
    pub(crate) fn driver_path(&self, driver: &str) -> PathBuf {
        self.path("sys/bus/pci/drivers").join(driver)
    }

    /// Writes an attribute of sysfs.
    pub(crate) fn write(&self, attribute: &Path, text: &str) -> io::Result<()> {
        self.attributes.write(attribute, text)
    }

    /// The NVMe controllers, by address.
    ///
    /// # Errors
    ///
    /// When the list of functions can't be read. A system without PCI has none.
    pub(crate) fn functions(&self) -> io::Result<Vec<Function>> {
        let directory = match fs::read_dir(self.path("sys/bus/pci/devices")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            directory => directory?,
        };
        let mut functions = Vec::new();
        for entry in directory {
            let Ok(address) = entry?.file_name().to_string_lossy().parse() else {
                continue;
            };
            if self.class(address).as_deref() == Some(NVME_CLASS) {
                functions.push(self.function(address));
            }
        }
        functions.sort_by_key(|function| function.address);
        Ok(functions)
    }

    /// The class code of a function, as sysfs shows it; nothing if there is no such function.
    pub(crate) fn class(&self, address: PciAddress) -> Option<String> {
        attribute(&self.function_path(address).join("class"))
    }

    /// Whether that class code is an NVMe controller's.
    pub(crate) fn is_nvme(class: &str) -> bool {
        class == NVME_CLASS
    }

    /// What is known of a function.
    pub(crate) fn function(&self, address: PciAddress) -> Function {
        let path = self.function_path(address);
        let controllers = entries(&path.join("nvme"));
        let sizes: Vec<u64> = controllers
            .iter()
            .flat_map(|path| namespaces(path))
            .filter_map(|path| {
                // In units of 512 bytes, whatever the format.
                Some(attribute(&path.join("size"))?.parse::<u64>().ok()? * 512)
            })
            .collect();
        Function {
            address,
            driver: self.driver(address),
            iommu_group: link_name(&path.join("iommu_group")).and_then(|name| name.parse().ok()),
            model: controllers
                .iter()
                .find_map(|path| attribute(&path.join("model"))),
            size: (!controllers.is_empty()).then(|| sizes.iter().sum()),
        }
    }

    /// The driver that a function is bound to.
    pub(crate) fn driver(&self, address: PciAddress) -> Option<String> {
        link_name(&self.function_path(address).join("driver"))
    }

    /// The block devices of the function's namespaces: disks, without their partitions.
    pub(crate) fn disks(&self, address: PciAddress) -> Vec<String> {
        let controllers = entries(&self.function_path(address).join("nvme"));
        let mut disks: Vec<String> = controllers
            .iter()
            .flat_map(|path| namespaces(path))
            .filter_map(|path| disk_name(path.file_name()?.to_str()?))
            .collect();
        disks.sort();
        disks.dedup();
        disks
    }
}

/// The namespaces below a controller of the kernel's driver.
fn namespaces(controller: &Path) -> impl Iterator<Item = PathBuf> {
    let is_namespace = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| disk_name(name.to_str()?))
            .is_some()
    };
    entries(controller).into_iter().filter(is_namespace)
}

/// The disk that a namespace's entry stands for: `nvme0n1` for itself, and also for `nvme0c1n1`, which
/// is one path to it of several. Nothing for other entries.
fn disk_name(entry: &str) -> Option<String> {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (controller, namespace) = entry.strip_prefix("nvme")?.rsplit_once('n')?;
    let subsystem = match controller.split_once('c') {
        Some((subsystem, path)) if number(path) => subsystem,
        Some(_) => return None,
        None => controller,
    };
    (number(subsystem) && number(namespace)).then(|| format!("nvme{subsystem}n{namespace}"))
}

/// The text of an attribute; nothing if there is none or it is empty.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The last part of where a symbolic link leads.
pub(crate) fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// What is in a directory; nothing if it can't be read.
pub(crate) fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

/// A made-up machine for tests, whose "kernel" binds drivers as it is told.
#[cfg(test)]
pub(crate) mod testing;
