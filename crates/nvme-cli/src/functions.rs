//! The commands on PCI functions: `list`, `bind` and `unbind`.

use std::io::Write;

use clap::Args;
use nvme_async::device::vfio::PciAddress;

use crate::bind::{self, BindError, Bound};
use crate::failure::Failure;
use crate::list;
use crate::pci::Host;

/// Lists the NVMe controllers on the PCI bus, with their drivers and IOMMU groups.
#[derive(Args, Clone, Debug)]
pub(crate) struct ListArguments {
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// Takes a controller from the kernel's driver and gives it to vfio-pci (as root).
///
/// A controller with a namespace that is mounted or otherwise in use is refused.
#[derive(Args, Clone, Debug)]
pub(crate) struct BindArguments {
    /// The PCI function, such as 0000:44:00.0.
    address: PciAddress,

    /// Take it even if it is in use, which may lose data.
    #[arg(long)]
    force: bool,
}

/// Gives a controller back to the kernel's driver (as root).
#[derive(Args, Clone, Debug)]
pub(crate) struct UnbindArguments {
    /// The PCI function, such as 0000:44:00.0.
    address: PciAddress,

    /// Take it even if a process has it open, and wait until that lets go.
    #[arg(long)]
    force: bool,
}

/// Runs `list`.
pub(crate) fn list(arguments: &ListArguments) -> Result<(), Failure> {
    Ok(list::print(
        &Host::system(),
        arguments.json,
        &mut std::io::stdout().lock(),
    )?)
}

/// Runs `bind`.
pub(crate) fn bind(arguments: &BindArguments) -> Result<(), Failure> {
    let bound = bind::bind(&Host::system(), arguments.address, arguments.force)?;
    report(arguments.address, &bound)
}

/// Runs `unbind`.
pub(crate) fn unbind(arguments: &UnbindArguments) -> Result<(), Failure> {
    let bound = bind::unbind(&Host::system(), arguments.address, arguments.force)?;
    report(arguments.address, &bound)
}

fn report(address: PciAddress, bound: &Bound) -> Result<(), Failure> {
    let driver = bound.driver.as_deref().unwrap_or("no driver");
    let already = if bound.changed { "" } else { "already " };
    writeln!(std::io::stdout(), "{address} is {already}bound to {driver}")?;
    Ok(())
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        match error {
            BindError::NoSuchFunction { .. } | BindError::NotNvme { .. } => {
                Self::Request(error.into())
            }
            _ => Self::Operation(error.into()),
        }
    }
}
