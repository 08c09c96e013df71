//! `nvme-async bind` and `unbind`: hand a controller to VFIO, and back to the kernel.

mod error;
mod held;

use std::path::Path;

use nvme_async::device::vfio::PciAddress;

pub(crate) use self::error::BindError;

use crate::pci::{self, Host};

const VFIO: &str = "vfio-pci";

/// What [`bind`] or [`unbind`] left a function at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    /// The driver that the function is bound to now; none if none wanted it.
    pub(crate) driver: Option<String>,
    /// Whether anything had to be done.
    pub(crate) changed: bool,
}

/// Takes a controller from the kernel's driver and gives it to vfio-pci.
///
/// A controller with a namespace that is in use is refused, unless `force` is set; its users then
/// see I/O errors and may lose data. If a step fails, those before are undone. One that is bound to
/// vfio-pci already is left alone.
///
/// # Errors
///
/// See [`BindError`].
pub(crate) fn bind(host: &Host, address: PciAddress, force: bool) -> Result<Bound, BindError> {
    check(host, address)?;
    let driver = host.driver(address);
    if driver.as_deref() == Some(VFIO) {
        return Ok(Bound {
            driver,
            changed: false,
        });
    }
    if host.function(address).iommu_group.is_none() {
        return Err(BindError::NoIommu { address });
    }
    if !host.driver_path(VFIO).exists() {
        return Err(BindError::NoVfio);
    }
    // Held until the kernel has let go, so that nobody begins to use a namespace meanwhile.
    let _claims = if force {
        Vec::new()
    } else {
        held::claim(host, address)?
    };
    change_driver(host, address, driver.as_deref(), Some(VFIO))?;
    Ok(Bound {
        driver: host.driver(address),
        changed: true,
    })
}

/// Takes a controller from vfio-pci and gives it to whichever of the kernel's drivers wants it.
///
/// While a process has it open this is refused, unless `force` is set: it then waits for that
/// process to let go, which the kernel asks it to do. If a step fails, those before are undone. One
/// that is not bound to vfio-pci is left alone, except that nothing binds it there any more.
///
/// # Errors
///
/// See [`BindError`].
pub(crate) fn unbind(host: &Host, address: PciAddress, force: bool) -> Result<Bound, BindError> {
    check(host, address)?;
    let driver = host.driver(address);
    if driver.as_deref() != Some(VFIO) && driver_override(host, address).as_deref() != Some(VFIO) {
        return Ok(Bound {
            driver,
            changed: false,
        });
    }
    let ours = driver.as_deref().filter(|driver| *driver == VFIO);
    if let (Some(_), Some(group), false) = (ours, host.function(address).iommu_group, force) {
        let holders = held::processes(host, &[format!("/dev/vfio/{group}")]);
        if !holders.is_empty() {
            return Err(BindError::GroupInUse {
                address,
                group,
                holders,
            });
        }
    }
    change_driver(host, address, ours, None)?;
    match host.driver(address) {
        driver if driver.as_deref() == Some(VFIO) => Err(BindError::StillVfio { address }),
        driver => Ok(Bound {
            driver,
            changed: true,
        }),
    }
}

fn check(host: &Host, address: PciAddress) -> Result<(), BindError> {
    match host.class(address) {
        None => Err(BindError::NoSuchFunction { address }),
        Some(class) if !Host::is_nvme(&class) => Err(BindError::NotNvme { address, class }),
        Some(_) => Ok(()),
    }
}

/// The driver that a function is reserved for.
fn driver_override(host: &Host, address: PciAddress) -> Option<String> {
    let path = host.function_path(address).join("driver_override");
    pci::attribute(&path).filter(|driver| driver != "(null)")
}

/// Takes a function from the driver `from` and lets `wanted` have it, or any if none is named.
fn change_driver(
    host: &Host,
    address: PciAddress,
    from: Option<&str>,
    wanted: Option<&'static str>,
) -> Result<(), BindError> {
    let before = driver_override(host, address);
    let name = address.to_string();
    let write = |attribute: &Path, text: &str| {
        host.write(attribute, text)
            .map_err(|source| BindError::write(address, attribute, source))
    };
    let reserve = |driver: Option<&str>| {
        // A line without a name clears it.
        let text = driver.unwrap_or("\n");
        write(&host.function_path(address).join("driver_override"), text)
    };
    let release = |driver: &str| write(&host.driver_path(driver).join("unbind"), &name);
    let probe = || write(&host.path("sys/bus/pci/drivers_probe"), &name);

    reserve(wanted)?;
    let steps = || {
        if let Some(driver) = from {
            release(driver)?;
        }
        if wanted.is_some() || from.is_some() {
            probe()?;
        }
        match host.driver(address) {
            driver if wanted.is_none() || driver.as_deref() == wanted => Ok(()),
            driver => Err(BindError::NotTaken { address, driver }),
        }
    };
    steps().map_err(|error| {
        let undo = || {
            reserve(before.as_deref())?;
            if host.driver(address).as_deref() == from {
                return Ok(());
            }
            probe()?;
            match host.driver(address) {
                driver if driver.as_deref() == from => Ok(()),
                driver => Err(BindError::NotTaken { address, driver }),
            }
        };
        error.after(address, undo())
    })
}

#[cfg(test)]
mod tests;
