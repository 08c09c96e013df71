//! Who uses a controller's namespaces.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nvme_async::device::vfio::PciAddress;

use super::BindError;
use crate::pci::{self, Host};

/// A use of a block device that would not survive losing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// A file system is mounted from it.
    Mounted {
        /// The block device.
        device: String,
        /// Where.
        at: String,
    },
    /// The kernel swaps to it.
    Swap {
        /// The block device.
        device: String,
    },
    /// Another block device is built on it: device mapper, RAID.
    Below {
        /// The block device.
        device: String,
        /// What is built on it.
        other: String,
    },
    /// A process has it open.
    Open {
        /// The block device.
        device: String,
        /// The process.
        process: Process,
    },
    /// Someone has it to itself.
    Exclusive {
        /// The block device.
        device: String,
    },
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { device, at } => write!(f, "{device} is mounted at {at}"),
            Self::Swap { device } => write!(f, "{device} is swap space"),
            Self::Below { device, other } => write!(f, "{device} is part of {other}"),
            Self::Open { device, process } => write!(f, "{device} is open in {process}"),
            Self::Exclusive { device } => write!(f, "{device} is in exclusive use"),
        }
    }
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its id.
    pub(crate) pid: u32,
    /// Its name, as the kernel shortens it.
    pub(crate) command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.command, self.pid)
    }
}

/// A disk or one of its partitions.
struct BlockDevice {
    name: String,
    /// As in `259:0`.
    number: String,
    holders: Vec<String>,
}

/// Checks that nobody uses the namespaces of a function, and claims them, so that nobody can begin
/// to (mount, swap on, build on them) while the result lives.
pub(super) fn claim(host: &Host, address: PciAddress) -> Result<Vec<File>, BindError> {
    let disks = host.disks(address);
    let devices: Vec<_> = disks
        .iter()
        .flat_map(|disk| block_devices(host, disk))
        .collect();
    let mut holds = mounted(host, &devices)?;
    holds.extend(swapped(host, &devices)?);
    for device in &devices {
        let below = |other: &String| Hold::Below {
            device: device.name.clone(),
            other: other.clone(),
        };
        holds.extend(device.holders.iter().map(below));
        let node = format!("/dev/{}", device.name);
        let open = |process| Hold::Open {
            device: device.name.clone(),
            process,
        };
        holds.extend(processes(host, &[node]).into_iter().map(open));
    }
    if !holds.is_empty() {
        return Err(BindError::Held { address, holds });
    }
    // The whole disk excludes its partitions, and is busy when one of them is. This also finds what
    // is mounted where we can't see it: in another mount namespace.
    let mut claims = Vec::new();
    for disk in disks {
        let node = host.path("dev").join(&disk);
        match OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&node)
        {
            Ok(file) => claims.push(file),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let holds = vec![Hold::Exclusive { device: disk }];
                return Err(BindError::Held { address, holds });
            }
            // A disk without a device file, or one that is gone by now, is used by nobody.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => {}
            Err(source) => return Err(BindError::Unknown { path: node, source }),
        }
    }
    Ok(claims)
}

/// The processes that have one of these files open, as far as we may look.
pub(super) fn processes(host: &Host, files: &[String]) -> Vec<Process> {
    let has_it_open = |process: &Path| {
        pci::entries(&process.join("fd")).iter().any(|fd| {
            fs::read_link(fd)
                .is_ok_and(|target| files.iter().any(|file| target.as_os_str() == file.as_str()))
        })
    };
    let mut processes: Vec<_> = pci::entries(&host.path("proc"))
        .into_iter()
        .filter_map(|process| {
            let pid = process.file_name()?.to_str()?.parse().ok()?;
            let command = pci::attribute(&process.join("comm")).unwrap_or_default();
            has_it_open(&process).then_some(Process { pid, command })
        })
        .collect();
    processes.sort_by_key(|process| process.pid);
    processes
}

fn block_devices(host: &Host, disk: &str) -> Vec<BlockDevice> {
    let path = host.path("sys/block").join(disk);
    let partitions = pci::entries(&path)
        .into_iter()
        .filter(|path| path.join("partition").exists());
    std::iter::once(path.clone())
        .chain(partitions)
        .filter_map(|path| {
            let holders = pci::entries(&path.join("holders"));
            let name_of = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
            Some(BlockDevice {
                name: name_of(&path)?,
                number: pci::attribute(&path.join("dev")).unwrap_or_default(),
                holders: holders.iter().filter_map(|path| name_of(path)).collect(),
            })
        })
        .collect()
}

fn mounted(host: &Host, devices: &[BlockDevice]) -> Result<Vec<Hold>, BindError> {
    let text = read(&host.path("proc/self/mountinfo"))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let number = fields.nth(2)?;
            let at = unescape(fields.nth(1)?);
            // Some file systems (btrfs) show a number of their own; they are known by their source.
            let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
            let device = devices
                .iter()
                .find(|device| device.number == number || is_node(host, source, &device.name))?;
            Some(Hold::Mounted {
                device: device.name.clone(),
                at,
            })
        })
        .collect())
}

fn swapped(host: &Host, devices: &[BlockDevice]) -> Result<Vec<Hold>, BindError> {
    let text = read(&host.path("proc/swaps"))?;
    let files: Vec<&str> = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let is_swap =
        |device: &&BlockDevice| files.iter().any(|file| is_node(host, file, &device.name));
    let hold = |device: &BlockDevice| Hold::Swap {
        device: device.name.clone(),
    };
    Ok(devices.iter().filter(is_swap).map(hold).collect())
}

/// Whether a path, or what it is a symbolic link to, is the device file of a block device.
fn is_node(host: &Host, path: &str, device: &str) -> bool {
    let Some(below_dev) = path.strip_prefix("/dev/") else {
        return false;
    };
    let node = host.path("dev").join(below_dev);
    below_dev == device
        || fs::canonicalize(node)
            .is_ok_and(|target| target.file_name().is_some_and(|name| name == device))
}

fn read(path: &Path) -> Result<String, BindError> {
    match fs::read(path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        // A kernel without swap has no list of it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(BindError::Unknown {
            path: path.to_owned(),
            source,
        }),
    }
}

/// A path in which blanks and the like are written in octal: `\040`.
fn unescape(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part
            .get(..3)
            .and_then(|octal| u8::from_str_radix(octal, 8).ok())
        {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend(part.as_bytes().iter().skip(3));
            }
            None => {
                bytes.push(b'\\');
                bytes.extend(part.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_blanks() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/plain"), "/plain");
        assert_eq!(unescape(r"odd\x\04"), r"odd\x\04");
    }
}
