//! Addresses that a user types.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::device::vfio::{ParsePciAddressError, PciAddress};

/// What a URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A PCI function, through the kernel's VFIO.
    Pci {
        address: PciAddress,
        namespace: Option<u32>,
    },
    /// The software controller.
    #[cfg(feature = "soft")]
    Soft(SoftTarget),
    /// A controller in another process.
    #[cfg(feature = "vfio-user")]
    VfioUser {
        /// The server's socket.
        path: PathBuf,
        namespace: Option<u32>,
    },
}

/// A software controller to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SoftTarget {
    /// The backing file; memory if there is none.
    pub(crate) path: Option<PathBuf>,
    /// In bytes, of each namespace. A file keeps its size without it.
    pub(crate) size: Option<u64>,
    pub(crate) lba_size: u32,
    /// How many namespaces there are. In files, each after the first has one of its own, with
    /// the number appended to the name.
    pub(crate) namespaces: u32,
    /// The namespace to open.
    pub(crate) namespace: Option<u32>,
    /// The time that each I/O command takes at least.
    pub(crate) latency: Duration,
    pub(crate) fd_only: bool,
    /// A plan of faults for the controller.
    pub(crate) faults: Option<PathBuf>,
}

/// A URL that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url}: {reason}")]
pub struct UrlError {
    /// What was given.
    pub url: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Target {
    /// A PCI function by its address, without a scheme.
    pub(crate) fn pci(address: &str) -> Result<Self, UrlError> {
        match address.parse() {
            Ok(address) => Ok(Self::Pci {
                address,
                namespace: None,
            }),
            Err(error) => Err(UrlError {
                url: address.to_owned(),
                reason: format!("{error}"),
            }),
        }
    }

    /// The namespace that the URL names.
    pub(crate) fn namespace(&self) -> Option<u32> {
        match self {
            Self::Pci { namespace, .. } => *namespace,
            #[cfg(feature = "soft")]
            Self::Soft(soft) => soft.namespace,
            #[cfg(feature = "vfio-user")]
            Self::VfioUser { namespace, .. } => *namespace,
        }
    }
}

impl FromStr for Target {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        let error = |reason: String| UrlError {
            url: url.to_owned(),
            reason,
        };
        if let Some(rest) = url.strip_prefix("nvme://") {
            return parse_pci(rest).map_err(error);
        }
        #[cfg(feature = "soft")]
        if let Some(rest) = url.strip_prefix("file:") {
            return parse_file(rest).map(Self::Soft).map_err(error);
        }
        #[cfg(feature = "soft")]
        if let Some(rest) = url.strip_prefix("mem:") {
            return parse_memory(rest).map(Self::Soft).map_err(error);
        }
        #[cfg(feature = "vfio-user")]
        if let Some(rest) = url.strip_prefix("vfio-user:") {
            return parse_vfio_user(rest).map_err(error);
        }
        Err(error(
            "unknown scheme; expected nvme://0000:44:00.0/1, vfio-user:/run/nvme.sock?ns=1, \
             file:disk.img?size=1G or mem:?size=256M"
                .to_owned(),
        ))
    }
}

fn parse_pci(rest: &str) -> Result<Target, String> {
    let (address, namespace) = match rest.split_once('/') {
        None | Some((_, "")) => (rest.trim_end_matches('/'), None),
        Some((address, namespace)) => (address, Some(parse_namespace(namespace)?)),
    };
    let address = address
        .parse()
        .map_err(|error: ParsePciAddressError| error.to_string())?;
    Ok(Target::Pci { address, namespace })
}

fn parse_namespace(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!(
            "{text:?} is not a namespace; they are numbered from 1"
        )),
        Ok(nsid) => Ok(nsid),
    }
}

#[cfg(feature = "vfio-user")]
fn parse_vfio_user(rest: &str) -> Result<Target, String> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if path.is_empty() {
        return Err("the path is missing; expected vfio-user:/run/nvme.sock?ns=1".to_owned());
    }
    let mut namespace = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("ns", value)) => namespace = Some(parse_namespace(value)?),
            _ => return Err(format!("unknown option {pair:?}; there is ns")),
        }
    }
    let path = path.into();
    Ok(Target::VfioUser { path, namespace })
}

#[cfg(feature = "soft")]
fn parse_file(rest: &str) -> Result<SoftTarget, String> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if path.is_empty() {
        return Err("the path is missing; expected file:disk.img?size=1G".to_owned());
    }
    parse_soft(Some(path.into()), query)
}

#[cfg(feature = "soft")]
fn parse_memory(rest: &str) -> Result<SoftTarget, String> {
    let query = match rest.strip_prefix('?') {
        Some(query) => query,
        None if rest.is_empty() => "",
        None => return Err(format!("unexpected {rest:?}; expected mem:?size=256M")),
    };
    let soft = parse_soft(None, query)?;
    if soft.size.is_none() {
        return Err("the size is missing; expected mem:?size=256M".to_owned());
    }
    Ok(soft)
}

#[cfg(feature = "soft")]
fn parse_soft(path: Option<PathBuf>, query: &str) -> Result<SoftTarget, String> {
    let mut soft = SoftTarget {
        path,
        size: None,
        lba_size: 512,
        namespaces: 1,
        namespace: None,
        latency: Duration::ZERO,
        fd_only: false,
        faults: None,
    };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "size" => soft.size = Some(parse_size(value)?),
            "lba" => {
                soft.lba_size = match value {
                    "512" => 512,
                    "4096" | "4k" | "4K" => 4096,
                    _ => return Err(format!("lba={value}: expected 512 or 4096")),
                }
            }
            "namespaces" => {
                soft.namespaces = match value.parse() {
                    Ok(count @ 1..=256) => count,
                    _ => return Err(format!("namespaces={value}: expected 1 to 256")),
                }
            }
            "ns" => soft.namespace = Some(parse_namespace(value)?),
            "latency" => soft.latency = nvme_soft::fault::parse_duration(value)?,
            "faults" if value.is_empty() => {
                return Err("faults=: expected the path of a plan in TOML".to_owned());
            }
            "faults" => soft.faults = Some(value.into()),
            "fd-only" => {
                soft.fd_only = match value {
                    "" | "1" => true,
                    "0" => false,
                    _ => return Err(format!("fd-only={value}: expected 0 or 1")),
                }
            }
            _ => {
                return Err(format!(
                    "unknown option {key:?}; there are size, lba, namespaces, ns, latency, fd-only and \
                     faults"
                ));
            }
        }
    }
    if let Some(size) = soft.size
        && (size == 0 || !size.is_multiple_of(soft.lba_size.into()))
    {
        return Err(format!(
            "size must be a multiple of {} bytes and not 0",
            soft.lba_size
        ));
    }
    Ok(soft)
}

/// Parses a number of bytes: digits and, if wanted, K, M, G or T for powers of 1024.
///
/// # Errors
///
/// A message that says what was expected.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => {
            return Err(format!(
                "{text:?} is not a size; expected a number such as 4096 or 1G"
            ));
        }
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is not a size; expected a number such as 4096 or 1G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_addresses() {
        let parse = |url: &str| url.parse::<Target>();
        let pci = |address: &str, namespace| {
            Ok(Target::Pci {
                address: address.parse().unwrap(),
                namespace,
            })
        };
        assert_eq!(parse("nvme://0000:44:00.0/1"), pci("0000:44:00.0", Some(1)));
        assert_eq!(parse("nvme://0000:44:00.0"), pci("0000:44:00.0", None));
        assert_eq!(parse("nvme://0000:44:00.0/"), pci("0000:44:00.0", None));
        assert_eq!(
            parse("nvme://0000:AB:1f.7/12"),
            pci("0000:ab:1f.7", Some(12))
        );
        assert_eq!(parse("nvme://44:00.0/2"), pci("0000:44:00.0", Some(2)));
        for bad in [
            "nvme://",
            "nvme://0000:44:00.8/1",
            "nvme://0000:44:20.0/1",
            "nvme://0000:44:00.0/0",
            "nvme://0000:44:00.0/x",
            "nvme://0000:44:00.0/1/2",
            "nvme://../../etc/1",
            "0000:44:00.0",
            "http://x",
            "",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[cfg(feature = "soft")]
    #[test]
    fn software_controllers() {
        let parse = |url: &str| match url.parse::<Target>() {
            Ok(Target::Soft(soft)) => Ok(soft),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        let disk = parse("file:disk.img?size=1G&lba=4096&ns=2&namespaces=3&latency=80us").unwrap();
        assert_eq!(disk.path.as_deref(), Some(std::path::Path::new("disk.img")));
        assert_eq!(disk.size, Some(1 << 30));
        assert_eq!(
            (disk.lba_size, disk.namespaces, disk.namespace),
            (4096, 3, Some(2))
        );
        assert_eq!(disk.latency, Duration::from_micros(80));
        assert_eq!(parse("file:/a/b").unwrap().size, None);
        assert_eq!(disk.faults, None);
        assert!(parse("mem:?size=256M&fd-only").unwrap().fd_only);
        let faulty = parse("mem:?size=1M&faults=../plans/a.toml&lba=4096").unwrap();
        assert_eq!(
            faulty.faults.as_deref(),
            Some(std::path::Path::new("../plans/a.toml"))
        );
        assert_eq!(faulty.lba_size, 4096);
        for bad in [
            "file:",
            "file:?size=1G",
            "mem:",
            "mem:?size=0",
            "mem:?size=1000",
            "mem:?size=1Q",
            "mem:?size=99999999999T",
            "mem:x?size=1G",
            "mem:?size=1G&lba=1024",
            "mem:?size=1G&colour=red",
            "mem:?size=1G&latency=5",
            "mem:?size=1G&namespaces=0",
            "mem:?size=1G&faults",
            "mem:?size=1G&faults=",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[cfg(feature = "vfio-user")]
    #[test]
    fn sockets() {
        let parse = |url: &str| url.parse::<Target>();
        let socket = |path: &str, namespace| {
            Ok(Target::VfioUser {
                path: path.into(),
                namespace,
            })
        };
        assert_eq!(
            parse("vfio-user:/run/nvme.sock?ns=2"),
            socket("/run/nvme.sock", Some(2))
        );
        assert_eq!(parse("vfio-user:a b%20:c?"), socket("a b%20:c", None));
        for bad in [
            "vfio-user:",
            "vfio-user:?ns=1",
            "vfio-user:/a?ns=0",
            "vfio-user:/a?ns",
            "vfio-user:/a?size=1G",
            "vfio-user",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("4KiB"), Ok(4096));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        for bad in ["", "k", "-1", "1.5G", "18446744073709551616", "1e3"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
