//! IOMMU groups and their containers, shared by all functions that this process has open.

use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use iova::DmaMapper;
use iova::vfio::Type1Container;
use vfio_bindings::bindings::vfio as abi;
use vfio_ioctls::VfioError;

use super::closable::{Shared, gone};
use super::error::OpenError;
use super::lease::Unleased;
use super::pci::{self, PciAddress, Roots};
use super::registry::{Entry, Opened, Registry};
use super::sys::{self, Container};

/// Others reset a function, bind it or plug it in, and for that long, at most, it is waited until
/// they are done with it.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// The groups that this process has open: the kernel gives a group to one opener at a time, so a
/// second function of it must find the first one's descriptor.
static OPEN_GROUPS: Registry<u32, Group> = Registry::new();

/// An IOMMU group in a container of its own.
///
/// It is open for as long as one of its functions is. The last one takes it out of the container,
/// which ends all mappings, and gives it back to the host, no matter who still has something mapped:
/// what is then opened at the same address is another group, which may have the same number.
pub(super) struct Group {
    id: u32,
    unleased: Unleased,
    container: Type1Container<Container>,
    open: Shared<OpenGroup>,
}

struct OpenGroup {
    file: File,
    // Last: the next opener is let in when the descriptor is closed.
    _entry: Entry<u32, Group>,
}

/// The place of an open function in its group.
#[derive(Debug)]
pub(super) struct Member(Arc<Group>);

impl Member {
    pub(super) fn group(&self) -> &Arc<Group> {
        &self.0
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.0.open.leave();
    }
}

impl Group {
    /// A place in the group `id`, which is opened if this process does not have it open already.
    /// `address` is for errors.
    pub(super) fn open(roots: &Roots, id: u32, address: PciAddress) -> Result<Member, OpenError> {
        loop {
            let opened = OPEN_GROUPS.open(id, |entry| Self::new(roots, id, address, entry))?;
            let (Opened::Before(group) | Opened::Now(group)) = opened;
            if group.open.enter() {
                return Ok(Member(group));
            }
            // Its last function left it just now, so it is not registered any more.
        }
    }

    fn new(
        roots: &Roots,
        id: u32,
        address: PciAddress,
        entry: Entry<u32, Self>,
    ) -> Result<Self, OpenError> {
        let (file, container) = open_descriptors(roots, id, address)?;
        // SAFETY: the container was opened just now and only this group has it; all functions map
        // and unmap through this value, each in the addresses of its own lease.
        let container = unsafe { Type1Container::new(container) }.map_err(|source| {
            let operation = "asking what the IOMMU can do";
            OpenError::System {
                address,
                operation,
                source,
            }
        })?;
        Ok(Self {
            id,
            unleased: Unleased::new(&container.geometry().usable),
            container,
            open: Shared::new(OpenGroup {
                file,
                _entry: entry,
            }),
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Opens a function of this group; the kernel resets it on the way if it can, for which it does
    /// not wait until others are done with the function.
    pub(super) fn device(&self, address: PciAddress) -> io::Result<File> {
        let name = CString::new(address.to_string()).map_err(io::Error::other)?;
        let end = Instant::now() + PATIENCE;
        loop {
            let opened = self.open.with(|open| {
                let open = open.ok_or_else(gone)?;
                sys::group_device(open.file.as_fd(), &name).map(File::from)
            });
            let is_locked = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
            if !opened.as_ref().is_err_and(is_locked) || Instant::now() >= end {
                return opened;
            }
            thread::sleep(PAUSE);
        }
    }

    /// Does something with the container, which maps memory for all functions of the group. Their
    /// last one does not leave meanwhile: the kernel does not wait for calls that are in progress
    /// when it takes a container's driver away.
    pub(super) fn with_container<R>(
        &self,
        call: impl FnOnce(&Type1Container<Container>) -> R,
    ) -> R {
        self.open.with(|_| call(&self.container))
    }

    /// The addresses that no function of the group has.
    pub(super) fn unleased(&self) -> &Unleased {
        &self.unleased
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("id", &self.id)
            .field("container", &self.container)
            .finish_non_exhaustive()
    }
}

/// Opens a group and puts it alone into a new container.
fn open_descriptors(
    roots: &Roots,
    id: u32,
    address: PciAddress,
) -> Result<(File, Container), OpenError> {
    let system = |operation| {
        move |source| OpenError::System {
            address,
            operation,
            source,
        }
    };
    let container = Container::open().map_err(container_error)?;
    let node = roots.group_node(id);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&node)
        .map_err(|source| group_error(roots, id, address, source))?;
    let flags = sys::group_flags(file.as_fd()).map_err(system("asking for the group's state"))?;
    if flags & abi::VFIO_GROUP_FLAGS_VIABLE == 0 {
        let others = pci::others_in_group(roots, id, address);
        return Err(OpenError::GroupNotViable {
            address,
            group: id,
            others,
        });
    }
    sys::group_set_container(file.as_fd(), container.as_fd())
        .map_err(system("putting the group into a container"))?;
    sys::set_iommu(container.as_fd(), abi::VFIO_TYPE1v2_IOMMU)
        .map_err(|source| iommu_error(address, source))?;
    Ok((file, container))
}

fn container_error(error: VfioError) -> OpenError {
    match error {
        VfioError::OpenContainer(source) => match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::ModulesNotLoaded {
                source: Box::new(source),
            },
            _ => OpenError::Container { source },
        },
        // The container answers so when it has no driver for an IOMMU.
        error @ (VfioError::VfioExtension | VfioError::VfioApiVersion) => {
            OpenError::ModulesNotLoaded {
                source: Box::new(error),
            }
        }
        error => OpenError::Container {
            source: io::Error::other(error),
        },
    }
}

fn group_error(roots: &Roots, group: u32, address: PciAddress, source: io::Error) -> OpenError {
    let node = roots.group_node(group);
    match source.raw_os_error() {
        Some(libc::EBUSY) => OpenError::GroupBusy {
            address,
            group,
            holders: pci::holders(roots, group),
        },
        // EPERM comes from a container's list of devices.
        Some(libc::EACCES | libc::EPERM) => OpenError::GroupAccess {
            owner: pci::owner(&node),
            node,
            source,
        },
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
            OpenError::GroupNodeMissing { address, node }
        }
        _ => OpenError::System {
            address,
            operation: "opening the IOMMU group",
            source,
        },
    }
}

fn iommu_error(address: PciAddress, source: io::Error) -> OpenError {
    match source.raw_os_error() {
        Some(libc::EPERM) => OpenError::NoInterruptRemapping { address },
        Some(libc::ENODEV) => OpenError::ModulesNotLoaded {
            source: Box::new(source),
        },
        _ => OpenError::System {
            address,
            operation: "choosing the type 1 IOMMU driver",
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: PciAddress = PciAddress::new(0, 0x44, 0, 0);

    fn os(code: i32) -> io::Error {
        io::Error::from_raw_os_error(code)
    }

    #[test]
    fn errors_of_the_container() {
        for code in [libc::ENOENT, libc::ENODEV] {
            let error = container_error(VfioError::OpenContainer(os(code)));
            assert!(matches!(error, OpenError::ModulesNotLoaded { .. }));
            assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
        }
        let error = container_error(VfioError::VfioExtension);
        assert!(matches!(error, OpenError::ModulesNotLoaded { .. }));
        let error = container_error(VfioError::OpenContainer(os(libc::EACCES)));
        assert!(matches!(error, OpenError::Container { .. }));
    }

    #[test]
    fn errors_of_the_iommu() {
        let error = iommu_error(ADDRESS, os(libc::EPERM));
        assert!(matches!(error, OpenError::NoInterruptRemapping { .. }));
        assert!(matches!(
            iommu_error(ADDRESS, os(libc::ENODEV)),
            OpenError::ModulesNotLoaded { .. }
        ));
        assert!(matches!(
            iommu_error(ADDRESS, os(libc::EBUSY)),
            OpenError::System { .. }
        ));
    }

    #[test]
    fn errors_of_the_groups_node() {
        let tree = tempfile::tempdir().unwrap();
        let roots = Roots::under(tree.path());
        let error = |code| group_error(&roots, 7, ADDRESS, os(code));
        assert!(matches!(
            error(libc::EBUSY),
            OpenError::GroupBusy { group: 7, .. }
        ));
        assert!(matches!(error(libc::EACCES), OpenError::GroupAccess { .. }));
        assert!(matches!(error(libc::EPERM), OpenError::GroupAccess { .. }));
        assert!(matches!(
            error(libc::ENOENT),
            OpenError::GroupNodeMissing { .. }
        ));
        assert!(matches!(error(libc::EIO), OpenError::System { .. }));
    }
}
